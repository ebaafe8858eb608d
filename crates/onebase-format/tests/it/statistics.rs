//! Statistics are read as they were written, or refused.

use std::path::{Path, PathBuf};

use crate::support::with_header;
use onebase_format::artifact::BaseRecord;
use onebase_format::statistics::{
    Measured, STATISTICS_FILE, Source, Statistics, StatisticsManifest, StatisticsWriter,
};
use onebase_format::{Digest, Error};
use serde_json::{Value, json};
use tempfile::TempDir;

/// `[input, in_features]` of every block.
const INPUTS: [(&str, usize); 3] = [("attention", 4), ("feed_forward", 3), ("expert.0", 1)];
const LAYER: &str = "layer-00001.safetensors";

fn source() -> Source {
    Source::Text { name: "t.txt".into(), blake3: Digest::of(b"text") }
}

/// A second moment that no other input has: its diagonal outweighs the rest.
fn moment(layer: usize, n: usize) -> Vec<f64> {
    let element = |i: usize| {
        let (row, column) = (i / n, i % n);
        let diagonal = if row == column { 1000 } else { 0 };
        (layer * 100 + row.max(column) * 10 + row.min(column) + diagonal) as f64 / 8.0
    };
    (0..n * n).map(element).collect()
}

fn put(writer: &mut StatisticsWriter, layer: usize) {
    let moments = INPUTS.map(|(input, n)| (input, n, moment(layer, n)));
    let measured =
        moments.each_ref().map(|(input, n, moment)| Measured { input, in_features: *n, moment });
    writer.put_layer(layer, &measured).unwrap();
}

fn begin(dir: &Path) -> Result<StatisticsWriter, Error> {
    let model = BaseRecord { name: "base".into(), blake3: Digest::of(b"model") };
    StatisticsWriter::create(dir, "test 1", model, source(), [600, 512])
}

/// Statistics of two blocks in a folder of their own.
struct Folder {
    dir: TempDir,
    written: StatisticsManifest,
}

impl Folder {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = begin(&dir.path().join("stats")).unwrap();
        (0..2).for_each(|layer| put(&mut writer, layer));
        let written = writer.finish().unwrap();
        Self { dir, written }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("stats")
    }

    fn open(&self) -> Result<Statistics, Error> {
        Statistics::open(&self.path())
    }

    fn edit(&self, edit: impl FnOnce(&mut Value)) {
        let path = self.path().join(STATISTICS_FILE);
        let mut manifest = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        edit(&mut manifest);
        std::fs::write(path, manifest.to_string()).unwrap();
    }

    /// Replaces the bytes of a block's file, whose length the manifest then says.
    fn replace(&self, bytes: &[u8]) {
        std::fs::write(self.path().join(LAYER), bytes).unwrap();
        self.edit(|m| m["files"][LAYER]["bytes"] = json!(bytes.len()));
    }
}

#[test]
fn what_was_written_is_read() {
    let folder = Folder::new();
    let statistics = folder.open().unwrap();
    assert_eq!(*statistics.manifest(), folder.written);
    statistics.check_files().unwrap();
    for layer in 0..2 {
        for (input, n) in INPUTS {
            let got = statistics.moment(layer, input, n).unwrap();
            let wide: Vec<f64> = got.iter().map(|v| f64::from(*v)).collect();
            assert_eq!(wide, moment(layer, n), "{layer} {input}");
        }
    }
    let record = statistics.record();
    let bytes = std::fs::read(folder.path().join(STATISTICS_FILE)).unwrap();
    assert_eq!((record.blake3, record.n_tokens), (Some(Digest::of(&bytes)), 600));
    assert_eq!(record.sequential, None);
    assert_eq!(record.source, source());
    // Nothing is left beside it, and the same statistics are the same bytes.
    assert_eq!(std::fs::read_dir(folder.dir.path()).unwrap().count(), 1);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 3);
    assert_eq!(Folder::new().open().unwrap().record(), record);
}

#[test]
fn a_folder_appears_when_it_is_complete() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("stats");
    let mut writer = begin(&target).unwrap();
    put(&mut writer, 0);
    assert!(!target.exists());
    assert!(matches!(begin(&target), Err(Error::Busy { .. })));
    drop(writer);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    let folder = Folder::new();
    assert!(matches!(begin(&folder.path()), Err(Error::Exists { .. })));
}

#[test]
fn what_was_not_measured_is_named() {
    let folder = Folder::new();
    let statistics = folder.open().unwrap();
    for (layer, input) in [(2, "attention"), (0, "expert.1")] {
        let error = statistics.moment(layer, input, 4).unwrap_err();
        assert!(matches!(error, Error::MissingInput { .. }), "{error}");
        assert!(error.to_string().contains(&format!("layers.{layer}.{input}")), "{error}");
        assert!(error.hint().unwrap().contains("onebase calibrate"));
    }
    let error = statistics.check(0, "attention", 5).unwrap_err();
    assert!(matches!(error, Error::InFeatures { expected: 5, got: 4, .. }), "{error}");
    assert!(error.hint().is_some());
}

#[test]
fn altered_moments_are_refused_by_name() {
    let folder = Folder::new();
    let path = folder.path().join(LAYER);
    let whole = std::fs::read(&path).unwrap();
    // Each byte of the last tensors' data; a header's byte changes what is read or where.
    for at in whole.len() - 24..whole.len() {
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        let statistics = folder.open().unwrap();
        let refused: Vec<Error> =
            INPUTS.iter().filter_map(|(input, n)| statistics.moment(1, input, *n).err()).collect();
        let [error] = &refused[..] else { panic!("byte {at}: {refused:?}") };
        let Error::TensorDigest { path: named, .. } = error else { panic!("{error}") };
        assert_eq!(*named, path);
        assert!(error.hint().is_some());
        assert!(matches!(statistics.check_files(), Err(Error::FileDigest { .. })));
        assert!(statistics.moment(0, "attention", 4).is_ok(), "the other block is sound");
    }
    for n in [0, 7, 8, 60, whole.len() - 1] {
        std::fs::write(&path, &whole[..n]).unwrap();
        let error = folder.open().unwrap_err();
        assert!(matches!(&error, Error::FileSize { path: p, .. } if *p == path), "{error}");
        folder.replace(&whole[..n]);
        assert!(matches!(folder.open().unwrap_err(), Error::Header { .. }), "{n} bytes");
    }
    std::fs::remove_file(&path).unwrap();
    assert!(matches!(folder.open().unwrap_err(), Error::Io { .. }));
}

#[test]
fn hostile_manifests_are_refused() {
    type Edit = fn(&mut Value);
    type Is = fn(&Error) -> bool;
    let cases: [(Edit, Is); 13] = [
        (|m| m["version"] = json!(2), |e| matches!(e, Error::NewerFormat { got: 2, .. })),
        (|m| m["version"] = json!(2.5), |e| matches!(e, Error::Json { .. })),
        (|m| m["format"] = json!("onebase-delta"), |e| matches!(e, Error::OtherFormat { .. })),
        (|m| m["inputs"] = json!([]), |e| matches!(e, Error::Json { .. })),
        (|m| m["source"] = json!({"kind": "dream"}), |e| matches!(e, Error::Json { .. })),
        (
            |m| m["files"]["../secret"] = m["files"][LAYER].clone(),
            |e| matches!(e, Error::UnsafeName { .. }),
        ),
        (
            |m| m["inputs"]["layers.1.attention"]["file"] = json!("other"),
            |e| matches!(e, Error::Manifest { .. }),
        ),
        (
            |m| m["inputs"]["layers.9.attention"] = m["inputs"]["layers.1.attention"].clone(),
            |e| matches!(e, Error::MissingTensor { .. }),
        ),
        (
            |m| m["inputs"]["layers.1.attention"]["in_features"] = json!(5),
            |e| matches!(e, Error::Manifest { .. }),
        ),
        (
            |m| m["inputs"]["layers.1.attention"]["in_features"] = json!(u64::MAX),
            |e| matches!(e, Error::Manifest { .. }),
        ),
        (
            |m| m["inputs"]["layers.1.attention"]["in_features"] = json!(1u64 << 32),
            |e| matches!(e, Error::Manifest { .. }),
        ),
        (
            |m| m["inputs"]["layers.1.attention"]["in_features"] = json!(-1),
            |e| matches!(e, Error::Json { .. }),
        ),
        (
            |m| m["inputs"]["layers.1.attention"]["blake3"] = json!("00"),
            |e| matches!(e, Error::Json { .. }),
        ),
    ];
    for (index, (edit, is)) in cases.into_iter().enumerate() {
        let folder = Folder::new();
        folder.edit(edit);
        let error = folder.open().unwrap_err();
        assert!(is(&error), "case {index}: {error}");
    }
    let folder = Folder::new();
    std::fs::remove_file(folder.path().join(STATISTICS_FILE)).unwrap();
    let error = folder.open().unwrap_err();
    assert!(matches!(error, Error::NotA { .. }), "{error}");
    assert!(error.hint().unwrap().contains("onebase calibrate"));
}

/// Statistics that say of themselves what is true, and are of no inputs that there can be.
#[test]
fn numbers_that_are_in_no_moment_are_refused() {
    for (value, row) in [(f32::NAN, 1), (f32::INFINITY, 1), (f32::NEG_INFINITY, 1), (-1.0, 2)] {
        let folder = Folder::new();
        // Rows (1), (v, 1), (0, 0, 1), or a diagonal that is negative.
        let mut values = [1.0, 0.5, 1.0, 0.0, 0.0, 1.0f32];
        values[if row == 1 { 1 } else { 5 }] = value;
        let data: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let header =
            br#"{"layers.1.feed_forward":{"dtype":"F32","shape":[6],"data_offsets":[0,24]}}"#;
        folder.replace(&with_header(header, &data));
        let digest = Digest::of(&[b"F32 6\n", &data[..]].concat());
        folder.edit(|m| {
            let inputs = m["inputs"].as_object_mut().unwrap();
            inputs.retain(|name, _| !name.starts_with("layers.1") || name.ends_with("forward"));
            m["inputs"]["layers.1.feed_forward"]["blake3"] = json!(digest.to_string());
        });
        let statistics = folder.open().unwrap();
        let error = statistics.moment(1, "feed_forward", 3).unwrap_err();
        let Error::Manifest { entry, problem, .. } = &error else { panic!("{error}") };
        assert_eq!(entry, "layers.1.feed_forward");
        assert!(problem.contains(&format!("row {row}")), "{problem}");
    }
}

/// Whoever wrote them: what no inputs can have is refused.
#[test]
fn a_matrix_that_is_no_moment_is_refused() {
    for (bad, values) in [
        ("row 1, column 0: 1 ", [0.0, 1.0, 1.0, 0.0]),
        ("row 1, column 0: -3 ", [2.0, -3.0, -3.0, 4.0]),
        ("row 1, column 1: -1 ", [1.0, 0.0, 0.0, -1.0]),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("stats");
        let mut writer = begin(&path).unwrap();
        let measured = [Measured { input: "attention", in_features: 2, moment: &values }];
        writer.put_layer(0, &measured).unwrap();
        writer.finish().unwrap();
        let error = Statistics::open(&path).unwrap().moment(0, "attention", 2).unwrap_err();
        assert!(error.to_string().contains(bad), "{error}");
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("stats");
    let mut writer = begin(&path).unwrap();
    let same = [Measured { input: "attention", in_features: 2, moment: &[4.0, 2.0, 2.0, 1.0] }];
    writer.put_layer(0, &same).unwrap();
    writer.finish().unwrap();
    // Inputs that are multiples of each other are some.
    Statistics::open(&path).unwrap().moment(0, "attention", 2).unwrap();
}
