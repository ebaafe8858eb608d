use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use axum::response::sse::{Event as SseEvent, KeepAlive, Sse};
use axum::response::{AppendHeaders, IntoResponse, Response};
use onebase_engine::Event;
use serde_json::{Map, Value};
use tokio_stream::Stream;

use crate::error::ApiError;
use crate::flow::Flow;
use crate::render::{Choice, Head};

/// Answers as server-sent events, a piece at a time.
struct Pieces {
    head: Head,
    flow: Flow,
    choices: Vec<Choice>,
    /// Where the text of each answer has got to, in characters.
    offsets: Vec<usize>,
    ready: VecDeque<String>,
    wants_usage: bool,
    is_done: bool,
}

impl Pieces {
    fn push(&mut self, mut piece: Map<String, Value>) {
        if self.wants_usage {
            piece.entry("usage").or_insert(Value::Null);
        }
        self.ready.push_back(Value::Object(piece).to_string());
    }

    fn take(&mut self, index: usize, event: Event) {
        if let Event::Failed(error) = event {
            // The status is out; clients look for this object.
            self.ready.push_back(ApiError::from(error).object().to_string());
            self.is_done = true;
            return;
        }
        let (choice, offset) = (&mut self.choices[index], &mut self.offsets[index]);
        if let Some(piece) = self.head.piece(index, choice, event, offset) {
            self.push(piece);
        }
    }

    fn close(&mut self) {
        self.is_done = true;
        if self.wants_usage {
            self.push(self.head.closing(&self.choices));
        }
        self.ready.push_back("[DONE]".to_owned());
    }
}

impl Stream for Pieces {
    type Item = Result<SseEvent, Infallible>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        loop {
            if let Some(data) = this.ready.pop_front() {
                return Poll::Ready(Some(Ok(SseEvent::default().data(data))));
            }
            if this.is_done {
                return Poll::Ready(None);
            }
            match this.flow.poll(context) {
                Poll::Ready(Some((index, event))) => this.take(index, event),
                Poll::Ready(None) => this.close(),
                Poll::Pending => return Poll::Pending,
            }
        }
    }
}

/// Says for how many seconds a request has waited for its tenant to be read; absent where the
/// tenant was in memory.
const LOAD_SECONDS: &str = "onebase-load-seconds";

/// The response to a call, all at once or piece by piece.
pub(crate) async fn respond(
    head: Head,
    mut flow: Flow,
    n_choices: usize,
    is_stream: bool,
    wants_usage: bool,
) -> Result<Response, ApiError> {
    flow.begin().await?;
    let load = head.load_time.map(|time| (LOAD_SECONDS, format!("{:.6}", time.as_secs_f64())));
    let load = AppendHeaders(load);
    let mut choices: Vec<Choice> = (0..n_choices).map(|_| Choice::default()).collect();
    if !is_stream {
        while let Some((index, event)) = flow.next().await {
            match event {
                Event::Failed(error) => return Err(error.into()),
                event => head.collect(index, &mut choices[index], event),
            }
        }
        return Ok((load, axum::Json(head.whole(&choices))).into_response());
    }
    let opening = head.opening(n_choices);
    let offsets = vec![0; n_choices];
    let ready = VecDeque::new();
    let mut pieces = Pieces { head, flow, choices, offsets, ready, wants_usage, is_done: false };
    opening.into_iter().for_each(|piece| pieces.push(piece));
    let keep_alive = KeepAlive::default();
    let headers = [("cache-control", "no-cache"), ("x-accel-buffering", "no")];
    Ok((headers, load, Sse::new(pieces).keep_alive(keep_alive)).into_response())
}
