//! Every kernel family at a small size, on the CPU and, where it opens, wgpu: `cargo bench --bench kernels -- philox`.
//!
//! Inputs are on the device; timed are recording, launches, and the download of what the op returns. The sizes are for changes seen
//! from one commit to the next on one machine; `forback bench` has the standard workloads.

#![allow(clippy::unwrap_used, missing_docs, reason = "a bench that cannot go on stops, and is no interface")]

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use forback::kernels::backtest_sweep::{Execution, Strategy, Sweep};
use forback::kernels::fixed::exponent;
use forback::kernels::hmm::{Emission, Hmm, Pair, Transitions, Wanted, hmm_forward_backward, hmm_forward_backward_into};
use forback::kernels::hmm_baum_welch::{BaumWelch, Observations, Settings};
use forback::kernels::indicators::{self, IndicatorParams, PRICE_BITS, bollinger_bits, log_bits, span_alpha, sum_bits, wilder_alpha};
use forback::kernels::performance::performance_read;
use forback::kernels::philox::{normals, philox, philox4x32};
use forback::kernels::walk_forward_sharpe::{walk_forward_sharpe, walk_forward_sharpe_backward};
use forback::kernels::{Kernel, View};
use forback::sim::grid::Grid;
use forback::sim::market::regime_switching_market;
use forback::{Device, Result};
use std::time::Duration;

fn devices() -> Vec<Device> {
    ["cpu", "wgpu"].iter().filter_map(|name| Device::open(name).ok()).collect()
}

fn each_device(c: &mut Criterion, op: &str, elements: usize, mut run: impl FnMut(&Device) -> Result<Box<dyn FnMut() -> Result<()>>>) {
    let mut group = c.benchmark_group(op);
    group.throughput(Throughput::Elements(elements as u64)).sample_size(10).measurement_time(Duration::from_secs(2));
    for device in devices() {
        let mut once = run(&device).unwrap();
        group.bench_function(BenchmarkId::from_parameter(device.info().kind.name()), |b| b.iter(|| once().unwrap()));
    }
    group.finish();
}

/// Closes [T,N] of the synthetic market.
fn market(bars: usize, assets: usize) -> Vec<f32> {
    let numbers = |path: u64, block: u32| normals(philox4x32([path as u32, (path >> 32) as u32, block, 1 << 16], [1, 0]));
    regime_switching_market(bars, assets, numbers).unwrap().close.into_raw_vec_and_offset().0
}

/// Returns [N,T] around 3e-4.
fn returns(n: usize) -> Vec<f32> {
    (0..n.div_ceil(4) as u32).flat_map(|i| normals(philox4x32([i, 0, 0, 0], [2, 0]))).take(n).map(|z| (3e-4 + 0.01 * z) as f32).collect()
}

fn numbers(c: &mut Criterion) {
    let rows = 1 << 16;
    each_device(c, "philox", 4 * rows, |device| {
        let counters: Vec<u32> = (0..4 * rows as u32).collect();
        let (counter, key) = (device.upload_u32("counter", &counters)?, device.upload_u32("key", &counters[..2 * rows])?);
        let device = device.clone();
        Ok(Box::new(move || {
            let mut pass = device.pass("philox");
            let out = philox(&mut pass, &counter, &key)?;
            let read = pass.read(&out.normal)?;
            pass.submit()?.f32(read).map(drop)
        }))
    });
}

fn statistics(c: &mut Criterion) {
    let (n, t) = (1000usize, 2520usize);
    each_device(c, "performance", n * t, |device| {
        let (x, device) = (device.upload("returns", &returns(n * t))?, device.clone());
        Ok(Box::new(move || {
            let mut pass = device.pass("performance");
            let read = performance_read(&mut pass, &x, n as u64, t as u64)?;
            pass.submit()?.f64(read).map(drop)
        }))
    });
    let windows: Vec<[u32; 2]> = (0..80).map(|k| [21 * k, 21 * k + 756]).collect();
    for backward in [false, true] {
        let op = if backward { "walk_forward_sharpe_backward" } else { "walk_forward_sharpe" };
        each_device(c, op, n * t, |device| {
            let x = device.upload("returns", &returns(n * t))?;
            let upstream = device.upload("grad_sharpe", &vec![1.0; n * windows.len()])?;
            let (device, windows) = (device.clone(), windows.clone());
            Ok(Box::new(move || {
                let mut pass = device.pass("walk_forward_sharpe");
                let forward = walk_forward_sharpe(&mut pass, &x, n as u64, t as u64, &windows, 252.0)?;
                if backward {
                    walk_forward_sharpe_backward(&mut pass, &forward, &x, &upstream)?;
                }
                let read = pass.read(&forward.sharpe)?;
                pass.submit()?.f64(read).map(drop)
            }))
        });
    }
}

/// 256 sequences of 500 steps: every result of forward-backward, and ten iterations of Baum-Welch.
fn markov(c: &mut Criterion) {
    let (b, t) = (256usize, 500usize);
    for k in [2usize, 4, 16] {
        let log_init = vec![-(k as f32).ln(); k];
        let stay = (1.0 - 0.02 * (k - 1) as f32).ln();
        let log_trans: Vec<f32> = (0..k * k).map(|i| if i % (k + 1) == 0 { stay } else { 0.02f32.ln() }).collect();
        let log_obs: Vec<f32> = returns(b * t * k).iter().map(|r| 100.0 * r - 1.0).collect();
        for (name, wanted) in [
            ("posterior", Wanted { posterior: true, ..Wanted::default() }),
            ("all", Wanted { filtered: true, predicted: true, posterior: true, pair: Pair::Sum }),
        ] {
            each_device(c, &format!("hmm_forward_backward/{name}/K={k}"), b * t, |device| {
                let view = |name, values: &[f32]| Ok::<_, forback::Error>(View::from(&device.upload(name, values)?));
                let hmm = Hmm {
                    b: b as u64,
                    t: t as u64,
                    k: k as u64,
                    d: 0,
                    emission: Emission::LogProbabilities,
                    model: view("model", &log_init)?,
                    per_sequence: false,
                    transitions: Transitions::Table { log_trans: view("log_trans", &log_trans)?, per_sequence: false, per_step: false },
                    obs: view("log_obs", &log_obs)?,
                    words: None,
                    masked: false,
                };
                let mut pass = device.pass("hmm");
                let out = hmm_forward_backward(&mut pass, &hmm, wanted)?;
                pass.submit()?;
                let device = device.clone();
                Ok(Box::new(move || {
                    let mut pass = device.pass("hmm");
                    hmm_forward_backward_into(&mut pass, &hmm, wanted, &out)?;
                    let read = out.read(&mut pass)?;
                    out.likelihoods(&mut pass.submit()?, read).map(drop)
                }))
            });
        }
    }
    // init, transitions, means, variances of three states
    let one = [1.0 / 3.0, 1.0 / 3.0, 1.0 / 3.0, 0.96, 0.02, 0.02, 0.02, 0.96, 0.02, 0.02, 0.02, 0.96, -1.0, 0.0, 1.0, 1.0, 1.0, 1.0];
    let series: Vec<f32> = returns(b * t).iter().map(|r| 100.0 * r).collect();
    each_device(c, "hmm_baum_welch/K=3", 10 * b * t, |device| {
        let (device, series) = (device.clone(), series.clone());
        let (start, guards) = (one.repeat(b), [1e-6f32, 0.0].repeat(b));
        Ok(Box::new(move || {
            let data = Observations::new(&series, b, t, 1);
            let mut fit = BaumWelch::new(&device, &data, &Settings::plain(Emission::GaussianDiagonal, 3, 1), &start, &guards, 10)?;
            let mut pass = device.pass("hmm_baum_welch");
            fit.record(&mut pass, 10)?;
            let read = pass.read(&fit.path)?;
            pass.submit()?.f64(read).map(drop)
        }))
    });
}

/// Tables of 16 rows for 16 assets.
fn tables(c: &mut Criterion) {
    let (a, t) = (16usize, 2520usize);
    let spans: Vec<u32> = (1..=16).map(|i| 12 * i).collect();
    let rows = spans.len();
    let close = market(t, a);
    let price: Vec<f32> = (0..a * t).map(|i| close[i % t * a + i / t]).collect();
    let exponents: Vec<u32> = price.chunks_exact(t).map(|x| exponent(x.iter().copied().fold(0.0, f32::max))).collect();
    let longest = *spans.last().unwrap();
    let half = |x: u64| [x as u32, (x >> 32) as u32];
    let alphas: Vec<u32> = spans.iter().flat_map(|&n| [half(span_alpha(n)), half(span_alpha(9))].concat()).collect();
    let wilder: Vec<u32> = spans.iter().flat_map(|&n| half(wilder_alpha(n))).collect();
    let logs: Vec<u32> = price.iter().flat_map(|p| half((f64::from(*p).ln() * 2f64.powi(log_bits(longest) as i32)).round() as i64 as u64)).collect();
    let kernels: [(&'static Kernel, u32, u32); 6] = [
        (&indicators::INDICATOR_SMA, sum_bits(longest), 1),
        (&indicators::INDICATOR_EMA, PRICE_BITS, 0),
        (&indicators::INDICATOR_RSI, PRICE_BITS, 0),
        (&indicators::INDICATOR_BOLLINGER, bollinger_bits(longest), 3),
        (&indicators::INDICATOR_DONCHIAN, PRICE_BITS, 0),
        (&indicators::INDICATOR_VOLATILITY, log_bits(longest), 0),
    ];
    for (kernel, bits, extra) in kernels {
        let rows = if kernel.name == "indicator_donchian" { 2 } else { rows };
        each_device(c, kernel.name, a * t * rows, |device| {
            let params = IndicatorParams { a: a as u32, t: t as u32, rows: rows as u32, bits, extra };
            let words = |name, values: &[u32]| Ok::<_, forback::Error>(View::from(&device.upload_u32(name, values)?));
            let prefix = (4 * a * (t + 1)) as u64;
            let (p, e) = (View::from(&device.upload("price", &price)?), words("exponents", &exponents)?);
            let (sums, squares) = (View::from(&device.zeros_u32("sums", prefix)?), View::from(&device.zeros_u32("squares", prefix)?));
            let earned = View::from(&device.zeros("returns", (a * (t - 1)) as u64)?);
            let mut pass = device.pass("price_sums");
            pass.launch(&indicators::PRICE_SUMS, &params, &[p.clone(), e.clone(), earned, sums.clone(), squares.clone()])?;
            pass.submit()?;
            let len = (a * t * rows) as u64;
            let keys = View::from(&device.zeros_u32("keys", len)?);
            let args = match kernel.name {
                "indicator_sma" => vec![p, e, sums, words("periods", &spans)?, keys],
                "indicator_ema" => vec![p, e, words("alphas", &alphas)?, keys],
                "indicator_rsi" => vec![p, e, words("periods", &spans)?, words("alphas", &wilder)?, keys],
                "indicator_bollinger" => vec![p, e, sums, squares, words("periods", &spans)?, keys],
                "indicator_donchian" => vec![p, keys],
                _ => vec![words("logs", &logs)?, words("periods", &spans)?, View::from(&device.zeros("inverse_volatility", len)?)],
            };
            let extra = if kernel.name == "indicator_donchian" { longest } else { extra };
            let (params, device) = (IndicatorParams { extra, ..params }, device.clone());
            Ok(Box::new(move || {
                let mut pass = device.pass(kernel.name);
                pass.launch(kernel, &params, &args)?;
                pass.submit().map(drop)
            }))
        });
    }
}

/// 2,048 sets of each strategy's default grid on two assets: tables, simulation and statistics.
fn sweeps(c: &mut Criterion) {
    let (sets, assets, bars) = (2048usize, 2usize, 1260usize);
    let close = market(bars, assets);
    for strategy in Strategy::ALL {
        let grid = Grid::parse(strategy.name(), None).unwrap().sets(u64::MAX).unwrap();
        each_device(c, &format!("backtest_sweep/{}", strategy.name()), sets * assets * (bars - 1), |device| {
            let columns: Vec<Vec<f32>> = grid.columns.iter().map(|column| column[..sets].to_vec()).collect();
            let (device, close, names) = (device.clone(), close.clone(), grid.names.clone());
            Ok(Box::new(move || {
                let parameters: Vec<(&str, &[f32])> = names.iter().copied().zip(columns.iter().map(Vec::as_slice)).collect();
                let sweep = Sweep {
                    close: &close,
                    open: None,
                    assets,
                    strategy,
                    parameters: &parameters,
                    only: None,
                    cost_bps: &[10.0],
                    execution: Execution::SameClose,
                    start: 0,
                    periods_per_year: 252.0,
                    windows: &[],
                    stitch_ends: None,
                    per_asset: true,
                    pooled: false,
                    scores: false,
                    profile: false,
                };
                sweep.run(&device, &mut |_| Ok(())).map(drop)
            }))
        });
    }
}

criterion_group!(kernels, numbers, statistics, markov, tables, sweeps);
criterion_main!(kernels);
