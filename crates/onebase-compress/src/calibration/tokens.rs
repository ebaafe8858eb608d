use onebase_model::{Model, Request, SamplingParams, generate, start_token, stop_tokens};
use onebase_tensor::stream;
use rand::RngExt;

use super::moments::held_window;
use crate::{Progress, Result};

/// Documents that the model writes together.
const BATCH: usize = 32;

/// `n_tokens` tokens of a model's vocabulary, each as likely as any other.
pub fn random_tokens(model: &Model, n_tokens: usize, seed: u64) -> Vec<u32> {
    let mut draws = stream(seed, "random tokens", 0);
    (0..n_tokens).map(|_| draws.random_range(0..vocabulary(model))).collect()
}

/// `n_tokens` tokens of documents that the model writes, one after the other: each begins
/// with the token that its documents begin with or, where it says none, with any, and
/// goes on with draws at temperature 1 until the model ends it or it has `window_tokens`.
///
/// The same seed gives the same tokens on any number of threads. `progress` counts tokens.
///
/// # Errors
/// When a configuration is malformed or a logit is no finite number.
pub fn generated_tokens(
    model: &Model,
    n_tokens: usize,
    window_tokens: usize,
    seed: u64,
    progress: &dyn Progress,
) -> Result<Vec<u32>> {
    let start = start_token(model.checkpoint())?.filter(|token| *token < vocabulary(model));
    let stops = stop_tokens(model.checkpoint())?;
    let window_tokens = held_window(model, window_tokens);
    progress.begin(n_tokens as u64);
    progress.tensor("generating");
    let mut tokens = Vec::new();
    let mut n_documents = 0;
    while tokens.len() < n_tokens {
        let n_missing = (n_tokens - tokens.len()).div_ceil(window_tokens);
        let requests: Vec<Request<'_>> = (0..n_missing.min(BATCH) as u64)
            .map(|index| {
                let mut draws = stream(seed, "generated tokens", n_documents + index);
                let first = draws.random_range(0..vocabulary(model));
                let sampling =
                    SamplingParams { temperature: 1.0, top_k: 0, top_p: 1.0, seed: draws.random() };
                Request {
                    tenant: None,
                    prompt: vec![start.unwrap_or(first)],
                    max_new_tokens: window_tokens - 1,
                    sampling,
                    stop_tokens: &stops,
                    stop_texts: &[],
                    tokenizer: None,
                }
            })
            .collect();
        n_documents += requests.len() as u64;
        let generation = generate(model, &requests, BATCH, |n| progress.advance(n as u64))?;
        for (request, completion) in requests.iter().zip(generation.completions) {
            tokens.extend_from_slice(&request.prompt);
            tokens.extend(completion.tokens);
        }
    }
    tokens.truncate(n_tokens);
    Ok(tokens)
}

/// Tokens of the vocabulary.
fn vocabulary(model: &Model) -> u32 {
    u32::try_from(model.config().vocab_size).unwrap_or(u32::MAX)
}
