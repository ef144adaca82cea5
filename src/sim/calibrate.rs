//! Models from data: Heston's from a volatility surface, volatility from a price history.
//!
//! Heston   least squares of model less market implied volatility, by Levenberg-Marquardt on ln v0, ln κ, ln θ, ln σ, artanh ρ. The base point and both neighbours
//!          in each direction are priced in one pass; the Jacobian is by central differences, wide enough for f32 prices.
//! History  close-to-close: the deviation (n − 1) of log returns times √periods a year.
//! Source   Marquardt 1963, SIAM J. Applied Mathematics 11; Heston 1993.

use crate::data::options::SurfacePoint;
use crate::kernels::black_scholes::sensitivities;
use crate::kernels::heston_price::{Heston, heston_prices};
use crate::kernels::implied_volatility::{VolatilityStatus, implied};
use crate::{Device, Error, Result};

const OP: &str = "calibrate_heston";
/// Parameters that are fitted.
const FITTED: usize = 5;
/// Step of the differences.
const STEP: f64 = 0.01;
/// Bounds of v0, κ, θ, σ and ρ.
const BOUNDS: [(f64, f64); FITTED] = [(1e-6, 4.0), (1e-3, 200.0), (1e-6, 4.0), (1e-3, 30.0), (-0.999, 0.999)];

type Point = [f64; FITTED];

/// How a surface is fitted.
#[derive(Debug, Clone, PartialEq)]
pub struct HestonFitOptions {
    /// Where to start; `None`: variances from the shortest and the longest maturity, κ 1.5, σ 0.5, ρ −0.5.
    pub start: Option<Heston>,
    /// Steps at most.
    pub rounds: usize,
    /// Relative gain below which it ends.
    pub tolerance: f64,
}

impl Default for HestonFitOptions {
    fn default() -> HestonFitOptions {
        HestonFitOptions { start: None, rounds: 100, tolerance: 1e-7 }
    }
}

/// A fitted model.
#[derive(Debug, Clone, PartialEq)]
pub struct HestonFit {
    /// The model.
    pub model: Heston,
    /// Σ (100·(model − market volatility))².
    pub sse: f64,
    /// Root of the mean square difference, in volatility points (0.01).
    pub rmse: f64,
    /// Steps taken.
    pub rounds: usize,
    /// Model volatilities of the points.
    pub volatilities: Vec<f64>,
}

/// Fits Heston's model to implied volatilities.
/// # Errors
/// `Parameter` naming a point that is not positive, fewer than 5 points, or a start outside its bounds; those of the device.
pub fn calibrate_heston(device: &Device, points: &[SurfacePoint], options: &HestonFitOptions) -> Result<HestonFit> {
    let surface = Surface::new(device, points)?;
    let start = options.start.unwrap_or_else(|| surface.guess());
    start.check()?;
    let mut x = to_free(&start);
    let (mut damping, mut rounds) = (1e-3, 0);
    let mut volatilities = surface.volatilities(&[x])?.remove(0);
    let mut sse = surface.sse(&volatilities);
    while rounds < options.rounds {
        rounds += 1;
        let (normal, slope) = surface.normal_equations(&x, &volatilities)?;
        let mut gain = 0.0;
        // A few dampings in one pass: the first that helps is taken.
        let dampings: Vec<f64> = (0..6).map(|i| damping * 5f64.powi(i)).collect();
        let trials: Vec<Point> = dampings.iter().map(|d| bounded(&x, &step(&normal, &slope, *d))).collect();
        let found = surface.volatilities(&trials)?;
        for (i, candidate) in found.into_iter().enumerate() {
            let trial = surface.sse(&candidate);
            if trial < sse {
                gain = (sse - trial) / sse.max(f64::MIN_POSITIVE);
                (x, sse, volatilities, damping) = (trials[i], trial, candidate, (dampings[i] / 5.0).max(1e-9));
                break;
            }
        }
        if gain < options.tolerance {
            break;
        }
    }
    let rmse = (sse / points.len() as f64).sqrt();
    Ok(HestonFit { model: to_model(&x), sse, rmse, rounds, volatilities })
}

/// The market's side of a fit.
struct Surface<'a> {
    device: &'a Device,
    points: &'a [SurfacePoint],
    terms: Vec<f32>,
    kind: Vec<u32>,
}

impl<'a> Surface<'a> {
    fn new(device: &'a Device, points: &'a [SurfacePoint]) -> Result<Surface<'a>> {
        if points.len() < FITTED {
            let help = "five parameters need five points at least".into();
            return Err(Error::Parameter { op: OP, name: "points".into(), value: points.len().to_string(), help });
        }
        for (i, p) in points.iter().enumerate() {
            for (name, value) in [("spot", p.spot), ("strike", p.strike), ("maturity", p.maturity), ("volatility", p.volatility)] {
                if !(value > 0.0 && value.is_finite()) {
                    let help = "must be a positive number; drop the point".into();
                    return Err(Error::Parameter { op: OP, name: format!("{name}[{i}]"), value: value.to_string(), help });
                }
            }
        }
        let terms = points.iter().flat_map(|p| [p.spot, p.strike, p.maturity, p.rate, p.dividend].map(|x| x as f32)).collect();
        // The out-of-the-money side has no intrinsic value to round.
        let kind = points.iter().map(|p| u32::from(p.strike >= p.spot * ((p.rate - p.dividend) * p.maturity).exp())).collect();
        Ok(Surface { device, points, terms, kind })
    }

    fn guess(&self) -> Heston {
        let near = |first: &SurfacePoint, second: &SurfacePoint| (first.strike / first.spot).ln().abs() < (second.strike / second.spot).ln().abs();
        let ends = |later: bool| {
            let end = self.points.iter().map(|p| p.maturity).fold(if later { 0.0 } else { f64::MAX }, |a, b| if later { a.max(b) } else { a.min(b) });
            let same = self.points.iter().filter(|p| p.maturity == end);
            same.reduce(|a, b| if near(b, a) { b } else { a }).map_or(0.04, |p| p.volatility * p.volatility)
        };
        Heston::new(ends(false), 1.5, ends(true), 0.5, -0.5)
    }

    /// Volatilities of the points under each parameter point.
    fn volatilities(&self, at: &[Point]) -> Result<Vec<Vec<f64>>> {
        let models: Vec<Heston> = at.iter().map(to_model).collect();
        let prices = heston_prices(self.device, &self.terms, &self.kind, &models)?;
        let one = |(i, price): (usize, &f64)| {
            let p = &self.points[i];
            let quote = [p.spot, p.strike, p.maturity, *price, p.rate, p.dividend].map(|x| f64::from(x as f32));
            match implied(&quote, self.kind[i] == 1) {
                (volatility, VolatilityStatus::Ok) => volatility,
                // A price that rounds to nothing: as far away as its price.
                _ => {
                    let x = sensitivities(&[p.spot, p.strike, p.maturity, p.volatility, p.rate, p.dividend], self.kind[i]);
                    (p.volatility - (x.price - price) / x.volatility.max(1e-6 * p.spot)).max(0.0)
                }
            }
        };
        Ok(prices.chunks_exact(self.points.len()).map(|prices| prices.iter().enumerate().map(one).collect()).collect())
    }

    fn sse(&self, volatilities: &[f64]) -> f64 {
        self.points.iter().zip(volatilities).map(|(p, v)| (100.0 * (v - p.volatility)).powi(2)).sum()
    }

    /// JᵀJ and Jᵀr of the residuals 100·(model − market).
    fn normal_equations(&self, x: &Point, volatilities: &[f64]) -> Result<([Point; FITTED], Point)> {
        let moved = |i: usize, by: f64| {
            let mut x = *x;
            x[i] += by;
            x
        };
        let neighbours: Vec<Point> = (0..FITTED).flat_map(|i| [moved(i, STEP), moved(i, -STEP)]).collect();
        let found = self.volatilities(&neighbours)?;
        let (mut normal, mut slope) = ([[0.0; FITTED]; FITTED], [0.0; FITTED]);
        for (n, p) in self.points.iter().enumerate() {
            let row: Point = std::array::from_fn(|i| 100.0 * (found[2 * i][n] - found[2 * i + 1][n]) / (2.0 * STEP));
            let residual = 100.0 * (volatilities[n] - p.volatility);
            for i in 0..FITTED {
                slope[i] += row[i] * residual;
                for j in 0..FITTED {
                    normal[i][j] += row[i] * row[j];
                }
            }
        }
        Ok((normal, slope))
    }
}

fn to_free(model: &Heston) -> Point {
    let values = [model.variance, model.reversion, model.mean, model.vol_of_vol, model.correlation];
    let inside: Point = std::array::from_fn(|i| values[i].clamp(BOUNDS[i].0, BOUNDS[i].1));
    std::array::from_fn(|i| if i < 4 { inside[i].ln() } else { inside[i].atanh() })
}

fn to_model(x: &Point) -> Heston {
    Heston::new(x[0].exp(), x[1].exp(), x[2].exp(), x[3].exp(), x[4].tanh())
}

/// x moved, inside the bounds.
fn bounded(x: &Point, by: &Point) -> Point {
    let moved: Point = std::array::from_fn(|i| x[i] + by[i].clamp(-1.0, 1.0));
    to_free(&to_model(&moved))
}

/// The damped step: (JᵀJ + d·diag)·step = −Jᵀr, by elimination with pivots.
fn step(normal: &[Point; FITTED], slope: &Point, damping: f64) -> Point {
    let mut rows: [[f64; FITTED + 1]; FITTED] = std::array::from_fn(|i| {
        std::array::from_fn(|j| match j {
            FITTED => -slope[i],
            j if j == i => normal[i][i] * (1.0 + damping) + 1e-12,
            j => normal[i][j],
        })
    });
    for i in 0..FITTED {
        let pivot = (i..FITTED).max_by(|&a, &b| rows[a][i].abs().total_cmp(&rows[b][i].abs())).unwrap_or(i);
        rows.swap(i, pivot);
        for r in 0..FITTED {
            if r != i && rows[i][i] != 0.0 {
                let factor = rows[r][i] / rows[i][i];
                for c in i..=FITTED {
                    rows[r][c] -= factor * rows[i][c];
                }
            }
        }
    }
    std::array::from_fn(|i| if rows[i][i] == 0.0 { 0.0 } else { rows[i][FITTED] / rows[i][i] })
}

/// What a price history says.
#[derive(Debug, Clone, PartialEq)]
pub struct VolatilityFit {
    /// Volatility a year.
    pub volatility: f64,
    /// Its standard error for normal returns.
    pub error: f64,
    /// Growth rate of the price a year, μ of dS/S: the mean log return plus half the variance.
    pub drift: f64,
    /// Number of returns.
    pub returns: usize,
    /// The log returns, for the bootstrap.
    pub log_returns: Vec<f64>,
}

/// Volatility and drift of closes at equal intervals, `periods_per_year` of them a year.
/// # Errors
/// `Parameter` naming a price that is not positive, fewer than three prices, or periods that are not positive.
pub fn calibrate_volatility(prices: &[f32], periods_per_year: f64) -> Result<VolatilityFit> {
    let wrong = |name: String, value: String, help: &str| Error::Parameter { op: "calibrate_volatility", name, value, help: help.into() };
    if !(periods_per_year > 0.0 && periods_per_year.is_finite()) {
        return Err(wrong("periods_per_year".into(), periods_per_year.to_string(), "must be a positive number, 252 for trading days"));
    }
    if prices.len() < 3 {
        return Err(wrong("prices".into(), prices.len().to_string(), "three prices at least: a deviation needs two returns"));
    }
    if let Some(i) = prices.iter().position(|x| !(x.is_finite() && *x > 0.0)) {
        return Err(wrong(format!("prices[{i}]"), prices[i].to_string(), "log returns need positive prices"));
    }
    let log_returns: Vec<f64> = prices.windows(2).map(|w| (f64::from(w[1]) / f64::from(w[0])).ln()).collect();
    let n = log_returns.len() as f64;
    let mean = log_returns.iter().sum::<f64>() / n;
    let variance = log_returns.iter().map(|r| (r - mean).powi(2)).sum::<f64>() / (n - 1.0);
    let volatility = (variance * periods_per_year).sqrt();
    Ok(VolatilityFit {
        volatility,
        error: volatility / (2.0 * (n - 1.0)).sqrt(),
        drift: mean * periods_per_year + 0.5 * volatility * volatility,
        returns: log_returns.len(),
        log_returns,
    })
}
