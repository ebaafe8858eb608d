use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// A step of encoding that takes much of its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Singular values and vectors.
    Decomposition,
    /// What each width of code would cost each pair of vectors.
    ErrorTable,
    /// Choosing the widths.
    Allocation,
    /// Codes, each making good the errors of those before.
    Rounding,
}

impl Stage {
    /// All of them, in their order.
    pub const ALL: [Self; 4] =
        [Self::Decomposition, Self::ErrorTable, Self::Allocation, Self::Rounding];

    /// What people call it.
    pub fn name(self) -> &'static str {
        match self {
            Stage::Decomposition => "decomposition",
            Stage::ErrorTable => "error tables",
            Stage::Allocation => "allocation",
            Stage::Rounding => "rounding",
        }
    }
}

/// Nanoseconds of this process.
static SPENT: [AtomicU64; Stage::ALL.len()] = [const { AtomicU64::new(0) }; Stage::ALL.len()];

/// Seconds that this process has spent in a stage so far; codecs that have no stages
/// count nowhere.
pub fn stage_seconds(stage: Stage) -> f64 {
    std::time::Duration::from_nanos(SPENT[stage as usize].load(Ordering::Relaxed)).as_secs_f64()
}

/// Runs a part of a stage.
pub(crate) fn timed<T>(stage: Stage, run: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = run();
    let spent = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
    SPENT[stage as usize].fetch_add(spent, Ordering::Relaxed);
    result
}
