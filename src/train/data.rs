//! What models are trained on: windows of rows of a table, and the rows that each model may see.
//!
//! A sample is the last row t of a window: x is rows t−T+1 … t of `features`, y is row t of `targets`. A target at row t may look ahead (the return
//! from t to t+h), so a sample of a training window must have t + h inside it: [`crate::train::walk_forward`] purges those that do not.

use crate::{Error, Result};
use ndarray::ArrayView2;

/// Features and targets of the same rows.
#[derive(Debug, Clone)]
pub struct Table {
    /// [rows,I], row-major.
    pub features: Vec<f32>,
    /// [rows,O], row-major.
    pub targets: Vec<f32>,
    /// I.
    pub inputs: usize,
    /// O.
    pub outputs: usize,
    /// T, rows of a window.
    pub window: usize,
    /// Series of equal length that stand one after the other, such as assets; no window reaches from one into another.
    pub series: usize,
}

impl Table {
    /// Checks and copies a table.
    /// # Errors
    /// `Shape` if the numbers of rows differ; `Parameter` naming row and column of a value that is not finite, or a window beyond the rows.
    pub fn new(features: ArrayView2<'_, f32>, targets: ArrayView2<'_, f32>, window: usize) -> Result<Table> {
        let (rows, inputs) = features.dim();
        if targets.nrows() != rows {
            let got = format!("{} rows", targets.nrows());
            return Err(Error::Shape { op: "table", arg: "targets".into(), expected: format!("{rows} rows, as the features have"), got });
        }
        if window == 0 || window > rows {
            let help = format!("a window has 1 to {rows} rows here");
            return Err(Error::Parameter { op: "table", name: "window".into(), value: window.to_string(), help });
        }
        for (what, values) in [("features", &features), ("targets", &targets)] {
            if let Some(((row, column), value)) = values.indexed_iter().find(|(_, v)| !v.is_finite()) {
                let help = "fill or drop such rows before training".into();
                return Err(Error::Parameter { op: "table", name: format!("{what}, row {row}, column {column}"), value: value.to_string(), help });
            }
        }
        let flat = |x: ArrayView2<'_, f32>| x.iter().copied().collect();
        Ok(Table { features: flat(features), targets: flat(targets), inputs, outputs: targets.ncols(), window, series: 1 })
    }

    /// The same rows as `series` stretches of equal length, one after the other.
    /// # Errors
    /// `Parameter` where the rows do not divide, or a series is shorter than a window.
    pub fn stacked(self, series: usize) -> Result<Table> {
        if series == 0 || !self.rows().is_multiple_of(series) || self.rows() / series < self.window {
            let help = format!("{} rows make series of equal length, each at least a window of {} rows", self.rows(), self.window);
            return Err(Error::Parameter { op: "table", name: "series".into(), value: series.to_string(), help });
        }
        Ok(Table { series, ..self })
    }

    /// Rows of one series.
    pub fn rows_of_series(&self) -> usize {
        self.rows() / self.series.max(1)
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.features.len() / self.inputs.max(1)
    }

    /// Rows of the windows of some samples, in order: ids [samples,T].
    pub fn ids(&self, samples: &[u32]) -> Vec<u32> {
        let t = self.window as u32;
        samples.iter().flat_map(|&last| last + 1 - t..=last).collect()
    }

    /// Mean and 1/deviation of each feature over rows `from..to`: a scaler that knows these rows alone. A constant feature has scale 1.
    pub fn scaler(&self, rows: std::ops::Range<usize>) -> Vec<[f32; 2]> {
        self.scaler_of(&[rows])
    }

    /// The same over several stretches of rows.
    pub fn scaler_of(&self, rows: &[std::ops::Range<usize>]) -> Vec<[f32; 2]> {
        let rows: Vec<_> = rows.iter().map(|r| r.start.min(self.rows())..r.end.min(self.rows())).collect();
        let n = rows.iter().map(|r| r.len()).sum::<usize>().max(1) as f64;
        let column = |i: usize| rows.iter().cloned().flatten().map(move |t| f64::from(self.features[t * self.inputs + i]));
        let one = |i: usize| {
            let mean = column(i).sum::<f64>() / n;
            let deviation = (column(i).map(|x| (x - mean) * (x - mean)).sum::<f64>() / n).sqrt();
            [mean as f32, if deviation > 1e-12 * mean.abs().max(1e-30) { (1.0 / deviation) as f32 } else { 1.0 }]
        };
        (0..self.inputs).map(one).collect()
    }
}

/// Samples and scaler of one model.
#[derive(Debug, Clone, PartialEq)]
pub struct Fold {
    /// Last rows of the windows that it learns from.
    pub train: Vec<u32>,
    /// Last rows of the windows that choose its best epoch; may be empty, then the training loss does.
    pub valid: Vec<u32>,
    /// Last rows of the windows that it predicts.
    pub test: Vec<u32>,
    /// Mean and 1/deviation of each feature.
    pub scaler: Vec<[f32; 2]>,
}
