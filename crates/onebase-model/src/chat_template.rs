use std::path::{Path, PathBuf};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value};
use minijinja::{Environment, ErrorKind};
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

const NAME: &str = "chat_template";

/// Bounds the time and the memory of a template, which may come with any artifact:
/// so many instructions, or 64 bytes for each. A conversation of a million
/// characters needs a twentieth.
const FUEL: u64 = 2_000_000;

/// Longest template, longer than those of models. Compiling takes time with the
/// square of the length of an expression, so this bounds that too.
const SOURCE_BYTES: usize = 1 << 16;

/// Stack for compiling and rendering, which recurse as deeply as a template of
/// that length, or a value made with that fuel, is nested.
const STACK_BYTES: usize = 1 << 29;

/// A message of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// The text.
    pub content: String,
}

/// A model's chat template, compiled, with the functions that transformers gives
/// to templates.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos_token: Option<String>,
    eos_token: Option<String>,
    path: PathBuf,
}

impl ChatTemplate {
    /// Compiles a template; `path` is named in errors.
    ///
    /// # Errors
    /// When it is no valid template.
    pub fn new(
        source: String,
        bos_token: Option<String>,
        eos_token: Option<String>,
        path: &Path,
    ) -> Result<Self> {
        let bad = |source| Error::ChatTemplate { path: path.to_owned(), source };
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(bad)?);
        environment.set_fuel(Some(FUEL));
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.add_filter("tojson", python_json);
        if source.len() > SOURCE_BYTES {
            let problem = format!("{} bytes, expected at most {SOURCE_BYTES}", source.len());
            return Err(bad(minijinja::Error::new(ErrorKind::SyntaxError, problem)));
        }
        with_stack(|| environment.add_template_owned(NAME, source)).map_err(bad)?;
        Ok(Self { environment, bos_token, eos_token, path: path.to_owned() })
    }

    /// The text of a conversation; with `add_generation_prompt`, up to where the
    /// answer begins.
    ///
    /// # Errors
    /// When the template refuses the messages.
    pub fn render<M: Serialize>(
        &self,
        messages: &[M],
        add_generation_prompt: bool,
    ) -> Result<String> {
        let bad = |source| Error::ChatTemplate { path: self.path.clone(), source };
        let mut context = vec![
            ("messages", Value::from(Serde(messages))),
            ("add_generation_prompt", add_generation_prompt.into()),
            ("tools", ().into()),
            ("documents", ().into()),
        ];
        for (name, token) in [("bos_token", &self.bos_token), ("eos_token", &self.eos_token)] {
            context.extend(token.as_ref().map(|t| (name, Value::from(t.as_str()))));
        }
        let template = self.environment.get_template(NAME).map_err(bad)?;
        with_stack(|| template.render(Value::from_pairs(context))).map_err(bad)
    }
}

/// Runs on a thread with [`STACK_BYTES`] of stack.
fn with_stack<T: Send>(
    run: impl FnOnce() -> Result<T, minijinja::Error> + Send,
) -> Result<T, minijinja::Error> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(STACK_BYTES).spawn_scoped(scope, run);
        let thread = thread.map_err(|e| {
            minijinja::Error::new(ErrorKind::InvalidOperation, "no thread to run it").with_source(e)
        })?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn raise_exception(message: String) -> Result<Value, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
}

// By value: the signature that template functions have.
#[allow(clippy::needless_pass_by_value)]
fn strftime_now(format: String) -> Result<String, minijinja::Error> {
    jiff::fmt::strtime::format(&format, &jiff::Zoned::now())
        .map_err(|e| minijinja::Error::new(ErrorKind::InvalidOperation, e.to_string()))
}

/// `json.dumps` with its separators and, on request, its indentation; unlike the
/// template engine's own filter it escapes nothing for HTML.
#[allow(clippy::needless_pass_by_value)]
fn python_json(value: Value, options: Kwargs) -> Result<String, minijinja::Error> {
    let failed = |e: &dyn std::fmt::Display| {
        minijinja::Error::new(ErrorKind::BadSerialization, e.to_string())
    };
    let value = serde_json::Value::deserialize(value)?;
    let mut out = Vec::new();
    // A byte: more spaces than any template means, and fewer than fill the memory.
    let written = match options.get::<Option<u8>>("indent")? {
        Some(indent) => {
            let spaces = " ".repeat(indent.into());
            let pretty = serde_json::ser::PrettyFormatter::with_indent(spaces.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, pretty))
        }
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, Spaced)),
    };
    written.map_err(|e| failed(&e))?;
    String::from_utf8(out).map_err(|e| failed(&e))
}

/// Python's default separators, `", "` and `": "`.
struct Spaced;

impl serde_json::ser::Formatter for Spaced {
    fn begin_array_value<W>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()>
    where
        W: ?Sized + std::io::Write,
    {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()>
    where
        W: ?Sized + std::io::Write,
    {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W>(&mut self, writer: &mut W) -> std::io::Result<()>
    where
        W: ?Sized + std::io::Write,
    {
        writer.write_all(b": ")
    }
}
