//! A synthetic base and fine-tune of a real model's shape, as two Hugging Face folders.
//!
//! Benchmarks need real sizes and a realistic delta, not a model that says something. Every row
//! of every tensor is drawn from its own random stream, so that the bytes depend on the options
//! alone, not on the number of threads.

mod shape;
mod side_files;
mod weights;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::builder::{PossibleValuesParser, TypedValueParser};
use indicatif::{ProgressBar, ProgressStyle};
use onebase_format::{CONFIG_FILE, StagedFolder, TensorEntry, TensorWriter};
use onebase_tensor::DType;
use rayon::prelude::*;

use shape::{SHAPES, Shape, TensorSpec};
use weights::RowPairs;

const BASE: &str = "base";
const FINE_TUNE: &str = "fine-tune";
/// Weights that are drawn before they are written; bounds the memory.
const BLOCK_WEIGHTS: usize = 4 << 20;
/// The largest file by the custom of model hubs.
const MAX_SHARD_BYTES: u64 = 5_000_000_000;

/// Arguments of `cargo xtask synth`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The real model whose shape it has
    #[arg(long, value_parser = PossibleValuesParser::new(SHAPES.map(|s| s.name)).try_map(|name| {
        Shape::named(&name).ok_or("no such shape")
    }))]
    shape: Shape,
    /// Folder for the folders `base` and `fine-tune`, which must not exist
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Keep only the first N layers
    #[arg(long, value_name = "N")]
    layers: Option<usize>,
    /// Another seed gives another pair
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Mean absolute value of a delta's elements
    #[arg(long, value_name = "MEAN_ABS", default_value_t = DEFAULT_MEAN_ABS_DELTA)]
    delta: f32,
    /// Rank of the part of a delta that carries half of its energy; 0 for noise alone
    #[arg(long, value_name = "R", default_value_t = 16)]
    rank: usize,
}

/// The mean absolute delta of a strong fine-tune.
///
/// Published averages are 0.0005 after 100 thousand samples of supervised fine-tuning, 0.0015
/// after 5 million, 0.0021 after 14 million, and 0.002 to 0.004 for strong public fine-tunes
/// (D-QRELO, Table 1).
const DEFAULT_MEAN_ABS_DELTA: f32 = 0.0015;

/// What to write.
#[derive(Clone, Debug)]
struct Options {
    shape: Shape,
    seed: u64,
    mean_abs_delta: f32,
    rank: usize,
    max_shard_bytes: u64,
}

impl Options {
    fn check(&self) -> Result<()> {
        ensure!(
            (0.0..=1.0).contains(&self.mean_abs_delta),
            "--delta: expected a number from 0 to 1, got {}",
            self.mean_abs_delta
        );
        let shape = &self.shape;
        let experts = shape.experts.map_or(usize::MAX, |e| e.n_experts.min(e.intermediate));
        let smallest_side = shape.hidden.min(shape.n_kv_heads * shape.head_dim).min(experts);
        ensure!(
            self.rank <= smallest_side,
            "--rank: expected at most {smallest_side}, the smallest side of a matrix, got {}",
            self.rank
        );
        Ok(())
    }
}

/// Runs `cargo xtask synth`.
pub(crate) fn run(args: &Args) -> Result<()> {
    let shape = match args.layers {
        Some(n_layers) => args.shape.with_layers(n_layers).context("--layers")?,
        None => args.shape,
    };
    let options = Options {
        shape,
        seed: args.seed,
        mean_abs_delta: args.delta,
        rank: args.rank,
        max_shard_bytes: MAX_SHARD_BYTES,
    };
    let total_bytes: u64 = shape.tensors().iter().map(TensorSpec::size_bytes).sum();
    let bar = ProgressBar::new(2 * total_bytes).with_style(ProgressStyle::with_template(
        "{msg} {wide_bar} {binary_bytes}/{binary_total_bytes}, {binary_bytes_per_sec}, {eta}",
    )?);
    bar.set_message(shape.name);
    write_pair(&args.out, &options, &|n_bytes| bar.inc(n_bytes))?;
    bar.finish();
    eprintln!(
        "wrote {} and {}, each with {total_bytes} bytes of weights",
        args.out.join(BASE).display(),
        args.out.join(FINE_TUNE).display()
    );
    Ok(())
}

/// Writes both folders; neither has its name before both are complete.
fn write_pair(out: &Path, options: &Options, progress: &dyn Fn(u64)) -> Result<()> {
    options.check()?;
    let tensors = options.shape.tensors();
    let shards = plan_shards(&tensors, options.max_shard_bytes);
    let pair =
        [StagedFolder::create(&out.join(BASE))?, StagedFolder::create(&out.join(FINE_TUNE))?];
    for folder in &pair {
        folder.write(CONFIG_FILE, &side_files::json_bytes(&options.shape.config())?)?;
        for (name, bytes) in side_files::side_files(&options.shape)? {
            folder.write(name, &bytes)?;
        }
        if let Some(index) = side_files::index(&shards) {
            folder.write("model.safetensors.index.json", &side_files::json_bytes(&index)?)?;
        }
    }
    for (file, tensors) in &shards {
        let [base, fine_tune] = &pair;
        let entries: Vec<TensorEntry> = tensors.iter().map(entry).collect();
        let create = |folder: &StagedFolder| TensorWriter::create(&folder.path(file), &entries);
        let mut writers = [create(base)?, create(fine_tune)?];
        for tensor in *tensors {
            write_tensor(&mut writers, tensor, options, progress)?;
        }
        for_both(writers, |writer| {
            writer.finish()?;
            Ok(())
        })?;
    }
    for folder in pair {
        folder.commit()?;
    }
    Ok(())
}

/// File names and the tensors in them: in order, a new file when the next tensor does not fit.
fn plan_shards(tensors: &[TensorSpec], max_shard_bytes: u64) -> Vec<(String, &[TensorSpec])> {
    let mut runs = Vec::new();
    let (mut start, mut used) = (0, 0);
    for (i, tensor) in tensors.iter().enumerate() {
        if i > start && used + tensor.size_bytes() > max_shard_bytes {
            runs.push(&tensors[start..i]);
            (start, used) = (i, 0);
        }
        used += tensor.size_bytes();
    }
    runs.push(&tensors[start..]);
    let n = runs.len();
    let name = |i: usize| match n {
        1 => "model.safetensors".to_owned(),
        _ => format!("model-{:05}-of-{n:05}.safetensors", i + 1),
    };
    runs.into_iter().enumerate().map(|(i, run)| (name(i), run)).collect()
}

fn entry(tensor: &TensorSpec) -> TensorEntry {
    TensorEntry { name: tensor.name.clone(), dtype: DType::BF16, shape: tensor.shape.clone() }
}

/// Draws a tensor of both models by blocks of rows and writes it.
fn write_tensor(
    writers: &mut [TensorWriter; 2],
    tensor: &TensorSpec,
    options: &Options,
    progress: &dyn Fn(u64),
) -> Result<()> {
    let pairs = RowPairs::new(tensor, options);
    let row_bytes = pairs.n_cols() * DType::BF16.size_bytes();
    let block_rows = (BLOCK_WEIGHTS / pairs.n_cols()).max(1);
    let mut blocks = [Vec::new(), Vec::new()];
    for first_row in (0..pairs.n_rows()).step_by(block_rows) {
        let n_rows = block_rows.min(pairs.n_rows() - first_row);
        let [base, fine_tune] = &mut blocks;
        base.resize(n_rows * row_bytes, 0);
        fine_tune.resize(n_rows * row_bytes, 0);
        base.par_chunks_exact_mut(row_bytes)
            .zip(fine_tune.par_chunks_exact_mut(row_bytes))
            .enumerate()
            .for_each_init(
                || pairs.scratch(),
                |scratch, (i, (base, fine_tune))| {
                    pairs.draw(first_row + i, scratch, base, fine_tune);
                },
            );
        let [base_writer, fine_tune_writer] = &mut *writers;
        for_both([(base_writer, base), (fine_tune_writer, fine_tune)], |(writer, block)| {
            Ok(writer.write(block)?)
        })?;
        progress(2 * (n_rows * row_bytes) as u64);
    }
    Ok(())
}

/// Does the same for the base and for the fine-tune, at the same time.
fn for_both<T: Send>(pair: [T; 2], act: impl Fn(T) -> Result<()> + Sync) -> Result<()> {
    let [base, fine_tune] = pair;
    let (base, fine_tune) = rayon::join(|| act(base), || act(fine_tune));
    base.and(fine_tune)
}

#[cfg(test)]
mod tests;
