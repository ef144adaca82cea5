//! `forback sweep` without its files: a grid over a synthetic market, end to end, on the CPU and, where it opens, wgpu.
//!
//!     cargo bench --bench simulation -- walk_forward

#![allow(clippy::unwrap_used, missing_docs, reason = "a bench that cannot go on stops, and is no interface")]

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use forback::Device;
use forback::kernels::philox::{normals, philox4x32};
use forback::sim::grid::Grid;
use forback::sim::market::regime_switching_market;
use forback::sim::sweep::{Select, SweepConfig, sweep};
use std::time::Duration;

/// Name, grid of sma_cross, assets, walk-forward scheme, choice.
const CASES: [(&str, &str, usize, Option<&str>, Select); 3] = [
    ("sweep_10k", "fast=2:101,slow=102:201", 1, None, Select::PerAsset),
    ("walk_forward", "fast=2:41,slow=50:200:6", 10, Some("train=756,test=63,step=21"), Select::PerAsset),
    ("walk_forward_pooled", "fast=2:41,slow=50:200:6", 10, Some("train=756,test=63,step=21"), Select::Both),
];

fn simulation(c: &mut Criterion) {
    for (name, grid, assets, scheme, select) in CASES {
        let numbers = |path: u64, block: u32| normals(philox4x32([path as u32, (path >> 32) as u32, block, 1 << 16], [1, 0]));
        let market = regime_switching_market(2520, assets, numbers).unwrap();
        let grid = Grid::parse("sma_cross", Some(grid)).unwrap();
        let config = SweepConfig { walk_forward: scheme.map(|text| text.parse().unwrap()), select, periods_per_year: 252.0, ..SweepConfig::new(grid) };
        let mut group = c.benchmark_group(name);
        group.throughput(Throughput::Elements(config.grid.len() * assets as u64 * 2519)).sample_size(10).measurement_time(Duration::from_secs(3));
        for device in ["cpu", "wgpu"].iter().filter_map(|name| Device::open(name).ok()) {
            let run = || sweep(&device, market.close.view(), &config).unwrap();
            group.bench_function(BenchmarkId::from_parameter(device.info().kind.name()), |b| b.iter(run));
        }
        group.finish();
    }
}

criterion_group!(benches, simulation);
criterion_main!(benches);
