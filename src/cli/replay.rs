//! `forback sweep --replay SET`: every trade of single sets, and their equity bar by bar.

use super::print::{number, percent, ratio};
use super::results::Whole;
use super::say;
use super::sweep::{Args, Prepared};
use crate::data::Prices;
use crate::sim::replay::{SetReplay, Trade};
use crate::sim::sweep::SweepRun;
use crate::{Error, Result};
use arrow_array::{ArrayRef, BooleanArray, Float32Array, Float64Array, RecordBatch, StringArray, UInt32Array, UInt64Array};
use parquet::arrow::ArrowWriter;
use serde_json::{Value, json};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

pub(super) fn run(args: &Args, prepared: &Prepared, run: &SweepRun<'_>) -> Result<ExitCode> {
    let mut replays = Vec::new();
    for &id in &args.replay {
        let position = run.position(id).ok_or_else(|| {
            let drawn = if prepared.config.random.is_some() { " drawn" } else { "" };
            let help = format!("no such set{drawn}; they are numbered from {} to {}", run.id(0), run.id(run.len() - 1));
            Error::Parameter { op: "sweep", name: "--replay".into(), value: id.to_string(), help }
        })?;
        replays.extend(run.replay(position)?);
    }
    if let Some(dir) = &args.out {
        trades(dir, &replays, &prepared.prices)?;
        equity(dir, &replays, &prepared.prices)?;
    }
    if args.common.json {
        let sets: Vec<Value> = replays.iter().map(|replay| json(replay, &prepared.prices)).collect();
        say(&json!({ "run": prepared.provenance_with_command(), "replays": sets }).to_string());
    } else {
        text(args, prepared, &replays);
    }
    Ok(ExitCode::SUCCESS)
}

fn text(args: &Args, prepared: &Prepared, replays: &[SetReplay]) {
    let prices = &prepared.prices;
    say(&format!("device   {}", prepared.device.info()));
    for replay in replays {
        let parameters: Vec<String> = replay.parameters.iter().map(|(name, value)| format!("{name}={value}")).collect();
        say(&format!("\nset {}  {}  at {} bp", replay.id, parameters.join(","), replay.cost_bps));
        say(&format!("{:<10} {:>8} {:>10} {:>9} {:>9} {:>8}", "asset", "sharpe", "return", "drawdown", "turnover", "trades"));
        for (symbol, s) in prices.symbols.iter().zip(&replay.stats) {
            let [sharpe, total, drawdown] = [s.sharpe, s.total_return, s.max_drawdown].map(f64::from);
            say(&format!("{symbol:<10} {:>8} {:>10} {:>9} {:>9.1} {:>8}", ratio(sharpe), percent(total), percent(drawdown), s.turnover, s.trades));
        }
        let head = ["asset", "entry", "exit", "weight", "entry price", "exit price", "bars", "return", "cost"];
        let [a, b, c, d, e, f, g, h, i] = head;
        say(&format!("{a:<10} {b:<19} {c:<19} {d:>8} {e:>12} {f:>12} {g:>6} {h:>9} {i:>7}"));
        for t in &replay.trades {
            let (entry, exit) = times(prices, t);
            say(&format!(
                "{:<10} {entry:<19} {:<19} {:>8.3} {:>12.4} {:>12.4} {:>6} {:>9} {:>7}",
                prices.symbols[t.asset],
                if t.open { format!("open at {exit}") } else { exit },
                t.weight,
                t.entry_price,
                t.exit_price,
                t.bars(),
                percent(t.net_return),
                percent(t.cost)
            ));
        }
    }
    if let Some(dir) = &args.out {
        say(&format!("\nwrote    {}", dir.display()));
    }
}

fn times(prices: &Prices, t: &Trade) -> (String, String) {
    (prices.format_time(prices.times[t.entry]), prices.format_time(prices.times[t.exit]))
}

fn json(replay: &SetReplay, prices: &Prices) -> Value {
    let parameters: serde_json::Map<String, Value> = replay.parameters.iter().map(|(k, v)| (k.to_string(), json!(v))).collect();
    let trade = |t: &Trade| {
        let (entry, exit) = times(prices, t);
        json!({ "symbol": prices.symbols[t.asset], "entry": entry, "exit": exit, "open": t.open, "weight": t.weight, "entry_price": t.entry_price,
            "exit_price": t.exit_price, "bars": t.bars(), "net_return": number(t.net_return), "cost": number(t.cost) })
    };
    let asset = |(i, symbol): (usize, &String)| {
        let s = &replay.stats[i];
        let equity: Vec<Value> = replay.equity(i).into_iter().map(number).collect();
        json!({ "symbol": symbol, "sharpe": number(f64::from(s.sharpe)), "total_return": number(f64::from(s.total_return)),
            "max_drawdown": number(f64::from(s.max_drawdown)), "turnover": number(f64::from(s.turnover)), "trades": s.trades, "equity": equity })
    };
    json!({ "set": replay.id, "parameters": parameters, "cost_bps": replay.cost_bps, "start": replay.start,
        "assets": prices.symbols.iter().enumerate().map(asset).collect::<Vec<_>>(), "trades": replay.trades.iter().map(trade).collect::<Vec<_>>() })
}

// ---- files -----------------------------------------------------------------------------------------------------------

/// A table as NAME.parquet and NAME.csv.
fn table(dir: &Path, name: &str, columns: Vec<(&str, ArrayRef)>) -> Result<()> {
    let batch = RecordBatch::try_from_iter(columns).map_err(|e| Error::Internal(e.to_string()))?;
    let bytes = batch.get_array_memory_size() as f64;
    let (parquet, file) = Whole::create(dir, &format!("{name}.parquet"), bytes)?;
    let mut writer = ArrowWriter::try_new(file, batch.schema(), None).map_err(|e| parquet.failed(&e))?;
    writer.write(&batch).map_err(|e| parquet.failed(&e))?;
    writer.close().map_err(|e| parquet.failed(&e))?;
    let (text, file) = Whole::create(dir, &format!("{name}.csv"), 2.0 * bytes)?;
    let mut csv = csv::Writer::from_writer(file);
    csv.write_record(batch.schema().fields().iter().map(|f| f.name())).map_err(|e| text.failed(&e))?;
    let options = arrow_cast::display::FormatOptions::default();
    let cells = batch.columns().iter().map(|column| arrow_cast::display::ArrayFormatter::try_new(column.as_ref(), &options));
    let cells = cells.collect::<std::result::Result<Vec<_>, _>>().map_err(|e| Error::Internal(e.to_string()))?;
    for i in 0..batch.num_rows() {
        csv.write_record(cells.iter().map(|cell| cell.value(i).to_string())).map_err(|e| text.failed(&e))?;
    }
    csv.flush().map_err(|e| text.failed(&e))?;
    drop(csv);
    parquet.keep()?;
    text.keep()
}

fn trades(dir: &Path, replays: &[SetReplay], prices: &Prices) -> Result<()> {
    let all: Vec<(&SetReplay, &Trade)> = replays.iter().flat_map(|replay| replay.trades.iter().map(move |t| (replay, t))).collect();
    let real = |f: &dyn Fn(&Trade) -> f64| -> ArrayRef { Arc::new(Float64Array::from_iter_values(all.iter().map(|(_, t)| f(t)))) };
    let text = |f: &dyn Fn(&Trade) -> String| -> ArrayRef { Arc::new(StringArray::from_iter_values(all.iter().map(|(_, t)| f(t)))) };
    let columns: Vec<(&str, ArrayRef)> = vec![
        ("cost_bps", Arc::new(Float32Array::from_iter_values(all.iter().map(|(r, _)| r.cost_bps as f32)))),
        ("set", Arc::new(UInt64Array::from_iter_values(all.iter().map(|(r, _)| r.id)))),
        ("symbol", text(&|t| prices.symbols[t.asset].clone())),
        ("entry", text(&|t| times(prices, t).0)),
        ("exit", text(&|t| times(prices, t).1)),
        ("open", Arc::new(BooleanArray::from(all.iter().map(|(_, t)| t.open).collect::<Vec<_>>()))),
        ("direction", text(&|t| if t.weight < 0.0 { "short".into() } else { "long".into() })),
        ("weight", real(&|t| t.weight)),
        ("entry_price", real(&|t| t.entry_price)),
        ("exit_price", real(&|t| t.exit_price)),
        ("bars", Arc::new(UInt32Array::from_iter_values(all.iter().map(|(_, t)| t.bars() as u32)))),
        ("net_return", real(&|t| t.net_return)),
        ("cost", real(&|t| t.cost)),
    ];
    table(dir, "trades", columns)
}

/// A row per replay, asset and counted return, at the close that ends it.
fn equity(dir: &Path, replays: &[SetReplay], prices: &Prices) -> Result<()> {
    let (mut costs, mut sets, mut symbols, mut times, mut weights, mut nets, mut equities) = (vec![], vec![], vec![], vec![], vec![], vec![], vec![]);
    for replay in replays {
        for (asset, symbol) in prices.symbols.iter().enumerate() {
            for (j, equity) in replay.equity(asset).into_iter().enumerate().skip(replay.start) {
                costs.push(replay.cost_bps as f32);
                sets.push(replay.id);
                symbols.push(symbol.as_str());
                times.push(prices.format_time(prices.times[j + 1]));
                weights.push(replay.weight[[asset, j]]);
                nets.push(replay.net[[asset, j]]);
                equities.push(equity);
            }
        }
    }
    let columns: Vec<(&str, ArrayRef)> = vec![
        ("cost_bps", Arc::new(Float32Array::from(costs))),
        ("set", Arc::new(UInt64Array::from(sets))),
        ("symbol", Arc::new(StringArray::from(symbols))),
        ("time", Arc::new(StringArray::from(times))),
        ("weight", Arc::new(Float32Array::from(weights))),
        ("net_return", Arc::new(Float32Array::from(nets))),
        ("equity", Arc::new(Float64Array::from(equities))),
    ];
    table(dir, "equity", columns)
}
