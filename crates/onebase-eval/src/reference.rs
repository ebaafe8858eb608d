use onebase_format::artifact::{Artifact, Storage};
use onebase_format::{CONFIG_FILE, Checkpoint, Digest, SIDE_FILES};

use crate::{Error, Result};

/// Checks that an artifact was made from this fine-tune, as far as it tells: every
/// tensor's type and shape, those that it stores as they were, which are the base's and
/// which are not, rows past the base's, and the files beside the weights.
///
/// # Errors
/// When something is not the fine-tune's.
pub fn check_reference(artifact: &Artifact, finetune: &Checkpoint) -> Result<()> {
    let other = |what: &str| Error::OtherFineTune {
        artifact: artifact.dir().to_owned(),
        finetune: finetune.dir().to_owned(),
        what: what.to_owned(),
    };
    let manifest = artifact.manifest();
    for (name, record) in &manifest.tensors {
        if !finetune.contains(name) {
            return Err(other(name));
        }
        let tensor = finetune.tensor(name)?;
        let mut same = record.dtype == tensor.dtype().name() && record.shape == tensor.shape();
        if same {
            same = match &record.storage {
                Storage::Unchanged => tensor.digest()? == record.base,
                Storage::Exact { .. } => {
                    artifact.exact(name)?.is_some_and(|stored| stored.bytes == *tensor.bytes())
                }
                Storage::Path { .. } => tensor.digest()? != record.base,
                Storage::Codec { .. } => match artifact.added_rows(name)? {
                    Some(rows) => tensor.bytes().ends_with(&rows.bytes),
                    None => tensor.digest()? != record.base,
                },
            };
        }
        if !same {
            return Err(other(name));
        }
    }
    for name in SIDE_FILES.into_iter().chain([CONFIG_FILE]) {
        let stored = manifest.files.get(name).map(|file| file.blake3);
        let expected = stored.or_else(|| manifest.inherited.get(name).copied());
        let got = finetune.side_file(name)?.map(|bytes| Digest::of(&bytes));
        if expected != got {
            return Err(other(name));
        }
    }
    Ok(())
}
