use onebase_tensor::EncodedDelta;

use crate::{CALIBRATED, Codec, CodecSpec, DeltaSource, Options, Result};

/// The second moment `Σ x xᵀ` of the inputs of a site, up to a positive factor:
/// `[in_features, in_features]`, symmetric, row-major.
#[derive(Debug)]
pub struct SecondMoment {
    n: usize,
    values: Vec<f32>,
}

impl SecondMoment {
    /// A moment of `n` input features; `None` when the length is not `n · n` or an element
    /// is NaN or ∞.
    pub fn new(values: Vec<f32>, n: usize) -> Option<Self> {
        let finite = values.iter().all(|v| v.is_finite());
        (Some(values.len()) == n.checked_mul(n) && finite).then_some(Self { n, values })
    }

    /// Input features.
    pub fn n(&self) -> usize {
        self.n
    }

    /// The elements, `[n, n]`.
    pub fn values(&self) -> &[f32] {
        &self.values
    }
}

/// A codec that can weigh errors by the inputs of a site. Without them, by
/// [`Codec::encode`], it takes all inputs for independent and alike.
pub trait Calibrated: Codec {
    /// Encodes a delta `[out_features, in_features]` so that its outputs for such inputs
    /// change little; otherwise as [`Codec::encode`].
    ///
    /// Panics when the moment is not one of `in_features`.
    ///
    /// # Errors
    /// As there.
    fn encode_calibrated(
        &self,
        options: &Options,
        delta: &dyn DeltaSource,
        inputs: &SecondMoment,
    ) -> Result<EncodedDelta>;

    /// The most bytes that [`Calibrated::encode_calibrated`] holds at a time, the moment
    /// and the parts included, beside the blocks that are being read.
    fn calibrated_bytes(&self, options: &Options, shape: [usize; 2]) -> usize;
}

impl CodecSpec {
    /// The codec as one that can be calibrated, if it can.
    pub fn calibrated(&self) -> Option<&'static dyn Calibrated> {
        CALIBRATED.iter().copied().find(|codec| codec.name() == self.codec().name())
    }
}
