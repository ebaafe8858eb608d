use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;
use safetensors::tensor::Metadata;
use safetensors::{SafeTensorError, SafeTensors};

use crate::error::Error;
use crate::map::map;
use crate::{Digest, Result, digest};

/// What a safetensors header says of one tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorHeader {
    /// Element type as named in the header; not every one is a weight's.
    pub dtype: String,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// First byte, from the start of the data.
    begin: usize,
    /// One past the last byte.
    end: usize,
}

impl TensorHeader {
    /// Bytes of the data.
    pub fn size_bytes(&self) -> usize {
        self.end - self.begin
    }

    /// A tensor of this type and another shape in `n_bytes` of this one's data, from
    /// the byte `offset` on.
    pub(crate) fn slice(&self, offset: usize, n_bytes: usize, shape: Vec<usize>) -> Self {
        let begin = self.begin + offset;
        Self { dtype: self.dtype.clone(), shape, begin, end: begin + n_bytes }
    }
}

/// Bytes of a file in memory, which stay mapped for as long as this lives.
#[derive(Clone, Debug)]
pub struct MappedBytes {
    map: Arc<Mmap>,
    range: Range<usize>,
}

impl std::ops::Deref for MappedBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map[self.range.clone()]
    }
}

/// A safetensors file whose header was checked against its length.
#[derive(Debug)]
pub(crate) struct SafetensorsFile {
    pub(crate) path: PathBuf,
    file: File,
    map: Arc<Mmap>,
    data_start: usize,
    pub(crate) tensors: BTreeMap<String, TensorHeader>,
}

impl SafetensorsFile {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io("open", path))?;
        let map = map(&file).map_err(Error::io("map", path))?;
        let (header_bytes, metadata) =
            read_header(&map).map_err(|source| Error::Header { path: path.to_owned(), source })?;
        let tensors = metadata
            .tensors()
            .into_iter()
            .map(|(name, info)| {
                let header = TensorHeader {
                    dtype: info.dtype.to_string(),
                    shape: info.shape.clone(),
                    begin: info.data_offsets.0,
                    end: info.data_offsets.1,
                };
                (name, header)
            })
            .collect();
        let (path, map) = (path.to_owned(), Arc::new(map));
        Ok(Self { path, file, map, data_start: 8 + header_bytes, tensors })
    }

    pub(crate) fn header(&self, name: &str) -> Result<&TensorHeader> {
        self.tensors.get(name).ok_or_else(|| Error::MissingTensor {
            path: self.path.clone(),
            tensor: name.to_owned(),
        })
    }

    /// The mapped bytes of a tensor.
    pub(crate) fn bytes(&self, header: &TensorHeader) -> MappedBytes {
        let range = self.data_start + header.begin..self.data_start + header.end;
        MappedBytes { map: Arc::clone(&self.map), range }
    }

    /// Reads bytes of a tensor from `offset`, without touching the map, so that
    /// they never count as resident.
    pub(crate) fn read(&self, header: &TensorHeader, offset: usize, out: &mut [u8]) -> Result<()> {
        assert!(offset + out.len() <= header.size_bytes(), "reading past a tensor");
        let at = (self.data_start + header.begin + offset) as u64;
        read_exact_at(&self.file, out, at).map_err(Error::io("read", &self.path))
    }
}

/// The length of a file's header and what it says, checked to cover the file.
///
/// `SafeTensors::read_metadata` overflows where tensors end near `usize::MAX`, so
/// it is only asked what is wrong with a header that is refused before that.
fn read_header(file: &[u8]) -> std::result::Result<(usize, Metadata), SafeTensorError> {
    const MAX_HEADER_BYTES: usize = 100_000_000;
    let header = file.split_first_chunk().and_then(|(len, rest)| {
        let len = usize::try_from(u64::from_le_bytes(*len)).ok()?;
        rest.get(..len).filter(|_| len <= MAX_HEADER_BYTES)
    });
    match header.map(|header| (header.len(), serde_json::from_slice::<Metadata>(header))) {
        Some((len, Ok(metadata))) if metadata.data_len() == file.len() - 8 - len => {
            Ok((len, metadata))
        }
        Some((_, Ok(_))) => Err(SafeTensorError::MetadataIncompleteBuffer),
        _ => SafeTensors::read_metadata(file),
    }
}

#[cfg(unix)]
pub(crate) fn read_exact_at(file: &File, out: &mut [u8], at: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, out, at)
}

#[cfg(windows)]
pub(crate) fn read_exact_at(file: &File, mut out: &mut [u8], mut at: u64) -> std::io::Result<()> {
    while !out.is_empty() {
        let n = std::os::windows::fs::FileExt::seek_read(file, out, at)?;
        if n == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        out = &mut out[n..];
        at += n as u64;
    }
    Ok(())
}

/// The digest of a whole file.
pub(crate) fn file_digest(path: &Path) -> Result<Digest> {
    let mut file = File::open(path).map_err(Error::io("open", path))?;
    let len = file.metadata().map_err(Error::io("read", path))?.len();
    digest::hash_blocks(blake3::Hasher::new(), len, |_, block| {
        file.read_exact(block).map_err(Error::io("read", path))
    })
}
