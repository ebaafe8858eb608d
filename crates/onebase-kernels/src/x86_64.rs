//! The lanes in two AVX2 registers and in one AVX-512 register.

pub(crate) mod bytes;

use std::arch::x86_64::{
    __m256, __m256i, __m512, __m512i, _CMP_GT_OQ, _MM_HINT_T0, _mm_add_ps, _mm_add_ss,
    _mm_and_si128, _mm_cvtss_f32, _mm_loadu_si128, _mm_movehl_ps, _mm_prefetch, _mm_set1_epi8,
    _mm_shuffle_ps, _mm_srli_epi16, _mm_srli_si128, _mm_storeu_si128, _mm_sub_epi8, _mm256_add_ps,
    _mm256_and_ps, _mm256_and_si256, _mm256_blendv_ps, _mm256_castps256_ps128, _mm256_castsi256_ps,
    _mm256_cmp_ps, _mm256_cmpeq_epi32, _mm256_cvtepi8_epi32, _mm256_cvtepi32_ps,
    _mm256_cvtepu16_epi32, _mm256_cvtph_ps, _mm256_extractf128_ps, _mm256_fmadd_ps,
    _mm256_loadu_ps, _mm256_loadu_si256, _mm256_movemask_ps, _mm256_permutevar8x32_ps,
    _mm256_set1_epi32, _mm256_set1_ps, _mm256_setr_epi32, _mm256_setzero_ps, _mm256_slli_epi32,
    _mm256_srli_epi32, _mm256_storeu_ps, _mm512_add_epi32, _mm512_add_ps, _mm512_and_si512,
    _mm512_castps512_ps256, _mm512_castsi512_ps, _mm512_cmp_ps_mask, _mm512_cmplt_epu32_mask,
    _mm512_cvtepi8_epi32, _mm512_cvtepi32_epi8, _mm512_cvtepi32_ps, _mm512_cvtepu8_epi32,
    _mm512_cvtepu16_epi32, _mm512_cvtph_ps, _mm512_extractf32x8_ps, _mm512_fmadd_ps,
    _mm512_i32gather_epi32, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_mask_add_ps,
    _mm512_mask_mov_epi32, _mm512_maskz_expand_epi32, _mm512_mullo_epi32, _mm512_or_si512,
    _mm512_permutexvar_ps, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setr_ps, _mm512_setzero_ps,
    _mm512_slli_epi32, _mm512_srli_epi32, _mm512_storeu_ps, _mm512_storeu_si512,
};

use half::{bf16, f16};

use crate::rans::{GROUP_BYTES, SCALE_BITS, STATES, Slots};
use crate::vector::{Kernel, LANES, Lanes};

/// Whether [`with_avx2`] may run here.
pub(crate) fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
        && is_x86_feature_detected!("bmi1")
        && is_x86_feature_detected!("bmi2")
        && is_x86_feature_detected!("lzcnt")
}

/// Whether [`with_avx512`] may run here.
pub(crate) fn has_avx512() -> bool {
    has_avx2()
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512cd")
}

/// Runs a kernel over AVX2 lanes.
///
/// # Safety
/// [`has_avx2`] is true, and the kernel's own promises hold.
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2,lzcnt")]
pub(crate) unsafe fn with_avx2<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: this function's features are the lanes' instructions.
    unsafe { kernel.run::<Avx2>() }
}

/// Runs a kernel over AVX-512 lanes.
///
/// # Safety
/// [`has_avx512`] is true, and the kernel's own promises hold.
#[target_feature(
    enable = "avx2,fma,f16c,bmi1,bmi2,lzcnt,avx512f,avx512bw,avx512dq,avx512vl,avx512cd"
)]
pub(crate) unsafe fn with_avx512<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: this function's features are the lanes' instructions.
    unsafe { kernel.run::<Avx512>() }
}

/// The last steps of a lane sum, from eight lanes down.
///
/// # Safety
/// AVX is available.
#[inline(always)]
unsafe fn sum8(v: __m256) -> f32 {
    // SAFETY: register operations of the feature the caller promises.
    unsafe {
        let four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        let one = _mm_add_ss(two, _mm_shuffle_ps::<1>(two, two));
        _mm_cvtss_f32(one)
    }
}

/// Two registers of eight.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(__m256, __m256);

// SAFETY (all blocks below): `Lanes` methods are called only where the features
// are enabled, and pointers are good for sixteen elements; the loads and stores
// used need no alignment.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Lanes for Avx2 {
    const MANY_REGISTERS: bool = false;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        unsafe { Self(_mm256_set1_ps(value), _mm256_set1_ps(value)) }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        unsafe { Self(_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(LANES / 2))) }
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> Self {
        unsafe {
            let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.add(LANES / 2).cast()));
            Self(
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(low)),
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high)),
            )
        }
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> Self {
        unsafe {
            Self(
                _mm256_cvtph_ps(_mm_loadu_si128(from.cast())),
                _mm256_cvtph_ps(_mm_loadu_si128(from.add(LANES / 2).cast())),
            )
        }
    }

    #[inline(always)]
    unsafe fn load_i8(from: *const u8) -> Self {
        unsafe {
            let bytes = _mm_loadu_si128(from.cast());
            Self(
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128::<8>(bytes))),
            )
        }
    }

    #[inline(always)]
    unsafe fn load_nibbles<const HIGH: bool>(from: *const u8) -> Self {
        unsafe {
            let bytes = _mm_loadu_si128(from.cast());
            let bytes = if HIGH { _mm_srli_epi16::<4>(bytes) } else { bytes };
            let nibbles = _mm_and_si128(bytes, _mm_set1_epi8(15));
            let codes = _mm_sub_epi8(nibbles, _mm_set1_epi8(8));
            Self(
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes)),
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128::<8>(codes))),
            )
        }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        unsafe {
            _mm256_storeu_ps(to, self.0);
            _mm256_storeu_ps(to.add(LANES / 2), self.1);
        }
    }

    #[inline(always)]
    unsafe fn prefetch(at: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }

    #[inline(always)]
    unsafe fn mul_add(self, by: Self, plus: Self) -> Self {
        unsafe {
            Self(_mm256_fmadd_ps(self.0, by.0, plus.0), _mm256_fmadd_ps(self.1, by.1, plus.1))
        }
    }

    #[inline(always)]
    unsafe fn mask_add(self, mask: u16, value: Self) -> Self {
        unsafe {
            let bits = _mm256_set1_epi32(i32::from(mask));
            let low = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
            let high = _mm256_slli_epi32::<8>(low);
            let low = _mm256_cmpeq_epi32(_mm256_and_si256(bits, low), low);
            let high = _mm256_cmpeq_epi32(_mm256_and_si256(bits, high), high);
            Self(
                _mm256_add_ps(self.0, _mm256_and_ps(_mm256_castsi256_ps(low), value.0)),
                _mm256_add_ps(self.1, _mm256_and_ps(_mm256_castsi256_ps(high), value.1)),
            )
        }
    }

    #[inline(always)]
    unsafe fn positive(self) -> u16 {
        unsafe {
            let zero = _mm256_setzero_ps();
            let low = _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_GT_OQ>(self.0, zero));
            let high = _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_GT_OQ>(self.1, zero));
            // Eight bits each.
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
            {
                (low | high << 8) as u16
            }
        }
    }

    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        unsafe { sum8(_mm256_add_ps(self.0, self.1)) }
    }

    #[inline(always)]
    unsafe fn choose(tables: &[Self; 8], words: *const u32) -> Self {
        unsafe {
            let half = |words: __m256i| {
                // The three low bits of four choose in either half of a table, the fourth the
                // half, from where the sign of a float is.
                macro_rules! at {
                    ($table:literal) => {{
                        let index = _mm256_srli_epi32::<{ 4 * $table }>(words);
                        let table = &tables[$table];
                        let low = _mm256_permutevar8x32_ps(table.0, index);
                        let high = _mm256_permutevar8x32_ps(table.1, index);
                        let which = _mm256_slli_epi32::<{ 28 - 4 * $table }>(words);
                        _mm256_blendv_ps(low, high, _mm256_castsi256_ps(which))
                    }};
                }
                let first =
                    _mm256_add_ps(_mm256_add_ps(at!(0), at!(1)), _mm256_add_ps(at!(2), at!(3)));
                let last =
                    _mm256_add_ps(_mm256_add_ps(at!(4), at!(5)), _mm256_add_ps(at!(6), at!(7)));
                _mm256_add_ps(first, last)
            };
            Self(
                half(_mm256_loadu_si256(words.cast())),
                half(_mm256_loadu_si256(words.add(LANES / 2).cast())),
            )
        }
    }
}

/// One register of sixteen.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(__m512);

// SAFETY: as for `Avx2`.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Lanes for Avx512 {
    const MANY_REGISTERS: bool = true;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        unsafe { Self(_mm512_set1_ps(value)) }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        unsafe { Self(_mm512_loadu_ps(from)) }
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> Self {
        unsafe {
            let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits)))
        }
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> Self {
        unsafe { Self(_mm512_cvtph_ps(_mm256_loadu_si256(from.cast()))) }
    }

    #[inline(always)]
    unsafe fn load_i8(from: *const u8) -> Self {
        unsafe { Self(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast())))) }
    }

    #[inline(always)]
    unsafe fn load_nibbles<const HIGH: bool>(from: *const u8) -> Self {
        unsafe {
            let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast()));
            let bytes = if HIGH { _mm512_srli_epi32::<4>(bytes) } else { bytes };
            // The four low bits choose.
            let weights = _mm512_setr_ps(
                -8.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0,
                7.0,
            );
            Self(_mm512_permutexvar_ps(bytes, weights))
        }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        unsafe { _mm512_storeu_ps(to, self.0) }
    }

    #[inline(always)]
    unsafe fn prefetch(at: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }

    #[inline(always)]
    unsafe fn mul_add(self, by: Self, plus: Self) -> Self {
        unsafe { Self(_mm512_fmadd_ps(self.0, by.0, plus.0)) }
    }

    #[inline(always)]
    unsafe fn mask_add(self, mask: u16, value: Self) -> Self {
        unsafe { Self(_mm512_mask_add_ps(self.0, mask, self.0, value.0)) }
    }

    #[inline(always)]
    unsafe fn positive(self) -> u16 {
        unsafe { _mm512_cmp_ps_mask::<_CMP_GT_OQ>(self.0, _mm512_setzero_ps()) }
    }

    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        unsafe {
            let high = _mm512_extractf32x8_ps::<1>(self.0);
            sum8(_mm256_add_ps(_mm512_castps512_ps256(self.0), high))
        }
    }

    #[inline(always)]
    unsafe fn choose(tables: &[Self; 8], words: *const u32) -> Self {
        unsafe {
            let words = _mm512_loadu_si512(words.cast());
            macro_rules! at {
                ($table:literal) => {
                    _mm512_permutexvar_ps(
                        _mm512_srli_epi32::<{ 4 * $table }>(words),
                        tables[$table].0,
                    )
                };
            }
            let first = _mm512_add_ps(_mm512_add_ps(at!(0), at!(1)), _mm512_add_ps(at!(2), at!(3)));
            let last = _mm512_add_ps(_mm512_add_ps(at!(4), at!(5)), _mm512_add_ps(at!(6), at!(7)));
            Self(_mm512_add_ps(first, last))
        }
    }

    #[inline(always)]
    unsafe fn rans_groups(
        slots: &Slots,
        states: &mut [u32; STATES],
        words: &[u8],
        contexts: &[[u8; STATES]],
        symbols: &mut [[u8; STATES]],
    ) -> (usize, usize) {
        unsafe {
            let half = STATES / 2;
            let mut low = _mm512_loadu_si512(states.as_ptr().cast());
            let mut high = _mm512_loadu_si512(states.as_ptr().add(half).cast());
            let (mut n, mut used) = (0, 0);
            for (contexts, symbols) in contexts.iter().zip(symbols) {
                if words.len() - used < GROUP_BYTES {
                    break;
                }
                // Each half reads at most half of a group's words.
                let at = words.as_ptr().add(used);
                let first = rans_half(slots, &mut low, at, contexts.as_ptr(), symbols.as_mut_ptr());
                let second = rans_half(
                    slots,
                    &mut high,
                    at.add(first),
                    contexts.as_ptr().add(half),
                    symbols.as_mut_ptr().add(half),
                );
                used += first + second;
                n += 1;
            }
            _mm512_storeu_si512(states.as_mut_ptr().cast(), low);
            _mm512_storeu_si512(states.as_mut_ptr().add(half).cast(), high);
            (n, used)
        }
    }
}

/// Decodes a symbol for each of sixteen states; gives the bytes of the words it read.
///
/// # Safety
/// AVX-512 is available; 32 bytes at `words`, 16 at `contexts` and at `symbols` are there.
#[inline(always)]
unsafe fn rans_half(
    slots: &Slots,
    states: &mut __m512i,
    words: *const u8,
    contexts: *const u8,
    symbols: *mut u8,
) -> usize {
    // SAFETY: loads and stores of as many bytes as the caller promises; a place in the slots has
    // four bits of context and those of the scale.
    unsafe {
        let scale = _mm512_set1_epi32((1 << SCALE_BITS) - 1);
        let contexts = _mm512_cvtepu8_epi32(_mm_loadu_si128(contexts.cast()));
        let contexts = _mm512_and_si512(contexts, _mm512_set1_epi32(15));
        let contexts = _mm512_slli_epi32::<SCALE_BITS>(contexts);
        let places = _mm512_or_si512(contexts, _mm512_and_si512(*states, scale));
        let slots = _mm512_i32gather_epi32::<4>(places, slots.as_ptr().cast());
        _mm_storeu_si128(symbols.cast(), _mm512_cvtepi32_epi8(_mm512_srli_epi32::<24>(slots)));
        let less_one = _mm512_and_si512(_mm512_srli_epi32::<SCALE_BITS>(slots), scale);
        let frequencies = _mm512_add_epi32(less_one, _mm512_set1_epi32(1));
        let quotients = _mm512_srli_epi32::<SCALE_BITS>(*states);
        let next = _mm512_mullo_epi32(frequencies, quotients);
        let next = _mm512_add_epi32(next, _mm512_and_si512(slots, scale));
        let low = _mm512_cmplt_epu32_mask(next, _mm512_set1_epi32(1 << 16));
        let words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(words.cast()));
        let words = _mm512_maskz_expand_epi32(low, words);
        let shifted = _mm512_or_si512(_mm512_slli_epi32::<16>(next), words);
        *states = _mm512_mask_mov_epi32(next, low, shifted);
        2 * low.count_ones() as usize
    }
}
