use std::collections::BTreeMap;
use std::fmt::Write as _;

use onebase_format::artifact::{Manifest, Sizes, Storage};
use onebase_tensor::{DType, effective_bits};

/// The model card of an artifact, with the front matter that model hubs read.
pub(crate) fn model_card(manifest: &Manifest, sizes: &Sizes) -> String {
    let Manifest { fine_tune, base, tool, .. } = manifest;
    let mut text = format!(
        "---\nbase_model: {base}\nlibrary_name: onebase\ntags:\n- onebase\n- delta\n---\n\n\
         # {fine_tune}, as a delta of {base}\n\n\
         Written by {tool}. It is only valid on the exact base whose tensors' digests\n\
         `onebase.json` lists.\n\n\
         | | |\n|---|---|\n",
        base = base.name,
    );
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
    for (method, count) in methods(manifest) {
        row(&format!("tensors stored as {method}"), count.to_string());
    }
    let _ = write!(
        text,
        "\n```\nonebase verify BASE .\nonebase generate BASE --delta {fine_tune}=. -p '…'\n```\n"
    );
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
        };
        *counts.entry(method).or_insert(0) += 1;
    }
    counts
}
