use onebase_model::{KvCache, Logits, Model, ModelConfig, Segment, Tenant};
use rayon::prelude::*;

use crate::{Error, Result, Watcher};

/// Tokens of sequences that are run together.
const BATCH_TOKENS: usize = 1024;

/// Logits that are held at a time for each subject.
const HELD_LOGITS: usize = 1 << 24;

/// Whose next tokens are looked at: a model's own, or those of a tenant on it.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'a> {
    /// The model.
    pub model: &'a Model,
    /// The tenant; `None` for the model's own weights.
    pub tenant: Option<&'a Tenant>,
}

impl<'a> Subject<'a> {
    /// A model with its own weights.
    pub fn own(model: &'a Model) -> Self {
        Self { model, tenant: None }
    }

    /// The configuration it runs with.
    pub fn config(&self) -> &'a ModelConfig {
        self.tenant.map_or(self.model.config(), Tenant::config)
    }

    /// Whether all of these tokens are in its vocabulary.
    pub(crate) fn knows(&self, tokens: &[u32]) -> bool {
        tokens.iter().all(|token| (*token as usize) < self.config().vocab_size)
    }

    fn run(&self, runs: Vec<(&[u32], &mut KvCache)>, logits: Logits) -> Result<Vec<Vec<f32>>> {
        let tenant = self.tenant;
        let segment = |(tokens, cache)| Segment { tokens, tenant, cache, logits };
        Ok(self.model.forward(&mut runs.into_iter().map(segment).collect::<Vec<_>>())?)
    }
}

/// Tokens to run, each of the last ones for a distribution of the next.
#[derive(Clone, Debug)]
pub(crate) struct Sequence {
    pub(crate) tokens: Vec<u32>,
    /// Tokens at the beginning after which no distribution is wanted.
    pub(crate) n_context: usize,
}

impl Sequence {
    pub(crate) fn n_rows(&self) -> usize {
        self.tokens.len() - self.n_context
    }
}

/// Runs sequences through several subjects side by side. For each wanted position
/// `row` gets the sequence's index, the position among its wanted ones, and each
/// subject's logits; its results come back by sequence, then position.
///
/// Memory is bounded: a few sequences are run at a time, and their positions in
/// turn.
pub(crate) fn map_rows<T: Send>(
    subjects: &[Subject<'_>],
    sequences: &[Sequence],
    watcher: &dyn Watcher,
    row: impl Fn(usize, usize, &[&[f32]]) -> T + Sync,
) -> Result<Vec<Vec<T>>> {
    let mut results: Vec<Vec<T>> = sequences.iter().map(|_| Vec::new()).collect();
    let mut first = 0;
    while first < sequences.len() {
        let mut last = first + 1;
        let mut n_tokens = sequences[first].tokens.len();
        while last < sequences.len() && n_tokens + sequences[last].tokens.len() <= BATCH_TOKENS {
            n_tokens += sequences[last].tokens.len();
            last += 1;
        }
        let batch = &sequences[first..last];
        run_batch(subjects, batch, first, &row, &mut results[first..last])?;
        watcher.advance(n_tokens as u64);
        first = last;
    }
    Ok(results)
}

fn run_batch<T: Send>(
    subjects: &[Subject<'_>],
    batch: &[Sequence],
    first: usize,
    row: &(impl Fn(usize, usize, &[&[f32]]) -> T + Sync),
    results: &mut [Vec<T>],
) -> Result<()> {
    let mut caches: Vec<Vec<KvCache>> = Vec::new();
    for subject in subjects {
        let mut own: Vec<_> = batch.iter().map(|_| KvCache::new(subject.config())).collect();
        let contexts = batch.iter().map(|s| &s.tokens[..s.n_context]);
        subject.run(contexts.zip(&mut own).collect(), Logits::None)?;
        caches.push(own);
    }
    let vocab_size = subjects.iter().map(|s| s.config().vocab_size).max().unwrap_or(1);
    let rows_each = (HELD_LOGITS / vocab_size / batch.len()).clamp(1, BATCH_TOKENS);
    let longest = batch.iter().map(Sequence::n_rows).max().unwrap_or(0);
    for start in (0..longest).step_by(rows_each) {
        let piece = |s: &Sequence| {
            let end = s.n_rows().min(start + rows_each);
            s.n_context + start.min(end)..s.n_context + end
        };
        let mut logits = Vec::new();
        for (subject, caches) in subjects.iter().zip(&mut caches) {
            let runs = batch.iter().map(|s| &s.tokens[piece(s)]).zip(caches).collect();
            logits.push(subject.run(runs, Logits::All)?);
        }
        let wanted: Vec<(usize, usize)> = batch
            .iter()
            .enumerate()
            .flat_map(|(i, s)| (0..piece(s).len()).map(move |at| (i, at)))
            .collect();
        let rows: Vec<T> = wanted
            .par_iter()
            .map(|(i, at)| -> Result<T> {
                let mut of_subjects = Vec::with_capacity(subjects.len());
                for (subject, logits) in subjects.iter().zip(&logits) {
                    let width = subject.config().vocab_size;
                    let logits = &logits[*i][at * width..(at + 1) * width];
                    check_finite(logits)?;
                    of_subjects.push(logits);
                }
                Ok(row(first + i, start + at, &of_subjects))
            })
            .collect::<Result<_>>()?;
        for ((i, _), value) in wanted.iter().zip(rows) {
            results[*i].push(value);
        }
    }
    Ok(())
}

fn check_finite(logits: &[f32]) -> Result<()> {
    let likeliest = logits.iter().fold(f32::NEG_INFINITY, |m, l| m.max(*l));
    if likeliest.is_finite() && !logits.iter().any(|l| l.is_nan()) {
        Ok(())
    } else {
        Err(Error::NotFinite)
    }
}
