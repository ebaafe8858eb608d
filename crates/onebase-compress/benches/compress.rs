//! Time to compress a pair against the time to read the same files once, in
//! turn, in one run:
//!
//! ```text
//! ONEBASE_BENCH_BASE=DIR ONEBASE_BENCH_FINETUNE=DIR [ONEBASE_BENCH_CODEC=sign] cargo bench -p onebase-compress
//! ```
//!
//! `cargo xtask synth` writes pairs of real shapes for it.

// Helpers of benchmarks may panic as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::time::Instant;

use onebase_codec::CodecSpec;
use onebase_compress::{Pair, Plan, Silent, TablePlan, VectorPlan, compress};

const ROUNDS: usize = 5;

fn main() {
    // `cargo test --benches` runs it without its input.
    let Some(base) = std::env::var_os("ONEBASE_BENCH_BASE") else { return };
    let fine_tune = std::env::var_os("ONEBASE_BENCH_FINETUNE").expect("ONEBASE_BENCH_FINETUNE");
    let codec = std::env::var("ONEBASE_BENCH_CODEC").unwrap_or_else(|_| "sign".to_owned());
    let codec: CodecSpec = codec.parse().unwrap();
    rayon::scope(|_| report(Path::new(&base), Path::new(&fine_tune), &codec));
}

/// Seconds to read every weight file of a folder, block by block.
fn read(dir: &Path) -> f64 {
    let start = Instant::now();
    let mut block = vec![0; 1 << 20];
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "safetensors") {
            let mut file = File::open(path).unwrap();
            while file.read(&mut block).unwrap() > 0 {}
        }
    }
    start.elapsed().as_secs_f64()
}

fn report(base: &Path, fine_tune: &Path, codec: &CodecSpec) {
    let plan = Plan::new(codec.clone(), TablePlan::Codec(codec.clone()), VectorPlan::Exact);
    let out = tempfile::tempdir_in(".").unwrap();
    for round in 0..ROUNDS {
        let reading = read(base) + read(fine_tune);
        let start = Instant::now();
        let pair = Pair::open(base, fine_tune).unwrap();
        let target = out.path().join(round.to_string());
        compress(&pair, &plan, &target, &Silent).unwrap();
        let compressing = start.elapsed().as_secs_f64();
        let bytes = (pair.base().size_bytes() + pair.fine_tune().size_bytes()) as f64;
        println!(
            "{codec}: read {:.2} GB/s, compressed {:.2} GB/s, ratio {:.2}",
            bytes / reading / 1e9,
            bytes / compressing / 1e9,
            reading / compressing,
        );
    }
}
