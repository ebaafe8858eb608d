//! What a request gets.

// Helpers of tests may panic as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::time::{Duration, Instant};

use onebase_engine::{Constraint, Error, Options, Penalties, Request};
use onebase_model::{FinishReason, SamplingParams};
use support::{ALONE, Asked, PROMPTS, QUESTION, TENANTS, ask, chat, engine, options, submit};

#[test]
fn everyone_gets_what_they_get_alone() {
    let engine = engine(&options());
    let names = TENANTS.map(|(name, ..)| name).into_iter().chain(["base"]);
    let asked: Vec<_> = names
        .flat_map(|name| PROMPTS.map(|prompt| (name, chat(&ALONE.text, prompt))))
        .map(|(name, prompt)| {
            let request = Request::greedy(prompt.clone(), 24);
            (name, prompt, submit(&engine, name, request).unwrap())
        })
        .collect();
    for (name, prompt, asked) in asked {
        let answer = asked.wait();
        assert_eq!(answer.tokens, ALONE.answer(name, &prompt, 24), "{name}");
        let text = ALONE.text.tokenizer.decode(&answer.tokens).unwrap();
        assert_eq!(answer.text(), text);
        assert!(answer.end.is_ok());
    }
    let metrics = engine.metrics();
    assert_eq!(metrics.tenants.values().map(|t| t.n_answered).sum::<u64>(), 30);
    assert_eq!(engine.n_open(), 0);
}

#[test]
fn little_memory_changes_no_answer() {
    // Room for about three of eight requests: some are dropped and computed again.
    let per_token = onebase_model::KvCache::bytes_per_token(ALONE.model.config());
    let options = Options { kv_bytes: 288 * per_token, step_tokens: 24, ..options() };
    let engine = engine(&options);
    let asked: Vec<_> = PROMPTS
        .iter()
        .flat_map(|prompt| ["math-rtn", "chat-rtn"].map(|name| (name, chat(&ALONE.text, prompt))))
        .map(|(name, prompt)| {
            let request = Request { ignore_end: true, ..Request::greedy(prompt.clone(), 90) };
            (name, prompt, submit(&engine, name, request).unwrap())
        })
        .collect();
    for (name, prompt, asked) in asked {
        let tokens = asked.wait().tokens;
        let alone = ALONE.answer(name, &prompt, 90);
        // The engine went on past the end.
        assert_eq!(tokens[..alone.len()], alone, "{name}");
        assert_eq!(tokens.len(), 90);
    }
    assert!(engine.metrics().n_preemptions > 0);
}

#[test]
fn a_kept_beginning_is_used_and_changes_nothing() {
    let engine = engine(&options());
    let prompt = chat(&ALONE.text, QUESTION);
    let first = ask(&engine, "math-rtn", Request::greedy(prompt.clone(), 20));
    let again = ask(&engine, "math-rtn", Request::greedy(prompt.clone(), 20));
    assert_eq!(again.end.as_ref().unwrap().1.cached_tokens, prompt.len() - 1);
    assert_eq!(first.tokens, again.tokens);
    // A conversation that goes on begins with the answer too.
    let longer = [&prompt[..], &first.tokens, &prompt].concat();
    let next = ask(&engine, "math-rtn", Request::greedy(longer.clone(), 20));
    assert!(next.end.as_ref().unwrap().1.cached_tokens >= prompt.len() + first.tokens.len() - 1);
    assert_eq!(next.tokens, ALONE.answer("math-rtn", &longer, 20));
    // Of another tenant, or of another loading of the same, nothing is taken over.
    let other = ask(&engine, "math-sign", Request::greedy(prompt.clone(), 20));
    assert_eq!(other.end.as_ref().unwrap().1.cached_tokens, 0);
    let registry = engine.registry();
    registry.load("math-rtn", &support::artifact("chat-rtn"), None, support::soon()).unwrap();
    let swapped = ask(&engine, "math-rtn", Request::greedy(prompt.clone(), 20));
    assert_eq!(swapped.end.as_ref().unwrap().1.cached_tokens, 0);
    assert_eq!(swapped.tokens, ALONE.answer("chat-rtn", &prompt, 20));
}

#[test]
fn the_seed_decides_whatever_the_batch() {
    let engine = engine(&options());
    let prompt = chat(&ALONE.text, "Please spell the word saddle.");
    let request = |seed| {
        let sampling = SamplingParams { temperature: 2.0, top_k: 50, top_p: 0.95, seed };
        Request { sampling, ..Request::greedy(prompt.clone(), 24) }
    };
    let alone = ask(&engine, "chat-rtn", request(7)).tokens;
    let asked: Vec<_> =
        (0..12).map(|seed| submit(&engine, "chat-rtn", request(seed)).unwrap()).collect();
    let answers: Vec<_> = asked.into_iter().map(|asked| asked.wait().tokens).collect();
    assert_eq!(answers[7], alone);
    assert!(answers.iter().any(|tokens| *tokens != alone));
}

#[test]
fn logprobs_of_prompt_and_answer_agree() {
    let engine = engine(&options());
    let prompt = chat(&ALONE.text, QUESTION);
    let request = Request { logprobs: Some(3), ..Request::greedy(prompt.clone(), 6) };
    let answer = ask(&engine, "math-rtn", request);
    // What was said, given as a prompt: the same tokens with the same probabilities.
    let said = [&prompt[..], &answer.tokens].concat();
    let request = Request { prompt_logprobs: Some(3), ..Request::greedy(said.clone(), 0) };
    let echo = ask(&engine, "math-rtn", request);
    assert_eq!(echo.prompt_logprobs.len(), said.len());
    assert_eq!(echo.prompt_logprobs[0], None);
    assert_eq!(echo.prompt_logprobs[prompt.len()..], answer.logprobs);
    assert!(echo.tokens.is_empty());
    for (token, logprobs) in answer.tokens.iter().zip(&answer.logprobs) {
        let logprobs = logprobs.as_ref().unwrap();
        assert_eq!(logprobs.top[0], (*token, logprobs.logprob), "greedy takes the likeliest");
        assert_eq!(logprobs.top.len(), 3);
    }
}

#[test]
fn texts_and_tokens_end_an_answer() {
    let engine = engine(&options());
    let prompt = chat(&ALONE.text, QUESTION);
    let whole = ask(&engine, "math-rtn", Request::greedy(prompt.clone(), 24));
    let text = whole.text();
    assert!(text.contains("= 81"), "{text:?}");
    let stop_texts = vec!["never".to_owned(), "= 8".to_owned()];
    let request = Request { stop_texts, ..Request::greedy(prompt.clone(), 24) };
    let stopped = ask(&engine, "math-rtn", request);
    assert_eq!(stopped.text(), text[..text.find("= 8").unwrap()]);
    assert_eq!(stopped.end.unwrap().0, FinishReason::Stop);
    // A beginning of a stop is held back until it is known to be none.
    let stop_texts = vec!["+ 5".to_owned()];
    let request = Request { stop_texts, ..Request::greedy(prompt.clone(), 24) };
    assert_eq!(ask(&engine, "math-rtn", request).text(), text);
    let stop_tokens = vec![whole.tokens[2]];
    let request = Request { stop_tokens, ..Request::greedy(prompt.clone(), 24) };
    assert_eq!(ask(&engine, "math-rtn", request).tokens, whole.tokens[..2]);
    let short = ask(&engine, "math-rtn", Request::greedy(prompt, 2));
    assert_eq!(short.end.unwrap().0, FinishReason::Length);
}

#[test]
fn bad_requests_are_refused() {
    let engine = engine(&Options { kv_bytes: 6144 * 64, ..options() });
    let refused = |request| submit(&engine, "base", request).err().expect("a refusal");
    assert!(matches!(refused(Request::greedy(vec![], 5)), Error::Model(_)));
    assert!(matches!(refused(Request::greedy(vec![5000], 5)), Error::Model(_)));
    assert!(matches!(refused(Request::greedy(vec![5; 10], 1015)), Error::Context { .. }));
    assert!(matches!(refused(Request::greedy(vec![5; 10], 1014)), Error::KvTooSmall { .. }));
    let base = || Request::greedy(vec![5; 10], 5);
    let sampling =
        |temperature, top_p| SamplingParams { temperature, top_p, ..SamplingParams::GREEDY };
    for bad in [
        Request { sampling: sampling(-1.0, 1.0), ..base() },
        Request { sampling: sampling(f32::NAN, 1.0), ..base() },
        Request { sampling: sampling(1.0, 0.0), ..base() },
        Request { logprobs: Some(21), ..base() },
        Request { stop_texts: vec![String::new()], ..base() },
        Request { logit_bias: vec![(1, 101.0)], ..base() },
        Request { penalties: Penalties { presence: 3.0, ..Penalties::NONE }, ..base() },
    ] {
        assert!(matches!(refused(bad), Error::Invalid { .. }));
    }
    let unknown = submit(&engine, "math-rtm", base()).err().unwrap();
    assert_eq!(unknown.hint().unwrap(), "did you mean math-rtn or math-sign or chat-rtn?");
}

#[test]
fn late_and_unwanted_requests_end() {
    let engine = engine(&Options { max_batch: 1, ..options() });
    let long = || Request { ignore_end: true, ..Request::greedy(vec![5; 40], 900) };
    let first = submit(&engine, "base", long()).unwrap();
    let late = Request { deadline: Some(Instant::now() + Duration::from_millis(30)), ..long() };
    let late = submit(&engine, "math-rtn", late).unwrap();
    assert!(matches!(late.wait().end, Err(Error::Deadline)));
    let waiting = submit(&engine, "math-rtn", long()).unwrap();
    drop((first.ticket, waiting.ticket));
    let last = ask(&engine, "base", Request::greedy(vec![5; 4], 3));
    assert!(last.end.is_ok());
    assert!(engine.drain(Duration::from_secs(5)));
    let refused = submit(&engine, "base", Request::greedy(vec![5], 1)).err();
    assert!(matches!(refused, Some(Error::Draining)));
    let cancelled: u64 = engine.metrics().tenants.values().map(|t| t.n_cancelled).sum();
    assert_eq!(cancelled, 2);
}

/// Lets only even tokens come, and panics or ends after some.
struct Even {
    left: usize,
    panics: bool,
}

impl Constraint for Even {
    fn restrict(&mut self, logits: &mut [f32]) -> Result<(), String> {
        logits.iter_mut().skip(1).step_by(2).for_each(|logit| *logit = f32::NEG_INFINITY);
        Ok(())
    }

    fn accept(&mut self, _: u32) -> Result<bool, String> {
        self.left -= 1;
        assert!(self.left > 0 || !self.panics, "as it was asked to");
        Ok(self.left == 0)
    }
}

#[test]
fn a_constraint_rules_and_its_panic_is_its_own() {
    let engine = engine(&options());
    let prompt = chat(&ALONE.text, QUESTION);
    let request = |panics| Request {
        constraint: Some(Box::new(Even { left: 5, panics })),
        ignore_end: true,
        ..Request::greedy(prompt.clone(), 40)
    };
    let plain = submit(&engine, "math-rtn", Request::greedy(prompt.clone(), 24)).unwrap();
    let broken = submit(&engine, "math-rtn", request(true)).unwrap();
    let even = ask(&engine, "math-rtn", request(false));
    assert_eq!(even.tokens.len(), 5);
    assert!(even.tokens.iter().all(|token| token % 2 == 0));
    assert_eq!(even.end.unwrap().0, FinishReason::Stop);
    assert!(matches!(broken.wait().end, Err(Error::Internal)));
    assert_eq!(plain.wait().tokens, ALONE.answer("math-rtn", &prompt, 24));
}

#[test]
fn a_busy_tenant_starves_nobody() {
    let engine = engine(&Options { max_batch: 2, queue: 20, ..options() });
    let request = |n| Request { ignore_end: true, ..Request::greedy(vec![5; 8], n) };
    let flood: Vec<_> =
        (0..40).map(|_| submit(&engine, "math-rtn", request(60)).unwrap()).collect();
    let start = Instant::now();
    let other = ask(&engine, "chat-rtn", request(5));
    let waited = start.elapsed();
    assert!(other.end.is_ok(), "it was let in though the queue was full");
    let answers: Vec<_> = flood.into_iter().map(Asked::wait).collect();
    assert!(waited < start.elapsed() / 3, "{waited:?} of {:?}", start.elapsed());
    let full = answers.iter().filter(|a| matches!(a.end, Err(Error::QueueFull { .. }))).count();
    assert!((18..=21).contains(&full), "{full}");
    let Some(Err(Error::QueueFull { retry_after, .. })) =
        answers.into_iter().map(|answer| answer.end).find(Result::is_err)
    else {
        panic!("some were turned away")
    };
    assert!(retry_after >= Duration::from_secs(1));
}
