//! Products against the limits of the machine, side by side in one run: weights
//! read per second against the read bandwidth at batch 1, multiply-adds per
//! second at larger batches. `cargo bench -p onebase-kernels`.

// Helpers of tests may panic as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::hint::black_box;
use std::time::Instant;

use half::{bf16, f16};
use onebase_kernels::{Affine, Backend, LowBit, Sign, plane_bytes};
use onebase_tensor::{MatrixMut, MatrixRef, WeightRef};
use rayon::prelude::*;

/// Best of several runs, in seconds.
fn best(runs: usize, mut run: impl FnMut()) -> f64 {
    run();
    (0..runs)
        .map(|_| {
            let start = Instant::now();
            run();
            start.elapsed().as_secs_f64()
        })
        .fold(f64::INFINITY, f64::min)
}

/// Bytes per second that all threads together read from memory.
fn read_bandwidth() -> f64 {
    let data = vec![1u64; 1 << 26];
    let seconds = best(5, || {
        let sum: u64 = data.par_chunks(1 << 16).map(|c| c.iter().fold(0, |s, v| s ^ v)).sum();
        black_box(sum);
    });
    (data.len() * 8) as f64 / seconds
}

fn main() {
    // Inside the pool, as the program runs.
    rayon::scope(|_| report());
}

fn report() {
    let bandwidth = read_bandwidth();
    println!(
        "read bandwidth {:.1} GB/s, {} threads",
        bandwidth / 1e9,
        rayon::current_num_threads()
    );
    println!("{:9} {:6} {:>18} {:>14} {:>10}", "backend", "batch", "product", "G madd/s", "GB/s");
    for backend in Backend::available() {
        for (rows, cols) in [(256, 256), (8192, 2048)] {
            for batch in [1, 4, 64] {
                products(backend, rows, cols, batch, bandwidth);
            }
        }
    }
}

fn products(backend: Backend, rows: usize, cols: usize, batch: usize, bandwidth: f64) {
    // Several copies, so that the weights come from memory and not from a cache.
    let copies = ((1 << 27) / (rows * cols * 2)).clamp(1, 64);
    let dense = vec![bf16::from_f32(0.01); rows * cols];
    let dense: Vec<Vec<bf16>> = vec![dense; copies];
    let bits = vec![0x5au8; rows * plane_bytes(cols)];
    let scale = vec![0.01f32; rows];
    let codes = vec![0x5au8; rows * 4 * plane_bytes(cols)];
    let group_scale = vec![bf16::from_f32(0.01); rows * cols.div_ceil(128)];
    let affine_scale = vec![f16::from_f32(0.01); group_scale.len()];
    let zero = vec![7u8; group_scale.len()];
    let x = vec![0.5f32; batch * cols];
    let x = MatrixRef::new(&x, batch, cols).expect("shape");
    let mut y = vec![0.0f32; batch * rows];
    let mut report = |name: &str, bytes: usize, run: &dyn Fn(usize, &mut MatrixMut<'_>)| {
        let mut next = 0;
        let n = 1 + (1 << 24) / (rows * cols * batch);
        let seconds = best(5, || {
            for _ in 0..n {
                let mut y = MatrixMut::new(&mut y, batch, rows).expect("shape");
                run(next % copies, &mut y);
                next += 1;
            }
        }) / n as f64;
        println!(
            "{:9} {batch:6} {name:>8} {rows:>4}x{cols:<4} {:>14.1} {:>6.1} ({:.2})",
            backend.name(),
            (rows * cols * batch) as f64 / seconds / 1e9,
            bytes as f64 / seconds / 1e9,
            bytes as f64 / seconds / bandwidth,
        );
    };
    report("bf16", rows * cols * 2, &|i, y| backend.add_dense(WeightRef::BF16(&dense[i]), x, y));
    report("sign", bits.len(), &|_, y| {
        backend.add_sign(Sign { bits: &bits, scale: &scale, in_features: cols }, x, y);
    });
    report("4 bit", codes.len(), &|_, y| {
        let delta = LowBit {
            codes: &codes,
            scale: &group_scale,
            bits: 4,
            group_size: 128,
            in_features: cols,
        };
        backend.add_low_bit(delta, x, y);
    });
    report("4 affine", codes.len(), &|_, y| {
        let delta = Affine {
            codes: &codes,
            scale: &affine_scale,
            zero: &zero,
            bits: 4,
            group_size: 128,
            in_features: cols,
        };
        backend.add_affine(delta, x, y);
    });
}
