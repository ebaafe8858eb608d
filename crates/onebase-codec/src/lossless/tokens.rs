//! Distances as tokens of a byte, and bits: small ones are a token each, larger ones share one by
//! sign, length and the two digits after the first, and the other digits are bits.

use onebase_kernels::Backend;
use onebase_kernels::rans::{BitSink, Ranks};

/// How distances of some bits become tokens.
#[derive(Debug)]
pub(super) struct Tokens {
    /// Bits of a distance.
    bits: u32,
    /// Magnitudes below 2 to this are tokens of their own.
    direct_bits: u32,
    /// By token: the least distance in the lower half, the number of bits in the upper one.
    least: Box<[u64; 256]>,
}

impl Tokens {
    /// For distances of 8 or of 16 to 32 bits.
    pub(super) fn new(bits: u32) -> Self {
        // What is left for larger ones has to fit a byte.
        let direct_bits = match bits {
            ..=8 => 7,
            9..=16 => 4,
            _ => 3,
        };
        let mut least = Box::new([0; 256]);
        let mut set = |token: u32, n: u32, distance: u32| {
            if let Some(place) = least.get_mut(token as usize) {
                *place = u64::from(n) << 32 | u64::from(distance);
            }
        };
        let half = 1u32 << (bits - 1);
        let mut magnitude = 0u32;
        // The token of a rank that is positive; the negative one is the next.
        while magnitude <= half {
            let (rank, n) = Ranks::rank(bits, direct_bits, magnitude);
            let token = (2 * rank).saturating_sub(1);
            set(token, n, magnitude);
            let most = magnitude + ((1 << n) - 1);
            if magnitude > 0 && magnitude < half {
                set(token + 1, n, most.wrapping_neg());
            }
            magnitude = most + 1;
        }
        Self { bits, direct_bits, least }
    }

    /// The number of bits after a token.
    pub(super) fn n_bits(&self, token: u8) -> u32 {
        u32::try_from(self.least[usize::from(token)] >> 32).unwrap_or(0)
    }

    /// Splits distances.
    pub(super) fn split(&self, distances: &[u32], tokens: &mut [u8], bits: &mut BitSink) {
        let Self { bits: width, direct_bits, ref least } = *self;
        let ranks = Ranks { bits: width, direct_bits, least };
        Backend::active().split_bits(ranks, distances, tokens, bits);
    }

    /// Joins what was split; `bits` are from the place `at` on and end with
    /// [`PADDING`](super::bits::PADDING) bytes.
    pub(super) fn join(&self, tokens: &[u8], bits: &[u8], at: &mut usize, distances: &mut [u32]) {
        Backend::active().join_bits(&self.least, tokens, bits, at, distances);
    }
}

#[cfg(test)]
mod tests {
    use super::super::bits::PADDING;
    use super::*;

    #[test]
    fn distances_come_back() {
        for bits in [8, 16, 17, 24, 31, 32] {
            let tokens = Tokens::new(bits);
            let up = 32 - bits;
            let extend = |d: u32| ((d << up).cast_signed() >> up).cast_unsigned();
            let mut distances: Vec<u32> = (0..1 << 16).map(extend).collect();
            for power in 0..bits {
                let near = (1u32 << power).wrapping_sub(2);
                distances.extend((0..4).map(|i| extend(near.wrapping_add(i))));
                distances.extend((0..4).map(|i| extend(near.wrapping_add(i).wrapping_neg())));
            }
            let mut split = vec![0; distances.len()];
            let mut writer = BitSink::default();
            tokens.split(&distances, &mut split, &mut writer);
            let mut bytes = writer.finish();
            bytes.extend([0; PADDING]);
            let (mut joined, mut at) = (vec![0; distances.len()], 0);
            tokens.join(&split, &bytes, &mut at, &mut joined);
            let mask = u32::MAX >> up;
            for (got, want) in joined.iter().zip(&distances) {
                assert_eq!(got & mask, want & mask, "{bits} bits");
            }
        }
    }
}
