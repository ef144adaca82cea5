//! `hmm_sample`, `hmm_sample_posterior`.

use crate::common::{DEVICES, Rng, open, open_all, open_with};
use forback::kernels::hmm::{
    Emission, Hmm, LOG_ZERO, PackShape, Transitions, log_probabilities, pack_categorical, pack_gaussian_diagonal, pack_gaussian_full, pack_poisson,
    pack_regression, pack_student_t, pack_words,
};
use forback::kernels::hmm_sample::{hmm_sample, hmm_sample_posterior, weight};
use forback::kernels::{Device, Error, OpenOptions, View};

const INIT: [f64; 3] = [0.5, 0.3, 0.2];
const TRANS: [f64; 9] = [0.9, 0.08, 0.02, 0.1, 0.8, 0.1, 0.0, 0.25, 0.75];

/// A shared chain of three states, with an emission's packed parameters behind log_init.
fn chain(device: &Device, b: usize, t: usize, emission: Emission, d: u64, model: &[f32]) -> Hmm {
    let log_trans = log_probabilities("transitions", &TRANS, 3).unwrap();
    let model = View::from(&device.upload("model", model).unwrap());
    Hmm {
        b: b as u64,
        t: t as u64,
        k: 3,
        d,
        emission,
        obs: model.clone(),
        model,
        per_sequence: false,
        transitions: Transitions::Table { log_trans: View::from(&device.upload("log_trans", &log_trans).unwrap()), per_sequence: false, per_step: false },
        words: None,
        masked: false,
    }
}

fn log_init() -> Vec<f64> {
    INIT.iter().map(|p| p.ln()).collect()
}

fn states_only(device: &Device, b: usize, t: usize) -> Hmm {
    let model: Vec<f32> = log_init().iter().map(|&x| x as f32).collect();
    chain(device, b, t, Emission::LogProbabilities, 0, &model)
}

fn draw(device: &Device, hmm: &Hmm, seed: u64) -> (Vec<u32>, Vec<f64>) {
    let mut pass = device.pass("sample");
    let out = hmm_sample(&mut pass, hmm, seed).unwrap();
    let states = pass.read(&out.states).unwrap();
    let obs = out.obs.as_ref().map(|o| pass.read(o).unwrap());
    let mut done = pass.submit().unwrap();
    (done.u32(states).unwrap(), obs.map(|o| done.f64(o).unwrap()).unwrap_or_default())
}

#[test]
fn weights_are_probabilities_in_whole_numbers() {
    let rng = &mut Rng::new(3);
    assert_eq!((weight(0.0), weight(-0.0), weight(1e-7), weight(LOG_ZERO as f32), weight(-22.0)), (1 << 31, 1 << 31, 1 << 31, 0, 0));
    for i in 0..20_000 {
        let x = if i % 2 == 0 { -22.0 * rng.unit() } else { -(-20.0 * rng.unit()).exp() } as f32;
        let want = f64::from(x).exp() * 2f64.powi(31);
        let got = f64::from(weight(x));
        assert!((got - want).abs() <= 3.0 + 3e-8 * want, "{x}: {got} instead of {want}");
    }
}

/// Integers alone decide: the same states everywhere, however the batch is cut, also where T passes a software adapter's loops.
#[test]
fn every_device_draws_the_same_states() {
    let (reference, cpu) = (open("reference").unwrap(), open("cpu").unwrap());
    let want = draw(&reference, &states_only(&reference, 150, 37), 42).0;
    for device in open_all(&DEVICES) {
        assert_eq!(draw(&device, &states_only(&device, 150, 37), 42).0, want, "{}", device.info());
        assert_ne!(draw(&device, &states_only(&device, 150, 37), 43).0, want, "{}: another seed", device.info());
        let fewer = draw(&device, &states_only(&device, 70, 37), 42).0;
        assert_eq!(fewer, want[..70 * 37], "{}: a shorter batch", device.info());
        let cut = OpenOptions { binding_bytes: Some(4 * 37 * 33), ..OpenOptions::default() };
        if let Some(small) = open_with(device.info().kind.name(), &cut) {
            assert_eq!(draw(&small, &states_only(&small, 150, 37), 42).0, want, "{}: in parts", device.info());
        }
    }
    let long = draw(&cpu, &states_only(&cpu, 1, 20_000), 1).0;
    if let Some(device) = open("wgpu") {
        assert_eq!(draw(&device, &states_only(&device, 1, 20_000), 1).0, long);
    }
}

#[test]
fn transitions_have_their_frequencies() {
    let device = open("cpu").unwrap();
    let (b, t) = (4000, 60);
    let states = draw(&device, &states_only(&device, b, t), 7).0;
    let (mut first, mut moves) = ([0.0; 3], [[0.0; 3]; 3]);
    for path in states.chunks_exact(t) {
        first[path[0] as usize] += 1.0;
        path.windows(2).for_each(|w| moves[w[0] as usize][w[1] as usize] += 1.0);
    }
    let close = |count: f64, n: f64, p: f64| assert!((count - n * p).abs() <= 4.5 * (n * p * (1.0 - p)).sqrt(), "{count} of {n} for {p}");
    for i in 0..3 {
        close(first[i], b as f64, INIT[i]);
        let n = moves[i].iter().sum();
        (0..3).for_each(|j| close(moves[i][j], n, TRANS[3 * i + j]));
    }
    assert_eq!(moves[2][0], 0.0, "a hard zero is never drawn");
}

/// Input-driven chains: frequencies of the softmax at each input, and the same states but for words within a rounding.
#[test]
fn softmax_transitions_follow_their_inputs() {
    let (b, t) = (3000, 3);
    let weights = [1.5f32, 0.2, -0.5, 0.0, 0.3, -1.0, 0.0, 1.0];
    let inputs: Vec<f32> = (0..b).flat_map(|_| [9.0f32, 0.7, -1.2]).collect();
    let mut all = Vec::new();
    for device in open_all(&DEVICES) {
        let model = View::from(&device.upload("model", &[0.0, LOG_ZERO as f32]).unwrap());
        let hmm = Hmm {
            b: b as u64,
            t: t as u64,
            k: 2,
            d: 0,
            emission: Emission::LogProbabilities,
            obs: model.clone(),
            model,
            per_sequence: false,
            transitions: Transitions::Softmax {
                weights: View::from(&device.upload("weights", &weights).unwrap()),
                inputs: View::from(&device.upload("inputs", &inputs).unwrap()),
                u: 1,
                per_sequence: false,
            },
            words: None,
            masked: false,
        };
        let states = draw(&device, &hmm, 5).0;
        let p = |i: usize, j: usize, x: f64| {
            let z = |j: usize| (f64::from(weights[4 * i + 2 * j]) * x + f64::from(weights[4 * i + 2 * j + 1])).exp();
            z(j) / (z(0) + z(1))
        };
        let (mut from, mut to) = ([0.0; 2], [0.0; 2]);
        for path in states.chunks_exact(t) {
            from[path[1] as usize] += 1.0;
            to[path[1] as usize] += f64::from(path[2] == 1);
        }
        let close =
            |count: f64, n: f64, p: f64| assert!((count - n * p).abs() <= 4.5 * (n * p * (1.0 - p)).sqrt(), "{}: {count} of {n} for {p}", device.info());
        close(from[1], b as f64, p(0, 1, f64::from(0.7f32)));
        (0..2).for_each(|i| close(to[i], from[i], p(i, 1, f64::from(-1.2f32))));
        all.push(states);
    }
    assert!(all.windows(2).all(|w| w[0].iter().zip(&w[1]).filter(|(a, b)| a != b).count() <= 2), "devices differ beyond roundings");
}

/// Moments of what each kind of emission gives, state by state, and the same numbers on every device.
#[test]
fn observations_have_their_moments() {
    let (b, t) = (1500, 40);
    let shape = |d: usize| PackShape { models: 1, k: 3, d };
    let init = log_init();
    let mean2 = [1.0, -2.0, 0.5, 3.0, 0.0, 10.0];
    let full = [2.0, 0.6, 0.6, 1.0, 1.0, -0.4, -0.4, 0.5, 0.3, 0.0, 0.0, 4.0];
    let cases: Vec<(&str, Emission, usize, Vec<f32>)> = vec![
        ("diagonal", Emission::GaussianDiagonal, 2, pack_gaussian_diagonal(shape(2), &init, &mean2, &[1.0, 4.0, 0.25, 9.0, 2.0, 0.01]).unwrap()),
        ("full", Emission::GaussianFull, 2, pack_gaussian_full(shape(2), &init, &mean2, &full).unwrap()),
        ("student", Emission::StudentT, 1, pack_student_t(shape(1), &init, &[0.0, 1.0, -3.0], &[1.0, 2.0, 0.5], &[9.0, 30.0, 8.0]).unwrap()),
        ("poisson", Emission::Poisson, 1, pack_poisson(shape(1), &init, &[0.7, 12.0, 300.0]).unwrap()),
        ("symbols", Emission::Categorical { symbols: 2 }, 1, pack_categorical(shape(1), &init, &[0.9, 0.1, 0.5, 0.5, 0.0, 1.0], 2).unwrap()),
    ];
    // mean and variance of coordinate 0 in each state
    let want = [
        [(1.0, 1.0), (0.5, 0.25), (0.0, 2.0)],
        [(1.0, 2.0), (0.5, 1.0), (0.0, 0.3)],
        [(0.0, 9.0 / 7.0), (1.0, 4.0 * 30.0 / 28.0), (-3.0, 0.25 * 8.0 / 6.0)],
        [(0.7, 0.7), (12.0, 12.0), (300.0, 300.0)],
        [(0.1, 0.09), (0.5, 0.25), (1.0, 0.0)],
    ];
    for ((name, emission, d, model), want) in cases.iter().zip(want) {
        let reference = open("reference").unwrap();
        let truth = draw(&reference, &chain(&reference, b, t, *emission, *d as u64, model), 11);
        for (state, (mean, variance)) in want.iter().enumerate() {
            let x: Vec<f64> = truth.0.iter().zip(truth.1.chunks_exact(*d)).filter(|(s, _)| **s == state as u32).map(|(_, x)| x[0]).collect();
            let n = x.len() as f64;
            let m = x.iter().sum::<f64>() / n;
            let v = x.iter().map(|x| (x - m).powi(2)).sum::<f64>() / n;
            assert!((m - mean).abs() <= 4.5 * (variance / n).sqrt() + 1e-9, "{name}, state {state}: mean {m} instead of {mean}");
            assert!((v - variance).abs() <= 0.12 * variance + 1e-9, "{name}, state {state}: variance {v} instead of {variance}");
        }
        if *name == "full" {
            let pairs: Vec<_> = truth.0.iter().zip(truth.1.chunks_exact(2)).filter(|(s, _)| **s == 0).map(|(_, x)| (x[0] - 1.0) * (x[1] + 2.0)).collect();
            let covariance = pairs.iter().sum::<f64>() / pairs.len() as f64;
            assert!((covariance - 0.6).abs() < 0.05, "{covariance}");
        }
        for spec in ["cpu", "wgpu", "cuda-host", "cuda"] {
            let Some(device) = open(spec) else { continue };
            let few = if spec == "cuda-host" { 40 } else { b };
            let found = draw(&device, &chain(&device, few, t, *emission, *d as u64, model), 11);
            assert_eq!(found.0, truth.0[..few * t], "{spec} {name}: states");
            let differ = found.1.iter().zip(&truth.1).filter(|(x, y)| (*x - *y).abs() > 2e-5 * (1.0 + y.abs())).count();
            // A count changes where the word falls within the rounding of the cumulative probability.
            let allowed = if *name == "poisson" { few * t / 2000 } else { 0 };
            assert!(differ <= allowed, "{spec} {name}: {differ} of {} observations differ", found.1.len());
        }
    }
}

#[test]
fn regressions_keep_their_regressors() {
    let (b, t, d) = (200, 30, 3);
    let beta = [1.0, -2.0, 0.0, 0.5, 3.0, 3.0];
    let model = pack_regression(PackShape { models: 1, k: 3, d }, &log_init(), &beta, &[0.01, 0.04, 0.09]).unwrap();
    let rng = &mut Rng::new(5);
    let given: Vec<f32> = (0..b * t * d).map(|_| rng.normal() as f32).collect();
    for device in open_all(&DEVICES) {
        let mut hmm = chain(&device, b, t, Emission::Regression, d as u64, &model);
        hmm.obs = View::from(&device.upload("obs", &given).unwrap());
        let (states, obs) = draw(&device, &hmm, 3);
        let mut squares = [0.0; 3];
        let mut count = [0.0; 3];
        for ((&s, x), y) in states.iter().zip(obs.chunks_exact(d)).zip(given.chunks_exact(d)) {
            assert_eq!((x[1], x[2]), (f64::from(y[1]), f64::from(y[2])));
            let s = s as usize;
            squares[s] += (x[0] - beta[2 * s] * x[1] - beta[2 * s + 1] * x[2]).powi(2);
            count[s] += 1.0;
        }
        for (s, deviation) in [0.1, 0.2, 0.3].into_iter().enumerate() {
            assert!(((squares[s] / count[s]).sqrt() / deviation - 1.0).abs() < 0.1, "{}: state {s}", device.info());
        }
    }
}

/// Frequencies of whole paths against their posterior probabilities, by enumeration; lengths and masks.
#[test]
fn posterior_paths_have_their_probabilities() {
    let (b, t, draws) = (2, 4, 6000u64);
    let log_obs: Vec<f32> = (0..b * t * 3).map(|i| -((i * 7 % 5) as f32) * 0.8).collect();
    let (lengths, mut observed) = ([4, 3], vec![true; b * t]);
    observed[1] = false;
    let words = pack_words(t, &lengths, Some(&observed)).unwrap();
    let mut all: Vec<Vec<u32>> = Vec::new();
    for device in open_all(&DEVICES) {
        let mut hmm = states_only(&device, b, t);
        hmm.obs = View::from(&device.upload("log_obs", &log_obs).unwrap());
        hmm.words = Some(View::from(&device.upload_u32("words", &words).unwrap()));
        hmm.masked = true;
        let draws = if device.info().kind.name() == "cuda-host" { 200 } else { draws };
        let mut pass = device.pass("posterior");
        let out = match hmm_sample_posterior(&mut pass, &hmm, 99, draws) {
            Err(Error::Unsupported { kernel, device }) => {
                eprintln!("skipped {device}: {kernel} has no column");
                continue;
            }
            out => out.unwrap(),
        };
        let read = pass.read(&out).unwrap();
        let states = pass.submit().unwrap().u32(read).unwrap();
        if draws > 1000 {
            for i in 0..b {
                let length = lengths[i] as usize;
                let joint = |path: &[usize]| {
                    let step = |(s, &z): (usize, &usize)| {
                        let seen = if observed[i * t + s] { f64::from(log_obs[(i * t + s) * 3 + z]).exp() } else { 1.0 };
                        seen * if s == 0 { INIT[z] } else { TRANS[3 * path[s - 1] + z] }
                    };
                    path.iter().enumerate().map(step).product::<f64>()
                };
                let paths: Vec<Vec<usize>> = (0..3usize.pow(length as u32)).map(|n| (0..length).map(|c| n / 3usize.pow(c as u32) % 3).collect()).collect();
                let total: f64 = paths.iter().map(|p| joint(p)).sum();
                for path in &paths {
                    let p = joint(path) / total;
                    let own = states[i * draws as usize * t..(i + 1) * draws as usize * t].chunks_exact(t);
                    let count = own.clone().filter(|s| s[..length].iter().zip(path).all(|(&a, &b)| a as usize == b)).count() as f64;
                    let n = draws as f64;
                    assert!((count - n * p).abs() <= 4.5 * (n * p * (1.0 - p)).sqrt() + 1e-9, "{}: {path:?} {count} instead of {}", device.info(), n * p);
                    assert!(own.clone().all(|s| s[length..].iter().all(|&x| x == 0)), "padding");
                }
            }
            all.push(states);
        }
    }
    for other in &all[1..] {
        let differ = all[0].iter().zip(other).filter(|(a, b)| a != b).count();
        assert!(differ * 10_000 <= other.len(), "{differ} of {} states differ between devices", other.len());
    }
}

#[test]
fn no_draws_is_an_error() {
    let device = open("cpu").unwrap();
    let mut hmm = states_only(&device, 1, 3);
    hmm.obs = View::from(&device.upload("log_obs", &[0.0; 9]).unwrap());
    let error = hmm_sample_posterior(&mut device.pass("none"), &hmm, 1, 0).unwrap_err();
    assert!(matches!(error, Error::Parameter { ref name, .. } if name == "draws"), "{error}");
    hmm.k = 0;
    assert!(matches!(hmm_sample(&mut device.pass("none"), &hmm, 1).unwrap_err(), Error::Parameter { .. }));
}
