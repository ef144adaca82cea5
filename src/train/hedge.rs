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
    /// Decides how the weights start.
    pub seed: u64,
}

impl Default for HedgeTrainConfig {
    fn default() -> HedgeTrainConfig {
        HedgeTrainConfig { risk: HedgeRisk::Variance, learning_rate: vec![1e-3], weight_decay: 0.0, max_grad_norm: Some(1.0), seed: 0 }
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
            let [pnl, _] = build(&mut tape)?;
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

    /// Writes a batch: prices [P,T+1], extra [P,T,E] and claims [P] where the policy has them.
    /// # Errors
    /// `Shape` for another length; `NonFinite` as `Parameter` for a price that is not a finite number above 0.
    pub fn write(&self, spot: &[f32], extra: &[f32], claim: &[f32]) -> Result<()> {
        if let Some(i) = spot.iter().position(|s| !(s.is_finite() && *s > 0.0)) {
            let help = "give finite prices above 0".into();
            return Err(Error::Parameter { op: OP, name: format!("spot[{i}]"), value: spot[i].to_string(), help });
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

// ---- hedges of a position by a future -------------------------------------------------------------------------------------------

/// Paths of what is held and of what hedges it, with filtered probabilities.
#[derive(Debug, Clone, PartialEq)]
pub struct HedgeWorld {
    /// P.
    pub paths: usize,
    /// T.
    pub steps: usize,
    /// Prices of what is held [P,T+1].
    pub spot: Vec<f32>,
    /// Prices of the hedge instrument [P,T+1].
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
        let (p, t) = (self.paths, self.steps);
        for (name, values, len) in [("spot", &self.spot, p * (t + 1)), ("futures", &self.futures, p * (t + 1)), ("probs", &self.probs, p * t * self.regimes)] {
            if values.len() != len {
                let got = format!("{} values", values.len());
                return Err(Error::Shape { op: OP, arg: name.into(), expected: format!("{len} values"), got });
            }
            if let Some(i) = values.iter().position(|x| !x.is_finite() || name != "probs" && *x <= 0.0) {
                let help = "give finite prices above 0, and finite probabilities".into();
                return Err(Error::Parameter { op: OP, name: format!("{name}[{i}]"), value: values[i].to_string(), help });
            }
        }
        if p < 2 || t == 0 || self.regimes == 0 {
            let got = format!("{p} paths, {t} steps, {} regimes", self.regimes);
            return Err(Error::Shape { op: OP, arg: "world".into(), expected: "two paths, a step, a regime".into(), got });
        }
        Ok(())
    }

    /// What a position of `position` units owes at the end of each path: −q·(S_T − S_0).
    pub fn claims(&self, position: f64) -> Vec<f32> {
        self.spot.chunks_exact(self.steps + 1).map(|s| (-position * f64::from(s[self.steps] - s[0])) as f32).collect()
    }

    /// The paths of a range.
    pub fn part(&self, range: std::ops::Range<usize>) -> HedgeWorld {
        let rows = |x: &[f32], each: usize| x[range.start * each..range.end * each].to_vec();
        let (t, k) = (self.steps, self.regimes);
        HedgeWorld { paths: range.len(), spot: rows(&self.spot, t + 1), futures: rows(&self.futures, t + 1), probs: rows(&self.probs, t * k), ..*self }
    }
}

/// A hedger of one position by one instrument: its policy, and what it reads at each step.
pub trait DeltaHedger {
    /// The network; its features are those of [`DeltaHedger::features`].
    fn policy(&self) -> HedgePolicy;
    /// Adds the hedge before any training, in units of the instrument, and the features: from the probabilities [K] of a step.
    fn features(&self, probs: &[f32], out: &mut Vec<f32>);
}

/// A policy over paths whose baseline mixes a hedge of each regime: Σ_k p_k·h_k, or its average over the regimes expected some steps ahead. Every hedger
/// of [`crate::nn::hedge`] has one, by [`RegimeHedge::of`] and its neighbours.
#[derive(Debug, Clone)]
pub struct RegimeHedge {
    /// The network.
    pub policy: HedgePolicy,
    /// Hedge in each regime [K], with its sign: −q·β_k hedges q units of the spot.
    pub hedges: Vec<f64>,
    /// Transition probabilities [K,K] and steps ahead L: the baseline then averages p, p·A, …, p·A^L, which are the features.
    pub ahead: Option<(Vec<f64>, usize)>,
}

impl RegimeHedge {
    /// A dense policy, as [`RegimeDeltaHedger`] and the spot leg of [`DynamicDeltaHedger`] have.
    pub fn of(hedger: &RegimeDeltaHedger, hedges: Vec<f64>) -> RegimeHedge {
        RegimeHedge::dense(hedger.hidden, Head::Residual, hedger.range, hedges)
    }

    /// The spot leg of a delta hedger: there is one instrument.
    pub fn of_dynamic(hedger: &DynamicDeltaHedger, hedges: Vec<f64>) -> RegimeHedge {
        RegimeHedge::dense(hedger.hidden, Head::Residual, hedger.range, hedges)
    }

    /// The policy of an LSTM hedger.
    pub fn of_lstm(hedger: &LstmDeltaHedger, hedges: Vec<f64>) -> RegimeHedge {
        let policy = HedgePolicy { features: hedges.len(), ..hedger.policy.clone() };
        RegimeHedge { policy, hedges, ahead: None }
    }

    /// A band around the mixture, as wide as its net says.
    pub fn of_band(hedger: &TransactionCostAwareHedger, hedges: Vec<f64>) -> RegimeHedge {
        RegimeHedge::dense(hedger.hidden, Head::Band, hedger.range, hedges)
    }

    /// The mixture over the regimes expected ahead.
    pub fn of_transitions(hedger: &TransitionAwareHedger, transition: Vec<f64>, hedges: Vec<f64>) -> RegimeHedge {
        let mut own = RegimeHedge::dense(hedger.hidden, Head::Residual, hedger.range, hedges);
        own.policy.features = own.hedges.len() * (hedger.lookahead + 1);
        own.ahead = Some((transition, hedger.lookahead));
        own
    }

    fn dense(hidden: usize, head: Head, range: f64, hedges: Vec<f64>) -> RegimeHedge {
        let network = Network::Mlp { widths: vec![hidden], activation: Activation::Tanh };
        RegimeHedge { policy: HedgePolicy { prefix: "hedge".into(), network, head, features: hedges.len(), range, lookback: 0 }, hedges, ahead: None }
    }
}

impl DeltaHedger for RegimeHedge {
    fn policy(&self) -> HedgePolicy {
        self.policy.clone()
    }

    fn features(&self, probs: &[f32], out: &mut Vec<f32>) {
        let k = self.hedges.len();
        let none = (Vec::new(), 0);
        let (transition, steps) = self.ahead.as_ref().unwrap_or(&none);
        let mut now: Vec<f64> = probs.iter().map(|&p| f64::from(p)).collect();
        let mut ahead = now.clone();
        for _ in 0..*steps {
            now = (0..k).map(|j| now.iter().enumerate().map(|(i, p)| p * transition[i * k + j]).sum()).collect();
            ahead.extend_from_slice(&now);
        }
        let base: f64 = ahead.chunks_exact(k).flat_map(|p| p.iter().zip(&self.hedges)).map(|(p, h)| p * h).sum();
        out.push((base / (*steps as f64 + 1.0)) as f32);
        out.extend(ahead.iter().map(|&p| p as f32));
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
    /// Units held.
    pub position: f64,
}

impl Default for HedgeEpochs {
    fn default() -> HedgeEpochs {
        HedgeEpochs { epochs: 50, batch: 256, patience: 10, position: 1.0 }
    }
}

/// What training gave, out of sample.
#[derive(Debug, Clone, PartialEq)]
pub struct HedgeReport {
    /// Mean training risk of each epoch.
    pub train: Vec<f64>,
    /// Validation risk after each epoch: variance of P&L.
    pub valid: Vec<f64>,
    /// Standard deviation of what the hedged position earns on the validation paths.
    pub hedged_sd: f64,
    /// That of the position alone.
    pub unhedged_sd: f64,
    /// That of the hedge by the least-squares ratio of the training steps.
    pub static_sd: f64,
    /// That least-squares ratio.
    pub static_ratio: f64,
    /// 1 − hedged variance / unhedged variance.
    pub effectiveness: f64,
    /// Mean cost and units traded a path.
    pub cost: f64,
    /// Units traded a path.
    pub turnover: f64,
}

/// Trains a hedger of `position` units of the spot by the instrument; `train` and `valid` are different times. The weights with the best validation
/// variance are kept.
/// # Errors
/// Those of [`HedgeWorld::check`] and [`HedgeTrainer::new`].
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
    if valid.steps != train.steps || valid.regimes != train.regimes {
        let got = format!("{} steps, {} regimes", valid.steps, valid.regimes);
        return Err(Error::Shape { op: OP, arg: "valid".into(), expected: format!("{} steps, {} regimes", train.steps, train.regimes), got });
    }
    let (policy, batch) = (hedger.policy(), epochs.batch.clamp(2, train.paths));
    let strike = f64::from(train.futures.iter().step_by(train.steps + 1).sum::<f32>()) / train.paths as f64;
    let op = |paths: usize| HedgeRollout { strike, baseline: Baseline::Given, claim: Claim::Given, ..policy.rollout(1, paths, train.steps) };
    if op(batch).columns() as usize != row_of(hedger, train, 0).len() || policy.head == Head::WhalleyWilmott {
        let help = "give one hedge and the policy's features, and a head without a width of its own".into();
        return Err(Error::Parameter { op: OP, name: "features".into(), value: row_of(hedger, train, 0).len().to_string(), help });
    }
    let trainer = HedgeTrainer::new(device, &policy, &op(batch), &[costs], config)?;
    let judge = HedgeTrainer::new(device, &policy, &op(valid.paths), &[costs], config)?;
    judge.write(&valid.futures, &extra_of(hedger, valid), &valid.claims(epochs.position))?;
    let names: Vec<String> = trainer.parameters().tensors().iter().map(|tensor| tensor.name.clone()).collect();
    let copy = |from: &Parameters, to: &Parameters| names.iter().try_for_each(|name| to.set(name, &from.get(name)?));
    let (mut report, mut best) = (HedgeReport::new(train, valid, epochs.position), f64::INFINITY);
    let best_of = Parameters::new(device, 1, &declared_of(&policy), config.seed)?;
    let mut waited = 0;
    for epoch in 0..epochs.epochs {
        let mut total = 0.0;
        let rounds = train.paths / batch;
        for i in 0..rounds {
            // Another start each epoch: batches differ.
            let from = (i * batch + epoch * batch / 3) % (train.paths - batch + 1);
            let part = train.part(from..from + batch);
            trainer.write(&part.futures, &extra_of(hedger, &part), &part.claims(epochs.position))?;
            total += trainer.step()?.first().copied().unwrap_or(f64::NAN);
        }
        copy(trainer.parameters(), judge.parameters())?;
        let variance = moments(&judge.score()?.pnl).1;
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
    report.hedged_sd = moments(&score.pnl).1.sqrt();
    report.effectiveness = 1.0 - (report.hedged_sd / report.unhedged_sd).powi(2);
    (report.cost, report.turnover) = (moments(&score.cost).0, moments(&score.turnover).0);
    Ok((best_of, report))
}

fn declared_of(policy: &HedgePolicy) -> Declared {
    let mut declared = Declared::new();
    policy.declare(&mut declared);
    declared
}

fn row_of(hedger: &dyn DeltaHedger, world: &HedgeWorld, row: usize) -> Vec<f32> {
    let mut out = Vec::new();
    hedger.features(&world.probs[row * world.regimes..(row + 1) * world.regimes], &mut out);
    out
}

fn extra_of(hedger: &dyn DeltaHedger, world: &HedgeWorld) -> Vec<f32> {
    let mut out = Vec::new();
    world.probs.chunks_exact(world.regimes).for_each(|probs| hedger.features(probs, &mut out));
    out
}

/// Mean and variance, divisor n − 1.
fn moments(x: &[f64]) -> (f64, f64) {
    let n = x.len() as f64;
    let mean = x.iter().sum::<f64>() / n;
    (mean, x.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / (n - 1.0).max(1.0))
}

impl HedgeReport {
    /// What can be said before training.
    fn new(train: &HedgeWorld, valid: &HedgeWorld, position: f64) -> HedgeReport {
        let changes = |prices: &[f32], steps: usize| -> Vec<f64> {
            prices.chunks_exact(steps + 1).flat_map(|path| path.windows(2).map(|w| f64::from(w[1]) - f64::from(w[0]))).collect()
        };
        let (ds, df) = (changes(&train.spot, train.steps), changes(&train.futures, train.steps));
        let ((mean_s, _), (mean_f, variance)) = (moments(&ds), moments(&df));
        let covariance = ds.iter().zip(&df).map(|(s, f)| (s - mean_s) * (f - mean_f)).sum::<f64>() / (ds.len() as f64 - 1.0).max(1.0);
        let ratio = if variance > 0.0 { covariance / variance } else { 0.0 };
        let last =
            |prices: &[f32]| -> Vec<f64> { prices.chunks_exact(valid.steps + 1).map(|path| f64::from(path[valid.steps]) - f64::from(path[0])).collect() };
        let (spot, futures) = (last(&valid.spot), last(&valid.futures));
        let alone: Vec<f64> = spot.iter().map(|s| position * s).collect();
        let fixed: Vec<f64> = spot.iter().zip(&futures).map(|(s, f)| position * (s - ratio * f)).collect();
        HedgeReport {
            train: Vec::new(),
            valid: Vec::new(),
            hedged_sd: f64::NAN,
            unhedged_sd: moments(&alone).1.sqrt(),
            static_sd: moments(&fixed).1.sqrt(),
            static_ratio: ratio,
            effectiveness: f64::NAN,
            cost: 0.0,
            turnover: 0.0,
        }
    }
}
