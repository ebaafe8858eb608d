use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::SystemTime;

use axum::extract::State;
use axum::http::header;
use axum::response::IntoResponse;
use onebase_engine::{BUCKETS_SECONDS, Histogram, TenantMetrics};

use crate::app::App;

/// Prometheus' text format, version 0.0.4.
const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// A figure that every tenant has.
type Figure = (&'static str, &'static str, &'static str, fn(&TenantMetrics) -> u64);

const FIGURES: [Figure; 8] = [
    ("onebase_requests_answered_total", "counter", "Requests answered to their end", |t| {
        t.n_answered
    }),
    ("onebase_requests_failed_total", "counter", "Requests that failed", |t| t.n_failed),
    ("onebase_requests_cancelled_total", "counter", "Requests whose client went away", |t| {
        t.n_cancelled
    }),
    ("onebase_prompt_tokens_total", "counter", "Tokens of prompts that were run", |t| {
        t.prompt_tokens
    }),
    (
        "onebase_cached_tokens_total",
        "counter",
        "Tokens of prompts found in the prefix cache",
        |t| t.cached_tokens,
    ),
    ("onebase_new_tokens_total", "counter", "Tokens of answers", |t| t.new_tokens),
    ("onebase_requests_waiting", "gauge", "Requests that wait", |t| t.n_waiting as u64),
    ("onebase_requests_running", "gauge", "Requests that are being answered", |t| {
        t.n_running as u64
    }),
];

/// Durations that every tenant has.
type Durations = (&'static str, &'static str, fn(&TenantMetrics) -> &Histogram);

const DURATIONS: [Durations; 4] = [
    ("onebase_queue_seconds", "From arrival to the first step", |t| &t.queue_time),
    ("onebase_first_token_seconds", "From arrival to the first token", |t| &t.first_token_time),
    ("onebase_token_seconds", "Between tokens of an answer", |t| &t.token_time),
    ("onebase_request_seconds", "From arrival to the end", |t| &t.request_time),
];

/// `GET /metrics`
pub(crate) async fn metrics(State(app): State<Arc<App>>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, CONTENT_TYPE)], text(&app))
}

fn head(out: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(out, "# HELP {name} {help}.\n# TYPE {name} {kind}");
}

fn text(app: &App) -> String {
    let metrics = app.engine.metrics();
    let mut out = String::new();
    for (name, kind, help, value) in FIGURES {
        head(&mut out, name, kind, help);
        for (tenant, figures) in &metrics.tenants {
            let _ = writeln!(out, "{name}{{tenant=\"{tenant}\"}} {}", value(figures));
        }
    }
    for (name, help, histogram) in DURATIONS {
        head(&mut out, name, "histogram", help);
        for (tenant, figures) in &metrics.tenants {
            write_histogram(&mut out, name, tenant, histogram(figures));
        }
    }
    let plain = [
        ("onebase_steps_total", "counter", "Steps", metrics.n_steps as f64),
        ("onebase_rows_total", "counter", "Tokens that steps ran", metrics.n_rows as f64),
        (
            "onebase_forward_seconds_total",
            "counter",
            "Time in the forward pass",
            metrics.forward_time.as_secs_f64(),
        ),
        (
            "onebase_other_seconds_total",
            "counter",
            "Time of steps outside the forward pass",
            metrics.other_time.as_secs_f64(),
        ),
        (
            "onebase_preemptions_total",
            "counter",
            "Requests whose keys and values were dropped for others",
            metrics.n_preemptions as f64,
        ),
        (
            "onebase_rejected_total",
            "counter",
            "Requests turned away because the queue was full",
            metrics.n_rejected as f64,
        ),
        ("onebase_kv_tokens", "gauge", "Positions held for requests", metrics.kv_tokens as f64),
        (
            "onebase_prefix_tokens",
            "gauge",
            "Positions held for requests to come",
            metrics.prefix_tokens as f64,
        ),
        (
            "onebase_kv_limit_tokens",
            "gauge",
            "Positions that can be held",
            metrics.kv_limit_tokens as f64,
        ),
        (
            "onebase_delta_bytes",
            "gauge",
            "Bytes of all tenants in memory",
            app.engine.registry().resident_bytes() as f64,
        ),
        (
            "onebase_delta_limit_bytes",
            "gauge",
            "Bytes that all tenants may take",
            app.engine.registry().limit_bytes() as f64,
        ),
    ];
    for (name, kind, help, value) in plain {
        head(&mut out, name, kind, help);
        let _ = writeln!(out, "{name} {value}");
    }
    if let Some(traces) = app.traces() {
        let name = "onebase_trace_batches_total";
        head(&mut out, name, "counter", "Batches of spans, by whether the collector took them");
        let counts = traces.counts();
        for (outcome, n) in [("sent", &counts.n_sent), ("failed", &counts.n_failed)] {
            let n = n.load(Ordering::Relaxed);
            let _ = writeln!(out, "{name}{{outcome=\"{outcome}\"}} {n}");
        }
    }
    write_tenants(&mut out, app);
    write_adapters(&mut out, &metrics.tenants, app);
    out
}

fn write_histogram(out: &mut String, name: &str, tenant: &str, histogram: &Histogram) {
    let mut sum = 0;
    for (bound, count) in BUCKETS_SECONDS.iter().zip(histogram.counts) {
        sum += count;
        let _ = writeln!(out, "{name}_bucket{{tenant=\"{tenant}\",le=\"{bound}\"}} {sum}");
    }
    let count = histogram.count();
    let _ = writeln!(out, "{name}_bucket{{tenant=\"{tenant}\",le=\"+Inf\"}} {count}");
    let _ = writeln!(out, "{name}_sum{{tenant=\"{tenant}\"}} {}", histogram.sum_seconds);
    let _ = writeln!(out, "{name}_count{{tenant=\"{tenant}\"}} {count}");
}

fn write_tenants(out: &mut String, app: &App) {
    let list = app.engine.registry().list();
    head(out, "onebase_tenant_loads_total", "counter", "How often a tenant was read");
    for tenant in &list {
        let (name, n) = (&tenant.desired.name, tenant.n_loads);
        let _ = writeln!(out, "onebase_tenant_loads_total{{tenant=\"{name}\"}} {n}");
    }
    head(out, "onebase_tenant_evictions_total", "counter", "How often a tenant made room");
    for tenant in &list {
        let (name, n) = (&tenant.desired.name, tenant.n_evictions);
        let _ = writeln!(out, "onebase_tenant_evictions_total{{tenant=\"{name}\"}} {n}");
    }
    head(out, "onebase_tenant_resident_bytes", "gauge", "Bytes of a tenant in memory");
    for tenant in &list {
        let (name, n) = (&tenant.desired.name, tenant.resident_bytes.unwrap_or(0));
        let _ = writeln!(out, "onebase_tenant_resident_bytes{{tenant=\"{name}\"}} {n}");
    }
}

/// The gauge by which routers that know adapters choose a server: names are lists, the value is
/// the time of the reading.
fn write_adapters(
    out: &mut String,
    tenants: &std::collections::BTreeMap<String, TenantMetrics>,
    app: &App,
) {
    let names = |has: fn(&TenantMetrics) -> bool| {
        let base = app.engine.registry().base().name();
        let names = tenants.iter().filter(|(name, t)| name.as_str() != base && has(t));
        names.map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(",")
    };
    let list = app.engine.registry().list();
    let most = list.iter().filter(|tenant| tenant.resident_bytes.is_some()).count();
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let now = now.map_or(0.0, |now| now.as_secs_f64());
    head(out, "vllm:lora_requests_info", "gauge", "Running stats on lora requests");
    let _ = writeln!(
        out,
        "vllm:lora_requests_info{{max_lora=\"{most}\",running_lora_adapters=\"{}\",\
         waiting_lora_adapters=\"{}\"}} {now}",
        names(|t| t.n_running > 0),
        names(|t| t.n_waiting > 0),
    );
}
