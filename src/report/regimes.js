// The page of `forback regimes`: tables and charts from the numbers in #report-data.
(() => {
  "use strict";
  const { data, query, $, is, fixed, percent, whole, iso, label, words, plural, element, table, pairs, options, faint, ink, axis, draw, nothing, contents, run, finish } = page;

  const KINDS = { out_of_sample: "out of sample", in_sample: "filtered, whole-sample parameters", smoothed: "smoothed" };
  const SHADES = ["accent", "mid", "grey", "ink"];
  const single = data.assets.length === 1;
  const asset = () => (data.all && $("asset").value === "all" ? data.all : data.assets[+$("asset").value] || data.assets[0]);
  const model = () => data.models[asset().model];
  const together = () => asset() === data.all;
  const state = () => Math.min(+$("state").value || 0, asset().states - 1);
  const nameOf = (k, n) => `${k} ${n === 1 ? "only" : k === 0 ? "calm" : k === n - 1 ? "turbulent" : "middle"}`;
  const day = data.time.map(iso);
  // Calm is cool, turbulent is warm; between them by hue.
  const hue = (k, n) => (n < 2 ? ink.accent : `hsl(${Math.round(200 - (185 * k) / (n - 1))} 75% ${k === 0 ? 42 : 50}%)`);

  // Probabilities [K][points] as numbers, null where there are none.
  const probabilities = (of, kind) => {
    const shown = of[kind].map((list) => list.map((p) => (p < 0 ? null : p / 1000)));
    const last = day.map((_, i) => (shown.some((list) => list[i] === null) ? null : Math.max(0, 1 - shown.reduce((sum, list) => sum + list[i], 0))));
    return [...shown, of.states === 1 ? day.map(() => 1) : last];
  };
  const there = (of, kind) => of.states === 1 || of[kind].some((list) => list.some((p) => p >= 0));
  const likeliest = (p) => day.map((_, i) => (p[0][i] === null ? null : p.reduce((best, list, k) => (list[i] > p[best][i] ? k : best), 0)));

  // ---- header -------------------------------------------------------------------------------------------------

  const header = () => {
    $("heading").textContent = data.title;
    $("doc").textContent = "Hidden Markov models; states are ordered by volatility, calmest first.";
    pairs("facts", data.facts);
    $("verdict").replaceChildren(...verdict().map((text) => element("li", text)));
    options("asset", [...(data.all ? [["all", data.all.name]] : []), ...data.assets.map((a, i) => [String(i), a.name])], query.get("asset") || (data.all ? "all" : "0"));
    const found = data.assets.findIndex((a) => a.name === query.get("asset"));
    if (found >= 0) $("asset").value = String(found);
    $("asset").parentElement.hidden = single;
    states(query.get("state"));
    const kinds = Object.entries(KINDS).filter(([kind]) => data.assets.some((a) => there(a, kind)));
    options("price-by", kinds.filter(([kind]) => kind !== "in_sample"), query.get("by") || "smoothed");
    if (query.get("log") === "0") $("price-log").checked = false;
    for (const id of ["asset", "state", "price-by", "price-log"]) $(id).addEventListener("change", () => { if (id === "asset") states($("state").value); parts.forEach((part) => part()); });
    $("selection").hidden = data.models.every((m) => m.candidates.length < 2);
    $("assets").hidden = single;
  };
  const states = (wanted) => {
    const n = asset().states;
    options("state", [...Array(n).keys()].map((k) => [String(k), nameOf(k, n)]), wanted === null || +wanted >= n ? String(n - 1) : wanted);
  };
  const verdict = () => {
    const lines = [], open = data.models.filter((m) => !m.chosen.converged).length, o = data.out_of_sample;
    if (open) lines.push(`${plural(open, "model")} of ${whole(data.models.length)} did not converge.`);
    if (o && o.next_bar && o.next_bar.length > 1) {
      const calm = o.next_bar[0], wild = o.next_bar[o.next_bar.length - 1];
      lines.push(`Out of sample, the bar after a calm one had a volatility of ${percent(calm.volatility)} a year, after a turbulent one ${percent(wild.volatility)}.`);
      if (is(o.agreement)) lines.push(`On ${percent(o.agreement)} of the bars the most likely state was the one that hindsight gives.`);
    }
    if (data.missing) lines.push(`Nothing out of sample: ${data.missing}.`);
    return lines;
  };

  const summary = () => {
    const m = model(), n = asset().states, own = m.per_asset.find((a) => a.asset === asset().name);
    const several = together() && data.models.length > 1;
    const shown = several ? medians() : own ? own.states : m.states;
    $("states-lead").textContent = several ? `Medians over the ${whole(data.models.length)} models, by state.` : m.assets.length > 1 ? `${data.names[asset().model]}: ${own ? "this asset's own numbers under it" : "means over the assets"}.` : `${data.names[asset().model]}.`;
    table("states-table", ["state", "mean / year", "volatility / year", "expected bars", "observed bars", "occupancy"],
      shown.map((s, k) => ({ cells: [nameOf(k, n), percent(s.mean), percent(s.volatility), is(s.duration) ? fixed(s.duration, 1) : "never left", fixed(asset().observed[k], 1), percent(s.occupancy)] })), 1);
    const c = m.chosen;
    $("states-note").textContent = several ? "" : `Log-likelihood ${fixed(c.log_likelihood, 2)}, AIC ${fixed(c.aic, 1)}, BIC ${fixed(c.bic, 1)}; ${c.converged ? "converged after" : "not converged after"} ${plural(m.iterations, "iteration")} on ${plural(m.observations, "observation")}. Means, volatilities and occupancies are weighted by smoothed probabilities.`;
    const tiles = shown.slice(0, 6).map((s, k) => [nameOf(k, n), percent(s.volatility), `volatility; mean ${percent(s.mean)}, ${percent(s.occupancy)} of the time`, k === state()]);
    $("tiles").replaceChildren(...tiles.map(([name, value, more, accent]) => {
      const tile = element("div", undefined, "tile");
      tile.append(element("div", name, "label"), element("div", value, accent ? "value accent" : "value"), element("div", more, "more"));
      return tile;
    }));
  };
  const median = (list) => { const sorted = list.filter(is).sort((a, b) => a - b); return sorted.length ? sorted[sorted.length >> 1] : NaN; };
  const medians = () => {
    const n = data.all.states, alike = data.models.filter((m) => m.states.length === n);
    return [...Array(n).keys()].map((k) => Object.fromEntries(["mean", "volatility", "duration", "occupancy"].map((key) => [key, median(alike.map((m) => m.states[k][key]))])));
  };

  // ---- price --------------------------------------------------------------------------------------------------

  // A line per state: the stretches that end in it, with gaps between.
  const price = () => {
    const of = asset(), n = of.states, by = there(of, $("price-by").value) ? $("price-by").value : "smoothed", path = likeliest(probabilities(of, by)), log = $("price-log").checked && of.price.every((p) => p > 0);
    if (!of.price.every(is)) return nothing("price-chart", "Levels of different assets have no common index.");
    const traces = [...Array(n + 1).keys()].map((k) => ({ type: "scatter", mode: "lines", name: k < n ? nameOf(k, n) : "no probability yet", x: [], y: [], line: { width: 1.8, color: k < n ? hue(k, n) : faint(ink.grey, 0.6) }, hovertemplate: k < n ? `%{x}<br>%{y:.4~g}<br>${label(nameOf(k, n))}<extra></extra>` : "%{x}<br>%{y:.4~g}<extra></extra>" }));
    let before = -1;
    for (let i = 1; i < day.length; i++) {
      const k = path[i] === null ? n : path[i], t = traces[k];
      if (k !== before) {
        if (t.x.length) { t.x.push(day[i - 1]); t.y.push(null); }
        t.x.push(day[i - 1]);
        t.y.push(of.price[i - 1]);
      }
      t.x.push(day[i]);
      t.y.push(of.price[i]);
      before = k;
    }
    const shown = traces.filter((t) => t.x.length);
    draw("price-chart", shown, { hovermode: "closest", xaxis: axis({ type: "date" }), yaxis: axis({ type: log ? "log" : "linear", nticks: 8, title: together() ? "mean of log prices, first bar = 100" : "" }) });
    $("price-legend").replaceChildren(...shown.map((t) => {
      const name = element("span", t.name), key = element("i");
      key.style.borderTop = `3px solid ${t.line.color}`;
      name.prepend(key);
      return name;
    }));
    $("price-lead").textContent = by === "smoothed" ? "Coloured by the most likely state in hindsight: smoothed probabilities know what came after." : "Coloured by the most likely state as it was known at the bar.";
    $("price-note").textContent = data.run > 1 ? `Points are ${plural(data.run, "bar")} apart or less.` : "";
  };

  // ---- probabilities ------------------------------------------------------------------------------------------

  const probability = () => {
    const of = asset(), k = state(), n = of.states;
    const style = { smoothed: { color: faint(ink.grey, 0.9), width: 1.2 }, in_sample: { color: ink.mid, width: 1, dash: "dot" }, out_of_sample: { color: ink.accent, width: 1.6 } };
    const traces = ["smoothed", "in_sample", "out_of_sample"].filter((kind) => there(of, kind)).map((kind) => ({
      type: "scatter", mode: "lines", name: KINDS[kind], x: day, y: probabilities(of, kind)[k].map((p) => (p === null ? null : 100 * p)), line: style[kind], fill: kind === "smoothed" ? "tozeroy" : "none", fillcolor: faint(ink.grey, 0.18),
      visible: kind === "in_sample" && there(of, "out_of_sample") ? "legendonly" : true, hovertemplate: "%{y:.0f} %",
    }));
    draw("probability-chart", traces, { showlegend: true, hovermode: "x unified", margin: { l: 52, r: 14, t: 34, b: 40 }, xaxis: axis({ type: "date" }), yaxis: axis({ range: [-2, 102], ticksuffix: " %", title: `P(${nameOf(k, of.states)})` }) });
    const mean = data.run > 1 ? ` Each point is the mean of at most ${plural(data.run, "bar")}.` : "";
    const other = of.known && of.known !== n ? ` Out of sample is not shown: the first refit chose ${plural(of.known, "state")}, the whole sample ${n}.` : "";
    $("probability-note").textContent = (together() ? "Mean over the assets." : "") + mean + other;
  };

  // ---- transitions --------------------------------------------------------------------------------------------

  const transitions = () => {
    const of = asset(), n = of.states, names = [...Array(n).keys()].map((k) => nameOf(k, n));
    const several = together() && data.models.length > 1, alike = data.models.filter((m) => m.states.length === n);
    const matrix = several ? names.map((_, i) => names.map((_, j) => median(alike.map((m) => m.transition[i][j])))) : model().transition;
    const z = matrix.map((row) => row.map((p) => 100 * p));
    const notes = z.flatMap((row, i) => row.map((p, j) => ({ x: names[j], y: names[i], text: p >= 99.95 ? fixed(p, 2) : p > 0 && p < 0.05 ? "&lt; 0.1" : fixed(p, 1), showarrow: false, font: { color: p > 50 ? ink.page : ink.ink, size: n > 5 ? 10 : 13 } })));
    draw("matrix-chart", [{ type: "heatmap", x: names, y: names, z, zmin: 0, zmax: 100, colorscale: [[0, ink.low], [0.5, ink.mid], [1, ink.high]], showscale: false, xgap: 2, ygap: 2, hovertemplate: "from %{y}<br>to %{x}<br>%{z:.3f} %<extra></extra>" }],
      { annotations: n > 10 ? [] : notes, xaxis: axis({ title: "to", type: "category" }), yaxis: axis({ title: "from", type: "category", autorange: "reversed" }) });
    const expected = several ? medians().map((s) => s.duration) : model().states.map((s) => s.duration);
    draw("duration-chart", [
      { type: "bar", name: "expected", x: names, y: expected.map((d) => (is(d) ? d : null)), marker: { color: names.map((_, k) => hue(k, n)) }, hovertemplate: "%{y:.1f} bars" },
      { type: "bar", name: "observed", x: names, y: of.observed, marker: { color: names.map((_, k) => hue(k, n)), opacity: 0.4 }, hovertemplate: "%{y:.1f} bars" },
    ], { barmode: "group", xaxis: axis({ type: "category" }), yaxis: axis({ title: "bars", rangemode: "tozero" }) });
    $("transitions-lead").textContent = several ? "Medians over the models: how likely a state is followed by which, and how long it lasts." : "How likely a state is followed by which, and how long it lasts.";
    $("duration-note").textContent = "Full bars: expected, 1 / (1 − probability of staying). Faint bars: mean run of the most likely smoothed state.";
  };

  // ---- across assets ------------------------------------------------------------------------------------------

  const across = () => {
    if (single) return;
    const kind = there(data.all, "out_of_sample") ? "out_of_sample" : "smoothed", n = data.all.states;
    const p = probabilities(data.all, kind);
    draw("shares-chart", p.map((list, k) => ({ type: "scatter", mode: "lines", stackgroup: "one", name: nameOf(k, n), x: day, y: list.map((v) => (v === null ? null : 100 * v)), line: { width: 0.5, color: hue(k, n) }, hovertemplate: "%{y:.0f} %" })),
      { hovermode: "x unified", xaxis: axis({ type: "date" }), yaxis: axis({ range: [0, 100], ticksuffix: " %" }) });
    $("shares-title").textContent = `Mean probability of each state, ${KINDS[kind]}`;
    const points = data.models.flatMap((m) => (m.per_asset.length ? m.per_asset.map((a) => [a.asset, a.states]) : [[m.assets[0], m.states]])).filter(([, s]) => is(s[0].volatility));
    if (!points.length) return nothing("spread-chart", "No returns, no volatilities.");
    const at = (k) => points.map(([, s]) => 100 * s[k(s)].volatility);
    draw("spread-chart", [{ type: "scatter", mode: "markers", x: at(() => 0), y: at((s) => s.length - 1), text: points.map(([name]) => label(name)), marker: { size: 6, color: faint(ink.accent, 0.6) }, hovertemplate: "%{text}<br>calm %{x:.1f} %<br>turbulent %{y:.1f} %<extra></extra>" }],
      { xaxis: axis({ title: "calmest state", ticksuffix: " %" }), yaxis: axis({ title: "wildest state", ticksuffix: " %" }) });
  };

  // ---- number of states ---------------------------------------------------------------------------------------

  const selection = () => {
    if ($("selection").hidden) return;
    const several = together() && data.models.length > 1, m = model();
    if (several) {
      const counts = m.candidates.map((c) => data.models.filter((x) => x.chosen.states === c.states).length);
      table("selection-table", ["states", "models that chose it"], m.candidates.map((c, i) => ({ cells: [whole(c.states), whole(counts[i])] })));
      return;
    }
    table("selection-table", ["states", "log-likelihood", "parameters", "AIC", "BIC", "ICL", ""], m.candidates.map((c) => ({ cells: [whole(c.states), fixed(c.log_likelihood, 2), whole(c.parameters), fixed(c.aic, 1), fixed(c.bic, 1), fixed(c.icl, 1), c.converged ? "" : "not converged"], strong: c.states === m.chosen.states })));
  };

  // ---- provenance ---------------------------------------------------------------------------------------------

  const provenance = () => {
    const p = data.provenance, d = p.data || {};
    const lines = [["Version", p.version && `forback ${p.version}`], ["Command", p.command && p.command.join(" ")], ["Device", p.device], ["Seed", String(p.seed)], ["Data", d.sources && d.sources.join(", ")], ["SHA-256", d.sha256], ["Price", d.price],
      ["Dropped", d.dropped && d.dropped.length ? d.dropped.slice(0, 12).map((x) => `${x.symbol} (${x.reason})`).join("; ") + (d.dropped.length > 12 ? `; and ${whole(d.dropped.length - 12)} more` : "") : ""],
      ["Filled", d.filled && d.filled.length ? plural(d.filled.reduce((sum, x) => sum + x.cells, 0), "cell") : ""], ["Notes", d.notes && d.notes.join("; ")],
      ["Features", p.features && p.features.join(", ")], ["Emission", words(p.emission || "")], ["States", `${p.states}${String(p.states).includes("..") ? `, by ${p.criterion.toUpperCase()}` : ""}`], ["Restarts", whole(p.restarts)], ["Periods per year", fixed(p.periods_per_year, 1)]];
    pairs("provenance-list", lines.filter(([, text]) => text));
    $("provenance-json").textContent = JSON.stringify(p, null, 2);
  };

  const parts = [summary, price, probability, transitions, across, selection];
  header();
  run(parts);
  contents();
  provenance();
  finish(["heading", "states-lead", "states-note", "price-lead", "price-note", "probability-note"]);
})();
