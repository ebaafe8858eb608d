use std::path::PathBuf;

use onebase_format::artifact::BaseRecord;

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
    /// A decomposition failed.
    #[error("the rotations could not be computed")]
    Numerics(#[source] onebase_codec::Error),
    /// A base that is quantized cannot be quantized again.
    #[error("{} is quantized already", path.display())]
    AlreadyQuantized {
        /// The folder.
        path: PathBuf,
    },
    /// Bases with experts cannot be quantized.
    #[error("{} has experts, which cannot be quantized", path.display())]
    QuantizedExperts {
        /// The folder.
        path: PathBuf,
    },
    /// What is served on a quantized base is in no checkpoint's basis.
    #[error("{} is quantized: nothing can be restored on it", path.display())]
    RestoreOnQuantized {
        /// The folder.
        path: PathBuf,
    },
    /// A quantized base was expected.
    #[error("{} is not a quantized base", path.display())]
    NotQuantized {
        /// The folder.
        path: PathBuf,
    },
    /// A rotated model does not compute what its original does.
    #[error(
        "{}: the logits of the rotated model differ by {got:.2e} of their length, expected at \
         most {expected:.0e}",
        path.display()
    )]
    RotationFailed {
        /// The base.
        path: PathBuf,
        /// How far the logits are apart.
        got: f64,
        /// How far they may be.
        expected: f64,
    },
    /// The full base is not the one that was quantized.
    #[error(
        "{} was not quantized from this base: {tensor} has the digest {got} in its basis, \
         expected {}",
        quantized.display(),
        expected.map_or_else(|| "no such tensor".to_owned(), |digest| digest.to_string())
    )]
    OtherFull {
        /// The quantized base.
        quantized: PathBuf,
        /// The tensor.
        tensor: String,
        /// What its record says.
        expected: Option<onebase_format::Digest>,
        /// That of the given base.
        got: onebase_format::Digest,
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
    /// A part of an archived tensor could not be decoded.
    #[error("{}: tensor {tensor}, from byte {at} on", path.display())]
    Lossless {
        /// The archive's file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Where the part begins in the tensor.
        at: u64,
        /// Which block is damaged.
        source: onebase_codec::lossless::Error,
    },
    /// A checkpoint is not what it was when an interrupted run began.
    #[error("{}: tensor {tensor} has changed since the run began whose work is in {}", path.display(), work.display())]
    InputChanged {
        /// The file of the tensor.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What the run has left.
        work: PathBuf,
    },
    /// No size of the codec is within the budget.
    #[error("{budget} is less than the codec {codec} can do: the least is {least}")]
    OverBudget {
        /// What was asked for.
        budget: String,
        /// The codec.
        codec: String,
        /// The least size, in the unit of the budget.
        least: String,
    },
    /// A codec cannot choose how many bits a weight takes.
    #[error("{codec} has no option `bits`, by which sites could have sizes of their own")]
    OneSize {
        /// The codec.
        codec: String,
    },
    /// There are more shards than tensors.
    #[error("{count} shards, expected at most {n_tensors}: one for each tensor")]
    TooManyShards {
        /// Shards that were asked for.
        count: usize,
        /// Tensors of the fine-tune.
        n_tensors: usize,
    },
    /// The size of a codec depends on the weights.
    #[error("the size of {codec} is known only after encoding, expected one that is known before")]
    UnknownSize {
        /// The codec.
        codec: String,
    },
    /// A codec cannot weigh errors by the inputs of a site.
    #[error("codec {codec} cannot be calibrated by statistics")]
    NotCalibrated {
        /// The codec.
        codec: &'static str,
        /// The codecs that can.
        known: Vec<&'static str>,
    },
    /// Inputs are to be measured while compressing, but linear sites are not encoded one
    /// after the other in one process.
    #[error(
        "inputs are measured while linear sites are compressed in their order, which {what} does not keep"
    )]
    OutOfOrder {
        /// What does not.
        what: &'static str,
    },
    /// Statistics are of neither model of a pair.
    #[error("{}: of the model {}, expected those of {}", path.display(), model(got),
        expected.iter().map(model).collect::<Vec<_>>().join(" or "))]
    OtherStatistics {
        /// The statistics.
        path: PathBuf,
        /// The base and the fine-tune.
        expected: Vec<BaseRecord>,
        /// The model that was measured.
        got: BaseRecord,
    },
    /// What a site reads is NaN or ∞, or too large to be squared.
    #[error("{}: {input}: the inputs are no finite numbers", path.display())]
    InputNotFinite {
        /// The model.
        path: PathBuf,
        /// The input.
        input: String,
    },
    /// A text is too short to fit scales on a part of it and judge them on another.
    #[error("a text of {n_tokens} tokens, expected at least {least}")]
    ShortText {
        /// Its tokens.
        n_tokens: usize,
        /// The fewest.
        least: usize,
    },
    /// Logits are NaN or ∞.
    #[error("{}: logits are no finite numbers", path.display())]
    LogitsNotFinite {
        /// The artifact.
        path: PathBuf,
    },
    /// Two fine-tunes of a family have one name.
    #[error("two tenants are called {name:?}")]
    TwoTenants {
        /// The name.
        name: String,
    },
    /// Two fine-tunes of a family have the same weights at all linear sites.
    #[error("{name:?} has the same linear weights as {other:?}")]
    SameWeights {
        /// A tenant.
        name: String,
        /// The other one.
        other: String,
    },
    /// A family is of another base.
    #[error("{}: of the base {}, got {}", family.display(), model(expected), model(got))]
    OtherFamilyBase {
        /// The family.
        family: PathBuf,
        /// Its base.
        expected: BaseRecord,
        /// That which was given.
        got: BaseRecord,
    },
    /// A family was built from other fine-tunes than those that were given.
    #[error("tenant {name:?} was made from the fine-tune {expected}, got {}", got.as_deref().unwrap_or("none"))]
    OtherOriginal {
        /// The tenant.
        name: String,
        /// The digest of the fine-tune that it was made from.
        expected: String,
        /// That of what was given, if something was.
        got: Option<String>,
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
            Error::Codec { source, .. } | Error::Numerics(source) => source.hint(),
            Error::NotFinite { .. } => Some(
                "a checkpoint with NaN or ∞ is broken; look for a diverged training run".into(),
            ),
            Error::NotQuantized { .. } => Some(
                "`onebase quantize` makes one; `onebase compress` without --full-base is for \
                 others"
                    .into(),
            ),
            Error::RestoreOnQuantized { .. } => Some(
                "an artifact that was compressed against the full base restores there; `onebase \
                 archive` keeps a fine-tune to the byte"
                    .into(),
            ),
            Error::AlreadyQuantized { .. } => {
                Some("quantize the 16- or 32-bit model that it was made of".into())
            }
            Error::QuantizedExperts { .. } => Some("serve its deltas on the 16-bit base".into()),
            Error::RotationFailed { .. } => Some(
                "weights of very different sizes lose digits when they are rotated; --method rtn \
                 rotates nothing"
                    .into(),
            ),
            Error::OtherFull { .. } => Some(
                "give the model that was quantized; on another kind of processor its rotation may \
                 differ in the last digits: leave out --full-base there"
                    .into(),
            ),
            Error::Lossless { .. } => Some(
                "the archive was altered after it was written; fetch it again. Its other tensors \
                 are whole"
                    .into(),
            ),
            Error::InputChanged { .. } => {
                Some("give the checkpoints that it began with, or start over with --restart".into())
            }
            Error::OverBudget { .. } => Some(
                "raise the budget, or choose a codec that goes lower; `onebase codecs` lists them"
                    .into(),
            ),
            Error::OneSize { .. } => Some(
                "leave out --allocate, or choose a codec that has; `onebase codecs` lists them"
                    .into(),
            ),
            Error::TooManyShards { .. } => Some("take fewer, for example one a machine".into()),
            Error::UnknownSize { .. } => {
                Some("choose its size by its own options instead of a budget".into())
            }
            Error::NotCalibrated { known, .. } if known.is_empty() => {
                Some("leave out --statistics or --calibration: no codec can".into())
            }
            Error::NotCalibrated { known, .. } => Some(format!(
                "{} can; or leave out --statistics or --calibration",
                known.join(", ")
            )),
            Error::OutOfOrder { .. } => Some(
                "measure the base or the fine-tune before, with `onebase calibrate`, and give \
                 --statistics"
                    .into(),
            ),
            Error::OtherStatistics { .. } => {
                Some("measure the base or the fine-tune with `onebase calibrate`".into())
            }
            Error::ShortText { .. } => Some(
                "give a longer text, or more of it with --tokens, --distill-tokens or \
                 --calibration-tokens"
                    .into(),
            ),
            Error::LogitsNotFinite { .. } | Error::InputNotFinite { .. } => {
                Some("look for weights of extreme size".into())
            }
            Error::OtherFamilyBase { .. } => {
                Some("give the base that the family was built with".into())
            }
            Error::TwoTenants { .. } => Some("give one of them another name: NAME=FINETUNE".into()),
            Error::SameWeights { .. } => {
                Some("give each fine-tune once; a tenant can be asked for by any name".into())
            }
            Error::OtherOriginal { .. } => Some(
                "give every fine-tune of the family as NAME=FINETUNE, or remove the tenant first"
                    .into(),
            ),
            Error::NoChange { .. } => {
                Some("give the fine-tuned checkpoint; there is no delta to store".into())
            }
        }
    }
}

/// A model as people and programs tell it from others.
fn model(record: &BaseRecord) -> String {
    format!("{} ({})", record.name, record.blake3)
}
