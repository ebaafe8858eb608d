//! The largest weights of a matrix that is read by blocks: one threshold for all of it,
//! found exactly, by counting magnitudes by their leading and then by their trailing
//! bits.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use crate::{DeltaSource, Error, Result, for_each_block};

/// A number whose order is that of magnitudes.
pub(crate) fn magnitude(weight: f32) -> u32 {
    weight.to_bits() & (u32::MAX >> 1)
}

/// The trailing bits of a magnitude, which are counted second; 16 lead them.
const TRAILING_BITS: u32 = 15;

/// Which weights are kept: those above a magnitude, and the first of those equal to it.
pub(crate) struct Largest {
    n_kept: usize,
    /// A [`magnitude`].
    pub(crate) threshold: u32,
    /// Kept of those equal to the threshold, the lowest indices first.
    n_equal: usize,
}

/// How many weights of a row are kept.
#[derive(Clone, Copy, Default)]
pub(crate) struct Count {
    /// Above the threshold.
    pub(crate) above: usize,
    /// Equal to it.
    pub(crate) equal: usize,
}

impl Largest {
    /// The `n_kept` largest magnitudes.
    pub(crate) fn of(delta: &dyn DeltaSource, n_kept: usize) -> Result<Self> {
        let leading = histogram(delta, 1 << 16, |key| Some(key >> TRAILING_BITS))?;
        let (lead, above) = crossing(&leading, n_kept);
        let trailing = histogram(delta, 1 << TRAILING_BITS, |key| {
            (key >> TRAILING_BITS == lead).then_some(key & ((1 << TRAILING_BITS) - 1))
        })?;
        let (trail, between) = crossing(&trailing, n_kept - above);
        let threshold = lead << TRAILING_BITS | trail;
        Ok(Self { n_kept, threshold, n_equal: n_kept - above - between })
    }

    /// Bytes that finding them and counting holds: two histograms in turn, and the counts.
    pub(crate) fn working_bytes([n_rows, _]: [usize; 2]) -> usize {
        2 * (1 << 16) * size_of::<usize>() + n_rows * size_of::<Count>()
    }

    /// What each row keeps, the first rows first of those equal to the threshold: as many
    /// as are wanted in all.
    pub(crate) fn counts(&self, delta: &dyn DeltaSource) -> Result<Vec<Count>> {
        let [n_rows, n_cols] = delta.shape();
        let mut counts = vec![Count::default(); n_rows];
        for_each_block(delta, (&mut counts, 1), (&mut vec![(); n_rows], 1), |block, counts, _| {
            for (weights, count) in block.data().chunks(n_cols).zip(counts) {
                for key in weights.iter().map(|w| magnitude(*w)) {
                    count.above += usize::from(key > self.threshold);
                    count.equal += usize::from(key == self.threshold);
                }
            }
        })?;
        let mut left = self.n_equal;
        for count in &mut counts {
            count.equal = count.equal.min(left);
            left -= count.equal;
        }
        if counts.iter().map(|count| count.above + count.equal).sum::<usize>() != self.n_kept {
            return Err(Error::Source("it changed between two reads".into()));
        }
        Ok(counts)
    }
}

/// How often each bucket, of `n` at most, comes among the magnitudes that have one.
///
/// Counts are whole numbers, so that the order in which blocks add theirs changes
/// nothing.
fn histogram(
    delta: &dyn DeltaSource,
    n: usize,
    bucket: impl Fn(u32) -> Option<u32> + Sync,
) -> Result<Vec<usize>> {
    let n_rows = delta.shape()[0];
    let total: Vec<AtomicUsize> = (0..n).map(|_| AtomicUsize::new(0)).collect();
    let (mut a, mut b) = (vec![(); n_rows], vec![(); n_rows]);
    for_each_block(delta, (&mut a, 1), (&mut b, 1), |block, _, _| {
        let mut counts = vec![0u32; n];
        for bucket in block.data().iter().filter_map(|w| bucket(magnitude(*w))) {
            counts[bucket as usize] += 1;
        }
        for (total, count) in total.iter().zip(counts).filter(|(_, count)| *count > 0) {
            total.fetch_add(count as usize, Relaxed);
        }
    })?;
    Ok(total.into_iter().map(AtomicUsize::into_inner).collect())
}

/// The bucket in which the `wanted` largest end, and how many lie above it.
#[allow(clippy::cast_possible_truncation)]
fn crossing(histogram: &[usize], wanted: usize) -> (u32, usize) {
    let mut above = 0;
    for (bucket, count) in histogram.iter().enumerate().rev() {
        if above + count >= wanted {
            return (bucket as u32, above);
        }
        above += count;
    }
    (0, above)
}
