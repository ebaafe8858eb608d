use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use onebase_format::Digest;

/// Why a tenant was not loaded or a request not answered.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A model, an artifact or a prompt was refused.
    #[error(transparent)]
    Model(Arc<onebase_model::Error>),
    /// Nobody has this name.
    #[error("there is no model {name:?}")]
    UnknownTenant {
        /// What was asked for.
        name: String,
        /// Names that are like it, the nearest first.
        nearest: Vec<String>,
    },
    /// The tenant is wanted but could not be loaded.
    #[error("tenant {name:?} could not be loaded")]
    TenantFailed {
        /// The tenant.
        name: String,
        /// Why.
        source: Arc<Error>,
    },
    /// Somebody else has changed the tenant.
    #[error("tenant {name:?}: expected generation {expected}, it has {got}")]
    Generation {
        /// The tenant.
        name: String,
        /// What the caller believed; 0 for a tenant that is not there.
        expected: u64,
        /// What it is.
        got: u64,
    },
    /// The tenant is being loaded or unloaded by another call.
    #[error("tenant {name:?} is being changed by another call")]
    Busy {
        /// The tenant.
        name: String,
    },
    /// A name that no tenant can have.
    #[error("tenant name {name:?}: {problem}")]
    BadName {
        /// The name.
        name: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// A delta under which the model answers as its base.
    #[error("{} changes nothing: its logits on the probe are the base's", path.display())]
    NoEffect {
        /// The artifact.
        path: PathBuf,
        /// The task and the skill that its quality record claims, if it has one.
        claimed: Option<(String, f64)>,
    },
    /// An artifact is another one than that which was loaded.
    #[error("{} was changed: expected the delta {expected}, got {got}", path.display())]
    Changed {
        /// The artifact.
        path: PathBuf,
        /// The digest of the delta that was loaded.
        expected: Digest,
        /// The digest of what is there now.
        got: Digest,
    },
    /// A tenant that is larger than the memory for all of them.
    #[error("tenant {name:?} takes {bytes} bytes, all deltas together may take {limit}")]
    TooLarge {
        /// The tenant.
        name: String,
        /// Its bytes.
        bytes: usize,
        /// The limit.
        limit: usize,
    },
    /// All tenants in memory are in use.
    #[error("no memory for tenant {name:?}: all tenants in memory are answering")]
    NoRoom {
        /// The tenant.
        name: String,
    },
    /// Too many requests wait.
    #[error("{n_waiting} requests wait, no more are taken")]
    QueueFull {
        /// How many.
        n_waiting: usize,
        /// When it may be worth asking again.
        retry_after: Duration,
    },
    /// The request's time is over.
    #[error("the request's time is over")]
    Deadline,
    /// No requests are taken any more.
    #[error("the engine is shutting down")]
    Draining,
    /// A request that the key and value memory cannot hold.
    #[error("the request needs {n_tokens} positions, the memory for keys and values has {limit}")]
    KvTooSmall {
        /// Prompt and answer.
        n_tokens: usize,
        /// The limit.
        limit: usize,
    },
    /// Prompt and answer are longer than the model can be run.
    #[error(
        "this model's context is {context_tokens} tokens, the prompt has {prompt_tokens} and \
         {max_new_tokens} more were asked for"
    )]
    Context {
        /// Tokens of the prompt.
        prompt_tokens: usize,
        /// Most tokens to add.
        max_new_tokens: usize,
        /// Positions of the model.
        context_tokens: usize,
    },
    /// A parameter of a request is out of range.
    #[error("{field}: expected {expected}, got {got}")]
    Invalid {
        /// The parameter.
        field: &'static str,
        /// What it can be.
        expected: String,
        /// What it is.
        got: String,
    },
    /// A constraint leaves no token, or failed.
    #[error("the constraint on the answer failed: {problem}")]
    Constraint {
        /// What it said.
        problem: String,
    },
    /// A defect of this program, met while answering this request alone.
    #[error("an internal error ended this request")]
    Internal,
    /// Threads could not be started.
    #[error("cannot start threads")]
    Threads(Arc<dyn std::error::Error + Send + Sync>),
}

impl From<onebase_model::Error> for Error {
    fn from(error: onebase_model::Error) -> Self {
        Error::Model(Arc::new(error))
    }
}

impl From<onebase_format::Error> for Error {
    fn from(error: onebase_format::Error) -> Self {
        onebase_model::Error::from(error).into()
    }
}

impl Error {
    /// What the caller may do about it.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Error::Model(e) => return e.hint(),
            Error::UnknownTenant { nearest, .. } if !nearest.is_empty() => {
                format!("did you mean {}?", nearest.join(" or "))
            }
            Error::TenantFailed { source, .. } => return source.hint(),
            Error::NoEffect { claimed: Some((task, kept)), .. } => format!(
                "its quality record claims {:.0} % of the skill on {task}: the artifact is not \
                 the one that was measured; compress the fine-tune again",
                100.0 * kept
            ),
            Error::NoEffect { claimed: None, .. } => {
                "base and fine-tune are the same model, or the artifact was made from the wrong one"
                    .into()
            }
            Error::Changed { .. } => {
                "load the tenant again to serve what is there now; artifacts are replaced by new \
                 folders, never in place"
                    .into()
            }
            Error::TooLarge { .. } => "raise the limit with --delta-bytes".into(),
            Error::KvTooSmall { .. } => "raise the limit with --kv-bytes, or ask for less".into(),
            Error::Generation { .. } => "read the tenant's generation again, then decide".into(),
            _ => return None,
        })
    }

    /// The message with those of all causes.
    pub fn full(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            text.push_str(": ");
            text.push_str(&error.to_string());
            cause = error.source();
        }
        text
    }
}
