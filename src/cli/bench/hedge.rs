//! Hedges over simulated paths.
//!
//! hedge_delta  P 1,000,000 paths × T 252 steps of geometric Brownian motion (volatility 20 % a year, no drift, no rate), short a call at the
//!              money for a year, delta every step at 1 bp: mean, deviation, CVaR 5 % and the other figures of the profit and loss. Nothing
//!              goes up but a row of parameters; paths are drawn, hedged and judged in the timed part.
//! hedge_grid   100 set-ups (delta, Leland, four bands, four risk aversions of Whalley and Wilmott; every or every 5th step; 0, 1, 2, 5,
//!              10 bp) over P 100,000 of these paths: what sharing them saves shows in its rate, beside that of hedge_delta.

use super::{Cost, Prepared, Run, Workload};
use crate::sim::hedge::{Costs, HedgeRequest, HedgedOption, Market, Model, OptionKind, Policy, Position};
use crate::{Device, Error, Result};
use serde_json::{Value, json};

pub(super) static WORKLOADS: [&dyn Workload; 2] =
    [&Hedge { name: "hedge_delta", paths: 1_000_000, grid: false }, &Hedge { name: "hedge_grid", paths: 100_000, grid: true }];

const STEPS: u32 = 252;

struct Hedge {
    name: &'static str,
    paths: u64,
    grid: bool,
}

impl Hedge {
    fn request(&self, seed: u64) -> HedgeRequest {
        let market = Market { name: "gbm".into(), model: Model::Gbm { volatility: 0.2 }, spot: 100.0, drift: 0.0, rate: 0.0, dividend: 0.0 };
        let option = HedgedOption { kind: OptionKind::Call, strike: 100.0, maturity: 1.0, position: Position::Short };
        let plain = HedgeRequest { paths: self.paths, steps: STEPS, seed, costs: vec![Costs::bps(1.0)], ..HedgeRequest::new(market, option) };
        if !self.grid {
            return plain;
        }
        let bands = [0.01, 0.02, 0.05, 0.1].map(|width| Policy::Band { width });
        let aversions = [0.1, 0.5, 1.0, 5.0].map(|risk_aversion| Policy::WhalleyWilmott { risk_aversion });
        HedgeRequest {
            policies: [Policy::Delta, Policy::Leland].into_iter().chain(bands).chain(aversions).collect(),
            rebalance: vec![1, 5],
            costs: [0.0, 1.0, 2.0, 5.0, 10.0].map(Costs::bps).to_vec(),
            ..plain
        }
    }
}

impl Workload for Hedge {
    fn name(&self) -> &'static str {
        self.name
    }

    fn shape(&self) -> Vec<usize> {
        let setups = if self.grid { vec![100] } else { Vec::new() };
        setups.into_iter().chain([self.paths as usize, STEPS as usize]).collect()
    }

    fn unit(&self) -> &'static str {
        if self.grid { "path-steps × set-ups" } else { "path-steps" }
    }

    fn prepare(&self, device: &Device, seed: u64) -> Result<Prepared> {
        let (request, device) = (self.request(seed), device.clone());
        let setups = request.setups().len() as f64;
        let first = request.run(&device, &mut |_, _| Ok(()))?;
        let row = first.rows.first().ok_or_else(|| Error::Internal("no set-up was run".into()))?;
        let says: Vec<(&'static str, Value)> =
            vec![("mean", json!(row.risk.mean)), ("sd", json!(row.risk.sd)), ("cvar", json!(row.risk.cvar)), ("cost", json!(row.risk.cost))];
        let path_steps = self.paths as f64 * f64::from(STEPS);
        // A path: its draws and its price, 45 instructions; a hedge on it: delta, trade and cost, 25.
        let cost = Cost { work: path_steps * setups, bytes: 4.0 * self.paths as f64 * setups, flops: path_steps * (45.0 + 25.0 * setups) };
        let run = move |_: bool| {
            let table = request.run(&device, &mut |_, _| Ok(()))?;
            let check: f64 = table.rows.iter().map(|row| row.risk.mean + row.risk.sd + row.risk.cvar + row.risk.cost).sum();
            if !check.is_finite() {
                return Err(Error::Internal(format!("the bench's results are not finite: {check}")));
            }
            Ok(Run { profile: Vec::new(), check })
        };
        Ok(Prepared { cost, run: Box::new(run), says })
    }
}
