//! Convolutions over time: columns against the f64 one, gradients, padding, lengths, splits, isolation, errors.

use super::support::{close, devices, dot, is_gradient, reference, unwritten, upload, values};
use forback::kernels::activation::Activation;
use forback::kernels::conv1d::{Conv1d, Conv1dArgs, Conv1dBackwardArgs, Padding, conv1d, conv1d_backward};
use forback::kernels::{Device, Error, OpenOptions, Result, View};

#[derive(Clone)]
struct Data {
    x: Vec<f32>,
    weight: Vec<f32>,
    bias: Vec<f32>,
    grad_y: Vec<f32>,
    lengths: Vec<u32>,
}

fn out_len(op: &Conv1d) -> u64 {
    op.models * op.batch * op.outputs * op.out_time()
}

impl Data {
    fn of(op: &Conv1d, seed: u64) -> Data {
        Data {
            x: values(seed, op.x_models * op.batch * op.inputs * op.time),
            weight: values(seed + 1, op.models * op.outputs * op.inputs * op.taps),
            bias: values(seed + 2, op.models * op.outputs),
            grad_y: values(seed + 3, out_len(op)),
            // 0, T and beyond among them
            lengths: (0..op.batch).map(|b| ((b * 5) % (op.time + 2)) as u32).collect(),
        }
    }
}

/// y, grad_x, grad_weight, grad_bias.
fn run(device: &Device, op: &Conv1d, data: &Data) -> Result<[Vec<f64>; 4]> {
    let lengths = op.ragged.then(|| View::from(&device.upload_u32("lengths", &data.lengths).unwrap()));
    let args = Conv1dArgs {
        x: upload(device, &data.x),
        weight: upload(device, &data.weight),
        bias: op.bias.then(|| upload(device, &data.bias)),
        lengths: lengths.clone(),
        y: unwritten(device, out_len(op)),
        saved: Some(unwritten(device, op.saved())),
    };
    let mut pass = device.pass("conv1d");
    conv1d(&mut pass, op, &args)?;
    let back = Conv1dBackwardArgs {
        grad_x: Some(unwritten(device, args.x.len())),
        grad_weight: Some(unwritten(device, args.weight.len())),
        grad_bias: Some(unwritten(device, op.models * op.outputs)),
        grad_y: upload(device, &data.grad_y),
        kept: if op.activation.keeps_input() { args.saved.clone() } else { Some(args.y.clone()) },
        scratch: unwritten(device, op.scratch_backward(device)),
        x: args.x,
        weight: args.weight,
        lengths,
    };
    conv1d_backward(&mut pass, op, &back)?;
    let reads = [Some(args.y), back.grad_x, back.grad_weight, back.grad_bias].map(|view| pass.read(view.as_ref().unwrap()).unwrap());
    let mut done = pass.submit()?;
    Ok(reads.map(|read| done.f64(read).unwrap()))
}

const PLAIN: Conv1d = Conv1d {
    models: 1,
    x_models: 1,
    batch: 1,
    inputs: 1,
    outputs: 1,
    taps: 1,
    time: 1,
    padding: Padding::Symmetric(0),
    dilation: 1,
    bias: true,
    ragged: false,
    activation: Activation::None,
};

fn shapes() -> Vec<Conv1d> {
    vec![
        PLAIN,
        Conv1d { batch: 3, inputs: 5, outputs: 7, taps: 3, time: 19, padding: Padding::Same, ragged: true, activation: Activation::Gelu, ..PLAIN },
        Conv1d { models: 3, x_models: 3, batch: 4, inputs: 2, outputs: 33, taps: 5, time: 70, dilation: 4, padding: Padding::Causal, ..PLAIN },
        Conv1d { models: 4, batch: 2, inputs: 17, outputs: 3, taps: 4, time: 13, padding: Padding::Symmetric(2), activation: Activation::Tanh, ..PLAIN },
        Conv1d { models: 2, batch: 9, inputs: 3, outputs: 4, taps: 2, time: 8, padding: Padding::Causal, ragged: true, bias: false, ..PLAIN },
        Conv1d { batch: 5, inputs: 3, outputs: 2, taps: 3, time: 31, padding: Padding::Symmetric(0), ragged: true, activation: Activation::Sigmoid, ..PLAIN },
        Conv1d { batch: 70, inputs: 4, outputs: 6, taps: 7, time: 40, padding: Padding::Symmetric(5), dilation: 2, activation: Activation::Silu, ..PLAIN },
        Conv1d { batch: 2, inputs: 2, outputs: 3, taps: 3, time: 4500, padding: Padding::Same, activation: Activation::Relu, ..PLAIN },
        Conv1d { batch: 6, inputs: 40, outputs: 36, taps: 8, time: 9, padding: Padding::Causal, ragged: true, ..PLAIN },
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
    for (i, op) in shapes().iter().enumerate().filter(|(_, op)| op.time < 1000 && op.activation != Activation::Relu) {
        let data = Data::of(op, 100 + i as u64);
        let [_, grad_x, grad_weight, grad_bias] = run(&device, op, &data).unwrap();
        let loss = |data: Data| dot(&data.grad_y, &run(&device, op, &data).unwrap()[0]);
        is_gradient(&format!("grad_x of {op:?}"), &data.x, &grad_x, |x| loss(Data { x: x.to_vec(), ..data.clone() }));
        is_gradient(&format!("grad_weight of {op:?}"), &data.weight, &grad_weight, |w| loss(Data { weight: w.to_vec(), ..data.clone() }));
        if op.bias {
            is_gradient(&format!("grad_bias of {op:?}"), &data.bias, &grad_bias, |b| loss(Data { bias: b.to_vec(), ..data.clone() }));
        }
    }
}

#[test]
fn a_causal_convolution_sees_no_later_step() {
    let op = Conv1d { batch: 1, inputs: 2, outputs: 3, taps: 4, time: 20, dilation: 2, padding: Padding::Causal, ..PLAIN };
    let data = Data::of(&op, 1);
    let mut later = data.clone();
    (13..20).for_each(|t| later.x[t] = 9.0);
    for device in devices().into_iter().chain([reference()]) {
        let (a, b) = (run(&device, &op, &data).unwrap(), run(&device, &op, &later).unwrap());
        for o in 0..3 {
            assert_eq!(a[0][o * 20..o * 20 + 13], b[0][o * 20..o * 20 + 13], "{}", device.info());
            assert_ne!(a[0][o * 20 + 13..(o + 1) * 20], b[0][o * 20 + 13..(o + 1) * 20]);
        }
    }
}

#[test]
fn what_lies_past_a_length_changes_no_bit() {
    let whole = Conv1d { batch: 4, inputs: 3, outputs: 5, taps: 3, time: 24, padding: Padding::Same, ragged: true, activation: Activation::Silu, ..PLAIN };
    let mut data = Data::of(&whole, 2);
    data.lengths = vec![24, 7, 0, 99];
    let mut dirty = data.clone();
    for c in 0..3 {
        dirty.x[(3 + c) * 24 + 7..(3 + c + 1) * 24].fill(f32::NAN);
        dirty.x[(6 + c) * 24..(6 + c + 1) * 24].fill(f32::NAN);
    }
    for o in 0..5 {
        dirty.grad_y[(5 + o) * 24 + 7..(5 + o + 1) * 24].fill(f32::NAN);
    }
    // The sequence of 7 steps alone.
    let short = Conv1d { batch: 1, time: 7, ragged: false, ..whole };
    let alone = Data {
        x: (0..3).flat_map(|c| data.x[(3 + c) * 24..(3 + c) * 24 + 7].to_vec()).collect(),
        grad_y: (0..5).flat_map(|o| data.grad_y[(5 + o) * 24..(5 + o) * 24 + 7].to_vec()).collect(),
        ..data.clone()
    };
    for device in devices().into_iter().chain([reference()]) {
        let (clean, dirty) = (run(&device, &whole, &data).unwrap(), run(&device, &whole, &dirty).unwrap());
        assert_eq!(clean, dirty, "{}", device.info());
        let [y, grad_x, ..] = run(&device, &short, &alone).unwrap();
        for o in 0..5 {
            assert_eq!(clean[0][(5 + o) * 24..(5 + o) * 24 + 7], y[o * 7..(o + 1) * 7], "{}", device.info());
            assert!(clean[0][(5 + o) * 24 + 7..(5 + o + 1) * 24].iter().all(|&y| y == 0.0));
        }
        for c in 0..3 {
            assert_eq!(clean[1][(3 + c) * 24..(3 + c) * 24 + 7], grad_x[c * 7..(c + 1) * 7], "{}", device.info());
            assert!(clean[1][(6 + c) * 24..(6 + c + 1) * 24].iter().all(|&g| g == 0.0), "length 0");
        }
    }
}

#[test]
fn splitting_the_batch_changes_no_bit_and_a_nan_stays_in_its_model() {
    let ops = [
        Conv1d { models: 3, x_models: 3, batch: 10, inputs: 3, outputs: 4, taps: 3, time: 32, padding: Padding::Same, ragged: true, ..PLAIN },
        Conv1d { models: 3, batch: 7, inputs: 3, outputs: 2, taps: 2, time: 30, padding: Padding::Causal, activation: Activation::Gelu, ..PLAIN },
    ];
    for op in &ops {
        let data = Data::of(op, 6);
        for name in ["cpu", "wgpu", "cuda-host"] {
            let options = OpenOptions { binding_bytes: Some(4 * 4 * 32 * 3), ..OpenOptions::default() };
            let (Ok(whole), Ok(split)) = (Device::open(name), Device::open_with(name, &options)) else { continue };
            let clean = run(&whole, op, &data).unwrap();
            assert_eq!(clean, run(&split, op, &data).unwrap(), "{name} {op:?}");
            if op.x_models == 3 {
                let mut dirty = data.clone();
                dirty.weight[36 + 5] = f32::NAN;
                for (clean, dirty) in clean.iter().zip(&run(&whole, op, &dirty).unwrap()) {
                    let each = clean.len() / 3;
                    assert_eq!((&clean[..each], &clean[2 * each..]), (&dirty[..each], &dirty[2 * each..]), "{name}");
                }
            }
        }
    }
}

#[test]
fn wrong_sizes_are_typed_errors() {
    let good = Conv1d { batch: 2, inputs: 3, outputs: 4, taps: 3, time: 10, padding: Padding::Same, ..PLAIN };
    let wrong = [
        Conv1d { models: 0, ..good },
        Conv1d { taps: 0, ..good },
        Conv1d { dilation: 0, ..good },
        Conv1d { taps: 11, padding: Padding::Symmetric(0), ..good },
        Conv1d { models: 3, x_models: 2, ..good },
        Conv1d { taps: 1 << 20, dilation: 1 << 20, padding: Padding::Causal, ..good },
    ];
    for wrong in wrong {
        assert!(matches!(wrong.check(), Err(Error::Parameter { op: "conv1d", .. })), "{wrong:?}");
    }
    let device = Device::open("cpu").unwrap();
    let view = |len| unwritten(&device, len);
    let args = Conv1dArgs { x: view(60), weight: view(36), bias: Some(view(4)), lengths: None, y: view(80), saved: None };
    let mut pass = device.pass("conv1d");
    let lengths = Some(View::from(&device.upload_u32("lengths", &[1, 2]).unwrap()));
    assert!(matches!(conv1d(&mut pass, &good, &Conv1dArgs { lengths, ..args.clone() }), Err(Error::Shape { arg, .. }) if arg == "lengths"));
    assert!(matches!(conv1d(&mut pass, &Conv1d { ragged: true, ..good }, &args), Err(Error::Shape { arg, .. }) if arg == "lengths"));
    assert!(matches!(conv1d(&mut pass, &good, &Conv1dArgs { y: view(79), ..args.clone() }), Err(Error::Shape { arg, .. }) if arg == "y"));
    let nothing = Conv1dArgs { x: view(0), y: view(0), ..args };
    conv1d(&mut pass, &Conv1d { batch: 0, ..good }, &nothing).unwrap();
    assert_eq!(pass.launches(), 0);
}
