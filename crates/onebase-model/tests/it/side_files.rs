//! Configurations, tokenizers and chat templates that are missing, malformed or
//! hostile.

use std::path::Path;

use crate::support::{demo, fixture, logits, with_config};
use onebase_format::Checkpoint;
use onebase_model::{ChatTemplate, Error, Message, Model, TextModel};
use serde_json::{Value, json};

/// A tiny checkpoint with the demo's tokenizer.
fn checkpoint(dir: &Path) -> Checkpoint {
    with_config(&fixture("llama_tied_gqa"), dir, |_| {});
    let (model, _) = demo();
    for file in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        std::fs::copy(model.checkpoint().dir().join(file), dir.join(file)).unwrap();
    }
    Checkpoint::open(dir).unwrap()
}

#[test]
fn a_model_without_tokenizer_has_no_text() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = checkpoint(dir.path());
    TextModel::from_checkpoint(&checkpoint).unwrap();
    std::fs::remove_file(dir.path().join("tokenizer.json")).unwrap();
    let error = TextModel::from_checkpoint(&checkpoint).unwrap_err();
    let Error::MissingFile { path, file: "tokenizer.json" } = &error else { panic!("{error:?}") };
    assert_eq!(path, dir.path());
    assert!(error.hint().unwrap().contains("save_pretrained"));
}

#[test]
fn a_malformed_tokenizer_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = checkpoint(dir.path());
    let whole = std::fs::read(dir.path().join("tokenizer.json")).unwrap();
    for bytes in [&b""[..], b"{}", b"[]", b"\xff", &whole[..whole.len() / 2]] {
        std::fs::write(dir.path().join("tokenizer.json"), bytes).unwrap();
        let error = TextModel::from_checkpoint(&checkpoint).unwrap_err();
        let Error::Tokenizer { path, problem } = &error else { panic!("{error:?}") };
        assert_eq!(path, dir.path());
        assert!(!problem.is_empty());
    }
}

#[test]
fn malformed_files_beside_it_are_named() {
    for file in ["tokenizer_config.json", "generation_config.json", "chat_template.json"] {
        let dir = tempfile::tempdir().unwrap();
        let checkpoint = checkpoint(dir.path());
        for text in ["", "{", "\u{0}"] {
            std::fs::write(dir.path().join(file), text).unwrap();
            let error = TextModel::from_checkpoint(&checkpoint).unwrap_err();
            let Error::Json { path, file: got, .. } = &error else { panic!("{error:?}") };
            assert_eq!((path.as_path(), *got), (dir.path(), file));
        }
        // Of another kind than expected, it says nothing.
        for text in ["[]", "3", "null", "{\"eos_token_id\": -1, \"chat_template\": []}"] {
            std::fs::write(dir.path().join(file), text).unwrap();
            TextModel::from_checkpoint(&checkpoint).unwrap();
        }
    }
}

#[test]
fn a_model_without_template_has_no_chat() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = checkpoint(dir.path());
    std::fs::write(dir.path().join("tokenizer_config.json"), "{}").unwrap();
    let text = TextModel::from_checkpoint(&checkpoint).unwrap();
    let message = Message { role: "user".into(), content: "hi".into() };
    let error = text.encode_chat(&[message]).unwrap_err();
    let Error::NoChatTemplate { path } = &error else { panic!("{error:?}") };
    assert_eq!(path, dir.path());
    assert!(error.hint().unwrap().contains("--raw"));
}

#[test]
fn a_template_file_goes_before_the_configuration() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = checkpoint(dir.path());
    let rendered = || {
        let text = TextModel::from_checkpoint(&checkpoint).unwrap();
        let message = Message { role: "user".into(), content: "hi".into() };
        text.chat_template.unwrap().render(&[message], true).unwrap()
    };
    assert!(rendered().contains("<|im_start|>user\nhi"));
    let json = json!({"chat_template": "json {{ messages[0].content }}"});
    std::fs::write(dir.path().join("chat_template.json"), json.to_string()).unwrap();
    assert_eq!(rendered(), "json hi");
    std::fs::write(dir.path().join("chat_template.jinja"), "jinja {{ messages[0].role }}").unwrap();
    assert_eq!(rendered(), "jinja user");
}

#[test]
fn a_bad_template_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = checkpoint(dir.path());
    for template in ["{% for %}", "{{", "{% endif %}", "{% if x %}"] {
        std::fs::write(dir.path().join("chat_template.jinja"), template).unwrap();
        let error = TextModel::from_checkpoint(&checkpoint).unwrap_err();
        let Error::ChatTemplate { path, .. } = &error else { panic!("{template}: {error:?}") };
        assert_eq!(path, dir.path());
    }
}

#[test]
fn a_template_that_fails_is_an_error() {
    for template in [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages.no_such_method() }}",
        "{{ no_such_function() }}",
        "{{ messages | no_such_filter }}",
        "{{ messages[0].content + 1 }}",
        "{{ 1 / 0 }}",
        "{{ strftime_now('%') }}",
        "{{ messages | tojson(indent='x') }}",
        "{{ messages | tojson(indent=-1) }}",
        "{{ messages | tojson(indent=9223372036854775807) }}",
        "{{ messages | tojson(indent=1000000000000) }}",
        "{% for i in range(9223372036854775807) %}{% endfor %}",
        "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
        "{{ 'x' | indent(9223372036854775807, true) }}",
        "{{ 'x' * 9223372036854775807 }}",
        "{{ [0] * 9223372036854775807 }}",
        "{{ 'x'.ljust(9223372036854775807) }}",
        "{{ 'x'.zfill(9223372036854775807) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ] {
        let compiled = ChatTemplate::new(template.into(), None, None, Path::new("model"));
        let message = Message { role: "user".into(), content: "hi".into() };
        let error = compiled.unwrap().render(&[message], true).unwrap_err();
        let Error::ChatTemplate { path, .. } = &error else { panic!("{template}: {error:?}") };
        assert_eq!(path, Path::new("model"));
    }
}

/// The places of a JSON value that hold no others, and those that do.
fn places(value: &Value, at: &str, found: &mut Vec<String>) {
    found.push(at.to_owned());
    match value {
        Value::Object(fields) => {
            fields.iter().for_each(|(k, v)| places(v, &format!("{at}/{k}"), found));
        }
        Value::Array(items) => {
            let items = items.iter().enumerate();
            items.for_each(|(i, v)| places(v, &format!("{at}/{i}"), found));
        }
        _ => {}
    }
}

#[test]
fn mutated_configurations_never_panic() {
    let others = [
        json!(0),
        json!(1),
        json!(2),
        json!(3),
        json!(12),
        json!(65536),
        json!(1u64 << 31),
        json!(u64::MAX),
        json!(-1),
        json!(1e-300),
        json!(1e300),
        json!(0.5),
        json!(true),
        json!(false),
        json!(null),
        json!([]),
        json!({}),
        json!(""),
        json!("default"),
        json!("linear"),
        json!("llama3"),
        json!("sliding_attention"),
        json!(["MistralForCausalLM"]),
        json!(["Qwen2ForCausalLM"]),
        json!(["Qwen3ForCausalLM"]),
        json!(["Qwen3MoeForCausalLM"]),
        json!(["MixtralForCausalLM"]),
    ];
    let (mut n_loaded, mut n_refused) = (0, 0);
    for family in [
        "llama_tied_gqa",
        "llama3_rope",
        "qwen2_window",
        "qwen3_tied_bf16",
        "qwen3_moe_bf16",
        "mixtral",
    ] {
        let dir = tempfile::tempdir().unwrap();
        with_config(&fixture(family), dir.path(), |_| {});
        let path = dir.path().join("config.json");
        let whole: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        let mut all = Vec::new();
        places(&whole, "", &mut all);
        for place in all {
            for other in &others {
                let mut config = whole.clone();
                *config.pointer_mut(&place).unwrap() = other.clone();
                std::fs::write(&path, config.to_string()).unwrap();
                match Model::load(Checkpoint::open(dir.path()).unwrap()) {
                    Ok(model) => {
                        n_loaded += 1;
                        let got = logits(&model, None, &[0, 1, 2]);
                        assert_eq!(got.len(), 3 * model.config().vocab_size);
                    }
                    Err(_) => n_refused += 1,
                }
            }
        }
    }
    assert!(n_loaded > 500 && n_refused > 500, "{n_loaded} loaded, {n_refused} refused");
}

#[test]
fn a_long_conversation_is_rendered() {
    let (_, text) = demo();
    let message = Message { role: "user".into(), content: "word ".repeat(200) };
    let messages = vec![message; 1000];
    let rendered = text.chat_template.unwrap().render(&messages, true).unwrap();
    assert!(rendered.len() > 1_000_000);
}

#[test]
fn truncation_and_padding_of_training_do_not_reach_prompts() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = checkpoint(dir.path());
    let want = TextModel::from_checkpoint(&checkpoint).unwrap().tokenizer;
    let path = dir.path().join("tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    tokenizer["truncation"] = json!({
        "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0,
    });
    tokenizer["padding"] = json!({
        "strategy": {"Fixed": 1_000_000_000_000u64}, "direction": "Right",
        "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0, "pad_token": "x",
    });
    std::fs::write(&path, tokenizer.to_string()).unwrap();
    let got = TextModel::from_checkpoint(&checkpoint).unwrap().tokenizer;
    let text = "A prompt of more than four tokens, to be run as it is.";
    assert_eq!(got.encode(text, true).unwrap(), want.encode(text, true).unwrap());
}

#[test]
fn templates_as_deep_as_they_may_be_end_in_text_or_an_error() {
    let deep = |source: String| {
        let template = ChatTemplate::new(source, None, None, Path::new("x"));
        template.and_then(|t| t.render::<Message>(&[], true)).map_err(|e| e.to_string())
    };
    let nested = "{% set ns = namespace(x=[]) %}{% for i in range(90000) %}{% set ns.x = [ns.x] \
                  %}{% endfor %}";
    for value in ["{{ ns.x }}", "{{ ns.x|tojson }}", ""] {
        let _ = deep(format!("{nested}{value}"));
    }
    for link in ["not ", "-"] {
        let _ = deep(format!("{{{{ {}x }}}}", link.repeat(6_000)));
    }
    for link in ["+1", "|upper", ".a", "[0]"] {
        let _ = deep(format!("{{{{ x{} }}}}", link.repeat(6_000)));
    }
    let long = deep("x".repeat(1 << 20)).unwrap_err();
    assert!(long.contains("chat template"), "{long}");
}

#[test]
fn malformed_rope_scalings_are_refused() {
    for (field, value) in [
        ("rope_scaling", json!("linear")),
        ("rope_parameters", json!("yarn")),
        ("rope_parameters", json!({"full_attention": {"rope_theta": 5}})),
        (
            "rope_parameters",
            json!({
                "rope_type": "llama3", "rope_theta": 1e4, "factor": 8, "low_freq_factor": 4,
                "high_freq_factor": 4, "original_max_position_embeddings": 64,
            }),
        ),
    ] {
        let dir = tempfile::tempdir().unwrap();
        with_config(&fixture("llama3_rope"), dir.path(), |c| {
            c.as_object_mut().unwrap().remove("rope_scaling");
            c[field] = value.clone();
        });
        let error = Model::load(Checkpoint::open(dir.path()).unwrap()).unwrap_err();
        assert!(matches!(error, Error::Config { .. }), "{value}: {error:?}");
    }
}
