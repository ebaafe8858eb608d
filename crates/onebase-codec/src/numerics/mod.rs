//! Dense linear algebra in f64, for encoders and for those who judge them.

mod eigen;
mod products;
mod truncated;

pub use eigen::{Eigen, symmetric_eigen, symmetric_eigenvalues};
pub use products::{add_gram_of_columns, gram, product, product_transposed};
pub use truncated::{SvdMethod, Truncated, truncated_svd};
