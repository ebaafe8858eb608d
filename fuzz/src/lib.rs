//! How the inputs of the fuzz targets are laid out, for them and for the seeds.

use std::path::Path;

use onebase_codec::lossless::{Base, Element};

/// What the first four bytes of an input choose.
#[derive(Clone, Copy, Debug)]
pub struct Choice {
    /// The fine-tune's elements.
    pub element: Element,
    /// The base's, if there is one.
    pub base: Option<Element>,
    /// How many there are.
    pub n: usize,
}

impl Choice {
    /// The choice, and the bytes after it; `None` where there are too few.
    pub fn split(input: &[u8]) -> Option<(Self, &[u8])> {
        let ([element, base, n @ ..], rest) = input.split_first_chunk::<4>()?;
        let element = Element::ALL[usize::from(*element) % Element::ALL.len()];
        let base = Element::ALL.get(usize::from(*base) % (Element::ALL.len() + 1)).copied();
        let base = base.filter(|base| base.is_base_of(element));
        Some((Self { element, base, n: u16::from_le_bytes(*n).into() }, rest))
    }

    /// The base that the decoder is given: weights of a few exponents.
    pub fn base_bytes(&self) -> Option<Vec<u8>> {
        let size = self.base?.size_bytes();
        let mut z = 1u64;
        let mut bytes = Vec::new();
        for _ in 0..self.n {
            z = z.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let exponent = 0x3c00_0000 - (z >> 61) * 0x0080_0000;
            let word = (exponent | z >> 32 & 0x807f_ffff) << 32;
            bytes.extend_from_slice(&word.to_le_bytes()[8 - size..]);
        }
        Some(bytes)
    }
}

/// A base of some bytes.
pub fn base_of(choice: Choice, bytes: Option<&[u8]>) -> Option<Base<'_>> {
    Some(Base { element: choice.base?, bytes: bytes? })
}

/// Splits an input of the target `archive`: the manifest, and the archive's one file.
pub fn split_archive(input: &[u8]) -> Option<(&[u8], &[u8])> {
    let (len, rest) = input.split_first_chunk()?;
    rest.split_at_checked(u16::from_le_bytes(*len).into())
}

/// Joins what [`split_archive`] splits.
pub fn join_archive(manifest: &[u8], data: &[u8]) -> Vec<u8> {
    let len = u16::try_from(manifest.len()).unwrap_or(u16::MAX);
    [&len.to_le_bytes(), manifest, data].concat()
}

/// Writes a safetensors file of one tensor, `w`, of BF16.
pub fn write_tensor(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let (n, end) = (bytes.len() / 2, bytes.len());
    let header = format!(r#"{{"w":{{"dtype":"BF16","shape":[{n}],"data_offsets":[0,{end}]}}}}"#);
    let len = (header.len() as u64).to_le_bytes();
    std::fs::write(path, [&len, header.as_bytes(), bytes].concat())
}

/// Writes the base of the target `archive` into a new folder.
pub fn write_archive_base(dir: &Path) -> std::io::Result<()> {
    std::fs::create_dir(dir)?;
    let choice = Choice { element: Element::Bf16, base: Some(Element::Bf16), n: 1200 };
    write_tensor(&dir.join("model.safetensors"), &choice.base_bytes().unwrap_or_default())
}
