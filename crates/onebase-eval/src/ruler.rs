use onebase_format::Checkpoint;
use onebase_format::artifact::{CalibrationRecord, DeltaError, Perplexity, Quality, TaskQuality};
use onebase_model::{Model, Request, SamplingParams, TextModel, generate};
use serde::Serialize;

use crate::deviation::{Deviation, surprise};
use crate::prepared::{PreparedTask, PreparedText, text_tokens};
use crate::sequences::{Subject, map_rows};
use crate::skill::skill_kept;
use crate::{Error, Result, Task, TextFile, Watcher};

/// Questions that are answered together.
const BATCH_SIZE: usize = 64;

/// What models are measured with.
#[derive(Clone, Debug, Default)]
pub struct Tests {
    /// Questions with exact answers.
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
    base_speed: Speed,
    finetune_speed: Speed,
}

#[derive(Debug)]
struct TaskOnRuler {
    prepared: PreparedTask,
    base: Answers,
    finetune: Answers,
}

/// Replies to the questions of a task.
#[derive(Clone, Debug)]
struct Answers {
    /// `None` where the question has tokens that the subject lacks.
    replies: Vec<Option<String>>,
    right: Vec<bool>,
    speed: Speed,
}

#[derive(Debug)]
struct TextOnRuler {
    prepared: PreparedText,
    base: Option<f64>,
    finetune: Option<f64>,
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
    /// How fast questions were answered.
    pub speed: Speed,
    /// Replies, by task.
    answers: Vec<Answers>,
}

/// A question and what was replied.
#[derive(Clone, Debug, Serialize)]
pub struct Sample<'a> {
    /// The task.
    pub task: &'a str,
    /// The line of its file, from 1.
    pub line: usize,
    /// The right answer.
    pub answer: &'a str,
    /// What the base replied.
    pub base: Option<&'a str>,
    /// What the fine-tune replied.
    pub finetune: Option<&'a str>,
    /// What was replied with the artifact.
    pub compressed: Option<&'a str>,
    /// Which of the three are right, in that order.
    pub right: [bool; 3],
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
    pub fn quality(
        &self,
        ruler: &Ruler<'_>,
        error: Option<DeltaError>,
        calibration: Option<CalibrationRecord>,
    ) -> Quality {
        Quality {
            tool: crate::TOOL.to_owned(),
            reference: ruler.finetune.checkpoint().name(),
            seed: ruler.seed,
            tasks: self.tasks.clone(),
            kl_mean: self.kl_mean,
            top1_agreement: self.top1_agreement,
            perplexity: self.perplexity.clone(),
            error,
            calibration,
        }
    }
}

impl<'a> Ruler<'a> {
    /// Prepares tasks and text with the fine-tune's tokenizer and chat template,
    /// then measures the base and the fine-tune.
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
            base_speed: Speed::default(),
            finetune_speed: Speed::default(),
        };
        // What is wrong with any input is said before the first model runs.
        let config = finetune.config();
        let tasks = tasks
            .into_iter()
            .map(|task| PreparedTask::new(task, &ruler.text_model, config))
            .collect::<Result<Vec<_>>>()?;
        let text = text
            .map(|text| PreparedText::new(&text, window_tokens, &ruler.text_model, config))
            .transpose()?;
        for prepared in tasks {
            let task = ruler.measure_task(prepared, watcher)?;
            ruler.tasks.push(task);
        }
        if let Some(prepared) = text {
            let base = perplexity("base", Subject::own(base), &prepared, watcher)?;
            if base.is_none() {
                ruler.notes.push(format!(
                    "The base's vocabulary lacks tokens of {}; its perplexity is undefined.",
                    prepared.name
                ));
            }
            let finetune = perplexity("fine-tune", Subject::own(finetune), &prepared, watcher)?;
            ruler.text = Some(TextOnRuler { prepared, base, finetune });
        }
        Ok(ruler)
    }

    /// What a reader of the figures must know, in whole sentences.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// The seed of the intervals.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// How fast the base and the fine-tune answered.
    pub fn speed(&self) -> [Speed; 2] {
        [self.base_speed, self.finetune_speed]
    }

    /// The tokens of a text with the fine-tune's tokenizer.
    ///
    /// # Errors
    /// When it cannot be tokenized, has a token that the fine-tune lacks, or fewer than
    /// two.
    pub fn text_tokens(&self, text: &TextFile) -> Result<Vec<u32>> {
        text_tokens(text, &self.text_model, self.finetune.config())
    }

    /// What the base and the fine-tune themselves reach: the figures of a
    /// compressed one are absent.
    pub fn anchors(&self) -> Measurement {
        Measurement {
            tasks: self.tasks.iter().map(TaskOnRuler::anchors).collect(),
            kl_mean: None,
            top1_agreement: None,
            perplexity: self.text.as_ref().map(TextOnRuler::anchors),
            speed: Speed::default(),
            answers: Vec::new(),
        }
    }

    /// Measures the base as if it were the compressed fine-tune: what is left
    /// without any delta.
    ///
    /// # Errors
    /// When a model cannot be run.
    pub fn measure_base(&self, watcher: &dyn Watcher) -> Result<Measurement> {
        let answers = self.tasks.iter().map(|t| t.base.clone()).collect();
        let perplexity = self.text.as_ref().and_then(|t| t.base);
        self.finish("base", Subject::own(self.base), answers, perplexity, watcher)
    }

    /// Measures a tenant of the base, called `name` in progress.
    ///
    /// # Errors
    /// When a model cannot be run.
    pub fn measure(
        &self,
        name: &str,
        subject: Subject<'_>,
        watcher: &dyn Watcher,
    ) -> Result<Measurement> {
        let answers = self
            .tasks
            .iter()
            .map(|task| answer(name, subject, &self.text_model, &task.prepared, watcher))
            .collect::<Result<_>>()?;
        let perplexity = match &self.text {
            Some(text) => perplexity(name, subject, &text.prepared, watcher)?,
            None => None,
        };
        self.finish(name, subject, answers, perplexity, watcher)
    }

    /// Every question with the replies of base and fine-tune and those of a
    /// measurement, where it has some.
    pub fn samples<'s>(&'s self, measured: &'s Measurement) -> impl Iterator<Item = Sample<'s>> {
        self.tasks.iter().enumerate().flat_map(|(index, task)| {
            let compressed = measured.answers.get(index);
            let questions = task.prepared.task.questions.iter().enumerate();
            questions.map(move |(i, question)| Sample {
                task: &task.prepared.task.name,
                line: question.line,
                answer: question.expected(),
                base: task.base.replies[i].as_deref(),
                finetune: task.finetune.replies[i].as_deref(),
                compressed: compressed.and_then(|c| c.replies[i].as_deref()),
                right: [
                    task.base.right[i],
                    task.finetune.right[i],
                    compressed.is_some_and(|c| c.right[i]),
                ],
            })
        })
    }

    fn finish(
        &self,
        name: &str,
        subject: Subject<'_>,
        answers: Vec<Answers>,
        perplexity: Option<f64>,
        watcher: &dyn Watcher,
    ) -> Result<Measurement> {
        let finetune = Subject::own(self.finetune);
        // Over different vocabularies the divergence is not defined.
        let comparable = subject.config().vocab_size == finetune.config().vocab_size;
        let mut total = Deviation::default();
        let mut tasks = Vec::new();
        for (task, answers) in self.tasks.iter().zip(&answers) {
            let mut quality = task.anchors();
            let name_of_task = &task.prepared.task.name;
            quality.compressed = Some(share(&answers.right));
            let (base, tuned) = (&task.base.right, &task.finetune.right);
            let skill = skill_kept(base, tuned, &answers.right, self.seed, name_of_task);
            quality.skill_kept = skill.map(|s| s.kept);
            quality.skill_kept_ci = skill.and_then(|s| s.interval);
            if comparable {
                let what = format!("{name_of_task}, {name}, divergence");
                watcher.begin(&what, task.prepared.n_tokens());
                let sequences = &task.prepared.sequences;
                let own = Deviation::measure(finetune, subject, sequences, watcher)?;
                quality.kl_mean = own.kl_mean();
                quality.top1_agreement = own.top1_agreement();
                total.add(&own);
            }
            tasks.push(quality);
        }
        if let (true, true, Some(text)) = (comparable, tasks.is_empty(), &self.text) {
            let what = format!("{}, {name}, divergence", text.prepared.name);
            watcher.begin(&what, text.prepared.n_tokens() as u64);
            total = Deviation::measure(finetune, subject, &text.prepared.windows, watcher)?;
        }
        let perplexity =
            self.text.as_ref().map(|text| Perplexity { compressed: perplexity, ..text.anchors() });
        let mut speed = Speed::default();
        answers.iter().for_each(|answers| speed.add(answers.speed));
        let (kl_mean, top1_agreement) = (total.kl_mean(), total.top1_agreement());
        Ok(Measurement { tasks, kl_mean, top1_agreement, perplexity, speed, answers })
    }

    fn measure_task(
        &mut self,
        prepared: PreparedTask,
        watcher: &dyn Watcher,
    ) -> Result<TaskOnRuler> {
        let ask =
            |who, model| answer(who, Subject::own(model), &self.text_model, &prepared, watcher);
        let (base, finetune) = (ask("base", self.base)?, ask("fine-tune", self.finetune)?);
        self.base_speed.add(base.speed);
        self.finetune_speed.add(finetune.speed);
        let name = &prepared.task.name;
        let n_unknown = base.replies.iter().filter(|reply| reply.is_none()).count();
        if n_unknown > 0 {
            self.notes.push(format!(
                "The base's vocabulary lacks tokens of {n_unknown} questions of {name}; they count \
                 as not answered by it."
            ));
        }
        if share(&finetune.right) <= share(&base.right) {
            self.notes.push(format!(
                "On {name} the fine-tune ({:.1} %) is no better than the base ({:.1} %): there is \
                 no skill to keep, so skill kept is undefined.",
                100.0 * share(&finetune.right),
                100.0 * share(&base.right),
            ));
        }
        Ok(TaskOnRuler { prepared, base, finetune })
    }
}

impl TaskOnRuler {
    fn anchors(&self) -> TaskQuality {
        TaskQuality {
            name: self.prepared.task.name.clone(),
            blake3: self.prepared.task.digest,
            n: self.prepared.questions.len(),
            base: share(&self.base.right),
            finetune: share(&self.finetune.right),
            compressed: None,
            skill_kept: None,
            skill_kept_ci: None,
            kl_mean: None,
            top1_agreement: None,
        }
    }
}

impl TextOnRuler {
    fn anchors(&self) -> Perplexity {
        Perplexity {
            name: self.prepared.name.clone(),
            blake3: self.prepared.digest,
            n_tokens: self.prepared.n_tokens(),
            window_tokens: self.prepared.window_tokens,
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

/// Lets a subject answer the questions of a task, greedily; those with tokens that
/// are not in its vocabulary it does not.
fn answer(
    who: &str,
    subject: Subject<'_>,
    text_model: &TextModel,
    task: &PreparedTask,
    watcher: &dyn Watcher,
) -> Result<Answers> {
    let questions = &task.questions;
    let asked: Vec<usize> =
        (0..questions.len()).filter(|i| subject.knows(&questions[*i].prompt)).collect();
    watcher.begin(&format!("{}, {who}", task.task.name), task.n_tokens());
    let requests: Vec<Request<'_>> = asked
        .iter()
        .map(|i| Request {
            tenant: subject.tenant,
            prompt: questions[*i].prompt.clone(),
            max_new_tokens: questions[*i].max_new_tokens,
            sampling: SamplingParams::GREEDY,
            stop_tokens: &text_model.stop_tokens,
            stop_texts: &questions[*i].stop_texts,
            tokenizer: Some(&text_model.tokenizer),
        })
        .collect();
    let generation = generate(subject.model, &requests, BATCH_SIZE, |n| watcher.advance(n as u64))?;
    let mut replies = vec![None; questions.len()];
    let mut right = vec![false; questions.len()];
    for (i, completion) in asked.into_iter().zip(generation.completions) {
        right[i] = completion.text.trim() == task.task.questions[i].expected();
        replies[i] = Some(completion.text);
    }
    let speed = Speed {
        prefill_tokens: generation.n_prompt_tokens,
        prefill_seconds: generation.prefill_time.as_secs_f64(),
        decode_tokens: generation.n_decode_tokens,
        decode_seconds: generation.decode_time.as_secs_f64(),
    };
    Ok(Answers { replies, right, speed })
}

/// The exponential of the mean surprise at the tokens of a text; `None` where one
/// of them is not in the subject's vocabulary, or it is no finite number.
#[allow(clippy::cast_precision_loss)]
fn perplexity(
    who: &str,
    subject: Subject<'_>,
    text: &PreparedText,
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
    Ok(Some((sum / text.n_tokens() as f64).exp()).filter(|p| p.is_finite()))
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
