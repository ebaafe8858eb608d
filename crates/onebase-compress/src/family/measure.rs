use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use onebase_codec::DeltaSource;
use onebase_codec::rqt::{Gram, Tree};
use onebase_format::Tensor;
use onebase_format::artifact::Role;
use onebase_format::family::Similarity;
use rayon::prelude::*;

use crate::compress::same_bytes;
use crate::pair::read_widened;
use crate::{Error, Pair, Progress, Result};

/// Weights read at a time.
const BLOCK_WEIGHTS: usize = 1 << 16;

/// A fine-tune of a family, by the name of its tenant.
#[derive(Debug)]
pub struct Member {
    /// The tenant's name.
    pub name: String,
    /// The fine-tune with its base.
    pub pair: Pair,
}

/// Opens the fine-tunes of one base, each with the name of its tenant.
///
/// # Errors
/// When a checkpoint cannot be read or is not like the base, a fine-tune has the base's
/// weights, or two tenants have one name.
pub fn open_members(base: &Path, fine_tunes: &[(String, PathBuf)]) -> Result<Vec<Member>> {
    let mut names = BTreeSet::new();
    let mut members = Vec::new();
    for (name, path) in fine_tunes {
        if !names.insert(name) {
            return Err(Error::TwoTenants { name: name.clone() });
        }
        let pair = Pair::open(base, path)?;
        if !pair.is_changed()? {
            return Err(Error::NoChange { path: path.clone() });
        }
        members.push(Member { name: name.clone(), pair });
    }
    Ok(members)
}

/// How much the deltas of a family have in common.
#[derive(Debug)]
pub struct Relatives {
    /// What is known of each linear site, in the order of the forward pass.
    pub(crate) sites: Vec<SiteRelatives>,
    /// Over all sites.
    pub(crate) total: Gram,
    /// Of the fine-tunes, alike first.
    pub(crate) tree: Tree,
    names: Vec<String>,
}

/// What the deltas have in common at one linear site.
#[derive(Debug)]
pub(crate) struct SiteRelatives {
    /// Position among the tensors.
    pub(crate) index: usize,
    /// `[out_features, in_features]`.
    pub(crate) shape: [usize; 2],
    pub(crate) gram: Gram,
    /// The squared norm of the base's weights.
    pub(crate) base_energy: f64,
    /// Whether each fine-tune has the base's weights there.
    pub(crate) unchanged: Vec<bool>,
}

impl Relatives {
    /// Reads every delta once and multiplies each by each.
    ///
    /// # Errors
    /// When one cannot be read or holds NaN or ∞, or two fine-tunes have the same linear
    /// weights.
    pub fn measure(members: &[Member], progress: &dyn Progress) -> Result<Self> {
        let Some(first) = members.first() else { unreachable!("a family has a fine-tune") };
        let specs = first.pair.specs();
        let mut total = Gram::zeros(members.len());
        let mut sites = Vec::new();
        let linear = specs.iter().filter(|spec| spec.role == Role::Linear);
        let weights: usize = linear.map(|spec| spec.shape.iter().product::<usize>()).sum();
        progress.begin((weights * members.len()) as u64 * 2);
        for (index, spec) in specs.iter().enumerate() {
            let [n_rows, n_cols] = spec.shape[..] else { continue };
            if spec.role != Role::Linear {
                continue;
            }
            progress.tensor(&spec.name);
            let deltas = members.iter().map(|member| member.pair.delta(&spec.name));
            let deltas = deltas.collect::<Result<Vec<_>>>()?;
            let sources: Vec<&dyn DeltaSource> = deltas.iter().map(|d| d as _).collect();
            let gram = Gram::of(&sources).map_err(|(member, e)| deltas[member].explain(e))?;
            let unchanged = (0..members.len()).map(|i| {
                // A delta of zeros may still be in another type.
                Ok(gram.at(i, i) == 0.0 && same_bytes(&deltas[i].base, &deltas[i].fine_tune)?)
            });
            let unchanged = unchanged.collect::<Result<_>>()?;
            total.add(&gram);
            let base = deltas.first().map_or(Ok(0.0), |delta| energy(&delta.base))?;
            let shape = [n_rows, n_cols];
            sites.push(SiteRelatives { index, shape, gram, base_energy: base, unchanged });
            progress.advance((n_rows * n_cols * members.len()) as u64 * 2);
        }
        let names: Vec<String> = members.iter().map(|member| member.name.clone()).collect();
        for i in 0..members.len() {
            for j in 0..i {
                let [a, b, both] = [total.at(i, i), total.at(j, j), total.at(i, j)];
                if (a + b - 2.0 * both) <= 1e-12 * a {
                    let (name, other) = (names[i].clone(), names[j].clone());
                    return Err(Error::SameWeights { name, other });
                }
            }
        }
        let tree = Tree::of(&total.scaled(&units(&total)))
            .map_err(|source| first.pair.explain_family(source))?;
        Ok(Self { sites, total, tree, names })
    }

    /// Cosines of the deltas over all linear sites.
    pub fn similarity(&self) -> Similarity {
        let n = self.total.n();
        let row = |i| (0..n).map(|j| self.total.cosine(i, j)).collect();
        Similarity { tenants: self.names.clone(), cosines: (0..n).map(row).collect() }
    }

    /// How the fine-tunes are joined, those that are alike first; heights are in units of a
    /// delta's energy.
    pub fn tree(&self) -> &Tree {
        &self.tree
    }

    /// Weights of the linear sites of one fine-tune.
    pub(crate) fn n_weights(&self) -> usize {
        self.sites.iter().map(|site| site.shape[0] * site.shape[1]).sum()
    }

    /// The factor of each delta by which all have one norm, and 1 on average.
    pub(crate) fn roots(&self) -> Vec<f64> {
        roots(&self.total)
    }

    /// The inner products at a site with all deltas of norm 1 over all sites.
    pub(crate) fn scaled(&self, site: &SiteRelatives) -> Gram {
        site.gram.scaled(&units(&self.total))
    }

    /// The inner products over all sites with all deltas of norm 1.
    pub(crate) fn normed(&self) -> Gram {
        self.total.scaled(&units(&self.total))
    }
}

/// The squared norm of weights.
fn energy(tensor: &Tensor<'_>) -> Result<f64> {
    let size = tensor.dtype().size_bytes();
    let n_weights = tensor.n_weights();
    let sums: Vec<f64> = (0..n_weights.div_ceil(BLOCK_WEIGHTS))
        .into_par_iter()
        .map(|block| {
            let first = block * BLOCK_WEIGHTS;
            let mut weights = vec![0.0f32; BLOCK_WEIGHTS.min(n_weights - first)];
            read_widened(tensor, first * size, &mut weights)?;
            Ok(weights.iter().map(|w| f64::from(*w) * f64::from(*w)).sum())
        })
        .collect::<Result<_>>()?;
    Ok(sums.iter().sum())
}

/// The factors by which all deltas have the norm 1.
fn units(total: &Gram) -> Vec<f64> {
    (0..total.n()).map(|i| 1.0 / total.at(i, i).sqrt()).collect()
}

#[allow(clippy::cast_precision_loss)]
fn roots(total: &Gram) -> Vec<f64> {
    let mean = (total.trace() / total.n() as f64).sqrt();
    (0..total.n()).map(|i| mean / total.at(i, i).sqrt()).collect()
}
