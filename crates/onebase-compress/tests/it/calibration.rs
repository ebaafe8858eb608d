//! Statistics: what is measured, whom they are of, and what is encoded with them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::support::{Folder, Memory, SAME, UP, demo, fixture};
use onebase_codec::{CALIBRATED, CODECS, CodecSpec};
use onebase_compress::{
    Budget, Calibration, Error, Inputs, Job, Pair, Plan, Silent, TablePlan, VectorPlan, calibrate,
    check_calibrated, compress, compress_part, expected_memory, generated_tokens, join,
    random_tokens, restore, verify,
};
use onebase_format::artifact::{Artifact, Manifest, Role, Shard};
use onebase_format::statistics::{Source, Statistics};
use onebase_format::{Checkpoint, Digest};
use onebase_model::{KvCache, Logits, Model, Observer, Segment, SiteInput};
use onebase_tensor::MatrixRef;

const RANDOM: Source = Source::Random { seed: 1 };

fn model(dir: &Path) -> Model {
    Model::load(Checkpoint::open(dir).unwrap()).unwrap()
}

/// Statistics of a model on random tokens.
fn measure(dir: &Path, n_tokens: usize, out: &Path) {
    let model = model(dir);
    let tokens = random_tokens(&model, n_tokens, 1);
    calibrate(&model, &tokens, RANDOM, 16, out, &Silent).unwrap();
}

/// `Σ x xᵀ` in f64 over everything that is shown.
#[derive(Default)]
struct Sums(BTreeMap<(usize, SiteInput), (usize, Vec<f64>)>);

impl Observer for Sums {
    fn observe(&mut self, layer: usize, input: SiteInput, x: MatrixRef<'_>) {
        let n = x.shape()[1];
        let (_, sum) = self.0.entry((layer, input)).or_insert_with(|| (n, vec![0.0; n * n]));
        for row in x.data().chunks_exact(n) {
            for (i, a) in row.iter().enumerate() {
                for (j, b) in row.iter().enumerate() {
                    sum[i * n + j] += f64::from(*a) * f64::from(*b);
                }
            }
        }
    }
}

#[test]
fn moments_are_means_over_all_tokens() {
    for family in ["llama_tied_gqa", "mistral_window", "qwen3_moe"] {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("stats");
        // Two whole windows and a rest; few enough that some experts get no token.
        let (n_tokens, window) = if family == "qwen3_moe" { (3, 2) } else { (21, 8) };
        let model = model(&fixture(family));
        let tokens = random_tokens(&model, n_tokens, 7);
        let written = calibrate(&model, &tokens, RANDOM, window, &out, &Silent).unwrap();
        assert_eq!((written.n_tokens, written.window_tokens), (n_tokens, window));
        let mut sums = Sums::default();
        for tokens in tokens.chunks(window) {
            let mut cache = KvCache::new(model.config());
            let segment = Segment { tokens, tenant: None, cache: &mut cache, logits: Logits::None };
            model.forward_observed(&mut [segment], &mut sums).unwrap();
        }
        let statistics = Statistics::open(&out).unwrap();
        statistics.check_files().unwrap();
        assert_eq!(statistics.manifest().inputs.len(), sums.0.len());
        let mut n_unseen = 0;
        for ((layer, input), (n, sum)) in sums.0 {
            let got = statistics.moment(layer, &input.to_string(), n).unwrap();
            let largest = sum.iter().fold(0.0, |m: f64, v| m.max(v.abs()));
            for (got, sum) in got.iter().zip(&sum) {
                let error = (f64::from(*got) * n_tokens as f64 - sum).abs();
                assert!(error <= 1e-6 * largest, "{family}, {layer} {input}: {error}");
            }
            n_unseen += usize::from(largest == 0.0);
        }
        assert_eq!(n_unseen > 0, family == "qwen3_moe");
    }
}

#[test]
fn any_number_of_threads_measures_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let model = model(&demo("base"));
    let digests = [1, 3].map(|n_threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads).build().unwrap();
        pool.install(|| {
            let out = dir.path().join(n_threads.to_string());
            let tokens = generated_tokens(&model, 90, 40, 5, &Silent).unwrap();
            assert_eq!(tokens.len(), 90);
            let source = Source::Generated { seed: 5 };
            calibrate(&model, &tokens, source, 40, &out, &Silent).unwrap();
            Statistics::open(&out).unwrap().record()
        })
    });
    assert_eq!(digests[0], digests[1]);
    // What the seed decides.
    assert_ne!(random_tokens(&model, 20, 1), random_tokens(&model, 20, 2));
    let generated = |seed| generated_tokens(&model, 20, 40, seed, &Silent).unwrap();
    assert_ne!(generated(1), generated(2));
}

#[test]
fn inputs_that_are_no_numbers_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("stats");
    let mut broken = Memory::fixture("qwen3");
    // Gates so large that what is gated is no number in the block's last site.
    let up = broken.tensor(UP);
    let n = up.widen().len();
    up.fill(&vec![f32::MAX; n]);
    broken.write(&dir.path().join("broken"));
    let model = model(&dir.path().join("broken"));
    let tokens = random_tokens(&model, 8, 1);
    let error = calibrate(&model, &tokens, RANDOM, 8, &out, &Silent).unwrap_err();
    let Error::InputNotFinite { input, .. } = &error else { panic!("{error}") };
    assert_eq!(input, "layers.1.feed_forward_output");
    assert!(error.hint().is_some());
    let error = calibrate(&model, &[], RANDOM, 8, &out, &Silent).unwrap_err();
    assert!(matches!(error, Error::ShortText { n_tokens: 0, .. }), "{error}");
    assert!(!out.exists());
    // Nothing half-written is left beside it.
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn statistics_are_of_the_base_or_the_fine_tune() {
    let base = Memory::fixture("qwen3");
    let folder = Folder::new(&base, &base.tuned(1));
    let out = |name: &str| folder.dir.path().join(name);
    let other = out("other");
    base.tuned(2).write(&other);
    let pair = folder.pair();
    for (name, dir) in [("of-base", folder.base()), ("of-tuned", folder.fine_tune())] {
        measure(&dir, 40, &out(name));
        let calibration = Calibration::open(&out(name), &pair).unwrap();
        assert_eq!(calibration.record().n_tokens, 40);
        for spec in pair.specs() {
            let moment = calibration.moment(spec).unwrap();
            assert_eq!(moment.is_some(), spec.role == Role::Linear, "{}", spec.name);
            // Read once for the sites that share it.
            let again = calibration.moment(spec).unwrap();
            assert!(moment.zip(again).is_none_or(|(a, b)| Arc::ptr_eq(&a, &b)));
        }
    }
    measure(&other, 40, &out("of-other"));
    let error = Calibration::open(&out("of-other"), &pair).unwrap_err();
    let Error::OtherStatistics { expected, got, .. } = &error else { panic!("{error}") };
    let names: Vec<&str> = expected.iter().chain([got]).map(|m| m.name.as_str()).collect();
    assert_eq!(names, ["base", "tuned", "other"]);
    let said = error.to_string();
    for model in expected.iter().chain([got]) {
        assert!(said.contains(&model.blake3.to_string()), "{said}");
    }
    assert!(error.hint().unwrap().contains("onebase calibrate"));
}

/// Two layers of random weights, tuned, and statistics of the fine-tune.
struct Measured {
    dir: tempfile::TempDir,
    pair: Pair,
}

impl Measured {
    fn new() -> Self {
        let base = Memory::fixture("qwen3_tied_bf16");
        let folder = Folder::new(&base, &base.tuned(1));
        let pair = folder.pair();
        measure(&folder.fine_tune(), 64, &folder.dir.path().join("stats"));
        Self { dir: folder.dir, pair }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn plan(&self, codec: &str, statistics: &str) -> Plan {
        let calibration = Calibration::open(&self.path(statistics), &self.pair).unwrap();
        Plan {
            calibration: Some(Inputs::Statistics(Arc::new(calibration))),
            ..Plan::new(codec.parse().unwrap(), TablePlan::Exact, VectorPlan::Exact)
        }
    }
}

fn contents(dir: &Path) -> BTreeMap<String, Digest> {
    let files = std::fs::read_dir(dir).unwrap().map(Result::unwrap);
    let digest = |path: &Path| Digest::of(&std::fs::read(path).unwrap());
    files.map(|f| (f.file_name().into_string().unwrap(), digest(&f.path()))).collect()
}

#[test]
fn codecs_that_cannot_use_statistics_refuse_them() {
    let given = Measured::new();
    let can = |name: &str| CALIBRATED.iter().any(|codec| codec.name() == name);
    for codec in CODECS.iter().filter(|codec| !can(codec.name())) {
        let plan = given.plan(codec.name(), "stats");
        let error = compress(&given.pair, &plan, &given.path("out"), &Silent).unwrap_err();
        let Error::NotCalibrated { codec: named, known } = &error else { panic!("{error}") };
        assert_eq!((*named, known.len()), (codec.name(), CALIBRATED.len()));
        let hint = error.hint().unwrap();
        assert!(CALIBRATED.iter().all(|codec| hint.contains(codec.name())), "{hint}");
        // Also where one site alone has the codec.
        for able in CALIBRATED {
            let mut plan = given.plan(able.name(), "stats");
            plan.sites.insert(UP.to_owned(), codec.name().parse().unwrap());
            assert!(matches!(plan.check_calibration(), Err(Error::NotCalibrated { .. })));
        }
    }
    assert!(!given.path("out").exists());
    for codec in CALIBRATED {
        check_calibrated(&codec.name().parse().unwrap()).unwrap();
    }
}

#[test]
fn artifacts_say_what_they_were_encoded_with() {
    let given = Measured::new();
    measure(&given.path("base"), 64, &given.path("other"));
    for codec in CALIBRATED.iter().map(|codec| codec.name()) {
        let at = |name: &str| given.path(&format!("{codec}-{name}"));
        let plan = given.plan(codec, "stats");
        let whole = compress(&given.pair, &plan, &at("whole"), &Silent).unwrap();
        let (Manifest { calibration, .. }, _) = &whole;
        assert_eq!(*calibration, plan.calibration.as_ref().map(Inputs::record), "{codec}");
        let artifact = Artifact::open(&at("whole")).unwrap();
        verify(given.pair.base(), &artifact, &Silent).unwrap();
        restore(given.pair.base(), &artifact, &at("restored"), &Silent).unwrap();
        let card = std::fs::read_to_string(at("whole").join("README.md")).unwrap();
        assert!(card.contains("random tokens (seed 1) (64 tokens, inputs of tuned)"), "{card}");
        // Shards are encoded alike, and go on with the same statistics alone.
        let job = |index| Job { shard: Shard { index, count: 2 }, restart: false };
        for index in [1, 2] {
            compress_part(&given.pair, &plan, job(index), &at("joined"), &Silent).unwrap();
        }
        let other = given.plan(codec, "other");
        let error = compress_part(&given.pair, &other, job(1), &at("joined"), &Silent).unwrap_err();
        let Error::Format(onebase_format::Error::OtherRun { what, .. }) = &error else {
            panic!("{error}")
        };
        assert_eq!(what, "calibration");
        join(&at("joined")).unwrap();
        assert_eq!(contents(&at("joined")), contents(&at("whole")), "{codec}");
    }
}

#[test]
fn altered_statistics_end_a_run() {
    for codec in CALIBRATED.iter().map(|codec| codec.name()) {
        let given = Measured::new();
        let path = given.path("stats/layer-00001.safetensors");
        let mut bytes = std::fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(&path, bytes).unwrap();
        let plan = given.plan(codec, "stats");
        let error = compress(&given.pair, &plan, &given.path("out"), &Silent).unwrap_err();
        let Error::Format(onebase_format::Error::TensorDigest { path: named, .. }) = &error else {
            panic!("{error}")
        };
        assert_eq!(*named, path);
        assert!(!given.path("out").exists());
    }
}

#[test]
fn budgets_are_kept_with_statistics() {
    let given = Measured::new();
    let budget: Budget = "4bpw".parse().unwrap();
    let sized = |spec: &CodecSpec| spec.bits_option().is_some();
    for (nth, codec) in CALIBRATED.iter().map(|codec| codec.name()).enumerate() {
        let plan = given.plan(codec, "stats");
        let fitted = budget.fit(&given.pair, &plan, false).unwrap();
        assert!(fitted.calibration.is_some());
        let mut plans = vec![fitted.clone()];
        // Every site is encoded at ten sizes: one codec will do.
        if nth == 0 && sized(&plan.linear) {
            plans.push(budget.allocate(&given.pair, &fitted, &Silent).unwrap());
        }
        for (index, plan) in plans.iter().enumerate() {
            let out = given.path(&format!("{codec}-{index}"));
            let (_, sizes) = compress(&given.pair, plan, &out, &Silent).unwrap();
            assert!(sizes.effective_bpw_linear() <= 4.0, "{codec}");
        }
        let memory = |plan: &Plan| expected_memory(&given.pair, plan, 2).unwrap().bytes;
        let without = Plan { calibration: None, ..plan.clone() };
        assert!(memory(&plan) >= memory(&without), "{codec}");
        if plan.linear.parts([2, 2]).is_none() {
            continue;
        }
        // All bytes, the record's among them, are known before.
        let all = Budget::Bytes(u64::MAX).fit(&given.pair, &plan, false).unwrap();
        let out = given.path(&format!("{codec}-all"));
        let (_, sizes) = compress(&given.pair, &all, &out, &Silent).unwrap();
        let exact = Budget::Bytes(sizes.total_bytes).fit(&given.pair, &plan, false).unwrap();
        assert_eq!(exact.linear.to_string(), all.linear.to_string(), "{codec}");
    }
}

/// Experts whose inputs nobody has seen, and sites that are the base's.
#[test]
fn experts_without_tokens_are_encoded_without_moments() {
    let base = Memory::fixture("qwen3_moe");
    let folder = Folder::new(&base, &base.tuned(1));
    let stats = folder.dir.path().join("stats");
    measure(&folder.base(), 2, &stats);
    let pair = folder.pair();
    let calibration = Arc::new(Calibration::open(&stats, &pair).unwrap());
    let n_unseen = pair.specs().iter().filter(|spec| spec.role == Role::Linear);
    let n_unseen = n_unseen.filter(|spec| calibration.moment(spec).unwrap().is_none()).count();
    assert!(n_unseen > 0);
    assert!(pair.specs().iter().any(|spec| spec.name == SAME));
    for codec in CALIBRATED.iter().map(|codec| codec.name()) {
        let plan = Plan {
            calibration: Some(Inputs::Statistics(Arc::clone(&calibration))),
            ..Plan::new(codec.parse().unwrap(), TablePlan::Exact, VectorPlan::Exact)
        };
        let out = folder.dir.path().join(codec);
        compress(&pair, &plan, &out, &Silent).unwrap();
        verify(pair.base(), &Artifact::open(&out).unwrap(), &Silent).unwrap();
    }
}
