//! Element-wise functions, strided copies, fill and dropout: closed forms, finite differences, every device against `reference`.

use super::maps_common::*;
use forback::kernels::map::*;
use forback::kernels::philox::philox4x32;
use forback::kernels::{Device, Error, OpenOptions, Result};

const UNARY: [Unary; 20] = [
    Unary::Copy,
    Unary::Neg,
    Unary::Exp,
    Unary::Log,
    Unary::Log1p,
    Unary::Sqrt,
    Unary::Square,
    Unary::Abs,
    Unary::Sign,
    Unary::Reciprocal,
    Unary::Relu,
    Unary::Gelu,
    Unary::Tanh,
    Unary::Sigmoid,
    Unary::Silu,
    Unary::Softplus,
    Unary::Clamp { lo: -0.5, hi: 0.75 },
    Unary::Affine { scale: -1.5, shift: 0.25 },
    Unary::Power { p: 2.5 },
    Unary::Step,
];
const FUNCTIONS: [BinaryFunction; 7] =
    [BinaryFunction::Add, BinaryFunction::Sub, BinaryFunction::Mul, BinaryFunction::Div, BinaryFunction::Min, BinaryFunction::Max, BinaryFunction::Glu];

/// Inputs where the function is defined.
fn input(op: Unary, n: usize, seed: u32) -> Vec<f32> {
    let positive = matches!(op, Unary::Log | Unary::Sqrt | Unary::Power { .. } | Unary::Log1p | Unary::Reciprocal);
    values(n, seed).into_iter().map(|x| if positive { x.abs() + 0.05 } else { x }).collect()
}

fn run_unary(device: &Device, op: Unary, x: &[f32]) -> Vec<f64> {
    let (x, y) = (up(device, x), zeros(device, x.len()));
    go(device, &y, |pass| unary(pass, op, &x, &y))
}

fn run_unary_backward(device: &Device, op: Unary, x: &[f32], g: &[f32]) -> Vec<f64> {
    let (x, g, y, grad) = (up(device, x), up(device, g), zeros(device, x.len()), zeros(device, x.len()));
    go(device, &grad, |pass| {
        unary(pass, op, &x, &y)?;
        let kept = match op.keeps() {
            Kept::Nothing => None,
            Kept::Input => Some(&x),
            Kept::Output => Some(&y),
        };
        unary_backward(pass, op, kept, &g, &grad)
    })
}

#[test]
fn unary_closed_forms() {
    let device = reference();
    let x = [0.3f32, 1.7, 2.0, 0.001];
    let f = |op| run_unary(&device, op, &x);
    for (i, x) in x.iter().map(|&x| f64::from(x)).enumerate() {
        near(f(Unary::Exp)[i], x.exp(), 1e-15);
        near(f(Unary::Softplus)[i], x.exp().ln_1p(), 1e-14);
        near(f(Unary::Silu)[i], x / (1.0 + (-x).exp()), 1e-14);
        near(f(Unary::Power { p: 2.5 })[i], x.powf(2.5), 1e-14);
    }
    // Φ at 1, −1, 4, −6, from tables of the error function.
    let gelu = run_unary(&device, Unary::Gelu, &[1.0, -1.0, 4.0, -6.0]);
    for (got, want) in gelu.iter().zip([0.841_344_746_068_542_9, -0.158_655_253_931_457_05, 3.999_873_315_032_667_6, -5.919_525_870_226_168e-9]) {
        near(*got, want, 1e-14);
    }
}

#[test]
fn unary_gradients_are_finite_differences() {
    let device = reference();
    for op in UNARY {
        let x = input(op, 37, 3);
        let g = values(37, 4);
        let grad = run_unary_backward(&device, op, &x, &g);
        for i in 0..x.len() {
            let (low, high, h) = around(&x, i, 1e-3);
            if matches!(op, Unary::Sign | Unary::Step | Unary::Relu | Unary::Abs) && x[i].abs() < 2e-3 {
                continue;
            }
            if matches!(op, Unary::Clamp { .. }) && ((x[i] + 0.5).abs() < 2e-3 || (x[i] - 0.75).abs() < 2e-3) {
                continue;
            }
            let slope = (run_unary(&device, op, &high)[i] - run_unary(&device, op, &low)[i]) / h;
            let want = slope * f64::from(g[i]);
            assert!((grad[i] - want).abs() <= 2e-4 * (1.0 + want.abs()), "{op:?} at {}: {} against {want}", x[i], grad[i]);
        }
    }
}

#[test]
fn unary_on_every_device() {
    let reference = reference();
    for device in devices() {
        for op in UNARY {
            for n in [1usize, 63, 1025] {
                let (x, g) = (input(op, n, n as u32), values(n, 7));
                close(&format!("{device:?} {op:?} {n}"), &run_unary(&device, op, &x), &run_unary(&reference, op, &x), 2e-6, 1e-6);
                let what = format!("{device:?} {op:?} backward {n}");
                close(&what, &run_unary_backward(&device, op, &x, &g), &run_unary_backward(&reference, op, &x, &g), 4e-6, 2e-6);
            }
        }
        for (op, x, want) in [
            (Unary::Exp, -200.0, 0.0),
            (Unary::Exp, 88.5, 88.5f64.exp()),
            (Unary::Exp, 1000.0, f64::INFINITY),
            (Unary::Sigmoid, -1e4, 0.0),
            (Unary::Sigmoid, 1e4, 1.0),
            (Unary::Tanh, -1e4, -1.0),
            (Unary::Softplus, 1e4, 1e4),
            (Unary::Softplus, -1e4, 0.0),
            (Unary::Gelu, -1e4, 0.0),
            (Unary::Gelu, 1e4, 1e4),
            (Unary::Silu, -1e4, 0.0),
            (Unary::Log, 0.0, f64::NEG_INFINITY),
            (Unary::Power { p: 3.0 }, -2.0, -8.0),
            (Unary::Power { p: -2.0 }, -2.0, 0.25),
            (Unary::Power { p: 0.5 }, 0.0, 0.0),
            (Unary::Power { p: 0.0 }, 0.0, 1.0),
        ] {
            let got = run_unary(&device, op, &[x])[0];
            assert!(got == want || (got - want).abs() <= 3e-6 * want.abs() + 1e-30, "{device:?} {op:?}({x}) = {got}, expected {want}");
        }
        for op in [Unary::Log, Unary::Sqrt, Unary::Power { p: 0.3 }] {
            assert!(run_unary(&device, op, &[-1.0])[0].is_nan(), "{device:?} {op:?}(-1)");
        }
    }
}

#[test]
fn nan_stays_where_it_is() {
    for device in devices() {
        for op in UNARY {
            let mut x = input(op, 300, 5);
            let clean = run_unary(&device, op, &x);
            x[17] = f32::NAN;
            let got = run_unary(&device, op, &x);
            for i in 0..300 {
                assert!(if i == 17 { got[i].is_nan() } else { got[i] == clean[i] }, "{device:?} {op:?} [{i}] = {}", got[i]);
            }
        }
    }
}

fn run_binary(device: &Device, op: &Binary, a: &[f32], b: &[f32]) -> Vec<f64> {
    let y = zeros(device, elements(&op.dims().unwrap()) as usize);
    let (a, b) = (up(device, a), up(device, b));
    go(device, &y, |pass| binary(pass, op, &a, &b, &y))
}

#[test]
fn binary_broadcasts_as_by_hand() {
    let shapes: [(&[u64], &[u64]); 8] = [
        (&[5000, 5], &[5]),
        (&[1], &[1]),
        (&[7], &[7]),
        (&[5, 7], &[7]),
        (&[5, 1, 3], &[4, 3]),
        (&[2, 3, 1, 5], &[3, 7, 1]),
        (&[300, 5], &[300, 1]),
        (&[2, 1, 3, 1, 2, 1], &[1, 3, 1, 2, 1, 4]),
    ];
    let reference = reference();
    for (a_shape, b_shape) in shapes {
        for function in FUNCTIONS {
            let op = Binary { function, a: dims(a_shape).unwrap(), b: dims(b_shape).unwrap() };
            let out = op.dims().unwrap();
            let (a, b) = (values(elements(&op.a) as usize, 1), values(elements(&op.b) as usize, 2));
            let at = |from: &Dims, index: &Dims| (0..RANK).fold(0, |at, d| at * from[d] + if from[d] == 1 { 0 } else { index[d] }) as usize;
            let want: Vec<f64> = indices(&out)
                .map(|index| {
                    let (a, b) = (f64::from(a[at(&op.a, &index)]), f64::from(b[at(&op.b, &index)]));
                    match function {
                        BinaryFunction::Add => a + b,
                        BinaryFunction::Sub => a - b,
                        BinaryFunction::Mul => a * b,
                        BinaryFunction::Div => a / b,
                        BinaryFunction::Min => a.min(b),
                        BinaryFunction::Max => a.max(b),
                        BinaryFunction::Glu => a / (1.0 + (-b).exp()),
                    }
                })
                .collect();
            close("reference", &run_binary(&reference, &op, &a, &b), &want, 1e-12, 1e-13);
            for device in devices() {
                close(&format!("{device:?} {op:?}"), &run_binary(&device, &op, &a, &b), &want, 2e-6, 1e-7);
            }
        }
    }
}

#[test]
fn copies_transpose_slice_and_concatenate() {
    let all = std::iter::once(reference()).chain(devices());
    for device in all {
        for (r, c) in [(1u64, 1u64), (5, 7), (37, 65), (64, 300)] {
            let n = (r * c) as usize;
            let x = values(n, 9);
            let transpose = CopyStrided {
                dims: dims(&[c, r]).unwrap(),
                from: Layout { offset: 0, strides: [0, 0, 0, 0, 1, c] },
                to: Layout::row_major(&dims(&[c, r]).unwrap()),
                add: false,
            };
            let (view, y) = (up(&device, &x), zeros(&device, n));
            let got = go(&device, &y, |pass| copy_strided(pass, &transpose, &view, &y));
            for i in 0..r as usize {
                for j in 0..c as usize {
                    assert_eq!(got[j * r as usize + i], f64::from(x[i * c as usize + j]), "{device:?} transpose {r}×{c}");
                }
            }
            // [x | x]: two halves of each row, the second added to ones.
            let y = zeros(&device, 2 * n);
            let half = |offset, add| CopyStrided {
                dims: dims(&[r, c]).unwrap(),
                from: Layout::row_major(&dims(&[r, c]).unwrap()),
                to: Layout { offset, strides: [0, 0, 0, 0, 2 * c, 1] },
                add,
            };
            let got = go(&device, &y, |pass| {
                fill(pass, 1.0, &y)?;
                copy_strided(pass, &half(0, false), &view, &y)?;
                copy_strided(pass, &half(c, true), &view, &y)
            });
            for (i, &v) in got.iter().enumerate() {
                let (row, col) = (i / (2 * c as usize), i % (2 * c as usize));
                let from = x[row * c as usize + col % c as usize];
                near(v, f64::from(from) + if col < c as usize { 0.0 } else { 1.0 }, 3e-7);
            }
        }
        // A view that does not start its buffer, and a scalar spread over six dimensions.
        let y = zeros(&device, 2 * 3 * 2 * 5);
        let shape = [2, 3, 1, 2, 5, 1];
        let got = go(&device, &y, |pass| broadcast(pass, 2, &[1; 6], &shape, &up(&device, &[3.0]), &y));
        assert!(got.iter().all(|&v| v == 1.5), "{device:?}");
        let (x, y) = (up(&device, &[1.0, 2.0]), up(&device, &[10.0, 20.0]));
        assert_eq!(go(&device, &y, |pass| accumulate(pass, -2.0, &x, &y)), [8.0, 16.0], "{device:?}");
    }
}

#[test]
fn a_split_changes_no_bit() {
    let (x, b) = (values(3 * 64 * 1001, 1), values(1001, 2));
    let op = Binary { function: BinaryFunction::Glu, a: dims(&[3, 64, 1001]).unwrap(), b: dims(&[1001]).unwrap() };
    let transpose = CopyStrided {
        dims: dims(&[1001, 192]).unwrap(),
        from: Layout { offset: 0, strides: [0, 0, 0, 0, 1, 1001] },
        to: Layout::row_major(&dims(&[1001, 192]).unwrap()),
        add: false,
    };
    for spec in ["cpu", "wgpu", "cuda-host"] {
        let run = |options: &OpenOptions| -> Option<[Vec<f64>; 4]> {
            let device = open_with(spec, options)?;
            let (x, step, y) = (up(&device, &x), words(&device, &[3]), zeros(&device, x.len()));
            let dropped = go(&device, &y, |pass| dropout(pass, &Dropout { p: 0.3, seed: 1 << 40, stream: 4 }, &step, &x, &y));
            let moved = go(&device, &y, |pass| copy_strided(pass, &transpose, &x, &y));
            let filled = go(&device, &y, |pass| fill(pass, 0.25, &y));
            let b = up(&device, &b);
            Some([go(&device, &y, |pass| binary(pass, &op, &x, &b, &y)), dropped, moved, filled])
        };
        let Some(whole) = run(&OpenOptions::default()) else { continue };
        for options in [
            OpenOptions { binding_bytes: Some(100_000), ..OpenOptions::default() },
            OpenOptions { work_per_launch: Some(300_000), ..OpenOptions::default() },
            OpenOptions { groups_per_dimension: Some(3), ..OpenOptions::default() },
        ] {
            assert!(run(&options).unwrap() == whole, "{spec} {options:?}");
        }
    }
}

#[test]
fn dropout_keeps_the_same_elements_everywhere() {
    let n = 4099;
    let x = values(n, 6);
    for p in [0.0f32, 0.25, 1.0] {
        let op = Dropout { p, seed: 0x9abc_def0_1234_5678, stream: 9 };
        let key = [0x1234_5678, 0x9abc_def0, 5];
        let want: Vec<f64> = (0..n)
            .map(|i| {
                let word = philox4x32([i as u32 / 4, 0, 9, 5], [key[0], key[1]])[i % 4];
                let kept = f64::from(word) >= f64::from(p) * 4_294_967_296.0;
                if kept { f64::from(x[i]) / (1.0 - f64::from(p)) } else { 0.0 }
            })
            .collect();
        let share = want.iter().filter(|&&v| v == 0.0).count() as f64 / n as f64;
        assert!((share - f64::from(p)).abs() < 0.03, "{share} dropped, {p} expected");
        for device in std::iter::once(reference()).chain(devices()) {
            let (x, y) = (up(&device, &x), zeros(&device, n));
            let step = words(&device, &[5]);
            close(&format!("{device:?}"), &go(&device, &y, |pass| dropout(pass, &op, &step, &x, &y)), &want, 2e-7, 0.0);
        }
    }
}

#[test]
fn gates_and_their_gradients() {
    let (rows, width) = (5u64, 7u64);
    let n = (rows * width) as usize;
    let op = GluHalves { rows, width };
    let (x, g) = (values(2 * n, 1), values(n, 2));
    let forward = |device: &Device, x: &[f32]| {
        let (x, y) = (up(device, x), zeros(device, n));
        go(device, &y, |pass| glu(pass, &op, &x, &y))
    };
    let backward = |device: &Device| {
        let (x, g, grad) = (up(device, &x), up(device, &g), zeros(device, 2 * n));
        go(device, &grad, |pass| glu_backward(pass, &op, &x, &g, &grad))
    };
    let reference = reference();
    let grad = backward(&reference);
    gradient_is("glu", &x, &grad, &g, |x| forward(&reference, x));
    for device in devices() {
        close(&format!("{device:?} glu"), &forward(&device, &x), &forward(&reference, &x), 2e-6, 1e-7);
        close(&format!("{device:?} glu backward"), &backward(&device), &grad, 2e-6, 1e-7);
    }

    let parts = [values(n, 3), values(n, 4), values(n, 5)];
    let mix = |device: &Device, parts: &[Vec<f32>; 3]| {
        let [x, y, gate] = parts.each_ref().map(|v| up(device, v));
        let out = zeros(device, n);
        go(device, &out, |pass| gated_residual(pass, &x, &y, &gate, &out))
    };
    for wanted in 0..3 {
        let backward = |device: &Device| {
            let [x, y, gate] = parts.each_ref().map(|v| up(device, v));
            let (g, grad) = (up(device, &g), zeros(device, n));
            let pick = |k| (k == wanted).then_some(&grad);
            let grads = GatedResidualGrads { x: pick(0), y: pick(1), gate: pick(2) };
            go(device, &grad, |pass| gated_residual_backward(pass, &x, &y, &gate, &g, &grads))
        };
        let grad = backward(&reference);
        gradient_is("gated residual", &parts[wanted], &grad, &g, |v| {
            let mut parts = parts.clone();
            parts[wanted] = v.to_vec();
            mix(&reference, &parts)
        });
        for device in devices() {
            close(&format!("{device:?} gated residual"), &mix(&device, &parts), &mix(&reference, &parts), 2e-6, 1e-7);
            close(&format!("{device:?} gated residual backward"), &backward(&device), &grad, 2e-6, 1e-7);
        }
    }
}

#[test]
fn illegal_calls_are_typed_errors() {
    let device = reference();
    let (x, y) = (zeros(&device, 6), zeros(&device, 5));
    let refused = |result: Result<()>| matches!(result, Err(Error::Shape { .. } | Error::Parameter { .. }));
    let mut pass = device.pass("errors");
    assert!(refused(unary(&mut pass, Unary::Exp, &x, &y)));
    assert!(refused(unary(&mut pass, Unary::Clamp { lo: 1.0, hi: 0.0 }, &x, &zeros(&device, 6))));
    assert!(refused(unary_backward(&mut pass, Unary::Exp, None, &x, &zeros(&device, 6))));
    assert!(refused(dims(&[1; 7]).map(|_| ())));
    assert!(refused(Binary { function: BinaryFunction::Add, a: dims(&[2]).unwrap(), b: dims(&[3]).unwrap() }.check()));
    let step = words(&device, &[5]);
    assert!(refused(dropout(&mut pass, &Dropout { p: 1.5, seed: 0, stream: 0 }, &step, &x, &zeros(&device, 6))));
    let region = |offset, stride| CopyStrided {
        dims: dims(&[6]).unwrap(),
        from: Layout::row_major(&dims(&[6]).unwrap()),
        to: Layout { offset, strides: [0, 0, 0, 0, 0, stride] },
        add: false,
    };
    assert!(refused(copy_strided(&mut pass, &region(1, 1), &x, &zeros(&device, 6))), "leaves the view");
    assert!(refused(copy_strided(&mut pass, &region(0, 0), &x, &zeros(&device, 6))), "elements coincide");
    assert!(unary(&mut pass, Unary::Exp, &zeros(&device, 0), &zeros(&device, 0)).is_ok());
    assert_eq!(pass.launches(), 0);
}
