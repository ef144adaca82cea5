//! Portfolios with shared capital: many books over N assets, drifting weights, a no-trade band, costs.
//!
//! V is a book's capital, w its weights (the rest is cash and earns nothing), r the assets' returns. At bar j, in this order:
//! * w̃ = w(1 + r_{j−1}) / (1 + Σ w r_{j−1}), the weights that prices have left;
//! * on every `every`-th bar each asset with |u − w̃| > band trades, to its target u or to the band's edge, u ∓ band;
//! * V pays c·τ_j of itself, τ_j = Σ|w − w̃|, then earns: V ← V(1 − cτ_j)(1 + Σ w r_j), so net_j = (1 − cτ_j)(1 + R_j) − 1.
//!
//! Weights do not depend on c, so `portfolio_simulate` leaves R_j, τ_j and the number of orders, and `portfolio_score` turns them into the
//! statistics of any number of costs. `signal_score` scores the same targets asset by asset instead, each with capital of its own and
//! without drift: net_j = u_j·r_j − c·|u_j − u_{j−1}|, as the sweep does.
//! A bar without a price earns 0 and trades nothing; the next return spans the gap, and nothing else is rescaled meanwhile.
//! Capital at or below zero is ruin: the bar loses everything that is left, weights are 0 afterwards and the status names the bar.
//!
//! Shapes   returns [bars+1,N]: row j is what bar j−1 earned, MISSING where bar j has no price; positions [P,bars,N], times allocation
//!          [bars,N] where `composed`; weights [P,N] after the last return, to be divided by carry [P] (0: ruined); activity [P,3,bars]:
//!          R, τ, orders; costs [C,2] (high and low part); net [P,C,bars]; state [series,16]; stats [series,7]: sharpe per bar, total
//!          return, max drawdown, turnover, orders / 2^20, orders mod 2^20, bar of ruin or −1. Series are [P,C], or [P,C,N].
//! Launch   `portfolio_simulate`: WG / lanes books per workgroup, lanes = the power of two from N up, at most WG; a thread takes assets
//!          lane, lane + lanes, …, keeps the first one's weight in a register and the others' in `weights`. One sum over the lanes a bar.
//!          `portfolio_score`: thread = (book, cost); `signal_score`: thread = (book, cost, asset). Both sequential over bars.
//! Scratch  weights, carry and state, read and written by launches over consecutive bars: a slab of bars at a time, the same bits for
//!          any slab. Nothing of size books × all bars unless the net returns are asked for.
//! Floor    4 bytes of target per book, asset and bar from memory; 14 instructions.
//! Numerics sums over assets in a fixed tree. A weight within 2^−20 of its target, as a share of it, is set to it without a
//!          trade, and a gap has to pass the band by 2^−20·(|u| + band), so that rounding makes no orders. Net returns
//!          are shifted by the first of each block of 64 bars, blocks merged by Chan's rule; growth is mantissa·2^exponent; drawdown by
//!          level = min(level·(1+net), 1).
//! Ladder   one book of 500 assets, one thread of an AMD EPYC with AVX-512, the bar loop alone: slices of 16 0.7 G asset-bars/s (with
//!          100 assets 0.6); arrays of 16, baseline vectors 1.1 (0.9), AVX2 2.0 (1.4), AVX-512 3.1 (1.9). The
//!          kernel over 200 MB of targets, one thread of a busy machine: 1.05 (0.76). CUDA: not measured; 32 to 63 registers, no spill
//!          (NVRTC 12.4 and 13.5, sm_75 to sm_100).
//! Source   order of a bar as in back-testers with target-percent orders (zipline, vectorbt); Chan, Golub & LeVeque 1983 for the merge.
//! Files    shaders/portfolio.wgsl · cuda/portfolio.cu · reference: the `_cpu` functions

use crate::Result;
use crate::conformance::UNDEFINED;
use crate::kernel::{Cost, Cpu, CpuLaunch, Kernel, layout, params_of, reads, writes};
use crate::real::Real;
use pulp::Arch;
use rayon::prelude::*;

params! {
    /// Params of the three kernels.
    pub struct PortfolioParams {
        /// Books.
        p: u32,
        /// Assets.
        n: u32,
        /// Bars of this launch.
        bars: u32,
        /// Index of its first bar; 0 starts afresh.
        first: u32,
        /// Bars between two rebalances.
        every: u32,
        /// Threads of a book: a power of two up to the workgroup.
        lanes: u32,
        /// 1: trades stop at the band's edge; 0: at the target.
        edge: u32,
        /// 1: targets are positions times allocation; 0: positions.
        composed: u32,
        /// Costs.
        costs: u32,
        /// 1: `net` is written.
        net: u32,
        /// Half-width of the no-trade band.
        band: f32,
    }
}

/// Threads per workgroup.
pub const WG: u32 = 128;
/// Words of a series' running state.
pub const STATE: usize = 16;
/// Statistics of a series.
pub const STATS: usize = 7;
/// Values of a book and bar: gross return, turnover, orders.
pub const ACTIVITY: usize = 3;
/// Return of a bar without a price; no return of a positive price is below −1.
pub const MISSING: f32 = -2.0;
/// Returns above it are there.
const THERE: f64 = -1.5;
/// Share of a target, and of the band, that counts as rounding: 2^−20.
const ROUND: f64 = 1.0 / 1_048_576.0;
/// Orders are counted in two words of this radix.
pub(crate) const ORDERS: f64 = 1_048_576.0;
/// Bars per block of plain sums.
const BLOCK: usize = 64;
/// Assets side by side in the CPU column.
const LANES: usize = 16;

fn params(words: &[u32]) -> PortfolioParams {
    params_of(words).unwrap_or(bytemuck::Zeroable::zeroed())
}

/// Threads that a book of n assets takes.
pub fn lanes(n: usize) -> u32 {
    n.next_power_of_two().clamp(1, WG as usize) as u32
}

/// Trades, earns and drifts every book.
pub static PORTFOLIO_SIMULATE: Kernel = Kernel {
    name: "portfolio_simulate",
    about: "gross return and turnover of books with drifting weights",
    args: &[reads("returns"), reads("positions"), reads("allocation"), writes("weights"), writes("carry"), writes("activity")],
    params: layout::<PortfolioParams>(),
    workgroup: WG,
    constants: &[],
    groups: |words| (u64::from(params(words).p) * u64::from(params(words).lanes)).div_ceil(u64::from(WG)),
    wgsl: wgsl!("portfolio"),
    cuda: cuda!("portfolio"),
    cpu: Some(Cpu { f32: portfolio_simulate_cpu::<f32>, f64: portfolio_simulate_cpu::<f64> }),
    cost: Cost {
        unit: "asset-bar",
        units: |words| u64::from(params(words).p) * u64::from(params(words).n) * u64::from(params(words).bars),
        bytes: 4.0,
        flops: 14.0,
    },
};

/// Statistics of every book at every cost.
pub static PORTFOLIO_SCORE: Kernel = Kernel {
    name: "portfolio_score",
    about: "net returns and statistics of books at several costs",
    args: &[reads("activity"), writes("net"), reads("costs"), writes("state"), writes("stats")],
    params: layout::<PortfolioParams>(),
    workgroup: WG,
    constants: &[],
    groups: |words| (u64::from(params(words).p) * u64::from(params(words).costs)).div_ceil(u64::from(WG)),
    wgsl: wgsl!("portfolio"),
    cuda: cuda!("portfolio"),
    cpu: Some(Cpu { f32: portfolio_score_cpu::<f32>, f64: portfolio_score_cpu::<f64> }),
    cost: Cost {
        unit: "book-bar",
        units: |words| u64::from(params(words).p) * u64::from(params(words).costs) * u64::from(params(words).bars),
        bytes: 12.0,
        flops: 16.0,
    },
};

/// Statistics of every asset of every book on its own.
pub static SIGNAL_SCORE: Kernel = Kernel {
    name: "signal_score",
    about: "statistics of given weights, asset by asset",
    args: &[reads("returns"), reads("positions"), reads("costs"), writes("state"), writes("stats")],
    params: layout::<PortfolioParams>(),
    workgroup: WG,
    constants: &[],
    groups: |words| (u64::from(params(words).p) * u64::from(params(words).costs) * u64::from(params(words).n)).div_ceil(u64::from(WG)),
    wgsl: wgsl!("portfolio"),
    cuda: cuda!("portfolio"),
    cpu: Some(Cpu { f32: signal_score_cpu::<f32>, f64: signal_score_cpu::<f64> }),
    cost: Cost {
        unit: "asset-bar",
        units: |words| u64::from(params(words).p) * u64::from(params(words).costs) * u64::from(params(words).n) * u64::from(params(words).bars),
        bytes: 4.0,
        flops: 16.0,
    },
};

// ---- simulation -------------------------------------------------------------------------------------------------------

/// What a bar asks of every asset of a book.
struct Rule<R> {
    /// 1 / (1 + R) of the bar before; 0 after ruin.
    inverse: R,
    band: R,
    /// How far from its target a trade stops.
    edge: R,
    rebalance: bool,
}

/// One asset's bar.
struct Step<R> {
    /// Weight after the return, not yet divided by the book's growth.
    weight: R,
    gross: R,
    turnover: R,
    orders: R,
}

impl<R: Real> Rule<R> {
    #[inline(always)]
    fn step(&self, weight: R, target: R, before: R, after: R) -> Step<R> {
        let drifted = weight * self.inverse;
        let gap = target - drifted;
        let (size, near) = (gap.abs(), R::of(ROUND) * target.abs());
        let open = self.rebalance && before > R::of(THERE);
        let trades = open && size > self.band + (near + R::of(ROUND) * self.band);
        let edge = if gap > R::ZERO { self.edge } else { -self.edge };
        let moved = if trades { target - edge } else { drifted };
        let held = if open && size <= near { target } else { moved };
        let r = if after > R::of(THERE) { after } else { R::ZERO };
        Step {
            weight: held * (R::ONE + r),
            gross: held * r,
            turnover: if trades { size - self.edge } else { R::ZERO },
            orders: if trades { R::ONE } else { R::ZERO },
        }
    }
}

/// Sum of all lanes, by halves.
#[inline(always)]
fn tree<R: Real>(mut x: [R; LANES]) -> R {
    let mut half = LANES / 2;
    while half > 0 {
        for l in 0..half {
            x[l] += x[l + half];
        }
        half /= 2;
    }
    x[0]
}

/// Sums over assets, lane by lane.
struct Sums<R> {
    gross: [R; LANES],
    turnover: [R; LANES],
    orders: [R; LANES],
}

impl<R: Real> Sums<R> {
    #[inline(always)]
    fn add(&mut self, l: usize, step: Step<R>) -> R {
        self.gross[l] += step.gross;
        self.turnover[l] += step.turnover;
        self.orders[l] += step.orders;
        step.weight
    }
}

/// Gross return, turnover and orders of a book's bar: whole vectors of assets, then the rest.
#[inline(always)]
fn bar<R: Real, const COMPOSED: bool>(rule: &Rule<R>, weights: &mut [R], positions: &[R], allocation: &[R], before: &[R], after: &[R]) -> [R; 3] {
    let target = |position: R, share: R| if COMPOSED { position * share } else { position };
    let mut sums = Sums { gross: [R::ZERO; LANES], turnover: [R::ZERO; LANES], orders: [R::ZERO; LANES] };
    let (weights, weights_rest) = weights.as_chunks_mut::<LANES>();
    let (positions, positions_rest) = positions.as_chunks::<LANES>();
    let (allocation, allocation_rest) = allocation.as_chunks::<LANES>();
    let (before, before_rest) = before.as_chunks::<LANES>();
    let (after, after_rest) = after.as_chunks::<LANES>();
    for ((((w, p), s), b), a) in weights.iter_mut().zip(positions).zip(allocation).zip(before).zip(after) {
        for l in 0..LANES {
            w[l] = sums.add(l, rule.step(w[l], target(p[l], s[l]), b[l], a[l]));
        }
    }
    for (l, w) in weights_rest.iter_mut().enumerate() {
        *w = sums.add(l, rule.step(*w, target(positions_rest[l], allocation_rest[l]), before_rest[l], after_rest[l]));
    }
    [tree(sums.gross), tree(sums.turnover), tree(sums.orders)]
}

fn portfolio_simulate_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: PortfolioParams = launch.params()?;
    let (returns, positions, allocation) = (launch.real()?, launch.real()?, launch.real()?);
    let (weights, carry, activity) = (launch.real_mut()?, launch.real_mut()?, launch.real_mut()?);
    let (n, bars) = (p.n as usize, p.bars as usize);
    let arch = Arch::new();
    let books = weights.par_chunks_exact_mut(n).zip(carry.par_iter_mut()).zip(activity.par_chunks_exact_mut(ACTIVITY * bars));
    books.zip(positions.par_chunks_exact(bars * n)).take(p.p as usize).for_each(|(((weights, carry), activity), positions)| {
        // Compiled for the widest vectors that this machine has.
        arch.dispatch(|| book(&p, weights, carry, activity, positions, allocation, returns));
    });
    Ok(())
}

/// All bars of a book.
#[inline(always)]
fn book<R: Real>(p: &PortfolioParams, weights: &mut [R], carry: &mut R, activity: &mut [R], positions: &[R], allocation: &[R], returns: &[R]) {
    let (n, bars, band) = (p.n as usize, p.bars as usize, R::of(f64::from(p.band)));
    if p.first == 0 {
        weights.fill(R::ZERO);
        *carry = R::ONE;
    }
    for j in 0..bars {
        let solvent = *carry > R::ZERO;
        let rule = Rule {
            inverse: if solvent { R::ONE / *carry } else { R::ZERO },
            band,
            edge: if p.edge == 1 { band } else { R::ZERO },
            rebalance: solvent && (p.first + j as u32).is_multiple_of(p.every),
        };
        let (row, before, after) = (&positions[j * n..][..n], &returns[j * n..][..n], &returns[(j + 1) * n..][..n]);
        let [gross, turnover, orders] = if p.composed == 1 {
            bar::<R, true>(&rule, weights, row, &allocation[j * n..][..n], before, after)
        } else {
            bar::<R, false>(&rule, weights, row, row, before, after)
        };
        *carry = if solvent { (R::ONE + gross).max(R::ZERO) } else { R::ZERO };
        activity[j] = gross.max(-R::ONE);
        activity[bars + j] = turnover;
        activity[2 * bars + j] = orders;
    }
}

// ---- statistics -------------------------------------------------------------------------------------------------------

/// Running statistics of a series, as kept in `state`.
#[derive(Clone, Copy)]
struct Run<R> {
    /// First net return of the block, then sums over it: net − shift, its square, growth, turnover.
    shift: R,
    sum: R,
    square: R,
    growth: R,
    traded: R,
    /// Of all whole blocks.
    mean: R,
    m2: R,
    mantissa: R,
    exponent: R,
    turnover: R,
    level: R,
    lowest: R,
    orders_high: R,
    orders_low: R,
    /// Bar of ruin, or −1.
    ruin: R,
    /// Weight held before (`signal_score`).
    weight: R,
}

impl<R: Real> Run<R> {
    fn new() -> Run<R> {
        let (zero, one) = (R::ZERO, R::ONE);
        Run {
            shift: zero,
            sum: zero,
            square: zero,
            growth: one,
            traded: zero,
            mean: zero,
            m2: zero,
            mantissa: one,
            exponent: zero,
            turnover: zero,
            level: one,
            lowest: one,
            orders_high: zero,
            orders_low: zero,
            ruin: -one,
            weight: zero,
        }
    }

    fn load(first: u32, s: &[R]) -> Run<R> {
        if first == 0 {
            return Run::new();
        }
        Run {
            shift: s[0],
            sum: s[1],
            square: s[2],
            growth: s[3],
            traded: s[4],
            mean: s[5],
            m2: s[6],
            mantissa: s[7],
            exponent: s[8],
            turnover: s[9],
            level: s[10],
            lowest: s[11],
            orders_high: s[12],
            orders_low: s[13],
            ruin: s[14],
            weight: s[15],
        }
    }

    fn store(&self, s: &mut [R]) {
        let values = [
            self.shift,
            self.sum,
            self.square,
            self.growth,
            self.traded,
            self.mean,
            self.m2,
            self.mantissa,
            self.exponent,
            self.turnover,
            self.level,
            self.lowest,
            self.orders_high,
            self.orders_low,
            self.ruin,
            self.weight,
        ];
        s.copy_from_slice(&values);
    }

    /// Bar j with its net return, which is also what ruin leaves of it.
    #[inline(always)]
    fn bar(&mut self, j: usize, raw: R, turnover: R, orders: R) -> R {
        let solvent = self.ruin < R::ZERO;
        let net = if solvent { raw.max(-R::ONE) } else { R::ZERO };
        if solvent && net <= -R::ONE {
            self.ruin = R::of(j as f64);
        }
        if j.is_multiple_of(BLOCK) {
            self.shift = net;
        }
        let (d, factor) = (net - self.shift, R::ONE + net);
        self.sum += d;
        self.square += d * d;
        self.growth *= factor;
        self.level = (self.level * factor).min(R::ONE);
        self.lowest = self.lowest.min(self.level);
        if solvent {
            self.traded += turnover;
            self.orders_low += orders;
            if self.orders_low >= R::of(ORDERS) {
                self.orders_low += R::of(-ORDERS);
                self.orders_high += R::ONE;
            }
        }
        if j % BLOCK == BLOCK - 1 {
            self.flush(j + 1, BLOCK);
        }
        net
    }

    /// Merges a block of `count` bars into the whole of `total`.
    fn flush(&mut self, total: usize, count: usize) {
        let (nb, n) = (R::of(count as f64), R::of(total as f64));
        let mean = self.shift + self.sum / nb;
        let m2 = (self.square - self.sum * self.sum / nb).max(R::ZERO);
        let delta = mean - self.mean;
        self.mean += delta * (nb / n);
        self.m2 += m2 + delta * delta * ((n - nb) * nb / n);
        let mantissa = self.mantissa.f64() * self.growth.f64();
        let power = if mantissa > 0.0 { mantissa.log2().floor() } else { 0.0 };
        self.mantissa = R::of(mantissa * 2f64.powi(-power as i32));
        self.exponent += R::of(power);
        self.turnover += self.traded;
        (self.sum, self.square, self.growth, self.traded) = (R::ZERO, R::ZERO, R::ONE, R::ZERO);
    }

    /// Statistics of the `total` bars so far.
    fn finish(mut self, total: usize, out: &mut [R]) {
        if !total.is_multiple_of(BLOCK) {
            self.flush(total, total % BLOCK);
        }
        let (n, mean, m2) = (total as f64, self.mean.f64(), self.m2.f64());
        let defined = total > 1 && m2 > (m2 + n * mean * mean) * ROUND;
        let sharpe = if defined { mean / (m2 / (n - 1.0)).sqrt() } else { UNDEFINED };
        let growth = self.mantissa.f64() * 2f64.powi(self.exponent.f64() as i32);
        let values = [R::of(sharpe), R::of(growth - 1.0), R::ONE - self.lowest, self.turnover, self.orders_high, self.orders_low, self.ruin];
        out.copy_from_slice(&values);
    }
}

/// Cost c in full: the low part is what rounding to f32 took away.
fn cost<R: Real>(costs: &[R], c: usize) -> R {
    costs[2 * c] + costs[2 * c + 1]
}

fn portfolio_score_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: PortfolioParams = launch.params()?;
    let (activity, net, costs) = (launch.real()?, launch.real_mut()?, launch.real()?);
    let (state, stats) = (launch.real_mut()?, launch.real_mut()?);
    let (bars, count, first) = (p.bars as usize, p.costs as usize, p.first as usize);
    let wanted = if p.net == 1 { p.p as usize } else { 0 };
    let nets = net.par_chunks_mut((count * bars).max(1)).take(wanted).chain((wanted..p.p as usize).into_par_iter().map(|_| -> &mut [R] { &mut [] }));
    let books = activity.par_chunks_exact(ACTIVITY * bars).zip(state.par_chunks_exact_mut(count * STATE)).zip(stats.par_chunks_exact_mut(count * STATS));
    books.zip(nets).take(p.p as usize).for_each(|(((activity, state), stats), net)| {
        let (gross, rest) = activity.split_at(bars);
        let (turnover, orders) = rest.split_at(bars);
        for c in 0..count {
            let (cost, state) = (cost(costs, c), &mut state[c * STATE..][..STATE]);
            let mut run = Run::load(p.first, state);
            for j in 0..bars {
                let paid = cost * turnover[j];
                let earned = run.bar(first + j, gross[j] - paid * (R::ONE + gross[j]), turnover[j], orders[j]);
                if p.net == 1 {
                    net[c * bars + j] = earned;
                }
            }
            run.store(state);
            run.finish(first + bars, &mut stats[c * STATS..][..STATS]);
        }
    });
    Ok(())
}

fn signal_score_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: PortfolioParams = launch.params()?;
    let (returns, positions, costs) = (launch.real()?, launch.real()?, launch.real()?);
    let (state, stats) = (launch.real_mut()?, launch.real_mut()?);
    let (n, bars, count, first) = (p.n as usize, p.bars as usize, p.costs as usize, p.first as usize);
    let books = positions.par_chunks_exact(bars * n).zip(state.par_chunks_exact_mut(count * n * STATE)).zip(stats.par_chunks_exact_mut(count * n * STATS));
    books.take(p.p as usize).for_each(|((positions, state), stats)| {
        let mut runs: Vec<Run<R>> = state.chunks_exact(STATE).map(|s| Run::load(p.first, s)).collect();
        for j in 0..bars {
            let (row, after) = (&positions[j * n..][..n], &returns[(j + 1) * n..][..n]);
            for (c, runs) in runs.chunks_exact_mut(n).enumerate() {
                let cost = cost(costs, c);
                for i in 0..n {
                    let r = if after[i] > R::of(THERE) { after[i] } else { R::ZERO };
                    let traded = (row[i] - runs[i].weight).abs();
                    runs[i].weight = row[i];
                    runs[i].bar(first + j, row[i] * r - cost * traded, traded, if traded > R::ZERO { R::ONE } else { R::ZERO });
                }
            }
        }
        for (i, run) in runs.iter().enumerate() {
            run.store(&mut state[i * STATE..][..STATE]);
            run.finish(first + bars, &mut stats[i * STATS..][..STATS]);
        }
    });
    Ok(())
}
