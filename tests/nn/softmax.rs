//! Softmax: columns against the f64 one, gradients, masks, splits, isolation, errors.

use super::support::{close, devices, dot, is_gradient, reference, unwritten, upload, values};
use forback::kernels::softmax::{Softmax, SoftmaxMask, softmax, softmax_backward};
use forback::kernels::{Device, Error, OpenOptions, Result, View};

/// y, grad_x.
fn run(device: &Device, op: &Softmax, x: &[f32], mask: &[u32], grad_y: &[f32]) -> Result<[Vec<f64>; 2]> {
    let n = op.rows * op.width;
    let mask = (op.mask != SoftmaxMask::None).then(|| View::from(&device.upload_u32("mask", mask).unwrap()));
    let (y, grad_x) = (unwritten(device, n), unwritten(device, n));
    let mut pass = device.pass("softmax");
    softmax(&mut pass, op, &upload(device, x), mask.as_ref(), &y)?;
    softmax_backward(&mut pass, op, &y, &upload(device, grad_y), &grad_x)?;
    let reads = [pass.read(&y)?, pass.read(&grad_x)?];
    let mut done = pass.submit()?;
    Ok(reads.map(|read| done.f64(read).unwrap()))
}

fn mask_of(op: &Softmax, seed: u64) -> Vec<u32> {
    match op.mask {
        SoftmaxMask::None => Vec::new(),
        // 0 and beyond the width among them
        SoftmaxMask::Lengths => (0..op.rows).map(|n| ((n * 7 + seed) % (op.width + 2)) as u32).collect(),
        SoftmaxMask::Words => {
            values(seed + 9, op.rows * op.width).iter().enumerate().map(|(i, &x)| u32::from(x > 0.0 && i as u64 / op.width != 1) * 3).collect()
        }
    }
}

fn ops() -> Vec<Softmax> {
    let mut all = Vec::new();
    for (rows, width) in [(1, 1), (31, 5), (20, 64), (17, 65), (3, 1000), (200, 16)] {
        for mask in [SoftmaxMask::None, SoftmaxMask::Lengths, SoftmaxMask::Words] {
            all.extend([false, true].map(|log| Softmax { rows, width, log, mask }));
        }
    }
    all
}

#[test]
fn columns_agree_with_the_reference() {
    for (i, op) in ops().iter().enumerate() {
        let (x, grad_y) = (values(i as u64, op.rows * op.width), values(50 + i as u64, op.rows * op.width));
        let x: Vec<f32> = x.iter().map(|x| 10.0 * x + 100.0).collect();
        let mask = mask_of(op, i as u64);
        let want = run(&reference(), op, &x, &mask, &grad_y).unwrap();
        for device in devices() {
            let got = run(&device, op, &x, &mask, &grad_y).unwrap();
            let atol = 1e-6 * (op.width as f64).sqrt();
            close(&format!("y of {op:?} on {}", device.info()), &got[0], &want[0], 1e-5, if op.log { 1e-5 } else { 1e-7 });
            close(&format!("grad_x of {op:?} on {}", device.info()), &got[1], &want[1], 1e-5, if op.log { 4.0 * atol } else { atol });
        }
    }
}

#[test]
fn gradients_are_those_of_finite_differences() {
    let device = reference();
    for (i, op) in ops().iter().enumerate().filter(|(_, op)| op.width < 100) {
        let (x, grad_y) = (values(i as u64, op.rows * op.width), values(50 + i as u64, op.rows * op.width));
        let mask = mask_of(op, i as u64);
        let [_, grad_x] = run(&device, op, &x, &mask, &grad_y).unwrap();
        // Masked logarithms are a constant of −1e30: leave them out of the loss.
        let loss = |x: &[f32]| {
            let y: Vec<f64> = run(&device, op, x, &mask, &grad_y).unwrap()[0].iter().map(|&y| if y < -1e29 { 0.0 } else { y }).collect();
            dot(&grad_y, &y)
        };
        is_gradient(&format!("grad_x of {op:?}"), &x, &grad_x, loss);
    }
}

#[test]
fn rows_sum_to_one_and_masked_rows_are_zero() {
    for device in devices().into_iter().chain([reference()]) {
        for mask in [SoftmaxMask::Lengths, SoftmaxMask::Words] {
            let op = Softmax { rows: 4, width: 70, log: false, mask };
            let words: Vec<u32> =
                if mask == SoftmaxMask::Lengths { vec![70, 3, 0, 200] } else { (0..280).map(|i| u32::from(i / 70 != 2 && i % 3 == 0)).collect() };
            let x: Vec<f32> = values(1, 280).iter().map(|x| 1e4 * x).collect();
            let [y, grad_x] = run(&device, &op, &x, &words, &values(2, 280)).unwrap();
            for n in [0, 1, 3] {
                let sum: f64 = y[n * 70..(n + 1) * 70].iter().sum();
                assert!((sum - 1.0).abs() < 1e-6, "{} row {n}: {sum}", device.info());
            }
            assert!(y[140..210].iter().chain(&grad_x[140..210]).all(|&v| v == 0.0), "{}", device.info());
            let [y, grad_x] = run(&device, &Softmax { log: true, ..op }, &x, &words, &values(2, 280)).unwrap();
            assert!(y[140..210].iter().all(|&v| v < -9e29) && grad_x[140..210].iter().all(|&v| v == 0.0), "{}", device.info());
        }
    }
}

#[test]
fn a_shift_changes_nothing_and_large_values_stay_finite() {
    let op = Softmax { rows: 9, width: 33, log: false, mask: SoftmaxMask::None };
    let x: Vec<f32> = values(3, 297).iter().map(|x| (x * 64.0).round() / 64.0).collect();
    let moved: Vec<f32> = x.iter().map(|x| x + 4096.0).collect();
    for device in devices() {
        let grad_y = values(4, 297);
        assert_eq!(run(&device, &op, &x, &[], &grad_y).unwrap(), run(&device, &op, &moved, &[], &grad_y).unwrap(), "{}", device.info());
        let huge: Vec<f32> = x.iter().map(|x| x * 1e20).collect();
        assert!(run(&device, &op, &huge, &[], &grad_y).unwrap().iter().flatten().all(|v| v.is_finite()), "{}", device.info());
    }
}

#[test]
fn splitting_the_batch_changes_no_bit_and_a_nan_stays_in_its_row() {
    let op = Softmax { rows: 500, width: 21, log: true, mask: SoftmaxMask::Lengths };
    let (mut x, grad_y, mask) = (values(5, 10_500), values(6, 10_500), mask_of(&op, 1));
    for name in ["cpu", "wgpu", "cuda-host"] {
        let options = OpenOptions { binding_bytes: Some(4 * 21 * 64), ..OpenOptions::default() };
        let (Ok(whole), Ok(split)) = (Device::open(name), Device::open_with(name, &options)) else { continue };
        assert_eq!(run(&whole, &op, &x, &mask, &grad_y).unwrap(), run(&split, &op, &x, &mask, &grad_y).unwrap(), "{name}");
        let clean = run(&whole, &op, &x, &mask, &grad_y).unwrap();
        let kept = std::mem::replace(&mut x[30 * 21], f32::NAN);
        let dirty = run(&whole, &op, &x, &mask, &grad_y).unwrap();
        x[30 * 21] = kept;
        for (clean, dirty) in clean.iter().zip(&dirty) {
            assert_eq!((&clean[..630], &clean[651..]), (&dirty[..630], &dirty[651..]), "{name}");
        }
    }
}

#[test]
fn wrong_sizes_are_typed_errors() {
    let device = Device::open("cpu").unwrap();
    let op = Softmax { rows: 2, width: 3, log: false, mask: SoftmaxMask::Lengths };
    assert!(matches!(Softmax { width: 0, ..op }.check(), Err(Error::Parameter { op: "softmax", .. })));
    let mut pass = device.pass("softmax");
    let view = |len| unwritten(&device, len);
    let lengths = |len: usize| View::from(&device.upload_u32("mask", &vec![1; len]).unwrap());
    assert!(matches!(softmax(&mut pass, &op, &view(6), None, &view(6)), Err(Error::Shape { arg, .. }) if arg == "mask"));
    assert!(matches!(softmax(&mut pass, &op, &view(6), Some(&lengths(3)), &view(6)), Err(Error::Shape { arg, .. }) if arg == "mask"));
    assert!(matches!(softmax(&mut pass, &op, &view(6), Some(&view(2)), &view(6)), Err(Error::Shape { arg, .. }) if arg == "mask"));
    assert!(matches!(softmax(&mut pass, &op, &view(5), Some(&lengths(2)), &view(6)), Err(Error::Shape { arg, .. }) if arg == "x"));
    assert_eq!(pass.launches(), 0);
}
