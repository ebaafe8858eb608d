//! Symbols by static frequencies in contexts, with a range variant of asymmetric numeral systems
//! (J. Duda, arXiv 1311.2540), and numbers as symbols and bits.
//!
//! Thirty-two states share one stream of words of 16 bits, as in F. Giesen's public-domain
//! `rans_word_sse41`: symbol `i` is of state `i mod 32`, so that states do not wait for each
//! other. All is of integers: every backend writes and reads the same bytes.

use std::hint::select_unpredictable;

use crate::Backend;
use crate::vector::{Kernel, Lanes};

/// Bits of a frequency: those of a context sum to 2 to this.
pub const SCALE_BITS: u32 = 12;

/// The most contexts.
pub const MAX_CONTEXTS: usize = 16;

/// States side by side.
pub const STATES: usize = 32;

/// The state that an encoder begins with and a decoder ends with, and the least one.
pub const LOW: u32 = 1 << 16;

/// The most bytes that the words of a symbol for each state take: a state is shifted by 16 bits
/// at a time, and never more than once for a symbol.
pub(crate) const GROUP_BYTES: usize = 2 * STATES;

const SCALE: u32 = 1 << SCALE_BITS;

/// By context, then by place on the scale: the symbol, its frequency less one and the place
/// within the symbol's own, in 8, 12 and 12 bits from the top.
pub type Slots = [u32; MAX_CONTEXTS << SCALE_BITS];

/// What the encoder needs of a symbol in a context.
#[derive(Clone, Copy, Debug, Default)]
pub struct Symbol {
    /// ⌈2⁶⁴ / frequency⌉, whose product with a state has the quotient in its upper half.
    reciprocal: u64,
    /// Added to the new state.
    bias: u32,
    frequency: u16,
    /// The scale less the frequency.
    rest: u16,
}

impl Symbol {
    /// Of a symbol with this frequency, after others whose sum is `start`.
    #[allow(clippy::cast_possible_truncation)]
    pub fn new(start: u32, frequency: u32) -> Self {
        let rest = (SCALE - frequency.min(SCALE)) as u16;
        match frequency {
            0 => Self::default(),
            // The reciprocal of 1 has no room: the quotient comes out one too low, which the
            // bias makes good.
            1 => Self { reciprocal: u64::MAX, bias: start + SCALE - 1, frequency: 1, rest },
            _ => Self {
                reciprocal: u64::MAX / u64::from(frequency) + 1,
                bias: start,
                frequency: frequency as u16,
                rest,
            },
        }
    }

    /// The state after this symbol; whether a word leaves the state `x` before.
    #[inline(always)]
    #[allow(clippy::cast_possible_truncation)]
    fn push(self, x: u32) -> (u32, bool) {
        let full = (x >> (32 - SCALE_BITS)) >= u32::from(self.frequency);
        let x = select_unpredictable(full, x >> 16, x);
        let quotient = ((u128::from(x) * u128::from(self.reciprocal)) >> 64) as u32;
        let next = quotient.wrapping_mul(u32::from(self.rest));
        (x.wrapping_add(self.bias).wrapping_add(next), full)
    }
}

/// By context, 256 symbols.
pub type Symbols = [Symbol; MAX_CONTEXTS * 256];

impl Backend {
    /// Encodes `symbols`, each in its context, the last one first, into the states, and gives
    /// the words that leave them in the order of decoding.
    ///
    /// Panics when there are not as many contexts as symbols.
    pub fn rans_encode(
        self,
        table: &Symbols,
        states: &mut [u32; STATES],
        contexts: &[u8],
        symbols: &[u8],
    ) -> Vec<u16> {
        assert_eq!(contexts.len(), symbols.len(), "contexts of symbols");
        // SAFETY: the kernel is safe code.
        unsafe { self.run(Encode { table, states, contexts, symbols }) }
    }

    /// Decodes a symbol for each context and gives the bytes of the words it read, more than
    /// there are where the stream is too short: zeros are read there.
    ///
    /// Whatever the bytes are, each symbol is one that is in the slots of its context. Where it
    /// is not the last call for a stream, the number of symbols is a multiple of [`STATES`].
    ///
    /// Panics when there are not as many contexts as symbols.
    pub fn rans_decode(
        self,
        slots: &Slots,
        states: &mut [u32; STATES],
        words: &[u8],
        contexts: &[u8],
        symbols: &mut [u8],
    ) -> usize {
        assert_eq!(contexts.len(), symbols.len(), "contexts of symbols");
        // SAFETY: the kernel's lengths are those of slices.
        unsafe { self.run(Decode { slots, states, words, contexts, symbols }) }
    }

    /// Numbers from symbols and bits: the symbol's entry of `least` has the least number in its
    /// lower half, and in the upper one how many of the `bits`, from the place `at` on and the
    /// lowest first, are added to it. Past the end of the bits less eight bytes, these eight are
    /// read again; the caller pads them.
    ///
    /// Panics when there are fewer than eight bytes, or not as many numbers as symbols.
    pub fn join_bits(
        self,
        least: &[u64; 256],
        symbols: &[u8],
        bits: &[u8],
        at: &mut usize,
        numbers: &mut [u32],
    ) {
        assert!(bits.len() >= 8, "bits are padded");
        assert_eq!(symbols.len(), numbers.len(), "numbers of symbols");
        // SAFETY: the kernel's reads are within the bits, see there.
        unsafe { self.run(Join { least, symbols, bits, at, numbers }) }
    }

    /// The reverse of [`Backend::join_bits`] for numbers whose magnitudes have the symbols of
    /// `ranks`; bits go to `out`.
    ///
    /// Panics when there are not as many numbers as symbols.
    pub fn split_bits(
        self,
        ranks: Ranks<'_>,
        numbers: &[u32],
        symbols: &mut [u8],
        out: &mut BitSink,
    ) {
        assert_eq!(symbols.len(), numbers.len(), "numbers of symbols");
        // SAFETY: the kernel writes within its buffer, see there.
        unsafe { self.run(Split { ranks, numbers, symbols, out }) }
    }
}

/// How magnitudes become symbols: below 2 to `direct_bits` each has its own, above it those share
/// one that have the length and the two digits after the first in common.
#[derive(Clone, Copy, Debug)]
pub struct Ranks<'a> {
    /// Bits of a number, at most 32.
    pub bits: u32,
    /// At least 2.
    pub direct_bits: u32,
    /// By symbol, see [`Backend::join_bits`].
    pub least: &'a [u64; 256],
}

impl Ranks<'_> {
    /// The rank of a magnitude's symbol, and the number of bits.
    #[inline(always)]
    pub fn rank(bits: u32, direct_bits: u32, magnitude: u32) -> (u32, u32) {
        // The greatest magnitude of all is the only one of its length.
        if magnitude >> direct_bits == 0 || bits == direct_bits + 1 {
            return (magnitude, 0);
        }
        let length = 31 - magnitude.leading_zeros();
        let quarter = magnitude >> (length - 2) & 3;
        ((1 << direct_bits) + 4 * (length - direct_bits) + quarter, length - 2)
    }
}

/// Bits that are written one number after the other, the first in the lowest places.
#[derive(Debug, Default)]
pub struct BitSink {
    bytes: Vec<u8>,
    waiting: u64,
    n_waiting: u32,
}

impl BitSink {
    /// Appends the lowest `n` bits, up to 32, of `bits`, which has no others.
    #[inline(always)]
    pub fn push(&mut self, bits: u64, n: u32) {
        self.waiting |= bits << self.n_waiting;
        self.n_waiting += n;
        if self.n_waiting >= 32 {
            self.bytes.extend_from_slice(&self.waiting.to_le_bytes()[..4]);
            self.waiting >>= 32;
            self.n_waiting -= 32;
        }
    }

    /// The bytes; the last one is filled up with zeros.
    pub fn finish(mut self) -> Vec<u8> {
        let n = self.n_waiting.div_ceil(8) as usize;
        self.bytes.extend_from_slice(&self.waiting.to_le_bytes()[..n]);
        self.bytes
    }
}

struct Encode<'a> {
    table: &'a Symbols,
    states: &'a mut [u32; STATES],
    contexts: &'a [u8],
    symbols: &'a [u8],
}

impl Kernel for Encode<'_> {
    type Output = Vec<u16>;

    #[inline(always)]
    unsafe fn run<V: Lanes>(self) -> Vec<u16> {
        // Written downwards, and with room for a whole group below what is there.
        let mut words = vec![0u16; self.symbols.len() + STATES];
        let mut at = words.len();
        let (contexts, last_contexts) = self.contexts.as_chunks::<STATES>();
        let (symbols, last_symbols) = self.symbols.as_chunks::<STATES>();
        let mut states = *self.states;
        if let Some((_, window)) = words.split_last_chunk_mut() {
            at -= push_group(self.table, &mut states, window, last_contexts, last_symbols);
        }
        for (contexts, symbols) in contexts.iter().zip(symbols).rev() {
            let Some((_, window)) = words[..at].split_last_chunk_mut() else { break };
            at -= push_group(self.table, &mut states, window, contexts.as_slice(), symbols);
        }
        *self.states = states;
        words.drain(..at);
        words
    }
}

/// Encodes at most one symbol for each state, the last one first; gives the number of words, which
/// are the last ones of `window`.
#[inline(always)]
#[allow(clippy::cast_possible_truncation)]
fn push_group(
    table: &Symbols,
    states: &mut [u32; STATES],
    window: &mut [u16; STATES],
    contexts: &[u8],
    symbols: &[u8],
) -> usize {
    let mut n = 0;
    for ((context, symbol), state) in contexts.iter().zip(symbols).zip(states).rev() {
        let index = usize::from(*context & 15) << 8 | usize::from(*symbol);
        window[(STATES - 1 - n) % STATES] = *state as u16;
        let (next, full) = table[index].push(*state);
        *state = next;
        n += usize::from(full);
    }
    n
}

struct Decode<'a> {
    slots: &'a Slots,
    states: &'a mut [u32; STATES],
    words: &'a [u8],
    contexts: &'a [u8],
    symbols: &'a mut [u8],
}

impl Kernel for Decode<'_> {
    type Output = usize;

    #[inline(always)]
    unsafe fn run<V: Lanes>(self) -> usize {
        let (contexts, last_contexts) = self.contexts.as_chunks::<STATES>();
        let (symbols, last_symbols) = self.symbols.as_chunks_mut::<STATES>();
        // SAFETY: the caller's promise for the instructions.
        let (n, mut used) =
            unsafe { V::rans_groups(self.slots, self.states, self.words, contexts, symbols) };
        // Where words end, or there are not as many symbols as states.
        let whole = contexts[n..].iter().map(<[u8; STATES]>::as_slice);
        let whole = whole.zip(symbols[n..].iter_mut().map(<[u8; STATES]>::as_mut_slice));
        for (contexts, symbols) in whole.chain([(last_contexts, last_symbols)]) {
            let mut window = [0; GROUP_BYTES];
            let rest = self.words.get(used..).unwrap_or(&[]);
            window.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
            used += group(self.slots, self.states, &window, contexts, symbols);
        }
        used
    }
}

/// Decodes whole groups for as long as there are words for one; gives the number of groups and
/// the bytes that were read.
#[inline(always)]
pub(crate) fn groups(
    slots: &Slots,
    states: &mut [u32; STATES],
    words: &[u8],
    contexts: &[[u8; STATES]],
    symbols: &mut [[u8; STATES]],
) -> (usize, usize) {
    let (mut n, mut used) = (0, 0);
    for (contexts, symbols) in contexts.iter().zip(symbols) {
        let Some(window) = words[used..].first_chunk::<GROUP_BYTES>() else { break };
        used += group(slots, states, window, contexts, symbols);
        n += 1;
    }
    (n, used)
}

/// Decodes at most one symbol for each state; gives the bytes of the words it read.
#[inline(always)]
fn group(
    slots: &Slots,
    states: &mut [u32; STATES],
    window: &[u8; GROUP_BYTES],
    contexts: &[u8],
    symbols: &mut [u8],
) -> usize {
    let mut n = 0;
    for ((context, symbol), state) in contexts.iter().zip(symbols).zip(states) {
        let place = usize::from(*context & 15) << SCALE_BITS | (*state & (SCALE - 1)) as usize;
        let slot = slots[place];
        let frequency = (slot >> SCALE_BITS & (SCALE - 1)) + 1;
        let offset = slot & (SCALE - 1);
        let x = frequency.wrapping_mul(*state >> SCALE_BITS).wrapping_add(offset);
        *symbol = slot.to_be_bytes()[0];
        let at = 2 * (n % STATES);
        let word = u32::from(u16::from_le_bytes([window[at], window[at + 1]]));
        let low = x < LOW;
        *state = select_unpredictable(low, x << 16 | word, x);
        n += usize::from(low);
    }
    2 * n
}

struct Join<'a> {
    least: &'a [u64; 256],
    symbols: &'a [u8],
    bits: &'a [u8],
    at: &'a mut usize,
    numbers: &'a mut [u32],
}

impl Kernel for Join<'_> {
    type Output = ();

    #[inline(always)]
    #[allow(clippy::cast_possible_truncation)]
    unsafe fn run<V: Lanes>(self) {
        let last = self.bits.len() - 8;
        let mut at = *self.at;
        for (number, symbol) in self.numbers.iter_mut().zip(self.symbols) {
            let least = self.least[usize::from(*symbol)];
            let n = least >> 32;
            // SAFETY: eight bytes from the last place on are the end of the bits.
            let loaded = unsafe {
                self.bits.as_ptr().add((at >> 3).min(last)).cast::<u64>().read_unaligned()
            };
            let digits = u64::from_le(loaded) >> (at & 7) & !(u64::MAX << (n & 63));
            *number = (least as u32).wrapping_add(digits as u32);
            at = at.wrapping_add(n as usize);
        }
        *self.at = at;
    }
}

struct Split<'a> {
    ranks: Ranks<'a>,
    numbers: &'a [u32],
    symbols: &'a mut [u8],
    out: &'a mut BitSink,
}

impl Kernel for Split<'_> {
    type Output = ();

    #[inline(always)]
    #[allow(clippy::cast_possible_truncation)]
    unsafe fn run<V: Lanes>(self) {
        let Ranks { bits, direct_bits, least } = self.ranks;
        let half = 1 << (bits - 1);
        let one_each = bits == direct_bits + 1;
        // Eight bytes are stored for every number, of which those that are full stay.
        let mut end = self.out.bytes.len();
        self.out.bytes.resize(end + 4 * self.numbers.len() + 12, 0);
        let bytes = self.out.bytes.as_mut_ptr();
        let (mut waiting, mut n_waiting) = (self.out.waiting, self.out.n_waiting);
        // In a loop of its own, which has vectors.
        for (number, symbol) in self.numbers.iter().zip(self.symbols.iter_mut()) {
            let magnitude = number.cast_signed().wrapping_abs().cast_unsigned();
            // The length, at least that of the direct ones.
            let length = 31 - (magnitude | 1 << direct_bits).leading_zeros();
            let direct = magnitude >> direct_bits == 0 || one_each;
            let quarter = magnitude >> (length - 2) & 3;
            let shared = (1 << direct_bits) + 4 * (length - direct_bits) + quarter;
            let rank = if direct { magnitude } else { shared };
            // The least number of all is its own opposite: it counts as positive.
            let negative = (number >> 31) & u32::from(magnitude != half);
            *symbol = (2 * rank - u32::from(rank > 0)).wrapping_add(negative) as u8;
        }
        for (number, symbol) in self.numbers.iter().zip(self.symbols.iter()) {
            let least = least[usize::from(*symbol)];
            // Of as many bits as the symbol has; the least number's sign is not among them.
            let n = (least >> 32) as u32 & 31;
            let digits = number.wrapping_sub(least as u32) & !(u32::MAX << n);
            waiting |= u64::from(digits) << n_waiting;
            n_waiting += n;
            // SAFETY: there are twelve bytes more than four for each number, and a number moves the
            // end by at most four.
            unsafe { bytes.add(end).cast::<u64>().write_unaligned(waiting.to_le()) };
            end += (n_waiting >> 3) as usize;
            waiting >>= n_waiting & 0x38;
            n_waiting &= 7;
        }
        self.out.bytes.truncate(end);
        (self.out.waiting, self.out.n_waiting) = (waiting, n_waiting);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Frequencies that fall by a quarter from symbol to symbol, of five contexts.
    fn model() -> (Box<Slots>, Box<Symbols>, Vec<usize>) {
        let mut slots = vec![0; MAX_CONTEXTS << SCALE_BITS];
        let mut symbols = vec![Symbol::default(); MAX_CONTEXTS * 256];
        let mut n_symbols = Vec::new();
        for context in 0..5usize {
            let (mut start, mut symbol) = (0u32, 0usize);
            while start < SCALE {
                let frequency = ((SCALE - start) >> (1 + context)).max(1);
                let frequency = if symbol == 255 { SCALE - start } else { frequency };
                symbols[context << 8 | symbol] = Symbol::new(start, frequency);
                for at in 0..frequency {
                    let head = u32::try_from(symbol).unwrap() << 24 | (frequency - 1) << 12;
                    slots[context << 12 | (start + at) as usize] = head | at;
                }
                start += frequency;
                symbol += 1;
            }
            n_symbols.push(symbol);
        }
        let slots = slots.into_boxed_slice().try_into().unwrap();
        (slots, symbols.into_boxed_slice().try_into().unwrap(), n_symbols)
    }

    fn numbers(n: usize) -> impl Iterator<Item = u32> {
        let mut z = 1u64;
        (0..n).map(move |_| {
            z = z.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (z >> 33) as u32
        })
    }

    #[test]
    fn every_backend_codes_alike() {
        let (slots, table, n_symbols) = model();
        for n in [0, 1, 31, 32, 33, 64, 100, 5000] {
            let contexts: Vec<u8> = numbers(n).map(|z| (z % 5) as u8).collect();
            let symbols = numbers(2 * n).skip(n).zip(&contexts);
            let symbols: Vec<u8> = symbols
                .map(|(z, c)| ((z >> (z % 23)) as usize % n_symbols[usize::from(*c)]) as u8)
                .collect();
            let mut streams = Vec::new();
            for backend in Backend::available() {
                let mut states = [LOW; STATES];
                let words = backend.rans_encode(&table, &mut states, &contexts, &symbols);
                let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
                streams.push((states, bytes));
            }
            for backend in Backend::available() {
                let (mut states, bytes) = streams[0].clone();
                assert_eq!(streams.last(), streams.first());
                let (mut got, mut used) = (vec![0; n], 0);
                for (c, s) in contexts.chunks(96).zip(got.chunks_mut(96)) {
                    used += backend.rans_decode(&slots, &mut states, &bytes[used..], c, s);
                }
                assert_eq!(got, symbols, "{}", backend.name());
                assert_eq!((states, used), ([LOW; STATES], bytes.len()));
                // Bytes of nobody: the same symbols from every backend, and no panic.
                let (mut states, mut other) = ([u32::MAX; STATES], vec![0; n]);
                let used =
                    backend.rans_decode(&slots, &mut states, &[7; 99], &contexts, &mut other);
                let (mut again, mut want) = ([u32::MAX; STATES], vec![0; n]);
                let portable = Backend::available()[0];
                let all = portable.rans_decode(&slots, &mut again, &[7; 99], &contexts, &mut want);
                assert_eq!((states, used, other), (again, all, want));
            }
        }
    }

    #[test]
    fn bits_come_back_on_every_backend() {
        let mut least = [0u64; 256];
        for (symbol, entry) in (0u64..).zip(least.iter_mut()) {
            *entry = ((symbol % 33) << 32) | (symbol * 1_000_003);
        }
        let symbols: Vec<u8> = numbers(999).map(|z| z as u8).collect();
        let (mut sink, mut want) = (BitSink::default(), Vec::new());
        for (symbol, z) in symbols.iter().zip(numbers(999)) {
            let n = least[usize::from(*symbol)] >> 32;
            let digits = (u64::from(z) << 1) & ((1 << n) - 1);
            sink.push(digits, n as u32);
            want.push((least[usize::from(*symbol)] as u32).wrapping_add(digits as u32));
        }
        let mut bits = sink.finish();
        bits.extend([0; 8]);
        for backend in Backend::available() {
            let (mut got, mut at) = (vec![0; 999], 0);
            backend.join_bits(&least, &symbols, &bits, &mut at, &mut got);
            assert_eq!(got, want, "{}", backend.name());
            assert_eq!(at.div_ceil(8), bits.len() - 8);
        }
    }
}
