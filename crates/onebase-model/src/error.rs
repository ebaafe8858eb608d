use std::path::PathBuf;

use onebase_format::Digest;
use onebase_tensor::DType;

/// Why a model could not be loaded or run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Files could not be read or do not belong together.
    #[error(transparent)]
    Format(#[from] onebase_format::Error),
    /// A delta could not be prepared.
    #[error("{}: tensor {tensor}", path.display())]
    Delta {
        /// The artifact.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What is wrong with its delta.
        source: onebase_codec::Error,
    },
    /// A delta decodes to a shape the model does not have.
    #[error("{}: tensor {tensor}: expected shape {expected:?}, got {got:?}", path.display())]
    Shape {
        /// Checkpoint or artifact.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The shape that follows from the configuration.
        expected: Vec<usize>,
        /// The shape it has.
        got: Vec<usize>,
    },
    /// A stored tensor is of another type than the configuration says.
    #[error("{}: tensor {tensor}: expected {expected}, got {got}", path.display())]
    ElementType {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The type that follows from the configuration.
        expected: DType,
        /// The type it has.
        got: DType,
    },
    /// Codes of a quantized base are not those of its record.
    #[error(
        "{}: the codes of {tensor} have the digest {got}, the record says {}",
        path.display(),
        expected.map_or_else(|| "nothing".to_owned(), |digest| digest.to_string())
    )]
    OtherCodes {
        /// The quantized base.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What the record says.
        expected: Option<Digest>,
        /// What is there.
        got: Digest,
    },
    /// A tensor is there that the architecture does not have.
    #[error("{}: unexpected tensor {tensor}", path.display())]
    UnexpectedTensor {
        /// The checkpoint.
        path: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// The configuration ties the head to the embedding, but it is another matrix.
    #[error(
        "{}: lm_head.weight differs from model.embed_tokens.weight, \
         but config.json has tie_word_embeddings: true",
        path.display()
    )]
    UntiedHead {
        /// The file of the head.
        path: PathBuf,
    },
    /// A field of the configuration is missing or malformed.
    #[error("{}: config field {field}: expected {expected}, got {got}", path.display())]
    Config {
        /// The checkpoint or artifact.
        path: PathBuf,
        /// The field.
        field: &'static str,
        /// What it can be.
        expected: &'static str,
        /// What it is.
        got: String,
    },
    /// Base and fine-tune are not the same kind of model.
    #[error(
        "{} does not fit the base: {field} is {got}, the base has {expected}",
        path.display()
    )]
    OtherModel {
        /// The fine-tune or artifact.
        path: PathBuf,
        /// What differs.
        field: &'static str,
        /// The base's.
        expected: String,
        /// The fine-tune's.
        got: String,
    },
    /// A file of the tokenizer or the chat template is missing.
    #[error("{} has no {file}", path.display())]
    MissingFile {
        /// The checkpoint or artifact.
        path: PathBuf,
        /// The file.
        file: &'static str,
    },
    /// The tokenizer could not be read or failed.
    #[error("{}: tokenizer: {problem}", path.display())]
    Tokenizer {
        /// The checkpoint or artifact.
        path: PathBuf,
        /// What the library said.
        problem: String,
    },
    /// A JSON file beside the weights is malformed.
    #[error("{}: {file}", path.display())]
    Json {
        /// The checkpoint or artifact.
        path: PathBuf,
        /// The file.
        file: &'static str,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// The chat template does not compile or refuses the messages.
    #[error("{}: chat template", path.display())]
    ChatTemplate {
        /// The checkpoint or artifact.
        path: PathBuf,
        /// What the template said.
        source: minijinja::Error,
    },
    /// The model has no chat template.
    #[error("{} has no chat template", path.display())]
    NoChatTemplate {
        /// The checkpoint or artifact.
        path: PathBuf,
    },
    /// A token is outside the vocabulary.
    #[error("token {token} is outside the vocabulary of {vocab_size}")]
    Token {
        /// The token.
        token: u32,
        /// The tenant's vocabulary.
        vocab_size: usize,
    },
    /// The model computed no finite logit.
    #[error("the logits after {n_tokens} tokens are not finite numbers")]
    NotFinite {
        /// Tokens of the sequence so far.
        n_tokens: usize,
    },
    /// A prompt has no token.
    #[error("the prompt is empty")]
    EmptyPrompt,
    /// A prompt leaves no room for an answer.
    #[error("the prompt has {n_tokens} tokens, the context holds {context_tokens}")]
    ContextTooLong {
        /// Tokens of the prompt.
        n_tokens: usize,
        /// Positions of the model.
        context_tokens: usize,
    },
}

impl Error {
    /// What the user may do about it.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Error::Format(e) => return e.hint(),
            Error::Delta { source, .. } => return source.hint(),
            Error::Config { field: "architectures", .. } => {
                "supported are Llama, Mistral, Mixtral, Qwen2 and Qwen3 decoders, Qwen3's with experts \
                 too"
                    .into()
            }
            Error::Config { field: "quantization_config", .. } => {
                "use the 16- or 32-bit checkpoint, or what `onebase quantize` makes of it".into()
            }
            Error::Config { .. } => {
                "config.json is damaged or was edited; fetch it again, or compare it with the \
                 model's on its hub"
                    .into()
            }
            Error::Shape { .. } | Error::UnexpectedTensor { .. } => {
                "weights and config.json are of two models; fetch both from the same place".into()
            }
            Error::ElementType { .. } | Error::OtherCodes { .. } => {
                "the folder was changed after it was written; copy it again, or run `onebase \
                 quantize`"
                    .into()
            }
            Error::OtherModel { field: "the basis", .. } => {
                "a delta serves on the base that it was compressed against, quantized or not: \
                 compress the fine-tune against this one"
                    .into()
            }
            Error::UntiedHead { .. } => {
                "set tie_word_embeddings to false, in the base too, or remove the head".into()
            }
            Error::NotFinite { .. } => {
                "the weights or the configuration of this model are broken; `onebase verify` \
                 checks an artifact"
                    .into()
            }
            Error::OtherModel { .. } => {
                "a delta needs the base that the fine-tune was trained from".into()
            }
            Error::MissingFile { .. } => {
                "a model that answers text needs tokenizer.json; transformers' save_pretrained \
                 writes it"
                    .into()
            }
            Error::NoChatTemplate { .. } => {
                "give a plain prompt with --raw, or add chat_template.jinja to the checkpoint"
                    .into()
            }
            _ => return None,
        })
    }
}
