use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use onebase_codec::lossless::{Base, Element, decode};
use onebase_format::archive::{
    Archive, BaseFolder, Compression, FileRecord, FileStorage, FileTensor, SourceFile,
    TensorStorage, tensors_of_header,
};
use onebase_format::{Error as FormatError, Sha256, StagedFolder};
use rayon::prelude::*;
use sha2::Digest as _;

use super::write::{for_each_block, io, resize};
use super::{COPY_BYTES, MAX_HEADER_BYTES, PART_BYTES, parts};
use crate::{Error, Progress, Result};

/// Writes every file of an archived fine-tune into the folder `target`, which must not exist.
///
/// Each file's SHA-256 is compared before the folder gets its name.
///
/// # Errors
/// When the base is another one (the error names the tensor or the file), the archive is
/// damaged (tensor and block), or a file cannot be written; nothing is left under the folder's
/// name then.
pub fn restore_archive(
    base: &BaseFolder,
    archive: &Archive,
    target: &Path,
    progress: &dyn Progress,
) -> Result<()> {
    let folder = StagedFolder::create(target)?;
    read(base, archive, progress, |path| {
        let path = folder.path(path);
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).map_err(|source| io("create", parent, source))?;
        }
        let file = File::create_new(&path).map_err(|source| io("create", &path, source))?;
        Ok(Output::new(path, Some(file)))
    })?;
    Ok(folder.commit()?)
}

/// Decodes every file of an archive and compares its SHA-256, without writing it.
///
/// # Errors
/// As [`restore_archive`].
pub fn verify_archive(base: &BaseFolder, archive: &Archive, progress: &dyn Progress) -> Result<()> {
    read(base, archive, progress, |path| Ok(Output::new(archive.dir().join(path), None)))
}

/// A file that comes out, written or not.
struct Output {
    path: PathBuf,
    file: Option<File>,
    hasher: sha2::Sha256,
    bytes: u64,
    /// The last bytes, which are neither hashed nor written yet.
    waiting: Vec<u8>,
}

impl Output {
    fn new(path: PathBuf, file: Option<File>) -> Self {
        Self { path, file, hasher: sha2::Sha256::new(), bytes: 0, waiting: Vec::new() }
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.write_waiting()?;
        self.append(bytes)
    }

    /// Takes bytes that are to be hashed and written beside what comes next, and gives the
    /// memory of earlier ones for them.
    fn write_later(&mut self, bytes: &mut Vec<u8>) -> Result<()> {
        self.write_waiting()?;
        std::mem::swap(&mut self.waiting, bytes);
        Ok(())
    }

    fn write_waiting(&mut self) -> Result<()> {
        let mut waiting = std::mem::take(&mut self.waiting);
        let written = self.append(&waiting);
        waiting.clear();
        self.waiting = waiting;
        written
    }

    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.hasher.update(bytes);
        self.bytes += bytes.len() as u64;
        if let Some(file) = &mut self.file {
            file.write_all(bytes).map_err(|source| io("write", &self.path, source))?;
        }
        Ok(())
    }

    /// Compares what was written with what should have been.
    fn finish(mut self, record: &FileRecord) -> Result<()> {
        self.write_waiting()?;
        if let Some(file) = &self.file {
            file.sync_all().map_err(|source| io("write", &self.path, source))?;
        }
        let got = Sha256::finish(self.hasher);
        if got != record.sha256 || self.bytes != record.bytes {
            let expected = record.sha256.clone();
            return Err(FormatError::OtherContents { path: self.path, expected, got }.into());
        }
        Ok(())
    }
}

fn read(
    base: &BaseFolder,
    archive: &Archive,
    progress: &dyn Progress,
    open: impl Fn(&str) -> Result<Output>,
) -> Result<()> {
    check_base(base, archive)?;
    let records = &archive.manifest().files;
    progress.begin(records.iter().fold(0, |sum: u64, r| sum.saturating_add(r.bytes)));
    for record in records {
        progress.tensor(&record.path);
        let mut out = open(&record.path)?;
        match &record.storage {
            FileStorage::Base => {
                let path = base.dir().join(&record.path);
                if path.is_file() {
                    copy(&SourceFile::open(&path)?, &mut out, progress)?;
                }
                // The file to look at is the base's.
                out.path = path;
            }
            FileStorage::Whole { file, compression, .. } => {
                let file = SourceFile::open(&archive.dir().join(file))?;
                match compression {
                    Compression::None => copy(&file, &mut out, progress)?,
                    Compression::Zstd => unpack(&file, record, &mut out, progress)?,
                }
            }
            FileStorage::Tensors { file, header_bytes, tensors, .. } => {
                let file = SourceFile::open(&archive.dir().join(file))?;
                let input = Input { base, archive, record, file };
                input.read_tensors(*header_bytes, tensors, &mut out, progress)?;
            }
        }
        out.finish(record)?;
    }
    Ok(())
}

/// Compares the digest of every tensor of the base that the archive names.
fn check_base(base: &BaseFolder, archive: &Archive) -> Result<()> {
    let storages = archive.manifest().files.iter().filter_map(|record| match &record.storage {
        FileStorage::Tensors { tensors, .. } => Some(tensors),
        _ => None,
    });
    let named: Vec<_> = storages
        .flatten()
        .filter_map(|tensor| Some((tensor.name.as_str(), tensor.base.as_ref()?.blake3)))
        .collect();
    let checked: Vec<Result<()>> = named
        .par_iter()
        .map(|(name, expected)| {
            let Some(tensor) = base.tensor(name) else {
                let (path, tensor) = (base.dir().to_owned(), (*name).to_owned());
                return Err(FormatError::MissingTensor { path, tensor }.into());
            };
            let (got, expected) = (tensor.digest()?, *expected);
            if got == expected {
                return Ok(());
            }
            let (archive, base) = (archive.dir().to_owned(), base.dir().to_owned());
            let tensor = (*name).to_owned();
            Err(FormatError::OtherBase { artifact: archive, base, tensor, expected, got }.into())
        })
        .collect();
    checked.into_iter().collect()
}

fn copy(file: &SourceFile, out: &mut Output, progress: &dyn Progress) -> Result<()> {
    for_each_block(file, |block| {
        out.write(block)?;
        progress.advance(block.len() as u64);
        Ok(())
    })
}

/// Decompresses a file, up to the length that it should have.
fn unpack(
    file: &SourceFile,
    record: &FileRecord,
    out: &mut Output,
    progress: &dyn Progress,
) -> Result<()> {
    let failed = |source| io("decompress", file.path(), source);
    let input = File::open(file.path()).map_err(|source| io("open", file.path(), source))?;
    let mut decoder = zstd::Decoder::new(input).map_err(failed)?;
    let mut block = vec![0; COPY_BYTES];
    // One byte more than it should have is enough to be refused.
    while out.bytes <= record.bytes {
        let n = decoder.read(&mut block).map_err(failed)?;
        if n == 0 {
            break;
        }
        out.write(&block[..n])?;
        progress.advance(n as u64);
    }
    Ok(())
}

/// A stored safetensors file.
struct Input<'a> {
    base: &'a BaseFolder,
    archive: &'a Archive,
    record: &'a FileRecord,
    file: SourceFile,
}

impl Input<'_> {
    fn manifest_error(&self, problem: &str) -> Error {
        Error::Format(FormatError::Manifest {
            path: self.archive.dir().join(onebase_format::archive::ARCHIVE_FILE),
            entry: self.record.path.clone(),
            problem: problem.to_owned(),
        })
    }

    fn read_tensors(
        &self,
        header_bytes: u64,
        stored: &[TensorStorage],
        out: &mut Output,
        progress: &dyn Progress,
    ) -> Result<()> {
        let header = self.header(header_bytes)?;
        let Some(tensors) = tensors_of_header(&header, self.record.bytes) else {
            return Err(self.manifest_error("its header is damaged"));
        };
        if !tensors.iter().map(|t| &t.name).eq(stored.iter().map(|t| &t.name)) {
            return Err(self.manifest_error("its header has other tensors"));
        }
        out.write(&header)?;
        progress.advance(header.len() as u64);
        let mut at = header_bytes;
        for (tensor, stored) in tensors.iter().zip(stored) {
            progress.tensor(&tensor.name);
            self.read_tensor(tensor, stored, &mut at, out, progress)?;
        }
        Ok(())
    }

    fn header(&self, header_bytes: u64) -> Result<Vec<u8>> {
        let failed = |source| io("decompress", self.file.path(), source);
        let mut compressed = Vec::new();
        if header_bytes > MAX_HEADER_BYTES {
            return Err(self.manifest_error("its header is too long"));
        }
        // At most the longest header.
        #[allow(clippy::cast_possible_truncation)]
        compressed.resize(header_bytes as usize, 0);
        self.file.read(0, &mut compressed)?;
        let decoder = zstd::Decoder::new(compressed.as_slice()).map_err(failed)?;
        let mut header = Vec::new();
        let most = MAX_HEADER_BYTES.min(self.record.bytes);
        decoder.take(most).read_to_end(&mut header).map_err(failed)?;
        Ok(header)
    }

    fn read_tensor(
        &self,
        tensor: &FileTensor,
        stored: &TensorStorage,
        at: &mut u64,
        out: &mut Output,
        progress: &dyn Progress,
    ) -> Result<()> {
        let element = Element::of_dtype(&tensor.dtype);
        let size = element.size_bytes() as u64;
        let based = stored.base.as_ref().map_or(0, |base| base.elements);
        let base = self.base.tensor(&tensor.name).filter(|_| based > 0);
        let of_base = base.map(|base| Element::of_dtype(&base.header().dtype));
        if let (Some(base), Some(of_base)) = (base, of_base) {
            let held = base.header().bytes / of_base.size_bytes() as u64;
            if held < based || !of_base.is_base_of(element) {
                return Err(self.manifest_error("the base has fewer elements, or of other types"));
            }
        }
        let n_parts = stored.parts.len();
        let parts = parts(tensor, element, based)
            .filter(|parts| parts.clone().take(n_parts + 1).count() == n_parts)
            .filter(|_| tensor.bytes.is_multiple_of(size));
        let Some(parts) = parts else {
            return Err(self.manifest_error("a tensor has other parts than its length asks for"));
        };
        let (mut coded, mut under, mut tune) = (Vec::new(), Vec::new(), Vec::new());
        for (part, bytes) in parts.zip(&stored.parts) {
            // Plain blocks with what is said of them are not much longer.
            if *bytes > 2 * PART_BYTES {
                return Err(self.manifest_error("a part is longer than what it decodes to"));
            }
            let read_and_decode = || {
                resize(&mut coded, *bytes);
                self.file.read(*at, &mut coded)?;
                resize(&mut tune, part.bytes);
                let base = match base.zip(of_base).filter(|_| part.has_base) {
                    Some((base, of_base)) => {
                        let base_size = of_base.size_bytes() as u64;
                        resize(&mut under, part.bytes / size * base_size);
                        base.read(part.at / size * base_size, &mut under)?;
                        Some(Base { element: of_base, bytes: &under })
                    }
                    None => None,
                };
                decode(element, &coded, base, &mut tune).map_err(|source| Error::Lossless {
                    path: self.file.path().to_owned(),
                    tensor: tensor.name.clone(),
                    at: part.at,
                    source,
                })
            };
            // SHA-256 is a chain that threads cannot share: it is done beside what comes next.
            let (decoded, written) = rayon::join(read_and_decode, || out.write_waiting());
            written.and(decoded)?;
            out.write_later(&mut tune)?;
            *at += bytes;
            progress.advance(part.bytes);
        }
        Ok(())
    }
}
