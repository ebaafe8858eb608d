//! Distances from the base, by their frequencies in the context of the base's exponent.

use onebase_kernels::Backend;
use onebase_kernels::rans::{BitSink, Slots, Symbols};
use onebase_kernels::words::Words;

use super::bits::PADDING;
use super::rans::{self, Decoder};
use super::tables::{Contexts, Tables, read_classes, write_classes};
use super::tokens::Tokens;
use super::words::{CHUNK, most_drop_bits, words};
use super::{Damage, Element};

/// How elements become tokens.
#[derive(Debug)]
pub(super) struct Delta {
    words: Words,
    tokens: Tokens,
    drop_bits: u32,
}

/// A block's tokens, and the bits after them.
#[derive(Debug)]
pub(super) struct Tokenized {
    tokens: Vec<u8>,
    bits: Vec<u8>,
}

/// How often each of 256 tokens is there in each of 256 classes.
pub(super) type Counts = Vec<u32>;

pub(super) fn no_counts() -> Counts {
    vec![0; 1 << 16]
}

impl Delta {
    /// Elements whose lowest `drop_bits` bits are zero.
    pub(super) fn new(element: Element, drop_bits: u32) -> Option<Self> {
        let words = words(element, drop_bits)?;
        Some(Self { words, tokens: Tokens::new(words.bits()), drop_bits })
    }

    /// The most lowest bits that are zero in base and fine-tune alike.
    pub(super) fn drop_bits(element: Element, tune: &[u8], base: &[u8]) -> u32 {
        let most = most_drop_bits(element);
        if most == 0 {
            return 0;
        }
        let mut any = 0;
        // Most have none: the first elements say so.
        for (tune, base) in tune.chunks(1 << 14).zip(base.chunks(1 << 14)) {
            for word in [tune, base].into_iter().flat_map(|bytes| bytes.as_chunks::<4>().0) {
                any |= u32::from_le_bytes(*word);
            }
            if any & 1 == 1 {
                return 0;
            }
        }
        any.trailing_zeros().min(most)
    }

    /// Tokens of a block, which are counted too.
    pub(super) fn tokenize(
        &self,
        tune: &[u8],
        base: &[u8],
        size_bytes: usize,
        counts: &mut Counts,
    ) -> Tokenized {
        let mut tokens = vec![0; tune.len() / size_bytes];
        let mut bits = BitSink::default();
        let backend = Backend::active();
        let (mut distances, mut classes) = ([0; CHUNK], [0; CHUNK]);
        let Ok(counts) = <&mut [u32; 1 << 16]>::try_from(counts.as_mut_slice()) else {
            unreachable!("256 classes of 256 tokens")
        };
        let chunks = tune.chunks(CHUNK * size_bytes).zip(base.chunks(CHUNK * size_bytes));
        for ((tune, base), tokens) in chunks.zip(tokens.chunks_mut(CHUNK)) {
            let n = tokens.len();
            backend.word_classes(&self.words, base, &mut classes[..n]);
            backend.word_distances(&self.words, base, tune, &mut distances[..n]);
            self.tokens.split(&distances[..n], tokens, &mut bits);
            for (class, token) in classes[..n].iter().zip(tokens) {
                let count = &mut counts[usize::from(*class) << 8 | usize::from(*token)];
                *count = count.wrapping_add(1);
            }
        }
        Tokenized { tokens, bits: bits.finish() }
    }

    /// Bits of what was counted, in the contexts that are best for it.
    pub(super) fn bits(&self, counts: &Counts) -> f64 {
        let by_token = |token: u8| counts.iter().skip(usize::from(token)).step_by(256);
        let bits = (0..=255).map(|token| {
            let n: f64 = by_token(token).map(|n| f64::from(*n)).sum();
            n * f64::from(self.tokens.n_bits(token))
        });
        Contexts::of(counts).bits + bits.sum::<f64>()
    }

    /// Contexts and tables for what was counted.
    pub(super) fn model(self, counts: &Counts) -> Model {
        let contexts = Contexts::of(counts);
        Model { tables: contexts.tables(), of_class: contexts.of_class, delta: self }
    }
}

/// Tokens with their contexts and frequencies.
#[derive(Debug)]
pub(super) struct Model {
    delta: Delta,
    of_class: [u8; 256],
    pub(super) tables: Tables,
}

impl Model {
    pub(super) fn write(&self, out: &mut Vec<u8>) {
        out.push(self.delta.drop_bits.to_le_bytes()[0]);
        self.tables.write(out);
        write_classes(&self.of_class, out);
    }

    pub(super) fn read(bytes: &[u8], element: Element) -> Option<(Self, &[u8])> {
        let (drop_bits, rest) = bytes.split_first()?;
        if u32::from(*drop_bits) > most_drop_bits(element) {
            return None;
        }
        let delta = Delta::new(element, u32::from(*drop_bits))?;
        let (tables, rest) = Tables::read(rest)?;
        let (of_class, rest) = read_classes(rest, tables.n_contexts())?;
        (tables.n_contexts() > 0).then_some((Self { delta, of_class, tables }, rest))
    }

    fn contexts(&self, base: &[u8], contexts: &mut [u8]) {
        Backend::active().word_classes(&self.delta.words, base, contexts);
        for context in contexts {
            *context = self.of_class[usize::from(*context)];
        }
    }

    /// A block: the length of the tokens' stream, the stream, the bits.
    pub(super) fn encode(&self, symbols: &Symbols, block: &Tokenized, base: &[u8]) -> Vec<u8> {
        let mut contexts = vec![0; block.tokens.len()];
        self.contexts(base, &mut contexts);
        let mut out = vec![0; 4];
        rans::encode(symbols, &contexts, &block.tokens, &mut out);
        let stream = u32::try_from(out.len() - 4).unwrap_or(u32::MAX);
        out[..4].copy_from_slice(&stream.to_le_bytes());
        out.extend_from_slice(&block.bits);
        out
    }

    /// The elements of a block.
    pub(super) fn decode(
        &self,
        slots: &Slots,
        bytes: &[u8],
        base: &[u8],
        size_bytes: usize,
        out: &mut [u8],
    ) -> Result<(), Damage> {
        let (len, rest) = bytes.split_first_chunk().ok_or(Damage)?;
        let len = u32::from_le_bytes(*len) as usize;
        let (stream, bits) = rest.split_at_checked(len).ok_or(Damage)?;
        let padded = [bits, &[0; PADDING]].concat();
        let mut decoder = Decoder::new(slots, stream).ok_or(Damage)?;
        let mut at = 0;
        let mut distances = [0; CHUNK];
        let (mut contexts, mut tokens) = ([0; CHUNK], [0; CHUNK]);
        let chunks = out.chunks_mut(CHUNK * size_bytes).zip(base.chunks(CHUNK * size_bytes));
        for (out, base) in chunks {
            let n = out.len() / size_bytes;
            self.contexts(base, &mut contexts[..n]);
            decoder.decode(&contexts[..n], &mut tokens[..n]).ok_or(Damage)?;
            self.delta.tokens.join(&tokens[..n], &padded, &mut at, &mut distances[..n]);
            Backend::active().word_sums(&self.delta.words, base, &distances[..n], out);
        }
        let whole = decoder.finish().is_some_and(<[u8]>::is_empty);
        if whole && at.div_ceil(8) == bits.len() { Ok(()) } else { Err(Damage) }
    }
}
