//! DeltaMix, later PrinMix: "DeltaMix: Optimal Mixed-Precision Delta Compression" in its
//! second version, arXiv 2506.11087, whose text could not be read. What is said here of the method
//! follows its abstracts, reviews and a related program of the same group.
//!
//! The delta is `Σ s_i u_i v_iᵀ`; each pair gets codes of a width of its own, or is dropped. Since
//! the `u_i` are orthonormal, rounding the `v_i` changes the squared outputs by exactly
//! `Σ s_i² δ_iᵀ G δ_i`, where `G` is the second moment of the inputs: the table of what each
//! width costs each pair is that of GPTQ's losses, and the widths that cost least in the bits that
//! there are follow from it by a knapsack, solved exactly for the pairs that are looked at: those of
//! the largest singular values, seven tenths as many as codes of one bit would leave room for. `v` is rounded first. Then what is best
//! for `u`, given the codes of `v`, is found by least squares (the method's correction of the
//! target), and rounded.
//!
//! The published method, as far as it is known, is
//! `deltamix:count=codes,grid=group,target=kept,sweeps=0,blend=0`, its cap on the number of widths
//! not known. What goes beyond it here can each be left out:
//!
//! - `count=all`: bits count all parts, not the codes alone.
//! - `grid=pair`: one scale for each pair of vectors in place of ranges for each row and group.
//! - `target=delta`: `u` is fitted to the whole delta, and makes up for pairs that are dropped.
//! - `sweeps`: `v` is fitted to the rounded `u` again, then `u` to that; the best is kept.
//! - `blend`: a part of the identity in the second moment, for inputs that the calibration
//!   text does not have.
//! - `table=both`: costs count what rounding `u` does, too.

use onebase_kernels::plane_bytes;
use onebase_tensor::{EncodedDelta, PartShapes, PartSpec};

use crate::calibration_options::{DAMPING, GROUP_SIZE, ORDER, TARGET, order, target};
use crate::codec::DeltaLinear;
use crate::numerics::{Width, allocate};
use crate::stages::{Stage, timed};
use crate::svd_options::{SEED, SVD, svd_method};
use crate::svd_space::{
    Blocks, Choice, Grids, Layout, MAX_WIDTH, MOST_PAIRS, Method, encode, encode_bytes,
};
use crate::{Calibrated, Codec, DeltaSource, Kind, OptionSpec, Options, Result, SecondMoment};

/// Parts: see [`Layout`].
pub(super) struct DeltaMix;

impl Codec for DeltaMix {
    fn name(&self) -> &'static str {
        "deltamix"
    }

    fn version(&self) -> u32 {
        1
    }

    fn summary(&self) -> &'static str {
        "singular vectors, each pair in codes of a width chosen for it, `u` fitted to the coded `v`"
    }

    fn options(&self) -> &'static [OptionSpec] {
        &[
            OptionSpec {
                name: "bits",
                doc: "bits per weight, at least one pair of vectors",
                kind: Kind::Number { min: 0.05, max: 16.0, default: 1.0 },
            },
            OptionSpec {
                name: "count",
                doc: "what bits count: all parts, or the codes alone",
                kind: Kind::Choice(&["all", "codes"]),
            },
            OptionSpec {
                name: "widths",
                doc: "most different widths of codes in a matrix",
                kind: Kind::Int { min: 1, max: MAX_WIDTH, multiple_of: 1, default: 3 },
            },
            OptionSpec {
                name: "grid",
                doc: "what shares a scale: a pair of vectors, or a group of a row",
                kind: Kind::Choice(&["pair", "group"]),
            },
            OptionSpec { kind: Kind::Choice(&["delta", "kept", "none"]), ..TARGET },
            OptionSpec {
                name: "sweeps",
                doc: "times that v is fitted to u again, and u to v, with target=delta",
                kind: Kind::Int { min: 0, max: 16, multiple_of: 1, default: 2 },
            },
            OptionSpec {
                name: "table",
                doc: "what a width costs: rounding v, or both",
                kind: Kind::Choice(&["v", "both"]),
            },
            OptionSpec {
                name: "blend",
                doc: "part of the identity in the second moment of inputs",
                kind: Kind::Number { min: 0.0, max: 1.0, default: 0.5 },
            },
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

    /// Widths follow from the delta.
    fn parts(&self, _: &Options, _: [usize; 2]) -> Option<Vec<PartSpec>> {
        None
    }

    fn most_parts(&self, options: &Options, shape: [usize; 2]) -> Option<Vec<PartSpec>> {
        Some(Budget::new(options, shape).most_parts(candidates(options, shape)))
    }

    fn working_bytes(&self, options: &Options, shape: [usize; 2]) -> usize {
        encode_bytes(shape, candidates(options, shape), &method(options))
    }

    fn draft(&self) -> &'static [(&'static str, usize)] {
        &[("sweeps", 0)]
    }

    fn encode(&self, options: &Options, delta: &dyn DeltaSource) -> Result<EncodedDelta> {
        encode_with(options, delta, None)
    }

    fn prepare(&self, options: &Options, delta: EncodedDelta) -> Result<Box<dyn DeltaLinear>> {
        Ok(Box::new(Blocks::new(grids(options), delta)?))
    }
}

impl Calibrated for DeltaMix {
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

fn grids(options: &Options) -> Grids {
    match options.choice("grid") {
        "pair" => Grids::Pair,
        _ => Grids::Group(options.int(GROUP_SIZE.name)),
    }
}

fn method(options: &Options) -> Method {
    Method {
        svd: svd_method(options),
        grids: grids(options),
        order: order(options),
        damping: options.number(DAMPING.name),
        blend: options.number("blend"),
        target: target(options),
        sweeps: options.int("sweeps"),
    }
}

fn encode_with(
    options: &Options,
    delta: &dyn DeltaSource,
    inputs: Option<&SecondMoment>,
) -> Result<EncodedDelta> {
    let budget = Budget::new(options, delta.shape());
    let both = options.choice("table") == "both";
    encode(delta, inputs, &method(options), candidates(options, delta.shape()), &|choice| {
        let table = timed(Stage::ErrorTable, || table(choice, &budget.widths, both))?;
        let choose = || budget.choose(&table, &choice.pairs.s, options.int("widths"));
        Ok(timed(Stage::Allocation, choose))
    })
}

/// What each pair costs at width 0, then at each of `widths`: `[rank, widths + 1]`.
fn table(choice: &Choice<'_>, widths: &[u8], both: bool) -> Result<Vec<f64>> {
    let mut by_width = vec![choice.losses(0)?];
    for width in widths.iter().map(|width| usize::from(*width)) {
        let mut losses = choice.losses(width)?;
        if both {
            let of_u = choice.lost_of_u(width);
            let costs = losses.iter_mut().zip(of_u.iter().zip(&by_width[0]));
            costs.for_each(|(loss, (lost, dropped))| *loss += lost * dropped);
        }
        by_width.push(losses);
    }
    let rank = choice.pairs.rank();
    Ok((0..rank).flat_map(|r| by_width.iter().map(move |losses| losses[r])).collect())
}

/// What may be spent, in one unit.
struct Budget {
    shape: [usize; 2],
    grids: Grids,
    /// Whether the unit is a byte of all parts beside those without pairs; else it is a bit of
    /// every element of a pair.
    in_bytes: bool,
    /// Ascending.
    widths: Vec<u8>,
    /// What they cost.
    costs: Vec<Width>,
    total: u64,
}

/// How many pairs are looked at, as a part of those that codes of one bit would leave
/// room for: most that are kept have two bits and more.
const CANDIDATES: f64 = 0.7;

impl Budget {
    #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    fn new(options: &Options, shape @ [n_rows, n_cols]: [usize; 2]) -> Self {
        let grids = grids(options);
        // Ranges of one bit are no better than nothing: zero is one of the two levels.
        let first = if grids == Grids::Pair { 1 } else { 2 };
        let widths: Vec<u8> = (first..=8).collect();
        let bits = options.number("bits");
        let width = |cost: usize, charge: usize| Width { cost: cost as u32, charge: charge as u64 };
        let in_bytes = options.choice("count") == "all";
        let (costs, total) = if !in_bytes {
            let costs = widths.iter().map(|bits| width(usize::from(*bits), 0));
            (costs.collect(), units(bits, shape).floor() as u64)
        } else {
            let costs = widths.iter().map(|bits| {
                let [pair, block] = Layout::most_bytes(shape, grids, usize::from(*bits));
                width(pair, block)
            });
            let fixed = Layout::new(shape, grids, &[]).size_bytes();
            let bytes = (bits * (n_rows * n_cols) as f64 / 8.0).floor() as usize;
            (costs.collect(), bytes.saturating_sub(fixed) as u64)
        };
        Self { shape, grids, in_bytes, widths, costs, total }
    }

    /// As [`Codec::most_parts`], of so many pairs at most.
    fn most_parts(&self, most_pairs: usize) -> Vec<PartSpec> {
        // Numbers in names and shapes may have more digits in one part and fewer in another.
        const DIGITS: usize = 64;
        let none = Layout::new(self.shape, self.grids, &[]);
        let least = Layout::new(self.shape, self.grids, &[self.widths[0]]).size_bytes();
        let mut bytes = least - none.size_bytes();
        if self.in_bytes {
            bytes = bytes.max(self.total as usize);
        } else {
            // Codes are as long as was asked for; everything else as if all pairs had the
            // widest ones, and all widths were there.
            let least = self.widths.first().map_or(1, |width| usize::from(*width));
            let pairs = most_pairs.min(self.total as usize / least);
            let unit: usize = self.shape.map(plane_bytes).iter().sum();
            let [pair, block] = Layout::most_bytes(self.shape, self.grids, MAX_WIDTH);
            let beside = pairs * (pair - MAX_WIDTH * unit) + self.widths.len() * block;
            bytes = bytes.max(self.total as usize * unit + beside);
        }
        none.parts_of_bytes(most_pairs, bytes + DIGITS)
    }

    /// The width of each pair.
    fn choose(&self, table: &[f64], s: &[f64], most_widths: usize) -> Vec<u8> {
        let chosen = allocate(table, &self.costs, self.total, most_widths).choice;
        let widths = chosen.iter().zip(s).map(|(at, s)| match at {
            // Nothing is to be stored of a pair that is not there.
            1.. if *s > 0.0 => self.widths[at - 1],
            _ => 0,
        });
        let mut widths: Vec<u8> = widths.collect();
        // At least one pair, whatever it takes.
        if let Some(first) = widths.first_mut().filter(|_| s[0] > 0.0)
            && chosen.iter().all(|at| *at == 0)
        {
            *first = self.widths[0];
        }
        widths
    }
}

/// Bits of codes in units of one for each element of a pair of vectors.
#[allow(clippy::cast_precision_loss)]
fn units(bits: f64, shape: [usize; 2]) -> f64 {
    let [m, n] = shape.map(|n| n as f64);
    if shape.contains(&0) { 0.0 } else { bits * m * n / (m + n) }
}

/// How many pairs are looked at.
#[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
fn candidates(options: &Options, shape: [usize; 2]) -> usize {
    let most = units(options.number("bits"), shape);
    // A few more where there are few.
    ((CANDIDATES * most) as usize + 8).min(shape[0]).min(shape[1]).min(MOST_PAIRS)
}
