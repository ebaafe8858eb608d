//! Whatever the elements of base and fine-tune are, they come back.
#![no_main]

use libfuzzer_sys::fuzz_target;
use onebase_codec::lossless::{decode, encode};
use onebase_fuzz::{Choice, base_of};

fuzz_target!(|input: &[u8]| {
    let Some((choice, bytes)) = Choice::split(input) else { return };
    // Repeated as often as there have to be elements, each time a bit away.
    let repeat = |bytes: &[u8], n: usize| -> Vec<u8> {
        let rounds = (0..=255u8).cycle().flat_map(|i| bytes.iter().map(move |b| b ^ (i & i >> 1)));
        rounds.take(n).collect()
    };
    let size = choice.element.size_bytes();
    let (tune, base) = bytes.split_at(bytes.len() / 2);
    let n = if tune.is_empty() { 0 } else { choice.n };
    let tune = repeat(tune, n * size);
    let base = choice.base.map(|element| repeat(base, n * element.size_bytes()));
    let base = base_of(choice, base.as_deref());
    let coded = encode(choice.element, &tune, base);
    let mut out = vec![0xa5; tune.len()];
    decode(choice.element, &coded, base, &mut out).expect("what was encoded is decoded");
    assert!(out == tune, "{:?} against {:?}", choice.element, choice.base);
});
