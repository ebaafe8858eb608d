//! Writes inputs to begin with into `corpus`, made of real encodings.

use std::io::Result;
use std::path::Path;

use libfuzzer_sys::fuzz_target;
use onebase_codec::lossless::{Element, encode};
use onebase_compress::Silent;
use onebase_format::archive::ARCHIVE_FILE;
use onebase_fuzz::{Choice, base_of, join_archive, write_archive_base, write_tensor};

// Only so that it links where it is instrumented as the targets are: then it needs what counts.
fuzz_target!(|_input: &[u8]| {});

/// Fine-tunes of a base: how many of the lowest bits may differ, in one of how many bytes.
const KINDS: [(u8, usize); 4] = [(0xff, 1), (0x03, 2), (0x01, 3), (0xff, 100)];

fn main() -> Result<()> {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    for target in ["decode", "round_trip", "archive"] {
        std::fs::create_dir_all(corpus.join(target))?;
    }
    for element in 0..Element::ALL.len() {
        for base in 0..=Element::ALL.len() {
            for (kind, n) in [1, 40, 300, 5000u16].into_iter().enumerate() {
                let [low, high] = n.to_le_bytes();
                let choice = [element as u8, base as u8, low, high];
                write_tensor_seeds(&corpus, &choice, kind)?;
            }
        }
    }
    write_archive_seeds(&corpus.join("archive"))
}

/// Bytes that differ in some places.
fn changed(bytes: &[u8], (mask, step): (u8, usize)) -> Vec<u8> {
    let mut z = 7u32;
    let change = |(i, byte): (usize, &u8)| {
        z = z.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        if i % step == 0 { byte ^ ((z >> 24) as u8 & mask) } else { *byte }
    };
    bytes.iter().enumerate().map(change).collect()
}

fn write_tensor_seeds(corpus: &Path, input: &[u8; 4], number: usize) -> Result<()> {
    let Some((choice, _)) = Choice::split(input) else { return Ok(()) };
    let base = choice.base_bytes();
    // Where there is none, the fine-tune is made from one that the encoder is not given.
    let like = Choice { base: Some(choice.element), ..choice }.base_bytes().unwrap_or_default();
    for (kind, how) in KINDS.into_iter().enumerate() {
        let tune = changed(&like, how);
        let coded = encode(choice.element, &tune, base_of(choice, base.as_deref()));
        let name = format!("{}-{}-{number}-{kind}", input[0], input[1]);
        std::fs::write(corpus.join("decode").join(&name), [input, coded.as_slice()].concat())?;
        let some = tune.len().min(64);
        let pair = [input, &tune[..some], &like[..some]].concat();
        std::fs::write(corpus.join("round_trip").join(name), pair)?;
    }
    Ok(())
}

fn write_archive_seeds(corpus: &Path) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let [base, tune] = ["base", "tune"].map(|name| dir.path().join(name));
    write_archive_base(&base)?;
    let like = Choice::split(&[3, 3, 0xb0, 4]).and_then(|(choice, _)| choice.base_bytes());
    for (kind, how) in KINDS.into_iter().enumerate() {
        let _ = std::fs::remove_dir_all(&tune);
        std::fs::create_dir(&tune)?;
        match kind {
            0 => std::fs::write(tune.join("notes.txt"), "what is no tensor ".repeat(9))?,
            _ => write_tensor(
                &tune.join("model.safetensors"),
                &changed(&like.clone().unwrap_or_default(), how),
            )?,
        }
        let to = dir.path().join(format!("archive-{kind}"));
        onebase_compress::archive(&base, &tune, &to, &Silent).map_err(std::io::Error::other)?;
        let manifest = std::fs::read(to.join(ARCHIVE_FILE))?;
        let data = std::fs::read(to.join("file-00001.bin"))?;
        std::fs::write(corpus.join(format!("{kind}")), join_archive(&manifest, &data))?;
    }
    Ok(())
}
