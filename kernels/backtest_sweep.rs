//! The op behind `forback sweep`: a grid of strategies back-tested walk-forward, chunk by chunk, in as few passes as fit.
//!
//! prices → exact prefix sums → indicator keys (once for all sets that share them) → simulation with statistics → selection per window →
//! replay of the chosen sets → performance of the stitched out-of-sample series. All of it is recorded into one [`Pass`] where the
//! results fit one download; larger sweeps submit several, with the same bits.
//!
//! Strategies and their parameters: `strategies.rs`.

use crate::backtest::{BACKTEST_STITCH, BACKTEST_SWEEP, BAND, BacktestParams, SCALE_BIAS, SET_WORDS, STATS, TILE};
use crate::backtest_tiles::{
    BACKTEST_BAND, BACKTEST_BAND_STATES, BACKTEST_CROSS, BACKTEST_JOIN, BACKTEST_SIZED, Detail, KEYS_BY_ROW, Lattice, PARTS, Sides, TilesParams, WORDS, cuts,
};
use crate::conformance::{Case, Outputs, defined};
use crate::device::{Buffer, Device, DeviceKind, LaunchTime, Pass, Read, View};
use crate::fixed::exponent;
use crate::indicators::{self, IndicatorParams, PRICE_BITS, bollinger_bits, log_bits, span_alpha, sum_bits, wilder_alpha};
use crate::kernel::Kernel;
use crate::performance::{Performance, finish, performance_read};
pub use crate::strategies::Strategy;
use crate::strategies::{Machine, Table, Words};
use crate::walk_forward_select::{NONE, SelectParams, WALK_FORWARD_SCORES, WALK_FORWARD_SELECT};
use crate::{Error, Result};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

pub(crate) const OP: &str = "backtest_sweep";

/// Kernels of the op, in the order of their first launch.
pub static SWEEP_KERNELS: [&Kernel; 17] = [
    &indicators::PRICE_SUMS,
    &indicators::INDICATOR_SMA,
    &indicators::INDICATOR_EMA,
    &indicators::INDICATOR_RSI,
    &indicators::INDICATOR_BOLLINGER,
    &indicators::INDICATOR_DONCHIAN,
    &indicators::INDICATOR_VOLATILITY,
    &BACKTEST_SWEEP,
    &KEYS_BY_ROW,
    &BACKTEST_BAND_STATES,
    &BACKTEST_CROSS,
    &BACKTEST_BAND,
    &BACKTEST_SIZED,
    &BACKTEST_JOIN,
    &WALK_FORWARD_SELECT,
    &WALK_FORWARD_SCORES,
    &BACKTEST_STITCH,
];

/// When a decision is traded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Execution {
    /// At the close that it was decided on: earns the next bar. Optimistic.
    SameClose,
    /// At the close after.
    NextClose,
    /// At the open after; returns run from open to open, the last one to the last close.
    NextOpen,
}

impl Execution {
    /// The execution of that name.
    pub fn named(name: &str) -> Result<Execution> {
        match name {
            "same_close" => Ok(Execution::SameClose),
            "next_close" => Ok(Execution::NextClose),
            "next_open" => Ok(Execution::NextOpen),
            _ => {
                let known = vec!["same_close".to_string(), "next_close".into(), "next_open".into()];
                Err(Error::Unknown { kind: "execution", given: name.into(), suggestion: None, known })
            }
        }
    }

    /// Name, as on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Execution::SameClose => "same_close",
            Execution::NextClose => "next_close",
            Execution::NextOpen => "next_open",
        }
    }

    fn lag(self) -> u32 {
        match self {
            Execution::SameClose | Execution::NextOpen => 0,
            Execution::NextClose => 1,
        }
    }
}

/// What to sweep.
#[derive(Debug, Clone)]
pub struct Sweep<'a> {
    /// Closes [T,N], positive.
    pub close: &'a [f32],
    /// Opens [T,N], positive; only `next_open` reads them.
    pub open: Option<&'a [f32]>,
    /// N.
    pub assets: usize,
    /// What trades.
    pub strategy: Strategy,
    /// Its parameters by name, each [S].
    pub parameters: &'a [(&'a str, &'a [f32])],
    /// Ascending indices of the sets to run (`None`: all). Scales and key widths come from the whole columns whatever runs, so that
    /// any split of the sets gives the same bits.
    pub only: Option<&'a [u32]>,
    /// One-way costs in basis points of traded notional; each is a sweep of its own over the same indicators.
    pub cost_bps: &'a [f64],
    /// When decisions are traded.
    pub execution: Execution,
    /// First counted return: no position is held before. All sets are scored over the same bars.
    pub start: u32,
    /// Return periods per year.
    pub periods_per_year: f64,
    /// Walk-forward windows: train start, train end, test start, test end, half-open on the return index.
    pub windows: &'a [[u32; 4]],
    /// End of the part of each test window that enters the stitched series (`None`: up to the next window's test start).
    pub stitch_ends: Option<&'a [u32]>,
    /// Choose a set per window and asset.
    pub per_asset: bool,
    /// Choose one set per window for all assets.
    pub pooled: bool,
    /// Also return train and test Sharpe ratios of every set and window (sets × windows values).
    pub scores: bool,
    /// Time every launch.
    pub profile: bool,
}

/// Statistics of a back-test.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SetStats {
    /// Annualised Sharpe ratio; NaN if undefined.
    pub sharpe: f64,
    /// Compounded net return.
    pub total_return: f64,
    /// Largest loss from a running peak, positive.
    pub max_drawdown: f64,
    /// Σ|w_j − w_{j−1}|.
    pub turnover: f64,
    /// Bars on which something was traded.
    pub trades: u64,
}

/// Results of some sets on some assets, handed out as soon as they are there.
pub struct Chunk {
    /// Index into `cost_bps`.
    pub cost: usize,
    /// Assets.
    pub assets: Range<usize>,
    /// Sets, counted among those that run; [`Chunk::id`] is the index into the columns.
    pub sets: Range<usize>,
    ids: Option<Arc<[u32]>>,
    tiles: usize,
    windows: usize,
    year: f64,
    stats: Values,
    scores: Vec<f64>,
}

/// Downloaded statistics, as wide as the device's reals.
enum Values {
    F32(Vec<f32>),
    F64(Vec<f64>),
}

impl Values {
    fn get(&self, i: usize) -> f64 {
        match self {
            Values::F32(x) => f64::from(x[i]),
            Values::F64(x) => x[i],
        }
    }
}

impl Chunk {
    /// Index into the parameter columns of the set at a position among those that run.
    pub fn id(&self, set: usize) -> u32 {
        id_of(self.ids.as_deref(), set as u32)
    }

    /// Statistics of a set on an asset, by their positions in the run.
    pub fn stats(&self, set: usize, asset: usize) -> SetStats {
        let (set, asset) = (set - self.sets.start, asset - self.assets.start);
        let at = (asset * self.tiles + set / TILE) * STATS * TILE + set % TILE;
        let value = |k: usize| self.stats.get(at + k * TILE);
        SetStats { sharpe: defined(value(0)) * self.year, total_return: value(1), max_drawdown: value(2), turnover: value(3), trades: value(4) as u64 }
    }

    /// Annualised train and test Sharpe ratio of a set on an asset in a window; NaN if undefined. Needs `Sweep::scores`.
    pub fn scores(&self, set: usize, asset: usize, window: usize) -> (f64, f64) {
        let (set, asset) = (set - self.sets.start, asset - self.assets.start);
        let value = |part: usize| self.scores[((asset * self.windows + window) * 2 + part) * self.tiles * TILE + set];
        (defined(value(0)) * self.year, defined(value(1)) * self.year)
    }
}

/// What a selection earned out of sample.
#[derive(Debug, Clone, Default)]
pub struct Selected {
    /// Chosen set per window, as index into the parameter columns: [N,W], or [1,W] if pooled.
    pub best: Vec<u32>,
    /// Its selection key: the larger one wins, 0 if the ratio is undefined. Keys of different sets of the same sweep compare.
    pub keys: Vec<u32>,
    /// Net returns of the chosen sets over the stitched bars [N,K].
    pub stitched: Vec<f32>,
    /// Weights held over them [N,K].
    pub weights: Vec<f32>,
    /// Statistics of each asset's stitched series [N].
    pub performance: Vec<Performance>,
    /// Turnover inside each window's stitched part [N,W]; changing sets between windows is not charged.
    pub turnover: Vec<f64>,
    /// Bars traded inside each window's stitched part [N,W].
    pub trades: Vec<u64>,
}

/// What a sweep leaves when it has handed out its chunks.
#[derive(Debug, Clone, Default)]
pub struct Outcome {
    /// Selection per asset, for each cost.
    pub per_asset: Vec<Selected>,
    /// Pooled selection, for each cost.
    pub pooled: Vec<Selected>,
    /// Return indices of the stitched bars [K].
    pub stitched_bars: Vec<u32>,
    /// Launches on the device.
    pub launches: usize,
    /// Submits.
    pub submits: usize,
    /// Times of the launches, if asked for.
    pub profile: Vec<LaunchTime>,
}

/// What some sets did on every bar.
#[derive(Debug, Clone)]
pub struct Replay {
    /// Net returns [N,sets,T−1].
    pub net: Vec<f32>,
    /// Weights held over the same bars [N,sets,T−1].
    pub weight: Vec<f32>,
}

/// Index into the columns of the set at `position` among those that run.
fn id_of(ids: Option<&[u32]>, position: u32) -> u32 {
    ids.and_then(|ids| ids.get(position as usize)).copied().unwrap_or(position)
}

// ---- the run ----------------------------------------------------------------------------------------------------------

/// Everything that does not change between chunks.
struct Job<'a> {
    sweep: &'a Sweep<'a>,
    device: &'a Device,
    machine: Machine,
    /// Indices into the columns of the sets that run, if not all do.
    ids: Option<Arc<[u32]>>,
    /// Bars.
    t: usize,
    /// Window edges on the return index.
    edges: Vec<u32>,
    /// Spans of the train windows, for selection.
    train: Buffer,
    /// Spans of train and test windows, for scores.
    both: Buffer,
    /// (from, to, offset) of each window's part of the stitched series.
    stitch: Vec<u32>,
    stitched: usize,
    shift: u32,
    /// Scales of the fixed-point sums, per cost and asset.
    scales: Vec<Vec<u32>>,
    outcome: Outcome,
    pending: Pending,
    /// Prefixes of the launch that is on, and parts of spans; every launch uses the same buffers.
    scratch: [Option<Buffer>; 2],
    /// Bars where spans begin and end, if tiles of sets are simulated; empty otherwise.
    cuts: Vec<u32>,
    /// Words of the runs of sets so far.
    lattices: HashMap<Range<usize>, Option<Arc<Words32>>>,
}

/// A run of sets in words, on the device.
struct Words32 {
    data: Buffer,
    tiles: usize,
    words: usize,
    details: usize,
}

/// A pass being recorded, and what to do with its downloads.
struct Pending {
    pass: Pass,
    chunks: Vec<(Chunk, Read, Option<Read>)>,
    selected: Vec<(usize, bool, Range<usize>, [Read; 4])>,
    bytes: u64,
}

/// Buffers of an asset chunk that all its set chunks share.
struct Tables {
    assets: Range<usize>,
    price: Buffer,
    returns: Buffer,
    keys: Buffer,
    /// Keys by row, where the device wants them.
    by_row: Option<Buffer>,
    inverse_volatility: Buffer,
}

/// Which scratch buffer.
const PREFIX: usize = 0;
const SPAN_PARTS: usize = 1;

/// Running choice of a selection.
struct Choice {
    best: Buffer,
    chosen: Buffer,
}

/// Downloads are handed out once this many bytes wait; on the CPU after every launch, so that memory is used again while it is warm.
const FLUSH_BYTES: u64 = 32 << 20;
const CPU_FLUSH_BYTES: u64 = 1;
/// Most tiles of sets of one launch: enough for any device, and their words stay below 16 MB.
const LAUNCH_TILES: u64 = 4096;
const CPU_LAUNCH_TILES: u64 = 1024;
/// Scratch of one launch stays below this, and on the CPU in its caches: it is written once and read once.
const SCRATCH_BYTES: u64 = 64 << 20;
const CPU_SCRATCH_BYTES: u64 = 16 << 20;

/// Bars that one thread replays where it needs none before them.
const STITCH_BARS: u32 = 2048;

/// Rounds of a loop over all bars. 64 bars and an edge count for up to ten: compilers turn branches into loops (llvmpipe was right at
/// 53,790 bars, wrong at 61,977).
fn one_set_a_thread(bars: u64, edges: u64) -> u64 {
    bars + 10 * (bars / 64 + edges) + 8
}

/// Bars of a span: long series are split over threads, and so are shorter ones where there are too few sets to fill a GPU. The whole
/// sweep decides, whatever part of it runs; splits change no sum and so no choice, only the last bits of drawdown and total return.
fn span_bars(bars: u32, sets: usize) -> u32 {
    match (bars, sets) {
        (8193.., _) => 1024,
        (1025.., 0..16_384) => 512,
        _ => u32::MAX,
    }
}

impl<'a> Sweep<'a> {
    /// Runs the sweep; `visit` gets every chunk of statistics once, assets in order, then sets in order.
    ///
    /// Statistics of a set depend on closes up to the last bar; a weight at bar t on closes up to t (one bar earlier with
    /// `next_close`); a window's choice on returns inside its train part alone.
    /// # Errors
    /// `Shape` for lengths that do not match or windows outside the returns; `Parameter` naming set and value; `TooLarge` where not
    /// even one tile of sets fits the device; device errors.
    pub fn run(&self, device: &Device, visit: &mut dyn FnMut(&Chunk) -> Result<()>) -> Result<Outcome> {
        let mut job = Job::new(self, device)?;
        let plan = job.plan()?;
        let empty: Vec<Choice> = Vec::new();
        let pooled: Vec<Choice> = if self.pooled && !self.windows.is_empty() { self.choices(device, 1)? } else { empty };
        if pooled.is_empty() {
            for assets in &plan.assets {
                let tables = job.tables(assets.clone())?;
                let own = if self.per_asset && !self.windows.is_empty() { self.choices(device, assets.len())? } else { Vec::new() };
                for cost in 0..self.cost_bps.len() {
                    for sets in &plan.sets {
                        job.simulate(&tables, cost, sets.clone(), own.get(cost), None)?;
                        job.flush_if(job.flush_bytes(), visit)?;
                    }
                    if let Some(choice) = own.get(cost) {
                        job.stitch(&tables, cost, choice, false)?;
                    }
                }
            }
        } else {
            self.run_pooled(&mut job, &plan, &pooled, visit)?;
        }
        job.flush_if(0, visit)?;
        if self.windows.is_empty() {
            let none = || vec![Selected { performance: vec![Performance::NONE; self.assets], ..Selected::default() }; self.cost_bps.len()];
            job.outcome.per_asset = if self.per_asset { none() } else { Vec::new() };
            job.outcome.pooled = if self.pooled { none() } else { Vec::new() };
        }
        Ok(job.outcome)
    }

    /// Pooled selection needs the prefixes of all assets at once, so sets are the outer loop.
    fn run_pooled(&self, job: &mut Job<'_>, plan: &Plan, pooled: &[Choice], visit: &mut dyn FnMut(&Chunk) -> Result<()>) -> Result<()> {
        let own = if self.per_asset { plan.assets.iter().map(|a| self.choices(job.device, a.len())).collect::<Result<Vec<_>>>()? } else { Vec::new() };
        let mut held: Option<Tables> = None;
        for (cost, choice) in pooled.iter().enumerate() {
            for sets in &plan.sets {
                let tiles = sets.len().div_ceil(TILE);
                let all = job.scratch(PREFIX, (self.assets * tiles * job.edges.len() * 4 * TILE) as u64)?;
                for (i, assets) in plan.assets.iter().enumerate() {
                    let tables = match held.take() {
                        Some(tables) if tables.assets == *assets => tables,
                        _ => job.tables(assets.clone())?,
                    };
                    job.simulate(&tables, cost, sets.clone(), own.get(i).and_then(|c| c.get(cost)), Some(&all))?;
                    held = Some(tables);
                }
                job.select(&all, self.assets, self.assets, sets, choice)?;
                job.flush_if(job.flush_bytes(), visit)?;
            }
            for (i, assets) in plan.assets.iter().enumerate() {
                let tables = match held.take() {
                    Some(tables) if tables.assets == *assets => tables,
                    _ => job.tables(assets.clone())?,
                };
                job.stitch(&tables, cost, choice, true)?;
                if let Some(choice) = own.get(i).and_then(|c| c.get(cost)) {
                    job.stitch(&tables, cost, choice, false)?;
                }
                held = Some(tables);
            }
        }
        Ok(())
    }

    /// Net returns and weights of a few sets, by ascending index, over all bars at one cost: a window of all bars for each of them.
    ///
    /// # Errors
    /// As [`Sweep::run`].
    pub fn replay(&self, device: &Device, cost: usize, sets: &[u32]) -> Result<Replay> {
        let bars = (self.close.len() / self.assets.max(1)).max(1) as u32 - 1;
        let (windows, ends) = (vec![[0, bars, 0, bars]; sets.len()], vec![bars; sets.len()]);
        let few = Sweep { only: Some(sets), windows: &windows, stitch_ends: Some(&ends), scores: false, ..self.clone() };
        let mut job = Job::new(&few, device)?;
        let words = job.machine.words(0..sets.len());
        let choice = Choice { best: device.zeros_u32("best", 2 * sets.len() as u64)?, chosen: device.upload_u32("chosen", &words[..sets.len() * SET_WORDS])? };
        for assets in job.plan()?.assets {
            let tables = job.tables(assets)?;
            job.stitch(&tables, cost, &choice, true)?;
            job.flush_if(job.flush_bytes(), &mut |_| Ok(()))?;
        }
        job.flush_if(0, &mut |_| Ok(()))?;
        let replayed = job.outcome.pooled.into_iter().nth(cost).unwrap_or_default();
        Ok(Replay { net: replayed.stitched, weight: replayed.weights })
    }

    /// No choice yet, for each cost.
    fn choices(&self, device: &Device, slots: usize) -> Result<Vec<Choice>> {
        let count = slots * self.windows.len();
        let start: Vec<u32> = [0, NONE].repeat(count);
        let one = |_| Ok(Choice { best: device.upload_u32("best", &start)?, chosen: device.zeros_u32("chosen", (count * SET_WORDS) as u64)? });
        self.cost_bps.iter().map(one).collect()
    }
}

/// Runs of assets and of sets that one launch takes.
struct Plan {
    assets: Vec<Range<usize>>,
    sets: Vec<Range<usize>>,
}

impl<'a> Job<'a> {
    fn new(sweep: &'a Sweep<'a>, device: &'a Device) -> Result<Job<'a>> {
        let shape = |arg: &str, expected: String, got: String| Error::Shape { op: OP, arg: arg.into(), expected, got };
        let n = sweep.assets;
        if n == 0 || sweep.close.is_empty() || !sweep.close.len().is_multiple_of(n) {
            return Err(shape("close", "[T,N] with T, N ≥ 1".into(), format!("{} values for N = {n}", sweep.close.len())));
        }
        let t = sweep.close.len() / n;
        if let Some(i) = sweep.close.iter().position(|p| !(p.is_normal() && *p > 0.0)) {
            let help = "prices must be positive, finite numbers; drop the asset or cut the range".into();
            return Err(Error::Parameter { op: OP, name: format!("close[{}, {}]", i / n, i % n), value: sweep.close[i].to_string(), help });
        }
        if sweep.execution == Execution::NextOpen {
            let open = sweep.open.ok_or_else(|| shape("open", "opens [T,N] for next_open".into(), "none; give them, or execute at next_close".into()))?;
            if open.len() != sweep.close.len() {
                return Err(shape("open", format!("{} values, as many as closes", sweep.close.len()), open.len().to_string()));
            }
            if let Some(i) = open.iter().position(|p| !(p.is_normal() && *p > 0.0)) {
                let help = "opens must be positive, finite numbers; execute at next_close, or cut the range".into();
                return Err(Error::Parameter { op: OP, name: format!("open[{}, {}]", i / n, i % n), value: open[i].to_string(), help });
            }
        }
        if let Some((i, c)) = sweep.cost_bps.iter().enumerate().find(|(_, c)| !(c.is_finite() && **c >= 0.0 && **c < 10_000.0)) {
            let help = "give basis points from 0 to below 10000".into();
            return Err(Error::Parameter { op: OP, name: format!("cost_bps[{i}]"), value: c.to_string(), help });
        }
        if sweep.cost_bps.is_empty() {
            return Err(shape("cost_bps", "at least one cost".into(), "none".into()));
        }
        if !(sweep.periods_per_year.is_finite() && sweep.periods_per_year > 0.0) {
            let help = "give a positive number of return periods per year".into();
            return Err(Error::Parameter { op: OP, name: "periods_per_year".into(), value: sweep.periods_per_year.to_string(), help });
        }
        let bars = t as u32 - 1;
        for (w, window) in sweep.windows.iter().enumerate() {
            if window[0] > window[1] || window[2] > window[3] || window[1] > bars || window[3] > bars {
                return Err(shape(&format!("windows[{w}]"), format!("two half-open ranges inside the {bars} returns"), format!("{window:?}")));
            }
        }
        let machine = Machine::of_sweep(sweep)?;
        let mut edges: Vec<u32> = sweep.windows.iter().flatten().copied().collect();
        edges.sort_unstable();
        edges.dedup();
        let span = |from: u32, to: u32| [edges.partition_point(|&e| e < from) as u32, edges.partition_point(|&e| e < to) as u32, to - from, 0];
        let train: Vec<u32> = sweep.windows.iter().flat_map(|w| span(w[0], w[1])).collect();
        let both: Vec<u32> = sweep.windows.iter().flat_map(|w| [span(w[0], w[1]), span(w[2], w[3])]).flatten().collect();
        let stitch = stitch_parts(sweep)?;
        let stitched = stitch.chunks_exact(3).map(|p| (p[1] - p[0]) as usize).sum();
        let samples = u64::from(bars.max(1)) * if sweep.pooled { n as u64 } else { 1 };
        // Counts of trades are exact in f32 up to 2^24, pooled samples are counted in 32 bits.
        for (what, needed, limit, help) in [
            ("a series", u64::from(bars), 1 << 24, "cut the range with fewer bars"),
            ("a pooled sample", samples, 1 << 31, "select per asset, or use fewer bars"),
        ] {
            if needed > limit {
                return Err(Error::TooLarge { what: what.into(), needed, limit, unit: "bars", help: help.into() });
            }
        }
        let shift = 62 - (64 - samples.leading_zeros());
        let scales = sweep.cost_bps.iter().map(|&bps| scales(sweep, t, machine.heaviest, bps * 1e-4)).collect();
        let stitched_bars = stitch.chunks_exact(3).flat_map(|p| p[0]..p[1]).collect();
        let pending = Pending { pass: device.pass(OP), chunks: Vec::new(), selected: Vec::new(), bytes: 0 };
        let on_cpu = matches!(device.info().kind, DeviceKind::Cpu | DeviceKind::Reference);
        let all = sweep.parameters.first().map_or(0, |p| p.1.len()) * n;
        // A sized or shorted band starts from three states: it is not split.
        let whole = machine.general && machine.mode == BAND;
        let length = if whole { u32::MAX } else { span_bars(bars, all) };
        let cuts = if on_cpu || machine.stops || bars == 0 { Vec::new() } else { cuts(&edges, bars, length) };
        Ok(Job {
            sweep,
            device,
            machine,
            ids: sweep.only.map(Arc::from),
            t,
            train: device.upload_u32("train spans", &train)?,
            both: device.upload_u32("train and test spans", &both)?,
            edges,
            stitch,
            stitched,
            shift,
            scales,
            outcome: Outcome { stitched_bars, ..Outcome::default() },
            pending,
            scratch: [None, None],
            cuts,
            lattices: HashMap::new(),
        })
    }

    fn on_cpu(&self) -> bool {
        matches!(self.device.info().kind, DeviceKind::Cpu | DeviceKind::Reference)
    }

    fn flush_bytes(&self) -> u64 {
        if self.on_cpu() { CPU_FLUSH_BYTES } else { FLUSH_BYTES }
    }

    fn plan(&self) -> Result<Plan> {
        let cpu = self.on_cpu();
        let scratch_bytes = if cpu { CPU_SCRATCH_BYTES } else { SCRATCH_BYTES };
        let (n, t, limits) = (self.sweep.assets, self.t as u64, self.device.limits());
        let tiles = self.machine.count().div_ceil(TILE) as u64;
        let rows = self.machine.table.rows().max(self.machine.volatility.len()) as u64;
        let per_asset = (t * rows).max(4 * (t + 1));
        let prefix = (self.edges.len() * 4 * TILE).max(STATS * TILE) as u64;
        let scores = if self.sweep.scores { 2 * self.sweep.windows.len() * TILE } else { 0 } as u64;
        let parts = (self.cuts.len().max(1) - 1) * PARTS * TILE;
        let tile_elements = prefix.max(scores).max(parts as u64);
        let work = if self.machine.general { 40 } else { 13 } * TILE as u64 * t;
        // Workgroups of an asset's largest table, and of its windows.
        let windows = self.sweep.windows.len() as u64;
        let asset_groups = (t * rows).div_ceil(u64::from(indicators::INDICATOR_SMA.workgroup)).max(windows);
        // Sequential loops: bars and their blocks in the simulation; sets, and assets where pooled, in the selection.
        let edges = self.edges.len() as u64;
        self.device.check_rounds(OP, self.rounds(edges), "rounds")?;
        // Assets first: as many as fit beside all sets, or else beside one tile of them (all assets, if their prefixes are needed together).
        let mut assets = self.device.plan(OP, n as u64, per_asset.max(tile_elements), asset_groups, work.max(600 * per_asset))?;
        let beside_all = (scratch_bytes / (4 * tile_elements * tiles)).max(1);
        if !self.sweep.pooled && assets.first().is_some_and(|r| r.end - r.start > beside_all) {
            assets = (0..n as u64).step_by(beside_all as usize).map(|a| a..(a + beside_all).min(n as u64)).collect();
        }
        let chunk = assets.first().map_or(1, |r| r.end - r.start);
        let together = if self.sweep.pooled { n as u64 } else { chunk };
        let tile_groups = chunk * if self.sweep.scores { windows.div_ceil(2).max(1) } else { 1 };
        if 4 * together * tile_elements > limits.binding_bytes {
            let help = "select per asset instead of pooled, use fewer windows, or a device with larger bindings".into();
            let needed = 4 * together * tile_elements;
            return Err(Error::TooLarge { what: format!("{OP}: one tile of {TILE} sets"), needed, limit: limits.binding_bytes, unit: "B", help });
        }
        let run = self.device.plan(OP, tiles, together * tile_elements, tile_groups, together * work)?.first().map_or(1, |r| r.end - r.start);
        let per_set = 34 + if self.sweep.pooled { n as u64 } else { 0 };
        let run = run.min((limits.loop_rounds / per_set).max(1)).min(if cpu { CPU_LAUNCH_TILES } else { LAUNCH_TILES });
        let run = run.min((scratch_bytes / (4 * together * tile_elements)).max(1)) as usize * TILE;
        let count = self.machine.count();
        // On the CPU launches of equal size: a short last one would not fill its threads.
        let run = if cpu { count.div_ceil(count.div_ceil(run)).next_multiple_of(TILE) } else { run };
        Ok(Plan {
            assets: assets.into_iter().map(|r| r.start as usize..r.end as usize).collect(),
            sets: (0..count.div_ceil(run)).map(|i| i * run..((i + 1) * run).min(count)).collect(),
        })
    }

    /// Rounds of the longest loop of one thread.
    fn rounds(&self, edges: u64) -> u64 {
        let bars = self.t as u64;
        let recursive = matches!(self.machine.table, Table::Ema(_) | Table::Rsi(_));
        let walked = self.cuts.is_empty() || recursive || !(self.sweep.windows.is_empty() || self.memoryless());
        let walk = if walked { one_set_a_thread(bars, edges) } else { 0 };
        let span = self.cuts.windows(2).map(|cut| u64::from(cut[1] - cut[0])).max().unwrap_or(0);
        walk.max(2 * span + bars / 64 + self.cuts.len() as u64 + edges)
    }

    /// Whether the weight over a bar depends on no earlier decision.
    fn memoryless(&self) -> bool {
        self.machine.mode != BAND && !self.machine.stops
    }

    /// `words` words of a scratch buffer.
    fn scratch(&mut self, which: usize, words: u64) -> Result<View> {
        let buffer = match self.scratch[which].take() {
            Some(buffer) if buffer.len() >= words => buffer,
            _ => self.device.zeros_u32(["prefix", "parts"][which], words)?,
        };
        let view = buffer.view(0..words);
        self.scratch[which] = Some(buffer);
        Ok(view)
    }

    /// Words of a run of sets, if tiles of sets are simulated and these sets fill them.
    fn lattice(&mut self, sets: &Range<usize>) -> Result<Option<Arc<Words32>>> {
        if self.cuts.is_empty() {
            return Ok(None);
        }
        if let Some(known) = self.lattices.get(sets) {
            return Ok(known.clone());
        }
        let side = |w: &Words| Sides { a: (w.a, w.threshold_a), b: (w.b, w.threshold_b), first: w.first };
        let sides: Vec<Sides> = self.machine.sets[sets.clone()].iter().map(side).collect();
        let details: Option<Vec<Detail>> = self.machine.general.then(|| sets.clone().map(|set| self.machine.detail(set)).collect());
        let found = match Lattice::of(self.machine.mode, &sides, details.as_deref()) {
            Some(Lattice { data, tiles, words, details }) => {
                Some(Arc::new(Words32 { data: self.device.upload_words("lattice", data)?, tiles, words, details }))
            }
            None => None,
        };
        self.lattices.insert(sets.clone(), found.clone());
        Ok(found)
    }

    /// Prices, returns and indicators of an asset chunk.
    fn tables(&mut self, assets: Range<usize>) -> Result<Tables> {
        let (device, t, n, a) = (self.device, self.t, self.sweep.assets, assets.len());
        let close = self.sweep.close;
        let mut columns = Vec::with_capacity(2 * a * t);
        for asset in assets.clone() {
            columns.extend((0..t).map(|j| close[j * n + asset]));
        }
        // Fills at the next open; after the last bar there is only its close.
        let fills = self.sweep.open.filter(|_| self.sweep.execution == Execution::NextOpen);
        for asset in assets.clone() {
            match fills {
                Some(open) => columns.extend((1..t).map(|j| open[j * n + asset]).chain([close[(t - 1) * n + asset]])),
                None => columns.extend((0..t).map(|j| close[j * n + asset])),
            }
        }
        let exponents: Vec<u32> = columns[..a * t].chunks_exact(t).map(|c| exponent(c.iter().copied().fold(0.0, f32::max))).collect();
        let (price, exponents) = (device.upload("price", &columns)?, device.upload_u32("exponents", &exponents)?);
        let returns = device.zeros("returns", (a * (t - 1)) as u64)?;
        let rows = self.machine.table.rows();
        let words = (a * t * rows) as u64;
        let (bits, extra) = match &self.machine.table {
            Table::Sma(_) => (sum_bits(self.machine.longest.0), 1),
            Table::Bollinger(_) => (bollinger_bits(self.machine.longest.0), 3),
            Table::Donchian(cap) => (PRICE_BITS, *cap),
            _ => (PRICE_BITS, 0),
        };
        let prefix_words = |wanted: bool| if wanted { (4 * a * (t + 1)) as u64 } else { 4 };
        let donchian = matches!(self.machine.table, Table::Donchian(_));
        let params = IndicatorParams { a: a as u32, t: t as u32, rows: rows as u32, bits, extra: if donchian { 0 } else { extra } };
        let sums = device.zeros_u32("sums", prefix_words(params.extra & 1 != 0))?;
        let squares = device.zeros_u32("squares", prefix_words(params.extra & 2 != 0))?;
        let pass = &mut self.pending.pass;
        let view = View::from;
        let closes = price.view(0..(a * t) as u64);
        pass.launch(&indicators::PRICE_SUMS, &params, &[view(&price), view(&exponents), view(&returns), view(&sums), view(&squares)])?;

        let windows = &self.machine.volatility;
        let keys = device.zeros_u32("keys", words.max(4))?;
        let inverse_volatility = device.zeros("inverse_volatility", ((a * t * windows.len()) as u64).max(4))?;
        self.pending.bytes += 4 * (words + inverse_volatility.len());
        if !windows.is_empty() {
            let bits = log_bits(self.machine.longest.1);
            let own = IndicatorParams { bits, rows: windows.len() as u32, ..params };
            let logs = device.upload_u32("logs", &log_prices(&columns[..a * t], t, bits)?)?;
            let windows = device.upload_u32("periods", windows)?;
            pass.launch(&indicators::INDICATOR_VOLATILITY, &own, &[View::from(&logs), View::from(&windows), View::from(&inverse_volatility)])?;
        }
        let [p, e, k] = [closes.clone(), view(&exponents), view(&keys)];
        match &self.machine.table {
            Table::Sma(periods) => {
                let periods = device.upload_u32("periods", periods)?;
                pass.launch(&indicators::INDICATOR_SMA, &params, &[p, e, view(&sums), view(&periods), k])?;
            }
            Table::Ema(spans) => {
                let half = |x: u64| [x as u32, (x >> 32) as u32];
                let alphas: Vec<u32> = spans.iter().flat_map(|&(n, g)| [half(span_alpha(n)), half(if g == 0 { 0 } else { span_alpha(g) })]).flatten().collect();
                let alphas = device.upload_u32("alphas", &alphas)?;
                pass.launch(&indicators::INDICATOR_EMA, &params, &[p, e, view(&alphas), k])?;
            }
            Table::Rsi(periods) => {
                let alphas: Vec<u32> = periods.iter().flat_map(|&n| [wilder_alpha(n) as u32, (wilder_alpha(n) >> 32) as u32]).collect();
                let (periods, alphas) = (device.upload_u32("periods", periods)?, device.upload_u32("alphas", &alphas)?);
                pass.launch(&indicators::INDICATOR_RSI, &params, &[p, e, view(&periods), view(&alphas), k])?;
            }
            Table::Bollinger(periods) => {
                let periods = device.upload_u32("periods", periods)?;
                pass.launch(&indicators::INDICATOR_BOLLINGER, &params, &[p, e, view(&sums), view(&squares), view(&periods), k])?;
            }
            Table::Donchian(_) => pass.launch(&indicators::INDICATOR_DONCHIAN, &IndicatorParams { extra, ..params }, &[p, k])?,
            Table::None => {}
        }
        let mut by_row = None;
        if !self.cuts.is_empty() && rows > 0 && device.info().kind == DeviceKind::Wgpu {
            let turned = device.zeros_u32("keys by row", words.max(4))?;
            let params = TilesParams { a: a as u32, t: t as u32, rows: rows as u32, ..bytemuck::Zeroable::zeroed() };
            self.pending.pass.launch(&KEYS_BY_ROW, &params, &[View::from(&keys), View::from(&turned)])?;
            self.pending.bytes += 4 * words;
            by_row = Some(turned);
        }
        Ok(Tables { assets, price, returns, keys, by_row, inverse_volatility })
    }

    fn backtest_params(&self, tables: &Tables, cost: usize) -> BacktestParams {
        let fraction = self.sweep.cost_bps[cost] * 1e-4;
        BacktestParams {
            a: tables.assets.len() as u32,
            t: self.t as u32,
            rows: self.machine.table.rows() as u32,
            tiles: 0,
            edges: self.edges.len() as u32,
            mode: self.machine.mode,
            lag: self.sweep.execution.lag(),
            start: self.sweep.start,
            shift: self.shift,
            mask: self.machine.mask,
            cost: fraction as f32,
            cost_low: (fraction - f64::from(fraction as f32)) as f32,
            per_asset: 0,
            stitched: self.stitched as u32,
            volatility_rows: self.machine.volatility.len() as u32,
            general: u32::from(self.machine.general),
            piece: 0,
            pieces: 1,
        }
    }

    /// Simulates a run of sets on an asset chunk, and selects per asset if a choice is given. `all` is the prefix buffer of all assets.
    fn simulate(&mut self, tables: &Tables, cost: usize, sets: Range<usize>, choice: Option<&Choice>, all: Option<&View>) -> Result<()> {
        let (device, a, tiles) = (self.device, tables.assets.len(), sets.len().div_ceil(TILE));
        let stats = device.zeros("stats", (a * tiles * STATS * TILE) as u64)?;
        let per_asset = (tiles * self.edges.len() * 4 * TILE) as u64;
        let prefix = match all {
            Some(all) => all.buffer.view(tables.assets.start as u64 * per_asset..tables.assets.end as u64 * per_asset),
            None => self.scratch(PREFIX, (a as u64 * per_asset).max(4))?,
        };
        let lattice = self.lattice(&sets)?;
        let view = View::from;
        let mut words = None;
        if lattice.is_none() || choice.is_some() {
            words = Some(device.upload_words("sets", self.machine.words(sets.clone()))?);
        }
        match (&lattice, &words) {
            (Some(lattice), _) => self.simulate_tiles(tables, cost, lattice, tiles, &stats, &prefix)?,
            (None, Some(words)) => {
                device.check_rounds(OP, one_set_a_thread(self.t as u64, self.edges.len() as u64), "rounds")?;
                let plan: Vec<u32> = self.edges.iter().chain(&self.scales[cost][tables.assets.clone()]).copied().collect();
                let plan = device.upload_u32("plan", &plan)?;
                let params = BacktestParams { tiles: tiles as u32, ..self.backtest_params(tables, cost) };
                let [p, r, k, v] = [&tables.price, &tables.returns, &tables.keys, &tables.inverse_volatility].map(View::from);
                let args = [p, r, k, v, View::from(words), View::from(&plan), View::from(&stats), prefix.clone()];
                self.pending.pass.launch(&BACKTEST_SWEEP, &params, &args)?;
            }
            (None, None) => {}
        }
        let select = self.select_params(a, 1, &sets);
        if let (Some(choice), Some(words)) = (choice, &words) {
            let args = [prefix.clone(), view(&self.train), view(words), view(&choice.best), view(&choice.chosen)];
            self.pending.pass.launch(&WALK_FORWARD_SELECT, &select, &args)?;
        }
        let mut scores = None;
        if self.sweep.scores && !self.sweep.windows.is_empty() {
            let values = device.zeros("scores", (a * self.sweep.windows.len() * 2 * tiles * TILE) as u64)?;
            self.pending.pass.launch(&WALK_FORWARD_SCORES, &select, &[prefix, view(&self.both), view(&values)])?;
            scores = Some(self.pending.pass.read(&values)?);
            self.pending.bytes += 4 * values.len();
        }
        self.pending.bytes += 4 * stats.len();
        let read = self.pending.pass.read(&stats)?;
        let chunk = Chunk {
            cost,
            assets: tables.assets.clone(),
            sets,
            ids: self.ids.clone(),
            tiles,
            windows: self.sweep.windows.len(),
            year: self.sweep.periods_per_year.sqrt(),
            stats: Values::F32(Vec::new()),
            scores: Vec::new(),
        };
        self.pending.chunks.push((chunk, read, scores));
        Ok(())
    }

    /// Simulates a run of sets tile by tile and span by span.
    fn simulate_tiles(&mut self, tables: &Tables, cost: usize, lattice: &Words32, set_tiles: usize, stats: &Buffer, prefix: &View) -> Result<()> {
        let (device, a, spans, view) = (self.device, tables.assets.len(), self.cuts.len() - 1, View::from);
        let plan: Vec<u32> = self.edges.iter().chain(&self.scales[cost][tables.assets.clone()]).chain(&self.cuts).copied().collect();
        let plan = device.upload_u32("plan", &plan)?;
        let parts = self.scratch(SPAN_PARTS, (a * spans * PARTS * set_tiles * TILE) as u64)?;
        let base = self.backtest_params(tables, cost);
        let (keys, row_stride, bar_stride) = match &tables.by_row {
            Some(by_row) => (view(by_row), base.t, 1),
            None => (view(&tables.keys), 1, base.rows),
        };
        let params = TilesParams {
            a: base.a,
            t: base.t,
            rows: base.rows,
            tiles: lattice.tiles as u32,
            edges: base.edges,
            spans: spans as u32,
            lag: base.lag,
            start: base.start,
            shift: base.shift,
            mask: base.mask,
            cost: base.cost,
            cost_low: base.cost_low,
            set_tiles: set_tiles as u32,
            row_stride,
            bar_stride,
            words: lattice.words as u32,
            mode: base.mode,
            volatility_rows: base.volatility_rows,
            details: lattice.details as u32,
        };
        let pass = &mut self.pending.pass;
        if self.machine.general {
            let data = [keys, view(&lattice.data), view(&plan), view(&tables.returns), parts.clone(), prefix.clone()];
            let args: Vec<View> = data.into_iter().chain([view(&tables.price), view(&tables.inverse_volatility)]).collect();
            pass.launch(&BACKTEST_SIZED, &params, &args)?;
            return pass.launch(&BACKTEST_JOIN, &params, &[parts, view(&plan), view(stats), prefix.clone()]);
        }
        let band = self.machine.mode == BAND;
        let groups = if band && spans > 1 { a * spans * lattice.tiles } else { 1 };
        let states = device.zeros_u32("states", (groups * 2 * WORDS) as u64)?;
        if band && spans > 1 {
            pass.launch(&BACKTEST_BAND_STATES, &params, &[keys.clone(), view(&lattice.data), view(&plan), view(&states)])?;
        }
        let args = [keys, view(&lattice.data), view(&plan), view(&tables.returns), parts.clone(), prefix.clone(), view(&states)];
        pass.launch(if band { &BACKTEST_BAND } else { &BACKTEST_CROSS }, &params, &args)?;
        pass.launch(&BACKTEST_JOIN, &params, &[parts, view(&plan), view(stats), prefix.clone()])
    }

    fn select_params(&self, a: usize, pooled: usize, sets: &Range<usize>) -> SelectParams {
        SelectParams {
            a: a as u32,
            pooled: pooled as u32,
            w: self.sweep.windows.len() as u32,
            tiles: sets.len().div_ceil(TILE) as u32,
            edges: self.edges.len() as u32,
            sets: sets.len() as u32,
            first: sets.start as u32,
            shift: self.shift,
        }
    }

    /// Selects over `pooled` assets at once from the prefixes of `a` assets.
    fn select(&mut self, prefix: &View, a: usize, pooled: usize, sets: &Range<usize>, choice: &Choice) -> Result<()> {
        let words = self.device.upload_words("sets", self.machine.words(sets.clone()))?;
        let params = self.select_params(a, pooled, sets);
        let args = [prefix.clone(), View::from(&self.train), View::from(&words), View::from(&choice.best), View::from(&choice.chosen)];
        self.pending.pass.launch(&WALK_FORWARD_SELECT, &params, &args)
    }

    /// Replays a choice on an asset chunk and takes the performance of the stitched series.
    fn stitch(&mut self, tables: &Tables, cost: usize, choice: &Choice, pooled: bool) -> Result<()> {
        let (device, a, w) = (self.device, tables.assets.len(), self.sweep.windows.len());
        let windows = device.upload_u32("stitched windows", &self.stitch)?;
        let longest = self.stitch.chunks_exact(3).map(|part| part[1] - part[0]).max().unwrap_or(0);
        let (piece, pieces) = if self.memoryless() { (STITCH_BARS, longest.div_ceil(STITCH_BARS).max(1)) } else { (0, 1) };
        let net = device.zeros("net", (2 * a * self.stitched) as u64)?;
        let activity = device.zeros("activity", (2 * a * w) as u64 * u64::from(pieces))?;
        let base = self.backtest_params(tables, cost);
        let params = BacktestParams { tiles: w as u32, per_asset: u32::from(!pooled), piece, pieces, ..base };
        let view = View::from;
        let args = [
            view(&tables.price),
            view(&tables.returns),
            view(&tables.keys),
            view(&tables.inverse_volatility),
            view(&choice.chosen),
            view(&windows),
            view(&net),
            view(&activity),
        ];
        let pass = &mut self.pending.pass;
        let statistics = if self.stitched > 0 {
            pass.launch(&BACKTEST_STITCH, &params, &args)?;
            performance_read(pass, net.view(0..(a * self.stitched) as u64), a as u64, self.stitched as u64)?
        } else {
            pass.read(&device.zeros("statistics", 0)?)?
        };
        let reads = [pass.read(&choice.best)?, pass.read(&net)?, pass.read(&activity)?, statistics];
        self.pending.bytes += 4 * net.len();
        self.pending.selected.push((cost, pooled, tables.assets.clone(), reads));
        Ok(())
    }

    /// Submits what is recorded if more than `bytes` wait, and hands the results out.
    fn flush_if(&mut self, bytes: u64, visit: &mut dyn FnMut(&Chunk) -> Result<()>) -> Result<()> {
        if self.pending.bytes <= bytes && bytes > 0 {
            return Ok(());
        }
        let next = Pending { pass: self.device.pass(OP), chunks: Vec::new(), selected: Vec::new(), bytes: 0 };
        let Pending { mut pass, chunks, selected, .. } = std::mem::replace(&mut self.pending, next);
        if self.sweep.profile {
            pass.profile();
        }
        self.outcome.launches += pass.launches();
        self.outcome.submits += 1;
        let mut done = pass.submit()?;
        self.outcome.profile.extend_from_slice(done.profile());
        for (chunk, stats, scores) in chunks {
            let stats = if self.device.info().kind == DeviceKind::Reference { Values::F64(done.f64(stats)?) } else { Values::F32(done.f32(stats)?) };
            let scores = scores.map_or(Ok(Vec::new()), |read| done.f64(read))?;
            visit(&Chunk { stats, scores, ..chunk })?;
        }
        let (n, w, k) = (self.sweep.assets, self.sweep.windows.len(), self.stitched);
        for (cost, pooled, assets, [best, net, activity, statistics]) in selected {
            let list = if pooled { &mut self.outcome.pooled } else { &mut self.outcome.per_asset };
            list.resize_with(self.sweep.cost_bps.len(), Selected::default);
            let slot = &mut list[cost];
            let (slots, first) = if pooled { (1, 0) } else { (n, assets.start) };
            slot.best.resize(slots * w, 0);
            slot.keys.resize(slots * w, 0);
            slot.stitched.resize(n * k, 0.0);
            slot.weights.resize(n * k, 0.0);
            slot.turnover.resize(n * w, 0.0);
            slot.trades.resize(n * w, 0);
            for (i, pair) in done.u32(best)?.chunks_exact(2).enumerate() {
                slot.keys[first * w + i] = pair[0];
                slot.best[first * w + i] = id_of(self.ids.as_deref(), pair[1]);
            }
            let net = done.f32(net)?;
            let (returns, weights) = net.split_at(net.len() / 2);
            slot.stitched[assets.start * k..assets.end * k].copy_from_slice(returns);
            slot.weights[assets.start * k..assets.end * k].copy_from_slice(weights);
            let activity = done.f64(activity)?;
            for (i, pieces) in activity.chunks_exact((activity.len() / (assets.len() * w).max(1)).max(2)).enumerate() {
                slot.turnover[assets.start * w + i] = pieces.iter().step_by(2).sum();
                slot.trades[assets.start * w + i] = pieces.iter().skip(1).step_by(2).sum::<f64>() as u64;
            }
            let statistics = done.f64(statistics)?;
            slot.performance.extend(finish(&statistics, k as u64, self.sweep.periods_per_year));
            if k == 0 {
                slot.performance.extend(vec![Performance::NONE; assets.len()]);
            }
        }
        Ok(())
    }
}

/// Natural logarithms of prices [A,T] as 64-bit fixed-point, least significant word first.
fn log_prices(prices: &[f32], t: usize, bits: u32) -> Result<Vec<u32>> {
    let mut words = Vec::with_capacity(2 * prices.len());
    for column in prices.chunks_exact(t) {
        if let Some(j) = column.windows(2).position(|p| (f64::from(p[1]) / f64::from(p[0])).ln().abs() >= 8.0) {
            let help = "a price moved 3000-fold in one bar; check the data, or cut the range".into();
            return Err(Error::Parameter { op: OP, name: format!("close[{}]", j + 1), value: column[j + 1].to_string(), help });
        }
        // In units of the first price's power of two, so that a power of two on all prices changes no bit.
        let unit = 2f64.powi(127 - exponent(column[0]) as i32);
        for &p in column {
            let x = ((f64::from(p) * unit).ln() * 2f64.powi(bits as i32)).round() as i64 as u64;
            words.extend([x as u32, (x >> 32) as u32]);
        }
    }
    Ok(words)
}

/// (from, to, offset) of each window's part of the stitched series.
fn stitch_parts(sweep: &Sweep<'_>) -> Result<Vec<u32>> {
    let windows = sweep.windows;
    let mut parts = Vec::with_capacity(3 * windows.len());
    let mut offset = 0;
    for (i, window) in windows.iter().enumerate() {
        let end = match sweep.stitch_ends {
            Some(ends) => *ends.get(i).filter(|&&e| e >= window[2] && e <= window[3]).ok_or_else(|| Error::Shape {
                op: OP,
                arg: format!("stitch_ends[{i}]"),
                expected: format!("inside {}..={}", window[2], window[3]),
                got: format!("{:?}", ends.get(i)),
            })?,
            None => windows.get(i + 1).map_or(window[3], |next| window[3].min(next[2].max(window[2]))),
        };
        parts.extend([window[2], end, offset]);
        offset += end - window[2];
    }
    Ok(parts)
}

/// Exponent of a bound on |net return| per asset, biased to be a word; the same for all assets where they are pooled.
fn scales(sweep: &Sweep<'_>, t: usize, heaviest: f64, cost: f64) -> Vec<u32> {
    let n = sweep.assets;
    let mut largest = vec![0f64; n];
    let opens = sweep.open.filter(|_| sweep.execution == Execution::NextOpen);
    let fill = |j: usize, a: usize| f64::from(opens.filter(|_| j + 1 < t).map_or(sweep.close[j * n + a], |open| open[(j + 1) * n + a]));
    for j in 1..t {
        for (a, largest) in largest.iter_mut().enumerate() {
            let r = fill(j, a) / fill(j - 1, a) - 1.0;
            *largest = largest.max(r.abs());
        }
    }
    if sweep.pooled {
        let all = largest.iter().copied().fold(0.0, f64::max);
        largest.fill(all);
    }
    let scale = |r: f64| {
        let bound = heaviest * (r + 2.0 * cost);
        if bound > 0.0 { bound.log2().floor() as i32 + 1 } else { 0 }
    };
    largest.into_iter().map(|r| (scale(r) + SCALE_BIAS) as u32).collect()
}

// ---- conformance ------------------------------------------------------------------------------------------------------

/// Conformance binding.
pub(crate) fn verify(device: &Device, case: &Case) -> Result<Outputs> {
    let assets = case.shape("close")?.get(1).copied().unwrap_or(1);
    let names = case.inputs_under("param.");
    let parameters = names.iter().map(|name| Ok((*name, case.f32(&format!("param.{name}"))?))).collect::<Result<Vec<_>>>()?;
    let windows: Vec<[u32; 4]> =
        if case.has("windows") { case.u32("windows")?.chunks_exact(4).map(|w| [w[0], w[1], w[2], w[3]]).collect() } else { Vec::new() };
    let sweep = Sweep {
        close: case.f32("close")?,
        open: None,
        assets,
        strategy: Strategy::named(case.text("strategy")?)?,
        parameters: &parameters,
        only: None,
        cost_bps: &[case.number("cost_bps")?],
        execution: Execution::named(case.text("execution")?)?,
        start: 0,
        periods_per_year: case.number("periods_per_year")?,
        windows: &windows,
        stitch_ends: None,
        per_asset: true,
        pooled: false,
        scores: true,
        profile: false,
    };
    let (sets, w) = (parameters.first().map_or(0, |p| p.1.len()), windows.len());
    let mut stats = vec![vec![0.0; sets * assets]; 4];
    let mut scores = vec![vec![0.0; sets * assets * w]; 2];
    let outcome = sweep.run(device, &mut |chunk| {
        for (set, asset) in chunk.sets.clone().flat_map(|s| chunk.assets.clone().map(move |a| (s, a))) {
            let s = chunk.stats(set, asset);
            for (k, value) in [s.sharpe, s.total_return, s.max_drawdown, s.turnover].into_iter().enumerate() {
                stats[k][set * assets + asset] = value;
            }
            for window in 0..w {
                let (train, test) = chunk.scores(set, asset, window);
                scores[0][(set * assets + asset) * w + window] = train;
                scores[1][(set * assets + asset) * w + window] = test;
            }
        }
        Ok(())
    })?;
    let mut outputs = Outputs::launched(outcome.launches);
    for (name, values) in ["sharpe", "total_return", "max_drawdown", "turnover"].into_iter().zip(stats) {
        outputs.reals(name, values);
    }
    for (name, values) in ["train_sharpe", "test_sharpe"].into_iter().zip(scores) {
        outputs.reals(name, values);
    }
    if let Some(selected) = outcome.per_asset.into_iter().next() {
        outputs.words("best", selected.best);
        outputs.reals("walk_forward_sharpe", selected.performance.iter().map(|p| p.sharpe).collect());
    }
    Ok(outputs)
}
