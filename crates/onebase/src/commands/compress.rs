use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::bail;
use onebase_compress::{Job, Pair, Plan, TablePlan, compress_part, expected_memory};
use onebase_format::artifact::{Manifest, Shard, Sizes};
use serde_json::json;

use crate::args::CompressArgs;
use crate::commands::inspect::summary_rows;
use crate::output::{Bar, Output, bytes, table};

/// The most resident memory that this process held so far; Linux alone tells.
fn peak_memory_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

pub(crate) fn run(args: &CompressArgs, output: &Output) -> anyhow::Result<()> {
    let start = Instant::now();
    let pair = Pair::open(&args.base, &args.fine_tune)?;
    let codec = &args.codec.spec;
    let plan = Plan {
        linear: codec.clone(),
        tables: args.embeddings.clone().unwrap_or_else(|| TablePlan::Codec(codec.clone())),
        vectors: args.vectors.clone(),
        sites: BTreeMap::new(),
    };
    let plan = match args.budget {
        Some(_) if args.codec.has_size => {
            bail!("{codec} says its size, so that --budget cannot choose it; give one of them")
        }
        Some(budget) => {
            let plan = budget.fit(&pair, &plan, args.embeddings.is_none())?;
            if args.allocate {
                let bar = Bar::new("allocating");
                let allocated = budget.allocate(&pair, &plan, &bar)?;
                bar.finish();
                allocated
            } else {
                plan
            }
        }
        None => plan,
    };
    let expected = expected_memory(&pair, &plan, rayon::current_num_threads())?;
    Output::note(&format!(
        "{}: takes at most {} of memory, for {}",
        plan.linear.short(),
        bytes(expected.bytes),
        expected.tensor
    ));
    let bar = Bar::new("compressing");
    let job = Job { shard: args.shard.unwrap_or(Shard::WHOLE), restart: args.restart };
    let written = compress_part(&pair, &plan, job, &args.out, &bar)?;
    bar.finish();
    let cost = Cost {
        seconds: start.elapsed().as_secs_f64(),
        read_bytes: pair.base().size_bytes() + pair.fine_tune().size_bytes(),
        expected_memory_bytes: expected.bytes,
    };
    match written {
        Some((manifest, sizes)) => artifact(args, &pair, &manifest, &sizes, &cost, output),
        None => shard(args, job.shard, &cost, output),
    }
}

/// What a run took.
struct Cost {
    seconds: f64,
    /// Of both checkpoints, as if read once.
    read_bytes: u64,
    expected_memory_bytes: u64,
}

fn artifact(
    args: &CompressArgs,
    pair: &Pair,
    manifest: &Manifest,
    sizes: &Sizes,
    cost: &Cost,
    output: &Output,
) -> anyhow::Result<()> {
    let object = json!({
        "artifact": args.out,
        "bytes": sizes.total_bytes,
        "fine_tune_bytes": pair.fine_tune().size_bytes(),
        "effective_bpw_linear": sizes.effective_bpw_linear(),
        "effective_bpw_total": sizes.effective_bpw_total(),
        "codecs": manifest.codecs,
        "seconds": cost.seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        "expected_memory_bytes": cost.expected_memory_bytes,
    });
    output.result(&object, || {
        let mut rows = vec![vec!["artifact".to_owned(), args.out.display().to_string()]];
        rows.extend(summary_rows(manifest, sizes));
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
        if let Some(peak) = peak_memory_bytes() {
            rows.push(vec!["peak memory".to_owned(), bytes(peak)]);
        }
        table(&["compressed", &manifest.fine_tune], 2, rows).to_string()
    })
}

fn shard(
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
