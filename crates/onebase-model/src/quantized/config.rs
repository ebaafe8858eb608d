use std::path::Path;

use onebase_kernels::{Hadamard, PackedFormat, Parts};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{Error, ModelConfig, Result, SiteInput};

/// The field of `config.json` that says how a base is quantized.
pub const QUANTIZATION_FIELD: &str = "quantization_config";

/// The value of `quant_method` in it.
pub const QUANT_METHOD: &str = "onebase";

/// The newest version of the field that this program reads.
pub const QUANTIZATION_VERSION: u32 = 1;

/// In which basis a base is quantized.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// ResQ (U. Saxena et al., 2024): principal components of the activations, the last
    /// eighth of them in 8 bits, each part randomly rotated.
    Resq,
    /// QuaRot (S. Ashkboos et al., 2024): randomised Hadamard rotations, all in one width.
    Quarot,
    /// The model's own basis, rounded to nearest.
    Rtn,
}

impl Method {
    /// `resq`, `quarot` or `rtn`.
    pub fn name(self) -> &'static str {
        match self {
            Method::Resq => "resq",
            Method::Quarot => "quarot",
            Method::Rtn => "rtn",
        }
    }

    /// Whether weights and activations are in another basis than the model's.
    pub fn is_rotated(self) -> bool {
        self != Method::Rtn
    }
}

/// Which inputs of an output projection share a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OutputScales {
    /// All of a token.
    Token,
    /// Those of a head, as in the program of ResQ's authors.
    Head,
}

/// How a base is quantized, and what that makes of its graph. Widths are in bits; 16 stands
/// for what is not quantized.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quantization {
    /// The basis.
    pub method: Method,
    /// Of weights of linear sites: 4, with 8 of [`Quantization::high_hidden`] and
    /// [`Quantization::high_head`], or 8 of all. 16 is a model in the rotated basis, whose
    /// weights are f32.
    pub weight_bits: u32,
    /// Of inputs of linear sites: 4, with 8 as of weights, or 8.
    pub activation_bits: u32,
    /// Of keys and values: 4, with 8 of [`Quantization::high_head`], or 8.
    pub kv_bits: u32,
    /// Of embedding and head, which stay in the model's own basis: 8, with a scale a row, or 16,
    /// which is as in the model.
    pub table_bits: u32,
    /// How many of the last features of the residual stream are in 8 bits.
    pub high_hidden: usize,
    /// How many of the last features of a head are.
    pub high_head: usize,
    /// Scales of the inputs of output projections.
    pub output_scales: OutputScales,
    /// Whether keys and queries are rounded to 8 bits before they are rotated, and the rotation
    /// is in 8 bits too, as in the program of ResQ's authors.
    pub round_rotation: bool,
    /// Features of the orthogonal block that stands for a Hadamard matrix on the inputs of down
    /// projections where none is known for their number; 0 where one is.
    pub hadamard_block: usize,
}

#[derive(Serialize, Deserialize)]
struct Written {
    quant_method: String,
    version: u32,
    #[serde(flatten)]
    quantization: Quantization,
}

impl Quantization {
    /// The value of [`QUANTIZATION_FIELD`].
    pub fn to_json(&self) -> Value {
        let written = Written {
            quant_method: QUANT_METHOD.to_owned(),
            version: QUANTIZATION_VERSION,
            quantization: *self,
        };
        match serde_json::to_value(written) {
            Ok(value) => value,
            Err(_) => unreachable!("numbers and names are JSON"),
        }
    }

    /// Reads the value of [`QUANTIZATION_FIELD`] of a model of the given sizes.
    pub(crate) fn from_json(value: &Value, config: &ModelConfig, path: &Path) -> Result<Self> {
        let bad = |expected, got: String| Error::Config {
            path: path.to_owned(),
            field: QUANTIZATION_FIELD,
            expected,
            got,
        };
        if value.get("quant_method").and_then(Value::as_str) != Some(QUANT_METHOD) {
            return Err(bad("none, or what `onebase quantize` writes", value.to_string()));
        }
        let written = Written::deserialize(value)
            .map_err(|error| bad("the fields of `onebase quantize`", error.to_string()))?;
        if written.version > QUANTIZATION_VERSION {
            return Err(bad("at most version 1", written.version.to_string()));
        }
        let quantization = written.quantization;
        quantization.check(config).map_err(|(expected, got)| bad(expected, got))?;
        Ok(quantization)
    }

    /// What is wrong with it for a model of these sizes: what was expected and what is there.
    fn check(&self, config: &ModelConfig) -> Result<(), (&'static str, String)> {
        let widths = [
            ("weight_bits 4, 8 or 16", self.weight_bits, &[4, 8, 16][..]),
            ("activation_bits 4, 8 or 16", self.activation_bits, &[4, 8, 16]),
            ("kv_bits 4, 8 or 16", self.kv_bits, &[4, 8, 16]),
            ("table_bits 8 or 16", self.table_bits, &[8, 16]),
        ];
        for (expected, got, known) in widths {
            if !known.contains(&got) {
                return Err((expected, got.to_string()));
            }
        }
        if self.weight_bits == 16 && self.activation_bits != 16 {
            let got = self.activation_bits.to_string();
            return Err(("activation_bits 16 with weight_bits 16", got));
        }
        if config.mixture.is_some() {
            return Err(("a model without experts", "experts".to_owned()));
        }
        if self.high_hidden > config.hidden_size {
            return Err(("high_hidden of the hidden size", self.high_hidden.to_string()));
        }
        if self.high_head > config.head_dim || !(config.head_dim - self.high_head).is_multiple_of(2)
        {
            let expected = "high_head of the head's features, an even number of others";
            return Err((expected, self.high_head.to_string()));
        }
        let inner = config.intermediate_size;
        let known = match self.hadamard_block {
            0 => !self.method.is_rotated() || Hadamard::new(inner).is_some(),
            block => inner.is_multiple_of(block) && (inner / block).is_power_of_two(),
        };
        if !known {
            let expected = "hadamard_block times a power of two to be the feed-forward size";
            return Err((expected, format!("{} of {inner}", self.hadamard_block)));
        }
        Ok(())
    }

    /// Of a model in the same basis that is not quantized, in f32.
    pub fn unquantized(self) -> Self {
        Self {
            weight_bits: 16,
            activation_bits: 16,
            kv_bits: 16,
            table_bits: 16,
            output_scales: OutputScales::Token,
            round_rotation: false,
            ..self
        }
    }

    /// Whether another model is in the same basis, so far as the graph tells.
    pub(crate) fn same_basis(&self, other: &Self) -> bool {
        let basis = |q: &Self| (q.method, q.high_hidden, q.high_head, q.hadamard_block);
        basis(self) == basis(other)
    }

    /// How many inputs of a site have weights of 4 and of 8 bits; the former come first.
    /// Inputs of down projections are all alike.
    pub fn weight_parts(&self, input: SiteInput, config: &ModelConfig) -> Parts {
        let (n, n_high) = match input {
            SiteInput::AttentionOutput => {
                (config.n_heads * config.head_dim, config.n_heads * self.high_head)
            }
            SiteInput::FeedForwardOutput | SiteInput::ExpertOutput(_) => {
                (config.intermediate_size, 0)
            }
            SiteInput::Attention | SiteInput::FeedForward | SiteInput::Expert(_) => {
                (config.hidden_size, self.high_hidden)
            }
        };
        let n_high = if self.weight_bits == 8 { n } else { n_high };
        Parts { n_low: n - n_high, n_high }
    }

    /// The widths of a site's inputs, those with low weights first; `None` where they are not
    /// rounded.
    pub(crate) fn input_bits(&self) -> Option<[u32; 2]> {
        match (self.activation_bits, self.weight_bits) {
            (16, _) => None,
            // All weights are high then, and so all inputs.
            (bits, 8) => Some([bits, bits]),
            (bits, _) => Some([bits, 8]),
        }
    }

    /// How keys and values are packed; `None` where they are f32.
    pub fn kv_format(&self, head_dim: usize) -> Option<PackedFormat> {
        let n_high = self.high_head;
        (self.kv_bits != 16).then_some(PackedFormat {
            n_low: head_dim - n_high,
            n_high,
            low_bits: self.kv_bits,
        })
    }
}
