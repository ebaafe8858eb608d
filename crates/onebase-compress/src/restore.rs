use std::path::Path;

use onebase_codec::DeltaLinear;
use onebase_format::artifact::{Artifact, Storage};
use onebase_format::{
    CONFIG_FILE, Checkpoint, SIDE_FILES, StagedFolder, Tensor, TensorEntry, TensorWriter,
};
use onebase_model::{ModelConfig, TensorSpec};
use onebase_tensor::DType;
use rayon::prelude::*;
use serde_json::{Map, Value, json};

use crate::pair::read_widened;
use crate::verify::{fine_tune_specs, prepared};
use crate::{Error, Progress, Result};

/// Data bytes of a shard, as the ecosystem's tools split checkpoints.
const SHARD_BYTES: u64 = 5_000_000_000;

/// Weights decoded by one task.
const BLOCK_WEIGHTS: usize = 1 << 16;

/// Blocks decoded in parallel before they are written.
const BLOCKS_AT_A_TIME: usize = 32;

/// Rebuilds the fine-tune's checkpoint, in its own element types, into the
/// folder `target`, which must not exist.
///
/// # Errors
/// When the base is another one, the artifact is damaged, or the checkpoint
/// cannot be written; nothing is left under its name then.
pub fn restore(
    base: &Checkpoint,
    artifact: &Artifact,
    target: &Path,
    progress: &dyn Progress,
) -> Result<()> {
    let folder = StagedFolder::create(target)?;
    artifact.check_files()?;
    let config = ModelConfig::from_json(base.config(), base.dir())?;
    if config.quantization.is_some() {
        return Err(Error::RestoreOnQuantized { path: base.dir().to_owned() });
    }
    artifact.check_base(base)?;
    let specs = fine_tune_specs(base, artifact)?;
    let mut entries = Vec::new();
    for TensorSpec { name, shape, .. } in &specs {
        let dtype = dtype(artifact, name)?;
        entries.push(TensorEntry { name: name.clone(), dtype, shape: shape.clone() });
    }
    let total: u64 = entries.iter().map(|e| e.size_bytes() as u64).sum();
    progress.begin(total);
    let shards = split(&entries);
    let mut weight_map = Map::new();
    for (index, shard) in shards.iter().enumerate() {
        let name = match shards.len() {
            1 => "model.safetensors".to_owned(),
            n => format!("model-{:05}-of-{n:05}.safetensors", index + 1),
        };
        let entries = &entries[shard.clone()];
        let mut writer = TensorWriter::create(&folder.path(&name), entries)?;
        for entry in entries {
            progress.tensor(&entry.name);
            write_tensor(base, artifact, entry, &mut writer)?;
            weight_map.insert(entry.name.clone(), Value::from(name.as_str()));
            progress.advance(entry.size_bytes() as u64);
        }
        writer.finish()?;
    }
    if shards.len() > 1 {
        let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
        folder.write("model.safetensors.index.json", format!("{index:#}\n").as_bytes())?;
    }
    for name in SIDE_FILES.into_iter().chain([CONFIG_FILE]) {
        if let Some(bytes) = artifact.side_file(base, name)? {
            folder.write(name, &bytes)?;
        }
    }
    Ok(folder.commit()?)
}

pub(crate) fn dtype(artifact: &Artifact, tensor: &str) -> Result<DType> {
    match artifact.record(tensor)?.dtype.parse() {
        Ok(dtype) => Ok(dtype),
        Err(_) => unreachable!("the type was checked when the artifact was opened"),
    }
}

/// Runs of consecutive tensors that fill a shard each.
fn split(entries: &[TensorEntry]) -> Vec<std::ops::Range<usize>> {
    let mut shards: Vec<std::ops::Range<usize>> = Vec::new();
    let mut bytes = 0;
    for (index, entry) in entries.iter().enumerate() {
        let size = entry.size_bytes() as u64;
        match shards.last_mut() {
            Some(shard) if bytes + size <= SHARD_BYTES => shard.end = index + 1,
            _ => {
                shards.push(index..index + 1);
                bytes = 0;
            }
        }
        bytes += size;
    }
    shards
}

fn write_tensor(
    base: &Checkpoint,
    artifact: &Artifact,
    TensorEntry { name, dtype, .. }: &TensorEntry,
    writer: &mut TensorWriter,
) -> Result<()> {
    let base = base.tensor(name)?;
    match &artifact.record(name)?.storage {
        Storage::Unchanged => {
            let mut block = Vec::new();
            for offset in (0..base.size_bytes()).step_by(BLOCK_WEIGHTS) {
                block.resize(BLOCK_WEIGHTS.min(base.size_bytes() - offset), 0);
                base.read(offset, &mut block)?;
                writer.write(&block)?;
            }
        }
        Storage::Exact { .. } => {
            if let Some(tensor) = artifact.exact(name)? {
                writer.write(&tensor.bytes)?;
            }
        }
        Storage::Codec { .. } | Storage::Path { .. } => {
            if let Some(delta) = prepared(artifact, name)? {
                write_sum(base, &*delta, *dtype, writer)?;
            }
            if let Some(rows) = artifact.added_rows(name)? {
                writer.write(&rows.bytes)?;
            }
        }
    }
    Ok(())
}

/// Writes base plus delta, rounded to the fine-tune's type.
fn write_sum(
    base: Tensor<'_>,
    delta: &dyn DeltaLinear,
    dtype: DType,
    writer: &mut TensorWriter,
) -> Result<()> {
    let [n_rows, n_cols] = delta.shape();
    let block_rows = (BLOCK_WEIGHTS / n_cols.max(1)).max(1);
    let n_blocks = n_rows.div_ceil(block_rows);
    for first_block in (0..n_blocks).step_by(BLOCKS_AT_A_TIME) {
        let blocks = first_block..n_blocks.min(first_block + BLOCKS_AT_A_TIME);
        let decoded: Vec<Vec<u8>> = blocks
            .into_par_iter()
            .map(|block| -> Result<Vec<u8>> {
                let rows = block * block_rows..n_rows.min((block + 1) * block_rows);
                let n = rows.len() * n_cols;
                let (mut weights, mut change) = (vec![0.0; n], vec![0.0; n]);
                let offset = rows.start * n_cols * base.dtype().size_bytes();
                read_widened(&base, offset, &mut weights)?;
                delta.write_rows(rows, &mut change);
                weights.iter_mut().zip(&change).for_each(|(w, c)| *w += c);
                let mut bytes = Vec::with_capacity(n * dtype.size_bytes());
                dtype.narrow(&weights, &mut bytes);
                Ok(bytes)
            })
            .collect::<Result<_>>()?;
        for bytes in decoded {
            writer.write(&bytes)?;
        }
    }
    Ok(())
}
