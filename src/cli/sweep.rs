//! `forback sweep`: a grid of strategies, walk-forward, over a price file.
//!
//! options → [`Prepared`] (device, prices, config) → a run in one go, or in parts (`plan.rs` cuts, `store.rs` keeps) → report → files
//! (`results.rs`) → what is printed (`print.rs`). `merge.rs` enters at the report with the parts of several shards.

use super::plan::{Cutter, Estimate, Progress};
use super::price_files::PriceFiles;
use super::print::{Printed, json_of_set};
use super::results::{Rows, Subject};
use super::store::{Job, Store, difference, hex, sha256};
use super::{Common, catch_interrupts, is_interrupted, regime_filter, replay, results, say, signals};
use crate::data::Prices;
use crate::kernels::backtest_sweep::{Execution, Strategy};
use crate::kernels::multiple_testing::expected_max_sharpe;
use crate::kernels::portfolio_sweep::Scheme;
use crate::kernels::{Device, DeviceKind};
use crate::report;
use crate::sim::grid::Grid;
use crate::sim::luck::{Evidence, Luck, LuckConfig, TrialRatios, luck};
use crate::sim::parts::{Fold, shard};
use crate::sim::sweep::{MOST_SETS, Random, RankBy, Select, SweepConfig, SweepReport, SweepRun};
use crate::sim::walk_forward::WalkForward;
use crate::{Error, Result};
use ndarray::ArrayView2;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

/// Arguments of `forback sweep`.
#[derive(clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    pub(super) prices: PriceFiles,
    /// sma_cross, ema_cross, macd, rsi_reversion, bollinger_reversion, donchian_breakout or ts_momentum.
    #[arg(long, default_value = "sma_cross")]
    strategy: String,
    /// Grid, such as fast=2:100:2,slow=20:400:10 (ranges a:b:step, lists 5|10|20, log ranges a:b:log20, constraints slow>=3*fast).
    #[arg(long)]
    grid: Option<String>,
    /// One-way costs in basis points of traded notional, comma-separated; sets are ranked at the first.
    #[arg(long, default_value = "10", value_delimiter = ',', allow_negative_numbers = true)]
    cost_bps: Vec<f64>,
    /// same_close (earns the next bar; optimistic), next_open (traded at the next open) or next_close (traded one close later).
    #[arg(long, default_value = "next_close")]
    pub(super) execution: String,
    /// Walk-forward scheme, such as train=756,test=63,step=21,anchored,purge=5; `none` for in-sample only.
    #[arg(long)]
    walk_forward: Option<String>,
    /// Choose per window: per_asset, pooled (one set for all assets) or both.
    #[arg(long, default_value = "per_asset")]
    select: String,
    /// How many sets to print.
    #[arg(long, default_value_t = 10)]
    pub(super) top: usize,
    /// sharpe, total_return, max_drawdown or turnover.
    #[arg(long, default_value = "sharpe")]
    pub(super) rank_by: String,
    /// Write report.html, results.parquet, results.csv, walk_forward.csv, out_of_sample.csv, run.json and config.toml into this folder.
    #[arg(long, value_name = "DIR")]
    pub(super) out: Option<PathBuf>,
    /// Run this many sets of the grid, drawn at random by --seed, instead of all. They keep their numbers in the grid; above 50,000,000
    /// combinations those count illegal ones too.
    #[arg(long, value_name = "N")]
    random: Option<u64>,
    /// Run share I of N of the sets into --out; `forback merge` puts the shares together. All on the same kind of device.
    #[arg(long, value_name = "I/N", requires = "out")]
    shard: Option<String>,
    /// Go on with the interrupted sweep in --out; starts from the beginning if there is none.
    #[arg(long, requires = "out")]
    resume: bool,
    /// Sets of a part that is computed and kept at once (default: about 15 seconds of work).
    #[arg(long, value_name = "SETS")]
    part_sets: Option<usize>,
    /// Print parts, time, memory and disk that the sweep would take, and stop.
    #[arg(long, visible_alias = "dry-run")]
    plan: bool,
    /// Replay these sets, by number: every trade and the equity bar by bar.
    #[arg(long, value_name = "SET", value_delimiter = ',')]
    pub(super) replay: Vec<u64>,
    /// Read options from a TOML file; the command line wins.
    #[arg(long, value_name = "FILE")]
    pub(super) config: Option<PathBuf>,
    /// Also pool what the walk-forward chose into portfolios with shared capital and drifting weights: equal, inverse_vol or inverse_vol:WINDOW,
    /// traded as --rebalance-band, --rebalance-every and --rebalance-to say.
    #[arg(long, value_name = "SHARES", value_delimiter = ',', conflicts_with = "file")]
    portfolio: Vec<String>,
    #[command(flatten)]
    signals: signals::SignalArgs,
    #[command(flatten)]
    regimes: regime_filter::RegimeArgs,
    #[command(flatten)]
    pub(super) common: Common,
}

/// Everything that a sweep is made of, read and checked.
pub(super) struct Prepared {
    pub(super) device: Device,
    pub(super) prices: Prices,
    pub(super) config: SweepConfig,
    pub(super) regimes: Option<regime_filter::Regimes>,
    provenance: Value,
}

impl Prepared {
    pub(super) fn of(args: &Args) -> Result<Prepared> {
        let strategy = strategy(&args.strategy)?;
        let grid = Grid::parse(strategy.name(), args.grid.as_deref())?;
        let execution = execution(&args.execution)?;
        let rank_by = RankBy::named(&args.rank_by)?;
        let select = select(&args.select)?;
        let scheme = walk_forward(args.walk_forward.as_deref())?;
        if args.part_sets == Some(0) {
            return Err(Error::Parameter { op: "sweep", name: "--part-sets".into(), value: "0".into(), help: "give at least one set".into() });
        }
        let portfolios = args.portfolio.iter().map(|text| portfolio(text)).collect::<Result<Vec<_>>>()?;
        let rebalance = args.signals.rebalance_of(portfolios.len())?;
        let (device, prices, periods_per_year) = open(args)?;
        refuse_absurd(&grid, &device, &prices, args)?;
        let regimes = args.regimes.gates(&device, &prices, args.common.seed, periods_per_year)?;
        let random = args.random.map(|sets| Random { sets, seed: args.common.seed });
        let config = SweepConfig {
            cost_bps: args.cost_bps.clone(),
            execution,
            regimes: regimes.as_ref().map(|regimes| regimes.gates.clone()),
            select,
            rank_by,
            periods_per_year,
            portfolios,
            rebalance,
            random,
            limit: MOST_SETS,
            ..SweepConfig::new(grid)
        };
        let walk_forward = fitting(scheme, &config, &prices, args)?;
        let config = SweepConfig { walk_forward, ..config };
        let mut provenance = provenance(args, &device, &prices, &config);
        provenance["regime_filter"] = regimes.as_ref().map_or(Value::Null, regime_filter::Regimes::json);
        Ok(Prepared { device, prices, config, regimes, provenance })
    }

    pub(super) fn run(&self) -> Result<SweepRun<'_>> {
        let run = SweepRun::new(&self.device, self.prices.close.view(), &self.config)?;
        Ok(match opens(&self.prices, self.config.execution)? {
            Some(open) => run.with_open(open),
            None => run,
        })
    }

    pub(super) fn subject<'a>(&'a self, run: &'a SweepRun<'a>) -> Subject<'a> {
        Subject { run, prices: &self.prices, provenance: &self.provenance }
    }

    pub(super) fn provenance_with_command(&self) -> Value {
        let mut provenance = self.provenance.clone();
        provenance["command"] = json!(std::env::args().collect::<Vec<_>>());
        provenance
    }

    /// Everything that decides the results, bit for bit.
    pub(super) fn identity(&self) -> Value {
        let (prices, p) = (&self.prices, &self.provenance);
        let mut panel = Sha256::new();
        for symbol in &prices.symbols {
            panel.update(symbol.as_bytes());
            panel.update([0]);
        }
        prices.times.iter().for_each(|t| panel.update(t.to_le_bytes()));
        prices.close.iter().for_each(|x| panel.update(x.to_le_bytes()));
        let data = if prices.sha256.is_empty() { prices.sources.join(", ") } else { prices.sha256.clone() };
        json!({
            "version": env!("CARGO_PKG_VERSION"), "device": self.device.info().kind.name(), "data": data, "assets": prices.n_assets(),
            "bars": prices.n_bars(), "panel": hex(panel.finalize().as_slice()), "strategy": p["strategy"], "grid": p["grid"], "random": p["random"],
            "cost_bps": p["cost_bps"], "execution": p["execution"], "walk_forward": p["walk_forward"], "select": p["select"], "portfolio": p["portfolio"],
            "periods_per_year": p["periods_per_year"], "regime_filter": p["regime_filter"],
        })
    }
}

/// Runs the command; `config` is what it was asked for, as TOML.
pub(super) fn run(args: &Args, config: &str) -> Result<ExitCode> {
    if let Some(file) = &args.signals.file {
        return given(args, file);
    }
    let prepared = Prepared::of(args)?;
    let run = prepared.run()?;
    let config = &config.replace("device = \"auto\"", &format!("device = \"{}\"", prepared.device.info().kind.name()));
    if let Some(dir) = &args.out {
        results::folder(dir)?;
    }
    if !args.replay.is_empty() {
        return replay::run(args, &prepared, &run);
    }
    let (share, sets) = share(args, &run)?;
    let mut cutter = Cutter::of(&run, &prepared.device, args.part_sets, args.out.is_some());
    if args.plan {
        return print_plan(args, &prepared, &run, &sets, &mut cutter);
    }
    catch_interrupts()?;
    let progress = Progress::new(&run, args.common.json);
    let start = Instant::now();
    let place = args.out.as_deref().map(|dir| share.map_or_else(|| dir.join("parts"), |(i, n)| dir.join(format!("shard-{i}-of-{n}"))));
    let found = place.as_deref().filter(|place| Store::is_in(place));
    if found.is_none() && share.is_none() && cutter.is_one_part(sets.len()) {
        progress.total(sets.len());
        let kept = run.whole(args.out.is_some(), &mut |chunk| progress.visit(chunk));
        let (report, rows) = match kept {
            Err(Error::Interrupted { .. }) => return Err(interrupted(args, &prepared, &run, &Fold::new(run.len(), 0), None)),
            other => other?,
        };
        let done = Done { args, prepared: &prepared, run: &run, report: &report, seconds: start.elapsed().as_secs_f64(), config };
        progress.clear();
        return done.deliver(args.out.as_deref(), &Rows::Kept(rows.as_ref().and_then(|rows| rows.as_slice()).unwrap_or_default()));
    }
    let mut fold = Fold::new(run.len(), prepared.config.cost_bps.len());
    let mut before = 0.0;
    let mut store = match (&place, found) {
        (_, Some(found)) => {
            let (store, seconds) = reopen(args, &prepared, found, &mut fold)?;
            before = seconds;
            Some(store)
        }
        (Some(place), None) => {
            let identity = prepared.identity();
            let hash = sha256(identity.to_string().as_bytes());
            let job = Job { partial: true, shard: share, sets: sets.clone(), of: run.len(), identity, hash, config: config.into() };
            Some(Store::create(place.clone(), job)?)
        }
        (None, None) => None,
    };
    progress.total(fold.missing(sets.clone()).iter().map(Range::len).sum());
    match run_parts(args, &prepared, &run, &sets, &mut cutter, &mut fold, store.as_mut(), &progress) {
        Err(Error::Interrupted { .. }) => {
            progress.clear();
            return Err(interrupted(args, &prepared, &run, &fold, place.as_deref()));
        }
        other => other?,
    }
    if let (Some(share), Some(mut store)) = (share, store.take_if(|_| share.is_some())) {
        store.complete()?;
        progress.clear();
        say_shard(args, &prepared, &run, &fold, share, &store);
        return Ok(ExitCode::SUCCESS);
    }
    let report = run.finish(fold, &mut |chunk| progress.visit(chunk)).map_err(|error| match (error, &place) {
        (Error::Interrupted { .. }, Some(place)) => {
            Error::Interrupted { message: format!("all sets are kept in {}; the same command with --resume finishes", place.display()) }
        }
        (error, _) => error,
    });
    progress.clear();
    let report = report?;
    let done = Done { args, prepared: &prepared, run: &run, report: &report, seconds: before + start.elapsed().as_secs_f64(), config };
    let stores: Vec<Store> = store.into_iter().collect();
    let code = done.deliver(args.out.as_deref(), &Rows::Stored(&stores))?;
    stores.into_iter().try_for_each(Store::remove)?;
    Ok(code)
}

/// Which shard, and its sets.
type Share = (Option<(usize, usize)>, Range<usize>);

/// The sets of this run: all, or the shard that was asked for.
fn share(args: &Args, run: &SweepRun<'_>) -> Result<Share> {
    let Some(text) = &args.shard else { return Ok((None, 0..run.len())) };
    let (i, n) = text.split_once('/').and_then(|(i, n)| Some((i.trim().parse().ok()?, n.trim().parse().ok()?))).unwrap_or((0, 0));
    let refused = |_| {
        let help = format!("write i/n with 1 ≤ i ≤ n ≤ {} (the sets), such as 1/3", run.len());
        Error::Parameter { op: "sweep", name: "--shard".into(), value: text.clone(), help }
    };
    Ok((Some((i, n)), shard(run.len(), i, n).map_err(refused)?))
}

/// The parts that an interrupted run of the same sweep left, and the seconds that they took.
fn reopen(args: &Args, prepared: &Prepared, place: &Path, fold: &mut Fold) -> Result<(Store, f64)> {
    let refused = |name: &str, help: String| Error::Parameter { op: "sweep", name: name.into(), value: place.display().to_string(), help };
    let mut store = Store::open(place.to_path_buf())?;
    if !args.resume {
        let state = if store.job().partial { "an interrupted sweep" } else { "a finished shard" };
        return Err(refused("--out", format!("the folder holds {state}; go on with --resume, or remove it to start again")));
    }
    if let Some((field, theirs, ours)) = difference(&store.job().identity, &prepared.identity()) {
        return Err(refused("--resume", format!("the interrupted sweep has {field} {theirs}, this one {ours}; repeat its options, or name another --out")));
    }
    let mut seconds = 0.0;
    for sets in store.parts().to_vec() {
        match store.load(&sets, prepared.prices.n_assets(), prepared.config.cost_bps.len()) {
            Ok((part, took)) => {
                fold.add(&part)?;
                seconds += took;
            }
            Err(error) => {
                eprintln!("note: {error}; sets {} to {} run again", sets.start, sets.end - 1);
                store.discard(&sets);
            }
        }
    }
    Ok((store, seconds))
}

/// Runs what is missing of `sets`, part by part.
fn run_parts(
    args: &Args,
    prepared: &Prepared,
    run: &SweepRun<'_>,
    sets: &Range<usize>,
    cutter: &mut Cutter,
    fold: &mut Fold,
    mut store: Option<&mut Store>,
    progress: &Progress,
) -> Result<()> {
    let mut said = false;
    for gap in fold.missing(sets.clone()) {
        let mut next = gap.start;
        while next < gap.end {
            let start = Instant::now();
            if is_interrupted() {
                return Err(Error::Interrupted { message: "stopped".into() });
            }
            let mut part = run.part(cutter.next(next, gap.end), store.is_some(), &mut |chunk| progress.visit(chunk))?;
            let seconds = start.elapsed().as_secs_f64();
            cutter.observe(part.sets.len(), seconds);
            if let Some(store) = store.as_deref_mut() {
                store.save(&part, seconds, prepared.subject(run))?;
            }
            part.rows = None;
            fold.add(&part)?;
            next = part.sets.end;
            let left: usize = fold.missing(sets.clone()).iter().map(Range::len).sum();
            if !said && cutter.is_long(left) {
                progress.note(&format!("plan: {}", Estimate::of(run, prepared, left, cutter, args.out.as_deref())));
            }
            said = true;
        }
    }
    Ok(())
}

/// Measures a few sets and says what the sweep would take.
fn print_plan(args: &Args, prepared: &Prepared, run: &SweepRun<'_>, sets: &Range<usize>, cutter: &mut Cutter) -> Result<ExitCode> {
    let probe = cutter.probe(sets);
    let start = Instant::now();
    run.part(probe.clone(), false, &mut |_| Ok(()))?;
    cutter.observe(probe.len(), start.elapsed().as_secs_f64());
    let estimate = Estimate::of(run, prepared, sets.len(), cutter, args.out.as_deref());
    if args.common.json {
        say(&json!({ "plan": estimate.json() }).to_string());
    } else {
        say(&format!("plan     {estimate}"));
    }
    Ok(ExitCode::SUCCESS)
}

/// The best of the sets that are there, for a run that is not whole.
fn partial(args: &Args, prepared: &Prepared, run: &SweepRun<'_>, fold: &Fold) -> Value {
    let costs = &prepared.config.cost_bps;
    let level = |(c, cost): (usize, &f64)| {
        let best = fold.ranked(c, run.assets(), prepared.config.rank_by, args.top);
        let top: Vec<Value> = best.into_iter().map(|(set, mean)| json_of_set(run.id(set), run.set(set), &mean)).collect();
        json!({ "cost_bps": cost, "top": top })
    };
    let levels: Vec<Value> = costs.iter().enumerate().map(level).collect();
    let finished: Vec<[usize; 2]> = fold.done().iter().map(|sets| [sets.start, sets.end]).collect();
    json!({ "run": prepared.provenance_with_command(), "partial": true, "sets": run.len(), "finished": finished, "costs": levels })
}

/// Says what an interrupted run leaves, and how to go on.
fn interrupted(args: &Args, prepared: &Prepared, run: &SweepRun<'_>, fold: &Fold, place: Option<&Path>) -> Error {
    let finished: usize = fold.done().iter().map(Range::len).sum();
    if args.common.json {
        let mut line = partial(args, prepared, run, fold);
        line["resume"] = json!(place.is_some());
        say(&line.to_string());
    }
    let message = match place {
        Some(place) => format!("{finished} of {} sets are kept in {}; the same command with --resume goes on", run.len(), place.display()),
        None if args.out.is_some() => "the sweep was to run in one part and nothing of it is kept; --part-sets cuts it".to_string(),
        None => format!("{finished} of {} sets were finished; with --out DIR they would be kept, and --resume would go on", run.len()),
    };
    Error::Interrupted { message }
}

fn say_shard(args: &Args, prepared: &Prepared, run: &SweepRun<'_>, fold: &Fold, (i, n): (usize, usize), store: &Store) {
    if args.common.json {
        let mut line = partial(args, prepared, run, fold);
        line["shard"] = json!([i, n]);
        line["folder"] = json!(store.dir().display().to_string());
        say(&line.to_string());
        return;
    }
    let sets = &store.job().sets;
    say(&format!("device   {}", prepared.device.info()));
    say(&format!("shard    {i} of {n}: sets {} to {} of {} in {}", sets.start, sets.end.saturating_sub(1), run.len(), store.dir().display()));
    say("         forback merge DIR… --out OUT puts the shards together");
}

/// A finished sweep on its way out.
pub(super) struct Done<'a> {
    pub(super) args: &'a Args,
    pub(super) prepared: &'a Prepared,
    pub(super) run: &'a SweepRun<'a>,
    pub(super) report: &'a SweepReport,
    pub(super) seconds: f64,
    pub(super) config: &'a str,
}

impl Done<'_> {
    /// Files first, then what is printed.
    pub(super) fn deliver(&self, dir: Option<&Path>, rows: &Rows<'_>) -> Result<ExitCode> {
        let luck = self.luck()?;
        if let Some(dir) = dir {
            let mut run = self.prepared.provenance_with_command();
            run["seconds"] = json!(self.seconds);
            results::write(dir, self.prepared.subject(self.run), rows, self.report, &run, self.config)?;
            self.write_report(dir, &run, luck.as_ref())?;
        }
        let printed = Printed { args: self.args, prepared: self.prepared, report: self.report, luck: luck.as_ref(), seconds: self.seconds };
        if self.args.common.json {
            printed.json()
        } else {
            printed.text()
        }
        Ok(ExitCode::SUCCESS)
    }

    /// What luck explains of the best set at the first cost: equal-weight portfolios over the counted bars.
    fn luck(&self) -> Result<Option<Luck>> {
        let (report, run) = (self.report, self.run);
        let (start, bars) = (report.start as usize, report.bars.saturating_sub(1));
        let Some(&best) = report.ranked(0, RankBy::Sharpe, 1).first().filter(|_| bars >= start + LEAST_JUDGED) else { return Ok(None) };
        let ratios = (0..report.sets.len()).map(|set| report.set(0, set).sharpe).collect();
        let info = self.prepared.device.info();
        let budget = if info.software || info.kind == DeviceKind::Reference { SAMPLE_BARS / 20 } else { SAMPLE_BARS };
        let room = budget / (report.assets * bars).max(1);
        let sets = report.sets.len().min(room.min(MOST_SAMPLED));
        let positions: Vec<usize> = (0..sets).map(|i| i * report.sets.len() / sets).collect();
        let selected = run.portfolios(0, &[best])?;
        let sample = if sets >= 2 { run.portfolios(0, &positions)? } else { Vec::new() };
        let chosen = report.costs.first().and_then(|level| level.per_asset.as_ref().or(level.pooled.as_ref()));
        let stitched = chosen.map_or(&[][..], |chosen| &chosen.returns);
        let evidence = Evidence { ratios, selected: &selected, stitched, sample: &sample, periods_per_year: self.prepared.config.periods_per_year };
        let config = LuckConfig { seed: self.args.common.seed, ..LuckConfig::default() };
        luck(&self.prepared.device, &evidence, &config).map(Some)
    }

    /// `report.html`, beside the results.
    fn write_report(&self, dir: &Path, provenance: &Value, luck: Option<&Luck>) -> Result<()> {
        let Prepared { device, prices, config, .. } = self.prepared;
        let ratios: TrialRatios = (0..self.report.sets.len()).map(|set| self.report.set(0, set).sharpe).collect();
        let summary = luck.map(|l| report::Luck {
            best_sharpe: l.best,
            // In the units of the page's distribution: means over assets.
            expected_max_sharpe: expected_max_sharpe(l.trials, ratios.deviation()),
            trials: l.trials as f64,
            probabilistic_sharpe: l.probabilistic,
            deflated_sharpe: l.deflated,
            pbo: l.overfitting.as_ref().map_or(f64::NAN, |o| o.pbo),
            in_sample: [l.in_sample.lower, l.in_sample.upper],
            out_of_sample: l.out_of_sample.map_or([f64::NAN; 2], |i| [i.lower, i.upper]),
            level: l.level,
            years: l.years,
            minimum_years: l.minimum_years_deflated,
        });
        let verdict = luck.map(Luck::verdict).unwrap_or_default();
        let inputs = report::Inputs { device, prices, config, report: self.report, provenance, verdict, luck: summary };
        report::write(&dir.join("report.html"), &report::ReportData::from_sweep(&inputs)?)
    }
}

/// Fewest bars that luck is judged on.
const LEAST_JUDGED: usize = 20;
/// Most sets of the sample that overfitting is measured on, and most of its set-bars.
const MOST_SAMPLED: usize = 500;
const SAMPLE_BARS: usize = 50_000_000;

/// The device, the prices and their periods per year.
fn open(args: &Args) -> Result<(Device, Prices, f64)> {
    args.prices.columns.check("sweep")?;
    let device = args.common.open()?;
    let prices = args.prices.read("sweep", false, args.common.seed)?;
    let periods_per_year = args.prices.columns.periods_per_year(&prices)?;
    Ok((device, prices, periods_per_year))
}

/// Opens [T,N], if they are traded at.
pub(super) fn opens(prices: &Prices, execution: Execution) -> Result<Option<ArrayView2<'_, f32>>> {
    match (execution, &prices.open) {
        (Execution::NextOpen, Some(open)) => Ok(Some(open.view())),
        (Execution::NextOpen, None) => {
            let why = prices.notes.iter().find(|note| note.starts_with("opens")).map_or("the price file has no open column", String::as_str);
            let help = format!("{why}; use --execution next_close, or a file with opens for every asset and bar");
            Err(Error::Parameter { op: "sweep", name: "--execution".into(), value: "next_open".into(), help })
        }
        _ => Ok(None),
    }
}

/// Given weights instead of a strategy.
fn given(args: &Args, file: &Path) -> Result<ExitCode> {
    let (execution, rank_by) = (execution(&args.execution)?, RankBy::named(&args.rank_by)?);
    let (device, prices, periods_per_year) = open(args)?;
    signals::run(&signals::Request {
        args: &args.signals,
        file,
        device: &device,
        prices: &prices,
        some_symbols: args.prices.columns.symbols.is_some(),
        cost_bps: &args.cost_bps,
        execution,
        periods_per_year,
        rank_by,
        top: args.top,
        out: args.out.as_deref(),
        common: &args.common,
    })
}

/// `equal`, `inverse_vol` or `inverse_vol:WINDOW`.
fn portfolio(text: &str) -> Result<Scheme> {
    let window = match text.split_once(':') {
        None if text == "equal" => return Ok(Scheme::Equal),
        None if text == "inverse_vol" => Some(63),
        Some(("inverse_vol", window)) => window.parse().ok().filter(|&n| n >= 2),
        _ => return Err(unknown("portfolio", text, ["equal", "inverse_vol"])),
    };
    let bad =
        || Error::Parameter { op: "sweep", name: "--portfolio".into(), value: text.into(), help: "give a window of 2 bars or more: inverse_vol:63".into() };
    Ok(Scheme::InverseVolatility { window: window.ok_or_else(bad)? })
}

fn strategy(name: &str) -> Result<Strategy> {
    Strategy::named(name).map_err(|_| unknown("strategy", name, Strategy::ALL.map(Strategy::name)))
}

/// An unknown name among few.
pub(super) fn unknown<const K: usize>(kind: &'static str, name: &str, known: [&str; K]) -> Error {
    Error::Unknown { kind, given: name.into(), suggestion: crate::data::nearest(name, known), known: known.map(String::from).to_vec() }
}

fn execution(name: &str) -> Result<Execution> {
    Execution::named(name).map_err(|_| unknown("execution", name, ["same_close", "next_open", "next_close"]))
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
fn fitting((scheme, asked): (Option<WalkForward>, bool), config: &SweepConfig, prices: &Prices, args: &Args) -> Result<Option<WalkForward>> {
    let (first, returns) = (config.first_return(prices.n_bars())?, prices.n_bars().saturating_sub(1) as u32);
    match scheme {
        Some(scheme) => match scheme.windows(first, returns) {
            Ok(_) => Ok(Some(scheme)),
            Err(error) if asked => Err(error),
            Err(_) => {
                if !args.common.json {
                    eprintln!(
                        "note: {} bars are too few for the default walk-forward ({scheme}) after a warm-up of {} bars; swept in sample only (set --walk-forward)",
                        prices.n_bars(),
                        first
                    );
                }
                Ok(None)
            }
        },
        None => Ok(None),
    }
}

/// Set-bars a second that a first guess may count on.
pub(super) fn guess(device: &Device) -> f64 {
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
fn refuse_absurd(grid: &Grid, device: &Device, prices: &Prices, args: &Args) -> Result<()> {
    let costs = args.cost_bps.len();
    let all = if grid.is_counted() { grid.len() as f64 } else { grid.raw_len() as f64 };
    let sets = args.random.map_or(all, |n| n as f64);
    if sets <= MOST_SETS as f64 {
        return Ok(());
    }
    let seconds = sets * prices.n_assets() as f64 * prices.n_bars() as f64 * costs as f64 / guess(device);
    let bytes = sets * (100.0 + 20.0 * costs as f64);
    let what = format!("a grid of {sets:.3e} sets (about {} on {} and {} of memory)", duration(seconds), device.info().kind.name(), size(bytes));
    let help = "widen the steps, use lists or log ranges (fast=2:200:log20), or draw sets with --random".into();
    Err(Error::TooLarge { what, needed: sets.min(u64::MAX as f64) as u64, limit: MOST_SETS, unit: "sets", help })
}

pub(super) fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 120.0 => format!("{s:.0} seconds"),
        s if s < 7200.0 => format!("{:.0} minutes", s / 60.0),
        s if s < 172_800.0 => format!("{:.0} hours", s / 3600.0),
        s if s < 6.3e7 => format!("{:.0} days", s / 86_400.0),
        s => format!("{:.3e} years", s / 31_557_600.0),
    }
}

pub(super) fn size(bytes: f64) -> String {
    let units = ["B", "kB", "MB", "GB", "TB", "PB", "EB"];
    let power = ((bytes.max(1.0).log10() / 3.0).floor() as usize).min(units.len() - 1);
    format!("{:.0} {}", bytes / 1e3f64.powi(power as i32), units[power])
}

fn provenance(args: &Args, device: &Device, prices: &Prices, config: &SweepConfig) -> Value {
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "device": device.info().to_string(),
        "seed": args.common.seed,
        "data": { "sources": prices.sources, "sha256": prices.sha256, "price": prices.price_column, "assets": prices.n_assets(), "bars": prices.n_bars(),
            "first": prices.times.first().map(|t| prices.format_time(*t)), "last": prices.times.last().map(|t| prices.format_time(*t)),
            "dropped": prices.dropped.iter().map(|d| json!({ "symbol": d.symbol, "reason": d.reason })).collect::<Vec<_>>(),
            "filled": prices.filled.iter().map(|(s, n)| json!({ "symbol": s, "cells": n })).collect::<Vec<_>>(), "notes": prices.notes },
        "strategy": config.grid.strategy().name, "grid": config.grid.to_string(), "random": config.random.map(|r| json!({ "sets": r.sets, "seed": r.seed })), "sets": config.random.map_or(config.grid.len(), |r| r.sets) * config.regimes.as_ref().map_or(1, |gates| gates.thresholds().len() as u64),
        "cost_bps": config.cost_bps,
        "execution": args.execution, "walk_forward": config.walk_forward.map(|w| w.to_string()), "select": args.select,
        "portfolio": args.portfolio.iter().map(|shares| json!({ "shares": shares, "rebalance": args.signals.text() })).collect::<Vec<_>>(),
        "rank_by": args.rank_by, "periods_per_year": config.periods_per_year,
    })
}
