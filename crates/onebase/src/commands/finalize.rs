use onebase_compress::join;
use serde_json::json;

use crate::args::FinalizeArgs;
use crate::commands::inspect::summary_rows;
use crate::output::{Output, table};

pub(crate) fn run(args: &FinalizeArgs, output: &Output) -> anyhow::Result<()> {
    let (manifest, sizes) = join(&args.artifact)?;
    let object = json!({
        "artifact": args.artifact,
        "bytes": sizes.total_bytes,
        "effective_bpw_linear": sizes.effective_bpw_linear(),
        "effective_bpw_total": sizes.effective_bpw_total(),
        "codecs": manifest.codecs,
    });
    output.result(&object, || {
        let mut rows = vec![vec!["artifact".to_owned(), args.artifact.display().to_string()]];
        rows.extend(summary_rows(&manifest, &sizes));
        table(&["compressed", &manifest.fine_tune], 2, rows).to_string()
    })
}
