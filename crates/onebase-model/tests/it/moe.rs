//! Blocks with experts: what an observer is shown, and configurations that differ or
//! are bad.

use std::collections::BTreeMap;

use crate::support::{fixture, load, logits, tenant, with_config};
use onebase_format::Checkpoint;
use onebase_format::artifact::Role;
use onebase_model::{
    Error, KvCache, Logits, Model, ModelConfig, Observer, Segment, SiteInput, tensor_specs,
};
use onebase_tensor::MatrixRef;
use serde_json::{Value, json};

const TOKENS: [u32; 12] = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26];

/// The rows and the width of everything that was shown.
#[derive(Default)]
struct Shown(BTreeMap<(usize, SiteInput), [usize; 2]>);

impl Observer for Shown {
    fn observe(&mut self, layer: usize, input: SiteInput, x: MatrixRef<'_>) {
        let before = self.0.insert((layer, input), x.shape());
        assert_eq!(before, None, "{layer} {input:?} is shown once");
    }
}

#[test]
fn the_inputs_of_every_site_are_shown() {
    for family in ["qwen3_moe", "qwen3_moe_bf16", "mixtral"] {
        let model = load(&fixture(family));
        let mixture = model.config().mixture.clone().unwrap();
        // Of one token, most experts get nothing.
        for tokens in [&TOKENS[..], &TOKENS[..1]] {
            let mut shown = Shown::default();
            let mut cache = KvCache::new(model.config());
            let segment = Segment { tokens, tenant: None, cache: &mut cache, logits: Logits::None };
            model.forward_observed(&mut [segment], &mut shown).unwrap();
            let mut routed = BTreeMap::new();
            for ((layer, input), [n_rows, _]) in &shown.0 {
                match input {
                    SiteInput::Expert(_) | SiteInput::ExpertOutput(_) => {
                        *routed.entry(*layer).or_insert(0) += n_rows;
                    }
                    _ => assert_eq!(*n_rows, tokens.len()),
                }
            }
            assert!(!routed.is_empty());
            for (layer, n_rows) in routed {
                let expected = 2 * tokens.len() * mixture.n_experts_per_token;
                assert_eq!(n_rows, expected, "{family}, layer {layer}");
            }
            let mut n_inputs = std::collections::BTreeSet::new();
            for spec in tensor_specs(model.config()).iter().filter(|s| s.role == Role::Linear) {
                let module = spec.name.strip_prefix("model.layers.").unwrap();
                let (layer, site) = module.split_once('.').unwrap();
                let input = SiteInput::of(site.strip_suffix(".weight").unwrap()).unwrap();
                let key = (layer.parse().unwrap(), input);
                assert_eq!(shown.0[&key][1], spec.shape[1], "{family}, {}", spec.name);
                n_inputs.insert(key);
            }
            assert_eq!(n_inputs.len(), shown.0.len(), "{family}");
        }
    }
}

#[test]
fn how_experts_are_chosen_is_the_tenant_s() {
    let model = load(&fixture("qwen3_moe"));
    let plain = logits(&model, None, &TOKENS);
    let dir = tempfile::tempdir().unwrap();
    for (i, (field, value)) in [
        ("num_experts_per_tok", json!(1)),
        ("num_experts_per_tok", json!(5)),
        ("norm_topk_prob", json!(true)),
    ]
    .into_iter()
    .enumerate()
    {
        let own_dir = dir.path().join(i.to_string());
        with_config(&fixture("qwen3_moe"), &own_dir, |c| c[field] = value.clone());
        let own = logits(&load(&own_dir), None, &TOKENS);
        let tenant = tenant(&model, |c| c[field] = value.clone());
        assert!(own != plain, "{field} matters");
        // In one batch with the base, which keeps its own.
        let mut caches = [(); 3].map(|()| KvCache::new(model.config()));
        let tenants = [Some(&tenant), None, Some(&tenant)];
        let mut segments: Vec<_> = caches
            .iter_mut()
            .zip(tenants)
            .map(|(cache, tenant)| Segment { tokens: &TOKENS, tenant, cache, logits: Logits::All })
            .collect();
        let got = model.forward(&mut segments).unwrap();
        assert!(got[0] == own && got[1] == plain && got[2] == own, "{field}");
    }
}

/// The same weights in another order of the layers' kinds do not fit.
#[test]
fn which_layers_have_experts_follows_from_the_configuration() {
    let read = |edit: &dyn Fn(&mut Value)| {
        let checkpoint = Checkpoint::open(&fixture("qwen3_moe")).unwrap();
        let mut config = checkpoint.config().clone();
        edit(&mut config);
        let config = ModelConfig::from_json(&config, checkpoint.dir()).unwrap();
        let routers =
            tensor_specs(&config).into_iter().filter(|s| s.name.ends_with("mlp.gate.weight"));
        routers
            .map(|s| (s.name[13..14].parse::<usize>().unwrap(), s.role, s.shape))
            .collect::<Vec<_>>()
    };
    let router = |layer| (layer, Role::Vector, vec![5, 48]);
    assert_eq!(read(&|_| {}), [router(0), router(2)]);
    assert_eq!(read(&|c| c["mlp_only_layers"] = json!([])), [router(0), router(1), router(2)]);
    assert_eq!(read(&|c| c["mlp_only_layers"] = json!(null)), [router(0), router(1), router(2)]);
    assert_eq!(read(&|c| c["mlp_only_layers"] = json!([0, 1, 2, 9])), []);
    assert_eq!(read(&|c| c["decoder_sparse_step"] = json!(3)), [router(2)]);
    assert_eq!(read(&|c| c["decoder_sparse_step"] = json!(2)), []);
}

#[test]
fn bad_configurations_of_experts_are_refused() {
    let cases: [(&str, &str, Value, &str, &str); 14] = [
        ("qwen3_moe", "num_local_experts", json!(0), "a positive number", "0"),
        ("qwen3_moe_bf16", "num_experts", json!(0), "a positive number", "0"),
        ("mixtral", "num_local_experts", json!(0), "a positive number", "0"),
        ("mixtral", "num_local_experts", json!(null), "a positive number", "nothing"),
        (
            "mixtral",
            "num_local_experts",
            json!(1 << 30),
            "at most 262144 in all layers",
            "1073741824",
        ),
        ("qwen3_moe", "num_experts_per_tok", json!(0), "a positive number", "0"),
        ("qwen3_moe", "num_experts_per_tok", json!(6), "at most the number of experts", "6 of 5"),
        ("mixtral", "num_experts_per_tok", json!(5), "at most the number of experts", "5 of 4"),
        ("mixtral", "num_experts_per_tok", json!(null), "a positive number", "nothing"),
        ("qwen3_moe", "moe_intermediate_size", json!("40"), "a positive number", "\"40\""),
        ("qwen3_moe", "norm_topk_prob", json!(1), "true or false", "1"),
        ("qwen3_moe", "decoder_sparse_step", json!(0), "a positive number", "0"),
        ("qwen3_moe", "mlp_only_layers", json!(1), "a list of layers", "1"),
        ("qwen3_moe", "mlp_only_layers", json!([-1]), "a list of layers", "[-1]"),
    ];
    for (family, name, value, expected, got) in cases {
        let dir = tempfile::tempdir().unwrap();
        with_config(&fixture(family), dir.path(), |c| c[name] = value);
        let error = Model::load(Checkpoint::open(dir.path()).unwrap()).unwrap_err();
        let Error::Config { path, field, expected: e, got: g } = &error else {
            panic!("{family}, {name}: {error:?}")
        };
        assert_eq!((path.as_path(), *field), (dir.path(), name), "{family}");
        assert_eq!((*e, g.as_str()), (expected, got), "{family}, {name}");
        assert!(error.hint().unwrap().contains("config.json"), "{:?}", error.hint());
    }
}
