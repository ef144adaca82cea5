//! Objectives: published anchors, gradients against central differences, epochs in batches, every column against the reference.

use forback::kernels::objective::{
    Goal, NetReturns, Objective, Series, net_returns, net_returns_backward, objective, objective_backward, objective_finish, objective_gradient,
    objective_moments, objective_tail,
};
use forback::kernels::{Device, Error, OpenOptions, Schedule, View};

fn devices() -> Vec<(String, Device)> {
    let open = |name: &str, options: OpenOptions| (format!("{name} {options:?}"), Device::open_with(name, &options).unwrap());
    let schedule = |s| OpenOptions { schedule: Some(s), ..OpenOptions::default() };
    let checked = |c| OpenOptions { checked: Some(c), ..OpenOptions::default() };
    vec![
        open("cpu", OpenOptions::default()),
        open("wgpu", checked(true)),
        open("wgpu", checked(false)),
        open("cuda-host", schedule(Schedule::Forward)),
        open("cuda-host", schedule(Schedule::Reverse)),
    ]
}

/// Returns of about one percent, the same for the same seed.
fn noise(seed: u32, n: u64) -> Vec<f32> {
    let mut state = u64::from(seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) + 1;
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            0.02 * ((state >> 40) as f32 / (1u64 << 23) as f32 - 0.97)
        })
        .collect()
}

fn goals() -> [Goal; 8] {
    [
        Goal::Sharpe { risk_free: 0.0001 },
        Goal::Sortino { target: 0.0 },
        Goal::Sortino { target: 0.001 },
        Goal::Calmar,
        Goal::MaxDrawdown { additive: false },
        Goal::MaxDrawdown { additive: true },
        Goal::Cvar { alpha: 0.07 },
        Goal::MeanVariance { risk_aversion: 3.0 },
    ]
}

fn op(goal: Goal, rows: u64, bars: u64, floor: f64) -> Objective {
    Objective { goal, rows, bars, periods_per_year: 252.0, floor }
}

/// Value [N] and gradient [N,T] with grad_value = 1, −2, 3, …
fn run(device: &Device, op: &Objective, returns: &[f32]) -> Result<(Vec<f64>, Vec<f64>), Error> {
    run_ragged(device, op, returns, None)
}

/// The same of rows of these lengths.
fn run_ragged(device: &Device, op: &Objective, returns: &[f32], lengths: Option<&[u32]>) -> Result<(Vec<f64>, Vec<f64>), Error> {
    let zeros = |len: u64| device.zeros("zeros", len).map(|b| View::from(&b));
    let returns = View::from(&device.upload("returns", returns)?);
    let up: Vec<f32> = (0..op.rows).map(|i| (i + 1) as f32 * if i % 2 == 0 { 1.0 } else { -1.0 }).collect();
    let grad_value = View::from(&device.upload("grad_value", &up)?);
    let (value, coefficients, state, grad) = (zeros(op.rows)?, zeros(op.saved())?, zeros(op.state())?, zeros(returns.len())?);
    let lengths = lengths.map(|lengths| device.upload_u32("lengths", lengths).map(|b| View::from(&b))).transpose()?;
    let series = Series { returns: &returns, lengths: lengths.as_ref() };
    let mut pass = device.pass("test");
    objective(&mut pass, op, series, &value, &coefficients, &state)?;
    objective_backward(&mut pass, op, series, &coefficients, &grad_value, &grad)?;
    let (value, grad) = (pass.read(&value)?, pass.read(&grad)?);
    let mut done = pass.submit()?;
    // the nearest f32 to −1e30 is not it
    let value = done.f64(value)?.into_iter().map(|v| if v <= -1e29 { -1e30 } else { v }).collect();
    Ok((value, done.f64(grad)?))
}

/// The same in batches of `batch` bars, then of what is left.
fn run_epoch(device: &Device, whole: &Objective, returns: &[f32], lengths: Option<&[u32]>, batch: u64) -> (Vec<f64>, Vec<f64>) {
    let zeros = |len: u64| View::from(&device.zeros("zeros", len).unwrap());
    let up: Vec<f32> = (0..whole.rows).map(|i| (i + 1) as f32 * if i % 2 == 0 { 1.0 } else { -1.0 }).collect();
    let grad_value = View::from(&device.upload("grad_value", &up).unwrap());
    let (value, coefficients, state, bins) = (zeros(whole.rows), zeros(whole.saved()), zeros(whole.state()), zeros(whole.bins()));
    let lengths = lengths.map(|lengths| View::from(&device.upload_u32("lengths", lengths).unwrap()));
    let part = |from: u64| {
        let bars = batch.min(whole.bars - from);
        let rows = returns.chunks_exact(whole.bars as usize).flat_map(|row| row[from as usize..(from + bars) as usize].to_vec());
        (Objective { bars, ..*whole }, View::from(&device.upload("batch", &rows.collect::<Vec<f32>>()).unwrap()))
    };
    let mut pass = device.pass("epoch");
    for sweep in 0..whole.sweeps(device) {
        for from in (0..whole.bars).step_by(batch as usize) {
            let (op, x) = part(from);
            if sweep == 0 {
                objective_moments(&mut pass, &op, Series { returns: &x, lengths: lengths.as_ref() }, from, &state).unwrap();
            }
            objective_tail(&mut pass, &op, Series { returns: &x, lengths: lengths.as_ref() }, from, sweep, &state, &bins).unwrap();
        }
    }
    objective_finish(&mut pass, whole, &state, &value, &coefficients).unwrap();
    let mut grads = Vec::new();
    for from in (0..whole.bars).step_by(batch as usize) {
        let (op, x) = part(from);
        let grad = zeros(x.len());
        objective_gradient(&mut pass, &op, Series { returns: &x, lengths: lengths.as_ref() }, from, &coefficients, &grad_value, &grad).unwrap();
        grads.push((from, op.bars, pass.read(&grad).unwrap()));
    }
    let value = pass.read(&value).unwrap();
    let mut done = pass.submit().unwrap();
    let mut all = vec![0.0; returns.len()];
    for (from, bars, read) in grads {
        for (row, part) in done.f64(read).unwrap().chunks_exact(bars as usize).enumerate() {
            let at = row * whole.bars as usize + from as usize;
            all[at..at + bars as usize].copy_from_slice(part);
        }
    }
    let value = done.f64(value).unwrap().into_iter().map(|v| if v <= -1e29 { -1e30 } else { v }).collect();
    (value, all)
}

fn assert_close(what: &str, got: &[f64], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{what}");
    let scale = want.iter().filter(|w| w.abs() < 1e29).fold(1e-12f64, |a, b| a.max(b.abs()));
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!((g - w).abs() <= tolerance * scale || g == w, "{what}[{i}]: {g:e}, expected {w:e} (largest {scale:e})");
    }
}

#[test]
fn anchors() {
    // Worked examples of the definitions: a fall of 20 %, then +5 % and −10 %; ten returns for the tail; five for the ratios.
    let device = Device::open("reference").unwrap();
    let value = |goal, x: &[f32]| run(&device, &Objective { periods_per_year: 1.0, ..op(goal, 1, x.len() as u64, 0.0) }, x).unwrap().0[0];
    let close = |got: f64, want: f64| assert!((got - want).abs() < 1e-7, "{got}, expected {want}");
    let r = [0.1, -0.2, 0.05, -0.1, 0.3];
    close(value(Goal::MaxDrawdown { additive: true }, &r), 0.25);
    close(value(Goal::MaxDrawdown { additive: false }, &r), 0.244);
    close(value(Goal::MaxDrawdown { additive: false }, &[-0.1, 0.05, 0.02]), 0.1);
    close(value(Goal::Sortino { target: 0.0 }, &r), 0.3);
    let tail = [-0.05, -0.03, -0.02, 0.0, 0.01, 0.01, 0.02, 0.03, 0.04, 0.05];
    for (alpha, want) in [(0.2, 0.04), (0.25, 0.036), (0.05, 0.05), (1.0, -0.006)] {
        close(value(Goal::Cvar { alpha }, &tail), want);
    }
    let d = [-0.002, 0.001, 0.014, -0.01, 0.009];
    close(value(Goal::Sharpe { risk_free: 0.0 }, &d), 0.255_405_879_1);
    close(value(Goal::Sortino { target: 0.0 }, &d), 0.526_234_811_6);
    close(value(Goal::Calmar, &[0.1, -0.2]), (0.88f64.sqrt() - 1.0) / 0.2);
    close(value(Goal::MeanVariance { risk_aversion: 2.0 }, &[0.1, 0.3]), 0.2 - 0.02);
}

#[test]
fn gradients_are_central_differences() {
    let device = Device::open("reference").unwrap();
    for goal in goals() {
        for (rows, bars, floor) in [(1, 2, 0.01), (3, 13, 0.0), (2, 70, 0.003)] {
            let op = op(goal, rows, bars, floor);
            // a grid that f32 holds exactly, and a step on it
            let x: Vec<f32> = noise(3, rows * bars).iter().map(|r| (r * 65536.0).round() / 65536.0).collect();
            let (_, grad) = run(&device, &op, &x).unwrap();
            let h = 1.0f32 / (1 << 22) as f32;
            for i in 0..x.len() {
                let at = |by: f32| {
                    let mut y = x.clone();
                    y[i] += by;
                    run(&device, &op, &y).unwrap().0[i / bars as usize]
                };
                let row = i / bars as usize;
                let up = (row + 1) as f64 * if row.is_multiple_of(2) { 1.0 } else { -1.0 };
                let want = up * (at(h) - at(-h)) / (2.0 * f64::from(h));
                // a return at the target has two slopes
                let kink = matches!(goal, Goal::Sortino { .. }) && (f64::from(x[i]) - 0.001).abs().min(f64::from(x[i]).abs()) < 1e-6;
                assert!(kink || (grad[i] - want).abs() < 1e-5 * (1.0 + want.abs()), "{op:?} [{i}]: {:e}, differences {want:e}", grad[i]);
            }
        }
    }
}

#[test]
fn columns_agree_with_the_reference() {
    let reference = Device::open("reference").unwrap();
    let devices = devices();
    for goal in goals() {
        for (rows, bars, floor) in [(1, 1, 0.01), (5, 2, 0.0), (130, 3, 0.01), (3, 129, 0.0), (2, 1009, 0.001), (1, 20_011, 0.0)] {
            let op = op(goal, rows, bars, floor);
            let x = noise(5, rows * bars);
            let (value, grad) = run(&reference, &op, &x).unwrap();
            for (name, device) in &devices {
                let (got, got_grad) = run(device, &op, &x).unwrap();
                assert_close(&format!("{name} {op:?} value"), &got, &value, 2e-5);
                assert_close(&format!("{name} {op:?} gradient"), &got_grad, &grad, 2e-5);
            }
        }
    }
}

#[test]
fn an_epoch_in_batches_has_the_whole_epochs_gradient() {
    for goal in goals() {
        for (rows, bars, batch, ragged) in
            [(2, 500, 64, false), (3, 37, 1, false), (3, 101, 7, true), (6, 131, 130, true), (2, 60, 60, false), (1, 20_000, 16_384, false)]
        {
            let op = op(goal, rows, bars, 0.001);
            let x = noise(8, rows * bars);
            let lengths = [bars as u32, 1 + bars as u32 / 3, 0];
            let lengths = ragged.then_some(&lengths[..]);
            for (name, device) in devices().into_iter().chain([("reference".to_string(), Device::open("reference").unwrap())]) {
                if batch == 1 && name.starts_with("cuda-host") {
                    continue; // a launch for every bar: slow there, and the same code as the others
                }
                let (value, grad) = run_ragged(&device, &op, &x, lengths).unwrap();
                let (by_batch, grad_by_batch) = run_epoch(&device, &op, &x, lengths, batch);
                let tolerance = if name == "reference" { 1e-12 } else { 1e-5 };
                assert_close(&format!("{name} {op:?} value"), &by_batch, &value, tolerance);
                assert_close(&format!("{name} {op:?} gradient"), &grad_by_batch, &grad, tolerance);
            }
        }
    }
}

/// The threshold that the sweeps find is a value of the series, not one near it: the steps of the gradient are at the same bars.
#[test]
fn the_tail_of_an_epoch_in_batches_is_exact() {
    for (name, device) in devices().into_iter().chain([("reference".to_string(), Device::open("reference").unwrap())]) {
        for alpha in [0.001, 0.05, 0.5, 1.0] {
            let op = op(Goal::Cvar { alpha }, 3, 257, 0.0);
            // ties, both zeros, huge and tiny values
            let mut x = noise(21, 3 * 257);
            for (i, r) in [0.0f32, -0.0, -0.01, -0.01, -0.01, 1e-38, -1e-38, 3e38, -0.01].into_iter().enumerate() {
                x[i * 29] = r;
                x[257 + i] = r;
            }
            let ((_, grad), (_, by_batch)) = (run(&device, &op, &x).unwrap(), run_epoch(&device, &op, &x, None, 19));
            let differ = grad.iter().zip(&by_batch).filter(|(a, b)| (*a - *b).abs() > 1e-5 * a.abs()).count();
            assert_eq!(differ, 0, "{name} α {alpha}");
        }
    }
}

/// Rows of a ragged series are the rows cut to their lengths, bit for bit, and what lies past them is not read.
#[test]
fn ragged_rows_are_rows_cut_to_their_lengths() {
    for (name, device) in devices().into_iter().chain([("reference".to_string(), Device::open("reference").unwrap())]) {
        for goal in goals() {
            let (rows, bars, lengths) = (6u64, 140u64, [140u32, 7, 129, 1, 500, 0]);
            let mut x = noise(13, rows * bars);
            for (row, &length) in lengths.iter().enumerate() {
                x[row * 140 + (length as usize).min(140)..(row + 1) * 140].fill(f32::NAN);
            }
            let (value, grad) = run_ragged(&device, &op(goal, rows, bars, 0.001), &x, Some(&lengths)).unwrap();
            for (row, &length) in lengths.iter().enumerate() {
                let n = (length as usize).min(140);
                let (own, past) = grad[row * 140..(row + 1) * 140].split_at(n);
                assert!(past.iter().all(|&g| g == 0.0), "{name} {goal:?} row {row}");
                if n == 0 {
                    assert_eq!(value[row], -1e30, "{name} {goal:?}");
                    continue;
                }
                let up = (row + 1) as f64 * if row.is_multiple_of(2) { 1.0 } else { -1.0 };
                let (want, want_grad) = run(&device, &op(goal, 1, n as u64, 0.001), &x[row * 140..row * 140 + n]).unwrap();
                assert_eq!(value[row], want[0], "{name} {goal:?} row {row}");
                let want_grad: Vec<f64> = want_grad.iter().map(|g| up * g).collect();
                assert_close(&format!("{name} {goal:?} row {row}"), own, &want_grad, 1e-7);
            }
            // Lengths of three rows serve six.
            let (shared, _) = run_ragged(&device, &op(goal, rows, bars, 0.001), &noise(13, rows * bars), Some(&lengths[..3])).unwrap();
            let twice: Vec<u32> = lengths[..3].iter().chain(&lengths[..3]).copied().collect();
            let (own, _) = run_ragged(&device, &op(goal, rows, bars, 0.001), &noise(13, rows * bars), Some(&twice)).unwrap();
            assert_eq!(shared, own, "{name} {goal:?}");
        }
    }
}

#[test]
fn nothing_to_divide_by_is_undefined_or_floored() {
    for (name, device) in devices().into_iter().chain([("reference".to_string(), Device::open("reference").unwrap())]) {
        for (x, what) in [(vec![0.01f32; 40], "constant"), (vec![0.0; 40], "zero"), (vec![0.5], "one bar"), (vec![-1.5, 0.1, -2.0], "ruin")] {
            for goal in goals() {
                for floor in [0.0, 1e-4] {
                    let op = op(goal, 1, x.len() as u64, floor);
                    let (value, grad) = run(&device, &op, &x).unwrap();
                    assert!(value[0].is_finite() && grad.iter().all(|g| g.is_finite()), "{name} {what} {op:?}: {value:?} {grad:?}");
                    let ratio = matches!(goal, Goal::Sharpe { .. } | Goal::Calmar | Goal::Sortino { target: 0.0 });
                    if ratio && what != "ruin" && floor == 0.0 {
                        assert!(value[0] == -1e30 && grad.iter().all(|&g| g == 0.0), "{name} {what} {op:?}: {value:?} {grad:?}");
                    }
                    if ratio && what == "constant" && floor > 0.0 {
                        assert!(value[0] > 1.0 && value[0] < 1e8 && grad.iter().all(|&g| g > 0.0), "{name} {what} {op:?}: {value:?} {grad:?}");
                    }
                }
            }
        }
    }
}

#[test]
fn equal_losses_share_the_tail() {
    for (name, device) in devices() {
        let x = [-0.01f32, -0.02, -0.01, 0.0, -0.01, 0.03, 0.01, 0.0, -0.0, 0.02];
        let (value, grad) = run(&device, &op(Goal::Cvar { alpha: 0.2 }, 1, 10, 0.0), &x).unwrap();
        assert_close(&name, &value, &[0.015], 1e-6);
        let third = -1.0 / 6.0;
        assert_close(&name, &grad, &[third, -0.5, third, 0.0, third, 0.0, 0.0, 0.0, 0.0, 0.0], 1e-6);
    }
}

#[test]
fn turnover_costs_and_its_gradient_are_differences() {
    let reference = Device::open("reference").unwrap();
    let net = |device: &Device, rows: u64, bars: u64, x: &[f32], y: &[f32], g: &[f32]| {
        let op = NetReturns { rows, bars, cost: 0.25 };
        let up = |x: &[f32]| View::from(&device.upload("x", x).unwrap());
        let (x, y, g, r, dx) = (up(x), up(y), up(g), up(&vec![7.0; x.len()]), up(&vec![7.0; x.len()]));
        let mut pass = device.pass("net");
        net_returns(&mut pass, &op, &x, &y, &r).unwrap();
        net_returns_backward(&mut pass, &op, &x, &y, &g, &dx).unwrap();
        let (r, dx) = (pass.read(&r).unwrap(), pass.read(&dx).unwrap());
        let mut done = pass.submit().unwrap();
        (done.f64(r).unwrap(), done.f64(dx).unwrap())
    };
    let (r, _) = net(&reference, 1, 3, &[1.0, -1.0, -1.0], &[0.5, 0.25, -0.125], &[0.0; 3]);
    assert_eq!(r, [0.25, -0.75, 0.125]);
    for (rows, bars) in [(1, 1), (3, 5), (2, 131)] {
        let grid = |seed: u32| noise(seed, rows * bars).iter().map(|r| (r * 4096.0).round() / 64.0).collect::<Vec<f32>>();
        let (x, y, g) = (grid(1), grid(2), grid(3));
        let (want, want_grad) = net(&reference, rows, bars, &x, &y, &g);
        for i in 0..x.len() {
            let at = |by: f32| {
                let mut x = x.clone();
                x[i] += by;
                let r = net(&reference, rows, bars, &x, &y, &g).0;
                r.iter().zip(&g).map(|(r, &g)| r * f64::from(g)).sum::<f64>()
            };
            let differences = (at(0.001) - at(-0.001)) / f64::from((x[i] + 0.001) - (x[i] - 0.001));
            assert!((want_grad[i] - differences).abs() < 1e-6, "{rows} x {bars} [{i}]: {}, differences {differences}", want_grad[i]);
        }
        for (name, device) in devices() {
            let (r, dx) = net(&device, rows, bars, &x, &y, &g);
            assert_close(&name, &r, &want, 1e-6);
            assert_close(&name, &dx, &want_grad, 1e-6);
        }
    }
}

/// A batch of positions with a bar of its neighbours on either side has the net returns and the gradients of the whole series.
#[test]
fn net_returns_of_batches_need_a_bar_on_either_side() {
    for spec in ["reference", "cpu", "wgpu", "cuda-host"] {
        let device = Device::open(spec).unwrap();
        let (bars, x, y, g) = (101usize, noise(1, 101), noise(2, 101), noise(3, 101));
        let net = |from: usize, to: usize| {
            let op = NetReturns { rows: 1, bars: (to - from) as u64, cost: 0.125 };
            let up = |x: &[f32]| View::from(&device.upload("x", &x[from..to]).unwrap());
            let (x, y, g, r, dx) = (up(&x), up(&y), up(&g), up(&x), up(&x));
            let mut pass = device.pass("net");
            net_returns(&mut pass, &op, &x, &y, &r).unwrap();
            net_returns_backward(&mut pass, &op, &x, &y, &g, &dx).unwrap();
            let (r, dx) = (pass.read(&r).unwrap(), pass.read(&dx).unwrap());
            let mut done = pass.submit().unwrap();
            (done.f64(r).unwrap(), done.f64(dx).unwrap())
        };
        let (r, dx) = net(0, bars);
        for batch in [1, 7, 64] {
            for from in (0..bars).step_by(batch) {
                let to = (from + batch).min(bars);
                let (first, last) = (from.saturating_sub(1), (to + 1).min(bars));
                let (part, grad) = net(first, last);
                assert_eq!(part[from - first..to - first], r[from..to], "{spec} {from}..{to}");
                assert_eq!(grad[from - first..to - first], dx[from..to], "{spec} {from}..{to}");
            }
        }
    }
}

/// Asset returns that rows share are those of each row, whether a binding holds them or not.
#[test]
fn rows_share_asset_returns() {
    let small = OpenOptions { binding_bytes: Some(16 << 10), ..OpenOptions::default() };
    let open = |spec: &str| [Device::open(spec).unwrap(), Device::open_with(spec, &small).unwrap()];
    for device in ["reference", "cpu", "wgpu", "cuda-host"].into_iter().flat_map(open) {
        for (rows, series, bars) in [(6u64, 3u64, 5u64), (4, 1, 131), (6, 2, 2500), (14, 7, 700)] {
            let op = NetReturns { rows, bars, cost: 0.125 };
            let (x, y, g) = (noise(1, rows * bars), noise(2, series * bars), noise(3, rows * bars));
            let net = |y: &[f32]| {
                let up = |x: &[f32]| View::from(&device.upload("x", x).unwrap());
                let (x, y, g, r, dx) = (up(&x), up(y), up(&g), up(&x), up(&x));
                let mut pass = device.pass("net");
                net_returns(&mut pass, &op, &x, &y, &r).unwrap();
                net_returns_backward(&mut pass, &op, &x, &y, &g, &dx).unwrap();
                let (r, dx) = (pass.read(&r).unwrap(), pass.read(&dx).unwrap());
                let mut done = pass.submit().unwrap();
                (done.f64(r).unwrap(), done.f64(dx).unwrap())
            };
            let repeated: Vec<f32> = (0..rows / series).flat_map(|_| y.clone()).collect();
            assert_eq!(net(&y), net(&repeated), "{} {op:?} of {series}", device.info().kind.name());
        }
    }
}

#[test]
fn a_million_bars() {
    let bars = 1_000_000;
    let x = noise(11, bars);
    let reference = Device::open("reference").unwrap();
    for goal in [Goal::Sharpe { risk_free: 0.0 }, Goal::MaxDrawdown { additive: false }, Goal::Cvar { alpha: 0.05 }] {
        let op = op(goal, 1, bars, 0.0);
        let (value, grad) = run(&reference, &op, &x).unwrap();
        for name in ["cpu", "wgpu"] {
            let (got, got_grad) = run(&Device::open(name).unwrap(), &op, &x).unwrap();
            assert_close(&format!("{name} {goal:?} value"), &got, &value, 1e-4);
            assert_close(&format!("{name} {goal:?} gradient"), &got_grad, &grad, 1e-4);
        }
    }
}

#[test]
fn splits_change_no_bit() {
    for spec in ["cpu", "wgpu", "cuda-host"] {
        let whole = Device::open(spec).unwrap();
        let small = OpenOptions { binding_bytes: Some(16 << 10), work_per_launch: Some(60_000), groups_per_dimension: Some(5), ..OpenOptions::default() };
        let split = Device::open_with(spec, &small).unwrap();
        for goal in goals() {
            for (rows, bars) in [(37, 61), (3, 1001), (200, 3)] {
                let op = op(goal, rows, bars, 0.001);
                let x = noise(8, rows * bars);
                assert_eq!(run(&whole, &op, &x).unwrap(), run(&split, &op, &x).unwrap(), "{spec} {op:?}");
            }
        }
    }
}

#[test]
fn illegal_options_are_named() {
    let device = Device::open("cpu").unwrap();
    let good = op(Goal::Calmar, 2, 10, 0.0);
    let named = |op: Objective, name: &str| match run(&device, &op, &noise(1, 20)) {
        Err(Error::Parameter { op: "objective", name: got, .. }) => assert_eq!(got, name),
        other => panic!("{name}: {other:?}"),
    };
    named(Objective { periods_per_year: 0.0, ..good }, "periods_per_year");
    named(Objective { floor: -1.0, ..good }, "floor");
    named(Objective { goal: Goal::Cvar { alpha: 0.0 }, ..good }, "alpha");
    named(Objective { goal: Goal::Sortino { target: f64::NAN }, ..good }, "target");
    named(Objective { goal: Goal::MeanVariance { risk_aversion: -1.0 }, ..good }, "risk_aversion");
    assert!(matches!(run(&device, &Objective { bars: 9, ..good }, &noise(1, 20)), Err(Error::Shape { arg, .. }) if arg == "returns"));
    assert!(matches!(run(&device, &Objective { bars: 0, ..good }, &[]), Err(Error::Shape { arg, .. }) if arg == "bars"));
    let cvar = op(Goal::Cvar { alpha: 0.1 }, 2, 10, 0.0);
    let x = View::from(&device.upload("x", &noise(1, 20)).unwrap());
    let (state, bins) = (View::from(&device.zeros("state", cvar.state()).unwrap()), View::from(&device.zeros("bins", cvar.bins()).unwrap()));
    let refused = objective_tail(&mut device.pass("x"), &cvar, &x, 0, 5, &state, &bins);
    assert!(matches!(refused, Err(Error::Parameter { ref name, .. }) if name == "sweep"), "{refused:?}");
    for lengths in [vec![1u32; 3], vec![]] {
        let refused = run_ragged(&device, &good, &noise(1, 20), Some(&lengths));
        assert!(matches!(refused, Err(Error::Shape { ref arg, .. }) if arg == "lengths"), "{refused:?}");
    }
}
