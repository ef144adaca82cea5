//! `forback sweep`: a grid of strategies, walk-forward, over a price file.

use super::results::Results;
use super::{say, signals};
use crate::data::{Missing, Prices, ReadOptions, read_prices};
use crate::kernels::backtest_sweep::{Execution, Strategy};
use crate::kernels::performance::Performance;
use crate::kernels::philox::{normals, philox4x32};
use crate::kernels::{Device, DeviceKind};
use crate::sim::grid::Grid;
use crate::sim::market::regime_switching_market;
use crate::sim::sweep::{OutOfSample, RankBy, Select, SweepConfig, SweepReport, first_return, sweep};
use crate::sim::walk_forward::WalkForward;
use crate::{Error, Result};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

/// Arguments of `forback sweep`.
#[derive(clap::Args)]
pub(super) struct Args {
    /// Price files: CSV, CSV.gz or Parquet, wide (date,AAA,BBB,…) or long (date,symbol,open,high,low,close,volume).
    /// Without one, a seeded regime-switching market.
    files: Vec<PathBuf>,
    /// sma_cross, ema_cross, macd, rsi_reversion, bollinger_reversion, donchian_breakout or ts_momentum.
    #[arg(long, default_value = "sma_cross")]
    strategy: String,
    /// Grid, such as fast=2:100:2,slow=20:400:10 (ranges a:b:step, lists 5|10|20, log ranges a:b:log20, constraints slow>=3*fast).
    #[arg(long)]
    grid: Option<String>,
    /// One-way costs in basis points of traded notional, comma-separated; sets are ranked at the first.
    #[arg(long, default_value = "10", value_delimiter = ',', allow_negative_numbers = true)]
    cost_bps: Vec<f64>,
    /// same_close (earns the next bar; optimistic) or next_close (traded one close later).
    #[arg(long, default_value = "next_close")]
    execution: String,
    /// Walk-forward scheme, such as train=756,test=63,step=21,anchored,purge=5; `none` for in-sample only.
    #[arg(long)]
    walk_forward: Option<String>,
    /// Choose per window: per_asset, pooled (one set for all assets) or both.
    #[arg(long, default_value = "per_asset")]
    select: String,
    /// Symbols to use, comma-separated.
    #[arg(long, value_delimiter = ',')]
    symbols: Option<Vec<String>>,
    /// First date to use.
    #[arg(long)]
    from: Option<String>,
    /// Last date to use.
    #[arg(long)]
    to: Option<String>,
    /// Price column of a long file (default close).
    #[arg(long)]
    price: Option<String>,
    /// Time column, where its name does not tell.
    #[arg(long)]
    time_column: Option<String>,
    /// Missing cells: error, drop (the asset) or fill[:N] (carry the last price over at most N bars).
    #[arg(long, default_value = "error")]
    missing: String,
    /// Return periods per year; derived from the dates otherwise.
    #[arg(long, allow_negative_numbers = true)]
    periods_per_year: Option<f64>,
    /// How many sets to print.
    #[arg(long, default_value_t = 10)]
    top: usize,
    /// sharpe, total_return, max_drawdown or turnover.
    #[arg(long, default_value = "sharpe")]
    rank_by: String,
    /// Write results.parquet, results.csv, walk_forward.csv, out_of_sample.csv and run.json into this folder.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Bars of the synthetic market.
    #[arg(long, default_value_t = 2520)]
    bars: usize,
    /// Assets of the synthetic market.
    #[arg(long, default_value_t = 1)]
    assets: usize,
    #[command(flatten)]
    signals: signals::SignalArgs,
    #[command(flatten)]
    common: super::Common,
}

/// Most sets of one sweep: 100 bytes of host memory each.
const MOST_SETS: u64 = 50_000_000;

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let strategy = strategy(&args.strategy)?;
    let grid = Grid::parse(strategy.name(), args.grid.as_deref())?;
    let execution = execution(&args.execution)?;
    let rank_by = RankBy::named(&args.rank_by)?;
    let select = select(&args.select)?;
    let scheme = walk_forward(args.walk_forward.as_deref())?;
    let missing = args.missing.parse::<Missing>()?;
    if let Some(p) = args.periods_per_year.filter(|p| !(p.is_finite() && *p > 0.0)) {
        let help = "give the number of bars per year, 252 for daily equities".into();
        return Err(Error::Parameter { op: "sweep", name: "--periods-per-year".into(), value: p.to_string(), help });
    }
    let device = args.common.open()?;
    let prices = if args.files.is_empty() { synthetic(args)? } else { read(args, missing)? };
    let periods_per_year = args.periods_per_year.map_or_else(|| prices.periods_per_year(), Ok)?;
    if let Some(file) = &args.signals.file {
        return signals::run(&given(args, file, &device, &prices, (execution, periods_per_year, rank_by)));
    }
    refuse_absurd(&grid, &device, &prices, args.cost_bps.len())?;
    let walk_forward = fitting(scheme, &grid, &prices, args)?;
    let config = SweepConfig { grid, cost_bps: args.cost_bps.clone(), execution, walk_forward, select, rank_by, periods_per_year, profile: false };

    let provenance = provenance(args, &device, &prices, &config);
    let sets = config.grid.sets(MOST_SETS)?;
    let mut results = args.out.as_ref().map(|dir| Results::create(dir, &sets.names, &provenance)).transpose()?;
    let total = sets.len() as u64 * prices.n_assets() as u64 * args.cost_bps.len() as u64;
    let bar = progress(total, args.common.json);
    let start = Instant::now();
    let report = sweep(&device, prices.close.view(), &config, MOST_SETS, &mut |chunk| {
        bar.inc((chunk.sets.len() * chunk.assets.len()) as u64);
        match &mut results {
            Some(results) => results.write(chunk, args.cost_bps[chunk.cost], &sets, &prices.symbols),
            None => Ok(()),
        }
    })?;
    let seconds = start.elapsed().as_secs_f64();
    bar.finish_and_clear();
    let printed = Printed { args, device: &device, prices: &prices, config: &config, report: &report, seconds };
    if let Some(results) = results {
        let mut provenance = provenance;
        provenance["seconds"] = json!(seconds);
        results.finish(&report, &prices, &provenance)?;
    }
    if args.common.json {
        printed.json(&provenance_of(&printed))
    } else {
        printed.text()
    }
    Ok(ExitCode::SUCCESS)
}

/// What `--signals` needs of the arguments.
fn given<'a>(args: &'a Args, file: &'a Path, device: &'a Device, prices: &'a Prices, parsed: (Execution, f64, RankBy)) -> signals::Request<'a> {
    let (execution, periods_per_year, rank_by) = parsed;
    signals::Request {
        args: &args.signals,
        file,
        device,
        prices,
        some_symbols: args.symbols.is_some(),
        cost_bps: &args.cost_bps,
        execution,
        periods_per_year,
        rank_by,
        top: args.top,
        out: args.out.as_deref(),
        common: &args.common,
    }
}

fn strategy(name: &str) -> Result<Strategy> {
    Strategy::named(name).map_err(|_| unknown("strategy", name, Strategy::ALL.map(Strategy::name)))
}

/// An unknown name among few.
fn unknown<const K: usize>(kind: &'static str, name: &str, known: [&str; K]) -> Error {
    Error::Unknown { kind, given: name.into(), suggestion: crate::data::nearest(name, known), known: known.map(String::from).to_vec() }
}

fn execution(name: &str) -> Result<Execution> {
    Execution::named(name).map_err(|_| unknown("execution", name, ["same_close", "next_close"]))
}

fn select(name: &str) -> Result<Select> {
    match name {
        "per_asset" => Ok(Select::PerAsset),
        "pooled" => Ok(Select::Pooled),
        "both" => Ok(Select::Both),
        _ => Err(unknown("selection", name, ["per_asset", "pooled", "both"])),
    }
}

/// The scheme that was asked for, and whether it was.
fn walk_forward(text: Option<&str>) -> Result<(Option<WalkForward>, bool)> {
    match text {
        None => Ok((Some(WalkForward::default()), false)),
        Some("none") => Ok((None, true)),
        Some(text) => Ok((Some(text.parse()?), true)),
    }
}

/// The default scheme gives way to a short history; one that was asked for does not.
fn fitting((scheme, asked): (Option<WalkForward>, bool), grid: &Grid, prices: &Prices, args: &Args) -> Result<Option<WalkForward>> {
    let (first, returns) = (first_return(grid, prices.n_bars())?, prices.n_bars().saturating_sub(1) as u32);
    match scheme {
        Some(scheme) => match scheme.windows(first, returns) {
            Ok(_) => Ok(Some(scheme)),
            Err(error) if asked => Err(error),
            Err(_) => {
                if !args.common.json {
                    eprintln!(
                        "note: {} bars are too few for the default walk-forward ({scheme}) after a warm-up of {} bars; swept in sample only (set --walk-forward)",
                        prices.n_bars(),
                        grid.warm_up()
                    );
                }
                Ok(None)
            }
        },
        None => Ok(None),
    }
}

fn read(args: &Args, missing: Missing) -> Result<Prices> {
    let options = ReadOptions {
        time_column: args.time_column.clone(),
        price: args.price.clone(),
        symbols: args.symbols.clone(),
        from: args.from.clone(),
        to: args.to.clone(),
        missing,
    };
    read_prices(&args.files, &options)
}

fn synthetic(args: &Args) -> Result<Prices> {
    let file_only = [
        ("--symbols", args.symbols.is_some()),
        ("--from", args.from.is_some()),
        ("--to", args.to.is_some()),
        ("--price", args.price.is_some()),
        ("--time-column", args.time_column.is_some()),
    ];
    if let Some((name, _)) = file_only.iter().find(|(_, given)| *given) {
        let help = "needs a price file: forback sweep prices.csv".into();
        return Err(Error::Parameter { op: "sweep", name: (*name).into(), value: "given".into(), help });
    }
    let key = [args.common.seed as u32, (args.common.seed >> 32) as u32];
    let market = regime_switching_market(args.bars, args.assets, |path, block| normals(philox4x32([path as u32, (path >> 32) as u32, block, 1 << 16], key)))?;
    Ok(Prices {
        symbols: market.symbols,
        times: market.dates,
        has_time_of_day: false,
        close: market.close,
        open: None,
        sources: vec![format!("synthetic regime-switching market, seed {}", args.common.seed)],
        sha256: String::new(),
        dropped: Vec::new(),
        filled: Vec::new(),
        price_column: "close".into(),
        notes: Vec::new(),
    })
}

/// Set-bars a second that a first guess may count on.
fn guess(device: &Device) -> f64 {
    match device.info().kind {
        DeviceKind::Cpu => 1e9 * rayon::current_num_threads() as f64,
        DeviceKind::Wgpu if !device.info().software => 5e10,
        DeviceKind::Cuda => 3e11,
        DeviceKind::Wgpu => 3e8,
        DeviceKind::Reference => 2e8,
        DeviceKind::CudaHost => 1e6,
    }
}

/// A grid that no machine would finish is refused with the time and the memory that it would take.
fn refuse_absurd(grid: &Grid, device: &Device, prices: &Prices, costs: usize) -> Result<()> {
    let sets = if grid.is_counted() { grid.len() as f64 } else { grid.raw_len() as f64 };
    if sets <= MOST_SETS as f64 {
        return Ok(());
    }
    let seconds = sets * prices.n_assets() as f64 * prices.n_bars() as f64 * costs as f64 / guess(device);
    let bytes = sets * (100.0 + 20.0 * costs as f64);
    let what = format!("a grid of {sets:.3e} sets (about {} on {} and {} of memory)", duration(seconds), device.info().kind.name(), size(bytes));
    let help = "widen the steps, or use lists or log ranges (fast=2:200:log20)".into();
    Err(Error::TooLarge { what, needed: sets.min(u64::MAX as f64) as u64, limit: MOST_SETS, unit: "sets", help })
}

fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 120.0 => format!("{s:.0} seconds"),
        s if s < 7200.0 => format!("{:.0} minutes", s / 60.0),
        s if s < 172_800.0 => format!("{:.0} hours", s / 3600.0),
        s if s < 6.3e7 => format!("{:.0} days", s / 86_400.0),
        s => format!("{:.3e} years", s / 31_557_600.0),
    }
}

fn size(bytes: f64) -> String {
    let units = ["B", "kB", "MB", "GB", "TB", "PB", "EB"];
    let power = ((bytes.max(1.0).log10() / 3.0).floor() as usize).min(units.len() - 1);
    format!("{:.0} {}", bytes / 1e3f64.powi(power as i32), units[power])
}

fn progress(total: u64, silent: bool) -> ProgressBar {
    if silent || !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{bar:40} {human_pos}/{human_len} back-tests, {eta} left").unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(total).with_style(style)
}

fn provenance(args: &Args, device: &Device, prices: &Prices, config: &SweepConfig) -> Value {
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "command": std::env::args().collect::<Vec<_>>(),
        "device": device.info().to_string(),
        "seed": args.common.seed,
        "data": { "sources": prices.sources, "sha256": prices.sha256, "price": prices.price_column, "assets": prices.n_assets(), "bars": prices.n_bars(),
            "first": prices.times.first().map(|t| prices.format_time(*t)), "last": prices.times.last().map(|t| prices.format_time(*t)),
            "dropped": prices.dropped.iter().map(|d| json!({ "symbol": d.symbol, "reason": d.reason })).collect::<Vec<_>>(),
            "filled": prices.filled.iter().map(|(s, n)| json!({ "symbol": s, "cells": n })).collect::<Vec<_>>(), "notes": prices.notes },
        "strategy": config.grid.strategy().name, "grid": config.grid.to_string(), "sets": config.grid.len(), "cost_bps": config.cost_bps,
        "execution": args.execution, "walk_forward": config.walk_forward.map(|w| w.to_string()), "select": args.select,
        "rank_by": args.rank_by, "periods_per_year": config.periods_per_year,
    })
}

fn provenance_of(p: &Printed<'_>) -> Value {
    provenance(p.args, p.device, p.prices, p.config)
}

/// Everything that the two outputs are made of.
struct Printed<'a> {
    args: &'a Args,
    device: &'a Device,
    prices: &'a Prices,
    config: &'a SweepConfig,
    report: &'a SweepReport,
    seconds: f64,
}

fn number(x: f64) -> Value {
    if x.is_finite() { json!(x) } else { Value::Null }
}

fn percent(x: f64) -> String {
    if x.is_nan() { "-".into() } else { format!("{:.1}%", 100.0 * x) }
}

fn ratio(x: f64) -> String {
    if x.is_nan() { "-".into() } else { format!("{x:.2}") }
}

impl Printed<'_> {
    /// Turnover per year from a total over all counted bars.
    fn per_year(&self, turnover: f64) -> f64 {
        let bars = (self.report.bars.saturating_sub(1) as f64 - f64::from(self.report.start)).max(1.0);
        turnover / bars * self.config.periods_per_year
    }

    fn text(&self) {
        let (report, prices) = (self.report, self.prices);
        let (first, last) = (prices.times.first(), prices.times.last());
        let time = |t: Option<&i64>| t.map(|t| prices.format_time(*t)).unwrap_or_default();
        say(&format!("device   {}", self.device.info()));
        say(&format!("data     {}: {} × {} bars, {} to {}", prices.sources.join(", "), assets(prices), report.bars, time(first), time(last)));
        let derived = if self.args.periods_per_year.is_some() { "as given" } else { "derived from the dates" };
        say(&format!("         {:.1} periods per year ({derived})", self.config.periods_per_year));
        self.notes();
        say(&format!(
            "sweep    {} {}: {} sets × {} × {} bars{} in {:.2} s, {:.3e} set-bars/s",
            self.config.grid.strategy().name,
            self.config.grid,
            report.sets.len(),
            assets(prices),
            report.bars,
            if report.costs.len() > 1 { format!(" × {} costs", report.costs.len()) } else { String::new() },
            self.seconds,
            report.work() / self.seconds
        ));
        say(&format!("         {} after a warm-up of {} bars, {} bp one way", self.args.execution, report.start, costs(&self.config.cost_bps)));
        self.ranking();
        self.out_of_sample();
        if let Some(dir) = &self.args.out {
            say(&format!("\nwrote    {}", dir.display()));
        }
    }

    fn notes(&self) {
        for note in &self.prices.notes {
            say(&format!("note     {note}"));
        }
        let dropped = &self.prices.dropped;
        for d in dropped.iter().take(8) {
            say(&format!("dropped  {}: {}", d.symbol, d.reason));
        }
        if dropped.len() > 8 {
            say(&format!("dropped  {} more: {}", dropped.len() - 8, dropped[8..].iter().map(|d| d.symbol.as_str()).collect::<Vec<_>>().join(", ")));
        }
        if !self.prices.filled.is_empty() {
            let cells: usize = self.prices.filled.iter().map(|(_, n)| n).sum();
            say(&format!("filled   {cells} cells of {} assets with the last price", self.prices.filled.len()));
        }
    }

    fn ranking(&self) {
        let report = self.report;
        let best = report.ranked(0, self.config.rank_by, self.args.top);
        let mean = if report.assets > 1 { ", means over assets" } else { "" };
        say(&format!("\nbest in sample by {} at {} bp{mean}", self.args.rank_by, self.config.cost_bps[0]));
        let names: Vec<&str> = report.sets.names.clone();
        let width = |name: &str| name.len().max(7);
        let head: String = names.iter().map(|n| format!(" {n:>w$}", w = width(n))).collect();
        say(&format!("{:>8}{head} {:>8} {:>10} {:>9} {:>11} {:>8}", "set", "sharpe", "return", "drawdown", "turnover/yr", "trades"));
        for set in best {
            let s = report.set(0, set);
            let values: String = report.sets.get(set).iter().map(|(n, v)| format!(" {v:>w$}", w = width(n))).collect();
            say(&format!(
                "{set:>8}{values} {:>8} {:>10} {:>9} {:>11.1} {:>8}",
                ratio(s.sharpe),
                percent(s.total_return),
                percent(s.max_drawdown),
                self.per_year(s.turnover),
                s.trades
            ));
        }
    }

    fn out_of_sample(&self) {
        let report = self.report;
        let many = report.assets > 1;
        let bars = if report.windows.is_empty() {
            "all counted bars".to_string()
        } else {
            format!("{} stitched bars of {} windows", report.stitched_bars.len(), report.windows.len())
        };
        if let Some(scheme) = &self.config.walk_forward {
            say(&format!("\nout of sample, {scheme}: {bars}{}", if many { ", equal-weight portfolio" } else { "" }));
        } else {
            say(&format!("\nagainst {bars}{}", if many { ", equal-weight portfolio" } else { "" }));
        }
        let spread = if many { format!(" {:>22}", "asset sharpe 10-50-90%") } else { String::new() };
        say(&format!("{:<28} {:>8} {:>10} {:>9} {:>8} {:>8} {:>11}{spread}", "", "sharpe", "return", "drawdown", "sortino", "P(SR>0)", "turnover/yr"));
        for level in &report.costs {
            for (name, chosen) in [("per asset", &level.per_asset), ("pooled", &level.pooled)] {
                if let Some(chosen) = chosen {
                    self.row(&format!("chosen {name}, {} bp", level.cost_bps), chosen, many);
                }
            }
        }
        if let Some(hold) = &report.buy_and_hold {
            self.row("buy and hold", hold, many);
        }
        if report.costs.iter().any(|c| c.per_asset.is_some() || c.pooled.is_some()) {
            say("changing sets between windows is not charged; each window's sets trade at the costs above");
        }
    }

    fn row(&self, name: &str, o: &OutOfSample, many: bool) {
        let p = &o.portfolio;
        let spread = if many { format!(" {:>22}", deciles(&o.assets)) } else { String::new() };
        say(&format!(
            "{name:<28} {:>8} {:>10} {:>9} {:>8} {:>8} {:>11.1}{spread}",
            ratio(p.sharpe),
            percent(p.total_return),
            percent(p.max_drawdown),
            ratio(p.sortino),
            ratio(p.probabilistic_sharpe),
            o.turnover * self.config.periods_per_year
        ));
    }

    fn json(&self, provenance: &Value) {
        let report = self.report;
        let performance = |p: &Performance| Value::Object(p.entries().into_iter().map(|(k, v)| (k.to_string(), number(v))).collect());
        let out = |o: &Option<OutOfSample>| {
            o.as_ref().map(|o| {
                json!({ "portfolio": performance(&o.portfolio), "turnover_per_year": number(o.turnover * self.config.periods_per_year), "trades": o.trades,
                    "assets": o.assets.iter().zip(&self.prices.symbols).map(|(p, s)| json!({ "symbol": s, "sharpe": number(p.sharpe),
                        "total_return": number(p.total_return), "max_drawdown": number(p.max_drawdown) })).collect::<Vec<_>>(), "best": o.best })
            })
        };
        let set = |cost: usize, s: usize| {
            let m = report.set(cost, s);
            let parameters: serde_json::Map<String, Value> = report.sets.get(s).into_iter().map(|(k, v)| (k.to_string(), json!(v))).collect();
            json!({ "set": s, "parameters": parameters, "sharpe": number(m.sharpe), "total_return": number(m.total_return),
                "max_drawdown": number(m.max_drawdown), "turnover": number(m.turnover), "trades": m.trades })
        };
        let levels: Vec<Value> = report
            .costs
            .iter()
            .enumerate()
            .map(|(c, level)| {
                let top: Vec<Value> = report.ranked(c, self.config.rank_by, self.args.top).into_iter().map(|s| set(c, s)).collect();
                json!({ "cost_bps": level.cost_bps, "top": top, "per_asset": out(&level.per_asset), "pooled": out(&level.pooled) })
            })
            .collect();
        let line = json!({
            "run": provenance, "sets": report.sets.len(), "assets": report.assets, "bars": report.bars, "start": report.start, "windows": report.windows.len(),
            "stitched_bars": report.stitched_bars.len(), "seconds": self.seconds, "set_bars_per_second": report.work() / self.seconds,
            "launches": report.launches, "submits": report.submits, "costs": levels, "buy_and_hold": out(&report.buy_and_hold),
        });
        say(&line.to_string());
    }
}

fn assets(prices: &Prices) -> String {
    match prices.symbols.as_slice() {
        [one] => one.clone(),
        many => format!("{} assets", many.len()),
    }
}

fn costs(bps: &[f64]) -> String {
    bps.iter().map(f64::to_string).collect::<Vec<_>>().join(", ")
}

/// Deciles of the assets' Sharpe ratios.
fn deciles(assets: &[Performance]) -> String {
    let mut sharpes: Vec<f64> = assets.iter().map(|p| p.sharpe).filter(|s| !s.is_nan()).collect();
    sharpes.sort_by(f64::total_cmp);
    let at = |q: f64| sharpes.get(((sharpes.len().max(1) - 1) as f64 * q).round() as usize).copied().unwrap_or(f64::NAN);
    format!("{} {} {}", ratio(at(0.1)), ratio(at(0.5)), ratio(at(0.9)))
}
