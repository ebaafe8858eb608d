//! The feed-forward part of a block with experts.

use onebase_kernels::add_assign;
use onebase_tensor::{MatrixRef, WeightRef};

use super::{Pass, gated, matrix, matrix_mut};
use crate::config::Mixture;
use crate::decoder::Mlp;
use crate::linear::{Linear, RowGroup, SiteDelta, apply_all};
use crate::observer::{Observer, SiteInput};
use crate::weights::Inputs;
use crate::{Model, Tenant};

/// A row of the batch and an expert that was chosen for it.
struct Route {
    expert: usize,
    row: usize,
    /// Of the expert's output in the row's.
    weight: f32,
}

/// Of one expert at a time: its rows of the input, and its two activations.
#[derive(Default)]
struct Buffers {
    x: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
}

impl<'a> Pass<'_, 'a> {
    /// Adds to the stream what the experts give that the router chooses for each row.
    ///
    /// The rows of an expert are run together, those of one tenant next to each other.
    /// Each row's outputs are summed in the order of its experts' numbers, so that
    /// they do not depend on the batch.
    pub(super) fn experts(
        &mut self,
        index: usize,
        router: &[f32],
        experts: &[Mlp<Linear>],
        observer: &mut dyn Observer,
    ) {
        let routes = self.routes(index, router);
        let backend = self.model.backend;
        let hidden = self.model.config.hidden_size;
        let width = mixture(self.model, None).expert_size;
        let mut buffers = Buffers::default();
        let mut out = Vec::new();
        self.out.fill(0.0);
        let mut rest = &routes[..];
        for (expert, mlp) in experts.iter().enumerate() {
            let (own, others) = rest.split_at(rest.partition_point(|r| r.expert == expert));
            rest = others;
            let n = own.len();
            self.expert_input(own, &mut buffers);
            observer.observe(index, SiteInput::Expert(expert), rows(&buffers.x, hidden));
            self.expert_gated(index, expert, mlp, own, &mut buffers);
            observer.observe(index, SiteInput::ExpertOutput(expert), rows(&buffers.gate, width));
            if n > 0 {
                out.resize(n * hidden, 0.0);
                let site =
                    |t: &'a Tenant| -> &'a SiteDelta { &t.decoder.layers[index].mlps[expert].down };
                let x = matrix(&buffers.gate, n);
                let down = mlp.down.to(&site, matrix_mut(&mut out, n));
                apply_all(backend, &self.groups_of(own), &Inputs::plain(x), [down]);
                for (route, out) in own.iter().zip(out.chunks_exact_mut(hidden)) {
                    out.iter_mut().for_each(|v| *v *= route.weight);
                    add_assign(&mut self.out[route.row * hidden..(route.row + 1) * hidden], out);
                }
            }
        }
        add_assign(&mut self.stream, &self.out);
    }

    /// Shows one input of the experts, `Expert` or `ExpertOutput`, for the input `x`, and
    /// runs the one expert no further.
    pub(super) fn peek_expert(
        &mut self,
        index: usize,
        router: &[f32],
        experts: &[Mlp<Linear>],
        input: SiteInput,
        observer: &mut dyn Observer,
    ) {
        let (SiteInput::Expert(expert) | SiteInput::ExpertOutput(expert)) = input else { return };
        let Some(mlp) = experts.get(expert) else { return };
        let routes = self.routes(index, router);
        let first = routes.partition_point(|route| route.expert < expert);
        let own = &routes[first..];
        let own = &own[..own.partition_point(|route| route.expert == expert)];
        let mut buffers = Buffers::default();
        self.expert_input(own, &mut buffers);
        if input == SiteInput::Expert(expert) {
            observer.observe(index, input, rows(&buffers.x, self.model.config.hidden_size));
            return;
        }
        self.expert_gated(index, expert, mlp, own, &mut buffers);
        let width = mixture(self.model, None).expert_size;
        observer.observe(index, input, rows(&buffers.gate, width));
    }

    /// Collects the rows of an expert.
    fn expert_input(&self, own: &[Route], buffers: &mut Buffers) {
        let hidden = self.model.config.hidden_size;
        buffers.x.clear();
        for route in own {
            buffers.x.extend_from_slice(&self.x[route.row * hidden..(route.row + 1) * hidden]);
        }
    }

    /// The gated activation of an expert for its rows.
    fn expert_gated(
        &self,
        index: usize,
        expert: usize,
        mlp: &Mlp<Linear>,
        own: &[Route],
        buffers: &mut Buffers,
    ) {
        let (backend, n) = (self.model.backend, own.len());
        let width = mixture(self.model, None).expert_size;
        let Buffers { x, gate, up } = buffers;
        gate.resize(n * width, 0.0);
        if n == 0 {
            return;
        }
        up.resize(n * width, 0.0);
        let groups = self.groups_of(own);
        let site = |t: &'a Tenant| -> &'a Mlp<SiteDelta> { &t.decoder.layers[index].mlps[expert] };
        let x = matrix(x, n);
        apply_all(
            backend,
            &groups,
            &Inputs::plain(x),
            [
                mlp.gate.to(&|t| &site(t).gate, matrix_mut(gate, n)),
                mlp.up.to(&|t| &site(t).up, matrix_mut(up, n)),
            ],
        );
        gated(gate, up);
    }

    /// The experts of every row, by expert and then by row.
    fn routes(&self, index: usize, router: &[f32]) -> Vec<Route> {
        let n_experts = mixture(self.model, None).n_experts;
        let mut routes = Vec::new();
        let mut scores = Vec::new();
        let mut chosen = Vec::new();
        let x = matrix(&self.x, self.batch.rows.len());
        for group in &self.batch.groups {
            // Its own, or the base's where it left that as it is.
            let own = group.tenant.and_then(|t| t.decoder.layers[index].router.as_ref());
            let router = own.and_then(Option::as_deref).unwrap_or(router);
            let mixture = mixture(self.model, group.tenant);
            if group.rows.is_empty() {
                continue;
            }
            scores.clear();
            scores.resize(group.rows.len() * n_experts, 0.0);
            let mut product = matrix_mut(&mut scores, group.rows.len());
            let x = x.rows(group.rows.clone());
            self.model.backend.add_dense(WeightRef::F32(router), x, &mut product);
            for (row, scores) in group.rows.clone().zip(scores.chunks_exact_mut(n_experts)) {
                choose(scores, mixture, &mut chosen);
                let route = |(expert, weight): &(usize, f32)| Route {
                    expert: *expert,
                    row,
                    weight: *weight,
                };
                routes.extend(chosen.iter().map(route));
            }
        }
        // Stable: the rows of an expert stay in the batch's order.
        routes.sort_by_key(|route| route.expert);
        routes
    }

    /// Whose the rows of an expert are.
    fn groups_of(&self, routes: &[Route]) -> Vec<RowGroup<'a>> {
        let mut groups = Vec::new();
        let mut first = 0;
        for RowGroup { rows, tenant } in &self.batch.groups {
            let n = routes[first..].partition_point(|route| route.row < rows.end);
            if n > 0 {
                groups.push(RowGroup { rows: first..first + n, tenant: *tenant });
                first += n;
            }
        }
        groups
    }
}

/// The experts as the base, or a tenant, uses them.
fn mixture<'a>(model: &'a Model, tenant: Option<&'a Tenant>) -> &'a Mixture {
    match &tenant.map_or(&model.config, |t| &t.config).mixture {
        Some(mixture) => mixture,
        None => unreachable!("a layer has a router where the configuration has experts"),
    }
}

/// Replaces `chosen` by the experts with the largest scores and their weights, the
/// largest first; of equal ones, the lower number first.
///
/// `scores`, `[n_experts]`, become probabilities.
fn choose(scores: &mut [f32], mixture: &Mixture, chosen: &mut Vec<(usize, f32)>) {
    let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    scores.iter_mut().for_each(|score| *score = (*score - largest).exp());
    let sum: f32 = scores.iter().sum();
    scores.iter_mut().for_each(|score| *score /= sum);
    chosen.clear();
    chosen.extend(scores.iter().copied().enumerate());
    chosen.sort_unstable_by(|(i, a), (j, b)| b.total_cmp(a).then(i.cmp(j)));
    chosen.truncate(mixture.n_experts_per_token);
    if mixture.normalised {
        let sum: f32 = chosen.iter().map(|(_, weight)| weight).sum();
        chosen.iter_mut().for_each(|(_, weight)| *weight /= sum);
    }
}

/// Rows of a width, which may be none.
fn rows(data: &[f32], width: usize) -> MatrixRef<'_> {
    match MatrixRef::new(data, data.len() / width.max(1), width) {
        Ok(matrix) => matrix,
        Err(_) => unreachable!("buffers hold whole rows"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(scores: &[f32], n_experts_per_token: usize, normalised: bool) -> Vec<(usize, f32)> {
        let n_experts = scores.len();
        let sparse = vec![true];
        let mixture =
            Mixture { n_experts, n_experts_per_token, expert_size: 1, normalised, sparse };
        let mut chosen = vec![(7, 7.0)];
        choose(&mut scores.to_vec(), &mixture, &mut chosen);
        chosen
    }

    #[test]
    fn the_likeliest_experts_are_chosen() {
        let scores = [0.0, 3.0f32.ln(), -1e9, 2.0f32.ln()];
        for (normalised, weights) in [(false, [0.5, 2.0 / 6.0]), (true, [0.6, 0.4])] {
            let got = chosen(&scores, 2, normalised);
            assert_eq!(got.iter().map(|(expert, _)| *expert).collect::<Vec<_>>(), [1, 3]);
            for ((_, weight), expected) in got.iter().zip(weights) {
                assert!((weight - expected).abs() < 1e-6, "{got:?}");
            }
        }
    }

    #[test]
    fn of_equal_experts_the_lower_number_is_chosen() {
        let experts = |scores: &[f32], k| -> Vec<usize> {
            chosen(scores, k, true).into_iter().map(|(expert, _)| expert).collect()
        };
        assert_eq!(experts(&[1.0; 6], 3), [0, 1, 2]);
        assert_eq!(experts(&[0.0, 1.0, 0.0, 1.0, 1.0], 4), [1, 3, 4, 0]);
        assert_eq!(experts(&[5.0], 1), [0]);
    }

    #[test]
    fn scores_that_are_no_numbers_give_no_weights() {
        for scores in [[f32::NAN, 1.0], [f32::INFINITY, 1.0], [f32::NEG_INFINITY; 2]] {
            let got = chosen(&scores, 2, true);
            assert!(got.len() == 2 && got.iter().any(|(_, weight)| weight.is_nan()), "{got:?}");
        }
    }
}
