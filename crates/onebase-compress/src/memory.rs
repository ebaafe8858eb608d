use std::collections::BTreeMap;

use onebase_codec::DeltaSource as _;
use onebase_format::artifact::Role;
use onebase_format::{CONFIG_FILE, SIDE_FILES};
use onebase_model::SiteInput;
use onebase_tensor::PartSpec;

use crate::pair::TensorDelta;
use crate::{Pair, Plan, Result};

/// The most memory that compressing takes, and what takes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpectedMemory {
    /// Bytes.
    pub bytes: u64,
    /// The tensor that needs most.
    pub tensor: String,
}

/// What the program itself, headers and records take, and memory that the allocator
/// holds back.
const PROGRAM_BYTES: usize = 32 << 20;

/// Blocks that are compared, hashed and copied while a tensor is encoded.
const BLOCK_BYTES: usize = 8 << 20;

/// The most memory that [`crate::compress`] takes on `n_threads` threads, whatever the
/// number of tensors.
///
/// # Errors
/// When a checkpoint cannot be read.
pub fn expected_memory(pair: &Pair, plan: &Plan, n_threads: usize) -> Result<ExpectedMemory> {
    let mut most = (0, String::new());
    for spec in &pair.specs {
        let base = pair.base.tensor(&spec.name)?;
        let fine_tune = pair.fine_tune.tensor(&spec.name)?;
        let bytes = match plan.codec(spec, fine_tune.shape()) {
            Some(codec) => {
                let delta = TensorDelta::new(base, fine_tune);
                let added = (fine_tune.n_weights() - base.n_weights()) * size_of::<f32>();
                let weighed = (spec.role == Role::Linear && plan.calibration.is_some())
                    .then(|| codec.calibrated_bytes(delta.shape(), n_threads));
                // An expert's inputs may be unknown: it is encoded without them.
                let working = codec.working_bytes(delta.shape(), n_threads);
                let measuring = match plan.sequential() {
                    Some(text) if spec.role == Role::Linear => {
                        text.measuring_bytes(delta.shape()[1])
                    }
                    _ => 0,
                };
                working.max(weighed.flatten().unwrap_or(0)).max(measuring) + added
            }
            None => fine_tune.size_bytes() + BLOCK_BYTES,
        };
        // What is the base's is only compared.
        if bytes > most.0 {
            most = (bytes, spec.name.clone());
        }
    }
    let mut side_files = 0;
    for name in SIDE_FILES.into_iter().chain([CONFIG_FILE]) {
        let bytes = pair.fine_tune.side_file(name)?.map_or(0, |bytes| bytes.len());
        side_files = side_files.max(2 * bytes);
    }
    let bytes = (PROGRAM_BYTES + BLOCK_BYTES + most.0.max(side_files)) as u64;
    let held = match plan.sequential() {
        Some(text) => text.held_bytes() + deltas_bytes(pair, plan)?,
        None => 0,
    };
    Ok(ExpectedMemory { bytes: bytes + held, tensor: most.1 })
}

/// The most bytes that the deltas of a block take while inputs are measured, ready to serve,
/// or the embedding before them.
fn deltas_bytes(pair: &Pair, plan: &Plan) -> Result<u64> {
    let mut by_block: BTreeMap<Option<usize>, usize> = BTreeMap::new();
    for spec in pair.specs.iter().filter(|spec| spec.role != Role::Head && spec.shape.len() == 2) {
        let block = SiteInput::of_weight(&spec.name).map(|(layer, _)| layer);
        let Some(codec) = plan.codec(spec, &spec.shape) else {
            *by_block.entry(block).or_insert(0) += pair.fine_tune.tensor(&spec.name)?.size_bytes();
            continue;
        };
        let shape = [spec.shape[0], spec.shape[1]];
        let parts = codec.most_parts(shape);
        let dense = shape[0] * shape[1] * size_of::<f32>();
        let parts = parts.map_or(dense, |parts| parts.iter().map(PartSpec::size_bytes).sum());
        // What is prepared may hold numbers of 16 bits as f32.
        *by_block.entry(block).or_insert(0) += 2 * parts;
    }
    Ok(by_block.into_values().max().unwrap_or(0) as u64)
}
