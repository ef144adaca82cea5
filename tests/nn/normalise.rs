//! Rows of unit length: by hand, finite differences, extremes, every device against `reference`.

use super::maps_common::*;
use forback::kernels::normalise::*;
use forback::kernels::{Device, Error, OpenOptions};

const CASES: [(u64, u64); 7] = [(1, 1), (5, 3), (37, 8), (3, 255), (2, 257), (1, 5000), (600, 5)];

fn forward(device: &Device, op: &Normalise, x: &[f32]) -> Vec<f64> {
    let (x, y) = (up(device, x), zeros(device, x.len()));
    go(device, &y, |pass| normalise(pass, op, &x, &y))
}

fn backward(device: &Device, op: &Normalise, x: &[f32], g: &[f32]) -> Vec<f64> {
    let (x, g, grad) = (up(device, x), up(device, g), zeros(device, x.len()));
    go(device, &grad, |pass| normalise_backward(pass, op, &x, &g, &grad))
}

#[test]
fn rows_have_unit_length_and_gradients_are_finite_differences() {
    let reference = reference();
    for (rows, width) in CASES {
        let op = Normalise { rows, width, eps: 1e-12 };
        let (x, g) = (values((rows * width) as usize, 1), values((rows * width) as usize, 2));
        let y = forward(&reference, &op, &x);
        for row in y.chunks(width as usize) {
            near(row.iter().map(|v| v * v).sum::<f64>(), 1.0, 1e-12);
        }
        let grad = backward(&reference, &op, &x, &g);
        if x.len() < 800 && width > 1 {
            gradient_is(&format!("{rows}×{width}"), &x, &grad, &g, |x| forward(&reference, &op, x));
        }
        for device in devices() {
            close(&format!("{device:?} {rows}×{width}"), &forward(&device, &op, &x), &y, 2e-6, 1e-7);
            close(&format!("{device:?} {rows}×{width} backward"), &backward(&device, &op, &x, &g), &grad, 1e-5, 3e-6);
        }
    }
}

#[test]
fn extremes_and_the_least_norm() {
    let op = Normalise { rows: 5, width: 2, eps: 1e-3 };
    let x = [3e30, 4e30, 3e-4, 4e-4, 0.0, 0.0, f32::NAN, 1.0, 0.6, 0.8];
    let want = [0.6, 0.8, 0.3, 0.4, 0.0, 0.0];
    for device in std::iter::once(reference()).chain(devices()) {
        let y = forward(&device, &op, &x);
        close(&format!("{device:?}"), &y[..6], &want, 1e-6, 0.0);
        assert!(y[6].is_nan() && y[7].is_nan(), "{device:?}");
        close(&format!("{device:?}"), &y[8..], &[0.6, 0.8], 1e-6, 0.0);
        let grad = backward(&device, &op, &x, &[1.0; 10]);
        close(&format!("{device:?}"), &grad[2..6], &[1e3; 4], 1e-6, 0.0);
    }
    let op = Normalise { rows: 1, width: 2, eps: 1e-12 };
    for device in devices() {
        let y = forward(&device, &op, &[3e-30, 4e-30]);
        close(&format!("{device:?}"), &y, &[3e-18, 4e-18], 1e-6, 0.0);
    }
    assert!(matches!(Normalise { eps: 0.0, ..op }.check(), Err(Error::Parameter { .. })));
}

#[test]
fn splits_change_no_bit() {
    let op = Normalise { rows: 100, width: 77, eps: 1e-12 };
    let (x, g) = (values(7700, 1), values(7700, 2));
    for spec in ["wgpu", "cuda-host"] {
        let run = |options: &OpenOptions| open_with(spec, options).map(|d| (forward(&d, &op, &x), backward(&d, &op, &x, &g)));
        let Some(whole) = run(&OpenOptions::default()) else { continue };
        for options in
            [OpenOptions { work_per_launch: Some(3000), ..OpenOptions::default() }, OpenOptions { binding_bytes: Some(5000), ..OpenOptions::default() }]
        {
            assert!(run(&options).unwrap() == whole, "{spec} {options:?}");
        }
    }
}
