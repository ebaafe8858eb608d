use std::path::{Path, PathBuf};

use onebase_format::artifact::Artifact;
use onebase_format::{CONFIG_FILE, Checkpoint};
use onebase_kernels::PackedFormat;
use serde_json::Value;

use crate::quantized::{QUANTIZATION_FIELD, Quantization};
use crate::{Error, Result};

/// A family of decoders that differ in biases, norms and defaults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    /// `LlamaForCausalLM`.
    Llama,
    /// `MistralForCausalLM`: Llama with a sliding window.
    Mistral,
    /// `Qwen2ForCausalLM`: biases on q, k and v.
    Qwen2,
    /// `Qwen3ForCausalLM`: norms on the heads of q and k.
    Qwen3,
    /// `Qwen3MoeForCausalLM`: Qwen3 with experts in some or all blocks.
    Qwen3Moe,
    /// `MixtralForCausalLM`: Mistral with experts in every block.
    Mixtral,
}

impl Architecture {
    const ALL: [Architecture; 6] = [
        Architecture::Llama,
        Architecture::Mistral,
        Architecture::Qwen2,
        Architecture::Qwen3,
        Architecture::Qwen3Moe,
        Architecture::Mixtral,
    ];

    /// The class name in `config.json`.
    pub fn class_name(self) -> &'static str {
        match self {
            Architecture::Llama => "LlamaForCausalLM",
            Architecture::Mistral => "MistralForCausalLM",
            Architecture::Qwen2 => "Qwen2ForCausalLM",
            Architecture::Qwen3 => "Qwen3ForCausalLM",
            Architecture::Qwen3Moe => "Qwen3MoeForCausalLM",
            Architecture::Mixtral => "MixtralForCausalLM",
        }
    }
}

/// More blocks than any model has; a larger number is a damaged file.
const MAX_LAYERS: usize = 1 << 16;

/// More experts than all blocks of any model have.
const MAX_EXPERTS: usize = 1 << 18;

/// How rotary frequencies depend on the position.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum RopeScaling {
    /// Not scaled.
    Default,
    /// All frequencies divided by a factor.
    Linear { factor: f64 },
    /// Low frequencies divided by a factor, high ones kept, the band between
    /// interpolated (Llama 3.1).
    Llama3 { factor: f64, low_freq_factor: f64, high_freq_factor: f64, original_context: f64 },
}

/// What `config.json` says of a decoder.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// The family.
    pub architecture: Architecture,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward network in blocks without experts.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub n_layers: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads.
    pub n_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Most positions.
    pub context_tokens: usize,
    /// Whether the embedding is also the head.
    pub tied: bool,
    /// The experts, where some blocks have any.
    pub mixture: Option<Mixture>,
    pub(crate) norm_eps: f32,
    pub(crate) rope_theta: f64,
    pub(crate) rope_scaling: RopeScaling,
    pub(crate) qkv_bias: bool,
    pub(crate) o_bias: bool,
    pub(crate) mlp_bias: bool,
    pub(crate) qk_norm: bool,
    /// For each layer, how many positions it sees, itself included.
    pub(crate) windows: Vec<Option<usize>>,
    /// How a base is quantized, and a model in the basis of such a base is not.
    pub quantization: Option<Quantization>,
}

/// Experts: feed-forward networks of which each token gets a few.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mixture {
    /// Experts of a block.
    pub n_experts: usize,
    /// How many of them a token gets, at most all.
    pub n_experts_per_token: usize,
    /// Width of an expert's feed-forward network.
    pub expert_size: usize,
    /// Whether the weights of a token's experts are scaled to a sum of one.
    pub(crate) normalised: bool,
    /// For each layer, whether it has experts, and not one network for all tokens.
    pub(crate) sparse: Vec<bool>,
}

/// Reads fields of a `config.json` and says where a bad one is.
struct Fields<'a> {
    path: &'a Path,
    value: &'a Value,
}

impl Fields<'_> {
    fn get(&self, field: &str) -> Option<&Value> {
        self.value.get(field).filter(|v| !v.is_null())
    }

    fn bad(&self, field: &'static str, expected: &'static str, got: Option<&Value>) -> Error {
        let got = got.map_or_else(|| "nothing".to_owned(), Value::to_string);
        Error::Config { path: self.path.to_owned(), field, expected, got }
    }

    fn parse<T>(
        &self,
        field: &'static str,
        expected: &'static str,
        default: Option<T>,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<T> {
        match (self.get(field), default) {
            (None, Some(default)) => Ok(default),
            (None, None) => Err(self.bad(field, expected, None)),
            (Some(v), _) => read(v).ok_or_else(|| self.bad(field, expected, Some(v))),
        }
    }

    /// A size: positive, and small enough that products of two do not overflow.
    fn size(&self, field: &'static str, default: Option<usize>) -> Result<usize> {
        self.parse(field, "a positive number", default, |v| {
            v.as_u64().filter(|n| (1..1 << 31).contains(n)).and_then(|n| usize::try_from(n).ok())
        })
    }

    fn flag(&self, field: &'static str, default: bool) -> Result<bool> {
        self.parse(field, "true or false", Some(default), Value::as_bool)
    }

    fn positive(&self, field: &'static str, default: Option<f64>) -> Result<f64> {
        self.parse(field, "a positive number", default, |v| {
            v.as_f64().filter(|n| n.is_finite() && *n > 0.0)
        })
    }
}

impl ModelConfig {
    /// Reads a parsed `config.json`; `path` is named in errors.
    ///
    /// # Errors
    /// When the architecture is not supported or a field is missing or bad.
    pub fn from_json(value: &Value, path: &Path) -> Result<Self> {
        let fields = Fields { path, value };
        let class = value.get("architectures").and_then(|a| a.get(0));
        let Some(architecture) = Architecture::ALL
            .into_iter()
            .find(|a| class.and_then(Value::as_str) == Some(a.class_name()))
        else {
            let expected = "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, \
                            Qwen3ForCausalLM, Qwen3MoeForCausalLM or MixtralForCausalLM";
            return Err(fields.bad("architectures", expected, class));
        };
        let activation = fields.get("hidden_act");
        if activation.is_some_and(|a| a.as_str() != Some("silu")) {
            return Err(fields.bad("hidden_act", "silu", activation));
        }
        let hidden_size = fields.size("hidden_size", None)?;
        let n_layers = fields.size("num_hidden_layers", None)?;
        if n_layers > MAX_LAYERS {
            let got = fields.get("num_hidden_layers");
            return Err(fields.bad("num_hidden_layers", "at most 65536", got));
        }
        let n_heads = fields.size("num_attention_heads", None)?;
        let n_kv_heads = fields.size("num_key_value_heads", Some(n_heads))?;
        if n_heads % n_kv_heads != 0 {
            let got = fields.get("num_key_value_heads");
            return Err(fields.bad("num_key_value_heads", "a divisor of the heads", got));
        }
        let head_dim = match architecture {
            Architecture::Qwen3 => 128,
            _ => hidden_size / n_heads,
        };
        let head_dim = fields.size("head_dim", Some(head_dim).filter(|d| *d > 0))?;
        if head_dim % 2 != 0 {
            return Err(fields.bad("head_dim", "an even number", fields.get("head_dim")));
        }
        let attention_bias = match architecture {
            Architecture::Llama | Architecture::Qwen3 | Architecture::Qwen3Moe => {
                fields.flag("attention_bias", false)?
            }
            Architecture::Mistral | Architecture::Qwen2 | Architecture::Mixtral => false,
        };
        // What the classes reckon with where the file does not say it.
        let (norm_eps, rope_theta) = match architecture {
            Architecture::Mixtral => (1e-5, 1e6),
            _ => (1e-6, 1e4),
        };
        let (rope_theta, rope_scaling) = read_rope(&fields, rope_theta)?;
        #[allow(clippy::cast_possible_truncation)]
        let mut config = Self {
            architecture,
            hidden_size,
            intermediate_size: fields.size("intermediate_size", None)?,
            n_layers,
            n_heads,
            n_kv_heads,
            head_dim,
            vocab_size: fields.size("vocab_size", None)?,
            context_tokens: fields.size("max_position_embeddings", None)?,
            tied: fields.flag("tie_word_embeddings", false)?,
            mixture: read_mixture(&fields, architecture, n_layers)?,
            norm_eps: fields.positive("rms_norm_eps", Some(norm_eps))? as f32,
            rope_theta,
            rope_scaling,
            qkv_bias: attention_bias || architecture == Architecture::Qwen2,
            o_bias: attention_bias,
            mlp_bias: architecture == Architecture::Llama && fields.flag("mlp_bias", false)?,
            qk_norm: matches!(architecture, Architecture::Qwen3 | Architecture::Qwen3Moe),
            windows: read_windows(&fields, architecture, n_layers)?,
            quantization: None,
        };
        if let Some(value) = fields.get(QUANTIZATION_FIELD) {
            config.quantization = Some(Quantization::from_json(value, &config, path)?);
        }
        Ok(config)
    }

    /// The configuration of an artifact's fine-tune: its own `config.json`, or
    /// the base's where they were the same.
    ///
    /// # Errors
    /// When the file is missing or bad, or the model is not supported.
    pub fn of_artifact(artifact: &Artifact, base: &Checkpoint) -> Result<Self> {
        let path = artifact.dir();
        let Some(bytes) = artifact.side_file(base, CONFIG_FILE)? else {
            return Err(Error::MissingFile { path: path.to_owned(), file: CONFIG_FILE });
        };
        let value = serde_json::from_slice(&bytes).map_err(|source| Error::Json {
            path: path.to_owned(),
            file: CONFIG_FILE,
            source,
        })?;
        Self::from_json(&value, path)
    }

    /// The experts of a layer; `None` where it has one feed-forward network.
    pub(crate) fn mixture_of(&self, layer: usize) -> Option<&Mixture> {
        self.mixture.as_ref().filter(|mixture| mixture.sparse[layer])
    }

    /// The same model, quantized as said, in a basis as said.
    pub fn with_quantization(self, quantization: Option<Quantization>) -> Self {
        Self { quantization, ..self }
    }

    /// Whether the model is in the basis of a quantized base, where norms of blocks have no
    /// weights: they are in the sites that follow.
    pub fn is_rotated(&self) -> bool {
        self.quantization.is_some_and(|q| q.method.is_rotated())
    }

    /// How keys and values are packed in a cache; `None` where they are f32.
    pub(crate) fn kv_format(&self) -> Option<PackedFormat> {
        self.quantization.and_then(|q| q.kv_format(self.head_dim))
    }

    /// Checks that a fine-tune's tensors have the base's shapes. The vocabulary
    /// may be larger; constants of the computation (rotary frequencies, epsilon,
    /// windows, context, how many experts a token gets) may differ, as each row is
    /// computed with its tenant's.
    ///
    /// # Errors
    /// When something differs that may not.
    pub fn check_fine_tune(&self, fine_tune: &ModelConfig, path: &Path) -> Result<()> {
        let bad = |field, expected: String, got: String| {
            Err(Error::OtherModel { path: PathBuf::from(path), field, expected, got })
        };
        if self.architecture != fine_tune.architecture {
            let (base, other) = (self.architecture, fine_tune.architecture);
            return bad("architecture", base.class_name().into(), other.class_name().into());
        }
        let basis = |c: &ModelConfig| match &c.quantization {
            Some(q) if q.method.is_rotated() => format!("{}'s", q.method.name()),
            _ => "the model's own".to_owned(),
        };
        let same = match (&self.quantization, &fine_tune.quantization) {
            (Some(base), Some(other)) => base.same_basis(other),
            _ => self.is_rotated() == fine_tune.is_rotated(),
        };
        if !same {
            return bad("the basis", basis(self), basis(fine_tune));
        }
        let sizes = |c: &ModelConfig| {
            [
                ("hidden_size", c.hidden_size),
                ("intermediate_size", c.intermediate_size),
                ("num_hidden_layers", c.n_layers),
                ("num_attention_heads", c.n_heads),
                ("num_key_value_heads", c.n_kv_heads),
                ("head_dim", c.head_dim),
            ]
        };
        for ((field, base), (_, other)) in sizes(self).into_iter().zip(sizes(fine_tune)) {
            if base != other {
                return bad(field, base.to_string(), other.to_string());
            }
        }
        if let (Some(base), Some(other)) = (&self.mixture, &fine_tune.mixture) {
            if base.n_experts != other.n_experts {
                return bad("num_experts", base.n_experts.to_string(), other.n_experts.to_string());
            }
            if base.expert_size != other.expert_size {
                let (base, other) = (base.expert_size, other.expert_size);
                return bad("moe_intermediate_size", base.to_string(), other.to_string());
            }
            if base.sparse != other.sparse {
                let (base, other) = (base.sparse_layers(), other.sparse_layers());
                return bad("the set of layers with experts", base, other);
            }
        }
        let flags = |c: &ModelConfig| {
            [
                ("tie_word_embeddings", c.tied),
                ("attention_bias", c.qkv_bias || c.o_bias),
                ("mlp_bias", c.mlp_bias),
            ]
        };
        for ((field, base), (_, other)) in flags(self).into_iter().zip(flags(fine_tune)) {
            if base != other {
                return bad(field, base.to_string(), other.to_string());
            }
        }
        if fine_tune.vocab_size < self.vocab_size {
            let expected = format!("at least {}", self.vocab_size);
            return bad("vocab_size", expected, fine_tune.vocab_size.to_string());
        }
        Ok(())
    }
}

impl Mixture {
    /// The layers with experts, for people.
    fn sparse_layers(&self) -> String {
        let layers = self.sparse.iter().enumerate().filter(|(_, sparse)| **sparse);
        format!("{:?}", layers.map(|(layer, _)| layer).collect::<Vec<_>>())
    }
}

/// The experts of an architecture that has some.
fn read_mixture(
    fields: &Fields<'_>,
    architecture: Architecture,
    n_layers: usize,
) -> Result<Option<Mixture>> {
    // Model hubs have the first name for Qwen3, transformers 5 writes the second.
    let count = match (architecture, fields.get("num_experts")) {
        (Architecture::Qwen3Moe, Some(_)) => "num_experts",
        (Architecture::Qwen3Moe | Architecture::Mixtral, _) => "num_local_experts",
        _ => return Ok(None),
    };
    let n_experts = fields.size(count, None)?;
    if n_experts > MAX_EXPERTS / n_layers {
        return Err(fields.bad(count, "at most 262144 in all layers", fields.get(count)));
    }
    let n_experts_per_token = fields.size("num_experts_per_tok", None)?;
    if n_experts_per_token > n_experts {
        let got = format!("{n_experts_per_token} of {n_experts}");
        let (path, field) = (fields.path.to_owned(), "num_experts_per_tok");
        return Err(Error::Config { path, field, expected: "at most the number of experts", got });
    }
    if architecture == Architecture::Mixtral {
        let expert_size = fields.size("intermediate_size", None)?;
        let sparse = vec![true; n_layers];
        return Ok(Some(Mixture {
            n_experts,
            n_experts_per_token,
            expert_size,
            normalised: true,
            sparse,
        }));
    }
    let step = fields.size("decoder_sparse_step", Some(1))?;
    let dense = fields.parse("mlp_only_layers", "a list of layers", Some(Vec::new()), |v| {
        v.as_array()?.iter().map(Value::as_u64).collect()
    })?;
    let sparse =
        |layer: usize| (layer + 1).is_multiple_of(step) && !dense.contains(&(layer as u64));
    Ok(Some(Mixture {
        n_experts,
        n_experts_per_token,
        expert_size: fields.size("moe_intermediate_size", None)?,
        normalised: fields.flag("norm_topk_prob", false)?,
        sparse: (0..n_layers).map(sparse).collect(),
    }))
}

/// Base and scaling of the rotary frequencies: in `rope_parameters`, or, as
/// transformers 4 wrote them, in `rope_theta` and `rope_scaling`.
fn read_rope(fields: &Fields<'_>, default_theta: f64) -> Result<(f64, RopeScaling)> {
    let nested = fields.get("rope_parameters");
    let value = nested.or_else(|| fields.get("rope_scaling")).unwrap_or(&Value::Null);
    let nested = value.as_object().is_some_and(|o| o.values().any(Value::is_object));
    if nested || !(value.is_null() || value.is_object()) {
        return Err(fields.bad("rope_parameters", "one object for all layers", Some(value)));
    }
    let rope = Fields { path: fields.path, value };
    let theta = match rope.get("rope_theta") {
        Some(_) => rope.positive("rope_theta", None)?,
        None => fields.positive("rope_theta", Some(default_theta))?,
    };
    let kind = rope.get("rope_type").or_else(|| rope.get("type"));
    let scaling = match kind.map(|k| k.as_str()) {
        None | Some(Some("default")) => RopeScaling::Default,
        Some(Some("linear")) => RopeScaling::Linear { factor: rope.positive("factor", None)? },
        Some(Some("llama3")) => RopeScaling::Llama3 {
            factor: rope.positive("factor", None)?,
            low_freq_factor: rope.positive("low_freq_factor", None)?,
            high_freq_factor: rope.positive("high_freq_factor", None)?,
            original_context: rope.positive("original_max_position_embeddings", None)?,
        },
        Some(_) => return Err(rope.bad("rope_type", "default, linear or llama3", kind)),
    };
    if let RopeScaling::Llama3 { low_freq_factor, high_freq_factor, .. } = scaling
        && low_freq_factor >= high_freq_factor
    {
        let got = rope.get("high_freq_factor");
        return Err(rope.bad("high_freq_factor", "more than low_freq_factor", got));
    }
    Ok((theta, scaling))
}

/// The window of each layer. `layer_types` says it where present; before it
/// existed, Mistral's held for all layers and Qwen's from `max_window_layers` on.
fn read_windows(
    fields: &Fields<'_>,
    architecture: Architecture,
    n_layers: usize,
) -> Result<Vec<Option<usize>>> {
    let none = Ok(vec![None; n_layers]);
    let (default, used) = match architecture {
        Architecture::Llama => return none,
        Architecture::Mistral => (4096, true),
        Architecture::Mixtral => (4096, fields.get("sliding_window").is_some()),
        Architecture::Qwen2 | Architecture::Qwen3 | Architecture::Qwen3Moe => {
            (4096, fields.flag("use_sliding_window", false)?)
        }
    };
    // Written as null, it means none; left out, the class's default.
    if !used || fields.value.get("sliding_window").is_some_and(Value::is_null) {
        return none;
    }
    let window = fields.size("sliding_window", Some(default))?;
    if let Some(types) = fields.get("layer_types") {
        let expected = "full_attention or sliding_attention for each layer";
        let bad = || fields.bad("layer_types", expected, Some(types));
        let types = types.as_array().filter(|t| t.len() == n_layers).ok_or_else(bad)?;
        let read = |kind: &Value| match kind.as_str() {
            Some("full_attention") => Ok(None),
            Some("sliding_attention") => Ok(Some(window)),
            _ => Err(bad()),
        };
        return types.iter().map(read).collect();
    }
    let first = match architecture {
        Architecture::Mistral | Architecture::Mixtral | Architecture::Qwen3Moe => 0,
        _ => fields.parse("max_window_layers", "a number", Some(28), Value::as_u64)?,
    };
    Ok((0..n_layers).map(|layer| (layer as u64 >= first).then_some(window)).collect())
}
