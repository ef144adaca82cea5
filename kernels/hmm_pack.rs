//! Packing of HMM parameters from natural ones, with every mistake named: model, state, dimension, value.
//!
//! A packed model is log_init [K] and the parameters of its [`Emission`](crate::hmm::Emission), f32; packing is done in f64. Tables of
//! probabilities become logarithms with −1e30 for zero.

use crate::hmm::{IMPOSSIBLE, LOG_ZERO};
use crate::{Error, Result};
use std::f64::consts::PI;

const OP: &str = "hmm";

fn wrong(name: String, value: f64, help: &str) -> Error {
    Error::Parameter { op: OP, name, value: value.to_string(), help: help.into() }
}

/// Number of models, states and observed numbers a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackShape {
    /// Models.
    pub models: usize,
    /// States.
    pub k: usize,
    /// Observed numbers a step.
    pub d: usize,
}

impl PackShape {
    fn len(&self, arg: &str, got: usize, each: usize) -> Result<()> {
        let expected = self.models * each;
        if got == expected && self.models > 0 && self.k > 0 {
            return Ok(());
        }
        let expected = format!("{expected} values: {} models of {each}", self.models);
        Err(Error::Shape { op: OP, arg: arg.into(), expected, got: format!("{got} values") })
    }

    /// `model 2, state 0, dimension 1` of entry i of [M,K,width].
    fn entry(&self, arg: &str, i: usize, width: usize) -> String {
        let (model, state, dimension) = (i / (self.k * width), i / width % self.k, i % width);
        format!("{arg} of model {model}, state {state}, dimension {dimension}")
    }

    fn all(&self, arg: &str, x: &[f64], width: usize, legal: fn(f64) -> bool, help: &str) -> Result<()> {
        self.len(arg, x.len(), self.k * width)?;
        match x.iter().position(|&v| !legal(v)) {
            Some(i) => Err(wrong(self.entry(arg, i, width), x[i], help)),
            None => Ok(()),
        }
    }

    /// Packs each model: log_init, then what `rest` pushes.
    fn pack(&self, log_init: &[f64], rest: impl Fn(usize, &mut Vec<f64>)) -> Result<Vec<f32>> {
        self.all("log_init", log_init, 1, |x| x <= 0.001, "give logarithms of probabilities, −1e30 for zero")?;
        check_log_rows("log_init", log_init, self.k)?;
        let mut out = Vec::new();
        for (m, init) in log_init.chunks_exact(self.k).enumerate() {
            let mut one: Vec<f64> = init.iter().map(|x| x.max(LOG_ZERO)).collect();
            rest(m, &mut one);
            out.extend(one.into_iter().map(|x| x as f32));
        }
        Ok(out)
    }
}

/// Rows of probabilities as logarithms; `rows` [N,K], each row must sum to one within 1e-4 and is normalised.
/// # Errors
/// `Parameter` naming the row and what is wrong with it.
pub fn log_probabilities(name: &str, rows: &[f64], k: usize) -> Result<Vec<f32>> {
    if k == 0 || !rows.len().is_multiple_of(k) {
        return Err(Error::Shape { op: OP, arg: name.into(), expected: format!("rows of {k}, at least one"), got: format!("{} values", rows.len()) });
    }
    let mut out = Vec::with_capacity(rows.len());
    for (r, row) in rows.chunks_exact(k).enumerate() {
        if let Some(j) = row.iter().position(|p| !(-1e-6..=1.0 + 1e-4).contains(p)) {
            return Err(wrong(format!("{name}, row {r}, column {j}"), row[j], "probabilities lie between 0 and 1"));
        }
        let sum: f64 = row.iter().map(|p| p.max(0.0)).sum();
        if (sum - 1.0).abs() > 1e-4 {
            return Err(wrong(format!("sum of {name}, row {r}"), sum, "each row of probabilities must sum to 1"));
        }
        out.extend(row.iter().map(|&p| if p > 0.0 { (p / sum).ln() as f32 } else { LOG_ZERO as f32 }));
    }
    Ok(out)
}

/// Checks that rows of logarithms [N,K] are probabilities that sum to one within 1e-3.
/// # Errors
/// `Parameter` naming the row.
pub fn check_log_rows(name: &str, rows: &[f64], k: usize) -> Result<()> {
    for (r, row) in rows.chunks_exact(k.max(1)).enumerate() {
        if let Some(j) = row.iter().position(|x| x.is_nan() || *x == f64::INFINITY) {
            return Err(wrong(format!("{name}, row {r}, column {j}"), row[j], "give logarithms of probabilities, −1e30 for zero"));
        }
        let sum: f64 = row.iter().filter(|&&x| x > IMPOSSIBLE).map(|x| x.exp()).sum();
        if (sum - 1.0).abs() > 1e-3 {
            return Err(wrong(format!("sum of {name}, row {r}"), sum, "each row of probabilities must sum to 1"));
        }
    }
    Ok(())
}

/// Models without parameters: the observations are log-probabilities. `log_init` [M,K].
pub fn pack_log_probabilities(shape: PackShape, log_init: &[f64]) -> Result<Vec<f32>> {
    shape.pack(log_init, |_, _| {})
}

/// Independent normals: `mean`, `variance` [M,K,D].
/// # Errors
/// `Parameter` for a mean that is not finite or a variance that is not positive.
pub fn pack_gaussian_diagonal(shape: PackShape, log_init: &[f64], mean: &[f64], variance: &[f64]) -> Result<Vec<f32>> {
    let PackShape { k, d, .. } = shape;
    shape.all("mean", mean, d, f64::is_finite, "give a finite number")?;
    shape.all("variance", variance, d, |v| v.is_finite() && v > 0.0, "give a positive variance; a constant series has none")?;
    shape.pack(log_init, |m, out| {
        let variance = &variance[m * k * d..(m + 1) * k * d];
        out.extend(&mean[m * k * d..(m + 1) * k * d]);
        out.extend(variance.iter().map(|v| 1.0 / v.sqrt()));
        out.extend(variance.chunks_exact(d).map(|v| -0.5 * v.iter().map(|v| (2.0 * PI * v).ln()).sum::<f64>()));
    })
}

/// Lower Cholesky factor of a symmetric matrix [D,D]; `Err(i)` where the leading block of size i + 1 is not positive definite.
pub fn cholesky(matrix: &[f64], d: usize) -> Result<Vec<f64>, usize> {
    let mut l = vec![0.0; d * d];
    for i in 0..d {
        for j in 0..=i {
            let dot: f64 = (0..j).map(|c| l[i * d + c] * l[j * d + c]).sum();
            let rest = matrix[i * d + j] - dot;
            if i == j {
                if !(rest.is_finite() && rest > 1e-14 * matrix[i * d + i].abs()) {
                    return Err(i);
                }
                l[i * d + i] = rest.sqrt();
            } else {
                l[i * d + j] = rest / l[j * d + j];
            }
        }
    }
    Ok(l)
}

/// Inverse of a lower triangular matrix [D,D], row by row without the zeros, and the sum of the logarithms of the factor's diagonal.
pub fn invert_lower(l: &[f64], d: usize) -> (Vec<f64>, f64) {
    let mut inverse = vec![0.0; d * d];
    for j in 0..d {
        inverse[j * d + j] = 1.0 / l[j * d + j];
        for i in j + 1..d {
            let dot: f64 = (j..i).map(|c| l[i * d + c] * inverse[c * d + j]).sum();
            inverse[i * d + j] = -dot / l[i * d + i];
        }
    }
    let packed = (0..d).flat_map(|i| (0..=i).map(move |j| (i, j))).map(|(i, j)| inverse[i * d + j]).collect();
    (packed, (0..d).map(|i| l[i * d + i].ln()).sum())
}

/// Normals: `mean` [M,K,D], `covariance` [M,K,D,D].
/// # Errors
/// `Parameter` for a covariance that is not symmetric or not positive definite, with model, state and dimension.
pub fn pack_gaussian_full(shape: PackShape, log_init: &[f64], mean: &[f64], covariance: &[f64]) -> Result<Vec<f32>> {
    let PackShape { k, d, .. } = shape;
    shape.all("mean", mean, d, f64::is_finite, "give a finite number")?;
    shape.all("covariance", covariance, d * d, f64::is_finite, "give a finite number")?;
    let mut factors = Vec::with_capacity(shape.models * k);
    for (s, matrix) in covariance.chunks_exact(d * d).enumerate() {
        let of = |i: usize| format!("covariance of model {}, state {}, dimension {i}", s / k, s % k);
        for (i, j) in (0..d).flat_map(|i| (0..i).map(move |j| (i, j))) {
            let (a, b) = (matrix[i * d + j], matrix[j * d + i]);
            if (a - b).abs() > 1e-5 * (matrix[i * d + i] * matrix[j * d + j]).abs().sqrt() {
                return Err(wrong(of(i), a, &format!("a covariance is symmetric: entry ({i},{j}) is not entry ({j},{i})")));
            }
        }
        let l = cholesky(matrix, d).map_err(|i| wrong(of(i), matrix[i * d + i], "the covariance is not positive definite; use fewer dimensions or a floor"))?;
        factors.push(invert_lower(&l, d));
    }
    shape.pack(log_init, |m, out| {
        let factors = &factors[m * k..(m + 1) * k];
        out.extend(&mean[m * k * d..(m + 1) * k * d]);
        factors.iter().for_each(|(inverse, _)| out.extend(inverse));
        out.extend(factors.iter().map(|(_, log_det)| -0.5 * d as f64 * (2.0 * PI).ln() - log_det));
    })
}

/// Independent Student-t: `location`, `scale`, `dof` [M,K,D].
/// # Errors
/// `Parameter` for a scale or dof that is not positive.
pub fn pack_student_t(shape: PackShape, log_init: &[f64], location: &[f64], scale: &[f64], dof: &[f64]) -> Result<Vec<f32>> {
    let PackShape { k, d, .. } = shape;
    shape.all("location", location, d, f64::is_finite, "give a finite number")?;
    shape.all("scale", scale, d, |v| v.is_finite() && v > 0.0, "give a positive scale")?;
    shape.all("dof", dof, d, |v| v.is_finite() && v > 0.0, "give positive degrees of freedom")?;
    shape.pack(log_init, |m, out| {
        let part = m * k * d..(m + 1) * k * d;
        let (scale, dof) = (&scale[part.clone()], &dof[part.clone()]);
        out.extend(&location[part]);
        out.extend(scale.iter().map(|s| 1.0 / s));
        out.extend(dof.iter().map(|v| 0.5 * (v + 1.0)));
        out.extend(dof.iter().map(|v| 1.0 / v));
        let constant = |(s, v): (&f64, &f64)| log_gamma(0.5 * (v + 1.0)) - log_gamma(0.5 * v) - 0.5 * (PI * v).ln() - s.ln();
        out.extend(scale.chunks_exact(d).zip(dof.chunks_exact(d)).map(|(s, v)| s.iter().zip(v).map(constant).sum::<f64>()));
    })
}

/// Independent counts: `rate` [M,K,D]. The rounding of ln λ to f32 goes into the constant, −λ + λ (ln λ − f32(ln λ)) per column:
/// left where it is, it would grow with every count.
/// # Errors
/// `Parameter` for a rate that is not positive.
pub fn pack_poisson(shape: PackShape, log_init: &[f64], rate: &[f64]) -> Result<Vec<f32>> {
    let PackShape { k, d, .. } = shape;
    shape.all("rate", rate, d, |v| v.is_finite() && v > 0.0, "give a positive rate")?;
    shape.pack(log_init, |m, out| {
        let rate = &rate[m * k * d..(m + 1) * k * d];
        out.extend(rate.iter().map(|v| v.ln()));
        let constant = |&v: &f64| v * (v.ln() - f64::from(v.ln() as f32)) - v;
        out.extend(rate.chunks_exact(d).map(|v| v.iter().map(constant).sum::<f64>()));
    })
}

/// Symbols: `probability` [M,K,symbols], rows sum to one; D is 1.
/// # Errors
/// `Parameter` for a row that does not sum to one.
pub fn pack_categorical(shape: PackShape, log_init: &[f64], probability: &[f64], symbols: usize) -> Result<Vec<f32>> {
    shape.len("probability", probability.len(), shape.k * symbols)?;
    let logs = log_probabilities("probability of symbols", probability, symbols)?;
    let each = shape.k * symbols;
    shape.pack(log_init, |m, out| out.extend(logs[m * each..(m + 1) * each].iter().map(|&x| f64::from(x))))
}

/// Regressions: `beta` [M,K,D−1], `variance` [M,K]; an observation is y, then the D − 1 regressors.
/// # Errors
/// `Parameter` for a coefficient that is not finite or a variance that is not positive.
pub fn pack_regression(shape: PackShape, log_init: &[f64], beta: &[f64], variance: &[f64]) -> Result<Vec<f32>> {
    let (k, r) = (shape.k, shape.d.saturating_sub(1));
    if r > 0 {
        shape.all("beta", beta, r, f64::is_finite, "give a finite number")?;
    }
    shape.all("variance", variance, 1, |v| v.is_finite() && v > 0.0, "give a positive variance; a constant series has none")?;
    shape.pack(log_init, |m, out| {
        let variance = &variance[m * k..(m + 1) * k];
        out.extend(&beta[m * k * r..(m + 1) * k * r]);
        out.extend(variance.iter().map(|v| 1.0 / v.sqrt()));
        out.extend(variance.iter().map(|v| -0.5 * (2.0 * PI * v).ln()));
    })
}

/// Words of a batch: lengths [B], and masks [B,T] if there are any, in the order that kernels read.
/// # Errors
/// `Parameter` naming the sequence whose length passes T; `Shape` for a mask of the wrong size.
pub fn pack_words(t: usize, lengths: &[u32], observed: Option<&[bool]>) -> Result<Vec<u32>> {
    if let Some(b) = lengths.iter().position(|&n| n as usize > t) {
        let help = format!("a length is at most the {t} steps of the batch");
        return Err(Error::Parameter { op: OP, name: format!("length of sequence {b}"), value: lengths[b].to_string(), help });
    }
    let Some(observed) = observed else { return Ok(lengths.to_vec()) };
    if observed.len() != lengths.len() * t {
        let expected = format!("[{},{t}]", lengths.len());
        return Err(Error::Shape { op: OP, arg: "mask".into(), expected, got: format!("{} values", observed.len()) });
    }
    let mut words = Vec::with_capacity(lengths.len() * (1 + t));
    for (b, &length) in lengths.iter().enumerate() {
        words.push(length);
        words.extend(observed[b * t..(b + 1) * t].iter().map(|&o| u32::from(o)));
    }
    Ok(words)
}

/// Checks that what counts of `obs` [B,T,width] is a number: inside the lengths, not masked. `integer` asks for counts or symbols ≥ 0.
/// # Errors
/// `Parameter` naming sequence, step and column.
pub fn check_observations(obs: &[f32], t: usize, width: usize, lengths: Option<&[u32]>, observed: Option<&[bool]>, integer: bool) -> Result<()> {
    let each = (t * width).max(1);
    for (b, sequence) in obs.chunks_exact(each).enumerate() {
        let length = lengths.map_or(t, |n| n[b] as usize).min(t);
        for (i, &x) in sequence[..length * width].iter().enumerate() {
            let step = i / width;
            if observed.is_some_and(|o| !o[b * t + step]) {
                continue;
            }
            let name = || format!("observation of sequence {b}, step {step}, column {}", i % width);
            if !x.is_finite() {
                return Err(wrong(name(), f64::from(x), "give a number, or mask the step as missing"));
            }
            if integer && (x < 0.0 || x.fract() != 0.0) {
                return Err(wrong(name(), f64::from(x), "counts and symbols are whole numbers from 0 on"));
            }
        }
    }
    Ok(())
}

/// log Γ(x) for x > 0.
pub fn log_gamma(x: f64) -> f64 {
    crate::hmm::log_factorial(x) - x.ln()
}
