use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use onebase_codec::CodecSpec;
use onebase_format::artifact::Role;
use onebase_model::TensorSpec;

/// How exact storage is written.
const EXACT: &str = "exact";

/// How the tensors of a fine-tune are stored. Routers are always exact.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The codec of the linear sites.
    pub linear: CodecSpec,
    /// What is done with embeddings and head.
    pub tables: TablePlan,
    /// What is done with norms and biases.
    pub vectors: VectorPlan,
    /// Linear sites that have a codec of their own, by the tensor's name.
    pub sites: BTreeMap<String, CodecSpec>,
}

impl Plan {
    /// The codec of a tensor of this shape; `None` where it is stored as it is.
    pub fn codec(&self, tensor: &TensorSpec, shape: &[usize]) -> Option<&CodecSpec> {
        match (tensor.role, &self.tables, &self.vectors) {
            // A router, see the artifact format.
            (Role::Vector, ..) if shape.len() > 1 => None,
            (Role::Linear, _, _) => Some(self.sites.get(&tensor.name).unwrap_or(&self.linear)),
            (Role::Embedding | Role::Head, TablePlan::Codec(codec), _)
            | (Role::Vector, _, VectorPlan::Codec(codec)) => Some(codec),
            (Role::Embedding | Role::Head, TablePlan::Exact, _)
            | (Role::Vector, _, VectorPlan::Exact) => None,
        }
    }
}

/// How token tables, the embeddings and the head, are stored.
#[derive(Clone, Debug)]
pub enum TablePlan {
    /// As they are in the fine-tune.
    Exact,
    /// As a delta.
    Codec(CodecSpec),
}

/// How vectors, the norms and biases, are stored.
#[derive(Clone, Debug, Default)]
pub enum VectorPlan {
    /// As they are in the fine-tune.
    #[default]
    Exact,
    /// As a delta, a vector `[n]` being a matrix `[1, n]`.
    Codec(CodecSpec),
}

/// Both are written as `exact` or as a codec.
macro_rules! written {
    ($($plan:ident)*) => {$(
        impl fmt::Display for $plan {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match self {
                    $plan::Exact => f.write_str(EXACT),
                    $plan::Codec(codec) => codec.fmt(f),
                }
            }
        }

        impl FromStr for $plan {
            type Err = onebase_codec::Error;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                if text == EXACT { Ok($plan::Exact) } else { text.parse().map($plan::Codec) }
            }
        }
    )*};
}

written!(TablePlan VectorPlan);
