//! Figures of forecasts against what came true, and against a naive forecast.

/// Pearson correlation; NaN with fewer than two pairs or where either side is constant.
pub fn correlation(a: &[f64], b: &[f64]) -> f64 {
    let n = a.len() as f64;
    let (ma, mb) = (a.iter().sum::<f64>() / n, b.iter().sum::<f64>() / n);
    let sums = a.iter().zip(b).fold([0.0; 3], |[xy, xx, yy], (x, y)| {
        let (x, y) = (x - ma, y - mb);
        [xy + x * y, xx + x * x, yy + y * y]
    });
    let scale = (sums[1] * sums[2]).sqrt();
    if scale > 0.0 { sums[0] / scale } else { f64::NAN }
}

/// Ranks from 0, equal values sharing their mean.
fn ranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&i, &j| values[i].total_cmp(&values[j]));
    let mut out = vec![0.0; values.len()];
    let mut before = 0;
    for run in order.chunk_by(|&i, &j| values[i] == values[j]) {
        run.iter().for_each(|&i| out[i] = before as f64 + (run.len() - 1) as f64 / 2.0);
        before += run.len();
    }
    out
}

/// Spearman's rank correlation: the information coefficient.
pub fn rank_correlation(a: &[f64], b: &[f64]) -> f64 {
    correlation(&ranks(a), &ranks(b))
}

/// 1 − Σ(truth − forecast)² / Σ(truth − naive)²: positive where the forecast is closer than the naive one. Campbell, Thompson 2008.
pub fn r_squared(truth: &[f64], forecast: &[f64], naive: &[f64]) -> f64 {
    let squares = |other: &[f64]| truth.iter().zip(other).map(|(t, f)| (t - f) * (t - f)).sum::<f64>();
    let base = squares(naive);
    if base > 0.0 { 1.0 - squares(forecast) / base } else { f64::NAN }
}

/// Share of pairs for which both are positive, or neither is.
pub fn accuracy(truth: &[bool], forecast: &[bool]) -> f64 {
    truth.iter().zip(forecast).filter(|(t, f)| t == f).count() as f64 / truth.len() as f64
}
