use std::fmt;

use serde_json::{Map, Value};

use crate::{Codec, Error, Result};

/// What values an option takes.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// A whole number.
    Int {
        /// The least.
        min: usize,
        /// The greatest.
        max: usize,
        /// Which it must be a multiple of.
        multiple_of: usize,
        /// What it is when not given.
        default: usize,
    },
    /// A finite number.
    Number {
        /// The least.
        min: f64,
        /// The greatest.
        max: f64,
        /// What it is when not given.
        default: f64,
    },
    /// One of some words, the first when not given.
    Choice(&'static [&'static str]),
}

/// An option of a codec.
#[derive(Clone, Copy, Debug)]
pub struct OptionSpec {
    /// Its name on disk and on the command line.
    pub name: &'static str,
    /// What it does, one line.
    pub doc: &'static str,
    /// What values it takes.
    pub kind: Kind,
}

impl OptionSpec {
    /// Its value when not given.
    pub fn default_value(&self) -> Value {
        match self.kind {
            Kind::Int { default, .. } => default.into(),
            Kind::Number { default, .. } => default.into(),
            Kind::Choice(words) => words[0].into(),
        }
    }

    /// Its value when not given, as people write it.
    pub fn default_text(&self) -> String {
        text(&self.default_value())
    }

    /// What it can be, in words.
    pub fn expected(&self) -> String {
        match self.kind {
            Kind::Int { min, max, multiple_of: 1, .. } => format!("{min} to {max}"),
            Kind::Int { min, max, multiple_of, .. } => {
                format!("a multiple of {multiple_of} from {min} to {max}")
            }
            Kind::Number { min, max, .. } => format!("a number from {min} to {max}"),
            Kind::Choice(words) => words.join(" or "),
        }
    }

    /// The value in the one form that options hold it in; `None` when it is bad.
    fn canonical(&self, value: &Value) -> Option<Value> {
        match self.kind {
            Kind::Int { min, max, multiple_of, .. } => {
                let v = value.as_u64().and_then(|v| usize::try_from(v).ok())?;
                ((min..=max).contains(&v) && v.is_multiple_of(multiple_of)).then(|| v.into())
            }
            // A whole number becomes a float, and the sum turns −0 into 0, so that
            // equal numbers are equal options.
            Kind::Number { min, max, .. } => {
                let v = value.as_f64().filter(|v| (min..=max).contains(v))?;
                Some((v + 0.0).into())
            }
            Kind::Choice(words) => {
                value.as_str().filter(|v| words.contains(v)).map(|v| v.to_owned().into())
            }
        }
    }
}

/// A value as people write it: words without quotes, 1.0 as `1`.
fn text(value: &Value) -> String {
    match value {
        Value::String(word) => word.clone(),
        // The shortest digits that are read back as the same number.
        Value::Number(n) if n.is_f64() => n.as_f64().unwrap_or_default().to_string(),
        other => other.to_string(),
    }
}

/// The options of a codec, complete and valid.
#[derive(Clone, Debug, PartialEq)]
pub struct Options(Map<String, Value>);

impl Options {
    /// Completes and checks options given by name.
    ///
    /// # Errors
    /// When one is unknown or has a bad value.
    pub fn new(codec: &dyn Codec, given: &Map<String, Value>) -> Result<Self> {
        Self::complete(codec.name(), codec.options(), given)
    }

    /// [`Options::new`] for what has this name and these options.
    pub(crate) fn complete(
        codec: &'static str,
        specs: &[OptionSpec],
        given: &Map<String, Value>,
    ) -> Result<Self> {
        if let Some(got) = given.keys().find(|name| specs.iter().all(|s| s.name != *name)) {
            return Err(Error::UnknownOption {
                codec,
                got: got.clone(),
                known: specs.iter().map(|s| s.name).collect(),
            });
        }
        let mut complete = Map::new();
        for spec in specs {
            let value = given.get(spec.name).cloned().unwrap_or_else(|| spec.default_value());
            let Some(value) = spec.canonical(&value) else {
                return Err(Error::BadOption {
                    codec,
                    option: spec.name,
                    expected: spec.expected(),
                    got: if value.is_string() { value.to_string() } else { text(&value) },
                });
            };
            complete.insert(spec.name.to_owned(), value);
        }
        Ok(Self(complete))
    }

    /// The options as stored in a manifest.
    pub fn to_json(&self) -> &Map<String, Value> {
        &self.0
    }

    /// The value of a whole-number option.
    ///
    /// Panics when the codec declares no such option.
    pub fn int(&self, name: &str) -> usize {
        let value = self.0.get(name).and_then(Value::as_u64);
        match value.and_then(|v| usize::try_from(v).ok()) {
            Some(value) => value,
            None => unreachable!("no whole-number option {name} is declared"),
        }
    }

    /// The value of a number option.
    ///
    /// Panics when the codec declares no such option.
    pub fn number(&self, name: &str) -> f64 {
        match self.0.get(name).filter(|v| v.is_f64()).and_then(Value::as_f64) {
            Some(value) => value,
            None => unreachable!("no number option {name} is declared"),
        }
    }

    /// The value of a choice option.
    ///
    /// Panics when the codec declares no such option.
    pub fn choice(&self, name: &str) -> &str {
        match self.0.get(name).and_then(Value::as_str) {
            Some(value) => value,
            None => unreachable!("no choice option {name} is declared"),
        }
    }
}

impl Options {
    /// Options as they are written, `option=value,option=value`.
    ///
    /// # Errors
    /// When one is given twice.
    pub(crate) fn read(text: &str) -> Result<Map<String, Value>> {
        let mut given = Map::new();
        for pair in text.split(',').filter(|pair| !pair.is_empty()) {
            let (option, value) = pair.split_once('=').unwrap_or((pair, ""));
            let option = option.replace('-', "_");
            if given.insert(option.clone(), value_of(value)).is_some() {
                return Err(Error::RepeatedOption { option });
            }
        }
        Ok(given)
    }

    /// Options as they are written, in their order.
    pub(crate) fn text(options: &Map<String, Value>) -> String {
        let written = options.iter().map(|(name, value)| format!("{name}={}", text(value)));
        written.collect::<Vec<_>>().join(",")
    }
}

impl fmt::Display for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&Self::text(&self.0))
    }
}

/// A value as it is written: a whole number, a finite number, or else a word.
fn value_of(text: &str) -> Value {
    match (text.parse::<u64>(), text.parse::<f64>()) {
        (Ok(whole), _) => whole.into(),
        (_, Ok(number)) if number.is_finite() => number.into(),
        _ => text.into(),
    }
}
