//! Neural kernels, the tape over them, and training: against finite differences, closed forms and other libraries, on every device.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test that cannot go on fails")]

mod common;

#[path = "nn/attention.rs"]
mod attention;
#[path = "nn/conv1d.rs"]
mod conv1d;
#[path = "nn/gather.rs"]
mod gather;
#[path = "nn/gradients.rs"]
mod gradients;
#[path = "nn/half.rs"]
mod half;
#[path = "nn/hedge_rollout.rs"]
mod hedge_rollout;
#[path = "nn/hedgers.rs"]
mod hedgers;
#[path = "nn/layer_norm.rs"]
mod layer_norm;
#[path = "nn/linear.rs"]
mod linear;
#[path = "nn/loss.rs"]
mod loss;
#[path = "nn/map.rs"]
mod map;
#[path = "nn/maps_common.rs"]
mod maps_common;
#[path = "nn/normalise.rs"]
mod normalise;
#[path = "nn/objective.rs"]
mod objective;
#[path = "nn/ops.rs"]
mod ops;
#[path = "nn/optimiser.rs"]
mod optimiser;
#[path = "nn/pool.rs"]
mod pool;
#[path = "nn/pricing.rs"]
mod pricing;
#[path = "nn/recurrent.rs"]
mod recurrent;
#[path = "nn/reduce.rs"]
mod reduce;
#[path = "nn/softmax.rs"]
mod softmax;
#[path = "nn/support.rs"]
mod support;
#[path = "nn/tape.rs"]
mod tape;
#[path = "nn/torch.rs"]
mod torch;
#[path = "nn/train.rs"]
mod train;
#[path = "nn/training.rs"]
mod training;
