use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, bail};
use onebase_codec::{CODECS, CodecSpec};
use onebase_compress::{Pair, Plan, TablePlan, VectorPlan, compress};
use onebase_eval::{Ruler, Subject, Task, Tests};
use onebase_format::Checkpoint;
use onebase_format::artifact::{Artifact, Sizes};
use onebase_model::{Message, Model, Request, SamplingParams, Tenant, TextModel, generate};
use serde_json::{Value, json};

use crate::args::DemoArgs;
use crate::output::{Bar, Output, Stages, bytes, table};

/// The fine-tunes, each with the test of its skill.
const FINE_TUNES: [&str; 2] = ["math", "chat"];

/// Codecs shown beside each one's defaults.
const VARIANTS: [&str; 2] = ["rtn:bits=2", "sign:scale=matrix"];

/// Asked of the base and of both tenants at once.
const QUESTIONS: [&str; 2] = [
    "Lea has 77 apples and gets 4 more. How many apples does Lea have?",
    "Please spell the word saddle.",
];

struct Row {
    fine_tune: &'static str,
    codec: Option<CodecSpec>,
    bytes: u64,
    sizes: Option<Sizes>,
    right: usize,
    /// Questions that were asked.
    n: usize,
}

pub(crate) fn run(args: &DemoArgs, output: &Output) -> anyhow::Result<()> {
    if !args.dir.join("base").is_dir() {
        bail!(
            "{} has no folder `base`; run the demo in the repository, or give its folder with --dir",
            args.dir.display()
        );
    }
    let start = Instant::now();
    let temporary = tempfile::tempdir().context("cannot make a temporary folder")?;
    let out = args.out.as_deref().unwrap_or(temporary.path());
    std::fs::create_dir_all(out).with_context(|| format!("cannot create {}", out.display()))?;

    let base = args.dir.join("base");
    let model = Model::load(Checkpoint::open(&base)?)?;
    let text = TextModel::from_checkpoint(model.checkpoint())?;
    let mut rows = Vec::new();
    for fine_tune in FINE_TUNES {
        let mut task = Task::read(&args.dir.join("eval").join(format!("{fine_tune}.jsonl")))?;
        task.questions.truncate(args.questions);
        rows.extend(fine_tune_rows(args, &model, fine_tune, task, out)?);
    }
    let answers = ask(&model, &text, out)?;
    let seconds = start.elapsed().as_secs_f64();
    print(&rows, &answers, seconds, output)
}

fn codecs() -> anyhow::Result<Vec<CodecSpec>> {
    let defaults = CODECS.iter().map(|c| c.name());
    let specs = defaults.chain(VARIANTS).map(|text| Ok(text.parse()?));
    specs.collect()
}

fn artifact_dir(out: &Path, fine_tune: &str, codec: &CodecSpec) -> PathBuf {
    let name = codec.to_string().replace([':', ',', '='], "-");
    out.join(format!("{fine_tune}-{name}"))
}

/// The base, the fine-tune itself, then compressed with each codec.
fn fine_tune_rows(
    args: &DemoArgs,
    model: &Model,
    fine_tune: &'static str,
    task: Task,
    out: &Path,
) -> anyhow::Result<Vec<Row>> {
    let base = model.checkpoint().dir();
    let pair = Pair::open(base, &args.dir.join(fine_tune))?;
    let original = Model::load(Checkpoint::open(&args.dir.join(fine_tune))?)?;
    let n = task.questions.len();
    let stages = Stages::new();
    let tests = Tests { tasks: vec![task], ..Tests::default() };
    let ruler = Ruler::new(model, &original, tests, &stages)?;
    let right = |share: f64| {
        #[allow(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss
        )]
        let right = (share * n as f64).round() as usize;
        right
    };
    let mut rows = Vec::new();
    for anchor in ruler.anchors().tasks {
        let bytes = original.checkpoint().size_bytes();
        for (bytes, share) in [(0, anchor.base), (bytes, anchor.finetune)] {
            let right = right(share);
            rows.push(Row { fine_tune, codec: None, bytes, sizes: None, right, n });
        }
    }
    for codec in codecs()? {
        let target = artifact_dir(out, fine_tune, &codec);
        let bar = Bar::new(&format!("{fine_tune}, {codec}"));
        let plan = Plan::new(codec.clone(), TablePlan::Codec(codec.clone()), VectorPlan::Exact);
        let (_, sizes) = compress(&pair, &plan, &target, &bar)?;
        bar.finish();
        let tenant = Tenant::load(model, &Artifact::open(&target)?)?;
        let subject = Subject { model, tenant: Some(&tenant) };
        for task in ruler.measure(&codec.to_string(), subject, &stages)?.tasks {
            let (bytes, right) = (sizes.total_bytes, right(task.compressed.unwrap_or(0.0)));
            let (codec, sizes) = (Some(codec.clone()), Some(sizes));
            rows.push(Row { fine_tune, codec, bytes, sizes, right, n });
        }
    }
    Ok(rows)
}

/// Lets the base and both tenants, each under another codec, answer the same
/// questions in one batch.
fn ask(model: &Model, text: &TextModel, out: &Path) -> anyhow::Result<Vec<Value>> {
    let codecs = codecs()?;
    let tenants = FINE_TUNES
        .iter()
        .zip(codecs.iter().cycle().skip(1))
        .map(|(fine_tune, codec)| {
            let artifact = Artifact::open(&artifact_dir(out, fine_tune, codec))?;
            let name = format!("{fine_tune} ({})", codec.short());
            Ok((name, Tenant::load(model, &artifact)?))
        })
        .collect::<anyhow::Result<Vec<_>>>()?;
    let voices = std::iter::once(("base", None));
    let voices: Vec<_> =
        voices.chain(tenants.iter().map(|(name, tenant)| (name.as_str(), Some(tenant)))).collect();
    let mut requests = Vec::new();
    let mut asked = Vec::new();
    for question in QUESTIONS {
        let message = Message { role: "user".to_owned(), content: question.to_owned() };
        for (name, tenant) in &voices {
            requests.push(Request {
                tenant: *tenant,
                prompt: text.encode_chat(std::slice::from_ref(&message))?,
                max_new_tokens: 24,
                sampling: SamplingParams::GREEDY,
                stop_tokens: &text.stop_tokens,
                stop_texts: &[],
                tokenizer: Some(&text.tokenizer),
            });
            asked.push((question, *name));
        }
    }
    let generation = generate(model, &requests, requests.len(), |_| {})?;
    Ok(asked
        .iter()
        .zip(generation.completions)
        .map(|((question, name), c)| json!({"question": question, "model": name, "text": c.text}))
        .collect())
}

fn print(rows: &[Row], answers: &[Value], seconds: f64, output: &Output) -> anyhow::Result<()> {
    let name = |row: &Row, full: bool| match &row.codec {
        Some(codec) if full => codec.to_string(),
        Some(codec) => codec.short(),
        None if row.bytes == 0 => "(base)".to_owned(),
        None => "(uncompressed)".to_owned(),
    };
    let results: Vec<Value> = rows
        .iter()
        .map(|row| {
            json!({
                "fine_tune": row.fine_tune,
                "codec": name(row, true),
                "bytes": row.bytes,
                "effective_bpw_linear": row.sizes.map(|s| s.effective_bpw_linear()),
                "effective_bpw_total": row.sizes.map(|s| s.effective_bpw_total()),
                "right": row.right,
                "n": row.n,
            })
        })
        .collect();
    let object = json!({ "results": results, "answers": answers, "seconds": seconds });
    output.result(&object, || {
        let lines = rows
            .iter()
            .map(|row| {
                let bits = |bits: Option<f64>| bits.map_or_else(String::new, |b| format!("{b:.2}"));
                vec![
                    row.fine_tune.to_owned(),
                    name(row, false),
                    if row.bytes == 0 { String::new() } else { bytes(row.bytes) },
                    bits(row.sizes.map(|s| s.effective_bpw_linear())),
                    bits(row.sizes.map(|s| s.effective_bpw_total())),
                    row.right.to_string(),
                ]
            })
            .collect();
        let score = format!("right of {}", rows.iter().map(|row| row.n).max().unwrap_or(0));
        let header =
            ["fine-tune", "codec", "on disk", "bits/weight, linear", "in all", score.as_str()];
        let mut text = table(&header, 2, lines).to_string();
        text.push_str("\n\nOne batch over one base, each row with its own delta:\n");
        let mut last = "";
        for answer in answers {
            let field = |name: &str| answer[name].as_str().unwrap_or_default();
            if field("question") != last {
                last = field("question");
                text.push_str(&format!("\n> {last}\n"));
            }
            let answer = field("text").trim().replace('\n', " ⏎ ");
            text.push_str(&format!("  {}: {answer}\n", field("model")));
        }
        text.push_str(&format!("\n{seconds:.1} s\n"));
        text
    })
}
