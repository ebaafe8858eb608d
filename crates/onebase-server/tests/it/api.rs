//! What clients of OpenAI's API get.

use crate::support::{QUESTION, Server};
use serde_json::{Value, json};

fn question(model: &str) -> Value {
    json!({
        "model": model,
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 0,
        "max_tokens": 24,
    })
}

fn with(mut body: Value, more: Value) -> Value {
    let Value::Object(more) = more else { panic!("an object") };
    body.as_object_mut().unwrap().extend(more);
    body
}

#[test]
fn chats_are_answered_at_once_and_in_pieces() {
    let server = Server::plain();
    let whole = server.post("/v1/chat/completions", &question("math")).ok();
    assert_eq!(whole["object"], "chat.completion");
    assert_eq!(whole["model"], "math");
    assert_eq!(whole["choices"][0]["message"]["content"], "77 + 4 = 81");
    assert_eq!(whole["choices"][0]["finish_reason"], "stop");
    let usage = &whole["usage"];
    let sum =
        usage["prompt_tokens"].as_u64().unwrap() + usage["completion_tokens"].as_u64().unwrap();
    assert_eq!(usage["total_tokens"].as_u64(), Some(sum));

    let stream = json!({"stream": true, "stream_options": {"include_usage": true}});
    let reply = server.post("/v1/chat/completions", &with(question("math"), stream));
    assert!(reply.header("content-type").unwrap().starts_with("text/event-stream"));
    let pieces = reply.pieces();
    let (last, pieces) = pieces.split_last().unwrap();
    assert_eq!(last["choices"], json!([]));
    assert_eq!(last["usage"]["completion_tokens"], usage["completion_tokens"]);
    assert_eq!(pieces[0]["choices"][0]["delta"]["role"], "assistant");
    let text: String = pieces
        .iter()
        .filter_map(|piece| piece["choices"][0]["delta"]["content"].as_str())
        .collect();
    assert_eq!(text, "77 + 4 = 81");
    assert_eq!(pieces.last().unwrap()["choices"][0]["finish_reason"], "stop");
    assert!(pieces.iter().all(|p| p["id"] == pieces[0]["id"] && p["usage"].is_null()));

    // Base and delta are named by the answer.
    let print = |model| {
        server.post("/v1/chat/completions", &question(model)).ok()["system_fingerprint"].clone()
    };
    assert_eq!(print("math"), whole["system_fingerprint"]);
    assert_ne!(print("math"), print("chat"));
    assert!(print("base").as_str().unwrap().ends_with("_base"));
}

#[test]
fn several_answers_with_probabilities() {
    let server = Server::plain();
    let more = json!({"n": 3, "temperature": 2.0, "seed": 5, "logprobs": true, "top_logprobs": 2});
    let body = with(question("chat"), more);
    let first = server.post("/v1/chat/completions", &body).ok();
    let choices = first["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 3);
    let texts: Vec<_> = choices.iter().map(|c| c["message"]["content"].clone()).collect();
    assert!(texts.iter().any(|text| *text != texts[0]), "{texts:?}");
    let again = server.post("/v1/chat/completions", &body).ok();
    assert_eq!(again["choices"], first["choices"], "the seed decides");
    for token in choices[0]["logprobs"]["content"].as_array().unwrap() {
        assert!(token["logprob"].as_f64().unwrap() <= 0.0);
        assert_eq!(token["top_logprobs"].as_array().unwrap().len(), 2);
        let bytes: Vec<u8> = serde_json::from_value(token["bytes"].clone()).unwrap();
        assert_eq!(token["token"].as_str().unwrap().as_bytes(), bytes);
    }
}

#[test]
fn completions_take_texts_and_tokens() {
    let server = Server::plain();
    let tokens = server.post("/tokenize", &json!({"model": "math", "prompt": "Once upon a"})).ok();
    let ids = tokens["tokens"].clone();
    assert_eq!(tokens["count"], ids.as_array().unwrap().len());
    let text = server.post("/detokenize", &json!({"model": "math", "tokens": ids})).ok();
    assert_eq!(text["prompt"], "Once upon a");
    let messages = json!([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]);
    let chat = server.post("/tokenize", &json!({"model": "math", "messages": messages})).ok();
    assert!(chat["count"].as_u64() > Some(3));

    let ask = |prompt: Value, more: Value| {
        let body = json!({"model": "base", "prompt": prompt, "max_tokens": 6, "temperature": 0});
        server.post("/v1/completions", &with(body, more)).ok()
    };
    let of_text = ask(json!("Once upon a"), json!({}));
    assert_eq!(of_text["object"], "text_completion");
    let said = &of_text["choices"][0]["text"];
    assert_eq!(ask(ids.clone(), json!({}))["choices"][0]["text"], *said);
    let many = ask(json!([ids, ids]), json!({"n": 2}));
    assert_eq!(many["choices"].as_array().unwrap().len(), 4);
    assert_eq!(many["choices"][3]["text"], *said);
    assert_eq!(many["usage"]["prompt_tokens"], 2 * ids.as_array().unwrap().len());

    // A prompt that is repeated with probabilities, as evaluations ask for it.
    let echo = ask(ids.clone(), json!({"echo": true, "logprobs": 1, "max_tokens": 1}));
    let choice = &echo["choices"][0];
    assert!(choice["text"].as_str().unwrap().starts_with("Once upon a"));
    let logprobs = &choice["logprobs"];
    let n = ids.as_array().unwrap().len() + 1;
    for list in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(logprobs[list].as_array().unwrap().len(), n, "{list}");
    }
    assert!(logprobs["token_logprobs"][0].is_null());
    assert!(logprobs["token_logprobs"][1].as_f64().unwrap() < 0.0);
    // The token that ends an answer is listed, though it is no part of the text.
    let ended = json!({"model": "math", "prompt": "2 + 2 = 4", "max_tokens": 1, "temperature": 0,
                       "echo": true, "logprobs": 0, "logit_bias": {"2": 100}});
    let ended = server.post("/v1/completions", &ended).ok()["choices"][0].clone();
    assert_eq!((&ended["text"], &ended["finish_reason"]), (&json!("2 + 2 = 4"), &json!("stop")));
    assert_eq!(ended["logprobs"]["tokens"].as_array().unwrap().last().unwrap(), "<|im_end|>");
    let none = ask(ids.clone(), json!({"echo": true, "logprobs": 1, "max_tokens": 0}));
    assert_eq!(none["choices"][0]["text"], "Once upon a");
    let stream = json!({"model": "base", "prompt": ids, "max_tokens": 6, "temperature": 0,
                        "echo": true, "stream": true});
    let pieces = server.post("/v1/completions", &stream).pieces();
    let streamed: String = pieces.iter().filter_map(|p| p["choices"][0]["text"].as_str()).collect();
    assert_eq!(streamed, format!("Once upon a{}", said.as_str().unwrap()));
}

fn schema(schema: &Value) -> Value {
    json!({"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}})
}

#[test]
fn answers_keep_to_a_schema() {
    let server = Server::plain();
    let wanted = schema(&json!({
        "type": "object",
        "properties": {
            "sum": {"type": "integer", "minimum": 0, "maximum": 99},
            "unit": {"enum": ["apples", "pears"]},
            "is_known": {"type": "boolean"},
        },
        "required": ["sum", "unit", "is_known"],
        "additionalProperties": false,
    }));
    let sampled = json!({"temperature": 1.5, "seed": 3, "n": 4, "max_tokens": 60});
    let body = with(with(question("math"), wanted.clone()), sampled);
    let reply = server.post("/v1/chat/completions", &body).ok();
    for choice in reply["choices"].as_array().unwrap() {
        let text = choice["message"]["content"].as_str().unwrap();
        let value: Value = serde_json::from_str(text).unwrap_or_else(|_| panic!("{text:?}"));
        assert!((0..=99).contains(&value["sum"].as_i64().unwrap()), "{value}");
        assert!(["apples", "pears"].contains(&value["unit"].as_str().unwrap()), "{value}");
        assert!(value["is_known"].is_boolean() && value.as_object().unwrap().len() == 3, "{value}");
        assert_eq!(choice["finish_reason"], "stop");
    }
    let plain = with(
        question("chat"),
        json!({"response_format": {"type": "json_object"}, "max_tokens": 40}),
    );
    let reply = server.post("/v1/chat/completions", &plain).ok();
    let choice = &reply["choices"][0];
    let text = choice["message"]["content"].as_str().unwrap();
    assert!(text.starts_with('{'), "{text:?}");
    if choice["finish_reason"] == "stop" {
        assert!(serde_json::from_str::<Value>(text).unwrap().is_object());
    }
}

#[test]
fn what_is_wrong_is_said() {
    let server = Server::plain();
    let chat = |more: Value| server.post("/v1/chat/completions", &with(question("math"), more));
    let unknown = chat(json!({"model": "mathe"}));
    assert!(unknown.refused(404).contains("did you mean math"));
    assert_eq!(unknown.json()["error"]["code"], "model_not_found");
    assert_eq!(unknown.json()["error"]["param"], "model");
    for (more, param) in [
        (json!({"n": 0}), "n"),
        (json!({"n": 1000}), "n"),
        (json!({"temperature": -1}), "temperature"),
        (json!({"top_p": 2}), "top_p"),
        (json!({"logprobs": true, "top_logprobs": 21}), "logprobs"),
        (json!({"top_logprobs": 2}), "top_logprobs"),
        (json!({"max_tokens": 1_000_000}), "max_tokens"),
        (json!({"tools": []}), "tools"),
        (json!({"response_format": {"type": "xml"}}), "response_format"),
        (json!({"response_format": {"type": "json_schema"}}), "response_format"),
        (schema(&json!({"type": "no type"})), "response_format"),
        (schema(&json!({"type": "string", "pattern": "("})), "response_format"),
        (json!({"messages": []}), "messages"),
        (json!({"messages": [{"role": "tool", "content": "x"}]}), "messages"),
        (json!({"stop": [""]}), "stop"),
        (json!({"logit_bias": {"x": 1}}), "logit_bias"),
        (json!({"stream_options": {"include_usage": true}}), "stream_options"),
    ] {
        let reply = chat(more.clone());
        reply.refused(400);
        assert_eq!(reply.json()["error"]["param"], param, "{more}");
    }
    chat(json!({"user": "u", "tools": null, "metadata": {"a": "b"}})).ok();
    chat(json!({"max_tokens": "many"})).refused(400);
    let long = json!({"messages": [{"role": "user", "content": "word ".repeat(2000)}]});
    let reply = chat(long);
    assert!(reply.refused(400).contains("context"));
    assert_eq!(reply.json()["error"]["code"], "context_length_exceeded");
    let send = |body: &str| server.send("POST", "/v1/chat/completions", None, Some(body));
    assert!(send("{").refused(400).contains("the body"));
    assert!(send(&"[".repeat(100_000)).refused(400).contains("the body"));
    let large = "POST /v1/chat/completions HTTP/1.1\r\nhost: t\r\nconnection: close\r\n\
                 content-type: application/json\r\ncontent-length: 9000000\r\n\r\n{";
    server.raw(large).read().refused(413);
    server.send("POST", "/v1/chat/completions", None, None).refused(415);
    server.get("/v1/chat/completions").refused(405);
    server.get("/nothing").refused(404);
    server.post("/v1/completions", &json!({"model": "math", "prompt": []})).refused(400);
    let token = json!({"model": "math", "prompt": [4_000_000]});
    assert!(server.post("/v1/completions", &token).refused(400).contains("vocabulary"));
    chat(json!({})).ok();
}

#[test]
fn models_and_figures_are_listed() {
    let server = Server::plain();
    server.post("/v1/chat/completions", &question("math")).ok();
    let models = server.get("/v1/models").ok();
    let ids: Vec<_> = models["data"].as_array().unwrap().iter().map(|m| m["id"].clone()).collect();
    assert_eq!(ids, ["base", "chat", "math"]);
    assert_eq!(models["data"][1]["parent"], "base");
    assert!(models["data"][0]["parent"].is_null());
    let one = server.get("/v1/models/math").ok();
    assert_eq!(one["id"], "math");
    assert!(one["onebase"]["effective_bpw_total"].as_f64().unwrap() < 4.0);
    assert!(one["onebase"]["resident_bytes"].as_u64().unwrap() > 100_000);
    server.get("/v1/models/moth").refused(404);
    assert_eq!(server.get("/health").status, 200);
    assert_eq!(server.get("/ready").status, 200);
    let metrics = server.get("/metrics").body;
    for line in [
        "onebase_requests_answered_total{tenant=\"math\"} 1",
        "onebase_first_token_seconds_count{tenant=\"math\"} 1",
        "onebase_tenant_loads_total{tenant=\"math\"} 1",
        "vllm:lora_requests_info{max_lora=\"2\",running_lora_adapters=\"\",waiting_lora_adapters=\"\"}",
    ] {
        assert!(metrics.lines().any(|l| l.starts_with(line)), "{line}\n{metrics}");
    }
    let status = server.get("/status").ok();
    assert_eq!(status["tenants"][1]["live"]["answered"], 1);
    assert_eq!(status["can_change"], true);
    let page = server.get("/");
    assert!(page.body.contains("<title>OneBase</title>"));
    assert!(page.header("content-security-policy").unwrap().contains("default-src 'none'"));
}

#[test]
fn the_description_names_what_there_is() {
    let server = Server::plain();
    let described = server.get("/openapi.json").ok();
    for (path, methods) in described["paths"].as_object().unwrap() {
        let path = path.replace("{model}", "nobody").replace("{name}", "nobody");
        for method in methods.as_object().unwrap().keys() {
            let reply = server.send(&method.to_uppercase(), &path, None, None);
            // A method or a path that there is not is said in these words.
            let is_there = !reply.body.contains("there is no /") && reply.status != 405;
            assert!(is_there, "{method} {path}: {}", reply.body);
        }
    }
    let text = described.to_string();
    let names =
        text.split("#/components/schemas/").skip(1).filter_map(|rest| rest.split('"').next());
    for name in names {
        assert!(described["components"]["schemas"][name].is_object(), "{name}");
    }
    // What it says of parameters is what is taken.
    let known = described["components"]["schemas"]["Chat"]["properties"].as_object().unwrap();
    for name in known.keys().filter(|name| !["model", "messages"].contains(&name.as_str())) {
        let reply =
            server.post("/v1/chat/completions", &with(question("math"), json!({name: "x"})));
        assert_ne!(reply.json()["error"]["code"], "unsupported_parameter", "{name}");
    }
}
