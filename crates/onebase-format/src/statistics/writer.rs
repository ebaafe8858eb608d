use std::collections::BTreeMap;
use std::path::Path;

use onebase_tensor::DType;

use super::manifest::{
    InputRecord, STATISTICS_FILE, STATISTICS_FORMAT, STATISTICS_VERSION, Source,
    StatisticsManifest, input_name, packed_len,
};
use crate::artifact::{BaseRecord, FileRecord};
use crate::checkpoint::tensor_head;
use crate::error::Error;
use crate::{Digest, Result, StagedFolder, TensorEntry, TensorWriter};

/// What was measured of one input of a block.
#[derive(Clone, Copy, Debug)]
pub struct Measured<'a> {
    /// What it is called within its block: `feed_forward`.
    pub input: &'a str,
    /// Input features.
    pub in_features: usize,
    /// The mean of `x xᵀ` over the tokens, `[in_features, in_features]`, symmetric, finite.
    pub moment: &'a [f64],
}

/// Writes statistics block by block into a folder that appears under its name when it
/// is complete.
#[derive(Debug)]
pub struct StatisticsWriter {
    folder: StagedFolder,
    manifest: StatisticsManifest,
}

impl StatisticsWriter {
    /// Starts statistics of a model in the folder `target`, which must not exist.
    ///
    /// # Errors
    /// When the folder exists, another process is writing it, or it cannot be written.
    pub fn create(
        target: &Path,
        tool: &str,
        model: BaseRecord,
        source: Source,
        [n_tokens, window_tokens]: [usize; 2],
    ) -> Result<Self> {
        let manifest = StatisticsManifest {
            format: STATISTICS_FORMAT.to_owned(),
            version: STATISTICS_VERSION,
            tool: tool.to_owned(),
            model,
            source,
            n_tokens,
            window_tokens,
            files: BTreeMap::new(),
            inputs: BTreeMap::new(),
        };
        Ok(Self { folder: StagedFolder::create(target)?, manifest })
    }

    /// Stores the moments of a block's inputs, rounded to f32. A block is put once.
    ///
    /// Panics when a moment is not one of its input features.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn put_layer(&mut self, layer: usize, measured: &[Measured<'_>]) -> Result<()> {
        let file = format!("layer-{layer:05}.safetensors");
        let entries: Vec<TensorEntry> = measured
            .iter()
            .map(|one| {
                let n = one.in_features;
                assert_eq!(Some(one.moment.len()), n.checked_mul(n), "{}", one.input);
                let Some(len) = packed_len(n) else { unreachable!("the square is in memory") };
                let name = input_name(layer, one.input);
                TensorEntry { name, dtype: DType::F32, shape: vec![len] }
            })
            .collect();
        let mut writer = TensorWriter::create(&self.folder.path(&file), &entries)?;
        for (one, entry) in measured.iter().zip(&entries) {
            let n = one.in_features;
            let mut hasher = blake3::Hasher::new();
            hasher.update(tensor_head(entry.dtype, &entry.shape).as_bytes());
            for (row, values) in one.moment.chunks_exact(n.max(1)).enumerate() {
                #[allow(clippy::cast_possible_truncation)]
                let narrow = values[..=row].iter().map(|v| *v as f32);
                let bytes: Vec<u8> = narrow.flat_map(f32::to_le_bytes).collect();
                hasher.update(&bytes);
                writer.write(&bytes)?;
            }
            let record =
                InputRecord { file: file.clone(), in_features: n, blake3: Digest::finish(&hasher) };
            self.manifest.inputs.insert(entry.name.clone(), record);
        }
        let (bytes, blake3) = writer.finish()?;
        self.manifest.files.insert(file, FileRecord { bytes, blake3 });
        Ok(())
    }

    /// Completes the statistics and gives the folder its name.
    ///
    /// # Errors
    /// When something cannot be written.
    pub fn finish(self) -> Result<StatisticsManifest> {
        let path = self.folder.path(STATISTICS_FILE);
        let mut json = serde_json::to_vec_pretty(&self.manifest)
            .map_err(|source| Error::Json { path, source })?;
        json.push(b'\n');
        self.folder.write(STATISTICS_FILE, &json)?;
        // What a reader would refuse gets no name.
        super::Statistics::open(&self.folder.path(""))?;
        self.folder.commit()?;
        Ok(self.manifest)
    }
}
