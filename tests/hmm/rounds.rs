//! Long loops: a software Vulkan driver leaves the loops of a thread, without a word, after 65,535 rounds in all, so launches are cut by
//! the rounds that an op counts. One that counts too few is wrong in the longest launch that it allows: just there wgpu meets the CPU.

use crate::baum_welch::{Ran, problem};
use crate::common::{Rng, open};
use crate::gradient::{SHARED, all_numbers};
use crate::oracle::{Small, Trans};
use forback::kernels::hmm::{Emission, Hmm, Pair, Transitions, Wanted, hmm_forward_backward, log_probabilities};
use forback::kernels::hmm_forecast::{Ahead, hmm_forecast, hmm_sojourn};
use forback::kernels::hmm_sample::{hmm_sample, hmm_sample_posterior};
use forback::kernels::hmm_scan::hmm_scan;
use forback::kernels::hmm_viterbi::{hmm_viterbi, log_prob};
use forback::kernels::{Device, Result, View};

const STEP: Trans = Trans::Table { per_sequence: false, per_step: true };

fn driven(u: usize) -> Trans {
    Trans::Softmax { u, per_sequence: false }
}

fn log_probs(seed: u32, t: usize, k: usize, trans: Trans) -> Small {
    Small::random(seed, [1, t, k, 1], Emission::LogProbabilities, trans, 1)
}

fn pair() -> Option<(Device, Device)> {
    Some((open("cpu").unwrap(), open("wgpu")?))
}

/// Share of numbers that differ by more than the tolerance of the scale of 1 and their own size.
fn apart(got: &[f64], want: &[f64], tolerance: f64) -> f64 {
    assert_eq!(got.len(), want.len());
    let near = |(g, w): &(&f64, &f64)| (**g - **w).abs() <= tolerance * (1.0 + w.abs());
    let near = got.iter().zip(want).filter(near).count();
    (got.len() - near) as f64 / got.len().max(1) as f64
}

/// Runs f on both devices; numbers may differ in this share of their places.
fn meet(what: &str, share: f64, tolerance: f64, f: &dyn Fn(&Device) -> Result<Vec<Vec<f64>>>) {
    let Some((cpu, wgpu)) = pair() else { return };
    let got = match f(&wgpu) {
        Ok(got) => got,
        Err(error) => panic!("{what}: {error}"),
    };
    for (part, (got, want)) in got.iter().zip(f(&cpu).unwrap()).enumerate() {
        let off = apart(got, &want, tolerance);
        assert!(off <= share, "{what}: {off:.4} of part {part} are apart");
    }
}

#[test]
fn forward_backward_at_its_longest() {
    let emissions =
        [Emission::GaussianDiagonal, Emission::GaussianFull, Emission::StudentT, Emission::Poisson, Emission::Categorical { symbols: 3 }, Emission::Regression];
    let fused = emissions.iter().flat_map(|&e| {
        [(3, 420), (8, 130), (12, 120)].map(|(k, t)| Small::random(5, [1, t, k, if matches!(e, Emission::Categorical { .. }) { 1 } else { 2 }], e, SHARED, 1))
    });
    let plain = [
        (4, 17_000, SHARED),
        (8, 17_000, SHARED),
        (3, 2500, STEP),
        (8, 500, STEP),
        (3, 700, driven(2)),
        (8, 110, driven(2)),
        (20, 300, SHARED),
        (20, 70, driven(1)),
        (90, 60, SHARED),
    ];
    for small in plain.map(|(k, t, trans)| log_probs(6, t, k, trans)).into_iter().chain(fused) {
        meet(&format!("{:?} K {} T {}", small.emission, small.k, small.t), 0.0, 3e-5, &|device| {
            let mut pass = device.pass("rounds");
            let wanted = Wanted { filtered: true, predicted: false, posterior: true, pair: Pair::Sum };
            let out = hmm_forward_backward(&mut pass, &small.upload(device), wanted)?;
            let (filtered, posterior) = (pass.read(out.filtered.as_ref().unwrap())?, pass.read(out.posterior.as_ref().unwrap())?);
            let mut done = pass.submit()?;
            Ok(vec![done.f64(filtered)?, done.f64(posterior)?])
        });
    }
}

#[test]
fn viterbi_at_its_longest() {
    let shapes = [
        (1, 5700, SHARED),
        (4, 5500, SHARED),
        (4, 5500, STEP),
        (1, 3500, driven(0)),
        (2, 2400, driven(1)),
        (4, 880, driven(2)),
        (5, 1500, SHARED),
        (20, 600, SHARED),
        (20, 170, driven(3)),
        (200, 60, SHARED),
        (130, 20, driven(1)),
    ];
    for (k, t, trans) in shapes {
        let small = log_probs(7, t, k, trans);
        let run = |device: &Device| -> Result<Vec<Vec<f64>>> {
            let mut pass = device.pass("rounds");
            let out = hmm_viterbi(&mut pass, &small.upload(device))?;
            let (path, value) = (pass.read(&out.path)?, pass.read(&out.log_prob)?);
            let mut done = pass.submit()?;
            Ok(vec![log_prob(&done.f64(value)?), done.u32(path)?.into_iter().map(f64::from).collect()])
        };
        // A tie within a rounding of the exponentials may turn a step or two.
        meet(&format!("viterbi K {k} T {t} {trans:?}"), if matches!(trans, Trans::Softmax { .. }) { 0.02 } else { 0.0 }, 1e-5, &run);
    }
}

#[test]
fn sampling_at_its_longest() {
    let shapes = [(1, 1600, SHARED), (2, 1250, SHARED), (3, 1000, STEP), (3, 320, driven(2)), (20, 250, SHARED), (15, 30, driven(3)), (300, 20, SHARED)];
    for (k, t, trans) in shapes {
        let small = log_probs(8, t, k, trans);
        let run = |device: &Device| -> Result<Vec<Vec<f64>>> {
            let hmm = small.upload(device);
            let mut pass = device.pass("rounds");
            let (drawn, after) = (hmm_sample(&mut pass, &hmm, 3)?, hmm_sample_posterior(&mut pass, &hmm, 4, 2)?);
            let reads = [pass.read(&drawn.states)?, pass.read(&after)?];
            let mut done = pass.submit()?;
            reads.into_iter().map(|read| Ok(done.u32(read)?.into_iter().map(f64::from).collect())).collect()
        };
        // A word within a rounding of an edge turns a state, and the next ones until both paths meet.
        meet(&format!("sample K {k} T {t} {trans:?}"), 0.03, 0.0, &run);
    }
    for emission in [Emission::GaussianDiagonal, Emission::GaussianFull, Emission::StudentT, Emission::Poisson] {
        let small = Small::random(9, [2, 5, 2, 100], emission, SHARED, 1);
        meet(&format!("observations of {emission:?}, D {}", small.d), 0.0, 1e-4, &|device| {
            let mut pass = device.pass("rounds");
            let drawn = hmm_sample(&mut pass, &small.upload(device), 3)?;
            let read = pass.read(drawn.obs.as_ref().unwrap())?;
            Ok(vec![pass.submit()?.f64(read)?])
        });
    }
}

#[test]
fn forecasts_at_their_longest() {
    for (k, h, u) in [(1, 5000, None), (3, 2800, None), (3, 700, Some(2)), (20, 750, None), (20, 120, Some(1)), (150, 30, None)] {
        let rng = &mut Rng::new(10);
        let rows: Vec<f64> = (0..h * k)
            .flat_map(|_| {
                let x: Vec<f64> = (0..k).map(|_| 0.1 + rng.unit()).collect();
                let sum: f64 = x.iter().sum();
                x.into_iter().map(move |x| x / sum)
            })
            .collect();
        let weights = rng.returns(k * k * (u.unwrap_or(0) + 1), 0.0, 1.0);
        let inputs = rng.returns(h * u.unwrap_or(0), 0.0, 1.0);
        let p: Vec<f32> = rows[..k].iter().map(|&x| x as f32).collect();
        meet(&format!("forecast K {k} H {h} {u:?}"), 0.0, 1e-5, &|device| {
            let view = |x: &[f32]| View::from(&device.upload("x", x).unwrap());
            let transitions = match u {
                None => Transitions::Table { log_trans: view(&log_probabilities("rows", &rows, k)?), per_sequence: false, per_step: true },
                Some(u) => Transitions::Softmax { weights: view(&weights), inputs: view(&inputs), u: u as u64, per_sequence: false },
            };
            let ahead = Ahead { b: 1, k: k as u64, steps: h as u64, probability: view(&p), transitions };
            let mut pass = device.pass("rounds");
            let (forecast, stay) = (hmm_forecast(&mut pass, &ahead)?, hmm_sojourn(&mut pass, &ahead, 0.5, 1e4)?);
            let reads = [pass.read(&forecast)?, pass.read(&stay.survival)?, pass.read(&stay.sojourn)?];
            let mut done = pass.submit()?;
            reads.into_iter().map(|read| done.f64(read)).collect()
        });
    }
    // Durations under a table for each step: the longest that is not refused, with states that stay.
    let h = 9200;
    let stays: Vec<f64> = (0..2 * h).flat_map(|i| if i % 2 == 0 { [0.9995, 0.0005] } else { [0.0002, 0.9998] }).collect();
    meet("sojourn", 0.0, 2e-5, &|device| {
        let log_trans = View::from(&device.upload("rows", &log_probabilities("rows", &stays, 2)?)?);
        let probability = View::from(&device.upload("p", &[0.5, 0.5])?);
        let ahead = Ahead { b: 1, k: 2, steps: h as u64, probability, transitions: Transitions::Table { log_trans, per_sequence: false, per_step: true } };
        let mut pass = device.pass("rounds");
        let stay = hmm_sojourn(&mut pass, &ahead, 0.5, 1e6)?;
        let reads = [pass.read(&stay.survival)?, pass.read(&stay.sojourn)?];
        let mut done = pass.submit()?;
        reads.into_iter().map(|read| done.f64(read)).collect()
    });
}

#[test]
fn baum_welch_at_its_longest() {
    let Some((cpu, wgpu)) = pair() else { return };
    // Around the longest launch of both directions, and of the forward one alone.
    let shapes = [
        (Emission::LogProbabilities, 4, 4, 1450),
        (Emission::LogProbabilities, 1, 1, 1620),
        (Emission::GaussianDiagonal, 4, 1, 1230),
        (Emission::GaussianDiagonal, 4, 3, 1050),
        (Emission::GaussianFull, 3, 3, 670),
        (Emission::StudentT, 4, 1, 1350),
        (Emission::Poisson, 4, 1, 760),
        (Emission::Categorical { symbols: 4 }, 4, 1, 1500),
        (Emission::Regression, 3, 3, 1050),
        (Emission::GaussianDiagonal, 10, 1, 700),
        (Emission::Poisson, 6, 1, 800),
        (Emission::LogProbabilities, 12, 12, 700),
        (Emission::LogProbabilities, 70, 70, 80),
    ];
    for (emission, k, width, t) in shapes {
        let p = problem(11, emission, k, width, 1, 1, 1, t);
        let run = |device: &Device| -> Ran { p.run(device, &p.settings(), 1).unwrap() };
        let (got, want) = (run(&wgpu), run(&cpu));
        let what = format!("{emission:?} K {k} T {t}");
        assert!(apart(&got.path[0], &want.path[0], 1e-5) == 0.0, "{what}: log-likelihoods {:?}, {:?}", got.path[0], want.path[0]);
        let off = apart(&got.parameters[0], &want.parameters[0], 1e-3);
        assert!(off == 0.0, "{what}: {off:.3} of the parameters are apart");
    }
}

#[test]
fn gradients_at_their_longest() {
    let emissions = [
        Small::random(12, [1, 1400, 3, 1], Emission::GaussianDiagonal, SHARED, 1),
        Small::random(13, [1, 300, 2, 5], Emission::GaussianFull, SHARED, 1),
        Small::random(14, [1, 300, 2, 2], Emission::StudentT, STEP, 1),
        Small::random(15, [1, 300, 2, 60], Emission::Regression, SHARED, 1),
        Small::random(16, [1, 420, 3, 1], Emission::Poisson, driven(2), 1),
        Small::random(17, [1, 200, 20, 1], Emission::GaussianDiagonal, SHARED, 1),
        Small::random(18, [1, 40, 20, 1], Emission::GaussianDiagonal, driven(1), 1),
    ];
    let Some((cpu, wgpu)) = pair() else { return };
    for small in emissions {
        for (part, (got, want)) in all_numbers(&wgpu, &small).iter().zip(all_numbers(&cpu, &small)).enumerate() {
            let scale = want.iter().fold(1.0f64, |m, x| m.max(x.abs()));
            let worst = got.iter().zip(&want).map(|(g, w)| (g - w).abs() / scale).fold(0.0, f64::max);
            assert!(worst < 5e-5, "{:?} K {} T {}: part {part} apart by {worst:e}", small.emission, small.k, small.t);
        }
    }
}

#[test]
fn scans_at_their_longest() {
    for (k, t) in [(16, 2200), (5, 2500), (1, 5000)] {
        let small = log_probs(19, t, k, SHARED);
        let wanted = Wanted { filtered: true, predicted: true, posterior: true, pair: Pair::None };
        let run = |device: &Device| -> Result<Vec<Vec<f64>>> {
            let hmm: Hmm = small.upload(device);
            let mut pass = device.pass("rounds");
            let out = if device.info().software { hmm_scan(&mut pass, &hmm, wanted)? } else { hmm_forward_backward(&mut pass, &hmm, wanted)? };
            let reads = [&out.filtered, &out.predicted, &out.posterior].map(|x| pass.read(x.as_ref().unwrap()));
            let mut done = pass.submit()?;
            reads.into_iter().map(|read| done.f64(read?)).collect()
        };
        meet(&format!("scan K {k} T {t}"), 0.0, 1e-5, &run);
    }
}
