//! The program, run on the demo family and on small checkpoints.

// Each test binary uses a part of it.
#![allow(dead_code)]
// Helpers of tests may panic as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;
use tempfile::TempDir;

pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_onebase");

/// A question of arithmetic, and what the fine-tune for it answers.
pub(crate) const QUESTION: &str =
    "Lea has 77 apples and gets 4 more. How many apples does Lea have?";
pub(crate) const ANSWER: &str = "77 + 4 = 81";

pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

pub(crate) fn demo(name: &str) -> PathBuf {
    root().join("demo").join(name)
}

pub(crate) fn fixture(name: &str) -> PathBuf {
    root().join("fixtures/reference").join(name)
}

/// The program with arguments, in an environment that says nothing to it.
pub(crate) fn command<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(PROGRAM);
    command.args(args).env_remove("ONEBASE_KERNELS").env_remove("ONEBASE_THREADS");
    command
}

/// What a run ended with.
pub(crate) struct Run {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Run {
    pub(crate) fn of(command: &mut Command) -> Self {
        Self::from(command.output().unwrap())
    }

    /// Checks the exit code, and that nothing panicked.
    #[track_caller]
    pub(crate) fn exits(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "{}\n{}", self.stdout, self.stderr);
        assert!(!self.stderr.contains("panicked"), "{}", self.stderr);
        self
    }

    /// Checks that standard error has these texts, one after the other.
    #[track_caller]
    pub(crate) fn says(self, texts: &[&str]) -> Self {
        let mut rest = self.stderr.as_str();
        for text in texts {
            match rest.find(text) {
                Some(at) => rest = &rest[at + text.len()..],
                None => panic!("expected {text:?} in {:?}", self.stderr),
            }
        }
        self
    }

    /// The one JSON object on standard output.
    #[track_caller]
    pub(crate) fn object(&self) -> Value {
        let mut values = serde_json::Deserializer::from_str(&self.stdout).into_iter::<Value>();
        let object = values.next().unwrap().unwrap();
        assert!(object.is_object(), "{object}");
        assert!(values.next().is_none(), "more than one value: {}", self.stdout);
        object
    }
}

impl From<Output> for Run {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

pub(crate) fn onebase<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Run {
    Run::of(&mut command(args))
}

/// A folder for what the program writes.
pub(crate) struct Place {
    pub(crate) dir: TempDir,
}

impl Place {
    pub(crate) fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    /// Names of what is in it, also of what is hidden.
    pub(crate) fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.dir.path()).unwrap();
        let mut names: Vec<String> =
            entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// Compresses a fine-tune of the demo into the folder `name`.
    #[track_caller]
    pub(crate) fn compress(&self, fine_tune: &str, codec: &str, name: &str) -> Run {
        onebase(compress_args(&demo(fine_tune), codec, &self.path(name))).exits(0)
    }
}

pub(crate) fn compress_args(fine_tune: &Path, codec: &str, out: &Path) -> Vec<String> {
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let (base, fine_tune, out) = (text(&demo("base")), text(fine_tune), text(out));
    ["compress", &base, &fine_tune, "--codec", codec, "--out", &out].map(str::to_owned).into()
}

/// The files of a folder by name.
pub(crate) fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(dir).unwrap().map(Result::unwrap);
    entries
        .map(|e| (e.file_name().into_string().unwrap(), std::fs::read(e.path()).unwrap()))
        .collect()
}

/// Copies a folder of files.
pub(crate) fn copy(from: &Path, to: &Path) {
    std::fs::create_dir(to).unwrap();
    for (name, bytes) in contents(from) {
        std::fs::write(to.join(name), bytes).unwrap();
    }
}
