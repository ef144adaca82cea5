// The page: tables and charts from the numbers in #report-data. Draws everything before the load event.
(() => {
  "use strict";
  const { data, query, $, is, fixed, ratio, percent, whole, plain, iso, label, words, capital, plural, element, table, pairs, options, faint, ink, axis, draw, nothing, line, contents, run, finish } = page;

  const STATISTICS = [
    { name: "sharpe", title: "Sharpe ratio", show: ratio, factor: 1, best: 1 },
    { name: "total_return", title: "Total return", show: percent, factor: 100, unit: " %", best: 1 },
    { name: "max_drawdown", title: "Maximum drawdown", show: percent, factor: 100, unit: " %", best: -1 },
    { name: "turnover", title: "Turnover per year", show: (x) => fixed(x, 1), factor: 1, best: -1 },
  ];
  const titled = (name) => { const found = STATISTICS.find((s) => s.name === name); return found ? found.title.replace(/^[TM]/, (c) => c.toLowerCase()) : words(name); };
  const KINDS = { per_asset: data.assets > 1 ? "chosen per asset" : "chosen sets", pooled: data.assets > 1 ? "chosen for all assets" : "chosen sets, pooled", best_in_sample: "best set in sample", buy_and_hold: "buy and hold" };

  // ---- header -------------------------------------------------------------------------------------------------

  const curve = (kind) => data.curves.find((c) => c.kind === kind);
  const header = () => {
    $("strategy").textContent = `${data.strategy}: ${data.subtitle}`;
    $("doc").textContent = `${capital(data.doc)}.`;
    pairs("facts", data.facts);
    $("verdict").replaceChildren(...data.verdict.map((text) => element("li", text)));
    const tiles = [];
    const best = data.best[0], hold = curve("buy_and_hold");
    if (best) tiles.push(["Best of all, in sample", ratio(best.sharpe), `Sharpe, set ${whole(best.set)}${data.assets > 1 ? "; mean of assets" : ""}`]);
    if (data.luck && is(data.luck.expected_max_sharpe)) tiles.push(["Best by luck alone", ratio(data.luck.expected_max_sharpe), "Sharpe, expected"]);
    for (const kind of ["per_asset", "pooled"]) {
      const c = curve(kind);
      if (c) tiles.push([`${capital(KINDS[kind])}`, ratio(c.total.sharpe), `Sharpe, out of sample; return ${percent(c.total.total_return)}`, true]);
    }
    if (hold) tiles.push(["Buy and hold", ratio(hold.total.sharpe), `Sharpe; return ${percent(hold.total.total_return)}`]);
    if (data.luck && is(data.luck.deflated_sharpe)) tiles.push(["Deflated Sharpe", percent(data.luck.deflated_sharpe), "probability of more than luck"]);
    if (data.luck && is(data.luck.pbo)) tiles.push(["Overfitting", percent(data.luck.pbo), "probability (PBO)"]);
    $("tiles").replaceChildren(...tiles.map(([name, value, more, accent]) => {
      const tile = element("div", undefined, "tile");
      tile.append(element("div", name, "label"), element("div", value, accent ? "value accent" : "value"), element("div", more, "more"));
      return tile;
    }));
    const means = data.assets > 1 ? ", means over assets" : "";
    $("best-lead").textContent = `Ranked by ${titled(data.rank_by)} at ${plain(data.cost_bps)} bp${means}; chosen with hindsight, so not a forecast.`;
    const head = ["set", ...data.parameters.map(words), "Sharpe", "return", "drawdown", "turnover / year", "trades"];
    const cells = (b) => [whole(b.set), ...b.values.map(plain), ratio(b.sharpe), percent(b.total_return), percent(b.max_drawdown), fixed(b.turnover, 1), whole(b.trades)];
    table("best", head, data.best.map((b, i) => ({ cells: cells(b), strong: i === 0 })));
    contents();
  };

  // ---- parameter surface --------------------------------------------------------------------------------------

  const rough = (x) => (Number.isInteger(x) ? plain(x) : plain(+x.toPrecision(4)));
  const bins = (a) => a.from.map((from, i) => (from === a.to[i] ? plain(from) : `${rough(from)}–${rough(a.to[i])}`));
  // Few enough labels to read, whatever the number of bins.
  const ticks = (labels, most) => {
    const longest = Math.max(...labels.map((text) => text.length)), step = Math.ceil(labels.length / Math.max(3, Math.floor(most * Math.min(1, 8 / longest))));
    const at = labels.map((_, i) => i).filter((i) => i % step === 0);
    return { tickmode: "array", tickvals: at, ticktext: at.map((i) => labels[i]) };
  };
  const surfaceReady = () => {
    const names = data.axes.map((a, i) => [String(i), words(a.name)]);
    const index = (name, other) => { const i = data.axes.findIndex((a) => a.name === query.get(name)); return String(i < 0 ? other : i); };
    options("surface-x", names, index("x", 0));
    options("surface-y", names, index("y", Math.min(1, names.length - 1)));
    options("surface-stat", STATISTICS.map((s) => [s.name, s.title]), query.get("stat"));
    if (query.get("over") === "max") $("surface-over").value = "max";
    for (const id of ["x", "y", "stat", "over"]) $(`surface-${id}`).addEventListener("change", surface);
  };
  const surface = () => {
    if (!data.axes.length) {
      document.querySelector("#surface .controls").hidden = true;
      return nothing("surface-chart", "The grid varies no parameter: there is nothing to compare.");
    }
    const [x, y] = [+$("surface-x").value, +$("surface-y").value];
    const k = STATISTICS.findIndex((s) => s.name === $("surface-stat").value), stat = STATISTICS[k], over = $("surface-over").value;
    const map = data.surfaces.find((s) => s.x === Math.min(x, y) && s.y === Math.max(x, y));
    const cells = map[over][k];
    const [xs, ys] = [bins(data.axes[x]), bins(data.axes[y])];
    const columns = data.axes[map.x].from.length;
    const at = (row, column) => (x <= y ? row * columns + column : column * columns + row);
    let best = -1;
    cells.forEach((v, i) => { if (is(v) && (best < 0 || stat.best * v > stat.best * cells[best])) best = i; });
    const narrow = $("surface-chart").clientWidth < 560;
    const title = `${stat.title}, ${over === "mean" ? "mean" : "largest"}`;
    const shown = (v) => (is(v) ? v * stat.factor : null);
    if (x === y) {
      const numbers = xs.map((_, i) => i);
      draw("surface-chart", [
        { type: "scatter", mode: "lines+markers", x: numbers, y: cells.map(shown), line: { color: ink.accent, width: 2 }, marker: { size: 5 },
          customdata: xs.map((name, i) => [name, map.count[i], stat.show(cells[i])]), hovertemplate: `${words(data.axes[x].name)} %{customdata[0]}<br>%{customdata[2]}<br>%{customdata[1]:,} sets<extra></extra>` },
        { type: "scatter", mode: "markers", x: [best], y: [shown(cells[best])], marker: { size: 13, symbol: "circle-open", color: ink.ink, line: { width: 2 } }, hoverinfo: "skip" },
      ], { xaxis: axis({ title: words(data.axes[x].name), ...ticks(xs, narrow ? 6 : 12) }), yaxis: axis({ title, ticksuffix: stat.unit || "" }) });
    } else {
      const grid = (value) => ys.map((_, row) => xs.map((_, column) => value(at(row, column))));
      const column = x <= y ? best % columns : Math.floor(best / columns), row = x <= y ? Math.floor(best / columns) : best % columns;
      const scale = [[0, ink.low], [0.55, ink.mid], [1, ink.high]];
      if (stat.best < 0) { scale.reverse(); scale.forEach((s) => { s[0] = 1 - s[0]; }); }
      draw("surface-chart", [
        { type: "heatmap", x: xs.map((_, i) => i), y: ys.map((_, i) => i), z: grid((i) => shown(cells[i])), hoverongaps: false, colorscale: scale,
          customdata: grid((i) => [xs[x <= y ? i % columns : Math.floor(i / columns)], ys[x <= y ? Math.floor(i / columns) : i % columns], stat.show(cells[i]), map.count[i]]),
          hovertemplate: `${words(data.axes[x].name)} %{customdata[0]}<br>${words(data.axes[y].name)} %{customdata[1]}<br>%{customdata[2]}<br>%{customdata[3]:,} sets<extra></extra>`,
          colorbar: { thickness: 10, outlinewidth: 0, ticksuffix: stat.unit || "", tickfont: { color: ink.muted }, ...(narrow ? { orientation: "h", y: -0.22, yanchor: "top", len: 1 } : { len: 1, x: 1.01 }) } },
        { type: "scatter", mode: "markers", x: [column], y: [row], marker: { size: 15, symbol: "circle-open", color: ink.page, line: { width: 4 } }, hoverinfo: "skip" },
        { type: "scatter", mode: "markers", x: [column], y: [row], marker: { size: 15, symbol: "circle-open", color: ink.ink, line: { width: 2 } }, hoverinfo: "skip" },
      ], {
        margin: { l: 52, r: 14, t: 10, b: narrow ? 90 : 44 },
        xaxis: axis({ title: words(data.axes[x].name), showgrid: false, zeroline: false, range: [-0.5, xs.length - 0.5], ...ticks(xs, narrow ? 5 : 12) }),
        yaxis: axis({ title: words(data.axes[y].name), showgrid: false, zeroline: false, range: [-0.5, ys.length - 0.5], ...ticks(ys, 12) }),
      });
    }
    const empty = best < 0;
    const where = empty ? "" : x === y ? `${words(data.axes[x].name)} ${xs[best]}`
      : `${words(data.axes[map.x].name)} ${bins(data.axes[map.x])[best % columns]}, ${words(data.axes[map.y].name)} ${bins(data.axes[map.y])[Math.floor(best / columns)]}`;
    const unset = cells.some((v, i) => !is(v) && map.count[i] > 0), gaps = unset ? " Empty cells hold no set with a defined value." : cells.every(is) ? "" : " Empty cells hold no set.";
    const sense = stat.best > 0 ? "highest" : "lowest";
    $("surface-note").textContent = empty ? "No set has a defined value." :
      `${title} over the other parameters${data.assets > 1 ? ", means over assets" : ""}. The ring marks the ${sense} cell: ${where}, ${stat.show(cells[best])}, ${plural(map.count[best], "set")}.${gaps}`;
  };

  // ---- distribution -------------------------------------------------------------------------------------------

  const distribution = () => {
    const h = data.sharpe, defined = h.counts.reduce((a, b) => a + b, 0);
    if (!defined) return nothing("distribution-chart", "No set has a defined Sharpe ratio.");
    const marks = [["best set", h.best, ink.accent, "solid"], ["mean", h.mean, ink.grey, "dot"]];
    if (data.luck && is(data.luck.expected_max_sharpe)) marks.push(["expected best by luck", data.luck.expected_max_sharpe, ink.ink, "dash"]);
    marks.sort((a, b) => a[1] - b[1]);
    const from = h.first * h.width, to = (h.first + h.counts.length) * h.width;
    const lo = Math.min(from, ...marks.map((m) => m[1])), hi = Math.max(to, ...marks.map((m) => m[1])), pad = 0.04 * (hi - lo);
    const top = 12 + 18 * marks.length, bottom = 44, inside = $("distribution-chart").clientHeight - top - bottom;
    draw("distribution-chart", [{
      type: "bar", x: h.counts.map((_, i) => (h.first + i + 0.5) * h.width), y: h.counts, width: h.counts.map(() => h.width), marker: { color: ink.mid, line: { width: 0 } },
      customdata: h.counts.map((_, i) => [ratio((h.first + i) * h.width), ratio((h.first + i + 1) * h.width)]), hovertemplate: "%{customdata[0]} to %{customdata[1]}<br>%{y:,} sets<extra></extra>",
    }], {
      bargap: 0.02, margin: { l: 52, r: 14, t: top, b: bottom },
      xaxis: axis({ title: "annualised Sharpe ratio", range: [lo - pad, hi + pad], showgrid: false, zeroline: false }), yaxis: axis({ title: "sets", tickformat: ",d", nticks: 6 }),
      shapes: marks.map(([, x, color, dash], i) => line(x, 0, x, 1 + (20 + 18 * i) / inside, { color, width: 2, dash }, { yref: "paper" })),
      // A row of text per mark, left of its line and above the lines further left.
      annotations: marks.map(([name, x, color], i) => ({
        x, y: 1, yref: "paper", yshift: 2 + 18 * i, xshift: x < lo + 0.2 * (hi - lo) ? 4 : -4, text: `${name} ${ratio(x)}`, showarrow: false, yanchor: "bottom", font: { color, size: 12 },
        xanchor: x < lo + 0.2 * (hi - lo) ? "left" : "right",
      })),
    });
    const luck = data.luck;
    const parts = [`${plural(defined, "set")} counted in ${plural(h.counts.length, "bar")} of width ${plain(h.width)}${h.undefined ? `, ${whole(h.undefined)} without a defined ratio` : ""}.`];
    if (luck) {
      const level = percent(luck.level).replace(".0", "");
      if (is(luck.expected_max_sharpe)) parts.push(`Of ${is(luck.trials) ? plural(luck.trials, "set") : "as many sets"} without skill the best would be expected to show ${ratio(luck.expected_max_sharpe)}.`);
      if (is(luck.deflated_sharpe)) parts.push(`Probability that the best set's true ratio is above that (deflated Sharpe ratio): ${percent(luck.deflated_sharpe)}.`);
      if (is(luck.pbo)) parts.push(`Probability of back-test overfitting: ${percent(luck.pbo)}.`);
      if (luck.in_sample.every(is)) parts.push(`Best set's Sharpe ratio in sample, ${level} interval: ${ratio(luck.in_sample[0])} to ${ratio(luck.in_sample[1])}.`);
      if (luck.out_of_sample.every(is)) parts.push(`Out of sample: ${ratio(luck.out_of_sample[0])} to ${ratio(luck.out_of_sample[1])}.`);
      if (is(luck.minimum_years) && is(luck.years)) parts.push(`To be above luck at ${level} it would need ${fixed(luck.minimum_years, 1)} years; there are ${fixed(luck.years, 1)}.`);
    }
    $("distribution-note").textContent = parts.join(" ");
  };

  // ---- train against test -------------------------------------------------------------------------------------

  const cloud = (id, groups, fit) => {
    const all = groups.flatMap((g) => g.x.map((x, i) => [x, g.y[i]])).filter((p) => p.every(is));
    if (!all.length) return nothing(id, "No point is defined: the windows are too short for a Sharpe ratio, or nothing was traded.");
    const xs = all.map((p) => p[0]), bounds = [Math.min(...xs), Math.max(...xs)];
    const traces = groups.map((g) => ({ type: "scatter", mode: "markers", name: g.name, x: g.x, y: g.y, text: g.text, hovertemplate: "%{text}<br>train %{x:.2f}, test %{y:.2f}<extra></extra>", marker: g.marker }));
    if (fit && is(fit.slope)) traces.push({ type: "scatter", mode: "lines", name: "fit", x: bounds, y: bounds.map((x) => fit.intercept + fit.slope * x), line: { color: ink.ink, width: 2 }, hoverinfo: "skip", showlegend: false });
    const ys = all.map((p) => p[1]);
    const lo = Math.max(bounds[0], Math.min(...ys)), hi = Math.min(bounds[1], Math.max(...ys));
    draw(id, traces, {
      showlegend: groups.length > 1, xaxis: axis({ title: "train Sharpe ratio" }), yaxis: axis({ title: "test Sharpe ratio" }),
      shapes: hi > lo ? [line(lo, lo, hi, hi, { color: ink.grey, width: 1, dash: "dot" }, { layer: "below" })] : [],
    });
  };
  const said = (fit, n) => (is(fit.slope) ? `Slope ${ratio(fit.slope)}, rank correlation ${ratio(fit.rank_correlation)} over ${plural(fit.points, "point")}${fit.points < n ? ` (${whole(n - fit.points)} are undefined: nothing was traded)` : ""}.` : "Too few points for a fit.");
  const dotted = " Dotted: test equals train.";
  const scatter = () => {
    const t = data.train_test;
    if (!t) {
      if (!data.train_test_missing) { $("scatter").hidden = true; return; }
      document.querySelector("#scatter .pair").hidden = true;
      $("scatter").querySelector(".lead").textContent = `Not shown: ${data.train_test_missing}.`;
      return;
    }
    $("scatter-sets-title").textContent = t.set.length < t.of ? `${whole(t.set.length)} of ${whole(t.of)} sets, mean over windows` : `All ${plural(t.of, "set")}, mean over windows`;
    const small = t.set.length > 400;
    cloud("scatter-sets", [{ name: "sets", x: t.train, y: t.test, text: t.set.map((s) => `set ${whole(s)}`), marker: { color: faint(ink.accent, small ? 0.4 : 0.65), size: small ? 4 : 6 } }], t.fit);
    $("scatter-sets-note").textContent = said(t.fit, t.set.length) + dotted;
    if (!t.chosen.length) { $("scatter-chosen").parentElement.hidden = true; return; }
    const dates = (c, i) => { const found = data.choices.find((x) => x.kind === c.selection); return found && found.windows === found.test.length ? ` from ${iso(found.test[c.window[i]][0])}` : ""; };
    const symbol = (c, i) => (c.asset[i] >= 0 && data.assets > 1 ? `, asset ${whole(c.asset[i] + 1)}` : "");
    const of = t.chosen.map((c) => c.of).reduce((a, b) => a + b), shown = t.chosen.map((c) => c.set.length).reduce((a, b) => a + b);
    $("scatter-chosen-title").textContent = shown < of ? `Chosen sets, ${whole(shown)} of ${whole(of)} choices` : "Chosen sets, a point per choice";
    const markers = { per_asset: { color: faint(ink.accent, shown > 400 ? 0.4 : 0.65), size: shown > 400 ? 4 : 6 }, pooled: { color: ink.ink, size: 8, symbol: "diamond-open", line: { width: 1.5 } } };
    cloud("scatter-chosen", t.chosen.map((c) => ({ name: KINDS[c.selection], x: c.train, y: c.test, text: c.set.map((s, i) => `window ${whole(c.window[i] + 1)}${dates(c, i)}${symbol(c, i)}<br>set ${whole(s)}`), marker: markers[c.selection] })), t.chosen[0].fit);
    $("scatter-chosen-note").textContent = t.chosen.map((c) => `${t.chosen.length > 1 ? `${capital(KINDS[c.selection])}: ` : ""}${t.chosen.length > 1 ? said(c.fit, c.set.length).replace("Slope", "slope") : said(c.fit, c.set.length)}`).join(" ") + (t.chosen.length > 1 ? ` The line is the first one's fit.` : "") + dotted;
  };

  // ---- growth -------------------------------------------------------------------------------------------------

  const costsOfCurves = [...new Set(data.curves.map((c) => c.cost_bps).filter(is))];
  const equityReady = () => {
    options("equity-cost", costsOfCurves.map((c) => [String(c), `${plain(c)} bp`]), query.get("cost"));
    $("equity-cost-label").hidden = costsOfCurves.length < 2;
    $("equity-log").checked = query.get("log") !== "0";
    $("equity-cost").addEventListener("change", equity);
    $("equity-log").addEventListener("change", equity);
    const chosen = data.curves.some((c) => c.kind === "per_asset" || c.kind === "pooled");
    const portfolio = data.assets > 1 ? ", as an equal-weight portfolio" : "";
    $("equity-lead").textContent = chosen
      ? `Value of 1 invested in the sets chosen anew in each window, out of sample and net of costs${portfolio}, against holding the same ${data.assets > 1 ? "assets" : "asset"} over the same bars.`
      : `Value of 1 invested in the best set, in sample and net of costs${portfolio}, against holding. This is hindsight, not a forecast: there was no walk-forward.`;
  };
  const equity = () => {
    const cost = is(costsOfCurves[0]) ? +$("equity-cost").value : null;
    const shown = data.curves.filter((c) => c.cost_bps === cost || c.kind === "buy_and_hold").filter((c) => c.points > 1);
    if (!shown.length) return nothing("equity-chart", "There is no series to show.");
    const style = {
      per_asset: { color: ink.accent, width: 2 }, pooled: { color: ink.ink, width: 1.6 }, best_in_sample: { color: ink.accent, width: 2 }, buy_and_hold: { color: ink.grey, width: 1.4 },
    };
    const log = $("equity-log").checked && shown.every((c) => c.equity.every((v) => v > 0));
    // Held first, so that the chosen sets lie on top.
    const order = [...shown].reverse();
    const traces = order.flatMap((c) => {
      const x = c.time.map(iso), name = KINDS[c.kind], filled = c.kind === "per_asset" || c.kind === "best_in_sample";
      return [
        { type: "scatter", mode: "lines", name, legendgroup: name, x, y: c.equity, line: style[c.kind], hovertemplate: "%{y:.3f}" },
        { type: "scatter", mode: "lines", name, legendgroup: name, showlegend: false, x, y: c.drawdown.map((d) => (d === 0 ? 0 : -100 * d)), yaxis: "y2", line: { ...style[c.kind], width: 1.2 },
          ...(filled ? { fill: "tozeroy", fillcolor: faint(ink.accent, 0.14) } : {}), hovertemplate: "%{y:.1f} %" },
      ];
    });
    draw("equity-chart", traces, {
      showlegend: true, hovermode: "x unified", legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { color: ink.ink }, traceorder: "reversed" }, margin: { l: 52, r: 14, t: 36, b: 36 },
      xaxis: axis({ type: "date", anchor: "y2", hoverformat: "%Y-%m-%d" }),
      yaxis: axis({ title: "value of 1", type: log ? "log" : "linear", domain: [0.36, 1], ...(log ? { dtick: undefined, nticks: 8 } : {}) }),
      yaxis2: axis({ title: "drawdown", domain: [0, 0.29], ticksuffix: " %", nticks: 5, zeroline: true }),
    });
    const row = (c) => ({ cells: [capital(KINDS[c.kind]), ratio(c.total.sharpe), percent(c.total.total_return), percent(c.total.max_drawdown), ratio(c.total.sortino), percent(c.total.probabilistic_sharpe), fixed(c.total.turnover, 1)], strong: c.kind !== "buy_and_hold" });
    table("equity-table", ["", "Sharpe", "return", "drawdown", "Sortino", "P(Sharpe > 0)", "turnover / year"], shown.map(row), 1);
    const thinned = shown.filter((c) => c.points > c.time.length);
    $("equity-note").textContent = [
      data.curves.some((c) => c.kind === "per_asset" || c.kind === "pooled") ? "Changing sets between windows is not charged." : "",
      thinned.length ? `Thinned from ${whole(thinned[0].points)} to ${whole(thinned[0].time.length)} points; highs, lows and the deepest drawdowns are kept.` : "",
    ].filter(Boolean).join(" ");
  };

  // ---- choices ------------------------------------------------------------------------------------------------

  const choicesReady = () => {
    if (!data.choices.length) { $("choices").hidden = true; return; }
    options("choices-kind", data.choices.map((c) => [c.kind, KINDS[c.kind]]), query.get("kind"));
    $("choices-kind-label").hidden = data.choices.length < 2;
    $("choices-kind").addEventListener("change", () => { choiceAssets(); choices(); });
    $("choices-asset").addEventListener("change", choices);
    choiceAssets();
  };
  const choiceAssets = () => {
    const c = data.choices.find((x) => x.kind === $("choices-kind").value);
    options("choices-asset", c.lines.map((l, i) => [String(i), l.asset]), query.get("asset"));
    $("choices-asset-label").hidden = c.lines.length < 2;
  };
  const choices = () => {
    if (!data.choices.length) return;
    const c = data.choices.find((x) => x.kind === $("choices-kind").value), chosen = c.lines[+$("choices-asset").value];
    // Parameters that the grid varies, each in a row of its own.
    const rows = data.parameters.map((name, p) => [name, p]).filter(([name]) => data.axes.some((a) => a.name === name));
    if (!rows.length) return nothing("choices-chart", "The grid varies no parameter.");
    const gap = 0.1, height = (1 - gap * (rows.length - 1)) / rows.length;
    // The last choice holds until the end of its test part.
    const last = (list) => [...list, list[list.length - 1]];
    const x = [...c.test.map((t) => iso(t[0])), iso(c.test[c.test.length - 1][1])];
    const traces = [], layout = { margin: { l: 52, r: 14, t: 24, b: 36 }, xaxis: axis({ type: "date", anchor: rows.length > 1 ? `y${rows.length}` : "y" }), annotations: [] };
    rows.forEach(([name, p], i) => {
      const y = i ? `y${i + 1}` : "y", top = 1 - i * (height + gap);
      const values = chosen ? chosen.at.map((s) => c.sets[s][p]) : [], levels = [...new Set(values)];
      layout[i ? `yaxis${i + 1}` : "yaxis"] = axis({ domain: [Math.max(0, top - height), top], nticks: 5, zeroline: false, ...(levels.length && levels.length < 4 ? { tickmode: "array", tickvals: levels } : {}) });
      layout.annotations.push({ text: label(words(name)), x: 0, xref: "paper", xanchor: "left", y: top, yref: "paper", yanchor: "bottom", showarrow: false, font: { color: ink.ink, size: 12 } });
      if (chosen) {
        traces.push({ type: "scatter", mode: x.length > 120 ? "lines" : "lines+markers", name: words(name), x, y: last(values), yaxis: y, line: { color: ink.accent, width: 1.6, shape: "hv" }, marker: { size: [...values.map(() => 5), 0] },
          customdata: last(chosen.at.map((s, w) => [c.set[s], iso(c.test[w][1])])), hovertemplate: "%{x} to %{customdata[1]}<br>%{y}, set %{customdata[0]:,}<extra></extra>" });
      } else {
        const [low, ten, half, ninety, high] = c.quantiles[p].map(last), style = (width, dash) => ({ color: ink.accent, width, dash, shape: "hv" });
        traces.push({ type: "scatter", mode: "lines", name: "10 %", x, y: ten, yaxis: y, line: style(0), hoverinfo: "skip" });
        traces.push({ type: "scatter", mode: "lines", name: "90 %", x, y: ninety, yaxis: y, line: style(0), fill: "tonexty", fillcolor: faint(ink.accent, 0.2), hoverinfo: "skip" });
        traces.push({ type: "scatter", mode: "lines", name: "median", x, y: half, yaxis: y, line: style(1.8), customdata: x.map((_, w) => [low[w], ten[w], ninety[w], high[w]]), hovertemplate: "%{x}<br>median %{y}<br>10–90 %: %{customdata[1]} to %{customdata[2]}<br>all: %{customdata[0]} to %{customdata[3]}<extra></extra>" });
      }
    });
    $("choices-chart").style.height = `${70 + 130 * rows.length}px`;
    draw("choices-chart", traces, layout);
    const distinct = chosen ? new Set(chosen.at).size : 0;
    const some = c.test.length < c.windows ? ` ${whole(c.test.length)} of ${whole(c.windows)} windows are shown.` : "";
    $("choices-note").textContent = (chosen ? `${plural(distinct, "different set")} in ${plural(chosen.at.length, "window")}.` : `Median and 10–90 % of ${whole(data.assets)} assets' choices.`) + some;
  };

  // ---- costs --------------------------------------------------------------------------------------------------

  const costs = () => {
    const rows = data.costs, x = rows.map((r) => r.cost_bps), hold = curve("buy_and_hold");
    const kinds = ["per_asset", "pooled"].filter((kind) => rows.some((r) => r[kind]));
    const style = { per_asset: { color: ink.accent, width: 2 }, pooled: { color: ink.ink, width: 1.6 } };
    $("costs-pair").hidden = $("costs-legend").hidden = rows.length < 2;
    if (rows.length > 1) {
      for (const [id, name, factor, unit] of [["costs-sharpe", "sharpe", 1, ""], ["costs-return", "total_return", 100, " %"]]) {
        const trace = (title, y, line, more = {}) => ({ type: "scatter", mode: "lines+markers", name: title, x, y: y.map((v) => (is(v) ? factor * v : null)), line, marker: { size: 6 }, hovertemplate: `%{y:.2f}${unit}`, ...more });
        const traces = kinds.map((kind) => trace(KINDS[kind], rows.map((r) => (r[kind] ? r[kind][name] : null)), style[kind]));
        traces.push(trace(data.assets > 1 ? "best in sample, mean of assets" : "best in sample", rows.map((r) => (r.best ? r.best[name] : null)), { color: ink.grey, width: 1.4, dash: "dash" }));
        // Without a walk-forward both are over all counted bars.
        if (hold) traces.push(trace(KINDS.buy_and_hold, x.map(() => hold.total[name]), { color: ink.grey, width: 1.2, dash: "dot" }, { mode: "lines" }));
        const [least, most] = [Math.min(...x), Math.max(...x)], pad = 0.04 * (most - least);
        draw(id, traces, { hovermode: "x unified", margin: { l: 52, r: 14, t: 14, b: 44 }, xaxis: axis({ title: "one-way cost, bp", range: [least - pad, most + pad], zeroline: false }), yaxis: axis({ ticksuffix: unit, nticks: 6 }) });
        $("costs-legend").replaceChildren(...traces.map((t) => {
          const name = element("span", t.name), key = element("i");
          key.style.borderTop = `2px ${{ dash: "dashed", dot: "dotted" }[t.line.dash] || "solid"} ${t.line.color}`;
          name.prepend(key);
          return name;
        }));
      }
    }
    const head = ["cost", ...kinds.flatMap((kind) => { const short = kinds.length > 1 ? (kind === "pooled" ? "pooled " : "per asset ") : "chosen "; return [`${short}Sharpe`, "return", "drawdown"]; }), "best set in sample", "its Sharpe", "its return"];
    const cells = (r) => [`${plain(r.cost_bps)} bp`, ...kinds.flatMap((kind) => (r[kind] ? [ratio(r[kind].sharpe), percent(r[kind].total_return), percent(r[kind].max_drawdown)] : ["–", "–", "–"])),
      ...(r.best ? [data.parameters.map((name, p) => `${words(name)} ${plain(r.best.values[p])}`).join(", "), ratio(r.best.sharpe), percent(r.best.total_return)] : ["–", "–", "–"])];
    table("costs-table", head, rows.map((r) => ({ cells: cells(r) })), 1);
    const portfolio = data.assets > 1 ? ", of the equal-weight portfolio" : "";
    $("costs-note").textContent = kinds.length ? `Chosen sets: stitched out-of-sample bars${portfolio}. Best set in sample: all counted bars${data.assets > 1 ? ", mean of the assets" : ""}, with hindsight. Buy and hold pays no costs.` : "All in sample. Buy and hold pays no costs.";
    for (const id of ["costs-best", "costs-best-title", "costs-best-lead"]) $(id).hidden = rows.length < 2;
    if (rows.length > 1) {
      const name = (b) => data.parameters.map((n, p) => `${words(n)} ${plain(b.values[p])}`).join(", ");
      table("costs-best", ["set", "", ...rows.map((r) => `${plain(r.cost_bps)} bp`)], data.best.map((b, i) => ({ cells: [whole(b.set), name(b), ...rows.map((r) => ratio(r.best_at_first[i]))] })), 2);
    }
  };

  // ---- provenance ---------------------------------------------------------------------------------------------

  const provenance = () => {
    const p = data.provenance, d = p.data || {}, few = (list, show) => `${list.slice(0, 12).map(show).join("; ")}${list.length > 12 ? `; and ${whole(list.length - 12)} more` : ""}`;
    const lines = [["Version", p.version && `forback ${p.version}`], ["Command", p.command && p.command.join(" ")], ["Written", p.written], ["Device", p.device], ["Seed", p.seed !== undefined ? String(p.seed) : ""],
      ["Data", d.sources && d.sources.join(", ")], ["SHA-256", d.sha256], ["Price", d.price], ["Dropped", d.dropped && d.dropped.length ? few(d.dropped, (x) => `${x.symbol} (${x.reason})`) : ""],
      ["Filled", d.filled && d.filled.length ? few(d.filled, (x) => `${x.symbol} (${plural(x.cells, "cell")})`) : ""], ["Notes", d.notes && d.notes.join("; ")],
      ["Strategy", p.strategy], ["Grid", p.grid], ["Execution", p.execution && words(p.execution)], ["Walk-forward", p.walk_forward || "none"], ["Selection", p.select && words(p.select)], ["Ranked by", p.rank_by && titled(p.rank_by)],
      ["Costs", p.cost_bps && `${p.cost_bps.map(plain).join(", ")} bp one way`], ["Periods per year", is(p.periods_per_year) ? fixed(p.periods_per_year, 1) : ""],
      ["Time", is(p.seconds) ? `${fixed(p.seconds, 2)} s${is(p.set_bars) ? `, ${(p.set_bars / p.seconds).toExponential(2)} set-bars per second` : ""}, ${plural(p.launches, "launch", "launches")}, ${plural(p.submits, "submit")}` : ""]];
    pairs("provenance-list", lines.filter(([, text]) => text));
    $("provenance-json").textContent = JSON.stringify(p, null, 2);
  };

  // ---- all ----------------------------------------------------------------------------------------------------

  const all = [surface, distribution, scatter, equity, choices, costs];
  surfaceReady();
  equityReady();
  choicesReady();
  run(all);
  header();
  provenance();
  finish(["strategy", "surface-note", "distribution-note", "equity-note", "choices-note", "scatter-sets-note"]);
})();
