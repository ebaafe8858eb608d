//! Masks that are drawn and not stored: which weights of a row are kept follows from a key, the
//! block of rows, and the group.
//!
//! The generator is Philox4x32-10 (J. Salmon et al., "Parallel Random Numbers: As Easy as 1, 2,
//! 3", SC 2011): a function of a key and a counter, so that every group of every block is drawn
//! alone. It is written out here, with the published test vectors, because artifacts depend on
//! every bit of it.

/// The number under which parts name the generator and the way numbers become a mask.
pub(crate) const GENERATOR: u8 = 1;

/// Philox4x32-10 of a key, low word first, and a counter.
fn philox(key: u64, counter: [u32; 4]) -> [u32; 4] {
    const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
    const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
    #[allow(clippy::cast_possible_truncation)]
    let halves = |wide: u64| [wide as u32, (wide >> 32) as u32];
    let [mut k0, mut k1] = halves(key);
    let [mut c0, mut c1, mut c2, mut c3] = counter;
    for _ in 0..10 {
        let [low0, high0] = halves(u64::from(MULTIPLIERS[0]) * u64::from(c0));
        let [low1, high1] = halves(u64::from(MULTIPLIERS[1]) * u64::from(c2));
        [c0, c1, c2, c3] = [high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0];
        k0 = k0.wrapping_add(WEYL[0]);
        k1 = k1.wrapping_add(WEYL[1]);
    }
    [c0, c1, c2, c3]
}

/// The numbers of one group of one block.
pub(crate) struct Draws {
    key: u64,
    place: [u32; 3],
    quad: u32,
    left: [u32; 4],
    n_left: usize,
}

impl Draws {
    /// `place` is group, block of rows, and number of the candidate.
    pub(crate) fn new(key: u64, place: [u32; 3]) -> Self {
        Self { key, place, quad: 0, left: [0; 4], n_left: 0 }
    }

    pub(crate) fn next(&mut self) -> u32 {
        if self.n_left == 0 {
            let [group, block, candidate] = self.place;
            self.left = philox(self.key, [self.quad, group, block, candidate]);
            self.quad = self.quad.wrapping_add(1);
            self.n_left = 4;
        }
        self.n_left -= 1;
        self.left[3 - self.n_left]
    }

    /// A number below `n`, which is not 0, each as likely (D. Lemire, "Fast Random Integer
    /// Generation in an Interval", 2019).
    #[allow(clippy::cast_possible_truncation)]
    fn below(&mut self, n: u32) -> u32 {
        loop {
            let wide = u64::from(self.next()) * u64::from(n);
            if wide as u32 >= n.wrapping_neg() % n {
                return (wide >> 32) as u32;
            }
        }
    }
}

/// How many weights of the first so many of a row are kept: `⌊x · kept / of⌋`, so that any share
/// is met, and no count is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Share {
    /// Kept weights.
    pub(crate) kept: u32,
    /// Of so many; not 0.
    pub(crate) of: u32,
}

impl Share {
    /// Kept of the first `x` weights of a row.
    #[allow(clippy::cast_possible_truncation)]
    pub(crate) fn of_first(self, x: usize) -> usize {
        (x as u128 * u128::from(self.kept) / u128::from(self.of.max(1))) as usize
    }
}

/// Masks of a matrix.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Masks {
    /// Of the tensor.
    pub(crate) key: u64,
    /// Input features.
    pub(crate) n_cols: usize,
    /// Input features of a group; the last group of a row may be shorter.
    pub(crate) group_size: usize,
    /// What is kept.
    pub(crate) share: Share,
}

impl Masks {
    /// The weights of each kept weight's group over those of them that are kept, `[n_kept]`.
    #[allow(clippy::cast_precision_loss)]
    pub(crate) fn factors(&self) -> Vec<f64> {
        let firsts = (0..self.n_cols).step_by(self.group_size.max(1));
        let of_group = firsts.flat_map(|first| {
            let end = self.n_cols.min(first + self.group_size.max(1));
            let n_kept = self.share.of_first(end) - self.share.of_first(first);
            std::iter::repeat_n((end - first) as f64 / n_kept.max(1) as f64, n_kept)
        });
        of_group.collect()
    }

    /// Writes the input features that the rows of a block keep, ascending, `[n_kept]`, in place
    /// of what was there.
    #[allow(clippy::cast_possible_truncation)]
    pub(crate) fn columns(&self, block: usize, candidate: u32, columns: &mut Vec<u32>) {
        columns.clear();
        let mut order: Vec<u32> = Vec::new();
        let group_size = self.group_size.max(1);
        for (group, first) in (0..self.n_cols).step_by(group_size).enumerate() {
            let end = self.n_cols.min(first + group_size);
            let n = end - first;
            let n_kept = self.share.of_first(end) - self.share.of_first(first);
            // The smaller of what is kept and what is dropped is drawn.
            let keep = n_kept <= n / 2;
            let n_drawn = if keep { n_kept } else { n - n_kept };
            let mut draws = Draws::new(self.key, [group as u32, block as u32, candidate]);
            order.clear();
            order.extend(0..n as u32);
            for i in 0..n_drawn {
                let at = i + draws.below((n - i) as u32) as usize;
                order.swap(i, at);
            }
            let chosen = if keep { &mut order[..n_drawn] } else { &mut order[n_drawn..] };
            chosen.sort_unstable();
            columns.extend(chosen.iter().map(|at| first as u32 + at));
        }
    }
}

/// A key for a tensor from a seed and some of its weights, so that tensors of one shape do not
/// share their masks. FNV-1a over the bits, and a round of SplitMix64 to spread them.
pub(crate) fn key_of(seed: u64, weights: &[f32]) -> u64 {
    let mut hash = 0xCBF2_9CE4_8422_2325u64;
    let bytes = weights.iter().flat_map(|w| w.to_le_bytes());
    for byte in seed.to_le_bytes().into_iter().chain(bytes) {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01B3);
    }
    let mut z = hash.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers that come with the authors' library Random123.
    #[test]
    fn the_generator_gives_its_published_answers() {
        assert_eq!(philox(0, [0; 4]), [0x6627_E8D5, 0xE169_C58D, 0xBC57_AC4C, 0x9B00_DBD8]);
        let ones = philox(u64::MAX, [u32::MAX; 4]);
        assert_eq!(ones, [0x408F_276D, 0x41C8_3B0E, 0xA20B_C7C6, 0x6D54_51FD]);
        let pi = [0x243F_6A88, 0x85A3_08D3, 0x1319_8A2E, 0x0370_7344];
        let drawn = philox(0x299F_31D0_A409_3822, pi);
        assert_eq!(drawn, [0xD16C_FE09, 0x94FD_CCEB, 0x5001_E420, 0x2412_6EA1]);
    }

    fn columns(masks: Masks, block: usize, candidate: u32) -> Vec<u32> {
        let mut columns = Vec::new();
        masks.columns(block, candidate, &mut columns);
        columns
    }

    /// Artifacts depend on these.
    #[test]
    fn masks_are_frozen() {
        let masks = Masks { key: 7, n_cols: 40, group_size: 16, share: Share { kept: 1, of: 4 } };
        let drawn = [columns(masks, 0, 0), columns(masks, 1, 0), columns(masks, 0, 1)];
        assert_eq!(drawn, FROZEN);
        let dense = Masks { share: Share { kept: 3, of: 4 }, ..masks };
        assert_eq!(columns(dense, 0, 0), FROZEN_DENSE);
        assert_eq!(key_of(3, &[1.0, -0.5]), FROZEN_KEY);
    }

    const FROZEN: [[u32; 10]; 3] = [
        [3, 4, 12, 15, 18, 19, 25, 31, 33, 34],
        [3, 5, 6, 7, 16, 20, 25, 31, 33, 36],
        [2, 5, 7, 13, 19, 23, 26, 28, 33, 37],
    ];
    const FROZEN_DENSE: [u32; 30] = [
        0, 1, 2, 5, 6, 7, 8, 9, 10, 11, 13, 14, 16, 17, 20, 21, 22, 23, 24, 26, 27, 28, 29, 30, 32,
        35, 36, 37, 38, 39,
    ];
    const FROZEN_KEY: u64 = 5_099_192_472_518_120_577;

    #[test]
    fn every_group_keeps_exactly_its_share() {
        for (n_cols, group_size, kept, of) in
            [(64, 16, 1, 8), (100, 8, 1, 8), (300, 64, 37, 300), (5, 16, 1, 5), (70, 7, 1, 1)]
        {
            let masks = Masks { key: 1, n_cols, group_size, share: Share { kept, of } };
            for block in 0..20 {
                let columns = columns(masks, block, 0);
                assert_eq!(columns.len(), masks.share.of_first(n_cols));
                assert!(columns.windows(2).all(|pair| pair[0] < pair[1]));
                for first in (0..n_cols).step_by(group_size) {
                    let end = n_cols.min(first + group_size);
                    let here = columns.iter().filter(|c| (first..end).contains(&(**c as usize)));
                    let want = masks.share.of_first(end) - masks.share.of_first(first);
                    assert_eq!(here.count(), want);
                    if n_cols == 64 {
                        assert_eq!(want, group_size / 8);
                    }
                }
            }
        }
    }

    /// Every weight is kept as often as the others.
    #[test]
    fn masks_are_even() {
        for kept in [2u32, 12] {
            let share = Share { kept, of: 16 };
            let masks = Masks { key: 5, n_cols: 16, group_size: 16, share };
            let mut counts = [0u32; 16];
            for block in 0..20_000 {
                columns(masks, block, 0).iter().for_each(|c| counts[*c as usize] += 1);
            }
            let p = f64::from(kept) / 16.0;
            let deviation = (20_000.0 * p * (1.0 - p)).sqrt();
            for count in counts {
                assert!((f64::from(count) - 20_000.0 * p).abs() < 5.0 * deviation, "{counts:?}");
            }
        }
    }

    /// Keeping κ of g and multiplying by g/κ is unbiased, and its variance is that of drawing
    /// without replacement, `g² (1 − κ/g) / κ · S²`.
    #[test]
    fn the_group_estimator_has_its_variance() {
        let (g, kept, n) = (16usize, 2usize, 200_000usize);
        let y: Vec<f64> = (0..16).map(|i| f64::from(i * i % 11) - 3.5).collect();
        let mean = y.iter().sum::<f64>() / 16.0;
        let s2 = y.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / 15.0;
        let want = 256.0 * (1.0 - 2.0 / 16.0) / 2.0 * s2;
        let share = Share { kept: 1, of: 8 };
        let masks = Masks { key: 11, n_cols: g, group_size: g, share };
        let (mut sum, mut squares) = (0.0, 0.0);
        let mut columns = Vec::new();
        #[allow(clippy::cast_precision_loss)]
        for block in 0..n {
            masks.columns(block, 0, &mut columns);
            let estimate: f64 = columns.iter().map(|c| y[*c as usize]).sum::<f64>();
            let off = estimate * g as f64 / kept as f64 - 16.0 * mean;
            sum += off;
            squares += off * off;
        }
        #[allow(clippy::cast_precision_loss)]
        let (bias, variance) = (sum / n as f64, squares / n as f64);
        assert!((variance / want - 1.0).abs() < 0.02, "{variance} of {want}");
        #[allow(clippy::cast_precision_loss)]
        let deviation = (want / n as f64).sqrt();
        assert!(bias.abs() < 4.0 * deviation, "{bias}");
    }
}
