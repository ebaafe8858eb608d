use std::path::Path;

use onebase_codec::CodecSpec;
use onebase_format::artifact::{ArtifactWriter, CodecRecord, Manifest, Origin, Role, Sizes};
use onebase_format::{CONFIG_FILE, Digest, SIDE_FILES, Tensor};

use crate::model_card::model_card;
use crate::pair::TensorDelta;
use crate::{Error, Pair, Plan, Progress, Result, TablePlan};

const TOOL: &str = concat!("onebase ", env!("CARGO_PKG_VERSION"));

/// Bytes compared or copied at a time.
const BLOCK: usize = 1 << 20;

/// Compresses a fine-tune into the folder `target`, which must not exist.
///
/// # Errors
/// When something cannot be read, a weight is NaN or ∞, the fine-tune is the
/// base, or the artifact cannot be written; nothing is left under its name then.
pub fn compress(
    pair: &Pair,
    plan: &Plan,
    target: &Path,
    progress: &dyn Progress,
) -> Result<(Manifest, Sizes)> {
    let mut writer = ArtifactWriter::create(target, TOOL, &pair.fine_tune.name())?;
    progress.begin(pair.fine_tune.size_bytes());
    let mut changed = false;
    for spec in &pair.specs {
        progress.tensor(&spec.name);
        let base = pair.base.tensor(&spec.name)?;
        let fine_tune = pair.fine_tune.tensor(&spec.name)?;
        let origin = |base| Origin {
            name: &spec.name,
            role: spec.role,
            dtype: fine_tune.dtype(),
            shape: fine_tune.shape(),
            base,
        };
        if same_bytes(&base, &fine_tune)? {
            writer.put_unchanged(origin(base.digest()?));
        } else {
            changed = true;
            let codec = match (spec.role, &plan.tables) {
                (Role::Vector, _) | (Role::Embedding | Role::Head, TablePlan::Exact) => None,
                (Role::Embedding | Role::Head, TablePlan::Codec(codec)) => Some(codec),
                (Role::Linear, _) => Some(&plan.linear),
            };
            match codec {
                Some(codec) => put_delta(&mut writer, codec, base, fine_tune, origin)?,
                None => {
                    let bytes = read_finite(&fine_tune, 0)?;
                    writer.put_exact(origin(base.digest()?), &bytes)?;
                }
            }
        }
        progress.advance(fine_tune.size_bytes() as u64);
    }
    if !changed {
        return Err(Error::NoChange { path: pair.fine_tune.dir().to_owned() });
    }
    for name in SIDE_FILES.into_iter().chain([CONFIG_FILE]) {
        if let Some(bytes) = pair.fine_tune.side_file(name)? {
            if pair.base.side_file(name)?.as_ref() == Some(&bytes) {
                writer.inherit_file(name, &bytes);
            } else {
                writer.put_file(name, &bytes)?;
            }
        }
    }
    Ok(writer.finish(&pair.base.name(), model_card)?)
}

fn put_delta<'a>(
    writer: &mut ArtifactWriter,
    codec: &CodecSpec,
    base: Tensor<'a>,
    fine_tune: Tensor<'a>,
    origin: impl Fn(Digest) -> Origin<'a>,
) -> Result<()> {
    let source = TensorDelta::new(base, fine_tune);
    let (digest, delta) = rayon::join(|| base.digest(), || codec.encode(&source));
    let delta = delta.map_err(|e| source.explain(e))?;
    let base_bytes = base.n_weights() * fine_tune.dtype().size_bytes();
    let added_rows = read_finite(&fine_tune, base_bytes)?;
    let record = CodecRecord {
        name: codec.codec().name().to_owned(),
        version: codec.codec().version(),
        options: codec.options().to_json().clone(),
    };
    writer.put_delta(origin(digest?), record, delta, &added_rows)?;
    Ok(())
}

/// The bytes of a tensor from `offset`, every weight of which is finite.
fn read_finite(tensor: &Tensor<'_>, offset: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0; tensor.size_bytes() - offset];
    tensor.read(offset, &mut bytes)?;
    let size = tensor.dtype().size_bytes();
    let mut wide = vec![0.0; BLOCK.min(bytes.len()) / size];
    for (index, block) in bytes.chunks(BLOCK).enumerate() {
        let wide = &mut wide[..block.len() / size];
        tensor.dtype().widen(block, wide);
        if let Some(at) = wide.iter().position(|w| !w.is_finite()) {
            let element = (offset + index * BLOCK) / size + at;
            let width = tensor.shape().last().copied().unwrap_or(1).max(1);
            return Err(Error::NotFinite {
                path: tensor.path().to_owned(),
                tensor: tensor.name().to_owned(),
                row: element / width,
                column: element % width,
                got: wide[at],
            });
        }
    }
    Ok(bytes)
}

/// Whether two tensors are the same to the byte; stops at the first difference.
fn same_bytes(a: &Tensor<'_>, b: &Tensor<'_>) -> Result<bool> {
    if a.dtype() != b.dtype() || a.shape() != b.shape() {
        return Ok(false);
    }
    let mut blocks = [Vec::new(), Vec::new()];
    for offset in (0..a.size_bytes()).step_by(BLOCK) {
        let len = BLOCK.min(a.size_bytes() - offset);
        for (tensor, block) in [a, b].into_iter().zip(&mut blocks) {
            block.resize(len, 0);
            tensor.read(offset, block)?;
        }
        if blocks[0] != blocks[1] {
            return Ok(false);
        }
    }
    Ok(true)
}
