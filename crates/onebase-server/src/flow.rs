use std::collections::VecDeque;
use std::task::{Context, Poll};

use onebase_engine::{Event, Lease, Request, Ticket};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use crate::app::App;
use crate::auth::Caller;
use crate::error::ApiError;
use crate::traces::Trace;

/// The events of a call's answers, each with the number of its answer. Dropping it cancels
/// what is not answered yet.
///
/// What a client does not read is kept here: at most the tokens of its answers.
pub(crate) struct Flow {
    tickets: Vec<Ticket>,
    events: UnboundedReceiver<(usize, Event)>,
    /// Taken already, to know whether there is an answer at all.
    early: VecDeque<(usize, Event)>,
    caller: Caller,
    trace: Trace,
    n_open: usize,
}

impl Flow {
    /// Hands in all requests; refuses all where one is refused.
    pub(crate) fn start(
        app: &App,
        lease: &Lease,
        requests: Vec<Request>,
        caller: Caller,
        trace: Trace,
    ) -> Result<Self, ApiError> {
        let (sender, events) = unbounded_channel();
        let n_open = requests.len();
        if let Some(request) = requests.first() {
            trace.submitted(request, n_open);
        }
        let mut tickets = Vec::with_capacity(n_open);
        for (index, request) in requests.into_iter().enumerate() {
            let sender = sender.clone();
            let sink = Box::new(move |event| sender.send((index, event)).is_ok());
            tickets.push(app.engine.submit(lease.clone(), request, sink)?);
        }
        Ok(Self { tickets, events, early: VecDeque::new(), caller, trace, n_open })
    }

    /// Waits until the first answer has begun, so that what is refused by then is refused with
    /// a status of its own.
    pub(crate) async fn begin(&mut self) -> Result<(), ApiError> {
        match self.events.recv().await {
            Some((index, event)) => {
                self.trace.take(index, &event);
                if let Event::Failed(error) = event {
                    return Err(error.into());
                }
                self.early.push_back((index, event));
                Ok(())
            }
            None => Err(onebase_engine::Error::Internal.into()),
        }
    }

    /// The next event; `None` when all answers have ended.
    pub(crate) fn poll(&mut self, context: &mut Context<'_>) -> Poll<Option<(usize, Event)>> {
        let event = match self.early.pop_front() {
            Some(event) => event,
            None if self.n_open == 0 => return Poll::Ready(None),
            None => match self.events.poll_recv(context) {
                Poll::Ready(Some((index, event))) => {
                    self.trace.take(index, &event);
                    (index, event)
                }
                Poll::Ready(None) => return Poll::Ready(None),
                Poll::Pending => return Poll::Pending,
            },
        };
        match &event.1 {
            Event::End { usage, .. } => {
                self.n_open -= 1;
                self.caller.spend(usage.prompt_tokens + usage.new_tokens);
            }
            Event::Failed(_) => self.n_open -= 1,
            Event::Prompt { .. } | Event::Token { .. } => {}
        }
        if self.n_open == 0 {
            self.tickets.clear();
        }
        Poll::Ready(Some(event))
    }

    pub(crate) async fn next(&mut self) -> Option<(usize, Event)> {
        std::future::poll_fn(|context| self.poll(context)).await
    }
}
