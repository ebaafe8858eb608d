use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;
use onebase_tensor::DType;
use safetensors::SafeTensors;
use safetensors::tensor::{Metadata, TensorInfo};

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
        let (header_bytes, metadata) = SafeTensors::read_metadata(&map)
            .map_err(|source| Error::Header { path: path.to_owned(), source })?;
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

#[cfg(unix)]
fn read_exact_at(file: &File, out: &mut [u8], at: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, out, at)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut out: &mut [u8], mut at: u64) -> std::io::Result<()> {
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

/// Writes a safetensors file tensor by tensor, in bounded memory.
///
/// The header comes first in the file but is known last, so the data goes to a
/// second file beside it until [`TensorWriter::finish`]. Tensors stand in the
/// order in which they were written; the header is padded so that the data
/// starts at a multiple of 64 bytes.
#[derive(Debug)]
pub struct TensorWriter {
    path: PathBuf,
    data_path: PathBuf,
    data: std::io::BufWriter<File>,
    written: usize,
    tensors: Vec<(String, TensorInfo)>,
    open: Option<usize>,
}

impl TensorWriter {
    /// Starts the file `path`.
    ///
    /// # Errors
    /// When it cannot be created.
    pub fn create(path: &Path) -> Result<Self> {
        let mut data_path = path.as_os_str().to_owned();
        data_path.push(".data");
        let data_path = PathBuf::from(data_path);
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&data_path)
            .map_err(Error::io("create", &data_path))?;
        Ok(Self {
            path: path.to_owned(),
            data_path,
            data: std::io::BufWriter::with_capacity(1 << 20, file),
            written: 0,
            tensors: Vec::new(),
            open: None,
        })
    }

    /// Bytes of data so far.
    pub fn size_bytes(&self) -> usize {
        self.written
    }

    /// Whether no tensor was begun.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// Begins a tensor whose data follows by [`TensorWriter::write`].
    ///
    /// Panics when the one before it is incomplete.
    pub fn begin(&mut self, name: &str, dtype: DType, shape: &[usize]) {
        self.end();
        let count: usize = shape.iter().product();
        let info = TensorInfo {
            dtype: match dtype {
                DType::U8 => safetensors::Dtype::U8,
                DType::F16 => safetensors::Dtype::F16,
                DType::BF16 => safetensors::Dtype::BF16,
                DType::F32 => safetensors::Dtype::F32,
            },
            shape: shape.to_vec(),
            data_offsets: (self.written, self.written + count * dtype.size_bytes()),
        };
        self.open = Some(info.data_offsets.1);
        self.tensors.push((name.to_owned(), info));
    }

    /// Appends data of the tensor that was begun.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        assert!(self.open.is_some_and(|end| self.written + bytes.len() <= end), "too much data");
        self.data.write_all(bytes).map_err(Error::io("write", &self.data_path))?;
        self.written += bytes.len();
        Ok(())
    }

    fn end(&mut self) {
        if let Some(end) = self.open.take() {
            assert_eq!(self.written, end, "data of {:?}", self.tensors.last().map(|t| &t.0));
        }
    }

    /// Writes the header before the data and closes the file; gives its length
    /// and digest.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn finish(mut self) -> Result<(u64, Digest)> {
        self.end();
        let format = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        let metadata = Metadata::new(Some(format), self.tensors)
            .map_err(|source| Error::Header { path: self.path.clone(), source })?;
        let mut header = serde_json::to_vec(&metadata)
            .map_err(|source| Error::Json { path: self.path.clone(), source })?;
        header.resize((8 + header.len()).next_multiple_of(64) - 8, b' ');

        self.data.flush().map_err(Error::io("write", &self.data_path))?;
        let mut data = self
            .data
            .into_inner()
            .map_err(|e| Error::io("write", &self.data_path)(e.into_error()))?;
        data.rewind().map_err(Error::io("read", &self.data_path))?;

        let mut out = File::create_new(&self.path).map_err(Error::io("create", &self.path))?;
        let mut hasher = blake3::Hasher::new();
        let mut append = |bytes: &[u8]| {
            hasher.update_rayon(bytes);
            out.write_all(bytes).map_err(Error::io("write", &self.path))
        };
        append(&(header.len() as u64).to_le_bytes())?;
        append(&header)?;
        let mut block = vec![0; 1 << 20];
        loop {
            let n = data.read(&mut block).map_err(Error::io("read", &self.data_path))?;
            if n == 0 {
                break;
            }
            append(&block[..n])?;
        }
        out.sync_all().map_err(Error::io("write", &self.path))?;
        drop(data);
        std::fs::remove_file(&self.data_path).map_err(Error::io("remove", &self.data_path))?;
        Ok(((8 + header.len() + self.written) as u64, Digest::finish(&hasher)))
    }
}

/// The digest of a whole file.
pub(crate) fn file_digest(path: &Path) -> Result<Digest> {
    let mut file = File::open(path).map_err(Error::io("open", path))?;
    let len = file.metadata().map_err(Error::io("read", path))?.len();
    digest::hash_blocks(blake3::Hasher::new(), len, |_, block| {
        file.read_exact(block).map_err(Error::io("read", path))
    })
}
