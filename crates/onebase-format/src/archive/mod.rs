//! A folder from which every file of a fine-tune's folder comes back to the byte.
//!
//! Here are the layout and the folders it is made from; what bytes mean is for those who wrote
//! them. The layout is `SPEC.md`.

mod folder;
mod manifest;
mod writer;

pub use folder::{BaseFolder, BaseTensor, FileTensor, SourceFile, files, tensors_of_header};
pub use manifest::{
    ARCHIVE_FILE, Archive, ArchiveManifest, BaseOfTensor, Compression, FileRecord, FileStorage,
    TensorStorage,
};
pub use writer::{ArchiveWriter, DataWriter};
