//! The ruler: how much of a fine-tune's skill is left in a compressed delta, and
//! at what size.
//!
//! A [`Ruler`] holds a base, a fine-tune, questions with exact answers and a text. It
//! is made once and measures any number of tenants, so that every codec is judged
//! alike. [`compare`] sweeps codecs over sizes and [`Comparison::html`] draws the
//! result beside the limit line, the least error that a code of each size could
//! have. Whatever is measured runs through the forward pass that serves it.

mod activations;
mod compare;
mod comparison;
mod deviation;
mod error;
mod ideal;
mod limit;
mod plan;
mod prepared;
mod reference;
mod report;
mod ruler;
mod sequences;
mod site_error;
mod skill;
mod spectrum;
mod task;

pub use compare::{Compressor, Cost, Input, compare};
pub use comparison::{
    AboveLimit, Comparison, Ideal, LimitLines, LimitPoint, MeasuredText, TaskLevel, Variant,
};
pub use error::Error;
pub use plan::Plan;
pub use reference::check_reference;
pub use ruler::{Measurement, Ruler, Sample, Speed, Tests};
pub use sequences::Subject;
pub use site_error::{SiteError, site_errors, total_error};
pub use task::{Question, Task, TextFile};

/// The result of this crate's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Program and version that measure.
const TOOL: &str = concat!("onebase ", env!("CARGO_PKG_VERSION"));

/// Who is told how far a long measurement has come.
pub trait Watcher: Sync {
    /// A stretch of work begins: what it is, and its size in steps of its own.
    fn begin(&self, what: &str, total: u64);

    /// That many more steps are done.
    fn advance(&self, steps: u64);
}

/// Nobody watches.
#[derive(Clone, Copy, Debug)]
pub struct Unwatched;

impl Watcher for Unwatched {
    fn begin(&self, _: &str, _: u64) {}
    fn advance(&self, _: u64) {}
}
