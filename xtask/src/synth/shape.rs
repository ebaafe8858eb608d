//! Shapes of real models: their configuration and their tensors.

use anyhow::{Result, ensure};
use onebase_tensor::DType;
use serde_json::{Map, Value, json};

use super::side_files::{BOS_ID, EOS_ID};

/// What tells one family of architectures from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    /// `LlamaForCausalLM`.
    Llama,
    /// `Qwen2ForCausalLM`: biases on q, k and v.
    Qwen2,
    /// `Qwen3ForCausalLM`, with experts `Qwen3MoeForCausalLM`: norms on q and k.
    Qwen3,
}

/// A model's shape.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    /// The model that has it.
    pub(super) name: &'static str,
    pub(super) family: Family,
    pub(super) hidden: usize,
    pub(super) intermediate: usize,
    pub(super) n_layers: usize,
    pub(super) n_heads: usize,
    pub(super) n_kv_heads: usize,
    pub(super) head_dim: usize,
    /// Some published configurations leave it to be computed.
    pub(super) names_head_dim: bool,
    pub(super) vocab: usize,
    pub(super) tied: bool,
    pub(super) rope_theta: f64,
    /// The factor of `llama3` scaling.
    pub(super) rope_factor: Option<f64>,
    pub(super) max_positions: usize,
    /// In every block, in place of one feed-forward network.
    pub(super) experts: Option<Experts>,
}

/// The experts of a block.
#[derive(Clone, Copy, Debug)]
pub(super) struct Experts {
    pub(super) n_experts: usize,
    pub(super) per_token: usize,
    pub(super) intermediate: usize,
}

/// The shapes that can be asked for.
pub(super) const SHAPES: [Shape; 5] = [
    Shape {
        name: "llama-3.2-1b",
        family: Family::Llama,
        hidden: 2048,
        intermediate: 8192,
        n_layers: 16,
        n_heads: 32,
        n_kv_heads: 8,
        head_dim: 64,
        names_head_dim: true,
        vocab: 128_256,
        tied: true,
        rope_theta: 500_000.0,
        rope_factor: Some(32.0),
        max_positions: 131_072,
        experts: None,
    },
    Shape {
        name: "qwen2.5-0.5b",
        family: Family::Qwen2,
        hidden: 896,
        intermediate: 4864,
        n_layers: 24,
        n_heads: 14,
        n_kv_heads: 2,
        head_dim: 64,
        names_head_dim: false,
        vocab: 151_936,
        tied: true,
        rope_theta: 1_000_000.0,
        rope_factor: None,
        max_positions: 32_768,
        experts: None,
    },
    Shape {
        name: "llama-3.1-8b",
        family: Family::Llama,
        hidden: 4096,
        intermediate: 14_336,
        n_layers: 32,
        n_heads: 32,
        n_kv_heads: 8,
        head_dim: 128,
        names_head_dim: false,
        vocab: 128_256,
        tied: false,
        rope_theta: 500_000.0,
        rope_factor: Some(8.0),
        max_positions: 131_072,
        experts: None,
    },
    Shape {
        name: "qwen3-4b",
        family: Family::Qwen3,
        hidden: 2560,
        intermediate: 9728,
        n_layers: 36,
        n_heads: 32,
        n_kv_heads: 8,
        head_dim: 128,
        names_head_dim: true,
        vocab: 151_936,
        tied: true,
        rope_theta: 1_000_000.0,
        rope_factor: None,
        max_positions: 40_960,
        experts: None,
    },
    Shape {
        name: "qwen3-30b-a3b",
        family: Family::Qwen3,
        hidden: 2048,
        intermediate: 6144,
        n_layers: 48,
        n_heads: 32,
        n_kv_heads: 4,
        head_dim: 128,
        names_head_dim: true,
        vocab: 151_936,
        tied: false,
        rope_theta: 1_000_000.0,
        rope_factor: None,
        max_positions: 40_960,
        experts: Some(Experts { n_experts: 128, per_token: 8, intermediate: 768 }),
    },
];

/// How a tensor's base values are distributed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// Rows by token.
    Embedding,
    /// A matrix `[out_features, in_features]`.
    Linear,
    /// The weight of a norm, near one.
    Norm,
    /// The bias of a linear site.
    Bias,
}

/// A tensor of a checkpoint.
#[derive(Clone, Debug)]
pub(super) struct TensorSpec {
    pub(super) name: String,
    pub(super) shape: Vec<usize>,
    pub(super) role: Role,
}

impl TensorSpec {
    fn new(name: impl Into<String>, shape: &[usize], role: Role) -> Self {
        Self { name: name.into(), shape: shape.to_vec(), role }
    }

    /// Bytes of its data.
    pub(super) fn size_bytes(&self) -> u64 {
        self.shape.iter().map(|d| *d as u64).product::<u64>() * DType::BF16.size_bytes() as u64
    }
}

impl Shape {
    /// The shape of this name.
    pub(super) fn named(name: &str) -> Option<Self> {
        SHAPES.into_iter().find(|s| s.name == name)
    }

    /// The same with its first layers only.
    pub(super) fn with_layers(self, n_layers: usize) -> Result<Self> {
        ensure!(
            (1..=self.n_layers).contains(&n_layers),
            "expected 1 to {} for {}, got {n_layers}",
            self.n_layers,
            self.name
        );
        Ok(Self { n_layers, ..self })
    }

    /// Its `config.json`, with the keys that the real model's has.
    pub(super) fn config(&self) -> Value {
        let (architecture, model_type) = match self.family {
            Family::Llama => ("LlamaForCausalLM", "llama"),
            Family::Qwen2 => ("Qwen2ForCausalLM", "qwen2"),
            Family::Qwen3 if self.experts.is_some() => ("Qwen3MoeForCausalLM", "qwen3_moe"),
            Family::Qwen3 => ("Qwen3ForCausalLM", "qwen3"),
        };
        let mut config = Map::new();
        let mut set = |pairs: Value| {
            if let Value::Object(pairs) = pairs {
                config.extend(pairs);
            }
        };
        set(json!({
            "architectures": [architecture],
            "attention_dropout": 0.0,
            "bos_token_id": BOS_ID,
            "eos_token_id": EOS_ID,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": self.max_positions,
            "model_type": model_type,
            "num_attention_heads": self.n_heads,
            "num_hidden_layers": self.n_layers,
            "num_key_value_heads": self.n_kv_heads,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": self.tied,
            "torch_dtype": "bfloat16",
            "use_cache": true,
            "vocab_size": self.vocab,
        }));
        if self.names_head_dim {
            set(json!({ "head_dim": self.head_dim }));
        }
        set(match self.family {
            Family::Llama => json!({
                "attention_bias": false,
                "mlp_bias": false,
                "pretraining_tp": 1,
                "rms_norm_eps": 1e-5,
                "rope_scaling": self.rope_factor.map(|factor| json!({
                    "factor": factor,
                    "high_freq_factor": 4.0,
                    "low_freq_factor": 1.0,
                    "original_max_position_embeddings": 8192,
                    "rope_type": "llama3",
                })),
                "transformers_version": "4.45.0",
            }),
            Family::Qwen2 => json!({
                "max_window_layers": self.n_layers,
                "rms_norm_eps": 1e-6,
                "sliding_window": self.max_positions,
                "transformers_version": "4.40.1",
                "use_mrope": false,
                "use_sliding_window": false,
            }),
            Family::Qwen3 => json!({
                "attention_bias": false,
                "max_window_layers": self.n_layers,
                "rms_norm_eps": 1e-6,
                "rope_scaling": null,
                "sliding_window": null,
                "transformers_version": "4.51.0",
                "use_sliding_window": false,
            }),
        });
        if let Some(experts) = self.experts {
            set(json!({
                "decoder_sparse_step": 1,
                "mlp_only_layers": [],
                "moe_intermediate_size": experts.intermediate,
                "norm_topk_prob": true,
                "num_experts": experts.n_experts,
                "num_experts_per_tok": experts.per_token,
                "output_router_logits": false,
                "router_aux_loss_coef": 0.001,
            }));
        }
        config.sort_keys();
        Value::Object(config)
    }

    /// Its tensors in the order in which a model is saved.
    pub(super) fn tensors(&self) -> Vec<TensorSpec> {
        let hidden = self.hidden;
        let (q, kv) = (self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim);
        let mut tensors = vec![TensorSpec::new(
            "model.embed_tokens.weight",
            &[self.vocab, hidden],
            Role::Embedding,
        )];
        for layer in 0..self.n_layers {
            let mut add = |name: &str, shape: &[usize], role| {
                tensors.push(TensorSpec::new(format!("model.layers.{layer}.{name}"), shape, role));
            };
            for (site, out) in [("q", q), ("k", kv), ("v", kv)] {
                add(&format!("self_attn.{site}_proj.weight"), &[out, hidden], Role::Linear);
                if self.family == Family::Qwen2 {
                    add(&format!("self_attn.{site}_proj.bias"), &[out], Role::Bias);
                }
            }
            add("self_attn.o_proj.weight", &[hidden, q], Role::Linear);
            if self.family == Family::Qwen3 {
                add("self_attn.q_norm.weight", &[self.head_dim], Role::Norm);
                add("self_attn.k_norm.weight", &[self.head_dim], Role::Norm);
            }
            let mut add_mlp = |module: &str, width: usize| {
                add(&format!("{module}.gate_proj.weight"), &[width, hidden], Role::Linear);
                add(&format!("{module}.up_proj.weight"), &[width, hidden], Role::Linear);
                add(&format!("{module}.down_proj.weight"), &[hidden, width], Role::Linear);
            };
            match self.experts {
                None => add_mlp("mlp", self.intermediate),
                Some(Experts { n_experts, intermediate, .. }) => {
                    for expert in 0..n_experts {
                        add_mlp(&format!("mlp.experts.{expert}"), intermediate);
                    }
                    add("mlp.gate.weight", &[n_experts, hidden], Role::Linear);
                }
            }
            add("input_layernorm.weight", &[hidden], Role::Norm);
            add("post_attention_layernorm.weight", &[hidden], Role::Norm);
        }
        tensors.push(TensorSpec::new("model.norm.weight", &[hidden], Role::Norm));
        if !self.tied {
            tensors.push(TensorSpec::new("lm_head.weight", &[self.vocab, hidden], Role::Linear));
        }
        tensors
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shapes_have_as_many_weights_as_the_real_models() {
        let n_weights =
            SHAPES.map(|s| s.tensors().iter().map(TensorSpec::size_bytes).sum::<u64>() / 2);
        let expected = [1_235_814_400, 494_032_768, 8_030_261_248, 4_022_468_096, 30_532_122_624];
        assert_eq!(n_weights, expected);
    }

    #[test]
    fn a_configuration_describes_the_tensors() {
        for shape in SHAPES {
            let config = shape.config();
            let number = |key: &str| config[key].as_u64().unwrap() as usize;
            assert!(number("eos_token_id") < number("vocab_size"));
            assert!(number("bos_token_id") < number("vocab_size"));
            assert_eq!(config["torch_dtype"], "bfloat16");
            assert_eq!(config["rope_scaling"].is_object(), shape.family == Family::Llama);
            let head_dim = config["head_dim"].as_u64().map_or_else(
                || number("hidden_size") / number("num_attention_heads"),
                |d| d as usize,
            );
            let tensors = shape.tensors();
            let shape_of = |name: &str| &tensors.iter().find(|t| t.name == name).unwrap().shape;
            assert_eq!(
                shape_of("model.layers.0.self_attn.k_proj.weight"),
                &[number("num_key_value_heads") * head_dim, number("hidden_size")]
            );
            assert_eq!(
                shape_of("model.layers.0.self_attn.o_proj.weight"),
                &[number("hidden_size"), number("num_attention_heads") * head_dim]
            );
            if let Some(last) = config["num_experts"].as_u64().map(|n| n - 1) {
                assert_eq!(
                    shape_of(&format!("model.layers.0.mlp.experts.{last}.down_proj.weight")),
                    &[number("hidden_size"), number("moe_intermediate_size")]
                );
                assert_eq!(
                    shape_of("model.layers.0.mlp.gate.weight"),
                    &[number("num_experts"), number("hidden_size")]
                );
            }
            let has_head = tensors.iter().any(|t| t.name == "lm_head.weight");
            assert_eq!(config["tie_word_embeddings"], !has_head);
        }
    }

    #[test]
    fn layers_can_be_left_out_and_not_added() {
        let shape = SHAPES[0].with_layers(1).unwrap();
        assert_eq!(shape.tensors().len(), 1 + 9 + 1);
        assert_eq!(shape.config()["num_hidden_layers"], 1);
        for n_layers in [0, 17] {
            let error = SHAPES[0].with_layers(n_layers).unwrap_err().to_string();
            assert_eq!(error, format!("expected 1 to 16 for llama-3.2-1b, got {n_layers}"));
        }
    }
}
