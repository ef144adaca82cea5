//! Layer normalisation: columns against the f64 one, gradients against finite differences, offsets, splits, isolation, errors.

use super::support::{close, devices, dot, is_gradient, reference, unwritten, upload, values};
use forback::kernels::layer_norm::{LayerNorm, LayerNormArgs, LayerNormBackwardArgs, layer_norm, layer_norm_backward};
use forback::kernels::{Device, Error, OpenOptions, Result};

struct Data {
    x: Vec<f32>,
    weight: Vec<f32>,
    bias: Vec<f32>,
    grad_y: Vec<f32>,
}

impl Data {
    fn of(op: &LayerNorm, seed: u64) -> Data {
        let (n, m) = (op.rows * op.width, op.models * op.width);
        Data { x: values(seed, n), weight: values(seed + 1, m), bias: values(seed + 2, m), grad_y: values(seed + 3, n) }
    }
}

/// y, grad_x, grad_weight, grad_bias.
fn run(device: &Device, op: &LayerNorm, data: &Data) -> Result<[Vec<f64>; 4]> {
    let (n, m) = (op.rows * op.width, op.models * op.width);
    let weight = op.weight.then(|| upload(device, &data.weight));
    let args = LayerNormArgs {
        x: upload(device, &data.x),
        weight: weight.clone(),
        bias: op.bias.then(|| upload(device, &data.bias)),
        y: unwritten(device, n),
        saved: unwritten(device, op.saved()),
    };
    let mut pass = device.pass("layer_norm");
    layer_norm(&mut pass, op, &args)?;
    let back = LayerNormBackwardArgs {
        x: args.x.clone(),
        weight,
        saved: args.saved.clone(),
        grad_y: upload(device, &data.grad_y),
        grad_x: Some(unwritten(device, n)),
        grad_weight: Some(unwritten(device, m)),
        grad_bias: Some(unwritten(device, m)),
        scratch: unwritten(device, op.scratch_backward(device)),
    };
    layer_norm_backward(&mut pass, op, &back)?;
    let outs = [Some(args.y), back.grad_x, back.grad_weight, back.grad_bias];
    let reads = outs.map(|view| pass.read(view.as_ref().unwrap()).unwrap());
    let mut done = pass.submit()?;
    Ok(reads.map(|read| done.f64(read).unwrap()))
}

fn op(models: u64, rows: u64, width: u64, weight: bool, bias: bool) -> LayerNorm {
    LayerNorm { models, rows, width, eps: 1e-5, weight, bias }
}

fn shapes() -> Vec<LayerNorm> {
    vec![
        op(1, 1, 1, true, true),
        op(1, 7, 5, true, true),
        op(3, 33, 64, true, true),
        op(2, 10, 65, true, false),
        op(1, 5, 129, false, true),
        op(4, 12, 31, false, false),
        op(1, 1500, 17, true, true),
        op(2, 300, 140, true, true),
        op(50, 100, 3, true, true),
    ]
}

#[test]
fn columns_agree_with_the_reference() {
    for (i, op) in shapes().iter().enumerate() {
        let data = Data::of(op, 10 * i as u64);
        let want = run(&reference(), op, &data).unwrap();
        for device in devices() {
            let got = run(&device, op, &data).unwrap();
            for (name, (got, want)) in ["y", "grad_x", "grad_weight", "grad_bias"].iter().zip(got.iter().zip(&want)) {
                let size = want.iter().fold(1.0f64, |a, b| a.max(b.abs()));
                close(&format!("{name} of {op:?} on {}", device.info()), got, want, 1e-4, 2e-6 * size);
            }
        }
    }
}

#[test]
fn an_offset_costs_no_digits() {
    let op = op(1, 20, 96, true, true);
    let mut data = Data::of(&op, 4);
    // Values that f32 holds exactly at an offset of 1000.
    data.x.iter_mut().for_each(|x| *x = (*x * 1024.0).round() / 1024.0);
    let mut moved = Data::of(&op, 4);
    moved.x = data.x.iter().map(|x| x + 1000.0).collect();
    for device in devices() {
        let (plain, moved) = (run(&device, &op, &data).unwrap(), run(&device, &op, &moved).unwrap());
        for (plain, moved) in plain.iter().zip(&moved) {
            close(&format!("{}", device.info()), moved, plain, 1e-6, 1e-6);
        }
    }
}

#[test]
fn gradients_are_those_of_finite_differences() {
    let device = reference();
    for (i, op) in shapes().iter().enumerate().filter(|(_, op)| op.rows < 200 && op.width > 3) {
        let data = Data::of(op, 100 + i as u64);
        let [_, grad_x, grad_weight, grad_bias] = run(&device, op, &data).unwrap();
        let loss = |x: &[f32], weight: &[f32], bias: &[f32]| {
            let moved = Data { x: x.to_vec(), weight: weight.to_vec(), bias: bias.to_vec(), grad_y: data.grad_y.clone() };
            dot(&data.grad_y, &run(&device, op, &moved).unwrap()[0])
        };
        is_gradient(&format!("grad_x of {op:?}"), &data.x, &grad_x, |x| loss(x, &data.weight, &data.bias));
        if op.weight {
            is_gradient(&format!("grad_weight of {op:?}"), &data.weight, &grad_weight, |w| loss(&data.x, w, &data.bias));
        }
        if op.bias {
            is_gradient(&format!("grad_bias of {op:?}"), &data.bias, &grad_bias, |b| loss(&data.x, &data.weight, b));
        }
    }
}

#[test]
fn splitting_the_batch_changes_no_bit() {
    for op in [op(3, 999, 10, true, true), op(2, 400, 70, true, true)] {
        let data = Data::of(&op, 8);
        let options = OpenOptions { binding_bytes: Some(4 * 64 * 2 * 81), ..OpenOptions::default() };
        for name in ["cpu", "wgpu", "cuda-host"] {
            let (Ok(whole), Ok(split)) = (Device::open(name), Device::open_with(name, &options)) else { continue };
            assert_eq!(run(&whole, &op, &data).unwrap(), run(&split, &op, &data).unwrap(), "{name} {op:?}");
        }
    }
}

#[test]
fn a_nan_stays_in_its_row_and_model() {
    let op = op(3, 12, 20, true, true);
    let clean = Data::of(&op, 5);
    let mut dirty = Data::of(&op, 5);
    dirty.x[5 * 20 + 3] = f32::NAN; // a row of model 1
    for device in devices() {
        let (want, got) = (run(&device, &op, &clean).unwrap(), run(&device, &op, &dirty).unwrap());
        for i in [0, 1] {
            assert_eq!(want[i][..100], got[i][..100]);
            assert_eq!(want[i][120..], got[i][120..]);
        }
        for i in [2, 3] {
            assert_eq!(want[i][..20], got[i][..20]);
            assert_eq!(want[i][40..], got[i][40..]);
        }
        assert!(got[0][100..120].iter().all(|y| y.is_nan()), "{}", device.info());
    }
}

#[test]
fn wrong_sizes_are_typed_errors() {
    let good = op(2, 4, 3, true, true);
    for wrong in [LayerNorm { models: 0, ..good }, LayerNorm { rows: 5, ..good }, LayerNorm { width: 0, ..good }, LayerNorm { eps: 0.0, ..good }] {
        assert!(matches!(wrong.check(), Err(Error::Parameter { op: "layer_norm", .. })), "{wrong:?}");
    }
    let device = Device::open("cpu").unwrap();
    let mut pass = device.pass("layer_norm");
    let view = |len| unwritten(&device, len);
    let args = LayerNormArgs { x: view(12), weight: None, bias: Some(view(6)), y: view(12), saved: view(8) };
    assert!(matches!(layer_norm(&mut pass, &good, &args), Err(Error::Shape { arg, .. }) if arg == "weight"));
    let args = LayerNormArgs { weight: Some(view(6)), y: view(11), ..args };
    assert!(matches!(layer_norm(&mut pass, &good, &args), Err(Error::Shape { arg, .. }) if arg == "y"));
    let nothing = LayerNormArgs { x: view(0), y: view(0), saved: view(0), ..args };
    layer_norm(&mut pass, &LayerNorm { rows: 0, ..good }, &nothing).unwrap();
    assert_eq!(pass.launches(), 0);
}
