use std::collections::BTreeMap;
use std::time::Duration;

/// Upper bounds of the buckets of every histogram, in seconds.
pub const BUCKETS_SECONDS: [f64; 16] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 300.0,
];

/// How often durations of each size came.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Histogram {
    /// By bucket of [`BUCKETS_SECONDS`], those above all of them last; not added up.
    pub counts: [u64; BUCKETS_SECONDS.len() + 1],
    /// The sum of all, in seconds.
    pub sum_seconds: f64,
}

impl Histogram {
    pub(crate) fn add(&mut self, duration: Duration) {
        let seconds = duration.as_secs_f64();
        let bucket = BUCKETS_SECONDS.iter().position(|bound| seconds <= *bound);
        self.counts[bucket.unwrap_or(BUCKETS_SECONDS.len())] += 1;
        self.sum_seconds += seconds;
    }

    /// How many there were.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }
}

/// What a tenant's requests came to.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TenantMetrics {
    /// Requests that were answered to their end.
    pub n_answered: u64,
    /// Requests that failed.
    pub n_failed: u64,
    /// Requests whose client went away.
    pub n_cancelled: u64,
    /// Tokens of prompts that were run, those that were run again included.
    pub prompt_tokens: u64,
    /// Tokens of prompts that were found in the prefix cache.
    pub cached_tokens: u64,
    /// Tokens of answers.
    pub new_tokens: u64,
    /// From arrival to the first step.
    pub queue_time: Histogram,
    /// From arrival to the first token.
    pub first_token_time: Histogram,
    /// Between tokens of an answer.
    pub token_time: Histogram,
    /// From arrival to the end.
    pub request_time: Histogram,
    /// Requests that wait now.
    pub n_waiting: usize,
    /// Requests that are answered now.
    pub n_running: usize,
}

/// What the engine has done and does.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metrics {
    /// By tenant, the base among them.
    pub tenants: BTreeMap<String, TenantMetrics>,
    /// Steps.
    pub n_steps: u64,
    /// Rows of all steps.
    pub n_rows: u64,
    /// Time in the forward pass.
    pub forward_time: Duration,
    /// Time of steps outside the forward pass.
    pub other_time: Duration,
    /// Requests whose keys and values were dropped for others, to be computed again.
    pub n_preemptions: u64,
    /// Requests that were turned away because the queue was full.
    pub n_rejected: u64,
    /// Positions that are held for requests now.
    pub kv_tokens: usize,
    /// Positions that are held for requests to come.
    pub prefix_tokens: usize,
    /// Positions that can be held.
    pub kv_limit_tokens: usize,
}

impl Metrics {
    /// A tenant's figures, zero where it had no request.
    pub(crate) fn tenant(&mut self, name: &str) -> &mut TenantMetrics {
        self.tenants.entry(name.to_owned()).or_default()
    }

    /// The share of the time of steps that is not spent in the forward pass.
    pub fn overhead(&self) -> f64 {
        let (forward, other) = (self.forward_time.as_secs_f64(), self.other_time.as_secs_f64());
        if forward + other > 0.0 { other / (forward + other) } else { 0.0 }
    }
}
