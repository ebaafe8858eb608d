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

/// A fine-tune with a named pipe among its files: compressing it waits at the
/// pipe, everything read and nothing named.
fn endless(place: &Place) -> std::path::PathBuf {
    let dir = place.path("math");
    copy(&demo("math"), &dir);
    let pipe = dir.join("vocab.json");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    dir
}

/// Starts a run that waits at the pipe of an [`endless`] fine-tune.
fn waiting(place: &Place, codec: &str) -> Child {
    let args = compress_args(&place.path("math"), codec, &place.path("out"));
    let child = silent(command(args)).spawn().unwrap();
    wait_until("the run has begun", || place.path(".out.partial").join(".lock").exists());
    child
}

fn kill(mut child: Child) -> std::process::ExitStatus {
    child.kill().unwrap();
    child.wait().unwrap()
}

/// What a run that nobody disturbs writes.
fn undisturbed(place: &Place, fine_tune: &Path, codec: &str) {
    onebase(compress_args(fine_tune, codec, &place.path("undisturbed"))).exits(0);
}

#[test]
fn a_killed_run_leaves_nothing_under_the_name_and_the_next_one_succeeds() {
    let place = Place::new();
    let fine_tune = endless(&place);
    let child = waiting(&place, "dense");
    assert!(!place.path("out").exists());
    let status = kill(child);
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(9));
    assert_eq!(place.names(), [".out.partial", "math"]);

    std::fs::remove_file(fine_tune.join("vocab.json")).unwrap();
    onebase(compress_args(&fine_tune, "dense", &place.path("out"))).exits(0);
    undisturbed(&place, &fine_tune, "dense");
    assert!(contents(&place.path("out")) == contents(&place.path("undisturbed")));
    assert_eq!(place.names(), ["math", "out", "undisturbed"]);
}

#[test]
fn a_run_killed_while_it_writes_leaves_nothing_under_the_name() {
    let place = Place::new();
    undisturbed(&place, &demo("math"), "dense");
    let args = compress_args(&demo("math"), "dense", &place.path("out"));
    let file = place.path(".out.partial").join("linear-00001.safetensors");
    // It may be done before the kill comes: then again.
    let n_killed = (0..20).filter(|_| {
        let mut child = silent(command(&args)).spawn().unwrap();
        wait_until("it writes or is done", || file.exists() || child.try_wait().unwrap().is_some());
        kill(child);
        if place.path("out").exists() {
            assert!(contents(&place.path("out")) == contents(&place.path("undisturbed")));
            std::fs::remove_dir_all(place.path("out")).unwrap();
            return false;
        }
        true
    });
    assert!(n_killed.count() > 0, "no run was killed while it wrote");
    onebase(&args).exits(0);
    assert!(contents(&place.path("out")) == contents(&place.path("undisturbed")));
    assert_eq!(place.names(), ["out", "undisturbed"]);
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
    let fine_tune = endless(&place);
    let child = waiting(&place, "sign");
    let second = onebase(compress_args(&demo("math"), "sign", &place.path("out"))).exits(1);
    second.says(&["error: another process is writing", "out"]);
    // The first goes on when the pipe gives what it waits for.
    std::fs::write(fine_tune.join("vocab.json"), "{}").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(place.names(), ["math", "out"]);
    assert_eq!(contents(&place.path("out"))["vocab.json"], b"{}");
}

#[test]
fn a_full_disk_leaves_nothing() {
    let place = Place::new();
    place.compress("math", "sign", "a");
    let (base, a, out) = (demo("base"), place.path("a"), place.path("out"));
    let restore =
        ["restore".as_ref(), base.as_os_str(), a.as_os_str(), "-o".as_ref(), out.as_os_str()];
    let mut runs: Vec<Vec<std::ffi::OsString>> = vec![restore.map(Into::into).into()];
    for codec in ["dense", "rtn", "sign"] {
        let args = compress_args(&demo("math"), codec, &out);
        runs.push(args.into_iter().map(Into::into).collect());
    }
    for args in runs {
        // No file may grow past 64 blocks; writing on is an error, no signal.
        let script = "ulimit -f 64; trap '' XFSZ; exec \"$0\" \"$@\"";
        let mut limited = Command::new("sh");
        limited.args(["-c", script, PROGRAM]).args(&args);
        limited.env_remove("ONEBASE_KERNELS").env_remove("ONEBASE_THREADS");
        let run = Run::of(&mut limited).exits(1);
        assert_eq!(run.stdout, "");
        run.says(&[
            "error: cannot write",
            ".out.partial",
            "safetensors",
            "because: File too large",
        ]);
        assert_eq!(place.names(), ["a"]);
    }
}

#[test]
fn a_folder_that_cannot_be_written_is_named() {
    let place = Place::new();
    std::fs::write(place.path("file"), "x").unwrap();
    let out = place.path("file").join("out");
    let run = onebase(compress_args(&demo("math"), "sign", &out)).exits(1);
    run.says(&["error: cannot create", ".out.partial", "because: Not a directory"]);
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
