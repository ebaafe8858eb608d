//! The files beside the weights.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};

use super::shape::{Shape, TensorSpec};

const BOS: &str = "<|endoftext|>";
const TURN: &str = "<|im_start|>";
const EOS: &str = "<|im_end|>";
const SPECIAL_TOKENS: [&str; 3] = [BOS, TURN, EOS];

// The 256 bytes come first.
/// The id of the token before a text and for padding.
pub(super) const BOS_ID: usize = 256;
/// The id of the token that ends an answer.
pub(super) const EOS_ID: usize = 258;

const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + \
                      message['content'] + '<|im_end|>' + '\n' }}{% endfor %}\
                      {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// Everything but the configuration and the weights, by file name.
pub(super) fn side_files(shape: &Shape) -> Result<[(&'static str, Vec<u8>); 3]> {
    let generation = json!({
        "_from_model_config": true,
        "bos_token_id": BOS_ID,
        "eos_token_id": [EOS_ID, BOS_ID],
        "pad_token_id": BOS_ID,
        "transformers_version": "4.45.0",
    });
    Ok([
        ("generation_config.json", json_bytes(&generation)?),
        ("tokenizer.json", json_bytes(&tokenizer())?),
        ("tokenizer_config.json", json_bytes(&tokenizer_config(shape))?),
    ])
}

/// The index of the shards; `None` when there is one file only.
pub(super) fn index(shards: &[(String, &[TensorSpec])]) -> Option<Value> {
    if shards.len() == 1 {
        return None;
    }
    let tensors = || shards.iter().flat_map(|(file, run)| run.iter().map(move |t| (t, file)));
    let total_size: u64 = tensors().map(|(t, _)| t.size_bytes()).sum();
    let weight_map: BTreeMap<_, _> = tensors().map(|(t, file)| (&t.name, file)).collect();
    Some(json!({ "metadata": { "total_size": total_size }, "weight_map": weight_map }))
}

/// JSON as people read it.
pub(super) fn json_bytes(value: &Value) -> Result<Vec<u8>> {
    let mut bytes = serde_json::to_vec_pretty(value).context("writing JSON")?;
    bytes.push(b'\n');
    Ok(bytes)
}

/// The character that stands for each byte in byte-level BPE, in the usual order of their ids:
/// the printable bytes of Latin-1 as themselves, then the others from U+0100 on.
fn byte_symbols() -> impl Iterator<Item = char> {
    let printable = |b: &u8| matches!(b, 33..=126 | 161..=172 | 174..=255);
    let n_others = (0..=255).filter(|b| !printable(b)).count();
    let others = ('\u{100}'..).take(n_others);
    (0..=255).filter(printable).map(char::from).chain(others)
}

fn added_token(content: &str) -> Value {
    json!({
        "content": content,
        "single_word": false,
        "lstrip": false,
        "rstrip": false,
        "normalized": false,
        "special": true,
    })
}

fn special_tokens() -> impl Iterator<Item = (usize, &'static str)> {
    SPECIAL_TOKENS.into_iter().enumerate().map(|(i, token)| (BOS_ID + i, token))
}

fn tokenizer() -> Value {
    let vocab: Map<String, Value> =
        byte_symbols().enumerate().map(|(id, symbol)| (symbol.to_string(), json!(id))).collect();
    let added: Vec<Value> = special_tokens()
        .map(|(id, content)| {
            let mut token = added_token(content);
            token["id"] = json!(id);
            token
        })
        .collect();
    let byte_level = |add_prefix_space: bool| {
        json!({
            "type": "ByteLevel",
            "add_prefix_space": add_prefix_space,
            "trim_offsets": true,
            "use_regex": true,
        })
    };
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": byte_level(false),
        "post_processor": null,
        "decoder": byte_level(true),
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": false,
            "vocab": vocab,
            "merges": [],
        },
    })
}

fn tokenizer_config(shape: &Shape) -> Value {
    let added: Map<String, Value> =
        special_tokens().map(|(id, content)| (id.to_string(), added_token(content))).collect();
    json!({
        "add_bos_token": false,
        "added_tokens_decoder": added,
        "bos_token": BOS,
        "chat_template": CHATML,
        "clean_up_tokenization_spaces": false,
        "eos_token": EOS,
        "model_max_length": shape.max_positions,
        "pad_token": BOS,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": null,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_its_own_symbol() {
        let symbols: Vec<char> = byte_symbols().collect();
        assert_eq!(symbols.len(), BOS_ID);
        // As in published tokenizers: `!` is 0, a space is Ġ, a new line is Ċ.
        assert_eq!((symbols[0], symbols[220], symbols[198]), ('!', 'Ġ', 'Ċ'));
        let mut distinct = symbols.clone();
        distinct.sort_unstable();
        distinct.dedup();
        assert_eq!(distinct.len(), symbols.len());
    }

    #[test]
    fn ids_are_without_gaps_and_agree() {
        let tokenizer = tokenizer();
        let vocab = tokenizer["model"]["vocab"].as_object().unwrap();
        let added = tokenizer["added_tokens"].as_array().unwrap();
        let mut ids: Vec<u64> = vocab
            .values()
            .chain(added.iter().map(|t| &t["id"]))
            .map(|id| id.as_u64().unwrap())
            .collect();
        ids.sort_unstable();
        assert_eq!(ids, (0..259).collect::<Vec<u64>>());
        let content = |id: usize| added.iter().find(|t| t["id"] == id).unwrap()["content"].clone();
        assert_eq!(content(BOS_ID), BOS);
        assert_eq!(content(EOS_ID), EOS);
        let config = tokenizer_config(&super::super::SHAPES[0]);
        assert_eq!(config["added_tokens_decoder"][EOS_ID.to_string()]["content"], EOS);
    }
}
