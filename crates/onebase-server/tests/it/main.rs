//! The tests of the server over HTTP.

// Helpers of tests may panic as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod api;
mod life;
mod support;
mod traces;
