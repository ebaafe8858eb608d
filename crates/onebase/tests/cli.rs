//! The program as people and programs call it: results, exit codes, what it says
//! of wrong use and of refusals.

// Helpers of tests may panic as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use onebase_codec::CODECS;
use onebase_codec::rqt::Rqt;
use onebase_kernels::Backend;
use serde_json::{Value, json};
use support::{
    ANSWER, Place, QUESTION, Run, command, compress_args, contents, copy, demo, fixture, onebase,
    root,
};

fn keys(object: &Value) -> Vec<&str> {
    object.as_object().unwrap().keys().map(String::as_str).collect()
}

/// The checkpoint of the demo with this name, as an argument.
fn arg(name: &str) -> String {
    demo(name).to_str().unwrap().to_owned()
}

#[test]
fn the_whole_way_for_people() {
    let place = Place::new();
    let (base, out, back) = (arg("base"), place.text("a"), place.text("r"));
    let run = place.compress("math", "rtn", "a");
    for text in ["math", "effective bits per weight", "rtn:bits=4", "size on disk"] {
        assert!(run.stdout.contains(text), "{text}: {}", run.stdout);
    }
    assert_eq!(run.stderr.lines().count(), 1, "no progress where nobody watches");
    run.says(&["rtn:bits=4: takes at most", "of memory"]);

    let run = onebase(["inspect", &out]).exits(0);
    assert!(run.stdout.contains("4.14 linear sites") || run.stdout.contains("4.140 linear sites"));
    assert!(!run.stdout.contains("up_proj"));
    let run = onebase(["inspect", &out, "--tensors"]).exits(0);
    assert!(run.stdout.contains("model.layers.5.mlp.up_proj.weight"), "{}", run.stdout);
    assert!(run.stdout.contains("768×256"), "{}", run.stdout);

    let run = onebase(["verify", &base, &out]).exits(0);
    assert!(run.stdout.contains("is whole and belongs to"), "{}", run.stdout);

    let run = onebase(["restore", &base, &out, "--out", &back]).exits(0);
    assert!(run.stdout.starts_with("restored math to"), "{}", run.stdout);
    assert_eq!(
        contents(&place.path("r")).into_keys().collect::<Vec<_>>(),
        contents(&demo("math")).into_keys().collect::<Vec<_>>()
    );

    let delta = format!("math={out}");
    let run = onebase(["generate", &base, "--delta", &delta, "-p", QUESTION]).exits(0);
    assert_eq!(run.stdout, format!("{ANSWER}\n"));
    run.says(&["prompt tokens", "new tokens", "per second"]);
    // The restored checkpoint is a model of its own, and answers the same.
    let run = onebase(["generate", &back, "-p", QUESTION]).exits(0);
    assert_eq!(run.stdout, format!("{ANSWER}\n"));
    // And it can be compressed in turn.
    let again = place.path("b");
    onebase(compress_args(&place.path("r"), "sign", &again)).exits(0);
}

#[test]
fn the_whole_way_for_programs() {
    let place = Place::new();
    let (base, out, back) = (arg("base"), place.text("a"), place.text("r"));
    let json = |args: &[&str]| {
        let run = onebase(args.iter().chain(&["--json"])).exits(0);
        run.object()
    };
    let total = |dir: &str| -> u64 {
        contents(&place.path(dir)).values().map(|file| file.len() as u64).sum()
    };

    let got = json(&["compress", &base, &arg("math"), "-o", &out, "--codec", "sign:scale=matrix"]);
    assert_eq!(
        keys(&got),
        [
            "artifact",
            "bytes",
            "fine_tune_bytes",
            "effective_bpw_linear",
            "effective_bpw_total",
            "codecs",
            "seconds",
            "peak_memory_bytes",
            "expected_memory_bytes",
            "stage_seconds"
        ]
    );
    assert_eq!((&got["artifact"], &got["bytes"]), (&json!(out), &json!(total("a"))));
    if let Some(peak) = got["peak_memory_bytes"].as_u64() {
        assert!(peak <= got["expected_memory_bytes"].as_u64().unwrap(), "{peak}");
    }
    let codec = json!([{"name": "sign", "version": 1, "options": {"scale": "matrix"}}]);
    assert_eq!(got["codecs"], codec);
    let bits = got["effective_bpw_total"].as_f64().unwrap();
    assert!((1.0..1.1).contains(&bits), "{bits}");

    let got = json(&["inspect", &out]);
    let mut expected = vec![
        "artifact",
        "format_version",
        "tool",
        "fine_tune",
        "base",
        "bytes",
        "linear_bytes",
        "n_weights",
        "n_weights_linear",
        "effective_bpw_linear",
        "effective_bpw_total",
        "codecs",
        "files",
        "calibration",
        "quality",
    ];
    assert_eq!(keys(&got), expected);
    assert_eq!((&got["fine_tune"], &got["base"]["name"]), (&json!("math"), &json!("base")));
    assert_eq!((&got["bytes"], &got["n_weights"]), (&json!(total("a")), &json!(5_246_208)));
    expected.push("tensors");
    let got = json(&["inspect", "--tensors", &out]);
    assert_eq!(keys(&got), expected);
    assert_eq!(keys(&got["tensors"]).len(), 56);

    let got = json(&["verify", &base, &out]);
    assert_eq!(keys(&got), ["verified", "artifact", "checked"]);
    assert_eq!(got["verified"], json!(true));
    let checked = json!({"n_files": 6, "n_base_tensors": 56, "n_deltas": 43});
    assert_eq!(got["checked"], checked);

    let got = json(&["restore", &base, &out, "-o", &back]);
    assert_eq!(got, json!({"checkpoint": back, "bytes": 10_492_416}));

    let delta = format!("m={out}");
    let args = ["generate", &base, "-d", &delta, "--with-base", "-n", "5", "-p", QUESTION, "-p"];
    let got = json(&[&args[..], &["Hi"]].concat());
    assert_eq!(keys(&got), ["answers", "prompt_tokens", "new_tokens", "seconds"]);
    let answers = got["answers"].as_array().unwrap();
    let asked: Vec<_> = answers.iter().map(|a| (&a["model"], &a["prompt"])).collect();
    let (base, m, question, hi) = (&json!("base"), &json!("m"), &json!(QUESTION), &json!("Hi"));
    assert_eq!(asked, [(base, question), (m, question), (base, hi), (m, hi)]);
    for answer in answers {
        assert_eq!(keys(answer), ["model", "prompt", "text", "tokens", "finish_reason"]);
        let reason = answer["finish_reason"].as_str().unwrap();
        let n_tokens = answer["tokens"].as_array().unwrap().len();
        assert!(reason == "length" && n_tokens == 5 || reason == "stop" && n_tokens < 5);
    }

    let got = json(&["codecs"]);
    let names: Vec<&str> =
        got["codecs"].as_array().unwrap().iter().map(|c| c["name"].as_str().unwrap()).collect();
    let known = CODECS.iter().map(|c| c.name()).chain([Rqt::NAME]);
    assert_eq!(names, known.collect::<Vec<_>>());
    assert_eq!(
        keys(&got["codecs"][0]),
        ["name", "version", "summary", "uses_statistics", "options"]
    );
    assert_eq!(keys(&got["codecs"][0]["options"][0]), ["name", "doc", "default", "expected"]);
}

/// A family as people make and change it.
#[test]
fn the_whole_way_of_a_family() {
    let place = Place::new();
    let (base, math, chat, out) = (arg("base"), arg("math"), arg("chat"), place.text("f"));
    let later = format!("later={}", place.text("later"));
    // A fine-tune that is a relative: what a coarse artifact of another restores to.
    place.compress("math", "rtn", "a");
    onebase(["restore", &base, &place.text("a"), "-o", &place.text("later")]).exits(0);
    let family = ["compress", &base, &math, &chat, &later, "--codec", "rqt", "--budget", "2.3bpw"];
    let plan = onebase(family.iter().chain(&["-o", &out, "--dry-run"])).exits(0);
    for text in ["cosine of deltas", "in common", "dB", "math, later share codes"] {
        assert!(plan.stdout.contains(text), "{text}: {}", plan.stdout);
    }
    assert!(!place.path("f").exists());
    let run = onebase(family.iter().chain(&["-o", &out])).exits(0);
    assert!(run.stdout.contains("effective bits per weight and tenant"), "{}", run.stdout);
    run.says(&["cosine of deltas", "math, later share codes"]);
    let drawn = onebase(["inspect", &out]).exits(0);
    assert!(drawn.stdout.contains("later, math  "), "{}", drawn.stdout);
    assert!(drawn.stdout.contains("on its path"), "{}", drawn.stdout);
    let run = onebase(["verify", &base, &out]).exits(0);
    assert!(run.stdout.contains("deltas checked of chat, later, math"), "{}", run.stdout);

    let delta = format!("math={out}/tenants/math");
    let run = onebase(["generate", &base, "--delta", &delta, "-p", QUESTION]).exits(0);
    assert_eq!(run.stdout, format!("{ANSWER}\n"));

    let json = |args: &[&str]| onebase(args.iter().chain(&["--json"])).exits(0).object();
    let got = json(&["generate", &base, "--family", &out, "-n", "4", "-p", QUESTION]);
    let voices = got["answers"].as_array().unwrap().iter().map(|answer| &answer["model"]);
    assert_eq!(voices.collect::<Vec<_>>(), ["chat", "later", "math"]);
    let removed = json(&["family", "remove", &out, "later"]);
    assert_eq!(removed["removed"], json!("later"));
    assert_eq!(removed["nodes"].as_array().unwrap().len(), 1);
    let added = json(&["family", "add", &out, &later, "--base", &base]);
    assert_eq!(keys(&added), ["added", "sizes"]);
    assert_eq!(added["sizes"]["name"], json!("later"));
    let object = json(&["inspect", &out]);
    assert_eq!(keys(&object), ["family", "manifest", "report"]);
    let names = object["report"]["tenants"].as_array().unwrap().iter().map(|t| &t["name"]);
    assert_eq!(names.collect::<Vec<_>>(), [&json!("chat"), &json!("later"), &json!("math")]);
    let rebuilt = ["family", "rebuild", &out, &math, &chat, "--base", &base, "--budget", "2bpw"];
    onebase(rebuilt).exits(1).says(&["tenant \"later\" was made from", "hint: give every"]);
    onebase(rebuilt.iter().chain(&[later.as_str()])).exits(0);
    let node = std::fs::read_dir(place.path("f/nodes")).unwrap().next().unwrap().unwrap().path();
    std::fs::write(node, b"").unwrap();
    onebase(["verify", &base, &out]).exits(1).says(&["has 0 bytes", "it holds codes of", "hint:"]);
}

#[test]
fn wrong_use_exits_with_two() {
    let place = Place::new();
    let (base, math, out) = (arg("base"), arg("math"), place.text("a"));
    let compress = ["compress", &base, &math, "--out", &out];
    let generate = ["generate", &base, "--prompt", "hi"];
    let cases: [(&[&str], &[&str], &[&str]); 31] = [
        (&[], &[], &["Usage: onebase"]),
        (&["compres"], &[], &["unrecognized subcommand 'compres'", "'compress'"]),
        (&compress, &["--codec", "sgin"], &["unknown codec \"sgin\"", "did you mean `sign`"]),
        (&compress, &["--codec", ""], &["unknown codec \"\""]),
        (&compress, &["--embeddings", "exat"], &["unknown codec \"exat\""]),
        (&compress, &["--vectors", "magnitud"], &["unknown codec", "did you mean `magnitude`"]),
        (&compress, &["--distill-tokens", "512"], &["required", "--distill <TEXT>"]),
        (&compress, &["--distill", "x", "--distill-tokens", "0"], &["a number from 1 on"]),
        (&compress, &["--codec", "rtn:bit=4"], &["rtn has no option \"bit\"", "it has bits"]),
        (&compress, &["--codec", "rtn:bits=9"], &["option bits: expected 1 to 8, got 9"]),
        (&compress, &["--codec", "rtn:bits"], &["option bits: expected 1 to 8, got \"\""]),
        (
            &compress,
            &["--codec", "sign:scale=col"],
            &["expected row or matrix or parts, got \"col\""],
        ),
        (&compress, &["--colour"], &["unexpected argument '--colour'"]),
        (&compress, &["--codec", "rqt:depth=2"], &["rqt has no option \"depth\"", "topology"]),
        (&["family", "add", "x"], &[], &["required arguments were not provided", "--base"]),
        (&compress[..3], &[], &["required arguments were not provided", "--out <OUT>"]),
        (&compress[..2], &["-o", "x"], &["required arguments were not provided", "<FINE_TUNE>"]),
        (&["compress", &base, &math, "--out"], &[], &["a value is required", "--out"]),
        (&compress, &["--threads", "many"], &["invalid value 'many'", "--threads"]),
        (&["generate", &base], &[], &["required arguments were not provided", "--prompt"]),
        (&generate, &["--delta", "math"], &["expected NAME=ARTIFACT"]),
        (&generate, &["--delta", "=x"], &["expected NAME=ARTIFACT"]),
        (&generate, &["--temperature=-1"], &["expected 0 to 100"]),
        (&generate, &["--temperature", "NaN"], &["expected 0 to 100"]),
        (&generate, &["--top-p", "0"], &["expected a number above 0, at most 1"]),
        (&generate, &["--batch-size", "0"], &["0 is not in 1..=65535"]),
        (&generate, &["--raw", "--system", "x"], &["cannot be used with"]),
        (&["quantize", &base, "-o", "x", "--weights", "3"], &[], &["[possible values: 16, 8, 4]"]),
        (&["quantize", &base, "-o", "x", "--method", "awq"], &[], &["resq, quarot, rtn"]),
        (&["quantize", &base, "-o", "x", "--tokens", "5"], &[], &["required", "--text <FILE>"]),
        (&["completions", "tcl"], &[], &["invalid value 'tcl'", "bash"]),
    ];
    for (args, more, expected) in cases {
        let run = onebase(args.iter().chain(more)).exits(2).says(expected);
        assert_eq!(run.stdout, "", "{args:?} {more:?}");
    }
    assert_eq!(place.names(), [""; 0]);
}

#[test]
fn refusals_exit_with_one_and_a_hint() {
    let place = Place::new();
    let (base, math, out, a) = (arg("base"), arg("math"), place.text("out"), place.text("a"));
    place.compress("math", "sign", "a");
    let tiny = fixture("llama_tied_gqa").to_str().unwrap().to_owned();
    let empty = place.text("empty");
    std::fs::create_dir(&empty).unwrap();
    let newer = place.text("newer");
    copy(&place.path("a"), &place.path("newer"));
    let manifest = place.path("newer").join("onebase.json");
    let text = std::fs::read_to_string(&manifest).unwrap();
    std::fs::write(&manifest, text.replace("\"version\": 1,\n", "\"version\": 9,\n")).unwrap();
    let (m, twice) = (format!("m={a}"), format!("m={newer}"));
    let long = "word ".repeat(2000);
    let cases: [(&[&str], &[&str]); 26] = [
        (&["quantize", &base, "-o", &out], &["--method resq needs a text", "quarot needs none"]),
        (
            &["quantize", &base, "-o", &out, "--random", "99"],
            &["a text of 99 tokens, expected at least 256"],
        ),
        (
            &["compress", &base, &math, "-o", &out, "--full-base", &base],
            &["base is not a quantized base", "hint: `onebase quantize` makes one"],
        ),
        (&["compress", &empty, &math, "-o", &out], &["empty is no checkpoint", "config.json"]),
        (&["compress", "absent", &math, "-o", &out], &["absent is no checkpoint", "hint: give"]),
        (&["compress", &base, &base, "-o", &out], &["same weights as the base", "hint: give the"]),
        (
            &["compress", &base, &tiny, "-o", &out],
            &["does not fit the base: hidden_size is 48, the base has 256", "hint: a delta needs"],
        ),
        (
            &["compress", &base, &math, "-o", &a],
            &["a already exists", "hint: remove it or choose another output"],
        ),
        (&["compress", &base, &math, "-o", "/"], &["/ already exists"]),
        (
            &["compress", &base, &math, &math, "-o", &out],
            &["2 fine-tunes, expected one for codec rtn", "`--codec rqt` compresses a family"],
        ),
        (
            &["compress", &base, &math, "-o", &out, "--dry-run"],
            &["--leaf and --dry-run are for a family"],
        ),
        (
            &["compress", &base, &math, "-o", &out, "--codec", "rqt"],
            &["give one, for example --budget 2bpw"],
        ),
        (
            &["compress", &base, &math, &math, "-o", &out, "--codec", "rqt", "--budget", "2bpw"],
            &["two tenants are called \"math\"", "hint: give one of them another name"],
        ),
        (&["family", "remove", &a, "x"], &["a is no family", "hint: give a folder"]),
        (&["inspect", &empty], &["empty is no delta artifact: it has no onebase.json", "hint:"]),
        (&["inspect", &base], &["base is no delta artifact", "onebase compress"]),
        (
            &["inspect", &newer],
            &["format version 9, this program reads up to 2", "hint: install a newer onebase"],
        ),
        (
            &["verify", &math, &a],
            &["a: made against another base: ", " has digest ", "math, expected ", "hint: a delta"],
        ),
        (&["restore", &math, &a, "-o", &out], &["made against another base", "hint:"]),
        (&["generate", &math, "-d", &m, "-p", "x"], &["made against another base", "hint:"]),
        (&["restore", &base, &a, "-o", &a], &["already exists", "hint:"]),
        (&["generate", &base, "-d", &m, "-d", &twice, "-p", "x"], &["the name m is given twice"]),
        (
            &["generate", &base, "--with-base", "-d", &format!("base={a}"), "-p", "x"],
            &["the name base is given twice"],
        ),
        (&["generate", &tiny, "-p", "x"], &["has no tokenizer.json", "hint: a model that answers"]),
        (&["generate", &base, "-p", &long], &["the prompt has ", "the context holds 1024"]),
        (&["generate", &base, "--raw", "-p", ""], &["the prompt is empty"]),
    ];
    let before = place.names();
    for (args, expected) in cases {
        let mut texts = vec!["error: "];
        texts.extend(expected);
        let plain = onebase(args).exits(1).says(&texts);
        let json = onebase(args.iter().chain(&["--json"])).exits(1).says(&texts);
        assert_eq!((plain.stdout.as_str(), json.stdout.as_str()), ("", ""), "{args:?}");
    }
    assert_eq!(place.names(), before, "nothing is left");
}

#[test]
fn damage_is_refused_by_all_who_read_an_artifact() {
    let place = Place::new();
    let (base, out) = (arg("base"), place.text("out"));
    place.compress("chat", "rtn", "a");
    let (a, delta) = (place.text("a"), format!("chat={}", place.text("a")));
    let path = place.path("a").join("linear-00001.safetensors");
    let whole = std::fs::read(&path).unwrap();
    let mut damaged = whole.clone();
    damaged[whole.len() / 2] ^= 4;
    let n = whole.len();
    let shorter = format!("expected {n} bytes, got {}", n - 1);
    for (bytes, expected) in
        [(&damaged[..], "contents changed: expected digest"), (&whole[..n - 1], shorter.as_str())]
    {
        std::fs::write(&path, bytes).unwrap();
        let texts =
            ["error: ", "linear-00001.safetensors: ", expected, "hint: the file is damaged"];
        onebase(["verify", &base, &a]).exits(1).says(&texts);
        onebase(["restore", &base, &a, "-o", &out]).exits(1).says(&texts);
        onebase(["generate", &base, "-d", &delta, "-p", "x"]).exits(1).says(&texts);
    }
    assert_eq!(place.names(), ["a"]);
}

#[test]
fn backends_and_threads_write_the_same_bytes() {
    let place = Place::new();
    for codec in CODECS.iter().map(|c| c.name()) {
        let [a, b, c] = ["a", "b", "c"].map(|x| place.path(&format!("{codec}-{x}")));
        onebase(compress_args(&demo("math"), codec, &a)).exits(0);
        let mut portable = command(compress_args(&demo("math"), codec, &b));
        Run::of(portable.env("ONEBASE_KERNELS", "portable")).exits(0);
        let mut one = command(compress_args(&demo("math"), codec, &c));
        Run::of(one.env("ONEBASE_THREADS", "1")).exits(0);
        assert!(contents(&a) == contents(&b), "{codec}: portable");
        assert!(contents(&a) == contents(&c), "{codec}: one thread");
    }
}

#[test]
fn a_backend_that_is_not_there_is_wrong_use() {
    for name in ["nonsense", "AVX2", "portable "] {
        let run = Run::of(command(["codecs"]).env("ONEBASE_KERNELS", name)).exits(2);
        assert_eq!(run.stdout, "");
        run.says(&["error: ", name, "portable"]);
    }
    for backend in Backend::available() {
        Run::of(command(["codecs"]).env("ONEBASE_KERNELS", backend.name())).exits(0);
    }
    Run::of(command(["codecs"]).env("ONEBASE_KERNELS", "")).exits(0);
}

#[test]
fn answers_are_the_same_on_every_backend_and_in_every_batch() {
    let place = Place::new();
    place.compress("math", "rtn", "m");
    place.compress("chat", "sign", "c");
    let deltas = ["m", "c"].map(|n| format!("{n}={}", place.text(n)));
    let base = arg("base");
    let mut args = vec!["generate", &base, "--json", "--with-base", "-n", "12", "-t", "0.7"];
    args.extend(["--seed", "3", "--top-k", "50", "--top-p", "0.9", "-d", &deltas[0], "-d"]);
    args.extend([&deltas[1], "-p", QUESTION, "-p", "Please spell the word saddle."]);
    let answers =
        |command: &mut std::process::Command| Run::of(command).exits(0).object()["answers"].clone();
    let want = answers(&mut command(&args));
    assert_eq!(want.as_array().unwrap().len(), 6);
    for batch_size in ["1", "2", "5"] {
        let more = ["--batch-size", batch_size];
        assert_eq!(answers(command(&args).args(more)), want, "{batch_size}");
    }
    assert_eq!(answers(command(&args).env("ONEBASE_THREADS", "1")), want);
    let portable = answers(command(&args).env("ONEBASE_KERNELS", "portable"));
    assert_eq!(portable, want);
    let other_seed = args.iter().map(|a| if *a == "3" { "4" } else { a });
    assert_ne!(answers(&mut command(other_seed)), want);
}

#[test]
fn answers_end_where_they_are_told_to() {
    let base = arg("base");
    let ask = |more: &[&str]| {
        let args = ["generate", &base, "--raw", "--json", "-p", "The house was"];
        onebase(args.iter().chain(more)).exits(0).object()["answers"][0].clone()
    };
    let free = ask(&["-n", "12"]);
    assert_eq!(free["tokens"].as_array().unwrap().len(), 12);
    assert_eq!(free["finish_reason"], "length");
    let text = free["text"].as_str().unwrap();
    assert_eq!(ask(&["-n", "0"])["text"], "");
    let stop: String = text.chars().skip(5).take(4).collect();
    let stopped = ask(&["-n", "12", "--stop", "no such text", "--stop", &stop]);
    assert_eq!(stopped["text"], text[..text.find(&stop).unwrap()]);
    assert_eq!(stopped["finish_reason"], "stop");
    // For people, several answers are told apart.
    let args = ["generate", &base, "--raw", "-n", "3", "-p", "The house was", "-p", "x"];
    let run = onebase(args).exits(0);
    assert!(run.stdout.starts_with("> The house was\nbase  "), "{}", run.stdout);
    assert!(run.stdout.contains("\n> x\nbase  "), "{}", run.stdout);
}

#[test]
fn completions_and_help_know_every_command() {
    let commands =
        ["compress", "inspect", "verify", "restore", "generate", "demo", "codecs", "completions"];
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let run = onebase(["completions", shell]).exits(0);
        for name in commands {
            assert!(run.stdout.contains(name), "{shell} does not know {name}");
        }
        assert_eq!(run.stderr, "");
    }
    let help = onebase(["--help"]).exits(0).stdout;
    for name in commands {
        assert!(help.contains(&format!("\n  {name} ")), "{name}: {help}");
        assert!(onebase([name, "--help"]).exits(0).stdout.contains("Usage: onebase"), "{name}");
    }
    let version = onebase(["--version"]).exits(0).stdout;
    assert_eq!(version, concat!("onebase ", env!("CARGO_PKG_VERSION"), "\n"));
    let codecs = onebase(["codecs"]).exits(0).stdout;
    CODECS.iter().for_each(|c| assert!(codecs.contains(c.summary()), "{codecs}"));
}

#[test]
fn the_demo_runs_every_codec_on_every_fine_tune() {
    let place = Place::new();
    let args = ["demo", "--json", "--questions", "5", "--out", &place.text("out")];
    let got = Run::of(command(args).current_dir(root())).exits(0).object();
    assert_eq!(keys(&got), ["results", "answers", "seconds"]);
    let results = got["results"].as_array().unwrap();
    for fine_tune in ["math", "chat"] {
        let rows: Vec<&Value> = results.iter().filter(|r| r["fine_tune"] == fine_tune).collect();
        for codec in CODECS {
            let row = rows.iter().find(|r| {
                let text = r["codec"].as_str().unwrap();
                text.split(':').next() == Some(codec.name())
            });
            let row = row.unwrap_or_else(|| panic!("no row for {}", codec.name()));
            assert_eq!(
                keys(row),
                [
                    "fine_tune",
                    "codec",
                    "bytes",
                    "effective_bpw_linear",
                    "effective_bpw_total",
                    "right",
                    "n"
                ]
            );
            assert!(row["effective_bpw_total"].as_f64().unwrap() > 0.0, "{row}");
            assert_eq!(row["n"], 5);
            let name = row["codec"].as_str().unwrap().replace([':', ',', '='], "-");
            let kept = place.path("out").join(format!("{fine_tune}-{name}"));
            let bytes: usize = contents(&kept).values().map(Vec::len).sum();
            assert_eq!(row["bytes"], bytes);
        }
        // The skill comes with the fine-tune, not with the base.
        let right = |codec: &str| {
            rows.iter().find(|r| r["codec"] == codec).unwrap()["right"].as_u64().unwrap()
        };
        assert!(right("(base)") < right("(uncompressed)"), "{rows:?}");
        assert_eq!(right("dense:dtype=f32"), right("(uncompressed)"));
    }
    assert_eq!(got["answers"].as_array().unwrap().len(), 6);
    // Only the repository has a family of that name.
    let run = Run::of(command(["demo"]).current_dir(place.dir.path())).exits(1);
    run.says(&["error: demo has no folder `base`", "--dir"]);
}

#[test]
fn the_demo_counts_the_questions_there_are() {
    let place = Place::new();
    for name in ["base", "math", "chat"] {
        copy(&demo(name), &place.path(name));
    }
    std::fs::create_dir(place.path("eval")).unwrap();
    for name in ["math.jsonl", "chat.jsonl"] {
        let text = std::fs::read_to_string(demo("eval").join(name)).unwrap();
        let first = text.lines().take(2).map(|line| format!("{line}\n\n"));
        std::fs::write(place.path("eval").join(name), first.collect::<String>()).unwrap();
    }
    let dir = place.dir.path().to_str().unwrap();
    let got = onebase(["demo", "--json", "--questions", "9", "--dir", dir]).exits(0).object();
    for row in got["results"].as_array().unwrap() {
        assert_eq!(row["n"], 2, "{row}");
        assert!(row["right"].as_u64().unwrap() <= 2, "{row}");
    }
    std::fs::write(place.path("eval").join("math.jsonl"), "{}\n").unwrap();
    let run = onebase(["demo", "--dir", dir]).exits(1);
    run.says(&["error: ", "math.jsonl, line 1: missing field `answer`", "hint: "]);
}

#[test]
fn scales_are_fitted_on_a_text() {
    let place = Place::new();
    let (base, math, out, text) = (arg("base"), arg("math"), place.text("a"), place.text("t.txt"));
    std::fs::write(&text, "Tom has 3 boxes of 12 pens and gives 5 pens to Ann. ".repeat(60))
        .unwrap();
    let compress = ["compress", &base, &math, "--out", &out, "--embeddings", "exact", "--json"];
    let run =
        |more: &[&str]| Run::of(command(compress.iter().chain(more)).arg("--distill").arg(&text));
    let refused = run(&["--codec", "low-rank"]).exits(1);
    assert!(refused.stderr.contains("low-rank has no scales"), "{}", refused.stderr);
    assert!(refused.stderr.contains("hint: rtn, sign"), "{}", refused.stderr);
    let short = run(&["--codec", "sign", "--distill-tokens", "100"]).exits(1);
    assert!(short.stderr.contains("100 tokens"), "{}", short.stderr);
    assert_eq!(place.names(), ["t.txt"]);

    let got = run(&["--codec", "sign:scale=matrix", "--distill-tokens", "400"]).exits(0);
    let got: Value = serde_json::from_str(&got.stdout).unwrap();
    let distilled = &got["distilled"];
    assert_eq!((&distilled["n_sites"], &distilled["n_held_out_tokens"]), (&json!(42), &json!(16)));
    let loss = |name: &str| distilled[name].as_f64().unwrap();
    assert!(loss("loss_after") <= loss("loss_before"), "{distilled}");
    let manifest = std::fs::read_to_string(place.path("a/onebase.json")).unwrap();
    let manifest: Value = serde_json::from_str(&manifest).unwrap();
    let record = &manifest["distillation"];
    assert_eq!((&record["name"], &record["n_tokens"]), (&json!("t.txt"), &json!(400)));
    let again = run(&["--codec", "sign:scale=matrix"]).exits(1);
    assert!(again.stderr.contains("exists"), "{}", again.stderr);
    assert_eq!(place.names(), ["a", "t.txt"]);
}

#[test]
fn statistics_are_measured_and_refused() {
    let place = Place::new();
    let (base, math, stats, text) =
        (arg("base"), arg("math"), place.text("stats"), place.text("t.txt"));
    std::fs::write(&text, "Tom has 3 boxes of 12 pens and gives 5 pens to Ann. ".repeat(60))
        .unwrap();
    let calibrate = |more: &[&str], out: &str| {
        onebase(["calibrate", &base, "--json", "--out", out].iter().chain(more))
    };
    // One source, and what is for another is refused.
    for bad in [
        &[][..],
        &["--text", &text, "--random", "5"],
        &["--random", "0"],
        &["--random", "1000000000000"],
        &["--generate", "5", "--tokens", "5"],
        &["--text", &text, "--seed", "1"],
        &["--random", "5", "--window", "0"],
    ] {
        calibrate(bad, &stats).exits(2);
    }
    for (index, (source, kind)) in [
        (["--text", &text, "--tokens", "40"], "text"),
        (["--random", "40", "--seed", "3"], "random"),
        (["--generate", "40", "--seed", "3"], "generated"),
    ]
    .into_iter()
    .enumerate()
    {
        let out = format!("{stats}{index}");
        let run = calibrate(&source, &out).exits(0);
        let run = run.says(&["warning: 40 tokens are fewer than the 768 input features"]);
        let got = run.object();
        assert_eq!((&got["source"]["kind"], &got["n_tokens"]), (&json!(kind), &json!(40)));
        assert_eq!((&got["n_inputs"], &got["widest_in_features"]), (&json!(24), &json!(768)));
        calibrate(&source, &out).exits(1).says(&["already exists", "hint: "]);
    }
    let can: Vec<String> = onebase(["codecs", "--json"]).exits(0).object()["codecs"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|codec| codec["uses_statistics"] == json!(true))
        .map(|codec| codec["name"].as_str().unwrap().to_owned())
        .collect();
    let compress = |codec: &str, statistics: &str, out: &str| {
        let args = ["compress", &base, &math, "--embeddings", "exact", "--codec", codec];
        onebase(args.iter().chain(&["--statistics", statistics, "--out", out]))
    };
    let (of_base, out) = (format!("{stats}0"), place.text("a"));
    let refused = compress("sign", &of_base, &out);
    if !can.iter().any(|codec| codec == "sign") {
        let refused = refused.exits(1).says(&["codec sign cannot be calibrated", "hint: "]);
        assert!(can.iter().all(|codec| refused.stderr.contains(codec)), "{}", refused.stderr);
    }
    let of_chat = place.text("chat");
    onebase(["calibrate", &arg("chat"), "--random", "20", "--out", &of_chat]).exits(0);
    for codec in &can {
        compress(codec, &of_chat, &out).exits(1).says(&["of the model chat", "hint: "]);
    }
    compress(&can[0], &of_base, &out).exits(0);
    let shown = onebase(["inspect", &out, "--json"]).exits(0).object();
    assert_eq!(shown["calibration"]["source"]["name"], json!("t.txt"));
    assert_eq!(shown["calibration"]["n_tokens"], json!(40));
    let text = onebase(["inspect", &out]).exits(0).stdout;
    assert!(text.contains("t.txt (40 tokens, inputs of base)"), "{text}");
}

#[test]
fn inputs_are_measured_while_compressing() {
    let place = Place::new();
    let (base, math, out, text) = (arg("base"), arg("math"), place.text("a"), place.text("t.txt"));
    std::fs::write(&text, "Tom has 3 boxes of 12 pens and gives 5 pens to Ann. ".repeat(60))
        .unwrap();
    let compress = ["compress", &base, &math, "--out", &out, "--calibration", &text];
    let run = |more: &[&str]| Run::of(command(compress.iter().chain(more)).arg("--json"));
    for other in [
        &["--statistics", "stats"][..],
        &["--shard", "1/2"],
        &["--allocate", "--budget", "2bpw"],
        &["--calibration-window", "0"],
    ] {
        run(&[&["--codec", "deltamix"], other].concat()).exits(2).says(&[other[0]]);
    }
    let alone = ["compress", &base, &math, "--out", &out, "--calibration-tokens", "9"];
    onebase(alone).exits(2).says(&["--calibration <TEXT>"]);
    let refused = run(&["--codec", "sign"]).exits(1);
    refused.says(&["codec sign cannot be calibrated", "hint: delta-come", "--calibration"]);
    std::fs::write(place.path("empty.txt"), "").unwrap();
    let empty = ["compress", &base, &math, "--out", &out, "--codec", "deltamix", "--calibration"];
    Run::of(command(empty).arg(place.path("empty.txt"))).exits(1).says(&["empty.txt has no text"]);
    assert_eq!(place.names(), ["empty.txt", "t.txt"]);

    let codec = ["--codec", "deltamix:bits=1", "--embeddings", "rtn:bits=4"];
    let few = ["--calibration-tokens", "50", "--calibration-window", "20"];
    let got = run(&[codec, few].concat()).exits(0);
    let got = got.says(&["warning: 50 tokens are fewer than the", "input features"]).object();
    if let Some(peak) = got["peak_memory_bytes"].as_u64() {
        assert!(peak <= got["expected_memory_bytes"].as_u64().unwrap(), "{peak}");
    }
    let got = onebase(["inspect", &out, "--json"]).exits(0).object();
    let record = &got["calibration"];
    assert_eq!((&record["n_tokens"], &record["source"]["name"]), (&json!(50), &json!("t.txt")));
    assert_eq!(record["sequential"], json!({"window_tokens": 20}));
    let said = onebase(["inspect", &out]).exits(0).stdout;
    let how = "t.txt (50 tokens, inputs of math as far as it was compressed)";
    assert!(said.contains(how), "{said}");
    onebase(["verify", &base, &out]).exits(0);
}
