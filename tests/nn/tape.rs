//! The tape: gradients of every op against finite differences, memory that is shared without harm, replays, checkpoints, and errors.

use crate::common::{Rng, open, open_all};
use forback::ops::*;
use forback::tape::{Tape, Var};
use forback::{Device, Error, Result};

/// A leaf: its shape and values.
pub(crate) struct Leaf {
    shape: Vec<usize>,
    values: Vec<f64>,
}

/// Normals of a shape, as f32 holds them.
pub(crate) fn leaf(rng: &mut Rng, shape: &[usize]) -> Leaf {
    let n = shape.iter().product();
    Leaf { shape: shape.to_vec(), values: (0..n).map(|_| f64::from(rng.normal() as f32)).collect() }
}

type Build<'a> = &'a dyn Fn(&mut Tape, &[Var]) -> Result<Vec<Var>>;

/// Values of the outputs and gradients of the leaves for Σ weights·output, one pass.
fn run(device: &Device, leaves: &[Leaf], build: Build<'_>) -> (Vec<Vec<f64>>, Vec<Vec<f64>>) {
    let mut tape = Tape::new(device);
    let vars: Vec<Var> = leaves
        .iter()
        .map(|leaf| {
            let buffer = device.zeros("leaf", leaf.values.len() as u64).unwrap();
            device.write_f64(&buffer, &leaf.values).unwrap();
            tape.variable(&buffer, &leaf.shape).unwrap()
        })
        .collect();
    let outputs = build(&mut tape, &vars).unwrap();
    for (k, &y) in outputs.iter().enumerate() {
        let shape = tape.shape(y).to_vec();
        let weights: Vec<f32> = weights(k, shape.iter().product());
        let grad = tape.input(&device.upload("weights", &weights).unwrap(), &shape).unwrap();
        tape.backward_with(y, grad).unwrap();
    }
    let mut pass = device.pass("gradients");
    let plan = tape.record(&mut pass, &outputs).unwrap();
    let values: Vec<_> = outputs.iter().map(|&y| pass.read(plan.view(y).unwrap()).unwrap()).collect();
    let grads: Vec<_> = vars.iter().map(|&x| pass.read(plan.grad(x).unwrap()).unwrap()).collect();
    let mut done = pass.submit().unwrap();
    let mut take = |reads: Vec<_>| reads.into_iter().map(|read| done.f64(read).unwrap()).collect::<Vec<_>>();
    (take(values), take(grads))
}

fn weights(k: usize, n: usize) -> Vec<f32> {
    let mut rng = Rng::new(900 + k as u32);
    (0..n).map(|_| rng.normal() as f32).collect()
}

fn total(outputs: &[Vec<f64>]) -> f64 {
    outputs.iter().enumerate().map(|(k, y)| y.iter().zip(weights(k, y.len())).map(|(y, w)| y * f64::from(w)).sum::<f64>()).sum()
}

/// Gradients on `reference` against central differences, then those of every other device against `reference`.
pub(crate) fn check(name: &str, mut leaves: Vec<Leaf>, tolerance: f64, build: impl Fn(&mut Tape, &[Var]) -> Result<Vec<Var>>) {
    let reference = open("reference").unwrap();
    let (values, grads) = run(&reference, &leaves, &build);
    for i in 0..leaves.len() {
        let n = leaves[i].values.len();
        // At most 24 elements of a leaf, spread over it.
        for at in (0..n).step_by(n.div_ceil(24).max(1)) {
            let (x, h) = (leaves[i].values[at], 1e-5);
            let mut moved = |to: f64| {
                leaves[i].values[at] = to;
                total(&run(&reference, &leaves, &build).0)
            };
            let slope = (moved(x + h) - moved(x - h)) / (2.0 * h);
            leaves[i].values[at] = x;
            let got = grads[i][at];
            assert!((got - slope).abs() <= 1e-6 * (1.0 + slope.abs()), "{name}: leaf {i}[{at}]: gradient {got}, difference {slope}");
        }
    }
    for device in open_all(&["cpu", "wgpu", "cuda-host", "cuda"]) {
        let (got_values, got_grads) = run(&device, &leaves, &build);
        for (what, got, want) in [("output", &got_values, &values), ("gradient", &got_grads, &grads)] {
            for (i, (got, want)) in got.iter().zip(want).enumerate() {
                let scale = want.iter().fold(1.0f64, |a, x| a.max(x.abs()));
                for (k, (g, w)) in got.iter().zip(want).enumerate() {
                    assert!((g - w).abs() <= tolerance * scale, "{name} on {}: {what} {i}[{k}]: {g}, reference {w}", device.info().kind.name());
                }
            }
        }
    }
}

use forback::kernels::activation::Activation;
use forback::kernels::loss::Criterion;
use forback::kernels::map::{BinaryFunction, Unary};

fn leaves(seed: u32, shapes: &[&[usize]]) -> Vec<Leaf> {
    let mut rng = Rng::new(seed);
    shapes.iter().map(|shape| leaf(&mut rng, shape)).collect()
}

/// Moves values off the points where a function has no derivative.
fn away(mut leaves: Vec<Leaf>, from: f64) -> Vec<Leaf> {
    for value in leaves.iter_mut().flat_map(|leaf| &mut leaf.values) {
        if (*value - from).abs() < 0.05 {
            *value = f64::from((from + 0.1) as f32);
        }
    }
    leaves
}

#[test]
fn gradients_of_functions_of_one_operand() {
    for (i, f) in [Unary::Exp, Unary::Tanh, Unary::Sigmoid, Unary::Silu, Unary::Gelu, Unary::Softplus, Unary::Square, Unary::Affine { scale: -1.5, shift: 0.3 }]
        .into_iter()
        .enumerate()
    {
        check(&format!("{f:?}"), leaves(i as u32, &[&[3, 7]]), 2e-5, |tape, x| Ok(vec![tape.unary(f, x[0])?]));
    }
    check("relu", away(leaves(20, &[&[257]]), 0.0), 2e-5, |tape, x| Ok(vec![tape.unary(Unary::Relu, x[0])?]));
    check("one value", leaves(21, &[&[1]]), 2e-5, |tape, x| Ok(vec![tape.unary(Unary::Exp, x[0])?]));
}

#[test]
fn gradients_of_broadcast_operands() {
    for (i, f) in [BinaryFunction::Add, BinaryFunction::Sub, BinaryFunction::Mul].into_iter().enumerate() {
        for (a, b) in [(vec![4, 5], vec![4, 5]), (vec![2, 3, 5], vec![3, 1]), (vec![1, 5], vec![7, 1]), (vec![300], vec![1])] {
            check(&format!("{f:?} {a:?} {b:?}"), leaves(30 + i as u32, &[&a, &b]), 2e-5, |tape, x| Ok(vec![tape.binary(f, x[0], x[1])?]));
        }
    }
    check("x·x + x", leaves(40, &[&[6]]), 2e-5, |tape, x| {
        let square = tape.mul(x[0], x[0])?;
        Ok(vec![tape.add(square, x[0])?])
    });
}

#[test]
fn gradients_of_regions_and_reductions() {
    check("slice", leaves(50, &[&[3, 8, 2]]), 2e-5, |tape, x| Ok(vec![tape.slice(x[0], 1, 2..5)?]));
    check("permute", leaves(51, &[&[3, 4, 5]]), 2e-5, |tape, x| Ok(vec![tape.permute(x[0], &[2, 0, 1])?]));
    check("concat", leaves(52, &[&[2, 3], &[2, 1], &[2, 4]]), 2e-5, |tape, x| Ok(vec![tape.concat(x, 1)?]));
    check("sum", leaves(53, &[&[3, 70, 5]]), 2e-5, |tape, x| Ok(vec![tape.sum(x[0], &[1])?]));
    check("mean", leaves(54, &[&[3, 7, 5]]), 2e-5, |tape, x| Ok(vec![tape.mean(x[0], &[0, 2])?]));
    check("max", leaves(55, &[&[5, 33]]), 2e-5, |tape, x| Ok(vec![tape.max(x[0], &[1])?]));
    check("glu and gate", leaves(56, &[&[3, 8], &[3, 4], &[3, 4]]), 2e-5, |tape, x| {
        let glu = tape.glu(x[0])?;
        let gate = tape.unary(Unary::Sigmoid, x[2])?;
        Ok(vec![tape.gated_residual(glu, x[1], gate)?])
    });
}

#[test]
fn gradients_of_dense_ops() {
    for (i, activation) in [Activation::None, Activation::Tanh, Activation::Gelu, Activation::Silu, Activation::Sigmoid].into_iter().enumerate() {
        check(&format!("linear {activation:?}"), leaves(60 + i as u32, &[&[2, 3, 5], &[2, 4, 5], &[2, 4]]), 3e-5, |tape, x| {
            Ok(vec![tape.linear(x[0], x[1], Some(x[2]), activation)?])
        });
    }
    check("linear of shared x", leaves(66, &[&[1, 3, 5], &[3, 2, 5]]), 3e-5, |tape, x| Ok(vec![tape.linear(x[0], x[1], None, Activation::None)?]));
    check("layer_norm", leaves(67, &[&[2, 3, 7], &[2, 7], &[2, 7]]), 1e-4, |tape, x| Ok(vec![tape.layer_norm(x[0], x[1], x[2], 1e-5)?]));
    check("softmax", leaves(68, &[&[4, 9]]), 3e-5, |tape, x| Ok(vec![tape.softmax(x[0], false)?]));
    check("log softmax", leaves(69, &[&[4, 9]]), 3e-5, |tape, x| Ok(vec![tape.softmax(x[0], true)?]));
}

#[test]
fn gradients_of_losses() {
    let mut rng = Rng::new(70);
    let (target, weight): (Vec<f32>, Vec<f32>) = ((0..12).map(|_| rng.unit() as f32).collect(), (0..6).map(|_| rng.unit() as f32).collect());
    for criterion in [Criterion::Mse, Criterion::Huber { delta: 0.7 }, Criterion::Bce { positive_weight: 2.0 }] {
        check(&format!("{criterion:?}"), leaves(71, &[&[3, 2, 2]]), 3e-5, |tape, x| {
            let device = tape.device().clone();
            let (y, w) = (tape.input(&device.upload("y", &target)?, &[3, 2, 2])?, tape.input(&device.upload("w", &weight)?, &[3, 2])?);
            Ok(vec![tape.loss(criterion, x[0], y, Some(w), None)?])
        });
    }
    check("cross entropy", leaves(72, &[&[2, 3, 4]]), 3e-5, |tape, x| {
        let classes = tape.device().upload_u32("classes", &[0, 3, 1, 2, 2, 0])?;
        let classes = tape.input(&classes, &[2, 3])?;
        Ok(vec![tape.loss(Criterion::CrossEntropy { smoothing: 0.1 }, x[0], classes, None, None)?])
    });
}

#[test]
fn gradients_of_attention() {
    for options in [AttentionOptions::default(), AttentionOptions { causal: true, window: Some(3), ..Default::default() }] {
        check("attention", leaves(80, &[&[2, 2, 5, 3], &[2, 2, 5, 3], &[2, 2, 5, 3]]), 5e-5, |tape, x| Ok(vec![tape.attention(x[0], x[1], x[2], options)?.0]));
        check("attention packed", leaves(81, &[&[2, 5, 3 * 6]]), 5e-5, |tape, x| Ok(vec![tape.attention_packed(x[0], 2, options)?.0]));
    }
    check("attention with bias", leaves(82, &[&[2, 2, 4, 3], &[2, 2, 6, 3], &[2, 2, 6, 3], &[1, 2, 4, 6]]), 5e-5, |tape, x| {
        let lengths = tape.device().upload_u32("lengths", &[6, 3])?;
        let lengths = tape.input(&lengths, &[2])?;
        Ok(vec![tape.attention(x[0], x[1], x[2], AttentionOptions { bias: Some(x[3]), kv_len: Some(lengths), ..Default::default() })?.0])
    });
}

#[test]
fn gradients_of_recurrent_layers() {
    let (m, b, t, i, h) = (2, 3, 5, 2, 4);
    for recompute in [false, true] {
        check(
            "lstm, both directions",
            leaves(90, &[&[m, b, t, i], &[m, 4 * h, i], &[m, 4 * h, h], &[m, 4 * h], &[m, 4 * h, i], &[m, 4 * h, h], &[m, b, h], &[m, b, h]]),
            1e-4,
            |tape, x| {
                let lengths = tape.device().upload_u32("lengths", &[5, 0, 3])?;
                let options = RecurrentOptions { lengths: Some(tape.input(&lengths, &[b])?), recompute, ..Default::default() };
                let there = Layer { w_ih: x[1], w_hh: x[2], b_ih: Some(x[3]), b_hh: None, h0: Some(x[6]), c0: Some(x[7]) };
                let back = Layer { w_ih: x[4], w_hh: x[5], b_ih: None, b_hh: None, h0: Some(x[7]), c0: None };
                let out = tape.lstm(x[0], &[there, back], options)?;
                Ok([Some(out.y), out.hn[0], out.cn[1]].into_iter().flatten().collect())
            },
        );
    }
    check("gru", leaves(91, &[&[m, b, t, i], &[m, 3 * h, i], &[m, 3 * h, h], &[m, 3 * h], &[m, 3 * h], &[m, h]]), 1e-4, |tape, x| {
        let layer = Layer { w_ih: x[1], w_hh: x[2], b_ih: Some(x[3]), b_hh: Some(x[4]), h0: Some(x[5]), c0: None };
        let out = tape.gru(x[0], &[layer], RecurrentOptions::default())?;
        Ok([Some(out.y), out.hn[0]].into_iter().flatten().collect())
    });
}

/// A small network: the same loss and gradients with its middle kept, or computed again; less memory in the second case.
fn network(device: &Device, checkpoint: bool) -> (Vec<Vec<f64>>, u64, u64) {
    let mut rng = Rng::new(100);
    let mut upload = |n: usize| device.upload("leaf", &(0..n).map(|_| 0.3 * rng.normal() as f32).collect::<Vec<_>>()).unwrap();
    let (x, w, y) = (upload(64 * 16), (0..6).map(|_| upload(16 * 16)).collect::<Vec<_>>(), upload(64 * 16));
    let mut tape = Tape::new(device);
    let (x, y) = (tape.input(&x, &[1, 64, 16]).unwrap(), tape.input(&y, &[1, 64, 16]).unwrap());
    let weights: Vec<Var> = w.iter().map(|w| tape.variable(w, &[1, 16, 16]).unwrap()).collect();
    let layers = |tape: &mut Tape| weights.iter().fold(x, |x, &w| tape.linear(x, w, None, Activation::Gelu).unwrap());
    let out = if checkpoint { tape.checkpoint(layers) } else { layers(&mut tape) };
    let loss = tape.loss(Criterion::Mse, out, y, None, None).unwrap();
    tape.backward(loss).unwrap();
    let mut pass = device.pass("network");
    let plan = tape.record(&mut pass, &[loss]).unwrap();
    let mut reads = vec![pass.read(plan.view(loss).unwrap()).unwrap()];
    reads.extend(weights.iter().map(|&w| pass.read(plan.grad(w).unwrap()).unwrap()));
    let mut done = pass.submit().unwrap();
    (reads.into_iter().map(|read| done.f64(read).unwrap()).collect(), plan.bytes, plan.unshared_bytes)
}

#[test]
fn checkpoints_change_no_bit_and_memory_is_shared() {
    for device in open_all(&["reference", "cpu", "wgpu", "cuda-host"]) {
        let ((kept, bytes, unshared), (again, _, _)) = (network(&device, false), network(&device, true));
        assert_eq!(kept, again, "{}", device.info().kind.name());
        assert!(bytes < unshared * 3 / 4, "{bytes} of {unshared} B");
    }
}

/// Without a gradient a tape keeps nothing, whatever its length.
#[test]
fn without_gradient_memory_does_not_grow() {
    let device = open("cpu").unwrap();
    let bytes = |layers: usize| {
        let mut tape = Tape::new(&device);
        let x = tape.variable(&device.zeros("x", 1000).unwrap(), &[1000]).unwrap();
        let y = tape.no_grad(|tape| (0..layers).fold(x, |x, _| tape.unary(Unary::Exp, x).unwrap()));
        assert!(!tape.needs_grad(y) && tape.backward(y).is_err());
        tape.record(&mut device.pass("long"), &[y]).unwrap().bytes
    };
    assert_eq!(bytes(3), bytes(40));
    assert_eq!(bytes(40), 8000);
}

#[test]
fn mistakes_on_a_tape_are_named() {
    let device = open("cpu").unwrap();
    let mut tape = Tape::new(&device);
    let zeros = |n: u64| device.zeros("zeros", n).unwrap();
    let x = tape.variable(&zeros(6), &[2, 3]).unwrap();
    let text = |result: Result<()>| match result {
        Err(error @ (Error::Shape { .. } | Error::Parameter { .. })) => error.to_string(),
        other => panic!("{other:?}"),
    };
    let has = |text: String, words: &[&str]| assert!(words.iter().all(|w| text.contains(w)), "'{text}' does not say {words:?}");
    has(text(tape.input(&zeros(5), &[2, 3]).map(|_| ())), &["input", "6 values", "5"]);
    has(text(tape.variable(&device.zeros_u32("words", 6).unwrap(), &[6]).map(|_| ())), &["variable", "words have no gradient"]);
    has(text(tape.input(&open("cpu").unwrap().zeros("other", 6).unwrap(), &[6]).map(|_| ())), &["input", "view"]);
    has(text(tape.reshape(x, &[7]).map(|_| ())), &["reshape", "6 values", "[7]"]);
    let w = tape.variable(&zeros(8), &[1, 2, 4]).unwrap();
    has(text(tape.linear(x, w, None, Activation::None).map(|_| ())), &["linear", "x must be", "[2, 3]"]);
    has(text(tape.backward(x)), &["backward", "one value, or one per model", "[2, 3]"]);
    let constant = tape.input(&zeros(1), &[1]).unwrap();
    has(text(tape.backward(constant)), &["depends on no parameter"]);
    let other = tape.variable(&zeros(5), &[5]).unwrap();
    has(text(tape.add(x, other).map(|_| ())), &["binary", "broadcasts"]);
    let y = tape.unary(Unary::Exp, x).unwrap();
    let plan = tape.record(&mut device.pass("plan"), &[]).unwrap();
    has(text(plan.view(y).map(|_| ())), &["wanted"]);
    has(text(plan.grad(x).map(|_| ())), &["backward"]);
    let mut short = Tape::new(&device);
    has(text(short.unary(Unary::Exp, y).map(|_| ())), &["unary", "the tape that made it"]);
    has(text(short.detach(y).map(|_| ())), &["detach", "the tape that made it"]);
    has(text(short.record(&mut device.pass("none"), &[y]).map(|_| ())), &["record"]);
}
