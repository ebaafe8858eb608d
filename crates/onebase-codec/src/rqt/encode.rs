use std::ops::Range;

use half::{bf16, f16};
use onebase_kernels::plane_bytes;
use onebase_tensor::{EncodedDelta, PartData};
use rayon::prelude::*;

use super::Gram;
use super::gram::dot;
use super::topology::top_eigenpair;
use crate::low_bit_rows::LowBitRows;
use crate::source::{BLOCK_WEIGHTS, read_finite};
use crate::{DeltaSource, Error, Result};

/// A node whose codes are to be written at a site.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SiteNode {
    /// Positions of the models that have it on their path, ascending.
    pub members: Vec<usize>,
    /// Bits of its codes.
    pub bits: usize,
}

impl SiteNode {
    /// Whether several models have it, each with a gain.
    pub fn is_shared(&self) -> bool {
        self.members.len() > 1
    }
}

/// What is written of a family at one site.
#[derive(Clone, Debug)]
pub struct EncodedTree {
    /// The codes of each node, in the parts of the codec `rtn`.
    pub nodes: Vec<EncodedDelta>,
    /// Of each node, and each of its members if it is shared, the gains, `[out_features]`.
    pub gains: Vec<Vec<Vec<f16>>>,
    /// Of each node and each of its members, the squared error down to this node.
    pub errors: Vec<Vec<f64>>,
}

/// How the codes of a site are fitted.
#[derive(Clone, Copy, Debug)]
pub struct Fit {
    /// Weights that share a scale, as `rtn`'s.
    pub group_size: usize,
    /// Times that all nodes are fitted to each other after the first fit from the top down.
    pub passes: usize,
}

/// Writes the deltas of a family at one site as residual codes: each node codes what its
/// models have in common of what the nodes above it have left, and "delegates residual
/// errors to child nodes" (RQT, Findings of ACL 2025, abstract; the paper says no more, what
/// follows is this project's).
///
/// A node's codes are those of `T = Σ w γ R ÷ Σ w γ²`, the best for residuals `R` with gains
/// `γ`; the gains are first the top eigenvector of the residuals' Gram matrix over a block of
/// rows, then fitted row by row. Then each node in turn is fitted to what all others leave,
/// row by row, and kept where the weighted error falls. `weights` are one for each delta,
/// about 1; parents come before their children in `nodes`.
///
/// Deltas are read once, by blocks of rows, and nothing but the codes is held of the others.
/// The bytes do not depend on the number of threads.
///
/// # Errors
/// When a delta cannot be read or holds NaN or ∞, with its position, or a decomposition does
/// not converge.
pub fn encode_tree(
    deltas: &[&dyn DeltaSource],
    weights: &[f64],
    nodes: &[SiteNode],
    fit: Fit,
) -> Result<EncodedTree, (usize, Error)> {
    let shape @ [n_rows, n_cols] = deltas.first().map_or([0, 0], |delta| delta.shape());
    let block_rows = (BLOCK_WEIGHTS / n_cols.max(1)).max(1);
    let n_blocks = if n_cols == 0 { 0 } else { n_rows.div_ceil(block_rows) };
    let blocks: Vec<Block> = (0..n_blocks)
        .into_par_iter()
        .map(|block| {
            let rows = block * block_rows..n_rows.min((block + 1) * block_rows);
            let mut block = Block::read(deltas, weights, nodes, fit, rows)?;
            block.fit_down().map_err(|error| (0, error))?;
            for _ in 0..fit.passes {
                if !block.refine() {
                    break;
                }
            }
            block.measure();
            Ok(block)
        })
        .collect::<Result<_, _>>()?;
    let mut tree = EncodedTree { nodes: Vec::new(), gains: Vec::new(), errors: Vec::new() };
    for (v, node) in nodes.iter().enumerate() {
        let rows = LowBitRows { bits: node.bits, group_size: fit.group_size, n_cols };
        let codes = blocks.iter().flat_map(|b| b.coded[v].codes.iter().copied()).collect();
        let scale = blocks.iter().flat_map(|b| b.coded[v].scale.iter().copied()).collect();
        let (codes, scale) = (PartData::U8(codes), PartData::BF16(scale));
        tree.nodes.push(EncodedDelta::new(
            shape,
            [
                ("codes", vec![n_rows, node.bits, plane_bytes(n_cols)], codes),
                ("scale", vec![n_rows, rows.n_groups()], scale),
            ],
        ));
        let members = 0..node.members.len();
        let gains = |m: usize| {
            blocks.iter().flat_map(|b: &Block<'_>| b.coded[v].gains[m].iter().copied()).collect()
        };
        tree.gains.push(if node.is_shared() {
            members.clone().map(gains).collect()
        } else {
            Vec::new()
        });
        let error = |m: usize| blocks.iter().map(|b: &Block<'_>| b.coded[v].errors[m]).sum();
        tree.errors.push(members.map(error).collect());
    }
    Ok(tree)
}

/// A node's share of a block.
struct Coded {
    codes: Vec<u8>,
    scale: Vec<bf16>,
    /// What the codes decode to, `[rows, n_cols]`.
    values: Vec<f32>,
    /// By member, then row; 1 where the node is not shared.
    gains: Vec<Vec<f16>>,
    /// By member.
    errors: Vec<f64>,
}

/// Some rows of all deltas.
struct Block<'a> {
    weights: &'a [f64],
    nodes: &'a [SiteNode],
    fit: Fit,
    n_rows: usize,
    n_cols: usize,
    /// By model, what its nodes leave, `[rows, n_cols]`.
    residuals: Vec<Vec<f32>>,
    coded: Vec<Coded>,
}

impl<'a> Block<'a> {
    fn read(
        deltas: &[&dyn DeltaSource],
        weights: &'a [f64],
        nodes: &'a [SiteNode],
        fit: Fit,
        rows: Range<usize>,
    ) -> Result<Self, (usize, Error)> {
        let n_cols = deltas.first().map_or(0, |delta| delta.shape()[1]);
        let read = |(i, delta): (usize, &&dyn DeltaSource)| {
            read_finite(*delta, rows.clone()).map_err(|error| (i, error))
        };
        let residuals = deltas.iter().enumerate().map(read).collect::<Result<_, _>>()?;
        let n_rows = rows.len();
        Ok(Self { weights, nodes, fit, n_rows, n_cols, residuals, coded: Vec::new() })
    }

    fn rows_of(&self, node: &SiteNode) -> LowBitRows {
        LowBitRows { bits: node.bits, group_size: self.fit.group_size, n_cols: self.n_cols }
    }

    /// Codes each node from the top down.
    fn fit_down(&mut self) -> Result<()> {
        for node in self.nodes {
            let rows = self.rows_of(node);
            let mut coded = Coded {
                codes: vec![0; self.n_rows * rows.row_bytes()],
                scale: vec![bf16::ZERO; self.n_rows * rows.n_groups()],
                values: self.common(node)?,
                gains: vec![vec![f16::ONE; self.n_rows]; node.members.len()],
                errors: Vec::new(),
            };
            for row in 0..self.n_rows {
                let span = row * self.n_cols..(row + 1) * self.n_cols;
                let target = coded.values[span.clone()].to_vec();
                let codes = &mut coded.codes[row * rows.row_bytes()..][..rows.row_bytes()];
                let scale = &mut coded.scale[row * rows.n_groups()..][..rows.n_groups()];
                rows.fit(&target, codes, scale);
                rows.write(codes, scale, &mut coded.values[span.clone()]);
                let values = &coded.values[span.clone()];
                for (m, member) in node.members.iter().enumerate() {
                    let residual = &mut self.residuals[*member][span.clone()];
                    if node.is_shared() {
                        coded.gains[m][row] = gain(residual, values);
                    }
                    take(residual, coded.gains[m][row], values);
                }
            }
            self.coded.push(coded);
        }
        Ok(())
    }

    /// What the residuals of a node's members have in common.
    #[allow(clippy::cast_possible_truncation)]
    fn common(&self, node: &SiteNode) -> Result<Vec<f32>> {
        if let [member] = node.members[..] {
            return Ok(self.residuals[member].clone());
        }
        let roots: Vec<f64> = node.members.iter().map(|m| self.weights[*m].sqrt()).collect();
        let residuals: Vec<&Vec<f32>> = node.members.iter().map(|m| &self.residuals[*m]).collect();
        let (_, u) = top_eigenpair(&Gram::of_rows(&residuals, &roots))?;
        let mut common = vec![0.0f32; self.n_rows * self.n_cols];
        for ((member, root), u) in node.members.iter().zip(&roots).zip(u) {
            let factor = (root * u) as f32;
            for (sum, value) in common.iter_mut().zip(&self.residuals[*member]) {
                *sum += factor * value;
            }
        }
        Ok(common)
    }

    /// Fits each node to what the others leave, row by row; `false` where nothing changes.
    fn refine(&mut self) -> bool {
        let mut improved = false;
        let mut coded = std::mem::take(&mut self.coded);
        for (node, coded) in self.nodes.iter().zip(&mut coded) {
            for row in 0..self.n_rows {
                improved |= self.refine_row(node, coded, row);
            }
        }
        self.coded = coded;
        improved
    }

    #[allow(clippy::cast_possible_truncation)]
    fn refine_row(&mut self, node: &SiteNode, coded: &mut Coded, row: usize) -> bool {
        let rows = self.rows_of(node);
        let span = row * self.n_cols..(row + 1) * self.n_cols;
        let old = &coded.values[span.clone()];
        let mut before = 0.0;
        let mut without = Vec::with_capacity(node.members.len());
        let mut target = vec![0.0f32; self.n_cols];
        let mut weight = 0.0f64;
        for (m, member) in node.members.iter().enumerate() {
            let residual = &self.residuals[*member][span.clone()];
            before += self.weights[*member] * dot(residual, residual);
            let gain = coded.gains[m][row].to_f32();
            let whole: Vec<f32> = residual.iter().zip(old).map(|(r, c)| r + gain * c).collect();
            let factor = self.weights[*member] * f64::from(gain);
            weight += factor * f64::from(gain);
            target.iter_mut().zip(&whole).for_each(|(t, w)| *t += factor as f32 * w);
            without.push(whole);
        }
        if weight <= 0.0 {
            return false;
        }
        target.iter_mut().for_each(|t| *t = (f64::from(*t) / weight) as f32);
        let mut codes = vec![0; rows.row_bytes()];
        let mut scale = vec![bf16::ZERO; rows.n_groups()];
        let mut values = vec![0.0; self.n_cols];
        rows.fit(&target, &mut codes, &mut scale);
        rows.write(&codes, &scale, &mut values);
        let mut after = 0.0;
        let mut gains = Vec::with_capacity(without.len());
        for (residual, member) in without.iter_mut().zip(&node.members) {
            let gain = if node.is_shared() { gain(residual, &values) } else { f16::ONE };
            take(residual, gain, &values);
            after += self.weights[*member] * dot(residual, residual);
            gains.push(gain);
        }
        if after >= before {
            return false;
        }
        for (m, (member, residual)) in node.members.iter().zip(without).enumerate() {
            self.residuals[*member][span.clone()].copy_from_slice(&residual);
            coded.gains[m][row] = gains[m];
        }
        coded.values[span].copy_from_slice(&values);
        coded.codes[row * rows.row_bytes()..][..rows.row_bytes()].copy_from_slice(&codes);
        coded.scale[row * rows.n_groups()..][..rows.n_groups()].copy_from_slice(&scale);
        true
    }

    /// Squared errors down to each node: what is left at the end, and the nodes below it.
    fn measure(&mut self) {
        let mut residuals = std::mem::take(&mut self.residuals);
        for v in (0..self.nodes.len()).rev() {
            let node = &self.nodes[v];
            for (m, member) in node.members.iter().enumerate() {
                let residual = &mut residuals[*member];
                self.coded[v].errors.push(dot(residual, residual));
                for row in 0..self.n_rows {
                    let span = row * self.n_cols..(row + 1) * self.n_cols;
                    let gain = f16::from_f32(-self.coded[v].gains[m][row].to_f32());
                    take(&mut residual[span.clone()], gain, &self.coded[v].values[span]);
                }
            }
            // Kept no longer than the block is worked on.
            self.coded[v].values = Vec::new();
        }
    }
}

/// The least-squares factor of `values` in a row, as it is stored.
#[allow(clippy::cast_possible_truncation)]
pub(super) fn gain(row: &[f32], values: &[f32]) -> f16 {
    let power = dot(values, values);
    let gain = if power > 0.0 { dot(row, values) / power } else { 0.0 };
    let most = f64::from(f16::MAX.to_f32());
    f16::from_f64(gain.clamp(-most, most))
}

/// Takes the gain times values off a row.
fn take(row: &mut [f32], gain: f16, values: &[f32]) {
    let gain = gain.to_f32();
    row.iter_mut().zip(values).for_each(|(r, v)| *r -= gain * v);
}
