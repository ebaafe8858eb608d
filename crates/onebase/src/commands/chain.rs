use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use onebase_compress::restore_archive;
use onebase_format::archive::{Archive, BaseFolder};
use tempfile::TempDir;

use crate::commands::scratch_beside;
use crate::output::Bar;

/// The end of a chain of archives: a base, or what archives make of it.
pub(crate) struct Chain {
    dir: PathBuf,
    /// Holds `dir`, unless that is the base.
    _scratch: Option<TempDir>,
}

impl Chain {
    /// Restores archives in turn, each from the folder before it, the first from `base`.
    ///
    /// The folders lie beside `place`, two at a time at most, and go with the chain.
    pub(crate) fn restore(base: &Path, archives: &[PathBuf], place: &Path) -> anyhow::Result<Self> {
        let mut chain = Self { dir: base.to_owned(), _scratch: None };
        for archive in archives {
            let archive = Archive::open(archive)?;
            let from = BaseFolder::open(&chain.dir)?;
            let scratch = scratch_beside(place, "chain")?;
            // An archive against it says by this name what it was made from. Nothing but a name:
            // a manifest must not lead out of the folder.
            let name = Path::new(&archive.manifest().fine_tune).file_name();
            let dir = scratch.path().join(name.unwrap_or(OsStr::new("checkpoint")));
            let bar = Bar::new(&format!("restoring {}", archive.manifest().fine_tune));
            restore_archive(&from, &archive, &dir, &bar)?;
            bar.finish();
            chain = Self { dir, _scratch: Some(scratch) };
        }
        Ok(chain)
    }

    /// The folder at its end.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }
}
