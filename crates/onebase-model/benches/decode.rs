//! Time per token of a base and of tenants on it, side by side in one run,
//! against the read bandwidth of the machine:
//!
//! ```text
//! ONEBASE_BENCH_BASE=DIR [ONEBASE_BENCH_DELTAS=DIR,DIR] cargo bench -p onebase-model
//! ```
//!
//! Where several are given, a batch in which every row is of another one is measured
//! too. `cargo xtask synth` writes checkpoints of real shapes for it.

// Helpers of benchmarks may panic as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::hint::black_box;
use std::path::Path;
use std::time::Instant;

use onebase_format::Checkpoint;
use onebase_format::artifact::Artifact;
use onebase_model::{KvCache, Logits, Model, Segment, Tenant, resident_bytes_of};
use rayon::prelude::*;

const PROMPT_TOKENS: u32 = 64;
const ROUNDS: usize = 24;

fn main() {
    // `cargo test --benches` runs it without its input.
    let Some(base) = std::env::var_os("ONEBASE_BENCH_BASE") else { return };
    rayon::scope(|_| report(Path::new(&base)));
}

/// Bytes per second that all threads together read from memory, once.
fn read_bandwidth(data: &[u64]) -> f64 {
    let start = Instant::now();
    let sum: u64 = data.par_chunks(1 << 14).map(|c| c.iter().fold(0, |s, v| s ^ v)).sum();
    black_box(sum);
    size_of_val(data) as f64 / start.elapsed().as_secs_f64()
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn report(base: &Path) {
    let model = Model::load(Checkpoint::open(base).unwrap()).unwrap();
    let deltas = std::env::var("ONEBASE_BENCH_DELTAS").unwrap_or_default();
    let tenants: Vec<(String, Tenant)> = deltas
        .split(',')
        .filter(|dir| !dir.is_empty())
        .map(|dir| {
            let artifact = Artifact::open(Path::new(dir)).unwrap();
            (dir.to_owned(), Tenant::load(&model, &artifact).unwrap())
        })
        .collect();
    let data = vec![1u64; 1 << 26];
    // Whom the rows of a batch are for, in turn.
    let mut voices: Vec<(&str, Vec<Option<&Tenant>>)> = std::iter::once(("base", vec![None]))
        .chain(tenants.iter().map(|(name, tenant)| (name.as_str(), vec![Some(tenant)])))
        .collect();
    for batch in [1, 8] {
        if batch > 1 && tenants.len() > 1 {
            voices.push(("a tenant a row", tenants.iter().map(|(_, t)| Some(t)).collect()));
        }
        let mut sequences: Vec<Vec<KvCache>> =
            voices.iter().map(|_| vec![KvCache::new(model.config()); batch]).collect();
        let prompt: Vec<u32> = (0..PROMPT_TOKENS).collect();
        let mut step = |voice: usize, tokens: &[u32]| {
            let start = Instant::now();
            let mut segments: Vec<Segment<'_>> = sequences[voice]
                .iter_mut()
                .zip(voices[voice].1.iter().cycle())
                .map(|(cache, tenant)| Segment {
                    tokens,
                    tenant: *tenant,
                    cache,
                    logits: Logits::Last,
                })
                .collect();
            black_box(model.forward(&mut segments).unwrap());
            start.elapsed().as_secs_f64()
        };
        let prefill: Vec<f64> = (0..voices.len()).map(|voice| step(voice, &prompt)).collect();
        let mut times = vec![Vec::new(); voices.len()];
        let mut bandwidths = Vec::new();
        for _ in 0..ROUNDS {
            // The machine's speed drifts, so its limit is measured in between.
            bandwidths.push(read_bandwidth(&data));
            for (voice, times) in times.iter_mut().enumerate() {
                times.push(step(voice, &[65]));
            }
        }
        let bandwidth = median(bandwidths);
        let threads = rayon::current_num_threads();
        println!("read bandwidth {:.1} GB/s on {threads} threads", bandwidth / 1e9);
        let base_time = median(times[0].clone());
        for (((name, tenants), times), prefill) in voices.iter().zip(times).zip(prefill) {
            let time = median(times);
            let served = tenants.iter().take(batch).flatten();
            let of_tenants = resident_bytes_of(served.copied());
            let bytes = model.checkpoint().size_bytes() as usize + of_tenants;
            let rate = bytes as f64 / time;
            println!(
                "batch {batch}  {name}: {:.1} ms per step, {:.1} GB/s ({:.2} of the bandwidth), \
                 {:.2} of the base's time, {:.1} MB of tenants; prefill {:.0} tokens/s",
                time * 1e3,
                rate / 1e9,
                rate / bandwidth,
                time / base_time,
                of_tenants as f64 / 1e6,
                f64::from(PROMPT_TOKENS) * batch as f64 / prefill,
            );
        }
    }
}
