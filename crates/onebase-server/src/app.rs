use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use onebase_engine::{Constraint, Engine, Lease};
use serde_json::Value;
use tokio::sync::Semaphore;

use crate::auth::{Caller, Keys};
use crate::error::ApiError;
use crate::state_file::StateFile;
use crate::structured::Grammars;
use crate::traces::Traces;

/// Requests that may wait for a tenant to be read from disk at once.
const COLD_REQUESTS: usize = 256;

/// What a server takes and how long it waits.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Most bytes of a request's body.
    pub body_bytes: usize,
    /// Until a request's body has come.
    pub body_time: Duration,
    /// Most tokens of an answer, and what an answer gets that asks for no number.
    pub answer_tokens: usize,
    /// From a request's arrival to its end.
    pub request_time: Duration,
    /// Until a tenant is in memory.
    pub load_time: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            body_bytes: 8 << 20,
            body_time: Duration::from_secs(30),
            answer_tokens: 4096,
            request_time: Duration::from_secs(600),
            load_time: Duration::from_secs(120),
        }
    }
}

/// What the routes share.
#[derive(Debug)]
pub struct App {
    /// The engine.
    pub(crate) engine: Engine,
    pub(crate) keys: Keys,
    pub(crate) limits: Limits,
    /// Where the tenants to serve are kept.
    pub(crate) state: Option<StateFile>,
    /// The folder that relative sources of tenants begin at.
    pub(crate) deltas: Option<PathBuf>,
    /// Seconds since 1970, when it was started.
    pub(crate) created: u64,
    pub(crate) grammars: Arc<Grammars>,
    pub(crate) traces: Option<Traces>,
    cold: Arc<Semaphore>,
}

impl App {
    /// An app over an engine. Relative paths of artifacts begin at `deltas`.
    pub fn new(
        engine: Engine,
        keys: Keys,
        limits: Limits,
        state: Option<StateFile>,
        deltas: Option<PathBuf>,
    ) -> Self {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let created = now.map_or(0, |now| now.as_secs());
        let cold = Arc::new(Semaphore::new(COLD_REQUESTS));
        let grammars = Arc::default();
        Self { engine, keys, limits, state, deltas, created, grammars, traces: None, cold }
    }

    /// Sends spans of its requests.
    pub fn set_traces(&mut self, traces: Traces) {
        self.traces = Some(traces);
    }

    /// Where spans of its requests are sent.
    pub fn traces(&self) -> Option<&Traces> {
        self.traces.as_ref()
    }

    /// The engine.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// The right to answer as a model, which the caller may ask once more, and how long it took to read
    /// it, where it was not in memory.
    pub(crate) async fn lease(
        self: &Arc<Self>,
        caller: &Caller,
        model: &str,
    ) -> Result<(Lease, Option<Duration>), ApiError> {
        if !caller.may_ask(model) {
            return Err(ApiError::no_model(model));
        }
        caller.begin()?;
        if self.engine.is_draining() {
            return Err(onebase_engine::Error::Draining.into());
        }
        if let Some(lease) = self.engine.registry().resident(model)? {
            return Ok((lease, None));
        }
        let Ok(permit) = Arc::clone(&self.cold).try_acquire_owned() else {
            let message = "too many requests wait for models to be read";
            return Err(ApiError::too_many(message, Duration::from_secs(2)));
        };
        let (app, model) = (Arc::clone(self), model.to_owned());
        let start = Instant::now();
        let until = start + self.limits.load_time;
        self.blocking(move || {
            let _permit = permit;
            let lease = app.engine.registry().lease(&model, until)?;
            Ok((lease, Some(start.elapsed())))
        })
        .await
    }

    /// What keeps `n` answers to a schema, where there is one.
    pub(crate) async fn constraints(
        &self,
        lease: &Lease,
        schema: Option<Value>,
        n: usize,
    ) -> Result<Vec<Option<Box<dyn Constraint>>>, ApiError> {
        let Some(schema) = schema else { return Ok((0..n).map(|_| None).collect()) };
        let (lease, grammars) = (lease.clone(), Arc::clone(&self.grammars));
        self.blocking(move || {
            let constraints = grammars.constraints(&lease, schema, n)?;
            Ok(constraints.into_iter().map(Some).collect())
        })
        .await
    }

    /// Runs what takes a processor or a disk on a thread where that stops no other request.
    pub(crate) async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let done = tokio::task::spawn_blocking(work).await;
        done.unwrap_or_else(|_| Err(onebase_engine::Error::Internal.into()))
    }

    /// Names base and delta of an answer.
    pub(crate) fn fingerprint(&self, lease: &Lease) -> String {
        let base = self.engine.registry().base().digest().to_string();
        let delta =
            lease.weights().map_or_else(|| "base".to_owned(), |_| lease.digest().to_string());
        format!("fp_{}_{}", &base[..12], &delta[..delta.len().min(12)])
    }
}
