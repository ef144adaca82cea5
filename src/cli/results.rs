//! `--out DIR`: results as Parquet and CSV with provenance. Files are written under temporary names and renamed when they are
//! whole, so that nothing half-written is left behind.
//!
//! Rows are in the order cost, set, asset, in batches of a fixed size, so that a sweep in parts writes the same bytes as one in one run.

use super::store::Store;
use crate::data::Prices;
use crate::sim::parts::Row;
use crate::sim::sweep::{OutOfSample, SweepReport, SweepRun};
use crate::{Error, Result};
use arrow_array::{ArrayRef, Float32Array, RecordBatch, StringArray, UInt32Array, UInt64Array};
use arrow_schema::{DataType, Field, Schema};
use parquet::arrow::ArrowWriter;
use parquet::basic::Compression;
use parquet::file::properties::WriterProperties;
use serde_json::Value;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A file that appears under its name only when it is whole.
pub(super) struct Whole {
    pub(super) path: PathBuf,
    partial: PathBuf,
    kept: bool,
    /// Bytes that it will take, roughly.
    needed: f64,
}

impl Whole {
    pub(super) fn create(dir: &Path, name: &str, needed: f64) -> Result<(Whole, File)> {
        let whole = Whole { path: dir.join(name), partial: dir.join(format!(".{name}.{}", std::process::id())), kept: false, needed };
        let file = File::create(&whole.partial).map_err(|e| whole.failed(&e))?;
        Ok((whole, file))
    }

    pub(super) fn keep(mut self) -> Result<()> {
        std::fs::rename(&self.partial, &self.path).map_err(|e| self.failed(&e))?;
        self.kept = true;
        Ok(())
    }

    /// Writes a whole small file.
    pub(super) fn text(dir: &Path, name: &str, text: &str) -> Result<()> {
        let (whole, mut file) = Whole::create(dir, name, text.len() as f64)?;
        std::io::Write::write_all(&mut file, text.as_bytes()).map_err(|e| whole.failed(&e))?;
        whole.keep()
    }

    /// What went wrong while it was written; a full disk says how much is needed.
    pub(super) fn failed(&self, e: &dyn std::fmt::Display) -> Error {
        let text = e.to_string();
        let full = ["No space left", "not enough space", "Disk quota exceeded"].iter().any(|sign| text.contains(sign));
        if !full {
            return io(&self.path, e);
        }
        let message = format!(
            "the disk is full: this file takes about {}; what was written of it is removed: free some space, or name another folder with --out",
            super::sweep::size(self.needed)
        );
        Error::Io { path: self.path.display().to_string(), message }
    }
}

impl Drop for Whole {
    fn drop(&mut self) {
        if !self.kept {
            // Best effort: the error that led here is the one to report.
            let _ = std::fs::remove_file(&self.partial);
        }
    }
}

pub(super) fn io(path: &Path, e: &dyn std::fmt::Display) -> Error {
    Error::Io { path: path.display().to_string(), message: format!("cannot be written: {e}") }
}

/// Makes the folder, and finds out before the work whether it can be written to.
pub(super) fn folder(dir: &Path) -> Result<()> {
    if dir.is_file() {
        return Err(io(dir, &"this is a file; name a folder with --out"));
    }
    std::fs::create_dir_all(dir).map_err(|e| io(dir, &e))?;
    Whole::create(dir, "probe", 0.0).map(|_| ())
}

// ---- rows ------------------------------------------------------------------------------------------------------------

/// Metrics of a row, after the parameters.
pub(super) const METRICS: [&str; 5] = ["sharpe", "total_return", "max_drawdown", "turnover", "trades"];
/// Rows of a record batch.
const BATCH: usize = 65_536;
/// Above this many rows there is no results.csv.
const MOST_CSV_ROWS: usize = 10_000_000;
/// Bytes of a row in each format, roughly.
const PARQUET_ROW: f64 = 14.0;
const CSV_ROW: f64 = 60.0;

/// Bytes that a sweep of so many rows takes, roughly; one in parts holds its rows twice for a while.
pub(super) fn bytes(rows: f64, parts: bool) -> f64 {
    let csv = if rows <= MOST_CSV_ROWS as f64 { CSV_ROW } else { 0.0 };
    rows * (PARQUET_ROW * if parts { 2.0 } else { 1.0 } + csv)
}

/// What rows are about.
#[derive(Clone, Copy)]
pub(super) struct Subject<'a> {
    pub(super) run: &'a SweepRun<'a>,
    pub(super) prices: &'a Prices,
    pub(super) provenance: &'a Value,
}

impl Subject<'_> {
    fn schema(&self) -> Arc<Schema> {
        let last = self.run.id(self.run.len() - 1);
        let number = if u32::try_from(last).is_ok() { DataType::UInt32 } else { DataType::UInt64 };
        let mut fields = vec![Field::new("cost_bps", DataType::Float32, false), Field::new("set", number, false)];
        fields.extend(self.run.set(0).iter().map(|(name, _)| Field::new(*name, DataType::Float32, false)));
        fields.push(Field::new("symbol", DataType::Utf8, false));
        fields.extend(METRICS[..4].iter().map(|name| Field::new(*name, DataType::Float32, true)));
        fields.push(Field::new(METRICS[4], DataType::UInt32, false));
        let metadata: std::collections::HashMap<String, String> = [("forback".to_string(), self.provenance.to_string())].into();
        Arc::new(Schema::new(fields).with_metadata(metadata))
    }
}

#[derive(Clone, Copy)]
struct Placed {
    cost: u32,
    set: u32,
    asset: u32,
    row: Row,
}

/// A Parquet file of rows, and a CSV file of the same where there is one.
pub(super) struct RowWriter<'a> {
    subject: Subject<'a>,
    schema: Arc<Schema>,
    parquet: (Whole, ArrowWriter<File>),
    csv: Option<(Whole, csv::Writer<File>)>,
    waiting: Vec<Placed>,
}

impl<'a> RowWriter<'a> {
    /// Opens `NAME.parquet` for `rows` rows, and `NAME.csv` if asked for.
    pub(super) fn create(subject: Subject<'a>, dir: &Path, name: &str, rows: usize, csv: bool) -> Result<RowWriter<'a>> {
        let schema = subject.schema();
        let properties = WriterProperties::builder().set_compression(Compression::SNAPPY).build();
        let (whole, file) = Whole::create(dir, &format!("{name}.parquet"), PARQUET_ROW * rows as f64)?;
        let parquet = ArrowWriter::try_new(file, schema.clone(), Some(properties)).map_err(|e| whole.failed(&e))?;
        let csv = if csv {
            let (whole, file) = Whole::create(dir, &format!("{name}.csv"), CSV_ROW * rows as f64)?;
            let mut writer = csv::Writer::from_writer(file);
            writer.write_record(schema.fields().iter().map(|f| f.name())).map_err(|e| whole.failed(&e))?;
            Some((whole, writer))
        } else {
            None
        };
        Ok(RowWriter { subject, schema, parquet: (whole, parquet), csv, waiting: Vec::with_capacity(BATCH.min(rows)) })
    }

    /// Adds rows [set, asset] of one cost.
    pub(super) fn push(&mut self, cost: usize, sets: Range<usize>, rows: &[Row]) -> Result<()> {
        let assets = self.subject.run.assets();
        for (set, rows) in sets.zip(rows.chunks_exact(assets)) {
            for (asset, &row) in rows.iter().enumerate() {
                self.waiting.push(Placed { cost: cost as u32, set: set as u32, asset: asset as u32, row });
                if self.waiting.len() == BATCH {
                    self.flush()?;
                }
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        let (run, rows) = (self.subject.run, std::mem::take(&mut self.waiting));
        let symbol = |p: &Placed| self.subject.prices.symbols[p.asset as usize].as_str();
        let cost = |p: &Placed| run.config().cost_bps[p.cost as usize];
        // Neighbouring rows are of the same set.
        let mut sets: Vec<(u32, Vec<f32>)> = Vec::new();
        for p in &rows {
            if sets.last().is_none_or(|last| last.0 != p.set) {
                sets.push((p.set, run.set(p.set as usize).into_iter().map(|(_, value)| value).collect()));
            }
        }
        let mut parameters: Vec<Vec<f32>> = vec![Vec::with_capacity(rows.len()); sets.first().map_or(0, |s| s.1.len())];
        let mut at = 0;
        for p in &rows {
            at += usize::from(sets[at].0 != p.set);
            parameters.iter_mut().zip(&sets[at].1).for_each(|(column, &value)| column.push(value));
        }
        let real = |f: &dyn Fn(&Row) -> f32| -> ArrayRef { Arc::new(rows.iter().map(|p| Some(f(&p.row)).filter(|x| !x.is_nan())).collect::<Float32Array>()) };
        let ids = || rows.iter().map(|p| run.id(p.set as usize));
        let number: ArrayRef = if self.schema.field(1).data_type() == &DataType::UInt32 {
            Arc::new(ids().map(|id| Some(id as u32)).collect::<UInt32Array>())
        } else {
            Arc::new(ids().map(Some).collect::<UInt64Array>())
        };
        let mut columns: Vec<ArrayRef> = vec![Arc::new(rows.iter().map(|p| Some(cost(p) as f32)).collect::<Float32Array>()), number];
        columns.extend(parameters.iter().map(|column| -> ArrayRef { Arc::new(Float32Array::from(column.clone())) }));
        columns.push(Arc::new(rows.iter().map(|p| Some(symbol(p))).collect::<StringArray>()));
        columns.extend([real(&|r| r.sharpe), real(&|r| r.total_return), real(&|r| r.max_drawdown), real(&|r| r.turnover)]);
        columns.push(Arc::new(rows.iter().map(|p| Some(p.row.trades)).collect::<UInt32Array>()));
        let batch = RecordBatch::try_new(self.schema.clone(), columns).map_err(|e| Error::Internal(e.to_string()))?;
        self.parquet.1.write(&batch).map_err(|e| self.parquet.0.failed(&e))?;
        if let Some((whole, csv)) = &mut self.csv {
            let number = |x: f64| if x.is_nan() { String::new() } else { format!("{}", x as f32) };
            for (i, p) in rows.iter().enumerate() {
                let mut record = vec![number(cost(p)), run.id(p.set as usize).to_string()];
                record.extend(parameters.iter().map(|column| column[i].to_string()));
                record.push(symbol(p).to_string());
                record.extend([p.row.sharpe, p.row.total_return, p.row.max_drawdown, p.row.turnover].map(|x| number(f64::from(x))));
                record.push(p.row.trades.to_string());
                csv.write_record(&record).map_err(|e| whole.failed(&e))?;
            }
        }
        self.waiting = rows;
        self.waiting.clear();
        Ok(())
    }

    /// Closes the files; they appear when the result is kept.
    pub(super) fn close(mut self) -> Result<Vec<Whole>> {
        if !self.waiting.is_empty() {
            self.flush()?;
        }
        let (whole, writer) = self.parquet;
        writer.close().map_err(|e| whole.failed(&e))?;
        let mut done = vec![whole];
        if let Some((whole, mut csv)) = self.csv {
            csv.flush().map_err(|e| whole.failed(&e))?;
            done.push(whole);
        }
        Ok(done)
    }
}

/// Where the rows of a finished sweep are.
pub(super) enum Rows<'a> {
    /// In memory [cost, set, asset].
    Kept(&'a [Row]),
    /// In the parts of these stores.
    Stored(&'a [Store]),
}

impl Rows<'_> {
    fn pour(&self, into: &mut RowWriter<'_>) -> Result<()> {
        let run = into.subject.run;
        let costs = run.config().cost_bps.len();
        match self {
            Rows::Kept(rows) => {
                for (cost, rows) in rows.chunks_exact((rows.len() / costs).max(1)).enumerate() {
                    into.push(cost, 0..run.len(), rows)?;
                }
            }
            Rows::Stored(stores) => {
                let mut parts: Vec<_> = stores.iter().flat_map(|store| store.parts().iter().map(move |sets| (store, sets))).collect();
                parts.sort_by_key(|(_, sets)| sets.start);
                for cost in 0..costs {
                    for (store, sets) in &parts {
                        let rows = store.rows(sets, run.assets(), Some(cost))?;
                        into.push(cost, (*sets).clone(), &rows)?;
                    }
                }
            }
        }
        Ok(())
    }
}

// ---- a finished sweep ------------------------------------------------------------------------------------------------

/// Writes the results of a finished sweep: rows, choices, out-of-sample series, provenance and the configuration.
pub(super) fn write(dir: &Path, subject: Subject<'_>, rows: &Rows<'_>, report: &SweepReport, run: &Value, config: &str) -> Result<()> {
    let (prices, n) = (subject.prices, report.sets.len() * report.assets * report.costs.len());
    let with_csv = n <= MOST_CSV_ROWS;
    let mut writer = RowWriter::create(subject, dir, "results", n, with_csv)?;
    rows.pour(&mut writer)?;
    let mut done = writer.close()?;
    if !report.windows.is_empty() {
        done.push(choices(dir, report, prices)?);
    }
    done.push(out_of_sample(dir, report, prices)?);
    let (whole, file) = Whole::create(dir, "run.json", 4096.0)?;
    serde_json::to_writer_pretty(file, run).map_err(|e| whole.failed(&e))?;
    done.push(whole);
    // What an earlier run left and this one does not have would contradict it; where there is nothing, there is nothing to remove.
    for (name, stale) in [("walk_forward.csv", report.windows.is_empty()), ("results.csv", !with_csv)] {
        if stale {
            let _ = std::fs::remove_file(dir.join(name));
        }
    }
    for whole in done {
        whole.keep()?;
    }
    Whole::text(dir, "config.toml", config)?;
    if !with_csv {
        eprintln!("note: {n} rows are in results.parquet; there is no results.csv above {MOST_CSV_ROWS} rows");
    }
    Ok(())
}

/// `walk_forward.csv`: the chosen set of every cost, window and asset.
fn choices(dir: &Path, report: &SweepReport, prices: &Prices) -> Result<Whole> {
    let (whole, file) = Whole::create(dir, "walk_forward.csv", 120.0 * (report.windows.len() * report.assets * report.costs.len()) as f64)?;
    let mut csv = csv::Writer::from_writer(file);
    let fail = |e: csv::Error| whole.failed(&e);
    let fixed = ["cost_bps", "selection", "symbol", "window", "train_from", "train_to", "test_from", "test_to", "set"];
    csv.write_record(fixed.iter().chain(&report.sets.names)).map_err(fail)?;
    // Return j is earned from bar j to bar j + 1.
    let time = |j: u32| prices.format_time(prices.times[(j as usize).min(prices.times.len() - 1)]);
    for level in &report.costs {
        for (selection, chosen) in [("per_asset", &level.per_asset), ("pooled", &level.pooled)] {
            let Some(OutOfSample { best, .. }) = chosen else { continue };
            for (i, &set) in best.iter().enumerate() {
                let (slot, window) = (i / report.windows.len(), i % report.windows.len());
                let w = report.windows[window];
                let symbol = if selection == "pooled" { "*" } else { &prices.symbols[slot] };
                let mut record = vec![level.cost_bps.to_string(), selection.into(), symbol.to_string(), window.to_string()];
                record.extend(w.map(time));
                record.push(report.id(set as usize).to_string());
                record.extend(report.sets.get(set as usize).iter().map(|(_, v)| v.to_string()));
                csv.write_record(&record).map_err(fail)?;
            }
        }
    }
    csv.flush().map_err(|e| whole.failed(&e))?;
    drop(csv);
    Ok(whole)
}

/// `out_of_sample.csv`: the stitched equal-weight portfolios and buy-and-hold, bar by bar.
fn out_of_sample(dir: &Path, report: &SweepReport, prices: &Prices) -> Result<Whole> {
    let (whole, file) = Whole::create(dir, "out_of_sample.csv", 60.0 * report.stitched_bars.len() as f64)?;
    let mut csv = csv::Writer::from_writer(file);
    let fail = |e: csv::Error| whole.failed(&e);
    let mut columns: Vec<(String, &[f32])> = Vec::new();
    for level in &report.costs {
        for (name, chosen) in [("per_asset", &level.per_asset), ("pooled", &level.pooled)] {
            columns.extend(chosen.iter().map(|c| (format!("{name}_{}bps", level.cost_bps), c.returns.as_slice())));
        }
    }
    columns.extend(report.buy_and_hold.iter().map(|b| ("buy_and_hold".to_string(), b.returns.as_slice())));
    csv.write_record(["time"].into_iter().chain(columns.iter().map(|c| c.0.as_str()))).map_err(fail)?;
    let bars: Vec<u32> = if report.windows.is_empty() { (report.start..report.bars.saturating_sub(1) as u32).collect() } else { report.stitched_bars.clone() };
    for (k, &j) in bars.iter().enumerate() {
        let time = prices.format_time(prices.times[j as usize + 1]);
        csv.write_record([time].into_iter().chain(columns.iter().map(|c| c.1[k].to_string()))).map_err(fail)?;
    }
    csv.flush().map_err(|e| whole.failed(&e))?;
    drop(csv);
    Ok(whole)
}
