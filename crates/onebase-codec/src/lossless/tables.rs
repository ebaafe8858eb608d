//! Frequencies of symbols by context: counted, rounded to a scale, written and read.

use onebase_kernels::rans::{BitSink, MAX_CONTEXTS, SCALE_BITS, Slots, Symbol, Symbols};

use super::bits::BitReader;

const SCALE: u32 = 1 << SCALE_BITS;

/// Bits that a symbol of a table takes, about, which is weighed against a context of its own.
const SYMBOL_BITS: f64 = 7.0;

/// Symbols and frequencies of up to sixteen contexts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Tables {
    /// By context, 256 frequencies that sum to [`SCALE`].
    frequencies: Vec<Vec<u32>>,
}

impl Tables {
    /// Of frequencies that sum to [`SCALE`], by context.
    pub(super) fn new(frequencies: Vec<Vec<u32>>) -> Self {
        Self { frequencies }
    }

    /// Number of contexts.
    pub(super) fn n_contexts(&self) -> usize {
        self.frequencies.len()
    }

    /// The slots for decoding.
    pub(super) fn slots(&self) -> Box<Slots> {
        let mut slots = vec![0; MAX_CONTEXTS << SCALE_BITS].into_boxed_slice();
        for (slots, frequencies) in slots.chunks_mut(SCALE as usize).zip(&self.frequencies) {
            let mut slots = slots.iter_mut();
            for (symbol, frequency) in (0u32..).zip(frequencies) {
                let head = symbol << 24 | frequency.wrapping_sub(1) << SCALE_BITS & 0x00ff_f000;
                slots.by_ref().zip(0..*frequency).for_each(|(slot, at)| *slot = head | at);
            }
        }
        match slots.try_into() {
            Ok(slots) => slots,
            Err(_) => unreachable!("as many slots as the scale has in all contexts"),
        }
    }

    /// The symbols for encoding.
    pub(super) fn encoder(&self) -> Box<Symbols> {
        let mut symbols = vec![Symbol::default(); MAX_CONTEXTS * 256].into_boxed_slice();
        for (symbols, frequencies) in symbols.chunks_mut(256).zip(&self.frequencies) {
            let mut start = 0;
            for (symbol, frequency) in symbols.iter_mut().zip(frequencies) {
                *symbol = Symbol::new(start, *frequency);
                start += frequency;
            }
        }
        match symbols.try_into() {
            Ok(symbols) => symbols,
            Err(_) => unreachable!("256 symbols in all contexts"),
        }
    }

    /// Appends the tables: their number, then each one's bits.
    ///
    /// A frequency is the length of its binary form, as a difference from that of the symbol
    /// two before it, and the digits after the first. Symbols of a sign alternate, so that
    /// those two are neighbours of each other.
    pub(super) fn write(&self, out: &mut Vec<u8>) {
        out.push(self.n_contexts().to_le_bytes()[0]);
        let mut bits = BitSink::default();
        for frequencies in &self.frequencies {
            let n = frequencies.iter().rposition(|f| *f > 0).map_or(0, |last| last + 1);
            bits.push(n as u64, 9);
            let mut lengths = [0, 0];
            for frequency in &frequencies[..n] {
                let length = 32 - frequency.leading_zeros();
                let step = i64::from(length) - i64::from(lengths[0]);
                // 0, then 1, −1, 2, −2, … in unary.
                let rank = if step > 0 { 2 * step - 1 } else { -2 * step };
                (0..rank).for_each(|_| bits.push(1, 1));
                bits.push(0, 1);
                if length > 1 {
                    bits.push(u64::from(frequency ^ 1 << (length - 1)), length - 1);
                }
                lengths = [lengths[1], length];
            }
        }
        let bytes = bits.finish();
        out.extend_from_slice(&u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_le_bytes());
        out.extend_from_slice(&bytes);
    }

    /// What [`Tables::write`] wrote, and the bytes after it; `None` when it did not.
    pub(super) fn read(bytes: &[u8]) -> Option<(Self, &[u8])> {
        let (n_contexts, rest) = bytes.split_first()?;
        let (len, rest) = rest.split_first_chunk()?;
        let (bytes, rest) = rest.split_at_checked(u32::from_le_bytes(*len) as usize)?;
        if usize::from(*n_contexts) > MAX_CONTEXTS {
            return None;
        }
        let mut bits = BitReader::new(bytes);
        let tables = (0..*n_contexts).map(|_| read_frequencies(&mut bits));
        Some((Self { frequencies: tables.collect::<Option<_>>()? }, rest))
    }
}

fn read_frequencies(bits: &mut BitReader<'_>) -> Option<Vec<u32>> {
    let n = usize::try_from(bits.take(9)?).ok().filter(|n| *n <= 256)?;
    let mut frequencies = vec![0; 256];
    let (mut lengths, mut sum) = ([0i64, 0], 0);
    for frequency in &mut frequencies[..n] {
        let mut rank = 0i64;
        while bits.take(1)? == 1 {
            rank += 1;
        }
        let step = if rank % 2 == 1 { (rank + 1) / 2 } else { -rank / 2 };
        let length = lengths[0] + step;
        if !(0..=i64::from(SCALE_BITS) + 1).contains(&length) {
            return None;
        }
        *frequency = match u32::try_from(length).ok()? {
            0 => 0,
            length => 1 << (length - 1) | u32::try_from(bits.take(length - 1)?).ok()?,
        };
        sum += *frequency;
        lengths = [lengths[1], length];
    }
    (sum == SCALE).then_some(frequencies)
}

/// Frequencies in proportion to counts, which sum to [`SCALE`], none 0 of a symbol that is there.
/// Where nothing is counted, the first symbol has all.
#[allow(clippy::cast_possible_truncation)]
pub(super) fn frequencies(counts: &[u32]) -> Vec<u32> {
    let total: u64 = counts.iter().map(|n| u64::from(*n)).sum();
    if total == 0 {
        let mut all = vec![0; counts.len()];
        all[0] = SCALE;
        return all;
    }
    let share = |n: u32| ((u64::from(n) * u64::from(SCALE) + total / 2) / total) as u32;
    let mut scaled: Vec<u32> =
        counts.iter().map(|n| if *n == 0 { 0 } else { share(*n).max(1) }).collect();
    let mut sum: u32 = scaled.iter().sum();
    // What rounding leaves over goes to the most frequent, and comes from them.
    while sum != SCALE {
        let Some(most) = (0..scaled.len()).max_by_key(|i| (scaled[*i], usize::MAX - *i)) else {
            return scaled;
        };
        if sum < SCALE {
            scaled[most] += SCALE - sum;
        } else {
            scaled[most] -= (sum - SCALE).min(scaled[most] / 8).max(1);
        }
        sum = scaled.iter().sum();
    }
    scaled
}

/// Bits of the symbols that were counted, by their entropy.
pub(super) fn entropy_bits(counts: &[u32]) -> f64 {
    let mut sum = 0.0;
    let mut total = 0.0;
    for n in counts.iter().filter(|n| **n > 0).map(|n| f64::from(*n)) {
        sum += n * n.log2();
        total += n;
    }
    if total > 0.0 { total * total.log2() - sum } else { 0.0 }
}

/// Bits of the symbols and of their table.
pub(super) fn table_and_symbol_bits(counts: &[u32]) -> f64 {
    let n_symbols = counts.iter().filter(|n| **n > 0).count();
    entropy_bits(counts) + SYMBOL_BITS * n_symbols as f64 + 16.0
}

/// Up to sixteen contexts of the classes `0..n`, and the bits that their symbols and tables take.
#[derive(Debug)]
pub(super) struct Contexts {
    /// The context of each class.
    pub(super) of_class: [u8; 256],
    /// By context, how often each of 256 symbols is there.
    pub(super) counts: Vec<Vec<u32>>,
    /// By estimate.
    pub(super) bits: f64,
}

impl Contexts {
    /// Joins neighbouring classes for as long as a table of their own costs more than it
    /// saves, or there are too many. `counts` has 256 symbols for each of 256 classes.
    pub(super) fn of(counts: &[u32]) -> Self {
        struct Run {
            first: usize,
            counts: Vec<u32>,
            bits: f64,
            /// What joining it with the next one saves.
            gain: f64,
        }
        let joined = |a: &[u32], b: &[u32]| -> Vec<u32> {
            a.iter().zip(b).map(|(a, b)| a.saturating_add(*b)).collect()
        };
        let gain = |a: &Run, b: &Run| {
            a.bits + b.bits - table_and_symbol_bits(&joined(&a.counts, &b.counts))
        };
        let mut runs: Vec<Run> = Vec::new();
        for (first, counts) in counts.chunks(256).enumerate() {
            if counts.iter().any(|n| *n > 0) {
                let bits = table_and_symbol_bits(counts);
                runs.push(Run { first, counts: counts.to_vec(), bits, gain: f64::NEG_INFINITY });
            }
        }
        for i in 1..runs.len() {
            runs[i - 1].gain = gain(&runs[i - 1], &runs[i]);
        }
        while runs.len() > 1 {
            let best = (0..runs.len() - 1).max_by(|a, b| runs[*a].gain.total_cmp(&runs[*b].gain));
            let Some(best) = best else { break };
            if runs[best].gain < 0.0 && runs.len() <= MAX_CONTEXTS {
                break;
            }
            let next = runs.remove(best + 1);
            runs[best].counts = joined(&runs[best].counts, &next.counts);
            runs[best].bits = table_and_symbol_bits(&runs[best].counts);
            runs[best].gain = match runs.get(best + 1) {
                Some(next) => gain(&runs[best], next),
                None => f64::NEG_INFINITY,
            };
            if best > 0 {
                runs[best - 1].gain = gain(&runs[best - 1], &runs[best]);
            }
        }
        let mut of_class = [0; 256];
        for (class, context) in of_class.iter_mut().enumerate() {
            let after = runs.iter().filter(|run| run.first <= class).count();
            *context = after.saturating_sub(1).to_le_bytes()[0];
        }
        let bits = runs.iter().map(|run| run.bits).sum();
        Self { of_class, counts: runs.into_iter().map(|run| run.counts).collect(), bits }
    }

    /// Their tables.
    pub(super) fn tables(&self) -> Tables {
        Tables::new(self.counts.iter().map(|counts| frequencies(counts)).collect())
    }
}

/// Appends which context each class has: the first class of each but the first.
pub(super) fn write_classes(of_class: &[u8; 256], out: &mut Vec<u8>) {
    let steps = (1..=255u8).filter(|i| {
        let i = usize::from(*i);
        of_class[i] != of_class[i - 1]
    });
    out.extend(steps);
}

/// What [`write_classes`] wrote of `n_contexts` contexts, and the bytes after it.
pub(super) fn read_classes(bytes: &[u8], n_contexts: usize) -> Option<([u8; 256], &[u8])> {
    let (firsts, rest) = bytes.split_at_checked(n_contexts.saturating_sub(1))?;
    if !firsts.is_sorted() || firsts.first() == Some(&0) {
        return None;
    }
    let mut of_class = [0; 256];
    for (class, context) in (0..=255u8).zip(&mut of_class) {
        *context = firsts.iter().filter(|first| **first <= class).count().to_le_bytes()[0];
    }
    Some((of_class, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_come_back() {
        let mut counts = vec![0u32; 256];
        let mut tables = Vec::new();
        for step in [1u32, 7, 100, 4000] {
            for (i, n) in (0u32..).zip(counts.iter_mut()) {
                *n = (step * i * i) % 997 / (1 + i / 9);
            }
            tables.push(frequencies(&counts));
        }
        counts.fill(0);
        tables.push(frequencies(&counts));
        counts[255] = 3;
        tables.push(frequencies(&counts));
        counts.fill(1);
        tables.push(frequencies(&counts));
        let tables = Tables::new(tables);
        assert!(tables.frequencies.iter().all(|f| f.iter().sum::<u32>() == SCALE));
        let mut bytes = Vec::new();
        tables.write(&mut bytes);
        bytes.push(9);
        assert_eq!(Tables::read(&bytes), Some((tables, [9].as_slice())));
        for n in 0..bytes.len() - 1 {
            assert_eq!(Tables::read(&bytes[..n]), None);
        }
    }

    #[test]
    fn classes_that_are_alike_share_a_context() {
        let mut counts = vec![0u32; 1 << 16];
        for class in [10, 11, 40, 41, 200] {
            for symbol in 0..20 {
                let wide = if class < 40 { 2 } else { 20 };
                counts[class << 8 | symbol] = if symbol < wide { 5000 } else { 1 };
            }
        }
        let contexts = Contexts::of(&counts);
        assert_eq!(contexts.counts.len(), 2);
        assert_eq!([9, 10, 39, 40, 255].map(|i| contexts.of_class[i]), [0, 0, 0, 1, 1]);
        let mut bytes = Vec::new();
        write_classes(&contexts.of_class, &mut bytes);
        assert_eq!(read_classes(&bytes, 2), Some((contexts.of_class, [].as_slice())));
    }
}
