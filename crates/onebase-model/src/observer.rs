use onebase_tensor::MatrixRef;

/// Which input of a block: linear sites that read the same one share it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SiteInput {
    /// The normalised stream before attention.
    Attention,
    /// The heads' outputs.
    AttentionOutput,
    /// The normalised stream before the feed-forward part.
    FeedForward,
    /// The gated activation.
    FeedForwardOutput,
    /// Rows of the normalised stream that the expert of this number was chosen for.
    Expert(usize),
    /// Their gated activation in the expert.
    ExpertOutput(usize),
}

impl SiteInput {
    /// The block of a linear site and what it reads, from its weight's name:
    /// `model.layers.3.mlp.up_proj.weight`; `None` where it is no site.
    pub fn of_weight(tensor: &str) -> Option<(usize, Self)> {
        let (layer, module) = tensor.strip_prefix("model.layers.")?.split_once('.')?;
        Some((layer.parse().ok()?, Self::of(module.strip_suffix(".weight")?)?))
    }

    /// What a site reads, named within its block: `mlp.up_proj`; `None` where it is
    /// no site.
    pub fn of(site: &str) -> Option<Self> {
        Some(match site {
            "self_attn.q_proj" | "self_attn.k_proj" | "self_attn.v_proj" => SiteInput::Attention,
            "self_attn.o_proj" => SiteInput::AttentionOutput,
            "mlp.gate_proj" | "mlp.up_proj" => SiteInput::FeedForward,
            "mlp.down_proj" => SiteInput::FeedForwardOutput,
            _ => {
                let (_, expert) = site.split_once(".experts.")?;
                let (number, matrix) = expert.split_once('.')?;
                let number = number.parse().ok()?;
                match matrix {
                    "gate_proj" | "up_proj" | "w1" | "w3" => SiteInput::Expert(number),
                    "down_proj" | "w2" => SiteInput::ExpertOutput(number),
                    _ => return None,
                }
            }
        })
    }
}

/// Its name where it is stored, within its block: `attention`, `expert.3`.
impl std::fmt::Display for SiteInput {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            SiteInput::Attention => f.write_str("attention"),
            SiteInput::AttentionOutput => f.write_str("attention_output"),
            SiteInput::FeedForward => f.write_str("feed_forward"),
            SiteInput::FeedForwardOutput => f.write_str("feed_forward_output"),
            SiteInput::Expert(number) => write!(f, "expert.{number}"),
            SiteInput::ExpertOutput(number) => write!(f, "expert_output.{number}"),
        }
    }
}

/// Who is shown the inputs of linear sites while a batch runs.
pub trait Observer {
    /// The input `x`, `[n_rows, in_features]`, of sites of the block `layer`; the
    /// rows are those of the batch, in no particular order. An expert's are those
    /// that it was chosen for, and none where there are no such.
    fn observe(&mut self, layer: usize, input: SiteInput, x: MatrixRef<'_>);

    /// The keys, after the rotary embedding, and the values of the block `layer`, as they go
    /// into the cache: `[n_rows, n_kv_heads · head_dim]` each. Few look at them.
    fn observe_heads(&mut self, _layer: usize, _keys: MatrixRef<'_>, _values: MatrixRef<'_>) {}
}

/// Nobody looks.
#[derive(Clone, Copy, Debug, Default)]
pub struct Nobody;

impl Observer for Nobody {
    fn observe(&mut self, _: usize, _: SiteInput, _: MatrixRef<'_>) {}
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use onebase_format::artifact::Role;
    use serde_json::json;

    use super::*;
    use crate::{ModelConfig, tensor_specs};

    fn config(architecture: &str) -> ModelConfig {
        let config = json!({
            "architectures": [architecture], "hidden_size": 8, "intermediate_size": 16,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
            "vocab_size": 32, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "head_dim": 6,
            "max_position_embeddings": 64, "num_local_experts": 3, "num_experts_per_tok": 2,
            "moe_intermediate_size": 10, "mlp_only_layers": [0],
        });
        ModelConfig::from_json(&config, std::path::Path::new("here")).unwrap()
    }

    #[test]
    fn every_linear_site_of_a_block_reads_one_input() {
        for (architecture, n_inputs) in [
            ("LlamaForCausalLM", 2 * 4),
            ("Qwen3MoeForCausalLM", 4 + 2 + 3 * 2),
            ("MixtralForCausalLM", 2 * (2 + 3 * 2)),
        ] {
            let mut widths = BTreeMap::new();
            for spec in tensor_specs(&config(architecture)) {
                let Some(name) = spec.name.strip_prefix("model.layers.") else { continue };
                let (layer, module) = name.split_once('.').unwrap();
                let input = SiteInput::of(module.strip_suffix(".weight").unwrap());
                let of_weight = SiteInput::of_weight(&spec.name);
                assert_eq!(of_weight, input.map(|input| (layer.parse().unwrap(), input)));
                assert_eq!(input.is_some(), spec.role == Role::Linear, "{name}");
                let Some(input) = input else { continue };
                let width = *spec.shape.last().unwrap();
                let known = *widths.entry((layer.to_owned(), input)).or_insert(width);
                assert_eq!(known, width, "{name}");
            }
            assert_eq!(widths.len(), n_inputs, "{architecture}: {widths:?}");
            let names: BTreeSet<_> =
                widths.keys().map(|(l, input)| format!("{l}.{input}")).collect();
            assert_eq!(names.len(), n_inputs, "{architecture}: {names:?}");
        }
        for other in ["mlp.gate", "mlp.experts.x.up_proj", "mlp.experts.1.w4", "input_layernorm"] {
            assert_eq!(SiteInput::of(other), None, "{other}");
        }
    }
}
