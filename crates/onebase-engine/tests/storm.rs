//! Random arrivals, cancellations, loads, swaps and evictions at once: every answer is the one
//! that its request gets alone. `ONEBASE_STORM_SECONDS` makes it longer.

// Helpers of tests may panic as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use onebase_engine::{Engine, Error, Options, Request};
use onebase_model::KvCache;
use onebase_tensor::stream;
use rand::RngExt;
use support::{ALONE, Asked, PROMPTS, TENANTS, artifact, chat, engine, options, soon, submit_as};

const MOST_TOKENS: usize = 40;

struct Running {
    asked: Asked,
    /// Whose answer it must be.
    voice: String,
    prompt: usize,
    n: usize,
}

/// Swaps the tenant `moving` between two artifacts, and unloads and loads `chat-rtn`.
fn change(engine: &Engine, stop: &AtomicBool) -> usize {
    let mut draws = stream(2, "changes", 0);
    let mut n_changes = 0;
    while !stop.load(Ordering::Acquire) {
        std::thread::sleep(Duration::from_millis(draws.random_range(0..40)));
        let registry = engine.registry();
        if draws.random_bool(0.7) {
            let source = ["math-sign", "chat-low-rank"][draws.random_range(0..2)];
            registry.load("moving", &artifact(source), None, soon()).unwrap();
        } else {
            registry.unload("chat-rtn", None).unwrap();
            registry.load("chat-rtn", &artifact("chat-rtn"), Some(0), soon()).unwrap();
        }
        n_changes += 1;
    }
    n_changes
}

/// The artifact behind a lease on `moving`.
fn behind(engine: &Engine, digest: onebase_format::Digest) -> String {
    let list = engine.registry().list();
    let same = |name: &&str| {
        list.iter().any(|t| t.desired.name == *name && t.desired.digest == Some(digest))
    };
    ["math-sign", "chat-low-rank"].into_iter().find(same).expect("one of the two").to_owned()
}

#[test]
fn every_answer_is_the_one_it_gets_alone() {
    let seconds = std::env::var("ONEBASE_STORM_SECONDS").ok().and_then(|s| s.parse().ok());
    let until = Instant::now() + Duration::from_secs_f64(seconds.unwrap_or(6.0));
    let whole = engine(&options());
    let sizes = whole.registry().list().into_iter().filter_map(|t| t.resident_bytes);
    // Two or three of five tenants are in memory at a time.
    let delta_bytes = sizes.sum::<usize>() * 6 / 10;
    drop(whole);
    let kv_bytes = 640 * KvCache::bytes_per_token(ALONE.model.config());
    let engine = engine(&Options { delta_bytes, kv_bytes, step_tokens: 48, ..options() });
    engine.registry().load("moving", &artifact("math-sign"), None, soon()).unwrap();
    let prompts = PROMPTS.map(|prompt| chat(&ALONE.text, prompt));
    let mut expected: BTreeMap<(String, usize), Vec<u32>> = BTreeMap::new();
    for name in TENANTS.map(|(name, ..)| name).into_iter().chain(["base"]) {
        for (i, prompt) in prompts.iter().enumerate() {
            expected.insert((name.to_owned(), i), ALONE.answer(name, prompt, MOST_TOKENS));
        }
    }
    let stop = AtomicBool::new(false);
    let (n_answered, n_cancelled, n_changes) = std::thread::scope(|scope| {
        let changes = scope.spawn(|| change(&engine, &stop));
        let counts = storm(&engine, &prompts, &expected, until);
        stop.store(true, Ordering::Release);
        (counts.0, counts.1, changes.join().unwrap())
    });
    println!("{n_answered} answered, {n_cancelled} cancelled, {n_changes} changes");
    assert!(n_answered > 20 && n_cancelled > 2 && n_changes > 2);
    assert!(engine.drain(Duration::from_secs(20)));
    let list = engine.registry().list();
    assert!(list.iter().map(|t| t.n_evictions).sum::<u64>() > 0);
    assert!(list.iter().all(|t| t.n_uses == 0), "{list:?}");
    assert!(engine.registry().resident_bytes() <= delta_bytes);
}

/// Requests come one after the other; gives how many were answered and cancelled.
fn storm(
    engine: &Engine,
    prompts: &[Vec<u32>],
    expected: &BTreeMap<(String, usize), Vec<u32>>,
    until: Instant,
) -> (usize, usize) {
    let names = ["base", "math-rtn", "math-sign", "chat-rtn", "chat-low-rank", "moving"];
    let mut draws = stream(1, "storm", 0);
    let (mut running, mut n_answered, mut n_cancelled) = (Vec::new(), 0, 0);
    while Instant::now() < until {
        let name = names[draws.random_range(0..names.len())];
        let (prompt, n) =
            (draws.random_range(0..prompts.len()), draws.random_range(1..MOST_TOKENS));
        let lease = match engine.registry().lease(name, soon()) {
            Ok(lease) => lease,
            Err(Error::UnknownTenant { .. }) if name == "chat-rtn" => continue,
            Err(error) => panic!("{}", error.full()),
        };
        let voice = if name == "moving" { behind(engine, lease.digest()) } else { name.to_owned() };
        let request = Request::greedy(prompts[prompt].clone(), n);
        let asked = submit_as(engine, lease, request).unwrap();
        if draws.random_bool(0.1) {
            drop(asked);
            n_cancelled += 1;
        } else {
            running.push(Running { asked, voice, prompt, n });
        }
        if running.len() > 12 {
            let one = running.swap_remove(draws.random_range(0..running.len()));
            check(one, name, expected);
            n_answered += 1;
        }
    }
    n_answered += running.len();
    running.into_iter().for_each(|one| check(one, "the end", expected));
    (n_answered, n_cancelled)
}

fn check(one: Running, at: &str, expected: &BTreeMap<(String, usize), Vec<u32>>) {
    let answer = one.asked.wait();
    answer.end.as_ref().unwrap_or_else(|error| panic!("{at}: {}", error.full()));
    let of = |voice: &str| &expected[&(voice.to_owned(), one.prompt)];
    let same = |whole: &Vec<u32>| answer.tokens == whole[..whole.len().min(one.n)];
    assert!(same(of(&one.voice)), "{}: {:?}", one.voice, answer.tokens);
}
