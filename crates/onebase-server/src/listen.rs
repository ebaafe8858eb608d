use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{Instant, Sleep, sleep, timeout};

use crate::app::App;
use crate::routes::router;

/// How a server listens and stops.
#[derive(Clone, Copy, Debug)]
pub struct Listen {
    /// Most connections at once; more wait until one is closed.
    pub max_connections: usize,
    /// How long a connection may take to send the head of a request, also of the next one.
    pub head_time: Duration,
    /// How long a client may take no byte of an answer.
    pub write_time: Duration,
    /// How long requests are waited for when the server stops.
    pub drain_time: Duration,
}

impl Default for Listen {
    fn default() -> Self {
        Self {
            max_connections: 16_384,
            head_time: Duration::from_secs(20),
            write_time: Duration::from_secs(60),
            drain_time: Duration::from_secs(30),
        }
    }
}

/// Answers on a listener until `stop` is ready, then takes no more requests and ends when those
/// that are there are answered. Whether none had to be cut off.
///
/// A client that leaves a connection open, sends half a head or stops reading is closed in time.
pub async fn serve(
    listener: TcpListener,
    app: Arc<App>,
    listen: Listen,
    stop: impl Future<Output = ()>,
) -> bool {
    let routes = router(Arc::clone(&app));
    let connections = Arc::new(Semaphore::new(listen.max_connections.max(1)));
    let graceful = GracefulShutdown::new();
    let mut stop = std::pin::pin!(stop);
    loop {
        let accepted = async {
            let permit = Arc::clone(&connections).acquire_owned().await;
            (listener.accept().await, permit)
        };
        let (accepted, permit) = tokio::select! {
            accepted = accepted => accepted,
            () = &mut stop => break,
        };
        let Ok((stream, _)) = accepted else {
            // Of one connection, or out of file descriptors: others end meanwhile.
            sleep(Duration::from_millis(20)).await;
            continue;
        };
        // Pieces of an answer are small and are to be seen at once.
        let _ = stream.set_nodelay(true);
        let mut http = hyper::server::conn::http1::Builder::new();
        http.timer(TokioTimer::new()).header_read_timeout(listen.head_time);
        let io = TokioIo::new(Impatient::new(stream, listen.write_time));
        let service = TowerToHyperService::new(routes.clone());
        let connection = graceful.watch(http.serve_connection(io, service));
        tokio::spawn(async move {
            let _permit = permit;
            // The client's end; it knows.
            let _ = connection.await;
        });
    }
    drop(listener);
    let drained = tokio::task::spawn_blocking(move || app.engine().drain(listen.drain_time)).await;
    let closed = timeout(Duration::from_secs(5), graceful.shutdown()).await;
    drained.unwrap_or(false) && closed.is_ok()
}

/// A stream that fails when the other side takes nothing for some time.
struct Impatient {
    stream: TcpStream,
    patience: Duration,
    /// Runs while a write waits.
    timer: Option<Pin<Box<Sleep>>>,
}

impl Impatient {
    fn new(stream: TcpStream, patience: Duration) -> Self {
        Self { stream, patience, timer: None }
    }

    fn watch<T>(
        &mut self,
        context: &mut Context<'_>,
        result: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if result.is_ready() {
            self.timer = None;
            return result;
        }
        let patience = self.patience;
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep(patience)));
        if timer.deadline() <= Instant::now() || timer.as_mut().poll(context).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        Poll::Pending
    }
}

impl AsyncRead for Impatient {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Impatient {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let result = Pin::new(&mut this.stream).poll_write(context, bytes);
        this.watch(context, result)
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let result = Pin::new(&mut this.stream).poll_flush(context);
        this.watch(context, result)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(context)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let result = Pin::new(&mut this.stream).poll_write_vectored(context, buffers);
        this.watch(context, result)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
