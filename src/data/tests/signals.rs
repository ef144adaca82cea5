//! Files of weights: what is read, and what is refused with which words.

use std::path::PathBuf;
use std::sync::Arc;

use ::parquet::arrow::ArrowWriter;
use arrow_array::{ArrayRef, Date32Array, Float32Array, Float64Array, Int64Array, RecordBatch, StringArray};
use ndarray::Array2;
use tempfile::TempDir;

use super::super::{Dropped, Prices};
use super::*;

const DAY: i64 = 86_400;

/// Bars 10 to 10 + t of January 1970, assets A, B, …
fn prices(t: usize, n: usize) -> Prices {
    Prices {
        symbols: (0..n).map(|i| char::from(b'A' + i as u8).to_string()).collect(),
        times: (0..t as i64).map(|j| (10 + j) * DAY).collect(),
        has_time_of_day: false,
        close: Array2::ones((t, n)),
        open: None,
        sources: Vec::new(),
        sha256: String::new(),
        dropped: Vec::new(),
        filled: Vec::new(),
        price_column: "close".into(),
        notes: Vec::new(),
    }
}

struct Files(TempDir);

impl Files {
    fn new() -> Files {
        Files(tempfile::tempdir().unwrap())
    }

    fn bytes(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.0.path().join(name);
        std::fs::write(&path, content).unwrap();
        path
    }

    fn npy(&self, descr: &str, fortran: &str, shape: &str, values: &[u8]) -> PathBuf {
        let mut header = format!("{{'descr': '{descr}', 'fortran_order': {fortran}, 'shape': {shape}, }}");
        header += &" ".repeat(63 - (header.len() + 10) % 64);
        header.push('\n');
        let mut content = b"\x93NUMPY\x01\x00".to_vec();
        content.extend((header.len() as u16).to_le_bytes());
        content.extend(header.as_bytes());
        content.extend(values);
        self.bytes("weights.npy", &content)
    }

    fn parquet(&self, columns: Vec<(&str, ArrayRef)>) -> PathBuf {
        let path = self.0.path().join("weights.parquet");
        let batch = RecordBatch::try_from_iter(columns).unwrap();
        let mut writer = ArrowWriter::try_new(File::create(&path).unwrap(), batch.schema(), None).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
        path
    }
}

fn f32s(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// All sets, `most` at a time.
fn all(path: &Path, prices: &Prices, most: usize) -> Result<(SignalSets, u64)> {
    let mut signals = Signals::open(path, prices, false)?;
    let mut out = SignalSets::default();
    loop {
        let some = signals.next(most)?;
        assert!(some.labels.len() <= most && some.weights.len() == some.labels.len() * prices.n_bars() * prices.n_assets());
        if some.labels.is_empty() {
            return Ok((out, signals.absent()));
        }
        out.labels.extend(some.labels);
        out.weights.extend(some.weights);
    }
}

fn refused(path: &Path, prices: &Prices) -> String {
    all(path, prices, 2).unwrap_err().to_string()
}

#[track_caller]
fn says(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "'{part}' is not in: {text}");
    }
}

#[test]
fn npy_of_one_and_of_many_sets() {
    let (files, prices) = (Files::new(), prices(3, 2));
    let values: Vec<f32> = (0..30).map(|i| i as f32 * 0.25 - 1.0).collect();
    let (one, _) = all(&files.npy("<f4", "False", "(3, 2)", &f32s(&values[..6])), &prices, 5).unwrap();
    assert_eq!((one.labels, &one.weights[..]), (vec!["0".to_string()], &values[..6]));
    for most in [1, 2, 5, 9] {
        let path = files.npy("<f4", "False", "(5, 3, 2)", &f32s(&values));
        assert_eq!(Signals::open(&path, &prices, false).unwrap().count(), Some(5));
        let (five, absent) = all(&path, &prices, most).unwrap();
        assert_eq!((five.labels.join(" "), five.weights, absent), ("0 1 2 3 4".into(), values.clone(), 0));
    }
    let wide: Vec<u8> = values.iter().flat_map(|&v| f64::from(v).to_le_bytes()).collect();
    assert_eq!(all(&files.npy("<f8", "False", "(5, 3, 2)", &wide), &prices, 2).unwrap().0.weights, values);
    assert!(all(&files.npy("<f4", "False", "(0, 3, 2)", &[]), &prices, 2).unwrap().0.labels.is_empty());
}

#[test]
fn npy_that_does_not_fit_is_refused() {
    let (files, prices) = (Files::new(), prices(3, 2));
    let six = f32s(&[0.5; 6]);
    says(&refused(&files.npy("<f4", "False", "(4, 2)", &f32s(&[0.5; 8])), &prices), &["weights are [4, 2], prices are [3, 2]", "row per bar"]);
    says(&refused(&files.npy("<f4", "False", "(2, 3)", &six), &prices), &["weights are [2, 3], prices are [3, 2]", "transpose"]);
    says(&refused(&files.npy("<f4", "False", "(6,)", &six), &prices), &["weights are [6]", "[S,T,N] is expected"]);
    says(&refused(&files.npy("<f4", "True", "(3, 2)", &six), &prices), &["Fortran order", "ascontiguousarray"]);
    says(&refused(&files.npy(">f4", "False", "(3, 2)", &six), &prices), &["'>f4'", "little-endian"]);
    says(&refused(&files.npy("<i8", "False", "(3, 2)", &six), &prices), &["'<i8'"]);
    says(&refused(&files.npy("<f4", "False", "(3, 2)", &six[..20]), &prices), &["bytes, its header asks for"]);
    says(&refused(&files.npy("<f4", "False", "(9999999999999999999, 3, 2)", &six), &prices), &["more than any file holds"]);
    says(&refused(&files.npy("<f4", "Maybe", "(3, 2)", &six), &prices), &["header is not understood"]);
    says(&refused(&files.bytes("x.npy", b"\x93NUMPY\x01"), &prices), &["cut short"]);
    says(&refused(&files.bytes("x.npy", b"\x93NUMPY\x09\x00\x06\x00\x00\x00abcdef"), &prices), &["version 9.0"]);
    says(&refused(&files.bytes("x.csv", b"time,A,B\n"), &prices), &["neither an npy nor a Parquet file"]);
    says(&refused(&files.bytes("x", b""), &prices), &["empty"]);
    says(&refused(&files.0.path().join("none.npy"), &prices), &["file not found"]);
    let mut bad = [0.5f32; 12];
    bad[9] = f32::NAN;
    says(&refused(&files.npy("<f4", "False", "(2, 3, 2)", &f32s(&bad)), &prices), &["weights[1, 1, 1] (B on 1970-01-12) is NaN", "finite"]);
    let huge: Vec<u8> = [0.0, 0.0, 1e300, 0.0, 0.0, 0.0f64].iter().flat_map(|v| v.to_le_bytes()).collect();
    says(&refused(&files.npy("<f8", "False", "(3, 2)", &huge), &prices), &["weights[1, 0] (A on 1970-01-12) is inf"]);
}

/// Columns of a long file.
fn long(rows: &[(&str, i32, &str, f64)]) -> Vec<(&'static str, ArrayRef)> {
    vec![
        ("set", Arc::new(StringArray::from_iter_values(rows.iter().map(|r| r.0)))),
        ("time", Arc::new(Date32Array::from_iter_values(rows.iter().map(|r| r.1)))),
        ("symbol", Arc::new(StringArray::from_iter_values(rows.iter().map(|r| r.2)))),
        ("weight", Arc::new(Float64Array::from_iter_values(rows.iter().map(|r| r.3)))),
    ]
}

#[test]
fn long_rows_find_their_cells() {
    let (files, mut prices) = (Files::new(), prices(3, 2));
    prices.dropped.push(Dropped { symbol: "GONE".into(), reason: "short".into() });
    // any order inside a set; before and after the prices, and of a dropped symbol, nothing is looked at
    let rows = [
        ("x", 12, "B", 0.6),
        ("x", 10, "A", 0.1),
        ("x", 9, "A", f64::NAN),
        ("x", 13, "A", 7.0),
        ("x", 11, "GONE", 7.0),
        ("x", 10, "B", -0.2),
        ("y", 11, "A", 0.3),
    ];
    for most in [1, 4] {
        let (sets, absent) = all(&files.parquet(long(&rows)), &prices, most).unwrap();
        assert_eq!(sets.labels, ["x", "y"]);
        assert_eq!(sets.weights, [0.1, -0.2, 0.0, 0.0, 0.0, 0.6, 0.0, 0.0, 0.3, 0.0, 0.0, 0.0]);
        assert_eq!(absent, 3 + 5);
    }
    // one asset needs no symbol, one set no name
    let single = super::tests::prices(3, 1);
    let columns: Vec<(&str, ArrayRef)> = vec![
        ("date", Arc::new(StringArray::from(vec!["1970-01-11", "1970-01-12", "1970-01-13"]))),
        ("position", Arc::new(Float32Array::from(vec![1.0, -1.0, 0.5]))),
    ];
    assert_eq!(all(&files.parquet(columns), &single, 3).unwrap().0, SignalSets { labels: vec!["0".into()], weights: vec![1.0, -1.0, 0.5] });
}

#[test]
fn sets_go_over_the_edges_of_batches() {
    let files = Files::new();
    let (t, n, sets) = (150, 3, 60);
    let prices = prices(t, n);
    let value = |s: usize, j: usize, i: usize| (s * 7 + j * 3 + i) as f64 / 64.0;
    let labels: Vec<String> = (0..sets).map(|s| format!("set {s}")).collect();
    let rows: Vec<(&str, i32, &str, f64)> = (0..sets)
        .flat_map(|s| (0..t).flat_map(move |j| (0..n).map(move |i| (s, j, i))))
        .map(|(s, j, i)| (labels[s].as_str(), 10 + j as i32, ["A", "B", "C"][i], value(s, j, i)))
        .collect();
    assert!(rows.len() > BATCH);
    let path = files.parquet(long(&rows));
    for most in [1, 7, 100] {
        let (got, absent) = all(&path, &prices, most).unwrap();
        assert!(got.labels == labels && absent == 0);
        let want: Vec<f32> = rows.iter().map(|r| r.3 as f32).collect();
        assert!(got.weights == want, "{most} at a time");
    }
}

#[test]
fn wide_columns_are_assets() {
    let (files, prices) = (Files::new(), prices(2, 2));
    let number = |x: &[f64]| -> ArrayRef { Arc::new(Float64Array::from(x.to_vec())) };
    let times = || -> ArrayRef { Arc::new(Date32Array::from(vec![10, 11, 10, 11])) };
    let sets: ArrayRef = Arc::new(Int64Array::from(vec![3, 3, 8, 8]));
    let columns = vec![("time", times()), ("B", number(&[0.1, 0.2, 0.3, 0.4])), ("set", sets), ("A", number(&[1.0, 2.0, 3.0, 4.0]))];
    let (got, absent) = all(&files.parquet(columns), &prices, 9).unwrap();
    assert_eq!((got.labels.join(" "), got.weights, absent), ("3 8".into(), vec![1.0, 0.1, 2.0, 0.2, 3.0, 0.3, 4.0, 0.4], 0));

    let two = || -> ArrayRef { Arc::new(Date32Array::from(vec![10, 11])) };
    let missing = files.parquet(vec![("time", two()), ("A", number(&[1.0, 1.0]))]);
    says(&refused(&missing, &prices), &["column 'B'", "no column for this asset"]);
    let unknown = files.parquet(vec![("time", two()), ("A", number(&[1.0, 1.0])), ("B", number(&[1.0, 1.0])), ("AA", number(&[1.0, 1.0]))]);
    says(&refused(&unknown, &prices), &["column 'AA'", "no such symbol"]);
    assert!(Signals::open(&unknown, &prices, true).unwrap().next(1).is_ok(), "a choice of symbols leaves others alone");
    let text = files.parquet(vec![("time", two()), ("A", number(&[1.0, 1.0])), ("B", Arc::new(StringArray::from(vec!["x", "y"])))]);
    says(&refused(&text, &prices), &["column 'B'", "must be numbers"]);
    let null = files.parquet(vec![("time", two()), ("A", Arc::new(Float64Array::from(vec![Some(1.0), None]))), ("B", number(&[1.0, 1.0]))]);
    says(&refused(&null, &prices), &["row 2", "column 'A'", "value 'null'", "set '0', A on 1970-01-12 is not a finite number"]);
}

#[test]
fn wrong_rows_are_named() {
    let (files, mut prices) = (Files::new(), prices(3, 2));
    let error = |rows: &[(&str, i32, &str, f64)]| refused(&files.parquet(long(rows)), &prices);
    says(
        &error(&[("x", 10, "A", 0.1), ("x", 11, "B", f64::INFINITY)]),
        &["row 2", "column 'weight'", "value 'inf'", "set 'x', B on 1970-01-12 is not a finite number"],
    );
    says(&error(&[("x", 10, "A", 0.1), ("x", 10, "A", 0.1)]), &["row 2", "set 'x', A on 1970-01-11 is there twice"]);
    says(
        &error(&[("x", 10, "A", 0.1), ("y", 10, "A", 0.1), ("x", 11, "A", 0.1)]),
        &["row 3", "column 'set'", "set 'x' is there again", "sort the file by set"],
    );
    says(&error(&[("x", 10, "AB", 0.1)]), &["row 1", "column 'symbol', value 'AB'", "no such symbol"]);
    says(&error(&[("", 10, "A", 0.1)]), &["row 1", "the set has no name"]);
    says(&error(&[]), &["columns and no rows"]);
    let mut unnamed = long(&[("x", 10, "A", 0.1)]);
    unnamed[3].0 = "size";
    says(&refused(&files.parquet(unnamed), &prices), &["no column of weights among: set, time, symbol, size"]);
    prices.times[1] += 3600;
    says(&refused(&files.parquet(long(&[("x", 11, "A", 0.1)])), &prices), &["row 1", "column 'time'", "1970-01-12 is no bar of the prices"]);
}
