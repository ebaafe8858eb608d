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
    /// `[out_features, in_features]`.
    pub(crate) shape: [usize; 2],
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

/// A site, what tenants change at it and where its outputs go.
pub(crate) struct Site<'s, 'a, 'y> {
    linear: &'s Linear,
    changes: &'s (dyn Fn(&'a Tenant) -> &'a SiteDelta + Sync),
    y: MatrixMut<'y>,
}

impl Linear {
    /// For [`apply_all`]: `y` is `[n_rows, out_features]`, overwritten.
    pub(crate) fn to<'s, 'a, 'y>(
        &'s self,
        changes: &'s (dyn Fn(&'a Tenant) -> &'a SiteDelta + Sync),
        y: MatrixMut<'y>,
    ) -> Site<'s, 'a, 'y> {
        Site { linear: self, changes, y }
    }
}

/// Sites that have their input in common: `y = x Wᵀ + b` with the base's weight for all
/// rows, each tenant's delta added to its own. `x` is `[n_rows, in_features]`.
pub(crate) fn apply_all<'a, const N: usize>(
    backend: Backend,
    groups: &[RowGroup<'a>],
    x: MatrixRef<'_>,
    mut sites: [Site<'_, 'a, '_>; N],
) {
    // Sites at a time: the smaller ones are not worth several threads each.
    sites.par_iter_mut().for_each(|Site { linear, y, .. }| {
        y.data().fill(0.0);
        backend.add_dense(linear.weight.as_ref(), x, y);
    });
    // Rows of several tenants and sites at a time: their products are small, and threads
    // that wait for the end of each would be idle for much of it.
    let mut parts = Vec::new();
    for Site { linear, changes, y } in &mut sites {
        let width = y.n_cols();
        let mut rest = y.data();
        for RowGroup { rows, tenant } in groups {
            let (own, after) = std::mem::take(&mut rest).split_at_mut(rows.len() * width);
            rest = after;
            let changes = tenant.map(*changes);
            let delta = changes.and_then(|c| c.delta.as_ref());
            let bias = changes.and_then(|c| c.bias.as_ref()).or(linear.bias.as_ref());
            if delta.is_some() || bias.is_some() {
                let Ok(own) = MatrixMut::new(own, rows.len(), width) else {
                    unreachable!("the rows were split off by their number")
                };
                parts.push((delta, bias, x.rows(rows.clone()), own));
            }
        }
    }
    parts.into_par_iter().for_each(|(delta, bias, x, mut y)| {
        if let Some(delta) = delta {
            delta.add_to(backend, x, &mut y);
        }
        if let Some(bias) = bias {
            let width = y.n_cols().max(1);
            y.data().chunks_mut(width).for_each(|row| add_assign(row, bias));
        }
    });
}
