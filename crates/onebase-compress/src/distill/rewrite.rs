use onebase_codec::CodecSpec;
use onebase_format::artifact::{
    Artifact, ArtifactWriter, Manifest, Origin, Sizes, Storage, StoredTensor,
};
use onebase_format::{CONFIG_FILE, Checkpoint, SIDE_FILES};

use super::DistillText;
use crate::model_card::model_card;
use crate::restore::dtype;
use crate::verify::fine_tune_specs;
use crate::{Error, Result};

/// Writes an artifact again, deltas that have a factor multiplied by it.
pub(super) fn rewrite(
    base: &Checkpoint,
    fine_tune: &Checkpoint,
    artifact: &Artifact,
    mut writer: ArtifactWriter,
    text: &DistillText<'_>,
    factor_of: &dyn Fn(&str) -> Option<f32>,
) -> Result<(Manifest, Sizes)> {
    let manifest = artifact.manifest();
    for (index, spec) in fine_tune_specs(base, artifact)?.iter().enumerate() {
        let name = &spec.name;
        let record = artifact.record(name)?;
        let origin = Origin {
            index,
            name,
            role: record.role,
            dtype: dtype(artifact, name)?,
            shape: &record.shape,
            base: record.base,
            fine_tune: fine_tune.tensor(name)?.digest()?,
        };
        match &record.storage {
            Storage::Unchanged => writer.put(StoredTensor::unchanged(origin), &[])?,
            Storage::Exact { .. } => {
                if let Some(tensor) = artifact.exact(name)? {
                    writer.put(StoredTensor::exact(origin), &tensor.bytes)?;
                }
            }
            Storage::Codec { .. } => {
                let Some((codec, mut delta)) = artifact.delta(name)? else { continue };
                if let Some(factor) = factor_of(name) {
                    CodecSpec::from_record(&codec.name, codec.version, &codec.options)
                        .and_then(|spec| spec.rescale(&mut delta, factor))
                        .map_err(|source| Error::Codec {
                            path: artifact.dir().to_owned(),
                            tensor: name.clone(),
                            source,
                        })?;
                }
                let added = artifact.added_rows(name)?.map(|rows| rows.bytes).unwrap_or_default();
                writer.put_delta(origin, codec.clone(), &delta, &added)?;
            }
            Storage::Path { .. } => unreachable!("a path cannot be rescaled, which was checked"),
        }
    }
    for name in SIDE_FILES.into_iter().chain([CONFIG_FILE]) {
        if let Some(bytes) = artifact.side_file(base, name)? {
            if manifest.inherited.contains_key(name) {
                writer.inherit_file(name, &bytes)?;
            } else {
                writer.put_file(name, &bytes)?;
            }
        }
    }
    writer.put_distillation(text.record.clone())?;
    Ok(writer.finish(model_card)?)
}
