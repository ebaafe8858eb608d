"use strict";

const byId = (id) => document.getElementById(id);
const keys = {
  api: sessionStorage.getItem("api-key") || "",
  admin: sessionStorage.getItem("admin-key") || "",
};
const MOST_VOICES = 3;
const REFRESH_MS = 2000;
let last = null;
let running = null;

function headers(key) {
  const all = { "content-type": "application/json" };
  if (key) all.authorization = `Bearer ${key}`;
  return all;
}

async function problem(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `${response.status} ${response.statusText}`;
  }
}

function size(bytes) {
  if (bytes === null || bytes === undefined) return "–";
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (bytes >= 1000 && unit < units.length - 1) {
    bytes /= 1000;
    unit += 1;
  }
  return `${unit ? bytes.toFixed(bytes < 10 ? 2 : 1) : bytes} ${units[unit]}`;
}

function element(tag, text, attributes = {}) {
  const made = document.createElement(tag);
  if (text !== undefined && text !== null) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function rate(name, live) {
  const before = last && last.live[name];
  if (!before) return 0;
  const seconds = (performance.now() - last.at) / 1000;
  return Math.max(0, (live.new_tokens - before.new_tokens) / seconds);
}

function cell(name, text, kind = "number") {
  return element("td", text, { "data-name": name, class: kind });
}

function row(tenant) {
  const line = element("tr");
  const head = element("th", tenant.name, { scope: "row" });
  const codecs = tenant.codecs ? tenant.codecs.join(", ") : "cannot be read";
  head.append(element("small", tenant.failure || `${codecs} · generation ${tenant.generation}`,
    tenant.failure ? { class: "bad" } : {}));
  const kept = tenant.skill_kept;
  const bits = tenant.effective_bpw_total;
  const live = tenant.live;
  const skill = cell("Skill kept", kept ? `${(100 * kept.share).toFixed(0)} %` : "–");
  if (kept) skill.title = kept.task;
  line.append(
    head,
    cell("On disk", size(tenant.disk_bytes)),
    cell("Bits per weight", bits === null ? "–" : bits.toFixed(2)),
    skill,
    cell("Memory", tenant.resident_bytes === null ? "on demand" : size(tenant.resident_bytes)),
    cell("Requests", `${live.running} now, ${live.answered} done`),
    cell("Tokens/s", rate(tenant.name, live).toFixed(1)),
  );
  const change = element("td", null, { class: "change number" });
  const unload = element("button", "Unload", { type: "button", "aria-label": `Unload ${tenant.name}` });
  unload.addEventListener("click", () => remove(tenant));
  change.append(unload);
  line.append(change);
  return line;
}

function baseRow(base) {
  const line = element("tr");
  const head = element("th", base.name, { scope: "row" });
  head.append(element("small", "the base"));
  line.append(head, cell("On disk", "–"), cell("Bits per weight", "–"), cell("Skill kept", "–"),
    cell("Memory", "shared"), cell("Requests", `${base.live.running} now, ${base.live.answered} done`),
    cell("Tokens/s", rate(base.name, base.live).toFixed(1)), element("td", null, { class: "change" }));
  return line;
}

function choices(names) {
  const box = byId("choices");
  const known = [...box.querySelectorAll("input")].map((input) => input.value);
  if (known.join("\n") === names.join("\n")) return;
  const checked = new Set([...box.querySelectorAll("input:checked")].map((input) => input.value));
  if (!known.length) names.slice(0, MOST_VOICES).forEach((name) => checked.add(name));
  box.replaceChildren(...names.map((name) => {
    const label = element("label");
    const input = element("input", null, { type: "checkbox", value: name });
    input.checked = checked.has(name);
    label.append(input, name);
    return label;
  }));
  limit();
}

function limit() {
  const inputs = [...byId("choices").querySelectorAll("input")];
  const full = inputs.filter((input) => input.checked).length >= MOST_VOICES;
  inputs.forEach((input) => { input.disabled = full && !input.checked; });
}

function meter(id, used, all, text) {
  byId(`${id}-meter`).value = all ? used / all : 0;
  byId(`${id}-text`).textContent = text;
}

async function refresh() {
  let status;
  try {
    const response = await fetch("status", { headers: headers(keys.api || keys.admin) });
    if (!response.ok) {
      byId("base").textContent = await problem(response);
      return;
    }
    status = await response.json();
  } catch {
    byId("base").textContent = "the server does not answer";
    return;
  }
  const base = status.base;
  byId("base").textContent = `${base.name} · context ${base.context_tokens} · ${base.blake3.slice(0, 12)}`;
  const focused = document.activeElement && document.activeElement.getAttribute("aria-label");
  byId("rows").replaceChildren(baseRow(base), ...status.tenants.map(row));
  if (focused) {
    const again = [...byId("rows").querySelectorAll("button")];
    const same = again.find((button) => button.getAttribute("aria-label") === focused);
    if (same) same.focus();
  }
  meter("delta", status.delta_bytes, status.delta_limit_bytes,
    `${size(status.delta_bytes)} of ${size(status.delta_limit_bytes)}`);
  meter("kv", status.kv_tokens, status.kv_limit_tokens,
    `${status.kv_tokens} of ${status.kv_limit_tokens} positions`);
  choices([...status.tenants.map((tenant) => tenant.name), base.name]);
  const live = Object.fromEntries(status.tenants.map((tenant) => [tenant.name, tenant.live]));
  live[base.name] = base.live;
  last = { at: performance.now(), live };
}

function say(text, kind) {
  const line = byId("change-status");
  line.textContent = text;
  line.className = kind;
}

const path = (name) => `admin/tenants/${name.split("/").map(encodeURIComponent).join("/")}`;

async function remove(tenant) {
  if (!window.confirm(`Unload ${tenant.name}? Requests that have begun are answered.`)) return;
  const query = `?expected_generation=${tenant.generation}`;
  const response = await fetch(path(tenant.name) + query,
    { method: "DELETE", headers: headers(keys.admin || keys.api) });
  if (response.ok) say(`${tenant.name} is unloaded`, "good");
  else say(await problem(response), "bad");
  refresh();
}

async function load(event) {
  event.preventDefault();
  const form = event.target;
  const name = form.elements.name.value;
  say(`loading ${name}…`, "muted");
  const response = await fetch(path(name), {
    method: "PUT",
    headers: headers(keys.admin || keys.api),
    body: JSON.stringify({ source: form.elements.source.value }),
  });
  if (response.ok) {
    const tenant = await response.json();
    say(`${name} is loaded as generation ${tenant.generation}`, "good");
    form.reset();
  } else {
    say(await problem(response), "bad");
  }
  refresh();
}

/** The objects of a stream of server-sent events. */
async function* objects(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim()).join("\n");
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

async function answer(name, body, signal) {
  const card = element("article");
  const text = element("p", null, { "aria-live": "polite" });
  const foot = element("footer", "waiting…");
  card.append(element("h3", name), text, foot);
  byId("answers").append(card);
  const start = performance.now();
  let first = null;
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST", headers: headers(keys.api || keys.admin), signal,
      body: JSON.stringify({ ...body, model: name }),
    });
    if (!response.ok) throw new Error(await problem(response));
    let usage = null;
    for await (const object of objects(response)) {
      if (object.error) throw new Error(object.error.message);
      usage = object.usage || usage;
      const piece = object.choices.length ? object.choices[0].delta.content : "";
      if (piece) {
        first ??= performance.now();
        text.append(piece);
      }
    }
    const seconds = (performance.now() - start) / 1000;
    const n = usage ? usage.completion_tokens : 0;
    const wait = first === null ? "" : `first after ${Math.round(first - start)} ms, `;
    foot.textContent = `${n} tokens, ${wait}${(n / seconds).toFixed(1)} per second`;
  } catch (error) {
    foot.textContent = signal.aborted ? "stopped" : error.message;
    if (!signal.aborted) foot.className = "bad";
  }
}

async function ask(event) {
  event.preventDefault();
  const names = [...byId("choices").querySelectorAll("input:checked")].map((input) => input.value);
  if (running || !names.length) return;
  const fields = byId("ask").elements;
  const body = {
    messages: [{ role: "user", content: fields.question.value }],
    temperature: Number(fields.temperature.value),
    max_tokens: Number(fields.tokens.value),
    stream: true,
    stream_options: { include_usage: true },
  };
  running = new AbortController();
  byId("stop").disabled = false;
  byId("answers").replaceChildren();
  await Promise.all(names.map((name) => answer(name, body, running.signal)));
  running = null;
  byId("stop").disabled = true;
}

byId("choices").addEventListener("change", limit);
byId("load").addEventListener("submit", load);
byId("ask").addEventListener("submit", ask);
byId("ask").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("ask").requestSubmit();
});
byId("stop").addEventListener("click", () => running && running.abort());
byId("keys-open").addEventListener("click", () => {
  byId("api-key").value = keys.api;
  byId("admin-key").value = keys.admin;
  byId("keys").showModal();
});
byId("keys").addEventListener("close", () => {
  keys.api = byId("api-key").value.trim();
  keys.admin = byId("admin-key").value.trim();
  sessionStorage.setItem("api-key", keys.api);
  sessionStorage.setItem("admin-key", keys.admin);
  refresh();
});
refresh();
setInterval(refresh, REFRESH_MS);
