//! `hmm_viterbi`.

use crate::common::{DEVICES, Rng, open, open_with, variants};
use forback::kernels::hmm::{Emission, Hmm, LOG_ZERO, Transitions, pack_words};
use forback::kernels::hmm_viterbi::{NONE, hmm_viterbi, hmm_viterbi_within, log_prob};
use forback::kernels::{Device, OpenOptions, View};

/// How transitions are given.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    Shared,
    PerSequence,
    PerStep,
    Softmax,
}

/// A batch on the host, of logarithms that are whole numbers (ties everywhere, sums exact in f32) or reals.
#[derive(Debug, Clone)]
struct Batch {
    b: usize,
    t: usize,
    k: usize,
    u: usize,
    kind: Kind,
    log_init: Vec<f32>,
    log_trans: Vec<f32>,
    inputs: Vec<f32>,
    log_obs: Vec<f32>,
    lengths: Vec<u32>,
    observed: Option<Vec<bool>>,
}

impl Batch {
    fn random(rng: &mut Rng, [b, t, k]: [usize; 3], kind: Kind, whole: bool) -> Batch {
        let mut draw = |n: usize, zeros: f64| -> Vec<f32> {
            let one = |rng: &mut Rng| {
                if rng.unit() < zeros {
                    LOG_ZERO as f32
                } else if whole {
                    -f64::from(rng.whole(0, 3)) as f32
                } else {
                    (-3.0 * rng.unit()) as f32
                }
            };
            (0..n).map(|_| one(rng)).collect()
        };
        let u = 2;
        let models = if kind == Kind::PerSequence { b } else { 1 };
        let log_init = draw(models * k, 0.0);
        let log_trans = match kind {
            Kind::Shared => draw(k * k, 0.15),
            Kind::PerSequence => draw(b * k * k, 0.15),
            Kind::PerStep => draw(b * (t - 1).max(1) * k * k, 0.15),
            Kind::Softmax => draw(k * k * (u + 1), 0.0),
        };
        let inputs = if kind == Kind::Softmax { draw(b * t * u, 0.0) } else { Vec::new() };
        let log_obs = draw(b * t * k, 0.0);
        let lengths = (0..b).map(|i| if i == 0 { t as u32 } else { rng.whole(0, t as u32 + 1) }).collect();
        let observed = (rng.unit() < 0.5).then(|| (0..b * t).map(|_| rng.unit() < 0.8).collect());
        Batch { b, t, k, u, kind, log_init, log_trans, inputs, log_obs, lengths, observed }
    }

    fn hmm(&self, device: &Device) -> Hmm {
        let real = |x: &[f32]| View::from(&device.upload("real", x).unwrap());
        let per_sequence = self.kind == Kind::PerSequence;
        let transitions = match self.kind {
            Kind::Softmax => Transitions::Softmax { weights: real(&self.log_trans), inputs: real(&self.inputs), u: self.u as u64, per_sequence },
            _ => Transitions::Table {
                log_trans: real(&self.log_trans),
                per_sequence: per_sequence || self.kind == Kind::PerStep,
                per_step: self.kind == Kind::PerStep,
            },
        };
        Hmm {
            b: self.b as u64,
            t: self.t as u64,
            k: self.k as u64,
            d: 0,
            emission: Emission::LogProbabilities,
            model: real(&self.log_init),
            per_sequence,
            transitions,
            obs: real(&self.log_obs),
            words: Some(View::from(&device.upload_u32("words", &pack_words(self.t, &self.lengths, self.observed.as_deref()).unwrap()).unwrap())),
            masked: self.observed.is_some(),
        }
    }

    /// log p(state j at t | state i at t − 1).
    fn trans(&self, b: usize, t: usize, i: usize, j: usize) -> f64 {
        let k = self.k;
        let at = match self.kind {
            Kind::Shared => 0,
            Kind::PerSequence => b,
            Kind::PerStep => b * (self.t - 1).max(1) + t - 1,
            Kind::Softmax => {
                let logit = |j: usize| {
                    let w = &self.log_trans[(i * k + j) * (self.u + 1)..];
                    let input = &self.inputs[(b * self.t + t) * self.u..];
                    (0..self.u).map(|c| f64::from(w[c]) * f64::from(input[c])).sum::<f64>() + f64::from(w[self.u])
                };
                return logit(j) - (0..k).map(|j| logit(j).exp()).sum::<f64>().ln();
            }
        };
        f64::from(self.log_trans[(at * k + i) * k + j])
    }

    fn init(&self, b: usize, j: usize) -> f64 {
        f64::from(self.log_init[if self.kind == Kind::PerSequence { b * self.k } else { 0 } + j])
    }

    fn obs(&self, b: usize, t: usize, j: usize) -> f64 {
        let seen = self.observed.as_ref().is_none_or(|o| o[b * self.t + t]);
        if seen { f64::from(self.log_obs[(b * self.t + t) * self.k + j]) } else { 0.0 }
    }

    /// Log-probability of a path together with the observations.
    fn score(&self, b: usize, path: &[u32]) -> f64 {
        let mut sum = 0.0;
        for (t, &j) in path.iter().enumerate() {
            let into = if t == 0 { self.init(b, j as usize) } else { self.trans(b, t, path[t - 1] as usize, j as usize) };
            sum += into + self.obs(b, t, j as usize);
        }
        sum
    }

    /// Best path by the definition, in f64, the lowest index on ties; None where no path is possible.
    fn best(&self, b: usize) -> (Vec<u32>, Option<f64>) {
        let (k, length) = (self.k, self.lengths[b] as usize);
        let mut path = vec![0; self.t];
        if length == 0 {
            return (path, Some(0.0));
        }
        let mut delta: Vec<f64> = (0..k).map(|j| self.init(b, j) + self.obs(b, 0, j)).collect();
        let mut back = vec![vec![0; k]];
        for t in 1..length {
            let best = |j: usize| {
                (0..k).fold((f64::NEG_INFINITY, 0), |best, i| {
                    let x = delta[i] + self.trans(b, t, i, j);
                    if x > best.0 { (x, i) } else { best }
                })
            };
            let next: Vec<(f64, usize)> = (0..k).map(best).collect();
            delta = next.iter().enumerate().map(|(j, x)| x.0 + self.obs(b, t, j)).collect();
            back.push(next.iter().map(|x| x.1).collect());
        }
        let end = (0..k).fold(0, |best, j| if delta[j] > delta[best] { j } else { best });
        if delta[end] <= -1e29 {
            return (path, None);
        }
        let mut state = end;
        for t in (0..length).rev() {
            path[t] = state as u32;
            state = back[t][state];
        }
        (path, Some(delta[end]))
    }
}

/// path, log_prob, failed.
type Found = (Vec<u32>, Vec<f64>, Vec<u32>);

fn run(device: &Device, batch: &Batch, bytes: Option<u64>) -> Found {
    let hmm = batch.hmm(device);
    let mut pass = device.pass("viterbi");
    let out = match bytes {
        Some(bytes) => hmm_viterbi_within(&mut pass, &hmm, bytes).unwrap(),
        None => hmm_viterbi(&mut pass, &hmm).unwrap(),
    };
    let reads = (pass.read(&out.path).unwrap(), pass.read(&out.log_prob).unwrap(), pass.read(&out.failed).unwrap());
    let mut done = pass.submit().unwrap();
    (done.u32(reads.0).unwrap(), log_prob(&done.f64(reads.1).unwrap()), done.u32(reads.2).unwrap())
}

fn devices() -> Vec<(String, Device)> {
    let named = |spec: &&str| {
        let name = spec.to_string();
        variants(spec)
            .into_iter()
            .filter_map(move |o| open_with(&name, &o).map(|d| (format!("{name} {:?} {:?}", o.checked, o.schedule), d)))
            .collect::<Vec<_>>()
    };
    DEVICES.iter().flat_map(named).collect()
}

/// Every path of tiny models.
#[test]
fn the_best_of_all_paths() {
    let rng = &mut Rng::new(1);
    for device in [open("reference").unwrap(), open("cpu").unwrap()] {
        for kind in [Kind::Shared, Kind::PerSequence, Kind::PerStep, Kind::Softmax] {
            for [t, k] in [[1, 3], [2, 2], [5, 3], [4, 5], [7, 2], [6, 1]] {
                let batch = Batch::random(rng, [3, t, k], kind, false);
                let (path, value, failed) = run(&device, &batch, None);
                for b in 0..batch.b {
                    let length = batch.lengths[b] as usize;
                    let all = (0..k.pow(length as u32)).map(|n| (0..length).map(|c| (n / k.pow(c as u32) % k) as u32).collect::<Vec<_>>());
                    let best = all.map(|p| batch.score(b, &p)).fold(f64::NEG_INFINITY, f64::max);
                    if best <= -1e29 {
                        assert!(value[b] == f64::NEG_INFINITY && failed[b] < length as u32, "{kind:?} [{t},{k}], {b}");
                        continue;
                    }
                    let own = batch.score(b, &path[b * t..b * t + length]);
                    assert!((own - best).abs() < 1e-5 && (value[b] - best).abs() < 1e-5 && failed[b] == NONE, "{kind:?} [{t},{k}]: {own} {} {best}", value[b]);
                    assert!(path[b * t + length..(b + 1) * t].iter().all(|&s| s == 0), "padding");
                }
            }
        }
    }
}

/// Whole numbers: every device must give the path of the definition, the lowest index on every tie.
#[test]
fn ties_go_to_the_lowest_index_on_every_device() {
    for (name, device) in devices() {
        let rng = &mut Rng::new(2);
        for (n, k) in [1, 2, 3, 4, 5, 8, 9, 13, 16, 17, 31, 33, 64, 65, 127, 130, 257, 300].into_iter().enumerate() {
            let kind = [Kind::Shared, Kind::PerSequence, Kind::PerStep][n % 3];
            let slow = name.starts_with("cuda-host") && k > 32;
            let batch = Batch::random(rng, if slow { [2, 9, k] } else { [7, 33, k] }, kind, true);
            let (path, value, _) = run(&device, &batch, None);
            for b in 0..batch.b {
                let (want, best) = batch.best(b);
                let t = batch.t;
                match best {
                    Some(best) => {
                        assert_eq!(&path[b * t..(b + 1) * t], want, "{name}: K = {k}, {kind:?}, sequence {b}");
                        assert_eq!(value[b], best, "{name}: K = {k}, {kind:?}, sequence {b}");
                    }
                    None => assert_eq!(value[b], f64::NEG_INFINITY, "{name}: K = {k}, {kind:?}, sequence {b}"),
                }
            }
        }
    }
}

/// Additions and comparisons alone: reals give the same bits on every f32 device, and a path as good as the reference's.
#[test]
fn f32_devices_agree_bit_for_bit() {
    for kind in [Kind::Shared, Kind::PerSequence, Kind::PerStep, Kind::Softmax] {
        for [b, t, k] in [[1, 1, 4], [33, 50, 3], [65, 21, 4], [9, 40, 6], [5, 30, 16], [3, 17, 40]] {
            let batch = Batch::random(&mut Rng::new(k as u32), [b, t, k], kind, false);
            let truth = run(&open("reference").unwrap(), &batch, None);
            let cpu = run(&open("cpu").unwrap(), &batch, None);
            for (name, device) in devices().into_iter().skip(1) {
                if name.starts_with("cuda-host") && b * k > 200 {
                    continue;
                }
                let found = run(&device, &batch, None);
                if kind != Kind::Softmax {
                    assert!(found.0 == cpu.0 && found.2 == cpu.2, "{name}: {kind:?} [{b},{t},{k}]: paths");
                    assert_eq!(found.1, cpu.1, "{name}: {kind:?} [{b},{t},{k}]");
                }
                for i in 0..b {
                    let score = batch.score(i, &found.0[i * t..i * t + batch.lengths[i] as usize]);
                    let close = |x: f64| (x - truth.1[i]).abs() <= 2e-6 * (1.0 + x.abs());
                    assert!(truth.1[i] == found.1[i] || (close(score) && close(found.1[i])), "{name}: {kind:?} [{b},{t},{k}] {i}: {score} {}", found.1[i]);
                }
            }
        }
    }
}

/// However memory, time and batch are cut.
#[test]
fn cuts_change_no_bit() {
    for spec in ["cpu", "wgpu", "cuda-host"] {
        let Some(device) = open(spec) else { continue };
        for [b, t, k] in [[5, 103, 3], [4, 61, 7], [2, 40, 20], [2, 13, 260]] {
            let batch = Batch::random(&mut Rng::new(7), [b, t, k], Kind::PerStep, false);
            let whole = run(&device, &batch, None);
            assert_eq!(run(&device, &batch, Some(4)), whole, "{spec} [{b},{t},{k}]: pointers of a few steps at once");
            let largest = 4 * t * k * k;
            let split = OpenOptions { binding_bytes: Some(largest as u64), ..OpenOptions::default() };
            let Some(small) = open_with(spec, &split) else { continue };
            assert_eq!(run(&small, &batch, None), whole, "{spec} [{b},{t},{k}]: a sequence at a time");
        }
    }
}

/// Series longer than the loops of a software adapter.
#[test]
fn long_series() {
    for [t, k] in [[100_000, 2], [9_000, 6]] {
        let mut batch = Batch::random(&mut Rng::new(11), [1, t, k], Kind::Shared, false);
        batch.log_trans.iter_mut().for_each(|x| *x = x.max(-5.0));
        let truth = run(&open("reference").unwrap(), &batch, None);
        let cpu = run(&open("cpu").unwrap(), &batch, None);
        assert!(((cpu.1[0] - truth.1[0]) / truth.1[0]).abs() < 1e-7, "{} against {}", cpu.1[0], truth.1[0]);
        let differ = cpu.0.iter().zip(&truth.0).filter(|(a, b)| a != b).count();
        assert!(differ * 1000 <= t, "{differ} of {t} states differ");
        for spec in ["wgpu", "cuda-host"] {
            if let Some(device) = open(spec) {
                let found = run(&device, &batch, None);
                let differ = found.0.iter().zip(&cpu.0).position(|(a, b)| a != b);
                assert_eq!((differ, found.1[0], found.2[0]), (None, cpu.1[0], cpu.2[0]), "{spec} [{t},{k}]");
            }
        }
    }
}

/// A step that no state can give ends its own sequence only.
#[test]
fn an_impossible_step_is_named() {
    for (name, device) in devices() {
        for [b, t, k] in [[5, 12, 3], [5, 12, 6], [3, 8, 20]] {
            let mut batch = Batch::random(&mut Rng::new(13), [b, t, k], Kind::Shared, true);
            batch.log_trans.iter_mut().for_each(|x| *x = x.max(-5.0));
            batch.observed = None;
            batch.lengths = vec![t as u32; b];
            let sound = run(&device, &batch, None);
            let (sequence, steps) = (1, [0, 1, 4, t - 1]);
            for step in steps {
                let mut broken = batch.clone();
                let at = (sequence * t + step) * k;
                broken.log_obs[at..at + k].fill(LOG_ZERO as f32);
                for bytes in [None, Some(4)] {
                    let found = run(&device, &broken, bytes);
                    assert_eq!((found.1[sequence], found.2[sequence]), (f64::NEG_INFINITY, step as u32), "{name} K = {k}");
                    let mut shorter = batch.clone();
                    shorter.lengths[sequence] = step as u32;
                    let prefix = run(&device, &shorter, None);
                    assert_eq!(found.0, prefix.0, "{name} K = {k}: the path up to step {step}");
                    for other in (0..b).filter(|&i| i != sequence) {
                        assert_eq!((found.1[other], found.2[other]), (sound.1[other], NONE), "{name} K = {k}");
                    }
                }
            }
        }
    }
}

/// Sequences a second at B = 4,096, T = 1,000: `cargo test --release --test hmm viterbi_speed -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement for the kernel's header, not a check: it prints times, and a loaded machine would fail any bound on them"]
fn viterbi_speed() {
    for spec in ["cpu", "wgpu", "cuda"] {
        let Some(device) = open(spec) else { continue };
        for k in [3, 4, 8, 16] {
            let mut batch = Batch::random(&mut Rng::new(1), [64, 1000, k], Kind::Shared, false);
            let b = if k <= 4 { 4096 } else { 512 };
            batch.b = b;
            batch.log_obs = batch.log_obs.iter().copied().cycle().take(b * 1000 * k).collect();
            batch.lengths = vec![1000; b];
            batch.observed = None;
            let hmm = batch.hmm(&device);
            let once = |_| {
                let mut pass = device.pass("timed");
                hmm_viterbi(&mut pass, &hmm).unwrap();
                let start = std::time::Instant::now();
                pass.submit().unwrap();
                start.elapsed().as_secs_f64()
            };
            let best = (0..4).map(once).fold(f64::INFINITY, f64::min);
            println!("{spec} K {k}: {:.1} ms, {:.0} sequences/s", best * 1e3, b as f64 / best);
        }
    }
}
