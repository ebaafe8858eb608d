//! Decoder models over one base, with each tenant's delta added to its own rows.
//!
//! [`Model`] is a base in memory; [`Tenant`] is one artifact loaded against it;
//! [`Model::forward`] runs rows of several tenants in one batch, and
//! [`generate`] decodes a set of requests; [`LayerRun`] runs a text block by block. The forward pass is the same for
//! evaluation and for serving.

mod chat_template;
mod config;
mod decoder;
mod delta;
mod error;
mod forward;
mod generate;
mod kv_cache;
mod linear;
mod model;
mod observer;
pub mod quantized;
mod rope;
mod sampler;
mod tenant;
mod tokenizer;
mod weights;

pub use chat_template::{ChatTemplate, Message};
pub use config::{Architecture, ModelConfig};
pub use decoder::{TensorSpec, tensor_specs};
pub use delta::load_delta;
pub use error::Error;
pub use forward::{LayerRun, Logits, Segment};
pub use generate::{Completion, FinishReason, Generation, Request, generate};
pub use kv_cache::KvCache;
pub use model::{Model, check_tensors};
pub use observer::{Nobody, Observer, SiteInput};
pub use sampler::{Sampler, SamplingParams};
pub use tenant::{Tenant, Wrap, resident_bytes_of};
pub use tokenizer::{GenerationDefaults, TextModel, Tokenizer, start_token, stop_tokens};

/// The result of this crate's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;
