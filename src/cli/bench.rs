//! `forback bench`: the standard workloads, one JSON object (or one row) each.
//!
//! Ceilings are measured in the same run: a buffer copy for bytes, multiply-adds in registers for flops.
//!
//! Sweeps     timed is the whole op from host arrays to host results: uploads of prices and sets (a few megabytes) and the download of
//!            the statistics are part of it.
//!            S sets × N assets × T bars: a grid whose sets (first parameter fastest) are repeated from the front until there are S;
//!            same_close, 10 bp, first counted return 0; Sharpe ratio, total return, max drawdown, turnover and trades of each.
//!            sweep_walk_forward also chooses a set per window and asset (train 756, test 63, step 21) and replays it.
//! Prices     geometric Brownian motion, drift 3e-4 and volatility 1 % a bar.

mod hedge;
mod hmm;
mod nn;

use super::say;
use crate::kernels::backtest_sweep::{Execution, Strategy, Sweep};
use crate::kernels::ceilings::{copy_rate, multiply_add_rate};
use crate::kernels::philox::{normals, philox4x32};
use crate::sim::grid::Grid;
use crate::{Device, Error, Result};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::process::ExitCode;
use std::time::Instant;

/// Arguments of `forback bench`.
#[derive(clap::Args)]
pub(super) struct Args {
    /// Workloads; all if none is named.
    workloads: Vec<String>,
    /// Threads that the CPU may use.
    #[arg(long)]
    threads: Option<usize>,
    /// Timed runs of each workload.
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// Print time per kernel of one more run.
    #[arg(long)]
    profile: bool,
    #[command(flatten)]
    common: super::Common,
}

/// One standard workload.
trait Workload: Sync {
    fn name(&self) -> &'static str;
    fn shape(&self) -> Vec<usize>;
    fn unit(&self) -> &'static str;
    /// What its row says besides.
    fn says(&self) -> Vec<(&'static str, Value)> {
        Vec::new()
    }
    /// Makes the inputs.
    fn prepare(&self, device: &Device, seed: u64) -> Result<Prepared>;
}

/// A workload with its inputs.
struct Prepared {
    cost: Cost,
    /// Runs it once, with a profile if asked for.
    run: Box<dyn FnMut(bool) -> Result<Run>>,
    /// What preparing measured, for the row.
    says: Vec<(&'static str, Value)>,
}

/// A grid of one strategy.
struct Sweeps {
    name: &'static str,
    /// Sets, assets, bars.
    shape: [usize; 3],
    strategy: Strategy,
    grid: &'static str,
    /// Train, test and step of a walk-forward; none if 0.
    windows: [u32; 3],
}

const fn million(name: &'static str, strategy: Strategy, grid: &'static str) -> Sweeps {
    Sweeps { name, shape: [1_000_000, 1, 2520], strategy, grid, windows: [0; 3] }
}

/// Pair i = (fast 2 + i mod 100, slow 102 + (i / 100) mod 400).
const PAIRS: &str = "fast=2:101,slow=102:501";

static SWEEPS: [Sweeps; 8] = [
    million("sweep_sma", Strategy::SmaCross, PAIRS),
    million("sweep_ema", Strategy::EmaCross, PAIRS),
    million("sweep_rsi", Strategy::RsiReversion, "period=2:30,low=5:45:2,high=55:95:2"),
    million("sweep_bollinger", Strategy::BollingerReversion, "period=5:200,width=0.5:3.5:0.05"),
    million("sweep_macd", Strategy::Macd, "fast=4:30,slow=31:79:2,signal=3:20"),
    million("sweep_donchian", Strategy::DonchianBreakout, "entry=10:250:2,exit=2:100"),
    million("sweep_momentum", Strategy::TsMomentum, "lookback=10:260:2,vol_window=10:120:10,target_vol=0.1|0.15|0.2,max_leverage=1|2|3"),
    Sweeps { name: "sweep_walk_forward", shape: [10_000, 100, 2520], strategy: Strategy::SmaCross, grid: "fast=2:101,slow=102:201", windows: [756, 63, 21] },
];

/// All of them, in the order of their rows.
fn workloads() -> impl Iterator<Item = &'static dyn Workload> {
    SWEEPS.iter().map(|w| w as &dyn Workload).chain(hmm::WORKLOADS).chain(nn::WORKLOADS).chain(hedge::WORKLOADS)
}

/// What a run did.
struct Run {
    profile: Vec<crate::kernels::LaunchTime>,
    /// A result that the timed run must reproduce: no timing of unchecked output.
    check: f64,
}

/// What a workload asks for.
struct Cost {
    work: f64,
    /// What must move at least: prices, the table of indicators out and in once, sets in, statistics out.
    bytes: f64,
    flops: f64,
}

/// Parameter columns, each [S].
type Columns = Vec<(&'static str, Vec<f32>)>;

/// Closes [T,N].
struct Market {
    close: Vec<f32>,
    assets: usize,
}

impl Market {
    fn of(bars: usize, assets: usize, seed: u64) -> Market {
        let mut close = vec![0f32; bars * assets];
        for a in 0..assets {
            let mut log = 100f64.ln();
            for j in 0..bars {
                let words = philox4x32([a as u32, 0, (j / 4) as u32, 1 << 16], [seed as u32, (seed >> 32) as u32]);
                log += 3e-4 + 1e-2 * normals(words)[j % 4];
                close[j * assets + a] = log.exp() as f32;
            }
        }
        Market { close, assets }
    }
}

impl Sweeps {
    /// Set i is set i mod n of the grid.
    fn columns(&self) -> Result<Columns> {
        let sets = Grid::parse(self.strategy.name(), Some(self.grid))?.sets(self.shape[0] as u64)?;
        let tiled = |column: Vec<f32>| column.iter().copied().cycle().take(self.shape[0]).collect();
        Ok(sets.names.into_iter().zip(sets.columns.into_iter().map(tiled)).collect())
    }

    fn walk_forward(&self) -> Vec<[u32; 4]> {
        let ([train, test, step], returns) = (self.windows, self.shape[2] as u32 - 1);
        if train == 0 {
            return Vec::new();
        }
        (0..).map(|k| step * k).map(|s| [s, s + train, s + train, s + train + test]).take_while(|w| w[3] <= returns).collect()
    }

    fn run(&self, device: &Device, market: &Market, columns: &Columns, profile: bool) -> Result<Run> {
        let parameters: Vec<(&str, &[f32])> = columns.iter().map(|(name, values)| (*name, &values[..])).collect();
        let windows = self.walk_forward();
        let sweep = Sweep {
            close: &market.close,
            open: None,
            assets: market.assets,
            strategy: self.strategy,
            parameters: &parameters,
            only: None,
            cost_bps: &[10.0],
            execution: Execution::SameClose,
            start: 0,
            periods_per_year: 252.0,
            windows: &windows,
            stitch_ends: None,
            per_asset: true,
            pooled: false,
            scores: false,
            profile,
        };
        let mut check = 0.0;
        let outcome = sweep.run(device, &mut |chunk| {
            for set in chunk.sets.clone().step_by(997) {
                let s = chunk.stats(set, chunk.assets.start);
                // A set that never traded has no Sharpe ratio.
                check += if s.sharpe.is_nan() { 0.0 } else { s.sharpe } + s.max_drawdown + s.turnover;
            }
            Ok(())
        })?;
        // Without windows there is nothing out of sample.
        check += outcome.per_asset.iter().filter(|s| !s.stitched.is_empty()).flat_map(|s| &s.performance).map(|p| p.sharpe).sum::<f64>();
        if !check.is_finite() {
            return Err(Error::Internal(format!("the bench's results are not finite: {check}")));
        }
        Ok(Run { profile: outcome.profile, check })
    }

    fn cost(&self, columns: &Columns) -> Cost {
        let [sets, assets, bars] = self.shape.map(|n| n as f64);
        let work = sets * assets * (bars - 1.0);
        let bytes = 4.0 * bars * assets * (1.0 + 2.0 * rows(self.strategy, columns) as f64) + sets * (32.0 + 20.0 * assets);
        Cost { work, bytes, flops: 13.0 * work }
    }
}

impl Workload for Sweeps {
    fn name(&self) -> &'static str {
        self.name
    }

    fn shape(&self) -> Vec<usize> {
        self.shape.to_vec()
    }

    fn unit(&self) -> &'static str {
        "pair-bars"
    }

    fn says(&self) -> Vec<(&'static str, Value)> {
        vec![("strategy", self.strategy.name().into()), ("grid", self.grid.into())]
    }

    fn prepare(&self, device: &Device, seed: u64) -> Result<Prepared> {
        let market = Market::of(self.shape[2], self.shape[1], seed);
        let columns = self.columns()?;
        let (cost, device) = (self.cost(&columns), device.clone());
        // The table of workloads lives as long as the program.
        let sweep = SWEEPS.iter().find(|w| w.name == self.name).ok_or_else(|| Error::Internal(format!("{} is in no table", self.name)))?;
        Ok(Prepared { cost, run: Box::new(move |profile| sweep.run(&device, &market, &columns, profile)), says: Vec::new() })
    }
}

/// Rows of the table of indicators that the sets share.
fn rows(strategy: Strategy, columns: &Columns) -> usize {
    let column = |name: &'static str| columns.iter().filter(move |c| c.0 == name).flat_map(|c| c.1.iter().map(|&x| x as u32));
    let distinct = |values: &mut dyn Iterator<Item = u32>| values.collect::<BTreeSet<_>>().len();
    match strategy {
        Strategy::SmaCross | Strategy::EmaCross => distinct(&mut column("fast").chain(column("slow"))),
        Strategy::Macd => column("fast").zip(column("signal")).chain(column("slow").zip(column("signal"))).collect::<BTreeSet<_>>().len(),
        Strategy::RsiReversion | Strategy::BollingerReversion => distinct(&mut column("period")),
        Strategy::DonchianBreakout => 2,
        Strategy::TsMomentum => distinct(&mut column("vol_window")),
    }
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let chosen: Vec<&dyn Workload> =
        if args.workloads.is_empty() { workloads().collect() } else { args.workloads.iter().map(|name| named(name)).collect::<Result<Vec<_>>>()?.concat() };
    if let Some(threads) = args.threads {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
        pool.map_err(|e| Error::Parameter { op: "bench", name: "--threads".into(), value: threads.to_string(), help: e.to_string() })?;
    }
    let device = args.common.open()?;
    let threads = rayon::current_num_threads();
    let ceilings = (copy_rate(&device)?, multiply_add_rate(&device)?);
    if !args.common.json {
        say(&format!("device {}; ceilings: copy {:.1} GB/s, {:.1} G instructions/s", device.info(), ceilings.0 / 1e9, ceilings.1 / 1e9));
    }
    for workload in chosen {
        let mut prepared = workload.prepare(&device, args.common.seed)?;
        let first = (prepared.run)(args.profile)?;
        let mut seconds = Vec::with_capacity(args.runs.max(1));
        for _ in 0..args.runs.max(1) {
            let start = Instant::now();
            let again = (prepared.run)(false)?;
            seconds.push(start.elapsed().as_secs_f64());
            if again.check.to_bits() != first.check.to_bits() {
                return Err(Error::Internal(format!("{}: two runs gave different results", workload.name())));
            }
        }
        seconds.sort_by(f64::total_cmp);
        report(args, &device, workload, &prepared, &first, &seconds, threads, ceilings);
    }
    Ok(ExitCode::SUCCESS)
}

/// The workload of this name, in all of its sizes.
fn named(name: &str) -> Result<Vec<&'static dyn Workload>> {
    let sizes: Vec<_> = workloads().filter(|w| w.name() == name).collect();
    if !sizes.is_empty() {
        return Ok(sizes);
    }
    let mut names: Vec<&str> = workloads().map(|w| w.name()).collect();
    names.dedup();
    let suggestion = crate::data::nearest(name, names.iter().copied());
    Err(Error::Unknown { kind: "workload", given: name.into(), suggestion, known: names.into_iter().map(String::from).collect() })
}

fn report(args: &Args, device: &Device, workload: &dyn Workload, prepared: &Prepared, run: &Run, seconds: &[f64], threads: usize, ceilings: (f64, f64)) {
    let (median, cost, unit) = (seconds[seconds.len() / 2], &prepared.cost, workload.unit());
    let rate = cost.work / median;
    if args.common.json {
        let profile: Vec<Value> =
            run.profile.iter().map(|l| json!({ "kernel": l.kernel, "seconds": if l.seconds.is_nan() { Value::Null } else { json!(l.seconds) }, "bytes": l.bytes, "flops": l.flops })).collect();
        let mut line = json!({ "workload": workload.name() });
        for (name, value) in workload.says() {
            line[name] = value;
        }
        let measured = json!({
            "shape": workload.shape(), "device": device.info().kind.name(), "adapter": device.info().adapter, "driver": device.info().driver, "threads": threads,
            "median_s": median, "min_s": seconds[0], "runs": seconds.len(), "work": cost.work, "unit": unit, "rate": rate, "bytes": cost.bytes,
            "flops": cost.flops, "bytes_share": cost.bytes / median / ceilings.0, "flops_share": cost.flops / median / ceilings.1, "check": run.check,
        });
        if let (Value::Object(line), Value::Object(measured)) = (&mut line, measured) {
            line.extend(measured);
        }
        for (name, value) in &prepared.says {
            line[name] = value.clone();
        }
        if args.profile {
            line["profile"] = Value::Array(profile);
        }
        say(&line.to_string());
    } else {
        say(&format!("{:<20} {:?}: {:.1} ms (min {:.1}), {:.3e} {}/s", workload.name(), workload.shape(), median * 1e3, seconds[0] * 1e3, rate, unit));
        for (name, value) in &prepared.says {
            say(&format!("  {name} {value}"));
        }
        for l in &run.profile {
            say(&format!("  {:<24} {:>10.3} ms {:>10.2} G instructions/s", l.kernel, l.seconds * 1e3, l.flops / l.seconds / 1e9));
        }
    }
}
