//! LSTM and GRU: gradients against finite differences, every device against the reference, splits, NaN, errors.

use forback::kernels::kernel::Elem;
use forback::kernels::philox::{normals, philox4x32};
use forback::kernels::recurrent::{Cell, Keep, Recurrent, RecurrentArgs, RecurrentGrads, recurrent, recurrent_backward};
use forback::kernels::{Device, Error, OpenOptions, Result, Schedule, View};
use std::collections::BTreeMap;

fn random(n: u64, seed: u32, scale: f64) -> Vec<f32> {
    let blocks = n.div_ceil(4) as u32;
    (0..blocks).flat_map(|i| normals(philox4x32([i, 0, 0, 0], [seed, 7]))).take(n as usize).map(|z| (z * scale) as f32).collect()
}

/// A layer with its data on the host; empty vectors are absent.
#[derive(Clone)]
struct Layer {
    op: Recurrent,
    reals: BTreeMap<&'static str, Vec<f32>>,
    words: BTreeMap<&'static str, Vec<u32>>,
    stored: Elem,
}

const BIAS: u32 = 1;
const STARTS: u32 = 2;
const LENGTHS: u32 = 4;
const RESETS: u32 = 8;
const EVERYTHING: u32 = 15;

impl Layer {
    fn new(op: Recurrent, options: u32) -> Layer {
        let Recurrent { models, batch, time, inputs, hidden, .. } = op;
        let gru = op.cell == Cell::Gru;
        let (g, all) = (hidden * if gru { 3 } else { 4 }, models * batch);
        let scale = 1.0 / (hidden as f64).sqrt();
        let mut reals = BTreeMap::from([
            ("x", random(op.x_models * batch * time * inputs, 1, 1.0)),
            ("w_ih", random(models * g * inputs, 2, scale)),
            ("w_hh", random(models * g * hidden, 3, scale)),
            ("grad_y", random(all * time * op.y_stride, 4, 1.0)),
            ("grad_hn", random(all * hidden, 5, 1.0)),
        ]);
        if options & BIAS != 0 {
            reals.insert("b_ih", random(models * g, 6, 0.5));
            if gru {
                reals.insert("b_hh", random(models * g, 7, 0.5));
            }
        }
        let starts = if op.learned_start { models } else { all } * hidden;
        if options & STARTS != 0 {
            reals.insert("h0", random(starts, 8, 0.5));
        }
        if !gru {
            reals.insert("grad_cn", random(all * hidden, 9, 1.0));
            if options & STARTS != 0 {
                reals.insert("c0", random(starts, 10, 0.5));
            }
        }
        let mut words = BTreeMap::new();
        if options & LENGTHS != 0 {
            // the first is empty, the last whole
            words.insert("lengths", (0..batch).map(|b| if b + 1 == batch { time } else { b * 5 % (time + 1) } as u32).collect());
        }
        if options & RESETS != 0 {
            words.insert("resets", random(batch * time, 11, 1.0).iter().map(|&z| u32::from(z > 0.8)).collect());
        }
        Layer { op, reals, words, stored: Elem::F32 }
    }

    fn run(&self, device: &Device, passes: &mut Vec<usize>) -> Result<BTreeMap<&'static str, Vec<f64>>> {
        let op = &self.op;
        let all = op.models * op.batch;
        let mut views: BTreeMap<&'static str, View> = BTreeMap::new();
        for (name, data) in &self.reals {
            views.insert(name, View::from(&device.upload_as(name, self.stored, data)?));
        }
        for (name, data) in &self.words {
            views.insert(name, View::from(&device.upload_u32(name, data)?));
        }
        let zeros = |name: &str, len: u64| -> Result<View> { Ok(View::from(&device.zeros_as(name, self.stored, len)?)) };
        // y starts as guards: columns of other layers must stay
        let y = View::from(&device.upload_as("y", self.stored, &vec![7.0; (all * op.time * op.y_stride) as usize])?);
        let (hn, cn) = (zeros("hn", all * op.hidden)?, zeros("cn", all * op.hidden)?);
        let saved = View::from(&device.upload("saved", &vec![f32::NAN; op.saved() as usize])?);
        let garbage = |name: &str, elem: Elem, len: u64| -> Result<View> { Ok(View::from(&device.upload_as(name, elem, &vec![f32::NAN; len as usize])?)) };
        let scratch = [garbage("packed", Elem::F32, op.scratch()[0])?, garbage("state", Elem::F32, op.scratch()[1])?];
        let get = |name: &str| views.get(name);
        let lstm = op.cell == Cell::Lstm;
        let mut pass = device.pass("recurrent");
        let args = RecurrentArgs {
            x: &views["x"],
            w_ih: &views["w_ih"],
            w_hh: &views["w_hh"],
            b_ih: get("b_ih"),
            b_hh: get("b_hh"),
            h0: get("h0"),
            c0: get("c0"),
            lengths: get("lengths"),
            resets: get("resets"),
            y: &y,
            hn: Some(&hn),
            cn: lstm.then_some(&cn),
            saved: &saved,
            scratch: [&scratch[0], &scratch[1]],
        };
        recurrent(&mut pass, op, &args)?;
        passes.push(pass.launches());
        let mut reads = vec![("y", pass.read(&y)?), ("hn", pass.read(&hn)?)];
        if lstm {
            reads.push(("cn", pass.read(&cn)?));
        }
        let mut grads: BTreeMap<&'static str, View> = BTreeMap::new();
        if op.keep != Keep::Nothing {
            let scratch = [garbage("gates", Elem::F32, op.scratch_backward()[0])?, garbage("sums", Elem::F32, op.scratch_backward()[1])?];
            let names = [
                ("grad_x", "x"),
                ("grad_w_ih", "w_ih"),
                ("grad_w_hh", "w_hh"),
                ("grad_b_ih", "b_ih"),
                ("grad_b_hh", "b_hh"),
                ("grad_h0", "h0"),
                ("grad_c0", "c0"),
            ];
            for (grad, name) in names {
                if let Some(view) = views.get(name)
                    && (grad != "grad_x" || op.x_models == op.models)
                {
                    grads.insert(grad, garbage(grad, self.stored, view.len())?);
                }
            }
            let grads = &grads;
            let args = RecurrentGrads {
                x: &views["x"],
                w_ih: &views["w_ih"],
                w_hh: &views["w_hh"],
                b_ih: get("b_ih"),
                b_hh: get("b_hh"),
                lengths: get("lengths"),
                resets: get("resets"),
                saved: &saved,
                grad_y: get("grad_y"),
                grad_hn: get("grad_hn"),
                grad_cn: get("grad_cn"),
                grad_x: grads.get("grad_x"),
                grad_w_ih: grads.get("grad_w_ih"),
                grad_w_hh: grads.get("grad_w_hh"),
                grad_b_ih: grads.get("grad_b_ih"),
                grad_b_hh: grads.get("grad_b_hh"),
                grad_h0: grads.get("grad_h0"),
                grad_c0: grads.get("grad_c0"),
                scratch: [&scratch[0], &scratch[1]],
            };
            recurrent_backward(&mut pass, op, &args)?;
            passes.push(pass.launches() - passes[0]);
            for (name, view) in grads {
                reads.push((name, pass.read(view)?));
            }
        }
        let mut done = pass.submit()?;
        reads.into_iter().map(|(name, read)| Ok((name, done.f64(read)?))).collect()
    }

    fn results(&self, device: &Device) -> BTreeMap<&'static str, Vec<f64>> {
        self.run(device, &mut Vec::new()).unwrap_or_else(|e| panic!("{}: {:?}: {e}", device.info(), self.op))
    }

    /// Σ y·grad_y + Σ hn·grad_hn + Σ cn·grad_cn.
    fn loss(&self, device: &Device) -> f64 {
        let op = Recurrent { keep: Keep::Nothing, ..self.op };
        let out = Layer { op, ..self.clone() }.results(device);
        let dot = |a: &[f64], b: &[f32]| a.iter().zip(b).map(|(a, &b)| a * f64::from(b)).sum::<f64>();
        let y: f64 = (0..out["y"].len())
            .filter(|i| (op.y_offset..op.y_offset + op.hidden).contains(&(*i as u64 % op.y_stride)))
            .map(|i| out["y"][i] * f64::from(self.reals["grad_y"][i]))
            .sum();
        y + dot(&out["hn"], &self.reals["grad_hn"]) + out.get("cn").map_or(0.0, |cn| dot(cn, &self.reals["grad_cn"]))
    }
}

fn devices() -> Vec<Device> {
    let schedule = |schedule| OpenOptions { schedule: Some(schedule), ..OpenOptions::default() };
    let checked = |checked| OpenOptions { checked: Some(checked), ..OpenOptions::default() };
    let open = |name: &str, options: &OpenOptions| Device::open_with(name, options).unwrap_or_else(|e| panic!("{name}: {e}"));
    vec![
        open("cpu", &OpenOptions::default()),
        open("wgpu", &checked(false)),
        open("wgpu", &checked(true)),
        open("cuda-host", &schedule(Schedule::Forward)),
        open("cuda-host", &schedule(Schedule::Reverse)),
    ]
}

/// Every kind of layer, with sizes in turn.
fn layers(sizes: &[[u64; 5]]) -> Vec<Layer> {
    let mut out = Vec::new();
    for (n, &[models, batch, time, inputs, hidden]) in sizes.iter().enumerate() {
        for cell in [Cell::Lstm, Cell::Gru] {
            let op = Recurrent::new(cell, models, batch, time, inputs, hidden);
            out.push(Layer::new(op, EVERYTHING));
            let wide = Recurrent { y_stride: 2 * hidden + 1, y_offset: hidden, ..op };
            match n % 3 {
                0 => out.push(Layer::new(Recurrent { reverse: true, keep: Keep::States, ..wide }, EVERYTHING)),
                1 => out.push(Layer::new(Recurrent { learned_start: true, keep: Keep::States, ..op }, EVERYTHING)),
                _ => out.push(Layer::new(Recurrent { reverse: true, learned_start: true, ..wide }, RESETS | STARTS)),
            }
            out.push(Layer::new(Recurrent { x_models: 1, keep: [Keep::States, Keep::Gates][n % 2], ..op }, [0, BIAS, LENGTHS][n % 3]));
        }
    }
    out
}

#[test]
fn gradients_are_those_of_finite_differences() {
    let reference = Device::open("reference").unwrap();
    for layer in layers(&[[1, 1, 1, 1, 1], [2, 3, 4, 2, 3], [2, 2, 5, 3, 5], [1, 5, 7, 1, 2]]) {
        let grads = layer.results(&reference);
        for (grad, values) in grads.iter().filter(|(name, _)| name.starts_with("grad_")) {
            let name = &grad["grad_".len()..];
            let stride = (values.len() / 7).max(1);
            for at in (0..values.len()).step_by(stride) {
                let mut moved = layer.clone();
                let x = layer.reals[name][at];
                let step = 1.0 / 1024.0;
                let mut loss = |by: f32| {
                    moved.reals.get_mut(name).unwrap()[at] = x + by;
                    (moved.loss(&reference), f64::from(x + by))
                };
                // two differences, extrapolated
                let mut slope = |by: f32| {
                    let ((up, a), (down, b)) = (loss(by), loss(-by));
                    (up - down) / (a - b)
                };
                let (coarse, fine) = (slope(2.0 * step), slope(step));
                let want = fine + (fine - coarse) / 3.0;
                assert!((values[at] - want).abs() < 1e-6 * want.abs().max(1.0), "{grad}[{at}]: got {}, expected {want}; {:?}", values[at], layer.op);
            }
        }
    }
}

#[test]
fn every_device_agrees_with_the_reference() {
    let reference = Device::open("reference").unwrap();
    let devices = devices();
    let sizes = [[1, 1, 1, 1, 1], [3, 5, 7, 3, 13], [2, 4, 3, 17, 50], [1, 9, 6, 5, 131], [2, 3, 2, 33, 64], [37, 2, 3, 2, 5], [1, 1, 2, 4, 260]];
    let mut worst: BTreeMap<(&str, &str), f64> = BTreeMap::new();
    for layer in layers(&sizes) {
        let want = layer.results(&reference);
        for device in &devices {
            let got = layer.results(device);
            for (name, want) in &want {
                // weights' gradients sum over B·T
                let scale = want.iter().fold(1.0, |m: f64, w| m.max(w.abs()));
                for (i, (g, w)) in got[name].iter().zip(want).enumerate() {
                    let error = (g - w).abs() / scale;
                    assert!(error < 5e-6, "{}: {name}[{i}]: got {g}, expected {w}; {:?}", device.info(), layer.op);
                    let worst = worst.entry((device.info().kind.name(), *name)).or_default();
                    *worst = worst.max(error);
                }
            }
        }
    }
    eprintln!("worst errors: {worst:?}");
}

/// Layers stored in 16 bits: the forward kernels on tensor cores, at the edges of their tiles, and those that multiply otherwise.
#[test]
fn sixteen_bits_agree_with_the_reference() {
    let reference = Device::open("reference").unwrap();
    let schedules = [Schedule::Forward, Schedule::Reverse, Schedule::Random(7)];
    let on_host = schedules.map(|schedule| Device::open_with("cuda-host", &OpenOptions { schedule: Some(schedule), ..OpenOptions::default() }).unwrap());
    let devices: Vec<Device> = on_host.into_iter().chain([Device::open("cpu").unwrap()]).collect();
    let sizes = [
        [1, 1, 1, 1, 1],
        [3, 15, 4, 2, 5],
        [1, 17, 5, 3, 8],
        [3, 16, 3, 16, 16],
        [1, 40, 3, 7, 33],
        [3, 17, 2, 40, 64],
        [2, 5, 3, 16, 128],
        [1, 16, 3, 5, 130],
        [1, 3, 2, 9, 256],
        [2, 2, 2, 170, 33],
        [1, 2, 2, 700, 3],
        [1, 2, 2, 2, 257],
    ];
    let mut worst: BTreeMap<(&str, &str), f64> = BTreeMap::new();
    for mut layer in layers(&sizes) {
        for (stored, name, tiny) in [(Elem::F16, "f16", 2f64.powi(-24)), (Elem::Bf16, "bf16", 0.0)] {
            layer.stored = stored;
            let want = layer.results(&reference);
            for device in &devices {
                let got = layer.results(device);
                for (result, want) in &want {
                    let scale = want.iter().fold(1.0, |m: f64, w| m.max(w.abs()));
                    for (i, (g, w)) in got[result].iter().zip(want).enumerate() {
                        // stored on both sides; the rest are sums, and in bf16 h as 16 bits and a rest of 16
                        let error = ((g - w).abs() - 2.0 * stored.roundoff() * w.abs() - tiny).max(0.0) / scale;
                        let limit = if stored == Elem::F16 { 5e-6 } else { 2e-5 };
                        assert!(error < limit, "{} {name}: {result}[{i}]: got {g}, expected {w}; {:?}", device.info(), layer.op);
                        let worst = worst.entry((name, *result)).or_default();
                        *worst = worst.max(error);
                    }
                }
            }
        }
    }
    eprintln!("worst errors: {worst:?}");
}

#[test]
fn wide_layers_agree_with_the_reference() {
    let reference = Device::open("reference").unwrap();
    for device in devices().into_iter().step_by(3) {
        for cell in [Cell::Lstm, Cell::Gru] {
            let layer = Layer::new(Recurrent::new(cell, 1, 3, 2, 2, 513), BIAS);
            let (want, got) = (layer.results(&reference), layer.results(&device));
            for (name, want) in &want {
                let scale = want.iter().fold(1.0, |m: f64, w| m.max(w.abs()));
                let worst = got[name].iter().zip(want).map(|(g, w)| (g - w).abs() / scale).fold(0.0, f64::max);
                assert!(worst < 5e-6, "{}: {name}: {worst:e}", device.info());
            }
        }
    }
}

#[test]
fn splitting_changes_no_bit() {
    let lstm = Recurrent::new(Cell::Lstm, 3, 11, 9, 4, 6);
    let kinds = [
        Layer::new(lstm, EVERYTHING),
        Layer::new(Recurrent { reverse: true, keep: Keep::States, y_stride: 12, y_offset: 6, x_models: 1, ..lstm }, LENGTHS | STARTS),
        Layer::new(Recurrent { cell: Cell::Gru, learned_start: true, ..lstm }, EVERYTHING),
        // sixteen slices of one model
        Layer::new(Recurrent { models: 1, x_models: 1, batch: 70, time: 120, ..lstm }, EVERYTHING),
    ];
    let bits = |out: &BTreeMap<&'static str, Vec<f64>>| -> Vec<u64> { out.values().flatten().map(|x| x.to_bits()).collect() };
    for name in ["cpu", "wgpu", "cuda-host"] {
        let whole = Device::open(name).unwrap();
        // tensor cores
        let stored = if name == "cuda-host" { vec![Elem::F16, Elem::Bf16] } else { Vec::new() };
        let halves = stored.into_iter().flat_map(|stored| kinds.iter().map(move |kind| Layer { stored, ..kind.clone() }));
        for layer in kinds.iter().cloned().chain(halves) {
            let want = bits(&layer.results(&whole));
            // two models, then some sequences of one; one model or slice; few steps
            let some = if layer.op.models > 1 { [9000, 2400] } else { [70_000, 25_000] };
            let small = [
                OpenOptions { binding_bytes: Some(4 * some[0]), ..OpenOptions::default() },
                OpenOptions { binding_bytes: Some(4 * some[1]), ..OpenOptions::default() },
                OpenOptions { work_per_launch: Some(1), ..OpenOptions::default() },
                OpenOptions { loop_rounds: Some(3200), ..OpenOptions::default() },
            ];
            for (i, options) in small.iter().enumerate() {
                let device = Device::open_with(name, options).unwrap();
                match layer.run(&device, &mut Vec::new()) {
                    Ok(out) => assert!(want == bits(&out), "{name}: options {i} change bits of {:?}", layer.op),
                    // one slice of a model is all its sequences
                    Err(Error::TooLarge { .. }) if i == 1 && layer.op.models > 1 => {}
                    Err(error) => panic!("{name}: options {i}: {error}"),
                }
            }
        }
    }
}

/// On the CPU many small models go one at a time, the gradients of each in one launch; one model goes through the other kernels.
#[test]
fn many_models_have_the_bits_of_each_alone() {
    let lstm = Recurrent { y_stride: 40, y_offset: 19, ..Recurrent::new(Cell::Lstm, 17, 50, 5, 3, 18) };
    let kinds = [
        Layer::new(lstm, EVERYTHING),
        Layer::new(Recurrent { reverse: true, keep: Keep::States, learned_start: true, ..lstm }, EVERYTHING),
        Layer::new(Recurrent { cell: Cell::Gru, keep: Keep::States, ..lstm }, EVERYTHING),
        Layer::new(Recurrent { cell: Cell::Gru, reverse: true, ..lstm }, BIAS | RESETS),
    ];
    for name in ["cpu", "reference"] {
        let device = Device::open(name).unwrap();
        for layer in &kinds {
            let (mut of_all, mut of_one) = (Vec::new(), Vec::new());
            let all = layer.run(&device, &mut of_all).unwrap();
            for m in [0, 16] {
                let of_model = |x: &[f32]| x[m * x.len() / 17..(m + 1) * x.len() / 17].to_vec();
                let reals = layer.reals.iter().map(|(name, x)| (*name, of_model(x))).collect();
                let alone = Layer { op: Recurrent { models: 1, x_models: 1, ..layer.op }, reals, words: layer.words.clone(), stored: layer.stored };
                for (result, want) in alone.run(&device, &mut of_one).unwrap() {
                    let got = &all[result][m * want.len()..][..want.len()];
                    assert!(got.iter().zip(&want).all(|(a, b)| a.to_bits() == b.to_bits()), "{name}: {result} of model {m}; {:?}", layer.op);
                }
            }
            assert!(of_all[1] == 1 + usize::from(layer.op.learned_start) && of_one[1] > of_all[1], "{name}: {of_all:?} {of_one:?}; {:?}", layer.op);
        }
    }
}

#[test]
fn at_most_three_launches_each_way() {
    for device in devices() {
        for (keep, time) in [(Keep::Gates, 5), (Keep::States, 5), (Keep::Gates, 40)] {
            for cell in [Cell::Lstm, Cell::Gru] {
                let layer = Layer::new(Recurrent { keep, ..Recurrent::new(cell, 2, 4, time, 3, 2) }, EVERYTHING);
                let mut launches = Vec::new();
                layer.run(&device, &mut launches).unwrap();
                assert!(launches[0] == 2 && launches[1] <= 3, "{}: {launches:?}", device.info());
            }
        }
    }
}

#[test]
fn a_bad_model_or_padding_harms_no_other() {
    for device in devices() {
        for cell in [Cell::Lstm, Cell::Gru] {
            for keep in [Keep::States, Keep::Gates] {
                let op = Recurrent { keep, ..Recurrent::new(cell, 3, 5, 6, 3, 4) };
                let layer = Layer::new(op, EVERYTHING & !RESETS);
                let want = layer.results(&device);
                let mut bad = layer.clone();
                let each = bad.reals["w_hh"].len() / 3;
                bad.reals.get_mut("w_hh").unwrap()[each..2 * each].fill(f32::NAN);
                let got = bad.results(&device);
                for (name, want) in &want {
                    let each = want.len() / 3;
                    for m in [0, 2] {
                        assert_eq!(want[m * each..(m + 1) * each], got[name][m * each..(m + 1) * each], "{}: {name} of model {m}", device.info());
                    }
                }
                assert!(got["hn"][got["hn"].len() / 3..2 * got["hn"].len() / 3].iter().any(|x| x.is_nan()), "{}: a NaN got lost", device.info());
                let mut padded = layer.clone();
                for (b, &length) in layer.words["lengths"].iter().enumerate() {
                    for t in length as usize..6 {
                        for m in 0..3 {
                            padded.reals.get_mut("x").unwrap()[((m * 5 + b) * 6 + t) * 3..][..3].fill(f32::NAN);
                            padded.reals.get_mut("grad_y").unwrap()[((m * 5 + b) * 6 + t) * 4..][..4].fill(f32::NAN);
                        }
                    }
                }
                assert_eq!(want, padded.results(&device), "{}: padding was read", device.info());
            }
        }
    }
}

#[test]
fn empty_sizes_are_legal() {
    for device in devices() {
        for cell in [Cell::Lstm, Cell::Gru] {
            let out = Layer::new(Recurrent::new(cell, 2, 0, 4, 3, 2), BIAS).results(&device);
            assert!(out["y"].is_empty());
            let layer = Layer::new(Recurrent::new(cell, 2, 3, 0, 3, 2), BIAS | STARTS);
            let out = layer.results(&device);
            let as_f64 = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
            assert_eq!(out["hn"], as_f64(&layer.reals["h0"]));
            assert_eq!(out["grad_h0"], as_f64(&layer.reals["grad_hn"]));
            assert!(out["grad_w_hh"].iter().all(|&g| g == 0.0));
        }
    }
}

#[test]
fn illegal_calls_are_typed_errors() {
    let device = Device::open("cpu").unwrap();
    let op = Recurrent::new(Cell::Lstm, 2, 3, 4, 2, 5);
    let refused = |op: Recurrent| assert!(matches!(op.check(), Err(Error::Parameter { .. })), "{op:?}");
    refused(Recurrent { hidden: 0, ..op });
    refused(Recurrent { models: 0, ..op });
    refused(Recurrent { inputs: 0, ..op });
    refused(Recurrent { x_models: 3, ..op });
    refused(Recurrent { y_offset: 1, ..op });
    refused(Recurrent { batch: 1 << 60, ..op });
    for name in ["x", "w_ih", "w_hh", "b_ih", "h0", "c0", "grad_y", "grad_hn", "grad_cn"] {
        let mut layer = Layer::new(op, EVERYTHING);
        layer.reals.get_mut(name).unwrap().pop();
        let error = layer.run(&device, &mut Vec::new()).unwrap_err();
        assert!(matches!(&error, Error::Shape { op: "lstm", arg, .. } if arg == name), "{name}: {error}");
    }
    for name in ["lengths", "resets"] {
        let mut layer = Layer::new(op, EVERYTHING);
        layer.words.get_mut(name).unwrap().pop();
        assert!(matches!(layer.run(&device, &mut Vec::new()), Err(Error::Shape { .. })), "{name}");
    }
    let mut gru = Layer::new(Recurrent { cell: Cell::Gru, ..op }, BIAS);
    gru.reals.remove("b_hh");
    assert!(matches!(gru.run(&device, &mut Vec::new()), Err(Error::Shape { op: "gru", .. })));
    let wgpu = Device::open("wgpu").unwrap();
    let wide = Layer::new(Recurrent::new(Cell::Lstm, 1, 1, 1, 1, 1025), 0);
    assert!(matches!(wide.run(&wgpu, &mut Vec::new()), Err(Error::TooLarge { .. })));
}
