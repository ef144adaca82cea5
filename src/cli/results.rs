//! `--out DIR`: results as Parquet and CSV with provenance. Files are written under temporary names and renamed when they are
//! whole, so that nothing half-written is left behind.

use crate::data::Prices;
use crate::kernels::backtest_sweep::Chunk;
use crate::sim::grid::ParameterSets;
use crate::sim::sweep::{OutOfSample, SweepReport};
use crate::{Error, Result};
use arrow_array::{ArrayRef, Float32Array, RecordBatch, StringArray, UInt32Array};
use arrow_schema::{DataType, Field, Schema};
use parquet::arrow::ArrowWriter;
use parquet::basic::Compression;
use parquet::file::properties::WriterProperties;
use serde_json::Value;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A file that appears under its name only when it is whole.
pub(super) struct Whole {
    pub(super) path: PathBuf,
    partial: PathBuf,
    kept: bool,
}

impl Whole {
    pub(super) fn create(dir: &Path, name: &str) -> Result<(Whole, File)> {
        let whole = Whole { path: dir.join(name), partial: dir.join(format!(".{name}.{}", std::process::id())), kept: false };
        let file = File::create(&whole.partial).map_err(|e| io(&whole.partial, &e))?;
        Ok((whole, file))
    }

    pub(super) fn keep(mut self) -> Result<()> {
        std::fs::rename(&self.partial, &self.path).map_err(|e| io(&self.path, &e))?;
        self.kept = true;
        Ok(())
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

/// Metrics of a row, after the parameters.
const METRICS: [&str; 5] = ["sharpe", "total_return", "max_drawdown", "turnover", "trades"];

/// Streams a row per cost, set and asset into `results.parquet` and `results.csv` while the sweep runs.
pub(super) struct Results {
    dir: PathBuf,
    parquet: (Whole, ArrowWriter<File>),
    csv: (Whole, csv::Writer<File>),
    schema: Arc<Schema>,
}

impl Results {
    /// Makes the folder and opens the files.
    pub(super) fn create(dir: &Path, sets: &[&str], provenance: &Value) -> Result<Results> {
        if dir.is_file() {
            return Err(io(dir, &"this is a file; name a folder with --out"));
        }
        std::fs::create_dir_all(dir).map_err(|e| io(dir, &e))?;
        let mut fields = vec![Field::new("cost_bps", DataType::Float32, false), Field::new("set", DataType::UInt32, false)];
        fields.extend(sets.iter().map(|name| Field::new(*name, DataType::Float32, false)));
        fields.push(Field::new("symbol", DataType::Utf8, false));
        fields.extend(METRICS[..4].iter().map(|name| Field::new(*name, DataType::Float32, true)));
        fields.push(Field::new(METRICS[4], DataType::UInt32, false));
        let metadata: std::collections::HashMap<String, String> = [("forback".to_string(), provenance.to_string())].into();
        let schema = Arc::new(Schema::new(fields).with_metadata(metadata));
        let properties = WriterProperties::builder().set_compression(Compression::SNAPPY).build();
        let (whole, file) = Whole::create(dir, "results.parquet")?;
        let parquet = ArrowWriter::try_new(file, schema.clone(), Some(properties)).map_err(|e| io(&whole.path, &e))?;
        let (whole_csv, file) = Whole::create(dir, "results.csv")?;
        let mut csv = csv::Writer::from_writer(file);
        csv.write_record(schema.fields().iter().map(|f| f.name())).map_err(|e| io(&whole_csv.path, &e))?;
        Ok(Results { dir: dir.to_path_buf(), parquet: (whole, parquet), csv: (whole_csv, csv), schema })
    }

    /// Writes the rows of a chunk.
    pub(super) fn write(&mut self, chunk: &Chunk, cost_bps: f64, sets: &ParameterSets, symbols: &[String]) -> Result<()> {
        // Row groups of bounded size, whatever the chunk.
        let per_group = (1_000_000 / chunk.assets.len().max(1)).max(1);
        let mut first = chunk.sets.start;
        while first < chunk.sets.end {
            let last = chunk.sets.end.min(first + per_group);
            let rows: Vec<(usize, usize)> = (first..last).flat_map(|s| chunk.assets.clone().map(move |a| (s, a))).collect();
            let stats: Vec<_> = rows.iter().map(|&(s, a)| chunk.stats(s, a)).collect();
            let real = |f: &dyn Fn(usize) -> f64| -> ArrayRef {
                Arc::new((0..rows.len()).map(|i| Some(f(i) as f32).filter(|x| !x.is_nan())).collect::<Float32Array>())
            };
            let mut columns: Vec<ArrayRef> = vec![
                Arc::new(Float32Array::from(vec![cost_bps as f32; rows.len()])),
                Arc::new(rows.iter().map(|&(s, _)| s as u32).collect::<Vec<_>>().into_iter().map(Some).collect::<UInt32Array>()),
            ];
            columns.extend(sets.columns.iter().map(|c| real(&|i| f64::from(c[rows[i].0]))));
            columns.push(Arc::new(rows.iter().map(|&(_, a)| Some(symbols[a].as_str())).collect::<StringArray>()));
            columns.push(real(&|i| stats[i].sharpe));
            columns.push(real(&|i| stats[i].total_return));
            columns.push(real(&|i| stats[i].max_drawdown));
            columns.push(real(&|i| stats[i].turnover));
            columns.push(Arc::new(stats.iter().map(|s| Some(s.trades as u32)).collect::<UInt32Array>()));
            let batch = RecordBatch::try_new(self.schema.clone(), columns).map_err(|e| Error::Internal(e.to_string()))?;
            self.parquet.1.write(&batch).map_err(|e| io(&self.parquet.0.path, &e))?;
            for (i, &(s, a)) in rows.iter().enumerate() {
                let number = |x: f64| if x.is_nan() { String::new() } else { format!("{}", x as f32) };
                let mut record = vec![number(cost_bps), s.to_string()];
                record.extend(sets.columns.iter().map(|c| c[s].to_string()));
                record.push(symbols[a].clone());
                record.extend([stats[i].sharpe, stats[i].total_return, stats[i].max_drawdown, stats[i].turnover].map(number));
                record.push(stats[i].trades.to_string());
                self.csv.1.write_record(&record).map_err(|e| io(&self.csv.0.path, &e))?;
            }
            first = last;
        }
        Ok(())
    }

    /// Closes the rows, and writes the choices, the out-of-sample series and the provenance.
    pub(super) fn finish(self, report: &SweepReport, prices: &Prices, provenance: &Value) -> Result<()> {
        let Results { dir, parquet: (whole, writer), csv: (whole_csv, mut csv), .. } = self;
        writer.close().map_err(|e| io(&whole.path, &e))?;
        csv.flush().map_err(|e| io(&whole_csv.path, &e))?;
        drop(csv);
        let choices = if report.windows.is_empty() { None } else { Some(choices(&dir, report, prices)?) };
        let series = out_of_sample(&dir, report, prices)?;
        let (run, file) = Whole::create(&dir, "run.json")?;
        serde_json::to_writer_pretty(file, provenance).map_err(|e| io(&run.path, &e))?;
        if choices.is_none() {
            // Choices of an earlier run would contradict this one; where there are none, there is nothing to remove.
            let _ = std::fs::remove_file(dir.join("walk_forward.csv"));
        }
        for whole in [Some(whole), Some(whole_csv), choices, Some(series), Some(run)].into_iter().flatten() {
            whole.keep()?;
        }
        Ok(())
    }
}

/// `walk_forward.csv`: the chosen set of every cost, window and asset.
fn choices(dir: &Path, report: &SweepReport, prices: &Prices) -> Result<Whole> {
    let (whole, file) = Whole::create(dir, "walk_forward.csv")?;
    let mut csv = csv::Writer::from_writer(file);
    let fail = |e: csv::Error| io(&dir.join("walk_forward.csv"), &e);
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
                record.push(set.to_string());
                record.extend(report.sets.get(set as usize).iter().map(|(_, v)| v.to_string()));
                csv.write_record(&record).map_err(fail)?;
            }
        }
    }
    csv.flush().map_err(|e| io(&whole.path, &e))?;
    Ok(whole)
}

/// `out_of_sample.csv`: the stitched equal-weight portfolios and buy-and-hold, bar by bar.
fn out_of_sample(dir: &Path, report: &SweepReport, prices: &Prices) -> Result<Whole> {
    let (whole, file) = Whole::create(dir, "out_of_sample.csv")?;
    let mut csv = csv::Writer::from_writer(file);
    let fail = |e: csv::Error| io(&dir.join("out_of_sample.csv"), &e);
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
    csv.flush().map_err(|e| io(&whole.path, &e))?;
    Ok(whole)
}
