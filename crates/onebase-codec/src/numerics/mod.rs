//! Dense linear algebra and rounding, for encoders and for those who judge them.

mod allocation;
mod eigen;
mod gptq;
mod hessian;
mod memory;
mod orthogonal;
mod products;
mod randomized;
mod truncated;

pub use allocation::{Allocation, Width, allocate};
pub use eigen::{Eigen, symmetric_eigen, symmetric_eigenvalues};
pub use gptq::{Grid, RangeGrid, Rounded, ScaleFormat, gptq, gptq_bytes, zero_loss};
pub use hessian::{ColumnOrder, DAMPING, HessianFactor};
pub use memory::truncated_svd_bytes;
pub use orthogonal::random_orthogonal;
pub use products::{gram, product, product_transposed};
pub use truncated::{SvdMethod, Truncated, gram_of_shorter_side, truncated_svd};

pub(crate) use products::{product_of_columns, solve_positive, solve_vector};
pub(crate) use randomized::{times, transposed_times};

use products::{add_gram_of_columns, add_half_gram_of_columns, inverse_of_cholesky};
use truncated::OVERSAMPLE;
