//! Every file of an archived folder comes back to the byte, or is refused.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::support::{Folder, Memory, NORM, UP, contents, demo};
use onebase_compress::{ArchiveReport, Error, Silent, archive, restore_archive, verify_archive};
use onebase_format::Error as FormatError;
use onebase_format::archive::{ARCHIVE_FILE, Archive, BaseFolder, files};
use onebase_tensor::DType;
use serde_json::{Value, json};

/// All files of a folder and of those below.
fn all(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let paths = files(dir).unwrap().into_iter();
    paths.map(|path| (path.clone(), std::fs::read(dir.join(path)).unwrap())).collect()
}

fn restore(base: &Path, archive: &Path, target: &Path) -> Result<(), Error> {
    let archive = Archive::open(archive)?;
    let base = BaseFolder::open(base)?;
    verify_archive(&base, &archive, &Silent)?;
    restore_archive(&base, &archive, target, &Silent)
}

/// Archives a folder, restores it and compares all files.
#[track_caller]
fn check(base: &Path, fine_tune: &Path) -> ArchiveReport {
    let dir = tempfile::tempdir().unwrap();
    let (stored, restored) = (dir.path().join("archive"), dir.path().join("restored"));
    let report = archive(base, fine_tune, &stored, &Silent).unwrap();
    let size: usize = contents(&stored).values().map(Vec::len).sum();
    assert_eq!(report.archive_bytes, size as u64);
    restore(base, &stored, &restored).unwrap();
    assert!(all(&restored) == all(fine_tune));
    // Nothing else is left in the folder.
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
    report
}

#[test]
fn every_architecture_and_type_comes_back() {
    for family in crate::support::FAMILIES {
        let base = Memory::fixture(family);
        let mut tuned = base.tuned(1);
        tuned.extend_vocabulary(3);
        let folder = Folder::new(&base, &tuned);
        let report = check(&folder.base(), &folder.fine_tune());
        assert!(report.n_with_base > 0 && report.n_alone == 0, "{family} {report:?}");
        // With another type than the base's.
        for dtype in [DType::F16, DType::BF16, DType::F32] {
            let mut other = tuned.clone();
            for tensor in other.tensors.values_mut() {
                let values = tensor.widen();
                tensor.dtype = dtype;
                tensor.fill(&values);
            }
            other.write(&folder.dir.path().join(dtype.name()));
            check(&folder.base(), &folder.dir.path().join(dtype.name()));
        }
    }
}

#[test]
fn trained_fine_tunes_come_back_in_less() {
    let family = std::env::var_os("ONEBASE_ZOO").map(PathBuf::from);
    let family = family.unwrap_or_else(|| demo("base").parent().unwrap().to_owned());
    for name in ["chat", "code", "math", "math-long", "zh"] {
        let fine_tune = family.join(name);
        if fine_tune.is_dir() {
            let report = check(&family.join("base"), &fine_tune);
            let share = report.archive_bytes as f64 / report.bytes as f64;
            assert!(share < 0.6, "{name} {share}");
        }
    }
}

#[test]
fn numbers_that_are_none_come_back() {
    let base = Memory::fixture("qwen3_tied_bf16");
    let mut tuned = base.tuned(1);
    // NaN with payloads and signs, −0, subnormal numbers, ∞.
    let odd = [0x7fc1u16, 0xff81, 0x8000, 0x0001, 0x807f, 0x7f80, 0xff80, 0x7fff];
    for (to, bits) in tuned.tensor(UP).bytes.chunks_mut(2).zip(odd.iter().cycle().take(40)) {
        to.copy_from_slice(&bits.to_le_bytes());
    }
    let folder = Folder::new(&base, &tuned);
    check(&folder.base(), &folder.fine_tune());
    check(&folder.fine_tune(), &folder.base());
}

#[test]
fn few_changes_take_few_bytes() {
    let base = Memory::fixture("llama_f16");
    let mut tuned = base.clone();
    tuned.tensor(UP).bytes[100] ^= 1;
    tuned.tensor(NORM).bytes[0] ^= 1;
    let folder = Folder::new(&base, &tuned);
    let report = check(&folder.base(), &folder.fine_tune());
    assert!(report.archive_bytes < report.bytes / 10, "{report:?}");
}

#[test]
fn any_folder_comes_back() {
    let base = Memory::fixture("qwen2_tied");
    let mut tuned = base.tuned(1);
    tuned.side_files.insert("tokenizer.json".into(), b"{\"a\": 1}".repeat(1000));
    let folder = Folder::new(&base, &tuned);
    let dir = folder.fine_tune();
    std::fs::create_dir_all(dir.join("runs/first")).unwrap();
    std::fs::write(dir.join("runs/first/log.txt"), b"").unwrap();
    std::fs::write(dir.join("runs/optimizer.safetensors"), b"not one").unwrap();
    std::fs::write(dir.join("empty.safetensors"), b"").unwrap();
    std::fs::write(dir.join("pytorch_model.bin"), vec![7; 3 << 20]).unwrap();
    // Types that no weight has, a scalar, a tensor without elements.
    let header = json!({
        "__metadata__": {"who": "cares"},
        "model.norm.weight": {"dtype": "F8_E4M3", "shape": [3, 5], "data_offsets": [0, 15]},
        "steps": {"dtype": "I64", "shape": [], "data_offsets": [15, 23]},
        "mask": {"dtype": "BOOL", "shape": [0, 4], "data_offsets": [23, 23]},
        "wide": {"dtype": "F64", "shape": [2], "data_offsets": [23, 39]},
    });
    let header = format!("{header}   ");
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.extend((0..39u8).map(|i| i.wrapping_mul(37)));
    std::fs::write(dir.join("runs/odd.safetensors"), file).unwrap();
    check(&folder.base(), &dir);
    // Against itself, against what is no model, and what is no model against a model.
    let report = check(&dir, &dir);
    assert_eq!(report.n_with_base + report.n_alone, 0);
    let nothing = folder.dir.path().join("nothing");
    std::fs::create_dir(&nothing).unwrap();
    let report = check(&nothing, &dir);
    assert_eq!(report.n_with_base, 0);
    let report = check(&dir, &nothing);
    assert_eq!(report.n_files, 0);
}

#[test]
fn a_chain_comes_back_step_by_step() {
    let mut steps = vec![Memory::fixture("qwen3")];
    for seed in 1..4 {
        let next = steps.last().unwrap().tuned(seed);
        steps.push(next);
    }
    let dir = tempfile::tempdir().unwrap();
    let at = |kind: &str, i: usize| dir.path().join(format!("{kind}-{i}"));
    for (i, step) in steps.iter().enumerate() {
        step.write(&at("step", i));
    }
    for i in 1..steps.len() {
        archive(&at("step", i - 1), &at("step", i), &at("archive", i), &Silent).unwrap();
    }
    let mut parent = at("step", 0);
    for i in 1..steps.len() {
        restore(&parent, &at("archive", i), &at("restored", i)).unwrap();
        assert!(all(&at("restored", i)) == all(&at("step", i)));
        parent = at("restored", i);
    }
}

#[test]
fn another_base_is_refused_by_tensor() {
    let base = Memory::fixture("llama_bias");
    let folder = Folder::new(&base, &base.tuned(1));
    archive(&folder.base(), &folder.fine_tune(), &folder.artifact(), &Silent).unwrap();
    let mut other = base.clone();
    other.tensor(UP).bytes[1] ^= 1;
    other.write(&folder.base());
    let error = restore(&folder.base(), &folder.artifact(), &folder.restored()).unwrap_err();
    assert!(
        matches!(&error, Error::Format(FormatError::OtherBase { tensor, .. }) if tensor == UP),
        "{error:?}"
    );
    other.tensors.remove(UP);
    other.write(&folder.base());
    let error = restore(&folder.base(), &folder.artifact(), &folder.restored()).unwrap_err();
    assert!(
        matches!(&error, Error::Format(FormatError::MissingTensor { tensor, .. }) if tensor == UP),
        "{error:?}"
    );
    // A file that is the base's.
    base.write(&folder.base());
    std::fs::write(folder.base().join("config.json"), b"{}").unwrap();
    let error = restore(&folder.base(), &folder.artifact(), &folder.restored()).unwrap_err();
    assert!(matches!(&error, Error::Format(FormatError::OtherContents { .. })), "{error:?}");
    assert!(!folder.restored().exists());
}

#[test]
fn damage_is_found_wherever_it_is() {
    let mut base = Memory::fixture("llama_tied_gqa");
    base.tensors.retain(|name, _| name == UP || name == NORM);
    let folder = Folder::new(&base, &base.tuned(1));
    std::fs::write(folder.fine_tune().join("notes.txt"), b"some words\n".repeat(9)).unwrap();
    let stored = folder.artifact();
    archive(&folder.base(), &folder.fine_tune(), &stored, &Silent).unwrap();
    let base = BaseFolder::open(&folder.base()).unwrap();
    let mut named = 0;
    for (name, bytes) in contents(&stored) {
        if name == ARCHIVE_FILE {
            continue;
        }
        let path = stored.join(&name);
        for at in (0..bytes.len()).step_by(if bytes.len() > 2000 { 17 } else { 1 }) {
            std::fs::write(&path, &bytes[..at]).unwrap();
            assert!(Archive::open(&stored).is_err());
            let mut altered = bytes.clone();
            altered[at] ^= 0x10;
            std::fs::write(&path, &altered).unwrap();
            let archive = Archive::open(&stored).unwrap();
            match verify_archive(&base, &archive, &Silent) {
                Err(Error::Lossless { tensor, .. }) => {
                    assert!(tensor == UP || tensor == NORM);
                    named += 1;
                }
                Err(_) => {}
                // A bit of a header that says nothing of the contents.
                Ok(()) => assert!(archive.check_files().is_err()),
            }
        }
        std::fs::write(&path, &bytes).unwrap();
    }
    assert!(named > 100, "{named}");
    verify_archive(&base, &Archive::open(&stored).unwrap(), &Silent).unwrap();
}

#[test]
fn a_header_of_a_tensor_without_end_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let [base, stored] = ["base", "archive"].map(|name| dir.path().join(name));
    std::fs::create_dir(&base).unwrap();
    std::fs::create_dir(&stored).unwrap();
    let base = BaseFolder::open(&base).unwrap();
    let n = 1u64 << 60;
    let header = json!({ "w": { "dtype": "U8", "shape": [n], "data_offsets": [0, n] } });
    let header = header.to_string();
    let len = (header.len() as u64).to_le_bytes();
    let header = [&len, header.as_bytes()].concat();
    let packed = zstd::bulk::compress(&header, 1).unwrap();
    let digest = "0".repeat(64);
    let record = |path: &str, bytes: u64| {
        json!({
            "path": path, "bytes": bytes, "sha256": digest, "stored": "tensors",
            "file": "file-00001.bin", "stored_bytes": packed.len(), "blake3": digest,
            "header_bytes": packed.len(), "tensors": [{ "name": "w", "parts": [] }],
        })
    };
    let files = [record("a", n + header.len() as u64), record("b", u64::MAX)];
    let manifest = json!({
        "format": "onebase-archive", "version": 1, "tool": "", "base": "", "fine_tune": "",
        "files": files,
    });
    std::fs::write(stored.join(ARCHIVE_FILE), manifest.to_string()).unwrap();
    std::fs::write(stored.join("file-00001.bin"), &packed).unwrap();
    let archive = Archive::open(&stored).unwrap();
    let problem = verify_archive(&base, &archive, &Silent).unwrap_err().to_string();
    assert!(problem.contains("other parts than its length asks for"), "{problem}");
}

/// The places of a JSON value that hold no others.
fn leaves(value: &Value, at: &str, found: &mut Vec<String>) {
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            fields.iter().for_each(|(k, v)| leaves(v, &format!("{at}/{k}"), found));
        }
        Value::Array(items) if !items.is_empty() => {
            (0..).zip(items).for_each(|(i, v): (usize, _)| leaves(v, &format!("{at}/{i}"), found));
        }
        _ => found.push(at.to_owned()),
    }
}

#[test]
fn mutated_manifests_never_panic_nor_lead_elsewhere() {
    let mut base = Memory::fixture("llama_tied_gqa");
    base.tensors.retain(|name, _| name == UP || name == NORM);
    let mut tuned = base.tuned(1);
    tuned.side_files.insert("tokenizer.json".into(), b"{}".to_vec());
    let folder = Folder::new(&base, &tuned);
    archive(&folder.base(), &folder.fine_tune(), &folder.artifact(), &Silent).unwrap();
    let path = folder.artifact().join(ARCHIVE_FILE);
    let whole: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let mut places = Vec::new();
    leaves(&whole, "", &mut places);
    let numbers = [json!(0), json!(1), json!(2), json!(u64::MAX), json!(-1), json!(0.5)];
    let words = [
        "base",
        "whole",
        "tensors",
        "none",
        "zstd",
        "../out",
        "/out",
        "a/../../out",
        "",
        "file-00001.bin",
        "config.json",
        UP,
    ];
    let others = numbers.into_iter().chain(words.map(Value::from));
    let others: Vec<Value> = others.chain([json!(null), json!([]), json!({})]).collect();
    let base = BaseFolder::open(&folder.base()).unwrap();
    let mut n_opened = 0;
    for place in &places {
        for other in &others {
            let mut manifest = whole.clone();
            *manifest.pointer_mut(place).unwrap() = other.clone();
            std::fs::write(&path, manifest.to_string()).unwrap();
            let Ok(archive) = Archive::open(&folder.artifact()) else { continue };
            n_opened += 1;
            let _ = restore_archive(&base, &archive, &folder.restored(), &Silent);
            let _ = std::fs::remove_dir_all(folder.restored());
            assert!(!folder.dir.path().join("out").exists() && !Path::new("/out").exists());
        }
    }
    assert!(n_opened > 50, "{n_opened}");
}

#[test]
fn what_a_killed_run_has_done_is_used_where_it_is_still_right() {
    let base = Memory::fixture("qwen3");
    let mut tuned = base.tuned(1);
    tuned.side_files.insert("a.txt".into(), b"first".to_vec());
    tuned.side_files.insert("b.txt".into(), b"second".to_vec());
    let folder = Folder::new(&base, &tuned);
    let whole = folder.artifact();
    archive(&folder.base(), &folder.fine_tune(), &whole, &Silent).unwrap();
    let manifest: Value =
        serde_json::from_slice(&std::fs::read(whole.join(ARCHIVE_FILE)).unwrap()).unwrap();
    // What a process leaves that is killed while it writes the last line.
    let left = folder.dir.path().join(".again.partial");
    let again = folder.dir.path().join("again");
    let leave = |edit: &dyn Fn(&mut Vec<String>)| {
        std::fs::create_dir(&left).unwrap();
        for (name, bytes) in contents(&whole) {
            if name != ARCHIVE_FILE {
                std::fs::write(left.join(name), bytes).unwrap();
            }
        }
        let first = json!({
            "format": manifest["format"], "version": manifest["version"], "tool": manifest["tool"]
        });
        let mut lines = vec![first.to_string()];
        lines.extend(manifest["files"].as_array().unwrap().iter().map(Value::to_string));
        edit(&mut lines);
        let text = lines.join("\n");
        std::fs::write(left.join("journal.jsonl"), &text[..text.len() - 5]).unwrap();
    };
    let go_on = || {
        let report = archive(&folder.base(), &folder.fine_tune(), &again, &Silent).unwrap();
        assert!(contents(&again) == contents(&whole));
        assert!(!left.exists());
        std::fs::remove_dir_all(&again).unwrap();
        report.n_resumed
    };
    leave(&|_| {});
    assert_eq!(go_on(), 2);
    leave(&|lines| lines[0] = lines[0].replace("onebase ", "other "));
    assert_eq!(go_on(), 0);
    leave(&|_| {});
    std::fs::write(left.join("file-00001.bin"), b"other").unwrap();
    assert_eq!(go_on(), 1);
    // A file that has changed meanwhile, and kept its length.
    std::fs::write(folder.fine_tune().join("a.txt"), b"FIRST").unwrap();
    leave(&|_| {});
    let report = archive(&folder.base(), &folder.fine_tune(), &again, &Silent).unwrap();
    assert_eq!(report.n_resumed, 1);
    restore(&folder.base(), &again, &folder.restored()).unwrap();
    assert!(all(&folder.restored()) == all(&folder.fine_tune()));
    // One that has gone, so that others have its number now.
    std::fs::remove_dir_all(&again).unwrap();
    std::fs::remove_file(folder.fine_tune().join("a.txt")).unwrap();
    leave(&|_| {});
    archive(&folder.base(), &folder.fine_tune(), &again, &Silent).unwrap();
    let anew = folder.dir.path().join("anew");
    archive(&folder.base(), &folder.fine_tune(), &anew, &Silent).unwrap();
    assert!(contents(&again) == contents(&anew));
}
