use std::fmt;
use std::ops::Range;

use half::{bf16, f16};

use crate::DType;

/// A buffer whose length is not its rows times its columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShapeMismatch {
    /// Rows times columns that were claimed.
    pub shape: [usize; 2],
    /// Elements that were there.
    pub len: usize,
}

impl fmt::Display for ShapeMismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [rows, cols] = self.shape;
        write!(f, "{} elements for a {rows}x{cols} matrix", self.len)
    }
}

impl std::error::Error for ShapeMismatch {}

fn check(shape: [usize; 2], len: usize) -> Result<(), ShapeMismatch> {
    if shape[0].checked_mul(shape[1]) == Some(len) {
        Ok(())
    } else {
        Err(ShapeMismatch { shape, len })
    }
}

/// A dense row-major f32 matrix, `[rows, cols]`, read only.
#[derive(Clone, Copy, Debug)]
pub struct MatrixRef<'a> {
    data: &'a [f32],
    shape: [usize; 2],
}

impl<'a> MatrixRef<'a> {
    /// Views `data` as `rows` x `cols`.
    ///
    /// # Errors
    /// When the length is not the product.
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Result<Self, ShapeMismatch> {
        check([rows, cols], data.len())?;
        Ok(Self { data, shape: [rows, cols] })
    }

    /// `[rows, cols]`.
    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// Number of rows.
    pub fn n_rows(&self) -> usize {
        self.shape[0]
    }

    /// Number of columns.
    pub fn n_cols(&self) -> usize {
        self.shape[1]
    }

    /// All elements, row after row.
    pub fn data(&self) -> &'a [f32] {
        self.data
    }

    /// One row.
    pub fn row(&self, row: usize) -> &'a [f32] {
        &self.data[row * self.shape[1]..(row + 1) * self.shape[1]]
    }

    /// A run of rows.
    pub fn rows(&self, rows: Range<usize>) -> MatrixRef<'a> {
        let cols = self.shape[1];
        MatrixRef {
            data: &self.data[rows.start * cols..rows.end * cols],
            shape: [rows.len(), cols],
        }
    }
}

/// A dense row-major f32 matrix, `[rows, cols]`, to write.
#[derive(Debug)]
pub struct MatrixMut<'a> {
    data: &'a mut [f32],
    shape: [usize; 2],
}

impl<'a> MatrixMut<'a> {
    /// Views `data` as `rows` x `cols`.
    ///
    /// # Errors
    /// When the length is not the product.
    pub fn new(data: &'a mut [f32], rows: usize, cols: usize) -> Result<Self, ShapeMismatch> {
        check([rows, cols], data.len())?;
        Ok(Self { data, shape: [rows, cols] })
    }

    /// `[rows, cols]`.
    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// Number of rows.
    pub fn n_rows(&self) -> usize {
        self.shape[0]
    }

    /// Number of columns.
    pub fn n_cols(&self) -> usize {
        self.shape[1]
    }

    /// All elements, row after row.
    pub fn data(&mut self) -> &mut [f32] {
        self.data
    }

    /// One row.
    pub fn row(&mut self, row: usize) -> &mut [f32] {
        let cols = self.shape[1];
        &mut self.data[row * cols..(row + 1) * cols]
    }

    /// A run of rows, borrowed for as long as the result lives.
    pub fn rows(&mut self, rows: Range<usize>) -> MatrixMut<'_> {
        let cols = self.shape[1];
        let shape = [rows.len(), cols];
        MatrixMut { data: &mut self.data[rows.start * cols..rows.end * cols], shape }
    }

    /// The same matrix, read only.
    pub fn as_ref(&self) -> MatrixRef<'_> {
        MatrixRef { data: self.data, shape: self.shape }
    }
}

/// The elements of a weight matrix `[out_features, in_features]` as stored.
#[derive(Clone, Copy, Debug)]
pub enum WeightRef<'a> {
    /// IEEE binary32.
    F32(&'a [f32]),
    /// bfloat16.
    BF16(&'a [bf16]),
    /// IEEE binary16.
    F16(&'a [f16]),
}

impl<'a> WeightRef<'a> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            WeightRef::F32(w) => w.len(),
            WeightRef::BF16(w) => w.len(),
            WeightRef::F16(w) => w.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        match self {
            WeightRef::F32(_) => DType::F32,
            WeightRef::BF16(_) => DType::BF16,
            WeightRef::F16(_) => DType::F16,
        }
    }

    /// A run of elements.
    pub fn slice(&self, range: Range<usize>) -> WeightRef<'a> {
        match self {
            WeightRef::F32(w) => WeightRef::F32(&w[range]),
            WeightRef::BF16(w) => WeightRef::BF16(&w[range]),
            WeightRef::F16(w) => WeightRef::F16(&w[range]),
        }
    }

    /// Widens every element into `out`, which has the same length.
    pub fn widen(&self, out: &mut [f32]) {
        assert_eq!(self.len(), out.len(), "length of the widened weight");
        match self {
            WeightRef::F32(w) => out.copy_from_slice(w),
            WeightRef::BF16(w) => out.iter_mut().zip(*w).for_each(|(o, v)| *o = v.to_f32()),
            WeightRef::F16(w) => out.iter_mut().zip(*w).for_each(|(o, v)| *o = v.to_f32()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_checked_without_overflow() {
        let data = [0.0; 6];
        assert!(MatrixRef::new(&data, 2, 3).is_ok());
        assert!(MatrixRef::new(&data, 3, 3).is_err());
        assert!(MatrixRef::new(&data, usize::MAX, 2).is_err());
    }

    #[test]
    fn rows_are_runs_of_the_data() {
        let data: Vec<f32> = (0..6u8).map(f32::from).collect();
        let m = MatrixRef::new(&data, 3, 2).unwrap();
        assert_eq!(m.row(1), [2.0, 3.0]);
        assert_eq!(m.rows(1..3).data(), [2.0, 3.0, 4.0, 5.0]);
    }
}
