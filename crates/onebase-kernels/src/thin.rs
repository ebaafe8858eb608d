//! Products of a large matrix, block by block, with thin ones: what a randomized
//! decomposition spends its time on.
//!
//! Unlike in the products that serve, the lanes lie along the thin matrix's columns,
//! so nothing is summed across lanes: an element takes its terms in ascending order,
//! [`GROUP`] at a time from zero, and the groups' sums in ascending order.

use rayon::prelude::*;

use crate::Backend;
use crate::vector::{Kernel, LANES, Lanes};

/// Rows of a [`Thin`] matrix, and of a chunk of a block, that lie together.
pub const GROUP: usize = 128;

/// Vectors of lanes of one panel.
const PANEL_VECTORS: usize = 3;

/// Rows of a tile where there are registers for it with [`PANEL_VECTORS`].
const TILE_ROWS: usize = 8;

/// Rows of a tile of one vector where there are not.
const HALF_ROWS: usize = TILE_ROWS / 2;

/// Rows that are packed together.
const PACK_ROWS: usize = 8;

/// A matrix `[n_rows, n_cols]` of few columns.
///
/// Groups of [`GROUP`] rows follow each other; within a group panels of up to three
/// vectors of columns, each row-major. Rows and columns are padded with zeros.
#[derive(Clone, Debug, PartialEq)]
pub struct Thin {
    n_rows: usize,
    n_cols: usize,
    data: Vec<f32>,
}

impl Thin {
    /// `[n_rows, n_cols]` of zeros.
    pub fn zeros(n_rows: usize, n_cols: usize) -> Self {
        let len = n_rows.next_multiple_of(GROUP) * n_cols.next_multiple_of(LANES);
        Self { n_rows, n_cols, data: vec![0.0; len] }
    }

    /// Columns, one a row: `[n_cols, n_rows]`.
    ///
    /// Panics when the length is not the product.
    pub fn from_columns(columns: &[f32], n_rows: usize, n_cols: usize) -> Self {
        assert_eq!(Some(columns.len()), n_rows.checked_mul(n_cols), "elements of columns");
        let mut out = Self::zeros(n_rows, n_cols);
        out.par_groups_mut(0).enumerate().for_each(|(g, group)| {
            let rows = g * GROUP..n_rows.min((g + 1) * GROUP);
            for (col, column) in columns.chunks(n_rows).enumerate() {
                let (at, width) = place(n_cols, col);
                let places = group[at..].iter_mut().step_by(width);
                places.zip(&column[rows.clone()]).for_each(|(to, from)| *to = *from);
            }
        });
        out
    }

    /// Rows, `[n_rows, n_cols]`.
    ///
    /// Panics when the length is not the product.
    pub fn from_rows(rows: &[f32], n_rows: usize, n_cols: usize) -> Self {
        assert_eq!(Some(rows.len()), n_rows.checked_mul(n_cols), "elements of rows");
        let mut out = Self::zeros(n_rows, n_cols);
        out.par_groups_mut(0).zip(rows.par_chunks((GROUP * n_cols).max(1))).for_each(
            |(group, rows)| {
                for (first, width) in panels(n_cols) {
                    let columns = first..n_cols.min(first + width);
                    let places = group[first * GROUP..].chunks_mut(width);
                    for (to, row) in places.zip(rows.chunks(n_cols)) {
                        to[..columns.len()].copy_from_slice(&row[columns.clone()]);
                    }
                }
            },
        );
        out
    }

    /// The first `n` columns, one a row: `[n, n_rows]`.
    ///
    /// Panics when there are fewer.
    pub fn to_columns(&self, n: usize) -> Vec<f32> {
        assert!(n <= self.n_cols, "columns");
        let mut out = vec![0.0; n * self.n_rows];
        if out.is_empty() {
            return out;
        }
        // A row's share of a vector lies in one line of the cache.
        out.par_chunks_mut(LANES * self.n_rows).enumerate().for_each(|(index, columns)| {
            let (at, width) = place(self.n_cols, index * LANES);
            for (g, group) in self.groups(0).enumerate() {
                let n = GROUP.min(self.n_rows - g * GROUP);
                for (row, from) in group[at..].chunks(width).take(n).enumerate() {
                    let places = columns[g * GROUP + row..].iter_mut().step_by(self.n_rows);
                    places.zip(from).for_each(|(to, from)| *to = *from);
                }
            }
        });
        out
    }

    /// Rows.
    pub fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// Columns.
    pub fn n_cols(&self) -> usize {
        self.n_cols
    }

    /// Groups of rows.
    pub fn n_groups(&self) -> usize {
        self.n_rows.div_ceil(GROUP)
    }

    /// Groups from the one of this index on.
    pub fn groups(&self, first: usize) -> impl Iterator<Item = &[f32]> {
        let len = self.group_len();
        self.data[first * len..].chunks(len.max(1))
    }

    /// [`Thin::groups`], to be written in parallel.
    pub fn par_groups_mut(&mut self, first: usize) -> rayon::slice::ChunksMut<'_, f32> {
        let len = self.group_len();
        self.data[first * len..].par_chunks_mut(len.max(1))
    }

    /// The rows of a group, row-major and widened: up to `[GROUP, n_cols]`.
    pub fn widen_group(&self, index: usize, out: &mut Vec<f64>) {
        let len = self.group_len();
        let group = &self.data[index * len..(index + 1) * len];
        let n = GROUP.min(self.n_rows - index * GROUP);
        let start = out.len();
        out.resize(start + n * self.n_cols, 0.0);
        for (first, width) in panels(self.n_cols) {
            let columns = first..self.n_cols.min(first + width);
            let rows = out[start..].chunks_mut(self.n_cols);
            for (out, row) in rows.zip(group[first * GROUP..].chunks(width)) {
                let pairs = out[columns.clone()].iter_mut().zip(row);
                pairs.for_each(|(out, v)| *out = f64::from(*v));
            }
        }
    }

    /// Becomes `own · self + other · x`.
    ///
    /// Panics when `x` has another shape.
    pub fn combine(&mut self, own: f32, x: &Self, other: f32) {
        assert_eq!([self.n_rows, self.n_cols], [x.n_rows, x.n_cols], "shapes of thin matrices");
        self.data.iter_mut().zip(&x.data).for_each(|(y, x)| *y = own * *y + other * x);
    }

    fn group_len(&self) -> usize {
        GROUP * self.n_cols.next_multiple_of(LANES)
    }
}

/// First column and width of each panel.
fn panels(n_cols: usize) -> impl Iterator<Item = (usize, usize)> {
    let vectors = n_cols.div_ceil(LANES);
    let n = vectors.div_ceil(PANEL_VECTORS);
    (0..n).map(move |i| {
        let (first, end) = (i * vectors / n, (i + 1) * vectors / n);
        (first * LANES, (end - first) * LANES)
    })
}

/// Where a column's first element lies in a group, and how far apart its elements are.
fn place(n_cols: usize, col: usize) -> (usize, usize) {
    let (mut at, mut apart) = (0, 0);
    for (first, width) in panels(n_cols) {
        if first <= col {
            (at, apart) = (first * GROUP + col - first, width);
        }
    }
    (at, apart)
}

/// Elements of a chunk of `GROUP` rows of a matrix, as [`pack_rows`] lays them out.
pub fn chunk_len(n_cols: usize) -> usize {
    GROUP * n_cols.next_multiple_of(LANES)
}

/// Writes rows, `[n, n_cols]`, to a chunk, from its row `first` on: panels of one
/// vector of columns, each row-major.
///
/// Panics when they do not fit.
pub fn pack_rows(rows: &[f32], n_cols: usize, first: usize, chunk: &mut [f32]) {
    assert_eq!(chunk.len(), chunk_len(n_cols), "elements of a chunk");
    let n = rows.len() / n_cols.max(1);
    assert!(n * n_cols == rows.len() && first + n <= GROUP, "rows of a chunk");
    // Few rows at a time: they may be as far apart as the ways of a cache.
    for (index, rows) in rows.chunks(PACK_ROWS * n_cols.max(1)).enumerate() {
        let first = (first + index * PACK_ROWS) * LANES;
        for (index, panel) in chunk.chunks_exact_mut(GROUP * LANES).enumerate() {
            let columns = index * LANES..n_cols.min((index + 1) * LANES);
            let panel = panel[first..].chunks_exact_mut(LANES);
            for (to, row) in panel.zip(rows.chunks_exact(n_cols)) {
                match (<&mut [f32; LANES]>::try_from(&mut *to), row[columns.clone()].try_into()) {
                    (Ok(to), Ok(from)) => *to = from,
                    _ => to[..columns.len()].copy_from_slice(&row[columns.clone()]),
                }
            }
        }
    }
}

/// A panel of a group: its elements and its width.
fn panel(group: &[f32], first: usize, width: usize) -> (&[f32], usize) {
    (&group[first * GROUP..][..width * GROUP], width)
}

fn panel_mut(group: &mut [f32], first: usize, width: usize) -> (&mut [f32], usize) {
    (&mut group[first * GROUP..][..width * GROUP], width)
}

impl Backend {
    /// `C += A B` for the rows of a chunk of `A`: `a` is that chunk, `[GROUP, n]`, `b` is
    /// `[n, k]`, `c` is a group of a thin matrix `[_, k]`.
    ///
    /// Panics when the shapes do not fit each other.
    pub fn add_chunk_product(self, a: &[f32], b: &Thin, c: &mut [f32]) {
        assert_eq!(a.len(), chunk_len(b.n_rows), "elements of a chunk");
        assert_eq!(c.len(), b.group_len(), "elements of a group");
        for (a, group) in a.chunks(GROUP * GROUP).zip(b.groups(0)) {
            let n_runs = a.len() / (GROUP * LANES);
            for (first, width) in panels(b.n_cols) {
                let a = Runs::<1> { at: a, row: LANES, next: GROUP * LANES, n_runs };
                self.add_panel(a, panel(group, first, width), panel_mut(c, first, width));
            }
        }
    }

    /// `C += Aᵀ B` for some columns of a chunk of `A`: `a` is that chunk, `[GROUP, n]`,
    /// of which the columns from `GROUP · index` on are taken; `b` is the group with
    /// the chunk's rows of a thin matrix `[_, k]`, `c` is group `index` of one `[n, k]`.
    ///
    /// Panics when the shapes do not fit each other.
    pub fn add_chunk_transposed(self, a: &[f32], index: usize, b: &[f32], k: usize, c: &mut [f32]) {
        assert!(b.len() == chunk_len(k) && c.len() == b.len(), "elements of a group");
        let a = a.chunks(GROUP * GROUP).nth(index).unwrap_or_default();
        for (first, width) in panels(k) {
            let (b, (c, _)) = (panel(b, first, width), panel_mut(c, first, width));
            for (a, c) in a.chunks(GROUP * LANES).zip(c.chunks_mut(LANES * width)) {
                let n_runs = GROUP / LANES;
                let a = Runs::<LANES> { at: a, row: 1, next: LANES * LANES, n_runs };
                self.add_panel(a, b, (c, width));
            }
        }
    }

    /// `A B` of thin matrices `[n, k]` and `[k, m]`: `[n, m]`.
    ///
    /// Panics when the shapes do not fit each other.
    pub fn thin_product(self, a: &Thin, b: &Thin) -> Thin {
        assert_eq!(a.n_cols, b.n_rows, "columns of a and rows of b");
        let mut out = Thin::zeros(a.n_rows, b.n_cols);
        let groups = out.par_groups_mut(0).enumerate();
        groups.for_each(|(index, c)| {
            for a in a.groups(index).take(1) {
                for (a_first, a_width) in panels(a.len() / GROUP) {
                    let (a, _) = panel(a, a_first, a_width);
                    for run in (0..a_width).step_by(LANES) {
                        let row = a_first + run;
                        let group = b.groups(row / GROUP).next().unwrap_or_default();
                        let a = Runs::<1> { at: &a[run..], row: a_width, next: 0, n_runs: 1 };
                        for (first, width) in panels(b.n_cols) {
                            let (b, _) = panel(group, first, width);
                            let b = &b[row % GROUP * width..];
                            self.add_panel(a, (b, width), panel_mut(c, first, width));
                        }
                    }
                }
            }
        });
        out
    }

    /// Adds to the rows of a panel, eight at a time.
    #[inline]
    fn add_panel<const STEP: usize>(
        self,
        a: Runs<'_, STEP>,
        (b, width): (&[f32], usize),
        (c, c_width): (&mut [f32], usize),
    ) {
        let n_rows = c.len() / width;
        let last = (n_rows - 1) * a.row + (a.n_runs - 1) * a.next + (LANES - 1) * STEP;
        assert!(n_rows.is_multiple_of(TILE_ROWS) && c.len() == n_rows * width, "rows of tiles");
        assert!(width == c_width && width.is_multiple_of(LANES), "widths of panels");
        assert!(last < a.at.len() && a.n_runs * LANES * width <= b.len(), "terms");
        // SAFETY: the last elements of all three were just checked to exist.
        unsafe {
            match width / LANES {
                1 => self.run(Panel::<STEP, 1> { a, b, c }),
                2 => self.run(Panel::<STEP, 2> { a, b, c }),
                3 => self.run(Panel::<STEP, 3> { a, b, c }),
                _ => unreachable!("panels have one to three vectors"),
            }
        }
    }
}

/// Where the terms of a product come from: runs of a vector's length along the sum,
/// `STEP` elements from one term to the next.
#[derive(Clone, Copy)]
struct Runs<'a, const STEP: usize> {
    at: &'a [f32],
    /// Elements from one row of the result to the next.
    row: usize,
    /// Elements from one run to the next.
    next: usize,
    n_runs: usize,
}

/// The product for the rows of a panel of `N` vectors.
struct Panel<'a, const STEP: usize, const N: usize> {
    a: Runs<'a, STEP>,
    /// `[n_runs · LANES, N · LANES]`.
    b: &'a [f32],
    /// `[n_rows, N · LANES]`, whole tiles.
    c: &'a mut [f32],
}

impl<const STEP: usize, const N: usize> Kernel for Panel<'_, STEP, N> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<V: Lanes>(self) {
        let Self { a, b, c } = self;
        let tile_len = TILE_ROWS * N * LANES;
        for (index, c) in c.chunks_exact_mut(tile_len).enumerate() {
            // SAFETY: `add_panel` checked the last elements.
            unsafe {
                let at = a.at.as_ptr().add(index * TILE_ROWS * a.row);
                if V::MANY_REGISTERS {
                    tile::<V, STEP, TILE_ROWS, N>(at, a, b.as_ptr(), c.as_mut_ptr(), N * LANES);
                } else {
                    for part in [0, HALF_ROWS] {
                        let at = at.add(part * a.row);
                        let c = c.as_mut_ptr().add(part * N * LANES);
                        for vector in 0..N {
                            let at_vector = vector * LANES;
                            let (b, c) = (b.as_ptr().add(at_vector), c.add(at_vector));
                            tile::<V, STEP, HALF_ROWS, 1>(at, a, b, c, N * LANES);
                        }
                    }
                }
            }
        }
    }
}

/// Adds to `R` rows of `N` vectors; rows of `b` and `c` are `width` apart.
///
/// # Safety
/// As for [`Lanes`]; every element that is named exists.
#[inline(always)]
unsafe fn tile<V: Lanes, const STEP: usize, const R: usize, const N: usize>(
    mut at: *const f32,
    a: Runs<'_, STEP>,
    mut b: *const f32,
    c: *mut f32,
    width: usize,
) {
    // SAFETY: the caller's promise. Past the last run neither `at` nor `b` is read.
    unsafe {
        let mut acc = [[V::splat(0.0); N]; R];
        for _ in 0..a.n_runs {
            for term in 0..LANES {
                let mut bs = [V::splat(0.0); N];
                for (n, bv) in bs.iter_mut().enumerate() {
                    *bv = V::load(b.add(n * LANES));
                }
                for (r, acc) in acc.iter_mut().enumerate() {
                    let av = V::splat(*at.add(r * a.row + term * STEP));
                    for (acc, bv) in acc.iter_mut().zip(bs) {
                        *acc = av.mul_add(bv, *acc);
                    }
                }
                b = b.wrapping_add(width);
            }
            at = at.wrapping_add(a.next);
        }
        let one = V::splat(1.0);
        for (r, acc) in acc.into_iter().enumerate() {
            for (n, sum) in acc.into_iter().enumerate() {
                let to = c.add(r * width + n * LANES);
                sum.mul_add(one, V::load(to)).store(to);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::naive;
    use onebase_tensor::{MatrixRef, stream};
    use rand::RngExt;

    const SHAPES: [[usize; 2]; 6] =
        [[1, 1], [5, 16], [127, 130], [128, 128], [300, 17], [129, 400]];
    const WIDTHS: [usize; 7] = [1, 15, 16, 40, 64, 80, 150];

    fn random(label: &str, n: usize) -> Vec<f32> {
        let mut rng = stream(3, label, 0);
        (0..n).map(|_| rng.random_range(-1.0f32..1.0)).collect()
    }

    fn transposed(a: &[f32], n_cols: usize) -> Vec<f32> {
        (0..n_cols).flat_map(|j| a.iter().skip(j).step_by(n_cols)).copied().collect()
    }

    /// `a bᵀ` of `[m, n]` and `[k, n]`, computed by every backend, against the oracle;
    /// the vector backends against each other.
    fn check(
        a: &[f32],
        [m, n]: [usize; 2],
        b: &[f32],
        k: usize,
        product: impl Fn(Backend) -> Thin,
    ) {
        let view = |data, rows| MatrixRef::new(data, rows, n).unwrap();
        let (want, magnitude) = naive::product(view(a, m), view(b, k));
        #[allow(clippy::cast_precision_loss)]
        let eps = (n as f64 / GROUP as f64 + (GROUP + 2) as f64) * f64::from(f32::EPSILON);
        let mut vector_result: Option<Thin> = None;
        for backend in Backend::available() {
            let what = format!("{} {m}x{n} times {k}", backend.name());
            let got = product(backend);
            let columns = got.to_columns(k);
            let outside = naive::first_outside(&columns, &want, &magnitude, eps);
            assert_eq!(outside, None, "{what}");
            // Padding stays zero, or the next product would add it.
            assert_eq!(got, Thin::from_columns(&columns, m, k), "{what}");
            if backend.name() != "portable" {
                let first = vector_result.get_or_insert_with(|| got.clone());
                assert_eq!(*first, got, "{what}: vector backends agree");
            }
        }
    }

    fn pack(a: &[f32], [m, n]: [usize; 2]) -> Vec<Vec<f32>> {
        let chunks = a.chunks(GROUP * n).map(|rows| {
            let mut chunk = vec![0.0; chunk_len(n)];
            let half = rows.len() / n / 2;
            let (before, after) = rows.split_at(half * n);
            pack_rows(after, n, half, &mut chunk);
            pack_rows(before, n, 0, &mut chunk);
            chunk
        });
        let chunks: Vec<_> = chunks.collect();
        assert_eq!(chunks.len(), m.div_ceil(GROUP));
        chunks
    }

    #[test]
    fn products_with_chunks_equal_the_oracle() {
        for shape @ [m, n] in SHAPES {
            let a = random("a", m * n);
            let chunks = pack(&a, shape);
            for k in WIDTHS {
                let b = random("b", k * n);
                let thin = Thin::from_columns(&b, n, k);
                check(&a, shape, &b, k, |backend| {
                    let mut c = Thin::zeros(m, k);
                    let groups = c.par_groups_mut(0).zip(&chunks);
                    groups.for_each(|(c, a)| backend.add_chunk_product(a, &thin, c));
                    c
                });
                let b = random("b", k * m);
                let thin = Thin::from_columns(&b, m, k);
                check(&transposed(&a, n), [n, m], &b, k, |backend| {
                    let mut c = Thin::zeros(n, k);
                    c.par_groups_mut(0).enumerate().for_each(|(index, c)| {
                        for (a, b) in chunks.iter().zip(thin.groups(0)) {
                            backend.add_chunk_transposed(a, index, b, k, c);
                        }
                    });
                    c
                });
            }
        }
    }

    #[test]
    fn products_of_thin_matrices_equal_the_oracle() {
        for shape @ [m, n] in SHAPES {
            let a = random("a", m * n);
            let thin = Thin::from_columns(&transposed(&a, n), m, n);
            for k in WIDTHS {
                let b = random("b", k * n);
                let other = Thin::from_columns(&b, n, k);
                check(&a, shape, &b, k, |backend| backend.thin_product(&thin, &other));
            }
        }
    }

    #[test]
    fn rows_are_columns_turned() {
        for (n_rows, n_cols) in [(1, 1), (130, 5), (300, 49), (128, 16), (7, 100), (3, 0), (0, 3)] {
            let rows = random("rows", n_rows * n_cols);
            let columns = transposed(&rows, n_cols.max(1));
            let thin = Thin::from_rows(&rows, n_rows, n_cols);
            assert_eq!(thin, Thin::from_columns(&columns, n_rows, n_cols));
        }
    }

    #[test]
    fn columns_and_rows_are_where_they_were_put() {
        for [n, k] in SHAPES {
            let columns = random("columns", n * k);
            let thin = Thin::from_columns(&columns, n, k);
            assert_eq!([thin.n_rows(), thin.n_cols()], [n, k]);
            let some = k.div_ceil(2);
            assert_eq!(thin.to_columns(some), columns[..some * n]);
            let mut rows = Vec::new();
            (0..thin.n_groups()).for_each(|index| thin.widen_group(index, &mut rows));
            let want: Vec<f64> = transposed(&columns, n).into_iter().map(f64::from).collect();
            assert_eq!(rows, want);
        }
    }
}
