//! Storage in f16 and bf16: buffers, casts, dense layers; columns against the f64 one on the same rounded inputs, and training.

use super::support::{devices, reference, values};
use forback::kernels::activation::Activation;
use forback::kernels::attention::{Attention, AttentionArgs, AttentionGrads, Bias, attention, attention_backward};
use forback::kernels::cast;
use forback::kernels::kernel::Elem;
use forback::kernels::linear::{Linear, LinearArgs, LinearBackwardArgs, linear, linear_backward};
use forback::kernels::{Device, DeviceKind, Error, OpenOptions, Result, Schedule, View};
use forback::nn::{Declared, Init, Parameters};
use forback::ops::{AttentionOptions, Layer, RecurrentOptions};
use forback::tape::{Tape, Var};
use forback::train::data::{Fold, Table};
use forback::train::{Epoch, Model, TrainConfig, Trainer};
use ndarray::Array2;

const HALVES: [Elem; 2] = [Elem::F16, Elem::Bf16];

/// Devices with this storage: all but wgpu for bf16, which must say so; cuda-host in a random order besides.
fn with(elem: Elem) -> Vec<Device> {
    let random = OpenOptions { schedule: Some(Schedule::Random(7)), ..OpenOptions::default() };
    let more = Device::open_with("cuda-host", &random).ok();
    let (have, lack): (Vec<_>, Vec<_>) = devices().into_iter().chain(more).partition(|device| device.supports(elem).is_ok());
    for device in lack {
        assert_eq!((device.info().kind, elem), (DeviceKind::Wgpu, Elem::Bf16), "llvmpipe has f16");
        match device.zeros_as("half", elem, 1) {
            Err(Error::Parameter { value, help, .. }) => assert!(value == "bf16" && help.contains("f16 or f32"), "{help}"),
            other => panic!("{other:?}"),
        }
    }
    have
}

fn upload(device: &Device, elem: Elem, data: &[f32]) -> View {
    View::from(&device.upload_as("test", elem, data).unwrap())
}

fn read(device: &Device, view: &View) -> Vec<f64> {
    let mut pass = device.pass("read");
    let read = pass.read(view).unwrap();
    pass.submit().unwrap().f64(read).unwrap()
}

/// |got − want| ≤ what storing may add on each side: `ulps` roundings of the value, and the last place of subnormals; sums in f32 beside it.
pub(crate) fn close(what: &str, elem: Elem, ulps: f64, got: &[f64], want: &[f64]) {
    assert_eq!(got.len(), want.len(), "{what}: length");
    let size = want.iter().fold(1.0f64, |a, b| a.max(b.abs()));
    let tiny = if elem == Elem::F16 { 2f64.powi(-24) } else { 0.0 };
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let allowed = 2.0 * ulps * elem.roundoff() * w.abs() + tiny + 4e-6 * size;
        assert!((g - w).abs() <= allowed, "{what}[{i}] = {g:e}, expected {w:e}, off by {:e} of {allowed:e}", (g - w).abs());
    }
}

// ---- buffers and casts ------------------------------------------------------------------------------------------------------

/// Values at the edges of f16: ties, the largest, overflow, subnormals, infinities.
fn edges() -> Vec<f32> {
    let mut x = vec![
        0.0,
        -0.0,
        1.0,
        -1.0 / 3.0,
        65504.0,
        65519.9,
        65520.0,
        -1e6,
        6.103_515_6e-5,
        6.097_555e-5,
        5.960_464_5e-8,
        2.980_232_2e-8,
        2.980_233e-8,
        1e-9,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::MAX,
        1.0 + 1.0 / 2048.0,
        1.0 + 3.0 / 2048.0,
        1.0 + 1.0 / 256.0,
        1.0 + 3.0 / 256.0,
    ];
    x.extend(values(1, 300).iter().enumerate().map(|(i, v)| v * 2f32.powi(i as i32 % 44 - 26)));
    x
}

#[test]
fn uploads_and_casts_round_alike_everywhere_and_widen_exactly() {
    let data = edges();
    for elem in HALVES {
        let truth = reference();
        let want = read(&truth, &upload(&truth, elem, &data));
        let largest = if elem == Elem::F16 { 65504.0 } else { f64::MAX };
        for (x, w) in data.iter().zip(&want) {
            let error = (f64::from(*x) - w).abs();
            let overflows = w.is_infinite() && (x.is_infinite() || f64::from(x.abs()) > largest.min(3.39e38));
            assert!(overflows || error <= elem.roundoff() * f64::from(x.abs()) + 2f64.powi(-25), "{elem:?} of {x:e} is {w:e}");
        }
        for device in with(elem).into_iter().chain([reference()]) {
            assert_eq!(read(&device, &upload(&device, elem, &data)), want, "{} uploads", device.info());
            let (full, half) = (View::from(&device.upload("x", &data).unwrap()), View::from(&device.zeros_as("half", elem, data.len() as u64).unwrap()));
            let back = View::from(&device.zeros("back", data.len() as u64).unwrap());
            let mut pass = device.pass("cast");
            cast::cast(&mut pass, &full, &half, 1.0).unwrap();
            cast::cast(&mut pass, &half, &back, 1.0).unwrap();
            pass.submit().unwrap();
            let bits = |x: &[f64]| x.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&read(&device, &half)), bits(&want), "{} casts to {elem:?}", device.info());
            assert_eq!(bits(&read(&device, &back)), bits(&want), "{} casts from {elem:?}", device.info());
            // NaN stays NaN.
            let nan = upload(&device, elem, &[1.0, f32::NAN, 2.0]);
            assert!(read(&device, &nan)[1].is_nan() && read(&device, &nan)[2] == 2.0);
        }
    }
}

/// Ranges that start and end at odd halves, and odd lengths: writes, copies, reads and sums touch nothing beside them.
#[test]
fn odd_ranges_touch_nothing_beside_them() {
    for elem in HALVES {
        for device in with(elem).into_iter().chain([reference()]) {
            for (len, from, to, count) in
                [(9u64, 1u64, 2u64, 3u64), (1001, 300, 301, 400), (1000, 257, 0, 333), (7, 0, 3, 4), (5, 4, 4, 1), (640, 128, 256, 127)]
            {
                let a: Vec<f32> = (0..len).map(|i| i as f32 % 250.0).collect();
                let (source, target) = (upload(&device, elem, &a), upload(&device, elem, &vec![-1.0; len as usize]));
                let mut pass = device.pass("copy");
                pass.copy(source.part(from..from + count), target.part(to..to + count)).unwrap();
                let part = pass.read(source.part(from..from + count)).unwrap();
                let mut done = pass.submit().unwrap();
                let want: Vec<f64> = a[from as usize..(from + count) as usize].iter().map(|&v| f64::from(v)).collect();
                let label = format!("{} {elem:?} {len} {from} {to} {count}", device.info());
                assert_eq!(done.f64(part).unwrap(), want, "{label}");
                let mut all = vec![-1.0; len as usize];
                all[to as usize..(to + count) as usize].copy_from_slice(&want);
                assert_eq!(read(&device, &target), all, "{label}: copied");
                let written: Vec<f32> = (0..count).map(|i| 100.0 + (i % 27) as f32).collect();
                device.write(target.part(to..to + count), &written).unwrap();
                all[to as usize..(to + count) as usize].iter_mut().zip(&written).for_each(|(all, &w)| *all = w.into());
                assert_eq!(read(&device, &target), all, "{label}: written");
                let (other, sum) = (upload(&device, elem, &vec![0.5; len as usize]), View::from(&device.zeros_as("sum", elem, count).unwrap()));
                let mut pass = device.pass("add");
                cast::add(&mut pass, &target.part(to..to + count), &other.part(from..from + count), &sum).unwrap();
                pass.submit().unwrap();
                assert_eq!(read(&device, &sum), written.iter().map(|&w| f64::from(w) + 0.5).collect::<Vec<_>>(), "{label}: added");
            }
        }
    }
}

// ---- dense layers -----------------------------------------------------------------------------------------------------------

/// y and what is kept.
type Forward = [Vec<f64>; 2];

/// y, grad_x, grad_weight, grad_bias; y and what is kept, given from outside, are what backward starts from.
fn run(device: &Device, op: &Linear, kept: Option<&Forward>) -> Result<([Vec<f64>; 4], Forward)> {
    let elem = op.stored;
    let scale = 2.0 / (op.inputs as f32).sqrt();
    let len = op.models * op.rows * op.outputs;
    let x = upload(device, elem, &values(1, op.x_models * op.rows * op.inputs));
    let weight = upload(device, elem, &values(2, op.models * op.outputs * op.inputs).iter().map(|w| w * scale).collect::<Vec<_>>());
    let bias = op.bias.then(|| upload(device, elem, &values(3, op.models * op.outputs)));
    let grad_y = upload(device, elem, &values(4, len));
    let zeros = |n: u64| View::from(&device.zeros_as("out", elem, n).unwrap());
    let (y, saved) = (zeros(len), zeros(op.saved()));
    let mut pass = device.pass("linear");
    linear(&mut pass, op, &LinearArgs { x: x.clone(), weight: weight.clone(), bias, y: y.clone(), saved: Some(saved.clone()) })?;
    pass.submit()?;
    let forward = [read(device, &y), read(device, &saved)];
    if let Some([y_is, saved_is]) = kept {
        device.write_f64(&y, y_is)?;
        device.write_f64(&saved, saved_is)?;
    }
    let (grad_x, grad_weight, grad_bias) = (zeros(x.len()), zeros(weight.len()), zeros(op.models * op.outputs));
    let args = LinearBackwardArgs {
        x,
        weight,
        kept: Some(if op.activation.keeps_input() { saved } else { y }),
        grad_y,
        grad_x: Some(grad_x.clone()),
        grad_weight: Some(grad_weight.clone()),
        grad_bias: op.bias.then(|| grad_bias.clone()),
        scratch: View::from(&device.zeros("scratch", op.scratch_backward(device))?),
    };
    let mut pass = device.pass("linear");
    linear_backward(&mut pass, op, &args)?;
    pass.submit()?;
    Ok(([forward[0].clone(), read(device, &grad_x), read(device, &grad_weight), read(device, &grad_bias)], forward))
}

#[test]
fn dense_layers_agree_with_the_reference() {
    for stored in HALVES {
        let op = |models, x_models, rows, inputs, outputs, bias, activation| Linear { models, x_models, rows, inputs, outputs, bias, activation, stored };
        let shapes = [
            op(1, 1, 1, 1, 1, true, Activation::None),
            op(1, 1, 7, 5, 3, false, Activation::Gelu),
            op(3, 3, 31, 17, 65, true, Activation::Tanh),
            op(2, 1, 64, 64, 64, true, Activation::Silu),
            op(5, 1, 13, 19, 11, true, Activation::Relu),
            op(1, 1, 700, 9, 70, true, Activation::Sigmoid),
            op(1, 1, 130, 75, 129, true, Activation::None),
            op(2, 2, 1, 331, 1, true, Activation::Silu),
        ];
        for op in shapes {
            let (want, kept) = run(&reference(), &op, None).unwrap();
            for device in with(stored) {
                let (got, _) = run(&device, &op, Some(&kept)).unwrap();
                for (name, (got, want)) in ["y", "grad_x", "grad_weight", "grad_bias"].iter().zip(got.iter().zip(&want)) {
                    close(&format!("{name} of {op:?} on {}", device.info()), stored, 1.0, got, want);
                }
            }
        }
    }
}

#[test]
fn a_gradient_that_is_not_wanted_and_empty_layers() {
    for stored in HALVES {
        for device in with(stored) {
            let op = Linear { models: 2, x_models: 2, rows: 5, inputs: 3, outputs: 4, bias: true, activation: Activation::None, stored };
            let x = upload(&device, stored, &values(1, 30));
            let (weight, grad_y) = (upload(&device, stored, &values(2, 24)), upload(&device, stored, &values(3, 40)));
            let grad = View::from(&device.zeros_as("grad", stored, 24).unwrap());
            let bias = View::from(&device.zeros_as("grad", stored, 8).unwrap());
            let scratch = View::from(&device.zeros("scratch", op.scratch_backward(&device)).unwrap());
            let args = LinearBackwardArgs { x, weight, kept: None, grad_y, grad_x: None, grad_weight: None, grad_bias: Some(bias.clone()), scratch };
            let only_weight = LinearBackwardArgs { grad_weight: Some(grad.clone()), grad_bias: None, ..args.clone() };
            for args in [&args, &only_weight] {
                let mut pass = device.pass("linear");
                linear_backward(&mut pass, &op, args).unwrap();
                pass.submit().unwrap();
            }
            assert!(read(&device, &bias).iter().chain(&read(&device, &grad)).all(|g| *g != 0.0), "{}", device.info());
            let mixed = LinearBackwardArgs { weight: View::from(&device.zeros("weight", 24).unwrap()), ..args };
            match linear_backward(&mut device.pass("linear"), &op, &mixed) {
                Err(Error::Shape { op: "linear", arg, expected, got }) => assert!(arg == "weight" && expected.contains(stored.wgsl()) && got.contains("f32")),
                other => panic!("{other:?}"),
            }
        }
    }
}

// ---- the tape ---------------------------------------------------------------------------------------------------------------

#[test]
fn mixing_storages_names_op_and_argument() {
    let device = Device::open("cpu").unwrap();
    let mut tape = Tape::new(&device);
    let x = tape.input(&device.zeros("x", 6).unwrap(), &[1, 2, 3]).unwrap();
    let w = tape.variable(&device.zeros("w", 12).unwrap(), &[1, 4, 3]).unwrap();
    let half = tape.cast(x, Elem::F16).unwrap();
    let named = |result: Result<Var>, op: &str, arg: &str, has: &str| match result {
        Err(Error::Shape { op: o, arg: a, expected, got }) => {
            assert!(o == op && a == arg && format!("{expected} {got}").contains(has), "{o} {a} {expected} {got}")
        }
        other => panic!("{other:?}"),
    };
    named(tape.linear(half, w, None, Activation::None), "linear", "weight", "f16");
    named(tape.softmax(half, false), "softmax", "input 0", "f32");
    named(tape.cast(half, Elem::Bf16), "cast", "to", "f16 to bf16");
    named(tape.variable(&device.zeros_as("w", Elem::F16, 12).unwrap(), &[1, 4, 3]), "variable", "view", "f32");
    let loss = tape.cast(w, Elem::Bf16).unwrap();
    assert!(matches!(tape.backward_with(loss, loss), Err(Error::Shape { .. })));
}

// ---- attention --------------------------------------------------------------------------------------------------------------

/// out, lse, grad_q, grad_k, grad_v, grad_bias; backward starts from the out and lse that are given.
fn attend(device: &Device, op: &Attention, stored: Elem, ragged: bool, given: Option<&[Vec<f64>]>) -> Vec<Vec<f64>> {
    let [q, k, v, out] = op.elements();
    let input = |seed: u64, len: u64| upload(device, stored, &values(seed, len));
    let zeros = |len: u64| View::from(&device.zeros_as("out", stored, len).unwrap());
    let bias_len = if op.bias.is_some() { op.queries * op.keys } else { 0 };
    let lengths: Vec<u32> = (0..op.batch as u32).map(|b| (op.keys as u32).saturating_sub(3 * b)).collect();
    let args = AttentionArgs {
        q: input(1, q),
        k: input(2, k),
        v: input(3, v),
        kv_len: ragged.then(|| View::from(&device.upload_u32("kv_len", &lengths).unwrap())),
        bias: op.bias.map(|_| input(4, bias_len)),
        step: None,
        out: zeros(out),
        lse: View::from(&device.zeros("lse", op.batch * op.heads * op.queries).unwrap()),
    };
    let mut pass = device.pass("attention");
    attention(&mut pass, op, &args).unwrap();
    pass.submit().unwrap();
    let mut results = vec![read(device, &args.out), read(device, &args.lse)];
    if let Some(given) = given {
        device.write_f64(&args.out, &given[0]).unwrap();
        device.write_f64(&args.lse, &given[1]).unwrap();
    }
    let grads = AttentionGrads {
        grad_out: input(5, out),
        scratch: View::from(&device.zeros("scratch", op.scratch_backward(device)).unwrap()),
        grad_q: Some(zeros(q)),
        grad_k: Some(zeros(k)),
        grad_v: Some(zeros(v)),
        grad_bias: op.bias.map(|_| zeros(bias_len)),
    };
    let mut pass = device.pass("attention");
    attention_backward(&mut pass, op, &args, &grads).unwrap();
    pass.submit().unwrap();
    results.extend([&grads.grad_q, &grads.grad_k, &grads.grad_v, &grads.grad_bias].into_iter().flatten().map(|view| read(device, view)));
    results
}

#[test]
fn attention_agrees_with_the_reference() {
    let whole = Bias { per_item: false, per_head: false };
    for stored in HALVES {
        let cases = [
            (Attention::new(1, 1, 1, 1), false),
            (Attention { causal: true, ..Attention::new(2, 3, 37, 8) }, false),
            (Attention { keys: 19, ..Attention::new(2, 1, 70, 5) }, true),
            (Attention { window: Some(7), bias: Some(whole), ..Attention::new(3, 2, 33, 16) }, true),
            (Attention { causal: true, ..Attention::new(1, 9, 65, 32) }, false),
            (Attention { bias: Some(whole), keys: 13, ..Attention::new(1, 2, 11, 37) }, false),
        ];
        for (op, ragged) in cases {
            let want = attend(&reference(), &op, stored, ragged, None);
            for device in with(stored) {
                let got = attend(&device, &op, stored, ragged, Some(&want));
                for (name, (got, want)) in ["out", "lse", "grad_q", "grad_k", "grad_v", "grad_bias"].iter().zip(got.iter().zip(&want)) {
                    let elem = if *name == "lse" { Elem::F32 } else { stored };
                    close(&format!("{name} of {op:?} in {stored:?} on {}", device.info()), elem, 1.0, got, want);
                }
            }
        }
    }
}

// ---- LSTM and GRU -----------------------------------------------------------------------------------------------------------

/// y, hn and the gradients of everything, through a tape of casts.
fn recur(device: &Device, lstm: bool, stored: Elem, [m, b, t, i, h]: [usize; 5], two: bool, recompute: bool) -> Vec<Vec<f64>> {
    let (mut tape, truth) = (Tape::new(device), reference());
    let gates = if lstm { 4 * h } else { 3 * h };
    let (mut leaves, mut seed) = (Vec::new(), 0);
    let mut leaf = |tape: &mut Tape, shape: &[usize]| {
        seed += 1;
        // Values of the storage, so that casts of the leaves are exact.
        let len = shape.iter().product::<usize>() as u64;
        let rounded: Vec<f32> = read(&truth, &upload(&truth, stored, &values(seed, len))).iter().map(|&v| v as f32).collect();
        let x = tape.variable(&device.upload("leaf", &rounded).unwrap(), shape).unwrap();
        leaves.push(x);
        tape.cast(x, stored).unwrap()
    };
    let x = leaf(&mut tape, &[m, b, t, i]);
    let layers: Vec<Layer> = (0..1 + usize::from(two))
        .map(|_| Layer {
            w_ih: leaf(&mut tape, &[m, gates, i]),
            w_hh: leaf(&mut tape, &[m, gates, h]),
            b_ih: Some(leaf(&mut tape, &[m, gates])),
            b_hh: (!lstm).then(|| leaf(&mut tape, &[m, gates])),
            h0: Some(leaf(&mut tape, &[m, b, h])),
            c0: lstm.then(|| leaf(&mut tape, &[m, b, h])),
        })
        .collect();
    let lengths = device.upload_u32("lengths", &(0..b as u32).map(|b| (t as u32).saturating_sub(2 * b)).collect::<Vec<_>>()).unwrap();
    let options = RecurrentOptions { lengths: Some(tape.input(&lengths, &[b]).unwrap()), recompute, ..RecurrentOptions::default() };
    let out = if lstm { tape.lstm(x, &layers, options) } else { tape.gru(x, &layers, options) }.unwrap();
    let (y, hn) = (out.y, out.hn[0].unwrap());
    for (n, of) in [y, hn].into_iter().enumerate() {
        let shape = tape.shape(of).to_vec();
        let seed = tape.input(upload(device, stored, &values(90 + n as u64, shape.iter().product::<usize>() as u64)), &shape).unwrap();
        tape.backward_with(of, seed).unwrap();
    }
    let mut pass = device.pass("recurrent");
    let plan = tape.record(&mut pass, &[y, hn]).unwrap();
    let views: Vec<View> = [y, hn].into_iter().map(|x| plan.view(x).unwrap()).chain(leaves.iter().map(|&x| plan.grad(x).unwrap())).collect();
    let reads: Vec<_> = views.iter().map(|view| pass.read(view).unwrap()).collect();
    let mut done = pass.submit().unwrap();
    reads.into_iter().map(|read| done.f64(read).unwrap()).collect()
}

#[test]
fn recurrent_layers_agree_with_the_reference() {
    for stored in HALVES {
        for (lstm, sizes, two, recompute) in [
            (true, [1, 1, 1, 1, 1], false, false),
            (true, [2, 5, 7, 3, 11], false, true),
            (true, [1, 3, 6, 2, 4], true, false),
            (false, [3, 2, 5, 4, 7], false, false),
            (true, [1, 2, 3, 5, 130], false, false),
        ] {
            let want = recur(&reference(), lstm, stored, sizes, two, recompute);
            for device in with(stored) {
                let got = recur(&device, lstm, stored, sizes, two, recompute);
                for (n, (got, want)) in got.iter().zip(&want).enumerate() {
                    // Two directions round their gradients of x before they are added.
                    let ulps = if two && n == 2 { 3.0 } else { 1.0 };
                    close(&format!("result {n} of {sizes:?} {stored:?} on {}", device.info()), stored, ulps, got, want);
                }
            }
        }
    }
}

// ---- training ---------------------------------------------------------------------------------------------------------------

/// A dense layer, an LSTM, attention over its steps and a dense head: masters in f32, all but the head in `stored`.
struct Mixed {
    stored: Elem,
    loss_scale: f32,
}

impl Model for Mixed {
    fn declare(&self, to: &mut Declared) {
        for (name, shape) in [("in", vec![8, 2]), ("w_ih", vec![32, 8]), ("w_hh", vec![32, 8]), ("bias", vec![32]), ("qkv", vec![24, 8]), ("head", vec![1, 8])]
        {
            to.add(name, &shape, Init::fan_in(8));
        }
    }

    fn forward(&self, tape: &mut Tape, parameters: &Parameters, x: Var) -> Result<Var> {
        let weight = |tape: &mut Tape, name: &str| {
            let master = parameters.on(tape, name)?;
            if self.stored == Elem::F32 { Ok(master) } else { tape.cast_scaled(master, self.stored, 1.0 / self.loss_scale) }
        };
        let x = tape.cast(x, self.stored)?;
        let w = weight(tape, "in")?;
        let x = tape.linear(x, w, None, Activation::Tanh)?;
        let layer = Layer { w_ih: weight(tape, "w_ih")?, w_hh: weight(tape, "w_hh")?, b_ih: Some(weight(tape, "bias")?), b_hh: None, h0: None, c0: None };
        let y = tape.lstm(x, &[layer], RecurrentOptions::default())?.y;
        let &[m, b, t, h] = tape.shape(y) else { panic!("an LSTM gives [M,B,T,H]") };
        let w = weight(tape, "qkv")?;
        let qkv = tape.linear(y, w, None, Activation::None)?;
        let qkv = tape.reshape(qkv, &[m * b, t, 3 * h])?;
        let (attended, _) = tape.attention_packed(qkv, 2, AttentionOptions { causal: true, ..AttentionOptions::default() })?;
        let attended = if self.stored == Elem::F32 { attended } else { tape.cast_scaled(attended, Elem::F32, self.loss_scale)? };
        let attended = tape.reshape(attended, &[m, b, t, h])?;
        let last = tape.slice(attended, 2, t - 1..t)?;
        let last = tape.reshape(last, &[m, b, h])?;
        let head = parameters.on(tape, "head")?;
        tape.linear(last, head, None, Activation::None)
    }
}

fn valid_loss(device: &Device, model: &Mixed, epochs: usize) -> (Vec<f64>, usize) {
    let rows = 140;
    let noise = values(5, rows as u64);
    let features = Array2::from_shape_fn((rows, 2), |(t, c)| if c == 0 { (t as f32 * 0.4).sin() + 0.05 * noise[t] } else { noise[t] });
    let targets = Array2::from_shape_fn((rows, 1), |(t, _)| features[[(t + 1).min(rows - 1), 0]]);
    let table = Table::new(features.view(), targets.view(), 6).unwrap();
    let (a, b) = (rows as u32 * 3 / 4, rows as u32 - 1);
    let fold = Fold { train: (5..a).collect(), valid: (a..b).collect(), test: vec![7], scaler: table.scaler(0..a as usize) };
    let folds = vec![fold; 3];
    let config = TrainConfig { epochs, batch: 16, learning_rate: vec![1e-2], seed: 3, ..TrainConfig::default() };
    let mut trainer = Trainer::new(device, model, &table, &folds, config).unwrap();
    let (mut valid, mut skipped) = (Vec::new(), 0);
    trainer
        .fit(&mut |epoch: &Epoch| {
            valid.clone_from(&epoch.valid);
            skipped += epoch.skipped.iter().map(|&n| n as usize).sum::<usize>();
            Ok(())
        })
        .unwrap();
    (valid, skipped)
}

#[test]
fn mixed_precision_trains_to_nearly_the_loss_of_f32() {
    let cpu = Device::open("cpu").unwrap();
    let (want, _) = valid_loss(&cpu, &Mixed { stored: Elem::F32, loss_scale: 1.0 }, 15);
    let (start, _) = valid_loss(&cpu, &Mixed { stored: Elem::F32, loss_scale: 1.0 }, 1);
    for (stored, loss_scale) in [(Elem::F16, 256.0), (Elem::Bf16, 1.0)] {
        let model = Mixed { stored, loss_scale };
        let (got, skipped) = valid_loss(&cpu, &model, 15);
        assert_eq!(skipped, 0, "{stored:?}: gradients are finite");
        for ((got, want), start) in got.iter().zip(&want).zip(&start) {
            assert!(got < &(0.5 * start) && (got - want).abs() < 0.1 * want + 0.05 * start, "{stored:?} ends at {got}, f32 at {want}, from {start}");
        }
        let (first, _) = valid_loss(&cpu, &model, 1);
        for device in with(stored) {
            let (got, _) = valid_loss(&device, &model, 1);
            for (got, first) in got.iter().zip(&first) {
                assert!((got - first).abs() < 8.0 * stored.roundoff() * first, "{} after an epoch in {stored:?}: {got}, cpu {first}", device.info());
            }
        }
    }
}

/// A scale that makes gradients overflow f16: every step is skipped and named, masters stay finite.
#[test]
fn gradients_beyond_f16_skip_the_step() {
    let cpu = Device::open("cpu").unwrap();
    let (valid, skipped) = valid_loss(&cpu, &Mixed { stored: Elem::F16, loss_scale: 1e9 }, 1);
    assert!(skipped > 0 && valid.iter().all(|v| v.is_finite()), "{skipped} skipped, {valid:?}");
}
