//! What `forback sweep` prints: a text for people, one JSON object for programs.

use super::say;
use super::sweep::{Args, Prepared};
use crate::data::Prices;
use crate::kernels::performance::Performance;
use crate::sim::luck::Luck;
use crate::sim::portfolio::Pooled;
use crate::sim::sweep::{OutOfSample, SetMean, SweepReport};
use serde_json::{Value, json};

/// Everything that the two outputs are made of.
pub(super) struct Printed<'a> {
    pub(super) args: &'a Args,
    pub(super) prepared: &'a Prepared,
    pub(super) report: &'a SweepReport,
    pub(super) luck: Option<&'a Luck>,
    pub(super) seconds: f64,
}

pub(super) fn number(x: f64) -> Value {
    if x.is_finite() { json!(x) } else { Value::Null }
}

pub(super) fn percent(x: f64) -> String {
    if x.is_nan() { "-".into() } else { format!("{:.1}%", 100.0 * x) }
}

pub(super) fn ratio(x: f64) -> String {
    if x.is_nan() { "-".into() } else { format!("{x:.2}") }
}

impl Printed<'_> {
    /// Turnover per year from a total over all counted bars.
    fn per_year(&self, turnover: f64) -> f64 {
        let bars = (self.report.bars.saturating_sub(1) as f64 - f64::from(self.report.start)).max(1.0);
        turnover / bars * self.prepared.config.periods_per_year
    }

    pub(super) fn text(&self) {
        let (report, prices) = (self.report, &self.prepared.prices);
        let (first, last) = (prices.times.first(), prices.times.last());
        let time = |t: Option<&i64>| t.map(|t| prices.format_time(*t)).unwrap_or_default();
        say(&format!("device   {}", self.prepared.device.info()));
        say(&format!("data     {}: {} × {} bars, {} to {}", prices.sources.join(", "), assets(prices), report.bars, time(first), time(last)));
        let derived = if self.args.prices.columns.periods_per_year.is_some() { "as given" } else { "derived from the dates" };
        say(&format!("         {:.1} periods per year ({derived})", self.prepared.config.periods_per_year));
        self.notes();
        say(&format!(
            "sweep    {} {}: {} sets × {} × {} bars{} in {:.2} s, {:.3e} set-bars/s",
            self.prepared.config.grid.strategy().name,
            self.prepared.config.grid,
            report.sets.len(),
            assets(prices),
            report.bars,
            if report.costs.len() > 1 { format!(" × {} costs", report.costs.len()) } else { String::new() },
            self.seconds,
            report.work() / self.seconds
        ));
        say(&format!("         {} after a warm-up of {} bars, {} bp one way", self.args.execution, report.start, costs(&self.prepared.config.cost_bps)));
        if let Some(regimes) = &self.prepared.regimes {
            regimes.say(prices);
        }
        self.ranking();
        if let Some(luck) = self.luck {
            say("\nwhat luck explains");
            luck.verdict().iter().for_each(|line| say(line));
        }
        self.out_of_sample();
        if let Some(dir) = &self.args.out {
            say(&format!("\nwrote    {}", dir.display()));
        }
    }

    fn notes(&self) {
        for note in &self.prepared.prices.notes {
            say(&format!("note     {note}"));
        }
        let dropped = &self.prepared.prices.dropped;
        for d in dropped.iter().take(8) {
            say(&format!("dropped  {}: {}", d.symbol, d.reason));
        }
        if dropped.len() > 8 {
            say(&format!("dropped  {} more: {}", dropped.len() - 8, dropped[8..].iter().map(|d| d.symbol.as_str()).collect::<Vec<_>>().join(", ")));
        }
        if !self.prepared.prices.filled.is_empty() {
            let cells: usize = self.prepared.prices.filled.iter().map(|(_, n)| n).sum();
            say(&format!("filled   {cells} cells of {} assets with the last price", self.prepared.prices.filled.len()));
        }
    }

    fn ranking(&self) {
        let report = self.report;
        let best = report.ranked(0, self.prepared.config.rank_by, self.args.top);
        let mean = if report.assets > 1 { ", means over assets" } else { "" };
        say(&format!("\nbest in sample by {} at {} bp{mean}", self.args.rank_by, self.prepared.config.cost_bps[0]));
        let names = &report.sets.names;
        let width = |name: &str| name.len().max(7);
        let head: String = names.iter().map(|n| format!(" {n:>w$}", w = width(n))).collect();
        say(&format!("{:>8}{head} {:>8} {:>10} {:>9} {:>11} {:>8}", "set", "sharpe", "return", "drawdown", "turnover/yr", "trades"));
        for set in best {
            let s = report.set(0, set);
            let values: String = report.sets.get(set).iter().map(|(n, v)| format!(" {v:>w$}", w = width(n))).collect();
            say(&format!(
                "{:>8}{values} {:>8} {:>10} {:>9} {:>11.1} {:>8}",
                report.id(set),
                ratio(s.sharpe),
                percent(s.total_return),
                percent(s.max_drawdown),
                self.per_year(s.turnover),
                s.trades
            ));
        }
    }

    fn out_of_sample(&self) {
        let report = self.report;
        let many = report.assets > 1;
        let bars = if report.windows.is_empty() {
            "all counted bars".to_string()
        } else {
            format!("{} stitched bars of {} windows", report.stitched_bars.len(), report.windows.len())
        };
        if let Some(scheme) = &self.prepared.config.walk_forward {
            say(&format!("\nout of sample, {scheme}: {bars}{}", if many { ", equal-weight portfolio" } else { "" }));
        } else {
            say(&format!("\nagainst {bars}{}", if many { ", equal-weight portfolio" } else { "" }));
        }
        let spread = if many { format!(" {:>22}", "asset sharpe 10-50-90%") } else { String::new() };
        say(&format!("{:<28} {:>8} {:>10} {:>9} {:>8} {:>8} {:>11}{spread}", "", "sharpe", "return", "drawdown", "sortino", "P(SR>0)", "turnover/yr"));
        for level in &report.costs {
            for (name, chosen) in [("per asset", &level.per_asset), ("pooled", &level.pooled)] {
                if let Some(chosen) = chosen {
                    self.row(&format!("chosen {name}, {} bp", level.cost_bps), chosen, many);
                    for (scheme, pooled) in &chosen.portfolios {
                        self.pooled(&format!("  portfolio {}, {} bp", scheme.name(), level.cost_bps), pooled);
                    }
                }
            }
        }
        if let Some(hold) = &report.buy_and_hold {
            self.row("buy and hold", hold, many);
        }
        if report.costs.iter().any(|c| c.per_asset.is_some() || c.pooled.is_some()) {
            say("changing sets between windows is not charged; each window's sets trade at the costs above");
        }
    }

    fn pooled(&self, name: &str, pooled: &Pooled) {
        let p = &pooled.performance;
        let idle = if pooled.trades == 0 { "   no share is wider than the band: nothing traded" } else { "" };
        let turnover = pooled.turnover / pooled.net.len().max(1) as f64 * self.prepared.config.periods_per_year;
        say(&format!(
            "{name:<28} {:>8} {:>10} {:>9} {:>8} {:>8} {turnover:>11.1}{idle}",
            ratio(p.sharpe),
            percent(p.total_return),
            percent(p.max_drawdown),
            ratio(p.sortino),
            ratio(p.probabilistic_sharpe),
        ));
    }

    fn row(&self, name: &str, o: &OutOfSample, many: bool) {
        let p = &o.portfolio;
        let spread = if many { format!(" {:>22}", deciles(&o.assets)) } else { String::new() };
        say(&format!(
            "{name:<28} {:>8} {:>10} {:>9} {:>8} {:>8} {:>11.1}{spread}",
            ratio(p.sharpe),
            percent(p.total_return),
            percent(p.max_drawdown),
            ratio(p.sortino),
            ratio(p.probabilistic_sharpe),
            o.turnover * self.prepared.config.periods_per_year
        ));
    }

    pub(super) fn json(&self) {
        let report = self.report;
        let performance = |p: &Performance| Value::Object(p.entries().into_iter().map(|(k, v)| (k.to_string(), number(v))).collect());
        let out = |o: &Option<OutOfSample>| {
            o.as_ref().map(|o| {
                json!({ "portfolio": performance(&o.portfolio), "turnover_per_year": number(o.turnover * self.prepared.config.periods_per_year), "trades": o.trades,
                    "assets": o.assets.iter().zip(&self.prepared.prices.symbols).map(|(p, s)| json!({ "symbol": s, "sharpe": number(p.sharpe),
                        "total_return": number(p.total_return), "max_drawdown": number(p.max_drawdown) })).collect::<Vec<_>>(),
                    "portfolios": o.portfolios.iter().map(|(scheme, p)| json!({ "shares": scheme.name(), "performance": performance(&p.performance),
                        "turnover_per_year": number(p.turnover / p.net.len().max(1) as f64 * self.prepared.config.periods_per_year), "trades": p.trades,
                        "status": format!("{:?}", p.status) })).collect::<Vec<_>>(),
                    "best": o.best.iter().map(|&set| report.id(set as usize)).collect::<Vec<_>>() })
            })
        };
        let set = |cost: usize, s: usize| json_of_set(report.id(s), report.sets.get(s), &report.set(cost, s));
        let levels: Vec<Value> = report
            .costs
            .iter()
            .enumerate()
            .map(|(c, level)| {
                let top: Vec<Value> = report.ranked(c, self.prepared.config.rank_by, self.args.top).into_iter().map(|s| set(c, s)).collect();
                json!({ "cost_bps": level.cost_bps, "top": top, "per_asset": out(&level.per_asset), "pooled": out(&level.pooled) })
            })
            .collect();
        let line = json!({
            "run": self.prepared.provenance_with_command(), "partial": false, "sets": report.sets.len(), "assets": report.assets, "bars": report.bars, "start": report.start, "windows": report.windows.len(),
            "stitched_bars": report.stitched_bars.len(), "seconds": self.seconds, "set_bars_per_second": report.work() / self.seconds,
            "launches": report.launches, "submits": report.submits, "costs": levels, "luck": self.luck.map(luck_of), "buy_and_hold": out(&report.buy_and_hold),
        });
        say(&line.to_string());
    }
}

fn luck_of(l: &Luck) -> Value {
    json!({ "trials": l.trials, "best": number(l.best), "expected_best": number(l.expected_best), "probabilistic_sharpe": number(l.probabilistic),
        "deflated_sharpe": number(l.deflated), "pbo": l.overfitting.as_ref().map(|o| number(o.pbo)), "level": l.level,
        "in_sample": [number(l.in_sample.lower), number(l.in_sample.upper)],
        "out_of_sample": l.out_of_sample.map(|i| [number(i.lower), number(i.upper)]),
        "years": number(l.years), "minimum_years": number(l.minimum_years), "minimum_years_deflated": number(l.minimum_years_deflated),
        "verdict": l.verdict() })
}

pub(super) fn json_of_set(id: u64, parameters: Vec<(&'static str, f32)>, m: &SetMean) -> Value {
    let parameters: serde_json::Map<String, Value> = parameters.into_iter().map(|(k, v)| (k.to_string(), json!(v))).collect();
    json!({ "set": id, "parameters": parameters, "sharpe": number(m.sharpe), "total_return": number(m.total_return),
        "max_drawdown": number(m.max_drawdown), "turnover": number(m.turnover), "trades": m.trades })
}

fn assets(prices: &Prices) -> String {
    match prices.symbols.as_slice() {
        [one] => one.clone(),
        many => format!("{} assets", many.len()),
    }
}

fn costs(bps: &[f64]) -> String {
    bps.iter().map(f64::to_string).collect::<Vec<_>>().join(", ")
}

/// Deciles of the assets' Sharpe ratios.
fn deciles(assets: &[Performance]) -> String {
    let mut sharpes: Vec<f64> = assets.iter().map(|p| p.sharpe).filter(|s| !s.is_nan()).collect();
    sharpes.sort_by(f64::total_cmp);
    let at = |q: f64| sharpes.get(((sharpes.len().max(1) - 1) as f64 * q).round() as usize).copied().unwrap_or(f64::NAN);
    format!("{} {} {}", ratio(at(0.1)), ratio(at(0.5)), ratio(at(0.9)))
}
