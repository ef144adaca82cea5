//! Dense layers: columns against the f64 one, gradients against finite differences, splits, isolation, errors.

use super::support::{close, devices, dot, is_gradient, reference, unwritten, upload, values};
use forback::kernels::activation::Activation;
use forback::kernels::kernel::Elem;
use forback::kernels::linear::{Linear, LinearArgs, LinearBackwardArgs, linear, linear_backward};
use forback::kernels::{Device, Error, OpenOptions, Result};

struct Data {
    x: Vec<f32>,
    weight: Vec<f32>,
    bias: Option<Vec<f32>>,
    grad_y: Vec<f32>,
}

impl Data {
    fn of(op: &Linear, seed: u64) -> Data {
        let scale = 1.0 / (op.inputs as f32).sqrt();
        Data {
            x: values(seed, op.x_models * op.rows * op.inputs),
            weight: values(seed + 1, op.models * op.outputs * op.inputs).iter().map(|w| w * 2.0 * scale).collect(),
            bias: op.bias.then(|| values(seed + 2, op.models * op.outputs)),
            grad_y: values(seed + 3, op.models * op.rows * op.outputs),
        }
    }
}

/// y, grad_x, grad_weight, grad_bias.
fn run(device: &Device, op: &Linear, data: &Data) -> Result<[Vec<f64>; 4]> {
    let len = op.models * op.rows * op.outputs;
    let (x, weight) = (upload(device, &data.x), upload(device, &data.weight));
    let (y, saved) = (unwritten(device, len), unwritten(device, op.saved()));
    let mut pass = device.pass("linear");
    let bias = data.bias.as_ref().map(|b| upload(device, b));
    linear(&mut pass, op, &LinearArgs { x: x.clone(), weight: weight.clone(), bias, y: y.clone(), saved: Some(saved.clone()) })?;
    let (grad_x, grad_weight) = (unwritten(device, x.len()), unwritten(device, weight.len()));
    let grad_bias = unwritten(device, op.models * op.outputs);
    let args = LinearBackwardArgs {
        x,
        weight,
        kept: Some(if op.activation.keeps_input() { saved } else { y.clone() }),
        grad_y: upload(device, &data.grad_y),
        grad_x: Some(grad_x.clone()),
        grad_weight: Some(grad_weight.clone()),
        grad_bias: Some(grad_bias.clone()),
        scratch: unwritten(device, op.scratch_backward(device)),
    };
    linear_backward(&mut pass, op, &args)?;
    let reads = [pass.read(&y)?, pass.read(&grad_x)?, pass.read(&grad_weight)?, pass.read(&grad_bias)?];
    let mut done = pass.submit()?;
    let mut out = reads.map(|read| done.f64(read));
    Ok([0, 1, 2, 3].map(|i| std::mem::replace(&mut out[i], Ok(Vec::new())).unwrap()))
}

fn op(models: u64, x_models: u64, rows: u64, inputs: u64, outputs: u64, bias: bool, activation: Activation) -> Linear {
    Linear { models, x_models, rows, inputs, outputs, bias, activation, stored: Elem::F32 }
}

/// One value, primes, tiles and one more, many small models, shared x, several splits.
fn shapes() -> Vec<Linear> {
    vec![
        op(1, 1, 1, 1, 1, true, Activation::None),
        op(1, 1, 7, 5, 3, false, Activation::Gelu),
        op(3, 3, 31, 17, 65, true, Activation::Tanh),
        op(2, 1, 64, 64, 64, true, Activation::Silu),
        op(5, 1, 13, 19, 11, true, Activation::Relu),
        op(40, 40, 8, 16, 16, true, Activation::Sigmoid),
        op(1, 1, 700, 9, 70, true, Activation::Gelu),
        op(1, 1, 130, 300, 129, true, Activation::None),
        op(9, 9, 101, 3, 2, false, Activation::None),
        op(2, 2, 1, 600, 1, true, Activation::Silu),
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
                close(&format!("{name} of {op:?} on {}", device.info()), got, want, 1e-5, 4e-6 * size);
            }
        }
    }
}

#[test]
fn gradients_are_those_of_finite_differences() {
    let device = reference();
    for (i, op) in shapes().iter().enumerate().filter(|(_, op)| op.rows * op.models < 300 && op.inputs < 100) {
        let data = Data::of(op, 100 + i as u64);
        if op.activation == Activation::Relu {
            continue; // a kink inside the step has no derivative; see relu_has_one_sided_slopes
        }
        let [_, grad_x, grad_weight, grad_bias] = run(&device, op, &data).unwrap();
        let loss = |data: &Data| dot(&data.grad_y, &run(&device, op, data).unwrap()[0]);
        let with = |x: &[f32], weight: &[f32], bias: Option<&[f32]>| Data {
            x: x.to_vec(),
            weight: weight.to_vec(),
            bias: bias.map(<[f32]>::to_vec),
            grad_y: data.grad_y.clone(),
        };
        is_gradient(&format!("grad_x of {op:?}"), &data.x, &grad_x, |x| loss(&with(x, &data.weight, data.bias.as_deref())));
        is_gradient(&format!("grad_weight of {op:?}"), &data.weight, &grad_weight, |w| loss(&with(&data.x, w, data.bias.as_deref())));
        if let Some(bias) = &data.bias {
            is_gradient(&format!("grad_bias of {op:?}"), bias, &grad_bias, |b| loss(&with(&data.x, &data.weight, Some(b))));
        }
    }
}

#[test]
fn relu_has_one_sided_slopes() {
    let op = op(1, 1, 4, 1, 1, false, Activation::Relu);
    let data = Data { x: vec![2.0, -2.0, 0.0, 1.0], weight: vec![3.0], bias: None, grad_y: vec![1.0, 10.0, 100.0, 1000.0] };
    for device in devices().into_iter().chain([reference()]) {
        let [y, grad_x, grad_weight, grad_bias] = run(&device, &op, &data).unwrap();
        assert_eq!((y, grad_x), (vec![6.0, 0.0, 0.0, 3.0], vec![3.0, 0.0, 0.0, 3000.0]));
        assert_eq!((grad_weight, grad_bias), (vec![1002.0], vec![1001.0]));
    }
}

#[test]
fn splitting_the_batch_changes_no_bit() {
    let small = |binding_bytes, work| OpenOptions { binding_bytes: Some(binding_bytes), work_per_launch: Some(work), ..OpenOptions::default() };
    let cases = [
        (op(5, 5, 33, 7, 6, true, Activation::Gelu), small(4 * 33 * 7 * 2, u64::MAX)),
        (op(3, 1, 300, 8, 5, true, Activation::Tanh), small(u64::MAX, 300 * 80)),
        (op(2, 2, 400, 20, 30, true, Activation::None), small(4 * 30 * 150, u64::MAX)),
    ];
    for name in ["cpu", "wgpu", "cuda-host"] {
        for (op, options) in &cases {
            let (Ok(whole), Ok(split)) = (Device::open(name), Device::open_with(name, options)) else { continue };
            if name == "cpu" && op.rows == 400 {
                continue; // its splits are longer, and its memory is not bound in ranges
            }
            let data = Data::of(op, 77);
            assert_eq!(run(&whole, op, &data).unwrap(), run(&split, op, &data).unwrap(), "{name} {op:?}");
        }
    }
}

#[test]
fn a_nan_stays_in_its_model() {
    let op = op(6, 6, 9, 10, 20, true, Activation::Silu);
    let clean = Data::of(&op, 5);
    let mut dirty = Data::of(&op, 5);
    dirty.x[2 * 90 + 34] = f32::NAN;
    for device in devices() {
        let (want, got) = (run(&device, &op, &clean).unwrap(), run(&device, &op, &dirty).unwrap());
        for (want, got) in want.iter().zip(&got) {
            let each = want.len() / 6;
            for m in (0..6).filter(|&m| m != 2) {
                assert_eq!(want[m * each..(m + 1) * each], got[m * each..(m + 1) * each], "{} model {m}", device.info());
            }
        }
        assert!(got[0][2 * 180 + 3 * 20..][..20].iter().all(|y| y.is_nan()), "{}", device.info());
        assert_eq!(got[0][2 * 180..][..60], want[0][2 * 180..][..60], "other rows of the model");
    }
}

#[test]
fn only_what_is_asked_for_is_computed() {
    let op = op(2, 2, 600, 5, 4, true, Activation::Tanh);
    let data = Data::of(&op, 3);
    for device in devices() {
        let all = run(&device, &op, &data).unwrap();
        for wanted in 0..8u32 {
            let out = |bit: u32, len: usize| (wanted & bit != 0).then(|| unwritten(&device, len as u64));
            let y = upload(&device, &all[0].iter().map(|&y| y as f32).collect::<Vec<_>>());
            let args = LinearBackwardArgs {
                x: upload(&device, &data.x),
                weight: upload(&device, &data.weight),
                kept: Some(y),
                grad_y: upload(&device, &data.grad_y),
                grad_x: out(1, all[1].len()),
                grad_weight: out(2, all[2].len()),
                grad_bias: out(4, all[3].len()),
                scratch: unwritten(&device, op.scratch_backward(&device)),
            };
            let mut pass = device.pass("linear");
            linear_backward(&mut pass, &op, &args).unwrap();
            assert_eq!(pass.launches() == 0, wanted == 0);
            let reads: Vec<_> = [args.grad_x, args.grad_weight, args.grad_bias].iter().map(|view| view.as_ref().map(|view| pass.read(view).unwrap())).collect();
            let mut done = pass.submit().unwrap();
            for (read, want) in reads.into_iter().zip(&all[1..]) {
                if let Some(read) = read {
                    assert_eq!(&done.f64(read).unwrap(), want, "{} asked for {wanted}", device.info());
                }
            }
        }
    }
}

#[test]
fn wrong_sizes_are_typed_errors() {
    let device = Device::open("cpu").unwrap();
    let good = op(2, 2, 3, 4, 5, true, Activation::None);
    for wrong in [Linear { models: 0, ..good }, Linear { inputs: 0, ..good }, Linear { outputs: 0, ..good }, Linear { x_models: 3, ..good }] {
        assert!(matches!(wrong.check(), Err(Error::Parameter { op: "linear", .. })), "{wrong:?}");
    }
    let data = Data::of(&good, 1);
    let mut pass = device.pass("linear");
    let (x, weight, y) = (upload(&device, &data.x), upload(&device, &data.weight), unwritten(&device, 30));
    let args = LinearArgs { x: x.clone(), weight: weight.clone(), bias: None, y: y.clone(), saved: None };
    assert!(matches!(linear(&mut pass, &good, &args), Err(Error::Shape { arg, .. }) if arg == "bias"));
    let short = LinearArgs { bias: Some(unwritten(&device, 9)), ..args.clone() };
    assert!(matches!(linear(&mut pass, &good, &short), Err(Error::Shape { arg, .. }) if arg == "bias"));
    let empty = Linear { rows: 0, ..good };
    let nothing = LinearArgs { x: x.part(0..0), weight, bias: Some(unwritten(&device, 10)), y: y.part(0..0), saved: None };
    linear(&mut pass, &empty, &nothing).unwrap();
    assert_eq!(pass.launches(), 0);
}
