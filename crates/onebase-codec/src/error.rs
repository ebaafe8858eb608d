use onebase_tensor::PartError;

/// Why a delta could not be encoded or decoded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No codec has this name.
    #[error("unknown codec {got:?}")]
    UnknownCodec {
        /// The name that was given.
        got: String,
        /// The registered name that is closest to it.
        nearest: &'static str,
        /// All registered names.
        known: Vec<&'static str>,
    },
    /// A codec has no such option.
    #[error("codec {codec} has no option {got:?}")]
    UnknownOption {
        /// The codec.
        codec: &'static str,
        /// The option that was given.
        got: String,
        /// The options it has.
        known: Vec<&'static str>,
    },
    /// An option has a value it cannot take.
    #[error("codec {codec}, option {option}: expected {expected}, got {got}")]
    BadOption {
        /// The codec.
        codec: &'static str,
        /// The option.
        option: &'static str,
        /// What it can be.
        expected: String,
        /// What was given.
        got: String,
    },
    /// An option is given twice.
    #[error("option {option} is given twice")]
    RepeatedOption {
        /// The option.
        option: String,
    },
    /// The parts were written by a newer version of the codec.
    #[error("codec {codec}: parts of version {got}, this program reads up to {newest}")]
    NewerParts {
        /// The codec.
        codec: &'static str,
        /// The newest version that is read.
        newest: u32,
        /// The version of the parts.
        got: u32,
    },
    /// The deltas of a codec cannot be rescaled in their parts.
    #[error("codec {codec} has no scales that can be changed after encoding")]
    NotRescalable {
        /// The codec.
        codec: &'static str,
        /// The codecs that have.
        known: Vec<&'static str>,
    },
    /// The delta holds NaN or ∞.
    #[error("row {row}, column {column}: {got} is not a finite number")]
    NotFinite {
        /// Its row.
        row: usize,
        /// Its column.
        column: usize,
        /// NaN or ∞.
        got: f32,
    },
    /// A decomposition of a matrix did not converge.
    #[error("the {decomposition} of a {}x{} matrix did not converge", shape[0], shape[1])]
    NoConvergence {
        /// What was computed.
        decomposition: &'static str,
        /// `[rows, columns]`.
        shape: [usize; 2],
    },
    /// Products on the way are beyond the range of numbers.
    #[error(
        "products of weights and inputs are no finite numbers: element {row}, {column} is {got}"
    )]
    Overflow {
        /// A row of a matrix that the encoder made.
        row: usize,
        /// Its column.
        column: usize,
        /// NaN or ∞.
        got: f64,
    },
    /// The second moment of inputs is not one, whatever is added to its diagonal.
    #[error(
        "the second moment of {n} inputs is not positive definite, even with {damping} times the \
         mean of its diagonal added to it"
    )]
    NotPositiveDefinite {
        /// Inputs.
        n: usize,
        /// The most damping that was tried, as a part of the mean.
        damping: f64,
    },
    /// A part is not what the codec wrote.
    #[error(transparent)]
    Part(#[from] PartError),
    /// The delta could not be read.
    #[error("cannot read the delta")]
    Source(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl Error {
    /// What the user may do about it.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Error::UnknownCodec { nearest, known, .. } => {
                format!("did you mean `{nearest}`? there are {}", known.join(", "))
            }
            Error::UnknownOption { known, .. } => format!("it has {}", known.join(", ")),
            Error::NotRescalable { known, .. } => format!("{} have", known.join(", ")),
            Error::NewerParts { .. } => "install a newer onebase".into(),
            Error::NotFinite { .. } => {
                "a checkpoint with NaN or ∞ is broken; look for a diverged training run".into()
            }
            Error::NoConvergence { .. } => {
                "choose a codec that decomposes no matrix, such as `rtn`".into()
            }
            Error::Overflow { .. } => {
                "look for weights, or statistics of inputs, of extreme size".into()
            }
            Error::NotPositiveDefinite { .. } => {
                "measure the inputs again: a second moment has no negative eigenvalues".into()
            }
            Error::Part(_) => {
                "the artifact was altered after it was written; fetch it again".into()
            }
            _ => return None,
        })
    }
}
