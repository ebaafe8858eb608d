use std::collections::BTreeMap;

use onebase_format::Checkpoint;

use super::shape::{Experts, Family, Role};
use super::*;

/// Large enough for a mean to be near its expectation, small enough to be quick.
fn tiny(family: Family, tied: bool) -> Shape {
    Shape {
        name: "tiny",
        family,
        hidden: 256,
        intermediate: 640,
        n_layers: 2,
        n_heads: 4,
        n_kv_heads: 2,
        head_dim: 64,
        names_head_dim: true,
        vocab: 1000,
        tied,
        rope_theta: 10_000.0,
        rope_factor: (family == Family::Llama).then_some(8.0),
        max_positions: 256,
        experts: None,
    }
}

/// The same with experts.
fn sparse(shape: Shape) -> Shape {
    let experts = Experts { n_experts: 64, per_token: 2, intermediate: 96 };
    Shape { experts: Some(experts), ..shape }
}

fn options(shape: Shape) -> Options {
    Options {
        shape,
        seed: 7,
        mean_abs_delta: DEFAULT_MEAN_ABS_DELTA,
        rank: 16,
        n_fine_tunes: 1,
        max_shard_bytes: MAX_SHARD_BYTES,
    }
}

fn write(dir: &Path, options: &Options, n_threads: usize) {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads).build().unwrap();
    let written = std::sync::atomic::AtomicU64::new(0);
    let count = |n| {
        written.fetch_add(n, std::sync::atomic::Ordering::Relaxed);
    };
    pool.install(|| write_models(dir, options, &count)).unwrap();
    let size: u64 = options.shape.tensors().iter().map(TensorSpec::size_bytes).sum();
    assert_eq!(written.into_inner(), 2 * size);
}

/// Every file of both folders.
fn files(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let folders = [BASE, FINE_TUNE].map(|name| dir.join(name));
    let entries = folders.iter().flat_map(|f| std::fs::read_dir(f).unwrap());
    entries
        .map(|e| {
            let path = e.unwrap().path();
            let bytes = std::fs::read(&path).unwrap();
            (path.strip_prefix(dir).unwrap().to_owned(), bytes)
        })
        .collect()
}

fn values(checkpoint: &Checkpoint, name: &str) -> Vec<f32> {
    let tensor = checkpoint.tensor(name).unwrap();
    assert_eq!(tensor.dtype(), DType::BF16);
    let mut bytes = vec![0; tensor.size_bytes()];
    tensor.read(0, &mut bytes).unwrap();
    let mut values = vec![0.0; tensor.n_weights()];
    tensor.dtype().widen(&bytes, &mut values);
    values
}

#[test]
fn the_bytes_depend_on_the_seed_and_not_on_the_threads() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let first = options(tiny(Family::Llama, true));
    let second = Options { seed: 8, ..first.clone() };
    write(&at("one"), &first, 1);
    write(&at("three"), &first, 3);
    write(&at("other"), &second, 1);
    let (one, other) = (files(&at("one")), files(&at("other")));
    assert!(one == files(&at("three")));
    for (path, bytes) in &one {
        let is_weights = path.extension().is_some_and(|e| e == "safetensors");
        assert_eq!(*bytes != other[path], is_weights, "{}", path.display());
    }
}

#[test]
fn both_folders_are_checkpoints_with_the_asked_delta() {
    for (shape, mean_abs_delta, rank) in [
        (tiny(Family::Llama, false), 0.0015, 16),
        (tiny(Family::Qwen2, true), 0.004, 3),
        (tiny(Family::Qwen3, true), 0.0005, 0),
        (sparse(tiny(Family::Qwen3, false)), 0.0015, 16),
    ] {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), &Options { mean_abs_delta, rank, ..options(shape) }, 2);
        let base = Checkpoint::open(&dir.path().join(BASE)).unwrap();
        let fine_tune = Checkpoint::open(&dir.path().join(FINE_TUNE)).unwrap();
        assert_eq!(base.config(), &shape.config());
        assert_eq!(base.config(), fine_tune.config());
        let mut expected: Vec<_> = shape.tensors();
        expected.sort_by(|a, b| a.name.cmp(&b.name));
        let names: Vec<&str> = expected.iter().map(|t| t.name.as_str()).collect();
        assert_eq!(base.names().collect::<Vec<_>>(), names);
        assert_eq!(fine_tune.names().collect::<Vec<_>>(), names);
        for TensorSpec { name, shape, role } in &expected {
            assert_eq!(base.tensor(name).unwrap().shape(), shape);
            assert_eq!(fine_tune.tensor(name).unwrap().shape(), shape);
            let (b, f) = (values(&base, name), values(&fine_tune, name));
            assert!(b.iter().chain(&f).all(|x| x.is_finite()), "{name}");
            assert!(b != f, "{name}");
            if matches!(role, Role::Linear | Role::Embedding) {
                let sum: f64 = b.iter().zip(&f).map(|(b, f)| f64::from((f - b).abs())).sum();
                let got = sum / b.len() as f64;
                let ratio = got / f64::from(mean_abs_delta);
                assert!((0.95..1.05).contains(&ratio), "{name}: {got}, asked {mean_abs_delta}");
                let std =
                    (b.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / b.len() as f64).sqrt();
                let asked =
                    if *role == Role::Embedding { 0.02 } else { (shape[1] as f64).powf(-0.5) };
                assert!((0.95..1.05).contains(&(std / asked)), "{name}: {std}, asked {asked}");
            }
        }
    }
}

#[test]
fn shards_are_filled_in_order_and_indexed() {
    let shape = tiny(Family::Llama, false);
    let dir = tempfile::tempdir().unwrap();
    // The embedding alone is larger: it gets a file of its own.
    let max_shard_bytes = 500_000;
    write(dir.path(), &Options { max_shard_bytes, ..options(shape) }, 2);
    let folder = dir.path().join(FINE_TUNE);
    let checkpoint = Checkpoint::open(&folder).unwrap();
    assert_eq!(checkpoint.names().count(), shape.tensors().len());
    let embedding = checkpoint.tensor("model.embed_tokens.weight").unwrap();
    let n_files = std::fs::read_dir(&folder).unwrap().count() - 5;
    let name = format!("model-00001-of-{n_files:05}.safetensors");
    assert_eq!(embedding.path(), folder.join(name));
    let index = std::fs::read(folder.join("model.safetensors.index.json")).unwrap();
    let index: serde_json::Value = serde_json::from_slice(&index).unwrap();
    assert_eq!(index["metadata"]["total_size"], checkpoint.size_bytes());
    for (file, run) in plan_shards(&shape.tensors(), max_shard_bytes) {
        let size: u64 = run.iter().map(TensorSpec::size_bytes).sum();
        assert!(size <= max_shard_bytes || run.len() == 1, "{file}: {size}");
    }
}

#[test]
fn a_large_model_is_split_as_the_published_one() {
    let tensors = Shape::named("llama-3.1-8b").unwrap().tensors();
    let shards = plan_shards(&tensors, MAX_SHARD_BYTES);
    let sizes: Vec<u64> =
        shards.iter().map(|(_, run)| run.iter().map(TensorSpec::size_bytes).sum()).collect();
    // The published files without their headers.
    assert_eq!(sizes, [4_976_689_152, 4_999_790_592, 4_915_904_512, 1_168_138_240]);
    assert_eq!(shards[0].0, "model-00001-of-00004.safetensors");
    let tensors = Shape::named("llama-3.2-1b").unwrap().tensors();
    let shards = plan_shards(&tensors, MAX_SHARD_BYTES);
    assert_eq!(shards.len(), 1);
    assert_eq!(shards[0].0, "model.safetensors");
}

#[test]
fn what_is_there_is_not_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let there = dir.path().join(FINE_TUNE);
    std::fs::create_dir(&there).unwrap();
    let error = write_models(dir.path(), &options(tiny(Family::Llama, true)), &|_| {}).unwrap_err();
    assert_eq!(error.to_string(), format!("{} already exists", there.display()));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    assert_eq!(std::fs::read_dir(&there).unwrap().count(), 0);
}

#[test]
fn impossible_options_are_refused_before_anything_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let good = options(tiny(Family::Llama, true));
    let refusal =
        |options: Options| write_models(dir.path(), &options, &|_| {}).unwrap_err().to_string();
    for mean_abs_delta in [f32::NAN, f32::INFINITY, -0.1, 1.1] {
        let error = refusal(Options { mean_abs_delta, ..good.clone() });
        assert_eq!(error, format!("--delta: expected a number from 0 to 1, got {mean_abs_delta}"));
    }
    assert_eq!(
        refusal(Options { rank: 129, ..good.clone() }),
        "--rank: expected at most 128, the smallest side of a matrix, got 129"
    );
    assert_eq!(
        refusal(Options { rank: 65, shape: sparse(good.shape), ..good }),
        "--rank: expected at most 64, the smallest side of a matrix, got 65"
    );
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}
