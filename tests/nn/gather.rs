//! Embedding: by hand on every device, gradients as sums in order, ids beyond the table, splits.

use super::maps_common::*;
use forback::kernels::gather::*;
use forback::kernels::{Device, Error, OpenOptions};

/// M, tables, id lists, N, V, E.
const CASES: [(u64, u64, u64, u64, u64, u64); 9] = [
    (1, 1, 1, 1, 1, 1),
    (1, 1, 1, 37, 5, 3),
    (3, 3, 1, 41, 7, 65),
    (3, 1, 3, 300, 13, 5),
    (3, 1, 1, 300, 13, 5),
    (2, 2, 2, 700, 67, 4),
    (1, 1, 1, 1500, 300, 2),
    (130, 130, 130, 3, 2, 8),
    (1, 1, 1, 1000, 1, 33),
];

fn op(case: (u64, u64, u64, u64, u64, u64)) -> Embedding {
    Embedding { models: case.0, table_models: case.1, ids_models: case.2, rows: case.3, vocabulary: case.4, width: case.5 }
}

/// Ids, a few of them beyond the table.
fn ids(op: &Embedding) -> Vec<u32> {
    (0..(op.ids_models * op.rows) as u32)
        .map(|i| if i % 11 == 3 { op.vocabulary as u32 + i % 3 } else { i.wrapping_mul(2_654_435_761) % op.vocabulary as u32 })
        .collect()
}

fn forward(device: &Device, op: &Embedding, table: &[f32]) -> Vec<f64> {
    let (table, list, y) = (up(device, table), words(device, &ids(op)), zeros(device, op.output() as usize));
    go(device, &y, |pass| embedding(pass, op, &table, &list, &y))
}

fn backward(device: &Device, op: &Embedding, g: &[f32]) -> Vec<f64> {
    let (g, list, grad) = (up(device, g), words(device, &ids(op)), zeros(device, op.table() as usize));
    let scratch = zeros(device, op.scratch_backward() as usize);
    go(device, &grad, |pass| embedding_backward(pass, op, &list, &g, &grad, Some(&scratch)))
}

/// For every row of y: its table row, if it has one.
fn source(op: &Embedding) -> Vec<Option<usize>> {
    let list = ids(op);
    let mut rows = Vec::new();
    for m in 0..op.models as usize {
        for n in 0..op.rows as usize {
            let id = list[if op.ids_models > 1 { m * op.rows as usize + n } else { n }] as usize;
            let table = if op.table_models > 1 { m * op.vocabulary as usize } else { 0 };
            rows.push((id < op.vocabulary as usize).then_some(table + id));
        }
    }
    rows
}

#[test]
fn rows_and_their_gradients() {
    for case in CASES {
        let op = op(case);
        let (e, rows) = (op.width as usize, source(&op));
        let (table, g) = (values(op.table() as usize, 1), values(op.output() as usize, 2));
        let mut y = vec![0.0; op.output() as usize];
        let mut grad = vec![0.0; op.table() as usize];
        for (i, row) in rows.iter().enumerate() {
            for j in 0..e {
                if let Some(row) = row {
                    y[i * e + j] = f64::from(table[row * e + j]);
                    grad[row * e + j] += f64::from(g[i * e + j]);
                }
            }
        }
        for device in std::iter::once(reference()).chain(devices()) {
            assert!(forward(&device, &op, &table) == y, "{device:?} {case:?}");
            close(&format!("{device:?} {case:?}"), &backward(&device, &op, &g), &grad, 2e-6, 5e-5);
            let list = ids(&op);
            let (list_view, invalid) = (words(&device, &list), words(&device, &vec![9; op.ids_models as usize]));
            let mut pass = device.pass("invalid");
            embedding_invalid(&mut pass, &op, &list_view, &invalid).unwrap();
            let read = pass.read(&invalid).unwrap();
            let want: Vec<u32> = list.chunks(op.rows as usize).map(|l| l.iter().filter(|&&id| u64::from(id) >= op.vocabulary).count() as u32).collect();
            assert_eq!(pass.submit().unwrap().u32(read).unwrap(), want, "{device:?} {case:?}");
        }
    }
}

#[test]
fn splits_change_no_bit() {
    for case in [(3, 3, 1, 41, 7, 65), (3, 1, 3, 300, 13, 5), (130, 130, 130, 3, 2, 8), (1, 1, 1, 1500, 30, 20)] {
        let op = op(case);
        let (table, g) = (values(op.table() as usize, 1), values(op.output() as usize, 2));
        for spec in ["wgpu", "cuda-host"] {
            let run = |options: &OpenOptions| open_with(spec, options).map(|d| (forward(&d, &op, &table), backward(&d, &op, &g)));
            let Some(whole) = run(&OpenOptions::default()) else { continue };
            for options in
                [OpenOptions { work_per_launch: Some(3000), ..OpenOptions::default() }, OpenOptions { binding_bytes: Some(140_000), ..OpenOptions::default() }]
            {
                assert!(run(&options).unwrap() == whole, "{spec} {case:?} {options:?}");
            }
        }
    }
}

#[test]
fn nan_in_one_model_stays_there_and_bad_calls_are_refused() {
    let op = op((3, 3, 1, 41, 7, 5));
    let mut table = values(op.table() as usize, 1);
    table[7 * 5..14 * 5].fill(f32::NAN);
    for device in devices() {
        let y = forward(&device, &op, &table);
        assert!(y[..41 * 5].iter().all(|v| v.is_finite()) && y[82 * 5..].iter().all(|v| v.is_finite()), "{device:?}");
        assert!(y[41 * 5..82 * 5].iter().any(|v| v.is_nan()), "{device:?}");
    }
    let device = reference();
    let mut pass = device.pass("errors");
    let shape = |result: forback::kernels::Result<()>| matches!(result, Err(Error::Shape { .. }));
    assert!(shape(Embedding { table_models: 2, ..op }.check()));
    let (y, list) = (zeros(&device, op.output() as usize), words(&device, &ids(&op)));
    assert!(shape(embedding(&mut pass, &op, &zeros(&device, 3), &list, &y)));
    let empty = Embedding { rows: 0, ..op };
    assert!(embedding(&mut pass, &empty, &zeros(&device, op.table() as usize), &words(&device, &[]), &zeros(&device, 0)).is_ok());
    assert_eq!(pass.launches(), 0);
}
