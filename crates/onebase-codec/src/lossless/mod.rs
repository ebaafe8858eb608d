//! Elements of a tensor to the last bit, in few bytes: what they differ in from a base's.
//!
//! This is no [`Codec`](crate::Codec): a codec gives numbers that are near the fine-tune's, this
//! gives its bytes, those of NaN and −0 too, and for any type. Bytes are coded in *blocks* of
//! 256 KiB, each with a checksum of what it decodes to, in parallel; what blocks have in common
//! is before them. The layout is in `onebase-format/SPEC.md`.
//!
//! | mode | what is stored |
//! |---|---|
//! | plain | the elements, of blocks that are not the base's |
//! | sparse | which elements differ, and these |
//! | delta | distances between base and fine-tune in the order of values (as FM-Delta, NeurIPS 2024), by their frequencies in the context of the base's exponent |
//! | xor | the bits that differ, in planes of bytes, by their frequencies (as BitX, arXiv 2505.06252) |
//! | planes | the elements in planes of bytes, by their frequencies: without a base (as ZipNN, arXiv 2411.05239) |
//!
//! The smallest is taken, by an estimate on a sample; a block that would not get smaller is
//! stored as it is.

mod bits;
mod convert;
mod delta;
mod planes;
mod rans;
mod sparse;
mod tables;
mod tokens;
mod words;

use std::borrow::Cow;

use onebase_kernels::rans::Slots;
use rayon::prelude::*;
use twox_hash::XxHash3_64;

use self::delta::{Delta, no_counts};

/// Bytes of a block before coding; the last one may be shorter.
pub const BLOCK_BYTES: usize = 1 << 18;

/// The share of the elements by which modes are compared.
const SAMPLED_PART: usize = 64;

/// The fewest elements of a sample, where there are as many.
const LEAST_SAMPLE: usize = 1 << 15;

/// Elements of a sample that follow each other.
const SAMPLE_RUN: usize = 1 << 10;

/// Bits that a stream of symbols takes beside them, about.
const STREAM_BITS: f64 = 8.0 * 4.0 * onebase_kernels::rans::STATES as f64;

/// Bytes of a block in the list of blocks: how it is stored, its length, its checksum.
const ENTRY_BYTES: usize = 13;

/// How elements are seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Element {
    /// Eight bits, four of them the exponent.
    F8E4M3,
    /// Eight bits, five of them the exponent.
    F8E5M2,
    /// IEEE binary16.
    F16,
    /// The upper half of an IEEE binary32.
    Bf16,
    /// IEEE binary32.
    F32,
    /// A byte.
    Int8,
    /// An integer of two bytes.
    Int16,
    /// An integer of four bytes.
    Int32,
    /// Anything of eight bytes.
    Int64,
}

impl Element {
    /// Every way to see them.
    pub const ALL: [Self; 9] = [
        Self::F8E4M3,
        Self::F8E5M2,
        Self::F16,
        Self::Bf16,
        Self::F32,
        Self::Int8,
        Self::Int16,
        Self::Int32,
        Self::Int64,
    ];

    /// How elements of a type are seen that a safetensors header names so. What is not known is
    /// a row of bytes.
    pub fn of_dtype(name: &str) -> Self {
        match name {
            "F8_E4M3" => Self::F8E4M3,
            "F8_E5M2" => Self::F8E5M2,
            "F16" => Self::F16,
            "BF16" => Self::Bf16,
            "F32" => Self::F32,
            "I16" | "U16" => Self::Int16,
            "I32" | "U32" => Self::Int32,
            "F64" | "I64" | "U64" | "C64" => Self::Int64,
            _ => Self::Int8,
        }
    }

    /// Bytes of one.
    pub const fn size_bytes(self) -> usize {
        match self {
            Self::F8E4M3 | Self::F8E5M2 | Self::Int8 => 1,
            Self::F16 | Self::Bf16 | Self::Int16 => 2,
            Self::F32 | Self::Int32 => 4,
            Self::Int64 => 8,
        }
    }

    /// Whether a base of type `self` helps to store a fine-tune of type `tune`: it has the
    /// same type, or both are floats of 16 or 32 bits.
    pub fn is_base_of(self, tune: Self) -> bool {
        let float = |e| matches!(e, Self::F16 | Self::Bf16 | Self::F32);
        self == tune || float(self) && float(tune)
    }
}

/// Elements of a base, little-endian.
#[derive(Clone, Copy, Debug)]
pub struct Base<'a> {
    /// Their type.
    pub element: Element,
    /// Their bytes.
    pub bytes: &'a [u8],
}

/// Why bytes could not be decoded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// What comes before the blocks was altered or cut off.
    #[error("what comes before the blocks is damaged")]
    Head,
    /// A block was altered or cut off, or the base is another.
    #[error("block {index} of {count} is damaged")]
    Block {
        /// Which block.
        index: usize,
        /// How many there are.
        count: usize,
    },
}

/// Bytes are not what was written.
#[derive(Clone, Copy, Debug)]
struct Damage;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Plain,
    Sparse,
    Delta,
    Xor,
    Planes,
}

impl Mode {
    const ALL: [Mode; 5] = [Mode::Plain, Mode::Sparse, Mode::Delta, Mode::Xor, Mode::Planes];
}

/// How a block is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stored {
    /// It is the base's.
    Base,
    /// As it is.
    Plain,
    /// By the mode of all blocks.
    Coded,
}

impl Stored {
    const ALL: [Stored; 3] = [Stored::Base, Stored::Plain, Stored::Coded];
}

/// Codes the elements `tune`, little-endian, against as many of a base.
///
/// The base is one that [`Element::is_base_of`] `element`. The result does not depend on the
/// number of threads.
///
/// Panics when `tune` is not a whole number of elements, or the base has more or fewer of them.
pub fn encode(element: Element, tune: &[u8], base: Option<Base<'_>>) -> Vec<u8> {
    assert!(tune.len().is_multiple_of(element.size_bytes()), "a whole number of elements");
    let base = base.and_then(|base| convert::converted(base, element));
    let base = base.as_deref();
    assert!(base.is_none_or(|base| base.len() == tune.len()), "as many elements in the base");
    let blocks: Vec<Block<'_>> = split(tune, base);
    let mode = choose(element, tune, base);
    let mut head = vec![mode as u8];
    let coded = match (mode, base) {
        (Mode::Delta, Some(base)) => encode_delta(element, tune, base, &blocks, &mut head),
        (Mode::Xor | Mode::Planes, _) => encode_planes(element, mode, &blocks, &mut head),
        (Mode::Sparse, Some(_)) => {
            let size = element.size_bytes();
            let code = |block: &Block<'_>| {
                let base = block.base.filter(|base| *base != block.tune)?;
                Some(sparse::encode(block.tune, base, size))
            };
            blocks.par_iter().map(code).collect()
        }
        _ => vec![None; blocks.len()],
    };
    let coded = join(&blocks, &coded, head);
    if mode == Mode::Plain || coded.len() < tune.len() {
        return coded;
    }
    // Tables may take more than they save.
    let plain = join(&blocks, &vec![None; blocks.len()], vec![Mode::Plain as u8]);
    if plain.len() < coded.len() { plain } else { coded }
}

/// Bytes of a block, and those of the base at its place.
#[derive(Clone, Copy, Debug)]
struct Block<'a> {
    tune: &'a [u8],
    base: Option<&'a [u8]>,
}

fn split<'a>(tune: &'a [u8], base: Option<&'a [u8]>) -> Vec<Block<'a>> {
    let at = |i: usize, len: usize| base.map(|base| &base[i * BLOCK_BYTES..][..len]);
    let blocks = tune.chunks(BLOCK_BYTES).enumerate();
    blocks.map(|(i, tune)| Block { tune, base: at(i, tune.len()) }).collect()
}

/// The head with the list of blocks, then the blocks; each as it is where it was not coded or is
/// not smaller.
fn join(blocks: &[Block<'_>], coded: &[Option<Vec<u8>>], mut head: Vec<u8>) -> Vec<u8> {
    let sums: Vec<u64> = blocks.par_iter().map(|b| XxHash3_64::oneshot(b.tune)).collect();
    let stored = blocks.iter().zip(coded).map(|(block, coded)| match coded {
        _ if block.base == Some(block.tune) => (Stored::Base, &[][..]),
        Some(coded) if coded.len() < block.tune.len() => (Stored::Coded, coded.as_slice()),
        _ => (Stored::Plain, block.tune),
    });
    let stored: Vec<_> = stored.collect();
    for ((how, bytes), sum) in stored.iter().zip(sums) {
        head.push(*how as u8);
        let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        head.extend_from_slice(&len.to_le_bytes());
        head.extend_from_slice(&sum.to_le_bytes());
    }
    let sum = XxHash3_64::oneshot(&head);
    head.extend_from_slice(&sum.to_le_bytes());
    stored.iter().for_each(|(_, bytes)| head.extend_from_slice(bytes));
    head
}

fn encode_delta(
    element: Element,
    tune: &[u8],
    base: &[u8],
    blocks: &[Block<'_>],
    head: &mut Vec<u8>,
) -> Vec<Option<Vec<u8>>> {
    let size = element.size_bytes();
    let Some(delta) = Delta::new(element, Delta::drop_bits(element, tune, base)) else {
        unreachable!("chosen for types of which there are distances alone")
    };
    let parts = in_parts(blocks).map(|blocks| {
        let mut counts = no_counts();
        let tokenize = |block: &Block<'_>| {
            let base = block.base.filter(|base| *base != block.tune)?;
            Some(delta.tokenize(block.tune, base, size, &mut counts))
        };
        let tokens: Vec<_> = blocks.iter().map(tokenize).collect();
        (tokens, counts)
    });
    let parts: Vec<_> = parts.collect();
    let mut counts = no_counts();
    for (_, part) in &parts {
        counts.iter_mut().zip(part).for_each(|(n, m)| *n = n.wrapping_add(*m));
    }
    let model = delta.model(&counts);
    model.write(head);
    let symbols = model.tables.encoder();
    let tokens: Vec<_> = parts.into_iter().flat_map(|(tokens, _)| tokens).collect();
    let code = |(block, tokens): (&Block<'_>, Option<delta::Tokenized>)| {
        Some(model.encode(&symbols, &tokens?, block.base?))
    };
    blocks.par_iter().zip(tokens).map(code).collect()
}

fn encode_planes(
    element: Element,
    mode: Mode,
    blocks: &[Block<'_>],
    head: &mut Vec<u8>,
) -> Vec<Option<Vec<u8>>> {
    let base = |block: &Block<'_>| -> Option<Option<Vec<u8>>> {
        if block.base == Some(block.tune) {
            return None;
        }
        Some(block.base.filter(|_| mode == Mode::Xor).map(<[u8]>::to_vec))
    };
    let counts = in_parts(blocks).map(|blocks| {
        let mut counts = planes::Counts::new(element);
        for block in blocks {
            if let Some(base) = base(block) {
                counts.add(element, block.tune, base.as_deref());
            }
        }
        counts
    });
    let mut all = planes::Counts::new(element);
    counts.collect::<Vec<_>>().iter().for_each(|counts| all.join(counts));
    let planes = all.planes();
    planes.write(head);
    let symbols = planes.tables.encoder();
    let code = |block: &Block<'_>| {
        let base = base(block)?;
        Some(planes.encode(&symbols, element, block.tune, base.as_deref()))
    };
    blocks.par_iter().map(code).collect()
}

/// The blocks in runs, one for each thread.
fn in_parts<'a>(blocks: &'a [Block<'a>]) -> impl IndexedParallelIterator<Item = &'a [Block<'a>]> {
    blocks.par_chunks(blocks.len().div_ceil(rayon::current_num_threads()).max(1))
}

/// The mode that is expected to be the smallest.
fn choose(element: Element, tune: &[u8], base: Option<&[u8]>) -> Mode {
    let size = element.size_bytes();
    let n = tune.len() / size;
    if n == 0 || base == Some(tune) {
        return Mode::Plain;
    }
    let mut planes = planes::Counts::new(element);
    let mut xor = planes::Counts::new(element);
    let mut counts = no_counts();
    let delta = base.and_then(|base| Delta::new(element, Delta::drop_bits(element, tune, base)));
    let (mut n_sampled, mut n_changed) = (0, 0);
    // What is the base's takes nothing in any mode: changes may be in a few rows alone.
    let run_bytes = SAMPLE_RUN * size;
    let changed = |run: &usize| {
        let (from, to) = (run * run_bytes, tune.len().min((run + 1) * run_bytes));
        base.is_none_or(|base| base[from..to] != tune[from..to])
    };
    let runs: Vec<usize> = (0..n.div_ceil(SAMPLE_RUN)).filter(changed).collect();
    let sample = (runs.len() / SAMPLED_PART).max(LEAST_SAMPLE / SAMPLE_RUN);
    for run in runs.iter().step_by((runs.len() / sample).max(1)) {
        let (from, to) = (run * run_bytes, tune.len().min((run + 1) * run_bytes));
        let tune = &tune[from..to];
        n_sampled += tune.len() / size;
        planes.add(element, tune, None);
        let Some(base) = base.map(|base| &base[from..to]) else { continue };
        xor.add(element, tune, Some(base));
        if let Some(delta) = &delta {
            delta.tokenize(tune, base, size, &mut counts);
        }
        let pairs = tune.chunks_exact(size).zip(base.chunks_exact(size));
        n_changed += pairs.filter(|(word, base)| word != base).count();
    }
    let mut best = (8.0 * (n_sampled * size) as f64, Mode::Plain);
    let mut offer = |bits: f64, mode| {
        if bits < best.0 {
            best = (bits, mode);
        }
    };
    offer(planes.bits(), Mode::Planes);
    if base.is_some() {
        offer(xor.bits(), Mode::Xor);
        if let Some(delta) = &delta {
            offer(delta.bits(&counts) + STREAM_BITS, Mode::Delta);
        }
        offer(8.0 * (n_changed * (size + 2)) as f64, Mode::Sparse);
    }
    best.1
}

/// What comes before the blocks.
struct Head<'a> {
    mode: Mode,
    model: Decoding,
    entries: &'a [[u8; ENTRY_BYTES]],
    blocks: &'a [u8],
}

/// What decoding a block needs.
enum Decoding {
    Nothing,
    Delta(Box<delta::Model>, Box<Slots>),
    Planes(planes::Planes, Box<Slots>),
}

impl<'a> Head<'a> {
    fn read(element: Element, bytes: &'a [u8], n_bytes: usize) -> Option<Self> {
        let (mode, rest) = bytes.split_first()?;
        let mode = *Mode::ALL.get(usize::from(*mode))?;
        let (model, rest) = match mode {
            Mode::Plain | Mode::Sparse => (Decoding::Nothing, rest),
            Mode::Delta => {
                let (model, rest) = delta::Model::read(rest, element)?;
                let slots = model.tables.slots();
                (Decoding::Delta(Box::new(model), slots), rest)
            }
            Mode::Xor | Mode::Planes => {
                let (planes, rest) = planes::Planes::read(rest, element)?;
                let slots = planes.tables.slots();
                (Decoding::Planes(planes, slots), rest)
            }
        };
        let n_blocks = n_bytes.div_ceil(BLOCK_BYTES);
        let (entries, rest) = rest.split_at_checked(n_blocks.checked_mul(ENTRY_BYTES)?)?;
        let (sum, blocks) = rest.split_first_chunk()?;
        let head = &bytes[..bytes.len() - rest.len()];
        let entries = entries.as_chunks().0;
        // A fuzzer would meet nothing else: it cannot make a sum right.
        let whole = cfg!(fuzzing) || u64::from_le_bytes(*sum) == XxHash3_64::oneshot(head);
        whole.then_some(Self { mode, model, entries, blocks })
    }
}

/// Decodes what [`encode`] made of as many bytes as `out` has, with the same `element` and base.
///
/// # Errors
/// When the bytes are not those, or the base is another; the error says which block. What `out`
/// holds then is undefined.
///
/// Panics when `out` is not a whole number of elements, or the base has more or fewer of them.
pub fn decode(
    element: Element,
    bytes: &[u8],
    base: Option<Base<'_>>,
    out: &mut [u8],
) -> Result<(), Error> {
    assert!(out.len().is_multiple_of(element.size_bytes()), "a whole number of elements");
    let head = Head::read(element, bytes, out.len()).ok_or(Error::Head)?;
    let base: Option<Cow<'_, [u8]>> = base.and_then(|base| convert::converted(base, element));
    let base = base.as_deref();
    assert!(base.is_none_or(|base| base.len() == out.len()), "as many elements in the base");
    let count = head.entries.len();
    let mut at = 0usize;
    let places = head.entries.iter().map(|entry| {
        let [how, a, b, c, d, sum @ ..] = *entry;
        let start = at;
        at = at.saturating_add(u32::from_le_bytes([a, b, c, d]) as usize);
        (how, start..at, u64::from_le_bytes(sum))
    });
    let places: Vec<_> = places.collect();
    let blocks = out.par_chunks_mut(BLOCK_BYTES).zip(places).enumerate();
    let decoded = blocks.map(|(index, (out, (how, place, sum)))| {
        let damaged = Error::Block { index, count };
        let how = Stored::ALL.get(usize::from(how)).ok_or(Error::Head)?;
        let bytes = head.blocks.get(place).ok_or(damaged.clone())?;
        let base = base.map(|base| &base[index * BLOCK_BYTES..][..out.len()]);
        let done = decode_block(&head, element, *how, bytes, base, out);
        match done {
            Ok(()) if XxHash3_64::oneshot(out) == sum => Ok(()),
            _ => Err(damaged),
        }
    });
    // The first that is damaged, whichever thread is faster.
    let decoded: Vec<Result<(), Error>> = decoded.collect();
    decoded.into_iter().collect::<Result<(), Error>>()?;
    if at == head.blocks.len() { Ok(()) } else { Err(Error::Head) }
}

fn decode_block(
    head: &Head<'_>,
    element: Element,
    how: Stored,
    bytes: &[u8],
    base: Option<&[u8]>,
    out: &mut [u8],
) -> Result<(), Damage> {
    let size = element.size_bytes();
    match (how, &head.model, head.mode) {
        (Stored::Plain, ..) if bytes.len() == out.len() => out.copy_from_slice(bytes),
        (Stored::Base, ..) if bytes.is_empty() => out.copy_from_slice(base.ok_or(Damage)?),
        (Stored::Coded, Decoding::Delta(model, slots), _) => {
            model.decode(slots, bytes, base.ok_or(Damage)?, size, out)?;
        }
        (Stored::Coded, Decoding::Planes(planes, slots), mode) => {
            let base = if mode == Mode::Xor { Some(base.ok_or(Damage)?) } else { None };
            planes.decode(slots, element, bytes, base, out)?;
        }
        (Stored::Coded, Decoding::Nothing, Mode::Sparse) => {
            sparse::decode(bytes, base.ok_or(Damage)?, size, out)?;
        }
        _ => return Err(Damage),
    }
    Ok(())
}
