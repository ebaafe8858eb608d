//! Keys, changes of tenants, pressure and the end.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use crate::support::{DELTAS, QUESTION, Server, app, engine, options, until};
use onebase_engine::Options;
use onebase_server::{App, Keys, Limits, Listen, StateFile};
use serde_json::{Value, json};

fn long(model: &str, max_tokens: usize) -> Value {
    json!({"model": model, "prompt": QUESTION, "max_tokens": max_tokens, "temperature": 0,
           "ignore_eos": true})
}

#[test]
fn keys_open_what_they_are_for() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("keys.json");
    let file = json!({
        "admin": "admin-secret",
        "keys": [
            {"name": "all", "key": "key-for-all"},
            {"name": "one", "key": "key-for-one", "tenants": ["math"], "requests_per_minute": 3},
            {"name": "few", "key": "key-for-few", "tokens_per_minute": 10},
        ],
    });
    std::fs::write(&path, file.to_string()).unwrap();
    let keys = Keys::read(&path, true).unwrap();
    let app = App::new(engine(&options()), keys, Limits::default(), None, None);
    let server = Server::start(app, Listen::default());
    let ask =
        |key, model| server.send("POST", "/v1/completions", key, Some(&long(model, 2).to_string()));
    ask(None, "math").refused(401);
    ask(Some("another-key"), "math").refused(401);
    ask(Some("key-for-all"), "chat").ok();
    ask(Some("admin-secret"), "chat").ok();
    // A tenant that a key is not for is as if it were not there.
    assert!(!ask(Some("key-for-one"), "chat").refused(404).contains("did you mean"));
    let models = server.send("GET", "/v1/models", Some("key-for-one"), None).ok();
    assert_eq!(models["data"].as_array().unwrap().len(), 1);
    for _ in 0..3 {
        ask(Some("key-for-one"), "math").ok();
    }
    let refused = ask(Some("key-for-one"), "math");
    assert!(refused.refused(429).contains("requests"));
    assert!(refused.header("retry-after").unwrap().parse::<u64>().unwrap() >= 1);
    ask(Some("key-for-few"), "math").ok();
    assert!(ask(Some("key-for-few"), "math").refused(429).contains("tokens"));
    // Only the admin's key changes tenants.
    let delete = |key| server.send("DELETE", "/admin/tenants/chat", key, None);
    delete(None).refused(401);
    delete(Some("key-for-all")).refused(401);
    delete(Some("admin-secret")).ok();
    ask(Some("key-for-all"), "chat").refused(404);
    for bad in [r#"{"admin": "short"}"#, r#"{"keys": [{"name": "x"}]}"#, "{", r#"{"amin": "x"}"#] {
        std::fs::write(&path, bad).unwrap();
        assert!(Keys::read(&path, true).is_err(), "{bad}");
    }
}

#[test]
fn tenants_change_while_it_runs() {
    let server = Server::plain();
    let put = |name: &str, body: Value| {
        let path = format!("/admin/tenants/{name}");
        server.send("PUT", &path, None, Some(&body.to_string()))
    };
    let loaded = put("org/new", json!({"source": "sign", "expected_generation": 0})).ok();
    let generation = loaded["generation"].as_u64().unwrap();
    assert!(server.post("/v1/completions", &long("org/new", 3)).status == 200);
    assert_eq!(server.get("/v1/models/org/new").ok()["onebase"]["generation"], generation);
    // Compare and set.
    let stale = put("org/new", json!({"source": "math", "expected_generation": generation - 1}));
    assert_eq!(
        (stale.refused(409).is_empty(), stale.json()["error"]["code"].as_str()),
        (false, Some("generation"))
    );
    let swapped = put("org/new", json!({"source": "math", "expected_generation": generation})).ok();
    assert!(swapped["generation"].as_u64() > Some(generation));
    let path = format!("/admin/tenants/org/new?expected_generation={generation}");
    server.send("DELETE", &path, None, None).refused(409);
    server.send("DELETE", "/admin/tenants/org/new", None, None).ok();
    server.send("DELETE", "/admin/tenants/org/new", None, None).refused(404);
    put("none", json!({"source": "nowhere"})).refused(400);
    put("base", json!({"source": "math"})).refused(400);
    put("a%20b", json!({"source": "math"})).refused(400);
    put("x", json!({"path": "math"})).refused(400);
    // A page of another site may have its name point to this machine.
    let rebound =
        "DELETE /admin/tenants/math HTTP/1.1\r\nhost: evil.test:80\r\nconnection: close\r\n\r\n";
    server.raw(rebound).read().refused(403);
    // In the words of other servers.
    let load = json!({"lora_name": "lora", "lora_path": "sign"});
    assert_eq!(server.post("/v1/load_lora_adapter", &load).status, 200);
    assert!(server.post("/v1/load_lora_adapter", &load).refused(400).contains("already"));
    let unload = json!({"lora_name": "lora"});
    assert_eq!(server.post("/v1/unload_lora_adapter", &unload).status, 200);
    server.post("/v1/unload_lora_adapter", &unload).refused(404);
}

#[test]
fn what_is_served_outlives_the_server() {
    let dir = tempfile::tempdir().unwrap();
    let open = |engine: onebase_engine::Engine| {
        let base = engine.registry().base().digest();
        let (state, saved) = StateFile::open(&dir.path().join("state"), base).unwrap();
        let deltas = Some(DELTAS.path().to_owned());
        (App::new(engine, Keys::none(true), Limits::default(), Some(state), deltas), saved)
    };
    let (app, saved) = open(engine(&options()));
    assert!(saved.tenants.is_empty());
    let server = Server::start(app, Listen::default());
    let body = json!({"source": "sign"}).to_string();
    let loaded = server.send("PUT", "/admin/tenants/new", None, Some(&body)).ok();
    server.send("DELETE", "/admin/tenants/chat", None, None).ok();
    drop(server);
    let (_, saved) = open(engine(&options()));
    let names: Vec<&str> = saved.tenants.iter().map(|desired| desired.name.as_str()).collect();
    assert_eq!(names, ["math", "new"]);
    assert_eq!(saved.unloaded.into_iter().collect::<Vec<_>>(), ["chat"]);
    let new = &saved.tenants[1];
    assert_eq!(Some(new.generation), loaded["generation"].as_u64());
    assert_eq!(new.digest.unwrap().to_string(), loaded["blake3"]);
    assert!(saved.last_generation >= new.generation);
    let other = onebase_format::Digest::of(b"another base");
    assert!(StateFile::open(&dir.path().join("state"), other).is_err());
}

#[test]
fn a_client_that_goes_away_is_not_answered() {
    let server = Server::plain();
    let mut body = long("math", 900);
    body["stream"] = true.into();
    let mut opened = server.open("POST", "/v1/completions", None, Some(&body.to_string()));
    let mut some = [0; 64];
    opened.reader.read_exact(&mut some).unwrap();
    drop(opened);
    drop(server.open("POST", "/v1/completions", None, Some(&long("chat", 900).to_string())));
    until("both are cancelled", || server.app.engine().n_open() == 0);
    let metrics = server.app.engine().metrics();
    assert!(metrics.tenants["math"].n_cancelled == 1 && metrics.tenants["math"].new_tokens < 900);
}

#[test]
fn a_full_queue_is_said_with_a_time() {
    let options = Options { max_batch: 1, queue: 2, ..options() };
    let server = Server::start(app(engine(&options)), Listen::default());
    let body = long("math", 300).to_string();
    let opened: Vec<_> =
        (0..6).map(|_| server.open("POST", "/v1/completions", None, Some(&body))).collect();
    let replies: Vec<_> = opened.into_iter().map(crate::support::Opened::read).collect();
    let (answered, full): (Vec<_>, Vec<_>) = replies.iter().partition(|reply| reply.status == 200);
    assert!(answered.len() >= 3 && !full.is_empty(), "{}", answered.len());
    for reply in full {
        assert!(reply.refused(429).contains("wait"));
        assert!(reply.header("retry-after").is_some());
    }
}

#[test]
fn those_who_open_and_leave_hold_up_nobody() {
    let listen =
        Listen { head_time: Duration::from_millis(300), max_connections: 64, ..Listen::default() };
    let server = Server::start(app(engine(&options())), listen);
    let idle: Vec<TcpStream> =
        (0..400).map(|_| TcpStream::connect(server.address).unwrap()).collect();
    let mut half = TcpStream::connect(server.address).unwrap();
    half.write_all(b"POST /v1/completions HTTP/1.1\r\nhost:").unwrap();
    let reply = server.post("/v1/completions", &long("math", 3));
    assert_eq!(reply.status, 200);
    half.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let mut rest = Vec::new();
    // Closed, with or without a word about it.
    let _ = half.read_to_end(&mut rest);
    drop(idle);
}

#[test]
fn it_ends_when_all_are_answered() {
    let mut server = Server::plain();
    let body = long("math", 200).to_string();
    let opened = server.open("POST", "/v1/completions", None, Some(&body));
    until("it has begun", || server.app.engine().n_open() == 1);
    server.stop();
    let reply = opened.read();
    assert_eq!(reply.ok()["usage"]["completion_tokens"], 200);
    assert!(server.join());
    assert!(TcpStream::connect(server.address).is_err());
}
