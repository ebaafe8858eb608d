//! The offline side: a base and a fine-tune to an artifact, and back.
//!
//! Tensors are read by blocks of rows and written one after the other, so that
//! memory is bounded by the codes of one file, whatever the checkpoint's size.

mod compress;
mod error;
mod model_card;
mod pair;
mod plan;
mod progress;
mod restore;
mod verify;

pub use compress::compress;
pub use error::Error;
pub use model_card::updated_model_card;
pub use pair::{Pair, TensorDelta};
pub use plan::{Plan, TablePlan};
pub use progress::{Progress, Silent};
pub use restore::restore;
pub use verify::{Verified, prepared, verify};

/// The result of this crate's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;
