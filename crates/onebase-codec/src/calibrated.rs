use std::sync::{Arc, Mutex, PoisonError};

use onebase_tensor::EncodedDelta;

use crate::numerics::{ColumnOrder, HessianFactor};
use crate::source::reading_bytes;
use crate::{CALIBRATED, Codec, CodecSpec, DeltaSource, Options, Result};

/// The second moment `Σ x xᵀ` of the inputs of a site, up to a positive factor:
/// `[in_features, in_features]`, symmetric, row-major.
#[derive(Debug)]
pub struct SecondMoment {
    n: usize,
    values: Vec<f32>,
    /// The last factor and what it was asked for with: sites that read the same inputs
    /// follow each other.
    factor: Mutex<Option<LastFactor>>,
}

#[derive(Debug)]
struct LastFactor {
    order: ColumnOrder,
    /// What was asked for.
    damping: f64,
    identity: f64,
    factor: Arc<HessianFactor>,
    is_told: bool,
}

impl SecondMoment {
    /// A moment of `n` input features; `None` when the length is not `n · n` or an element
    /// is NaN or ∞.
    pub fn new(values: Vec<f32>, n: usize) -> Option<Self> {
        let finite = values.iter().all(|v| v.is_finite());
        (Some(values.len()) == n.checked_mul(n) && finite).then_some(Self {
            n,
            values,
            factor: Mutex::default(),
        })
    }

    /// Input features.
    pub fn n(&self) -> usize {
        self.n
    }

    /// The elements, `[n, n]`.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// The mean of the diagonal; 0 where there are no inputs.
    #[allow(clippy::cast_precision_loss)]
    pub fn mean_diagonal(&self) -> f64 {
        let diagonal = self.values.iter().step_by(self.n + 1);
        diagonal.map(|x| f64::from(*x)).sum::<f64>() / self.n.max(1) as f64
    }

    /// [`HessianFactor::new`] of it with `identity` times the mean of its diagonal added to
    /// the diagonal, so that inputs which were never seen count too; the last one is kept.
    ///
    /// # Errors
    /// As there.
    pub fn factor(
        &self,
        order: ColumnOrder,
        damping: f64,
        identity: f64,
    ) -> Result<Arc<HessianFactor>> {
        let mut last = self.factor.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(last) = &*last
            && last.order == order
            && last.damping.to_bits() == damping.to_bits()
            && last.identity.to_bits() == identity.to_bits()
        {
            return Ok(last.factor.clone());
        }
        // The old one goes first: two may not fit.
        *last = None;
        let factor = if identity > 0.0 {
            let added = identity * self.mean_diagonal();
            let mut values = self.values.clone();
            #[allow(clippy::cast_possible_truncation)]
            let raise = |x: &mut f32| *x = (f64::from(*x) + added) as f32;
            values.iter_mut().step_by(self.n + 1).for_each(raise);
            HessianFactor::new(&values, self.n, order, damping)?
        } else {
            HessianFactor::new(&self.values, self.n, order, damping)?
        };
        let factor = Arc::new(factor);
        let told = LastFactor { order, damping, identity, factor: factor.clone(), is_told: false };
        *last = Some(told);
        Ok(factor)
    }

    /// The most bytes that a moment of `n` input features and its factor take together.
    pub fn working_bytes(n: usize) -> usize {
        // The moment, and what the identity is added to.
        2 * n * n * size_of::<f32>() + HessianFactor::working_bytes(n)
    }

    /// The damping of the last factor where it had to be raised, because what was asked
    /// for did not make it positive definite: asked for and taken, as parts of the mean
    /// of the diagonal. Of each factor it is told once.
    pub fn take_raised_damping(&self) -> Option<[f64; 2]> {
        let mut last = self.factor.lock().unwrap_or_else(PoisonError::into_inner);
        let last = last.as_mut().filter(|last| !last.is_told)?;
        last.is_told = true;
        let taken = last.factor.damping();
        (taken > last.damping).then_some([last.damping, taken])
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

    /// [`Calibrated::calibrated_bytes`] with these options, and the blocks that are read by
    /// as many threads; `None` of a codec that cannot be calibrated.
    pub fn calibrated_bytes(&self, shape: [usize; 2], n_threads: usize) -> Option<usize> {
        let codec = self.calibrated()?;
        Some(codec.calibrated_bytes(self.options(), shape) + reading_bytes(shape, n_threads))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Three inputs of which two are one: without damping there is no factor.
    #[test]
    fn a_raised_damping_is_told_once() {
        let moment = SecondMoment::new(vec![1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0], 3);
        let moment = moment.unwrap();
        moment.factor(ColumnOrder::Index, 0.01, 0.0).unwrap();
        assert_eq!(moment.take_raised_damping(), None);
        let first = moment.factor(ColumnOrder::Index, 0.0, 0.0).unwrap();
        assert!(Arc::ptr_eq(&first, &moment.factor(ColumnOrder::Index, 0.0, 0.0).unwrap()));
        let [asked, taken] = moment.take_raised_damping().unwrap();
        assert!(asked == 0.0 && taken > 0.0 && taken == first.damping());
        assert_eq!(moment.take_raised_damping(), None);
    }

    #[test]
    fn what_is_no_moment_is_refused() {
        assert!(SecondMoment::new(vec![1.0; 5], 2).is_none());
        assert!(SecondMoment::new(vec![f32::NAN; 4], 2).is_none());
        assert_eq!(SecondMoment::new(vec![], 0).unwrap().mean_diagonal(), 0.0);
    }
}
