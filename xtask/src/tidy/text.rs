//! Checks of all text: paths of one machine, links that lead nowhere.

use std::collections::BTreeSet;

use super::Violation;

/// First folders of absolute paths that exist on one machine only.
const MACHINE_ROOTS: [&str; 5] = ["home", "root", "work", "tmp", "Users"];
/// Generated files and data, where a path is content.
const DATA_EXTENSIONS: [&str; 2] = ["lock", "jsonl"];
const DATA_FOLDERS: [&str; 2] = ["demo/", "fixtures/reference/"];

fn is_data(path: &str) -> bool {
    let name = path.rsplit('/').next().unwrap_or(path);
    let extension = name.rsplit_once('.').map(|(_, e)| e).unwrap_or_default();
    name == "tokenizer.json"
        || DATA_EXTENSIONS.contains(&extension)
        || (extension == "txt" && DATA_FOLDERS.iter().any(|f| path.starts_with(f)))
}

/// Absolute paths below a folder of one machine.
pub(super) fn check_machine_paths(path: &str, text: &str) -> Vec<Violation> {
    if is_data(path) {
        return Vec::new();
    }
    let mut found = Vec::new();
    for (i, line) in text.lines().enumerate() {
        for (start, _) in line.match_indices('/') {
            // A slash inside a longer path, a relative one or an address is none of a root.
            let inside = |c: char| c.is_alphanumeric() || "_-.~/})>*".contains(c);
            if line[..start].chars().next_back().is_some_and(inside) {
                continue;
            }
            let mut parts = line[start + 1..].split('/');
            let (root, below) = (parts.next().unwrap_or_default(), parts.next());
            let is_name = |c: char| c.is_alphanumeric() || c == '_';
            if MACHINE_ROOTS.contains(&root) && below.is_some_and(|b| b.starts_with(is_name)) {
                let what = format!("path of one machine below /{root}, expected none");
                found.push(Violation::new(path, i + 1, what));
            }
        }
    }
    found
}

/// Links to files, and paths of crates in backticks, that lead nowhere.
///
/// `paths` are the files of the repository; the document lies at its root.
pub(super) fn check_links(path: &str, markdown: &str, paths: &BTreeSet<String>) -> Vec<Violation> {
    let mut found = Vec::new();
    let mut fenced = false;
    for (i, line) in markdown.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
        } else if !fenced {
            let links = link_targets(line).into_iter().map(|t| ("link to", t));
            let mentions = crate_paths(line).into_iter().map(|t| ("path", t));
            for (kind, target) in links.chain(mentions) {
                if !exists(target, paths) {
                    let what = format!("{kind} `{target}`, expected a file or folder that exists");
                    found.push(Violation::new(path, i + 1, what));
                }
            }
        }
    }
    found
}

/// The targets of `[..](target)` in a line that are files, without their anchors.
fn link_targets(line: &str) -> Vec<&str> {
    // What stands in backticks is text; the pieces between them are looked at one by one.
    let prose = blank_code(line);
    let mut targets = Vec::new();
    for (start, _) in prose.match_indices("](") {
        let rest = &line[start + 2..];
        let Some(end) = prose[start + 2..].find(')') else { continue };
        // A title may follow the target.
        let target = rest[..end].split_whitespace().next().unwrap_or_default();
        let target = target.trim_start_matches('<').trim_end_matches('>');
        let file = target.split('#').next().unwrap_or_default();
        if !file.is_empty() && !has_scheme(file) {
            targets.push(file);
        }
    }
    targets
}

/// The line with what stands in backticks replaced, byte for byte.
fn blank_code(line: &str) -> String {
    let mut code = false;
    let mut prose = String::with_capacity(line.len());
    for c in line.chars() {
        code ^= c == '`';
        if code { prose.extend(std::iter::repeat_n(' ', c.len_utf8())) } else { prose.push(c) }
    }
    prose
}

fn has_scheme(target: &str) -> bool {
    let (scheme, rest) = target.split_once(':').unwrap_or_default();
    target.starts_with("//")
        || (!rest.is_empty() && !scheme.is_empty() && scheme.chars().all(char::is_alphanumeric))
}

/// Words in backticks that name something under `crates/`, patterns left out.
fn crate_paths(line: &str) -> Vec<&str> {
    let is_pattern = |c: char| c.is_whitespace() || "*?<>{}[]$…".contains(c);
    let code = line.split('`').skip(1).step_by(2);
    code.filter(|c| c.strip_prefix("crates/").is_some_and(|c| !c.is_empty()))
        .filter(|c| !c.contains(is_pattern))
        .collect()
}

/// Whether a relative path is a file of the repository or a folder of one.
fn exists(target: &str, paths: &BTreeSet<String>) -> bool {
    let mut parts = Vec::new();
    for part in target.split('/') {
        match part {
            "" | "." => {}
            ".." if parts.pop().is_none() => return false,
            ".." => {}
            part => parts.push(part),
        }
    }
    let path = parts.join("/");
    let folder = format!("{path}/");
    path.is_empty()
        || (paths.contains(&path) && !target.ends_with('/'))
        || paths.range(folder.clone()..).next().is_some_and(|p| p.starts_with(&folder))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(found: &[Violation]) -> Vec<String> {
        found.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn paths_of_one_machine_are_refused() {
        for root in MACHINE_ROOTS {
            for (before, after) in [("", ""), ("see `", "`"), ("\"", "\""), ("file=", " x")] {
                let text = format!("one\n{before}/{root}/me/x{after}\n");
                assert_eq!(
                    strings(&check_machine_paths("a.md", &text)),
                    [format!("a.md:2: path of one machine below /{root}, expected none")]
                );
            }
        }
    }

    #[test]
    fn other_paths_are_no_machine_paths() {
        let (tmp, home) = ("tmp", "home");
        let fine = format!(
            "target/{tmp}/x ./{tmp}/x ~/{home}/x https://host/{home}/x {{dir}}/{tmp}/x /{tmp}/\n\
             /usr/{tmp}/x /{tmp} /{tmp}/$NAME /{tmp}/... /{tmp}file/x a /{home}-made/x\n"
        );
        assert_eq!(strings(&check_machine_paths("a.md", &fine)), [""; 0]);
    }

    #[test]
    fn data_may_hold_any_path() {
        let text = format!("/{}/me", MACHINE_ROOTS[0]);
        for data in ["Cargo.lock", "a/b.jsonl", "a/tokenizer.json", "demo/x/y.txt"] {
            assert_eq!(strings(&check_machine_paths(data, &text)), [""; 0]);
        }
        for path in ["a.txt", "demo/README.md", "fixtures/reference/a.json", "lock", "a.rs"] {
            assert_eq!(check_machine_paths(path, &text).len(), 1, "{path}");
        }
    }

    fn repository() -> BTreeSet<String> {
        ["README.md", "crates/a/src/lib.rs", "docs/guide.md"].map(str::to_owned).into()
    }

    #[test]
    fn links_that_lead_somewhere_pass() {
        let markdown = "[a](README.md) and [b](docs/guide.md#part \"title\"), [c](#here)\n\
                        [d](https://example.org/x.md) [e](mailto:a@b.c) ![f](<crates/a>)\n\
                        [g](./docs/../crates/a/) [h](/README.md) `crates/a/src/lib.rs`\n\
                        `crates/*/src` `crates/NAME x` `crates/` `[i](gone.md)` `vec[0](x)`\n\
                        ```\n[j](gone.md) `crates/gone`\n```\n";
        assert_eq!(strings(&check_links("README.md", markdown, &repository())), [""; 0]);
    }

    #[test]
    fn links_that_lead_nowhere_are_refused() {
        let markdown = "ä `x` [a](gone.md)\n[b](docs/guide.md/) [c](../out.md)\n`crates/b/x`\n\
                        [`d`](docs/gone.md#x) [e](doc)\n";
        assert_eq!(
            strings(&check_links("README.md", markdown, &repository())),
            [
                "README.md:1: link to `gone.md`, expected a file or folder that exists",
                "README.md:2: link to `docs/guide.md/`, expected a file or folder that exists",
                "README.md:2: link to `../out.md`, expected a file or folder that exists",
                "README.md:3: path `crates/b/x`, expected a file or folder that exists",
                "README.md:4: link to `docs/gone.md`, expected a file or folder that exists",
                "README.md:4: link to `doc`, expected a file or folder that exists",
            ]
        );
    }
}
