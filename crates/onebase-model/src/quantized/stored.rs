use std::collections::BTreeSet;

use onebase_format::artifact::Role;
use onebase_format::{Checkpoint, TensorEntry};
use onebase_kernels::{Parts, low_bytes};
use onebase_tensor::DType;

use super::rotation::rotation_tensors;
use crate::weights::CodedWeight;
use crate::{Error, ModelConfig, Result, SiteInput, TensorSpec, tensor_specs};

/// The files' tensors that make one tensor of a quantized base.
#[derive(Clone, Debug)]
pub struct StoredTensor {
    /// What they make.
    pub spec: TensorSpec,
    /// What is stored. Of a matrix in codes, by the name of its module: `low`,
    /// `[out_features, bytes]`, two 4-bit codes a byte; `high`, `[out_features, n_high]`, signed
    /// bytes; `low_scale` and `high_scale`, `[out_features]`. Parts without columns are absent.
    /// Elements of what is stored as it is are of any float type: the one here is f32.
    pub parts: Vec<TensorEntry>,
    /// Whether it is in codes.
    pub is_coded: bool,
}

/// What a quantized base of this configuration stores, in the order of the forward pass.
///
/// Panics where the configuration has no quantization.
pub fn stored_tensors(config: &ModelConfig) -> Vec<StoredTensor> {
    let Some(quantization) = config.quantization else {
        unreachable!("the caller has a quantized base")
    };
    let stored = |spec: TensorSpec| {
        let bits = match spec.role {
            Role::Linear => quantization.weight_bits,
            Role::Embedding | Role::Head => quantization.table_bits,
            Role::Vector => 16,
        };
        if bits == 16 {
            let (name, shape) = (spec.name.clone(), spec.shape.clone());
            let parts = vec![TensorEntry { name, dtype: DType::F32, shape }];
            return StoredTensor { spec, parts, is_coded: false };
        }
        let parts = coded_parts(&spec, parts_of(&spec, config));
        StoredTensor { spec, parts, is_coded: true }
    };
    tensor_specs(config).into_iter().map(stored).collect()
}

fn coded_parts(spec: &TensorSpec, Parts { n_low, n_high }: Parts) -> Vec<TensorEntry> {
    let (module, n_rows) = (module(spec), spec.shape[0]);
    let entry = |part: &str, dtype, shape: &[usize]| TensorEntry {
        name: format!("{module}.{part}"),
        dtype,
        shape: shape.to_vec(),
    };
    let mut parts = Vec::new();
    if n_low > 0 {
        parts.push(entry("low", DType::U8, &[n_rows, low_bytes(n_low)]));
        parts.push(entry("low_scale", DType::F16, &[n_rows]));
    }
    if n_high > 0 {
        parts.push(entry("high", DType::U8, &[n_rows, n_high]));
        parts.push(entry("high_scale", DType::F16, &[n_rows]));
    }
    parts
}

/// A matrix of a quantized base, in codes.
#[derive(Debug)]
pub struct CodedMatrix(CodedWeight);

impl CodedMatrix {
    /// Opens a tensor in codes of a base that was checked.
    ///
    /// # Errors
    /// When a part is missing.
    pub fn open(
        checkpoint: &Checkpoint,
        config: &ModelConfig,
        tensor: &StoredTensor,
    ) -> Result<Self> {
        let spec = &tensor.spec;
        let parts = parts_of(spec, config);
        let module = module(spec);
        Ok(Self(CodedWeight::load(checkpoint, module, spec.shape[0], parts, false)?))
    }

    /// Writes the values of a row, `[in_features]`.
    pub fn write_row(&self, row: usize, out: &mut [f32]) {
        self.0.as_ref().write_row(row, out);
    }
}

/// How many columns of a matrix in codes have 4 and 8 bits.
pub(crate) fn parts_of(spec: &TensorSpec, config: &ModelConfig) -> Parts {
    match (SiteInput::of_weight(&spec.name), &config.quantization) {
        (Some((_, input)), Some(quantization)) => quantization.weight_parts(input, config),
        _ => Parts { n_low: 0, n_high: spec.shape[1] },
    }
}

/// The module of a weight.
fn module(spec: &TensorSpec) -> &str {
    spec.name.strip_suffix(".weight").unwrap_or(&spec.name)
}

/// Checks that a quantized base has the tensors of its configuration, in their shapes and
/// types, and no others.
pub(crate) fn check_stored(checkpoint: &Checkpoint, config: &ModelConfig) -> Result<()> {
    let tensors = stored_tensors(config);
    let rotations = rotation_tensors(config);
    let coded = tensors.iter().flat_map(|t| t.parts.iter().map(|part| (part, t.is_coded)));
    let mut known = BTreeSet::new();
    for (part, is_coded) in coded.chain(rotations.iter().map(|part| (part, true))) {
        let tensor = if is_coded {
            checkpoint.stored(&part.name)?
        } else {
            checkpoint.tensor(&part.name)?
        };
        if tensor.shape() != part.shape {
            return Err(Error::Shape {
                path: tensor.path().to_owned(),
                tensor: part.name.clone(),
                expected: part.shape.clone(),
                got: tensor.shape().to_vec(),
            });
        }
        if is_coded && tensor.dtype() != part.dtype {
            return Err(Error::ElementType {
                path: tensor.path().to_owned(),
                tensor: part.name.clone(),
                expected: part.dtype,
                got: tensor.dtype(),
            });
        }
        known.insert(part.name.as_str());
    }
    match checkpoint.names().find(|name| !known.contains(name)) {
        Some(tensor) => Err(Error::UnexpectedTensor {
            path: checkpoint.dir().to_owned(),
            tensor: tensor.to_owned(),
        }),
        None => Ok(()),
    }
}
