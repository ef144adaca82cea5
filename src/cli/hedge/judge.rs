//! What to make of a table of hedges: which of them nobody should leave for another (the efficient frontier of cost against risk), and a
//! verdict in words.
//!
//! Compared are set-ups of one market, one option and one level of costs; a hedger chooses policy, interval and volatility. Of two figures
//! the smaller is smaller only beyond two standard errors of their difference, taken as independent: over common random numbers that is
//! on the safe side.

use crate::sim::hedge::{Costs, HedgeRow, Model, Policy, Setup};
use std::collections::BTreeMap;

/// What is called risk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Risk {
    Sd,
    Cvar,
    Var,
    Entropic,
}

impl Risk {
    pub(super) const NAMES: [&'static str; 4] = ["sd", "cvar", "var", "entropic"];

    pub(super) fn named(name: &str) -> Option<Risk> {
        Some(match name {
            "sd" => Risk::Sd,
            "cvar" => Risk::Cvar,
            "var" => Risk::Var,
            "entropic" => Risk::Entropic,
            _ => return None,
        })
    }

    pub(super) fn name(self) -> &'static str {
        Risk::NAMES[self as usize]
    }

    pub(super) fn of(self, row: &HedgeRow) -> f64 {
        match self {
            Risk::Sd => row.risk.sd,
            Risk::Cvar => row.risk.cvar,
            Risk::Var => row.risk.var,
            Risk::Entropic => row.risk.entropic,
        }
    }

    fn error(self, row: &HedgeRow) -> f64 {
        let error = match self {
            Risk::Sd => row.risk.sd_error,
            Risk::Cvar => row.risk.cvar_error,
            Risk::Var => row.risk.var_error,
            Risk::Entropic => row.risk.entropic_error,
        };
        if error.is_finite() { error } else { 0.0 }
    }
}

/// Name of a policy with its parameter.
pub(super) fn label(policy: &Policy) -> String {
    match policy {
        Policy::Band { width } => format!("band {width}"),
        Policy::WhalleyWilmott { risk_aversion } => format!("whalley_wilmott {risk_aversion}"),
        Policy::Move { threshold } => format!("move {threshold}"),
        Policy::DeltaGamma { strike, .. } => format!("delta_gamma {strike}"),
        Policy::MinimumVariance { window } => format!("minimum_variance {window}"),
        other => other.name().into(),
    }
}

/// The same with its interval, for sentences.
pub(super) fn phrase(setup: &Setup) -> String {
    let name = label(&setup.policy);
    match (&setup.policy, setup.rebalance) {
        (Policy::None, _) => "no hedge".into(),
        (Policy::Static, _) => name,
        (_, 1) => format!("{name} every step"),
        (_, k) => format!("{name} every {k} steps"),
    }
}

/// Rows by market, option and costs, in the order of the table; a row without a hedge, which has no costs, belongs to all of its market and
/// option.
pub(super) fn groups(rows: &[HedgeRow]) -> Vec<Vec<usize>> {
    let place = |s: &Setup| (s.market, s.option);
    let key = |s: &Setup| (place(s), s.costs.proportional_bps.to_bits(), s.costs.half_spread_bps.to_bits(), s.costs.fixed.to_bits());
    let bare = |i: &usize| rows[*i].setup.policy == Policy::None;
    let mut all: BTreeMap<_, Vec<usize>> = BTreeMap::new();
    (0..rows.len()).filter(|i| !bare(i)).for_each(|i| all.entry(key(&rows[i].setup)).or_default().push(i));
    for i in (0..rows.len()).filter(bare) {
        let mut placed = false;
        for (_, group) in all.iter_mut().filter(|(k, _)| k.0 == place(&rows[i].setup)) {
            group.push(i);
            placed = true;
        }
        if !placed {
            all.entry(key(&rows[i].setup)).or_default().push(i);
        }
    }
    let mut groups: Vec<Vec<usize>> = all.into_values().collect();
    groups.iter_mut().for_each(|group| group.sort_unstable());
    // By the first row that is a group's own.
    groups.sort_by_key(|group| group.iter().copied().find(|i| !bare(i)).unwrap_or(group[0]));
    groups
}

/// The costs that a group shares.
pub(super) fn costs_of(rows: &[HedgeRow], group: &[usize]) -> Costs {
    let own = group.iter().find(|&&i| rows[i].setup.policy != Policy::None).or(group.first());
    own.map_or_else(|| Costs::bps(0.0), |&i| rows[i].setup.costs)
}

/// Rows of a group that no other one beats in both cost and risk, cheapest first.
pub(super) fn frontier(rows: &[HedgeRow], group: &[usize], risk: Risk) -> Vec<usize> {
    let mut order: Vec<usize> = group.iter().copied().filter(|&i| risk.of(&rows[i]).is_finite() && rows[i].risk.cost.is_finite()).collect();
    order.sort_by(|&a, &b| rows[a].risk.cost.total_cmp(&rows[b].risk.cost).then(risk.of(&rows[a]).total_cmp(&risk.of(&rows[b]))).then(a.cmp(&b)));
    let mut best = f64::INFINITY;
    order.retain(|&i| {
        let better = risk.of(&rows[i]) < best;
        best = best.min(risk.of(&rows[i]));
        better
    });
    order
}

fn clearly_less(a: (f64, f64), b: (f64, f64)) -> bool {
    a.0 < b.0 - 2.0 * a.1.hypot(b.1)
}

/// What the numbers say, a sentence each.
pub(super) struct Verdict<'a> {
    pub(super) rows: &'a [HedgeRow],
    pub(super) risk: Risk,
    /// Writes an amount of money.
    pub(super) money: &'a dyn Fn(f64) -> String,
    /// The model of each market.
    pub(super) models: Vec<&'a Model>,
}

/// Most groups that get a sentence.
const SPOKEN: usize = 4;

impl Verdict<'_> {
    pub(super) fn sentences(&self) -> Vec<String> {
        let groups = groups(self.rows);
        let mut lines: Vec<String> = groups.iter().take(SPOKEN).flat_map(|group| self.of_group(group, groups.len() > 1)).collect();
        if groups.len() > SPOKEN {
            lines.push(format!("The other {} combinations of market, option and cost are in the table alone.", groups.len() - SPOKEN));
        }
        lines.extend(self.theory());
        lines.push(self.caveat());
        lines
    }

    fn risk_of(&self, i: usize) -> f64 {
        self.risk.of(&self.rows[i])
    }

    fn of_group(&self, group: &[usize], several: bool) -> Vec<String> {
        let (money, rows, name) = (self.money, self.rows, self.risk.name());
        let Some(&least) = group.iter().min_by(|&&a, &&b| self.risk_of(a).total_cmp(&self.risk_of(b))) else { return Vec::new() };
        let first = &rows[least].setup;
        let costs = costs_of(rows, group);
        let mut at = format!("At {} bp", costs.proportional_bps + costs.half_spread_bps);
        if several && self.models.len() > 1 {
            at += &format!(" in market {}", first.market);
        }
        if several && rows.iter().any(|row| row.setup.option != first.option) {
            at += &format!(" for option {}", first.option);
        }
        let mut lines = Vec::new();
        let bare = group.iter().copied().find(|&i| rows[i].setup.policy == Policy::None);
        let against = match bare {
            Some(bare) if bare == least => ": no hedge at all has the least risk here".to_string(),
            Some(bare) if self.risk_of(bare) > 0.0 => {
                let share = 100.0 * self.risk_of(least) / self.risk_of(bare);
                format!(", {share:.0} % of the {} without a hedge", money(self.risk_of(bare)))
            }
            _ => String::new(),
        };
        lines.push(format!(
            "{at}, {} leaves the least risk: {name} {}{against}; it costs {} on average.",
            phrase(&rows[least].setup),
            money(self.risk_of(least)),
            money(rows[least].risk.cost)
        ));
        lines.extend(self.cheaper(group, least));
        lines.extend(self.against_delta(group));
        lines
    }

    /// What a little more risk saves.
    fn cheaper(&self, group: &[usize], least: usize) -> Option<String> {
        let (rows, cost) = (self.rows, self.rows[least].risk.cost);
        let near = |&i: &usize| i != least && self.risk_of(i) <= 1.25 * self.risk_of(least) && rows[i].risk.cost < 0.9 * cost;
        let found = frontier(rows, group, self.risk).into_iter().filter(near).min_by(|&a, &b| rows[a].risk.cost.total_cmp(&rows[b].risk.cost))?;
        Some(format!(
            "With {:.0} % more risk, {} saves {:.0} % of that cost.",
            100.0 * (self.risk_of(found) / self.risk_of(least) - 1.0),
            phrase(&rows[found].setup),
            100.0 * (1.0 - rows[found].risk.cost / cost)
        ))
    }

    /// Whether plain delta at the finest interval is beaten in both.
    fn against_delta(&self, group: &[usize]) -> Option<String> {
        let rows = self.rows;
        let delta = group.iter().copied().filter(|&i| rows[i].setup.policy == Policy::Delta).min_by_key(|&i| rows[i].setup.rebalance)?;
        let both = |i: usize| ((self.risk_of(i), self.risk.error(&rows[i])), (rows[i].risk.cost, rows[i].risk.cost_error));
        let (risk, cost) = both(delta);
        if group.len() < 2 || cost.0 <= 0.0 {
            return None;
        }
        let beats = |&i: &usize| {
            let (r, c) = both(i);
            i != delta && clearly_less(c, cost) && r.0 <= risk.0
        };
        let name = phrase(&rows[delta].setup);
        let Some(best) = group.iter().copied().filter(beats).min_by(|&a, &b| self.risk_of(a).total_cmp(&self.risk_of(b))) else {
            return Some(format!("Nothing here beats {name} in both cost and risk."));
        };
        let sure = clearly_less(both(best).0, risk);
        let saved = 100.0 * (1.0 - rows[best].risk.cost / cost.0);
        let less = 100.0 * (1.0 - self.risk_of(best) / risk.0);
        Some(if sure {
            format!("Against {name}, {} has {less:.0} % less risk and {saved:.0} % less cost.", phrase(&rows[best].setup))
        } else {
            format!("Against {name}, {} costs {saved:.0} % less at the same risk, as far as these paths can tell.", phrase(&rows[best].setup))
        })
    }

    /// Where theory has a number for the deviation, how far the simulation is from it.
    fn theory(&self) -> Option<String> {
        let shares = self.rows.iter().filter(|row| row.theory.sd > 0.0 && row.risk.sd > 0.0).map(|row| row.risk.sd / row.theory.sd - 1.0);
        let (mut n, mut worst) = (0, 0.0f64);
        for share in shares {
            n += 1;
            if share.abs() > worst.abs() {
                worst = share;
            }
        }
        (n > 0).then(|| {
            let more = if worst >= 0.0 { "above" } else { "below" };
            format!(
                "Theory (Derman-Kamal) knows the sd of delta without costs; of {n} simulated, the farthest is {:.1} % {more}{}.",
                100.0 * worst.abs(),
                if worst.abs() > 0.1 { ", which is what costs, long intervals or a market other than Black and Scholes's add" } else { "" }
            )
        })
    }

    fn caveat(&self) -> String {
        let knows = match self.models.as_slice() {
            [Model::Gbm { .. }, ..] if self.models.iter().all(|m| matches!(m, Model::Gbm { .. })) => {
                "prices move as the hedger believes, without jumps and at a known volatility; --model heston or merton, --prices FILE and --hedge-volatility test that"
            }
            _ => "the hedger computes deltas as Black and Scholes do at one volatility, while this market moves otherwise",
        };
        format!("Not in these numbers: market impact, and delays between decision and trade. Here {knows}.")
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;
    use crate::sim::hedge::{Histogram, RiskFigures, Theory};

    fn row(policy: Policy, rebalance: u32, bps: f64, cost: f64, sd: f64) -> HedgeRow {
        let risk = RiskFigures {
            mean: 0.0,
            mean_error: 0.0,
            sd,
            sd_error: 0.001,
            skew: 0.0,
            min: 0.0,
            max: 0.0,
            var: sd,
            var_order: sd,
            var_error: 0.0,
            cvar: 2.0 * sd,
            cvar_tail_mean: 2.0 * sd,
            cvar_error: 0.0,
            entropic: sd,
            entropic_error: 0.0,
            quadratic_cvar: f64::NAN,
            indifference_price: 0.0,
            cost,
            cost_error: 0.001,
            turnover: 1.0,
            quantiles: Vec::new(),
        };
        let setup = Setup { market: 0, option: 0, policy, costs: Costs::bps(bps), rebalance, hedge_volatility: 0.2 };
        let theory = Theory { sd: f64::NAN, cost: f64::NAN };
        HedgeRow { setup, premium: 8.0, risk, theory, histogram: Histogram { low: 0.0, high: 1.0, counts: vec![1] } }
    }

    fn table() -> Vec<HedgeRow> {
        vec![
            row(Policy::None, 1, 10.0, 0.0, 13.0),
            row(Policy::Delta, 1, 10.0, 0.5, 0.6),
            row(Policy::Delta, 5, 10.0, 0.3, 0.9),
            row(Policy::WhalleyWilmott { risk_aversion: 1.0 }, 1, 10.0, 0.25, 0.5),
            row(Policy::Band { width: 0.1 }, 1, 10.0, 0.20, 0.6),
            row(Policy::Delta, 1, 0.0, 0.0, 0.4),
        ]
    }

    #[test]
    fn nobody_on_the_frontier_is_beaten() {
        let rows = table();
        let groups = groups(&rows);
        assert_eq!(groups, [vec![0, 1, 2, 3, 4], vec![0, 5]]);
        assert_eq!(frontier(&rows, &groups[0], Risk::Sd), [0, 4, 3]);
        for &i in &groups[0] {
            let beaten = groups[0].iter().any(|&j| rows[j].risk.cost <= rows[i].risk.cost && rows[j].risk.sd < rows[i].risk.sd);
            assert_eq!(frontier(&rows, &groups[0], Risk::Sd).contains(&i), !beaten, "{i}");
        }
    }

    #[test]
    fn a_verdict_says_what_the_numbers_say() {
        let rows = table();
        let model = Model::Gbm { volatility: 0.2 };
        let verdict = Verdict { rows: &rows, risk: Risk::Sd, money: &|x| format!("{x:.2}"), models: vec![&model] }.sentences().join("\n");
        for part in [
            "At 10 bp, whalley_wilmott 1 every step leaves the least risk: sd 0.50, 4 % of the 13.00 without a hedge; it costs 0.25",
            "With 20 % more risk, band 0.1 every step saves 20 % of that cost.",
            "Against delta every step, whalley_wilmott 1 every step has 17 % less risk and 50 % less cost.",
            "At 0 bp, delta every step leaves the least risk",
            "market impact",
        ] {
            assert!(verdict.contains(part), "'{part}' is not in\n{verdict}");
        }
    }

    #[test]
    fn a_difference_within_the_errors_is_none() {
        let mut rows = table()[1..3].to_vec();
        rows[1].risk.sd = 0.599;
        let model = Model::Gbm { volatility: 0.2 };
        let verdict = Verdict { rows: &rows, risk: Risk::Sd, money: &|x| format!("{x:.2}"), models: vec![&model] }.sentences().join("\n");
        assert!(verdict.contains("delta every 5 steps costs 40 % less at the same risk, as far as these paths can tell"), "{verdict}");
        rows[1].risk.sd = 0.7;
        let verdict = Verdict { rows: &rows, risk: Risk::Sd, money: &|x| format!("{x:.2}"), models: vec![&model] }.sentences().join("\n");
        assert!(verdict.contains("Nothing here beats delta every step"), "{verdict}");
    }
}
