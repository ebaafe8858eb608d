use std::ops::Range;

use onebase_codec::DeltaLinear;
use onebase_kernels::{Backend, add_assign};
use onebase_tensor::{MatrixMut, MatrixRef};
use rayon::prelude::*;

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

/// Consecutive rows of a batch that belong to one tenant, or to the base. Groups follow
/// each other without a gap.
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
        site: impl Fn(&'a Tenant) -> &'a SiteDelta + Sync,
        x: MatrixRef<'_>,
        mut y: MatrixMut<'_>,
    ) {
        y.data().fill(0.0);
        backend.add_dense(self.weight.as_ref(), x, &mut y);
        // Rows of several tenants at a time: their products are small, and threads that
        // wait for the end of each would be idle for much of it.
        let width = y.n_cols();
        let mut rest = y.data();
        let parts: Vec<_> = groups
            .iter()
            .map(|group| {
                let (rows, after) =
                    std::mem::take(&mut rest).split_at_mut(group.rows.len() * width);
                rest = after;
                (group, rows)
            })
            .collect();
        parts.into_par_iter().for_each(|(group, rows)| {
            let changes = group.tenant.map(&site);
            if let Some(delta) = changes.and_then(|c| c.delta.as_ref()) {
                let Ok(mut rows) = MatrixMut::new(rows, group.rows.len(), width) else {
                    unreachable!("the rows were split off by their number")
                };
                delta.add_to(backend, x.rows(group.rows.clone()), &mut rows);
            }
            if let Some(bias) = changes.and_then(|c| c.bias.as_ref()).or(self.bias.as_ref()) {
                rows.chunks_mut(width.max(1)).for_each(|row| add_assign(row, bias));
            }
        });
    }
}
