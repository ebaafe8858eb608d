/* Charts, switches, sorting and heat map of the OneBase report.
   Text of the data is untrusted: it reaches the page through textContent, setAttribute and the canvas only. */
(() => {
  "use strict";

  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("data").textContent);
  const root = document.documentElement;
  const answer = document.querySelector("main").dataset.answer;
  const isNum = Number.isFinite;
  const MAX_BITS = 6; // variants beyond are named under the chart
  const THIN = "\u202f";

  // What the switches say. Charts read it, controls write it.
  const state = { axis: "linear", task: 0, errorSpace: "weight", heatSpace: "weight", hidden: new Set() };

  // ---- numbers (the same rules as the template's filters) -------------------

  function num(x, digits = 3) {
    if (!isNum(x)) return "–";
    if (x === 0) return "0";
    const sign = x < 0 ? "−" : "";
    const size = Math.abs(x);
    if (size < 1e-4) return sign + size.toExponential(digits - 1);
    if (size >= 10 ** digits) return sign + size.toFixed(0);
    const rounded = Number(size.toPrecision(digits));
    return sign + rounded.toFixed(Math.max(0, digits - 1 - Math.floor(Math.log10(rounded))));
  }
  const signed = (text) => text.replace(/^-(?=.*[1-9])/, "−").replace(/^-/, "");
  const pct = (x, decimals = 1) => (isNum(x) ? `${signed((x * 100).toFixed(decimals))}${THIN}%` : "–");
  const interval = (ci) => `95${THIN}% interval ${signed((ci[0] * 100).toFixed(0))} to ${pct(ci[1], 0)}`;

  function bytes(n) {
    if (!isNum(n)) return "–";
    let unit = 0;
    while (n >= 1000 && unit < 4) { n /= 1000; unit += 1; }
    return `${unit ? num(n, 3) : n}\u00a0${["B", "kB", "MB", "GB", "TB"][unit]}`;
  }

  // ---- series: one per codec name, each with its own colour and point shape --

  const SHAPES = [
    { point: "circle", path: "M20 8a5 5 0 1 1-10 0a5 5 0 1 1 10 0z" },
    { point: "rect", path: "M10.5 3.5h9v9h-9z" },
    { point: "triangle", path: "M15 2.5l5.5 10h-11z" },
    { point: "triangle", rotation: 180, path: "M15 13.5l5.5-10h-11z" },
    { point: "crossRot", line: true, path: "M11 4l8 8m0-8l-8 8" },
    { point: "star", line: true, path: "M15 2.5v11M9.5 8h11M11 4l8 8m0-8l-8 8" },
    { point: "cross", line: true, path: "M15 2.5v11M9.5 8h11" },
  ];
  const DIAMOND = { point: "rectRot", path: "M15 2l6 6l-6 6l-6-6z" };
  const series = new Map();
  for (const { name } of data.variants) {
    if (series.has(name)) continue;
    const i = series.size - (series.has("base") ? 1 : 0);
    series.set(name, name === "base"
      ? { colour: "--base", shape: DIAMOND, label: "base alone" }
      : { colour: `--s${i % 8}`, shape: SHAPES[i % SHAPES.length], label: name });
  }

  const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const bitsOf = (v, axis) => v[`effective_bpw_${axis}`];
  const nameOf = (v) => v.label;

  // ---- the charts -------------------------------------------------------------

  // What a simulated code on the limit line keeps, from the base alone on.
  function ideal(value) {
    const at = (bits, of) => ({ x: bits, y: of ? value(of) : undefined });
    const base = data.variants.find((v) => v.codec === "base");
    const points = (data.ideal ?? []).map((p) => at(p[`bpw_${state.axis}`], p));
    return points.length ? [at(0, base), ...points].sort((a, b) => a.x - b.x) : [];
  }

  const charts = [
    {
      id: "skill",
      y: (v) => v.tasks?.[state.task]?.skill_kept,
      ci: (v) => v.tasks?.[state.task]?.skill_kept_ci,
      text: (y) => `skill kept ${pct(y)}`,
      title: () => "Skill kept",
      limit: () => ideal((p) => p.tasks?.[state.task]?.skill_kept),
      limitText: (y) => `a code on the limit line would keep ${pct(y)}`,
      marks: [[1, `100${THIN}% = fine-tune`, "left"], [0, `0${THIN}% = base`, "right"]],
    },
    {
      id: "kl", log: true,
      y: (v) => v.kl_mean,
      text: (y) => `KL ${num(y, 2)} nats`,
      title: () => "KL divergence, nats",
      limit: () => ideal((p) => p.kl_mean),
      limitText: (y) => `a code on the limit line would have ${num(y, 2)} nats`,
    },
    {
      id: "error", log: true, axis: "linear", // the limit is about the linear sites only
      y: (v) => v.error?.[state.errorSpace],
      text: (y) => `relative error ${num(y, 2)}`,
      title: () => `Relative squared error, ${state.errorSpace} space`,
      extra: (v) => {
        const gap = v.above_limit?.[state.errorSpace];
        return isNum(gap) && v.codec !== "base" ? `${num(Math.abs(gap), 2)} bits ${gap < 0 ? "below" : "above"} the limit` : null;
      },
      limit: () => (data.limit?.[state.errorSpace] ?? []).map((p) => ({ x: p.bpw, y: p.error })),
      limitText: (y) => `error ${num(y, 2)} or more`,
      bound: true,
    },
  ];

  // Text on the drawing gets a halo, so that lines and points do not cut it.
  function label(chart, text, x, y, align) {
    const { ctx } = chart;
    ctx.save();
    ctx.font = `12px ${Chart.defaults.font.family}`;
    ctx.textAlign = align;
    ctx.textBaseline = "bottom";
    ctx.lineWidth = 4;
    ctx.lineJoin = "round";
    ctx.strokeStyle = css("--bg");
    ctx.strokeText(text, x, y);
    ctx.fillStyle = css("--muted");
    ctx.fillText(text, x, y);
    ctx.restore();
  }

  // Reference lines, interval bars, the ring of the answer, the note in the shaded area.
  const annotations = (spec) => ({
    id: "annotations",
    beforeDatasetsDraw(chart) {
      const { ctx, chartArea: a, scales: { y } } = chart;
      ctx.save();
      ctx.beginPath();
      ctx.rect(a.left, a.top, a.width, a.height);
      ctx.clip();
      const stroke = (...lines) => {
        ctx.beginPath();
        for (const [x1, y1, x2, y2] of lines) { ctx.moveTo(x1, y1); ctx.lineTo(x2, y2); }
        ctx.stroke();
      };
      ctx.lineWidth = 1.5;
      ctx.setLineDash([2, 3]);
      ctx.strokeStyle = css("--muted");
      stroke(...(spec.marks ?? []).map(([v]) => [a.left, y.getPixelForValue(v), a.right, y.getPixelForValue(v)]));
      ctx.setLineDash([]);
      ctx.globalAlpha = 0.6;
      for (const { dataset, element: { x }, raw } of points(chart)) {
        if (!raw.ci) continue;
        const [low, high] = raw.ci.map((c) => y.getPixelForValue(c));
        ctx.strokeStyle = dataset.borderColor;
        stroke([x - 4, low, x + 4, low], [x - 4, high, x + 4, high], [x, low, x, high]);
      }
      ctx.restore();
    },
    afterDatasetsDraw(chart) {
      const { ctx, chartArea: a, scales: { y } } = chart;
      for (const [value, text, side] of spec.marks ?? []) {
        label(chart, text, side === "left" ? a.left + 6 : a.right - 6, y.getPixelForValue(value) - 3, side);
      }
      if (spec.hasBound) {
        label(chart, "No code can be here", a.left + 12, a.bottom - 26, "left");
        label(chart, "(Gaussian model)", a.left + 12, a.bottom - 10, "left");
      }
      for (const { element, raw } of points(chart)) {
        if (raw.v.codec !== answer) continue;
        ctx.save();
        ctx.strokeStyle = css("--ink");
        ctx.lineWidth = 1.5;
        ctx.beginPath();
        ctx.arc(element.x, element.y, 11, 0, 2 * Math.PI);
        ctx.stroke();
        ctx.restore();
      }
    },
  });

  function* points(chart) {
    for (const [i, dataset] of chart.data.datasets.entries()) {
      if (!dataset.isLimit && chart.isDatasetVisible(i)) {
        for (const [j, element] of chart.getDatasetMeta(i).data.entries()) yield { dataset, element, raw: dataset.data[j] };
      }
    }
  }

  function hatch() {
    const tile = document.createElement("canvas");
    tile.width = tile.height = 8;
    const ctx = tile.getContext("2d");
    ctx.fillStyle = css("--shade");
    ctx.fillRect(0, 0, 8, 8);
    ctx.strokeStyle = css("--hatch");
    ctx.beginPath();
    for (const d of [-8, 0, 8]) { ctx.moveTo(d, 8); ctx.lineTo(d + 8, 0); }
    ctx.stroke();
    return ctx.createPattern(tile, "repeat");
  }

  // Sorts the variants into those that the chart can show and those that it can only name.
  function place(spec, axis) {
    const shown = [], beyond = [], exact = [], unknown = [];
    for (const v of data.variants) {
      const x = bitsOf(v, axis), y = spec.y(v);
      if (!isNum(x) || !isNum(y)) unknown.push(v);
      else if (x > MAX_BITS) beyond.push(v);
      else if (spec.log && y <= 0) exact.push(v);
      else shown.push({ x, y, v, ci: spec.ci?.(v)?.every(isNum) ? spec.ci(v) : null });
    }
    return { shown, beyond, exact, unknown };
  }

  function yRange(spec, shown, limit) {
    const ys = shown.map((p) => p.y);
    if (spec.log) {
      const right = Math.max(...shown.map((p) => p.x));
      const reached = limit.filter((p) => p.x <= right).map((p) => p.y);
      // A limit that falls away steeply may not squeeze the points.
      const least = Math.min(...ys);
      const low = Math.max(Math.min(least, ...reached), least / 50) / 1.5, high = Math.max(...ys, ...reached) * 1.4;
      return [Math.min(low, high / 12), high];
    }
    // Bars count too, but wild ones may not squeeze the points.
    const bars = shown.flatMap((p) => p.ci ?? []).map((c) => Math.min(Math.max(c, -0.5), 1.6));
    return [Math.min(-0.06, ...ys.map((y) => y - 0.05), ...bars.map((c) => c - 0.02)),
      Math.max(1.1, ...ys.map((y) => y + 0.08), ...bars.map((c) => c + 0.04))];
  }

  // 1, 2, 5 per power of ten; over many powers only 1.
  function logTicks(scale) {
    const from = Math.floor(Math.log10(scale.min)), to = Math.ceil(Math.log10(scale.max));
    scale.ticks = [];
    for (let power = from; power <= to; power += 1) {
      for (const lead of to - from > 5 ? [1] : [1, 2, 5]) {
        const value = Number(`${lead}e${power}`);
        if (value >= scale.min && value <= scale.max) scale.ticks.push({ value });
      }
    }
  }

  function tooltip(spec) {
    const wrap = (text) => text.match(/.{1,38}(?:,|$)|.{1,38}/g) ?? [text];
    return {
      displayColors: false, padding: 10, backgroundColor: css("--bg"), borderColor: css("--muted"), borderWidth: 1,
      titleColor: css("--ink"), bodyColor: css("--ink"), bodySpacing: 3,
      callbacks: {
        title: ([item]) => (item?.dataset.isLimit ? "limit line" : item ? wrap(nameOf(item.raw.v)) : ""),
        label: ({ dataset, raw }) => {
          if (dataset.isLimit) return [`${num(raw.x, 3)} bits:`, spec.limitText(raw.y)];
          const { v, y, ci } = raw;
          return [spec.text(y), ci && interval(ci), spec.extra?.(v),
            `${num(v.effective_bpw_linear, 3)} bits in the linear sites`, `${num(v.effective_bpw_total, 3)} bits, whole artifact`,
            `${bytes(v.bytes)} on disk`].filter(Boolean);
        },
      },
    };
  }

  function scales(spec, axis, right, [min, max]) {
    const common = { grid: { color: css("--grid"), drawTicks: false }, border: { color: css("--rule") } };
    const text = `Effective bits per weight, ${axis === "linear" ? "linear sites" : "whole artifact"}`;
    return {
      x: {
        type: "linear", min: 0, max: right, ...common,
        title: { display: true, text, color: css("--ink") },
        ticks: { includeBounds: false, stepSize: right > 2 ? 0.5 : undefined, color: css("--muted"), padding: 6 },
      },
      y: {
        type: spec.log ? "logarithmic" : "linear", min, max, ...common,
        title: { display: true, text: spec.title(), color: css("--ink") },
        ticks: { includeBounds: false, autoSkip: false, color: css("--muted"), padding: 10, callback: spec.log ? String : (y) => pct(y, 0) },
        ...(spec.log && { afterBuildTicks: logTicks }),
      },
    };
  }

  function draw(spec) {
    const canvas = byId(`chart-${spec.id}`);
    if (!canvas) return;
    const axis = spec.axis ?? state.axis;
    const placed = place(spec, axis);
    const { shown } = placed;
    leftOut(spec, axis, placed);
    legend(spec, shown);
    canvas.parentElement.hidden = !shown.length;
    if (!shown.length) return;

    const right = Math.max(1, Math.ceil(Math.max(...shown.map((p) => p.x)) * 10.5) / 10);
    const limit = spec.limit().filter((p) => isNum(p.x) && isNum(p.y) && (!spec.log || p.y > 0));

    const datasets = [...series].map(([name, { colour, shape }]) => ({
      label: name, hidden: state.hidden.has(name),
      data: shown.filter((p) => p.v.name === name).sort((a, b) => a.x - b.x),
      borderColor: css(colour), backgroundColor: css(colour), borderWidth: 2, clip: 8,
      pointStyle: shape.point, rotation: shape.rotation ?? 0, pointRadius: shape.line ? 6 : 5.5,
      pointHoverRadius: 8, pointHitRadius: 8, pointBorderWidth: shape.line ? 2.5 : 1,
    }));
    spec.hasBound = Boolean(spec.bound && limit.length);
    if (limit.length) {
      datasets.push({
        label: "limit", isLimit: true, data: limit, order: 1, fill: spec.bound ? "start" : false, backgroundColor: hatch(),
        borderColor: css("--limit"), borderWidth: 3, borderDash: [9, 6],
        pointRadius: 0, pointHoverRadius: 4, pointHitRadius: 3, pointStyle: "circle",
      });
    }
    const options = {
      animation: false, maintainAspectRatio: false, responsive: true, color: css("--ink"),
      interaction: { mode: "nearest", intersect: true },
      layout: { padding: { top: 6, right: 8 } },
      scales: scales(spec, axis, right, yRange(spec, shown, limit)),
      plugins: { legend: { display: false }, tooltip: tooltip(spec) },
    };
    if (spec.chart) {
      spec.chart.data = { datasets };
      spec.chart.options = options;
      spec.chart.update();
    } else {
      spec.chart = new Chart(canvas, { type: "line", data: { datasets }, options, plugins: [annotations(spec)] });
    }
  }

  function leftOut(spec, axis, { shown, beyond, exact, unknown }) {
    const withValue = (v) => `${nameOf(v)} (${num(bitsOf(v, axis), 3)} bits): ${spec.text(spec.y(v))}`;
    const lines = [
      [beyond, `Not on the chart, more than ${MAX_BITS} bits: `, withValue],
      [exact, "Not on the chart, exactly 0 (a logarithmic axis has no 0): ", withValue],
      [unknown, "No value: ", nameOf],
    ];
    byId(`left-out-${spec.id}`).replaceChildren(...lines.filter(([list]) => list.length).map(([list, lead, say]) => {
      const p = document.createElement("p");
      p.textContent = `${lead}${list.map(say).join("; ")}.`;
      return p;
    }));
    if (!shown.length) byId(`left-out-${spec.id}`).prepend("There is no point to draw. ");
  }

  // ---- legend: buttons that hide a series in all charts ----------------------------

  function swatch({ colour, shape }) {
    const paths = shape
      ? [["M0 8h30", shape === DIAMOND ? 0 : 2], [shape.path, shape.line ? 2.5 : 1, !shape.line]]
      : [["M0 8h30", 3, false, "7 4.5"]];
    const make = (tag, attributes) => {
      const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
      Object.entries(attributes).forEach(([key, value]) => node.setAttribute(key, value));
      return node;
    };
    const box = make("svg", { viewBox: "0 0 30 16", "aria-hidden": "true" });
    const paint = `var(${colour})`;
    box.append(...paths.map(([d, width, filled, dash = "none"]) => make("path", {
      d, "stroke-width": width, "stroke-dasharray": dash, stroke: paint, fill: filled ? paint : "none",
    })));
    return box;
  }

  function toggle(name) {
    if (!state.hidden.delete(name)) state.hidden.add(name);
    drawAll();
  }

  function legend(spec, shown) {
    const box = byId(`legend-${spec.id}`);
    if (!box.childElementCount) {
      for (const [name, style] of series) {
        const button = Object.assign(document.createElement("button"), { type: "button", title: "Show or hide in all charts" });
        button.dataset.series = name;
        button.append(swatch(style), style.label);
        button.addEventListener("click", () => toggle(name));
        box.append(button);
      }
      const entry = document.createElement("span");
      entry.append(swatch({ colour: "--limit" }), "limit line");
      if (spec.limit().length) box.append(entry);
    }
    for (const button of box.querySelectorAll("button")) {
      button.hidden = !shown.some((p) => p.v.name === button.dataset.series);
      button.setAttribute("aria-pressed", String(!state.hidden.has(button.dataset.series)));
    }
    box.hidden = !shown.length;
  }

  const drawAll = () => charts.forEach(draw);

  // ---- heat map: the template wrote one variant, the switches fill in others --------

  function drawHeat() {
    const table = byId("heat");
    if (!table) return;
    const v = data.variants[Number(byId("heat-variant").value)];
    const errors = v.site_errors.map((e) => e?.[state.heatSpace]);
    const known = errors.filter(isNum);
    const low = known.length ? Math.min(...known) : 0;
    const high = known.length ? Math.max(...known, 2 * low) : 1;
    table.querySelectorAll("tbody td").forEach((td, i) => {
      const e = errors[i];
      td.textContent = num(e, 2);
      td.title = `${data.sites[i]}: ${isNum(e) ? e : "–"}`;
      td.classList.toggle("none", !isNum(e));
      td.style.setProperty("--e", isNum(e) && high > low ? (e - low) / (high - low) : 0);
    });
    byId("heat-name").textContent = v.label;
    byId("heat-space").textContent = state.heatSpace;
    byId("heat-lo").textContent = num(low, 2);
    byId("heat-hi").textContent = num(high, 2);
  }

  // ---- sortable tables ------------------------------------------------------------------

  function makeSortable(table) {
    const body = table.tBodies[0];
    const heads = [...table.querySelectorAll("th[data-sort]")]; // document order = order of the columns
    const key = (row, column) => {
      const cell = row.cells[column];
      if (cell.dataset.v !== undefined) return Number(cell.dataset.v);
      return cell.matches(".text") ? cell.textContent : null;
    };
    heads.forEach((th, column) => {
      const button = Object.assign(document.createElement("button"), { type: "button" });
      button.append(...th.childNodes);
      th.append(button);
      button.addEventListener("click", () => {
        const up = th.getAttribute("aria-sort") !== "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        th.setAttribute("aria-sort", up ? "ascending" : "descending");
        const rows = [...body.rows].map((row) => ({ row, k: key(row, column) }));
        rows.sort((a, b) => {
          if (a.k === null || b.k === null) return (a.k === null) - (b.k === null); // unknown values stay last
          const order = typeof a.k === "number" ? a.k - b.k : a.k.localeCompare(b.k);
          return up ? order : -order;
        });
        body.append(...rows.map(({ row }) => row));
      });
    });
  }

  // ---- wiring -------------------------------------------------------------------------

  function onSwitch(group, key, redraw) {
    const inputs = document.querySelectorAll(`input[name^="${group}"]`);
    inputs.forEach((input) => input.addEventListener("change", () => {
      state[key] = input.value;
      inputs.forEach((twin) => { twin.checked = twin.value === input.value; });
      redraw();
    }));
  }

  document.querySelectorAll(".switch, .pick, .canvas, .js-only").forEach((node) => { node.hidden = false; });
  document.querySelectorAll(".switch input").forEach((input) => { input.checked = input.defaultChecked; });
  document.querySelectorAll(".pick select").forEach((select) => { select.closest(".pick").hidden = select.options.length < 2; });
  onSwitch("axis-", "axis", drawAll); // the switch of both charts at once
  onSwitch("space-error", "errorSpace", drawAll);
  onSwitch("space-heat", "heatSpace", drawHeat);
  byId("task")?.addEventListener("change", (event) => { state.task = Number(event.target.value); drawAll(); });
  byId("heat-variant")?.addEventListener("change", drawHeat);
  state.task = Number(byId("task")?.value ?? 0); // browsers restore it on reload
  document.querySelectorAll("table.sortable").forEach(makeSortable);

  Chart.defaults.font.family = getComputedStyle(document.body).fontFamily;
  Chart.defaults.font.size = 12.5;
  drawAll();
  drawHeat();

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  let opened = [];
  const print = (on) => {
    root.classList.toggle("printing", on); // light colours
    if (on) opened = [...document.querySelectorAll("details:not([open])")];
    opened.forEach((details) => { details.open = on; });
    drawAll();
  };
  addEventListener("beforeprint", () => print(true));
  addEventListener("afterprint", () => print(false));
})();
