use std::path::PathBuf;

/// Why something could not be measured.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Files could not be read or written.
    #[error(transparent)]
    Format(#[from] onebase_format::Error),
    /// A model could not be loaded or run.
    #[error(transparent)]
    Model(#[from] onebase_model::Error),
    /// A fine-tune could not be compressed or a delta not be read.
    #[error(transparent)]
    Compress(#[from] onebase_compress::Error),
    /// A codec or a decomposition failed.
    #[error(transparent)]
    Codec(#[from] onebase_codec::Error),
    /// A file could not be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A codec's compression failed.
    #[error("compressing with {codec} failed")]
    Compressor {
        /// The codec with its options.
        codec: String,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A folder that is no longer needed could not be removed.
    #[error("cannot remove {}", path.display())]
    Remove {
        /// The folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A line of a file is not what it must be.
    #[error("{}, line {line}: {problem}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong with it.
        problem: String,
    },
    /// A task has no question.
    #[error("{} has no question", path.display())]
    NoQuestion {
        /// The file.
        path: PathBuf,
    },
    /// A text is empty.
    #[error("{} has no text", path.display())]
    EmptyText {
        /// The file.
        path: PathBuf,
    },
    /// A text has too few tokens to predict one.
    #[error("{}: {n_tokens} tokens, expected at least 2", path.display())]
    ShortText {
        /// The file.
        path: PathBuf,
        /// Its tokens.
        n_tokens: usize,
    },
    /// A question cannot be asked.
    #[error("{}, line {line}", path.display())]
    Question {
        /// The file of the task.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong with it.
        source: onebase_model::Error,
    },
    /// A text cannot be used.
    #[error("{}", path.display())]
    Text {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: onebase_model::Error,
    },
    /// Two tasks have one name.
    #[error("two tasks are called {name}")]
    SameName {
        /// The name.
        name: String,
    },
    /// A question and its answer do not fit into the context.
    #[error(
        "{}, line {line}: prompt and answer have {n_tokens} tokens, the context holds {context_tokens}",
        path.display()
    )]
    TooLong {
        /// The file of the task.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// Tokens of the prompt and the answer.
        n_tokens: usize,
        /// Positions of the fine-tune.
        context_tokens: usize,
    },
    /// There is nothing to measure with.
    #[error("neither a task nor a text is given")]
    NothingToMeasure,
    /// An artifact was made from another fine-tune than the one it is compared
    /// with.
    #[error("{} was not made from {}: {what} differs", artifact.display(), finetune.display())]
    OtherFineTune {
        /// The artifact.
        artifact: PathBuf,
        /// The fine-tune.
        finetune: PathBuf,
        /// The tensor or the file that differs.
        what: String,
    },
    /// A model computed no finite logit.
    #[error("the logits are not finite numbers")]
    NotFinite,
    /// The report could not be made.
    #[error("cannot make the report")]
    Report(#[source] minijinja::Error),
}

impl Error {
    /// What the user may do about it.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Error::Format(e) => return e.hint(),
            Error::Model(e) => return e.hint(),
            Error::Compress(e) => return e.hint(),
            Error::Codec(e) => return e.hint(),
            Error::Line { .. } | Error::NoQuestion { .. } => {
                "a task is JSON lines: {\"messages\": [{\"role\": \"user\", \"content\": \"…\"}], \
                 \"answer\": \"…\"}, or \"prompt\": \"…\" in place of the messages"
                    .into()
            }
            Error::SameName { .. } => "a task is called after its file; rename one".into(),
            Error::Question { source: onebase_model::Error::NoChatTemplate { .. }, .. } => {
                "a task of messages needs a chat template; add chat_template.jinja to the \
                 fine-tune, or ask with \"prompt\" in place of the messages"
                    .into()
            }
            Error::Question { source: onebase_model::Error::Token { .. }, .. }
            | Error::Text { source: onebase_model::Error::Token { .. }, .. } => {
                "the tokenizer knows a token that the weights have no row for".into()
            }
            Error::Question { source, .. } | Error::Text { source, .. } => return source.hint(),
            Error::TooLong { .. } => "leave the question out, or shorten it".into(),
            Error::NothingToMeasure => {
                "give --tasks with files of questions, --text with a plain text, or both".into()
            }
            Error::OtherFineTune { .. } => {
                "--reference must be the checkpoint that the artifact was compressed from".into()
            }
            Error::NotFinite => {
                "the weights or the configuration of this model are broken; `onebase verify` \
                 checks an artifact"
                    .into()
            }
            _ => return None,
        })
    }
}
