//! Answers that are JSON by construction: of all tokens, only those may come that go on with a
//! text of the schema.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory, token_bytes_from_tokenizer_json};
use onebase_engine::{Constraint, Lease};
use onebase_format::Digest;
use serde_json::{Value, json};

use crate::error::ApiError;

/// Tokenizers whose tables are kept.
const MOST_FACTORIES: usize = 32;

/// What tables depend on: the tokenizer's file, the vocabulary and the token that ends an answer.
type Key = (Digest, usize, u32);

/// Tables of the tokenizers that constrained answers were asked of.
#[derive(Default)]
pub(crate) struct Grammars {
    factories: Mutex<BTreeMap<Key, Arc<ParserFactory>>>,
}

impl std::fmt::Debug for Grammars {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Grammars").finish_non_exhaustive()
    }
}

/// The schema that a `response_format` asks for; `None` for plain text.
pub(crate) fn schema_of(format: Option<&Value>) -> Result<Option<Value>, ApiError> {
    let bad = |message: String| Err(ApiError::parameter("response_format", message));
    let Some(format) = format.filter(|format| !format.is_null()) else { return Ok(None) };
    let mut schema = match format["type"].as_str() {
        Some("text") => return Ok(None),
        Some("json_object") => json!({"type": "object"}),
        Some("json_schema") => match format["json_schema"].get("schema") {
            Some(schema @ Value::Object(_)) => schema.clone(),
            _ => return bad("response_format: expected an object json_schema.schema".to_owned()),
        },
        kind => {
            let kind = kind.unwrap_or("none");
            let expected = "expected type text, json_object or json_schema";
            return bad(format!("response_format: {expected}, got {kind}"));
        }
    };
    // One way to write white space: a model that likes it would write nothing else.
    schema["x-guidance"] = json!({
        "whitespace_flexible": false,
        "item_separator": ", ",
        "key_separator": ": ",
    });
    Ok(Some(schema))
}

impl Grammars {
    /// What keeps `n` answers to a schema. Takes a processor for some time.
    pub(crate) fn constraints(
        &self,
        lease: &Lease,
        schema: Value,
        n: usize,
    ) -> Result<Vec<Box<dyn Constraint>>, ApiError> {
        let refused = |problem: &dyn std::fmt::Display| {
            ApiError::parameter("response_format", format!("response_format: {problem}"))
        };
        let factory = self.factory(lease).map_err(|problem| refused(&problem))?;
        let parser = factory.create_parser(TopLevelGrammar::from_json_schema(schema));
        let matcher = Matcher::new(Ok(parser.map_err(|error| refused(&error))?));
        if let Some(problem) = matcher.get_error() {
            return Err(refused(&problem));
        }
        let one = |_| -> Box<dyn Constraint> { Box::new(Grammar(matcher.deep_clone())) };
        Ok((0..n).map(one).collect())
    }

    fn factory(&self, lease: &Lease) -> Result<Arc<ParserFactory>, String> {
        let (text, vocab_size) = (lease.text(), lease.config().vocab_size);
        let Some(end) = text.stop_tokens.first().copied() else {
            return Err("the model has no token that ends an answer".to_owned());
        };
        let key = (text.tokenizer.digest(), vocab_size, end);
        let known =
            self.factories.lock().unwrap_or_else(PoisonError::into_inner).get(&key).cloned();
        if let Some(factory) = known {
            return Ok(factory);
        }
        let factory = Arc::new(build(lease, vocab_size, end)?);
        let mut factories = self.factories.lock().unwrap_or_else(PoisonError::into_inner);
        if factories.len() >= MOST_FACTORIES {
            factories.clear();
        }
        factories.insert(key, Arc::clone(&factory));
        Ok(factory)
    }
}

fn build(lease: &Lease, vocab_size: usize, end: u32) -> Result<ParserFactory, String> {
    let json = lease.text().tokenizer.to_json().map_err(|error| error.to_string())?;
    let json: Value = serde_json::from_str(&json).map_err(|error| error.to_string())?;
    let mut words = token_bytes_from_tokenizer_json(&json).map_err(|error| error.to_string())?;
    words.resize(vocab_size, Vec::new());
    let n_words = u32::try_from(words.len()).map_err(|error| error.to_string())?;
    let trie = TokTrie::from(&TokRxInfo::new(n_words, end), &words);
    let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
    let mut factory = ParserFactory::new_simple(&env).map_err(|error| error.to_string())?;
    factory.quiet();
    Ok(factory)
}

/// An answer's place in its grammar.
struct Grammar(Matcher);

impl Constraint for Grammar {
    fn restrict(&mut self, logits: &mut [f32]) -> Result<(), String> {
        let mask = self.0.compute_mask_or_eos().map_err(|error| error.to_string())?;
        for (token, logit) in logits.iter_mut().enumerate() {
            if token >= mask.len() || !mask.get(token) {
                *logit = f32::NEG_INFINITY;
            }
        }
        Ok(())
    }

    fn accept(&mut self, token: u32) -> Result<bool, String> {
        self.0.consume_token(token).map_err(|error| error.to_string())?;
        Ok(self.0.is_stopped())
    }
}
