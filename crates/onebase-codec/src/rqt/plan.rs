use std::cmp::Ordering;

use super::topology::top_eigenpair;
use super::{Gram, Tree};
use crate::Result;

/// Most bits of a code that several models share.
pub const MAX_SHARED_BITS: usize = 4;

/// Most bits of a code of one model's own.
pub const MAX_LEAF_BITS: usize = 8;

/// Shared nodes on the way to a model, at most: serving reads them all.
const MAX_SHARED_NODES: usize = 3;

/// Of more models than this, sharing twice on the way is enough: plans are searched for in
/// all combinations.
const MANY_MODELS: usize = 10;

/// Relative squared error of the best uniform mid-rise quantizer of one to eight bits on a
/// Gaussian (J. Max, "Quantizing for minimum distortion", IRE Trans. Inf. Theory 1960, table
/// II; continued for more levels by the same minimisation).
const GAUSSIAN_ERROR: [f64; MAX_LEAF_BITS] =
    [0.363_4, 0.118_8, 0.037_4, 0.011_54, 0.003_495, 0.001_041, 0.000_304, 0.000_087];

/// How much lower the error is in small groups, whose scale is fitted to them, in units of
/// one part in the group size; measured on Gaussian weights.
const FITTED_SCALE: [f64; MAX_LEAF_BITS] = [1.0, 2.4, 5.0, 9.0, 14.0, 20.0, 27.0, 35.0];

/// The relative squared error that codes of `bits` bits, at most [`MAX_LEAF_BITS`], leave in
/// groups of `group_size` Gaussian weights; 1 without codes.
#[allow(clippy::cast_precision_loss)]
pub fn expected_error(bits: usize, group_size: usize) -> f64 {
    let Some(index) = bits.checked_sub(1) else { return 1.0 };
    GAUSSIAN_ERROR[index] * (1.0 - FITTED_SCALE[index] / group_size as f64).max(0.3)
}

/// What codes of a site cost beside themselves, in bits per weight.
#[derive(Clone, Copy, Debug)]
pub struct Costs {
    /// Weights that share a scale; at most the input features.
    pub group_size: usize,
    /// Of the scales of a node.
    pub scale_bits: f64,
    /// Of the gains of one model at a shared node.
    pub gain_bits: f64,
    /// How much more the energy counts that a model has of its own and no code holds, than that
    /// of the errors of codes: those are noise, this is what tells it from its relatives.
    pub uncoded: f64,
    /// Of what each model has of its own beside codes, if anything.
    pub leaf: Option<FixedLeaf>,
}

/// [`Costs::uncoded`] unless something else is asked for. At equal squared errors, relatives
/// whose own parts were coded had the lower divergences from their fine-tunes.
const UNCODED: f64 = 2.0;

/// What each model has of its own, where it is not planned.
#[derive(Clone, Copy, Debug)]
pub struct FixedLeaf {
    /// Its size in bits per weight.
    pub bits: f64,
    /// The relative squared error that it leaves of what it is given.
    pub error: f64,
}

impl Costs {
    /// Those at a site of so many input features: scales and gains have 16 bits.
    #[allow(clippy::cast_precision_loss)]
    pub fn new(group_size: usize, in_features: usize) -> Self {
        let in_features = in_features.max(1);
        let group_size = group_size.min(in_features);
        let n_groups = in_features.div_ceil(group_size);
        Self {
            group_size,
            scale_bits: 16.0 * n_groups as f64 / in_features as f64,
            gain_bits: 16.0 / in_features as f64,
            uncoded: UNCODED,
            leaf: None,
        }
    }

    #[allow(clippy::cast_precision_loss)]
    fn of_node(&self, bits: usize, n_members: usize) -> f64 {
        if bits == 0 {
            return 0.0;
        }
        let gains = if n_members > 1 { self.gain_bits * n_members as f64 } else { 0.0 };
        bits as f64 + self.scale_bits + gains
    }
}

/// Bits for each node of a tree, or of a subtree: those of the others are 0.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    /// By position in the tree.
    pub bits: Vec<u8>,
    /// The size in bits per weight, of all models together.
    pub cost: f64,
    /// The squared error to be expected, in units of the Gram matrix, of all models together,
    /// with what no code holds as [`Costs::uncoded`] says.
    pub loss: f64,
}

/// The choices for the models below a node that no other is better than in both size and
/// error, by size.
///
/// A shared code of models with the Gram matrix `G` keeps the share `1 − d` of what they
/// have in common, `λ u uᵀ` with the largest eigenvalue and its vector; what is left has the
/// Gram matrix `G − (1 − d) λ u uᵀ`, from which the nodes below go on. All combinations of
/// bits are searched, but for codes that are shared and serve one model alone, and those that
/// leave a model without any.
///
/// # Errors
/// When a decomposition does not converge.
pub fn ladder(tree: &Tree, node: usize, gram: &Gram, costs: &Costs) -> Result<Vec<Choice>> {
    let n_models = tree.nodes()[node].members.len();
    let most_shared = if n_models > MANY_MODELS { MAX_SHARED_NODES - 1 } else { MAX_SHARED_NODES };
    let search = Search { tree, costs, most_shared };
    let members = &tree.nodes()[node].members;
    search.frontier(node, &gram.of_members(members), 0)
}

/// The squared error of each model that bits for the nodes of a tree lead to, in units of
/// the Gram matrix; see [`ladder`].
///
/// # Errors
/// When a decomposition does not converge.
pub fn predict(tree: &Tree, bits: &[u8], gram: &Gram, costs: &Costs) -> Result<Vec<f64>> {
    let mut losses = vec![0.0; gram.n()];
    let mut open = vec![(tree.root(), gram.clone())];
    while let Some((v, gram)) = open.pop() {
        let node = &tree.nodes()[v];
        let bits = usize::from(bits[v]);
        let Some(children) = node.children else {
            let own = costs.leaf.map_or_else(|| costs.error(bits), |leaf| leaf.error);
            losses[node.members[0]] = gram.at(0, 0).max(0.0) * own;
            continue;
        };
        let left = if bits > 0 {
            let (lambda, u) = top_eigenpair(&gram)?;
            gram.less_outer((1.0 - costs.error(bits)) * lambda, &u)
        } else {
            gram
        };
        for child in children {
            open.push((child, left.of_members(&positions(tree, v, child))));
        }
    }
    Ok(losses)
}

impl Costs {
    fn error(&self, bits: usize) -> f64 {
        expected_error(bits, self.group_size)
    }
}

/// Positions of a child's members among those of its parent.
fn positions(tree: &Tree, parent: usize, child: usize) -> Vec<usize> {
    let of = &tree.nodes()[parent].members;
    let members = tree.nodes()[child].members.iter();
    members.filter_map(|member| of.binary_search(member).ok()).collect()
}

struct Search<'a> {
    tree: &'a Tree,
    costs: &'a Costs,
    most_shared: usize,
}

impl Search<'_> {
    /// `gram` is of the node's members, `n_shared` the shared codes above it.
    fn frontier(&self, v: usize, gram: &Gram, n_shared: usize) -> Result<Vec<Choice>> {
        let node = &self.tree.nodes()[v];
        let n_nodes = self.tree.nodes().len();
        let Some(children) = node.children else {
            let energy = gram.at(0, 0).max(0.0);
            if let Some(leaf) = self.costs.leaf {
                let (cost, loss) = (leaf.bits, energy * leaf.error);
                return Ok(vec![Choice { bits: vec![0; n_nodes], cost, loss }]);
            }
            let choice = |b: usize| {
                let mut bits = vec![0; n_nodes];
                bits[v] = u8::try_from(b).unwrap_or(u8::MAX);
                let weight = if b == 0 { self.costs.uncoded } else { 1.0 };
                let loss = energy * self.costs.error(b) * weight;
                Choice { bits, cost: self.costs.of_node(b, 1), loss }
            };
            // A delta that is dropped at a site costs more than its energy says.
            let least = usize::from(n_shared == 0 && energy > 0.0);
            return Ok(pruned((least..=MAX_LEAF_BITS).map(choice).collect()));
        };
        let below = |gram: &Gram, n_shared: usize| -> Result<Vec<Choice>> {
            let [a, b] = children;
            let sides = [a, b].map(|child| {
                let own = gram.of_members(&positions(self.tree, v, child));
                self.frontier(child, &own, n_shared)
            });
            let [a, b] = sides;
            Ok(joined(&a?, &b?))
        };
        let mut choices = below(gram, n_shared)?;
        let (lambda, u) = top_eigenpair(gram)?;
        let largest = (0..gram.n()).map(|i| gram.at(i, i)).fold(0.0, f64::max);
        // Else one of the models gains as much by the same bits for itself.
        if n_shared < self.most_shared && lambda > 1.02 * largest {
            for bits in 1..=MAX_SHARED_BITS {
                let left = gram.less_outer((1.0 - self.costs.error(bits)) * lambda, &u);
                let cost = self.costs.of_node(bits, gram.n());
                choices.extend(below(&left, n_shared + 1)?.into_iter().map(|mut choice| {
                    choice.bits[v] = u8::try_from(bits).unwrap_or(u8::MAX);
                    choice.cost += cost;
                    choice
                }));
            }
            choices = pruned(choices);
        }
        Ok(choices)
    }
}

/// All sums of two choices that are worth keeping.
fn joined(a: &[Choice], b: &[Choice]) -> Vec<Choice> {
    let mut sums: Vec<(f64, f64, usize, usize)> = Vec::with_capacity(a.len() * b.len());
    for (i, x) in a.iter().enumerate() {
        sums.extend(b.iter().enumerate().map(|(j, y)| (x.cost + y.cost, x.loss + y.loss, i, j)));
    }
    sums.sort_by(|x, y| order((x.0, x.1), (y.0, y.1)));
    let mut least = f64::INFINITY;
    sums.retain(|(_, loss, ..)| improves(*loss, &mut least));
    let join = |(cost, loss, i, j): (f64, f64, usize, usize)| {
        let bits = a[i].bits.iter().zip(&b[j].bits).map(|(x, y)| x + y).collect();
        Choice { bits, cost, loss }
    };
    sums.into_iter().map(join).collect()
}

fn pruned(mut choices: Vec<Choice>) -> Vec<Choice> {
    choices.sort_by(|x, y| order((x.cost, x.loss), (y.cost, y.loss)));
    let mut least = f64::INFINITY;
    choices.retain(|choice| improves(choice.loss, &mut least));
    choices
}

fn order(x: (f64, f64), y: (f64, f64)) -> Ordering {
    x.0.total_cmp(&y.0).then_with(|| x.1.total_cmp(&y.1))
}

/// Whether an error is less than all before it by more than rounding.
fn improves(loss: f64, least: &mut f64) -> bool {
    let improves = loss < *least * (1.0 - 1e-9);
    if improves {
        *least = loss;
    }
    improves
}

/// Picks a choice for each of several sites so that the sum of errors is small and their
/// size, in bits, is within a budget. `sites` are the ladder of each and its weights; their
/// errors are in one unit.
///
/// Steps between the corners of each ladder's lower hull are taken in the order of what they
/// gain for their bits, as long as they fit: the least error, but for the budget that is left
/// when a step does not fit.
#[allow(clippy::cast_precision_loss)]
pub fn share_out(sites: &[(Vec<Choice>, usize)], budget_bits: f64) -> Vec<usize> {
    let hulls: Vec<Vec<usize>> = sites.iter().map(|(ladder, _)| hull(ladder)).collect();
    let mut steps: Vec<(f64, usize, usize)> = Vec::new();
    let mut left = budget_bits;
    for (site, ((ladder, n_weights), hull)) in sites.iter().zip(&hulls).enumerate() {
        left -= ladder[hull[0]].cost * *n_weights as f64;
        for (step, pair) in hull.windows(2).enumerate() {
            let (from, to) = (&ladder[pair[0]], &ladder[pair[1]]);
            let bits = (to.cost - from.cost) * *n_weights as f64;
            steps.push(((from.loss - to.loss) / bits, site, step));
        }
    }
    // Steps of one site are in their order, since its hull is convex.
    steps.sort_by(|x, y| y.0.total_cmp(&x.0).then_with(|| (x.1, x.2).cmp(&(y.1, y.2))));
    let mut taken = vec![0; sites.len()];
    for (_, site, step) in steps {
        let (ladder, n_weights) = &sites[site];
        let hull = &hulls[site];
        let bits = (ladder[hull[step + 1]].cost - ladder[hull[step]].cost) * *n_weights as f64;
        if taken[site] == step && bits <= left {
            left -= bits;
            taken[site] = step + 1;
        }
    }
    taken.iter().zip(&hulls).map(|(step, hull)| hull[*step]).collect()
}

/// Positions of the corners of a ladder's lower hull.
pub(super) fn hull(ladder: &[Choice]) -> Vec<usize> {
    let mut corners: Vec<usize> = Vec::new();
    for (i, choice) in ladder.iter().enumerate() {
        while let [.., a, b] = corners[..] {
            let (a, b) = (&ladder[a], &ladder[b]);
            let slope = |from: &Choice, to: &Choice| (from.loss - to.loss) / (to.cost - from.cost);
            if slope(a, b) > slope(b, choice) {
                break;
            }
            corners.pop();
        }
        corners.push(i);
    }
    corners
}
