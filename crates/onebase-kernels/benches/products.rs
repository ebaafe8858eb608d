//! Products against the limits of the machine, side by side in one run: weights
//! read per second against the read bandwidth at batch 1, multiply-adds per
//! second at larger batches. `cargo bench -p onebase-kernels`.

// Helpers of tests may panic as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::hint::black_box;
use std::ops::Range;
use std::time::Instant;

use half::{bf16, f16};
use onebase_kernels::{
    Affine, Backend, Interleaved, LowBit, Mixed, Parts, Sign, mixed_sums, plane_bytes,
};
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
    quantized(Backend::active());
    for backend in Backend::available() {
        for (rows, cols) in [(256, 256), (8192, 2048)] {
            for batch in [1, 4, 64] {
                products(backend, rows, cols, batch, bandwidth);
            }
        }
    }
}

/// A site of a quantized base and a table of bytes: weights by the product of integers, with
/// inputs in f32, and in bf16.
fn quantized(backend: Backend) {
    let bandwidth = read_bandwidth();
    let [rows, n_low, n_high] = [8192, 1792, 256];
    // Several copies, more than a cache holds.
    let copies = 48;
    let site = Coded::new(copies * rows, n_low, n_high);
    let of_copy = |copy: usize| site.rows(copy * rows..(copy + 1) * rows);
    let cols = n_low + n_high;
    let dense = vec![bf16::from_f32(0.01); copies / 3 * rows * cols];
    let wide = vec![0.01f32; rows * cols];
    for batch in [1, 8, 512] {
        let x: Vec<f32> = (0..batch * cols).map(|i| (i * 31 % 67) as f32 - 33.0).collect();
        let x = MatrixRef::new(&x, batch, cols).expect("shape");
        let codes = backend.quantize_rows(x, Parts { n_low, n_high }, [8, 8]);
        let mut y = vec![0.0f32; batch * rows];
        let work = rows * cols * batch;
        let mut report = |name: &str, copies: usize, run: &dyn Fn(usize, &mut MatrixMut<'_>)| {
            let n = if batch < 64 { copies } else { 1 };
            let seconds = best(5, || {
                for copy in 0..n {
                    run(copy, &mut MatrixMut::new(&mut y, batch, rows).expect("shape"));
                }
            }) / n as f64;
            let bytes = match name {
                "bf16" => rows * cols * 2,
                "f32" => rows * cols * 4,
                _ => rows * (n_low / 2 + n_high),
            } as f64;
            println!(
                "{:10} {batch:6} {name:>8} {rows:>4}x{cols:<4} {:>9.1} {:>6.1} ({:.2})",
                backend.name(),
                work as f64 / seconds / 1e9,
                bytes / seconds / 1e9,
                bytes / seconds / bandwidth,
            );
        };
        report("bf16", copies / 3, &|copy, y| {
            let one = &dense[copy * rows * cols..(copy + 1) * rows * cols];
            backend.add_dense(WeightRef::BF16(one), x, y);
        });
        if batch > 1 {
            report("f32", 1, &|_, y| backend.add_dense(WeightRef::F32(&wide), x, y));
        }
        report("integer", copies, &|copy, y| backend.add_integer(of_copy(copy), &codes, y));
        report("mixed", copies, &|copy, y| backend.add_mixed(of_copy(copy), x, y));
        let quantize = best(5, || {
            black_box(backend.quantize_rows(x, Parts { n_low, n_high }, [8, 8]));
        });
        println!("quantize {batch} rows: {:.1} us", quantize * 1e6);
    }
    table(backend, bandwidth);
}

/// A table of bytes, as of embeddings.
fn table(backend: Backend, bandwidth: f64) {
    let [rows, cols] = [128_256, 2048];
    let table = Coded::new(rows, 0, cols);
    let x = vec![0.5f32; cols];
    let x = MatrixRef::new(&x, 1, cols).expect("shape");
    let mut y = vec![0.0f32; rows];
    let seconds = best(5, || {
        let mut y = MatrixMut::new(&mut y, 1, rows).expect("shape");
        backend.add_mixed(table.rows(0..rows), x, &mut y);
    });
    let speed = (rows * cols) as f64 / seconds;
    println!(
        "{:10} {:6} {:>8} {rows}x{cols} {:>6.1} ({:.2})",
        backend.name(),
        1,
        "table",
        speed / 1e9,
        speed / bandwidth
    );
}

/// Weights of four and eight bits.
struct Coded {
    low: Vec<u8>,
    high: Vec<u8>,
    scales: [Vec<f16>; 2],
    sums: Vec<[i32; 2]>,
    n_low: usize,
    n_high: usize,
}

impl Coded {
    fn new(rows: usize, n_low: usize, n_high: usize) -> Self {
        let bytes = |n: usize| (0..n).map(|i| (i * 97 % 251) as u8).collect::<Vec<_>>();
        let (low, high) = (bytes(rows * n_low / 2), bytes(rows * n_high));
        let scales = |n: usize| vec![f16::from_f32(0.01); if n > 0 { rows } else { 0 }];
        let sums = mixed_sums(&low, &high, n_low, n_high, rows);
        Self { low, high, scales: [scales(n_low), scales(n_high)], sums, n_low, n_high }
    }

    fn rows(&self, rows: Range<usize>) -> Mixed<'_> {
        let of = |each: usize| rows.start * each..rows.end * each;
        let scales =
            |part: &[f16]| -> Range<usize> { if part.is_empty() { 0..0 } else { rows.clone() } };
        Mixed {
            low: &self.low[of(self.n_low / 2)],
            high: &self.high[of(self.n_high)],
            low_scale: &self.scales[0][scales(&self.scales[0])],
            high_scale: &self.scales[1][scales(&self.scales[1])],
            sums: &self.sums[rows.clone()],
            n_low: self.n_low,
            n_high: self.n_high,
        }
    }
}

fn products(backend: Backend, rows: usize, cols: usize, batch: usize, bandwidth: f64) {
    // Several copies, so that the weights come from memory and not from a cache.
    let copies_of = |bytes: usize| ((1 << 29) / bytes).clamp(1, 128);
    let dense = vec![bf16::from_f32(0.01); rows * cols];
    let dense: Vec<Vec<bf16>> = vec![dense; copies_of(rows * cols * 2)];
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
                run(next, &mut y);
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
    report("bf16", rows * cols * 2, &|i, y| {
        backend.add_dense(WeightRef::BF16(&dense[i % dense.len()]), x, y);
    });
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
    let delta = LowBit {
        codes: &codes[..codes.len() / 2],
        scale: &group_scale,
        bits: 2,
        group_size: 128,
        in_features: cols,
    };
    let two_bits = vec![Interleaved::new(delta, rows); copies_of(delta.codes.len())];
    report("2 bit", delta.codes.len(), &|i, y| {
        backend.add_interleaved(&two_bits[i % two_bits.len()], x, y);
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
