//! How elements of each type are seen as numbers.

use onebase_kernels::words::Words;

use super::Element;

/// Elements that are worked on at a time, so that what is between two steps stays in a
/// first-level cache.
pub(super) const CHUNK: usize = 1 << 11;

/// Elements whose lowest `drop_bits` bits are zero; `None` for types that are not seen as
/// numbers.
pub(super) fn words(element: Element, drop_bits: u32) -> Option<Words> {
    // Where the class is, its mask, what is turned over, whether it is a float.
    let (class_at, class_mask, class_flip, is_float) = match element {
        Element::F8E4M3 => (3u32, 0xf, 0, true),
        Element::F8E5M2 => (2, 0x1f, 0, true),
        Element::F16 => (10, 0x1f, 0, true),
        Element::Bf16 => (7, 0xff, 0, true),
        Element::F32 => (23, 0xff, 0, true),
        Element::Int8 => (3, 0x1f, 0x10, false),
        Element::Int16 => (8, 0xff, 0x80, false),
        Element::Int32 => (24, 0xff, 0x80, false),
        Element::Int64 => return None,
    };
    let class_at = class_at.checked_sub(drop_bits)?;
    let size_bytes = element.size_bytes();
    Some(Words { size_bytes, drop_bits, is_float, class_at, class_mask, class_flip })
}

/// The most bits that can be left out of elements of this type.
pub(super) fn most_drop_bits(element: Element) -> u32 {
    match element {
        Element::F32 | Element::Int32 => 16,
        _ => 0,
    }
}
