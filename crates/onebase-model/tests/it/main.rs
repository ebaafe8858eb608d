//! The tests of models: against PyTorch, and tenants beside each other.

// Helpers of tests may panic as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod fine_tune;
mod layers;
mod moe;
mod reference;
mod side_files;
mod support;
mod tenants;
