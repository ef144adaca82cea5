//! Back-test sweeps, and the kernels under them, on any device.

#![forbid(unsafe_code)]

#[cfg(feature = "cli")]
pub mod cli;
pub mod data;
pub mod report;
pub mod sim;

pub use forback_kernels as kernels;
pub use forback_kernels::{Device, DeviceInfo, DeviceKind, Error, OpenOptions, Result};
