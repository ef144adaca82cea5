//! Forward-backward against enumeration of all paths, published constants and itself under changes that must not matter; bad input.

use crate::common::{DEVICES, Rng, assert_bits, open, open_all, open_with, variants};
use crate::gradient::{SHARED, cases, close};
use crate::oracle::{Small, Trans};
use crate::switching::{Published, number, numbers};
use forback::kernels::DeviceKind;
use forback::kernels::hmm::{
    Emission, Hmm, Likelihood, PackShape, Pair, Wanted, check_observations, hmm_forward_backward, log_probabilities, pack_categorical, pack_gaussian_diagonal,
    pack_gaussian_full, pack_poisson, pack_regression, pack_student_t, pack_words,
};
use forback::kernels::hmm_baum_welch::Observations;
use forback::kernels::hmm_fit::{EmissionParameters, FitOptions, fit};
use forback::{Device, OpenOptions};

/// Everything that forward-backward gives.
struct Found {
    likelihoods: Vec<Likelihood>,
    /// filtered, predicted, posterior [B,T,K], pair [B,T−1,K,K].
    reals: [Vec<f64>; 4],
}

fn run(device: &Device, hmm: &Hmm) -> Found {
    let mut pass = device.pass("forward-backward");
    let wanted = Wanted { filtered: true, predicted: true, posterior: true, pair: Pair::Steps };
    let result = hmm_forward_backward(&mut pass, hmm, wanted).unwrap();
    let summary = result.read(&mut pass).unwrap();
    let reads = [&result.filtered, &result.predicted, &result.posterior, &result.pair].map(|x| pass.read(x.as_ref().unwrap()).unwrap());
    let mut done = pass.submit().unwrap();
    Found { likelihoods: result.likelihoods(&mut done, summary).unwrap(), reals: reads.map(|r| done.f64(r).unwrap()) }
}

impl Found {
    fn numbers(&self) -> Vec<f64> {
        let values = self.likelihoods.iter().map(|l| l.value);
        values.chain(self.reals.iter().flatten().copied()).collect()
    }
}

/// Probability-weighted sums over all K^length paths of one sequence: log-likelihood, posterior, pair.
fn enumerated(small: &Small, b: usize) -> (f64, Vec<f64>, Vec<f64>) {
    let (k, length) = (small.k, small.lengths[b] as usize);
    let init = &small.theta[if small.theta.len() > 1 { b } else { 0 }][..k];
    let tables: Vec<Vec<f64>> = (1..small.t).map(|t| small.log_trans(b, t - 1)).collect();
    let log_obs: Vec<Vec<f64>> = (0..small.t).map(|t| small.log_obs(b, t)).collect();
    let (mut total, mut posterior, mut pair) = (0.0, vec![0.0; small.t * k], vec![0.0; (small.t - 1) * k * k]);
    if length == 0 {
        return (0.0, posterior, pair);
    }
    for code in 0..k.pow(length as u32) {
        let path: Vec<usize> = (0..length).map(|t| code / k.pow(t as u32) % k).collect();
        let log =
            init[path[0]] + (0..length).map(|t| log_obs[t][path[t]]).sum::<f64>() + (1..length).map(|t| tables[t - 1][path[t - 1] * k + path[t]]).sum::<f64>();
        let p = log.exp();
        total += p;
        (0..length).for_each(|t| posterior[t * k + path[t]] += p);
        (1..length).for_each(|t| pair[((t - 1) * k + path[t - 1]) * k + path[t]] += p);
    }
    posterior.iter_mut().chain(&mut pair).for_each(|x| *x /= total);
    (total.ln(), posterior, pair)
}

#[test]
fn all_paths() {
    for device in open_all(&DEVICES) {
        for (name, small) in cases() {
            let name = format!("{name} on {}", device.info().kind.name());
            let found = run(&device, &small.upload(&device));
            let want: Vec<_> = (0..small.b).map(|b| enumerated(&small, b)).collect();
            for (likelihood, want) in found.likelihoods.iter().zip(&want) {
                assert!((likelihood.value - want.0).abs() < 2e-6 * (1.0 + want.0.abs()), "{name}: got {}, expected {}", likelihood.value, want.0);
            }
            close(&format!("{name}: posterior"), &found.reals[2], &want.iter().flat_map(|w| w.1.clone()).collect::<Vec<_>>(), 2e-6);
            close(&format!("{name}: pair"), &found.reals[3], &want.iter().flat_map(|w| w.2.clone()).collect::<Vec<_>>(), 2e-6);
            // Filtered at t is smoothed on the rows up to t; predicted is smoothed where row t is missing and the last.
            for t in 0..small.t {
                let cut = Small { lengths: small.lengths.iter().map(|&n| n.min(t as u32 + 1)).collect(), ..small.clone() };
                for b in (0..small.b).filter(|&b| small.lengths[b] as usize > t) {
                    let at = (b * small.t + t) * small.k..(b * small.t + t + 1) * small.k;
                    let row = t * small.k..(t + 1) * small.k;
                    close(&format!("{name}: filtered"), &found.reals[0][at.clone()], &enumerated(&cut, b).1[row.clone()], 2e-6);
                    let mut blind = cut.clone();
                    blind.observed.get_or_insert_with(|| vec![true; small.b * small.t])[b * small.t + t] = false;
                    close(&format!("{name}: predicted"), &found.reals[1][at], &enumerated(&blind, b).1[row], 2e-6);
                }
            }
        }
    }
}

fn two_states(log_init: [f64; 2], mean: [f64; 2], deviation: [f64; 2], trans: Trans, links: &[f64], obs: &[f64]) -> Small {
    let theta = log_init.into_iter().map(f64::ln).chain(mean).chain(deviation.map(|s| 2.0 * s.ln())).collect();
    Small {
        b: 1,
        t: obs.len(),
        k: 2,
        d: 1,
        emission: Emission::GaussianDiagonal,
        trans,
        theta: vec![theta],
        links: links.to_vec(),
        inputs: Vec::new(),
        obs: obs.to_vec(),
        lengths: vec![obs.len() as u32],
        observed: None,
    }
}

#[test]
fn constants_of_three_small_models() {
    let links: Vec<f64> = [0.7f64, 0.3, 0.2, 0.8].iter().map(|p| p.ln()).collect();
    let model = |obs: &[f64]| two_states([0.8, 0.2], [0.0, 15.0], [5.0, 10.0], SHARED, &links, obs);
    let mut driven = two_states(
        [0.6, 0.4],
        [0.0, 1.0],
        [0.5, 1.0],
        Trans::Softmax { u: 1, per_sequence: false },
        &[1.0, 1.0, 0.0, 0.0, 0.0, 0.0, -0.5, 1.0],
        &[0.3, -0.2, 1.5, 2.0],
    );
    driven.inputs = vec![0.0, 1.0, -1.0, 2.0];
    for device in open_all(&DEVICES) {
        let near = |what: &str, got: &[f64], want: &[f64]| close(&format!("{what} on {}", device.info().kind.name()), got, want, 2e-6);
        let zeros = run(&device, &model(&[0.0; 7]).upload(&device));
        near("zeros: log-likelihood", &[zeros.likelihoods[0].value / 20.0], &[-19.8556354955 / 20.0]);
        near("zeros: first posterior", &zeros.reals[2][..2], &[0.98635543, 0.01364457]);
        near("zeros: last filtered", &zeros.reals[0][12..], &[0.92336368, 0.07663632]);
        let mixed = run(&device, &model(&[-3.0, 2.0, 11.0, 18.0, 9.0, 1.0, 0.5]).upload(&device));
        near("mixed: log-likelihood", &[mixed.likelihoods[0].value / 20.0], &[-23.5296439797 / 20.0]);
        let inputs = run(&device, &driven.upload(&device));
        let second = |x: &[f64]| x.iter().skip(1).step_by(2).copied().collect::<Vec<_>>();
        near("inputs: log-likelihood", &[inputs.likelihoods[0].value / 5.0], &[-4.9425737864 / 5.0]);
        near("inputs: smoothed", &second(&inputs.reals[2]), &[0.17781724, 0.11903882, 0.99779238, 0.99884951]);
        near("inputs: filtered", &second(&inputs.reals[0]), &[0.23801153, 0.07646283, 0.97766604, 0.99884951]);
        near("inputs: first pair", &inputs.reals[3][..4], &[0.77693933, 0.04524343, 0.10402185, 0.07379539]);
    }
}

// ---- what must not matter -------------------------------------------------------------------------------------------------

/// Batches of several K and T, ragged and with gaps.
fn varied() -> Vec<(&'static str, Small)> {
    let table = |per_sequence, per_step| Trans::Table { per_sequence, per_step };
    vec![
        ("K 2", Small::random(61, [9, 40, 2, 1], Emission::GaussianDiagonal, SHARED, 1).with_lengths(&[40, 3, 17, 0, 40, 1, 39, 20, 8])),
        ("K 4, models", Small::random(62, [5, 30, 4, 2], Emission::StudentT, table(true, false), 5).with_gaps(1)),
        ("K 7", Small::random(63, [3, 25, 7, 1], Emission::Poisson, table(false, true), 1).with_lengths(&[25, 24, 5])),
        ("K 20, inputs", Small::random(64, [2, 12, 20, 1], Emission::GaussianDiagonal, Trans::Softmax { u: 2, per_sequence: false }, 1)),
    ]
}

#[test]
fn permuted_states_permute_results() {
    for device in open_all(&DEVICES) {
        for (name, small) in varied().into_iter().filter(|(_, s)| matches!(s.trans, Trans::Table { .. })) {
            let (k, d) = (small.k, small.d);
            let order: Vec<usize> = (0..k).map(|i| (i + 1) % k).collect();
            let mut turned = small.clone();
            for (to, from) in turned.theta.iter_mut().zip(&small.theta) {
                (0..k).for_each(|s| to[s] = from[order[s]]);
                for (part, s) in (0..(from.len() - k) / (k * d)).flat_map(|part| (0..k).map(move |s| (part, s))) {
                    (0..d).for_each(|i| to[k + (part * k + s) * d + i] = from[k + (part * k + order[s]) * d + i]);
                }
            }
            for (to, from) in turned.links.chunks_exact_mut(k * k).zip(small.links.chunks_exact(k * k)) {
                (0..k * k).for_each(|ij| to[ij] = from[order[ij / k] * k + order[ij % k]]);
            }
            let (a, b) = (run(&device, &small.upload(&device)), run(&device, &turned.upload(&device)));
            for (x, y) in a.likelihoods.iter().zip(&b.likelihoods) {
                assert!((x.value - y.value).abs() <= 3e-7 * (1.0 + x.value.abs()), "{name}: {} and {}", x.value, y.value);
            }
            for (a, b) in a.reals[..3].iter().zip(&b.reals) {
                let back: Vec<f64> = (0..a.len()).map(|at| a[at / k * k + order[at % k]]).collect();
                close(name, b, &back, 2e-6);
            }
            let back: Vec<f64> = (0..a.reals[3].len()).map(|at| a.reals[3][at / (k * k) * k * k + order[at / k % k] * k + order[at % k]]).collect();
            close(name, &b.reals[3], &back, 2e-6);
        }
    }
}

#[test]
fn padding_changes_no_bit() {
    for device in open_all(&DEVICES) {
        for (name, small) in varied().into_iter().filter(|(_, s)| s.trans != Trans::Table { per_sequence: false, per_step: true }) {
            let (b, t, k, more) = (small.b, small.t, small.k, 11);
            let padded = |values: &[f64], width: usize, fill: f64| -> Vec<f64> {
                values.chunks_exact(t * width).flat_map(|x| x.iter().copied().chain(vec![fill; more * width])).collect()
            };
            let long = Small {
                t: t + more,
                obs: padded(&small.obs, small.obs.len() / (b * t), 1.25e7),
                inputs: if small.inputs.is_empty() { Vec::new() } else { padded(&small.inputs, small.inputs.len() / (b * t), 3.0) },
                observed: small.observed.as_ref().map(|o| o.chunks_exact(t).flat_map(|x| x.iter().copied().chain([true; 11])).collect()),
                ..small.clone()
            };
            let (plain, padded) = (run(&device, &small.upload(&device)), run(&device, &long.upload(&device)));
            let name = format!("{name} on {}", device.info().kind.name());
            let values = |f: &Found| f.likelihoods.iter().map(|l| l.value).collect::<Vec<_>>();
            assert_bits(&name, &values(&padded), &values(&plain));
            for (part, width, steps) in [(0, k, t), (1, k, t), (2, k, t), (3, k * k, t - 1)] {
                for b in 0..b {
                    let got = &padded.reals[part][b * (steps + more) * width..(b + 1) * (steps + more) * width];
                    assert_bits(&name, &got[..steps * width], &plain.reals[part][b * steps * width..(b + 1) * steps * width]);
                    assert!(got[steps * width..].iter().all(|&x| x == 0.0), "{name}: padding is not 0");
                }
            }
        }
    }
}

#[test]
fn neither_splits_nor_checks_nor_schedules_change_a_bit() {
    for spec in DEVICES {
        let Some(device) = open(spec) else { continue };
        for (name, small) in varied() {
            let want = run(&device, &small.upload(&device));
            let split = OpenOptions { work_per_launch: Some(1), ..OpenOptions::default() };
            for options in variants(spec).into_iter().chain([split]) {
                let Some(other) = open_with(spec, &options) else { continue };
                assert_bits(&format!("{name} on {spec}, {options:?}"), &run(&other, &small.upload(&other)).numbers(), &want.numbers());
            }
        }
    }
}

#[test]
fn finite_for_any_finite_input() {
    let mut wanted = Vec::new();
    for device in open_all(&DEVICES) {
        for (at, (seed, k)) in [(81, 2), (82, 4), (85, 7), (83, 9), (84, 33)].into_iter().enumerate() {
            let mut small = Small::random(seed, [3, 60, k, 1], Emission::LogProbabilities, SHARED, 1);
            let rng = &mut Rng::new(seed + 100);
            for x in &mut small.obs {
                let size = [1.0, 50.0, 3e3, 1e5, 1e8, 1e20, 1e38][rng.whole(0, 7) as usize];
                let drawn = (size * rng.normal()).min(f64::from(f32::MAX));
                // At or below −1e29 a state is impossible.
                *x = f64::from(if drawn < -1e28 { -drawn } else { drawn } as f32);
            }
            let found = run(&device, &small.upload(&device));
            let name = format!("K {k} on {}", device.info().kind.name());
            assert!(found.likelihoods.iter().all(|l| l.value.is_finite() && l.impossible.is_none()), "{name}: {:?}", found.likelihoods);
            for row in found.reals[..3].iter().flat_map(|x| x.chunks_exact(k)).chain(found.reals[3].chunks_exact(k * k)) {
                let sum: f64 = row.iter().sum();
                assert!(row.iter().all(|p| (0.0..=1.00001).contains(p)) && (sum - 1.0).abs() < 1e-5, "{name}: a row sums to {sum}");
            }
            let values: Vec<f64> = found.likelihoods.iter().map(|l| l.value).collect();
            if wanted.len() == at {
                wanted.push(values);
            } else {
                let near = values.iter().zip(&wanted[at]).all(|(got, want)| (got - want).abs() <= 1e-6 * want.abs());
                assert!(near, "{name}: got {values:?}, expected {:?}", wanted[at]);
            }
        }
    }
}

// ---- earthquakes ----------------------------------------------------------------------------------------------------------

#[test]
fn published_poisson_models_of_earthquakes() {
    let Some(found) = Published::read("hmm_earthquakes", "published.json") else { return };
    let counts = found.column("count");
    let models = found.json["published"].as_array().unwrap().iter().chain(found.json["recomputed_here"].as_array().unwrap());
    for (i, model) in models.enumerate() {
        let rate = numbers(&model["lambda"]);
        let k = rate.len();
        let log = |p: f64| if p > 0.0 { p.ln() } else { -1e30 };
        let normal = |x: Vec<f64>| x.iter().map(|p| log(p / x.iter().sum::<f64>())).collect::<Vec<f64>>();
        let delta = normal(numbers(&model["delta"]));
        // A mixture is a chain that forgets: every row is its distribution.
        let links = match model.get("gamma") {
            Some(gamma) => gamma.as_array().unwrap().iter().flat_map(|row| normal(numbers(row))).collect(),
            None => delta.repeat(k),
        };
        let small = Small {
            b: 1,
            t: counts.len(),
            k,
            d: 1,
            emission: Emission::Poisson,
            trans: SHARED,
            theta: vec![delta.into_iter().chain(rate.iter().map(|r| r.ln())).collect()],
            links,
            inputs: Vec::new(),
            obs: counts.to_vec(),
            lengths: vec![counts.len() as u32],
            observed: None,
        };
        let (want, exact) = (number(&model["loglik"]), small.truth(0).log_likelihood);
        // Four digits are printed, and parameters of seven: the third model, a mixture, is 1.1e-4 off its own.
        assert!((exact - want).abs() < if i < 2 { 6e-5 } else { 1.5e-4 }, "model {i}: got {exact}, published {want}");
        for device in open_all(&DEVICES) {
            let got = run(&device, &small.upload(&device)).likelihoods[0].value;
            println!("earthquakes {i} on {}: {got:.5}, in f64 {exact:.5}, published {want}", device.info().kind.name());
            // In f32 terms of ±140 (a count times the logarithm of its rate, the logarithm of its factorial) leave densities of −3: a rounding
            // of 8e-6 in each of 107 steps. The hosts' columns add them in f64.
            let on_host = matches!(device.info().kind, DeviceKind::Cpu | DeviceKind::Reference);
            assert!((got - exact).abs() < if on_host { 4e-5 } else { 1.5e-4 }, "model {i} on {}: got {got}, in f64 {exact}", device.info().kind.name());
            if on_host && i < 2 {
                assert_eq!(format!("{got:.4}"), format!("{want:.4}"), "model {i} on {}", device.info().kind.name());
            }
        }
    }
}

/// From rates at thirds of the counts and random starts, EM finds the published optimum and its rates.
#[test]
fn earthquakes_are_fitted_to_the_published_optimum() {
    let Some(found) = Published::read("hmm_earthquakes", "published.json") else { return };
    let counts: Vec<f32> = found.column("count").iter().map(|&x| x as f32).collect();
    // The model whose chain starts freely, as EM's does.
    let model = &found.json["published"][1];
    let data = Observations::new(&counts, 1, counts.len(), 1);
    for device in open_all(&DEVICES) {
        let name = device.info().kind.name();
        let options = FitOptions { emission: Emission::Poisson, states: vec![3], restarts: 8, iterations: 600, tolerance: 1e-6, ..FitOptions::default() };
        let fit = fit(&device, &data, &options).unwrap().remove(0);
        let order = fit.parameters.by_volatility(0);
        let fit = fit.reordered(&order);
        println!("earthquakes fitted on {name}: {:.5} after {} iterations, published {}", fit.log_likelihood, fit.iterations, number(&model["loglik"]));
        assert!((fit.log_likelihood - number(&model["loglik"])).abs() < 1e-3, "{name}: got {}", fit.log_likelihood);
        let EmissionParameters::Poisson { rate } = &fit.parameters.emission else { panic!("{:?}", fit.parameters.emission) };
        close(&format!("{name}: rates"), rate, &numbers(&model["lambda"]), 2e-3);
        let gamma: Vec<f64> = model["gamma"].as_array().unwrap().iter().flat_map(numbers).collect();
        close(&format!("{name}: transitions"), &fit.parameters.trans, &gamma, 5e-3);
        // What EM drove to zero was free: 2 of the start, 6 of the transitions, 3 rates.
        assert_eq!(fit.candidates[0].free, 11, "{name}");
        let bic = -2.0 * fit.log_likelihood + 11.0 * (counts.len() as f64).ln();
        assert!((fit.criteria.bic - bic).abs() < 1e-9 * bic, "{name}: {} instead of {bic}", fit.criteria.bic);
    }
}

// ---- bad input ------------------------------------------------------------------------------------------------------------

#[test]
fn bad_input_is_named() {
    let one = PackShape { models: 1, k: 2, d: 1 };
    let init = [0.5f64.ln(); 2];
    let text = |result: forback::Result<Vec<f32>>| result.unwrap_err().to_string();
    let has = |text: String, words: &[&str]| assert!(words.iter().all(|w| text.contains(w)), "'{text}' does not say {words:?}");
    has(text(log_probabilities("trans", &[0.5, 0.5, 0.2, 0.7], 2)), &["trans, row 1", "0.89", "sum to 1"]);
    has(text(log_probabilities("trans", &[0.5, 0.5, 1.2, -0.2], 2)), &["row 1, column 0", "1.2"]);
    has(text(pack_gaussian_diagonal(one, &[0.0, 0.0], &[0.0; 2], &[1.0; 2])), &["log_init, row 0", "sum to 1"]);
    has(text(pack_gaussian_diagonal(one, &init, &[0.0; 2], &[1.0, 0.0])), &["variance of model 0, state 1", "constant series"]);
    has(text(pack_gaussian_diagonal(one, &init, &[0.0, f64::NAN], &[1.0; 2])), &["mean of model 0, state 1", "NaN"]);
    has(text(pack_gaussian_diagonal(one, &init, &[0.0; 3], &[1.0; 2])), &["mean", "2 values", "3 values"]);
    has(
        text(pack_gaussian_full(PackShape { d: 2, ..one }, &init, &[0.0; 4], &[1.0, 0.0, 0.0, 1.0, 1.0, 2.0, 2.0, 1.0])),
        &["state 1", "not positive definite"],
    );
    has(text(pack_student_t(one, &init, &[0.0; 2], &[1.0; 2], &[3.0, -1.0])), &["dof of model 0, state 1", "-1"]);
    has(text(pack_poisson(one, &init, &[0.0, 1.0])), &["rate of model 0, state 0"]);
    has(text(pack_categorical(one, &init, &[0.5, 0.5, 0.9, 0.3], 2)), &["row 1", "1.2"]);
    has(text(pack_regression(PackShape { d: 2, ..one }, &init, &[1.0, f64::INFINITY], &[1.0; 2])), &["beta of model 0, state 1", "inf"]);
    has(pack_words(5, &[5, 6], None).unwrap_err().to_string(), &["length of sequence 1", "6", "5 steps"]);
    let mut obs = vec![0.5f32; 12];
    obs[9] = f32::NAN;
    has(check_observations(&obs, 3, 2, None, None, false).unwrap_err().to_string(), &["sequence 1, step 1, column 1", "NaN", "mask"]);
    assert!(check_observations(&obs, 3, 2, Some(&[3, 1]), None, false).is_ok(), "past the length nothing is read");
    assert!(check_observations(&obs, 3, 2, None, Some(&[true, true, true, true, false, true]), false).is_ok(), "masked steps are not read");
    has(check_observations(&[1.0, -2.0], 2, 1, None, None, true).unwrap_err().to_string(), &["step 1", "-2", "whole numbers"]);

    let device = open("cpu").unwrap();
    let good = Small::random(1, [2, 4, 2, 1], Emission::GaussianDiagonal, SHARED, 1).upload(&device);
    let refused = |hmm: Hmm| hmm_forward_backward(&mut device.pass("bad"), &hmm, Wanted::default()).map(|_| ()).unwrap_err().to_string();
    has(refused(Hmm { k: 0, ..good.clone() }), &["states = 0"]);
    has(refused(Hmm { t: 0, ..good.clone() }), &["steps = 0"]);
    has(refused(Hmm { b: 0, ..good.clone() }), &["sequences = 0"]);
    has(refused(Hmm { b: 3, ..good.clone() }), &["must be", "values"]);
    has(refused(Hmm { k: 5000, ..good.clone() }), &["states = 5000"]);
    has(refused(Hmm { masked: true, ..good.clone() }), &["words"]);
}
