//! `forback bench`: the standard workloads, one JSON object (or one row) each.
//!
//! Timed is the whole op from host arrays to host results: uploads of prices and sets (a few megabytes) and the download of the
//! statistics are part of it. Ceilings are measured in the same run: a buffer copy for bytes, multiply-adds in registers for flops.

use super::say;
use crate::kernels::backtest_sweep::{Execution, Strategy, Sweep};
use crate::kernels::ceilings::{copy_rate, multiply_add_rate};
use crate::kernels::philox::{normals, philox4x32};
use crate::{Device, Error, Result};
use serde_json::{Value, json};
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
struct Workload {
    name: &'static str,
    shape: &'static [usize],
    unit: &'static str,
    run: fn(&Device, &Market, bool) -> Result<Run>,
}

/// What a run did.
struct Run {
    work: f64,
    bytes: f64,
    flops: f64,
    profile: Vec<crate::kernels::LaunchTime>,
    /// A result that the timed run must reproduce: no timing of unchecked output.
    check: f64,
}

static WORKLOADS: [Workload; 2] = [
    Workload { name: "sweep_sma", shape: &[1_000_000, 1, 2520], unit: "pair-bars", run: sweep_sma },
    Workload { name: "sweep_walk_forward", shape: &[10_000, 100, 2520], unit: "pair-bars", run: sweep_walk_forward },
];

/// Closes of geometric Brownian motion [T,N], drift 3e-4 and volatility 1 % a bar.
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

fn sweep_of(device: &Device, market: &Market, fast: &[f32], slow: &[f32], windows: &[[u32; 4]], profile: bool) -> Result<Run> {
    let parameters = [("fast", fast), ("slow", slow)];
    let sweep = Sweep {
        close: &market.close,
        open: None,
        assets: market.assets,
        strategy: Strategy::SmaCross,
        parameters: &parameters,
        only: None,
        cost_bps: &[10.0],
        execution: Execution::SameClose,
        start: 0,
        periods_per_year: 252.0,
        windows,
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
            check += s.sharpe + s.max_drawdown + s.turnover;
        }
        Ok(())
    })?;
    // Without windows there is nothing out of sample.
    check += outcome.per_asset.iter().filter(|s| !s.stitched.is_empty()).flat_map(|s| &s.performance).map(|p| p.sharpe).sum::<f64>();
    if !check.is_finite() {
        return Err(Error::Internal(format!("the bench's results are not finite: {check}")));
    }
    let work = fast.len() as f64 * market.assets as f64 * (market.close.len() / market.assets - 1) as f64;
    // What must move at least: prices, the table of indicators out and in once, sets in, statistics out.
    let rows = fast.iter().chain(slow).map(|&x| x as u32).collect::<std::collections::BTreeSet<_>>().len() as f64;
    let bytes = 4.0 * market.close.len() as f64 * (1.0 + 2.0 * rows) + fast.len() as f64 * (32.0 + 20.0 * market.assets as f64);
    Ok(Run { work, bytes, flops: 13.0 * work, profile: outcome.profile, check })
}

fn sweep_sma(device: &Device, market: &Market, profile: bool) -> Result<Run> {
    let (fast, slow) = pairs(1_000_000);
    sweep_of(device, market, &fast, &slow, &[], profile)
}

fn sweep_walk_forward(device: &Device, market: &Market, profile: bool) -> Result<Run> {
    let (fast, slow) = pairs(10_000);
    let windows: Vec<[u32; 4]> = (0..).map(|k| [21 * k, 21 * k + 756, 21 * k + 756, 21 * k + 819]).take_while(|w| w[3] <= 2519).collect();
    sweep_of(device, market, &fast, &slow, &windows, profile)
}

/// Pair i = (fast 2 + i mod 100, slow 102 + (i / 100) mod 400).
fn pairs(n: usize) -> (Vec<f32>, Vec<f32>) {
    (0..n).map(|i| ((2 + i % 100) as f32, (102 + (i / 100) % 400) as f32)).unzip()
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let chosen: Vec<&Workload> =
        if args.workloads.is_empty() { WORKLOADS.iter().collect() } else { args.workloads.iter().map(|name| named(name)).collect::<Result<_>>()? };
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
        let market = Market::of(workload.shape[2], workload.shape[1], args.common.seed);
        let first = (workload.run)(&device, &market, args.profile)?;
        let mut seconds = Vec::with_capacity(args.runs.max(1));
        for _ in 0..args.runs.max(1) {
            let start = Instant::now();
            let again = (workload.run)(&device, &market, false)?;
            seconds.push(start.elapsed().as_secs_f64());
            if again.check.to_bits() != first.check.to_bits() {
                return Err(Error::Internal(format!("{}: two runs gave different results", workload.name)));
            }
        }
        seconds.sort_by(f64::total_cmp);
        let median = seconds[seconds.len() / 2];
        report(args, &device, workload, &first, &seconds, median, threads, ceilings);
    }
    Ok(ExitCode::SUCCESS)
}

fn named(name: &str) -> Result<&'static Workload> {
    let names = || WORKLOADS.iter().map(|w| w.name);
    WORKLOADS.iter().find(|w| w.name == name).ok_or_else(|| Error::Unknown {
        kind: "workload",
        given: name.into(),
        suggestion: crate::data::nearest(name, names()),
        known: names().map(String::from).collect(),
    })
}

fn report(args: &Args, device: &Device, workload: &Workload, run: &Run, seconds: &[f64], median: f64, threads: usize, ceilings: (f64, f64)) {
    let rate = run.work / median;
    if args.common.json {
        let profile: Vec<Value> =
            run.profile.iter().map(|l| json!({ "kernel": l.kernel, "seconds": if l.seconds.is_nan() { Value::Null } else { json!(l.seconds) }, "bytes": l.bytes, "flops": l.flops })).collect();
        let mut line = json!({
            "workload": workload.name, "shape": workload.shape, "device": device.info().kind.name(), "adapter": device.info().adapter,
            "driver": device.info().driver, "threads": threads, "median_s": median, "min_s": seconds[0], "runs": seconds.len(), "work": run.work,
            "unit": workload.unit, "rate": rate, "bytes": run.bytes, "flops": run.flops, "bytes_share": run.bytes / median / ceilings.0,
            "flops_share": run.flops / median / ceilings.1, "check": run.check,
        });
        if args.profile {
            line["profile"] = Value::Array(profile);
        }
        say(&line.to_string());
    } else {
        say(&format!("{:<20} {:?}: {:.1} ms (min {:.1}), {:.3e} {}/s", workload.name, workload.shape, median * 1e3, seconds[0] * 1e3, rate, workload.unit));
        for l in &run.profile {
            say(&format!("  {:<24} {:>10.3} ms {:>10.2} G instructions/s", l.kernel, l.seconds * 1e3, l.flops / l.seconds / 1e9));
        }
    }
}
