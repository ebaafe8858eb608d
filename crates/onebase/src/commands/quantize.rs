use std::path::Path;
use std::time::Instant;

use anyhow::bail;
use onebase_compress::{
    Progress, QuantizeOptions, QuantizeText, Quantized, Rounding, linear_bits, quantize,
    random_tokens,
};
use onebase_eval::{TextFile, Watcher as _};
use onebase_format::Checkpoint;
use onebase_format::artifact::CalibrationRecord;
use onebase_model::quantized::{Method, QuantizedRecord};
use onebase_model::{KvCache, Model, ModelConfig, TextModel};
use serde_json::json;

use crate::args::{Bits, QuantizeArgs, QuantizeMethod, QuantizeRounding};
use crate::commands::compress::peak_memory_bytes;
use crate::output::{Output, Stages, bytes, number, table};

pub(crate) fn run(args: &QuantizeArgs, output: &Output) -> anyhow::Result<()> {
    let start = Instant::now();
    if args.weights == Bits::Sixteen || args.embeddings == Bits::Four {
        bail!("--weights is 4 or 8, --embeddings 8 or 16");
    }
    let options = options(args);
    let text = tokens(args)?;
    if text.is_none() {
        if options.method == Method::Resq {
            bail!("--method resq needs a text: --text FILE; --method quarot needs none");
        }
        if options.rounding == Rounding::Gptq {
            bail!("--rounding gptq needs a text: --text FILE");
        }
    }
    let bar = Steps(Stages::new());
    let written = quantize(&args.base, &options, text.as_ref(), &args.out, &bar)?;
    bar.0.finish();
    for n in &written.random_sizes {
        Output::note(&format!(
            "note: no Hadamard matrix of {n} is known here; an orthogonal one at random is in its \
             place"
        ));
    }
    say(args, &options, &written, start.elapsed().as_secs_f64(), output)
}

/// The tokens that rotations and rounding follow.
fn tokens(args: &QuantizeArgs) -> anyhow::Result<Option<QuantizeText>> {
    let window_tokens = args.window;
    if let Some(n) = args.random {
        let model = Model::load(Checkpoint::open(&args.base)?)?;
        let tokens = random_tokens(&model, n, args.seed);
        return Ok(Some(QuantizeText { record: None, tokens, window_tokens }));
    }
    let Some(path) = &args.text else { return Ok(None) };
    let file = TextFile::read(path)?;
    let tokenizer = TextModel::from_checkpoint(&Checkpoint::open(&args.base)?)?.tokenizer;
    let mut tokens = tokenizer.encode(&file.text, true)?;
    tokens.truncate(args.tokens);
    let (name, blake3, n_tokens) = (file.name, file.digest, tokens.len());
    let record = Some(CalibrationRecord { name, blake3, n_tokens });
    Ok(Some(QuantizeText { record, tokens, window_tokens }))
}

fn options(args: &QuantizeArgs) -> QuantizeOptions {
    let has_tokens = args.text.is_some() || args.random.is_some();
    let rounding = match (args.rounding, has_tokens) {
        (Some(QuantizeRounding::Gptq), _) | (None, true) => Rounding::Gptq,
        (Some(QuantizeRounding::Rtn), _) | (None, false) => Rounding::Nearest,
    };
    QuantizeOptions {
        method: match args.method {
            QuantizeMethod::Resq => Method::Resq,
            QuantizeMethod::Quarot => Method::Quarot,
            QuantizeMethod::Rtn => Method::Rtn,
        },
        weight_bits: args.weights.count(),
        activation_bits: args.activations.count(),
        kv_bits: args.kv.count(),
        table_bits: args.embeddings.count(),
        is_paper: args.paper,
        rounding,
        seed: args.seed,
    }
}

/// The steps of quantizing, as a bar.
struct Steps(Stages);

impl Progress for Steps {
    fn begin(&self, total: u64) {
        self.0.begin("quantizing", total);
    }

    fn resumed(&self, _: usize) {}

    fn tensor(&self, _: &str) {}

    fn advance(&self, done: u64) {
        self.0.advance(done);
    }

    fn warn(&self, message: &str) {
        Output::note(&format!("warning: {message}"));
    }
}

fn say(
    args: &QuantizeArgs,
    options: &QuantizeOptions,
    written: &Quantized,
    seconds: f64,
    output: &Output,
) -> anyhow::Result<()> {
    let before = Checkpoint::open(&args.base)?.size_bytes();
    let object = json!({
        "quantized": args.out,
        "method": options.method,
        "rounding": options.rounding.name(),
        "weight_bits": options.weight_bits,
        "activation_bits": options.activation_bits,
        "kv_bits": options.kv_bits,
        "table_bits": options.table_bits,
        "bytes": written.size_bytes,
        "base_bytes": before,
        "effective_bits_linear": written.linear_bits,
        "rotation_error": written.rotation_error,
        "random_sizes": written.random_sizes,
        "seconds": seconds,
        "peak_memory_bytes": peak_memory_bytes(),
    });
    output.result(&object, || {
        let widths = [options.weight_bits, options.activation_bits, options.kv_bits];
        let mut rows = vec![
            ("quantized base", args.out.display().to_string()),
            ("weights / activations / KV", widths.map(|w| w.to_string()).join(" / ")),
            ("rounding", options.rounding.name().to_owned()),
            ("effective bits per linear weight", number(written.linear_bits)),
            ("size on disk", format!("{} of {}", bytes(written.size_bytes), bytes(before))),
        ];
        if options.method.is_rotated() {
            let error = format!("logits within {:.1e} of the base's", written.rotation_error);
            rows.push(("rotation alone", error));
        }
        rows.push(("time", format!("{seconds:.1} s")));
        let rows = rows.into_iter().map(|(name, value)| vec![name.to_owned(), value]).collect();
        table(&["quantized by", options.method.name()], 2, rows).to_string()
    })
}

/// Shows what a quantized base is.
pub(crate) fn inspect(dir: &Path, output: &Output) -> anyhow::Result<()> {
    let checkpoint = Checkpoint::open(dir)?;
    let config = ModelConfig::from_json(checkpoint.config(), checkpoint.dir())?;
    let record = QuantizedRecord::read(&checkpoint)?;
    let Some(quantization) = config.quantization else {
        bail!("{}: config.json does not say how the base is quantized", dir.display())
    };
    let (linear_bits, kv_bytes) = (linear_bits(&config), KvCache::bytes_per_token(&config));
    let object = json!({
        "quantized": dir,
        "tool": record.tool,
        "base": record.base,
        "quantization": quantization,
        "rounding": record.rounding,
        "seed": record.seed,
        "calibration": record.calibration,
        "bytes": checkpoint.size_bytes(),
        "effective_bits_linear": linear_bits,
        "kv_bytes_per_token": kv_bytes,
    });
    output.result(&object, || {
        let q = &quantization;
        let digest = record.base.blake3.to_string();
        let high = |n: usize, of: usize| format!("{n} of {of}");
        let text = record.calibration.as_ref().map_or_else(
            || "none".to_owned(),
            |text| format!("{}, {} tokens", text.name, text.n_tokens),
        );
        let widths = [q.weight_bits, q.activation_bits, q.kv_bits].map(|w| w.to_string());
        let rows = [
            ("base", format!("{} ({}…)", record.base.name, &digest[..12])),
            ("weights / activations / KV", widths.join(" / ")),
            ("in 8 bits, of the hidden size", high(q.high_hidden, config.hidden_size)),
            ("in 8 bits, of a head", high(q.high_head, config.head_dim)),
            ("embedding and head", format!("{} bits", q.table_bits)),
            ("rounding", record.rounding.clone()),
            ("text", text),
            ("effective bits per linear weight", number(linear_bits)),
            ("tensors", bytes(checkpoint.size_bytes())),
            ("keys and values of a token", bytes(kv_bytes as u64)),
        ];
        let rows = rows.into_iter().map(|(name, value)| vec![name.to_owned(), value]).collect();
        table(&["quantized by", q.method.name()], 2, rows).to_string()
    })
}
