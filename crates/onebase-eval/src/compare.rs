use std::path::{Path, PathBuf};
use std::time::Instant;

use onebase_codec::CodecSpec;
use onebase_compress::{Pair, TablePlan};
use onebase_format::Checkpoint;
use onebase_format::artifact::{Artifact, CalibrationRecord, Role, TaskQuality};
use onebase_model::{Model, Tenant, TensorSpec};

use crate::activations::{Calibration, map_sites};
use crate::comparison::{
    AboveLimit, Comparison, Ideal, LimitLines, LimitPoint, MeasuredText, TaskLevel, Variant,
};
use crate::ideal::write_checkpoint;
use crate::limit::{Limit, Spectrum};
use crate::site_error::{SiteError, site_error, site_name};
use crate::spectrum::{output_spectrum, weight_spectrum};
use crate::{Error, Plan, Result, Ruler, Subject, Tests, TextFile, Watcher};

/// The limit line is drawn up to here, in bits per weight.
const LINE_BITS: f64 = 6.0;

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
    let ruler = Ruler::new(&base, &finetune, input.tests, watcher)?;
    let tokens = input.calibration.as_ref().map(|text| ruler.text_tokens(text)).transpose()?;
    let encoded = compress_all(plan, targets, compressor, watcher)?;
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
        let mut variant = Variant::new(&pair, encoded, measurement, &errors)?;
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
    let ideal = match &weight_limit {
        Some(limit) => measure_ideal(&pair, &plan.ideal, limit, &ruler, folder, watcher)?,
        None => Vec::new(),
    };
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
        seed: ruler.seed(),
        notes: ruler.notes().iter().cloned().chain(plan.note()).collect(),
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

/// Writes an artifact with every codec of a plan.
fn compress_all(
    plan: &Plan,
    targets: Vec<PathBuf>,
    compressor: Compressor<'_>,
    watcher: &dyn Watcher,
) -> Result<Vec<Encoded>> {
    watcher.begin("compressing", plan.codecs.len() as u64);
    let codecs = plan.codecs.iter().zip(targets);
    codecs
        .map(|((spec, baseline), target)| {
            let tables = plan.tables.clone().unwrap_or_else(|| TablePlan::Codec(spec.clone()));
            let cost = compressor(spec, &tables, &target)
                .map_err(|source| Error::Compressor { codec: spec.short(), source })?;
            watcher.advance(1);
            let artifact = Artifact::open(&target)?;
            Ok(Encoded { spec: spec.clone(), baseline: *baseline, artifact, cost })
        })
        .collect()
}

/// Measures what a code on the limit line would leave, at each of some sizes in bits
/// per weight of the linear sites.
fn measure_ideal(
    pair: &Pair,
    sizes: &[f64],
    limit: &Limit,
    ruler: &Ruler<'_>,
    folder: &Path,
    watcher: &dyn Watcher,
) -> Result<Vec<Ideal>> {
    let n_weights = [linear(pair).map(n_elements).sum(), pair.specs().iter().map(n_elements).sum()];
    let mut ideal = Vec::new();
    for bits in sizes {
        let folder = folder.join(format!("limit-{bits}"));
        // Where every direction is as good as exact, more bits change nothing.
        let Some(level) = limit.level_of(*bits) else { continue };
        let spent = write_checkpoint(pair, level, ruler.seed(), &folder, watcher)?;
        let model = Model::load(Checkpoint::open(&folder)?)?;
        let name = format!("limit line at {bits} bits");
        let measured = ruler.measure(&name, Subject::own(&model), watcher)?;
        drop(model);
        remove(&folder)?;
        ideal.push(Ideal::new(spent, n_weights, measured));
    }
    Ok(ideal)
}

fn remove(folder: &Path) -> Result<()> {
    std::fs::remove_dir_all(folder)
        .map_err(|source| Error::Remove { path: folder.to_owned(), source })
}

pub(crate) fn linear(pair: &Pair) -> impl Iterator<Item = &TensorSpec> {
    pair.specs().iter().filter(|spec| spec.role == Role::Linear)
}

pub(crate) fn n_elements(spec: &TensorSpec) -> u64 {
    spec.shape.iter().map(|n| *n as u64).product()
}

/// An artifact, and what it took to make it.
pub(crate) struct Encoded {
    pub(crate) spec: CodecSpec,
    pub(crate) baseline: bool,
    pub(crate) artifact: Artifact,
    pub(crate) cost: Cost,
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
