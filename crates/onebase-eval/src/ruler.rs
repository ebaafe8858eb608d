use onebase_format::artifact::{Artifact, DeltaError, Perplexity, Quality, TaskQuality};
use onebase_format::{Checkpoint, Digest};
use onebase_model::{Model, Request, SamplingParams, TextModel, generate};
use serde::Serialize;

use crate::deviation::{Deviation, surprise};
use crate::sequences::{Sequence, Subject, map_rows};
use crate::skill::skill_kept;
use crate::task::Prompt;
use crate::{Error, Result, Task, TextFile, Watcher};

/// Questions that are answered together.
const BATCH_SIZE: usize = 64;

/// Most tokens of a text that are run as one document, unless more are asked for.
const MAX_WINDOW_TOKENS: usize = 2048;

/// Tokens by which a reply may be longer than the bytes of the right answer: white
/// space around it, and a token that ends it.
const SPARE_TOKENS: usize = 16;

/// What models are measured with.
#[derive(Clone, Debug, Default)]
pub struct Tests {
    /// Tests with exact answers.
    pub tasks: Vec<Task>,
    /// A text for perplexity.
    pub text: Option<TextFile>,
    /// Tokens of the text that are run as one document; the fine-tune's context, at
    /// most 2048, unless given.
    pub window_tokens: Option<usize>,
    /// Seed of the intervals.
    pub seed: u64,
}

/// A base, a fine-tune, and what they are compared by; base and fine-tune are
/// measured once, then any number of tenants.
#[derive(Debug)]
pub struct Ruler<'a> {
    base: &'a Model,
    finetune: &'a Model,
    seed: u64,
    notes: Vec<String>,
    text_model: TextModel,
    tasks: Vec<TaskOnRuler>,
    text: Option<TextOnRuler>,
    speed: Speed,
}

/// A question as tokens of the fine-tune's tokenizer.
#[derive(Debug)]
struct Tokens {
    prompt: Vec<u32>,
    answer: Vec<u32>,
    stop_texts: Vec<String>,
}

#[derive(Debug)]
struct TaskOnRuler {
    task: Task,
    questions: Vec<Tokens>,
    /// Prompt and right answer; every position from the prompt's last token on is
    /// wanted.
    sequences: Vec<Sequence>,
    base: Vec<bool>,
    finetune: Vec<bool>,
}

#[derive(Debug)]
struct TextOnRuler {
    name: String,
    digest: Digest,
    window_tokens: usize,
    windows: Vec<Sequence>,
    /// The tokens that follow each position of each window.
    targets: Vec<Vec<u32>>,
    base: Option<f64>,
    finetune: f64,
}

/// What was measured of one tenant, or of the base alone.
#[derive(Clone, Debug)]
pub struct Measurement {
    /// Tests, in the order in which the ruler has them.
    pub tasks: Vec<TaskQuality>,
    /// Mean divergence from the fine-tune over all positions of all tests, or of
    /// the text where there is no test, in nats.
    pub kl_mean: Option<f64>,
    /// Share of those positions at which the likeliest token is the fine-tune's.
    pub top1_agreement: Option<f64>,
    /// Perplexity on the text.
    pub perplexity: Option<Perplexity>,
}

/// How fast answers were computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Speed {
    /// Tokens of prompts that were run.
    pub prefill_tokens: usize,
    /// How long that took.
    pub prefill_seconds: f64,
    /// Chosen tokens that were run in turn.
    pub decode_tokens: usize,
    /// How long that took.
    pub decode_seconds: f64,
}

impl Speed {
    fn add(&mut self, other: Self) {
        self.prefill_tokens += other.prefill_tokens;
        self.prefill_seconds += other.prefill_seconds;
        self.decode_tokens += other.decode_tokens;
        self.decode_seconds += other.decode_seconds;
    }

    /// Tokens of prompts per second.
    #[allow(clippy::cast_precision_loss)]
    pub fn prefill_rate(&self) -> f64 {
        self.prefill_tokens as f64 / self.prefill_seconds.max(1e-9)
    }

    /// Chosen tokens per second, over the whole batch.
    #[allow(clippy::cast_precision_loss)]
    pub fn decode_rate(&self) -> f64 {
        self.decode_tokens as f64 / self.decode_seconds.max(1e-9)
    }
}

impl Measurement {
    /// The measurement as a record of an artifact.
    pub fn quality(self, ruler: &Ruler<'_>, error: Option<DeltaError>) -> Quality {
        Quality {
            tool: crate::TOOL.to_owned(),
            reference: ruler.finetune.checkpoint().name(),
            seed: ruler.seed,
            tasks: self.tasks,
            kl_mean: self.kl_mean,
            top1_agreement: self.top1_agreement,
            perplexity: self.perplexity,
            error,
        }
    }
}

impl<'a> Ruler<'a> {
    /// Prepares tests and text with the fine-tune's tokenizer and chat template,
    /// and measures the base and the fine-tune.
    ///
    /// # Errors
    /// When there is nothing to measure with, a question does not fit into the
    /// context, or a model cannot be run.
    pub fn new(
        base: &'a Model,
        finetune: &'a Model,
        tests: Tests,
        watcher: &dyn Watcher,
    ) -> Result<Self> {
        let Tests { tasks, text, window_tokens, seed } = tests;
        if tasks.is_empty() && text.is_none() {
            return Err(Error::NothingToMeasure);
        }
        for (i, task) in tasks.iter().enumerate() {
            if tasks[..i].iter().any(|t| t.name == task.name) {
                return Err(Error::SameName { name: task.name.clone() });
            }
        }
        let text_model = TextModel::from_checkpoint(finetune.checkpoint())?;
        let notes = tokenizer_notes(base.checkpoint(), finetune.checkpoint())?;
        let mut ruler = Self {
            base,
            finetune,
            seed,
            notes,
            text_model,
            tasks: Vec::new(),
            text: None,
            speed: Speed::default(),
        };
        for task in tasks {
            let task = ruler.prepare_task(task, watcher)?;
            ruler.tasks.push(task);
        }
        if let Some(text) = text {
            ruler.text = Some(ruler.prepare_text(text, window_tokens, watcher)?);
        }
        Ok(ruler)
    }

    /// What a reader of the figures must know, in whole sentences.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// The fine-tune's tokenizer and chat template.
    pub fn text_model(&self) -> &TextModel {
        &self.text_model
    }

    /// How fast answers were computed so far.
    pub fn speed(&self) -> Speed {
        self.speed
    }

    /// What the base and the fine-tune themselves reach: the figures of a
    /// compressed one are absent.
    pub fn anchors(&self) -> Measurement {
        let tasks = self.tasks.iter().map(TaskOnRuler::anchors).collect();
        let perplexity = self.text.as_ref().map(TextOnRuler::anchors);
        Measurement { tasks, kl_mean: None, top1_agreement: None, perplexity }
    }

    /// Measures the base as if it were the compressed fine-tune: what is left
    /// without any delta.
    ///
    /// # Errors
    /// When a model cannot be run.
    pub fn measure_base(&mut self, watcher: &dyn Watcher) -> Result<Measurement> {
        let base = Subject::own(self.base);
        let right = self.tasks.iter().map(|t| t.base.clone()).collect();
        let perplexity = self.text.as_ref().and_then(|t| t.base);
        self.finish("base", base, right, perplexity, watcher)
    }

    /// Measures a tenant of the base, called `name` in progress.
    ///
    /// # Errors
    /// When a model cannot be run.
    pub fn measure(
        &mut self,
        name: &str,
        subject: Subject<'_>,
        watcher: &dyn Watcher,
    ) -> Result<Measurement> {
        let mut right = Vec::new();
        for task in &self.tasks {
            let what = format!("{}, {name}", task.task.name);
            let (answers, speed) = answer(&what, subject, &self.text_model, task, watcher)?;
            self.speed.add(speed);
            right.push(answers);
        }
        let perplexity = match &self.text {
            Some(text) => perplexity(name, subject, text, watcher)?,
            None => None,
        };
        self.finish(name, subject, right, perplexity, watcher)
    }

    fn finish(
        &self,
        name: &str,
        subject: Subject<'_>,
        right: Vec<Vec<bool>>,
        perplexity: Option<f64>,
        watcher: &dyn Watcher,
    ) -> Result<Measurement> {
        let finetune = Subject::own(self.finetune);
        // Over different vocabularies the divergence is not defined.
        let comparable = subject.config().vocab_size == finetune.config().vocab_size;
        let mut total = Deviation::default();
        let mut tasks = Vec::new();
        for (task, right) in self.tasks.iter().zip(right) {
            let mut quality = task.anchors();
            quality.compressed = Some(share(&right));
            let skill = skill_kept(&task.base, &task.finetune, &right, self.seed, &task.task.name);
            quality.skill_kept = skill.map(|s| s.kept);
            quality.skill_kept_ci = skill.and_then(|s| s.interval);
            if comparable {
                let n_tokens: usize = task.sequences.iter().map(|s| s.tokens.len()).sum();
                watcher.begin(&format!("{}, {name}, divergence", task.task.name), n_tokens as u64);
                let own = Deviation::measure(finetune, subject, &task.sequences, watcher)?;
                quality.kl_mean = own.kl_mean();
                quality.top1_agreement = own.top1_agreement();
                total.add(&own);
            }
            tasks.push(quality);
        }
        if let (true, true, Some(text)) = (comparable, tasks.is_empty(), &self.text) {
            watcher.begin(&format!("{}, {name}, divergence", text.name), text.n_tokens() as u64);
            total = Deviation::measure(finetune, subject, &text.windows, watcher)?;
        }
        let perplexity =
            self.text.as_ref().map(|text| Perplexity { compressed: perplexity, ..text.anchors() });
        let (kl_mean, top1_agreement) = (total.kl_mean(), total.top1_agreement());
        Ok(Measurement { tasks, kl_mean, top1_agreement, perplexity })
    }

    fn prepare_task(&mut self, task: Task, watcher: &dyn Watcher) -> Result<TaskOnRuler> {
        let mut questions = Vec::new();
        let mut sequences = Vec::new();
        for question in &task.questions {
            let tokenizer = &self.text_model.tokenizer;
            let prompt = match &question.prompt {
                Prompt::Messages(messages) => self.text_model.encode_chat(messages)?,
                Prompt::Text(text) => tokenizer.encode(text, true)?,
            };
            // A plain text has no end of its own: an answer on one line ends there.
            let one_line =
                matches!(question.prompt, Prompt::Text(_)) && !question.answer.contains('\n');
            let stop_texts = if one_line { vec!["\n".to_owned()] } else { Vec::new() };
            let answer = tokenizer.encode(&question.answer, false)?;
            let (n_tokens, context_tokens) =
                (prompt.len() + answer.len(), self.finetune.config().context_tokens);
            if prompt.is_empty() {
                return Err(onebase_model::Error::EmptyPrompt.into());
            }
            if n_tokens >= context_tokens {
                let (path, line) = (task.path.clone(), question.line);
                return Err(Error::TooLong { path, line, n_tokens, context_tokens });
            }
            let n_context = prompt.len() - 1;
            sequences.push(Sequence { tokens: [&prompt[..], &answer].concat(), n_context });
            questions.push(Tokens { prompt, answer, stop_texts });
        }
        let (base, finetune) = (Vec::new(), Vec::new());
        let mut prepared = TaskOnRuler { task, questions, sequences, base, finetune };
        let name = prepared.task.name.clone();
        for (who, model) in [("base", self.base), ("fine-tune", self.finetune)] {
            let what = format!("{name}, {who}");
            let subject = Subject::own(model);
            let (right, speed) = answer(&what, subject, &self.text_model, &prepared, watcher)?;
            self.speed.add(speed);
            if who == "base" {
                prepared.base = right;
            } else {
                prepared.finetune = right;
            }
        }
        let base = Subject::own(self.base);
        let unknown = prepared.questions.iter().filter(|q| !base.knows(&q.prompt)).count();
        if unknown > 0 {
            self.notes.push(format!(
                "The base's vocabulary lacks tokens of {unknown} questions of {name}; \
                 they count as not answered by it."
            ));
        }
        if share(&prepared.finetune) <= share(&prepared.base) {
            self.notes.push(format!(
                "On {name} the fine-tune ({:.1} %) is no better than the base ({:.1} %): there is \
                 no skill to keep, so skill kept is undefined.",
                100.0 * share(&prepared.finetune),
                100.0 * share(&prepared.base),
            ));
        }
        Ok(prepared)
    }

    fn prepare_text(
        &mut self,
        text: TextFile,
        window_tokens: Option<usize>,
        watcher: &dyn Watcher,
    ) -> Result<TextOnRuler> {
        let tokens = self.text_model.tokenizer.encode(&text.text, true)?;
        if tokens.len() < 2 {
            return Err(Error::ShortText { name: text.name, n_tokens: tokens.len() });
        }
        let context_tokens = self.finetune.config().context_tokens;
        let window_tokens = window_tokens.unwrap_or(MAX_WINDOW_TOKENS).min(context_tokens).max(2);
        // A window's last token is a target only.
        let windows = tokens.chunks(window_tokens).filter(|w| w.len() > 1);
        let (windows, targets) = windows
            .map(|w| {
                let tokens = w[..w.len() - 1].to_vec();
                (Sequence { tokens, n_context: 0 }, w[1..].to_vec())
            })
            .unzip();
        let mut prepared = TextOnRuler {
            name: text.name,
            digest: text.digest,
            window_tokens,
            windows,
            targets,
            base: None,
            finetune: 0.0,
        };
        prepared.base = perplexity("base", Subject::own(self.base), &prepared, watcher)?;
        if prepared.base.is_none() {
            self.notes.push(format!(
                "The base's vocabulary lacks tokens of {}; its perplexity is undefined.",
                prepared.name
            ));
        }
        let finetune = perplexity("fine-tune", Subject::own(self.finetune), &prepared, watcher)?;
        match finetune {
            Some(finetune) => prepared.finetune = finetune,
            None => unreachable!("the fine-tune's tokenizer gave the tokens"),
        }
        Ok(prepared)
    }
}

impl TaskOnRuler {
    fn anchors(&self) -> TaskQuality {
        TaskQuality {
            name: self.task.name.clone(),
            blake3: self.task.digest,
            n: self.questions.len(),
            base: share(&self.base),
            finetune: share(&self.finetune),
            compressed: None,
            skill_kept: None,
            skill_kept_ci: None,
            kl_mean: None,
            top1_agreement: None,
        }
    }
}

impl TextOnRuler {
    fn n_tokens(&self) -> usize {
        self.targets.iter().map(Vec::len).sum()
    }

    fn anchors(&self) -> Perplexity {
        Perplexity {
            name: self.name.clone(),
            blake3: self.digest,
            n_tokens: self.n_tokens(),
            window_tokens: self.window_tokens,
            base: self.base,
            finetune: self.finetune,
            compressed: None,
        }
    }
}

#[allow(clippy::cast_precision_loss)]
fn share(right: &[bool]) -> f64 {
    right.iter().filter(|r| **r).count() as f64 / right.len() as f64
}

/// Which questions a subject answers exactly, greedily. Those with tokens that are
/// not in its vocabulary it does not.
fn answer(
    what: &str,
    subject: Subject<'_>,
    text_model: &TextModel,
    task: &TaskOnRuler,
    watcher: &dyn Watcher,
) -> Result<(Vec<bool>, Speed)> {
    let asked: Vec<usize> =
        (0..task.questions.len()).filter(|i| subject.knows(&task.questions[*i].prompt)).collect();
    let expected: usize = asked
        .iter()
        .map(|i| task.questions[*i].prompt.len() + task.questions[*i].answer.len())
        .sum();
    watcher.begin(what, expected as u64);
    let requests: Vec<Request<'_>> = asked
        .iter()
        .map(|i| {
            let Tokens { prompt, stop_texts, .. } = &task.questions[*i];
            Request {
                tenant: subject.tenant,
                prompt: prompt.clone(),
                // No reply that has more tokens can be the answer: each but a few
                // adds at least a byte.
                max_new_tokens: task.task.questions[*i].answer.len() + SPARE_TOKENS,
                sampling: SamplingParams::GREEDY,
                stop_tokens: &text_model.stop_tokens,
                stop_texts,
                tokenizer: Some(&text_model.tokenizer),
            }
        })
        .collect();
    let generation = generate(subject.model, &requests, BATCH_SIZE, |n| watcher.advance(n as u64))?;
    let mut right = vec![false; task.questions.len()];
    for (i, completion) in asked.into_iter().zip(&generation.completions) {
        right[i] = completion.text.trim() == task.task.questions[i].answer;
    }
    let speed = Speed {
        prefill_tokens: generation.n_prompt_tokens,
        prefill_seconds: generation.prefill_time.as_secs_f64(),
        decode_tokens: generation.n_decode_tokens,
        decode_seconds: generation.decode_time.as_secs_f64(),
    };
    Ok((right, speed))
}

/// The exponential of the mean surprise at the tokens of a text; `None` where one
/// of them is not in the subject's vocabulary.
#[allow(clippy::cast_precision_loss)]
fn perplexity(
    who: &str,
    subject: Subject<'_>,
    text: &TextOnRuler,
    watcher: &dyn Watcher,
) -> Result<Option<f64>> {
    let inputs = text.windows.iter().map(|w| &w.tokens);
    if !inputs.chain(&text.targets).all(|tokens| subject.knows(tokens)) {
        return Ok(None);
    }
    watcher.begin(&format!("{}, {who}", text.name), text.n_tokens() as u64);
    let surprises = map_rows(&[subject], &text.windows, watcher, |window, at, logits| {
        surprise(logits[0], text.targets[window][at])
    })?;
    let sum: f64 = surprises.into_iter().flatten().sum();
    Ok(Some((sum / text.n_tokens() as f64).exp()))
}

/// The files that make tokens of a text.
const TOKENIZER_FILES: [&str; 2] = ["tokenizer.json", "tokenizer_config.json"];

fn tokenizer_notes(base: &Checkpoint, finetune: &Checkpoint) -> Result<Vec<String>> {
    for file in TOKENIZER_FILES {
        if base.side_file(file)? != finetune.side_file(file)? {
            return Ok(vec![format!(
                "{file} of the fine-tune differs from the base's; the fine-tune's tokenizer and \
                 chat template are used for all."
            )]);
        }
    }
    Ok(Vec::new())
}

/// Checks that an artifact was made from this fine-tune, as far as its tensors
/// that are stored as they were tell.
///
/// # Errors
/// When one is not the fine-tune's.
pub fn check_reference(artifact: &Artifact, finetune: &Checkpoint) -> Result<()> {
    for name in artifact.manifest().tensors.keys() {
        let Some(stored) = artifact.exact(name)? else { continue };
        let tensor = finetune.tensor(name)?;
        let same = stored.dtype == tensor.dtype()
            && stored.shape == tensor.shape()
            && stored.bytes == *tensor.bytes();
        if !same {
            return Err(Error::OtherFineTune {
                artifact: artifact.dir().to_owned(),
                finetune: finetune.dir().to_owned(),
                tensor: name.clone(),
            });
        }
    }
    Ok(())
}
