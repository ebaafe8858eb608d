use std::fmt;
use std::str::FromStr;

use onebase_codec::CodecSpec;
use onebase_format::artifact::Role;

/// [`TablePlan::Exact`], as it is written.
const EXACT: &str = "exact";

/// How the tensors of a fine-tune are stored. Norms and biases are always exact.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The codec of the linear sites.
    pub linear: CodecSpec,
    /// What is done with embeddings and head.
    pub tables: TablePlan,
}

impl Plan {
    /// The codec of tensors of a role; `None` where they are stored exactly.
    pub fn codec(&self, role: Role) -> Option<&CodecSpec> {
        match (role, &self.tables) {
            (Role::Vector, _) | (Role::Embedding | Role::Head, TablePlan::Exact) => None,
            (Role::Embedding | Role::Head, TablePlan::Codec(codec)) => Some(codec),
            (Role::Linear, _) => Some(&self.linear),
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

impl fmt::Display for TablePlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TablePlan::Exact => f.write_str(EXACT),
            TablePlan::Codec(codec) => codec.fmt(f),
        }
    }
}

impl FromStr for TablePlan {
    type Err = onebase_codec::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == EXACT { Ok(TablePlan::Exact) } else { text.parse().map(TablePlan::Codec) }
    }
}
