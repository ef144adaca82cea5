//! Baum-Welch against a textbook EM that stores everything, and the fit on top of it.

use crate::common::{DEVICES, Rng, open, open_all, open_with, variants};
use crate::oracle::{Small, Trans};
use forback::kernels::hmm::{Emission, Pair, Wanted, hmm_forward_backward};
use forback::kernels::hmm_baum_welch::{BaumWelch, Observations, Settings, Status, hmm_baum_welch};
use forback::kernels::hmm_fit::{Criterion, EmissionParameters, FitOptions, Parameters, fit};
use forback::kernels::{Device, Error, OpenOptions};

const LOG_TAU: f64 = 1.837_877_066_409_345_3;

/// A problem: sequences of `groups` models of `per_model` each, natural starts.
#[derive(Clone)]
pub(crate) struct Problem {
    emission: Emission,
    k: usize,
    width: usize,
    groups: usize,
    per_model: usize,
    restarts: usize,
    t: usize,
    obs: Vec<f32>,
    lengths: Vec<u32>,
    observed: Option<Vec<bool>>,
    start: Vec<Vec<f64>>,
}

impl Problem {
    fn data(&self) -> Observations<'_> {
        Observations {
            obs: &self.obs,
            n: self.groups * self.per_model,
            t: self.t,
            width: self.width,
            lengths: Some(&self.lengths),
            observed: self.observed.as_deref(),
        }
    }

    pub(crate) fn settings(&self) -> Settings {
        Settings { restarts: self.restarts, ..Settings::plain(self.emission, self.k, self.per_model) }
    }

    fn guards(&self) -> Vec<f32> {
        let d = if self.emission == Emission::LogProbabilities { 1 } else { self.width };
        [vec![1e-12; d], vec![0.0; d]].concat().repeat(self.groups)
    }

    fn start(&self) -> Vec<f32> {
        self.start.concat().into_iter().map(|x| x as f32).collect()
    }

    /// Parameters [M][P], path [M][iterations + 1], status [M] after `iterations`.
    pub(crate) fn run(&self, device: &Device, settings: &Settings, iterations: u32) -> Result<Ran, Error> {
        let mut pass = device.pass("test");
        let fit = hmm_baum_welch(&mut pass, &self.data(), settings, &self.start(), &self.guards(), iterations)?;
        read(pass, &fit, self.groups * self.restarts)
    }
}

pub(crate) struct Ran {
    pub(crate) parameters: Vec<Vec<f64>>,
    pub(crate) path: Vec<Vec<f64>>,
    status: Vec<Status>,
}

fn read(mut pass: forback::kernels::Pass, fit: &BaumWelch, models: usize) -> Result<Ran, Error> {
    let (parameters, path, status) = (pass.read(&fit.parameters)?, pass.read(&fit.path)?, pass.read(&fit.status)?);
    let mut done = pass.submit()?;
    let (parameters, path, status) = (done.f64(parameters)?, done.f64(path)?, done.u32(status)?);
    let each = parameters.len() / models;
    let rows = fit.iterations as usize + 1;
    let line = |m: usize| (0..rows).map(|r| path[2 * (r * models + m)] + path[2 * (r * models + m) + 1]).collect();
    Ok(Ran {
        parameters: parameters.chunks_exact(each).map(<[f64]>::to_vec).collect(),
        path: (0..models).map(line).collect(),
        status: (0..models).map(|m| Status::of(status[rows * models + m])).collect(),
    })
}

// ---- the textbook ---------------------------------------------------------------------------------------------------------

/// log b of one state, natural parameters behind init and transitions.
fn log_density(p: &Problem, e: &[f64], x: &[f64], s: usize) -> f64 {
    let (k, d) = (p.k, p.width);
    let log_gamma = |z: f64| -> f64 {
        let (mut z, mut product) = (z, 1.0);
        while z < 20.0 {
            product *= z;
            z += 1.0;
        }
        (z - 0.5) * z.ln() - z + 0.5 * LOG_TAU + 1.0 / (12.0 * z) - 1.0 / (360.0 * z.powi(3)) + 1.0 / (1260.0 * z.powi(5)) - product.ln()
    };
    match p.emission {
        Emission::LogProbabilities => x[s],
        Emission::GaussianDiagonal => {
            (0..d).map(|i| (e[s * d + i], e[(k + s) * d + i])).zip(x).map(|((m, v), x)| -0.5 * (LOG_TAU + v.ln() + (x - m).powi(2) / v)).sum()
        }
        Emission::GaussianFull => {
            let c = &e[k * d + s * d * (d + 1) / 2..];
            let entry = |i: usize, j: usize| c[i.max(j) * (i.max(j) + 1) / 2 + i.min(j)];
            // Gauss elimination of [Σ | x − μ].
            let mut a: Vec<Vec<f64>> = (0..d).map(|i| (0..d).map(|j| entry(i, j)).chain([x[i] - e[s * d + i]]).collect()).collect();
            let (mut log_det, mut square) = (0.0, 0.0);
            for i in 0..d {
                log_det += a[i][i].ln();
                square += a[i][d].powi(2) / a[i][i];
                for r in i + 1..d {
                    let f = a[r][i] / a[i][i];
                    for c in i..=d {
                        a[r][c] -= f * a[i][c];
                    }
                }
            }
            -0.5 * (d as f64 * LOG_TAU + log_det + square)
        }
        Emission::StudentT => (0..d)
            .map(|i| {
                let (m, scale, v) = (e[s * d + i], e[(k + s) * d + i], e[(2 * k + s) * d + i]);
                let z = (x[i] - m) / scale;
                log_gamma(0.5 * (v + 1.0)) - log_gamma(0.5 * v) - 0.5 * (v * std::f64::consts::PI).ln() - scale.ln() - 0.5 * (v + 1.0) * (1.0 + z * z / v).ln()
            })
            .sum(),
        Emission::Poisson => (0..d).map(|i| x[i] * e[s * d + i].ln() - e[s * d + i] - log_gamma(x[i] + 1.0)).sum(),
        Emission::Categorical { symbols } => e[s * symbols as usize + x[0] as usize].ln(),
        Emission::Regression => {
            let r = d - 1;
            let error = x[0] - (0..r).map(|i| x[1 + i] * e[s * r + i]).sum::<f64>();
            -0.5 * (LOG_TAU + e[k * r + s].ln() + error * error / e[k * r + s])
        }
    }
}

/// One EM step of one model on its sequences, all posteriors stored; the log-likelihood before it.
fn textbook(p: &Problem, group: usize, theta: &mut [f64]) -> f64 {
    let k = p.k;
    let (mut init, mut pair, mut log_likelihood) = (vec![0.0; k], vec![0.0; k * k], 0.0);
    let mut weighted: Vec<(Vec<f64>, Vec<f64>)> = Vec::new();
    for n in group * p.per_model..(group + 1) * p.per_model {
        let length = p.lengths[n] as usize;
        if length == 0 {
            continue;
        }
        let seen = |t: usize| p.observed.as_ref().is_none_or(|o| o[n * p.t + t]);
        let x = |t: usize| p.obs[(n * p.t + t) * p.width..][..p.width].iter().map(|&x| f64::from(x)).collect::<Vec<f64>>();
        let b: Vec<Vec<f64>> =
            (0..length).map(|t| (0..k).map(|s| if seen(t) { log_density(p, &theta[k + k * k..], &x(t), s).exp() } else { 1.0 }).collect()).collect();
        let a = |i: usize, j: usize| theta[k + i * k + j];
        let (mut alpha, mut beta, mut scale) = (vec![vec![0.0; k]; length], vec![vec![1.0; k]; length], vec![0.0; length]);
        for t in 0..length {
            for j in 0..k {
                let before: f64 = if t == 0 { theta[j] } else { (0..k).map(|i| alpha[t - 1][i] * a(i, j)).sum() };
                alpha[t][j] = before * b[t][j];
            }
            scale[t] = alpha[t].iter().sum();
            alpha[t].iter_mut().for_each(|x| *x /= scale[t]);
            log_likelihood += scale[t].ln();
        }
        for t in (0..length - 1).rev() {
            for i in 0..k {
                beta[t][i] = (0..k).map(|j| a(i, j) * b[t + 1][j] * beta[t + 1][j]).sum::<f64>() / scale[t + 1];
            }
        }
        for t in 0..length {
            let gamma: Vec<f64> = (0..k).map(|s| alpha[t][s] * beta[t][s]).collect();
            if t == 0 {
                init.iter_mut().zip(&gamma).for_each(|(x, g)| *x += g);
            } else {
                for e in 0..k * k {
                    pair[e] += alpha[t - 1][e / k] * a(e / k, e % k) * b[t][e % k] * beta[t][e % k] / scale[t];
                }
            }
            if seen(t) {
                weighted.push((x(t), gamma));
            }
        }
    }
    let total: f64 = init.iter().sum();
    (0..k).for_each(|i| theta[i] = init[i] / total);
    for i in 0..k {
        let total: f64 = pair[i * k..(i + 1) * k].iter().sum();
        if total > 1e-6 {
            (0..k).for_each(|j| theta[k + i * k + j] = pair[i * k + j] / total);
        }
    }
    for s in 0..k {
        emission_step(p, &weighted, s, &mut theta[k + k * k..]);
    }
    log_likelihood
}

fn emission_step(p: &Problem, rows: &[(Vec<f64>, Vec<f64>)], s: usize, e: &mut [f64]) {
    let (k, d) = (p.k, p.width);
    let weight: f64 = rows.iter().map(|r| r.1[s]).sum();
    if weight < 1e-3 {
        return;
    }
    let mean = |f: &dyn Fn(&[f64]) -> f64| rows.iter().map(|(x, g)| g[s] * f(x)).sum::<f64>() / weight;
    match p.emission {
        Emission::LogProbabilities => {}
        Emission::GaussianDiagonal => {
            for i in 0..d {
                let m = mean(&|x| x[i]);
                e[s * d + i] = m;
                e[(k + s) * d + i] = mean(&|x| (x[i] - m).powi(2));
            }
        }
        Emission::GaussianFull => {
            let m: Vec<f64> = (0..d).map(|i| mean(&|x| x[i])).collect();
            e[s * d..(s + 1) * d].copy_from_slice(&m);
            for (at, (i, j)) in (0..d).flat_map(|i| (0..=i).map(move |j| (i, j))).enumerate() {
                e[k * d + s * d * (d + 1) / 2 + at] = mean(&|x| (x[i] - m[i]) * (x[j] - m[j]));
            }
        }
        Emission::StudentT => {
            for i in 0..d {
                let (old, scale, v) = (e[s * d + i], e[(k + s) * d + i], e[(2 * k + s) * d + i]);
                let u = |x: f64| (v + 1.0) / (v + ((x - old) / scale).powi(2));
                let m = mean(&|x| u(x[i]) * x[i]) / mean(&|x| u(x[i]));
                e[s * d + i] = m;
                e[(k + s) * d + i] = mean(&|x| u(x[i]) * (x[i] - m).powi(2)).sqrt();
            }
        }
        Emission::Poisson => (0..d).for_each(|i| e[s * d + i] = mean(&|x| x[i])),
        Emission::Categorical { symbols } => {
            (0..symbols as usize).for_each(|c| e[s * symbols as usize + c] = mean(&|x| f64::from(u8::from(x[0] as usize == c))))
        }
        Emission::Regression => {
            let r = d - 1;
            let mut a: Vec<Vec<f64>> = (0..r).map(|i| (0..r).map(|j| mean(&|x| x[1 + i] * x[1 + j])).chain([mean(&|x| x[1 + i] * x[0])]).collect()).collect();
            for i in 0..r {
                for row in 0..r {
                    if row != i {
                        let f = a[row][i] / a[i][i];
                        for c in 0..=r {
                            a[row][c] -= f * a[i][c];
                        }
                    }
                }
            }
            let beta: Vec<f64> = (0..r).map(|i| a[i][r] / a[i][i]).collect();
            e[k * r + s] = mean(&|x| (x[0] - beta.iter().zip(&x[1..]).map(|(b, x)| b * x).sum::<f64>()).powi(2));
            e[s * r..(s + 1) * r].copy_from_slice(&beta);
        }
    }
}

// ---- data -------------------------------------------------------------------------------------------------------------------

/// Sequences that switch between well-spread states, and starts a little beside the truth.
pub(crate) fn problem(seed: u32, emission: Emission, k: usize, width: usize, groups: usize, per_model: usize, restarts: usize, t: usize) -> Problem {
    let mut rng = Rng::new(seed);
    let n = groups * per_model;
    let lengths: Vec<u32> = (0..n).map(|i| if i % 3 == 1 { rng.whole(t as u32 / 2, t as u32) } else { t as u32 }).collect();
    let observed: Vec<bool> = (0..n * t).map(|_| rng.unit() > 0.1).collect();
    let spread = |s: usize| 1.5 * (s as f64 - 0.5 * (k as f64 - 1.0));
    let mut obs = Vec::with_capacity(n * t * width);
    for _ in 0..n {
        let mut state = 0;
        let mut last = 0.0;
        for _ in 0..t {
            if rng.unit() < 0.15 {
                state = rng.whole(0, k as u32) as usize;
            }
            let noise: Vec<f64> = (0..width).map(|_| rng.normal()).collect();
            match emission {
                Emission::LogProbabilities => obs.extend(noise.iter().enumerate().map(|(s, z)| (0.7 * z - if s == state { 0.5 } else { 2.0 }) as f32)),
                Emission::Poisson => obs.extend(noise.iter().map(|z| (2.0 + 4.0 * state as f64 + 1.5 * z).max(0.0).round() as f32)),
                Emission::Categorical { symbols } => {
                    let symbol = if rng.unit() < 0.6 { state as u32 % symbols } else { rng.whole(0, symbols) };
                    obs.push(symbol as f32);
                }
                Emission::Regression => {
                    let y = spread(state) * 0.3 + 0.4 * last + (0.5 + 0.2 * state as f64) * noise[0];
                    obs.extend([y as f32, 1.0]);
                    obs.extend((2..width).map(|i| if i == 2 { last as f32 } else { noise[i] as f32 }));
                    last = y;
                }
                _ => obs.extend(
                    noise.iter().enumerate().map(|(i, z)| (10.0 + spread(state) + 0.3 * i as f64 + (0.4 + 0.3 * state as f64) * z + 0.2 * noise[0]) as f32),
                ),
            }
        }
    }
    let start = (0..groups * restarts).map(|_| start_of(&mut rng, emission, k, width, &spread)).collect();
    Problem { emission, k, width, groups, per_model, restarts, t, obs, lengths, observed: Some(observed), start }
}

fn start_of(rng: &mut Rng, emission: Emission, k: usize, d: usize, spread: &dyn Fn(usize) -> f64) -> Vec<f64> {
    let exact = |x: f64| f64::from(x as f32);
    let mut theta: Vec<f64> = Vec::new();
    let row = |rng: &mut Rng, width: usize, favourite: usize| {
        let x: Vec<f64> = (0..width).map(|j| 0.3 + rng.unit() + if j == favourite { 2.0 } else { 0.0 }).collect();
        let total: f64 = x.iter().sum();
        x.into_iter().map(|x| x / total).collect::<Vec<f64>>()
    };
    theta.extend(row(rng, k, 0));
    (0..k).for_each(|i| theta.extend(row(rng, k, i)));
    let cell = |rng: &mut Rng, s: usize| 10.0 + spread(s) + 0.3 * rng.normal();
    match emission {
        Emission::LogProbabilities => {}
        Emission::GaussianDiagonal => {
            (0..k * d).for_each(|e| theta.push(exact(cell(rng, e / d))));
            (0..k * d).for_each(|_| theta.push(exact(0.5 + rng.unit())));
        }
        Emission::GaussianFull => {
            (0..k * d).for_each(|e| theta.push(exact(cell(rng, e / d))));
            for _ in 0..k {
                (0..d).for_each(|i| (0..=i).for_each(|j| theta.push(exact(if i == j { 1.0 + 0.3 * rng.unit() } else { 0.1 }))));
            }
        }
        Emission::StudentT => {
            (0..k * d).for_each(|e| theta.push(exact(cell(rng, e / d))));
            (0..k * d).for_each(|_| theta.push(exact(0.5 + 0.5 * rng.unit())));
            theta.extend(vec![4.0; k * d]);
            // log Γ(5/2) − log Γ(2) − ½·ln 4π
            theta.extend(vec![0.284_682_870_472_919_2 - 0.5 * (4.0 * std::f64::consts::PI).ln(); k * d]);
        }
        Emission::Poisson => (0..k * d).for_each(|e| theta.push(exact(2.0 + 3.5 * (e / d) as f64 + rng.unit()))),
        Emission::Categorical { symbols } => (0..k).for_each(|s| theta.extend(row(rng, symbols as usize, s))),
        Emission::Regression => {
            (0..k * (d - 1)).for_each(|e| theta.push(exact(if e % (d - 1) == 0 { 0.3 * spread(e / (d - 1)) } else { 0.2 + 0.1 * rng.normal() })));
            (0..k).for_each(|_| theta.push(exact(0.3 + 0.5 * rng.unit())));
        }
    }
    theta
}

fn problems() -> Vec<(&'static str, Problem)> {
    vec![
        ("diagonal K=1", problem(1, Emission::GaussianDiagonal, 1, 1, 2, 1, 1, 40)),
        ("diagonal K=2", problem(2, Emission::GaussianDiagonal, 2, 1, 3, 2, 2, 150)),
        ("diagonal K=3 D=2", problem(3, Emission::GaussianDiagonal, 3, 2, 2, 3, 1, 130)),
        ("diagonal K=4, 70 models", problem(4, Emission::GaussianDiagonal, 4, 1, 70, 1, 1, 200)),
        ("diagonal K=5", problem(5, Emission::GaussianDiagonal, 5, 1, 3, 1, 3, 120)),
        ("diagonal K=33", problem(6, Emission::GaussianDiagonal, 33, 1, 2, 1, 1, 90)),
        ("diagonal K=70", problem(7, Emission::GaussianDiagonal, 70, 1, 1, 2, 1, 60)),
        ("full K=2 D=3", problem(8, Emission::GaussianFull, 2, 3, 2, 2, 1, 160)),
        ("full K=6 D=2", problem(9, Emission::GaussianFull, 6, 2, 1, 3, 1, 150)),
        ("Student-t K=3 D=2", problem(10, Emission::StudentT, 3, 2, 2, 1, 2, 150)),
        ("Student-t K=7", problem(11, Emission::StudentT, 7, 1, 1, 2, 1, 150)),
        ("Poisson K=2 D=2", problem(12, Emission::Poisson, 2, 2, 2, 2, 1, 100)),
        ("Poisson K=5", problem(13, Emission::Poisson, 5, 1, 2, 1, 1, 140)),
        ("categorical K=3", problem(14, Emission::Categorical { symbols: 4 }, 3, 1, 2, 2, 2, 140)),
        ("categorical K=9", problem(15, Emission::Categorical { symbols: 12 }, 9, 1, 1, 2, 1, 140)),
        ("regression K=2 R=3", problem(16, Emission::Regression, 2, 4, 2, 2, 1, 200)),
        ("regression K=6 R=2", problem(17, Emission::Regression, 6, 3, 1, 2, 1, 200)),
        ("log-probabilities K=3", problem(18, Emission::LogProbabilities, 3, 3, 2, 2, 1, 100)),
        ("log-probabilities K=10", problem(19, Emission::LogProbabilities, 10, 10, 2, 1, 1, 100)),
    ]
}

/// Worst difference relative to the larger of the value and the typical size of its kind.
fn worst(got: &[f64], want: &[f64]) -> f64 {
    got.iter().zip(want).map(|(g, w)| if g.is_finite() { (g - w).abs() / w.abs().max(0.1) } else { f64::INFINITY }).fold(0.0, f64::max)
}

#[test]
fn every_emission_takes_the_textbook_steps() {
    let reference = open("reference").unwrap();
    let devices = open_all(&["cpu", "wgpu", "cuda-host", "cuda"]);
    for (name, p) in problems() {
        // Few steps for many states: some of them soon hold one observation, and then every rounding counts.
        let iterations = if p.k > 10 { 1 } else { 3 };
        let mut want = p.start.clone();
        let mut paths = vec![Vec::new(); want.len()];
        for step in 0..=iterations {
            for (m, theta) in want.iter_mut().enumerate() {
                let mut copy = theta.clone();
                let log_likelihood = textbook(&p, m / p.restarts, &mut copy);
                paths[m].push(log_likelihood);
                if step < iterations {
                    *theta = copy;
                }
            }
        }
        let ran = p.run(&reference, &p.settings(), iterations).unwrap();
        for m in 0..want.len() {
            // The start is rounded to f32, and so is what the rows of a start are divided by.
            assert!(worst(&ran.path[m], &paths[m]) < 2e-6, "{name}, model {m}: path {:?}, expected {:?}", ran.path[m], paths[m]);
            let off = worst(&ran.parameters[m], &want[m]);
            assert!(off < 2e-5, "{name}, model {m}: {off:e}\n{:?}\n{:?}", ran.parameters[m], want[m]);
        }
        for device in &devices {
            let got = p.run(device, &p.settings(), iterations).unwrap();
            let off = |m: usize| worst(&got.parameters[m], &ran.parameters[m]);
            eprintln!("{name}, {}: parameters within {:.1e}", device.info().kind.name(), (0..want.len()).map(off).fold(0.0, f64::max));
            for m in 0..want.len() {
                let (path, off) = (worst(&got.path[m], &ran.path[m]), worst(&got.parameters[m], &ran.parameters[m]));
                assert!(path < 1e-6 && off < 1e-4, "{name}, model {m}, {device:?}: path {path:e}, parameters {off:e}");
            }
        }
    }
}

// ---- what must hold whatever the numbers are --------------------------------------------------------------------------------

/// The same problem with models `from..to` alone.
fn part(p: &Problem, from: usize, to: usize) -> Problem {
    let n = from * p.per_model..to * p.per_model;
    let steps = n.start * p.t..n.end * p.t;
    Problem {
        groups: to - from,
        obs: p.obs[steps.start * p.width..steps.end * p.width].to_vec(),
        lengths: p.lengths[n].to_vec(),
        observed: p.observed.as_ref().map(|o| o[steps].to_vec()),
        start: p.start[from * p.restarts..to * p.restarts].to_vec(),
        ..p.clone()
    }
}

#[test]
fn a_split_batch_and_a_split_pass_change_no_bit() {
    for device in open_all(&DEVICES) {
        for k in [3, 6] {
            let p = problem(30 + k as u32, Emission::GaussianDiagonal, k, 1, 5, 2, 2, 90);
            let settings = Settings { tolerance: 0.5, ..p.settings() };
            let whole = p.run(&device, &settings, 12).unwrap();
            let mut split = Vec::new();
            for (from, to) in [(0, 1), (1, 4), (4, 5)] {
                split.extend(part(&p, from, to).run(&device, &settings, 12).unwrap().parameters);
            }
            assert_eq!(whole.parameters, split, "{device:?}, K = {k}");
            // The same iterations in three passes.
            let mut fit = BaumWelch::new(&device, &p.data(), &settings, &p.start(), &p.guards(), 12).unwrap();
            for iterations in [5, 4, 3] {
                let mut pass = device.pass("part");
                fit.record(&mut pass, iterations).unwrap();
                pass.submit().unwrap();
            }
            let mut pass = device.pass("rest");
            fit.finish(&mut pass).unwrap();
            let again = read(pass, &fit, 10).unwrap();
            assert_eq!(whole.parameters, again.parameters, "{device:?}, K = {k}");
            assert_eq!(whole.path, again.path, "{device:?}, K = {k}");
        }
    }
}

#[test]
fn schedules_and_checks_change_no_bit() {
    let p = problem(41, Emission::GaussianDiagonal, 5, 2, 3, 2, 1, 50);
    for spec in ["wgpu", "cuda-host"] {
        let runs: Vec<Ran> = variants(spec).iter().filter_map(|o| open_with(spec, o)).map(|d| p.run(&d, &p.settings(), 3).unwrap()).collect();
        assert!(runs.windows(2).all(|r| r[0].parameters == r[1].parameters), "{spec}");
    }
}

#[test]
fn stretches_of_time_join_up() {
    for (k, emission) in [(3, Emission::GaussianDiagonal), (6, Emission::StudentT)] {
        let p = problem(50 + k as u32, emission, k, 1, 2, 1, 1, 301);
        for spec in ["wgpu", "cuda-host", "cuda"] {
            let Some(device) = open(spec) else { continue };
            let whole = p.run(&device, &p.settings(), 3).unwrap();
            // Room for 300, 77 and one step a launch.
            for steps in [300, 77, 1] {
                let work = 2 * (200 + 4 * k * k) as u64 * steps;
                let device = open_with(spec, &OpenOptions { work_per_launch: Some(work), ..OpenOptions::default() }).unwrap();
                let cut = p.run(&device, &p.settings(), if steps == 1 { 1 } else { 3 }).unwrap();
                for m in 0..2 {
                    if steps > 1 {
                        assert!(worst(&cut.parameters[m], &whole.parameters[m]) < 2e-6, "{spec}, K = {k}, {steps} steps, model {m}");
                    }
                    assert!(worst(&cut.path[m], &whole.path[m]) < 2e-7, "{spec}, K = {k}, {steps} steps: {:?}, {:?}", cut.path[m], whole.path[m]);
                }
            }
        }
    }
}

#[test]
fn likelihood_never_falls_and_stopped_models_stand_still() {
    for device in open_all(&DEVICES) {
        for (name, p) in problems() {
            if p.k > 10 {
                continue;
            }
            let settings = Settings { tolerance: 0.05, ..p.settings() };
            let ran = p.run(&device, &settings, 40).unwrap();
            for (m, path) in ran.path.iter().enumerate() {
                let scale = path[0].abs();
                assert!(path.windows(2).all(|x| x[1] >= x[0] - 3e-6 * scale), "{name}, model {m}, {device:?}: {path:?}");
                assert!(matches!(ran.status[m], Status::Converged | Status::Running), "{name}, model {m}, {device:?}: {:?}", ran.status[m]);
                if ran.status[m] == Status::Converged {
                    let stop = path.windows(2).position(|x| x[1] - x[0] < 0.05).unwrap() + 1;
                    assert!(path[stop..].iter().all(|x| *x == path[stop]), "{name}, model {m}, {device:?}: {path:?}");
                }
            }
            if name == "diagonal K=2" {
                assert!(ran.status.contains(&Status::Converged), "{device:?}");
            }
        }
    }
}

#[test]
fn hard_zeros_stay_and_impossible_models_stop_alone() {
    for device in open_all(&DEVICES) {
        for k in [3, 5] {
            let mut p = problem(60, Emission::Categorical { symbols: 4 }, k, 1, 3, 1, 1, 80);
            p.observed = None;
            for theta in &mut p.start {
                // left to right
                theta[1..k].fill(0.0);
                (0..k).for_each(|i| theta[k + i * k..k + i * k + i].fill(0.0));
            }
            // No state of model 1 gives symbol 2.
            (0..k).for_each(|s| p.start[1][k + k * k + 4 * s + 2] = 0.0);
            let ran = p.run(&device, &p.settings(), 5).unwrap();
            assert_eq!(ran.status, [Status::Running, Status::Impossible, Status::Running], "{device:?}");
            for m in [0, 2] {
                let theta = &ran.parameters[m];
                assert!(theta.iter().all(|x| x.is_finite()) && theta[1..k].iter().all(|x| *x == 0.0), "{device:?}: {theta:?}");
                assert!((0..k).all(|i| (0..i).all(|j| theta[k + i * k + j] == 0.0)), "{device:?}: {theta:?}");
            }
        }
    }
}

#[test]
fn guards_hold() {
    for device in open_all(&DEVICES) {
        for emission in [Emission::GaussianDiagonal, Emission::GaussianFull, Emission::StudentT] {
            let p = problem(70, emission, 2, 2, 1, 2, 1, 120);
            let run = |settings: Settings, floor: f32| {
                let mut pass = device.pass("test");
                let guards = [floor, floor, 3.0, -4.0];
                let fit = hmm_baum_welch(&mut pass, &p.data(), &settings, &p.start(), &guards, 4).unwrap();
                read(pass, &fit, 1).unwrap().parameters.remove(0)
            };
            let plain = run(p.settings(), 1e-12);
            let floored = run(p.settings(), 50.0);
            let spread: Vec<f64> =
                if emission == Emission::GaussianFull { vec![floored[10], floored[12], floored[13], floored[15]] } else { floored[10..14].to_vec() };
            let least = if emission == Emission::StudentT { 50f64.sqrt() } else { 50.0 };
            assert!(spread.iter().all(|v| *v >= least * (1.0 - 1e-6)), "{device:?} {emission:?}: {spread:?}");
            let even = run(Settings { transition_prior: 1e6, init_prior: 1e6, ..p.settings() }, 1e-12);
            assert!(even[..6].iter().all(|x| (x - 0.5).abs() < 1e-3), "{device:?}: {even:?}");
            let sticky = run(Settings { sticky: 1e6, ..p.settings() }, 1e-12);
            assert!(sticky[2] > 0.999 && sticky[5] > 0.999, "{device:?}: {sticky:?}");
            let drawn = run(Settings { mean_weight: 1e7, ..p.settings() }, 1e-12);
            assert!((0..4).all(|e| (drawn[6 + e] - [3.0, -4.0][e % 2]).abs() < 0.01), "{device:?}: {drawn:?}");
            assert!((plain[6] - 3.0).abs() > 1.0, "{plain:?}");
        }
        // A state that explains nothing keeps what it had.
        let mut p = problem(71, Emission::GaussianDiagonal, 3, 1, 1, 1, 1, 100);
        p.start[0][12 + 2] = 1e6;
        let ran = p.run(&device, &p.settings(), 3).unwrap();
        assert_eq!(ran.parameters[0][14], 1e6, "{device:?}: {:?}", ran.parameters[0]);
        assert!(ran.parameters[0].iter().all(|x| x.is_finite()), "{device:?}");
    }
}

#[test]
fn permuted_states_give_permuted_results() {
    let device = open("reference").unwrap();
    let p = problem(80, Emission::GaussianDiagonal, 3, 1, 1, 2, 1, 100);
    let order = [2, 0, 1];
    let permuted = |x: &[f64]| -> Vec<f64> {
        let trans = order.iter().flat_map(|&i| order.map(|j| x[3 + 3 * i + j]));
        order.iter().map(|&i| x[i]).chain(trans).chain(order.iter().map(|&i| x[12 + i])).chain(order.iter().map(|&i| x[15 + i])).collect()
    };
    let q = Problem { start: vec![permuted(&p.start[0])], ..p.clone() };
    let (a, b) = (p.run(&device, &p.settings(), 5).unwrap(), q.run(&device, &q.settings(), 5).unwrap());
    assert!(worst(&permuted(&a.parameters[0]), &b.parameters[0]) < 1e-6);
}

// ---- the fit ------------------------------------------------------------------------------------------------------------------

/// Returns that are calm (deviation 0.5) or wild (2), staying 50 steps on average, and the true state.
fn regimes(seed: u32, t: usize) -> (Vec<f32>, Vec<usize>) {
    let mut rng = Rng::new(seed);
    let mut state = 0;
    (0..t)
        .map(|_| {
            if rng.unit() < 0.02 {
                state = 1 - state;
            }
            ((0.05 - 0.1 * state as f64 + [0.5, 2.0][state] * rng.normal()) as f32, state)
        })
        .unzip()
}

#[test]
fn fit_finds_the_regimes_and_how_many_there_are() {
    for device in open_all(&DEVICES) {
        let (n, t) = (3, 1200);
        let series: Vec<(Vec<f32>, Vec<usize>)> = (0..n).map(|i| regimes(90 + i as u32, t)).collect();
        let obs: Vec<f32> = series.iter().flat_map(|s| s.0.clone()).collect();
        let data = Observations::new(&obs, n, t, 1);
        let options = FitOptions { states: vec![1, 2, 3], restarts: 3, iterations: 100, ..FitOptions::default() };
        let fits = fit(&device, &data, &options).unwrap();
        assert_eq!(fits.len(), n);
        for (fit, (_, truth)) in fits.iter().zip(&series) {
            assert_eq!(fit.parameters.k, 2, "{device:?}: {:?}", fit.candidates);
            assert!(fit.converged && fit.iterations > 1 && fit.path.len() == fit.iterations + 1 && fit.restarts.len() == 3, "{device:?}");
            assert_eq!(fit.path[fit.iterations], fit.log_likelihood);
            assert!(fit.restarts.iter().all(|r| r.log_likelihood <= fit.log_likelihood));
            let fit = fit.reordered(&fit.parameters.by_volatility(0));
            let sd = fit.parameters.deviations(0);
            assert!((sd[0] - 0.5).abs() < 0.1 && (sd[1] - 2.0).abs() < 0.3, "{device:?}: {sd:?}");
            assert!(fit.parameters.durations().iter().all(|d| (15.0..250.0).contains(d)), "{device:?}: {:?}", fit.parameters.trans);
            let wild = truth.iter().filter(|s| **s == 1).count() as f64 / t as f64;
            assert!((fit.occupancy()[1] - wild).abs() < 0.05, "{device:?}: {:?}, {wild}", fit.occupancy());
            assert!((fit.weights.iter().sum::<f64>() - t as f64).abs() < 0.01);
        }
        let pooled = fit(&device, &data, &FitOptions { pooled: true, ..options.clone() }).unwrap();
        assert_eq!((pooled.len(), pooled[0].parameters.k, pooled[0].observations), (1, 2, n * t), "{device:?}: {:?}", pooled[0].candidates);
        assert!(pooled[0].log_likelihood <= fits.iter().map(|f| f.log_likelihood).sum::<f64>() + 1.0);
        // From where it ended it goes nowhere.
        let start = vec![fits[0].parameters.clone()];
        let again = fit(&device, &data.clone_first(), &FitOptions { states: vec![2], restarts: 1, start, ..options }).unwrap();
        assert!((again[0].log_likelihood - fits[0].log_likelihood).abs() < 0.02 && again[0].iterations <= 2, "{device:?}: {:?}", again[0].path);
    }
}

trait First<'a> {
    fn clone_first(&self) -> Observations<'a>;
}

impl<'a> First<'a> for Observations<'a> {
    fn clone_first(&self) -> Observations<'a> {
        Observations::new(&self.obs[..self.t * self.width], 1, self.t, self.width)
    }
}

/// Every path of a short sequence: its probability with the observations.
fn paths(p: &Problem, theta: &[f64]) -> Vec<f64> {
    let (k, t) = (p.k, p.t);
    (0..k.pow(t as u32))
        .map(|code| {
            let z = |s: usize| code / k.pow(s as u32) % k;
            let x = |s: usize| p.obs[s * p.width..(s + 1) * p.width].iter().map(|&x| f64::from(x)).collect::<Vec<f64>>();
            let chain: f64 = theta[z(0)].ln() + (1..t).map(|s| theta[k + k * z(s - 1) + z(s)].ln()).sum::<f64>();
            (chain + (0..t).map(|s| log_density(p, &theta[k + k * k..], &x(s), z(s))).sum::<f64>()).exp()
        })
        .collect()
}

#[test]
fn the_entropy_of_icl_is_that_of_all_paths() {
    let device = open("reference").unwrap();
    let emissions = [
        (Emission::GaussianDiagonal, 2),
        (Emission::GaussianFull, 2),
        (Emission::StudentT, 1),
        (Emission::Poisson, 1),
        (Emission::Categorical { symbols: 3 }, 1),
        (Emission::Regression, 3),
    ];
    for (emission, width) in emissions {
        let mut p = problem(100, emission, 2, width, 1, 1, 1, 9);
        (p.lengths, p.observed) = (vec![9], None);
        let options = FitOptions { emission, iterations: 2, restarts: 1, minimum_variance: 0.05, freedom: 4.0, ..FitOptions::default() };
        let fit = &fit(&device, &p.data(), &options).unwrap()[0];
        let natural = natural_of(&fit.parameters);
        let joint = paths(&p, &natural);
        let total: f64 = joint.iter().sum();
        let entropy: f64 = joint.iter().map(|j| j / total).filter(|p| *p > 0.0).map(|p| -p * p.ln()).sum();
        assert!((total.ln() - fit.log_likelihood).abs() < 1e-6, "{emission:?}: {}, {}", total.ln(), fit.log_likelihood);
        let got = 0.5 * (fit.criteria.icl.unwrap() - fit.criteria.bic);
        assert!((got - entropy).abs() < 1e-5, "{emission:?}: {got}, {entropy}");
        let free = fit.candidates[0].free as f64;
        assert!((fit.criteria.bic - (-2.0 * fit.log_likelihood + free * 9f64.ln())).abs() < 1e-9);
        assert!((fit.criteria.aic - (-2.0 * fit.log_likelihood + 2.0 * free)).abs() < 1e-9);
    }
}

fn natural_of(p: &Parameters) -> Vec<f64> {
    let d = p.d;
    let rest: Vec<f64> = match &p.emission {
        EmissionParameters::GaussianDiagonal { mean, variance } => [mean.clone(), variance.clone()].concat(),
        EmissionParameters::GaussianFull { mean, covariance } => {
            let triangle = covariance.chunks_exact(d * d).flat_map(|c| (0..d).flat_map(move |i| (0..=i).map(move |j| c[i * d + j])));
            mean.iter().copied().chain(triangle).collect()
        }
        EmissionParameters::StudentT { location, scale, freedom } => [location.clone(), scale.clone(), freedom.clone()].concat(),
        EmissionParameters::Poisson { rate } => rate.clone(),
        EmissionParameters::Categorical { probability } => probability.clone(),
        EmissionParameters::Regression { coefficients, variance } => [coefficients.clone(), variance.clone()].concat(),
        EmissionParameters::LogProbabilities => Vec::new(),
    };
    [p.init.clone(), p.trans.clone(), rest].concat()
}

#[test]
fn every_emission_fits_and_packs() {
    for device in open_all(&["cpu", "wgpu", "cuda-host"]) {
        for (name, p) in problems() {
            if p.k > 6 {
                continue;
            }
            let options =
                FitOptions { emission: p.emission, states: vec![1, p.k], criterion: Criterion::Icl, iterations: 24, restarts: 2, ..FitOptions::default() };
            let options = if p.emission == Emission::LogProbabilities { FitOptions { states: vec![p.k], ..options } } else { options };
            let fits = fit(&device, &p.data(), &options).unwrap();
            assert_eq!(fits.len(), p.groups * p.per_model, "{name}");
            for f in &fits {
                assert!(f.log_likelihood.is_finite() && f.status != Status::Fell && f.status != Status::Impossible, "{name}, {device:?}: {f:?}");
                let (model, log_trans) = f.parameters.pack().unwrap_or_else(|e| panic!("{name}, {device:?}: {e}"));
                assert!(model.iter().chain(&log_trans).all(|x| x.is_finite()), "{name}, {device:?}");
                assert!(f.restarts.iter().all(|r| r.log_likelihood.is_finite()), "{name}, {device:?}: {:?}", f.restarts);
            }
        }
    }
}

#[test]
fn bad_input_is_named() {
    let device = open("cpu").unwrap();
    let (series, _) = regimes(7, 60);
    let says = |data: &Observations<'_>, options: &FitOptions, words: &[&str]| {
        let error = fit(&device, data, options).expect_err("bad input").to_string();
        assert!(words.iter().all(|w| error.contains(w)), "{error}: {words:?} expected");
    };
    let options = FitOptions::default();
    let mut gap = [series.clone(), series.clone()].concat();
    gap[77] = f32::NAN;
    says(&Observations::new(&gap, 2, 60, 1), &options, &["sequence 1", "step 17", "NaN", "observed"]);
    let mut observed = vec![true; 120];
    observed[77] = false;
    let masked = Observations { observed: Some(&observed), ..Observations::new(&gap, 2, 60, 1) };
    assert!(fit(&device, &masked, &options).unwrap().iter().all(|f| f.log_likelihood.is_finite()));
    says(&Observations { lengths: Some(&[60, 61]), ..Observations::new(&gap, 2, 60, 1) }, &options, &["lengths", "61", "sequence 1"]);
    says(&Observations::new(&series[..3], 1, 3, 1), &FitOptions { states: vec![4], ..options.clone() }, &["4", "3 observed steps"]);
    says(&Observations::new(&[2.5; 40], 1, 40, 1), &options, &["column 0", "series 0", "constant", "2.5"]);
    says(&Observations::new(&series, 1, 60, 1), &FitOptions { states: vec![0], ..options.clone() }, &["states"]);
    says(&Observations::new(&series, 1, 60, 1), &FitOptions { states: vec![], ..options.clone() }, &["states"]);
    says(&Observations::new(&series, 1, 60, 1), &FitOptions { sticky: f64::NAN, ..options.clone() }, &["sticky"]);
    says(&Observations::new(&series, 2, 60, 1), &options, &["obs", "[2,60,1]"]);
    says(&Observations::new(&series, 1, 60, 1), &FitOptions { emission: Emission::Poisson, ..options.clone() }, &["step", "counts"]);
    let symbols = Emission::Categorical { symbols: 2 };
    says(&Observations::new(&[0.0, 1.0, 2.0], 1, 3, 1), &FitOptions { emission: symbols, states: vec![1], ..options.clone() }, &["step 2", "0 to 1"]);
    let zero = [0.0, -1.0, f32::NEG_INFINITY, f32::NEG_INFINITY, -1.0, -2.0];
    says(&Observations::new(&zero, 1, 3, 2), &FitOptions { emission: Emission::LogProbabilities, ..options }, &["sequence 0", "step 1", "impossible"]);
}

/// Reals that a step of a sequence takes on the device: what is observed and probabilities of states, never pairs of them.
#[test]
fn memory_grows_with_states_not_with_pairs() {
    for device in open_all(&["cpu", "wgpu", "cuda-host", "cuda"]) {
        for k in [3, 8] {
            let bytes = |t: usize| {
                let p = problem(61, Emission::GaussianDiagonal, k, 1, 1, 6, 1, t);
                let before = device.used_bytes();
                let mut pass = device.pass("memory");
                let fit = hmm_baum_welch(&mut pass, &p.data(), &p.settings(), &p.start(), &p.guards(), 2).unwrap();
                pass.submit().unwrap();
                let held = device.used_bytes() - before;
                drop(fit);
                assert_eq!(device.used_bytes(), before);
                held as f64
            };
            let per_step = (bytes(300) - bytes(100)) / (4.0 * 6.0 * 200.0);
            println!("K {k} on {}: {per_step:.2} reals a step and sequence", device.info().kind.name());
            // An observation, a word of the mask; γ, α and γ/predicted where K > 4, one of them else, none on the CPU.
            let states = if device.info().kind.name() == "cpu" { 0 } else { k * if k > 4 { 3 } else { 1 } };
            assert!((per_step - (2 + states) as f64).abs() < 0.2, "K {k} on {}: {per_step} reals", device.info().kind.name());

            let driven = |t: usize| {
                let small = Small::random(62, [6, t, k, 1], Emission::GaussianDiagonal, Trans::Softmax { u: 2, per_sequence: false }, 1);
                let hmm = small.upload(&device);
                let before = device.used_bytes();
                let mut pass = device.pass("memory");
                let out = hmm_forward_backward(&mut pass, &hmm, Wanted { posterior: true, pair: Pair::Sum, ..Wanted::default() }).unwrap();
                pass.submit().unwrap();
                let held = device.used_bytes() - before;
                drop(out);
                held as f64
            };
            let per_step = (driven(300) - driven(100)) / (4.0 * 6.0 * 200.0);
            println!("K {k}, input-driven, on {}: {per_step:.2} reals a step and sequence", device.info().kind.name());
            assert!((per_step - k as f64).abs() < 0.2, "K {k}, input-driven, on {}: {per_step} reals", device.info().kind.name());
        }
    }
}
