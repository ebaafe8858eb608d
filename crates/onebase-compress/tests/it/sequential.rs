//! Inputs that are measured while compressing are those that the finished artifact's sites
//! read.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::support::{EMBEDDING, FAMILIES, Folder, Memory, SAME, contents, demo, plan};
use onebase_codec::{CALIBRATED, CodecSpec, SecondMoment};
use onebase_compress::{
    Budget, Error, Inputs, Job, LayerMoments, Pair, Plan, Progress, Sequential, Silent,
    check_calibrated, compress, compress_part, expected_memory,
};
use onebase_format::artifact::{Artifact, Role, Shard, Storage};
use onebase_format::statistics::Source;
use onebase_format::{Checkpoint, Digest};
use onebase_model::{
    KvCache, Logits, Model, Observer, Segment, SiteInput, Tenant, TextModel, tensor_specs,
};
use onebase_tensor::MatrixRef;

const WINDOW: usize = 16;

fn source() -> Source {
    Source::Text { name: "t.txt".into(), blake3: Digest::of(b"text") }
}

fn tokens(n: u32, vocab_size: u32) -> Vec<u32> {
    (0..n).map(|i| (i * i * 7 + 3 * i + 1) % vocab_size).collect()
}

fn sequential(pair: &Pair, codec: &str, tokens: &[u32]) -> Plan {
    let text = Sequential::new(pair, tokens.to_vec(), source(), WINDOW).unwrap();
    Plan { calibration: Some(Inputs::Sequential(Arc::new(text))), ..plan(codec) }
}

/// The moments of all inputs, block by block.
#[derive(Default)]
struct Moments(BTreeMap<usize, LayerMoments>);

impl Observer for Moments {
    fn observe(&mut self, layer: usize, input: SiteInput, x: MatrixRef<'_>) {
        self.0.entry(layer).or_default().observe(layer, input, x);
    }
}

/// What the sites of a finished artifact read, from forward passes that run every block once.
#[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation)]
fn served(
    model: &Model,
    tenant: &Tenant,
    tokens: &[u32],
) -> BTreeMap<(usize, SiteInput), Option<SecondMoment>> {
    let mut moments = Moments::default();
    for tokens in tokens.chunks(WINDOW) {
        let mut cache = KvCache::new(tenant.config());
        let segment =
            Segment { tokens, tenant: Some(tenant), cache: &mut cache, logits: Logits::None };
        model.forward_observed(&mut [segment], &mut moments).unwrap();
    }
    let mut served = BTreeMap::new();
    for (layer, moments) in moments.0 {
        for (input, moment) in moments.into_inner() {
            let n = tokens.len() as f64;
            let values: Vec<f32> = moment.values.iter().map(|v| (v / n) as f32).collect();
            let is_seen = values.iter().any(|v| *v != 0.0);
            let moment = is_seen.then(|| SecondMoment::new(values, moment.in_features).unwrap());
            served.insert((layer, input), moment);
        }
    }
    served
}

/// Checks that each linear site has the parts that its codec gives it with the moment of what
/// it reads when the artifact is served. Returns how many sites have a delta, and how many of
/// them would have other parts without it.
fn check_artifact(pair: &Pair, dir: &Path, codec: &str, tokens: &[u32]) -> [usize; 2] {
    let model = Model::load(Checkpoint::open(pair.base().dir()).unwrap()).unwrap();
    let artifact = Artifact::open(dir).unwrap();
    let tenant = Tenant::load(&model, &artifact).unwrap();
    let served = served(&model, &tenant, tokens);
    let codec: CodecSpec = codec.parse().unwrap();
    let calibrated = codec.calibrated().unwrap();
    let mut counts = [0; 2];
    for spec in tensor_specs(tenant.config()).iter().filter(|spec| spec.role == Role::Linear) {
        let Some((_, stored)) = artifact.delta(&spec.name).unwrap() else {
            assert_eq!(spec.name, SAME);
            continue;
        };
        let delta = pair.delta(&spec.name).unwrap();
        let plain = codec.encode(&delta).unwrap();
        let expected = match &served[&SiteInput::of_weight(&spec.name).unwrap()] {
            Some(moment) => calibrated.encode_calibrated(codec.options(), &delta, moment).unwrap(),
            None => plain.clone(),
        };
        assert!(stored == expected, "{}", spec.name);
        counts[0] += 1;
        counts[1] += usize::from(stored != plain);
    }
    counts
}

#[test]
fn every_site_is_encoded_with_what_it_reads_when_served() {
    for codec in CALIBRATED {
        for family in FAMILIES {
            let base = Memory::fixture(family);
            let folder = Folder::new(&base, &base.tuned(5));
            let tokens = tokens(70, 50);
            let codec = codec.name();
            // Tables as deltas of another codec, and exact.
            let tables = if family.starts_with("qwen") { "exact" } else { "rtn:bits=2" };
            let mut plan = sequential(&folder.pair(), codec, &tokens);
            plan.tables = tables.parse().unwrap();
            compress(&folder.pair(), &plan, &folder.artifact(), &Silent).unwrap();
            let [n, other] = check_artifact(&folder.pair(), &folder.artifact(), codec, &tokens);
            assert!(n > 0 && 2 * other > n, "{codec}, {family}: {other} of {n}");
        }
    }
}

/// Vectors that are stored as deltas are read as they are stored, added rows of the
/// vocabulary are run, and the demo's real text is.
#[test]
fn what_is_not_linear_is_read_as_it_is_stored() {
    for family in ["qwen3", "llama_bias"] {
        let base = Memory::fixture(family);
        let vocab_size = u32::try_from(base.config["vocab_size"].as_u64().unwrap()).unwrap();
        let mut tuned = base.tuned(6);
        tuned.extend_vocabulary(5);
        let folder = Folder::new(&base, &tuned);
        let mut tokens = tokens(60, 50);
        tokens.extend(vocab_size..vocab_size + 5);
        let mut plan = sequential(&folder.pair(), "deltamix vectors rtn:bits=2", &tokens);
        plan.tables = "rtn:bits=4".parse().unwrap();
        compress(&folder.pair(), &plan, &folder.artifact(), &Silent).unwrap();
        check_artifact(&folder.pair(), &folder.artifact(), "deltamix", &tokens);
    }
    let pair = Pair::open(&demo("base"), &demo("math")).unwrap();
    let text = TextModel::from_checkpoint(pair.fine_tune()).unwrap();
    let tokens = text.tokenizer.encode("One base, hundreds of fine-tunes. 7 + 4 = 11", true);
    let tokens = tokens.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    compress(&pair, &sequential(&pair, "delta-come", &tokens), &out, &Silent).unwrap();
    check_artifact(&pair, &out, "delta-come", &tokens);
    let artifact = Artifact::open(&out).unwrap();
    assert!(matches!(artifact.manifest().tensors[EMBEDDING].storage, Storage::Codec { .. }));
}

#[test]
fn the_record_says_how_inputs_were_measured() {
    let base = Memory::fixture("qwen3");
    let folder = Folder::new(&base, &base.tuned(5));
    let plan = sequential(&folder.pair(), "delta-come exact", &tokens(70, 50));
    let expected = plan.calibration.as_ref().unwrap().record();
    compress(&folder.pair(), &plan, &folder.artifact(), &Silent).unwrap();
    let artifact = folder.open().1;
    let record = artifact.manifest().calibration.clone().unwrap();
    assert_eq!(record, expected);
    assert_eq!((record.blake3, record.n_tokens), (None, 70));
    assert_eq!(record.sequential.unwrap().window_tokens, WINDOW);
    assert_eq!(Some(record.model.blake3), artifact.manifest().fine_tune_blake3);
    let card = std::fs::read_to_string(folder.artifact().join("README.md")).unwrap();
    let said = "| t.txt (70 tokens, inputs of tuned as far as it was compressed) |";
    assert!(card.contains(said), "{card}");
}

#[test]
fn threads_change_nothing() {
    let base = Memory::fixture("qwen3_moe");
    let folder = Folder::new(&base, &base.tuned(5));
    let tokens = tokens(70, 50);
    for codec in CALIBRATED {
        let made: Vec<_> = [1, 3]
            .into_iter()
            .map(|n_threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads).build().unwrap();
                let out = folder.dir.path().join(format!("{}-{n_threads}", codec.name()));
                let plan = sequential(&folder.pair(), codec.name(), &tokens);
                pool.install(|| compress(&folder.pair(), &plan, &out, &Silent)).unwrap();
                contents(&out)
            })
            .collect();
        assert!(made[0] == made[1], "{}", codec.name());
    }
}

#[test]
fn what_takes_sites_out_of_order_is_refused() {
    let base = Memory::fixture("qwen3");
    let folder = Folder::new(&base, &base.tuned(5));
    let pair = folder.pair();
    let plan = sequential(&pair, "deltamix", &tokens(40, 50));
    let job = Job { shard: Shard { index: 1, count: 2 }, restart: false };
    let error = compress_part(&pair, &plan, job, &folder.artifact(), &Silent).unwrap_err();
    assert!(matches!(error, Error::OutOfOrder { what: "a shard" }), "{error}");
    assert!(error.hint().is_some_and(|hint| hint.contains("onebase calibrate")));
    let budget: Budget = "2bpw".parse().unwrap();
    let error = budget.allocate(&pair, &plan, &Silent).unwrap_err();
    assert!(matches!(error, Error::OutOfOrder { .. }), "{error}");

    let plan = Plan { linear: "sign".parse().unwrap(), ..plan };
    let error = compress(&pair, &plan, &folder.artifact(), &Silent).unwrap_err();
    assert!(matches!(error, Error::NotCalibrated { codec: "sign", .. }), "{error}");
    assert!(check_calibrated(&plan.linear).is_err());
    let error = Sequential::new(&pair, Vec::new(), source(), WINDOW).unwrap_err();
    assert!(matches!(error, Error::ShortText { n_tokens: 0, .. }), "{error}");
    let error = Sequential::new(&pair, vec![1, 1 << 30], source(), WINDOW).unwrap_err();
    assert!(matches!(error, Error::Model(onebase_model::Error::Token { .. })), "{error}");
    assert!(!folder.artifact().exists());
}

/// An input too large to be squared is named.
#[test]
fn inputs_that_are_no_finite_numbers_are_refused() {
    let base = Memory::fixture("qwen3");
    let mut tuned = base.tuned(5);
    tuned.tensor("model.layers.1.input_layernorm.weight").set(0, 3, 1e30);
    let folder = Folder::new(&base, &tuned);
    let plan = sequential(&folder.pair(), "deltamix", &tokens(40, 50));
    let error = compress(&folder.pair(), &plan, &folder.artifact(), &Silent).unwrap_err();
    let Error::InputNotFinite { input, .. } = &error else { panic!("{error}") };
    assert_eq!(input, "layers.1.attention");
    let left: Vec<_> = std::fs::read_dir(folder.dir.path()).unwrap().collect();
    assert_eq!(left.len(), 2, "the base and the fine-tune: {left:?}");
}

/// Ends a process after some tensors.
struct Killed {
    after: usize,
    begun: AtomicUsize,
}

impl Progress for Killed {
    fn warn(&self, _: &str) {}

    fn begin(&self, _: u64) {}
    fn resumed(&self, _: usize) {}
    fn tensor(&self, _: &str) {
        assert!(self.begun.fetch_add(1, Ordering::Relaxed) < self.after, "killed");
    }
    fn advance(&self, _: u64) {}
}

#[test]
fn a_run_that_ended_anywhere_goes_on_with_the_same_bytes() {
    for family in ["qwen3_moe", "llama_bias"] {
        let base = Memory::fixture(family);
        let folder = Folder::new(&base, &base.tuned(5));
        let pair = folder.pair();
        let mut plan = sequential(&pair, "deltamix", &tokens(70, 50));
        plan.tables = "rtn:bits=4".parse().unwrap();
        compress(&pair, &plan, &folder.artifact(), &Silent).unwrap();
        let whole = contents(&folder.artifact());
        let out = folder.dir.path().join("again");
        let mut n_ended = 0;
        for after in (1..).step_by(5) {
            let killed = Killed { after, begun: AtomicUsize::new(0) };
            let run = || compress(&pair, &plan, &out, &killed).map(|_| ());
            match catch_unwind(AssertUnwindSafe(run)) {
                Ok(done) => {
                    done.unwrap();
                    break;
                }
                Err(_) => n_ended += 1,
            }
            compress(&pair, &plan, &out, &Silent).unwrap();
            assert!(contents(&out) == whole, "{family}, ended after {after}");
            std::fs::remove_dir_all(&out).unwrap();
        }
        assert!(n_ended > 5);
        assert!(contents(&out) == whole, "{family}");
    }
}

#[test]
fn what_is_held_counts_as_memory() {
    let pair = Pair::open(&demo("base"), &demo("math")).unwrap();
    let of = |n_tokens| {
        let plan = sequential(&pair, "deltamix", &tokens(n_tokens, 50));
        expected_memory(&pair, &plan, 1).unwrap().bytes
    };
    let hidden = Model::load(Checkpoint::open(&demo("base")).unwrap()).unwrap();
    let hidden = hidden.config().hidden_size as u64;
    assert_eq!(of(3000) - of(1000), 2000 * hidden * 4);
    let plain = expected_memory(&pair, &plan("deltamix"), 1).unwrap().bytes;
    assert!(of(1000) > plain + 1000 * hidden * 4 + pair.base().size_bytes());
}
