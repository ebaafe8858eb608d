use super::plan::{Choice, Costs, hull, ladder, predict};
use super::{Gram, Tree};
use crate::Result;

/// How much worse than alone a model may be expected to be in a group, relatively.
const TOLERANCE: f64 = 1e-3;

/// The nodes of a tree whose models share codes with each other and with nobody else, if
/// each group has `bits_per_model` bits per weight for each of its models: the partition
/// with the least expected error, none of whose models is worse off than alone.
///
/// A group spends what it saves on itself, so that a model among strangers is stored as it
/// would be alone. The positions are ascending.
///
/// # Errors
/// When a decomposition does not converge.
pub fn groups(tree: &Tree, gram: &Gram, costs: &Costs, bits_per_model: f64) -> Result<Vec<usize>> {
    let finder = Finder { tree, gram, costs, bits_per_model };
    let alone = tree.leaves().map(|v| finder.losses(v)).collect::<Result<Vec<_>>>()?;
    let alone: Vec<f64> = alone.into_iter().flat_map(|(losses, _)| losses).collect();
    let (_, mut groups) = finder.best(tree.root(), &alone)?;
    groups.sort_unstable();
    Ok(groups)
}

struct Finder<'a> {
    tree: &'a Tree,
    gram: &'a Gram,
    costs: &'a Costs,
    bits_per_model: f64,
}

impl Finder<'_> {
    /// The least expected error of the models below a node, and the groups that have it.
    fn best(&self, v: usize, alone: &[f64]) -> Result<(f64, Vec<usize>)> {
        let node = &self.tree.nodes()[v];
        let Some(children) = node.children else {
            return Ok((alone[node.members[0]], vec![v]));
        };
        let [a, b] = children.map(|child| self.best(child, alone));
        let ((a_loss, mut groups), (b_loss, more)) = (a?, b?);
        groups.extend(more);
        let (together, is_coded) = self.losses(v)?;
        let total: f64 = together.iter().sum();
        let nobody_loses = node
            .members
            .iter()
            .zip(&together)
            .all(|(member, loss)| *loss <= alone[*member] * (1.0 + TOLERANCE));
        // Without codes that all have, its parts would merely pay for each other.
        if is_coded && nobody_loses && total < (a_loss + b_loss) * (1.0 - TOLERANCE) {
            return Ok((total, vec![v]));
        }
        Ok((a_loss + b_loss, groups))
    }

    /// The expected error of each model below a node that is a group: at its budget, between
    /// the corners of the ladder's hull next to it. And whether the node itself has codes there.
    #[allow(clippy::cast_precision_loss)]
    fn losses(&self, v: usize) -> Result<(Vec<f64>, bool)> {
        let members = &self.tree.nodes()[v].members;
        let ladder = ladder(self.tree, v, self.gram, self.costs)?;
        let corners = hull(&ladder);
        let budget = self.bits_per_model * members.len() as f64;
        let above = corners.iter().position(|i| ladder[*i].cost > budget);
        let above = above.unwrap_or(corners.len());
        let low = &ladder[corners[above.saturating_sub(1)]];
        let high = corners.get(above).map_or(low, |i| &ladder[*i]);
        let span = high.cost - low.cost;
        let part = if span > 0.0 { ((budget - low.cost) / span).clamp(0.0, 1.0) } else { 0.0 };
        let of = |choice: &Choice| -> Result<Vec<f64>> {
            let all = predict(self.tree, &choice.bits, self.gram, self.costs)?;
            Ok(members.iter().map(|member| all[*member]).collect())
        };
        let is_coded = low.bits[v] > 0 && high.bits[v] > 0;
        let (low, high) = (of(low)?, of(high)?);
        Ok((low.iter().zip(&high).map(|(low, high)| low + part * (high - low)).collect(), is_coded))
    }
}
