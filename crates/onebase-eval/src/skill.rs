use onebase_tensor::stream;
use rand::RngExt;

/// Draws of the bootstrap.
const N_RESAMPLES: usize = 2000;

/// Questions that are drawn from besides those asked.
const PSEUDO_QUESTIONS: f64 = 2.0;

/// How much of a skill was kept.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Skill {
    /// `(compressed - base) / (finetune - base)`.
    pub(crate) kept: f64,
    /// Its 95 % interval; absent where the fine-tune's lead over the base is too
    /// uncertain to divide by.
    pub(crate) interval: Option<[f64; 2]>,
}

/// The skill kept on a task, from which questions base, fine-tune and compressed
/// answered right; `None` where the fine-tune is no better than the base, since
/// there is no skill to keep then.
///
/// The interval is the percentile bootstrap over the questions, all three being
/// resampled together because they answer the same ones (B. Efron and R.
/// Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13). Two more
/// questions are drawn from, shared out over all outcomes: without them a task on which
/// nothing differs would leave no doubt at all (A. Agresti and Y. Min, "Simple improved
/// confidence intervals for comparing matched proportions", Statistics in Medicine 24,
/// 2005). Draws are those of the stream of `seed` and `label`. Resamples in which the
/// fine-tune does not lead count as the worst or the best there can be.
pub(crate) fn skill_kept(
    base: &[bool],
    finetune: &[bool],
    compressed: &[bool],
    seed: u64,
    label: &str,
) -> Option<Skill> {
    let n = base.len();
    assert_eq!([finetune.len(), compressed.len()], [n, n], "answers to the same questions");
    // Questions by outcome, a bit each for base, fine-tune and compressed.
    let mut outcomes = [0usize; 8];
    for ((base, finetune), compressed) in base.iter().zip(finetune).zip(compressed) {
        let bits = [base, finetune, compressed].map(|right| usize::from(*right));
        outcomes[bits[0] | bits[1] << 1 | bits[2] << 2] += 1;
    }
    let kept = ratio(&outcomes)?;
    let mut ends = [0.0; 8];
    let mut end = 0.0;
    for (out, count) in ends.iter_mut().zip(outcomes) {
        #[allow(clippy::cast_precision_loss)]
        let weight = count as f64 + PSEUDO_QUESTIONS / 8.0;
        end += weight;
        *out = end;
    }
    let mut rng = stream(seed, label, 0);
    let (mut low_side, mut high_side) = (Vec::new(), Vec::new());
    for _ in 0..N_RESAMPLES {
        let mut drawn = [0; 8];
        for _ in 0..n {
            let at = rng.random::<f64>() * end;
            drawn[ends.iter().take(7).filter(|end| **end <= at).count()] += 1;
        }
        let drawn = ratio(&drawn);
        low_side.push(drawn.unwrap_or(f64::NEG_INFINITY));
        high_side.push(drawn.unwrap_or(f64::INFINITY));
    }
    low_side.sort_by(f64::total_cmp);
    high_side.sort_by(f64::total_cmp);
    let tail = N_RESAMPLES / 40;
    let interval = [low_side[tail].min(kept), high_side[N_RESAMPLES - 1 - tail].max(kept)];
    let interval = interval.iter().all(|end| end.is_finite()).then_some(interval);
    Some(Skill { kept, interval })
}

/// `(compressed - base) / (finetune - base)` of questions by outcome.
fn ratio(outcomes: &[usize; 8]) -> Option<f64> {
    let right = |bit: usize| -> usize {
        let with = outcomes.iter().enumerate().filter(|(outcome, _)| outcome & bit != 0);
        with.map(|(_, count)| count).sum()
    };
    #[allow(clippy::cast_precision_loss)]
    let [base, finetune, compressed] = [1, 2, 4].map(|bit| right(bit) as f64);
    (finetune > base).then(|| (compressed - base) / (finetune - base))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn first(n_right: usize, n: usize) -> Vec<bool> {
        (0..n).map(|i| i < n_right).collect()
    }

    #[test]
    fn the_share_between_base_and_fine_tune() {
        let kept = |b, f, c| {
            skill_kept(&first(b, 100), &first(f, 100), &first(c, 100), 0, "t").map(|s| s.kept)
        };
        assert_eq!(kept(0, 80, 80), Some(1.0));
        assert_eq!(kept(20, 80, 50), Some(0.5));
        assert_eq!(kept(20, 80, 20), Some(0.0));
        assert_eq!(kept(20, 80, 5), Some(-0.25));
        assert_eq!(kept(20, 80, 100), Some(80.0 / 60.0));
        assert_eq!(kept(20, 20, 20), None);
        assert_eq!(kept(20, 10, 15), None);
    }

    #[test]
    fn the_interval_holds_the_value_and_depends_on_the_seed_alone() {
        let draw = |seed| {
            skill_kept(&first(0, 200), &first(174, 200), &first(150, 200), seed, "math").unwrap()
        };
        let skill = draw(7);
        let [low, high] = skill.interval.unwrap();
        assert!(low < skill.kept && skill.kept < high, "{skill:?}");
        // Of 174 that could be kept, 150 were: the share's standard error is .0262.
        assert!((skill.kept - 150.0 / 174.0).abs() < 1e-12);
        let half_width = (high - low) / 2.0;
        assert!((half_width - 1.96 * 0.0262).abs() < 0.008, "{half_width}");
        assert_eq!(draw(7), skill);
        assert_ne!(draw(8), skill);
    }

    #[test]
    fn where_nothing_differs_some_doubt_is_left() {
        for (n, least, most) in [(5, 0.0, 0.9), (50, 0.9, 0.99), (200, 0.97, 0.995)] {
            let all = first(n, n);
            let skill = skill_kept(&first(0, n), &all, &all, 0, "t").unwrap();
            let [low, high] = skill.interval.unwrap();
            assert_eq!(skill.kept, 1.0);
            assert!((least..most).contains(&low) && high >= 1.0, "{n}: {low} {high}");
        }
    }

    /// Of a skill kept to 98 %, nineteen of twenty intervals hold it.
    #[test]
    fn intervals_hold_the_truth_as_often_as_they_say() {
        for (n, truth) in [(200, 0.98), (100, 0.5), (60, 0.9)] {
            let mut rng = stream(11, "coverage", n as u64);
            let n_held = (0..200)
                .filter(|seed| {
                    let compressed: Vec<bool> =
                        (0..n).map(|_| rng.random::<f64>() < truth).collect();
                    let (base, finetune) = (first(0, n), first(n, n));
                    let skill = skill_kept(&base, &finetune, &compressed, *seed, "t").unwrap();
                    let [low, high] = skill.interval.unwrap();
                    low <= truth && truth <= high
                })
                .count();
            assert!(n_held >= 180, "{n}, {truth}: {n_held} of 200");
        }
    }

    #[test]
    fn a_lead_of_one_question_gives_no_interval() {
        let skill = skill_kept(&first(10, 40), &first(11, 40), &first(11, 40), 0, "t").unwrap();
        assert_eq!((skill.kept, skill.interval), (1.0, None));
    }
}
