use std::path::{Path, PathBuf};
use std::time::Instant;

use onebase_codec::{CodecSpec, Error as CodecError};
use onebase_compress::{Pair, TablePlan};
use onebase_format::Checkpoint;
use onebase_format::artifact::{
    Artifact, CalibrationRecord, DeltaError, Perplexity, Role, Sizes, Storage, TaskQuality,
};
use onebase_model::{Model, Tenant, TensorSpec};
use serde::Serialize;

use crate::activations::{Calibration, map_sites};
use crate::ideal::{IdealBits, write_checkpoint};
use crate::limit::{Limit, Spectrum};
use crate::site_error::{SiteError, site_error, site_name, total_error};
use crate::spectrum::{output_spectrum, weight_spectrum};
use crate::{Error, Measurement, Result, Ruler, Subject, Tests, TextFile, Watcher};

/// The codecs that every comparison holds, with the bits of those that are swept
/// over fixed ones.
const BASELINES: [&str; 5] = [
    "rtn:bits=1,group_size=128",
    "rtn:bits=2,group_size=128",
    "rtn:bits=3,group_size=128",
    "rtn:bits=4,group_size=128",
    "sign",
];

/// The baseline that is swept over the sizes asked for.
const SWEPT_BASELINE: &str = "low-rank";

/// The option by which codecs say how many bits a weight may take.
const BITS: &str = "bits";

/// The base alone, as the name of a variant.
const BASE: &str = "base";

/// The limit line is drawn up to here, in bits per weight.
const LINE_BITS: f64 = 6.0;

/// What is compared, in which order.
#[derive(Clone, Debug)]
pub struct Plan {
    codecs: Vec<(CodecSpec, bool)>,
    tables: Option<TablePlan>,
    /// Bits per weight at which a code on the limit line is simulated.
    ideal: Vec<f64>,
    /// Sizes that codecs cannot have, for the reader.
    notes: Vec<String>,
}

impl Plan {
    /// The baselines, then the codecs asked for, each written `NAME` or
    /// `NAME:OPTION=VALUE,…`. One that has an option `bits`, and to which none is
    /// given, is swept over those of `bits` that it accepts; at each of them a code on
    /// the limit line is simulated. `tables` is how embeddings and head are stored,
    /// else with the codec itself.
    ///
    /// # Errors
    /// When a codec or an option is unknown, or one that was asked for can have none of
    /// the sizes.
    pub fn new(codecs: &[String], bits: &[f64], tables: Option<TablePlan>) -> Result<Self> {
        let mut plan = Self { codecs: Vec::new(), tables, ideal: bits.to_vec(), notes: Vec::new() };
        for text in BASELINES {
            plan.add(text, &[], true)?;
        }
        plan.add(SWEPT_BASELINE, bits, true)?;
        for text in codecs {
            plan.add(text, bits, false)?;
        }
        Ok(plan)
    }

    fn add(&mut self, text: &str, bits: &[f64], baseline: bool) -> Result<()> {
        let spec: CodecSpec = text.parse()?;
        let swept = spec.codec().options().iter().any(|o| o.name == BITS)
            && !text.contains(&format!("{BITS}="));
        if !swept {
            self.push(spec, baseline);
            return Ok(());
        }
        let separator = if text.contains(':') { ',' } else { ':' };
        let mut refused = None;
        let mut n_planned = 0;
        for bits in bits {
            match format!("{text}{separator}{BITS}={bits}").parse() {
                Ok(spec) => {
                    self.push(spec, baseline);
                    n_planned += 1;
                }
                // A whole number of bits, or a range.
                Err(error @ CodecError::BadOption { .. }) => {
                    self.notes
                        .push(format!("Left out: {text} at {bits} bits per weight ({error})."));
                    refused = Some(error);
                }
                Err(error) => return Err(error.into()),
            }
        }
        match refused {
            Some(error) if n_planned == 0 && !baseline => Err(error.into()),
            _ => Ok(()),
        }
    }

    fn push(&mut self, spec: CodecSpec, baseline: bool) {
        if !self.codecs.iter().any(|(known, _)| known.to_string() == spec.to_string()) {
            self.codecs.push((spec, baseline));
        }
    }

    /// The same without a code on the limit line, whose models take time and, for each
    /// size, a checkpoint in f32 on disk.
    pub fn without_ideal(mut self) -> Self {
        self.ideal.clear();
        self
    }

    /// The codecs with their options, in the order in which they are run.
    pub fn codecs(&self) -> impl Iterator<Item = &CodecSpec> {
        self.codecs.iter().map(|(spec, _)| spec)
    }
}

/// What codecs are compared on.
#[derive(Debug)]
pub struct Input<'a> {
    /// Checkpoint folder of the base.
    pub base: &'a Path,
    /// Checkpoint folder of the fine-tune.
    pub finetune: &'a Path,
    /// What the fine-tune is measured with.
    pub tests: Tests,
    /// A text on which activations are measured, for errors in output space.
    pub calibration: Option<TextFile>,
}

/// The result of a comparison.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// Program and version.
    pub tool: String,
    /// What the base is called.
    pub base: String,
    /// What the fine-tune is called.
    pub finetune: String,
    /// Bytes of the fine-tune's weights.
    pub finetune_bytes: u64,
    /// Elements of all tensors of the fine-tune.
    pub n_weights: u64,
    /// Elements of the linear sites' weights.
    pub n_weights_linear: u64,
    /// Seed of the intervals.
    pub seed: u64,
    /// What a reader must know.
    pub notes: Vec<String>,
    /// Tasks, and what base and fine-tune reach.
    pub tasks: Vec<TaskLevel>,
    /// The text for perplexity.
    pub text: Option<MeasuredText>,
    /// The text of the calibration.
    pub calibration: Option<CalibrationRecord>,
    /// The linear sites, in the order of the forward pass.
    pub sites: Vec<String>,
    /// The base alone, then every codec.
    pub variants: Vec<Variant>,
    /// The limit lines.
    pub limit: LimitLines,
    /// What a code on the limit line would keep.
    pub ideal: Vec<Ideal>,
    /// How long it all took.
    pub seconds: f64,
}

/// What base and fine-tune reach on a task.
#[derive(Clone, Debug, Serialize)]
pub struct TaskLevel {
    /// The task.
    pub name: String,
    /// Questions.
    pub n: usize,
    /// Share that the base answers right.
    pub base: f64,
    /// Share that the fine-tune answers right.
    pub finetune: f64,
}

/// A text for perplexity.
#[derive(Clone, Debug, Serialize)]
pub struct MeasuredText {
    /// What it is called.
    pub name: String,
    /// Tokens that are predicted.
    pub n_tokens: usize,
    /// Tokens that are run as one document.
    pub window_tokens: usize,
}

/// A codec with its options, and what became of the fine-tune with it.
#[derive(Clone, Debug, Serialize)]
pub struct Variant {
    /// The codec with its options, or `base`.
    pub codec: String,
    /// The same with those of its options that say something.
    pub label: String,
    /// The codec.
    pub name: String,
    /// Whether every comparison holds it.
    pub baseline: bool,
    /// Bytes of the artifact's folder, all files.
    pub bytes: u64,
    /// Bytes of the files that hold linear sites.
    pub linear_bytes: u64,
    /// Effective bits per weight of the whole fine-tune.
    pub effective_bpw_total: f64,
    /// Effective bits per weight of the linear sites.
    pub effective_bpw_linear: f64,
    /// Bits per weight of the linear sites by the formula of the method's paper.
    pub claimed_bpw: Option<f64>,
    /// The fine-tune's bits per weight over those.
    pub claimed_ratio: Option<f64>,
    /// The fine-tune's bits per weight over the effective ones of the linear sites.
    pub true_ratio_linear: Option<f64>,
    /// The fine-tune's bytes over the artifact's.
    pub true_ratio: Option<f64>,
    /// Tasks.
    pub tasks: Vec<TaskQuality>,
    /// As in [`Measurement`].
    pub kl_mean: Option<f64>,
    /// As in [`Measurement`].
    pub top1_agreement: Option<f64>,
    /// Perplexity on the text.
    pub perplexity: Option<Perplexity>,
    /// Relative squared error over all linear sites.
    pub error: DeltaError,
    /// Bits per weight of the linear sites above the limit line at equal error;
    /// absent where nothing at all is lost.
    pub above_limit: AboveLimit,
    /// The error at each site.
    pub site_errors: Vec<DeltaError>,
    /// How long compression took.
    pub encode_seconds: f64,
    /// The most resident memory of compression, where the system tells.
    pub peak_memory_bytes: Option<u64>,
}

/// Bits per weight above the limit line.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct AboveLimit {
    /// That of the weights' error.
    pub weight: Option<f64>,
    /// That of the outputs' error.
    pub output: Option<f64>,
}

/// The limit lines of the linear sites.
#[derive(Clone, Debug, Serialize)]
pub struct LimitLines {
    /// Of the weights' error.
    pub weight: Vec<LimitPoint>,
    /// Of the outputs' error.
    pub output: Option<Vec<LimitPoint>>,
}

/// A point of a limit line.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct LimitPoint {
    /// Bits per weight.
    pub bpw: f64,
    /// The least relative squared error.
    pub error: f64,
}

/// A simulated code on the limit line of the weights' error, and what it keeps.
#[derive(Clone, Debug, Serialize)]
pub struct Ideal {
    /// Bits per weight of the linear sites.
    pub bpw_linear: f64,
    /// Bits per weight of the whole fine-tune.
    pub bpw_total: f64,
    /// Tasks.
    pub tasks: Vec<TaskQuality>,
    /// As in [`Measurement`].
    pub kl_mean: Option<f64>,
    /// As in [`Measurement`].
    pub top1_agreement: Option<f64>,
    /// Perplexity on the text.
    pub perplexity: Option<Perplexity>,
}

/// What compression took.
#[derive(Clone, Copy, Debug)]
pub struct Cost {
    /// How long.
    pub seconds: f64,
    /// The most resident memory, where the system tells.
    pub peak_memory_bytes: Option<u64>,
}

/// Compresses the fine-tune of a comparison with a codec, the token tables as the
/// plan says, into a folder that does not exist. Whoever calls [`compare`] says how: a
/// process of its own has a peak of memory of its own.
pub type Compressor<'a> = &'a dyn Fn(
    &CodecSpec,
    &TablePlan,
    &Path,
) -> Result<Cost, Box<dyn std::error::Error + Send + Sync>>;

/// Compresses the fine-tune with every codec of a plan into `folder`, which exists,
/// and measures each artifact and its distance from the limit line.
///
/// # Errors
/// When something cannot be read, compressed or run.
pub fn compare(
    input: Input<'_>,
    plan: &Plan,
    folder: &Path,
    compressor: Compressor<'_>,
    watcher: &dyn Watcher,
) -> Result<Comparison> {
    let start = Instant::now();
    let pair = Pair::open(input.base, input.finetune)?;
    let targets: Vec<PathBuf> = plan.codecs().map(|spec| artifact_dir(folder, spec)).collect();
    if let Some(path) = targets.iter().find(|path| path.exists()) {
        return Err(onebase_format::Error::Exists { path: path.clone() }.into());
    }
    let base = Model::load(Checkpoint::open(input.base)?)?;
    let finetune = Model::load(Checkpoint::open(input.finetune)?)?;
    let seed = input.tests.seed;
    let ruler = Ruler::new(&base, &finetune, input.tests, watcher)?;
    let tokens = input.calibration.as_ref().map(|text| ruler.text_tokens(text)).transpose()?;
    watcher.begin("compressing", plan.codecs.len() as u64);
    let encoded = plan
        .codecs
        .iter()
        .zip(targets)
        .map(|((spec, baseline), target)| {
            let tables = plan.tables.clone().unwrap_or_else(|| TablePlan::Codec(spec.clone()));
            let cost = compressor(spec, &tables, &target)
                .map_err(|source| Error::Compressor { codec: spec.short(), source })?;
            watcher.advance(1);
            let artifact = Artifact::open(&target)?;
            Ok(Encoded { spec: spec.clone(), baseline: *baseline, artifact, cost })
        })
        .collect::<Result<Vec<_>>>()?;
    let mut measured = vec![ruler.measure_base(watcher)?];
    for encoded in &encoded {
        let tenant = Tenant::load(&base, &encoded.artifact)?;
        let subject = Subject { model: &base, tenant: Some(&tenant) };
        measured.push(ruler.measure(&encoded.spec.short(), subject, watcher)?);
    }

    let on = tokens.as_ref().map(|tokens| Calibration { model: &finetune, tokens });
    let sites = map_sites(pair.specs(), on, watcher, |spec, moment| {
        let errors = encoded.iter().map(|e| site_error(&pair, spec, &e.artifact, moment));
        Ok(Site {
            errors: errors.collect::<Result<_>>()?,
            spectrum: weight_spectrum(&pair, spec)?,
            output_spectrum: moment.map(|m| output_spectrum(&pair, spec, m)).transpose()?,
        })
    })?;

    let n_weights_linear = linear(&pair).map(n_elements).sum();
    let limit = |spectrum: fn(&Site) -> Option<Spectrum>| {
        let spectra: Option<Vec<Spectrum>> = sites.iter().map(spectrum).collect();
        spectra.map(|spectra| Limit::new(spectra, n_weights_linear))
    };
    let weight_limit = limit(|site| Some(site.spectrum.clone()));
    let output_limit = limit(|site| site.output_spectrum.clone());
    let mut measured = measured.into_iter();
    let mut variants: Vec<Variant> =
        measured.next().map(|m| Variant::base(m, output_limit.is_some())).into_iter().collect();
    for (index, (encoded, measurement)) in encoded.iter().zip(measured).enumerate() {
        let errors: Vec<SiteError> = sites.iter().map(|s| s.errors[index].clone()).collect();
        let mut variant = Variant::new(&pair, encoded, measurement, &errors);
        let above = |limit: &Option<Limit>, error: Option<f64>| {
            let least = limit.as_ref()?.bits(error?)?;
            Some(variant.effective_bpw_linear - least)
        };
        variant.above_limit = AboveLimit {
            weight: above(&weight_limit, Some(variant.error.weight)),
            output: above(&output_limit, variant.error.output),
        };
        variants.push(variant);
    }
    let mut ideal = Vec::new();
    if let Some(limit) = &weight_limit {
        let n_weights = [n_weights_linear, pair.specs().iter().map(n_elements).sum()];
        for bits in &plan.ideal {
            let folder = folder.join(format!("limit-{bits}"));
            // Where every direction is as good as exact, more bits change nothing.
            let Some(level) = limit.level_of(*bits) else { continue };
            let spent = write_checkpoint(&pair, level, seed, &folder, watcher)?;
            let model = Model::load(Checkpoint::open(&folder)?)?;
            let name = format!("limit line at {bits} bits");
            let measured = ruler.measure(&name, Subject::own(&model), watcher)?;
            drop(model);
            remove(&folder)?;
            ideal.push(Ideal::new(spent, n_weights, measured));
        }
    }
    let anchors = ruler.anchors();
    let text = anchors.perplexity.map(|p| MeasuredText {
        name: p.name,
        n_tokens: p.n_tokens,
        window_tokens: p.window_tokens,
    });
    let level =
        |t: TaskQuality| TaskLevel { name: t.name, n: t.n, base: t.base, finetune: t.finetune };
    let line = |limit: &Limit| -> Vec<LimitPoint> {
        let points = limit.curve(LINE_BITS).into_iter();
        points.map(|[bpw, error]| LimitPoint { bpw, error }).collect()
    };
    Ok(Comparison {
        tool: crate::TOOL.to_owned(),
        base: pair.base().name(),
        finetune: pair.fine_tune().name(),
        finetune_bytes: pair.fine_tune().size_bytes(),
        n_weights: pair.specs().iter().map(n_elements).sum(),
        n_weights_linear,
        seed,
        notes: [ruler.notes(), &plan.notes].concat(),
        tasks: anchors.tasks.into_iter().map(level).collect(),
        text,
        calibration: input.calibration.zip(tokens).map(|(text, tokens)| CalibrationRecord {
            name: text.name,
            blake3: text.digest,
            n_tokens: tokens.len(),
        }),
        sites: linear(&pair).map(|spec| site_name(&spec.name)).collect(),
        variants,
        limit: LimitLines {
            weight: weight_limit.as_ref().map(line).unwrap_or_default(),
            output: output_limit.as_ref().map(line),
        },
        ideal,
        seconds: start.elapsed().as_secs_f64(),
    })
}

fn remove(folder: &Path) -> Result<()> {
    std::fs::remove_dir_all(folder)
        .map_err(|source| Error::Remove { path: folder.to_owned(), source })
}

impl Ideal {
    #[allow(clippy::cast_precision_loss)]
    fn new(bits: IdealBits, [n_linear, n_total]: [u64; 2], measured: Measurement) -> Self {
        Self {
            bpw_linear: bits.linear / n_linear.max(1) as f64,
            bpw_total: bits.total / n_total.max(1) as f64,
            tasks: measured.tasks,
            kl_mean: measured.kl_mean,
            top1_agreement: measured.top1_agreement,
            perplexity: measured.perplexity,
        }
    }
}

fn linear(pair: &Pair) -> impl Iterator<Item = &TensorSpec> {
    pair.specs().iter().filter(|spec| spec.role == Role::Linear)
}

fn n_elements(spec: &TensorSpec) -> u64 {
    spec.shape.iter().map(|n| *n as u64).product()
}

/// An artifact, and what it took to make it.
struct Encoded {
    spec: CodecSpec,
    baseline: bool,
    artifact: Artifact,
    cost: Cost,
}

/// A folder of its own for each codec with its options.
fn artifact_dir(folder: &Path, spec: &CodecSpec) -> PathBuf {
    folder.join(spec.to_string().replace([':', ',', '='], "-"))
}

/// What was found at one linear site.
struct Site {
    spectrum: Spectrum,
    output_spectrum: Option<Spectrum>,
    /// Of each artifact.
    errors: Vec<SiteError>,
}

impl Variant {
    fn base(measurement: Measurement, has_outputs: bool) -> Self {
        Self {
            codec: BASE.to_owned(),
            label: "base alone".to_owned(),
            name: BASE.to_owned(),
            baseline: true,
            bytes: 0,
            linear_bytes: 0,
            effective_bpw_total: 0.0,
            effective_bpw_linear: 0.0,
            claimed_bpw: None,
            claimed_ratio: None,
            true_ratio_linear: None,
            true_ratio: None,
            tasks: measurement.tasks,
            kl_mean: measurement.kl_mean,
            top1_agreement: measurement.top1_agreement,
            perplexity: measurement.perplexity,
            error: DeltaError { weight: 1.0, output: has_outputs.then_some(1.0) },
            above_limit: AboveLimit { weight: Some(0.0), output: has_outputs.then_some(0.0) },
            site_errors: Vec::new(),
            encode_seconds: 0.0,
            peak_memory_bytes: None,
        }
    }

    #[allow(clippy::cast_precision_loss)]
    fn new(pair: &Pair, encoded: &Encoded, measurement: Measurement, errors: &[SiteError]) -> Self {
        let sizes: Sizes = encoded.artifact.sizes();
        // A site that is the base's costs no formula anything.
        let records = &encoded.artifact.manifest().tensors;
        let stored = linear(pair).filter(|spec| {
            let record = records.get(&spec.name);
            record.is_some_and(|record| matches!(record.storage, Storage::Codec { .. }))
        });
        let claimed: f64 = stored
            .map(|spec| {
                let shape = [spec.shape[0], spec.shape[1]];
                encoded.spec.claimed_bits(shape) * n_elements(spec) as f64
            })
            .sum();
        let claimed_bpw = claimed / sizes.n_weights_linear.max(1) as f64;
        let finetune = pair.fine_tune();
        let finetune_bpw = 8.0 * finetune.size_bytes() as f64 / finetune.n_weights().max(1) as f64;
        Self {
            codec: encoded.spec.to_string(),
            label: encoded.spec.short(),
            name: encoded.spec.codec().name().to_owned(),
            baseline: encoded.baseline,
            bytes: sizes.total_bytes,
            linear_bytes: sizes.linear_bytes,
            effective_bpw_total: sizes.effective_bpw_total(),
            effective_bpw_linear: sizes.effective_bpw_linear(),
            claimed_bpw: Some(claimed_bpw),
            claimed_ratio: Some(finetune_bpw / claimed_bpw),
            true_ratio_linear: Some(finetune_bpw / sizes.effective_bpw_linear()),
            true_ratio: Some(finetune.size_bytes() as f64 / sizes.total_bytes as f64),
            tasks: measurement.tasks,
            kl_mean: measurement.kl_mean,
            top1_agreement: measurement.top1_agreement,
            perplexity: measurement.perplexity,
            error: total_error(errors),
            above_limit: AboveLimit::default(),
            site_errors: errors.iter().map(SiteError::relative).collect(),
            encode_seconds: encoded.cost.seconds,
            peak_memory_bytes: encoded.cost.peak_memory_bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn planned(codecs: &[&str], bits: &[f64]) -> Vec<String> {
        let codecs: Vec<String> = codecs.iter().map(|c| (*c).to_owned()).collect();
        let plan = Plan::new(&codecs, bits, None).unwrap();
        plan.codecs().map(CodecSpec::to_string).collect()
    }

    #[test]
    fn baselines_are_always_there_and_nothing_twice() {
        let baselines = [
            "rtn:bits=1,group_size=128",
            "rtn:bits=2,group_size=128",
            "rtn:bits=3,group_size=128",
            "rtn:bits=4,group_size=128",
            "sign:scale=row",
            "low-rank:bits=0.5",
            "low-rank:bits=2",
        ];
        assert_eq!(planned(&[], &[0.5, 2.0]), baselines);
        // Of the sizes, `rtn` can have only 2, which is there.
        assert_eq!(planned(&["rtn", "sign", "low-rank"], &[0.5, 2.0]), baselines);
    }

    #[test]
    fn codecs_are_swept_unless_they_say_their_size() {
        let codecs = ["rtn:group_size=64", "rtn:bits=8", "sign:scale=matrix", "dense"];
        let more = planned(&codecs, &[0.5, 1.0, 5.0]).split_off(8);
        assert_eq!(
            more,
            [
                "rtn:bits=1,group_size=64",
                "rtn:bits=5,group_size=64",
                "rtn:bits=8,group_size=128",
                "sign:scale=matrix",
                "dense:dtype=f32",
            ]
        );
    }

    #[test]
    fn unknown_codecs_are_refused() {
        let plan = Plan::new(&["rnt".to_owned()], &[1.0], None);
        assert!(matches!(plan, Err(Error::Codec(CodecError::UnknownCodec { .. }))));
    }
}
