use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::manifest::{
    InputRecord, MOMENT_DTYPE, STATISTICS_FILE, STATISTICS_FORMAT, STATISTICS_VERSION,
    StatisticsManifest, StatisticsRecord, input_name, packed_len,
};
use crate::artifact::read_versioned;
use crate::checkpoint::{plain_name, tensor_head};
use crate::error::Error;
use crate::safetensors_file::{SafetensorsFile, file_digest};
use crate::{Digest, Result};
use onebase_tensor::DType;

/// A folder of statistics: what it says of itself checked against the files, no moment
/// read yet.
#[derive(Debug)]
pub struct Statistics {
    dir: PathBuf,
    manifest: StatisticsManifest,
    digest: Digest,
    files: BTreeMap<String, SafetensorsFile>,
}

/// How far sums in f32 may be from what they are sums of.
const ROUNDING: f64 = 1e-3;

impl Statistics {
    /// Opens a folder that [`super::StatisticsWriter`] has written.
    ///
    /// # Errors
    /// When its manifest is missing, malformed, of another format or newer, a file that it
    /// lists is missing or of another length, or holds something else than it says.
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join(STATISTICS_FILE);
        if !path.is_file() {
            return Err(Error::NotA {
                path: dir.to_owned(),
                expected: "folder of statistics",
                missing: STATISTICS_FILE,
            });
        }
        let (manifest, digest): (StatisticsManifest, Digest) =
            read_versioned(&path, STATISTICS_FORMAT, STATISTICS_VERSION)?;
        let mut files = BTreeMap::new();
        for (name, record) in &manifest.files {
            let file = dir.join(plain_name(&path, name)?);
            let got = std::fs::metadata(&file).map_err(Error::io("read", &file))?.len();
            if got != record.bytes {
                return Err(Error::FileSize { path: file, expected: record.bytes, got });
            }
            files.insert(name.clone(), SafetensorsFile::open(&file)?);
        }
        let statistics = Self { dir: dir.to_owned(), manifest, digest, files };
        for (input, record) in &statistics.manifest.inputs {
            statistics.check_record(input, record)?;
        }
        Ok(statistics)
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What it says of itself.
    pub fn manifest(&self) -> &StatisticsManifest {
        &self.manifest
    }

    /// What is said of them where something was made with them.
    pub fn record(&self) -> StatisticsRecord {
        let StatisticsManifest { model, source, n_tokens, .. } = &self.manifest;
        StatisticsRecord {
            blake3: Some(self.digest),
            model: model.clone(),
            source: source.clone(),
            n_tokens: *n_tokens,
            sequential: None,
        }
    }

    fn bad(&self, entry: &str, problem: String) -> Error {
        Error::Manifest { path: self.dir.join(STATISTICS_FILE), entry: entry.to_owned(), problem }
    }

    fn file(&self, input: &str, name: &str) -> Result<&SafetensorsFile> {
        let file = self.files.get(name);
        file.ok_or_else(|| self.bad(input, format!("file {name} is not listed")))
    }

    /// What a later read relies on.
    fn check_record(&self, input: &str, record: &InputRecord) -> Result<()> {
        let header = self.file(input, &record.file)?.header(input)?;
        let len = packed_len(record.in_features)
            .ok_or_else(|| self.bad(input, format!("in_features {}", record.in_features)))?;
        if header.dtype != MOMENT_DTYPE || header.shape != [len] {
            let got = format!("{} {:?}", header.dtype, header.shape);
            let expected = format!("{MOMENT_DTYPE} [{len}]");
            return Err(self.bad(input, format!("expected {expected}, got {got}")));
        }
        Ok(())
    }

    /// Checks that an input of a block was measured, and with as many features.
    ///
    /// # Errors
    /// When it was not.
    pub fn check(&self, layer: usize, input: &str, in_features: usize) -> Result<()> {
        self.input(layer, input, in_features).map(|_| ())
    }

    fn input(
        &self,
        layer: usize,
        input: &str,
        in_features: usize,
    ) -> Result<(String, &InputRecord)> {
        let name = input_name(layer, input);
        let path = || self.dir.join(STATISTICS_FILE);
        let Some(record) = self.manifest.inputs.get(&name) else {
            return Err(Error::MissingInput { path: path(), input: name });
        };
        if record.in_features != in_features {
            let (expected, got) = (in_features, record.in_features);
            return Err(Error::InFeatures { path: path(), input: name, expected, got });
        }
        Ok((name, record))
    }

    /// The mean of `x xᵀ` over the tokens for an input of a block,
    /// `[in_features, in_features]`, symmetric, finite, its diagonal not negative; zero for
    /// an expert that no token was sent to.
    ///
    /// # Errors
    /// When it was not measured, has other features, cannot be read or was altered.
    pub fn moment(&self, layer: usize, input: &str, in_features: usize) -> Result<Vec<f32>> {
        let (name, record) = self.input(layer, input, in_features)?;
        let file = self.file(&name, &record.file)?;
        let header = file.header(&name)?;
        let n = in_features;
        let mut hasher = blake3::Hasher::new();
        hasher.update(tensor_head(DType::F32, &header.shape).as_bytes());
        let mut moment = vec![0.0; n * n];
        let (mut bytes, mut offset) = (Vec::new(), 0);
        for (row, values) in moment.chunks_exact_mut(n.max(1)).enumerate() {
            let values = &mut values[..=row];
            bytes.resize(size_of_val(values), 0);
            file.read(header, offset, &mut bytes)?;
            offset += bytes.len();
            hasher.update(&bytes);
            DType::F32.widen(&bytes, values);
        }
        let got = Digest::finish(&hasher);
        if got != record.blake3 {
            let (path, expected) = (file.path.clone(), record.blake3);
            return Err(Error::TensorDigest { path, tensor: name, expected, got });
        }
        for row in 0..n {
            let is_bad = |column: &usize| {
                let value = moment[row * n + column];
                // No mean of products is larger than the roots of the means of the squares.
                let [a, b] = [row, *column].map(|i| f64::from(moment[i * (n + 1)]));
                let most = (a * b).sqrt() * (1.0 + ROUNDING) + f64::from(f32::MIN_POSITIVE);
                !value.is_finite()
                    || (*column == row && value < 0.0)
                    || f64::from(value.abs()) > most
            };
            if let Some(column) = (0..=row).find(is_bad) {
                let value = moment[row * n + column];
                let problem = format!("row {row}, column {column}: {value} is in no moment");
                return Err(Error::Manifest { path: file.path.clone(), entry: name, problem });
            }
            for column in 0..row {
                moment[column * n + row] = moment[row * n + column];
            }
        }
        Ok(moment)
    }

    /// Reads every file and compares its digest.
    ///
    /// # Errors
    /// When a file has changed.
    pub fn check_files(&self) -> Result<()> {
        for (name, record) in &self.manifest.files {
            let path = self.dir.join(name);
            let got = file_digest(&path)?;
            if got != record.blake3 {
                return Err(Error::FileDigest { path, expected: record.blake3, got });
            }
        }
        Ok(())
    }
}
