//! Answers for many tenants of one base: which of them are in memory, and which of their
//! requests run next.
//!
//! [`Registry`] knows the tenants: it loads, unloads and swaps them while others answer, keeps
//! those in memory that are used, and refuses a delta that is damaged, of another base or without
//! effect. [`Engine`] runs requests in one batch over the base, each row with its tenant's delta,
//! and sends what becomes of them to a [`Sink`]. A request's tokens are those that it gets alone.
//! There is no HTTP and no JSON here.

mod engine;
mod entries;
mod error;
mod metrics;
mod names;
mod prefix;
mod queue;
mod registry;
mod request;
mod sampling;
mod scheduler;
mod sequence;
mod text_stream;
mod voice;

pub use engine::{Engine, Options, Ticket};
pub use entries::{Desired, Listing};
pub use error::Error;
pub use metrics::{BUCKETS_SECONDS, Histogram, Metrics, TenantMetrics};
pub use names::check_name;
pub use registry::{Lease, Registry};
pub use request::{
    Constraint, Event, MAX_LOGPROBS, MAX_STOP_TEXTS, Penalties, Request, Sink, TokenLogprobs, Usage,
};
pub use voice::{Facts, Voice};

/// The result of this crate's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;
