//! Folders of whole models.

use std::path::Path;

use onebase_format::{
    CONFIG_FILE, Checkpoint, SIDE_FILES, StagedFolder, Tensor, TensorEntry, TensorWriter,
};
use onebase_model::quantized::{QUANTIZATION_FIELD, Quantization};
use serde_json::Value;

use crate::{Error, Progress, Result};

/// Bytes copied at a time.
const BLOCK: usize = 1 << 20;

/// Writes a checkpoint's one file of weights: `fill` writes the data of each tensor, all of it.
pub(super) fn write_weights(
    folder: &StagedFolder,
    entries: &[TensorEntry],
    progress: &dyn Progress,
    mut fill: impl FnMut(&TensorEntry, &mut TensorWriter) -> Result<()>,
) -> Result<()> {
    let mut writer = TensorWriter::create(&folder.path("model.safetensors"), entries)?;
    for entry in entries {
        progress.tensor(&entry.name);
        fill(entry, &mut writer)?;
        progress.advance(entry.size_bytes() as u64);
    }
    writer.finish()?;
    Ok(())
}

/// Writes the configuration of a checkpoint, quantized as said, and the files beside its weights.
pub(super) fn write_side_files(
    folder: &StagedFolder,
    from: &Checkpoint,
    quantization: Option<&Quantization>,
) -> Result<()> {
    for name in SIDE_FILES {
        if let Some(bytes) = from.side_file(name)? {
            folder.write(name, &bytes)?;
        }
    }
    let mut config = from.config().clone();
    if let Value::Object(fields) = &mut config {
        fields.remove(QUANTIZATION_FIELD);
        if let Some(quantization) = quantization {
            fields.insert(QUANTIZATION_FIELD.to_owned(), quantization.to_json());
        }
    }
    Ok(folder.write(CONFIG_FILE, format!("{config:#}\n").as_bytes())?)
}

/// Copies a tensor's bytes.
pub(super) fn copy_tensor(tensor: &Tensor<'_>, writer: &mut TensorWriter) -> Result<()> {
    let mut block = Vec::new();
    for offset in (0..tensor.size_bytes()).step_by(BLOCK) {
        block.resize(BLOCK.min(tensor.size_bytes() - offset), 0);
        tensor.read(offset, &mut block)?;
        writer.write(&block)?;
    }
    Ok(())
}

/// The elements of a tensor as f32.
pub(super) fn read_f32(tensor: &Tensor<'_>) -> Result<Vec<f32>> {
    let mut wide = vec![0.0; tensor.n_weights()];
    crate::pair::read_widened(tensor, 0, &mut wide)?;
    Ok(wide)
}

/// Elements as the bytes of f32.
pub(super) fn f32_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// A failure of the file system.
pub(super) fn io(action: &'static str, path: &Path, source: std::io::Error) -> Error {
    Error::Format(onebase_format::Error::Io { action, path: path.to_owned(), source })
}
