//! Hedgers: analytic baselines with neural residuals that start at zero, so that an untrained hedger is already sane.
//!
//! Positions q [.,B,n] in assets are hedged by h [.,B,n] signed units of the hedge instrument; what is earned is q·dS + h·dF − cost, and a perfect
//! hedge of a long position is negative. A leading axis is 1 (shared) or M. Probabilities must be filtered or predicted ones: what is known when h is
//! decided. [`HedgePolicy`] is the same idea as a policy that `Tape::hedge_rollout` rolls out over whole paths, previous holding as an input.
//!
//! Sources  Buehler et al. 2019 (deep hedging); Imaki et al. 2021 (no-transaction bands); Whalley & Wilmott 1997; Alizadeh & Nomikos 2004 (hedge
//!          ratios by regime).

use super::{Declared, Init, Module, Parameters, under};
use crate::kernels::activation::Activation;
use crate::kernels::hedge_rollout::{Head, HedgeRollout, Network};
use crate::kernels::map::{BinaryFunction, Unary};
use crate::kernels::objective::Goal;
use crate::kernels::real::Real;
use crate::ops::{HedgeRisk, ObjectiveOptions};
use crate::tape::{Tape, Var};
use crate::{Error, Result};

/// Black-Scholes delta of a call or a put, years `left` to maturity; at maturity or without volatility 0, 1, or ½ at the strike (a put's less 1).
pub fn black_scholes_delta(spot: f64, strike: f64, left: f64, volatility: f64, call: bool) -> f64 {
    let spread = volatility * left.max(0.0).sqrt();
    let call_delta = if spread > 0.0 {
        ((spot / strike).ln() / spread + 0.5 * spread).normal_cdf()
    } else if spot == strike {
        0.5
    } else {
        f64::from(u8::from(spot > strike))
    };
    if call { call_delta } else { call_delta - 1.0 }
}

/// Deltas of each regime's volatility: [B,K] for B spots.
pub fn regime_deltas(spot: &[f64], strike: f64, left: f64, volatilities: &[f64], call: bool) -> Vec<f32> {
    spot.iter().flat_map(|&s| volatilities.iter().map(move |&v| black_scholes_delta(s, strike, left, v, call) as f32)).collect()
}

/// A dense layer of tanh and a head of zeros.
fn declare_residual(to: &mut Declared, prefix: &str, inputs: usize, hidden: usize, outputs: usize) {
    to.add(under(prefix, "hidden.weight"), &[hidden, inputs], Init::fan_in(inputs));
    to.add(under(prefix, "hidden.bias"), &[hidden], Init::fan_in(inputs));
    to.add(under(prefix, "head.weight"), &[outputs, hidden], Init::Constant(0.0));
    to.add(under(prefix, "head.bias"), &[outputs], Init::Constant(0.0));
}

/// range·tanh(head(tanh(hidden(x)))) of the concatenated parts [.,B,…].
fn residual(tape: &mut Tape, parameters: &Parameters, prefix: &str, parts: &[Var], range: f64) -> Result<Var> {
    let x = if let [x] = parts { *x } else { tape.concat(parts, 2)? };
    let on = |tape: &mut Tape, name: &str| parameters.on(tape, &under(prefix, name));
    let (weight, bias) = (on(tape, "hidden.weight")?, on(tape, "hidden.bias")?);
    let x = tape.linear(x, weight, Some(bias), Activation::Tanh)?;
    let (weight, bias) = (on(tape, "head.weight")?, on(tape, "head.bias")?);
    let x = tape.linear(x, weight, Some(bias), Activation::Tanh)?;
    tape.affine(x, range as f32, 0.0)
}

fn axes<const N: usize>(tape: &Tape, op: &'static str, arg: &str, x: Var, names: &str) -> Result<[usize; N]> {
    let shape = tape.shape(x);
    shape.try_into().map_err(|_| Error::Shape { op, arg: arg.into(), expected: names.into(), got: format!("{shape:?}") })
}

fn expect(tape: &Tape, op: &'static str, arg: &str, x: Var, behind: &[usize]) -> Result<()> {
    match tape.shape(x).split_first() {
        Some((_, rest)) if rest == behind => Ok(()),
        _ => Err(Error::Shape { op, arg: arg.into(), expected: format!("[1 or M] with {behind:?}"), got: format!("{:?}", tape.shape(x)) }),
    }
}

/// Σ_k p_k·x_k: probs [.,B,K], x [.,B,n,K] to [.,B,n].
fn mixture(tape: &mut Tape, op: &'static str, probs: Var, x: Var) -> Result<Var> {
    let [l, b, k] = axes(tape, op, "probs", probs, "[1 or M,B,K]")?;
    let [_, _, n, _] = axes(tape, op, "hedges", x, "[1 or M,B,n,K]")?;
    expect(tape, op, "hedges", x, &[b, n, k])?;
    let probs = tape.reshape(probs, &[l, b, 1, k])?;
    let products = tape.mul(probs, x)?;
    tape.sum(products, &[3])
}

fn negative(tape: &mut Tape, x: Var) -> Result<Var> {
    tape.affine(x, -1.0, 0.0)
}

// ---- one step at a time -----------------------------------------------------------------------------------------------------

/// Hedge by the delta, or the hedge ratio, of a mixture of regimes: delta = Σ_k p_k·delta_k + range·tanh(net[p, q, features]), h = −delta·s·q.
#[derive(Debug, Clone)]
pub struct RegimeDeltaHedger {
    /// Prefix of its tensors.
    pub prefix: String,
    /// K.
    pub regimes: usize,
    /// n.
    pub assets: usize,
    /// Width of the net.
    pub hidden: usize,
    /// Market features.
    pub features: usize,
    /// Largest residual.
    pub range: f64,
    /// Scale hedges by s = sigmoid(net[p]); 1 otherwise.
    pub gate: bool,
}

impl RegimeDeltaHedger {
    /// 64 units, no features, residuals up to 1.
    pub fn new(prefix: &str, regimes: usize, assets: usize) -> RegimeDeltaHedger {
        RegimeDeltaHedger { prefix: prefix.into(), regimes, assets, hidden: 64, features: 0, range: 1.0, gate: false }
    }

    /// h and delta [M,B,n] from probs [.,B,K], each regime's delta `hedges` [.,B,n,K], positions [.,B,n] and features [.,B,F]. Gradients flow to
    /// parameters and probabilities, and to the others where they are variables.
    /// # Errors
    /// `Shape` naming the argument.
    pub fn hedge(&self, tape: &mut Tape, parameters: &Parameters, probs: Var, hedges: Var, positions: Var, features: Option<Var>) -> Result<[Var; 2]> {
        const OP: &str = "regime_delta_hedger";
        let base = mixture(tape, OP, probs, hedges)?;
        let b = tape.shape(base)[1];
        expect(tape, OP, "probs", probs, &[b, self.regimes])?;
        expect(tape, OP, "positions", positions, &[b, self.assets])?;
        let mut parts = vec![probs, positions];
        parts.extend(features);
        let residual = residual(tape, parameters, &under(&self.prefix, "delta"), &parts, self.range)?;
        let delta = tape.add(residual, base)?;
        let mut h = tape.mul(delta, positions)?;
        if self.gate {
            let scale = self::residual(tape, parameters, &under(&self.prefix, "gate"), &[probs], 4.0)?;
            let scale = tape.unary(Unary::Sigmoid, scale)?;
            h = tape.mul(h, scale)?;
        }
        Ok([negative(tape, h)?, delta])
    }
}

impl Module for RegimeDeltaHedger {
    fn declare(&self, to: &mut Declared) {
        declare_residual(to, &under(&self.prefix, "delta"), self.regimes + self.assets + self.features, self.hidden, self.assets);
        if self.gate {
            declare_residual(to, &under(&self.prefix, "gate"), self.regimes, self.hidden, 1);
        }
    }
}

/// Delta and gamma of a position.
#[derive(Debug, Clone, Copy)]
pub struct PositionGreeks {
    /// [.,B,n].
    pub delta: Var,
    /// [.,B,n].
    pub gamma: Option<Var>,
}

/// Delta and gamma hedge with the underlying and one option per asset:
/// n_opt = −G_p·G_o / (G_o² + ridge), n_spot = −(D_p + n_opt·D_o), each with a residual.
#[derive(Debug, Clone)]
pub struct DynamicDeltaHedger {
    /// Prefix of its tensors.
    pub prefix: String,
    /// K.
    pub regimes: usize,
    /// n.
    pub assets: usize,
    /// Width of the net.
    pub hidden: usize,
    /// Hedge gamma with an option; otherwise delta alone, n_opt = 0.
    pub use_gamma: bool,
    /// Keeps n_opt finite, and 0 where the option has no gamma.
    pub ridge: f64,
    /// Largest residual.
    pub range: f64,
}

impl DynamicDeltaHedger {
    /// 64 units, with gamma.
    pub fn new(prefix: &str, regimes: usize, assets: usize) -> DynamicDeltaHedger {
        DynamicDeltaHedger { prefix: prefix.into(), regimes, assets, hidden: 64, use_gamma: true, ridge: 1e-12, range: 1.0 }
    }

    /// n_spot and n_opt [M,B,n]: units of the underlying and of the option.
    /// # Errors
    /// `Shape` naming the argument; `Parameter` where gamma is to be hedged and one of the gammas is missing.
    pub fn hedge(&self, tape: &mut Tape, parameters: &Parameters, probs: Var, position: PositionGreeks, option: PositionGreeks) -> Result<[Var; 2]> {
        const OP: &str = "dynamic_delta_hedger";
        let [_, b, _] = axes(tape, OP, "probs", probs, "[1 or M,B,K]")?;
        expect(tape, OP, "probs", probs, &[b, self.regimes])?;
        for (name, x) in [("delta", Some(position.delta)), ("gamma", position.gamma), ("option delta", Some(option.delta)), ("option gamma", option.gamma)] {
            x.map_or(Ok(()), |x| expect(tape, OP, name, x, &[b, self.assets]))?;
        }
        let spot_residual = |tape: &mut Tape, parts: &[Var]| residual(tape, parameters, &under(&self.prefix, "spot"), parts, self.range);
        if !self.use_gamma {
            let residual = spot_residual(tape, &[probs, position.delta])?;
            let n_spot = tape.sub(residual, position.delta)?;
            let n_opt = tape.affine(n_spot, 0.0, 0.0)?;
            return Ok([n_spot, n_opt]);
        }
        let (Some(gamma), Some(option_gamma)) = (position.gamma, option.gamma) else {
            let help = "give the gammas of position and option, or turn use_gamma off".into();
            return Err(Error::Parameter { op: OP, name: "gamma".into(), value: "none".into(), help });
        };
        let parts = [probs, position.delta, gamma, option.delta, option_gamma];
        let product = tape.mul(gamma, option_gamma)?;
        let square = tape.unary(Unary::Square, option_gamma)?;
        let square = tape.affine(square, 1.0, self.ridge as f32)?;
        let ratio = tape.div(product, square)?;
        let residual = residual(tape, parameters, &under(&self.prefix, "option"), &parts, self.range)?;
        let n_opt = tape.sub(residual, ratio)?;
        let residual = spot_residual(tape, &parts)?;
        let option_delta = tape.mul(n_opt, option.delta)?;
        let net = tape.add(option_delta, position.delta)?;
        Ok([tape.sub(residual, net)?, n_opt])
    }
}

impl Module for DynamicDeltaHedger {
    fn declare(&self, to: &mut Declared) {
        let inputs = self.regimes + if self.use_gamma { 4 } else { 1 } * self.assets;
        declare_residual(to, &under(&self.prefix, "spot"), inputs, self.hidden, self.assets);
        if self.use_gamma {
            declare_residual(to, &under(&self.prefix, "option"), inputs, self.hidden, self.assets);
        }
    }
}

/// Trades to the nearer edge of a band around a target, and not inside it: half-width (1.5·c·(Γ²+ε)·S / risk_aversion)^⅓·exp(range·tanh(net[p])).
///
/// Where each trade has a fixed cost k, outside the band it trades to the target, and the half-width is (12·k·(Γ²+ε) / risk_aversion)^¼ times that
/// factor: k divided by the mean time σ²S²Γ² takes to a width w, and half the risk aversion times the mean square w²/6 of what is off, balance there
/// (Whalley & Wilmott 1999). Whether it trades has no gradient then; what it trades to has.
#[derive(Debug, Clone)]
pub struct TransactionCostAwareHedger {
    /// Prefix of its tensors.
    pub prefix: String,
    /// K.
    pub regimes: usize,
    /// n.
    pub assets: usize,
    /// Width of the net.
    pub hidden: usize,
    /// c, one way, of traded value.
    pub tx_cost: f64,
    /// a, per unit of currency.
    pub risk_aversion: f64,
    /// k: what a trade costs whatever its size; 0 unless given.
    pub fixed_cost: f64,
    /// Largest logarithm of the net's factor.
    pub range: f64,
}

/// Keeps the slope of the band's width finite where gamma vanishes: 1e-12.
const GAMMA_FLOOR: f32 = 1e-12;

impl TransactionCostAwareHedger {
    /// 64 units, 10 basis points, risk aversion 1.
    /// # Errors
    /// `Parameter` for a negative cost or a risk aversion that is not above 0.
    pub fn new(prefix: &str, regimes: usize, assets: usize, tx_cost: f64, risk_aversion: f64) -> Result<TransactionCostAwareHedger> {
        for (name, value, good) in [("tx_cost", tx_cost, tx_cost >= 0.0), ("risk_aversion", risk_aversion, risk_aversion > 0.0)] {
            if !(value.is_finite() && good) {
                let help = "give a cost of at least 0 and a risk aversion above 0".into();
                return Err(Error::Parameter { op: "transaction_cost_aware_hedger", name: name.into(), value: value.to_string(), help });
            }
        }
        Ok(TransactionCostAwareHedger { prefix: prefix.into(), regimes, assets, hidden: 64, tx_cost, risk_aversion, fixed_cost: 0.0, range: 2.0 })
    }

    /// Half-width of the band [M,B,n] from probs [.,B,K], spot and gamma [.,B,n].
    /// # Errors
    /// `Shape` naming the argument; `Parameter` for a fixed cost below 0.
    pub fn width(&self, tape: &mut Tape, parameters: &Parameters, probs: Var, spot: Var, gamma: Var) -> Result<Var> {
        const OP: &str = "transaction_cost_aware_hedger";
        let [_, b, _] = axes(tape, OP, "probs", probs, "[1 or M,B,K]")?;
        expect(tape, OP, "spot", spot, &[b, self.assets])?;
        expect(tape, OP, "gamma", gamma, &[b, self.assets])?;
        if !(self.fixed_cost.is_finite() && self.fixed_cost >= 0.0) {
            let help = "give a finite cost of at least 0".into();
            return Err(Error::Parameter { op: OP, name: "fixed_cost".into(), value: self.fixed_cost.to_string(), help });
        }
        let factor = residual(tape, parameters, &under(&self.prefix, "width"), &[probs], self.range)?;
        let factor = tape.unary(Unary::Exp, factor)?;
        let square = tape.unary(Unary::Square, gamma)?;
        let square = tape.affine(square, 1.0, GAMMA_FLOOR)?;
        let (power, scale, root) = if self.fixed_cost > 0.0 {
            (square, (12.0 * self.fixed_cost / self.risk_aversion).sqrt().sqrt(), 0.25)
        } else {
            (tape.mul(square, spot)?, (1.5 * self.tx_cost / self.risk_aversion).cbrt(), 1.0 / 3.0)
        };
        let root = tape.unary(Unary::Power { p: root }, power)?;
        let width = tape.mul(factor, root)?;
        tape.affine(width, scale as f32, 0.0)
    }

    /// h [M,B,n] and its cost [M,B] from the holding before and the target [.,B,n].
    /// # Errors
    /// As [`TransactionCostAwareHedger::width`].
    pub fn hedge(&self, tape: &mut Tape, parameters: &Parameters, probs: Var, [previous, target, spot, gamma]: [Var; 4]) -> Result<[Var; 2]> {
        let width = self.width(tape, parameters, probs, spot, gamma)?;
        let (h, trade, jumps) = if self.fixed_cost > 0.0 {
            let off = tape.sub(target, previous)?;
            let size = tape.unary(Unary::Abs, off)?;
            let beyond = tape.sub(size, width)?;
            // 1 outside the band, without a gradient.
            let outside = tape.unary(Unary::Step, beyond)?;
            let trade = tape.mul(outside, off)?;
            (tape.add(previous, trade)?, trade, Some(outside))
        } else {
            let high = tape.add(width, target)?;
            let low = negative(tape, width)?;
            let low = tape.add(low, target)?;
            let h = tape.binary(BinaryFunction::Max, low, previous)?;
            let h = tape.binary(BinaryFunction::Min, h, high)?;
            (h, tape.sub(h, previous)?, None)
        };
        let traded = tape.unary(Unary::Abs, trade)?;
        let value = tape.mul(traded, spot)?;
        let value = tape.sum(value, &[2])?;
        let mut cost = tape.affine(value, self.tx_cost as f32, 0.0)?;
        if let Some(jumps) = jumps {
            let count = tape.sum(jumps, &[2])?;
            let fixed = tape.affine(count, self.fixed_cost as f32, 0.0)?;
            cost = tape.add(fixed, cost)?;
        }
        Ok([h, cost])
    }
}

impl Module for TransactionCostAwareHedger {
    fn declare(&self, to: &mut Declared) {
        declare_residual(to, &under(&self.prefix, "width"), self.regimes, self.hidden, self.assets);
    }
}

/// Hedges for the regimes expected over the holding interval: h = (1/(L+1))·Σ_s Σ_k π_s(k)·h_k, π_0 = p, π_{s+1} = π_s·A, plus a residual of
/// net[π_0 … π_L, features].
#[derive(Debug, Clone)]
pub struct TransitionAwareHedger {
    /// Prefix of its tensors.
    pub prefix: String,
    /// K.
    pub regimes: usize,
    /// n.
    pub assets: usize,
    /// Width of the net.
    pub hidden: usize,
    /// L.
    pub lookahead: usize,
    /// Market features.
    pub features: usize,
    /// Largest residual.
    pub range: f64,
}

impl TransitionAwareHedger {
    /// 64 units, five steps ahead.
    pub fn new(prefix: &str, regimes: usize, assets: usize) -> TransitionAwareHedger {
        TransitionAwareHedger { prefix: prefix.into(), regimes, assets, hidden: 64, lookahead: 5, features: 0, range: 1.0 }
    }

    /// π_0 … π_L, each [.,B,K]; `transition` [.,B or 1,K,K], or [.,B or 1,L,K,K] where steps differ, row i the probabilities from regime i.
    /// # Errors
    /// `Shape` naming the argument.
    pub fn forecasts(&self, tape: &mut Tape, probs: Var, transition: Var) -> Result<Vec<Var>> {
        const OP: &str = "transition_aware_hedger";
        let [l, b, k] = axes(tape, OP, "probs", probs, "[1 or M,B,K]")?;
        let shape = tape.shape(transition).to_vec();
        let steps = match shape[..] {
            [_, rows, i, j] if (rows == b || rows == 1) && i == k && j == k => None,
            [_, rows, steps, i, j] if (rows == b || rows == 1) && i == k && j == k && steps == self.lookahead => Some(rows),
            _ => {
                let expected = format!("[1 or M,B or 1,{k},{k}], or [1 or M,B or 1,{},{k},{k}]", self.lookahead);
                return Err(Error::Shape { op: OP, arg: "transition".into(), expected, got: format!("{shape:?}") });
            }
        };
        let mut all = vec![probs];
        let mut now = probs;
        for s in 0..self.lookahead {
            let matrix = match steps {
                None => transition,
                Some(rows) => {
                    let one = tape.slice(transition, 2, s..s + 1)?;
                    tape.reshape(one, &[shape[0], rows, k, k])?
                }
            };
            let models = tape.shape(now)[0].max(l);
            let column = tape.reshape(now, &[models, b, k, 1])?;
            let product = tape.mul(matrix, column)?;
            now = tape.sum(product, &[2])?;
            all.push(now);
        }
        Ok(all)
    }

    /// h [M,B,n]; `hedges` [.,B,n,K] is each regime's hedge, with its sign.
    /// # Errors
    /// `Shape` naming the argument.
    pub fn hedge(&self, tape: &mut Tape, parameters: &Parameters, probs: Var, transition: Var, hedges: Var, features: Option<Var>) -> Result<Var> {
        let mut parts = self.forecasts(tape, probs, transition)?;
        let mut total = parts[0];
        for &next in &parts[1..] {
            total = tape.add(total, next)?;
        }
        let average = tape.affine(total, 1.0 / (self.lookahead as f32 + 1.0), 0.0)?;
        let base = mixture(tape, "transition_aware_hedger", average, hedges)?;
        parts.extend(features);
        let residual = residual(tape, parameters, &under(&self.prefix, "hedge"), &parts, self.range)?;
        tape.add(residual, base)
    }
}

impl Module for TransitionAwareHedger {
    fn declare(&self, to: &mut Declared) {
        let inputs = self.regimes * (self.lookahead + 1) + self.features;
        declare_residual(to, &under(&self.prefix, "hedge"), inputs, self.hidden, self.assets);
    }
}

// ---- loss of hedges ---------------------------------------------------------------------------------------------------------

/// How [`delta_hedge_loss`] counts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HedgeLoss {
    /// Risk of what a sequence earns from step to step: the variance, divisor T − 1, unless given.
    pub risk: HedgeRisk,
    /// Sum of the assets' own risks, instead of the risk of their sum.
    pub by_asset: bool,
    /// One-way cost of traded value.
    pub cost: f64,
    /// Weight of the mean cost: 0.1 unless given.
    pub cost_weight: f64,
    /// Weight of the mean P&L of a step, which is taken away; 0 unless given.
    pub mean_weight: f64,
    /// Whether the first trade, from nothing, costs.
    pub entry: bool,
    /// Whether the last holding is sold, which costs.
    pub exit: bool,
    /// Steps of each sequence, words [1,B], at least 2. What lies past them has to be finite and counts for nothing.
    pub lengths: Option<Var>,
}

impl Default for HedgeLoss {
    fn default() -> HedgeLoss {
        let risk = HedgeRisk::Variance;
        HedgeLoss { risk, by_asset: false, cost: 0.0, cost_weight: 0.1, mean_weight: 0.0, entry: true, exit: false, lengths: None }
    }
}

/// mean over b of the risk over t of Σ_n spot_pnl + h·dF, + λ·mean cost − μ·mean P&L, to [M]. h [M,B,T,n] is decided at t and earns `futures` dF[t], the
/// change from t to t+1; spot_pnl [.,B,T,n] is q·dS of the same step; prices [.,B,T,n] are F[t]. The cost of a sequence is c·Σ_t |h[t] − h[t−1]|·F[t], and
/// c·|h|·F one step on where the last holding is sold; it is differentiable.
/// # Errors
/// `Shape` naming the argument, also for fewer than two steps; `Parameter` for a cost, weight or risk outside its range, and for the quadratic CVaR of sequences that
/// differ in length.
pub fn delta_hedge_loss(tape: &mut Tape, h: Var, [spot_pnl, futures, prices]: [Var; 3], options: HedgeLoss) -> Result<Var> {
    const OP: &str = "delta_hedge_loss";
    let [_, b, t, n] = axes(tape, OP, "h", h, "[M,B,T,n]")?;
    for (name, x) in [("spot_pnl", spot_pnl), ("futures", futures), ("prices", prices)] {
        expect(tape, OP, name, x, &[b, t, n])?;
    }
    if t < 2 || b == 0 || n == 0 {
        let expected = "at least two steps of a sequence of an asset".into();
        return Err(Error::Shape { op: OP, arg: "h".into(), expected, got: format!("{:?}", tape.shape(h)) });
    }
    for (name, value, least) in
        [("cost", options.cost, 0.0), ("cost_weight", options.cost_weight, 0.0), ("mean_weight", options.mean_weight, f64::NEG_INFINITY)]
    {
        if !(value.is_finite() && value >= least) {
            let help = "give finite numbers, costs and their weight at least 0".into();
            return Err(Error::Parameter { op: OP, name: name.into(), value: value.to_string(), help });
        }
    }
    let steps = options.lengths.map(|lengths| Steps::new(tape, lengths, b, t)).transpose()?;
    let earned = tape.mul(h, futures)?;
    let pnl = tape.add(earned, spot_pnl)?;
    let (total, m) = (tape.sum(pnl, &[3])?, tape.shape(pnl)[0]);
    let mut loss = if options.by_asset {
        let mut loss = None;
        for asset in 0..n {
            let own = tape.slice(pnl, 3, asset..asset + 1)?;
            let own = tape.reshape(own, &[m, b, t])?;
            let own = series_risk(tape, options.risk, own, steps.as_ref())?;
            loss = Some(loss.map_or(Ok(own), |loss| tape.add(loss, own))?);
        }
        loss.ok_or_else(|| Error::Internal("a loss of no assets".into()))?
    } else {
        series_risk(tape, options.risk, total, steps.as_ref())?
    };
    if options.mean_weight != 0.0 {
        let mean = series_mean(tape, total, steps.as_ref())?;
        let mean = tape.mean(mean, &[1])?;
        let mean = tape.affine(mean, -options.mean_weight as f32, 0.0)?;
        loss = tape.add(loss, mean)?;
    }
    if options.cost > 0.0 && options.cost_weight != 0.0 {
        let cost = traded_value(tape, h, [futures, prices], options, steps.as_ref())?;
        let cost = tape.affine(cost, (options.cost * options.cost_weight / b as f64) as f32, 0.0)?;
        loss = tape.add(loss, cost)?;
    }
    Ok(loss)
}

/// Steps of sequences that differ in length.
struct Steps {
    /// Words [1,B].
    lengths: Var,
    /// 1 / length within a sequence, 0 behind it [1,B,T].
    shares: Var,
    /// 1 within a sequence, 0 behind it [1,B,T].
    within: Var,
    /// length / (length − 1) [1,B].
    unbiased: Var,
}

impl Steps {
    fn new(tape: &mut Tape, lengths: Var, b: usize, t: usize) -> Result<Steps> {
        expect(tape, "delta_hedge_loss", "lengths", lengths, &[b])?;
        let zeros = tape.device().zeros("zeros", (b * t) as u64)?;
        let zeros = tape.input(&zeros, &[1, b, t])?;
        let shares = tape.softmax_masked(zeros, lengths, false)?;
        let within = tape.unary(Unary::Step, shares)?;
        let squares = tape.unary(Unary::Square, shares)?;
        let sum = tape.sum(squares, &[2])?;
        let rest = tape.affine(sum, -1.0, 1.0)?;
        // A sequence of one step has no variance.
        let rest = tape.unary(Unary::Clamp { lo: 1e-7, hi: 1.0 }, rest)?;
        let unbiased = tape.unary(Unary::Reciprocal, rest)?;
        Ok(Steps { lengths, shares, within, unbiased })
    }
}

/// Mean over the steps of each sequence: [M,B,T] to [M,B].
fn series_mean(tape: &mut Tape, x: Var, steps: Option<&Steps>) -> Result<Var> {
    let Some(steps) = steps else { return tape.mean(x, &[2]) };
    let weighted = tape.mul(x, steps.shares)?;
    tape.sum(weighted, &[2])
}

/// Mean over sequences of the risk over the steps of each: [M,B,T] to [M].
fn series_risk(tape: &mut Tape, risk: HedgeRisk, x: Var, steps: Option<&Steps>) -> Result<Var> {
    let [m, b, t] = axes(tape, "delta_hedge_loss", "pnl", x, "[M,B,T]")?;
    let Some(steps) = steps else {
        let rows = tape.reshape(x, &[m * b, t])?;
        let risks = tape.hedge_risk(risk, rows)?;
        let risks = tape.reshape(risks, &[m, b])?;
        return tape.mean(risks, &[1]);
    };
    let risks = match risk {
        HedgeRisk::Variance => series_variance(tape, x, steps)?,
        HedgeRisk::MeanVariance { risk_aversion } => {
            let (variance, mean) = (series_variance(tape, x, steps)?, series_mean(tape, x, Some(steps))?);
            let variance = tape.affine(variance, 0.5 * risk_aversion as f32, 0.0)?;
            tape.sub(variance, mean)?
        }
        HedgeRisk::Cvar { alpha } => {
            tape.objective(Goal::Cvar { alpha }, x, ObjectiveOptions { lengths: Some(steps.lengths), ..ObjectiveOptions::default() })?
        }
        HedgeRisk::Entropic { risk_aversion: a } => {
            let x = tape.affine(x, -a as f32, 0.0)?;
            let x = tape.mul(x, steps.within)?;
            // Behind a sequence far below any value.
            let barred = tape.affine(steps.within, 1e30, -1e30)?;
            let allowed = tape.add(x, barred)?;
            let top = tape.no_grad(|tape| tape.max(allowed, &[2]))?;
            let top = tape.detach(top)?;
            let column = tape.reshape(top, &[m, b, 1])?;
            let x = tape.sub(x, column)?;
            let x = tape.mul(x, steps.within)?;
            let x = tape.unary(Unary::Exp, x)?;
            let x = series_mean(tape, x, Some(steps))?;
            let x = tape.unary(Unary::Log, x)?;
            let x = tape.add(x, top)?;
            tape.affine(x, (1.0 / a) as f32, 0.0)?
        }
        HedgeRisk::QuadraticCvar { lambda } => {
            let help = "it needs sequences of one length: leave lengths out, or take the CVaR".into();
            return Err(Error::Parameter { op: "delta_hedge_loss", name: "risk".into(), value: format!("QuadraticCvar {lambda}"), help });
        }
    };
    tape.mean(risks, &[1])
}

fn series_variance(tape: &mut Tape, x: Var, steps: &Steps) -> Result<Var> {
    let [m, b, _] = axes(tape, "delta_hedge_loss", "pnl", x, "[M,B,T]")?;
    let mean = series_mean(tape, x, Some(steps))?;
    let column = tape.reshape(mean, &[m, b, 1])?;
    let off = tape.sub(x, column)?;
    let squares = tape.unary(Unary::Square, off)?;
    let mean = series_mean(tape, squares, Some(steps))?;
    tape.mul(mean, steps.unbiased)
}

/// Σ |trade|·price over sequences, steps and assets, to [M].
fn traded_value(tape: &mut Tape, h: Var, [futures, prices]: [Var; 2], options: HedgeLoss, steps: Option<&Steps>) -> Result<Var> {
    let [m, b, t, n] = axes(tape, "delta_hedge_loss", "h", h, "[M,B,T,n]")?;
    let (later, before) = (tape.slice(h, 2, 1..t)?, tape.slice(h, 2, 0..t - 1)?);
    let (trades, at) = (tape.sub(later, before)?, tape.slice(prices, 2, 1..t)?);
    let value = value_of(tape, trades, at)?;
    let value = match steps {
        None => value,
        Some(steps) => {
            let within = tape.reshape(steps.within, &[1, b, t, 1])?;
            let within = tape.slice(within, 2, 1..t)?;
            tape.mul(value, within)?
        }
    };
    let mut total = tape.sum(value, &[1, 2, 3])?;
    if options.entry {
        let (first, at) = (tape.slice(h, 2, 0..1)?, tape.slice(prices, 2, 0..1)?);
        let value = value_of(tape, first, at)?;
        let value = tape.sum(value, &[1, 2, 3])?;
        total = tape.add(total, value)?;
    }
    if options.exit {
        let after = tape.add(prices, futures)?;
        let last = |tape: &mut Tape, x: Var, leading: usize| match steps {
            Some(steps) => tape.last_valid(x, steps.lengths),
            None => {
                let last = tape.slice(x, 2, t - 1..t)?;
                tape.reshape(last, &[leading, b, n])
            }
        };
        let leading = tape.shape(after)[0];
        let (held, at) = (last(tape, h, m)?, last(tape, after, leading)?);
        let value = value_of(tape, held, at)?;
        let value = tape.sum(value, &[1, 2])?;
        total = tape.add(total, value)?;
    }
    Ok(total)
}

fn value_of(tape: &mut Tape, trades: Var, prices: Var) -> Result<Var> {
    let size = tape.unary(Unary::Abs, trades)?;
    tape.mul(size, prices)
}

// ---- policies over whole paths ------------------------------------------------------------------------------------------------

/// A network that is rolled out over paths, with its parameters under PyTorch's names: `layers.0.weight`, `layers.0.bias`, … of an MLP, `weight_ih_l0`,
/// `weight_hh_l0`, `bias_ih_l0`, … of an LSTM, then `head.weight`, `head.bias`, which start at zero: an untrained policy is its baseline.
#[derive(Debug, Clone)]
pub struct HedgePolicy {
    /// Prefix of its tensors.
    pub prefix: String,
    /// The network.
    pub network: Network,
    /// Its head.
    pub head: Head,
    /// Features beside log-moneyness, √τ, baseline and previous holding.
    pub features: usize,
    /// Largest residual, or logarithm of a width's largest factor.
    pub range: f64,
    /// Steps that gradients go back through the state of LSTM layers; 0: all.
    pub lookback: usize,
}

impl HedgePolicy {
    /// Two dense layers of 32 units.
    pub fn mlp(prefix: &str, head: Head) -> HedgePolicy {
        let network = Network::Mlp { widths: vec![32, 32], activation: Activation::Silu };
        HedgePolicy { prefix: prefix.into(), network, head, features: 0, range: 1.0, lookback: 0 }
    }

    /// Layers of an LSTM: path-dependent hedging.
    pub fn lstm(prefix: &str, layers: usize, hidden: usize) -> HedgePolicy {
        HedgePolicy { prefix: prefix.into(), network: Network::Lstm { layers, hidden }, head: Head::Residual, features: 0, range: 1.0, lookback: 0 }
    }

    /// Its rollout; set the option and the claim before use.
    pub fn rollout(&self, models: usize, paths: usize, steps: usize) -> HedgeRollout {
        let usual = HedgeRollout::new(self.network.clone(), models as u64, paths as u64, steps as u64);
        HedgeRollout { head: self.head, features: self.features, range: self.range, lookback: self.lookback as u64, ..usual }
    }

    /// Names, shapes and starts, in the order of the rollout's weights.
    fn tensors(&self) -> Vec<(String, Vec<usize>, Init)> {
        let (mut all, mut inputs) = (Vec::new(), 4 + self.features);
        match &self.network {
            Network::Mlp { widths, .. } => {
                for (l, &width) in widths.iter().enumerate() {
                    all.push((format!("layers.{l}.weight"), vec![width, inputs], Init::fan_in(inputs)));
                    all.push((format!("layers.{l}.bias"), vec![width], Init::fan_in(inputs)));
                    inputs = width;
                }
            }
            Network::Lstm { layers, hidden } => {
                for l in 0..*layers {
                    let start = Init::fan_in(*hidden);
                    all.push((format!("weight_ih_l{l}"), vec![4 * hidden, inputs], start));
                    all.push((format!("weight_hh_l{l}"), vec![4 * hidden, *hidden], start));
                    all.push((format!("bias_ih_l{l}"), vec![4 * hidden], start));
                    inputs = *hidden;
                }
            }
        }
        let outputs = if self.head == Head::Residual { 1 } else { 2 };
        all.push(("head.weight".into(), vec![outputs, inputs], Init::Constant(0.0)));
        all.push(("head.bias".into(), vec![outputs], Init::Constant(0.0)));
        all
    }

    /// The weights [M,W] that a rollout takes.
    /// # Errors
    /// `Parameter` for tensors that were not declared.
    pub fn weights(&self, tape: &mut Tape, parameters: &Parameters) -> Result<Var> {
        let mut parts = Vec::new();
        for (name, shape, _) in self.tensors() {
            let tensor = parameters.on(tape, &under(&self.prefix, &name))?;
            parts.push(tape.reshape(tensor, &[parameters.models(), shape.iter().product()])?);
        }
        tape.concat(&parts, 1)
    }
}

impl Module for HedgePolicy {
    fn declare(&self, to: &mut Declared) {
        for (name, shape, init) in self.tensors() {
            to.add(under(&self.prefix, &name), &shape, init);
        }
    }
}

/// Path-dependent hedging by an LSTM over [log-moneyness, √τ, baseline, previous holding, p].
#[derive(Debug, Clone)]
pub struct LstmDeltaHedger {
    /// The policy.
    pub policy: HedgePolicy,
    /// K: filtered probabilities are its features.
    pub regimes: usize,
}

impl LstmDeltaHedger {
    /// Two layers of 64 units; gradients go back 10 steps through their state.
    pub fn new(prefix: &str, regimes: usize) -> LstmDeltaHedger {
        LstmDeltaHedger { policy: HedgePolicy { features: regimes, lookback: 10, ..HedgePolicy::lstm(prefix, 2, 64) }, regimes }
    }
}

impl Module for LstmDeltaHedger {
    fn declare(&self, to: &mut Declared) {
        self.policy.declare(to);
    }
}
