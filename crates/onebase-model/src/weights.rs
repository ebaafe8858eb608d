use half::{bf16, f16};
use onebase_format::artifact::ExactTensor;
use onebase_format::{Checkpoint, MappedBytes, Tensor};
use onebase_kernels::{Backend, Mixed, Parts, QuantizedRows, mixed_sums};
use onebase_tensor::{DType, MatrixMut, MatrixRef, PartData, WeightRef};

use crate::Result;

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

/// A weight of a base: as it is, or in codes.
#[derive(Debug)]
pub(crate) enum BaseWeight {
    Plain(Weight),
    Coded(CodedWeight),
}

/// A matrix in 4- and 8-bit codes, mapped from its file.
#[derive(Debug)]
pub(crate) struct CodedWeight {
    low: Option<MappedBytes>,
    high: Option<MappedBytes>,
    low_scale: Vec<f16>,
    high_scale: Vec<f16>,
    sums: Vec<[i32; 2]>,
    parts: Parts,
}

/// Rows that products read.
pub(crate) struct Inputs<'x> {
    /// What deltas read, `[n_rows, in_features]`.
    pub(crate) x: MatrixRef<'x>,
    /// What the base reads of it.
    pub(crate) base: BaseInputs,
}

/// What the base's weights read of the rows.
pub(crate) enum BaseInputs {
    /// The same.
    Same,
    /// Codes of them.
    Rounded(QuantizedRows),
    /// The values of codes that share scales in another way than the kernels have it.
    Values(Vec<f32>),
}

impl<'x> Inputs<'x> {
    /// Rows that the base reads as they are.
    pub(crate) fn plain(x: MatrixRef<'x>) -> Self {
        Self { x, base: BaseInputs::Same }
    }
}

impl BaseWeight {
    /// `y += x Wᵀ`.
    pub(crate) fn add_to(&self, backend: Backend, inputs: &Inputs<'_>, y: &mut MatrixMut<'_>) {
        let x = match &inputs.base {
            BaseInputs::Same => inputs.x,
            BaseInputs::Values(values) => {
                let [n_rows, n_cols] = inputs.x.shape();
                match MatrixRef::new(values, n_rows, n_cols) {
                    Ok(values) => values,
                    Err(_) => unreachable!("values are of the same rows"),
                }
            }
            BaseInputs::Rounded(rounded) => match self {
                BaseWeight::Coded(weight) => {
                    backend.add_integer(weight.as_ref(), rounded, y);
                    return;
                }
                BaseWeight::Plain(_) => unreachable!("inputs are rounded where weights are"),
            },
        };
        self.add_rows_to(backend, x, y);
    }

    /// `y += x Wᵀ` of f32 rows.
    pub(crate) fn add_rows_to(&self, backend: Backend, x: MatrixRef<'_>, y: &mut MatrixMut<'_>) {
        match self {
            BaseWeight::Plain(weight) => backend.add_dense(weight.as_ref(), x, y),
            BaseWeight::Coded(weight) => backend.add_mixed(weight.as_ref(), x, y),
        }
    }

    /// Widens row `row` of a table with rows of `out.len()` elements.
    pub(crate) fn widen_row(&self, row: usize, out: &mut [f32]) {
        match self {
            BaseWeight::Plain(weight) => weight.widen_row(row, out),
            BaseWeight::Coded(weight) => weight.as_ref().write_row(row, out),
        }
    }
}

impl CodedWeight {
    /// A matrix of `parts` columns whose stored tensors a checkpoint has; `has_sums` where
    /// its inputs may be rounded.
    pub(crate) fn load(
        checkpoint: &Checkpoint,
        module: &str,
        n_rows: usize,
        parts: Parts,
        has_sums: bool,
    ) -> Result<Self> {
        let bytes = |n: usize, part: &str| -> Result<Option<MappedBytes>> {
            if n == 0 {
                return Ok(None);
            }
            Ok(Some(checkpoint.stored(&format!("{module}.{part}"))?.bytes()))
        };
        let scales = |n: usize, part: &str| -> Result<Vec<f16>> {
            let Some(bytes) = bytes(n, part)? else { return Ok(Vec::new()) };
            match PartData::from_le_bytes(DType::F16, &bytes) {
                Some(PartData::F16(scales)) => Ok(scales),
                _ => unreachable!("the type was checked when the model was opened"),
            }
        };
        let (low, high) = (bytes(parts.n_low, "low")?, bytes(parts.n_high, "high")?);
        let low_scale = scales(parts.n_low, "low_scale")?;
        let high_scale = scales(parts.n_high, "high_scale")?;
        let sums = if has_sums {
            mixed_sums(
                low.as_deref().unwrap_or_default(),
                high.as_deref().unwrap_or_default(),
                parts.n_low,
                parts.n_high,
                n_rows,
            )
        } else {
            Vec::new()
        };
        Ok(Self { low, high, low_scale, high_scale, sums, parts })
    }

    pub(crate) fn as_ref(&self) -> Mixed<'_> {
        Mixed {
            low: self.low.as_deref().unwrap_or_default(),
            high: self.high.as_deref().unwrap_or_default(),
            low_scale: &self.low_scale,
            high_scale: &self.high_scale,
            sums: &self.sums,
            n_low: self.parts.n_low,
            n_high: self.parts.n_high,
        }
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
