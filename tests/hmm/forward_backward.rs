//! hmm_forward_backward and hmm_emission on every device: against the definitions, across splits of the batch and of time, and where
//! numbers are extreme.

use crate::common::{DEVICES, Rng, open, open_all, open_with, variants};
use crate::oracle::{Small, Trans};
use forback::kernels::hmm::{
    Emission, Hmm, Likelihood, PackShape, Pair, Transitions, Wanted, check_observations, hmm_emission, hmm_forward_backward, log_probabilities,
    pack_gaussian_diagonal, pack_gaussian_full, pack_words,
};
use forback::kernels::{Device, DeviceKind, Error, OpenOptions, View};

const SHARED: Trans = Trans::Table { per_sequence: false, per_step: false };
const STEPS: Trans = Trans::Table { per_sequence: true, per_step: true };
const ALL: Wanted = Wanted { filtered: true, predicted: true, posterior: true, pair: Pair::Steps };

/// Everything that a call gives; what was not wanted is empty.
#[derive(Debug, Clone, PartialEq)]
struct Got {
    likelihoods: Vec<Likelihood>,
    filtered: Vec<f64>,
    predicted: Vec<f64>,
    posterior: Vec<f64>,
    pair: Vec<f64>,
}

impl Got {
    fn parts(&self) -> [(&'static str, &Vec<f64>); 4] {
        [("filtered", &self.filtered), ("predicted", &self.predicted), ("posterior", &self.posterior), ("pair", &self.pair)]
    }
}

fn run(device: &Device, hmm: &Hmm, wanted: Wanted) -> Got {
    let mut pass = device.pass("test");
    let result = hmm_forward_backward(&mut pass, hmm, wanted).unwrap();
    let summary = result.read(&mut pass).unwrap();
    let reads = [&result.filtered, &result.predicted, &result.posterior, &result.pair].map(|view| view.as_ref().map(|v| pass.read(v).unwrap()));
    let mut done = pass.submit().unwrap();
    let likelihoods = result.likelihoods(&mut done, summary).unwrap();
    let [filtered, predicted, posterior, pair] = reads.map(|read| read.map(|r| done.f64(r).unwrap()).unwrap_or_default());
    Got { likelihoods, filtered, predicted, posterior, pair }
}

#[track_caller]
fn near(what: &str, got: &[f64], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{what}: lengths");
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!((g - w).abs() <= tolerance * w.abs().max(1.0), "{what}[{i}]: got {g:e}, expected {w:e}");
    }
}

/// Compares a small batch on a device with the definitions; a sum of pairs with the sum of its steps too.
fn agrees(device: &Device, what: &str, small: &Small, tolerance: f64) {
    let hmm = small.upload(device);
    let got = run(device, &hmm, ALL);
    let summed = run(device, &hmm, Wanted { pair: Pair::Sum, ..ALL });
    let (tk, kk) = (small.t * small.k, small.k * small.k);
    for b in 0..small.b {
        let truth = small.truth(b);
        let what = format!("{what}, sequence {b} on {}", device.info());
        near(&format!("log-likelihood of {what}"), &[got.likelihoods[b].value], &[truth.log_likelihood], tolerance);
        near(&format!("filtered of {what}"), &got.filtered[b * tk..][..tk], &truth.filtered, tolerance);
        near(&format!("predicted of {what}"), &got.predicted[b * tk..][..tk], &truth.predicted, tolerance);
        near(&format!("posterior of {what}"), &got.posterior[b * tk..][..tk], &truth.posterior, tolerance);
        let pairs = (small.t - 1) * kk;
        near(&format!("pair of {what}"), &got.pair[b * pairs..][..pairs], &truth.pair, tolerance);
        let sum: Vec<f64> = (0..kk).map(|e| (0..small.t - 1).map(|t| truth.pair[t * kk + e]).sum()).collect();
        near(&format!("summed pair of {what}"), &summed.pair[b * kk..][..kk], &sum, tolerance);
    }
}

#[test]
fn every_number_of_states_follows_the_definitions() {
    for device in open_all(&DEVICES) {
        let tolerance = if device.info().kind == DeviceKind::Reference { 1e-11 } else { 2e-6 };
        for (seed, k) in [1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33, 61, 64, 65].into_iter().enumerate() {
            for (trans, models) in [(SHARED, 1), (STEPS, 5), (Trans::Softmax { u: 2, per_sequence: false }, 1)] {
                let small = Small::random(seed as u32, [5, 9, k, 0], Emission::LogProbabilities, trans, models).with_lengths(&[9, 0, 1, 2, 7]).with_gaps(3);
                agrees(&device, &format!("K = {k}, {trans:?}"), &small, tolerance);
            }
        }
    }
}

#[test]
fn every_emission_is_its_density() {
    let emissions = [
        (Emission::GaussianDiagonal, 1),
        (Emission::GaussianDiagonal, 3),
        (Emission::GaussianFull, 4),
        (Emission::StudentT, 2),
        (Emission::Poisson, 2),
        (Emission::Categorical { symbols: 5 }, 1),
        (Emission::Regression, 1),
        (Emission::Regression, 4),
    ];
    for device in open_all(&DEVICES) {
        for (seed, (emission, d)) in emissions.into_iter().enumerate() {
            for (k, trans) in [(3, SHARED), (6, Trans::Softmax { u: 1, per_sequence: true }), (11, STEPS)] {
                let small = Small::random(40 + seed as u32, [4, 12, k, d], emission, trans, 4).with_lengths(&[12, 5, 0, 11]).with_gaps(7);
                agrees(&device, &format!("{emission:?}, D = {d}, K = {k}"), &small, 3e-6);
                let hmm = small.upload(&device);
                let mut pass = device.pass("densities");
                let log_obs = hmm_emission(&mut pass, &hmm).unwrap();
                let read = pass.read(&log_obs).unwrap();
                let want: Vec<f64> = (0..small.b).flat_map(|b| (0..small.t).flat_map(move |t| [(b, t)])).flat_map(|(b, t)| small.log_obs(b, t)).collect();
                near(&format!("densities of {emission:?} on {}", device.info()), &pass.submit().unwrap().f64(read).unwrap(), &want, 3e-6);
            }
        }
    }
}

#[test]
fn neither_chunks_nor_wishes_nor_checks_change_a_bit() {
    for spec in DEVICES {
        for (k, trans) in [(3, SHARED), (6, STEPS), (12, Trans::Softmax { u: 1, per_sequence: false })] {
            let small = Small::random(9, [70, 11, k, 2], Emission::GaussianDiagonal, trans, 70).with_gaps(5);
            let mut first: Option<Got> = None;
            let chunks = OpenOptions { binding_bytes: Some(4 * 8 * 11 * k as u64 * k as u64), ..OpenOptions::default() };
            for options in variants(spec).into_iter().chain([chunks]) {
                let Some(device) = open_with(spec, &options) else { continue };
                let hmm = small.upload(&device);
                let all = run(&device, &hmm, ALL);
                for wanted in [
                    Wanted::default(),
                    Wanted { filtered: true, ..Wanted::default() },
                    Wanted { predicted: true, ..Wanted::default() },
                    Wanted { posterior: true, ..Wanted::default() },
                    Wanted { pair: Pair::Steps, ..Wanted::default() },
                    Wanted { predicted: true, posterior: true, pair: Pair::Steps, ..Wanted::default() },
                ] {
                    let less = run(&device, &hmm, wanted);
                    assert_eq!(less.likelihoods, all.likelihoods, "{spec} {wanted:?}");
                    for ((name, x), (_, y)) in less.parts().into_iter().zip(all.parts()) {
                        assert!(x.is_empty() || x == y, "{spec}, K = {k}, {wanted:?}: {name}");
                    }
                }
                let same = first.get_or_insert_with(|| all.clone());
                assert!(*same == all, "{spec}, K = {k}, {options:?}");
            }
        }
    }
}

#[test]
fn time_in_several_launches_changes_next_to_nothing() {
    for spec in ["wgpu", "cuda-host"] {
        for (k, trans) in [(3, SHARED), (7, Trans::Softmax { u: 1, per_sequence: false }), (10, SHARED), (20, STEPS)] {
            let small = Small::random(11, [3, 300, k, 0], Emission::LogProbabilities, trans, 3).with_lengths(&[300, 130, 299]);
            let (Some(whole), Some(cut)) = (open(spec), open_with(spec, &OpenOptions { loop_rounds: Some(9_000), ..OpenOptions::default() })) else { continue };
            for wanted in
                [ALL, Wanted { posterior: true, pair: Pair::Sum, ..Wanted::default() }, Wanted { pair: Pair::Sum, ..Wanted::default() }, Wanted::default()]
            {
                let mut pass = cut.pass("launches");
                hmm_forward_backward(&mut pass, &small.upload(&cut), wanted).unwrap();
                let least = if k == 3 { 1 } else { 2 };
                assert!(pass.launches() >= least, "{spec}, K = {k}: {} launches", pass.launches());
                let (a, b) = (run(&whole, &small.upload(&whole), wanted), run(&cut, &small.upload(&cut), wanted));
                assert_eq!(a.likelihoods, b.likelihoods, "{spec}, K = {k}, {wanted:?}");
                for ((name, x), (_, y)) in a.parts().into_iter().zip(b.parts()) {
                    near(&format!("{name} of K = {k} on {spec}, {wanted:?}"), x, y, 1e-6);
                }
            }
        }
    }
}

#[test]
fn an_impossible_step_is_named_and_leaves_the_others_alone() {
    for device in open_all(&DEVICES) {
        for k in [2, 5, 10] {
            let small = Small::random(21, [3, 8, k, 0], Emission::LogProbabilities, SHARED, 1);
            let good = run(&device, &small.upload(&device), ALL);
            let mut bad = small.clone();
            bad.obs[(8 + 3) * k..(8 + 4) * k].fill(-1e30);
            let got = run(&device, &bad.upload(&device), ALL);
            assert_eq!(got.likelihoods[1], Likelihood { value: f64::NEG_INFINITY, impossible: Some(3) }, "K = {k} on {}", device.info());
            assert_eq!([got.likelihoods[0], got.likelihoods[2]], [good.likelihoods[0], good.likelihoods[2]]);
            for ((name, x), (_, y)) in got.parts().into_iter().zip(good.parts()) {
                let each = x.len() / 3;
                assert!(x.iter().all(|v| v.is_finite()), "{name}");
                assert_eq!(x[..each], y[..each], "{name} of sequence 0");
                assert_eq!(x[2 * each..], y[2 * each..], "{name} of sequence 2");
            }
            let tk = 8 * k;
            near("what came before the step", &got.filtered[tk..tk + 3 * k], &good.filtered[tk..tk + 3 * k], 1e-6);
            near("what was expected of the step", &got.predicted[tk..tk + 4 * k], &good.predicted[tk..tk + 4 * k], 1e-6);
            assert!(got.filtered[tk + 3 * k..2 * tk].iter().chain(&got.posterior[tk..2 * tk]).all(|&v| v == 0.0));
            // the same through hard zeros: the only state that may follow cannot give the observation
            let mut chain = small.clone();
            chain.theta[0][..k].fill(-1e30);
            chain.theta[0][0] = 0.0;
            chain.links.fill(-1e30);
            (0..k).for_each(|i| chain.links[i * k + (i + 1) % k] = 0.0);
            chain.obs[(16 + 1) * k + 1] = -1e30;
            let got = run(&device, &chain.upload(&device), ALL);
            assert_eq!([0, 1, 2].map(|b| got.likelihoods[b].impossible), [None, None, Some(1)], "K = {k} on {}", device.info());
            let visited: Vec<f64> = (0..8).flat_map(|t| (0..k).map(move |j| f64::from(u8::from(j == t % k)))).collect();
            near("the only path", &got.posterior[..tk], &visited, 1e-6);
        }
    }
}

#[test]
fn outliers_are_finite_and_right() {
    for device in open_all(&DEVICES) {
        for k in [3, 6, 12] {
            // the states that fit best by far cannot be reached yet: left to right, from the first
            let mut small = Small::random(31, [2, 12, k, 0], Emission::LogProbabilities, SHARED, 1);
            small.theta[0][..k].fill(-1e30);
            small.theta[0][0] = 0.0;
            small.links.fill(-1e30);
            for i in 0..k {
                small.links[i * k + i] = f64::from(0.5f32.ln());
                small.links[i * k + (i + 1) % k] = f64::from(0.5f32.ln());
            }
            for (i, x) in small.obs.iter_mut().enumerate() {
                *x += if i % k + 1 == k { 900.0 } else { -700.0 * ((i / k) % 3) as f64 };
            }
            let got = run(&device, &small.upload(&device), ALL);
            let truth = open("reference").map(|r| run(&r, &small.upload(&r), ALL)).unwrap();
            for ((name, x), (_, y)) in got.parts().into_iter().zip(truth.parts()) {
                near(&format!("{name}, K = {k} on {}", device.info()), x, y, 2e-4);
            }
            // log-probabilities of −1e20, and observations 1e25 deviations away
            let mut far = Small::random(32, [2, 6, k, 1], Emission::GaussianDiagonal, SHARED, 1);
            far.obs[3] = 1e25;
            far.obs[7] = -1e25;
            let got = run(&device, &far.upload(&device), ALL);
            assert!(got.likelihoods.iter().all(|l| l.value.is_finite() && l.impossible.is_none()), "{:?}", got.likelihoods);
            for (name, x) in got.parts() {
                assert!(x.iter().all(|v| (0.0..=1.0 + 1e-6).contains(v)), "{name}, K = {k} on {}", device.info());
            }
            for row in got.posterior.chunks_exact(k) {
                near("a row's sum", &[row.iter().sum()], &[1.0], 1e-6);
            }
        }
    }
}

#[test]
fn what_lies_past_a_length_is_never_read() {
    for device in open_all(&DEVICES) {
        for k in [3, 10] {
            let small = Small::random(51, [4, 10, k, 2], Emission::StudentT, STEPS, 4).with_lengths(&[10, 4, 0, 9]);
            let mut dirty = small.clone();
            for (b, &length) in small.lengths.iter().enumerate() {
                dirty.obs[(b * 10 + length as usize) * 2..(b + 1) * 20].fill(f64::NAN);
                dirty.links[(b * 9 + (length as usize).saturating_sub(1).min(9)) * k * k..(b + 1) * 9 * k * k].fill(-0.7);
            }
            assert!(run(&device, &small.upload(&device), ALL) == run(&device, &dirty.upload(&device), ALL), "K = {k} on {}", device.info());
        }
    }
}

/// A sticky chain with Gaussian-like log-probabilities.
fn long(t: usize, k: usize) -> Small {
    let mut small = Small::random(61, [1, 1, k, 0], Emission::LogProbabilities, SHARED, 1);
    let rng = &mut Rng::new(62);
    let stay = 0.97;
    small.t = t;
    small.lengths = vec![t as u32];
    small.links = (0..k * k).map(|e| f64::from((if e / k == e % k || k == 1 { stay } else { (1.0 - stay) / (k as f64 - 1.0) }).ln() as f32)).collect();
    let mut state = 0;
    small.obs.clear();
    for _ in 0..t {
        state = if rng.unit() < stay { state } else { rng.whole(0, k as u32) as usize };
        let x = state as f64 + 1.2 * rng.normal();
        small.obs.extend((0..k).map(|j| f64::from((-0.5 * ((x - j as f64) / 1.2).powi(2) - 1.1) as f32)));
    }
    small
}

/// The bars of forward-backward in f32 at T = 100,000: posterior within 2e-6, log-likelihood within 1e-7 of f64.
#[test]
fn a_hundred_thousand_steps_keep_their_accuracy() {
    let reference = open("reference").unwrap();
    for (k, t, devices) in [
        (2, 100_000, &["cpu", "wgpu", "cuda-host", "cuda"][..]),
        (4, 100_000, &["cpu", "wgpu", "cuda-host", "cuda"]),
        (8, 100_000, &["cpu", "wgpu", "cuda-host", "cuda"]),
        (16, 100_000, &["cpu", "cuda"]),
        (16, 10_000, &["wgpu", "cuda-host"]),
    ] {
        let small = long(t, k);
        let wanted = Wanted { filtered: true, posterior: true, pair: Pair::Sum, ..Wanted::default() };
        let truth = run(&reference, &small.upload(&reference), wanted);
        for device in open_all(devices) {
            let got = run(&device, &small.upload(&device), wanted);
            let worst = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
            let likelihood = (got.likelihoods[0].value / truth.likelihoods[0].value - 1.0).abs();
            let (filtered, posterior) = (worst(&got.filtered, &truth.filtered), worst(&got.posterior, &truth.posterior));
            let pair = got.pair.iter().zip(&truth.pair).map(|(a, b)| (a / b - 1.0).abs()).fold(0.0, f64::max);
            eprintln!("K = {k}, T = {t}, {}: likelihood {likelihood:.1e}, filtered {filtered:.1e}, posterior {posterior:.1e}, pairs {pair:.1e}", device.info());
            assert!(likelihood < 1e-7 && filtered < 2e-6 && posterior < 2e-6 && pair < 1e-5, "K = {k} on {}", device.info());
        }
    }
}

#[test]
fn mistakes_are_named() {
    let said = |error: Error| error.to_string();
    let shape = PackShape { models: 2, k: 2, d: 1 };
    let init = [0.5f64.ln(), 0.5f64.ln(), 0.5f64.ln(), 0.5f64.ln()];
    let variance = pack_gaussian_diagonal(shape, &init, &[0.0; 4], &[1.0, 1.0, 1.0, 0.0]).map_err(said).unwrap_err();
    assert!(variance.contains("variance of model 1, state 1, dimension 0") && variance.contains("positive"), "{variance}");
    let mean = pack_gaussian_diagonal(shape, &init, &[0.0, f64::NAN, 0.0, 0.0], &[1.0; 4]).map_err(said).unwrap_err();
    assert!(mean.contains("mean of model 0, state 1, dimension 0 = NaN"), "{mean}");
    let rows = log_probabilities("transition matrix", &[0.5, 0.5, 0.2, 0.7], 2).map_err(said).unwrap_err();
    assert!(rows.contains("sum of transition matrix, row 1"), "{rows}");
    let full = PackShape { models: 1, k: 1, d: 2 };
    let definite = pack_gaussian_full(full, &[0.0], &[0.0; 2], &[1.0, 2.0, 2.0, 1.0]).map_err(said).unwrap_err();
    assert!(definite.contains("covariance of model 0, state 0, dimension 1") && definite.contains("positive definite"), "{definite}");
    let symmetric = pack_gaussian_full(full, &[0.0], &[0.0; 2], &[1.0, 0.5, 0.2, 1.0]).map_err(said).unwrap_err();
    assert!(symmetric.contains("symmetric"), "{symmetric}");
    let lengths = pack_words(5, &[5, 6], None).map_err(said).unwrap_err();
    assert!(lengths.contains("length of sequence 1 = 6"), "{lengths}");
    let nan = [0.0, 0.0, 0.0, 0.0, f32::NAN, 0.0];
    let observed = check_observations(&nan, 3, 1, None, None, false).map_err(said).unwrap_err();
    assert!(observed.contains("sequence 1, step 1, column 0"), "{observed}");
    assert!(check_observations(&nan, 3, 1, Some(&[3, 1]), None, false).is_ok(), "past the length");
    assert!(check_observations(&nan, 3, 1, None, Some(&[true, true, true, true, false, true]), false).is_ok(), "masked");
    assert!(check_observations(&[1.5], 1, 1, None, None, true).is_err(), "half a count");

    let device = Device::open("cpu").unwrap();
    let right = Small::random(1, [2, 4, 3, 0], Emission::LogProbabilities, SHARED, 1).upload(&device);
    let refused = |hmm: Hmm| said(hmm_forward_backward(&mut device.pass("refused"), &hmm, ALL).map(|_| ()).unwrap_err());
    assert!(refused(Hmm { k: 0, ..right.clone() }).contains("states = 0"));
    assert!(refused(Hmm { t: 0, ..right.clone() }).contains("steps = 0"));
    assert!(refused(Hmm { b: 0, ..right.clone() }).contains("sequences = 0"));
    assert!(refused(Hmm { k: 513, ..right.clone() }).contains("1 to 512"));
    assert!(refused(Hmm { t: 5, ..right.clone() }).contains("obs must be [2,5,3]"));
    assert!(refused(Hmm { per_sequence: true, ..right.clone() }).contains("model must be [2,3]"));
    assert!(refused(Hmm { masked: true, ..right.clone() }).contains("words must be [2,5]"));
    let table = View::from(&device.zeros("short", 8).unwrap());
    let transitions = Transitions::Table { log_trans: table, per_sequence: false, per_step: false };
    assert!(refused(Hmm { transitions, ..right.clone() }).contains("log_trans must be [1,1,3,3]"));
    assert!(refused(Hmm { emission: Emission::GaussianDiagonal, ..right }).contains("observed numbers a step = 0"));
}
