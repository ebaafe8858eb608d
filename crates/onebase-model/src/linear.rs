use std::ops::Range;

use onebase_codec::DeltaLinear;
use onebase_kernels::{Backend, add_assign};
use onebase_tensor::{MatrixMut, MatrixRef};

use crate::Tenant;
use crate::weights::Weight;

/// A linear site of the base.
#[derive(Debug)]
pub(crate) struct Linear {
    pub(crate) weight: Weight,
    pub(crate) bias: Option<Vec<f32>>,
}

/// What a tenant changes at a linear site.
pub(crate) struct SiteDelta {
    /// `None` where the weight is the base's.
    pub(crate) delta: Option<Box<dyn DeltaLinear>>,
    /// The tenant's own; `None` where it is the base's or there is none.
    pub(crate) bias: Option<Vec<f32>>,
}

/// Consecutive rows of a batch that belong to one tenant, or to the base.
#[derive(Clone)]
pub(crate) struct RowGroup<'a> {
    pub(crate) rows: Range<usize>,
    pub(crate) tenant: Option<&'a Tenant>,
}

impl Linear {
    /// `y = x Wᵀ + b` with the base's weight for all rows, each tenant's delta
    /// added to its own: `x` is `[n_rows, in_features]`, `y` is
    /// `[n_rows, out_features]`, overwritten.
    pub(crate) fn apply<'a>(
        &self,
        backend: Backend,
        groups: &[RowGroup<'a>],
        site: impl Fn(&'a Tenant) -> &'a SiteDelta,
        x: MatrixRef<'_>,
        mut y: MatrixMut<'_>,
    ) {
        y.data().fill(0.0);
        backend.add_dense(self.weight.as_ref(), x, &mut y);
        for group in groups {
            let changes = group.tenant.map(&site);
            if let Some(delta) = changes.and_then(|c| c.delta.as_ref()) {
                let mut rows = y.rows(group.rows.clone());
                delta.add_to(backend, x.rows(group.rows.clone()), &mut rows);
            }
            if let Some(bias) = changes.and_then(|c| c.bias.as_ref()).or(self.bias.as_ref()) {
                group.rows.clone().for_each(|row| add_assign(y.row(row), bias));
            }
        }
    }
}
