//! Streams of symbols: states, then words.

use onebase_kernels::Backend;
use onebase_kernels::rans::{LOW, STATES, Slots, Symbols};

/// Bytes of the states that a stream begins with.
const STATES_BYTES: usize = 4 * STATES;

/// Appends the stream of `symbols`, each of which has a frequency in its context.
pub(super) fn encode(table: &Symbols, contexts: &[u8], symbols: &[u8], out: &mut Vec<u8>) {
    let mut states = [LOW; STATES];
    let words = Backend::active().rans_encode(table, &mut states, contexts, symbols);
    out.reserve(STATES_BYTES + 2 * words.len());
    states.iter().for_each(|state| out.extend_from_slice(&state.to_le_bytes()));
    out.extend(words.iter().flat_map(|word| word.to_le_bytes()));
}

/// Reads the stream that [`encode`] wrote, in as many calls as one likes, each but the last of a
/// multiple of [`STATES`] symbols.
#[derive(Debug)]
pub(super) struct Decoder<'a> {
    slots: &'a Slots,
    states: [u32; STATES],
    words: &'a [u8],
}

impl<'a> Decoder<'a> {
    /// `None` when there are no states.
    pub(super) fn new(slots: &'a Slots, stream: &'a [u8]) -> Option<Self> {
        let (first, words) = stream.split_first_chunk::<STATES_BYTES>()?;
        let mut states = [0; STATES];
        for (state, bytes) in states.iter_mut().zip(first.as_chunks::<4>().0) {
            *state = u32::from_le_bytes(*bytes);
        }
        Some(Self { slots, states, words })
    }

    /// Decodes a symbol for each context; `None` when the stream ends before.
    pub(super) fn decode(&mut self, contexts: &[u8], symbols: &mut [u8]) -> Option<()> {
        let backend = Backend::active();
        let (slots, states) = (self.slots, &mut self.states);
        let used = backend.rans_decode(slots, states, self.words, contexts, symbols);
        self.words = self.words.get(used..)?;
        Some(())
    }

    /// The bytes after the stream; `None` when the states are not those that an encoder
    /// begins with.
    pub(super) fn finish(self) -> Option<&'a [u8]> {
        self.states.iter().all(|state| *state == LOW).then_some(self.words)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tables::{Tables, frequencies};
    use super::*;

    /// Symbols that are rarer the greater they are, by a generator that depends on nothing.
    fn draw(n: usize) -> (Vec<u8>, Vec<u8>) {
        let mut z = 1u64;
        let mut next = || {
            z = z.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            z >> 33
        };
        (0..n)
            .map(|_| {
                let context = next() % 5;
                let symbol = (next() % 1000) * (next() % 1000) % (7 << context);
                (context.to_le_bytes()[0], symbol.to_le_bytes()[0])
            })
            .unzip()
    }

    #[test]
    fn symbols_come_back_in_any_number() {
        for n in [0, 1, 31, 32, 33, 64, 100, 5000] {
            let (contexts, symbols) = draw(n);
            let mut counts = vec![vec![0; 256]; 5];
            for (c, s) in contexts.iter().zip(&symbols) {
                counts[usize::from(*c)][usize::from(*s)] += 1;
            }
            let tables = Tables::new(counts.iter().map(|c| frequencies(c)).collect());
            let mut stream = Vec::new();
            encode(&tables.encoder(), &contexts, &symbols, &mut stream);
            stream.extend([1, 2, 3]);
            let slots = tables.slots();
            let mut decoder = Decoder::new(&slots, &stream).unwrap();
            let mut got = vec![0; n];
            for (c, s) in contexts.chunks(64).zip(got.chunks_mut(64)) {
                decoder.decode(c, s).unwrap();
            }
            assert_eq!(got, symbols);
            assert_eq!(decoder.finish(), Some([1, 2, 3].as_slice()));
        }
    }
}
