//! Ops of the tape beside those of tape.rs: gradients against finite differences over sizes from one to beyond a workgroup, and their errors.

use super::tape::{Leaf, check, leaf};
use crate::common::{Rng, open};
use forback::kernels::activation::Activation;
use forback::kernels::conv1d::Padding;
use forback::kernels::map::Unary;
use forback::kernels::objective::Goal;
use forback::nn::{AttentionPooling, Declared, Module, Parameters, Positions, sinusoids};
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
        let positions = tape.unary(Unary::Tanh, x[0])?;
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

/// Sharpe ratios and the like of ragged series: as those of the series cut to their lengths.
#[test]
fn gradients_of_ragged_objectives() {
    for goal in GOALS {
        for (shape, lengths) in [(vec![2, 3, 9], vec![9, 2, 0]), (vec![4, 140], vec![131, 140, 3, 200]), (vec![2, 2, 5], vec![1, 5, 4, 3])] {
            let rows: Vec<usize> = if lengths.len() == 4 { shape[..shape.len() - 1].to_vec() } else { vec![3] };
            let options = ObjectiveOptions { periods_per_year: 12.0, floor: 0.01, ..ObjectiveOptions::default() };
            let name = format!("{goal:?} {shape:?} of {lengths:?}");
            check(&name, leaves(220, &[&shape]), 1e-4, |tape, x| {
                let words = tape.device().upload_u32("lengths", &lengths)?;
                let lengths = Some(tape.input(&words, &rows)?);
                let returns = tape.affine(x[0], 0.05, 0.002)?;
                let value = tape.objective(goal, returns, ObjectiveOptions { lengths, ..options })?;
                // −1e30, of a series without bars, would drown the others.
                let value = tape.unary(Unary::Clamp { lo: -1e4, hi: 1e4 }, value)?;
                Ok(vec![value])
            });
        }
    }
}

#[test]
fn gradients_of_risk_parity() {
    for (weights, covariance, budgets) in [
        (vec![1, 1], vec![1, 1, 1], false),
        (vec![2, 3], vec![2, 3, 3], false),
        (vec![3, 2, 5], vec![1, 2, 5, 5], true),
        (vec![2, 1, 4], vec![2, 1, 4, 4], true),
        (vec![2, 3, 13], vec![1, 1, 13, 13], false),
        (vec![0, 3], vec![1, 3, 3], false),
    ] {
        let n = weights[weights.len() - 1];
        check(&format!("risk parity {weights:?} {covariance:?}"), leaves(230, &[&weights, &covariance]), 2e-4, |tape, x| {
            // f·f' + 1 of random factors: positive definite.
            let w = tape.unary(Unary::Softplus, x[0])?;
            let eye: Vec<f32> = (0..n * n).map(|i| if i % (n + 1) == 0 { 3.0 } else { 0.0 }).collect();
            let eye = tape.input(&tape.device().upload("eye", &eye)?, &[n, n])?;
            let small = tape.affine(x[1], 0.1, 0.0)?;
            let covariance = tape.add(small, eye)?;
            let b: Vec<f32> = (0..n).map(|i| (i + 1) as f32 * 2.0 / (n * (n + 1)) as f32).collect();
            let b = if budgets { Some(tape.input(&tape.device().upload("budgets", &b)?, &[n])?) } else { None };
            Ok(vec![tape.risk_parity(w, covariance, b, 0.01)?])
        });
    }
}

/// Values of a covariance with a published solution; no weights at all; two assets.
#[test]
fn risk_parity_of_known_portfolios() {
    let device = open("reference").unwrap();
    let of = |weights: &[f32], covariance: &[f32], floor: f64| {
        let n = weights.len();
        let mut tape = Tape::new(&device);
        let w = tape.variable(&device.upload("w", weights).unwrap(), &[1, n]).unwrap();
        let s = tape.input(&device.upload("s", covariance).unwrap(), &[1, n, n]).unwrap();
        let loss = tape.risk_parity(w, s, None, floor).unwrap();
        tape.backward(loss).unwrap();
        let mut pass = device.pass("risk parity");
        let plan = tape.record(&mut pass, &[loss]).unwrap();
        let (value, grad) = (pass.read(plan.view(loss).unwrap()).unwrap(), pass.read(plan.grad(w).unwrap()).unwrap());
        let mut done = pass.submit().unwrap();
        (done.f64(value).unwrap()[0], done.f64(grad).unwrap())
    };
    let s = [0.04, 0.006, 0.0, 0.006, 0.09, 0.018, 0.0, 0.018, 0.16];
    assert!(of(&[0.474_252_2, 0.293_825_36, 0.231_922_46], &s, 0.0).0 < 1e-12);
    let (value, _) = of(&[1.0 / 3.0; 3], &s, 0.0);
    assert!((value - 0.076_281_176).abs() < 1e-7, "{value}");
    let (value, grad) = of(&[0.5, 0.3, 0.2], &s, 0.0);
    assert!((value - 0.007_872_210_2).abs() < 1e-8, "{value}");
    for (got, want) in grad.iter().zip([0.124_392_15, 0.044_239_34, -0.377_339_38]) {
        assert!((got - want).abs() < 1e-6, "{grad:?}");
    }
    let (value, grad) = of(&[0.0; 3], &s, 1e-5);
    assert!((value - 1.0 / 3.0).abs() < 1e-6 && grad.iter().all(|g| *g == 0.0), "{value} {grad:?}");
    let (value, _) = of(&[0.6, 0.4], &[0.04, 0.03, 0.03, 0.09], 0.0);
    assert!(value < 1e-12, "{value}");
}

#[test]
fn gradients_of_convolutions() {
    let of = |padding, dilation, activation| Conv1dOptions { padding, dilation, activation, lengths: None };
    for (x, w, options) in [
        (vec![1, 1, 1, 1], vec![1, 1, 1, 1], of(Padding::Symmetric(0), 1, Activation::None)),
        (vec![2, 3, 2, 7], vec![2, 5, 2, 3], of(Padding::Same, 1, Activation::Gelu)),
        (vec![1, 3, 2, 7], vec![2, 3, 2, 3], of(Padding::Causal, 2, Activation::Tanh)),
        (vec![2, 2, 3, 11], vec![2, 2, 3, 2], of(Padding::Symmetric(3), 3, Activation::Silu)),
        (vec![1, 2, 2, 131], vec![1, 2, 2, 5], of(Padding::Causal, 4, Activation::Sigmoid)),
        (vec![2, 0, 2, 7], vec![2, 3, 2, 3], of(Padding::Same, 1, Activation::Silu)),
    ] {
        for bias in [false, true] {
            let models = w[0];
            let (outputs, batch, time) = (w[1], x[1], x[3]);
            check(&format!("conv1d {x:?} {w:?} {options:?} bias {bias}"), leaves(240, &[&x, &w, &[models, outputs]]), 1e-4, |tape, leaf| {
                let y = tape.conv1d(leaf[0], leaf[1], bias.then_some(leaf[2]), options)?;
                let unused = tape.unary(Unary::Square, leaf[2])?;
                let lengths: Vec<u32> = (0..batch).map(|b| ((b * 4) % (time + 1)) as u32).collect();
                let lengths = tape.device().upload_u32("lengths", &lengths)?;
                let lengths = Some(tape.input(&lengths, &[batch])?);
                let ragged = tape.conv1d(leaf[0], leaf[1], bias.then_some(leaf[2]), Conv1dOptions { lengths, ..options })?;
                Ok(vec![y, ragged, unused])
            });
        }
    }
}

#[test]
fn gradients_of_pooling() {
    for (shape, lengths, shared) in [
        (vec![1, 1, 1], vec![1], false),
        (vec![2, 3, 5, 7], vec![5, 0, 2], true),
        (vec![2, 2, 3, 2], vec![3, 1, 9, 0], false),
        (vec![3, 67, 131], vec![67, 3, 40], false),
        (vec![2, 0, 4, 3], vec![], true),
    ] {
        let outer = shape[usize::from(shared)..shape.len() - 2].to_vec();
        let steps = shape[..shape.len() - 1].to_vec();
        check(&format!("pooling {shape:?} of {lengths:?}"), leaves(250, &[&shape, &steps]), 5e-5, |tape, x| {
            let words = tape.device().upload_u32("lengths", &lengths)?;
            let words = tape.input(&words, &outer)?;
            Ok(vec![tape.last_valid(x[0], words)?, tape.mean_pool(x[0], words)?, tape.attention_pool(x[1], x[0], words)?.0])
        });
    }
}

/// Weights of attention pooling sum to one over the valid steps.
#[test]
fn weights_of_attention_pooling() {
    for device in crate::common::open_all(&["reference", "cpu", "wgpu", "cuda-host"]) {
        let mut tape = Tape::new(&device);
        let mut rng = Rng::new(251);
        let mut upload = |n: usize| device.upload("leaf", &(0..n).map(|_| rng.normal() as f32).collect::<Vec<_>>()).unwrap();
        let (scores, h) = (tape.variable(&upload(6), &[2, 3]).unwrap(), tape.variable(&upload(24), &[2, 3, 4]).unwrap());
        let lengths = tape.input(&device.upload_u32("lengths", &[2, 3]).unwrap(), &[2]).unwrap();
        let (y, weights) = tape.attention_pool(scores, h, lengths).unwrap();
        assert!(tape.needs_grad(y) && !tape.needs_grad(weights));
        let mut pass = device.pass("weights");
        let plan = tape.record(&mut pass, &[weights]).unwrap();
        let read = pass.read(plan.view(weights).unwrap()).unwrap();
        let w = pass.submit().unwrap().f64(read).unwrap();
        assert!((w[0] + w[1] - 1.0).abs() < 1e-6 && w[2] == 0.0 && (w[3] + w[4] + w[5] - 1.0).abs() < 1e-6, "{w:?}");
    }
}

#[test]
fn gradients_of_masked_softmax_and_normalisation() {
    for (shape, by_length) in
        [(vec![1, 1], true), (vec![2, 3, 7], true), (vec![2, 3, 7], false), (vec![5, 131], false), (vec![5, 131], true), (vec![0, 3], true)]
    {
        for log in [false, true] {
            let (width, rows) = (shape[shape.len() - 1], shape[..shape.len() - 1].iter().product::<usize>());
            check(&format!("softmax {shape:?} masked, log {log}"), leaves(260, &[&shape]), 1e-4, |tape, x| {
                let words: Vec<u32> = if by_length {
                    (0..rows).map(|r| (1 + r * 3 % width) as u32).collect()
                } else {
                    (0..rows * width).map(|i| u32::from(i % 3 != 1)).collect()
                };
                let mask = tape.device().upload_u32("mask", &words)?;
                let mask = tape.input(&mask, if by_length { &shape[..shape.len() - 1] } else { &shape })?;
                let y = tape.softmax_masked(x[0], mask, log)?;
                Ok(vec![tape.unary(Unary::Clamp { lo: -50.0, hi: 1.0 }, y)?])
            });
        }
    }
    for shape in [vec![1], vec![3, 7], vec![2, 3, 131], vec![1, 1031], vec![0, 4]] {
        check(&format!("normalise {shape:?}"), leaves(261, &[&shape]), 5e-5, |tape, x| Ok(vec![tape.normalise(x[0], 1e-3)?]));
    }
}

/// A table's rows, and a table of positions that is added.
#[test]
fn gradients_of_embeddings() {
    for (table, ids) in
        [(vec![1, 1, 1], vec![1, 1]), (vec![3, 5, 7], vec![1, 2, 4]), (vec![1, 5, 3], vec![2, 7]), (vec![2, 11, 131], vec![2, 13]), (vec![1, 3, 2], vec![1, 0])]
    {
        check(&format!("embedding {table:?} {ids:?}"), leaves(270, &[&table]), 5e-5, |tape, x| {
            let words: Vec<u32> = (0..ids.iter().product()).map(|i: usize| (i * 7 % (table[1] + 1)) as u32).collect();
            let words = tape.device().upload_u32("ids", &words)?;
            let words = tape.input(&words, &ids)?;
            Ok(vec![tape.embedding(x[0], words)?])
        });
    }
}

#[test]
fn gradients_of_dropout() {
    for shape in [vec![1], vec![3, 7], vec![2, 517], vec![0, 3]] {
        check(&format!("dropout {shape:?}"), leaves(271, &[&shape]), 2e-5, |tape, x| {
            let step = tape.device().upload_u32("step", &[3])?;
            let step = tape.input(&step, &[1])?;
            Ok(vec![tape.dropout(x[0], 0.4, 7, 1, step)?])
        });
    }
}

/// An x that the models of a layer share has the sum of their gradients.
#[test]
fn gradients_of_shared_inputs() {
    let (m, b, t, i, h) = (3, 2, 5, 3, 4);
    for recompute in [false, true] {
        check("lstm of a shared x", leaves(280, &[&[1, b, t, i], &[m, 4 * h, i], &[m, 4 * h, h], &[m, 4 * h, i], &[m, 4 * h, h]]), 1e-4, |tape, x| {
            let layer = |at: usize| Layer { w_ih: x[at], w_hh: x[at + 1], b_ih: None, b_hh: None, h0: None, c0: None };
            let options = RecurrentOptions { recompute, ..Default::default() };
            Ok(vec![tape.lstm(x[0], &[layer(1)], options)?.y, tape.lstm(x[0], &[layer(1), layer(3)], options)?.y])
        });
        check("gru of a shared x", leaves(281, &[&[1, b, t, i], &[m, 3 * h, i], &[m, 3 * h, h]]), 1e-4, |tape, x| {
            let layer = Layer { w_ih: x[1], w_hh: x[2], b_ih: None, b_hh: None, h0: None, c0: None };
            Ok(vec![tape.gru(x[0], &[layer], RecurrentOptions { recompute, ..Default::default() })?.y])
        });
    }
    check("conv1d of a shared x", leaves(282, &[&[1, 2, 3, 7], &[4, 2, 3, 3]]), 1e-4, |tape, x| {
        Ok(vec![tape.conv1d(x[0], x[1], None, Conv1dOptions { padding: Padding::Same, ..Default::default() })?])
    });
    check("linear of a shared x", leaves(283, &[&[1, 67, 5], &[3, 131, 5]]), 1e-4, |tape, x| Ok(vec![tape.linear(x[0], x[1], None, Activation::None)?]));
}

#[test]
fn mistakes_with_words_and_shapes_are_named() {
    let device = open("cpu").unwrap();
    let mut tape = Tape::new(&device);
    let reals = |tape: &mut Tape, shape: &[usize]| {
        let buffer = device.zeros("zeros", shape.iter().product::<usize>() as u64).unwrap();
        tape.variable(&buffer, shape).unwrap()
    };
    let (x, w, b) = (reals(&mut tape, &[1, 2, 3, 7]), reals(&mut tape, &[1, 4, 3, 3]), reals(&mut tape, &[1, 4]));
    let two = reals(&mut tape, &[2]);
    let words = tape.input(&device.zeros_u32("words", 2).unwrap(), &[2]).unwrap();
    refused(tape.conv1d(x, b, None, Conv1dOptions::default()), &["conv1d", "weight", "[M,O,C,K]", "[1, 4]"]);
    let five = reals(&mut tape, &[1, 2, 5, 7]);
    refused(tape.conv1d(five, w, None, Conv1dOptions::default()), &["conv1d", "x", "[1, 4, 3, 3]", "[1, 2, 5, 7]"]);
    refused(tape.conv1d(x, w, Some(two), Conv1dOptions::default()), &["conv1d", "bias", "[1, 4]", "[2]"]);
    refused(tape.conv1d(x, w, Some(b), Conv1dOptions { lengths: Some(two), ..Default::default() }), &["conv1d", "lengths", "words", "reals"]);
    refused(tape.conv1d(x, w, Some(b), Conv1dOptions { dilation: 9, ..Default::default() }), &["conv1d", "taps", "reach"]);
    let h = reals(&mut tape, &[2, 5, 3]);
    refused(tape.last_valid(h, two), &["last_valid", "lengths", "words"]);
    refused(tape.mean_pool(b, words), &["mean_pool", "h", "[M,…,T,H]"]);
    refused(tape.attention_pool(two, h, words).map(|pair| pair.0), &["attention_pool", "scores", "[2, 5]", "[2]"]);
    refused(tape.softmax_masked(h, words, false), &["softmax", "mask", "[2, 5, 3]"]);
    let mask = reals(&mut tape, &[2, 5]);
    refused(tape.softmax_masked(h, mask, false), &["softmax", "mask", "words", "reals"]);
    refused(tape.normalise(h, 0.0), &["normalise", "eps"]);
    refused(tape.objective(Goal::Calmar, mask, ObjectiveOptions { lengths: Some(two), ..Default::default() }), &["objective", "lengths", "words"]);
    refused(tape.objective(Goal::Calmar, h, ObjectiveOptions { lengths: Some(words), ..Default::default() }), &["objective", "lengths", "[2, 5]"]);
    refused(tape.risk_parity(two, h, None, 0.0), &["risk_parity", "covariance", "[2, 2]"]);
    refused(tape.risk_parity(two, h, None, -1.0), &["risk_parity", "floor"]);
    refused(tape.dropout(h, 0.1, 0, 0, two), &["dropout", "step", "[1]"]);
    let table = reals(&mut tape, &[1, 5, 3]);
    refused(tape.embedding(table, two), &["embedding", "ids", "words"]);
    let q = reals(&mut tape, &[2, 1, 3, 4]);
    refused(tape.attention(q, q, q, AttentionOptions { kv_len: Some(two), ..Default::default() }).map(|pair| pair.0), &["attention", "kv_len", "words"]);
    // Words where reals belong are found when the pass is recorded.
    let y = tape.unary(Unary::Exp, words).unwrap();
    let result = tape.record(&mut device.pass("mixed"), &[y]).map(|_| y);
    refused(result, &["map", "f32", "u32"]);
}

/// Rows of attention's weights sum to one and give its result back, packed or not, with mask, lengths and bias.
#[test]
fn weights_of_attention_are_those_it_used() {
    let (b, heads, t, width) = (2, 2, 5, 3);
    for device in crate::common::open_all(&["reference", "cpu", "wgpu", "cuda-host"]) {
        let mut rng = Rng::new(290);
        let mut tape = Tape::new(&device);
        let mut upload = |tape: &mut Tape, shape: &[usize]| {
            let values: Vec<f32> = (0..shape.iter().product()).map(|_| rng.normal() as f32).collect();
            let buffer = device.upload("leaf", &values).unwrap();
            (tape.variable(&buffer, shape).unwrap(), values)
        };
        let shape = [b, heads, t, width];
        let ((q, _), (k, _), (v, values)) = (upload(&mut tape, &shape), upload(&mut tape, &shape), upload(&mut tape, &shape));
        let (bias, _) = upload(&mut tape, &[1, heads, t, t]);
        let kv_len = Some(tape.input(&device.upload_u32("kv_len", &[5, 2]).unwrap(), &[b]).unwrap());
        let options = AttentionOptions { causal: true, kv_len, bias: Some(bias), ..Default::default() };
        let (out, lse) = tape.attention(q, k, v, options).unwrap();
        let weights = tape.attention_weights(q, k, lse, options).unwrap();
        // The same, its heads side by side.
        let parts = [q, k, v].map(|x| {
            let x = tape.permute(x, &[0, 2, 1, 3]).unwrap();
            tape.reshape(x, &[b, t, heads * width]).unwrap()
        });
        let qkv = tape.concat(&parts, 2).unwrap();
        let (_, lse) = tape.attention_packed(qkv, heads, options).unwrap();
        let packed = tape.attention_weights_packed(qkv, heads, lse, options).unwrap();
        assert!(!tape.needs_grad(weights) && !tape.needs_grad(packed));
        let mut pass = device.pass("weights");
        let plan = tape.record(&mut pass, &[out, weights, packed]).unwrap();
        let reads = [out, weights, packed].map(|x| pass.read(plan.view(x).unwrap()).unwrap());
        let mut done = pass.submit().unwrap();
        let [out, weights, packed] = reads.map(|read| done.f64(read).unwrap());
        for row in 0..b * heads * t {
            let w = &weights[row * t..(row + 1) * t];
            assert!((w.iter().sum::<f64>() - 1.0).abs() < 1e-5, "{w:?}");
            for (j, (a, b)) in w.iter().zip(&packed[row * t..(row + 1) * t]).enumerate() {
                assert!((a - b).abs() < 1e-6 && (j <= row % t || *a == 0.0), "row {row}: {w:?}");
            }
            for c in 0..width {
                let sum: f64 = (0..t).map(|j| w[j] * f64::from(values[(row / t * t + j) * width + c])).sum();
                assert!((out[row * width + c] - sum).abs() < 1e-5);
            }
        }
    }
}

#[test]
fn gradients_of_attention_pooling_with_a_gate() {
    for (b, t, e, causal) in [(1, 1, 1, false), (2, 5, 8, false), (2, 5, 8, true), (1, 67, 5, true), (1, 131, 3, false)] {
        let pooling = AttentionPooling { causal, ..AttentionPooling::new("pool", e) };
        let mut declared = Declared::new();
        pooling.declare(&mut declared);
        check(&format!("attention pooling [{b},{t},{e}] causal {causal}"), leaves(291, &[&[2, b, t, e]]), 2e-4, |tape, x| {
            let parameters = Parameters::new(tape.device(), 2, &declared, 4)?;
            // From off zero, so that a norm of one value or of equal ones is not all there is.
            let pooled = pooling.forward(tape, &parameters, x[0], None)?;
            let lengths: Vec<u32> = (0..2 * b).map(|i| (t - i % t.min(2)) as u32).collect();
            let lengths = tape.device().upload_u32("lengths", &lengths)?;
            let lengths = tape.input(&lengths, &[2 * b])?;
            let ragged = pooling.forward(tape, &parameters, x[0], Some(lengths))?;
            Ok(vec![pooled.context, ragged.context, if e > 1 { pooled.y } else { pooled.context }])
        });
    }
}

/// A causal context is the whole one at the last step, and no step of it sees a later one; positions are added.
#[test]
fn attention_pooling_may_be_causal() {
    let (t, e) = (6, 8);
    let mut declared = Declared::new();
    let pooling = AttentionPooling::new("pool", e);
    pooling.declare(&mut declared);
    assert_eq!(declared.count(), 2 * 8 + 2 + 2 + 8 + 1 + 16);
    for device in crate::common::open_all(&["reference", "cpu", "wgpu", "cuda-host"]) {
        let parameters = Parameters::new(&device, 1, &declared, 4).unwrap();
        let run = |causal: bool, x: &[f32]| {
            let mut tape = Tape::new(&device);
            let h = tape.input(&device.upload("h", x).unwrap(), &[1, 1, t, e]).unwrap();
            let pooled = AttentionPooling { causal, ..pooling.clone() }.forward(&mut tape, &parameters, h, None).unwrap();
            let mut pass = device.pass("pool");
            let plan = tape.record(&mut pass, &[pooled.context, pooled.y, pooled.weights]).unwrap();
            let reads = [pooled.context, pooled.y, pooled.weights].map(|x| pass.read(plan.view(x).unwrap()).unwrap());
            let mut done = pass.submit().unwrap();
            reads.map(|read| done.f64(read).unwrap())
        };
        let mut rng = Rng::new(292);
        let mut x: Vec<f32> = (0..t * e).map(|_| rng.normal() as f32).collect();
        let ([whole, _, w], [causal, y, prefixes]) = (run(false, &x), run(true, &x));
        for (a, b) in whole.iter().zip(&causal[(t - 1) * e..]).chain(w.iter().zip(&prefixes[(t - 1) * t..])) {
            assert!((a - b).abs() < 1e-5, "{a} {b}");
        }
        x[4 * e..].iter_mut().for_each(|x| *x = 9.0 - *x);
        let [_, later, _] = run(true, &x);
        assert_eq!(y[..4 * e], later[..4 * e]);
        assert_ne!(y[4 * e..], later[4 * e..]);
    }
}

#[test]
fn gradients_of_positions() {
    let positions = Positions { prefix: "pos".into(), steps: 7, width: 5 };
    let mut declared = Declared::new();
    positions.declare(&mut declared);
    assert!(declared.tensors().iter().all(|tensor| !tensor.decay));
    check("positions", leaves(293, &[&[1, 2, 3, 5]]), 2e-5, |tape, x| {
        let parameters = Parameters::new(tape.device(), 2, &declared, 4)?;
        let y = positions.forward(tape, &parameters, x[0])?;
        let waves = sinusoids(tape, 3, 5)?;
        Ok(vec![y, tape.add(x[0], waves)?])
    });
    let device = open("reference").unwrap();
    let mut tape = Tape::new(&device);
    let parameters = Parameters::new(&device, 1, &declared, 4).unwrap();
    let x = tape.input(&device.zeros("x", 40).unwrap(), &[1, 1, 8, 5]).unwrap();
    refused(positions.forward(&mut tape, &parameters, x), &["positions", "T at most 7", "[1, 1, 8, 5]"]);
    let waves = sinusoids(&mut tape, 3, 5).unwrap();
    let zeros = tape.input(&device.zeros("zeros", 15).unwrap(), &[3, 5]).unwrap();
    let sum = tape.add(waves, zeros).unwrap();
    let mut pass = device.pass("waves");
    let plan = tape.record(&mut pass, &[sum]).unwrap();
    let read = pass.read(plan.view(sum).unwrap()).unwrap();
    let waves = pass.submit().unwrap().f64(read).unwrap();
    let angle = 2.0 / 10_000f64.powf(0.4);
    for (got, want) in waves[10..].iter().zip([2f64.sin(), 2f64.cos(), angle.sin(), angle.cos(), (2.0 / 10_000f64.powf(0.8)).sin()]) {
        assert!((got - want).abs() < 1e-6, "{waves:?}");
    }
}
