//! `forback sweep --signals`: given weights, through the binary. Part of `stories`.

use super::{Folder, array, done, here, market, refused, rows, run, sweep_json, wide};
use arrow_array::{ArrayRef, Float64Array, StringArray};
use forback::sim::market::Market;
use serde_json::Value;
use std::sync::Arc;

/// An npy file of f32.
fn npy(folder: &Folder, name: &str, shape: &str, values: &[f32]) -> String {
    let mut header = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}");
    header += &" ".repeat(63 - (header.len() + 10) % 64);
    header.push('\n');
    let mut content = b"\x93NUMPY\x01\x00".to_vec();
    content.extend((header.len() as u16).to_le_bytes());
    content.extend(header.as_bytes());
    content.extend(values.iter().flat_map(|v| v.to_le_bytes()));
    std::fs::write(folder.path(name), content).unwrap();
    folder.path(name)
}

/// Two sets over three assets: equal weights held, and a third that follows the last move of each asset.
fn weights(market: &Market) -> Vec<f32> {
    let (t, n) = market.close.dim();
    let follow = |j: usize, i: usize| if j > 0 && market.close[[j, i]] > market.close[[j - 1, i]] { 0.3 } else { -0.1 };
    let cells = || (0..t).flat_map(|j| (0..n).map(move |i| (j, i)));
    cells().map(|_| 0.3).chain(cells().map(|(j, i)| follow(j, i))).collect()
}

/// Compounded return of one portfolio, by the definition.
fn compounded(market: &Market, weights: &[f32], cost: f64, band: f64) -> f64 {
    let (t, n) = market.close.dim();
    let (mut value, mut held) = (1.0, vec![0.0f64; n]);
    for j in 0..t - 1 {
        let mut turnover = 0.0;
        for i in 0..n {
            let wanted = if j == 0 { 0.0 } else { f64::from(weights[(j - 1) * n + i]) };
            if (wanted - held[i]).abs() > band {
                turnover += (wanted - held[i]).abs();
                held[i] = wanted;
            }
        }
        let r: Vec<f64> = (0..n).map(|i| f64::from(market.close[[j + 1, i]]) / f64::from(market.close[[j, i]]) - 1.0).collect();
        let gross: f64 = held.iter().zip(&r).map(|(w, r)| w * r).sum();
        value *= (1.0 - cost * turnover) * (1.0 + gross);
        held.iter_mut().zip(&r).for_each(|(w, r)| *w *= (1.0 + r) / (1.0 + gross));
    }
    value - 1.0
}

fn set<'a>(found: &'a Value, cost: usize, label: &str) -> &'a Value {
    array(&found["costs"][cost]["top"]).iter().find(|s| s["set"] == label).unwrap()
}

#[test]
fn given_weights_are_scored_and_ranked() {
    let folder = Folder::new();
    let market = market(400);
    let prices = folder.text("prices.csv", &wide(&market));
    let all = weights(&market);
    let file = npy(&folder, "weights.npy", "(2, 400, 3)", &all);
    let out = folder.path("out");
    for device in ["cpu", "wgpu"].into_iter().filter(|d| here(d)) {
        let args = [&prices, "--signals", &file, "--cost-bps", "0,20", "--rebalance-band", "0.02", "--out", &out, "--device", device];
        let found = sweep_json(&args);
        assert_eq!((found["sets"].as_u64(), found["assets"].as_u64(), found["bars"].as_u64()), (Some(2), Some(3), Some(400)));
        for (c, cost) in [(0, 0.0), (1, 20e-4)] {
            for (s, label) in ["0", "1"].into_iter().enumerate() {
                let want = compounded(&market, &all[s * 1200..(s + 1) * 1200], cost, 0.02);
                let got = set(&found, c, label)["total_return"].as_f64().unwrap();
                assert!((got - want).abs() < 1e-4, "set {label} at cost {c} on {device}: {got}, expected {want}");
            }
        }
        let sharpes: Vec<f64> = array(&found["costs"][1]["top"]).iter().map(|s| s["sharpe"].as_f64().unwrap()).collect();
        assert!(sharpes[0] >= sharpes[1], "best first: {sharpes:?}");
        // a row per cost, set and asset, and one for the portfolio
        let table = rows(&format!("{out}/results.csv"));
        assert_eq!(table.len(), 2 * 2 * 4);
        assert_eq!(table.iter().filter(|r| &r[2] == "*").count(), 4);
        let held: f64 = table.iter().find(|r| &r[0] == "20" && &r[1] == "0" && r[2] == market.symbols[1]).unwrap()[4].parse().unwrap();
        let held_by_hand: f64 =
            (1..399).map(|j| 0.3 * (f64::from(market.close[[j + 1, 1]]) / f64::from(market.close[[j, 1]]) - 1.0)).fold(1.0, |v, r| v * (1.0 + r));
        assert!((held - (held_by_hand * (1.0 - 0.3 * 20e-4) - 1.0)).abs() < 1e-3, "{held} {held_by_hand}");
        assert_eq!(rows(&format!("{out}/portfolio.csv")).len(), 399);
        assert!(std::fs::read_to_string(format!("{out}/run.json")).unwrap().contains("weights.npy"));
        assert!(std::fs::metadata(format!("{out}/results.parquet")).unwrap().len() > 0);
    }
    let text = done(&["sweep", &prices, "--signals", &file, "--device", "cpu", "--rebalance-every", "5", "--rebalance-to", "edge"]);
    for part in ["2 sets in", "portfolios trade every 5 bars outside a band of 0, to its edge", "best by sharpe at 10 bp, one portfolio with shared capital"] {
        assert!(text.contains(part), "'{part}' is not in\n{text}");
    }
}

#[test]
fn weights_by_time_and_symbol_are_the_same_as_by_position() {
    let folder = Folder::new();
    let market = market(60);
    let prices = folder.text("prices.csv", &wide(&market));
    let all = weights(&market);
    let by_position = npy(&folder, "weights.npy", "(2, 60, 3)", &all);
    // assets in another order, sets one after the other
    let cells: Vec<(usize, usize, usize)> = (0..2).flat_map(|s| [2, 0, 1].into_iter().flat_map(move |i| (0..60).map(move |j| (s, j, i)))).collect();
    let columns: Vec<(&str, ArrayRef)> = vec![
        ("set", Arc::new(StringArray::from_iter_values(cells.iter().map(|c| c.0.to_string())))),
        ("date", Arc::new(StringArray::from_iter_values(cells.iter().map(|c| super::date(market.dates[c.1]))))),
        ("symbol", Arc::new(StringArray::from_iter_values(cells.iter().map(|c| market.symbols[c.2].clone())))),
        ("weight", Arc::new(Float64Array::from_iter_values(cells.iter().map(|c| f64::from(all[(c.0 * 60 + c.1) * 3 + c.2]))))),
    ];
    let by_name = folder.parquet("weights.parquet", columns);
    let found = |file: &str| sweep_json(&[&prices, "--signals", file, "--device", "cpu"])["costs"].clone();
    assert_eq!(found(&by_position), found(&by_name));
}

#[test]
fn weights_that_do_not_fit_are_refused_by_name() {
    let folder = Folder::new();
    let market = market(60);
    let prices = folder.text("prices.csv", &wide(&market));
    let short = npy(&folder, "short.npy", "(59, 3)", &[0.1; 177]);
    refused(&[&prices, "--signals", &short], &["short.npy", "weights are [59, 3], prices are [60, 3]"]);
    let mut values = [0.1f32; 180];
    values[100] = f32::NAN;
    let holes = npy(&folder, "holes.npy", "(60, 3)", &values);
    refused(&[&prices, "--signals", &holes], &["weights[33, 1]", "is NaN"]);
    let fine = npy(&folder, "fine.npy", "(60, 3)", &[0.1; 180]);
    refused(&[&prices, "--signals", &fine, "--rebalance-band", "-1"], &["--rebalance-band = -1"]);
    refused(&[&prices, "--signals", &fine, "--rebalance-every", "0"], &["--rebalance-every = 0"]);
    refused(&[&prices, "--signals", &fine, "--rebalance-to", "centre"], &["--rebalance-to = centre"]);
    refused(&[&prices, "--signals", &folder.path("none.npy")], &["none.npy", "file not found"]);
    let alone = run(&["sweep", &prices, "--rebalance-band", "0.01"]);
    assert!(alone.code == 2 && alone.stderr.contains("--signals"), "{}", alone.stderr);
    let both = run(&["sweep", &prices, "--signals", &fine, "--strategy", "macd"]);
    assert!(both.code == 2 && both.stderr.contains("cannot be used with"), "{}", both.stderr);
}

#[test]
fn weights_traded_at_opens_earn_between_opens() {
    let folder = Folder::new();
    let market = market(300);
    let n = market.close.dim().1;
    // Opens at the close before: next_open then fills where same_close does, up to the last bar.
    let mut long = String::from("date,symbol,open,close\n");
    let mut before = vec![String::from("100"); n];
    for line in wide(&market).lines().skip(1) {
        let cells: Vec<&str> = line.split(',').collect();
        for i in 0..n {
            long += &format!("{},{},{},{}\n", cells[0], market.symbols[i], before[i], cells[1 + i]);
            before[i] = cells[1 + i].to_string();
        }
    }
    let (prices, closes) = (folder.text("long.csv", &long), folder.text("wide.csv", &wide(&market)));
    let file = npy(&folder, "weights.npy", "(2, 300, 3)", &weights(&market));
    let found = |execution: &str| sweep_json(&[&prices, "--signals", &file, "--device", "cpu", "--execution", execution]);
    assert_eq!(found("next_open")["costs"], found("same_close")["costs"]);
    assert_eq!(found("next_open")["run"]["execution"], "next_open");
    assert_ne!(found("next_close")["costs"], found("same_close")["costs"]);
    refused(&[&closes, "--signals", &file, "--execution", "next_open"], &["--execution = next_open", "no open column"]);
}
