//! What every member's Cargo.toml must say.

use super::Violation;

/// Members whose errors go to a person, not to a caller.
const ANYHOW_ALLOWED: [&str; 2] = ["onebase", "xtask"];
const INHERITED: [&str; 3] = ["edition", "license", "rust-version"];

/// A table of dependencies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Table {
    /// `[dependencies]`.
    Normal,
    /// `[dev-dependencies]`.
    Dev,
    /// `[build-dependencies]`.
    Build,
}

impl Table {
    fn named(name: &str) -> Option<Self> {
        match name {
            "dependencies" => Some(Table::Normal),
            "dev-dependencies" => Some(Table::Dev),
            "build-dependencies" => Some(Table::Build),
            _ => None,
        }
    }

    /// What one of its entries is called.
    pub(super) fn noun(self) -> &'static str {
        match self {
            Table::Normal => "dependency",
            Table::Dev => "dev-dependency",
            Table::Build => "build dependency",
        }
    }
}

/// An entry of a manifest: `key = value` in a section.
#[derive(Debug, PartialEq, Eq)]
struct Entry {
    line: usize,
    section: String,
    key: String,
    value: String,
}

impl Entry {
    /// Whether it is `NAME.workspace = true` or `NAME = { workspace = true, .. }`.
    fn inherits(&self, name: &str) -> bool {
        match self.key.strip_prefix(name) {
            Some(".workspace") => self.value == "true",
            Some("") => is_workspace_table(&self.value),
            _ => false,
        }
    }
}

fn is_workspace_table(value: &str) -> bool {
    let dense: String = value.chars().filter(|c| !c.is_whitespace()).collect();
    let table = dense.strip_prefix('{').and_then(|v| v.strip_suffix('}'));
    table.is_some_and(|t| t.split(',').any(|pair| pair == "workspace=true"))
}

/// The entries of a manifest. Values over several lines are joined.
fn entries(manifest: &str) -> Vec<Entry> {
    let mut entries: Vec<Entry> = Vec::new();
    let mut section = String::new();
    let mut depth = 0;
    for (i, text) in manifest.lines().enumerate() {
        let text = without_comment(text).trim();
        if depth > 0 {
            if let Some(entry) = entries.last_mut() {
                entry.value.push_str(text);
            }
            depth += brackets(text);
        } else if let Some(head) = text.strip_prefix('[') {
            section = head.trim_end_matches(']').trim_start_matches('[').trim().to_owned();
        } else if let Some((key, value)) = text.split_once('=') {
            depth = brackets(value);
            entries.push(Entry {
                line: i + 1,
                section: section.clone(),
                key: key.replace(['"', ' '], ""),
                value: value.trim().to_owned(),
            });
        }
    }
    entries
}

fn without_comment(line: &str) -> &str {
    let mut quoted = false;
    for (i, c) in line.char_indices() {
        match c {
            '"' => quoted = !quoted,
            '#' if !quoted => return &line[..i],
            _ => {}
        }
    }
    line
}

/// Brackets opened less brackets closed, outside of strings.
fn brackets(text: &str) -> i32 {
    let outside = text.split('"').step_by(2).flat_map(str::chars);
    outside
        .map(|c| match c {
            '[' | '{' => 1,
            ']' | '}' => -1,
            _ => 0,
        })
        .sum()
}

/// A dependency as a manifest names it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Dependency {
    /// Where it is first named.
    pub(super) line: usize,
    /// In which table.
    pub(super) table: Table,
    /// Its name there.
    pub(super) name: String,
    /// Whether the workspace says which one it is.
    from_workspace: bool,
}

/// All dependencies of a manifest, also those of one target only.
pub(super) fn dependencies(manifest: &str) -> Vec<Dependency> {
    let mut found: Vec<Dependency> = Vec::new();
    for entry in entries(manifest) {
        let mut section = entry.section.rsplit('.');
        let (last, before) = (section.next().unwrap_or_default(), section.next());
        let (table, name, from_workspace) = if let Some(table) = Table::named(last) {
            let name = entry.key.split('.').next().unwrap_or_default();
            (table, name, entry.inherits(name))
        } else if let Some(table) = before.and_then(Table::named) {
            let inherits = entry.key == "workspace" && entry.value == "true";
            (table, last.trim_matches('"'), inherits)
        } else {
            continue;
        };
        match found.iter_mut().find(|d| d.table == table && d.name == name) {
            Some(known) => known.from_workspace |= from_workspace,
            None => found.push(Dependency {
                line: entry.line,
                table,
                name: name.to_owned(),
                from_workspace,
            }),
        }
    }
    found
}

/// Inheritance from the workspace, and who may use `anyhow`.
pub(super) fn check(member: &str, path: &str, manifest: &str) -> Vec<Violation> {
    let mut found = Vec::new();
    let entries = entries(manifest);
    for key in INHERITED {
        if !entries.iter().any(|e| e.section == "package" && e.inherits(key)) {
            let line = entries.iter().find(|e| e.section == "package" && e.key == key);
            let what = format!("expected `{key}.workspace = true` in [package]");
            found.push(Violation::new(path, line.map_or(1, |e| e.line), what));
        }
    }
    let inherits_lints = entries.iter().any(|e| match e.section.as_str() {
        "lints" => e.key == "workspace" && e.value == "true",
        "" => e.inherits("lints"),
        _ => false,
    });
    if !inherits_lints {
        found.push(Violation::new(path, 1, "expected `workspace = true` in [lints]"));
    }
    for dependency in dependencies(manifest) {
        let (name, noun) = (&dependency.name, dependency.table.noun());
        if !dependency.from_workspace {
            let what = format!("{noun} `{name}`, expected `{name}.workspace = true`");
            found.push(Violation::new(path, dependency.line, what));
        }
        if name == "anyhow" && !ANYHOW_ALLOWED.contains(&member) {
            let what =
                format!("{noun} `anyhow`, expected only in {}", ANYHOW_ALLOWED.join(" and "));
            found.push(Violation::new(path, dependency.line, what));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"[package]
name = "a" # edition = "x"
version.workspace = true
edition.workspace = true
rust-version = { workspace = true }
license.workspace = true

[lints]
workspace = true

[[bench]]
name = "b"
harness = false

[dependencies]
one.workspace = true
two = { workspace = true, features = [
    "x", # }
    "y=[",
] }

[target.'cfg(unix)'.dependencies]
three.workspace = true
three.optional = true

[dev-dependencies.four]
workspace = true
features = ["z"]
"#;

    fn violations(member: &str, manifest: &str) -> Vec<String> {
        check(member, "a.toml", manifest).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn what_is_inherited_passes() {
        assert_eq!(violations("a", GOOD), [""; 0]);
        let dotted = GOOD.replace("[lints]\nworkspace = true\n", "");
        assert_eq!(violations("a", &format!("lints.workspace = true\n{dotted}")), [""; 0]);
    }

    #[test]
    fn every_way_to_name_a_dependency_is_seen() {
        let seen: Vec<_> =
            dependencies(GOOD).into_iter().map(|d| (d.line, d.table, d.name)).collect();
        let expected = [
            (16, Table::Normal, "one"),
            (17, Table::Normal, "two"),
            (23, Table::Normal, "three"),
            (27, Table::Dev, "four"),
        ];
        assert_eq!(seen, expected.map(|(l, t, n)| (l, t, n.to_owned())));
    }

    #[test]
    fn what_is_not_inherited_is_refused() {
        let own = GOOD.replace("edition.workspace = true", "edition = \"2021\"");
        assert_eq!(
            violations("a", &own),
            ["a.toml:4: expected `edition.workspace = true` in [package]"]
        );
        let none = GOOD.replace("license.workspace = true", "");
        assert_eq!(
            violations("a", &none),
            ["a.toml:1: expected `license.workspace = true` in [package]"]
        );
        let not =
            GOOD.replace("rust-version = { workspace = true }", "rust-version.workspace = false");
        assert_eq!(
            violations("a", &not),
            ["a.toml:1: expected `rust-version.workspace = true` in [package]"]
        );
        let lints =
            GOOD.replace("[lints]\nworkspace = true", "[lints.rust]\nmissing_docs = \"allow\"");
        assert_eq!(violations("a", &lints), ["a.toml:1: expected `workspace = true` in [lints]"]);
    }

    #[test]
    fn a_dependency_with_its_own_version_or_path_is_refused() {
        for own in ["one = \"1\"", "one = { version = \"1\" }", "one.path = \"../one\""] {
            let manifest = GOOD.replace("one.workspace = true", own);
            assert_eq!(
                violations("a", &manifest),
                ["a.toml:16: dependency `one`, expected `one.workspace = true`"]
            );
        }
        let section = GOOD.replace(
            "[dev-dependencies.four]\nworkspace = true",
            "[dev-dependencies.four]\npath = \"..\"",
        );
        assert_eq!(
            violations("a", &section),
            ["a.toml:27: dev-dependency `four`, expected `four.workspace = true`"]
        );
    }

    #[test]
    fn anyhow_is_for_programs() {
        let manifest = GOOD.replace("one.workspace", "anyhow.workspace");
        for program in ANYHOW_ALLOWED {
            assert_eq!(violations(program, &manifest), [""; 0]);
        }
        assert_eq!(
            violations("onebase-format", &manifest),
            ["a.toml:16: dependency `anyhow`, expected only in onebase and xtask"]
        );
    }
}
