//! What `forback hedge` prints: a text for people, one JSON object for programs, CSV for a path.

use super::judge::{label, phrase};
use super::{Found, Job, grouped};
use crate::cli::print::number;
use crate::cli::results::Whole;
use crate::cli::say;
use crate::cli::sweep::duration;
use crate::sim::hedge::{Explained, HedgeRow, Policy, Setup};
use crate::{Error, Result};
use serde_json::{Map, Value, json};
use std::process::ExitCode;

/// Name, and where it is.
type Figure = (&'static str, fn(&HedgeRow) -> f64);

/// The figures of a row. P&L, costs and risks are currency per option at expiry; turnover is traded notional / spot.
pub(super) const FIGURES: [Figure; 25] = [
    ("premium", |r| r.premium),
    ("mean", |r| r.risk.mean),
    ("mean_error", |r| r.risk.mean_error),
    ("sd", |r| r.risk.sd),
    ("sd_error", |r| r.risk.sd_error),
    ("skew", |r| r.risk.skew),
    ("min", |r| r.risk.min),
    ("max", |r| r.risk.max),
    ("var", |r| r.risk.var),
    ("var_order", |r| r.risk.var_order),
    ("var_error", |r| r.risk.var_error),
    ("cvar", |r| r.risk.cvar),
    ("cvar_tail_mean", |r| r.risk.cvar_tail_mean),
    ("cvar_error", |r| r.risk.cvar_error),
    ("entropic", |r| r.risk.entropic),
    ("entropic_error", |r| r.risk.entropic_error),
    ("indifference_price", |r| r.risk.indifference_price),
    ("cost", |r| r.risk.cost),
    ("cost_error", |r| r.risk.cost_error),
    ("turnover", |r| r.risk.turnover),
    ("theory_sd", |r| r.theory.sd),
    ("theory_cost", |r| r.theory.cost),
    ("hedge_volatility", |r| r.setup.hedge_volatility),
    ("half_spread_bps", |r| r.setup.costs.half_spread_bps),
    ("fixed_cost", |r| r.setup.costs.fixed),
];

/// Parameter of a policy, where it has one.
pub(super) fn parameter(policy: &Policy) -> f64 {
    match policy {
        Policy::Band { width } => *width,
        Policy::WhalleyWilmott { risk_aversion } => *risk_aversion,
        Policy::Move { threshold } => *threshold,
        Policy::DeltaGamma { strike, .. } => *strike,
        Policy::MinimumVariance { window } => f64::from(*window),
        _ => f64::NAN,
    }
}

impl Found<'_> {
    pub(super) fn text(&self) {
        let (job, request) = (self.job, &self.job.request);
        say(&format!("device   {}", job.device.info()));
        say(&format!("market   {}", job.source.line));
        job.source.notes.iter().for_each(|note| say(&format!("note     {note}")));
        if let Some(option) = request.options.first() {
            let side = option.position.name();
            let strikes: Vec<String> = request.options.iter().map(|o| format!("{}", round(o.strike))).collect();
            let premium = self.rows.first().map_or(f64::NAN, |row| row.premium);
            say(&format!(
                "option   {side} 1 {}, strike {}, {} years in {} steps; premium {}",
                option.kind.name(),
                strikes.join(", "),
                round(option.maturity),
                request.steps,
                job.money(premium.abs())
            ));
        }
        let time = if self.seconds < 10.0 { format!("{:.2} s", self.seconds) } else { duration(self.seconds) };
        let rate = job.work(self.table.paths) / self.seconds;
        say(&format!(
            "run      {} paths{} × {} set-ups, seed {}, in {time}: {rate:.3e} path-steps × set-ups/s",
            grouped(self.table.paths),
            if request.antithetic { " in mirrored pairs" } else { "" },
            job.setups,
            request.seed
        ));
        self.rows_of_text();
        say("");
        self.verdict.iter().for_each(|line| say(line));
        if let Some(dir) = &job.args.out {
            say(&format!("\nwrote    {}", dir.display()));
        }
    }

    fn rows_of_text(&self) {
        let (job, request) = (self.job, &self.job.request);
        let percent = format!("{}%", round(100.0 * request.risk.alpha));
        say(&format!("\nprofit and loss per option at expiry, in currency; ± are standard errors; * on the frontier of cost against {}", job.risk.name()));
        let (markets, strikes, volatilities) = (request.markets.len() > 1, request.options.len() > 1, request.hedge_volatility.len() > 1);
        let mut extra = String::new();
        if markets {
            extra += &format!(" {:>14}", "market");
        }
        if strikes {
            extra += &format!(" {:>10}", "strike");
        }
        if volatilities {
            extra += &format!(" {:>9}", "hedge vol");
        }
        let w = (job.digits() + 6).max(8);
        say(&format!(
            "{:>4}  {:<19} {:>5} {:>6}{extra} {:>w$} {:>8} {:>w$} {:>8} {:>w$} {:>w$} {:>8} {:>w$} {:>w$} {:>8} {:>w$} {:>w$}",
            "#",
            "policy",
            "every",
            "bp",
            "mean",
            "±",
            "sd",
            "±",
            "theory",
            format!("CVaR {percent}"),
            "±",
            format!("VaR {percent}"),
            "entropic",
            "turnover",
            "cost",
            "theory"
        ));
        for (i, row) in self.rows.iter().enumerate().take(job.args.top) {
            let (s, r) = (&row.setup, &row.risk);
            let mut extra = String::new();
            if markets {
                extra += &format!(" {:>14}", request.markets[s.market].name);
            }
            if strikes {
                extra += &format!(" {:>10}", round(request.options[s.option].strike));
            }
            if volatilities {
                extra += &format!(" {:>9}", round(s.hedge_volatility));
            }
            let money = |x: f64| job.money(x);
            let error = |x: f64| if x.is_finite() { format!("{x:.*}", job.digits() + 1) } else { "-".into() };
            let every = if matches!(s.policy, Policy::None | Policy::Static) { "-".into() } else { s.rebalance.to_string() };
            say(&format!(
                "{:>4}{} {:<19} {every:>5} {:>6}{extra} {:>w$} {:>8} {:>w$} {:>8} {:>w$} {:>w$} {:>8} {:>w$} {:>w$} {:>8.2} {:>w$} {:>w$}",
                i,
                if self.is_on_frontier(i) { "*" } else { " " },
                label(&s.policy),
                if s.policy == Policy::None { "-".into() } else { round(s.costs.proportional_bps).to_string() },
                money(r.mean),
                error(r.mean_error),
                money(r.sd),
                error(r.sd_error),
                money(row.theory.sd),
                money(r.cvar),
                error(r.cvar_error),
                money(r.var),
                money(r.entropic),
                r.turnover,
                money(r.cost),
                money(row.theory.cost)
            ));
        }
        if self.rows.len() > job.args.top {
            say(&format!("… {} more; --top, --out and --json have them", self.rows.len() - job.args.top));
        }
    }

    pub(super) fn json(&self) -> Value {
        let rows: Vec<Value> = (0..self.rows.len()).map(|i| self.json_of(i)).collect();
        let frontiers: Vec<Value> = self.frontiers.iter().map(|f| json!(f)).collect();
        json!({ "run": self.job.provenance(), "rows": rows, "frontiers": frontiers, "verdict": self.verdict, "seconds": self.seconds,
            "launches": self.table.launches, "path_steps_per_second": self.job.work(self.table.paths) / self.seconds })
    }

    fn json_of(&self, i: usize) -> Value {
        let (row, request) = (&self.rows[i], &self.job.request);
        let mut all = json_of_setup(i, &row.setup, request.markets.get(row.setup.market).map_or("", |m| &m.name));
        if let Some(option) = request.options.get(row.setup.option) {
            all.insert("strike".into(), json!(option.strike));
        }
        all.insert("frontier".into(), json!(self.is_on_frontier(i)));
        FIGURES.iter().for_each(|(name, of)| {
            all.insert((*name).into(), number(of(row)));
        });
        Value::Object(all)
    }
}

fn json_of_setup(number_of: usize, s: &Setup, market: &str) -> Map<String, Value> {
    let value = json!({ "setup": number_of, "market": market, "policy": s.policy.name(), "parameter": number(parameter(&s.policy)), "rebalance": s.rebalance,
        "cost_bps": s.costs.proportional_bps, "unwind": s.costs.unwind, "name": phrase(s) });
    if let Value::Object(map) = value { map } else { Map::new() }
}

/// Seven digits at most.
pub(super) fn round(x: f64) -> f64 {
    format!("{x:.6e}").parse().unwrap_or(x)
}

// ---- a path -----------------------------------------------------------------------------------------------------------

const COLUMNS: [&str; 18] = [
    "setup",
    "policy",
    "rebalance",
    "cost_bps",
    "step",
    "time_years",
    "spot",
    "delta",
    "gamma",
    "holding",
    "trade",
    "cost",
    "cash",
    "pnl",
    "hedge_price",
    "option_holding",
    "option_trade",
    "payoff",
];

/// A path under the chosen set-ups: CSV on stdout or in the folder, or one JSON object.
pub(super) fn replay(job: &Job<'_>, path: u64, explained: &[(usize, Explained)]) -> Result<ExitCode> {
    let setups = job.request.setups();
    if job.args.common.json {
        let one = |(s, e): &(usize, Explained)| {
            let mut all = json_of_setup(*s, &setups[*s], job.request.markets.get(setups[*s].market).map_or("", |m| &m.name));
            let steps: Vec<Value> = e
                .steps
                .iter()
                .map(|t| {
                    json!({ "step": t.step, "time": t.time, "spot": t.spot, "delta": number(t.delta), "gamma": number(t.gamma),
                "holding": t.holding, "trade": t.trade, "cost": t.cost, "cash": t.cash, "pnl": number(t.pnl), "hedge_price": number(t.hedge_price),
                "option_holding": t.option_holding, "option_trade": t.option_trade })
                })
                .collect();
            for (name, value) in [("pnl", json!(e.pnl)), ("cost", json!(e.cost)), ("payoff", json!(e.payoff)), ("steps", json!(steps))] {
                all.insert(name.into(), value);
            }
            Value::Object(all)
        };
        say(&json!({ "run": job.provenance(), "path": path, "replays": explained.iter().map(one).collect::<Vec<_>>() }).to_string());
        return Ok(ExitCode::SUCCESS);
    }
    let text = csv_of(&setups, explained)?;
    match &job.args.out {
        None => text.lines().for_each(say),
        Some(dir) => {
            let name = format!("path-{path}.csv");
            Whole::text(dir, &name, &text)?;
            say(&format!("{:>4}  {:<28} {:>9} {:>9} {:>9} {:>7}", "#", "set-up", "P&L", "cost", "payoff", "trades"));
            for (s, e) in explained {
                let trades = e.steps.iter().filter(|t| t.trade != 0.0 || t.option_trade != 0.0).count();
                let [pnl, cost, payoff] = [e.pnl, e.cost, e.payoff].map(|x| job.money(x));
                say(&format!("{s:>4}  {:<28} {pnl:>9} {cost:>9} {payoff:>9} {trades:>7}", phrase(&setups[*s])));
            }
            say(&format!("\nwrote    {}", dir.join(name).display()));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// A row per set-up and step; the last step is expiry, where `pnl` is what the run counts.
fn csv_of(setups: &[Setup], explained: &[(usize, Explained)]) -> Result<String> {
    let failed = |e: csv::Error| Error::Internal(e.to_string());
    let mut csv = csv::Writer::from_writer(Vec::new());
    csv.write_record(COLUMNS).map_err(failed)?;
    for (s, e) in explained {
        let setup = &setups[*s];
        for (i, t) in e.steps.iter().enumerate() {
            let payoff = if i + 1 == e.steps.len() { format!("{:?}", e.payoff) } else { String::new() };
            let mut cells =
                vec![s.to_string(), label(&setup.policy), setup.rebalance.to_string(), format!("{:?}", setup.costs.proportional_bps), t.step.to_string()];
            let reals = [t.time, t.spot, t.delta, t.gamma, t.holding, t.trade, t.cost, t.cash, t.pnl, t.hedge_price, t.option_holding, t.option_trade];
            cells.extend(reals.iter().map(|x| if x.is_finite() { format!("{x:?}") } else { String::new() }));
            cells.push(payoff);
            csv.write_record(&cells).map_err(failed)?;
        }
    }
    let bytes = csv.into_inner().map_err(|e| Error::Internal(e.to_string()))?;
    String::from_utf8(bytes).map_err(|e| Error::Internal(e.to_string()))
}
