//! Pooling over time: by hand, finite differences, padding, every device against `reference`.

use super::maps_common::*;
use forback::kernels::pool::*;
use forback::kernels::{Device, Error, OpenOptions};

/// B, B', T, H.
const CASES: [(u64, u64, u64, u64); 6] = [(1, 1, 1, 1), (3, 3, 7, 5), (6, 3, 13, 4), (5, 5, 300, 3), (4, 2, 33, 131), (3, 1, 129, 1)];

fn op(case: (u64, u64, u64, u64)) -> Pool {
    Pool { rows: case.0, lengths: case.1, steps: case.2, width: case.3 }
}

/// One whole, one empty where there are several, one longer than T.
fn lengths(op: &Pool) -> Vec<u32> {
    (0..op.lengths as u32).map(|b| [op.steps as u32 + 5, 0, op.steps as u32 / 2 + 1, 1][b as usize % 4]).collect()
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Last,
    Mean,
    Attention,
}

const KINDS: [Kind; 3] = [Kind::Last, Kind::Mean, Kind::Attention];

fn forward(device: &Device, op: &Pool, kind: Kind, h: &[f32], scores: &[f32]) -> Vec<f64> {
    let (h, s, n) = (up(device, h), up(device, scores), words(device, &lengths(op)));
    let (w, y) = (zeros(device, scores.len()), zeros(device, (op.rows * op.width) as usize));
    go(device, &y, |pass| match kind {
        Kind::Last => last_valid(pass, op, &h, &n, &y),
        Kind::Mean => mean_pool(pass, op, &h, &n, &y),
        Kind::Attention => attention_pool(pass, op, &s, &h, &n, &w, &y),
    })
}

/// grad_h and grad_scores.
fn backward(device: &Device, op: &Pool, kind: Kind, h: &[f32], scores: &[f32], g: &[f32]) -> (Vec<f64>, Vec<f64>) {
    let (h, s, n, g) = (up(device, h), up(device, scores), words(device, &lengths(op)), up(device, g));
    let (w, y, gh, gs) = (zeros(device, scores.len()), zeros(device, g.len() as usize), zeros(device, h.len() as usize), zeros(device, scores.len()));
    let grad_h = go(device, &gh, |pass| match kind {
        Kind::Last => last_valid_backward(pass, op, &n, &g, &gh),
        Kind::Mean => mean_pool_backward(pass, op, &n, &g, &gh),
        Kind::Attention => {
            attention_pool(pass, op, &s, &h, &n, &w, &y)?;
            attention_pool_backward(pass, op, &h, &n, &w, &g, None, Some(&gh))
        }
    });
    if kind != Kind::Attention {
        return (grad_h, vec![]);
    }
    let grad_scores = go(device, &gs, |pass| {
        attention_pool(pass, op, &s, &h, &n, &w, &y)?;
        attention_pool_backward(pass, op, &h, &n, &w, &g, Some(&gs), None)
    });
    (grad_h, grad_scores)
}

fn data(op: &Pool) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    let n = (op.rows * op.steps) as usize;
    (values(n * op.width as usize, 1), values(n, 2), values((op.rows * op.width) as usize, 3))
}

#[test]
fn pooled_as_by_hand() {
    for case in CASES {
        let op = op(case);
        let (h, scores, _) = data(&op);
        let (t, width) = (op.steps as usize, op.width as usize);
        for kind in KINDS {
            let mut want = vec![0.0; (op.rows * op.width) as usize];
            for b in 0..op.rows as usize {
                let n = (lengths(&op)[b % op.lengths as usize] as usize).min(t);
                let total: f64 = (0..n).map(|i| f64::from(scores[b * t + i]).exp()).sum();
                for i in 0..n {
                    let w = match kind {
                        Kind::Last => f64::from(u8::from(i + 1 == n)),
                        Kind::Mean => 1.0 / n as f64,
                        Kind::Attention => f64::from(scores[b * t + i]).exp() / total,
                    };
                    for j in 0..width {
                        want[b * width + j] += w * f64::from(h[(b * t + i) * width + j]);
                    }
                }
            }
            close(&format!("reference {case:?} {kind:?}"), &forward(&reference(), &op, kind, &h, &scores), &want, 1e-12, 1e-13);
            for device in devices() {
                close(&format!("{device:?} {case:?} {kind:?}"), &forward(&device, &op, kind, &h, &scores), &want, 3e-6, 1e-6);
            }
        }
    }
}

#[test]
fn gradients_are_finite_differences() {
    let reference = reference();
    for case in CASES {
        let op = op(case);
        let (h, scores, g) = data(&op);
        for kind in KINDS {
            let (grad_h, grad_scores) = backward(&reference, &op, kind, &h, &scores, &g);
            if h.len() < 400 {
                gradient_is(&format!("{case:?} {kind:?} h"), &h, &grad_h, &g, |h| forward(&reference, &op, kind, h, &scores));
                if kind == Kind::Attention {
                    gradient_is(&format!("{case:?} scores"), &scores, &grad_scores, &g, |s| forward(&reference, &op, kind, &h, s));
                }
            }
            for device in devices() {
                let (got_h, got_scores) = backward(&device, &op, kind, &h, &scores, &g);
                close(&format!("{device:?} {case:?} {kind:?} h"), &got_h, &grad_h, 3e-6, 1e-6);
                close(&format!("{device:?} {case:?} {kind:?} scores"), &got_scores, &grad_scores, 1e-5, 3e-6);
            }
        }
    }
}

#[test]
fn padding_is_not_read_and_splits_change_no_bit() {
    let op = op((6, 3, 130, 7));
    let (mut h, mut scores, g) = data(&op);
    for spec in ["cpu", "wgpu", "cuda-host"] {
        let run = |options: &OpenOptions, h: &[f32], s: &[f32]| {
            open_with(spec, options).map(|d| KINDS.map(|kind| (forward(&d, &op, kind, h, s), backward(&d, &op, kind, h, s, &g))))
        };
        let Some(whole) = run(&OpenOptions::default(), &h, &scores) else { continue };
        for options in
            [OpenOptions { work_per_launch: Some(4000), ..OpenOptions::default() }, OpenOptions { binding_bytes: Some(9000), ..OpenOptions::default() }]
        {
            assert!(run(&options, &h, &scores).unwrap() == whole, "{spec} {options:?}");
        }
        for b in 0..6 {
            let n = (lengths(&op)[b % 3] as usize).min(130);
            scores[b * 130 + n..(b + 1) * 130].fill(f32::NAN);
            h[(b * 130 + n) * 7..(b + 1) * 130 * 7].fill(f32::NAN);
        }
        assert!(run(&OpenOptions::default(), &h, &scores).unwrap() == whole, "{spec}: padding was read");
    }
    let device = reference();
    let mut pass = device.pass("errors");
    let bad = Pool { lengths: 4, ..op };
    assert!(matches!(bad.check(), Err(Error::Shape { .. })));
    let (h, n, y) = (up(&device, &h), words(&device, &lengths(&op)), zeros(&device, 3));
    assert!(matches!(mean_pool(&mut pass, &op, &h, &n, &y), Err(Error::Shape { .. })));
}
