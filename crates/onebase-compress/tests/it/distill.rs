//! Scales that are fitted after encoding.

use std::path::Path;

use crate::support::{Folder, Memory, Noise, SAME, UP, contents, difference, logits};
use onebase_codec::Error as CodecError;
use onebase_compress::{DistillText, Distilled, Error, Silent, distill, verify};
use onebase_format::artifact::{Artifact, CalibrationRecord};
use onebase_format::{Checkpoint, Digest};
use onebase_model::{Model, Tenant};

const LINEAR: &str = "linear-00001.safetensors";

/// A fine-tune whose linear sites have deltas that one bit and a scale hold: those of
/// `tuned`, each weight's change made as large as any other.
fn one_bit(base: &Memory, seed: u64) -> Memory {
    let mut tuned = base.tuned(seed);
    let matrices = tuned
        .tensors
        .iter_mut()
        .filter(|(name, t)| t.shape.len() == 2 && name.contains("layers") && *name != SAME);
    for (name, tensor) in matrices {
        let base = base.tensors[name].widen();
        let signs = tensor
            .widen()
            .into_iter()
            .zip(base)
            .map(|(t, b)| b + if t > b { 0.03125 } else { -0.03125 });
        tensor.fill(&signs.collect::<Vec<f32>>());
    }
    tuned
}

fn tokens(n: usize, vocab_size: usize) -> Vec<u32> {
    let mut noise = Noise(7);
    (0..n).map(|_| ((noise.next() + 1.0) * 0.5 * vocab_size as f32) as u32 % 32).collect()
}

fn record(n_tokens: usize) -> CalibrationRecord {
    CalibrationRecord { name: "text".into(), blake3: Digest::of(b"text"), n_tokens }
}

fn fit(folder: &Folder, n_tokens: usize, target: &Path) -> Result<Distilled, Error> {
    let load = |dir: &Path| Model::load(Checkpoint::open(dir).unwrap()).unwrap();
    let (base, fine_tune) = (load(&folder.base()), load(&folder.fine_tune()));
    let artifact = Artifact::open(&folder.artifact()).unwrap();
    let tokens = tokens(n_tokens, 32);
    let text = DistillText { tokens: &tokens, record: record(n_tokens) };
    distill(&base, &fine_tune, &artifact, &text, target, &Silent).map(|(_, _, distilled)| distilled)
}

/// Scales that were spoiled are found again.
#[test]
fn factors_that_are_known_are_found() {
    for family in ["llama_tied_gqa", "llama_bias", "qwen3"] {
        let base = Memory::fixture(family);
        let folder = Folder::new(&base, &one_bit(&base, 2));
        folder.compress("sign:scale=matrix exact");
        let whole = contents(&folder.artifact());
        let mut factor = 0.5;
        folder.edit_parts(LINEAR, |parts| {
            for (_, part) in parts.iter_mut().filter(|(name, _)| name.ends_with(".scale")) {
                let scale: Vec<f32> = part.widen().iter().map(|s| s * factor).collect();
                part.fill(&scale);
                factor = if factor < 1.4 { factor + 0.1 } else { 0.5 };
            }
        });
        let target = folder.dir.path().join("distilled");
        let got = fit(&folder, 600, &target).unwrap();
        assert!(got.loss_after < 1e-3 * got.loss_before, "{family}: {got:?}");
        assert!(got.n_steps > 0 && got.n_tokens + got.n_held_out_tokens == 600, "{got:?}");
        let artifact = Artifact::open(&target).unwrap();
        let model = Model::load(Checkpoint::open(&folder.base()).unwrap()).unwrap();
        verify(model.checkpoint(), &artifact, &Silent).unwrap();
        assert_eq!(artifact.manifest().distillation, Some(record(600)));
        // It answers as the fine-tune does.
        let own = Model::load(Checkpoint::open(&folder.fine_tune()).unwrap()).unwrap();
        let tenant = Tenant::load(&model, &artifact).unwrap();
        let asked = [3, 1, 4, 1, 5, 9, 2, 6];
        let error = difference(&logits(&model, Some(&tenant), &asked), &logits(&own, None, &asked));
        assert!(error < 0.02, "{family}: {error:e}");
        // Everything but the scales is as it was.
        let files = contents(&target);
        assert!(files.keys().eq(whole.keys()));
        assert_eq!(files["rest-00001.safetensors"], whole["rest-00001.safetensors"]);
        assert_eq!(files[LINEAR].len(), whole[LINEAR].len());
        assert_ne!(files[LINEAR], whole[LINEAR]);
        assert!(String::from_utf8_lossy(&files["README.md"]).contains("text (600 tokens)"));
    }
}

#[test]
fn every_way_of_storing_and_added_rows_survive() {
    let mut base = Memory::fixture("llama_tied_gqa");
    base.side_files.insert("generation_config.json".into(), b"{}".to_vec());
    let mut tuned = base.tuned(4);
    tuned.extend_vocabulary(3);
    let folder = Folder::new(&base, &tuned);
    folder.compress("dqrelo:bits=2 vectors magnitude:keep=0.5");
    let target = folder.dir.path().join("distilled");
    let got = fit(&folder, 600, &target).unwrap();
    assert!(got.loss_after <= got.loss_before, "{got:?}");
    let [before, after] = [&folder.artifact(), &target].map(|dir| Artifact::open(dir).unwrap());
    let (base, _) = folder.open();
    verify(&base, &after, &Silent).unwrap();
    let [of_before, of_after] = [before.manifest(), after.manifest()];
    assert_eq!(of_before.tensors, of_after.tensors);
    assert_eq!(of_before.inherited, of_after.inherited);
    assert_eq!((&of_before.base, &of_before.codecs), (&of_after.base, &of_after.codecs));
    let [a, b] = [contents(&folder.artifact()), contents(&target)];
    assert_eq!(a["rest-00001.safetensors"], b["rest-00001.safetensors"]);
    let [a, b] = [&before, &after].map(|artifact| artifact.delta(UP).unwrap().unwrap().1);
    assert_eq!(a.parts["sign"], b.parts["sign"]);
}

#[test]
fn bytes_do_not_depend_on_the_number_of_threads() {
    let folder = Folder::compressed("qwen2_tied", "sign exact");
    let on = |threads: usize| {
        let target = folder.dir.path().join(format!("on {threads}"));
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| fit(&folder, 520, &target)).unwrap();
        contents(&target)
    };
    assert!(on(1) == on(3));
}

#[test]
fn what_cannot_be_fitted_is_refused() {
    let folder = Folder::compressed("llama_tied_gqa", "low-rank");
    let target = folder.dir.path().join("distilled");
    let error = fit(&folder, 600, &target).unwrap_err();
    let Error::Codec { source: CodecError::NotRescalable { codec, known }, .. } = &error else {
        panic!("{error:?}")
    };
    assert!(*codec == "low-rank" && known.contains(&"sign"));
    assert!(error.hint().unwrap().contains("sign"));

    let folder = Folder::compressed("llama_tied_gqa", "sign");
    let target = folder.dir.path().join("distilled");
    let error = fit(&folder, 30, &target).unwrap_err();
    assert!(matches!(error, Error::ShortText { n_tokens: 30, .. }), "{error:?}");
    assert!(error.hint().unwrap().contains("--distill-tokens"));
    std::fs::create_dir(&target).unwrap();
    let error = fit(&folder, 600, &target).unwrap_err();
    assert!(matches!(error, Error::Format(onebase_format::Error::Exists { .. })), "{error:?}");
    assert_eq!(std::fs::read_dir(&target).unwrap().count(), 0);
}
