//! Runs that end at any moment and are gone on with, and artifacts that several
//! processes write: the result is the same to the byte, or there is none.

use std::path::{Path, PathBuf};

use crate::support::{artifact, card, contents, put_artifact, run_of_artifact};
use onebase_format::artifact::{ArtifactWriter, Run, Shard, join};
use onebase_format::{Digest, Error};
use tempfile::tempdir;

fn open(target: &Path) -> ArtifactWriter {
    ArtifactWriter::open(target, &run_of_artifact(Shard::WHOLE), false).unwrap()
}

fn done(writer: &ArtifactWriter) -> Vec<usize> {
    writer.done().map(|done| done.index).collect()
}

/// A run that ended after some tensors, as a killed process leaves it.
fn interrupted(target: &Path, n_tensors: usize) -> PathBuf {
    let mut writer = open(target);
    put_artifact(&mut writer, |index| index < n_tensors, n_tensors == 4);
    writer.keep();
    writer.work_folder().to_owned()
}

#[test]
fn an_interrupted_run_is_gone_on_with() {
    let dir = tempdir().unwrap();
    artifact(&dir.path().join("whole"));
    for n_tensors in 0..=4 {
        let target = dir.path().join(n_tensors.to_string());
        interrupted(&target, n_tensors);
        assert!(!target.exists());
        let mut writer = open(&target);
        assert_eq!(done(&writer), (0..n_tensors).collect::<Vec<_>>());
        put_artifact(&mut writer, |index| index >= n_tensors, true);
        writer.finish(card).unwrap();
        assert_eq!(contents(&target), contents(&dir.path().join("whole")));
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 6, "nothing else is left");
}

/// Whatever length of the two files has reached the disk, what is left of them is used or
/// done again, and nothing wrong is ever taken for right.
#[test]
fn a_run_cut_anywhere_gives_the_same_bytes() {
    let dir = tempdir().unwrap();
    artifact(&dir.path().join("whole"));
    let whole = contents(&dir.path().join("whole"));
    let sizes = |work: &Path| {
        ["journal.jsonl", "parts.bin"].map(|f| work.join(f).metadata().unwrap().len())
    };
    let [lines, data] = sizes(&interrupted(&dir.path().join("sizes"), 4));
    let cuts = (0..=lines).step_by(61).map(|cut| (cut, data));
    for (i, (lines, data)) in cuts.chain((0..data).step_by(3).map(|cut| (lines, cut))).enumerate() {
        let target = dir.path().join(i.to_string());
        let work = interrupted(&target, 4);
        for (file, len) in [("journal.jsonl", lines), ("parts.bin", data)] {
            let file = std::fs::File::options().write(true).open(work.join(file)).unwrap();
            file.set_len(len).unwrap();
        }
        let mut writer = open(&target);
        let n_done = writer.done().count();
        assert_eq!(done(&writer), (0..n_done).collect::<Vec<_>>(), "{lines} {data}");
        put_artifact(&mut writer, |index| index >= n_done, true);
        writer.finish(card).unwrap();
        assert_eq!(contents(&target), whole, "{lines} {data}");
    }
}

#[test]
fn bytes_that_changed_are_done_anew() {
    let dir = tempdir().unwrap();
    let target = dir.path().join("a");
    let work = interrupted(&target, 4);
    let path = work.join("parts.bin");
    let mut bytes = std::fs::read(&path).unwrap();
    // In the second tensor that has bytes.
    bytes[40] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    assert_eq!(done(&open(&target)), [0, 1]);
}

#[test]
fn another_run_is_refused_and_leaves_it_as_it_was() {
    let dir = tempdir().unwrap();
    let target = dir.path().join("a");
    let work = interrupted(&target, 2);
    let before = contents(&work);
    let other = |edit: &dyn Fn(&mut Run)| {
        let mut run = run_of_artifact(Shard::WHOLE);
        edit(&mut run);
        ArtifactWriter::open(&target, &run, false).unwrap_err()
    };
    for (what, edit) in [
        ("tool", &(|run: &mut Run| run.tool = "test 2".into()) as &dyn Fn(&mut Run)),
        ("inputs", &|run| run.inputs = Digest::of(b"others")),
        ("options", &|run| drop(run.options.insert("bits".into(), 3.into()))),
        ("fine_tune", &|run| run.fine_tune = "other".into()),
    ] {
        let error = other(edit);
        let Error::OtherRun { what: got, .. } = &error else { panic!("{error:?}") };
        assert_eq!(got, what);
        assert!(error.hint().unwrap().contains("--restart"));
        assert_eq!(contents(&work), before);
    }
    let journal = String::from_utf8(before["journal.jsonl"].clone()).unwrap();
    let newer = journal.replacen("\"version\":1", "\"version\":2", 1);
    std::fs::write(work.join("journal.jsonl"), newer).unwrap();
    let error = ArtifactWriter::open(&target, &run_of_artifact(Shard::WHOLE), false).unwrap_err();
    assert!(matches!(error, Error::OtherRun { .. }), "{error:?}");
    // Thrown away when asked for.
    let writer = ArtifactWriter::open(&target, &run_of_artifact(Shard::WHOLE), true).unwrap();
    assert_eq!(writer.done().count(), 0);
}

/// Does a shard of the artifact: every tensor whose position leaves this remainder.
fn shard(target: &Path, index: usize, count: usize) {
    let run = run_of_artifact(Shard { index, count });
    let mut writer = ArtifactWriter::open(target, &run, false).unwrap();
    if !writer.is_complete() {
        put_artifact(&mut writer, |i| i % count == index - 1, index == 1);
    }
    writer.finish_shard().unwrap();
}

#[test]
fn shards_are_joined_in_any_order_and_more_than_once() {
    let dir = tempdir().unwrap();
    artifact(&dir.path().join("whole"));
    let target = dir.path().join("a");
    for index in [2, 3, 1] {
        let error = join(&target, card).unwrap_err();
        let expected = matches!(error, Error::UnfinishedShard { .. } | Error::Io { .. });
        assert!(expected, "{error:?}");
        shard(&target, index, 3);
        shard(&target, index, 3);
    }
    let (manifest, sizes) = join(&target, card).unwrap();
    assert_eq!(contents(&target), contents(&dir.path().join("whole")));
    assert_eq!(join(&target, card).unwrap(), (manifest, sizes));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2, "nothing else is left");
}

/// Joining reads shards and never writes them: one that is damaged is named and stays as
/// it is.
#[test]
fn a_damaged_shard_is_named_and_not_cut() {
    let dir = tempdir().unwrap();
    let target = dir.path().join("a");
    shard(&target, 1, 2);
    shard(&target, 2, 2);
    let damaged = dir.path().join("a.shards/1-of-2");
    let mut bytes = std::fs::read(damaged.join("parts.bin")).unwrap();
    bytes[3] ^= 1;
    std::fs::write(damaged.join("parts.bin"), bytes).unwrap();
    let before = contents(&damaged);
    let error = join(&target, card).unwrap_err();
    assert!(matches!(error, Error::FileDigest { .. }), "{error:?}");
    assert_eq!(contents(&damaged), before);
    assert!(!target.exists());
    // Done anew, it is joined.
    shard(&target, 1, 2);
    join(&target, card).unwrap();
}

/// A process that is killed while it removes what it has joined.
#[test]
fn what_is_left_of_joined_shards_is_known_for_that() {
    let dir = tempdir().unwrap();
    let target = dir.path().join("a");
    shard(&target, 1, 2);
    shard(&target, 2, 2);
    join(&target, card).unwrap();
    let manifest = std::fs::read(target.join("onebase.json")).unwrap();
    let shards = dir.path().join("a.shards");
    for left in [&["joined", "1-of-2/x"][..], &["joined"], &[]] {
        for file in left {
            let path = shards.join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, Digest::of(&manifest).to_string()).unwrap();
        }
        if left.is_empty() {
            std::fs::create_dir_all(&shards).unwrap();
        }
        join(&target, card).unwrap();
    }
    assert!(target.exists());
}

#[test]
fn shards_that_do_not_belong_together_are_refused() {
    let dir = tempdir().unwrap();
    let target = dir.path().join("a");
    shard(&target, 1, 2);
    let mut run = run_of_artifact(Shard { index: 2, count: 2 });
    run.options.insert("bits".into(), 3.into());
    let mut writer = ArtifactWriter::open(&target, &run, false).unwrap();
    put_artifact(&mut writer, |i| i % 2 == 1, false);
    writer.finish_shard().unwrap();
    let error = join(&target, card).unwrap_err();
    let Error::OtherRun { path, what, .. } = &error else { panic!("{error:?}") };
    assert_eq!((path.file_name().unwrap(), what.as_str()), ("2-of-2".as_ref(), "options"));

    let target = dir.path().join("b");
    shard(&target, 1, 2);
    shard(&target, 2, 3);
    let error = join(&target, card).unwrap_err();
    let Error::OtherRun { what, .. } = &error else { panic!("{error:?}") };
    assert_eq!(what, "number of shards");

    // One that is still being written.
    let target = dir.path().join("c");
    shard(&target, 1, 2);
    let run = run_of_artifact(Shard { index: 2, count: 2 });
    let mut writer = ArtifactWriter::open(&target, &run, false).unwrap();
    assert!(matches!(join(&target, card), Err(Error::Busy { .. })));
    put_artifact(&mut writer, |i| i == 1, false);
    writer.keep();
    drop(writer);
    let error = join(&target, card).unwrap_err();
    assert!(matches!(error, Error::UnfinishedShard { index: 2, count: 2, .. }), "{error:?}");
    assert!(error.hint().unwrap().contains("--shard 2/2"));
    assert!(!target.exists());
}

/// Lines that this program does not write are not believed: what they name is done anew, and
/// nothing is written outside the folder.
#[test]
fn lines_that_cannot_be_its_own_are_done_anew() {
    let dir = tempdir().unwrap();
    for (i, (from, to)) in [
        ("\"config.json\"", "\"../escaped\""),
        ("\"bytes\":24,", "\"bytes\":18446744073709551615,"),
        ("\"shape\":[3,4]", "\"shape\":[3,4611686018427387904]"),
        ("\"offset\":0", "\"offset\":18446744073709551615"),
    ]
    .into_iter()
    .enumerate()
    {
        let target = dir.path().join(i.to_string());
        let journal = interrupted(&target, 4).join("journal.jsonl");
        let text = std::fs::read_to_string(&journal).unwrap();
        assert!(text.contains(from), "{from} in {text}");
        std::fs::write(&journal, text.replacen(from, to, 1)).unwrap();
        let mut writer = open(&target);
        let n_done = writer.done().count();
        put_artifact(&mut writer, |index| index >= n_done, true);
        writer.finish(card).unwrap();
        artifact(&dir.path().join(format!("whole{i}")));
        assert_eq!(contents(&target), contents(&dir.path().join(format!("whole{i}"))), "{from}");
    }
    assert!(!dir.path().join("escaped").exists());
}
