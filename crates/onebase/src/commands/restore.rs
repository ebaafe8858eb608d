use onebase_compress::restore;
use onebase_format::Checkpoint;
use onebase_format::artifact::Artifact;
use serde_json::json;

use crate::args::RestoreArgs;
use crate::commands::archive;
use crate::output::{Bar, Output, bytes};

pub(crate) fn run(args: &RestoreArgs, output: &Output) -> anyhow::Result<()> {
    if args.exact {
        return archive::restore(args, output);
    }
    let base = Checkpoint::open(&args.base)?;
    let artifact = Artifact::open(&args.artifact)?;
    let bar = Bar::new("restoring");
    restore(&base, &artifact, &args.out, &bar)?;
    bar.finish();
    let size = Checkpoint::open(&args.out)?.size_bytes();
    let object = json!({ "checkpoint": args.out, "bytes": size });
    output.result(&object, || {
        let name = &artifact.manifest().fine_tune;
        format!("restored {name} to {}, {} of weights", args.out.display(), bytes(size))
    })
}
