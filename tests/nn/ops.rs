//! Ops of the tape beside those of tape.rs: gradients against finite differences over sizes from one to beyond a workgroup, and their errors.

use super::tape::{Leaf, check, leaf};
use crate::common::{Rng, open};
use forback::kernels::objective::Goal;
use forback::ops::*;
use forback::tape::{Tape, Var};
use forback::{Error, Result};

fn leaves(seed: u32, shapes: &[&[usize]]) -> Vec<Leaf> {
    let mut rng = Rng::new(seed);
    shapes.iter().map(|shape| leaf(&mut rng, shape)).collect()
}

/// The text of a typed error, which has to have these words.
fn refused(result: Result<Var>, words: &[&str]) {
    let text = match result {
        Err(error @ (Error::Shape { .. } | Error::Parameter { .. } | Error::TooLarge { .. })) => error.to_string(),
        other => panic!("{words:?}: {other:?}"),
    };
    assert!(words.iter().all(|word| text.contains(word)), "'{text}' does not say {words:?}");
}

const GOALS: [Goal; 7] = [
    Goal::Sharpe { risk_free: 0.0001 },
    Goal::Sortino { target: 0.001 },
    Goal::Calmar,
    Goal::MaxDrawdown { additive: false },
    Goal::MaxDrawdown { additive: true },
    Goal::Cvar { alpha: 0.3 },
    Goal::MeanVariance { risk_aversion: 3.0 },
];

#[test]
fn gradients_of_objectives() {
    for (i, goal) in GOALS.into_iter().enumerate() {
        for shape in [vec![1, 1], vec![3, 7], vec![2, 3, 13], vec![1, 257], vec![7], vec![0, 5]] {
            let options = ObjectiveOptions { periods_per_year: 12.0, floor: 0.01, ..ObjectiveOptions::default() };
            check(&format!("{goal:?} {shape:?}"), leaves(200 + i as u32, &[&shape]), 1e-4, |tape, x| {
                let returns = tape.affine(x[0], 0.05, 0.002)?;
                Ok(vec![tape.objective(goal, returns, options)?])
            });
        }
    }
}

#[test]
fn gradients_of_net_returns() {
    for (shape, assets) in
        [(vec![1, 1], vec![1, 1]), (vec![2, 3, 5], vec![2, 3, 5]), (vec![3, 2, 7], vec![1, 2, 7]), (vec![2, 131], vec![1, 131]), (vec![5], vec![5])]
    {
        check(&format!("net returns {shape:?} of {assets:?}"), leaves(210, &[&shape]), 2e-5, |tape, x| {
            let mut rng = Rng::new(211);
            let returns: Vec<f32> = (0..assets.iter().product()).map(|_| rng.normal() as f32).collect();
            let returns = tape.input(&tape.device().upload("returns", &returns)?, &assets)?;
            Ok(vec![tape.net_returns(x[0], returns, 0.25)?])
        });
    }
    check("sharpe with turnover", leaves(212, &[&[2, 67]]), 1e-4, |tape, x| {
        let mut rng = Rng::new(213);
        let returns: Vec<f32> = (0..67).map(|_| 0.02 * rng.normal() as f32).collect();
        let returns = tape.input(&tape.device().upload("returns", &returns)?, &[1, 67])?;
        let positions = tape.unary(forback::kernels::map::Unary::Tanh, x[0])?;
        let net = tape.net_returns(positions, returns, 0.001)?;
        Ok(vec![tape.objective(Goal::Sharpe { risk_free: 0.0 }, net, ObjectiveOptions::default())?])
    });
}

#[test]
fn mistakes_with_objectives_are_named() {
    let device = open("cpu").unwrap();
    let mut tape = Tape::new(&device);
    let zeros = |n: u64| device.zeros("zeros", n).unwrap();
    let x = tape.variable(&zeros(12), &[2, 6]).unwrap();
    let (empty, other) = (tape.variable(&zeros(0), &[2, 0]).unwrap(), tape.input(&zeros(10), &[2, 5]).unwrap());
    let goal = Goal::Sharpe { risk_free: 0.0 };
    refused(tape.objective(goal, empty, ObjectiveOptions::default()), &["objective", "returns", "one bar", "[2, 0]"]);
    refused(tape.objective(goal, x, ObjectiveOptions { floor: -1.0, ..Default::default() }), &["objective", "floor"]);
    refused(tape.objective(Goal::Cvar { alpha: 2.0 }, x, ObjectiveOptions::default()), &["alpha"]);
    refused(tape.net_returns(x, other, 0.0), &["net_returns", "asset_returns", "[2, 6]", "[2, 5]"]);
    refused(tape.net_returns(x, x, 0.0), &["asset_returns", "detach"]);
    let y = tape.detach(x).unwrap();
    refused(tape.net_returns(x, y, -0.1), &["cost"]);
}
