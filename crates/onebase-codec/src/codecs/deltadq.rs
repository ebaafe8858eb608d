//! DeltaDQ: "DeltaDQ: Ultra-High Delta Compression for Fine-Tuned LLMs via Group-wise Dropout and
//! Separate Quantization", arXiv 2410.08666.
//!
//! Most weights of the delta are dropped at random, a fixed share of every group of input
//! features, and those that stay are rounded to few bits. Of the paper's text only the abstract
//! could be read; the form of the quantizer, of its separation into parts and of the claimed
//! ratio, `α · 16 / (k − log₂ m)`, follow what others say of it and may differ in details.
//!
//! The method as published is `deltadq:storage=indexed,values=rescaled,grid=range,rows=1,seeds=1`
//! with `alpha`, `code_bits` (k) and `parts` (m): sparse matrices with the input feature of each
//! weight in two bytes, one matrix for each range of codes. Its ratio does not count these two
//! bytes. What goes beyond it here:
//!
//! - `storage=seeded`: the mask is drawn from a key and costs no bytes; codes are packed, or
//!   coded by their frequencies where that is shorter.
//! - `values`: kept weights are not multiplied by the inverse of their share (`rescaled`), but
//!   solved for: what changes the outputs least under the mask, each rounded so that it makes up
//!   for the errors of those before (`solved`). That shrinks the outputs, layer after layer;
//!   `unbiased` multiplies each row so that they keep their size. Without statistics of inputs
//!   the solution is the weights as they are. `row` takes them as they are, times one factor for
//!   each row that changes the outputs least.
//! - `grid`: levels of least squared error with a scale for each row or block, in place of a
//!   range between extremes.
//! - `sweeps`: after that each code is moved in turn to where the error of the outputs is least
//!   given all others.
//! - `rows`: so many rows share a mask, so that the inputs they read are gathered once.
//! - `seeds`: masks that are tried for each block; the best is kept.
//!
//! The paper searches the group size by the error of attention on calibration data. Here it is
//! searched, like the bits of codes, by the error of the matrix' own outputs on a few
//! blocks of rows.

use half::bf16;
use onebase_tensor::{DType, EncodedDelta, PartData, PartError, PartShapes, PartSpec};
use rayon::prelude::*;

use crate::codec::DeltaLinear;
use crate::entropy::{compress, decompress, pack, packed_bytes, unpack};
use crate::kept::{Kept, Lines};
use crate::kept_encoder::{Choice, Encoder, Grid, Range};
use crate::kept_fit::{Inputs, Values};
use crate::masks::{GENERATOR, Share, key_of};
use crate::source::read_finite;
use crate::sparse_parts::{self, Entries};
use crate::{
    Calibrated, Codec, DeltaSource, Error, Kind, OptionSpec, Options, Rescale, Result, SecondMoment,
};

/// Part `layout`, `[24]`, U8, little-endian: the number of the generator, bits of a code, 0 for
/// a scale for each row, 1 for each block and 2 for a range, and 1 where codes are coded by
/// frequency; then in four bytes each the group size, and the share that is kept, two numbers;
/// and the key of the masks in eight.
///
/// Scales: part `scale`, BF16, `[out_features]` or `[n_blocks]`; of a range, parts `step`,
/// `[1]`, F32, and `zero`, `[4]`, U8, the code of weight zero, little-endian.
///
/// Seeded: part `codes`, `[n]`, U8, see [`pack`] and [`compress`], the codes of each row's kept
/// weights by ascending input feature; with `seeds` above 1, part `candidate`, `[n_blocks]`,
/// U8, which mask each block took. Indexed: see [`sparse_parts`].
pub(super) struct DeltaDq;

const NAME: &str = "deltadq";

impl Codec for DeltaDq {
    fn name(&self) -> &'static str {
        NAME
    }

    fn version(&self) -> u32 {
        1
    }

    fn summary(&self) -> &'static str {
        "a random share of each group of weights in low-bit codes, the mask drawn from a seed"
    }

    fn options(&self) -> &'static [OptionSpec] {
        &[
            OptionSpec {
                name: "bits",
                doc: "bits per weight of all parts, at least one weight a row",
                kind: Kind::Number { min: 0.01, max: 16.0, default: 1.0 },
            },
            OptionSpec {
                name: "alpha",
                doc: "one of so many weights is kept, whatever bits say; 0: as many as bits allow",
                kind: Kind::Int { min: 0, max: 4096, multiple_of: 1, default: 0 },
            },
            OptionSpec {
                name: "code_bits",
                doc: "bits of a code; 0: 1 to 4, by least error, and 4 between extremes",
                kind: Kind::Int { min: 0, max: 8, multiple_of: 1, default: 0 },
            },
            OptionSpec {
                name: "group_size",
                doc: "input features of which an exact share is kept; 0: by least error",
                kind: Kind::Int { min: 0, max: 65536, multiple_of: 1, default: 0 },
            },
            OptionSpec {
                name: "storage",
                doc: "where kept weights stand: drawn again from a seed, or stored",
                kind: Kind::Choice(&["seeded", "indexed"]),
            },
            OptionSpec {
                name: "parts",
                doc: "sparse matrices that codes are split into by range, with storage=indexed",
                kind: Kind::Int { min: 1, max: 256, multiple_of: 1, default: 8 },
            },
            OptionSpec {
                name: "values",
                doc: "what is kept: solved for, with outputs of full size or of least error; as it is \
                      with a factor a row, or over the share",
                kind: Kind::Choice(&["unbiased", "solved", "row", "rescaled"]),
            },
            OptionSpec {
                name: "grid",
                doc: "levels: a scale for each row or block (the better), or between extremes",
                kind: Kind::Choice(&["auto", "row", "block", "range"]),
            },
            OptionSpec {
                name: "rows",
                doc: "rows of a block, which share a mask",
                kind: Kind::Int { min: 1, max: 256, multiple_of: 1, default: 64 },
            },
            OptionSpec {
                name: "seeds",
                doc: "masks tried for each block, of which the best is taken",
                kind: Kind::Int { min: 1, max: 256, multiple_of: 1, default: 4 },
            },
            OptionSpec {
                name: "sweeps",
                doc: "times that codes are moved one by one to fit the outputs, with statistics",
                kind: Kind::Int { min: 0, max: 64, multiple_of: 1, default: 4 },
            },
            OptionSpec {
                name: "ridge",
                doc: "added to the diagonal of the second moment, as a part of its mean",
                kind: Kind::Number { min: 0.0001, max: 10.0, default: 0.1 },
            },
            OptionSpec {
                name: "seed",
                doc: "of the masks",
                kind: Kind::Int { min: 0, max: 65535, multiple_of: 1, default: 0 },
            },
        ]
    }

    #[allow(clippy::cast_precision_loss)]
    fn claimed_bits(&self, options: &Options, shape: [usize; 2], parts: &PartShapes) -> f64 {
        let n_weights = shape[0] as f64 * shape[1] as f64;
        let first = |part: &str| parts.get(part).and_then(|shape| shape.first().copied());
        match (first("codes"), first("index")) {
            (Some(n_bytes), _) => 8.0 * n_bytes as f64 / n_weights,
            (_, Some(n)) => {
                let bits = Plan::new(options, shape).widths()[0] as f64;
                n as f64 * (bits - (options.int("parts") as f64).log2()).max(0.0) / n_weights
            }
            _ => 0.0,
        }
    }

    /// Codes may be shorter than packed ones, and their bits follow from the delta.
    fn parts(&self, _: &Options, _: [usize; 2]) -> Option<Vec<PartSpec>> {
        None
    }

    fn most_parts(&self, options: &Options, shape: [usize; 2]) -> Option<Vec<PartSpec>> {
        let plan = Plan::new(options, shape);
        let all = plan.candidates().into_iter().map(|choice| plan.parts(&choice));
        let size = |parts: &Vec<PartSpec>| parts.iter().map(PartSpec::size_bytes).sum::<usize>();
        let mut most = all.max_by_key(size)?;
        // Numbers in shapes may have more digits in one part and fewer in another.
        const DIGITS: usize = 16;
        if let Some(scale) = most.iter_mut().find(|part| part.name == "layout") {
            scale.shape[0] += DIGITS;
        }
        Some(most)
    }

    fn working_bytes(&self, options: &Options, shape: [usize; 2]) -> usize {
        Plan::new(options, shape).working_bytes(false)
    }

    fn draft(&self) -> &'static [(&'static str, usize)] {
        &[("seeds", 1)]
    }

    fn encode(&self, options: &Options, delta: &dyn DeltaSource) -> Result<EncodedDelta> {
        Plan::new(options, delta.shape()).encode(delta, None)
    }

    fn prepare(&self, options: &Options, delta: EncodedDelta) -> Result<Box<dyn DeltaLinear>> {
        Ok(Box::new(Plan::new(options, delta.shape).prepare(delta)?))
    }
}

impl Calibrated for DeltaDq {
    fn encode_calibrated(
        &self,
        options: &Options,
        delta: &dyn DeltaSource,
        inputs: &SecondMoment,
    ) -> Result<EncodedDelta> {
        assert_eq!(inputs.n(), delta.shape()[1], "inputs of the second moment");
        let inputs = Inputs::new(inputs, options.number("ridge"));
        Plan::new(options, delta.shape()).encode(delta, inputs.as_ref())
    }

    fn calibrated_bytes(&self, options: &Options, shape: [usize; 2]) -> usize {
        let moment = shape[1] * shape[1] * size_of::<f32>();
        Plan::new(options, shape).working_bytes(true) + moment
    }
}

impl Rescale for DeltaDq {
    fn linear_parts(&self) -> &'static [&'static str] {
        &["scale", "step"]
    }
}

const LAYOUT_BYTES: usize = 24;

/// Options and shape, and what follows from them.
struct Plan<'a> {
    options: &'a Options,
    shape: [usize; 2],
    block_rows: usize,
    seeds: usize,
    values: Values,
    /// Sparse matrices, where input features are stored.
    n_parts: Option<usize>,
}

impl<'a> Plan<'a> {
    fn new(options: &'a Options, shape: [usize; 2]) -> Self {
        let values = match options.choice("values") {
            "solved" => Values::Solved,
            "unbiased" => Values::Unbiased,
            "row" => Values::Row,
            _ => Values::Rescaled,
        };
        let indexed = options.choice("storage") == "indexed";
        Self {
            options,
            shape,
            block_rows: options.int("rows"),
            seeds: options.int("seeds"),
            values,
            n_parts: indexed.then(|| options.int("parts")),
        }
    }

    fn n_blocks(&self) -> usize {
        self.shape[0].div_ceil(self.block_rows)
    }

    /// Bits of a code that come into question.
    fn widths(&self) -> Vec<usize> {
        match self.options.int("code_bits") {
            0 if self.options.choice("grid") == "range" || self.n_parts.is_some() => vec![4],
            0 => vec![1, 2, 3, 4],
            bits => vec![bits],
        }
    }

    fn grids(&self) -> &'static [Grid] {
        match self.options.choice("grid") {
            "auto" => &[Grid::Row, Grid::Block],
            "row" => &[Grid::Row],
            "block" => &[Grid::Block],
            _ => &[Grid::Range],
        }
    }

    /// All that come into question, whole rows as groups where that is to be searched.
    fn candidates(&self) -> Vec<Choice> {
        let widths = self.widths();
        let all = widths.iter().flat_map(|bits| self.grids().iter().map(|grid| (*bits, *grid)));
        all.map(|(bits, grid)| {
            let group_size = match self.options.int("group_size") {
                0 => self.shape[1].max(1),
                given => given,
            };
            Choice { bits, grid, group_size, share: self.share(bits, grid) }
        })
        .collect()
    }

    /// As many weights as there are bytes for.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
    fn share(&self, bits: usize, grid: Grid) -> Share {
        let [n_rows, n_cols] = self.shape;
        let of_row = |kept: usize| match (n_rows, n_cols) {
            (_, 0) => Share { kept: 0, of: 1 },
            _ => Share { kept: kept.clamp(1, n_cols) as u32, of: n_cols as u32 },
        };
        let alpha = self.options.int("alpha");
        if alpha > 0 {
            let share = Share { kept: 1, of: alpha as u32 };
            return if share.of_first(n_cols) > 0 { share } else { of_row(1) };
        }
        let of_kept = |kept: usize| {
            let choice = Choice { bits, grid, group_size: 1, share: of_row(kept) };
            self.parts(&choice).iter().map(PartSpec::size_bytes).sum::<usize>()
        };
        let most = (self.options.number("bits") * n_rows as f64 * n_cols as f64 / 8.0) as usize;
        // The most that fit: sizes grow with what is kept.
        let (mut low, mut high) = (1, n_cols.max(1));
        while low < high {
            let middle = (low + high).div_ceil(2);
            if of_kept(middle) <= most { low = middle } else { high = middle - 1 }
        }
        of_row(low)
    }

    /// The parts, codes packed.
    fn parts(&self, choice: &Choice) -> Vec<PartSpec> {
        let [n_rows, n_cols] = self.shape;
        let n_kept = choice.share.of_first(n_cols);
        let mut parts = vec![PartSpec::new("layout", DType::U8, [LAYOUT_BYTES])];
        match choice.grid {
            Grid::Row => parts.push(PartSpec::new("scale", DType::BF16, [n_rows])),
            Grid::Block => parts.push(PartSpec::new("scale", DType::BF16, [self.n_blocks()])),
            Grid::Range => {
                parts.push(PartSpec::new("step", DType::F32, [1]));
                parts.push(PartSpec::new("zero", DType::U8, [4]));
            }
        }
        if let Some(n_parts) = self.n_parts {
            parts.extend(sparse_parts::specs(self.shape, n_kept, choice.bits, n_parts));
            return parts;
        }
        let n_bytes = packed_bytes(n_rows * n_kept, choice.bits);
        parts.push(PartSpec::new("codes", DType::U8, [n_bytes]));
        if self.seeds > 1 {
            parts.push(PartSpec::new("candidate", DType::U8, [self.n_blocks()]));
        }
        parts
    }

    fn working_bytes(&self, calibrated: bool) -> usize {
        let [n_rows, n_cols] = self.shape;
        let of = |choice: Choice| {
            let n_kept = choice.share.of_first(n_cols);
            let parts: usize = self.parts(&choice).iter().map(PartSpec::size_bytes).sum();
            let block_rows = self.block_rows.min(n_rows);
            let of_factors = if calibrated { n_kept } else { 0 };
            let block =
                Inputs::block_bytes(block_rows, n_cols, of_factors) + 64 * block_rows * n_kept;
            // Codes a byte each, and what they are made to in turns; entries of sparse
            // matrices.
            let entries = if self.n_parts.is_some() { 16 * n_kept * n_rows } else { 0 };
            n_rows * n_kept + 4 * parts + entries + rayon::current_num_threads() * block
        };
        self.candidates().into_iter().map(of).max().unwrap_or(0) + (1 << 16)
    }

    /// Refuses options that contradict each other.
    fn check(&self, choice: &Choice) -> Result<()> {
        let bad = |option, expected: String, got: usize| {
            Err(Error::BadOption { codec: NAME, option, expected, got: got.to_string() })
        };
        let least = choice.least_group();
        if self.options.int("group_size") > 0 && choice.group_size < least.min(self.shape[1]) {
            let expected = format!("{least} or more, so that a weight of each group is kept");
            return bad("group_size", expected, choice.group_size);
        }
        match self.n_parts {
            Some(n) if !n.is_power_of_two() || n > 1 << choice.bits => {
                bad("parts", format!("a power of two up to {}", 1 << choice.bits), n)
            }
            _ => Ok(()),
        }
    }

    fn encode(&self, delta: &dyn DeltaSource, inputs: Option<&Inputs<'_>>) -> Result<EncodedDelta> {
        let [n_rows, n_cols] = self.shape;
        let first = read_finite(delta, 0..n_rows.min(1))?;
        let key = key_of(self.options.int("seed") as u64, &first);
        let Self { shape, block_rows, seeds, values, .. } = *self;
        let sweeps = self.options.int("sweeps");
        let encoder = Encoder { shape, block_rows, seeds, sweeps, values, delta, inputs, key };
        let candidates = self.candidates();
        candidates.iter().try_for_each(|choice| self.check(choice))?;
        let choice = encoder.choose(candidates, self.options.int("group_size") == 0)?;
        let line = match choice.grid {
            Grid::Range => Some(Range::of(encoder.extremes(&choice, None)?, choice.bits)),
            _ => None,
        };
        let n_kept = choice.share.of_first(n_cols);
        let mut codes = vec![0; n_rows * n_kept];
        let mut scale = vec![bf16::ZERO; if choice.grid == Grid::Row { n_rows } else { 0 }];
        let mut of_blocks = vec![(0u8, bf16::ZERO); self.n_blocks()];
        // An empty slice has no chunks to go with the others.
        let of_rows =
            if scale.is_empty() { Vec::new() } else { scale.chunks_mut(self.block_rows).collect() };
        let mut of_rows: Vec<Option<&mut [bf16]>> = of_rows.into_iter().map(Some).collect();
        of_rows.resize_with(of_blocks.len(), || None);
        let blocks = codes.par_chunks_mut((self.block_rows * n_kept).max(1));
        let blocks = blocks.zip(of_blocks.par_iter_mut()).zip(of_rows).enumerate();
        blocks.try_for_each(|(index, ((codes, of_block), of_rows))| {
            let coded = encoder.block(index, &choice, line.map(Range::line), self.seeds)?;
            codes.copy_from_slice(&coded.codes);
            of_block.0 = coded.candidate;
            match (of_rows, coded.scales.as_slice()) {
                (Some(of_rows), scales) => of_rows.copy_from_slice(scales),
                (None, [scale]) => of_block.1 = *scale,
                (None, _) => {}
            }
            Ok::<(), Error>(())
        })?;
        if n_kept == 0 {
            // Nothing was visited, and nothing is wrong with rows that have no weights.
            of_blocks.fill((0, bf16::ZERO));
        }
        let masks = choice.masks(key, n_cols);
        let mut parts: Vec<(&str, Vec<usize>, PartData)> = Vec::new();
        match line {
            Some(Range { step, zero }) => {
                parts.push(("step", vec![1], PartData::F32(vec![step])));
                parts.push(("zero", vec![4], PartData::U8(zero.to_le_bytes().to_vec())));
            }
            None => {
                if choice.grid == Grid::Block {
                    scale = of_blocks.iter().map(|block| block.1).collect();
                }
                parts.push(("scale", vec![scale.len()], PartData::BF16(scale)));
            }
        }
        let mut by_frequency = false;
        if let Some(n_parts) = self.n_parts {
            let mut columns = Vec::new();
            let of_rows = (0..n_rows).flat_map(|row| {
                let block = row / self.block_rows;
                masks.columns(block, of_blocks[block].0.into(), &mut columns);
                columns.clone()
            });
            let entries = Entries { columns: of_rows.collect(), codes };
            parts.extend(entries.into_parts(self.shape, n_kept, choice.bits, n_parts));
        } else {
            let mut bytes = compress(&codes, choice.bits);
            by_frequency = bytes.len() < packed_bytes(codes.len(), choice.bits);
            if !by_frequency {
                bytes = pack(codes.into_iter(), choice.bits);
            }
            parts.push(("codes", vec![bytes.len()], PartData::U8(bytes)));
            if self.seeds > 1 {
                let candidates: Vec<u8> = of_blocks.iter().map(|block| block.0).collect();
                parts.push(("candidate", vec![candidates.len()], PartData::U8(candidates)));
            }
        }
        let layout = layout_bytes(&choice, by_frequency, key);
        let mut encoded =
            EncodedDelta::new(self.shape, [("layout", vec![LAYOUT_BYTES], PartData::U8(layout))]);
        for (name, shape, data) in parts {
            encoded.parts.append(&mut EncodedDelta::new(self.shape, [(name, shape, data)]).parts);
        }
        Ok(encoded)
    }

    fn prepare(&self, delta: EncodedDelta) -> Result<Kept> {
        let [n_rows, n_cols] = self.shape;
        let shapes = delta.part_shapes();
        let mut parts = delta.into_parts();
        let layout = parts.take_u8("layout", &[LAYOUT_BYTES])?;
        let (choice, by_frequency, key) = self.read_layout(&layout)?;
        let n_kept = choice.share.of_first(n_cols);
        let lines = match choice.grid {
            Grid::Range => {
                let step = parts.take_f32("step", &[1])?[0];
                let zero = parts.take_u8("zero", &[4])?;
                let zero = i32::from_le_bytes([zero[0], zero[1], zero[2], zero[3]]);
                Range { step, zero }.lines(n_rows)
            }
            grid => {
                let share = if grid == Grid::Row { 1 } else { self.block_rows };
                let scale = parts.take_bf16("scale", &[n_rows.div_ceil(share)])?;
                let twice_zero = (1i64 << choice.bits) - 1;
                let of_row = |row: usize| scale[row / share].to_f32();
                Lines { factors: (0..n_rows).map(of_row).collect(), twice_zero }
            }
        };
        if let Some(n_parts) = self.n_parts {
            let entries = Entries::take(&mut parts, self.shape, n_kept, choice.bits, n_parts)?;
            parts.finish()?;
            let Entries { columns, codes } = entries;
            let codes = codes.into_iter();
            return Ok(Kept::new(self.shape, 1, choice.bits, columns, codes, lines));
        }
        let masks = choice.masks(key, n_cols);
        let candidates = match self.seeds {
            1 => vec![0; self.n_blocks()],
            _ => parts.take_u8("candidate", &[self.n_blocks()])?,
        };
        let n_codes = n_rows * n_kept;
        let n_bytes = match shapes.get("codes").map(Vec::as_slice) {
            Some([n]) if by_frequency => *n,
            _ => packed_bytes(n_codes, choice.bits),
        };
        let bytes = parts.take_u8("codes", &[n_bytes])?;
        parts.finish()?;
        let mut columns = Vec::with_capacity(self.n_blocks() * n_kept);
        let mut of_block = Vec::new();
        for (block, candidate) in candidates.iter().enumerate() {
            masks.columns(block, u32::from(*candidate), &mut of_block);
            columns.extend_from_slice(&of_block);
        }
        let (bits, rows) = (choice.bits, self.block_rows);
        if by_frequency {
            let Some(codes) = decompress(&bytes, bits, n_codes) else {
                let expected = format!("{n_codes} codes by their frequencies");
                return Err(wrong("codes", n_bytes.saturating_sub(1), expected, "other bytes"));
            };
            return Ok(Kept::new(self.shape, rows, bits, columns, codes.into_iter(), lines));
        }
        let codes = unpack(&bytes, bits, n_codes);
        Ok(Kept::new(self.shape, rows, bits, columns, codes, lines))
    }

    fn read_layout(&self, bytes: &[u8]) -> Result<(Choice, bool, u64)> {
        let four = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        let refused = |at: usize, expected: &str| {
            Err(wrong("layout", at, expected.to_owned(), &bytes[at].to_string()))
        };
        if bytes[0] != GENERATOR {
            return refused(0, "the mask generator 1, the only one that is known");
        }
        let bits = usize::from(bytes[1]);
        if !(1..=8).contains(&bits) {
            return refused(1, "1 to 8 bits");
        }
        let grid = match bytes[2] {
            0 => Grid::Row,
            1 => Grid::Block,
            2 => Grid::Range,
            _ => return refused(2, "0, 1 or 2"),
        };
        if !self.grids().contains(&grid) {
            return refused(2, "what the option grid says");
        }
        if bytes[3] > 1 {
            return refused(3, "0 or 1");
        }
        let share = Share { kept: four(8), of: four(12) };
        if share.of == 0 || share.kept > share.of {
            return refused(8, "a share of at most 1");
        }
        let group_size = four(4) as usize;
        if group_size == 0 {
            return refused(4, "a group of at least 1");
        }
        let key = u64::from(four(16)) | u64::from(four(20)) << 32;
        Ok((Choice { bits, grid, group_size, share }, bytes[3] == 1, key))
    }
}

#[allow(clippy::cast_possible_truncation)]
fn layout_bytes(choice: &Choice, by_frequency: bool, key: u64) -> Vec<u8> {
    let grid = match choice.grid {
        Grid::Row => 0,
        Grid::Block => 1,
        Grid::Range => 2,
    };
    let mut bytes = vec![GENERATOR, choice.bits as u8, grid, u8::from(by_frequency)];
    for n in [choice.group_size as u32, choice.share.kept, choice.share.of] {
        bytes.extend(n.to_le_bytes());
    }
    bytes.extend(key.to_le_bytes());
    bytes
}

fn wrong(part: &str, index: usize, expected: String, got: &str) -> Error {
    let got = got.to_owned();
    PartError::Value { part: part.to_owned(), index, expected, got }.into()
}
