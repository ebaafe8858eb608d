//! Instructions on sixty-four bytes at a time: what products of integers use.
//!
//! Sums of integers are exact, so that which lane adds up what is an instruction set's own
//! affair, and all give the same numbers.

/// Bytes of a vector, and of a line of the cache.
pub(crate) const LINE: usize = 64;

/// Groups of four bytes of a vector.
pub(crate) const ROWS: usize = LINE / 4;

/// A vector's bytes where a line of the cache begins.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(crate) struct Line(pub(crate) [u8; LINE]);

impl Line {
    pub(crate) const ZERO: Self = Self([0; LINE]);
}

/// The bytes of lines, one after the other.
pub(crate) fn bytes(lines: &[Line]) -> &[u8] {
    // SAFETY: a line is its bytes, without padding.
    unsafe { std::slice::from_raw_parts(lines.as_ptr().cast(), size_of_val(lines)) }
}

/// [`bytes`], to be written.
pub(crate) fn bytes_mut(lines: &mut [Line]) -> &mut [u8] {
    // SAFETY: a line is its bytes, without padding, and any are valid.
    unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), size_of_val(lines)) }
}

/// Sixty-four bytes.
///
/// # Safety
/// As for [`crate::vector::Lanes`]: the methods are called only inside [`ByteKernel::run`], and
/// pointers are good for sixty-four bytes, whatever their alignment.
pub(crate) trait Bytes: Copy {
    /// Sums of products of bytes, in lanes of 32 bits that wrap around.
    type Sums: Copy;

    /// Sixteen sums, one for each four bytes.
    type Rows: Copy;

    /// Whether a tile may hold thirty vectors; otherwise it may hold ten.
    const MANY_REGISTERS: bool;

    unsafe fn load(from: *const u8) -> Self;
    /// The first `n` of sixty-four bytes; only they need be there, and the others are zero.
    #[inline(always)]
    unsafe fn load_first(from: *const u8, n: usize) -> Self {
        let mut line = [0; LINE];
        // SAFETY: the caller's promise; the buffer has a vector's length.
        unsafe {
            std::ptr::copy_nonoverlapping(from, line.as_mut_ptr(), n);
            Self::load(line.as_ptr())
        }
    }
    unsafe fn store(self, to: *mut u8);
    /// Asks for the cache line at an address, which need not be readable.
    unsafe fn prefetch(at: *const u8);
    /// The low and the high four bits of each byte.
    unsafe fn nibbles(self) -> [Self; 2];
    unsafe fn no_sums() -> Self::Sums;
    /// Adds the products of unsigned bytes with `nibbles`, each at most fifteen.
    unsafe fn dot_nibbles(self, nibbles: Self, plus: Self::Sums) -> Self::Sums;
    /// Adds the products of unsigned bytes with signed ones.
    unsafe fn dot(self, signed: Self, plus: Self::Sums) -> Self::Sums;
    /// The sum of all lanes, for four at a time.
    unsafe fn add_up(four: [Self::Sums; 4]) -> [i32; 4];
    /// The same four bytes sixteen times; only they need be there.
    unsafe fn repeat(from: *const u8) -> Self;
    /// Moves bits down by `N`; of each byte the `N` high bits are anything.
    unsafe fn shift<const N: u32>(self) -> Self;
    /// The `N` low bits of each byte.
    unsafe fn low_bits<const N: u32>(self) -> Self;
    /// The bits of `other`, `N` up in each byte, where they fit, besides those of `self`.
    unsafe fn or_up<const N: u32>(self, other: Self) -> Self;
    unsafe fn no_rows() -> Self::Rows;
    /// Adds the products of unsigned bytes, `SMALL` ones below 128, with signed ones.
    unsafe fn dot_rows<const SMALL: bool>(self, signed: Self, plus: Self::Rows) -> Self::Rows;
    unsafe fn rows(sums: Self::Rows) -> [i32; ROWS];
}

/// A computation written over any vectors of bytes.
pub(crate) trait ByteKernel {
    type Output;
    /// # Safety
    /// The instructions of `V` are available, and whatever the kernel's own
    /// fields promise about their pointers holds.
    unsafe fn run<V: Bytes>(self) -> Self::Output;
}

/// Sixty-four bytes in an array: runs anywhere.
#[derive(Clone, Copy)]
pub(crate) struct PortableBytes([u8; LINE]);

impl Bytes for PortableBytes {
    type Sums = [i32; 4];
    type Rows = [i32; ROWS];

    const MANY_REGISTERS: bool = false;

    #[inline(always)]
    unsafe fn load(from: *const u8) -> Self {
        // SAFETY: readable by the trait's contract.
        Self(unsafe { from.cast::<[u8; LINE]>().read_unaligned() })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut u8) {
        // SAFETY: writable by the trait's contract.
        unsafe { to.cast::<[u8; LINE]>().write_unaligned(self.0) }
    }

    #[inline(always)]
    unsafe fn prefetch(_: *const u8) {}

    #[inline(always)]
    unsafe fn nibbles(self) -> [Self; 2] {
        [Self(self.0.map(|byte| byte & 15)), Self(self.0.map(|byte| byte >> 4))]
    }

    #[inline(always)]
    unsafe fn no_sums() -> Self::Sums {
        [0; 4]
    }

    #[inline(always)]
    unsafe fn dot_nibbles(self, nibbles: Self, plus: Self::Sums) -> Self::Sums {
        // SAFETY: plain code; a nibble is the same as a signed byte.
        unsafe { self.dot(nibbles, plus) }
    }

    #[inline(always)]
    unsafe fn dot(self, signed: Self, mut plus: Self::Sums) -> Self::Sums {
        let pairs = self.0.as_chunks::<4>().0.iter().zip(signed.0.as_chunks::<4>().0);
        for (codes, weights) in pairs {
            for (sum, (code, weight)) in plus.iter_mut().zip(codes.iter().zip(weights)) {
                let product = i32::from(*code) * i32::from(weight.cast_signed());
                *sum = sum.wrapping_add(product);
            }
        }
        plus
    }

    #[inline(always)]
    unsafe fn add_up(four: [Self::Sums; 4]) -> [i32; 4] {
        four.map(|sums| sums.iter().fold(0i32, |all, sum| all.wrapping_add(*sum)))
    }

    #[inline(always)]
    unsafe fn repeat(from: *const u8) -> Self {
        // SAFETY: readable by the trait's contract.
        let four = unsafe { from.cast::<[u8; 4]>().read_unaligned() };
        Self(std::array::from_fn(|i| four[i % 4]))
    }

    #[inline(always)]
    unsafe fn shift<const N: u32>(self) -> Self {
        Self(self.0.map(|byte| byte >> N))
    }

    #[inline(always)]
    unsafe fn low_bits<const N: u32>(self) -> Self {
        Self(self.0.map(|byte| byte & (u8::MAX >> (u8::BITS - N))))
    }

    #[inline(always)]
    unsafe fn or_up<const N: u32>(self, other: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] | other.0[i] << N))
    }

    #[inline(always)]
    unsafe fn no_rows() -> Self::Rows {
        [0; ROWS]
    }

    #[inline(always)]
    unsafe fn dot_rows<const SMALL: bool>(self, signed: Self, mut plus: Self::Rows) -> Self::Rows {
        // In lanes of a sum's size, so that the compiler has vectors of them.
        let words = |bytes: [u8; LINE]| -> [u32; ROWS] {
            std::array::from_fn(|i| u32::from_le_bytes(bytes.as_chunks::<4>().0[i]))
        };
        let (codes, weights) = (words(self.0), words(signed.0));
        for up in [0, 8, 16, 24] {
            for (sum, (code, weight)) in plus.iter_mut().zip(codes.iter().zip(&weights)) {
                let code = (code >> up & 0xff).cast_signed();
                let weight = (weight << (24 - up)).cast_signed() >> 24;
                *sum = sum.wrapping_add(code * weight);
            }
        }
        plus
    }

    #[inline(always)]
    unsafe fn rows(sums: Self::Rows) -> [i32; ROWS] {
        sums
    }
}
