//! Delta artifacts: one fine-tune as a folder, made against one base.
//!
//! `onebase.json` names the digest of every base tensor, how each tensor of the
//! fine-tune is stored and the digest of every other file; the safetensors
//! files hold the parts. See `SPEC.md` for the layout.

mod journal;
mod layout;
mod manifest;
mod quality;
mod reader;
mod record;
mod writer;

pub use journal::{Run, Shard};
pub use layout::{Names, StoredTensor, predicted_sizes};
pub use manifest::{
    BaseRecord, CodecRecord, FORMAT, FORMAT_VERSION, FileRecord, MANIFEST_FILE, MODEL_CARD_FILE,
    Manifest, PathNode, Role, Storage, TensorRecord, digest_of_tensors, part_name,
};
pub use quality::{CalibrationRecord, DeltaError, Perplexity, Quality, TaskQuality};
pub(crate) use reader::read_versioned;
pub use reader::{Artifact, ExactTensor, PathPart, Sizes};
pub use writer::{ArtifactWriter, Done, Origin, join};
