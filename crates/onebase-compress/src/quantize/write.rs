//! From a base to its quantized folder.

use std::path::Path;

use onebase_format::artifact::{CalibrationRecord, Role};
use onebase_format::{Checkpoint, StagedFolder, TensorEntry};
use onebase_model::quantized::{Method, OutputScales, Quantization, stored_tensors};
use onebase_model::{KvCache, Logits, Model, ModelConfig, Segment, check_tensors};

use super::folder::{io, write_side_files};
use super::project::Moments;
use super::rotate::rotate;
use super::rotations::{Rotations, hadamard_block, random_sizes};
use super::rounding::Rounding;
use super::store::Writing;
use crate::calibration::random_tokens;
use crate::{Error, Progress, Result};

/// Tokens on which a rotated model is compared with its original.
const CHECK_TOKENS: usize = 64;

/// How far its logits may be from the original's, in parts of their length. Rounding in f32
/// makes 1e-6 of it; a wrong rotation, about 1.
const CHECK_TOLERANCE: f64 = 1e-4;

/// How a base is quantized.
#[derive(Clone, Debug)]
pub struct QuantizeOptions {
    /// The basis.
    pub method: Method,
    /// 4 or 8.
    pub weight_bits: u32,
    /// 4, 8 or 16.
    pub activation_bits: u32,
    /// 4, 8 or 16.
    pub kv_bits: u32,
    /// Of embedding and head, 8 or 16.
    pub table_bits: u32,
    /// As in the program of ResQ's authors: a scale for each head of an output projection's
    /// inputs, and keys and queries in 8 bits before they are rotated.
    pub is_paper: bool,
    /// How weights are rounded.
    pub rounding: Rounding,
    /// Of the random rotations.
    pub seed: u64,
}

/// Tokens that rotations and rounding follow.
#[derive(Clone, Debug)]
pub struct QuantizeText {
    /// The text that they are of, if they are of one.
    pub record: Option<CalibrationRecord>,
    /// The tokens.
    pub tokens: Vec<u32>,
    /// Tokens that are run as one document.
    pub window_tokens: usize,
}

/// What came of it.
#[derive(Clone, Debug)]
pub struct Quantized {
    /// Bytes of the folder's files.
    pub size_bytes: u64,
    /// Bits for each weight of a linear site, scales included.
    pub linear_bits: f64,
    /// How far the logits of the rotated model are from the original's, in parts of their
    /// length; 0 where nothing is rotated.
    pub rotation_error: f64,
    /// Sizes without a Hadamard matrix, for which an orthogonal one at random stands.
    pub random_sizes: Vec<usize>,
}

/// Quantizes a base into the folder `target`, which must not exist.
///
/// The model is run on the text twice, block by block: for the rotations, and in its new basis
/// for what GPTQ weighs errors by (of the unquantized model, where the paper's program goes on
/// with quantized blocks). The rotated model lies beside `target` meanwhile, in f32.
///
/// # Errors
/// When the base is no supported model or has experts, a text is needed and missing or too
/// short, the rotated model computes other logits than the original, or something cannot be
/// written. Nothing is under the folder's name then.
pub fn quantize(
    base: &Path,
    options: &QuantizeOptions,
    text: Option<&QuantizeText>,
    target: &Path,
    progress: &dyn Progress,
) -> Result<Quantized> {
    let folder = StagedFolder::create(target)?;
    let checkpoint = Checkpoint::open(base)?;
    let own = ModelConfig::from_json(checkpoint.config(), checkpoint.dir())?;
    if own.quantization.is_some() {
        return Err(Error::AlreadyQuantized { path: base.to_owned() });
    }
    if own.mixture.is_some() {
        return Err(Error::QuantizedExperts { path: base.to_owned() });
    }
    check_tensors(&checkpoint, &own)?;
    check_text(&own, options, text)?;
    let quantization = quantization(&own, options);
    let config = own.with_quantization(Some(quantization));
    let model = Model::load(checkpoint)?;
    let rotated = folder.path("rotated");
    let rotations = rotations(&model, &config, options, text, progress)?;
    let rotation_error = match &rotations {
        None => 0.0,
        Some(rotations) => {
            rotate(model.checkpoint(), &config, rotations, &rotated, progress)?;
            compare(&model, &rotated, text, options.seed)?
        }
    };
    let full = match &rotations {
        None => model,
        Some(_) => Model::load(Checkpoint::open(&rotated)?)?,
    };
    let written = Writing { full: &full, config: &config, folder: &folder, progress };
    let digests = written.codes(options, text, rotations.as_ref())?;
    write_side_files(&folder, full.checkpoint(), Some(&quantization))?;
    written.record(base, options, text, digests)?;
    let linear_bits = linear_bits(&config);
    drop(full);
    if rotations.is_some() {
        std::fs::remove_dir_all(&rotated).map_err(|source| io("remove", &rotated, source))?;
    }
    folder.commit()?;
    Ok(Quantized {
        size_bytes: folder_bytes(target)?,
        linear_bits,
        rotation_error,
        random_sizes: random_sizes(&config, options.method),
    })
}

fn quantization(config: &ModelConfig, options: &QuantizeOptions) -> Quantization {
    let is_mixed = options.method == Method::Resq;
    // An eighth, as in the paper; of a head, one less where an odd number would be left for
    // 4-bit codes, two of which make a byte.
    let mut high_head = if is_mixed { config.head_dim / 8 } else { 0 };
    if !(config.head_dim - high_head).is_multiple_of(2) {
        high_head -= 1;
    }
    Quantization {
        method: options.method,
        weight_bits: options.weight_bits,
        activation_bits: options.activation_bits,
        kv_bits: options.kv_bits,
        table_bits: options.table_bits,
        high_hidden: if is_mixed { config.hidden_size / 8 } else { 0 },
        high_head,
        output_scales: if options.is_paper { OutputScales::Head } else { OutputScales::Token },
        round_rotation: options.is_paper && options.method.is_rotated(),
        hadamard_block: match options.method.is_rotated() {
            true => hadamard_block(config.intermediate_size),
            false => 0,
        },
    }
}

/// Checks that there is a text where one is needed, of as many tokens as a moment needs to be
/// of full rank.
fn check_text(
    config: &ModelConfig,
    options: &QuantizeOptions,
    text: Option<&QuantizeText>,
) -> Result<()> {
    if options.method != Method::Resq && options.rounding != Rounding::Gptq {
        return Ok(());
    }
    let (n_tokens, least) = (text.map_or(0, |text| text.tokens.len()), config.hidden_size);
    if n_tokens < least { Err(Error::ShortText { n_tokens, least }) } else { Ok(()) }
}

fn rotations(
    model: &Model,
    config: &ModelConfig,
    options: &QuantizeOptions,
    text: Option<&QuantizeText>,
    progress: &dyn Progress,
) -> Result<Option<Rotations>> {
    let Some(quantization) = &config.quantization else { unreachable!("it was just made") };
    Ok(match (options.method, text) {
        (Method::Rtn, _) => None,
        (Method::Quarot, _) => Some(Rotations::quarot(config, options.seed)),
        (Method::Resq, Some(text)) => {
            let moments = Moments::measure(model, &text.tokens, text.window_tokens, progress)?;
            Some(Rotations::resq(&moments, config, quantization, options.seed)?)
        }
        (Method::Resq, None) => unreachable!("the text was checked"),
    })
}

/// How far the logits of the rotated model are from the original's.
fn compare(model: &Model, rotated: &Path, text: Option<&QuantizeText>, seed: u64) -> Result<f64> {
    let n = CHECK_TOKENS.min(model.config().context_tokens);
    let tokens = match text {
        Some(text) if !text.tokens.is_empty() => text.tokens[..n.min(text.tokens.len())].to_vec(),
        _ => random_tokens(model, n, seed),
    };
    let logits = |model: &Model| -> Result<Vec<f32>> {
        let mut cache = KvCache::new(model.config());
        let (tokens, logits) = (tokens.as_slice(), Logits::All);
        let segment = Segment { tokens, tenant: None, cache: &mut cache, logits };
        Ok(model.forward(&mut [segment])?.concat())
    };
    let expected = logits(model)?;
    let got = logits(&Model::load(Checkpoint::open(rotated)?)?)?;
    let square = |v: f64| v * v;
    let differences = got.iter().zip(&expected).map(|(a, b)| square(f64::from(*a) - f64::from(*b)));
    let length: f64 = expected.iter().map(|v| square(f64::from(*v))).sum();
    let error = (differences.sum::<f64>() / length).sqrt();
    if error <= CHECK_TOLERANCE {
        return Ok(error);
    }
    let path = model.checkpoint().dir().to_owned();
    Err(Error::RotationFailed { path, got: error, expected: CHECK_TOLERANCE })
}

/// Bits for each weight of a linear site of a quantized base, scales included.
///
/// Panics where the configuration has no quantization.
pub fn linear_bits(config: &ModelConfig) -> f64 {
    let tensors = stored_tensors(config);
    let linear = tensors.iter().filter(|tensor| tensor.spec.role == Role::Linear);
    let (mut bytes, mut weights) = (0, 0);
    for tensor in linear {
        bytes += tensor.parts.iter().map(TensorEntry::size_bytes).sum::<usize>();
        weights += tensor.spec.shape.iter().product::<usize>();
    }
    #[allow(clippy::cast_precision_loss)]
    let bits = 8.0 * bytes as f64 / weights.max(1) as f64;
    bits
}

fn folder_bytes(dir: &Path) -> Result<u64> {
    let unread = |source| io("read", dir, source);
    let mut bytes = 0;
    for entry in std::fs::read_dir(dir).map_err(unread)? {
        bytes += entry.and_then(|entry| entry.metadata()).map_err(unread)?.len();
    }
    Ok(bytes)
}
