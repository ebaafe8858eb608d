use std::ops::Range;

use half::f16;
use rayon::prelude::*;

use super::gram::dot;
use crate::source::{BLOCK_WEIGHTS, read_finite};
use crate::{DeltaLinear, DeltaSource, Result};

/// Shared nodes in the order in which a model meets them at a site, and its gains there.
#[derive(Clone, Default)]
pub struct SitePath<'a> {
    /// Each `[out_features, in_features]`.
    pub nodes: Vec<&'a dyn DeltaLinear>,
    /// Of each node, `[out_features]`.
    pub gains: Vec<Vec<f16>>,
}

/// What shared nodes leave of a delta, for a codec of its own.
pub struct Residual<'a> {
    /// The delta.
    pub delta: &'a dyn DeltaSource,
    /// The nodes and the model's gains.
    pub path: &'a SitePath<'a>,
}

impl DeltaSource for Residual<'_> {
    fn shape(&self) -> [usize; 2] {
        self.delta.shape()
    }

    fn read_rows(&self, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        self.delta.read_rows(rows.clone(), out)?;
        let n_cols = self.shape()[1].max(1);
        let mut values = vec![0.0; out.len()];
        for (node, gains) in self.path.nodes.iter().zip(&self.path.gains) {
            node.write_rows(rows.clone(), &mut values);
            let pairs = out.chunks_mut(n_cols).zip(values.chunks(n_cols));
            for ((out, values), gain) in pairs.zip(&gains[rows.clone()]) {
                let gain = gain.to_f32();
                out.iter_mut().zip(values).for_each(|(w, v)| *w -= gain * v);
            }
        }
        Ok(())
    }
}

/// The squared norm of a delta, and what is left of it after each of several paths of nodes
/// with the best gains for each row: how much of a model its relatives' nodes hold.
/// `paths` are positions in `nodes`.
///
/// # Errors
/// When the delta cannot be read or holds NaN or ∞.
pub fn path_energy(
    delta: &dyn DeltaSource,
    nodes: &[&dyn DeltaLinear],
    paths: &[Vec<usize>],
) -> Result<(f64, Vec<f64>)> {
    let mut total = 0.0;
    let mut left = vec![0.0; paths.len()];
    let blocks = by_blocks(delta, nodes, |delta, nodes| {
        let energy = dot(delta, delta);
        let left = paths.iter().map(|path| {
            let nodes: Vec<&[f32]> = path.iter().map(|v| nodes[*v]).collect();
            let products = nodes.iter().map(|node| dot(delta, node)).collect::<Vec<_>>();
            let gains = best_gains(&nodes, &products);
            let held: f64 = gains.iter().zip(&products).map(|(gain, product)| gain * product).sum();
            (energy - held).max(0.0)
        });
        (energy, left.collect::<Vec<_>>())
    })?;
    for (energy, of_paths) in blocks.into_iter().flatten() {
        total += energy;
        left.iter_mut().zip(of_paths).for_each(|(sum, left)| *sum += left);
    }
    Ok((total, left))
}

/// The least-squares gains of a delta at nodes, each `[out_features]`: for each row those of
/// all nodes together.
///
/// # Errors
/// When the delta cannot be read or holds NaN or ∞.
pub fn fitted_gains(delta: &dyn DeltaSource, nodes: &[&dyn DeltaLinear]) -> Result<Vec<Vec<f16>>> {
    let most = f64::from(f16::MAX.to_f32());
    let rows = by_blocks(delta, nodes, |delta, nodes| {
        let products = nodes.iter().map(|node| dot(delta, node)).collect::<Vec<_>>();
        let gains = best_gains(nodes, &products).into_iter();
        gains.map(|gain| f16::from_f64(gain.clamp(-most, most))).collect::<Vec<_>>()
    })?;
    let rows: Vec<Vec<f16>> = rows.into_iter().flatten().collect();
    Ok((0..nodes.len()).map(|v| rows.iter().map(|row| row[v]).collect()).collect())
}

/// `of` each row of a delta and of nodes, in blocks, in their order.
fn by_blocks<T: Send>(
    delta: &dyn DeltaSource,
    nodes: &[&dyn DeltaLinear],
    of: impl Fn(&[f32], &[&[f32]]) -> T + Sync,
) -> Result<Vec<Vec<T>>> {
    let [n_rows, n_cols] = delta.shape();
    let block_rows = (BLOCK_WEIGHTS / n_cols.max(1)).max(1);
    (0..n_rows.div_ceil(block_rows))
        .into_par_iter()
        .map(|block| {
            let rows = block * block_rows..n_rows.min((block + 1) * block_rows);
            let delta = read_finite(delta, rows.clone())?;
            let mut values = vec![vec![0.0; delta.len()]; nodes.len()];
            for (node, values) in nodes.iter().zip(&mut values) {
                node.write_rows(rows.clone(), values);
            }
            let row = |row: usize| {
                let span = row * n_cols..(row + 1) * n_cols;
                let nodes: Vec<&[f32]> = values.iter().map(|v| &v[span.clone()]).collect();
                of(&delta[span], &nodes)
            };
            Ok((0..rows.len()).map(row).collect())
        })
        .collect()
}

/// The gains by which nodes are nearest to a row: the solution of the normal equations,
/// where nodes that the others hold already have the gain 0.
fn best_gains(nodes: &[&[f32]], products: &[f64]) -> Vec<f64> {
    let n = nodes.len();
    let mut gram = vec![0.0; n * n];
    for i in 0..n {
        for j in 0..=i {
            let value = dot(nodes[i], nodes[j]);
            gram[i * n + j] = value;
            gram[j * n + i] = value;
        }
    }
    // Gram–Schmidt over the nodes: `basis` in coordinates of the nodes, orthonormal.
    let apply = |v: &[f64]| -> Vec<f64> {
        (0..n).map(|i| (0..n).map(|j| gram[i * n + j] * v[j]).sum()).collect()
    };
    let inner = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let mut basis: Vec<Vec<f64>> = Vec::new();
    for i in 0..n {
        let mut v = vec![0.0; n];
        v[i] = 1.0;
        for _ in 0..2 {
            let image = apply(&v);
            for b in &basis {
                let along = inner(b, &image);
                v.iter_mut().zip(b).for_each(|(v, b)| *v -= along * b);
            }
        }
        let power = inner(&v, &apply(&v));
        if power > 1e-9 * gram[i * n + i] {
            let length = power.sqrt();
            basis.push(v.into_iter().map(|v| v / length).collect());
        }
    }
    let mut gains = vec![0.0; n];
    for b in &basis {
        let along = inner(b, products);
        gains.iter_mut().zip(b).for_each(|(gain, b)| *gain += along * b);
    }
    gains
}
