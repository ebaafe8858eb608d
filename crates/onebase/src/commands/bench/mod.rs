//! Measuring what runs.

mod client;
mod load;
mod report;

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, bail};
use onebase_tensor::stream;
use rand::RngExt;
use serde_json::json;
use tokio::sync::Semaphore;

use crate::args::{BenchCommand, BenchServeArgs};
use crate::output::Output;
use client::{Client, Measured};
use load::Planned;

/// A text of which prompts are mixed: its tokens are in every vocabulary.
const WORDS: &str = "One day a farmer went to the market with 12 apples and 7 pears. She sold 4 of \
                     them to her neighbour, gave two to a child, and took the rest home again. How \
                     many pieces of fruit were left in the basket, and what did she do with them?";

pub(crate) fn run(command: &BenchCommand, output: &Output) -> anyhow::Result<()> {
    let BenchCommand::Serve(args) = command;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.context("cannot start a thread")?.block_on(serve(args, output))
}

async fn serve(args: &BenchServeArgs, output: &Output) -> anyhow::Result<()> {
    let client = Arc::new(Client::new(&args.url, args.api_key.as_deref())?);
    let models = models(args, &client).await?;
    let plan = load::plan(args, &models)?;
    let Some(first) = plan.first() else { bail!("there is no request to send") };
    let body = json!({"model": first.model, "prompt": WORDS, "add_special_tokens": false});
    let reply = client.call("POST", "/tokenize", Some(&body)).await?;
    let words: Vec<u32> = serde_json::from_value(reply["tokens"].clone())
        .context("the server's answer to /tokenize has no tokens")?;
    if words.is_empty() {
        bail!("the server's tokenizer has no tokens for plain text");
    }
    let start = Instant::now();
    let measured = send_all(args, &client, plan, &words, start).await?;
    report::print(args, &models, &measured, start.elapsed(), output)
}

/// The models to ask: those that were named, or all tenants, the base where there is none.
async fn models(args: &BenchServeArgs, client: &Client) -> anyhow::Result<Vec<String>> {
    if !args.models.is_empty() {
        return Ok(args.models.clone());
    }
    let list = client.call("GET", "/v1/models", None).await?;
    let cards = list["data"].as_array().cloned().unwrap_or_default();
    let is_tenant = |card: &&serde_json::Value| !card["parent"].is_null();
    let has_tenants = cards.iter().any(|card| is_tenant(&card));
    let named = cards.iter().filter(|card| !has_tenants || is_tenant(card));
    let names: Vec<String> =
        named.filter_map(|card| Some(card["id"].as_str()?.to_owned())).collect();
    if names.is_empty() {
        bail!("{} serves no model", args.url);
    }
    Ok(names)
}

async fn send_all(
    args: &BenchServeArgs,
    client: &Arc<Client>,
    plan: Vec<Planned>,
    words: &[u32],
    start: Instant,
) -> anyhow::Result<Vec<Measured>> {
    let places = Arc::new(Semaphore::new(args.concurrency));
    let mut sent = Vec::with_capacity(plan.len());
    for (index, planned) in plan.into_iter().enumerate() {
        let mut draws = stream(args.seed, "prompt", index as u64);
        let prompt: Vec<u32> =
            (0..planned.prompt_tokens).map(|_| words[draws.random_range(0..words.len())]).collect();
        let body = json!({
            "model": planned.model,
            "prompt": prompt,
            "max_tokens": planned.answer_tokens,
            "temperature": 0,
            "ignore_eos": true,
            "stream": true,
            "stream_options": {"include_usage": true},
        });
        let due = start + planned.at;
        tokio::time::sleep_until(due.into()).await;
        let permit = Arc::clone(&places).acquire_owned().await?;
        // Without a rate a request is due when it has its place.
        let due = if args.rate.is_some() || args.trace.is_some() { due } else { Instant::now() };
        let client = Arc::clone(client);
        sent.push(tokio::spawn(async move {
            let measured = client.measure(&planned.model, &body, due).await;
            drop(permit);
            measured
        }));
    }
    let mut measured = Vec::with_capacity(sent.len());
    for one in sent {
        measured.push(one.await?);
    }
    Ok(measured)
}
