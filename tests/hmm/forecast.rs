//! `hmm_forecast`, `hmm_sojourn`.

use crate::common::{DEVICES, Rng, open, open_all};
use forback::kernels::hmm::{LOG_ZERO, Transitions, log_probabilities};
use forback::kernels::hmm_forecast::{Ahead, hmm_forecast, hmm_sojourn};
use forback::kernels::{Device, Error, View};

fn table(device: &Device, rows: &[f64], k: usize, per_sequence: bool, per_step: bool) -> Transitions {
    let log_trans = View::from(&device.upload("log_trans", &log_probabilities("transitions", rows, k).unwrap()).unwrap());
    Transitions::Table { log_trans, per_sequence, per_step }
}

fn ahead(device: &Device, probability: &[f32], k: usize, steps: u64, transitions: Transitions) -> Ahead {
    let b = (probability.len() / k) as u64;
    Ahead { b, k: k as u64, steps, probability: View::from(&device.upload("probability", probability).unwrap()), transitions }
}

fn forecast(device: &Device, ahead: &Ahead) -> Vec<f64> {
    let mut pass = device.pass("forecast");
    let out = hmm_forecast(&mut pass, ahead).unwrap();
    let read = pass.read(&out).unwrap();
    pass.submit().unwrap().f64(read).unwrap()
}

/// survival, sojourn, capped, expected.
type Found = (Vec<f64>, Vec<f64>, Vec<u32>, Vec<f64>);

fn sojourn(device: &Device, ahead: &Ahead, level: f64, cap: f64) -> Found {
    let mut pass = device.pass("sojourn");
    let out = hmm_sojourn(&mut pass, ahead, level, cap).unwrap();
    let reads = (pass.read(&out.survival).unwrap(), pass.read(&out.sojourn).unwrap(), pass.read(&out.capped).unwrap(), pass.read(&out.expected).unwrap());
    let mut done = pass.submit().unwrap();
    (done.f64(reads.0).unwrap(), done.f64(reads.1).unwrap(), done.u32(reads.2).unwrap(), done.f64(reads.3).unwrap())
}

#[track_caller]
fn close(what: &str, got: f64, want: f64, tolerance: f64) {
    assert!((got - want).abs() <= tolerance * want.abs().max(1.0), "{what}: {got} instead of {want}");
}

fn tolerance(device: &Device) -> f64 {
    if device.info().kind.name() == "reference" { 1e-7 } else { 2e-6 }
}

/// [[.9,.1],[.2,.8]] from state 0: matrix powers, towards (2/3, 1/3).
#[test]
fn powers_of_a_matrix() {
    for device in open_all(&DEVICES) {
        let steps = if device.info().kind.name() == "cuda-host" { 60 } else { 500 };
        let x = forecast(&device, &ahead(&device, &[1.0, 0.0], 2, steps, table(&device, &[0.9, 0.1, 0.2, 0.8], 2, false, false)));
        for (s, want) in [(1, [0.9, 0.1]), (5, [0.72269, 0.27731]), (20, [0.666_932_64, 0.333_067_36]), (60, [2.0 / 3.0, 1.0 / 3.0])] {
            (0..2).for_each(|j| close(&format!("{}: step {s}", device.info()), x[2 * (s - 1) + j], want[j], tolerance(&device)));
        }
        for (s, row) in x.chunks_exact(2).enumerate() {
            close(&format!("{}: sum of step {s}", device.info()), row[0] + row[1], 1.0, 5e-7);
        }
    }
}

fn softmax(rng: &mut Rng, k: usize) -> Vec<f64> {
    let x: Vec<f64> = (0..k).map(|_| (2.0 * rng.normal()).exp()).collect();
    let sum: f64 = x.iter().sum();
    x.iter().map(|x| x / sum).collect()
}

/// A matrix for every step and sequence, for many K, against plain products.
#[test]
fn products_of_matrices() {
    for device in open_all(&DEVICES) {
        for (b, h, k) in [(3, 4, 1), (70, 5, 3), (5, 3, 17), (2, 3, 130)] {
            if device.info().kind.name() == "cuda-host" && k > 100 {
                continue;
            }
            let rng = &mut Rng::new(k as u32);
            let rows: Vec<f64> = (0..b * h * k).flat_map(|_| softmax(rng, k)).collect();
            let p: Vec<f32> = (0..b).flat_map(|_| softmax(rng, k)).map(|x| x as f32).collect();
            let x = forecast(&device, &ahead(&device, &p, k, h as u64, table(&device, &rows, k, true, true)));
            for i in 0..b {
                let mut now: Vec<f64> = p[i * k..(i + 1) * k].iter().map(|&x| f64::from(x)).collect();
                for s in 0..h {
                    let a = &rows[(i * h + s) * k * k..];
                    now = (0..k).map(|j| (0..k).map(|c| now[c] * a[c * k + j]).sum()).collect();
                    (0..k).for_each(|j| close(&format!("{} K = {k}", device.info()), x[(i * h + s) * k + j], now[j], 2e-6));
                }
            }
        }
    }
}

/// Transitions from future inputs.
#[test]
fn softmax_of_future_inputs() {
    let (k, h) = (3, 6);
    let rng = &mut Rng::new(8);
    let weights: Vec<f32> = (0..k * k * 3).map(|_| rng.normal() as f32).collect();
    let inputs: Vec<f32> = (0..2 * h * 2).map(|_| rng.normal() as f32).collect();
    let p = [0.2f32, 0.5, 0.3, 1.0, 0.0, 0.0];
    let row = |b: usize, s: usize, i: usize| -> Vec<f64> {
        let input = &inputs[(b * h + s) * 2..];
        let z = |j: usize| {
            let w = &weights[(i * k + j) * 3..];
            (f64::from(w[0]) * f64::from(input[0]) + f64::from(w[1]) * f64::from(input[1]) + f64::from(w[2])).exp()
        };
        let sum: f64 = (0..k).map(z).sum();
        (0..k).map(|j| z(j) / sum).collect()
    };
    for device in open_all(&DEVICES) {
        let transitions = Transitions::Softmax {
            weights: View::from(&device.upload("weights", &weights).unwrap()),
            inputs: View::from(&device.upload("inputs", &inputs).unwrap()),
            u: 2,
            per_sequence: false,
        };
        let ahead = ahead(&device, &p, k, h as u64, transitions);
        let (x, durations) = (forecast(&device, &ahead), sojourn(&device, &ahead, 0.5, 1e4));
        for b in 0..2 {
            let mut now: Vec<f64> = p[b * k..(b + 1) * k].iter().map(|&x| f64::from(x)).collect();
            let mut stay = vec![1.0; k];
            for s in 0..h {
                now = (0..k).map(|j| (0..k).map(|i| now[i] * row(b, s, i)[j]).sum()).collect();
                for j in 0..k {
                    stay[j] *= row(b, s, j)[j];
                    close(&format!("{}", device.info()), x[(b * h + s) * k + j], now[j], 2e-6);
                    close(&format!("{}: survival", device.info()), durations.0[(b * h + s) * k + j], stay[j], 2e-6);
                }
            }
        }
    }
}

/// Means, medians and variances of geometric sojourns; averages of durations, not the duration of an average.
#[test]
fn durations_of_constant_chains() {
    let rows = [0.9, 0.1, 0.2, 0.8];
    for device in open_all(&DEVICES) {
        let tolerance = if device.info().kind.name() == "reference" { 1e-6 } else { 1e-5 };
        // With and without steps to look at: the same.
        for steps in [0, 1, 7, 200] {
            let x = sojourn(&device, &ahead(&device, &[0.6, 0.4], 2, steps, table(&device, &rows, 2, false, false)), 0.5, 1e4);
            for (i, a) in [0.9f64, 0.8].into_iter().enumerate() {
                let what = format!("{}: {a}, {steps} steps", device.info());
                close(&what, x.1[3 * i], 1.0 / (1.0 - a), tolerance);
                close(&what, x.1[3 * i + 1], a / (1.0 - a).powi(2), 4.0 * tolerance);
                close(&what, x.1[3 * i + 2], 0.5f64.ln() / a.ln(), tolerance);
                (0..steps as usize).for_each(|s| close(&what, x.0[2 * s + i], a.powi(s as i32 + 1), tolerance));
            }
            close("expected", x.3[0], 8.0, tolerance);
            assert_eq!(x.2, [0, 0]);
        }
        let twenty = sojourn(&device, &ahead(&device, &[0.3, 0.7], 2, 0, table(&device, &[0.95, 0.05, 0.05, 0.95], 2, false, false)), 0.9, 1e4);
        close("20", twenty.1[0], 20.0, tolerance);
        close("90 %", twenty.1[2], 0.1f64.ln() / 0.95f64.ln(), tolerance);
        // log a = −1e-6 keeps its digits; a state that is never left, and one that is always left.
        let log_trans =
            [-1e-6f32, -13.815_511, LOG_ZERO as f32, LOG_ZERO as f32, 0.0, LOG_ZERO as f32, -std::f32::consts::LN_2, -std::f32::consts::LN_2, LOG_ZERO as f32];
        let transitions = Transitions::Table { log_trans: View::from(&device.upload("log_trans", &log_trans).unwrap()), per_sequence: false, per_step: false };
        for steps in [0, 5] {
            let x = sojourn(&device, &ahead(&device, &[0.0, 0.0, 1.0], 3, steps, transitions.clone()), 0.5, 2e6);
            close("a million", x.1[0], 1e6, 1e-5);
            assert_eq!((x.1[3], x.1[5], x.2[1]), (2e6, 2e6, 1), "{}: absorbing", device.info());
            assert!(x.1[4] <= -1e29, "{}: its variance", device.info());
            close("left at once", x.1[6], 1.0, 1e-6);
            assert_eq!(x.2, [0, 1, 0]);
            let cut = sojourn(&device, &ahead(&device, &[0.0, 0.0, 1.0], 3, steps, transitions.clone()), 0.5, 1e4);
            assert_eq!((cut.1[0], cut.2[0]), (1e4, 1), "{}: the cap", device.info());
        }
    }
}

/// A path of probabilities to stay, against sums over simulated lengths of stay.
#[test]
fn durations_of_changing_chains() {
    let stays = [0.9, 0.5, 0.99, 0.2, 0.8];
    let rows: Vec<f64> = stays.iter().flat_map(|&a| [a, 1.0 - a, 0.5, 0.5]).collect();
    // E[D] by the definition Σ n·P(D = n), the last probability going on.
    let (mut alive, mut mean, mut square) = (1.0, 0.0, 0.0);
    for n in 1..4000 {
        let a = stays[(n - 1).min(stays.len() - 1)];
        let now = alive * (1.0 - a);
        mean += n as f64 * now;
        square += (n * n) as f64 * now;
        alive *= a;
    }
    for device in open_all(&DEVICES) {
        let x = sojourn(&device, &ahead(&device, &[1.0, 0.0], 2, 5, table(&device, &rows, 2, false, true)), 0.5, 1e4);
        close("mean", x.1[0], mean, 1e-5);
        close("variance", x.1[1], square - mean * mean, 1e-5);
        // S falls from 0.9 to 0.45 in the second step.
        close("median", x.1[2], 1.0 + (0.5f64 / 0.9).ln() / 0.5f64.ln(), 1e-5);
        close("expected", x.3[0], mean, 1e-5);
    }
}

#[test]
fn bad_requests_are_named() {
    let device = open("cpu").unwrap();
    let constant = || table(&device, &[0.9, 0.1, 0.2, 0.8], 2, false, false);
    let fails = |a: &Ahead| hmm_forecast(&mut device.pass("bad"), a).unwrap_err();
    assert!(matches!(fails(&ahead(&device, &[1.0, 0.0], 2, 0, constant())), Error::Parameter { .. }));
    assert!(matches!(fails(&ahead(&device, &[1.0, 0.0, 0.0], 3, 2, constant())), Error::Shape { .. }));
    let mut none = ahead(&device, &[1.0, 0.0], 2, 2, constant());
    none.k = 0;
    assert!(matches!(fails(&none), Error::Parameter { .. }));
    for (level, cap) in [(0.0, 10.0), (1.0, 10.0), (f64::NAN, 10.0), (0.5, 0.0), (0.5, f64::NAN)] {
        let request = ahead(&device, &[1.0, 0.0], 2, 2, constant());
        assert!(matches!(hmm_sojourn(&mut device.pass("bad"), &request, level, cap), Err(Error::Parameter { .. })), "{level} {cap}");
    }
}
