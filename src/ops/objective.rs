//! Objectives of returns, one value per series, and the returns that positions earn after costs.

use super::{need, optional, wrong};
use crate::kernels::kernel::Elem;
use crate::kernels::map::Unary;
use crate::kernels::objective::{self, Goal, NetReturns, Objective, Series};
use crate::kernels::{Device, Pass, View};
use crate::tape::{Backward, Forward, Function, Keeps, Tape, Var};
use crate::{Error, Result};

/// How an objective is scaled, and which bars it sees.
#[derive(Debug, Clone, Copy)]
pub struct ObjectiveOptions {
    /// A, return periods per year: 252 unless given.
    pub periods_per_year: f64,
    /// Floor of the ratios' denominators per period, which keeps values and gradients finite without risk: 1e-5 unless given; 0 leaves such
    /// ratios undefined (−1e30, gradient 0).
    pub floor: f64,
    /// Bars of each series, words [M,…], or […] or [1,…] where the models share them; what lies past them is not read and has gradient 0, and a
    /// series without bars is undefined.
    pub lengths: Option<Var>,
}

impl Default for ObjectiveOptions {
    fn default() -> ObjectiveOptions {
        ObjectiveOptions { periods_per_year: 252.0, floor: 1e-5, lengths: None }
    }
}

struct ObjectiveOp {
    op: Objective,
    shape: Vec<usize>,
}

const NAME: &str = "objective";

fn series(inputs: &[Option<View>]) -> Result<Series<'_>> {
    Ok(Series { returns: need(inputs, 0, NAME)?, lengths: optional(inputs, 1) })
}

impl Function for ObjectiveOp {
    fn name(&self) -> &'static str {
        NAME
    }
    fn shapes(&self) -> Vec<Vec<usize>> {
        vec![self.shape.clone()]
    }
    fn saved(&self) -> Option<(Elem, u64)> {
        Some((Elem::F32, self.op.saved()))
    }
    fn scratch(&self, _: &Device) -> Vec<u64> {
        vec![self.op.state()]
    }
    fn keeps(&self) -> Keeps {
        Keeps { inputs: 0b11, outputs: 0 }
    }
    fn forward(&self, pass: &mut Pass, io: &Forward<'_>) -> Result<()> {
        let (Some(coefficients), [state]) = (io.saved, io.scratch) else { return Err(Error::Internal("an objective has no memory".into())) };
        objective::objective(pass, &self.op, series(io.inputs)?, need(io.outputs, 0, NAME)?, coefficients, state)
    }
    fn backward(&self, pass: &mut Pass, io: &Backward<'_>) -> Result<()> {
        let coefficients = io.saved.ok_or_else(|| Error::Internal("an objective has no memory".into()))?;
        let (grad_value, grad_returns) = (need(io.grad_outputs, 0, NAME)?, need(io.grad_inputs, 0, NAME)?);
        objective::objective_backward(pass, &self.op, series(io.inputs)?, coefficients, grad_value, grad_returns)
    }
}

struct NetReturnsOp {
    op: NetReturns,
    shape: Vec<usize>,
}

const NET: &str = "net_returns";

impl Function for NetReturnsOp {
    fn name(&self) -> &'static str {
        NET
    }
    fn shapes(&self) -> Vec<Vec<usize>> {
        vec![self.shape.clone()]
    }
    fn keeps(&self) -> Keeps {
        Keeps { inputs: 0b11, outputs: 0 }
    }
    fn forward(&self, pass: &mut Pass, io: &Forward<'_>) -> Result<()> {
        objective::net_returns(pass, &self.op, need(io.inputs, 0, NET)?, need(io.inputs, 1, NET)?, need(io.outputs, 0, NET)?)
    }
    fn backward(&self, pass: &mut Pass, io: &Backward<'_>) -> Result<()> {
        let (positions, asset_returns) = (need(io.inputs, 0, NET)?, need(io.inputs, 1, NET)?);
        let (grad_returns, grad_positions) = (need(io.grad_outputs, 0, NET)?, need(io.grad_inputs, 0, NET)?);
        objective::net_returns_backward(pass, &self.op, positions, asset_returns, grad_returns, grad_positions)
    }
}

impl Tape {
    /// The objective of each series of simple returns per period: returns [M,…,T] to [M,…]; one value per model for [M,T]. Values are as their
    /// [`Goal`] says: ratios and growth to make large (a loss is their negative), risks to make small. The whole series counts: nothing here is
    /// causal.
    /// # Errors
    /// `Shape` for a tensor without axes or without bars; `Parameter` for an option outside its range.
    pub fn objective(&mut self, goal: Goal, returns: Var, options: ObjectiveOptions) -> Result<Var> {
        let ObjectiveOptions { periods_per_year, floor, lengths } = options;
        let shape = self.shape(returns).to_vec();
        let Some((&bars, outer)) = shape.split_last().filter(|&(&bars, _)| bars > 0) else {
            return Err(wrong(NAME, "returns", "[M,…,T] with at least one bar", &shape));
        };
        let op = Objective { goal, rows: outer.iter().product::<usize>() as u64, bars: bars as u64, periods_per_year, floor };
        op.check()?;
        if let Some(lengths) = lengths {
            self.expect_rows(NAME, "lengths", lengths, outer)?;
        }
        self.one(ObjectiveOp { op, shape: outer.to_vec() }, &[Some(returns), lengths])
    }

    /// Returns that positions earn after costs: r[t] = p[t]·y[t] − cost·|p[t] − p[t−1]|, flat before the first bar, so that an objective of them
    /// charges turnover. positions [M,…,T], asset_returns [M or 1,…,T] (no gradient); `cost` one way, as a share: 0.0005 is five basis points.
    /// p[t] must have been decided before bar t.
    /// # Errors
    /// `Shape` naming the argument; `Parameter` for a negative cost.
    pub fn net_returns(&mut self, positions: Var, asset_returns: Var, cost: f64) -> Result<Var> {
        let shape = self.shape(positions).to_vec();
        let Some((&bars, outer)) = shape.split_last().filter(|&(&bars, _)| bars > 0) else {
            return Err(wrong(NET, "positions", "[M,…,T] with at least one bar", &shape));
        };
        let given = self.shape(asset_returns);
        let one_for_all = shape.len() > 1 && given.first() == Some(&1) && given.get(1..) == Some(&shape[1..]);
        if given != shape && !one_for_all {
            return Err(wrong(NET, "asset_returns", format!("{shape:?}, or 1 for the models"), given));
        }
        if self.needs_grad(asset_returns) {
            return Err(wrong(NET, "asset_returns", "a tensor without gradient: detach it", given));
        }
        let op = NetReturns { rows: outer.iter().product::<usize>() as u64, bars: bars as u64, cost };
        op.check()?;
        self.one(NetReturnsOp { op, shape }, &[Some(positions), Some(asset_returns)])
    }

    /// How far portfolios are from their risk budgets: Σ_i (s_i − b_i)² with the shares of risk s_i = w_i·(Σw)_i/(w·Σw + floor²), for weights
    /// [M,…,N], covariance [M or 1,…,N,N] (its axes before the last two repeat where they are 1) and budgets [N] that sum to one, equal unless
    /// given: to [M,…]. Both have gradients. Shares do not change with the scale of w or Σ; `floor`, a deviation of the portfolio per period,
    /// keeps them finite where it has no risk, and the shares are then 0. Maillard, Roncalli, Teiletche 2010.
    /// # Errors
    /// `Shape` naming the argument; `Parameter` for a floor that is negative or no number.
    pub fn risk_parity(&mut self, weights: Var, covariance: Var, budgets: Option<Var>, floor: f64) -> Result<Var> {
        const OP: &str = "risk_parity";
        if !(floor.is_finite() && floor >= 0.0) {
            let help = "give a finite number, at least 0".into();
            return Err(Error::Parameter { op: OP, name: "floor".into(), value: floor.to_string(), help });
        }
        let shape = self.shape(weights).to_vec();
        let Some((&n, outer)) = shape.split_last().filter(|&(&n, _)| n > 0) else {
            return Err(wrong(OP, "weights", "[M,…,N] with at least one asset", &shape));
        };
        let repeats = |given: &[usize]| given.len() == shape.len() + 1 && given.iter().zip(outer).all(|(a, b)| a == b || *a == 1);
        let given = self.shape(covariance);
        if !repeats(given) || given[outer.len()..] != [n, n] {
            return Err(wrong(OP, "covariance", format!("{outer:?} or ones, then [{n}, {n}]"), given));
        }
        let mut row = outer.to_vec();
        row.extend([1, n]);
        let row = self.reshape(weights, &row)?;
        let product = self.mul(covariance, row)?;
        let marginal = self.sum(product, &[outer.len() + 1])?;
        let parts = self.mul(weights, marginal)?;
        let variance = self.sum(parts, &[outer.len()])?;
        let mut column = outer.to_vec();
        column.push(1);
        let variance = self.reshape(variance, &column)?;
        let variance = self.affine(variance, 1.0, (floor * floor) as f32)?;
        let shares = self.div(parts, variance)?;
        let off = match budgets {
            Some(budgets) => {
                self.expect(OP, "budgets", budgets, &[n])?;
                self.sub(shares, budgets)?
            }
            None => self.affine(shares, 1.0, -(1.0 / n as f32))?,
        };
        let squares = self.unary(Unary::Square, off)?;
        self.sum(squares, &[outer.len()])
    }
}
