//! Gradients and tangents against finite differences in f64, and every device against `reference`.

use crate::common::{DEVICES, Rng, assert_bits, open, open_all, open_with, variants};
use crate::oracle::{Small, Trans, Truth, posteriors, slope};
use forback::kernels::hmm::{Emission, Hmm, Pair, Wanted, hmm_forward_backward};
use forback::kernels::hmm_gradient::{Direction, HmmGradient, Probabilities, TransDirection, hmm_gradient, hmm_tangent};
use forback::kernels::{Device, OpenOptions, View};

pub(crate) const SHARED: Trans = Trans::Table { per_sequence: false, per_step: false };

/// Every emission, every kind of transition, lengths and gaps, each at least once.
pub(crate) fn cases() -> Vec<(&'static str, Small)> {
    let table = |per_sequence, per_step| Trans::Table { per_sequence, per_step };
    let softmax = |u, per_sequence| Trans::Softmax { u, per_sequence };
    let (diagonal, full) = (Emission::GaussianDiagonal, Emission::GaussianFull);
    let mut left_to_right = Small::random(7, [2, 8, 3, 3], Emission::Regression, SHARED, 1);
    for (at, x) in left_to_right.links.iter_mut().enumerate() {
        let (i, j) = (at / 3, at % 3);
        *x = if j < i || j > i + 1 { -1e30 } else { f64::from((if i == 2 { 1.0f64 } else { 0.5 }).ln() as f32) };
    }
    vec![
        ("log-probabilities", Small::random(1, [3, 7, 3, 1], Emission::LogProbabilities, SHARED, 1).with_lengths(&[7, 4, 0])),
        ("diagonal normals", Small::random(2, [3, 6, 2, 2], diagonal, table(false, true), 3).with_gaps(5)),
        ("full normals", Small::random(3, [2, 6, 2, 3], full, table(true, false), 1)),
        ("Student-t", Small::random(4, [2, 6, 3, 1], Emission::StudentT, table(true, true), 2).with_lengths(&[3, 6])),
        ("counts, inputs", Small::random(5, [3, 8, 3, 2], Emission::Poisson, softmax(2, false), 1).with_lengths(&[8, 5, 1])),
        ("symbols, inputs", Small::random(6, [2, 7, 2, 1], Emission::Categorical { symbols: 4 }, softmax(1, true), 2).with_gaps(9)),
        ("regression, hard zeros", left_to_right),
        ("one state, one step", Small::random(8, [2, 1, 1, 1], diagonal, SHARED, 1)),
        ("bias only", Small::random(9, [2, 5, 2, 1], diagonal, softmax(0, false), 1)),
    ]
}

fn upload(device: &Device, values: &[f64]) -> View {
    View::from(&device.upload("values", &values.iter().map(|&x| x as f32).collect::<Vec<_>>()).unwrap())
}

/// The probabilities of the definitions, rounded to f32.
fn probabilities(device: &Device, small: &Small) -> Probabilities {
    let truths: Vec<Truth> = (0..small.b).map(|b| small.truth(b)).collect();
    let all = |of: fn(&Truth) -> &[f64]| upload(device, &truths.iter().flat_map(|t| of(t).to_vec()).collect::<Vec<_>>());
    Probabilities { filtered: all(|t| &t.filtered), predicted: all(|t| &t.predicted), posterior: all(|t| &t.posterior) }
}

/// Numbers of a gradient, in order: log_obs, model, transitions.
fn gradient_of(device: &Device, small: &Small, upstream: &[f64]) -> [Vec<f64>; 3] {
    let (hmm, upstream) = (small.upload(device), upload(device, upstream));
    let mut pass = device.pass("gradient");
    let gradient = hmm_gradient(&mut pass, &hmm, &probabilities(device, small), Some(&upstream)).unwrap();
    read(pass, &gradient, None).0
}

fn read(mut pass: forback::kernels::Pass, gradient: &HmmGradient, posterior: Option<&forback::kernels::Buffer>) -> ([Vec<f64>; 3], Vec<f64>) {
    let reads = [&gradient.log_obs, &gradient.model, &gradient.transitions].map(|x| pass.read(x).unwrap());
    let posterior = posterior.map(|x| pass.read(x).unwrap());
    let mut done = pass.submit().unwrap();
    (reads.map(|x| done.f64(x).unwrap()), posterior.map(|x| done.f64(x).unwrap()).unwrap_or_default())
}

#[track_caller]
pub(crate) fn close(what: &str, got: &[f64], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{what}: lengths");
    let scale = want.iter().fold(1.0f64, |m, x| m.max(x.abs()));
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!((g - w).abs() <= tolerance * scale, "{what}[{i}]: got {g:e}, expected {w:e}");
    }
}

/// A value of a small model, one of whose numbers may be moved.
type Objective<'a> = dyn Fn(&Small, Option<(usize, f64)>) -> f64 + 'a;

/// Changes of everything that a batch is made of, one number at a time: log_obs, model, links.
fn slopes(small: &Small, f: &Objective<'_>) -> [Vec<f64>; 3] {
    let log_obs = (0..small.b * small.t * small.k).map(|at| slope(|h| f(small, Some((at, h))))).collect();
    let mut model = Vec::new();
    for (m, i) in (0..small.theta.len()).flat_map(|m| (0..small.theta[m].len()).map(move |i| (m, i))) {
        model.push(slope(|h| {
            let mut moved = small.clone();
            moved.theta[m][i] += h;
            f(&moved, None)
        }));
    }
    let links = (0..small.links.len()).map(|i| {
        slope(|h| {
            let mut moved = small.clone();
            moved.links[i] += h;
            f(&moved, None)
        })
    });
    [log_obs, model, links.collect()]
}

/// Posteriors of sequence b where entry `at` of log_obs [B,T,K] is moved, and everything along `direction` times ε.
fn moved(small: &Small, b: usize, at: Option<(usize, f64)>, along: Option<(&Along, f64)>) -> Truth {
    let (t_max, k) = (small.t, small.k);
    let mut init = small.theta[if small.theta.len() > 1 { b } else { 0 }][..k].to_vec();
    let mut tables: Vec<Vec<f64>> = (1..t_max).map(|t| small.log_trans(b, t - 1)).collect();
    let mut log_obs: Vec<Vec<f64>> = (0..t_max).map(|t| small.log_obs(b, t)).collect();
    let observed = |t: usize| small.observed.as_ref().is_none_or(|o| o[b * t_max + t]);
    if let Some((at, h)) = at {
        let (row, j) = (at / k, at % k);
        if row / t_max == b && observed(row % t_max) {
            log_obs[row % t_max][j] += h;
        }
    }
    if let Some((along, e)) = along {
        (0..k).for_each(|j| init[j] += e * along.init[j]);
        for t in 0..t_max {
            for j in (0..k).filter(|_| observed(t)) {
                log_obs[t][j] += e * along.obs[(b * t_max + t) * k + j];
            }
            for ij in (0..k * k).filter(|_| t + 1 < t_max) {
                tables[t][ij] += e * along.trans[(b * (t_max - 1) + t) * k * k + ij];
            }
        }
    }
    posteriors(&init, &tables, &log_obs, small.lengths[b] as usize)
}

/// A direction: log_init [K], log_trans [B,T−1,K,K], log_obs [B,T,K].
struct Along {
    init: Vec<f64>,
    trans: Vec<f64>,
    obs: Vec<f64>,
}

impl Along {
    fn random(small: &Small, with_init: bool) -> Along {
        let rng = &mut Rng::new(77);
        let mut some = |n: usize| -> Vec<f64> { (0..n).map(|_| f64::from(rng.normal() as f32)).collect() };
        let (b, t, k) = (small.b, small.t, small.k);
        let init = if with_init { some(k) } else { vec![0.0; k] };
        Along { init, trans: some(b * (t - 1) * k * k), obs: some(b * t * k) }
    }

    fn upload(&self, device: &Device, with_init: bool) -> Direction {
        let trans = TransDirection { values: upload(device, &self.trans), per_sequence: true, per_step: true };
        Direction {
            log_init: with_init.then(|| upload(device, &self.init)),
            log_trans: (!self.trans.is_empty()).then_some(trans),
            log_obs: Some(upload(device, &self.obs)),
        }
    }
}

#[test]
fn gradients_are_finite_differences() {
    let reference = open("reference").unwrap();
    for (name, small) in cases() {
        let upstream: Vec<f64> = (0..small.b).map(|b| 1.0 - 0.75 * b as f64).collect();
        let total = |s: &Small, at: Option<(usize, f64)>| (0..s.b).map(|b| upstream[b] * moved(s, b, at, None).log_likelihood).sum::<f64>();
        let want = slopes(&small, &total);
        let got = gradient_of(&reference, &small, &upstream);
        for (part, (got, want)) in ["log_obs", "model", "transitions"].iter().zip(got.iter().zip(&want)) {
            close(&format!("{name}: {part}"), got, want, 3e-6);
        }
    }
}

#[test]
fn tangents_are_finite_differences() {
    let reference = open("reference").unwrap();
    for (name, small) in cases() {
        let along = Along::random(&small, true);
        let hmm = small.upload(&reference);
        let mut pass = reference.pass("tangent");
        let tangent = hmm_tangent(&mut pass, &hmm, &probabilities(&reference, &small), &along.upload(&reference, true)).unwrap();
        let (gradient, posterior) = read(pass, &tangent.gradient, Some(&tangent.posterior));
        let want: Vec<f64> = (0..posterior.len())
            .map(|at| {
                let (b, within) = (at / (small.t * small.k), at % (small.t * small.k));
                slope(|e| moved(&small, b, None, Some((&along, e))).posterior[within])
            })
            .collect();
        close(&format!("{name}: posterior"), &posterior, &want, 3e-6);
        if let Trans::Table { per_sequence, per_step } = small.trans {
            let each = (small.t - 1) * small.k * small.k;
            let slots = if per_step { (small.t - 1).max(1) } else { 1 };
            let mut want = vec![0.0; gradient[2].len()];
            for (b, at) in (0..small.b).flat_map(|b| (0..each).map(move |at| (b, at))) {
                let slot = if per_step { at / (small.k * small.k) } else { 0 };
                let to = (if per_sequence { b * slots } else { 0 } + slot) * small.k * small.k + at % (small.k * small.k);
                want[to] += slope(|e| moved(&small, b, None, Some((&along, e))).pair[at]);
            }
            close(&format!("{name}: pair posterior"), &gradient[2], &want, 3e-6);
        }
    }
}

#[test]
fn gradients_through_posteriors_are_finite_differences() {
    let reference = open("reference").unwrap();
    for (name, small) in cases() {
        let along = Along::random(&small, false);
        let hmm = small.upload(&reference);
        let mut pass = reference.pass("vector-Jacobian product");
        let tangent = hmm_tangent(&mut pass, &hmm, &probabilities(&reference, &small), &along.upload(&reference, false)).unwrap();
        let (got, _) = read(pass, &tangent.gradient, None);
        let (states, pairs) = (small.t * small.k, (small.t - 1) * small.k * small.k);
        // Σ upstream·(posterior, pair posterior)
        let loss = |s: &Small, at: Option<(usize, f64)>| -> f64 {
            let of = |b: usize| {
                let truth = moved(s, b, at, None);
                let observed = |i: usize| s.observed.as_ref().is_none_or(|o| o[b * s.t + i / s.k]);
                let first = (0..states).filter(|&i| observed(i)).map(|i| along.obs[b * states + i] * truth.posterior[i]).sum::<f64>();
                first + (0..pairs).map(|i| along.trans[b * pairs + i] * truth.pair[i]).sum::<f64>()
            };
            (0..s.b).map(of).sum()
        };
        let want = slopes(&small, &loss);
        for (part, (got, want)) in ["log_obs", "model", "transitions"].iter().zip(got.iter().zip(&want)) {
            close(&format!("{name}: {part}"), got, want, 5e-6);
        }
    }
}

/// Batches that cross the blocks of steps and of sequences, and the lanes.
fn large() -> Vec<(&'static str, Small)> {
    let table = |per_sequence, per_step| Trans::Table { per_sequence, per_step };
    vec![
        ("many sequences", Small::random(31, [70, 5, 3, 2], Emission::GaussianDiagonal, SHARED, 1).with_lengths(&[5, 3].repeat(35))),
        ("long", Small::random(32, [2, 530, 4, 1], Emission::StudentT, table(true, false), 2).with_gaps(3)),
        ("input-driven, long", Small::random(33, [3, 300, 5, 1], Emission::Poisson, Trans::Softmax { u: 3, per_sequence: false }, 1)),
        ("steps shared", Small::random(34, [9, 20, 2, 1], Emission::GaussianDiagonal, table(false, true), 9)),
        ("cut in time", Small::random(36, [1, 2600, 4, 1], Emission::GaussianDiagonal, SHARED, 1)),
        ("more states than lanes", Small::random(35, [2, 6, 70, 1], Emission::GaussianDiagonal, SHARED, 1)),
    ]
}

pub(crate) fn all_numbers(device: &Device, small: &Small) -> Vec<Vec<f64>> {
    let upstream: Vec<f64> = (0..small.b).map(|b| 1.0 - 0.25 * (b % 5) as f64).collect();
    let along = Along::random(small, true);
    let hmm: Hmm = small.upload(device);
    let mut pass = device.pass("tangent");
    let tangent = hmm_tangent(&mut pass, &hmm, &probabilities(device, small), &along.upload(device, true)).unwrap();
    let (through, posterior) = read(pass, &tangent.gradient, Some(&tangent.posterior));
    gradient_of(device, small, &upstream).into_iter().chain(through).chain([posterior]).collect()
}

#[test]
fn devices_agree_with_reference() {
    let devices = open_all(&DEVICES);
    for (name, small) in cases().into_iter().chain(large()) {
        let want = all_numbers(&devices[0], &small);
        for device in &devices[1..] {
            for (part, (got, want)) in all_numbers(device, &small).iter().zip(&want).enumerate() {
                close(&format!("{name} on {}: part {part}", device.info().kind.name()), got, want, 3e-5);
            }
        }
    }
}

#[test]
fn neither_checks_nor_schedules_nor_splits_change_a_bit() {
    for spec in DEVICES {
        let Some(device) = open(spec) else { continue };
        for (name, small) in large() {
            let want = all_numbers(&device, &small);
            let split = OpenOptions { work_per_launch: Some(1), ..OpenOptions::default() };
            for options in variants(spec).into_iter().chain([split]) {
                let Some(other) = open_with(spec, &options) else { continue };
                for (part, (got, want)) in all_numbers(&other, &small).iter().zip(&want).enumerate() {
                    assert_bits(&format!("{name} on {spec}, {options:?}: part {part}"), got, want);
                }
            }
        }
    }
}

#[test]
fn gradients_are_finite_for_any_finite_input() {
    let emissions = [Emission::GaussianDiagonal, Emission::GaussianFull, Emission::StudentT, Emission::Poisson, Emission::Regression];
    for device in open_all(&DEVICES) {
        for (seed, emission) in emissions.into_iter().enumerate() {
            let trans = if seed % 2 == 0 { Trans::Softmax { u: 2, per_sequence: false } } else { SHARED };
            let mut small = Small::random(90 + seed as u32, [2, 40, 3, 3], emission, trans, 1);
            let rng = &mut Rng::new(seed as u32);
            for x in small.obs.iter_mut().chain(&mut small.inputs).filter(|_| rng.unit() < 0.3) {
                let size = [1e3, 1e9, 1e15, 1e20, 3.4e38][(*x * 1e6) as i64 as usize % 5];
                *x = if emission == Emission::Poisson { size } else { f64::from((size * x.clamp(-1.0, 1.0)) as f32) };
            }
            let hmm = small.upload(&device);
            let mut pass = device.pass("gradient");
            let wanted = Wanted { filtered: true, predicted: true, posterior: true, pair: Pair::None };
            let result = hmm_forward_backward(&mut pass, &hmm, wanted).unwrap();
            let summary = result.read(&mut pass).unwrap();
            let probabilities = Probabilities::of(&result).unwrap();
            let gradient = hmm_gradient(&mut pass, &hmm, &probabilities, None).unwrap();
            let tangent = hmm_tangent(&mut pass, &hmm, &probabilities, &Along::random(&small, true).upload(&device, true)).unwrap();
            let through =
                [&tangent.gradient.log_obs, &tangent.gradient.model, &tangent.gradient.transitions, &tangent.posterior].map(|x| pass.read(x).unwrap());
            let own = [&gradient.log_obs, &gradient.model, &gradient.transitions].map(|x| pass.read(x).unwrap());
            let mut done = pass.submit().unwrap();
            let name = format!("{emission:?} on {}", device.info().kind.name());
            let likelihoods = result.likelihoods(&mut done, summary).unwrap();
            assert!(likelihoods.iter().all(|l| l.value.is_finite()), "{name}: {likelihoods:?}");
            for (part, read) in own.into_iter().chain(through).enumerate() {
                let values = done.f64(read).unwrap();
                assert!(values.iter().all(|x| x.is_finite()), "{name}: part {part} at {:?}", values.iter().position(|x| !x.is_finite()));
            }
        }
    }
}

#[test]
fn an_impossible_sequence_has_no_gradient_and_leaves_the_others_right() {
    for device in open_all(&DEVICES) {
        let mut small = Small::random(41, [3, 6, 2, 1], Emission::LogProbabilities, SHARED, 1);
        let whole = gradient_of(&device, &small, &[1.0, 0.0, 1.0]);
        small.obs[6 * 2 + 4] = f64::NEG_INFINITY;
        small.obs[6 * 2 + 5] = f64::NEG_INFINITY;
        let truths: Vec<Truth> = (0..3).map(|b| small.truth(b)).collect();
        // What forward-backward leaves of an impossible sequence: filtered up to the step before, no posterior.
        let kept = |of: &dyn Fn(&Truth) -> Vec<f64>| -> Vec<f64> {
            truths.iter().flat_map(|t| of(t).into_iter().map(|x| if x.is_finite() { x } else { 0.0 }).collect::<Vec<_>>()).collect()
        };
        let probabilities = Probabilities {
            filtered: upload(&device, &kept(&|t| t.filtered.clone())),
            predicted: upload(&device, &kept(&|t| t.predicted.clone())),
            posterior: upload(&device, &kept(&|t| t.posterior.clone())),
        };
        small.obs[6 * 2 + 4] = -1e30;
        small.obs[6 * 2 + 5] = -1e30;
        let (hmm, upstream) = (small.upload(&device), upload(&device, &[1.0, 1.0, 1.0]));
        let mut pass = device.pass("gradient");
        let gradient = hmm_gradient(&mut pass, &hmm, &probabilities, Some(&upstream)).unwrap();
        let (got, _) = read(pass, &gradient, None);
        assert!(got[0][12..24].iter().all(|&x| x == 0.0), "{:?}", &got[0][12..24]);
        for (got, want) in got.iter().zip(&whole) {
            close("the others", got, want, 1e-6);
        }
        let mut pass = device.pass("tangent");
        let direction = Direction { log_obs: Some(upload(&device, &[1.0; 36])), ..Direction::default() };
        let tangent = hmm_tangent(&mut pass, &hmm, &probabilities, &direction).unwrap();
        let (through, posterior) = read(pass, &tangent.gradient, Some(&tangent.posterior));
        assert!(through.iter().flatten().chain(&posterior).all(|x| x.is_finite()));
        assert!(posterior[12..24].iter().all(|&x| x == 0.0));
    }
}

#[test]
fn wrong_shapes_are_refused() {
    let device = open("cpu").unwrap();
    let small = Small::random(51, [2, 4, 2, 1], Emission::GaussianDiagonal, SHARED, 1);
    let (hmm, good) = (small.upload(&device), probabilities(&device, &small));
    let mut pass = device.pass("wrong");
    let short = Probabilities { posterior: upload(&device, &[0.5; 15]), ..good.clone() };
    let message = |result: forback::Result<()>| result.unwrap_err().to_string();
    let text = message(hmm_gradient(&mut pass, &hmm, &short, None).map(|_| ()));
    assert!(text.contains("posterior") && text.contains("16 values") && text.contains("15 values"), "{text}");
    let text = message(hmm_gradient(&mut pass, &hmm, &good, Some(&upload(&device, &[1.0; 3]))).map(|_| ()));
    assert!(text.contains("upstream") && text.contains("3 values"), "{text}");
    let direction = Direction { log_init: Some(upload(&device, &[0.0; 3])), ..Direction::default() };
    let text = message(hmm_tangent(&mut pass, &hmm, &good, &direction).map(|_| ()));
    assert!(text.contains("direction of log_init"), "{text}");
    let trans = TransDirection { values: upload(&device, &[0.0; 4]), per_sequence: true, per_step: false };
    let text = message(hmm_tangent(&mut pass, &hmm, &good, &Direction { log_trans: Some(trans), ..Direction::default() }).map(|_| ()));
    assert!(text.contains("direction of log_trans") && text.contains("8 values"), "{text}");
}
