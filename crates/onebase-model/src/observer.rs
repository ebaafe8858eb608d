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
}

impl SiteInput {
    /// Every input of a block, in the order of the forward pass.
    pub const ALL: [SiteInput; 4] = [
        SiteInput::Attention,
        SiteInput::AttentionOutput,
        SiteInput::FeedForward,
        SiteInput::FeedForwardOutput,
    ];

    /// The sites that read it, named within their block.
    pub fn sites(self) -> &'static [&'static str] {
        match self {
            SiteInput::Attention => &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            SiteInput::AttentionOutput => &["self_attn.o_proj"],
            SiteInput::FeedForward => &["mlp.gate_proj", "mlp.up_proj"],
            SiteInput::FeedForwardOutput => &["mlp.down_proj"],
        }
    }
}

/// Who is shown the inputs of linear sites while a batch runs.
pub trait Observer {
    /// The input `x`, `[n_rows, in_features]`, of sites of the block `layer`; the
    /// rows are those of the batch, in no particular order.
    fn observe(&mut self, layer: usize, input: SiteInput, x: MatrixRef<'_>);
}

/// Nobody looks.
pub(crate) struct Nobody;

impl Observer for Nobody {
    fn observe(&mut self, _: usize, _: SiteInput, _: MatrixRef<'_>) {}
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use onebase_format::artifact::Role;
    use serde_json::json;

    use super::*;
    use crate::{ModelConfig, tensor_specs};

    #[test]
    fn every_linear_site_of_a_block_reads_one_input() {
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "intermediate_size": 16,
            "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
            "vocab_size": 32, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
            "max_position_embeddings": 64,
        });
        let config = ModelConfig::from_json(&config, std::path::Path::new("here")).unwrap();
        let linear = tensor_specs(&config).into_iter().filter(|s| s.role == Role::Linear);
        let expected: BTreeSet<String> = linear.map(|s| s.name).collect();
        let sites = SiteInput::ALL.into_iter().flat_map(SiteInput::sites);
        let named: Vec<String> =
            sites.map(|site| format!("model.layers.0.{site}.weight")).collect();
        assert_eq!(named.len(), expected.len());
        assert_eq!(named.into_iter().collect::<BTreeSet<_>>(), expected);
    }
}
