//! The tests of codecs through the public interface, but for those that count what is allocated.

// Helpers of tests may panic as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod allocation;
mod conformance;
mod deltadq;
mod families;
mod gptq;
mod lossless;
mod rqt;
mod support;
mod svd_space;
