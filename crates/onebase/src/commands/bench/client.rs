//! A client that knows when each byte came.

use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Bytes, Incoming};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;

/// How long a request may take.
const PATIENCE: Duration = Duration::from_secs(600);

/// What became of a request.
#[derive(Clone, Debug)]
pub(super) struct Measured {
    pub(super) model: String,
    /// From when it was due to the first piece of the answer, and to its end; a reason where it
    /// failed.
    pub(super) times: Result<Times, String>,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Times {
    pub(super) first_token: Duration,
    pub(super) whole: Duration,
    pub(super) new_tokens: usize,
    /// How long the server has read the tenant for it.
    pub(super) load: Option<Duration>,
}

#[derive(Debug)]
pub(super) struct Client {
    /// Host and port.
    address: String,
    key: Option<String>,
}

impl Client {
    pub(super) fn new(url: &str, key: Option<&str>) -> anyhow::Result<Self> {
        let Some(rest) = url.strip_prefix("http://") else {
            bail!("{url}: expected an address that begins with http://");
        };
        let host = rest.trim_end_matches('/');
        let host = host.strip_suffix("/v1").unwrap_or(host);
        let has_port = host.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
        let address = if has_port { host.to_owned() } else { format!("{host}:80") };
        Ok(Self { address, key: key.map(str::to_owned) })
    }

    async fn send(
        &self,
        method: &str,
        path: &str,
        body: Option<&Value>,
    ) -> anyhow::Result<Response<Incoming>> {
        let at = || format!("cannot reach {}", self.address);
        let stream = TcpStream::connect(&self.address).await.with_context(at)?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.with_context(at)?;
        // It ends with the answer, or with an error that the answer shows.
        tokio::spawn(connection);
        let mut request = Request::builder().method(method).uri(path).header("host", &self.address);
        if let Some(key) = &self.key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        if body.is_some() {
            request = request.header("content-type", "application/json");
        }
        let bytes = body.map(Value::to_string).unwrap_or_default();
        let request = request.body(Full::new(Bytes::from(bytes)))?;
        sender.send_request(request).await.with_context(at)
    }

    /// The object that a call gives.
    pub(super) async fn call(
        &self,
        method: &str,
        path: &str,
        body: Option<&Value>,
    ) -> anyhow::Result<Value> {
        let response = self.send(method, path, body).await?;
        let status = response.status();
        let bytes = response.into_body().collect().await?.to_bytes();
        let value: Value = serde_json::from_slice(&bytes).unwrap_or_default();
        if !status.is_success() {
            bail!("{path}: {status}: {}", message(&value));
        }
        Ok(value)
    }

    /// Asks for a completion in pieces and takes the times.
    pub(super) async fn measure(&self, model: &str, body: &Value, due: Instant) -> Measured {
        let times = tokio::time::timeout(PATIENCE, self.stream(body, due)).await;
        let times = match times {
            Ok(Ok(times)) => Ok(times),
            Ok(Err(error)) => Err(format!("{error:#}")),
            Err(_) => Err("no end in time".to_owned()),
        };
        Measured { model: model.to_owned(), times }
    }

    async fn stream(&self, body: &Value, due: Instant) -> anyhow::Result<Times> {
        let response = self.send("POST", "/v1/completions", Some(body)).await?;
        let status = response.status();
        let load = response.headers().get("onebase-load-seconds");
        let load = load.and_then(|load| load.to_str().ok()?.parse().ok());
        let load = load.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        let mut body = response.into_body();
        if !status.is_success() {
            let bytes = body.collect().await?.to_bytes();
            let value: Value = serde_json::from_slice(&bytes).unwrap_or_default();
            bail!("{status}: {}", message(&value));
        }
        let (mut rest, mut first_token, mut new_tokens) = (Vec::new(), None, None);
        while let Some(frame) = body.frame().await {
            let Ok(data) = frame?.into_data() else { continue };
            rest.extend_from_slice(&data);
            while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = rest.drain(..=end).collect();
                let Some(data) = line.strip_prefix(b"data: ") else { continue };
                let Ok(value) = serde_json::from_slice::<Value>(data) else { continue };
                if !value["error"].is_null() {
                    bail!("{}", message(&value));
                }
                first_token.get_or_insert_with(|| due.elapsed());
                new_tokens = value["usage"]["completion_tokens"].as_u64().or(new_tokens);
            }
        }
        let (Some(first_token), Some(n)) = (first_token, new_tokens) else {
            bail!("the answer was cut off");
        };
        let new_tokens = usize::try_from(n).unwrap_or(usize::MAX);
        Ok(Times { first_token, whole: due.elapsed(), new_tokens, load })
    }
}

fn message(value: &Value) -> String {
    value["error"]["message"].as_str().unwrap_or("no reason is given").to_owned()
}
