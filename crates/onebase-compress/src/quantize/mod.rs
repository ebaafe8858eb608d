//! A base in 4 and 8 bits, and the fine-tunes that are served on it.
//!
//! A base is rotated first, into a checkpoint in f32 beside the folder to be written, and that is
//! rounded: what a delta is taken against, and what rounding is judged by, is such a checkpoint.

mod folder;
mod matrix;
mod project;
mod reference;
mod rotate;
mod rotations;
mod rounding;
mod store;
mod write;

pub use reference::{Reference, RotatedPair, open_rotated};
pub use rounding::Rounding;
pub use write::{QuantizeOptions, QuantizeText, Quantized, linear_bits, quantize};
