//! `forback regimes --out DIR`: probabilities.parquet, probabilities.csv, regimes.json and report.html.
//!
//! A row per bar and asset, from the first observation on; K columns of each kind, empty where there is nothing:
//! * `out_of_sample_k`        filtered with parameters of an earlier refit: known at the bar;
//! * `in_sample_filtered_k`   filtered with parameters of the whole sample: look-ahead through the parameters;
//! * `lookahead_smoothed_k`   smoothed: look-ahead.

use super::regimes::Found;
use super::results::{Whole, io};
use crate::Result;
use crate::report;
use arrow_array::{ArrayRef, Float32Array, RecordBatch, StringArray};
use arrow_schema::{DataType, Field, Schema};
use ndarray::ArrayView1;
use parquet::arrow::ArrowWriter;
use parquet::basic::Compression;
use parquet::file::properties::WriterProperties;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

/// Above this many rows there is no probabilities.csv.
const MOST_CSV_ROWS: usize = 2_000_000;

pub(super) fn write(dir: &Path, found: &Found<'_>) -> Result<()> {
    probabilities(dir, found)?;
    let text = serde_json::to_string_pretty(&found.json()).map_err(|e| crate::Error::Internal(e.to_string()))?;
    Whole::text(dir, "regimes.json", &text)?;
    report::regimes::write(&dir.join("report.html"), &page(found))
}

/// The names of the columns, and the probabilities of a bar and an asset under each kind.
struct Columns<'a> {
    found: &'a Found<'a>,
    states: usize,
}

const KINDS: [&str; 3] = ["out_of_sample", "in_sample_filtered", "lookahead_smoothed"];

impl Columns<'_> {
    fn names(&self) -> impl Iterator<Item = String> + '_ {
        KINDS.iter().flat_map(|kind| (0..self.states).map(move |k| format!("{kind}_{k}")))
    }

    fn at(&self, kind: usize, asset: usize, bar: usize) -> Option<ArrayView1<'_, f32>> {
        match kind {
            0 => self.found.out_of_sample?.filtered.get(asset, bar),
            1 => self.found.regimes.filtered.get(asset, bar),
            _ => self.found.regimes.smoothed.get(asset, bar),
        }
    }

    fn value(&self, kind: usize, state: usize, asset: usize, bar: usize) -> Option<f32> {
        self.at(kind, asset, bar)?.get(state).copied()
    }
}

fn probabilities(dir: &Path, found: &Found<'_>) -> Result<()> {
    let (prices, first) = (found.prices, found.regimes.first);
    let states = found.regimes.models.iter().map(|m| m.chosen.states).max().unwrap_or(0).max(found.next.as_ref().map_or(0, Vec::len));
    let columns = Columns { found, states };
    let (bars, assets) = (prices.n_bars(), prices.n_assets());
    let rows = (bars - first) * assets;
    let mut fields = vec![Field::new("date", DataType::Utf8, false), Field::new("asset", DataType::Utf8, false)];
    fields.extend(columns.names().map(|name| Field::new(name, DataType::Float32, true)));
    let metadata: std::collections::HashMap<String, String> = [("forback".to_string(), found.provenance().to_string())].into();
    let schema = Arc::new(Schema::new(fields).with_metadata(metadata));
    let properties = WriterProperties::builder().set_compression(Compression::SNAPPY).build();
    let (whole, file) = Whole::create(dir, "probabilities.parquet", (rows * states * 12) as f64)?;
    let mut writer = ArrowWriter::try_new(file, schema.clone(), Some(properties)).map_err(|e| io(&whole.path, &e))?;
    let dates: Vec<String> = prices.times[first..].iter().map(|&t| prices.format_time(t)).collect();
    // An asset at a time.
    for (asset, symbol) in prices.symbols.iter().enumerate() {
        let real =
            |kind: usize, state: usize| -> ArrayRef { Arc::new((first..bars).map(|bar| columns.value(kind, state, asset, bar)).collect::<Float32Array>()) };
        let mut arrays: Vec<ArrayRef> = vec![Arc::new(StringArray::from(dates.clone())), Arc::new(StringArray::from(vec![symbol.as_str(); dates.len()]))];
        arrays.extend((0..KINDS.len()).flat_map(|kind| (0..states).map(move |state| (kind, state))).map(|(kind, state)| real(kind, state)));
        let batch = RecordBatch::try_new(schema.clone(), arrays).map_err(|e| crate::Error::Internal(e.to_string()))?;
        writer.write(&batch).map_err(|e| io(&whole.path, &e))?;
    }
    writer.close().map_err(|e| io(&whole.path, &e))?;
    whole.keep()?;
    if rows > MOST_CSV_ROWS {
        return Ok(());
    }
    let (whole, file) = Whole::create(dir, "probabilities.csv", (rows * (20 + states * 30)) as f64)?;
    let mut csv = csv::Writer::from_writer(std::io::BufWriter::new(file));
    let failed = |e: csv::Error| whole.failed(&e);
    csv.write_record(["date".to_string(), "asset".into()].into_iter().chain(columns.names())).map_err(failed)?;
    for (asset, symbol) in prices.symbols.iter().enumerate() {
        for (date, bar) in dates.iter().zip(first..) {
            let cell = |(kind, state)| columns.value(kind, state, asset, bar).map(|p| format!("{p:?}")).unwrap_or_default();
            let cells = (0..KINDS.len()).flat_map(|kind| (0..states).map(move |state| (kind, state))).map(cell);
            csv.write_record([date.clone(), symbol.clone()].into_iter().chain(cells)).map_err(failed)?;
        }
    }
    csv.flush().map_err(|e| whole.failed(&e))?;
    csv.into_inner().map_err(|e| whole.failed(&e))?.flush().map_err(|e| whole.failed(&e))?;
    whole.keep()
}

fn page<'a>(found: &'a Found<'a>) -> report::regimes::Inputs<'a> {
    report::regimes::Inputs {
        prices: found.prices,
        regimes: found.regimes,
        out_of_sample: found.out_of_sample,
        found: found.json(),
        names: found.regimes.models.iter().map(|m| found.name(m)).collect(),
    }
}
