//! An archive that nobody wrote is refused or gives files, and so does a header.
#![no_main]

use std::path::PathBuf;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use onebase_compress::{Silent, verify_archive};
use onebase_format::archive::{ARCHIVE_FILE, Archive, BaseFolder, tensors_of_header};
use onebase_fuzz::{split_archive, write_archive_base};
use tempfile::TempDir;

static FOLDERS: LazyLock<(TempDir, PathBuf, BaseFolder)> = LazyLock::new(|| {
    let dir = tempfile::tempdir().expect("a folder");
    let [base, archive] = ["base", "archive"].map(|name| dir.path().join(name));
    std::fs::create_dir(&archive).expect("a folder");
    write_archive_base(&base).expect("a base");
    let base = BaseFolder::open(&base).expect("a base");
    (dir, archive, base)
});

fuzz_target!(|input: &[u8]| {
    let len = (input.len() as u64).to_le_bytes();
    let _ = tensors_of_header(&[&len, input].concat(), 8 + 2 * input.len() as u64);
    let Some((manifest, data)) = split_archive(input) else { return };
    let (_, dir, base) = &*FOLDERS;
    std::fs::write(dir.join(ARCHIVE_FILE), manifest).expect("the manifest");
    std::fs::write(dir.join("file-00001.bin"), data).expect("the file");
    let Ok(archive) = Archive::open(dir) else { return };
    let _ = archive.size_bytes();
    let _ = verify_archive(base, &archive, &Silent);
});
