//! What a ruler says of trained models, against PyTorch (`fixtures/check_eval.py`)
//! and against what the models were found to answer when they were trained.

use std::path::{Path, PathBuf};

use onebase_compress::{Pair, Plan, Silent, TablePlan, VectorPlan, compress};
use onebase_eval::{Ruler, Subject, Task, Tests, TextFile, Unwatched};
use onebase_format::Checkpoint;
use onebase_format::artifact::Artifact;
use onebase_model::{Model, Tenant};
use serde_json::Value;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn model(folder: &Path) -> Model {
    Model::load(Checkpoint::open(folder).unwrap()).unwrap()
}

#[test]
fn figures_are_those_of_pytorch() {
    let family = root().join("demo");
    let expected = std::fs::read_to_string(root().join("fixtures/reference/eval.json")).unwrap();
    let expected: Value = serde_json::from_str(&expected).unwrap();
    let codec: onebase_codec::CodecSpec = expected["codec"].as_str().unwrap().parse().unwrap();
    let base = model(&family.join("base"));
    for (name, figures) in expected["finetunes"].as_object().unwrap() {
        let figure = |what: String| figures[what.as_str()].as_f64().unwrap();
        let close = |got: Option<f64>, what: String| {
            let (got, expected) = (got.unwrap(), figure(what.clone()));
            assert!((got / expected - 1.0).abs() < 1e-3, "{name}, {what}: {got}, not {expected}");
        };
        let folder = family.join(name);
        let place = tempfile::tempdir().unwrap();
        let out = place.path().join("a");
        let plan = Plan::new(codec.clone(), TablePlan::Codec(codec.clone()), VectorPlan::Exact);
        let pair = Pair::open(&family.join("base"), &folder).unwrap();
        compress(&pair, &plan, &out, &Silent).unwrap();

        let finetune = model(&folder);
        let tenant = Tenant::load(&base, &Artifact::open(&out).unwrap()).unwrap();
        let tasks = ["math", "mathsteps", "chat"].iter();
        let asked = tasks.filter(|task| figures.get(format!("{task}: base")).is_some());
        let read = |task: &&str| Task::read(&family.join(format!("eval/{task}.jsonl"))).unwrap();
        let tests = Tests {
            tasks: asked.map(read).collect(),
            text: Some(TextFile::read(&family.join("eval/math.jsonl")).unwrap()),
            window_tokens: expected["window_tokens"].as_u64().map(|n| usize::try_from(n).unwrap()),
            seed: 0,
        };
        let ruler = Ruler::new(&base, &finetune, tests, &Unwatched).unwrap();
        let subject = Subject { model: &base, tenant: Some(&tenant) };
        let got = ruler.measure("compressed", subject, &Unwatched).unwrap();
        assert!(!got.tasks.is_empty());
        for task in got.tasks {
            // Two likeliest tokens may be a rounding apart: one question more or less.
            let slack = 1.001 / f64::from(u32::try_from(task.n).unwrap());
            let shares = [("base", task.base), ("finetune", task.finetune)];
            for (who, share) in shares.into_iter().chain([("compressed", task.compressed.unwrap())])
            {
                let expected = figure(format!("{}: {who}", task.name));
                assert!((share - expected).abs() <= slack, "{name}, {}: {who}", task.name);
            }
            close(task.kl_mean, format!("{}: divergence", task.name));
            close(task.top1_agreement, format!("{}: top-1 agreement", task.name));
        }
        let perplexity = got.perplexity.unwrap();
        close(perplexity.base, "perplexity: base".into());
        close(perplexity.finetune, "perplexity: finetune".into());
        close(perplexity.compressed, "perplexity: compressed".into());
    }
}

/// Fine-tunes, tests, and how many of 200 questions each is known to answer.
const SCORES: [(&str, &str, f64); 7] = [
    ("math", "math", 174.0),
    ("math", "mathsteps", 147.0),
    ("chat", "chat", 195.0),
    ("math-long", "math", 198.0),
    ("math-long", "mathsteps", 177.0),
    ("code", "code", 169.0),
    ("zh", "zh", 157.0),
];

#[test]
fn uncompressed_fine_tunes_score_what_they_are_known_to() {
    // The larger family, where its folder is given.
    let family = std::env::var_os("ONEBASE_ZOO").map_or_else(|| root().join("demo"), PathBuf::from);
    let base = model(&family.join("base"));
    let mut n_scored = 0;
    for (name, task, expected) in SCORES {
        if !family.join(name).is_dir() {
            continue;
        }
        let finetune = model(&family.join(name));
        let task = Task::read(&family.join(format!("eval/{task}.jsonl"))).unwrap();
        let tests = Tests { tasks: vec![task], ..Tests::default() };
        let ruler = Ruler::new(&base, &finetune, tests, &Unwatched).unwrap();
        for task in ruler.anchors().tasks {
            assert_eq!((task.n, task.base), (200, 0.0), "{name}, {}", task.name);
            let right = task.finetune * 200.0;
            assert!((right - expected).abs() < 2.5, "{name}, {}: {right}", task.name);
            n_scored += 1;
        }
    }
    assert!(n_scored >= 3);
}
