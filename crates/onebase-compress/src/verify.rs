use onebase_codec::DeltaLinear;
use onebase_format::Checkpoint;
use onebase_format::artifact::{Artifact, MANIFEST_FILE, Role, Storage};
use onebase_model::quantized::base_digests;
use onebase_model::{ModelConfig, TensorSpec};
use rayon::prelude::*;
use serde::Serialize;

use crate::{Error, Progress, Result};

/// Weights decoded at a time.
const BLOCK_WEIGHTS: usize = 1 << 16;

/// What was checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Verified {
    /// Files whose digests were compared.
    pub n_files: usize,
    /// Base tensors whose digests were compared.
    pub n_base_tensors: usize,
    /// Deltas that were decoded.
    pub n_deltas: usize,
}

/// Checks an artifact against its base: every file, its own and the base's that
/// it inherits, the digest of every base tensor, every tensor's shape against the
/// architecture, and that every delta decodes to finite numbers.
///
/// # Errors
/// When something is not as it was written.
pub fn verify(base: &Checkpoint, artifact: &Artifact, progress: &dyn Progress) -> Result<Verified> {
    progress.begin(base.size_bytes());
    artifact.check_files()?;
    check_base(base, artifact)?;
    let specs = fine_tune_specs(base, artifact)?;
    let manifest = artifact.manifest();
    for name in manifest.inherited.keys() {
        artifact.side_file(base, name)?;
    }
    let mut n_deltas = 0;
    for spec in &specs {
        progress.tensor(&spec.name);
        if let Some(delta) = prepared(artifact, &spec.name)? {
            n_deltas += 1;
            check_finite(artifact, &spec.name, &*delta)?;
        }
        if base.contains(&spec.name) {
            progress.advance(base.tensor(&spec.name)?.size_bytes() as u64);
        }
    }
    let n_files = manifest.files.len() + manifest.nodes.len() + manifest.inherited.len();
    let n_base_tensors = manifest.tensors.len();
    Ok(Verified { n_files, n_base_tensors, n_deltas })
}

/// Checks the digest of every base tensor.
pub(crate) fn check_base(base: &Checkpoint, artifact: &Artifact) -> Result<()> {
    let config = ModelConfig::from_json(base.config(), base.dir())?;
    Ok(base_digests(base, &config)?.check(base.dir(), &config, artifact)?)
}

/// The tensors of the fine-tune, whose records all have the right shapes.
pub(crate) fn fine_tune_specs(base: &Checkpoint, artifact: &Artifact) -> Result<Vec<TensorSpec>> {
    let config = ModelConfig::of_artifact(artifact, base)?;
    let base_config = ModelConfig::from_json(base.config(), base.dir())?;
    base_config.check_fine_tune(&config, artifact.dir())?;
    let specs = onebase_model::tensor_specs(&config);
    // The same tensors in the same order, their sizes compared; the vocabulary may differ.
    for (spec, of_base) in specs.iter().zip(onebase_model::tensor_specs(&base_config)) {
        let record = artifact.record_for(&spec.name, spec.role)?;
        let base_shape = of_base.shape.as_slice();
        let covered = match &record.storage {
            Storage::Codec { added_rows, .. } if spec.role != Role::Vector => {
                vec![record.shape[0] - added_rows, record.shape[1]]
            }
            Storage::Codec { .. } | Storage::Path { .. } | Storage::Unchanged => {
                record.shape.clone()
            }
            Storage::Exact { .. } => base_shape.to_vec(),
        };
        for (expected, got) in [(&spec.shape, &record.shape), (&base_shape.to_vec(), &covered)] {
            if expected != got {
                return Err(Error::Model(onebase_model::Error::Shape {
                    path: artifact.dir().to_owned(),
                    tensor: spec.name.clone(),
                    expected: expected.clone(),
                    got: got.clone(),
                }));
            }
        }
        // In codes, what is unchanged is what they stand for.
        let stored = base.contains(&spec.name).then(|| base.tensor(&spec.name)).transpose()?;
        if let (Storage::Unchanged, Some(tensor)) = (&record.storage, stored)
            && record.dtype != tensor.dtype().name()
        {
            let (expected, got) = (tensor.dtype(), &record.dtype);
            return Err(Error::Format(onebase_format::Error::Manifest {
                path: artifact.dir().join(MANIFEST_FILE),
                entry: spec.name.clone(),
                problem: format!("unchanged, expected the base's type {expected}, got {got}"),
            }));
        }
    }
    Ok(specs)
}

/// A tensor's delta, ready to decode; `None` when it is not stored as one.
///
/// # Errors
/// When a part is missing or not what the codec wrote.
pub fn prepared(artifact: &Artifact, tensor: &str) -> Result<Option<Box<dyn DeltaLinear>>> {
    onebase_model::load_delta(artifact, tensor).map_err(|error| match error {
        onebase_model::Error::Delta { path, tensor, source } => {
            Error::Codec { path, tensor, source }
        }
        other => Error::Model(other),
    })
}

fn check_finite(artifact: &Artifact, tensor: &str, delta: &dyn DeltaLinear) -> Result<()> {
    let [n_rows, n_cols] = delta.shape();
    let block_rows = (BLOCK_WEIGHTS / n_cols.max(1)).max(1);
    (0..n_rows.div_ceil(block_rows)).into_par_iter().try_for_each_init(Vec::new, |block, index| {
        let first = index * block_rows;
        let rows = first..n_rows.min(first + block_rows);
        block.resize(rows.len() * n_cols, 0.0);
        delta.write_rows(rows, block);
        match block.iter().position(|w: &f32| !w.is_finite()) {
            None => Ok(()),
            Some(at) => Err(Error::NotFinite {
                path: artifact.dir().to_owned(),
                tensor: tensor.to_owned(),
                row: first + at / n_cols,
                column: at % n_cols,
                got: block[at],
            }),
        }
    })
}
