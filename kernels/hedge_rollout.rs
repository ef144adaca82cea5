//! Neural hedging policies rolled out over price paths, forward and backward: one pass over a path holds network, trades and costs.
//!
//! At step t = 0 … T−1, τ = maturity − t·dt, dt = maturity / T, F[t] = S[t]·e^(rate·(maturity − t·dt)):
//! input      x = (ln S[t]/K, √τ, baseline b, previous holding h[t−1], features)
//! network    an MLP of 1 to 4 layers, or an LSTM of 1 or 2 layers (gates i, f, g, o), then a dense head o
//! residual   h[t] = b + range·tanh o₀
//! band       h[t] = clamp(h[t−1], b − λ(o₀), b + λ(o₁)), λ leaky relu of slope 0.01; the middle where the edges have crossed
//! wide_band  the same with edges b − w·e^(range·tanh o₀), b + w·e^(range·tanh o₁), w = (1.5·e^(−rate·τ)·c·S·Γ²/risk_aversion)^⅓
//! charge     k[t] = |h[t] − h[t−1]|·(c·S[t] + half_spread) + fixed·[h[t] ≠ h[t−1]],  h[−1] = 0; at T, if wanted, for h[T−1] → 0
//! pnl        premium·e^(rate·maturity) + Σ h[t]·(F[t+1] − F[t]) − Σ k[t]·e^(rate·(maturity − t·dt)) − claim
//! Ragged paths end at their last price above 0, after L ≥ 1 of the T steps: there their options mature (τ = (L − t)·maturity/T), and nothing
//! changes behind it.
//! A head of zeros gives exactly the baseline (Black-Scholes delta), or exactly the band of Whalley and Wilmott.
//! backward   gradients of the weights from those of pnl, cost and turnover. |·| has slope 0 at 0; fixed costs have none; a holding at the
//!            edge of its band follows the edge, inside it the previous holding. With a lookback L gradients do not pass through the state of
//!            an LSTM from one window of L steps into the one before; through the previous holding they do.
//!
//! Shapes   weights [M,W]; risk [M,4] cost c as a share of value, half-spread in price, cost of a trade, risk aversion; spot [P,T+1], of a
//!          ragged path zeros behind its last price;
//!          extra [P,T,E] baseline and width where they are given, then features; claim [P] where it is given; pnl [M,P]; costs
//!          [M,P,2] cost and turnover (units). W: each layer's weight [O,I] and bias [O] (LSTM: w_ih [4H,I], w_hh [4H,H], bias [4H]), then
//!          the head's, layouts of PyTorch.
//! Launch   `hedge_rollout` a thread per model and path, one model per workgroup, its weights in workgroup memory for the whole rollout
//!          where they fit 16 KiB (`…_cached` reads them through the cache: all threads read the same address). `hedge_rollout_reverse`
//!          the same backwards; `hedge_rollout_weights` a workgroup per 32 × 32 of a weight matrix, block of 128 paths and model. On the CPU
//!          `hedge_rollout_backward` does it in one launch, paths over lanes, layers by gemm_lanes.
//! Scratch  forward, per path of a run: 2·S + A reals, S = 1 + 2·layers·H state (MLP 1), A activations of a step. Backward (T+2)·S + B·A
//!          with B = ⌊1024/A⌋ steps, for at most Q = ⌊2²²/(M·W)⌋ in 8 … 256 blocks of 128 paths at a time, and Q·M·W partial gradients:
//!          independent of P. On the CPU per thread 64 paths · (T/32·S + 32·A) reals: states every 32 steps are kept, the rest replayed.
//! Floor    2·W multiply-adds a path-step forward, 6·W with backward; 4 bytes a path-step.
//! Numerics sums over paths in blocks of a fixed number of paths, added in order: the same bits however a batch is cut. No atomics.
//! Source   Buehler, Gonon, Teichmann, Wood 2019 (deep hedging); Imaki et al. 2021, arXiv:2103.01775 (bands); Whalley & Wilmott 1997;
//!          Hochreiter & Schmidhuber 1997.
//! Files    shaders/hedge_rollout.wgsl · cuda/hedge_rollout.cu · hedge_rollout_lanes.rs · reference: the `_cpu` functions

use crate::activation::Activation;
use crate::conformance::{Case, Outputs};
use crate::device::{Device, DeviceKind, Pass, View};
use crate::kernel::{Cost, Cpu, CpuLaunch, Kernel, layout, params_of, reads, writes};
use crate::paths::PathSource;
use crate::real::Real;
use crate::split_sum::{SplitSumParams, split_sum};
use crate::{Error, Result, map};
use rayon::prelude::*;
use std::ops::Range;

const OP: &str = "hedge_rollout";

params! {
    /// Params of the kernels.
    pub struct HedgeRolloutParams {
        /// Models of the launch.
        models: u32,
        /// Paths of the launch.
        paths: u32,
        /// Paths from one row of scratch to the next.
        stride: u32,
        /// T.
        steps: u32,
        /// First step of the launch …
        from_step: u32,
        /// … and one past its last.
        to_step: u32,
        /// States that scratch has: 2, or T + 1.
        slots: u32,
        /// Rows of scratch of a model.
        rows: u32,
        /// Row of the first activation.
        acts: u32,
        /// Activations of a step.
        step_rows: u32,
        /// Values of a state.
        state: u32,
        /// Inputs of the network.
        inputs: u32,
        /// E.
        columns: u32,
        /// 1: an LSTM.
        lstm: u32,
        /// Hidden layers.
        layers: u32,
        /// Width of the first …
        width0: u32,
        /// … second …
        width1: u32,
        /// … third …
        width2: u32,
        /// … and fourth.
        width3: u32,
        /// Activation of an MLP.
        activation: u32,
        /// W.
        weights: u32,
        /// Which head.
        head: u32,
        /// Baseline: delta of a call, of a put, given.
        baseline: u32,
        /// Claim: call, put, given.
        claim: u32,
        /// 1: the holding is sold at T.
        unwind: u32,
        /// Blocks of paths that partial gradients are kept for …
        partials: u32,
        /// … and the block of the first path.
        first_block: u32,
        /// Strike of the option.
        strike: f32,
        /// Its maturity in years.
        maturity: f32,
        /// Volatility of baseline and band a year.
        volatility: f32,
        /// Interest rate a year, continuous.
        rate: f32,
        /// Largest residual.
        range: f32,
        /// Received at the start.
        premium: f32,
        /// A weight gradient: row of its input …
        x_row: u32,
        /// … and how many,
        x_rows: u32,
        /// row of the gradient of its output …
        d_row: u32,
        /// … and how many,
        d_rows: u32,
        /// where the weight starts …
        weight_at: u32,
        /// … and the bias; none where it is W.
        bias_at: u32,
        /// Steps that gradients go back through an LSTM's state: 1 or more.
        lookback: u32,
        /// 1: paths end at their last price above 0.
        ragged: u32,
    }
}

/// Threads of a workgroup, which share one model.
const WG: u32 = 128;
/// Threads of a workgroup of weight gradients.
const WEIGHTS_WG: u32 = 64;
/// Weights that workgroup memory holds.
const SHARED: u32 = 4096;
/// Rows and columns of a tile of a weight gradient.
const TILE: u64 = 32;
/// Widest layer, and most inputs.
const WIDEST: usize = 64;
/// Paths that share a partial gradient: on a GPU …
const BLOCK: u64 = WG as u64;
/// … and on the CPU.
pub(crate) const CPU_BLOCK: usize = 64;
/// Partial gradients of the CPU.
pub(crate) const CPU_PARTIALS: usize = 64;
/// Reals of scratch at most.
const BUDGET: u64 = 1 << 26;
/// Simulated paths at a time.
const SLAB: u64 = 8192;

const RESIDUAL: u32 = 0;
const BAND: u32 = 1;
const GIVEN: u32 = 2;
/// Slope of a band's width below zero.
pub(crate) const LEAK: f64 = 0.01;

fn params(words: &[u32]) -> HedgeRolloutParams {
    params_of(words).unwrap_or(bytemuck::Zeroable::zeroed())
}

fn by_path(words: &[u32]) -> u64 {
    let p = params(words);
    u64::from(p.models) * u64::from(p.paths.div_ceil(WG))
}

fn path_steps(words: &[u32]) -> u64 {
    let p = params(words);
    u64::from(p.models) * u64::from(p.paths) * u64::from(p.to_step.saturating_sub(p.from_step))
}

fn tiles_of(p: &HedgeRolloutParams) -> u64 {
    u64::from(p.d_rows).div_ceil(TILE) * u64::from(p.x_rows + 1).div_ceil(TILE)
}

/// Rollout forward.
pub static HEDGE_ROLLOUT: Kernel = Kernel {
    name: "hedge_rollout",
    about: "neural hedging policies over price paths, weights in workgroup memory",
    args: &[reads("weights"), reads("risk"), reads("spot"), reads("extra"), reads("claim"), writes("scratch"), writes("pnl"), writes("costs")],
    params: layout::<HedgeRolloutParams>(),
    workgroup: WG,
    constants: &[("SHARED", SHARED)],
    groups: by_path,
    wgsl: wgsl!("hedge_rollout"),
    cuda: cuda!("hedge_rollout"),
    cpu: Some(Cpu { f32: crate::hedge_rollout_lanes::forward, f64: hedge_rollout_cpu::<f64> }),
    cost: Cost { unit: "path-step", units: path_steps, bytes: 4.0, flops: 4000.0 },
};

/// Rollout forward of larger networks.
pub static HEDGE_ROLLOUT_CACHED: Kernel =
    Kernel { name: "hedge_rollout_cached", about: "the same, weights read through the cache", constants: &[("SHARED", 1)], ..HEDGE_ROLLOUT };

/// Holdings of a rollout whose states were kept.
pub static HEDGE_ROLLOUT_HOLDINGS: Kernel = Kernel {
    name: "hedge_rollout_holdings",
    about: "holdings of every step out of kept states",
    args: &[reads("scratch"), writes("holdings")],
    constants: &[("SHARED", 1)],
    cpu: Some(Cpu { f32: hedge_rollout_holdings_cpu::<f32>, f64: hedge_rollout_holdings_cpu::<f64> }),
    cost: Cost { unit: "path-step", units: path_steps, bytes: 8.0, flops: 0.0 },
    ..HEDGE_ROLLOUT
};

/// Rollout backwards over kept states.
pub static HEDGE_ROLLOUT_REVERSE: Kernel = Kernel {
    name: "hedge_rollout_reverse",
    about: "gradients of a rollout's activations, backwards in time",
    args: &[reads("weights"), reads("risk"), reads("spot"), reads("extra"), reads("grad_pnl"), writes("scratch"), reads("grad_costs")],
    cpu: None,
    cost: Cost { unit: "path-step", units: path_steps, bytes: 4.0, flops: 8000.0 },
    ..HEDGE_ROLLOUT
};

/// The same of larger networks.
pub static HEDGE_ROLLOUT_REVERSE_CACHED: Kernel =
    Kernel { name: "hedge_rollout_reverse_cached", about: "the same, weights read through the cache", constants: &[("SHARED", 1)], ..HEDGE_ROLLOUT_REVERSE };

/// Gradient of one weight matrix over the steps of a launch, added to partial sums.
pub static HEDGE_ROLLOUT_WEIGHTS: Kernel = Kernel {
    name: "hedge_rollout_weights",
    about: "partial sums over paths of a weight's gradient",
    args: &[reads("kept"), writes("partials")],
    workgroup: WEIGHTS_WG,
    constants: &[("SHARED", 1)],
    groups: |words| {
        let p = params(words);
        tiles_of(&p) * u64::from(p.models) * u64::from(p.paths.div_ceil(BLOCK as u32))
    },
    cpu: None,
    cost: Cost { unit: "path-step", units: path_steps, bytes: 400.0, flops: 8000.0 },
    ..HEDGE_ROLLOUT
};

/// Rollout and its gradients in one launch, on the CPU.
pub static HEDGE_ROLLOUT_BACKWARD: Kernel = Kernel {
    name: "hedge_rollout_backward",
    about: "partial sums over paths of all weights' gradients",
    args: &[reads("weights"), reads("risk"), reads("spot"), reads("extra"), reads("grad_pnl"), reads("grad_costs"), writes("partials")],
    constants: &[],
    wgsl: None,
    cuda: None,
    cpu: Some(Cpu { f32: crate::hedge_rollout_lanes::backward, f64: hedge_rollout_backward_cpu::<f64> }),
    cost: Cost { unit: "path-step", units: path_steps, bytes: 4.0, flops: 12000.0 },
    ..HEDGE_ROLLOUT
};

// ---- rows of a step ---------------------------------------------------------------------------------------------------------

/// A dense product of the network: rows of its input and of its output's gradient among the activations of a step, and where its
/// weight and bias start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Product {
    pub(crate) x: usize,
    pub(crate) x_rows: usize,
    pub(crate) d: usize,
    pub(crate) d_rows: usize,
    pub(crate) weight: usize,
    pub(crate) bias: Option<usize>,
}

impl HedgeRolloutParams {
    pub(crate) fn widths(&self) -> [usize; 4] {
        [self.width0, self.width1, self.width2, self.width3].map(|w| w as usize)
    }

    /// Outputs of the head.
    pub(crate) fn outputs(&self) -> usize {
        if self.head == RESIDUAL { 1 } else { 2 }
    }

    /// Row of c of an LSTM's layer in a state; h is `width0` above it.
    pub(crate) fn cell(&self, layer: usize) -> usize {
        1 + (2 * layer + 1) * self.width0 as usize
    }

    /// Row of an MLP's activations of a layer.
    pub(crate) fn activations(&self, layer: usize) -> usize {
        self.inputs as usize + self.widths()[..layer].iter().sum::<usize>()
    }

    /// Row of the pre-activations, later gradients, of a layer: an LSTM's gates.
    pub(crate) fn gradients(&self, layer: usize) -> usize {
        let (h, layers) = (self.width0 as usize, self.layers as usize);
        if self.lstm > 0 {
            return self.inputs as usize + 2 * layers * h + 4 * layer * h;
        }
        self.activations(layers) + self.widths()[..layer].iter().sum::<usize>()
    }

    /// Row of an LSTM layer's input, with its previous h behind; of the head's input for the layer past the last.
    pub(crate) fn layer_input(&self, layer: usize) -> usize {
        let h = self.width0 as usize;
        if layer == 0 { 0 } else { self.inputs as usize + h + 2 * (layer - 1) * h }
    }

    /// All products in the order of the weights, the head last.
    pub(crate) fn products(&self) -> Vec<Product> {
        let (mut all, mut at, layers) = (Vec::with_capacity(5), 0, self.layers as usize);
        let (mut x, mut x_rows) = (0, self.inputs as usize);
        for l in 0..layers {
            if self.lstm > 0 {
                let h = self.width0 as usize;
                let (d, d_rows, bias) = (self.gradients(l), 4 * h, Some(at + 4 * h * (x_rows + h)));
                all.push(Product { x: self.layer_input(l), x_rows, d, d_rows, weight: at, bias });
                all.push(Product { x: self.layer_input(l) + x_rows, x_rows: h, d, d_rows, weight: at + 4 * h * x_rows, bias: None });
                at += 4 * h * (x_rows + h + 1);
                (x, x_rows) = (self.layer_input(l + 1), h);
            } else {
                let width = self.widths()[l];
                all.push(Product { x, x_rows, d: self.gradients(l), d_rows: width, weight: at, bias: Some(at + width * x_rows) });
                at += width * (x_rows + 1);
                (x, x_rows) = (self.activations(l), width);
            }
        }
        let outputs = self.outputs();
        all.push(Product { x, x_rows, d: self.gradients(layers), d_rows: outputs, weight: at, bias: Some(at + outputs * x_rows) });
        all
    }

    /// Years that so many steps take.
    pub(crate) fn years(&self, steps: usize) -> f64 {
        f64::from(self.maturity) * (steps as f64 / f64::from(self.steps))
    }

    /// What one unit of cash becomes in so many steps.
    pub(crate) fn growth(&self, steps: usize) -> f64 {
        (f64::from(self.rate) * self.years(steps)).exp()
    }

    /// Steps of a path with these prices.
    pub(crate) fn length<R: Real>(&self, spot: &[R]) -> usize {
        if self.ragged == 0 { self.steps as usize } else { spot.partition_point(|&s| s > R::ZERO).saturating_sub(1).max(1) }
    }
}

// ---- reference ----------------------------------------------------------------------------------------------------------------

/// What a holding is decided from.
struct Prices<R> {
    spot: R,
    baseline: R,
    width: R,
    log_moneyness: R,
    root_left: R,
}

/// A holding and its slopes by the previous one and by the two outputs.
struct Holding<R> {
    hold: R,
    by_previous: R,
    by_output: [R; 2],
}

/// One model on one path.
struct Rollout<'a, R> {
    p: &'a HedgeRolloutParams,
    products: &'a [Product],
    weights: &'a [R],
    risk: &'a [R],
    spot: &'a [R],
    extra: &'a [R],
    /// Steps of the path.
    length: usize,
}

fn sign<R: Real>(x: R) -> R {
    if x > R::ZERO {
        R::ONE
    } else if x < R::ZERO {
        -R::ONE
    } else {
        R::ZERO
    }
}

fn sigmoid<R: Real>(x: R) -> R {
    R::ONE / (R::ONE + (-x).exp())
}

impl<R: Real> Rollout<'_, R> {
    fn prices(&self, t: usize) -> Prices<R> {
        let (p, spot) = (self.p, self.spot[t]);
        let extra = &self.extra[t * p.columns as usize..];
        let (left, volatility, rate) = (R::of(p.years(self.length - t)), R::of(p.volatility.into()), R::of(p.rate.into()));
        let (log_moneyness, root_left) = ((spot / R::of(p.strike.into())).ln(), left.sqrt());
        let spread = volatility * root_left;
        let d1 = (log_moneyness + rate * left) / spread + R::of(0.5) * spread;
        let (baseline, given) = match p.baseline {
            GIVEN => (extra[0], true),
            put => (d1.normal_cdf() - R::of(f64::from(put)), false),
        };
        let width = match p.head {
            RESIDUAL | BAND => R::ZERO,
            _ if given => extra[1],
            _ => {
                let gamma = (R::of(-0.5) * d1 * d1).exp() * R::of(0.398_942_280_401_432_7) / (spot * spread);
                let cost = self.risk[0] * spot + self.risk[1];
                let cube = R::of(1.5) * (-rate * left).exp() * cost * gamma * gamma / self.risk[3];
                if cube > R::of(1e-37) { (cube.ln() / R::of(3.0)).exp() } else { R::ZERO }
            }
        };
        Prices { spot, baseline, width, log_moneyness, root_left }
    }

    /// z (+)= W·x over rows of activations.
    fn dense(&self, product: &Product, acts: &mut [R]) {
        for j in 0..product.d_rows {
            let row = &self.weights[product.weight + j * product.x_rows..][..product.x_rows];
            let start = product.bias.map_or_else(|| acts[product.d + j], |bias| self.weights[bias + j]);
            acts[product.d + j] = row.iter().zip(&acts[product.x..]).fold(start, |sum, (&w, &x)| sum + w * x);
        }
    }

    /// Activations of a step, and the state behind it but for the holding.
    fn network(&self, t: usize, prices: &Prices<R>, before: &[R], after: &mut [R], acts: &mut [R]) {
        let (p, inputs) = (self.p, self.p.inputs as usize);
        acts[..4].copy_from_slice(&[prices.log_moneyness, prices.root_left, prices.baseline, before[0]]);
        let columns = p.columns as usize;
        acts[4..inputs].copy_from_slice(&self.extra[(t + 1) * columns + 4 - inputs..(t + 1) * columns]);
        let (layers, h, activation) = (p.layers as usize, p.width0 as usize, Activation::of_word(p.activation));
        for l in 0..layers {
            if p.lstm == 0 {
                self.dense(&self.products[l], acts);
                for j in 0..p.widths()[l] {
                    acts[p.activations(l) + j] = activation.apply(acts[p.gradients(l) + j]);
                }
                continue;
            }
            let (into, cell, gates) = (&self.products[2 * l..2 * l + 2], p.cell(l), p.gradients(l));
            acts[into[1].x..into[1].x + h].copy_from_slice(&before[cell - h..cell]);
            self.dense(&into[0], acts);
            self.dense(&into[1], acts);
            for j in 0..h {
                for gate in 0..4 {
                    let z = &mut acts[gates + gate * h + j];
                    *z = if gate == 2 { z.tanh() } else { sigmoid(*z) };
                }
                let gate = |k: usize| acts[gates + k * h + j];
                after[cell + j] = gate(1) * before[cell + j] + gate(0) * gate(2);
                let y = gate(3) * after[cell + j].tanh();
                after[cell - h + j] = y;
                acts[p.layer_input(l + 1) + j] = y;
            }
        }
        if let Some(head) = self.products.last() {
            self.dense(head, acts);
        }
    }

    fn decide(&self, prices: &Prices<R>, previous: R, outputs: &[R]) -> Holding<R> {
        let (range, base) = (R::of(self.p.range.into()), prices.baseline);
        let bounded = |o: R| (range * o.tanh(), range * (R::ONE - o.tanh() * o.tanh()));
        if self.p.head == RESIDUAL {
            let (residual, slope) = bounded(outputs[0]);
            return Holding { hold: base + residual, by_previous: R::ZERO, by_output: [slope, R::ZERO] };
        }
        let width = |o: R| {
            if self.p.head == BAND {
                let slope = if o < R::ZERO { R::of(LEAK) } else { R::ONE };
                return (slope * o, slope);
            }
            let (power, slope) = bounded(o);
            (prices.width * power.exp(), prices.width * power.exp() * slope)
        };
        let ((below, by_below), (above, by_above)) = (width(outputs[0]), width(outputs[1]));
        let (low, high, half) = (base - below, base + above, R::of(0.5));
        if low > high {
            Holding { hold: half * (low + high), by_previous: R::ZERO, by_output: [-half * by_below, half * by_above] }
        } else if previous <= low {
            Holding { hold: low, by_previous: R::ZERO, by_output: [-by_below, R::ZERO] }
        } else if previous >= high {
            Holding { hold: high, by_previous: R::ZERO, by_output: [R::ZERO, by_above] }
        } else {
            Holding { hold: previous, by_previous: R::ONE, by_output: [R::ZERO; 2] }
        }
    }

    /// Cost of a unit at this price.
    fn unit_cost(&self, spot: R) -> R {
        self.risk[0] * spot + self.risk[1]
    }

    fn charge(&self, trade: R, spot: R) -> R {
        if trade == R::ZERO { R::ZERO } else { trade.abs() * self.unit_cost(spot) + self.risk[2] }
    }

    /// P&L, cost and turnover; `states` [T+1,S] are left behind.
    fn forward(&self, claim: R, states: &mut [R], acts: &mut [R]) -> [R; 3] {
        let (p, steps, state) = (self.p, self.length, self.p.state as usize);
        states[..state].fill(R::ZERO);
        let growth = |t: usize| R::of(p.growth(steps - t));
        let (mut pnl, mut cost, mut turnover) = (R::of(p.premium.into()) * growth(0), R::ZERO, R::ZERO);
        for t in 0..steps {
            let (before, after) = states[t * state..].split_at_mut(state);
            let prices = self.prices(t);
            self.network(t, &prices, before, after, acts);
            let hold = self.decide(&prices, before[0], &acts[p.gradients(p.layers as usize)..]).hold;
            let trade = hold - before[0];
            let charge = self.charge(trade, prices.spot);
            pnl += hold * (self.spot[t + 1] * growth(t + 1) - prices.spot * growth(t)) - charge * growth(t);
            cost += charge;
            turnover += trade.abs();
            after[0] = hold;
        }
        for t in steps..p.steps as usize {
            states.copy_within(t * state..(t + 1) * state, (t + 1) * state);
        }
        let (last, spot) = (states[steps * state], self.spot[steps]);
        if p.unwind > 0 {
            let charge = self.charge(-last, spot);
            (pnl, cost, turnover) = (pnl - charge, cost + charge, turnover + last.abs());
        }
        let strike = R::of(p.strike.into());
        let claim = match p.claim {
            GIVEN => claim,
            0 => (spot - strike).max(R::ZERO),
            _ => (strike - spot).max(R::ZERO),
        };
        [pnl - claim, cost, turnover]
    }

    /// Adds the gradient of the weights; `states` are those of [`Rollout::forward`].
    fn backward(&self, [grad_pnl, grad_cost, grad_turnover]: [R; 3], states: &mut [R], acts: &mut [R], adjoint: &mut [R], grad: &mut [R]) {
        let (p, steps, state) = (self.p, self.length, self.p.state as usize);
        let growth = |t: usize| R::of(p.growth(steps - t));
        // What a unit traded at step t takes from the loss.
        let per_unit = |t: usize| self.unit_cost(self.spot[t]) * (grad_pnl * growth(t) - grad_cost) - grad_turnover;
        adjoint.fill(R::ZERO);
        let mut next_trade = if p.unwind > 0 { -states[steps * state] } else { R::ZERO };
        for t in (0..steps).rev() {
            let (before, after) = states[t * state..].split_at_mut(state);
            let prices = self.prices(t);
            self.network(t, &prices, before, after, acts);
            let outputs = p.gradients(p.layers as usize);
            let decision = self.decide(&prices, before[0], &acts[outputs..]);
            let trade = after[0] - before[0];
            let earned = grad_pnl * (self.spot[t + 1] * growth(t + 1) - prices.spot * growth(t));
            let by_hold = adjoint[0] + earned - sign(trade) * per_unit(t) + sign(next_trade) * per_unit(t + 1);
            next_trade = trade;
            for (k, o) in acts[outputs..][..p.outputs()].iter_mut().enumerate() {
                *o = by_hold * decision.by_output[k];
            }
            let by_input = self.network_backward(before, after, acts, adjoint);
            adjoint[0] = by_hold * decision.by_previous + by_input;
            if t.is_multiple_of(p.lookback as usize) {
                adjoint[1..].fill(R::ZERO);
            }
            for product in self.products {
                for j in 0..product.d_rows {
                    let d = acts[product.d + j];
                    for i in 0..product.x_rows {
                        grad[product.weight + j * product.x_rows + i] += d * acts[product.x + i];
                    }
                    if let Some(bias) = product.bias {
                        grad[bias + j] += d;
                    }
                }
            }
        }
    }

    /// Gradient by column i of a product's input.
    fn pulled(&self, product: &Product, acts: &[R], i: usize) -> R {
        (0..product.d_rows).map(|j| self.weights[product.weight + j * product.x_rows + i] * acts[product.d + j]).sum()
    }

    /// Turns outputs' gradients into those of all layers; returns that of the previous holding as an input.
    fn network_backward(&self, before: &[R], after: &[R], acts: &mut [R], adjoint: &mut [R]) -> R {
        let (p, layers, h) = (self.p, self.p.layers as usize, self.p.width0 as usize);
        let (Some(head), Some(first)) = (self.products.last(), self.products.first()) else { return R::ZERO };
        let activation = Activation::of_word(p.activation);
        for l in (0..layers).rev() {
            if p.lstm == 0 {
                let above = &self.products[l + 1];
                for i in 0..p.widths()[l] {
                    let (y, z) = (acts[p.activations(l) + i], p.gradients(l) + i);
                    let slope = activation.slope(if activation.keeps_input() { acts[z] } else { y });
                    acts[z] = self.pulled(above, acts, i) * slope;
                }
                continue;
            }
            let (cell, gates) = (p.cell(l), p.gradients(l));
            let above = if l + 1 < layers { &self.products[2 * l + 2] } else { head };
            for j in 0..h {
                let grad_h = adjoint[cell - h + j] + self.pulled(above, acts, j);
                let [i, f, g, o] = [0, 1, 2, 3].map(|k| acts[gates + k * h + j]);
                let squashed = after[cell + j].tanh();
                let grad_c = adjoint[cell + j] + grad_h * o * (R::ONE - squashed * squashed);
                adjoint[cell + j] = grad_c * f;
                acts[gates + j] = grad_c * g * i * (R::ONE - i);
                acts[gates + h + j] = grad_c * before[cell + j] * f * (R::ONE - f);
                acts[gates + 2 * h + j] = grad_c * i * (R::ONE - g * g);
                acts[gates + 3 * h + j] = grad_h * squashed * o * (R::ONE - o);
            }
            for j in 0..h {
                adjoint[cell - h + j] = self.pulled(&self.products[2 * l + 1], acts, j);
            }
        }
        self.pulled(first, acts, 3)
    }
}

/// Inputs of a launch.
#[derive(Clone, Copy)]
pub(crate) struct Batch<'a, R> {
    pub(crate) p: &'a HedgeRolloutParams,
    pub(crate) weights: &'a [R],
    pub(crate) risk: &'a [R],
    pub(crate) spot: &'a [R],
    pub(crate) extra: &'a [R],
}

impl<'a, R: Real> Batch<'a, R> {
    fn rollout(&self, products: &'a [Product], m: usize, path: usize) -> Rollout<'a, R> {
        let (p, each) = (self.p, (self.p.steps * self.p.columns) as usize);
        let spot = &self.spot[path * (p.steps as usize + 1)..][..p.steps as usize + 1];
        Rollout {
            p,
            products,
            weights: &self.weights[m * p.weights as usize..][..p.weights as usize],
            risk: &self.risk[4 * m..4 * m + 4],
            spot,
            extra: &self.extra[path * each..],
            length: p.length(spot),
        }
    }

    fn memory(&self) -> (Vec<R>, Vec<R>) {
        let p = self.p;
        (vec![R::ZERO; (p.steps as usize + 1) * p.state as usize], vec![R::ZERO; p.step_rows as usize])
    }
}

fn hedge_rollout_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: HedgeRolloutParams = launch.params()?;
    let batch = Batch { p: &p, weights: launch.real()?, risk: launch.real()?, spot: launch.real()?, extra: launch.real()? };
    let (claim, scratch, pnl, costs) = (launch.real()?, launch.real_mut()?, launch.real_mut()?, launch.real_mut()?);
    let (n, products, kept) = (p.paths as usize, p.products(), p.rows > 0);
    let models = pnl.par_chunks_exact_mut(n).zip(costs.par_chunks_exact_mut(2 * n));
    let holds: Vec<Vec<Vec<R>>> = models
        .take(p.models as usize)
        .enumerate()
        .map(|(m, (pnl, costs))| {
            let paths = pnl.par_iter_mut().zip(costs.par_chunks_exact_mut(2));
            let each = paths.enumerate().map_init(
                || batch.memory(),
                |(states, acts), (path, (pnl, costs))| {
                    let claim = if p.claim == GIVEN { claim[path] } else { R::ZERO };
                    let [total, cost, turnover] = batch.rollout(&products, m, path).forward(claim, states, acts);
                    *pnl = total;
                    costs.copy_from_slice(&[cost, turnover]);
                    if kept { states.iter().step_by(p.state as usize).copied().collect() } else { Vec::new() }
                },
            );
            each.collect()
        })
        .collect();
    for (m, paths) in holds.iter().enumerate().filter(|_| kept) {
        for (path, states) in paths.iter().enumerate() {
            for (slot, &hold) in states.iter().enumerate() {
                scratch[(m * p.rows as usize + slot * p.state as usize) * p.stride as usize + path] = hold;
            }
        }
    }
    Ok(())
}

fn hedge_rollout_holdings_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: HedgeRolloutParams = launch.params()?;
    let (scratch, holdings) = (launch.real()?, launch.real_mut()?);
    let (n, t) = (p.paths as usize, p.steps as usize);
    holdings.par_chunks_exact_mut(t).enumerate().take(p.models as usize * n).for_each(|(row, holdings)| {
        for (step, hold) in holdings.iter_mut().enumerate() {
            *hold = scratch[(row / n * p.rows as usize + (step + 1) * p.state as usize) * p.stride as usize + row % n];
        }
    });
    Ok(())
}

fn hedge_rollout_backward_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: HedgeRolloutParams = launch.params()?;
    let batch = Batch { p: &p, weights: launch.real()?, risk: launch.real()?, spot: launch.real()?, extra: launch.real()? };
    let (grad_pnl, grad_costs, partials) = (launch.real()?, launch.real()?, launch.real_mut()?);
    let (n, products) = (p.paths as usize, p.products());
    partials.par_chunks_exact_mut(p.weights as usize).enumerate().take(p.models as usize * p.partials as usize).for_each(|(at, grad)| {
        let (m, slot) = (at / p.partials as usize, at % p.partials as usize);
        let ((mut states, mut acts), mut adjoint) = (batch.memory(), vec![R::ZERO; p.state as usize]);
        for path in p.blocks(slot).flat_map(|block| block * CPU_BLOCK..((block + 1) * CPU_BLOCK).min(n)) {
            let rollout = batch.rollout(&products, m, path);
            rollout.forward(R::ZERO, &mut states, &mut acts);
            let at = m * n + path;
            let grads = [grad_pnl[at], grad_costs[2 * at], grad_costs[2 * at + 1]];
            rollout.backward(grads, &mut states, &mut acts, &mut adjoint, grad);
        }
    });
    Ok(())
}

impl HedgeRolloutParams {
    /// Blocks of a CPU launch that a partial gradient has, counted from the launch's first.
    pub(crate) fn blocks(&self, slot: usize) -> impl Iterator<Item = usize> {
        let (partials, count) = (self.partials as usize, (self.paths as usize).div_ceil(CPU_BLOCK));
        let first = (slot + partials - self.first_block as usize % partials) % partials;
        (first..count).step_by(partials)
    }
}

// ---- op -----------------------------------------------------------------------------------------------------------------------

/// What a policy computes from its inputs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Network {
    /// Dense layers of these widths, 1 to 4 of them, each up to 64 wide, with one activation.
    Mlp {
        /// Widths.
        widths: Vec<usize>,
        /// Their activation.
        activation: Activation,
    },
    /// One or two LSTM layers.
    Lstm {
        /// Layers.
        layers: usize,
        /// H, up to 64.
        hidden: usize,
    },
}

/// How outputs become a holding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Head {
    /// Baseline plus a bounded residual.
    Residual,
    /// No trade inside a band around the baseline, whose widths are the outputs.
    Band,
    /// The same, widths those of Whalley and Wilmott times a bounded factor.
    WhalleyWilmott,
}

/// Where a baseline comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Baseline {
    /// Black-Scholes delta of a call.
    Call,
    /// Black-Scholes delta of a put.
    Put,
    /// The first column of `extra`; the second is then the band's width where the head is [`Head::WhalleyWilmott`].
    Given,
}

/// What is owed at maturity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Claim {
    /// max(S − K, 0).
    Call,
    /// max(K − S, 0).
    Put,
    /// A value per path.
    Given,
}

/// A rollout of M policies over P paths.
#[derive(Debug, Clone, PartialEq)]
pub struct HedgeRollout {
    /// M.
    pub models: u64,
    /// P.
    pub paths: u64,
    /// T.
    pub steps: u64,
    /// Features beside the four inputs that every policy has.
    pub features: usize,
    /// The network.
    pub network: Network,
    /// Its head.
    pub head: Head,
    /// Largest residual, or logarithm of the largest factor of a width.
    pub range: f64,
    /// The baseline.
    pub baseline: Baseline,
    /// The claim.
    pub claim: Claim,
    /// Strike K, in the unit of prices; prices enter the network as ln S/K.
    pub strike: f64,
    /// Years.
    pub maturity: f64,
    /// Volatility a year of baseline and band.
    pub volatility: f64,
    /// Interest rate a year, continuous.
    pub rate: f64,
    /// Cash received at the start.
    pub premium: f64,
    /// Whether the holding is sold, and charged, at maturity.
    pub unwind: bool,
    /// Steps that gradients go back through an LSTM's state (truncated back-propagation, windows from step 0 on); 0: all.
    pub lookback: u64,
    /// Whether paths differ in length: each ends at its last price above 0, of at least two, and its option matures there; zeros follow. For given
    /// prices alone.
    pub ragged: bool,
}

/// Prices of a rollout.
#[derive(Debug, Clone, Copy)]
pub enum Spot<'a> {
    /// As they are given [P,T+1].
    Given(&'a View),
    /// Drawn where they are needed, forward and again backward: path i of the source is path i of the rollout. The view has
    /// [`HedgeRollout::slab`] reals, however many paths there are.
    Simulated(&'a PathSource, &'a View),
}

/// What a rollout reads.
#[derive(Clone, Copy)]
pub struct HedgeRolloutArgs<'a> {
    /// [M,W].
    pub weights: &'a View,
    /// [M,4].
    pub risk: &'a View,
    /// Prices.
    pub spot: Spot<'a>,
    /// [P,T,E], where E > 0.
    pub extra: Option<&'a View>,
    /// [P], for [`Claim::Given`].
    pub claim: Option<&'a View>,
}

/// A launch: models, paths, and its scratch.
struct Part {
    models: Range<u64>,
    paths: Range<u64>,
}

fn wrong(arg: &str, expected: impl Into<String>, got: impl ToString) -> Error {
    Error::Shape { op: OP, arg: arg.into(), expected: expected.into(), got: got.to_string() }
}

impl HedgeRollout {
    /// A call of a year, struck at 1, hedged by a residual policy without costs of its own; change what differs.
    pub fn new(network: Network, models: u64, paths: u64, steps: u64) -> HedgeRollout {
        HedgeRollout {
            models,
            paths,
            steps,
            features: 0,
            network,
            head: Head::Residual,
            range: 1.0,
            baseline: Baseline::Call,
            claim: Claim::Call,
            strike: 1.0,
            maturity: 1.0,
            volatility: 0.2,
            rate: 0.0,
            premium: 0.0,
            unwind: false,
            lookback: 0,
            ragged: false,
        }
    }

    /// E.
    pub fn columns(&self) -> u64 {
        let given = if self.baseline != Baseline::Given {
            0
        } else if self.head == Head::WhalleyWilmott {
            2
        } else {
            1
        };
        (self.features + given) as u64
    }

    /// Inputs of the network.
    pub fn inputs(&self) -> usize {
        4 + self.features
    }

    /// W: weights of a model.
    pub fn weights(&self) -> u64 {
        u64::from(self.layout().weights)
    }

    /// Outputs of the head.
    pub fn outputs(&self) -> usize {
        if self.head == Head::Residual { 1 } else { 2 }
    }

    /// Inputs of the head.
    pub fn head_inputs(&self) -> usize {
        match &self.network {
            Network::Mlp { widths, .. } => widths.last().copied().unwrap_or(0),
            Network::Lstm { hidden, .. } => *hidden,
        }
    }

    /// Refuses what has no meaning.
    /// # Errors
    /// `Parameter` naming what is out of range.
    pub fn check(&self) -> Result<()> {
        let refuse = |name: &str, value: String, help: &str| Err(Error::Parameter { op: OP, name: name.into(), value, help: help.into() });
        let (widths, layers): (Vec<usize>, usize) = match &self.network {
            Network::Mlp { widths, .. } => (widths.clone(), 4),
            Network::Lstm { layers, hidden } => (vec![*hidden; *layers], 2),
        };
        if widths.is_empty() || widths.len() > layers {
            return refuse("layers", widths.len().to_string(), if layers == 4 { "give 1 to 4 layers" } else { "give 1 or 2 layers" });
        }
        if let Some(width) = widths.iter().find(|&&w| w == 0 || w > WIDEST) {
            return refuse("width", width.to_string(), "give layers of 1 to 64 units");
        }
        if self.inputs() > WIDEST {
            return refuse("features", self.features.to_string(), "give at most 60 features");
        }
        for (name, value, least) in [("strike", self.strike, 0.0), ("maturity", self.maturity, 0.0), ("volatility", self.volatility, 0.0)] {
            if !(value.is_finite() && value > least) {
                return refuse(name, value.to_string(), "give a finite value above 0");
            }
        }
        for (name, value) in [("range", self.range), ("rate", self.rate), ("premium", self.premium)] {
            if !value.is_finite() || name == "range" && value < 0.0 {
                return refuse(name, value.to_string(), "give a finite value; a range at least 0");
            }
        }
        if self.models == 0 || self.steps == 0 || self.steps > 1 << 20 || self.models > 1 << 20 {
            return refuse("models, steps", format!("{}, {}", self.models, self.steps), "give at least one of each, at most 2²⁰");
        }
        Ok(())
    }

    /// What does not depend on a launch.
    fn layout(&self) -> HedgeRolloutParams {
        let (lstm, layers, widths, activation) = match &self.network {
            Network::Mlp { widths, activation } => {
                let width = |l: usize| widths.get(l).map_or(0, |&w| w as u32);
                (0, widths.len(), [0, 1, 2, 3].map(width), *activation)
            }
            Network::Lstm { layers, hidden } => (1, *layers, [*hidden as u32, 0, 0, 0], Activation::None),
        };
        let mut p: HedgeRolloutParams = bytemuck::Zeroable::zeroed();
        p.steps = self.steps as u32;
        p.to_step = p.steps;
        p.inputs = self.inputs() as u32;
        p.columns = self.columns() as u32;
        (p.lstm, p.layers, p.activation) = (lstm, layers as u32, activation.word());
        [p.width0, p.width1, p.width2, p.width3] = widths;
        (p.head, p.baseline, p.claim, p.unwind) = (self.head as u32, self.baseline as u32, self.claim as u32, u32::from(self.unwind));
        p.state = if lstm > 0 { 1 + 2 * layers as u32 * widths[0] } else { 1 };
        p.step_rows = (p.gradients(layers) + p.outputs()) as u32;
        p.weights = p.products().last().map_or(0, |head| head.bias.unwrap_or(0) + head.d_rows) as u32;
        (p.strike, p.maturity, p.volatility, p.rate) = (self.strike as f32, self.maturity as f32, self.volatility as f32, self.rate as f32);
        (p.range, p.premium) = (self.range as f32, self.premium as f32);
        p.lookback = if self.lookback == 0 { p.steps.max(1) } else { self.lookback.min(self.steps.max(1)) as u32 };
        p.ragged = u32::from(self.ragged);
        p
    }

    /// Partial gradients of each model.
    fn partials(&self, device: &Device) -> u64 {
        match device.info().kind {
            DeviceKind::Reference | DeviceKind::Cpu => (CPU_PARTIALS as u64).min(self.paths.div_ceil(CPU_BLOCK as u64).max(1)),
            _ => ((1u64 << 22) / (self.models * self.weights()).max(1)).clamp(8, 256).min(self.paths.div_ceil(BLOCK).max(1)),
        }
    }

    /// Steps of a launch backwards.
    fn block_steps(&self) -> u64 {
        (1024 / u64::from(self.layout().step_rows)).clamp(1, self.steps)
    }

    /// Reals of scratch per path: forward, forward with all states kept, backward.
    fn per_path(&self, slots: u64, backward: bool) -> u64 {
        let p = self.layout();
        let (state, acts) = (u64::from(p.state), u64::from(p.step_rows));
        if backward { (slots + 1) * state + self.block_steps() * acts } else { slots * state + acts }
    }

    /// Reals that simulated prices take: those of a slab of paths.
    /// # Errors
    /// `TooLarge` if not even one block of paths fits.
    pub fn slab(&self, device: &Device) -> Result<u64> {
        let bars = self.steps + 1;
        let fits = device.limits().binding_bytes / (4 * BLOCK * bars);
        if fits == 0 {
            let (what, help) = (format!("{OP}: a block of simulated paths"), "use fewer steps".into());
            return Err(Error::TooLarge { what, needed: 4 * BLOCK * bars, limit: device.limits().binding_bytes, unit: "bytes", help });
        }
        // A power of two of blocks: partial gradients of the CPU go round in 64 of half their size.
        let blocks = (SLAB / BLOCK).min(1 << fits.ilog2());
        Ok((blocks * BLOCK).min(self.paths.max(1)) * bars)
    }

    /// Models and paths of a launch that has scratch of so much per path; `limit` blocks of paths at most.
    fn run(&self, device: &Device, per_path: u64, limit: u64) -> Result<(u64, u64)> {
        let rows = (device.limits().binding_bytes / 4).min(BUDGET) / BLOCK;
        let most = rows.checked_div(per_path).unwrap_or(u64::MAX);
        if most == 0 {
            let help = "use fewer steps or a narrower network".into();
            return Err(Error::TooLarge {
                what: format!("{OP}: a block of paths"),
                needed: per_path * BLOCK * 4,
                limit: rows * BLOCK * 4,
                unit: "bytes",
                help,
            });
        }
        let (blocks, most_blocks) = (self.paths.div_ceil(BLOCK).max(1), most.min(limit));
        if blocks <= most_blocks { Ok(((most / blocks).min(self.models), self.paths)) } else { Ok((1, most_blocks * BLOCK)) }
    }

    /// Blocks of paths that prices are there for at a time.
    fn priced(&self, device: &Device, spot: &Spot<'_>) -> Result<u64> {
        match spot {
            Spot::Given(_) => Ok(u64::MAX),
            Spot::Simulated(..) => Ok((self.slab(device)? / (self.steps + 1)).div_ceil(BLOCK)),
        }
    }

    /// Scratch of the forward step.
    /// # Errors
    /// `TooLarge` if not even one block of paths fits.
    pub fn scratch(&self, device: &Device) -> Result<u64> {
        self.scratch_of(device, self.forward_rows(device), u64::MAX)
    }

    /// Scratch of [`hedge_rollout_holdings`].
    /// # Errors
    /// As [`HedgeRollout::scratch`].
    pub fn scratch_holdings(&self, device: &Device) -> Result<u64> {
        self.scratch_of(device, self.per_path(self.steps + 1, false), u64::MAX)
    }

    /// Scratch of the backward step: states and activations, and partial gradients.
    /// # Errors
    /// As [`HedgeRollout::scratch`].
    pub fn scratch_backward(&self, device: &Device) -> Result<[u64; 2]> {
        let partials = self.models * self.partials(device) * self.weights();
        Ok([self.scratch_of(device, self.backward_rows(device), self.partials(device))?, partials])
    }

    fn forward_rows(&self, device: &Device) -> u64 {
        if matches!(device.info().kind, DeviceKind::Reference | DeviceKind::Cpu) { 0 } else { self.per_path(2, false) }
    }

    fn backward_rows(&self, device: &Device) -> u64 {
        if matches!(device.info().kind, DeviceKind::Reference | DeviceKind::Cpu) { 0 } else { self.per_path(self.steps + 1, true) }
    }

    fn scratch_of(&self, device: &Device, per_path: u64, limit: u64) -> Result<u64> {
        let (models, paths) = self.run(device, per_path, limit)?;
        Ok((models * per_path * paths.next_multiple_of(BLOCK)).max(1))
    }

    /// Launches over models and paths, with params of scratch.
    fn parts(&self, device: &Device, slots: u64, per_path: u64, limit: u64) -> Result<Vec<(Part, HedgeRolloutParams)>> {
        let (models, paths) = self.run(device, per_path, limit)?;
        let mut all = Vec::new();
        for n in (0..self.paths).step_by(paths.max(1) as usize) {
            for m in (0..self.models).step_by(models.max(1) as usize) {
                let part = Part { models: m..(m + models).min(self.models), paths: n..(n + paths).min(self.paths) };
                let mut p = self.layout();
                p.models = (part.models.end - part.models.start) as u32;
                p.paths = (part.paths.end - part.paths.start) as u32;
                p.stride = p.paths.next_multiple_of(WG);
                p.slots = slots as u32;
                p.rows = per_path as u32;
                p.acts = per_path as u32;
                all.push((part, p));
            }
        }
        Ok(all)
    }

    /// Rounds of one thread's loops in a step.
    fn rounds(&self) -> u64 {
        let p = self.layout();
        let blocks: u64 =
            p.products().iter().map(|q| (q.d_rows as u64).div_ceil(4) * (q.x_rows as u64 + 1) + (q.x_rows as u64).div_ceil(4) * (q.d_rows as u64 + 1)).sum();
        blocks + 8 * u64::from(p.step_rows) + 32
    }

    /// Ranges of steps, each in one launch.
    fn spans(&self, device: &Device, most: u64) -> Vec<Range<u64>> {
        // Weights are staged once, and the length of a path is searched.
        let staging = u64::from(SHARED / WG) + 33;
        let span = (device.limits().loop_rounds.saturating_sub(staging) / self.rounds()).clamp(1, most.max(1));
        (0..self.steps.div_ceil(span)).map(|i| i * span..((i + 1) * span).min(self.steps)).collect()
    }

    fn check_args(&self, args: &HedgeRolloutArgs<'_>) -> Result<()> {
        self.check()?;
        let (p, t) = (self.paths, self.steps);
        let spot = match args.spot {
            Spot::Given(spot) => (spot, p * (t + 1)),
            Spot::Simulated(..) if self.ragged => return Err(wrong("spot", "given prices: drawn ones all have T steps", "a source of prices")),
            Spot::Simulated(source, _) if source.steps() != t => return Err(wrong("spot", format!("a source of {t} steps"), source.steps())),
            Spot::Simulated(_, slab) => (slab, self.slab(slab.device())?),
        };
        let known = [("weights", Some(args.weights), self.models * self.weights()), ("risk", Some(args.risk), 4 * self.models), ("spot", Some(spot.0), spot.1)];
        let given = [("extra", args.extra, p * t * self.columns()), ("claim", args.claim, if self.claim == Claim::Given { p } else { 0 })];
        for (name, view, len) in known.into_iter().chain(given) {
            let got = view.map_or(0, View::len);
            if got != len {
                return Err(wrong(name, format!("{len} values"), got));
            }
        }
        Ok(())
    }
}

/// Views of a part: weights, risk, spot, extra.
fn inputs_of(pass: &mut Pass, op: &HedgeRollout, args: &HedgeRolloutArgs<'_>, part: &Part, none: &View) -> Result<[View; 4]> {
    let (w, t, e) = (op.weights(), op.steps, op.columns());
    let extra = match args.extra {
        Some(extra) if e > 0 => pass.input(extra, part.paths.start * t * e..part.paths.end * t * e)?,
        _ => none.clone(),
    };
    Ok([
        pass.input(args.weights, part.models.start * w..part.models.end * w)?,
        pass.input(args.risk, part.models.start * 4..part.models.end * 4)?,
        match args.spot {
            Spot::Given(spot) => pass.input(spot, part.paths.start * (t + 1)..part.paths.end * (t + 1))?,
            Spot::Simulated(_, slab) => slab.part(0..(part.paths.end - part.paths.start) * (t + 1)),
        },
        extra,
    ])
}

/// Draws the prices of a part, where they are simulated and those of its paths are not there yet; `drawn` remembers which are.
fn draw(pass: &mut Pass, args: &HedgeRolloutArgs<'_>, part: &Part, drawn: &mut Range<u64>) -> Result<()> {
    if let Spot::Simulated(source, slab) = args.spot
        && *drawn != part.paths
    {
        source.draw(pass, part.paths.clone(), &slab.part(0..(part.paths.end - part.paths.start) * (source.steps() + 1)))?;
        *drawn = part.paths.clone();
    }
    Ok(())
}

/// Values of a part within [M,P,each]: one model, or all paths.
fn within(op: &HedgeRollout, part: &Part, each: u64) -> Range<u64> {
    let first = part.models.start * op.paths + part.paths.start;
    let count = (part.models.end - part.models.start) * (part.paths.end - part.paths.start);
    first * each..(first + count) * each
}

fn shared(op: &HedgeRollout, small: &'static Kernel, cached: &'static Kernel) -> &'static Kernel {
    if op.weights() <= u64::from(SHARED) { small } else { cached }
}

fn on_cpu(pass: &Pass) -> bool {
    matches!(pass.device().info().kind, DeviceKind::Reference | DeviceKind::Cpu)
}

/// Records pnl [M,P] and costs [M,P,2] (cost in cash, turnover in units); `scratch` has [`HedgeRollout::scratch`] reals.
/// # Errors
/// `Parameter` and `Shape` for arguments out of range; `TooLarge` for a path beyond the device.
pub fn hedge_rollout(pass: &mut Pass, op: &HedgeRollout, args: &HedgeRolloutArgs<'_>, pnl: &View, costs: &View, scratch: &View) -> Result<()> {
    op.check_args(args)?;
    let (device, n) = (pass.device().clone(), op.models * op.paths);
    for (name, view, len) in [("pnl", pnl, n), ("costs", costs, 2 * n)] {
        if view.len() != len {
            return Err(wrong(name, format!("{len} values"), view.len()));
        }
    }
    let mut drawn = 0..0;
    for (part, p) in op.parts(&device, 2, op.forward_rows(&device), op.priced(&device, &args.spot)?)? {
        draw(pass, args, &part, &mut drawn)?;
        let (pnl, costs) = (pass.output(pnl, within(op, &part, 1))?, pass.output(costs, within(op, &part, 2))?);
        forward(pass, op, args, &part, p, scratch, [&pnl.view, &costs.view])?;
        pass.finish(pnl)?;
        pass.finish(costs)?;
    }
    Ok(())
}

/// One part forward, in as many launches as its steps need.
fn forward(
    pass: &mut Pass,
    op: &HedgeRollout,
    args: &HedgeRolloutArgs<'_>,
    part: &Part,
    p: HedgeRolloutParams,
    scratch: &View,
    [pnl, costs]: [&View; 2],
) -> Result<()> {
    let device = pass.device().clone();
    let none = View::from(&device.zeros("none", 1)?);
    let [weights, risk, spot, extra] = inputs_of(pass, op, args, part, &none)?;
    let claim = match args.claim {
        Some(claim) => pass.input(claim, part.paths.clone())?,
        None => none,
    };
    let scratch = scratch.part(0..(u64::from(p.models) * u64::from(p.rows) * u64::from(p.stride)).max(1));
    let spans = if on_cpu(pass) { std::iter::once(0..op.steps).collect() } else { op.spans(&device, op.steps) };
    for span in spans {
        let p = HedgeRolloutParams { from_step: span.start as u32, to_step: span.end as u32, acts: p.slots * p.state, ..p };
        let views = [weights.clone(), risk.clone(), spot.clone(), extra.clone(), claim.clone(), scratch.clone(), pnl.clone(), costs.clone()];
        pass.launch(shared(op, &HEDGE_ROLLOUT, &HEDGE_ROLLOUT_CACHED), &p, &views)?;
    }
    Ok(())
}

/// Records the holdings [M,P,T] of a rollout, h[t] held from t to t+1; `scratch` has [`HedgeRollout::scratch_holdings`] reals.
/// # Errors
/// As [`hedge_rollout`].
pub fn hedge_rollout_holdings(pass: &mut Pass, op: &HedgeRollout, args: &HedgeRolloutArgs<'_>, holdings: &View, scratch: &View) -> Result<()> {
    op.check_args(args)?;
    if holdings.len() != op.models * op.paths * op.steps {
        return Err(wrong("holdings", format!("{} values", op.models * op.paths * op.steps), holdings.len()));
    }
    let device = pass.device().clone();
    device.check_rounds(OP, op.steps, "steps")?;
    let (slots, mut drawn) = (op.steps + 1, 0..0);
    for (part, p) in op.parts(&device, slots, op.per_path(slots, false), op.priced(&device, &args.spot)?)? {
        draw(pass, args, &part, &mut drawn)?;
        let n = u64::from(p.models) * u64::from(p.paths);
        let (pnl, costs) = (View::from(&device.zeros("pnl", n)?), View::from(&device.zeros("costs", 2 * n)?));
        forward(pass, op, args, &part, p, scratch, [&pnl, &costs])?;
        let kept = scratch.part(0..u64::from(p.models) * u64::from(p.rows) * u64::from(p.stride));
        let out = pass.output(holdings, within(op, &part, op.steps))?;
        pass.launch(&HEDGE_ROLLOUT_HOLDINGS, &p, &[kept, out.view.clone()])?;
        pass.finish(out)?;
    }
    Ok(())
}

/// Records grad_weights [M,W] from grad_pnl [M,P] and grad_costs [M,P,2]; `scratch` has [`HedgeRollout::scratch_backward`] reals.
/// # Errors
/// As [`hedge_rollout`].
pub fn hedge_rollout_backward(
    pass: &mut Pass,
    op: &HedgeRollout,
    args: &HedgeRolloutArgs<'_>,
    [grad_pnl, grad_costs]: [&View; 2],
    grad_weights: &View,
    [scratch, partials]: [&View; 2],
) -> Result<()> {
    op.check_args(args)?;
    let (device, n) = (pass.device().clone(), op.models * op.paths);
    for (name, view, len) in [("grad_pnl", grad_pnl, n), ("grad_costs", grad_costs, 2 * n), ("grad_weights", grad_weights, op.models * op.weights())] {
        if view.len() != len {
            return Err(wrong(name, format!("{len} values"), view.len()));
        }
    }
    let (slots, weights) = (op.partials(&device), op.weights());
    let partials = partials.part(0..op.models * slots * weights);
    map::fill(pass, 0.0, &partials)?;
    let mut drawn = 0..0;
    let most = if on_cpu(pass) { u64::MAX } else { slots };
    for (part, p) in op.parts(&device, op.steps + 1, op.backward_rows(&device), most.min(op.priced(&device, &args.spot)?))? {
        draw(pass, args, &part, &mut drawn)?;
        let block = if on_cpu(pass) { CPU_BLOCK as u64 } else { BLOCK };
        let p = HedgeRolloutParams { partials: slots as u32, first_block: (part.paths.start / block % slots) as u32, ..p };
        let none = View::from(&device.zeros("none", 1)?);
        let inputs = inputs_of(pass, op, args, &part, &none)?;
        let grads = [pass.input(grad_pnl, within(op, &part, 1))?, pass.input(grad_costs, within(op, &part, 2))?];
        let sums = pass.update(&partials, part.models.start * slots * weights..part.models.end * slots * weights)?;
        if on_cpu(pass) {
            let views: Vec<View> = inputs.into_iter().chain(grads).chain([sums.view.clone()]).collect();
            pass.launch(&HEDGE_ROLLOUT_BACKWARD, &p, &views)?;
        } else {
            let kept = scratch.part(0..u64::from(p.models) * u64::from(p.rows) * u64::from(p.stride));
            backward(pass, op, args, &part, p, (&inputs, &grads), [&kept, &sums.view])?;
        }
        pass.finish(sums)?;
    }
    let sum = SplitSumParams { models: op.models as u32, splits: slots as u32, width: weights as u32, first: 0, count: weights as u32 };
    split_sum(pass, OP, sum, &partials, grad_weights)
}

/// One part on a GPU: forward with every state kept, then backwards some steps at a time, each with the weights' partial sums.
fn backward(
    pass: &mut Pass,
    op: &HedgeRollout,
    args: &HedgeRolloutArgs<'_>,
    part: &Part,
    p: HedgeRolloutParams,
    (inputs, grads): (&[View; 4], &[View; 2]),
    [scratch, partials]: [&View; 2],
) -> Result<()> {
    let device = pass.device().clone();
    let n = u64::from(p.models) * u64::from(p.paths);
    let (pnl, costs) = (View::from(&device.zeros("pnl", n)?), View::from(&device.zeros("costs", 2 * n)?));
    forward(pass, op, &HedgeRolloutArgs { claim: None, ..*args }, part, HedgeRolloutParams { claim: 0, ..p }, scratch, [&pnl, &costs])?;
    for span in op.spans(&device, op.block_steps()).into_iter().rev() {
        let p = HedgeRolloutParams { from_step: span.start as u32, to_step: span.end as u32, acts: (p.slots + 1) * p.state, ..p };
        let mut views: Vec<View> = inputs.iter().chain(grads).cloned().collect();
        views.insert(5, scratch.clone());
        pass.launch(shared(op, &HEDGE_ROLLOUT_REVERSE, &HEDGE_ROLLOUT_REVERSE_CACHED), &p, &views)?;
        for product in p.products() {
            let p = HedgeRolloutParams {
                x_row: product.x as u32,
                x_rows: product.x_rows as u32,
                d_row: product.d as u32,
                d_rows: product.d_rows as u32,
                weight_at: product.weight as u32,
                bias_at: product.bias.map_or(p.weights, |bias| bias as u32),
                ..p
            };
            pass.launch(&HEDGE_ROLLOUT_WEIGHTS, &p, &[scratch.clone(), partials.clone()])?;
        }
    }
    Ok(())
}

/// Binding for files: spot [P,T+1], weights [M,W], risk [M,4]; an MLP of `widths`, tanh; the option in params.
pub(crate) fn verify(device: &Device, case: &Case) -> Result<Outputs> {
    let (&[paths, prices], &[models, _]) = (case.shape("spot")?, case.shape("weights")?) else {
        return Err(wrong("spot, weights", "[P,T+1], [M,W]", "other shapes"));
    };
    let number = |name: &str, usual: f64| case.number(name).unwrap_or(usual);
    let network = match case.text("network")? {
        "lstm" => Network::Lstm { layers: number("layers", 1.0) as usize, hidden: number("hidden", 32.0) as usize },
        _ => Network::Mlp { widths: vec![number("hidden", 32.0) as usize; number("layers", 2.0) as usize], activation: Activation::Tanh },
    };
    let usual = HedgeRollout::new(network, models as u64, paths as u64, (prices as u64).saturating_sub(1));
    let op = HedgeRollout {
        strike: number("strike", 1.0),
        maturity: number("maturity", 1.0),
        volatility: number("volatility", 0.2),
        rate: number("rate", 0.0),
        premium: number("premium", 0.0),
        range: number("range", 1.0),
        ..usual
    };
    let upload = |name: &str| Ok::<View, Error>(View::from(&device.upload(name, case.f32(name)?)?));
    let (weights, risk, spot) = (upload("weights")?, upload("risk")?, upload("spot")?);
    let zeros = |name: &str, len: u64| Ok::<View, Error>(View::from(&device.zeros(name, len)?));
    let (pnl, costs, scratch) = (zeros("pnl", op.models * op.paths)?, zeros("costs", 2 * op.models * op.paths)?, zeros("scratch", op.scratch(device)?)?);
    let mut pass = device.pass(OP);
    let args = HedgeRolloutArgs { weights: &weights, risk: &risk, spot: Spot::Given(&spot), extra: None, claim: None };
    hedge_rollout(&mut pass, &op, &args, &pnl, &costs, &scratch)?;
    let (pnl, costs) = (pass.read(&pnl)?, pass.read(&costs)?);
    let mut outputs = Outputs::launched(pass.launches());
    let mut done = pass.submit()?;
    outputs.reals("pnl", done.f64(pnl)?);
    outputs.reals("costs", done.f64(costs)?);
    Ok(outputs)
}
