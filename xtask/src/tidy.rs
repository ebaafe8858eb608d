//! Checks of the repository. Each is a function from text to violations; only this file reads
//! the disk.

mod layers;
mod manifest;
mod source;
mod text;

use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, ensure};

const ARCHITECTURE: &str = "ARCHITECTURE.md";
const WITH_LINKS: [&str; 3] = ["README.md", ARCHITECTURE, "CONTRIBUTING.md"];

/// Something that is not as it must be.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Violation {
    /// The file, from the root of the repository.
    path: String,
    /// The line, from 1.
    line: usize,
    /// What is wrong, and what was expected.
    what: String,
}

impl Violation {
    fn new(path: &str, line: usize, what: impl Into<String>) -> Self {
        Self { path: path.to_owned(), line, what: what.into() }
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.path, self.line, self.what)
    }
}

/// A text file of the repository.
struct TextFile {
    /// From the root of the repository, with `/`.
    path: String,
    text: String,
}

impl TextFile {
    fn is_rust(&self) -> bool {
        Path::new(&self.path).extension().is_some_and(|e| e == "rs")
    }
}

/// Runs every check; fails when there is a violation.
pub(crate) fn run() -> Result<ExitCode> {
    let metadata = layers::Metadata::parse(&output(
        Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())).args([
            "metadata",
            "--no-deps",
            "--format-version",
            "1",
            "--offline",
        ]),
    )?)?;
    let root = Path::new(&metadata.workspace_root);
    let paths = repository_files(root)?;
    let files = text_files(root, &paths)?;
    let checks = check(&metadata, &paths, &files)?;
    let n_violations: usize = checks.iter().map(Vec::len).sum();
    if n_violations == 0 {
        println!("tidy: {} checks passed", checks.len());
        return Ok(ExitCode::SUCCESS);
    }
    for violation in checks.iter().flatten() {
        eprintln!("{violation}");
    }
    let noun = if n_violations == 1 { "violation" } else { "violations" };
    eprintln!("tidy: {n_violations} {noun}");
    Ok(ExitCode::FAILURE)
}

/// The violations of each check.
fn check(
    metadata: &layers::Metadata,
    paths: &BTreeSet<String>,
    files: &[TextFile],
) -> Result<Vec<Vec<Violation>>> {
    let text_of = |path: &str| {
        let file = files.iter().find(|f| f.path == path);
        file.map(|f| f.text.as_str())
            .with_context(|| format!("{path}: expected a text file of the repository"))
    };
    let members = metadata.members()?;
    let manifests: Vec<(&str, &str, &str)> = members
        .iter()
        .map(|m| Ok((m.name.as_str(), m.manifest.as_str(), text_of(&m.manifest)?)))
        .collect::<Result<_>>()?;
    let rust = || files.iter().filter(|f| f.is_rust());
    Ok(vec![
        layers::check(ARCHITECTURE, text_of(ARCHITECTURE)?, &members, |path| {
            text_of(path).unwrap_or_default()
        }),
        rust().flat_map(|f| source::check_unsafe(&f.path, &f.text)).collect(),
        manifests.iter().flat_map(|(name, path, text)| manifest::check(name, path, text)).collect(),
        rust().flat_map(|f| source::check_length(&f.path, &f.text)).collect(),
        rust().flat_map(|f| source::check_left_over(&f.path, &f.text)).collect(),
        files.iter().flat_map(|f| text::check_machine_paths(&f.path, &f.text)).collect(),
        files
            .iter()
            .filter(|f| WITH_LINKS.contains(&f.path.as_str()))
            .flat_map(|f| text::check_links(&f.path, &f.text, paths))
            .collect(),
    ])
}

/// The files that git tracks or would add.
fn repository_files(root: &Path) -> Result<BTreeSet<String>> {
    let mut git = Command::new("git");
    git.current_dir(root).args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"]);
    // A tracked file that was deleted is still listed; a submodule is a folder.
    let listed = output(&mut git)?;
    let names = listed.split('\0').filter(|n| root.join(n).is_file());
    Ok(names.map(str::to_owned).collect())
}

/// Those of the files that are text.
fn text_files(root: &Path, paths: &BTreeSet<String>) -> Result<Vec<TextFile>> {
    let mut files = Vec::new();
    for path in paths {
        let bytes = std::fs::read(root.join(path)).with_context(|| format!("reading {path}"))?;
        if bytes.contains(&0) {
            continue;
        }
        if let Ok(text) = String::from_utf8(bytes) {
            files.push(TextFile { path: path.clone(), text });
        }
    }
    Ok(files)
}

/// The standard output of a command that succeeds.
fn output(command: &mut Command) -> Result<String> {
    let out = command.output().with_context(|| format!("running {command:?}"))?;
    ensure!(
        out.status.success(),
        "{command:?}: {}: {}",
        out.status,
        String::from_utf8_lossy(&out.stderr).trim()
    );
    String::from_utf8(out.stdout).with_context(|| format!("the output of {command:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn violations_read_like_compiler_messages() {
        let violation = Violation::new("a/b.rs", 3, "found x, expected y");
        assert_eq!(violation.to_string(), "a/b.rs:3: found x, expected y");
    }

    #[test]
    fn all_checks_run_on_a_small_repository() {
        let metadata = layers::Metadata::parse(
            r#"{"workspace_root": "/r", "packages": [
                {"name": "low", "manifest_path": "/r/low/Cargo.toml", "dependencies": []}]}"#,
        )
        .unwrap();
        let file =
            |path: &str, text: &str| TextFile { path: path.to_owned(), text: text.to_owned() };
        let manifest = "[package]\nname = \"low\"\nedition.workspace = true\n\
                        license.workspace = true\nrust-version.workspace = true\n\
                        [lints]\nworkspace = true\n";
        let table = "## Crates\n| crate | may depend on |\n|---|---|\n| `low` | – |\n";
        let mut files = vec![
            file(ARCHITECTURE, table),
            file("low/Cargo.toml", manifest),
            file("low/src/lib.rs", "//! Low.\n"),
        ];
        let paths: BTreeSet<String> = files.iter().map(|f| f.path.clone()).collect();
        let checks = check(&metadata, &paths, &files).unwrap();
        assert_eq!(checks, vec![vec![]; 7]);

        files[2].text = "fn f() { unsafe { todo!() } }\n".to_owned();
        files[0].text.push_str("[gone](low/src/gone.rs)\n");
        let checks = check(&metadata, &paths, &files).unwrap();
        let counts: Vec<usize> = checks.iter().map(Vec::len).collect();
        assert_eq!(counts, [0, 1, 0, 0, 1, 0, 1]);
    }
}
