//! Numbers of any width from a stream of bits, the first in the lowest bits of the first byte.

/// Bytes of zeros after the last bit, so that a reader can load eight bytes at any place.
pub(super) const PADDING: usize = 8;

/// Reads bits one number after the other.
#[derive(Debug)]
pub(super) struct BitReader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> BitReader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// The next `n` bits, up to 32; `None` where bytes end.
    pub(super) fn take(&mut self, n: u32) -> Option<u64> {
        let end = self.at + n as usize;
        if end > 8 * self.bytes.len() {
            return None;
        }
        let from = self.bytes.get(self.at / 8..).unwrap_or(&[]);
        let mut loaded = [0; 8];
        loaded.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
        let bits = u64::from_le_bytes(loaded) >> (self.at % 8);
        self.at = end;
        Some(bits & ((1 << n) - 1))
    }
}

#[cfg(test)]
mod tests {
    use onebase_kernels::rans::BitSink;

    use super::*;

    #[test]
    fn bits_come_back() {
        let numbers: Vec<(u64, u32)> = (0..=32u32).map(|n| ((1 << n) - 1, n)).collect();
        let mut writer = BitSink::default();
        numbers.iter().for_each(|(bits, n)| writer.push(*bits, *n));
        let bytes = writer.finish();
        let mut reader = BitReader::new(&bytes);
        for (bits, n) in numbers {
            assert_eq!(reader.take(n), Some(bits));
        }
        assert_eq!(reader.take(9), None);
    }
}
