//! Files of a folder, and the tensors in them, whatever model they are of.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use safetensors::tensor::Metadata;

use crate::error::Error;
use crate::safetensors_file::read_exact_at;
use crate::{Digest, Result, digest};

/// The longest header of a safetensors file, as its library has it.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// A file that is open for reading.
#[derive(Debug)]
pub struct SourceFile {
    path: PathBuf,
    file: File,
    bytes: u64,
}

impl SourceFile {
    /// Opens a file.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io("open", path))?;
        let bytes = file.metadata().map_err(Error::io("read", path))?.len();
        Ok(Self { path: path.to_owned(), file, bytes })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its length.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Reads bytes from a place on.
    ///
    /// # Errors
    /// When they cannot be read, as where the file ends before.
    pub fn read(&self, at: u64, out: &mut [u8]) -> Result<()> {
        read_exact_at(&self.file, out, at).map_err(Error::io("read", &self.path))
    }

    /// The file's header with its length before it, and its tensors in the order of their
    /// bytes, which they fill without a gap; `None` when it is no safetensors file.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn tensors(&self) -> Result<Option<(Vec<u8>, Vec<FileTensor>)>> {
        let mut len = [0; 8];
        if self.bytes < 8 {
            return Ok(None);
        }
        self.read(0, &mut len)?;
        let len = u64::from_le_bytes(len);
        if len > MAX_HEADER_BYTES.min(self.bytes - 8) {
            return Ok(None);
        }
        // At most the longest header.
        #[allow(clippy::cast_possible_truncation)]
        let mut header = vec![0; 8 + len as usize];
        self.read(0, &mut header)?;
        let tensors = tensors_of_header(&header, self.bytes);
        Ok(tensors.map(|tensors| (header, tensors)))
    }
}

/// A tensor of a safetensors file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileTensor {
    /// Its name.
    pub name: String,
    /// Its element type, as the header names it.
    pub dtype: String,
    /// Its shape, outermost dimension first.
    pub shape: Vec<usize>,
    /// Where its bytes begin in the file.
    pub at: u64,
    /// How many there are.
    pub bytes: u64,
}

/// The tensors that a header of a file of `file_bytes`, its length before it, names, in the order
/// of their bytes; `None` when it is none.
pub fn tensors_of_header(header: &[u8], file_bytes: u64) -> Option<Vec<FileTensor>> {
    let json = header.get(8..)?;
    if header[..8] != (json.len() as u64).to_le_bytes() {
        return None;
    }
    let metadata: Metadata = serde_json::from_slice(json).ok()?;
    let start = header.len() as u64;
    if start.checked_add(metadata.data_len() as u64)? != file_bytes {
        return None;
    }
    let tensors = metadata.tensors();
    let mut tensors: Vec<FileTensor> = tensors
        .into_iter()
        .map(|(name, info)| {
            let (begin, end) = info.data_offsets;
            Some(FileTensor {
                name,
                dtype: info.dtype.to_string(),
                shape: info.shape.clone(),
                at: start.checked_add(begin as u64)?,
                bytes: (end as u64).checked_sub(begin as u64)?,
            })
        })
        .collect::<Option<_>>()?;
    tensors.sort_by(|a, b| (a.at, a.bytes, &a.name).cmp(&(b.at, b.bytes, &b.name)));
    // What is restored is one tensor after the other.
    let mut at = start;
    for tensor in &tensors {
        if tensor.at != at {
            return None;
        }
        at += tensor.bytes;
    }
    (at == file_bytes).then_some(tensors)
}

/// The paths of all files in a folder and those below, `/` between names, in their order.
///
/// A link counts as the file that it leads to.
///
/// # Errors
/// When a folder cannot be read, or holds what is neither a file nor a folder.
pub fn files(dir: &Path) -> Result<Vec<String>> {
    let mut found = Vec::new();
    let mut waiting = vec![(dir.to_owned(), String::new())];
    while let Some((dir, prefix)) = waiting.pop() {
        for entry in std::fs::read_dir(&dir).map_err(Error::io("read", &dir))? {
            let entry = entry.map_err(Error::io("read", &dir))?;
            let path = entry.path();
            let Ok(name) = entry.file_name().into_string() else {
                return Err(Error::NoFile { path });
            };
            let name = format!("{prefix}{name}");
            let kind = entry.file_type().map_err(Error::io("read", &path))?;
            if kind.is_dir() {
                waiting.push((path, format!("{name}/")));
            } else if std::fs::metadata(&path).map_err(Error::io("read", &path))?.is_file() {
                found.push(name);
            } else {
                return Err(Error::NoFile { path });
            }
        }
    }
    found.sort();
    Ok(found)
}

/// A folder whose tensors others are stored against, whatever model it is of.
#[derive(Debug)]
pub struct BaseFolder {
    dir: PathBuf,
    files: Vec<SourceFile>,
    /// By name, the file and the tensor.
    tensors: BTreeMap<String, (usize, FileTensor)>,
}

impl BaseFolder {
    /// Opens the safetensors files of a folder. Of tensors with one name the first counts, in the
    /// order of the paths.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn open(dir: &Path) -> Result<Self> {
        let mut base = Self { dir: dir.to_owned(), files: Vec::new(), tensors: BTreeMap::new() };
        for path in files(dir)?.into_iter().filter(|path| path.ends_with(".safetensors")) {
            let file = SourceFile::open(&dir.join(path))?;
            let Some((_, tensors)) = file.tensors()? else { continue };
            for tensor in tensors {
                let place = (base.files.len(), tensor);
                base.tensors.entry(place.1.name.clone()).or_insert(place);
            }
            base.files.push(file);
        }
        Ok(base)
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What people call it: the folder's own name.
    pub fn name(&self) -> String {
        let path = self.dir.canonicalize().unwrap_or_else(|_| self.dir.clone());
        path.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned())
    }

    /// A tensor by name.
    pub fn tensor(&self, name: &str) -> Option<BaseTensor<'_>> {
        let (file, tensor) = self.tensors.get(name)?;
        Some(BaseTensor { file: &self.files[*file], tensor })
    }
}

/// A tensor of a base.
#[derive(Clone, Copy, Debug)]
pub struct BaseTensor<'a> {
    file: &'a SourceFile,
    tensor: &'a FileTensor,
}

impl<'a> BaseTensor<'a> {
    /// What the header says of it.
    pub fn header(&self) -> &'a FileTensor {
        self.tensor
    }

    /// Reads bytes from `offset` on.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn read(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        self.file.read(self.tensor.at + offset, out)
    }

    /// Its digest, as that of a checkpoint's tensor.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn digest(&self) -> Result<Digest> {
        let shape: Vec<_> = self.tensor.shape.iter().map(usize::to_string).collect();
        let mut hasher = blake3::Hasher::new();
        hasher.update(format!("{} {}\n", self.tensor.dtype, shape.join("x")).as_bytes());
        digest::hash_blocks(hasher, self.tensor.bytes, |offset, block| self.read(offset, block))
    }
}
