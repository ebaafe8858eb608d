//! Spans, as a collector gets them.

use std::collections::BTreeMap;
use std::io::BufRead as _;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Bytes;
use axum::routing::post;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::KeyValue;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message as _;
use serde_json::json;

use crate::support::{QUESTION, Server, app, engine, options, until};
use onebase_server::{Listen, Traces};

const TRACE_ID: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const PARENT_ID: &str = "00f067aa0ba902b7";

/// What came, and the runtime that it comes to.
struct Collector {
    requests: Arc<Mutex<Vec<ExportTraceServiceRequest>>>,
    runtime: tokio::runtime::Runtime,
    url: String,
}

impl Collector {
    fn start() -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.unwrap();
        let requests: Arc<Mutex<Vec<_>>> = Arc::default();
        let kept = Arc::clone(&requests);
        let take = move |body: Bytes| async move {
            kept.lock().unwrap().push(ExportTraceServiceRequest::decode(body).unwrap());
        };
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let url = format!("http://{}/v1/traces", listener.local_addr().unwrap());
        let routes = Router::new().route("/v1/traces", post(take));
        runtime.spawn(async move { axum::serve(listener, routes).await });
        Self { requests, runtime, url }
    }

    fn spans(&self) -> Vec<Span> {
        let requests = self.requests.lock().unwrap();
        let resources = requests.iter().flat_map(|request| &request.resource_spans);
        resources.flat_map(|r| &r.scope_spans).flat_map(|s| &s.spans).cloned().collect()
    }
}

fn attributes(list: &[KeyValue]) -> BTreeMap<&str, String> {
    let text = |value: &Value| match value {
        Value::StringValue(text) => text.clone(),
        Value::IntValue(n) => n.to_string(),
        Value::DoubleValue(n) => n.to_string(),
        other => format!("{other:?}"),
    };
    let text = |one: &KeyValue| one.value.as_ref().and_then(|v| v.value.as_ref().map(text));
    list.iter().map(|one| (one.key.as_str(), text(one).unwrap_or_default())).collect()
}

fn hex(id: &[u8]) -> String {
    id.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn requests_are_spans_that_name_their_tenant() {
    let collector = Collector::start();
    let traces = Traces::to(&collector.url, collector.runtime.handle().clone()).unwrap();
    let mut app = app(engine(&options()));
    app.set_traces(traces);
    let server = Server::start(app, Listen::default());
    // A client that goes away in the middle of its answer; its span has ended when the others have.
    let long = json!({"model": "base", "prompt": QUESTION, "max_tokens": 900, "stream": true,
                      "ignore_eos": true});
    let mut opened = server.open("POST", "/v1/completions", None, Some(&long.to_string()));
    opened.reader.read_line(&mut String::new()).unwrap();
    drop(opened);
    until("a request is cancelled", || {
        let metrics = server.app.engine().metrics();
        metrics.tenants.get("base").is_some_and(|base| base.n_cancelled == 1)
    });
    let body = json!({"model": "math", "prompt": QUESTION, "max_tokens": 5, "n": 2,
                      "temperature": 0, "ignore_eos": true})
    .to_string();
    let head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\
                content-type: application/json";
    let length = body.len();
    server
        .raw(&format!(
            "{head}\r\ntraceparent: 00-{TRACE_ID}-{PARENT_ID}-01\r\n\
             content-length: {length}\r\n\r\n{body}"
        ))
        .read()
        .ok();
    let chat = json!({"model": "chat", "messages": [{"role": "user", "content": "a secret"}],
                      "max_tokens": 3, "stream": true});
    server.post("/v1/chat/completions", &chat).pieces();
    let unknown = json!({"model": "nobody", "prompt": QUESTION});
    server.post("/v1/completions", &unknown).refused(404);
    server.app.traces().unwrap().stop();
    let metrics = server.get("/metrics").body;
    assert!(metrics.contains("onebase_trace_batches_total{outcome=\"sent\"} 1\n"), "{metrics}");
    let spans = collector.spans();
    let requests = collector.requests.lock().unwrap();
    let resource = requests[0].resource_spans[0].resource.as_ref().unwrap();
    assert_eq!(attributes(&resource.attributes)["service.name"], "onebase");
    assert!(!format!("{requests:?}").contains("secret"), "no text of a prompt");

    let of = |name: &str| spans.iter().find(|span| span.name == name).unwrap();
    let math = of("text_completion math");
    assert_eq!([hex(&math.trace_id), hex(&math.parent_span_id)], [TRACE_ID, PARENT_ID]);
    let told = attributes(&math.attributes);
    let generation = server.get("/v1/models/math").ok()["onebase"]["generation"].to_string();
    for (key, want) in [
        ("gen_ai.operation.name", "text_completion"),
        ("gen_ai.request.model", "math"),
        ("onebase.tenant", "math"),
        ("onebase.generation", &generation),
        ("gen_ai.request.max_tokens", "5"),
        ("gen_ai.request.choice.count", "2"),
        ("gen_ai.usage.output_tokens", "10"),
        ("http.response.status_code", "200"),
    ] {
        assert_eq!(told.get(key).map(String::as_str), Some(want), "{key}");
    }
    let number = |key: &str| told[key].parse::<f64>().unwrap();
    let first = number("gen_ai.latency.time_to_first_token");
    assert!(0.0 < first && first <= number("gen_ai.latency.e2e"));
    // What a request waited for adds up to no more than the request.
    let children: Vec<&Span> =
        spans.iter().filter(|span| span.parent_span_id == math.span_id).collect();
    let mut names: Vec<&str> = children.iter().map(|span| span.name.as_str()).collect();
    names.sort_unstable();
    assert_eq!(names, ["decode", "decode", "prefill", "prefill", "queue", "queue"]);
    for span in children {
        assert_eq!(hex(&span.trace_id), TRACE_ID);
        assert!(math.start_time_unix_nano <= span.start_time_unix_nano);
        assert!(span.start_time_unix_nano <= span.end_time_unix_nano);
        assert!(span.end_time_unix_nano <= math.end_time_unix_nano);
    }

    let chat = of("chat chat");
    assert!(chat.parent_span_id.is_empty());
    assert_eq!(attributes(&chat.attributes)["onebase.tenant"], "chat");
    let refused = of("text_completion");
    assert_eq!(attributes(&refused.attributes)["http.response.status_code"], "404");
    assert_eq!(refused.status.as_ref().map_or(0, |status| status.code), 0, "the client's error");
    let left = of("text_completion base");
    assert_eq!(attributes(&left.attributes)["error.type"], "cancelled");
    // An error, by the protocol's number.
    assert_eq!(left.status.as_ref().unwrap().code, 2);
}

#[test]
fn what_is_no_plain_url_is_refused() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    for bad in ["", "localhost:4318", "https://collector:4318/v1/traces", "http://"] {
        let error = Traces::to(bad, runtime.handle().clone()).unwrap_err().to_string();
        assert!(error.contains(&format!("to {bad}:")), "{error}");
    }
}
