//! Training of hedging policies through whole paths: rollout, risk, gradients, clipping and optimiser in one recorded pass, replayed with fresh paths.
//!
//! ```text
//! spot [P,T+1], extra, claim ──> hedge_rollout ──> pnl [M,P] ──> risk [M] ──> gradients ──> clip, check, AdamW     one submit
//! ```
//!
//! A step reads what [`HedgeTrainer::write`] left, or draws the paths of a seed from a market ([`HedgeTrainer::simulated`], [`HedgeTrainer::draw`]), forward
//! and again backward: then its memory grows with the paths of a batch, never with paths × steps.

use crate::kernels::activation::Activation;
use crate::kernels::hedge_rollout::{Baseline, Claim, Head, HedgeRollout, Network};
use crate::kernels::optimiser::{Algorithm, Average, Optimiser, OptimiserArgs, optimiser_step};
use crate::kernels::paths::PathSource;
use crate::kernels::{Buffer, Read, Replay, View};
use crate::nn::hedge::{DynamicDeltaHedger, HedgePolicy, LstmDeltaHedger, RegimeDeltaHedger, TransactionCostAwareHedger, TransitionAwareHedger};
use crate::nn::{Declared, Module, Parameters};
use crate::ops::{HedgeRisk, RolloutInputs, RolloutSpot};
use crate::tape::{Tape, Var};
use crate::{Device, Error, Result};

const OP: &str = "train_delta_hedger";

/// Costs and risk aversion of one model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HedgeCosts {
    /// One-way share of traded value.
    pub proportional: f64,
    /// Half the spread, in price.
    pub half_spread: f64,
    /// Cost of a trade of any size; its jump has no gradient.
    pub fixed: f64,
    /// Of the band of Whalley and Wilmott.
    pub risk_aversion: f64,
}

impl HedgeCosts {
    /// Proportional costs alone, risk aversion 1.
    pub fn proportional(cost: f64) -> HedgeCosts {
        HedgeCosts { proportional: cost, half_spread: 0.0, fixed: 0.0, risk_aversion: 1.0 }
    }
}

/// How to train.
#[derive(Debug, Clone, PartialEq)]
pub struct HedgeTrainConfig {
    /// What is minimised.
    pub risk: HedgeRisk,
    /// Learning rate of each model, or one for all.
    pub learning_rate: Vec<f64>,
    /// Decoupled weight decay of matrices.
    pub weight_decay: f64,
    /// Largest norm of a model's gradient.
    pub max_grad_norm: Option<f64>,
    /// n, assets of a portfolio: the P&L of n paths that follow each other is summed before its risk is taken. 1 unless given.
    pub assets: usize,
    /// Decides how the weights start.
    pub seed: u64,
}

impl Default for HedgeTrainConfig {
    fn default() -> HedgeTrainConfig {
        HedgeTrainConfig { risk: HedgeRisk::Variance, learning_rate: vec![1e-3], weight_decay: 0.0, max_grad_norm: Some(1.0), assets: 1, seed: 0 }
    }
}

/// Buffers that a pass reads, and where its results are.
struct Recorded {
    replay: Replay,
    outputs: Vec<Read>,
}

/// Where prices come from.
enum Prices {
    Written(Buffer),
    Drawn(PathSource),
}

/// M policies that learn on batches of P paths.
pub struct HedgeTrainer {
    device: Device,
    op: HedgeRollout,
    parameters: Parameters,
    prices: Prices,
    extra: Option<Buffer>,
    claim: Option<Buffer>,
    step: Recorded,
    score: Recorded,
}

/// What policies earn on each path.
#[derive(Debug, Clone, PartialEq)]
pub struct HedgePnl {
    /// [M,P].
    pub pnl: Vec<f64>,
    /// Cost in cash [M,P].
    pub cost: Vec<f64>,
    /// Units traded [M,P].
    pub turnover: Vec<f64>,
}

impl HedgeTrainer {
    /// Records the passes for batches that are written. `op` is the policy's rollout with option, claim, paths and models; `costs` are one per model, or
    /// one for all.
    /// # Errors
    /// As for [`Tape::hedge_rollout`] and [`Tape::hedge_risk`]; `Parameter` for costs or rates that are no numbers, negative, or of another count.
    pub fn new(device: &Device, policy: &HedgePolicy, op: &HedgeRollout, costs: &[HedgeCosts], config: &HedgeTrainConfig) -> Result<HedgeTrainer> {
        let spot = device.zeros("spot", op.paths * (op.steps + 1))?;
        HedgeTrainer::of(device, policy, op, Prices::Written(spot), costs, config)
    }

    /// The same for batches that are drawn from a market: paths 0 … P−1 of its source, with its seed until [`HedgeTrainer::draw`] sets another.
    /// # Errors
    /// As for [`HedgeTrainer::new`]; `Shape` for a source of other steps.
    pub fn simulated(
        device: &Device,
        policy: &HedgePolicy,
        op: &HedgeRollout,
        market: PathSource,
        costs: &[HedgeCosts],
        config: &HedgeTrainConfig,
    ) -> Result<HedgeTrainer> {
        HedgeTrainer::of(device, policy, op, Prices::Drawn(market), costs, config)
    }

    fn of(device: &Device, policy: &HedgePolicy, op: &HedgeRollout, prices: Prices, costs: &[HedgeCosts], config: &HedgeTrainConfig) -> Result<HedgeTrainer> {
        let mut declared = Declared::new();
        policy.declare(&mut declared);
        let (m, p, t) = (op.models as usize, op.paths as usize, op.steps as usize);
        let parameters = Parameters::new(device, m, &declared, config.seed)?;
        let columns = op.columns() as usize;
        let extra = if columns > 0 { Some(device.zeros("extra", (p * t * columns) as u64)?) } else { None };
        let claim = if op.claim == Claim::Given { Some(device.zeros("claim", p as u64)?) } else { None };
        if config.assets == 0 || p % config.assets != 0 {
            let help = "give a divisor of the paths".into();
            return Err(Error::Parameter { op: OP, name: "assets".into(), value: format!("{} of {p} paths", config.assets), help });
        }
        let risk = device.upload("risk", &risk_rows(m, costs)?)?;
        let build = |tape: &mut Tape| -> Result<[Var; 2]> {
            let weights = policy.weights(tape, &parameters)?;
            let risk = tape.input(&risk, &[m, 4])?;
            let spot = match &prices {
                Prices::Written(spot) => RolloutSpot::Given(tape.input(spot, &[p, t + 1])?),
                Prices::Drawn(market) => RolloutSpot::Simulated(market.clone()),
            };
            let extra = extra.as_ref().map(|extra| tape.input(extra, &[p, t, columns])).transpose()?;
            let claim = claim.as_ref().map(|claim| tape.input(claim, &[p])).transpose()?;
            tape.hedge_rollout(op, &RolloutInputs { weights, risk, spot, extra, claim })
        };
        let step = {
            let mut tape = Tape::new(device);
            let [mut pnl, _] = build(&mut tape)?;
            if config.assets > 1 {
                let portfolios = tape.reshape(pnl, &[m, p / config.assets, config.assets])?;
                pnl = tape.sum(portfolios, &[2])?;
            }
            let loss = tape.hedge_risk(config.risk, pnl)?;
            tape.backward(loss)?;
            let mut pass = device.pass("train hedge");
            let plan = tape.record(&mut pass, &[loss])?;
            optimise(device, &mut pass, &parameters, config, &plan.view(loss)?)?;
            let read = pass.read(plan.view(loss)?)?;
            Recorded { replay: pass.prepare()?, outputs: vec![read] }
        };
        let score = {
            let mut tape = Tape::new(device);
            let [pnl, costs] = tape.no_grad(build)?;
            let mut pass = device.pass("hedge");
            let plan = tape.record(&mut pass, &[pnl, costs])?;
            let reads = vec![pass.read(plan.view(pnl)?)?, pass.read(plan.view(costs)?)?];
            Recorded { replay: pass.prepare()?, outputs: reads }
        };
        Ok(HedgeTrainer { device: device.clone(), op: op.clone(), parameters, prices, extra, claim, step, score })
    }

    /// The parameters, which steps change in place.
    pub fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    /// The rollout.
    pub fn rollout(&self) -> &HedgeRollout {
        &self.op
    }

    /// Writes a batch: prices [P,T+1], with zeros behind the last one of a shorter path where the rollout is ragged, extra [P,T,E] and claims [P]
    /// where the policy has them.
    /// # Errors
    /// `Shape` for another length; `Parameter` for a price that is not a finite number above 0, or a path that has fewer than two.
    pub fn write(&self, spot: &[f32], extra: &[f32], claim: &[f32]) -> Result<()> {
        let prices = self.op.steps as usize + 1;
        for (path, row) in spot.chunks(prices).enumerate() {
            let ends = if self.op.ragged { row.iter().rposition(|s| *s != 0.0).map_or(0, |last| last + 1).max(2) } else { prices };
            if let Some((i, s)) = row.iter().enumerate().take(ends).find(|(_, s)| !(s.is_finite() && **s > 0.0)) {
                let help = if self.op.ragged { "give at least two finite prices above 0 a path, then zeros" } else { "give finite prices above 0" };
                return Err(Error::Parameter { op: OP, name: format!("spot[{}]", path * prices + i), value: s.to_string(), help: help.into() });
            }
        }
        for (name, values) in [("extra", extra), ("claim", claim)] {
            if let Some(i) = values.iter().position(|x| !x.is_finite()) {
                return Err(Error::Parameter { op: OP, name: format!("{name}[{i}]"), value: values[i].to_string(), help: "give finite values".into() });
            }
        }
        match &self.prices {
            Prices::Written(buffer) => self.device.write(buffer, spot)?,
            Prices::Drawn(_) if spot.is_empty() => {}
            Prices::Drawn(_) => {
                let (expected, got) = ("none: prices are drawn".into(), format!("{} prices", spot.len()));
                return Err(Error::Shape { op: OP, arg: "spot".into(), expected, got });
            }
        }
        for (name, buffer, values) in [("extra", &self.extra, extra), ("claim", &self.claim, claim)] {
            match buffer {
                Some(buffer) => self.device.write(buffer, values)?,
                None if values.is_empty() => {}
                None => {
                    let (expected, got) = ("none: this policy reads no such values".into(), format!("{} values", values.len()));
                    return Err(Error::Shape { op: OP, arg: name.into(), expected, got });
                }
            }
        }
        Ok(())
    }

    /// Another batch: steps draw the paths of this seed from now on.
    /// # Errors
    /// `Parameter` for a trainer whose batches are written, or a market with matched moments.
    pub fn draw(&self, seed: u64) -> Result<()> {
        match &self.prices {
            Prices::Drawn(market) => market.reseed(seed),
            Prices::Written(_) => {
                let help = "this trainer's batches are written; HedgeTrainer::simulated draws them".into();
                Err(Error::Parameter { op: OP, name: "seed".into(), value: seed.to_string(), help })
            }
        }
    }

    /// One step on the batch that was written or drawn: the risk [M] before it. A model whose risk or gradient is not finite stays as it is.
    /// # Errors
    /// Those of the device.
    pub fn step(&self) -> Result<Vec<f64>> {
        let mut done = self.step.replay.run()?;
        self.step.outputs.iter().map(|&read| done.f64(read)).next().unwrap_or_else(|| Ok(Vec::new()))
    }

    /// What the policies earn on the batch that was written or drawn.
    /// # Errors
    /// Those of the device.
    pub fn score(&self) -> Result<HedgePnl> {
        let mut done = self.score.replay.run()?;
        let [pnl, costs] = self.score.outputs[..] else { return Err(Error::Internal("two results of a rollout".into())) };
        let (pnl, costs) = (done.f64(pnl)?, done.f64(costs)?);
        let column = |k: usize| costs.iter().skip(k).step_by(2).copied().collect();
        Ok(HedgePnl { pnl, cost: column(0), turnover: column(1) })
    }
}

fn risk_rows(models: usize, costs: &[HedgeCosts]) -> Result<Vec<f32>> {
    if costs.len() != 1 && costs.len() != models {
        let got = format!("{} costs", costs.len());
        return Err(Error::Shape { op: OP, arg: "costs".into(), expected: format!("1 or {models}"), got });
    }
    for c in costs {
        for (name, value, good) in [
            ("proportional", c.proportional, c.proportional >= 0.0),
            ("half_spread", c.half_spread, c.half_spread >= 0.0),
            ("fixed", c.fixed, c.fixed >= 0.0),
            ("risk_aversion", c.risk_aversion, c.risk_aversion > 0.0),
        ] {
            if !(value.is_finite() && good) {
                let help = "give finite costs of at least 0 and a risk aversion above 0".into();
                return Err(Error::Parameter { op: OP, name: name.into(), value: value.to_string(), help });
            }
        }
    }
    Ok((0..models).map(|m| costs[m % costs.len()]).flat_map(|c| [c.proportional, c.half_spread, c.fixed, c.risk_aversion].map(|x| x as f32)).collect())
}

fn optimise(device: &Device, pass: &mut crate::kernels::Pass, parameters: &Parameters, config: &HedgeTrainConfig, loss: &View) -> Result<()> {
    let m = parameters.models();
    let rates = &config.learning_rate;
    if (rates.len() != 1 && rates.len() != m) || rates.iter().any(|r| !(r.is_finite() && *r > 0.0)) {
        let help = "give one rate, or one per model, above 0".into();
        return Err(Error::Parameter { op: OP, name: "learning_rate".into(), value: format!("{rates:?}"), help });
    }
    let op = Optimiser {
        algorithm: Algorithm::Adamw { beta1: 0.9, beta2: 0.999, eps: 1e-8 },
        learning_rate: 1.0,
        weight_decay: config.weight_decay,
        max_grad_norm: config.max_grad_norm,
        average: Average::None,
        tensors: parameters.segments(),
        models: m as u64,
    };
    let rate: Vec<f32> = (0..m).map(|i| rates[i % rates.len()] as f32).collect();
    let n = parameters.values().len();
    let view = |b: &Buffer| View::from(b);
    let (table, rate, decay) = (device.upload_u32("blocks", &op.table())?, device.upload("rate", &rate)?, device.upload("decay", &parameters.decay())?);
    let (moment1, moment2, norm) = (device.zeros("moment", n)?, device.zeros("moment", n)?, device.zeros("norm", m as u64)?);
    let (counters, scratch) = (device.zeros_u32("counters", 3 * m as u64)?, device.zeros("optimiser", op.scratch())?);
    let args = OptimiserArgs {
        table: &view(&table),
        grads: &view(parameters.grads()),
        rate: &view(&rate),
        loss: Some(loss),
        decay: Some(&view(&decay)),
        hyper: None,
        parameters: &view(parameters.values()),
        moment1: Some(&view(&moment1)),
        moment2: Some(&view(&moment2)),
        average: None,
        counters: &view(&counters),
        norm: &view(&norm),
        scratch: &view(&scratch),
    };
    optimiser_step(pass, &op, &args)
}

// ---- hedges of positions by futures -------------------------------------------------------------------------------------------

/// Paths of what is held and of what hedges it, asset by asset, with filtered probabilities.
#[derive(Debug, Clone, PartialEq)]
pub struct HedgeWorld {
    /// P.
    pub paths: usize,
    /// n.
    pub assets: usize,
    /// T.
    pub steps: usize,
    /// Prices of what is held [P,n,T+1].
    pub spot: Vec<f32>,
    /// Prices of the hedge instruments [P,n,T+1].
    pub futures: Vec<f32>,
    /// Filtered probabilities [P,T,K], known when the step's hedge is decided.
    pub probs: Vec<f32>,
    /// K.
    pub regimes: usize,
}

impl HedgeWorld {
    /// Refuses what does not fit or is no price.
    /// # Errors
    /// `Shape` and `Parameter` naming what is wrong.
    pub fn check(&self) -> Result<()> {
        let (p, n, t) = (self.paths, self.assets, self.steps);
        let (prices, probs) = (p * n * (t + 1), p * t * self.regimes);
        for (name, values, len) in [("spot", &self.spot, prices), ("futures", &self.futures, prices), ("probs", &self.probs, probs)] {
            if values.len() != len {
                let got = format!("{} values", values.len());
                return Err(Error::Shape { op: OP, arg: name.into(), expected: format!("{len} values"), got });
            }
            if let Some(i) = values.iter().position(|x| !x.is_finite() || name != "probs" && *x <= 0.0) {
                let help = "give finite prices above 0, and finite probabilities".into();
                return Err(Error::Parameter { op: OP, name: format!("{name}[{i}]"), value: values[i].to_string(), help });
            }
        }
        if p < 2 || n == 0 || t == 0 || self.regimes == 0 {
            let got = format!("{p} paths, {n} assets, {t} steps, {} regimes", self.regimes);
            return Err(Error::Shape { op: OP, arg: "world".into(), expected: "two paths, an asset, a step, a regime".into(), got });
        }
        Ok(())
    }

    /// The paths of a range.
    pub fn part(&self, range: std::ops::Range<usize>) -> HedgeWorld {
        let rows = |x: &[f32], each: usize| x[range.start * each..range.end * each].to_vec();
        let (prices, probs) = (self.assets * (self.steps + 1), self.steps * self.regimes);
        HedgeWorld { paths: range.len(), spot: rows(&self.spot, prices), futures: rows(&self.futures, prices), probs: rows(&self.probs, probs), ..*self }
    }

    /// Paths of one asset's prices.
    fn of<'a>(&self, prices: &'a [f32], asset: usize) -> impl Iterator<Item = &'a [f32]> {
        prices.chunks_exact(self.steps + 1).skip(asset).step_by(self.assets)
    }

    /// Mean first price of an asset's instrument.
    fn level(&self, asset: usize) -> f64 {
        self.of(&self.futures, asset).map(|path| f64::from(path[0])).sum::<f64>() / self.paths as f64
    }
}

/// A hedger of positions, each by its instrument: one policy for all assets, and what it reads at each step.
pub trait DeltaHedger {
    /// The network; its features are those of [`DeltaHedger::features`].
    fn policy(&self) -> HedgePolicy;
    /// Adds the hedge of an asset before any training, in units of its instrument, and the features: from the probabilities [K] of a step.
    /// # Errors
    /// `Shape` for probabilities or an asset that the hedger does not know.
    fn features(&self, probs: &[f32], asset: usize, out: &mut Vec<f32>) -> Result<()>;
}

/// A policy over paths whose baseline mixes a hedge of each regime: Σ_k p_k·h_k, or its average over the regimes expected some steps ahead. Every hedger
/// of [`crate::nn::hedge`] has one, by [`RegimeHedge::of`] and its neighbours.
#[derive(Debug, Clone)]
pub struct RegimeHedge {
    /// The network.
    pub policy: HedgePolicy,
    /// K.
    pub regimes: usize,
    /// Hedge of each asset in each regime [n,K], with its sign: −q·β_k hedges q units of the spot.
    pub hedges: Vec<f64>,
    /// Transition probabilities [K,K] and steps ahead L: the baseline then averages p, p·A, …, p·A^L, which are the features.
    pub ahead: Option<(Vec<f64>, usize)>,
}

impl RegimeHedge {
    /// A dense policy, as [`RegimeDeltaHedger`] and the spot leg of [`DynamicDeltaHedger`] have.
    pub fn of(hedger: &RegimeDeltaHedger, hedges: Vec<f64>) -> RegimeHedge {
        RegimeHedge::dense(hedger.hidden, Head::Residual, hedger.range, hedger.regimes, hedges)
    }

    /// The spot leg of a delta hedger: there is one instrument.
    pub fn of_dynamic(hedger: &DynamicDeltaHedger, hedges: Vec<f64>) -> RegimeHedge {
        RegimeHedge::dense(hedger.hidden, Head::Residual, hedger.range, hedger.regimes, hedges)
    }

    /// The policy of an LSTM hedger.
    pub fn of_lstm(hedger: &LstmDeltaHedger, hedges: Vec<f64>) -> RegimeHedge {
        let policy = HedgePolicy { features: hedger.regimes, ..hedger.policy.clone() };
        RegimeHedge { policy, regimes: hedger.regimes, hedges, ahead: None }
    }

    /// A band around the mixture, as wide as its net says.
    pub fn of_band(hedger: &TransactionCostAwareHedger, hedges: Vec<f64>) -> RegimeHedge {
        RegimeHedge::dense(hedger.hidden, Head::Band, hedger.range, hedger.regimes, hedges)
    }

    /// The mixture over the regimes expected ahead.
    pub fn of_transitions(hedger: &TransitionAwareHedger, transition: Vec<f64>, hedges: Vec<f64>) -> RegimeHedge {
        let mut own = RegimeHedge::dense(hedger.hidden, Head::Residual, hedger.range, hedger.regimes, hedges);
        own.policy.features = hedger.regimes * (hedger.lookahead + 1);
        own.ahead = Some((transition, hedger.lookahead));
        own
    }

    fn dense(hidden: usize, head: Head, range: f64, regimes: usize, hedges: Vec<f64>) -> RegimeHedge {
        let network = Network::Mlp { widths: vec![hidden], activation: Activation::Tanh };
        RegimeHedge { policy: HedgePolicy { prefix: "hedge".into(), network, head, features: regimes, range, lookback: 0 }, regimes, hedges, ahead: None }
    }
}

impl DeltaHedger for RegimeHedge {
    fn policy(&self) -> HedgePolicy {
        self.policy.clone()
    }

    fn features(&self, probs: &[f32], asset: usize, out: &mut Vec<f32>) -> Result<()> {
        let k = self.regimes;
        let none = (vec![0.0; k * k], 0);
        let (transition, steps) = self.ahead.as_ref().unwrap_or(&none);
        let own = self.hedges.iter().skip(asset * k).take(k);
        for (arg, len, got) in [("probs", k, probs.len()), ("transition", k * k, transition.len()), ("hedges", (asset + 1) * k, asset * k + own.len())] {
            if got != len || k == 0 {
                let expected = format!("{len} values for {k} regimes and {} assets or more", asset + 1);
                return Err(Error::Shape { op: OP, arg: arg.into(), expected, got: format!("{got} values") });
            }
        }
        let mut now: Vec<f64> = probs.iter().map(|&p| f64::from(p)).collect();
        let mut ahead = now.clone();
        for _ in 0..*steps {
            now = (0..k).map(|j| now.iter().enumerate().map(|(i, p)| p * transition[i * k + j]).sum()).collect();
            ahead.extend_from_slice(&now);
        }
        let base: f64 = ahead.chunks_exact(k).flat_map(|p| p.iter().zip(own.clone())).map(|(p, h)| p * h).sum();
        out.push((base / (*steps as f64 + 1.0)) as f32);
        out.extend(ahead.iter().map(|&p| p as f32));
        Ok(())
    }
}

/// How long to train.
#[derive(Debug, Clone, PartialEq)]
pub struct HedgeEpochs {
    /// Passes over the paths: 50 unless given.
    pub epochs: usize,
    /// Paths of a step; a last part smaller than that is left out of each epoch.
    pub batch: usize,
    /// Epochs without a better validation after which training stops.
    pub patience: usize,
    /// Units held of each asset, or one number for all.
    pub positions: Vec<f64>,
}

impl Default for HedgeEpochs {
    fn default() -> HedgeEpochs {
        HedgeEpochs { epochs: 50, batch: 256, patience: 10, positions: vec![1.0] }
    }
}

/// What training gave, out of sample: of the sum over assets, on the validation paths.
#[derive(Debug, Clone, PartialEq)]
pub struct HedgeReport {
    /// Mean training risk of each epoch.
    pub train: Vec<f64>,
    /// Validation risk after each epoch: variance of P&L.
    pub valid: Vec<f64>,
    /// Standard deviation of what the hedged positions earn.
    pub hedged_sd: f64,
    /// That of the hedger before training: its analytic baseline, Black-Scholes for one of options.
    pub baseline_sd: f64,
    /// That of the positions alone.
    pub unhedged_sd: f64,
    /// That of the hedge by the least-squares ratios of the training steps.
    pub static_sd: f64,
    /// Those least-squares ratios, one per asset.
    pub static_ratio: Vec<f64>,
    /// 1 − hedged variance / unhedged variance.
    pub effectiveness: f64,
    /// Mean cost a path, in cash.
    pub cost: f64,
    /// Mean units traded a path, of the instruments at the price level of the first asset's.
    pub turnover: f64,
}

/// Trains a hedger of `positions` units of the spots by their instruments; `train` and `valid` are different times. The weights with the best validation
/// variance are kept. Prices of every asset are taken at the level of the first one's instrument, and hedges with them, so that one policy serves all.
/// # Errors
/// Those of [`HedgeWorld::check`] and [`HedgeTrainer::new`]; `Parameter` for positions of another count, or hedges and features that do not fit.
pub fn train_delta_hedger(
    device: &Device,
    hedger: &dyn DeltaHedger,
    [train, valid]: [&HedgeWorld; 2],
    costs: HedgeCosts,
    config: &HedgeTrainConfig,
    epochs: &HedgeEpochs,
) -> Result<(Parameters, HedgeReport)> {
    train.check()?;
    valid.check()?;
    let sizes = |world: &HedgeWorld| format!("{} assets, {} steps, {} regimes", world.assets, world.steps, world.regimes);
    if sizes(valid) != sizes(train) {
        return Err(Error::Shape { op: OP, arg: "valid".into(), expected: sizes(train), got: sizes(valid) });
    }
    let (policy, batch, n) = (hedger.policy(), epochs.batch.clamp(2, train.paths), train.assets);
    let positions = positions_of(epochs, n)?;
    let desk = Desk { hedger, positions: &positions, scale: (0..n).map(|asset| train.level(0) / train.level(asset)).collect() };
    let op =
        |paths: usize| HedgeRollout { strike: train.level(0), baseline: Baseline::Given, claim: Claim::Given, ..policy.rollout(1, paths * n, train.steps) };
    let columns = desk.row(&train.probs[..train.regimes], 0)?.len();
    if op(batch).columns() as usize != columns || policy.head == Head::WhalleyWilmott {
        let help = "give one hedge and the policy's features, and a head without a width of its own".into();
        return Err(Error::Parameter { op: OP, name: "features".into(), value: columns.to_string(), help });
    }
    let config = HedgeTrainConfig { assets: n, ..config.clone() };
    let trainer = HedgeTrainer::new(device, &policy, &op(batch), &[costs], &config)?;
    let judge = HedgeTrainer::new(device, &policy, &op(valid.paths), &[costs], &config)?;
    desk.write(&judge, valid)?;
    let variance = |pnl: &[f64]| moments(&pnl.chunks_exact(n).map(|assets| assets.iter().sum()).collect::<Vec<f64>>()).1;
    let names: Vec<String> = trainer.parameters().tensors().iter().map(|tensor| tensor.name.clone()).collect();
    let copy = |from: &Parameters, to: &Parameters| names.iter().try_for_each(|name| to.set(name, &from.get(name)?));
    let (mut report, mut best) = (HedgeReport::new(train, valid, &positions), f64::INFINITY);
    report.baseline_sd = variance(&judge.score()?.pnl).sqrt();
    let best_of = Parameters::new(device, 1, &declared_of(&policy), config.seed)?;
    let mut waited = 0;
    for epoch in 0..epochs.epochs {
        let mut total = 0.0;
        let rounds = train.paths / batch;
        for i in 0..rounds {
            // Another start each epoch: batches differ.
            let from = (i * batch + epoch * batch / 3) % (train.paths - batch + 1);
            desk.write(&trainer, &train.part(from..from + batch))?;
            total += trainer.step()?.first().copied().unwrap_or(f64::NAN);
        }
        copy(trainer.parameters(), judge.parameters())?;
        let variance = variance(&judge.score()?.pnl);
        report.train.push(total / rounds as f64);
        report.valid.push(variance);
        waited = if variance < best { 0 } else { waited + 1 };
        if variance < best {
            best = variance;
            copy(trainer.parameters(), &best_of)?;
        }
        if waited > epochs.patience {
            break;
        }
    }
    copy(&best_of, judge.parameters())?;
    let score = judge.score()?;
    report.hedged_sd = variance(&score.pnl).sqrt();
    report.effectiveness = 1.0 - (report.hedged_sd / report.unhedged_sd).powi(2);
    (report.cost, report.turnover) = (n as f64 * moments(&score.cost).0, n as f64 * moments(&score.turnover).0);
    Ok((best_of, report))
}

/// What a trainer reads of a world.
struct Desk<'a> {
    hedger: &'a dyn DeltaHedger,
    positions: &'a [f64],
    /// Factor of each asset's prices.
    scale: Vec<f64>,
}

impl Desk<'_> {
    /// Baseline in units at the common price level, and features.
    fn row(&self, probs: &[f32], asset: usize) -> Result<Vec<f32>> {
        let mut out = Vec::new();
        self.hedger.features(probs, asset, &mut out)?;
        if let Some(base) = out.first_mut() {
            *base = (f64::from(*base) / self.scale[asset]) as f32;
        }
        Ok(out)
    }

    fn write(&self, to: &HedgeTrainer, world: &HedgeWorld) -> Result<()> {
        let (n, t, k) = (world.assets, world.steps, world.regimes);
        let (mut futures, mut extra, mut claims) = (Vec::with_capacity(world.futures.len()), Vec::new(), Vec::with_capacity(world.paths * n));
        for (row, (spot, path)) in world.spot.chunks_exact(t + 1).zip(world.futures.chunks_exact(t + 1)).enumerate() {
            let (asset, probs) = (row % n, &world.probs[row / n * t * k..][..t * k]);
            futures.extend(path.iter().map(|&f| (f64::from(f) * self.scale[asset]) as f32));
            for probs in probs.chunks_exact(k) {
                extra.extend(self.row(probs, asset)?);
            }
            // What the position owes at the end.
            claims.push((-self.positions[asset] * f64::from(spot[t] - spot[0])) as f32);
        }
        to.write(&futures, &extra, &claims)
    }
}

fn positions_of(epochs: &HedgeEpochs, assets: usize) -> Result<Vec<f64>> {
    let given = &epochs.positions;
    if (given.len() != 1 && given.len() != assets) || given.iter().any(|q| !q.is_finite()) {
        let help = format!("give one finite number, or {assets}");
        return Err(Error::Parameter { op: OP, name: "positions".into(), value: format!("{given:?}"), help });
    }
    Ok((0..assets).map(|asset| given[asset % given.len()]).collect())
}

fn declared_of(policy: &HedgePolicy) -> Declared {
    let mut declared = Declared::new();
    policy.declare(&mut declared);
    declared
}

/// Mean and variance, divisor n − 1.
fn moments(x: &[f64]) -> (f64, f64) {
    let n = x.len() as f64;
    let mean = x.iter().sum::<f64>() / n;
    (mean, x.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / (n - 1.0).max(1.0))
}

/// Least-squares ratio of an asset's price changes to those of its instrument.
fn least_squares(world: &HedgeWorld, asset: usize) -> f64 {
    let changes =
        |prices: &[f32]| -> Vec<f64> { world.of(prices, asset).flat_map(|path| path.windows(2).map(|w| f64::from(w[1]) - f64::from(w[0]))).collect() };
    let (ds, df) = (changes(&world.spot), changes(&world.futures));
    let ((mean_s, _), (mean_f, variance)) = (moments(&ds), moments(&df));
    let covariance = ds.iter().zip(&df).map(|(s, f)| (s - mean_s) * (f - mean_f)).sum::<f64>() / (ds.len() as f64 - 1.0).max(1.0);
    if variance > 0.0 { covariance / variance } else { 0.0 }
}

impl HedgeReport {
    /// What can be said before training.
    fn new(train: &HedgeWorld, valid: &HedgeWorld, positions: &[f64]) -> HedgeReport {
        let ratios: Vec<f64> = (0..train.assets).map(|asset| least_squares(train, asset)).collect();
        let (mut alone, mut fixed) = (vec![0.0; valid.paths], vec![0.0; valid.paths]);
        for (asset, (position, ratio)) in positions.iter().zip(&ratios).enumerate() {
            let last = |path: &[f32]| f64::from(path[valid.steps]) - f64::from(path[0]);
            for (i, (spot, futures)) in valid.of(&valid.spot, asset).zip(valid.of(&valid.futures, asset)).enumerate() {
                alone[i] += position * last(spot);
                fixed[i] += position * (last(spot) - ratio * last(futures));
            }
        }
        HedgeReport {
            train: Vec::new(),
            valid: Vec::new(),
            hedged_sd: f64::NAN,
            baseline_sd: f64::NAN,
            unhedged_sd: moments(&alone).1.sqrt(),
            static_sd: moments(&fixed).1.sqrt(),
            static_ratio: ratios,
            effectiveness: f64::NAN,
            cost: 0.0,
            turnover: 0.0,
        }
    }
}
