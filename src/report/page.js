// What every page shares: numbers as text, elements, charts in the page's colours, and what tests read back.
const page = (() => {
  "use strict";
  const errors = [];
  window.addEventListener("error", (e) => errors.push(String(e.message)));
  window.addEventListener("unhandledrejection", (e) => errors.push(String(e.reason)));
  const complain = console.error;
  console.error = (...words) => { errors.push(words.join(" ")); complain.apply(console, words); };

  const data = JSON.parse(document.getElementById("report-data").textContent);
  const query = new URLSearchParams(location.search);
  const $ = (id) => document.getElementById(id);
  const root = document.documentElement;
  if (["light", "dark"].includes(query.get("theme"))) root.dataset.theme = query.get("theme");

  // ---- numbers as text ----------------------------------------------------------------------------------------

  const is = (x) => typeof x === "number" && Number.isFinite(x);
  const minus = (text) => (/^-0(\.0+)?$/.test(text) ? text.slice(1) : text.replace(/^-/, "\u2212"));
  const fixed = (x, digits) => (is(x) ? minus(x.toLocaleString("en-GB", { minimumFractionDigits: digits, maximumFractionDigits: digits })) : "–");
  const ratio = (x) => fixed(x, 2);
  const percent = (x) => (is(x) ? fixed(100 * x, Math.abs(x) >= 10 ? 0 : 1) + "\u00a0%" : "–");
  const whole = (x) => fixed(x, 0);
  const plain = (x) => (is(x) ? minus(String(+x.toPrecision(6))) : "–");
  const iso = (seconds) => new Date(seconds * 1000).toISOString().replace("T00:00:00.000Z", "").replace(".000Z", "").replace("T", " ");
  // Labels inside charts are read as markup.
  const label = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const words = (name) => name.replace(/_/g, " ");
  const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);
  const plural = (n, word, many = `${word}s`) => `${whole(n)} ${n === 1 ? word : many}`;

  // ---- elements -----------------------------------------------------------------------------------------------

  const element = (tag, text, name) => {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (name) made.className = name;
    return made;
  };
  const table = (where, head, rows, texts = 0) => {
    const made = element("table"), top = element("tr");
    head.forEach((text, i) => top.append(element("th", text, i < texts ? "text" : "")));
    made.append(element("thead"), element("tbody"));
    made.tHead.append(top);
    for (const { cells, strong } of rows) {
      const row = element("tr", undefined, strong ? "strong" : "");
      cells.forEach((text, i) => row.append(element("td", text, i < texts ? "text" : "")));
      made.tBodies[0].append(row);
    }
    $(where).replaceChildren(made);
  };
  const pairs = (where, list) => $(where).replaceChildren(...list.flatMap(([name, text]) => [element("dt", name), element("dd", text)]));
  const options = (where, list, chosen) => {
    $(where).replaceChildren(...list.map(([value, text]) => {
      const made = element("option", text);
      made.value = value;
      return made;
    }));
    if (list.some(([value]) => value === chosen)) $(where).value = chosen;
  };

  // ---- charts -------------------------------------------------------------------------------------------------

  const coarse = matchMedia("(pointer: coarse)").matches, pointer = matchMedia("(hover: hover)").matches;
  const probe = element("span");
  probe.hidden = true;
  document.body.append(probe);
  const colour = (name) => { probe.style.color = `var(--${name})`; return getComputedStyle(probe).color; };
  const faint = (rgb, alpha) => rgb.replace(/^rgb\((.*)\)$/, `rgba($1, ${alpha})`);
  const ink = {};
  const repaint = () => { for (const name of ["page", "panel", "ink", "muted", "line", "grey", "accent", "low", "mid", "high"]) ink[name] = colour(name); };
  repaint();

  const axis = (more = {}) => ({
    gridcolor: ink.line, zerolinecolor: ink.line, linecolor: ink.line, tickcolor: ink.line, automargin: true, fixedrange: coarse,
    ...more, title: { text: more.title || "", standoff: 10, font: { size: 12, color: ink.muted } },
  });
  const charts = {};
  const draw = (id, traces, layout) => {
    const where = $(id);
    const { font } = getComputedStyle(document.body);
    const all = {
      autosize: true, margin: { l: 52, r: 14, t: 10, b: 40 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: font.replace(/^.*?\d+px(?:\/\S+)?\s+/, ""), size: 12, color: ink.muted }, dragmode: coarse ? false : "zoom", showlegend: false,
      hoverlabel: { bgcolor: ink.panel, bordercolor: ink.line, font: { color: ink.ink, size: 12 }, align: "left" },
      legend: { orientation: "h", x: 0, xanchor: "left", y: 1.02, yanchor: "bottom", font: { color: ink.ink } },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: ink.grey, activecolor: ink.accent },
      ...layout,
    };
    const buttons = ["zoom2d", "pan2d", "select2d", "lasso2d", "zoomIn2d", "zoomOut2d", "autoScale2d"];
    Plotly.react(where, traces, all, { responsive: true, displaylogo: false, modeBarButtonsToRemove: buttons, displayModeBar: pointer ? "hover" : false });
    charts[id] = where;
  };
  const nothing = (id, text) => { $(id).replaceChildren(element("div", text, "nothing")); };
  const line = (x, y, x1, y1, style, more = {}) => ({ type: "line", x0: x, y0: y, x1, y1, line: style, layer: "above", ...more });

  // ---- the whole page -----------------------------------------------------------------------------------------

  const contents = () => {
    $("contents").replaceChildren(...[...document.querySelectorAll("section:not([hidden])")].map((section) => {
      const link = element("a", section.querySelector("h2").textContent);
      link.href = `#${section.id}`;
      return link;
    }));
  };

  // Draws all parts, and again when the light changes.
  const run = (parts) => {
    parts.forEach((part) => part());
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { repaint(); parts.forEach((part) => part()); });
  };

  // What the charts hold, read back from them, for tests.
  const finish = (ids) => {
    root.dataset.ready = String(Math.round(performance.now()));
    if (query.get("check") !== "1") return;
    const held = {};
    for (const [id, where] of Object.entries(charts)) {
      held[id] = {
        drawn: where.querySelectorAll(".trace, .hm image, .hm").length, height: where.clientHeight, width: where.clientWidth,
        traces: where.data.map((t) => ({ type: t.type, name: t.name || "", x: t.x, y: t.y, z: t.z, count: t.type === "heatmap" && t.customdata ? t.customdata.map((row) => row.map((c) => c[3])) : undefined })),
        yaxis: where.layout.yaxis.type || "linear",
      };
    }
    const texts = {};
    for (const id of ids) texts[id] = $(id).textContent;
    const summary = element("script", JSON.stringify({ held, texts, errors, ready_ms: performance.now(), page_width: root.scrollWidth, window_width: innerWidth, tables: document.querySelectorAll("table").length }).replace(/</g, "\\u003c"));
    summary.type = "application/json";
    summary.id = "report-check";
    document.body.append(summary);
  };

  return { errors, data, query, $, root, is, fixed, ratio, percent, whole, plain, iso, label, words, capital, plural, element, table, pairs, options, coarse, pointer, faint, ink, repaint, axis, charts, draw, nothing, line, contents, run, finish };
})();
