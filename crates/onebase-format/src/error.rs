use std::path::{Path, PathBuf};

use safetensors::SafeTensorError;

use crate::{Digest, Sha256};

/// Why a checkpoint or an artifact could not be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What it said.
        source: std::io::Error,
    },
    /// A folder lacks what makes it a checkpoint or an artifact.
    #[error("{} is no {expected}: it has no {missing}", path.display())]
    NotA {
        /// The folder.
        path: PathBuf,
        /// What was wanted.
        expected: &'static str,
        /// The file that is missing.
        missing: &'static str,
    },
    /// A file of codes that tenants of a family share is not what their manifests say.
    #[error("{} {problem}; it holds codes of {}", path.display(), tenants.join(", "))]
    Node {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
        /// The tenants that name it.
        tenants: Vec<String>,
    },
    /// A family has no such tenant.
    #[error("{} has no tenant {got:?}", family.display())]
    NoTenant {
        /// The family.
        family: PathBuf,
        /// What was asked for.
        got: String,
        /// The tenants that it has.
        known: Vec<String>,
    },
    /// The index names a shard that is not there.
    #[error("{}: shard {shard} is missing", index.display())]
    MissingShard {
        /// The index file.
        index: PathBuf,
        /// The shard's file name.
        shard: String,
    },
    /// The index and the shards disagree on where a tensor is.
    #[error("{}: tensor {tensor} is not in {shard}, where the index puts it", index.display())]
    IndexMismatch {
        /// The index file.
        index: PathBuf,
        /// The tensor.
        tensor: String,
        /// The shard it should be in.
        shard: String,
    },
    /// Two shards hold the same tensor.
    #[error("{}: tensor {tensor} is also in {}", path.display(), other.display())]
    DuplicateTensor {
        /// One shard.
        path: PathBuf,
        /// The other.
        other: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// A safetensors header is truncated, malformed or does not cover its file.
    #[error("{}: bad safetensors header", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: SafeTensorError,
    },
    /// A JSON file does not parse or lacks something.
    #[error("{}: bad JSON", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// A file name in an index or a manifest leads out of its folder.
    #[error("{}: {name:?} is not a plain file name", path.display())]
    UnsafeName {
        /// The file that names it.
        path: PathBuf,
        /// The name.
        name: String,
    },
    /// A tensor was asked for that the file does not have.
    #[error("{}: tensor {tensor} is missing", path.display())]
    MissingTensor {
        /// File or folder.
        path: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// A tensor has an element type that no weight has here.
    #[error("{}: tensor {tensor} has type {got}, expected BF16, F16 or F32", path.display())]
    UnsupportedDType {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its type.
        got: String,
    },
    /// The experts of a block lie in one tensor that cannot be taken apart.
    #[error("{}: tensor {tensor}: expected shape {expected}, got {got:?}", path.display())]
    StackedShape {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What its dimensions mean.
        expected: &'static str,
        /// Its shape.
        got: Vec<usize>,
    },
    /// The folder to write is already there.
    #[error("{} already exists", path.display())]
    Exists {
        /// The folder.
        path: PathBuf,
    },
    /// Another process is writing the same folder.
    #[error("another process is writing {}", path.display())]
    Busy {
        /// The folder.
        path: PathBuf,
    },
    /// What an interrupted run has left is of another run than this one.
    #[error("{}: belongs to another run: {what} is {got}, here it is {expected}", path.display())]
    OtherRun {
        /// The folder of what is left.
        path: PathBuf,
        /// In what the runs differ.
        what: String,
        /// What it is in this run.
        expected: String,
        /// What it is in the other.
        got: String,
    },
    /// Not every shard is complete.
    #[error("{}: shard {index} of {count} is not complete", path.display())]
    UnfinishedShard {
        /// The folder of the shard, which may be missing.
        path: PathBuf,
        /// Which shard.
        index: usize,
        /// How many there are.
        count: usize,
    },
    /// The folder holds another kind of manifest.
    #[error("{}: format is {got:?}, expected {expected:?}", path.display())]
    OtherFormat {
        /// The manifest.
        path: PathBuf,
        /// The format this program reads.
        expected: &'static str,
        /// The format it names.
        got: String,
    },
    /// The manifest is from a newer version of the format.
    #[error("{}: format version {got}, this program reads up to {newest}", path.display())]
    NewerFormat {
        /// The manifest.
        path: PathBuf,
        /// The newest version this program reads.
        newest: u32,
        /// The version it has.
        got: u64,
    },
    /// A manifest entry contradicts the files beside it.
    #[error("{}: {entry}: {problem}", path.display())]
    Manifest {
        /// The manifest.
        path: PathBuf,
        /// The entry.
        entry: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A file of the artifact has another length than the manifest says.
    #[error("{}: expected {expected} bytes, got {got}", path.display())]
    FileSize {
        /// The file.
        path: PathBuf,
        /// Bytes by the manifest.
        expected: u64,
        /// Bytes on disk.
        got: u64,
    },
    /// A file of the artifact has other contents than were written.
    #[error("{}: contents changed: expected digest {expected}, got {got}", path.display())]
    FileDigest {
        /// The file.
        path: PathBuf,
        /// Digest by the manifest.
        expected: Digest,
        /// Digest of the bytes on disk.
        got: Digest,
    },
    /// A tensor has other contents than were written.
    #[error(
        "{}: {tensor}: contents changed: expected digest {expected}, got {got}",
        path.display()
    )]
    TensorDigest {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its digest by the manifest.
        expected: Digest,
        /// The digest of what is on disk.
        got: Digest,
    },
    /// Statistics lack an input of a model's linear sites.
    #[error("{}: {input} was not measured", path.display())]
    MissingInput {
        /// The statistics' manifest.
        path: PathBuf,
        /// The input.
        input: String,
    },
    /// Statistics are of a model whose sites have other sizes.
    #[error("{}: {input}: expected {expected} input features, got {got}", path.display())]
    InFeatures {
        /// The statistics' manifest.
        path: PathBuf,
        /// The input.
        input: String,
        /// Of the model.
        expected: usize,
        /// That were measured.
        got: usize,
    },
    /// Something in a folder is neither a file nor a folder, or its name is no text.
    #[error("{} is neither a file nor a folder with a name in UTF-8", path.display())]
    NoFile {
        /// What it is called.
        path: PathBuf,
    },
    /// A file came out other than it was, or the base's has changed.
    #[error("{}: expected SHA-256 {expected}, got {got}", path.display())]
    OtherContents {
        /// The file.
        path: PathBuf,
        /// What it should be.
        expected: Sha256,
        /// What it is.
        got: Sha256,
    },
    /// The base is not the one the artifact was made against.
    #[error(
        "{}: made against another base: {tensor} has digest {got} in {}, expected {expected}",
        artifact.display(),
        base.display()
    )]
    OtherBase {
        /// The artifact.
        artifact: PathBuf,
        /// The base that was given.
        base: PathBuf,
        /// The first tensor that differs.
        tensor: String,
        /// Digest by the manifest.
        expected: Digest,
        /// Digest of the base's tensor.
        got: Digest,
    },
}

impl Error {
    pub(crate) fn io(
        action: &'static str,
        path: impl AsRef<Path>,
    ) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.as_ref().to_owned();
        move |source| Error::Io { action, path, source }
    }

    /// What the user may do about it.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Error::NotA { missing: crate::CONFIG_FILE, .. } => {
                "give the folder of a Hugging Face checkpoint: config.json, *.safetensors, \
                 tokenizer.json; a LoRA adapter must be merged into its base first"
                    .into()
            }
            Error::NotA { missing: "model.safetensors", .. } => {
                "only safetensors weights are read; convert pytorch_model.bin with transformers' \
                 save_pretrained"
                    .into()
            }
            Error::NotA { missing: crate::statistics::STATISTICS_FILE, .. } => {
                "give a folder written by `onebase calibrate`".into()
            }
            Error::NotA { missing: crate::archive::ARCHIVE_FILE, .. } => {
                "give a folder written by `onebase archive`, or leave out --exact".into()
            }
            Error::OtherContents { .. } => {
                "the base was changed or the archive is damaged; fetch them again".into()
            }
            Error::NoFile { .. } => "move it elsewhere: an archive holds plain files alone".into(),
            Error::MissingInput { .. } | Error::InFeatures { .. } => {
                "they are of another model; measure this one with `onebase calibrate`".into()
            }
            Error::NotA { missing: crate::family::FAMILY_FILE, .. } => {
                "give a folder written by `onebase compress --codec rqt`".into()
            }
            Error::Node { .. } => {
                "fetch the family again, or rebuild it from its fine-tunes with `onebase family \
                 rebuild`"
                    .into()
            }
            Error::NoTenant { known, .. } => format!("it has {}", known.join(", ")),
            Error::NotA { .. } => "give a folder written by `onebase compress`".into(),
            Error::MissingShard { .. } => "the download is incomplete; fetch it again".into(),
            Error::Header { .. }
            | Error::FileSize { .. }
            | Error::FileDigest { .. }
            | Error::TensorDigest { .. } => {
                "the file is damaged or its download stopped early; fetch it again".into()
            }
            Error::UnsupportedDType { .. } => {
                "quantized checkpoints cannot be a base or a fine-tune; use the 16- or 32-bit one"
                    .into()
            }
            Error::OtherRun { .. } => {
                "go on with the program and the options that began it, choose another output, or \
                 throw away what it has done with --restart"
                    .into()
            }
            Error::UnfinishedShard { index, count, .. } => {
                format!("run the same `onebase compress` with --shard {index}/{count}")
            }
            Error::MissingTensor { .. } => {
                "the files are incomplete, or config.json is another model's; fetch them again, \
                 all from the same place"
                    .into()
            }
            Error::StackedShape { .. } => "write a tensor for each expert: transformers' \
                 save_pretrained(save_original_format=True)"
                .into(),
            Error::Exists { .. } => "remove it or choose another output".into(),
            Error::NewerFormat { .. } => "install a newer onebase".into(),
            Error::OtherBase { .. } => {
                "a delta is only valid on the exact base it was made against; compress again \
                 against this base or give the original one"
                    .into()
            }
            Error::Io { source, .. } if source.kind() == std::io::ErrorKind::StorageFull => {
                "free some space and run it again; nothing was written under the final name".into()
            }
            _ => return None,
        })
    }
}
