//! The crate table of ARCHITECTURE.md against the workspace.

use std::path::Path;

use anyhow::{Context, Result};
use serde::Deserialize;

use super::Violation;
use super::manifest::{Table, dependencies};

/// What `cargo metadata` says, as far as it is looked at.
#[derive(Deserialize)]
pub(super) struct Metadata {
    /// The folder of the root manifest.
    pub(super) workspace_root: String,
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    manifest_path: String,
    dependencies: Vec<MetadataDependency>,
}

#[derive(Deserialize)]
struct MetadataDependency {
    name: String,
    kind: Option<String>,
}

/// A crate of the workspace.
pub(super) struct Member {
    /// Its name.
    pub(super) name: String,
    /// Its manifest, from the root of the repository.
    pub(super) manifest: String,
    /// Names of all it depends on, and how.
    dependencies: Vec<(String, Table)>,
}

impl Metadata {
    /// Reads the output of `cargo metadata --no-deps --format-version 1`.
    pub(super) fn parse(json: &str) -> Result<Self> {
        serde_json::from_str(json).context("reading the output of cargo metadata")
    }

    /// The crates of the workspace.
    pub(super) fn members(&self) -> Result<Vec<Member>> {
        let member = |package: &Package| {
            let path = Path::new(&package.manifest_path);
            let manifest = path.strip_prefix(&self.workspace_root).with_context(|| {
                format!("{}: expected a path in {}", package.manifest_path, self.workspace_root)
            })?;
            let dependencies = package.dependencies.iter().map(|d| {
                let table = match d.kind.as_deref() {
                    Some("dev") => Table::Dev,
                    Some("build") => Table::Build,
                    _ => Table::Normal,
                };
                (d.name.clone(), table)
            });
            Ok(Member {
                name: package.name.clone(),
                manifest: manifest.to_string_lossy().replace('\\', "/"),
                dependencies: dependencies.collect(),
            })
        };
        self.packages.iter().map(member).collect()
    }
}

/// A row of the crate table.
#[derive(Debug, PartialEq, Eq)]
struct Row {
    line: usize,
    name: String,
    allowed: Vec<String>,
}

/// The rows of the first table under `## Crates`.
fn parse_table(path: &str, markdown: &str) -> Result<Vec<Row>, Violation> {
    let lines = markdown.lines().enumerate().map(|(i, text)| (i + 1, text.trim()));
    let section = lines
        .skip_while(|(_, text)| *text != "## Crates")
        .skip(1)
        .take_while(|(_, text)| !text.starts_with("## "));
    let table = section
        .skip_while(|(_, text)| !text.starts_with('|'))
        .take_while(|(_, text)| text.starts_with('|'));
    let mut rows: Vec<Row> = Vec::new();
    // The first two lines are the heads of the columns and the rule below them.
    for (line, text) in table.skip(2) {
        let mut cells = text.trim_matches('|').split('|').map(str::trim);
        let name = cells.next().map(in_backticks).unwrap_or_default();
        let [name] = &name[..] else {
            let what = "the first column holds no crate, expected one name in backticks";
            return Err(Violation::new(path, line, what));
        };
        let cell = cells.next().unwrap_or_default();
        let allowed = in_backticks(cell);
        if allowed.is_empty() && cell != "–" {
            let what = format!(
                "the second column of `{name}` is {cell:?}, expected crates in backticks or –"
            );
            return Err(Violation::new(path, line, what));
        }
        let allowed = allowed.into_iter().map(str::to_owned).collect();
        rows.push(Row { line, name: (*name).to_owned(), allowed });
    }
    if rows.is_empty() {
        return Err(Violation::new(path, 1, "expected a table of crates under `## Crates`"));
    }
    Ok(rows)
}

fn in_backticks(text: &str) -> Vec<&str> {
    text.split('`').skip(1).step_by(2).collect()
}

/// Members in the table and no others, and no dependency that it does not allow.
pub(super) fn check<'a>(
    path: &str,
    markdown: &str,
    members: &[Member],
    manifest_text: impl Fn(&str) -> &'a str,
) -> Vec<Violation> {
    let rows = match parse_table(path, markdown) {
        Ok(rows) => rows,
        Err(violation) => return vec![violation],
    };
    let place = |name: &str| rows.iter().position(|r| r.name == name);
    let mut found = Vec::new();
    for (i, row) in rows.iter().enumerate() {
        if !members.iter().any(|m| m.name == row.name) {
            let what = format!("crate `{}` is no member of the workspace", row.name);
            found.push(Violation::new(path, row.line, what));
        }
        if place(&row.name) != Some(i) {
            let what = format!("crate `{}` has two rows, expected one", row.name);
            found.push(Violation::new(path, row.line, what));
        }
        for other in &row.allowed {
            if !rows[..i].iter().any(|r| r.name == *other) {
                let what = format!(
                    "`{}` may depend on `{other}`, expected only crates of earlier rows",
                    row.name
                );
                found.push(Violation::new(path, row.line, what));
            }
        }
    }
    for member in members {
        let Some(at) = place(&member.name) else {
            let what = format!("crate `{}` is missing in the table of {path}", member.name);
            found.push(Violation::new(&member.manifest, 1, what));
            continue;
        };
        let row = &rows[at];
        for (other, table) in &member.dependencies {
            if !members.iter().any(|m| m.name == *other) {
                continue;
            }
            let expected = match table {
                Table::Dev if place(other).is_some_and(|p| p < at) => continue,
                Table::Dev => format!("only crates of rows before `{}`", row.name),
                Table::Normal | Table::Build if row.allowed.contains(other) => continue,
                Table::Normal | Table::Build if row.allowed.is_empty() => "none".to_owned(),
                Table::Normal | Table::Build => format!("only {}", row.allowed.join(", ")),
            };
            let line = dependencies(manifest_text(&member.manifest))
                .iter()
                .find(|d| d.table == *table && d.name == *other)
                .map_or(1, |d| d.line);
            let what = format!(
                "{} on `{other}`, expected by {path}:{}: {expected}",
                table.noun(),
                row.line
            );
            found.push(Violation::new(&member.manifest, line, what));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "# Map\n\n## Crates\n\nWords.\n\n| crate | may depend on | for |\n\
                         |---|---|---|\n| `low` | – | a |\n| `mid` | `low` | `b` |\n\
                         | `top` | `low`, `mid` | c |\n\n## Next\n\n| `x` | `y` |\n";

    fn member(name: &str, dependencies: &[(&str, Table)]) -> Member {
        Member {
            name: name.to_owned(),
            manifest: format!("crates/{name}/Cargo.toml"),
            dependencies: dependencies.iter().map(|(n, t)| ((*n).to_owned(), *t)).collect(),
        }
    }

    fn violations(markdown: &str, members: &[Member], manifest: &'static str) -> Vec<String> {
        let found = check("A.md", markdown, members, |_| manifest);
        found.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn obeying_members_pass() {
        let members = [
            member("low", &[("serde", Table::Normal)]),
            member("mid", &[("low", Table::Normal), ("tempfile", Table::Dev)]),
            member("top", &[("low", Table::Build), ("mid", Table::Dev)]),
        ];
        assert_eq!(violations(TABLE, &members, ""), [""; 0]);
    }

    #[test]
    fn both_sides_must_name_every_crate() {
        let members = [member("low", &[]), member("mid", &[]), member("new", &[])];
        assert_eq!(
            violations(TABLE, &members, ""),
            [
                "A.md:11: crate `top` is no member of the workspace",
                "crates/new/Cargo.toml:1: crate `new` is missing in the table of A.md",
            ]
        );
    }

    #[test]
    fn an_edge_outside_the_table_is_refused_where_it_stands() {
        let members = [
            member("low", &[("mid", Table::Build)]),
            member("mid", &[("low", Table::Normal)]),
            member("top", &[]),
        ];
        let manifest = "[dependencies]\nlow.workspace = true\n\
                        [build-dependencies]\nmid.workspace = true\n";
        assert_eq!(
            violations(TABLE, &members, manifest),
            ["crates/low/Cargo.toml:4: build dependency on `mid`, expected by A.md:9: none"]
        );
        let narrow = TABLE.replace("| `top` | `low`, `mid` |", "| `top` | `mid` |");
        let members =
            [member("low", &[]), member("mid", &[]), member("top", &[("low", Table::Normal)])];
        assert_eq!(
            violations(&narrow, &members, manifest),
            ["crates/top/Cargo.toml:2: dependency on `low`, expected by A.md:11: only mid"]
        );
    }

    #[test]
    fn a_dev_dependency_may_look_down_and_not_up() {
        let members =
            [member("low", &[("top", Table::Dev)]), member("mid", &[]), member("top", &[])];
        let manifest = "[dependencies]\ntop.workspace = true\n\
                        [dev-dependencies]\ntop = { workspace = true }\n";
        assert_eq!(
            violations(TABLE, &members, manifest),
            ["crates/low/Cargo.toml:4: dev-dependency on `top`, expected by A.md:9: \
              only crates of rows before `low`"]
        );
    }

    #[test]
    fn the_table_itself_is_checked() {
        let members = [member("low", &[]), member("mid", &[]), member("top", &[])];
        let up = TABLE.replace("| `low` | – |", "| `low` | `top` |");
        assert_eq!(
            violations(&up, &members, ""),
            ["A.md:9: `low` may depend on `top`, expected only crates of earlier rows"]
        );
        let twice = TABLE.replace("| `top` | `low`, `mid` | c |", "| `mid` | – | c |");
        assert_eq!(
            violations(&twice, &members[..2], ""),
            ["A.md:11: crate `mid` has two rows, expected one"]
        );
        let empty = TABLE.replace("| `low` | – |", "| `low` | |");
        assert_eq!(
            violations(&empty, &members, ""),
            ["A.md:9: the second column of `low` is \"\", expected crates in backticks or –"]
        );
        let bare = TABLE.replace("| `low` | – |", "| low | – |");
        assert_eq!(
            violations(&bare, &members, ""),
            ["A.md:9: the first column holds no crate, expected one name in backticks"]
        );
        assert_eq!(
            violations("# Map\n", &members, ""),
            ["A.md:1: expected a table of crates under `## Crates`"]
        );
    }

    #[test]
    fn metadata_gives_members_and_kinds() {
        let json = r#"{"workspace_root": "/r", "version": 1, "packages": [
            {"name": "a", "manifest_path": "/r/x/Cargo.toml", "edition": "2024", "dependencies": [
                {"name": "b", "kind": null}, {"name": "c", "kind": "dev"},
                {"name": "d", "kind": "build"}]}]}"#;
        let members = Metadata::parse(json).unwrap().members().unwrap();
        assert_eq!(members.len(), 1);
        assert_eq!(members[0].manifest, "x/Cargo.toml");
        let kinds: Vec<Table> = members[0].dependencies.iter().map(|d| d.1).collect();
        assert_eq!(kinds, [Table::Normal, Table::Dev, Table::Build]);
        let outside = json.replace("/r/x/", "/s/x/");
        assert!(Metadata::parse(&outside).unwrap().members().is_err());
        assert!(Metadata::parse("{}").is_err());
    }
}
