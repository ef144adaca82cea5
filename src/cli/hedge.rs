//! `forback hedge`: what hedging an option costs and what it leaves, over simulated or historical paths.
//!
//! options → market (`hedge/market.rs`) → grid of policies × costs × intervals over common random numbers → plan, refusal → one run →
//! frontier and verdict (`hedge/judge.rs`) → files and page (`hedge/files.rs`) → what is printed (`hedge/print.rs`). `--replay` shows single
//! paths step by step instead.

mod files;
mod judge;
mod market;
mod print;

use super::sweep::{duration, size, unknown};
use super::{Common, catch_interrupts, is_interrupted, results, say};
use crate::kernels::DeviceKind;
use crate::sim::hedge::{Basis, Costs, Explained, HedgeRequest, HedgeRow, HedgeTable, HedgedOption, OptionKind, Policy, Position, RiskOptions, Sources};
use crate::{Device, Error, Result};
use indicatif::{ProgressBar, ProgressStyle};
use judge::Risk;
use market::{Horizon, MarketArgs, Source};
use serde_json::{Value, json};
use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

/// Arguments of `forback hedge`.
#[derive(clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    market: MarketArgs,
    /// Paths to simulate, such as 1000000 or 1e6; with --model replay, most of those that the history has.
    #[arg(long, default_value = "100000", value_parser = count, allow_negative_numbers = true)]
    paths: u64,
    /// Steps of a path (default 252, with --prices the bars that --maturity has, with --chain 252 a year).
    #[arg(long)]
    steps: Option<u32>,
    /// Years to expiry (default 1; with --chain, of the expiry that is nearest to it).
    #[arg(long, value_name = "YEARS", allow_negative_numbers = true)]
    maturity: Option<f64>,
    /// Strikes of the hedged option in currency, comma-separated (default: the spot).
    #[arg(long, value_delimiter = ',', allow_negative_numbers = true)]
    strike: Vec<f64>,
    /// What is hedged: call, put, digital (pays 1 above the strike) or spot (a unit of the underlying itself, hedged with futures).
    #[arg(long, default_value = "call")]
    option: String,
    /// short (the option was sold) or long.
    #[arg(long, default_value = "short")]
    position: String,
    /// Policies, comma-separated: none, static (delta once), delta, leland, band, whalley_wilmott, move, delta_gamma (with a second option),
    /// minimum_variance and regime_ratio (with futures).
    #[arg(long, default_value = "none,static,delta,leland,band,whalley_wilmott,move", value_delimiter = ',')]
    policy: Vec<String>,
    /// Steps between decisions, comma-separated: a grid with the policies.
    #[arg(long, default_value = "1,5,21", value_delimiter = ',', value_name = "STEPS", allow_negative_numbers = true)]
    rebalance: Vec<i64>,
    /// One-way costs in basis points of traded notional, comma-separated.
    #[arg(long, default_value = "10", value_delimiter = ',', allow_negative_numbers = true)]
    cost_bps: Vec<f64>,
    /// Half of the bid-ask spread of the underlying, in basis points of its price, paid beside --cost-bps.
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true)]
    half_spread_bps: f64,
    /// Cost of each trade whatever its size, in currency per option.
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true)]
    fixed_cost: f64,
    /// Selling the hedge at expiry costs too.
    #[arg(long)]
    unwind: bool,
    /// Band: half-widths in units of delta, comma-separated (default 0.05).
    #[arg(long, value_delimiter = ',', allow_negative_numbers = true)]
    band: Vec<f64>,
    /// Whalley-Wilmott: absolute risk aversions per unit of currency, comma-separated; the first is also that of the entropic risk (default 1).
    #[arg(long, value_delimiter = ',', allow_negative_numbers = true)]
    risk_aversion: Vec<f64>,
    /// Move: relative moves of the price since the last trade that trigger one, comma-separated (default 0.03).
    #[arg(long, value_delimiter = ',', allow_negative_numbers = true)]
    move_threshold: Vec<f64>,
    /// Delta-gamma: strike of the second option, a call, in currency (default: the first strike).
    #[arg(long, allow_negative_numbers = true)]
    gamma_strike: Option<f64>,
    /// Delta-gamma: its years to expiry (default: twice --maturity).
    #[arg(long, value_name = "YEARS", allow_negative_numbers = true)]
    gamma_maturity: Option<f64>,
    /// Delta-gamma: half of its bid-ask spread, in basis points of its price.
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true)]
    gamma_half_spread_bps: f64,
    /// Minimum variance: steps that its ratio is estimated on (default 60).
    #[arg(long, value_name = "STEPS")]
    window: Option<u32>,
    /// Regime ratio: futures sold per unit in each regime of --model regimes, comma-separated.
    #[arg(long, value_delimiter = ',', allow_negative_numbers = true)]
    regime_ratio: Vec<f64>,
    /// Futures: volatility a year of the log basis ln F/S (default 0.05).
    #[arg(long, allow_negative_numbers = true)]
    basis_volatility: Option<f64>,
    /// Futures: speed a year at which the basis returns to 0 (default 20).
    #[arg(long, allow_negative_numbers = true)]
    basis_reversion: Option<f64>,
    /// Futures: correlation of the basis and the price, between -1 and 1 (default 0).
    #[arg(long, allow_negative_numbers = true)]
    basis_correlation: Option<f64>,
    /// Volatilities a year that deltas are computed with, as fractions, comma-separated (default: the market's own).
    #[arg(long, value_delimiter = ',', allow_negative_numbers = true)]
    hedge_volatility: Vec<f64>,
    /// Risk of the frontier and of the verdict: sd, cvar, var or entropic.
    #[arg(long, default_value = "sd")]
    risk: String,
    /// Share of the worst paths that VaR and CVaR are about.
    #[arg(long, default_value_t = 0.05, allow_negative_numbers = true)]
    alpha: f64,
    /// Paths 2i and 2i+1 mirror each other.
    #[arg(long)]
    antithetic: bool,
    /// Set-ups to print; all go into --out and --json.
    #[arg(long, default_value_t = 60)]
    top: usize,
    /// Write report.html, results.parquet, results.csv, run.json and config.toml into this folder.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Show this path step by step, as CSV (into --out as path-N.csv), instead of running all.
    #[arg(long, value_name = "PATH")]
    replay: Option<u64>,
    /// Set-ups of --replay, by number, comma-separated (default: all).
    #[arg(long, value_name = "NUMBER", value_delimiter = ',', requires = "replay")]
    setup: Vec<usize>,
    /// Print set-ups, time and memory that the run would take, and stop.
    #[arg(long, visible_alias = "dry-run")]
    plan: bool,
    /// Read options from a TOML file; the command line wins.
    #[arg(long, value_name = "FILE")]
    pub(super) config: Option<PathBuf>,
    #[command(flatten)]
    common: Common,
}

// ---- options ----------------------------------------------------------------------------------------------------------

fn bad(name: &str, value: &str, help: &str) -> Error {
    Error::Parameter { op: "hedge", name: name.into(), value: value.into(), help: help.into() }
}

fn positive(name: &str, value: f64, help: &str) -> Result<()> {
    if value.is_finite() && value > 0.0 { Ok(()) } else { Err(bad(name, &value.to_string(), help)) }
}

fn not_negative(name: &str, value: f64, help: &str) -> Result<()> {
    if value.is_finite() && value >= 0.0 { Ok(()) } else { Err(bad(name, &value.to_string(), help)) }
}

/// A probability.
fn fraction(name: &str, value: f64, help: &str) -> Result<()> {
    if (0.0..=1.0).contains(&value) { Ok(()) } else { Err(bad(name, &value.to_string(), help)) }
}

/// 1000000, 1_000_000 or 1e6.
fn count(text: &str) -> std::result::Result<u64, String> {
    let plain = text.replace('_', "");
    let number = plain.parse::<u64>().ok().or_else(|| plain.parse::<f64>().ok().filter(|x| x.fract() == 0.0 && (0.0..1.8e19).contains(x)).map(|x| x as u64));
    number.ok_or_else(|| "give a whole number, such as 100000 or 1e6".into())
}

fn or(list: &[f64], default: f64) -> Vec<f64> {
    if list.is_empty() { vec![default] } else { list.to_vec() }
}

const POLICIES: [&str; 10] = ["none", "static", "delta", "leland", "band", "whalley_wilmott", "move", "delta_gamma", "minimum_variance", "regime_ratio"];

impl Args {
    /// The grid of policies; a parameter that none of them takes is a mistake.
    fn policies(&self, spot: f64, maturity: f64) -> Result<Vec<Policy>> {
        let mut all: Vec<Policy> = Vec::new();
        let names: Vec<String> = self.policy.iter().map(|name| name.trim().replace('-', "_")).collect();
        for name in &names {
            let more: Vec<Policy> = match name.as_str() {
                "none" => vec![Policy::None],
                "static" => vec![Policy::Static],
                "delta" => vec![Policy::Delta],
                "leland" => vec![Policy::Leland],
                "band" => or(&self.band, 0.05).into_iter().map(|width| Policy::Band { width }).collect(),
                "whalley_wilmott" => or(&self.risk_aversion, 1.0).into_iter().map(|risk_aversion| Policy::WhalleyWilmott { risk_aversion }).collect(),
                "move" => or(&self.move_threshold, 0.03).into_iter().map(|threshold| Policy::Move { threshold }).collect(),
                "delta_gamma" => {
                    let strike = self.gamma_strike.or(self.strike.first().copied()).unwrap_or(spot);
                    vec![Policy::DeltaGamma { strike, maturity: self.gamma_maturity.unwrap_or(2.0 * maturity), half_spread_bps: self.gamma_half_spread_bps }]
                }
                "minimum_variance" => vec![Policy::MinimumVariance { window: self.window.unwrap_or(60) }],
                "regime_ratio" if self.regime_ratio.is_empty() => {
                    return Err(bad("--policy", name, "needs the futures of each regime: --regime-ratio 0.9,1.1"));
                }
                "regime_ratio" => vec![Policy::RegimeRatio { ratios: self.regime_ratio.clone() }],
                other => return Err(unknown("policy", other, POLICIES)),
            };
            if all.iter().any(|policy| more.contains(policy)) {
                return Err(bad("--policy", name, "is there twice; name each policy once"));
            }
            all.extend(more);
        }
        let serves = [
            ("--band", !self.band.is_empty(), "band"),
            ("--move-threshold", !self.move_threshold.is_empty(), "move"),
            ("--gamma-strike", self.gamma_strike.is_some(), "delta_gamma"),
            ("--gamma-maturity", self.gamma_maturity.is_some(), "delta_gamma"),
            ("--window", self.window.is_some(), "minimum_variance"),
            ("--regime-ratio", !self.regime_ratio.is_empty(), "regime_ratio"),
        ];
        match serves.iter().find(|(_, given, policy)| *given && !names.iter().any(|name| name == policy)) {
            Some((name, _, policy)) => Err(bad(name, "given", &format!("serves --policy {policy}, which is not asked for"))),
            None => Ok(all),
        }
    }

    /// The basis of the futures that policies trade.
    fn basis(&self, policies: &[Policy]) -> Result<Option<Basis>> {
        let given =
            [("--basis-volatility", self.basis_volatility), ("--basis-reversion", self.basis_reversion), ("--basis-correlation", self.basis_correlation)];
        if !policies.iter().any(Policy::trades_futures) {
            let one = given.iter().find(|(_, value)| value.is_some());
            return one.map_or(Ok(None), |(name, _)| Err(bad(name, "given", "serves futures: --policy minimum_variance or regime_ratio")));
        }
        let [volatility, reversion, correlation] =
            [self.basis_volatility.unwrap_or(0.05), self.basis_reversion.unwrap_or(20.0), self.basis_correlation.unwrap_or(0.0)];
        not_negative("--basis-volatility", volatility, "give a fraction a year, 0 or more, such as 0.05")?;
        not_negative("--basis-reversion", reversion, "give a speed a year, 0 or more, such as 20")?;
        if !(correlation.is_finite() && correlation.abs() <= 1.0) {
            let help = "beyond -1 … 1 the correlation matrix of basis and price is not positive definite; give such as 0.3";
            return Err(bad("--basis-correlation", &correlation.to_string(), help));
        }
        Ok(Some(Basis { start: 0.0, mean: 0.0, reversion, volatility, correlation }))
    }

    /// What is wrong whatever the market.
    fn check(&self) -> Result<Risk> {
        let risk = Risk::named(&self.risk).ok_or_else(|| unknown("risk", &self.risk, Risk::NAMES))?;
        if self.paths == 0 {
            return Err(bad("--paths", "0", "give at least one path; 100000 tell deviations apart by half a percent"));
        }
        for &k in &self.rebalance {
            if k < 1 || u32::try_from(k).is_err() {
                return Err(bad("--rebalance", &k.to_string(), "give steps between decisions, 1 or more"));
            }
        }
        self.strike.iter().try_for_each(|&k| positive("--strike", k, "give strikes above 0, in currency"))?;
        self.cost_bps.iter().try_for_each(|&c| not_negative("--cost-bps", c, "give basis points, 0 or more"))?;
        not_negative("--half-spread-bps", self.half_spread_bps, "give basis points, 0 or more")?;
        not_negative("--gamma-half-spread-bps", self.gamma_half_spread_bps, "give basis points, 0 or more")?;
        not_negative("--fixed-cost", self.fixed_cost, "give an amount of currency, 0 or more")?;
        self.band.iter().try_for_each(|&b| not_negative("--band", b, "give half-widths in units of delta, such as 0.05"))?;
        self.risk_aversion.iter().try_for_each(|&a| positive("--risk-aversion", a, "give risk aversions per unit of currency, above 0, such as 1"))?;
        self.move_threshold.iter().try_for_each(|&m| not_negative("--move-threshold", m, "give relative moves, such as 0.03 for 3 %"))?;
        self.hedge_volatility.iter().try_for_each(|&v| market::volatility("--hedge-volatility", v))?;
        self.gamma_strike.map_or(Ok(()), |k| positive("--gamma-strike", k, "give a strike above 0, in currency"))?;
        if !(self.alpha > 0.0 && self.alpha < 1.0) {
            return Err(bad("--alpha", &self.alpha.to_string(), "give a share between 0 and 1, such as 0.05"));
        }
        Ok(risk)
    }

    fn kind(&self) -> Result<OptionKind> {
        Ok(match self.option.as_str() {
            "call" => OptionKind::Call,
            "put" => OptionKind::Put,
            "digital" => OptionKind::Digital,
            "spot" => OptionKind::Spot,
            other => return Err(unknown("option", other, ["call", "put", "digital", "spot"])),
        })
    }

    fn side(&self) -> Result<Position> {
        Ok(match self.position.as_str() {
            "short" => Position::Short,
            "long" => Position::Long,
            other => return Err(unknown("position", other, ["short", "long"])),
        })
    }

    fn request(&self, source: &Source) -> Result<HedgeRequest> {
        let (kind, position) = (self.kind()?, self.side()?);
        let strikes = or(&self.strike, source.spot());
        let options = strikes.into_iter().map(|strike| HedgedOption { kind, strike, maturity: source.maturity, position }).collect();
        let policies = self.policies(source.spot(), source.maturity)?;
        if let Some(&k) = self.rebalance.iter().find(|&&k| k > i64::from(source.steps)) {
            // The default intervals give way to a short path; those that were asked for do not.
            if self.rebalance != [1, 5, 21] {
                return Err(bad("--rebalance", &k.to_string(), &format!("a path has {} steps; `--policy static` trades once", source.steps)));
            }
        }
        let rebalance = self.rebalance.iter().filter(|&&k| k <= i64::from(source.steps)).map(|&k| k as u32).collect();
        let costs = |&bps: &f64| Costs { proportional_bps: bps, half_spread_bps: self.half_spread_bps, fixed: self.fixed_cost, unwind: self.unwind };
        let risk_aversion = self.risk_aversion.first().copied().unwrap_or(1.0);
        let markets = source.markets.clone();
        let request = HedgeRequest {
            markets,
            options,
            policies,
            costs: self.cost_bps.iter().map(costs).collect(),
            rebalance,
            hedge_volatility: if self.hedge_volatility.is_empty() { source.hedge_volatility.into_iter().collect() } else { self.hedge_volatility.clone() },
            steps: source.steps,
            paths: source.paths.map_or(self.paths, |most| self.paths.min(most)),
            seed: self.common.seed,
            antithetic: self.antithetic,
            risk: RiskOptions { alpha: self.alpha, risk_aversion, bins: BINS, ..RiskOptions::default() },
        };
        Ok(request)
    }
}

/// Bins of a histogram; the page shows fewer.
const BINS: usize = 512;

// ---- running ----------------------------------------------------------------------------------------------------------

/// Everything that a run is made of, read and checked.
pub(super) struct Job<'a> {
    args: &'a Args,
    device: Device,
    source: Source,
    request: HedgeRequest,
    risk: Risk,
    /// Futures beside the spot, where a policy trades them.
    basis: Option<Basis>,
    /// How many there are.
    setups: usize,
}

/// A run, and what was made of it.
pub(super) struct Found<'a> {
    job: &'a Job<'a>,
    table: &'a HedgeTable,
    rows: &'a [HedgeRow],
    /// Positions in `rows` of each group's frontier, cheapest first.
    frontiers: Vec<Vec<usize>>,
    verdict: Vec<String>,
    seconds: f64,
}

pub(super) fn run(args: &Args, config: &str) -> Result<ExitCode> {
    let risk = args.check()?;
    let device = args.common.open()?;
    let source = args.market.source(&device, Horizon { maturity: args.maturity, steps: args.steps }, args.common.seed, args.paths)?;
    let request = args.request(&source)?;
    let setups = request.setups().len();
    let basis = args.basis(&request.policies)?;
    let job = Job { args, device, source, request, risk, basis, setups };
    job.refuse_absurd()?;
    job.request.check()?;
    if let Some(dir) = &args.out {
        results::folder(dir)?;
    }
    if let Some(path) = args.replay {
        return job.replay(path);
    }
    if args.plan {
        return job.plan();
    }
    catch_interrupts()?;
    let start = Instant::now();
    let bar = job.progress();
    let table = job.request.run_with(&job.device, &job.sources(), &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
        if is_interrupted() {
            Err(Error::Interrupted { message: "nothing is kept of an unfinished run; fewer --paths or set-ups finish sooner".into() })
        } else {
            Ok(())
        }
    });
    bar.finish_and_clear();
    let table = table?;
    let found = Found::of(&job, &table, start.elapsed().as_secs_f64());
    if let Some(dir) = &args.out {
        let config = config.replace("device = \"auto\"", &format!("device = \"{}\"", job.device.info().kind.name()));
        files::write(dir, &found, &config)?;
    }
    if args.common.json {
        say(&found.json().to_string());
    } else {
        found.text();
    }
    Ok(ExitCode::SUCCESS)
}

impl Job<'_> {
    fn progress(&self) -> ProgressBar {
        if self.args.common.json || !std::io::stderr().is_terminal() {
            return ProgressBar::hidden();
        }
        let style = ProgressStyle::with_template("{bar:40} {percent} %, {eta} left").unwrap_or_else(|_| ProgressStyle::default_bar());
        ProgressBar::new(0).with_style(style)
    }

    fn sources(&self) -> Sources<'_> {
        Sources { basis: self.basis, given: self.source.given.as_deref() }
    }

    /// Path-steps × set-ups.
    fn work(&self, paths: u64) -> f64 {
        paths as f64 * f64::from(self.request.steps) * self.setups as f64
    }

    /// Bytes: results of every path under the set-ups that run at once, and what the program holds anyway.
    fn memory(&self) -> f64 {
        let one = PATH_BYTES * self.request.paths as f64;
        60e6 + one.max((one * self.setups as f64).min(RUN_BYTES))
    }

    fn refuse_absurd(&self) -> Result<()> {
        let (seconds, bytes) = (self.work(self.request.paths) / guess(&self.device), self.memory());
        let most = memory_here().unwrap_or(64e9);
        if seconds <= MOST_SECONDS && bytes <= most {
            return Ok(());
        }
        let what = format!(
            "{:.3e} paths × {} steps × {} set-ups (about {} on {} and {} of memory)",
            self.request.paths as f64,
            self.request.steps,
            self.setups,
            duration(seconds),
            self.device.info().kind.name(),
            size(bytes)
        );
        let help = "lower --paths: standard errors shrink with its root only, and 1e6 paths know a deviation to 0.1 %".into();
        if bytes > most {
            return Err(Error::TooLarge { what, needed: bytes as u64, limit: most as u64, unit: "bytes", help });
        }
        Err(Error::TooLarge { what, needed: seconds.min(1e18) as u64, limit: MOST_SECONDS as u64, unit: "seconds", help })
    }

    /// Measures a few paths and says what the run would take.
    fn plan(&self) -> Result<ExitCode> {
        let paths = self.request.paths.min(4096);
        let probe = HedgeRequest { paths, ..self.request.clone() };
        // The first run also compiles.
        let given = self.source.given.as_ref().map(|g| &g[..paths as usize * (self.request.steps as usize + 1)]);
        let sources = Sources { given, ..self.sources() };
        probe.run_with(&self.device, &sources, &mut |_, _| Ok(()))?;
        let start = Instant::now();
        probe.run_with(&self.device, &sources, &mut |_, _| Ok(()))?;
        let seconds = start.elapsed().as_secs_f64() * self.request.paths as f64 / paths as f64;
        let (steps, kind) = (self.request.steps, self.device.info().kind.name());
        if self.args.common.json {
            let plan = json!({ "paths": self.request.paths, "steps": steps, "setups": self.setups, "seconds": seconds, "memory_bytes": self.memory(), "device": kind });
            say(&json!({ "plan": plan }).to_string());
        } else {
            let (time, memory) = (duration(seconds), size(self.memory()));
            say(&format!(
                "plan     {} paths × {steps} steps × {} set-ups, about {time} on {kind}, {memory} of memory",
                grouped(self.request.paths),
                self.setups
            ));
        }
        Ok(ExitCode::SUCCESS)
    }

    /// A path under a set-up, step by step.
    fn explain(&self, setup: usize, path: u64) -> Result<Explained> {
        self.request.explain_with(&self.device, &self.sources(), setup, path)
    }

    fn replay(&self, path: u64) -> Result<ExitCode> {
        if path >= self.request.paths {
            let help = format!("paths are numbered from 0 to {}", self.request.paths - 1);
            return Err(bad("--replay", &path.to_string(), &help));
        }
        if let Some(setup) = self.args.setup.iter().find(|&&s| s >= self.setups) {
            return Err(bad("--setup", &setup.to_string(), &format!("set-ups are numbered from 0 to {}", self.setups - 1)));
        }
        let chosen: Vec<usize> = match self.args.setup.as_slice() {
            [] => (0..self.setups).collect(),
            some => some.to_vec(),
        };
        let explained = chosen.into_iter().map(|s| self.explain(s, path).map(|e| (s, e))).collect::<Result<Vec<_>>>()?;
        print::replay(self, path, &explained)
    }

    /// Digits after the point of an amount of money.
    fn digits(&self) -> usize {
        let spot = self.source.spot();
        if spot > 0.0 { (5.0 - spot.log10()).round().clamp(1.0, 8.0) as usize } else { 3 }
    }

    fn money(&self, x: f64) -> String {
        if x.is_nan() { "-".into() } else { format!("{x:.*}", self.digits()) }
    }

    fn provenance(&self) -> Value {
        let (args, request) = (self.args, &self.request);
        json!({
            "version": env!("CARGO_PKG_VERSION"), "command": std::env::args().collect::<Vec<_>>(), "device": self.device.info().to_string(), "seed": request.seed,
            "market": self.source.json, "markets": self.source.markets.iter().map(|m| format!("{m:?}")).collect::<Vec<_>>(), "described": self.source.line,
            "notes": self.source.notes, "option": args.option, "position": args.position, "maturity": self.source.maturity,
            "strikes": request.options.iter().map(|o| o.strike).collect::<Vec<_>>(), "steps": request.steps, "paths": request.paths,
            "antithetic": request.antithetic, "alpha": request.risk.alpha, "risk_aversion": request.risk.risk_aversion, "risk": self.risk.name(),
        })
    }
}

impl<'a> Found<'a> {
    fn of(job: &'a Job<'a>, table: &'a HedgeTable, seconds: f64) -> Found<'a> {
        let rows = &table.rows;
        let frontiers = judge::groups(rows).iter().map(|group| judge::frontier(rows, group, job.risk)).collect();
        let models = job.source.markets.iter().map(|m| &m.model).collect();
        let verdict = judge::Verdict { rows, risk: job.risk, money: &|x| job.money(x), models }.sentences();
        Found { job, table, rows, frontiers, verdict, seconds }
    }

    fn is_on_frontier(&self, row: usize) -> bool {
        self.frontiers.iter().any(|frontier| frontier.contains(&row))
    }
}

/// Longest run that is begun.
const MOST_SECONDS: f64 = 7.0 * 86_400.0;
/// Bytes of a path under a set-up until it is judged: profit and loss, cost and turnover, and the same once more while they are read.
const PATH_BYTES: f64 = 24.0;
/// Bytes that set-ups which run at once may take together.
const RUN_BYTES: f64 = 4e8;

/// Path-steps × set-ups a second that a first guess may count on.
fn guess(device: &Device) -> f64 {
    match device.info().kind {
        DeviceKind::Cpu => 2e8 * rayon::current_num_threads() as f64,
        DeviceKind::Wgpu if !device.info().software => 1e10,
        DeviceKind::Cuda => 1e11,
        DeviceKind::Wgpu => 1e8,
        DeviceKind::Reference => 1e7,
        DeviceKind::CudaHost => 1e6,
    }
}

/// Bytes that this machine could give, where the system tells.
fn memory_here() -> Option<f64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let kilobytes = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?.split_whitespace().next()?;
    Some(kilobytes.parse::<f64>().ok()? * 1024.0)
}

/// A whole number with commas.
fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let groups: Vec<&str> = digits.as_bytes().rchunks(3).rev().filter_map(|part| std::str::from_utf8(part).ok()).collect();
    groups.join(",")
}
