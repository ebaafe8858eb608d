//! A fine-tune's folder to an archive against a base, and back to the byte.
//!
//! Tensors are read and coded in parts of a few MiB, so that memory is bounded whatever the
//! checkpoint's size.

mod read;
mod write;

pub use read::{restore_archive, verify_archive};
pub use write::{ArchiveReport, archive};

use onebase_codec::lossless::Element;
use onebase_format::archive::FileTensor;

/// Bytes of a tensor that are coded at once.
const PART_BYTES: u64 = 8 << 20;

/// Bytes that are copied or compared at once.
const COPY_BYTES: usize = 1 << 20;

/// The longest header that a safetensors file has, its length before it.
const MAX_HEADER_BYTES: u64 = 8 + 100_000_000;

/// A part of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Part {
    /// Its first byte within the tensor.
    at: u64,
    /// How many there are.
    bytes: u64,
    /// Whether the base's elements of the same numbers are used.
    has_base: bool,
}

/// The parts of a tensor of which the first `based` elements have a base.
///
/// `None` when it has not as many. They are made one by one: a header can name a tensor of any
/// length.
fn parts(
    tensor: &FileTensor,
    element: Element,
    based: u64,
) -> Option<impl Iterator<Item = Part> + Clone> {
    let whole = tensor.bytes;
    let split = based.checked_mul(element.size_bytes() as u64).filter(|at| *at <= whole)?;
    let runs = [(0, split, true), (split, whole, false)];
    Some(runs.into_iter().flat_map(|(from, end, has_base)| {
        let part = move |at| Part { at, bytes: PART_BYTES.min(end - at), has_base };
        (from..end).step_by(PART_BYTES as usize).map(part)
    }))
}
