use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;

use half::{bf16, f16};

use crate::DType;

/// The elements of a part, typed so that they are aligned.
#[derive(Clone, Debug, PartialEq)]
pub enum PartData {
    /// Packed codes.
    U8(Vec<u8>),
    /// IEEE binary16.
    F16(Vec<f16>),
    /// bfloat16.
    BF16(Vec<bf16>),
    /// IEEE binary32.
    F32(Vec<f32>),
}

impl PartData {
    /// Reads little-endian elements; `None` when the bytes are no whole number
    /// of them.
    pub fn from_le_bytes(dtype: DType, bytes: &[u8]) -> Option<Self> {
        if !bytes.len().is_multiple_of(dtype.size_bytes()) {
            return None;
        }
        let pairs = || bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
        Some(match dtype {
            DType::U8 => PartData::U8(bytes.to_vec()),
            DType::F16 => PartData::F16(pairs().map(f16::from_bits).collect()),
            DType::BF16 => PartData::BF16(pairs().map(bf16::from_bits).collect()),
            DType::F32 => PartData::F32(
                bytes
                    .chunks_exact(4)
                    .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                    .collect(),
            ),
        })
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        match self {
            PartData::U8(_) => DType::U8,
            PartData::F16(_) => DType::F16,
            PartData::BF16(_) => DType::BF16,
            PartData::F32(_) => DType::F32,
        }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            PartData::U8(v) => v.len(),
            PartData::F16(v) => v.len(),
            PartData::BF16(v) => v.len(),
            PartData::F32(v) => v.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Little-endian bytes of all elements; a copy only where the machine is not
    /// little-endian.
    pub fn to_le_bytes(&self) -> Cow<'_, [u8]> {
        if cfg!(target_endian = "little") {
            return Cow::Borrowed(match self {
                PartData::U8(v) => v,
                PartData::F16(v) => bytemuck::cast_slice(v),
                PartData::BF16(v) => bytemuck::cast_slice(v),
                PartData::F32(v) => bytemuck::cast_slice(v),
            });
        }
        Cow::Owned(match self {
            PartData::U8(v) => v.clone(),
            PartData::F16(v) => v.iter().flat_map(|x| x.to_le_bytes()).collect(),
            PartData::BF16(v) => v.iter().flat_map(|x| x.to_le_bytes()).collect(),
            PartData::F32(v) => v.iter().flat_map(|x| x.to_le_bytes()).collect(),
        })
    }
}

/// A named tensor of an encoded delta: elements and shape.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    shape: Vec<usize>,
    data: PartData,
}

impl Part {
    /// Pairs elements with their shape; `None` when the counts differ.
    pub fn new(shape: Vec<usize>, data: PartData) -> Option<Self> {
        let count = shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d))?;
        (count == data.len()).then_some(Self { shape, data })
    }

    /// The shape, outermost dimension first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The elements.
    pub fn data(&self) -> &PartData {
        &self.data
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.data.dtype()
    }

    /// Bytes of the elements.
    pub fn size_bytes(&self) -> usize {
        self.data.len() * self.dtype().size_bytes()
    }
}

/// The shapes of a delta's parts by name.
pub type PartShapes = BTreeMap<String, Vec<usize>>;

/// What a part will be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartSpec {
    /// Its name.
    pub name: &'static str,
    /// Its element type.
    pub dtype: DType,
    /// Its shape, outermost dimension first.
    pub shape: Vec<usize>,
}

impl PartSpec {
    /// A part of this name, type and shape.
    pub fn new<const N: usize>(name: &'static str, dtype: DType, shape: [usize; N]) -> Self {
        Self { name, dtype, shape: shape.to_vec() }
    }

    /// Bytes of the part.
    pub fn size_bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.size_bytes()
    }
}

/// One delta as a codec wrote it: the shape `[out_features, in_features]` it
/// decodes to, and its named parts.
#[derive(Clone, Debug, PartialEq)]
pub struct EncodedDelta {
    /// `[out_features, in_features]`.
    pub shape: [usize; 2],
    /// The parts by name, in name order.
    pub parts: BTreeMap<String, Part>,
}

impl EncodedDelta {
    /// A delta with these parts.
    ///
    /// Panics when a part's shape does not hold its elements or a name is given
    /// twice: both are mistakes in the codec that calls it, not in its input.
    pub fn new<const N: usize>(
        shape: [usize; 2],
        parts: [(&str, Vec<usize>, PartData); N],
    ) -> Self {
        let mut by_name = BTreeMap::new();
        for (name, part_shape, data) in parts {
            let len = data.len();
            let Some(part) = Part::new(part_shape.clone(), data) else {
                unreachable!("part {name}: {len} elements for shape {part_shape:?}")
            };
            let previous = by_name.insert(name.to_owned(), part);
            assert!(previous.is_none(), "part {name} given twice");
        }
        Self { shape, parts: by_name }
    }

    /// The shapes of all parts.
    pub fn part_shapes(&self) -> PartShapes {
        self.parts.iter().map(|(name, part)| (name.clone(), part.shape.clone())).collect()
    }

    /// Bytes of all parts.
    pub fn size_bytes(&self) -> usize {
        self.parts.values().map(Part::size_bytes).sum()
    }

    /// Takes the parts out one by one, each checked.
    pub fn into_parts(self) -> Parts {
        Parts { parts: self.parts }
    }
}

/// The parts of a delta being taken out by the codec that knows them.
#[derive(Debug)]
pub struct Parts {
    parts: BTreeMap<String, Part>,
}

impl Parts {
    fn take(&mut self, name: &str, dtype: DType, shape: &[usize]) -> Result<PartData, PartError> {
        let part =
            self.parts.remove(name).ok_or_else(|| PartError::Missing { part: name.to_owned() })?;
        if part.dtype() != dtype {
            return Err(PartError::DType {
                part: name.to_owned(),
                expected: dtype,
                got: part.dtype(),
            });
        }
        if part.shape != shape {
            return Err(PartError::Shape {
                part: name.to_owned(),
                expected: shape.to_vec(),
                got: part.shape,
            });
        }
        Ok(part.data)
    }

    /// Takes a byte part of exactly this shape.
    ///
    /// # Errors
    /// When it is missing, of another type or of another shape.
    pub fn take_u8(&mut self, name: &str, shape: &[usize]) -> Result<Vec<u8>, PartError> {
        match self.take(name, DType::U8, shape)? {
            PartData::U8(v) => Ok(v),
            _ => unreachable!("the type was checked"),
        }
    }

    /// Takes an f32 part of exactly this shape with finite elements.
    ///
    /// # Errors
    /// When it is missing, of another type or shape, or holds NaN or ∞.
    pub fn take_f32(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f32>, PartError> {
        match self.take(name, DType::F32, shape)? {
            PartData::F32(v) => finite(name, v.iter().copied()).map(|()| v),
            _ => unreachable!("the type was checked"),
        }
    }

    /// Takes an f16 part of exactly this shape with finite elements.
    ///
    /// # Errors
    /// When it is missing, of another type or shape, or holds NaN or ∞.
    pub fn take_f16(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f16>, PartError> {
        match self.take(name, DType::F16, shape)? {
            PartData::F16(v) => finite(name, v.iter().map(|x| x.to_f32())).map(|()| v),
            _ => unreachable!("the type was checked"),
        }
    }

    /// Takes a bf16 part of exactly this shape with finite elements.
    ///
    /// # Errors
    /// When it is missing, of another type or shape, or holds NaN or ∞.
    pub fn take_bf16(&mut self, name: &str, shape: &[usize]) -> Result<Vec<bf16>, PartError> {
        match self.take(name, DType::BF16, shape)? {
            PartData::BF16(v) => finite(name, v.iter().map(|x| x.to_f32())).map(|()| v),
            _ => unreachable!("the type was checked"),
        }
    }

    /// Ends the taking.
    ///
    /// # Errors
    /// When a part is left that nobody asked for.
    pub fn finish(self) -> Result<(), PartError> {
        match self.parts.into_keys().next() {
            Some(part) => Err(PartError::Unexpected { part }),
            None => Ok(()),
        }
    }
}

fn finite(part: &str, mut values: impl Iterator<Item = f32>) -> Result<(), PartError> {
    match values.position(|v| !v.is_finite()) {
        Some(index) => Err(PartError::NotFinite { part: part.to_owned(), index }),
        None => Ok(()),
    }
}

/// Why the parts are not what the codec wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum PartError {
    /// A part is not there.
    Missing {
        /// Its name.
        part: String,
    },
    /// A part is there that this codec does not write.
    Unexpected {
        /// Its name.
        part: String,
    },
    /// A part has another element type.
    DType {
        /// Its name.
        part: String,
        /// The type the codec writes.
        expected: DType,
        /// The type that was there.
        got: DType,
    },
    /// A part has another shape.
    Shape {
        /// Its name.
        part: String,
        /// The shape the codec writes.
        expected: Vec<usize>,
        /// The shape that was there.
        got: Vec<usize>,
    },
    /// A part holds a number that the codec does not write.
    Value {
        /// Its name.
        part: String,
        /// The element.
        index: usize,
        /// What the codec writes.
        expected: String,
        /// What was there.
        got: String,
    },
    /// A part that must hold finite numbers does not.
    NotFinite {
        /// Its name.
        part: String,
        /// The first bad element.
        index: usize,
    },
}

impl fmt::Display for PartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PartError::Missing { part } => write!(f, "part `{part}` is missing"),
            PartError::Unexpected { part } => write!(f, "part `{part}` does not belong here"),
            PartError::DType { part, expected, got } => {
                write!(f, "part `{part}`: expected type {expected}, got {got}")
            }
            PartError::Shape { part, expected, got } => {
                write!(f, "part `{part}`: expected shape {expected:?}, got {got:?}")
            }
            PartError::Value { part, index, expected, got } => {
                write!(f, "part `{part}`, element {index}: expected {expected}, got {got}")
            }
            PartError::NotFinite { part, index } => {
                write!(f, "part `{part}`: element {index} is not a finite number")
            }
        }
    }
}

impl std::error::Error for PartError {}

#[cfg(test)]
mod tests {
    use super::*;

    fn delta() -> EncodedDelta {
        EncodedDelta::new(
            [2, 8],
            [
                ("codes", vec![2, 1], PartData::U8(vec![1, 2])),
                ("scale", vec![2], PartData::F32(vec![0.5, 1.5])),
            ],
        )
    }

    #[test]
    fn every_altered_part_has_its_own_refusal() {
        let mut parts = delta().into_parts();
        assert_eq!(parts.take_u8("code", &[2, 1]), Err(PartError::Missing { part: "code".into() }));
        assert!(matches!(parts.take_f32("codes", &[2, 1]), Err(PartError::DType { .. })));
        let mut parts = delta().into_parts();
        assert!(matches!(parts.take_u8("codes", &[1, 2]), Err(PartError::Shape { .. })));
        let parts = delta().into_parts();
        assert!(matches!(parts.finish(), Err(PartError::Unexpected { .. })));
        let nan = EncodedDelta::new([1, 1], [("s", vec![1], PartData::F32(vec![f32::NAN]))]);
        assert_eq!(
            nan.into_parts().take_f32("s", &[1]),
            Err(PartError::NotFinite { part: "s".into(), index: 0 })
        );
    }

    #[test]
    fn bytes_round_trip_for_every_type() {
        for dtype in DType::ALL {
            let bytes: Vec<u8> = (0..8).collect();
            let data = PartData::from_le_bytes(dtype, &bytes).unwrap();
            assert_eq!(data.dtype(), dtype);
            assert_eq!(*data.to_le_bytes(), bytes);
        }
        assert_eq!(PartData::from_le_bytes(DType::F32, &[0; 6]), None);
    }

    #[test]
    fn a_shape_that_overflows_is_refused() {
        assert_eq!(Part::new(vec![usize::MAX, 2], PartData::U8(vec![])), None);
    }
}
