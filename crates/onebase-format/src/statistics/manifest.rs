use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::Digest;
use crate::artifact::{BaseRecord, FileRecord};

/// The file that says what a folder of statistics holds.
pub const STATISTICS_FILE: &str = "statistics.json";

/// The value of `format` in every such file.
pub const STATISTICS_FORMAT: &str = "onebase-statistics";

/// The newest version that this program reads, and the one that it writes.
pub const STATISTICS_VERSION: u32 = 1;

/// What a folder of statistics says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatisticsManifest {
    /// [`STATISTICS_FORMAT`].
    pub format: String,
    /// At most [`STATISTICS_VERSION`].
    pub version: u32,
    /// Program and version that wrote it.
    pub tool: String,
    /// The model whose inputs were measured.
    pub model: BaseRecord,
    /// Where the tokens are from.
    pub source: Source,
    /// Tokens that were run.
    pub n_tokens: usize,
    /// Tokens that were run as one document, the last ones maybe fewer.
    pub window_tokens: usize,
    /// Every other file.
    pub files: BTreeMap<String, FileRecord>,
    /// Every input, by [`input_name`].
    pub inputs: BTreeMap<String, InputRecord>,
}

/// The second moment of one input.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InputRecord {
    /// The file that holds it, under the input's name.
    pub file: String,
    /// Input features.
    pub in_features: usize,
    /// The digest of its tensor.
    pub blake3: Digest,
}

/// Where the tokens are from on which a model was measured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Source {
    /// A plain text.
    Text {
        /// What its file was called.
        name: String,
        /// The file's digest.
        blake3: Digest,
    },
    /// The model wrote them.
    Generated {
        /// Of the draws.
        seed: u64,
    },
    /// Drawn from the vocabulary, each as likely as any other.
    Random {
        /// Of the draws.
        seed: u64,
    },
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Text { name, .. } => f.write_str(name),
            Source::Generated { seed } => write!(f, "the model's own text (seed {seed})"),
            Source::Random { seed } => write!(f, "random tokens (seed {seed})"),
        }
    }
}

/// The statistics with which an artifact was encoded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatisticsRecord {
    /// The digest of their [`STATISTICS_FILE`], which names those of all they hold; none
    /// where inputs were measured while compressing, as these are not kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blake3: Option<Digest>,
    /// The model whose inputs were measured; the fine-tune where that was while
    /// compressing.
    pub model: BaseRecord,
    /// Where the tokens are from.
    pub source: Source,
    /// How many there are.
    pub n_tokens: usize,
    /// How inputs were measured while compressing, if that is when they were.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sequential: Option<SequentialRecord>,
}

/// Inputs were measured while compressing: those of each linear site in the fine-tune whose
/// sites before it have the deltas that the artifact gives them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SequentialRecord {
    /// Tokens that were run as one document, the last ones maybe fewer.
    pub window_tokens: usize,
}

impl fmt::Display for StatisticsRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { model, source, n_tokens, sequential, .. } = self;
        write!(f, "{source} ({n_tokens} tokens, inputs of {}", model.name)?;
        f.write_str(if sequential.is_some() { " as far as it was compressed)" } else { ")" })
    }
}

/// What an input is called: its block and its name within it, `layers.3.feed_forward`.
pub fn input_name(layer: usize, input: &str) -> String {
    format!("layers.{layer}.{input}")
}

/// The element type of every moment, as safetensors headers name it.
pub(super) const MOMENT_DTYPE: &str = "F32";

/// Elements of the lower triangle of a matrix `[n, n]`; `None` where they are too many.
pub(super) fn packed_len(n: usize) -> Option<usize> {
    n.checked_mul(n.checked_add(1)?).map(|twice| twice / 2)
}
