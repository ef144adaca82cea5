//! Every op of the tape over a spread of shapes: one value, primes, beyond a workgroup, and none where that is legal. Gradients against central
//! differences in f64, then every device against that; and a list that an op without such a test is not on.

use super::tape::{Leaf, check, leaf};
use crate::common::{Rng, open_all};
use forback::kernels::activation::Activation;
use forback::kernels::attention::Dropout;
use forback::kernels::half;
use forback::kernels::hedge_rollout::{Claim, HedgeRollout, Network};
use forback::kernels::kernel::Elem;
use forback::kernels::loss::Criterion;
use forback::kernels::map::{BinaryFunction, Unary};
use forback::ops::*;
use forback::tape::Tape;

fn leaves(seed: u32, shapes: &[&[usize]]) -> Vec<Leaf> {
    let mut rng = Rng::new(seed);
    shapes.iter().map(|shape| leaf(&mut rng, shape)).collect()
}

const SIZES: [&[usize]; 6] = [&[1], &[7], &[3, 5], &[2, 0, 3], &[2, 3, 131], &[1031]];

#[test]
fn gradients_of_unary_over_sizes() {
    let anywhere = [
        Unary::Copy,
        Unary::Neg,
        Unary::Exp,
        Unary::Square,
        Unary::Abs,
        Unary::Sign,
        Unary::Relu,
        Unary::Gelu,
        Unary::Tanh,
        Unary::Sigmoid,
        Unary::Silu,
        Unary::Softplus,
        Unary::Clamp { lo: -0.7, hi: 0.9 },
        Unary::Affine { scale: -1.5, shift: 0.3 },
        Unary::Step,
    ];
    let positive = [Unary::Log, Unary::Log1p, Unary::Sqrt, Unary::Reciprocal, Unary::Power { p: 1.7 }, Unary::Power { p: -0.5 }];
    for (i, f) in anywhere.into_iter().chain(positive).enumerate() {
        let shape = SIZES[i % SIZES.len()];
        for shape in [shape, &[2, 3]] {
            check(&format!("{f:?} {shape:?}"), leaves(300 + i as u32, &[shape]), 5e-5, |tape, x| {
                if i < anywhere.len() {
                    return Ok(vec![tape.unary(f, x[0])?]);
                }
                let x = tape.unary(Unary::Softplus, x[0])?;
                let x = tape.affine(x, 1.0, 0.3)?;
                Ok(vec![tape.unary(f, x)?])
            });
        }
    }
    for shape in SIZES {
        check(&format!("tanh {shape:?}"), leaves(330, &[shape]), 2e-5, |tape, x| Ok(vec![tape.unary(Unary::Tanh, x[0])?]));
    }
}

#[test]
fn gradients_of_binary_over_sizes() {
    let functions =
        [BinaryFunction::Add, BinaryFunction::Sub, BinaryFunction::Mul, BinaryFunction::Div, BinaryFunction::Min, BinaryFunction::Max, BinaryFunction::Glu];
    let shapes: [(&[usize], &[usize]); 7] =
        [(&[1], &[1]), (&[7], &[1]), (&[3, 1], &[5]), (&[2, 3, 131], &[1, 131]), (&[1031], &[1031]), (&[2, 0, 3], &[3]), (&[1, 1, 517], &[3, 2, 1])];
    for (i, f) in functions.into_iter().enumerate() {
        for (a, b) in shapes {
            check(&format!("{f:?} {a:?} {b:?}"), leaves(340 + i as u32, &[a, b]), 1e-4, |tape, x| {
                let mut b = x[1];
                if f == BinaryFunction::Div {
                    b = tape.unary(Unary::Softplus, b)?;
                    b = tape.affine(b, 1.0, 0.3)?;
                }
                Ok(vec![tape.binary(f, x[0], b)?])
            });
        }
    }
    for (a, b) in shapes {
        check(&format!("add, sub, mul, div {a:?} {b:?}"), leaves(350, &[a, b]), 1e-4, |tape, x| {
            let positive = tape.unary(Unary::Exp, x[1])?;
            Ok(vec![tape.add(x[0], x[1])?, tape.sub(x[0], x[1])?, tape.mul(x[0], x[1])?, tape.div(x[0], positive)?])
        });
    }
}

#[test]
fn gradients_of_gates_over_sizes() {
    for shape in [&[2usize][..], &[3, 14], &[2, 3, 262], &[0, 4], &[1, 2062]] {
        let half: Vec<usize> = shape[..shape.len() - 1].iter().copied().chain([shape[shape.len() - 1] / 2]).collect();
        check(&format!("glu and gate {shape:?}"), leaves(360, &[shape, &half]), 5e-5, |tape, x| {
            let glu = tape.glu(x[0])?;
            let gate = tape.unary(Unary::Sigmoid, x[1])?;
            Ok(vec![glu, tape.gated_residual(x[1], glu, gate)?])
        });
    }
}

#[test]
fn gradients_of_regions_over_sizes() {
    for (shape, axis, range) in [
        (vec![1], 0, 0..1),
        (vec![7], 0, 3..3),
        (vec![3, 131], 1, 2..130),
        (vec![2, 5, 3], 0, 1..2),
        (vec![1031], 0, 500..1031),
        (vec![2, 3, 2, 2, 3, 2], 4, 1..3),
        (vec![2, 0, 3], 2, 1..2),
    ] {
        check(&format!("slice {shape:?} {axis} {range:?}"), leaves(370, &[&shape]), 2e-5, |tape, x| Ok(vec![tape.slice(x[0], axis, range.clone())?]));
        check(&format!("concat of {shape:?} along {axis}"), leaves(371, &[&shape, &shape]), 2e-5, |tape, x| {
            let part = tape.slice(x[1], axis, range.clone())?;
            Ok(vec![tape.concat(&[x[0], part, x[1]], axis)?])
        });
    }
    for (shape, order) in [(vec![1], vec![0]), (vec![7, 131], vec![1, 0]), (vec![2, 3, 2, 5], vec![3, 1, 0, 2]), (vec![2, 0, 3], vec![1, 2, 0])] {
        check(&format!("permute {shape:?} {order:?}"), leaves(372, &[&shape]), 2e-5, |tape, x| Ok(vec![tape.permute(x[0], &order)?]));
    }
}

#[test]
fn gradients_of_reductions_over_sizes() {
    for (shape, axes) in [
        (vec![1], vec![0]),
        (vec![7], vec![0]),
        (vec![3, 131], vec![1]),
        (vec![3, 131], vec![0]),
        (vec![2, 5, 3], vec![0, 2]),
        (vec![5003], vec![0]),
        (vec![2, 3, 5, 2], vec![1, 2]),
        (vec![0, 3], vec![1]),
    ] {
        check(&format!("sum, mean, max {shape:?} {axes:?}"), leaves(380, &[&shape]), 5e-5, |tape, x| {
            Ok(vec![tape.sum(x[0], &axes)?, tape.mean(x[0], &axes)?, tape.max(x[0], &axes)?])
        });
    }
    check("sum of nothing", leaves(381, &[&[3, 0]]), 1e-6, |tape, x| Ok(vec![tape.sum(x[0], &[1])?]));
}

#[test]
fn gradients_of_dense_ops_over_sizes() {
    for (i, (m, rows, inputs, outputs)) in [(1, 1, 1, 1), (3, 7, 5, 11), (2, 131, 3, 7), (1, 3, 131, 67), (2, 0, 3, 5), (2, 67, 33, 3)].into_iter().enumerate()
    {
        for activation in [Activation::None, Activation::ALL[1 + i % 5]] {
            let name = format!("linear {m}×[{rows},{inputs}]→{outputs} {activation:?}");
            check(&name, leaves(390, &[&[m, rows, inputs], &[m, outputs, inputs], &[m, outputs]]), 1e-4, |tape, x| {
                Ok(vec![tape.linear(x[0], x[1], Some(x[2]), activation)?])
            });
        }
    }
    for (m, rows, width) in [(1, 1, 2), (3, 7, 5), (2, 3, 131), (1, 131, 3), (2, 0, 3), (1, 2, 1031)] {
        check(&format!("layer_norm {m}×[{rows},{width}]"), leaves(391, &[&[m, rows, width], &[m, width], &[m, width]]), 2e-4, |tape, x| {
            Ok(vec![tape.layer_norm(x[0], x[1], x[2], 1e-2)?])
        });
    }
    for shape in [&[1usize][..], &[3, 7], &[2, 3, 131], &[1, 1031], &[0, 5], &[131, 2]] {
        check(&format!("softmax {shape:?}"), leaves(392, &[shape]), 1e-4, |tape, x| Ok(vec![tape.softmax(x[0], false)?, tape.softmax(x[0], true)?]));
    }
}

#[test]
fn gradients_of_losses_over_sizes() {
    let criteria = [
        Criterion::Mse,
        Criterion::Huber { delta: 0.7 },
        Criterion::Bce { positive_weight: 2.0 },
        Criterion::Pinball,
        Criterion::CrossEntropy { smoothing: 0.1 },
        Criterion::Kl,
    ];
    for criterion in criteria {
        for (m, rows, columns, shared) in [(1, 1, 1, false), (2, 7, 3, false), (3, 5, 2, true), (2, 131, 5, true), (1, 3, 131, false)] {
            let narrow = matches!(criterion, Criterion::Pinball | Criterion::CrossEntropy { .. });
            let models = if shared { 1 } else { m };
            check(&format!("{criterion:?} {m}×[{rows},{columns}]"), leaves(400, &[&[m, rows, columns]]), 1e-4, |tape, x| {
                let mut rng = Rng::new(401);
                let device = tape.device().clone();
                let mut shape = vec![models, rows];
                if !narrow {
                    shape.push(columns);
                }
                let n = shape.iter().product::<usize>();
                let mut target: Vec<f32> = (0..n).map(|_| rng.unit() as f32).collect();
                if criterion == Criterion::Kl {
                    for row in target.chunks_mut(columns) {
                        let total: f32 = row.iter().sum();
                        row.iter_mut().for_each(|p| *p /= total);
                    }
                }
                let target = if matches!(criterion, Criterion::CrossEntropy { .. }) {
                    let classes: Vec<u32> = (0..n).map(|i| (i * 5 % columns) as u32).collect();
                    tape.input(&device.upload_u32("classes", &classes)?, &shape)?
                } else {
                    tape.input(&device.upload("target", &target)?, &shape)?
                };
                let weight: Vec<f32> = (0..rows).map(|_| 0.1 + rng.unit() as f32).collect();
                let weight = tape.input(&device.upload("weight", &weight)?, &[1, rows])?;
                let quantiles: Vec<f32> = (0..columns).map(|c| (c as f32 + 1.0) / (columns as f32 + 1.0)).collect();
                let quantiles = tape.input(&device.upload("quantiles", &quantiles)?, &[columns])?;
                let quantiles = (criterion == Criterion::Pinball).then_some(quantiles);
                Ok(vec![tape.loss(criterion, x[0], target, Some(weight), quantiles)?])
            });
        }
    }
}

#[test]
fn gradients_of_attention_over_sizes() {
    let causal = AttentionOptions { causal: true, ..Default::default() };
    for (i, (b, heads, queries, keys, width)) in
        [(1, 1, 1, 1, 1), (2, 3, 7, 7, 5), (1, 2, 67, 67, 8), (2, 1, 5, 11, 17), (1, 1, 3, 131, 33), (0, 2, 3, 3, 4), (1, 1, 131, 3, 67)]
            .into_iter()
            .enumerate()
    {
        let (q, k) = ([b, heads, queries, width], [b, heads, keys, width]);
        for options in [AttentionOptions { scale: Some(0.3), ..Default::default() }, AttentionOptions { window: (i % 2 == 0).then_some(2), ..causal }] {
            let name = format!("attention {q:?} {k:?} {options:?}");
            check(&name, leaves(410, &[&q, &k, &k]), 1e-4, |tape, x| Ok(vec![tape.attention(x[0], x[1], x[2], options)?.0]));
        }
        let dropout = Some(Dropout { probability: 0.3, seed: 5, stream: 1 });
        check(&format!("attention {q:?} {k:?} with bias and dropout"), leaves(411, &[&q, &k, &k, &[1, heads, queries, keys]]), 1e-4, |tape, x| {
            let step = tape.device().upload_u32("step", &[2])?;
            let step = Some(tape.input(&step, &[1])?);
            Ok(vec![tape.attention(x[0], x[1], x[2], AttentionOptions { bias: Some(x[3]), dropout, step, ..Default::default() })?.0])
        });
    }
    for (b, t, heads, width) in [(1, 1, 1, 1), (2, 7, 3, 5), (1, 67, 2, 8)] {
        let name = format!("packed attention [{b},{t},{}]", 3 * heads * width);
        check(&name, leaves(412, &[&[b, t, 3 * heads * width]]), 1e-4, |tape, x| Ok(vec![tape.attention_packed(x[0], heads, causal)?.0]));
    }
}

#[test]
fn gradients_of_recurrent_layers_over_sizes() {
    for (m, b, t, i, h) in [(1, 1, 1, 1, 1), (2, 3, 5, 7, 3), (1, 2, 3, 5, 67), (2, 17, 2, 3, 5), (1, 1, 37, 2, 2), (2, 0, 3, 2, 4)] {
        let shapes = |gates: usize| [vec![m, b, t, i], vec![m, gates * h, i], vec![m, gates * h, h], vec![m, gates * h], vec![m, h]];
        let [x, w_ih, w_hh, bias, h0] = shapes(4);
        check(&format!("lstm {m}×[{b},{t},{i}]→{h}"), leaves(420, &[&x, &w_ih, &w_hh, &bias, &h0]), 2e-4, |tape, x| {
            let resets: Vec<u32> = (0..b * t).map(|n| u32::from(n % 4 == 3)).collect();
            let resets = tape.device().upload_u32("resets", &resets)?;
            let resets = Some(tape.input(&resets, &[b, t])?);
            let (scale, layer) = (0.4, Layer { w_ih: x[1], w_hh: x[2], b_ih: Some(x[3]), b_hh: None, h0: Some(x[4]), c0: Some(x[4]) });
            let w_hh = tape.affine(layer.w_hh, scale, 0.0)?;
            let out = tape.lstm(x[0], &[Layer { w_hh, ..layer }], RecurrentOptions { resets, ..Default::default() })?;
            Ok([Some(out.y), out.hn[0], out.cn[0]].into_iter().flatten().collect())
        });
        let [x, w_ih, w_hh, bias, h0] = shapes(3);
        check(&format!("gru {m}×[{b},{t},{i}]→{h}"), leaves(421, &[&x, &w_ih, &w_hh, &bias, &bias, &h0]), 2e-4, |tape, x| {
            let w_hh = tape.affine(x[2], 0.4, 0.0)?;
            let layer = Layer { w_ih: x[1], w_hh, b_ih: Some(x[3]), b_hh: Some(x[4]), h0: Some(x[5]), c0: None };
            let out = tape.gru(x[0], &[layer], RecurrentOptions { recompute: true, ..Default::default() })?;
            Ok([Some(out.y), out.hn[0]].into_iter().flatten().collect())
        });
    }
}

/// Methods of the tape that add an op, by the files that they are in, and those that a test named `gradients_…` calls.
/// A rounded function has no difference quotient: a cast's gradient is what comes back, rounded to the storage it comes through.
#[test]
fn gradients_of_casts_over_sizes() {
    for device in open_all(&["reference", "cpu", "wgpu", "cuda-host", "cuda"]) {
        for elem in [Elem::F16, Elem::Bf16].into_iter().filter(|&elem| device.supports(elem).is_ok()) {
            for shape in SIZES {
                let mut rng = Rng::new(470);
                let [values, seeds] = [0; 2].map(|_| (0..shape.iter().product()).map(|_| rng.normal() as f32).collect::<Vec<f32>>());
                let mut tape = Tape::new(&device);
                let x = tape.variable(&device.upload("x", &values).unwrap(), shape).unwrap();
                let small = tape.cast_scaled(x, elem, 0.5).unwrap();
                let scaled = tape.cast_scaled(small, Elem::F32, 4.0).unwrap();
                let plain = tape.cast(small, Elem::F32).unwrap();
                let seed = tape.input(&device.upload("seed", &seeds).unwrap(), shape).unwrap();
                tape.backward_with(scaled, seed).unwrap();
                let mut pass = device.pass("casts");
                let plan = tape.record(&mut pass, &[scaled, plain]).unwrap();
                let reads = [plan.view(scaled).unwrap(), plan.view(plain).unwrap(), plan.grad(x).unwrap()].map(|view| pass.read(view).unwrap());
                let mut done = pass.submit().unwrap();
                let [scaled, plain, grad] = reads.map(|read| done.f64(read).unwrap());
                let rounded = |x: f32| match elem {
                    Elem::F16 => half::f16_to_f32(half::f32_to_f16(x)),
                    _ => half::bf16_to_f32(half::f32_to_bf16(x)),
                };
                let each = |x: &[f32], scale: f32, after: f64| x.iter().map(|&x| f64::from(rounded(scale * x)) * after).collect::<Vec<f64>>();
                let what = format!("{} {elem:?} {shape:?}", device.info().kind.name());
                assert_eq!((&scaled, &plain), (&each(&values, 1.0, 1.0), &each(&values, 1.0, 1.0)), "{what}");
                assert_eq!(grad, each(&seeds, 4.0, 0.5), "{what}");
            }
        }
    }
}

#[test]
fn gradients_of_hedges_over_sizes() {
    let networks = [
        (Network::Mlp { widths: vec![1], activation: Activation::Tanh }, 1, 1, 1),
        (Network::Mlp { widths: vec![5, 3], activation: Activation::Silu }, 2, 131, 4),
        (Network::Lstm { layers: 1, hidden: 3 }, 3, 7, 5),
        (Network::Lstm { layers: 2, hidden: 4 }, 1, 129, 3),
    ];
    for (i, (network, m, p, t)) in networks.into_iter().enumerate() {
        let op = HedgeRollout { claim: Claim::Given, strike: 2.0, ..HedgeRollout::new(network, m as u64, p as u64, t as u64) };
        let mut rng = Rng::new(700 + i as u32);
        let mut normals = |n: usize, scale: f32, shift: f32| (0..n).map(|_| scale * rng.normal() as f32 + shift).collect::<Vec<f32>>();
        let (risk, spot, claim) = (vec![0.002; 4 * m], normals(p * (t + 1), 0.1, 2.0), normals(p, 1.0, 0.0));
        check(&format!("rollout {:?}", op.network), leaves(710, &[&[m, op.weights() as usize]]), 1e-4, |tape, x| {
            let device = tape.device().clone();
            let mut input = |data: &[f32], shape: &[usize]| tape.input(&device.upload("market", data)?, shape);
            let (risk, spot, claim) = (input(&risk, &[m, 4])?, input(&spot, &[p, t + 1])?, input(&claim, &[p])?);
            let weights = tape.affine(x[0], 0.3, 0.0)?;
            let [pnl, _] = tape.hedge_rollout(&op, &RolloutInputs { weights, risk, spot: RolloutSpot::Given(spot), extra: None, claim: Some(claim) })?;
            Ok(vec![pnl])
        });
    }
    let risks = [
        HedgeRisk::Variance,
        HedgeRisk::MeanVariance { risk_aversion: 2.0 },
        HedgeRisk::Cvar { alpha: 0.3 },
        HedgeRisk::Entropic { risk_aversion: 1.5 },
        HedgeRisk::QuadraticCvar { lambda: 3.0 },
    ];
    for (risk, shape) in risks.into_iter().flat_map(|risk| [[1, 2], [3, 7], [2, 131], [1, 1031]].map(|shape| (risk, shape))) {
        check(&format!("{risk:?} {shape:?}"), leaves(720, &[&shape]), 1e-4, |tape, x| Ok(vec![tape.hedge_risk(risk, x[0])?]));
    }
}

#[test]
fn every_op_has_a_gradient_test() {
    let ops = [
        include_str!("../../src/ops/attention.rs"),
        include_str!("../../src/ops/black_scholes.rs"),
        include_str!("../../src/ops/cast.rs"),
        include_str!("../../src/ops/conv1d.rs"),
        include_str!("../../src/ops/dense.rs"),
        include_str!("../../src/ops/gather.rs"),
        include_str!("../../src/ops/hedge.rs"),
        include_str!("../../src/ops/loss.rs"),
        include_str!("../../src/ops/map.rs"),
        include_str!("../../src/ops/objective.rs"),
        include_str!("../../src/ops/pool.rs"),
        include_str!("../../src/ops/recurrent.rs"),
    ];
    let modules = include_str!("../../src/ops/mod.rs").lines().filter(|line| line.starts_with("mod ")).count();
    assert_eq!(modules, ops.len(), "a file of src/ops is not in this list");
    let tests: Vec<&str> = [include_str!("gradients.rs"), include_str!("ops.rs"), include_str!("pricing.rs"), include_str!("tape.rs")]
        .into_iter()
        .flat_map(|file| file.split("#[test]\n").filter(|test| test.starts_with("fn gradients_")))
        .collect();
    // Their results have no gradient.
    let without = ["attention_weights", "attention_weights_packed"];
    let mut names = Vec::new();
    for (name, rest) in ops.into_iter().flat_map(|file| file.split("    pub fn ").skip(1)).filter_map(|method| method.split_once('(')) {
        if rest.trim_start().starts_with("&mut self") {
            names.push(name);
            let call = format!("tape.{name}(");
            assert!(without.contains(&name) || tests.iter().any(|test| test.contains(&call)), "{name} has no gradient test");
        }
    }
    assert!(names.len() > 30 && names.contains(&"risk_parity") && names.contains(&"lstm"), "{names:?}");
}
