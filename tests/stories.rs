//! End to end through the binary: what a user types, and what comes back.
//!
//! A device that `FORBACK_REQUIRE` names must be here; another one that is not is skipped, with its reason. So is market data that is
//! not beside the project, and a browser.

#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

#[path = "stories/hedge.rs"]
mod hedge;
#[path = "stories/options.rs"]
mod options;
#[path = "stories/regimes.rs"]
mod regimes;
#[path = "common/signals.rs"]
mod signals;
#[path = "stories/train.rs"]
mod train;

use arrow_array::{Array, ArrayRef, Date32Array, Float32Array, Float64Array, RecordBatch, StringArray, UInt32Array};
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
    assert_eq!(names, ["config.toml", "out_of_sample.csv", "report.html", "results.csv", "results.parquet", "run.json", "walk_forward.csv"]);

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

// ---- parts -------------------------------------------------------------------------------------------------------

/// A JSON result without what says how it was run.
fn result_of(stdout: &str) -> Value {
    let mut all: Value = serde_json::from_str(stdout.trim()).unwrap();
    for name in ["seconds", "set_bars_per_second", "launches", "submits"] {
        all.as_object_mut().unwrap().remove(name);
    }
    all["run"].as_object_mut().unwrap().remove("command");
    all
}

/// The bytes of the files that hold results.
fn bytes_of(dir: &str) -> Vec<(&'static str, Vec<u8>)> {
    let read = |name| (name, std::fs::read(Path::new(dir).join(name)).unwrap_or_else(|e| panic!("{dir}/{name}: {e}")));
    ["results.parquet", "results.csv", "walk_forward.csv", "out_of_sample.csv", "config.toml"].map(read).to_vec()
}

#[track_caller]
fn assert_same_files(got: &str, want: &str) {
    for ((name, got), (_, want)) in bytes_of(got).iter().zip(bytes_of(want)) {
        assert!(*got == want, "{name} differs: {} bytes, {} wanted", got.len(), want.len());
    }
}

fn names_in(dir: &str) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn parts_of_any_size_are_one_run() {
    let cases = [
        ("sma_cross", "fast=2:20:3,slow=30:90:20,short=0:1"),
        ("ema_cross", "fast=5|10,slow=20:100:20"),
        ("macd", "fast=8|12,slow=26:30:2,signal=5:9"),
        ("rsi_reversion", "period=5:14:3,low=30|40,high=60|70"),
        ("bollinger_reversion", "period=10:40:10,width=1|2|3"),
        ("donchian_breakout", "entry=20:60:10,exit=5|10|15"),
        ("ts_momentum", "lookback=20:100:20,vol_window=20|60,target_vol=0.1,max_leverage=1|2"),
    ];
    for device in ["cpu", "wgpu", "cuda-host"].into_iter().filter(|device| here(device)) {
        // One strategy of each kind where a run is slow.
        for (strategy, grid) in cases.into_iter().filter(|(strategy, _)| device == "cpu" || ["sma_cross", "ts_momentum"].contains(strategy)) {
            let folder = Folder::new();
            let run = |name: &str, parts: &[&str]| {
                let out = folder.path(name);
                let small = ["--assets", "2", "--bars", "600", "--walk-forward", "train=200,test=50", "--select", "both", "--cost-bps", "0,10"];
                let args = ["sweep", "--json", "--strategy", strategy, "--grid", grid, "--device", device, "--out", &out];
                let stdout = done(&[&args, &small[..], parts].concat());
                (result_of(&stdout), out)
            };
            let (want, whole) = run("whole", &[]);
            for size in ["1", "7", "1000"].into_iter().filter(|&size| device == "cpu" || size == "7") {
                let (got, out) = run(size, &["--part-sets", size]);
                assert_eq!(got, want, "{strategy} on {device} in parts of {size}");
                assert_same_files(&out, &whole);
                assert_eq!(names_in(&out), names_in(&whole), "parts are cleared away");
            }
        }
    }
}

/// A sweep of 247 sets over a price file, its results in `whole`, its shards in `shards`.
struct Sharded {
    folder: Folder,
    prices: String,
    whole: Value,
}

impl Sharded {
    const OPTIONS: [&'static str; 8] = ["--grid", "fast=2:20,slow=30:90:5", "--walk-forward", "train=150,test=50", "--select", "both", "--device", "cpu"];

    fn sweep(prices: &str, out: &str, more: &[&str]) -> Ran {
        run(&[&["sweep", prices, "--json", "--out", out], &Self::OPTIONS[..], more].concat())
    }

    fn new() -> Sharded {
        let folder = Folder::new();
        let prices = folder.text("prices.csv", &wide(&market(400)));
        let whole = Self::sweep(&prices, &folder.path("whole"), &[]);
        assert_eq!((whole.code, whole.stderr.as_str()), (0, ""));
        let sharded = Sharded { prices, whole: result_of(&whole.stdout), folder };
        for i in 1..=3 {
            let ran = sharded.shard(&format!("{i}/3"), "shards", &["--part-sets", "31"]);
            assert_eq!((ran.code, ran.stderr.as_str()), (0, ""));
        }
        sharded
    }

    fn shard(&self, shard: &str, out: &str, more: &[&str]) -> Ran {
        Self::sweep(&self.prices, &self.folder.path(out), &[&["--shard", shard], more].concat())
    }

    fn merge(&self, args: &[&str]) -> Ran {
        run(&[&["merge", "--json", "--out", &self.folder.path("merged")], args].concat())
    }

    #[track_caller]
    fn refused(&self, args: &[&str], parts: &[&str]) {
        let ran = self.merge(args);
        assert_eq!((ran.code, ran.stdout.as_str(), ran.stderr.lines().count()), (2, "", 1), "{}", ran.stderr);
        for part in parts {
            assert!(ran.stderr.contains(part), "'{part}' is not in: {}", ran.stderr);
        }
    }
}

#[test]
fn merged_shards_are_one_run() {
    let s = Sharded::new();
    let shards = s.folder.path("shards");
    assert_eq!(names_in(&shards), ["shard-1-of-3", "shard-2-of-3", "shard-3-of-3"]);
    let merged = s.merge(&[&shards]);
    assert_eq!((merged.code, merged.stderr.as_str()), (0, ""));
    assert_eq!(result_of(&merged.stdout), s.whole);
    assert_same_files(&s.folder.path("merged"), &s.folder.path("whole"));

    // In any order, by their own names, with the prices elsewhere.
    std::fs::rename(&s.prices, s.folder.path("moved.csv")).unwrap();
    let named: Vec<String> = [2, 3, 1].iter().map(|i| format!("{shards}/shard-{i}-of-3")).collect();
    let names: Vec<&str> = named.iter().map(String::as_str).collect();
    s.refused(&names, &["prices.csv", "file not found"]);
    let moved = s.folder.path("moved.csv");
    let merged = s.merge(&[&names[..], &["--data", &moved]].concat());
    assert_eq!(merged.code, 0, "{}", merged.stderr);
    let (mut got, mut want) = (result_of(&merged.stdout), s.whole.clone());
    got["run"]["data"].take();
    want["run"]["data"].take();
    assert_eq!(got, want);
    s.folder.text("moved.csv", &wide(&market(401)));
    s.refused(&[&names[..], &["--data", &moved]].concat(), &["shard 1/3", "data", "--data"]);
}

#[test]
fn shards_that_do_not_belong_together_are_named() {
    let s = Sharded::new();
    let shards = s.folder.path("shards");
    let of = |i: u32| format!("{shards}/shard-{i}-of-3");
    s.refused(&[&of(1), &of(3)], &["shard 2/3", "it is not there", "--shard 2/3"]);
    s.refused(&[&of(1), &of(2), &of(3), &of(2)], &["shard 2/3", "twice"]);
    s.refused(&[&s.folder.path("whole")], &["whole", "holds no shard"]);

    let other = s.shard("2/3", "foreign", &["--cost-bps", "3"]);
    assert_eq!(other.code, 0);
    s.refused(&[&of(1), &s.folder.path("foreign"), &of(3)], &["shard 2/3", "another sweep", "cost_bps", "[3.0]", "[10.0]"]);
    assert_eq!(s.shard("2/4", "foreign", &[]).code, 0);
    s.refused(&[&of(1), &format!("{}/shard-2-of-4", s.folder.path("foreign")), &of(3)], &["shard 2/4", "one of 4 shards"]);

    // Changed rows, a part that is gone, a shard that did not finish.
    let part = |ending: &str| Path::new(&of(2)).join(format!("part-82-113.{ending}"));
    let rows = std::fs::read(part("parquet")).unwrap();
    let mut changed = rows.clone();
    changed[100] ^= 1;
    std::fs::write(part("parquet"), &changed).unwrap();
    s.refused(&[&shards], &["part-82-113.parquet", "checksum"]);
    std::fs::write(part("parquet"), rows).unwrap();
    std::fs::rename(part("json"), s.folder.path("aside")).unwrap();
    s.refused(&[&shards], &["shard 2/3", "sets 82 to 112 are missing", "--resume"]);
    let job = Path::new(&of(2)).join("job.json");
    let text = std::fs::read_to_string(&job).unwrap();
    std::fs::write(&job, text.replace("\"partial\": false", "\"partial\": true")).unwrap();
    s.refused(&[&shards], &["shard 2/3", "not finished", "--resume"]);

    // Which mends all three.
    let ran = s.shard("2/3", "shards", &["--resume"]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert_eq!(result_of(&s.merge(&[&shards]).stdout), s.whole);
    let ran = s.shard("2/3", "shards", &[]);
    assert!(ran.code == 2 && ran.stderr.contains("a finished shard"), "{}", ran.stderr);
    for shard in ["0/3", "4/3", "1/0", "1/1000", "half"] {
        let ran = s.shard(shard, "none", &[]);
        assert!(ran.code == 2 && ran.stderr.contains("--shard") && ran.stderr.contains(shard), "{}", ran.stderr);
    }
}

#[cfg(unix)]
#[test]
fn an_interrupted_sweep_goes_on_where_it_was() {
    let folder = Folder::new();
    let (out, whole) = (folder.path("out"), folder.path("whole"));
    let common = ["sweep", "--json", "--grid", "fast=2:60,slow=70:250:2", "--assets", "4", "--device", "cpu"];
    let args = [&common[..], &["--part-sets", "200", "--out", &out]].concat();
    let mut command = Command::new(env!("CARGO_BIN_EXE_forback"));
    command.args(&args).env_remove("FORBACK_DEVICE").stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let child = command.spawn().unwrap();
    let parts = || {
        std::fs::read_dir(Path::new(&out).join("parts"))
            .map_or(0, |dir| dir.filter(|e| e.as_ref().unwrap().path().extension() == Some("json".as_ref())).count())
    };
    let start = Instant::now();
    while parts() < 3 {
        assert!(start.elapsed() < Duration::from_secs(120), "no part was written");
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let ended = child.wait_with_output().unwrap();
    let (stdout, stderr) = (String::from_utf8(ended.stdout).unwrap(), String::from_utf8(ended.stderr).unwrap());
    assert_eq!(ended.status.code(), Some(130), "{stderr}");
    assert!(stderr.starts_with("interrupted: ") && stderr.contains("--resume") && stderr.contains(&out), "{stderr}");
    let partial: Value = serde_json::from_str(stdout.trim()).unwrap();
    let finished = partial["finished"][0][1].as_u64().unwrap();
    assert_eq!((&partial["partial"], &partial["finished"][0][0], &partial["resume"]), (&json!(true), &json!(0), &json!(true)));
    assert!(finished >= 400 && finished < partial["sets"].as_u64().unwrap(), "{partial}");
    assert!(array(&partial["costs"][0]["top"]).iter().all(|set| set["set"].as_u64().unwrap() < finished));
    assert_eq!(names_in(&out), ["parts"]);

    // Not over it, not with other options; a damaged part runs again.
    let ran = run(&args);
    assert!(ran.code == 2 && ran.stderr.contains("an interrupted sweep") && ran.stderr.contains("--resume"), "{}", ran.stderr);
    let ran = run(&[&args[..], &["--resume", "--seed", "5"]].concat());
    assert!(ran.code == 2 && ran.stderr.contains("data") && ran.stderr.contains("seed 5"), "{}", ran.stderr);
    let ran = run(&[&args[..], &["--resume", "--execution", "same_close"]].concat());
    assert!(ran.code == 2 && ran.stderr.contains("execution next_close, this one same_close"), "{}", ran.stderr);
    std::fs::write(Path::new(&out).join("parts/part-0-200.parquet"), "no rows").unwrap();
    let resumed = run(&[&args[..], &["--resume"]].concat());
    assert_eq!(resumed.code, 0, "{}", resumed.stderr);
    assert!(resumed.stderr.starts_with("note: ") && resumed.stderr.contains("sets 0 to 199 run again"), "{}", resumed.stderr);
    let want = done(&[&common[..], &["--out", &whole]].concat());
    assert_eq!(result_of(&resumed.stdout), result_of(&want));
    assert_same_files(&out, &whole);
    assert_eq!(names_in(&out), names_in(&whole));
}

/// A file system of 64 kB, unmounted with the test.
#[cfg(target_os = "linux")]
struct Tiny(String);

#[cfg(target_os = "linux")]
impl Drop for Tiny {
    fn drop(&mut self) {
        assert!(Command::new("umount").arg(&self.0).status().unwrap().success());
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_named_and_nothing_half_written_is_left() {
    let folder = Folder::new();
    let at = folder.path("tiny");
    std::fs::create_dir(&at).unwrap();
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=64k", "tmpfs", &at]).output();
    if !mounted.as_ref().is_ok_and(|out| out.status.success()) {
        println!("skipped: no tmpfs can be mounted: {mounted:?}");
        return;
    }
    let tiny = Tiny(at.clone());
    let args = ["sweep", "--grid", "fast=2:20,slow=30:90:2", "--assets", "3", "--bars", "500", "--walk-forward", "none", "--device", "cpu", "--out", &at];
    let ran = run(&args);
    assert_eq!((ran.code, ran.stderr.lines().count()), (2, 1), "{}", ran.stderr);
    for part in [&format!("{at}/results."), "the disk is full", "takes about", " kB", "is removed"] {
        assert!(ran.stderr.contains(part), "'{part}' is not in: {}", ran.stderr);
    }
    assert_eq!(names_in(&at), [""; 0]);
    // In parts, the finished ones stay.
    let ran = run(&[&args[..], &["--part-sets", "100"]].concat());
    assert!(ran.code == 2 && ran.stderr.contains("the disk is full"), "{}", ran.stderr);
    assert_eq!(names_in(&at), ["parts"]);
    let parts = names_in(&format!("{at}/parts"));
    assert!(parts.contains(&"part-0-100.json".to_string()) && parts.iter().all(|name| !name.starts_with('.')), "{parts:?}");
    drop(tiny);
}

#[test]
fn a_plan_runs_next_to_nothing() {
    let folder = Folder::new();
    let out = folder.path("out");
    let args = ["sweep", "--plan", "--device", "cpu", "--assets", "60", "--grid", "fast=2:100,slow=110:1000", "--out", &out];
    let line = done(&args);
    for part in ["plan ", " sets, about ", " on cpu", " of memory", &format!(" in {out}")] {
        assert!(line.contains(part), "'{part}' is not in: {line}");
    }
    let plan: Value = serde_json::from_str(done(&[&args[..], &["--json"]].concat()).trim()).unwrap();
    let plan = &plan["plan"];
    let (sets, parts, per_part) = (plan["sets"].as_u64().unwrap(), plan["parts"].as_u64().unwrap(), plan["sets_per_part"].as_u64().unwrap());
    assert_eq!((sets, parts), (99 * 891, sets.div_ceil(per_part)));
    assert!(plan["seconds"].as_f64().unwrap() > 0.0 && plan["memory_bytes"].as_f64().unwrap() < 2e9);
    assert_eq!(names_in(&out), [""; 0], "nothing is written");
}

// ---- single sets -------------------------------------------------------------------------------------------------

#[test]
fn random_sets_are_rows_of_the_whole_sweep() {
    let folder = Folder::new();
    let args = ["--strategy", "bollinger_reversion", "--grid", "period=5:40,width=1:3:0.25", "--bars", "500", "--walk-forward", "none", "--device", "cpu"];
    let sweep = |name: &str, more: &[&str]| {
        let out = folder.path(name);
        done(&[&["sweep", "--out", &out], &args[..], more].concat());
        rows(&format!("{out}/results.csv"))
    };
    let (all, drawn) = (sweep("all", &[]), sweep("drawn", &["--random", "20"]));
    assert_eq!((all.len(), drawn.len()), (36 * 9, 20));
    let number = |row: &csv::StringRecord| row[1].parse::<usize>().unwrap();
    assert!(drawn.windows(2).all(|pair| number(&pair[0]) < number(&pair[1])));
    for row in &drawn {
        assert_eq!(*row, all[number(row)]);
    }
    assert_eq!(drawn, sweep("again", &["--random", "20", "--part-sets", "6"]));
    refused(&[&args[..], &["--random", "325"]].concat(), &["random = 325", "324 legal sets"]);
    // A grid that could never be listed.
    let huge = ["--strategy", "macd", "--grid", "fast=1:300,slow=1:300,signal=2:300", "--bars", "1500", "--random", "50", "--top", "50"];
    let found = findings(&huge);
    assert_eq!((&found["sets"], array(&found["costs"][0]["top"]).len()), (&json!(50), 50));
}

#[test]
fn a_replay_is_the_row_of_its_set() {
    let folder = Folder::new();
    let cases = [
        ("sma_cross", "fast=2:20:3,slow=30:90:20,short=1"),
        ("rsi_reversion", "period=5:14:3,low=30|40,high=60|70"),
        ("ts_momentum", "lookback=20:100:40,vol_window=20|30,target_vol=0.1,max_leverage=2"),
    ];
    for device in ["cpu", "wgpu", "cuda-host"].into_iter().filter(|device| here(device)) {
        for (strategy, grid) in cases {
            let args = ["--strategy", strategy, "--grid", grid, "--assets", "2", "--bars", "600", "--walk-forward", "none", "--cost-bps", "0,20"];
            let (all, one) = (folder.path("all"), folder.path("one"));
            done(&[&["sweep", "--device", device, "--out", &all], &args[..]].concat());
            let stdout = done(&[&["sweep", "--device", device, "--json", "--replay", "3,5", "--out", &one], &args[..]].concat());
            let found: Value = serde_json::from_str(stdout.trim()).unwrap();
            let replays = array(&found["replays"]);
            assert_eq!(replays.len(), 4, "two sets at two costs");
            let (table, trades, equity) = (rows(&format!("{all}/results.csv")), rows(&format!("{one}/trades.csv")), rows(&format!("{one}/equity.csv")));
            let header: Vec<String> = csv::Reader::from_path(format!("{all}/results.csv")).unwrap().headers().unwrap().iter().map(String::from).collect();
            let at = |name: &str| header.iter().position(|column| column == name).unwrap();
            for replay in replays {
                let cost = replay["cost_bps"].as_f64().unwrap();
                let same = |row: &csv::StringRecord, symbol: &Value, s: usize| {
                    row[0].parse::<f64>().unwrap() == cost && row[1].parse().ok() == replay["set"].as_u64() && row[s] == *symbol.as_str().unwrap()
                };
                for asset in array(&replay["assets"]) {
                    let row = table.iter().find(|row| same(row, &asset["symbol"], at("symbol"))).unwrap();
                    for name in ["sharpe", "total_return", "max_drawdown", "turnover", "trades"] {
                        let want = row[at(name)].parse::<f32>().ok();
                        assert_eq!(asset[name].as_f64().map(|x| x as f32), want, "{name} of {strategy} on {device}");
                    }
                    // The path ends where the statistics say, and every trade is charged once.
                    let total = asset["total_return"].as_f64().unwrap();
                    let path: Vec<f64> = equity.iter().filter(|row| same(row, &asset["symbol"], 2)).map(|row| row[6].parse().unwrap()).collect();
                    assert!((path.last().unwrap() - 1.0 - total).abs() < 2e-5 * (1.0 + total), "{path:?}");
                    assert!((array(&asset["equity"]).last().unwrap().as_f64().unwrap() - path.last().unwrap()).abs() < 1e-14);
                    let own: Vec<_> = trades.iter().filter(|row| same(row, &asset["symbol"], 2)).collect();
                    let charged: f64 = own.iter().map(|row| row[12].parse::<f64>().unwrap()).sum();
                    let turnover = asset["turnover"].as_f64().unwrap();
                    assert!((charged - cost * 1e-4 * turnover).abs() < 1e-5 * (1.0 + turnover), "{charged} for a turnover of {turnover}");
                    let compounded: f64 = own.iter().map(|row| 1.0 + row[11].parse::<f64>().unwrap()).product();
                    assert!((compounded - 1.0 - total).abs() < 1e-3 * (1.0 + total), "{compounded} for {total}");
                }
            }
        }
    }
    refused(&["--grid", "fast=5,slow=20", "--replay", "1"], &["--replay = 1", "numbered from 0 to 0"]);
}

// ---- config files ------------------------------------------------------------------------------------------------

#[test]
fn a_config_file_repeats_a_sweep_and_the_command_line_wins() {
    let folder = Folder::new();
    let (prices, out) = (folder.text("prices.csv", &wide(&market(400))), folder.path("out"));
    let args =
        ["sweep", &prices, "--grid", "fast=5|10,slow=20:60:20,slow>=3*fast", "--cost-bps", "0,7.5", "--symbols", "SYN003,SYN001", "--from", "2010-02-01"];
    let more = ["--walk-forward", "train=100,test=50,anchored", "--top", "3", "--rank-by", "turnover", "--device", "cpu", "--json", "--out", &out];
    let want = result_of(&done(&[&args[..], &more].concat()));
    let config = format!("{out}/config.toml");
    assert_eq!(result_of(&done(&["sweep", "--json", "--config", &config])), want);
    // What is written is what was meant.
    let again = folder.path("again");
    done(&["sweep", "--json", "--config", &config, "--out", &again]);
    assert_eq!(std::fs::read(format!("{again}/config.toml")).unwrap(), std::fs::read(&config).unwrap());
    let got = result_of(&done(&["sweep", "--config", &config, "--json", "--cost-bps", "3", "--top", "1"]));
    assert_eq!((&got["run"]["cost_bps"], array(&got["costs"][0]["top"]).len()), (&json!([3.0]), 1));
    assert_eq!(got["run"]["rank_by"], "turnover");

    let text =
        "walk-forward = \"none\"\ndevice = \"cpu\"\njson = true\nbars = 300\n[grid]\nfast = [5, 10]\nslow = \"20:60:20\"\nconstraints = [\"slow>=3*fast\"]\n";
    let table = result_of(&done(&["sweep", "--config", &folder.text("table.toml", text)]));
    let line = ["sweep", "--walk-forward", "none", "--device", "cpu", "--json", "--bars", "300", "--grid", "fast=5|10,slow=20:60:20,slow>=3*fast"];
    assert_eq!(table, result_of(&done(&line)));
}

#[test]
fn a_config_file_is_refused_by_line() {
    let folder = Folder::new();
    let refused = |text: &str, parts: &[&str]| {
        let file = folder.text("config.toml", text);
        let ran = run(&["sweep", "--config", &file]);
        assert_eq!((ran.code, ran.stdout.as_str(), ran.stderr.lines().count()), (2, "", 1), "{text}: {}", ran.stderr);
        for part in parts.iter().chain(&[file.as_str()]) {
            assert!(ran.stderr.contains(part), "'{part}' is not in: {}", ran.stderr);
        }
    };
    refused("top = 5\ncost_bps = 5\n", &["row 2", "'cost_bps'", "did you mean 'cost-bps'?"]);
    refused("# a note\n\nstratgy = \"macd\"\n", &["row 3", "did you mean 'strategy'?"]);
    refused("bars = 100\ntop = \"many\"\n", &["row 2", "'top'", "invalid value 'many'"]);
    refused("bars = 100\ntop = [1\n", &["row 2"]);
    refused("resume = 3\n", &["row 1", "this is a switch"]);
    refused("config = \"other.toml\"\n", &["row 1", "no option"]);
    refused("[grid.fast]\nfrom = 2\n", &["row 1", "grid"]);
    let ran = run(&["sweep", "--config", "no/such.toml"]);
    assert!(ran.code == 2 && ran.stderr.contains("no/such.toml"), "{}", ran.stderr);
}

// ---- the report --------------------------------------------------------------------------------------------------

/// A browser, if it is here; a required one must be.
fn chromium() -> Option<&'static str> {
    let required = std::env::var("FORBACK_REQUIRE").is_ok_and(|list| list.split(',').any(|name| name.trim() == "chromium"));
    let there = |name: &&str| Command::new(name).arg("--version").output().is_ok_and(|out| out.status.success());
    let found = ["chromium", "chromium-browser", "google-chrome"].into_iter().find(there);
    assert!(found.is_some() || !required, "FORBACK_REQUIRE names chromium, and it is not there");
    if found.is_none() {
        println!("skipped: chromium is not there");
    }
    found
}

/// The text between two marks.
fn between<'a>(text: &'a str, from: &str, to: &str) -> &'a str {
    let (_, rest) = text.split_once(from).unwrap_or_else(|| panic!("no '{from}' in {} bytes", text.len()));
    rest.split_once(to).unwrap_or_else(|| panic!("no '{to}' after '{from}'")).0
}

/// The numbers that a page was made of.
fn numbers_of(page: &str) -> Value {
    let html = std::fs::read_to_string(page).unwrap();
    assert!(html.len() < 8 << 20, "{} bytes", html.len());
    serde_json::from_str(between(&html, "id=\"report-data\">", "</script>")).unwrap()
}

/// Opens a page in a browser without a window; what its charts hold, as its own script reads it back from them.
fn opened(browser: &str, page: &str, query: &str) -> Value {
    let (folder, limit) = (Folder::new(), Duration::from_secs(120));
    let flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"];
    let more = ["--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--dump-dom"];
    let mut child = Command::new(browser)
        .args(flags)
        .args(more)
        .arg(format!("--user-data-dir={}", folder.path("profile")))
        .arg(format!("file://{page}?check=1&{query}"))
        .stdout(File::create(folder.path("dom")).unwrap())
        .stderr(File::create(folder.path("log")).unwrap())
        .spawn()
        .unwrap();
    let start = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if start.elapsed() > limit {
            child.kill().unwrap();
            panic!("{browser} did not open {page} within {limit:?}");
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let text = |name: &str| String::from_utf8_lossy(&std::fs::read(folder.path(name)).unwrap()).into_owned();
    let log = text("log");
    assert!(!log.contains("CONSOLE"), "the page complains: {log}");
    let seen: Value = serde_json::from_str(between(&text("dom"), "id=\"report-check\">", "</script>")).unwrap();
    assert_eq!(seen["errors"], json!([]), "{query}");
    assert!(seen["page_width"].as_f64() <= seen["window_width"].as_f64(), "the page is wider than its window");
    for (name, chart) in seen["held"].as_object().unwrap() {
        let pixels = |side: &str| chart[side].as_f64().unwrap();
        assert!(pixels("drawn") > 0.0 && pixels("width") > 200.0 && pixels("height") > 200.0, "{name}: {chart}");
    }
    println!("{query:40} every chart drawn {:.0} ms after the start", seen["ready_ms"].as_f64().unwrap());
    assert!(seen["ready_ms"].as_f64().unwrap() < 20_000.0, "meant to take less than 2 s on a quiet machine");
    seen
}

/// The trace of that name in a chart.
fn trace<'a>(seen: &'a Value, chart: &str, name: &str) -> &'a Value {
    array(&seen["held"][chart]["traces"]).iter().find(|t| t["name"] == name).unwrap_or_else(|| panic!("{chart} has no {name}"))
}

fn floats(list: &Value) -> Vec<f64> {
    array(list).iter().map(|x| x.as_f64().unwrap_or(f64::NAN)).collect()
}

/// Per set at the first cost: its parameters, and its statistics as means over assets, added up as the sweep does it.
fn sets_of(results: &str, parameters: usize) -> Vec<(Vec<f32>, [f64; 4])> {
    let reader = ParquetRecordBatchReaderBuilder::try_new(File::open(results).unwrap()).unwrap().build().unwrap();
    let mut sums: Vec<(Vec<f32>, [f32; 4], [u32; 4])> = Vec::new();
    let mut first_cost = None;
    for batch in reader.map(Result::unwrap) {
        let column = |i: usize| batch.column(i).as_any().downcast_ref::<Float32Array>().unwrap();
        let sets = batch.column(1).as_any().downcast_ref::<UInt32Array>().unwrap();
        for i in 0..batch.num_rows() {
            if *first_cost.get_or_insert(column(0).value(i)) != column(0).value(i) {
                continue;
            }
            let set = sets.value(i) as usize;
            if sums.len() <= set {
                sums.resize(set + 1, (Vec::new(), [0.0; 4], [0; 4]));
            }
            sums[set].0 = (0..parameters).map(|p| column(2 + p).value(i)).collect();
            for k in 0..4 {
                let value = column(3 + parameters + k);
                if !value.is_null(i) {
                    sums[set].1[k] += value.value(i);
                    sums[set].2[k] += 1;
                }
            }
        }
    }
    let mean = |sum: [f32; 4], n: [u32; 4]| std::array::from_fn(|k| if n[k] == 0 { f64::NAN } else { f64::from(sum[k]) / f64::from(n[k]) });
    sums.into_iter().map(|(values, sum, n)| (values, mean(sum, n))).collect()
}

/// Every cell of a heat-map against the sets: `value` of a set, means or maxima over the sets whose parameters x and y fall into it.
fn compare_cells(held: &Value, data: &Value, (x, y): (usize, usize), sets: &[(Vec<f32>, f64)], largest: bool) {
    let names = array(&data["parameters"]);
    let axis = |p: usize| array(&data["axes"]).iter().find(|a| a["name"] == names[p]).unwrap();
    let edges = |p: usize| floats(&axis(p)["from"]).into_iter().zip(floats(&axis(p)["to"])).collect::<Vec<_>>();
    let (columns, rows) = (edges(x), edges(y));
    assert!(columns.len() <= 64 && rows.len() <= 64);
    let map = &array(&held["traces"])[0];
    let (mut total, mut best) = (0.0, f64::MIN);
    for (row, up) in rows.iter().enumerate() {
        for (column, across) in columns.iter().enumerate() {
            let within = |(from, to): &(f64, f64), v: f32| *from <= f64::from(v) && f64::from(v) <= *to;
            let inside: Vec<f64> = sets.iter().filter(|s| within(across, s.0[x]) && within(up, s.0[y])).map(|s| s.1).collect();
            let defined: Vec<f64> = inside.iter().copied().filter(|v| !v.is_nan()).collect();
            let want = if largest { defined.iter().copied().fold(f64::NAN, f64::max) } else { defined.iter().sum::<f64>() / defined.len() as f64 };
            assert_eq!(map["count"][row][column].as_f64().unwrap() as usize, inside.len(), "cell {row}, {column}");
            match map["z"][row][column].as_f64() {
                Some(got) => assert!((got - want).abs() <= 1e-4 * want.abs().max(1e-3), "cell {row}, {column}: {got}, {want} from the sets"),
                None => assert!(want.is_nan(), "cell {row}, {column} is empty, {want} from the sets"),
            }
            total += inside.len() as f64;
            best = best.max(map["z"][row][column].as_f64().unwrap_or(f64::MIN));
        }
    }
    assert_eq!(total as usize, sets.len(), "every set is in one cell");
    let ring = &array(&held["traces"])[1];
    let at = |axis: &str| ring[axis][0].as_f64().unwrap() as usize;
    assert_eq!(map["z"][at("y")][at("x")].as_f64().unwrap(), best, "the ring is on the best cell");
}

#[test]
fn the_report_shows_what_the_files_hold() {
    let Some(browser) = chromium() else { return };
    let folder = Folder::new();
    let (page, results) = (folder.path("report.html"), folder.path("results.parquet"));
    // More values of slow than a heat-map has cells.
    let args = ["--grid", "fast=2:20:3,slow=21:100,short=0|1", "--assets", "3", "--bars", "900", "--walk-forward", "train=300,test=60", "--select", "both"];
    let ran = sweep_json(&[&args[..], &["--cost-bps", "10,0,30", "--device", "cpu", "--out", &folder.path("")]].concat());
    let data = numbers_of(&page);
    let sets = sets_of(&results, 3);
    assert_eq!(sets.len(), 7 * 80 * 2);
    let statistic = |k: usize, factor: f64| sets.iter().map(|(p, s)| (p.clone(), factor * s[k])).collect::<Vec<_>>();

    let seen = opened(browser, &page, "theme=light");
    let chart = |name: &str| &seen["held"][name];
    compare_cells(chart("surface-chart"), &data, (0, 1), &statistic(0, 1.0), false);

    // The distribution, bar by bar.
    let (bars, width) = (&array(&chart("distribution-chart")["traces"])[0], data["sharpe"]["width"].as_f64().unwrap());
    let (centres, heights) = (floats(&bars["x"]), floats(&bars["y"]));
    let mut counts = vec![0.0; heights.len()];
    for (_, s) in sets.iter().filter(|(_, s)| !s[0].is_nan()) {
        counts[((s[0] / width).floor() - (centres[0] / width - 0.5).round()) as usize] += 1.0;
    }
    assert_eq!(heights, counts);
    assert!(heights.len() <= 200 && heights.iter().sum::<f64>() + data["sharpe"]["undefined"].as_f64().unwrap() == sets.len() as f64);

    // Growth ends where the printed return ends, and as deep as the printed drawdown.
    for (name, key) in [("chosen per asset", "per_asset"), ("chosen for all assets", "pooled"), ("buy and hold", "")] {
        let printed = if key.is_empty() { &ran["buy_and_hold"]["portfolio"] } else { &ran["costs"][0][key]["portfolio"] };
        let of = |traces: &mut dyn Iterator<Item = &Value>| traces.map(|t| floats(&t["y"])).collect::<Vec<_>>();
        let lines = of(&mut array(&chart("equity-chart")["traces"]).iter().filter(|t| t["name"] == name));
        let [equity, drawdown] = &lines[..] else { panic!("{name}: {} lines", lines.len()) };
        let (growth, deepest) = (equity[equity.len() - 1] - 1.0, -drawdown.iter().copied().fold(0.0, f64::min) / 100.0);
        assert!((growth - printed["total_return"].as_f64().unwrap()).abs() < 1e-4, "{name}: {growth}, printed {}", printed["total_return"]);
        assert!((deepest - printed["max_drawdown"].as_f64().unwrap()).abs() < 1e-4, "{name}: {deepest}, printed {}", printed["max_drawdown"]);
    }
    assert_eq!(chart("equity-chart")["yaxis"], "log");

    // Choices of the first asset, from window to window; the last value is repeated at the end.
    let choices: Vec<_> = rows(&folder.path("walk_forward.csv")).into_iter().filter(|r| r[0] == *"10" && r[2] == *"SYN001").collect();
    for (name, column) in [("fast", 9), ("slow", 10), ("short", 11)] {
        let line = trace(&seen, "choices-chart", name);
        let want: Vec<f64> = choices.iter().map(|r| r[column].parse().unwrap()).collect();
        assert_eq!(floats(&line["y"])[..want.len()], want, "{name}");
        assert!(
            choices.iter().zip(array(&line["x"])).all(|(row, day)| row[6] < *day.as_str().unwrap()),
            "a return of a test part is earned after its first bar"
        );
    }
    for (name, key) in [("chosen per asset", "per_asset"), ("chosen for all assets", "pooled")] {
        let want: Vec<f64> = array(&ran["costs"]).iter().map(|c| c[key]["portfolio"]["sharpe"].as_f64().unwrap()).collect();
        assert_eq!(floats(&trace(&seen, "costs-sharpe", name)["y"]), want);
    }
    assert_eq!(array(&trace(&seen, "scatter-sets", "sets")["x"]).len(), sets.len());

    // The same page, opened on other axes and statistics.
    let seen = opened(browser, &page, "theme=dark&x=short&y=slow&stat=total_return&over=max&log=0");
    compare_cells(&seen["held"]["surface-chart"], &data, (2, 1), &statistic(1, 100.0), true);
    assert_eq!(seen["held"]["equity-chart"]["yaxis"], "linear");
}

#[test]
fn the_report_of_one_window_is_the_sweep_itself() {
    let Some(browser) = chromium() else { return };
    let folder = Folder::new();
    let args = ["--grid", "fast=2:10:2,slow=20:60:10", "--bars", "561", "--walk-forward", "train=300,test=200", "--device", "cpu", "--out", &folder.path("")];
    let ran = sweep_json(&args);
    assert_eq!(ran["windows"], json!(1));
    let seen = opened(browser, &folder.path("report.html"), "");
    let (all, chosen) = (trace(&seen, "scatter-sets", "sets"), trace(&seen, "scatter-chosen", "chosen sets"));
    let train = floats(&all["x"]);
    let best = train.iter().copied().fold(f64::MIN, f64::max);
    let set = train.iter().position(|t| *t == best).unwrap();
    assert_eq!((floats(&chosen["x"]), floats(&chosen["y"])), (vec![best], vec![floats(&all["y"])[set]]), "the best of the train part is chosen");
    assert_eq!(ran["costs"][0]["per_asset"]["best"], json!([set]));
    let printed = ran["costs"][0]["per_asset"]["portfolio"]["sharpe"].as_f64().unwrap();
    assert!((floats(&chosen["y"])[0] - printed).abs() < 1e-4 * (1.0 + printed.abs()), "its test Sharpe ratio is that of the stitched series");
}

#[test]
fn the_report_needs_no_walk_forward_no_grid_and_no_kind_symbols() {
    let Some(browser) = chromium() else { return };
    let folder = Folder::new();
    let text = wide(&market(300)).replacen("SYN001", "</script><b>A&B</b>", 1);
    let file = folder.text("prices.csv", &text);
    let out = folder.path("out");
    done(&["sweep", &file, "--grid", "fast=5,slow=20", "--walk-forward", "none", "--device", "cpu", "--out", &out]);
    let seen = opened(browser, &format!("{out}/report.html"), "");
    assert!(seen["held"]["surface-chart"].is_null() && seen["held"]["scatter-sets"].is_null() && seen["held"]["choices-chart"].is_null());
    assert_eq!(floats(&array(&seen["held"]["distribution-chart"]["traces"])[0]["y"]), [1.0]);
    // Three assets held in equal weights every bar; here against the mean of the assets' own growth, which is near.
    let equity = floats(&trace(&seen, "equity-chart", "best set in sample")["y"]);
    let grown = sets_of(&format!("{out}/results.parquet"), 3)[0].1[1];
    assert!((equity[equity.len() - 1] - 1.0 - grown).abs() < 0.03 + 0.2 * grown.abs(), "{}, {grown} from the set", equity[equity.len() - 1] - 1.0);
    assert_eq!(array(&numbers_of(&format!("{out}/report.html"))["curves"]).len(), 2);
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
    refused(&["--execution", "next_opne"], &["unknown execution 'next_opne'; did you mean 'next_open'?", "next_close"]);
    refused(&["--execution", "next_open"], &["--execution = next_open", "no open column"]);
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
