use std::fmt;
use std::str::FromStr;

/// Element type of a stored tensor, named as safetensors names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DType {
    /// Unsigned byte; packed codes.
    U8,
    /// IEEE binary16.
    F16,
    /// The upper half of an IEEE binary32.
    BF16,
    /// IEEE binary32.
    F32,
}

impl DType {
    /// Every element type, in declaration order.
    pub const ALL: [DType; 4] = [DType::U8, DType::F16, DType::BF16, DType::F32];

    /// Bytes of one element.
    pub const fn size_bytes(self) -> usize {
        match self {
            DType::U8 => 1,
            DType::F16 | DType::BF16 => 2,
            DType::F32 => 4,
        }
    }

    /// The name in a safetensors header.
    pub const fn name(self) -> &'static str {
        match self {
            DType::U8 => "U8",
            DType::F16 => "F16",
            DType::BF16 => "BF16",
            DType::F32 => "F32",
        }
    }

    /// Whether a weight may have this type (`U8` holds codes only).
    pub const fn is_float(self) -> bool {
        !matches!(self, DType::U8)
    }

    /// Widens little-endian elements to f32, one for one.
    ///
    /// `bytes` holds exactly `out.len()` elements. Codes (`U8`) widen to their
    /// integer value.
    pub fn widen(self, bytes: &[u8], out: &mut [f32]) {
        self.for_each(bytes, out, |out, w| *out = w);
    }

    /// Subtracts little-endian elements, widened to f32, one from one.
    ///
    /// `bytes` holds exactly `from.len()` elements.
    pub fn subtract(self, bytes: &[u8], from: &mut [f32]) {
        self.for_each(bytes, from, |from, w| *from -= w);
    }

    fn for_each(self, bytes: &[u8], values: &mut [f32], apply: impl Fn(&mut f32, f32)) {
        assert_eq!(bytes.len(), values.len() * self.size_bytes(), "length of {self} data");
        match self {
            DType::U8 => {
                for (v, b) in values.iter_mut().zip(bytes) {
                    apply(v, f32::from(*b));
                }
            }
            DType::F16 => {
                for (v, b) in values.iter_mut().zip(bytes.chunks_exact(2)) {
                    apply(v, half::f16::from_le_bytes([b[0], b[1]]).to_f32());
                }
            }
            DType::BF16 => {
                for (v, b) in values.iter_mut().zip(bytes.chunks_exact(2)) {
                    apply(v, f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16));
                }
            }
            DType::F32 => {
                for (v, b) in values.iter_mut().zip(bytes.chunks_exact(4)) {
                    apply(v, f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
                }
            }
        }
    }

    /// Rounds f32 values to this float type, to the nearest and ties to even,
    /// and appends them to `out` as little-endian bytes. What would round to ∞
    /// becomes the largest number of its sign.
    ///
    /// Panics for `U8`, which no weight has.
    pub fn narrow(self, values: &[f32], out: &mut Vec<u8>) {
        match self {
            DType::U8 => unreachable!("weights are floats"),
            DType::F16 => {
                let max = half::f16::MAX.to_f32();
                let round = |v: &f32| half::f16::from_f32(v.clamp(-max, max)).to_le_bytes();
                out.extend(values.iter().flat_map(round));
            }
            DType::BF16 => {
                out.extend(values.iter().flat_map(|v| saturating_bf16(*v).to_le_bytes()));
            }
            DType::F32 => out.extend(values.iter().flat_map(|v| v.to_le_bytes())),
        }
    }
}

/// Rounds to bf16, to the nearest and ties to even; what would round to ∞ becomes
/// the largest number of its sign.
pub fn saturating_bf16(value: f32) -> half::bf16 {
    let max = half::bf16::MAX.to_f32();
    half::bf16::from_f32(value.clamp(-max, max))
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A name that is no supported element type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownDType(pub String);

impl fmt::Display for UnknownDType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "unsupported element type {:?}, expected one of U8, F16, BF16, F32", self.0)
    }
}

impl std::error::Error for UnknownDType {}

impl FromStr for DType {
    type Err = UnknownDType;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        DType::ALL
            .into_iter()
            .find(|d| d.name() == name)
            .ok_or_else(|| UnknownDType(name.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for dtype in DType::ALL {
            assert_eq!(dtype.name().parse(), Ok(dtype));
        }
        assert_eq!("F64".parse::<DType>(), Err(UnknownDType("F64".into())));
    }

    #[test]
    fn every_finite_half_float_survives_widening_and_narrowing() {
        for dtype in [DType::F16, DType::BF16] {
            for bits in 0..=u16::MAX {
                let mut wide = [0.0];
                dtype.widen(&bits.to_le_bytes(), &mut wide);
                if !wide[0].is_finite() {
                    continue;
                }
                let mut back = Vec::new();
                dtype.narrow(&wide, &mut back);
                assert_eq!(back, bits.to_le_bytes(), "{dtype} {bits:#06x}");
            }
        }
    }

    #[test]
    fn narrowing_rounds_ties_to_even() {
        // 1 + 2^-8 lies halfway between two bf16 neighbours; the even one is 1.
        let mut out = Vec::new();
        DType::BF16.narrow(&[1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0], &mut out);
        assert_eq!(out, [0x80, 0x3f, 0x82, 0x3f]);
    }
}
