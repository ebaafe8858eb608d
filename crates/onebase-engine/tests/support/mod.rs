//! The demo family, compressed, and engines over it.

// Each test binary uses a part of it.
#![allow(dead_code)]
// Helpers of tests may panic as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use onebase_compress::{Pair, Plan, Silent, TablePlan, VectorPlan, compress};
use onebase_engine::{Engine, Error, Event, Lease, Options, Request, Ticket, TokenLogprobs, Usage};
use onebase_format::Checkpoint;
use onebase_format::artifact::Artifact;
use onebase_model::{FinishReason, Message, Model, Tenant, TextModel, generate};
use tempfile::TempDir;

pub(crate) fn demo(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../demo").join(name)
}

/// Tenants of different codecs: name, fine-tune, codec.
pub(crate) const TENANTS: [(&str, &str, &str); 4] = [
    ("math-rtn", "math", "rtn:bits=2"),
    ("math-sign", "math", "sign"),
    ("chat-rtn", "chat", "rtn"),
    ("chat-low-rank", "chat", "low-rank:bits=1"),
];

/// The artifacts of [`TENANTS`], a folder each.
pub(crate) static DELTAS: LazyLock<TempDir> = LazyLock::new(|| {
    let dir = tempfile::tempdir().unwrap();
    for (name, fine_tune, codec) in TENANTS {
        compress_to(fine_tune, codec, &dir.path().join(name));
    }
    dir
});

pub(crate) fn compress_to(fine_tune: &str, codec: &str, out: &Path) {
    let pair = Pair::open(&demo("base"), &demo(fine_tune)).unwrap();
    let codec = codec.parse::<onebase_codec::CodecSpec>().unwrap();
    let plan = Plan::new(codec.clone(), TablePlan::Codec(codec), VectorPlan::Exact);
    compress(&pair, &plan, out, &Silent).unwrap();
}

pub(crate) fn artifact(name: &str) -> PathBuf {
    DELTAS.path().join(name)
}

pub(crate) fn model() -> Model {
    Model::load(Checkpoint::open(&demo("base")).unwrap()).unwrap()
}

pub(crate) fn options() -> Options {
    Options {
        base_name: "base".to_owned(),
        threads: 2,
        max_batch: 8,
        step_tokens: 64,
        kv_bytes: 1 << 30,
        delta_bytes: 1 << 30,
        queue: 1000,
    }
}

pub(crate) fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

/// An engine with all tenants.
pub(crate) fn engine(options: &Options) -> Engine {
    let engine = Engine::start(model(), options).unwrap();
    for (name, ..) in TENANTS {
        engine.registry().load(name, &artifact(name), Some(0), soon()).unwrap();
    }
    engine
}

/// What a request came to.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) tokens: Vec<u32>,
    pub(crate) pieces: Vec<String>,
    pub(crate) logprobs: Vec<Option<TokenLogprobs>>,
    pub(crate) prompt_logprobs: Vec<Option<TokenLogprobs>>,
    pub(crate) end: Result<(FinishReason, Usage), Error>,
}

impl Answer {
    pub(crate) fn text(&self) -> String {
        self.pieces.concat()
    }
}

pub(crate) struct Asked {
    pub(crate) ticket: Ticket,
    pub(crate) events: Receiver<Event>,
}

pub(crate) fn submit(engine: &Engine, name: &str, request: Request) -> Result<Asked, Error> {
    submit_as(engine, engine.registry().lease(name, soon())?, request)
}

pub(crate) fn submit_as(engine: &Engine, lease: Lease, request: Request) -> Result<Asked, Error> {
    let (sender, events) = channel();
    let sink = Box::new(move |event| sender.send(event).is_ok());
    let ticket = engine.submit(lease, request, sink)?;
    Ok(Asked { ticket, events })
}

impl Asked {
    pub(crate) fn wait(self) -> Answer {
        let mut answer = Answer {
            tokens: Vec::new(),
            pieces: Vec::new(),
            logprobs: Vec::new(),
            prompt_logprobs: Vec::new(),
            end: Err(Error::Internal),
        };
        loop {
            match self.events.recv_timeout(Duration::from_secs(120)).expect("an event in time") {
                Event::Prompt { logprobs, .. } => answer.prompt_logprobs = logprobs,
                Event::Token { token, text, logprobs } => {
                    answer.tokens.push(token);
                    answer.pieces.push(text);
                    answer.logprobs.push(logprobs);
                }
                Event::End { text, finish_reason, usage, .. } => {
                    answer.pieces.push(text);
                    answer.end = Ok((finish_reason, usage));
                    return answer;
                }
                Event::Failed(error) => {
                    answer.end = Err(error);
                    return answer;
                }
            }
        }
    }
}

pub(crate) fn ask(engine: &Engine, name: &str, request: Request) -> Answer {
    submit(engine, name, request).unwrap().wait()
}

pub(crate) fn chat(text: &TextModel, question: &str) -> Vec<u32> {
    let message = Message { role: "user".into(), content: question.into() };
    text.encode_chat(&[message]).unwrap()
}

pub(crate) const QUESTION: &str =
    "Lea has 77 apples and gets 4 more. How many apples does Lea have?";

pub(crate) const PROMPTS: [&str; 6] = [
    QUESTION,
    "Please spell the word saddle.",
    "2 + 2",
    "Tom buys 3 boxes of 12 pens. He gives 5 pens to Ann. How many pens are left?",
    "Hi",
    "What is 3 + 4? Think about it for as long as you like, then answer with one word.",
];

/// Base and tenants as a program without an engine has them.
pub(crate) struct Alone {
    pub(crate) model: Model,
    pub(crate) text: TextModel,
    tenants: Vec<(&'static str, Tenant)>,
}

pub(crate) static ALONE: LazyLock<Alone> = LazyLock::new(|| {
    let model = model();
    let text = TextModel::from_checkpoint(model.checkpoint()).unwrap();
    let load = |name| Tenant::load(&model, &Artifact::open(&artifact(name)).unwrap()).unwrap();
    let tenants = TENANTS.iter().map(|(name, ..)| (*name, load(name))).collect();
    Alone { model, text, tenants }
});

impl Alone {
    /// The tokens that a greedy request gets when nobody else is there.
    pub(crate) fn answer(&self, name: &str, prompt: &[u32], max_new_tokens: usize) -> Vec<u32> {
        let tenant = self.tenants.iter().find(|(n, _)| *n == name).map(|(_, tenant)| tenant);
        let request = onebase_model::Request {
            tenant,
            prompt: prompt.to_vec(),
            max_new_tokens,
            sampling: onebase_model::SamplingParams::GREEDY,
            stop_tokens: &self.text.stop_tokens,
            stop_texts: &[],
            tokenizer: Some(&self.text.tokenizer),
        };
        generate(&self.model, &[request], 1, |_| {}).unwrap().completions.remove(0).tokens
    }
}
