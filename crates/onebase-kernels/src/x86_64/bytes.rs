//! Sixty-four bytes in two AVX2 registers and in one AVX-512 register, the latter with and
//! without the dot products of VNNI.

use std::arch::x86_64::{
    __m256i, __m512i, _MM_HINT_T0, _mm_add_epi32, _mm_cvtsi32_si128, _mm_prefetch,
    _mm_storeu_si128, _mm256_add_epi16, _mm256_add_epi32, _mm256_and_si256, _mm256_castsi256_si128,
    _mm256_extracti128_si256, _mm256_hadd_epi32, _mm256_loadu_si256, _mm256_madd_epi16,
    _mm256_maddubs_epi16, _mm256_or_si256, _mm256_set1_epi8, _mm256_set1_epi16, _mm256_set1_epi32,
    _mm256_setzero_si256, _mm256_sll_epi16, _mm256_slli_epi16, _mm256_srai_epi16, _mm256_srl_epi16,
    _mm256_srli_epi16, _mm256_storeu_si256, _mm512_add_epi32, _mm512_and_si512,
    _mm512_castsi512_si256, _mm512_dpbusd_epi32, _mm512_extracti64x4_epi64, _mm512_loadu_si512,
    _mm512_madd_epi16, _mm512_maddubs_epi16, _mm512_maskz_loadu_epi8, _mm512_or_si512,
    _mm512_set1_epi8, _mm512_set1_epi16, _mm512_set1_epi32, _mm512_setzero_si512,
    _mm512_slli_epi16, _mm512_srai_epi16, _mm512_srli_epi16, _mm512_storeu_si512,
    _mm512_unpackhi_epi32, _mm512_unpackhi_epi64, _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
};

use crate::bytes::{ByteKernel, Bytes, LINE, ROWS};

/// Whether [`with_avx512_vnni`] may run here.
pub(crate) fn has_avx512_vnni() -> bool {
    super::has_avx512() && is_x86_feature_detected!("avx512vnni")
}

/// Runs a kernel over bytes in AVX2 registers.
///
/// # Safety
/// [`super::has_avx2`] is true, and the kernel's own promises hold.
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2,lzcnt")]
pub(crate) unsafe fn with_avx2<K: ByteKernel>(kernel: K) -> K::Output {
    // SAFETY: this function's features are the vectors' instructions.
    unsafe { kernel.run::<Avx2Bytes>() }
}

/// Runs a kernel over bytes in AVX-512 registers.
///
/// # Safety
/// [`super::has_avx512`] is true, and the kernel's own promises hold.
#[target_feature(
    enable = "avx2,fma,f16c,bmi1,bmi2,lzcnt,avx512f,avx512bw,avx512dq,avx512vl,avx512cd"
)]
pub(crate) unsafe fn with_avx512<K: ByteKernel>(kernel: K) -> K::Output {
    // SAFETY: this function's features are the vectors' instructions.
    unsafe { kernel.run::<Avx512Bytes<false>>() }
}

/// Runs a kernel over bytes in AVX-512 registers with dot products.
///
/// # Safety
/// [`has_avx512_vnni`] is true, and the kernel's own promises hold.
#[target_feature(
    enable = "avx2,fma,f16c,bmi1,bmi2,lzcnt,avx512f,avx512bw,avx512dq,avx512vl,avx512cd,avx512vnni"
)]
pub(crate) unsafe fn with_avx512_vnni<K: ByteKernel>(kernel: K) -> K::Output {
    // SAFETY: this function's features are the vectors' instructions.
    unsafe { kernel.run::<Avx512Bytes<true>>() }
}

/// Two registers of thirty-two.
#[derive(Clone, Copy)]
pub(crate) struct Avx2Bytes(__m256i, __m256i);

// SAFETY (all blocks below): `Bytes` methods are called only where the features are enabled, and
// pointers are good for sixty-four bytes; the loads and stores used need no alignment.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Bytes for Avx2Bytes {
    type Sums = __m256i;
    type Rows = (__m256i, __m256i);

    const MANY_REGISTERS: bool = false;

    #[inline(always)]
    unsafe fn load(from: *const u8) -> Self {
        unsafe {
            Self(_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(LINE / 2).cast()))
        }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut u8) {
        unsafe {
            _mm256_storeu_si256(to.cast(), self.0);
            _mm256_storeu_si256(to.add(LINE / 2).cast(), self.1);
        }
    }

    #[inline(always)]
    unsafe fn prefetch(at: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }

    #[inline(always)]
    unsafe fn nibbles(self) -> [Self; 2] {
        unsafe {
            let mask = _mm256_set1_epi8(15);
            [
                Self(_mm256_and_si256(self.0, mask), _mm256_and_si256(self.1, mask)),
                Self(
                    _mm256_and_si256(_mm256_srli_epi16::<4>(self.0), mask),
                    _mm256_and_si256(_mm256_srli_epi16::<4>(self.1), mask),
                ),
            ]
        }
    }

    #[inline(always)]
    unsafe fn no_sums() -> Self::Sums {
        unsafe { _mm256_setzero_si256() }
    }

    #[inline(always)]
    unsafe fn dot_nibbles(self, nibbles: Self, plus: Self::Sums) -> Self::Sums {
        unsafe {
            // Four products of at most 255 · 15: sixteen bits hold them.
            let pairs = _mm256_add_epi16(
                _mm256_maddubs_epi16(self.0, nibbles.0),
                _mm256_maddubs_epi16(self.1, nibbles.1),
            );
            _mm256_add_epi32(plus, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        }
    }

    #[inline(always)]
    unsafe fn dot(self, signed: Self, plus: Self::Sums) -> Self::Sums {
        unsafe { dot256(self.1, signed.1, dot256(self.0, signed.0, plus)) }
    }

    #[inline(always)]
    unsafe fn add_up([a, b, c, d]: [Self::Sums; 4]) -> [i32; 4] {
        unsafe {
            let all = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
            fold128(all)
        }
    }

    #[inline(always)]
    unsafe fn repeat(from: *const u8) -> Self {
        unsafe {
            let four = _mm256_set1_epi32(from.cast::<i32>().read_unaligned());
            Self(four, four)
        }
    }

    #[inline(always)]
    unsafe fn shift<const N: u32>(self) -> Self {
        unsafe {
            let count = _mm_cvtsi32_si128(const { N.cast_signed() });
            Self(_mm256_srl_epi16(self.0, count), _mm256_srl_epi16(self.1, count))
        }
    }

    #[inline(always)]
    unsafe fn low_bits<const N: u32>(self) -> Self {
        unsafe {
            let mask = _mm256_set1_epi8(const { (1i8 << N) - 1 });
            Self(_mm256_and_si256(self.0, mask), _mm256_and_si256(self.1, mask))
        }
    }

    #[inline(always)]
    unsafe fn or_up<const N: u32>(self, other: Self) -> Self {
        unsafe {
            let count = _mm_cvtsi32_si128(const { N.cast_signed() });
            Self(
                _mm256_or_si256(self.0, _mm256_sll_epi16(other.0, count)),
                _mm256_or_si256(self.1, _mm256_sll_epi16(other.1, count)),
            )
        }
    }

    #[inline(always)]
    unsafe fn no_rows() -> Self::Rows {
        unsafe { (_mm256_setzero_si256(), _mm256_setzero_si256()) }
    }

    #[inline(always)]
    unsafe fn dot_rows<const SMALL: bool>(self, signed: Self, plus: Self::Rows) -> Self::Rows {
        unsafe {
            if !SMALL {
                return (dot256(self.0, signed.0, plus.0), dot256(self.1, signed.1, plus.1));
            }
            // Two products of at most 127 · 128: sixteen bits hold them.
            let ones = _mm256_set1_epi16(1);
            let pairs =
                (_mm256_maddubs_epi16(self.0, signed.0), _mm256_maddubs_epi16(self.1, signed.1));
            (
                _mm256_add_epi32(plus.0, _mm256_madd_epi16(pairs.0, ones)),
                _mm256_add_epi32(plus.1, _mm256_madd_epi16(pairs.1, ones)),
            )
        }
    }

    #[inline(always)]
    unsafe fn rows(sums: Self::Rows) -> [i32; ROWS] {
        let mut out = [0; ROWS];
        unsafe {
            _mm256_storeu_si256(out.as_mut_ptr().cast(), sums.0);
            _mm256_storeu_si256(out.as_mut_ptr().add(ROWS / 2).cast(), sums.1);
        }
        out
    }
}

/// Products of two saturate sixteen bits as `maddubs` adds them; even and odd bytes widened do not.
///
/// # Safety
/// AVX2 is available.
#[inline(always)]
unsafe fn dot256(codes: __m256i, signed: __m256i, plus: __m256i) -> __m256i {
    // SAFETY: register operations of the feature the caller promises.
    unsafe {
        let even = _mm256_madd_epi16(
            _mm256_and_si256(codes, _mm256_set1_epi16(0xff)),
            _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(signed)),
        );
        let odd = _mm256_madd_epi16(_mm256_srli_epi16::<8>(codes), _mm256_srai_epi16::<8>(signed));
        _mm256_add_epi32(plus, _mm256_add_epi32(even, odd))
    }
}

/// Adds the halves of eight lanes.
///
/// # Safety
/// AVX2 is available.
#[inline(always)]
unsafe fn fold128(all: __m256i) -> [i32; 4] {
    let mut out = [0; 4];
    // SAFETY: register operations of the feature the caller promises, and a store of their size.
    unsafe {
        let sums = _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256::<1>(all));
        _mm_storeu_si128(out.as_mut_ptr().cast(), sums);
    }
    out
}

/// One register of sixty-four.
#[derive(Clone, Copy)]
pub(crate) struct Avx512Bytes<const VNNI: bool>(__m512i);

// SAFETY: as for `Avx2Bytes`; VNNI is used only where the kernel was entered with it.
#[allow(clippy::undocumented_unsafe_blocks)]
impl<const VNNI: bool> Bytes for Avx512Bytes<VNNI> {
    type Sums = __m512i;
    type Rows = __m512i;

    const MANY_REGISTERS: bool = true;

    #[inline(always)]
    unsafe fn load(from: *const u8) -> Self {
        unsafe { Self(_mm512_loadu_si512(from.cast())) }
    }

    #[inline(always)]
    unsafe fn load_first(from: *const u8, n: usize) -> Self {
        // At most sixty-four.
        #[allow(clippy::cast_possible_truncation)]
        let mask = u64::MAX.checked_shr((LINE - n) as u32).unwrap_or(0);
        unsafe { Self(_mm512_maskz_loadu_epi8(mask, from.cast())) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut u8) {
        unsafe { _mm512_storeu_si512(to.cast(), self.0) }
    }

    #[inline(always)]
    unsafe fn prefetch(at: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }

    #[inline(always)]
    unsafe fn nibbles(self) -> [Self; 2] {
        unsafe {
            let mask = _mm512_set1_epi8(15);
            [
                Self(_mm512_and_si512(self.0, mask)),
                Self(_mm512_and_si512(_mm512_srli_epi16::<4>(self.0), mask)),
            ]
        }
    }

    #[inline(always)]
    unsafe fn no_sums() -> Self::Sums {
        unsafe { _mm512_setzero_si512() }
    }

    #[inline(always)]
    unsafe fn dot_nibbles(self, nibbles: Self, plus: Self::Sums) -> Self::Sums {
        unsafe {
            if VNNI {
                return _mm512_dpbusd_epi32(plus, self.0, nibbles.0);
            }
            // Two products of at most 255 · 15: sixteen bits hold them.
            let pairs = _mm512_maddubs_epi16(self.0, nibbles.0);
            _mm512_add_epi32(plus, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))
        }
    }

    #[inline(always)]
    unsafe fn dot(self, signed: Self, plus: Self::Sums) -> Self::Sums {
        unsafe {
            if VNNI {
                return _mm512_dpbusd_epi32(plus, self.0, signed.0);
            }
            // As in `dot256`.
            let even = _mm512_madd_epi16(
                _mm512_and_si512(self.0, _mm512_set1_epi16(0xff)),
                _mm512_srai_epi16::<8>(_mm512_slli_epi16::<8>(signed.0)),
            );
            let odd =
                _mm512_madd_epi16(_mm512_srli_epi16::<8>(self.0), _mm512_srai_epi16::<8>(signed.0));
            _mm512_add_epi32(plus, _mm512_add_epi32(even, odd))
        }
    }

    #[inline(always)]
    unsafe fn add_up([a, b, c, d]: [Self::Sums; 4]) -> [i32; 4] {
        unsafe {
            let ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
            let cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
            let all =
                _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
            let high = _mm512_extracti64x4_epi64::<1>(all);
            fold128(_mm256_add_epi32(_mm512_castsi512_si256(all), high))
        }
    }

    #[inline(always)]
    unsafe fn repeat(from: *const u8) -> Self {
        unsafe { Self(_mm512_set1_epi32(from.cast::<i32>().read_unaligned())) }
    }

    #[inline(always)]
    unsafe fn shift<const N: u32>(self) -> Self {
        unsafe { Self(_mm512_srli_epi16::<N>(self.0)) }
    }

    #[inline(always)]
    unsafe fn low_bits<const N: u32>(self) -> Self {
        unsafe { Self(_mm512_and_si512(self.0, _mm512_set1_epi8(const { (1i8 << N) - 1 }))) }
    }

    #[inline(always)]
    unsafe fn or_up<const N: u32>(self, other: Self) -> Self {
        unsafe { Self(_mm512_or_si512(self.0, _mm512_slli_epi16::<N>(other.0))) }
    }

    #[inline(always)]
    unsafe fn no_rows() -> Self::Rows {
        unsafe { _mm512_setzero_si512() }
    }

    #[inline(always)]
    unsafe fn dot_rows<const SMALL: bool>(self, signed: Self, plus: Self::Rows) -> Self::Rows {
        unsafe {
            if VNNI || !SMALL {
                return self.dot(signed, plus);
            }
            // Two products of at most 127 · 128: sixteen bits hold them.
            let pairs = _mm512_maddubs_epi16(self.0, signed.0);
            _mm512_add_epi32(plus, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))
        }
    }

    #[inline(always)]
    unsafe fn rows(sums: Self::Rows) -> [i32; ROWS] {
        let mut out = [0; ROWS];
        unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), sums) };
        out
    }
}
