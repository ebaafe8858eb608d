//! The few elements that differ from the base's: how many are the same before each, and what
//! it is.

use super::Damage;

/// Bytes of a number of up to seven digits of seven bits, the lowest first.
fn write_number(mut n: usize, out: &mut Vec<u8>) {
    while n >= 0x80 {
        out.push(n.to_le_bytes()[0] | 0x80);
        n >>= 7;
    }
    out.push(n.to_le_bytes()[0]);
}

fn read_number(bytes: &mut &[u8]) -> Option<usize> {
    let mut n = 0;
    for shift in (0..28).step_by(7) {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        n |= usize::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(n);
        }
    }
    None
}

pub(super) fn encode(tune: &[u8], base: &[u8], size_bytes: usize) -> Vec<u8> {
    let mut out = Vec::new();
    let mut same = 0;
    for (word, base) in tune.chunks(size_bytes).zip(base.chunks(size_bytes)) {
        if word == base {
            same += 1;
        } else {
            write_number(same, &mut out);
            out.extend_from_slice(word);
            same = 0;
        }
    }
    out
}

pub(super) fn decode(
    mut bytes: &[u8],
    base: &[u8],
    size_bytes: usize,
    out: &mut [u8],
) -> Result<(), Damage> {
    out.copy_from_slice(base);
    let mut words = out.chunks_mut(size_bytes);
    while !bytes.is_empty() {
        let same = read_number(&mut bytes).ok_or(Damage)?;
        let (word, rest) = bytes.split_at_checked(size_bytes).ok_or(Damage)?;
        words.nth(same).filter(|to| to.len() == word.len()).ok_or(Damage)?.copy_from_slice(word);
        bytes = rest;
    }
    Ok(())
}
