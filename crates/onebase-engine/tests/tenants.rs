//! The life of tenants: loading, swapping, eviction, damage.

// Helpers of tests may panic as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::path::Path;
use std::time::{Duration, Instant};

use onebase_engine::{Desired, Engine, Error, Options, Request};
use serde_json::{Value, json};
use support::{ALONE, QUESTION, artifact, ask, chat, engine, options, soon, submit};

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// Changes a byte in the middle of the weights of an artifact.
fn damage(artifact: &Path) {
    let entries = std::fs::read_dir(artifact).unwrap().map(|entry| entry.unwrap().path());
    let is_linear = |path: &std::path::PathBuf| {
        path.file_name().unwrap().to_string_lossy().starts_with("linear-")
    };
    let path = entries.into_iter().find(is_linear).unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&path, bytes).unwrap();
}

#[test]
fn a_swap_lets_those_who_began_end() {
    let engine = engine(&options());
    let registry = engine.registry();
    let prompt = chat(&ALONE.text, QUESTION);
    let request = || Request::greedy(prompt.clone(), 24);
    let before = registry.listing("math-rtn").unwrap().desired;
    let began = submit(&engine, "math-rtn", request()).unwrap();
    let lease = registry.lease("math-rtn", soon()).unwrap();
    let refused = registry.load("math-rtn", &artifact("chat-rtn"), Some(99), soon());
    assert!(
        matches!(refused, Err(Error::Generation { expected: 99, got, .. }) if got == before.generation)
    );
    let now = registry
        .load("math-rtn", &artifact("chat-rtn"), Some(before.generation), soon())
        .unwrap()
        .desired;
    assert!(now.generation > before.generation && now.digest != before.digest);
    assert_eq!(lease.generation(), before.generation);
    assert_eq!(ask(&engine, "math-rtn", request()).tokens, ALONE.answer("chat-rtn", &prompt, 24));
    assert_eq!(began.wait().tokens, ALONE.answer("math-rtn", &prompt, 24));
    registry.unload("math-rtn", Some(now.generation)).unwrap();
    let gone = submit(&engine, "math-rtn", request()).err();
    assert!(matches!(gone, Some(Error::UnknownTenant { .. })));
    assert!(matches!(registry.unload("math-rtn", None), Err(Error::UnknownTenant { .. })));
    assert!(matches!(
        registry.load("base", &artifact("chat-rtn"), None, soon()),
        Err(Error::BadName { .. })
    ));
}

#[test]
fn those_that_nobody_uses_make_room() {
    let all = engine(&options());
    let size = |name| all.registry().listing(name).unwrap().resident_bytes.unwrap();
    // Full with these two.
    let delta_bytes = size("math-rtn") + size("chat-rtn");
    drop(all);
    let engine = engine(&Options { delta_bytes, ..options() });
    let registry = engine.registry();
    let in_memory = || -> Vec<String> {
        let list = registry.list().into_iter().filter(|tenant| tenant.resident_bytes.is_some());
        list.map(|tenant| tenant.desired.name).collect()
    };
    let prompt = chat(&ALONE.text, QUESTION);
    for name in ["math-rtn", "chat-rtn", "math-sign", "chat-low-rank", "math-rtn", "math-rtn"] {
        let answer = ask(&engine, name, Request::greedy(prompt.clone(), 12));
        assert_eq!(answer.tokens, ALONE.answer(name, &prompt, 12));
        assert!(registry.resident_bytes() <= delta_bytes);
        assert!(in_memory().contains(&name.to_owned()));
    }
    let listing = registry.listing("math-rtn").unwrap();
    assert!(listing.n_loads >= 2 && listing.n_evictions >= 1, "{listing:?}");
    // Who answers is not dropped: with all the memory in use, the next has to wait.
    let held = ["math-rtn", "chat-rtn"].map(|name| registry.lease(name, soon()).unwrap());
    let until = Instant::now() + Duration::from_millis(100);
    assert!(matches!(registry.lease("math-sign", until), Err(Error::NoRoom { .. })));
    drop(held);
    registry.lease("math-sign", soon()).unwrap();
    let tiny =
        Engine::start(support::model(), &Options { delta_bytes: 1000, ..options() }).unwrap();
    let refused = tiny.registry().load("math-rtn", &artifact("math-rtn"), None, soon());
    assert!(matches!(refused, Err(Error::TooLarge { .. })));
}

#[test]
fn damage_on_disk_is_met_when_it_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mine");
    copy(&artifact("math-rtn"), &path);
    let engine = engine(&options());
    let registry = engine.registry();
    registry.load("mine", &path, None, soon()).unwrap();
    let prompt = chat(&ALONE.text, QUESTION);
    let expected = ALONE.answer("math-rtn", &prompt, 24);
    let began = submit(&engine, "mine", Request::greedy(prompt.clone(), 24)).unwrap();
    damage(&path);
    // What is in memory is as it was, and a swap to what is damaged changes nothing.
    let refused = registry.load("mine", &path, None, soon());
    assert!(matches!(refused, Err(Error::Model(_))), "{refused:?}");
    assert_eq!(began.wait().tokens, expected);
    assert_eq!(ask(&engine, "mine", Request::greedy(prompt.clone(), 24)).tokens, expected);
    // Another engine has to read it, and refuses it without touching others.
    let other = support::engine(&options());
    let desired = registry.listing("mine").unwrap().desired;
    other.registry().restore(desired).unwrap();
    let failed = submit(&other, "mine", Request::greedy(prompt.clone(), 24)).err().unwrap();
    assert!(matches!(failed, Error::TenantFailed { .. }), "{failed:?}");
    assert!(other.registry().listing("mine").unwrap().failure.is_some());
    assert!(ask(&other, "chat-rtn", Request::greedy(prompt, 4)).end.is_ok());
}

#[test]
fn another_artifact_in_its_place_is_refused() {
    let registry = engine(&options());
    let registry = registry.registry();
    let loaded = registry.listing("math-rtn").unwrap().desired;
    let other = Engine::start(support::model(), &options()).unwrap();
    let moved = Desired { source: artifact("math-sign"), ..loaded.clone() };
    other.registry().restore(moved).unwrap();
    let failed = other.registry().lease("math-rtn", soon());
    assert!(
        matches!(failed, Err(Error::TenantFailed { source, .. }) if matches!(*source, Error::Changed { .. }))
    );
    // As it was, it comes back under its generation; the next one gets a new number.
    other.registry().unload("math-rtn", None).unwrap();
    other.registry().restore(loaded.clone()).unwrap();
    let lease = other.registry().lease("math-rtn", soon()).unwrap();
    assert_eq!((lease.generation(), Some(lease.digest())), (loaded.generation, loaded.digest));
    let next = other.registry().load("new", &artifact("math-sign"), Some(0), soon()).unwrap();
    assert!(next.desired.generation > loaded.generation);
    let missing = Desired {
        name: "missing".to_owned(),
        source: "/nowhere".into(),
        digest: None,
        generation: 0,
    };
    other.registry().restore(missing).unwrap();
    assert!(matches!(other.registry().lease("missing", soon()), Err(Error::TenantFailed { .. })));
}

/// Makes an artifact say that every tensor is the base's, and that it kept all of a skill.
fn empty(artifact: &Path) {
    let path = artifact.join("onebase.json");
    let mut manifest: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    for tensor in manifest["tensors"].as_object_mut().unwrap().values_mut() {
        let kept = ["role", "dtype", "shape", "base"].map(|name| (name, tensor[name].clone()));
        *tensor = kept.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        tensor["stored"] = "unchanged".into();
    }
    manifest["files"].as_object_mut().unwrap().retain(|name, _| !name.ends_with(".safetensors"));
    let digest = "0".repeat(64);
    manifest["quality"] = json!({
        "tool": "t", "reference": "r", "seed": 0,
        "tasks": [{"name": "sums", "blake3": digest, "n": 10, "base": 0.0, "finetune": 0.9,
                   "compressed": 0.9, "skill_kept": 1.0}],
    });
    std::fs::write(&path, manifest.to_string()).unwrap();
}

#[test]
fn a_delta_without_effect_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nothing");
    copy(&artifact("math-rtn"), &path);
    empty(&path);
    let engine = Engine::start(support::model(), &options()).unwrap();
    let refused = engine.registry().load("nothing", &path, None, soon()).unwrap_err();
    assert!(matches!(refused, Error::NoEffect { claimed: Some(_), .. }), "{refused:?}");
    assert!(refused.hint().unwrap().contains("100 % of the skill on sums"));
    assert!(engine.registry().list().is_empty());
}
