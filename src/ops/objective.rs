//! Objectives of returns, one value per series, and the returns that positions earn after costs.

use super::{need, wrong};
use crate::kernels::kernel::Elem;
use crate::kernels::map::{self, CopyStrided, Layout};
use crate::kernels::objective::{self, Goal, NetReturns, Objective};
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
    /// Bars of each series, words; what lies past them is not read and has gradient 0.
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
        Keeps { inputs: 0b1, outputs: 0 }
    }
    fn forward(&self, pass: &mut Pass, io: &Forward<'_>) -> Result<()> {
        let (Some(coefficients), [state]) = (io.saved, io.scratch) else { return Err(Error::Internal("an objective has no memory".into())) };
        objective::objective(pass, &self.op, need(io.inputs, 0, NAME)?, need(io.outputs, 0, NAME)?, coefficients, state)
    }
    fn backward(&self, pass: &mut Pass, io: &Backward<'_>) -> Result<()> {
        let coefficients = io.saved.ok_or_else(|| Error::Internal("an objective has no memory".into()))?;
        let (returns, grad_value) = (need(io.inputs, 0, NAME)?, need(io.grad_outputs, 0, NAME)?);
        objective::objective_backward(pass, &self.op, returns, coefficients, grad_value, need(io.grad_inputs, 0, NAME)?)
    }
}

struct NetReturnsOp {
    op: NetReturns,
    /// Series of asset returns that the models share; 0 where each has its own.
    shared: u64,
    shape: Vec<usize>,
}

const NET: &str = "net_returns";

impl NetReturnsOp {
    fn room(&self) -> Vec<u64> {
        if self.shared == 0 { Vec::new() } else { vec![self.op.rows * self.op.bars] }
    }

    /// Asset returns of every row.
    fn assets(&self, pass: &mut Pass, given: &View, room: Option<&View>) -> Result<View> {
        let Some(all) = room else { return Ok(given.clone()) };
        let (series, bars) = (self.shared, self.op.bars);
        let dims = map::dims(&[self.op.rows / series, series, bars])?;
        let mut from = Layout::row_major(&dims);
        from.strides[map::RANK - 3] = 0;
        map::copy_strided(pass, &CopyStrided { dims, from, to: Layout::row_major(&dims), add: false }, given, all)?;
        Ok(all.clone())
    }
}

impl Function for NetReturnsOp {
    fn name(&self) -> &'static str {
        NET
    }
    fn shapes(&self) -> Vec<Vec<usize>> {
        vec![self.shape.clone()]
    }
    fn scratch(&self, _: &Device) -> Vec<u64> {
        self.room()
    }
    fn scratch_backward(&self, _: &Device) -> Vec<u64> {
        self.room()
    }
    fn keeps(&self) -> Keeps {
        Keeps { inputs: 0b11, outputs: 0 }
    }
    fn forward(&self, pass: &mut Pass, io: &Forward<'_>) -> Result<()> {
        let assets = self.assets(pass, need(io.inputs, 1, NET)?, io.scratch.first())?;
        objective::net_returns(pass, &self.op, need(io.inputs, 0, NET)?, &assets, need(io.outputs, 0, NET)?)
    }
    fn backward(&self, pass: &mut Pass, io: &Backward<'_>) -> Result<()> {
        let assets = self.assets(pass, need(io.inputs, 1, NET)?, io.scratch.first())?;
        let (positions, grad_returns) = (need(io.inputs, 0, NET)?, need(io.grad_outputs, 0, NET)?);
        objective::net_returns_backward(pass, &self.op, positions, &assets, grad_returns, need(io.grad_inputs, 0, NET)?)
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
            return Err(wrong(NAME, "lengths", "none: series of unequal length are not built", self.shape(lengths)));
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
        let shared = if given == shape { 0 } else { op.rows / shape[0].max(1) as u64 };
        self.one(NetReturnsOp { op, shared, shape }, &[Some(positions), Some(asset_returns)])
    }
}
