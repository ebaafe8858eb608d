//! Delta-CoMe: B. Ping et al., "Delta-CoMe: Training-Free Delta-Compression with
//! Mixed-Precision for Large Language Models" (NeurIPS 2024).
//!
//! The singular vectors of the delta in codes of 8, 3 and 2 bits by rank: the first 2
//! pairs, the next 32, and those after them until the bits are used; the rest is dropped.
//! `v` is rounded first, by GPTQ with the second moment of the inputs, then `u`, with that of
//! what the rounded `v` makes of them. The numbers of ranks are those of the authors' program, for
//! every matrix and size; the bits count the codes alone, as there.
//!
//! Unlike there, where ranges of neighbouring columns after sorting by activation share a
//! scale, groups are of the columns as they are (the option `--static-groups` of GPTQ's own
//! program), so that no permutation is stored. Blocks of all widths are finished before
//! anything is run with them, and no layer is run twice; factors are not rounded to bf16 before
//! they have codes. Where no second moment is known, all inputs are taken for alike: `v` is then
//! rounded to the nearest. The option `target` adds what the codec `deltamix` corrects; it is not
//! part of the paper.

use onebase_tensor::{EncodedDelta, PartShapes, PartSpec};

use crate::calibration_options::{DAMPING, GROUP_SIZE, ORDER, TARGET, order, target};
use crate::codec::DeltaLinear;
use crate::svd_options::{SEED, SVD, svd_method};
use crate::svd_space::{Blocks, Grids, Layout, MOST_PAIRS, Method, encode, encode_bytes};
use crate::{Calibrated, Codec, DeltaSource, Kind, OptionSpec, Options, Result, SecondMoment};

/// Parts: see [`Layout`], with groups.
pub(super) struct DeltaCome;

/// Ranks and their widths, the first first, and the width of all that follow.
const RANKS: [(usize, u8); 2] = [(2, 8), (32, 3)];
const REST: u8 = 2;

impl Codec for DeltaCome {
    fn name(&self) -> &'static str {
        "delta-come"
    }

    fn version(&self) -> u32 {
        1
    }

    fn summary(&self) -> &'static str {
        "singular vectors in codes of 8, 3 and 2 bits by rank, rounded by GPTQ"
    }

    fn options(&self) -> &'static [OptionSpec] {
        &[
            OptionSpec {
                name: "bits",
                doc: "bits per weight of the codes, without scales; at least one pair of vectors",
                kind: Kind::Number { min: 0.05, max: 16.0, default: 1.0 },
            },
            TARGET,
            GROUP_SIZE,
            ORDER,
            DAMPING,
            SVD,
            SEED,
        ]
    }

    fn claimed_bits(&self, _: &Options, shape: [usize; 2], parts: &PartShapes) -> f64 {
        Layout::code_bits_of(shape, parts)
    }

    fn parts(&self, options: &Options, shape: [usize; 2]) -> Option<Vec<PartSpec>> {
        Some(Layout::new(shape, grids(options), &widths(options, shape)).parts())
    }

    fn working_bytes(&self, options: &Options, shape: [usize; 2]) -> usize {
        encode_bytes(shape, widths(options, shape).len(), &method(options))
    }

    fn encode(&self, options: &Options, delta: &dyn DeltaSource) -> Result<EncodedDelta> {
        encode_with(options, delta, None)
    }

    fn prepare(&self, options: &Options, delta: EncodedDelta) -> Result<Box<dyn DeltaLinear>> {
        Ok(Box::new(Blocks::new(grids(options), delta)?))
    }
}

impl Calibrated for DeltaCome {
    fn encode_calibrated(
        &self,
        options: &Options,
        delta: &dyn DeltaSource,
        inputs: &SecondMoment,
    ) -> Result<EncodedDelta> {
        encode_with(options, delta, Some(inputs))
    }

    fn calibrated_bytes(&self, options: &Options, shape: [usize; 2]) -> usize {
        self.working_bytes(options, shape) + SecondMoment::working_bytes(shape[1])
    }
}

fn encode_with(
    options: &Options,
    delta: &dyn DeltaSource,
    inputs: Option<&SecondMoment>,
) -> Result<EncodedDelta> {
    let widths = widths(options, delta.shape());
    encode(delta, inputs, &method(options), widths.len(), &|_| Ok(widths.clone()))
}

/// The width of each pair.
#[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
fn widths(options: &Options, shape @ [n_rows, n_cols]: [usize; 2]) -> Vec<u8> {
    let [m, n] = shape.map(|n| n as f64);
    let mut left = (options.number("bits") * m * n / (m + n)).floor() as usize;
    let by_rank = RANKS.into_iter().flat_map(|(ranks, width)| std::iter::repeat_n(width, ranks));
    let by_rank =
        by_rank.chain(std::iter::repeat(REST)).take(n_rows.min(n_cols).min(MOST_PAIRS)).enumerate();
    let kept = by_rank.take_while(|(index, width)| {
        let fits = usize::from(*width) <= left;
        left = left.saturating_sub(usize::from(*width));
        // One pair at least.
        fits || *index == 0
    });
    kept.map(|(_, width)| width).collect()
}

fn grids(options: &Options) -> Grids {
    Grids::Group(options.int(GROUP_SIZE.name))
}

fn method(options: &Options) -> Method {
    Method {
        svd: svd_method(options),
        grids: grids(options),
        order: order(options),
        damping: options.number(DAMPING.name),
        blend: 0.0,
        target: target(options),
        sweeps: 0,
    }
}
