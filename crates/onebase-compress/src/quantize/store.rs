//! What is stored of a quantized base, written front to back.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use onebase_codec::numerics::HessianFactor;
use onebase_format::artifact::{BaseRecord, Role};
use onebase_format::{
    CONFIG_FILE, Checkpoint, Digest, StagedFolder, TensorEntry, TensorHasher, TensorWriter,
};
use onebase_kernels::Parts;
use onebase_model::quantized::{
    QUANTIZED_FILE, QuantizedRecord, StoredTensor, TensorIdentity, stored_digest, stored_tensors,
};
use onebase_model::{Model, ModelConfig, SiteInput, tensor_specs};
use onebase_tensor::DType;

use super::folder::{copy_tensor, f32_bytes, read_f32, write_weights};
use super::rotations::Rotations;
use super::rounding::{Codes, Rounding, factor};
use super::write::{QuantizeOptions, QuantizeText};
use crate::calibration::{InputMoment, MomentRun};
use crate::compress::TOOL;
use crate::{Error, Progress, Result};

/// Dequantized rows that are hashed at a time.
const ROWS: usize = 256;

/// The data of a stored tensor.
struct Part {
    name: String,
    bytes: Vec<u8>,
}

/// Digests of a tensor: of what its codes stand for, and of what was rounded.
pub(super) type Digests = Vec<(StoredTensor, Digest, Digest)>;

pub(super) struct Writing<'a> {
    /// What is rounded.
    pub(super) full: &'a Model,
    /// Of the quantized base.
    pub(super) config: &'a ModelConfig,
    pub(super) folder: &'a StagedFolder,
    pub(super) progress: &'a dyn Progress,
}

impl Writing<'_> {
    /// Rounds every tensor and writes what is stored of it.
    pub(super) fn codes(
        &self,
        options: &QuantizeOptions,
        text: Option<&QuantizeText>,
        rotations: Option<&Rotations>,
    ) -> Result<Digests> {
        let checkpoint = self.full.checkpoint();
        let tensors = stored_tensors(self.config);
        let own = rotations.map(|r| r.entries(self.config)).unwrap_or_default();
        let mut entries = Vec::new();
        for tensor in &tensors {
            for part in &tensor.parts {
                let mut part = part.clone();
                if !tensor.is_coded {
                    part.dtype = checkpoint.tensor(&part.name)?.dtype();
                }
                entries.push(part);
            }
        }
        entries.extend(own.iter().map(|(entry, _)| entry.clone()));
        self.progress.begin(entries.iter().map(|e| e.size_bytes() as u64).sum());
        let mut hessians = match (options.rounding, text) {
            (Rounding::Gptq, Some(text)) => Some(Hessians::new(self.full, text)?),
            _ => None,
        };
        let mut digests = Vec::new();
        let mut waiting = tensors.into_iter();
        let mut pending: Vec<Part> = Vec::new();
        write_weights(self.folder, &entries, self.progress, |entry, writer| {
            if let Some((_, values)) = own.iter().find(|(known, _)| known.name == entry.name) {
                return Ok(writer.write(&f32_bytes(values))?);
            }
            if pending.is_empty()
                && let Some(tensor) = waiting.next()
            {
                if !tensor.is_coded {
                    let stored = checkpoint.tensor(&entry.name)?;
                    let digest = stored.digest()?;
                    digests.push((tensor, digest, digest));
                    return copy_tensor(&stored, writer);
                }
                let (parts, quantized) = self.round(&tensor, &mut hessians)?;
                let full = checkpoint.tensor(&tensor.spec.name)?.digest()?;
                digests.push((tensor, quantized, full));
                pending = parts;
            }
            write_part(entry, &mut pending, writer)
        })?;
        Ok(digests)
    }

    /// The parts of a matrix in codes, by name, and the digest of their values.
    fn round(
        &self,
        tensor: &StoredTensor,
        hessians: &mut Option<Hessians<'_>>,
    ) -> Result<(Vec<Part>, Digest)> {
        let spec = &tensor.spec;
        let values = read_f32(&self.full.checkpoint().tensor(&spec.name)?)?;
        if let Some(at) = values.iter().position(|w| !w.is_finite()) {
            return Err(Error::NotFinite {
                path: self.full.checkpoint().dir().to_owned(),
                tensor: spec.name.clone(),
                row: at / spec.shape[1].max(1),
                column: at % spec.shape[1].max(1),
                got: values[at],
            });
        }
        let (parts, factor) = match (SiteInput::of_weight(&spec.name), self.config.quantization) {
            (Some((layer, input)), Some(q)) if spec.role == Role::Linear => {
                let factor = match hessians {
                    Some(hessians) => Some(hessians.factor(layer, input, spec.shape[1])?),
                    None => None,
                };
                (q.weight_parts(input, self.config), factor)
            }
            _ => (Parts { n_low: 0, n_high: spec.shape[1] }, None),
        };
        let codes = Codes::round(&values, parts, factor);
        let digest = digest_of_values(&codes, [spec.shape[0], spec.shape[1]]);
        let module = spec.name.strip_suffix(".weight").unwrap_or(&spec.name);
        let scales =
            |scales: &[half::f16]| scales.iter().flat_map(|s| s.to_le_bytes()).collect::<Vec<u8>>();
        let parts = [
            ("low_scale", scales(&codes.low_scale)),
            ("high_scale", scales(&codes.high_scale)),
            ("low", codes.low),
            ("high", codes.high),
        ];
        let parts = parts.into_iter().filter(|(_, bytes)| !bytes.is_empty());
        let named = parts.map(|(part, bytes)| Part { name: format!("{module}.{part}"), bytes });
        Ok((named.collect(), digest))
    }

    /// Writes the record of what was written.
    pub(super) fn record(
        &self,
        base: &Path,
        options: &QuantizeOptions,
        text: Option<&QuantizeText>,
        digests: Digests,
    ) -> Result<()> {
        let base = Checkpoint::open(base)?;
        let config = ModelConfig::from_json(base.config(), base.dir())?;
        let specs = tensor_specs(&config);
        let names: Vec<&str> = specs.iter().map(|spec| spec.name.as_str()).collect();
        let of_base = names.iter().copied().zip(base.digests(&names)?);
        let written = Checkpoint::open(&self.staged())?;
        let mut tensors = BTreeMap::new();
        for (tensor, quantized, full) in digests {
            let stored = stored_digest(&written, &tensor)?;
            tensors.insert(tensor.spec.name, TensorIdentity { stored, quantized, full });
        }
        let record = QuantizedRecord {
            tool: TOOL.to_owned(),
            base: BaseRecord::new(&base.name(), of_base),
            calibration: text.and_then(|text| text.record.clone()),
            rounding: options.rounding.name().to_owned(),
            seed: options.seed,
            tensors,
        };
        let Ok(json) = serde_json::to_string_pretty(&record) else {
            unreachable!("names and digests are JSON")
        };
        Ok(self.folder.write(QUANTIZED_FILE, (json + "\n").as_bytes())?)
    }

    /// The folder that is being written.
    fn staged(&self) -> PathBuf {
        let config = self.folder.path(CONFIG_FILE);
        config.parent().map_or_else(PathBuf::new, Path::to_owned)
    }
}

/// Writes the part of a matrix that comes next.
fn write_part(
    entry: &TensorEntry,
    pending: &mut Vec<Part>,
    writer: &mut TensorWriter,
) -> Result<()> {
    let Some(at) = pending.iter().position(|part| part.name == entry.name) else {
        unreachable!("parts follow the order of their tensors")
    };
    Ok(writer.write(&pending.remove(at).bytes)?)
}

/// The digest of the f32 tensor that codes stand for.
fn digest_of_values(codes: &Codes, shape @ [n_rows, n_cols]: [usize; 2]) -> Digest {
    let mut hasher = TensorHasher::new(DType::F32, &shape);
    let mixed = codes.as_mixed();
    let mut block = vec![0.0; ROWS * n_cols];
    for first in (0..n_rows).step_by(ROWS) {
        let n = ROWS.min(n_rows - first);
        let rows = block.chunks_mut(n_cols.max(1)).take(n).enumerate();
        rows.for_each(|(row, out)| mixed.write_row(first + row, out));
        hasher.update(&f32_bytes(&block[..n * n_cols]));
    }
    hasher.finish()
}

/// What GPTQ weighs errors by, block by block.
struct Hessians<'a> {
    run: MomentRun<'a>,
    block: Option<(usize, Vec<(SiteInput, InputMoment)>)>,
    last: Option<((usize, SiteInput), HessianFactor)>,
}

impl<'a> Hessians<'a> {
    fn new(model: &'a Model, text: &'a QuantizeText) -> Result<Self> {
        let run = MomentRun::new(model, &text.tokens, text.window_tokens)?;
        Ok(Self { run, block: None, last: None })
    }

    /// The factor of an input, blocks being asked for in order.
    fn factor(&mut self, layer: usize, input: SiteInput, n: usize) -> Result<&HessianFactor> {
        if self.last.as_ref().is_none_or(|(at, _)| *at != (layer, input)) {
            while self.block.as_ref().is_none_or(|(at, _)| *at < layer) {
                self.block = None;
                let next = self.run.next_layer(|_| ());
                self.block = next.map(|(at, moments)| (at, moments.into_inner().collect()));
            }
            let moments = self.block.iter().flat_map(|(_, moments)| moments);
            let Some((_, moment)) = moments.into_iter().find(|(known, _)| *known == input) else {
                unreachable!("every block shows the inputs of its sites")
            };
            self.last = Some(((layer, input), factor(&moment.values, n)?));
        }
        match &self.last {
            Some((_, factor)) => Ok(factor),
            None => unreachable!("it was just made"),
        }
    }
}
