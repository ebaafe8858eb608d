//! Whatever bytes a folder holds, opening it and reading all there is in it ends
//! in success or in an error.

use std::path::Path;

use crate::support::{
    LINEAR, REST, Stored, resign, safetensors, two_tensors, write_checkpoint, write_shards, written,
};
use onebase_format::artifact::{Artifact, MANIFEST_FILE, Storage};
use onebase_format::{Checkpoint, Error};
use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::{Config, RngSeed, TestRunner};
use serde_json::json;
use tempfile::tempdir;

/// Opens a checkpoint and reads all there is in it.
fn read_checkpoint(dir: &Path) -> Result<(), Error> {
    let checkpoint = Checkpoint::open(dir)?;
    let _ = (checkpoint.size_bytes(), checkpoint.n_weights());
    let names: Vec<&str> = checkpoint.names().collect();
    for name in &names {
        let tensor = checkpoint.tensor(name)?;
        let mut bytes = vec![0; tensor.size_bytes()];
        tensor.read(0, &mut bytes)?;
        assert_eq!(&*tensor.bytes(), &bytes[..]);
        let mut wide = vec![0.0; tensor.n_weights()];
        tensor.dtype().widen(&bytes, &mut wide);
    }
    checkpoint.digests(&names).map(|_| ())
}

/// Opens an artifact and reads all there is in it.
fn read_artifact(dir: &Path) -> Result<(), Error> {
    let artifact = Artifact::open(dir)?;
    let _ = (artifact.sizes().effective_bpw_total(), artifact.sizes().effective_bpw_linear());
    for (name, record) in &artifact.manifest().tensors {
        let delta = artifact.delta(name)?;
        assert_eq!(delta.is_some(), matches!(record.storage, Storage::Codec { .. }));
        if let Some(exact) = artifact.exact(name)? {
            exact.widen();
        }
        artifact.added_rows(name)?;
    }
    artifact.check_files()
}

/// Runs a check on 2000 random values, the same on every run.
fn check<S: Strategy>(values: S, check: impl Fn(S::Value)) {
    let config = Config {
        rng_seed: RngSeed::Fixed(7),
        failure_persistence: None,
        ..Config::with_cases(2000)
    };
    let run = TestRunner::new(config).run(&values, |value| {
        check(value);
        Ok(())
    });
    run.unwrap();
}

/// Some changes of bytes: where, to what, and how.
fn edits() -> impl Strategy<Value = Vec<(Index, u8, u8)>> {
    prop::collection::vec((any::<Index>(), any::<u8>(), 0..5u8), 1..6)
}

fn edited(mut bytes: Vec<u8>, edits: &[(Index, u8, u8)]) -> Vec<u8> {
    for (at, byte, kind) in edits {
        let at = at.index(bytes.len());
        // A digit in place of another often leaves a header readable.
        let digit = b'0' + byte % 10;
        match kind {
            0 if bytes.len() > 1 => drop(bytes.remove(at)),
            1 => bytes.insert(at, *byte),
            2 => bytes.insert(at, digit),
            3 => bytes[at] = digit,
            _ => bytes[at] = *byte,
        }
    }
    bytes
}

#[test]
fn mutated_files_never_panic() {
    let dir = tempdir().unwrap();
    check(edits(), |edits| {
        write_checkpoint(dir.path(), &edited(safetensors(&two_tensors()), &edits));
        let _ = read_checkpoint(dir.path());
    });
}

#[test]
fn mutated_indexes_never_panic() {
    let dir = tempdir().unwrap();
    let shards: [(&str, &[Stored]); 2] =
        [("one", &[Stored::f32("a", &[2])]), ("two", &[Stored::f32("b", &[2])])];
    write_shards(dir.path(), &shards, &json!({"a": "one", "b": "two"}));
    read_checkpoint(dir.path()).unwrap();
    let path = dir.path().join("model.safetensors.index.json");
    let text = std::fs::read(&path).unwrap();
    check(edits(), |edits| {
        std::fs::write(&path, edited(text.clone(), &edits)).unwrap();
        let _ = read_checkpoint(dir.path());
    });
}

#[test]
fn mutated_manifests_never_panic() {
    let dir = written();
    let folder = dir.path().join("a");
    read_artifact(&folder).unwrap();
    let text = std::fs::read(folder.join(MANIFEST_FILE)).unwrap();
    check(edits(), |edits| {
        std::fs::write(folder.join(MANIFEST_FILE), edited(text.clone(), &edits)).unwrap();
        let _ = read_artifact(&folder);
    });
}

#[test]
fn mutated_and_re_signed_files_never_panic() {
    for name in [LINEAR, REST] {
        let dir = written();
        let folder = dir.path().join("a");
        let file = std::fs::read(folder.join(name)).unwrap();
        check(edits(), |edits| {
            resign(&folder, name, &edited(file.clone(), &edits));
            let _ = read_artifact(&folder);
        });
    }
}
