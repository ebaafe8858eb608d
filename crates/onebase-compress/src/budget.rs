use std::fmt;
use std::str::FromStr;

use onebase_codec::{CodecSpec, DeltaSource as _, Kind};
use onebase_format::artifact::{Names, Origin, Sizes, StoredTensor, predicted_sizes};
use onebase_format::{CONFIG_FILE, Digest, SIDE_FILES};
use serde_json::Value;

use crate::compress::{TOOL, codec_record};
use crate::model_card::model_card;
use crate::{Error, Inputs, Pair, Plan, Result, TablePlan};

/// How large an artifact may be at most.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Budget {
    /// Effective bits per weight of the linear sites.
    BitsPerWeight(f64),
    /// A share of the bytes of the fine-tune's weights, all files counted.
    Share(f64),
    /// Bytes, all files counted.
    Bytes(u64),
}

/// Units of bytes, the longer of two that end alike first.
const UNITS: [(&str, f64); 8] = [
    ("KiB", 1024.0),
    ("MiB", 1_048_576.0),
    ("GiB", 1_073_741_824.0),
    ("kB", 1e3),
    ("KB", 1e3),
    ("MB", 1e6),
    ("GB", 1e9),
    ("B", 1.0),
];

impl FromStr for Budget {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = || "expected a size such as 2.1bpw, 10% or 200MB".to_owned();
        let number = |text: &str| {
            let value: f64 = text.trim().parse().map_err(|_| expected())?;
            if value > 0.0 && value.is_finite() { Ok(value) } else { Err(expected()) }
        };
        if let Some(bits) = text.strip_suffix("bpw") {
            return number(bits).map(Budget::BitsPerWeight);
        }
        if let Some(share) = text.strip_suffix('%') {
            return number(share).map(|share| Budget::Share(share / 100.0));
        }
        let unit = UNITS.iter().find_map(|(unit, n)| Some((text.strip_suffix(unit)?, n)));
        let (value, unit) = unit.ok_or_else(expected)?;
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let bytes = (number(value)? * unit) as u64;
        Ok(Budget::Bytes(bytes))
    }
}

impl fmt::Display for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Budget::BitsPerWeight(bits) => write!(f, "{bits}bpw"),
            Budget::Share(share) => write!(f, "{}%", 100.0 * share),
            Budget::Bytes(bytes) => write!(f, "{bytes}B"),
        }
    }
}

impl Budget {
    /// The plan at the greatest size of the linear sites' codec at which the artifact is
    /// within the budget on disk. With `tables_follow` embeddings and head have that codec
    /// too, else they stay as planned.
    ///
    /// # Errors
    /// When none is, the size of a codec depends on the weights, or a checkpoint cannot be
    /// read.
    pub fn fit(self, pair: &Pair, plan: &Plan, tables_follow: bool) -> Result<Plan> {
        let known = Known::of(pair)?;
        let at = |position: f64| {
            let mut plan = plan.clone();
            plan.linear = sized(&plan.linear, position);
            if tables_follow {
                plan.tables = TablePlan::Codec(plan.linear.clone());
            }
            plan
        };
        let fits = |plan: &Plan| Ok::<_, Error>(self.holds(&known.sizes(pair, plan)?, pair));
        let least = at(0.0);
        if !fits(&least)? {
            let sizes = known.sizes(pair, &least)?;
            return Err(Error::OverBudget {
                budget: self.to_string(),
                codec: least.linear.to_string(),
                least: self.in_unit(&sizes, pair),
            });
        }
        let (mut low, mut high) = (0.0, 1.0);
        if fits(&at(high))? {
            return Ok(at(high));
        }
        // Every size option has fewer steps than this.
        for _ in 0..24 {
            let middle = f64::midpoint(low, high);
            if fits(&at(middle))? { low = middle } else { high = middle }
        }
        Ok(at(low))
    }

    #[allow(clippy::cast_precision_loss)]
    pub(crate) fn holds(self, sizes: &Sizes, pair: &Pair) -> bool {
        match self {
            Budget::BitsPerWeight(bits) => sizes.effective_bpw_linear() <= bits,
            Budget::Share(share) => sizes.total_bytes as f64 <= share * pair.fine_tune_bytes as f64,
            Budget::Bytes(bytes) => sizes.total_bytes <= bytes,
        }
    }

    /// A size in the unit of the budget, rounded up so that it can be asked for.
    #[allow(clippy::cast_precision_loss)]
    fn in_unit(self, sizes: &Sizes, pair: &Pair) -> String {
        let up = |value: f64| (value * 1000.0).ceil() / 1000.0;
        match self {
            Budget::BitsPerWeight(_) => format!("{}bpw", up(sizes.effective_bpw_linear())),
            Budget::Share(_) => {
                let share = sizes.total_bytes as f64 / pair.fine_tune_bytes as f64;
                format!("{}%", up(100.0 * share))
            }
            Budget::Bytes(_) => format!("{}B", sizes.total_bytes),
        }
    }
}

/// A codec at a position between its least and greatest size; itself where it has but one.
#[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
fn sized(codec: &CodecSpec, position: f64) -> CodecSpec {
    let Some(option) = codec.size_option() else { return codec.clone() };
    let value: Value = match option.kind {
        Kind::Int { min, max, multiple_of, .. } => {
            let steps = ((max - min) / multiple_of) as f64;
            // The greatest is reached at the end alone.
            (min + (position * steps).floor() as usize * multiple_of).into()
        }
        Kind::Number { min, max, .. } => {
            // Finer where sizes are small, as it is the ratio that matters.
            let value = min * (max / min).powf(position);
            four_digits(value).clamp(min, max).into()
        }
        Kind::Choice(_) => return codec.clone(),
    };
    codec.with(option.name, value).unwrap_or_else(|_| codec.clone())
}

/// A positive number cut to its first four digits, as somebody would write it.
fn four_digits(value: f64) -> f64 {
    let step = 10f64.powf(value.log10().floor() - 3.0);
    let cut = (value / step * (1.0 + f64::EPSILON)).floor() * step;
    // The nearest number to what is written.
    format!("{cut:.8}").parse().unwrap_or(cut)
}

/// What sizes depend on beside the plan.
pub(crate) struct Known {
    /// Whether each tensor is the base's.
    pub(crate) unchanged: Vec<bool>,
    /// Files that the artifact holds, with their lengths, or that are the base's.
    side_files: Vec<(&'static str, Option<u64>)>,
    base: String,
    fine_tune: String,
}

impl Known {
    pub(crate) fn of(pair: &Pair) -> Result<Self> {
        let unchanged = (0..pair.specs.len()).map(|index| pair.is_unchanged(index));
        let mut side_files = Vec::new();
        for name in SIDE_FILES.into_iter().chain([CONFIG_FILE]) {
            if let Some(bytes) = pair.fine_tune.side_file(name)? {
                let own = pair.base.side_file(name)?.as_ref() != Some(&bytes);
                side_files.push((name, own.then_some(bytes.len() as u64)));
            }
        }
        Ok(Self {
            unchanged: unchanged.collect::<Result<_>>()?,
            side_files,
            base: pair.base.name(),
            fine_tune: pair.fine_tune.name(),
        })
    }

    /// The sizes that the artifact will have, to the byte; of codecs whose sizes depend on
    /// the deltas, at most.
    pub(crate) fn sizes(&self, pair: &Pair, plan: &Plan) -> Result<Sizes> {
        let tensors = self.tensors(pair, plan)?;
        let calibration = plan.calibration.as_ref().map(Inputs::record);
        let names = Names { calibration: calibration.as_ref(), ..self.names() };
        let tensors: Vec<&StoredTensor> = tensors.iter().collect();
        Ok(predicted_sizes(names, &tensors, &self.side_files, model_card)?)
    }

    /// What the artifact is called, without statistics or nodes.
    pub(crate) fn names(&self) -> Names<'_> {
        Names {
            tool: TOOL,
            base: &self.base,
            fine_tune: &self.fine_tune,
            calibration: None,
            nodes: &[],
        }
    }

    /// Files beside the weights, see [`predicted_sizes`].
    pub(crate) fn side_files(&self) -> &[(&'static str, Option<u64>)] {
        &self.side_files
    }

    /// A tensor as manifests name it, with digests of the right length.
    pub(crate) fn origin(pair: &Pair, index: usize) -> Result<Origin<'_>> {
        pair.origin(index, Digest::of(b""), Digest::of(b""))
    }

    /// The tensors as they will be stored.
    pub(crate) fn tensors(&self, pair: &Pair, plan: &Plan) -> Result<Vec<StoredTensor>> {
        let mut tensors = Vec::new();
        for (index, spec) in pair.specs.iter().enumerate() {
            let origin = Self::origin(pair, index)?;
            tensors.push(match plan.codec(spec, origin.shape) {
                _ if self.unchanged[index] => StoredTensor::unchanged(origin),
                None => StoredTensor::exact(origin),
                Some(codec) => {
                    let delta = pair.delta(&spec.name)?;
                    let Some(parts) = codec.most_parts(delta.shape()) else {
                        return Err(Error::UnknownSize { codec: codec.to_string() });
                    };
                    let n_added = origin.shape[0] - delta.base.shape()[0];
                    let parts = parts.into_iter().map(|p| (p.name, p.dtype, p.shape));
                    StoredTensor::delta(origin, codec_record(codec), parts, n_added)
                }
            });
        }
        Ok(tensors)
    }
}
