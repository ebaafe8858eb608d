//! The offline side: a base and a fine-tune to an artifact, and back.
//!
//! Tensors are read by blocks of rows and written one after the other, so that
//! memory is bounded by what encoding the largest takes, whatever the checkpoint's size.

mod allocate;
mod archive;
mod budget;
mod calibration;
mod compress;
mod distill;
mod error;
mod family;
mod memory;
mod model_card;
mod pair;
mod plan;
mod progress;
mod quantize;
mod restore;
mod verify;

pub use archive::{ArchiveReport, archive, restore_archive, verify_archive};
pub use budget::Budget;
pub use calibration::{
    Calibration, InputMoment, LayerMoments, MomentRun, Sequential, WINDOW_TOKENS, calibrate,
    check_calibrated, generated_tokens, quadratic_form, random_tokens,
};
pub use compress::{Job, compress, compress_part, join};
pub use distill::{DistillText, Distilled, distill};
pub use error::Error;
pub use family::{
    Added, FamilyOptions, FamilyPlan, FamilyPlans, FamilyReport, Member, NodeReport, Relatives,
    TenantReport, add_to_family, build_family, check_originals, family_report, open_members,
    rebuild_family, verify_family,
};
pub use memory::{ExpectedMemory, expected_memory};
pub use model_card::updated_model_card;
pub use pair::{Pair, TensorDelta};
pub use plan::{Inputs, Plan, TablePlan, VectorPlan};
pub use progress::{Progress, Silent};
pub use quantize::{
    QuantizeOptions, QuantizeText, Quantized, Reference, RotatedPair, Rounding, linear_bits,
    open_rotated, quantize,
};
pub use restore::restore;
pub use verify::{Verified, prepared, verify};

/// The result of this crate's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;
