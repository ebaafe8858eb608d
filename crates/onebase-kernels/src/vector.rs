//! The whole surface of instructions that the kernels use.

use half::{bf16, f16};
use onebase_tensor::MatrixRef;

use crate::rans::{STATES, Slots};

/// Virtual lanes of a vector; every backend has the same number.
pub const LANES: usize = 16;

/// Bytes of one row of one bit plane: a bit per input feature, the first in the
/// lowest bit of the first byte, padded with zeros to whole vectors of lanes.
pub const fn plane_bytes(in_features: usize) -> usize {
    in_features.div_ceil(LANES) * (LANES / 8)
}

/// Sixteen f32 lanes.
///
/// # Safety
/// The methods may execute instructions of the implementing type's set: call
/// them only inside [`Kernel::run`], which [`crate::Backend`] enters after
/// checking the processor. Pointers must be readable (writable) for sixteen
/// elements; alignment is not needed.
pub(crate) trait Lanes: Copy {
    /// Whether a tile may hold thirty vectors; otherwise it may hold ten.
    const MANY_REGISTERS: bool;

    unsafe fn splat(value: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn load_bf16(from: *const bf16) -> Self;
    unsafe fn load_f16(from: *const f16) -> Self;
    /// Sixteen signed bytes.
    unsafe fn load_i8(from: *const u8) -> Self;
    /// The low or the high nibbles of sixteen bytes, less eight.
    unsafe fn load_nibbles<const HIGH: bool>(from: *const u8) -> Self;
    unsafe fn store(self, to: *mut f32);
    /// Asks for the cache line at an address, which need not be readable.
    unsafe fn prefetch(at: *const u8);
    /// `self * by + plus`.
    unsafe fn mul_add(self, by: Self, plus: Self) -> Self;
    /// Adds `value` in the lanes whose bit of `mask` is set.
    unsafe fn mask_add(self, mask: u16, value: Self) -> Self;
    /// A bit for each lane that is greater than zero.
    unsafe fn positive(self) -> u16;
    /// The sum of the lanes: `i` and `i + 8`, then `i + 4`, `i + 2`, `i + 1`.
    unsafe fn sum(self) -> f32;
    /// Lane `i` is the sum of one lane of each table: four bits of word `i` say which, the
    /// lowest those of the first table. Neighbours are added first, then their sums. `words` must be
    /// readable for sixteen.
    unsafe fn choose(tables: &[Self; 8], words: *const u32) -> Self;
    /// Decodes groups of symbols for as long as there are words, see [`crate::rans`].
    #[inline(always)]
    unsafe fn rans_groups(
        slots: &Slots,
        states: &mut [u32; STATES],
        words: &[u8],
        contexts: &[[u8; STATES]],
        symbols: &mut [[u8; STATES]],
    ) -> (usize, usize) {
        crate::rans::groups(slots, states, words, contexts, symbols)
    }
}

/// One vector of each of `B` rows that are `stride` apart.
///
/// A function and not a closure: only what is inlined for certain is compiled
/// with the backend's instructions.
///
/// # Safety
/// As for [`Lanes`], for every row.
#[inline(always)]
pub(crate) unsafe fn load_rows<V: Lanes, const B: usize>(x: *const f32, stride: usize) -> [V; B] {
    // SAFETY: the caller's promise, row by row.
    unsafe {
        let mut rows = [V::splat(0.0); B];
        for (b, row) in rows.iter_mut().enumerate() {
            *row = V::load(x.add(b * stride));
        }
        rows
    }
}

/// The last, incomplete vector of `B` rows from `first`, filled up with zeros.
///
/// # Safety
/// As for [`Lanes`].
#[inline(always)]
pub(crate) unsafe fn load_tails<V: Lanes, const B: usize>(
    x: MatrixRef<'_>,
    first: usize,
) -> [V; B] {
    let whole = x.n_cols() - x.n_cols() % LANES;
    // SAFETY: the buffer has a vector's length.
    unsafe {
        let mut rows = [V::splat(0.0); B];
        for (b, row) in rows.iter_mut().enumerate() {
            let mut tail = [0.0; LANES];
            tail[..x.n_cols() - whole].copy_from_slice(&x.row(first + b)[whole..]);
            *row = V::load(tail.as_ptr());
        }
        rows
    }
}

/// A computation written over any lanes.
pub(crate) trait Kernel {
    type Output;
    /// # Safety
    /// The instructions of `V` are available, and whatever the kernel's own
    /// fields promise about their pointers holds.
    unsafe fn run<V: Lanes>(self) -> Self::Output;
}

/// A stored weight element that widens to f32.
pub(crate) trait Stored: Copy + Send + Sync {
    const ZERO: Self;
    /// # Safety
    /// As for [`Lanes`].
    unsafe fn load<V: Lanes>(from: *const Self) -> V;
}

impl Stored for f32 {
    const ZERO: Self = 0.0;
    #[inline(always)]
    unsafe fn load<V: Lanes>(from: *const Self) -> V {
        // SAFETY: the caller's promise is the callee's.
        unsafe { V::load(from) }
    }
}

impl Stored for bf16 {
    const ZERO: Self = bf16::ZERO;
    #[inline(always)]
    unsafe fn load<V: Lanes>(from: *const Self) -> V {
        // SAFETY: the caller's promise is the callee's.
        unsafe { V::load_bf16(from) }
    }
}

impl Stored for f16 {
    const ZERO: Self = f16::ZERO;
    #[inline(always)]
    unsafe fn load<V: Lanes>(from: *const Self) -> V {
        // SAFETY: the caller's promise is the callee's.
        unsafe { V::load_f16(from) }
    }
}

/// Sixteen lanes in an array: runs anywhere.
#[derive(Clone, Copy)]
pub(crate) struct Portable([f32; LANES]);

impl Lanes for Portable {
    const MANY_REGISTERS: bool = false;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        Self([value; LANES])
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: readable for sixteen elements by the trait's contract.
        Self(unsafe { from.cast::<[f32; LANES]>().read_unaligned() })
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> Self {
        // SAFETY: readable for sixteen elements by the trait's contract.
        let raw = unsafe { from.cast::<[u16; LANES]>().read_unaligned() };
        Self(raw.map(|bits| f32::from_bits(u32::from(bits) << 16)))
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> Self {
        // SAFETY: readable for sixteen elements by the trait's contract.
        let raw = unsafe { from.cast::<[u16; LANES]>().read_unaligned() };
        Self(raw.map(|bits| f16::from_bits(bits).to_f32()))
    }

    #[inline(always)]
    unsafe fn load_i8(from: *const u8) -> Self {
        // SAFETY: readable for sixteen elements by the trait's contract.
        let raw = unsafe { from.cast::<[u8; LANES]>().read_unaligned() };
        Self(raw.map(|byte| f32::from(byte.cast_signed())))
    }

    #[inline(always)]
    unsafe fn load_nibbles<const HIGH: bool>(from: *const u8) -> Self {
        // SAFETY: readable for sixteen elements by the trait's contract.
        let raw = unsafe { from.cast::<[u8; LANES]>().read_unaligned() };
        Self(raw.map(|byte| f32::from(if HIGH { byte >> 4 } else { byte & 15 }) - 8.0))
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: writable for sixteen elements by the trait's contract.
        unsafe { to.cast::<[f32; LANES]>().write_unaligned(self.0) }
    }

    #[inline(always)]
    unsafe fn prefetch(_: *const u8) {}

    #[inline(always)]
    unsafe fn mul_add(self, by: Self, plus: Self) -> Self {
        // Not `f32::mul_add`: without the instruction that is a library call.
        Self(std::array::from_fn(|i| self.0[i] * by.0[i] + plus.0[i]))
    }

    #[inline(always)]
    unsafe fn mask_add(self, mask: u16, value: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] + if mask >> i & 1 == 1 { value.0[i] } else { 0.0 }))
    }

    #[inline(always)]
    unsafe fn positive(self) -> u16 {
        self.0.iter().enumerate().fold(0, |bits, (i, v)| bits | u16::from(*v > 0.0) << i)
    }

    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        let mut lanes = self.0;
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                lanes[i] += lanes[i + half];
            }
        }
        lanes[0]
    }

    #[inline(always)]
    unsafe fn choose(tables: &[Self; 8], words: *const u32) -> Self {
        // SAFETY: readable for sixteen words by the trait's contract.
        let words = unsafe { words.cast::<[u32; LANES]>().read_unaligned() };
        Self(words.map(|word| {
            let at = |table: usize| tables[table].0[(word >> (4 * table) & 15) as usize];
            ((at(0) + at(1)) + (at(2) + at(3))) + ((at(4) + at(5)) + (at(6) + at(7)))
        }))
    }
}
