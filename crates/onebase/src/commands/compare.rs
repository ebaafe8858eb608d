use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, bail};
use clap::CommandFactory as _;
use clap::error::ErrorKind;
use onebase_codec::{CODECS, CodecSpec};
use onebase_compress::{Calibration, Pair, TablePlan, check_calibrated};
use onebase_eval::{Comparison, Cost, Input, Plan, TextFile, Variant, compare};
use onebase_format::artifact::TaskQuality;
use onebase_format::write_file;
use serde_json::Value;

use crate::args::{Args, CompareArgs};
use crate::commands::eval::skill;
use crate::commands::scratch_beside;
use crate::output::{Output, Stages, bytes, can_be_written, number, table};

pub(crate) fn run(args: &CompareArgs, output: &Output) -> anyhow::Result<()> {
    let data_path = data_path(&args.out);
    let codecs = if args.codecs.is_empty() {
        CODECS.iter().map(|codec| codec.name().to_owned()).collect()
    } else {
        split_codecs(&args.codecs)
    };
    let plan = match Plan::new(&codecs, &args.bits, args.embeddings.clone()) {
        Ok(plan) if args.no_ideal => plan.without_ideal(),
        Ok(plan) => plan,
        Err(error) => {
            let hint = error.hint().map(|hint| format!("; {hint}")).unwrap_or_default();
            wrong_use(&format!("{error}{hint}"));
        }
    };
    let input = Input {
        base: &args.base,
        finetune: &args.fine_tune,
        tests: args.measure.tests()?,
        calibration: args.measure.calibration.as_deref().map(TextFile::read).transpose()?,
    };
    if let Some(statistics) = &args.statistics {
        check_statistics(args, &plan, statistics)?;
    }
    // Hours later would be late to learn that the report cannot be written.
    check_writable(&args.out, &data_path)?;
    let scratch = scratch_beside(&args.out, "compare")?;
    let folder = match &args.keep {
        Some(folder) => {
            std::fs::create_dir_all(folder)
                .with_context(|| format!("cannot create {}", folder.display()))?;
            folder.as_path()
        }
        None => scratch.path(),
    };
    let stages = Stages::new();
    let compressor = |codec: &CodecSpec, tables: &TablePlan, target: &Path| {
        Ok(compress_apart(args, codec, tables, target)?)
    };
    let comparison = compare(input, &plan, folder, &compressor, &stages)?;
    stages.finish();
    let json = serde_json::to_string_pretty(&comparison)?;
    write_file(&data_path, format!("{json}\n").as_bytes())?;
    write_file(&args.out, comparison.html()?.as_bytes())?;
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

/// Checks that statistics are of the pair and that some codec can use them.
fn check_statistics(args: &CompareArgs, plan: &Plan, statistics: &Path) -> anyhow::Result<()> {
    let refused: Vec<_> = plan.codecs().filter_map(|codec| check_calibrated(codec).err()).collect();
    if refused.len() == plan.codecs().count()
        && let Some(error) = refused.into_iter().next_back()
    {
        return Err(error.into());
    }
    Calibration::open(statistics, &Pair::open(&args.base, &args.fine_tune)?)?;
    Ok(())
}

/// Ends the program as clap does for arguments that it refuses.
fn wrong_use(problem: &str) -> ! {
    Args::command().error(ErrorKind::ValueValidation, problem).exit()
}

/// Where the data of a report goes: its name with another ending.
fn data_path(report: &Path) -> PathBuf {
    let html = ["html", "htm"].map(|ending| report.extension().is_some_and(|e| e == ending));
    if html.contains(&true) {
        return report.with_extension("json");
    }
    if report.extension().is_some_and(|e| e == "json") {
        wrong_use(&format!(
            "{}: the report is HTML, its data goes beside it as .json",
            report.display()
        ));
    }
    let mut name = report.as_os_str().to_owned();
    name.push(".json");
    name.into()
}

/// Checks that both files can be written, and that neither takes the place of
/// something else.
fn check_writable(report: &Path, data: &Path) -> anyhow::Result<()> {
    if data.exists() && !report.exists() {
        bail!(
            "{} is there and no report beside it: it would be overwritten; choose another --out",
            data.display()
        );
    }
    can_be_written(report)?;
    can_be_written(data)
}

/// Compresses in a process of its own, whose time and memory are those of
/// compression.
fn compress_apart(
    args: &CompareArgs,
    codec: &CodecSpec,
    tables: &TablePlan,
    target: &Path,
) -> anyhow::Result<Cost> {
    let program = std::env::current_exe().context("cannot find this program")?;
    let statistics = args.statistics.iter().filter(|_| codec.calibrated().is_some());
    let run = Command::new(program)
        .args(["compress", "--json", "--threads", &rayon::current_num_threads().to_string()])
        .args(["--codec", &codec.to_string(), "--embeddings", &tables.to_string()])
        .arg("--out")
        .arg(target)
        .args(statistics.flat_map(|path| [OsStr::new("--statistics"), path.as_os_str()]))
        // Whatever a folder is called, it is no option.
        .arg("--")
        .args([&args.base, &args.fine_tune])
        .stdin(Stdio::null())
        .output()
        .context("cannot start a process")?;
    if !run.status.success() {
        bail!("{}", String::from_utf8_lossy(&run.stderr).trim().trim_start_matches("error: "));
    }
    let object: Value = serde_json::from_slice(&run.stdout).context("compress --json")?;
    Ok(Cost {
        seconds: object["seconds"].as_f64().unwrap_or_default(),
        peak_memory_bytes: object["peak_memory_bytes"].as_u64(),
    })
}

/// Codecs of some lists: commas stand between codecs and between the options of
/// one, and only an option has an equals sign and no name before it.
fn split_codecs(lists: &[String]) -> Vec<String> {
    let mut codecs: Vec<String> = Vec::new();
    for list in lists {
        let pieces = list.split(',').map(str::trim).filter(|piece| !piece.is_empty());
        for (index, piece) in pieces.enumerate() {
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
        variant.label.clone(),
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
        assert_eq!(split(&["rtn:bits=2, group_size=64,", "sign"]), two);
        assert_eq!(split(&["rtn,sign:scale=row,dense"]), ["rtn", "sign:scale=row", "dense"]);
    }
}
