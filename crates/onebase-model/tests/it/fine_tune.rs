//! A fine-tune that is being compressed: its sites get their deltas one by one.

use std::collections::BTreeMap;

use crate::support::{fixture, load};
use onebase_codec::{CodecSpec, DeltaLinear};
use onebase_format::artifact::Role;
use onebase_model::{Error, KvCache, Logits, Model, Segment, Tenant, tensor_specs};
use onebase_tensor::{EncodedDelta, Part, PartData};

/// A delta of one value in every element.
fn delta([n_rows, n_cols]: [usize; 2], value: f32) -> Box<dyn DeltaLinear> {
    let dense: CodecSpec = "dense".parse().unwrap();
    let values = PartData::F32(vec![value; n_rows * n_cols]);
    let name = dense.parts([n_rows, n_cols]).unwrap()[0].name;
    let part = Part::new(vec![n_rows, n_cols], values).unwrap();
    let parts = BTreeMap::from([(name.to_owned(), part)]);
    dense.prepare(EncodedDelta { shape: [n_rows, n_cols], parts }).unwrap()
}

fn logits(model: &Model, tenant: Option<&Tenant>) -> Vec<u32> {
    let mut cache = KvCache::new(model.config());
    let tokens = &[3, 14, 15, 9];
    let segment = Segment { tokens, tenant, cache: &mut cache, logits: Logits::All };
    let logits = model.forward(&mut [segment]).unwrap().remove(0);
    logits.into_iter().map(f32::to_bits).collect()
}

#[test]
fn every_linear_site_takes_a_delta_and_loses_it() {
    for family in ["llama_bias", "mixtral", "qwen2_tied", "qwen3_moe"] {
        let model = load(&fixture(family));
        let fine_tune = load(&fixture(family));
        let deltas = BTreeMap::new();
        let mut tenant = Tenant::of_fine_tune(&model, fine_tune.checkpoint(), deltas).unwrap();
        // It is the base as long as no site has a delta.
        let of_base = logits(&model, None);
        assert!(logits(&model, Some(&tenant)) == of_base, "{family}");
        let resident_bytes = tenant.resident_bytes();
        let mut last = of_base.clone();
        for spec in tensor_specs(model.config()).iter().filter(|s| s.role == Role::Linear) {
            let shape = [spec.shape[0], spec.shape[1]];
            let wrong = delta([shape[0] + 1, shape[1]], 1.0);
            assert!(!tenant.set_delta(&spec.name, Some(wrong)), "{}", spec.name);
            assert!(tenant.set_delta(&spec.name, Some(delta(shape, 0.01))), "{}", spec.name);
            // Experts that no token is sent to change nothing.
            let now = logits(&model, Some(&tenant));
            assert!(now != last || spec.name.contains(".experts."), "{family}, {}", spec.name);
            last = now;
        }
        for other in ["model.norm.weight", "model.layers.0.mlp.gate.weight", "x", "lm_head.weight"]
        {
            assert!(!tenant.set_delta(other, None), "{other}");
        }
        assert!(tenant.resident_bytes() > resident_bytes);
        (0..model.config().n_layers).for_each(|layer| tenant.clear_layer(layer));
        assert_eq!(tenant.resident_bytes(), resident_bytes);
        assert!(logits(&model, Some(&tenant)) == of_base, "{family}");
    }
}

/// Tables and vectors that have a delta are the base's and that.
#[test]
fn what_has_a_delta_is_not_the_fine_tune_s_own() {
    let model = load(&fixture("qwen3"));
    let fine_tune = load(&fixture("qwen3"));
    let hidden = model.config().hidden_size;
    let of = |name: &str, shape| {
        let deltas = BTreeMap::from([(name.to_owned(), delta(shape, 0.5))]);
        Tenant::of_fine_tune(&model, fine_tune.checkpoint(), deltas)
    };
    let of_base = logits(&model, None);
    for (name, shape) in [
        ("model.embed_tokens.weight", [model.config().vocab_size, hidden]),
        ("model.norm.weight", [1, hidden]),
        ("model.layers.0.self_attn.q_proj.weight", {
            let specs = tensor_specs(model.config());
            let q = specs.iter().find(|spec| spec.name.ends_with("0.self_attn.q_proj.weight"));
            let shape = &q.unwrap().shape;
            [shape[0], shape[1]]
        }),
    ] {
        assert!(logits(&model, Some(&of(name, shape).unwrap())) != of_base, "{name}");
        let error = of(name, [shape[0] + 1, shape[1]]).err().unwrap();
        assert!(matches!(&error, Error::Shape { tensor, .. } if tensor == name), "{error}");
    }
    let other = load(&fixture("qwen3_moe"));
    let error = Tenant::of_fine_tune(&model, other.checkpoint(), BTreeMap::new()).err().unwrap();
    assert!(matches!(error, Error::OtherModel { .. }), "{error}");
}
