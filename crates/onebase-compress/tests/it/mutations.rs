//! Whatever an artifact's manifest says, all who read it end in success or in an
//! error.

use crate::support::{Folder, Memory};
use onebase_compress::Silent;
use onebase_format::artifact::Artifact;
use onebase_model::{Model, Tenant};
use serde_json::{Value, json};

const LINEAR: &str = "linear-00001.safetensors";

/// The places of a JSON value that hold no others.
fn leaves(value: &Value, at: &str, found: &mut Vec<String>) {
    let escape = |key: &str| key.replace('~', "~0").replace('/', "~1");
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            fields.iter().for_each(|(k, v)| leaves(v, &format!("{at}/{}", escape(k)), found));
        }
        Value::Array(items) if !items.is_empty() => {
            (0..).zip(items).for_each(|(i, v): (usize, _)| leaves(v, &format!("{at}/{i}"), found));
        }
        _ => found.push(at.to_owned()),
    }
}

#[test]
fn mutated_manifests_never_panic() {
    let mut base = Memory::fixture("llama_tied_gqa");
    base.config["num_hidden_layers"] = json!(1);
    base.tensors.retain(|name, _| !name.contains("layers.1."));
    let mut tuned = base.tuned(1);
    tuned.extend_vocabulary(2);
    let folder = Folder::new(&base, &tuned);
    folder.compress("rtn:bits=2,group_size=16");
    let path = folder.artifact().join("onebase.json");
    let whole: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let mut places = Vec::new();
    leaves(&whole, "", &mut places);
    let model = Model::load(folder.open().0).unwrap();
    let others = [json!(0), json!(1), json!(3), json!(202), json!(u64::MAX), json!(-1), json!(0.5)];
    let words = ["F16", "F32", "U8", "linear", "vector", "unchanged", "exact", "codec", LINEAR, ""];
    let others = others.into_iter().chain(words.map(Value::from));
    let others: Vec<Value> = others.chain([json!(null), json!([]), json!({})]).collect();
    let (mut n_opened, mut n_loaded) = (0, 0);
    for place in &places {
        for other in &others {
            let mut manifest = whole.clone();
            *manifest.pointer_mut(place).unwrap() = other.clone();
            std::fs::write(&path, manifest.to_string()).unwrap();
            let Ok(artifact) = Artifact::open(&folder.artifact()) else {
                continue;
            };
            n_opened += 1;
            let verified = onebase_compress::verify(model.checkpoint(), &artifact, &Silent);
            if let Ok(tenant) = Tenant::load(&model, &artifact) {
                n_loaded += 1;
                let got = crate::support::logits(&model, Some(&tenant), &[0, 199, 7]);
                assert_eq!(got.len(), 3 * tenant.config().vocab_size);
            }
            if verified.is_ok() {
                let restored = folder.restored();
                let _ =
                    onebase_compress::restore(model.checkpoint(), &artifact, &restored, &Silent);
                let _ = std::fs::remove_dir_all(restored);
            }
        }
    }
    // Names of people and programs may be anything.
    assert!(n_opened > 100 && n_loaded > 30, "{n_opened} opened, {n_loaded} loaded");
}
