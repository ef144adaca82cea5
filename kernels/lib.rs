//! Devices and kernels of forback: one list, three columns (CPU, WGSL, CUDA).
//!
//! A *kernel* is one device entry point, a value in [`KERNELS`]; an *op* is what a user calls, a value in [`OPS`]. Tests, `forback
//! verify`, `forback bench`, `forback kernels` and the README's table walk these lists.
//!
//! Adding a kernel: write `kernels/<stem>.rs` (docs, params, CPU column, the `Kernel` value, the op that records it, its conformance
//! binding), `shaders/<stem>.wgsl` and `cuda/<stem>.cu` with the same entry name, arguments in the same order and the same params
//! struct; add the kernel to [`KERNELS`] and the op to [`OPS`]. `tests/layout.rs` then pins the three columns to each other.

#[macro_use]
pub mod kernel;
pub mod backtest;
mod backtest_lanes;
pub mod backtest_sweep;
pub mod block_bootstrap;
pub mod ceilings;
pub mod conformance;
pub mod device;
pub mod error;
pub mod fixed;
pub mod hmm;
pub mod hmm_baum_welch;
mod hmm_expectation;
pub mod hmm_fit;
pub mod hmm_gradient;
mod hmm_lanes;
mod hmm_pack;
pub mod indicators;
pub mod multiple_testing;
pub mod performance;
pub mod philox;
pub mod portfolio;
pub mod portfolio_sweep;
pub mod real;
pub mod walk_forward_select;
pub mod walk_forward_sharpe;

pub use device::{Buffer, Device, DeviceInfo, DeviceKind, Done, LaunchTime, Limits, OpenOptions, Pass, Read, Schedule, View};
pub use error::{Error, Result};
pub use kernel::Kernel;

use conformance::{Case, Outputs};

/// What a user calls: one or more kernels recorded into a pass.
pub struct Op {
    /// Name, as in the conformance files.
    pub name: &'static str,
    /// One line on what it computes.
    pub about: &'static str,
    /// Its kernels, in the order of their first launch.
    pub kernels: &'static [&'static Kernel],
    /// Whether it has a backward pass.
    pub differentiable: bool,
    /// Runs a conformance case.
    pub verify: fn(&Device, &Case) -> Result<Outputs>,
}

/// Every op, in the order that data flows.
pub static OPS: [Op; 8] = [
    Op { name: "philox", about: "counter-based random numbers", kernels: &[&philox::PHILOX], differentiable: false, verify: philox::verify },
    Op { name: "performance", about: "statistics of return series", kernels: &[&performance::PERFORMANCE], differentiable: false, verify: performance::verify },
    Op {
        name: "walk_forward_sharpe",
        about: "Sharpe ratio of every series in every window",
        kernels: &[&walk_forward_sharpe::SEGMENT_MOMENTS, &walk_forward_sharpe::WALK_FORWARD_SHARPE, &walk_forward_sharpe::WALK_FORWARD_SHARPE_BACKWARD],
        differentiable: true,
        verify: walk_forward_sharpe::verify,
    },
    Op {
        name: "backtest_sweep",
        about: "walk-forward back-tests of a grid of strategies",
        kernels: &backtest_sweep::SWEEP_KERNELS,
        differentiable: false,
        verify: backtest_sweep::verify,
    },
    Op {
        name: "multiple_testing",
        about: "how much of the best of many trials is luck",
        kernels: &[&multiple_testing::CSCV_BLOCKS, &multiple_testing::CSCV_BEST, &multiple_testing::CSCV_RANK, &block_bootstrap::BLOCK_BOOTSTRAP],
        differentiable: false,
        verify: multiple_testing::verify,
    },
    Op {
        name: "portfolio",
        about: "books with shared capital, drifting weights, a no-trade band and costs",
        kernels: &[&portfolio::PORTFOLIO_SIMULATE, &portfolio::PORTFOLIO_SCORE, &portfolio::SIGNAL_SCORE],
        differentiable: false,
        verify: portfolio_sweep::verify,
    },
    Op {
        name: "hmm_forward_backward",
        about: "likelihood, filtered, predicted and smoothed probabilities of hidden Markov models",
        kernels: &[
            &hmm::HMM_EMISSION,
            &hmm::HMM_FORWARD_BACKWARD_4,
            &hmm::HMM_FORWARD_BACKWARD_8,
            &hmm::HMM_FORWARD_BACKWARD,
            &hmm_gradient::HMM_GRADIENT_CHAIN,
            &hmm_gradient::HMM_GRADIENT_EMISSION,
            &hmm_gradient::HMM_GRADIENT_TABLE,
            &hmm_gradient::HMM_GRADIENT_STEPS,
            &hmm_gradient::HMM_GRADIENT_SOFTMAX,
            &hmm_gradient::HMM_GRADIENT_REDUCE,
            &hmm_gradient::HMM_TANGENT,
            &hmm_gradient::HMM_TANGENT_POSTERIOR,
        ],
        differentiable: true,
        verify: hmm::verify,
    },
    Op {
        name: "hmm_baum_welch",
        about: "hidden Markov models fitted by expectation-maximisation, thousands at once",
        kernels: &[
            &hmm_baum_welch::HMM_MAXIMISATION,
            &hmm_baum_welch::HMM_EXPECTATION,
            &hmm_baum_welch::HMM_EXPECTATION_LANES,
            &hmm_baum_welch::HMM_SUMS,
            &hmm_baum_welch::HMM_REDUCE,
        ],
        differentiable: false,
        verify: hmm_baum_welch::verify,
    },
];

/// Every kernel: those of the ops, then the ceiling that `forback bench` measures.
pub static KERNELS: [&Kernel; 41] = [
    &philox::PHILOX,
    &performance::PERFORMANCE,
    &walk_forward_sharpe::SEGMENT_MOMENTS,
    &walk_forward_sharpe::WALK_FORWARD_SHARPE,
    &walk_forward_sharpe::WALK_FORWARD_SHARPE_BACKWARD,
    &indicators::PRICE_SUMS,
    &indicators::INDICATOR_SMA,
    &indicators::INDICATOR_EMA,
    &indicators::INDICATOR_RSI,
    &indicators::INDICATOR_BOLLINGER,
    &indicators::INDICATOR_DONCHIAN,
    &indicators::INDICATOR_VOLATILITY,
    &backtest::BACKTEST_SWEEP,
    &backtest::BACKTEST_STITCH,
    &walk_forward_select::WALK_FORWARD_SELECT,
    &walk_forward_select::WALK_FORWARD_SCORES,
    &multiple_testing::CSCV_BLOCKS,
    &multiple_testing::CSCV_BEST,
    &multiple_testing::CSCV_RANK,
    &block_bootstrap::BLOCK_BOOTSTRAP,
    &portfolio::PORTFOLIO_SIMULATE,
    &portfolio::PORTFOLIO_SCORE,
    &portfolio::SIGNAL_SCORE,
    &hmm::HMM_EMISSION,
    &hmm::HMM_FORWARD_BACKWARD_4,
    &hmm::HMM_FORWARD_BACKWARD_8,
    &hmm::HMM_FORWARD_BACKWARD,
    &hmm_baum_welch::HMM_MAXIMISATION,
    &hmm_baum_welch::HMM_EXPECTATION,
    &hmm_baum_welch::HMM_EXPECTATION_LANES,
    &hmm_baum_welch::HMM_SUMS,
    &hmm_baum_welch::HMM_REDUCE,
    &hmm_gradient::HMM_GRADIENT_CHAIN,
    &hmm_gradient::HMM_GRADIENT_EMISSION,
    &hmm_gradient::HMM_GRADIENT_TABLE,
    &hmm_gradient::HMM_GRADIENT_STEPS,
    &hmm_gradient::HMM_GRADIENT_SOFTMAX,
    &hmm_gradient::HMM_GRADIENT_REDUCE,
    &hmm_gradient::HMM_TANGENT,
    &hmm_gradient::HMM_TANGENT_POSTERIOR,
    &ceilings::CEILING_MULTIPLY_ADD,
];
