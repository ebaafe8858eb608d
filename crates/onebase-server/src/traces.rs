//! Spans of requests for an OpenTelemetry collector, by OTLP over HTTP.
//!
//! A request is one span, with children for what it waited for: `load`, where its tenant was not
//! in memory, and for each answer `queue`, `prefill` and `decode`. Names are those of the semantic
//! conventions for generative AI and, for latencies, those that vLLM has beside them. No text of a
//! prompt or an answer is part of it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use axum::extract::{FromRequestParts, Request, State};
use axum::http::StatusCode;
use axum::http::request::Parts;
use axum::middleware::Next;
use axum::response::Response;
use onebase_engine::{Event, Lease, Usage};
use opentelemetry::propagation::TextMapPropagator;
use opentelemetry::trace::{
    Span as _, SpanBuilder, SpanKind, Status, TraceContextExt, TracerProvider,
};
use opentelemetry::{Array, Context, Key, KeyValue, StringValue, Value};
use opentelemetry_http::hyper::HyperClient;
use opentelemetry_http::{Bytes, HeaderExtractor, HttpClient, HttpError};
use opentelemetry_otlp::{SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider, Span};
use tokio::runtime::Handle;

use crate::app::App;

/// How long a collector may take for a batch of spans.
const EXPORT_TIME: Duration = Duration::from_secs(10);

/// How long the last batch may take when the server stops.
const STOP_TIME: Duration = Duration::from_secs(5);

/// What spans are sent as the work of, unless the environment says otherwise.
const SERVICE_NAME: &str = "onebase";

/// How the SDK's name of a service begins that the environment does not name.
const UNNAMED_SERVICE: &str = "unknown_service";

/// Sends spans of requests to a collector.
#[derive(Debug)]
pub struct Traces {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
    counts: Arc<Counts>,
}

/// An address that traces cannot be sent to.
#[derive(Debug, thiserror::Error)]
#[error("traces cannot be sent to {endpoint}: {reason}")]
pub struct TracesError {
    endpoint: String,
    reason: String,
}

/// Batches of spans.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) n_sent: AtomicU64,
    pub(crate) n_failed: AtomicU64,
}

impl Traces {
    /// Sends to `endpoint`, such as `http://localhost:4318/v1/traces`, from the threads of a
    /// runtime. What else the variables of OpenTelemetry's SDKs say holds: `OTEL_SERVICE_NAME`,
    /// `OTEL_RESOURCE_ATTRIBUTES`, `OTEL_TRACES_SAMPLER`, `OTEL_BSP_…`, `OTEL_EXPORTER_OTLP_HEADERS`.
    ///
    /// # Errors
    /// When `endpoint` is not the URL of plain HTTP.
    pub fn to(endpoint: &str, runtime: Handle) -> Result<Self, TracesError> {
        let error = |reason: String| TracesError { endpoint: endpoint.to_owned(), reason };
        if !endpoint.starts_with("http://") {
            let reason = "expected a URL that begins with http://; a collector on this machine \
                          can pass them on by TLS";
            return Err(error(reason.to_owned()));
        }
        let counts = Arc::new(Counts::default());
        let inner = HyperClient::with_default_connector(EXPORT_TIME, None);
        let exporter = SpanExporter::builder()
            .with_http()
            .with_http_client(OnRuntime { inner, runtime, counts: Arc::clone(&counts) })
            .with_timeout(EXPORT_TIME)
            .with_endpoint(endpoint)
            .build()
            .map_err(|e| error(e.to_string()))?;
        let found = Resource::builder().build().get(&Key::new("service.name"));
        let is_named = found.is_some_and(|name| !name.as_str().starts_with(UNNAMED_SERVICE));
        let mut resource = Resource::builder()
            .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")));
        if !is_named {
            resource = resource.with_service_name(SERVICE_NAME);
        }
        let provider = SdkTracerProvider::builder()
            .with_resource(resource.build())
            .with_batch_exporter(exporter)
            .build();
        let tracer = provider.tracer(SERVICE_NAME);
        Ok(Self { provider, tracer, counts })
    }

    /// Sends what is left; none comes after.
    pub fn stop(&self) {
        // What fails is counted.
        let _ = self.provider.shutdown_with_timeout(STOP_TIME);
    }

    pub(crate) fn counts(&self) -> &Counts {
        &self.counts
    }

    fn begin(&self, operation: &'static str, request: &Request) -> Trace {
        let propagator = TraceContextPropagator::new();
        let parent = propagator.extract(&HeaderExtractor(request.headers()));
        let started = Moment::now();
        let attributes = [
            KeyValue::new("gen_ai.operation.name", operation),
            KeyValue::new("gen_ai.provider.name", SERVICE_NAME),
        ];
        let span = SpanBuilder::from_name(operation)
            .with_kind(SpanKind::Server)
            .with_start_time(started.wall)
            .with_attributes(attributes)
            .start_with_context(&self.tracer, &parent);
        let tracer = self.tracer.clone();
        let call = Call {
            tracer,
            span,
            operation,
            started,
            load: None,
            submitted: None,
            answers: BTreeMap::new(),
            n_open: 0,
            has_responded: false,
            is_failed: false,
        };
        Trace(Some(Arc::new(Mutex::new(call))))
    }
}

/// A client whose requests run on a runtime, whatever thread waits for them.
#[derive(Debug)]
struct OnRuntime {
    inner: HyperClient,
    runtime: Handle,
    counts: Arc<Counts>,
}

#[async_trait::async_trait]
impl HttpClient for OnRuntime {
    async fn send_bytes(
        &self,
        request: axum::http::Request<Bytes>,
    ) -> Result<axum::http::Response<Bytes>, HttpError> {
        let inner = self.inner.clone();
        let sent = self.runtime.spawn(async move { inner.send_bytes(request).await }).await?;
        let is_taken = sent.as_ref().is_ok_and(|response| response.status().is_success());
        let count = if is_taken { &self.counts.n_sent } else { &self.counts.n_failed };
        count.fetch_add(1, Ordering::Relaxed);
        sent
    }
}

/// A moment, in the time of this process and of the world.
#[derive(Clone, Copy)]
struct Moment {
    instant: Instant,
    wall: SystemTime,
}

impl Moment {
    fn now() -> Self {
        Self { instant: Instant::now(), wall: SystemTime::now() }
    }

    /// The wall's time at another moment of this process, which no change of clocks moves.
    fn wall_at(self, instant: Instant) -> SystemTime {
        self.wall + instant.saturating_duration_since(self.instant)
    }
}

/// The span of a request, filled in while it is answered; none where traces are not sent. It ends
/// with its last clone.
#[derive(Clone, Default)]
pub(crate) struct Trace(Option<Arc<Mutex<Call>>>);

struct Call {
    tracer: SdkTracer,
    span: Span,
    operation: &'static str,
    started: Moment,
    load: Option<(Instant, Instant)>,
    submitted: Option<Instant>,
    answers: BTreeMap<usize, Answer>,
    n_open: usize,
    has_responded: bool,
    is_failed: bool,
}

#[derive(Default)]
struct Answer {
    queue_time: Duration,
    prompt_done: Option<Instant>,
    first_token: Option<Instant>,
    ended: Option<Instant>,
    finish_reason: Option<&'static str>,
    usage: Usage,
}

impl Trace {
    fn call(&self) -> Option<MutexGuard<'_, Call>> {
        let call = self.0.as_ref()?;
        Some(call.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Says who answers, and how long reading it took.
    pub(crate) fn leased(&self, lease: &Lease, load_time: Option<Duration>) {
        let Some(mut call) = self.call() else { return };
        let (now, name) = (Instant::now(), lease.name().to_owned());
        call.load = load_time.and_then(|time| Some((now.checked_sub(time)?, now)));
        let full_name = format!("{} {name}", call.operation);
        call.span.update_name(full_name);
        call.span.set_attributes([
            KeyValue::new("gen_ai.request.model", name.clone()),
            KeyValue::new("gen_ai.response.model", name.clone()),
            KeyValue::new("onebase.tenant", name),
            KeyValue::new("onebase.generation", number(lease.generation())),
            KeyValue::new("onebase.delta.digest", lease.digest().to_string()),
        ]);
    }

    /// Says that answers were asked for.
    pub(crate) fn submitted(&self, request: &onebase_engine::Request, n_answers: usize) {
        let Some(mut call) = self.call() else { return };
        (call.submitted, call.n_open) = (Some(Instant::now()), n_answers);
        let sampling = request.sampling;
        call.span.set_attributes([
            KeyValue::new("gen_ai.request.max_tokens", number(request.max_new_tokens as u64)),
            KeyValue::new("gen_ai.request.temperature", f64::from(sampling.temperature)),
            KeyValue::new("gen_ai.request.top_p", f64::from(sampling.top_p)),
        ]);
        if n_answers > 1 {
            let n = number(n_answers as u64);
            call.span.set_attribute(KeyValue::new("gen_ai.request.choice.count", n));
        }
    }

    pub(crate) fn take(&self, index: usize, event: &Event) {
        let Some(mut call) = self.call() else { return };
        let now = Instant::now();
        let answer = call.answers.entry(index).or_default();
        match event {
            Event::Prompt { queue_time, .. } => {
                (answer.queue_time, answer.prompt_done) = (*queue_time, Some(now));
            }
            Event::Token { .. } => {
                answer.first_token.get_or_insert(now);
            }
            Event::End { finish_reason, usage, .. } => {
                answer.first_token.get_or_insert(now);
                answer.ended = Some(now);
                answer.finish_reason = Some(finish_reason.name());
                answer.usage = *usage;
                call.n_open -= 1;
            }
            Event::Failed(error) => {
                call.n_open -= 1;
                call.fail("failed", error.to_string());
            }
        }
    }

    fn responded(&self, status: StatusCode) {
        let Some(mut call) = self.call() else { return };
        let code = i64::from(status.as_u16());
        call.span.set_attribute(KeyValue::new("http.response.status_code", code));
        call.has_responded = true;
        // What the client did wrong is no error of a server's span, by the conventions.
        if status.is_server_error() {
            call.fail(status.as_str(), status.canonical_reason().unwrap_or_default().to_owned());
        }
    }
}

impl Call {
    fn fail(&mut self, kind: &str, description: String) {
        if !self.is_failed {
            self.is_failed = true;
            self.span.set_attribute(KeyValue::new("error.type", kind.to_owned()));
            self.span.set_status(Status::error(description));
        }
    }

    fn child(&self, parent: &Context, name: &'static str, index: Option<usize>, at: [Instant; 2]) {
        let [start, end] = at.map(|at| self.started.wall_at(at));
        let index = index.map(|i| KeyValue::new("gen_ai.choice.index", number(i as u64)));
        let builder = SpanBuilder::from_name(name).with_start_time(start).with_attributes(index);
        builder.start_with_context(&self.tracer, parent).end_with_timestamp(end);
    }

    fn children(&self) {
        let own = self.span.span_context().clone();
        let parent = Context::new().with_remote_span_context(own);
        if let Some((start, end)) = self.load {
            self.child(&parent, "load", None, [start, end]);
        }
        let Some(submitted) = self.submitted else { return };
        for (index, answer) in &self.answers {
            let Some(prompt_done) = answer.prompt_done else { continue };
            let begun = (submitted + answer.queue_time).min(prompt_done);
            let index = Some(*index).filter(|_| self.answers.len() > 1);
            self.child(&parent, "queue", index, [submitted, begun]);
            self.child(&parent, "prefill", index, [begun, prompt_done]);
            if let Some(ended) = answer.ended {
                self.child(&parent, "decode", index, [prompt_done, ended]);
            }
        }
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        let now = Instant::now();
        let is_whole = self.has_responded && self.n_open == 0;
        if !is_whole {
            self.fail("cancelled", "the client went away".to_owned());
        }
        self.children();
        let answers = self.answers.values();
        let sum = |count: fn(&Usage) -> usize| {
            number(answers.clone().map(|answer| count(&answer.usage) as u64).sum())
        };
        let reasons = answers.clone().filter_map(|answer| answer.finish_reason);
        let reasons: Vec<StringValue> = reasons.map(StringValue::from).collect();
        let mut attributes = vec![
            KeyValue::new("gen_ai.usage.input_tokens", sum(|usage| usage.prompt_tokens)),
            KeyValue::new("gen_ai.usage.output_tokens", sum(|usage| usage.new_tokens)),
            KeyValue::new("onebase.usage.cached_tokens", sum(|usage| usage.cached_tokens)),
            KeyValue::new("gen_ai.response.finish_reasons", Value::Array(Array::String(reasons))),
            seconds("gen_ai.latency.e2e", now - self.started.instant),
        ];
        if let Some(time) = answers.clone().map(|answer| answer.queue_time).max() {
            attributes.push(seconds("gen_ai.latency.time_in_queue", time));
        }
        if let Some(first) = answers.filter_map(|answer| answer.first_token).min() {
            let time = first - self.started.instant;
            attributes.push(seconds("gen_ai.latency.time_to_first_token", time));
        }
        if self.submitted.is_some() {
            self.span.set_attributes(attributes);
        }
        self.span.end_with_timestamp(self.started.wall_at(now));
    }
}

fn number(n: u64) -> Value {
    Value::I64(i64::try_from(n).unwrap_or(i64::MAX))
}

fn seconds(key: &'static str, time: Duration) -> KeyValue {
    KeyValue::new(key, time.as_secs_f64())
}

impl FromRequestParts<Arc<App>> for Trace {
    type Rejection = std::convert::Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &Arc<App>) -> Result<Self, Self::Rejection> {
        Ok(parts.extensions.get().cloned().unwrap_or_default())
    }
}

/// Begins a span for a request for answers.
pub(crate) async fn traced(
    State(app): State<Arc<App>>,
    mut request: Request,
    next: Next,
) -> Response {
    let Some(traces) = &app.traces else { return next.run(request).await };
    let is_chat = request.uri().path().starts_with("/v1/chat/");
    let trace = traces.begin(if is_chat { "chat" } else { "text_completion" }, &request);
    request.extensions_mut().insert(trace.clone());
    let response = next.run(request).await;
    trace.responded(response.status());
    response
}
