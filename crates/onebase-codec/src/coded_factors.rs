use std::ops::Range;

use half::bf16;
use onebase_kernels::{Backend, LowBit, plane_bytes};
use onebase_tensor::{DType, MatrixMut, MatrixRef, PartData, PartSpec, saturating_bf16};

use crate::factors::write_product;
use crate::numerics::Truncated;

/// A product of two thin matrices of low-bit codes, `Δ ≈ Σ s_r u_r v_rᵀ`: the vectors
/// hold odd levels `2 code − (2^bits − 1)`, each pair has one scale.
pub(crate) struct CodedFactors {
    shape: [usize; 2],
    rank: usize,
    bits: usize,
    /// `[out_features, bits, plane_bytes(rank)]`.
    u: Vec<u8>,
    /// `[rank, bits, plane_bytes(in_features)]`.
    v: Vec<u8>,
    /// `[rank]`.
    scale: Vec<bf16>,
    /// Ones, `[out_features]`, and `scale` as often as the kernel wants it.
    kernel_scales: [Vec<bf16>; 2],
}

/// One scale for a whole vector; a multiple of the lanes.
pub(crate) const WHOLE_VECTOR: usize = 1 << 30;

impl CodedFactors {
    /// Codes `u` and `v` of a matrix, with the scales.
    pub(crate) fn new(
        shape: [usize; 2],
        bits: usize,
        u: Vec<u8>,
        v: Vec<u8>,
        scale: Vec<bf16>,
    ) -> Self {
        let rank = scale.len();
        debug_assert_eq!(u.len(), shape[0] * bits * plane_bytes(rank));
        debug_assert_eq!(v.len(), rank * bits * plane_bytes(shape[1]));
        let kernel_scales = [vec![bf16::ONE; shape[0]], scale.clone()];
        Self { shape, rank, bits, u, v, scale, kernel_scales }
    }

    /// Codes of a truncated decomposition. Each vector's grid is fitted to it by least
    /// squares, then each pair's scale to the pair.
    pub(crate) fn from_svd(svd: &Truncated, shape: [usize; 2], bits: usize) -> Self {
        let [n_rows, n_cols] = shape;
        let rank = svd.s.len();
        let (u_plane, v_plane) = (plane_bytes(rank), plane_bytes(n_cols));
        let mut u = vec![0; n_rows * bits * u_plane];
        let mut v = vec![0; rank * bits * v_plane];
        let mut scale = Vec::with_capacity(rank);
        let backend = Backend::active();
        let mut column = vec![0; bits * plane_bytes(n_rows)];
        let mut grid = [bf16::ZERO];
        for (r, s) in svd.s.iter().enumerate() {
            let left = &svd.u[r * n_rows..(r + 1) * n_rows];
            let right = &svd.v[r * n_cols..(r + 1) * n_cols];
            let row = &mut v[r * bits * v_plane..(r + 1) * bits * v_plane];
            backend.fit_low_bit(right, bits, WHOLE_VECTOR, row, &mut grid);
            backend.fit_low_bit(left, bits, WHOLE_VECTOR, &mut column, &mut grid);
            #[allow(clippy::cast_possible_truncation)]
            let fitted =
                (s * best_scale(&column, bits, left) * best_scale(row, bits, right)) as f32;
            scale.push(if *s > 0.0 { saturating_bf16(fitted) } else { bf16::ZERO });
            for (plane, bytes) in column.chunks(plane_bytes(n_rows)).enumerate() {
                for row in 0..n_rows {
                    let bit = bytes[row / 8] >> (row % 8) & 1;
                    u[(row * bits + plane) * u_plane + r / 8] |= bit << (r % 8);
                }
            }
        }
        Self::new(shape, bits, u, v, scale)
    }

    /// The codes of `u` and `v` and the scales, with their shapes.
    pub(crate) fn into_data(self) -> [(Vec<usize>, PartData); 3] {
        let [n_rows, n_cols] = self.shape;
        let (u_plane, v_plane) = (plane_bytes(self.rank), plane_bytes(n_cols));
        [
            (vec![n_rows, self.bits, u_plane], PartData::U8(self.u)),
            (vec![self.rank, self.bits, v_plane], PartData::U8(self.v)),
            (vec![self.rank], PartData::BF16(self.scale)),
        ]
    }

    /// The parts that hold factors of some rank.
    pub(crate) fn parts([n_rows, n_cols]: [usize; 2], bits: usize, rank: usize) -> [PartSpec; 3] {
        [
            PartSpec::new("u", DType::U8, [n_rows, bits, plane_bytes(rank)]),
            PartSpec::new("v", DType::U8, [rank, bits, plane_bytes(n_cols)]),
            PartSpec::new("pair_scale", DType::BF16, [rank]),
        ]
    }

    /// Bytes of the parts of factors of some rank.
    pub(crate) fn size_bytes(shape: [usize; 2], bits: usize, rank: usize) -> usize {
        Self::parts(shape, bits, rank).iter().map(PartSpec::size_bytes).sum()
    }

    /// `y += x Δᵀ`, as [`crate::DeltaLinear::add_to`].
    pub(crate) fn add_to(&self, backend: Backend, x: MatrixRef<'_>, y: &mut MatrixMut<'_>) {
        let n_rows = x.n_rows();
        let mut inner = vec![0.0; n_rows * self.rank];
        let Ok(mut inner) = MatrixMut::new(&mut inner, n_rows, self.rank) else {
            unreachable!("the buffer was sized for the product")
        };
        let [ones, scale] = &self.kernel_scales;
        let matrix = |codes, scale, in_features| LowBit {
            codes,
            scale,
            bits: self.bits,
            group_size: WHOLE_VECTOR,
            in_features,
        };
        backend.add_low_bit(matrix(&self.v, scale, self.shape[1]), x, &mut inner);
        backend.add_low_bit(matrix(&self.u, ones, self.rank), inner.as_ref(), y);
    }

    /// Decodes rows, as [`crate::DeltaLinear::write_rows`].
    pub(crate) fn write_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        let n_cols = self.shape[1];
        let (u_bytes, v_bytes) =
            (self.bits * plane_bytes(self.rank), self.bits * plane_bytes(n_cols));
        let u =
            |row: usize, r: usize| level(&self.u[row * u_bytes..(row + 1) * u_bytes], self.bits, r);
        let v = |r: usize, cols: Range<usize>, wide: &mut [f64]| {
            let codes = &self.v[r * v_bytes..(r + 1) * v_bytes];
            let scale = self.scale[r].to_f64();
            cols.zip(wide).for_each(|(k, wide)| *wide = scale * level(codes, self.bits, k));
        };
        write_product(rows, out, [self.rank, n_cols], u, v);
    }

    /// Bytes of memory it holds.
    pub(crate) fn resident_bytes(&self) -> usize {
        let scales = self.scale.len() + self.kernel_scales.iter().map(Vec::len).sum::<usize>();
        self.u.len() + self.v.len() + scales * size_of::<bf16>()
    }
}

/// The least-squares scale of the levels of a row of bit planes for a vector. Levels
/// are odd, so that their squares have a sum.
fn best_scale(codes: &[u8], bits: usize, vector: &[f32]) -> f64 {
    let (mut product, mut square) = (0.0, 0.0);
    for (k, value) in vector.iter().enumerate() {
        let level = level(codes, bits, k);
        product += level * f64::from(*value);
        square += level * level;
    }
    product / square
}

/// The odd level of element `k` of a row of bit planes.
fn level(codes: &[u8], bits: usize, k: usize) -> f64 {
    let planes = codes.chunks(codes.len() / bits).enumerate();
    let code: i32 = planes.map(|(p, bytes)| i32::from(bytes[k / 8] >> (k % 8) & 1) << p).sum();
    f64::from(2 * code - ((1 << bits) - 1))
}
