use std::path::Path;

use onebase_codec::lossless::{Base, Element, encode};
use onebase_format::Sha256;
use onebase_format::archive::{
    ArchiveWriter, BaseFolder, BaseOfTensor, Compression, DataWriter, FileRecord, FileStorage,
    FileTensor, SourceFile, TensorStorage, files,
};
use serde::Serialize;
use sha2::Digest as _;

use super::{COPY_BYTES, PART_BYTES, parts};
use crate::compress::TOOL;
use crate::{Progress, Result};

/// Files up to this length are compressed as well as can be, longer ones fast.
const SMALL_BYTES: u64 = 16 << 20;
const BEST_LEVEL: i32 = 19;
const FAST_LEVEL: i32 = 3;

/// What an archive has become.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ArchiveReport {
    /// Files of the fine-tune's folder.
    pub n_files: usize,
    /// Their bytes.
    pub bytes: u64,
    /// Bytes of the archive.
    pub archive_bytes: u64,
    /// Tensors that are stored against a base, in part or as a whole.
    pub n_with_base: usize,
    /// Tensors that are stored alone.
    pub n_alone: usize,
    /// Files that an earlier process had done.
    pub n_resumed: usize,
}

/// Stores every file of the folder `fine_tune` in the archive `target`, which must not exist,
/// tensors against those of the same name in the folder `base`.
///
/// Any folders will do: what is no safetensors file is compressed as a whole. A run that was
/// killed goes on with the files that it had done, where they and their base are still the same.
///
/// # Errors
/// When a folder cannot be read or the archive cannot be written; nothing is left under its
/// name then.
pub fn archive(
    base: &Path,
    fine_tune: &Path,
    target: &Path,
    progress: &dyn Progress,
) -> Result<ArchiveReport> {
    let mut writer = ArchiveWriter::create(target, TOOL)?;
    let paths = files(fine_tune)?;
    let base = BaseFolder::open(base)?;
    let mut report = ArchiveReport { n_files: paths.len(), ..ArchiveReport::default() };
    let mut sources = Vec::new();
    for path in &paths {
        sources.push(std::fs::metadata(fine_tune.join(path)).map_or(0, |file| file.len()));
    }
    progress.begin(sources.iter().sum());
    let mut records = Vec::new();
    for (number, path) in (1..).zip(&paths) {
        progress.tensor(path);
        let file = SourceFile::open(&fine_tune.join(path))?;
        let earlier = writer.earlier(number, path, file.bytes())?;
        let record = match earlier {
            Some(record) if is_still(&record, &file, &base)? => {
                progress.advance(file.bytes());
                report.n_resumed += 1;
                record
            }
            _ => store(&file, path, number, &base, &writer, progress)?,
        };
        writer.done(&record)?;
        report.bytes += record.bytes;
        if let FileStorage::Tensors { tensors, .. } = &record.storage {
            let with = tensors.iter().filter(|tensor| tensor.base.is_some()).count();
            report.n_with_base += with;
            report.n_alone += tensors.len() - with;
        }
        records.push(record);
    }
    writer.finish(base.name(), BaseFolder::open(fine_tune)?.name(), records)?;
    report.archive_bytes = onebase_format::archive::Archive::open(target)?.size_bytes()?;
    Ok(report)
}

/// Whether a file and its base are what they were when the record was made.
fn is_still(record: &FileRecord, file: &SourceFile, base: &BaseFolder) -> Result<bool> {
    if let FileStorage::Tensors { tensors, .. } = &record.storage {
        for tensor in tensors {
            let Some(expected) = &tensor.base else { continue };
            let got = base.tensor(&tensor.name).map(|base| base.digest()).transpose()?;
            if got != Some(expected.blake3) {
                return Ok(false);
            }
        }
    }
    Ok(sha256_of(file)? == record.sha256)
}

fn sha256_of(file: &SourceFile) -> Result<Sha256> {
    let mut hasher = sha2::Sha256::new();
    for_each_block(file, |block| {
        hasher.update(block);
        Ok(())
    })?;
    Ok(Sha256::finish(hasher))
}

/// Reads a file block by block.
pub(super) fn for_each_block(
    file: &SourceFile,
    mut each: impl FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    let mut block = vec![0; COPY_BYTES];
    let mut at = 0;
    while at < file.bytes() {
        // At most a block.
        #[allow(clippy::cast_possible_truncation)]
        let block = &mut block[..(file.bytes() - at).min(COPY_BYTES as u64) as usize];
        file.read(at, block)?;
        each(block)?;
        at += block.len() as u64;
    }
    Ok(())
}

/// Stores a file in the best way there is for it.
fn store(
    file: &SourceFile,
    path: &str,
    number: usize,
    base: &BaseFolder,
    writer: &ArchiveWriter,
    progress: &dyn Progress,
) -> Result<FileRecord> {
    let record = |sha256: Sha256, storage: FileStorage| FileRecord {
        path: path.to_owned(),
        bytes: file.bytes(),
        sha256,
        storage,
    };
    let of_base = base.dir().join(path);
    if of_base.is_file() {
        let of_base = SourceFile::open(&of_base)?;
        if of_base.bytes() == file.bytes() && is_same(&of_base, file)? {
            progress.advance(file.bytes());
            return Ok(record(sha256_of(file)?, FileStorage::Base));
        }
    }
    let mut data = writer.data(number)?;
    let mut hasher = sha2::Sha256::new();
    let Some((header, tensors)) = file.tensors()? else {
        let compression = store_whole(file, &mut data, &mut hasher, progress)?;
        let (file, stored_bytes, blake3) = data.finish()?;
        let storage = FileStorage::Whole { file, stored_bytes, blake3, compression };
        return Ok(record(Sha256::finish(hasher), storage));
    };
    hasher.update(&header);
    let compressed = zstd::bulk::compress(&header, BEST_LEVEL)
        .map_err(|source| io("compress", file.path(), source))?;
    data.write(&compressed)?;
    progress.advance(header.len() as u64);
    let mut stored = Vec::new();
    for tensor in &tensors {
        progress.tensor(&tensor.name);
        stored.push(store_tensor(file, tensor, base, &mut data, &mut hasher, progress)?);
    }
    let header_bytes = compressed.len() as u64;
    let (file, stored_bytes, blake3) = data.finish()?;
    let storage =
        FileStorage::Tensors { file, stored_bytes, blake3, header_bytes, tensors: stored };
    Ok(record(Sha256::finish(hasher), storage))
}

/// Whether two files of one length are the same; stops at the first difference.
fn is_same(a: &SourceFile, b: &SourceFile) -> Result<bool> {
    let mut blocks = [vec![0; COPY_BYTES], vec![0; COPY_BYTES]];
    let mut at = 0;
    while at < a.bytes() {
        // At most a block.
        #[allow(clippy::cast_possible_truncation)]
        let len = (a.bytes() - at).min(COPY_BYTES as u64) as usize;
        for (file, block) in [a, b].into_iter().zip(&mut blocks) {
            file.read(at, &mut block[..len])?;
        }
        if blocks[0][..len] != blocks[1][..len] {
            return Ok(false);
        }
        at += len as u64;
    }
    Ok(true)
}

pub(super) fn io(
    action: &'static str,
    path: &Path,
    source: std::io::Error,
) -> onebase_format::Error {
    onebase_format::Error::Io { action, path: path.to_owned(), source }
}

/// Stores all bytes of a file, compressed.
fn store_whole(
    file: &SourceFile,
    data: &mut DataWriter,
    hasher: &mut sha2::Sha256,
    progress: &dyn Progress,
) -> Result<Compression> {
    let level = if file.bytes() <= SMALL_BYTES { BEST_LEVEL } else { FAST_LEVEL };
    let failed = |source| io("compress", file.path(), source);
    let mut encoder = zstd::Encoder::new(data, level).map_err(failed)?;
    for_each_block(file, |block| {
        hasher.update(block);
        std::io::Write::write_all(&mut encoder, block).map_err(failed)?;
        progress.advance(block.len() as u64);
        Ok(())
    })?;
    encoder.finish().map_err(failed)?;
    Ok(Compression::Zstd)
}

/// Stores a tensor against the base's one of its name, where that has the same shape or another
/// number of rows alone.
fn store_tensor(
    file: &SourceFile,
    tensor: &FileTensor,
    base: &BaseFolder,
    data: &mut DataWriter,
    hasher: &mut sha2::Sha256,
    progress: &dyn Progress,
) -> Result<TensorStorage> {
    let element = Element::of_dtype(&tensor.dtype);
    let based = base.tensor(&tensor.name).filter(|base| {
        let base = base.header();
        let like = Element::of_dtype(&base.dtype).is_base_of(element)
            && (base.dtype == tensor.dtype || element != Element::Int8);
        like && base.shape.get(1..) == tensor.shape.get(1..)
    });
    let count =
        |tensor: &FileTensor| tensor.bytes / Element::of_dtype(&tensor.dtype).size_bytes() as u64;
    let elements = based.map_or(0, |base| count(base.header()).min(count(tensor)));
    let (mut tune, mut under) = (Vec::new(), Vec::new());
    let mut lengths = Vec::new();
    for part in parts(tensor, element, elements).into_iter().flatten() {
        resize(&mut tune, part.bytes);
        file.read(tensor.at + part.at, &mut tune)?;
        let base = match based.filter(|_| part.has_base) {
            Some(base) => {
                let of_base = Element::of_dtype(&base.header().dtype);
                let (size, base_size) = (element.size_bytes(), of_base.size_bytes());
                resize(&mut under, part.bytes / size as u64 * base_size as u64);
                base.read(part.at / size as u64 * base_size as u64, &mut under)?;
                Some(Base { element: of_base, bytes: &under })
            }
            None => None,
        };
        let (coded, ()) = rayon::join(|| encode(element, &tune, base), || hasher.update(&tune));
        data.write(&coded)?;
        lengths.push(coded.len() as u64);
        progress.advance(part.bytes);
    }
    let based = based.filter(|_| elements > 0);
    let base = based
        .map(|base| -> Result<BaseOfTensor> {
            Ok(BaseOfTensor { blake3: base.digest()?, elements })
        })
        .transpose()?;
    Ok(TensorStorage { name: tensor.name.clone(), base, parts: lengths })
}

/// Makes a buffer as long as a part.
pub(super) fn resize(buffer: &mut Vec<u8>, bytes: u64) {
    debug_assert!(bytes <= 8 * PART_BYTES, "parts are bounded");
    // Bounded by a part, and by eight times that where the base has wider elements.
    #[allow(clippy::cast_possible_truncation)]
    buffer.resize(bytes as usize, 0);
}
