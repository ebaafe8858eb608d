//! Allocations against all that there are and against a program for integer problems.

use microlp::{ComparisonOp, LinearExpr, OptimizationDirection, Problem};
use onebase_codec::numerics::{Allocation, Width, allocate};
use onebase_tensor::stream;
use proptest::prelude::*;
use rand_distr::{Distribution, StandardNormal};

/// Loss, cost and number of widths of a choice.
fn worth(losses: &[f64], widths: &[Width], choice: &[usize]) -> (f64, u64, usize) {
    let (mut loss, mut cost) = (0.0, 0);
    for (item, option) in choice.iter().enumerate() {
        loss += losses[item * (1 + widths.len()) + option];
        cost += if *option > 0 { u64::from(widths[option - 1].cost) } else { 0 };
    }
    let used: Vec<usize> = (1..=widths.len()).filter(|option| choice.contains(option)).collect();
    (loss, cost + used.iter().map(|option| widths[option - 1].charge).sum::<u64>(), used.len())
}

/// Checks what an allocation says of itself and that it keeps to the limits.
fn check(got: &Allocation, losses: &[f64], widths: &[Width], budget: u64, max_widths: usize) {
    let (loss, cost, used) = worth(losses, widths, &got.choice);
    assert_eq!(got.choice.len(), losses.len() / (1 + widths.len()));
    assert!((loss - got.loss).abs() <= 1e-12 * loss.abs() && cost == got.cost);
    assert!(cost <= budget && used <= max_widths, "{cost} of {budget}, {used} of {max_widths}");
}

/// The least loss of all choices.
fn by_trying_all(losses: &[f64], widths: &[Width], budget: u64, max_widths: usize) -> f64 {
    let n_options = 1 + widths.len();
    let k = losses.len() / n_options;
    let mut choice = vec![0; k];
    let mut least = f64::INFINITY;
    loop {
        let (loss, cost, used) = worth(losses, widths, &choice);
        if cost <= budget && used <= max_widths {
            least = least.min(loss);
        }
        let Some(item) = choice.iter().position(|option| *option + 1 < n_options) else {
            return least;
        };
        choice[..item].fill(0);
        choice[item] += 1;
    }
}

/// Losses as of singular vectors: squares that fall like a power, and about 0.15 to 0.25 times as
/// much for each bit, not quite alike for each.
fn spectrum(k: usize, bits: &[u32], decay: f64) -> Vec<f64> {
    let mut rng = stream(3, "spectrum", k as u64);
    let mut out = Vec::new();
    for rank in 1u32..=u32::try_from(k).unwrap() {
        let size = f64::from(rank).powf(-2.0 * decay);
        out.push(size / 2.0);
        for bits in bits {
            let noise: f64 = StandardNormal.sample(&mut rng);
            out.push(size * 1.4 * 0.22f64.powi(bits.cast_signed()) * (0.1 * noise).exp());
        }
    }
    out
}

fn of_bits(bits: &[u32], charge: u64) -> Vec<Width> {
    bits.iter().map(|bits| Width { cost: *bits, charge }).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(1500) })]

    #[test]
    fn nothing_loses_less(
        (widths, losses) in (0..5usize, 0..6usize).prop_flat_map(|(n_widths, k)| (
            prop::collection::vec((0..8u32, 0..6u64), n_widths),
            prop::collection::vec(prop_oneof![0.0..1.0f64, (0..4u8).prop_map(f64::from)], k * (n_widths + 1)),
        )),
        budget in 0..40u64,
        max_widths in 0..5usize,
    ) {
        let widths: Vec<Width> =
            widths.into_iter().map(|(cost, charge)| Width { cost, charge: charge.saturating_sub(2) }).collect();
        let got = allocate(&losses, &widths, budget, max_widths);
        check(&got, &losses, &widths, budget, max_widths);
        let least = by_trying_all(&losses, &widths, budget, max_widths);
        prop_assert!((got.loss - least).abs() < 1e-12, "{} {}", got.loss, least);
    }

    #[test]
    fn nothing_loses_less_of_what_falls_with_the_bits(
        budget in 0..60u64,
        k in 1..=6usize,
        decay in 0.0..2.0f64,
        charge in 0..6u64,
        max_widths in 1..4usize,
    ) {
        let bits = [2, 3, 4, 8];
        let (losses, widths) = (spectrum(k, &bits, decay), of_bits(&bits, charge));
        let got = allocate(&losses, &widths, budget, max_widths);
        check(&got, &losses, &widths, budget, max_widths);
        let least = by_trying_all(&losses, &widths, budget, max_widths);
        prop_assert!((got.loss - least).abs() < 1e-12, "{} {}", got.loss, least);
    }
}

/// The integer program: which option an item has, and which widths are used.
fn by_integer_program(losses: &[f64], widths: &[Width], budget: u64, max_widths: usize) -> f64 {
    let n_options = 1 + widths.len();
    let mut problem = Problem::new(OptimizationDirection::Minimize);
    let used: Vec<_> = widths.iter().map(|_| problem.add_binary_var(0.0)).collect();
    let (mut cost, mut n_used) = (LinearExpr::empty(), LinearExpr::empty());
    for (width, used) in widths.iter().zip(&used) {
        #[allow(clippy::cast_precision_loss)]
        cost.add(*used, width.charge as f64);
        n_used.add(*used, 1.0);
    }
    for losses in losses.chunks(n_options) {
        let mut one = LinearExpr::empty();
        for (option, loss) in losses.iter().enumerate() {
            let chosen = problem.add_binary_var(*loss);
            one.add(chosen, 1.0);
            if option > 0 {
                cost.add(chosen, f64::from(widths[option - 1].cost));
                let within = [(chosen, 1.0), (used[option - 1], -1.0)];
                problem.add_constraint(within, ComparisonOp::Le, 0.0);
            }
        }
        problem.add_constraint(one, ComparisonOp::Eq, 1.0);
    }
    #[allow(clippy::cast_precision_loss)]
    problem.add_constraint(cost, ComparisonOp::Le, budget as f64);
    #[allow(clippy::cast_precision_loss)]
    problem.add_constraint(n_used, ComparisonOp::Le, max_widths as f64);
    let outcome = problem.solve().unwrap();
    assert!(outcome.is_optimal());
    outcome.solution().unwrap().objective()
}

#[test]
fn an_integer_program_has_the_same_optimum() {
    let bits = [1, 2, 3, 4, 5, 6, 7, 8];
    for decay in [0.5, 0.8] {
        let losses = spectrum(256, &bits, decay);
        for (budget, max_widths, charge) in
            [(128, 8, 0), (129, 3, 0), (500, 3, 7), (300, 2, 7), (128, 3, 7), (300, 4, 20)]
        {
            let widths = of_bits(&bits, charge);
            let got = allocate(&losses, &widths, budget, max_widths);
            check(&got, &losses, &widths, budget, max_widths);
            let want = by_integer_program(&losses, &widths, budget, max_widths);
            assert!((got.loss / want - 1.0).abs() < 1e-9, "{decay} {max_widths}: {got:?} {want}");
        }
    }
}

#[test]
fn many_ranks_with_any_costs_are_allocated() {
    let k = 1500u32;
    let bits = [1, 2, 3, 4, 5, 6, 7, 8];
    for decay in [0.0, 0.5, 1.0] {
        let losses = spectrum(k as usize, &bits, decay);
        for (unit, more, charge) in [(1, 0, 0), (5, 1, 70), (173, 29, 7000)] {
            let widths = bits.map(|bits| Width { cost: unit * bits + more, charge });
            for half_bits in [1, 2, 5] {
                let budget = u64::from(unit * k * half_bits / 2);
                let got = allocate(&losses, &widths, budget, 3);
                check(&got, &losses, &widths, budget, 3);
                assert!(got.cost + u64::from(2 * unit) > budget, "{} of {budget}", got.cost);
                assert!(got == allocate(&losses, &widths, budget, 3));
            }
        }
    }
}

#[test]
fn ranks_that_are_all_alike_are_allocated() {
    let bits = [1, 2, 3, 4, 5, 6, 7, 8];
    let alike: Vec<f64> = (0..2000 * 9).map(|at| 0.2f64.powi(at % 9)).collect();
    let linear: Vec<f64> = (0..200 * 9).map(|at| f64::from(9 - at % 9)).collect();
    for (losses, budget) in [(alike, 9001), (linear, 901)] {
        for (unit, more) in [(1, 0), (6, 0), (1200, 173)] {
            let widths = bits.map(|bits| Width { cost: unit * bits + more, charge: 0 });
            let budget = u64::from(unit) * budget;
            check(&allocate(&losses, &widths, budget, 3), &losses, &widths, budget, 3);
        }
    }
}

#[test]
fn widths_that_nothing_can_pay_are_not_used() {
    let (losses, widths) = (spectrum(9, &[2, 4], 0.5), of_bits(&[2, 4], 10));
    for (budget, max_widths) in [(0, 2), (11, 2), (1000, 0)] {
        assert_eq!(allocate(&losses, &widths, budget, max_widths).choice, [0; 9]);
    }
    let huge = [Width { cost: u32::MAX, charge: u64::MAX }, Width { cost: u32::MAX, charge: 1 }];
    let got = allocate(&losses, &huge, u64::MAX, 2);
    check(&got, &losses, &huge, u64::MAX, 2);
    assert!(!got.choice.contains(&0));
    assert_eq!(allocate(&losses, &widths, u64::MAX, 2).choice, [2; 9]);
    assert_eq!(allocate(&[], &widths, 5, 2).choice, [0; 0]);
    assert_eq!(allocate(&[1.0, 2.0], &[], 5, 2).choice, [0; 2]);
}
