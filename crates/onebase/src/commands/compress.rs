use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, bail};
use onebase_codec::{Stage, stage_seconds};
use onebase_compress::{
    ArchiveReport, Calibration, DistillText, Distilled, Inputs, Job, Pair, Plan, Progress,
    Reference, RotatedPair, Sequential, TablePlan, archive, check_calibrated, compress,
    compress_part, distill, expected_memory, open_rotated,
};
use onebase_eval::{TextFile, Watcher as _};
use onebase_format::Checkpoint;
use onebase_format::artifact::{
    Artifact, ArtifactWriter, CalibrationRecord, Manifest, Role, Shard, Sizes,
};
use onebase_format::statistics::Source;
use onebase_model::{Model, ModelConfig, TextModel};
use serde_json::{Map, Value, json};

use crate::args::{CompressArgs, GivenCodec};
use crate::commands::archive::ORIGINAL_FOLDER;
use crate::commands::calibrate::warn_of_few_tokens;
use crate::commands::inspect::summary_rows;
use crate::commands::{family, scratch_beside};
use crate::output::{Bar, Output, Stages, bytes, number, table};

/// The most resident memory that this process held so far; Linux alone tells.
pub(crate) fn peak_memory_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// Compresses into a folder beside the artifact's and fits the scales of what is there.
fn distilled(
    args: &CompressArgs,
    text: &Path,
    pair: &Pair,
    plan: &Plan,
) -> anyhow::Result<Written> {
    // Before the work whose result it is for.
    plan.linear.rescalable()?;
    if args.out.symlink_metadata().is_ok() {
        return Err(onebase_format::Error::Exists { path: args.out.clone() }.into());
    }
    if !args.restart && ArtifactWriter::is_begun(&args.out)? {
        bail!(
            "an interrupted run has left work beside {}; finish it without --distill, or throw it \
             away with --restart",
            args.out.display()
        );
    }
    let text = TextFile::read(text)?;
    let mut tokens =
        TextModel::from_checkpoint(pair.fine_tune())?.tokenizer.encode(&text.text, true)?;
    tokens.truncate(args.distill_tokens);
    let scratch = scratch_beside(&args.out, "distill")?;
    let plain = scratch.path().join("plain");
    let bar = Bar::new("compressing");
    compress(pair, plan, &plain, &bar)?;
    bar.finish();
    let base = Model::load(Checkpoint::open(pair.base().dir())?)?;
    let fine_tune = Model::load(Checkpoint::open(pair.fine_tune().dir())?)?;
    let record = CalibrationRecord { name: text.name, blake3: text.digest, n_tokens: tokens.len() };
    let text = DistillText { tokens: &tokens, record };
    let artifact = Artifact::open(&plain)?;
    let passes = Passes(Stages::new());
    let (manifest, sizes, distilled) =
        distill(&base, &fine_tune, &artifact, &text, &args.out, &passes)?;
    Ok(Written { manifest, sizes, distilled: Some(distilled), kept: None })
}

/// The tokens that are run to fit scales.
struct Passes(Stages);

impl Progress for Passes {
    fn begin(&self, total: u64) {
        self.0.begin("fitting scales", total);
    }

    fn resumed(&self, _: usize) {}

    fn tensor(&self, _: &str) {}

    fn advance(&self, tokens: u64) {
        self.0.advance(tokens);
    }

    fn warn(&self, message: &str) {
        Output::note(&format!("warning: {message}"));
    }
}

/// A pair, in the basis of the base where that is quantized.
enum OpenedPair {
    Plain(Pair),
    Rotated { pair: RotatedPair, has_high_inputs: bool },
}

impl OpenedPair {
    fn open(args: &CompressArgs, fine_tune: &Path) -> anyhow::Result<Self> {
        let base = Checkpoint::open(&args.base)?;
        let config = ModelConfig::from_json(base.config(), base.dir())?;
        if config.quantization.is_none() && args.full_base.is_none() {
            return Ok(Self::Plain(Pair::open(&args.base, fine_tune)?));
        }
        let reference = match &args.full_base {
            None => Reference::Quantized,
            Some(full) => Reference::Full(full.clone()),
        };
        let bar = Bar::new("rotating");
        let pair = open_rotated(&args.base, fine_tune, &reference, &args.out, &bar)?;
        bar.finish();
        let has_high_inputs = config.quantization.is_some_and(|q| q.high_hidden > 0);
        Ok(Self::Rotated { pair, has_high_inputs })
    }

    /// Whether the base has some of a site's inputs in more bits than the others.
    fn has_high_inputs(&self) -> bool {
        matches!(self, Self::Rotated { has_high_inputs: true, .. })
    }

    fn pair(&self) -> &Pair {
        match self {
            Self::Plain(pair) => pair,
            Self::Rotated { pair, .. } => pair.pair(),
        }
    }
}

/// The inputs by which errors of linear sites are weighed, if they are.
fn inputs(args: &CompressArgs, pair: &Pair) -> anyhow::Result<Option<Inputs>> {
    if let Some(dir) = &args.statistics {
        return Ok(Some(Inputs::Statistics(Arc::new(Calibration::open(dir, pair)?))));
    }
    let Some(path) = &args.calibration else { return Ok(None) };
    let text = TextFile::read(path)?;
    let tokenizer = TextModel::from_checkpoint(pair.fine_tune())?.tokenizer;
    let mut tokens = tokenizer.encode(&text.text, true)?;
    tokens.truncate(args.calibration_tokens);
    let sites = pair.specs().iter().filter(|spec| spec.role == Role::Linear);
    let widest = sites.map(|spec| spec.shape[1]).max().unwrap_or(0);
    warn_of_few_tokens(tokens.len(), widest);
    let source = Source::Text { name: text.name, blake3: text.digest };
    let text = Sequential::new(pair, tokens, source, args.calibration_window)?;
    Ok(Some(Inputs::Sequential(Arc::new(text))))
}

pub(crate) fn run(args: &CompressArgs, output: &Output) -> anyhow::Result<()> {
    let start = Instant::now();
    let (codec, has_size, has_scale) = match &args.codec {
        GivenCodec::Delta { spec, has_size, has_scale } => (spec, *has_size, *has_scale),
        GivenCodec::Family(rqt) => return family::compress(args, rqt, output),
    };
    let [fine_tune] = &args.fine_tunes[..] else {
        bail!(
            "{} fine-tunes, expected one for codec {codec}; `--codec rqt` compresses a family",
            args.fine_tunes.len()
        )
    };
    if args.leaf.is_some() || args.dry_run {
        bail!("--leaf and --dry-run are for a family, which `--codec rqt` compresses");
    }
    let opened = OpenedPair::open(args, Path::new(fine_tune))?;
    if args.keep_original && matches!(opened, OpenedPair::Rotated { .. }) {
        bail!(
            "--keep-original stores a fine-tune by what it has of a full base: `onebase archive` \
             does"
        );
    }
    let pair = opened.pair();
    // On a base with inputs of more bits than others, signs need two scales a row.
    let split = codec.with("scale", "parts".into()).ok();
    let codec = match &split {
        Some(split) if !has_scale && opened.has_high_inputs() => {
            Output::note(&format!("note: {} for this base", split.short()));
            split
        }
        _ => codec,
    };
    // What a wrong command says is said before whole models are read.
    if args.statistics.is_some() || args.calibration.is_some() {
        check_calibrated(codec)?;
    }
    let mut plan = Plan::new(
        codec.clone(),
        args.embeddings.clone().unwrap_or_else(|| TablePlan::Codec(codec.clone())),
        args.vectors.clone(),
    );
    plan.calibration = inputs(args, pair)?;
    let plan = match args.budget {
        Some(_) if has_size => {
            bail!("{codec} says its size, so that --budget cannot choose it; give one of them")
        }
        Some(budget) => {
            let plan = budget.fit(pair, &plan, args.embeddings.is_none())?;
            if args.allocate {
                let bar = Bar::new("allocating");
                let allocated = budget.allocate(pair, &plan, &bar)?;
                bar.finish();
                allocated
            } else {
                plan
            }
        }
        None => plan,
    };
    let expected = expected_memory(pair, &plan, rayon::current_num_threads())?;
    // Fitting scales runs both models, and allocating encodes at larger sizes than the
    // plan's: neither is counted there.
    let is_counted = args.distill.is_none() && !args.allocate;
    let said = is_counted.then_some(expected.bytes);
    if let Some(said) = said {
        let codec = plan.linear.short();
        let most = bytes(said);
        Output::note(&format!("{codec}: takes at most {most} of memory, for {}", expected.tensor));
    }
    let shard = args.shard.unwrap_or(Shard::WHOLE);
    let written = if let Some(text) = &args.distill {
        Some(distilled(args, text, pair, &plan)?)
    } else {
        let bar = Bar::new("compressing");
        let job = Job { shard, restart: args.restart };
        let written = compress_part(pair, &plan, job, &args.out, &bar)?;
        bar.finish();
        written.map(|(manifest, sizes)| Written { manifest, sizes, distilled: None, kept: None })
    };
    let written = written.map(|written| keep_original(args, pair, written)).transpose()?;
    let cost = Cost {
        seconds: start.elapsed().as_secs_f64(),
        read_bytes: pair.base().size_bytes() + pair.fine_tune().size_bytes(),
        expected_memory_bytes: said,
    };
    match written {
        Some(written) => say_artifact(args, pair, &written, &cost, output),
        None => say_shard(args, shard, &cost, output),
    }
}

/// The seconds of each stage of encoding that took any.
fn stages() -> impl Iterator<Item = (String, Value)> {
    let spent = Stage::ALL.iter().map(|stage| (stage.name(), stage_seconds(*stage)));
    spent.filter(|(_, s)| *s > 0.0).map(|(name, s)| (name.replace(' ', "_"), s.into()))
}

/// What a run took.
struct Cost {
    seconds: f64,
    /// Of both checkpoints, as if read once.
    read_bytes: u64,
    /// Where it is known.
    expected_memory_bytes: Option<u64>,
}

/// An artifact that was written.
struct Written {
    manifest: Manifest,
    sizes: Sizes,
    distilled: Option<Distilled>,
    /// The archive of the fine-tune, where it is kept.
    kept: Option<ArchiveReport>,
}

/// Archives the fine-tune in the artifact's folder, where that is asked for.
fn keep_original(
    args: &CompressArgs,
    pair: &Pair,
    mut written: Written,
) -> anyhow::Result<Written> {
    if args.keep_original {
        let bar = Bar::new("archiving");
        let target = args.out.join(ORIGINAL_FOLDER);
        let report = archive(pair.base().dir(), pair.fine_tune().dir(), &target, &bar);
        written.kept = Some(report.with_context(|| {
            let (base, tuned) = (pair.base().dir().display(), pair.fine_tune().dir().display());
            format!(
                "the artifact is complete, its original is not; when what is said below is mended: \
                 onebase archive {base} {tuned} -o {}",
                target.display()
            )
        })?);
        bar.finish();
    }
    Ok(written)
}

fn say_artifact(
    args: &CompressArgs,
    pair: &Pair,
    written: &Written,
    cost: &Cost,
    output: &Output,
) -> anyhow::Result<()> {
    let Written { manifest, sizes, distilled, kept } = written;
    let mut object = json!({
        "artifact": args.out,
        "bytes": sizes.total_bytes,
        "fine_tune_bytes": pair.fine_tune_bytes(),
        "effective_bpw_linear": sizes.effective_bpw_linear(),
        "effective_bpw_total": sizes.effective_bpw_total(),
        "codecs": manifest.codecs,
        "seconds": cost.seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        "expected_memory_bytes": cost.expected_memory_bytes,
        "stage_seconds": stages().collect::<Map<_, _>>(),
    });
    if let Some(distilled) = distilled {
        object["distilled"] = json!(distilled);
    }
    if let Some(kept) = kept {
        object["original_bytes"] = json!(kept.archive_bytes);
    }
    output.result(&object, || {
        let mut rows = vec![vec!["artifact".to_owned(), args.out.display().to_string()]];
        rows.extend(summary_rows(manifest, sizes));
        if let Some(distilled) = distilled {
            let Distilled { n_sites, n_held_out_tokens, loss_before, loss_after, .. } = distilled;
            rows.push(vec![
                "scales fitted".to_owned(),
                format!(
                    "{n_sites} factors; squared error of a logit on {n_held_out_tokens} other \
                     tokens {} → {}",
                    number(*loss_before),
                    number(*loss_after)
                ),
            ]);
        }
        if let Some(kept) = kept {
            rows.push(vec!["original beside it".to_owned(), bytes(kept.archive_bytes)]);
        }
        rows.push(vec![
            "time".to_owned(),
            #[allow(
                clippy::cast_precision_loss,
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss
            )]
            {
                let rate = (cost.read_bytes as f64 / cost.seconds) as u64;
                format!("{:.1} s, {} of checkpoints per second", cost.seconds, bytes(rate))
            },
        ]);
        let stages: Vec<String> = Stage::ALL
            .iter()
            .map(|stage| (stage.name(), 100.0 * stage_seconds(*stage) / cost.seconds))
            .filter(|(_, percent)| *percent > 0.0)
            .map(|(name, percent)| format!("{name} {} %", number(percent)))
            .collect();
        if !stages.is_empty() {
            rows.push(vec!["of it".to_owned(), stages.join(", ")]);
        }
        if let Some(peak) = peak_memory_bytes() {
            rows.push(vec!["peak memory".to_owned(), bytes(peak)]);
        }
        table(&["compressed", &manifest.fine_tune], 2, rows).to_string()
    })
}

fn say_shard(
    args: &CompressArgs,
    Shard { index, count }: Shard,
    cost: &Cost,
    output: &Output,
) -> anyhow::Result<()> {
    let object = json!({
        "artifact": args.out,
        "shard": index,
        "n_shards": count,
        "seconds": cost.seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        "expected_memory_bytes": cost.expected_memory_bytes,
    });
    output.result(&object, || {
        let out = args.out.display();
        format!("shard {index} of {count} is complete; when all are: onebase finalize {out}")
    })
}
