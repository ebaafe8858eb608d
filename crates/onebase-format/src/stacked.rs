//! The matrices of a block's experts in one tensor, one after the other.
//!
//! Model hubs have a tensor for each matrix of each expert. transformers 5 holds those
//! of a block in two, `gate_up_proj` and `down_proj`, and writes them so where it is told
//! not to keep the original format. Their slices are the same matrices, byte for byte:
//! they are listed under the names that hubs have, and nobody else has to know.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::Result;
use crate::error::Error;
use crate::safetensors_file::{SafetensorsFile, TensorHeader};

/// More experts than any block has; a larger number is a damaged file.
const MAX_EXPERTS: usize = 1 << 16;

/// The names that model hubs have for an architecture's experts.
struct Names {
    /// The module in place of `mlp`.
    block: &'static str,
    gate: &'static str,
    up: &'static str,
    down: &'static str,
}

/// The names by `config.json`; `None` where the architecture has no experts.
fn names(config: &Value) -> Option<Names> {
    match config.get("architectures")?.get(0)?.as_str()? {
        "Qwen3MoeForCausalLM" => {
            Some(Names { block: "mlp", gate: "gate_proj", up: "up_proj", down: "down_proj" })
        }
        "MixtralForCausalLM" => {
            Some(Names { block: "block_sparse_moe", gate: "w1", up: "w3", down: "w2" })
        }
        _ => None,
    }
}

/// Replaces the stacked tensors of a file by their slices.
///
/// # Errors
/// When a stacked tensor has no such shape, or one of its slices is there already.
pub(crate) fn unstack(file: &mut SafetensorsFile, config: &Value) -> Result<()> {
    let Some(names) = names(config) else { return Ok(()) };
    let Names { block, gate, up, down } = names;
    let mut tensors = BTreeMap::new();
    for (name, header) in std::mem::take(&mut file.tensors) {
        let slices = if let Some(layer) = name.strip_suffix(".mlp.experts.gate_up_proj") {
            let expected = "[experts, 2 × width, hidden]";
            split(file, &name, &header, [gate, up], expected, &format!("{layer}.{block}"))?
        } else if let Some(layer) = name.strip_suffix(".mlp.experts.down_proj") {
            let expected = "[experts, hidden, width]";
            split(file, &name, &header, [down], expected, &format!("{layer}.{block}"))?
        } else if let Some(layer) = name.strip_suffix(".mlp.gate.weight") {
            // The router has its new name in the new format only.
            vec![(format!("{layer}.{block}.gate.weight"), header)]
        } else {
            vec![(name, header)]
        };
        for (name, header) in slices {
            if tensors.insert(name.clone(), header).is_some() {
                let (path, other) = (file.path.clone(), file.path.clone());
                return Err(Error::DuplicateTensor { path, other, tensor: name });
            }
        }
    }
    file.tensors = tensors;
    Ok(())
}

/// The matrices `sites` of every expert, each expert's next to each other.
fn split<const N: usize>(
    file: &SafetensorsFile,
    name: &str,
    header: &TensorHeader,
    sites: [&str; N],
    expected: &'static str,
    block: &str,
) -> Result<Vec<(String, TensorHeader)>> {
    let (n_experts, shape) = match header.shape[..] {
        [n_experts, rows, columns]
            if n_experts <= MAX_EXPERTS && rows > 0 && rows % N == 0 && columns > 0 =>
        {
            (n_experts, vec![rows / N, columns])
        }
        _ => {
            return Err(Error::StackedShape {
                path: file.path.clone(),
                tensor: name.to_owned(),
                expected,
                got: header.shape.clone(),
            });
        }
    };
    let n_bytes = header.size_bytes() / (n_experts * N).max(1);
    let slice = |i: usize| {
        let (expert, site) = (i / N, sites[i % N]);
        let name = format!("{block}.experts.{expert}.{site}.weight");
        (name, header.slice(i * n_bytes, n_bytes, shape.clone()))
    };
    Ok((0..n_experts * N).map(slice).collect())
}
