//! What the lossless coder wrote comes back to the last bit, and bytes that it did not write
//! are refused.

use half::{bf16, f16};
use onebase_codec::lossless::{BLOCK_BYTES, Base, Element, Error, decode, encode};
use onebase_tensor::stream;
use proptest::prelude::*;
use rand_distr::{Distribution, StandardNormal};

fn base(element: Element, bytes: &[u8]) -> Base<'_> {
    Base { element, bytes }
}

/// Checks the round trip, and gives the size.
#[track_caller]
fn check(element: Element, tune: &[u8], base: Option<Base<'_>>) -> usize {
    let coded = encode(element, tune, base);
    let mut out = vec![0xaa; tune.len()];
    decode(element, &coded, base, &mut out).unwrap();
    assert!(out == tune, "{element:?}");
    coded.len()
}

/// Weights and weights a part of them away, in a type.
fn pair(element: Element, n: usize, ratio: f32) -> (Vec<u8>, Vec<u8>) {
    let mut rng = stream(3, "pair", 0);
    let (mut base, mut tune) = (Vec::new(), Vec::new());
    let narrow = |value: f32, out: &mut Vec<u8>| match element {
        Element::Bf16 => out.extend(bf16::from_f32(value).to_le_bytes()),
        Element::F16 => out.extend(f16::from_f32(value).to_le_bytes()),
        Element::F32 => out.extend(value.to_le_bytes()),
        // The upper half of binary16 is this type.
        Element::F8E5M2 => out.push(f16::from_f32(value).to_le_bytes()[1]),
        _ => {
            let bytes = i64::from((value * 1e4) as i32).to_le_bytes();
            out.extend_from_slice(&bytes[..element.size_bytes()]);
        }
    };
    for _ in 0..n {
        let mut draw = || Distribution::<f32>::sample(&StandardNormal, &mut rng);
        let weight = 0.02 * draw();
        let weight = match element {
            Element::Bf16 => bf16::from_f32(weight).to_f32(),
            Element::F16 => f16::from_f32(weight).to_f32(),
            _ => weight,
        };
        narrow(weight, &mut base);
        narrow(weight + 0.02 * ratio * draw(), &mut tune);
    }
    (base, tune)
}

#[test]
fn every_type_comes_back_with_and_without_a_base() {
    for element in Element::ALL {
        for n in [0, 1, 31, 32, 33, 2047, 2049, 70_000] {
            let (b, tune) = pair(element, n, 0.05);
            let alone = check(element, &tune, None);
            let beside = check(element, &tune, Some(base(element, &b)));
            assert!(alone <= tune.len() + 100 && beside <= tune.len() + 100);
        }
    }
}

#[test]
fn blocks_of_several_kinds_come_back() {
    let (b, mut tune) = pair(Element::Bf16, 5 * BLOCK_BYTES / 2 + 7, 0.02);
    // One that is the base's and one that is noise.
    tune[..BLOCK_BYTES].copy_from_slice(&b[..BLOCK_BYTES]);
    let mut z = 1u64;
    for byte in &mut tune[BLOCK_BYTES..2 * BLOCK_BYTES] {
        z = z.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        *byte = (z >> 56) as u8;
    }
    let size = check(Element::Bf16, &tune, Some(base(Element::Bf16, &b)));
    assert!(size < BLOCK_BYTES + 3 * BLOCK_BYTES / 2, "{size}");
}

#[test]
fn what_is_the_same_takes_nothing() {
    for element in Element::ALL {
        let (b, _) = pair(element, 100_000, 0.0);
        assert!(check(element, &b, Some(base(element, &b))) < 100);
    }
}

#[test]
fn few_changes_take_few_bytes() {
    for element in Element::ALL {
        let (b, mut tune) = pair(element, 100_000, 0.0);
        for i in (0..tune.len()).step_by(tune.len() / 20) {
            tune[i] ^= 0x41;
        }
        let size = check(element, &tune, Some(base(element, &b)));
        assert!(size < 1000, "{element:?} {size}");
    }
}

#[test]
fn near_weights_take_less_than_planes_of_bits_that_differ() {
    // Of two bytes, from the specification's table of synthetic pairs: the entropy of the
    // distance given the base's exponent.
    for (ratio, share) in
        [(0.1, 0.453), (0.03, 0.340), (0.01, 0.241), (0.003, 0.137), (0.001, 0.059)]
    {
        let (b, tune) = pair(Element::Bf16, 1 << 20, ratio);
        let size = check(Element::Bf16, &tune, Some(base(Element::Bf16, &b)));
        let got = size as f64 / tune.len() as f64;
        assert!(got < share + 0.005, "{ratio}: {got}, expected {share}");
    }
}

#[test]
fn another_type_of_base_is_rounded() {
    let types = [Element::Bf16, Element::F16, Element::F32];
    for of_base in types {
        for of_tune in types {
            let (b, _) = pair(of_base, 50_000, 0.01);
            let (_, tune) = pair(of_tune, 50_000, 0.01);
            let alone = check(of_tune, &tune, None);
            let beside = check(of_tune, &tune, Some(base(of_base, &b)));
            assert!(beside < alone, "{of_base:?} {of_tune:?}: {beside} {alone}");
        }
    }
    // A wider type that has the narrower one's values takes what the narrower one takes.
    let (b, tune) = pair(Element::Bf16, 50_000, 0.01);
    let narrow = check(Element::Bf16, &tune, Some(base(Element::Bf16, &b)));
    let wide: Vec<u8> = tune.chunks(2).flat_map(|half| [0, 0, half[0], half[1]]).collect();
    let wide = check(Element::F32, &wide, Some(base(Element::Bf16, &b)));
    assert!(wide < narrow + 200, "{wide} {narrow}");
}

#[test]
fn the_number_of_threads_does_not_matter() {
    let (b, tune) = pair(Element::F16, 3 * BLOCK_BYTES, 0.03);
    let coded = |n| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap();
        pool.install(|| encode(Element::F16, &tune, Some(base(Element::F16, &b))))
    };
    assert!(coded(1) == coded(3));
}

/// Small inputs of each mode.
fn small() -> Vec<(Element, Vec<u8>, Option<Vec<u8>>)> {
    let (b, tune) = pair(Element::Bf16, 600, 0.02);
    let mut sparse = b.clone();
    sparse[200] ^= 1;
    let (fb, ft) = pair(Element::F32, 400, 0.02);
    let (_, noise) = pair(Element::Int64, 300, 1.0);
    vec![
        (Element::Bf16, tune.clone(), Some(b.clone())),
        (Element::Bf16, tune, None),
        (Element::Bf16, sparse, Some(b.clone())),
        (Element::Bf16, b.clone(), Some(b)),
        (Element::F32, ft, Some(fb)),
        (Element::Int64, noise.clone(), None),
        (Element::Int8, noise[..7].to_vec(), None),
    ]
}

#[test]
fn altered_bytes_are_refused() {
    for (element, tune, b) in small() {
        let b = b.as_ref().map(|b| base(element, b));
        let coded = encode(element, &tune, b);
        let mut out = vec![0; tune.len()];
        let mut named = 0;
        for at in 0..coded.len() {
            assert!(decode(element, &coded[..at], b, &mut out).is_err(), "{element:?} {at}");
            for flip in [1, 0x10, 0x80, 0xff] {
                let mut altered = coded.clone();
                altered[at] ^= flip;
                match decode(element, &altered, b, &mut out) {
                    Err(Error::Block { index: 0, count: 1 }) => named += 1,
                    Err(_) => {}
                    // A bit that no symbol reads.
                    Ok(()) => assert!(out == tune),
                }
            }
        }
        let mut longer = coded.clone();
        longer.push(0);
        assert!(decode(element, &longer, b, &mut out).is_err());
        // Most bytes of what is not empty are a block's.
        assert!(named > 0 || coded.len() < 60, "{element:?} {named}");
    }
}

#[test]
fn a_damaged_block_is_named() {
    let (b, tune) = pair(Element::Bf16, 2 * BLOCK_BYTES, 0.02);
    let b = Some(base(Element::Bf16, &b));
    let mut coded = encode(Element::Bf16, &tune, b);
    let at = coded.len() / 2 + coded.len() / 8;
    coded[at] ^= 4;
    let mut out = vec![0; tune.len()];
    let error = decode(Element::Bf16, &coded, b, &mut out).unwrap_err();
    assert_eq!(error, Error::Block { index: 2, count: 4 });
    assert_eq!(error.to_string(), "block 2 of 4 is damaged");
}

#[test]
fn another_base_is_refused() {
    let (b, tune) = pair(Element::Bf16, 1000, 0.02);
    let coded = encode(Element::Bf16, &tune, Some(base(Element::Bf16, &b)));
    let mut out = vec![0; tune.len()];
    assert!(decode(Element::Bf16, &coded, None, &mut out).is_err());
    let mut other = b.clone();
    other[1001] ^= 1;
    assert!(decode(Element::Bf16, &coded, Some(base(Element::Bf16, &other)), &mut out).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Any bits at all: NaN with any payload, −0, subnormal numbers.
    #[test]
    fn any_bytes_come_back(
        kind in 0usize..9,
        tune in prop::collection::vec(any::<u8>(), 0..3000),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..40),
    ) {
        let element = Element::ALL[kind];
        let tune = &tune[..tune.len() - tune.len() % element.size_bytes()];
        check(element, tune, None);
        let mut b = tune.to_vec();
        for (at, change) in &changes {
            if !b.is_empty() {
                let at = at.index(b.len());
                b[at] ^= change;
            }
        }
        check(element, tune, Some(base(element, &b)));
        b.reverse();
        check(element, tune, Some(base(element, &b)));
    }

    #[test]
    fn any_floats_are_a_base_of_others(
        bits in prop::collection::vec(any::<(u16, u32)>(), 0..800),
    ) {
        let narrow: Vec<u8> = bits.iter().flat_map(|(bits, _)| bits.to_le_bytes()).collect();
        let wide: Vec<u8> = bits.iter().flat_map(|(_, bits)| bits.to_le_bytes()).collect();
        for element in [Element::F16, Element::Bf16] {
            check(Element::F32, &wide, Some(base(element, &narrow)));
            check(element, &narrow, Some(base(Element::F32, &wide)));
        }
        check(Element::F16, &narrow, Some(base(Element::Bf16, &narrow)));
    }

    /// Bytes of anybody.
    #[test]
    fn any_bytes_decode_or_are_refused(
        kind in 0usize..9,
        mode in 0u8..5,
        mut bytes in prop::collection::vec(any::<u8>(), 1..600),
        n in 0usize..300,
    ) {
        let element = Element::ALL[kind];
        bytes[0] = mode;
        let b = vec![7; n * element.size_bytes()];
        let mut out = vec![0; b.len()];
        let _ = decode(element, &bytes, Some(base(element, &b)), &mut out);
        let _ = decode(element, &bytes, None, &mut out);
    }
}
