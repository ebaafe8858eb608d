use std::collections::BTreeSet;
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::artifact::read_versioned;
use crate::checkpoint::plain_name;
use crate::error::Error;
use crate::safetensors_file::file_digest;
use crate::{Digest, Result, Sha256};

/// The manifest's file name.
pub const ARCHIVE_FILE: &str = "onebase-archive.json";

/// The value of `format` in every manifest.
pub(super) const FORMAT: &str = "onebase-archive";

/// The newest version that is read, and the one that is written.
pub(super) const VERSION: u32 = 1;

/// What an archive holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ArchiveManifest {
    /// `"onebase-archive"`.
    pub format: String,
    /// Of the layout.
    pub version: u32,
    /// Program and version that wrote it.
    pub tool: String,
    /// What the base is called.
    pub base: String,
    /// What the fine-tune is called.
    pub fine_tune: String,
    /// Every file of the fine-tune's folder, in the order of their paths.
    pub files: Vec<FileRecord>,
}

/// A file of the fine-tune.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FileRecord {
    /// Its path in the folder, `/` between names.
    pub path: String,
    /// Its length.
    pub bytes: u64,
    /// Its digest.
    pub sha256: Sha256,
    /// How it is stored.
    #[serde(flatten)]
    pub storage: FileStorage,
}

/// How a file is stored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "stored", rename_all = "kebab-case")]
pub enum FileStorage {
    /// It is the base's file of the same path.
    Base,
    /// All of its bytes.
    Whole {
        /// The archive's file.
        file: String,
        /// Its length.
        stored_bytes: u64,
        /// Its digest.
        blake3: Digest,
        /// How its bytes are written.
        compression: Compression,
    },
    /// A safetensors file: its header, compressed, then its tensors in the order of their
    /// bytes.
    Tensors {
        /// The archive's file.
        file: String,
        /// Its length.
        stored_bytes: u64,
        /// Its digest.
        blake3: Digest,
        /// Bytes of the compressed header.
        header_bytes: u64,
        /// The tensors in that order.
        tensors: Vec<TensorStorage>,
    },
}

impl FileStorage {
    /// The archive's file, its length and its digest.
    pub fn data(&self) -> Option<(&str, u64, Digest)> {
        match self {
            Self::Base => None,
            Self::Whole { file, stored_bytes, blake3, .. }
            | Self::Tensors { file, stored_bytes, blake3, .. } => {
                Some((file, *stored_bytes, *blake3))
            }
        }
    }
}

/// How bytes are written that are no tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Compression {
    /// As they are.
    None,
    /// As a frame of Zstandard (RFC 8878).
    Zstd,
}

/// How a tensor is stored: in parts of bytes that follow each other, first those that have a base,
/// then the others.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TensorStorage {
    /// Its name.
    pub name: String,
    /// The base's tensor of that name, if it is used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<BaseOfTensor>,
    /// Bytes of each part in the archive's file.
    pub parts: Vec<u64>,
}

/// The base of a tensor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BaseOfTensor {
    /// The digest of all of it.
    pub blake3: Digest,
    /// So many elements, the first ones, have it; by position it is theirs.
    pub elements: u64,
}

/// An archive whose manifest was checked.
#[derive(Debug)]
pub struct Archive {
    dir: PathBuf,
    manifest: ArchiveManifest,
}

impl Archive {
    /// Whether a folder is one.
    pub fn is_at(dir: &Path) -> bool {
        dir.join(ARCHIVE_FILE).is_file()
    }

    /// Opens a folder.
    ///
    /// # Errors
    /// When it is none, its manifest is malformed, of a newer version or names paths that lead
    /// elsewhere, or a file is missing or has another length.
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join(ARCHIVE_FILE);
        if !path.is_file() {
            let (path, expected) = (dir.to_owned(), "archive");
            return Err(Error::NotA { path, expected, missing: ARCHIVE_FILE });
        }
        let (manifest, _) = read_versioned(&path, FORMAT, VERSION)?;
        let archive = Self { dir: dir.to_owned(), manifest };
        archive.check(&path)?;
        Ok(archive)
    }

    fn check(&self, manifest: &Path) -> Result<()> {
        let mut paths: BTreeSet<&str> = BTreeSet::new();
        for record in &self.manifest.files {
            let problem = |problem: &str| Error::Manifest {
                path: manifest.to_owned(),
                entry: record.path.clone(),
                problem: problem.to_owned(),
            };
            if !is_inside(&record.path) {
                let (path, name) = (manifest.to_owned(), record.path.clone());
                return Err(Error::UnsafeName { path, name });
            }
            if !paths.insert(&record.path) {
                return Err(problem("is listed twice"));
            }
            let Some((file, expected, _)) = record.storage.data() else { continue };
            let path = self.dir.join(plain_name(manifest, file)?);
            let got = std::fs::metadata(&path).map_err(Error::io("read", &path))?.len();
            if got != expected {
                return Err(Error::FileSize { path, expected, got });
            }
            if let FileStorage::Tensors { header_bytes, tensors, .. } = &record.storage {
                let parts = tensors.iter().flat_map(|tensor| &tensor.parts);
                let sum = parts.fold(*header_bytes, |sum, part| sum.saturating_add(*part));
                if sum != expected {
                    return Err(problem("its parts are not as long as its file"));
                }
            }
        }
        Ok(())
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The manifest.
    pub fn manifest(&self) -> &ArchiveManifest {
        &self.manifest
    }

    /// Bytes of the archive's files, the manifest among them.
    ///
    /// # Errors
    /// When the manifest cannot be read.
    pub fn size_bytes(&self) -> Result<u64> {
        let path = self.dir.join(ARCHIVE_FILE);
        let manifest = std::fs::metadata(&path).map_err(Error::io("read", &path))?.len();
        let data = self.manifest.files.iter().filter_map(|record| record.storage.data());
        // A file may be named again and again.
        Ok(data.fold(manifest, |sum, (_, bytes, _)| sum.saturating_add(bytes)))
    }

    /// Compares the digest of every file of the archive.
    ///
    /// # Errors
    /// When one has changed; the error says which.
    pub fn check_files(&self) -> Result<()> {
        for (file, _, expected) in self.manifest.files.iter().filter_map(|r| r.storage.data()) {
            let path = self.dir.join(file);
            let got = file_digest(&path)?;
            if got != expected {
                return Err(Error::FileDigest { path, expected, got });
            }
        }
        Ok(())
    }
}

/// Whether a path leads to a place in its folder, and is written in one way alone.
fn is_inside(path: &str) -> bool {
    let plain = |part: &str| {
        let mut parts = Path::new(part).components();
        let first = parts.next();
        matches!(first, Some(Component::Normal(only)) if only == part) && parts.next().is_none()
    };
    path.split('/').all(plain)
}
