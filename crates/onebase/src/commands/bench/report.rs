use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};

use super::client::{Measured, Times};
use crate::args::BenchServeArgs;
use crate::output::{Output, number, percent, table};

/// Shares of requests below a time.
const QUANTILES: [f64; 2] = [0.5, 0.99];

/// The median and the 99th percentile, in seconds: the smallest time that so many do not exceed.
fn quantiles(times: impl Iterator<Item = Duration>) -> [f64; 2] {
    let mut seconds: Vec<f64> = times.map(|time| time.as_secs_f64()).collect();
    seconds.sort_by(f64::total_cmp);
    #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let at = |share: f64| (share * seconds.len() as f64).ceil() as usize;
    QUANTILES.map(|share| seconds.get(at(share).saturating_sub(1)).copied().unwrap_or(f64::NAN))
}

pub(super) fn print(
    args: &BenchServeArgs,
    models: &[String],
    measured: &[Measured],
    took: Duration,
    output: &Output,
) -> anyhow::Result<()> {
    let answered: Vec<Times> = measured.iter().filter_map(|m| m.times.clone().ok()).collect();
    let seconds = took.as_secs_f64();
    let new_tokens: usize = answered.iter().map(|times| times.new_tokens).sum();
    let bound = args.first_token_bound;
    let good = answered.iter().filter(|times| times.first_token.as_secs_f64() <= bound).count();
    #[allow(clippy::cast_precision_loss)]
    let per_second = |n: usize| n as f64 / seconds;
    #[allow(clippy::cast_precision_loss)]
    let good_share = good as f64 / measured.len().max(1) as f64;
    let cold = || answered.iter().filter(|times| times.load.is_some());
    #[allow(clippy::cast_precision_loss)]
    let per_token = answered
        .iter()
        .filter(|times| times.new_tokens > 1)
        .map(|times| (times.whole - times.first_token).div_f64((times.new_tokens - 1) as f64));
    let rows: Vec<(&str, [f64; 2])> = [
        ("first token", quantiles(answered.iter().map(|times| times.first_token))),
        ("per token", quantiles(per_token)),
        ("whole answer", quantiles(answered.iter().map(|times| times.whole))),
    ]
    .into_iter()
    .chain(
        (cold().count() > 0)
            .then(|| ("first token, cold", quantiles(cold().map(|t| t.first_token)))),
    )
    .chain(
        (cold().count() > 0)
            .then(|| ("reading a tenant", quantiles(cold().filter_map(|t| t.load)))),
    )
    .collect();
    let mut failures: BTreeMap<&str, usize> = BTreeMap::new();
    for reason in measured.iter().filter_map(|m| m.times.as_ref().err()) {
        *failures.entry(reason).or_default() += 1;
    }
    let asked: std::collections::BTreeSet<&str> =
        measured.iter().map(|m| m.model.as_str()).collect();
    let times: serde_json::Map<String, Value> = rows
        .iter()
        .map(|(name, [p50, p99])| ((*name).to_owned(), json!({"p50": p50, "p99": p99})))
        .collect();
    let object = json!({
        "requests": measured.len(),
        "answered": answered.len(),
        "models": models.len(),
        "models_asked": asked.len(),
        "seconds": seconds,
        "requests_per_second": per_second(answered.len()),
        "new_tokens_per_second": per_second(new_tokens),
        "first_token_bound_seconds": bound,
        "good_share": good_share,
        "good_per_second": per_second(good),
        "cold": cold().count(),
        "times_seconds": times,
        "failures": failures,
    });
    output.result(&object, || {
        let lines = rows.iter().map(|(name, [p50, p99])| {
            vec![(*name).to_owned(), number(*p50), number(*p99)]
        });
        let mut text = format!(
            "{}\n{} of {} requests to {} models answered in {} s: {} requests and {} tokens per second\n\
             first token within {} s: {}, {} requests per second",
            table(&["seconds", "p50", "p99"], 1, lines.collect()),
            answered.len(),
            measured.len(),
            asked.len(),
            number(seconds),
            number(per_second(answered.len())),
            number(per_second(new_tokens)),
            number(bound),
            percent(good_share),
            number(per_second(good)),
        );
        for (reason, n) in &failures {
            text.push_str(&format!("\n{n} failed: {reason}"));
        }
        text
    })
}
