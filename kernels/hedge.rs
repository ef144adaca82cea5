//! Hedge simulation: paths, hedges, costs and payoff in registers; P&L, cost and turnover per path and set-up go out, nothing per step.
//!
//! wealth   V(0) = premium; at step t the holding h moves to the policy's target: V ← V − c·|Δh|·S − f·1{Δh≠0}, then
//!          V ← V·e^(r·dt) + h·(S(t+1)·e^(q·dt) − S(t)·e^(r·dt)); P&L = V(T) − payoff, less the cost of selling out where that is wanted.
//!          V is cash plus the holding's value: small where the hedge is good, so that f32 keeps its digits.
//! policies none · static · delta, Leland (delta at σ√(1 ± Le), Le = √(8/π)·c/(σ√dt)) at every k-th step · band, Whalley-Wilmott (holding
//!          clipped to delta ± w, first trade to delta; w³ = 1.5·e^(−rτ)·c·S·Γ²/a) · move (to delta where |S/S_last − 1| > x) ·
//!          delta-gamma (n options of another strike or maturity, n = −Γ·Γo/(Γo² + ε), rest of the delta in the spot) · futures:
//!          target = delta·ratio, the ratio Cov(ΔS,ΔF)/Var(ΔF) over the last steps, or given by regime.
//! greeks   d1 = a·x + b with x = ln(S/level); a = 1/(σ√τ), b and the discounts come from a table per (greek, step), made on the host in
//!          f64: no division, root or logarithm per path-step. Set-ups with the same volatility, strike and kind share a greek.
//!
//! Shapes   results [U,3,P]: P&L, cost, turnover of set-up u on path p; setups [U,9] words then [G,4] of greeks; reals [1+U,16]: level,
//!          e^(r·dt) − 1, e^(q·dt) − 1, then the set-ups; table [G,T+1,8]; spot [P,T+1].
//! Launch   a thread per path, TILE set-ups at most; the loop over steps is in the thread. `hedge_given` takes stored paths. `hedge_single_*` has one
//!          set-up that needs no more than a delta, and four paths a thread, whose chains of operations overlap and share loads; software adapters
//!          take every such set-up by itself.
//! Floor    12 bytes out per path and set-up. GBM with one daily delta: 27 instructions of Philox and Box-Muller, 12 of e^x, 22 of Φ, 10 of
//!          trade and wealth a path-step: 0.45 ms for 1M × 252 on an H200, 0.12 s on two AVX-512 threads.
//! Numerics log-spot relative to the level; Φ and its bell from one exponential; kernels agree per path within 2e-6 of spot, but for `move`
//!          and fixed costs, which are discontinuous in the path.
//! Source   Leland 1985; Whalley & Wilmott 1997; Henrotte 1993 (move-based); Ederington 1979 (futures).
//! Files    shaders/hedge.wgsl · cuda/hedge.cu · lanes: kernels/hedge_lanes.rs · reference: `hedge_given_cpu`

use crate::conformance::{Case, Outputs};
use crate::device::{Buffer, Device, DeviceKind, Pass, View};
use crate::hedge_risk::{HEDGE_COUNT, HEDGE_MOMENTS, HEDGE_SUM_COUNTS, HEDGE_TAIL};
use crate::kernel::{Cost, Cpu, CpuLaunch, Kernel, layout, params_of, reads, reads_u32, writes};
use crate::paths::{Kind, Markets, PathMarket};
use crate::real::Real;
use crate::{Error, Result};
use rayon::prelude::*;
use std::ops::Range;

params! {
    /// Params of the kernels.
    pub struct HedgeParams {
        /// Paths of this launch.
        paths: u32,
        /// Column of the results that the first of them has.
        first: u32,
        /// Columns of the results.
        columns: u32,
        /// T.
        steps: u32,
        /// Set-ups of this launch.
        setups: u32,
        /// Greeks that they use.
        greeks: u32,
        /// Row of the market table.
        market: u32,
        /// Global index of the first path, low word …
        path: u32,
        /// … and high word.
        path_high: u32,
        /// Changes that the history of `hedge_futures` keeps; 1 or more.
        window: u32,
    }
}

/// Threads per workgroup.
const WG: u32 = 64;
/// Most set-ups of a launch: their state lies in registers.
pub const TILE: usize = 8;
/// Paths of a thread that has one set-up.
const SINGLE_PATHS: u32 = 4;
/// Words of a set-up: policy, every, greek, kind, flags, greek of the second option, window, greek of the premium, row of the results.
pub const SETUP_WORDS: usize = 9;
/// Words of a greek: kind, steps between its uses (0: the first alone), first of its set-ups, one past the last.
pub const GREEK_WORDS: usize = 4;
/// Reals of a set-up: proportional cost, fixed cost, policy's parameter, strike, premium, sign, half-spread of the second option, most
/// options held, ratios by regime.
pub const SETUP_REALS: usize = 16;
/// Reals of a greek at a step: a, b, delta's factor, gamma's factor, discount, σ√τ, strike, payoff's discount.
pub const GREEK_ROW: usize = 8;
/// Most regimes with ratios of their own.
pub const MOST_REGIMES: usize = 8;

pub(crate) const CALL: u32 = 0;
pub(crate) const PUT: u32 = 1;
pub(crate) const DIGITAL: u32 = 2;
pub(crate) const SPOT: u32 = 3;

pub(crate) const NONE: u32 = 0;
pub(crate) const STATIC: u32 = 1;
pub(crate) const DELTA: u32 = 2;
pub(crate) const BAND: u32 = 3;
pub(crate) const WHALLEY_WILMOTT: u32 = 4;
pub(crate) const MOVE: u32 = 5;
pub(crate) const DELTA_GAMMA: u32 = 6;
pub(crate) const MINIMUM_VARIANCE: u32 = 7;
pub(crate) const REGIME_RATIO: u32 = 8;

/// The position is sold at the end.
pub(crate) const UNWIND: u32 = 1;
/// The premium is the model price at the path's own first spot.
pub(crate) const PREMIUM_AT_SPOT: u32 = 2;

const OP: &str = "hedge_paths";

fn params(words: &[u32]) -> HedgeParams {
    params_of(words).unwrap_or(bytemuck::Zeroable::zeroed())
}

fn path_steps(words: &[u32]) -> u64 {
    u64::from(params(words).paths) * u64::from(params(words).steps)
}

/// All policies but those of futures over stored paths.
pub static HEDGE_GIVEN: Kernel = Kernel {
    name: "hedge_given_paths",
    about: "hedges with costs over given paths",
    args: &[reads_u32("setups"), reads("reals"), reads("table"), writes("results"), reads("spot")],
    params: layout::<HedgeParams>(),
    workgroup: WG,
    constants: &[("LEVEL", 2), ("MODEL", Kind::Replay as u32), ("TILE", TILE as u32), ("PATHS", 1)],
    groups: |words| u64::from(params(words).paths).div_ceil(u64::from(WG)),
    wgsl: wgsl!("hedge"),
    cuda: cuda!("hedge"),
    cpu: Some(Cpu { f32: crate::hedge_lanes::hedge_given_lanes, f64: hedge_given_cpu::<f64> }),
    cost: Cost { unit: "path-step", units: path_steps, bytes: 4.0, flops: 60.0 },
};

/// At most a delta, over simulated paths of geometric Brownian motion; the others differ in the constants.
pub static HEDGE_DELTA_GBM: Kernel = Kernel {
    name: "hedge_delta_gbm",
    about: "delta hedges with costs over simulated paths",
    args: &[reads_u32("setups"), reads("reals"), reads("table"), writes("results"), reads("market"), reads_u32("market_words")],
    constants: &[("LEVEL", 0), ("MODEL", 0), ("TILE", TILE as u32), ("PATHS", 1)],
    cpu: Some(Cpu { f32: crate::hedge_lanes::hedge_simulated_lanes, f64: hedge_simulated_cpu::<f64> }),
    cost: Cost { unit: "path-step", units: path_steps, bytes: 0.05, flops: 100.0 },
    ..HEDGE_GIVEN
};

macro_rules! hedge_kernels {
    ($($delta:ident $delta_name:literal $band:ident $band_name:literal $gamma:ident $gamma_name:literal $model:literal;)*) => {$(
        hedge_kernels!(one $delta $delta_name "delta hedges with costs over simulated paths" 0 $model);
        hedge_kernels!(one $band $band_name "hedges with bands and costs over simulated paths" 1 $model);
        hedge_kernels!(one $gamma $gamma_name "hedges with a second option and costs over simulated paths" 2 $model);
    )*};
    (one $kernel:ident $name:literal $about:literal $level:literal $model:literal) => {
        #[doc = concat!("`", $name, "`: ", $about, ".")]
        pub static $kernel: Kernel = Kernel {
            name: $name,
            about: $about,
            constants: &[("LEVEL", $level), ("MODEL", $model), ("TILE", TILE as u32), ("PATHS", 1)],
            ..HEDGE_DELTA_GBM
        };
    };
    (futures $($kernel:ident $name:literal $model:literal;)*) => {$(
        #[doc = concat!("`", $name, "`: hedges with futures and costs over simulated paths.")]
        pub static $kernel: Kernel = Kernel {
            name: $name,
            about: "hedges with futures and costs over simulated paths",
            args: &[
                reads_u32("setups"),
                reads("reals"),
                reads("table"),
                writes("results"),
                reads("market"),
                reads_u32("market_words"),
                writes("history"),
            ],
            constants: &[("LEVEL", 3), ("MODEL", $model), ("TILE", TILE as u32), ("PATHS", 1)],
            cpu: Some(Cpu { f32: hedge_futures_cpu::<f32>, f64: hedge_futures_cpu::<f64> }),
            ..HEDGE_DELTA_GBM
        };
    )*};
}

macro_rules! single_kernels {
    ($($kernel:ident $name:literal $model:literal;)*) => {$(
        #[doc = concat!("`", $name, "`: one delta hedge with costs over simulated paths, four of them a thread.")]
        pub static $kernel: Kernel = Kernel {
            name: $name,
            about: "one delta hedge with costs over simulated paths, four of them a thread",
            constants: &[("LEVEL", 0), ("MODEL", $model), ("TILE", 1), ("PATHS", SINGLE_PATHS)],
            groups: |words| u64::from(params(words).paths).div_ceil(u64::from(WG * SINGLE_PATHS)),
            ..HEDGE_DELTA_GBM
        };
    )*};
}

single_kernels! {
    HEDGE_SINGLE_GBM "hedge_single_gbm" 0;
    HEDGE_SINGLE_MERTON "hedge_single_merton" 1;
    HEDGE_SINGLE_HESTON "hedge_single_heston" 2;
    HEDGE_SINGLE_BATES "hedge_single_bates" 3;
    HEDGE_SINGLE_REGIMES "hedge_single_regimes" 4;
    HEDGE_SINGLE_BOOTSTRAP "hedge_single_bootstrap" 5;
    HEDGE_SINGLE_REPLAY "hedge_single_replay" 6;
}

hedge_kernels!(one HEDGE_BAND_GBM "hedge_band_gbm" "hedges with bands and costs over simulated paths" 1 0);
hedge_kernels!(one HEDGE_GAMMA_GBM "hedge_gamma_gbm" "hedges with a second option and costs over simulated paths" 2 0);
hedge_kernels! {
    HEDGE_DELTA_MERTON "hedge_delta_merton" HEDGE_BAND_MERTON "hedge_band_merton" HEDGE_GAMMA_MERTON "hedge_gamma_merton" 1;
    HEDGE_DELTA_HESTON "hedge_delta_heston" HEDGE_BAND_HESTON "hedge_band_heston" HEDGE_GAMMA_HESTON "hedge_gamma_heston" 2;
    HEDGE_DELTA_BATES "hedge_delta_bates" HEDGE_BAND_BATES "hedge_band_bates" HEDGE_GAMMA_BATES "hedge_gamma_bates" 3;
    HEDGE_DELTA_REGIMES "hedge_delta_regimes" HEDGE_BAND_REGIMES "hedge_band_regimes" HEDGE_GAMMA_REGIMES "hedge_gamma_regimes" 4;
    HEDGE_DELTA_BOOTSTRAP "hedge_delta_bootstrap" HEDGE_BAND_BOOTSTRAP "hedge_band_bootstrap" HEDGE_GAMMA_BOOTSTRAP "hedge_gamma_bootstrap" 5;
    HEDGE_DELTA_REPLAY "hedge_delta_replay" HEDGE_BAND_REPLAY "hedge_band_replay" HEDGE_GAMMA_REPLAY "hedge_gamma_replay" 6;
}
hedge_kernels! { futures
    HEDGE_FUTURES_GBM "hedge_futures_gbm_futures" 16;
    HEDGE_FUTURES_MERTON "hedge_futures_merton_futures" 17;
    HEDGE_FUTURES_HESTON "hedge_futures_heston_futures" 18;
    HEDGE_FUTURES_BATES "hedge_futures_bates_futures" 19;
    HEDGE_FUTURES_REGIMES "hedge_futures_regimes_futures" 20;
    HEDGE_FUTURES_BOOTSTRAP "hedge_futures_bootstrap_futures" 21;
}

/// One set-up with at most a delta, by kind of market.
static SINGLE: [&Kernel; 7] =
    [&HEDGE_SINGLE_GBM, &HEDGE_SINGLE_MERTON, &HEDGE_SINGLE_HESTON, &HEDGE_SINGLE_BATES, &HEDGE_SINGLE_REGIMES, &HEDGE_SINGLE_BOOTSTRAP, &HEDGE_SINGLE_REPLAY];

/// Kernels by kind of market: at most a delta, bands, a second option, futures.
static BY_KIND: [[Option<&Kernel>; 4]; 7] = [
    [Some(&HEDGE_DELTA_GBM), Some(&HEDGE_BAND_GBM), Some(&HEDGE_GAMMA_GBM), Some(&HEDGE_FUTURES_GBM)],
    [Some(&HEDGE_DELTA_MERTON), Some(&HEDGE_BAND_MERTON), Some(&HEDGE_GAMMA_MERTON), Some(&HEDGE_FUTURES_MERTON)],
    [Some(&HEDGE_DELTA_HESTON), Some(&HEDGE_BAND_HESTON), Some(&HEDGE_GAMMA_HESTON), Some(&HEDGE_FUTURES_HESTON)],
    [Some(&HEDGE_DELTA_BATES), Some(&HEDGE_BAND_BATES), Some(&HEDGE_GAMMA_BATES), Some(&HEDGE_FUTURES_BATES)],
    [Some(&HEDGE_DELTA_REGIMES), Some(&HEDGE_BAND_REGIMES), Some(&HEDGE_GAMMA_REGIMES), Some(&HEDGE_FUTURES_REGIMES)],
    [Some(&HEDGE_DELTA_BOOTSTRAP), Some(&HEDGE_BAND_BOOTSTRAP), Some(&HEDGE_GAMMA_BOOTSTRAP), Some(&HEDGE_FUTURES_BOOTSTRAP)],
    [Some(&HEDGE_DELTA_REPLAY), Some(&HEDGE_BAND_REPLAY), Some(&HEDGE_GAMMA_REPLAY), None],
];

/// Every kernel of the op.
pub(crate) static HEDGE_KERNELS: [&Kernel; 39] = [
    &HEDGE_GIVEN,
    &HEDGE_DELTA_GBM,
    &HEDGE_BAND_GBM,
    &HEDGE_GAMMA_GBM,
    &HEDGE_FUTURES_GBM,
    &HEDGE_DELTA_MERTON,
    &HEDGE_BAND_MERTON,
    &HEDGE_GAMMA_MERTON,
    &HEDGE_FUTURES_MERTON,
    &HEDGE_DELTA_HESTON,
    &HEDGE_BAND_HESTON,
    &HEDGE_GAMMA_HESTON,
    &HEDGE_FUTURES_HESTON,
    &HEDGE_DELTA_BATES,
    &HEDGE_BAND_BATES,
    &HEDGE_GAMMA_BATES,
    &HEDGE_FUTURES_BATES,
    &HEDGE_DELTA_REGIMES,
    &HEDGE_BAND_REGIMES,
    &HEDGE_GAMMA_REGIMES,
    &HEDGE_FUTURES_REGIMES,
    &HEDGE_DELTA_BOOTSTRAP,
    &HEDGE_BAND_BOOTSTRAP,
    &HEDGE_GAMMA_BOOTSTRAP,
    &HEDGE_FUTURES_BOOTSTRAP,
    &HEDGE_DELTA_REPLAY,
    &HEDGE_BAND_REPLAY,
    &HEDGE_GAMMA_REPLAY,
    &HEDGE_SINGLE_GBM,
    &HEDGE_SINGLE_MERTON,
    &HEDGE_SINGLE_HESTON,
    &HEDGE_SINGLE_BATES,
    &HEDGE_SINGLE_REGIMES,
    &HEDGE_SINGLE_BOOTSTRAP,
    &HEDGE_SINGLE_REPLAY,
    &HEDGE_MOMENTS,
    &HEDGE_COUNT,
    &HEDGE_SUM_COUNTS,
    &HEDGE_TAIL,
];

// ---- what is hedged, and how ------------------------------------------------------------------------------------------------

/// What an option pays at maturity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OptionKind {
    /// max(S − K, 0).
    Call,
    /// max(K − S, 0).
    Put,
    /// 1 if S > K.
    Digital,
    /// S: one unit of the spot itself.
    Spot,
}

impl OptionKind {
    /// Name, as on the command line.
    pub fn name(self) -> &'static str {
        match self {
            OptionKind::Call => "call",
            OptionKind::Put => "put",
            OptionKind::Digital => "digital",
            OptionKind::Spot => "spot",
        }
    }

    fn code(self) -> u32 {
        match self {
            OptionKind::Call => CALL,
            OptionKind::Put => PUT,
            OptionKind::Digital => DIGITAL,
            OptionKind::Spot => SPOT,
        }
    }

    /// What it pays at spot `s`.
    pub fn payoff(self, s: f64, strike: f64) -> f64 {
        payoff(self.code(), s, strike)
    }
}

/// Side of the option that the hedger has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Position {
    /// Sold: the premium came in, the payoff is owed.
    #[default]
    Short,
    /// Bought.
    Long,
}

impl Position {
    /// Name, as on the command line.
    pub fn name(self) -> &'static str {
        if self == Position::Short { "short" } else { "long" }
    }

    /// 1 for short, −1 for long: sign of the holding that hedges a positive delta.
    pub fn sign(self) -> f64 {
        if self == Position::Short { 1.0 } else { -1.0 }
    }
}

/// One unit of an option.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HedgedOption {
    /// What it pays.
    pub kind: OptionKind,
    /// Strike, in units of the spot.
    pub strike: f64,
    /// Years to maturity.
    pub maturity: f64,
    /// Sold or bought.
    pub position: Position,
}

/// When and how far a hedge trades.
#[derive(Debug, Clone, PartialEq)]
pub enum Policy {
    /// Never.
    None,
    /// To the first delta, then never.
    Static,
    /// To the Black-Scholes delta.
    Delta,
    /// To the delta at Leland's volatility, which carries the costs.
    Leland,
    /// To the edge of delta ± width.
    Band {
        /// Half-width, in units of delta.
        width: f64,
    },
    /// To the edge of delta ± Whalley and Wilmott's half-width.
    WhalleyWilmott {
        /// Absolute risk aversion, per unit of money.
        risk_aversion: f64,
    },
    /// To the delta where the spot has moved since the last trade.
    Move {
        /// Relative move of the spot.
        threshold: f64,
    },
    /// Delta and gamma to zero, with a call besides the spot.
    DeltaGamma {
        /// Strike of the call.
        strike: f64,
        /// Its maturity in years from the start, not before the hedged option's.
        maturity: f64,
        /// Half its bid-ask spread, in basis points of its price.
        half_spread_bps: f64,
    },
    /// Futures, in the ratio of least variance over the last steps of the path.
    MinimumVariance {
        /// Steps.
        window: u32,
    },
    /// Futures, in the ratio of the path's current regime.
    RegimeRatio {
        /// Ratio of each regime, positive for a hedge.
        ratios: Vec<f64>,
    },
}

impl Policy {
    /// Name, as on the command line.
    pub fn name(&self) -> &'static str {
        match self {
            Policy::None => "none",
            Policy::Static => "static",
            Policy::Delta => "delta",
            Policy::Leland => "leland",
            Policy::Band { .. } => "band",
            Policy::WhalleyWilmott { .. } => "whalley_wilmott",
            Policy::Move { .. } => "move",
            Policy::DeltaGamma { .. } => "delta_gamma",
            Policy::MinimumVariance { .. } => "minimum_variance",
            Policy::RegimeRatio { .. } => "regime_ratio",
        }
    }

    fn code(&self) -> u32 {
        match self {
            Policy::None => NONE,
            Policy::Static => STATIC,
            Policy::Delta | Policy::Leland => DELTA,
            Policy::Band { .. } => BAND,
            Policy::WhalleyWilmott { .. } => WHALLEY_WILMOTT,
            Policy::Move { .. } => MOVE,
            Policy::DeltaGamma { .. } => DELTA_GAMMA,
            Policy::MinimumVariance { .. } => MINIMUM_VARIANCE,
            Policy::RegimeRatio { .. } => REGIME_RATIO,
        }
    }

    /// Whether it trades futures.
    pub fn trades_futures(&self) -> bool {
        matches!(self, Policy::MinimumVariance { .. } | Policy::RegimeRatio { .. })
    }
}

/// What a trade costs.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Costs {
    /// One-way, in basis points of the traded notional.
    pub proportional_bps: f64,
    /// Half the bid-ask spread of the instrument, in basis points of its price.
    pub half_spread_bps: f64,
    /// Money per trade.
    pub fixed: f64,
    /// Whether the holding is sold at the end, at the same costs.
    pub unwind: bool,
}

impl Costs {
    /// Proportional costs alone.
    pub fn bps(proportional_bps: f64) -> Costs {
        Costs { proportional_bps, ..Costs::default() }
    }

    /// One-way fraction of the traded notional.
    pub fn fraction(&self) -> f64 {
        (self.proportional_bps + self.half_spread_bps) * 1e-4
    }
}

/// One way to hedge one option.
#[derive(Debug, Clone, PartialEq)]
pub struct Setup {
    /// What is hedged; its maturity is that of the paths.
    pub option: HedgedOption,
    /// When and how far to trade.
    pub policy: Policy,
    /// What trades cost.
    pub costs: Costs,
    /// Steps between two decisions.
    pub every: u32,
    /// Annual volatility that deltas and the premium use.
    pub volatility: f64,
    /// Money that came in for the option (went out for a long one); `None`: the Black-Scholes price at the path's first spot.
    pub premium: Option<f64>,
}

/// What set-ups of one launch share.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HedgeMarket {
    /// Spot that log-spots are relative to: the first, or anything near.
    pub level: f64,
    /// Interest rate a year, continuously compounded.
    pub rate: f64,
    /// Dividend yield a year.
    pub dividend: f64,
    /// Years.
    pub maturity: f64,
    /// T.
    pub steps: u32,
}

impl HedgeMarket {
    /// Years of a step.
    pub fn dt(&self) -> f64 {
        self.maturity / f64::from(self.steps)
    }
}

/// Leland's volatility: σ√(1 + Le) for a short option, σ√(1 − Le) for a long one, Le = √(8/π)·cost/(σ√dt) with one-way costs.
/// # Errors
/// `Parameter` where Le ≥ 1 for a long option: trades cost more than gamma earns.
pub fn leland_volatility(volatility: f64, cost: f64, dt: f64, position: Position) -> Result<f64> {
    let number = (8.0 / std::f64::consts::PI).sqrt() * cost / (volatility * dt.sqrt());
    if position == Position::Long && number >= 1.0 {
        let help = format!("at this cost a long option needs rarer trades (Leland's number is {number:.3}, below 1 is legal): raise the rebalance interval");
        return Err(Error::Parameter { op: OP, name: "leland".into(), value: format!("{cost}"), help });
    }
    Ok(volatility * (1.0 + position.sign() * number).sqrt())
}

/// A volatility, strike and kind whose deltas set-ups share.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Greek {
    kind: u32,
    strike: f64,
    maturity: f64,
    volatility: f64,
}

/// Smallest σ√τ: below, a delta is a step.
const LEAST_DEVIATION: f64 = 1e-6;
/// 1/√(2π).
const BELL: f64 = 0.398_942_280_401_432_7;

impl Greek {
    fn row(&self, m: &HedgeMarket, t: u32) -> [f64; GREEK_ROW] {
        let tau = (self.maturity - f64::from(t) * m.dt()).max(0.0);
        let deviation = (self.volatility * tau.sqrt()).max(LEAST_DEVIATION);
        let (a, carry, discount) = (1.0 / deviation, (-m.dividend * tau).exp(), (-m.rate * tau).exp());
        let d1 = ((m.level / self.strike).ln() + (m.rate - m.dividend) * tau) * a + 0.5 * deviation;
        let (b, factor, gamma) = match self.kind {
            DIGITAL => (d1 - deviation, discount * a * BELL, a),
            SPOT => (0.0, carry, 0.0),
            _ => (d1, carry, carry * a * BELL),
        };
        [if self.kind == SPOT { 0.0 } else { a }, b, factor, gamma, discount, deviation, self.strike, self.strike * discount]
    }
}

/// Set-ups on a device, in tiles.
#[derive(Debug, Clone)]
pub struct Hedges {
    market: HedgeMarket,
    tiles: Vec<Tile>,
    setups: usize,
}

/// Set-ups of one launch.
#[derive(Debug, Clone)]
struct Tile {
    setups: usize,
    level: u32,
    window: u32,
    greeks: usize,
    words: Buffer,
    reals: Buffer,
    table: Buffer,
}

impl Hedges {
    /// Uploads set-ups over one market, in tiles of those that share deltas.
    /// # Errors
    /// `Parameter` for an illegal option, volatility, cost, interval or policy; device errors.
    pub fn new(device: &Device, market: &HedgeMarket, setups: &[Setup]) -> Result<Hedges> {
        Hedges::in_tiles(device, market, setups, TILE)
    }

    /// As [`Hedges::new`], with at most `tile` set-ups a launch on devices that are no CPU.
    /// # Errors
    /// As for [`Hedges::new`].
    pub fn in_tiles(device: &Device, market: &HedgeMarket, setups: &[Setup], tile: usize) -> Result<Hedges> {
        check_market(market)?;
        let tile = if on_cpu(device) { setups.len().max(1) } else { tile.clamp(1, TILE) };
        let mut keyed = setups.iter().enumerate().map(|(row, s)| Ok((Own::of(market, s)?, row, s))).collect::<Result<Vec<_>>>()?;
        let order = |o: &Own| (o.level, o.greek.kind, [o.greek.volatility, o.greek.strike].map(f64::to_bits), o.policy);
        keyed.sort_by_key(|(own, row, _)| (order(own), *row));
        // A tile's policies have one level: code that none of them needs is not compiled in.
        let each = |level: u32| if level == 0 && device.info().software { 1 } else { tile };
        let levels = keyed.chunk_by(|a, b| a.0.level == b.0.level).flat_map(|same| same.chunks(each(same[0].0.level)));
        let tiles = levels.map(|some| upload(device, market, some));
        Ok(Hedges { market: *market, tiles: tiles.collect::<Result<_>>()?, setups: setups.len() })
    }

    /// U.
    pub fn setups(&self) -> usize {
        self.setups
    }

    /// Records hedges over stored paths [P,T+1]: results [U,3,P] of P&L, cost and turnover.
    /// # Errors
    /// `Shape` where the paths are not [P,T+1]; device errors.
    pub fn given(&self, pass: &mut Pass, spot: &Buffer, paths: u64) -> Result<Buffer> {
        let (device, row) = (pass.device().clone(), u64::from(self.market.steps) + 1);
        if spot.len() != paths * row {
            return Err(Error::Shape { op: OP, arg: "spot".into(), expected: format!("[P,T+1] = [{paths}, {row}]"), got: format!("{} values", spot.len()) });
        }
        device.check_rounds(OP, rounds(self.market.steps), "rounds")?;
        let results = device.zeros("results", self.setups as u64 * 3 * paths)?;
        for tile in &self.tiles {
            for run in device.plan(OP, paths, row, 1, work(self.market.steps, tile.setups))? {
                let params = self.params(tile, run.clone(), 0, paths);
                let spot = pass.input(spot, run.start * row..run.end * row)?;
                let args = [View::from(&tile.words), View::from(&tile.reals), View::from(&tile.table), View::from(&results), spot];
                pass.launch(&HEDGE_GIVEN, &params, &args)?;
            }
        }
        Ok(results)
    }

    /// Records hedges over simulated paths of row `market` of a table, `paths` a range of global indices: results [U,3,P] of P&L, cost and
    /// turnover. `given` [.., T+1] holds the prices of replayed paths, from `paths.start` on.
    /// # Errors
    /// `Parameter` where the policies trade futures and the market has none, or the other way round; `Shape`, `TooLarge`; device errors.
    pub fn simulate(&self, pass: &mut Pass, markets: &Markets, market: u32, paths: Range<u64>, given: Option<&View>) -> Result<Buffer> {
        let (device, columns) = (pass.device().clone(), paths.end.saturating_sub(paths.start));
        if markets.steps() != u64::from(self.market.steps) || market >= markets.count() || columns == 0 {
            let expected = format!("paths of a market of {} steps", self.market.steps);
            return Err(Error::Shape { op: OP, arg: "markets".into(), expected, got: format!("{columns} paths of row {market}, {} steps", markets.steps()) });
        }
        let results = device.zeros("results", self.setups as u64 * 3 * columns)?;
        let shared = if markets.kind() == Kind::Replay { None } else { Some(markets.upload(&device)?) };
        for tile in &self.tiles {
            let steps = u64::from(self.market.steps);
            let windows = if tile.level == 3 { 2 * u64::from(tile.window) * tile.setups as u64 } else { 0 };
            device.check_rounds(OP, steps * (markets.rounds() + 4) + rounds(self.market.steps) + steps * windows, "rounds")?;
            if (tile.level == 3) != markets.futures() {
                let help = if markets.futures() {
                    "hedge with the futures, or give a market without a basis"
                } else {
                    "give the market a basis: futures beside the spot"
                };
                return Err(bad("policy", if tile.level == 3 { "futures" } else { "spot" }, help));
            }
            let kernel = match (tile.level, tile.setups) {
                (0, 1) if !on_cpu(&device) => Some(SINGLE[markets.kind() as usize]),
                _ => BY_KIND[markets.kind() as usize][tile.level as usize],
            };
            let kernel = kernel.ok_or_else(|| bad("policy", "futures", "given paths have no futures"))?;
            let history = if tile.level == 3 { 2 * u64::from(tile.window) } else { 1 };
            for run in device.plan(OP, columns, history, 1, work(self.market.steps, tile.setups))? {
                let (reals, words) = match (&shared, given) {
                    (Some((reals, words)), _) => (View::from(reals), View::from(words)),
                    (None, Some(given)) => markets.with_given(pass, given, run.clone())?,
                    (None, None) => return Err(Error::Shape { op: OP, arg: "given".into(), expected: "[P,T+1] prices".into(), got: "none".into() }),
                };
                // Given paths count from the first that is given.
                let params = self.params(tile, run.clone(), if shared.is_some() { paths.start } else { 0 }, columns);
                let params = HedgeParams { market, ..params };
                let mut args = vec![View::from(&tile.words), View::from(&tile.reals), View::from(&tile.table), View::from(&results), reals, words];
                if tile.level == 3 {
                    args.push(View::from(&device.zeros("history", history * (run.end - run.start))?));
                }
                pass.launch(kernel, &params, &args)?;
            }
        }
        Ok(results)
    }

    fn params(&self, tile: &Tile, run: Range<u64>, first_path: u64, columns: u64) -> HedgeParams {
        let path = first_path + run.start;
        HedgeParams {
            paths: (run.end - run.start) as u32,
            first: run.start as u32,
            columns: columns as u32,
            steps: self.market.steps,
            setups: tile.setups as u32,
            greeks: tile.greeks as u32,
            market: 0,
            path: path as u32,
            path_high: (path >> 32) as u32,
            window: tile.window,
        }
    }
}

/// Rounds of one thread's loops: steps, greeks and set-ups of each.
fn rounds(steps: u32) -> u64 {
    (1 + 2 * TILE as u64) * (u64::from(steps) + 1)
}

/// Instructions of one path.
fn work(steps: u32, setups: usize) -> u64 {
    u64::from(steps) * (60 + 60 * setups as u64)
}

/// The CPU takes all set-ups at once: their state lies in the cache.
fn on_cpu(device: &Device) -> bool {
    matches!(device.info().kind, DeviceKind::Cpu | DeviceKind::Reference)
}

fn bad(name: &str, value: impl std::fmt::Display, help: &str) -> Error {
    Error::Parameter { op: OP, name: name.into(), value: value.to_string(), help: help.into() }
}

fn positive(name: &str, x: f64, help: &str) -> Result<()> {
    if x.is_finite() && x > 0.0 { Ok(()) } else { Err(bad(name, x, help)) }
}

fn at_least_zero(name: &str, x: f64, help: &str) -> Result<()> {
    if x.is_finite() && x >= 0.0 { Ok(()) } else { Err(bad(name, x, help)) }
}

/// Checks what set-ups share.
/// # Errors
/// `Parameter` naming the illegal one.
pub fn check_market(m: &HedgeMarket) -> Result<()> {
    positive("spot", m.level, "give a positive price")?;
    positive("maturity", m.maturity, "give years to maturity, above 0")?;
    if m.steps == 0 {
        return Err(bad("steps", 0, "give the steps of a path, 1 or more"));
    }
    for (name, x) in [("rate", m.rate), ("dividend", m.dividend)] {
        if !(x.is_finite() && (x * m.maturity).abs() < 10.0) {
            return Err(bad(name, x, "give a rate a year, continuously compounded: 0.03 is three per cent"));
        }
    }
    Ok(())
}

/// Checks one set-up.
/// # Errors
/// `Parameter` naming what is illegal.
pub fn check_setup(m: &HedgeMarket, s: &Setup) -> Result<()> {
    positive("strike", s.option.strike, "give a positive strike")?;
    positive("volatility", s.volatility, "give an annual volatility above 0: 0.2 is twenty per cent")?;
    at_least_zero("cost_bps", s.costs.proportional_bps, "give basis points, 0 or more")?;
    at_least_zero("half_spread_bps", s.costs.half_spread_bps, "give basis points, 0 or more")?;
    at_least_zero("fixed", s.costs.fixed, "give money per trade, 0 or more")?;
    if s.costs.fraction() >= 1.0 {
        return Err(bad("cost_bps", s.costs.proportional_bps, "costs stay below 10000 basis points"));
    }
    if s.every == 0 {
        return Err(bad("rebalance", 0, "give the steps between two trades, 1 or more"));
    }
    if let Some(p) = s.premium.filter(|p| !p.is_finite()) {
        return Err(bad("premium", p, "give a finite amount of money"));
    }
    match &s.policy {
        Policy::Band { width } => at_least_zero("band", *width, "give a half-width of delta, 0 or more (0.05)"),
        Policy::WhalleyWilmott { risk_aversion } => positive("risk_aversion", *risk_aversion, "give an absolute risk aversion above 0"),
        Policy::Move { threshold } => at_least_zero("threshold", *threshold, "give a relative move of the spot, 0 or more (0.01)"),
        Policy::DeltaGamma { strike, maturity, half_spread_bps } => {
            positive("strike", *strike, "give a positive strike of the second option")?;
            at_least_zero("half_spread_bps", *half_spread_bps, "give basis points, 0 or more")?;
            if maturity.is_finite() && *maturity >= m.maturity {
                Ok(())
            } else {
                Err(bad("maturity", maturity, &format!("the second option must live as long as the hedged one ({} years) or longer", m.maturity)))
            }
        }
        Policy::MinimumVariance { window } if *window < 2 => Err(bad("window", window, "a variance needs two steps or more")),
        Policy::RegimeRatio { ratios } if ratios.is_empty() || ratios.len() > MOST_REGIMES || ratios.iter().any(|r| !r.is_finite()) => {
            Err(bad("ratios", format!("{ratios:?}"), "give one finite ratio per regime, at most 8"))
        }
        _ => Ok(()),
    }
}

/// What decides which set-ups share a launch.
#[derive(Clone, Copy)]
struct Own {
    greek: Greek,
    policy: u32,
    /// 0: at most a delta; 1: bands and moves; 2: a second option; 3: futures.
    level: u32,
}

impl Own {
    fn of(m: &HedgeMarket, s: &Setup) -> Result<Own> {
        check_setup(m, s)?;
        let volatility = match s.policy {
            Policy::Leland => leland_volatility(s.volatility, s.costs.fraction(), m.dt() * f64::from(s.every), s.option.position)?,
            _ => s.volatility,
        };
        let greek = Greek { kind: s.option.kind.code(), strike: s.option.strike, maturity: m.maturity, volatility };
        let policy = s.policy.code();
        let level = match policy {
            NONE | STATIC | DELTA => 0,
            DELTA_GAMMA => 2,
            MINIMUM_VARIANCE | REGIME_RATIO => 3,
            _ => 1,
        };
        Ok(Own { greek, policy, level })
    }
}

/// Words, reals and table of a tile.
#[derive(Default)]
struct Packed {
    words: Vec<u32>,
    reals: Vec<f64>,
    greeks: Vec<Greek>,
}

impl Packed {
    fn of(m: &HedgeMarket, setups: &[(Own, usize, &Setup)]) -> Packed {
        let mut packed = Packed::default();
        packed.reals.extend([m.level, (m.rate * m.dt()).exp_m1(), (m.dividend * m.dt()).exp_m1()]);
        packed.reals.resize(SETUP_REALS, 0.0);
        let mut uses: Vec<[u32; GREEK_WORDS]> = Vec::new();
        for (u, (own, _, s)) in setups.iter().enumerate() {
            let greek = packed.greek(own.greek) as usize;
            let every = if matches!(s.policy, Policy::Static | Policy::None) { 0 } else { s.every };
            if greek == uses.len() {
                uses.push([own.greek.kind, every, u as u32, 0]);
            }
            uses[greek] = [own.greek.kind, divisor(uses[greek][1], every), uses[greek][2], u as u32 + 1];
        }
        for (own, row, s) in setups {
            packed.push(m, own, *row, s);
        }
        // Greeks of second options and of premiums come behind those of the set-ups, and have none of their own.
        uses.extend(packed.greeks[uses.len()..].iter().map(|g| [g.kind, 0, 0, 0]));
        for (u, (_, _, s)) in setups.iter().enumerate() {
            if matches!(s.policy, Policy::DeltaGamma { .. }) {
                let second = packed.words[u * SETUP_WORDS + 5] as usize;
                uses[second][1] = divisor(uses[second][1], s.every);
            }
        }
        packed.words.extend(uses.iter().flatten());
        packed
    }

    /// Place of a greek.
    fn greek(&mut self, greek: Greek) -> u32 {
        let at = self.greeks.iter().position(|g| *g == greek);
        at.unwrap_or_else(|| {
            self.greeks.push(greek);
            self.greeks.len() - 1
        }) as u32
    }

    fn push(&mut self, m: &HedgeMarket, own: &Own, row: usize, s: &Setup) {
        let (cost, sign, kind) = (s.costs.fraction(), s.option.position.sign(), own.greek.kind);
        let greek = self.greek(own.greek);
        let premium = self.greek(Greek { volatility: s.volatility, ..own.greek });
        let second = match s.policy {
            Policy::DeltaGamma { strike, maturity, .. } => self.greek(Greek { kind: CALL, strike, maturity, volatility: s.volatility }),
            _ => greek,
        };
        let (parameter, half_spread, window) = match s.policy {
            Policy::Band { width } => (width, 0.0, 0),
            Policy::WhalleyWilmott { risk_aversion } => (1.5 * cost / risk_aversion, 0.0, 0),
            Policy::Move { threshold } => (threshold, 0.0, 0),
            Policy::DeltaGamma { half_spread_bps, .. } => (0.0, half_spread_bps * 1e-4, 0),
            Policy::MinimumVariance { window } => (0.0, 0.0, window.min(m.steps)),
            _ => (0.0, 0.0, 0),
        };
        let flags = if s.costs.unwind { UNWIND } else { 0 } | if s.premium.is_none() { PREMIUM_AT_SPOT } else { 0 };
        self.words.extend([own.policy, s.every, greek, kind, flags, second, window, premium, row as u32]);
        self.reals.extend([cost, s.costs.fixed, parameter, s.option.strike, sign * s.premium.unwrap_or(0.0), sign, half_spread, MOST_OPTIONS]);
        let mut ratios = [0.0; MOST_REGIMES];
        if let Policy::RegimeRatio { ratios: given } = &s.policy {
            ratios[..given.len()].copy_from_slice(given);
        }
        self.reals.extend(ratios);
    }
}

/// Most options that a delta-gamma hedge holds per option hedged: gamma at the strike has no bound near maturity.
const MOST_OPTIONS: f64 = 10.0;

/// Greatest common divisor; 0 is neutral.
fn divisor(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { divisor(b, a % b) }
}

fn upload(device: &Device, m: &HedgeMarket, setups: &[(Own, usize, &Setup)]) -> Result<Tile> {
    let packed = Packed::of(m, setups);
    let table: Vec<f64> = packed.greeks.iter().flat_map(|g| (0..=m.steps).flat_map(|t| g.row(m, t))).collect();
    let reals = |label: &str, x: &[f64]| -> Result<Buffer> {
        let buffer = device.zeros(label, x.len() as u64)?;
        device.write_f64(&buffer, x)?;
        Ok(buffer)
    };
    let words = device.upload_u32("setups", &packed.words)?;
    let greeks = packed.greeks.len();
    let level = setups.first().map_or(0, |s| s.0.level);
    let window = packed.words.chunks_exact(SETUP_WORDS).take(setups.len()).map(|word| word[6]).max().unwrap_or(0).max(1);
    Ok(Tile { setups: setups.len(), level, window, greeks, words, reals: reals("reals", &packed.reals)?, table: reals("table", &table)? })
}

// ---- reference ----------------------------------------------------------------------------------------------------------------

/// Inputs of a launch.
#[derive(Clone, Copy)]
pub(crate) struct Work<'a, R> {
    pub(crate) p: HedgeParams,
    pub(crate) words: &'a [u32],
    pub(crate) reals: &'a [R],
    pub(crate) table: &'a [R],
}

impl<'a, R: Real> Work<'a, R> {
    pub(crate) fn setup(&self, u: usize) -> &'a [u32] {
        &self.words[u * SETUP_WORDS..][..SETUP_WORDS]
    }

    pub(crate) fn real(&self, u: usize) -> &'a [R] {
        &self.reals[(1 + u) * SETUP_REALS..][..SETUP_REALS]
    }

    pub(crate) fn row(&self, greek: u32, t: usize) -> &'a [R] {
        &self.table[(greek as usize * (self.p.steps as usize + 1) + t) * GREEK_ROW..][..GREEK_ROW]
    }

    /// Kind of a greek, and the steps between its uses (0: only the first).
    pub(crate) fn greek(&self, g: usize) -> (u32, u32) {
        let at = self.p.setups as usize * SETUP_WORDS + GREEK_WORDS * g;
        (self.words[at], self.words[at + 1])
    }
}

/// What is known of the spot at a step.
#[derive(Clone, Copy)]
pub(crate) struct Quote<R> {
    /// Log-spot relative to the level.
    pub(crate) x: R,
    /// Spot.
    pub(crate) s: R,
}

/// Delta and gamma.
pub(crate) fn greeks<R: Real>(row: &[R], kind: u32, q: Quote<R>) -> (R, R) {
    let d = row[0] * q.x + row[1];
    let bell = (R::of(-0.5) * d * d).exp();
    match kind {
        PUT => (row[2] * (d.normal_cdf() - R::ONE), row[3] * bell / q.s),
        DIGITAL => (row[2] * bell / q.s, -(row[2] * bell * (R::ONE + row[3] * d) / (q.s * q.s))),
        SPOT => (row[2], R::ZERO),
        _ => (row[2] * d.normal_cdf(), row[3] * bell / q.s),
    }
}

/// Black-Scholes price.
pub(crate) fn price<R: Real>(row: &[R], kind: u32, q: Quote<R>) -> R {
    let d = row[0] * q.x + row[1];
    match kind {
        DIGITAL => row[4] * d.normal_cdf(),
        SPOT => q.s * row[2],
        PUT => row[7] * (row[5] - d).normal_cdf() - q.s * row[2] * (-d).normal_cdf(),
        _ => q.s * row[2] * d.normal_cdf() - row[7] * (d - row[5]).normal_cdf(),
    }
}

pub(crate) fn payoff<R: Real>(kind: u32, s: R, strike: R) -> R {
    match kind {
        PUT => (strike - s).max(R::ZERO),
        DIGITAL => {
            if s > strike {
                R::ONE
            } else {
                R::ZERO
            }
        }
        SPOT => s,
        _ => (s - strike).max(R::ZERO),
    }
}

/// What a set-up carries from step to step.
#[derive(Clone, Copy, Default)]
pub(crate) struct State<R> {
    pub(crate) holding: R,
    pub(crate) wealth: R,
    /// Traded notional of the spot.
    pub(crate) turnover: R,
    /// Costs that are not proportional to it.
    pub(crate) fees: R,
    /// Spot at the last trade.
    pub(crate) last: R,
    /// Second options held, and their traded notional.
    pub(crate) options: R,
    pub(crate) option_turnover: R,
}

impl<R: Real> State<R> {
    pub(crate) fn start(w: &Work<'_, R>, u: usize, q: Quote<R>) -> State<R> {
        let (setup, real) = (w.setup(u), w.real(u));
        let premium = if setup[4] & PREMIUM_AT_SPOT > 0 { real[5] * price(w.row(setup[7], 0), setup[3], q) } else { real[4] };
        State { wealth: premium, ..State::default() }
    }

    /// Trades at step t.
    pub(crate) fn trade(&mut self, w: &Work<'_, R>, u: usize, t: usize, q: Quote<R>) {
        let (setup, real) = (w.setup(u), w.real(u));
        if !(t as u32).is_multiple_of(setup[1]) {
            return;
        }
        let row = w.row(setup[2], t);
        let (delta, gamma) = greeks(row, setup[3], q);
        let target = real[5] * delta;
        let clip = |width: R| if t == 0 { target } else { self.holding.max(target - width).min(target + width) };
        let to = match setup[0] {
            NONE => R::ZERO,
            STATIC if t > 0 => self.holding,
            BAND => clip(real[2]),
            WHALLEY_WILMOTT => clip(cube_root(real[2] * row[4] * q.s * gamma * gamma)),
            MOVE if t > 0 && (q.s - self.last).abs() <= real[2] * self.last => self.holding,
            DELTA_GAMMA => {
                let second = w.row(setup[5], t);
                let (delta_option, gamma_option) = greeks(second, CALL, q);
                let flat = R::of(1e-12) / (q.s * q.s);
                let options = (real[5] * gamma * gamma_option / (gamma_option * gamma_option + flat)).max(-real[7]).min(real[7]);
                self.trade_options(real, options, price(second, CALL, q));
                target - options * delta_option
            }
            _ => target,
        };
        self.trade_to(real, to, q.s);
    }

    /// Trades to a holding of what costs `price`.
    fn trade_to(&mut self, real: &[R], to: R, price: R) {
        let trade = to - self.holding;
        if trade == R::ZERO {
            return;
        }
        let notional = trade.abs() * price;
        self.wealth += -(real[0] * notional + real[1]);
        self.turnover += notional;
        self.fees += real[1];
        (self.holding, self.last) = (to, price);
    }

    fn trade_options(&mut self, real: &[R], to: R, price: R) {
        let trade = to - self.options;
        if trade == R::ZERO {
            return;
        }
        let notional = trade.abs() * price;
        let paid = real[6] * notional + real[1];
        self.wealth += -(trade * price + paid);
        self.option_turnover += notional;
        self.fees += paid;
        self.options = to;
    }

    /// Earns the step to the next spot.
    pub(crate) fn earn(&mut self, reals: &[R], now: R, next: R) {
        let earned = (next - now) + (next * reals[2] - now * reals[1]);
        self.wealth += self.wealth * reals[1] + self.holding * earned;
    }

    /// P&L, cost and turnover at maturity.
    pub(crate) fn finish(mut self, w: &Work<'_, R>, u: usize, q: Quote<R>, traded: R) -> [R; 3] {
        let (setup, real) = (w.setup(u), w.real(u));
        if setup[0] == DELTA_GAMMA {
            let worth = price(w.row(setup[5], w.p.steps as usize), CALL, q);
            self.wealth += self.options * worth;
            if setup[4] & UNWIND > 0 && self.options != R::ZERO {
                let paid = real[6] * self.options.abs() * worth + real[1];
                self.wealth += -paid;
                self.fees += paid;
                self.option_turnover += self.options.abs() * worth;
            }
        }
        if setup[4] & UNWIND > 0 && self.holding != R::ZERO {
            let notional = self.holding.abs() * traded;
            self.wealth += -(real[0] * notional + real[1]);
            self.turnover += notional;
            self.fees += real[1];
        }
        let pnl = self.wealth - real[5] * payoff(setup[3], q.s, real[3]);
        [pnl, real[0] * self.turnover + self.fees, self.turnover + self.option_turnover]
    }
}

fn cube_root<R: Real>(x: R) -> R {
    R::of(x.f64().max(0.0).cbrt())
}

/// Copies blocks [U,3,width] of paths into the rows of the results.
pub(crate) fn write_back<R: Real>(w: &Work<'_, R>, results: &mut [R], blocks: Vec<(usize, Vec<R>)>) {
    let columns = w.p.columns as usize;
    for (path, block) in blocks {
        let width = block.len() / (3 * w.p.setups as usize).max(1);
        for (i, values) in block.chunks_exact(width.max(1)).enumerate() {
            let row = 3 * w.setup(i / 3)[8] as usize + i % 3;
            results[row * columns + w.p.first as usize + path..][..width].copy_from_slice(values);
        }
    }
}

/// Paths that a thread of the CPU takes at a time.
const BLOCK: usize = 64;

/// Runs blocks of paths on all threads and writes their results back.
fn in_blocks<R: Real>(w: &Work<'_, R>, results: &mut [R], one: impl Fn(usize, &mut dyn FnMut(usize, [R; 3])) + Sync) {
    let (paths, setups) = (w.p.paths as usize, w.p.setups as usize);
    let block = |start: usize| {
        let width = BLOCK.min(paths - start);
        let mut out = vec![R::ZERO; 3 * setups * width];
        for i in 0..width {
            one(start + i, &mut |u, figures| {
                for (row, x) in figures.into_iter().enumerate() {
                    out[(3 * u + row) * width + i] = x;
                }
            });
        }
        (start, out)
    };
    for round in (0..paths).step_by(1024 * BLOCK) {
        let starts: Vec<usize> = (round..paths.min(round + 1024 * BLOCK)).step_by(BLOCK).collect();
        write_back(w, results, starts.into_par_iter().map(block).collect());
    }
}

pub(crate) fn hedge_given_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: HedgeParams = launch.params()?;
    let w = Work { p, words: launch.word()?, reals: launch.real()?, table: launch.real()? };
    let (results, spot) = (launch.real_mut()?, launch.real()?);
    let steps = p.steps as usize;
    in_blocks(&w, results, |path, write| {
        let path = &spot[path * (steps + 1)..][..steps + 1];
        let quote = |t: usize| Quote { x: (path[t] / w.reals[0]).ln(), s: path[t] };
        let mut states: Vec<State<R>> = (0..p.setups as usize).map(|u| State::start(&w, u, quote(0))).collect();
        for t in 0..steps {
            let q = quote(t);
            for (u, state) in states.iter_mut().enumerate() {
                state.trade(&w, u, t, q);
                state.earn(w.reals, q.s, path[t + 1]);
            }
        }
        for (u, state) in states.into_iter().enumerate() {
            write(u, state.finish(&w, u, quote(steps), path[steps]));
        }
    });
    Ok(())
}

pub(crate) fn hedge_simulated_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: HedgeParams = launch.params()?;
    let w = Work { p, words: launch.word()?, reals: launch.real()?, table: launch.real()? };
    let results = launch.real_mut()?;
    let market = PathMarket::of(launch.real()?, launch.word()?, p.market as usize);
    let first = u64::from(p.path_high) << 32 | u64::from(p.path);
    in_blocks(&w, results, |path, write| {
        let path = first + path as u64;
        let mut at = market.start(path);
        let mut q = Quote { x: at.x, s: market.spot(&at) };
        let mut states: Vec<State<R>> = (0..p.setups as usize).map(|u| State::start(&w, u, q)).collect();
        let mut draws = market.draws(path, 0);
        for t in 0..p.steps {
            if t % 4 == 0 {
                draws = market.draws(path, t / 4);
            }
            market.step(&mut at, &draws, t);
            let next = Quote { x: at.x, s: market.spot(&at) };
            for (u, state) in states.iter_mut().enumerate() {
                state.trade(&w, u, t as usize, q);
                state.earn(w.reals, q.s, next.s);
            }
            q = next;
        }
        for (u, state) in states.into_iter().enumerate() {
            write(u, state.finish(&w, u, q, q.s));
        }
    });
    Ok(())
}

/// Futures per unit of delta: given by regime, or of least variance over the last `window` changes, 1 while there are fewer.
fn futures_ratio<R: Real>(setup: &[u32], real: &[R], changes: &[(R, R)], regime: u32) -> R {
    if setup[0] != MINIMUM_VARIANCE {
        return real[8 + (regime as usize).min(MOST_REGIMES - 1)];
    }
    let window = setup[6] as usize;
    if changes.len() < window {
        return R::ONE;
    }
    let (last, n) = (&changes[changes.len() - window..], R::of(window as f64));
    let (spot, future) = (last.iter().map(|c| c.0).sum::<R>() / n, last.iter().map(|c| c.1).sum::<R>() / n);
    let both: R = last.iter().map(|c| (c.0 - spot) * (c.1 - future)).sum();
    let own: R = last.iter().map(|c| (c.1 - future) * (c.1 - future)).sum();
    if own > R::ZERO { both / own } else { R::ONE }
}

pub(crate) fn hedge_futures_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: HedgeParams = launch.params()?;
    let w = Work { p, words: launch.word()?, reals: launch.real()?, table: launch.real()? };
    let results = launch.real_mut()?;
    let market = PathMarket::of(launch.real()?, launch.word()?, p.market as usize);
    let first = u64::from(p.path_high) << 32 | u64::from(p.path);
    in_blocks(&w, results, |path, write| {
        let path = first + path as u64;
        let mut at = market.start(path);
        let (mut q, mut future) = (Quote { x: at.x, s: market.spot(&at) }, market.future(&at));
        let mut states: Vec<State<R>> = (0..p.setups as usize).map(|u| State::start(&w, u, q)).collect();
        let mut changes = Vec::with_capacity(p.steps as usize);
        let mut draws = market.draws(path, 0);
        for t in 0..p.steps {
            if t % 4 == 0 {
                draws = market.draws(path, t / 4);
            }
            let regime = at.regime;
            market.step(&mut at, &draws, t);
            let (next, next_future) = (Quote { x: at.x, s: market.spot(&at) }, market.future(&at));
            for (u, state) in states.iter_mut().enumerate() {
                let (setup, real) = (w.setup(u), w.real(u));
                if t.is_multiple_of(setup[1]) {
                    let (delta, _) = greeks(w.row(setup[2], t as usize), setup[3], q);
                    state.trade_to(real, real[5] * delta * futures_ratio(setup, real, &changes, regime), future);
                }
                state.wealth += state.wealth * w.reals[1] + state.holding * (next_future - future);
            }
            changes.push((next.s - q.s, next_future - future));
            (q, future) = (next, next_future);
        }
        for (u, state) in states.into_iter().enumerate() {
            write(u, state.finish(&w, u, q, future));
        }
    });
    Ok(())
}

// ---- one path, step by step ---------------------------------------------------------------------------------------------------

/// What a hedge did at one step of a path.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HedgeStep {
    /// Black-Scholes delta of the position's hedge (its sign included), at the policy's volatility; the payoff's slope at maturity.
    pub delta: f64,
    /// Gamma of the option.
    pub gamma: f64,
    /// Spot, or futures, held after the trade.
    pub holding: f64,
    /// Spot, or futures, bought.
    pub trade: f64,
    /// What the step's trades cost.
    pub cost: f64,
    /// Cash after the trade (of futures, the margin account).
    pub cash: f64,
    /// Cash and holdings less what the option is worth at the set-up's volatility; the P&L at maturity.
    pub pnl: f64,
    /// Price of the second instrument (second option or futures); NaN where there is none.
    pub hedge_price: f64,
    /// Second options held after the trade.
    pub option_holding: f64,
    /// Second options bought.
    pub option_trade: f64,
}

/// Hedges one path in f64: spots [T+1], with futures [T+1] and regimes [T+1] where the policy trades those. T+1 steps, the last at maturity.
/// # Errors
/// `Shape` for lengths that do not match; `Parameter` naming what is illegal.
pub fn hedge_steps(market: &HedgeMarket, setup: &Setup, spot: &[f64], futures: &[f64], regimes: &[u32]) -> Result<Vec<HedgeStep>> {
    check_market(market)?;
    let own = Own::of(market, setup)?;
    let (steps, with_futures) = (market.steps as usize, setup.policy.trades_futures());
    let bars = steps + 1;
    if spot.len() != bars || with_futures && (futures.len() != bars || matches!(setup.policy, Policy::RegimeRatio { .. }) && regimes.len() != bars) {
        let got = format!("{}, {} and {} values", spot.len(), futures.len(), regimes.len());
        return Err(Error::Shape { op: OP, arg: "spot, futures, regimes".into(), expected: format!("[T+1] = [{bars}] each"), got });
    }
    let packed = Packed::of(market, &[(own, 0, setup)]);
    let table: Vec<f64> = packed.greeks.iter().flat_map(|g| (0..=market.steps).flat_map(|t| g.row(market, t))).collect();
    let p = HedgeParams { steps: market.steps, setups: 1, greeks: packed.greeks.len() as u32, ..bytemuck::Zeroable::zeroed() };
    let w = Work { p, words: &packed.words, reals: &packed.reals, table: &table };
    let (words, real) = (w.setup(0), w.real(0));
    let quote = |t: usize| Quote { x: (spot[t] / market.level).ln(), s: spot[t] };
    let mut state = State::start(&w, 0, quote(0));
    let (mut changes, mut out) = (Vec::new(), Vec::with_capacity(bars));
    for t in 0..=steps {
        let (q, before) = (quote(t), state);
        let traded = if with_futures { futures[t] } else { q.s };
        let (delta, gamma) = greeks(w.row(words[2], t), words[3], q);
        let paid = |s: &State<f64>| real[0] * s.turnover + s.fees;
        let second = if words[0] == DELTA_GAMMA { price(w.row(words[5], t), CALL, q) } else { 0.0 };
        let mut step = HedgeStep { delta: real[5] * delta, gamma, hedge_price: f64::NAN, ..HedgeStep::NONE };
        if words[0] == DELTA_GAMMA || with_futures {
            step.hedge_price = if with_futures { traded } else { second };
        }
        if t == steps {
            let [pnl, cost, _] = state.finish(&w, 0, q, traded);
            let sold = words[4] & UNWIND > 0;
            (step.trade, step.option_trade) = if sold { (-state.holding, -state.options) } else { (0.0, 0.0) };
            (step.holding, step.option_holding) = (state.holding + step.trade, state.options + step.option_trade);
            (step.cost, step.pnl) = (cost - paid(&state), pnl);
            let held = if with_futures { 0.0 } else { step.holding * traded };
            step.cash = pnl + real[5] * payoff(words[3], q.s, real[3]) - held - step.option_holding * second;
            out.push(step);
            break;
        }
        if !with_futures {
            state.trade(&w, 0, t, q);
        } else if (t as u32).is_multiple_of(words[1]) {
            let ratio = futures_ratio(words, real, &changes, regimes.get(t).copied().unwrap_or(0));
            state.trade_to(real, real[5] * delta * ratio, traded);
        }
        (step.holding, step.trade) = (state.holding, state.holding - before.holding);
        (step.option_holding, step.option_trade) = (state.options, state.options - before.options);
        step.cost = paid(&state) - paid(&before);
        step.cash = if with_futures { state.wealth } else { state.wealth - state.holding * q.s };
        step.pnl = state.wealth + state.options * second - real[5] * price(w.row(words[7], t), words[3], q);
        out.push(step);
        if with_futures {
            state.wealth += state.wealth * w.reals[1] + state.holding * (futures[t + 1] - futures[t]);
            changes.push((spot[t + 1] - spot[t], futures[t + 1] - futures[t]));
        } else {
            state.earn(w.reals, spot[t], spot[t + 1]);
        }
    }
    Ok(out)
}

impl HedgeStep {
    const NONE: HedgeStep = HedgeStep {
        delta: 0.0,
        gamma: 0.0,
        holding: 0.0,
        trade: 0.0,
        cost: 0.0,
        cash: 0.0,
        pnl: 0.0,
        hedge_price: f64::NAN,
        option_holding: 0.0,
        option_trade: 0.0,
    };
}

/// Black-Scholes price, delta, gamma and vega (S²·Γ·σ·T) of an option at the market's level, at time 0.
pub fn option_at_level(market: &HedgeMarket, option: &HedgedOption, volatility: f64) -> [f64; 4] {
    let greek = Greek { kind: option.kind.code(), strike: option.strike, maturity: market.maturity, volatility };
    let (row, q) = (greek.row(market, 0), Quote { x: 0.0, s: market.level });
    let (delta, gamma) = greeks(&row, greek.kind, q);
    [price(&row, greek.kind, q), delta, gamma, gamma * market.level * market.level * volatility * market.maturity]
}

// ---- the op -------------------------------------------------------------------------------------------------------------------

/// P&L and costs of one set-up over paths [P,T+1].
#[derive(Debug, Clone, PartialEq)]
pub struct HedgeOutcome {
    /// [P].
    pub pnl: Vec<f64>,
    /// [P].
    pub cost: Vec<f64>,
    /// Σ|trade|·price [P].
    pub turnover: Vec<f64>,
    /// Launches on the device.
    pub launches: usize,
}

/// Hedges one set-up over given paths [P,T+1], T the market's steps.
/// # Errors
/// `Shape` where the paths are not [P,T+1]; `Parameter` naming a price that is not a positive number, or an illegal set-up.
pub fn hedge_paths(device: &Device, market: &HedgeMarket, setup: &Setup, spot: &[f32]) -> Result<HedgeOutcome> {
    let row = market.steps as usize + 1;
    if !spot.len().is_multiple_of(row) {
        return Err(Error::Shape { op: OP, arg: "spot".into(), expected: format!("[P,T+1] with T = {}", market.steps), got: format!("{} values", spot.len()) });
    }
    if let Some(i) = spot.iter().position(|s| !(s.is_normal() && *s > 0.0)) {
        return Err(bad(&format!("spot[{}, {}]", i / row, i % row), spot[i], "prices must be positive, finite numbers"));
    }
    if setup.policy.trades_futures() {
        return Err(bad("policy", setup.policy.name(), "futures need paths of spot and futures: simulate them"));
    }
    let paths = spot.len() / row;
    let hedges = Hedges::new(device, market, std::slice::from_ref(setup))?;
    let mut out = HedgeOutcome { pnl: Vec::new(), cost: Vec::new(), turnover: Vec::new(), launches: 0 };
    if paths == 0 {
        return Ok(out);
    }
    // A batch's paths fit one binding, twice over.
    let batch = (device.limits().binding_bytes.min(256 << 20) / (8 * row as u64)).clamp(1, 1 << 24) as usize;
    for chunk in spot.chunks(batch * row) {
        let mut pass = device.pass(OP);
        let n = (chunk.len() / row) as u64;
        let results = hedges.given(&mut pass, &device.upload("spot", chunk)?, n)?;
        let read = pass.read(&results)?;
        out.launches += pass.launches();
        let values = pass.submit()?.f64(read)?;
        for (to, from) in [&mut out.pnl, &mut out.cost, &mut out.turnover].into_iter().zip(values.chunks_exact(n as usize)) {
            to.extend_from_slice(from);
        }
    }
    Ok(out)
}

/// Conformance binding.
pub(crate) fn verify(device: &Device, case: &Case) -> Result<Outputs> {
    let shape = case.shape("spot")?;
    let [_, row] = shape else {
        return Err(Error::Shape { op: OP, arg: "spot".into(), expected: "[P,T+1]".into(), got: format!("{shape:?}") });
    };
    let optional = |name: &str, default: f64| if case.given(name) { case.number(name) } else { Ok(default) };
    let policy = match case.text("policy")? {
        "none" => Policy::None,
        "static" => Policy::Static,
        "delta" => Policy::Delta,
        "leland" => Policy::Leland,
        "band" => Policy::Band { width: case.number("band")? },
        "whalley_wilmott" => Policy::WhalleyWilmott { risk_aversion: case.number("risk_aversion")? },
        "move" => Policy::Move { threshold: case.number("threshold")? },
        other => {
            let known = ["none", "static", "delta", "leland", "band", "whalley_wilmott", "move"].map(String::from).to_vec();
            return Err(Error::Unknown { kind: "policy", given: other.into(), suggestion: None, known });
        }
    };
    let (strike, maturity) = (case.number("strike")?, case.number("maturity")?);
    let steps = row.checked_sub(1).and_then(|t| u32::try_from(t).ok()).unwrap_or(0);
    let market = HedgeMarket { level: strike, rate: optional("rate", 0.0)?, dividend: optional("dividend", 0.0)?, maturity, steps };
    let setup = Setup {
        option: HedgedOption { kind: OptionKind::Call, strike, maturity, position: Position::Short },
        policy,
        costs: Costs::bps(optional("cost_bps", 0.0)?),
        every: optional("rebalance", 1.0)? as u32,
        volatility: case.number("volatility")?,
        premium: None,
    };
    let out = hedge_paths(device, &market, &setup, case.f32("spot")?)?;
    let mut outputs = Outputs::launched(out.launches);
    outputs.reals("pnl", out.pnl);
    outputs.reals("cost", out.cost);
    outputs.reals("turnover", out.turnover);
    Ok(outputs)
}
