//! What models are calibrated on is nothing that they are judged by.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use onebase_eval::Task;

/// Shorter lines are alike by chance.
const LINE_CHARS: usize = 40;

/// The lines of a text that are long enough to be somebody's own.
fn lines(text: &str) -> BTreeSet<&str> {
    text.lines().map(str::trim).filter(|line| line.chars().count() >= LINE_CHARS).collect()
}

/// Whether a line is of one of the two generators of the texts that write so few lines
/// that two of their documents share some: how a word is spelt, and the greatest, the least
/// and the sum of two or more numbers.
fn is_of_few(line: &str) -> bool {
    let spelt = line.contains("; reversed ") && line.ends_with(" letters");
    spelt || line.starts_with("max [") && line.contains("] ") && line.contains(" sum [")
}

/// What the user asks in a task's questions, each as it lies in its file.
fn questions(path: &Path) -> Vec<String> {
    Task::read(path).unwrap();
    let text = std::fs::read_to_string(path).unwrap();
    let rows = text.lines().filter(|line| !line.trim().is_empty());
    rows.map(|line| {
        let row: serde_json::Value = serde_json::from_str(line).unwrap();
        let last = row["messages"].as_array().and_then(|m| m.last()).unwrap();
        last["content"].as_str().unwrap().to_owned()
    })
    .collect()
}

#[test]
fn calibration_and_evaluation_share_nothing() {
    // The larger family has texts; the demo's has none.
    let Some(family) = std::env::var_os("ONEBASE_ZOO").map(PathBuf::from) else { return };
    let read = |name: &str| std::fs::read_to_string(family.join("text").join(name)).unwrap();
    let (calibration, test) = (read("calibration.txt"), read("test.txt"));
    let calibration_lines = lines(&calibration);
    assert!(calibration_lines.len() > 100);
    let test_lines = lines(&test);
    let shared = test_lines.intersection(&calibration_lines);
    let (of_few, others): (Vec<&str>, Vec<&str>) = shared.partition(|line| is_of_few(line));
    assert!(others.is_empty(), "{others:?}");
    // What perplexity on the text says does not hang on them.
    assert!(10 * of_few.len() < test_lines.len(), "{} of {}", of_few.len(), test_lines.len());
    let mut n_questions = 0;
    for entry in std::fs::read_dir(family.join("eval")).unwrap() {
        let path = entry.unwrap().path();
        for question in questions(&path) {
            assert!(!calibration.contains(&question), "{}: {question}", path.display());
            n_questions += 1;
        }
    }
    assert!(n_questions >= 600, "{n_questions}");
}
