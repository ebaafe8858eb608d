//! Standard output, standard error, progress.

use std::io::{IsTerminal, Write};
use std::path::Path;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, bail};
use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use indicatif::{ProgressBar, ProgressStyle};
use onebase_compress::Progress;
use onebase_eval::Watcher;
use onebase_format::write_file;
use serde::Serialize;

/// Where results go: text for people, or one JSON object.
#[derive(Debug)]
pub(crate) struct Output {
    json: bool,
}

impl Output {
    pub(crate) fn new(json: bool) -> Self {
        Self { json }
    }

    /// Prints a result: the object with `--json`, else the text.
    pub(crate) fn result(
        &self,
        object: &impl Serialize,
        text: impl FnOnce() -> String,
    ) -> anyhow::Result<()> {
        let text = if self.json { serde_json::to_string_pretty(object)? } else { text() };
        let mut out = std::io::stdout().lock();
        out.write_all(text.as_bytes()).context(STDOUT)?;
        if !text.ends_with('\n') {
            out.write_all(b"\n").context(STDOUT)?;
        }
        out.flush().context(STDOUT)
    }

    /// Prints bytes as they are, whatever the form of results.
    pub(crate) fn raw(bytes: &[u8]) -> anyhow::Result<()> {
        std::io::stdout().lock().write_all(bytes).context(STDOUT)
    }

    /// Says something on standard error; to nobody, where that is closed.
    pub(crate) fn note(text: &str) {
        let _ = writeln!(std::io::stderr(), "{text}");
    }
}

const STDOUT: &str = "cannot write to standard output";

/// Whether a command ended because nobody reads its output any more.
pub(crate) fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let io = error.chain().find_map(|e| e.downcast_ref::<std::io::Error>());
    error.to_string() == STDOUT && io.is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}

/// Prints an error with its causes and, where one is known, a hint.
pub(crate) fn print_error(error: &anyhow::Error) {
    Output::note(&format!("error: {error}"));
    for cause in error.chain().skip(1) {
        Output::note(&format!("  because: {cause}"));
    }
    if let Some(hint) = error.chain().find_map(hint) {
        Output::note(&format!("hint: {hint}"));
    }
}

fn hint(error: &(dyn std::error::Error + 'static)) -> Option<String> {
    if let Some(e) = error.downcast_ref::<onebase_compress::Error>() {
        return e.hint();
    }
    if let Some(e) = error.downcast_ref::<onebase_model::Error>() {
        return e.hint();
    }
    if let Some(e) = error.downcast_ref::<onebase_format::Error>() {
        return e.hint();
    }
    if let Some(e) = error.downcast_ref::<onebase_eval::Error>() {
        return e.hint();
    }
    if let Some(e) = error.downcast_ref::<onebase_engine::Error>() {
        return e.hint();
    }
    error.downcast_ref::<onebase_codec::Error>().and_then(onebase_codec::Error::hint)
}

/// A progress bar over bytes on standard error; nothing where that is no
/// terminal.
#[derive(Debug)]
pub(crate) struct Bar {
    what: String,
    bar: OnceLock<ProgressBar>,
}

impl Bar {
    pub(crate) fn new(what: &str) -> Self {
        Self { what: what.to_owned(), bar: OnceLock::new() }
    }

    fn note(&self, text: &str) {
        match self.bar.get() {
            Some(bar) => bar.suspend(|| Output::note(text)),
            None => Output::note(text),
        }
    }

    /// Removes the bar.
    pub(crate) fn finish(&self) {
        if let Some(bar) = self.bar.get() {
            bar.finish_and_clear();
        }
    }
}

impl Progress for Bar {
    fn begin(&self, total_bytes: u64) {
        let template = "{prefix} {wide_bar} {binary_bytes}/{binary_total_bytes} \
                        {binary_bytes_per_sec} {eta} left  {msg:40!}";
        self.bar.get_or_init(|| {
            let bar = ProgressBar::new(total_bytes);
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style);
            }
            bar.set_prefix(self.what.clone());
            bar.enable_steady_tick(Duration::from_millis(200));
            bar
        });
    }

    fn resumed(&self, n_tensors: usize) {
        self.note(&format!("going on with an earlier run: {n_tensors} tensors are done"));
    }

    fn tensor(&self, name: &str) {
        if let Some(bar) = self.bar.get() {
            bar.set_message(name.to_owned());
        }
    }

    fn advance(&self, bytes: u64) {
        if let Some(bar) = self.bar.get() {
            bar.inc(bytes);
        }
    }

    fn warn(&self, message: &str) {
        self.note(&format!("warning: {message}"));
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.finish();
    }
}

/// One stretch of a long measurement after the other, each as a bar on standard
/// error.
#[derive(Debug)]
pub(crate) struct Stages(Mutex<ProgressBar>);

impl Stages {
    pub(crate) fn new() -> Self {
        Self(Mutex::new(ProgressBar::hidden()))
    }

    fn with<T>(&self, act: impl FnOnce(&mut ProgressBar) -> T) -> T {
        act(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Removes the bar.
    pub(crate) fn finish(&self) {
        self.with(|bar| bar.finish_and_clear());
    }
}

impl Watcher for Stages {
    fn begin(&self, what: &str, total: u64) {
        self.with(|bar| {
            bar.finish_and_clear();
            *bar = ProgressBar::new(total);
            let template = "{prefix} {wide_bar} {percent}% {eta} left";
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style);
            }
            bar.set_prefix(what.to_owned());
            bar.enable_steady_tick(Duration::from_millis(200));
        });
    }

    fn advance(&self, steps: u64) {
        self.with(|bar| bar.inc(steps));
    }
}

impl Drop for Stages {
    fn drop(&mut self) {
        self.finish();
    }
}

/// A table with its first `n_left` columns to the left and the others, numbers,
/// to the right.
pub(crate) fn table(header: &[&str], n_left: usize, rows: Vec<Vec<String>>) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED).set_header(header);
    if std::io::stdout().is_terminal() {
        table.set_content_arrangement(ContentArrangement::Dynamic);
    }
    table.add_rows(rows);
    for (index, column) in table.column_iter_mut().enumerate() {
        if index >= n_left {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

/// A number of bytes for people.
pub(crate) fn bytes(n: u64) -> String {
    indicatif::DecimalBytes(n).to_string()
}

/// Checks that a file can be written, before the work whose result it is for. One
/// that is there stays as it is.
pub(crate) fn can_be_written(path: &Path) -> anyhow::Result<()> {
    if path.is_dir() {
        bail!("{} is a folder, expected a file to write", path.display());
    }
    if !path.exists() {
        write_file(path, b"")?;
        let gone = std::fs::remove_file(path);
        gone.with_context(|| format!("cannot remove {}", path.display()))?;
    }
    Ok(())
}

/// A share for people.
pub(crate) fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

/// A number with four significant digits.
pub(crate) fn number(value: f64) -> String {
    if value == 0.0 || !value.is_finite() {
        return value.to_string();
    }
    #[allow(clippy::cast_possible_truncation)]
    let exponent = value.abs().log10().floor() as i32;
    match usize::try_from(3 - exponent) {
        Ok(decimals) if exponent >= -4 => format!("{value:.decimals$}"),
        Ok(_) => format!("{value:.3e}"),
        Err(_) => format!("{value:.0}"),
    }
}
