//! Stories of `forback regimes` and of sweeps behind a regime filter.

use super::{DAY, Folder, array, chromium, data, date, done, floats, here, numbers_of, opened, rows, run, sweep_json, trace};
use forback::kernels::philox::{normals, philox4x32, uniform};
use forback::regimes::{Panel, Refits, RegimeConfig, Train, rolling};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use serde_json::{Value, json};
use std::fs::File;

/// The one JSON object of `forback regimes … --json`.
fn regimes_json(args: &[&str]) -> Value {
    let stdout = done(&[&["regimes", "--json"], args].concat());
    assert_eq!(stdout.lines().count(), 1, "{stdout}");
    serde_json::from_str(&stdout).unwrap()
}

/// Closes whose regimes are known: 0.5 % a day for about 100 days, then 2.5 % for about 40. Also the state of each bar.
fn two_regimes(bars: usize, seed: u32) -> (Vec<f64>, Vec<usize>) {
    let (mut price, mut state) = (100.0, 0);
    let mut closes = vec![price];
    let mut states = vec![state];
    for t in 1..bars {
        let words = philox4x32([t as u32, 0, 0, 0], [seed, 99]);
        if uniform(words[3]) < [0.01, 0.025][state] {
            state = 1 - state;
        }
        price *= f64::exp([0.0008, -0.0010][state] + [0.005, 0.025][state] * normals(words)[0]);
        closes.push(price);
        states.push(state);
    }
    (closes, states)
}

/// The same as a wide file of assets.
fn file(folder: &Folder, name: &str, columns: &[(&str, &[f64])]) -> String {
    let header = columns.iter().map(|c| c.0).collect::<Vec<_>>().join(",");
    let line = |t: usize| {
        format!("{},{}\n", date(1_000_000_000 / DAY * DAY + t as i64 * DAY), columns.iter().map(|c| c.1[t].to_string()).collect::<Vec<_>>().join(","))
    };
    folder.text(name, &(format!("date,{header}\n") + &(0..columns[0].1.len()).map(line).collect::<String>()))
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("not a number: {value}"))
}

/// A command that must exit with 2, say so in one line that has all the parts, and write nothing.
fn refused(args: &[&str], parts: &[&str]) {
    let folder = Folder::new();
    let out = folder.path("out");
    let ran = run(&[args, &["--out", &out]].concat());
    assert_eq!((ran.code, ran.stdout.as_str()), (2, ""), "{args:?}\n{}", ran.stderr);
    assert!(ran.stderr.starts_with("error: ") && ran.stderr.lines().count() == 1, "one line: {}", ran.stderr);
    for part in parts {
        assert!(ran.stderr.contains(part), "'{part}' is not in: {}", ran.stderr);
    }
    let left: Vec<_> = std::fs::read_dir(&out).into_iter().flatten().collect();
    assert!(left.is_empty(), "{args:?} left {left:?}");
}

const QUICK: [&str; 6] = ["--refit", "250", "--train", "750", "--device", "cpu"];

#[test]
fn known_regimes_are_found_and_ordered_by_volatility() {
    let folder = Folder::new();
    let (closes, states) = two_regimes(3000, 5);
    let prices = file(&folder, "p.csv", &[("AAA", &closes)]);
    let found = regimes_json(&[&[prices.as_str(), "--periods-per-year", "252", "--states", "1..3", "--out", &folder.path("out")], &QUICK[..]].concat());
    let model = &found["models"][0];
    assert_eq!((&model["chosen"]["states"], &model["chosen"]["converged"]), (&json!(2), &json!(true)), "BIC finds two states");
    let (calm, wild) = (&model["states"][0], &model["states"][1]);
    let year = 252f64.sqrt();
    assert!(
        (number(&calm["volatility"]) / (0.005 * year) - 1.0).abs() < 0.05 && (number(&wild["volatility"]) / (0.025 * year) - 1.0).abs() < 0.08,
        "{calm} {wild}"
    );
    assert!((60.0..160.0).contains(&number(&calm["duration"])) && (25.0..65.0).contains(&number(&wild["duration"])), "{calm} {wild}");
    assert!((number(&calm["occupancy"]) + number(&wild["occupancy"]) - 1.0).abs() < 1e-5);
    for row in array(&model["transition"]) {
        assert!((floats(row).iter().sum::<f64>() - 1.0).abs() < 1e-5);
    }
    // Criteria are what their definitions say.
    for c in array(&model["candidates"]) {
        let (l, p, n) = (number(&c["log_likelihood"]), number(&c["parameters"]), number(&model["observations"]));
        assert!((number(&c["bic"]) - (p * n.ln() - 2.0 * l)).abs() < 1e-3 && (number(&c["aic"]) - (2.0 * p - 2.0 * l)).abs() < 1e-3, "{c}");
    }
    // One state is a normal distribution: its likelihood is a closed form.
    let r: Vec<f64> = closes.windows(2).map(|p| f64::from(p[1] as f32 / p[0] as f32).ln()).collect();
    let mean = r.iter().sum::<f64>() / r.len() as f64;
    let variance = r.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / r.len() as f64;
    let normal = -0.5 * r.len() as f64 * ((2.0 * std::f64::consts::PI * variance).ln() + 1.0);
    let one = number(&model["candidates"][0]["log_likelihood"]);
    assert!((one / normal - 1.0).abs() < 1e-5, "{one}, {normal} by the closed form");

    // The files: a row per observation, three kinds of probabilities, which sum to one where there are any, and find the true states.
    let header: Vec<String> = csv::Reader::from_path(folder.path("out/probabilities.csv")).unwrap().headers().unwrap().iter().map(String::from).collect();
    let kinds = ["out_of_sample_0", "out_of_sample_1", "in_sample_filtered_0", "in_sample_filtered_1", "lookahead_smoothed_0", "lookahead_smoothed_1"];
    assert_eq!(header, [&["date", "asset"], &kinds[..]].concat());
    let table = rows(&folder.path("out/probabilities.csv"));
    assert_eq!((table.len(), &table[0][0], &table[0][1]), (2999, date(1_000_000_000 / DAY * DAY + DAY).as_str(), "AAA"));
    let mut right = [0.0; 3];
    for (i, row) in table.iter().enumerate() {
        for kind in 0..3 {
            let p: Vec<f64> = (0..2).filter_map(|k| row[2 + 2 * kind + k].parse().ok()).collect();
            assert_eq!(p.len(), if kind == 0 && i < 750 { 0 } else { 2 }, "row {i}: refits start after 750 observations");
            assert!(p.is_empty() || (p.iter().sum::<f64>() - 1.0).abs() < 1e-5);
            right[kind] += p.get(states[i + 1]).copied().unwrap_or(0.0) / if kind == 0 { 2249.0 } else { 2999.0 };
        }
    }
    assert!(right[0] > 0.88 && right[1] > 0.9 && right[2] > 0.94 && right[2] > right[1], "{right:?}");
    let parquet = ParquetRecordBatchReaderBuilder::try_new(File::open(folder.path("out/probabilities.parquet")).unwrap()).unwrap();
    let made: Value = serde_json::from_str(&parquet.schema().metadata()["forback"]).unwrap();
    assert_eq!((&made["states"], &made["train"]), (&json!("1..3"), &json!("750")));
    assert_eq!(parquet.build().unwrap().map(|b| b.unwrap().num_rows()).sum::<usize>(), 2999);
    let stored: Value = serde_json::from_str(&std::fs::read_to_string(folder.path("out/regimes.json")).unwrap()).unwrap();
    assert_eq!(stored["models"], found["models"]);
}

#[test]
fn a_market_without_a_file_is_printed_for_people() {
    let out = done(&["regimes", "--device", "cpu"]);
    for part in [
        "device ",
        "SYN001 × 2520 bars",
        "2 states",
        "0 calm",
        "1 turbulent",
        "converged after",
        "out of sample, refitted every 252 bars on the last 1260",
        "in hindsight",
    ] {
        assert!(out.contains(part), "'{part}' is not in\n{out}");
    }
    let many = done(&["regimes", "--assets", "7", "--bars", "900", "--restarts", "2", "--refit", "0", "--device", "cpu"]);
    assert!(many.lines().filter(|l| l.starts_with("SYN")).count() == 7 && many.contains("median") && !many.contains("out of sample"), "{many}");
    // A default schedule gives way to a short history and says why; one that was asked for does not.
    let short = done(&["regimes", "--bars", "600", "--device", "cpu"]);
    assert!(short.contains("nothing out of sample: the first refit needs 1260 observations"), "{short}");
    refused(&["regimes", "--bars", "600", "--train", "1000", "--device", "cpu"], &["the first refit needs 1000 observations", "shorten train"]);
}

#[test]
fn prices_after_a_day_change_nothing_known_on_it() {
    let folder = Folder::new();
    let ((a, _), (b, _)) = (two_regimes(1400, 1), two_regimes(1400, 2));
    let cut = 1103;
    let after =
        |x: &[f64], factor: f64| x.iter().enumerate().map(|(t, p)| if t > cut { p * factor * (1.0 + 0.05 * (t % 3) as f64) } else { *p }).collect::<Vec<f64>>();
    let plain = file(&folder, "plain.csv", &[("AAA", &a), ("BBB", &b)]);
    let other = file(&folder, "other.csv", &[("AAA", &after(&a, 1.3)), ("BBB", &after(&b, 0.7))]);
    let head = file(&folder, "head.csv", &[("AAA", &a[..=cut]), ("BBB", &b[..=cut])]);
    let last = date(1_000_000_000 / DAY * DAY + cut as i64 * DAY);
    let cases: [&[&str]; 3] = [
        &["--train", "500", "--features", "returns,volatility:10"],
        &["--train", "anchored:400", "--pooled"],
        &["--train", "500", "--states", "2..3", "--emission", "student-t"],
    ];
    for case in cases {
        let [known, changed, ended] = [&plain, &other, &head].map(|file| out_of_sample(file, &[&["--refit", "100", "--restarts", "3"], case].concat()));
        let (mut same, mut differ) = (0, 0);
        for ((asset, day), p) in &known {
            let key = (asset.clone(), day.clone());
            if *day <= last {
                assert_eq!(p, &changed[&key], "{case:?}, {key:?}: prices after {last} changed what was known");
                // A smaller batch may run in another order: up to rounding.
                let near = |a: &String, b: &String| (a.parse::<f64>().unwrap() - b.parse::<f64>().unwrap()).abs() < 2e-3;
                let also = &ended[&key];
                let unmoved = p.len() == also.len() && p.iter().zip(also).all(|(a, b)| near(a, b));
                assert!(unmoved, "{case:?}, {key:?}: the end of the file changed what was known: {p:?}, {also:?}");
                same += usize::from(!p.is_empty());
            } else {
                differ += usize::from(*p != changed[&key]);
            }
        }
        assert!(same > 1000 && differ > 100, "{case:?}: {same} are the same, {differ} differ after");
    }
}

/// Out-of-sample probabilities by asset and day, as they are written.
fn out_of_sample(file: &str, args: &[&str]) -> std::collections::HashMap<(String, String), Vec<String>> {
    let out = format!("{file}.out");
    done(&[&["regimes", file, "--out", &out, "--device", "cpu"], args].concat());
    let path = format!("{out}/probabilities.csv");
    let names: Vec<bool> = csv::Reader::from_path(&path).unwrap().headers().unwrap().iter().map(|name| name.starts_with("out_of_sample")).collect();
    let of = |row: csv::StringRecord| {
        let p = row.iter().zip(&names).filter(|(p, is)| **is && !p.is_empty()).map(|(p, _)| p.to_string()).collect();
        ((row[1].to_string(), row[0].to_string()), p)
    };
    rows(&path).into_iter().map(of).collect()
}

#[test]
fn pooled_assets_share_a_model_and_are_scaled_by_themselves() {
    let folder = Folder::new();
    let (a, _) = two_regimes(1500, 3);
    // The same moves three times as large: the same model, three times the volatility.
    let large: Vec<f64> = a
        .windows(2)
        .scan(100.0, |p, w| {
            *p *= (w[1] / w[0]).powi(3);
            Some(*p)
        })
        .collect();
    let large = [&[100.0], &large[..]].concat();
    let prices = file(&folder, "p.csv", &[("AAA", &a), ("BBB", &large)]);
    let found = regimes_json(&[&[prices.as_str(), "--pooled"], &QUICK[..]].concat());
    assert_eq!(array(&found["models"]).len(), 1);
    let assets = array(&found["models"][0]["per_asset"]);
    for k in 0..2 {
        let volatility = |asset: usize| number(&assets[asset]["states"][k]["volatility"]);
        assert!((volatility(1) / volatility(0) - 3.0).abs() < 0.01, "{} {}", volatility(0), volatility(1));
    }
    // With a scale of their own both are calm at the same times; with one in common the states also tell them apart.
    let common = regimes_json(&[&[prices.as_str(), "--pooled", "--scale", "common"], &QUICK[..]].concat());
    let apart = |found: &Value| {
        let calm = |asset: usize| number(&found["models"][0]["per_asset"][asset]["states"][0]["occupancy"]);
        (calm(0) - calm(1)).abs()
    };
    assert!(apart(&found) < 1e-3 && apart(&common) > 0.01, "{} {}", apart(&found), apart(&common));
}

#[test]
fn columns_and_levels_are_observations_too() {
    let folder = Folder::new();
    let (closes, states) = two_regimes(1200, 8);
    let line =
        |t: usize| format!("{},{},{}\n", date(1_000_000_000 / DAY * DAY + t as i64 * DAY), closes[t], [-1.0, 1.0][states[t]] + 0.1 * ((t * 7919) % 13) as f64);
    let long = folder.text("long.csv", &(String::from("date,close,signal\n") + &(0..1200).map(line).collect::<String>()));
    let found = regimes_json(&[&long, "--features", "column:signal", "--refit", "0", "--device", "cpu"]);
    let share = states.iter().filter(|&&s| s == 0).count() as f64 / 1200.0;
    let lower = (0..2).find(|&k| number(&found["models"][0]["mean"][k][0]) < 0.5).unwrap();
    assert!((number(&found["models"][0]["states"][lower]["occupancy"]) - share).abs() < 0.01, "{}", found["models"][0]);
    let level = regimes_json(&[&long, "--price", "signal", "--features", "level", "--refit", "0", "--device", "cpu"]);
    assert_eq!(level["models"][0]["mean"], found["models"][0]["mean"]);
    assert!(level["models"][0]["states"][0]["volatility"].is_null(), "a level that is no price has no volatility");
}

#[test]
fn wrong_regimes_are_refused_with_a_reason() {
    let folder = Folder::new();
    let (closes, _) = two_regimes(300, 4);
    let prices = file(&folder, "p.csv", &[("AAA", &closes)]);
    let flat = file(&folder, "flat.csv", &[("AAA", &closes), ("BBB", &[5.0; 300])]);
    for (args, parts) in [
        (&["--states", "0"][..], &["--states", "2..5"][..]),
        (&["--states", "5..2"], &["--states = 5..2"]),
        (&["--states", "30"], &["observations", "30 states need 300 observations"]),
        (&["--states", "65"], &["states = 65", "from 1 to 64"]),
        (&["--features", "retruns"], &["unknown feature 'retruns'", "did you mean 'returns'"]),
        (&["--features", "volatility:1"], &["2 bars or more"]),
        (&["--features", "returns,returns"], &["twice"]),
        (&["--features", "column:vix"], &["a wide file has one column per asset"]),
        (&["--features", "volatility:400"], &["the features need 400 bars"]),
        (&["--emission", "laplace"], &["unknown emission 'laplace'", "gaussian, student-t"]),
        (&["--criterion", "hqc"], &["unknown criterion"]),
        (&["--restarts", "0"], &["restarts = 0"]),
        (&["--iterations", "0"], &["--iterations = 0"]),
        (&["--freedom", "0"], &["degrees of freedom"]),
        (&["--train", "often"], &["train = often"]),
        (&["--refit", "0", "--train", "100"], &["--refit 0"]),
        (&["--periods-per-year", "-1"], &["--periods-per-year"]),
        (&["--symbols", "CCC"], &["unknown symbol 'CCC'"]),
        (&["--pooled", "--scale", "mine"], &["unknown scale 'mine'"]),
    ] {
        refused(&[&["regimes", prices.as_str()], args].concat(), parts);
    }
    refused(&["regimes", &flat, "--device", "cpu"], &["returns of BBB", "constant", "does not move"]);
    refused(&["regimes", "--symbols", "AAA"], &["--symbols", "needs a price file"]);
    let missing = folder.path("nowhere.csv");
    refused(&["regimes", &missing], &["file not found"]);
}

#[test]
fn devices_see_the_same_regimes() {
    let folder = Folder::new();
    let ((a, _), (b, _)) = (two_regimes(900, 6), two_regimes(900, 7));
    let prices = file(&folder, "p.csv", &[("AAA", &a), ("BBB", &b)]);
    let args = |device| [prices.as_str(), "--refit", "200", "--train", "500", "--restarts", "2", "--iterations", "40", "--device", device];
    let want = regimes_json(&args("cpu"));
    for device in ["wgpu", "cuda", "cuda-host"].into_iter().filter(|device| here(device)) {
        let got = regimes_json(&args(device));
        for (got, want) in array(&got["models"]).iter().zip(array(&want["models"])) {
            let (l, m) = (number(&got["chosen"]["log_likelihood"]), number(&want["chosen"]["log_likelihood"]));
            assert!((l - m).abs() < 1e-5 * m.abs(), "{device}: log-likelihood {l}, {m} on the CPU");
            for k in 0..2 {
                let (v, w) = (number(&got["states"][k]["volatility"]), number(&want["states"][k]["volatility"]));
                assert!((v / w - 1.0).abs() < 5e-3, "{device}: volatility {v}, {w} on the CPU");
            }
        }
    }
}

#[test]
fn the_page_shows_what_the_files_hold() {
    let Some(browser) = chromium() else { return };
    let folder = Folder::new();
    let ((a, _), (b, _)) = (two_regimes(1100, 11), two_regimes(1100, 12));
    let prices = file(&folder, "p.csv", &[("</script>A&B", &a), ("BBB", &b)]);
    let out = folder.path("out");
    let found = regimes_json(&[&[prices.as_str(), "--states", "1..3", "--out", &out], &QUICK[..]].concat());
    let page = format!("{out}/report.html");
    let numbers = numbers_of(&page);
    assert_eq!((array(&numbers["assets"]).len(), array(&numbers["time"]).len(), &numbers["run"]), (2, 1099, &json!(1)));
    let seen = opened(browser, &page, "asset=BBB&state=1&theme=dark");
    assert_eq!(seen["errors"], json!([]));
    let table = rows(&format!("{out}/probabilities.csv"));
    let of_b: Vec<_> = table.iter().filter(|r| r[1] == *"BBB").collect();
    let columns = (table[0].len() - 2) / 3;
    for (name, kind) in [("out of sample", 0), ("smoothed", 2)] {
        let shown = array(&trace(&seen, "probability-chart", name)["y"]);
        assert_eq!(shown.len(), of_b.len());
        for (shown, row) in shown.iter().zip(&of_b) {
            match row[2 + kind * columns + 1].parse::<f64>() {
                Ok(p) => assert!((number(shown) - 100.0 * p).abs() < 0.11, "{} {name}: {shown}, {p} in the file", &row[0]),
                Err(_) => assert!(shown.is_null()),
            }
        }
    }
    // The price is drawn once per bar, in one of the colours.
    let price = array(&seen["held"]["price-chart"]["traces"]);
    let mut drawn: Vec<f64> = price.iter().flat_map(|t| array(&t["y"])).filter_map(Value::as_f64).collect();
    drawn.sort_by(f64::total_cmp);
    drawn.dedup();
    assert!(b[1..].iter().all(|p| drawn.iter().any(|d| (d / p - 1.0).abs() < 1e-5)), "every price is there");
    let matrix = array(&array(&seen["held"]["matrix-chart"]["traces"])[0]["z"]);
    let want = array(&found["models"][1]["transition"]);
    assert!(matrix.iter().flat_map(floats).zip(want.iter().flat_map(floats)).all(|(got, want)| (got - 100.0 * want).abs() < 1e-3));
    // All assets together.
    let seen = opened(browser, &page, "theme=light");
    assert_eq!(seen["errors"], json!([]));
    assert!(seen["held"]["shares-chart"]["drawn"].as_u64().unwrap() > 0 && seen["held"]["spread-chart"]["drawn"].as_u64().unwrap() > 0);
}

#[test]
fn a_page_of_many_assets_stays_small() {
    let folder = Folder::new();
    let args = ["regimes", "--assets", "300", "--bars", "700", "--restarts", "1", "--iterations", "15", "--refit", "300", "--train", "300"];
    done(&[&args[..], &["--pooled", "--states", "3", "--device", "cpu", "--out", &folder.path("out")]].concat());
    let size = std::fs::metadata(folder.path("out/report.html")).unwrap().len();
    assert!(size < 8_000_000, "{size} bytes");
    assert_eq!(array(&numbers_of(&folder.path("out/report.html"))["assets"]).len(), 300);
}

// ---- sweeps behind a filter ---------------------------------------------------------------------------------------------

const FILTER: [&str; 10] =
    ["--grid", "fast=5|10,slow=30|60", "--walk-forward", "train=300,test=60", "--regime-refit", "150", "--regime-train", "400", "--device", "cpu"];

#[test]
fn a_threshold_of_zero_is_no_filter() {
    let folder = Folder::new();
    let ((a, _), (b, _)) = (two_regimes(1200, 21), two_regimes(1200, 22));
    let prices = file(&folder, "p.csv", &[("AAA", &a), ("BBB", &b)]);
    for execution in ["same_close", "next_close"] {
        let more = ["--execution", execution, "--select", "both", "--cost-bps", "0,10", "--top", "100"];
        let gated = sweep_json(&[&[prices.as_str(), "--regime-filter", "2@0"], &FILTER[..], &more].concat());
        // The same bars without a filter: the warm-up is longer than that of the grid, so the market begins later.
        let start = gated["start"].as_u64().unwrap();
        assert_eq!(start, 401 + u64::from(execution == "next_close"));
        let replay = |args: &[&str]| sweep_json(&[args, &["--replay", "3"]].concat())["replays"][0]["assets"][0]["equity"].clone();
        let with = floats(&replay(&[&[prices.as_str(), "--regime-filter", "2@0"], &FILTER[..], &["--execution", execution]].concat()));
        let without = floats(&replay(&[&[prices.as_str()], &FILTER[..4], &["--device", "cpu", "--execution", execution]].concat()));
        let at = start as usize;
        // Entering pays once; afterwards both earn the same.
        for j in [at + 200, without.len() - 1] {
            let (got, want) = (with[j] / with[at + 1], without[j] / without[at + 1]);
            assert!((got / want - 1.0).abs() < 2.5e-3, "{execution}, bar {j}: {got}, {want} without a filter");
        }
        assert_eq!(gated["sets"], json!(4));
    }
}

#[test]
fn a_filter_holds_nothing_where_it_is_closed_and_knows_no_tomorrow() {
    let folder = Folder::new();
    let (a, _) = two_regimes(1300, 31);
    let cut = 1001;
    let other: Vec<f64> = a.iter().enumerate().map(|(t, p)| if t > cut { p * 1.2 * (1.0 + 0.04 * (t % 2) as f64) } else { *p }).collect();
    let (plain, other) = (file(&folder, "p.csv", &[("AAA", &a)]), file(&folder, "o.csv", &[("AAA", &other)]));
    let probabilities = |file: &str| {
        let out = format!("{file}.regimes");
        done(&["regimes", file, "--refit", "150", "--train", "400", "--device", "cpu", "--out", &out]);
        rows(&format!("{out}/probabilities.csv"))
    };
    let known = probabilities(&plain);
    for (execution, lag) in [("same_close", 0), ("next_close", 1)] {
        let weights = |file: &str| {
            let out = format!("{file}.{execution}");
            done(&[&["sweep", file, "--regime-filter", "2@0|0.8", "--execution", execution, "--replay", "0,1", "--out", &out], &FILTER[..]].concat());
            rows(&format!("{out}/equity.csv"))
        };
        let (held, changed) = (weights(&plain), weights(&other));
        let bar = |row: &csv::StringRecord| known.iter().position(|k| k[0] == row[3]).unwrap() + 1;
        let (mut open, mut closed) = (0, 0);
        let ungated: std::collections::HashMap<String, f64> = held.iter().filter(|r| r[1] == *"0").map(|r| (r[3].to_string(), r[4].parse().unwrap())).collect();
        for row in held.iter().filter(|r| r[1] == *"1") {
            // The return that ends at bar j + 1 was decided at bar j − lag.
            let decided = bar(row) - 1 - lag;
            let p = known[decided - 1][2].parse::<f64>().unwrap_or(0.0);
            let want = if p > 0.8 { ungated[&row[3]] } else { 0.0 };
            assert_eq!(row[4].parse::<f64>().unwrap(), want, "{execution}, {}: probability {p} at the decision", &row[3]);
            if p > 0.8 { open += 1 } else { closed += 1 }
        }
        assert!(open > 200 && closed > 50, "{open} open, {closed} closed");
        // Nothing decided up to the cut depends on what came after.
        let same = held.iter().zip(&changed).filter(|(h, _)| bar(h) - 1 - lag <= cut);
        let mut decided = 0;
        for (h, c) in same {
            assert_eq!((&h[3], &h[4]), (&c[3], &c[4]), "{execution}: tomorrow's price changed today's position");
            decided += 1;
        }
        assert!(decided > 1000, "{decided}");
    }
}

#[test]
fn a_filtered_sweep_in_parts_is_one_run_and_its_page_opens() {
    let folder = Folder::new();
    let ((a, _), (b, _)) = (two_regimes(1300, 41), two_regimes(1300, 42));
    let prices = file(&folder, "p.csv", &[("AAA", &a), ("BBB", &b)]);
    let base = [&["sweep", prices.as_str(), "--regime-filter", "2:calm@0|0.5|0.9", "--select", "both", "--portfolio", "equal"], &FILTER[..]].concat();
    let (whole, parts) = (folder.path("whole"), folder.path("parts"));
    let out = done(&[&base[..], &["--out", &whole]].concat());
    assert!(out.contains("P(0 calm) of 2 states") && out.contains("% at 0.5") && out.contains("regime_above"), "{out}");
    done(&[&base[..], &["--out", &parts, "--part-sets", "5"]].concat());
    for name in ["results.csv", "walk_forward.csv", "out_of_sample.csv"] {
        let read = |dir: &str| std::fs::read_to_string(format!("{dir}/{name}")).unwrap();
        assert!(read(&whole) == read(&parts), "{name} differs");
    }
    let results = rows(&format!("{whole}/results.csv"));
    assert_eq!(results.len(), 4 * 3 * 2);
    // A higher threshold trades less time: turnover may rise, but the sets are numbered threshold first.
    assert!(results.chunks(2).zip([0.0, 0.5, 0.9].iter().cycle()).all(|(rows, p)| rows.iter().all(|r| r[5].parse() == Ok(*p))));
    if let Some(browser) = chromium() {
        let seen = opened(browser, &format!("{whole}/report.html"), "");
        assert_eq!(seen["errors"], json!([]));
        assert!(seen["held"]["equity-chart"]["drawn"].as_u64().unwrap() > 0);
    }
    // config.toml repeats it.
    let again = done(&["sweep", "--config", &format!("{whole}/config.toml"), "--json"]);
    let first = sweep_json(&base[1..]);
    let again: Value = serde_json::from_str(&again).unwrap();
    assert_eq!(again["costs"], first["costs"]);
}

#[test]
fn wrong_filters_are_refused_with_a_reason() {
    for (args, parts) in [
        (&["--regime-filter", "many"][..], &["--regime-filter", "begin with a number of states"][..]),
        (&["--regime-filter", "2:2"], &["states are 0 (calm) to 1 (turbulent)"]),
        (&["--regime-filter", "2@1"], &["below 1"]),
        (&["--regime-filter", "2@0.5|0.5"], &["each once"]),
        (&["--regime-filter", "2", "--regime-train", "5000"], &["the first refit needs 5000 observations"]),
        (&["--regime-filter", "2", "--regime-features", "level"], &["returns and volatility:N"]),
        (&["--regime-refit", "100"], &["--regime-refit", "--regime-filter"]),
    ] {
        refused(&[&["sweep", "--grid", "fast=5,slow=20", "--device", "cpu"], args].concat(), parts);
    }
}

#[test]
fn spy_is_calm_most_of_the_time_and_turbulent_in_2008() {
    let Some(prices) = data("etfs_daily/ohlcv.csv.gz") else { return };
    let folder = Folder::new();
    let found = regimes_json(&[&prices, "--symbols", "SPY", "--device", "cpu", "--out", &folder.path("out")]);
    let (calm, wild) = (&found["models"][0]["states"][0], &found["models"][0]["states"][1]);
    assert!((0.08..0.13).contains(&number(&calm["volatility"])) && (0.28..0.40).contains(&number(&wild["volatility"])), "{calm} {wild}");
    assert!(number(&calm["mean"]) > 0.1 && number(&wild["mean"]) < 0.0 && (30.0..150.0).contains(&number(&calm["duration"])), "{calm} {wild}");
    let autumn = rows(&folder.path("out/probabilities.csv")).into_iter().filter(|r| r[0].starts_with("2008-1"));
    let p: Vec<f64> = autumn.map(|r| r[7].parse().unwrap()).collect();
    assert!(p.len() == 64 && p.iter().all(|&p| p > 0.95), "{p:?}");
    let next = &found["out_of_sample"]["next_bar"];
    assert!(number(&next[1]["volatility"]) > 1.5 * number(&next[0]["volatility"]), "{next}");
}

#[test]
fn weekly_returns_have_the_likelihood_of_other_packages() {
    let Some(series) = data("hmm_sp500_weekly_gaussian/series.csv") else { return };
    let found = regimes_json(&[&series, "--price", "log_return_pct", "--features", "level", "--states", "2..3", "--refit", "0", "--device", "cpu"]);
    let candidates = array(&found["models"][0]["candidates"]);
    for (c, want) in candidates.iter().zip([-3671.0165, -3623.4654]) {
        assert!((number(&c["log_likelihood"]) - want).abs() < 0.02, "{c}, {want} by hmmlearn");
    }
    assert_eq!(run(&["regimes", "--help"]).code, 0);
}

#[test]
fn predictions_carry_filtered_probabilities_forward() {
    let (closes, _) = two_regimes(900, 51);
    let close = ndarray::Array2::from_shape_vec((900, 1), closes.iter().map(|&p| p as f32).collect()).unwrap();
    let symbols = ["AAA".to_string()];
    let panel = Panel { symbols: &symbols, close: close.view(), columns: Vec::new() };
    let refits = Refits { every: 200, train: Train::Last(400) };
    let device = forback::Device::open("cpu").unwrap();
    let known = rolling(&device, &panel, &RegimeConfig::default(), refits, &mut |_| Ok(())).unwrap();
    assert_eq!((known.times(), known.first_bar()), (3, Some(401)));
    assert_eq!(known.predicted(0).unwrap().values().iter().filter(|p| !p.is_nan()).count(), 2 * 499);
    let (one, far) = (known.predicted(1).unwrap(), known.predicted(5000).unwrap());
    for bar in [401, 600, 601, 899] {
        let refit = &known.refits[(bar - 401) / 200];
        assert!(refit.bar < bar && bar <= refit.bar + 200, "bar {bar} is filtered by the refit before it, at {}", refit.bar);
        let (p, next, a) = (known.filtered.get(0, bar).unwrap(), one.get(0, bar).unwrap(), &refit.transition);
        for j in 0..2 {
            let want = f64::from(p[0]) * a[[0, j]] + f64::from(p[1]) * a[[1, j]];
            assert!((f64::from(next[j]) - want).abs() < 1e-6, "bar {bar}: {next}, {want}");
        }
        // In the long run the chain forgets where it was.
        let calm = a[[1, 0]] / (a[[1, 0]] + a[[0, 1]]);
        assert!((f64::from(far.get(0, bar).unwrap()[0]) - calm).abs() < 1e-5);
    }
    assert!(known.filtered.get(0, 400).is_none() && known.filtered.get(1, 500).is_none() && known.filtered.get(0, 900).is_none());
}
