//! The one place that maps files into memory.
#![allow(unsafe_code)]

use std::fs::File;

use memmap2::Mmap;

/// Maps a whole file, read only.
pub(crate) fn map(file: &File) -> std::io::Result<Mmap> {
    // SAFETY: the map is only ever read as plain bytes. Another process that
    // writes the file meanwhile could change them, and one that truncates it
    // would end this process with a bus error: the README asks users not to, and
    // this program itself replaces folders by renaming.
    unsafe { Mmap::map(file) }
}
