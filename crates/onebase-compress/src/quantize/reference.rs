//! Fine-tunes in the basis of a quantized base, beside what their deltas are taken against.

use std::path::{Path, PathBuf};

use onebase_format::{Checkpoint, StagedFolder, TensorEntry};
use onebase_model::quantized::{CodedMatrix, QuantizedRecord, stored_tensors};
use onebase_model::{ModelConfig, check_tensors, tensor_specs};
use onebase_tensor::DType;

use super::folder::{copy_tensor, f32_bytes, io, write_side_files, write_weights};
use super::rotate::rotate;
use super::rotations::Rotations;
use crate::{Error, Pair, Progress, Result};

/// What deltas for a quantized base are taken against.
#[derive(Clone, Debug)]
pub enum Reference {
    /// What its codes stand for: the delta makes good what quantizing has changed, so far as its
    /// codec has bits for it.
    Quantized,
    /// The base before it was quantized, whose folder this is: the delta is that of the
    /// fine-tune alone.
    Full(PathBuf),
}

/// A pair in the basis of a quantized base, in a folder that is removed with it.
#[derive(Debug)]
pub struct RotatedPair {
    pair: Pair,
    _folder: WorkFolder,
}

/// A folder that is removed when nobody needs it any more.
#[derive(Debug)]
struct WorkFolder(PathBuf);

impl RotatedPair {
    /// The reference and the fine-tune.
    pub fn pair(&self) -> &Pair {
        &self.pair
    }
}

impl Drop for WorkFolder {
    fn drop(&mut self) {
        // What is left is in the way of nobody.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Brings a fine-tune of a base that was quantized into the basis of `quantized`, and lays it in
/// f32 beside its reference, in a folder beside `target`.
///
/// The norms' weights of the fine-tune go into its sites, so that its delta is exact whatever
/// they are; the rotations are the base's.
///
/// # Errors
/// When `quantized` is not a quantized base, the fine-tune does not fit it, or the folder of the
/// full base is of another one.
pub fn open_rotated(
    quantized: &Path,
    fine_tune: &Path,
    reference: &Reference,
    target: &Path,
    progress: &dyn Progress,
) -> Result<RotatedPair> {
    let base = Checkpoint::open(quantized)?;
    let base_config = ModelConfig::from_json(base.config(), base.dir())?;
    let Some(quantization) = base_config.quantization.filter(|q| q.weight_bits != 16) else {
        return Err(Error::NotQuantized { path: quantized.to_owned() });
    };
    check_tensors(&base, &base_config)?;
    let is_rotated = quantization.method.is_rotated();
    let basis = is_rotated.then(|| quantization.unquantized());
    let in_basis = |config: ModelConfig| config.with_quantization(basis);
    let open = |dir: &Path| -> Result<(Checkpoint, ModelConfig)> {
        let checkpoint = Checkpoint::open(dir)?;
        let config = ModelConfig::from_json(checkpoint.config(), checkpoint.dir())?;
        check_tensors(&checkpoint, &config)?;
        Ok((checkpoint, in_basis(config)))
    };
    let (own, own_config) = open(fine_tune)?;
    in_basis(base_config.clone()).check_fine_tune(&own_config, fine_tune)?;
    let folder = WorkFolder::create(target)?;
    let place = |part: &str, of: &Checkpoint| -> Result<PathBuf> {
        let path = folder.0.join(part);
        std::fs::create_dir_all(&path).map_err(|source| io("create", &path, source))?;
        Ok(path.join(of.name()))
    };
    let rotations = if is_rotated { Some(Rotations::read(&base, &base_config)?) } else { None };
    let base_at = place("base", &base)?;
    match (reference, &rotations) {
        (Reference::Quantized, _) => {
            let config = in_basis(base_config.clone());
            dequantize(&base, &base_config, &config, rotations.as_ref(), &base_at, progress)?;
        }
        (Reference::Full(full), Some(rotations)) => {
            let (full, config) = open(full)?;
            rotate(&full, &config, rotations, &base_at, progress)?;
            check_full(&base, &Checkpoint::open(&base_at)?, &config)?;
        }
        (Reference::Full(full), None) => {
            let (checkpoint, config) = open(full)?;
            check_full(&base, &checkpoint, &config)?;
            let pair = Pair::open(full, fine_tune)?.standing_for(own.size_bytes());
            return Ok(RotatedPair { pair, _folder: folder });
        }
    }
    let fine_tune_at = match &rotations {
        Some(rotations) => {
            let at = place("fine-tune", &own)?;
            rotate(&own, &own_config, rotations, &at, progress)?;
            at
        }
        None => fine_tune.to_owned(),
    };
    let pair = Pair::open(&base_at, &fine_tune_at)?.standing_for(own.size_bytes());
    Ok(RotatedPair { pair, _folder: folder })
}

impl WorkFolder {
    /// An empty one beside `target`.
    fn create(target: &Path) -> Result<Self> {
        let name = target.file_name().unwrap_or_default().to_string_lossy();
        let folder = Self(target.with_file_name(format!(".{name}.rotated")));
        if folder.0.exists() {
            std::fs::remove_dir_all(&folder.0).map_err(|source| io("remove", &folder.0, source))?;
        }
        std::fs::create_dir_all(&folder.0).map_err(|source| io("create", &folder.0, source))?;
        Ok(folder)
    }
}

/// Writes what the codes of a quantized base, whose configuration is `coded`, stand for, in f32,
/// into the folder `target`.
fn dequantize(
    base: &Checkpoint,
    coded: &ModelConfig,
    config: &ModelConfig,
    rotations: Option<&Rotations>,
    target: &Path,
    progress: &dyn Progress,
) -> Result<()> {
    let folder = StagedFolder::create(target)?;
    let tensors = stored_tensors(coded);
    let mut entries = Vec::new();
    for tensor in &tensors {
        let (name, shape) = (tensor.spec.name.clone(), tensor.spec.shape.clone());
        let dtype = if tensor.is_coded { DType::F32 } else { base.tensor(&name)?.dtype() };
        entries.push(TensorEntry { name, dtype, shape });
    }
    let own = rotations.map(|r| r.entries(config)).unwrap_or_default();
    entries.extend(own.iter().map(|(entry, _)| entry.clone()));
    progress.begin(entries.iter().map(|entry| entry.size_bytes() as u64).sum());
    write_weights(&folder, &entries, progress, |entry, writer| {
        if let Some((_, values)) = own.iter().find(|(known, _)| known.name == entry.name) {
            return Ok(writer.write(&f32_bytes(values))?);
        }
        let coded_tensor = tensors.iter().find(|t| t.is_coded && t.spec.name == entry.name);
        let Some(tensor) = coded_tensor else {
            return copy_tensor(&base.tensor(&entry.name)?, writer);
        };
        let matrix = CodedMatrix::open(base, coded, tensor)?;
        let mut row = vec![0.0; entry.shape[1]];
        for index in 0..entry.shape[0] {
            matrix.write_row(index, &mut row);
            writer.write(&f32_bytes(&row))?;
        }
        Ok(())
    })?;
    write_side_files(&folder, base, config.quantization.as_ref())?;
    Ok(folder.commit()?)
}

/// Checks that a full base is the one that was quantized, to the bit.
fn check_full(quantized: &Checkpoint, full: &Checkpoint, config: &ModelConfig) -> Result<()> {
    let record = QuantizedRecord::read(quantized)?;
    let specs = tensor_specs(config);
    let names: Vec<&str> = specs.iter().map(|spec| spec.name.as_str()).collect();
    for (name, got) in names.iter().zip(full.digests(&names)?) {
        match record.tensors.get(*name) {
            Some(identity) if identity.full == got => {}
            known => {
                return Err(Error::OtherFull {
                    quantized: quantized.dir().to_owned(),
                    tensor: (*name).to_owned(),
                    expected: known.map(|identity| identity.full),
                    got,
                });
            }
        }
    }
    Ok(())
}
