//! The server as a process: the desired state outlives being killed at any moment.

// Helpers of tests may panic as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![cfg(unix)]

mod support;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use support::{Place, QUESTION, command, contents, demo, onebase};

struct Server {
    process: Child,
    address: String,
    /// What it said when it was ready.
    ready: Value,
}

impl Server {
    fn start(place: &Place, more: &[&str]) -> Self {
        let base = demo("base");
        let (deltas, state) = (place.text("deltas"), place.text("state"));
        let mut args = vec!["serve", base.to_str().unwrap(), "--deltas", &deltas];
        args.extend(["--state", &state, "--port", "0", "--json"]);
        args.extend(more);
        let mut process =
            command(args).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut text = String::new();
        let mut reader = BufReader::new(process.stdout.as_mut().unwrap());
        while serde_json::from_str::<Value>(&text).is_err() {
            assert!(reader.read_line(&mut text).unwrap() > 0, "{text}");
        }
        let ready: Value = serde_json::from_str(&text).unwrap();
        let address = ready["url"].as_str().unwrap().strip_prefix("http://").unwrap().to_owned();
        Self { process, address, ready }
    }

    /// Sends a request; the connection to read its answer from.
    fn send(&self, method: &str, path: &str, body: &Value) -> TcpStream {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let text = format!(
            "{method} {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\ncontent-type: application/json\r\n\
             content-length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(text.as_bytes()).unwrap();
        stream
    }

    fn ask(&self, method: &str, path: &str, body: &Value) -> (u16, Value) {
        let mut text = String::new();
        self.send(method, path, body).read_to_string(&mut text).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        (status, serde_json::from_str(body).unwrap_or(Value::Null))
    }

    fn answer(&self, model: &str) -> Option<String> {
        let messages = json!([{"role": "user", "content": QUESTION}]);
        let body =
            json!({"model": model, "messages": messages, "temperature": 0, "max_tokens": 24});
        let (status, reply) = self.ask("POST", "/v1/chat/completions", &body);
        let text = reply["choices"][0]["message"]["content"].as_str().map(str::to_owned);
        text.filter(|_| status == 200)
    }

    fn generations(&self) -> Vec<(String, u64)> {
        let (_, status) = self.ask("GET", "/status", &Value::Null);
        let tenants = status["tenants"].as_array().unwrap().iter();
        let one =
            |t: &Value| (t["name"].as_str().unwrap().to_owned(), t["generation"].as_u64().unwrap());
        tenants.map(one).collect()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // SIGKILL: nothing is tidied up.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A folder with the artifacts `math` and `chat`, and `other` beside it.
fn place() -> Place {
    let place = Place::new();
    std::fs::create_dir(place.path("deltas")).unwrap();
    place.compress("math", "rtn", "deltas/math");
    place.compress("chat", "sign", "deltas/chat");
    place.compress("math", "sign", "other");
    place
}

#[test]
fn the_desired_state_outlives_a_kill() {
    let place = place();
    let before = contents(&place.path("deltas/math"));
    let server = Server::start(&place, &[]);
    assert_eq!(server.ready["tenants"].as_array().unwrap().len(), 2);
    assert_eq!(server.answer("math").as_deref(), Some("77 + 4 = 81"));
    let source = json!({"source": place.text("other")});
    let (status, loaded) = server.ask("PUT", "/admin/tenants/new", &source);
    assert_eq!(status, 200, "{loaded}");
    assert_eq!(server.ask("DELETE", "/admin/tenants/chat", &Value::Null).0, 200);
    let (answer, generations) = (server.answer("new"), server.generations());
    drop(server);

    let server = Server::start(&place, &[]);
    assert_eq!(server.generations(), generations);
    assert_eq!(server.answer("new"), answer);
    assert_eq!(server.answer("chat"), None, "it was unloaded");
    // A flag brings it back.
    drop(server);
    let chat = format!("chat={}", place.text("deltas/chat"));
    let server = Server::start(&place, &["--delta", &chat]);
    assert!(server.answer("chat").is_some());
    drop(server);
    assert_eq!(contents(&place.path("deltas/math")), before);
    onebase(["verify", demo("base").to_str().unwrap(), &place.text("deltas/math")]).exits(0);
}

#[test]
fn killed_while_it_loads_it_has_the_old_state_or_the_new() {
    let place = place();
    let server = Server::start(&place, &[]);
    let mut known = server.generations();
    drop(server);
    for wait_ms in [0, 1, 3, 10, 30, 60] {
        let server = Server::start(&place, &[]);
        assert_eq!(server.generations(), known);
        let changes = [json!({"source": place.text("other")}), json!({"source": "chat"})];
        let sent: Vec<TcpStream> = (0..6)
            .map(|i| server.send("PUT", &format!("/admin/tenants/t{}", i % 3), &changes[i % 2]))
            .collect();
        std::thread::sleep(Duration::from_millis(wait_ms));
        drop(server);
        drop(sent);
        let server = Server::start(&place, &[]);
        known = server.generations();
        assert!(known.iter().any(|(name, _)| name == "math"));
        let mut numbers: Vec<u64> = known.iter().map(|(_, generation)| *generation).collect();
        numbers.sort_unstable();
        numbers.dedup();
        assert_eq!(numbers.len(), known.len(), "no generation is given twice");
        for (name, _) in &known {
            assert!(server.answer(name).is_some(), "{name}");
        }
    }
    for artifact in ["deltas/math", "deltas/chat", "other"] {
        onebase(["verify", demo("base").to_str().unwrap(), &place.text(artifact)]).exits(0);
    }
}

#[test]
fn wrong_use_is_told() {
    let place = place();
    let base = demo("base");
    let run = |more: &[&str]| {
        let mut args = vec!["serve", base.to_str().unwrap(), "--port", "0"];
        args.extend(more);
        onebase(args)
    };
    run(&["--deltas", "/nowhere"]).exits(1).says(&["cannot read /nowhere"]);
    run(&["--api-keys", "/nowhere"]).exits(1).says(&["cannot read /nowhere"]);
    run(&["--kv-bytes", "much"]).exits(2);
    run(&["--delta", &format!("a b={}", place.text("other"))]).exits(1).says(&["a b", "letters"]);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let args = ["serve", base.to_str().unwrap(), "--port", &port];
    onebase(args).exits(1).says(&["cannot listen on", &port]);
}
