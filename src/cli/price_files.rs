//! Price files as every command takes them: which part of them, and the synthetic market where there is none.

use crate::data::{Missing, Prices, ReadOptions, read_prices};
use crate::sim::market;
use crate::{Error, Result};
use std::path::PathBuf;

/// Which part of price files to read, and how.
#[derive(clap::Args)]
pub(super) struct Columns {
    /// Symbols to use, comma-separated.
    #[arg(long, value_delimiter = ',')]
    pub(super) symbols: Option<Vec<String>>,
    /// First date to use.
    #[arg(long)]
    pub(super) from: Option<String>,
    /// Last date to use.
    #[arg(long)]
    pub(super) to: Option<String>,
    /// Price column of a long file (default close).
    #[arg(long)]
    pub(super) price: Option<String>,
    /// Time column, where its name does not tell.
    #[arg(long)]
    time_column: Option<String>,
    /// Missing cells: error, drop (the asset) or fill[:N] (carry the last price over at most N bars).
    #[arg(long, default_value = "error")]
    missing: String,
    /// Return periods per year; derived from the dates otherwise.
    #[arg(long, allow_negative_numbers = true)]
    pub(super) periods_per_year: Option<f64>,
}

impl Columns {
    /// `any_sign`: for columns that are no prices.
    pub(super) fn options(&self, any_sign: bool) -> Result<ReadOptions> {
        Ok(ReadOptions {
            time_column: self.time_column.clone(),
            price: self.price.clone(),
            symbols: self.symbols.clone(),
            from: self.from.clone(),
            to: self.to.clone(),
            missing: self.missing.parse::<Missing>()?,
            any_sign,
        })
    }

    /// Refuses, for command `op`, what is no way to treat missing cells, and periods per year that are no such number.
    pub(super) fn check(&self, op: &'static str) -> Result<()> {
        self.missing.parse::<Missing>()?;
        let Some(p) = self.periods_per_year.filter(|p| !(p.is_finite() && *p > 0.0)) else { return Ok(()) };
        Err(Error::Parameter {
            op,
            name: "--periods-per-year".into(),
            value: p.to_string(),
            help: "give the number of bars per year, 252 for daily equities".into(),
        })
    }

    /// As given, or derived from the dates.
    pub(super) fn periods_per_year(&self, prices: &Prices) -> Result<f64> {
        self.periods_per_year.map_or_else(|| prices.periods_per_year(), Ok)
    }

    /// The option that was given although there is no file that it could be about.
    pub(super) fn given(&self) -> Option<&'static str> {
        let given = [
            ("--symbols", self.symbols.is_some()),
            ("--from", self.from.is_some()),
            ("--to", self.to.is_some()),
            ("--price", self.price.is_some()),
            ("--time-column", self.time_column.is_some()),
        ];
        given.iter().find(|(_, given)| *given).map(|(name, _)| *name)
    }
}

/// Price files, or a synthetic market.
#[derive(clap::Args)]
pub(super) struct PriceFiles {
    /// Price files: CSV, CSV.gz or Parquet, wide (date,AAA,BBB,…) or long (date,symbol,open,high,low,close,volume).
    /// Without one, a seeded regime-switching market.
    pub(super) files: Vec<PathBuf>,
    #[command(flatten)]
    pub(super) columns: Columns,
    /// Bars of the synthetic market.
    #[arg(long, default_value_t = 2520)]
    bars: usize,
    /// Assets of the synthetic market.
    #[arg(long, default_value_t = 1)]
    assets: usize,
}

impl PriceFiles {
    /// The prices that command `op` is about.
    pub(super) fn read(&self, op: &'static str, any_sign: bool, seed: u64) -> Result<Prices> {
        if !self.files.is_empty() {
            return read_prices(&self.files, &self.columns.options(any_sign)?);
        }
        if let Some(name) = self.columns.given() {
            return Err(Error::Parameter { op, name: name.into(), value: "given".into(), help: format!("needs a price file: forback {op} prices.csv") });
        }
        self.synthetic(seed)
    }

    /// A seeded market without a file.
    fn synthetic(&self, seed: u64) -> Result<Prices> {
        let market = market::synthetic(self.bars, self.assets, seed)?;
        Ok(Prices {
            symbols: market.symbols,
            times: market.dates,
            has_time_of_day: false,
            close: market.close,
            open: None,
            sources: vec![format!("synthetic regime-switching market, seed {seed}")],
            sha256: String::new(),
            dropped: Vec::new(),
            filled: Vec::new(),
            price_column: "close".into(),
            notes: Vec::new(),
        })
    }
}
