//! `hmm_scan`: forward-backward by an associative scan over time, against the sequential recursion in f64.

use crate::common::open_with;
use crate::common::{DEVICES, Rng, open, open_all, variants};
use forback::kernels::hmm::{Emission, Hmm, LOG_ZERO, Likelihood, Pair, Transitions, Wanted, hmm_forward_backward, hmm_forward_backward_into, pack_words};
use forback::kernels::hmm_scan::hmm_scan;
use forback::kernels::{Device, Error, View};

#[derive(Clone)]
struct Batch {
    shape: [usize; 3],
    per_sequence: bool,
    per_step: bool,
    log_init: Vec<f32>,
    log_trans: Vec<f32>,
    log_obs: Vec<f32>,
    lengths: Vec<u32>,
    observed: Option<Vec<bool>>,
}

impl Batch {
    /// Transitions that stay, some of them impossible; log-probabilities of a spread.
    fn random(rng: &mut Rng, [b, t, k]: [usize; 3], kind: usize, spread: f64) -> Batch {
        let (per_sequence, per_step) = (kind > 0, kind == 2);
        let mut rows = |n: usize| -> Vec<f32> {
            let row = |i: usize, rng: &mut Rng| {
                let x: Vec<f64> = (0..k).map(|j| if j != i % k && rng.unit() < 0.2 { 0.0 } else { rng.unit() + if j == i % k { 3.0 } else { 0.0 } }).collect();
                let sum: f64 = x.iter().sum();
                x.into_iter().map(move |x| if x > 0.0 { (x / sum).ln() as f32 } else { LOG_ZERO as f32 }).collect::<Vec<_>>()
            };
            (0..n).flat_map(|i| row(i, rng)).collect()
        };
        let log_init = rows(if per_sequence { b } else { 1 });
        let log_trans = rows(k * if per_sequence { b } else { 1 } * if per_step { (t - 1).max(1) } else { 1 });
        let log_obs = (0..b * t * k).map(|_| (spread * rng.normal()) as f32).collect();
        let lengths = (0..b).map(|i| if i == 0 { t as u32 } else { rng.whole(0, t as u32 + 1) }).collect();
        let observed = (kind == 1).then(|| (0..b * t).map(|_| rng.unit() < 0.9).collect());
        Batch { shape: [b, t, k], per_sequence, per_step, log_init, log_trans, log_obs, lengths, observed }
    }

    fn hmm(&self, device: &Device) -> Hmm {
        let [b, t, k] = self.shape;
        let real = |x: &[f32]| View::from(&device.upload("real", x).unwrap());
        let words = pack_words(t, &self.lengths, self.observed.as_deref()).unwrap();
        Hmm {
            b: b as u64,
            t: t as u64,
            k: k as u64,
            d: 0,
            emission: Emission::LogProbabilities,
            model: real(&self.log_init),
            per_sequence: self.per_sequence,
            transitions: Transitions::Table { log_trans: real(&self.log_trans), per_sequence: self.per_sequence, per_step: self.per_step },
            obs: real(&self.log_obs),
            words: Some(View::from(&device.upload_u32("words", &words).unwrap())),
            masked: self.observed.is_some(),
        }
    }
}

const ALL: Wanted = Wanted { filtered: true, predicted: true, posterior: true, pair: Pair::None };

/// filtered, predicted, posterior; likelihoods.
type Found = ([Vec<f64>; 3], Vec<Likelihood>);

fn run(device: &Device, batch: &Batch, wanted: Wanted, scan: bool) -> Found {
    let hmm = batch.hmm(device);
    let mut pass = device.pass("scan");
    let out = if scan { hmm_scan(&mut pass, &hmm, wanted) } else { hmm_forward_backward(&mut pass, &hmm, wanted) }.unwrap();
    let reads = [&out.filtered, &out.predicted, &out.posterior].map(|v| v.as_ref().map(|v| pass.read(v).unwrap()));
    let summary = out.read(&mut pass).unwrap();
    let mut done = pass.submit().unwrap();
    let values = reads.map(|r| r.map(|r| done.f64(r).unwrap()).unwrap_or_default());
    (values, out.likelihoods(&mut done, summary).unwrap())
}

#[track_caller]
fn compare(what: &str, got: &Found, want: &Found, tolerance: f64) {
    for (section, (got, want)) in ["filtered", "predicted", "posterior"].iter().zip(got.0.iter().zip(&want.0)) {
        assert_eq!(got.len(), want.len(), "{what}: {section}");
        let worst = got.iter().zip(want).map(|(x, y)| (x - y).abs()).fold(0.0, |m: f64, x| if x.is_nan() { f64::INFINITY } else { m.max(x) });
        assert!(worst <= tolerance, "{what}: {section} off by {worst:e}");
    }
    for (i, (got, want)) in got.1.iter().zip(&want.1).enumerate() {
        assert_eq!(got.impossible, want.impossible, "{what}: sequence {i}");
        let close = got.value == want.value || (got.value - want.value).abs() <= tolerance * want.value.abs().max(1.0);
        assert!(close, "{what}: sequence {i}: {} instead of {}", got.value, want.value);
    }
}

/// One chunk, parts of one, several levels; every kind of table; K on both sides of the CUDA column's templates.
#[test]
fn equal_to_the_sequential_recursion() {
    let reference = open("reference").unwrap();
    for (n, [b, t, k]) in [[1, 1, 2], [3, 64, 3], [2, 65, 1], [3, 300, 4], [2, 2500, 2], [1, 700, 7], [2, 200, 16], [1, 130, 11]].into_iter().enumerate() {
        for spread in [1.0, 10.0, 60.0] {
            let mut batch = Batch::random(&mut Rng::new(n as u32), [b, t, k], n % 3, spread);
            if spread > 1.0 {
                // With hard zeros too, the only possible path may lead through a state that f32 took for impossible.
                batch.log_trans.iter_mut().for_each(|x| *x = x.max(-6.0));
            }
            let want = run(&reference, &batch, ALL, false);
            compare(&format!("reference [{b},{t},{k}] {spread}"), &run(&reference, &batch, ALL, true), &want, 1e-9);
            for device in open_all(&DEVICES[1..]) {
                if device.info().kind.name() == "cuda-host" && b * t * k > 3000 {
                    continue;
                }
                compare(&format!("{} [{b},{t},{k}] {spread}", device.info()), &run(&device, &batch, ALL, true), &want, 1e-5);
            }
        }
    }
}

/// With the shader compiler's checks, and in several orders of threads: the same bits. What is not asked for changes nothing.
#[test]
fn variants_and_wishes_change_no_bit() {
    let batch = Batch::random(&mut Rng::new(77), [2, 2100, 2], 0, 1.0);
    for spec in ["cpu", "wgpu", "cuda-host"] {
        let mut first: Option<Found> = None;
        for options in variants(spec) {
            let Some(device) = open_with(spec, &options) else { continue };
            let found = run(&device, &batch, ALL, true);
            let one = run(&device, &batch, Wanted { posterior: true, ..Wanted::default() }, true);
            assert!(one.0[2] == found.0[2] && one.1 == found.1, "{spec}: posterior alone");
            let none = run(&device, &batch, Wanted::default(), true);
            assert!(none.1 == found.1 && none.0.iter().all(Vec::is_empty), "{spec}: likelihood alone");
            if let Some(first) = &first {
                assert!(*first == found, "{spec} {options:?}");
            }
            first = Some(found);
        }
    }
}

/// An impossible step ends its own sequence: filtered probabilities up to it, no posterior.
#[test]
fn impossible_steps() {
    let reference = open("reference").unwrap();
    for step in [0, 1, 63, 64, 150, 199] {
        let mut batch = Batch::random(&mut Rng::new(5), [3, 200, 3], 0, 1.0);
        batch.lengths = vec![200; 3];
        batch.log_obs[(200 + step) * 3..(200 + step + 1) * 3].fill(LOG_ZERO as f32);
        let want = run(&reference, &batch, Wanted { predicted: false, ..ALL }, false);
        assert_eq!(want.1[1].impossible, Some(step as u32));
        for device in open_all(&DEVICES) {
            compare(&format!("{} step {step}", device.info()), &run(&device, &batch, Wanted { predicted: false, ..ALL }, true), &want, 1e-5);
        }
    }
}

/// T = 1,000,000 on the CPU: three levels; the likelihood within 1e-7.
#[test]
fn a_million_steps() {
    let (reference, cpu) = (open("reference").unwrap(), open("cpu").unwrap());
    let batch = Batch::random(&mut Rng::new(9), [1, 1_000_000, 2], 0, 1.0);
    let wanted = Wanted { posterior: true, ..Wanted::default() };
    let (want, got) = (run(&reference, &batch, wanted, false), run(&cpu, &batch, wanted, true));
    compare("cpu", &got, &want, 1e-5);
    assert!(((got.1[0].value - want.1[0].value) / want.1[0].value).abs() < 1e-7, "{} instead of {}", got.1[0].value, want.1[0].value);
}

#[test]
fn what_the_scan_does_not_do_is_said() {
    let device = open("cpu").unwrap();
    let batch = Batch::random(&mut Rng::new(1), [1, 10, 17], 0, 1.0);
    let error = hmm_scan(&mut device.pass("scan"), &batch.hmm(&device), ALL).unwrap_err();
    assert!(matches!(error, Error::Parameter { .. }), "{error}");
    let batch = Batch::random(&mut Rng::new(1), [1, 10, 3], 0, 1.0);
    let pairs = Wanted { pair: Pair::Sum, ..ALL };
    assert!(hmm_scan(&mut device.pass("scan"), &batch.hmm(&device), pairs).is_err());
}

/// Seconds of the scan and of the sequential kernel, for the rule in `hmm_scan::wins`:
/// `cargo test --release --test hmm crossover -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement for the kernel's header, not a check: it prints times, and a loaded machine would fail any bound on them"]
fn crossover() {
    let wanted = Wanted { posterior: true, ..Wanted::default() };
    for device in open_all(&["cpu", "wgpu", "cuda"]) {
        for k in [2, 4, 8] {
            for t in [4096, 32_768, 131_072] {
                for b in [1, 2, 4, 8, 16, 32] {
                    let mut batch = Batch::random(&mut Rng::new(1), [b, 64, k], 0, 1.0);
                    batch.log_obs = batch.log_obs.iter().copied().cycle().take(b * t * k).collect();
                    batch.shape[1] = t;
                    batch.lengths = vec![t as u32; b];
                    let hmm = batch.hmm(&device);
                    let mut pass = device.pass("into");
                    let into = hmm_forward_backward(&mut pass, &hmm, wanted).unwrap();
                    pass.submit().unwrap();
                    let time = |scan: bool| {
                        let once = |_| {
                            let mut pass = device.pass("timed");
                            if scan {
                                hmm_scan(&mut pass, &hmm, wanted).unwrap();
                            } else {
                                hmm_forward_backward_into(&mut pass, &hmm, wanted, &into).unwrap();
                            }
                            let start = std::time::Instant::now();
                            pass.submit().unwrap();
                            start.elapsed().as_secs_f64()
                        };
                        (0..4).map(once).fold(f64::INFINITY, f64::min)
                    };
                    let (sequential, scan) = (time(false), time(true));
                    println!(
                        "{} K {k} T {t} B {b}: sequential {:.2} ms, scan {:.2} ms, {:.2}×",
                        device.info().kind.name(),
                        sequential * 1e3,
                        scan * 1e3,
                        sequential / scan
                    );
                }
            }
        }
    }
}
