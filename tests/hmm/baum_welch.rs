//! Baum-Welch against a textbook EM that stores everything, and the fit on top of it.

use crate::common::{DEVICES, Rng, open, open_all, open_with, variants};
use forback::kernels::hmm::Emission;
use forback::kernels::hmm_baum_welch::{BaumWelch, Observations, Settings, Status, hmm_baum_welch};
use forback::kernels::hmm_fit::{Criterion, EmissionParameters, FitOptions, Parameters, fit};
use forback::kernels::{Device, Error, OpenOptions};

const LOG_TAU: f64 = 1.837_877_066_409_345_3;

/// A problem: sequences of `groups` models of `per_model` each, natural starts.
#[derive(Clone)]
struct Problem {
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

    fn settings(&self) -> Settings {
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
    fn run(&self, device: &Device, settings: &Settings, iterations: u32) -> Result<Ran, Error> {
        let mut pass = device.pass("test");
        let fit = hmm_baum_welch(&mut pass, &self.data(), settings, &self.start(), &self.guards(), iterations)?;
        read(pass, &fit, self.groups * self.restarts)
    }
}

struct Ran {
    parameters: Vec<Vec<f64>>,
    path: Vec<Vec<f64>>,
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
fn problem(seed: u32, emission: Emission, k: usize, width: usize, groups: usize, per_model: usize, restarts: usize, t: usize) -> Problem {
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
    let mut row = |rng: &mut Rng, width: usize, favourite: usize| {
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
            theta.extend(vec![0.284_682_870_472_919_16 - 0.5 * (4.0 * std::f64::consts::PI).ln(); k * d]);
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
        ("diagonal K=4, 70 models", problem(4, Emission::GaussianDiagonal, 4, 1, 70, 1, 1, 65)),
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
        let iterations = 3;
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
            for m in 0..want.len() {
                let (path, off) = (worst(&got.path[m], &ran.path[m]), worst(&got.parameters[m], &ran.parameters[m]));
                eprintln!("{name}, model {m}, {}: path {path:.1e}, parameters {off:.1e}", device.info().kind.name());
                assert!(path < 2e-6 && off < 3e-3, "{name}, model {m}, {device:?}: path {path:e}, parameters {off:e}");
            }
        }
    }
}
