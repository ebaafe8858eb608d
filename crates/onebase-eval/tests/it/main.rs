//! The tests of measured figures.

// Helpers of tests may panic as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod disjoint;
mod moe;
mod reference;
