//! Runs that are cut short: a full disk, a kill, two at once, readers that go
//! away. What has a name is complete, and running again gives what an undisturbed
//! run gives.
#![cfg(unix)]
// Helpers of tests may panic as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use support::{
    PROGRAM, Place, QUESTION, Run, command, compress_args, contents, copy, demo, onebase,
};

/// Waits until something is so, which it soon is.
#[track_caller]
fn wait_until(what: &str, mut so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !so() {
        assert!(start.elapsed() < Duration::from_secs(60), "{what}");
        std::thread::sleep(Duration::from_micros(200));
    }
}

fn silent(mut command: Command) -> Command {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

/// A codec that takes its time.
const SLOW: &str = "dqrelo-plus:svd=full,rounds=16";

/// What an interrupted run leaves, and how many lines of its journal are whole.
const WORK: &str = ".out.work";

fn n_lines(place: &Place) -> usize {
    let journal = std::fs::read(place.path(WORK).join("journal.jsonl")).unwrap_or_default();
    journal.iter().filter(|byte| **byte == b'\n').count()
}

fn kill(mut child: Child) -> std::process::ExitStatus {
    child.kill().unwrap();
    child.wait().unwrap()
}

/// What a run that nobody disturbs writes.
fn undisturbed(place: &Place, fine_tune: &Path, codec: &str) {
    onebase(compress_args(fine_tune, codec, &place.path("undisturbed"))).exits(0);
}

/// Killed five times in one run, at moments that a generator draws: after some more tensors
/// and some more time.
#[test]
fn a_run_that_is_killed_again_and_again_gives_what_an_unbroken_one_gives() {
    let place = Place::new();
    let codec = "dqrelo-plus:svd=full,rounds=4";
    undisturbed(&place, &demo("math"), codec);
    let args = compress_args(&demo("math"), codec, &place.path("out"));
    let mut state = 7u64;
    let mut draw = |below: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963);
        (state >> 33) % below
    };
    for round in 0..5 {
        let (before, more) = (n_lines(&place), draw(7));
        let mut child = silent(command(&args)).spawn().unwrap();
        wait_until("it goes on", || n_lines(&place) as u64 > before as u64 + more);
        std::thread::sleep(Duration::from_micros(draw(20_000)));
        assert!(child.try_wait().unwrap().is_none(), "round {round}: too late");
        let status = kill(child);
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(9));
        assert_eq!(place.names(), [WORK, "undisturbed"]);
    }
    onebase(&args).exits(0).says(&["going on with an earlier run:", "tensors are done"]);
    assert!(contents(&place.path("out")) == contents(&place.path("undisturbed")));
    assert_eq!(place.names(), ["out", "undisturbed"]);
}

/// Inputs that were measured through the deltas of an earlier process are the same.
#[test]
fn a_killed_run_that_measures_inputs_gives_what_an_unbroken_one_gives() {
    let place = Place::new();
    let side = Place::new();
    let text = side.text("t.txt");
    std::fs::write(&text, "Tom has 3 boxes of 12 pens and gives 5 pens to Ann. ".repeat(60))
        .unwrap();
    let arguments = |out: &str, tokens: &str| {
        let codec = "deltamix:bits=1";
        let mut args = compress_args(&demo("math"), codec, &place.path(out));
        let more = ["--calibration", &text, "--calibration-tokens", tokens];
        args.extend(more.map(str::to_owned));
        args
    };
    onebase(arguments("undisturbed", "600")).exits(0);
    let args = arguments("out", "600");
    for n_lines_before in [9, 30] {
        let child = silent(command(&args)).spawn().unwrap();
        wait_until("some tensors are done", || n_lines(&place) > n_lines_before);
        kill(child);
        assert_eq!(place.names(), [WORK, "undisturbed"]);
    }
    let other = onebase(arguments("out", "500")).exits(1);
    other.says(&["belongs to another run: calibration is", "\"n_tokens\":600", "--restart"]);
    onebase(&args).exits(0).says(&["going on with an earlier run:"]);
    assert!(contents(&place.path("out")) == contents(&place.path("undisturbed")));
    assert_eq!(place.names(), ["out", "undisturbed"]);
}

/// A process that ended after the first tensors of a slow run.
fn killed_run(place: &Place, fine_tune: &Path) {
    let args = compress_args(fine_tune, SLOW, &place.path("out"));
    let child = silent(command(args)).spawn().unwrap();
    wait_until("some tensors are done", || n_lines(place) > 4);
    kill(child);
}

/// Changes a weight that no sample of its tensor shows.
fn alter(fine_tune: &Path) {
    let weights = fine_tune.join("model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let names: Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    let first = names["model.embed_tokens.weight"]["data_offsets"][0].as_u64().unwrap() as usize;
    bytes[8 + header + first + 1000] ^= 1;
    std::fs::write(&weights, bytes).unwrap();
}

#[test]
fn what_another_run_has_left_is_refused() {
    let place = Place::new();
    let fine_tune = place.path("math");
    copy(&demo("math"), &fine_tune);
    killed_run(&place, &fine_tune);
    let out = place.path("out");
    let other = onebase(compress_args(&fine_tune, "dqrelo-plus:svd=full", &out)).exits(1);
    other.says(&[WORK, "belongs to another run: options is", "rounds=16", "hint:", "--restart"]);
    let other = onebase(compress_args(&demo("chat"), SLOW, &out)).exits(1);
    other.says(&[WORK, "belongs to another run", "hint:", "--restart"]);

    alter(&fine_tune);
    let changed = onebase(compress_args(&fine_tune, SLOW, &out)).exits(1);
    changed.says(&["model.embed_tokens.weight has changed since the run began", "--restart"]);
    assert!(place.path(WORK).exists(), "what is done is kept");

    let mut again = compress_args(&fine_tune, "sign", &out);
    again.push("--restart".to_owned());
    onebase(again).exits(0);
    assert_eq!(place.names(), ["math", "out"]);
}

#[test]
fn shards_make_the_same_artifact() {
    let place = Place::new();
    undisturbed(&place, &demo("math"), "dqrelo");
    let shard = |shard: &str, codec: &str| {
        let mut args = compress_args(&demo("math"), codec, &place.path("out"));
        args.extend(["--shard".to_owned(), shard.to_owned()]);
        onebase(args)
    };
    let finalize = || onebase(["finalize", &place.text("out")]);
    finalize().exits(1).says(&["cannot read", "out.shards"]);
    shard("2/3", "dqrelo").exits(0);
    finalize().exits(1).says(&["1-of-3: shard 1 of 3 is not complete", "--shard 1/3"]);
    shard("1/3", "dqrelo").exits(0);
    shard("3/3", "sign").exits(0);
    finalize().exits(1).says(&["3-of-3", "belongs to another run: options is", "sign"]);
    shard("3/3", "dqrelo").exits(1).says(&["belongs to another run", "--restart"]);
    std::fs::remove_dir_all(place.path("out.shards/3-of-3")).unwrap();
    for _ in 0..2 {
        shard("3/3", "dqrelo").exits(0);
    }
    assert!(!place.path("out").exists());
    for _ in 0..2 {
        finalize().exits(0);
        assert!(contents(&place.path("out")) == contents(&place.path("undisturbed")));
    }
    assert_eq!(place.names(), ["out", "undisturbed"]);
    std::fs::remove_dir_all(place.path("out")).unwrap();

    // Of a fine-tune that changed between two shards there is no artifact.
    copy(&demo("math"), &place.path("math"));
    alter(&place.path("math"));
    shard("1/2", "sign").exits(0);
    let mut args = compress_args(&place.path("math"), "sign", &place.path("out"));
    args.extend(["--shard", "2/2"].map(str::to_owned));
    onebase(args).exits(0);
    finalize().exits(1).says(&["2-of-2: belongs to another run: inputs is"]);
    assert!(!place.path("out").exists());
    std::fs::remove_dir_all(place.path("out.shards")).unwrap();
    shard("1/1000000000000", "dqrelo").exits(1).says(&["expected at most 56", "hint:"]);
    for bad in ["0/3", "4/3", "1", "a/b", "1/0"] {
        shard(bad, "dqrelo").exits(2).says(&["expected I/N"]);
    }
}

#[test]
fn a_killed_restore_leaves_nothing_under_the_name() {
    let place = Place::new();
    place.compress("math", "sign", "a");
    let (base, a, out) = (demo("base"), place.path("a"), place.path("out"));
    let args =
        ["restore".as_ref(), base.as_os_str(), a.as_os_str(), "-o".as_ref(), out.as_os_str()];
    let n_killed = (0..20).filter(|_| {
        let mut child = silent(command(args)).spawn().unwrap();
        wait_until("it writes or is done", || {
            place.path(".out.partial").exists() || child.try_wait().unwrap().is_some()
        });
        kill(child);
        let done = out.exists();
        if done {
            std::fs::remove_dir_all(&out).unwrap();
        }
        !done
    });
    assert!(n_killed.count() > 0, "no run was killed while it wrote");
    onebase(args).exits(0);
    assert_eq!(place.names(), ["a", "out"]);
    let text = out.to_str().unwrap();
    onebase(["generate", text, "-p", QUESTION]).exits(0);
}

#[test]
fn two_runs_do_not_write_the_same_folder() {
    let place = Place::new();
    let args = compress_args(&demo("math"), SLOW, &place.path("out"));
    let child = silent(command(args)).spawn().unwrap();
    wait_until("the run has begun", || n_lines(&place) > 0);
    for restart in [false, true] {
        let mut second = compress_args(&demo("math"), SLOW, &place.path("out"));
        second.extend(restart.then(|| "--restart".to_owned()));
        onebase(second).exits(1).says(&["error: another process is writing", "out"]);
    }
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(place.names(), ["out"]);
}

/// The program where no file may grow past 64 blocks; writing on is an error, no signal.
fn on_a_full_disk(args: &[String]) -> Run {
    let script = "ulimit -f 64; trap '' XFSZ; exec \"$0\" \"$@\"";
    let mut limited = Command::new("sh");
    limited.args(["-c", script, PROGRAM]).args(args);
    limited.env_remove("ONEBASE_KERNELS").env_remove("ONEBASE_THREADS");
    Run::of(&mut limited)
}

#[test]
fn a_full_disk_leaves_nothing_under_the_name() {
    let place = Place::new();
    place.compress("math", "sign", "a");
    let (base, a, out) = (demo("base"), place.text("a"), place.text("out"));
    let base = base.to_str().unwrap();
    let restore = ["restore", base, &a, "-o", &out].map(str::to_owned);
    let run = on_a_full_disk(&restore).exits(1);
    assert_eq!(run.stdout, "");
    run.says(&["error: cannot write", ".out.partial", "safetensors", "File too large"]);
    assert_eq!(place.names(), ["a"]);
}

#[test]
fn what_was_done_before_the_disk_was_full_is_not_lost() {
    for codec in ["dense", "rtn", "dqrelo"] {
        let place = Place::new();
        undisturbed(&place, &demo("math"), codec);
        let args = compress_args(&demo("math"), codec, &place.path("out"));
        let run = on_a_full_disk(&args).exits(1);
        assert_eq!(run.stdout, "");
        run.says(&["error: cannot write", WORK, "because: File too large"]);
        assert_eq!(place.names(), [WORK, "undisturbed"]);
        onebase(&args).exits(0);
        assert!(contents(&place.path("out")) == contents(&place.path("undisturbed")));
        assert_eq!(place.names(), ["out", "undisturbed"]);
    }
}

#[test]
fn a_folder_that_cannot_be_written_is_named() {
    let place = Place::new();
    std::fs::write(place.path("file"), "x").unwrap();
    let out = place.path("file").join("out");
    let run = onebase(compress_args(&demo("math"), "sign", &out)).exits(1);
    run.says(&["error: cannot create", WORK, "because: Not a directory"]);
    assert_eq!(place.names(), ["file"]);
}

/// Runs the program with standard output or error closed after some bytes.
fn with_closed(args: &[&str], stderr: bool, n_bytes: usize) -> Run {
    let mut command = command(args);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let read = |pipe: &mut dyn std::io::Read| {
        let mut bytes = vec![0; n_bytes];
        pipe.read_exact(&mut bytes).unwrap();
    };
    if stderr {
        read(&mut child.stderr.take().unwrap());
    } else {
        read(&mut child.stdout.take().unwrap());
    }
    child.wait_with_output().unwrap().into()
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let place = Place::new();
    place.compress("math", "sign", "a");
    let (base, a) = (demo("base").to_str().unwrap().to_owned(), place.text("a"));
    let generate = ["generate", &base, "--raw", "-n", "3", "-p", "hi"];
    let cases: [&[&str]; 8] = [
        &["codecs"],
        &["codecs", "--json"],
        &["inspect", &a, "--tensors"],
        &["inspect", &a, "--tensors", "--json"],
        &["verify", &base, &a],
        &["completions", "zsh"],
        &["--help"],
        &generate,
    ];
    for args in cases {
        for n_bytes in [0, 1] {
            let run = with_closed(args, false, n_bytes).exits(0);
            assert!(!run.stderr.contains("error"), "{args:?}: {}", run.stderr);
        }
    }
    // With standard error gone, what was asked for is still done.
    let run = with_closed(&generate, true, 0).exits(0);
    assert!(!run.stdout.is_empty());
    with_closed(&["inspect", &base], true, 0).exits(1);
    with_closed(&["inspect", &base], true, 1).exits(1);
    with_closed(&["inspect"], true, 0).exits(2);
    let out = place.text("b");
    let math = demo("math").to_str().unwrap().to_owned();
    with_closed(&["compress", &base, &math, "-o", &out], true, 0).exits(0);
    onebase(["verify", &base, &out]).exits(0);
}

#[test]
fn a_pipe_of_the_shell_ends_quietly() {
    let script = "\"$0\" completions bash 2>&1 | head -c 1";
    let run = Run::of(Command::new("sh").args(["-c", script, PROGRAM])).exits(0);
    assert_eq!((run.stdout.len(), run.stderr.as_str()), (1, ""));
}

#[test]
#[cfg(target_os = "linux")]
fn results_that_cannot_be_written_are_an_error() {
    for args in [&["codecs"][..], &["codecs", "--json"], &["completions", "bash"]] {
        let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
        let child = command(args).stdout(full).stderr(Stdio::piped()).spawn().unwrap();
        let run = Run::from(child.wait_with_output().unwrap()).exits(1);
        run.says(&["error: cannot write to standard output", "because: No space left on device"]);
    }
}
