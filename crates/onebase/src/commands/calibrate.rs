use std::path::Path;
use std::time::Instant;

use onebase_compress::{Progress, calibrate, generated_tokens, random_tokens};
use onebase_eval::{TextFile, Watcher as _};
use onebase_format::statistics::{Source, StatisticsManifest};
use onebase_format::{Checkpoint, Error};
use onebase_model::{Model, TextModel};
use serde_json::json;

use crate::args::{CalibrateArgs, TokensArgs};
use crate::output::{Output, Stages, bytes, table};

pub(crate) fn run(args: &CalibrateArgs, output: &Output) -> anyhow::Result<()> {
    let start = Instant::now();
    // Before the work whose result it is for.
    if args.out.symlink_metadata().is_ok() {
        return Err(Error::Exists { path: args.out.clone() }.into());
    }
    let model = Model::load(Checkpoint::open(&args.model)?)?;
    let (tokens, source) = tokens(args, &model)?;
    let bar = Tokens { stages: Stages::new(), what: "calibrating" };
    let written = calibrate(&model, &tokens, source, args.window, &args.out, &bar)?;
    bar.stages.finish();
    let widest = written.inputs.values().map(|input| input.in_features).max().unwrap_or(0);
    warn_of_few_tokens(written.n_tokens, widest);
    say(&args.out, &written, widest, start.elapsed().as_secs_f64(), output)
}

/// Says so where tokens are fewer than the input features of the widest site.
pub(crate) fn warn_of_few_tokens(n_tokens: usize, widest: usize) {
    if n_tokens < widest {
        Output::note(&format!(
            "warning: {n_tokens} tokens are fewer than the {widest} input features of the widest \
             site: most of its moment is unknown; give more tokens"
        ));
    }
}

/// The tokens to run, and where they are from.
fn tokens(args: &CalibrateArgs, model: &Model) -> anyhow::Result<(Vec<u32>, Source)> {
    let seed = args.seed;
    Ok(match &args.source {
        TokensArgs { text: Some(path), .. } => {
            let text = TextFile::read(path)?;
            let tokenizer = TextModel::from_checkpoint(model.checkpoint())?.tokenizer;
            let mut tokens = tokenizer.encode(&text.text, true)?;
            tokens.truncate(args.tokens);
            (tokens, Source::Text { name: text.name, blake3: text.digest })
        }
        TokensArgs { generate: Some(n), .. } => {
            let bar = Tokens { stages: Stages::new(), what: "generating" };
            let tokens = generated_tokens(model, *n, args.window, seed, &bar)?;
            (tokens, Source::Generated { seed })
        }
        TokensArgs { random, .. } => {
            (random_tokens(model, random.unwrap_or_default(), seed), Source::Random { seed })
        }
    })
}

/// Tokens that are run, as a bar.
struct Tokens {
    stages: Stages,
    what: &'static str,
}

impl Progress for Tokens {
    fn begin(&self, total: u64) {
        self.stages.begin(self.what, total);
    }

    fn resumed(&self, _: usize) {}

    fn tensor(&self, _: &str) {}

    fn advance(&self, tokens: u64) {
        self.stages.advance(tokens);
    }

    fn warn(&self, message: &str) {
        Output::note(&format!("warning: {message}"));
    }
}

fn say(
    out: &Path,
    written: &StatisticsManifest,
    widest: usize,
    seconds: f64,
    output: &Output,
) -> anyhow::Result<()> {
    let n_bytes: u64 = written.files.values().map(|file| file.bytes).sum();
    let object = json!({
        "statistics": out,
        "tool": written.tool,
        "model": written.model,
        "source": written.source,
        "n_tokens": written.n_tokens,
        "window_tokens": written.window_tokens,
        "n_inputs": written.inputs.len(),
        "widest_in_features": widest,
        "bytes": n_bytes,
        "seconds": seconds,
    });
    output.result(&object, || {
        let digest = written.model.blake3.to_string();
        let rows = [
            ("statistics", out.display().to_string()),
            ("model", format!("{} ({}…)", written.model.name, &digest[..12])),
            ("tokens", format!("{}, {} at a time", written.n_tokens, written.window_tokens)),
            ("inputs", format!("{}, at most {widest} features", written.inputs.len())),
            ("size on disk", bytes(n_bytes)),
            ("time", format!("{seconds:.1} s")),
        ];
        let rows = rows.into_iter().map(|(name, value)| vec![name.to_owned(), value]).collect();
        table(&["calibrated on", &written.source.to_string()], 2, rows).to_string()
    })
}
