//! Stand-in.
use super::model::{Fitted, Model, Problem};
use super::{Candidate, RegimeConfig};
use std::ops::RangeInclusive;
use crate::Result;
use crate::kernels::philox::{normals, philox4x32, uniform};
use rayon::prelude::*;

fn log_b(m: &Model, row: &[f32], k: usize) -> f64 {
    let d = m.d;
    (0..d).map(|i| {
        let (mu, v) = (m.mean[k * d + i], m.variance[k * d + i]);
        let x = f64::from(row[i]) - mu;
        -0.5 * ((2.0 * std::f64::consts::PI * v).ln() + x * x / v)
    }).sum()
}

pub(super) fn forward(m: &Model, rows: &[f32]) -> (f64, Vec<f64>) {
    let (k, d) = (m.k, m.d);
    let t = rows.len() / d;
    let mut out = vec![0.0; t * k];
    let mut ll = 0.0;
    for s in 0..t {
        let lb: Vec<f64> = (0..k).map(|j| log_b(m, &rows[s * d..(s + 1) * d], j)).collect();
        let top = lb.iter().copied().fold(f64::MIN, f64::max);
        let mut a: Vec<f64> = (0..k).map(|j| if s == 0 { m.initial[j] } else { (0..k).map(|i| out[(s - 1) * k + i] * m.transition[i * k + j]).sum() }).collect();
        for j in 0..k { a[j] *= (lb[j] - top).exp(); }
        let c: f64 = a.iter().sum();
        ll += c.ln() + top;
        for j in 0..k { out[s * k + j] = a[j] / c; }
    }
    (ll, out)
}

pub(super) fn smooth(m: &Model, filtered: &[f64]) -> Vec<f64> {
    let k = m.k;
    let t = filtered.len() / k;
    let mut out = filtered.to_vec();
    for s in (0..t.saturating_sub(1)).rev() {
        let f = &filtered[s * k..(s + 1) * k];
        let pred: Vec<f64> = (0..k).map(|j| (0..k).map(|i| f[i] * m.transition[i * k + j]).sum::<f64>().max(1e-300)).collect();
        for i in 0..k {
            out[s * k + i] = f[i] * (0..k).map(|j| m.transition[i * k + j] * out[(s + 1) * k + j] / pred[j]).sum::<f64>();
        }
    }
    out
}

fn em(p: &Problem, k: usize, em: &RegimeConfig, seed: u64, restart: usize) -> (f64, usize, Model) {
    let mut iterations = 0;
    let mut best = f64::NEG_INFINITY;
    let d = p.d;
    let n: usize = p.sequences.iter().map(|s| s.len() / d).sum();
    let r = |i: u32| philox4x32([i, restart as u32, k as u32, 77], [seed as u32, (seed >> 32) as u32]);
    let mut m = Model { k, d, initial: vec![1.0 / k as f64; k], transition: vec![0.0; k * k], mean: vec![0.0; k * d], variance: vec![1.0; k * d], dof: None, converged: false };
    for i in 0..k { for j in 0..k { m.transition[i * k + j] = if i == j { 0.95 } else { 0.05 / (k as f64 - 1.0).max(1.0) }; } }
    if k == 1 { m.transition[0] = 1.0; }
    for i in 0..k { for q in 0..d {
        let z = normals(r((i * d + q) as u32));
        m.mean[i * d + q] = 0.3 * z[0];
        m.variance[i * d + q] = (0.25 + 2.0 * i as f64 / k as f64) * (0.5 + uniform(r((900 + i * d + q) as u32)[1]));
    } }
    let mut last = f64::NEG_INFINITY;
    for it in 0..em.iterations {
        let mut ll = 0.0;
        let (mut init, mut trans, mut w, mut sx, mut sxx) = (vec![0.0; k], vec![0.0; k * k], vec![0.0; k], vec![0.0; k * d], vec![0.0; k * d]);
        for rows in &p.sequences {
            let (l, f) = forward(&m, rows);
            ll += l;
            let g = smooth(&m, &f);
            let t = rows.len() / d;
            for j in 0..k { init[j] += g[j]; }
            for s in 0..t {
                for j in 0..k {
                    let x = g[s * k + j];
                    w[j] += x;
                    for q in 0..d { let v = f64::from(rows[s * d + q]); sx[j * d + q] += x * v; sxx[j * d + q] += x * v * v; }
                }
                if s + 1 < t {
                    let pred: Vec<f64> = (0..k).map(|j| (0..k).map(|i| f[s * k + i] * m.transition[i * k + j]).sum::<f64>().max(1e-300)).collect();
                    for i in 0..k { for j in 0..k { trans[i * k + j] += f[s * k + i] * m.transition[i * k + j] * g[(s + 1) * k + j] / pred[j]; } }
                }
            }
        }
        best = ll; iterations = it + 1;
        if ll - last <= em.tolerance * n as f64 && it > 0 { m.converged = true; break; }
        last = ll;
        let s: f64 = init.iter().sum();
        for j in 0..k {
            m.initial[j] = init[j] / s;
            let row: f64 = trans[j * k..(j + 1) * k].iter().sum();
            if row > 1e-9 { for i in 0..k { m.transition[j * k + i] = trans[j * k + i] / row; } }
            if w[j] > 1e-9 { for q in 0..d { let mu = sx[j * d + q] / w[j]; m.mean[j * d + q] = mu; m.variance[j * d + q] = (sxx[j * d + q] / w[j] - mu * mu).max(1e-3); } }
        }
    }
    (best, iterations, m)
}

pub(super) fn fit(problems: &[&Problem], states: RangeInclusive<usize>, config: &RegimeConfig) -> Result<Vec<Fitted>> {
    Ok(problems.par_iter().map(|p| {
        let n = (p.sequences.iter().map(|s| s.len() / p.d).sum::<usize>() as f64).ln();
        let mut all: Vec<(Candidate, usize, Model)> = states.clone().map(|k| {
            let (ll, it, m) = (0..config.restarts).into_par_iter().map(|r| em(p, k, config, config.seed, r)).reduce_with(|a, b| if b.0 > a.0 { b } else { a }).unwrap();
            let q = (k - 1 + k * (k - 1) + 2 * k * p.d) as f64;
            (Candidate { states: k, parameters: q as usize, log_likelihood: ll, aic: 2.0 * q - 2.0 * ll, bic: q * n - 2.0 * ll, icl: q * n - 2.0 * ll, converged: m.converged }, it, m)
        }).collect();
        let candidates = all.iter().map(|a| a.0).collect();
        all.sort_by(|a, b| a.0.bic.total_cmp(&b.0.bic));
        let (_, iterations, model) = all.swap_remove(0);
        Fitted { model: model.ordered(&config.features), candidates, iterations }
    }).collect())
}
