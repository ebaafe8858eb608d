use std::collections::BTreeMap;
use std::path::Path;

use onebase_tensor::{DType, EncodedDelta, Part, PartData};

use super::manifest::{
    ADDED_ROWS, BaseRecord, CodecRecord, FORMAT, FORMAT_VERSION, FileRecord, LINEAR_PREFIX,
    MANIFEST_FILE, MODEL_CARD_FILE, Manifest, Role, Storage, TensorRecord, part_name,
};
use super::reader::Sizes;
use crate::error::Error;
use crate::{Digest, Result, StagedFolder, TensorEntry, TensorWriter};

/// Data bytes after which a tensor file is written and the next one begun. Until
/// then its parts are held, since the header before them names them all.
const FILE_BYTES: usize = 1 << 28;

/// What the fine-tune's tensor was, whatever way it is stored.
#[derive(Clone, Copy, Debug)]
pub struct Origin<'a> {
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
}

/// Writes an artifact tensor by tensor; nothing is under its name before
/// [`ArtifactWriter::finish`].
#[derive(Debug)]
pub struct ArtifactWriter {
    folder: StagedFolder,
    manifest: Manifest,
    linear: Files,
    rest: Files,
}

impl ArtifactWriter {
    /// Starts an artifact in the folder `target`, which must not exist.
    ///
    /// # Errors
    /// When the folder exists or cannot be written.
    pub fn create(target: &Path, tool: &str, fine_tune: &str) -> Result<Self> {
        Ok(Self {
            folder: StagedFolder::create(target)?,
            manifest: Manifest {
                format: FORMAT.to_owned(),
                version: FORMAT_VERSION,
                tool: tool.to_owned(),
                // Known when every tensor is.
                base: BaseRecord::new("", std::iter::empty()),
                fine_tune: fine_tune.to_owned(),
                codecs: Vec::new(),
                files: BTreeMap::new(),
                inherited: BTreeMap::new(),
                tensors: BTreeMap::new(),
                quality: None,
            },
            linear: Files::new(LINEAR_PREFIX),
            rest: Files::new("rest-"),
        })
    }

    /// Records a tensor that is the base's.
    pub fn put_unchanged(&mut self, origin: Origin<'_>) {
        self.record(origin, Storage::Unchanged);
    }

    /// Stores a tensor as it is.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn put_exact(&mut self, origin: Origin<'_>, bytes: &[u8]) -> Result<()> {
        let part = part(origin.dtype, origin.shape, bytes);
        let file = self.rest.file(&self.folder, &mut self.manifest.files)?;
        self.rest.parts.push((origin.name.to_owned(), part));
        self.record(origin, Storage::Exact { file });
        Ok(())
    }

    /// Stores a tensor as an encoded delta; `added_rows` are the bytes of the
    /// rows past the base's, in the fine-tune's type.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn put_delta(
        &mut self,
        origin: Origin<'_>,
        codec: CodecRecord,
        delta: EncodedDelta,
        added_rows: &[u8],
    ) -> Result<()> {
        let n_added = origin.shape[0] - delta.shape[0];
        let names = delta.parts.keys().cloned().collect();
        let mut parts: Vec<(String, Part)> = Vec::new();
        parts.extend(delta.parts.into_iter().map(|(n, p)| (part_name(origin.name, &n), p)));
        if n_added > 0 {
            let shape = [n_added, delta.shape[1]];
            let rows = part(origin.dtype, &shape, added_rows);
            parts.push((part_name(origin.name, ADDED_ROWS), rows));
        }
        let files = if origin.role == Role::Linear { &mut self.linear } else { &mut self.rest };
        let file = files.file(&self.folder, &mut self.manifest.files)?;
        files.parts.append(&mut parts);
        let known = self.manifest.codecs.iter().position(|c| *c == codec);
        let codec = known.unwrap_or_else(|| {
            self.manifest.codecs.push(codec);
            self.manifest.codecs.len() - 1
        });
        self.record(origin, Storage::Codec { codec, file, parts: names, added_rows: n_added });
        Ok(())
    }

    fn record(&mut self, origin: Origin<'_>, storage: Storage) {
        let record = TensorRecord {
            role: origin.role,
            dtype: origin.dtype.name().to_owned(),
            shape: origin.shape.to_vec(),
            base: origin.base,
            storage,
        };
        self.manifest.tensors.insert(origin.name.to_owned(), record);
    }

    /// Stores a file beside the weights.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn put_file(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        self.folder.write(name, bytes)?;
        let record = FileRecord { bytes: bytes.len() as u64, blake3: Digest::of(bytes) };
        self.manifest.files.insert(name.to_owned(), record);
        Ok(())
    }

    /// Records a file that is the base's to the byte.
    pub fn inherit_file(&mut self, name: &str, bytes: &[u8]) {
        self.manifest.inherited.insert(name.to_owned(), Digest::of(bytes));
    }

    /// Completes the artifact and gives it its name. `model_card` makes the text
    /// of the model card from the manifest and the sizes, its own included.
    ///
    /// # Errors
    /// When something cannot be written; nothing is left then.
    pub fn finish(
        mut self,
        base_name: &str,
        model_card: impl Fn(&Manifest, &Sizes) -> String,
    ) -> Result<(Manifest, Sizes)> {
        self.linear.close(&self.folder, &mut self.manifest.files)?;
        self.rest.close(&self.folder, &mut self.manifest.files)?;
        let digests = self.manifest.tensors.iter().map(|(n, t)| (n.as_str(), t.base));
        self.manifest.base = BaseRecord::new(base_name, digests);
        let json = self
            .manifest
            .to_json()
            .map_err(|source| Error::Json { path: self.folder.path(MANIFEST_FILE), source })?;
        let (card, sizes) =
            settle_card(&self.manifest, json.len(), |sizes| model_card(&self.manifest, sizes));
        self.folder.write(MODEL_CARD_FILE, card.as_bytes())?;
        self.folder.write(MANIFEST_FILE, json.as_bytes())?;
        self.folder.commit()?;
        Ok((self.manifest, sizes))
    }
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

/// The bytes of a tensor of this shape as a part.
///
/// Panics when they are not as many: the caller read them from that tensor.
fn part(dtype: DType, shape: &[usize], bytes: &[u8]) -> Part {
    let data = PartData::from_le_bytes(dtype, bytes);
    match data.and_then(|data| Part::new(shape.to_vec(), data)) {
        Some(part) => part,
        None => unreachable!("{} bytes for {dtype} {shape:?}", bytes.len()),
    }
}

/// A numbered sequence of tensor files, the last one not yet written.
#[derive(Debug)]
struct Files {
    prefix: &'static str,
    n_written: usize,
    parts: Vec<(String, Part)>,
}

impl Files {
    fn new(prefix: &'static str) -> Self {
        Self { prefix, n_written: 0, parts: Vec::new() }
    }

    fn name(&self) -> String {
        format!("{}{:05}.safetensors", self.prefix, self.n_written + 1)
    }

    /// The file that the next tensor goes to.
    fn file(
        &mut self,
        folder: &StagedFolder,
        files: &mut BTreeMap<String, FileRecord>,
    ) -> Result<String> {
        if self.parts.iter().map(|(_, p)| p.size_bytes()).sum::<usize>() >= FILE_BYTES {
            self.close(folder, files)?;
        }
        Ok(self.name())
    }

    /// Writes the parts that are held.
    fn close(
        &mut self,
        folder: &StagedFolder,
        files: &mut BTreeMap<String, FileRecord>,
    ) -> Result<()> {
        if self.parts.is_empty() {
            return Ok(());
        }
        let name = self.name();
        let entry = |(name, part): &(String, Part)| TensorEntry {
            name: name.clone(),
            dtype: part.dtype(),
            shape: part.shape().to_vec(),
        };
        let entries: Vec<TensorEntry> = self.parts.iter().map(entry).collect();
        let mut writer = TensorWriter::create(&folder.path(&name), &entries)?;
        for (_, part) in self.parts.drain(..) {
            writer.write(&part.data().to_le_bytes())?;
        }
        let (bytes, blake3) = writer.finish()?;
        files.insert(name, FileRecord { bytes, blake3 });
        self.n_written += 1;
        Ok(())
    }
}
