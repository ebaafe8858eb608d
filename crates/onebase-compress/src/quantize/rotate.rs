//! Checkpoints in the basis of a quantized base: the weights of norms go into the sites that
//! follow, and both into the rotated basis, in f64 (ResQ's program, `rotation_utils.py`; `L` and
//! `R` of a weight `Lᵀ W diag(g) R`).

use std::path::Path;

use onebase_format::{Checkpoint, StagedFolder, TensorEntry};
use onebase_model::quantized::Quantization;
use onebase_model::{ModelConfig, tensor_specs};
use onebase_tensor::DType;
use rayon::prelude::*;

use super::folder::{copy_tensor, f32_bytes, read_f32, write_side_files, write_weights};
use super::matrix::{narrow, times, transposed, widen};
use super::rotations::Rotations;
use crate::{Progress, Result};

/// Writes a checkpoint in the basis of `rotations` into the folder `target`, which must not
/// exist: linear sites and their biases in f32, tables and what else is left as they are.
///
/// `config` is that of the checkpoint, its quantization that of the basis.
pub(super) fn rotate(
    checkpoint: &Checkpoint,
    config: &ModelConfig,
    rotations: &Rotations,
    target: &Path,
    progress: &dyn Progress,
) -> Result<()> {
    let Some(quantization) = config.quantization else { unreachable!("the basis is known") };
    let config = &config.clone().with_quantization(Some(quantization.unquantized()));
    let folder = StagedFolder::create(target)?;
    let hidden = widen(&rotations.hidden);
    let rotation = Rotation {
        config,
        quantization,
        rotations,
        hidden_transposed: transposed(&hidden, config.hidden_size),
        hidden,
    };
    let specs = tensor_specs(config);
    let mut entries = Vec::new();
    for spec in &specs {
        let dtype = match Site::of(&spec.name) {
            Some(_) => DType::F32,
            None => checkpoint.tensor(&spec.name)?.dtype(),
        };
        entries.push(TensorEntry { name: spec.name.clone(), dtype, shape: spec.shape.clone() });
    }
    let own = rotations.entries(config);
    entries.extend(own.iter().map(|(entry, _)| entry.clone()));
    progress.begin(entries.iter().map(|entry| entry.size_bytes() as u64).sum());
    write_weights(&folder, &entries, progress, |entry, writer| {
        if let Some((_, values)) = own.iter().find(|(known, _)| known.name == entry.name) {
            return Ok(writer.write(&f32_bytes(values))?);
        }
        let tensor = checkpoint.tensor(&entry.name)?;
        let Some(site) = Site::of(&entry.name) else { return copy_tensor(&tensor, writer) };
        let weight = widen(&read_f32(&tensor)?);
        let rotated = match entry.shape[..] {
            [n_out, n_in] => rotation.weight(checkpoint, &site, weight, [n_out, n_in])?,
            _ => rotation.bias(&site, weight),
        };
        Ok(writer.write(&f32_bytes(&narrow(&rotated)))?)
    })?;
    write_side_files(&folder, checkpoint, config.quantization.as_ref())?;
    Ok(folder.commit()?)
}

/// A tensor of a linear site, by its block and the name of its matrix: `q_proj`.
struct Site<'a> {
    layer: usize,
    matrix: &'a str,
}

impl<'a> Site<'a> {
    fn of(tensor: &'a str) -> Option<Self> {
        let (layer, module) = tensor.strip_prefix("model.layers.")?.split_once('.')?;
        let (module, _) = module.rsplit_once('.')?;
        let (_, matrix) = module.split_once('.')?;
        matrix.ends_with("_proj").then_some(Self { layer: layer.parse().ok()?, matrix })
    }
}

struct Rotation<'a> {
    config: &'a ModelConfig,
    quantization: Quantization,
    rotations: &'a Rotations,
    hidden: Vec<f64>,
    hidden_transposed: Vec<f64>,
}

impl Rotation<'_> {
    fn weight(
        &self,
        checkpoint: &Checkpoint,
        site: &Site<'_>,
        mut weight: Vec<f64>,
        [n_out, n_in]: [usize; 2],
    ) -> Result<Vec<f64>> {
        match site.matrix {
            "o_proj" => {
                self.rotate_output_inputs(site.layer, &mut weight);
                Ok(times(&self.hidden_transposed, &weight, [n_out, n_out, n_in]))
            }
            "down_proj" => {
                let hadamard = &self.rotations.hadamard;
                weight.par_chunks_mut(n_in).for_each(|row| hadamard.apply_f64(row));
                Ok(times(&self.hidden_transposed, &weight, [n_out, n_out, n_in]))
            }
            matrix => {
                let norm = match matrix {
                    "gate_proj" | "up_proj" => "post_attention_layernorm",
                    _ => "input_layernorm",
                };
                let name = format!("model.layers.{}.{norm}.weight", site.layer);
                let gains = widen(&read_f32(&checkpoint.tensor(&name)?)?);
                weight.par_chunks_mut(n_in).for_each(|row| {
                    row.iter_mut().zip(&gains).for_each(|(w, gain)| *w *= gain);
                });
                let weight = times(&weight, &self.hidden, [n_out, n_in, n_in]);
                Ok(match matrix {
                    "v_proj" => self.rotate_values(site.layer, &weight, n_in),
                    _ => weight,
                })
            }
        }
    }

    fn bias(&self, site: &Site<'_>, bias: Vec<f64>) -> Vec<f64> {
        match site.matrix {
            // As a column of the weight.
            "v_proj" => self.rotate_values(site.layer, &bias, 1),
            "o_proj" | "down_proj" => {
                let n = bias.len();
                times(&self.hidden_transposed, &bias, [n, n, 1])
            }
            _ => bias,
        }
    }

    /// `blockdiag(U)ᵀ W` over the key heads.
    fn rotate_values(&self, layer: usize, weight: &[f64], n_in: usize) -> Vec<f64> {
        let head = self.config.head_dim;
        let heads = weight.chunks(head * n_in).enumerate();
        let rotated = heads.map(|(index, rows)| {
            let rotation = self.rotations.of_values(self.config, layer, index);
            times(&transposed(&rotation, head), rows, [head, head, n_in])
        });
        rotated.collect::<Vec<_>>().concat()
    }

    /// `W blockdiag(U) Π`: each query head's columns by the rotation of the values that it reads,
    /// then the first of every head before the last.
    fn rotate_output_inputs(&self, layer: usize, weight: &mut [f64]) {
        let (head, n_heads) = (self.config.head_dim, self.config.n_heads);
        let group = n_heads / self.config.n_kv_heads;
        let n_high = self.quantization.high_head;
        let n_low = head - n_high;
        let rotations: Vec<Vec<f64>> = (0..self.config.n_kv_heads)
            .map(|index| self.rotations.of_values(self.config, layer, index))
            .collect();
        weight.par_chunks_mut(n_heads * head).for_each(|row| {
            let mut out = vec![0.0; row.len()];
            for (index, from) in row.chunks_exact(head).enumerate() {
                let rotation = &rotations[index / group];
                for j in 0..head {
                    let sum =
                        from.iter().enumerate().map(|(i, w)| w * rotation[i * head + j]).sum();
                    let at = match j.checked_sub(n_low) {
                        None => index * n_low + j,
                        Some(high) => n_heads * n_low + index * n_high + high,
                    };
                    out[at] = sum;
                }
            }
            row.copy_from_slice(&out);
        });
    }
}
