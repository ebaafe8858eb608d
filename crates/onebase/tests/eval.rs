//! `eval` and `compare` as people and programs call them.

// Helpers of tests may panic as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::collections::BTreeMap;
use std::path::Path;

use onebase_codec::CODECS;
use safetensors::SafeTensors;
use serde_json::{Value, json};
use support::{Place, Run, compress_args, contents, copy, demo, onebase};

/// Questions that are asked: enough for a figure, few enough for a test.
const N_QUESTIONS: usize = 12;

fn arg(name: &str) -> String {
    demo(name).to_str().unwrap().to_owned()
}

/// The first questions of a test of the demo.
fn task(place: &Place, name: &str) -> String {
    let text = std::fs::read_to_string(demo("eval").join(format!("{name}.jsonl"))).unwrap();
    let first: Vec<&str> = text.lines().take(N_QUESTIONS).collect();
    write(place, &format!("{name}.jsonl"), &first.join("\n"))
}

fn write(place: &Place, name: &str, text: &str) -> String {
    std::fs::write(place.path(name), text).unwrap();
    place.text(name)
}

/// A few lines of prose.
fn text(place: &Place) -> String {
    let line = "The cat sat on the mat, and the dog looked at the cat for a long time.\n";
    write(place, "prose.txt", &line.repeat(8))
}

/// `eval` of an artifact of `math` with more arguments.
fn eval(artifact: &str, more: &[&str]) -> Run {
    let (base, math) = (arg("base"), arg("math"));
    let args = ["eval", &base, artifact, "--reference", &math];
    onebase(args.iter().chain(more))
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("expected a number, got {value}"))
}

#[test]
fn an_artifact_is_measured_beside_its_base_and_its_fine_tune() {
    let place = Place::new();
    place.compress("math", "rtn:bits=3", "a");
    let (out, math, prose) = (place.text("a"), task(&place, "math"), text(&place));
    let args = ["--tasks", &math, "--text", &prose, "--calibration", &prose, "--json"];
    let got = eval(&out, &args).exits(0).object();

    let tasks = got["tasks"].as_array().unwrap();
    assert_eq!(tasks.len(), 1);
    let [b, f, c] = ["base", "finetune", "compressed"].map(|who| number(&tasks[0][who]));
    assert_eq!((&tasks[0]["name"], &tasks[0]["n"]), (&json!("math"), &json!(N_QUESTIONS)));
    assert!(b < f, "the skill comes with the fine-tune: {got}");
    assert!((number(&tasks[0]["skill_kept"]) - (c - b) / (f - b)).abs() < 1e-12);
    let [low, high] = [0, 1].map(|i| number(&tasks[0]["skill_kept_ci"][i]));
    assert!(low <= number(&tasks[0]["skill_kept"]) && number(&tasks[0]["skill_kept"]) <= high);

    assert_eq!(got["kl_mean"], tasks[0]["kl_mean"]);
    assert!(number(&got["kl_mean"]) > 0.0 && number(&got["kl_mean"]) < 0.1, "{got}");
    assert!(number(&got["top1_agreement"]) > 0.8, "{got}");
    let perplexity = &got["perplexity"];
    for who in ["base", "finetune", "compressed"] {
        assert!(number(&perplexity[who]) > 1.0, "{perplexity}");
    }
    // Errors of all sites lie around that of their sum.
    let sites = got["sites"].as_array().unwrap();
    assert_eq!(sites.len(), 42);
    for space in ["weight", "output"] {
        let errors: Vec<f64> = sites.iter().map(|site| number(&site[space])).collect();
        let total = number(&got["error"][space]);
        assert!(errors.iter().any(|e| *e < total) && errors.iter().any(|e| *e > total));
        assert!(total > 0.0 && total < 0.1, "{space}: {total}");
    }
    // Three bits of a Gaussian leave about 0.04.
    assert!((0.02..0.05).contains(&number(&got["error"]["weight"])));
    let on_disk: usize = contents(&place.path("a")).values().map(Vec::len).sum();
    assert_eq!(got["bytes"], on_disk);
    #[allow(clippy::cast_precision_loss)]
    let bits = 8.0 * on_disk as f64 / 5_246_208.0;
    assert_eq!(number(&got["effective_bpw_total"]), bits);
    for who in ["base", "finetune", "compressed"] {
        for key in ["prefill_tokens", "prefill_seconds", "decode_tokens", "decode_seconds"] {
            assert!(number(&got["speed"][who][key]) > 0.0, "{who} {key}");
        }
    }
    assert_eq!(got["calibration"]["name"], "prose.txt");
    assert_eq!((&got["notes"], &got["recorded"]), (&json!([]), &json!(false)));

    // The same again, but for the time.
    let again = eval(&out, &args).exits(0).object();
    for key in ["tasks", "kl_mean", "top1_agreement", "perplexity", "error", "sites"] {
        assert_eq!(got[key], again[key], "{key}");
    }
    // Another seed moves the interval alone.
    let other = eval(&out, &[&args[..], &["--seed", "1"]].concat()).exits(0).object();
    assert_eq!(other["tasks"][0]["skill_kept"], tasks[0]["skill_kept"]);
    assert_eq!(other["kl_mean"], got["kl_mean"]);

    let run = eval(&out, &["--tasks", &math, "--sites"]).exits(0);
    for text in ["skill kept", "effective bits per weight", "tokens/s", "layers.5.mlp.down_proj"] {
        assert!(run.stdout.contains(text), "{text}: {}", run.stdout);
    }
}

#[test]
fn an_exact_delta_keeps_everything() {
    let place = Place::new();
    place.compress("math", "dense", "a");
    let math = task(&place, "math");
    let got = eval(&place.text("a"), &["--tasks", &math, "--json"]).exits(0).object();
    assert_eq!(got["tasks"][0]["skill_kept"], json!(1.0));
    // A dozen questions cannot tell that nothing at all is lost.
    assert!(number(&got["tasks"][0]["skill_kept_ci"][0]) < 0.99);
    assert_eq!(got["top1_agreement"], json!(1.0));
    assert!(number(&got["kl_mean"]) < 1e-9, "{got}");
    assert_eq!((&got["perplexity"], &got["error"]["output"]), (&Value::Null, &Value::Null));
}

#[test]
fn without_an_artifact_the_anchors_are_measured() {
    let place = Place::new();
    let (base, math, questions) = (arg("base"), arg("math"), task(&place, "math"));
    let args = ["eval", &base, "--reference", &math, "--tasks", &questions, "--json"];
    let got = onebase(args).exits(0).object();
    assert!(number(&got["tasks"][0]["finetune"]) > 0.5);
    for key in ["bytes", "kl_mean", "effective_bpw_total", "artifact", "error"] {
        assert_eq!(got[key], Value::Null, "{key}");
    }
    assert_eq!(got["tasks"][0]["compressed"], Value::Null);
}

#[test]
fn a_text_alone_gives_perplexity_and_divergence() {
    let place = Place::new();
    place.compress("math", "rtn", "a");
    let prose = text(&place);
    let whole = eval(&place.text("a"), &["--text", &prose, "--json"]).exits(0).object();
    assert!(number(&whole["kl_mean"]) > 0.0);
    assert_eq!(whole["tasks"], json!([]));
    let args = ["--text", &prose, "--window", "16", "--json"];
    let pieces = eval(&place.text("a"), &args).exits(0).object();
    let n = |got: &Value| got["perplexity"]["n_tokens"].as_u64().unwrap();
    assert!(n(&pieces) < n(&whole), "the first token of each window is not predicted");
    let p = |got: &Value| number(&got["perplexity"]["base"]);
    assert!(p(&pieces) > p(&whole), "less context predicts worse");
}

#[test]
fn results_are_recorded_in_the_artifact_and_its_card() {
    let place = Place::new();
    place.compress("math", "rtn", "a");
    let (base, out, math) = (arg("base"), place.text("a"), task(&place, "math"));
    let before = contents(&place.path("a"));
    let edited = String::from_utf8(before["README.md"].clone()).unwrap() + "\nOurs.\n";
    std::fs::write(place.path("a").join("README.md"), edited).unwrap();
    let mut recorded = Vec::new();
    for _ in 0..2 {
        let run = eval(&out, &["--tasks", &math, "--record", "--json"]).exits(0).object();
        let on_disk: usize = contents(&place.path("a")).values().map(Vec::len).sum();
        assert_eq!((&run["bytes"], &run["recorded"]), (&json!(on_disk), &json!(true)));
        recorded.push(contents(&place.path("a")));
    }
    assert_eq!(recorded[0], recorded[1], "a second record replaces the first");
    let after = &recorded[0];
    for (name, bytes) in &before {
        let same = !["README.md", "onebase.json"].contains(&name.as_str());
        assert_eq!(after[name] == *bytes, same, "{name}");
    }
    assert_eq!(after.len(), before.len());
    let card = String::from_utf8(after["README.md"].clone()).unwrap();
    for text in ["Ours.", "| math | 12 | 0.0 % |", "skill kept", "base_model: base"] {
        assert_eq!(card.matches(text).count(), 1, "{text}: {card}");
    }
    let on_disk: usize = after.values().map(Vec::len).sum();
    assert!(card.contains(&format!("| bytes on disk, all files | {on_disk} |")), "{card}");

    let quality = onebase(["inspect", &out, "--json"]).exits(0).object()["quality"].take();
    assert_eq!(quality["tasks"][0]["name"], "math");
    assert_eq!(quality["reference"], "math");
    let shown = onebase(["inspect", &out]).exits(0).stdout;
    assert!(shown.contains("skill kept, math (12 questions)"), "{shown}");
    onebase(["verify", &base, &out]).exits(0);
    let args = ["eval", &base, "--reference", &arg("math"), "--tasks", &math, "--record"];
    onebase(args).exits(2).says(&["ARTIFACT"]);
}

#[test]
fn bad_tests_are_refused_where_they_are() {
    let place = Place::new();
    place.compress("math", "sign", "a");
    let out = place.text("a");
    let good = "{\"prompt\": \"1 + 1 =\", \"answer\": \"2\"}\n";
    let refused = |file: &str, texts: &[&str]| {
        eval(&out, &["--tasks", file]).exits(1).says(texts);
    };
    refused(&write(&place, "empty.jsonl", "\n"), &["empty.jsonl has no question", "hint: "]);
    refused(
        &write(&place, "broken.jsonl", &format!("{good}\n{{\"prompt\": 1")),
        &["broken.jsonl, line 3: ", "hint: a task is JSON lines"],
    );
    let long = format!("{good}{{\"prompt\": \"a\", \"answer\": \"{}\"}}", "a b ".repeat(900));
    refused(
        &write(&place, "long.jsonl", &long),
        &["long.jsonl, line 2: prompt and answer have", "the context holds 1024", "hint: "],
    );
    refused(&place.text("absent.jsonl"), &["cannot read", "absent.jsonl", "because: "]);
    let twice = write(&place, "sums.jsonl", good);
    eval(&out, &["--tasks", &twice, &twice]).exits(1).says(&[
        "two tasks are called",
        "/sums",
        "hint",
    ]);
    eval(&out, &[]).exits(1).says(&["neither a task nor a text is given", "hint: give --tasks"]);
    let blank = write(&place, "blank.txt", " \n");
    eval(&out, &["--text", &blank]).exits(1).says(&["blank.txt has no text"]);
    eval(&out, &["--window", "5"]).exits(2);
    eval(&out, &["--text", &text(&place), "--window", "1"]).exits(2).says(&["from 2 on"]);
    // A token that the tokenizer knows and the weights do not.
    copy(&demo("math"), &place.path("math"));
    let file = place.path("math").join("tokenizer.json");
    let mut tokenizer: Value =
        serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
    let mut token = tokenizer["added_tokens"][0].clone();
    (token["id"], token["content"]) = (json!(2048), json!("<|past|>"));
    tokenizer["added_tokens"].as_array_mut().unwrap().push(token);
    std::fs::write(&file, tokenizer.to_string()).unwrap();
    let (base, math) = (arg("base"), place.text("math"));
    let past = format!("{good}{{\"prompt\": \"a <|past|>\", \"answer\": \"2\"}}");
    let task = write(&place, "past.jsonl", &past);
    let text = write(&place, "past.txt", "a <|past|> b");
    let reference = ["eval", &base, "--reference", &math];
    let run = onebase(reference.iter().chain(&["--tasks", &task])).exits(1);
    run.says(&["past.jsonl, line 2", "because: token 2048 is outside", "hint: the tokenizer"]);
    let run = onebase(reference.iter().chain(&["--text", &text])).exits(1);
    run.says(&["past.txt", "because: token 2048 is outside", "hint: the tokenizer"]);
}

#[test]
fn samples_show_what_was_replied() {
    let place = Place::new();
    place.compress("math", "rtn", "a");
    let (math, samples) = (task(&place, "math"), place.text("samples.jsonl"));
    let args = ["--tasks", &math, "--limit", "3", "--samples", &samples, "--json"];
    let got = eval(&place.text("a"), &args).exits(0).object();
    assert_eq!(got["tasks"][0]["n"], 3);
    let text = std::fs::read_to_string(&samples).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 3);
    assert_eq!((&lines[2]["task"], &lines[2]["line"]), (&json!("math"), &json!(3)));
    for line in &lines {
        let right = line["finetune"].as_str().unwrap().trim() == line["answer"];
        assert_eq!(line["right"][1], json!(right), "{line}");
        assert!(line["base"].is_string() && line["compressed"].is_string());
    }
    // A run that fails leaves those of an earlier one.
    let empty = write(&place, "empty.jsonl", "");
    eval(&place.text("a"), &["--tasks", &empty, "--samples", &samples]).exits(1);
    let long = format!("{{\"prompt\": \"a\", \"answer\": \"{}\"}}", "a b ".repeat(900));
    let long = write(&place, "long.jsonl", &long);
    eval(&place.text("a"), &["--tasks", &long, "--samples", &samples]).exits(1);
    assert_eq!(std::fs::read_to_string(&samples).unwrap(), text);
}

#[test]
fn tasks_of_one_name_are_called_after_their_folders() {
    let place = Place::new();
    for folder in ["one", "two"] {
        std::fs::create_dir(place.path(folder)).unwrap();
        let file = place.path(folder).join("test.jsonl");
        std::fs::write(file, "{\"prompt\": \"1 + 1 =\", \"answer\": \" 2\"}").unwrap();
    }
    let files = ["one/test.jsonl", "two/test.jsonl"].map(|name| place.text(name));
    let (base, math) = (arg("base"), arg("math"));
    let args = ["eval", &base, "--reference", &math, "--json", "--tasks", &files[0], &files[1]];
    let got = onebase(args).exits(0).object();
    let names: Vec<&Value> =
        got["tasks"].as_array().unwrap().iter().map(|task| &task["name"]).collect();
    assert_eq!(names, ["one/test", "two/test"]);
}

#[test]
fn a_record_that_is_not_understood_harms_nothing() {
    let place = Place::new();
    place.compress("math", "rtn", "a");
    let path = place.path("a").join("onebase.json");
    let mut manifest: Value =
        serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    manifest["quality"] = json!({"of": "another version"});
    std::fs::write(&path, manifest.to_string()).unwrap();
    let (base, out) = (arg("base"), place.text("a"));
    onebase(["verify", &base, &out]).exits(0);
    onebase(["inspect", &out]).exits(0);
    let math = task(&place, "math");
    eval(&out, &["--tasks", &math, "--limit", "1", "--record"]).exits(0);
    let got = onebase(["inspect", &out, "--json"]).exits(0).object();
    assert_eq!(got["quality"]["reference"], "math");
}

#[test]
fn a_prompt_is_continued_to_the_end_of_its_line() {
    let place = Place::new();
    // The base goes on for ever; what it says on this line is what it is asked for.
    let base = arg("base");
    let prompt = "use std::collections::";
    let raw = ["generate", &base, "--raw", "-p", prompt, "-n", "24", "--stop", "\n"];
    let answer = onebase(raw).exits(0).stdout.trim().to_owned();
    assert!(!answer.is_empty());
    let line = json!({"prompt": prompt, "answer": answer});
    let file = write(&place, "line.jsonl", &line.to_string());
    let args = ["eval", &base, "--reference", &arg("math"), "--tasks", &file, "--json"];
    let got = onebase(args).exits(0).object();
    assert_eq!(got["tasks"][0]["base"], json!(1.0), "{got}");
}

#[test]
fn an_artifact_of_another_fine_tune_is_refused() {
    let place = Place::new();
    place.compress("chat", "sign", "a");
    let math = task(&place, "math");
    let run = eval(&place.text("a"), &["--tasks", &math]).exits(1);
    run.says(&["was not made from", "model.layers.0.input_layernorm.weight", "--reference"]);
    // Nor is one whose vectors are the base's, as those of a merged adapter are.
    let mut folders = Vec::new();
    for name in ["math", "chat"] {
        copy(&demo(name), &place.path(name));
        keep_vectors(&place.path(name));
        folders.push(place.path(name));
    }
    onebase(compress_args(&folders[0], "rtn", &place.path("b"))).exits(0);
    let (base, chat) = (arg("base"), place.text("chat"));
    let args = ["eval", &base, &place.text("b"), "--reference", &chat, "--tasks", &math];
    // Both have deltas everywhere, so that no tensor tells; the figures do.
    let run = onebase(args.iter().chain(&["--limit", "2"])).exits(0);
    assert!(run.stdout.contains("no nearer to the fine-tune's weights"), "{}", run.stdout);
}

/// Puts the base's norms into a fine-tune of the demo.
fn keep_vectors(folder: &Path) {
    let path = folder.join("model.safetensors");
    let own = std::fs::read(&path).unwrap();
    let base = std::fs::read(demo("base").join("model.safetensors")).unwrap();
    let (own, base) =
        (SafeTensors::deserialize(&own).unwrap(), SafeTensors::deserialize(&base).unwrap());
    let tensors = own.names().into_iter().map(|name| {
        let from = if name.contains("norm") { &base } else { &own };
        (name.to_owned(), from.tensor(name).unwrap())
    });
    let bytes = safetensors::serialize(tensors.collect::<BTreeMap<_, _>>(), None).unwrap();
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn where_there_is_no_skill_none_is_kept() {
    let place = Place::new();
    place.compress("math", "sign", "a");
    let chat = task(&place, "chat");
    let got = eval(&place.text("a"), &["--tasks", &chat, "--json"]).exits(0).object();
    assert_eq!(got["tasks"][0]["skill_kept"], Value::Null);
    assert_eq!(got["tasks"][0]["skill_kept_ci"], Value::Null);
    let note = got["notes"][0].as_str().unwrap();
    assert!(note.contains("no better than the base") && note.contains("undefined"), "{note}");
}

#[test]
fn the_fine_tunes_own_tokenizer_is_used_and_said() {
    let place = Place::new();
    copy(&demo("math"), &place.path("math"));
    let file = place.path("math").join("tokenizer_config.json");
    let config = std::fs::read_to_string(&file).unwrap();
    assert!(config.contains("<|im_start|>user") || config.contains("message"), "{config}");
    std::fs::write(&file, config.replacen('{', "{\"more\": 1,", 1)).unwrap();
    let (base, math, questions) = (arg("base"), place.text("math"), task(&place, "math"));
    let args = ["eval", &base, "--reference", &math, "--tasks", &questions, "--json"];
    let got = onebase(args).exits(0).object();
    let note = got["notes"][0].as_str().unwrap();
    assert!(note.contains("differs from the base's; the fine-tune's"), "{note}");
}

#[test]
fn a_comparison_is_one_page_and_its_data() {
    let place = Place::new();
    let (base, math, questions, prose) =
        (arg("base"), arg("math"), task(&place, "math"), text(&place));
    let (page, kept) = (place.text("r.html"), place.text("kept"));
    let mut args = vec!["compare", &base, &math, "--tasks", &questions, "--text", &prose];
    args.extend(["--calibration", &prose, "--bits", "0.5,2", "-o", &page, "--keep", &kept]);
    args.extend(["--codecs", "rtn:group_size=64,sign:scale=matrix", "dense"]);
    let got = onebase(args.iter().chain(&["--json"])).exits(0).object();
    let note = got["notes"][0].as_str().unwrap();
    assert_eq!(
        note,
        "Not every codec can have every size: no rtn:group_size=64 at 0.5 bits per weight."
    );
    let data = std::fs::read_to_string(place.path("r.json")).unwrap();
    assert_eq!(serde_json::from_str::<Value>(&data).unwrap(), got);

    let variants = got["variants"].as_array().unwrap();
    let codecs: Vec<&str> = variants.iter().map(|v| v["codec"].as_str().unwrap()).collect();
    let expected = [
        "base",
        "rtn:bits=1,group_size=128",
        "rtn:bits=2,group_size=128",
        "rtn:bits=3,group_size=128",
        "rtn:bits=4,group_size=128",
        "sign:scale=row",
        "low-rank:bits=0.5,rank=0,energy=0,svd=full,seed=0",
        "low-rank:bits=2,rank=0,energy=0,svd=full,seed=0",
        "rtn:bits=2,group_size=64",
        "sign:scale=matrix",
        "dense:dtype=f32",
    ];
    assert_eq!(codecs, expected);
    let n_weights = number(&got["n_weights"]);
    for variant in &variants[1..] {
        let codec = variant["codec"].as_str().unwrap();
        let folder = place.path("kept").join(codec.replace([':', ',', '='], "-"));
        let files = contents(&folder);
        let sum = |linear: bool| -> usize {
            let wanted = files.iter().filter(|(name, _)| !linear || name.starts_with("linear-"));
            wanted.map(|(_, bytes)| bytes.len()).sum()
        };
        assert_eq!(variant["bytes"], sum(false), "{codec}");
        assert_eq!(variant["linear_bytes"], sum(true), "{codec}");
        #[allow(clippy::cast_precision_loss)]
        let bits = 8.0 * sum(false) as f64 / n_weights;
        assert_eq!(number(&variant["effective_bpw_total"]), bits, "{codec}");
        // A paper's formula leaves out what the disk holds.
        assert!(number(&variant["claimed_ratio"]) >= number(&variant["true_ratio_linear"]));
        assert_eq!(variant["site_errors"].as_array().unwrap().len(), 42);
        if codec == "dense:dtype=f32" {
            continue;
        }
        for space in ["weight", "output"] {
            assert!(number(&variant["error"][space]) < 1.0, "{codec}");
            assert!(number(&variant["above_limit"][space]) > 0.0, "{codec}");
        }
    }
    // More bits, less error, less divergence.
    let rtn = |key: fn(&Value) -> &Value| -> Vec<f64> {
        variants[1..5].iter().map(|v| number(key(v))).collect()
    };
    assert!(rtn(|v| &v["error"]["weight"]).is_sorted_by(|a, b| a > b));
    assert!(rtn(|v| &v["kl_mean"]).is_sorted_by(|a, b| a > b));
    for line in [&got["limit"]["weight"], &got["limit"]["output"]] {
        let points = line.as_array().unwrap();
        assert!(points.len() > 10);
        assert!(points.is_sorted_by(|a, b| number(&a["error"]) > number(&b["error"])));
    }

    // A code on the limit line is nearer to the fine-tune than any of its size.
    let ideal = got["ideal"].as_array().unwrap();
    assert_eq!(ideal.len(), 2);
    for (point, bits) in ideal.iter().zip([0.5, 2.0]) {
        assert!((number(&point["bpw_linear"]) - bits).abs() < 1e-6);
        assert!(number(&point["bpw_total"]) > bits);
        let nearest = variants.iter().filter(|v| number(&v["effective_bpw_linear"]) < bits + 0.2);
        for variant in nearest {
            assert!(number(&point["kl_mean"]) < number(&variant["kl_mean"]), "{variant}");
        }
    }

    let html = std::fs::read_to_string(place.path("r.html")).unwrap();
    assert!(html.starts_with("<!doctype html>"));
    for variant in variants {
        let label = variant["label"].as_str().unwrap();
        assert!(html.matches(label).count() > 1, "{label}");
    }
    for outside in ["src=\"http", "href=\"http", "url(http", "@import", "sourceMappingURL"] {
        assert!(!html.contains(outside), "{outside}");
    }

    // Artifacts of an earlier run are not overwritten, and that is said at once.
    onebase(&args).exits(1).says(&["rtn-bits-1-group_size-128 already exists"]);
}

#[test]
fn what_compare_cannot_do_is_said_before_it_begins() {
    let place = Place::new();
    let (base, math, questions) = (arg("base"), arg("math"), task(&place, "math"));
    let compare = |more: &[&str]| {
        let args = ["compare", &base, &math, "--tasks", &questions];
        onebase(args.iter().chain(more))
    };
    let page = place.text("r.html");
    compare(&["-o", "r.json"]).exits(2).says(&["r.json: the report is HTML"]);
    let run = compare(&["-o", &page, "--codecs", "rnt"]).exits(2);
    run.says(&["unknown codec \"rnt\"", "did you mean `rtn`?"]);
    let run = compare(&["-o", &page, "--codecs", "rtn:group_size=64", "--bits", "0.5"]).exits(2);
    run.says(&["codec rtn, option bits: expected 1 to 8, got 0.5"]);
    compare(&["--bits", "0"]).exits(2).says(&["above 0"]);
    compare(&["-o", "/no/such/r.html"]).exits(1).says(&["cannot create", "/no/such"]);
    std::fs::create_dir(place.path("folder.html")).unwrap();
    compare(&["-o", &place.text("folder.html")]).exits(1).says(&["is a folder"]);
    write(&place, "config.json", "{}");
    compare(&["-o", &place.text("config.html")]).exits(1).says(&["would be overwritten"]);
    let run = onebase(["compare", &base, &math, "-o", &page]).exits(1);
    run.says(&["neither a task nor a text is given"]);
    assert_eq!(place.names(), ["config.json", "folder.html", "math.jsonl"], "nothing is left");
}

#[test]
fn names_from_outside_stay_text_in_the_report() {
    let place = Place::new();
    let name = "<img src=x onerror=alert(1)>";
    copy(&demo("math"), &place.path(name));
    let (base, math, page) = (arg("base"), place.text(name), place.text("r.html"));
    let questions = task(&place, "math");
    let args = ["compare", &base, &math, "--tasks", &questions, "--bits", "1", "-o", &page];
    let got = onebase(args.iter().chain(&["--codecs", "sign", "--no-ideal", "--json"])).exits(0);
    assert_eq!(got.object()["ideal"], json!([]));
    let html = std::fs::read_to_string(place.path("r.html")).unwrap();
    assert!(!html.contains("<img"), "names are escaped");
    assert!(html.contains("&lt;img"));
}

#[test]
fn every_codec_of_the_registry_can_be_compared() {
    // What the sweep relies on: a codec's size, if it can choose, is its option `bits`.
    for codec in CODECS {
        for option in codec.options().iter().filter(|o| o.name == "bits") {
            let value = option.default_value();
            assert!(value.is_number(), "{}: {value}", codec.name());
        }
    }
}
