//! Codes as bytes: packed, or by their frequencies with a range variant of asymmetric numeral
//! systems (J. Duda, arXiv 1311.2540; the byte-wise form of F. Giesen's public-domain
//! `rans_byte`).

/// Bits of a frequency.
const SCALE_BITS: u32 = 12;
const SCALE: u32 = 1 << SCALE_BITS;

/// The least state.
const LOW: u32 = 1 << 23;

/// Bytes of the state that a stream begins with.
const STATE_BYTES: usize = 4;

/// Bytes of `n` packed codes of `bits` each.
pub(crate) fn packed_bytes(n: usize, bits: usize) -> usize {
    n.saturating_mul(bits).div_ceil(8)
}

/// Packs codes of `bits` each, up to eight, the first in the lowest bits of the first byte.
pub(crate) fn pack(codes: impl Iterator<Item = u8>, bits: usize) -> Vec<u8> {
    let (mut out, mut waiting, mut n) = (Vec::new(), 0u32, 0);
    if bits == 0 {
        return out;
    }
    for code in codes {
        waiting |= u32::from(code) << n;
        n += bits;
        while n >= 8 {
            out.push(waiting.to_le_bytes()[0]);
            waiting >>= 8;
            n -= 8;
        }
    }
    if n > 0 {
        out.push(waiting.to_le_bytes()[0]);
    }
    out
}

/// The first `n` codes of [`pack`]; zeros where bytes end.
pub(crate) fn unpack(bytes: &[u8], bits: usize, n: usize) -> impl Iterator<Item = u8> {
    let mask = ((1u32 << bits) - 1).to_le_bytes()[0];
    (0..n).map(move |i| {
        let (at, shift) = (i * bits / 8, i * bits % 8);
        let byte = |at: usize| u32::from(bytes.get(at).copied().unwrap_or(0));
        ((byte(at) | byte(at + 1) << 8) >> shift).to_le_bytes()[0] & mask
    })
}

/// Frequencies of codes below `n_codes`, which sum to [`SCALE`], none 0 of a code that is there.
#[allow(clippy::cast_possible_truncation)]
fn frequencies(codes: &[u8], n_codes: usize) -> Vec<u32> {
    let mut counts = vec![0u64; n_codes];
    codes.iter().for_each(|code| counts[usize::from(*code)] += 1);
    let total = codes.len().max(1) as u64;
    let mut scaled: Vec<u32> = counts
        .iter()
        .map(|n| if *n == 0 { 0 } else { (n * u64::from(SCALE) / total).max(1) as u32 })
        .collect();
    // What rounding leaves over goes to the most frequent, and comes from them.
    let mut sum: u32 = scaled.iter().sum();
    while sum != SCALE {
        let Some(most) = (0..n_codes).max_by_key(|i| (scaled[*i], std::cmp::Reverse(*i))) else {
            return scaled;
        };
        if sum < SCALE {
            scaled[most] += SCALE - sum;
        } else {
            scaled[most] -= (sum - SCALE).min(scaled[most] / 2).max(1);
        }
        sum = scaled.iter().sum();
    }
    scaled
}

/// Codes of `bits` each by their frequencies: these, two bytes each, little-endian, then the
/// state and the bytes that a decoder reads.
pub(crate) fn compress(codes: &[u8], bits: usize) -> Vec<u8> {
    let frequencies = frequencies(codes, 1 << bits);
    let starts: Vec<u32> = frequencies
        .iter()
        .scan(0, |sum, f| {
            let start = *sum;
            *sum += f;
            Some(start)
        })
        .collect();
    let mut reversed = Vec::new();
    let mut state = LOW;
    for code in codes.iter().rev().map(|code| usize::from(*code)) {
        let frequency = frequencies[code];
        // In u64, since a frequency may be all of the scale.
        let most = u64::from((LOW >> SCALE_BITS) << 8) * u64::from(frequency);
        while u64::from(state) >= most {
            reversed.push(state.to_le_bytes()[0]);
            state >>= 8;
        }
        state = ((state / frequency) << SCALE_BITS) + state % frequency + starts[code];
    }
    let mut out = Vec::with_capacity(2 * frequencies.len() + STATE_BYTES + reversed.len());
    for frequency in &frequencies {
        out.extend_from_slice(&frequency.to_le_bytes()[..2]);
    }
    out.extend_from_slice(&state.to_le_bytes());
    out.extend(reversed.iter().rev());
    out
}

/// What [`compress`] made of `n` codes; `None` when it did not make these bytes.
pub(crate) fn decompress(bytes: &[u8], bits: usize, n: usize) -> Option<Vec<u8>> {
    let (table, stream) = bytes.split_at_checked(2 << bits)?;
    let frequencies = table.chunks(2).map(|f| u32::from(u16::from_le_bytes([f[0], f[1]])));
    // Of each slot of the scale: the code, its frequency, and how far into it the slot is.
    let mut slots: Vec<(u8, u32, u32)> = Vec::with_capacity(SCALE as usize);
    for (code, frequency) in (0..=u8::MAX).zip(frequencies) {
        if frequency > SCALE || slots.len() + frequency as usize > SCALE as usize {
            return None;
        }
        slots.extend((0..frequency).map(|at| (code, frequency, at)));
    }
    if slots.len() != SCALE as usize && n > 0 {
        return None;
    }
    let (state, mut stream) = stream.split_first_chunk::<STATE_BYTES>()?;
    let mut state = u32::from_le_bytes(*state);
    // States of an encoder are below 2³¹, which keeps the next one in range.
    if !(LOW..LOW << 8).contains(&state) {
        return None;
    }
    let mut codes = Vec::with_capacity(n);
    for _ in 0..n {
        let (code, frequency, at) = slots[(state & (SCALE - 1)) as usize];
        state = frequency * (state >> SCALE_BITS) + at;
        while state < LOW {
            let (byte, rest) = stream.split_first()?;
            state = state << 8 | u32::from(*byte);
            stream = rest;
        }
        codes.push(code);
    }
    (state == LOW && stream.is_empty()).then_some(codes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use onebase_tensor::stream;
    use rand_distr::{Distribution, StandardNormal};

    /// Codes about the middle of their range, as those of a bell curve between extremes are.
    fn codes(n: usize, bits: usize, width: f32) -> Vec<u8> {
        let mut rng = stream(1, "codes", 0);
        let top = ((1u32 << bits) - 1) as f32;
        let draw = |_| Distribution::<f32>::sample(&StandardNormal, &mut rng);
        (0..n).map(draw).map(|x| (top / 2.0 + width * x).round().clamp(0.0, top) as u8).collect()
    }

    #[test]
    fn codes_come_back() {
        for bits in 1..=8 {
            for n in [0, 1, 2, 7, 1000, 5000] {
                for width in [0.0, 0.7, 40.0] {
                    let codes = codes(n, bits, width);
                    let packed = pack(codes.iter().copied(), bits);
                    assert_eq!(packed.len(), packed_bytes(n, bits));
                    assert_eq!(unpack(&packed, bits, n).collect::<Vec<_>>(), codes);
                    let bytes = compress(&codes, bits);
                    assert_eq!(decompress(&bytes, bits, n), Some(codes), "{bits} {n} {width}");
                }
            }
        }
    }

    #[test]
    fn compressed_codes_are_near_their_entropy() {
        let codes = codes(100_000, 4, 1.2);
        let mut counts = [0.0; 16];
        codes.iter().for_each(|code| counts[usize::from(*code)] += 1.0);
        let share = |n: &&f64| **n > 0.0;
        let bits: f64 = counts.iter().filter(share).map(|n| -n * (n / 100_000.0).log2()).sum();
        let got = 8.0 * compress(&codes, 4).len() as f64;
        assert!(got < 1.002 * bits + 400.0, "{got} of {bits}");
    }

    #[test]
    fn altered_bytes_are_refused_or_decode_to_as_many_codes() {
        let codes = codes(300, 3, 1.0);
        let bytes = compress(&codes, 3);
        for at in 0..bytes.len() {
            assert_eq!(decompress(&bytes[..at], 3, 300), None);
            for flip in [1, 0x80] {
                let mut altered = bytes.clone();
                altered[at] ^= flip;
                if let Some(codes) = decompress(&altered, 3, 300) {
                    assert_eq!(codes.len(), 300);
                }
            }
        }
        assert_eq!(decompress(&bytes, 3, 299), None);
        assert_eq!(decompress(&bytes, 3, 301), None);
    }
}
