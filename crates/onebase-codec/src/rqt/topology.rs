use std::ops::Range;

use super::Gram;
use crate::Result;
use crate::numerics::symmetric_eigen;

/// A binary tree over the models of a family: first one node for each model, then those
/// that join two, the last of which is the root.
#[derive(Clone, Debug, PartialEq)]
pub struct Tree {
    nodes: Vec<TreeNode>,
}

/// A node of a [`Tree`].
#[derive(Clone, Debug, PartialEq)]
pub struct TreeNode {
    /// The models below it, ascending.
    pub members: Vec<usize>,
    /// The nodes that it joins; `None` of a model's own.
    pub children: Option<[usize; 2]>,
    /// What joining its members costs: the energy that one common direction with a gain for
    /// each model leaves over, in units of the Gram matrix.
    pub height: f64,
}

impl Tree {
    /// Joins models that are alike first: agglomeration by Ward's criterion, with a gain for
    /// each model in place of the mean.
    ///
    /// With gains, the best that models have in common has the energy of the largest
    /// eigenvalue `λ` of their Gram matrix, so a set costs `tr G − λ`, and the two are joined
    /// whose union costs the least more than themselves. For models of one amplitude with a
    /// common part this is Ward's cost; models that differ in amplitude or sign alone cost
    /// nothing. Of equals, those with the smallest positions are joined.
    ///
    /// # Errors
    /// When a decomposition does not converge.
    pub fn of(gram: &Gram) -> Result<Self> {
        let n = gram.n();
        let leaf = |i| TreeNode { members: vec![i], children: None, height: 0.0 };
        let mut nodes: Vec<TreeNode> = (0..n).map(leaf).collect();
        // Costs of unions of nodes that have no parent yet.
        let mut open: Vec<usize> = (0..n).collect();
        let mut pairs: Vec<(usize, usize, TreeNode)> = Vec::new();
        let union = |nodes: &[TreeNode], a: usize, b: usize| -> Result<TreeNode> {
            let mut members = [&nodes[a].members[..], &nodes[b].members[..]].concat();
            members.sort_unstable();
            let (lambda, _) = top_eigenpair(&gram.of_members(&members))?;
            let height = (gram.of_members(&members).trace() - lambda).max(0.0);
            Ok(TreeNode { members, children: Some([a, b]), height })
        };
        for i in 0..n {
            for j in i + 1..n {
                pairs.push((i, j, union(&nodes, i, j)?));
            }
        }
        while open.len() > 1 {
            let cost = |(a, b, union): &(usize, usize, TreeNode)| {
                union.height - nodes[*a].height - nodes[*b].height
            };
            let order = |x: &(usize, usize, TreeNode), y: &(usize, usize, TreeNode)| {
                let by_members = || x.2.members.cmp(&y.2.members);
                cost(x).total_cmp(&cost(y)).then_with(by_members)
            };
            let Some(best) = pairs.iter().min_by(|x, y| order(x, y)) else {
                unreachable!("two nodes are a pair")
            };
            let (a, b, node) = best.clone();
            let new = nodes.len();
            nodes.push(node);
            open.retain(|v| *v != a && *v != b);
            pairs.retain(|(x, y, _)| ![a, b].contains(x) && ![a, b].contains(y));
            for v in &open {
                pairs.push((*v, new, union(&nodes, *v, new)?));
            }
            open.push(new);
        }
        Ok(Self { nodes })
    }

    /// All nodes, children before their parents.
    pub fn nodes(&self) -> &[TreeNode] {
        &self.nodes
    }

    /// The position of the root.
    ///
    /// Panics when there is no model.
    pub fn root(&self) -> usize {
        self.nodes.len() - 1
    }

    /// The positions of the models' own nodes.
    pub fn leaves(&self) -> Range<usize> {
        0..self.nodes.len().div_ceil(2)
    }

    /// The tree of the models below a node, which are its models in their order.
    pub fn subtree(&self, root: usize) -> Self {
        let models = &self.nodes[root].members;
        let mut kept: Vec<usize> = vec![root];
        let mut next = 0;
        while let Some(v) = kept.get(next).copied() {
            kept.extend(self.nodes[v].children.into_iter().flatten());
            next += 1;
        }
        // Leaves and joined nodes each keep their order.
        kept.sort_unstable();
        let at = |v: usize| kept.binary_search(&v).unwrap_or_default();
        let node = |v: &usize| {
            let TreeNode { members, children, height } = &self.nodes[*v];
            let members = members.iter().filter_map(|m| models.binary_search(m).ok()).collect();
            TreeNode { members, children: children.map(|c| c.map(at)), height: *height }
        };
        Self { nodes: kept.iter().map(node).collect() }
    }
}

/// The largest eigenvalue of a Gram matrix and its eigenvector, of length 1, the
/// element of which that is largest in magnitude is positive.
pub(super) fn top_eigenpair(gram: &Gram) -> Result<(f64, Vec<f64>)> {
    let n = gram.n();
    if n == 1 {
        return Ok((gram.at(0, 0), vec![1.0]));
    }
    let eigen = symmetric_eigen(gram.values(), n)?;
    Ok((eigen.values[0], eigen.vectors[..n].to_vec()))
}
