//! The market that is hedged in: from parameters, from a price history (volatility, regimes, bootstrap, replay), or from option quotes
//! (implied volatility, Heston).

use super::{bad, fraction, positive};
use crate::cli::price_files::Columns;
use crate::cli::sweep::unknown;
use crate::data::options::{ChainOptions, Crossed, ExpiryForward, OptionChain, QuoteVolatility, SurfaceFilter, read_chain};
use crate::data::{Prices, read_prices};
use crate::kernels::implied_volatility::VolatilityStatus;
use crate::regimes::{Panel, RegimeConfig, regimes};
use crate::sim::calibrate::{HestonFitOptions, calibrate_heston, calibrate_volatility};
use crate::sim::hedge::{Jumps, Market, Model, Variance};
use crate::{Device, Error, Result};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// Options that say what moves the price.
#[derive(clap::Args)]
pub(super) struct MarketArgs {
    /// What moves the price: gbm, heston, merton, bates, regimes, bootstrap (blocks of a history) or replay (a history itself).
    #[arg(long, default_value = "gbm")]
    pub(super) model: String,
    /// Price history (CSV, CSV.gz or Parquet): calibrates the volatility and gives the spot; regimes are fitted on it, bootstrap and replay
    /// take its returns themselves.
    #[arg(long, value_name = "FILE", conflicts_with = "chain")]
    prices: Option<PathBuf>,
    /// Option quotes (CSV or CSV.gz): spot, rate and expiry, and the implied volatility nearest the money, or Heston fitted to all.
    #[arg(long, value_name = "FILE")]
    chain: Option<PathBuf>,
    /// Crossed quotes (bid above ask) of --chain are left out instead of refused.
    #[arg(long, requires = "chain")]
    drop_crossed: bool,
    #[command(flatten)]
    columns: Columns,
    /// Price now, in currency (default 100, or the last one of the file).
    #[arg(long, allow_negative_numbers = true)]
    spot: Option<f64>,
    /// Riskless rate a year, continuously compounded, as a fraction (0.03 for 3 %; default 0, or that of --chain).
    #[arg(long, allow_negative_numbers = true)]
    rate: Option<f64>,
    /// Dividend yield a year, continuously compounded, as a fraction (default 0, or that of --chain).
    #[arg(long, allow_negative_numbers = true)]
    dividend: Option<f64>,
    /// Growth a year of the expected price, as a fraction (default: rate − dividend; with regimes fitted to a history, and with bootstrap and
    /// replay, added to the history's own, default 0).
    #[arg(long, allow_negative_numbers = true)]
    drift: Option<f64>,
    /// Volatility a year, as a fraction; several are several markets over the same random numbers (default 0.2, or calibrated).
    #[arg(long, value_delimiter = ',', allow_negative_numbers = true)]
    volatility: Vec<f64>,
    /// Heston, Bates: variance a year at the start (default: volatility²).
    #[arg(long, allow_negative_numbers = true)]
    variance: Option<f64>,
    /// Heston, Bates: long-run variance a year (default: that at the start).
    #[arg(long, allow_negative_numbers = true)]
    mean_variance: Option<f64>,
    /// Heston, Bates: speed of mean reversion a year (default 2).
    #[arg(long, allow_negative_numbers = true)]
    reversion: Option<f64>,
    /// Heston, Bates: volatility of variance a year (default 0.3).
    #[arg(long, allow_negative_numbers = true)]
    vol_of_vol: Option<f64>,
    /// Heston, Bates: correlation of price and variance, between -1 and 1 (default -0.7).
    #[arg(long, allow_negative_numbers = true)]
    correlation: Option<f64>,
    /// Merton, Bates: jumps a year (default 0.5).
    #[arg(long, allow_negative_numbers = true)]
    jump_intensity: Option<f64>,
    /// Merton, Bates: mean of a jump of the log price (default -0.1).
    #[arg(long, allow_negative_numbers = true)]
    jump_mean: Option<f64>,
    /// Merton, Bates: standard deviation of a jump of the log price (default 0.15).
    #[arg(long, allow_negative_numbers = true)]
    jump_sd: Option<f64>,
    /// Regimes: volatility a year of each (default 0.12,0.3).
    #[arg(long, value_delimiter = ',', allow_negative_numbers = true)]
    regime_volatility: Vec<f64>,
    /// Regimes: growth a year of each, added to the drift (default 0 each).
    #[arg(long, value_delimiter = ',', allow_negative_numbers = true)]
    regime_drift: Vec<f64>,
    /// Regimes: probability of each to last from one step to the next; others follow alike (default 0.99,0.96).
    #[arg(long, value_delimiter = ',', allow_negative_numbers = true)]
    regime_stay: Vec<f64>,
    /// Regimes: how many are fitted to --prices (default 2).
    #[arg(long, value_name = "K")]
    states: Option<usize>,
    /// Bootstrap: mean length of a block, in bars (default 21).
    #[arg(long, value_name = "BARS", allow_negative_numbers = true)]
    block: Option<f64>,
    /// Bootstrap: blocks of one length instead of geometric ones.
    #[arg(long)]
    circular: bool,
}

/// Markets, and what is known about the option from their source.
pub(super) struct Source {
    pub(super) markets: Vec<Market>,
    pub(super) maturity: f64,
    pub(super) steps: u32,
    /// Prices [P,T+1] of given paths, and how many there are.
    pub(super) given: Option<Vec<f32>>,
    pub(super) paths: Option<u64>,
    /// Volatility of deltas, where the market has none of its own.
    pub(super) hedge_volatility: Option<f64>,
    /// What it is made of, for people.
    pub(super) line: String,
    pub(super) notes: Vec<String>,
    pub(super) json: Value,
}

impl Source {
    pub(super) fn spot(&self) -> f64 {
        self.markets.first().map_or(f64::NAN, |m| m.spot)
    }
}

const MODELS: [&str; 7] = ["gbm", "heston", "merton", "bates", "regimes", "bootstrap", "replay"];

/// Years and steps that were asked for.
#[derive(Clone, Copy)]
pub(super) struct Horizon {
    pub(super) maturity: Option<f64>,
    pub(super) steps: Option<u32>,
}

impl MarketArgs {
    pub(super) fn source(&self, device: &Device, horizon: Horizon, seed: u64, most: u64) -> Result<Source> {
        self.check()?;
        if let Some(years) = horizon.maturity {
            positive("--maturity", years, "give the years to expiry, such as 0.25 for three months")?;
        }
        if horizon.steps == Some(0) {
            return Err(bad("--steps", "0", "give at least one step, such as 252 a year"));
        }
        match (&self.prices, &self.chain) {
            (Some(file), _) => self.of_history(device, file, horizon, seed, most),
            (None, Some(file)) => self.of_chain(device, file, horizon),
            (None, None) => self.of_parameters(horizon),
        }
    }

    fn check(&self) -> Result<()> {
        if !MODELS.contains(&self.model.as_str()) {
            return Err(unknown("model", &self.model, MODELS));
        }
        self.columns.check("hedge")?;
        if let Some(name) = self.columns.given().filter(|_| self.prices.is_none() && self.chain.is_none()) {
            return Err(bad(name, "given", "needs a file: forback hedge --prices FILE"));
        }
        self.refuse_unused()?;
        if let Some(spot) = self.spot {
            positive("--spot", spot, "give the price now, in currency")?;
        }
        for (name, value) in [("--rate", self.rate), ("--dividend", self.dividend), ("--drift", self.drift)] {
            if let Some(value) = value.filter(|v| !(v.is_finite() && v.abs() <= 2.0)) {
                return Err(bad(name, &value.to_string(), "give a fraction a year, such as 0.03 for 3 %"));
            }
        }
        self.volatility.iter().chain(&self.regime_volatility).try_for_each(|&v| volatility("--volatility", v))
    }

    /// A parameter that the chosen model does not have is a mistake.
    fn refuse_unused(&self) -> Result<()> {
        let heston: &[&str] = &["heston", "bates"];
        let jumps: &[&str] = &["merton", "bates"];
        let given = [
            ("--variance", self.variance.is_some(), heston),
            ("--mean-variance", self.mean_variance.is_some(), heston),
            ("--reversion", self.reversion.is_some(), heston),
            ("--vol-of-vol", self.vol_of_vol.is_some(), heston),
            ("--correlation", self.correlation.is_some(), heston),
            ("--jump-intensity", self.jump_intensity.is_some(), jumps),
            ("--jump-mean", self.jump_mean.is_some(), jumps),
            ("--jump-sd", self.jump_sd.is_some(), jumps),
            ("--regime-volatility", !self.regime_volatility.is_empty(), &["regimes"]),
            ("--regime-drift", !self.regime_drift.is_empty(), &["regimes"]),
            ("--regime-stay", !self.regime_stay.is_empty(), &["regimes"]),
            ("--states", self.states.is_some(), &["regimes"]),
            ("--block", self.block.is_some(), &["bootstrap"]),
            ("--circular", self.circular, &["bootstrap"]),
            ("--volatility", !self.volatility.is_empty(), &["gbm", "merton", "heston", "bates"]),
        ];
        match given.iter().find(|(_, given, models)| *given && !models.contains(&self.model.as_str())) {
            Some((name, _, models)) => Err(bad(name, "given", &format!("is no parameter of --model {}; it belongs to {}", self.model, models.join(" and ")))),
            None => Ok(()),
        }
    }

    // ---- parameters ---------------------------------------------------------------------------------------------------

    fn of_parameters(&self, horizon: Horizon) -> Result<Source> {
        let (maturity, steps) = (horizon.maturity.unwrap_or(1.0), horizon.steps.unwrap_or(252));
        let (rate, dividend) = (self.rate.unwrap_or(0.0), self.dividend.unwrap_or(0.0));
        let drift = self.drift.unwrap_or(rate - dividend);
        let spot = self.spot.unwrap_or(100.0);
        let volatilities = if self.volatility.is_empty() { vec![0.2] } else { self.volatility.clone() };
        let mut notes = Vec::new();
        let models = self.models(&volatilities, &mut notes)?;
        let line = format!("{}, spot {spot}, drift {drift}, rate {rate}, dividend {dividend}", described(&models));
        let markets: Vec<Market> = models.into_iter().map(|model| Market { name: name_of(&model), model, spot, drift, rate, dividend }).collect();
        let json = json!({ "model": self.model, "source": "parameters" });
        Ok(Source { markets, maturity, steps, given: None, paths: None, hedge_volatility: None, line, notes, json })
    }

    /// The model at each volatility.
    fn models(&self, volatilities: &[f64], notes: &mut Vec<String>) -> Result<Vec<Model>> {
        match self.model.as_str() {
            "gbm" => Ok(volatilities.iter().map(|&volatility| Model::Gbm { volatility }).collect()),
            "merton" => {
                let jumps = self.jumps(notes)?;
                Ok(volatilities.iter().map(|&volatility| Model::Merton { volatility, jumps }).collect())
            }
            "heston" => volatilities.iter().map(|&v| self.variance_at(v, notes).map(Model::Heston)).collect(),
            "bates" => {
                let jumps = self.jumps(notes)?;
                volatilities.iter().map(|&v| self.variance_at(v, notes).map(|variance| Model::Bates(variance, jumps))).collect()
            }
            "regimes" => self.chain_of_regimes().map(|model| vec![model]),
            other => Err(bad("--model", other, "takes a history: add --prices FILE")),
        }
    }

    fn variance_at(&self, volatility: f64, notes: &mut Vec<String>) -> Result<Variance> {
        let start = self.variance.unwrap_or(volatility * volatility);
        let found = Variance {
            start,
            mean: self.mean_variance.unwrap_or(start),
            reversion: self.reversion.unwrap_or(2.0),
            volatility: self.vol_of_vol.unwrap_or(0.3),
            correlation: self.correlation.unwrap_or(-0.7),
        };
        positive("--variance", found.start, "give a variance a year, such as 0.04 for a volatility of 20 %")?;
        positive("--mean-variance", found.mean, "give a variance a year, such as 0.04 for a volatility of 20 %")?;
        positive("--reversion", found.reversion, "give a speed a year, such as 2")?;
        positive("--vol-of-vol", found.volatility, "give a volatility of variance a year, such as 0.3; without it take --model gbm")?;
        if !(found.correlation.is_finite() && found.correlation.abs() <= 1.0) {
            let help = "beyond -1 … 1 the correlation matrix of price and variance is not positive definite; give such as -0.7";
            return Err(bad("--correlation", &found.correlation.to_string(), help));
        }
        feller(&found, notes);
        Ok(found)
    }

    fn jumps(&self, notes: &mut Vec<String>) -> Result<Jumps> {
        let jumps = Jumps { intensity: self.jump_intensity.unwrap_or(0.5), mean: self.jump_mean.unwrap_or(-0.1), sd: self.jump_sd.unwrap_or(0.15) };
        if !(jumps.intensity.is_finite() && (0.0..=1e4).contains(&jumps.intensity)) {
            return Err(bad("--jump-intensity", &jumps.intensity.to_string(), "give jumps a year, 0 or more, such as 0.5"));
        }
        if !(jumps.mean.is_finite() && jumps.mean.abs() <= 5.0) {
            return Err(bad("--jump-mean", &jumps.mean.to_string(), "give the mean of a jump of the log price, such as -0.1"));
        }
        if !(jumps.sd.is_finite() && (0.0..=5.0).contains(&jumps.sd)) {
            return Err(bad("--jump-sd", &jumps.sd.to_string(), "give a standard deviation of log jumps, 0 or more, such as 0.15"));
        }
        if jumps.intensity == 0.0 {
            notes.push(format!("--jump-intensity 0: no jumps ever, the same as --model {}", if self.model == "bates" { "heston" } else { "gbm" }));
        }
        Ok(jumps)
    }

    fn chain_of_regimes(&self) -> Result<Model> {
        let volatility = if self.regime_volatility.is_empty() { vec![0.12, 0.3] } else { self.regime_volatility.clone() };
        let k = volatility.len();
        let stay = match (self.regime_stay.as_slice(), k) {
            ([], 2) => vec![0.99, 0.96],
            ([], _) => vec![0.98; k],
            (given, _) => given.to_vec(),
        };
        let drift = if self.regime_drift.is_empty() { vec![0.0; k] } else { self.regime_drift.clone() };
        for (name, n) in [("--regime-stay", stay.len()), ("--regime-drift", drift.len())] {
            if n != k {
                return Err(bad(name, &n.to_string(), &format!("give as many numbers as --regime-volatility has, {k}")));
            }
        }
        stay.iter().try_for_each(|&p| fraction("--regime-stay", p, "give probabilities between 0 and 1, such as 0.99,0.96"))?;
        if let Some(bad_drift) = drift.iter().find(|d| !(d.is_finite() && d.abs() <= 2.0)) {
            return Err(bad("--regime-drift", &bad_drift.to_string(), "give fractions a year, such as 0.1,-0.2"));
        }
        let leave = |i: usize| if k == 1 { 0.0 } else { (1.0 - stay[i]) / (k - 1) as f64 };
        let trans: Vec<f64> = (0..k * k)
            .map(|at| {
                if k == 1 {
                    1.0
                } else if at / k == at % k {
                    stay[at / k]
                } else {
                    leave(at / k)
                }
            })
            .collect();
        let start = stationary(&trans, k);
        Ok(Model::Regimes { drift, volatility, trans, start })
    }

    // ---- history ------------------------------------------------------------------------------------------------------

    fn of_history(&self, device: &Device, file: &Path, horizon: Horizon, seed: u64, most: u64) -> Result<Source> {
        let prices = read_prices(&[file.to_path_buf()], &self.columns.options(false)?)?;
        let [symbol] = prices.symbols.as_slice() else {
            let names = prices.symbols.iter().take(5).cloned().collect::<Vec<_>>().join(", ");
            let help = format!("{} has {} symbols ({names}, …); one is hedged: --symbols {}", file.display(), prices.n_assets(), prices.symbols[0]);
            return Err(bad("--prices", &file.display().to_string(), &help));
        };
        let per_year = self.columns.periods_per_year(&prices)?;
        let (maturity, steps) = self.bars(horizon, per_year)?;
        let closes: Vec<f32> = prices.close.column(0).to_vec();
        let fit = calibrate_volatility(&closes, per_year)?;
        if fit.volatility.is_nan() || fit.volatility <= 0.0 {
            let message = format!("{symbol} does not move over {} bars, so there is nothing to hedge", closes.len());
            let help = "choose another symbol, price column or range".into();
            return Err(Error::Data { file: file.display().to_string(), row: None, column: Some(prices.price_column.clone()), value: None, message, help });
        }
        let spot = self.spot.unwrap_or_else(|| f64::from(closes[closes.len() - 1]));
        let (rate, dividend) = (self.rate.unwrap_or(0.0), self.dividend.unwrap_or(0.0));
        let mut notes = prices.notes.clone();
        let mut given = None;
        let own = matches!(self.model.as_str(), "regimes" | "bootstrap" | "replay") && self.regime_volatility.is_empty();
        let drift = self.drift.unwrap_or(if own { 0.0 } else { rate - dividend });
        let models = match self.model.as_str() {
            "bootstrap" => {
                let block = self.block.unwrap_or(21.0f64.min(fit.log_returns.len() as f64));
                if !(block.is_finite() && block >= 1.0 && block <= fit.log_returns.len() as f64) {
                    let help = format!("give a mean length of 1 to {} bars, such as 21", fit.log_returns.len());
                    return Err(bad("--block", &block.to_string(), &help));
                }
                if self.circular && block.fract() != 0.0 {
                    return Err(bad("--block", &block.to_string(), "blocks of one length (--circular) take a whole number of bars"));
                }
                vec![Model::Bootstrap { log_returns: fit.log_returns.clone(), block, circular: self.circular }]
            }
            "regimes" if self.regime_volatility.is_empty() => vec![self.fitted(device, &prices, per_year, seed)?],
            "replay" => {
                if closes.len() <= steps as usize {
                    let help = format!(
                        "{symbol} has {} bars, a path takes {}; lower --maturity or --steps, or take a longer history",
                        closes.len(),
                        u64::from(steps) + 1
                    );
                    return Err(bad("--steps", &steps.to_string(), &help));
                }
                let paths = Self::windows(&closes, steps, spot, most);
                notes.push(format!(
                    "the paths are overlapping windows of {} bars, of which only {} do not overlap: standard errors are too small",
                    closes.len(),
                    closes.len() / steps as usize
                ));
                given = Some(paths);
                vec![Model::Replay]
            }
            _ => {
                let volatilities = if self.volatility.is_empty() { vec![fit.volatility] } else { self.volatility.clone() };
                self.models(&volatilities, &mut notes)?
            }
        };
        let date = |at: Option<&i64>| at.map(|t| prices.format_time(*t)).unwrap_or_default();
        let (first, last) = (date(prices.times.first()), date(prices.times.last()));
        let line = format!(
            "{}, spot {spot:.6}, drift {drift}, rate {rate}, dividend {dividend}; from {symbol} in {}, {} bars {first} to {last}: volatility {:.2} % ± {:.2} a year",
            described(&models),
            file.display(),
            closes.len(),
            100.0 * fit.volatility,
            100.0 * fit.error
        );
        let markets = models.into_iter().map(|model| Market { name: name_of(&model), model, spot, drift, rate, dividend }).collect();
        let json = json!({ "model": self.model, "source": "prices", "file": file.display().to_string(), "sha256": prices.sha256, "symbol": symbol,
            "price": prices.price_column, "bars": closes.len(), "first": first, "last": last, "periods_per_year": per_year,
            "volatility": fit.volatility, "volatility_error": fit.error, "drift": fit.drift });
        let paths = given.as_ref().map(|g: &Vec<f32>| g.len() as u64 / (u64::from(steps) + 1));
        let hedge_volatility = given.is_some().then_some(fit.volatility);
        Ok(Source { markets, maturity, steps, given, paths, hedge_volatility, line, notes, json })
    }

    /// Years and steps such that a step is a bar where the model draws bars.
    fn bars(&self, horizon: Horizon, per_year: f64) -> Result<(f64, u32)> {
        let bars = |years: f64| (years * per_year).round().clamp(1.0, f64::from(u32::MAX)) as u32;
        let by_bar = ["regimes", "bootstrap", "replay"].contains(&self.model.as_str());
        Ok(match (horizon.maturity, horizon.steps) {
            (None, None) => (if by_bar { f64::from(bars(1.0)) / per_year } else { 1.0 }, bars(1.0)),
            (Some(years), None) => (years, bars(years)),
            (None, Some(steps)) => (f64::from(steps) / per_year, steps),
            (Some(years), Some(steps)) => {
                if by_bar && (f64::from(steps) / (years * per_year) - 1.0).abs() > 0.05 {
                    let help =
                        format!("a step of --model {} is a bar, of which {years} years have {}; leave --steps or --maturity out", self.model, bars(years));
                    return Err(bad("--steps", &steps.to_string(), &help));
                }
                (years, steps)
            }
        })
    }

    /// Regimes of the history, from where it ends.
    fn fitted(&self, device: &Device, prices: &Prices, per_year: f64, seed: u64) -> Result<Model> {
        let k = self.states.unwrap_or(2);
        if k == 0 {
            return Err(bad("--states", "0", "give at least one"));
        }
        let config = RegimeConfig { states: k..=k, periods_per_year: per_year, seed, ..RegimeConfig::default() };
        let panel = Panel { symbols: &prices.symbols, close: prices.close.view(), columns: Vec::new() };
        let found = regimes(device, &panel, &config, &mut |_| Ok(()))?;
        let model = found.models.first().ok_or_else(|| Error::Internal("no regimes were fitted".into()))?;
        let volatility: Vec<f64> = (0..k).map(|s| model.deviation[[s, 0]] * per_year.sqrt()).collect();
        let drift = (0..k).map(|s| model.mean[[s, 0]] * per_year + 0.5 * volatility[s] * volatility[s]).collect();
        let rows = |row: ndarray::ArrayView1<'_, f64>| {
            let sum: f64 = row.sum();
            row.iter().map(|p| p / sum).collect::<Vec<f64>>()
        };
        let trans: Vec<f64> = model.transition.outer_iter().flat_map(rows).collect();
        let last = found.filtered.get(0, prices.n_bars() - 1).map(|p| p.iter().map(|&p| f64::from(p)).collect::<Vec<f64>>());
        let start = last.unwrap_or_else(|| stationary(&trans, k));
        let sum: f64 = start.iter().sum();
        Ok(Model::Regimes { drift, volatility, trans, start: start.iter().map(|p| p / sum).collect() })
    }

    /// Every window of the history as a path, from the same spot; `most` of them at most, evenly spread.
    fn windows(closes: &[f32], steps: u32, spot: f64, most: u64) -> Vec<f32> {
        let (steps, all) = (steps as usize, closes.len().saturating_sub(steps as usize));
        let kept = (most.min(all as u64)) as usize;
        let first = |i: usize| if kept == all { i } else { i * all / kept };
        let scaled = |at: usize| {
            let from = f64::from(closes[at]);
            closes[at..=at + steps].iter().map(move |&p| (spot * f64::from(p) / from) as f32)
        };
        (0..kept).flat_map(|i| scaled(first(i))).collect()
    }

    // ---- option quotes ------------------------------------------------------------------------------------------------

    fn of_chain(&self, device: &Device, file: &Path, horizon: Horizon) -> Result<Source> {
        let name = file.display().to_string();
        let refused = |message: String, help: &str| Error::Data { file: name.clone(), row: None, column: None, value: None, message, help: help.into() };
        let now = self.quotes(file)?;
        let forwards = now.forwards(self.rate);
        let wanted = horizon.maturity.unwrap_or(1.0);
        let near = |f: &&ExpiryForward| (f.maturity - wanted).abs();
        let Some(expiry) = forwards.iter().min_by(|a, b| near(a).total_cmp(&near(b))) else {
            return Err(refused(
                "no expiry has strikes with both a call's and a put's price, so nothing tells the forward".into(),
                "take other dates with --from and --to, or give the rate with --rate",
            ));
        };
        let quoted = now.quotes.iter().find_map(|q| q.spot);
        let spot = self.spot.or(quoted).unwrap_or(expiry.forward * expiry.discount);
        let rate = self.rate.unwrap_or(-expiry.discount.ln() / expiry.maturity);
        let dividend = self.dividend.unwrap_or(rate - (expiry.forward / spot).ln() / expiry.maturity);
        let drift = self.drift.unwrap_or(rate - dividend);
        let implied = at_the_money(&now.volatilities(device, self.rate)?, expiry.maturity, &now);
        let implied = implied
            .ok_or_else(|| refused(format!("no quote that expires in {:.4} years has an implied volatility", expiry.maturity), "choose another --maturity"))?;
        let mut notes = now.notes.clone();
        let (models, fit) = self.models_of_chain(device, &now, implied, &mut notes)?;
        let steps = horizon.steps.unwrap_or((252.0 * expiry.maturity).round().max(1.0) as u32);
        let (date, expires) = (day(expiry.time), day(expiry.expiry));
        let line = format!(
            "{}, spot {spot:.6}, drift {drift:.4}, rate {rate:.4}, dividend {dividend:.4}; from {} in {name} on {date}: expiry {expires}, forward {:.2} by {} pairs, volatility nearest the money {:.2} %{fit}",
            described(&models),
            expiry.underlying,
            expiry.forward,
            expiry.pairs,
            100.0 * implied
        );
        let json = json!({ "model": self.model, "source": "chain", "file": name, "underlying": expiry.underlying, "date": date, "expiry": expires,
            "forward": expiry.forward, "discount": expiry.discount, "pairs": expiry.pairs, "volatility": implied, "quotes": now.quotes.len(), "dropped": now.dropped });
        // A fitted surface is hedged at the volatility that its own expiry is quoted at.
        let hedge_volatility = (!fit.is_empty()).then_some(implied);
        let markets = models.into_iter().map(|model| Market { name: name_of(&model), model, spot, drift, rate, dividend }).collect();
        Ok(Source { markets, maturity: expiry.maturity, steps, given: None, paths: None, hedge_volatility, line, notes, json })
    }

    /// The last quotes of the one underlying.
    fn quotes(&self, file: &Path) -> Result<OptionChain> {
        let underlying = match self.columns.symbols.as_deref() {
            None => None,
            Some([one]) => Some(one.clone()),
            Some(many) => return Err(bad("--symbols", &many.join(","), "one underlying is hedged; name one")),
        };
        let crossed = if self.drop_crossed { Crossed::Drop } else { Crossed::Error };
        let options = ChainOptions { underlying, from: self.columns.from.clone(), to: self.columns.to.clone(), crossed };
        let chain = read_chain(file, &options)?;
        let last = chain.times().last().copied().ok_or_else(|| bad("--chain", &file.display().to_string(), "has no quotes"))?;
        let now = chain.at(last);
        let mut names: Vec<&str> = now.quotes.iter().map(|q| q.underlying.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        if names.len() > 1 {
            let help = format!("has {} underlyings on its last date ({}); one is hedged: --symbols {}", names.len(), names.join(", "), names[0]);
            return Err(bad("--chain", &file.display().to_string(), &help));
        }
        Ok(now)
    }

    /// The model that the quotes stand for, and how well it fits.
    fn models_of_chain(&self, device: &Device, now: &OptionChain, implied: f64, notes: &mut Vec<String>) -> Result<(Vec<Model>, String)> {
        let volatilities = if self.volatility.is_empty() { vec![implied] } else { self.volatility.clone() };
        let given = [self.variance, self.mean_variance, self.reversion, self.vol_of_vol, self.correlation].iter().any(Option::is_some);
        match self.model.as_str() {
            "heston" if self.volatility.is_empty() && !given => {
                let points = now.surface(device, self.rate, &SurfaceFilter::default())?;
                let fit = calibrate_heston(device, &points, &HestonFitOptions::default())?;
                let m = &fit.model;
                let variance = Variance { start: m.variance, mean: m.mean, reversion: m.reversion, volatility: m.vol_of_vol, correlation: m.correlation };
                feller(&variance, notes);
                Ok((vec![Model::Heston(variance)], format!("; fitted to {} quotes within {:.2} volatility points (root mean square)", points.len(), fit.rmse)))
            }
            "bootstrap" | "replay" => Err(bad("--model", &self.model, "takes a history of prices, not a chain: --prices FILE")),
            _ => Ok((self.models(&volatilities, notes)?, String::new())),
        }
    }
}

// ---- helpers ----------------------------------------------------------------------------------------------------------

pub(super) fn volatility(name: &str, value: f64) -> Result<()> {
    let help = match value {
        0.0 => "without volatility there is nothing to hedge; give a fraction a year, such as 0.2 for 20 %",
        v if v > 5.0 => "give a fraction a year, such as 0.2 for 20 %",
        _ => "give a fraction a year above 0, such as 0.2 for 20 %",
    };
    if value.is_finite() && value > 0.0 && value <= 5.0 { Ok(()) } else { Err(bad(name, &value.to_string(), help)) }
}

/// Volatility of the quotes nearest the money at a maturity: of the strike's call and put.
fn at_the_money(all: &[QuoteVolatility], maturity: f64, chain: &OptionChain) -> Option<f64> {
    let known = |v: &&QuoteVolatility| v.maturity == maturity && v.status == VolatilityStatus::Ok && v.volatility > 0.0;
    let away = |v: &QuoteVolatility| chain.quotes.get(v.quote).map_or(f64::INFINITY, |q| (q.strike / v.forward).ln().abs());
    let least = all.iter().filter(known).map(away).min_by(f64::total_cmp)?;
    let near: Vec<f64> = all.iter().filter(known).filter(|v| away(v) <= least).map(|v| v.volatility).collect();
    Some(near.iter().sum::<f64>() / near.len() as f64)
}

/// Seconds as YYYY-MM-DD.
fn day(seconds: i64) -> String {
    time::OffsetDateTime::from_unix_timestamp(seconds).map_or_else(|_| seconds.to_string(), |t| t.date().to_string())
}

/// Says where variance can reach zero.
fn feller(v: &Variance, notes: &mut Vec<String>) {
    let (least, there) = (v.volatility * v.volatility, 2.0 * v.reversion * v.mean);
    if there < least {
        notes.push(format!(
            "Feller's condition does not hold (2κθ = {there:.4} is below ξ² = {least:.4}): variance touches 0 at times, which the scheme allows"
        ));
    }
}

/// Long-run probabilities of a chain [k,k].
fn stationary(trans: &[f64], k: usize) -> Vec<f64> {
    let mut p = vec![1.0 / k as f64; k];
    for _ in 0..20_000 {
        let mut next: Vec<f64> = (0..k).map(|j| (0..k).map(|i| p[i] * trans[i * k + j]).sum()).collect();
        // Half of a step: a chain that only alternates settles too.
        next.iter_mut().zip(&p).for_each(|(n, p)| *n = 0.5 * (*n + p));
        let moved: f64 = next.iter().zip(&p).map(|(a, b)| (a - b).abs()).sum();
        p = next;
        if moved < 1e-14 {
            break;
        }
    }
    let sum: f64 = p.iter().sum();
    p.iter().map(|x| x / sum).collect()
}

fn percents(list: &[f64]) -> String {
    list.iter().map(|v| format!("{:.1}", 100.0 * v)).collect::<Vec<_>>().join(", ")
}

/// Short name of a market among several.
fn name_of(model: &Model) -> String {
    match model {
        Model::Gbm { volatility } => format!("gbm {:.1} %", 100.0 * volatility),
        Model::Merton { volatility, .. } => format!("merton {:.1} %", 100.0 * volatility),
        Model::Heston(v) => format!("heston {:.1} %", 100.0 * v.start.sqrt()),
        Model::Bates(v, _) => format!("bates {:.1} %", 100.0 * v.start.sqrt()),
        Model::Regimes { volatility, .. } => format!("{} regimes", volatility.len()),
        Model::Bootstrap { .. } => "bootstrap".into(),
        Model::Replay => "replay".into(),
    }
}

fn described(models: &[Model]) -> String {
    let jumps = |j: &Jumps| format!("{} jumps a year of {} ± {} in the log", j.intensity, j.mean, j.sd);
    let variance = |v: &Variance| {
        format!(
            "volatility {:.1} % now and {:.1} % in the long run, reversion {:.3}, volatility of variance {:.3}, correlation {:.3}",
            100.0 * v.start.sqrt(),
            100.0 * v.mean.sqrt(),
            v.reversion,
            v.volatility,
            v.correlation
        )
    };
    match models {
        [Model::Gbm { volatility }] => format!("geometric Brownian motion, volatility {:.2} % a year", 100.0 * volatility),
        [Model::Merton { volatility, jumps: j }] => format!("Merton: volatility {:.2} % a year, {}", 100.0 * volatility, jumps(j)),
        [Model::Heston(v)] => format!("Heston: {}", variance(v)),
        [Model::Bates(v, j)] => format!("Bates: {}; {}", variance(v), jumps(j)),
        [Model::Regimes { volatility, drift, .. }] => format!("regimes of volatility {} % and growth {} % a year", percents(volatility), percents(drift)),
        [Model::Bootstrap { log_returns, block, circular }] => {
            format!("bootstrap: blocks of {block} bars{} out of {} returns", if *circular { "" } else { " on average" }, log_returns.len())
        }
        [Model::Replay] => "the history itself".into(),
        many => format!("{} markets: {}", many.len(), many.iter().map(name_of).collect::<Vec<_>>().join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_start_at_the_spot_and_keep_the_returns() {
        let closes = [10.0, 11.0, 9.0, 12.0, 6.0];
        let all = MarketArgs::windows(&closes, 2, 100.0, 1000);
        assert_eq!(
            all,
            [100.0, 110.0, 90.0, 100.0, 100.0 * 9.0 / 11.0, 100.0 * 12.0 / 11.0, 100.0, 100.0 * 12.0 / 9.0, 100.0 * 6.0 / 9.0].map(|x: f64| x as f32)
        );
        assert_eq!(MarketArgs::windows(&closes, 2, 100.0, 2).len(), 6);
    }

    #[test]
    fn long_run_probabilities_of_a_chain() {
        // p0·0.01 = p1·0.04, and a chain that alternates.
        let p = stationary(&[0.99, 0.01, 0.04, 0.96], 2);
        assert!((p[0] - 0.8).abs() < 1e-9 && (p[1] - 0.2).abs() < 1e-9, "{p:?}");
        assert_eq!(stationary(&[0.0, 1.0, 1.0, 0.0], 2), [0.5, 0.5]);
    }
}
