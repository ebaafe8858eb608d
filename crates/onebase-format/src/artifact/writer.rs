use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use half::f16;
use onebase_tensor::{DType, EncodedDelta, Part, PartData};

use super::CalibrationRecord;
use super::journal::{Data, DoneTensor, Entry, Journal, Run, Shard};
use super::layout::{Layout, Names, StoredTensor};
use super::manifest::{
    CodecRecord, FileRecord, MANIFEST_FILE, MODEL_CARD_FILE, Manifest, Role, Storage,
};
use super::reader::{Artifact, Sizes};
use crate::atomic::{Lock, write_file};
use crate::checkpoint::read_optional;
use crate::error::Error;
use crate::{Digest, Result, StagedFolder, TensorEntry, TensorWriter};

/// Beside the shards of an artifact: the digest of the manifest that they were joined to.
const JOINED_FILE: &str = "joined";

/// What the fine-tune's tensor was, whatever way it is stored.
#[derive(Clone, Copy, Debug)]
pub struct Origin<'a> {
    /// Its position in the fine-tune, in the order of the forward pass.
    pub index: usize,
    /// Its name.
    pub name: &'a str,
    /// What it is for.
    pub role: Role,
    /// Its element type.
    pub dtype: DType,
    /// Its shape.
    pub shape: &'a [usize],
    /// Digest of the base's tensor of the same name.
    pub base: Digest,
    /// Digest of the tensor itself.
    pub fine_tune: Digest,
}

/// A tensor that an earlier process of the same run has done.
#[derive(Clone, Copy, Debug)]
pub struct Done {
    /// Its position in the fine-tune.
    pub index: usize,
    /// Digest of the base's tensor.
    pub base: Digest,
    /// Digest of the fine-tune's tensor.
    pub fine_tune: Digest,
}

/// Writes an artifact, or a shard of one, tensor by tensor. What is done is kept in a
/// folder beside it until [`ArtifactWriter::finish`], and a process of the same run goes
/// on with what an earlier one has left there.
#[derive(Debug)]
pub struct ArtifactWriter {
    target: PathBuf,
    /// Until it is finished or dropped.
    journal: Option<Journal>,
    keep: bool,
}

impl ArtifactWriter {
    /// Starts an artifact in the folder `target`, which must not exist, or goes on with
    /// what an interrupted process of the same run has done; `restart` throws that
    /// away.
    ///
    /// # Errors
    /// When the folder exists or cannot be written, or what is there is of another run.
    pub fn open(target: &Path, run: &Run, restart: bool) -> Result<Self> {
        let dir = work_folder(target, run.shard)?;
        if target.symlink_metadata().is_ok() {
            // What a process has left that ended between the last two steps.
            remove_if_joined(target, &dir)?;
            return Err(Error::Exists { path: target.to_owned() });
        }
        if restart && dir.exists() {
            // Locked, so that no process loses its folder while it writes.
            let _lock = Lock::take(&dir, target)?;
            std::fs::remove_dir_all(&dir).map_err(Error::io("remove", &dir))?;
        }
        let journal = Journal::open(&dir, run).map_err(|error| match error {
            Error::Busy { .. } => Error::Busy { path: target.to_owned() },
            other => other,
        })?;
        Ok(Self { target: target.to_owned(), journal: Some(journal), keep: false })
    }

    /// Whether an interrupted process has left something of the whole artifact.
    ///
    /// # Errors
    /// When the path has no name.
    pub fn is_begun(target: &Path) -> Result<bool> {
        Ok(work_folder(target, Shard::WHOLE)?.exists())
    }

    /// What earlier processes have done, in the order in which they did it.
    pub fn done(&self) -> impl Iterator<Item = Done> {
        let entries = self.journal.iter().flat_map(Journal::entries);
        entries.filter_map(|entry| match entry {
            Entry::Tensor(done) => Some(Done {
                index: done.tensor.index,
                base: done.tensor.record.base,
                fine_tune: done.tensor.fine_tune,
            }),
            _ => None,
        })
    }

    /// The encoded delta of a tensor that is done, by its position in the fine-tune, and the
    /// codec that wrote it; `None` where it is not done or not stored as a delta.
    ///
    /// # Errors
    /// When its bytes cannot be read or have changed.
    pub fn delta(&self, index: usize) -> Result<Option<(CodecRecord, EncodedDelta)>> {
        let Some(journal) = &self.journal else { return Ok(None) };
        let of_index = |entry: &Entry| match entry {
            Entry::Tensor(done) if done.tensor.index == index => Some(done.as_ref().clone()),
            _ => None,
        };
        let Some(done) = journal.entries().iter().find_map(of_index) else { return Ok(None) };
        let StoredTensor { name, record, mut codecs, entries, .. } = done.tensor;
        let (Storage::Codec { parts, .. }, Some(shape), Some(codec)) =
            (&record.storage, record.delta_shape(), codecs.pop())
        else {
            return Ok(None);
        };
        let bytes = journal.data()?.read(done.span)?;
        let mut rest = &bytes[..];
        let mut by_name = BTreeMap::new();
        for (part, entry) in parts.iter().zip(entries) {
            let cut = rest.split_at_checked(entry.size_bytes());
            let read = cut.and_then(|(bytes, after)| {
                rest = after;
                Part::new(entry.shape, PartData::from_le_bytes(entry.dtype, bytes)?)
            });
            let Some(read) = read else {
                return Err(Error::Manifest {
                    path: journal.dir().to_owned(),
                    entry: name,
                    problem: format!("part {part} does not fill its shape"),
                });
            };
            by_name.insert(part.clone(), read);
        }
        Ok(Some((codec, EncodedDelta { shape, parts: by_name })))
    }

    /// Whether a file beside the weights is stored or recorded already.
    pub fn has_file(&self, name: &str) -> bool {
        let entries = self.journal.iter().flat_map(Journal::entries);
        entries.into_iter().any(|entry| match entry {
            Entry::File { name: known, .. } | Entry::Inherited { name: known, .. } => known == name,
            Entry::Tensor(_) | Entry::Distillation(_) | Entry::End => false,
        })
    }

    /// Whether earlier processes have done everything.
    pub fn is_complete(&self) -> bool {
        self.journal.as_ref().is_some_and(Journal::is_complete)
    }

    /// Where what is done is kept.
    pub fn work_folder(&self) -> &Path {
        self.journal.as_ref().map_or(&self.target, |journal| journal.dir())
    }

    /// Keeps what is done for a later process, whatever happens; else only what
    /// ends the process does.
    pub fn keep(&mut self) {
        self.keep = true;
    }

    /// Stores a tensor whose bytes are at hand, or one that has none.
    ///
    /// Panics when the bytes are not as many as the tensor says.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn put(&mut self, tensor: StoredTensor, bytes: &[u8]) -> Result<()> {
        self.put_all(tensor, &[bytes])
    }

    /// Stores a tensor as an encoded delta; `added_rows` are the bytes of the
    /// rows past the base's, in the fine-tune's type. The delta of a vector `[n]` is
    /// `[1, n]`, and it has no added rows.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn put_delta(
        &mut self,
        origin: Origin<'_>,
        codec: CodecRecord,
        delta: &EncodedDelta,
        added_rows: &[u8],
    ) -> Result<()> {
        let parts = delta.parts.iter();
        let parts = parts.map(|(name, part)| (name.as_str(), part.dtype(), part.shape().to_vec()));
        let n_added = match origin.role {
            Role::Vector => 0,
            _ => origin.shape[0] - delta.shape[0],
        };
        let tensor = StoredTensor::delta(origin, codec, parts, n_added);
        let data: Vec<_> = delta.parts.values().map(|part| part.data().to_le_bytes()).collect();
        let bytes: Vec<&[u8]> = data.iter().map(AsRef::as_ref).chain([added_rows]).collect();
        self.put_all(tensor, &bytes)
    }

    /// Stores a tensor as a path of nodes, with the gains, `[out_features]`, of those that
    /// have some; see [`StoredTensor::path`].
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn put_path(
        &mut self,
        origin: Origin<'_>,
        nodes: Vec<(usize, CodecRecord, bool)>,
        gains: &[Vec<f16>],
    ) -> Result<()> {
        let gains: Vec<u8> = gains.iter().flatten().flat_map(|gain| gain.to_le_bytes()).collect();
        self.put_all(StoredTensor::path(origin, nodes), &[&gains])
    }

    fn put_all(&mut self, tensor: StoredTensor, bytes: &[&[u8]]) -> Result<()> {
        let expected: usize = tensor.entries.iter().map(TensorEntry::size_bytes).sum();
        let got: usize = bytes.iter().map(|bytes| bytes.len()).sum();
        assert_eq!(got, expected, "bytes of {}", tensor.name);
        let journal = self.journal();
        let span = journal.put(bytes.iter().copied())?;
        journal.record(Entry::Tensor(Box::new(DoneTensor { tensor, span })))
    }

    /// Stores a file beside the weights.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn put_file(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let journal = self.journal();
        let span = journal.put([bytes].into_iter())?;
        journal.record(Entry::File { name: name.to_owned(), span })
    }

    /// Records a file that is the base's to the byte.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn inherit_file(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let entry = Entry::Inherited { name: name.to_owned(), blake3: Digest::of(bytes) };
        self.journal().record(entry)
    }

    /// Records the text on which scales were fitted after encoding.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn put_distillation(&mut self, text: CalibrationRecord) -> Result<()> {
        self.journal().record(Entry::Distillation(text))
    }

    /// Completes the shard; [`join`] makes the artifact when all are complete.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn finish_shard(mut self) -> Result<()> {
        self.keep = true;
        let journal = self.journal();
        if journal.is_complete() { Ok(()) } else { journal.record(Entry::End) }
    }

    /// Completes the artifact and gives it its name. `model_card` makes the text
    /// of the model card from the manifest and the sizes, its own included.
    ///
    /// # Errors
    /// When something cannot be written; what is done stays.
    pub fn finish(
        self,
        model_card: impl Fn(&Manifest, &Sizes) -> String,
    ) -> Result<(Manifest, Sizes)> {
        self.finish_with(&[], model_card)
    }

    /// [`ArtifactWriter::finish`] of one with paths over nodes, whose files are there already.
    ///
    /// # Errors
    /// As there.
    pub fn finish_with(
        mut self,
        nodes: &[FileRecord],
        model_card: impl Fn(&Manifest, &Sizes) -> String,
    ) -> Result<(Manifest, Sizes)> {
        self.keep = true;
        let target = self.target.clone();
        let journal = self.journal();
        if !journal.is_complete() {
            journal.record(Entry::End)?;
        }
        let dir = journal.dir().to_owned();
        let written = assemble(&target, &dir, std::slice::from_ref(journal), nodes, model_card)?;
        self.journal = None;
        // The artifact is there: what cannot be removed harms nothing.
        let _ = remove_work(&dir);
        Ok(written)
    }

    fn journal(&mut self) -> &mut Journal {
        match &mut self.journal {
            Some(journal) => journal,
            None => unreachable!("it is there until the writer is gone"),
        }
    }
}

impl Drop for ArtifactWriter {
    fn drop(&mut self) {
        let keep = self.keep || std::thread::panicking();
        if let Some(journal) = self.journal.take().filter(|_| !keep) {
            // The error that led here is the one to report.
            let _ = journal.remove();
        }
    }
}

/// Joins the shards of an artifact that lie beside its folder `target`, when all of them
/// are complete. Joined already, it is only read.
///
/// # Errors
/// When a shard is missing, incomplete, of another run or still being written, when the
/// folder is there and is not what the shards were joined to, or something cannot be
/// read or written.
pub fn join(
    target: &Path,
    model_card: impl Fn(&Manifest, &Sizes) -> String,
) -> Result<(Manifest, Sizes)> {
    let dir = shards_folder(target)?;
    if target.symlink_metadata().is_ok() {
        // An empty folder is what is left of one that was removed.
        let is_left = std::fs::read_dir(&dir).is_ok_and(|mut entries| entries.next().is_some());
        if is_left && !remove_if_joined(target, &dir)? {
            return Err(Error::Exists { path: target.to_owned() });
        }
        let artifact = Artifact::open(target)?;
        return Ok((artifact.manifest().clone(), artifact.sizes()));
    }
    let mut names = Vec::new();
    let entries = std::fs::read_dir(&dir).map_err(Error::io("read", &dir))?;
    for entry in entries {
        names.push(entry.map_err(Error::io("read", &dir))?.path());
    }
    names.sort();
    let mut journals: Vec<Journal> = Vec::new();
    for name in names.iter().filter(|name| name.is_dir()) {
        let journal = Journal::read(name)?;
        if let Some(first) = journals.first() {
            first.run().check_same(journal.run(), name)?;
        }
        journals.push(journal);
    }
    let Some(first) = journals.first() else {
        return Err(Error::NotA { path: dir, expected: "folder of shards", missing: "1-of-N" });
    };
    let count = first.run().shard.count.max(1);
    journals.sort_by_key(|journal| journal.run().shard);
    for index in 1..=count {
        let path = || dir.join(shard_name(Shard { index, count }));
        match journals.get(index - 1) {
            Some(journal) if journal.run().shard == (Shard { index, count }) => {
                if !journal.is_complete() {
                    return Err(Error::UnfinishedShard { path: path(), index, count });
                }
            }
            Some(other) if other.run().shard.count != count => {
                return Err(Error::OtherRun {
                    path: other.dir().to_owned(),
                    what: "number of shards".to_owned(),
                    expected: count.to_string(),
                    got: other.run().shard.count.to_string(),
                });
            }
            _ => return Err(Error::UnfinishedShard { path: path(), index, count }),
        }
    }
    let written = assemble(target, &dir, &journals, &[], model_card)?;
    drop(journals);
    // The artifact is there: what cannot be removed harms nothing.
    let _ = remove_work(&dir);
    Ok(written)
}

/// Writes the artifact from what complete journals hold, and leaves in `work` the digest
/// of its manifest.
fn assemble(
    target: &Path,
    work: &Path,
    journals: &[Journal],
    nodes: &[FileRecord],
    model_card: impl Fn(&Manifest, &Sizes) -> String,
) -> Result<(Manifest, Sizes)> {
    let Some(run) = journals.first().map(Journal::run) else {
        unreachable!("an artifact has a journal")
    };
    let mut tensors: Vec<(&DoneTensor, usize)> = Vec::new();
    for (source, journal) in journals.iter().enumerate() {
        let entries = journal.entries().iter();
        tensors.extend(entries.filter_map(|entry| match entry {
            Entry::Tensor(done) => Some((&**done, source)),
            _ => None,
        }));
    }
    tensors.sort_by_key(|(done, _)| done.tensor.index);
    let in_place = tensors.iter().enumerate().all(|(i, (done, _))| done.tensor.index == i);
    let names: BTreeSet<&str> = tensors.iter().map(|(done, _)| done.tensor.name.as_str()).collect();
    if names.len() != run.n_tensors || tensors.len() != run.n_tensors || !in_place {
        return Err(Error::OtherRun {
            path: work.to_owned(),
            what: "number of tensors".to_owned(),
            expected: run.n_tensors.to_string(),
            got: tensors.len().to_string(),
        });
    }
    let mut data = journals.iter().map(Journal::data).collect::<Result<Vec<Data>>>()?;
    let Run { tool, base, fine_tune, calibration, .. } = run;
    let names = Names { tool, base, fine_tune, calibration: calibration.as_ref(), nodes };
    let stored: Vec<&StoredTensor> = tensors.iter().map(|(done, _)| &done.tensor).collect();
    let Layout { mut manifest, files } = Layout::new(names, &stored)?;
    let folder = StagedFolder::create(target)?;
    for file in files {
        let mut writer = TensorWriter::create(&folder.path(&file.name), &file.entries)?;
        for index in file.tensors {
            let (done, source) = tensors[index];
            data[source].copy(done.span, |block| writer.write(block))?;
        }
        let (bytes, blake3) = writer.finish()?;
        manifest.files.insert(file.name, FileRecord { bytes, blake3 });
    }
    for (journal, data) in journals.iter().zip(&mut data) {
        for entry in journal.entries() {
            match entry {
                Entry::File { name, span } => {
                    folder.write(name, &data.read(*span)?)?;
                    let record = FileRecord { bytes: span.bytes, blake3: span.blake3 };
                    manifest.files.insert(name.clone(), record);
                }
                Entry::Inherited { name, blake3 } => {
                    manifest.inherited.insert(name.clone(), *blake3);
                }
                Entry::Distillation(text) => manifest.distillation = Some(text.clone()),
                Entry::Tensor(_) | Entry::End => {}
            }
        }
    }
    let json = manifest
        .to_json()
        .map_err(|source| Error::Json { path: folder.path(MANIFEST_FILE), source })?;
    let (card, sizes) = settle_card(&manifest, json.len(), |sizes| model_card(&manifest, sizes));
    folder.write(MODEL_CARD_FILE, card.as_bytes())?;
    folder.write(MANIFEST_FILE, json.as_bytes())?;
    // What a reader would refuse gets no name.
    Artifact::open(&folder.path(""))?;
    write_file(&work.join(JOINED_FILE), Digest::of(json.as_bytes()).to_string().as_bytes())?;
    folder.commit()?;
    Ok((manifest, sizes))
}

/// Removes what is left beside an artifact that it was made from; `false` where that
/// is not so.
fn remove_if_joined(target: &Path, work: &Path) -> Result<bool> {
    let (Some(joined), Some(manifest)) =
        (read_optional(&work.join(JOINED_FILE))?, read_optional(&target.join(MANIFEST_FILE))?)
    else {
        return Ok(false);
    };
    if joined != Digest::of(&manifest).to_string().as_bytes() {
        return Ok(false);
    }
    remove_work(work)?;
    Ok(true)
}

/// Removes what an artifact was made from, last the file that says so: a process that is
/// killed meanwhile leaves what the next one knows for what it is.
fn remove_work(work: &Path) -> Result<()> {
    let joined = work.join(JOINED_FILE);
    for entry in std::fs::read_dir(work).map_err(Error::io("read", work))? {
        let path = entry.map_err(Error::io("read", work))?.path();
        let removed = if path.is_dir() {
            std::fs::remove_dir_all(&path)
        } else if path == joined {
            continue;
        } else {
            std::fs::remove_file(&path)
        };
        removed.map_err(Error::io("remove", &path))?;
    }
    std::fs::remove_dir_all(work).map_err(Error::io("remove", work))
}

/// Where a run keeps what it has done.
fn work_folder(target: &Path, shard: Shard) -> Result<PathBuf> {
    if shard == Shard::WHOLE {
        return beside(target, ".", ".work");
    }
    Ok(shards_folder(target)?.join(shard_name(shard)))
}

/// Where the shards of an artifact lie.
fn shards_folder(target: &Path) -> Result<PathBuf> {
    beside(target, "", ".shards")
}

fn shard_name(Shard { index, count }: Shard) -> String {
    format!("{index}-of-{count}")
}

fn beside(target: &Path, before: &str, after: &str) -> Result<PathBuf> {
    let Some(name) = target.file_name() else {
        return Err(Error::Exists { path: target.to_owned() });
    };
    let mut full = OsString::from(before);
    full.push(name);
    full.push(after);
    Ok(target.with_file_name(full))
}

/// A model card that states the folder's sizes, its own included, and the sizes.
pub(super) fn settle_card(
    manifest: &Manifest,
    manifest_bytes: usize,
    model_card: impl Fn(&Sizes) -> String,
) -> (String, Sizes) {
    let mut card = String::new();
    let mut sizes = Sizes::new(manifest, manifest_bytes as u64);
    for _ in 0..4 {
        sizes = Sizes::new(manifest, (manifest_bytes + card.len()) as u64);
        let next = model_card(&sizes);
        if next == card {
            break;
        }
        card = next;
    }
    (card, sizes)
}
