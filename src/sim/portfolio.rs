//! Positions of single assets pooled into one portfolio with shared capital, for comparison with the assets on their own.

use crate::kernels::backtest_sweep::Execution;
use crate::kernels::performance::{Performance, finish, performance_read};
use crate::kernels::portfolio_sweep::{AssetReturns, Portfolio, Positions, Rebalance, Scheme, Status, allocate};
use crate::{Device, Error, Result};
use ndarray::ArrayView2;

/// How positions are pooled.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pooling {
    /// How capital is shared.
    pub scheme: Scheme,
    /// Largest share of an asset.
    pub cap: Option<f64>,
    /// When and how far the portfolio trades.
    pub rebalance: Rebalance,
    /// One-way cost in basis points of traded notional.
    pub cost_bps: f64,
    /// How old shares are when they are traded: those of bar j are from returns that end at its fill, or with `next_close` and `next_open`,
    /// which decide before they fill, one return earlier.
    pub execution: Execution,
    /// First bar that counts; returns before it only feed volatilities.
    pub start: usize,
    /// Return periods per year.
    pub periods_per_year: f64,
}

/// A pooled portfolio.
#[derive(Debug, Clone)]
pub struct Pooled {
    /// Statistics of its net returns.
    pub performance: Performance,
    /// Net returns [T−start].
    pub net: Vec<f32>,
    /// Σ|Δw| over all bars, of capital: buys and sells.
    pub turnover: f64,
    /// Orders: assets × bars that traded.
    pub trades: u64,
    /// Solvent, or ruined at a bar.
    pub status: Status,
}

/// Pools held positions [T,N] over returns [T,N] (NaN where the bar that a return leads to has no price).
///
/// Row j of `positions` is what is held over bar j, as a multiple of the asset's share: 1 holds all of it, −1 is short by as much. The
/// target weight of asset i over bar j is share·position; weights drift between trades, costs come out of the shared capital.
/// # Errors
/// `Shape` where the two differ; those of [`Portfolio::run`] and [`allocate`].
pub fn portfolio_of(device: &Device, returns: ArrayView2<'_, f32>, positions: ArrayView2<'_, f32>, pooling: &Pooling) -> Result<Pooled> {
    if returns.dim() != positions.dim() {
        let (expected, got) = (format!("[T,N] = {:?}, as returns", returns.dim()), format!("{:?}", positions.dim()));
        return Err(Error::Shape { op: "portfolio", arg: "positions".into(), expected, got });
    }
    let (returns, positions) = (returns.as_standard_layout(), positions.as_standard_layout());
    let contiguous = || Error::Internal("a standard layout is contiguous".into());
    let n = returns.dim().1;
    let returns = AssetReturns::of_returns(returns.as_slice().ok_or_else(contiguous)?, n)?;
    let mut shares = allocate(&returns, pooling.scheme, pooling.cap)?;
    if pooling.execution != Execution::SameClose {
        shares.rotate_right(n);
        shares[..n].fill(0.0);
    }
    let books = Positions::Dense(positions.as_slice().ok_or_else(contiguous)?);
    let cost_bps = [pooling.cost_bps];
    let outcome = Portfolio {
        allocation: Some(&shares),
        rebalance: pooling.rebalance,
        cost_bps: &cost_bps,
        // Positions are those held over their bar, and shares are as old as they must be already.
        execution: Execution::SameClose,
        start: pooling.start,
        periods_per_year: pooling.periods_per_year,
        net: true,
        ..Portfolio::new(&returns, 1, books)
    }
    .run(device)?;
    let stats = outcome.stats.first().ok_or_else(|| Error::Internal("one book has statistics".into()))?;
    let performance = performance_of(device, &outcome.net, pooling.periods_per_year)?;
    Ok(Pooled { performance, turnover: stats.turnover, trades: stats.trades, status: stats.status, net: outcome.net })
}

/// Statistics of one series.
fn performance_of(device: &Device, net: &[f32], periods_per_year: f64) -> Result<Performance> {
    if net.is_empty() {
        return Ok(Performance::NONE);
    }
    let mut pass = device.pass("performance");
    let series = device.upload("returns", net)?;
    let read = performance_read(&mut pass, &series, 1, net.len() as u64)?;
    let statistics = pass.submit()?.f64(read)?;
    finish(&statistics, net.len() as u64, periods_per_year).into_iter().next().ok_or_else(|| Error::Internal("one series has one performance".into()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;
    use ndarray::{Array2, array};

    fn pooling(scheme: Scheme) -> Pooling {
        Pooling {
            scheme,
            cap: None,
            rebalance: Rebalance { band: 0.0, every: 100, to_edge: false },
            cost_bps: 10.0,
            execution: Execution::SameClose,
            start: 0,
            periods_per_year: 252.0,
        }
    }

    #[test]
    fn equal_shares_of_two_assets_are_the_example_of_the_specification() {
        let device = Device::open("reference").unwrap();
        let returns = array![[0.1f32, -0.1], [0.0, 0.1]];
        let held = Array2::ones((2, 2));
        let pooled = portfolio_of(&device, returns.view(), held.view(), &pooling(Scheme::Equal)).unwrap();
        assert!((pooled.performance.total_return - 0.043955).abs() < 1e-7, "{pooled:?}");
        assert_eq!((pooled.turnover, pooled.trades, pooled.status, pooled.net.len()), (1.0, 2, Status::Solvent, 2));
        // one close later nothing is known on the first bar: the entry waits for the next rebalance
        let later = Pooling { execution: Execution::NextClose, rebalance: Rebalance::default(), ..pooling(Scheme::Equal) };
        let pooled = portfolio_of(&device, returns.view(), held.view(), &later).unwrap();
        assert!((pooled.performance.total_return - (0.999 * 1.05 - 1.0)).abs() < 1e-7 && pooled.trades == 2, "{pooled:?}");
        // nor is the return to the open at which it trades
        let open = Pooling { execution: Execution::NextOpen, ..later };
        assert_eq!(portfolio_of(&device, returns.view(), held.view(), &open).unwrap().net, pooled.net);
        assert!(portfolio_of(&device, returns.view(), Array2::ones((3, 2)).view(), &later).is_err());
    }

    #[test]
    fn calm_assets_get_the_larger_share() {
        let device = Device::open("cpu").unwrap();
        let returns = Array2::from_shape_fn((60, 2), |(j, i)| if j % 2 == 0 { 0.01 } else { -0.01 } * [1.0f32, 3.0][i]);
        let held = Array2::ones((60, 2));
        let equal = portfolio_of(&device, returns.view(), held.view(), &Pooling { start: 30, ..pooling(Scheme::Equal) }).unwrap();
        let inverse = Pooling { start: 30, ..pooling(Scheme::InverseVolatility { window: 20 }) };
        let inverse = portfolio_of(&device, returns.view(), held.view(), &inverse).unwrap();
        // 3 : 1 instead of 1 : 1, so 1.5 % a bar instead of 2 %
        let ratio = inverse.performance.volatility / equal.performance.volatility;
        assert!((ratio - 0.75).abs() < 0.01 && inverse.net.len() == 30, "{ratio}");
    }
}
