//! Decision variables that many parameter sets share, computed once per asset, bar and row, as keys (see `fixed.rs`).
//!
//! A *row* is one indicator with its own parameters. With p_t the close as an exact integer:
//! * `indicator_sma`: mean of the last n closes, relative to p_t.
//! * `indicator_ema`: e_t = e_{t−1} + 2/(n+1)·(p_t − e_{t−1}), e_0 = p_0, relative to p_t; with a signal span g instead
//!   e_t − EMA_g(e)_t, so that MACD line > signal line compares the rows of the fast and of the slow span.
//! * `indicator_rsi`: gain/(gain + loss) by Wilder's average (first value: mean of the first n changes); one half where both are 0.
//! * `indicator_bollinger`: signed square of (p_t − mean)/sd over the last n closes, population sd; 0 where sd = 0.
//! * `indicator_donchian`: how many closes in a row before t lie below p_t (row 0) and above p_t (row 1), capped.
//! * `indicator_volatility`: 1/(√252·sd) of the last n log returns (n−1), a real number that is rounded once, so that weights are the
//!   same on every device; 1e30 where sd = 0.
//!
//! Shapes   price [A,T], for `price_sums` [2,A,T], closes then fills; returns [A,T−1] between fills; exponents [A]: biased exponent of each asset's highest price; sums, squares [A,T+1,4]:
//!          128-bit prefix sums of prices and of their squares; keys, inverse_volatility [A,T,rows]; logs [A,T,2]: ln of the
//!          price as 64-bit fixed-point with `bits` fractional bits. Bars before a row's
//!          first value hold 0 (RSI: one half) and are not to be used.
//! Launch   `price_sums`: one workgroup per asset, a scan of integers, so any split gives the same bits. SMA, Bollinger, Donchian,
//!          volatility: one thread per value. EMA, RSI: one thread per row, sequential over bars.
//! Scratch  sums and squares.
//! Floor    4 bytes written per value; 60 (EMA) to 600 (Bollinger) integer instructions. For long series of few rows EMA and RSI are
//!          bound by latency: about 100 cycles a bar.
//! Numerics exact integers; see `fixed.rs`. Causality: a value at t uses closes up to t.
//! Source   Wilder 1978 for RSI; Appel for MACD; Bollinger 2001; Donchian; definitions as in the conformance files.
//! Files    shaders/indicators.wgsl · cuda/indicators.cu · reference: the `_cpu` functions

use crate::Result;
use crate::fixed::{KEY_ZERO, blend, difference_key, fixed_price, inverse_deviation, mean_key, ratio_key, rsi_key};
use crate::kernel::{Arg, Cost, Cpu, CpuLaunch, Kernel, layout, params_of, reads, reads_u32, writes, writes_u32};
use crate::real::Real;
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

params! {
    /// Params of all indicator kernels.
    pub struct IndicatorParams {
        /// Assets.
        a: u32,
        /// Bars.
        t: u32,
        /// Rows.
        rows: u32,
        /// Fixed-point prices lie below 2^bits.
        bits: u32,
        /// `price_sums`: 1 for sums, 2 for squares, 3 for both. `indicator_donchian`: the cap.
        extra: u32,
    }
}

/// Threads per workgroup.
const WG: u32 = 64;
/// Fixed-point bits of single prices.
pub const PRICE_BITS: u32 = 62;

fn params(words: &[u32]) -> IndicatorParams {
    params_of(words).unwrap_or(IndicatorParams { a: 0, t: 0, rows: 0, bits: 0, extra: 0 })
}

fn values(words: &[u32]) -> u64 {
    let p = params(words);
    u64::from(p.a) * u64::from(p.t) * u64::from(p.rows)
}

fn bars(words: &[u32]) -> u64 {
    let p = params(words);
    u64::from(p.a) * u64::from(p.t)
}

const fn indicator(name: &'static str, about: &'static str, args: &'static [Arg], groups: fn(&[u32]) -> u64, cpu: Cpu, flops: f64) -> Kernel {
    Kernel {
        name,
        about,
        args,
        params: layout::<IndicatorParams>(),
        workgroup: WG,
        constants: &[],
        groups,
        wgsl: wgsl!("indicators"),
        cuda: cuda!("indicators"),
        cpu: Some(cpu),
        cost: Cost { unit: "value", units: values, bytes: 4.0, flops },
    }
}

/// One thread per value.
fn by_value(words: &[u32]) -> u64 {
    values(words).div_ceil(u64::from(WG))
}

/// One thread per row, workgroups of one asset.
fn by_row(words: &[u32]) -> u64 {
    let p = params(words);
    u64::from(p.a) * u64::from(p.rows.div_ceil(WG))
}

/// Returns, and prefix sums of prices and their squares.
pub static PRICE_SUMS: Kernel = Kernel {
    cost: Cost { unit: "bar", units: bars, bytes: 40.0, flops: 80.0 },
    ..indicator(
        "price_sums",
        "returns and exact prefix sums of prices",
        &[reads("price"), reads_u32("exponents"), writes("returns"), writes_u32("sums"), writes_u32("squares")],
        |words| u64::from(params(words).a),
        Cpu { f32: price_sums_cpu::<f32>, f64: price_sums_cpu::<f64> },
        80.0,
    )
};

/// Simple moving averages.
pub static INDICATOR_SMA: Kernel = indicator(
    "indicator_sma",
    "keys of simple moving averages",
    &[reads("price"), reads_u32("exponents"), reads_u32("sums"), reads_u32("periods"), writes_u32("keys")],
    by_value,
    Cpu { f32: indicator_sma_cpu::<f32>, f64: indicator_sma_cpu::<f64> },
    160.0,
);

/// Exponential moving averages, or their distance from their own signal average.
pub static INDICATOR_EMA: Kernel = indicator(
    "indicator_ema",
    "keys of exponential moving averages and MACD",
    &[reads("price"), reads_u32("exponents"), reads_u32("alphas"), writes_u32("keys")],
    by_row,
    Cpu { f32: indicator_ema_cpu::<f32>, f64: indicator_ema_cpu::<f64> },
    120.0,
);

/// Wilder's relative strength index.
pub static INDICATOR_RSI: Kernel = indicator(
    "indicator_rsi",
    "keys of Wilder's relative strength index",
    &[reads("price"), reads_u32("exponents"), reads_u32("periods"), reads_u32("alphas"), writes_u32("keys")],
    by_row,
    Cpu { f32: indicator_rsi_cpu::<f32>, f64: indicator_rsi_cpu::<f64> },
    400.0,
);

/// Distance from the mean in standard deviations.
pub static INDICATOR_BOLLINGER: Kernel = indicator(
    "indicator_bollinger",
    "keys of the distance from the mean in deviations",
    &[reads("price"), reads_u32("exponents"), reads_u32("sums"), reads_u32("squares"), reads_u32("periods"), writes_u32("keys")],
    by_value,
    Cpu { f32: indicator_bollinger_cpu::<f32>, f64: indicator_bollinger_cpu::<f64> },
    600.0,
);

/// Lengths of the runs of lower and of higher closes before each bar.
pub static INDICATOR_DONCHIAN: Kernel = indicator(
    "indicator_donchian",
    "lengths of the runs of lower and higher closes",
    &[reads("price"), writes_u32("keys")],
    |words| bars(words).div_ceil(u64::from(WG)),
    Cpu { f32: indicator_donchian_cpu::<f32>, f64: indicator_donchian_cpu::<f64> },
    40.0,
);

/// Inverse annual volatility of log returns.
pub static INDICATOR_VOLATILITY: Kernel = indicator(
    "indicator_volatility",
    "inverse annual volatility of log returns",
    &[reads_u32("logs"), reads_u32("periods"), writes("inverse_volatility")],
    by_value,
    Cpu { f32: indicator_volatility_cpu::<f32>, f64: indicator_volatility_cpu::<f64> },
    3000.0,
);

fn get128(words: &[u32], at: usize) -> u128 {
    (0..4).rev().fold(0, |x, i| (x << 32) | u128::from(words[4 * at + i]))
}

fn put128(words: &mut [u32], at: usize, x: u128) {
    for i in 0..4 {
        words[4 * at + i] = (x >> (32 * i)) as u32;
    }
}

fn fixed<R: Real>(price: R, exponent: u32, bits: u32) -> u64 {
    fixed_price(price.f32(), exponent, bits)
}

fn price_sums_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: IndicatorParams = launch.params()?;
    let (price, exponents) = (launch.real()?, launch.word()?);
    let (returns, sums, squares) = (launch.real_mut()?, launch.word_mut()?, launch.word_mut()?);
    let t = p.t as usize;
    for a in 0..p.a as usize {
        let x = &price[a * t..(a + 1) * t];
        let fill = &price[(p.a as usize + a) * t..][..t];
        for j in 0..t - 1 {
            returns[a * (t - 1) + j] = (fill[j + 1] - fill[j]) / fill[j];
        }
        let (mut sum, mut square) = (0u128, 0u128);
        for j in 0..=t {
            if p.extra & 1 != 0 {
                put128(sums, a * (t + 1) + j, sum);
            }
            if p.extra & 2 != 0 {
                put128(squares, a * (t + 1) + j, square);
            }
            if j < t {
                let f = u128::from(fixed(x[j], exponents[a], p.bits));
                sum += f;
                square = square.wrapping_add(f * f);
            }
        }
    }
    Ok(())
}

/// Runs `f(asset, bar, keys of all rows)` over every bar in parallel.
fn each_bar(p: &IndicatorParams, keys: &mut [u32], f: impl Fn(usize, usize, &mut [u32]) + Sync) {
    let (t, rows) = (p.t as usize, p.rows as usize);
    let n = p.a as usize * t * rows;
    keys[..n].par_chunks_exact_mut(rows).enumerate().with_min_len(64).for_each(|(i, out)| f(i / t, i % t, out));
}

fn indicator_sma_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: IndicatorParams = launch.params()?;
    let (price, exponents, sums, periods) = (launch.real()?, launch.word()?, launch.word()?, launch.word()?);
    let (t, arch) = (p.t as usize, Arch::new());
    let longest = periods.iter().copied().max().unwrap_or(1);
    let (longest_bits, inverses) = (64 - u64::from(longest).leading_zeros(), periods.iter().map(|&n| 1.0 / f64::from(n)).collect::<Vec<_>>());
    // Where n·p stays below 2^62 the low words of the sums tell all.
    let narrow = (p.bits + longest_bits <= 62).then(|| (0..sums.len() / 4).map(|i| get64(sums, 2 * i)).collect::<Vec<u64>>());
    each_bar(&p, launch.word_mut()?, |a, j, out| {
        let (x, end) = (fixed(price[a * t + j], exponents[a], p.bits), a * (t + 1) + j + 1);
        let exact = |n: u32| mean_key(get128(sums, end) - get128(sums, end - n as usize), n, x);
        let ready = periods.partition_point(|&n| n as usize <= j + 1);
        match &narrow {
            Some(low) if periods.is_sorted() => {
                let sums = &low[end - (j + 1)..=end];
                arch.dispatch(MeanKeys { sums, x, periods: &periods[..ready], inverses: &inverses[..ready], keys: &mut out[..ready], exact: &exact });
                out[ready..].fill(0);
            }
            _ => {
                for (key, &n) in out.iter_mut().zip(periods) {
                    *key = if j + 1 >= n as usize { exact(n) } else { 0 };
                }
            }
        }
    });
    Ok(())
}

/// [`mean_key`] for many windows that end at the same bar: by f64 where its rounding cannot touch the key, exactly elsewhere.
struct MeanKeys<'a, F> {
    /// Prefix sums modulo 2^64, the last one including the bar.
    sums: &'a [u64],
    x: u64,
    periods: &'a [u32],
    /// 1/n.
    inverses: &'a [f64],
    keys: &'a mut [u32],
    exact: &'a F,
}

impl<F: Fn(u32) -> u32> WithSimd for MeanKeys<'_, F> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let (last, total) = (self.sums.len() - 1, self.sums[self.sums.len() - 1]);
        let mut distances = [0i64; 64];
        for ((periods, inverses), keys) in self.periods.chunks(64).zip(self.inverses.chunks(64)).zip(self.keys.chunks_mut(64)) {
            for (distance, &n) in distances.iter_mut().zip(periods) {
                let sum = total.wrapping_sub(self.sums[last - n as usize]);
                *distance = sum.wrapping_sub(u64::from(n).wrapping_mul(self.x)) as i64;
            }
            let mut doubtful = 0u32;
            for ((&distance, &inverse), key) in distances.iter().zip(inverses).zip(keys.iter_mut()) {
                let bits = (distance as f64 * inverse).to_bits();
                // 25 bits of mantissa are kept; three roundings move the 27 below by at most 2 units.
                let rest = (bits as u32) & 0x7ff_ffff;
                let exponent = ((bits >> 52) as u32 & 0x7ff).wrapping_sub(1023);
                let magnitude = ((exponent << 25) | ((bits >> 27) as u32 & 0x1ff_ffff)).wrapping_add(1);
                let negative = (bits >> 63) as u32;
                let value = KEY_ZERO.wrapping_add((magnitude ^ negative.wrapping_neg()).wrapping_add(negative));
                let sure = (rest.wrapping_sub(4) < 0x7ff_fff8) & (exponent < 62);
                // Zero is exact and has its own key; 0 marks what must be looked at again.
                let value = if sure { value } else { 0 };
                *key = if distance == 0 { KEY_ZERO } else { value };
                doubtful |= u32::from(*key == 0);
            }
            if doubtful != 0 {
                for (&n, key) in periods.iter().zip(keys).filter(|(_, key)| **key == 0) {
                    *key = (self.exact)(n);
                }
            }
        }
    }
}

/// Runs `f(asset, row, column over bars)` for every row in parallel and writes the columns as keys.
fn each_row(p: &IndicatorParams, keys: &mut [u32], f: impl Fn(usize, usize, &mut [u32]) + Sync) {
    let (t, rows) = (p.t as usize, p.rows as usize);
    keys[..p.a as usize * t * rows].par_chunks_exact_mut(t * rows).enumerate().for_each(|(a, table)| {
        let mut columns = vec![0; t * rows];
        columns.par_chunks_exact_mut(t).enumerate().for_each(|(row, column)| f(a, row, column));
        for (j, out) in table.chunks_exact_mut(rows).enumerate() {
            for (row, key) in out.iter_mut().enumerate() {
                *key = columns[row * t + j];
            }
        }
    });
}

fn get64(words: &[u32], at: usize) -> u64 {
    u64::from(words[2 * at]) | (u64::from(words[2 * at + 1]) << 32)
}

fn indicator_ema_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: IndicatorParams = launch.params()?;
    let (price, exponents, alphas) = (launch.real()?, launch.word()?, launch.word()?);
    let t = p.t as usize;
    each_row(&p, launch.word_mut()?, |a, row, column| {
        let (alpha, signal) = (get64(alphas, 2 * row), get64(alphas, 2 * row + 1));
        let mut average = fixed(price[a * t], exponents[a], p.bits);
        let mut smooth = average;
        for (j, key) in column.iter_mut().enumerate() {
            let x = fixed(price[a * t + j], exponents[a], p.bits);
            average = blend(average, x, alpha);
            smooth = blend(smooth, average, signal);
            let (value, against) = (average, if signal == 0 { x } else { smooth });
            *key = difference_key(value.abs_diff(against), value < against);
        }
    });
    Ok(())
}

fn indicator_rsi_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: IndicatorParams = launch.params()?;
    let (price, exponents, periods, alphas) = (launch.real()?, launch.word()?, launch.word()?, launch.word()?);
    let t = p.t as usize;
    each_row(&p, launch.word_mut()?, |a, row, column| {
        let (n, alpha) = (periods[row] as usize, get64(alphas, row));
        let (mut gain, mut loss) = (0u64, 0u64);
        let (mut gains, mut losses) = (0u128, 0u128);
        let mut before = fixed(price[a * t], exponents[a], p.bits);
        column[0] = 1 << 30;
        for (j, key) in column.iter_mut().enumerate().skip(1) {
            let x = fixed(price[a * t + j], exponents[a], p.bits);
            let (up, down) = (x.saturating_sub(before), before.saturating_sub(x));
            before = x;
            if j <= n {
                gains += u128::from(up);
                losses += u128::from(down);
                (gain, loss) = ((gains / n as u128) as u64, (losses / n as u128) as u64);
            } else {
                (gain, loss) = (blend(gain, up, alpha), blend(loss, down, alpha));
            }
            *key = if j >= n { rsi_key(gain, loss) } else { 1 << 30 };
        }
    });
    Ok(())
}

fn indicator_bollinger_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: IndicatorParams = launch.params()?;
    let (price, exponents, sums, squares, periods) = (launch.real()?, launch.word()?, launch.word()?, launch.word()?, launch.word()?);
    let t = p.t as usize;
    each_bar(&p, launch.word_mut()?, |a, j, out| {
        let (x, end) = (fixed(price[a * t + j], exponents[a], p.bits), a * (t + 1) + j + 1);
        let (sum, square) = (get128(sums, end), get128(squares, end));
        for (key, &n) in out.iter_mut().zip(periods) {
            *key = 0;
            if j + 1 >= n as usize {
                let total = sum - get128(sums, end - n as usize);
                let total_squares = square.wrapping_sub(get128(squares, end - n as usize));
                let level = u128::from(n) * u128::from(x);
                let distance = level.abs_diff(total);
                let variance = u128::from(n).wrapping_mul(total_squares).wrapping_sub(total.wrapping_mul(total));
                *key = ratio_key(distance.wrapping_mul(distance), variance, level < total);
            }
        }
    });
    Ok(())
}

fn indicator_donchian_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: IndicatorParams = launch.params()?;
    let (price, keys) = (launch.real()?, launch.word_mut()?);
    let (t, cap) = (p.t as usize, p.extra as usize);
    for a in 0..p.a as usize {
        let x = &price[a * t..(a + 1) * t];
        // Bars that no later bar has yet reached, from above and from below.
        let (mut highs, mut lows): (Vec<usize>, Vec<usize>) = (Vec::new(), Vec::new());
        for j in 0..t {
            while highs.last().is_some_and(|&i| x[i] < x[j]) {
                highs.pop();
            }
            while lows.last().is_some_and(|&i| x[i] > x[j]) {
                lows.pop();
            }
            let run = |stack: &Vec<usize>| stack.last().map_or(j, |&i| j - i - 1).min(cap) as u32;
            keys[2 * (a * t + j)] = run(&highs);
            keys[2 * (a * t + j) + 1] = run(&lows);
            highs.push(j);
            lows.push(j);
        }
    }
    Ok(())
}

fn indicator_volatility_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: IndicatorParams = launch.params()?;
    let (logs, periods, inverse_volatility) = (launch.word()?, launch.word()?, launch.real_mut()?);
    let (t, rows) = (p.t as usize, p.rows as usize);
    let log = |i: usize| get64(logs, i) as i64;
    // Prefix sums of squared log returns, modulo 2^128; each asset starts anew.
    let mut squares = vec![0u128; p.a as usize * t];
    for i in (0..squares.len()).filter(|i| i % t > 0) {
        let x = u128::from(log(i).abs_diff(log(i - 1)));
        squares[i] = squares[i - 1].wrapping_add(x * x);
    }
    inverse_volatility[..p.a as usize * t * rows].par_chunks_exact_mut(rows).enumerate().with_min_len(64).for_each(|(i, out)| {
        for (value, &n) in out.iter_mut().zip(periods) {
            let from = i.wrapping_sub(n as usize);
            *value = if i % t >= n as usize {
                let sum = u128::from(log(i).abs_diff(log(from)));
                inverse_of(n, u128::from(n).wrapping_mul(squares[i].wrapping_sub(squares[from])).wrapping_sub(sum.wrapping_mul(sum)), p.bits)
            } else {
                R::ZERO
            };
        }
    });
    Ok(())
}

/// 1/√252: target volatilities are annual, of daily bars.
const INVERSE_YEAR: f64 = 0.062_994_078_834_871_2;
/// Inverse volatility of a constant price.
const NO_VOLATILITY: f64 = 1e30;

/// The root of [`inverse_deviation`] as a real, rounded once by hand in f32, since devices differ in how they convert.
fn inverse_of<R: Real>(n: u32, variance: u128, bits: u32) -> R {
    if variance == 0 {
        return R::of(NO_VOLATILITY);
    }
    let (root, exponent) = inverse_deviation(n, variance, bits);
    let root = if R::DIGITS == 24 { 256.0 * f64::from(((u64::from(root) + 128) >> 8) as u32) } else { f64::from(root) };
    R::of(root) * R::of(INVERSE_YEAR) * R::of(2f64.powi(exponent))
}

/// Weight of an exponential average of span n, 2/(n+1), as a fraction of 2^63.
pub fn span_alpha(n: u32) -> u64 {
    ((1u128 << 64) / (u128::from(n) + 1)) as u64
}

/// Weight of Wilder's average, 1/n, as a fraction of 2^63.
pub fn wilder_alpha(n: u32) -> u64 {
    (1u64 << 63) / u64::from(n)
}

/// Fractional bits of log prices at which n²·variance of n log returns below 8 stays below 2^128.
pub fn log_bits(longest: u32) -> u32 {
    44.min(60 - (32 - longest.leading_zeros()))
}

/// Fixed-point bits at which sums of n prices stay below 2^62.
pub fn sum_bits(longest: u32) -> u32 {
    PRICE_BITS - (32 - longest.leading_zeros())
}

/// Fixed-point bits at which n²·variance of n prices stays below 2^128.
pub fn bollinger_bits(longest: u32) -> u32 {
    52.min(64 - longest.next_power_of_two().trailing_zeros())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bollinger_bits_leave_room() {
        assert_eq!((bollinger_bits(20), bollinger_bits(4096), bollinger_bits(1 << 20)), (52, 52, 44));
    }

    #[test]
    fn a_constant_series_stands_on_its_average() {
        let x = fixed_price(101.25, crate::fixed::exponent(101.25), PRICE_BITS);
        assert_eq!(mean_key(17 * u128::from(x), 17, x), KEY_ZERO);
        assert_eq!(blend(x, x, span_alpha(9)), x);
    }

    #[test]
    fn keys_by_f64_are_the_exact_keys() {
        let prices: Vec<f32> = (0..700u32)
            .map(|i| {
                let w = crate::philox::philox4x32([i, 0, 0, 0], [1, 2])[0];
                // Stretches of ticks, of constants and of arbitrary numbers.
                if i % 100 < 40 {
                    20.0 + (w % 400) as f32 / 100.0
                } else if i % 100 < 60 {
                    21.5
                } else {
                    20.0 + w as f32 / 1e9
                }
            })
            .collect();
        let periods: Vec<u32> = (1..600).collect();
        let inverses: Vec<f64> = periods.iter().map(|&n| 1.0 / f64::from(n)).collect();
        let bits = sum_bits(599);
        let max = crate::fixed::exponent(25.0);
        let fixed: Vec<u64> = prices.iter().map(|&p| fixed_price(p, max, bits)).collect();
        let sums: Vec<u64> = std::iter::once(0)
            .chain(fixed.iter().scan(0u64, |s, &x| {
                *s = s.wrapping_add(x);
                Some(*s)
            }))
            .collect();
        for j in [598, 599, 641, 655, 699] {
            let ready = periods.partition_point(|&n| n as usize <= j + 1);
            let exact = |n: u32| mean_key(fixed[j + 1 - n as usize..=j].iter().map(|&x| u128::from(x)).sum(), n, fixed[j]);
            let mut keys = vec![0; ready];
            let job = MeanKeys { sums: &sums[..j + 2], x: fixed[j], periods: &periods[..ready], inverses: &inverses[..ready], keys: &mut keys, exact: &exact };
            Arch::new().dispatch(job);
            assert!(keys.iter().zip(&periods).all(|(&key, &n)| key == exact(n)), "bar {j}");
        }
    }
}
