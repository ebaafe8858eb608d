//! Bytes and speed of the lossless coder on one core, beside a copy of the same bytes in the same
//! run:
//!
//! ```text
//! cargo bench -p onebase-codec --bench lossless
//! ```
//!
//! Weights are normal with standard deviation 0.02, deltas a tenth to a thousandth of them. The
//! entropy is that of the distances given the base's exponent, of the same pair.
//!
//! With `-- --pair BASE FINETUNE`, two safetensors files, it prints as JSON the bytes of the
//! tensors and of their codes, and the fewest seconds of encoding and decoding them all in memory.

// Helpers of benchmarks may panic as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::HashMap;
use std::time::Instant;

use half::{bf16, f16};
use onebase_codec::lossless::{Base, Element, decode, encode};
use onebase_tensor::stream;
use rand_distr::{Distribution, StandardNormal};
use safetensors::SafeTensors;

const ROUNDS: usize = 5;

/// Times that each is done in a round.
const TIMES: usize = 4;
const N: usize = 1 << 22;

fn main() {
    // `cargo test --benches` does not measure.
    if !std::env::args().any(|arg| arg == "--bench") {
        return;
    }
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let args: Vec<String> = std::env::args().collect();
    if let Some(at) = args.iter().position(|arg| arg == "--pair") {
        return pool.install(|| report_files(&args[at + 1], &args[at + 2]));
    }
    pool.install(|| {
        for element in [Element::Bf16, Element::F16, Element::F32] {
            for ratio in [0.1, 0.03, 0.01, 0.003, 0.001] {
                let (base, tune) = pair(element, ratio);
                report(&format!("{element:?} {ratio}"), element, &tune, Some(&base));
            }
            let (_, tune) = pair(element, 0.1);
            report(&format!("{element:?} alone"), element, &tune, None);
        }
    });
}

fn pair(element: Element, ratio: f32) -> (Vec<u8>, Vec<u8>) {
    let mut rng = stream(1, "lossless", 0);
    let narrow = |value: f32, out: &mut Vec<u8>| match element {
        Element::Bf16 => out.extend(bf16::from_f32(value).to_le_bytes()),
        Element::F16 => out.extend(f16::from_f32(value).to_le_bytes()),
        _ => out.extend(value.to_le_bytes()),
    };
    let (mut base, mut tune) = (Vec::new(), Vec::new());
    for _ in 0..N {
        let mut draw = || Distribution::<f32>::sample(&StandardNormal, &mut rng);
        let weight = 0.02 * draw();
        let weight = match element {
            Element::Bf16 => bf16::from_f32(weight).to_f32(),
            Element::F16 => f16::from_f32(weight).to_f32(),
            _ => weight,
        };
        narrow(weight, &mut base);
        narrow(weight + 0.02 * ratio * draw(), &mut tune);
    }
    (base, tune)
}

/// Tensors of two files, against those of the same name and shape.
fn report_files(base: &str, tune: &str) {
    let [base, tune] = [base, tune].map(|path| std::fs::read(path).unwrap());
    let base = SafeTensors::deserialize(&base).unwrap();
    let tune = SafeTensors::deserialize(&tune).unwrap();
    let (mut n_bytes, mut coded_bytes, mut encoding, mut decoding) = (0, 0, 0.0, 0.0);
    for (name, tune) in tune.iter() {
        let element = Element::of_dtype(&tune.dtype().to_string());
        let base = base.tensor(name).ok().filter(|base| base.shape() == tune.shape());
        let base = base.as_ref().map(|base| {
            let element = Element::of_dtype(&base.dtype().to_string());
            Base { element, bytes: base.data() }
        });
        let base = base.filter(|base| base.element.is_base_of(element));
        let mut coded = Vec::new();
        encoding += least_seconds(|| coded = encode(element, tune.data(), base));
        let mut out = vec![0; tune.data().len()];
        decoding += least_seconds(|| decode(element, &coded, base, &mut out).unwrap());
        assert!(out == tune.data());
        n_bytes += out.len();
        coded_bytes += coded.len();
    }
    println!(
        "{{\"bytes\": {n_bytes}, \"coded_bytes\": {coded_bytes}, \
         \"encode_seconds\": {encoding}, \"decode_seconds\": {decoding}}}"
    );
}

fn least_seconds(mut work: impl FnMut()) -> f64 {
    let seconds = (0..ROUNDS).map(|_| {
        let start = Instant::now();
        work();
        start.elapsed().as_secs_f64()
    });
    seconds.fold(f64::INFINITY, f64::min)
}

/// Bits of an element, given the base's exponent, as a share of 16.
fn conditional_entropy(base: &[u8], tune: &[u8], exponent_down: u32) -> f64 {
    let place = |bits: u16| i32::from(if bits >> 15 == 1 { !bits } else { bits | 0x8000 });
    let mut counts: HashMap<(u16, i32), f64> = HashMap::new();
    let mut classes: HashMap<u16, f64> = HashMap::new();
    for (b, f) in base.as_chunks::<2>().0.iter().zip(tune.as_chunks::<2>().0) {
        let (b, f) = (u16::from_le_bytes(*b), u16::from_le_bytes(*f));
        let class = (b & 0x7fff) >> exponent_down;
        *counts.entry((class, place(f) - place(b))).or_default() += 1.0;
        *classes.entry(class).or_default() += 1.0;
    }
    let bits = |n: &f64| -n * n.log2();
    let joint: f64 = counts.values().map(bits).sum();
    let alone: f64 = classes.values().map(bits).sum();
    (joint - alone) / (tune.len() / 2) as f64 / 16.0
}

fn report(what: &str, element: Element, tune: &[u8], base: Option<&[u8]>) {
    let base_of = base.map(|bytes| Base { element, bytes });
    let (mut encoding, mut decoding, mut copying) = (Vec::new(), Vec::new(), Vec::new());
    let mut out = vec![0; tune.len()];
    let mut n_bytes = 0;
    for _ in 0..ROUNDS {
        let start = Instant::now();
        (0..TIMES).for_each(|_| out.copy_from_slice(std::hint::black_box(tune)));
        copying.push(start.elapsed().as_secs_f64());
        let start = Instant::now();
        let mut coded = Vec::new();
        (0..TIMES).for_each(|_| coded = encode(element, tune, base_of));
        encoding.push(start.elapsed().as_secs_f64());
        n_bytes = coded.len();
        out.fill(0);
        let start = Instant::now();
        (0..TIMES).for_each(|_| decode(element, &coded, base_of, &mut out).unwrap());
        decoding.push(start.elapsed().as_secs_f64());
        assert!(out == tune);
    }
    let entropy = match (element, base) {
        (Element::Bf16, Some(base)) => Some(conditional_entropy(base, tune, 7)),
        (Element::F16, Some(base)) => Some(conditional_entropy(base, tune, 10)),
        _ => None,
    };
    let entropy = entropy.map_or_else(|| "–".to_owned(), |share| format!("{share:.4}"));
    let share = n_bytes as f64 / tune.len() as f64;
    print!("{what:12} keeps {share:.4}, entropy {entropy}");
    for (what, seconds) in
        [("encode", &mut encoding), ("decode", &mut decoding), ("copy", &mut copying)]
    {
        seconds.sort_by(f64::total_cmp);
        let speed = |seconds: f64| (TIMES * tune.len()) as f64 / seconds / 1e9;
        print!(", {what} {:.2} (best {:.2}) GB/s", speed(seconds[ROUNDS / 2]), speed(seconds[0]));
    }
    println!();
}
