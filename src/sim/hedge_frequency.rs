//! How often to rehedge: Leland's number and volatility, the interval for a budget of it, and the interval that balances cost against variance.
//!
//! c one-way cost as a fraction of traded notional, Γ gamma, dt years between rehedges:
//! Leland    Le = √(8/π)·c/(σ√dt);  σ'² = σ²·(1 + Le) short gamma, σ²·(1 − Le) long, which needs Le < 1
//! budget    dt = (8/π)·(c/(σ·Le*))²
//! balance   cost a year c·Γ·S²·σ·√(2/π)·dt^(−½), variance a year ½Γ²S⁴σ⁴·dt at weight λ/2: dt = (8c²/(πλ²Γ²S⁴σ⁶))^(1/3)
//! With regimes, rates are averaged under their probabilities before they are balanced: σ → Σpσ, σ⁴ → Σpσ⁴, and σ² → Σpσ² for Leland's number; the interval is
//! at most a share of the expected duration of a regime.
//! Source   Leland 1985, J. Finance 40 (with one-way costs; his k = 2c is round trip); Toft 1996; Sepp 2013 for fuller versions.

use crate::{Error, Result};

const OP: &str = "optimal_hedge_frequency";

/// What decides the interval.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum FrequencyRule {
    /// The interval at which Leland's number is this.
    Budget {
        /// Le*.
        leland: f64,
    },
    /// The interval at which cost and variance a year, the latter at half this weight, are least.
    Balance {
        /// λ, per unit of currency.
        risk_aversion: f64,
    },
}

/// How long regimes last.
#[derive(Debug, Clone, PartialEq)]
pub enum Persistence {
    /// Probability of each regime to stay for another period, below 1: it lasts 1/(1 − a) periods on average.
    Probability(Vec<f64>),
    /// Expected duration of each regime, in periods.
    Duration(Vec<f64>),
}

/// What is hedged and what it costs.
#[derive(Debug, Clone, PartialEq)]
pub struct HedgeFrequency {
    /// Volatility a year of each regime; one without regimes.
    pub volatility: Vec<f64>,
    /// Probabilities of the regimes.
    pub probabilities: Vec<f64>,
    /// One-way cost, a fraction of traded notional.
    pub cost: f64,
    /// |gamma| of the position.
    pub gamma: f64,
    /// Spot.
    pub spot: f64,
    /// What decides.
    pub rule: FrequencyRule,
    /// How long regimes last, where that matters.
    pub persistence: Option<Persistence>,
    /// η: the interval is at most this share of the expected duration.
    pub patience: f64,
    /// Periods a year: what intervals are also told in, and the unit of durations.
    pub periods_per_year: f64,
    /// Shortest interval, years.
    pub shortest: f64,
    /// Longest interval, years.
    pub longest: f64,
}

impl HedgeFrequency {
    /// One volatility, 252 periods a year, between an hour of six and a half a day and a year.
    pub fn new(volatility: f64, cost: f64, gamma: f64, spot: f64, rule: FrequencyRule) -> HedgeFrequency {
        HedgeFrequency {
            volatility: vec![volatility],
            probabilities: vec![1.0],
            cost,
            gamma,
            spot,
            rule,
            persistence: None,
            patience: 1.0,
            periods_per_year: 252.0,
            shortest: 1.0 / (252.0 * 6.5),
            longest: 1.0,
        }
    }
}

/// An interval and what Leland says of it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HedgeInterval {
    /// Years between rehedges.
    pub years: f64,
    /// The same in periods.
    pub periods: f64,
    /// Leland's number at it.
    pub leland: f64,
    /// Volatility to price and hedge with when short gamma.
    pub short_volatility: f64,
    /// The same when long gamma; `None` where Leland's number is 1 or more.
    pub long_volatility: Option<f64>,
}

/// Leland's number of a one-way cost: √(8/π)·c/(σ√dt).
pub fn leland_number(cost: f64, volatility: f64, dt: f64) -> f64 {
    (8.0 / std::f64::consts::PI).sqrt() * cost / (volatility * dt.sqrt())
}

/// Leland's volatility.
/// # Errors
/// `Parameter` when long gamma with a number of 1 or more: the position is worth no hedge at that frequency.
pub fn leland_volatility(volatility: f64, leland: f64, long_gamma: bool) -> Result<f64> {
    if long_gamma && leland >= 1.0 {
        let help = "must be below 1 when long gamma: rehedge less often, or cost eats the gamma".into();
        return Err(Error::Parameter { op: OP, name: "leland number".into(), value: leland.to_string(), help });
    }
    Ok(volatility * (1.0 + if long_gamma { -leland } else { leland }).sqrt())
}

/// The interval that a rule gives, inside its bounds: the shortest without cost, the longest without gamma.
/// # Errors
/// `Parameter` naming what is out of range: a volatility of 0, probabilities that do not fit, a rule's number that is not positive.
pub fn optimal_hedge_frequency(x: &HedgeFrequency) -> Result<HedgeInterval> {
    check(x)?;
    let total: f64 = x.probabilities.iter().sum();
    let mean = |power: i32| x.volatility.iter().zip(&x.probabilities).map(|(v, p)| p / total * v.powi(power)).sum::<f64>();
    let volatility = mean(2).sqrt();
    let dollar_gamma = x.gamma.abs() * x.spot * x.spot;
    let free = match x.rule {
        _ if x.cost == 0.0 => x.shortest,
        FrequencyRule::Budget { leland } => 8.0 / std::f64::consts::PI * (x.cost / (volatility * leland)).powi(2),
        FrequencyRule::Balance { .. } if dollar_gamma == 0.0 => x.longest,
        FrequencyRule::Balance { risk_aversion } => {
            let (cost, variance) = (x.cost * dollar_gamma * mean(1) * (2.0 / std::f64::consts::PI).sqrt(), 0.5 * dollar_gamma * dollar_gamma * mean(4));
            (cost / (risk_aversion * variance)).powf(2.0 / 3.0)
        }
    };
    let durations: Option<Vec<f64>> = x.persistence.as_ref().map(|persistence| match persistence {
        Persistence::Probability(stay) => stay.iter().map(|a| 1.0 / (1.0 - a)).collect(),
        Persistence::Duration(periods) => periods.clone(),
    });
    let lasting = durations.map(|d| x.patience * d.iter().zip(&x.probabilities).map(|(d, p)| p / total * d).sum::<f64>() / x.periods_per_year);
    let years = free.min(lasting.unwrap_or(f64::MAX)).clamp(x.shortest, x.longest);
    let leland = leland_number(x.cost, volatility, years);
    Ok(HedgeInterval {
        years,
        periods: years * x.periods_per_year,
        leland,
        short_volatility: leland_volatility(volatility, leland, false)?,
        long_volatility: leland_volatility(volatility, leland, true).ok(),
    })
}

fn check(x: &HedgeFrequency) -> Result<()> {
    let wrong = |name: String, value: f64, help: &str| Err(Error::Parameter { op: OP, name, value: value.to_string(), help: help.into() });
    if let Some(i) = x.volatility.iter().position(|v| !(*v > 0.0 && v.is_finite())) {
        return wrong(format!("volatility[{i}]"), x.volatility[i], "must be above 0: without it there is nothing to hedge");
    }
    let regimes = x.volatility.len();
    if regimes == 0 || x.probabilities.len() != regimes {
        return wrong("probabilities".into(), x.probabilities.len() as f64, "one for each volatility, and at least one");
    }
    if let Some(i) = x.probabilities.iter().position(|p| !(*p >= 0.0 && p.is_finite())) {
        return wrong(format!("probabilities[{i}]"), x.probabilities[i], "must be 0 or more");
    }
    if x.probabilities.iter().sum::<f64>() <= 0.0 {
        return wrong("probabilities".into(), 0.0, "one of them must be above 0");
    }
    let rule = match x.rule {
        FrequencyRule::Budget { leland } => ("leland", leland),
        FrequencyRule::Balance { risk_aversion } => ("risk_aversion", risk_aversion),
    };
    let positive = [rule, ("spot", x.spot), ("patience", x.patience), ("periods_per_year", x.periods_per_year), ("shortest", x.shortest)];
    for (name, value) in positive {
        if !(value > 0.0 && value.is_finite()) {
            return wrong(name.into(), value, "must be a positive number");
        }
    }
    for (name, value) in [("cost", x.cost), ("gamma", x.gamma.abs())] {
        if !(value >= 0.0 && value.is_finite()) {
            return wrong(name.into(), value, "must be 0 or more");
        }
    }
    if x.longest.is_nan() || x.longest < x.shortest {
        return wrong("longest".into(), x.longest, "must not be below the shortest interval");
    }
    let (values, most) = match &x.persistence {
        None => return Ok(()),
        Some(Persistence::Probability(stay)) => (stay, 1.0 - 1e-12),
        Some(Persistence::Duration(periods)) => (periods, f64::MAX),
    };
    if values.len() != regimes {
        return wrong("persistence".into(), values.len() as f64, "one for each regime");
    }
    match values.iter().position(|v| !(*v >= 0.0 && *v <= most)) {
        Some(i) => wrong(format!("persistence[{i}]"), values[i], "a probability must be below 1, a duration a positive number of periods"),
        None => Ok(()),
    }
}
