//! One file per command.

use std::path::Path;

use anyhow::Context as _;
use tempfile::TempDir;

pub(crate) mod archive;
pub(crate) mod bench;
pub(crate) mod calibrate;
pub(crate) mod chain;
pub(crate) mod codecs;
pub(crate) mod compare;
pub(crate) mod completions;
pub(crate) mod compress;
pub(crate) mod demo;
pub(crate) mod eval;
pub(crate) mod family;
pub(crate) mod finalize;
pub(crate) mod generate;
pub(crate) mod inspect;
pub(crate) mod quantize;
pub(crate) mod restore;
pub(crate) mod serve;
pub(crate) mod verify;

/// A folder for what goes before the command ends, on the disk of what it writes.
fn scratch_beside(out: &Path, what: &str) -> anyhow::Result<TempDir> {
    let around = match out.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    tempfile::Builder::new()
        .prefix(&format!(".onebase-{what}-"))
        .tempdir_in(around)
        .with_context(|| format!("cannot make a temporary folder in {}", around.display()))
}
