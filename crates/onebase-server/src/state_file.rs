use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use onebase_engine::{Desired, Registry};
use onebase_format::{Digest, write_file};
use serde::{Deserialize, Serialize};

/// The file in the state folder.
const STATE_FILE: &str = "tenants.json";

/// The newest version that this program reads, and the one that it writes.
const STATE_VERSION: u32 = 1;

/// Why the state could not be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// The folder or the file cannot be read or made.
    #[error("cannot use {}", path.display())]
    Io {
        /// The folder or file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is malformed.
    #[error("{}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// The file is of a newer program.
    #[error("{}: expected version at most {STATE_VERSION}, got {got}", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        got: u32,
    },
    /// The file is of another base.
    #[error("{} is of the base {got}, this one is {expected}", path.display())]
    Base {
        /// The file.
        path: PathBuf,
        /// The digest of this base.
        expected: Digest,
        /// The digest of the base that it is of.
        got: Digest,
    },
    /// The file cannot be written.
    #[error(transparent)]
    Write(#[from] onebase_format::Error),
}

#[derive(Serialize, Deserialize)]
struct Contents {
    version: u32,
    base: Digest,
    last_generation: u64,
    tenants: Vec<Record>,
    /// Tenants that were unloaded, so that a folder or a flag does not bring them back.
    unloaded: BTreeSet<String>,
}

#[derive(Serialize, Deserialize)]
struct Record {
    name: String,
    source: PathBuf,
    blake3: Option<Digest>,
    generation: u64,
}

/// What a state file said.
#[derive(Debug, Default)]
pub struct Saved {
    /// The tenants to serve.
    pub tenants: Vec<Desired>,
    /// The tenants that were unloaded.
    pub unloaded: BTreeSet<String>,
    /// The newest generation that was given.
    pub last_generation: u64,
}

/// Which tenants are to be served, on disk: it is written before a change is answered, as a
/// whole or not at all.
#[derive(Debug)]
pub struct StateFile {
    path: PathBuf,
    unloaded: Mutex<BTreeSet<String>>,
}

impl StateFile {
    /// Reads the state in a folder, which is made if it is not there.
    ///
    /// # Errors
    /// When the folder cannot be made, or its file is malformed, newer or of another base.
    pub fn open(folder: &Path, base: Digest) -> Result<(Self, Saved), StateError> {
        let io = |path: &Path| {
            let path = path.to_owned();
            |source| StateError::Io { path, source }
        };
        std::fs::create_dir_all(folder).map_err(io(folder))?;
        let path = folder.join(STATE_FILE);
        let saved = match std::fs::read(&path) {
            Ok(bytes) => read(&path, &bytes, base)?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Saved::default(),
            Err(error) => return Err(io(&path)(error)),
        };
        let unloaded = Mutex::new(saved.unloaded.clone());
        Ok((Self { path, unloaded }, saved))
    }

    /// Writes what the registry serves now. `changed` is the tenant that was loaded or unloaded.
    ///
    /// # Errors
    /// When it cannot be written; it is as it was then.
    pub fn save(&self, registry: &Registry, changed: Option<&str>) -> Result<(), StateError> {
        // One writer at a time, and each writes what there is when it has its turn.
        let mut unloaded = self.unloaded.lock().unwrap_or_else(PoisonError::into_inner);
        let list = registry.list();
        if let Some(name) = changed {
            let is_there = list.iter().any(|listing| listing.desired.name == name);
            if is_there {
                unloaded.remove(name)
            } else {
                unloaded.insert(name.to_owned())
            };
        }
        let record = |desired: Desired| Record {
            name: desired.name,
            source: desired.source,
            blake3: desired.digest,
            generation: desired.generation,
        };
        let contents = Contents {
            version: STATE_VERSION,
            base: registry.base().digest(),
            last_generation: registry.last_generation(),
            tenants: list.into_iter().map(|listing| record(listing.desired)).collect(),
            unloaded: unloaded.clone(),
        };
        let text = serde_json::to_string_pretty(&contents)
            .map_err(|source| StateError::Json { path: self.path.clone(), source })?;
        Ok(write_file(&self.path, text.as_bytes())?)
    }
}

fn read(path: &Path, bytes: &[u8], base: Digest) -> Result<Saved, StateError> {
    let at = || path.to_owned();
    let json = |source| StateError::Json { path: at(), source };
    let value: serde_json::Value = serde_json::from_slice(bytes).map_err(json)?;
    let version = value["version"].as_u64().unwrap_or(0);
    if version > u64::from(STATE_VERSION) {
        let got = u32::try_from(version).unwrap_or(u32::MAX);
        return Err(StateError::Version { path: at(), got });
    }
    let contents: Contents = serde_json::from_value(value).map_err(json)?;
    if contents.base != base {
        return Err(StateError::Base { path: at(), expected: base, got: contents.base });
    }
    let desired = |record: Record| Desired {
        name: record.name,
        source: record.source,
        digest: record.blake3,
        generation: record.generation,
    };
    Ok(Saved {
        tenants: contents.tenants.into_iter().map(desired).collect(),
        unloaded: contents.unloaded,
        last_generation: contents.last_generation,
    })
}
