//! Archives as people and programs make them and read them.

// Helpers of tests may panic as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use serde_json::Value;
use support::{Place, contents, demo, onebase};

fn keys(object: &Value) -> Vec<&str> {
    object.as_object().unwrap().keys().map(String::as_str).collect()
}

/// The checkpoint of the demo with this name, as an argument.
fn arg(name: &str) -> String {
    demo(name).to_str().unwrap().to_owned()
}

#[test]
fn an_archive_gives_every_file_back() {
    let place = Place::new();
    let (base, math) = (arg("base"), arg("math"));
    let (out, back) = (place.text("a"), place.text("r"));
    let run = onebase(["archive", &base, &math, "-o", &out]).exits(0);
    assert!(run.stdout.starts_with("archived 5 files"), "{}", run.stdout);
    let run = onebase(["verify", &base, &out]).exits(0);
    assert!(run.stdout.contains("is whole and belongs to"), "{}", run.stdout);
    let run = onebase(["inspect", &out]).exits(0);
    assert!(run.stdout.contains("56 of 56 tensors against the base"), "{}", run.stdout);
    let run = onebase(["restore", &base, &out, "--exact", "-o", &back, "--json"]).exits(0);
    assert_eq!(keys(&run.object()), ["checkpoint", "files", "bytes"]);
    assert!(contents(&place.path("r")) == contents(&demo("math")));
    let run = onebase(["archive", &base, &arg("chat"), "-o", &place.text("c"), "--json"]).exits(0);
    assert_eq!(keys(&run.object()), ["archive", "share", "report"]);
    onebase(["archive", &base, &math, "-o", &out]).exits(1).says(&["already exists", "hint:"]);
    let run = onebase(["restore", &arg("chat"), &out, "--exact", "-o", &place.text("x")]).exits(1);
    run.says(&["made against another base", "hint:"]);
    let run = onebase(["restore", &base, &math, "--exact", "-o", &place.text("x")]).exits(1);
    run.says(&["is no archive", "onebase archive"]);
}

#[test]
fn a_chain_is_archived_and_restored_at_once() {
    let place = Place::new();
    let (base, one, two) = (arg("base"), place.text("1"), place.text("2"));
    onebase(["archive", &base, &arg("math"), "-o", &one]).exits(0);
    // The fine-tune itself need not be there any more.
    let through = ["--through", &one, "-o", &two, "--json"];
    onebase(["archive", &base, &arg("chat")].iter().chain(&through)).exits(0);
    let shown = onebase(["inspect", &two, "--json"]).exits(0).object();
    assert_eq!(
        (&shown["manifest"]["base"], &shown["manifest"]["fine_tune"]),
        (&"math".into(), &"chat".into())
    );
    onebase(["verify", &base, &two, "--through", &one]).exits(0);
    onebase(["verify", &base, &two]).exits(1).says(&["made against another base", "hint:"]);
    let back = place.text("r");
    onebase(["restore", &base, &two, "--exact", "--through", &one, "-o", &back]).exits(0);
    assert!(contents(&place.path("r")) == contents(&demo("chat")));
    let names = std::fs::read_dir(place.path(".")).unwrap().map(|entry| entry.unwrap().file_name());
    let mut names: Vec<_> = names.collect();
    names.sort();
    assert_eq!(names, ["1", "2", "r"]);
    onebase(["restore", &base, &two, "--through", &one, "-o", &place.text("x")]).exits(2);
    let artifact = place.text("a");
    onebase(["compress", &base, &arg("math"), "--codec", "sign", "-o", &artifact]).exits(0);
    let run = onebase(["verify", &base, &artifact, "--through", &one]).exits(1);
    run.says(&["leads to an archive"]);
}

#[test]
fn an_artifact_may_keep_its_original() {
    let place = Place::new();
    let (base, math, out) = (arg("base"), arg("math"), place.text("a"));
    let small = ["compress", &base, &math, "--codec", "sign", "-o", &out, "--json"];
    let with = onebase(small.iter().chain(&["--keep-original"])).exits(0).object();
    assert!(with["original_bytes"].as_u64().unwrap() > with["bytes"].as_u64().unwrap());
    // The artifact is what it is without.
    let plain = place.text("b");
    let small = ["compress", &base, &math, "--codec", "sign", "-o", &plain, "--json"];
    let without = onebase(small).exits(0).object();
    assert_eq!(with["bytes"], without["bytes"]);
    onebase(["verify", &base, &out]).exits(0);
    let back = place.text("r");
    onebase(["restore", &base, &out, "--exact", "-o", &back]).exits(0);
    assert!(contents(&place.path("r")) == contents(&demo("math")));
}
