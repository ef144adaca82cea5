//! End to end through the binary: what a user types, and what comes back.
//!
//! A device that `FORBACK_REQUIRE` names must be here; another one that is not is skipped, with its reason. So is market data that is
//! not beside the project.

#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

#[path = "common/signals.rs"]
mod signals;

use arrow_array::{ArrayRef, Date32Array, Float64Array, RecordBatch, StringArray};
use arrow_cast::display::{ArrayFormatter, FormatOptions};
use forback::kernels::philox::{normals, philox4x32};
use forback::kernels::{KERNELS, OPS};
use forback::sim::market::{Market, regime_switching_market};
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use serde_json::{Value, json};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

// ---- running -----------------------------------------------------------------------------------------------------

struct Ran {
    code: i32,
    stdout: String,
    stderr: String,
}

/// Runs the binary. What Vulkan drivers say on stderr is theirs: the Wayland complaint is avoided, warnings are taken out.
fn run(args: &[&str]) -> Ran {
    let mut command = Command::new(env!("CARGO_BIN_EXE_forback"));
    command.args(args).env_remove("FORBACK_DEVICE").env("XDG_RUNTIME_DIR", std::env::temp_dir());
    let out = command.output().unwrap();
    let ours = |line: &&str| !line.starts_with("MESA") && !line.starts_with("WARNING: ");
    let stderr = String::from_utf8(out.stderr).unwrap().lines().filter(ours).map(|line| format!("{line}\n")).collect();
    Ran { code: out.status.code().unwrap_or(-1), stdout: String::from_utf8(out.stdout).unwrap(), stderr }
}

/// Runs a command that must succeed without a word on stderr.
fn done(args: &[&str]) -> String {
    let ran = run(args);
    assert_eq!((ran.code, ran.stderr.as_str()), (0, ""), "{args:?}");
    ran.stdout
}

/// The one JSON object of `forback sweep … --json`.
fn sweep_json(args: &[&str]) -> Value {
    let stdout = done(&[&["sweep", "--json"], args].concat());
    assert_eq!(stdout.lines().count(), 1, "{stdout}");
    serde_json::from_str(&stdout).unwrap()
}

/// What a sweep found, without what may differ between two runs of it: where the prices came from, how long it took.
fn findings(args: &[&str]) -> Value {
    let mut all = sweep_json(args);
    for name in ["run", "seconds", "set_bars_per_second", "launches", "submits"] {
        assert!(!all[name].is_null(), "{name}");
        all.as_object_mut().unwrap().remove(name);
    }
    all
}

fn array(value: &Value) -> &[Value] {
    value.as_array().unwrap_or_else(|| panic!("not a list: {value}"))
}

// ---- files -------------------------------------------------------------------------------------------------------

/// A folder that lives as long as the test.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Folder {
        Folder(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).display().to_string()
    }

    fn text(&self, name: &str, content: &str) -> String {
        std::fs::write(self.path(name), content).unwrap();
        self.path(name)
    }

    fn gzip(&self, name: &str, content: &str) -> String {
        let mut encoder = flate2::write::GzEncoder::new(File::create(self.path(name)).unwrap(), flate2::Compression::fast());
        encoder.write_all(content.as_bytes()).unwrap();
        encoder.finish().unwrap();
        self.path(name)
    }

    fn parquet(&self, name: &str, columns: Vec<(&str, ArrayRef)>) -> String {
        let batch = RecordBatch::try_from_iter(columns).unwrap();
        let mut writer = ArrowWriter::try_new(File::create(self.path(name)).unwrap(), batch.schema(), None).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
        self.path(name)
    }
}

/// Rows of a CSV file, without its header.
fn rows(path: &str) -> Vec<csv::StringRecord> {
    csv::Reader::from_path(path).unwrap().records().map(Result::unwrap).collect()
}

/// Three assets of a synthetic market.
fn market(bars: usize) -> Market {
    regime_switching_market(bars, 3, |path, block| normals(philox4x32([path as u32, (path >> 32) as u32, block, 0], [9, 9]))).unwrap()
}

const DAY: i64 = 86_400;

/// Unix seconds as YYYY-MM-DD.
fn date(seconds: i64) -> String {
    time::OffsetDateTime::from_unix_timestamp(seconds).unwrap().date().to_string()
}

fn wide(market: &Market) -> String {
    let line = |t: usize| format!("{},{}\n", date(market.dates[t]), market.close.row(t).iter().map(f32::to_string).collect::<Vec<_>>().join(","));
    format!("date,{}\n", market.symbols.join(",")) + &(0..market.dates.len()).map(line).collect::<String>()
}

fn long(market: &Market) -> String {
    let line = |(t, n): (usize, usize)| format!("{},{},1,{}\n", date(market.dates[t]), market.symbols[n], market.close[[t, n]]);
    let cells = (0..market.symbols.len()).flat_map(|n| (0..market.dates.len()).map(move |t| (t, n)));
    String::from("date,symbol,volume,close\n") + &cells.map(line).collect::<String>()
}

/// A file of the market data beside the project, if it is there.
fn data(name: &str) -> Option<String> {
    let path = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/data")).join(name);
    if !path.exists() {
        println!("skipped: {} is not there", path.display());
        return None;
    }
    Some(path.display().to_string())
}

/// Whether a device is here; a required one must be.
fn here(device: &str) -> bool {
    let required = std::env::var("FORBACK_REQUIRE").is_ok_and(|list| list.split(',').any(|name| name.trim() == device));
    let found = forback::Device::open(device);
    if let Err(reason) = &found {
        assert!(!required, "FORBACK_REQUIRE names {device}, but: {reason}");
        println!("skipped: {reason}");
    }
    found.is_ok()
}

// ---- the main job ------------------------------------------------------------------------------------------------

#[test]
fn a_sweep_needs_no_flag_and_no_file() {
    let out = done(&["sweep"]);
    let line = |start: &str| out.lines().find(|line| line.starts_with(start)).unwrap_or_else(|| panic!("no line starts with '{start}' in\n{out}"));
    assert!(line("device ").len() > "device   ".len());
    assert!(line("data ").contains("synthetic") && line("data ").contains("SYN001 × 2520 bars"));
    let sweep = line("sweep ");
    for part in ["sma_cross", " sets × SYN001 × 2520 bars in ", " s, ", " set-bars/s"] {
        assert!(sweep.contains(part), "'{part}' is not in: {sweep}");
    }
    let sets: u32 = sweep.split(" sets").next().and_then(|head| head.split(' ').next_back()).unwrap().parse().unwrap();
    assert!(sets >= 10_000, "{sets} sets");
    assert!(line("best in sample").contains("10 bp"));
    assert!(line("out of sample").contains("train=756,test=63,step=63: 1323 stitched bars of 21 windows"));
    assert!(line("chosen per asset, 10 bp").split_whitespace().count() >= 10);
    assert!(line("buy and hold").split_whitespace().count() >= 9);
}

#[test]
fn json_is_one_object_and_a_seed_is_a_result() {
    let args = ["--grid", "fast=5|10,slow=20:60:20", "--assets", "2", "--bars", "1000"];
    let all = sweep_json(&args);
    assert_eq!((&all["sets"], &all["assets"], &all["bars"], &all["start"]), (&json!(6), &json!(2), &json!(1000), &json!(59)));
    assert!(all["seconds"].as_f64().unwrap() > 0.0 && all["set_bars_per_second"].as_f64().unwrap() > 0.0);
    let (run, level) = (&all["run"], &all["costs"][0]);
    assert_eq!((&run["strategy"], &run["seed"], &run["cost_bps"]), (&json!("sma_cross"), &json!(0), &json!([10.0])));
    assert!(!run["device"].as_str().unwrap().is_empty());
    assert_eq!(array(&level["top"]).len(), 6);
    assert_eq!(array(&level["per_asset"]["best"]).len(), 2 * all["windows"].as_u64().unwrap() as usize);
    assert!(all["buy_and_hold"]["portfolio"]["sharpe"].is_number());

    let seeded = |seed: &str| findings(&[&args[..], &["--seed", seed]].concat());
    assert_eq!(seeded("7"), seeded("7"));
    assert_ne!(seeded("7"), seeded("8"));
}

/// The sets of a cost level by number: trades are exact, statistics are close.
fn compare(device: &str, case: &str, got: &Value, want: &Value) {
    for (got, want) in array(&got["costs"]).iter().zip(array(&want["costs"])) {
        for choice in ["per_asset", "pooled"] {
            assert_eq!(got[choice]["best"], want[choice]["best"], "{case} on {device}: {choice} choices");
            assert_eq!(got[choice]["trades"], want[choice]["trades"], "{case} on {device}: {choice} trades");
        }
        let sorted = |level: &Value| {
            let mut top = array(&level["top"]).to_vec();
            top.sort_by_key(|set| set["set"].as_u64());
            top
        };
        let (got, want) = (sorted(got), sorted(want));
        assert_eq!(got.len(), want.len());
        for (got, want) in got.iter().zip(&want) {
            assert_eq!((&got["set"], &got["trades"]), (&want["set"], &want["trades"]), "{case} on {device}");
            match (got["sharpe"].as_f64(), want["sharpe"].as_f64()) {
                (Some(g), Some(w)) => assert!((g - w).abs() <= 1e-4 * (1.0 + w.abs()), "{case} on {device}, set {}: Sharpe {g}, {w} on the CPU", got["set"]),
                (g, w) => assert_eq!(g, w, "{case} on {device}, set {}", got["set"]),
            }
        }
    }
}

#[test]
fn devices_choose_and_trade_alike() {
    let cases = [
        ("sma_cross", "fast=2:20:3,slow=30:90:20,short=0:1"),
        ("ema_cross", "fast=5|10,slow=20:100:20"),
        ("macd", "fast=8|12,slow=26,signal=5:9"),
        ("rsi_reversion", "period=5:14:3,low=30|40,high=60|70"),
        ("bollinger_reversion", "period=10:40:10,width=1|2"),
        ("donchian_breakout", "entry=20:60:20,exit=5|10"),
        ("ts_momentum", "lookback=20:100:40,vol_window=20,target_vol=0.1,max_leverage=2"),
    ];
    for device in ["wgpu", "cuda", "cuda-host"].into_iter().filter(|device| here(device)) {
        for (strategy, grid) in cases {
            let args = |device| {
                let small =
                    ["--assets", "3", "--bars", "900", "--walk-forward", "train=250,test=50", "--select", "both", "--cost-bps", "0,10", "--top", "1000"];
                sweep_json(&[&["--strategy", strategy, "--grid", grid, "--device", device], &small[..]].concat())
            };
            let (got, want) = (args(device), args("cpu"));
            assert!(got["launches"].as_u64().unwrap() > 0 && got["run"]["device"].as_str().unwrap().starts_with(device));
            compare(device, strategy, &got, &want);
        }
    }
}

// ---- files out ---------------------------------------------------------------------------------------------------

#[test]
fn out_writes_every_back_test_once_and_higher_costs_earn_less() {
    let folder = Folder::new();
    let out = folder.path("made/on/demand");
    let args = ["--grid", "fast=3:12:3,slow=20:60:20", "--assets", "3", "--bars", "700", "--walk-forward", "train=250,test=50", "--select", "both"];
    let stdout = done(&[&["sweep", "--cost-bps", "0,5,20", "--out", &out], &args[..]].concat());
    assert!(stdout.contains(&format!("wrote    {out}")));
    let path = |name: &str| Path::new(&out).join(name).display().to_string();
    let mut names: Vec<String> = std::fs::read_dir(&out).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names, ["out_of_sample.csv", "results.csv", "results.parquet", "run.json", "walk_forward.csv"]);

    let (sets, assets, costs) = (12, 3, 3);
    let results = rows(&path("results.csv"));
    assert_eq!(results.len(), sets * assets * costs);
    let header: Vec<String> = csv::Reader::from_path(path("results.csv")).unwrap().headers().unwrap().iter().map(String::from).collect();
    let columns = ["cost_bps", "set", "fast", "slow", "short", "symbol", "sharpe", "total_return", "max_drawdown", "turnover", "trades"];
    assert_eq!(header, columns);

    // Parquet holds the same rows, in the same order, and says how it was made.
    let parquet = ParquetRecordBatchReaderBuilder::try_new(File::open(path("results.parquet")).unwrap()).unwrap();
    let run: Value = serde_json::from_str(&parquet.schema().metadata()["forback"]).unwrap();
    assert_eq!((&run["strategy"], &run["sets"], &run["cost_bps"]), (&json!("sma_cross"), &json!(sets), &json!([0.0, 5.0, 20.0])));
    let mut next = 0;
    for batch in parquet.build().unwrap().map(Result::unwrap) {
        let options = FormatOptions::default();
        let cells: Vec<ArrayFormatter<'_>> = batch.columns().iter().map(|c| ArrayFormatter::try_new(c.as_ref(), &options).unwrap()).collect();
        for i in 0..batch.num_rows() {
            for (cell, text) in cells.iter().zip(&results[next]) {
                let cell = cell.value(i).to_string();
                let same = cell == text || cell.parse::<f32>().is_ok_and(|cell| text.parse() == Ok(cell));
                assert!(same, "row {next}: Parquet has {cell}, CSV {text}");
            }
            next += 1;
        }
    }
    assert_eq!(next, results.len());

    // Rows of a cost level are contiguous and in the same order.
    let per_level = sets * assets;
    let number = |row: &csv::StringRecord, column: usize| row[column].parse::<f64>().unwrap();
    for i in 0..per_level {
        let ladder = [&results[i], &results[per_level + i], &results[2 * per_level + i]];
        assert!(ladder.windows(2).all(|pair| (1..6).all(|column| pair[0][column] == pair[1][column])));
        assert!(ladder.windows(2).all(|pair| pair[0][10] == pair[1][10]), "costs do not change trades: {ladder:?}");
        let lower = |pair: &[&csv::StringRecord]| if pair[0][10] == *"0" { pair[0][7] == pair[1][7] } else { number(pair[1], 7) < number(pair[0], 7) };
        assert!(ladder.windows(2).all(lower), "higher costs, lower return: {ladder:?}");
    }

    let windows = sweep_json(&args)["windows"].as_u64().unwrap() as usize;
    let choices = rows(&path("walk_forward.csv"));
    assert_eq!(choices.len(), costs * windows * (assets + 1), "a choice per cost, window and asset, and a pooled one");
    assert!(choices.iter().all(|row| row[4] < row[5] && row[5] <= row[6] && row[6] < row[7]), "train ends before test starts");
    let series = rows(&path("out_of_sample.csv"));
    assert_eq!((series.len(), series[0].len()), (50 * windows, 1 + 2 * costs + 1));
    let run: Value = serde_json::from_str(&std::fs::read_to_string(path("run.json")).unwrap()).unwrap();
    assert!(run["seconds"].as_f64().unwrap() > 0.0 && array(&run["command"]).iter().any(|word| word == "--out"));
}

// ---- files in ----------------------------------------------------------------------------------------------------

#[test]
fn one_market_in_five_formats_is_one_result() {
    let (folder, market) = (Folder::new(), market(400));
    let days: Vec<i32> = market.dates.iter().map(|t| (t / DAY) as i32).collect();
    let (bars, assets) = market.close.dim();
    let column = |n: usize| -> ArrayRef { Arc::new(Float64Array::from_iter_values(market.close.column(n).iter().map(|&p| f64::from(p)))) };
    let mut wide_columns: Vec<(&str, ArrayRef)> = vec![("date", Arc::new(Date32Array::from(days)))];
    wide_columns.extend((0..assets).map(|n| (market.symbols[n].as_str(), column(n))));
    let cells = || (0..bars).flat_map(|t| (0..assets).map(move |n| (t, n)));
    let long_columns: Vec<(&str, ArrayRef)> = vec![
        ("date", Arc::new(StringArray::from_iter_values(cells().map(|(t, _)| date(market.dates[t]))))),
        ("ticker", Arc::new(StringArray::from_iter_values(cells().map(|(_, n)| &market.symbols[n])))),
        ("close", Arc::new(Float64Array::from_iter_values(cells().map(|(t, n)| f64::from(market.close[[t, n]]))))),
    ];
    let files = [
        folder.text("wide.csv", &wide(&market)),
        folder.text("long.csv", &long(&market)),
        folder.gzip("long.csv.gz", &long(&market)),
        folder.parquet("wide.parquet", wide_columns),
        folder.parquet("long.parquet", long_columns),
    ];
    let sweep = |file: &str| findings(&[file, "--grid", "fast=5|10,slow=20|40", "--walk-forward", "train=150,test=50", "--device", "cpu"]);
    let want = sweep(&files[0]);
    assert_eq!((&want["assets"], &want["bars"]), (&json!(3), &json!(400)));
    for file in &files[1..] {
        assert_eq!(sweep(file), want, "{file}");
    }
}

#[test]
fn missing_cells_are_refused_dropped_or_filled_and_the_output_says_so() {
    let (folder, market) = (Folder::new(), market(300));
    let text = wide(&market);
    // A cell of the second asset is empty, one of the third says NaN.
    let hole = |line: &str, column: usize, value: &str| {
        let mut cells: Vec<&str> = line.split(',').collect();
        cells[column] = value;
        cells.join(",")
    };
    let punched = |(i, line): (usize, &str)| match i {
        100 => hole(line, 2, ""),
        200 => hole(line, 3, "NaN"),
        _ => line.to_owned(),
    };
    let lines: Vec<String> = text.lines().enumerate().map(punched).collect();
    let file = folder.text("gaps.csv", &lines.join("\n"));
    let small = ["--grid", "fast=5,slow=20", "--walk-forward", "none"];
    refused(
        &[&[file.as_str()], &small[..]].concat(),
        &["gaps.csv, row 101, column 'SYN002'", "2 of 900 cells are missing", "--missing drop", "--missing fill:5"],
    );
    let out = done(&[&["sweep", &file, "--missing", "drop"], &small[..]].concat());
    for part in ["dropped  SYN002: 1 of 300 bars missing, first ", "dropped  SYN003: 1 of 300 bars missing, first ", "1 sets × SYN001 × 300 bars"] {
        assert!(out.contains(part), "'{part}' is not in\n{out}");
    }
    let out = done(&[&["sweep", &file, "--missing", "fill:2"], &small[..]].concat());
    for part in ["filled   2 cells of 2 assets", "1 sets × 3 assets × 300 bars"] {
        assert!(out.contains(part), "'{part}' is not in\n{out}");
    }
    let run = &sweep_json(&[&[file.as_str(), "--missing", "drop"], &small[..]].concat())["run"]["data"];
    assert_eq!((&run["dropped"][1]["symbol"], array(&run["filled"]).len()), (&json!("SYN003"), 0));
}

// ---- refusals ----------------------------------------------------------------------------------------------------

/// `forback sweep` with these arguments must exit with 2, say so in one line that has all the parts, and write nothing.
fn refused(args: &[&str], parts: &[&str]) {
    let folder = Folder::new();
    let out = folder.path("out");
    let own: &[&str] = if args.contains(&"--out") { &[] } else { &["--out", &out] };
    let args = [&["sweep"], args, own].concat();
    let ran = run(&args);
    assert_eq!((ran.code, ran.stdout.as_str()), (2, ""), "{args:?}\n{}", ran.stderr);
    assert!(ran.stderr.starts_with("error: ") && ran.stderr.lines().count() == 1, "one line: {}", ran.stderr);
    for part in parts {
        assert!(ran.stderr.contains(part), "'{part}' is not in: {}", ran.stderr);
    }
    let left: Vec<_> = std::fs::read_dir(&out).into_iter().flatten().collect();
    assert!(left.is_empty(), "{args:?} left {left:?}");
}

#[test]
fn bad_files_are_refused_by_place() {
    let folder = Folder::new();
    let cases: [(&str, &str, &[&str]); 16] = [
        ("empty.csv", "", &["the file is empty", "needs a header line"]),
        ("header.csv", "date,A,B\n", &["a header and no rows", "at least 2 rows"]),
        ("one_row.csv", "date,A\n2020-01-02,1\n", &["only one bar (2020-01-02)", "at least 2"]),
        ("no_time.csv", "when,A\n2020-01-02,1\n2020-01-03,1\n", &["no time column among: when, A", "--time-column NAME"]),
        ("no_close.csv", "date,symbol,adj_close\n2020-01-02,A,1\n", &["column 'close'", "did you mean 'adj_close'", "--price NAME"]),
        ("text.csv", "date,A\n2020-01-02,1\n2020-01-03,abc\n", &["row 3, column 'A', value 'abc'", "not a number"]),
        ("ragged.csv", "date,A,B\n2020-01-02,1,1\n2020-01-03,1\n", &["row 3", "expected 3 fields as in the header, got 2"]),
        ("gap.csv", "date,A,B\n2020-01-02,1,1\n2020-01-03,,1\n", &["row 3, column 'A'", "1 of 4 cells are missing", "--missing drop"]),
        ("nan.csv", "date,A,B\n2020-01-02,1,NaN\n2020-01-03,1,1\n", &["row 2, column 'B'", "--missing fill:5"]),
        ("infinite.csv", "date,A\n2020-01-02,1\n2020-01-03,inf\n", &["row 3, column 'A', value 'inf'", "not finite"]),
        ("zero.csv", "date,A\n2020-01-02,0\n2020-01-03,1\n", &["row 2, column 'A', value '0'", "not positive", "--from/--to"]),
        ("negative.csv", "date,symbol,close\n2020-01-02,A,1\n2020-01-03,A,-37.63\n", &["row 3, column 'close', value '-37.63'", "not positive"]),
        ("unsorted.csv", "date,A\n2020-01-03,1\n2020-01-02,1\n", &["row 3", "2020-01-02 comes after 2020-01-03", "sort the file"]),
        ("twice.csv", "date,A\n2020-01-02,1\n2020-01-02,1\n", &["row 3", "2020-01-02 is there twice"]),
        ("date.csv", "date,A\n01/02/2020,1\n", &["row 2, column 'date', value '01/02/2020'", "YYYY-MM-DD"]),
        ("columns.csv", "date,A,A\n2020-01-02,1,1\n", &["column 'A'", "two columns have this name"]),
    ];
    for (name, content, parts) in cases {
        let file = folder.text(name, content);
        refused(&[&file], &[&[file.as_str()], parts].concat());
    }
    refused(&["no/such/prices.csv"], &["no/such/prices.csv: file not found"]);
    refused(&[&folder.path("")], &["is a directory"]);
    let truncated = folder.text("cut.parquet", "PAR1 and no footer");
    refused(&[&truncated], &[&truncated, "Parquet file cannot be read"]);
}

#[test]
fn short_histories_are_refused_where_windows_were_asked_for() {
    let folder = Folder::new();
    let file = folder.text("short.csv", &wide(&market(120)));
    refused(
        &[&file, "--grid", "fast=5,slow=20", "--walk-forward", "train=252,test=63"],
        &["needs 334 returns (warm-up 19 + train 252 + test 63)", "the history has 119 returns, 120 bars", "use 215 more bars"],
    );
    // So are windows of the grid, asked for or not.
    let parts = ["warms up over 199 bars", "202 bars", "the history has 120 bars", "set shorter windows"];
    refused(&[&file, "--grid", "fast=5,slow=20:200:20", "--walk-forward", "none"], &parts);
    refused(&[&file], &["warms up over 399 bars", "the history has 120 bars"]);
    // The default scheme gives way, and says so.
    let ran = run(&["sweep", &file, "--grid", "fast=5,slow=20"]);
    assert_eq!((ran.code, ran.stderr.lines().count()), (0, 1), "{}", ran.stderr);
    assert!(ran.stderr.starts_with("note: 120 bars are too few for the default walk-forward"), "{}", ran.stderr);
    assert!(ran.stdout.contains("buy and hold"));
}

#[test]
fn unknown_names_come_with_the_nearest_known_one() {
    let folder = Folder::new();
    let file = folder.text("prices.csv", &wide(&market(30)));
    refused(&["--strategy", "sma_corss"], &["unknown strategy 'sma_corss'; did you mean 'sma_cross'?", "known: sma_cross, ema_cross"]);
    refused(&[&file, "--symbols", "SYN04"], &["unknown symbol 'SYN04'; did you mean 'SYN00", "known: SYN001, SYN002, SYN003"]);
    refused(&["--device", "cudda"], &["unknown device 'cudda'; did you mean 'cuda'?"]);
    refused(&["--device", "wgpu:99"], &["no wgpu device", "--device cpu"]);
    refused(&["--rank-by", "shrape"], &["unknown ranking 'shrape'; did you mean 'sharpe'?"]);
    refused(&["--select", "per_aset"], &["unknown selection 'per_aset'; did you mean 'per_asset'?"]);
    refused(&["--execution", "next_open"], &["unknown execution 'next_open'", "next_close"]);
    refused(&["--grid", "fsat=5"], &["unknown parameter 'fsat'; did you mean 'fast'?"]);
    refused(&["--walk-forward", "tran=100"], &["unknown walk-forward setting 'tran'; did you mean 'train'?"]);
    refused(&[&file, "--missing", "flil"], &["--missing", "flil", "fill:N"]);
    let bench = run(&["bench", "sweep_smaa"]);
    assert_eq!((bench.code, bench.stderr.lines().count()), (2, 1), "{}", bench.stderr);
    assert!(bench.stderr.contains("unknown workload 'sweep_smaa'; did you mean 'sweep_sma'?"), "{}", bench.stderr);
    refused(&["--device", "vulkan"], &["unknown device 'vulkan'; did you mean 'wgpu'?"]);
    refused(&["--missing", "flil"], &["--missing", "flil", "fill:N"]);
    refused(&["--form", "2010"], &["unexpected argument '--form'", "--from", "--help"]);
    refused(&["--bars", "many"], &["invalid value 'many' for '--bars <BARS>'", "--help"]);
    let typo = run(&["sewep"]);
    assert_eq!((typo.code, typo.stderr.lines().count()), (2, 1), "{}", typo.stderr);
    assert!(typo.stderr.contains("'sweep'"), "{}", typo.stderr);
}

#[test]
fn impossible_grids_are_refused_at_once() {
    refused(&["--grid", "fast=20,slow=20"], &["fast ≥ slow", "no set is left"]);
    refused(&["--grid", "fast=60:90,slow=20:50"], &["fast ≥ slow in all 961 combinations"]);
    refused(&["--grid", "fast=2:3,slow=4:5,fast>slow"], &["no set is left", "relax a constraint"]);
    refused(&["--grid", "fast=0,slow=20"], &["fast = 0", "a whole number from 1"]);
    refused(&["--grid", "fast=x"], &["'x' is not a number"]);
    refused(&["--cost-bps", "-5"], &["cost_bps", "-5", "basis points"]);
    refused(&["--cost-bps", "10000"], &["cost_bps", "10000", "basis points"]);
    let start = Instant::now();
    refused(&["--grid", "fast=1:1000000,slow=1:1000000"], &["1.000e12 sets", " on ", "memory", "limit is", "log ranges"]);
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
}

#[test]
fn unwritable_folders_are_refused_before_the_work() {
    let folder = Folder::new();
    let file = folder.text("a_file", "content");
    refused(&["--grid", "fast=5,slow=20", "--out", &file], &["this is a file; name a folder with --out"]);
    for out in [file.clone(), format!("{file}/below")] {
        refused(&["--grid", "fast=5,slow=20", "--out", &out], &[&out, "cannot be written"]);
    }
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "content");
}

// ---- the other commands ------------------------------------------------------------------------------------------

/// A conformance file of Philox under counter 0 and key 0, with these bits as the expected ones.
fn philox_case(folder: &Folder, name: &str, bits: [u32; 4]) -> String {
    let bytes: Vec<u8> = [0u32; 6].iter().chain(&bits).flat_map(|word| word.to_le_bytes()).collect();
    let tensor = |shape: [usize; 2], range: [usize; 2]| json!({ "dtype": "U32", "shape": shape, "data_offsets": range });
    let header = json!({
        "__metadata__": { "kernel": "philox", "params": "{}", "rtol": "1e-5", "atol": "1e-5", "source": "Random123" },
        "in/counter": tensor([1, 4], [0, 16]), "in/key": tensor([1, 2], [16, 24]), "out/bits": tensor([1, 4], [24, 40]),
    })
    .to_string();
    let path = folder.path(name);
    std::fs::write(&path, [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &bytes].concat()).unwrap();
    path
}

#[test]
fn verify_passes_the_known_answer_and_names_a_wrong_one() {
    let folder = Folder::new();
    let known = [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8];
    philox_case(&folder, "known.safetensors", known);
    for device in ["reference", "cpu", "wgpu", "cuda", "cuda-host"].into_iter().filter(|device| here(device)) {
        let out = done(&["verify", &folder.path(""), "--device", device]);
        assert!(out.starts_with(&format!("device {device}")) && out.ends_with("\n1 passed, 0 failed\n"), "{out}");
    }
    let altered = philox_case(&folder, "altered.safetensors", [known[0], known[1], known[2], known[3] ^ 1]);
    let ran = run(&["verify", &folder.path(""), "--device", "cpu"]);
    assert_eq!((ran.code, ran.stdout.lines().last()), (1, Some("1 passed, 1 failed")), "{}", ran.stdout);
    let row = ran.stdout.lines().find(|line| line.contains("altered")).unwrap();
    assert!(row.contains("FAILED: bits[3]"), "{row}");
    let ran = run(&["verify", &altered, "--device", "cpu", "--json"]);
    let verdict: Value = serde_json::from_str(ran.stdout.trim()).unwrap();
    assert_eq!((ran.code, &verdict["case"], &verdict["passed"]), (1, &json!("altered"), &json!(false)));

    // A file that is none, a kernel that is none, a path that is none.
    folder.text("broken.safetensors", "no tensors");
    let ran = run(&["verify", &folder.path("broken.safetensors"), "--device", "cpu"]);
    assert!(ran.code == 1 && ran.stdout.contains("broken") && ran.stdout.contains("FAILED"), "{}", ran.stdout);
    let ran = run(&["verify", "no/such/folder", "--device", "cpu"]);
    assert!(ran.code == 2 && ran.stderr.contains("no/such/folder"), "{}", ran.stderr);
}

#[test]
fn devices_are_listed_with_the_reason_for_the_missing_ones() {
    let out = done(&["devices"]);
    for device in ["cpu", "reference", "wgpu", "cuda", "cuda-host"] {
        let line = out.lines().find(|line| line.split_whitespace().next() == Some(device)).unwrap_or_else(|| panic!("no {device} in\n{out}"));
        assert_eq!(line.contains("not here: "), !here(device), "{line}");
    }
    for line in done(&["devices", "--json"]).lines() {
        let device: Value = serde_json::from_str(line).unwrap();
        assert_eq!(device["found"] == true, device["reason"].is_null(), "{line}");
    }
}

#[test]
fn kernels_are_listed_three_ways() {
    let lines: Vec<Value> = done(&["kernels", "--json"]).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), KERNELS.len());
    for (line, kernel) in lines.iter().zip(KERNELS) {
        assert_eq!((&line["kernel"], &line["cuda"]), (&json!(kernel.name), &json!(kernel.cuda.is_some())));
        assert!(line["op"] == "" || OPS.iter().any(|op| line["op"] == op.name), "{line}");
    }
    assert_eq!(done(&["kernels"]).lines().count(), KERNELS.len() + 1);
}

// ---- the README --------------------------------------------------------------------------------------------------

/// Text of a file of the project.
fn project(name: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(name)).unwrap()
}

/// `FORBACK_BLESS=1 cargo test --test stories readme` writes the table anew.
#[test]
fn readme_has_the_kernel_table_of_this_build() {
    let (open, close) = ("<!-- kernels -->\n", "<!-- /kernels -->");
    let readme = project("README.md");
    let start = readme.find(open).expect("the marker that opens the table") + open.len();
    let end = start + readme[start..].find(close).expect("the marker that closes it");
    let table = done(&["kernels", "--markdown"]);
    if std::env::var("FORBACK_BLESS").is_ok() {
        let fresh = format!("{}{table}{}", &readme[..start], &readme[end..]);
        std::fs::write(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md"), fresh).unwrap();
    } else {
        assert!(readme[start..end] == table, "the kernel table of README.md is stale: FORBACK_BLESS=1 cargo test --test stories readme");
    }
}

#[test]
fn readme_shows_the_second_example_as_it_compiles() {
    let example = project("examples/02_sweep.rs");
    let code = &example[example.find("\n\n").unwrap() + 2..];
    assert!(project("README.md").contains(&format!("```rust\n{code}```")), "README.md should show examples/02_sweep.rs");
}

// ---- real prices -------------------------------------------------------------------------------------------------

#[test]
fn real_etfs_lose_the_asset_with_a_gap_and_keep_the_other() {
    let Some(file) = data("etfs_daily/ohlcv.csv.gz") else { return };
    let args = ["sweep", &file, "--symbols", "SPY,QQQ", "--missing", "drop", "--from", "2005-02-25", "--grid", "fast=10:50:20,slow=100:200:50"];
    let out = done(&args);
    for part in [
        "QQQ × 3202 bars, 2005-02-25 to 2017-11-10",
        "dropped  SPY: 1 of 3202 bars missing, first 2011-02-17",
        "would be kept by --missing fill:5",
        "251.9 periods per year",
    ] {
        assert!(out.contains(part), "'{part}' is not in\n{out}");
    }
    let out = done(&["sweep", &file, "--symbols", "SPY,QQQ", "--missing", "fill:1", "--from", "2005-02-25", "--grid", "fast=10,slow=100"]);
    assert!(out.contains("2 assets × 3202 bars") && out.contains("filled   1 cells of 1 assets"), "{out}");
}

#[test]
fn real_oil_below_zero_is_refused_by_row() {
    let Some(file) = data("spot_futures/futures_strips_daily.csv.gz") else { return };
    refused(&[&file, "--symbols", "CL01", "--missing", "drop"], &["row 3439, column 'CL01', value '-37.63'", "CL01 on 2020-04-20", "not positive"]);
}
