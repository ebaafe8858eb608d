use std::path::PathBuf;

/// Why a model could not be compressed, verified or restored.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Files could not be read or written.
    #[error(transparent)]
    Format(#[from] onebase_format::Error),
    /// A checkpoint is not a supported model, or base and fine-tune do not fit.
    #[error(transparent)]
    Model(#[from] onebase_model::Error),
    /// A weight is NaN or ∞.
    #[error("{}: tensor {tensor}, row {row}, column {column}: {got} is not a finite number", path.display())]
    NotFinite {
        /// The file of the weight.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its row.
        row: usize,
        /// Its column.
        column: usize,
        /// NaN or ∞.
        got: f32,
    },
    /// A codec failed on a tensor.
    #[error("{}: tensor {tensor}", path.display())]
    Codec {
        /// Checkpoint or artifact.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What the codec said.
        source: onebase_codec::Error,
    },
    /// The fine-tune is the base.
    #[error("{} has the same weights as the base", path.display())]
    NoChange {
        /// The fine-tune.
        path: PathBuf,
    },
}

impl Error {
    /// What the user may do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Error::Format(e) => e.hint(),
            Error::Model(e) => e.hint(),
            Error::Codec { source, .. } => source.hint(),
            Error::NotFinite { .. } => Some(
                "a checkpoint with NaN or ∞ is broken; look for a diverged training run".into(),
            ),
            Error::NoChange { .. } => {
                Some("give the fine-tuned checkpoint; there is no delta to store".into())
            }
        }
    }
}
