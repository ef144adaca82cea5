//! `forback sweep --signals FILE`: given weights instead of a strategy. Every set is scored asset by asset, as the sweep does, and as one
//! portfolio with shared capital whose weights drift between trades.

use super::results::{Whole, io};
use super::sweep::opens;
use super::{Common, say};
use crate::data::Prices;
use crate::data::signals::{SignalSets, Signals};
use crate::kernels::Device;
use crate::kernels::backtest_sweep::Execution;
use crate::kernels::portfolio_sweep::{AssetReturns, Portfolio, PortfolioOutcome, PortfolioStats, Positions, Rebalance, Status};
use crate::sim::sweep::{RankBy, fills};
use crate::{Error, Result};
use arrow_array::{ArrayRef, BooleanArray, Float32Array, RecordBatch, StringArray, UInt64Array};
use arrow_schema::{DataType, Field, Schema};
use indicatif::{ProgressBar, ProgressStyle};
use parquet::arrow::ArrowWriter;
use parquet::basic::Compression;
use parquet::file::properties::WriterProperties;
use serde_json::{Value, json};
use std::cmp::Ordering;
use std::fs::File;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

/// Options of portfolios with shared capital.
#[derive(clap::Args)]
pub(super) struct SignalArgs {
    /// Weights to back-test instead of a strategy: npy [T,N] or [S,T,N] by position, or Parquet by time and symbol
    /// (long: set, time, symbol, weight; wide: time, one column per asset, set where there are several).
    #[arg(long = "signals", value_name = "FILE", conflicts_with_all = ["strategy", "grid", "walk_forward", "select", "bars", "assets"])]
    pub(super) file: Option<PathBuf>,
    /// Portfolios: an asset trades only if its weight is further than this from its target (0.01 is one per cent of capital).
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true)]
    rebalance_band: f64,
    /// Portfolios: trade on every N-th bar only.
    #[arg(long, value_name = "N", default_value_t = 1)]
    rebalance_every: u32,
    /// Portfolios: trade to the target, or to the edge of the band.
    #[arg(long, value_name = "target|edge", default_value = "target")]
    rebalance_to: String,
}

impl SignalArgs {
    /// The rebalancing in words.
    pub(super) fn text(&self) -> String {
        format!("band {}, every {} bars, to the {}", self.rebalance_band, self.rebalance_every, self.rebalance_to)
    }

    /// When and how far portfolios trade.
    pub(super) fn rebalance(&self) -> Result<Rebalance> {
        let bad = |name: &str, value: String, help: &str| Err(Error::Parameter { op: "sweep", name: name.into(), value, help: help.into() });
        if !(self.rebalance_band.is_finite() && self.rebalance_band >= 0.0) {
            return bad("--rebalance-band", self.rebalance_band.to_string(), "give a distance between weights, 0 or more");
        }
        if self.rebalance_every == 0 {
            return bad("--rebalance-every", "0".into(), "give a number of bars, 1 or more");
        }
        let to_edge = match self.rebalance_to.as_str() {
            "target" => false,
            "edge" => true,
            other => return bad("--rebalance-to", other.into(), "use target or edge"),
        };
        Ok(Rebalance { band: self.rebalance_band, every: self.rebalance_every, to_edge })
    }

    /// The same where there may be nothing to rebalance.
    pub(super) fn rebalance_of(&self, portfolios: usize) -> Result<Rebalance> {
        let rebalance = self.rebalance()?;
        if portfolios == 0 && rebalance != Rebalance::default() {
            let help = "rebalances nothing; give --portfolio equal, or your own weights with --signals FILE".into();
            return Err(Error::Parameter { op: "sweep", name: "--rebalance".into(), value: self.text(), help });
        }
        Ok(rebalance)
    }
}

/// What `forback sweep` hands over.
pub(super) struct Request<'a> {
    pub(super) args: &'a SignalArgs,
    pub(super) file: &'a Path,
    pub(super) device: &'a Device,
    pub(super) prices: &'a Prices,
    /// Only some symbols of the price files were read.
    pub(super) some_symbols: bool,
    pub(super) cost_bps: &'a [f64],
    pub(super) execution: Execution,
    pub(super) periods_per_year: f64,
    pub(super) rank_by: RankBy,
    pub(super) top: usize,
    pub(super) out: Option<&'a Path>,
    pub(super) common: &'a Common,
}

/// Weights of one chunk of sets: 32 MiB.
const CHUNK: usize = 8 << 20;

/// What is kept of a set: its portfolio at each cost, and the mean Sharpe ratio of its assets.
struct Set {
    label: String,
    portfolio: Vec<PortfolioStats>,
    assets: Vec<f64>,
}

/// Everything that the two outputs are made of.
struct Found<'a> {
    request: &'a Request<'a>,
    rebalance: Rebalance,
    sets: Vec<Set>,
    /// Net returns [C,T] of the best set so far, and which it is.
    best: Option<(usize, Vec<f32>)>,
    absent: u64,
    launches: usize,
    submits: usize,
    seconds: f64,
}

pub(super) fn run(request: &Request<'_>) -> Result<ExitCode> {
    let rebalance = request.args.rebalance()?;
    let prices = request.prices;
    let mut signals = Signals::open(request.file, prices, request.some_symbols)?;
    let fills = fills(prices.close.view(), opens(prices, request.execution)?);
    let returns = AssetReturns::of_closes(&fills, prices.n_assets())?;
    let mut found = Found { request, rebalance, sets: Vec::new(), best: None, absent: 0, launches: 0, submits: 0, seconds: 0.0 };
    // A row per cost, set, and asset or portfolio.
    let rows = (request.cost_bps.len() * (prices.n_assets() + 1)) as f64 * signals.count().unwrap_or(1) as f64;
    let mut rows = request.out.map(|dir| Rows::create(dir, &found.provenance(), rows)).transpose()?;
    let most = (CHUNK / (prices.n_bars() * prices.n_assets())).max(1);
    let bar = progress(signals.count(), request.common.json);
    let start = Instant::now();
    loop {
        let chunk = signals.next(most)?;
        if chunk.labels.is_empty() {
            break;
        }
        let outcome = score(request, rebalance, &returns, &chunk)?;
        if let Some(rows) = &mut rows {
            rows.write(request, &chunk.labels, &outcome)?;
        }
        bar.inc(chunk.labels.len() as u64);
        found.add(chunk.labels, &outcome);
    }
    bar.finish_and_clear();
    (found.seconds, found.absent) = (start.elapsed().as_secs_f64(), signals.absent());
    if let Some(rows) = rows {
        rows.finish(&found)?;
    }
    if request.common.json {
        found.json()
    } else {
        found.text()
    }
    Ok(ExitCode::SUCCESS)
}

/// Every set of a chunk at every cost, as a portfolio and asset by asset.
fn score(request: &Request<'_>, rebalance: Rebalance, returns: &AssetReturns, chunk: &SignalSets) -> Result<PortfolioOutcome> {
    let (t, n) = (request.prices.n_bars(), request.prices.n_assets());
    // A row per bar; the last one earns nothing.
    let fill = |books: std::ops::Range<usize>, rows: std::ops::Range<usize>, out: &mut [f32]| {
        for (book, out) in books.zip(out.chunks_exact_mut(rows.len() * n)) {
            out.copy_from_slice(&chunk.weights[(book * t + rows.start) * n..(book * t + rows.end) * n]);
        }
        Ok(())
    };
    Portfolio {
        rebalance,
        cost_bps: request.cost_bps,
        // The returns of next_open run between its fills already.
        execution: if request.execution == Execution::NextOpen { Execution::SameClose } else { request.execution },
        periods_per_year: request.periods_per_year,
        assets: true,
        net: request.out.is_some(),
        ..Portfolio::new(returns, chunk.labels.len(), Positions::Streamed(&fill))
    }
    .run(request.device)
}

fn progress(total: Option<u64>, silent: bool) -> ProgressBar {
    if silent || !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let (bar, template) = match total {
        Some(total) => (ProgressBar::new(total), "{bar:40} {human_pos}/{human_len} sets, {eta} left"),
        None => (ProgressBar::new_spinner(), "{spinner} {human_pos} sets, {elapsed}"),
    };
    bar.with_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// Larger is better.
fn rank_score(by: RankBy, s: &PortfolioStats) -> f64 {
    match by {
        RankBy::Sharpe => s.sharpe,
        RankBy::TotalReturn => s.total_return,
        RankBy::MaxDrawdown => -s.max_drawdown,
        RankBy::Turnover => -s.turnover,
    }
}

/// Best first; undefined last.
fn better(a: f64, b: f64) -> Ordering {
    match (a.is_nan(), b.is_nan()) {
        (false, false) => b.total_cmp(&a),
        (x, y) => x.cmp(&y),
    }
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

impl Found<'_> {
    fn add(&mut self, labels: Vec<String>, outcome: &PortfolioOutcome) {
        let (costs, n) = (self.request.cost_bps.len(), self.request.prices.n_assets());
        let by = self.request.rank_by;
        let per_set = outcome.net.len() / labels.len();
        for (s, label) in labels.into_iter().enumerate() {
            let portfolio = outcome.stats[s * costs..(s + 1) * costs].to_vec();
            let mean = |c: usize| {
                let sharpes = outcome.assets[(s * costs + c) * n..][..n].iter().map(|a| a.sharpe).filter(|x| !x.is_nan());
                let (sum, count) = sharpes.fold((0.0, 0), |(sum, count), x| (sum + x, count + 1));
                if count == 0 { f64::NAN } else { sum / f64::from(count) }
            };
            let assets = (0..costs).map(mean).collect();
            self.sets.push(Set { label, portfolio, assets });
            let at = self.sets.len() - 1;
            let score = |i: usize| rank_score(by, &self.sets[i].portfolio[0]);
            if per_set > 0 && self.best.as_ref().is_none_or(|(best, _)| better(score(at), score(*best)) == Ordering::Less) {
                self.best = Some((at, outcome.net[s * per_set..(s + 1) * per_set].to_vec()));
            }
        }
        self.launches += outcome.launches;
        self.submits += outcome.submits;
    }

    /// The best sets at a cost; ties: the first of the file.
    fn ranked(&self, cost: usize) -> Vec<usize> {
        let score = |s: &usize| rank_score(self.request.rank_by, &self.sets[*s].portfolio[cost]);
        let mut order: Vec<usize> = (0..self.sets.len()).collect();
        order.sort_by(|a, b| better(score(a), score(b)).then(a.cmp(b)));
        order.truncate(self.request.top);
        order
    }

    fn rank_name(&self) -> &'static str {
        match self.request.rank_by {
            RankBy::Sharpe => "sharpe",
            RankBy::TotalReturn => "total_return",
            RankBy::MaxDrawdown => "max_drawdown",
            RankBy::Turnover => "turnover",
        }
    }

    fn execution(&self) -> &'static str {
        self.request.execution.name()
    }

    fn provenance(&self) -> Value {
        let Request { prices, device, file, .. } = self.request;
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "command": std::env::args().collect::<Vec<_>>(),
            "device": device.info().to_string(),
            "data": { "sources": prices.sources, "sha256": prices.sha256, "price": prices.price_column, "assets": prices.n_assets(), "bars": prices.n_bars(),
                "first": prices.times.first().map(|t| prices.format_time(*t)), "last": prices.times.last().map(|t| prices.format_time(*t)),
                "dropped": prices.dropped.iter().map(|d| json!({ "symbol": d.symbol, "reason": d.reason })).collect::<Vec<_>>(),
                "filled": prices.filled.iter().map(|(s, n)| json!({ "symbol": s, "cells": n })).collect::<Vec<_>>(), "notes": prices.notes },
            "signals": file.display().to_string(), "cost_bps": self.request.cost_bps, "execution": self.execution(),
            "rebalance": { "band": self.rebalance.band, "every": self.rebalance.every, "to": if self.rebalance.to_edge { "edge" } else { "target" } },
            "rank_by": self.rank_name(), "periods_per_year": self.request.periods_per_year,
        })
    }

    fn text(&self) {
        let Request { prices, device, file, cost_bps, periods_per_year, .. } = self.request;
        let time = |t: Option<&i64>| t.map(|t| prices.format_time(*t)).unwrap_or_default();
        let (n, bars) = (prices.n_assets(), prices.n_bars());
        say(&format!("device   {}", device.info()));
        say(&format!(
            "data     {}: {n} asset{} × {bars} bars, {} to {}",
            prices.sources.join(", "),
            if n == 1 { "" } else { "s" },
            time(prices.times.first()),
            time(prices.times.last())
        ));
        for note in &prices.notes {
            say(&format!("note     {note}"));
        }
        if let Some(first) = prices.dropped.first() {
            say(&format!("dropped  {} assets, such as {}: {}", prices.dropped.len(), first.symbol, first.reason));
        }
        let many = if self.sets.len() == 1 { "" } else { "s" };
        say(&format!("signals  {}: {} set{many} in {:.2} s", file.display(), self.sets.len(), self.seconds));
        let costs = cost_bps.iter().map(f64::to_string).collect::<Vec<_>>().join(", ");
        let Rebalance { band, every, to_edge } = self.rebalance;
        let edge = if to_edge { ", to its edge" } else { "" };
        let when = if every == 1 { "every bar".into() } else { format!("every {every} bars") };
        say(&format!("         {}, {costs} bp one way; portfolios trade {when} outside a band of {band}{edge}", self.execution()));
        if self.absent > 0 {
            say(&format!("note     {} cells of the sets have no row: they hold nothing", self.absent));
        }
        let year = |turnover: f64| turnover / (bars.saturating_sub(1).max(1) as f64) * periods_per_year;
        let width = self.sets.iter().map(|s| s.label.chars().count()).max().unwrap_or(0).clamp(8, 40);
        for (c, bps) in cost_bps.iter().enumerate() {
            say(&format!("\nbest by {} at {bps} bp, one portfolio with shared capital", self.rank_name()));
            let head = ["sharpe", "return", "drawdown", "turnover/yr", "orders", "asset sharpe"];
            say(&format!("{:>width$} {:>8} {:>10} {:>9} {:>11} {:>8} {:>12}", "set", head[0], head[1], head[2], head[3], head[4], head[5]));
            for s in self.ranked(c) {
                let (set, p) = (&self.sets[s], &self.sets[s].portfolio[c]);
                say(&format!(
                    "{:>width$} {:>8} {:>10} {:>9} {:>11.1} {:>8} {:>12}{}",
                    set.label,
                    ratio(p.sharpe),
                    percent(p.total_return),
                    percent(p.max_drawdown),
                    year(p.turnover),
                    p.trades,
                    ratio(set.assets[c]),
                    ruin(p, prices)
                ));
            }
        }
        if let Some(dir) = self.request.out {
            say(&format!("\nwrote    {}", dir.display()));
        }
    }

    fn json(&self) {
        let prices = self.request.prices;
        let set = |c: usize, s: usize| {
            let (set, p) = (&self.sets[s], &self.sets[s].portfolio[c]);
            let ruined = if let Status::Ruined { bar } = p.status { json!(prices.format_time(prices.times[bar + 1])) } else { Value::Null };
            json!({ "set": set.label, "sharpe": number(p.sharpe), "total_return": number(p.total_return), "max_drawdown": number(p.max_drawdown),
                "turnover": number(p.turnover), "trades": p.trades, "ruined": ruined, "asset_sharpe": number(set.assets[c]) })
        };
        let level = |(c, bps): (usize, &f64)| json!({ "cost_bps": bps, "top": self.ranked(c).into_iter().map(|s| set(c, s)).collect::<Vec<_>>() });
        let costs: Vec<Value> = self.request.cost_bps.iter().enumerate().map(level).collect();
        let line = json!({ "run": self.provenance(), "sets": self.sets.len(), "assets": prices.n_assets(), "bars": prices.n_bars(), "absent": self.absent,
            "seconds": self.seconds, "launches": self.launches, "submits": self.submits, "costs": costs });
        say(&line.to_string());
    }
}

/// `  ruined 2009-03-06` behind the row of a portfolio that lost everything.
fn ruin(p: &PortfolioStats, prices: &Prices) -> String {
    match p.status {
        Status::Solvent => String::new(),
        Status::Ruined { bar } => format!("  ruined {}", prices.format_time(prices.times[bar + 1])),
    }
}

// ---- files ------------------------------------------------------------------------------------------------------------

/// Symbol of a portfolio's row.
const PORTFOLIO: &str = "*";

/// Streams a row per cost, set and asset, and one per cost and set for its portfolio, into `results.parquet` and `results.csv`.
struct Rows {
    dir: PathBuf,
    parquet: (Whole, ArrowWriter<File>),
    csv: (Whole, csv::Writer<File>),
    schema: Arc<Schema>,
}

impl Rows {
    fn create(dir: &Path, provenance: &Value, rows: f64) -> Result<Rows> {
        if dir.is_file() {
            return Err(io(dir, &"this is a file; name a folder with --out"));
        }
        std::fs::create_dir_all(dir).map_err(|e| io(dir, &e))?;
        let real = |name: &str, optional: bool| Field::new(name, DataType::Float32, optional);
        let fields = vec![
            real("cost_bps", false),
            Field::new("set", DataType::Utf8, false),
            Field::new("symbol", DataType::Utf8, false),
            real("sharpe", true),
            real("total_return", true),
            real("max_drawdown", true),
            real("turnover", true),
            Field::new("trades", DataType::UInt64, false),
            Field::new("ruined", DataType::Boolean, false),
        ];
        let metadata: std::collections::HashMap<String, String> = [("forback".to_string(), provenance.to_string())].into();
        let schema = Arc::new(Schema::new(fields).with_metadata(metadata));
        let properties = WriterProperties::builder().set_compression(Compression::SNAPPY).build();
        let (whole, file) = Whole::create(dir, "results.parquet", 40.0 * rows)?;
        let parquet = ArrowWriter::try_new(file, schema.clone(), Some(properties)).map_err(|e| io(&whole.path, &e))?;
        let (whole_csv, file) = Whole::create(dir, "results.csv", 100.0 * rows)?;
        let mut csv = csv::Writer::from_writer(file);
        csv.write_record(schema.fields().iter().map(|f| f.name())).map_err(|e| io(&whole_csv.path, &e))?;
        Ok(Rows { dir: dir.to_path_buf(), parquet: (whole, parquet), csv: (whole_csv, csv), schema })
    }

    fn write(&mut self, request: &Request<'_>, labels: &[String], outcome: &PortfolioOutcome) -> Result<()> {
        let (costs, symbols) = (request.cost_bps, &request.prices.symbols);
        let n = symbols.len();
        for (s, label) in labels.iter().enumerate() {
            let slots = || (0..costs.len()).map(|c| s * costs.len() + c);
            let stats: Vec<&PortfolioStats> = slots().flat_map(|i| std::iter::once(&outcome.stats[i]).chain(&outcome.assets[i * n..(i + 1) * n])).collect();
            let names: Vec<&str> = costs.iter().flat_map(|_| std::iter::once(PORTFOLIO).chain(symbols.iter().map(String::as_str))).collect();
            let bps: Vec<f32> = costs.iter().flat_map(|&c| std::iter::repeat_n(c as f32, n + 1)).collect();
            let real = |f: fn(&PortfolioStats) -> f64| -> ArrayRef {
                Arc::new(stats.iter().map(|s| Some(f(s) as f32).filter(|x| !x.is_nan())).collect::<Float32Array>())
            };
            let ruined = |s: &PortfolioStats| s.status != Status::Solvent;
            let columns: Vec<ArrayRef> = vec![
                Arc::new(Float32Array::from(bps.clone())),
                Arc::new(StringArray::from(vec![label.as_str(); names.len()])),
                Arc::new(StringArray::from(names.clone())),
                real(|s| s.sharpe),
                real(|s| s.total_return),
                real(|s| s.max_drawdown),
                real(|s| s.turnover),
                Arc::new(UInt64Array::from(stats.iter().map(|s| s.trades).collect::<Vec<_>>())),
                Arc::new(BooleanArray::from(stats.iter().map(|s| ruined(s)).collect::<Vec<_>>())),
            ];
            let batch = RecordBatch::try_new(self.schema.clone(), columns).map_err(|e| Error::Internal(e.to_string()))?;
            self.parquet.1.write(&batch).map_err(|e| io(&self.parquet.0.path, &e))?;
            for ((stats, name), bps) in stats.iter().zip(names).zip(bps) {
                let text = |x: f64| if x.is_nan() { String::new() } else { (x as f32).to_string() };
                let mut record = vec![bps.to_string(), label.clone(), name.to_owned()];
                record.extend([stats.sharpe, stats.total_return, stats.max_drawdown, stats.turnover].map(text));
                record.extend([stats.trades.to_string(), ruined(stats).to_string()]);
                self.csv.1.write_record(&record).map_err(|e| io(&self.csv.0.path, &e))?;
            }
        }
        Ok(())
    }

    /// Closes the rows, and writes the best portfolio's returns and the provenance.
    fn finish(self, found: &Found<'_>) -> Result<()> {
        let Rows { dir, parquet: (whole, writer), csv: (whole_csv, mut csv), .. } = self;
        writer.close().map_err(|e| io(&whole.path, &e))?;
        csv.flush().map_err(|e| io(&whole_csv.path, &e))?;
        drop(csv);
        let series = portfolio(&dir, found)?;
        let (run, file) = Whole::create(&dir, "run.json", 4096.0)?;
        let mut provenance = found.provenance();
        provenance["seconds"] = json!(found.seconds);
        serde_json::to_writer_pretty(file, &provenance).map_err(|e| io(&run.path, &e))?;
        for whole in [whole, whole_csv, series, run] {
            whole.keep()?;
        }
        Ok(())
    }
}

/// `portfolio.csv`: net returns of the best set's portfolio at each cost, bar by bar.
fn portfolio(dir: &Path, found: &Found<'_>) -> Result<Whole> {
    let (whole, file) = Whole::create(dir, "portfolio.csv", 40.0 * (found.request.prices.n_bars() * found.request.cost_bps.len()) as f64)?;
    let mut csv = csv::Writer::from_writer(file);
    let fail = |e: csv::Error| io(&dir.join("portfolio.csv"), &e);
    let (costs, prices) = (found.request.cost_bps, found.request.prices);
    if let Some((best, net)) = &found.best {
        let label = &found.sets[*best].label;
        csv.write_record(std::iter::once("time".to_string()).chain(costs.iter().map(|c| format!("set_{label}_{c}bps")))).map_err(fail)?;
        let bars = net.len() / costs.len();
        for j in 0..bars {
            let time = prices.format_time(prices.times[j + 1]);
            csv.write_record(std::iter::once(time).chain((0..costs.len()).map(|c| net[c * bars + j].to_string()))).map_err(fail)?;
        }
    }
    csv.flush().map_err(|e| io(&whole.path, &e))?;
    drop(csv);
    Ok(whole)
}
