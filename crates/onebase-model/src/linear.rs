use std::ops::Range;
use std::sync::Arc;

use onebase_codec::DeltaLinear;
use onebase_kernels::{Backend, add_assign};
use onebase_tensor::{MatrixMut, MatrixRef};
use rayon::prelude::*;

use crate::Tenant;
use crate::delta::{GainedNode, Stored, add_gained, product};
use crate::weights::{BaseWeight, Inputs};

/// A linear site of the base.
#[derive(Debug)]
pub(crate) struct Linear {
    pub(crate) weight: BaseWeight,
    pub(crate) bias: Option<Vec<f32>>,
}

/// What a tenant changes at a linear site.
pub(crate) struct SiteDelta {
    /// `[out_features, in_features]`.
    pub(crate) shape: [usize; 2],
    /// `None` where the weight is the base's.
    pub(crate) delta: Option<Stored>,
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
/// rows, each tenant's delta added to its own.
pub(crate) fn apply_all<'a, const N: usize>(
    backend: Backend,
    groups: &[RowGroup<'a>],
    inputs: &Inputs<'_>,
    mut sites: [Site<'_, 'a, '_>; N],
) {
    let x = inputs.x;
    // Sites at a time: the smaller ones are not worth several threads each.
    sites.par_iter_mut().for_each(|Site { linear, y, .. }| {
        y.data().fill(0.0);
        linear.weight.add_to(backend, inputs, y);
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
                parts.push(Part { delta, bias, x: x.rows(rows.clone()), y: own });
            }
        }
    }
    let (products, places) = shared_products(backend, &parts);
    parts.into_par_iter().zip(places).for_each(|(Part { delta, bias, x, mut y }, places)| {
        match delta {
            Some(Stored::Own(delta)) => delta.add_to(backend, x, &mut y),
            Some(Stored::Path(path)) => {
                let mut places = places.into_iter();
                for GainedNode { node, gains } in &path.nodes {
                    let Some(gains) = gains else {
                        node.add_to(backend, x, &mut y);
                        continue;
                    };
                    if let Some((product, rows)) = places.next() {
                        add_gained(gains, &products[product][rows], y.data());
                    }
                }
            }
            None => {}
        }
        if let Some(bias) = bias {
            let width = y.n_cols().max(1);
            y.data().chunks_mut(width).for_each(|row| add_assign(row, bias));
        }
    });
}

/// Rows of one tenant at one site.
struct Part<'a, 'x, 'y> {
    delta: Option<&'a Stored>,
    bias: Option<&'a Vec<f32>>,
    x: MatrixRef<'x>,
    y: MatrixMut<'y>,
}

/// Of each part, and each node with gains on its path, a product and where its rows are in it.
type Places = Vec<Vec<(usize, Range<usize>)>>;

/// The products of nodes with the rows of all tenants that have them on their path, one for
/// each node: its codes are read once for all.
fn shared_products(backend: Backend, parts: &[Part<'_, '_, '_>]) -> (Vec<Vec<f32>>, Places) {
    let mut jobs: Vec<(&Arc<dyn DeltaLinear>, Vec<f32>)> = Vec::new();
    let mut places: Places = vec![Vec::new(); parts.len()];
    for (part, places) in parts.iter().zip(&mut places) {
        let Some(Stored::Path(path)) = part.delta else { continue };
        for GainedNode { node, .. } in path.nodes.iter().filter(|node| node.gains.is_some()) {
            let known = jobs.iter().position(|(other, _)| Arc::ptr_eq(other, node));
            let job = known.unwrap_or_else(|| {
                jobs.push((node, Vec::new()));
                jobs.len() - 1
            });
            let [n_out, n_in] = node.shape();
            let rows = &mut jobs[job].1;
            let first = rows.len() / n_in.max(1);
            rows.extend_from_slice(part.x.data());
            places.push((job, first * n_out..(first + part.x.n_rows()) * n_out));
        }
    }
    let products = jobs.into_par_iter().map(|(node, rows)| {
        let n_in = node.shape()[1];
        let n_rows = rows.len() / n_in.max(1);
        match MatrixRef::new(&rows, n_rows, n_in) {
            Ok(x) => product(&**node, backend, x),
            Err(_) => unreachable!("rows were copied whole"),
        }
    });
    (products.collect(), places)
}
