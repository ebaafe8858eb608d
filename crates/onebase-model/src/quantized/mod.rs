//! A base in 4 and 8 bits, after ResQ (U. Saxena et al., "ResQ: Mixed-Precision Quantization of
//! Large Language Models with Low-Rank Residuals", arXiv:2412.14363), and models in its basis.

mod config;
mod identity;
mod rotation;
mod stored;

pub use config::{
    Method, OutputScales, QUANT_METHOD, QUANTIZATION_FIELD, QUANTIZATION_VERSION, Quantization,
};
pub use identity::{
    Identities, QUANTIZED_FILE, QuantizedRecord, TensorIdentity, base_digests, stored_digest,
};
pub use rotation::{HADAMARD_BLOCK, HIDDEN_ROTATION, KEY_ROTATIONS, VALUE_ROTATIONS};
pub use stored::{CodedMatrix, StoredTensor, stored_tensors};

pub(crate) use rotation::Rotation;
pub(crate) use stored::{check_stored, parts_of};
