//! Bytes of the same place in all elements as planes, each by its frequencies or as it is.
//!
//! Of bf16 and f32 the exponent is turned into a byte of its own first, the sign going to the
//! lowest place.

use onebase_kernels::rans::{Slots, Symbols};

use super::rans::{Decoder, encode};
use super::tables::{Tables, frequencies, table_and_symbol_bits};
use super::{Damage, Element, STREAM_BITS};

/// The parts of a plane that its code must be below to be worth decoding.
const WORTH: f64 = 0.98;

/// How often each byte is in each plane.
#[derive(Debug)]
pub(super) struct Counts {
    planes: Vec<Vec<u32>>,
    n: usize,
}

impl Counts {
    /// Of `element`s among which nothing is counted yet.
    pub(super) fn new(element: Element) -> Self {
        Self { planes: vec![vec![0; 256]; element.size_bytes()], n: 0 }
    }

    /// Counts elements, less those of a base.
    pub(super) fn add(&mut self, element: Element, tune: &[u8], base: Option<&[u8]>) {
        let planes = split(element, tune, base);
        for (counts, plane) in self.planes.iter_mut().zip(&planes) {
            plane.iter().for_each(|byte| counts[usize::from(*byte)] += 1);
        }
        self.n += tune.len() / element.size_bytes();
    }

    /// Adds others.
    pub(super) fn join(&mut self, other: &Self) {
        for (counts, others) in self.planes.iter_mut().zip(&other.planes) {
            counts.iter_mut().zip(others).for_each(|(n, m)| *n = n.saturating_add(*m));
        }
        self.n += other.n;
    }

    /// Bits of a plane if it is coded, and if it is not.
    fn plane_bits(&self, plane: &[u32]) -> (f64, f64) {
        (table_and_symbol_bits(plane) + STREAM_BITS, 8.0 * self.n as f64)
    }

    /// Bits of all planes, each as it is better.
    pub(super) fn bits(&self) -> f64 {
        let bits = self.planes.iter().map(|plane| self.plane_bits(plane));
        bits.map(|(coded, plain)| coded.min(plain)).sum()
    }

    /// Which planes are coded, and their tables.
    pub(super) fn planes(&self) -> Planes {
        let is_coded = |plane: &Vec<u32>| {
            let (coded, plain) = self.plane_bits(plane);
            coded < WORTH * plain
        };
        let coded: Vec<bool> = self.planes.iter().map(is_coded).collect();
        let planes = self.planes.iter().zip(&coded).filter(|(_, coded)| **coded);
        let tables = Tables::new(planes.map(|(plane, _)| frequencies(plane)).collect());
        Planes { coded, tables }
    }
}

/// Which planes are coded, and by which frequencies.
#[derive(Debug)]
pub(super) struct Planes {
    coded: Vec<bool>,
    pub(super) tables: Tables,
}

impl Planes {
    pub(super) fn write(&self, out: &mut Vec<u8>) {
        let bits = self.coded.iter().rev().fold(0u8, |bits, coded| bits << 1 | u8::from(*coded));
        out.push(bits);
        self.tables.write(out);
    }

    pub(super) fn read(bytes: &[u8], element: Element) -> Option<(Self, &[u8])> {
        let (bits, rest) = bytes.split_first()?;
        let (tables, rest) = Tables::read(rest)?;
        let coded: Vec<bool> =
            (0..8).map(|i| bits >> i & 1 == 1).take(element.size_bytes()).collect();
        let n_coded = coded.iter().filter(|coded| **coded).count();
        let valid = n_coded == tables.n_contexts() && n_coded == bits.count_ones() as usize;
        valid.then_some((Self { coded, tables }, rest))
    }

    /// A block's planes.
    pub(super) fn encode(
        &self,
        symbols: &Symbols,
        element: Element,
        tune: &[u8],
        base: Option<&[u8]>,
    ) -> Vec<u8> {
        let mut out = Vec::new();
        let mut context = 0;
        for (plane, coded) in split(element, tune, base).iter().zip(&self.coded) {
            if *coded {
                encode(symbols, &vec![context; plane.len()], plane, &mut out);
                context += 1;
            } else {
                out.extend_from_slice(plane);
            }
        }
        out
    }

    /// The elements of a block.
    pub(super) fn decode<'a>(
        &self,
        slots: &'a Slots,
        element: Element,
        mut bytes: &'a [u8],
        base: Option<&[u8]>,
        out: &mut [u8],
    ) -> Result<(), Damage> {
        let n = out.len() / element.size_bytes();
        let mut context = 0;
        let mut planes = Vec::new();
        for coded in &self.coded {
            let mut plane = vec![0; n];
            if *coded {
                let mut decoder = Decoder::new(slots, bytes).ok_or(Damage)?;
                decoder.decode(&vec![context; n], &mut plane).ok_or(Damage)?;
                bytes = decoder.finish().ok_or(Damage)?;
                context += 1;
            } else {
                let (plain, rest) = bytes.split_at_checked(n).ok_or(Damage)?;
                plane.copy_from_slice(plain);
                bytes = rest;
            }
            planes.push(plane);
        }
        join(element, &planes, base, out);
        if bytes.is_empty() { Ok(()) } else { Err(Damage) }
    }
}

/// Whether the exponent is turned into a byte of its own.
fn turns(element: Element) -> bool {
    matches!(element, Element::Bf16 | Element::F32)
}

/// The planes of elements, less those of a base bit by bit.
fn split(element: Element, tune: &[u8], base: Option<&[u8]>) -> Vec<Vec<u8>> {
    fn of<const N: usize>(
        tune: &[u8],
        base: Option<&[u8]>,
        turn: impl Fn([u8; N]) -> [u8; N],
    ) -> Vec<Vec<u8>> {
        let words = tune.as_chunks::<N>().0;
        let mut planes = vec![vec![0; words.len()]; N];
        let mut put = |i: usize, word: [u8; N]| {
            let word = turn(word);
            planes.iter_mut().zip(word).for_each(|(plane, byte)| plane[i] = byte);
        };
        match base {
            None => words.iter().enumerate().for_each(|(i, word)| put(i, *word)),
            Some(base) => {
                for (i, (word, base)) in words.iter().zip(base.as_chunks::<N>().0).enumerate() {
                    put(i, std::array::from_fn(|at| word[at] ^ base[at]));
                }
            }
        }
        planes
    }
    match (element.size_bytes(), turns(element)) {
        (1, _) => of::<1>(tune, base, |w| w),
        (2, true) => of::<2>(tune, base, |w| u16::from_le_bytes(w).rotate_left(1).to_le_bytes()),
        (2, false) => of::<2>(tune, base, |w| w),
        (4, true) => of::<4>(tune, base, |w| u32::from_le_bytes(w).rotate_left(1).to_le_bytes()),
        (4, false) => of::<4>(tune, base, |w| w),
        _ => of::<8>(tune, base, |w| w),
    }
}

/// The reverse of [`split`].
fn join(element: Element, planes: &[Vec<u8>], base: Option<&[u8]>, out: &mut [u8]) {
    fn of<const N: usize>(planes: &[Vec<u8>], out: &mut [u8], turn: impl Fn([u8; N]) -> [u8; N]) {
        let Ok(planes) = <&[Vec<u8>; N]>::try_from(planes) else { return };
        for (i, word) in out.as_chunks_mut::<N>().0.iter_mut().enumerate() {
            *word = turn(std::array::from_fn(|at| planes[at][i]));
        }
    }
    match (element.size_bytes(), turns(element)) {
        (1, _) => of::<1>(planes, out, |w| w),
        (2, true) => of::<2>(planes, out, |w| u16::from_le_bytes(w).rotate_right(1).to_le_bytes()),
        (2, false) => of::<2>(planes, out, |w| w),
        (4, true) => of::<4>(planes, out, |w| u32::from_le_bytes(w).rotate_right(1).to_le_bytes()),
        (4, false) => of::<4>(planes, out, |w| w),
        _ => of::<8>(planes, out, |w| w),
    }
    if let Some(base) = base {
        out.iter_mut().zip(base).for_each(|(byte, base)| *byte ^= base);
    }
}
