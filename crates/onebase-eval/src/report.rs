//! A comparison as one HTML file that needs nothing else: template, style sheet,
//! script and chart library (Chart.js, MIT) are in `assets/`.

use minijinja::value::Serde;
use minijinja::{Environment, Value, context};

use crate::{Comparison, Error, Result};

/// Ends in `.html` but for `.jinja`, which makes the engine escape for HTML.
const TEMPLATE: &str = "report.html.jinja";

impl Comparison {
    /// The report, to be looked at with a browser.
    ///
    /// # Errors
    /// When the template fails.
    pub fn html(&self) -> Result<String> {
        self.render().map_err(Error::Report)
    }

    fn render(&self) -> Result<String, minijinja::Error> {
        let mut environment = Environment::new();
        environment.add_template(TEMPLATE, include_str!("../assets/report.html.jinja"))?;
        environment.add_filter("num", num);
        environment.add_filter("pct", pct);
        environment.add_filter("bytes_h", bytes_h);
        environment.add_filter("thousands", thousands);
        let json = serde_json::to_string(self).map_err(|e| {
            minijinja::Error::new(minijinja::ErrorKind::BadSerialization, e.to_string())
        })?;
        environment.get_template(TEMPLATE)?.render(context! {
            data => Value::from(Serde(self)),
            // Within a script nothing is escaped, so nothing may end it.
            data_json => json.replace('<', "\\u003c"),
            chart_js => include_str!("../assets/chart.umd.js"),
            report_js => include_str!("../assets/report.js"),
            report_css => include_str!("../assets/report.css"),
        })
    }
}

const NOTHING: &str = "–";
const MINUS: char = '−';
const NARROW_SPACE: char = '\u{202f}';
const NO_BREAK_SPACE: char = '\u{a0}';

/// A finite number; `None` for anything else.
fn finite(value: &Value) -> Option<f64> {
    value.is_number().then(|| f64::try_from(value.clone()).ok()).flatten().filter(|x| x.is_finite())
}

/// With a typographic minus, and none before a zero.
fn signed(text: &str) -> String {
    match text.strip_prefix('-') {
        Some(rest) if rest.bytes().any(|b| b.is_ascii_digit() && b != b'0') => {
            format!("{MINUS}{rest}")
        }
        Some(rest) => rest.to_owned(),
        None => text.to_owned(),
    }
}

/// Significant digits, three unless said; the decimals of large numbers are cut.
fn digits_of(x: f64, digits: usize) -> String {
    if x == 0.0 {
        return "0".to_owned();
    }
    let scientific = format!("{x:.*e}", digits.saturating_sub(1));
    if x.abs() < 1e-4 {
        return signed(&scientific);
    }
    // The exponent after rounding: 9.996 has two digits before the point.
    let exponent: i64 = scientific.rsplit('e').next().and_then(|e| e.parse().ok()).unwrap_or(0);
    #[allow(clippy::cast_possible_wrap)]
    let decimals = usize::try_from(digits as i64 - 1 - exponent).unwrap_or(0);
    let rounded: f64 = if decimals > 0 { scientific.parse().unwrap_or(x) } else { x };
    signed(&format!("{rounded:.decimals$}"))
}

fn num(value: &Value, digits: Option<usize>) -> String {
    finite(value).map_or_else(|| NOTHING.to_owned(), |x| digits_of(x, digits.unwrap_or(3)))
}

/// A share in percent with so many decimals, one unless said.
fn pct(value: &Value, decimals: Option<usize>) -> String {
    finite(value).map_or_else(
        || NOTHING.to_owned(),
        |x| {
            let text = format!("{:.*}", decimals.unwrap_or(1), 100.0 * x);
            format!("{}{NARROW_SPACE}%", signed(&text))
        },
    )
}

/// Bytes in decimal units.
fn bytes_h(value: &Value) -> String {
    let Some(mut n) = finite(value) else { return NOTHING.to_owned() };
    let units = ["B", "kB", "MB", "GB", "TB"];
    let mut unit = 0;
    while n >= 1000.0 && unit + 1 < units.len() {
        n /= 1000.0;
        unit += 1;
    }
    let text = if unit > 0 { digits_of(n, 3) } else { format!("{n:.0}") };
    format!("{text}{NO_BREAK_SPACE}{}", units[unit])
}

/// A whole number with its thousands apart.
fn thousands(value: &Value) -> String {
    let Some(n) = finite(value) else { return NOTHING.to_owned() };
    let digits = format!("{n:.0}");
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(NARROW_SPACE);
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_for_people() {
        let with = |x: f64, digits| num(&Value::from(x), Some(digits));
        for (x, digits, expected) in [
            (0.0, 3, "0"),
            (1.0, 3, "1.00"),
            (9.996, 3, "10.0"),
            (0.118_4, 2, "0.12"),
            (1234.5, 3, "1234"),
            (0.000_012_34, 2, "1.2e-5"),
            (-0.5, 2, "−0.50"),
        ] {
            assert_eq!(with(x, digits), expected, "{x}");
        }
        assert_eq!(num(&Value::from(()), None), NOTHING);
        assert_eq!(num(&Value::from("1"), None), NOTHING);
        assert_eq!(num(&Value::from(f64::NAN), None), NOTHING);
        assert_eq!(pct(&Value::from(0.9204), None), "92.0\u{202f}%");
        assert_eq!(pct(&Value::from(-0.000_1), None), "0.0\u{202f}%");
        assert_eq!(pct(&Value::from(-0.02), Some(0)), "−2\u{202f}%");
        assert_eq!(bytes_h(&Value::from(1_500_000)), "1.50\u{a0}MB");
        assert_eq!(bytes_h(&Value::from(0)), "0\u{a0}B");
        assert_eq!(thousands(&Value::from(5_246_208)), "5\u{202f}246\u{202f}208");
        assert_eq!(thousands(&Value::from(12)), "12");
    }
}
