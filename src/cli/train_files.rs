//! `forback train --out DIR`: predictions.parquet, models/*.safetensors, train.json; log.jsonl is written while it trains.
//!
//! predictions.parquet has a row per bar and asset out of sample: time, symbol, fold, prediction, naive, truth (empty where it lies ahead of the
//! data), and, where there is a position, weight: its share of capital, 1/N of all assets each. `forback sweep --signals` reads time, symbol and
//! weight.

use super::results::{Whole, io};
use super::train::Found;
use crate::nn::Parameters;
use crate::{Error, Result};
use arrow_array::{ArrayRef, Float32Array, Float64Array, RecordBatch, StringArray, UInt32Array};
use arrow_schema::{DataType, Field, Schema};
use parquet::arrow::ArrowWriter;
use parquet::basic::Compression;
use parquet::file::properties::WriterProperties;
use std::path::Path;
use std::sync::Arc;

pub(super) fn write(dir: &Path, found: &Found<'_>) -> Result<()> {
    predictions(dir, found)?;
    let text = serde_json::to_string_pretty(&found.json()).map_err(|e| Error::Internal(e.to_string()))?;
    Whole::text(dir, "train.json", &text)
}

/// Every model as a state_dict.
pub(super) fn models(dir: &Path, parameters: &Parameters, name: &dyn Fn(usize) -> String) -> Result<()> {
    let folder = dir.join("models");
    std::fs::create_dir_all(&folder).map_err(|e| io(&folder, &e))?;
    parameters.save_each(&|k| folder.join(name(k)))
}

fn predictions(dir: &Path, found: &Found<'_>) -> Result<()> {
    let (rows, prices) = (&found.predictions, &found.job.prices);
    let share = 1.0 / prices.n_assets() as f32;
    let mut fields = vec![
        Field::new("time", DataType::Utf8, false),
        Field::new("symbol", DataType::Utf8, false),
        Field::new("fold", DataType::UInt32, false),
        Field::new("prediction", DataType::Float64, false),
        Field::new("naive", DataType::Float64, true),
        Field::new("truth", DataType::Float64, true),
    ];
    let real = |f: &dyn Fn(&super::train::Prediction) -> f64| -> ArrayRef {
        Arc::new(rows.iter().map(|p| Some(f(p)).filter(|x| x.is_finite())).collect::<Float64Array>())
    };
    let mut arrays: Vec<ArrayRef> = vec![
        Arc::new(rows.iter().map(|p| Some(prices.format_time(prices.times[p.bar]))).collect::<StringArray>()),
        Arc::new(rows.iter().map(|p| Some(prices.symbols[p.asset].as_str())).collect::<StringArray>()),
        Arc::new(rows.iter().map(|p| Some(p.fold)).collect::<UInt32Array>()),
        real(&|p| p.value),
        real(&|p| p.naive),
        real(&|p| p.truth),
    ];
    if rows.iter().all(|p| p.position.is_some()) {
        fields.push(Field::new("weight", DataType::Float32, false));
        arrays.push(Arc::new(rows.iter().map(|p| p.position.map(|w| w * share)).collect::<Float32Array>()));
    }
    let metadata: std::collections::HashMap<String, String> = [("forback".to_string(), found.job.identity_text())].into();
    let schema = Arc::new(Schema::new(fields).with_metadata(metadata));
    let properties = WriterProperties::builder().set_compression(Compression::SNAPPY).build();
    let (whole, file) = Whole::create(dir, "predictions.parquet", rows.len() as f64 * 60.0)?;
    let mut writer = ArrowWriter::try_new(file, schema.clone(), Some(properties)).map_err(|e| io(&whole.path, &e))?;
    let batch = RecordBatch::try_new(schema, arrays).map_err(|e| Error::Internal(e.to_string()))?;
    writer.write(&batch).map_err(|e| io(&whole.path, &e))?;
    writer.close().map_err(|e| io(&whole.path, &e))?;
    whole.keep()
}
