//! Neural kernels through the tape: a pass is recorded once, timed are its replays, inputs on the device and results complete.
//!
//! lstm, lstm_train            x [1,B,T,I], one layer of H units: forward; forward and backward to the weights.
//! attention, attention_train  q, k, v [B,NH,T,D], no mask: forward; forward and backward to q, k and v.
//! replay                      one such model of M 1, B 1, T 1, I 4, H 4: there is next to nothing to compute, so that a run shows what the host does for
//!                             a recorded step. host_us is that alone: on the CPU binding the buffers, on wgpu encoding, without submit and wait.
//!                             Floor 15 µs and the driver. Two cores, 16 launches: 1.9 µs on the CPU, 22 on wgpu with the driver's 8.
//! models_train                M 1,024 LSTM models with a linear head, B 8, T 32, I 8, H 16: squared error at the last step, backward, AdamW.
//! …_ragged    the same with sequences of 25 to 100 % of T, evenly spread and in no order; work counts valid steps (LSTM) or valid keys alone,
//!             so that a rate next to the dense one is the cost of a valid step. Queries of attention are not cut: all T of them see the keys.
//! Flops       counted the same for everybody: LSTM 2·B·T·4H·(I+H), attention 4·B·NH·T²·D; training 3× and 3.5×.

use super::{Cost, Prepared, Run, Workload};
use crate::kernels::loss::Criterion;
use crate::kernels::optimiser::{Optimiser, OptimiserArgs, optimiser_step};
use crate::kernels::philox::{normals, philox4x32};
use crate::kernels::{Buffer, Pass, Read, Replay, View};
use crate::nn::{Cell, Declared, Linear, Module, Parameters, Recurrent};
use crate::ops::{AttentionOptions, Layer, RecurrentOptions};
use crate::tape::{Tape, Var};
use crate::{Device, Error, Result};
use serde_json::{Value, json};
use std::time::Instant;

pub(super) static WORKLOADS: [&dyn Workload; 22] = [
    &Lstm { shape: [64, 63, 30, 64], train: false, ragged: false },
    &Lstm { shape: [512, 63, 30, 32], train: false, ragged: false },
    &Lstm { shape: [64, 252, 30, 128], train: false, ragged: false },
    &Lstm { shape: [64, 63, 30, 64], train: true, ragged: false },
    &Lstm { shape: [512, 63, 30, 32], train: true, ragged: false },
    &Lstm { shape: [64, 252, 30, 128], train: true, ragged: false },
    &Attention { shape: [64, 4, 63, 16], train: false, ragged: false },
    &Attention { shape: [16, 8, 512, 32], train: false, ragged: false },
    &Attention { shape: [4, 4, 2048, 16], train: false, ragged: false },
    &Attention { shape: [64, 4, 63, 16], train: true, ragged: false },
    &Attention { shape: [16, 8, 512, 32], train: true, ragged: false },
    &Attention { shape: [4, 4, 2048, 16], train: true, ragged: false },
    &Lstm { shape: [64, 63, 30, 64], train: false, ragged: true },
    &Lstm { shape: [512, 63, 30, 32], train: false, ragged: true },
    &Lstm { shape: [64, 63, 30, 64], train: true, ragged: true },
    &Lstm { shape: [512, 63, 30, 32], train: true, ragged: true },
    &Attention { shape: [64, 4, 63, 16], train: false, ragged: true },
    &Attention { shape: [16, 8, 512, 32], train: false, ragged: true },
    &Attention { shape: [64, 4, 63, 16], train: true, ragged: true },
    &Attention { shape: [16, 8, 512, 32], train: true, ragged: true },
    &Models { name: "models_train", shape: [1024, 8, 32, 8, 16] },
    &Models { name: "replay", shape: [1, 1, 1, 4, 4] },
];

struct Lstm {
    /// B, T, I, H.
    shape: [usize; 4],
    train: bool,
    ragged: bool,
}

struct Attention {
    /// B, NH, T, D.
    shape: [usize; 4],
    train: bool,
    ragged: bool,
}

struct Models {
    name: &'static str,
    /// M, B, T, I, H.
    shape: [usize; 5],
}

/// Microseconds of what the host does for a run besides kernels and driver, the least of many, and the launches that it is for.
fn host_time(replay: &Replay) -> Result<Vec<(&'static str, Value)>> {
    let mut least = f64::INFINITY;
    for _ in 0..2000 {
        let start = Instant::now();
        replay.rehearse()?;
        least = least.min(start.elapsed().as_secs_f64() * 1e6);
    }
    let launches = replay.launches();
    Ok(vec![("host_us", json!(least)), ("host_us_per_launch", json!(least / launches.max(1) as f64)), ("launches", json!(launches))])
}

/// Normals [n] times `scale`.
fn noise(n: usize, stream: u32, seed: u64, scale: f64) -> Vec<f32> {
    let key = [seed as u32, (seed >> 32) as u32];
    (0..n.div_ceil(4) as u32).flat_map(|i| normals(philox4x32([i, 0, stream, 3 << 16], key))).take(n).map(|z| (scale * z) as f32).collect()
}

fn leaf(tape: &mut Tape, shape: &[usize], stream: u32, seed: u64, scale: f64, variable: bool) -> Result<Var> {
    let buffer = tape.device().upload("leaf", &noise(shape.iter().product(), stream, seed, scale))?;
    if variable { tape.variable(&buffer, shape) } else { tape.input(&buffer, shape) }
}

/// Lengths [B] of 25 to 100 % of T, evenly spread and in no order, on the tape, and the share of steps that they leave.
fn lengths(tape: &mut Tape, batch: usize, time: usize) -> Result<(Var, f64)> {
    // A step that shares no factor with B visits every length once.
    let stride = (batch * 5 / 8..).find(|&s| s > 0 && (2..=s).all(|f| !s.is_multiple_of(f) || !batch.is_multiple_of(f))).unwrap_or(1);
    let quarter = time.div_ceil(4);
    let of = |b: usize| (quarter + (time - quarter) * (b * stride % batch) / (batch - 1).max(1)) as u32;
    let words: Vec<u32> = (0..batch).map(of).collect();
    let share = words.iter().map(|&n| f64::from(n)).sum::<f64>() / (batch * time) as f64;
    let buffer = tape.device().upload_u32("lengths", &words)?;
    Ok((tape.input(&buffer, &[batch])?, share))
}

/// Records a tape whose outputs start their backward sweep with ones, and what a run checks: parts of outputs and gradients.
fn record(device: &Device, mut tape: Tape, out: Var, leaves: &[Var], train: bool, cost: Cost) -> Result<Prepared> {
    if train {
        let shape = tape.shape(out).to_vec();
        let ones = device.upload("ones", &vec![1.0; shape.iter().product()])?;
        let ones = tape.input(&ones, &shape)?;
        tape.backward_with(out, ones)?;
    }
    let build = |profile: bool| -> Result<(Pass, Vec<Read>)> {
        let mut pass = device.pass("bench");
        if profile {
            pass.profile();
        }
        let plan = tape.record(&mut pass, &[out])?;
        let mut views = vec![plan.view(out)?];
        if train {
            views.extend(leaves.iter().map(|&x| plan.grad(x)).collect::<Result<Vec<_>>>()?);
        }
        let reads = views.iter().map(|view| pass.read(view.part(0..64))).collect::<Result<_>>()?;
        Ok((pass, reads))
    };
    let (plain, reads) = build(false)?;
    let (profiled, _) = build(true)?;
    let (plain, mut profiled) = (plain.prepare()?, Some(profiled));
    let run = move |profile: bool| {
        let mut done = match profiled.take().filter(|_| profile) {
            Some(pass) => pass.submit()?,
            None => plain.run()?,
        };
        let mut check = 0.0;
        for (k, &read) in reads.iter().enumerate() {
            check += done.f64(read)?.iter().enumerate().map(|(i, x)| x * ((i + k) % 7 + 1) as f64).sum::<f64>();
        }
        if !check.is_finite() {
            return Err(Error::Internal(format!("the bench's results are not finite: {check}")));
        }
        Ok(Run { check, profile: done.profile().to_vec() })
    };
    Ok(Prepared { cost, run: Box::new(run), says: Vec::new() })
}

impl Workload for Lstm {
    fn name(&self) -> &'static str {
        match (self.train, self.ragged) {
            (false, false) => "lstm",
            (false, true) => "lstm_ragged",
            (true, false) => "lstm_train",
            (true, true) => "lstm_train_ragged",
        }
    }

    fn shape(&self) -> Vec<usize> {
        self.shape.to_vec()
    }

    fn unit(&self) -> &'static str {
        "flops"
    }

    fn prepare(&self, device: &Device, seed: u64) -> Result<Prepared> {
        let [b, t, i, h] = self.shape;
        let mut tape = Tape::new(device);
        let scale = 1.0 / (h as f64).sqrt();
        let x = leaf(&mut tape, &[1, b, t, i], 0, seed, 1.0, false)?;
        let (w_ih, w_hh) = (leaf(&mut tape, &[1, 4 * h, i], 1, seed, scale, self.train)?, leaf(&mut tape, &[1, 4 * h, h], 2, seed, scale, self.train)?);
        let bias = leaf(&mut tape, &[1, 4 * h], 3, seed, scale, self.train)?;
        let layer = Layer { w_ih, w_hh, b_ih: Some(bias), b_hh: None, h0: None, c0: None };
        let (lengths, share) = if self.ragged { lengths(&mut tape, b, t).map(|(v, share)| (Some(v), share))? } else { (None, 1.0) };
        let y = tape.lstm(x, &[layer], RecurrentOptions { lengths, ..Default::default() })?.y;
        let forward = share * (2 * b * t * 4 * h * (i + h)) as f64;
        let values = share * (b * t * (i + h)) as f64;
        let (work, bytes) = if self.train { (3.0 * forward, 24.0 * values) } else { (forward, 4.0 * values) };
        record(device, tape, y, &[w_ih, w_hh, bias], self.train, Cost { work, bytes, flops: work / 2.0 })
    }
}

impl Workload for Attention {
    fn name(&self) -> &'static str {
        match (self.train, self.ragged) {
            (false, false) => "attention",
            (false, true) => "attention_ragged",
            (true, false) => "attention_train",
            (true, true) => "attention_train_ragged",
        }
    }

    fn shape(&self) -> Vec<usize> {
        self.shape.to_vec()
    }

    fn unit(&self) -> &'static str {
        "flops"
    }

    fn prepare(&self, device: &Device, seed: u64) -> Result<Prepared> {
        let [b, heads, t, d] = self.shape;
        let mut tape = Tape::new(device);
        let mut make = |stream: u32| leaf(&mut tape, &self.shape, stream, seed, 1.0, self.train);
        let (q, k, v) = (make(0)?, make(1)?, make(2)?);
        let (kv_len, share) = if self.ragged { lengths(&mut tape, b, t).map(|(v, share)| (Some(v), share))? } else { (None, 1.0) };
        let (out, _) = tape.attention(q, k, v, AttentionOptions { kv_len, ..Default::default() })?;
        let forward = 4.0 * share * (b * heads * t * t * d) as f64;
        let values = (b * heads * t * d) as f64;
        let (work, bytes) = if self.train { (3.5 * forward, 4.0 * 12.0 * values) } else { (forward, 4.0 * 4.0 * values) };
        record(device, tape, out, &[q, k, v], self.train, Cost { work, bytes, flops: work / 2.0 })
    }
}

impl Workload for Models {
    fn name(&self) -> &'static str {
        self.name
    }

    fn shape(&self) -> Vec<usize> {
        self.shape.to_vec()
    }

    fn unit(&self) -> &'static str {
        "model-steps"
    }

    fn prepare(&self, device: &Device, seed: u64) -> Result<Prepared> {
        let [m, b, t, i, h] = self.shape;
        let (lstm, head) = (Recurrent::new("lstm", Cell::Lstm, i, h), Linear::new("head", h, 1));
        let mut declared = Declared::new();
        lstm.declare(&mut declared);
        head.declare(&mut declared);
        let parameters = Parameters::new(device, m, &declared, seed)?;
        let mut tape = Tape::new(device);
        let (x, y) = (leaf(&mut tape, &[1, b, t, i], 0, seed, 1.0, false)?, leaf(&mut tape, &[1, b, 1], 1, seed, 1.0, false)?);
        let states = lstm.forward(&mut tape, &parameters, x, RecurrentOptions::default())?;
        let last = tape.slice(states, 2, t - 1..t)?;
        let last = tape.reshape(last, &[m, b, h])?;
        let prediction = head.forward(&mut tape, &parameters, last)?;
        let loss = tape.loss(Criterion::Mse, prediction, y, None, None)?;
        tape.backward(loss)?;
        let size = parameters.values().len();
        let zeros = |label: &str, n: u64| device.zeros(label, n);
        let (moment1, moment2, norm) = (zeros("moment1", size)?, zeros("moment2", size)?, zeros("norm", m as u64)?);
        let counters = device.zeros_u32("counters", 3 * m as u64)?;
        // A rate of 0 does all of the work and leaves the parameters as they are: every run can be compared with the first.
        let rate = zeros("rate", m as u64)?;
        let op = Optimiser { tensors: parameters.segments(), ..Optimiser::adamw(m as u64, 0, 1e-3) };
        let table = device.upload_u32("blocks", &op.table())?;
        let scratch = zeros("optimiser", op.scratch())?;
        let build = |profile: bool| -> Result<(Pass, Read)> {
            let mut pass = device.pass("step");
            if profile {
                pass.profile();
            }
            let plan = tape.record(&mut pass, &[loss])?;
            let view = |b: &Buffer| View::from(b);
            let args = OptimiserArgs {
                table: &view(&table),
                grads: &view(parameters.grads()),
                rate: &view(&rate),
                loss: Some(&plan.view(loss)?),
                decay: None,
                hyper: None,
                parameters: &view(parameters.values()),
                moment1: Some(&view(&moment1)),
                moment2: Some(&view(&moment2)),
                average: None,
                counters: &view(&counters),
                norm: &view(&norm),
                scratch: &view(&scratch),
            };
            optimiser_step(&mut pass, &op, &args)?;
            let read = pass.read(plan.view(loss)?)?;
            Ok((pass, read))
        };
        let (plain, read) = build(false)?;
        let (profiled, _) = build(true)?;
        let (plain, mut profiled) = (plain.prepare()?, Some(profiled));
        let says = host_time(&plain)?;
        let run = move |profile: bool| {
            let mut done = match profiled.take().filter(|_| profile) {
                Some(pass) => pass.submit()?,
                None => plain.run()?,
            };
            let check: f64 = done.f64(read)?.iter().sum();
            if !check.is_finite() {
                return Err(Error::Internal(format!("the bench's results are not finite: {check}")));
            }
            Ok(Run { check, profile: done.profile().to_vec() })
        };
        let flops = 3.0 * (m * 2 * b * t * 4 * h * (i + h)) as f64;
        let cost = Cost { work: m as f64, bytes: 32.0 * size as f64 + 24.0 * (m * b * t * h) as f64, flops: flops / 2.0 };
        Ok(Prepared { cost, run: Box::new(run), says })
    }
}
