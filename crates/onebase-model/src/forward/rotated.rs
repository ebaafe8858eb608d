//! What a pass does besides where the base is quantized or in a rotated basis.

use onebase_tensor::MatrixRef;

use super::{Pass, matrix, matrix_mut};
use crate::quantized::OutputScales;
use crate::weights::{BaseInputs, Inputs};
use crate::{Model, SiteInput};

impl Model {
    /// What sites read of an input's rows.
    pub(super) fn inputs<'x>(&self, input: SiteInput, x: MatrixRef<'x>) -> Inputs<'x> {
        let Some(quantization) = &self.config.quantization else { return Inputs::plain(x) };
        let Some(bits) = quantization.input_bits() else { return Inputs::plain(x) };
        let parts = quantization.weight_parts(input, &self.config);
        let by_head = quantization.output_scales == OutputScales::Head;
        let base = if by_head && input == SiteInput::AttentionOutput {
            let mut values = x.data().to_vec();
            let n_heads = self.config.n_heads;
            for row in values.chunks_mut(x.n_cols().max(1)) {
                let (low, high) = row.split_at_mut(parts.n_low);
                round_each(low, n_heads, bits[0]);
                round_each(high, n_heads, bits[1]);
            }
            BaseInputs::Values(values)
        } else {
            BaseInputs::Rounded(self.backend.quantize_rows(x, parts, bits))
        };
        Inputs { x, base }
    }
}

/// Rounds values in `n` groups of as many each, asymmetric over the range of each (ResQ's
/// program, `quant_utils.py`, sites that are quantized by group).
fn round_each(values: &mut [f32], n: usize, bits: u32) {
    let width = values.len() / n.max(1);
    if width == 0 {
        return;
    }
    #[allow(clippy::cast_precision_loss)]
    let most = ((1u32 << bits) - 1) as f32;
    for group in values.chunks_mut(width) {
        let lo = group.iter().fold(f32::INFINITY, |lo, v| lo.min(*v));
        let hi = group.iter().fold(f32::NEG_INFINITY, |hi, v| hi.max(*v));
        let (lo, hi) = if lo == 0.0 && hi == 0.0 { (-1.0, 1.0) } else { (lo, hi) };
        let scale = (hi - lo) / most;
        if scale <= 0.0 || !scale.is_finite() {
            continue;
        }
        let zero = (-lo / scale).round_ties_even();
        for value in group {
            let code = ((*value / scale).round_ties_even() + zero).clamp(0.0, most);
            *value = scale * (code - zero);
        }
    }
}

/// Rounds a head to 8 bits, asymmetric over its range and zero (ResQ's program,
/// `rotation_utils.py`).
fn round_head(head: &mut [f32]) {
    let (lo, hi) = head.iter().fold((0f32, 0f32), |(lo, hi), v| (lo.min(*v), hi.max(*v)));
    let scale = (hi - lo) / 255.0;
    if scale <= 0.0 || !scale.is_finite() {
        return;
    }
    let zero = (-lo / scale).round_ties_even();
    for value in head {
        let code = ((*value / scale).round_ties_even() + zero).clamp(0.0, 255.0);
        *value = scale * (code - zero);
    }
}

impl Pass<'_, '_> {
    /// Turns embedded rows into those of the rotated stream.
    pub(super) fn rotate_stream(&mut self) {
        let Some(rotation) = &self.model.rotation else { return };
        let n = self.batch.rows.len();
        let x = matrix(&self.stream, n);
        rotation.rotate(self.model.backend, x, &mut matrix_mut(&mut self.out, n));
        std::mem::swap(&mut self.stream, &mut self.out);
    }

    /// Fills `x` with what the head reads.
    pub(super) fn final_norm(&mut self) {
        if let Some(rotation) = &self.model.rotation {
            // A norm's weight is of the model's own basis; the length of a row is the same.
            let n = self.batch.rows.len();
            let x = matrix(&self.stream, n);
            rotation.rotate_back(self.model.backend, x, &mut matrix_mut(&mut self.out, n));
            std::mem::swap(&mut self.stream, &mut self.out);
        }
        self.norm(&self.model.decoder.norm, |t| &t.decoder.norm);
    }

    /// Rotates keys and queries, after the rotary embedding.
    pub(super) fn rotate_keys(&mut self, layer: usize) {
        let Some(rotation) = &self.model.rotation else { return };
        let head_dim = self.model.config.head_dim;
        let rounds = self.model.config.quantization.is_some_and(|q| q.round_rotation);
        for heads in [&mut self.q, &mut self.k] {
            if rounds {
                heads.chunks_mut(head_dim).for_each(round_head);
            }
            let n = heads.len() / head_dim;
            let mut rotated = vec![0.0; heads.len()];
            let out = &mut matrix_mut(&mut rotated, n);
            rotation.rotate_heads(self.model.backend, layer, matrix(heads, n), out);
            *heads = rotated;
        }
    }

    /// Brings the features of `attended` into the order that output projections of a quantized
    /// base read: the first of every head, then the last, which have 8-bit weights.
    pub(super) fn order_output(&mut self) {
        let config = &self.model.config;
        let Some(quantization) = &config.quantization else { return };
        let n_high = quantization.high_head;
        if n_high == 0 {
            return;
        }
        let (head_dim, n_heads) = (config.head_dim, config.n_heads);
        let n_low = head_dim - n_high;
        let mut ordered = vec![0.0; n_heads * head_dim];
        for row in self.attended.chunks_exact_mut(n_heads * head_dim) {
            let (low, high) = ordered.split_at_mut(n_heads * n_low);
            let outs = low.chunks_exact_mut(n_low.max(1)).zip(high.chunks_exact_mut(n_high));
            for (head, (low, high)) in row.chunks_exact(head_dim).zip(outs) {
                low.copy_from_slice(&head[..n_low]);
                high.copy_from_slice(&head[n_low..]);
            }
            row.copy_from_slice(&ordered);
        }
    }
}
