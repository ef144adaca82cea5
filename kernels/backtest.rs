//! Back-tests of many parameter sets: simulation fused with its statistics, and the replay of chosen sets.
//!
//! Bar j earns r_j = p_{j+1}/p_j − 1. With w_j the weight held over it, decided at bar j (`lag` 0) or one bar before (`lag` 1):
//! net_j = w_j·r_j − cost·|w_j − w_{j−1}|, w before bar `start` is 0, no closing trade. Weights come from one of three machines:
//! * cross:    w = 1 if key_a > key_b, else −1 if the set may go short, else 0;
//! * band:     from 0 to 1 when (key_a ⊕ mask) > threshold_a, from 1 to 0 when key_b > threshold_b;
//! * momentum: sign(p_t − p_{t−lookback})·min(target·inverse_volatility_row, leverage);
//!
//! all of them 0 before the set's first legal bar. Integer keys decide, so positions and trade counts are the same on every device.
//!
//! Shapes   price [A,T]; returns [A,T−1]; keys, inverse_volatility [A,T,rows]; sets [tiles·TILE, 8] (row a, row b or lookback, threshold a,
//!          threshold b, first bar, short, target, leverage); plan = edges [E] then scales [A]; stats [A,tiles,5,TILE] (sharpe per
//!          bar, total return, max drawdown, turnover, trades); prefix [A,tiles,E,4,TILE]: sum and sum of squares of net returns before
//!          each edge as 64-bit fixed-point, in units of 2^(scale−shift) and 2^(2·scale−shift); net [2,A,stitched]: net returns, then
//!          the weights held.
//! Launch   `backtest_sweep`: workgroup = (asset, tile of TILE sets), thread = set, sequential over bars: nothing of size sets × time.
//!          `backtest_stitch`: thread = (asset, window) replays the chosen set and writes its net returns and weights over the stitched bars.
//! Scratch  prefix; memory is inputs + sets × metrics, whatever T.
//! Floor    10-13 instructions per set and bar: two key loads, compare, select, two sums, growth, drawdown.
//! Numerics plain f32 inside blocks of 64 bars that restart at every edge, 64-bit integers across them: a window is an exact
//!          difference, equal positions give equal bits. Drawdown by level = min(level·(1+net), 1), rounding restarts at each peak.
//! Ladder   sweep_sma, 1M pairs × 2,520 bars. CPU, 2 threads, AVX-512: plain lanes 0.29 G pair-bars/s; explicit vectors over blocks of 64 bars
//!          2.3 (busy machine) to 3.4; two vectors side by side and packed keys 4.8 to 5.3. WGSL on llvmpipe: branches in the bar loop 0.06
//!          on a busy machine, without them 0.14 there and 0.22 on a quiet one. CUDA: not measured yet.
//! Source   definitions as in the conformance files.
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
    }
}

/// Sets per tile: threads of a workgroup.
pub const TILE: usize = 64;
/// Statistics per set and asset.
pub const STATS: usize = 5;
/// Words per set.
pub const SET_WORDS: usize = 8;
/// Mode of the cross machine.
pub const CROSS: u32 = 0;
/// Mode of the band machine.
pub const BAND: u32 = 1;
/// Mode of the momentum machine.
pub const MOMENTUM: u32 = 2;
/// Bars per block of plain sums.
pub(crate) const BLOCK: usize = 64;
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
    groups: |words| (u64::from(params(words).a) * u64::from(params(words).tiles)).div_ceil(TILE as u64),
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
    price: &'a [R],
    returns: &'a [R],
    keys: &'a [u32],
    inverse_volatility: &'a [R],
    rows: usize,
}

impl<'a, R> Market<'a, R> {
    fn of(p: &BacktestParams, a: usize, price: &'a [R], returns: &'a [R], keys: &'a [u32], inverse_volatility: &'a [R]) -> Market<'a, R> {
        let (t, rows) = (p.t as usize, p.rows as usize);
        let table = |len: usize| if len == p.a as usize * t * rows { a * t * rows..(a + 1) * t * rows } else { 0..0 };
        Market {
            price: &price[a * t..(a + 1) * t],
            returns: &returns[a * (t - 1)..(a + 1) * (t - 1)],
            keys: &keys[table(keys.len())],
            inverse_volatility: &inverse_volatility[table(inverse_volatility.len())],
            rows,
        }
    }
}

/// Lanes of the plain column.
const LANES: usize = 16;

/// L parameter sets side by side, one array per word.
struct Sets<R, const L: usize> {
    a: [usize; L],
    b: [usize; L],
    threshold_a: [u32; L],
    threshold_b: [u32; L],
    first: [usize; L],
    short: [R; L],
    target: [R; L],
    leverage: [R; L],
}

impl<R: Real, const L: usize> Sets<R, L> {
    fn of(words: &[u32]) -> Sets<R, L> {
        let word = |i: usize| std::array::from_fn(|l| words.get(l * SET_WORDS + i).copied().unwrap_or(0));
        let real = |i: usize| word(i).map(|w| R::of(f64::from(f32::from_bits(w))));
        let short = word(5).map(|s| if s == 1 { -R::ONE } else { R::ZERO });
        Sets {
            a: word(0).map(|x| x as usize),
            b: word(1).map(|x| x as usize),
            threshold_a: word(2),
            threshold_b: word(3),
            first: word(4).map(|x| x as usize),
            short,
            target: real(6),
            leverage: real(7),
        }
    }

    /// Moves the positions `w` to those decided at bar t.
    #[inline(always)]
    fn decide<const MODE: u32>(&self, mask: u32, m: &Market<'_, R>, t: usize, w: &mut [R; L]) {
        let (keys, inverse_volatility) =
            if MODE == MOMENTUM { (m.keys, &m.inverse_volatility[t * m.rows..][..m.rows]) } else { (&m.keys[t * m.rows..][..m.rows], m.inverse_volatility) };
        for l in 0..L {
            let legal = t >= self.first[l];
            w[l] = match MODE {
                CROSS => {
                    let position = if keys[self.a[l]] > keys[self.b[l]] { R::ONE } else { self.short[l] };
                    if legal { position } else { R::ZERO }
                }
                BAND => {
                    let enters = legal && (keys[self.a[l]] ^ mask) > self.threshold_a[l];
                    let stays = keys[self.b[l]] <= self.threshold_b[l];
                    let holds = if w[l] == R::ZERO { enters } else { stays };
                    if holds { R::ONE } else { R::ZERO }
                }
                _ if legal => {
                    let (now, then) = (m.price[t], m.price[t - self.b[l]]);
                    let size = (self.target[l] * inverse_volatility[self.a[l]]).min(self.leverage[l]);
                    if now > then {
                        size
                    } else if now < then {
                        -size
                    } else {
                        R::ZERO
                    }
                }
                _ => R::ZERO,
            };
        }
    }
}

/// Running state of their simulations.
struct Run<R, const L: usize> {
    signal: [R; L],
    weight: [R; L],
    sum: [R; L],
    square: [R; L],
    growth: [R; L],
    level: [R; L],
    lowest: [R; L],
    turnover: [R; L],
    trades: [u32; L],
    sums: [i64; L],
    squares: [u64; L],
    mantissa: [f64; L],
    exponent: [i32; L],
    total_turnover: [R; L],
}

impl<R: Real, const L: usize> Run<R, L> {
    fn new() -> Run<R, L> {
        Run {
            signal: [R::ZERO; L],
            weight: [R::ZERO; L],
            sum: [R::ZERO; L],
            square: [R::ZERO; L],
            growth: [R::ONE; L],
            level: [R::ONE; L],
            lowest: [R::ONE; L],
            turnover: [R::ZERO; L],
            trades: [0; L],
            sums: [0; L],
            squares: [0; L],
            mantissa: [1.0; L],
            exponent: [0; L],
            total_turnover: [R::ZERO; L],
        }
    }

    /// Bar j: decide, pay, earn.
    #[inline(always)]
    fn bar<const MODE: u32>(&mut self, p: &BacktestParams, cost: R, sets: &Sets<R, L>, m: &Market<'_, R>, j: usize) {
        if j >= p.lag as usize {
            sets.decide::<MODE>(p.mask, m, j - p.lag as usize, &mut self.signal);
        }
        if j < p.start as usize {
            return;
        }
        let r = m.returns[j];
        for l in 0..L {
            let traded = (self.signal[l] - self.weight[l]).abs();
            let net = self.signal[l] * r - cost * traded;
            self.weight[l] = self.signal[l];
            self.turnover[l] += traded;
            self.trades[l] += u32::from(traded > R::ZERO);
            self.sum[l] += net;
            self.square[l] += net * net;
            let factor = R::ONE + net;
            self.growth[l] *= factor;
            let level = self.level[l] * factor;
            self.level[l] = if level < R::ONE { level } else { R::ONE };
            self.lowest[l] = if self.level[l] < self.lowest[l] { self.level[l] } else { self.lowest[l] };
        }
    }

    /// Moves a block's plain sums into the exact ones.
    fn flush(&mut self, shift: i32, scale: i32) {
        for l in 0..L {
            self.sums[l] += to_fixed(self.sum[l].f64(), shift - scale);
            self.squares[l] += to_fixed(self.square[l].f64(), shift - 2 * scale) as u64;
            self.mantissa[l] *= self.growth[l].f64();
            let size = self.mantissa[l].abs();
            if !(1e-100..1e100).contains(&size) && size > 0.0 {
                let power = size.log2().floor() as i32;
                self.mantissa[l] *= 2f64.powi(-power);
                self.exponent[l] += power;
            }
            self.total_turnover[l] += self.turnover[l];
            (self.sum[l], self.square[l], self.growth[l], self.turnover[l]) = (R::ZERO, R::ZERO, R::ONE, R::ZERO);
        }
    }
}

/// Sharpe ratio per bar of n bars.
pub fn sharpe_of(n: u64, sum: i64, squares: u64, shift: u32) -> f64 {
    let variance = if n < 2 { 0 } else { scaled_variance(n, sum, squares, shift) };
    if variance == 0 { UNDEFINED } else { sum as f64 * ((n - 1) as f64 / (n as f64 * variance as f64)).sqrt() }
}

fn lanes<R: Real, const L: usize, const MODE: u32>(
    p: &BacktestParams,
    sets: &Sets<R, L>,
    m: &Market<'_, R>,
    edges: &[u32],
    scale: i32,
    mut at_edge: impl FnMut(usize, &Run<R, L>),
) -> Run<R, L> {
    let mut run = Run::new();
    let cost = R::of(f64::from(p.cost)) + R::of(f64::from(p.cost_low));
    let mut j = 0;
    for e in 0..=edges.len() {
        let end = edges.get(e).map_or(m.returns.len(), |&edge| edge as usize);
        while j < end {
            let stop = end.min(j + BLOCK);
            for j in j..stop {
                run.bar::<MODE>(p, cost, sets, m, j);
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

fn any_mode<R: Real, const L: usize>(
    p: &BacktestParams,
    sets: &Sets<R, L>,
    m: &Market<'_, R>,
    edges: &[u32],
    scale: i32,
    at_edge: impl FnMut(usize, &Run<R, L>),
) -> Run<R, L> {
    match p.mode {
        CROSS => lanes::<R, L, CROSS>(p, sets, m, edges, scale, at_edge),
        BAND => lanes::<R, L, BAND>(p, sets, m, edges, scale, at_edge),
        _ => lanes::<R, L, MOMENTUM>(p, sets, m, edges, scale, at_edge),
    }
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
        for base in (0..TILE).step_by(LANES) {
            let set: Sets<R, LANES> = Sets::of(&sets[(tile * TILE + base) * SET_WORDS..][..LANES * SET_WORDS]);
            let run = any_mode(&p, &set, &market, edges, scales[a] as i32 - SCALE_BIAS, |e, run| {
                for l in 0..LANES {
                    let (sum, square) = (run.sums[l] as u64, run.squares[l]);
                    for (k, word) in [sum as u32, (sum >> 32) as u32, square as u32, (square >> 32) as u32].into_iter().enumerate() {
                        prefix[(e * 4 + k) * TILE + base + l] = word;
                    }
                }
            });
            let counted = (market.returns.len() as u64).saturating_sub(u64::from(p.start));
            for l in 0..LANES {
                let growth = run.mantissa[l] * 2f64.powi(run.exponent[l]);
                let values = [
                    R::of(sharpe_of(counted, run.sums[l], run.squares[l], p.shift)),
                    R::of(growth - 1.0),
                    R::ONE - run.lowest[l],
                    run.total_turnover[l],
                    R::of(f64::from(run.trades[l])),
                ];
                for (k, value) in values.into_iter().enumerate() {
                    stats[k * TILE + base + l] = value;
                }
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
    let (net, weight) = net.split_at_mut(p.a as usize * stitched);
    let rows = net.par_chunks_exact_mut(stitched).zip(weight.par_chunks_exact_mut(stitched)).zip(activity.par_chunks_exact_mut(2 * count));
    rows.enumerate().take(p.a as usize).for_each(|(a, ((net, weight), activity))| {
        let market = Market::of(&p, a, price, returns, keys, inverse_volatility);
        for (w, window) in windows.chunks_exact(3).take(count).enumerate() {
            let slot = a * p.per_asset as usize * count + w;
            let set = Sets::of(&sets[slot * SET_WORDS..][..SET_WORDS]);
            let replay = match p.mode {
                CROSS => replay::<R, CROSS>,
                BAND => replay::<R, BAND>,
                _ => replay::<R, MOMENTUM>,
            };
            let (from, to, offset) = (window[0] as usize, window[1] as usize, window[2] as usize);
            let part = offset..offset + to - from;
            let (turnover, trades) = replay(&p, cost, &set, &market, from..to, &mut net[part.clone()], &mut weight[part]);
            activity[2 * w] = turnover;
            activity[2 * w + 1] = R::of(f64::from(trades));
        }
    });
    Ok(())
}

/// Net returns and weights of lane 0 over `bars`, simulated from bar 0; turnover and trades inside `bars`.
fn replay<R: Real, const MODE: u32>(
    p: &BacktestParams,
    cost: R,
    set: &Sets<R, 1>,
    m: &Market<'_, R>,
    bars: std::ops::Range<usize>,
    net: &mut [R],
    weight: &mut [R],
) -> (R, u32) {
    let mut run = Run::new();
    for j in 0..bars.end {
        if j == bars.start {
            (run.turnover, run.trades) = ([R::ZERO], [0]);
        }
        run.sum = [R::ZERO];
        run.bar::<MODE>(p, cost, set, m, j);
        if j >= bars.start {
            net[j - bars.start] = run.sum[0];
            weight[j - bars.start] = run.weight[0];
        }
    }
    (run.turnover[0], run.trades[0])
}
