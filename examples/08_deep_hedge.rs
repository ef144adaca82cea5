//! Learns to hedge a call where trading costs half a percent, by gradients through the simulation, and compares with Black-Scholes and Whalley-Wilmott.
//!
//!     cargo run --release --example 08_deep_hedge
//!
//! prints for 20,000 paths that training has not seen
//!
//!     policy                        sd   CVaR 5 %   entropic      cost
//!     Black-Scholes delta        0.734      2.986      1.254     1.115
//!     Whalley-Wilmott band       1.233      3.011      0.855     0.499
//!     learned band               1.006      2.660      0.802     0.562
//!     the learned band has the least entropic risk: true

use forback::Device;
use forback::kernels::hedge_rollout::{Head, HedgeRollout};
use forback::kernels::paths::{Draws, Market, Markets, Model, PathSource};
use forback::nn::hedge::HedgePolicy;
use forback::ops::HedgeRisk;
use forback::train::hedge::{HedgeCosts, HedgePnl, HedgeTrainConfig, HedgeTrainer};

const STEPS: usize = 30;
const MATURITY: f64 = 0.25;
const VOLATILITY: f64 = 0.2;
const AVERSION: f64 = 0.5;
/// Seed of the paths that training does not draw.
const UNSEEN: u64 = 1_000_000;

/// sd, CVaR of the worst twentieth, entropic risk, mean cost.
fn figures(score: &HedgePnl) -> [f64; 4] {
    let n = score.pnl.len() as f64;
    let mean = |x: &mut dyn Iterator<Item = f64>| x.sum::<f64>() / n;
    let average = mean(&mut score.pnl.iter().copied());
    let sd = mean(&mut score.pnl.iter().map(|x| (x - average).powi(2))).sqrt();
    let entropic = mean(&mut score.pnl.iter().map(|x| (-AVERSION * x).exp())).ln() / AVERSION;
    let mut sorted = score.pnl.clone();
    sorted.sort_by(f64::total_cmp);
    let tail = sorted.len() / 20;
    [sd, -sorted[..tail].iter().sum::<f64>() / tail as f64, entropic, mean(&mut score.cost.iter().copied())]
}

fn main() -> forback::Result<()> {
    let device = Device::open("cpu")?;
    let market = Market { spot: 100.0, drift: 0.0, model: Model::Gbm { volatility: VOLATILITY }, basis: None };
    let markets = Markets::new("example", &[market], STEPS as u64, MATURITY, &Draws { seed: UNSEEN, ..Draws::default() })?;
    // The premium of Black and Scholes for 100, a quarter and 20 %.
    let option = |head: Head, paths: usize| {
        let policy = HedgePolicy::mlp("hedger", head);
        let op = HedgeRollout { strike: 100.0, maturity: MATURITY, volatility: VOLATILITY, premium: 3.987_761, ..policy.rollout(1, paths, STEPS) };
        (policy, op)
    };
    let costs = [HedgeCosts { risk_aversion: AVERSION, ..HedgeCosts::proportional(0.005) }];
    let config = HedgeTrainConfig { risk: HedgeRisk::Entropic { risk_aversion: AVERSION }, learning_rate: vec![3e-3], ..HedgeTrainConfig::default() };
    let judge = |head: Head| -> forback::Result<HedgeTrainer> {
        let (policy, op) = option(head, 20_000);
        HedgeTrainer::simulated(&device, &policy, &op, PathSource::new(&device, &markets, 0, 0)?, &costs, &config)
    };
    let (policy, op) = option(Head::Band, 4096);
    let trainer = HedgeTrainer::simulated(&device, &policy, &op, PathSource::new(&device, &markets, 0, 0)?, &costs, &config)?;
    for step in 0..200 {
        trainer.draw(step)?;
        trainer.step()?;
    }
    // Untrained policies are exactly the classical ones.
    let (delta, band, learned) = (judge(Head::Residual)?, judge(Head::WhalleyWilmott)?, judge(Head::Band)?);
    for tensor in trainer.parameters().tensors() {
        learned.parameters().set(&tensor.name, &trainer.parameters().get(&tensor.name)?)?;
    }
    println!("{:<22} {:>9} {:>10} {:>10} {:>9}", "policy", "sd", "CVaR 5 %", "entropic", "cost");
    let mut risks = Vec::new();
    for (name, trainer) in [("Black-Scholes delta", &delta), ("Whalley-Wilmott band", &band), ("learned band", &learned)] {
        let [sd, cvar, entropic, cost] = figures(&trainer.score()?);
        println!("{name:<22} {sd:>9.3} {cvar:>10.3} {entropic:>10.3} {cost:>9.3}");
        risks.push(entropic);
    }
    println!("the learned band has the least entropic risk: {}", risks[2] < risks[0] && risks[2] < risks[1]);
    Ok(())
}
