//! Checks of Rust source: what stands in the code, not in comments or strings.

use super::Violation;

const MAX_LINES: usize = 700;
/// Where `unsafe` may stand: folders end with `/`.
const UNSAFE_ALLOWED: [&str; 2] = ["crates/onebase-kernels/", "crates/onebase-format/src/map.rs"];
const LEFT_OVER_MACROS: [&str; 3] = ["todo", "unimplemented", "dbg"];

/// The source with comments, strings and characters replaced by blanks, line for line.
fn code_only(source: &str) -> String {
    let chars: Vec<char> = source.chars().collect();
    let at = |i: usize| chars.get(i).copied().unwrap_or('\0');
    let mut code = String::with_capacity(source.len());
    let mut i = 0;
    while i < chars.len() {
        let end = match (at(i), at(i + 1)) {
            ('/', '/') => {
                let line = chars[i..].iter().position(|c| *c == '\n');
                line.map_or(chars.len(), |n| i + n)
            }
            ('/', '*') => end_of_block_comment(&chars, i),
            ('"', _) => end_of_string(&chars, i),
            ('r', '"' | '#') if starts_token(&chars, i) => match end_of_raw_string(&chars, i) {
                Some(end) => end,
                None => i,
            },
            ('\'', '\\') => {
                let close = chars.iter().skip(i + 3).position(|c| *c == '\'');
                close.map_or(chars.len(), |n| i + 3 + n + 1)
            }
            // With one character and no closing quote it is a lifetime.
            ('\'', _) if at(i + 2) == '\'' => i + 3,
            _ => i,
        };
        if end == i {
            code.push(chars[i]);
            i += 1;
        } else {
            let end = end.min(chars.len());
            code.extend(chars[i..end].iter().map(|c| if *c == '\n' { '\n' } else { ' ' }));
            i = end;
        }
    }
    code
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Whether the `r` at `i` begins a token, `b` and `c` before it counted in.
fn starts_token(chars: &[char], i: usize) -> bool {
    let before = |n: usize| i.checked_sub(n).map(|j| chars[j]);
    match before(1) {
        Some('b' | 'c') => !before(2).is_some_and(is_word),
        other => !other.is_some_and(is_word),
    }
}

fn end_of_block_comment(chars: &[char], start: usize) -> usize {
    let (mut i, mut depth) = (start, 0);
    while i < chars.len() {
        match (chars[i], chars.get(i + 1)) {
            ('/', Some('*')) => {
                depth += 1;
                i += 2;
            }
            ('*', Some('/')) => {
                depth -= 1;
                i += 2;
                if depth == 0 {
                    break;
                }
            }
            _ => i += 1,
        }
    }
    i
}

fn end_of_string(chars: &[char], start: usize) -> usize {
    let mut i = start + 1;
    while i < chars.len() && chars[i] != '"' {
        i += if chars[i] == '\\' { 2 } else { 1 };
    }
    i + 1
}

/// `None` when it is a raw identifier.
fn end_of_raw_string(chars: &[char], start: usize) -> Option<usize> {
    let n_hashes = chars[start + 1..].iter().take_while(|c| **c == '#').count();
    let open = start + 1 + n_hashes;
    if chars.get(open) != Some(&'"') {
        return None;
    }
    let mut i = open + 1;
    while i < chars.len() {
        let hashes = chars[i + 1..].iter().take(n_hashes);
        if chars[i] == '"' && hashes.filter(|c| **c == '#').count() == n_hashes {
            return Some(i + 1 + n_hashes);
        }
        i += 1;
    }
    Some(i)
}

/// The words of the code, each with its line, what stands before it and what after it.
fn words(code: &str) -> impl Iterator<Item = (usize, &str, &str, &str)> {
    let mut rest = 0;
    let mut line = 1;
    std::iter::from_fn(move || {
        let skipped = code[rest..].find(is_word)?;
        line += code[rest..rest + skipped].matches('\n').count();
        let start = rest + skipped;
        let len = code[start..].find(|c| !is_word(c)).unwrap_or(code.len() - start);
        rest = start + len;
        Some((line, &code[start..rest], &code[..start], &code[rest..]))
    })
}

/// The word before the nearest bracket that is still open.
fn enclosing(before: &str) -> &str {
    let mut depth = 0;
    for (i, c) in before.char_indices().rev() {
        match c {
            ')' => depth += 1,
            '(' if depth == 0 => {
                let head = before[..i].trim_end();
                return &head[head.rfind(|c| !is_word(c)).map_or(0, |j| j + 1)..];
            }
            '(' => depth -= 1,
            _ => {}
        }
    }
    ""
}

/// `unsafe` and the leave to write it, outside the places that have it.
pub(super) fn check_unsafe(path: &str, source: &str) -> Vec<Violation> {
    let allowed =
        UNSAFE_ALLOWED.iter().any(|a| path == *a || (a.ends_with('/') && path.starts_with(a)));
    if allowed {
        return Vec::new();
    }
    let expected = format!("expected only in {}", UNSAFE_ALLOWED.join(" and "));
    let code = code_only(source);
    words(&code)
        .filter_map(|(line, word, before, _)| {
            let what = match word {
                "unsafe" => "`unsafe`".to_owned(),
                "unsafe_code" => match enclosing(before) {
                    level @ ("allow" | "expect" | "warn") => format!("`{level}(unsafe_code)`"),
                    _ => return None,
                },
                _ => return None,
            };
            Some(Violation::new(path, line, format!("{what}, {expected}")))
        })
        .collect()
}

/// Files that are too long to read.
pub(super) fn check_length(path: &str, source: &str) -> Option<Violation> {
    let n_lines = source.lines().count();
    (n_lines > MAX_LINES).then(|| {
        let what = format!("{n_lines} lines, expected at most {MAX_LINES}");
        Violation::new(path, MAX_LINES + 1, what)
    })
}

/// What is written on the way and must not stay.
pub(super) fn check_left_over(path: &str, source: &str) -> Vec<Violation> {
    let code = code_only(source);
    words(&code)
        .filter_map(|(line, word, before, after)| {
            let attribute = before.trim_end().strip_suffix('[').map(str::trim_end);
            let what = if word == "ignore" && attribute.is_some_and(|b| b.ends_with('#')) {
                "`#[ignore]`, expected a test that runs".to_owned()
            } else if LEFT_OVER_MACROS.contains(&word) && is_call_of_macro(after) {
                format!("`{word}!`, expected finished code")
            } else {
                return None;
            };
            Some(Violation::new(path, line, what))
        })
        .collect()
}

/// Whether `!` and a bracket follow: `!=` is a comparison.
fn is_call_of_macro(after: &str) -> bool {
    let arguments = after.trim_start().strip_prefix('!').map(str::trim_start);
    arguments.is_some_and(|a| a.starts_with(['(', '[', '{']))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(found: impl IntoIterator<Item = Violation>) -> Vec<String> {
        found.into_iter().map(|v| v.to_string()).collect()
    }

    #[test]
    fn only_code_is_left() {
        let source = r###"a // x "
b /* y /* z */
y */ c "\" d" e 'f' g '\'' h '\u{1}' <'i> r"\" j b"k" br##"l "# "## r#m for"n"
"###;
        let code: Vec<String> = code_only(source)
            .lines()
            .map(|l| l.split_whitespace().collect::<Vec<_>>().join(" "))
            .collect();
        assert_eq!(code, ["a", "b", "c e g h <'i> j b b r#m for"]);
        assert_eq!(code_only(source).chars().count(), source.chars().count());
        for open in ["\"", "\"\\", "r#\"", "/*", "'\\", "'", "r", "r#", "//"] {
            code_only(open);
        }
    }

    #[test]
    fn unsafe_stands_only_where_it_may() {
        let source = "#![allow(unsafe_code)]\nfn f() {\n    unsafe { g() }\n}\n";
        for path in ["crates/onebase-kernels/src/a.rs", "crates/onebase-format/src/map.rs"] {
            assert_eq!(strings(check_unsafe(path, source)), [""; 0]);
        }
        let expected =
            "expected only in crates/onebase-kernels/ and crates/onebase-format/src/map.rs";
        for path in ["crates/onebase-format/src/map.rs/a.rs", "crates/onebase-kernels2/src/a.rs"] {
            assert_eq!(
                strings(check_unsafe(path, source)),
                [
                    format!("{path}:1: `allow(unsafe_code)`, {expected}"),
                    format!("{path}:3: `unsafe`, {expected}"),
                ]
            );
        }
    }

    #[test]
    fn words_about_unsafe_are_no_unsafe() {
        let source = "// unsafe\n#![deny(unsafe_code)]\n#![forbid(missing_docs, unsafe_code)]\n\
                      #![warn(unsafe_op_in_unsafe_fn)]\nconst A: &str = \"unsafe { }\";\n";
        assert_eq!(strings(check_unsafe("a.rs", source)), [""; 0]);
        let nested = "#![cfg_attr(all(unix, test),\n    allow(dead_code, unsafe_code))]\n";
        assert_eq!(check_unsafe("a.rs", nested).len(), 1);
        assert_eq!(check_unsafe("a.rs", nested)[0].line, 2);
    }

    #[test]
    fn a_file_has_at_most_seven_hundred_lines() {
        let source = "//\n".repeat(MAX_LINES);
        assert_eq!(check_length("a.rs", &source), None);
        assert_eq!(
            strings(check_length("a.rs", &(source + "//"))),
            ["a.rs:701: 701 lines, expected at most 700"]
        );
    }

    #[test]
    fn left_overs_are_refused_in_code_only() {
        let source = "#[test]\n#[ignore = \"slow\"]\nfn t() {\n    todo!()\n}\n# [ ignore ]\n\
                      fn u() { core::unimplemented! {} }\nlet x = dbg!(y);\n";
        assert_eq!(
            strings(check_left_over("a.rs", source)),
            [
                "a.rs:2: `#[ignore]`, expected a test that runs",
                "a.rs:4: `todo!`, expected finished code",
                "a.rs:6: `#[ignore]`, expected a test that runs",
                "a.rs:7: `unimplemented!`, expected finished code",
                "a.rs:8: `dbg!`, expected finished code",
            ]
        );
        let fine = "// todo!()\nlet todo = \"dbg!(x)\";\nif todo != ignore[0] {}\n\
                    #[rustfmt::skip]\nfn ignore() {}\n";
        assert_eq!(strings(check_left_over("a.rs", fine)), [""; 0]);
    }
}
