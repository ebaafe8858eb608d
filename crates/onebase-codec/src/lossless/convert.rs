//! A base in the fine-tune's type: rounded to the nearest, ties to even, by integers alone, so
//! that it is the same on every machine, NaN too.

use std::borrow::Cow;

use super::{Base, Element};

/// The base's elements in the type `element`; `None` where one is no float of 16 or 32 bits
/// and the types differ.
pub(super) fn converted<'a>(base: Base<'a>, element: Element) -> Option<Cow<'a, [u8]>> {
    if base.element == element {
        return Some(Cow::Borrowed(base.bytes));
    }
    let wide = |bytes: &[u8]| -> Option<Vec<u32>> {
        let halves = bytes.as_chunks::<2>().0.iter().map(|b| u32::from(u16::from_le_bytes(*b)));
        Some(match base.element {
            Element::F32 => {
                bytes.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect()
            }
            Element::Bf16 => halves.map(|bits| bits << 16).collect(),
            Element::F16 => halves.map(widen_f16).collect(),
            _ => return None,
        })
    };
    let narrow: fn(u32) -> u32 = match element {
        Element::F32 => |bits| bits,
        Element::Bf16 => narrow_bf16,
        Element::F16 => narrow_f16,
        _ => return None,
    };
    let mut out = Vec::with_capacity(base.bytes.len());
    for bits in wide(base.bytes)? {
        let bytes = narrow(bits).to_le_bytes();
        out.extend_from_slice(&bytes[..element.size_bytes()]);
    }
    Some(Cow::Owned(out))
}

/// `bits / 2^n`, to the nearest and ties to even; `n` from 1 to 31.
fn round_shift(bits: u32, n: u32) -> u32 {
    let odd = bits >> n & 1;
    let sum = u64::from(bits) + (1 << (n - 1)) - 1 + u64::from(odd);
    u32::try_from(sum >> n).unwrap_or(u32::MAX)
}

fn narrow_bf16(bits: u32) -> u32 {
    if bits & 0x7fff_ffff > 0x7f80_0000 {
        // A NaN of the upper digits alone, which stays one.
        return bits >> 16 | 0x40;
    }
    round_shift(bits, 16)
}

fn narrow_f16(bits: u32) -> u32 {
    let (sign, magnitude) = (bits >> 16 & 0x8000, bits & 0x7fff_ffff);
    let rounded = match magnitude {
        0x7f80_0001.. => 0x7e00 | magnitude >> 13 & 0x1ff,
        // From half a step above the greatest number on.
        0x477f_f000.. => 0x7c00,
        // The exponent 15 instead of 127.
        0x3880_0000.. => round_shift(magnitude - (112 << 23), 13),
        // Below the least normal number: steps of 2^-24.
        0x3300_0000.. => {
            let exponent = magnitude >> 23;
            round_shift(magnitude & 0x7f_ffff | 0x80_0000, 126 - exponent)
        }
        _ => 0,
    };
    sign | rounded
}

fn widen_f16(bits: u32) -> u32 {
    let (sign, exponent, digits) = ((bits & 0x8000) << 16, bits >> 10 & 0x1f, bits & 0x3ff);
    match exponent {
        0 if digits == 0 => sign,
        0 => {
            // A subnormal number's first digit becomes the one that is not written.
            let up = digits.leading_zeros() - 21;
            sign | (113 - up) << 23 | ((digits << up) & 0x3ff) << 13
        }
        0x1f => sign | 0x7f80_0000 | digits << 13,
        _ => sign | (exponent + 112) << 23 | digits << 13,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_float_widens_as_it_should() {
        for bits in 0..=u16::MAX {
            let float = half::f16::from_bits(bits);
            let wide = widen_f16(u32::from(bits));
            if float.is_nan() {
                assert!(f32::from_bits(wide).is_nan());
            } else {
                assert_eq!(wide, float.to_f32().to_bits(), "{bits:#x}");
            }
            assert_eq!(narrow_f16(wide) & !0x200, u32::from(bits) & !0x200);
        }
    }

    #[test]
    fn rounding_is_to_the_nearest() {
        for i in 0..1u32 << 20 {
            let bits = i.wrapping_mul(0x9e37_79b9) ^ i << 12;
            let float = f32::from_bits(bits);
            if float.is_nan() {
                assert!(half::bf16::from_bits(low(narrow_bf16(bits))).is_nan());
                assert!(half::f16::from_bits(low(narrow_f16(bits))).is_nan());
                continue;
            }
            assert_eq!(low(narrow_bf16(bits)), half::bf16::from_f32(float).to_bits(), "{bits:#x}");
            let want = half::f16::from_f32_const(float).to_bits();
            assert_eq!(low(narrow_f16(bits)), want, "{bits:#x}");
        }
        for (bits, want) in [(0x3300_0000, 0), (0x3300_0001, 1), (0x477f_efff, 0x7bff)] {
            assert_eq!(narrow_f16(bits), want, "{bits:#x}");
        }
    }

    fn low(bits: u32) -> u16 {
        let [a, b, ..] = bits.to_le_bytes();
        u16::from_le_bytes([a, b])
    }
}
