//! A synthetic market with hidden regimes, so that `forback sweep` has something to run on without a file.
//!
//! Regime `s[t]` of the whole market is a Markov chain on calm bull, sideways and crash that starts calm; log return of asset i at bar t ≥ 1:
//! ```text
//! r[t,i] = (β[i]·μ[s] + α[i])/252 + (β[i]·σ[s]·m[t] + c[s]·ν[i]·e[t,i])/√252 − v/2       close[0,i] = 100
//! ```
//! with m and e independent standard normals and v the variance of the two noise terms, so that β·μ + α is the expected return per year.
//!
//! Per asset β = 1 + 0.3 z₀, ν = 0.2·exp(0.35 z₁), α = 0.03 z₂ (z normal, cut at ±2.5); about 70 % of bars are calm, 25 % sideways, 5 % crash.
//! No asset can be forecast from its own past but through the regimes: what a sweep finds beyond them is luck, and its corrections should say so.
//!
//! Shapes   close `[T, N]`.  T bars, N assets.
//! Random   `normals(path, block)` gives four standard normals and must depend on nothing else, in any order of calls: Philox with the seed
//!          as key and (path, block) as counter. Asset i is path i, bar t takes normal t mod 4 of block t / 4, its β, ν, α the block u32::MAX;
//!          the market is path u64::MAX, the regimes are path u64::MAX − 1. So an asset's prices depend neither on T (a longer history
//!          begins with the shorter one) nor on N.
//! Numerics f64 until the price; the logarithm is reflected at prices 0.01 and 10,000,000, so that any length stays positive and finite in f32.
//! Source   Hamilton 1989, Econometrica 57(2), for the regimes; Sharpe 1963, Management Science 9(2), for the one-factor assets.

use ndarray::Array2;

use crate::kernels::philox::{normals, philox4x32};
use crate::{Error, Result};

const OP: &str = "regime_switching_market";
/// Stream of [`synthetic`]'s normals.
const STREAM: u32 = 1 << 16;
const BARS_PER_YEAR: f64 = 252.0;
const SPOT: f64 = 100.0;
const LOWEST: f64 = 0.01;
const HIGHEST: f64 = 1e7;
/// Monday 4 January 2010, 00:00 UTC.
const FIRST_DAY: i64 = 1_262_563_200;
const DAY: i64 = 86_400;
const MARKET_PATH: u64 = u64::MAX;
const REGIME_PATH: u64 = u64::MAX - 1;
const ASSET_BLOCK: u32 = u32::MAX;

struct Regime {
    name: &'static str,
    /// Expected market return per year.
    drift: f64,
    /// Market volatility per year.
    vol: f64,
    /// Factor of the assets' own volatility.
    own_vol: f64,
    /// Where the chain goes when the bar's normal z is above the first number, and when it is below the negative of the second.
    above: (f64, u8),
    below: (f64, u8),
}

// Quantiles, P(z > q): 1/300 ↔ 2.713, 1/800 ↔ 3.023, 1/100 ↔ 2.326, 1/80 ↔ 2.241, 1/40 ↔ 1.960. The comparison needs no distribution function.
const REGIMES: [Regime; 3] = [
    Regime { name: "calm bull", drift: 0.16, vol: 0.11, own_vol: 0.9, above: (2.713, 1), below: (3.023, 2) },
    Regime { name: "sideways", drift: 0.0, vol: 0.16, own_vol: 1.0, above: (2.326, 0), below: (2.713, 2) },
    Regime { name: "crash", drift: -0.7, vol: 0.4, own_vol: 1.8, above: (2.241, 0), below: (1.960, 1) },
];

/// Names of the regimes, in the order of their numbers.
pub const REGIME_NAMES: [&str; 3] = [REGIMES[0].name, REGIMES[1].name, REGIMES[2].name];

/// A synthetic market.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Market {
    /// `SYN001`, `SYN002`, … `[N]`.
    pub symbols: Vec<String>,
    /// Monday to Friday from 4 January 2010, midnight UTC in unix seconds `[T]`.
    pub dates: Vec<i64>,
    /// Closing prices `[T, N]`, the first 100, all positive and finite.
    pub close: Array2<f32>,
    /// The hidden regime of each bar `[T]`, an index into [`REGIME_NAMES`]. Known to the simulation only: trading on it is look-ahead.
    pub regimes: Vec<u8>,
}

/// Simulates `n_bars` business days of `n_assets` assets. The head of this module has the model.
///
/// `normals(path, block)`: four standard normals that depend on path, block and the seed held by the closure, and on nothing else.
/// The same normals give the same bits; asset i does not depend on `n_assets`, nor bar t on `n_bars`.
///
/// # Errors
/// `Parameter` if there are no bars, no assets or a normal is not finite; `TooLarge` or `OutOfMemory` if the prices have no room.
pub fn regime_switching_market(n_bars: usize, n_assets: usize, mut normals: impl FnMut(u64, u32) -> [f64; 4]) -> Result<Market> {
    for (name, n) in [("n_bars", n_bars), ("n_assets", n_assets)] {
        if n == 0 {
            return Err(Error::Parameter { op: OP, name: name.into(), value: "0".into(), help: "must be at least 1".into() });
        }
        // Bars are numbered by blocks of four in u32, less the block of the asset's own constants.
        if u32::try_from(n).is_err() {
            let help = "simulate less".into();
            return Err(Error::TooLarge { what: format!("{OP}: {name}"), needed: n as u64, limit: u64::from(u32::MAX), unit: "entries", help });
        }
    }
    let no_room = |_| Error::OutOfMemory { device: "the host".into(), doing: format!("simulating {n_bars} bars of {n_assets} assets") };
    let mut close: Vec<f32> = Vec::new();
    close.try_reserve_exact(n_bars.saturating_mul(n_assets)).map_err(no_room)?;
    close.resize(n_bars.saturating_mul(n_assets), SPOT as f32);

    // Regimes and the market's noise, common to all assets.
    let mut switches = Lanes::new(REGIME_PATH);
    let mut factor = Lanes::new(MARKET_PATH);
    let mut regimes = vec![0u8; n_bars];
    let mut market_noise = vec![0.0f64; n_bars];
    let mut state = 0u8;
    for t in 1..n_bars {
        let z = switches.at(t, &mut normals)?;
        let Regime { above, below, .. } = regime(state);
        state = if z > above.0 {
            above.1
        } else if z < -below.0 {
            below.1
        } else {
            state
        };
        regimes[t] = state;
        market_noise[t] = factor.at(t, &mut normals)?;
    }

    // One asset after the other, down its column.
    for i in 0..n_assets {
        let path = i as u64;
        let [z0, z1, z2, _] = finite(normals(path, ASSET_BLOCK))?.map(|z| z.clamp(-2.5, 2.5));
        let (beta, own_vol, alpha) = (1.0 + 0.3 * z0, 0.2 * (0.35 * z1).exp(), 0.03 * z2);
        let mut own = Lanes::new(path);
        let mut log_price = SPOT.ln();
        for t in 1..n_bars {
            let regime = regime(regimes[t]);
            let (common, specific) = (beta * regime.vol, own_vol * regime.own_vol);
            let drift = beta * regime.drift + alpha - 0.5 * (common * common + specific * specific);
            let noise = common * market_noise[t] + specific * own.at(t, &mut normals)?;
            log_price = reflect(log_price + drift / BARS_PER_YEAR + noise / BARS_PER_YEAR.sqrt());
            close[t * n_assets + i] = log_price.exp() as f32;
        }
    }

    let close = Array2::from_shape_vec((n_bars, n_assets), close).map_err(|e| Error::Internal(format!("{OP}: {e}")))?;
    let symbols = (1..=n_assets).map(|i| format!("SYN{i:03}")).collect();
    let dates = (0..n_bars as i64).map(|t| FIRST_DAY + DAY * (7 * (t / 5) + t % 5)).collect();
    Ok(Market { symbols, dates, close, regimes })
}

/// [`regime_switching_market`] with Philox normals: the same seed is the same market, bit for bit, on every machine.
///
/// # Errors
/// As [`regime_switching_market`].
pub fn synthetic(n_bars: usize, n_assets: usize, seed: u64) -> Result<Market> {
    let key = [seed as u32, (seed >> 32) as u32];
    regime_switching_market(n_bars, n_assets, |path, block| normals(philox4x32([path as u32, (path >> 32) as u32, block, STREAM], key)))
}

fn regime(state: u8) -> &'static Regime {
    let [calm, sideways, crash] = &REGIMES;
    match state {
        0 => calm,
        1 => sideways,
        _ => crash,
    }
}

/// Mirrors a log price at the bounds; a jump beyond the mirror image stops at the bound.
fn reflect(log_price: f64) -> f64 {
    let (low, high) = (LOWEST.ln(), HIGHEST.ln());
    if log_price > high {
        (2.0 * high - log_price).max(low)
    } else if log_price < low {
        (2.0 * low - log_price).min(high)
    } else {
        log_price
    }
}

fn finite(z: [f64; 4]) -> Result<[f64; 4]> {
    match z.iter().find(|z| !z.is_finite()) {
        None => Ok(z),
        Some(z) => Err(Error::Parameter { op: OP, name: "normals".into(), value: z.to_string(), help: "every normal must be finite".into() }),
    }
}

/// The normals of one path, four at a time.
struct Lanes {
    path: u64,
    block: Option<u32>,
    values: [f64; 4],
}

impl Lanes {
    fn new(path: u64) -> Self {
        Self { path, block: None, values: [0.0; 4] }
    }

    /// Normal `t` of the path.
    fn at(&mut self, t: usize, normals: &mut impl FnMut(u64, u32) -> [f64; 4]) -> Result<f64> {
        let block = (t / 4) as u32;
        if self.block != Some(block) {
            self.values = finite(normals(self.path, block))?;
            self.block = Some(block);
        }
        Ok(self.values[t % 4])
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Stand-in for Philox: SplitMix64 of seed, path and block, and Box-Muller.
    fn normals(seed: u64) -> impl FnMut(u64, u32) -> [f64; 4] {
        let mix = |mut x: u64| {
            x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
            x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            x ^ (x >> 31)
        };
        move |path, block| {
            let base = mix(mix(mix(seed) ^ path) ^ u64::from(block));
            let uniform = |k: u64| ((mix(base ^ (k << 32)) >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
            let pair = |k: u64| {
                let (radius, angle) = ((-2.0 * uniform(k).ln()).sqrt(), std::f64::consts::TAU * uniform(k + 1));
                [radius * angle.cos(), radius * angle.sin()]
            };
            let ([a, b], [c, d]) = (pair(1), pair(3));
            [a, b, c, d]
        }
    }

    #[test]
    fn labels_and_dates() {
        let market = regime_switching_market(7, 1001, normals(1)).unwrap();
        assert_eq!((market.symbols[0].as_str(), market.symbols[41].as_str(), market.symbols[1000].as_str()), ("SYN001", "SYN042", "SYN1001"));
        // 4 to 8 January 2010, then the Monday after.
        let days: Vec<i64> = market.dates.iter().map(|d| (d - FIRST_DAY) / DAY).collect();
        assert_eq!(days, [0, 1, 2, 3, 4, 7, 8]);
        // 1 January 1970 was a Thursday: day 4 of a week that starts on Sunday.
        assert!(market.dates.iter().all(|d| d % DAY == 0 && (1..=5).contains(&((d / DAY + 4) % 7))));
        assert!(market.close.row(0).iter().all(|p| *p == 100.0));
        assert_eq!(market.close.dim(), (7, 1001));
    }

    #[test]
    fn regimes_show_in_the_returns() {
        let market = regime_switching_market(60_000, 2, normals(7)).unwrap();
        let bars = market.regimes.len() as f64;
        let share = |s: u8| market.regimes.iter().filter(|r| **r == s).count() as f64 / bars;
        let shares = [share(0), share(1), share(2)];
        assert!((shares[0] - 0.694).abs() < 0.12 && (shares[1] - 0.260).abs() < 0.12 && (shares[2] - 0.046).abs() < 0.03, "{shares:?}");
        let vol = |s: u8| {
            let returns =
                (1..market.regimes.len()).filter(|t| market.regimes[*t] == s).map(|t| f64::from(market.close[[t, 0]] / market.close[[t - 1, 0]]).ln());
            let (n, sum) = returns.fold((0.0, 0.0), |(n, sum), r| (n + 1.0, sum + r * r));
            (sum / n * BARS_PER_YEAR).sqrt()
        };
        assert!(vol(0) < vol(1) && 1.5 * vol(1) < vol(2), "{} {} {}", vol(0), vol(1), vol(2));
    }

    #[test]
    fn wrong_calls() {
        assert!(regime_switching_market(0, 1, normals(1)).is_err());
        assert!(regime_switching_market(1, 0, normals(1)).is_err());
        assert!(regime_switching_market(9, 1, |_, _| [f64::NAN; 4]).is_err());
        assert!(regime_switching_market(usize::MAX, usize::MAX, normals(1)).is_err());
        assert!(regime_switching_market(1, 1, |_, _| [0.0; 4]).is_ok());
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn prefixes_and_assets_are_stable(seed: u64, bars in 1usize..300, more_bars in 0usize..50, assets in 1usize..5, more_assets in 0usize..4) {
            let small = regime_switching_market(bars, assets, normals(seed)).unwrap();
            let large = regime_switching_market(bars + more_bars, assets + more_assets, normals(seed)).unwrap();
            prop_assert_eq!(&small, &regime_switching_market(bars, assets, normals(seed)).unwrap());
            prop_assert!(small.close.indexed_iter().all(|(at, price)| large.close[at] == *price));
            prop_assert_eq!(&small.regimes[..], &large.regimes[..bars]);
            prop_assert_eq!(&small.dates[..], &large.dates[..bars]);
            prop_assert_eq!(&small.symbols[..], &large.symbols[..assets]);
            let other = regime_switching_market(bars, assets, normals(seed ^ 1)).unwrap();
            prop_assert!(bars == 1 || other.close != small.close);
        }

        #[test]
        fn prices_stay_legal_under_any_normals(seed: u64, scale in 0.0f64..1e300) {
            let mut inner = normals(seed);
            let market = regime_switching_market(200, 2, |path, block| inner(path, block).map(|z| z * scale)).unwrap();
            prop_assert!(market.close.iter().all(|p| *p > 0.0 && p.is_finite()));
        }
    }
}
