use std::fs::File;
use std::path::{Path, PathBuf};

use crate::Result;
use crate::error::Error;

const LOCK: &str = ".lock";

/// The right to write in a folder, for as long as it lives; the system takes it back
/// from a process that ends.
#[derive(Debug)]
pub(crate) struct Lock {
    _file: File,
}

impl Lock {
    /// Takes it for the folder `dir`, in which `target` is being made.
    ///
    /// # Errors
    /// When another process has it.
    pub(crate) fn take(dir: &Path, target: &Path) -> Result<Self> {
        let path = dir.join(LOCK);
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(Error::io("create", &path))?;
        match file.try_lock() {
            Ok(()) => Ok(Self { _file: file }),
            Err(std::fs::TryLockError::WouldBlock) => Err(Error::Busy { path: target.to_owned() }),
            Err(std::fs::TryLockError::Error(e)) => Err(Error::io("lock", &path)(e)),
        }
    }
}

/// A folder that appears under its name only when it is complete.
///
/// Files are written to `.NAME.partial` beside it, which [`StagedFolder::commit`]
/// renames. Dropped before that, it is removed; what a killed process left is
/// removed by the next one that writes the same folder.
#[derive(Debug)]
pub struct StagedFolder {
    target: PathBuf,
    staging: PathBuf,
    /// Held for as long as this process writes.
    lock: Option<Lock>,
}

impl StagedFolder {
    /// Prepares to write `target`, which must not exist.
    ///
    /// # Errors
    /// When it exists, another process is writing it, or the folder around it
    /// cannot be written.
    pub fn create(target: &Path) -> Result<Self> {
        let folder = Self::resume(target)?;
        folder.keep_only(|_| false)?;
        Ok(folder)
    }

    /// Removes everything in it but what has a name to be kept.
    ///
    /// # Errors
    /// When something cannot be removed.
    pub(crate) fn keep_only(&self, is_kept: impl Fn(&str) -> bool) -> Result<()> {
        let entries = std::fs::read_dir(&self.staging).map_err(Error::io("read", &self.staging))?;
        for entry in entries {
            let path = entry.map_err(Error::io("read", &self.staging))?.path();
            let name = path.file_name().and_then(|name| name.to_str());
            if name.is_some_and(|name| name == LOCK || is_kept(name)) {
                continue;
            }
            let removed = if path.is_dir() {
                std::fs::remove_dir_all(&path)
            } else {
                std::fs::remove_file(&path)
            };
            removed.map_err(Error::io("remove", &path))?;
        }
        Ok(())
    }

    /// Prepares to write `target`, which must not exist, and keeps what a killed process has
    /// left of it.
    ///
    /// # Errors
    /// As [`StagedFolder::create`].
    pub(crate) fn resume(target: &Path) -> Result<Self> {
        if target.symlink_metadata().is_ok() {
            return Err(Error::Exists { path: target.to_owned() });
        }
        let Some(staging) = partial(target) else {
            return Err(Error::Exists { path: target.to_owned() });
        };
        std::fs::create_dir_all(&staging).map_err(Error::io("create", &staging))?;
        let lock = Lock::take(&staging, target)?;
        Ok(Self { target: target.to_owned(), staging, lock: Some(lock) })
    }

    /// Where a file of this name is written meanwhile.
    pub fn path(&self, name: &str) -> PathBuf {
        self.staging.join(name)
    }

    /// Creates a folder in it.
    ///
    /// # Errors
    /// When it cannot be created.
    pub fn create_folder(&self, name: &str) -> Result<PathBuf> {
        let path = self.path(name);
        std::fs::create_dir(&path).map_err(Error::io("create", &path))?;
        Ok(path)
    }

    /// Writes a whole file.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.path(name);
        let file = File::create_new(&path).map_err(Error::io("create", &path))?;
        fill(file, &path, bytes)
    }

    /// Gives the folder its name.
    ///
    /// # Errors
    /// When it cannot be renamed; the target is then as it was. Or when the rename
    /// cannot be made durable.
    pub fn commit(mut self) -> Result<()> {
        sync_dir(&self.staging)?;
        std::fs::rename(&self.staging, &self.target).map_err(Error::io("rename", &self.staging))?;
        // Only now, so that nobody else could take the folder for an abandoned one.
        let _lock = self.lock.take();
        let lock_path = self.target.join(LOCK);
        std::fs::remove_file(&lock_path).map_err(Error::io("remove", &lock_path))?;
        sync_dir(parent(&self.target))
    }
}

impl Drop for StagedFolder {
    fn drop(&mut self) {
        if let Some(_lock) = self.lock.take() {
            // The error that led here is the one to report.
            let _ = std::fs::remove_dir_all(&self.staging);
        }
    }
}

/// Writes a whole file in place of the one that may be there: it has either its
/// old or its new contents, whatever interrupts.
///
/// # Errors
/// When it cannot be written; it is then as it was.
pub fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let Some(partial) = partial(path) else {
        return Err(Error::io("write", path)(std::io::ErrorKind::InvalidFilename.into()));
    };
    let file = File::create(&partial).map_err(Error::io("create", &partial))?;
    let written = fill(file, &partial, bytes)
        .and_then(|()| std::fs::rename(&partial, path).map_err(Error::io("rename", &partial)));
    if written.is_err() {
        // The error that led here is the one to report.
        let _ = std::fs::remove_file(&partial);
    }
    written?;
    sync_dir(parent(path))
}

/// Renames a file or a folder.
///
/// # Errors
/// When it cannot be renamed.
pub fn rename(from: &Path, to: &Path) -> Result<()> {
    std::fs::rename(from, to).map_err(Error::io("rename", from))
}

fn fill(mut file: File, path: &Path, bytes: &[u8]) -> Result<()> {
    std::io::Write::write_all(&mut file, bytes).map_err(Error::io("write", path))?;
    file.sync_all().map_err(Error::io("write", path))
}

/// Where something lies until it is complete, `.NAME.partial`; `None` where the
/// path ends in no name.
fn partial(path: &Path) -> Option<PathBuf> {
    let mut partial = std::ffi::OsString::from(".");
    partial.push(path.file_name()?);
    partial.push(".partial");
    Some(path.with_file_name(partial))
}

/// The folder around a path.
fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

fn sync_dir(dir: &Path) -> Result<()> {
    // A folder can be opened, and so synced, on Unix only.
    if cfg!(unix) {
        let folder = File::open(dir).map_err(Error::io("open", dir))?;
        folder.sync_all().map_err(Error::io("write", dir))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_appears_only_when_committed() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("out");
        let staged = StagedFolder::create(&target).unwrap();
        staged.write("a", b"1").unwrap();
        assert!(!target.exists());
        assert!(matches!(StagedFolder::create(&target), Err(Error::Busy { .. })));
        staged.commit().unwrap();
        assert_eq!(std::fs::read(target.join("a")).unwrap(), b"1");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        assert_eq!(std::fs::read_dir(&target).unwrap().count(), 1);
        assert!(matches!(StagedFolder::create(&target), Err(Error::Exists { .. })));
    }

    #[test]
    fn a_file_is_replaced_as_a_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        write_file(&path, b"old").unwrap();
        write_file(&path, b"new").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
        let folder = dir.path().join("folder");
        std::fs::create_dir_all(folder.join("full")).unwrap();
        assert!(matches!(write_file(&folder, b"x"), Err(Error::Io { .. })));
        assert!(folder.join("full").is_dir());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2, "nothing else is left");
    }

    #[test]
    fn a_dropped_folder_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let staged = StagedFolder::create(&dir.path().join("out")).unwrap();
        staged.write("a", b"1").unwrap();
        drop(staged);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_a_killed_process_left_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("out");
        let left = dir.path().join(".out.partial");
        std::fs::create_dir(&left).unwrap();
        std::fs::write(left.join("half"), b"x").unwrap();
        let staged = StagedFolder::create(&target).unwrap();
        staged.write("a", b"1").unwrap();
        staged.commit().unwrap();
        assert!(!target.join("half").exists());
    }
}
