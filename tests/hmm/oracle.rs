//! Small models in f64, written from the definitions: what devices are compared with.

#![allow(dead_code, reason = "each module uses a part")]

use crate::common::Rng;
use forback::kernels::hmm::{
    Emission, Hmm, PackShape, Transitions, log_gamma, pack_categorical, pack_gaussian_diagonal, pack_gaussian_full, pack_log_probabilities, pack_poisson,
    pack_regression, pack_student_t, pack_words,
};
use forback::kernels::{Device, View};

/// How the transitions of a [`Small`] batch vary.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Trans {
    Table { per_sequence: bool, per_step: bool },
    Softmax { u: usize, per_sequence: bool },
}

/// A batch with natural parameters in f64, all of them exact in f32.
#[derive(Debug, Clone)]
pub(crate) struct Small {
    pub(crate) b: usize,
    pub(crate) t: usize,
    pub(crate) k: usize,
    pub(crate) d: usize,
    pub(crate) emission: Emission,
    pub(crate) trans: Trans,
    /// log_init, then the emission's parameters as the gradient orders them, per model.
    pub(crate) theta: Vec<Vec<f64>>,
    /// log_trans tables or softmax weights.
    pub(crate) links: Vec<f64>,
    pub(crate) inputs: Vec<f64>,
    pub(crate) obs: Vec<f64>,
    pub(crate) lengths: Vec<u32>,
    pub(crate) observed: Option<Vec<bool>>,
}

/// Likelihood and posteriors of one sequence.
pub(crate) struct Truth {
    pub(crate) log_likelihood: f64,
    pub(crate) filtered: Vec<f64>,
    pub(crate) predicted: Vec<f64>,
    pub(crate) posterior: Vec<f64>,
    /// [T−1,K,K]
    pub(crate) pair: Vec<f64>,
}

fn exact(x: f64) -> f64 {
    f64::from(x as f32)
}

fn log_sum_exp(x: &[f64]) -> f64 {
    let most = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if most == f64::NEG_INFINITY { most } else { most + x.iter().map(|v| (v - most).exp()).sum::<f64>().ln() }
}

fn log_simplex(rng: &mut Rng, k: usize) -> Vec<f64> {
    let x: Vec<f64> = (0..k).map(|_| 0.2 + rng.unit()).collect();
    let sum: f64 = x.iter().sum();
    x.iter().map(|v| exact((v / sum).ln())).collect()
}

impl Small {
    /// A random batch. `models` is 1 or B.
    pub(crate) fn random(seed: u32, [b, t, k, d]: [usize; 4], emission: Emission, trans: Trans, models: usize) -> Small {
        let rng = &mut Rng::new(seed);
        let theta = (0..models).map(|_| parameters(rng, k, d, emission)).collect();
        let (links, u) = match trans {
            Trans::Table { per_sequence, per_step } => {
                let n = if per_sequence { b } else { 1 } * if per_step { (t - 1).max(1) } else { 1 };
                ((0..n * k).flat_map(|_| log_simplex(rng, k)).collect(), 0)
            }
            Trans::Softmax { u, per_sequence } => {
                let n = if per_sequence { b } else { 1 } * k * k * (u + 1);
                ((0..n).map(|_| exact(0.7 * rng.normal())).collect(), u)
            }
        };
        let width = if emission == Emission::LogProbabilities { k } else { d };
        let obs = (0..b * t * width)
            .map(|_| match emission {
                Emission::Poisson => f64::from(rng.whole(0, 9)),
                Emission::Categorical { symbols } => f64::from(rng.whole(0, symbols)),
                Emission::LogProbabilities => exact(-2.0 * rng.unit()),
                _ => exact(1.5 * rng.normal()),
            })
            .collect();
        let inputs = (0..b * t * u).map(|_| exact(rng.normal())).collect();
        Small { b, t, k, d, emission, trans, theta, links, inputs, obs, lengths: vec![t as u32; b], observed: None }
    }

    pub(crate) fn with_lengths(mut self, lengths: &[u32]) -> Small {
        self.lengths = lengths.to_vec();
        self
    }

    /// Masks about a quarter of the steps, the first among them, and puts NaN there.
    pub(crate) fn with_gaps(mut self, seed: u32) -> Small {
        let rng = &mut Rng::new(seed);
        let observed: Vec<bool> = (0..self.b * self.t).map(|i| i % self.t != 0 && rng.unit() > 0.25).collect();
        let width = self.obs.len() / observed.len();
        for (at, _) in observed.iter().enumerate().filter(|(_, seen)| !**seen) {
            self.obs[at * width..(at + 1) * width].fill(f64::NAN);
        }
        self.observed = Some(observed);
        self
    }

    fn theta_of(&self, b: usize) -> &[f64] {
        &self.theta[if self.theta.len() > 1 { b } else { 0 }]
    }

    /// log_trans of slot t of sequence b.
    pub(crate) fn log_trans(&self, b: usize, t: usize) -> Vec<f64> {
        let k = self.k;
        match self.trans {
            Trans::Table { per_sequence, per_step } => {
                let slots = if per_step { (self.t - 1).max(1) } else { 1 };
                let at = if per_sequence { b * slots } else { 0 } + if per_step { t } else { 0 };
                self.links[at * k * k..(at + 1) * k * k].iter().map(|&x| if x <= -1e29 { f64::NEG_INFINITY } else { x }).collect()
            }
            Trans::Softmax { u, per_sequence } => {
                let x = &self.inputs[(b * self.t + t + 1) * u..][..u];
                let weights = &self.links[if per_sequence { b * k * k * (u + 1) } else { 0 }..][..k * k * (u + 1)];
                let mut logits: Vec<f64> = weights.chunks_exact(u + 1).map(|w| w[u] + x.iter().zip(w).map(|(x, w)| x * w).sum::<f64>()).collect();
                for row in logits.chunks_exact_mut(k) {
                    let total = log_sum_exp(row);
                    row.iter_mut().for_each(|x| *x -= total);
                }
                logits
            }
        }
    }

    pub(crate) fn log_obs(&self, b: usize, t: usize) -> Vec<f64> {
        let (k, d) = (self.k, self.d);
        if self.observed.as_ref().is_some_and(|o| !o[b * self.t + t]) {
            return vec![0.0; k];
        }
        if self.emission == Emission::LogProbabilities {
            return self.obs[(b * self.t + t) * k..][..k].to_vec();
        }
        let x = &self.obs[(b * self.t + t) * d..][..d];
        let p = &self.theta_of(b)[k..];
        (0..k).map(|state| log_density(self.emission, p, x, k, state)).collect()
    }

    /// Forward-backward by the definitions.
    pub(crate) fn truth(&self, b: usize) -> Truth {
        let tables: Vec<Vec<f64>> = (1..self.t).map(|t| self.log_trans(b, t - 1)).collect();
        let log_obs: Vec<Vec<f64>> = (0..self.t).map(|t| self.log_obs(b, t)).collect();
        posteriors(&self.theta_of(b)[..self.k], &tables, &log_obs, self.lengths[b] as usize)
    }

    /// The batch on a device.
    pub(crate) fn upload(&self, device: &Device) -> Hmm {
        let (k, d) = (self.k, self.d);
        let shape = PackShape { models: 1, k, d };
        let model: Vec<f32> = self
            .theta
            .iter()
            .flat_map(|theta| {
                let (init, p) = theta.split_at(k);
                let kd = k * d;
                let exp = |x: &[f64]| x.iter().map(|v| v.exp()).collect::<Vec<f64>>();
                match self.emission {
                    Emission::LogProbabilities => pack_log_probabilities(shape, init),
                    Emission::GaussianDiagonal => pack_gaussian_diagonal(shape, init, &p[..kd], &exp(&p[kd..])),
                    Emission::GaussianFull => pack_gaussian_full(shape, init, &p[..kd], &covariances(&p[kd..], k, d)),
                    Emission::StudentT => pack_student_t(shape, init, &p[..kd], &exp(&p[kd..2 * kd]), &p[2 * kd..]),
                    Emission::Poisson => pack_poisson(shape, init, &exp(p)),
                    Emission::Categorical { symbols } => pack_categorical(shape, init, &exp(p), symbols as usize),
                    Emission::Regression => pack_regression(shape, init, &p[..k * (d - 1)], &exp(&p[k * (d - 1)..])),
                }
                .unwrap()
            })
            .collect();
        let view = |label: &str, data: &[f64]| {
            let data: Vec<f32> = data.iter().map(|&x| x as f32).collect();
            View::from(&device.upload(label, &data).unwrap())
        };
        let transitions = match self.trans {
            Trans::Table { per_sequence, per_step } => Transitions::Table { log_trans: view("log_trans", &self.links), per_sequence, per_step },
            Trans::Softmax { u, per_sequence } => {
                Transitions::Softmax { weights: view("weights", &self.links), inputs: view("inputs", &self.inputs), u: u as u64, per_sequence }
            }
        };
        let words = pack_words(self.t, &self.lengths, self.observed.as_deref()).unwrap();
        Hmm {
            b: self.b as u64,
            t: self.t as u64,
            k: k as u64,
            d: if self.emission == Emission::LogProbabilities { 0 } else { d as u64 },
            emission: self.emission,
            model: View::from(&device.upload("model", &model).unwrap()),
            per_sequence: self.theta.len() > 1,
            transitions,
            obs: view("obs", &self.obs),
            words: Some(View::from(&device.upload_u32("words", &words).unwrap())),
            masked: self.observed.is_some(),
        }
    }
}

/// Forward-backward of one sequence from logarithms.
pub(crate) fn posteriors(log_init: &[f64], tables: &[Vec<f64>], log_obs: &[Vec<f64>], length: usize) -> Truth {
    let (k, steps) = (log_init.len(), log_obs.len());
    let mut truth = Truth {
        log_likelihood: 0.0,
        filtered: vec![0.0; steps * k],
        predicted: vec![0.0; steps * k],
        posterior: vec![0.0; steps * k],
        pair: vec![0.0; steps.saturating_sub(1) * k * k],
    };
    if length == 0 {
        return truth;
    }
    let (mut alpha, mut beta) = (vec![vec![0.0; k]; length], vec![vec![0.0; k]; length]);
    for t in 0..length {
        for j in 0..k {
            let into = if t == 0 { log_init[j] } else { log_sum_exp(&(0..k).map(|i| alpha[t - 1][i] + tables[t - 1][i * k + j]).collect::<Vec<_>>()) };
            alpha[t][j] = into + log_obs[t][j];
            truth.predicted[t * k + j] = into;
        }
        let before = if t == 0 { 0.0 } else { log_sum_exp(&alpha[t - 1]) };
        let now = log_sum_exp(&alpha[t]);
        for j in 0..k {
            truth.predicted[t * k + j] = (truth.predicted[t * k + j] - before).exp();
            truth.filtered[t * k + j] = (alpha[t][j] - now).exp();
        }
    }
    for t in (0..length - 1).rev() {
        for i in 0..k {
            beta[t][i] = log_sum_exp(&(0..k).map(|j| tables[t][i * k + j] + log_obs[t + 1][j] + beta[t + 1][j]).collect::<Vec<_>>());
        }
    }
    let total = log_sum_exp(&alpha[length - 1]);
    truth.log_likelihood = total;
    for (t, j) in (0..length).flat_map(|t| (0..k).map(move |j| (t, j))) {
        truth.posterior[t * k + j] = (alpha[t][j] + beta[t][j] - total).exp();
        for i in (0..k).filter(|_| t + 1 < length) {
            truth.pair[(t * k + i) * k + j] = (alpha[t][i] + tables[t][i * k + j] + log_obs[t + 1][j] + beta[t + 1][j] - total).exp();
        }
    }
    truth
}

fn parameters(rng: &mut Rng, k: usize, d: usize, emission: Emission) -> Vec<f64> {
    let mut out = log_simplex(rng, k);
    let normals = |rng: &mut Rng, n: usize, scale: f64| -> Vec<f64> { (0..n).map(|_| exact(scale * rng.normal())).collect() };
    match emission {
        Emission::LogProbabilities => {}
        Emission::GaussianDiagonal => out.extend(normals(rng, 2 * k * d, 0.8)),
        Emission::GaussianFull => {
            out.extend(normals(rng, k * d, 1.0));
            for _ in 0..k {
                for (i, j) in (0..d).flat_map(|i| (0..=i).map(move |j| (i, j))) {
                    out.push(exact(if i == j { 0.5 + rng.unit() } else { 0.4 * rng.normal() }));
                }
            }
        }
        Emission::StudentT => {
            out.extend(normals(rng, 2 * k * d, 0.5));
            out.extend((0..k * d).map(|i| exact(if i == 0 { 25.0 } else { 1.5 + 6.0 * rng.unit() })));
        }
        Emission::Poisson => out.extend((0..k * d).map(|_| exact((1.0 + 6.0 * rng.unit()).ln()))),
        Emission::Categorical { symbols } => (0..k).for_each(|_| out.extend(log_simplex(rng, symbols as usize))),
        Emission::Regression => {
            out.extend(normals(rng, k * (d - 1), 0.7));
            out.extend(normals(rng, k, 0.4));
        }
    }
    out
}

/// Covariances from inverse Cholesky factors, by solving for the columns of the factor.
fn covariances(factors: &[f64], k: usize, d: usize) -> Vec<f64> {
    let size = d * (d + 1) / 2;
    let mut out = Vec::new();
    for state in 0..k {
        let at = |i: usize, j: usize| factors[state * size + i * (i + 1) / 2 + j];
        let mut l = vec![0.0; d * d];
        for (j, i) in (0..d).flat_map(|j| (j..d).map(move |i| (j, i))) {
            let rest: f64 = (j..i).map(|c| at(i, c) * l[c * d + j]).sum();
            l[i * d + j] = (f64::from(u8::from(i == j)) - rest) / at(i, i);
        }
        out.extend((0..d * d).map(|e| (0..d).map(|c| l[e / d * d + c] * l[e % d * d + c]).sum::<f64>()));
    }
    out
}

/// Log-density from the parameters that gradients are taken of.
fn log_density(emission: Emission, p: &[f64], x: &[f64], k: usize, state: usize) -> f64 {
    let d = x.len();
    let half_log = 0.5 * (2.0 * std::f64::consts::PI).ln();
    let at = |part: usize, i: usize| p[(part * k + state) * d + i];
    match emission {
        Emission::LogProbabilities => 0.0,
        Emission::GaussianDiagonal => (0..d).map(|i| -half_log - 0.5 * at(1, i) - 0.5 * (x[i] - at(0, i)).powi(2) * (-at(1, i)).exp()).sum(),
        Emission::GaussianFull => {
            let size = d * (d + 1) / 2;
            let factor = &p[k * d + state * size..];
            let row = |i: usize| (0..=i).map(|j| factor[i * (i + 1) / 2 + j] * (x[j] - at(0, j))).sum::<f64>();
            (0..d).map(|i| factor[i * (i + 3) / 2].abs().ln() - half_log - 0.5 * row(i).powi(2)).sum()
        }
        Emission::StudentT => (0..d)
            .map(|i| {
                let (dof, z) = (at(2, i), (x[i] - at(0, i)) * (-at(1, i)).exp());
                log_gamma(0.5 * (dof + 1.0))
                    - log_gamma(0.5 * dof)
                    - 0.5 * (dof * std::f64::consts::PI).ln()
                    - at(1, i)
                    - 0.5 * (dof + 1.0) * (z * z / dof).ln_1p()
            })
            .sum(),
        Emission::Poisson => (0..d).map(|i| x[i] * at(0, i) - at(0, i).exp() - log_gamma(x[i] + 1.0)).sum(),
        Emission::Categorical { symbols } => p[state * symbols as usize + x[0] as usize],
        Emission::Regression => {
            let r = d - 1;
            let residual = x[0] - (0..r).map(|i| p[state * r + i] * x[1 + i]).sum::<f64>();
            let log_variance = p[k * r + state];
            -half_log - 0.5 * log_variance - 0.5 * residual * residual * (-log_variance).exp()
        }
    }
}

/// Derivative of f at x along entry i, from central differences of two widths.
pub(crate) fn slope(mut f: impl FnMut(f64) -> f64) -> f64 {
    let mut wide = |h: f64| (f(h) - f(-h)) / (2.0 * h);
    let h = 2e-3;
    (4.0 * wide(0.5 * h) - wide(h)) / 3.0
}
