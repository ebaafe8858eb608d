//! The engine behind HTTP, as clients of OpenAI's API expect it.
//!
//! [`router`] gives the routes of an [`App`], [`serve`] answers on a listener until it is told to
//! stop. Models are the base and its tenants; what changes tenants needs the admin's key. Which
//! tenants are served outlives the process in a [`StateFile`].

mod admin;
mod app;
mod auth;
mod chat;
mod completions;
mod error;
mod extract;
mod flow;
mod listen;
mod metrics;
mod models;
mod page;
mod params;
mod render;
mod routes;
mod state_file;
mod stream;
mod structured;
mod tenants;
mod tokenize;
mod traces;

pub use app::{App, Limits};
pub use auth::{Keys, KeysError};
pub use listen::{Listen, serve};
pub use routes::router;
pub use state_file::{Saved, StateError, StateFile};
pub use tenants::{Found, find_tenants};
pub use traces::{Traces, TracesError};
