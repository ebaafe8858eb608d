//! A synthetic base and fine-tunes of a real model's shape, as Hugging Face folders.
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
    /// Folder for the folders `base` and `fine-tune`, or `fine-tune-1` and on, which must not exist
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Keep only the first N layers
    #[arg(long, value_name = "N")]
    layers: Option<usize>,
    /// Fine-tunes, which have the low-rank parts of their deltas in common
    #[arg(long, value_name = "N", default_value_t = 1)]
    fine_tunes: usize,
    /// Another seed gives other models
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
    n_fine_tunes: usize,
    max_shard_bytes: u64,
}

impl Options {
    /// The names of the folders, the base's first.
    fn folders(&self) -> Vec<String> {
        let fine_tunes = 1..=self.n_fine_tunes;
        let name = |i: usize| match self.n_fine_tunes {
            1 => FINE_TUNE.to_owned(),
            _ => format!("{FINE_TUNE}-{i}"),
        };
        std::iter::once(BASE.to_owned()).chain(fine_tunes.map(name)).collect()
    }

    fn check(&self) -> Result<()> {
        ensure!(self.n_fine_tunes > 0, "--fine-tunes: expected one or more, got 0");
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
        n_fine_tunes: args.fine_tunes,
        max_shard_bytes: MAX_SHARD_BYTES,
    };
    let total_bytes: u64 = shape.tensors().iter().map(TensorSpec::size_bytes).sum();
    let folders = options.folders();
    let bar = ProgressBar::new(folders.len() as u64 * total_bytes).with_style(
        ProgressStyle::with_template(
            "{msg} {wide_bar} {binary_bytes}/{binary_total_bytes}, {binary_bytes_per_sec}, {eta}",
        )?,
    );
    bar.set_message(shape.name);
    write_models(&args.out, &options, &|n_bytes| bar.inc(n_bytes))?;
    bar.finish();
    eprintln!(
        "wrote {} in {}, each with {total_bytes} bytes of weights",
        folders.join(", "),
        args.out.display()
    );
    Ok(())
}

/// Writes all folders; none has its name before all are complete.
fn write_models(out: &Path, options: &Options, progress: &dyn Fn(u64)) -> Result<()> {
    options.check()?;
    let tensors = options.shape.tensors();
    let shards = plan_shards(&tensors, options.max_shard_bytes);
    let folders = options.folders().into_iter().map(|name| StagedFolder::create(&out.join(name)));
    let folders = folders.collect::<Result<Vec<_>, _>>()?;
    for folder in &folders {
        folder.write(CONFIG_FILE, &side_files::json_bytes(&options.shape.config())?)?;
        for (name, bytes) in side_files::side_files(&options.shape)? {
            folder.write(name, &bytes)?;
        }
        if let Some(index) = side_files::index(&shards) {
            folder.write("model.safetensors.index.json", &side_files::json_bytes(&index)?)?;
        }
    }
    for (file, tensors) in &shards {
        let entries: Vec<TensorEntry> = tensors.iter().map(entry).collect();
        let create = |folder: &StagedFolder| TensorWriter::create(&folder.path(file), &entries);
        let mut writers = folders.iter().map(create).collect::<Result<Vec<_>, _>>()?;
        for tensor in *tensors {
            write_tensor(&mut writers, tensor, options, progress)?;
        }
        writers.into_par_iter().try_for_each(|writer| writer.finish().map(|_| ()))?;
    }
    for folder in folders {
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

/// Draws a tensor of all models by blocks of rows and writes it.
fn write_tensor(
    writers: &mut [TensorWriter],
    tensor: &TensorSpec,
    options: &Options,
    progress: &dyn Fn(u64),
) -> Result<()> {
    let pairs = RowPairs::new(tensor, options);
    let row_bytes = pairs.n_cols() * DType::BF16.size_bytes();
    let block_rows = (BLOCK_WEIGHTS / pairs.n_cols()).max(1);
    let mut blocks = vec![Vec::new(); writers.len()];
    for first_row in (0..pairs.n_rows()).step_by(block_rows) {
        let n_rows = block_rows.min(pairs.n_rows() - first_row);
        blocks.iter_mut().for_each(|block| block.resize(n_rows * row_bytes, 0));
        // By row, its place in each model.
        let mut rows: Vec<Vec<&mut [u8]>> = (0..n_rows).map(|_| Vec::new()).collect();
        for block in &mut blocks {
            for (row, place) in rows.iter_mut().zip(block.chunks_exact_mut(row_bytes)) {
                row.push(place);
            }
        }
        rows.par_iter_mut().enumerate().for_each_init(
            || pairs.scratch(),
            |scratch, (i, places)| pairs.draw(first_row + i, scratch, places),
        );
        let writers = writers.par_iter_mut().zip(&blocks);
        writers.try_for_each(|(writer, block)| writer.write(block))?;
        progress((blocks.len() * n_rows * row_bytes) as u64);
    }
    Ok(())
}

#[cfg(test)]
mod tests;
