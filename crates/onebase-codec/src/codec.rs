use std::ops::Range;

use onebase_kernels::Backend;
use onebase_tensor::{EncodedDelta, MatrixMut, MatrixRef, PartShapes, PartSpec};

use crate::{DeltaSource, OptionSpec, Options, Result};

/// A method to store one delta.
pub trait Codec: Sync {
    /// Its name on disk and on the command line, never reused for another method.
    fn name(&self) -> &'static str;

    /// The version of its parts. Parts of every released version stay readable.
    fn version(&self) -> u32;

    /// One line for people.
    fn summary(&self) -> &'static str;

    /// The options it understands.
    fn options(&self) -> &'static [OptionSpec];

    /// Bits per weight of a matrix of this shape `[out_features, in_features]`, which
    /// has at least one weight, as the paper of the method counts them: its codes
    /// or factors alone, without scales, indices, headers and metadata. `parts` are
    /// the shapes of what was encoded: a method may choose its size by the data.
    ///
    /// Reports print it beside the size on disk, which is what a delta costs.
    fn claimed_bits(&self, options: &Options, shape: [usize; 2], parts: &PartShapes) -> f64;

    /// The parts that a delta of this shape `[out_features, in_features]` has once it is
    /// encoded; `None` where they depend on the delta.
    fn parts(&self, options: &Options, shape: [usize; 2]) -> Option<Vec<PartSpec>>;

    /// Parts that take at least as many bytes as those of any delta of this shape, names and
    /// shapes as they are written included; `None` where nothing is known before.
    fn most_parts(&self, options: &Options, shape: [usize; 2]) -> Option<Vec<PartSpec>> {
        self.parts(options, shape)
    }

    /// The most bytes that encoding a delta of this shape holds at a time, its parts
    /// included, beside the blocks that are being read.
    fn working_bytes(&self, options: &Options, shape: [usize; 2]) -> usize;

    /// Options with which encoding takes less time, and errors fall with the size about as
    /// they do without them.
    fn draft(&self) -> &'static [(&'static str, usize)] {
        &[]
    }

    /// Encodes a delta `[out_features, in_features]`.
    ///
    /// Same delta and options give the same parts, on any number of threads.
    /// Part names contain no dot and are not `weight`, `bias` or `added_rows`.
    ///
    /// # Errors
    /// When the delta cannot be read or holds NaN or ∞.
    fn encode(&self, options: &Options, delta: &dyn DeltaSource) -> Result<EncodedDelta>;

    /// Checks the parts and makes them ready to use. Both serving and decoding
    /// go through here, so parts are validated in one place.
    ///
    /// # Errors
    /// When a part is missing, unknown, or of another type or shape.
    fn prepare(&self, options: &Options, delta: EncodedDelta) -> Result<Box<dyn DeltaLinear>>;
}

/// A delta ready to use: a linear operator `[out_features, in_features]`.
pub trait DeltaLinear: Send + Sync {
    /// `[out_features, in_features]`.
    fn shape(&self) -> [usize; 2];

    /// `y += x Δᵀ` without materialising Δ: `x` is `[n_rows, in_features]`, `y`
    /// is `[n_rows, out_features]`. A row's result does not depend on the other
    /// rows.
    fn add_to(&self, backend: Backend, x: MatrixRef<'_>, y: &mut MatrixMut<'_>);

    /// Decodes rows of Δ into `out`, `[rows.len(), in_features]`.
    fn write_rows(&self, rows: Range<usize>, out: &mut [f32]);

    /// Bytes of memory it holds.
    fn resident_bytes(&self) -> usize;
}
