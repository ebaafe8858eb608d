use std::path::Path;

use anyhow::{Context as _, bail};
use onebase_codec::CODECS;
use onebase_eval::{Comparison, Input, Plan, TextFile, Variant, compare};
use onebase_format::artifact::TaskQuality;
use onebase_format::write_file;

use crate::args::CompareArgs;
use crate::commands::eval::skill;
use crate::output::{Output, Stages, bytes, number, table};

pub(crate) fn run(args: &CompareArgs, output: &Output) -> anyhow::Result<()> {
    let data_path = args.out.with_extension("json");
    if data_path == args.out {
        bail!("{}: the report is HTML, its data goes beside it as .json", args.out.display());
    }
    let codecs = if args.codecs.is_empty() {
        CODECS.iter().map(|codec| codec.name().to_owned()).collect()
    } else {
        split_codecs(&args.codecs)
    };
    let plan = Plan::new(&codecs, &args.bits, args.embeddings.clone())?;
    let plan = if args.no_ideal { plan.without_ideal() } else { plan };
    let input = Input {
        base: &args.base,
        finetune: &args.fine_tune,
        tests: args.measure.tests()?,
        calibration: args.measure.calibration.as_deref().map(TextFile::read).transpose()?,
    };
    let temporary = tempfile::tempdir().context("cannot make a temporary folder")?;
    let folder = match &args.keep {
        Some(folder) => {
            std::fs::create_dir_all(folder)
                .with_context(|| format!("cannot create {}", folder.display()))?;
            folder.as_path()
        }
        None => temporary.path(),
    };
    // Hours later would be late to learn that the report cannot be written.
    check_writable(&args.out)?;
    let stages = Stages::new();
    let comparison = compare(input, &plan, folder, &stages)?;
    stages.finish();
    write_file(&args.out, comparison.html()?.as_bytes())?;
    let json = serde_json::to_string_pretty(&comparison)?;
    write_file(&data_path, format!("{json}\n").as_bytes())?;
    output.result(&comparison, || {
        let mut text = summary(&comparison);
        for note in &comparison.notes {
            text.push_str(&format!("\nnote: {note}"));
        }
        text.push_str(&format!(
            "\n{:.0} s; the report is {}, its data {}",
            comparison.seconds,
            args.out.display(),
            data_path.display()
        ));
        text
    })
}

/// Codecs of some lists: commas stand between codecs and between the options of
/// one, and only an option has an equals sign and no name before it.
fn split_codecs(lists: &[String]) -> Vec<String> {
    let mut codecs: Vec<String> = Vec::new();
    for list in lists {
        for (index, piece) in list.split(',').enumerate() {
            let is_option = index > 0 && piece.contains('=') && !piece.contains(':');
            match codecs.last_mut() {
                Some(codec) if is_option => {
                    codec.push(',');
                    codec.push_str(piece);
                }
                _ => codecs.push(piece.to_owned()),
            }
        }
    }
    codecs
}

fn check_writable(path: &Path) -> anyhow::Result<()> {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    if !parent.is_dir() {
        bail!("{}: the folder {} does not exist", path.display(), parent.display());
    }
    Ok(())
}

fn summary(comparison: &Comparison) -> String {
    let mut header: Vec<String> =
        ["codec", "on disk", "bits linear", "in all", "claimed", "true"].map(String::from).into();
    header.extend(comparison.tasks.iter().map(|t| format!("{}: skill kept", t.name)));
    header.extend(["KL, nats", "error", "above the limit"].map(String::from));
    let rows = comparison.variants.iter().map(row).collect();
    let header: Vec<&str> = header.iter().map(String::as_str).collect();
    table(&header, 1, rows).to_string()
}

fn row(variant: &Variant) -> Vec<String> {
    let optional = |value: Option<f64>| value.map_or_else(|| "–".to_owned(), number);
    let ratio = |value: Option<f64>| value.map_or_else(|| "–".to_owned(), |r| format!("{r:.2}x"));
    let mut cells = vec![
        variant.codec.clone(),
        bytes(variant.bytes),
        format!("{:.3}", variant.effective_bpw_linear),
        format!("{:.3}", variant.effective_bpw_total),
        ratio(variant.claimed_ratio),
        ratio(variant.true_ratio),
    ];
    cells.extend(variant.tasks.iter().map(|task: &TaskQuality| skill(task)));
    cells.push(optional(variant.kl_mean));
    cells.push(number(variant.error.weight));
    let above = variant.above_limit.weight;
    cells.push(above.map_or_else(|| "–".to_owned(), |bits| format!("{bits:.2} bits")));
    cells
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commas_between_codecs_and_between_options() {
        let split = |lists: &[&str]| {
            split_codecs(&lists.iter().map(|l| (*l).to_owned()).collect::<Vec<_>>())
        };
        let two = ["rtn:bits=2,group_size=64", "sign"];
        assert_eq!(split(&["rtn:bits=2,group_size=64,sign"]), two);
        assert_eq!(split(&two), two);
        assert_eq!(split(&["rtn,sign:scale=row,dense"]), ["rtn", "sign:scale=row", "dense"]);
    }
}
