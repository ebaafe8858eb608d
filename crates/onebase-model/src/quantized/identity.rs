use std::collections::BTreeMap;
use std::path::Path;

use onebase_format::artifact::{Artifact, BaseRecord, CalibrationRecord, digest_of_tensors};
use onebase_format::{Checkpoint, Digest};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::{StoredTensor, stored_tensors};
use crate::{Error, ModelConfig, Result, tensor_specs};

/// The file of a quantized base that says what its tensors stand for.
pub const QUANTIZED_FILE: &str = "onebase-quantized.json";

/// What a quantized base says of itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct QuantizedRecord {
    /// Program and version that wrote it.
    pub tool: String,
    /// The model that was quantized.
    pub base: BaseRecord,
    /// The text that its rotations and its rounding follow, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calibration: Option<CalibrationRecord>,
    /// How weights were rounded.
    pub rounding: String,
    /// Of the random rotations.
    pub seed: u64,
    /// Every tensor that a delta can be of.
    pub tensors: BTreeMap<String, TensorIdentity>,
}

/// What a tensor of a quantized base is known by. Digests of tensors are those of
/// [`onebase_format::Tensor::digest`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorIdentity {
    /// The digest of the names and digests of what is stored of it.
    pub stored: Digest,
    /// The digest of the f32 values that the codes stand for.
    pub quantized: Digest,
    /// The digest of the rotated tensor before it was quantized.
    pub full: Digest,
}

/// Digests of a base's tensors, against which deltas may have been made.
#[derive(Clone, Debug)]
pub struct Identities {
    /// What is served without a delta.
    pub own: BTreeMap<String, Digest>,
    /// Of a quantized base: its weights before they were quantized.
    pub full: Option<BTreeMap<String, Digest>>,
}

impl Identities {
    /// Checks that an artifact was made against one of them.
    ///
    /// # Errors
    /// When it is of another basis, or a digest differs.
    pub fn check(&self, base: &Path, config: &ModelConfig, artifact: &Artifact) -> Result<()> {
        // In the basis of a quantized base, norms of blocks have no weights.
        let mut names = artifact.manifest().tensors.keys();
        if config.is_rotated() && names.any(|name| !self.own.contains_key(name)) {
            return Err(Error::OtherModel {
                path: artifact.dir().to_owned(),
                field: "the basis",
                expected: "that of a quantized base".to_owned(),
                got: "another".to_owned(),
            });
        }
        Ok(artifact.check_base_digests(base, &self.of_artifact(artifact))?)
    }

    /// Those that the tensors of an artifact name: the full ones where the first tensor that
    /// is not the base's own is one of them.
    fn of_artifact(&self, artifact: &Artifact) -> BTreeMap<&str, Digest> {
        let full = self.full.as_ref().filter(|full| {
            let mut tensors = artifact.manifest().tensors.iter();
            let other = tensors.find(|(name, record)| self.own.get(*name) != Some(&record.base));
            other.is_some_and(|(name, record)| full.get(name) == Some(&record.base))
        });
        let chosen = full.unwrap_or(&self.own);
        chosen.iter().map(|(name, digest)| (name.as_str(), *digest)).collect()
    }
}

/// The digests of a base's tensors. Those of a quantized base are what its record says of the
/// codes that are there, which are read and compared with it.
///
/// # Errors
/// When a tensor or the record cannot be read, or the codes are not those of the record.
pub fn base_digests(checkpoint: &Checkpoint, config: &ModelConfig) -> Result<Identities> {
    let is_coded = config.quantization.is_some_and(|q| q.weight_bits != 16);
    if !is_coded {
        let specs = tensor_specs(config);
        let names: Vec<&str> = specs.iter().map(|s| s.name.as_str()).collect();
        let digests = checkpoint.digests(&names)?;
        let own = names.into_iter().map(str::to_owned).zip(digests).collect();
        return Ok(Identities { own, full: None });
    }
    let record = QuantizedRecord::read(checkpoint)?;
    let identities: Vec<(String, TensorIdentity)> = stored_tensors(config)
        .into_par_iter()
        .map(|tensor| {
            let name = tensor.spec.name.clone();
            let got = stored_digest(checkpoint, &tensor)?;
            match record.tensors.get(&name) {
                Some(identity) if identity.stored == got => Ok((name, *identity)),
                known => Err(Error::OtherCodes {
                    path: checkpoint.dir().to_owned(),
                    tensor: name,
                    expected: known.map(|identity| identity.stored),
                    got,
                }),
            }
        })
        .collect::<Result<_>>()?;
    let by = |digest: fn(&TensorIdentity) -> Digest| {
        identities.iter().map(|(name, identity)| (name.clone(), digest(identity))).collect()
    };
    Ok(Identities { own: by(|i| i.quantized), full: Some(by(|i| i.full)) })
}

/// The digest of the names and digests of what is stored of a tensor.
///
/// # Errors
/// When a part is missing or cannot be read.
pub fn stored_digest(checkpoint: &Checkpoint, tensor: &StoredTensor) -> Result<Digest> {
    let mut digests = Vec::new();
    for part in &tensor.parts {
        digests.push((part.name.as_str(), checkpoint.stored(&part.name)?.digest()?));
    }
    Ok(digest_of_tensors(digests.into_iter()))
}

impl QuantizedRecord {
    /// The record of a quantized base.
    ///
    /// # Errors
    /// When the file is missing or malformed.
    pub fn read(checkpoint: &Checkpoint) -> Result<Self> {
        let path = checkpoint.dir();
        let Some(bytes) = checkpoint.side_file(QUANTIZED_FILE)? else {
            return Err(Error::MissingFile { path: path.to_owned(), file: QUANTIZED_FILE });
        };
        serde_json::from_slice(&bytes).map_err(|source| Error::Json {
            path: path.to_owned(),
            file: QUANTIZED_FILE,
            source,
        })
    }
}
