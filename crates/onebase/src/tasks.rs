//! Tests with exact answers.

use std::path::Path;

use anyhow::{Context as _, bail};
use onebase_model::{Message, Model, Request, SamplingParams, Tenant, TextModel, generate};
use serde::Deserialize;

use crate::output::count_bar;

/// Most tokens of an answer to a test question.
const ANSWER_TOKENS: usize = 64;

/// Sequences that are run together.
const BATCH_SIZE: usize = 64;

/// A question with its one right answer.
#[derive(Debug, Deserialize)]
pub(crate) struct Question {
    pub(crate) messages: Vec<Message>,
    answer: String,
}

/// Reads JSON lines `{"messages": [...], "answer": "..."}`, at most `limit`.
pub(crate) fn read(path: &Path, limit: usize) -> anyhow::Result<Vec<Question>> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let questions: Vec<Question> = lines
        .take(limit)
        .map(|(index, line)| {
            serde_json::from_str(line)
                .with_context(|| format!("{}, line {}", path.display(), index + 1))
        })
        .collect::<anyhow::Result<_>>()?;
    if questions.is_empty() {
        bail!("{} has no question", path.display());
    }
    Ok(questions)
}

/// How many questions the model answers exactly, greedily.
pub(crate) fn score(
    what: &str,
    model: &Model,
    tenant: Option<&Tenant>,
    text: &TextModel,
    questions: &[Question],
) -> anyhow::Result<usize> {
    let requests = questions
        .iter()
        .map(|question| {
            Ok(Request {
                tenant,
                prompt: text.encode_chat(&question.messages)?,
                max_new_tokens: ANSWER_TOKENS,
                sampling: SamplingParams::GREEDY,
                stop_tokens: &text.stop_tokens,
                stop_texts: &[],
                tokenizer: Some(&text.tokenizer),
            })
        })
        .collect::<anyhow::Result<Vec<_>>>()?;
    let total = requests.iter().map(|r| r.prompt.len()).sum();
    let bar = count_bar(what, total);
    let generation = generate(model, &requests, BATCH_SIZE, |n| bar.inc(n as u64))?;
    bar.finish_and_clear();
    let answers = generation.completions.iter().zip(questions);
    Ok(answers.filter(|(completion, q)| completion.text.trim() == q.answer).count())
}
