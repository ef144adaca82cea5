// The page of `forback hedge`: tables and charts from the numbers in #report-data.
(() => {
  "use strict";
  const { data, query, $, is, fixed, percent, whole, plain, label, words, capital, plural, element, table, pairs, options, faint, ink, axis, draw, nothing, contents, run, finish } = page;

  const RISKS = ["sd", "cvar", "var", "entropic"];
  const level = plain(100 * data.alpha) + "\u00a0%";
  const RISK = [`standard deviation`, `CVaR ${level}`, `VaR ${level}`, "entropic risk"];
  const money = (x) => fixed(x, data.digits);
  const group = () => data.groups[+$("group").value] || data.groups[0];
  const kind = () => Math.max(0, RISKS.indexOf($("risk").value));
  const chosen = () => { const i = +$("setup").value; return group().rows.includes(i) ? i : best(group().rows); };
  const risk = (i) => data.rows[i].risks[kind()];
  const best = (rows) => rows.reduce((a, b) => (is(risk(b)) && !(risk(b) >= risk(a)) ? b : a), rows[0]);
  const frontier = () => group().frontier[kind()];
  const policies = [...new Set(data.rows.map((r) => r.policy))];
  const hue = (policy) => { const i = policies.indexOf(policy), n = Math.max(policies.length, 1); return policy === "none" ? ink.grey : `hsl(${Math.round((200 + (360 * i) / n) % 360)} 60% 50%)`; };
  const SHAPES = ["circle", "square", "diamond", "triangle-up", "cross", "x", "star", "pentagon", "hexagon", "triangle-down"];
  const mark = (policy) => SHAPES[policies.indexOf(policy) % SHAPES.length];

  // ---- header -------------------------------------------------------------------------------------------------

  const header = () => {
    $("heading").textContent = data.title;
    $("doc").textContent = "Profit and loss of the option and its hedge at expiry, costs included, in currency per option.";
    pairs("facts", data.facts);
    $("verdict").replaceChildren(...data.verdict.map((text) => element("li", text)));
    options("group", data.groups.map((g, i) => [String(i), g.name]), query.get("group") || "0");
    $("group-label").hidden = data.groups.length < 2;
    options("risk", RISKS.map((name, i) => [name, RISK[i]]), query.get("risk") || data.risk);
    setups(query.get("setup"));
    options("walk", data.walks.map((w, i) => [String(i), data.rows[w.row].name]), query.get("walk") || "0");
    if (query.get("log") === "0") $("frontier-log").checked = false;
    if (query.get("bare") === "1") $("frontier-bare").checked = true;
    for (const id of ["group", "risk", "setup", "walk", "frontier-log", "frontier-bare"]) $(id).addEventListener("change", () => { if (id === "group") setups(null); parts.forEach((part) => part()); });
    $("theory").hidden = !data.rows.some((r) => r.theory.some(is));
    $("path").hidden = !data.walks.length;
  };
  const setups = (wanted) => options("setup", group().rows.map((i) => [String(i), data.rows[i].name]), wanted === null ? String(best(group().rows)) : wanted);

  const tiles = () => {
    const i = chosen(), r = data.rows[i], bare = group().rows.find((k) => data.rows[k].policy === "none");
    const share = bare !== undefined && bare !== i && risk(bare) > 0 ? `${percent(risk(i) / risk(bare))} of no hedge's ${money(risk(bare))}` : "";
    const list = [["Set-up", r.name, `number ${whole(r.number)}`, false], [capital(RISK[kind()]), money(risk(i)), share, true], ["Mean cost", money(r.cost[0]), `turnover ${fixed(r.turnover, 2)}`, false], ["Mean P&L", money(r.mean[0]), `± ${fixed(r.mean[1], data.digits + 1)}`, false]];
    $("tiles").replaceChildren(...list.map(([name, value, more, accent]) => {
      const tile = element("div", undefined, "tile");
      tile.append(element("div", name, "label"), element("div", value, accent ? "value accent" : "value"), element("div", more, "more"));
      return tile;
    }));
  };

  // ---- cost against risk --------------------------------------------------------------------------------------

  const against = () => {
    const bare = $("frontier-bare").checked, shown = group().rows.filter((i) => is(risk(i)) && (bare || data.rows[i].policy !== "none")), edge = frontier().filter((i) => shown.includes(i));
    if (!shown.length) return nothing("frontier-chart", "No set-up has this risk.");
    const point = (i) => `${label(data.rows[i].name)}<br>cost ${money(data.rows[i].cost[0])}<br>${RISK[kind()]} ${money(risk(i))}`;
    const traces = [{ type: "scatter", mode: "lines", name: "frontier", x: edge.map((i) => data.rows[i].cost[0]), y: edge.map(risk), line: { color: ink.accent, width: 1.5, dash: "dot" }, hoverinfo: "skip" }];
    for (const policy of policies) {
      const of = shown.filter((i) => data.rows[i].policy === policy);
      if (!of.length) continue;
      traces.push({ type: "scatter", mode: "markers", name: words(policy), x: of.map((i) => data.rows[i].cost[0]), y: of.map(risk), text: of.map(point), hovertemplate: "%{text}<extra></extra>",
        error_y: { type: "data", array: of.map((i) => 2 * (data.rows[i].errors[kind()] || 0)), color: faint(ink.grey, 0.6), thickness: 1, width: 0 },
        marker: { color: hue(policy), symbol: mark(policy), size: of.map((i) => (i === chosen() ? 15 : 10)), line: { color: of.map((i) => (edge.includes(i) ? ink.ink : ink.page)), width: of.map((i) => (edge.includes(i) ? 1.5 : 0.5)) } } });
    }
    draw("frontier-chart", traces, { showlegend: true, margin: { l: 60, r: 14, t: 60, b: 44 }, hovermode: "closest", xaxis: axis({ title: "mean cost", rangemode: "tozero" }), yaxis: axis({ title: RISK[kind()], type: $("frontier-log").checked ? "log" : "linear", rangemode: "tozero" }) });
    $("frontier-lead").textContent = `Each set-up at ${group().name}: down is safer, left is cheaper. Nothing is below and left of the line.`;
    const hidden = group().rows.find((i) => data.rows[i].policy === "none");
    $("frontier-note").textContent = `Bars are two standard errors.${hidden !== undefined && !bare ? ` Without a hedge the ${RISK[kind()]} is ${money(risk(hidden))}, at no cost: off the chart.` : ""}`;
  };

  // ---- distributions ------------------------------------------------------------------------------------------

  const density = (shape) => {
    const total = shape.counts.reduce((a, b) => a + b, 0) + shape.outside[0] + shape.outside[1];
    return { x: shape.counts.map((_, b) => shape.low + (b + 0.5) * shape.width), y: shape.counts.map((c) => (shape.width > 0 ? c / (total * shape.width) : c / total)) };
  };
  const distribution = () => {
    const i = chosen(), r = data.rows[i], own = density(r.histogram);
    const others = policies.filter((p) => p !== r.policy).map((p) => group().rows.filter((k) => data.rows[k].policy === p)).filter((rows) => rows.length).map(best);
    const width = r.histogram.width || 0.1;
    const traces = [{ type: "bar", name: r.name, x: own.x, y: own.y, width: own.x.map(() => width), marker: { color: faint(ink.accent, 0.55) }, hovertemplate: "%{x:.3f}<br>density %{y:.3f}<extra></extra>" }];
    for (const k of others) {
      const d = density(data.rows[k].histogram);
      traces.push({ type: "scatter", mode: "lines", name: data.rows[k].name, x: d.x, y: d.y, line: { color: hue(data.rows[k].policy), width: 1.5, shape: "hvh" }, hovertemplate: "%{x:.3f}<extra></extra>", visible: data.rows[k].policy === "none" ? "legendonly" : true });
    }
    const cvar = -r.risks[1], mean = r.mean[0], lines = [];
    if (is(cvar)) lines.push(page.line(cvar, 0, cvar, 1, { color: ink.grey, width: 1.5, dash: "dot" }, { yref: "paper" }));
    lines.push(page.line(mean, 0, mean, 1, { color: ink.ink, width: 1.5 }, { yref: "paper" }));
    const span = [own.x[0], own.x[own.x.length - 1]], room = 0.35 * (span[1] - span[0]) + width;
    draw("pnl-chart", traces, { showlegend: true, barmode: "overlay", bargap: 0, shapes: lines, margin: { l: 60, r: 14, t: 74, b: 44 }, xaxis: axis({ title: "profit and loss", range: [span[0] - room, span[1] + room] }), yaxis: axis({ title: "density", rangemode: "tozero" }) });
    const cut = r.histogram.outside;
    $("pnl-note").textContent = `Solid line: mean ${money(mean)}. Dotted line: mean of the worst ${level} of the paths, ${money(cvar)}. Skewness ${fixed(r.skew, 2)}. ${cut[0] + cut[1] ? `${plural(cut[0], "path")} below the bars and ${plural(cut[1], "path")} above are not drawn.` : ""}`;
  };

  // ---- theory -------------------------------------------------------------------------------------------------

  const theory = () => {
    const shown = group().rows.filter((i) => data.rows[i].theory.some(is));
    const off = (x, want) => (is(want) && want !== 0 && is(x) ? percent(x / want - 1) : "–");
    if (!shown.length) return $("theory-table").replaceChildren(element("p", "No theory applies to these set-ups.", "note"));
    table("theory-table", ["set-up", "sd simulated", "± ", "sd, Derman-Kamal", "difference", "cost simulated", "cost, Leland", "difference"], shown.map((i) => {
      const r = data.rows[i];
      return { cells: [r.name, money(r.risks[0]), fixed(r.errors[0], data.digits + 1), money(r.theory[0]), off(r.risks[0], r.theory[0]), money(r.cost[0]), money(r.theory[1]), off(r.cost[0], r.theory[1])], strong: i === chosen() };
    }), 1);
  };

  // ---- one path -----------------------------------------------------------------------------------------------

  const path = () => {
    const w = data.walks[+$("walk").value] || data.walks[0];
    if (!w) return;
    const r = data.rows[w.row], time = { title: "step" };
    $("path-lead").textContent = `Path ${whole(data.path)} under ${r.name} at ${plain(r.cost_bps)} bp: ${plural(w.trades, "trade")}, costs ${money(w.cost)}, option pays ${money(w.payoff)}, profit and loss ${money(w.pnl)}.`;
    const buys = w.step.map((_, i) => i).filter((i) => w.trade[i] > 0), sells = w.step.map((_, i) => i).filter((i) => w.trade[i] < 0);
    const trades = (at, name, symbol, colour) => ({ type: "scatter", mode: "markers", name, x: at.map((i) => w.step[i]), y: at.map((i) => w.spot[i]), customdata: at.map((i) => w.trade[i]), marker: { symbol, color: colour, size: at.length > 80 ? 5 : 8 }, hovertemplate: "step %{x}<br>price %{y:.4~g}<br>%{customdata:.4f} units<extra></extra>" });
    const layout = (title, more = {}) => ({ showlegend: true, hovermode: "closest", margin: { l: 60, r: 14, t: 34, b: 40 }, xaxis: axis(time), yaxis: axis({ title }), ...more });
    draw("spot-chart", [{ type: "scatter", mode: "lines", name: "price", x: w.step, y: w.spot, line: { color: ink.grey, width: 1.5 }, hovertemplate: "step %{x}<br>%{y:.6~g}<extra></extra>" }, trades(buys, "bought", "triangle-up", ink.accent), trades(sells, "sold", "triangle-down", "hsl(20 75% 50%)")], layout("price"));
    draw("holding-chart", [{ type: "scatter", mode: "lines", name: "delta", x: w.step, y: w.delta, line: { color: ink.grey, width: 1.2, dash: "dot" }, hovertemplate: "%{y:.4f}" }, { type: "scatter", mode: "lines", name: "held", x: w.step, y: w.holding, line: { color: ink.accent, width: 1.8, shape: "hv" }, hovertemplate: "%{y:.4f}" }], layout("units", { hovermode: "x unified" }));
    draw("sofar-chart", [{ type: "scatter", mode: "lines", name: "profit and loss", x: w.step, y: w.so_far, line: { color: ink.accent, width: 1.8 }, hovertemplate: `%{y:.${data.digits}f}` }, { type: "scatter", mode: "lines", name: "costs paid", x: w.step, y: w.paid, line: { color: "hsl(20 75% 50%)", width: 1.2 }, hovertemplate: `%{y:.${data.digits}f}` }], layout("currency", { hovermode: "x unified" }));
    $("path-note").textContent = `Profit and loss so far: cash and holding against the value of the option at the hedger's volatility.${w.every > 1 ? ` Points are ${plural(w.every, "step")} apart; trades between them are added up.` : ""}`;
    const shown = w.step.map((_, i) => i).filter((i) => w.trade[i] !== 0 || i === w.step.length - 1);
    table("walk-table", ["step", "price", "delta", "trade", "held", "costs paid", "P&L so far"], shown.slice(0, 400).map((i) => ({ cells: [whole(w.step[i]), money(w.spot[i]), fixed(w.delta[i], 4), fixed(w.trade[i], 4), fixed(w.holding[i], 4), money(w.paid[i]), money(w.so_far[i])] })));
  };

  // ---- table --------------------------------------------------------------------------------------------------

  const all = () => {
    const edge = frontier();
    $("table-lead").textContent = `At ${group().name}; set-ups on the frontier stand out.`;
    const priced = [...new Set(group().rows.map((i) => data.rows[i].hedge_volatility))].length > 1;
    table("all-table", ["#", "set-up", ...(priced ? ["hedge volatility"] : []), "mean", "± ", "sd", "± ", `CVaR ${level}`, "± ", `VaR ${level}`, "entropic", "skew", "turnover", "cost", "indifference"], group().rows.map((i) => {
      const r = data.rows[i], error = (x) => fixed(x, data.digits + 1);
      return { cells: [whole(r.number), r.name, ...(priced ? [percent(r.hedge_volatility)] : []), money(r.mean[0]), error(r.mean[1]), money(r.risks[0]), error(r.errors[0]), money(r.risks[1]), error(r.errors[1]), money(r.risks[2]), money(r.risks[3]), fixed(r.skew, 2), fixed(r.turnover, 2), money(r.cost[0]), money(r.indifference)], strong: edge.includes(i) };
    }), 2);
  };

  // ---- provenance ---------------------------------------------------------------------------------------------

  const provenance = () => {
    const p = data.provenance, m = p.market || {};
    const lines = [["Version", p.version && `forback ${p.version}`], ["Command", p.command && p.command.join(" ")], ["Device", p.device], ["Seed", String(p.seed)], ["Market", p.described], ["File", m.file], ["SHA-256", m.sha256],
      ["Paths", `${whole(p.paths)} × ${whole(p.steps)} steps${p.antithetic ? ", in mirrored pairs" : ""}`], ["Risk aversion", `${plain(p.risk_aversion)} per unit of currency (entropic risk)`]];
    pairs("provenance-list", lines.filter(([, text]) => text));
    $("provenance-json").textContent = JSON.stringify(p, null, 2);
  };

  const parts = [tiles, against, distribution, theory, path, all];
  header();
  run(parts);
  contents();
  provenance();
  finish(["heading", "frontier-lead", "frontier-note", "pnl-note", "path-lead", "path-note", "table-lead"]);
})();
