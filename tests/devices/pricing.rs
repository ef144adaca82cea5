//! Launches of the pricing kernels between guards: 67 options, so that the last workgroup is not full.

use super::{Guarded, Guards};
use forback::kernels::KERNELS;
use forback::kernels::black_scholes::{BLACK_SCHOLES, BLACK_SCHOLES_BACKWARD, BLACK_SCHOLES_PRICE, BlackScholesParams};
use forback::kernels::exotic_price::ExoticParams;
use forback::kernels::heston_price::{HESTON_PRICE, HestonParams, MERTON_PRICE};
use forback::kernels::implied_volatility::{IMPLIED_VOLATILITY, ImpliedVolatilityParams};
use forback::kernels::kernel::Elem;
use forback::kernels::minimum_variance_hedge_ratio::{HEDGE_COVARIANCES, HEDGE_MIXTURE, HEDGE_SOLVE, HedgeRatioParams};
use forback::kernels::paths::{Draws, Jumps, Market, Markets, Model, Variance};

pub(super) fn guarded(g: &mut Guards) {
    const ROWS: usize = 67;
    let rows = ROWS as u32;
    let reals = |g: &mut Guards, n: usize| -> Guarded { g.out(Elem::F32, n) };
    let terms: Vec<f32> = (0..ROWS).flat_map(|i| [100.0, 80.0 + i as f32, 0.5, 0.2, 0.03, 0.01]).collect();
    let (terms, kind) = (g.reals(&terms), g.words(&(0..rows).map(|i| i % 4).collect::<Vec<_>>()));
    let outs: Vec<Guarded> = (0..6).map(|_| reals(g, ROWS)).collect();
    let params = BlackScholesParams { rows };
    g.launch(&BLACK_SCHOLES, &params, &[&terms, &kind, &outs[0], &outs[1], &outs[2], &outs[3], &outs[4], &outs[5]]);
    let (price, grad_price, grad) = (reals(g, ROWS), g.reals(&[0.5; ROWS]), reals(g, 6 * ROWS));
    g.launch(&BLACK_SCHOLES_PRICE, &params, &[&terms, &kind, &price]);
    g.launch(&BLACK_SCHOLES_BACKWARD, &params, &[&terms, &kind, &grad_price, &grad]);

    let quotes: Vec<f32> = (0..ROWS).flat_map(|i| [100.0, 100.0, 0.5, i as f32 - 2.0, 0.0, 0.0]).collect();
    let (quotes, volatility, status) = (g.reals(&quotes), reals(g, ROWS), g.out(Elem::U32, ROWS));
    g.launch(&IMPLIED_VOLATILITY, &ImpliedVolatilityParams { rows }, &[&quotes, &kind, &volatility, &status]);

    let plain: Vec<f32> = (0..ROWS).flat_map(|i| [100.0, 80.0 + i as f32, 0.5, 0.03, 0.01]).collect();
    let (plain, model_of) = (g.reals(&plain), g.words(&(0..rows).map(|i| i % 2).collect::<Vec<_>>()));
    let heston = g.reals(&[0.04, 1.5, 0.05, 0.4, -0.5, 0.0, 0.0, 0.0, 0.04, 1.5, 0.05, 0.4, -0.5, 1.0, -0.1, 0.1]);
    let nodes: Vec<f32> = (0..32).map(|i| (2 * i + 1) as f32 / 32.0 - 1.0).chain([1.0 / 16.0; 32]).collect();
    let (nodes, price) = (g.reals(&nodes), reals(g, ROWS));
    g.launch(&HESTON_PRICE, &HestonParams { rows }, &[&plain, &kind, &heston, &model_of, &nodes, &price]);
    let (merton, price) = (g.reals(&[0.2, 0.0, 0.0, 0.0, 0.2, 1.0, -0.1, 0.1]), reals(g, ROWS));
    g.launch(&MERTON_PRICE, &HestonParams { rows }, &[&plain, &kind, &merton, &model_of, &price]);

    // Three series of two spots, three futures, two regimes.
    let (b, t, k, n, m) = (3u32, 70u32, 2u32, 2u32, 3u32);
    let params = HedgeRatioParams {
        batch: b,
        steps: t,
        regimes: k,
        spots: n,
        futures_count: m,
        spot_stride: t * n,
        futures_stride: t * m,
        probs_stride: t * k,
        average: 1,
        ridge: 1e-8,
    };
    let noise = |n: u32, by: u32| (0..n).map(|i| ((i * by) % 17) as f32 / 17.0 - 0.4).collect::<Vec<f32>>();
    let (spot, futures, probs) = (g.reals(&noise(b * t * n, 5)), g.reals(&noise(b * t * m, 7)), g.reals(&vec![0.5; (b * t * k) as usize]));
    let record = (m * (m + n) + m + 2 * n + 1) as usize;
    let (lengths, moments, mixture) = (g.words(&[70, 2, 33]), reals(g, 9 * record), reals(g, 3 * record));
    g.launch(&HEDGE_COVARIANCES, &params, &[&spot, &futures, &probs, &lengths, &moments]);
    g.launch(&HEDGE_MIXTURE, &params, &[&moments, &probs, &lengths, &mixture]);
    let (per_regime, ratio, effectiveness, flags) = (reals(g, 36), reals(g, 18), reals(g, 6), g.out(Elem::U32, 9));
    g.launch(&HEDGE_SOLVE, &params, &[&moments, &probs, &lengths, &mixture, &per_regime, &ratio, &effectiveness, &flags]);

    let jumps = Jumps { intensity: 1.0, mean: -0.1, sd: 0.1 };
    let variance = Variance { start: 0.04, mean: 0.04, reversion: 1.0, volatility: 0.4, correlation: -0.5 };
    let models = [Model::Gbm { volatility: 0.2 }, Model::Merton { volatility: 0.2, jumps }, Model::Heston(variance), Model::Bates(variance, jumps)];
    let exotic = KERNELS.iter().filter(|k| k.params.name == "ExoticParams");
    for (kernel, model) in exotic.zip(models) {
        let market = Market { spot: 100.0, drift: 0.0, model, basis: None };
        let (reals, words) = Markets::new("guarded", &[market], 6, 1.0, &Draws::default()).unwrap().parts();
        let params =
            ExoticParams { samples: 131, t: 6, market: 0, first: 3, first_high: 0, per: 1, kind: 1 | 1 << 8 | 8, strike: 100.0, barrier: 90.0, discount: 1.0 };
        let (market, market_words, sums) = (g.reals(&reals), g.words(&words), g.out(Elem::F32, 15));
        g.launch(kernel, &params, &[&market, &market_words, &sums]);
    }
}
