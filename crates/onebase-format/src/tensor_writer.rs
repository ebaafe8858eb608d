use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use onebase_tensor::DType;
use safetensors::tensor::{Metadata, TensorInfo};
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::{Digest, Result};

/// Bytes above which hashing is worth a second thread.
const WORTH_A_THREAD: usize = 1 << 18;

/// A tensor that a file will hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorEntry {
    /// Its name.
    pub name: String,
    /// Its element type.
    #[serde(with = "by_name")]
    pub dtype: DType,
    /// Its shape, outermost dimension first.
    pub shape: Vec<usize>,
}

impl TensorEntry {
    /// Bytes of its data.
    pub fn size_bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.size_bytes()
    }
}

/// Writes a safetensors file once, front to back: the header from a list of
/// tensors, then their data in that order.
///
/// The header is padded so that the data starts at a multiple of 64 bytes.
#[derive(Debug)]
pub struct TensorWriter {
    path: PathBuf,
    file: std::io::BufWriter<File>,
    hasher: blake3::Hasher,
    written_bytes: u64,
    total_bytes: u64,
}

impl TensorWriter {
    /// Creates the file `path`, which must not exist, with its header.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn create(path: &Path, tensors: &[TensorEntry]) -> Result<Self> {
        let header =
            header(tensors).map_err(|source| Error::Header { path: path.to_owned(), source })?;
        let total_bytes = tensor_file_bytes(path, tensors)?;
        let file = File::create_new(path).map_err(Error::io("create", path))?;
        let mut writer = Self {
            path: path.to_owned(),
            file: std::io::BufWriter::with_capacity(1 << 20, file),
            hasher: blake3::Hasher::new(),
            written_bytes: 0,
            total_bytes,
        };
        writer.write(&header)?;
        Ok(writer)
    }

    /// Appends data.
    ///
    /// Panics when it is more than the tensors hold.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.written_bytes += bytes.len() as u64;
        assert!(self.written_bytes <= self.total_bytes, "more data than the tensors hold");
        if bytes.len() < WORTH_A_THREAD {
            self.hasher.update(bytes);
        } else {
            self.hasher.update_rayon(bytes);
        }
        self.file.write_all(bytes).map_err(Error::io("write", &self.path))
    }

    /// Completes the file; gives its length and digest.
    ///
    /// Panics when data is missing.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn finish(self) -> Result<(u64, Digest)> {
        assert_eq!(self.written_bytes, self.total_bytes, "data of {}", self.path.display());
        let io = Error::io("write", &self.path);
        let file = match self.file.into_inner() {
            Ok(file) => file,
            Err(e) => return Err(io(e.into_error())),
        };
        file.sync_all().map_err(io)?;
        Ok((self.total_bytes, Digest::finish(&self.hasher)))
    }
}

/// The bytes of a file with these tensors; `path` is for what is said of it.
///
/// # Errors
/// When they do not fit a file.
pub fn tensor_file_bytes(path: &Path, tensors: &[TensorEntry]) -> Result<u64> {
    let header =
        header(tensors).map_err(|source| Error::Header { path: path.to_owned(), source })?;
    let data: usize = tensors.iter().map(TensorEntry::size_bytes).sum();
    Ok((header.len() + data) as u64)
}

/// What stands before the data of a file: the header's length, the header and its padding.
pub(crate) fn header(tensors: &[TensorEntry]) -> Result<Vec<u8>, safetensors::SafeTensorError> {
    let mut end = 0;
    let infos = tensors.iter().map(|tensor| {
        let begin = end;
        end += tensor.size_bytes();
        let dtype = match tensor.dtype {
            DType::U8 => safetensors::Dtype::U8,
            DType::F16 => safetensors::Dtype::F16,
            DType::BF16 => safetensors::Dtype::BF16,
            DType::F32 => safetensors::Dtype::F32,
        };
        let shape = tensor.shape.clone();
        (tensor.name.clone(), TensorInfo { dtype, shape, data_offsets: (begin, end) })
    });
    let infos = infos.collect();
    let format = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let json = serde_json::to_vec(&Metadata::new(Some(format), infos)?)?;
    let padded = (8 + json.len()).next_multiple_of(64);
    let mut header = ((padded - 8) as u64).to_le_bytes().to_vec();
    header.extend(json);
    header.resize(padded, b' ');
    Ok(header)
}

/// Element types as safetensors headers name them.
mod by_name {
    use onebase_tensor::DType;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(dtype: &DType, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(dtype.name())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<DType, D::Error> {
        String::deserialize(from)?.parse().map_err(Error::custom)
    }
}
