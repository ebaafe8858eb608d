//! Encoding holds no more than the codec has said. Alone in its program, since memory is
//! counted for the whole of it.

// Helpers of tests may panic as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::ops::Range;

use onebase_codec::{CODECS, CodecSpec, DeltaSource, Kind, Result};
use onebase_tensor::stream;
use peak_alloc::PeakAlloc;
use rand_distr::{Distribution, StandardNormal};

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// A delta that takes no memory itself: rows are drawn when they are read.
struct Drawn([usize; 2]);

impl DeltaSource for Drawn {
    fn shape(&self) -> [usize; 2] {
        self.0
    }

    fn read_rows(&self, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        for (row, out) in rows.zip(out.chunks_mut(self.0[1])) {
            let mut rng = stream(1, "delta", row as u64);
            out.iter_mut().for_each(|w| *w = StandardNormal.sample(&mut rng));
        }
        Ok(())
    }
}

#[test]
fn encoding_holds_no_more_than_was_said() {
    let mut specs: Vec<CodecSpec> = Vec::new();
    for codec in CODECS {
        specs.push(codec.name().parse().unwrap());
        for option in codec.options() {
            if let Kind::Choice(words) = option.kind {
                let text = |word| format!("{}:{}={word}", codec.name(), option.name);
                specs.extend(words[1..].iter().map(|word| text(word).parse().unwrap()));
            }
        }
    }
    for n_threads in [1, 7] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads).build().unwrap();
        for spec in &specs {
            for shape in [[128, 1024], [4096, 160], [512, 512]] {
                let said = spec.working_bytes(shape, n_threads);
                let before = MEMORY.current_usage();
                MEMORY.reset_peak_usage();
                let delta = pool.install(|| spec.encode(&Drawn(shape)).unwrap());
                let held = MEMORY.peak_usage() - before;
                drop(delta);
                assert!(held <= said, "{spec} {shape:?} {n_threads}: {held} of {said}");
            }
        }
    }
}
