use std::collections::BTreeMap;
use std::fmt::Write as _;

use onebase_format::artifact::{Manifest, Quality, Sizes, Storage};
use onebase_tensor::{DType, effective_bits};

/// What stands before and after the figures, so that they can be replaced in a
/// card that somebody has edited.
const BEGIN: &str = "<!-- onebase: figures -->\n";
const END: &str = "<!-- onebase: end -->\n";

/// The model card of an artifact, with the front matter that model hubs read.
pub(crate) fn model_card(manifest: &Manifest, sizes: &Sizes) -> String {
    let Manifest { fine_tune, base, tool, .. } = manifest;
    format!(
        "---\nbase_model: {base}\nlibrary_name: onebase\ntags:\n- onebase\n- delta\n---\n\n\
         # {fine_tune}, as a delta of {base}\n\n\
         Written by {tool}. It is only valid on the exact base whose tensors' digests\n\
         `onebase.json` lists.\n\n\
         {BEGIN}{figures}{END}\n\
         ```\nonebase verify BASE .\nonebase generate BASE --delta {fine_tune}=. -p '…'\n```\n",
        base = base.name,
        figures = figures(manifest, sizes),
    )
}

/// A card with its figures brought up to date and everything else as it is; a new
/// card where there is none.
pub fn updated_model_card(manifest: &Manifest, sizes: &Sizes, previous: Option<&str>) -> String {
    let Some(card) = previous else { return model_card(manifest, sizes) };
    let figures = format!("{BEGIN}{}{END}", figures(manifest, sizes));
    match (card.find(BEGIN), card.find(END)) {
        (Some(begin), Some(end)) if begin < end => {
            format!("{}{figures}{}", &card[..begin], &card[end + END.len()..])
        }
        _ => format!("{}\n\n{figures}", card.trim_end()),
    }
}

fn figures(manifest: &Manifest, sizes: &Sizes) -> String {
    let mut text = String::from("| | |\n|---|---|\n");
    let original = manifest.tensors.values().map(|t| {
        let size = t.dtype.parse::<DType>().map_or(0, DType::size_bytes);
        (t.shape.iter().product::<usize>() * size) as u64
    });
    let original: u64 = original.sum();
    #[allow(clippy::cast_precision_loss)]
    let ratio = original as f64 / sizes.total_bytes.max(1) as f64;
    let mut row = |name: &str, value: String| {
        let _ = writeln!(text, "| {name} | {value} |");
    };
    row("bytes on disk, all files", sizes.total_bytes.to_string());
    row("bytes of the fine-tune's weights", format!("{original} ({ratio:.2} times as many)"));
    let linear = format!("{:.3}", sizes.effective_bpw_linear());
    row("effective bits per weight, linear sites", linear);
    let total = format!("{:.3}", effective_bits(sizes.total_bytes, sizes.n_weights_total));
    row("effective bits per weight, whole fine-tune", total);
    if let Some(statistics) = &manifest.calibration {
        row("encoded with statistics of", statistics.to_string());
    }
    if let Some(text) = &manifest.distillation {
        row(
            "scales fitted to the fine-tune's logits on",
            format!("{} ({} tokens)", text.name, text.n_tokens),
        );
    }
    for (method, count) in methods(manifest) {
        row(&format!("tensors stored as {method}"), count.to_string());
    }
    if let Some(quality) = manifest.quality() {
        text.push_str(&quality_figures(&quality));
    }
    text
}

/// What was measured of an artifact, as tables.
fn quality_figures(quality: &Quality) -> String {
    let percent = |share: f64| format!("{:.1} %", 100.0 * share);
    let percent_of = |share: Option<f64>| share.map_or_else(|| "–".to_owned(), percent);
    let number = |value: Option<f64>| value.map_or_else(|| "–".to_owned(), |v| format!("{v:.4}"));
    let mut text = format!(
        "\nCompared with {} (measured by {}, seed {}). Skill kept is (compressed − base) ÷ (fine-tune − base), \
         with its 95 % interval; KL is the mean divergence of the next-token distribution from the fine-tune's, in nats.\n",
        quality.reference, quality.tool, quality.seed
    );
    if !quality.tasks.is_empty() {
        text.push_str(
            "\n| task | questions | base | fine-tune | compressed | skill kept | KL | top-1 agreement |\n\
             |---|---|---|---|---|---|---|---|\n",
        );
    }
    for task in &quality.tasks {
        let kept = match (task.skill_kept, task.skill_kept_ci) {
            (Some(kept), Some([low, high])) => {
                format!("{} ({} to {})", percent(kept), percent(low), percent(high))
            }
            (kept, _) => percent_of(kept),
        };
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} | {kept} | {} | {} |",
            task.name.replace('|', "\\|"),
            task.n,
            percent(task.base),
            percent(task.finetune),
            percent_of(task.compressed),
            number(task.kl_mean),
            percent_of(task.top1_agreement),
        );
    }
    if let Some(perplexity) = &quality.perplexity {
        let _ = writeln!(
            text,
            "\nPerplexity on {} ({} tokens, {} at a time): base {}, fine-tune {}, compressed {}.",
            perplexity.name,
            perplexity.n_tokens,
            perplexity.window_tokens,
            number(perplexity.base),
            number(perplexity.finetune),
            number(perplexity.compressed),
        );
    }
    if let Some(error) = quality.error {
        let on = quality.calibration.as_ref().map(|text| format!(" on {}", text.name));
        let output =
            error.output.map(|e| format!(", of its outputs{} {e:.4}", on.unwrap_or_default()));
        let _ = writeln!(
            text,
            "\nRelative squared error of the linear sites' delta: {:.4}{}.",
            error.weight,
            output.unwrap_or_default(),
        );
    }
    text
}

/// How many tensors are stored in which way.
fn methods(manifest: &Manifest) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for tensor in manifest.tensors.values() {
        let method = match &tensor.storage {
            Storage::Unchanged => "the base's".to_owned(),
            Storage::Exact { .. } => "themselves".to_owned(),
            Storage::Codec { codec, .. } => {
                let codec = &manifest.codecs[*codec];
                let options = serde_json::to_string(&codec.options).unwrap_or_default();
                format!("`{}` {options}", codec.name)
            }
            Storage::Path { path, .. } => format!("sums over {} nodes", path.len()),
        };
        *counts.entry(method).or_insert(0) += 1;
    }
    counts
}
