use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::CalibrationRecord;
use super::layout::StoredTensor;
use super::manifest::Storage;
use crate::atomic::Lock;
use crate::checkpoint::plain_name;
use crate::error::Error;
use crate::statistics::StatisticsRecord;
use crate::{Digest, Result};

/// The value of `format` in every journal.
const FORMAT: &str = "onebase-journal";

/// A journal is gone on with by the version that began it alone.
const VERSION: u32 = 1;

const JOURNAL_FILE: &str = "journal.jsonl";
const DATA_FILE: &str = "parts.bin";

/// Bytes copied at a time.
const BLOCK: usize = 1 << 20;

/// One of several processes that write an artifact together, each a part of the
/// tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Shard {
    /// Which one, from 1 on.
    pub index: usize,
    /// How many there are.
    pub count: usize,
}

impl Shard {
    /// All of it.
    pub const WHOLE: Self = Self { index: 1, count: 1 };
}

/// What a run works on and how: only the same run goes on with what an interrupted one
/// has done.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// Program and version.
    pub tool: String,
    /// What the base is called.
    pub base: String,
    /// What the fine-tune is called.
    pub fine_tune: String,
    /// A digest that tells these checkpoints from others.
    pub inputs: Digest,
    /// Every choice that the bytes depend on.
    pub options: Map<String, Value>,
    /// The statistics that linear sites are encoded with, if they are: the bytes depend
    /// on them too.
    #[serde(default)]
    pub calibration: Option<StatisticsRecord>,
    /// Tensors of the whole fine-tune.
    pub n_tensors: usize,
    /// Which part of them this run does.
    pub shard: Shard,
}

impl Run {
    /// The first field in which another run differs, with both values; its shard
    /// does not count.
    fn difference(&self, other: &Run) -> Option<[String; 3]> {
        let fields = |run: &Run| {
            let run = Run { shard: Shard::WHOLE, ..run.clone() };
            serde_json::to_value(run).unwrap_or_default()
        };
        let (ours, theirs) = (fields(self), fields(other));
        let (Value::Object(ours), Value::Object(theirs)) = (ours, theirs) else { return None };
        ours.iter()
            .zip(&theirs)
            .find(|(a, b)| a != b)
            .map(|((name, ours), (_, theirs))| [name.clone(), ours.to_string(), theirs.to_string()])
    }

    /// Checks that a journal is one of this run, whatever its shard.
    pub(super) fn check_same(&self, other: &Run, path: &Path) -> Result<()> {
        match self.difference(other) {
            None => Ok(()),
            Some([what, expected, got]) => {
                Err(Error::OtherRun { path: path.to_owned(), what, expected, got })
            }
        }
    }
}

#[derive(Serialize, Deserialize)]
struct Head {
    format: String,
    version: u32,
    run: Run,
}

/// Where bytes lie in the data file, and their digest.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Span {
    pub(super) offset: u64,
    pub(super) bytes: u64,
    pub(super) blake3: Digest,
}

/// A tensor that is done, and where its bytes are.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct DoneTensor {
    pub(super) tensor: StoredTensor,
    pub(super) span: Span,
}

impl DoneTensor {
    fn is_sound(&self) -> bool {
        let StoredTensor { name, record, codecs, entries, .. } = &self.tensor;
        let names = entries.iter().map(|entry| &entry.name);
        if !names.eq(&record.stored_names(name)) {
            return false;
        }
        let sizes = entries.iter().map(|entry| {
            let dims = entry.shape.iter().map(|n| *n as u64);
            dims.fold(entry.dtype.size_bytes() as u64, u64::saturating_mul)
        });
        let n_codecs = match &record.storage {
            Storage::Unchanged | Storage::Exact { .. } => 0,
            Storage::Codec { .. } => 1,
            Storage::Path { path, .. } => path.len(),
        };
        sizes.fold(0, u64::saturating_add) == self.span.bytes && n_codecs == codecs.len()
    }
}

/// A line of a journal.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Entry {
    Tensor(Box<DoneTensor>),
    /// A file beside the weights.
    File {
        name: String,
        span: Span,
    },
    /// One that is the base's.
    Inherited {
        name: String,
        blake3: Digest,
    },
    /// The text on which scales were fitted after encoding.
    Distillation(CalibrationRecord),
    /// Nothing is left to do.
    End,
}

impl Entry {
    /// Whether it can have been written by this program: what a later step relies on.
    fn is_sound(&self) -> bool {
        let ends = self.span().is_none_or(|s| s.offset.checked_add(s.bytes).is_some());
        ends && match self {
            Entry::Tensor(done) => done.is_sound(),
            Entry::File { name, .. } | Entry::Inherited { name, .. } => {
                plain_name(Path::new(JOURNAL_FILE), name).is_ok()
            }
            Entry::Distillation(_) | Entry::End => true,
        }
    }

    fn span(&self) -> Option<Span> {
        match self {
            Entry::Tensor(done) => Some(done.span),
            Entry::File { span, .. } => Some(*span),
            Entry::Inherited { .. } | Entry::Distillation(_) | Entry::End => None,
        }
    }
}

/// What a run has done so far: a folder with a line for each tensor that is done
/// and the bytes of all of them, locked by the process that writes it.
#[derive(Debug)]
pub(super) struct Journal {
    dir: PathBuf,
    lock: Lock,
    run: Run,
    entries: Vec<Entry>,
    lines: File,
    data: File,
    /// Bytes of the data file.
    end: u64,
}

impl Journal {
    /// Goes on with the journal in `dir`, if it is of this run, or begins one. What
    /// was being written when an earlier process ended is done anew.
    pub(super) fn open(dir: &Path, run: &Run) -> Result<Self> {
        std::fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
        let lock = Lock::take(dir, dir)?;
        let read = Self::read_lines(dir, true)?;
        if let Some((got, ..)) = &read {
            run.check_same(got, dir)?;
            if got.shard != run.shard {
                return Err(Error::OtherRun {
                    path: dir.to_owned(),
                    what: "shard".to_owned(),
                    expected: format!("{}/{}", run.shard.index, run.shard.count),
                    got: format!("{}/{}", got.shard.index, got.shard.count),
                });
            }
        }
        Self::go_on(dir, lock, run, read)
    }

    /// The journal in a folder, to be read; it stays as it is.
    pub(super) fn read(dir: &Path) -> Result<Self> {
        let lock = Lock::take(dir, dir)?;
        let Some((run, entries, _)) = Self::read_lines(dir, false)? else {
            return Err(Error::NotA {
                path: dir.to_owned(),
                expected: "shard",
                missing: JOURNAL_FILE,
            });
        };
        let open = |name: &str| {
            let path = dir.join(name);
            File::open(&path).map_err(Error::io("open", &path))
        };
        let (lines, data) = (open(JOURNAL_FILE)?, open(DATA_FILE)?);
        Ok(Self { dir: dir.to_owned(), lock, run, entries, lines, data, end: 0 })
    }

    fn go_on(
        dir: &Path,
        lock: Lock,
        run: &Run,
        read: Option<(Run, Vec<Entry>, u64)>,
    ) -> Result<Self> {
        let begun = read.is_some();
        let (_, entries, line_bytes) = read.unwrap_or_else(|| (run.clone(), Vec::new(), 0));
        let open = |name: &str| {
            let path = dir.join(name);
            let file =
                File::options().create(true).truncate(false).read(true).write(true).open(&path);
            file.map_err(Error::io("open", &path))
        };
        let (mut lines, mut data) = (open(JOURNAL_FILE)?, open(DATA_FILE)?);
        let end = entries.iter().filter_map(Entry::span).map(|s| s.offset + s.bytes).max();
        let end = end.unwrap_or(0);
        let cut = |file: &mut File, name: &str, len: u64| {
            let cut = file.set_len(len).and_then(|()| file.seek(SeekFrom::Start(len)));
            cut.map_err(Error::io("write", dir.join(name)))
        };
        cut(&mut lines, JOURNAL_FILE, line_bytes)?;
        cut(&mut data, DATA_FILE, end)?;
        let mut journal =
            Self { dir: dir.to_owned(), lock, run: run.clone(), entries, lines, data, end };
        if !begun {
            let head = Head { format: FORMAT.to_owned(), version: VERSION, run: run.clone() };
            journal.write_line(&head)?;
        }
        Ok(journal)
    }

    /// The run of a journal, its entries and the length of their lines; `None` where
    /// none was begun. Ends before the first line that is not whole or whose bytes are
    /// not there: a process may end, or a machine lose its power, at any moment.
    ///
    /// Unless they may be done anew, bytes that changed are an error, and so is in any case
    /// a file that cannot be read.
    fn read_lines(dir: &Path, anew: bool) -> Result<Option<(Run, Vec<Entry>, u64)>> {
        let path = dir.join(JOURNAL_FILE);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Error::io("open", &path)(e)),
        };
        let mut reader = BufReader::new(file);
        let mut line = Vec::new();
        let mut next = |line: &mut Vec<u8>| -> Result<bool> {
            line.clear();
            reader.read_until(b'\n', line).map_err(Error::io("read", &path))?;
            Ok(line.last() == Some(&b'\n'))
        };
        if !next(&mut line)? {
            return Ok(None);
        }
        // The version comes before anything that it may have changed.
        let head: Value = serde_json::from_slice(&line)
            .map_err(|source| Error::Json { path: path.clone(), source })?;
        let got = [&head["format"], &head["version"]];
        if got != [&Value::from(FORMAT), &Value::from(VERSION)] {
            return Err(Error::OtherRun {
                path: dir.to_owned(),
                what: "journal's format".to_owned(),
                expected: format!("{FORMAT} {VERSION}"),
                got: format!("{} {}", got[0], got[1]),
            });
        }
        let head: Head = serde_json::from_value(head)
            .map_err(|source| Error::Json { path: path.clone(), source })?;
        let mut bytes = line.len() as u64;
        let mut entries: Vec<Entry> = Vec::new();
        let mut data = match Data::open(dir) {
            Ok(data) => Some(data),
            Err(Error::Io { source, .. }) if source.kind() == ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        while next(&mut line)? {
            let Ok(entry) = serde_json::from_slice::<Entry>(&line) else { break };
            if !entry.is_sound() {
                break;
            }
            if let Some(span) = entry.span() {
                let Some(data) = &mut data else { break };
                match data.copy(span, |_| Ok(())) {
                    Ok(()) => {}
                    Err(Error::Io { source, .. }) if source.kind() == ErrorKind::UnexpectedEof => {
                        break;
                    }
                    Err(Error::FileDigest { .. }) if anew => break,
                    Err(error) => return Err(error),
                }
            }
            bytes += line.len() as u64;
            entries.push(entry);
        }
        Ok(Some((head.run, entries, bytes)))
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(super) fn run(&self) -> &Run {
        &self.run
    }

    pub(super) fn entries(&self) -> &[Entry] {
        &self.entries
    }

    pub(super) fn is_complete(&self) -> bool {
        matches!(self.entries.last(), Some(Entry::End))
    }

    /// Appends bytes to the data file.
    pub(super) fn put<'a>(&mut self, bytes: impl Iterator<Item = &'a [u8]>) -> Result<Span> {
        let offset = self.end;
        let mut hasher = blake3::Hasher::new();
        for bytes in bytes {
            for block in bytes.chunks(BLOCK) {
                hasher.update_rayon(block);
                let written = self.data.write_all(block);
                written.map_err(Error::io("write", self.dir.join(DATA_FILE)))?;
                self.end += block.len() as u64;
            }
        }
        Ok(Span { offset, bytes: self.end - offset, blake3: Digest::finish(&hasher) })
    }

    /// Records that something is done.
    pub(super) fn record(&mut self, entry: Entry) -> Result<()> {
        self.write_line(&entry)?;
        self.entries.push(entry);
        Ok(())
    }

    fn write_line(&mut self, value: &impl Serialize) -> Result<()> {
        let path = self.dir.join(JOURNAL_FILE);
        let mut line = serde_json::to_vec(value)
            .map_err(|source| Error::Json { path: path.clone(), source })?;
        line.push(b'\n');
        self.lines.write_all(&line).map_err(Error::io("write", &path))
    }

    /// The bytes that were put, to be read.
    pub(super) fn data(&self) -> Result<Data> {
        Data::open(&self.dir)
    }

    /// Removes the folder.
    pub(super) fn remove(self) -> Result<()> {
        std::fs::remove_dir_all(&self.dir).map_err(Error::io("remove", &self.dir))?;
        drop(self.lock);
        Ok(())
    }
}

/// The bytes of a journal.
#[derive(Debug)]
pub(super) struct Data {
    path: PathBuf,
    file: File,
    block: Vec<u8>,
}

impl Data {
    fn open(dir: &Path) -> Result<Self> {
        let path = dir.join(DATA_FILE);
        let file = File::open(&path).map_err(Error::io("open", &path))?;
        Ok(Self { path, file, block: Vec::new() })
    }

    /// Gives bytes block by block to `each`, and checks that they are what was put.
    pub(super) fn copy(
        &mut self,
        span: Span,
        mut each: impl FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let Self { path, file, block } = self;
        let io = |e| Error::io("read", &*path)(e);
        file.seek(SeekFrom::Start(span.offset)).map_err(io)?;
        let mut hasher = blake3::Hasher::new();
        let mut left = span.bytes;
        while left > 0 {
            #[allow(clippy::cast_possible_truncation)]
            block.resize(left.min(BLOCK as u64) as usize, 0);
            file.read_exact(block).map_err(io)?;
            hasher.update(block);
            each(block)?;
            left -= block.len() as u64;
        }
        let got = Digest::finish(&hasher);
        if got != span.blake3 {
            return Err(Error::FileDigest { path: path.clone(), expected: span.blake3, got });
        }
        Ok(())
    }

    /// Bytes as a whole.
    pub(super) fn read(&mut self, span: Span) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.copy(span, |block| {
            bytes.extend_from_slice(block);
            Ok(())
        })?;
        Ok(bytes)
    }
}
