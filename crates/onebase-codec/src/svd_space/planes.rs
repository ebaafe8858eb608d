//! Codes of a byte each, and their bit planes.

use onebase_kernels::plane_bytes;
use rayon::prelude::*;

/// Appends the bit planes, `[width, plane_bytes(n)]`, of each row of `n` codes.
pub(super) fn pack(codes: &[u8], width: usize, n: usize, out: &mut Vec<u8>) {
    let plane = plane_bytes(n);
    let start = out.len();
    let n_rows = codes.len().checked_div(n).unwrap_or(0);
    out.resize(start + n_rows * width * plane, 0);
    if n_rows == 0 {
        return;
    }
    let rows = out[start..].par_chunks_mut(width * plane).zip(codes.par_chunks(n));
    rows.for_each(|(planes, codes)| {
        for (at, eight) in codes.chunks(8).enumerate() {
            for p in 0..width {
                let bits = eight.iter().rev().fold(0, |bits, code| bits << 1 | (code >> p & 1));
                planes[p * plane + at] = bits;
            }
        }
    });
}

/// The codes of a row from element `first` on, from its bit planes.
pub(super) fn unpack_bytes(planes: &[u8], width: usize, first: usize, out: &mut [u8]) {
    out.fill(0);
    if planes.is_empty() {
        return;
    }
    for (p, plane) in planes.chunks(planes.len() / width).enumerate() {
        for (at, code) in (first..).zip(out.iter_mut()) {
            *code |= (plane[at / 8] >> (at % 8) & 1) << p;
        }
    }
}

/// A matrix of codes `[n_rows, n_cols]`, transposed.
pub(super) fn transpose(codes: &[u8], n_rows: usize, n_cols: usize) -> Vec<u8> {
    let mut out = vec![0; codes.len()];
    if out.is_empty() {
        return out;
    }
    // Columns that lie together are written while their row is in the cache.
    const TOGETHER: usize = 64;
    out.par_chunks_mut(TOGETHER * n_rows).enumerate().for_each(|(index, columns)| {
        let first = index * TOGETHER;
        for (row, codes) in codes.chunks(n_cols).enumerate() {
            for (to, code) in columns[row..].iter_mut().step_by(n_rows).zip(&codes[first..]) {
                *to = *code;
            }
        }
    });
    out
}
