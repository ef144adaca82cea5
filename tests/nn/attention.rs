//! Attention on every device: gradients against finite differences, every option against the reference, layouts,
//! chunks, NaN, illegal sizes.

use forback::kernels::attention::{Attention, AttentionArgs, AttentionGrads, Bias, Dropout, Layout, attention, attention_backward, attention_weights};
use forback::kernels::{Device, Error, OpenOptions, Schedule, View};
use std::collections::BTreeMap;

// ---- helpers ------------------------------------------------------------------------------------------------------------------

/// Devices that this machine has, or that FORBACK_REQUIRE insists on.
fn devices() -> Vec<(String, Device)> {
    let schedule = |schedule| OpenOptions { schedule: Some(schedule), ..OpenOptions::default() };
    let checked = |checked| OpenOptions { checked: Some(checked), ..OpenOptions::default() };
    let specs = [
        ("cpu", OpenOptions::default()),
        ("wgpu", checked(false)),
        ("wgpu", checked(true)),
        ("cuda-host", schedule(Schedule::Forward)),
        ("cuda-host", schedule(Schedule::Reverse)),
        ("cuda", OpenOptions::default()),
    ];
    let required = std::env::var("FORBACK_REQUIRE").unwrap_or_default();
    let mut found = Vec::new();
    for (spec, options) in specs {
        match Device::open_with(spec, &options) {
            Ok(device) => found.push((format!("{spec} {options:?}"), device)),
            Err(error) if required.split(',').any(|r| r == spec) => panic!("{spec}: {error}"),
            Err(error) => eprintln!("skipped {spec}: {error}"),
        }
    }
    found
}

fn reference() -> Device {
    Device::open("reference").unwrap()
}

/// Reals in [−1, 1), the same every time.
struct Random(u64);

impl Random {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    fn reals(&mut self, n: u64) -> Vec<f32> {
        (0..n).map(|_| self.next()).collect()
    }
}

/// Inputs on the host.
#[derive(Clone)]
struct Data {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    grad_out: Vec<f32>,
    kv_len: Option<Vec<u32>>,
    bias: Option<Vec<f32>>,
    step: u32,
}

impl Data {
    fn random(op: &Attention, lengths: bool, seed: u64) -> Data {
        let mut random = Random(seed);
        let [q, k, v, out] = op.elements();
        Data {
            q: random.reals(q),
            k: random.reals(k),
            v: random.reals(v),
            grad_out: random.reals(out),
            kv_len: lengths.then(|| (0..op.batch).map(|b| [op.keys, op.keys / 2, 0, 1][b as usize % 4].min(op.keys) as u32).collect()),
            bias: op.bias.map(|_| random.reals(op.bias_elements())),
            step: 0x8000_0001,
        }
    }
}

type Results = BTreeMap<&'static str, Vec<f64>>;

fn run(device: &Device, op: &Attention, data: &Data) -> Result<Results, Error> {
    let up = |x: &[f32]| -> Result<View, Error> { Ok(View::from(&device.upload("input", x)?)) };
    let zeros = |n: u64| -> Result<View, Error> { Ok(View::from(&device.zeros("output", n)?)) };
    let [q, k, v, out] = op.elements();
    let args = AttentionArgs {
        q: up(&data.q)?,
        k: up(&data.k)?,
        v: up(&data.v)?,
        kv_len: data.kv_len.as_ref().map(|x| device.upload_u32("kv_len", x).map(|b| View::from(&b))).transpose()?,
        bias: data.bias.as_ref().map(|x| up(x)).transpose()?,
        step: op.dropout.map(|_| device.upload_u32("step", &[data.step]).map(|b| View::from(&b))).transpose()?,
        out: zeros(out)?,
        lse: zeros(op.lse())?,
    };
    let grads = AttentionGrads {
        grad_out: up(&data.grad_out)?,
        scratch: zeros(op.scratch_backward(device))?,
        grad_q: Some(zeros(q)?),
        grad_k: Some(zeros(k)?),
        grad_v: Some(zeros(v)?),
        grad_bias: if op.bias.is_some() { Some(zeros(op.bias_elements())?) } else { None },
    };
    let weights = zeros(op.weights())?;
    let mut pass = device.pass("attention");
    attention(&mut pass, op, &args)?;
    attention_backward(&mut pass, op, &args, &grads)?;
    attention_weights(&mut pass, op, &args, &weights)?;
    let mut reads = vec![("out", pass.read(&args.out)?), ("lse", pass.read(&args.lse)?), ("weights", pass.read(&weights)?)];
    for (name, view) in [("grad_q", &grads.grad_q), ("grad_k", &grads.grad_k), ("grad_v", &grads.grad_v), ("grad_bias", &grads.grad_bias)] {
        if let Some(view) = view {
            reads.push((name, pass.read(view)?));
        }
    }
    let mut done = pass.submit()?;
    reads.into_iter().map(|(name, read)| Ok((name, done.f64(read)?))).collect()
}

/// Worst |got − want| / (atol + rtol·|want|), and where.
fn worst(got: &[f64], want: &[f64], atol: f64, rtol: f64) -> (f64, usize) {
    assert_eq!(got.len(), want.len());
    let share = |(g, w): (&f64, &f64)| {
        if g == w {
            0.0
        } else if g.is_nan() || w.is_nan() {
            f64::INFINITY
        } else {
            (g - w).abs() / (atol + rtol * w.abs())
        }
    };
    got.iter().zip(want).map(share).enumerate().fold((0.0, 0), |best, (i, x)| if x > best.0 { (x, i) } else { best })
}

fn agree(what: &str, got: &Results, want: &Results, atol: f64, rtol: f64) {
    for (name, want) in want {
        let got = &got[name];
        let (share, at) = worst(got, want, atol, rtol);
        assert!(share <= 1.0, "{what}: {name}[{at}] is {:e}, expected {:e}: {share:.2} of the tolerance", got[at], want[at]);
    }
}

/// Shapes and options that meet every branch: sizes 1, primes, beyond a tile and a workgroup, every width class.
fn cases() -> Vec<(Attention, bool)> {
    let of = |batch, heads, queries, keys, width| Attention { queries, keys, ..Attention::new(batch, heads, keys, width) };
    let bias = |per_item, per_head| Some(Bias { per_item, per_head });
    let dropout = |probability| Some(Dropout { probability, seed: 0x1234_5678_9abc_def0, stream: 3 });
    vec![
        (of(1, 1, 1, 1, 1), false),
        (of(2, 3, 5, 7, 3), true),
        (Attention { causal: true, ..of(2, 2, 67, 67, 8) }, false),
        (Attention { causal: true, window: Some(9), bias: bias(true, true), ..of(2, 2, 70, 131, 16) }, true),
        (Attention { window: Some(5), scale: Some(-0.3), bias: bias(false, true), ..of(3, 2, 65, 40, 17) }, false),
        (Attention { causal: true, bias: bias(true, false), dropout: dropout(0.25), ..of(2, 2, 37, 29, 33) }, true),
        (Attention { bias: bias(false, false), dropout: dropout(0.5), ..of(4, 2, 13, 66, 8) }, true),
        (Attention { causal: true, window: Some(1 << 40), ..of(1, 1, 30, 22, 130) }, false),
        (Attention { window: Some(11), dropout: dropout(0.9), ..of(1, 2, 19, 31, 256) }, false),
        (Attention { causal: true, ..of(1, 2, 1, 75, 70) }, false),
        (Attention { causal: true, dropout: dropout(0.1), ..Attention::packed(2, 3, 35, 8) }, true),
        (Attention { window: Some(20), ..Attention::packed(3, 2, 41, 5) }, true),
        (Attention { bias: bias(true, true), ..Attention::packed(1, 2, 20, 40) }, false),
        (Attention { causal: true, ..of(9, 2, 37, 41, 16) }, true),
        (Attention { causal: true, ..Attention::packed(9, 2, 35, 20) }, false),
    ]
}

fn label(op: &Attention) -> String {
    format!("{:?}", (op.batch, op.heads, op.queries, op.keys, op.width))
}

// ---- tests ----------------------------------------------------------------------------------------------------------------------

#[test]
fn reference_gradients_are_the_slopes() {
    let device = reference();
    for (n, (op, lengths)) in cases().into_iter().filter(|(op, _)| op.width < 40 && op.queries < 50).enumerate() {
        let data = Data::random(&op, lengths, n as u64);
        let loss = |data: &Data| -> f64 { run(&device, &op, data).unwrap()["out"].iter().zip(&data.grad_out).map(|(o, &g)| o * f64::from(g)).sum() };
        let results = run(&device, &op, &data).unwrap();
        type Field = fn(&mut Data) -> Option<&mut Vec<f32>>;
        let fields: [(&str, Field); 4] =
            [("grad_q", |d| Some(&mut d.q)), ("grad_k", |d| Some(&mut d.k)), ("grad_v", |d| Some(&mut d.v)), ("grad_bias", |d| d.bias.as_mut())];
        for (name, field) in fields {
            let Some(x) = field(&mut data.clone()).map(|x| x.clone()) else { continue };
            // A spread of elements, all of them where there are few.
            for at in (0..x.len()).step_by((x.len() / 12).max(1)) {
                let shifted = |by: f32| {
                    let mut data = data.clone();
                    let x = field(&mut data).unwrap();
                    x[at] += by;
                    (loss(&data), f64::from(field(&mut data).unwrap()[at]))
                };
                let ((high, to), (low, from)) = (shifted(1e-3), shifted(-1e-3));
                let (slope, got) = ((high - low) / (to - from), results[name][at]);
                // Packed tensors hold the heads of others, whose gradient is not this one's.
                assert!((slope - got).abs() <= 2e-6 * slope.abs().max(1.0), "{}: {name}[{at}] is {got}, slope {slope}", label(&op));
            }
        }
    }
}

#[test]
fn every_option_on_every_device() {
    let exact = reference();
    let devices = devices();
    for (n, (op, lengths)) in cases().into_iter().enumerate() {
        let data = Data::random(&op, lengths, 100 + n as u64);
        let want = run(&exact, &op, &data).unwrap();
        for (name, device) in &devices {
            let got = run(device, &op, &data).unwrap();
            agree(&format!("{} on {name}", label(&op)), &got, &want, 4e-6, 2e-5);
        }
    }
}

#[test]
fn weights_sum_to_one() {
    for (name, device) in devices() {
        let op = Attention { causal: true, ..Attention::new(2, 2, 33, 8) };
        let results = run(&device, &op, &Data::random(&op, false, 5)).unwrap();
        for (row, weights) in results["weights"].chunks(33).enumerate() {
            assert!((weights.iter().sum::<f64>() - 1.0).abs() < 3e-6, "{name}: row {row}");
            assert!(weights[row % 33 + 1..].iter().all(|&w| w == 0.0), "{name}: row {row} sees the future");
        }
    }
}

#[test]
fn packed_rows_are_the_same_as_heads_first() {
    for (name, device) in devices() {
        let (b, h, t, d) = (2u64, 3u64, 21u64, 8u64);
        let e = h * d;
        let op = Attention { causal: true, ..Attention::packed(b, h, t, d) };
        let mut random = Random(9);
        let qkv = random.reals(b * t * 3 * e);
        let grad = random.reals(b * t * e);
        let apart = |x: &[f32], row: u64, offset: u64| -> Vec<f32> {
            let at = |b: u64, h: u64, t_: u64, d_: u64| x[(((b * t) + t_) * row + offset + h * d + d_) as usize];
            (0..b)
                .flat_map(|b| (0..h).flat_map(move |h| (0..t).flat_map(move |t| (0..d).map(move |d| (b, h, t, d)))))
                .map(|(b, h, t, d)| at(b, h, t, d))
                .collect()
        };
        let plain = Attention { causal: true, ..Attention::new(b, h, t, d) };
        let data = Data {
            q: apart(&qkv, 3 * e, 0),
            k: apart(&qkv, 3 * e, e),
            v: apart(&qkv, 3 * e, 2 * e),
            grad_out: apart(&grad, e, 0),
            kv_len: None,
            bias: None,
            step: 0,
        };
        let want = run(&device, &plain, &data).unwrap();

        // One buffer for q | k | v, one for their gradients.
        let up = |x: &[f32]| View::from(&device.upload("input", x).unwrap());
        let zeros = |n: u64| View::from(&device.zeros("output", n).unwrap());
        let rows = up(&qkv);
        let args =
            AttentionArgs { q: rows.clone(), k: rows.clone(), v: rows, kv_len: None, bias: None, step: None, out: zeros(b * t * e), lse: zeros(op.lse()) };
        let all = zeros(b * t * 3 * e);
        let grads = AttentionGrads {
            grad_out: up(&grad),
            scratch: zeros(op.scratch_backward(&device)),
            grad_q: Some(all.clone()),
            grad_k: Some(all.clone()),
            grad_v: Some(all.clone()),
            grad_bias: None,
        };
        let mut pass = device.pass("packed");
        attention(&mut pass, &op, &args).unwrap();
        attention_backward(&mut pass, &op, &args, &grads).unwrap();
        let (out, all) = (pass.read(&args.out).unwrap(), pass.read(&all).unwrap());
        let mut done = pass.submit().unwrap();
        let (out, all) = (done.f32(out).unwrap(), done.f32(all).unwrap());
        for (what, got, row, offset) in [("out", &out, e, 0), ("grad_q", &all, 3 * e, 0), ("grad_k", &all, 3 * e, e), ("grad_v", &all, 3 * e, 2 * e)] {
            let got: Vec<f64> = apart(got, row, offset).into_iter().map(f64::from).collect();
            assert_eq!(got, want[what], "{name}: {what}");
        }
    }
}

#[test]
fn a_split_of_the_batch_changes_no_bit() {
    let (op, lengths) = (Attention { dropout: Some(Dropout { probability: 0.3, seed: 7, stream: 1 }), causal: true, ..Attention::new(7, 2, 19, 8) }, true);
    let with_bias = Attention { bias: Some(Bias { per_item: false, per_head: true }), ..op };
    for spec in ["cpu", "wgpu", "cuda-host"] {
        for op in [op, with_bias, Attention { q_layout: Layout::Packed { row: 21, offset: 3 }, ..op }] {
            let data = Data::random(&op, lengths, 11);
            let Ok(whole) = Device::open(spec) else { continue };
            let want = run(&whole, &op, &data).unwrap();
            let small = [
                OpenOptions { binding_bytes: Some(4 * 2 * 19 * 19 * 2 + 64), ..OpenOptions::default() },
                OpenOptions { work_per_launch: Some(1), ..OpenOptions::default() },
            ];
            for options in small {
                let got = run(&Device::open_with(spec, &options).unwrap(), &op, &data).unwrap();
                for (name, want) in &want {
                    assert!(got[name].iter().zip(want).all(|(a, b)| a.to_bits() == b.to_bits()), "{spec} {options:?}: {name}");
                }
            }
        }
    }
}

#[test]
fn a_nan_stays_in_its_item_and_padding_is_not_read() {
    let mut all = devices();
    all.push(("reference".into(), reference()));
    for (name, device) in all {
        for width in [8, 40] {
            let op = Attention { causal: true, ..Attention::new(3, 2, 9, width) };
            let clean = Data::random(&op, true, 3);
            let mut dirty = clean.clone();
            // Item 1 has 4 keys: NaN behind them is padding. Item 0: NaN in query 5 of head 1.
            let head = 9 * width as usize;
            for x in [&mut dirty.k, &mut dirty.v] {
                x[2 * head + 4 * width as usize..3 * head].fill(f32::NAN);
            }
            let (want, got) = (run(&device, &op, &clean).unwrap(), run(&device, &op, &dirty).unwrap());
            assert_eq!(got, want, "{name}: padding was read");
            dirty.q[head + 5 * width as usize] = f32::NAN;
            let got = run(&device, &op, &dirty).unwrap();
            let row = head + 5 * width as usize;
            assert!(got["out"][row..row + width as usize].iter().all(|x| x.is_nan()), "{name}: a NaN query gives a number");
            for (what, steps) in [("out", head), ("grad_q", head), ("grad_k", head), ("grad_v", head)] {
                for (at, (g, w)) in got[what].iter().zip(&want[what]).enumerate().filter(|(at, _)| at / steps != 1) {
                    assert_eq!(g, w, "{name}: {what}[{at}] of another head");
                }
            }
            assert_eq!(got["out"][head..row], want["out"][head..row], "{name}: other queries");
        }
    }
}

#[test]
fn a_bias_may_exclude_keys() {
    let mut all = devices();
    all.push(("reference".into(), reference()));
    for (name, device) in all {
        let op = Attention { bias: Some(Bias { per_item: false, per_head: false }), ..Attention::new(1, 1, 6, 8) };
        let mut data = Data::random(&op, false, 3);
        data.bias = Some((0..36).map(|at| if at / 6 == 2 || at % 6 > 3 { -1e30 } else { 0.0 }).collect());
        let got = run(&device, &op, &data).unwrap();
        let cut = Attention { keys: 4, ..Attention::new(1, 1, 6, 8) };
        let want = run(&device, &cut, &Data { k: data.k[..32].to_vec(), v: data.v[..32].to_vec(), bias: None, ..data.clone() }).unwrap();
        for row in 0..6 {
            let excluded = row == 2;
            for at in 8 * row..8 * row + 8 {
                let expected = if excluded { 0.0 } else { want["out"][at] };
                assert!((got["out"][at] - expected).abs() < 1e-6, "{name}: row {row}");
                assert!(!excluded || got["grad_q"][at] == 0.0, "{name}: a row without keys has a gradient");
            }
        }
        assert!(got["lse"][2] <= -9e29, "{name}");
        assert!(got["grad_k"][32..].iter().chain(&got["grad_v"][32..]).all(|&x| x == 0.0), "{name}: excluded keys have gradients");
        assert!(got["weights"].iter().enumerate().all(|(at, &w)| (w == 0.0) == (at / 6 == 2 || at % 6 > 3)), "{name}: weights");
    }
}

#[test]
fn dropout_keeps_the_mean_and_its_share() {
    let device = Device::open("cpu").unwrap();
    let op = Attention { dropout: Some(Dropout { probability: 0.25, seed: 1, stream: 0 }), ..Attention::new(8, 4, 64, 1) };
    let mut data = Data::random(&op, false, 1);
    data.q.fill(0.0);
    data.v.fill(1.0);
    let out = &run(&device, &op, &data).unwrap()["out"];
    let mean = out.iter().sum::<f64>() / out.len() as f64;
    // 131,072 draws: a standard error of 0.0016.
    assert!((mean - 1.0).abs() < 0.008, "{mean}");
    let other = Attention { dropout: Some(Dropout { probability: 0.25, seed: 1, stream: 1 }), ..op };
    assert_ne!(&run(&device, &other, &data).unwrap()["out"], out, "another stream draws other weights");
    let later = Data { step: 0x8000_0002, ..data.clone() };
    assert_ne!(&run(&device, &op, &later).unwrap()["out"], out, "another step draws other weights");
}

#[test]
fn what_is_empty_records_nothing_or_zeros() {
    let mut all = devices();
    all.push(("reference".into(), reference()));
    for (name, device) in all {
        for op in [Attention::new(0, 2, 5, 8), Attention { queries: 0, ..Attention::new(2, 2, 5, 8) }, Attention { keys: 0, ..Attention::new(2, 2, 5, 8) }] {
            let results = run(&device, &op, &Data::random(&op, false, 1)).unwrap();
            for (what, values) in results {
                assert!(values.iter().all(|&x| if what == "lse" { x <= -9e29 } else { x == 0.0 }), "{name}: {what} of {}", label(&op));
            }
        }
    }
}

#[test]
fn illegal_sizes_are_typed_errors() {
    let fine = Attention::new(2, 2, 5, 8);
    let wrong = [
        Attention { width: 0, ..fine },
        Attention { width: 257, ..fine },
        Attention { heads: 0, ..fine },
        Attention { keys: (1 << 24) + 1, ..fine },
        Attention { window: Some(0), ..fine },
        Attention { scale: Some(f64::NAN), ..fine },
        Attention { dropout: Some(Dropout { probability: 1.0, seed: 0, stream: 0 }), ..fine },
        Attention { q_layout: Layout::Packed { row: 20, offset: 5 }, ..fine },
        Attention { batch: 1 << 32, ..fine },
    ];
    for op in wrong {
        let error = op.check().unwrap_err();
        assert!(matches!(error, Error::Parameter { op: "attention", .. }), "{error}");
    }
    assert!(matches!(
        Attention { queries: 1 << 24, keys: 1 << 24, bias: Some(Bias { per_item: true, per_head: true }), ..fine }.check(),
        Err(Error::TooLarge { .. })
    ));
    let device = Device::open("cpu").unwrap();
    let mut data = Data::random(&fine, false, 1);
    data.k.pop();
    assert!(matches!(run(&device, &fine, &data), Err(Error::Shape { op: "attention", .. })));
    let mut data = Data::random(&fine, true, 1);
    data.bias = Some(vec![0.0; 25]);
    assert!(matches!(run(&device, &fine, &data), Err(Error::Shape { op: "attention", .. })));
}
