//! What every other crate speaks: element types, matrix views, encoded deltas,
//! size accounting and seeded random numbers. No input or output happens here.

mod bits;
mod dtype;
mod encoded;
mod rng;
mod view;

pub use bits::effective_bits;
pub use dtype::{DType, UnknownDType, saturating_bf16};
pub use encoded::{EncodedDelta, Part, PartData, PartError, PartShapes, PartSpec, Parts};
pub use rng::{Stream, stream};
pub use view::{MatrixMut, MatrixRef, ShapeMismatch, WeightRef};
