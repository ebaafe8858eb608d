use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{CalibrationRecord, Quality};
use crate::Digest;
use crate::statistics::StatisticsRecord;

/// The manifest's file name.
pub const MANIFEST_FILE: &str = "onebase.json";

/// The model card's file name; it may be edited freely.
pub const MODEL_CARD_FILE: &str = "README.md";

/// The value of `format` in every manifest.
pub const FORMAT: &str = "onebase-delta";

/// The newest version of the format that this program reads.
pub const FORMAT_VERSION: u32 = 2;

/// The oldest version that holds an artifact: 2 where there are nodes, 1 else, which
/// earlier programs read.
pub(super) fn version_for(has_nodes: bool) -> u32 {
    if has_nodes { 2 } else { 1 }
}

/// What an artifact says of itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`FORMAT`].
    pub format: String,
    /// At most [`FORMAT_VERSION`].
    pub version: u32,
    /// Program and version that wrote it.
    pub tool: String,
    /// The base it was made against.
    pub base: BaseRecord,
    /// What the fine-tune was called.
    pub fine_tune: String,
    /// The digest of the fine-tune's tensors' names and digests; artifacts of earlier
    /// programs have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fine_tune_blake3: Option<Digest>,
    /// The codecs in use; tensors name them by position.
    pub codecs: Vec<CodecRecord>,
    /// Every file but the manifest and the model card.
    pub files: BTreeMap<String, FileRecord>,
    /// Files of codes that several artifacts of a family may name, in its folder of nodes; in
    /// the order in which they are added.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nodes: Vec<FileRecord>,
    /// Files of the fine-tune that are the base's to the byte, by digest.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub inherited: BTreeMap<String, Digest>,
    /// Every tensor of the fine-tune.
    pub tensors: BTreeMap<String, TensorRecord>,
    /// The statistics of inputs that linear sites were encoded with, if they were.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calibration: Option<StatisticsRecord>,
    /// The text on which scales were fitted after encoding, if they were.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub distillation: Option<CalibrationRecord>,
    /// How much of the fine-tune was kept, once that was measured; see
    /// [`Manifest::quality`]. Nothing else depends on it, so that a record of another
    /// version makes no artifact unreadable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quality: Option<Value>,
}

/// The base model of an artifact.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BaseRecord {
    /// What it was called; for people, nothing depends on it.
    pub name: String,
    /// The digest of its tensors' names and digests.
    pub blake3: Digest,
}

impl BaseRecord {
    /// The record of a base with these tensors.
    pub fn new<'a>(name: &str, tensors: impl Iterator<Item = (&'a str, Digest)>) -> Self {
        Self { name: name.to_owned(), blake3: digest_of_tensors(tensors) }
    }
}

/// The digest of a model with these tensors: BLAKE3 over `name digest\n` in name order.
pub fn digest_of_tensors<'a>(tensors: impl Iterator<Item = (&'a str, Digest)>) -> Digest {
    let sorted: BTreeMap<_, _> = tensors.collect();
    let mut text = String::new();
    for (tensor, digest) in sorted {
        let _ = writeln!(text, "{tensor} {digest}");
    }
    Digest::of(text.as_bytes())
}

/// A codec with its options, as used by some tensors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CodecRecord {
    /// Its registered name.
    pub name: String,
    /// The version of its parts.
    pub version: u32,
    /// Its options, all of them.
    pub options: Map<String, Value>,
}

/// Length and contents of a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// Its length.
    pub bytes: u64,
    /// Its digest.
    pub blake3: Digest,
}

/// What a tensor is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// A linear site's weight, `[out_features, in_features]`.
    Linear,
    /// Token embeddings, `[vocabulary, hidden]`; also the head where tied.
    Embedding,
    /// The output head, `[vocabulary, hidden]`.
    Head,
    /// A norm's weight, a bias, or the router of a block with experts, which is never a delta.
    Vector,
}

/// One tensor of the fine-tune.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TensorRecord {
    /// What it is for.
    pub role: Role,
    /// The fine-tune's element type.
    pub dtype: String,
    /// The fine-tune's shape.
    pub shape: Vec<usize>,
    /// Digest of the base's tensor of the same name.
    pub base: Digest,
    /// How it is stored.
    #[serde(flatten)]
    pub storage: Storage,
}

/// How a tensor is stored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "stored", rename_all = "snake_case")]
pub enum Storage {
    /// It is the base's.
    Unchanged,
    /// As it is, under its own name.
    Exact {
        /// The file.
        file: String,
    },
    /// As a delta, in parts named `<module path>.<part>`.
    Codec {
        /// Position in the manifest's `codecs`.
        codec: usize,
        /// The file.
        file: String,
        /// Names of the parts.
        parts: Vec<String>,
        /// Rows past the base's, stored as they are in the part `added_rows`.
        #[serde(default, skip_serializing_if = "is_zero")]
        added_rows: usize,
    },
    /// As a sum of deltas that lie in nodes, with a factor for each row of some: those in the
    /// part `gains`, `[nodes with gains, out_features]`, F16. Without nodes it is zero.
    Path {
        /// The file of the gains; none where no node has some.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        file: Option<String>,
        /// The nodes, in the order in which they are added.
        path: Vec<PathNode>,
    },
}

/// A node at one site.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathNode {
    /// Position in the manifest's `nodes`.
    pub node: usize,
    /// Position in the manifest's `codecs`.
    pub codec: usize,
    /// Whether there are gains.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub gain: bool,
}

#[allow(clippy::trivially_copy_pass_by_ref)]
fn is_zero(n: &usize) -> bool {
    *n == 0
}

/// What the names of the files of linear sites begin with, and no others.
pub(crate) const LINEAR_PREFIX: &str = "linear-";

/// The part that holds the gains of nodes.
pub(crate) const GAINS: &str = "gains";

/// The part that holds vocabulary rows past the base's.
pub(crate) const ADDED_ROWS: &str = "added_rows";

/// The name of a tensor's part in its file.
pub fn part_name(tensor: &str, part: &str) -> String {
    format!("{}.{part}", tensor.strip_suffix(".weight").unwrap_or(tensor))
}

impl TensorRecord {
    /// The shape of the matrix that the parts decode to: the base's or, of a vector
    /// `[n]`, `[1, n]`. `None` when it is not stored as a delta, or its shape is none
    /// that its role has.
    pub fn delta_shape(&self) -> Option<[usize; 2]> {
        let added_rows = match self.storage {
            Storage::Codec { added_rows, .. } => added_rows,
            Storage::Path { .. } => 0,
            Storage::Unchanged | Storage::Exact { .. } => return None,
        };
        match (self.role, self.shape[..].as_ref()) {
            (Role::Vector, [n]) => (added_rows == 0).then_some([1, *n]),
            (Role::Vector, _) => None,
            (_, [n_rows, n_cols]) => Some([n_rows.checked_sub(added_rows)?, *n_cols]),
            _ => None,
        }
    }

    /// The names under which its parts lie in their file.
    pub(crate) fn stored_names(&self, tensor: &str) -> Vec<String> {
        match &self.storage {
            Storage::Unchanged => Vec::new(),
            Storage::Exact { .. } => vec![tensor.to_owned()],
            Storage::Codec { parts, added_rows, .. } => {
                let mut names: Vec<_> = parts.iter().map(|p| part_name(tensor, p)).collect();
                if *added_rows > 0 {
                    names.push(part_name(tensor, ADDED_ROWS));
                }
                names
            }
            Storage::Path { file: None, .. } => Vec::new(),
            Storage::Path { file: Some(_), .. } => vec![part_name(tensor, GAINS)],
        }
    }
}

impl Manifest {
    /// The quality record; `None` where there is none, or none that this version reads.
    pub fn quality(&self) -> Option<Quality> {
        serde_json::from_value(self.quality.clone()?).ok()
    }

    /// [`manifest_text`] of this manifest.
    pub(crate) fn to_json(&self) -> serde_json::Result<String> {
        let Value::Object(fields) = serde_json::to_value(self)? else {
            unreachable!("a struct is an object")
        };
        manifest_text(&fields)
    }
}

/// JSON with a line per entry: readable, and not much longer than compact.
pub(super) fn manifest_text(fields: &Map<String, Value>) -> serde_json::Result<String> {
    let mut text = String::from("{\n");
    for (i, (key, value)) in fields.iter().enumerate() {
        let _ = write!(text, "{}: ", serde_json::to_string(key)?);
        match value {
            Value::Object(entries) if !entries.is_empty() => {
                text.push_str("{\n");
                for (j, (name, entry)) in entries.iter().enumerate() {
                    let comma = if j + 1 < entries.len() { "," } else { "" };
                    let name = serde_json::to_string(name)?;
                    let entry = serde_json::to_string(entry)?;
                    let _ = writeln!(text, " {name}: {entry}{comma}");
                }
                text.push('}');
            }
            other => text.push_str(&serde_json::to_string(other)?),
        }
        text.push_str(if i + 1 < fields.len() { ",\n" } else { "\n}\n" });
    }
    Ok(text)
}
