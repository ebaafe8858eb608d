//! One file per command.

pub(crate) mod archive;
pub(crate) mod bench;
pub(crate) mod calibrate;
pub(crate) mod codecs;
pub(crate) mod compare;
pub(crate) mod completions;
pub(crate) mod compress;
pub(crate) mod demo;
pub(crate) mod eval;
pub(crate) mod family;
pub(crate) mod finalize;
pub(crate) mod generate;
pub(crate) mod inspect;
pub(crate) mod quantize;
pub(crate) mod restore;
pub(crate) mod serve;
pub(crate) mod verify;
