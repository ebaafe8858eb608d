//! Which of a few widths each of many items gets under a budget: a multiple-choice knapsack
//! with a limit on the number of different widths, as "Principled SVD-based Delta Compression via
//! Quantization Error Minimization" (arXiv 2506.11087) chooses the bits of singular vectors.
//!
//! Each set of widths is a problem of its own. Its Lagrangian relaxation, with a price `μ` for a
//! unit of cost instead of the budget, is a sum over items and bounds the loss from below;
//! sets whose bound is not below the best solution are left out. In those that remain, an
//! option that costs more than the gap between bound and solution, beside the best one of its
//! item at the price `μ`, is left out too, and dynamic programming over the items that still
//! have a choice keeps only states that can end below the solution. So what is found is the
//! optimum, although most of the table is never built.

/// A width that items can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Width {
    /// What an item of this width costs, in units of the budget.
    pub cost: u32,
    /// What is paid once if any item has this width.
    pub charge: u64,
}

/// The width of each item.
#[derive(Clone, Debug, PartialEq)]
pub struct Allocation {
    /// 0 for an item that is dropped, `i` for one of width `widths[i − 1]`.
    pub choice: Vec<usize>,
    /// The sum of the losses.
    pub loss: f64,
    /// The sum of the costs, and the charges of the widths that are used.
    pub cost: u64,
}

/// The allocation of least loss whose cost is at most `budget`, with at most `max_widths`
/// different widths; least to rounding of the sums.
///
/// `losses` is `[items, 1 + widths]`, first the loss of an item that is dropped, which costs
/// nothing. There are at most 16 widths, since the time grows with the number of their sets.
/// Where losses fall by about the same factor with each width, 2,000 items take a fraction of
/// a second; where they fall in proportion to the costs, so that no price prefers an option,
/// it takes as long as the whole table of items and costs. The same arguments give the same
/// allocation.
///
/// Panics when the length is not a multiple of `1 + widths`, a loss is NaN or ∞ or there are
/// more widths.
pub fn allocate(losses: &[f64], widths: &[Width], budget: u64, max_widths: usize) -> Allocation {
    let n_options = 1 + widths.len();
    assert!(widths.len() <= 16, "{} widths", widths.len());
    assert_eq!(losses.len() % n_options, 0, "losses of {n_options} options");
    assert!(losses.iter().all(|loss| loss.is_finite()), "a loss is not a number");
    let table = Table { losses, widths };
    let mut best = table.allocation(vec![0; losses.len() / n_options]);
    let mut subsets: Vec<(Relaxed, Subset)> = (1u32..1 << widths.len())
        .filter_map(|set| table.subset(set, budget, max_widths))
        .map(|subset| (table.relax(&subset), subset))
        .collect();
    subsets.sort_by(|a, b| a.0.bound.total_cmp(&b.0.bound));
    for (relaxed, subset) in &subsets {
        if relaxed.bound >= best.loss {
            break;
        }
        let filled = table.allocation(table.filled(relaxed, subset));
        if filled.loss < best.loss {
            best = filled;
        }
        if let Some(choice) = table.improved(relaxed, subset, best.loss) {
            let improved = table.allocation(choice);
            if improved.loss < best.loss {
                best = improved;
            }
        }
    }
    best
}

struct Table<'a> {
    losses: &'a [f64],
    widths: &'a [Width],
}

/// A set of widths.
struct Subset {
    /// Options of an item, the dropped one first: its number, and its cost in the greatest
    /// unit in which all costs are whole numbers.
    options: Vec<(usize, i64)>,
    /// What is left of the budget when their charges are paid, in that unit.
    budget: i64,
}

/// The relaxation of the problem of a [`Subset`] at the best price.
struct Relaxed {
    /// No solution has less loss.
    bound: f64,
    /// The price of a unit of cost.
    price: f64,
    /// The best options at this price or, where there are several, a choice of them that is
    /// within the budget; as numbers of the options of the subset.
    choice: Vec<u8>,
    loss: f64,
    cost: i64,
}

/// Cost and loss of a partial solution, relative to the choice of a [`Relaxed`].
#[derive(Clone, Copy)]
struct State {
    cost: i64,
    loss: f64,
}

/// How a partial solution came about: the number of the one before its last item, and the option
/// of that item.
#[derive(Clone, Copy)]
struct Step {
    parent: u32,
    option: u8,
}

/// An item that has a choice.
struct Free {
    item: usize,
    /// Number, cost and loss of its options, relative to the chosen one.
    options: Vec<(u8, i64, f64)>,
    /// What leaving the chosen option costs at least, at the price.
    leaving: f64,
}

impl Table<'_> {
    /// The losses of the items.
    fn rows(&self) -> std::slice::Chunks<'_, f64> {
        self.losses.chunks(1 + self.widths.len())
    }

    fn allocation(&self, choice: Vec<usize>) -> Allocation {
        let loss = self.rows().zip(&choice).map(|(losses, option)| losses[*option]).sum();
        let costs = choice.iter().filter_map(|option| self.widths.get(option.checked_sub(1)?));
        let items: u64 = costs.map(|width| u64::from(width.cost)).sum();
        let used = (1..).zip(self.widths).filter(|(option, _)| choice.contains(option));
        let charges: u64 = used.map(|(_, width)| width.charge).sum();
        Allocation { choice, loss, cost: items + charges }
    }

    /// The problem with exactly these widths; `None` where it cannot be solved or another
    /// set is at least as good.
    fn subset(&self, set: u32, budget: u64, max_widths: usize) -> Option<Subset> {
        let has = |option: &usize| set >> option & 1 == 1;
        let all = || 0..self.widths.len();
        let n_used = all().filter(has).count();
        let free = all().filter(|option| !has(option)).any(|i| self.widths[i].charge == 0);
        if n_used > max_widths || (n_used < max_widths && free) {
            return None;
        }
        let charges =
            all().filter(has).try_fold(0u64, |sum, i| sum.checked_add(self.widths[i].charge))?;
        // No allocation costs more.
        let left = i64::try_from(budget.checked_sub(charges)?).unwrap_or(i64::MAX / 2);
        let costs = || all().filter(has).map(|i| (1 + i, i64::from(self.widths[i].cost)));
        // A budget in larger units leaves less that nothing can be bought for.
        let unit = costs().fold(0, |unit, (_, cost)| greatest_divisor(unit, cost)).max(1);
        let options = costs().map(|(option, cost)| (option, cost / unit));
        let options = std::iter::once((0, 0)).chain(options).collect();
        Some(Subset { options, budget: left / unit })
    }

    /// The best choice at a price; of options alike, that of the least cost.
    fn priced(&self, subset: &Subset, price: f64) -> Relaxed {
        let (mut loss, mut cost) = (0.0, 0);
        let choice = self.rows().map(|losses| {
            let priced = |(option, cost): (usize, i64)| losses[option] + price * float(cost);
            let mut best = (0, losses[0], 0, losses[0]);
            for (at, option) in (0u8..).zip(&subset.options).skip(1) {
                let value = priced(*option);
                if value < best.1 || (value == best.1 && option.1 < best.2) {
                    best = (at, value, option.1, losses[option.0]);
                }
            }
            cost += best.2;
            loss += best.3;
            best.0
        });
        let choice = choice.collect();
        let bound = loss + price * float(cost - subset.budget);
        Relaxed { bound, price, choice, loss, cost }
    }

    /// Finds the price with the greatest bound: the line through a choice above the budget and
    /// one below it gives a price at which both are worth the same, and either nothing is
    /// better there or what is takes the place of one of them.
    fn relax(&self, subset: &Subset) -> Relaxed {
        let mut above = self.priced(subset, 0.0);
        if above.cost <= subset.budget {
            return above;
        }
        // The best choice of those that cost nothing, at which a high enough price ends.
        let free = |losses: &[f64]| {
            let mut best = (0, losses[0]);
            for (at, (option, cost)) in (0u8..).zip(&subset.options) {
                if *cost == 0 && losses[*option] < best.1 {
                    best = (at, losses[*option]);
                }
            }
            best
        };
        let (choice, losses): (Vec<u8>, Vec<f64>) = self.rows().map(free).unzip();
        let loss = losses.iter().sum();
        let mut below = Relaxed { bound: f64::NEG_INFINITY, price: 0.0, choice, loss, cost: 0 };
        loop {
            let price = (below.loss - above.loss) / float(above.cost - below.cost);
            let found = self.priced(subset, price.max(0.0));
            let (bound, price) = (found.bound, found.price);
            // Neither of the two where nothing else is better, to rounding.
            let between = found.cost > below.cost && found.cost < above.cost;
            let worth = below.loss + price * float(below.cost - subset.budget);
            if !between || bound >= worth {
                return Relaxed { bound, price, ..below };
            }
            if found.cost <= subset.budget {
                below = found;
            } else {
                above = found;
            }
        }
    }

    /// The choice of a relaxation, and with what it leaves of the budget wider options, those
    /// first that lose most less for their cost.
    fn filled(&self, relaxed: &Relaxed, subset: &Subset) -> Vec<usize> {
        let mut choice = relaxed.choice.clone();
        let mut left = subset.budget - relaxed.cost;
        let mut wider = Vec::new();
        for (item, (losses, chosen)) in self.rows().zip(&choice).enumerate() {
            let (option, cost) = subset.options[usize::from(*chosen)];
            for (at, (other, other_cost)) in (0u8..).zip(&subset.options) {
                let gain = losses[option] - losses[*other];
                if *other_cost > cost && gain > 0.0 {
                    wider.push((gain / float(other_cost - cost), item, at));
                }
            }
        }
        wider.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)).then(a.2.cmp(&b.2)));
        for (_, item, at) in wider {
            let (option, cost) = subset.options[usize::from(choice[item])];
            let (other, other_cost) = subset.options[usize::from(at)];
            let losses = &self.losses[item * (1 + self.widths.len())..];
            if other_cost - cost <= left && losses[other] < losses[option] {
                left -= other_cost - cost;
                choice[item] = at;
            }
        }
        choice.into_iter().map(|at| subset.options[usize::from(at)].0).collect()
    }

    /// The best choice if its loss is less than `least`.
    fn improved(&self, relaxed: &Relaxed, subset: &Subset, least: f64) -> Option<Vec<usize>> {
        let gap = least - relaxed.bound;
        let price = relaxed.price;
        let mut free = Vec::new();
        for (item, (losses, chosen)) in self.rows().zip(&relaxed.choice).enumerate() {
            let (option, cost) = subset.options[usize::from(*chosen)];
            let mut options = vec![(*chosen, 0, 0.0)];
            let mut leaving = f64::INFINITY;
            for (at, (other, other_cost)) in (0u8..).zip(&subset.options) {
                let more = (other_cost - cost, losses[*other] - losses[option]);
                let priced = more.1 + price * float(more.0);
                if at != *chosen && priced < gap {
                    options.push((at, more.0, more.1));
                    leaving = leaving.min(priced);
                }
            }
            if options.len() > 1 {
                free.push(Free { item, options, leaving });
            }
        }
        // Where leaving the choice costs much, few states are left; where it costs little, the
        // budget is nearly spent.
        free.sort_by(|a, b| b.leaving.total_cmp(&a.leaving).then(a.item.cmp(&b.item)));
        let (last, steps) =
            states(&free, subset.budget - relaxed.cost, price, least - relaxed.loss);
        // Losses of states fall as their costs rise.
        let mut at = last.len().checked_sub(1)?;
        let mut choice = relaxed.choice.clone();
        for (free, steps) in free.iter().zip(&steps).rev() {
            choice[free.item] = steps[at].option;
            at = steps[at].parent as usize;
        }
        Some(choice.into_iter().map(|at| subset.options[usize::from(at)].0).collect())
    }
}

/// The states after the last item, by rising cost and falling loss, and the steps to those after
/// each: all that no other dominates and that can end within the `budget` at a loss below
/// `least`.
fn states(free: &[Free], budget: i64, price: f64, least: f64) -> (Vec<State>, Vec<Vec<Step>>) {
    // What the items that follow can add to the cost, at least and at most.
    let mut following = vec![(0, 0)];
    for free in free.iter().rev() {
        let (min, max) = following[following.len() - 1];
        let costs = || free.options.iter().map(|option| option.1);
        following.push((min + costs().fold(0, i64::min), max + costs().fold(0, i64::max)));
    }
    following.pop();
    let mut before = vec![State { cost: 0, loss: 0.0 }];
    let mut all_steps = Vec::with_capacity(free.len());
    for (free, (min, max)) in free.iter().zip(following.into_iter().rev()) {
        let mut after: Vec<State> = Vec::with_capacity(before.len() + 1);
        let mut steps = Vec::with_capacity(before.len() + 1);
        let mut heads = vec![0; free.options.len()];
        // The next state in the order of costs, over all options.
        let next = |heads: &[usize]| {
            let states = heads.iter().zip(&free.options).enumerate();
            let states = states
                .filter_map(|(i, (head, option))| Some((before.get(*head)?.cost + option.1, i)));
            states.min()
        };
        while let Some((cost, i)) = next(&heads) {
            let (option, _, more) = free.options[i];
            let (parent, head) = (heads[i], &mut heads[i]);
            *head += 1;
            let loss = before[parent].loss + more;
            // A unit of cost takes at most its price from the loss.
            let reachable = loss - price * float((budget - cost).min(max));
            let last = after.last().copied();
            if cost + min > budget
                || reachable >= least
                || last.is_some_and(|last| last.loss <= loss)
            {
                continue;
            }
            if last.is_some_and(|last| last.cost == cost) {
                after.pop();
                steps.pop();
            }
            after.push(State { cost, loss });
            #[allow(clippy::cast_possible_truncation)]
            steps.push(Step { parent: parent as u32, option });
        }
        before = after;
        all_steps.push(steps);
    }
    (before, all_steps)
}

/// The greatest common divisor; that of 0 and a number is the number.
fn greatest_divisor(a: i64, b: i64) -> i64 {
    if b == 0 { a } else { greatest_divisor(b, a % b) }
}

#[allow(clippy::cast_precision_loss)]
fn float(cost: i64) -> f64 {
    cost as f64
}
