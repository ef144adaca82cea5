//! Rollouts of neural hedging policies, and risk measures of what they earn.

use super::{need, optional, wrong};
use crate::kernels::hedge_rollout::{self, Claim, HedgeRollout, HedgeRolloutArgs, Spot};
use crate::kernels::map::{self, Unary};
use crate::kernels::objective::Goal;
use crate::kernels::paths::PathSource;
use crate::kernels::{Device, Pass, View};
use crate::ops::ObjectiveOptions;
use crate::tape::{Backward, Forward, Function, Keeps, Tape, Var};
use crate::{Error, Result};

/// Prices of a rollout.
#[derive(Debug, Clone)]
pub enum RolloutSpot {
    /// Prices of what is traded [P,T+1].
    Given(Var),
    /// Drawn on the device, forward and once more backward: memory for 8,192 paths at most, however many there are.
    Simulated(PathSource),
}

/// Tensors of a rollout.
#[derive(Debug, Clone)]
pub struct RolloutInputs {
    /// [M,W], W and its order as [`HedgeRollout::weights`] says.
    pub weights: Var,
    /// [M,4]: cost as a share of value, half-spread in price, cost of a trade, risk aversion.
    pub risk: Var,
    /// Prices of what is traded.
    pub spot: RolloutSpot,
    /// [P,T,E], known at each step: given baseline and width, then features.
    pub extra: Option<Var>,
    /// What is owed at maturity [P], for [`Claim::Given`].
    pub claim: Option<Var>,
}

/// A risk of P&L, small where it is good.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum HedgeRisk {
    /// Variance, divisor n − 1.
    Variance,
    /// ½·aversion·variance − mean.
    MeanVariance {
        /// At least 0.
        risk_aversion: f64,
    },
    /// Mean loss of the worst α, exact tail with its fractional weight (Rockafellar, Uryasev 2000).
    Cvar {
        /// In (0, 1].
        alpha: f64,
    },
    /// ln(mean e^(−a·pnl)) / a.
    Entropic {
        /// a, above 0.
        risk_aversion: f64,
    },
    /// inf over w of w + λ·√(mean max(−pnl − w, 0)²) (Buehler et al. 2019; Krokhmal 2007).
    QuadraticCvar {
        /// λ, above 1.
        lambda: f64,
    },
}

struct RolloutOp {
    op: HedgeRollout,
    source: Option<PathSource>,
}

const NAME: &str = "hedge_rollout";

impl RolloutOp {
    fn args<'a>(&'a self, inputs: &'a [Option<View>], slab: &'a View) -> Result<HedgeRolloutArgs<'a>> {
        let spot = match &self.source {
            Some(source) => Spot::Simulated(source, slab),
            None => Spot::Given(need(inputs, 2, NAME)?),
        };
        let (extra, claim) = (optional(inputs, 3), optional(inputs, 4));
        Ok(HedgeRolloutArgs { weights: need(inputs, 0, NAME)?, risk: need(inputs, 1, NAME)?, spot, extra, claim })
    }

    /// Reals that simulated prices take.
    fn slab(&self, device: &Device) -> u64 {
        if self.source.is_some() { self.op.slab(device).unwrap_or(1) } else { 1 }
    }
}

impl Function for RolloutOp {
    fn name(&self) -> &'static str {
        NAME
    }
    fn shapes(&self) -> Vec<Vec<usize>> {
        let (m, p) = (self.op.models as usize, self.op.paths as usize);
        vec![vec![m, p], vec![m, p, 2]]
    }
    fn scratch(&self, device: &Device) -> Vec<u64> {
        vec![self.op.scratch(device).unwrap_or(1), self.slab(device)]
    }
    fn scratch_backward(&self, device: &Device) -> Vec<u64> {
        let [scratch, partials] = self.op.scratch_backward(device).unwrap_or([1, 1]);
        vec![scratch, partials, 2 * self.op.models * self.op.paths, self.slab(device)]
    }
    fn keeps(&self) -> Keeps {
        Keeps { inputs: 0b1_1111, outputs: 0 }
    }
    fn forward(&self, pass: &mut Pass, io: &Forward<'_>) -> Result<()> {
        let [scratch, slab] = io.scratch else { return Err(Error::Internal("a rollout has no scratch".into())) };
        hedge_rollout::hedge_rollout(pass, &self.op, &self.args(io.inputs, slab)?, need(io.outputs, 0, NAME)?, need(io.outputs, 1, NAME)?, scratch)
    }
    fn backward(&self, pass: &mut Pass, io: &Backward<'_>) -> Result<()> {
        let [scratch, partials, none, slab] = io.scratch else { return Err(Error::Internal("a rollout has no scratch".into())) };
        let n = self.op.models * self.op.paths;
        if n > 0 && (optional(io.grad_outputs, 0).is_none() || optional(io.grad_outputs, 1).is_none()) {
            map::fill(pass, 0.0, none)?;
        }
        let half = none.part(0..n);
        let grads = [optional(io.grad_outputs, 0).unwrap_or(&half), optional(io.grad_outputs, 1).unwrap_or(none)];
        hedge_rollout::hedge_rollout_backward(pass, &self.op, &self.args(io.inputs, slab)?, grads, need(io.grad_inputs, 0, NAME)?, [scratch, partials])
    }
}

impl Tape {
    /// Rolls policies out over paths: P&L [M,P], and costs [M,P,2] (cost in cash, turnover in units). Gradients flow to the weights alone.
    /// h[t] depends on prices and extra values up to t.
    /// # Errors
    /// `Shape` naming the argument, also for one beside the weights that needs a gradient; `Parameter` for an option outside its range;
    /// `TooLarge` for a path beyond the device.
    pub fn hedge_rollout(&mut self, op: &HedgeRollout, inputs: &RolloutInputs) -> Result<[Var; 2]> {
        op.check()?;
        let [m, p, t] = [op.models, op.paths, op.steps].map(|n| n as usize);
        self.expect(NAME, "weights", inputs.weights, &[m, op.weights() as usize])?;
        self.expect(NAME, "risk", inputs.risk, &[m, 4])?;
        let (spot, source) = match &inputs.spot {
            RolloutSpot::Given(spot) => (Some(*spot), None),
            RolloutSpot::Simulated(source) => (None, Some(source.clone())),
        };
        if let Some(spot) = spot {
            self.expect(NAME, "spot", spot, &[p, t + 1])?;
        }
        if source.is_some() && op.ragged {
            return Err(wrong(NAME, "spot", "given prices: drawn ones all have T steps", &[p, t + 1]));
        }
        if let Some(source) = source.as_ref().filter(|source| source.steps() != op.steps) {
            return Err(wrong(NAME, "spot", format!("a source of {t} steps"), &[source.steps() as usize]));
        }
        let columns = op.columns() as usize;
        let given = [("extra", inputs.extra, columns > 0, vec![p, t, columns]), ("claim", inputs.claim, op.claim == Claim::Given, vec![p])];
        for (name, x, wanted, shape) in given {
            match x {
                Some(x) if wanted => self.expect(NAME, name, x, &shape)?,
                None if !wanted => {}
                Some(x) => return Err(wrong(NAME, name, "none: this policy reads no such tensor", self.shape(x))),
                None => return Err(wrong(NAME, name, format!("{shape:?}"), &[])),
            }
        }
        for (name, x) in [("risk", Some(inputs.risk)), ("spot", spot), ("extra", inputs.extra), ("claim", inputs.claim)] {
            if let Some(x) = x.filter(|&x| self.needs_grad(x)) {
                return Err(wrong(NAME, name, "a tensor without gradient: detach it", self.shape(x)));
            }
        }
        op.scratch(self.device())?;
        op.scratch_backward(self.device())?;
        if source.is_some() {
            op.slab(self.device())?;
        }
        let all = [Some(inputs.weights), Some(inputs.risk), spot, inputs.extra, inputs.claim];
        match self.apply(RolloutOp { op: op.clone(), source }, &all)?[..] {
            [pnl, costs] => Ok([pnl, costs]),
            _ => Err(Error::Internal("a rollout has two outputs".into())),
        }
    }

    /// Risk of each row of P&L [M,P]: [M], in the unit of P&L (variance: its square). The threshold of [`HedgeRisk::QuadraticCvar`] is found by 40
    /// halvings and then held, which leaves the gradient exact.
    /// # Errors
    /// `Shape` for another number of axes, or fewer than two paths where there is a variance; `Parameter` for an option outside its range.
    pub fn hedge_risk(&mut self, risk: HedgeRisk, pnl: Var) -> Result<Var> {
        const OP: &str = "hedge_risk";
        let [m, p] = self.axes(OP, "pnl", pnl, "[M,P]")?;
        let refuse = |name: &str, value: f64, help: &str| Err(Error::Parameter { op: OP, name: name.into(), value: value.to_string(), help: help.into() });
        if p < 2 && !matches!(risk, HedgeRisk::Cvar { .. } | HedgeRisk::Entropic { .. }) || p == 0 {
            return Err(wrong(OP, "pnl", "at least two paths", &[m, p]));
        }
        match risk {
            HedgeRisk::Variance => self.variance(pnl, m, p),
            HedgeRisk::MeanVariance { risk_aversion } => {
                if !(risk_aversion.is_finite() && risk_aversion >= 0.0) {
                    return refuse("risk_aversion", risk_aversion, "give a finite value, at least 0");
                }
                let (variance, mean) = (self.variance(pnl, m, p)?, self.mean(pnl, &[1])?);
                let variance = self.affine(variance, 0.5 * risk_aversion as f32, 0.0)?;
                self.sub(variance, mean)
            }
            HedgeRisk::Cvar { alpha } => {
                if !(alpha > 0.0 && alpha <= 1.0) {
                    return refuse("alpha", alpha, "give a share of the paths in (0, 1]");
                }
                self.objective(Goal::Cvar { alpha }, pnl, ObjectiveOptions::default())
            }
            HedgeRisk::Entropic { risk_aversion: a } => {
                if !(a.is_finite() && a > 0.0) {
                    return refuse("risk_aversion", a, "give a finite value above 0");
                }
                let x = self.affine(pnl, -a as f32, 0.0)?;
                let top = self.no_grad(|tape| tape.max(x, &[1]))?;
                let top = self.detach(top)?;
                let column = self.reshape(top, &[m, 1])?;
                let x = self.sub(x, column)?;
                let x = self.unary(Unary::Exp, x)?;
                let x = self.mean(x, &[1])?;
                let x = self.unary(Unary::Log, x)?;
                let x = self.add(x, top)?;
                self.affine(x, (1.0 / a) as f32, 0.0)
            }
            HedgeRisk::QuadraticCvar { lambda } => {
                if !(lambda.is_finite() && lambda > 1.0) {
                    return refuse("lambda", lambda, "give a finite value above 1");
                }
                let loss = self.affine(pnl, -1.0, 0.0)?;
                // Fewer paths than λ²: the threshold is the largest loss.
                if lambda * lambda >= p as f64 {
                    return self.max(loss, &[1]);
                }
                let held = self.detach(loss)?;
                let threshold = self.no_grad(|tape| tape.quadratic_threshold(held, m, lambda))?;
                let threshold = self.detach(threshold)?;
                let column = self.reshape(threshold, &[m, 1])?;
                let excess = self.sub(loss, column)?;
                let excess = self.unary(Unary::Relu, excess)?;
                let squares = self.unary(Unary::Square, excess)?;
                let squares = self.mean(squares, &[1])?;
                // No loss above the threshold: a root with a finite slope.
                let squares = self.affine(squares, 1.0, 1e-20)?;
                let root = self.unary(Unary::Sqrt, squares)?;
                let root = self.affine(root, lambda as f32, 0.0)?;
                self.add(threshold, root)
            }
        }
    }

    fn variance(&mut self, x: Var, m: usize, p: usize) -> Result<Var> {
        let mean = self.mean(x, &[1])?;
        let mean = self.reshape(mean, &[m, 1])?;
        let off = self.sub(x, mean)?;
        let squares = self.unary(Unary::Square, off)?;
        let sum = self.sum(squares, &[1])?;
        self.affine(sum, 1.0 / (p as f32 - 1.0), 0.0)
    }

    /// w with λ·mean max(L − w, 0) = √(mean max(L − w, 0)²): the left side is the smaller one above it. Between the largest loss and that less the
    /// range of losses times λ / (λ − 1).
    fn quadratic_threshold(&mut self, loss: Var, m: usize, lambda: f64) -> Result<Var> {
        let top = self.max(loss, &[1])?;
        let gain = self.affine(loss, -1.0, 0.0)?;
        let bottom = self.max(gain, &[1])?;
        let span = self.add(top, bottom)?;
        let mut width = self.affine(span, (lambda / (lambda - 1.0)) as f32, 0.0)?;
        let mut low = self.sub(top, width)?;
        for _ in 0..40 {
            width = self.affine(width, 0.5, 0.0)?;
            let middle = self.add(low, width)?;
            let column = self.reshape(middle, &[m, 1])?;
            let excess = self.sub(loss, column)?;
            let excess = self.unary(Unary::Relu, excess)?;
            let mean = self.mean(excess, &[1])?;
            let squares = self.unary(Unary::Square, excess)?;
            let squares = self.mean(squares, &[1])?;
            let left = self.unary(Unary::Square, mean)?;
            let left = self.affine(left, (lambda * lambda) as f32, 0.0)?;
            let ahead = self.sub(left, squares)?;
            // 1 where the threshold lies above the middle.
            let up = self.unary(Unary::Step, ahead)?;
            let move_by = self.mul(up, width)?;
            low = self.add(low, move_by)?;
        }
        Ok(low)
    }
}
