//! Vectorised products and element-wise operations: the one crate with SIMD.
//!
//! Every kernel is written once over sixteen virtual lanes (`vector::Lanes`) and
//! compiled for each instruction set; which one runs is decided at run time.
//!
//! **Batch invariance.** A product's element `y[row, out]` is always summed in
//! the same order: lane `k mod 16` takes the terms of its `k` in ascending order
//! and the lanes are added in one fixed tree; where lanes are rows (`gathered`), terms
//! are added by 32 in one, and sums of integers (`integer`, `interleaved`) are exact. Neither the number of rows in the
//! batch, nor the threads, nor the position in a tile changes a bit of it, so a
//! row's result in a mixed batch equals its result alone. AVX2 and AVX-512 agree
//! to the last bit; the portable code multiplies and adds in two roundings.

#![allow(unsafe_code)]

mod attention;
mod backend;
mod bytes;
mod dense;
mod elementwise;
mod fit;
mod gathered;
mod hadamard;
mod integer;
mod interleaved;
mod lowbit;
pub mod naive;
mod packed;
mod parallel;
mod quantize;
pub mod rans;
mod sign;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_attention;
#[cfg(test)]
mod tests_hadamard;
#[cfg(test)]
mod tests_integer;
#[cfg(test)]
mod tests_interleaved;
pub mod thin;
mod tiles;
mod vector;
pub mod words;
#[cfg(target_arch = "x86_64")]
mod x86_64;

pub use attention::Attention;
pub use backend::{Backend, ENV_OVERRIDE, UnavailableBackend};
pub use elementwise::{add_assign, rms_norm, silu_mul};
pub use gathered::Gathered;
pub use hadamard::Hadamard;
pub use integer::{Mixed, Parts, QuantizedRows, low_bytes, mixed_sums, pack_low};
pub use interleaved::Interleaved;
pub use lowbit::{Affine, LowBit, MAX_BITS};
pub use packed::{PackedAttention, PackedFormat};
pub use sign::Sign;
pub use vector::{LANES, plane_bytes};
