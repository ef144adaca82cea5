//! `forback regimes`: hidden Markov models on a price file.
//!
//! options → prices (and other columns) → models over the whole sample → refits out of sample → files (`regime_files.rs`, the page) → what is
//! printed.

use super::price_files::PriceFiles;
use super::print::{number, percent};
use super::sweep::{duration, unknown};
use super::{Common, regime_files, results, say};
use crate::data::{Prices, ReadOptions, read_prices};
use crate::regimes::{
    Candidate, Causal, Criterion, Emission, Feature, NextBar, OutOfSample, Panel, Refits, RegimeConfig, RegimeModel, Regimes, Scale, StateSummary, Train,
    regimes, rolling, state_name,
};
use crate::{Device, Error, Result};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use std::io::IsTerminal;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Arguments of `forback regimes`.
#[derive(clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    pub(super) prices: PriceFiles,
    /// Numbers of states: one, such as 2, or a range to choose from, such as 2..5.
    #[arg(long, default_value = "2")]
    states: String,
    /// What chooses among several: bic, aic or icl.
    #[arg(long, default_value = "bic")]
    criterion: String,
    /// What states are seen through, comma-separated: returns (log), volatility:N (log of the realised volatility of N returns), level (the
    /// price itself, of any sign), column:NAME (of a long file).
    #[arg(long, default_value = "returns", value_delimiter = ',')]
    features: Vec<String>,
    /// Distribution of an observation in a state: gaussian or student-t.
    #[arg(long, default_value = "gaussian")]
    emission: String,
    /// Degrees of freedom of student-t.
    #[arg(long, value_name = "NU", default_value_t = 5.0)]
    freedom: f64,
    /// One model for all assets instead of one each.
    #[arg(long)]
    pooled: bool,
    /// What pooled assets are divided by: own (each by its own volatility) or common.
    #[arg(long, default_value = "own", requires = "pooled")]
    scale: String,
    /// Bars between two refits of the out-of-sample probabilities; 0 for none.
    #[arg(long, value_name = "BARS")]
    refit: Option<usize>,
    /// Observations that a refit is fitted on: a number, or anchored[:N] for all so far, from N on. Default 1260.
    #[arg(long, value_name = "BARS|anchored")]
    train: Option<String>,
    /// Starts of the fit; the best is kept.
    #[arg(long, default_value_t = 8)]
    restarts: usize,
    /// Most iterations of a fit.
    #[arg(long, default_value_t = 300)]
    iterations: usize,
    /// Assets to print in full; more are printed a line each.
    #[arg(long, default_value_t = 5)]
    top: usize,
    /// Write report.html, probabilities.parquet, probabilities.csv and regimes.json into this folder.
    #[arg(long, value_name = "DIR")]
    pub(super) out: Option<PathBuf>,
    #[command(flatten)]
    common: Common,
}

/// Everything that was found, and where.
pub(super) struct Found<'a> {
    pub(super) args: &'a Args,
    pub(super) device: &'a Device,
    pub(super) prices: &'a Prices,
    pub(super) config: &'a RegimeConfig,
    pub(super) refits: Option<Refits>,
    pub(super) regimes: &'a Regimes,
    pub(super) out_of_sample: Option<&'a OutOfSample>,
    pub(super) next: Option<Vec<NextBar>>,
    /// Why there are no refits.
    pub(super) missing: Option<String>,
    pub(super) seconds: f64,
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let mut config = config_of(args)?;
    let (refits, asked) = refits_of(args)?;
    let device = args.common.open()?;
    let (prices, columns) = read(args, &config.features)?;
    config.periods_per_year = args.prices.columns.periods_per_year(&prices)?;
    if let Some(dir) = &args.out {
        results::folder(dir)?;
    }
    let bar = progress(args.common.json);
    let mut stage = |name: &str| {
        bar.set_message(name.to_string());
        Ok(())
    };
    let columns = columns.iter().map(|(name, values)| (name.clone(), values.close.view())).collect();
    let panel = Panel { symbols: &prices.symbols, close: prices.close.view(), columns };
    let start = Instant::now();
    let found = regimes(&device, &panel, &config, &mut stage)?;
    let (out_of_sample, missing) = match refits.map(|refits| rolling(&device, &panel, &config, refits, &mut stage)).transpose() {
        Ok(found) => (found, None),
        // The default schedule gives way to a short history; one that was asked for does not.
        Err(Error::Parameter { name, help, .. }) if !asked && (name == "train" || name == "observations") => (None, Some(help)),
        Err(error) => return Err(error),
    };
    bar.finish_and_clear();
    let next = out_of_sample.as_ref().map(|o| o.next_bar(&panel, config.periods_per_year));
    let seconds = start.elapsed().as_secs_f64();
    let found = Found {
        args,
        device: &device,
        prices: &prices,
        config: &config,
        refits: refits.filter(|_| out_of_sample.is_some()),
        regimes: &found,
        out_of_sample: out_of_sample.as_ref(),
        next,
        missing,
        seconds,
    };
    if let Some(dir) = &args.out {
        regime_files::write(dir, &found)?;
    }
    if args.common.json {
        say(&found.json().to_string())
    } else {
        found.text()
    }
    Ok(ExitCode::SUCCESS)
}

fn progress(silent: bool) -> ProgressBar {
    if silent || !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar =
        ProgressBar::new_spinner().with_style(ProgressStyle::with_template("{spinner} {msg}, {elapsed}").unwrap_or_else(|_| ProgressStyle::default_spinner()));
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}

// ---- options ----------------------------------------------------------------------------------------------------------

fn bad(name: &str, value: &str, help: &str) -> Error {
    Error::Parameter { op: "regimes", name: name.into(), value: value.into(), help: help.into() }
}

fn config_of(args: &Args) -> Result<RegimeConfig> {
    args.prices.columns.check("regimes")?;
    if args.iterations == 0 {
        return Err(bad("--iterations", "0", "give at least one"));
    }
    Ok(RegimeConfig {
        states: states(&args.states)?,
        criterion: match args.criterion.as_str() {
            "bic" => Criterion::Bic,
            "aic" => Criterion::Aic,
            "icl" => Criterion::Icl,
            other => return Err(unknown("criterion", other, ["bic", "aic", "icl"])),
        },
        features: features(&args.features)?,
        emission: emission(&args.emission)?,
        pooled: args.pooled,
        scale: match args.scale.as_str() {
            "own" => Scale::Own,
            "common" => Scale::Common,
            other => return Err(unknown("scale", other, ["own", "common"])),
        },
        restarts: args.restarts,
        seed: args.common.seed,
        iterations: args.iterations,
        degrees_of_freedom: args.freedom,
        ..RegimeConfig::default()
    })
}

/// `2` or `2..5`, both ends included.
fn states(text: &str) -> Result<RangeInclusive<usize>> {
    let (least, most) = text.split_once("..").unwrap_or((text, text));
    let number = |text: &str| text.trim().trim_start_matches('=').parse::<usize>().ok().filter(|&k| k > 0);
    match (number(least), number(most)) {
        (Some(least), Some(most)) if least <= most => Ok(least..=most),
        _ => Err(bad("--states", text, "give a number of states such as 2, or a range such as 2..5")),
    }
}

pub(super) fn features(list: &[String]) -> Result<Vec<Feature>> {
    let mut features: Vec<Feature> = Vec::new();
    for text in list {
        let feature = text.parse()?;
        if features.contains(&feature) {
            return Err(bad("--features", text, "is there twice; name each feature once"));
        }
        features.push(feature);
    }
    Ok(features)
}

fn emission(name: &str) -> Result<Emission> {
    match name {
        "gaussian" => Ok(Emission::Gaussian),
        "student-t" | "student_t" => Ok(Emission::StudentT),
        other => Err(unknown("emission", other, ["gaussian", "student-t"])),
    }
}

/// The schedule, and whether it was asked for.
fn refits_of(args: &Args) -> Result<(Option<Refits>, bool)> {
    let train = args.train.as_deref().map(str::parse::<Train>).transpose()?;
    let asked = args.refit.is_some() || train.is_some();
    if args.refit == Some(0) {
        return if train.is_some() { Err(bad("--train", "given", "has no refit to serve with --refit 0")) } else { Ok((None, true)) };
    }
    let plain = Refits::default();
    Ok((Some(Refits { every: args.refit.unwrap_or(plain.every), train: train.unwrap_or(plain.train) }), asked))
}

// ---- prices -----------------------------------------------------------------------------------------------------------

/// The prices, and the columns that features name.
type Columns = Vec<(String, Prices)>;

fn read(args: &Args, features: &[Feature]) -> Result<(Prices, Columns)> {
    let columned = |f: &&Feature| matches!(f, Feature::Column(_));
    if let Some(feature) = features.iter().find(columned).filter(|_| args.prices.files.is_empty()) {
        return Err(bad("--features", &feature.to_string(), "needs a price file: forback regimes prices.csv"));
    }
    let any_sign = !features.iter().any(Feature::needs_positive);
    let prices = args.prices.read("regimes", any_sign, args.common.seed)?;
    let options = args.prices.columns.options(any_sign)?;
    let mut columns = Vec::new();
    for feature in features {
        let Feature::Column(name) = feature else { continue };
        columns.push((name.clone(), column(args, &prices, name, &options)?));
    }
    Ok((prices, columns))
}

/// Another column on the same bars and symbols.
fn column(args: &Args, prices: &Prices, name: &str, options: &ReadOptions) -> Result<Prices> {
    let refused = |message: String, help: &str| {
        let file = prices.sources.join(", ");
        Err(Error::Data { file, row: None, column: Some(name.into()), value: None, message, help: help.into() })
    };
    if prices.price_column == "price" && args.prices.columns.price.is_none() {
        return refused("a wide file has one column per asset".into(), "columns are read from long files, with a symbol column or of a single asset");
    }
    let options = ReadOptions { price: Some(name.into()), symbols: Some(prices.symbols.clone()), any_sign: true, ..options.clone() };
    let values = read_prices(&args.prices.files, &options)?;
    if values.symbols != prices.symbols || values.times != prices.times {
        let message = format!("it covers {} assets × {} bars, the prices {} × {}", values.n_assets(), values.n_bars(), prices.n_assets(), prices.n_bars());
        return refused(message, "use --missing fill:N, or cut the range with --from and --to so that both are there");
    }
    Ok(values)
}

// ---- what is printed --------------------------------------------------------------------------------------------------

fn bars(x: f64) -> String {
    if x.is_finite() { format!("{x:.1}") } else { "never left".into() }
}

impl Found<'_> {
    /// What a model is about.
    pub(super) fn name(&self, model: &RegimeModel) -> String {
        match model.assets.as_slice() {
            [one] => self.prices.symbols[*one].clone(),
            many => format!("{} assets, one model", many.len()),
        }
    }

    fn emission(&self) -> &'static str {
        match self.config.emission {
            Emission::Gaussian => "gaussian",
            Emission::StudentT => "student-t",
        }
    }

    fn criterion(&self) -> &'static str {
        match self.config.criterion {
            Criterion::Bic => "bic",
            Criterion::Aic => "aic",
            Criterion::Icl => "icl",
        }
    }

    fn features(&self) -> String {
        self.config.features.iter().map(Feature::to_string).collect::<Vec<_>>().join(", ")
    }

    fn text(&self) {
        let prices = self.prices;
        let time = |t: Option<&i64>| t.map(|t| prices.format_time(*t)).unwrap_or_default();
        let assets = if let [one] = prices.symbols.as_slice() { one.clone() } else { format!("{} assets", prices.n_assets()) };
        let (first, last) = (time(prices.times.first()), time(prices.times.last()));
        say(&format!("device   {}", self.device.info()));
        say(&format!("data     {}: {assets} × {} bars, {first} to {last}", prices.sources.join(", "), prices.n_bars()));
        let derived = if self.args.prices.columns.periods_per_year.is_some() { "as given" } else { "derived from the dates" };
        say(&format!("         {:.1} periods per year ({derived})", self.config.periods_per_year));
        prices.notes.iter().for_each(|note| say(&format!("note     {note}")));
        if let Some(first) = prices.dropped.first() {
            say(&format!("dropped  {} assets, such as {}: {}", prices.dropped.len(), first.symbol, first.reason));
        }
        let kind = if self.config.pooled { "one model for all assets" } else { "a model per asset" };
        let choice =
            if self.config.states.start() == self.config.states.end() { String::new() } else { format!(" chosen by {}", self.criterion().to_uppercase()) };
        let starts = self.config.restarts;
        say(&format!(
            "model    {} states{choice}, {} on {}, {kind}, best of {starts} starts, seed {}",
            self.config.states_text(),
            self.emission(),
            self.features(),
            self.config.seed
        ));
        say(&format!("         fitted in {}", if self.seconds < 10.0 { format!("{:.2} s", self.seconds) } else { duration(self.seconds) }));
        say("\nover the whole sample, which knows the future: states by volatility, calmest first");
        if self.regimes.models.len() > self.args.top {
            self.lines();
        } else {
            self.regimes.models.iter().for_each(|model| self.model(model));
        }
        self.out_of_sample();
        if let Some(dir) = &self.args.out {
            say(&format!("\nwrote    {}", dir.display()));
        }
    }

    fn model(&self, model: &RegimeModel) {
        let c = &model.chosen;
        let converged = if c.converged { "converged after" } else { "NOT converged after" };
        say(&format!(
            "\n{}: {} states, log-likelihood {:.2}, AIC {:.1}, BIC {:.1}; {converged} {} iterations, {} observations",
            self.name(model),
            c.states,
            c.log_likelihood,
            c.aic,
            c.bic,
            model.iterations,
            model.observations
        ));
        let to: String = (0..c.states).map(|k| format!(" {:>8}", format!("to {k}"))).collect();
        say(&format!("{:<14} {:>9} {:>11} {:>11} {:>10}{to}", "state", "mean/yr", "volatility", "bars", "occupancy"));
        for (k, state) in model.states.iter().enumerate() {
            let row: String = model.transition.row(k).iter().map(|p| format!(" {:>8}", format!("{:.2}%", 100.0 * p))).collect();
            let name = format!("{k} {}", state_name(k, c.states));
            say(&format!(
                "{name:<14} {:>9} {:>11} {:>11} {:>10}{row}",
                percent(state.mean),
                percent(state.volatility),
                bars(state.duration),
                percent(state.occupancy)
            ));
        }
        if self.config.features != [Feature::Returns] {
            for (d, feature) in self.config.features.iter().enumerate() {
                let of = |k: usize| format!("{:.4} ± {:.4}", model.mean[[k, d]], model.deviation[[k, d]]);
                let unit = if model.assets.len() > 1 && self.config.scale == Scale::Own { " (in each asset's deviations)" } else { "" };
                say(&format!("         {feature}{unit}: {}", (0..c.states).map(of).collect::<Vec<_>>().join(", ")));
            }
        }
        if model.candidates.len() > 1 {
            say(&format!("         {:>6} {:>14} {:>12} {:>12} {:>12}", "states", "log-likelihood", "AIC", "BIC", "ICL"));
            for t in &model.candidates {
                let mark = if t.states == c.states { "  chosen" } else { "" };
                let open = if t.converged { "" } else { "  not converged" };
                say(&format!("         {:>6} {:>14.2} {:>12.1} {:>12.1} {:>12.1}{mark}{open}", t.states, t.log_likelihood, t.aic, t.bic, t.icl));
            }
        }
    }

    /// A line per asset, calmest and wildest state side by side, and the medians.
    fn lines(&self) {
        say(&format!("\n{:<12} {:>2} {:>14} {:>16} {:>16} {:>16} {:>12}", "asset", "K", "mean/yr", "volatility", "bars", "occupancy", "BIC"));
        let ends = |model: &RegimeModel, f: &dyn Fn(&StateSummary) -> String| {
            let states = &model.states;
            states.first().zip(states.last()).map_or(String::new(), |(a, z)| format!("{} {}", f(a), f(z)))
        };
        for model in self.regimes.models.iter().take(LINES) {
            let open = if model.chosen.converged { "" } else { "  not converged" };
            say(&format!(
                "{:<12} {:>2} {:>14} {:>16} {:>16} {:>16} {:>12.1}{open}",
                self.name(model),
                model.chosen.states,
                ends(model, &|s| percent(s.mean)),
                ends(model, &|s| percent(s.volatility)),
                ends(model, &|s| bars(s.duration)),
                ends(model, &|s| percent(s.occupancy)),
                model.chosen.bic
            ));
        }
        let models = &self.regimes.models;
        if models.len() > LINES {
            say(&format!("… {} more; --out and --json have all", models.len() - LINES));
        }
        let median = |f: &dyn Fn(&RegimeModel) -> Option<f64>| {
            let mut all: Vec<f64> = models.iter().filter_map(f).filter(|x| x.is_finite()).collect();
            all.sort_by(f64::total_cmp);
            all.get(all.len() / 2).copied().unwrap_or(f64::NAN)
        };
        let both = |f: fn(&StateSummary) -> f64, show: &dyn Fn(f64) -> String| {
            format!("{} {}", show(median(&|m| m.states.first().map(f))), show(median(&|m| m.states.last().map(f))))
        };
        say(&format!(
            "{:<12} {:>2} {:>14} {:>16} {:>16} {:>16}",
            "median",
            "",
            both(|s| s.mean, &percent),
            both(|s| s.volatility, &percent),
            both(|s| s.duration, &bars),
            both(|s| s.occupancy, &percent)
        ));
        let open = models.iter().filter(|m| !m.chosen.converged).count();
        say(&format!("calmest and wildest state of each; {} of {} models converged", models.len() - open, models.len()));
    }

    fn out_of_sample(&self) {
        let (Some(refits), Some(found), Some(next)) = (self.refits, self.out_of_sample, &self.next) else {
            if let Some(why) = &self.missing {
                say(&format!("\nnothing out of sample: {why}"));
            }
            return;
        };
        let first = found.first_bar().map(|bar| self.prices.format_time(self.prices.times[bar])).unwrap_or_default();
        let on = match refits.train {
            Train::Last(n) => format!("the last {n} observations"),
            Train::Anchored(n) => format!("all so far, from {n} on"),
        };
        let open = found.refits.iter().filter(|r| !r.converged).count();
        let failed = if open == 0 { String::new() } else { format!("; {open} fits did not converge") };
        say(&format!("\nout of sample, refitted every {} bars on {on}: {} refits, probabilities from {first}{failed}", refits.every, found.times()));
        if self.config.states.start() < self.config.states.end() {
            let mut chosen: Vec<usize> = (0..self.prices.n_assets()).map(|asset| Causal::states(&found.filtered, asset)).collect();
            chosen.sort_unstable();
            chosen.dedup();
            say(&format!("states, as the first refit chose them: {}", chosen.iter().map(usize::to_string).collect::<Vec<_>>().join(", ")));
        }
        say(&format!("{:<14} {:>9} {:>11} {:>10}   of the bar after, by what was known before it", "state", "mean/yr", "volatility", "share"));
        for (k, n) in next.iter().enumerate() {
            let name = format!("{k} {}", state_name(k, next.len()));
            say(&format!("{name:<14} {:>9} {:>11} {:>10}", percent(n.mean), percent(n.volatility), percent(n.share)));
        }
        if let Some(agreement) = found.agreement(&self.regimes.smoothed) {
            say(&format!("most likely state as in hindsight (smoothed) on {} of the bars", percent(agreement)));
        }
        if let [_] = self.prices.symbols.as_slice() {
            self.now(found);
        }
    }

    /// The last probabilities of a single asset.
    fn now(&self, found: &OutOfSample) {
        let last = self.prices.n_bars() - 1;
        if let Some(p) = found.filtered.get(0, last) {
            let states: Vec<String> =
                p.iter().enumerate().map(|(k, &p)| format!("{k} {} {}", state_name(k, Causal::states(&found.filtered, 0)), percent(f64::from(p)))).collect();
            say(&format!("on {}: {}", self.prices.format_time(self.prices.times[last]), states.join(", ")));
        }
    }

    pub(super) fn json(&self) -> Value {
        let prices = self.prices;
        let models: Vec<Value> = self.regimes.models.iter().map(|model| self.json_of(model)).collect();
        let next = |n: &NextBar| json!({ "mean": number(n.mean), "volatility": number(n.volatility), "share": number(n.share) });
        let out_of_sample = self.out_of_sample.zip(self.refits).map(|(found, refits)| {
            let last = prices.n_bars() - 1;
            let now = |asset: usize| found.filtered.get(asset, last).map(|p| p.to_vec());
            let refit = |r: &crate::regimes::Refitted| {
                json!({ "date": prices.format_time(prices.times[r.bar]), "asset": if let [one] = r.assets.as_slice() { json!(prices.symbols[*one]) } else { Value::Null },
                    "transition": r.transition.outer_iter().map(|row| row.to_vec()).collect::<Vec<_>>(), "deviation": r.deviation, "converged": r.converged })
            };
            json!({ "refit": refits.every, "train": refits.train.to_string(), "times": found.times(),
                "first": found.first_bar().map(|bar| prices.format_time(prices.times[bar])),
                "next_bar": self.next.as_ref().map(|list| list.iter().map(next).collect::<Vec<_>>()),
                "agreement": found.agreement(&self.regimes.smoothed).map(number),
                "last": (0..prices.n_assets()).map(|a| json!({ "asset": prices.symbols[a], "probabilities": now(a) })).collect::<Vec<_>>(),
                "refits": found.refits.iter().map(refit).collect::<Vec<_>>() })
        });
        json!({ "run": self.provenance(), "models": models, "out_of_sample": out_of_sample, "out_of_sample_missing": self.missing, "seconds": self.seconds })
    }

    fn json_of(&self, model: &RegimeModel) -> Value {
        let candidate = |c: &Candidate| {
            json!({ "states": c.states, "parameters": c.parameters, "log_likelihood": number(c.log_likelihood), "aic": number(c.aic), "bic": number(c.bic),
                "icl": number(c.icl), "converged": c.converged })
        };
        let summary = |(k, s): (usize, &StateSummary)| {
            json!({ "state": k, "name": state_name(k, model.chosen.states), "mean": number(s.mean), "volatility": number(s.volatility),
                "duration": number(s.duration), "occupancy": number(s.occupancy) })
        };
        let list = |states: &[StateSummary]| states.iter().enumerate().map(summary).collect::<Vec<_>>();
        let rows = |x: &ndarray::Array2<f64>| x.outer_iter().map(|row| row.to_vec()).collect::<Vec<_>>();
        let assets = |(asset, states): (&usize, &Vec<StateSummary>)| json!({ "asset": self.prices.symbols[*asset], "states": list(states) });
        json!({
            "assets": model.assets.iter().map(|&a| &self.prices.symbols[a]).collect::<Vec<_>>(), "observations": model.observations, "iterations": model.iterations,
            "chosen": candidate(&model.chosen), "candidates": model.candidates.iter().map(candidate).collect::<Vec<_>>(), "states": list(&model.states),
            "per_asset": if model.assets.len() > 1 { model.assets.iter().zip(&model.per_asset).map(assets).collect::<Vec<_>>() } else { Vec::new() },
            "initial": model.initial, "transition": rows(&model.transition),
            "features": self.config.features.iter().map(Feature::to_string).collect::<Vec<_>>(),
            "mean": rows(&model.mean), "deviation": rows(&model.deviation), "degrees_of_freedom": model.degrees_of_freedom.as_ref().map(rows),
        })
    }

    pub(super) fn provenance(&self) -> Value {
        let (prices, config) = (self.prices, self.config);
        json!({
            "version": env!("CARGO_PKG_VERSION"), "command": std::env::args().collect::<Vec<_>>(), "device": self.device.info().to_string(), "seed": config.seed,
            "data": { "sources": prices.sources, "sha256": prices.sha256, "price": prices.price_column, "assets": prices.n_assets(), "bars": prices.n_bars(),
                "first": prices.times.first().map(|t| prices.format_time(*t)), "last": prices.times.last().map(|t| prices.format_time(*t)),
                "dropped": prices.dropped.iter().map(|d| json!({ "symbol": d.symbol, "reason": d.reason })).collect::<Vec<_>>(),
                "filled": prices.filled.iter().map(|(s, n)| json!({ "symbol": s, "cells": n })).collect::<Vec<_>>(), "notes": prices.notes },
            "states": self.config.states_text(), "criterion": self.criterion(), "features": config.features.iter().map(Feature::to_string).collect::<Vec<_>>(),
            "emission": self.emission(), "pooled": config.pooled, "scale": self.args.scale, "restarts": config.restarts, "iterations": config.iterations,
            "refit": self.refits.map(|r| r.every), "train": self.refits.map(|r| r.train.to_string()), "periods_per_year": config.periods_per_year,
        })
    }
}

/// Most lines of assets that are printed.
const LINES: usize = 20;
