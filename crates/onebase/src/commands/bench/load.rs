//! Which request comes when, and for whom.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, bail};
use onebase_tensor::stream;
use rand::RngExt;
use rand_distr::{Distribution, Gamma, Zipf};

use crate::args::{Arrivals, BenchServeArgs, Draw};

/// A request to send.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Planned {
    /// From the start.
    pub(super) at: Duration,
    pub(super) model: String,
    pub(super) prompt_tokens: usize,
    pub(super) answer_tokens: usize,
}

/// All requests, in the order in which they come; the same for the same seed.
pub(super) fn plan(args: &BenchServeArgs, models: &[String]) -> anyhow::Result<Vec<Planned>> {
    if let Some(trace) = &args.trace {
        return read_trace(args, trace);
    }
    let mut choices = stream(args.seed, "models", 0);
    let mut gaps = stream(args.seed, "gaps", 0);
    // Poisson arrivals are those whose gaps have a variation of 1.
    let variation = match args.arrivals {
        Arrivals::Poisson => 1.0,
        Arrivals::Gamma(variation) => variation,
    };
    let shape = 1.0 / (variation * variation);
    let gap = args.rate.map(|rate| Gamma::new(shape, 1.0 / (rate * shape))).transpose();
    let gap = gap.context("these arrivals have no distribution")?;
    #[allow(clippy::cast_precision_loss)]
    let zipf = match args.draw {
        Draw::Uniform => None,
        Draw::Zipf(power) => {
            Some(Zipf::new(models.len() as f64, power).context("this draw has no distribution")?)
        }
    };
    let mut at = Duration::ZERO;
    let mut plan = Vec::with_capacity(args.requests);
    for _ in 0..args.requests {
        // A sample of Zipf's is a whole number from 1 to the number of models.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let index = match &zipf {
            None => choices.random_range(0..models.len()),
            Some(zipf) => (zipf.sample(&mut choices) as usize).clamp(1, models.len()) - 1,
        };
        if let Some(gap) = &gap {
            at += Duration::try_from_secs_f64(gap.sample(&mut gaps)).unwrap_or(Duration::ZERO);
        }
        plan.push(Planned {
            at,
            model: models[index].clone(),
            prompt_tokens: args.prompt_tokens,
            answer_tokens: args.answer_tokens,
        });
    }
    Ok(plan)
}

fn read_trace(args: &BenchServeArgs, path: &Path) -> anyhow::Result<Vec<Planned>> {
    let text = std::fs::read_to_string(path);
    let text = text.with_context(|| format!("cannot read {}", path.display()))?;
    let mut plan = Vec::new();
    for (number, line) in text.lines().enumerate() {
        if line.trim().is_empty() || line.starts_with('#') {
            continue;
        }
        let Some(planned) = parse(args, line) else {
            bail!(
                "{}:{}: expected SECONDS MODEL [PROMPT_TOKENS ANSWER_TOKENS], got {line:?}",
                path.display(),
                number + 1
            );
        };
        plan.push(planned);
    }
    plan.sort_by_key(|planned| planned.at);
    Ok(plan)
}

fn parse(args: &BenchServeArgs, line: &str) -> Option<Planned> {
    let mut words = line.split_whitespace();
    let at = Duration::try_from_secs_f64(words.next()?.parse().ok()?).ok()?;
    let model = words.next()?.to_owned();
    let mut tokens = |default: usize| match words.next() {
        None => Some(default),
        Some(word) => word.parse().ok().filter(|n| *n > 0),
    };
    let (prompt_tokens, answer_tokens) = (tokens(args.prompt_tokens)?, tokens(args.answer_tokens)?);
    words.next().is_none().then_some(Planned { at, model, prompt_tokens, answer_tokens })
}
