use anyhow::bail;
use onebase_compress::verify;
use onebase_format::Checkpoint;
use onebase_format::archive::Archive;
use onebase_format::artifact::Artifact;
use onebase_format::family::Family;
use serde_json::json;

use crate::args::VerifyArgs;
use crate::commands::{archive, family};
use crate::output::{Bar, Output};

pub(crate) fn run(args: &VerifyArgs, output: &Output) -> anyhow::Result<()> {
    if Archive::is_at(&args.artifact) {
        return archive::verify(args, output);
    }
    if let [archive, ..] = args.through.as_slice() {
        let (through, what) = (archive.display(), args.artifact.display());
        bail!("--through {through} leads to an archive, and {what} is none");
    }
    let base = Checkpoint::open(&args.base)?;
    if Family::is_at(&args.artifact) {
        return family::verify(&base, &args.artifact, output);
    }
    let artifact = Artifact::open(&args.artifact)?;
    let bar = Bar::new("verifying");
    let verified = verify(&base, &artifact, &bar)?;
    bar.finish();
    let object = json!({ "verified": true, "artifact": args.artifact, "checked": verified });
    output.result(&object, || {
        format!(
            "{} is whole and belongs to {}: {} files, {} base tensors, {} deltas checked",
            args.artifact.display(),
            args.base.display(),
            verified.n_files,
            verified.n_base_tensors,
            verified.n_deltas
        )
    })
}
