//! A server over the demo family, and a client that speaks plain HTTP/1.1.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use onebase_compress::{Pair, Plan, Silent, TablePlan, VectorPlan, compress};
use onebase_engine::{Engine, Options};
use onebase_format::Checkpoint;
use onebase_model::Model;
use onebase_server::{App, Keys, Limits, Listen, serve};
use serde_json::Value;
use tempfile::TempDir;
use tokio::sync::oneshot;

pub(crate) fn demo(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../demo").join(name)
}

const TENANTS: [(&str, &str, &str); 3] =
    [("math", "math", "rtn:bits=2"), ("chat", "chat", "rtn"), ("sign", "math", "sign")];

/// The artifacts, a folder each.
pub(crate) static DELTAS: LazyLock<TempDir> = LazyLock::new(|| {
    let dir = tempfile::tempdir().unwrap();
    for (name, fine_tune, codec) in TENANTS {
        let pair = Pair::open(&demo("base"), &demo(fine_tune)).unwrap();
        let codec = codec.parse::<onebase_codec::CodecSpec>().unwrap();
        let plan = Plan::new(codec.clone(), TablePlan::Codec(codec), VectorPlan::Exact);
        compress(&pair, &plan, &dir.path().join(name), &Silent).unwrap();
    }
    dir
});

pub(crate) fn options() -> Options {
    Options {
        base_name: "base".to_owned(),
        threads: 2,
        max_batch: 8,
        step_tokens: 64,
        kv_bytes: 1 << 28,
        delta_bytes: 1 << 30,
        queue: 64,
    }
}

/// An engine with `math` and `chat`.
pub(crate) fn engine(options: &Options) -> Engine {
    let model = Model::load(Checkpoint::open(&demo("base")).unwrap()).unwrap();
    let engine = Engine::start(model, options).unwrap();
    for name in ["math", "chat"] {
        let until = Instant::now() + Duration::from_secs(60);
        engine.registry().load(name, &DELTAS.path().join(name), Some(0), until).unwrap();
    }
    engine
}

pub(crate) fn app(engine: Engine) -> App {
    let deltas = Some(DELTAS.path().to_owned());
    App::new(engine, Keys::none(true), Limits::default(), None, deltas)
}

/// Waits for something to become so.
#[track_caller]
pub(crate) fn until(what: &str, is: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !is() {
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    pub(crate) app: Arc<App>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<bool>>,
}

impl Server {
    pub(crate) fn start(app: App, listen: Listen) -> Self {
        let app = Arc::new(app);
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel();
        let shared = Arc::clone(&app);
        let thread = std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
            runtime.unwrap().block_on(async {
                let listener = tokio::net::TcpListener::from_std(listener).unwrap();
                serve(listener, shared, listen, async { stopped.await.unwrap_or(()) }).await
            })
        });
        Self { address, app, stop: Some(stop), thread: Some(thread) }
    }

    /// A server with `math` and `chat`, open to everybody.
    pub(crate) fn plain() -> Self {
        Self::start(app(engine(&options())), Listen::default())
    }

    /// Asks it to stop.
    pub(crate) fn stop(&mut self) {
        drop(self.stop.take());
    }

    /// Waits until it has; whether no request was cut off.
    pub(crate) fn join(&mut self) -> bool {
        self.stop();
        self.thread.take().unwrap().join().unwrap()
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> Reply {
        self.send("POST", path, None, Some(&body.to_string()))
    }

    pub(crate) fn get(&self, path: &str) -> Reply {
        self.send("GET", path, None, None)
    }

    pub(crate) fn send(
        &self,
        method: &str,
        path: &str,
        key: Option<&str>,
        body: Option<&str>,
    ) -> Reply {
        self.open(method, path, key, body).read()
    }

    /// Sends a request and leaves its answer to be read.
    pub(crate) fn open(
        &self,
        method: &str,
        path: &str,
        key: Option<&str>,
        body: Option<&str>,
    ) -> Opened {
        let mut text =
            format!("{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n");
        if let Some(key) = key {
            text.push_str(&format!("authorization: Bearer {key}\r\n"));
        }
        if let Some(body) = body {
            let n = body.len();
            text.push_str(&format!("content-type: application/json\r\ncontent-length: {n}\r\n"));
        }
        text.push_str("\r\n");
        text.push_str(body.unwrap_or_default());
        self.raw(&text)
    }

    /// Sends bytes as they are.
    pub(crate) fn raw(&self, text: &str) -> Opened {
        let mut stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream.write_all(text.as_bytes()).unwrap();
        Opened { reader: BufReader::new(stream) }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

pub(crate) struct Opened {
    pub(crate) reader: BufReader<TcpStream>,
}

#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    /// Lower case, a line each.
    pub(crate) headers: Vec<String>,
    pub(crate) body: String,
}

impl Opened {
    fn line(&mut self) -> String {
        let mut line = String::new();
        self.reader.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    pub(crate) fn read(mut self) -> Reply {
        let status = self.line();
        let status =
            status.split(' ').nth(1).unwrap_or_else(|| panic!("{status:?}")).parse().unwrap();
        let mut headers = Vec::new();
        loop {
            let line = self.line().to_lowercase();
            if line.is_empty() {
                break;
            }
            headers.push(line);
        }
        let mut bytes = Vec::new();
        if headers.contains(&"transfer-encoding: chunked".to_owned()) {
            loop {
                let n = usize::from_str_radix(&self.line(), 16).unwrap();
                let mut chunk = vec![0; n];
                self.reader.read_exact(&mut chunk).unwrap();
                self.line();
                bytes.extend(chunk);
                if n == 0 {
                    break;
                }
            }
        } else {
            self.reader.read_to_end(&mut bytes).unwrap();
        }
        Reply { status, headers, body: String::from_utf8(bytes).unwrap() }
    }
}

impl Reply {
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|_| panic!("{self:?}"))
    }

    /// The object of an answer that must be one.
    #[track_caller]
    pub(crate) fn ok(&self) -> Value {
        assert_eq!(self.status, 200, "{}", self.body);
        self.json()
    }

    /// Checks status and form of a refusal; gives its message.
    #[track_caller]
    pub(crate) fn refused(&self, status: u16) -> String {
        assert_eq!(self.status, status, "{}", self.body);
        let error = &self.json()["error"];
        assert!(error["type"].is_string(), "{error}");
        error["message"].as_str().unwrap().to_owned()
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
    }

    /// The objects of a stream, which must end as it should.
    #[track_caller]
    pub(crate) fn pieces(&self) -> Vec<Value> {
        assert_eq!(self.status, 200, "{}", self.body);
        let data: Vec<&str> =
            self.body.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
        let (end, pieces) = data.split_last().unwrap();
        assert_eq!(*end, "[DONE]");
        pieces.iter().map(|piece| serde_json::from_str(piece).unwrap()).collect()
    }
}

pub(crate) const QUESTION: &str =
    "Lea has 77 apples and gets 4 more. How many apples does Lea have?";
