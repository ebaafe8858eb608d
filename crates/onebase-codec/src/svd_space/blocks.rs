//! A delta as pairs of coded vectors, in blocks of one width of code each.

use std::ops::Range;

use half::{bf16, f16};
use onebase_kernels::{Affine, Backend, LANES, LowBit, plane_bytes};
use onebase_tensor::{
    DType, EncodedDelta, MatrixMut, MatrixRef, PartData, PartError, PartShapes, PartSpec,
};

use super::planes::{pack, transpose, unpack_bytes};
use crate::coded_factors::WHOLE_VECTOR;
use crate::factors::write_product;
use crate::{DeltaLinear, Error, Result};

/// The most pairs that a number of [`RANK_BYTES`] can count.
pub(crate) const MOST_PAIRS: usize = u16::MAX as usize;

/// Widths of codes, 1 to this.
pub(crate) const MAX_WIDTH: usize = 8;

/// The number of pairs of each width.
const RANKS: &str = "ranks";

/// Bytes of a number of pairs: no matrix of today has more than 65,535 directions.
const RANK_BYTES: usize = 2;

/// What codes stand for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Grids {
    /// `scale · level · level` with odd levels, one scale for a pair of vectors.
    Pair,
    /// `s · scale · (code − zero) · scale · (code − zero)`: ranges of this many elements,
    /// of `v` along the input features and of `u` along the pairs of a block, and a
    /// number for each pair.
    Group(usize),
}

/// Which pairs there are: what the shapes of all parts follow from.
///
/// Pairs of the widest codes come first. Parts:
///
/// - `ranks`: `[8, 2]`, U8: the number of pairs of each width from 1 to 8, little-endian.
/// - `s`: `[rank]`, BF16: of [`Grids::Pair`] the scale of each pair, of [`Grids::Group`]
///   its number.
/// - `u`, `v`: U8, pair by pair, bit planes of a vector as the codec `rtn` has those of a row:
///   `[width, plane_bytes(out_features)]` and `[width, plane_bytes(in_features)]`.
/// - of [`Grids::Group`], block by block: `u_scale`, F16, `[out_features, groups of the
///   block's pairs]`, `v_scale`, F16, `[pairs, groups of the input features]`; `u_zero` and
///   `v_zero`, U8, the codes of zero in the same order as bit planes
///   `[width, plane_bytes(elements)]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    pub(crate) shape: [usize; 2],
    pub(crate) grids: Grids,
    /// Pairs of each width, from 1 on.
    pub(crate) ranks: [usize; MAX_WIDTH],
}

/// Pairs of one width.
#[derive(Clone, Debug)]
pub(crate) struct Block {
    pub(crate) width: usize,
    /// Which pairs.
    pub(crate) pairs: Range<usize>,
}

impl Layout {
    /// The layout of pairs of these widths.
    pub(crate) fn new(shape: [usize; 2], grids: Grids, widths: &[u8]) -> Self {
        let mut ranks = [0; MAX_WIDTH];
        widths.iter().for_each(|width| ranks[usize::from(*width) - 1] += 1);
        Self { shape, grids, ranks }
    }

    /// All pairs.
    pub(crate) fn rank(&self) -> usize {
        self.ranks.iter().sum()
    }

    /// The blocks that have pairs, the widest first.
    pub(crate) fn blocks(&self) -> Vec<Block> {
        let mut first = 0;
        let widths = (1..=MAX_WIDTH).rev().map(|width| (width, self.ranks[width - 1]));
        let blocks = widths.filter(|(_, rank)| *rank > 0).map(|(width, rank)| {
            let pairs = first..first + rank;
            first = pairs.end;
            Block { width, pairs }
        });
        blocks.collect()
    }

    /// Bytes that a pair of a width takes, and a block that has any, so that their sum is
    /// never less than the parts without pairs lack.
    pub(crate) fn most_bytes(
        [n_rows, n_cols]: [usize; 2],
        grids: Grids,
        width: usize,
    ) -> [usize; 2] {
        let codes = width * (plane_bytes(n_rows) + plane_bytes(n_cols)) + size_of::<bf16>();
        let Grids::Group(size) = grids else { return [codes, 0] };
        // A scale, and a code of zero in bit planes.
        let eighths = |n_groups: usize| n_groups * (8 * size_of::<f16>() + width);
        let of_v = eighths(n_cols.div_ceil(size));
        // Begun groups of `u` count as whole ones, as the padding of planes does.
        let (of_u, begun) = (eighths(n_rows).div_ceil(size), eighths(n_rows));
        let padding = 2 * width * plane_bytes(1);
        [codes + (of_u + of_v).div_ceil(8), begun.div_ceil(8) + padding]
    }

    /// Bytes of all parts.
    pub(crate) fn size_bytes(&self) -> usize {
        self.parts().iter().map(PartSpec::size_bytes).sum()
    }

    /// The parts.
    pub(crate) fn parts(&self) -> Vec<PartSpec> {
        let [n_rows, n_cols] = self.shape;
        let codes = |n: usize| {
            let blocks = self.blocks();
            blocks.iter().map(|b| b.pairs.len() * b.width * plane_bytes(n)).sum::<usize>()
        };
        let mut parts = vec![
            PartSpec::new(RANKS, DType::U8, [MAX_WIDTH, RANK_BYTES]),
            PartSpec::new("s", DType::BF16, [self.rank()]),
            PartSpec::new("u", DType::U8, [codes(n_rows)]),
            PartSpec::new("v", DType::U8, [codes(n_cols)]),
        ];
        if let Grids::Group(size) = self.grids {
            for (scale, zero, side) in
                [("u_scale", "u_zero", Side::U), ("v_scale", "v_zero", Side::V)]
            {
                let counts =
                    self.blocks().into_iter().map(|b| (b.width, side.groups(self, &b, size)));
                let (mut n, mut bytes) = (0, 0);
                for (width, count) in counts {
                    n += count;
                    bytes += width * plane_bytes(count);
                }
                parts.push(PartSpec::new(scale, DType::F16, [n]));
                parts.push(PartSpec::new(zero, DType::U8, [bytes]));
            }
        }
        parts
    }

    /// Parts with the names of these and so many bytes more, for so many pairs at most: how
    /// many of the bytes are of which part is not known.
    pub(crate) fn parts_of_bytes(&self, most_pairs: usize, bytes: usize) -> Vec<PartSpec> {
        let mut parts = self.parts();
        let of_s = (most_pairs * size_of::<bf16>()).min(bytes);
        for part in &mut parts {
            match part.name {
                "s" => part.shape = vec![of_s / size_of::<bf16>()],
                "u" => part.shape = vec![bytes - of_s / size_of::<bf16>() * size_of::<bf16>()],
                _ => {}
            }
        }
        parts
    }

    /// Bits per weight of the codes alone, `Σ width · (out_features + in_features)` as the
    /// papers count, of parts of these shapes.
    #[allow(clippy::cast_precision_loss)]
    pub(crate) fn code_bits_of([m, n]: [usize; 2], parts: &PartShapes) -> f64 {
        let of = |part: &str, n: usize| {
            let bytes = parts.get(part).and_then(|shape| shape.first()).copied().unwrap_or(0);
            bytes as f64 / plane_bytes(n).max(1) as f64 * n as f64
        };
        (of("u", m) + of("v", n)) / (m as f64 * n as f64)
    }
}

/// Which of the two vectors of a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    /// Along the output features.
    U,
    /// Along the input features.
    V,
}

impl Side {
    /// Groups of a block in all: of `u` in each row those of its pairs, of `v` in each
    /// pair those of the input features.
    pub(crate) fn groups(self, layout: &Layout, block: &Block, size: usize) -> usize {
        let [n_rows, n_cols] = layout.shape;
        match self {
            Side::U => n_rows * block.pairs.len().div_ceil(size),
            Side::V => block.pairs.len() * n_cols.div_ceil(size),
        }
    }
}

/// Codes of one side of a block, one a byte, and their grids.
#[derive(Clone, Debug, Default)]
pub(crate) struct Codes {
    /// `u`: `[out_features, pairs]`; `v`: `[pairs, in_features]`.
    pub(crate) codes: Vec<u8>,
    /// Of [`Grids::Group`].
    pub(crate) scale: Vec<f16>,
    /// Of [`Grids::Group`].
    pub(crate) zero: Vec<u8>,
}

/// The parts of coded blocks, in the order of the layout, `[u, v]` of each.
pub(crate) fn encoded(layout: &Layout, s: Vec<bf16>, blocks: &[[Codes; 2]]) -> EncodedDelta {
    let [n_rows, n_cols] = layout.shape;
    let mut ranks = Vec::new();
    for rank in layout.ranks {
        let Ok(rank) = u16::try_from(rank) else { unreachable!("more pairs than any option asks") };
        ranks.extend(rank.to_le_bytes());
    }
    let (mut u, mut v) = (Vec::new(), Vec::new());
    let mut grids = [(Vec::new(), Vec::new()), (Vec::new(), Vec::new())];
    for (block, [of_u, of_v]) in layout.blocks().iter().zip(blocks) {
        let rank = block.pairs.len();
        pack(&transpose(&of_u.codes, n_rows, rank), block.width, n_rows, &mut u);
        pack(&of_v.codes, block.width, n_cols, &mut v);
        for (codes, (scale, zero)) in [of_u, of_v].into_iter().zip(&mut grids) {
            scale.extend_from_slice(&codes.scale);
            pack(&codes.zero, block.width, codes.zero.len(), zero);
        }
    }
    let part = |name, shape: Vec<usize>, data: PartData| (name, shape, data);
    let flat = |name, data: PartData| part(name, vec![data.len()], data);
    let common = [
        part(RANKS, vec![MAX_WIDTH, RANK_BYTES], PartData::U8(ranks)),
        flat("s", PartData::BF16(s)),
        flat("u", PartData::U8(u)),
        flat("v", PartData::U8(v)),
    ];
    match layout.grids {
        Grids::Pair => EncodedDelta::new(layout.shape, common),
        Grids::Group(_) => {
            let [(u_scale, u_zero), (v_scale, v_zero)] = grids;
            let [ranks, s, u, v] = common;
            let parts = [
                ranks,
                s,
                u,
                v,
                flat("u_scale", PartData::F16(u_scale)),
                flat("u_zero", PartData::U8(u_zero)),
                flat("v_scale", PartData::F16(v_scale)),
                flat("v_zero", PartData::U8(v_zero)),
            ];
            EncodedDelta::new(layout.shape, parts)
        }
    }
}

/// One side of a block, ready for the kernels.
struct Planes {
    /// `[rows, width, plane_bytes(columns)]`: the rows of `u` are the output features, those
    /// of `v` the pairs.
    codes: Vec<u8>,
    grid: Grid,
}

enum Grid {
    /// `[rows]`.
    Scale(Vec<bf16>),
    /// Both `[rows, groups]`.
    Ranges { scale: Vec<f16>, zero: Vec<u8>, size: usize },
}

impl Planes {
    /// `y += x Pᵀ` where `P` has `columns` columns.
    fn add_to(
        &self,
        backend: Backend,
        bits: usize,
        columns: usize,
        x: MatrixRef<'_>,
        y: &mut MatrixMut<'_>,
    ) {
        let (codes, in_features) = (&self.codes[..], columns);
        match &self.grid {
            Grid::Scale(scale) => {
                let delta = LowBit { codes, scale, bits, group_size: WHOLE_VECTOR, in_features };
                backend.add_low_bit(delta, x, y);
            }
            Grid::Ranges { scale, zero, size } => {
                let delta = Affine { codes, scale, zero, bits, group_size: *size, in_features };
                backend.add_affine(delta, x, y);
            }
        }
    }

    /// The elements of a row from a column on.
    fn write_row(&self, bits: usize, n_cols: usize, row: usize, first: usize, out: &mut [f64]) {
        let plane = plane_bytes(n_cols);
        let codes = &self.codes[row * bits * plane..(row + 1) * bits * plane];
        let mut bytes = vec![0; out.len()];
        unpack_bytes(codes, bits, first, &mut bytes);
        match &self.grid {
            Grid::Scale(scale) => {
                let (scale, top) = (scale[row].to_f64(), f64::from((1u16 << bits) - 1));
                let values = bytes.iter().map(|code| scale * (2.0 * f64::from(*code) - top));
                out.iter_mut().zip(values).for_each(|(out, value)| *out = value);
            }
            Grid::Ranges { scale, zero, size } => {
                let n_groups = n_cols.div_ceil(*size);
                for (at, (out, code)) in out.iter_mut().zip(&bytes).enumerate() {
                    let group = row * n_groups + (first + at) / size;
                    let level = i32::from(*code) - i32::from(zero[group]);
                    *out = scale[group].to_f64() * f64::from(level);
                }
            }
        }
    }

    fn resident_bytes(&self) -> usize {
        self.codes.len()
            + match &self.grid {
                Grid::Scale(scale) => size_of_val(scale.as_slice()),
                Grid::Ranges { scale, zero, .. } => size_of_val(scale.as_slice()) + zero.len(),
            }
    }
}

/// Blocks ready to serve: `Δ ≈ Σ s_r u_r v_rᵀ`.
pub(crate) struct Blocks {
    shape: [usize; 2],
    /// `[u, v]` of each, and where its pairs are.
    blocks: Vec<(Block, [Planes; 2])>,
    /// The number of each pair, where it is not the scale of `v`.
    s: Option<Vec<f32>>,
}

impl Blocks {
    /// Checks the parts.
    pub(crate) fn new(grids: Grids, delta: EncodedDelta) -> Result<Self> {
        let shape @ [n_rows, n_cols] = delta.shape;
        let mut parts = delta.into_parts();
        let stored = parts.take_u8(RANKS, &[MAX_WIDTH, RANK_BYTES])?;
        let mut ranks = [0; MAX_WIDTH];
        for (rank, bytes) in ranks.iter_mut().zip(stored.chunks(RANK_BYTES)) {
            *rank = usize::from(u16::from_le_bytes([bytes[0], bytes[1]]));
        }
        let layout = Layout { shape, grids, ranks };
        let most = n_rows.min(n_cols);
        if layout.rank() > most {
            return Err(Error::Part(PartError::Value {
                part: RANKS.to_owned(),
                index: 0,
                expected: format!("at most {most} pairs"),
                got: layout.rank().to_string(),
            }));
        }
        let specs = layout.parts();
        let shape_of = |name: &str| {
            specs.iter().find(|spec| spec.name == name).map_or(&[][..], |spec| &spec.shape)
        };
        let s = parts.take_bf16("s", shape_of("s"))?;
        let mut codes = Vec::new();
        for (name, n) in [("u", n_rows), ("v", n_cols)] {
            codes.push((parts.take_u8(name, shape_of(name))?, n));
        }
        let mut ranges = Vec::new();
        if let Grids::Group(_) = grids {
            for (scale, zero) in [("u_scale", "u_zero"), ("v_scale", "v_zero")] {
                let scales = parts.take_f16(scale, shape_of(scale))?;
                ranges.push((scales, parts.take_u8(zero, shape_of(zero))?));
            }
        }
        parts.finish()?;
        let mut at = [0; 2];
        let mut taken = [(0, 0); 2];
        let mut blocks = Vec::new();
        for block in layout.blocks() {
            let mut sides = Vec::new();
            for (index, side) in [Side::U, Side::V].into_iter().enumerate() {
                let (all, n) = &codes[index];
                let len = block.pairs.len() * block.width * plane_bytes(*n);
                let own = &all[at[index]..at[index] + len];
                at[index] += len;
                check_padding(["u", "v"][index], own, at[index] - len, *n)?;
                let grid = if let Grids::Group(size) = grids {
                    let (scale, zero) = &ranges[index];
                    let (scales, zeros) = &mut taken[index];
                    let n = side.groups(&layout, &block, size);
                    let n_bytes = block.width * plane_bytes(n);
                    let own = &zero[*zeros..*zeros + n_bytes];
                    check_padding(["u_zero", "v_zero"][index], own, *zeros, n)?;
                    let mut unpacked = vec![0; n];
                    unpack_bytes(own, block.width, 0, &mut unpacked);
                    let scale = scale[*scales..*scales + n].to_vec();
                    *scales += n;
                    *zeros += n_bytes;
                    Grid::Ranges { scale, zero: unpacked, size }
                } else {
                    Grid::Scale(match side {
                        Side::U => vec![bf16::ONE; n_rows],
                        Side::V => s[block.pairs.clone()].to_vec(),
                    })
                };
                let codes = match side {
                    Side::U => rows_of(own, block.width, n_rows, block.pairs.len()),
                    Side::V => own.to_vec(),
                };
                sides.push(Planes { codes, grid });
            }
            let (Some(v), Some(u)) = (sides.pop(), sides.pop()) else {
                unreachable!("there are two sides")
            };
            blocks.push((block, [u, v]));
        }
        let own = matches!(grids, Grids::Group(_));
        let s = own.then(|| s.iter().map(|s| s.to_f32()).collect());
        Ok(Self { shape, blocks, s })
    }
}

/// Padding that a plane has past its elements is zero, so that a delta has one form.
fn check_padding(part: &str, planes: &[u8], first: usize, n: usize) -> Result<()> {
    let plane = plane_bytes(n);
    if n.is_multiple_of(8 * plane.max(1)) {
        return Ok(());
    }
    for (index, bytes) in planes.chunks(plane.max(1)).enumerate() {
        let padded = (n..8 * plane).find(|bit| bytes[bit / 8] >> (bit % 8) & 1 == 1);
        if let Some(bit) = padded {
            let at = first + index * plane + bit / 8;
            return Err(Error::Part(PartError::Value {
                part: part.to_owned(),
                index: at,
                expected: "zeros past the last element".to_owned(),
                got: format!("{:#04x}", bytes[bit / 8]),
            }));
        }
    }
    Ok(())
}

/// Planes of pairs, `[rank, width, plane_bytes(n_rows)]`, as planes of rows,
/// `[n_rows, width, plane_bytes(rank)]`.
pub(super) fn rows_of(planes: &[u8], width: usize, n_rows: usize, rank: usize) -> Vec<u8> {
    let (from, to) = (plane_bytes(n_rows), plane_bytes(rank));
    let mut out = vec![0; n_rows * width * to];
    for eight in 0..rank.div_ceil(8) {
        for p in 0..width {
            for byte in 0..n_rows.div_ceil(8) {
                let mut bits = 0u64;
                for lane in 0..8.min(rank - 8 * eight) {
                    let at = ((8 * eight + lane) * width + p) * from + byte;
                    bits |= u64::from(planes[at]) << (8 * lane);
                }
                let turned = turn(bits).to_le_bytes();
                for (lane, value) in turned.iter().enumerate().take(n_rows - 8 * byte) {
                    out[((8 * byte + lane) * width + p) * to + eight] = *value;
                }
            }
        }
    }
    out
}

/// Transposes eight rows of eight bits (H. Warren, "Hacker's Delight", 2nd ed., 7–3).
fn turn(mut x: u64) -> u64 {
    for (shift, mask) in
        [(7, 0x00aa_00aa_00aa_00aa), (14, 0x0000_cccc_0000_cccc), (28, 0x0000_0000_f0f0_f0f0)]
    {
        let moved = (x ^ (x >> shift)) & mask;
        x ^= moved ^ (moved << shift);
    }
    x
}

impl DeltaLinear for Blocks {
    fn shape(&self) -> [usize; 2] {
        self.shape
    }

    fn add_to(&self, backend: Backend, x: MatrixRef<'_>, y: &mut MatrixMut<'_>) {
        let n_rows = x.n_rows();
        let mut inner = Vec::new();
        for (block, [u, v]) in &self.blocks {
            let rank = block.pairs.len();
            inner.clear();
            inner.resize(n_rows * rank, 0.0);
            let Ok(mut z) = MatrixMut::new(&mut inner, n_rows, rank) else {
                unreachable!("the buffer was sized for the product")
            };
            v.add_to(backend, block.width, self.shape[1], x, &mut z);
            if let Some(s) = &self.s {
                for row in z.data().chunks_mut(rank) {
                    row.iter_mut().zip(&s[block.pairs.clone()]).for_each(|(z, s)| *z *= s);
                }
            }
            u.add_to(backend, block.width, rank, z.as_ref(), y);
        }
    }

    fn write_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        let [_, n_cols] = self.shape;
        let rank = self.blocks.last().map_or(0, |(block, _)| block.pairs.end);
        // The rows of `u` as a whole: they are asked for element by element.
        let mut left = vec![0.0; rows.len() * rank];
        for (row, left) in rows.clone().zip(left.chunks_mut(rank.max(1))) {
            for (block, [u, _]) in &self.blocks {
                u.write_row(block.width, block.pairs.len(), row, 0, &mut left[block.pairs.clone()]);
            }
        }
        let first = rows.start;
        let u = |row: usize, r: usize| left[(row - first) * rank + r];
        let v = |r: usize, cols: Range<usize>, wide: &mut [f64]| {
            let Some((block, [_, v])) = self.blocks.iter().find(|(b, _)| b.pairs.contains(&r))
            else {
                unreachable!("every pair is in a block")
            };
            v.write_row(block.width, n_cols, r - block.pairs.start, cols.start, wide);
            if let Some(s) = &self.s {
                let s = f64::from(s[r]);
                wide.iter_mut().for_each(|w| *w *= s);
            }
        };
        write_product(rows, out, [rank, n_cols], u, v);
    }

    fn resident_bytes(&self) -> usize {
        let planes: usize =
            self.blocks.iter().flat_map(|(_, sides)| sides).map(Planes::resident_bytes).sum();
        planes + self.s.as_ref().map_or(0, |s| size_of_val(s.as_slice()))
    }
}

const _: () = assert!(8 * plane_bytes(1) == LANES, "a plane is padded to the lanes");
