use std::borrow::Cow;
use std::sync::Arc;

use onebase_kernels::thin::Thin;
use onebase_tensor::MatrixRef;

use super::Method;
use crate::numerics::{ColumnOrder, HessianFactor, times};
use crate::{Result, SecondMoment};

/// What errors of weights are weighed by: `G = (1 − β) M / t + β I`, where `M` is the
/// second moment of the inputs, `t` the mean of its diagonal and `β` the blend.
pub(super) struct Weighing<'a> {
    n: usize,
    /// `None` for the identity.
    moment: Option<(&'a SecondMoment, f64)>,
    blend: f64,
    order: ColumnOrder,
    damping: f64,
}

impl<'a> Weighing<'a> {
    pub(super) fn new(inputs: Option<&'a SecondMoment>, n: usize, method: &Method) -> Self {
        let blend = method.blend;
        let moment = inputs.filter(|_| blend < 1.0).and_then(|moment| {
            assert_eq!(moment.n(), n, "inputs of the moment and of the delta");
            let mean = moment.mean_diagonal();
            // Inputs that were never anything but zero say nothing.
            (mean > 0.0).then_some((moment, mean))
        });
        let Method { order, damping, .. } = *method;
        Self { n, moment, blend, order, damping }
    }

    /// The factor by which GPTQ carries errors on.
    pub(super) fn factor(&self) -> Result<Arc<HessianFactor>> {
        match self.moment {
            None => Ok(Arc::new(HessianFactor::identity(self.n))),
            // `(1 − β) M / t + β I`, up to its unit; the moment keeps its last factor.
            Some((moment, _)) => {
                moment.factor(self.order, self.damping, self.blend / (1.0 - self.blend))
            }
        }
    }

    /// `G X` of a thin matrix `[in_features, k]`.
    pub(super) fn times<'x>(&self, x: &'x Thin) -> Result<Cow<'x, Thin>> {
        let Some((moment, mean)) = self.moment else { return Ok(Cow::Borrowed(x)) };
        let Ok(matrix) = MatrixRef::new(moment.values(), self.n, self.n) else {
            unreachable!("a moment is square")
        };
        let mut out = times(&matrix, x)?;
        #[allow(clippy::cast_possible_truncation)]
        let (of_moment, of_identity) = (((1.0 - self.blend) / mean) as f32, self.blend as f32);
        out.combine(of_moment, x, of_identity);
        Ok(Cow::Owned(out))
    }
}
