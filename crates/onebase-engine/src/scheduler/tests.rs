use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use onebase_format::Checkpoint;
use onebase_model::Model;

use super::FATAL_TOKEN;
use crate::{Engine, Error, Event, Options, Request};

/// The tokens of an answer, or why there is none.
fn answer(events: &Receiver<Event>) -> Result<Vec<u32>, Error> {
    let mut tokens = Vec::new();
    loop {
        match events.recv_timeout(Duration::from_secs(60)).unwrap() {
            Event::Prompt { .. } => {}
            Event::Token { token, .. } => tokens.push(token),
            Event::End { .. } => return Ok(tokens),
            Event::Failed(error) => return Err(error),
        }
    }
}

#[test]
fn a_request_that_breaks_a_step_fails_alone() {
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../demo/base");
    let model = Model::load(Checkpoint::open(&demo).unwrap()).unwrap();
    let options = Options {
        base_name: "base".to_owned(),
        threads: 2,
        max_batch: 8,
        step_tokens: 64,
        kv_bytes: 1 << 26,
        delta_bytes: 1 << 26,
        queue: 8,
    };
    let engine = Engine::start(model, &options).unwrap();
    let submit = |prompt: Vec<u32>, n: usize| {
        let until = Instant::now() + Duration::from_secs(60);
        let lease = engine.registry().lease("base", until).unwrap();
        let (sender, events) = channel();
        let mut request = Request::greedy(prompt, n);
        request.ignore_end = true;
        let sink = Box::new(move |event| sender.send(event).is_ok());
        (engine.submit(lease, request, sink).unwrap(), events)
    };
    let prompts: Vec<Vec<u32>> = (0..3).map(|i| (20 + i..30 + i).collect()).collect();
    let mut alone = Vec::new();
    for prompt in &prompts {
        let (_ticket, events) = submit(prompt.clone(), 200);
        alone.push(answer(&events).unwrap());
    }
    let sound: Vec<_> = prompts.iter().map(|prompt| submit(prompt.clone(), 200)).collect();
    // Comes while the others decode.
    let first = sound[0].1.recv_timeout(Duration::from_secs(60)).unwrap();
    assert!(matches!(first, Event::Prompt { .. }), "{first:?}");
    let (_ticket, events) = submit(vec![20, 21, FATAL_TOKEN], 5);
    assert!(matches!(answer(&events), Err(Error::Internal)));
    for ((_ticket, events), want) in sound.iter().zip(&alone) {
        assert_eq!(answer(events).unwrap(), *want);
    }
    let (_ticket, events) = submit(prompts[0].clone(), 200);
    assert_eq!(answer(&events).unwrap(), alone[0]);
}
