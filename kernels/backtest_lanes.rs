//! The lane-wise f32 column of `backtest_sweep`: explicit vectors of the widest kind that the processor has, chosen at run time
//! (AVX-512, AVX2, NEON, scalar), the same bits on all of them and as the plain column in `backtest.rs`.
//!
//! Layout   a job is one asset and a run of tiles. Time goes in blocks of 64 bars: all vectors of the job pass over one block while
//!          its keys (64 × rows words) lie in the second-level cache, with their state in registers.
//! Keys     neighbouring sets mostly read neighbouring rows or the same row: one load or one broadcast a bar; anything else is
//!          gathered.
//! Machines positions 0 and 1 need no arithmetic: net = select(held, r) − select(changed, cost). Shorts and weights take the general
//!          path, w·r − cost·|Δw|.

use crate::backtest::{BAND, BLOCK, BacktestParams, CROSS, MOMENTUM, SCALE_BIAS, SET_WORDS, STATS, TILE, sharpe_of};
use crate::kernel::CpuLaunch;
use crate::{Error, Result};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

/// Most tiles of a job.
const JOB_TILES: usize = 16;
/// Widest vector that a gather fills.
const WIDEST: usize = 16;
/// Vectors side by side in the hot loop.
const PAIR: usize = 2;
const IOTA: [u32; WIDEST] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];

/// Where a vector's keys lie in a bar's row.
#[derive(Clone, Copy, PartialEq)]
enum Rows {
    /// One after the other from here.
    From(usize),
    /// All the same.
    Same(usize),
    /// Two runs of either kind: the second begins at this lane.
    Split(usize),
    /// Anywhere.
    Any,
}

impl Rows {
    fn of(rows: &[u32]) -> Rows {
        let breaks = rows.windows(2).filter(|r| r[1] != r[0]).count();
        let jumps: Vec<usize> = (1..rows.len()).filter(|&l| rows[l] != rows[l - 1] + 1).collect();
        match (breaks, jumps.as_slice()) {
            (0, _) => Rows::Same(rows[0] as usize),
            (_, []) => Rows::From(rows[0] as usize),
            (1, _) => Rows::Split(rows.windows(2).position(|r| r[1] != r[0]).map_or(0, |l| l + 1)),
            (_, [lane]) => Rows::Split(*lane),
            _ => Rows::Any,
        }
    }
}

/// The sets of a job, word by word.
struct Sets {
    a: Vec<u32>,
    b: Vec<u32>,
    threshold_a: Vec<u32>,
    threshold_b: Vec<u32>,
    first: Vec<u32>,
    short: Vec<f32>,
    target: Vec<f32>,
    leverage: Vec<f32>,
    any_short: bool,
}

impl Sets {
    fn of(words: &[u32]) -> Sets {
        let word = |i: usize| words.iter().skip(i).step_by(SET_WORDS).copied();
        let real = |i: usize| word(i).map(f32::from_bits).collect();
        let short: Vec<f32> = word(5).map(|s| if s == 1 { -1.0 } else { 0.0 }).collect();
        Sets {
            a: word(0).collect(),
            b: word(1).collect(),
            threshold_a: word(2).collect(),
            threshold_b: word(3).collect(),
            first: word(4).collect(),
            any_short: short.iter().any(|&s| s != 0.0),
            short,
            target: real(6),
            leverage: real(7),
        }
    }
}

/// State of all sets of a job between blocks, and the plain sums of the last one.
struct State {
    signal: Vec<f32>,
    weight: Vec<f32>,
    level: Vec<f32>,
    lowest: Vec<f32>,
    sum: Vec<f32>,
    square: Vec<f32>,
    growth: Vec<f32>,
    turnover: Vec<f32>,
    trades: Vec<f32>,
    sums: Vec<i64>,
    squares: Vec<u64>,
    mantissa: Vec<f64>,
    exponent: Vec<i32>,
    total_turnover: Vec<f32>,
    total_trades: Vec<f32>,
}

impl State {
    fn new(n: usize) -> State {
        let (zero, one) = (vec![0f32; n], vec![1f32; n]);
        State {
            signal: zero.clone(),
            weight: zero.clone(),
            level: one.clone(),
            lowest: one.clone(),
            sum: zero.clone(),
            square: zero.clone(),
            growth: one,
            turnover: zero.clone(),
            trades: zero.clone(),
            sums: vec![0; n],
            squares: vec![0; n],
            mantissa: vec![1.0; n],
            exponent: vec![0; n],
            total_turnover: zero.clone(),
            total_trades: zero,
        }
    }
}

/// One asset.
struct Market<'a> {
    price: &'a [f32],
    returns: &'a [f32],
    keys: &'a [u32],
    inverse_volatility: &'a [f32],
    rows: usize,
}

/// All vectors of a job over the bars `from..to` of one block.
struct Block<'a> {
    p: &'a BacktestParams,
    m: &'a Market<'a>,
    sets: &'a Sets,
    /// Rows a and b of each vector.
    plan: &'a [Rows],
    state: &'a mut State,
    scale: i32,
    from: usize,
    to: usize,
}

#[inline(always)]
fn load_f32<S: Simd>(x: &[f32], at: usize) -> S::f32s {
    S::as_simd_f32s(&x[at..at + S::F32_LANES]).0[0]
}

#[inline(always)]
fn load_u32<S: Simd>(x: &[u32], at: usize) -> S::u32s {
    S::as_simd_u32s(&x[at..at + S::U32_LANES]).0[0]
}

#[inline(always)]
fn store<S: Simd>(x: &mut [f32], at: usize, v: S::f32s) {
    S::as_mut_simd_f32s(&mut x[at..at + S::F32_LANES]).0[0] = v;
}

#[inline(always)]
fn keys_of<S: Simd>(simd: S, row: &[u32], rows: Rows, any: &[u32]) -> S::u32s {
    match rows {
        Rows::From(first) => load_u32::<S>(row, first),
        Rows::Same(at) => simd.splat_u32s(row[at]),
        Rows::Split(_) | Rows::Any => {
            let mut lanes = [0u32; WIDEST];
            for (lane, &r) in lanes.iter_mut().zip(any) {
                *lane = row[r as usize];
            }
            load_u32::<S>(&lanes, 0)
        }
    }
}

#[inline(always)]
fn gather(row: &[u32], any: &[u32], out: &mut [u32]) {
    for (key, &r) in out.iter_mut().zip(any) {
        *key = row[r as usize];
    }
}

impl WithSimd for Block<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        match (self.p.mode, self.sets.any_short) {
            (CROSS, false) => self.vectors::<S, CROSS, false>(simd),
            (CROSS, true) => self.vectors::<S, CROSS, true>(simd),
            (BAND, _) => self.vectors::<S, BAND, false>(simd),
            _ => self.vectors::<S, MOMENTUM, true>(simd),
        }
        self.flush();
    }
}

impl Block<'_> {
    #[inline(always)]
    fn vectors<S: Simd, const MODE: u32, const GENERAL: bool>(&mut self, simd: S) {
        let lanes = S::F32_LANES;
        let mut packed = [[0u32; BLOCK * WIDEST]; 2 * PAIR];
        for at in (0..self.sets.a.len()).step_by(PAIR * lanes) {
            let group = at..at + PAIR * lanes;
            let latest = self.sets.first[group.clone()].iter().copied().max().unwrap_or(0) as usize;
            let warm = self.from >= latest + self.p.lag as usize && self.from >= self.p.start as usize;
            let rows: [(Rows, Rows); PAIR] = std::array::from_fn(|v| (self.plan[2 * (at / lanes + v)], self.plan[2 * (at / lanes + v) + 1]));
            if warm && !GENERAL {
                if rows.iter().all(|(_, b)| matches!(b, Rows::Same(_))) {
                    self.pair::<S, MODE, true>(simd, at, rows, &mut packed);
                } else {
                    self.pair::<S, MODE, false>(simd, at, rows, &mut packed);
                }
            } else {
                for (v, (a, b)) in rows.into_iter().enumerate() {
                    if warm {
                        self.vector::<S, MODE, GENERAL, true>(simd, at + v * lanes, a, b);
                    } else {
                        self.vector::<S, MODE, GENERAL, false>(simd, at + v * lanes, a, b);
                    }
                }
            }
        }
    }

    /// The keys of one vector over the block as a slice and a stride: the table itself where its rows are neighbours, else `packed`.
    #[inline(always)]
    fn keys<'p, S: Simd>(&self, simd: S, rows: Rows, any: &[u32], packed: &'p mut [u32; BLOCK * WIDEST]) -> (&'p [u32], usize)
    where
        Self: 'p,
    {
        let (stride, lanes) = (self.m.rows, S::U32_LANES);
        let first = (self.from - self.p.lag as usize) * stride;
        let table: &'p [u32] = self.m.keys;
        match rows {
            Rows::From(row) => return (&table[first + row..], stride),
            Rows::Same(row) => {
                for (k, out) in packed.chunks_exact_mut(lanes).take(self.to - self.from).enumerate() {
                    out.fill(table[first + k * stride + row]);
                }
            }
            Rows::Split(lane) => {
                let second = simd.greater_than_or_equal_u32s(load_u32::<S>(&IOTA, 0), simd.splat_u32s(lane as u32));
                let (left, right) = (any[0] as usize, any[lane] as usize);
                let same = any[lane - 1] as usize == left && any[lanes - 1] as usize == right;
                for (k, out) in packed.chunks_exact_mut(lanes).take(self.to - self.from).enumerate() {
                    let at = first + k * stride;
                    let (from_left, from_right) = (at + left, at + right);
                    if same {
                        let keys = simd.select_u32s(second, simd.splat_u32s(table[from_right]), simd.splat_u32s(table[from_left]));
                        S::as_mut_simd_u32s(out).0[0] = keys;
                    } else if from_right >= lane && from_left.max(from_right) + lanes <= table.len() {
                        let keys = simd.select_u32s(second, load_u32::<S>(table, from_right - lane), load_u32::<S>(table, from_left));
                        S::as_mut_simd_u32s(out).0[0] = keys;
                    } else {
                        gather(&table[at..at + stride], any, out);
                    }
                }
            }
            Rows::Any => {
                for (k, out) in packed.chunks_exact_mut(lanes).take(self.to - self.from).enumerate() {
                    gather(&table[first + k * stride..first + (k + 1) * stride], any, out);
                }
            }
        }
        (&packed[..], lanes)
    }

    /// The hot loop: PAIR vectors of positions 0 and 1, side by side so that their chains of dependent instructions overlap.
    /// SAME: each vector's second row is one for all lanes.
    #[inline(always)]
    fn pair<S: Simd, const MODE: u32, const SAME: bool>(
        &mut self,
        simd: S,
        at: usize,
        rows: [(Rows, Rows); PAIR],
        packed: &mut [[u32; BLOCK * WIDEST]; 2 * PAIR],
    ) {
        let (lanes, n) = (S::F32_LANES, self.to - self.from);
        let (zero, one) = (simd.splat_f32s(0.0), simd.splat_f32s(1.0));
        let cost = simd.splat_f32s(self.p.cost + self.p.cost_low);
        let mask = simd.splat_u32s(self.p.mask);
        let lane = |v: usize| at + v * lanes..at + (v + 1) * lanes;
        let [p0, p1, p2, p3] = packed;
        let (sets, table, stride) = (self.sets, self.m.keys, self.m.rows);
        let first = (self.from - self.p.lag as usize) * stride;
        let a = [self.keys(simd, rows[0].0, &sets.a[lane(0)], p0), self.keys(simd, rows[1].0, &sets.a[lane(1)], p1)];
        let b = if SAME {
            rows.map(|(_, b)| (&table[first + if let Rows::Same(row) = b { row } else { 0 }..], stride))
        } else {
            [self.keys(simd, rows[0].1, &sets.b[lane(0)], p2), self.keys(simd, rows[1].1, &sets.b[lane(1)], p3)]
        };
        let returns = &self.m.returns[self.from..self.to];
        let state = &mut *self.state;
        let load = |x: &[f32]| -> [S::f32s; PAIR] { std::array::from_fn(|v| load_f32::<S>(x, at + v * lanes)) };
        let threshold_a: [S::u32s; PAIR] = std::array::from_fn(|v| load_u32::<S>(&sets.threshold_a, at + v * lanes));
        let threshold_b: [S::u32s; PAIR] = std::array::from_fn(|v| load_u32::<S>(&sets.threshold_b, at + v * lanes));
        // Before `start` a set may be in without holding anything.
        let mut inside: [S::m32s; PAIR] = load(&state.signal).map(|w| simd.greater_than_f32s(w, zero));
        let mut held: [S::m32s; PAIR] = load(&state.weight).map(|w| simd.greater_than_f32s(w, zero));
        let (mut level, mut lowest) = (load(&state.level), load(&state.lowest));
        let (mut sum, mut square, mut growth, mut turnover) = ([zero; PAIR], [zero; PAIR], [one; PAIR], [zero; PAIR]);
        for k in 0..n {
            let r = simd.splat_f32s(returns[k]);
            for v in 0..PAIR {
                // decide
                let key_a = load_u32::<S>(a[v].0, k * a[v].1);
                let key_b = if SAME { simd.splat_u32s(b[v].0[k * b[v].1]) } else { load_u32::<S>(b[v].0, k * b[v].1) };
                let on = if MODE == CROSS {
                    simd.greater_than_u32s(key_a, key_b)
                } else {
                    let enters = simd.greater_than_u32s(simd.xor_u32s(key_a, mask), threshold_a[v]);
                    let stays = simd.less_than_or_equal_u32s(key_b, threshold_b[v]);
                    simd.xor_m32s(enters, simd.and_m32s(inside[v], simd.xor_m32s(enters, stays)))
                };
                // pay and earn
                let changed = simd.xor_m32s(on, held[v]);
                (inside[v], held[v]) = (on, on);
                turnover[v] = simd.add_f32s(turnover[v], simd.select_f32s(changed, one, zero));
                let net = simd.sub_f32s(simd.select_f32s(on, r, zero), simd.select_f32s(changed, cost, zero));
                sum[v] = simd.add_f32s(sum[v], net);
                square[v] = simd.add_f32s(square[v], simd.mul_f32s(net, net));
                let factor = simd.add_f32s(one, net);
                growth[v] = simd.mul_f32s(growth[v], factor);
                level[v] = simd.min_f32s(simd.mul_f32s(level[v], factor), one);
                lowest[v] = simd.min_f32s(lowest[v], level[v]);
            }
        }
        for v in 0..PAIR {
            let weight = simd.select_f32s(held[v], one, zero);
            for (target, value) in [
                (&mut state.signal, weight),
                (&mut state.weight, weight),
                (&mut state.level, level[v]),
                (&mut state.lowest, lowest[v]),
                (&mut state.sum, sum[v]),
                (&mut state.square, square[v]),
                (&mut state.growth, growth[v]),
                (&mut state.turnover, turnover[v]),
                (&mut state.trades, turnover[v]),
            ] {
                store::<S>(target, at + v * lanes, value);
            }
        }
    }

    /// One vector over the block. WARM: every bar is legal for all lanes and counted.
    #[inline(always)]
    fn vector<S: Simd, const MODE: u32, const GENERAL: bool, const WARM: bool>(&mut self, simd: S, at: usize, a: Rows, b: Rows) {
        let (p, m, sets, state) = (self.p, self.m, self.sets, &mut *self.state);
        let lanes = S::F32_LANES;
        let (zero, one) = (simd.splat_f32s(0.0), simd.splat_f32s(1.0));
        let cost = simd.splat_f32s(p.cost + p.cost_low);
        let mask = simd.splat_u32s(p.mask);
        let (threshold_a, threshold_b) = (load_u32::<S>(&sets.threshold_a, at), load_u32::<S>(&sets.threshold_b, at));
        let (first, short) = (load_u32::<S>(&sets.first, at), load_f32::<S>(&sets.short, at));
        let (any_a, any_b) = (&sets.a[at..at + lanes], &sets.b[at..at + lanes]);
        let mut signal = load_f32::<S>(&state.signal, at);
        let mut weight = load_f32::<S>(&state.weight, at);
        let mut held = simd.greater_than_f32s(weight, zero);
        let mut level = load_f32::<S>(&state.level, at);
        let mut lowest = load_f32::<S>(&state.lowest, at);
        let (mut sum, mut square, mut growth, mut turnover, mut trades) = (zero, zero, one, zero, zero);
        for j in self.from..self.to {
            // decide
            let mut on = simd.greater_than_f32s(signal, zero);
            if WARM || j >= p.lag as usize {
                let t = j - p.lag as usize;
                match MODE {
                    CROSS => {
                        let row = &m.keys[t * m.rows..(t + 1) * m.rows];
                        on = simd.greater_than_u32s(keys_of(simd, row, a, any_a), keys_of(simd, row, b, any_b));
                        if GENERAL {
                            signal = simd.select_f32s(on, one, short);
                        }
                    }
                    BAND => {
                        let row = &m.keys[t * m.rows..(t + 1) * m.rows];
                        let enters = simd.greater_than_u32s(simd.xor_u32s(keys_of(simd, row, a, any_a), mask), threshold_a);
                        let stays = simd.less_than_or_equal_u32s(keys_of(simd, row, b, any_b), threshold_b);
                        // held ? stays : enters
                        on = simd.xor_m32s(enters, simd.and_m32s(on, simd.xor_m32s(enters, stays)));
                    }
                    _ => signal = momentum(simd, m, sets, at, t),
                }
                if !WARM {
                    let legal = simd.less_than_or_equal_u32s(first, simd.splat_u32s(t as u32));
                    on = simd.and_m32s(on, legal);
                    signal = simd.select_f32s(legal, signal, zero);
                }
                if !GENERAL {
                    signal = simd.select_f32s(on, one, zero);
                }
            }
            if !WARM && j < p.start as usize {
                continue;
            }
            // pay and earn
            let r = simd.splat_f32s(m.returns[j]);
            let net = if GENERAL {
                let traded = simd.abs_f32s(simd.sub_f32s(signal, weight));
                weight = signal;
                turnover = simd.add_f32s(turnover, traded);
                trades = simd.add_f32s(trades, simd.select_f32s(simd.greater_than_f32s(traded, zero), one, zero));
                simd.sub_f32s(simd.mul_f32s(signal, r), simd.mul_f32s(cost, traded))
            } else {
                let changed = simd.xor_m32s(on, held);
                held = on;
                turnover = simd.add_f32s(turnover, simd.select_f32s(changed, one, zero));
                simd.sub_f32s(simd.select_f32s(on, r, zero), simd.select_f32s(changed, cost, zero))
            };
            sum = simd.add_f32s(sum, net);
            square = simd.add_f32s(square, simd.mul_f32s(net, net));
            let factor = simd.add_f32s(one, net);
            growth = simd.mul_f32s(growth, factor);
            level = simd.min_f32s(simd.mul_f32s(level, factor), one);
            lowest = simd.min_f32s(lowest, level);
        }
        if !GENERAL {
            weight = simd.select_f32s(held, one, zero);
            trades = turnover;
        }
        for (target, value) in [
            (&mut state.signal, signal),
            (&mut state.weight, weight),
            (&mut state.level, level),
            (&mut state.lowest, lowest),
            (&mut state.sum, sum),
            (&mut state.square, square),
            (&mut state.growth, growth),
            (&mut state.turnover, turnover),
            (&mut state.trades, trades),
        ] {
            store::<S>(target, at, value);
        }
    }

    /// Moves the block's plain sums into the exact ones.
    #[inline(always)]
    fn flush(&mut self) {
        let s = &mut *self.state;
        let unit = 2f64.powi(self.p.shift as i32 - self.scale);
        let unit_square = 2f64.powi(self.p.shift as i32 - 2 * self.scale);
        for (total, &x) in s.sums.iter_mut().zip(&s.sum) {
            *total += (f64::from(x) * unit) as i64;
        }
        for (total, &x) in s.squares.iter_mut().zip(&s.square) {
            *total += (f64::from(x) * unit_square) as i64 as u64;
        }
        for (total, &x) in s.mantissa.iter_mut().zip(&s.growth) {
            *total *= f64::from(x);
        }
        for (total, &x) in s.total_turnover.iter_mut().zip(&s.turnover) {
            *total += x;
        }
        for (total, &x) in s.total_trades.iter_mut().zip(&s.trades) {
            *total += x;
        }
        // Rarely: keep the product within f64.
        for (mantissa, exponent) in s.mantissa.iter_mut().zip(&mut s.exponent) {
            if !(1e-100..1e100).contains(&mantissa.abs()) && *mantissa != 0.0 {
                let power = mantissa.abs().log2().floor() as i32;
                *mantissa *= 2f64.powi(-power);
                *exponent += power;
            }
        }
    }
}

/// Finds the rows of every vector, as wide as the processor's.
struct Planner<'a> {
    sets: &'a Sets,
}

impl WithSimd for Planner<'_> {
    type Output = Vec<Rows>;

    fn with_simd<S: Simd>(self, _: S) -> Vec<Rows> {
        let vectors = self.sets.a.chunks_exact(S::U32_LANES).zip(self.sets.b.chunks_exact(S::U32_LANES));
        vectors.flat_map(|(a, b)| [Rows::of(a), Rows::of(b)]).collect()
    }
}

/// sign(p_t − p_{t−lookback})·min(target·inverse_volatility, leverage); lanes before their lookback give anything.
#[inline(always)]
fn momentum<S: Simd>(simd: S, m: &Market<'_>, sets: &Sets, at: usize, t: usize) -> S::f32s {
    let lanes = S::F32_LANES;
    let row = &m.inverse_volatility[t * m.rows..(t + 1) * m.rows];
    let (mut inverse_volatility, mut then) = ([0f32; WIDEST], [0f32; WIDEST]);
    for l in 0..lanes {
        inverse_volatility[l] = row[sets.a[at + l] as usize];
        then[l] = m.price[t.saturating_sub(sets.b[at + l] as usize)];
    }
    let (now, then) = (simd.splat_f32s(m.price[t]), load_f32::<S>(&then, 0));
    let scaled = simd.mul_f32s(load_f32::<S>(&sets.target, at), load_f32::<S>(&inverse_volatility, 0));
    let size = simd.min_f32s(scaled, load_f32::<S>(&sets.leverage, at));
    let zero = simd.splat_f32s(0.0);
    let falling = simd.select_f32s(simd.less_than_f32s(now, then), simd.neg_f32s(size), zero);
    simd.select_f32s(simd.greater_than_f32s(now, then), size, falling)
}

/// What a job writes.
struct Job<'a> {
    asset: usize,
    tile: usize,
    stats: &'a mut [f32],
    prefix: &'a mut [u32],
}

/// The CPU entry of `backtest_sweep` in f32.
pub(crate) fn backtest_sweep_lanes(launch: CpuLaunch<'_, f32>) -> Result<()> {
    sweep_on(Arch::new(), launch)
}

fn sweep_on(arch: Arch, mut launch: CpuLaunch<'_, f32>) -> Result<()> {
    let p: BacktestParams = launch.params()?;
    let (price, returns, keys, inverse_volatility) = (launch.real()?, launch.real()?, launch.word()?, launch.real()?);
    let (sets, plan) = (launch.word()?, launch.word()?);
    let (stats, prefix) = (launch.real_mut()?, launch.word_mut()?);
    let (t, rows, tiles, assets) = (p.t as usize, p.rows as usize, p.tiles as usize, p.a as usize);
    let (edges, scales) = plan.split_at(p.edges as usize);
    if edges.windows(2).any(|e| e[0] >= e[1]) {
        return Err(Error::Internal("backtest_sweep: edges must ascend".into()));
    }
    let per_tile = edges.len() * 4 * TILE;
    let run = (tiles * assets / (4 * rayon::current_num_threads())).clamp(1, JOB_TILES);
    let mut jobs = Vec::new();
    let (mut stats, mut prefix) = (&mut stats[..assets * tiles * STATS * TILE], &mut prefix[..assets * tiles * per_tile]);
    for asset in 0..assets {
        for tile in (0..tiles).step_by(run) {
            let n = run.min(tiles - tile);
            let (s, more_stats) = std::mem::take(&mut stats).split_at_mut(n * STATS * TILE);
            let (q, more_prefix) = std::mem::take(&mut prefix).split_at_mut(n * per_tile);
            (stats, prefix) = (more_stats, more_prefix);
            jobs.push(Job { asset, tile, stats: s, prefix: q });
        }
    }
    let table = |len: usize, a: usize| if len >= assets * t * rows { a * t * rows..(a + 1) * t * rows } else { 0..0 };
    jobs.into_par_iter().for_each(|mut job| {
        let a = job.asset;
        let market = Market {
            price: &price[a * t..(a + 1) * t],
            returns: &returns[a * (t - 1)..(a + 1) * (t - 1)],
            keys: &keys[table(keys.len(), a)],
            inverse_volatility: &inverse_volatility[table(inverse_volatility.len(), a)],
            rows,
        };
        simulate(arch, &p, &market, sets, edges, scales[a] as i32 - SCALE_BIAS, &mut job);
    });
    Ok(())
}

fn simulate(arch: Arch, p: &BacktestParams, market: &Market<'_>, words: &[u32], edges: &[u32], scale: i32, job: &mut Job<'_>) {
    let n = job.stats.len() / STATS;
    let sets = Sets::of(&words[job.tile * TILE * SET_WORDS..][..n * SET_WORDS]);
    let mut state = State::new(n);
    let plan = arch.dispatch(Planner { sets: &sets });
    let mut j = 0;
    for e in 0..=edges.len() {
        let end = edges.get(e).map_or(market.returns.len(), |&edge| edge as usize);
        while j < end {
            let to = end.min(j + BLOCK);
            arch.dispatch(Block { p, m: market, sets: &sets, plan: &plan, state: &mut state, scale, from: j, to });
            j = to;
        }
        if e < edges.len() {
            for (tile, prefix) in job.prefix.chunks_exact_mut(edges.len() * 4 * TILE).enumerate() {
                let prefix = &mut prefix[e * 4 * TILE..(e + 1) * 4 * TILE];
                for l in 0..TILE {
                    let (sum, square) = (state.sums[tile * TILE + l] as u64, state.squares[tile * TILE + l]);
                    prefix[l] = sum as u32;
                    prefix[TILE + l] = (sum >> 32) as u32;
                    prefix[2 * TILE + l] = square as u32;
                    prefix[3 * TILE + l] = (square >> 32) as u32;
                }
            }
        }
    }
    let counted = (market.returns.len() as u64).saturating_sub(u64::from(p.start));
    for (tile, stats) in job.stats.chunks_exact_mut(STATS * TILE).enumerate() {
        for l in 0..TILE {
            let i = tile * TILE + l;
            stats[l] = sharpe_of(counted, state.sums[i], state.squares[i], p.shift) as f32;
            stats[TILE + l] = (state.mantissa[i] * 2f64.powi(state.exponent[i]) - 1.0) as f32;
            stats[2 * TILE + l] = 1.0 - state.lowest[i];
            stats[3 * TILE + l] = state.total_turnover[i];
            stats[4 * TILE + l] = state.total_trades[i];
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::backtest::{BACKTEST_SWEEP, backtest_sweep_cpu};
    use crate::kernel::{Cpu, Kernel};
    use crate::philox::philox4x32;
    use crate::{Device, View};

    static PLAIN: Kernel = Kernel { cpu: Some(Cpu { f32: backtest_sweep_cpu::<f32>, f64: backtest_sweep_cpu::<f64> }), ..BACKTEST_SWEEP };
    static SCALAR: Kernel = Kernel { cpu: Some(Cpu { f32: |launch| sweep_on(Arch::Scalar, launch), f64: backtest_sweep_cpu::<f64> }), ..BACKTEST_SWEEP };

    fn random(seed: u32, n: usize) -> Vec<u32> {
        (0..n).map(|i| philox4x32([i as u32, seed, 0, 0], [7, 0])[0]).collect()
    }

    fn run(kernel: &'static Kernel, p: &BacktestParams, rows: &[u32]) -> (Vec<u32>, Vec<u32>) {
        let device = Device::open("cpu").unwrap();
        let (a, t, tiles) = (p.a as usize, p.t as usize, p.tiles as usize);
        let unit = |w: u32| f64::from(w >> 8) as f32 / 16_777_216.0;
        let price: Vec<f32> = random(1, a * t).iter().map(|&w| 100.0 + (w % 8) as f32).collect();
        let returns: Vec<f32> = random(2, a * (t - 1)).iter().map(|&w| 0.1 * (unit(w) - 0.5)).collect();
        // Few distinct keys, so that ties occur.
        let keys: Vec<u32> = random(3, a * t * p.rows as usize).iter().map(|w| w % 5).collect();
        let inverse_volatility: Vec<f32> = random(4, keys.len()).iter().map(|&w| if w % 11 == 0 { 0.0 } else { 0.05 * unit(w) }).collect();
        let picks = random(5, tiles * TILE * 4);
        let set = |i: usize| {
            let w = &picks[4 * i..4 * i + 4];
            [rows[i % rows.len()], w[1] % p.rows.min(20), w[2] % 4, w[3] % 4, 20 + w[0] % 40, (w[0] >> 8) % 2, 0.1f32.to_bits(), 1.5f32.to_bits()]
        };
        let sets: Vec<u32> = (0..tiles * TILE).flat_map(set).collect();
        let mut plan = vec![0, 17, 64, 65, 200, t as u32 - 1];
        plan.truncate(p.edges as usize);
        plan.extend(vec![SCALE_BIAS as u32; a]);
        let f = |x: &[f32]| device.upload("x", x).unwrap();
        let u = |x: &[u32]| device.upload_u32("x", x).unwrap();
        let (stats, prefix) = (
            device.zeros("s", (a * tiles * STATS * TILE) as u64).unwrap(),
            device.zeros_u32("p", (a * tiles * TILE * 4 * p.edges as usize).max(1) as u64).unwrap(),
        );
        let buffers = [f(&price), f(&returns), u(&keys), f(&inverse_volatility), u(&sets), u(&plan), stats.clone(), prefix.clone()];
        let args: Vec<View> = buffers.iter().map(View::from).collect();
        let mut pass = device.pass("test");
        pass.launch(kernel, p, &args).unwrap();
        let (s, q) = (pass.read(&stats).unwrap(), pass.read(&prefix).unwrap());
        let mut done = pass.submit().unwrap();
        (done.f32(s).unwrap().iter().map(|x| (x + 0.0).to_bits()).collect(), done.u32(q).unwrap())
    }

    #[test]
    fn lanes_give_the_bits_of_the_plain_column() {
        let contiguous: Vec<u32> = (0..20).collect();
        for mode in [CROSS, BAND, MOMENTUM] {
            for (lag, start, edges, rows) in [(0, 0, 6, &contiguous[..]), (1, 64, 6, &[3][..]), (1, 70, 0, &[5, 2, 9][..])] {
                let p = BacktestParams {
                    a: 2,
                    t: 300,
                    rows: 40,
                    tiles: 3,
                    edges,
                    mode,
                    lag,
                    start,
                    shift: 50,
                    mask: u32::from(mode == BAND),
                    cost: 1e-3,
                    ..bytemuck::Zeroable::zeroed()
                };
                let plain = run(&PLAIN, &p, rows);
                assert!(plain == run(&BACKTEST_SWEEP, &p, rows), "mode {mode}, lag {lag}");
                assert!(plain == run(&SCALAR, &p, rows), "scalar, mode {mode}, lag {lag}");
            }
        }
    }
}
