//! Hugging Face checkpoints, delta artifacts and statistics on disk.
//!
//! Files are hostile until checked: every length, offset, shape and name is
//! validated before it is used, and each refusal has its own error. Nothing
//! here decodes a weight. The artifact's layout is `SPEC.md`.

pub mod archive;
pub mod artifact;
mod atomic;
mod checkpoint;
mod digest;
mod error;
pub mod family;
mod map;
mod safetensors_file;
mod stacked;
pub mod statistics;
mod tensor_writer;

pub use atomic::{StagedFolder, rename, write_file};
pub use checkpoint::{CONFIG_FILE, Checkpoint, SIDE_FILES, Tensor, TensorHasher};
pub use digest::{Digest, Sha256};
pub use error::Error;
pub use safetensors_file::{MappedBytes, TensorHeader};
pub use tensor_writer::{TensorEntry, TensorWriter, tensor_file_bytes};

/// The result of this crate's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;
