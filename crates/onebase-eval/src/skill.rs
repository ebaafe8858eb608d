use onebase_tensor::stream;
use rand::RngExt;

/// Draws of the bootstrap.
const N_RESAMPLES: usize = 2000;

/// How much of a skill was kept.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Skill {
    /// `(compressed - base) / (finetune - base)`.
    pub kept: f64,
    /// Its 95 % interval; absent where the fine-tune's lead over the base is too
    /// uncertain to divide by.
    pub interval: Option<[f64; 2]>,
}

/// The skill kept on a test, from which questions base, fine-tune and compressed
/// answered right; `None` where the fine-tune is no better than the base, since
/// there is no skill to keep then.
///
/// The interval is the percentile bootstrap over the questions, all three being
/// resampled together because they answer the same ones (B. Efron and R.
/// Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13). Its draws are
/// those of the stream of `seed` and `label`. Resamples in which the fine-tune does
/// not lead count as the worst or the best there can be.
pub fn skill_kept(
    base: &[bool],
    finetune: &[bool],
    compressed: &[bool],
    seed: u64,
    label: &str,
) -> Option<Skill> {
    let n = base.len();
    assert_eq!([finetune.len(), compressed.len()], [n, n], "answers to the same questions");
    let count = |right: &[bool]| right.iter().filter(|r| **r).count();
    let kept = ratio([count(base), count(finetune), count(compressed)])?;
    let mut rng = stream(seed, label, 0);
    let mut low_side = Vec::with_capacity(N_RESAMPLES);
    let mut high_side = Vec::with_capacity(N_RESAMPLES);
    for _ in 0..N_RESAMPLES {
        let mut counts = [0; 3];
        for _ in 0..n {
            let i = rng.random_range(0..n);
            let answers = [base[i], finetune[i], compressed[i]];
            counts.iter_mut().zip(answers).for_each(|(count, right)| *count += usize::from(right));
        }
        let drawn = ratio(counts);
        low_side.push(drawn.unwrap_or(f64::NEG_INFINITY));
        high_side.push(drawn.unwrap_or(f64::INFINITY));
    }
    low_side.sort_by(f64::total_cmp);
    high_side.sort_by(f64::total_cmp);
    let tail = N_RESAMPLES / 40;
    let interval = [low_side[tail], high_side[N_RESAMPLES - 1 - tail]];
    let interval = interval.iter().all(|end| end.is_finite()).then_some(interval);
    Some(Skill { kept, interval })
}

/// `(compressed - base) / (finetune - base)` of counts in that order: base,
/// fine-tune, compressed.
fn ratio([base, finetune, compressed]: [usize; 3]) -> Option<f64> {
    #[allow(clippy::cast_precision_loss)]
    let [base, finetune, compressed] = [base, finetune, compressed].map(|n| n as f64);
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
    fn all_right_leaves_no_doubt() {
        let skill = skill_kept(&first(0, 50), &first(50, 50), &first(50, 50), 0, "t").unwrap();
        assert_eq!(skill.interval, Some([1.0, 1.0]));
    }

    #[test]
    fn a_lead_of_one_question_gives_no_interval() {
        let skill = skill_kept(&first(10, 40), &first(11, 40), &first(11, 40), 0, "t").unwrap();
        assert_eq!((skill.kept, skill.interval), (1.0, None));
    }
}
