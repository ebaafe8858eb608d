//! The tests of pipelines on folders.

// Helpers of tests may panic as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod archives;
mod budgets;
mod calibration;
mod distill;
mod families;
mod mixed_batch;
mod moe;
mod mutations;
mod pairs;
mod quantize;
mod round_trips;
mod sequential;
mod support;
mod tampered;
