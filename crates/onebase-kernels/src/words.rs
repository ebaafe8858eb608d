//! Elements as numbers in the order of their values, and how far one is from another.
//!
//! The bits of a float, as an integer, order by magnitude; a negative one is turned over, so that
//! all order by value (the map of FM-Delta, NeurIPS 2024). Before that both are turned about zero
//! where the base is negative: then a distance below zero is a fine-tune nearer to zero or beyond
//! it, whatever the sign, and weights of either sign share their statistics.

use crate::Backend;
use crate::vector::{Kernel, Lanes};

/// How elements of a type are seen as numbers of some bits.
#[derive(Clone, Copy, Debug)]
pub struct Words {
    /// Bytes of an element, which is little-endian: 1, 2 or 4.
    pub size_bytes: usize,
    /// Lowest bits that are zero in all elements and are left out.
    pub drop_bits: u32,
    /// Whether elements have a sign above the others' bits, as floats do.
    pub is_float: bool,
    /// An element's class, for floats the exponent, is this many bits up,
    pub class_at: u32,
    /// has these bits,
    pub class_mask: u32,
    /// and these of them are turned over.
    pub class_flip: u32,
}

impl Words {
    /// Bits of a number.
    pub fn bits(&self) -> u32 {
        32 - self.up()
    }

    /// Bits of 32 that a number has not.
    #[inline(always)]
    fn up(&self) -> u32 {
        let bytes = 4 - self.size_bytes.min(4);
        self.drop_bits
            + if bytes == 3 {
                24
            } else if bytes == 2 {
                16
            } else {
                0
            }
    }

    #[inline(always)]
    fn sign(&self) -> u32 {
        if self.is_float { 1 << (31 - self.up()) } else { 0 }
    }

    #[inline(always)]
    #[allow(clippy::cast_possible_truncation)]
    fn class(&self, word: u32) -> u8 {
        ((word >> self.class_at & self.class_mask) ^ self.class_flip) as u8
    }
}

impl Backend {
    /// The classes of a base's elements.
    ///
    /// Panics when there are not as many.
    pub fn word_classes(self, words: &Words, base: &[u8], classes: &mut [u8]) {
        assert_eq!(base.len(), classes.len() * words.size_bytes, "elements of classes");
        // SAFETY: the kernel is safe code.
        unsafe { self.run(Classes { words, base, classes }) }
    }

    /// How far a fine-tune's elements are from the base's, modulo 2^`bits`, the half below
    /// zero as the complement of two.
    ///
    /// Panics when there are not as many.
    pub fn word_distances(self, words: &Words, base: &[u8], tune: &[u8], out: &mut [u32]) {
        assert_eq!(base.len(), out.len() * words.size_bytes, "elements of distances");
        assert_eq!(tune.len(), base.len(), "elements of base and fine-tune");
        // SAFETY: the kernel is safe code.
        unsafe { self.run(Subtract { words, base, tune, out }) }
    }

    /// The reverse of [`Backend::word_distances`]: the fine-tune's elements.
    ///
    /// Panics when there are not as many.
    pub fn word_sums(self, words: &Words, base: &[u8], distances: &[u32], out: &mut [u8]) {
        assert_eq!(base.len(), distances.len() * words.size_bytes, "elements of distances");
        assert_eq!(out.len(), base.len(), "elements of base and fine-tune");
        // SAFETY: the kernel is safe code.
        unsafe { self.run(Add { words, base, distances, out }) }
    }
}

/// An element of some bytes as a number.
trait Element: Copy {
    fn read(self, drop_bits: u32) -> u32;
    fn write(word: u32, drop_bits: u32) -> Self;
}

impl Element for [u8; 1] {
    #[inline(always)]
    fn read(self, _: u32) -> u32 {
        u32::from(self[0])
    }

    #[inline(always)]
    fn write(word: u32, _: u32) -> Self {
        [word.to_le_bytes()[0]]
    }
}

impl Element for [u8; 2] {
    #[inline(always)]
    fn read(self, _: u32) -> u32 {
        u32::from(u16::from_le_bytes(self))
    }

    #[inline(always)]
    #[allow(clippy::cast_possible_truncation)]
    fn write(word: u32, _: u32) -> Self {
        (word as u16).to_le_bytes()
    }
}

impl Element for [u8; 4] {
    #[inline(always)]
    fn read(self, drop_bits: u32) -> u32 {
        u32::from_le_bytes(self) >> drop_bits
    }

    #[inline(always)]
    fn write(word: u32, drop_bits: u32) -> Self {
        (word << drop_bits).to_le_bytes()
    }
}

struct Classes<'a> {
    words: &'a Words,
    base: &'a [u8],
    classes: &'a mut [u8],
}

impl Kernel for Classes<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<V: Lanes>(self) {
        match self.words.size_bytes {
            1 => classes(self.words, self.base.as_chunks::<1>().0, self.classes),
            2 => classes(self.words, self.base.as_chunks::<2>().0, self.classes),
            _ => classes(self.words, self.base.as_chunks::<4>().0, self.classes),
        }
    }
}

#[inline(always)]
fn classes<E: Element>(words: &Words, base: &[E], classes: &mut [u8]) {
    let words = *words;
    for (class, base) in classes.iter_mut().zip(base) {
        *class = words.class(base.read(words.drop_bits));
    }
}

struct Subtract<'a> {
    words: &'a Words,
    base: &'a [u8],
    tune: &'a [u8],
    out: &'a mut [u32],
}

impl Kernel for Subtract<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<V: Lanes>(self) {
        let Self { words, base, tune, out } = self;
        match words.size_bytes {
            1 => subtract(words, base.as_chunks::<1>().0, tune.as_chunks::<1>().0, out),
            2 => subtract(words, base.as_chunks::<2>().0, tune.as_chunks::<2>().0, out),
            _ => subtract(words, base.as_chunks::<4>().0, tune.as_chunks::<4>().0, out),
        }
    }
}

#[inline(always)]
fn subtract<E: Element>(words: &Words, base: &[E], tune: &[E], out: &mut [u32]) {
    let (sign, up, drop_bits) = (words.sign(), words.up(), words.drop_bits);
    for ((out, base), tune) in out.iter_mut().zip(base).zip(tune) {
        let (b, f) = (base.read(drop_bits), tune.read(drop_bits));
        let turn = b & sign;
        let turned = f ^ turn;
        let place = if turned & sign != 0 { !turned } else { turned | sign };
        let distance = place.wrapping_sub((b ^ turn) | sign);
        *out = ((distance << up).cast_signed() >> up).cast_unsigned();
    }
}

struct Add<'a> {
    words: &'a Words,
    base: &'a [u8],
    distances: &'a [u32],
    out: &'a mut [u8],
}

impl Kernel for Add<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<V: Lanes>(self) {
        let Self { words, base, distances, out } = self;
        match words.size_bytes {
            1 => add(words, base.as_chunks::<1>().0, distances, out.as_chunks_mut::<1>().0),
            2 => add(words, base.as_chunks::<2>().0, distances, out.as_chunks_mut::<2>().0),
            _ => add(words, base.as_chunks::<4>().0, distances, out.as_chunks_mut::<4>().0),
        }
    }
}

#[inline(always)]
fn add<E: Element>(words: &Words, base: &[E], distances: &[u32], out: &mut [E]) {
    let (sign, drop_bits) = (words.sign(), words.drop_bits);
    let mask = u32::MAX >> words.up();
    for ((out, base), distance) in out.iter_mut().zip(base).zip(distances) {
        let b = base.read(drop_bits);
        let turn = b & sign;
        let place = ((b ^ turn) | sign).wrapping_add(*distance) & mask;
        // Of an integer the sign is 0, and its place is itself.
        let turned = if place & sign == sign { place ^ sign } else { !place & mask };
        *out = E::write(turned ^ turn, drop_bits);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(size_bytes: usize, drop_bits: u32, is_float: bool) -> Words {
        Words { size_bytes, drop_bits, is_float, class_at: 3, class_mask: 0x1f, class_flip: 0x10 }
    }

    #[test]
    fn all_pairs_of_bytes_come_back() {
        let all: Vec<u8> = (0..=255).collect();
        for backend in Backend::available() {
            for words in [words(1, 0, true), words(1, 0, false)] {
                for base in 0..=255 {
                    let base = [base; 256];
                    let mut distances = vec![0; 256];
                    backend.word_distances(&words, &base, &all, &mut distances);
                    let mut sums = vec![0; 256];
                    backend.word_sums(&words, &base, &distances, &mut sums);
                    assert_eq!(sums, all, "{}", backend.name());
                    distances.sort_unstable();
                    distances.dedup();
                    assert_eq!(distances.len(), 256);
                }
            }
        }
    }

    #[test]
    fn wider_elements_come_back_on_every_backend() {
        let bytes = |seed: u32| -> Vec<u8> {
            (0..4096u32).map(|i| ((i + seed).wrapping_mul(0x9e37_79b9) >> 24) as u8).collect()
        };
        for (size_bytes, drop_bits) in [(2, 0), (4, 0), (4, 8), (4, 16)] {
            for is_float in [false, true] {
                let words = words(size_bytes, drop_bits, is_float);
                let (mut base, mut tune) = (bytes(1), bytes(7));
                for bytes in [&mut base, &mut tune] {
                    for (i, byte) in bytes.iter_mut().enumerate() {
                        *byte = if i % size_bytes < drop_bits as usize / 8 { 0 } else { *byte };
                    }
                }
                let n = base.len() / size_bytes;
                let mut all = Vec::new();
                for backend in Backend::available() {
                    let (mut distances, mut classes) = (vec![0; n], vec![0; n]);
                    backend.word_distances(&words, &base, &tune, &mut distances);
                    backend.word_classes(&words, &base, &mut classes);
                    let mut sums = vec![0; tune.len()];
                    backend.word_sums(&words, &base, &distances, &mut sums);
                    assert_eq!(sums, tune);
                    all.push((distances, classes));
                }
                assert!(all.iter().all(|one| *one == all[0]));
            }
        }
    }

    #[test]
    fn neighbours_are_one_apart() {
        let words = words(2, 0, true);
        let one = half::bf16::from_f32(1.0).to_bits();
        let distance = |base: u16, tune: u16| {
            let mut out = [0];
            let bytes = (base.to_le_bytes(), tune.to_le_bytes());
            Backend::active().word_distances(&words, &bytes.0, &bytes.1, &mut out);
            out[0].cast_signed()
        };
        assert_eq!(distance(one, one + 1), 1);
        assert_eq!(distance(one, one - 1), -1);
        // Away from zero is up, also below it, and the zeros are neighbours.
        assert_eq!(distance(one | 0x8000, (one + 1) | 0x8000), 1);
        assert_eq!([distance(0, 0x8000), distance(0x8000, 0)], [-1, -1]);
    }
}
