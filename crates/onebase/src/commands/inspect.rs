use std::collections::BTreeMap;

use onebase_codec::CodecSpec;
use onebase_format::archive::Archive;
use onebase_format::artifact::{Artifact, CodecRecord, Manifest, Sizes, Storage};
use onebase_format::family::Family;
use onebase_model::quantized::QUANTIZED_FILE;
use serde_json::json;

use crate::args::InspectArgs;
use crate::commands::eval::{figures, skill};
use crate::commands::{archive, family, quantize};
use crate::output::{Output, bytes, table};

pub(crate) fn run(args: &InspectArgs, output: &Output) -> anyhow::Result<()> {
    if Archive::is_at(&args.artifact) {
        return archive::inspect(&args.artifact, output);
    }
    if Family::is_at(&args.artifact) {
        return family::inspect(&args.artifact, output);
    }
    if args.artifact.join(QUANTIZED_FILE).is_file() {
        return quantize::inspect(&args.artifact, output);
    }
    let artifact = Artifact::open(&args.artifact)?;
    let (manifest, sizes) = (artifact.manifest(), artifact.sizes());
    let mut object = json!({
        "artifact": args.artifact,
        "format_version": manifest.version,
        "tool": manifest.tool,
        "fine_tune": manifest.fine_tune,
        "base": manifest.base,
        "bytes": sizes.total_bytes,
        "linear_bytes": sizes.linear_bytes,
        "n_weights": sizes.n_weights_total,
        "n_weights_linear": sizes.n_weights_linear,
        "effective_bpw_linear": sizes.effective_bpw_linear(),
        "effective_bpw_total": sizes.effective_bpw_total(),
        "codecs": manifest.codecs,
        "files": manifest.files,
        "calibration": manifest.calibration,
        "quality": manifest.quality,
    });
    if args.tensors {
        object["tensors"] = serde_json::to_value(&manifest.tensors)?;
    }
    output.result(&object, || {
        let mut text =
            table(&["delta", &manifest.fine_tune], 2, summary_rows(manifest, &sizes)).to_string();
        if args.tensors {
            text.push('\n');
            text.push_str(&tensor_table(manifest));
        }
        text
    })
}

/// What people ask of an artifact first.
pub(crate) fn summary_rows(manifest: &Manifest, sizes: &Sizes) -> Vec<Vec<String>> {
    let digest = manifest.base.blake3.to_string();
    let mut rows = vec![
        ["base".to_owned(), format!("{} ({}…)", manifest.base.name, &digest[..12])],
        [
            "size on disk".to_owned(),
            format!("{} ({} B)", bytes(sizes.total_bytes), sizes.total_bytes),
        ],
        [
            "effective bits per weight".to_owned(),
            format!(
                "{:.3} linear sites, {:.3} whole fine-tune",
                sizes.effective_bpw_linear(),
                sizes.effective_bpw_total()
            ),
        ],
    ];
    let mut stored: BTreeMap<String, usize> = BTreeMap::new();
    for tensor in manifest.tensors.values() {
        let role = format!("{:?}", tensor.role).to_lowercase();
        let how = stored_as(manifest, &tensor.storage);
        *stored.entry(format!("{role}, {how}")).or_insert(0) += 1;
    }
    rows.extend(stored.into_iter().map(|(what, n)| [what, format!("{n} tensors")]));
    if let Some(statistics) = &manifest.calibration {
        rows.push(["statistics".to_owned(), statistics.to_string()]);
    }
    let mut rows: Vec<Vec<String>> = rows.into_iter().map(Vec::from).collect();
    if let Some(quality) = &manifest.quality() {
        for task in &quality.tasks {
            rows.push(vec![
                format!("skill kept, {} ({} questions)", task.name, task.n),
                skill(task),
            ]);
        }
        rows.extend(figures(quality));
    }
    rows
}

fn stored_as(manifest: &Manifest, storage: &Storage) -> String {
    match storage {
        Storage::Unchanged => "unchanged".to_owned(),
        Storage::Exact { .. } => "exact".to_owned(),
        Storage::Codec { codec, added_rows, .. } => {
            let mut text = describe(&manifest.codecs[*codec]);
            if *added_rows > 0 {
                text.push_str(&format!(" + {added_rows} exact rows"));
            }
            text
        }
        Storage::Path { path, .. } => format!("sum over {} nodes", path.len()),
    }
}

/// A codec as it is written on the command line; its name alone where this
/// program does not know it.
fn describe(codec: &CodecRecord) -> String {
    let spec = CodecSpec::from_record(&codec.name, codec.version, &codec.options);
    spec.map_or_else(|_| codec.name.clone(), |spec| spec.short())
}

fn tensor_table(manifest: &Manifest) -> String {
    let rows = manifest
        .tensors
        .iter()
        .map(|(name, tensor)| {
            let shape: Vec<String> = tensor.shape.iter().map(usize::to_string).collect();
            let how = stored_as(manifest, &tensor.storage);
            vec![name.clone(), how, tensor.dtype.clone(), shape.join("×")]
        })
        .collect();
    table(&["tensor", "stored", "type", "shape"], 3, rows).to_string()
}
