use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use onebase_model::{KvCache, Model};

use crate::metrics::Metrics;
use crate::prefix::{pages, whole_pages};
use crate::registry::{Lease, Registry};
use crate::request::{Request, Sink};
use crate::scheduler::{Command, Limits, Scheduler, Shared};
use crate::sequence::{RequestId, Sequence};
use crate::{Error, Result};

/// How an engine is set up.
#[derive(Clone, Debug)]
pub struct Options {
    /// The name under which the base answers.
    pub base_name: String,
    /// Threads of the forward pass; 0 for one per core.
    pub threads: usize,
    /// Most requests that are answered at once.
    pub max_batch: usize,
    /// Most tokens that a step runs.
    pub step_tokens: usize,
    /// Most bytes of keys and values, those kept for later requests included.
    pub kv_bytes: usize,
    /// Most bytes of tenants' weights in memory.
    pub delta_bytes: usize,
    /// Most requests that wait.
    pub queue: usize,
}

/// Answers requests of many tenants on one base.
pub struct Engine {
    registry: Arc<Registry>,
    shared: Arc<Shared>,
    commands: Sender<Command>,
    limits: Limits,
    next_id: AtomicU64,
    is_draining: AtomicBool,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine").field("limits", &self.limits).finish_non_exhaustive()
    }
}

/// A request on its way; dropping it cancels the request.
#[derive(Debug)]
pub struct Ticket {
    id: RequestId,
    commands: Sender<Command>,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        // After the last event nobody knows the request any more, which is as well.
        let _ = self.commands.send(Command::Cancel(self.id));
    }
}

impl Engine {
    /// Starts the threads; there are no tenants yet.
    ///
    /// # Errors
    /// When the base has no tokenizer or does not run, or threads cannot be started.
    pub fn start(model: Model, options: &Options) -> Result<Self> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(options.threads).build();
        let pool = Arc::new(pool.map_err(|e| Error::Threads(Arc::new(e)))?);
        let bytes_per_token = KvCache::bytes_per_token(model.config()).max(1);
        let model = Arc::new(model);
        let (name, limit) = (options.base_name.as_str(), options.delta_bytes);
        let registry = pool.install(|| Registry::new(model, name, limit))?;
        let limits = Limits {
            max_batch: options.max_batch.max(1),
            step_tokens: options.step_tokens.max(1),
            kv_tokens: whole_pages(options.kv_bytes / bytes_per_token),
            queue: options.queue.max(1),
        };
        let shared = Arc::new(Shared::default());
        let (commands, receiver) = channel();
        let scheduler =
            Scheduler::new(Arc::clone(&registry), pool, limits, Arc::clone(&shared), receiver);
        let builder = std::thread::Builder::new().name("scheduler".to_owned());
        let thread = builder.spawn(|| scheduler.run());
        let thread = thread.map_err(|e| Error::Threads(Arc::new(e)))?;
        Ok(Self {
            registry,
            shared,
            commands,
            limits,
            next_id: AtomicU64::new(0),
            is_draining: AtomicBool::new(false),
            thread: Mutex::new(Some(thread)),
        })
    }

    /// The tenants.
    pub fn registry(&self) -> &Arc<Registry> {
        &self.registry
    }

    /// Hands in a request for a voice; `sink` gets what happens to it.
    ///
    /// # Errors
    /// When the request is refused as it is, or no more are taken; there are no events then.
    pub fn submit(&self, lease: Lease, request: Request, sink: Sink) -> Result<Ticket> {
        if self.is_draining() {
            return Err(Error::Draining);
        }
        let config = lease.config();
        request.check(config.vocab_size, config.context_tokens)?;
        let n_tokens = request.prompt.len() + request.max_new_tokens;
        let limit = self.limits.kv_tokens;
        if pages(n_tokens) > limit {
            return Err(Error::KvTooSmall { n_tokens, limit });
        }
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let sequence = Sequence::new(id, lease, request, sink);
        self.shared.n_open.fetch_add(1, Ordering::AcqRel);
        if self.commands.send(Command::Submit(Box::new(sequence))).is_err() {
            self.shared.n_open.fetch_sub(1, Ordering::AcqRel);
            return Err(Error::Draining);
        }
        Ok(Ticket { id, commands: self.commands.clone() })
    }

    /// What was done so far.
    pub fn metrics(&self) -> Metrics {
        self.shared.metrics.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Positions that one request can take at most.
    pub fn kv_tokens(&self) -> usize {
        self.limits.kv_tokens
    }

    /// Requests that have no last event yet.
    pub fn n_open(&self) -> usize {
        self.shared.n_open.load(Ordering::Acquire)
    }

    /// Whether no more requests are taken.
    pub fn is_draining(&self) -> bool {
        self.is_draining.load(Ordering::Acquire)
    }

    /// Whether requests are taken and answered.
    pub fn is_serving(&self) -> bool {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        !self.is_draining() && thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }

    /// Takes no more requests and waits until those that are there are answered, for so long;
    /// then the rest fail. Whether none had to.
    pub fn drain(&self, patience: Duration) -> bool {
        self.is_draining.store(true, Ordering::Release);
        let until = Instant::now() + patience;
        while self.n_open() > 0 && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(10));
        }
        let is_clean = self.n_open() == 0;
        let _ = self.commands.send(Command::CancelAll);
        is_clean
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let _ = self.commands.send(Command::Stop);
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            // A panic there was told where it happened.
            let _ = thread.join();
        }
    }
}
