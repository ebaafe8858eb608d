use std::collections::BTreeMap;
use std::path::Path;

use onebase_tensor::{DType, EncodedDelta};

use super::manifest::{
    ADDED_ROWS, BaseRecord, CodecRecord, FORMAT, FORMAT_VERSION, FileRecord, MANIFEST_FILE,
    MODEL_CARD_FILE, Manifest, Role, Storage, TensorRecord, part_name,
};
use super::reader::Sizes;
use crate::error::Error;
use crate::{Digest, Result, StagedFolder, TensorWriter};

/// Data bytes after which a tensor file is closed and the next one begun.
const FILE_BYTES: usize = 1 << 30;

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
            },
            linear: Files::new("linear"),
            rest: Files::new("rest"),
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
        let (file, writer) = self.rest.writer(&self.folder, &mut self.manifest.files)?;
        writer.begin(origin.name, origin.dtype, origin.shape);
        writer.write(bytes)?;
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
        delta: &EncodedDelta,
        added_rows: &[u8],
    ) -> Result<()> {
        let files = if origin.role == Role::Linear { &mut self.linear } else { &mut self.rest };
        let (file, writer) = files.writer(&self.folder, &mut self.manifest.files)?;
        for (part, data) in &delta.parts {
            writer.begin(&part_name(origin.name, part), data.dtype(), data.shape());
            writer.write(&data.data().to_le_bytes())?;
        }
        let n_added = origin.shape[0] - delta.shape[0];
        if n_added > 0 {
            let shape = [n_added, delta.shape[1]];
            writer.begin(&part_name(origin.name, ADDED_ROWS), origin.dtype, &shape);
            writer.write(added_rows)?;
        }
        let known = self.manifest.codecs.iter().position(|c| *c == codec);
        let codec = known.unwrap_or_else(|| {
            self.manifest.codecs.push(codec);
            self.manifest.codecs.len() - 1
        });
        let parts = delta.parts.keys().cloned().collect();
        self.record(origin, Storage::Codec { codec, file, parts, added_rows: n_added });
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
        self.linear.close(&mut self.manifest.files)?;
        self.rest.close(&mut self.manifest.files)?;
        let digests = self.manifest.tensors.iter().map(|(n, t)| (n.as_str(), t.base));
        self.manifest.base = BaseRecord::new(base_name, digests);
        let json = self
            .manifest
            .to_json()
            .map_err(|source| Error::Json { path: self.folder.path(MANIFEST_FILE), source })?;
        // The card states the total, which depends on how long the card is.
        let mut card = String::new();
        let mut sizes = Sizes::new(&self.manifest, json.len() as u64);
        for _ in 0..4 {
            sizes = Sizes::new(&self.manifest, (json.len() + card.len()) as u64);
            let next = model_card(&self.manifest, &sizes);
            if next == card {
                break;
            }
            card = next;
        }
        self.folder.write(MODEL_CARD_FILE, card.as_bytes())?;
        self.folder.write(MANIFEST_FILE, json.as_bytes())?;
        self.folder.commit()?;
        Ok((self.manifest, sizes))
    }
}

/// A numbered sequence of tensor files.
#[derive(Debug)]
struct Files {
    prefix: &'static str,
    count: usize,
    current: Option<(String, TensorWriter)>,
}

impl Files {
    fn new(prefix: &'static str) -> Self {
        Self { prefix, count: 0, current: None }
    }

    /// The file that the next tensor goes to.
    fn writer(
        &mut self,
        folder: &StagedFolder,
        files: &mut BTreeMap<String, FileRecord>,
    ) -> Result<(String, &mut TensorWriter)> {
        if self.current.as_ref().is_some_and(|(_, w)| w.size_bytes() >= FILE_BYTES) {
            self.close(files)?;
        }
        let (name, writer) = match self.current.take() {
            Some(current) => current,
            None => {
                self.count += 1;
                let name = format!("{}-{:05}.safetensors", self.prefix, self.count);
                let writer = TensorWriter::create(&folder.path(&name))?;
                (name, writer)
            }
        };
        let (name, writer) = self.current.insert((name, writer));
        Ok((name.clone(), writer))
    }

    fn close(&mut self, files: &mut BTreeMap<String, FileRecord>) -> Result<()> {
        if let Some((name, writer)) = self.current.take() {
            let (bytes, blake3) = writer.finish()?;
            files.insert(name, FileRecord { bytes, blake3 });
        }
        Ok(())
    }
}
