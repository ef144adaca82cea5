//! Stories of `forback train`.

use super::{DAY, Folder, array, data, date, done, run, sweep_json};
use arrow_array::cast::AsArray;
use arrow_array::types::{Float32Type, Float64Type};
use forback::kernels::philox::{normals, philox4x32};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use serde_json::{Value, json};
use std::fs::File;

/// The one JSON object of `forback train … --json`.
fn train_json(args: &[&str]) -> Value {
    let stdout = done(&[&["train", "--json"], args].concat());
    assert_eq!(stdout.lines().count(), 1, "{stdout}");
    serde_json::from_str(&stdout).unwrap()
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("not a number: {value}"))
}

/// A wide file of assets whose returns swing: what they did `delay` + 1 bars ago comes again with the other sign, half of it.
fn swinging(folder: &Folder, name: &str, bars: usize, assets: usize, echo: f64) -> String {
    let mut text = String::from("date");
    (0..assets).for_each(|i| text += &format!(",A{i}"));
    text.push('\n');
    let mut logs = vec![vec![0.0f64; assets]; bars];
    let mut price = vec![100.0f64; assets];
    for t in 0..bars {
        text += &date(1_000_000_000 / DAY * DAY + t as i64 * DAY);
        for i in 0..assets {
            let noise = normals(philox4x32([t as u32, i as u32, 0, 0], [3, 5]))[0];
            logs[t][i] = 0.01 * noise - if t >= 2 { echo * logs[t - 2][i] } else { 0.0 };
            price[i] *= logs[t][i].exp();
            text += &format!(",{}", price[i]);
        }
        text.push('\n');
    }
    folder.text(name, &text)
}

const QUICK: [&str; 16] =
    ["--device", "cpu", "--train", "400", "--test", "100", "--window", "4", "--features", "returns:1", "--hidden", "6", "--seeds", "2", "--batch", "64"];

#[test]
fn what_can_be_forecast_is_and_the_files_say_the_same() {
    let folder = Folder::new();
    let prices = swinging(&folder, "p.csv", 900, 2, 0.6);
    let out = folder.path("out");
    let args = [&[prices.as_str(), "--learning-rate", "1e-2,1e-5", "--epochs", "12", "--cost-bps", "1", "--out", &out], &QUICK[..]].concat();
    let found = train_json(&args);
    let all = &found["figures"][0];
    assert!(number(&all["rank_correlation"]) > 0.3 && number(&all["r_squared"]) > 0.1, "{all}");
    assert!(number(&all["accuracy"]) > 0.58 && number(&all["accuracy"]) > number(&all["naive_accuracy"]), "{all}");
    assert!(number(&found["t_value"]) > 4.0);
    assert_eq!(found["figures"].as_array().unwrap().len(), 3, "all, and each of two assets");
    // The rate that learns nothing is not chosen.
    let folds = number(&found["folds"]);
    assert_eq!((array(&found["chosen"])[0]["folds"].as_f64(), array(&found["chosen"])[1]["folds"].as_f64()), (Some(folds), Some(0.0)), "{}", found["chosen"]);
    assert_eq!(number(&found["models"]), folds * 2.0 * 2.0);
    let sharpe = |i: usize| number(&found["books"][i]["performance"]["sharpe"]);
    assert!(sharpe(0) > 2.0 && sharpe(0) > sharpe(1) && sharpe(0) > sharpe(2), "{}", found["books"]);
    let verdict = found["verdict"].to_string();
    assert!(verdict.contains("more than chance gives") && verdict.contains("1 trial") && verdict.contains("2 configurations"), "{verdict}");

    // A checkpoint per model, a log of all epochs, and nothing of what a resumption needs.
    assert_eq!(std::fs::read_dir(folder.path("out/models")).unwrap().count() as f64, number(&found["models"]));
    let file = std::fs::read(folder.path("out/models/hidden6-rate0.01-fold0-seed1.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&file).unwrap();
    assert_eq!(file.tensor("lstm.weight_ih_l0").unwrap().shape(), [24, 1]);
    let log = std::fs::read_to_string(folder.path("out/log.jsonl")).unwrap();
    let lines: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines[0]["training"]["model"], json!("lstm"));
    assert!(lines.len() > 12 && lines[1]["train"].as_f64().is_some() && lines[1]["grad_norm"].as_f64().is_some(), "{}", lines[1]);
    let mut left: Vec<String> = std::fs::read_dir(&out).unwrap().map(|f| f.unwrap().file_name().into_string().unwrap()).collect();
    left.sort();
    assert_eq!(left, ["config.toml", "log.jsonl", "models", "predictions.parquet", "train.json"]);

    // The predictions: a row per bar and asset; what lies past the last target has no truth; the weights are half of capital each.
    let reader = ParquetRecordBatchReaderBuilder::try_new(File::open(folder.path("out/predictions.parquet")).unwrap()).unwrap().build().unwrap();
    let batch = reader.map(Result::unwrap).next().unwrap();
    assert_eq!(batch.num_rows() as f64, 2.0 * number(&found["bars"]));
    let weights = batch.column_by_name("weight").unwrap().as_primitive::<Float32Type>().clone();
    let values = batch.column_by_name("prediction").unwrap().as_primitive::<Float64Type>().clone();
    assert!(weights.values().iter().zip(values.values()).all(|(w, v)| *w == if *v > 0.0 { 0.5 } else { -0.5 }));

    // Its options train the same again.
    let again = train_json(&["--config", &folder.path("out/config.toml")]);
    assert_eq!((&again["figures"], &again["books"]), (&found["figures"], &found["books"]));
    let wrong = run(&["train", "--config", &folder.text("c.toml", "hiden = 4\n")]);
    assert!(wrong.code == 2 && wrong.stderr.contains("no option of forback train") && wrong.stderr.contains("hidden"), "{}", wrong.stderr);

    // A sweep of these weights earns what the training said.
    let swept = sweep_json(&[&prices, "--signals", &folder.path("out/predictions.parquet"), "--cost-bps", "1", "--device", "cpu"]);
    let total = number(&swept["costs"][0]["top"][0]["total_return"]);
    let ours = number(&found["books"][0]["performance"]["total_return"]);
    // The sweep closes nothing either, and pays for leaving the last row's weights: those bars are past the last prediction.
    assert!((total - ours).abs() < 0.02 * (1.0 + ours), "{total} swept, {ours} trained");
}

#[test]
fn noise_is_called_noise() {
    let folder = Folder::new();
    let prices = swinging(&folder, "p.csv", 900, 1, 0.0);
    let text = done(&[&["train", prices.as_str(), "--epochs", "3"], &QUICK[..]].concat());
    for part in ["device   cpu", "walk-forward train=400", "out of sample: ", "chance alone gives as much", "Sharpe ratio", "1 trial"] {
        assert!(text.contains(part), "'{part}' is not in\n{text}");
    }
    let plan = done(&[&["train", prices.as_str(), "--plan"], &QUICK[..]].concat());
    assert!(plan.contains("models × ") && plan.contains("epochs   20 at most"), "{plan}");
}

#[test]
fn every_model_target_and_objective_trains() {
    let folder = Folder::new();
    let prices = swinging(&folder, "p.csv", 640, 2, 0.6);
    for (model, more) in [
        ("gru", &["--target", "sign"][..]),
        ("transformer", &["--objective", "sharpe", "--per-asset"]),
        ("mlp", &["--target", "volatility", "--horizon", "5", "--features", "volatility:5,21"]),
        ("lstm", &["--objective", "sortino", "--per", "batch", "--average", "ema:0.9", "--schedule", "cosine"]),
        ("gru", &["--objective", "calmar", "--per-asset", "--anchored", "--average", "polyak:1", "--execution", "same_close"]),
        ("mlp", &["--objective", "huber", "--horizon", "3", "--schedule", "plateau", "--warm-up", "3", "--patience", "0"]),
    ] {
        let found = train_json(
            &[&[prices.as_str(), "--model", model, "--epochs", "2", "--learning-rate", "1e-2"], &QUICK[..8], &["--hidden", "4", "--seeds", "1"], more].concat(),
        );
        assert!(number(&found["figures"][0]["rows"]) > 100.0, "{model} {more:?}: {found}");
        assert!(found["figures"][0]["rank_correlation"].is_number(), "{model} {more:?}: {found}");
        assert_eq!(array(&found["books"]).len(), if more.contains(&"volatility") { 0 } else { 3 });
        assert!(array(&found["notes"]).is_empty(), "{found}");
    }
}

#[test]
fn a_training_goes_on_where_it_was_stopped() {
    let folder = Folder::new();
    let prices = swinging(&folder, "p.csv", 640, 1, 0.6);
    let args = |out: &str| [&["train", "--json", prices.as_str(), "--epochs", "3", "--out", out].map(String::from)[..], &QUICK.map(String::from)].concat();
    let (whole, out) = (folder.path("whole"), folder.path("out"));
    let ask = |out: &str, more: &[&str]| run(&args(out).iter().map(String::as_str).chain(more.iter().copied()).collect::<Vec<_>>());
    let complete: Value = serde_json::from_str(&ask(&whole, &[]).stdout).unwrap();
    // What a stopped run leaves: its mark, without any epoch.
    std::fs::create_dir_all(&out).unwrap();
    std::fs::write(folder.path("out/training.json"), complete["run"].to_string()).unwrap();
    let refused = ask(&out, &[]);
    assert!(refused.code == 2 && refused.stderr.contains("--resume"), "{}", refused.stderr);
    let other = ask(&out, &["--resume", "--valid", "0.3"]);
    assert!(other.code == 2 && other.stderr.contains("valid 0.2, this one 0.3"), "{}", other.stderr);
    let resumed: Value = serde_json::from_str(&ask(&out, &["--resume"]).stdout).unwrap();
    assert_eq!((&resumed["figures"], &resumed["books"]), (&complete["figures"], &complete["books"]));
    let read = |name: &str| std::fs::read(folder.path(name)).unwrap();
    let name = "models/hidden6-rate0.003-fold0-seed0.safetensors";
    assert_eq!(read(&format!("whole/{name}")), read(&format!("out/{name}")));
}

#[test]
fn what_cannot_be_trained_is_refused_in_one_line() {
    let folder = Folder::new();
    let prices = swinging(&folder, "p.csv", 300, 2, 0.6);
    let broken = folder.text("b.csv", "date,A\n2020-01-01,1\n2020-01-02,x\n");
    for (args, parts) in [
        (&["--model", "lstn"][..], &["lstn", "lstm"][..]),
        (&["--features", "returns:1,retruns:5"], &["retruns", "returns"]),
        (&["--features", "5"], &["returns:1,5,21"]),
        (&["--objective", "sharp"], &["sharp", "sharpe"]),
        (&["--objective", "cross-entropy"], &["--target sign", "does not fit"][1..]),
        (&["--objective", "sharpe", "--horizon", "5"], &["--horizon"]),
        (&["--target", "volatility", "--horizon", "1"], &["--horizon", "at least 2"]),
        (&["--train", "756"], &["756", "bars"]),
        (&["--objective", "calmar", "--train", "100", "--test", "20"], &["follow each other"]),
        (&["--learning-rate", "-1"], &["learning-rate"]),
        (&["--hidden", "5", "--model", "transformer", "--train", "100", "--test", "20"], &["even"]),
        (&["--average", "ema:2"], &["--average"]),
        (&["--execution", "next_open", "--train", "100"], &["next_open", "open"]),
        (&["--seeds", "0"], &["--seeds"]),
    ] {
        let out = folder.path("refused");
        let ran = run(&[&["train", prices.as_str(), "--device", "cpu", "--out", &out], args].concat());
        assert_eq!(std::fs::read_dir(&out).map_or(0, Iterator::count), 0, "{args:?} left something");
        assert_eq!((ran.code, ran.stdout.as_str()), (2, ""), "{args:?}: {}", ran.stderr);
        assert_eq!(ran.stderr.lines().count(), 1, "{}", ran.stderr);
        for part in parts {
            assert!(ran.stderr.contains(part), "{args:?}: '{part}' is not in: {}", ran.stderr);
        }
    }
    let ran = run(&["train", &broken, "--device", "cpu"]);
    assert!(ran.code == 2 && ["b.csv", "row 3", "column 'A'", "'x'"].iter().all(|part| ran.stderr.contains(part)), "{}", ran.stderr);
}

/// A year of SPY, and what is said of it: that nothing is there to be found in a few seconds of training is what an honest tool says.
#[test]
fn real_prices_get_an_honest_verdict() {
    let Some(file) = data("etfs_daily/ohlcv.csv.gz") else { return };
    let args = [file.as_str(), "--symbols", "SPY", "--from", "2008-01-01", "--to", "2012-12-31", "--epochs", "2", "--hidden", "4", "--seeds", "1"];
    let found = train_json(&[&args[..], &["--device", "cpu", "--learning-rate", "1e-3"]].concat());
    assert!(number(&found["bars"]) > 300.0 && number(&found["t_value"]).abs() < 4.0, "{found}");
    assert_eq!(array(&found["verdict"]).len(), 3, "{found}");
}
