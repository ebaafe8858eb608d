use std::fmt::Write as _;
use std::path::Path;
use std::time::Instant;

use anyhow::bail;
use onebase_compress::{Pair, updated_model_card};
use onebase_eval::{
    Ruler, SiteError, Speed, Subject, Task, Tests, TextFile, check_reference, site_errors,
    total_error,
};
use onebase_format::artifact::{Artifact, CalibrationRecord, DeltaError, Quality, TaskQuality};
use onebase_format::{Checkpoint, write_file};
use onebase_model::{Model, ModelConfig, Tenant};
use serde_json::{Value, json};

use crate::args::{EvalArgs, MeasureArgs};
use crate::output::{Output, Stages, bytes, can_be_written, number, percent, table};

pub(crate) fn run(args: &EvalArgs, output: &Output) -> anyhow::Result<()> {
    let start = Instant::now();
    let tests = args.measure.tests()?;
    let calibration = args.measure.calibration.as_deref().map(TextFile::read).transpose()?;
    if calibration.is_some() && args.artifact.is_none() {
        bail!("--calibration is for the error of an artifact, and none is given");
    }
    // On a quantized base weights are in another basis, and are not compared.
    let base = Checkpoint::open(&args.base)?;
    let is_quantized = ModelConfig::from_json(base.config(), base.dir())?.quantization.is_some();
    let pair = (!is_quantized).then(|| Pair::open(&args.base, &args.reference)).transpose()?;
    let artifact = args.artifact.as_deref().map(Artifact::open).transpose()?;
    if let (Some(artifact), Some(pair)) = (&artifact, &pair) {
        check_reference(artifact, pair.fine_tune())?;
    }
    if let Some(path) = &args.samples {
        can_be_written(path)?;
    }
    let base = Model::load(base)?;
    let tenant = artifact.as_ref().map(|artifact| Tenant::load(&base, artifact)).transpose()?;
    let finetune = Model::load(Checkpoint::open(&args.reference)?)?;

    let stages = Stages::new();
    let ruler = Ruler::new(&base, &finetune, tests, &stages)?;
    let tokens = calibration.as_ref().map(|text| ruler.text_tokens(text)).transpose()?;
    let measurement = match &tenant {
        Some(tenant) => {
            let subject = Subject { model: &base, tenant: Some(tenant) };
            ruler.measure("compressed", subject, &stages)?
        }
        None => ruler.anchors(),
    };
    if let Some(path) = &args.samples {
        write_samples(path, &ruler, &measurement)?;
    }
    let sites = match (&artifact, &pair) {
        (Some(artifact), Some(pair)) => {
            let calibration = tokens.as_deref().map(|tokens| (&finetune, tokens));
            site_errors(pair, artifact, calibration, &stages)?
        }
        _ => Vec::new(),
    };
    stages.finish();
    let error = (!sites.is_empty()).then(|| total_error(&sites));
    let mut notes = ruler.notes().to_vec();
    if is_quantized {
        notes.push(
            "The base is quantized: weights are in its basis and are not compared with the \
             fine-tune's."
                .into(),
        );
    }
    if error.is_some_and(|e| e.weight >= 1.0) {
        notes.push("The artifact is no nearer to the fine-tune's weights than the base is.".into());
    }
    let calibration = calibration.zip(tokens).map(|(text, tokens)| CalibrationRecord {
        name: text.name,
        blake3: text.digest,
        n_tokens: tokens.len(),
    });
    let quality = measurement.quality(&ruler, error, calibration);
    // What was measured is shown even where it cannot be recorded.
    let mut sizes = artifact.as_ref().map(Artifact::sizes);
    let mut recorded = Ok(());
    if let (true, Some(artifact)) = (args.record, &artifact) {
        match artifact.record_quality(&quality, updated_model_card) {
            Ok(new) => sizes = Some(new),
            Err(error) => recorded = Err(error),
        }
    }
    let site_list: Vec<Value> = sites
        .iter()
        .map(|site| {
            let DeltaError { weight, output } = site.relative();
            json!({"site": site.site, "weight": weight, "output": output})
        })
        .collect();
    let [base_speed, finetune_speed] = ruler.speed();
    let object = json!({
        "base": base.checkpoint().name(),
        "finetune": finetune.checkpoint().name(),
        "artifact": args.artifact,
        "tool": quality.tool,
        "seed": quality.seed,
        "notes": notes,
        "tasks": quality.tasks,
        "kl_mean": quality.kl_mean,
        "top1_agreement": quality.top1_agreement,
        "perplexity": quality.perplexity,
        "error": quality.error,
        "calibration": quality.calibration,
        "sites": site_list,
        "bytes": sizes.map(|s| s.total_bytes),
        "effective_bpw_linear": sizes.map(|s| s.effective_bpw_linear()),
        "effective_bpw_total": sizes.map(|s| s.effective_bpw_total()),
        "recorded": args.record && recorded.is_ok(),
        "speed": {
            "base": base_speed,
            "finetune": finetune_speed,
            "compressed": measurement.speed,
        },
        "seconds": start.elapsed().as_secs_f64(),
    });
    output.result(&object, || {
        let mut text = task_table(&quality.tasks);
        let mut rows = figures(&quality);
        if let Some(sizes) = sizes {
            rows.push(vec![
                "size on disk".to_owned(),
                format!("{} ({} B)", bytes(sizes.total_bytes), sizes.total_bytes),
            ]);
            rows.push(vec![
                "effective bits per weight".to_owned(),
                format!(
                    "{:.3} linear sites, {:.3} whole fine-tune",
                    sizes.effective_bpw_linear(),
                    sizes.effective_bpw_total()
                ),
            ]);
        }
        let speeds = [("fine-tune", finetune_speed), ("compressed", measurement.speed)];
        for (who, speed) in speeds.into_iter().filter(|(_, s)| s.prefill_tokens > 0) {
            rows.push(vec![format!("speed, {who}"), speed_text(&speed)]);
        }
        if !rows.is_empty() {
            text.push_str(&table(&["figure", "value"], 2, rows).to_string());
        }
        if args.sites {
            text.push('\n');
            text.push_str(&site_table(&sites));
        }
        for note in &notes {
            let _ = write!(text, "\nnote: {note}");
        }
        if args.record && recorded.is_ok() {
            text.push_str("\nthe results were written into the artifact and its model card");
        }
        text
    })?;
    Ok(recorded?)
}

impl MeasureArgs {
    /// Reads the files that are named.
    pub(crate) fn tests(&self) -> anyhow::Result<Tests> {
        let mut tasks = Task::read_all(&self.tasks)?;
        if let Some(limit) = self.limit {
            tasks.iter_mut().for_each(|task| task.questions.truncate(limit));
        }
        Ok(Tests {
            tasks,
            text: self.text.as_deref().map(TextFile::read).transpose()?,
            window_tokens: self.window,
            seed: self.seed,
        })
    }
}

fn write_samples(
    path: &Path,
    ruler: &Ruler<'_>,
    measurement: &onebase_eval::Measurement,
) -> anyhow::Result<()> {
    let mut lines = String::new();
    for sample in ruler.samples(measurement) {
        lines.push_str(&serde_json::to_string(&sample)?);
        lines.push('\n');
    }
    Ok(write_file(path, lines.as_bytes())?)
}

/// Skill kept with its interval.
pub(crate) fn skill(task: &TaskQuality) -> String {
    match (task.skill_kept, task.skill_kept_ci) {
        (Some(kept), Some([low, high])) => {
            format!("{} ({} to {})", percent(kept), percent(low), percent(high))
        }
        (Some(kept), None) => percent(kept),
        (None, _) => "–".to_owned(),
    }
}

fn task_table(tasks: &[TaskQuality]) -> String {
    if tasks.is_empty() {
        return String::new();
    }
    let rows = tasks
        .iter()
        .map(|task| {
            vec![
                task.name.clone(),
                task.n.to_string(),
                percent(task.base),
                percent(task.finetune),
                task.compressed.map_or_else(|| "–".to_owned(), percent),
                skill(task),
                task.kl_mean.map_or_else(|| "–".to_owned(), number),
                task.top1_agreement.map_or_else(|| "–".to_owned(), percent),
            ]
        })
        .collect();
    let header = [
        "task",
        "questions",
        "base",
        "fine-tune",
        "compressed",
        "skill kept (95 % interval)",
        "KL, nats",
        "top-1 agreement",
    ];
    format!("{}\n", table(&header, 1, rows))
}

/// What else was measured, a name and a value each.
pub(crate) fn figures(quality: &Quality) -> Vec<Vec<String>> {
    let mut rows = Vec::new();
    let mut row = |name: &str, value: String| rows.push(vec![name.to_owned(), value]);
    if let Some(kl) = quality.kl_mean {
        row("KL divergence from the fine-tune", format!("{} nats", number(kl)));
    }
    if let Some(share) = quality.top1_agreement {
        row("top-1 agreement with the fine-tune", percent(share));
    }
    if let Some(p) = &quality.perplexity {
        let value = |p: Option<f64>| p.map_or_else(|| "–".to_owned(), number);
        row(
            &format!(
                "perplexity on {} ({} tokens, {} at a time)",
                p.name, p.n_tokens, p.window_tokens
            ),
            format!(
                "base {}, fine-tune {}, compressed {}",
                value(p.base),
                value(p.finetune),
                value(p.compressed)
            ),
        );
    }
    if let Some(DeltaError { weight, output }) = quality.error {
        let on = quality.calibration.as_ref().map(|text| format!(" on {}", text.name));
        let on = on.unwrap_or_default();
        let output = output.map(|e| format!(", of their outputs{on} {}", number(e)));
        row(
            "relative squared error of the linear sites",
            format!("{}{}", number(weight), output.unwrap_or_default()),
        );
    }
    rows
}

fn speed_text(speed: &Speed) -> String {
    format!(
        "prefill {:.0} tokens/s ({}), decode {:.0} tokens/s ({})",
        speed.prefill_rate(),
        speed.prefill_tokens,
        speed.decode_rate(),
        speed.decode_tokens
    )
}

fn site_table(sites: &[SiteError]) -> String {
    let rows = sites
        .iter()
        .map(|site| {
            let DeltaError { weight, output } = site.relative();
            let output = output.map_or_else(|| "–".to_owned(), number);
            vec![site.site.clone(), number(weight), output]
        })
        .collect();
    table(&["site", "error of the delta", "of its outputs"], 1, rows).to_string()
}
