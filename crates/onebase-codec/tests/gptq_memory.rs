//! GPTQ holds no more than it has said. Alone in its program, since memory is counted for the
//! whole of it.

// Helpers of tests may panic as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use onebase_codec::numerics::{
    ColumnOrder, DAMPING, Grid, HessianFactor, RangeGrid, ScaleFormat, gptq, gptq_bytes,
};
use peak_alloc::PeakAlloc;

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

fn held<T>(said: usize, what: &str, compute: impl FnOnce() -> T) -> T {
    let before = MEMORY.current_usage();
    MEMORY.reset_peak_usage();
    let out = compute();
    let held = MEMORY.peak_usage() - before;
    assert!(held <= said, "{what}: {held} of {said}");
    out
}

#[test]
fn rounding_holds_no_more_than_was_said() {
    for (n_rows, n, n_threads) in [(1, 1, 1), (40, 200, 7), (700, 1500, 1), (700, 1100, 7)] {
        let h: Vec<f32> = (0..n * n).map(|at| if at % (n + 1) == 0 { 2.0 } else { 1.0 }).collect();
        #[allow(clippy::cast_precision_loss)]
        let w: Vec<f32> = (0..n_rows * n).map(|at| (at as f32).sin()).collect();
        let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads).build().unwrap();
        pool.install(|| {
            let factor = held(HessianFactor::working_bytes(n), "factor", || {
                HessianFactor::new(&h, n, ColumnOrder::Activation, DAMPING).unwrap()
            });
            for group_size in [16, 128, 500, n] {
                let scales = ScaleFormat::F16;
                let (symmetric, static_groups) = (false, false);
                let grid = RangeGrid { bits: 3, group_size, symmetric, static_groups, scales };
                let said = gptq_bytes([n_rows, n], grid.n_groups(n), n_threads);
                held(said, "rounding", || gptq(&w, &factor, &Grid::Range(grid)));
            }
        });
    }
}
