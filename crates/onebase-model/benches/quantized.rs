//! Decoding and prefill of a base and of quantized forms of it, side by side in one run, against
//! the read bandwidth of the machine:
//!
//! ```text
//! ONEBASE_BENCH_BASE=DIR ONEBASE_BENCH_QUANTIZED=DIR,DIR cargo bench -p onebase-model --bench quantized
//! ```

// Helpers of benchmarks may panic as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::hint::black_box;
use std::path::Path;
use std::time::Instant;

use onebase_format::Checkpoint;
use onebase_model::{KvCache, Logits, Model, Segment};
use rayon::prelude::*;

/// Tokens before those that are decoded.
const CONTEXT: u32 = 64;

/// Tokens of the prompts whose time is taken.
const PROMPT: u32 = 512;

const ROUNDS: usize = 16;

const PREFILL_ROUNDS: usize = 3;

fn main() {
    // `cargo test --benches` runs it without its input.
    let Some(base) = std::env::var_os("ONEBASE_BENCH_BASE") else { return };
    let quantized = std::env::var("ONEBASE_BENCH_QUANTIZED").unwrap_or_default();
    let quantized = quantized.split(',').filter(|dir| !dir.is_empty()).map(Into::into);
    let dirs: Vec<std::path::PathBuf> = std::iter::once(base.into()).chain(quantized).collect();
    rayon::scope(|_| report(&dirs));
}

/// Bytes per second that all threads together read from memory, once.
fn read_bandwidth(data: &[u64]) -> f64 {
    let start = Instant::now();
    let sum: u64 = data.par_chunks(1 << 14).map(|c| c.iter().fold(0, |s, v| s ^ v)).sum();
    black_box(sum);
    size_of_val(data) as f64 / start.elapsed().as_secs_f64()
}

fn median(times: &[f64]) -> f64 {
    let mut times = times.to_vec();
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// The seconds of a step in which every sequence takes some tokens.
fn step(model: &Model, caches: &mut [KvCache], tokens: &[u32]) -> f64 {
    let start = Instant::now();
    let mut segments: Vec<Segment<'_>> = caches
        .iter_mut()
        .map(|cache| Segment { tokens, tenant: None, cache, logits: Logits::Last })
        .collect();
    black_box(model.forward(&mut segments).unwrap());
    start.elapsed().as_secs_f64()
}

/// Bytes of weights that a token needs: all but an embedding that is not the head, of which one
/// row is read, and the rotations of values, which are in the weights.
fn weight_bytes(model: &Model) -> usize {
    let checkpoint = model.checkpoint();
    let is_read = |name: &&str| {
        let is_table = name.starts_with("model.embed_tokens.") && !model.config().tied;
        !is_table && *name != onebase_model::quantized::VALUE_ROTATIONS
    };
    let sizes = checkpoint.names().filter(is_read);
    let bytes: usize = sizes.map(|name| checkpoint.stored(name).unwrap().size_bytes()).sum();
    // Of the hidden rotation, its transpose is read too.
    let hidden = onebase_model::quantized::HIDDEN_ROTATION;
    let again = checkpoint.contains(hidden).then(|| checkpoint.stored(hidden).unwrap());
    bytes + again.map_or(0, |tensor| tensor.size_bytes())
}

fn report(dirs: &[std::path::PathBuf]) {
    let load = |dir: &Path| Model::load(Checkpoint::open(dir).unwrap()).unwrap();
    let models: Vec<Model> = dirs.iter().map(|dir| load(dir)).collect();
    let data = vec![1u64; 1 << 26];
    for batch in [1, 8] {
        let mut caches: Vec<Vec<KvCache>> =
            models.iter().map(|m| vec![KvCache::new(m.config()); batch]).collect();
        let context: Vec<u32> = (0..CONTEXT).collect();
        for (model, caches) in models.iter().zip(&mut caches) {
            step(model, caches, &context);
        }
        let mut times = vec![Vec::new(); models.len()];
        let mut bandwidths = Vec::new();
        for _ in 0..ROUNDS {
            // The machine's speed drifts, so its limit is measured in between.
            bandwidths.push(read_bandwidth(&data));
            for ((model, caches), times) in models.iter().zip(&mut caches).zip(&mut times) {
                times.push(step(model, caches, &[CONTEXT + 1]));
            }
        }
        let bandwidth = median(&bandwidths);
        println!("batch {batch}: read bandwidth {:.1} GB/s", bandwidth / 1e9);
        let of_base = median(&times[0]);
        for ((dir, model), times) in dirs.iter().zip(&models).zip(&times) {
            let (time, bytes) = (median(times), weight_bytes(model));
            println!(
                "  {}: {:.1} ms per step, {:.2} times the base's tokens; {:.0} MB of weights, \
                 {:.2} of the bandwidth; {} B of keys and values a token",
                dir.display(),
                time * 1e3,
                of_base / time,
                bytes as f64 / 1e6,
                bytes as f64 / time / bandwidth,
                KvCache::bytes_per_token(model.config()),
            );
        }
    }
    let prompt: Vec<u32> = (0..PROMPT).collect();
    let mut times = vec![Vec::new(); models.len()];
    for _ in 0..PREFILL_ROUNDS {
        for (model, times) in models.iter().zip(&mut times) {
            times.push(step(model, &mut [KvCache::new(model.config())], &prompt));
        }
    }
    let of_base = median(&times[0]);
    for (dir, times) in dirs.iter().zip(&times) {
        let time = median(times);
        println!(
            "prefill of {PROMPT}: {}: {:.0} tokens/s, {:.2} times the base's",
            dir.display(),
            f64::from(PROMPT) / time,
            of_base / time
        );
    }
}
