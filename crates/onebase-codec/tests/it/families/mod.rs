//! Made-up families of deltas, and what a tree makes of them.

#![allow(dead_code)]

use onebase_codec::DeltaSource;
use onebase_codec::rqt::{
    Costs, EncodedTree, Fit, Gram, SiteNode, Tree, encode_tree, ladder, predict,
};
use onebase_tensor::{MatrixRef, stream};
use rand_distr::{Distribution, StandardNormal};

/// Weights that share a scale.
pub(crate) const GROUP: usize = 128;

/// A family with a part that all have, one that each cluster has, and one of each model's own.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) n_models: usize,
    /// Models of a cluster; they follow each other.
    pub(crate) cluster: usize,
    /// Shares of energy that all and that the cluster have in common.
    pub(crate) common: [f64; 2],
    /// What each delta is multiplied by, over and over.
    pub(crate) amplitudes: &'static [f32],
    /// Bits of codes for each model.
    pub(crate) bits: f64,
    /// Gain over codes of each model's own in dB, as designs of this kind are known to have.
    pub(crate) known_gain: f64,
}

const fn case(
    name: &'static str,
    n_models: usize,
    common: [f64; 2],
    bits: f64,
    known_gain: f64,
) -> Case {
    Case { name, n_models, cluster: n_models / 2, common, amplitudes: &[1.0], bits, known_gain }
}

pub(crate) const CASES: [Case; 9] = [
    case("4, nothing in common", 4, [0.0, 0.0], 2.0, 0.0),
    case("4, all .3, pairs .2", 4, [0.3, 0.2], 2.0, 0.2),
    case("4, all .5, pairs .2", 4, [0.5, 0.2], 2.0, 1.3),
    case("4, all .7, pairs .15", 4, [0.7, 0.15], 2.0, 3.2),
    case("4, pairs .7", 4, [0.0, 0.7], 2.0, 1.1),
    Case {
        amplitudes: &[1.0, 0.5, 2.0, 1.0],
        ..case("4, all .5, pairs .2, amplitudes", 4, [0.5, 0.2], 2.0, 1.3)
    },
    case("4, all .5, pairs .2", 4, [0.5, 0.2], 1.0, 1.7),
    case("8, all .5, fours .2", 8, [0.5, 0.2], 2.0, 2.2),
    case("8, all .5, fours .2", 8, [0.5, 0.2], 1.0, 2.6),
];

/// Gaussian weights, the same for the same name.
pub(crate) fn gaussian(seed: u64, name: &str, n: usize) -> Vec<f32> {
    let mut rng = stream(seed, name, 0);
    (0..n).map(|_| StandardNormal.sample(&mut rng)).collect()
}

impl Case {
    /// The deltas, `[n_rows, n_cols]` each.
    #[allow(clippy::cast_possible_truncation)]
    pub(crate) fn deltas(&self, n_rows: usize, n_cols: usize) -> Vec<Vec<f32>> {
        let n = n_rows * n_cols;
        let all = gaussian(1, "all", n);
        let [a, b] = self.common;
        let [of_all, of_cluster, own] = [a, b, 1.0 - a - b].map(|share| share.sqrt() as f32);
        let mut deltas = Vec::new();
        for i in 0..self.n_models {
            let cluster = gaussian(2, &format!("cluster {}", i / self.cluster.max(1)), n);
            let private = gaussian(3, &format!("model {i}"), n);
            let amplitude = self.amplitudes[i % self.amplitudes.len()];
            let weight = |k: usize| of_all * all[k] + of_cluster * cluster[k] + own * private[k];
            deltas.push((0..n).map(|k| amplitude * weight(k)).collect());
        }
        deltas
    }
}

/// A family's deltas with all that is known of them.
pub(crate) struct Measured<'a> {
    pub(crate) deltas: Vec<MatrixRef<'a>>,
    pub(crate) gram: Gram,
    pub(crate) tree: Tree,
    /// One for each delta, about 1, by which all have one norm.
    pub(crate) weights: Vec<f64>,
}

impl<'a> Measured<'a> {
    #[allow(clippy::cast_precision_loss)]
    pub(crate) fn new(deltas: &'a [Vec<f32>], n_rows: usize, n_cols: usize) -> Self {
        let deltas: Vec<MatrixRef<'_>> =
            deltas.iter().map(|d| MatrixRef::new(d, n_rows, n_cols).unwrap()).collect();
        let raw = Gram::of(&sources(&deltas)).unwrap();
        let units: Vec<f64> = (0..raw.n()).map(|i| 1.0 / raw.at(i, i).sqrt()).collect();
        let gram = raw.scaled(&units);
        let tree = Tree::of(&gram).unwrap();
        let mean = raw.trace() / raw.n() as f64;
        let weights = (0..raw.n()).map(|i| mean / raw.at(i, i)).collect();
        Self { deltas, gram, tree, weights }
    }

    /// The bits of the best plan within so many bits of codes for each model, scales and gains
    /// not counted, and the mean error to be expected.
    #[allow(clippy::cast_precision_loss)]
    pub(crate) fn plan(&self, bits: f64) -> (Vec<u8>, f64) {
        let costs = free();
        let n = self.deltas.len() as f64;
        let ladder = ladder(&self.tree, self.tree.root(), &self.gram, &costs).unwrap();
        let best = ladder.iter().rfind(|choice| choice.cost <= bits * n + 1e-9).unwrap();
        let losses = predict(&self.tree, &best.bits, &self.gram, &costs).unwrap();
        (best.bits.clone(), losses.iter().sum::<f64>() / n)
    }

    /// What a plan writes.
    pub(crate) fn encode(&self, bits: &[u8], passes: usize) -> EncodedTree {
        let nodes = site_nodes(&self.tree, bits);
        let fit = Fit { group_size: GROUP, passes };
        encode_tree(&sources(&self.deltas), &self.weights, &nodes, fit).unwrap()
    }

    /// The mean relative squared error of what a plan writes.
    #[allow(clippy::cast_precision_loss)]
    pub(crate) fn error(&self, bits: &[u8], passes: usize) -> f64 {
        let nodes = site_nodes(&self.tree, bits);
        let encoded = self.encode(bits, passes);
        let energy = |delta: &MatrixRef<'_>| {
            delta.data().iter().map(|w| f64::from(*w) * f64::from(*w)).sum::<f64>()
        };
        let energies: Vec<f64> = self.deltas.iter().map(energy).collect();
        let mut left = energies.clone();
        for (node, errors) in nodes.iter().zip(&encoded.errors) {
            for (member, error) in node.members.iter().zip(errors) {
                left[*member] = *error;
            }
        }
        left.iter().zip(&energies).map(|(l, e)| l / e).sum::<f64>() / left.len() as f64
    }
}

/// Nothing but codes costs, and all errors count alike.
pub(crate) fn free() -> Costs {
    Costs { scale_bits: 0.0, gain_bits: 0.0, uncoded: 1.0, ..Costs::new(GROUP, GROUP) }
}

pub(crate) fn sources<'a>(deltas: &'a [MatrixRef<'a>]) -> Vec<&'a dyn DeltaSource> {
    deltas.iter().map(|delta| delta as &dyn DeltaSource).collect()
}

/// The nodes of a plan that have codes, parents first.
pub(crate) fn site_nodes(tree: &Tree, bits: &[u8]) -> Vec<SiteNode> {
    let coded = tree.nodes().iter().zip(bits).rev().filter(|(_, bits)| **bits > 0);
    coded
        .map(|(node, bits)| SiteNode { members: node.members.clone(), bits: usize::from(*bits) })
        .collect()
}

/// A plan as `models×bits`.
pub(crate) fn written(tree: &Tree, bits: &[u8]) -> String {
    let nodes = site_nodes(tree, bits);
    let node = |node: &SiteNode| format!("{}×{}", node.members.len(), node.bits);
    nodes.iter().map(node).collect::<Vec<_>>().join(" ")
}

pub(crate) fn decibels(from: f64, to: f64) -> f64 {
    10.0 * (from / to).log10()
}
