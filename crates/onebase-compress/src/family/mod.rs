//! Families: several fine-tunes of one base, with the codes that they share.

mod add;
mod build;
mod measure;
mod plan;
mod rebuild;
mod sizes;

pub use add::{Added, add_to_family};
pub use build::build_family;
pub use measure::{Member, Relatives, open_members};
pub use plan::{FamilyOptions, FamilyPlan, FamilyPlans};
pub use rebuild::{check_originals, rebuild_family};
pub use sizes::{FamilyReport, NodeReport, TenantReport, family_report, verify_family};
