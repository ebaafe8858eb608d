use std::str::FromStr;

use onebase_codec::CodecSpec;

/// How the tensors of a fine-tune are stored. Norms and biases are always exact.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The codec of the linear sites.
    pub linear: CodecSpec,
    /// What is done with embeddings and head.
    pub tables: TablePlan,
}

/// How token tables, the embeddings and the head, are stored.
#[derive(Clone, Debug)]
pub enum TablePlan {
    /// As they are in the fine-tune.
    Exact,
    /// As a delta.
    Codec(CodecSpec),
}

impl FromStr for TablePlan {
    type Err = onebase_codec::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "exact" { Ok(TablePlan::Exact) } else { text.parse().map(TablePlan::Codec) }
    }
}
