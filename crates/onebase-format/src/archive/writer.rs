use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::manifest::{ARCHIVE_FILE, ArchiveManifest, FORMAT, FileRecord, VERSION};
use crate::error::Error;
use crate::safetensors_file::file_digest;
use crate::{Digest, Result, StagedFolder, write_file};

/// What files are done, a line each; the first line names who wrote them.
const JOURNAL_FILE: &str = "journal.jsonl";

/// Bytes above which hashing is worth a second thread.
const WORTH_A_THREAD: usize = 1 << 18;

/// Writes an archive file by file. What a killed process has done of it is there for the
/// next one.
#[derive(Debug)]
pub struct ArchiveWriter {
    folder: StagedFolder,
    journal: File,
    tool: String,
    /// What an earlier process has done.
    earlier: Vec<FileRecord>,
}

impl ArchiveWriter {
    /// Prepares to write `target`, which must not exist; `tool` is program and version.
    ///
    /// # Errors
    /// When it exists, another process is writing it, or it cannot be written.
    pub fn create(target: &Path, tool: &str) -> Result<Self> {
        let first = format!("{}\n", json!({ "format": FORMAT, "version": VERSION, "tool": tool }));
        let mut folder = StagedFolder::resume(target)?;
        let path = folder.path(JOURNAL_FILE);
        let text = std::fs::read(&path).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let earlier: Vec<FileRecord> = match text.strip_prefix(&first) {
            Some(lines) => {
                // The last line may be half of one.
                let whole = lines.split_inclusive('\n').filter(|line| line.ends_with('\n'));
                whole.map_while(|line| serde_json::from_str(line).ok()).collect()
            }
            None => {
                drop(folder);
                folder = StagedFolder::create(target)?;
                Vec::new()
            }
        };
        let mut text = first;
        for record in &earlier {
            let line = serde_json::to_string(record);
            text += &line.map_err(|source| Error::Json { path: path.clone(), source })?;
            text.push('\n');
        }
        write_file(&path, text.as_bytes())?;
        let journal = File::options().append(true).open(&path);
        let journal = journal.map_err(Error::io("open", &path))?;
        Ok(Self { folder, journal, tool: tool.to_owned(), earlier })
    }

    /// What an earlier process has stored under a number of a file of this path and length, if
    /// its bytes are there; whether the file is the same is for the caller to see.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn earlier(&self, number: usize, path: &str, bytes: u64) -> Result<Option<FileRecord>> {
        // A file may have been stored anew.
        let found = self.earlier.iter().rfind(|r| r.path == path && r.bytes == bytes);
        let Some(record) = found else { return Ok(None) };
        let Some((file, len, digest)) = record.storage.data() else { return Ok(None) };
        // Another file has that number now, and would be written over it.
        if file != data_name(number) {
            return Ok(None);
        }
        let file = self.folder.path(file);
        let whole = std::fs::metadata(&file).is_ok_and(|data| data.len() == len)
            && file_digest(&file)? == digest;
        Ok(whole.then(|| record.clone()))
    }

    /// Begins the archive's file with this number, from 1 on.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn data(&self, number: usize) -> Result<DataWriter> {
        let name = data_name(number);
        let path = self.folder.path(&name);
        let file = File::create(&path).map_err(Error::io("create", &path))?;
        Ok(DataWriter { name, path, file, hasher: blake3::Hasher::new(), bytes: 0 })
    }

    /// Notes that a file is done.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn done(&mut self, record: &FileRecord) -> Result<()> {
        if self.earlier.contains(record) {
            return Ok(());
        }
        let path = self.folder.path(JOURNAL_FILE);
        let line = serde_json::to_string(record)
            .map_err(|source| Error::Json { path: path.clone(), source })?;
        let written = self.journal.write_all(format!("{line}\n").as_bytes());
        written.and_then(|()| self.journal.sync_data()).map_err(Error::io("write", &path))
    }

    /// Writes the manifest and gives the folder its name.
    ///
    /// # Errors
    /// When that is not possible.
    pub fn finish(self, base: String, fine_tune: String, files: Vec<FileRecord>) -> Result<()> {
        let format = FORMAT.to_owned();
        let tool = self.tool;
        let manifest = ArchiveManifest { format, version: VERSION, tool, base, fine_tune, files };
        let path = self.folder.path(ARCHIVE_FILE);
        let text = serde_json::to_string_pretty(&manifest)
            .map_err(|source| Error::Json { path: path.clone(), source })?;
        // What an earlier process has left that is no part of this archive.
        let named = manifest.files.iter().filter_map(|record| record.storage.data());
        let named: Vec<&str> = named.map(|(file, ..)| file).collect();
        self.folder.keep_only(|name| name == JOURNAL_FILE || named.contains(&name))?;
        self.folder.write(ARCHIVE_FILE, format!("{text}\n").as_bytes())?;
        drop(self.journal);
        let journal = self.folder.path(JOURNAL_FILE);
        std::fs::remove_file(&journal).map_err(Error::io("remove", &journal))?;
        self.folder.commit()
    }
}

/// What the archive's file with a number is called.
fn data_name(number: usize) -> String {
    format!("file-{number:05}.bin")
}

/// Writes one file of an archive, front to back.
#[derive(Debug)]
pub struct DataWriter {
    name: String,
    path: PathBuf,
    file: File,
    hasher: blake3::Hasher,
    bytes: u64,
}

impl DataWriter {
    /// Appends bytes.
    ///
    /// # Errors
    /// When they cannot be written.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        if bytes.len() < WORTH_A_THREAD {
            self.hasher.update(bytes);
        } else {
            self.hasher.update_rayon(bytes);
        }
        self.bytes += bytes.len() as u64;
        self.file.write_all(bytes).map_err(Error::io("write", &self.path))
    }

    /// Completes it; gives its name, length and digest.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn finish(self) -> Result<(String, u64, Digest)> {
        self.file.sync_all().map_err(Error::io("write", &self.path))?;
        Ok((self.name, self.bytes, Digest::finish(&self.hasher)))
    }
}

impl Write for DataWriter {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        match DataWriter::write(self, bytes) {
            Ok(()) => Ok(bytes.len()),
            Err(Error::Io { source, .. }) => Err(source),
            Err(other) => Err(std::io::Error::other(other)),
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
