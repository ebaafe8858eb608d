//! Requests at the edges of what can be answered, for the base and for tenants
//! whose configurations differ from it.

use crate::support::{demo, fixture, load, logits, request, tenant, with_config};
use onebase_model::{
    Completion, Error, FinishReason, KvCache, Logits, Model, Request, SamplingParams, Segment,
    generate,
};
use serde_json::json;

fn one(model: &Model, request: Request<'_>) -> Completion {
    generate(model, &[request], 1, |_| {}).unwrap().completions.remove(0)
}

#[test]
fn constants_of_the_computation_are_the_tenant_s() {
    let model = load(&fixture("llama_tied_gqa"));
    let tokens: Vec<u32> = (0..40).map(|i| i * 37 % 200).collect();
    let plain = logits(&model, None, &tokens);
    assert!(logits(&model, Some(&tenant(&model, |_| {})), &tokens) == plain);
    let dir = tempfile::tempdir().unwrap();
    for (i, (field, value)) in [
        ("rms_norm_eps", json!(0.1)),
        ("rope_parameters", json!({"rope_theta": 20.0, "rope_type": "default"})),
        ("rope_parameters", json!({"rope_theta": 1e4, "rope_type": "linear", "factor": 4.0})),
    ]
    .into_iter()
    .enumerate()
    {
        let own_dir = dir.path().join(i.to_string());
        with_config(&fixture("llama_tied_gqa"), &own_dir, |c| c[field] = value.clone());
        let own = logits(&load(&own_dir), None, &tokens);
        let tenant = tenant(&model, |c| c[field] = value.clone());
        assert!(own != plain, "{field} matters");
        assert!(logits(&model, Some(&tenant), &tokens) == own, "{field}");
        // In one batch with the base, which keeps its own.
        let mut caches = [(); 2].map(|()| KvCache::new(model.config()));
        let voices = [None, Some(&tenant)];
        let mut segments: Vec<_> = caches
            .iter_mut()
            .zip(voices)
            .map(|(cache, tenant)| Segment { tokens: &tokens, tenant, cache, logits: Logits::All })
            .collect();
        let got = model.forward(&mut segments).unwrap();
        assert!(got[0] == plain && got[1] == own, "{field}");
    }
    // Windows too.
    let model = load(&fixture("mistral_window"));
    let tokens: Vec<u32> = (0..40).map(|i| i * 37 % 180).collect();
    with_config(&fixture("mistral_window"), &dir.path().join("w"), |c| {
        c["sliding_window"] = json!(5);
    });
    let tenant = tenant(&model, |c| c["sliding_window"] = json!(5));
    let own = logits(&load(&dir.path().join("w")), None, &tokens);
    assert!(own != logits(&model, None, &tokens));
    assert!(logits(&model, Some(&tenant), &tokens) == own);
}

#[test]
fn a_stop_token_ends_the_answer_and_is_no_part_of_it() {
    let (model, text) = demo();
    let prompt = text.tokenizer.encode("The house was", true).unwrap();
    let free = one(&model, request(&prompt, 20));
    assert_eq!((free.tokens.len(), free.finish_reason), (20, FinishReason::Length));
    assert_eq!(free.text, "");
    for at in 0..20 {
        let stop = free.tokens[at];
        let first = free.tokens.iter().position(|t| *t == stop).unwrap();
        let stops = [2047, stop];
        let request = Request {
            stop_tokens: &stops,
            tokenizer: Some(&text.tokenizer),
            ..request(&prompt, 20)
        };
        let got = one(&model, request);
        assert_eq!(got.tokens, free.tokens[..first]);
        assert_eq!(got.text, text.tokenizer.decode(&free.tokens[..first]).unwrap());
        assert_eq!(got.finish_reason, FinishReason::Stop);
    }
    // One that comes last, or never.
    let got = one(&model, Request { stop_tokens: &[free.tokens[19]], ..request(&prompt, 19) });
    let first = free.tokens.iter().position(|t| *t == free.tokens[19]).unwrap();
    assert_eq!(got.tokens, free.tokens[..first.min(19)]);
    let got = one(&model, Request { stop_tokens: &[u32::MAX], ..request(&prompt, 20) });
    assert_eq!(got, free);
}

#[test]
fn a_stop_text_ends_the_answer_and_is_no_part_of_it() {
    let (model, text) = demo();
    let prompt = text.tokenizer.encode("The house was", true).unwrap();
    let with_text = |stop_texts: &[String]| {
        let tokenizer = Some(&text.tokenizer);
        one(&model, Request { stop_texts, tokenizer, ..request(&prompt, 24) })
    };
    let free = with_text(&[]);
    assert_eq!(free.finish_reason, FinishReason::Length);
    let chars: Vec<(usize, char)> = free.text.char_indices().collect();
    assert!(chars.len() > 20, "{:?}", free.text);
    // Every piece of three characters, most of which lie across tokens.
    for window in chars.windows(4) {
        let stop = free.text[window[0].0..window[3].0].to_owned();
        let first = free.text.find(&stop).unwrap();
        let got = with_text(std::slice::from_ref(&stop));
        assert_eq!(got.text, free.text[..first], "{stop:?}");
        assert_eq!(got.finish_reason, FinishReason::Stop);
        // Nothing was run past the token that completed it.
        assert!(free.tokens.starts_with(&got.tokens));
        let before = text.tokenizer.decode(&got.tokens[..got.tokens.len() - 1]).unwrap();
        assert!(!before.contains(&stop), "{stop:?} in {before:?}");
    }
    // The first in the text counts, not the first in the list.
    let (late, early) = (free.text[chars[15].0..chars[19].0].to_owned(), free.text[..3].to_owned());
    let got = with_text(&[late, early]);
    assert_eq!((got.text.as_str(), got.finish_reason), ("", FinishReason::Stop));
    assert_eq!(with_text(&["no such text".into()]), free);
}

#[test]
fn no_more_tokens_come_than_asked_for() {
    let model = load(&fixture("qwen3"));
    let many = one(&model, request(&[1, 2, 3], 9));
    for n in 0..9 {
        let got = generate(&model, &[request(&[1, 2, 3], n)], 1, |_| {}).unwrap();
        assert_eq!(got.completions[0].tokens, many.tokens[..n]);
        assert_eq!(got.completions[0].finish_reason, FinishReason::Length);
        assert_eq!((got.n_prompt_tokens, got.n_new_tokens), (if n == 0 { 0 } else { 3 }, n));
    }
}

#[test]
fn every_step_is_told_of() {
    let model = load(&fixture("qwen3"));
    let requests = [request(&[1, 2, 3], 4), request(&[4; 20], 0), request(&[5; 7], 2)];
    let mut steps = Vec::new();
    let run = generate(&model, &requests, 0, |n| steps.push(n)).unwrap();
    assert_eq!(steps, [3, 1, 1, 1, 7, 1]);
    assert_eq!((run.n_prompt_tokens, run.n_new_tokens), (10, 6));
    let mut steps = Vec::new();
    let same = generate(&model, &requests, 3, |n| steps.push(n)).unwrap();
    assert_eq!(steps, [10, 2, 1, 1]);
    assert_eq!(same.completions, run.completions);
    let none = generate(&model, &[], 4, |_| panic!("nothing is run")).unwrap();
    assert_eq!((none.completions.len(), none.n_prompt_tokens, none.n_new_tokens), (0, 0, 0));
}

#[test]
fn prompts_longer_than_a_step_are_run_in_pieces() {
    let model = load(&fixture("llama3_rope"));
    let prompts: Vec<Vec<u32>> =
        (0..6u32).map(|s| (0..240).map(|i| (i * 31 + s * 17) % 200).collect()).collect();
    let requests: Vec<_> = prompts.iter().map(|p| request(p, 8)).collect();
    let mut largest = 0;
    let run = generate(&model, &requests, 6, |n| largest = largest.max(n)).unwrap();
    assert_eq!(largest, 512);
    assert_eq!(run.n_prompt_tokens, 6 * 240);
    for (request, got) in requests.into_iter().zip(run.completions) {
        assert_eq!(got, one(&model, request));
    }
}

#[test]
fn an_answer_ends_with_the_context() {
    let model = load(&fixture("llama_tied_gqa"));
    let prompt: Vec<u32> = (0..256).map(|i| i * 29 % 200).collect();
    for room in [1, 2, 5] {
        let got = one(&model, request(&prompt[..256 - room], 100));
        assert_eq!((got.tokens.len(), got.finish_reason), (room, FinishReason::Length));
    }
    for n_tokens in [256, 300] {
        let prompt = vec![7; n_tokens];
        let error = generate(&model, &[request(&prompt, 1)], 1, |_| {}).unwrap_err();
        let Error::ContextTooLong { n_tokens: got, context_tokens: 256 } = error else {
            panic!("{error:?}")
        };
        assert_eq!(got, n_tokens);
    }
    // A tenant's context is its own.
    let tenant = tenant(&model, |c| c["max_position_embeddings"] = json!(10));
    let got = one(&model, Request { tenant: Some(&tenant), ..request(&prompt[..7], 100) });
    assert_eq!((got.tokens.len(), got.finish_reason), (3, FinishReason::Length));
    let requests =
        [request(&prompt[..10], 1), Request { tenant: Some(&tenant), ..request(&prompt[..10], 1) }];
    let error = generate(&model, &requests, 2, |_| panic!("nothing is run")).unwrap_err();
    let Error::ContextTooLong { n_tokens: 10, context_tokens: 10 } = error else {
        panic!("{error:?}")
    };
    assert_eq!(error.to_string(), "the prompt has 10 tokens, the context holds 10");
}

#[test]
fn an_empty_prompt_is_refused() {
    let model = load(&fixture("llama_tied_gqa"));
    for max_new_tokens in [0, 5] {
        let requests = [request(&[1], 5), request(&[], max_new_tokens)];
        let error = generate(&model, &requests, 2, |_| panic!("nothing is run")).unwrap_err();
        assert!(matches!(error, Error::EmptyPrompt), "{error:?}");
    }
}

#[test]
fn a_token_outside_the_vocabulary_is_refused() {
    let model = load(&fixture("llama_tied_gqa"));
    for bad in [200, u32::MAX] {
        let error = generate(&model, &[request(&[1, bad], 5)], 1, |_| {}).unwrap_err();
        let Error::Token { token, vocab_size: 200 } = error else { panic!("{error:?}") };
        assert_eq!(token, bad);
        assert_eq!(error.to_string(), format!("token {bad} is outside the vocabulary of 200"));
        // Nothing was run, so the cache is as it was.
        let mut caches = [(); 2].map(|()| KvCache::new(model.config()));
        let tokens = [[1, 2], [3, bad]];
        let mut segments: Vec<_> = caches
            .iter_mut()
            .zip(&tokens)
            .map(|(cache, tokens)| Segment { tokens, tenant: None, cache, logits: Logits::Last })
            .collect();
        let error = model.forward(&mut segments).unwrap_err();
        assert!(matches!(error, Error::Token { .. }), "{error:?}");
        assert_eq!(caches.map(|c| c.n_tokens()), [0, 0]);
    }
}

#[test]
fn sampling_repeats_with_its_seed() {
    let model = load(&fixture("qwen2_tied"));
    let sampled = |seed, temperature| {
        let sampling = SamplingParams { temperature, top_k: 0, top_p: 1.0, seed };
        one(&model, Request { sampling, ..request(&[3, 1, 4], 30) }).tokens
    };
    assert_eq!(sampled(5, 1.0), sampled(5, 1.0));
    assert_ne!(sampled(5, 1.0), sampled(6, 1.0));
    // Next to nothing, and nothing, is greedy.
    let greedy = one(&model, request(&[3, 1, 4], 30)).tokens;
    assert_eq!(sampled(5, 0.0), greedy);
    assert_eq!(sampled(5, f32::MIN_POSITIVE), greedy);
    let top_1 = SamplingParams { temperature: 5.0, top_k: 1, top_p: 1.0, seed: 1 };
    assert_eq!(one(&model, Request { sampling: top_1, ..request(&[3, 1, 4], 30) }).tokens, greedy);
}
