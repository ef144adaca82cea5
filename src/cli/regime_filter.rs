//! `forback sweep --regime-filter`: hidden Markov models refitted on the past alone gate what the strategies trade.

use super::regimes::features;
use super::say;
use crate::data::Prices;
use crate::regimes::{Feature, OutOfSample, Panel, Refits, RegimeConfig, Train, rolling, state_name};
use crate::sim::regime_filter::Gates;
use crate::{Device, Error, Result};
use serde_json::{Value, json};

/// Options of the regime filter.
#[derive(clap::Args)]
pub(super) struct RegimeArgs {
    /// Trade only in some regimes: K[:state,…][@p|p…], such as 2 (calm, above one half), 3:0,1@0.6, or 2@0|0.5|0.8, where every set runs at every
    /// threshold and 0 is no filter. States are numbered by volatility from 0 (calm); calm and turbulent are names of the first and the last.
    /// Probabilities are filtered out of sample: from refits on the past alone, known at the close that decides.
    #[arg(long = "regime-filter", value_name = "K[:STATES][@P]", conflicts_with = "file")]
    pub(super) filter: Option<String>,
    /// Bars between two refits of the regime model.
    #[arg(long, value_name = "BARS", default_value_t = 252)]
    regime_refit: usize,
    /// Observations that a refit is fitted on: a number, or anchored[:N].
    #[arg(long, value_name = "BARS|anchored", default_value = "1260")]
    regime_train: String,
    /// What regimes are seen through, comma-separated: returns, volatility:N.
    #[arg(long, default_value = "returns", value_delimiter = ',')]
    regime_features: Vec<String>,
    /// One regime model for all assets instead of one each.
    #[arg(long)]
    regime_pooled: bool,
    /// Starts of each fit.
    #[arg(long, default_value_t = 8)]
    regime_restarts: usize,
}

/// What a filter says: states, which of them are traded, above which probabilities.
#[derive(Debug, Clone, PartialEq)]
struct Filter {
    k: usize,
    states: Vec<usize>,
    thresholds: Vec<f32>,
}

fn bad(name: &str, value: &str, help: &str) -> Error {
    Error::Parameter { op: "sweep", name: name.into(), value: value.into(), help: help.into() }
}

impl Filter {
    fn of(text: &str) -> Result<Filter> {
        let wrong = |help: &str| bad("--regime-filter", text, help);
        let (model, thresholds) = text.split_once('@').map_or((text, None), |(model, thresholds)| (model, Some(thresholds)));
        let (k, states) = model.split_once(':').map_or((model, None), |(k, states)| (k, Some(states)));
        let k: usize =
            k.trim().parse().ok().filter(|k| (1..=crate::regimes::MOST_STATES).contains(k)).ok_or_else(|| wrong("begin with a number of states, such as 2"))?;
        let state = |name: &str| match name.trim() {
            "calm" => Ok(0),
            "turbulent" => Ok(k - 1),
            number => number.parse().ok().filter(|&s| s < k).ok_or_else(|| wrong(&format!("states are 0 (calm) to {} (turbulent)", k - 1))),
        };
        let states = states.map_or_else(|| Ok(vec![0]), |list| list.split(',').map(state).collect::<Result<_>>())?;
        let threshold =
            |p: &str| p.trim().parse::<f32>().ok().filter(|p| (0.0..1.0).contains(p)).ok_or_else(|| wrong("thresholds are probabilities from 0 to below 1"));
        let thresholds = thresholds.map_or_else(|| Ok(vec![0.5]), |list| list.split('|').map(threshold).collect::<Result<_>>())?;
        Ok(Filter { k, states, thresholds })
    }

    fn names(&self) -> String {
        self.states.iter().map(|&s| format!("{s} {}", state_name(s, self.k))).collect::<Vec<_>>().join(" or ")
    }
}

/// Gates, and what is said about them.
pub(super) struct Regimes {
    pub(super) gates: Gates,
    filter: Filter,
    refits: Refits,
    features: String,
    pooled: bool,
    times: usize,
    converged: usize,
    fits: usize,
}

impl RegimeArgs {
    /// Options of a filter that is not there.
    fn nothing_to_serve(&self) -> Result<()> {
        let given = [
            ("--regime-refit", self.regime_refit != 252),
            ("--regime-train", self.regime_train != "1260"),
            ("--regime-features", self.regime_features != ["returns"]),
            ("--regime-pooled", self.regime_pooled),
            ("--regime-restarts", self.regime_restarts != 8),
        ];
        given.iter().find(|(_, given)| *given).map_or(Ok(()), |(name, _)| Err(bad(name, "given", "filters nothing; name the states with --regime-filter")))
    }

    /// The gates, if they are asked for.
    pub(super) fn gates(&self, device: &Device, prices: &Prices, seed: u64, periods_per_year: f64) -> Result<Option<Regimes>> {
        let Some(text) = &self.filter else { return self.nothing_to_serve().map(|()| None) };
        let filter = Filter::of(text)?;
        let features = features(&self.regime_features)?;
        if let Some(other) = features.iter().find(|f| !f.needs_positive()) {
            return Err(bad("--regime-features", &other.to_string(), "a sweep sees regimes through returns and volatility:N"));
        }
        let refits = Refits { every: self.regime_refit, train: self.regime_train.parse::<Train>()? };
        let config = RegimeConfig {
            states: filter.k..=filter.k,
            features,
            pooled: self.regime_pooled,
            restarts: self.regime_restarts,
            seed,
            periods_per_year,
            ..RegimeConfig::default()
        };
        let panel = Panel { symbols: &prices.symbols, close: prices.close.view(), columns: Vec::new() };
        let found: OutOfSample = rolling(device, &panel, &config, refits, &mut |_| Ok(()))?;
        let gates = Gates::new(&found.filtered, &filter.states, &filter.thresholds)?;
        let features = config.features.iter().map(Feature::to_string).collect::<Vec<_>>().join(", ");
        let converged = found.refits.iter().filter(|r| r.converged).count();
        Ok(Some(Regimes { gates, filter, refits, features, pooled: config.pooled, times: found.times(), converged, fits: found.refits.len() }))
    }
}

impl Regimes {
    /// Lines for people.
    pub(super) fn say(&self, prices: &Prices) {
        let first = prices.format_time(prices.times[self.gates.first_bar()]);
        let kind = if self.pooled { "one model for all assets" } else { "a model per asset" };
        let on = match self.refits.train {
            Train::Last(n) => format!("the last {n} observations"),
            Train::Anchored(n) => format!("all so far, from {n} on"),
        };
        let open = if self.converged == self.fits { String::new() } else { format!("; {} of {} fits did not converge", self.fits - self.converged, self.fits) };
        say(&format!("regimes  trades only where P({}) of {} states is above the threshold; {}, {kind}", self.filter.names(), self.filter.k, self.features));
        say(&format!("         {} refits, every {} bars on {on}; probabilities from {first}{open}", self.times, self.refits.every));
        let share = |&p: &f32| format!("{:.0}% at {p}", 100.0 * self.gates.share(p));
        say(&format!("         open on {} of the asset-bars", self.gates.thresholds().iter().map(share).collect::<Vec<_>>().join(", ")));
    }

    pub(super) fn json(&self) -> Value {
        json!({ "states": self.filter.k, "traded": self.filter.states, "thresholds": self.filter.thresholds, "refit": self.refits.every,
            "train": self.refits.train.to_string(), "features": self.features, "pooled": self.pooled, "refits": self.times, "first_bar": self.gates.first_bar(),
            "open": self.filter.thresholds.iter().map(|&p| self.gates.share(p)).collect::<Vec<_>>(), "converged": self.converged, "fits": self.fits })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    #[test]
    fn filters_are_read() {
        let filter = |text: &str| Filter::of(text).unwrap();
        assert_eq!(filter("2"), Filter { k: 2, states: vec![0], thresholds: vec![0.5] });
        assert_eq!(filter("3:calm,1@0|0.75"), Filter { k: 3, states: vec![0, 1], thresholds: vec![0.0, 0.75] });
        assert_eq!(filter("4:turbulent").states, [3]);
        for text in ["", "0", "x", "2:2", "2:wild", "2@1", "2@-0.1", "2@", "2:"] {
            assert!(Filter::of(text).is_err(), "{text}");
        }
    }
}
