use std::path::{Path, PathBuf};
use std::sync::Arc;

use onebase_format::artifact::Artifact;
use onebase_format::{CONFIG_FILE, Checkpoint, Digest};
use serde_json::Value;

use crate::{ChatTemplate, Error, Result};

const TOKENIZER: &str = "tokenizer.json";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
const GENERATION_CONFIG: &str = "generation_config.json";

/// A tokenizer in the format of the `tokenizers` library; its clones share their tables.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
    digest: Digest,
    path: PathBuf,
}

impl Tokenizer {
    fn read(bytes: &[u8], digest: Digest, path: &Path) -> Result<Self> {
        let bad = |e: tokenizers::Error| Error::Tokenizer {
            path: path.to_owned(),
            problem: e.to_string(),
        };
        let mut inner = tokenizers::Tokenizer::from_bytes(bytes).map_err(bad)?;
        // Left over from training; as in transformers, a prompt is neither cut nor
        // filled up.
        inner.with_truncation(None).map_err(bad)?;
        inner.with_padding(None);
        Ok(Self { inner: Arc::new(inner), digest, path: path.to_owned() })
    }

    fn bad(&self, problem: &dyn std::fmt::Display) -> Error {
        Error::Tokenizer { path: self.path.clone(), problem: problem.to_string() }
    }

    /// Tokens of a text; `add_special_tokens` adds those that begin a document.
    ///
    /// # Errors
    /// When the tokenizer cannot represent the text.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, add_special_tokens);
        encoding.map(|e| e.get_ids().to_vec()).map_err(|e| self.bad(&e))
    }

    /// The text of tokens, special ones left out.
    ///
    /// # Errors
    /// When the tokens cannot be decoded.
    pub fn decode(&self, tokens: &[u32]) -> Result<String> {
        self.inner.decode(tokens, true).map_err(|e| self.bad(&e))
    }

    /// The text of one token, a special one's name; `None` where there is no such token.
    /// Part of a character reads as U+FFFD.
    pub fn token_text(&self, token: u32) -> Option<String> {
        self.inner.id_to_token(token)?;
        self.inner.decode(&[token], false).ok()
    }

    /// A token as the vocabulary writes it, unlike every other; `None` where there is none.
    pub fn token_name(&self, token: u32) -> Option<String> {
        self.inner.id_to_token(token)
    }

    /// Its tables, in the format of the `tokenizers` library.
    ///
    /// # Errors
    /// When they have no text.
    pub fn to_json(&self) -> Result<String> {
        self.inner.to_string(false).map_err(|e| self.bad(&e))
    }

    /// The digest of its file.
    pub fn digest(&self) -> Digest {
        self.digest
    }
}

/// What a model's publisher says of how its tokens are chosen, in `generation_config.json`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct GenerationDefaults {
    /// Divides the logits.
    pub temperature: Option<f32>,
    /// Only the most likely tokens whose probabilities reach it.
    pub top_p: Option<f32>,
    /// Only so many of the most likely tokens.
    pub top_k: Option<usize>,
    /// Divides positive logits of tokens that are there, and multiplies negative ones.
    pub repetition_penalty: Option<f32>,
}

impl GenerationDefaults {
    /// Figures that are out of range are as if they were not there.
    fn from_json(config: &Value) -> Self {
        #[allow(clippy::cast_possible_truncation)]
        let number = |field: &str, most: f64| {
            let value = config[field].as_f64().filter(|v| (0.0..=most).contains(v));
            value.map(|v| v as f32)
        };
        Self {
            temperature: number("temperature", 100.0),
            top_p: number("top_p", 1.0).filter(|p| *p > 0.0),
            top_k: config["top_k"].as_u64().and_then(|k| usize::try_from(k).ok()),
            repetition_penalty: number("repetition_penalty", 100.0).filter(|p| *p > 0.0),
        }
    }
}

/// What turns messages into tokens and tokens into text: tokenizer, chat
/// template and the tokens that end an answer.
#[derive(Debug)]
pub struct TextModel {
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// The chat template, where the model has one.
    pub chat_template: Option<ChatTemplate>,
    /// Tokens that end an answer.
    pub stop_tokens: Vec<u32>,
    /// How tokens are chosen where nobody says it.
    pub defaults: GenerationDefaults,
    path: PathBuf,
}

/// Gives a tokenizer that is in memory already, by the digest of its file.
type Known<'a> = &'a dyn Fn(Digest) -> Option<Tokenizer>;

impl TextModel {
    /// Reads the files of a checkpoint.
    ///
    /// # Errors
    /// When the tokenizer is missing or a file is malformed.
    pub fn from_checkpoint(checkpoint: &Checkpoint) -> Result<Self> {
        Self::read(checkpoint.dir(), |name| Ok(checkpoint.side_file(name)?), &|_| None)
    }

    /// Reads the files of a fine-tune from its artifact, the base's where they
    /// were the same.
    ///
    /// # Errors
    /// When the tokenizer is missing or a file is malformed or has changed.
    pub fn from_artifact(artifact: &Artifact, base: &Checkpoint) -> Result<Self> {
        Self::from_artifact_with(artifact, base, &|_| None)
    }

    /// [`TextModel::from_artifact`], with the tokenizer that `known` gives for the digest of
    /// its file, where it gives one: tables that many tenants have are in memory once.
    ///
    /// # Errors
    /// As there.
    pub fn from_artifact_with(
        artifact: &Artifact,
        base: &Checkpoint,
        known: &dyn Fn(Digest) -> Option<Tokenizer>,
    ) -> Result<Self> {
        Self::read(artifact.dir(), |name| Ok(artifact.side_file(base, name)?), known)
    }

    fn read(
        path: &Path,
        file: impl Fn(&str) -> Result<Option<Vec<u8>>>,
        known: Known<'_>,
    ) -> Result<Self> {
        let path = path.to_owned();
        let Some(bytes) = file(TOKENIZER)? else {
            return Err(Error::MissingFile { path, file: TOKENIZER });
        };
        let digest = Digest::of(&bytes);
        let tokenizer = match known(digest) {
            Some(tokenizer) => tokenizer,
            None => Tokenizer::read(&bytes, digest, &path)?,
        };
        let json = |name| read_json(name, &file, &path);
        let tokenizer_config = json(TOKENIZER_CONFIG)?;
        let own_template = match file("chat_template.jinja")? {
            Some(bytes) => Some(String::from_utf8_lossy(&bytes).into_owned()),
            None => json("chat_template.json")?["chat_template"].as_str().map(str::to_owned),
        };
        let template = own_template.or_else(|| default_template(&tokenizer_config));
        let special = |name: &str| {
            let token = &tokenizer_config[name];
            token.as_str().or_else(|| token["content"].as_str()).map(str::to_owned)
        };
        let chat_template = template
            .map(|source| {
                ChatTemplate::new(source, special("bos_token"), special("eos_token"), &path)
            })
            .transpose()?;
        let stop_tokens = special_tokens("eos_token_id", &file, &path)?;
        let defaults = GenerationDefaults::from_json(&json(GENERATION_CONFIG)?);
        Ok(Self { tokenizer, chat_template, stop_tokens, defaults, path })
    }

    /// Tokens of a conversation, up to where the answer begins.
    ///
    /// # Errors
    /// When there is no chat template, it refuses the messages, or the text
    /// cannot be tokenized.
    pub fn encode_chat<M: serde::Serialize>(&self, messages: &[M]) -> Result<Vec<u32>> {
        let Some(template) = &self.chat_template else {
            return Err(Error::NoChatTemplate { path: self.path.clone() });
        };
        // The template writes the special tokens itself.
        self.tokenizer.encode(&template.render(messages, true)?, false)
    }
}

/// The token with which a checkpoint's documents begin, where it says one.
///
/// # Errors
/// When a configuration cannot be read or is malformed.
pub fn start_token(checkpoint: &Checkpoint) -> Result<Option<u32>> {
    let file = |name: &str| Ok(checkpoint.side_file(name)?);
    Ok(special_tokens("bos_token_id", &file, checkpoint.dir())?.first().copied())
}

/// The tokens with which a checkpoint's answers end, [`TextModel::stop_tokens`], for a
/// model that may have no tokenizer.
///
/// # Errors
/// When a configuration cannot be read or is malformed.
pub fn stop_tokens(checkpoint: &Checkpoint) -> Result<Vec<u32>> {
    let file = |name: &str| Ok(checkpoint.side_file(name)?);
    special_tokens("eos_token_id", &file, checkpoint.dir())
}

/// What the generation's configuration says, else the model's.
fn special_tokens(
    field: &str,
    file: &dyn Fn(&str) -> Result<Option<Vec<u8>>>,
    path: &Path,
) -> Result<Vec<u32>> {
    for name in [GENERATION_CONFIG, CONFIG_FILE] {
        let ids = token_ids(&read_json(name, file, path)?[field]);
        if !ids.is_empty() {
            return Ok(ids);
        }
    }
    Ok(Vec::new())
}

/// A JSON file; null where it is not there.
fn read_json(
    name: &'static str,
    file: &dyn Fn(&str) -> Result<Option<Vec<u8>>>,
    path: &Path,
) -> Result<Value> {
    let Some(bytes) = file(name)? else { return Ok(Value::Null) };
    let path = path.to_owned();
    serde_json::from_slice(&bytes).map_err(|source| Error::Json { path, file: name, source })
}

/// `chat_template` of a tokenizer's configuration: a text, or a list of named
/// ones of which `default` is for plain conversations.
fn default_template(config: &Value) -> Option<String> {
    let template = &config["chat_template"];
    let named = template.as_array().into_iter().flatten();
    let default = named.into_iter().find(|t| t["name"] == "default").map(|t| &t["template"]);
    template.as_str().or_else(|| default.and_then(Value::as_str)).map(str::to_owned)
}

fn token_ids(value: &Value) -> Vec<u32> {
    let id = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Value::Array(ids) => ids.iter().filter_map(id).collect(),
        one => id(one).into_iter().collect(),
    }
}
