//! Back-tests of many parameter sets: simulation fused with its statistics, and the replay of chosen sets.
//!
//! Bar j earns r_j = f_{j+1}/f_j − 1 between the prices f at which trades are filled. With w_j the weight held over it, decided at bar j
//! (`lag` 0) or one bar before (`lag` 1): net_j = w_j·r_j − cost·|w_j − w_{j−1}|, w before bar `start` is 0, no closing trade.
//!
//! The direction comes from one of three machines, all of them 0 before the set's first legal bar:
//! * cross:    1 if key_a > key_b, else −1;
//! * band:     E = (key_a ⊕ mask) > threshold_a enters, X = key_b > threshold_b leaves;
//! * momentum: sign(p_t − p_{t−lookback}).
//!
//! The side says which directions are held: long (1, 0), both (1, −1) or short (0, −1). A band starts at 0, goes up on E unless it is up, and
//! down on X; E counts before X unless it is up. Then come the stops, all on closes known at the decision, with e the fill of the entry,
//! b the best close since then (e at first) and n the bars held, for a long position (mirrored for a short one):
//! * stop-loss p ≤ e·(1 − stop_loss), take-profit p ≥ e·(1 + take_profit), trailing stop p ≤ b·(1 − trailing_stop), n ≥ max_holding;
//! * a position that was stopped is taken up again only after the machine has left its direction.
//!
//! The weight is direction·min(target·inverse_volatility, leverage) where the set is sized, else the direction.
//! Integer keys and single products of f32 decide, so positions and trade counts are the same on every device.
//!
//! Shapes   price [2,A,T]: closes, then fills; returns [A,T−1]; keys [A,T,rows]; inverse_volatility [A,T,volatility_rows];
//!          sets [tiles·TILE, 16] (row a, row b or lookback, threshold a, threshold b, first bar, side, target, leverage, volatility row or
//!          NONE, stop_loss, take_profit, trailing_stop, max_holding; 1e30 and 2³²−1 where a stop is off); plan = edges [E] then scales [A];
//!          stats [A,tiles,5,TILE] (sharpe per bar, total return, max drawdown, turnover, trades); prefix [A,tiles,E,4,TILE]: sum and sum of
//!          squares of net returns before each edge as 64-bit fixed-point, in units of 2^(scale−shift) and 2^(2·scale−shift);
//!          `backtest_stitch`: net [2,A,stitched], net returns then weights; activity [A,windows,pieces,2], turnover and trades.
//! Launch   `backtest_sweep`: workgroup = (asset, tile of TILE sets), thread = set, sequential over bars: nothing of size sets × time.
//!          `backtest_stitch`: thread = (asset, window, piece of it) replays the chosen set and writes its net returns over the stitched bars.
//! Scratch  prefix; memory is inputs + sets × metrics, whatever T.
//! Floor    11 instructions per set and bar where neither stops nor sizes are asked for: compare, change, earn, pay, four sums of which two are
//!          fused multiply-adds, drawdown (fused multiply-add, two minima); two key loads. About 30 with stops and sizes.
//! Numerics plain f32 inside blocks of 128 bars that restart at every edge, 64-bit integers across them: a window is an exact
//!          difference, equal positions give equal bits. Products that are summed are fused multiply-adds on every device, so that no
//!          compiler has anything left to contract. Drawdown by level = min(level·(1+net), 1), rounding restarts at each peak.
//! Ladder   sweep_sma, 1M pairs × 2,520 bars. CPU, 2 threads, AVX-512: plain lanes 0.29 G pair-bars/s; explicit vectors over blocks of 64 bars
//!          2.3 (busy machine) to 3.4; two vectors side by side and packed keys 4.8 to 5.3; tiles over (fast × slow), four vectors side by
//!          side, bars before the warm-up not visited 6.0; blocks of 128 bars 6.9; results handed out after every launch, so that its memory
//!          is used again while warm, 8.8; state in registers over 2,560 bars, nine instructions a bar, sums converted by vectors, vectors across
//!          the ends of runs 10.0 (same run, quiet machine). What is left: the bar loop takes 5.3 cycles a vector of 16 where Zen 4, which runs
//!          512 bits in two halves, needs 4.5, and is 60 % of the simulation; a quarter is packing keys.
//!          WGSL on llvmpipe: branches in the bar loop 0.06
//!          on a busy machine, without them 0.14 there and 0.22 to 0.29 on a quiet one: three loads a bar, each a loop over
//!          eight lanes there. CUDA: not measured yet.
//! Source   definitions as in the conformance files; stops as in most back-testers, on closes.
//! Files    shaders/backtest.wgsl · cuda/backtest.cu · reference: the `_cpu` functions, lane-wise: `backtest_lanes.rs`

use crate::Result;
use crate::backtest_lanes::backtest_sweep_lanes;
use crate::conformance::UNDEFINED;
use crate::fixed::{scaled_variance, to_fixed};
use crate::kernel::{Cost, Cpu, CpuLaunch, Kernel, layout, params_of, reads, reads_u32, writes, writes_u32};
use crate::real::Real;
use rayon::prelude::*;

params! {
    /// Params of both kernels.
    pub struct BacktestParams {
        /// Assets.
        a: u32,
        /// Bars.
        t: u32,
        /// Rows of the table.
        rows: u32,
        /// Tiles of sets (`backtest_sweep`) or windows (`backtest_stitch`).
        tiles: u32,
        /// Edges of the plan.
        edges: u32,
        /// Machine: 0 cross, 1 band, 2 momentum.
        mode: u32,
        /// Bars between decision and trade.
        lag: u32,
        /// First counted bar of the return index.
        start: u32,
        /// Fractional bits of the fixed-point sums.
        shift: u32,
        /// XORed to the entry key of the band machine.
        mask: u32,
        /// One-way cost as a fraction of traded notional …
        cost: f32,
        /// … and what rounding to f32 took away, which only the f64 reference feels.
        cost_low: f32,
        /// `backtest_stitch`: 0 if all assets share their windows' choice, else 1.
        per_asset: u32,
        /// `backtest_stitch`: bars of the stitched series.
        stitched: u32,
        /// Rows of the volatility table.
        volatility_rows: u32,
        /// Whether any set is sized, goes short or has stops: 1, else 0.
        general: u32,
        /// `backtest_stitch`: bars that a thread replays where a weight depends on no earlier decision; 0 where it does, and each thread
        /// walks from bar 0 to the end of its window.
        piece: u32,
        /// `backtest_stitch`: threads of a window.
        pieces: u32,
    }
}

/// Sets per tile: threads of a workgroup.
pub const TILE: usize = 64;
/// Statistics per set and asset.
pub const STATS: usize = 5;
/// Words per set.
pub const SET_WORDS: usize = 16;
/// Word of a volatility row or a holding time that is not there.
pub const OFF: u32 = u32::MAX;
/// Fraction of a stop that is off: no price is that far.
pub const NO_STOP: f32 = 1e30;
/// Side of a set: long or flat.
pub const LONG: u32 = 0;
/// Side of a set: long or short.
pub const BOTH: u32 = 1;
/// Side of a set: short or flat.
pub const SHORT: u32 = 2;
/// Mode of the cross machine.
pub const CROSS: u32 = 0;
/// Mode of the band machine.
pub const BAND: u32 = 1;
/// Mode of the momentum machine.
pub const MOMENTUM: u32 = 2;
/// Bars per block of plain sums.
pub(crate) const BLOCK: usize = 128;
/// Offset of the scales in the plan, so that they are words.
pub const SCALE_BIAS: i32 = 512;

fn params(words: &[u32]) -> BacktestParams {
    params_of(words).unwrap_or(bytemuck::Zeroable::zeroed())
}

/// Simulates every set of every tile on every asset.
pub static BACKTEST_SWEEP: Kernel = Kernel {
    name: "backtest_sweep",
    about: "back-tests and statistics of many parameter sets",
    args: &[
        reads("price"),
        reads("returns"),
        reads_u32("keys"),
        reads("inverse_volatility"),
        reads_u32("sets"),
        reads_u32("plan"),
        writes("stats"),
        writes_u32("prefix"),
    ],
    params: layout::<BacktestParams>(),
    workgroup: TILE as u32,
    constants: &[],
    groups: |words| u64::from(params(words).a) * u64::from(params(words).tiles),
    wgsl: wgsl!("backtest"),
    cuda: cuda!("backtest"),
    cpu: Some(Cpu { f32: backtest_sweep_lanes, f64: backtest_sweep_cpu::<f64> }),
    cost: Cost {
        unit: "set-bar",
        units: |words| u64::from(params(words).a) * u64::from(params(words).tiles) * TILE as u64 * u64::from(params(words).t.max(1) - 1),
        // Keys are shared: from the cache.
        bytes: 0.0,
        flops: 13.0,
    },
};

/// Replays the chosen set of every window and writes its net returns.
pub static BACKTEST_STITCH: Kernel = Kernel {
    name: "backtest_stitch",
    about: "net returns of the chosen sets, stitched out of sample",
    args: &[
        reads("price"),
        reads("returns"),
        reads_u32("keys"),
        reads("inverse_volatility"),
        reads_u32("sets"),
        reads_u32("windows"),
        writes("net"),
        writes("activity"),
    ],
    params: layout::<BacktestParams>(),
    workgroup: TILE as u32,
    constants: &[],
    groups: |words| (u64::from(params(words).a) * u64::from(params(words).tiles) * u64::from(params(words).pieces)).div_ceil(TILE as u64),
    wgsl: wgsl!("backtest"),
    cuda: cuda!("backtest"),
    cpu: Some(Cpu { f32: backtest_stitch_cpu::<f32>, f64: backtest_stitch_cpu::<f64> }),
    cost: Cost {
        unit: "set-bar",
        units: |words| u64::from(params(words).a) * u64::from(params(words).tiles) * u64::from(params(words).t.max(1) - 1),
        bytes: 8.0,
        flops: 8.0,
    },
};

/// One asset as the machines see it.
struct Market<'a, R> {
    close: &'a [R],
    fill: &'a [R],
    returns: &'a [R],
    keys: &'a [u32],
    inverse_volatility: &'a [R],
    rows: usize,
    volatility_rows: usize,
}

impl<'a, R> Market<'a, R> {
    fn of(p: &BacktestParams, a: usize, price: &'a [R], returns: &'a [R], keys: &'a [u32], inverse_volatility: &'a [R]) -> Market<'a, R> {
        let (t, assets, rows, volatility_rows) = (p.t as usize, p.a as usize, p.rows as usize, p.volatility_rows as usize);
        let table = |len: usize, rows: usize| if len >= assets * t * rows { a * t * rows..(a + 1) * t * rows } else { 0..0 };
        Market {
            close: &price[a * t..(a + 1) * t],
            fill: &price[(assets + a) * t..(assets + a + 1) * t],
            returns: &returns[a * (t - 1)..(a + 1) * (t - 1)],
            keys: &keys[table(keys.len(), rows)],
            inverse_volatility: &inverse_volatility[table(inverse_volatility.len(), volatility_rows)],
            rows,
            volatility_rows,
        }
    }
}

/// One parameter set.
struct Set<R> {
    a: usize,
    b: usize,
    threshold_a: u32,
    threshold_b: u32,
    first: usize,
    side: u32,
    target: R,
    leverage: R,
    volatility_row: u32,
    stop_loss: f32,
    take_profit: f32,
    trailing_stop: f32,
    max_holding: u32,
}

impl<R: Real> Set<R> {
    fn of(words: &[u32]) -> Set<R> {
        let real = |i: usize| f32::from_bits(words[i]);
        Set {
            a: words[0] as usize,
            b: words[1] as usize,
            threshold_a: words[2],
            threshold_b: words[3],
            first: words[4] as usize,
            side: words[5],
            target: R::of(f64::from(real(6))),
            leverage: R::of(f64::from(real(7))),
            volatility_row: words[8],
            stop_loss: real(9),
            take_profit: real(10),
            trailing_stop: real(11),
            max_holding: words[12],
        }
    }

    /// The machine's direction at bar t, from the one before.
    #[inline(always)]
    fn direction<const MODE: u32>(&self, mask: u32, m: &Market<'_, R>, t: usize, before: i32) -> i32 {
        if t < self.first {
            return 0;
        }
        if MODE == BAND {
            let keys = &m.keys[t * m.rows..][..m.rows];
            let (enters, leaves) = ((keys[self.a] ^ mask) > self.threshold_a, keys[self.b] > self.threshold_b);
            return match (before > 0, enters, leaves) {
                (false, true, _) => i32::from(self.side != SHORT),
                (_, _, true) => -i32::from(self.side != LONG),
                _ => before,
            };
        }
        let sign = if MODE == CROSS {
            let keys = &m.keys[t * m.rows..][..m.rows];
            if keys[self.a] > keys[self.b] { 1 } else { -1 }
        } else {
            let (now, then) = (m.close[t], m.close[t - self.b]);
            i32::from(now > then) - i32::from(now < then)
        };
        match self.side {
            LONG => sign.max(0),
            SHORT => sign.min(0),
            _ => sign,
        }
    }

    fn has_stops(&self) -> bool {
        self.max_holding != OFF || [self.stop_loss, self.take_profit, self.trailing_stop].iter().any(|&stop| stop < NO_STOP)
    }

    /// Whether the position of `run`, not 0, is stopped by the close p.
    fn stopped(&self, run: &Run<R>, p: f32) -> bool {
        let h = run.held as f32;
        let level = |from: f32, distance: f32| h * (from * (1.0 + h * distance));
        h * p <= level(run.entry, -self.stop_loss)
            || h * p >= level(run.entry, self.take_profit)
            || h * p <= level(run.best, -self.trailing_stop)
            || run.age >= self.max_holding
    }
}

/// One simulation: what lasts, and the plain sums of a block.
struct Run<R> {
    /// The machine's direction.
    signal: i32,
    /// The direction held, after stops.
    held: i32,
    /// The direction that was stopped, 0 if none.
    blocked: i32,
    entry: f32,
    best: f32,
    age: u32,
    weight: R,
    sum: R,
    square: R,
    growth: R,
    level: R,
    lowest: R,
    turnover: R,
    trades: u32,
    sums: i64,
    squares: u64,
    mantissa: f64,
    exponent: i32,
    total_turnover: R,
}

impl<R: Real> Run<R> {
    fn new() -> Run<R> {
        Run {
            signal: 0,
            held: 0,
            blocked: 0,
            entry: 0.0,
            best: 0.0,
            age: 0,
            weight: R::ZERO,
            sum: R::ZERO,
            square: R::ZERO,
            growth: R::ONE,
            level: R::ONE,
            lowest: R::ONE,
            turnover: R::ZERO,
            trades: 0,
            sums: 0,
            squares: 0,
            mantissa: 1.0,
            exponent: 0,
            total_turnover: R::ZERO,
        }
    }

    /// The weight over bar j, decided at bar t.
    #[inline(always)]
    fn decide(&mut self, set: &Set<R>, m: &Market<'_, R>, j: usize, t: usize) -> R {
        let close = m.close[t].f32();
        if self.held != 0 {
            self.age += 1;
            self.best = if self.held > 0 { self.best.max(close) } else { self.best.min(close) };
            if set.stopped(self, close) {
                self.blocked = self.held;
            }
        }
        if self.signal != self.blocked {
            self.blocked = 0;
        }
        let held = if self.blocked == 0 { self.signal } else { 0 };
        if held != self.held && held != 0 {
            (self.entry, self.best, self.age) = (m.fill[j].f32(), m.fill[j].f32(), 0);
        }
        self.held = held;
        let size = if set.volatility_row == OFF {
            R::ONE
        } else {
            (set.target * m.inverse_volatility[t * m.volatility_rows + set.volatility_row as usize]).min(set.leverage)
        };
        if held == 0 { R::ZERO } else { R::of(f64::from(held)) * size }
    }

    /// Bar j: decide, pay, earn.
    #[inline(always)]
    fn bar<const MODE: u32>(&mut self, p: &BacktestParams, cost: R, set: &Set<R>, m: &Market<'_, R>, j: usize) {
        let mut weight = R::ZERO;
        if j >= p.lag as usize {
            let t = j - p.lag as usize;
            self.signal = set.direction::<MODE>(p.mask, m, t, self.signal);
            if j >= p.start as usize {
                weight = self.decide(set, m, j, t);
            }
        }
        if j < p.start as usize {
            return;
        }
        let traded = (weight - self.weight).abs();
        let net = weight.mul_add(m.returns[j], -(cost * traded));
        self.weight = weight;
        self.turnover += traded;
        self.trades += u32::from(traded > R::ZERO);
        self.sum += net;
        self.square = net.mul_add(net, self.square);
        self.growth = self.growth.mul_add(net, self.growth);
        let level = self.level.mul_add(net, self.level);
        self.level = if level < R::ONE { level } else { R::ONE };
        self.lowest = if self.level < self.lowest { self.level } else { self.lowest };
    }

    /// Moves a block's plain sums into the exact ones.
    fn flush(&mut self, shift: i32, scale: i32) {
        self.sums += to_fixed(self.sum.f64(), shift - scale);
        self.squares += to_fixed(self.square.f64(), shift - 2 * scale) as u64;
        self.mantissa *= self.growth.f64();
        let size = self.mantissa.abs();
        if !(1e-100..1e100).contains(&size) && size > 0.0 {
            let power = size.log2().floor() as i32;
            self.mantissa *= 2f64.powi(-power);
            self.exponent += power;
        }
        self.total_turnover += self.turnover;
        (self.sum, self.square, self.growth, self.turnover) = (R::ZERO, R::ZERO, R::ONE, R::ZERO);
    }
}

/// Sharpe ratio per bar of n bars.
pub fn sharpe_of(n: u64, sum: i64, squares: u64, shift: u32) -> f64 {
    let variance = if n < 2 { 0 } else { scaled_variance(n, sum, squares, shift) };
    if variance == 0 { UNDEFINED } else { sum as f64 * ((n - 1) as f64 / (n as f64 * variance as f64)).sqrt() }
}

fn simulate<R: Real, const MODE: u32>(
    p: &BacktestParams,
    set: &Set<R>,
    m: &Market<'_, R>,
    edges: &[u32],
    scale: i32,
    at_edge: &mut dyn FnMut(usize, &Run<R>),
) -> Run<R> {
    let mut run = Run::new();
    let cost = R::of(f64::from(p.cost)) + R::of(f64::from(p.cost_low));
    let mut j = 0;
    for e in 0..=edges.len() {
        let end = edges.get(e).map_or(m.returns.len(), |&edge| edge as usize);
        while j < end {
            let stop = end.min(j + BLOCK);
            for j in j..stop {
                run.bar::<MODE>(p, cost, set, m, j);
            }
            run.flush(p.shift as i32, scale);
            j = stop;
        }
        if e < edges.len() {
            at_edge(e, &run);
        }
    }
    run
}

pub(crate) fn backtest_sweep_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: BacktestParams = launch.params()?;
    let (price, returns, keys, inverse_volatility) = (launch.real()?, launch.real()?, launch.word()?, launch.real()?);
    let (sets, plan) = (launch.word()?, launch.word()?);
    let (stats, prefix) = (launch.real_mut()?, launch.word_mut()?);
    let (tiles, edges) = (p.tiles as usize, p.edges as usize);
    let (edges, scales) = plan.split_at(edges);
    // Without edges there is nothing to keep: tiles past the end of `prefix` get an empty part.
    let per_tile = edges.len() * 4 * TILE;
    let parts = prefix.par_chunks_mut(per_tile.max(1)).take(if per_tile == 0 { 0 } else { p.a as usize * tiles });
    let parts = parts.chain((0..p.a as usize * tiles).into_par_iter().map(|_| -> &mut [u32] { &mut [] }));
    let work = stats.par_chunks_exact_mut(STATS * TILE).zip(parts).enumerate();
    work.take(p.a as usize * tiles).for_each(|(i, (stats, prefix))| {
        let (a, tile) = (i / tiles, i % tiles);
        let market = Market::of(&p, a, price, returns, keys, inverse_volatility);
        let simulate = match p.mode {
            CROSS => simulate::<R, CROSS>,
            BAND => simulate::<R, BAND>,
            _ => simulate::<R, MOMENTUM>,
        };
        for (l, words) in sets[tile * TILE * SET_WORDS..][..TILE * SET_WORDS].chunks_exact(SET_WORDS).enumerate() {
            let run = simulate(&p, &Set::of(words), &market, edges, scales[a] as i32 - SCALE_BIAS, &mut |e, run| {
                let (sum, square) = (run.sums as u64, run.squares);
                for (k, word) in [sum as u32, (sum >> 32) as u32, square as u32, (square >> 32) as u32].into_iter().enumerate() {
                    prefix[(e * 4 + k) * TILE + l] = word;
                }
            });
            let counted = (market.returns.len() as u64).saturating_sub(u64::from(p.start));
            let growth = run.mantissa * 2f64.powi(run.exponent);
            let values = [
                R::of(sharpe_of(counted, run.sums, run.squares, p.shift)),
                R::of(growth - 1.0),
                R::ONE - run.lowest,
                run.total_turnover,
                R::of(f64::from(run.trades)),
            ];
            for (k, value) in values.into_iter().enumerate() {
                stats[k * TILE + l] = value;
            }
        }
    });
    Ok(())
}

fn backtest_stitch_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: BacktestParams = launch.params()?;
    let (price, returns, keys, inverse_volatility) = (launch.real()?, launch.real()?, launch.word()?, launch.real()?);
    let (sets, windows) = (launch.word()?, launch.word()?);
    let (net, activity) = (launch.real_mut()?, launch.real_mut()?);
    let (count, stitched) = (p.tiles as usize, p.stitched as usize);
    let cost = R::of(f64::from(p.cost)) + R::of(f64::from(p.cost_low));
    let (net, weights) = net.split_at_mut(p.a as usize * stitched);
    let pieces = p.pieces as usize;
    let rows = net.par_chunks_exact_mut(stitched).zip(weights.par_chunks_exact_mut(stitched)).zip(activity.par_chunks_exact_mut(2 * count * pieces));
    rows.enumerate().take(p.a as usize).for_each(|(a, ((net, weights), activity))| {
        let market = Market::of(&p, a, price, returns, keys, inverse_volatility);
        for (w, window) in windows.chunks_exact(3).take(count).enumerate() {
            let slot = a * p.per_asset as usize * count + w;
            let set = Set::of(&sets[slot * SET_WORDS..][..SET_WORDS]);
            let replay = match p.mode {
                CROSS => replay::<R, CROSS>,
                BAND => replay::<R, BAND>,
                _ => replay::<R, MOMENTUM>,
            };
            let (from, to, offset) = (window[0] as usize, window[1] as usize, window[2] as usize);
            for (k, activity) in activity[2 * w * pieces..2 * (w + 1) * pieces].chunks_exact_mut(2).enumerate() {
                let begin = to.min(from + k * p.piece as usize);
                let end = if p.piece == 0 { to } else { to.min(begin + p.piece as usize) };
                let part = offset + begin - from..offset + end - from;
                let (turnover, trades) = replay(&p, cost, &set, &market, begin..end, &mut net[part.clone()], &mut weights[part]);
                activity[0] = turnover;
                activity[1] = R::of(f64::from(trades));
            }
        }
    });
    Ok(())
}

/// Net returns and weights over `bars`, simulated from bar 0 or, in pieces, from the bar before; turnover and trades inside `bars`.
fn replay<R: Real, const MODE: u32>(
    p: &BacktestParams,
    cost: R,
    set: &Set<R>,
    m: &Market<'_, R>,
    bars: std::ops::Range<usize>,
    net: &mut [R],
    weights: &mut [R],
) -> (R, u32) {
    let mut run = Run::new();
    // A direction that knows nothing of earlier ones: one bar before is enough.
    let first = if MODE == BAND || set.has_stops() { 0 } else { bars.start.saturating_sub(1) };
    for j in first..bars.end {
        if j == bars.start {
            (run.turnover, run.trades) = (R::ZERO, 0);
        }
        run.sum = R::ZERO;
        run.bar::<MODE>(p, cost, set, m, j);
        if j >= bars.start {
            net[j - bars.start] = run.sum;
            weights[j - bars.start] = run.weight;
        }
    }
    (run.turnover, run.trades)
}
