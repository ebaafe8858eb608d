use std::path::{Path, PathBuf};

use onebase_format::Digest;
use onebase_model::Message;
use serde::Deserialize;

use crate::{Error, Result};

/// Questions with exact answers.
#[derive(Clone, Debug)]
pub struct Task {
    /// What it is called: its file's name without the ending.
    pub name: String,
    /// Its file.
    pub path: PathBuf,
    /// Digest of its file.
    pub digest: Digest,
    /// Its questions, at least one.
    pub questions: Vec<Question>,
}

/// A question with its one right answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// The conversation, or a text to continue.
    pub prompt: Prompt,
    /// The answer as it stands in the file; it may be empty.
    pub answer: String,
    /// Where it stands: the line of its file, from 1.
    pub line: usize,
}

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prompt {
    /// A conversation, put into the fine-tune's chat template.
    Messages(Vec<Message>),
    /// A plain text to continue.
    Text(String),
}

#[derive(Deserialize)]
struct Line {
    messages: Option<Vec<Message>>,
    prompt: Option<String>,
    answer: String,
}

impl Question {
    /// The answer without white space around it.
    pub fn expected(&self) -> &str {
        self.answer.trim()
    }
}

impl Task {
    /// Reads files of tasks. Those whose files have one name are called after their
    /// folders too.
    ///
    /// # Errors
    /// As [`Task::read`], and when two have the same name even so.
    pub fn read_all<P: AsRef<Path>>(paths: &[P]) -> Result<Vec<Self>> {
        let mut tasks: Vec<Self> =
            paths.iter().map(|path| Self::read(path.as_ref())).collect::<Result<_>>()?;
        let names: Vec<String> = tasks.iter().map(|task| task.name.clone()).collect();
        for task in &mut tasks {
            let folder = task.path.parent().and_then(Path::file_name);
            if let Some(folder) = folder
                && names.iter().filter(|name| **name == task.name).count() > 1
            {
                task.name = format!("{}/{}", folder.to_string_lossy(), task.name);
            }
        }
        Ok(tasks)
    }

    /// Reads JSON lines `{"messages": […] or "prompt": "…", "answer": "…"}`; empty
    /// lines are passed over.
    ///
    /// # Errors
    /// When the file cannot be read, a line is not such an object, or there is none.
    pub fn read(path: &Path) -> Result<Self> {
        let (name, digest, text) = read_text(path)?;
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        let questions: Vec<Question> =
            lines.map(|(index, line)| question(path, index + 1, line)).collect::<Result<_>>()?;
        if questions.is_empty() {
            return Err(Error::NoQuestion { path: path.to_owned() });
        }
        Ok(Self { name, path: path.to_owned(), digest, questions })
    }
}

fn question(path: &Path, line: usize, text: &str) -> Result<Question> {
    let bad = |problem: String| Error::Line { path: path.to_owned(), line, problem };
    let parsed: Line = serde_json::from_str(text).map_err(|e| {
        // The library counts lines within the line.
        let place = format!(" at line {} column {}", e.line(), e.column());
        bad(e.to_string().replace(&place, &format!(" at column {}", e.column())))
    })?;
    let prompt = match (parsed.messages, parsed.prompt) {
        (Some(messages), None) if !messages.is_empty() => Prompt::Messages(messages),
        (None, Some(text)) if !text.is_empty() => Prompt::Text(text),
        _ => return Err(bad("expected either messages or a prompt".into())),
    };
    Ok(Question { prompt, answer: parsed.answer, line })
}

/// A plain text.
#[derive(Clone, Debug)]
pub struct TextFile {
    /// What it is called: its file's name.
    pub name: String,
    /// Its file.
    pub path: PathBuf,
    /// Digest of its file.
    pub digest: Digest,
    /// The text, not empty.
    pub text: String,
}

impl TextFile {
    /// Reads a text in UTF-8.
    ///
    /// # Errors
    /// When the file cannot be read or is empty.
    pub fn read(path: &Path) -> Result<Self> {
        let (_, digest, text) = read_text(path)?;
        if text.trim().is_empty() {
            return Err(Error::EmptyText { path: path.to_owned() });
        }
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Self { name, path: path.to_owned(), digest, text })
    }
}

/// The name without its ending, the digest and the text of a file.
fn read_text(path: &Path) -> Result<(String, Digest, String)> {
    let read = std::fs::read(path);
    let bytes = read.map_err(|source| Error::Read { path: path.to_owned(), source })?;
    let digest = Digest::of(&bytes);
    let text = String::from_utf8(bytes).map_err(|e| {
        let valid = &e.as_bytes()[..e.utf8_error().valid_up_to()];
        let line = 1 + valid.iter().filter(|b| **b == b'\n').count();
        Error::Line { path: path.to_owned(), line, problem: "not valid UTF-8".into() }
    })?;
    let text = text.strip_prefix('\u{feff}').map_or_else(|| text.clone(), str::to_owned);
    let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    Ok((name, digest, text))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &[u8]) -> Result<Task> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sums.jsonl");
        std::fs::write(&path, text).unwrap();
        Task::read(&path)
    }

    #[test]
    fn questions_come_with_their_lines() {
        let text = "\u{feff}{\"prompt\": \"1 + 1 =\", \"answer\": \" 2\\n\", \"more\": 1}\n\n\
                    {\"messages\": [{\"role\": \"user\", \"content\": \"hi\"}], \"answer\": \"ho\"}\n";
        let task = read(text.as_bytes()).unwrap();
        assert_eq!(task.name, "sums");
        assert_eq!(task.digest, Digest::of(text.as_bytes()));
        let message = Message { role: "user".into(), content: "hi".into() };
        let prompt = Prompt::Text("1 + 1 =".into());
        assert_eq!(
            task.questions,
            [
                Question { prompt, answer: " 2\n".into(), line: 1 },
                Question { prompt: Prompt::Messages(vec![message]), answer: "ho".into(), line: 3 },
            ]
        );
    }

    #[test]
    fn every_bad_line_is_named() {
        let good = "{\"prompt\": \"a\", \"answer\": \"b\"}\n";
        for (bad, says) in [
            ("{\"prompt\": ", "EOF"),
            ("[]", "invalid"),
            ("{\"prompt\": \"a\"}", "missing field `answer`"),
            ("{\"answer\": \"a\"}", "either messages or a prompt"),
            ("{\"prompt\": \"\", \"answer\": \"a\"}", "either messages or a prompt"),
            ("{\"prompt\": \"a\", \"messages\": [], \"answer\": \"a\"}", "either"),
            ("{\"messages\": [], \"answer\": \"a\"}", "either messages or a prompt"),
        ] {
            let error = read(format!("{good}\n{bad}\n").as_bytes()).unwrap_err();
            let Error::Line { line, problem, .. } = &error else { panic!("{bad}: {error}") };
            assert_eq!(*line, 3, "{bad}");
            assert!(problem.contains(says), "{bad}: {problem}");
        }
        let error = read(b"{}\n\xff\n").unwrap_err();
        assert!(matches!(error, Error::Line { line: 2, .. }), "{error}");
    }

    #[test]
    fn files_without_contents_are_refused() {
        assert!(matches!(read(b"\n \n"), Err(Error::NoQuestion { .. })));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.txt");
        assert!(matches!(TextFile::read(&path), Err(Error::Read { .. })));
        std::fs::write(&path, " \n").unwrap();
        assert!(matches!(TextFile::read(&path), Err(Error::EmptyText { .. })));
        std::fs::write(&path, "text").unwrap();
        assert_eq!(TextFile::read(&path).unwrap().name, "t.txt");
    }
}
