//! A run block by block shows what the forward pass of each window shows.

use crate::support::{demo, fixture, load, tenant};
use onebase_model::{
    Error, KvCache, LayerRun, Logits, Model, Observer, Segment, SiteInput, Tenant,
};
use onebase_tensor::MatrixRef;
use serde_json::json;

/// Everything that was shown.
#[derive(Default, Debug, PartialEq)]
struct Shown(Vec<(usize, SiteInput, [usize; 2], Vec<u32>)>);

impl Observer for Shown {
    fn observe(&mut self, layer: usize, input: SiteInput, x: MatrixRef<'_>) {
        // As bits: an input that is NaN is the same NaN.
        let bits = x.data().iter().map(|v| v.to_bits()).collect();
        self.0.push((layer, input, x.shape(), bits));
    }
}

/// The windows one after the other, what was shown of a block together.
fn by_forward(model: &Model, windows: &[&[u32]], tenant: Option<&Tenant>) -> Shown {
    let mut shown = Shown::default();
    for tokens in windows {
        let mut cache = KvCache::new(model.config());
        let segment = Segment { tokens, tenant, cache: &mut cache, logits: Logits::None };
        model.forward_observed(&mut [segment], &mut shown).unwrap();
    }
    shown.0.sort_by_key(|(layer, ..)| *layer);
    shown
}

fn by_layers(model: &Model, windows: &[&[u32]], tenant: Option<&Tenant>) -> Shown {
    let mut run = LayerRun::new(model, windows.iter().copied(), tenant).unwrap();
    let n_tokens: usize = windows.iter().map(|w| w.len()).sum();
    let mut all = Shown::default();
    for layer in 0..model.config().n_layers {
        assert_eq!(run.next_layer(), layer);
        let (mut shown, mut n_done) = (Shown::default(), 0);
        run.run_layer(tenant, &mut shown, |n| n_done += n);
        assert_eq!(n_done, n_tokens);
        assert!(shown.0.iter().all(|(at, ..)| *at == layer));
        all.0.extend(shown.0);
    }
    let mut none = Shown::default();
    run.run_layer(tenant, &mut none, |_| panic!("every block was run"));
    assert_eq!(none, Shown::default());
    all
}

#[test]
fn the_same_inputs_as_the_forward_pass() {
    let tokens: Vec<u32> = (0..40).map(|i| (7 * i + 3) % 50).collect();
    let windows = [&tokens[..17], &[], &tokens[17..18], &tokens[18..]];
    for family in [
        "llama3_rope",
        "llama_bias",
        "llama_tied_gqa",
        "mistral_window",
        "mixtral",
        "qwen2_window",
        "qwen3",
        "qwen3_moe",
    ] {
        let model = load(&fixture(family));
        let got = by_layers(&model, &windows, None);
        assert!(got == by_forward(&model, &windows, None), "{family}");
        assert!(!got.0.is_empty());
    }
    let (model, text) = demo();
    let tokens = text.tokenizer.encode("One base, hundreds of fine-tunes.", true).unwrap();
    assert!(by_layers(&model, &[&tokens], None) == by_forward(&model, &[&tokens], None));
}

#[test]
fn a_tenant_s_inputs_are_its_own() {
    let model = load(&fixture("qwen3_moe"));
    let own = tenant(&model, |config| config["num_experts_per_tok"] = json!(1));
    let windows = [&[3, 14, 15][..], &[92, 65]];
    let got = by_layers(&model, &windows, Some(&own));
    assert!(got == by_forward(&model, &windows, Some(&own)));
    assert!(got != by_layers(&model, &windows, None));
}

/// Every input of a block is peeked at, from before the block and from before its second
/// half, and then the block is run in two halves.
#[test]
fn peeking_shows_what_running_shows_and_leaves_all_as_it_is() {
    let tokens: Vec<u32> = (0..40).map(|i| (7 * i + 3) % 50).collect();
    let windows = [&tokens[..17], &tokens[17..18], &tokens[18..]];
    for family in ["llama_tied_gqa", "mistral_window", "mixtral", "qwen3", "qwen3_moe"] {
        let model = load(&fixture(family));
        let own = tenant(&model, |_| {});
        let expected = by_forward(&model, &windows, Some(&own));
        let mut run = LayerRun::new(&model, windows, Some(&own)).unwrap();
        for layer in 0..model.config().n_layers {
            let of = |input: SiteInput| -> Vec<_> {
                let ours = |shown: &&(usize, SiteInput, [usize; 2], Vec<u32>)| {
                    (shown.0, shown.1) == (layer, input)
                };
                expected.0.iter().filter(ours).cloned().collect()
            };
            let peek = |run: &LayerRun<'_>, input: SiteInput| {
                let mut shown = Shown::default();
                run.peek(Some(&own), input, &mut shown);
                shown.0
            };
            let n_experts = model.config().mixture.as_ref().map_or(0, |m| m.n_experts);
            let attention = [SiteInput::Attention, SiteInput::AttentionOutput];
            let mut others = vec![SiteInput::FeedForward, SiteInput::FeedForwardOutput];
            for expert in 0..=n_experts {
                others.extend([SiteInput::Expert(expert), SiteInput::ExpertOutput(expert)]);
            }
            let mut n_shown = 0;
            for input in attention.into_iter().chain(others.iter().copied()) {
                let got = peek(&run, input);
                n_shown += got.len();
                assert!(got == of(input), "{family}, {layer}, {input}");
            }
            assert_eq!(n_shown, expected.0.iter().filter(|shown| shown.0 == layer).count());
            for _ in 0..2 {
                run.run_attention(Some(&own));
            }
            assert_eq!(run.next_layer(), layer);
            for input in &others {
                assert!(peek(&run, *input) == of(*input), "{family}, {layer}, {input}");
            }
            assert!(attention.iter().all(|input| peek(&run, *input).is_empty()));
            run.run_layer(Some(&own), &mut Shown::default(), |_| {});
        }
        run.run_attention(Some(&own));
        let mut none = Shown::default();
        run.peek(Some(&own), SiteInput::Attention, &mut none);
        assert_eq!(none, Shown::default());
    }
}

#[test]
fn tokens_outside_the_vocabulary_are_refused() {
    let model = load(&fixture("qwen3"));
    let vocab_size = model.config().vocab_size;
    let bad = [u32::try_from(vocab_size).unwrap()];
    let error = LayerRun::new(&model, [&[1, 2][..], &bad], None).unwrap_err();
    assert!(matches!(error, Error::Token { vocab_size: v, .. } if v == vocab_size), "{error}");
}
