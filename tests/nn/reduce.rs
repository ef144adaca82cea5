//! Sums, means, maxima and the gradients of broadcast operands: brute force, finite differences, every device against `reference`.

use super::maps_common::*;
use forback::kernels::map::*;
use forback::kernels::reduce::*;
use forback::kernels::{Device, Error, OpenOptions, View};

/// Shapes and the axes that go.
const CASES: [(&[u64], &[usize]); 16] = [
    (&[1], &[0]),
    (&[7], &[0]),
    (&[3, 5], &[1]),
    (&[3, 5], &[0]),
    (&[3, 5], &[0, 1]),
    (&[3, 5], &[]),
    (&[2, 3, 5, 7], &[0, 2]),
    (&[2, 3, 5, 7], &[1, 3]),
    (&[2, 3, 2, 3, 2, 3], &[0, 2, 4]),
    (&[2, 3, 2, 3, 2, 3], &[1, 3, 5]),
    (&[5000], &[0]),
    (&[3, 9001], &[1]),
    (&[2500, 37], &[0]),
    (&[300, 8], &[1]),
    (&[3, 1100, 5], &[0, 1]),
    (&[70, 1, 300], &[0]),
];

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Sum,
    Mean,
}

fn run(device: &Device, kind: Kind, op: &Reduce, x: &[f32]) -> Vec<f64> {
    let (x, y) = (up(device, x), zeros(device, op.kept() as usize));
    let scratch = zeros(device, op.scratch() as usize);
    go(device, &y, |pass| match kind {
        Kind::Sum => reduce_sum(pass, op, &x, &y, Some(&scratch)),
        Kind::Mean => reduce_mean(pass, op, &x, &y, Some(&scratch)),
    })
}

fn run_max(device: &Device, op: &Reduce, x: &[f32]) -> (Vec<f64>, Vec<u32>) {
    let (x, y) = (up(device, x), zeros(device, op.kept() as usize));
    let index = words(device, &vec![9; op.kept() as usize]);
    let mut pass = device.pass("max");
    reduce_max(&mut pass, op, &x, &y, &index).unwrap();
    let (y, index) = (pass.read(&y).unwrap(), pass.read(&index).unwrap());
    let mut done = pass.submit().unwrap();
    (done.f64(y).unwrap(), done.u32(index).unwrap())
}

/// Output and reduced index of every element.
fn places(op: &Reduce) -> Vec<(usize, usize)> {
    indices(&op.dims)
        .map(|index| {
            let (mut k, mut r) = (0, 0);
            for d in 0..RANK {
                let place = if op.reduced[d] { &mut r } else { &mut k };
                *place = *place * op.dims[d] as usize + index[d] as usize;
            }
            (k, r)
        })
        .collect()
}

#[test]
fn sums_means_and_maxima_as_by_hand() {
    for (shape, axes) in CASES {
        let op = Reduce::over(shape, axes).unwrap();
        let x: Vec<f32> = values(elements(&op.dims) as usize, 1).iter().map(|v| (v * 4.0).round() / 4.0).collect();
        let mut sum = vec![0.0; op.kept() as usize];
        let mut best = vec![(f64::NEG_INFINITY, 0u32); op.kept() as usize];
        for ((k, r), &x) in places(&op).into_iter().zip(&x) {
            sum[k] += f64::from(x);
            if f64::from(x) > best[k].0 || (f64::from(x) == best[k].0 && (r as u32) < best[k].1) {
                best[k] = (f64::from(x), r as u32);
            }
        }
        let mean: Vec<f64> = sum.iter().map(|s| s / op.length() as f64).collect();
        for device in std::iter::once(reference()).chain(devices()) {
            let what = format!("{device:?} {shape:?} over {axes:?}");
            close(&format!("{what}: sum"), &run(&device, Kind::Sum, &op, &x), &sum, 1e-6, 1e-6);
            close(&format!("{what}: mean"), &run(&device, Kind::Mean, &op, &x), &mean, 1e-6, 1e-7);
            let (max, index) = run_max(&device, &op, &x);
            for k in 0..best.len() {
                assert_eq!((max[k], index[k]), best[k], "{what}: max [{k}]");
            }
        }
    }
}

#[test]
fn long_sums_keep_their_digits() {
    let n = 1 << 20;
    let op = Reduce::over(&[n], &[0]).unwrap();
    let x: Vec<f32> = values(n as usize, 3).iter().map(|v| 1.0 + 0.01 * v).collect();
    let want: f64 = x.iter().map(|&v| f64::from(v)).sum();
    for device in std::iter::once(reference()).chain(devices()) {
        let got = run(&device, Kind::Sum, &op, &x)[0];
        assert!((got - want).abs() < 3e-7 * want, "{device:?}: {got} against {want}");
    }
}

#[test]
fn gradients_of_reductions() {
    for (shape, axes) in &CASES[..10] {
        let op = Reduce::over(shape, axes).unwrap();
        let (n, kept) = (elements(&op.dims) as usize, op.kept() as usize);
        let (x, g) = (values(n, 5), values(kept, 6));
        for device in std::iter::once(reference()).chain(devices()) {
            let (grad, gv) = (zeros(&device, n), up(&device, &g));
            let (_, index) = run_max(&device, &op, &x);
            let index_view = words(&device, &index);
            let sum = go(&device, &grad, |pass| reduce_sum_backward(pass, &op, &gv, &grad));
            let mean = go(&device, &grad, |pass| reduce_mean_backward(pass, &op, &gv, &grad));
            let max = go(&device, &grad, |pass| reduce_max_backward(pass, &op, &index_view, &gv, &grad));
            for (i, (k, r)) in places(&op).into_iter().enumerate() {
                let g = f64::from(g[k]);
                assert_eq!(sum[i], g, "{device:?} {shape:?} {axes:?}");
                near(mean[i], g / op.length() as f64, 2e-7);
                assert_eq!(max[i], if index[k] as usize == r { g } else { 0.0 }, "{device:?} {shape:?} {axes:?}");
            }
        }
    }
}

#[test]
fn a_maximum_shows_nan_and_knows_no_sign_of_zero() {
    let op = Reduce::over(&[3, 400], &[1]).unwrap();
    let mut x = values(1200, 8);
    x[450] = f32::NAN;
    x[700] = f32::NAN;
    for i in 800..1200 {
        x[i] = if i == 801 { 0.0 } else { -0.0 };
    }
    for device in std::iter::once(reference()).chain(devices()) {
        let (max, index) = run_max(&device, &op, &x);
        assert!(max[0].is_finite() && max[1].is_nan() && max[2] == 0.0, "{device:?}: {max:?}");
        assert_eq!(index[1..], [50, 0], "{device:?}");
        let sum = run(&device, Kind::Sum, &op, &x);
        assert!(sum[0].is_finite() && sum[1].is_nan() && sum[2] == 0.0, "{device:?}: {sum:?}");
    }
}

#[test]
fn splits_change_no_bit() {
    for (shape, axes) in [(&[3u64, 9001][..], &[1usize][..]), (&[9001, 37], &[0]), (&[40, 7, 300], &[1]), (&[20, 3, 50, 7], &[1, 3]), (&[50_000], &[0])] {
        let op = Reduce::over(shape, axes).unwrap();
        let x = values(elements(&op.dims) as usize, 2);
        for spec in ["cpu", "wgpu", "cuda-host"] {
            let all = |options: &OpenOptions| open_with(spec, options).map(|d| (run(&d, Kind::Mean, &op, &x), run_max_bits(&d, &op, &x)));
            let Some(whole) = all(&OpenOptions::default()) else { continue };
            for options in [
                OpenOptions { binding_bytes: Some(160_000), ..OpenOptions::default() },
                OpenOptions { work_per_launch: Some(50_000), ..OpenOptions::default() },
                OpenOptions { groups_per_dimension: Some(2), ..OpenOptions::default() },
            ] {
                let split = open_with(spec, &options).map(|d| run(&d, Kind::Mean, &op, &x)).unwrap();
                assert!(split == whole.0, "{spec} {shape:?} {axes:?} {options:?}");
            }
        }
        // A part of the batch alone gives the same bits.
        if axes == [1] && shape.len() == 2 {
            for device in devices() {
                let one = Reduce::over(&[1, shape[1]], &[1]).unwrap();
                let row = &x[shape[1] as usize..2 * shape[1] as usize];
                assert_eq!(run(&device, Kind::Sum, &one, row)[0], run(&device, Kind::Sum, &op, &x)[1], "{device:?}");
            }
        }
    }
}

fn run_max_bits(device: &Device, op: &Reduce, x: &[f32]) -> (Vec<f64>, Vec<u32>) {
    run_max(device, op, x)
}

#[test]
fn gradients_of_broadcast_operands() {
    let shapes: [(&[u64], &[u64]); 6] = [(&[1], &[1]), (&[5, 7], &[7]), (&[5, 1, 3], &[4, 3]), (&[2, 3, 1, 5], &[3, 7, 1]), (&[6, 1], &[1, 5]), (&[4], &[4])];
    let functions =
        [BinaryFunction::Add, BinaryFunction::Sub, BinaryFunction::Mul, BinaryFunction::Div, BinaryFunction::Min, BinaryFunction::Max, BinaryFunction::Glu];
    for (a_shape, b_shape) in shapes {
        for function in functions {
            let op = Binary { function, a: dims(a_shape).unwrap(), b: dims(b_shape).unwrap() };
            let n = elements(&op.dims().unwrap()) as usize;
            let a = values(elements(&op.a) as usize, 1);
            // Away from 0 and from ties.
            let b: Vec<f32> = values(elements(&op.b) as usize, 2).iter().map(|v| v.signum() * (v.abs() + 0.7)).collect();
            let g = values(n, 3);
            let forward = |device: &Device, a: &[f32], b: &[f32]| {
                let (a, b, y) = (up(device, a), up(device, b), zeros(device, n));
                go(device, &y, |pass| binary(pass, &op, &a, &b, &y))
            };
            let backward = |device: &Device| {
                let (av, bv, gv) = (up(device, &a), up(device, &b), up(device, &g));
                let (ga, gb) = (zeros(device, a.len()), zeros(device, b.len()));
                let (full, parts) = (zeros(device, op.scratch_full().unwrap() as usize), zeros(device, op.scratch_parts().unwrap() as usize));
                let scratch = BinaryScratch { full: Some(&full), parts: Some(&parts) };
                let one = |grad: &View, side: bool| {
                    let (x, y) = if side { (Some(grad), None) } else { (None, Some(grad)) };
                    go(device, grad, |pass| binary_backward(pass, &op, &av, &bv, &gv, x, y, &scratch))
                };
                (one(&ga, true), one(&gb, false))
            };
            let reference = reference();
            let (grad_a, grad_b) = backward(&reference);
            gradient_is(&format!("{op:?} a"), &a, &grad_a, &g, |a| forward(&reference, a, &b));
            gradient_is(&format!("{op:?} b"), &b, &grad_b, &g, |b| forward(&reference, &a, b));
            for device in devices() {
                let (got_a, got_b) = backward(&device);
                close(&format!("{device:?} {op:?} a"), &got_a, &grad_a, 5e-6, 5e-6);
                close(&format!("{device:?} {op:?} b"), &got_b, &grad_b, 5e-6, 5e-6);
            }
        }
    }
}

#[test]
fn illegal_reductions_are_typed_errors() {
    let device = reference();
    let mut pass = device.pass("errors");
    let (x, y) = (zeros(&device, 12), zeros(&device, 3));
    let refused = |result: forback_result::Result| matches!(result, Err(Error::Shape { .. } | Error::Parameter { .. }));
    assert!(refused(Reduce::over(&[3, 4], &[2]).map(|_| ())));
    let op = Reduce::over(&[3, 4], &[0]).unwrap();
    assert!(refused(reduce_sum(&mut pass, &op, &x, &y, None)));
    let empty = Reduce::over(&[3, 0], &[1]).unwrap();
    assert!(refused(reduce_mean(&mut pass, &empty, &zeros(&device, 0), &y, None)));
    let long = Reduce::over(&[5000], &[0]).unwrap();
    assert!(refused(reduce_sum(&mut pass, &long, &zeros(&device, 5000), &zeros(&device, 1), None)), "no scratch");
    assert_eq!(pass.launches(), 0);
    assert_eq!(go(&device, &y, |pass| reduce_sum(pass, &empty, &zeros(&device, 0), &y, None)), [0.0; 3]);
}

mod forback_result {
    pub(super) type Result = forback::kernels::Result<()>;
}
