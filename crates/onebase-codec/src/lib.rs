//! The codec seam: a delta to named parts, and parts to a linear operator.
//!
//! A codec never opens a file: it reads a delta from a [`DeltaSource`] and gives
//! an [`onebase_tensor::EncodedDelta`]. To add one, write its file under
//! `codecs/` and name it in the list of `codecs/mod.rs`; the program's options,
//! the documentation and the conformance suite read that list.

mod calibrated;
mod calibration_options;
mod codec;
mod codecs;
mod coded_factors;
mod entropy;
mod error;
mod factors;
mod kept;
mod kept_encoder;
mod kept_fit;
mod largest;
pub mod lossless;
mod low_bit_rows;
mod masks;
pub mod numerics;
mod options;
mod rescale;
pub mod rqt;
mod signs;
mod source;
mod sparse_parts;
mod sparse_rows;
mod spec;
mod stages;
mod svd_options;
mod svd_space;

pub use calibrated::{Calibrated, SecondMoment};
pub use codec::{Codec, DeltaLinear};
pub use codecs::{CALIBRATED, CODECS, RESCALABLE};
pub use error::Error;
pub use options::{Kind, OptionSpec, Options};
pub use rescale::Rescale;
pub use source::{DeltaSource, for_each_block, read_finite, read_wide};
pub use spec::CodecSpec;
pub use stages::{Stage, stage_seconds};

/// The result of this crate's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;
