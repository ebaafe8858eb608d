//! The error at the sites of experts, each of which is sent its own tokens.

use std::collections::BTreeMap;
use std::path::Path;

use onebase_codec::DeltaSource;
use onebase_compress::{Pair, Plan, Silent, TablePlan, VectorPlan, compress, prepared};
use onebase_eval::{Unwatched, site_errors, total_error};
use onebase_format::Checkpoint;
use onebase_format::artifact::Artifact;
use onebase_model::{KvCache, Logits, Model, Observer, Segment, SiteInput};
use onebase_tensor::MatrixRef;

/// Every row that a site was shown.
#[derive(Default)]
struct Rows(BTreeMap<(usize, SiteInput), Vec<f32>>);

impl Observer for Rows {
    fn observe(&mut self, layer: usize, input: SiteInput, x: MatrixRef<'_>) {
        self.0.entry((layer, input)).or_default().extend_from_slice(x.data());
    }
}

/// A copy of a checkpoint in bf16 with other mantissas.
fn tuned(from: &Path, to: &Path) {
    std::fs::create_dir(to).unwrap();
    std::fs::copy(from.join("config.json"), to.join("config.json")).unwrap();
    let mut bytes = std::fs::read(from.join("model.safetensors")).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    let data = 8 + usize::try_from(header).unwrap();
    bytes[data..].iter_mut().step_by(2).for_each(|byte| *byte ^= 0x15);
    std::fs::write(to.join("model.safetensors"), bytes).unwrap();
}

/// `Σ‖W x‖²` over rows `x`.
fn energy(weights: &[f32], rows: &[f32], n_cols: usize) -> f64 {
    let dot = |w: &[f32], x: &[f32]| -> f64 {
        w.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum()
    };
    let outputs = rows
        .chunks_exact(n_cols)
        .flat_map(|x| weights.chunks_exact(n_cols).map(move |w| dot(w, x).powi(2)));
    outputs.sum()
}

#[test]
fn errors_in_output_space_are_those_of_the_tokens_that_an_expert_got() {
    let base =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/reference/qwen3_moe_bf16");
    let place = tempfile::tempdir().unwrap();
    let fine_tune = place.path().join("tuned");
    tuned(&base, &fine_tune);
    let pair = Pair::open(&base, &fine_tune).unwrap();
    let plan = Plan::new("sign".parse().unwrap(), TablePlan::Exact, VectorPlan::Exact);
    compress(&pair, &plan, &place.path().join("a"), &Silent).unwrap();
    let artifact = Artifact::open(&place.path().join("a")).unwrap();
    let model = Model::load(Checkpoint::open(&fine_tune).unwrap()).unwrap();
    // Few enough that some experts get none.
    let tokens = [3, 141, 59];
    let mut shown = Rows::default();
    let mut cache = KvCache::new(model.config());
    let segment =
        Segment { tokens: &tokens, tenant: None, cache: &mut cache, logits: Logits::None };
    model.forward_observed(&mut [segment], &mut shown).unwrap();

    let errors = site_errors(&pair, &artifact, Some((&model, &tokens)), &Unwatched).unwrap();
    let (mut n_idle, mut n_busy) = (0, 0);
    for error in &errors {
        let (layer, site) = error.site.strip_prefix("layers.").unwrap().split_once('.').unwrap();
        let input = SiteInput::of(site).unwrap();
        let rows = &shown.0[&(layer.parse().unwrap(), input)];
        let name = format!("model.{}.weight", error.site);
        let source = pair.delta(&name).unwrap();
        let [n_rows, n_cols] = source.shape();
        let (mut delta, mut decoded) = (vec![0.0; n_rows * n_cols], vec![0.0; n_rows * n_cols]);
        source.read_rows(0..n_rows, &mut delta).unwrap();
        prepared(&artifact, &name).unwrap().unwrap().write_rows(0..n_rows, &mut decoded);
        let lost: Vec<f32> = delta.iter().zip(&decoded).map(|(a, b)| a - b).collect();
        for (weights, got) in [&lost, &delta].into_iter().zip(error.output.unwrap()) {
            let expected = energy(weights, rows, n_cols) / 3.0;
            assert!((got - expected).abs() <= 1e-4 * expected, "{name}: {got}, not {expected}");
        }
        n_idle += usize::from(rows.is_empty());
        n_busy += usize::from(!rows.is_empty());
    }
    assert!(n_idle > 0 && n_busy > 0, "{n_idle} without tokens, {n_busy} with some");
    let total = total_error(&errors).output.unwrap();
    assert!(total > 0.0 && total < 1.0, "{total}");
}
