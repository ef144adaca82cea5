//! Hidden Markov models.
//!
//! hmm_posterior  B 4,096 sequences × T 1,000 steps × K 4 states: log-probabilities of the observations in, smoothed probabilities and
//!                log-likelihoods out. Inputs are on the device and results stay there but for the likelihoods; the buffers of the results
//!                are used again. What the transfers take is in the row beside it.
//! hmm_fit        N 1,024 series × T 1,000 steps × D 1 × K 3 states × 20 iterations of EM, a model for each series; upload of the series
//!                and of the starts, and download of the likelihoods, are part of it.
//! Data           normal observations around 1 with deviation 1; states at 0, 1, …, deviation 1, equally likely at first; a state is left
//!                for each other one with probability 0.02.

use super::{Cost, Prepared, Run, Workload};
use crate::kernels::hmm::{Emission, Hmm, PackShape, Pair, Transitions, Wanted, hmm_forward_backward, hmm_forward_backward_into};
use crate::kernels::hmm::{log_probabilities, pack_log_probabilities};
use crate::kernels::hmm_baum_welch::{BaumWelch, Observations, Settings};
use crate::kernels::philox::{normals, philox4x32};
use crate::kernels::{Pass, View};
use crate::{Device, Error, Result};
use serde_json::{Value, json};
use std::time::Instant;

pub(super) static WORKLOADS: [&dyn Workload; 2] = [&Posterior, &Fit];

const UNIT: &str = "sequence-steps";

struct Posterior;
struct Fit;

const B: usize = 4096;
const K: usize = 4;
const SERIES: usize = 1024;
const FITTED: usize = 3;
const T: usize = 1000;
const ITERATIONS: u32 = 20;

/// Observations [n].
fn observations(n: usize, seed: u64) -> Vec<f32> {
    let key = [seed as u32, (seed >> 32) as u32];
    (0..n.div_ceil(4) as u32).flat_map(|i| normals(philox4x32([i, 0, 0, 2 << 16], key))).take(n).map(|z| (1.0 + z) as f32).collect()
}

/// Transition matrix [k,k].
fn transitions(k: usize) -> Vec<f64> {
    (0..k * k).map(|i| if i % (k + 1) == 0 { 1.0 - 0.02 * (k - 1) as f64 } else { 0.02 }).collect()
}

fn finite(check: f64) -> Result<f64> {
    if check.is_finite() { Ok(check) } else { Err(Error::Internal(format!("the bench's results are not finite: {check}"))) }
}

fn pass(device: &Device, label: &str, profile: bool) -> Pass {
    let mut pass = device.pass(label);
    if profile {
        pass.profile();
    }
    pass
}

impl Workload for Posterior {
    fn name(&self) -> &'static str {
        "hmm_posterior"
    }

    fn shape(&self) -> Vec<usize> {
        vec![B, T, K]
    }

    fn unit(&self) -> &'static str {
        UNIT
    }

    fn prepare(&self, device: &Device, seed: u64) -> Result<Prepared> {
        let density = |x: f32, state: usize| -0.5 * (f64::from(x) - state as f64).powi(2) - 0.5 * (2.0 * std::f64::consts::PI).ln();
        let log_obs: Vec<f32> = observations(B * T, seed).into_iter().flat_map(|x| (0..K).map(move |state| density(x, state) as f32)).collect();
        let log_init = vec![(1.0 / K as f64).ln(); K];
        let model = pack_log_probabilities(PackShape { models: 1, k: K, d: 0 }, &log_init)?;
        let log_trans = log_probabilities("transitions", &transitions(K), K)?;
        let start = Instant::now();
        let obs = device.upload("log_obs", &log_obs)?;
        let upload = start.elapsed().as_secs_f64();
        let hmm = Hmm {
            b: B as u64,
            t: T as u64,
            k: K as u64,
            d: 0,
            emission: Emission::LogProbabilities,
            model: View::from(&device.upload("model", &model)?),
            per_sequence: false,
            transitions: Transitions::Table { log_trans: View::from(&device.upload("log_trans", &log_trans)?), per_sequence: false, per_step: false },
            obs: View::from(&obs),
            words: None,
            masked: false,
        };
        let wanted = Wanted { posterior: true, pair: Pair::None, ..Wanted::default() };
        let mut first = device.pass("hmm_posterior");
        let out = hmm_forward_backward(&mut first, &hmm, wanted)?;
        first.submit()?;
        let Some(posterior) = out.posterior.clone() else { return Err(Error::Internal("no posterior".into())) };
        let start = Instant::now();
        let mut pass_of_read = device.pass("download");
        let read = pass_of_read.read(&posterior)?;
        pass_of_read.submit()?.f64(read)?;
        let download = start.elapsed().as_secs_f64();
        let device = device.clone();
        let run = move |profile: bool| {
            let mut pass = pass(&device, "hmm_posterior", profile);
            hmm_forward_backward_into(&mut pass, &hmm, wanted, &out)?;
            let (likelihood, row) = (out.read(&mut pass)?, pass.read(posterior.part(0..(T * K) as u64))?);
            let mut done = pass.submit()?;
            let total: f64 = out.likelihoods(&mut done, likelihood)?.iter().map(|l| l.value).sum();
            let row: f64 = done.f64(row)?.iter().enumerate().map(|(i, p)| p * (i % 7) as f64).sum();
            Ok(Run { check: finite(total + row)?, profile: done.profile().to_vec() })
        };
        let work = (B * T) as f64;
        let k = K as f64;
        let cost = Cost { work, bytes: 8.0 * k * work, flops: (2.0 * k * k + 26.0 * k) * work };
        Ok(Prepared { cost, run: Box::new(run), says: vec![("upload_s", json!(upload)), ("download_s", json!(download))] })
    }
}

impl Workload for Fit {
    fn name(&self) -> &'static str {
        "hmm_fit"
    }

    fn shape(&self) -> Vec<usize> {
        vec![SERIES, T, FITTED]
    }

    fn unit(&self) -> &'static str {
        UNIT
    }

    fn says(&self) -> Vec<(&'static str, Value)> {
        vec![("iterations", ITERATIONS.into())]
    }

    fn prepare(&self, device: &Device, seed: u64) -> Result<Prepared> {
        let series = observations(SERIES * T, seed);
        // init, transitions, means, variances
        let mut one: Vec<f32> = vec![1.0 / FITTED as f32; FITTED];
        one.extend(transitions(FITTED).iter().map(|&p| p as f32));
        one.extend((0..FITTED).map(|state| state as f32));
        one.extend([1.0; FITTED]);
        let (start, guards) = (one.repeat(SERIES), [1e-6f32, 0.0].repeat(SERIES));
        let device = device.clone();
        let run = move |profile: bool| {
            let mut pass = pass(&device, "hmm_fit", profile);
            let data = Observations::new(&series, SERIES, T, 1);
            let mut fit = BaumWelch::new(&device, &data, &Settings::plain(Emission::GaussianDiagonal, FITTED, 1), &start, &guards, ITERATIONS)?;
            fit.record(&mut pass, ITERATIONS)?;
            let (path, parameters) = (pass.read(&fit.path)?, pass.read(&fit.parameters)?);
            let mut done = pass.submit()?;
            let path: f64 = done.f64(path)?.iter().sum();
            let parameters: f64 = done.f64(parameters)?.iter().enumerate().map(|(i, p)| p * (i % 7) as f64).sum();
            Ok(Run { check: finite(path + parameters)?, profile: done.profile().to_vec() })
        };
        let work = (SERIES * T) as f64 * f64::from(ITERATIONS);
        let k = FITTED as f64;
        Ok(Prepared { cost: Cost { work, bytes: 4.0 * work, flops: (3.0 * k * k + 28.0 * k) * work }, run: Box::new(run), says: Vec::new() })
    }
}
