use std::time::Instant;

use onebase_compress::{Pair, Plan, TablePlan, compress};
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
    let tables = args.embeddings.clone().unwrap_or_else(|| TablePlan::Codec(args.codec.clone()));
    let plan = Plan { linear: args.codec.clone(), tables };
    let bar = Bar::new("compressing");
    let (manifest, sizes) = compress(&pair, &plan, &args.out, &bar)?;
    bar.finish();
    let seconds = start.elapsed().as_secs_f64();
    let original = pair.fine_tune().size_bytes();
    let object = json!({
        "artifact": args.out,
        "bytes": sizes.total_bytes,
        "fine_tune_bytes": original,
        "effective_bpw_linear": sizes.effective_bpw_linear(),
        "effective_bpw_total": sizes.effective_bpw_total(),
        "codecs": manifest.codecs,
        "seconds": seconds,
        "peak_memory_bytes": peak_memory_bytes(),
    });
    output.result(&object, || {
        let mut rows = vec![vec!["artifact".to_owned(), args.out.display().to_string()]];
        rows.extend(summary_rows(&manifest, &sizes));
        rows.push(vec![
            "time".to_owned(),
            #[allow(
                clippy::cast_precision_loss,
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss
            )]
            {
                let rate = (2.0 * original as f64 / seconds) as u64;
                format!("{seconds:.1} s, {} of checkpoints per second", bytes(rate))
            },
        ]);
        table(&["compressed", &manifest.fine_tune], 2, rows).to_string()
    })
}
