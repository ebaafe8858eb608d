//! The tests of files: good, altered and hostile ones.

// Helpers of tests may panic as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod artifacts;
mod checkpoints;
mod journals;
mod mutations;
mod statistics;
mod support;
