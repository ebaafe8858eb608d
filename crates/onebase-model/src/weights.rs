use half::{bf16, f16};
use onebase_format::artifact::ExactTensor;
use onebase_format::{MappedBytes, Tensor};
use onebase_tensor::{DType, PartData, WeightRef};

/// A weight in memory: mapped from its file where the bytes can be used as they
/// are, else a copy.
#[derive(Debug)]
pub(crate) struct Weight(Data);

#[derive(Debug)]
enum Data {
    Mapped { bytes: MappedBytes, dtype: DType },
    Owned(PartData),
}

impl Weight {
    pub(crate) fn load(tensor: &Tensor<'_>) -> Self {
        let (bytes, dtype) = (tensor.bytes(), tensor.dtype());
        if cfg!(target_endian = "little") && cast(&bytes, dtype).is_some() {
            return Self(Data::Mapped { bytes, dtype });
        }
        Self::copy(dtype, &bytes)
    }

    pub(crate) fn exact(tensor: &ExactTensor) -> Self {
        Self::copy(tensor.dtype, &tensor.bytes)
    }

    /// Elements of a type, as many as the bytes have.
    pub(crate) fn copy(dtype: DType, bytes: &[u8]) -> Self {
        match PartData::from_le_bytes(dtype, bytes) {
            Some(data) => Self(Data::Owned(data)),
            None => unreachable!("the length of a tensor was checked when its file was opened"),
        }
    }

    pub(crate) fn as_ref(&self) -> WeightRef<'_> {
        match &self.0 {
            Data::Mapped { bytes, dtype } => match cast(bytes, *dtype) {
                Some(weight) => weight,
                None => unreachable!("the map does not move"),
            },
            Data::Owned(PartData::F32(v)) => WeightRef::F32(v),
            Data::Owned(PartData::BF16(v)) => WeightRef::BF16(v),
            Data::Owned(PartData::F16(v)) => WeightRef::F16(v),
            Data::Owned(PartData::U8(_)) => unreachable!("a weight is a float"),
        }
    }

    /// Bytes of memory it holds, the mapped ones not counted.
    pub(crate) fn resident_bytes(&self) -> usize {
        match &self.0 {
            Data::Mapped { .. } => 0,
            Data::Owned(data) => data.len() * data.dtype().size_bytes(),
        }
    }

    /// Widens row `row` of a table with rows of `out.len()` elements.
    pub(crate) fn widen_row(&self, row: usize, out: &mut [f32]) {
        let n = out.len();
        self.as_ref().slice(row * n..(row + 1) * n).widen(out);
    }
}

/// The bytes as elements; `None` when they are not aligned.
fn cast(bytes: &[u8], dtype: DType) -> Option<WeightRef<'_>> {
    match dtype {
        DType::F32 => bytemuck::try_cast_slice::<u8, f32>(bytes).ok().map(WeightRef::F32),
        DType::BF16 => bytemuck::try_cast_slice::<u8, bf16>(bytes).ok().map(WeightRef::BF16),
        DType::F16 => bytemuck::try_cast_slice::<u8, f16>(bytes).ok().map(WeightRef::F16),
        DType::U8 => None,
    }
}
