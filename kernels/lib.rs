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
pub mod activation;
pub mod attention;
mod attention_lanes;
pub mod backtest;
mod backtest_lanes;
pub mod backtest_sweep;
pub mod backtest_tiles;
pub mod block_bootstrap;
pub mod ceilings;
pub mod conformance;
pub mod conv1d;
pub mod device;
pub mod error;
pub mod fixed;
pub mod gather;
mod gemm_lanes;
pub mod hmm;
pub mod hmm_baum_welch;
mod hmm_expectation;
pub mod hmm_fit;
pub mod hmm_forecast;
pub mod hmm_gradient;
mod hmm_lanes;
mod hmm_pack;
pub mod hmm_sample;
pub mod hmm_scan;
pub mod hmm_viterbi;
pub mod indicators;
mod lanes;
pub mod layer_norm;
pub mod linear;
pub mod loss;
pub mod map;
pub mod multiple_testing;
pub mod normalise;
pub mod objective;
pub mod optimiser;
pub mod performance;
pub mod philox;
pub mod pool;
pub mod portfolio;
pub mod portfolio_sweep;
pub mod real;
pub mod recurrent;
mod recurrent_lanes;
pub mod reduce;
pub mod softmax;
pub mod split_sum;
pub mod strategies;
pub mod walk_forward_select;
pub mod walk_forward_sharpe;

pub use device::{Buffer, Device, DeviceInfo, DeviceKind, Done, LaunchTime, Limits, OpenOptions, Pass, Read, Replay, Schedule, View};
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
pub static OPS: [Op; 26] = [
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
            &hmm::HMM_FORWARD_BACKWARD_TABLE_4,
            &hmm::HMM_FORWARD_BACKWARD_TABLE_8,
            &hmm::HMM_FORWARD_BACKWARD_STATES_4,
            &hmm::HMM_FORWARD_BACKWARD_STATES_8,
            &hmm::HMM_FORWARD_BACKWARD,
            &hmm_scan::HMM_SCAN_CHUNKS,
            &hmm_scan::HMM_SCAN_MERGE,
            &hmm_scan::HMM_SCAN_DOWN,
            &hmm_scan::HMM_SCAN_FORWARD,
            &hmm_scan::HMM_SCAN_SUM,
            &hmm_scan::HMM_SCAN_BACKWARD,
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
        name: "hmm_viterbi",
        about: "most probable state paths of hidden Markov models",
        kernels: &[&hmm::HMM_EMISSION, &hmm_viterbi::HMM_VITERBI, &hmm_viterbi::HMM_VITERBI_LANES, &hmm_viterbi::HMM_VITERBI_PATH],
        differentiable: false,
        verify: hmm_viterbi::verify,
    },
    Op {
        name: "hmm_sample",
        about: "random paths of hidden Markov models, from the model or from the posterior",
        kernels: &[
            &hmm_sample::HMM_WEIGHTS,
            &hmm_sample::HMM_SAMPLE,
            &hmm_sample::HMM_SAMPLE_OBSERVATIONS,
            &hmm::HMM_FORWARD_BACKWARD_4,
            &hmm::HMM_FORWARD_BACKWARD_8,
            &hmm::HMM_FORWARD_BACKWARD,
            &hmm_sample::HMM_SAMPLE_POSTERIOR,
        ],
        differentiable: false,
        verify: hmm_sample::verify,
    },
    Op {
        name: "hmm_forecast",
        about: "states of hidden Markov models some steps ahead, survival and duration of regimes",
        kernels: &[&hmm_forecast::HMM_FORECAST, &hmm_forecast::HMM_SOJOURN, &hmm_forecast::HMM_SOJOURN_AVERAGE],
        differentiable: false,
        verify: hmm_forecast::verify,
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
    Op {
        name: "map",
        about: "element-wise functions with broadcasting, strided copies, fill, dropout",
        kernels: &[&map::MAP, &map::FILL, &map::DROPOUT],
        differentiable: true,
        verify: map::verify,
    },
    Op {
        name: "reduce",
        about: "sums, means and maxima over axes",
        kernels: &[&reduce::REDUCE, &reduce::REDUCE_MAX, &reduce::REDUCE_MAX_BACKWARD],
        differentiable: true,
        verify: map::verify,
    },
    Op {
        name: "adamw",
        about: "AdamW, Adam and SGD steps of all parameters of all models",
        kernels: &[&optimiser::GRADIENT_NORM, &optimiser::OPTIMISER_PREPARE, &optimiser::ADAM_UPDATE, &optimiser::SGD_UPDATE, &optimiser::PARAMETER_AVERAGE],
        differentiable: false,
        verify: optimiser::verify,
    },
    Op {
        name: "loss",
        about: "losses of predictions, one value per model: squared, Huber, quantile, cross-entropy, divergence",
        kernels: &[
            &loss::LOSS_ELEMENTS,
            &loss::LOSS_CROSS_ENTROPY,
            &loss::LOSS_KL,
            &loss::LOSS_MEAN,
            &loss::LOSS_ELEMENTS_BACKWARD,
            &loss::LOSS_CROSS_ENTROPY_BACKWARD,
            &loss::LOSS_KL_BACKWARD,
        ],
        differentiable: true,
        verify: loss::verify,
    },
    Op {
        name: "lstm",
        about: "LSTM layers over whole sequences, many models at once",
        kernels: &[
            &recurrent::RECURRENT_PACK,
            &recurrent::LSTM_FORWARD,
            &recurrent::LSTM_FORWARD_BLOCKS,
            &recurrent::RECURRENT_GATES,
            &recurrent::LSTM_BACKWARD,
            &recurrent::LSTM_BACKWARD_BLOCKS,
            &recurrent::RECURRENT_GRADIENTS,
            &recurrent::RECURRENT_GRADIENTS_BLOCKS,
            &recurrent::RECURRENT_REDUCE,
        ],
        differentiable: true,
        verify: recurrent::verify_lstm,
    },
    Op {
        name: "gru",
        about: "GRU layers over whole sequences, many models at once",
        kernels: &[
            &recurrent::RECURRENT_PACK,
            &recurrent::GRU_FORWARD,
            &recurrent::GRU_FORWARD_BLOCKS,
            &recurrent::RECURRENT_GATES,
            &recurrent::GRU_BACKWARD,
            &recurrent::GRU_BACKWARD_BLOCKS,
            &recurrent::RECURRENT_GRADIENTS,
            &recurrent::RECURRENT_GRADIENTS_BLOCKS,
            &recurrent::RECURRENT_REDUCE,
        ],
        differentiable: true,
        verify: recurrent::verify_gru,
    },
    Op {
        name: "attention",
        about: "softmax(q·kᵀ·scale + bias)·v with masks and dropout, nothing of size Tq × Tk",
        kernels: &[
            &attention::ATTENTION_FORWARD_8,
            &attention::ATTENTION_FORWARD_16,
            &attention::ATTENTION_FORWARD_32,
            &attention::ATTENTION_FORWARD,
            &attention::ATTENTION_ROWS,
            &attention::ATTENTION_BACKWARD_Q_8,
            &attention::ATTENTION_BACKWARD_Q_16,
            &attention::ATTENTION_BACKWARD_Q_32,
            &attention::ATTENTION_BACKWARD_Q,
            &attention::ATTENTION_BACKWARD_KV_8,
            &attention::ATTENTION_BACKWARD_KV_16,
            &attention::ATTENTION_BACKWARD_KV_32,
            &attention::ATTENTION_BACKWARD_KV,
            &attention::ATTENTION_BACKWARD_KV_PACKED_8,
            &attention::ATTENTION_BACKWARD_KV_PACKED_16,
            &attention::ATTENTION_BACKWARD_KV_PACKED_32,
            &attention::ATTENTION_BACKWARD_KV_PACKED,
            &attention::ATTENTION_BACKWARD,
            &attention::ATTENTION_BACKWARD_PACKED,
            &attention::ATTENTION_FORWARD_BLOCKS_8,
            &attention::ATTENTION_BACKWARD_Q_BLOCKS_8,
            &attention::ATTENTION_BACKWARD_KV_BLOCKS_8,
            &attention::ATTENTION_BACKWARD_KV_PACKED_BLOCKS_8,
            &attention::ATTENTION_FORWARD_BLOCKS_16,
            &attention::ATTENTION_BACKWARD_Q_BLOCKS_16,
            &attention::ATTENTION_BACKWARD_KV_BLOCKS_16,
            &attention::ATTENTION_BACKWARD_KV_PACKED_BLOCKS_16,
            &attention::ATTENTION_FORWARD_BLOCKS_32,
            &attention::ATTENTION_BACKWARD_Q_BLOCKS_32,
            &attention::ATTENTION_BACKWARD_KV_BLOCKS_32,
            &attention::ATTENTION_BACKWARD_KV_PACKED_BLOCKS_32,
            &attention::ATTENTION_GRAD_BIAS,
            &attention::ATTENTION_WEIGHTS,
        ],
        differentiable: true,
        verify: attention::verify,
    },
    Op {
        name: "linear",
        about: "dense layers of many models with fused bias and activation",
        kernels: &[
            &linear::LINEAR_FORWARD,
            &linear::LINEAR_FORWARD_SMALL,
            &linear::LINEAR_FORWARD_KEPT,
            &linear::LINEAR_FORWARD_KEPT_SMALL,
            &linear::LINEAR_GRAD_X,
            &linear::LINEAR_GRAD_X_SMALL,
            &linear::LINEAR_GRAD_WEIGHT,
            &linear::LINEAR_GRAD_WEIGHT_SMALL,
            &split_sum::SPLIT_SUM,
        ],
        differentiable: true,
        verify: linear::verify,
    },
    Op {
        name: "layer_norm",
        about: "layer normalisation of rows",
        kernels: &[
            &layer_norm::LAYER_NORM_FORWARD,
            &layer_norm::LAYER_NORM_FORWARD_SMALL,
            &layer_norm::LAYER_NORM_GRAD_X,
            &layer_norm::LAYER_NORM_GRAD_X_SMALL,
            &layer_norm::LAYER_NORM_GRAD_WEIGHT,
            &layer_norm::LAYER_NORM_GRAD_WEIGHT_SMALL,
            &split_sum::SPLIT_SUM,
        ],
        differentiable: true,
        verify: layer_norm::verify,
    },
    Op {
        name: "softmax",
        about: "softmax or log-softmax of rows, with masks",
        kernels: &[
            &softmax::SOFTMAX_FORWARD,
            &softmax::SOFTMAX_FORWARD_SMALL,
            &softmax::SOFTMAX_MASKED,
            &softmax::SOFTMAX_MASKED_SMALL,
            &softmax::SOFTMAX_BACKWARD,
            &softmax::SOFTMAX_BACKWARD_SMALL,
        ],
        differentiable: true,
        verify: softmax::verify,
    },
    Op {
        name: "embedding",
        about: "rows of tables by their numbers",
        kernels: &[&gather::EMBEDDING, &gather::EMBEDDING_BACKWARD, &gather::EMBEDDING_INVALID, &reduce::REDUCE],
        differentiable: true,
        verify: map::verify,
    },
    Op {
        name: "pool",
        about: "last valid step, mean and attention pooling over time",
        kernels: &[&pool::POOL_WEIGHTS, &pool::POOL, &pool::POOL_BACKWARD, &pool::POOL_WEIGHTS_BACKWARD],
        differentiable: true,
        verify: map::verify,
    },
    Op {
        name: "normalise",
        about: "rows of unit Euclidean length",
        kernels: &[&normalise::NORMALISE, &normalise::NORMALISE_BACKWARD],
        differentiable: true,
        verify: map::verify,
    },
    Op {
        name: "objective",
        about: "Sharpe, Sortino, Calmar, drawdown, expected shortfall and mean-variance of returns, with exact gradients over epochs",
        kernels: &[
            &objective::NET_RETURNS,
            &objective::OBJECTIVE_MOMENTS,
            &objective::OBJECTIVE_TAIL,
            &objective::OBJECTIVE_TAIL_SWEEP,
            &objective::OBJECTIVE_FINISH,
            &objective::OBJECTIVE_GRADIENT,
            &objective::NET_RETURNS_BACKWARD,
        ],
        differentiable: true,
        verify: objective::verify,
    },
    Op {
        name: "conv1d",
        about: "convolution over time: padded, causal, dilated, of unequal lengths",
        kernels: &[
            &conv1d::CONV1D_FORWARD,
            &conv1d::CONV1D_FORWARD_RAGGED,
            &conv1d::CONV1D_ACTIVATE,
            &conv1d::CONV1D_GRAD_X,
            &conv1d::CONV1D_GRAD_X_RAGGED,
            &conv1d::CONV1D_GRAD_WEIGHT,
            &conv1d::CONV1D_GRAD_WEIGHT_RAGGED,
            &split_sum::SPLIT_SUM,
        ],
        differentiable: true,
        verify: conv1d::verify,
    },
];

/// Every kernel: those of the ops, then the ceiling that `forback bench` measures.
pub static KERNELS: [&Kernel; 175] = [
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
    &backtest_tiles::KEYS_BY_ROW,
    &backtest_tiles::BACKTEST_BAND_STATES,
    &backtest_tiles::BACKTEST_CROSS,
    &backtest_tiles::BACKTEST_BAND,
    &backtest_tiles::BACKTEST_SIZED,
    &backtest_tiles::BACKTEST_JOIN,
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
    &hmm::HMM_FORWARD_BACKWARD_TABLE_4,
    &hmm::HMM_FORWARD_BACKWARD_TABLE_8,
    &hmm::HMM_FORWARD_BACKWARD_STATES_4,
    &hmm::HMM_FORWARD_BACKWARD_STATES_8,
    &hmm::HMM_FORWARD_BACKWARD,
    &hmm_scan::HMM_SCAN_CHUNKS,
    &hmm_scan::HMM_SCAN_MERGE,
    &hmm_scan::HMM_SCAN_DOWN,
    &hmm_scan::HMM_SCAN_FORWARD,
    &hmm_scan::HMM_SCAN_SUM,
    &hmm_scan::HMM_SCAN_BACKWARD,
    &hmm_viterbi::HMM_VITERBI,
    &hmm_viterbi::HMM_VITERBI_LANES,
    &hmm_viterbi::HMM_VITERBI_PATH,
    &hmm_sample::HMM_WEIGHTS,
    &hmm_sample::HMM_SAMPLE,
    &hmm_sample::HMM_SAMPLE_OBSERVATIONS,
    &hmm_sample::HMM_SAMPLE_POSTERIOR,
    &hmm_forecast::HMM_FORECAST,
    &hmm_forecast::HMM_SOJOURN,
    &hmm_forecast::HMM_SOJOURN_AVERAGE,
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
    &map::MAP,
    &map::FILL,
    &map::DROPOUT,
    &reduce::REDUCE,
    &reduce::REDUCE_MAX,
    &reduce::REDUCE_MAX_BACKWARD,
    &optimiser::GRADIENT_NORM,
    &optimiser::OPTIMISER_PREPARE,
    &optimiser::ADAM_UPDATE,
    &optimiser::SGD_UPDATE,
    &optimiser::PARAMETER_AVERAGE,
    &loss::LOSS_ELEMENTS,
    &loss::LOSS_CROSS_ENTROPY,
    &loss::LOSS_KL,
    &loss::LOSS_MEAN,
    &loss::LOSS_ELEMENTS_BACKWARD,
    &loss::LOSS_CROSS_ENTROPY_BACKWARD,
    &loss::LOSS_KL_BACKWARD,
    &recurrent::RECURRENT_PACK,
    &recurrent::LSTM_FORWARD,
    &recurrent::GRU_FORWARD,
    &recurrent::RECURRENT_GATES,
    &recurrent::LSTM_BACKWARD,
    &recurrent::GRU_BACKWARD,
    &recurrent::RECURRENT_GRADIENTS,
    &recurrent::RECURRENT_REDUCE,
    &recurrent::LSTM_FORWARD_BLOCKS,
    &recurrent::GRU_FORWARD_BLOCKS,
    &recurrent::LSTM_BACKWARD_BLOCKS,
    &recurrent::GRU_BACKWARD_BLOCKS,
    &recurrent::RECURRENT_GRADIENTS_BLOCKS,
    &attention::ATTENTION_FORWARD_8,
    &attention::ATTENTION_FORWARD_16,
    &attention::ATTENTION_FORWARD_32,
    &attention::ATTENTION_FORWARD,
    &attention::ATTENTION_ROWS,
    &attention::ATTENTION_BACKWARD_Q_8,
    &attention::ATTENTION_BACKWARD_Q_16,
    &attention::ATTENTION_BACKWARD_Q_32,
    &attention::ATTENTION_BACKWARD_Q,
    &attention::ATTENTION_BACKWARD_KV_8,
    &attention::ATTENTION_BACKWARD_KV_16,
    &attention::ATTENTION_BACKWARD_KV_32,
    &attention::ATTENTION_BACKWARD_KV,
    &attention::ATTENTION_BACKWARD_KV_PACKED_8,
    &attention::ATTENTION_BACKWARD_KV_PACKED_16,
    &attention::ATTENTION_BACKWARD_KV_PACKED_32,
    &attention::ATTENTION_BACKWARD_KV_PACKED,
    &attention::ATTENTION_BACKWARD,
    &attention::ATTENTION_BACKWARD_PACKED,
    &attention::ATTENTION_FORWARD_BLOCKS_8,
    &attention::ATTENTION_BACKWARD_Q_BLOCKS_8,
    &attention::ATTENTION_BACKWARD_KV_BLOCKS_8,
    &attention::ATTENTION_BACKWARD_KV_PACKED_BLOCKS_8,
    &attention::ATTENTION_FORWARD_BLOCKS_16,
    &attention::ATTENTION_BACKWARD_Q_BLOCKS_16,
    &attention::ATTENTION_BACKWARD_KV_BLOCKS_16,
    &attention::ATTENTION_BACKWARD_KV_PACKED_BLOCKS_16,
    &attention::ATTENTION_FORWARD_BLOCKS_32,
    &attention::ATTENTION_BACKWARD_Q_BLOCKS_32,
    &attention::ATTENTION_BACKWARD_KV_BLOCKS_32,
    &attention::ATTENTION_BACKWARD_KV_PACKED_BLOCKS_32,
    &attention::ATTENTION_GRAD_BIAS,
    &attention::ATTENTION_WEIGHTS,
    &linear::LINEAR_FORWARD,
    &linear::LINEAR_FORWARD_SMALL,
    &linear::LINEAR_FORWARD_KEPT,
    &linear::LINEAR_FORWARD_KEPT_SMALL,
    &linear::LINEAR_GRAD_X,
    &linear::LINEAR_GRAD_X_SMALL,
    &linear::LINEAR_GRAD_WEIGHT,
    &linear::LINEAR_GRAD_WEIGHT_SMALL,
    &split_sum::SPLIT_SUM,
    &layer_norm::LAYER_NORM_FORWARD,
    &layer_norm::LAYER_NORM_FORWARD_SMALL,
    &layer_norm::LAYER_NORM_GRAD_X,
    &layer_norm::LAYER_NORM_GRAD_X_SMALL,
    &layer_norm::LAYER_NORM_GRAD_WEIGHT,
    &layer_norm::LAYER_NORM_GRAD_WEIGHT_SMALL,
    &softmax::SOFTMAX_FORWARD,
    &softmax::SOFTMAX_FORWARD_SMALL,
    &softmax::SOFTMAX_MASKED,
    &softmax::SOFTMAX_MASKED_SMALL,
    &softmax::SOFTMAX_BACKWARD,
    &softmax::SOFTMAX_BACKWARD_SMALL,
    &gather::EMBEDDING,
    &gather::EMBEDDING_BACKWARD,
    &gather::EMBEDDING_INVALID,
    &pool::POOL,
    &pool::POOL_BACKWARD,
    &pool::POOL_WEIGHTS,
    &pool::POOL_WEIGHTS_BACKWARD,
    &normalise::NORMALISE,
    &normalise::NORMALISE_BACKWARD,
    &objective::NET_RETURNS,
    &objective::OBJECTIVE_MOMENTS,
    &objective::OBJECTIVE_TAIL,
    &objective::OBJECTIVE_TAIL_SWEEP,
    &objective::OBJECTIVE_FINISH,
    &objective::OBJECTIVE_GRADIENT,
    &objective::NET_RETURNS_BACKWARD,
    &conv1d::CONV1D_FORWARD,
    &conv1d::CONV1D_FORWARD_RAGGED,
    &conv1d::CONV1D_ACTIVATE,
    &conv1d::CONV1D_GRAD_X,
    &conv1d::CONV1D_GRAD_X_RAGGED,
    &conv1d::CONV1D_GRAD_WEIGHT,
    &conv1d::CONV1D_GRAD_WEIGHT_RAGGED,
    &ceilings::CEILING_MULTIPLY_ADD,
];
