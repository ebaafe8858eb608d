use std::path::Path;

use onebase_compress::{archive, restore_archive, verify_archive};
use onebase_format::archive::{Archive, BaseFolder, Compression, FileStorage};
use serde_json::json;

use crate::args::{ArchiveArgs, RestoreArgs, VerifyArgs};
use crate::commands::chain::Chain;
use crate::output::{Bar, Output, bytes, percent, table};

/// Where an artifact keeps the archive of its original.
pub(crate) const ORIGINAL_FOLDER: &str = "original";

pub(crate) fn run(args: &ArchiveArgs, output: &Output) -> anyhow::Result<()> {
    let base = Chain::restore(&args.base, &args.through, &args.out)?;
    let bar = Bar::new("archiving");
    let report = archive(base.dir(), &args.fine_tune, &args.out, &bar)?;
    bar.finish();
    let share = report.archive_bytes as f64 / report.bytes.max(1) as f64;
    let object = json!({ "archive": args.out, "share": share, "report": report });
    output.result(&object, || {
        format!(
            "archived {} files, {}, in {}: {} of it; {} tensors against the base, {} alone",
            report.n_files,
            bytes(report.bytes),
            bytes(report.archive_bytes),
            percent(share),
            report.n_with_base,
            report.n_alone,
        )
    })
}

/// `restore --exact`.
pub(crate) fn restore(args: &RestoreArgs, output: &Output) -> anyhow::Result<()> {
    let kept = args.artifact.join(ORIGINAL_FOLDER);
    let is_kept = !Archive::is_at(&args.artifact) && Archive::is_at(&kept);
    let archive = Archive::open(if is_kept { &kept } else { &args.artifact })?;
    let chain = Chain::restore(&args.base, &args.through, &args.out)?;
    let base = BaseFolder::open(chain.dir())?;
    let bar = Bar::new("restoring");
    restore_archive(&base, &archive, &args.out, &bar)?;
    bar.finish();
    let (n_files, size) = size(&archive);
    let object = json!({ "checkpoint": args.out, "files": n_files, "bytes": size });
    output.result(&object, || {
        let (name, out) = (&archive.manifest().fine_tune, args.out.display());
        format!("restored {name} to {out}: {n_files} files, {}, as they were", bytes(size))
    })
}

/// `verify` of an archive.
pub(crate) fn verify(args: &VerifyArgs, output: &Output) -> anyhow::Result<()> {
    let archive = Archive::open(&args.artifact)?;
    let chain = Chain::restore(&args.base, &args.through, &args.artifact)?;
    let base = BaseFolder::open(chain.dir())?;
    let bar = Bar::new("verifying");
    verify_archive(&base, &archive, &bar)?;
    bar.finish();
    let (n_files, size) = size(&archive);
    let checked = json!({ "files": n_files, "bytes": size });
    let object = json!({ "verified": true, "archive": args.artifact, "checked": checked });
    output.result(&object, || {
        format!(
            "{} is whole and belongs to {}: {n_files} files, {}, decode to what they were",
            args.artifact.display(),
            args.base.display(),
            bytes(size),
        )
    })
}

/// `inspect` of an archive.
pub(crate) fn inspect(dir: &Path, output: &Output) -> anyhow::Result<()> {
    let archive = Archive::open(dir)?;
    let (manifest, stored) = (archive.manifest(), archive.size_bytes()?);
    let (n_files, size) = size(&archive);
    let share = stored as f64 / size.max(1) as f64;
    let object = json!({ "archive": dir, "bytes": stored, "share": share, "manifest": manifest });
    output.result(&object, || {
        let how = |storage: &FileStorage| match storage {
            FileStorage::Base => "the base's".to_owned(),
            FileStorage::Whole { compression: Compression::None, .. } => "as it is".to_owned(),
            FileStorage::Whole { compression: Compression::Zstd, .. } => "compressed".to_owned(),
            FileStorage::Tensors { tensors, .. } => {
                let with_base = tensors.iter().filter(|tensor| tensor.base.is_some()).count();
                format!("{with_base} of {} tensors against the base", tensors.len())
            }
        };
        let rows = manifest.files.iter().map(|file| {
            let stored = file.storage.data().map_or(0, |(_, stored, _)| stored);
            vec![file.path.clone(), how(&file.storage), bytes(file.bytes), bytes(stored)]
        });
        format!(
            "{} against {}: {n_files} files, {}, in {}, {} of it\n{}",
            manifest.fine_tune,
            manifest.base,
            bytes(size),
            bytes(stored),
            percent(share),
            table(&["file", "stored", "size", "here"], 2, rows.collect())
        )
    })
}

/// Files of the fine-tune, and their bytes.
fn size(archive: &Archive) -> (usize, u64) {
    let files = &archive.manifest().files;
    (files.len(), files.iter().fold(0, |sum: u64, record| sum.saturating_add(record.bytes)))
}
