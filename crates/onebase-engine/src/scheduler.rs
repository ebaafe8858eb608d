use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, TryRecvError};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use onebase_model::{Logits, Segment};
use rayon::ThreadPool;
use rayon::prelude::*;

use crate::metrics::Metrics;
use crate::prefix::{PrefixCache, pages};
use crate::queue::FairQueue;
use crate::registry::Registry;
use crate::sequence::{Outcome, RequestId, Sequence};
use crate::{Error, Result};

/// Fewest tokens of prompts that a step has room for, however many requests decode.
const LEAST_PREFILL: usize = 16;

#[cfg(test)]
mod tests;

/// A token after whose forward pass there is a panic, as a defect would have it.
#[cfg(test)]
const FATAL_TOKEN: u32 = 7;

/// What the scheduler is told.
pub(crate) enum Command {
    Submit(Box<Sequence>),
    Cancel(RequestId),
    CancelAll,
    Stop,
}

/// What bounds the scheduler.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub(crate) max_batch: usize,
    pub(crate) step_tokens: usize,
    pub(crate) kv_tokens: usize,
    pub(crate) queue: usize,
}

/// What others see of the scheduler.
#[derive(Default)]
pub(crate) struct Shared {
    pub(crate) metrics: Mutex<Metrics>,
    /// Requests that have no last event yet.
    pub(crate) n_open: AtomicUsize,
}

impl Shared {
    fn with<T>(&self, act: impl FnOnce(&mut Metrics) -> T) -> T {
        act(&mut self.metrics.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Continuous batching: at every step, requests that decode run one token each and prompts
/// share the rest of the step, all tenants together.
pub(crate) struct Scheduler {
    registry: Arc<Registry>,
    pool: Arc<ThreadPool>,
    limits: Limits,
    shared: Arc<Shared>,
    commands: Receiver<Command>,
    queue: FairQueue,
    /// In the order in which they were admitted.
    running: Vec<Sequence>,
    prefixes: PrefixCache,
    /// Smoothed time that an answer keeps its place.
    seconds_per_answer: f64,
}

/// A sequence's part in a step.
#[derive(Clone, Copy)]
struct Part {
    /// Position among those that run.
    index: usize,
    n_tokens: usize,
    logits: Logits,
}

impl Scheduler {
    pub(crate) fn new(
        registry: Arc<Registry>,
        pool: Arc<ThreadPool>,
        limits: Limits,
        shared: Arc<Shared>,
        commands: Receiver<Command>,
    ) -> Self {
        Self {
            registry,
            pool,
            limits,
            shared,
            commands,
            queue: FairQueue::default(),
            running: Vec::new(),
            prefixes: PrefixCache::default(),
            seconds_per_answer: 1.0,
        }
    }

    /// Runs until it is told to stop, or nobody can tell it anything.
    pub(crate) fn run(mut self) {
        loop {
            if !self.listen() {
                self.close_all(&Error::Draining);
                return;
            }
            let start = Instant::now();
            self.expire(start);
            self.admit();
            let forward_time = self.step();
            if let Some(forward_time) = forward_time {
                let other_time = start.elapsed().saturating_sub(forward_time);
                self.report(forward_time, other_time);
            }
        }
    }

    /// Takes all commands; waits for one where there is nothing to do.
    fn listen(&mut self) -> bool {
        loop {
            let is_idle = self.running.is_empty() && self.queue.len() == 0;
            let command = if is_idle {
                self.show();
                self.commands.recv().map_err(|_| TryRecvError::Disconnected)
            } else {
                self.commands.try_recv()
            };
            match command {
                Ok(Command::Submit(sequence)) => self.enqueue(*sequence),
                Ok(Command::Cancel(id)) => self.cancel(id),
                Ok(Command::CancelAll) => self.close_all(&Error::Draining),
                Ok(Command::Stop) | Err(TryRecvError::Disconnected) => return false,
                Err(TryRecvError::Empty) => return true,
            }
        }
    }

    fn enqueue(&mut self, mut sequence: Sequence) {
        // Those who will be let in at the next step wait for nobody.
        let free = self.limits.max_batch.saturating_sub(self.running.len());
        if self.queue.len() >= self.limits.queue + free {
            let n_waiting = self.queue.len();
            let error = Error::QueueFull { n_waiting, retry_after: self.retry_after() };
            self.shared.with(|metrics| metrics.n_rejected += 1);
            let Some(mut other) = self.queue.displace(sequence.tenant()) else {
                sequence.fail(error);
                self.close();
                return;
            };
            other.fail(error);
            self.close();
        }
        let running: BTreeSet<&str> = self.running.iter().map(Sequence::tenant).collect();
        self.queue.push(sequence, &running);
    }

    /// How long it will take until about half of those who wait have their turn.
    fn retry_after(&self) -> Duration {
        #[allow(clippy::cast_precision_loss)]
        let rounds = self.queue.len() as f64 / 2.0 / self.limits.max_batch as f64;
        Duration::from_secs_f64((rounds * self.seconds_per_answer).clamp(1.0, 60.0))
    }

    /// A request has had its last event.
    fn close(&self) {
        self.shared.n_open.fetch_sub(1, Ordering::AcqRel);
    }

    fn cancel(&mut self, id: RequestId) {
        let running = self.running.iter().position(|s| s.id == id);
        let cancelled = match running {
            Some(index) => Some(self.running.remove(index)),
            None => self.queue.take_one(id),
        };
        if let Some(sequence) = cancelled {
            self.shared.with(|metrics| metrics.tenant(sequence.tenant()).n_cancelled += 1);
            self.close();
        }
    }

    fn close_all(&mut self, error: &Error) {
        let waiting = self.queue.take(|_| true);
        for mut sequence in self.running.drain(..).chain(waiting).collect::<Vec<_>>() {
            self.fail(&mut sequence, error.clone());
        }
    }

    fn fail(&self, sequence: &mut Sequence, error: Error) {
        sequence.fail(error);
        self.shared.with(|metrics| metrics.tenant(sequence.tenant()).n_failed += 1);
        self.close();
    }

    fn expire(&mut self, now: Instant) {
        let mut late = self.queue.take(|sequence| sequence.is_late(now));
        let (out, stay) = self.running.drain(..).partition(|sequence| sequence.is_late(now));
        self.running = stay;
        let out: Vec<Sequence> = out;
        late.extend(out);
        for mut sequence in late {
            self.fail(&mut sequence, Error::Deadline);
        }
    }

    /// Positions that those who run will take with their pending tokens.
    fn held(&self) -> usize {
        self.running.iter().map(|sequence| pages(sequence.tokens.len())).sum()
    }

    /// Lets in those whose turn it is, as long as their prompts fit.
    fn admit(&mut self) {
        while self.running.len() < self.limits.max_batch {
            let Some(next) = self.queue.peek() else { return };
            // One page to grow, or it would be the first to be dropped.
            let needed = pages(next.tokens.len() + 1);
            if !self.running.is_empty() && self.held() + needed > self.limits.kv_tokens {
                return;
            }
            let Some(mut sequence) = self.queue.pop() else { return };
            if sequence.can_take_prefix()
                && let Some(cache) = self.prefixes.find(&sequence.lease, &sequence.tokens)
            {
                sequence.take_prefix(cache);
            }
            self.shared.with(|metrics| sequence.start(metrics));
            self.running.push(sequence);
        }
    }

    /// Makes room for what a step appends: first kept prefixes go, then the youngest.
    fn make_room(&mut self) {
        loop {
            if self.held() + self.prefixes.n_tokens() <= self.limits.kv_tokens {
                return;
            }
            if self.prefixes.evict() {
                continue;
            }
            if self.running.len() <= 1 {
                return;
            }
            let Some(mut youngest) = self.running.pop() else { return };
            youngest.preempt();
            self.shared.with(|metrics| metrics.n_preemptions += 1);
            self.queue.put_back(youngest);
        }
    }

    /// Who runs how much.
    fn plan(&self) -> Vec<Part> {
        let part = |index: usize, room: usize| {
            let (n_tokens, logits) = self.running[index].chunk(room);
            Part { index, n_tokens, logits }
        };
        if let Some(suspect) = self.running.iter().position(|s| s.is_suspect) {
            return vec![part(suspect, self.limits.step_tokens)];
        }
        let (decoding, mut prompts): (Vec<usize>, Vec<usize>) =
            (0..self.running.len()).partition(|index| self.running[*index].is_decoding());
        let mut room = self.limits.step_tokens.saturating_sub(decoding.len()).max(LEAST_PREFILL);
        let mut parts: Vec<Part> = decoding.into_iter().map(|index| part(index, 1)).collect();
        let service = |index: &usize| self.queue.service(self.running[*index].tenant());
        prompts.sort_by(|a, b| service(a).total_cmp(&service(b)).then(a.cmp(b)));
        for index in prompts {
            let part = part(index, room);
            if part.n_tokens > 0 {
                room -= part.n_tokens;
                parts.push(part);
            }
        }
        parts.sort_by_key(|part| part.index);
        parts
    }

    /// Runs one step; gives the time of its forward pass, `None` where nobody runs.
    fn step(&mut self) -> Option<Duration> {
        self.make_room();
        let parts = self.plan();
        if parts.is_empty() {
            return None;
        }
        let start = Instant::now();
        let pool = Arc::clone(&self.pool);
        let forward = catch_unwind(AssertUnwindSafe(|| pool.install(|| self.forward(&parts))));
        let forward_time = start.elapsed();
        match forward {
            Ok(Ok(logits)) => {
                let outcomes = pool.install(|| self.advance(&parts, logits));
                self.settle(&parts, outcomes);
            }
            Ok(Err(error)) => self.suspect(&parts, error),
            Err(_) => self.suspect(&parts, Error::Internal),
        }
        Some(forward_time)
    }

    fn forward(&mut self, parts: &[Part]) -> Result<Vec<Vec<f32>>> {
        let inputs: Vec<Vec<u32>> = parts
            .iter()
            .map(|part| {
                let sequence = &self.running[part.index];
                let first = sequence.cache.n_tokens();
                sequence.tokens[first..first + part.n_tokens].to_vec()
            })
            .collect();
        let mut steps = parts.iter().zip(&inputs).peekable();
        let mut segments = Vec::with_capacity(parts.len());
        for (index, sequence) in self.running.iter_mut().enumerate() {
            if let Some((part, tokens)) = steps.next_if(|(part, _)| part.index == index) {
                let tenant = sequence.lease.weights();
                let (cache, logits) = (&mut sequence.cache, part.logits);
                segments.push(Segment { tokens, tenant, cache, logits });
            }
        }
        let logits = self.registry.model().forward(&mut segments)?;
        #[cfg(test)]
        assert!(!inputs.iter().flatten().any(|token| *token == FATAL_TOKEN), "a fatal token");
        Ok(logits)
    }

    /// Lets every sequence choose its token, side by side; a panic is its own affair.
    fn advance(&mut self, parts: &[Part], logits: Vec<Vec<f32>>) -> Vec<(usize, Outcome)> {
        let mut steps = parts.iter().zip(logits).peekable();
        let mut work = Vec::with_capacity(parts.len());
        for (index, sequence) in self.running.iter_mut().enumerate() {
            if let Some((part, logits)) = steps.next_if(|(part, _)| part.index == index) {
                work.push((sequence, part.n_tokens, logits));
            }
        }
        let one = |(sequence, n_tokens, logits): (&mut Sequence, usize, Vec<f32>)| {
            let n_new = sequence.n_new();
            sequence.is_suspect = false;
            let advance = AssertUnwindSafe(|| sequence.advance(n_tokens, logits));
            let outcome = catch_unwind(advance).unwrap_or_else(|_| {
                // The sink may be what has panicked.
                let _ = catch_unwind(AssertUnwindSafe(|| sequence.fail(Error::Internal)));
                Outcome::Failed
            });
            (n_new, outcome)
        };
        work.into_par_iter().with_max_len(1).map(one).collect()
    }

    /// Counts the step and lets go of those who have ended.
    fn settle(&mut self, parts: &[Part], outcomes: Vec<(usize, Outcome)>) {
        let mut ended = Vec::new();
        let shared = Arc::clone(&self.shared);
        shared.with(|metrics| {
            for (part, (n_new, outcome)) in parts.iter().zip(outcomes) {
                let sequence = &mut self.running[part.index];
                sequence.account(part.n_tokens, n_new, &outcome, metrics);
                let chosen = sequence.n_new() - n_new;
                // A step of decoding runs the token that was chosen, and counted, before.
                let of_prompt = if part.n_tokens == chosen { 0 } else { part.n_tokens };
                self.queue.serve(sequence.tenant(), of_prompt, chosen);
                metrics.n_rows += part.n_tokens as u64;
                match outcome {
                    Outcome::Continues => {}
                    Outcome::Ended | Outcome::Unheard => ended.push((part.index, true)),
                    Outcome::Failed => ended.push((part.index, false)),
                }
            }
        });
        for (index, is_sound) in ended.into_iter().rev() {
            let sequence = self.running.remove(index);
            let seconds = sequence.place_time().as_secs_f64();
            self.seconds_per_answer += 0.1 * (seconds - self.seconds_per_answer);
            self.close();
            if is_sound {
                let Sequence { lease, tokens, cache, .. } = sequence;
                self.prefixes.keep(&lease, &tokens, cache);
            }
        }
    }

    /// A step has failed as a whole. Where several took part, each is tried alone; one that
    /// fails alone is the culprit.
    fn suspect(&mut self, parts: &[Part], error: Error) {
        if let [part] = parts {
            let mut culprit = self.running.remove(part.index);
            self.fail(&mut culprit, error);
            return;
        }
        for part in parts {
            let sequence = &mut self.running[part.index];
            // What the step has left in its keys and values is not known.
            sequence.preempt();
            sequence.is_suspect = true;
        }
    }

    fn report(&mut self, forward_time: Duration, other_time: Duration) {
        self.shared.with(|metrics| {
            metrics.n_steps += 1;
            metrics.forward_time += forward_time;
            metrics.other_time += other_time;
        });
        self.show();
    }

    /// Publishes what there is now, and forgets prefixes of generations that are gone.
    fn show(&mut self) {
        self.prefixes.retain(|name, generation| self.registry.serves(name, generation));
        let (kv_tokens, prefix_tokens) = (self.held(), self.prefixes.n_tokens());
        self.shared.with(|metrics| {
            for tenant in metrics.tenants.values_mut() {
                (tenant.n_waiting, tenant.n_running) = (0, 0);
            }
            for (name, n) in self.queue.lengths() {
                metrics.tenant(name).n_waiting = n;
            }
            for sequence in &self.running {
                metrics.tenant(sequence.tenant()).n_running += 1;
            }
            metrics.kv_tokens = kv_tokens;
            metrics.prefix_tokens = prefix_tokens;
            metrics.kv_limit_tokens = self.limits.kv_tokens;
        });
    }
}
