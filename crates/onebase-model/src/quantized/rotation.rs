use onebase_format::{Checkpoint, TensorEntry};
use onebase_kernels::{Backend, Hadamard};
use onebase_tensor::{DType, MatrixMut, MatrixRef, WeightRef};

use crate::weights::Weight;
use crate::{ModelConfig, Result};

/// The rotation of the residual stream, `[hidden_size, hidden_size]` in f32: a row vector `x`
/// of the model's own basis is `x U`.
pub const HIDDEN_ROTATION: &str = "rotation.hidden";

/// The rotations of keys and queries after the rotary embedding, one a layer:
/// `[n_layers, head_dim, head_dim]` in f32.
pub const KEY_ROTATIONS: &str = "rotation.keys";

/// The rotations of values, which are in the weights: `[n_layers, n_kv_heads, head_dim,
/// head_dim]` in f32.
pub const VALUE_ROTATIONS: &str = "rotation.values";

/// The orthogonal block, scaled by the root of its size, that stands for a Hadamard matrix
/// where none is known: `[n, n]` in f32.
pub const HADAMARD_BLOCK: &str = "rotation.hadamard_block";

/// What of the rotations a forward pass needs.
#[derive(Debug)]
pub(crate) struct Rotation {
    /// `[hidden_size, hidden_size]`.
    hidden: Weight,
    /// Its transpose.
    hidden_transposed: Vec<f32>,
    /// By layer, the transpose of the keys' rotation, `[head_dim, head_dim]`; in 8 bits where the
    /// quantization says so.
    keys_transposed: Vec<Vec<f32>>,
    /// On the inputs of down projections.
    pub(crate) hadamard: Hadamard,
}

/// The tensors of the rotations of a model of this configuration; none where it is in its own
/// basis.
pub(super) fn rotation_tensors(config: &ModelConfig) -> Vec<TensorEntry> {
    let Some(quantization) = config.quantization.filter(|q| q.method.is_rotated()) else {
        return Vec::new();
    };
    let (hidden, head) = (config.hidden_size, config.head_dim);
    let entry = |name: &str, shape: &[usize]| TensorEntry {
        name: name.to_owned(),
        dtype: DType::F32,
        shape: shape.to_vec(),
    };
    let mut entries = vec![
        entry(HIDDEN_ROTATION, &[hidden, hidden]),
        entry(KEY_ROTATIONS, &[config.n_layers, head, head]),
        entry(VALUE_ROTATIONS, &[config.n_layers, config.n_kv_heads, head, head]),
    ];
    let block = quantization.hadamard_block;
    if block > 0 {
        entries.push(entry(HADAMARD_BLOCK, &[block, block]));
    }
    entries
}

impl Rotation {
    /// Reads the rotations of a checkpoint that [`super::check_stored`] has checked; `None` where
    /// it is in its own basis.
    pub(crate) fn load(checkpoint: &Checkpoint, config: &ModelConfig) -> Result<Option<Self>> {
        let Some(quantization) = config.quantization.filter(|q| q.method.is_rotated()) else {
            return Ok(None);
        };
        let wide = |name: &str| -> Result<Vec<f32>> {
            let tensor = checkpoint.tensor(name)?;
            let mut wide = vec![0.0; tensor.n_weights()];
            tensor.dtype().widen(&tensor.bytes(), &mut wide);
            Ok(wide)
        };
        let (hidden, head) = (config.hidden_size, config.head_dim);
        let hadamard = match quantization.hadamard_block {
            0 => Hadamard::new(config.intermediate_size),
            block => Hadamard::with_block(config.intermediate_size, &wide(HADAMARD_BLOCK)?, block),
        };
        let Some(hadamard) = hadamard else { unreachable!("the configuration was checked") };
        let keys = wide(KEY_ROTATIONS)?;
        let keys_transposed = keys.chunks_exact(head * head).map(|keys| {
            let mut transposed = transpose(keys, head);
            if quantization.round_rotation {
                round_matrix(&mut transposed);
            }
            transposed
        });
        Ok(Some(Self {
            hidden: Weight::load(&checkpoint.tensor(HIDDEN_ROTATION)?),
            hidden_transposed: transpose(&wide(HIDDEN_ROTATION)?, hidden),
            keys_transposed: keys_transposed.collect(),
            hadamard,
        }))
    }

    /// `x U` of rows of the model's own basis; `out` is overwritten.
    pub(crate) fn rotate(&self, backend: Backend, x: MatrixRef<'_>, out: &mut MatrixMut<'_>) {
        out.data().fill(0.0);
        backend.add_dense(WeightRef::F32(&self.hidden_transposed), x, out);
    }

    /// `x Uᵀ` of rows of the rotated stream; `out` is overwritten.
    pub(crate) fn rotate_back(&self, backend: Backend, x: MatrixRef<'_>, out: &mut MatrixMut<'_>) {
        out.data().fill(0.0);
        backend.add_dense(self.hidden.as_ref(), x, out);
    }

    /// Rotates heads of keys or queries; `out` is overwritten.
    pub(crate) fn rotate_heads(
        &self,
        backend: Backend,
        layer: usize,
        heads: MatrixRef<'_>,
        out: &mut MatrixMut<'_>,
    ) {
        out.data().fill(0.0);
        backend.add_dense(WeightRef::F32(&self.keys_transposed[layer]), heads, out);
    }
}

fn transpose(matrix: &[f32], n: usize) -> Vec<f32> {
    let mut out = vec![0.0; n * n];
    for (i, row) in matrix.chunks_exact(n).enumerate() {
        for (j, value) in row.iter().enumerate() {
            out[j * n + i] = *value;
        }
    }
    out
}

/// Rounds a matrix to 8 bits with one scale, symmetric (ResQ's program, `rotation_utils.py`).
fn round_matrix(matrix: &mut [f32]) {
    let most = matrix.iter().fold(0f32, |most, v| most.max(v.abs()));
    let scale = most / 127.0;
    if scale > 0.0 {
        matrix.iter_mut().for_each(|v| *v = (*v / scale).round_ties_even() * scale);
    }
}
