//! Bytes that nobody encoded end in an error or in elements.
#![no_main]

use libfuzzer_sys::fuzz_target;
use onebase_codec::lossless::decode;
use onebase_fuzz::{Choice, base_of};

fuzz_target!(|input: &[u8]| {
    let Some((choice, coded)) = Choice::split(input) else { return };
    let base = choice.base_bytes();
    let mut out = vec![0; choice.n * choice.element.size_bytes()];
    let _ = decode(choice.element, coded, base_of(choice, base.as_deref()), &mut out);
});
