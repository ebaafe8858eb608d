//! The rotations of a quantized base (ResQ, sections 4.2 and 4.3).

use onebase_codec::numerics::{random_orthogonal, symmetric_eigen};
use onebase_format::{Checkpoint, TensorEntry};
use onebase_kernels::Hadamard;
use onebase_model::ModelConfig;
use onebase_model::quantized::{
    HADAMARD_BLOCK, HIDDEN_ROTATION, KEY_ROTATIONS, Method, Quantization, VALUE_ROTATIONS,
};
use onebase_tensor::{DType, stream};
use rand::RngExt;

use super::folder::read_f32;
use super::matrix::{narrow, times, widen};
use super::project::Moments;
use crate::{Error, Result};

/// Rotations as they are stored: rounded to f32. Columns of the matrices are the new basis.
pub(super) struct Rotations {
    /// `[hidden_size, hidden_size]`.
    pub(super) hidden: Vec<f32>,
    /// By layer: `[n_layers, head_dim, head_dim]`.
    pub(super) keys: Vec<f32>,
    /// By layer and key head: `[n_layers, n_kv_heads, head_dim, head_dim]`.
    pub(super) values: Vec<f32>,
    /// `[n, n]`; empty where a Hadamard matrix is known.
    block: Vec<f32>,
    /// Of the inputs of down projections.
    pub(super) hadamard: Hadamard,
}

/// The part of a feed-forward size that is orthogonal at random where no Hadamard matrix is known:
/// its odd factor; 0 where one is.
pub(super) fn hadamard_block(intermediate_size: usize) -> usize {
    if Hadamard::new(intermediate_size).is_some() {
        return 0;
    }
    intermediate_size >> intermediate_size.trailing_zeros()
}

impl Rotations {
    /// Those of ResQ: principal components with the least variance first, and random rotations
    /// within the low and the high ones, the same ones for all heads.
    pub(super) fn resq(
        moments: &Moments,
        config: &ModelConfig,
        quantization: &Quantization,
        seed: u64,
    ) -> Result<Self> {
        let (hidden, head) = (config.hidden_size, config.head_dim);
        let of_hidden = random_blocks(hidden, quantization.high_hidden, seed, "hidden");
        let of_heads = random_blocks(head, quantization.high_head, seed, "head");
        let heads = |moments: &[Vec<f64>]| -> Result<Vec<f32>> {
            let rotated = moments.iter().map(|m| principal(m, head, &of_heads));
            Ok(narrow(&rotated.collect::<Result<Vec<_>>>()?.concat()))
        };
        Ok(Self {
            hidden: narrow(&principal(&moments.hidden, hidden, &of_hidden)?),
            keys: heads(&moments.keys)?,
            values: heads(&moments.values)?,
            ..Self::without_basis(config, seed)
        })
    }

    /// Those of QuaRot: Hadamard matrices, that of the residual stream with random signs.
    /// Orthogonal at random where no Hadamard matrix is known.
    pub(super) fn quarot(config: &ModelConfig, seed: u64) -> Self {
        let head = narrow(&hadamard_or_random(config.head_dim, seed, "head"));
        let mut hidden = hadamard_or_random(config.hidden_size, seed, "hidden");
        let mut draws = stream(seed, "signs", 0);
        for row in hidden.chunks_mut(config.hidden_size) {
            if draws.random::<bool>() {
                row.iter_mut().for_each(|v| *v = -*v);
            }
        }
        Self {
            hidden: narrow(&hidden),
            keys: head.repeat(config.n_layers),
            values: head.repeat(config.n_layers * config.n_kv_heads),
            ..Self::without_basis(config, seed)
        }
    }

    fn without_basis(config: &ModelConfig, seed: u64) -> Self {
        let n = hadamard_block(config.intermediate_size);
        let block = match n {
            0 => Vec::new(),
            n => {
                #[allow(clippy::cast_precision_loss)]
                let root = (n as f64).sqrt();
                let block = random_orthogonal(n, &mut stream(seed, "feed-forward", 0));
                narrow(&block.into_iter().map(|v| v * root).collect::<Vec<_>>())
            }
        };
        let hadamard = hadamard(config.intermediate_size, &block, n);
        Self { hidden: Vec::new(), keys: Vec::new(), values: Vec::new(), block, hadamard }
    }

    /// Those that a quantized or a rotated model has.
    pub(super) fn read(checkpoint: &Checkpoint, config: &ModelConfig) -> Result<Self> {
        let read = |name: &str| read_f32(&checkpoint.tensor(name)?);
        let n = config.quantization.map_or(0, |q| q.hadamard_block);
        let block = if n == 0 { Vec::new() } else { read(HADAMARD_BLOCK)? };
        let hadamard = hadamard(config.intermediate_size, &block, n);
        Ok(Self {
            hidden: read(HIDDEN_ROTATION)?,
            keys: read(KEY_ROTATIONS)?,
            values: read(VALUE_ROTATIONS)?,
            block,
            hadamard,
        })
    }

    /// How they are stored, and their elements.
    pub(super) fn entries(&self, config: &ModelConfig) -> Vec<(TensorEntry, &[f32])> {
        let (hidden, head) = (config.hidden_size, config.head_dim);
        let heads = [config.n_layers, head, head];
        let values = [config.n_layers, config.n_kv_heads, head, head];
        let n = config.quantization.map_or(0, |q| q.hadamard_block);
        let entry = |name: &str, shape: &[usize], values| {
            let (name, shape) = (name.to_owned(), shape.to_vec());
            (TensorEntry { name, dtype: DType::F32, shape }, values)
        };
        let mut entries = vec![
            entry(HIDDEN_ROTATION, &[hidden, hidden], self.hidden.as_slice()),
            entry(KEY_ROTATIONS, &heads, &self.keys),
            entry(VALUE_ROTATIONS, &values, &self.values),
        ];
        if n > 0 {
            entries.push(entry(HADAMARD_BLOCK, &[n, n], &self.block));
        }
        entries
    }

    /// The rotation of the values of a layer's key head, `[head_dim, head_dim]`.
    pub(super) fn of_values(&self, config: &ModelConfig, layer: usize, kv_head: usize) -> Vec<f64> {
        let size = config.head_dim * config.head_dim;
        let at = (layer * config.n_kv_heads + kv_head) * size;
        widen(&self.values[at..at + size])
    }
}

fn hadamard(n: usize, block: &[f32], block_size: usize) -> Hadamard {
    let known = match block_size {
        0 => Hadamard::new(n),
        size => Hadamard::with_block(n, block, size),
    };
    match known {
        Some(hadamard) => hadamard,
        None => unreachable!("the block is what is missing to a power of two"),
    }
}

/// Random rotations of the first `n - n_high` and of the last `n_high` of `n` coordinates.
struct Blocks {
    low: Vec<f64>,
    high: Vec<f64>,
    n_low: usize,
    n_high: usize,
}

fn random_blocks(n: usize, n_high: usize, seed: u64, label: &str) -> Blocks {
    let n_low = n - n_high;
    Blocks {
        low: random_orthogonal(n_low, &mut stream(seed, label, 0)),
        high: random_orthogonal(n_high, &mut stream(seed, label, 1)),
        n_low,
        n_high,
    }
}

/// `[P_l R_l, P_h R_h]` for the eigenvectors `P` of a moment, those of the least eigenvalues
/// first (ResQ, equation 5).
fn principal(moment: &[f64], n: usize, blocks: &Blocks) -> Result<Vec<f64>> {
    let eigen = symmetric_eigen(moment, n).map_err(Error::Numerics)?;
    let Blocks { n_low, n_high, .. } = *blocks;
    // Rows of `vectors` are eigenvectors, the largest eigenvalue first.
    let columns = |first: usize, count: usize| -> Vec<f64> {
        let mut out = vec![0.0; n * count];
        for j in 0..count {
            let vector = &eigen.vectors[(n - 1 - first - j) * n..][..n];
            for (i, v) in vector.iter().enumerate() {
                out[i * count + j] = *v;
            }
        }
        out
    };
    let low = times(&columns(0, n_low), &blocks.low, [n, n_low, n_low]);
    let high = times(&columns(n_low, n_high), &blocks.high, [n, n_high, n_high]);
    let mut out = Vec::with_capacity(n * n);
    for i in 0..n {
        out.extend_from_slice(&low[i * n_low..(i + 1) * n_low]);
        out.extend_from_slice(&high[i * n_high..(i + 1) * n_high]);
    }
    Ok(out)
}

/// A normalised Hadamard matrix `[n, n]` or, where none is known, an orthogonal one at random.
fn hadamard_or_random(n: usize, seed: u64, label: &str) -> Vec<f64> {
    let Some(hadamard) = Hadamard::new(n) else {
        return random_orthogonal(n, &mut stream(seed, label, 0));
    };
    let mut matrix = vec![0.0; n * n];
    for (i, row) in matrix.chunks_mut(n).enumerate() {
        row[i] = 1.0;
        hadamard.apply_f64(row);
    }
    matrix
}

/// Whether a method's rotations are orthogonal at random somewhere for want of a Hadamard
/// matrix, and of what size.
pub(super) fn random_sizes(config: &ModelConfig, method: Method) -> Vec<usize> {
    let mut sizes = Vec::new();
    if method == Method::Quarot {
        sizes.extend([config.hidden_size, config.head_dim]);
    }
    if method.is_rotated() {
        sizes.push(config.intermediate_size);
    }
    sizes.retain(|n| Hadamard::new(*n).is_none());
    sizes
}
