//! Stories of `forback hedge`.

use super::{DAY, Folder, array, chromium, data, date, done, floats, here, numbers_of, opened, rows, run, trace};
use forback::kernels::black_scholes::{OptionKind, sensitivities};
use forback::kernels::philox::{normals, philox4x32};
use serde_json::{Value, json};

/// The one JSON object of `forback hedge … --json`.
fn hedge_json(args: &[&str]) -> Value {
    let stdout = done(&[&["hedge", "--json"], args].concat());
    assert_eq!(stdout.lines().count(), 1, "{stdout}");
    serde_json::from_str(&stdout).unwrap()
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("not a number: {value}"))
}

/// The row of a policy at an interval and a cost.
fn row<'a>(found: &'a Value, policy: &str, rebalance: u64, bps: f64) -> &'a Value {
    // Without a hedge there are no intervals and no costs, with a static one no intervals.
    let same = |r: &&Value| {
        let (every, cost) = (r["rebalance"] == json!(rebalance), r["cost_bps"] == json!(bps));
        r["policy"] == policy && (every || policy == "none" || policy == "static") && (cost || policy == "none")
    };
    array(&found["rows"]).iter().find(same).unwrap_or_else(|| panic!("no {policy} every {rebalance} at {bps} bp in {}", found["rows"]))
}

const QUICK: [&str; 4] = ["--device", "cpu", "--paths", "20000"];

/// Closes of a lognormal walk, as a wide CSV.
fn walk(folder: &Folder, name: &str, bars: usize, volatility: f64) -> String {
    let mut price = 50.0f64;
    let mut text = String::from("date,AAA\n");
    for t in 0..bars {
        text += &format!("{},{price}\n", date(1_000_000_000 / DAY * DAY + t as i64 * DAY));
        price *= (volatility / 365.25f64.sqrt() * normals(philox4x32([t as u32, 0, 0, 0], [11, 4]))[0]).exp();
    }
    folder.text(name, &text)
}

#[test]
fn the_table_holds_what_theory_says() {
    let found = hedge_json(&[&["--policy", "none,static,delta", "--cost-bps", "0,10", "--rebalance", "1,4"], &QUICK[..]].concat());
    // none once, static once per cost, delta per interval and cost.
    assert_eq!(array(&found["rows"]).len(), 1 + 2 + 4);
    let premium = number(&found["rows"][0]["premium"]);
    // Black-Scholes: 100·(2Φ(0.1) − 1).
    assert!((premium - 7.965_567).abs() < 1e-4, "{premium}");
    for policy in ["none", "static", "delta"] {
        let free = row(&found, policy, 1, 0.0);
        let (mean, error) = (number(&free["mean"]), number(&free["mean_error"]));
        assert!(mean.abs() < 4.0 * error, "{policy} without costs earns {mean} ± {error}");
    }
    // Derman and Kamal: √(π/4)·vega·σ/√N, twice as much at a fourth of the rehedgings.
    for (every, want) in [(1, 0.443), (4, 0.886)] {
        let free = row(&found, "delta", every, 0.0);
        let (sd, theory) = (number(&free["sd"]), number(&free["theory_sd"]));
        assert!((theory / want - 1.0).abs() < 0.01, "{theory}, {want} by hand");
        assert!((sd / theory - 1.0).abs() < 0.05, "sd {sd}, {theory} by theory");
    }
    // Costs lower the mean by themselves, and nothing else changes it.
    let (free, dear) = (row(&found, "delta", 1, 0.0), row(&found, "delta", 1, 10.0));
    assert_eq!(number(&free["cost"]), 0.0);
    let cost = number(&dear["cost"]);
    assert!((number(&free["mean"]) - number(&dear["mean"]) - cost).abs() < 1e-3 * cost, "{free} {dear}");
    assert!((cost / (number(&dear["turnover"]) * 100.0 * 1e-3) - 1.0).abs() < 1e-3, "{dear}");
    assert!(number(&dear["cvar"]) > number(&dear["var"]) && number(&dear["indifference_price"]) > premium, "{dear}");
    assert_eq!(number(&row(&found, "none", 1, 10.0)["turnover"]), 0.0);
    let verdict = found["verdict"].to_string();
    assert!(verdict.contains("At 10 bp, ") && verdict.contains("Derman-Kamal") && verdict.contains("market impact"), "{verdict}");
}

#[test]
fn the_frontier_is_what_nothing_beats() {
    let found = hedge_json(&[&["--cost-bps", "1,20", "--band", "0.02,0.1", "--risk", "cvar"], &QUICK[..]].concat());
    for bps in [1.0, 20.0] {
        let group: Vec<&Value> = array(&found["rows"]).iter().filter(|r| r["cost_bps"] == json!(bps) || r["policy"] == "none").collect();
        assert_eq!(group.len(), 2 + 3 * 6, "none, static; delta, leland, two bands, whalley_wilmott, move at three intervals");
        let mut on = 0;
        for r in &group {
            let beats = |o: &&&Value| number(&o["cost"]) <= number(&r["cost"]) && number(&o["cvar"]) < number(&r["cvar"]);
            assert_eq!(r["frontier"], json!(!group.iter().any(|o| beats(&o))), "{r}");
            on += u32::from(r["frontier"] == json!(true));
        }
        assert!((2..12).contains(&on), "{on} on the frontier");
    }
    assert_eq!(found["run"]["risk"], "cvar");
    assert_eq!(array(&found["frontiers"]).len(), 2);
    // At dear costs the bands earn their place: plain delta at every step is beaten.
    assert_eq!(row(&found, "delta", 1, 20.0)["frontier"], json!(false));
}

#[test]
fn a_plain_run_prints_a_table_and_a_verdict() {
    let text = done(&[&["hedge"], &QUICK[..]].concat());
    for part in [
        "device   cpu",
        "geometric Brownian motion, volatility 20.00 % a year",
        "option   short 1 call",
        "20,000 paths",
        "CVaR 5%",
        "whalley_wilmott 1",
        "* ",
        "At 10 bp",
        "Against delta every step",
    ] {
        assert!(text.contains(part), "'{part}' is not in\n{text}");
    }
    assert!(text.lines().all(|line| line.chars().count() < 240), "{text}");
    let plan = done(&[&["hedge", "--plan"], &QUICK[..]].concat());
    assert!(plan.starts_with("plan     20,000 paths × 252 steps × ") && plan.contains("of memory") && plan.lines().count() == 1, "{plan}");
    let plan: Value = serde_json::from_str(&done(&[&["hedge", "--plan", "--json", "--paths", "1e6"], &QUICK[..2]].concat())).unwrap();
    assert_eq!(plan["plan"]["paths"], json!(1_000_000));
    assert!(number(&plan["plan"]["seconds"]) > 0.0 && number(&plan["plan"]["memory_bytes"]) > 1e6, "{plan}");
}

#[test]
fn every_model_runs_and_says_what_it_is() {
    for (args, said) in [
        (&["--model", "heston", "--vol-of-vol", "1.0", "--mean-variance", "0.05"][..], "Feller's condition does not hold"),
        (&["--model", "merton", "--volatility", "0.15", "--jump-intensity", "0"], "no jumps ever"),
        (&["--model", "bates", "--correlation", "-1"], "Bates: volatility 20.0 % now"),
        (&["--model", "regimes", "--regime-volatility", "0.1,0.2,0.4", "--regime-stay", "0.98,0.95,0.9"], "regimes of volatility 10.0, 20.0, 40.0 %"),
        (&["--volatility", "0.1,0.3", "--hedge-volatility", "0.2"], "2 markets: gbm 10.0 %, gbm 30.0 %"),
    ] {
        let text = done(&[&["hedge", "--policy", "none,delta", "--rebalance", "5"], args, &QUICK[..2], &["--paths", "4000"]].concat());
        assert!(text.contains(said), "'{said}' is not in\n{text}");
    }
    // A wrong volatility costs what the premium lacks: vega × (0.3 − 0.2).
    let found = hedge_json(
        &[&["--policy", "delta", "--cost-bps", "0", "--rebalance", "1", "--volatility", "0.3", "--hedge-volatility", "0.2,0.3"], &QUICK[..]].concat(),
    );
    let [low, high] = [0, 1].map(|i| number(&found["rows"][i]["mean"]));
    let [cheap, dear] = [0, 1].map(|i| number(&found["rows"][i]["premium"]));
    assert!((cheap - 7.9656).abs() < 1e-3 && (dear - 11.9235).abs() < 1e-3, "{cheap} {dear}");
    assert!(((high - low) / (dear - cheap) - 1.0).abs() < 0.03 && high.abs() < 0.05, "{low} {high}");
}

#[test]
fn options_of_every_kind_and_side() {
    for (option, position, extra) in
        [("call", "long", &["--strike", "90,110"][..]), ("put", "short", &["--rate", "0.05"]), ("digital", "short", &["--unwind", "--fixed-cost", "0.001"])]
    {
        let args = ["--option", option, "--position", position, "--policy", "none,delta", "--rebalance", "1", "--cost-bps", "0", "--antithetic"];
        let found = hedge_json(&[&args[..], extra, &QUICK[..]].concat());
        for pair in array(&found["rows"]).chunks(2) {
            let (bare, hedged) = (&pair[0], &pair[1]);
            assert!(number(&hedged["sd"]) < 0.5 * number(&bare["sd"]), "{option}: {hedged}");
            assert!(number(&hedged["mean"]).abs() < 4.0 * number(&hedged["mean_error"]) + number(&hedged["cost"]) * 1.05 + 1e-4, "{option}: {hedged}");
        }
        assert_eq!(array(&found["rows"]).len(), if option == "call" { 4 } else { 2 });
    }
}

#[test]
fn a_replay_is_the_path_of_the_run() {
    let folder = Folder::new();
    let base = [
        "--policy",
        "delta,leland,band,whalley_wilmott,move,static,none",
        "--rebalance",
        "3",
        "--cost-bps",
        "25",
        "--steps",
        "60",
        "--device",
        "cpu",
        "--seed",
        "5",
    ];
    let out = folder.path("out");
    let text = done(&[&["hedge", "--replay", "2", "--paths", "3", "--out", &out], &base[..]].concat());
    assert!(text.contains("path-2.csv") && text.contains("whalley_wilmott 1 every 3 steps"), "{text}");
    let steps = rows(&folder.path("out/path-2.csv"));
    assert_eq!(steps.len(), 7 * 61);
    // The third path is what three paths have beyond two.
    let mean = |paths: &str| hedge_json(&[&["--paths", paths], &base[..]].concat());
    let (two, three) = (mean("2"), mean("3"));
    for (i, walk) in steps.chunks(61).enumerate() {
        let real = |r: &csv::StringRecord, c: usize| r[c].parse::<f64>().unwrap();
        let (first, last) = (&walk[0], &walk[60]);
        let of = |found: &Value, name: &str| number(&found["rows"][i][name]);
        for (column, name) in [(13, "mean"), (0, "cost")] {
            let run = 3.0 * of(&three, name) - 2.0 * of(&two, name);
            let told = if column == 13 { real(last, 13) } else { walk.iter().map(|r| real(r, 11)).sum() };
            assert!((told - run).abs() < 2e-3, "{} {name}: {told} step by step, {run} in the run", &first[1]);
        }
        // Cash pays for each trade and its cost; the holding is the sum of the trades.
        let mut held = 0.0;
        for r in &walk[..60] {
            held += real(r, 10);
            assert!((held - real(r, 9)).abs() < 1e-6, "{r:?}");
            assert!((real(r, 11) - 25e-4 * real(r, 10).abs() * real(r, 6)).abs() < 1e-6, "{r:?}");
            assert!(real(r, 10) == 0.0 || (real(r, 4) as u64).is_multiple_of(3), "traded between decisions: {r:?}");
        }
        let payoff = (real(last, 6) - 100.0).max(0.0);
        assert!((real(last, 17) - payoff).abs() < 1e-3, "{last:?}");
        assert!((real(&walk[59], 12) + held * real(last, 6) - payoff - real(last, 13)).abs() < 1e-4, "{last:?}");
    }
    // The same as CSV on stdout and as JSON, of one set-up.
    let csv = done(&[&["hedge", "--replay", "2", "--paths", "3", "--setup", "2"], &base[..]].concat());
    assert_eq!(csv.lines().count(), 62);
    let json: Value = serde_json::from_str(&done(&[&["hedge", "--replay", "2", "--paths", "3", "--setup", "2", "--json"], &base[..]].concat())).unwrap();
    assert_eq!((&json["path"], array(&json["replays"][0]["steps"]).len()), (&json!(2), 61));
    assert_eq!(json["replays"][0]["policy"], "band");
}

#[test]
fn the_files_say_what_was_printed_and_repeat_it() {
    let folder = Folder::new();
    let out = folder.path("out");
    let found = hedge_json(&[&["--cost-bps", "0,10", "--policy", "none,delta,band", "--band", "0.05,0.1", "--out", &out], &QUICK[..]].concat());
    let mut left: Vec<String> = std::fs::read_dir(&out).unwrap().map(|f| f.unwrap().file_name().into_string().unwrap()).collect();
    left.sort();
    assert_eq!(left, ["config.toml", "report.html", "results.csv", "results.parquet", "run.json"]);
    let mut file = csv::Reader::from_path(folder.path("out/results.csv")).unwrap();
    let head: Vec<String> = file.headers().unwrap().iter().map(String::from).collect();
    let lines: Vec<csv::StringRecord> = file.records().map(Result::unwrap).collect();
    assert_eq!(lines.len(), array(&found["rows"]).len());
    for (line, row) in lines.iter().zip(array(&found["rows"])) {
        for (name, cell) in head.iter().zip(line) {
            match &row[name] {
                // serde_json may read the last digit of a number otherwise than it was written.
                Value::Number(x) => {
                    let (cell, x) = (cell.parse::<f64>().unwrap(), x.as_f64().unwrap());
                    assert!((cell - x).abs() <= 4e-16 * x.abs(), "{name}: {cell} {x}");
                }
                Value::Null if !["option", "position", "maturity"].contains(&name.as_str()) => assert_eq!(cell, "", "{name}"),
                _ => {}
            }
        }
    }
    let parquet =
        parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder::try_new(std::fs::File::open(folder.path("out/results.parquet")).unwrap()).unwrap();
    let names: Vec<String> = parquet.schema().fields().iter().map(|f| f.name().clone()).collect();
    assert_eq!(names, head);
    assert_eq!(parquet.build().unwrap().map(|b| b.unwrap().num_rows()).sum::<usize>(), lines.len());
    let again: Value = serde_json::from_str(&done(&["hedge", "--config", &folder.path("out/config.toml"), "--json"])).unwrap();
    assert_eq!(again["rows"], found["rows"]);
    let other: Value = serde_json::from_str(&done(&["hedge", "--config", &folder.path("out/config.toml"), "--json", "--seed", "1"])).unwrap();
    assert_ne!(other["rows"], found["rows"]);
    let wrong = run(&["hedge", "--config", &folder.text("c.toml", "polcy = \"delta\"\n")]);
    assert!(wrong.code == 2 && wrong.stderr.contains("no option of forback hedge") && wrong.stderr.contains("policy"), "{}", wrong.stderr);
}

#[test]
fn the_page_shows_what_the_table_holds() {
    let Some(browser) = chromium() else { return };
    let folder = Folder::new();
    let (out, page) = (folder.path("out"), folder.path("out/report.html"));
    let found = hedge_json(&[&["--cost-bps", "0,10", "--out", &out], &QUICK[..]].concat());
    let numbers = numbers_of(&page);
    assert_eq!(array(&numbers["rows"]).len(), array(&found["rows"]).len());
    let seen = opened(browser, &page, "group=1&theme=dark");
    let at_ten: Vec<&Value> = array(&found["rows"]).iter().filter(|r| r["cost_bps"] == json!(10.0)).collect();
    for policy in ["delta", "leland", "band", "move", "static"] {
        let points = trace(&seen, "frontier-chart", policy);
        let of = |name: &str| at_ten.iter().filter(|r| r["policy"] == policy).map(|r| number(&r[name])).collect::<Vec<_>>();
        assert_eq!((floats(&points["x"]), floats(&points["y"])), (of("cost"), of("sd")), "{policy}");
    }
    let mut edge: Vec<(f64, f64)> =
        at_ten.iter().filter(|r| r["frontier"] == json!(true) && r["policy"] != "none").map(|r| (number(&r["cost"]), number(&r["sd"]))).collect();
    edge.sort_by(|a, b| a.0.total_cmp(&b.0));
    let line = trace(&seen, "frontier-chart", "frontier");
    assert_eq!(floats(&line["x"]).into_iter().zip(floats(&line["y"])).collect::<Vec<_>>(), edge);
    assert_eq!(seen["held"]["frontier-chart"]["yaxis"], "log");
    // A distribution holds all paths but those that the note counts: its area is nearly 1.
    let bars = &array(&seen["held"]["pnl-chart"]["traces"])[0];
    let (x, y) = (floats(&bars["x"]), floats(&bars["y"]));
    let area: f64 = y.iter().sum::<f64>() * (x[1] - x[0]);
    assert!((0.997..=1.000_001).contains(&area), "{area}");
    let middle: f64 = x.iter().zip(&y).map(|(at, y)| at * y * (x[1] - x[0])).sum();
    assert!((middle - number(&numbers["rows"][best(&at_ten, &found)]["mean"][0])).abs() < 0.05, "{middle}");
    // The path adds up: what is held is the sum of the trades; it ends where the replay ends.
    let walk = &numbers["walks"][0];
    let held = floats(&trace(&seen, "holding-chart", "held")["y"]);
    assert!((floats(&walk["trade"]).iter().sum::<f64>() - held[held.len() - 1]).abs() < 1e-3);
    let so_far = floats(&trace(&seen, "sofar-chart", "profit and loss")["y"]);
    assert!((so_far[so_far.len() - 1] - number(&walk["pnl"])).abs() < 1e-3);
    assert!(seen["texts"]["path-lead"].as_str().unwrap().contains("Path 0 under "), "{}", seen["texts"]);
    let seen = opened(browser, &page, "theme=light&risk=entropic&log=0&bare=1");
    assert_eq!(seen["held"]["frontier-chart"]["yaxis"], "linear");
    assert_eq!(array(&trace(&seen, "frontier-chart", "none")["x"]).len(), 1);
}

/// Position of the least risky row among all.
fn best(group: &[&Value], found: &Value) -> usize {
    let least = group.iter().min_by(|a, b| number(&a["sd"]).total_cmp(&number(&b["sd"]))).unwrap();
    array(&found["rows"]).iter().position(|r| r == *least).unwrap()
}

// ---- histories --------------------------------------------------------------------------------------------------------

#[test]
fn a_history_calibrates_and_is_drawn_from() {
    let folder = Folder::new();
    let prices = walk(&folder, "p.csv", 2000, 0.3);
    let text = done(&[&["hedge", "--prices", &prices, "--policy", "none,delta", "--rebalance", "1", "--maturity", "0.25"], &QUICK[..]].concat());
    assert!(text.contains("from AAA in") && text.contains("2000 bars 2001-09-09 to "), "{text}");
    let gbm = hedge_json(&[&["--prices", &prices, "--policy", "none,delta", "--cost-bps", "0", "--rebalance", "1", "--maturity", "0.25"], &QUICK[..]].concat());
    let volatility = number(&gbm["run"]["market"]["volatility"]);
    assert!((volatility / 0.3 - 1.0).abs() < 0.05, "{volatility}");
    assert_eq!(gbm["run"]["steps"], json!(91), "a quarter of 365.25 bars");
    for model in ["bootstrap", "regimes"] {
        let drawn = hedge_json(
            &[&["--model", model, "--prices", &prices, "--policy", "none,delta", "--cost-bps", "0", "--rebalance", "1", "--maturity", "0.25"], &QUICK[..]]
                .concat(),
        );
        // The history is a lognormal walk, so that drawing from it hedges as well as the model that made it.
        let (sd, want) = (number(&drawn["rows"][1]["sd"]), number(&gbm["rows"][1]["sd"]));
        assert!((sd / want - 1.0).abs() < 0.35, "{model}: sd {sd}, {want} by the calibrated model");
        assert_eq!(drawn["run"]["steps"], json!(91));
    }
}

#[test]
fn real_prices_hedge_worse_than_the_model_that_they_calibrate() {
    let Some(file) = data("etfs_daily/ohlcv.csv.gz") else { return };
    let args = |model: &'static str| {
        [
            &["--model", model, "--prices", file.as_str(), "--symbols", "SPY", "--policy", "none,delta", "--cost-bps", "0", "--rebalance", "1"][..],
            &["--maturity", "0.25"],
            &QUICK[..],
        ]
        .concat()
    };
    let (gbm, history) = (hedge_json(&args("gbm")), hedge_json(&args("bootstrap")));
    let volatility = number(&gbm["run"]["market"]["volatility"]);
    assert!((0.15..0.25).contains(&volatility), "{volatility}");
    let (sd, want) = (number(&history["rows"][1]["sd"]), number(&gbm["rows"][1]["sd"]));
    assert!(sd > 1.3 * want, "fat tails and changing volatility leave more: sd {sd}, {want} by the model");
}

#[test]
fn a_history_replayed_is_its_windows() {
    let folder = Folder::new();
    let prices = walk(&folder, "p.csv", 400, 0.3);
    let args = [
        "--model",
        "replay",
        "--prices",
        &prices,
        "--policy",
        "none,static",
        "--cost-bps",
        "0",
        "--rebalance",
        "1",
        "--steps",
        "30",
        "--device",
        "cpu",
        "--spot",
        "100",
    ];
    let found = hedge_json(&args);
    assert_eq!((&found["run"]["paths"], &found["run"]["steps"]), (&json!(370), &json!(30)));
    assert!(found["run"]["notes"].to_string().contains("overlapping windows of 400 bars, of which only 13"), "{}", found["run"]["notes"]);
    let closes: Vec<f64> = rows(&prices).iter().map(|r| r[1].parse().unwrap()).collect();
    let payoffs: Vec<f64> = (0..370).map(|i| (100.0 * closes[i + 30] / closes[i] - 100.0).max(0.0)).collect();
    let want = number(&found["rows"][0]["premium"]) - payoffs.iter().sum::<f64>() / 370.0;
    assert!((number(&found["rows"][0]["mean"]) - want).abs() < 1e-3, "{}, {want} by hand", found["rows"][0]["mean"]);
    // Some of them, evenly spread; and one step by step.
    assert_eq!(hedge_json(&[&args[..], &["--paths", "100"]].concat())["run"]["paths"], json!(100));
    let path: Value = serde_json::from_str(&done(&[&["hedge", "--json", "--replay", "7", "--setup", "1"], &args[..]].concat())).unwrap();
    let last = &array(&path["replays"][0]["steps"])[30];
    assert!((number(&last["spot"]) / (100.0 * closes[37] / closes[7]) - 1.0).abs() < 1e-6, "{last}");
}

/// Mid quotes of calls and puts at one volatility, two expiries.
fn chain(folder: &Folder, name: &str, volatility: f64, edit: impl Fn(&mut Vec<String>)) -> String {
    let mut lines = vec!["date,underlying,expiry,strike,right,bid,ask,spot_close".to_string()];
    for (expiry, days) in [("2024-03-15", 60.0), ("2024-07-12", 179.0)] {
        let years = days / 365.0;
        for strike in (80..=120).step_by(5) {
            for (right, kind) in [("C", OptionKind::Call), ("P", OptionKind::Put)] {
                let price = sensitivities::<f64>(&[100.0, f64::from(strike), years, volatility, 0.04, 0.0], kind.code()).price;
                lines.push(format!("2024-01-15,XYZ,{expiry},{strike},{right},{},{},100", price * 0.999, price * 1.001));
            }
        }
    }
    edit(&mut lines);
    folder.text(name, &(lines.join("\n") + "\n"))
}

#[test]
fn a_chain_of_quotes_gives_the_market() {
    let folder = Folder::new();
    let file = chain(&folder, "c.csv", 0.25, |_| {});
    let found = hedge_json(&[&["--chain", &file, "--maturity", "0.2", "--policy", "none,delta", "--cost-bps", "0", "--rebalance", "1"], &QUICK[..]].concat());
    let market = &found["run"]["market"];
    assert!((number(&market["volatility"]) - 0.25).abs() < 2e-3 && market["expiry"] == "2024-03-15" && market["date"] == "2024-01-15", "{market}");
    assert!((number(&market["forward"]) / (100.0 * (0.04f64 * 60.0 / 365.0).exp()) - 1.0).abs() < 2e-3, "{market}");
    assert_eq!(found["run"]["steps"], json!(41));
    assert!((number(&found["run"]["maturity"]) - 60.0 / 365.0).abs() < 1e-3);
    let text = done(&[&["hedge", "--chain", &file, "--model", "heston", "--policy", "none,delta", "--rebalance", "1"], &QUICK[..]].concat());
    assert!(text.contains("Heston: volatility 25.") && text.contains("fitted to ") && text.contains("expiry 2024-07-12"), "{text}");

    let nan = chain(&folder, "n.csv", 0.25, |lines| lines[4] = "2024-01-15,XYZ,2024-03-15,85,P,nan,0.4,100".into());
    let crossed = chain(&folder, "x.csv", 0.25, |lines| lines[4] = "2024-01-15,XYZ,2024-03-15,85,P,0.5,0.4,100".into());
    let expired = chain(&folder, "e.csv", 0.25, |lines| lines[4] = "2024-01-15,XYZ,2023-03-15,85,P,0.3,0.4,100".into());
    let strike = chain(&folder, "k.csv", 0.25, |lines| lines[4] = "2024-01-15,XYZ,2024-03-15,-85,P,0.3,0.4,100".into());
    let two = chain(&folder, "t.csv", 0.25, |lines| lines[4] = "2024-01-15,ABC,2024-03-15,85,P,0.3,0.4,100".into());
    let calls = chain(&folder, "o.csv", 0.25, |lines| lines.retain(|line| !line.contains(",P,")));
    for (file, args, parts) in [
        (&nan, &[][..], &["n.csv", "row 5", "column 'bid'", "'nan'"][..]),
        (&crossed, &[], &["x.csv", "row 5", "'0.5'", "above the ask"]),
        (&expired, &[], &["e.csv", "row 5", "expiry", "expired before"]),
        (&strike, &[], &["k.csv", "row 5", "strike", "-85"]),
        (&two, &[], &["t.csv", "2 underlyings", "--symbols ABC"]),
        (&calls, &[], &["o.csv", "both a call's and a put's"]),
        (&file, &["--symbols", "ZZZ"], &["c.csv", "underlying"]),
        (&file, &["--model", "bootstrap"], &["--model", "--prices"]),
        (&file, &["--prices", "p.csv"], &["--prices", "--chain"]),
    ] {
        let ran = run(&[&["hedge", "--chain", file], args, &QUICK[..]].concat());
        assert_eq!((ran.code, ran.stdout.as_str(), ran.stderr.lines().count()), (2, "", 1), "{args:?} {file}: {}", ran.stderr);
        for part in parts {
            assert!(ran.stderr.contains(part), "{file}: '{part}' is not in: {}", ran.stderr);
        }
    }
    done(&[&["hedge", "--chain", &crossed, "--drop-crossed", "--policy", "delta"], &QUICK[..]].concat());
}

#[test]
fn real_quotes_are_hedged() {
    let Some(file) = data("option_chains/equity_eod_quotes.csv") else { return };
    let args = ["--chain", &file, "--symbols", "AAPL", "--to", "2014-06-06", "--maturity", "0.3", "--policy", "none,delta,whalley_wilmott", "--rebalance", "1"];
    let found = hedge_json(&[&args[..], &QUICK[..]].concat());
    let market = &found["run"]["market"];
    // Parity gives 645.55 for the shortest expiries, against 645.57; volatilities are 23 to 27 %.
    assert!((number(&market["forward"]) / 645.57 - 1.0).abs() < 0.01 && (0.2..0.3).contains(&number(&market["volatility"])), "{market}");
    let (bare, delta) = (row(&found, "none", 1, 10.0), row(&found, "delta", 1, 10.0));
    assert!(number(&delta["sd"]) < 0.25 * number(&bare["sd"]), "{bare} {delta}");
    let heston = hedge_json(&[&args[..], &["--model", "heston"], &QUICK[..]].concat());
    assert!(number(&row(&heston, "delta", 1, 10.0)["sd"]) > number(&delta["sd"]), "a moving variance leaves more");
}

#[test]
fn futures_hedge_the_spot() {
    let plain = ["--option", "spot", "--window", "40", "--basis-volatility", "0.02", "--cost-bps", "1", "--rebalance", "5", "--position", "long"];
    let ratio = ["--policy", "none,minimum_variance"];
    let found = hedge_json(&[&plain[..], &ratio, &QUICK[..]].concat());
    let (bare, hedged) = (&found["rows"][0], &found["rows"][1]);
    assert!(number(&hedged["sd"]) < 0.7 * number(&bare["sd"]), "{bare} {hedged}");
    for (more, part) in [
        (&["--policy", "minimum_variance", "--basis-correlation", "1.5"][..], "not positive definite"),
        (&["--policy", "none"], "--window"),
        (&["--policy", "minimum_variance", "--basis-reversion", "-1"], "--basis-reversion"),
    ] {
        let ran = run(&[&["hedge"], &plain[..], more, &QUICK[..]].concat());
        assert!(ran.code == 2 && ran.stderr.contains(part), "{more:?}: {}", ran.stderr);
    }
}

#[cfg(unix)]
#[test]
fn a_run_is_stopped_by_the_user() {
    let folder = Folder::new();
    let child = std::process::Command::new(env!("CARGO_BIN_EXE_forback"))
        .args(["hedge", "--device", "cpu", "--paths", "20000000", "--out", &folder.path("out")])
        .stderr(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    std::thread::sleep(std::time::Duration::from_secs(3));
    assert!(std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let out = child.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert_eq!((out.status.code(), out.stdout.len()), (Some(130), 0), "{stderr}");
    assert!(stderr.starts_with("interrupted: ") && stderr.lines().count() == 1, "{stderr}");
}

// ---- devices ----------------------------------------------------------------------------------------------------------

#[test]
fn devices_agree() {
    let args = ["--paths", "2000", "--steps", "30", "--policy", "none,delta,leland,band,whalley_wilmott,move", "--cost-bps", "10", "--rebalance", "1"];
    let want = hedge_json(&[&args[..], &["--device", "reference"]].concat());
    for device in ["cpu", "wgpu", "cuda", "cuda-host"].into_iter().filter(|device| here(device)) {
        let got = hedge_json(&[&args[..], &["--device", device]].concat());
        for (got, want) in array(&got["rows"]).iter().zip(array(&want["rows"])) {
            for name in ["mean", "sd", "cvar", "var", "cost"] {
                let (g, w) = (number(&got[name]), number(&want[name]));
                // 2e-6 of the spot per path; a band or a move decides some paths differently by rounding.
                assert!((g - w).abs() < 2e-3, "{device}, {}: {name} {g}, {w} on the reference", got["name"]);
            }
        }
    }
}

// ---- what is wrong ----------------------------------------------------------------------------------------------------

#[test]
fn what_cannot_be_hedged_is_refused_in_one_line() {
    let folder = Folder::new();
    let prices = walk(&folder, "p.csv", 300, 0.2);
    let broken = folder.text("b.csv", "date,A\n2020-01-01,1\n2020-01-02,x\n");
    let still = folder.text("s.csv", "date,A\n2020-01-01,5\n2020-01-02,5\n2020-01-03,5\n");
    let two = folder.text("t.csv", "date,A,B\n2020-01-01,5,6\n2020-01-02,5,7\n2020-01-03,5,8\n");
    for (args, parts) in [
        (&["--maturity", "0"][..], &["--maturity = 0", "years to expiry"][..]),
        (&["--maturity", "-1"], &["--maturity", "-1"]),
        (&["--maturity", "NaN"], &["--maturity", "NaN"]),
        (&["--volatility", "0"], &["--volatility", "nothing to hedge"]),
        (&["--volatility", "20"], &["--volatility", "0.2 for 20 %"]),
        (&["--hedge-volatility", "0"], &["--hedge-volatility"]),
        (&["--strike", "0"], &["--strike", "above 0"]),
        (&["--strike", "90,-5"], &["--strike", "-5"]),
        (&["--spot", "0"], &["--spot"]),
        (&["--model", "heston", "--correlation", "1.1"], &["--correlation", "not positive definite"]),
        (&["--model", "heston", "--vol-of-vol", "0"], &["--vol-of-vol", "gbm"]),
        (&["--model", "merton", "--jump-intensity", "-1"], &["--jump-intensity", "0 or more"]),
        (&["--model", "hestn"], &["hestn", "heston"]),
        (&["--vol-of-vol", "0.3"], &["--vol-of-vol", "heston and bates"]),
        (&["--model", "bootstrap"], &["--model", "--prices"]),
        (&["--model", "replay"], &["--model", "--prices"]),
        (&["--model", "regimes", "--regime-volatility", "0.1,0.2,0.3", "--regime-stay", "0.9,0.9"], &["--regime-stay", "as many"]),
        (&["--paths", "0"], &["--paths", "at least one"]),
        (&["--paths", "1e12"], &["1.000e12 paths", "lower --paths"]),
        (&["--paths", "many"], &["--paths", "whole number"]),
        (&["--steps", "0"], &["--steps", "at least one"]),
        (&["--rebalance", "0"], &["--rebalance", "1 or more"]),
        (&["--rebalance", "300"], &["--rebalance", "252 steps"]),
        (&["--policy", "dleta"], &["dleta", "delta"]),
        (&["--policy", "delta,delta"], &["--policy", "twice"]),
        (&["--policy", "delta", "--band", "0.1"], &["--band", "not asked for"]),
        (&["--cost-bps", "-1"], &["--cost-bps", "0 or more"]),
        (&["--option", "straddle"], &["straddle", "digital"]),
        (&["--position", "shrt"], &["shrt", "short"]),
        (&["--risk", "variance"], &["variance", "cvar"]),
        (&["--alpha", "1"], &["--alpha"]),
        (&["--replay", "100000"], &["--replay", "0 to 99999"]),
        (&["--replay", "0", "--setup", "4000"], &["--setup", "4000"]),
        (&["--symbols", "SPY"], &["--symbols", "--prices"]),
        (&["--prices", "no/such.csv"], &["no/such.csv", "not found"]),
        (&["--prices", &broken], &["b.csv", "row 3", "column 'A'", "'x'"]),
        (&["--prices", &still], &["s.csv", "does not move"]),
        (&["--prices", &two], &["--prices", "2 symbols", "--symbols A"]),
        (&["--prices", &prices, "--symbols", "AAB"], &["AAB", "AAA"]),
        (&["--prices", &prices, "--model", "bootstrap", "--block", "0.5"], &["--block", "1 to 299"]),
        (&["--prices", &prices, "--model", "bootstrap", "--steps", "50", "--maturity", "1"], &["--steps", "leave --steps or --maturity out"]),
    ] {
        let out = folder.path("refused");
        let ran = run(&[&["hedge", "--device", "cpu", "--out", &out], args].concat());
        assert_eq!(std::fs::read_dir(&out).map_or(0, Iterator::count), 0, "{args:?} left something");
        assert_eq!((ran.code, ran.stdout.as_str()), (2, ""), "{args:?}: {}", ran.stderr);
        assert_eq!(ran.stderr.lines().count(), 1, "{args:?}: {}", ran.stderr);
        for part in parts {
            assert!(ran.stderr.contains(part), "{args:?}: '{part}' is not in: {}", ran.stderr);
        }
    }
}
