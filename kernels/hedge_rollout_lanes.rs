//! The f32 column of `hedge_rollout` on the CPU: paths over lanes, layers as products by gemm_lanes. The plain column is in `hedge_rollout.rs`.
//!
//! Tile     B paths, four vectors of AVX-512 or two of other widths: a row is one quantity of all of them, so that activations [rows, B] are
//!          the right operand as it lies, and weights [O,I] the left one.
//! Backward states at the start of every 32 steps are kept; those 32 steps are rolled out again with all activations, then taken
//!          backwards. Weights are turned once per task for Wᵀ·δ; δ·xᵀ packs x.
//! Ragged   a path that has ended keeps its state and repeats its last price: its activations are finite, its gradients 0.
//! Memory   per thread, in reals: B·(T + ⌈T/32⌉·S + 33·S + 32·(A+1)) + 2·W, whatever P is.
//! Bits     a path's do not depend on its neighbours; gradients are sums over tiles in order.

use crate::Result;
use crate::activation::Activation;
use crate::gemm_lanes::{Left, Packed, Right, Start, multiply, packed_len};
use crate::hedge_rollout::{Batch, CPU_BLOCK, HedgeRolloutParams, LEAK, Product};
use crate::kernel::CpuLaunch;
use crate::lanes;
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

/// Steps between kept states.
const SEGMENT: usize = 32;

/// Paths of a tile.
#[inline(always)]
fn width<S: Simd>() -> usize {
    S::F32_LANES * if S::F32_LANES == 16 { 4 } else { 2 }
}

/// One model on the paths of a tile.
struct Tile<'a> {
    p: &'a HedgeRolloutParams,
    products: &'a [Product],
    weights: &'a [f32],
    /// The same, but an LSTM layer's two matrices side by side: [4H,I+H].
    joined: &'a [f32],
    risk: &'a [f32],
    spot: &'a [f32],
    extra: &'a [f32],
    /// Path of the first lane, and paths that there are from it on.
    first: usize,
    count: usize,
}

/// Growth of cash from two steps on, and the length of each path.
struct At<S: Simd> {
    now: S::f32s,
    then: S::f32s,
    length: S::f32s,
}

impl<S: Simd> At<S> {
    /// x where step t is one of the path's, 0 behind it.
    #[inline(always)]
    fn within(&self, simd: S, t: usize, x: S::f32s) -> S::f32s {
        simd.select_f32s(simd.less_than_f32s(simd.splat_f32s(t as f32), self.length), x, simd.splat_f32s(0.0))
    }
}

/// A holding and its slopes.
struct Holding<V> {
    hold: V,
    by_previous: V,
    by_output: [V; 2],
}

/// Vector v of row r.
#[inline(always)]
fn get<S: Simd>(x: &[f32], row: usize, v: usize) -> S::f32s {
    S::as_simd_f32s(&x[row * width::<S>() + v * S::F32_LANES..][..S::F32_LANES]).0[0]
}

#[inline(always)]
fn put<S: Simd>(x: &mut [f32], row: usize, v: usize, value: S::f32s) {
    S::as_mut_simd_f32s(&mut x[row * width::<S>() + v * S::F32_LANES..][..S::F32_LANES]).0[0] = value;
}

/// ln x for normal x > 0, as in common.wgsl.
#[inline(always)]
fn ln<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let splat = |c: f32| simd.splat_f32s(c);
    let raw = simd.add_u32s(simd.transmute_u32s_f32s(x), simd.splat_u32s(0x4a_fb0d));
    let exponent = simd.or_u32s(simd.wrapping_dyn_shr_u32s(raw, simd.splat_u32s(23)), simd.splat_u32s(0x4b00_0000));
    let e = simd.sub_f32s(simd.transmute_f32s_u32s(exponent), splat(8_388_735.0));
    let mantissa = simd.add_u32s(simd.and_u32s(raw, simd.splat_u32s(0x7f_ffff)), simd.splat_u32s(0x3f35_04f3));
    let m = simd.transmute_f32s_u32s(mantissa);
    let s = simd.div_f32s(simd.sub_f32s(m, splat(1.0)), simd.add_f32s(m, splat(1.0)));
    simd.mul_add_f32s(e, splat(0.693_359_4), simd.mul_add_f32s(e, splat(-2.121_944_4e-4), twice_artanh(simd, s)))
}

/// 2·artanh s for |s| < 0.34.
#[inline(always)]
fn twice_artanh<S: Simd>(simd: S, s: S::f32s) -> S::f32s {
    let q = simd.mul_f32s(s, s);
    let mut tail = simd.splat_f32s(0.076_923_08);
    for c in [0.090_909_09, 0.111_111_11, 0.142_857_14, 0.2, 0.333_333_33, 1.0] {
        tail = simd.mul_add_f32s(tail, q, simd.splat_f32s(c));
    }
    simd.mul_f32s(simd.add_f32s(s, s), tail)
}

/// ln x/k; near k the difference is exact, the ratio is not.
#[inline(always)]
fn ln_ratio<S: Simd>(simd: S, x: S::f32s, k: f32) -> S::f32s {
    let (k, far) = (simd.splat_f32s(k), ln(simd, simd.mul_f32s(x, simd.splat_f32s(1.0 / k))));
    let s = simd.div_f32s(simd.sub_f32s(x, k), simd.add_f32s(x, k));
    simd.select_f32s(simd.less_than_f32s(simd.abs_f32s(s), simd.splat_f32s(0.17)), twice_artanh(simd, s), far)
}

/// tanh by a quotient of polynomials over ±9, within 3e-7 relative: a third of the instructions of an exponential.
#[inline(always)]
fn tanh<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    const P: [f32; 5] = [-1.278_795_9e-8, 9.267_169e-6, 0.002_920_737, 0.129_192_07, 0.999_999_94];
    const Q: [f32; 3] = [0.023_763_07, 0.462_524_9, 1.0];
    let x = simd.min_f32s(simd.splat_f32s(9.0), simd.max_f32s(simd.splat_f32s(-9.0), x));
    let square = simd.mul_f32s(x, x);
    let (mut p, mut q) = (simd.splat_f32s(1.825_283_6e-11), simd.splat_f32s(2.280_966_1e-4));
    for c in P {
        p = simd.mul_add_f32s(p, square, simd.splat_f32s(c));
    }
    for c in Q {
        q = simd.mul_add_f32s(q, square, simd.splat_f32s(c));
    }
    simd.div_f32s(simd.mul_f32s(x, p), q)
}

/// 1 / (1 + e^−x) = ½ + ½·tanh(x/2).
#[inline(always)]
fn sigmoid<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let half = simd.splat_f32s(0.5);
    simd.mul_add_f32s(half, tanh(simd, simd.mul_f32s(half, x)), half)
}

#[inline(always)]
fn sign<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let (zero, one) = (simd.splat_f32s(0.0), simd.splat_f32s(1.0));
    let negative = simd.select_f32s(simd.less_than_f32s(x, zero), simd.neg_f32s(one), zero);
    simd.select_f32s(simd.greater_than_f32s(x, zero), one, negative)
}

impl Tile<'_> {
    #[inline(always)]
    fn path(&self, lane: usize) -> usize {
        self.first + lane.min(self.count - 1)
    }

    /// What cash at steps t and t + 1 is worth at the end of each path, and whether that comes after t.
    #[inline(always)]
    fn at<S: Simd>(&self, simd: S, t: usize, spots: &[f32], v: usize, flat: [f32; 2]) -> At<S> {
        let [now, then] = flat.map(|x| simd.splat_f32s(x));
        if self.p.ragged == 0 {
            return At { now, then, length: simd.splat_f32s(self.p.steps as f32) };
        }
        let length = get::<S>(spots, self.p.steps as usize + 1, v);
        let rate = simd.splat_f32s(self.p.rate * self.p.years(1) as f32);
        let left = simd.sub_f32s(length, simd.splat_f32s(t as f32));
        let now = lanes::exp(simd, simd.mul_f32s(rate, left));
        let then = lanes::exp(simd, simd.mul_f32s(rate, simd.sub_f32s(left, simd.splat_f32s(1.0))));
        At { now, then, length }
    }

    /// The same of paths of T steps.
    fn flat(&self, t: usize) -> [f32; 2] {
        let left = self.p.steps as usize - t;
        [self.p.growth(left) as f32, self.p.growth(left.saturating_sub(1)) as f32]
    }

    /// Prices [T+1,B], a path's last one repeated behind it; then lengths [B].
    #[inline(always)]
    fn spots<S: Simd>(&self, out: &mut [f32]) {
        let (b, prices) = (width::<S>(), self.p.steps as usize + 1);
        for lane in 0..b {
            let row = &self.spot[self.path(lane) * prices..][..prices];
            for (out, &price) in out.chunks_exact_mut(b).zip(row) {
                out[lane] = price;
            }
            let length = self.p.length(row);
            for out in out.chunks_exact_mut(b).take(prices).skip(length + 1) {
                out[lane] = row[length];
            }
            out[prices * b + lane] = length as f32;
        }
    }

    /// Inputs of the network into the first rows, the band's width into the last.
    #[inline(always)]
    fn inputs<S: Simd>(&self, simd: S, t: usize, spots: &[f32], before: &[f32], acts: &mut [f32]) {
        let (p, b) = (self.p, width::<S>());
        let (columns, inputs, given) = (p.columns as usize, p.inputs as usize, p.baseline == 2);
        if columns > 0 {
            for lane in 0..b {
                // Behind its end a path is as before its last step: finite, and nobody's.
                let step = t.min(spots[(p.steps as usize + 1) * b + lane] as usize - 1);
                let values = &self.extra[(self.path(lane) * p.steps as usize + step) * columns..][..columns];
                for (i, &x) in values[columns + 4 - inputs..].iter().enumerate() {
                    acts[(4 + i) * b + lane] = x;
                }
                if given {
                    acts[2 * b + lane] = values[0];
                    if p.head > 1 {
                        acts[p.step_rows as usize * b + lane] = values[1];
                    }
                }
            }
        }
        let splat = |c: f32| simd.splat_f32s(c);
        let flat = p.years(p.steps as usize - t) as f32;
        if p.ragged > 0 {
            for lane in 0..b {
                let left = (spots[(p.steps as usize + 1) * b + lane] as usize).saturating_sub(t).max(1);
                acts[b + lane] = (p.years(left) as f32).sqrt();
            }
        } else {
            acts[b..2 * b].fill(flat.sqrt());
        }
        for v in 0..b / S::F32_LANES {
            let spot = get::<S>(spots, t, v);
            let log_moneyness = ln_ratio(simd, spot, p.strike);
            put::<S>(acts, 0, v, log_moneyness);
            put::<S>(acts, 3, v, get::<S>(before, 0, v));
            if given {
                continue;
            }
            let root = get::<S>(acts, 1, v);
            let left = if p.ragged > 0 { simd.mul_f32s(root, root) } else { splat(flat) };
            let spread = simd.mul_f32s(splat(p.volatility), root);
            let inverse = simd.div_f32s(splat(1.0), spread);
            let forward = simd.mul_add_f32s(splat(p.rate), left, log_moneyness);
            let d1 = simd.mul_add_f32s(forward, inverse, simd.mul_f32s(splat(0.5), spread));
            let (cdf, bell) = lanes::normal_cdf_and_bell(simd, d1);
            put::<S>(acts, 2, v, simd.sub_f32s(cdf, splat(p.baseline as f32)));
            if p.head > 1 {
                let gamma = simd.div_f32s(simd.mul_f32s(simd.mul_f32s(bell, splat(0.398_942_3)), inverse), spot);
                let cost = simd.mul_add_f32s(spot, splat(self.risk[0]), splat(self.risk[1]));
                let discount = lanes::exp(simd, simd.mul_f32s(splat(-p.rate), left));
                let scale = simd.mul_f32s(splat(1.5 / self.risk[3]), discount);
                let cube = simd.mul_f32s(simd.mul_f32s(cost, scale), simd.mul_f32s(gamma, gamma));
                let root = lanes::exp(simd, simd.mul_f32s(ln(simd, simd.max_f32s(cube, splat(1e-37))), splat(1.0 / 3.0)));
                let width = simd.select_f32s(simd.greater_than_f32s(cube, splat(1e-37)), root, splat(0.0));
                put::<S>(acts, p.step_rows as usize, v, width);
            }
        }
    }

    /// z = W·x, without the bias.
    #[inline(always)]
    fn dense<S: Simd>(&self, simd: S, product: &Product, acts: &mut [f32]) {
        let b = width::<S>();
        let (x, z) = acts.split_at_mut(product.d * b);
        let right = Packed::again(simd, product.x_rows, b, &x[product.x * b..][..product.x_rows * b]);
        let left = Left::Rows { data: &self.joined[product.weight..], stride: product.x_rows };
        multiply(simd, left, &right, product.d_rows, Start::Zero, &mut z[..product.d_rows * b], b);
    }

    /// Activations of a step, and the whole state behind it.
    #[inline(always)]
    fn step<S: Simd>(&self, simd: S, t: usize, spots: &[f32], before: &[f32], after: &mut [f32], acts: &mut [f32]) {
        self.inputs(simd, t, spots, before, acts);
        let (p, b) = (self.p, width::<S>());
        let (layers, vectors, activation) = (p.layers as usize, b / S::F32_LANES, Activation::of_word(p.activation));
        for l in 0..layers {
            if p.lstm > 0 {
                self.lstm(simd, l, before, after, acts);
                continue;
            }
            let product = &self.products[l];
            self.dense(simd, product, acts);
            let bias = &self.weights[product.bias.unwrap_or(0)..][..product.d_rows];
            for (j, &bias) in bias.iter().enumerate() {
                for v in 0..vectors {
                    let z = simd.add_f32s(get::<S>(acts, product.d + j, v), simd.splat_f32s(bias));
                    put::<S>(acts, product.d + j, v, z);
                    put::<S>(acts, p.activations(l) + j, v, activation.apply_lanes(simd, z));
                }
            }
        }
        let Some(head) = self.products.last() else { return };
        self.dense(simd, head, acts);
        for j in 0..head.d_rows {
            let bias = simd.splat_f32s(self.weights[head.bias.unwrap_or(0) + j]);
            for v in 0..vectors {
                put::<S>(acts, head.d + j, v, simd.add_f32s(get::<S>(acts, head.d + j, v), bias));
            }
        }
        for v in 0..vectors {
            put::<S>(after, 0, v, self.decide(simd, v, acts).hold);
        }
        if p.ragged > 0 {
            self.freeze(simd, t, spots, before, after);
        }
    }

    /// States of paths that have ended stay as they are.
    #[inline(always)]
    fn freeze<S: Simd>(&self, simd: S, t: usize, spots: &[f32], before: &[f32], after: &mut [f32]) {
        for v in 0..width::<S>() / S::F32_LANES {
            let ended = simd.greater_than_or_equal_f32s(simd.splat_f32s(t as f32), get::<S>(spots, self.p.steps as usize + 1, v));
            for row in 0..self.p.state as usize {
                put::<S>(after, row, v, simd.select_f32s(ended, get::<S>(before, row, v), get::<S>(after, row, v)));
            }
        }
    }

    /// One LSTM layer.
    #[inline(always)]
    fn lstm<S: Simd>(&self, simd: S, l: usize, before: &[f32], after: &mut [f32], acts: &mut [f32]) {
        let (p, b, h) = (self.p, width::<S>(), self.p.width0 as usize);
        let (into, cell, gates) = (&self.products[2 * l..2 * l + 2], p.cell(l), p.gradients(l));
        acts[into[1].x * b..][..h * b].copy_from_slice(&before[(cell - h) * b..cell * b]);
        self.dense(simd, &Product { x_rows: into[0].x_rows + h, ..into[0] }, acts);
        let bias = &self.weights[into[0].bias.unwrap_or(0)..][..4 * h];
        let next = p.layer_input(l + 1);
        for j in 0..h {
            for v in 0..b / S::F32_LANES {
                let z = |gate: usize| simd.add_f32s(get::<S>(acts, gates + gate * h + j, v), simd.splat_f32s(bias[gate * h + j]));
                let (zi, zf, zg, zo) = (z(0), z(1), z(2), z(3));
                let (i, f) = (sigmoid(simd, zi), sigmoid(simd, zf));
                let (g, o) = (tanh(simd, zg), sigmoid(simd, zo));
                let c = simd.mul_add_f32s(f, get::<S>(before, cell + j, v), simd.mul_f32s(i, g));
                let y = simd.mul_f32s(o, tanh(simd, c));
                for (gate, value) in [i, f, g, o].into_iter().enumerate() {
                    put::<S>(acts, gates + gate * h + j, v, value);
                }
                put::<S>(after, cell + j, v, c);
                put::<S>(after, cell - h + j, v, y);
                put::<S>(acts, next + j, v, y);
            }
        }
    }

    /// Holding of vector v from the activations of a step.
    #[inline(always)]
    fn decide<S: Simd>(&self, simd: S, v: usize, acts: &[f32]) -> Holding<S::f32s> {
        let (p, zero, one) = (self.p, simd.splat_f32s(0.0), simd.splat_f32s(1.0));
        let out = p.gradients(p.layers as usize);
        let (base, previous, range) = (get::<S>(acts, 2, v), get::<S>(acts, 3, v), simd.splat_f32s(p.range));
        let first = get::<S>(acts, out, v);
        if p.head == 0 {
            let bounded = tanh(simd, first);
            let slope = simd.mul_f32s(range, simd.sub_f32s(one, simd.mul_f32s(bounded, bounded)));
            return Holding { hold: simd.mul_add_f32s(range, bounded, base), by_previous: zero, by_output: [slope, zero] };
        }
        let (below, by_below) = self.band(simd, v, first, acts);
        let (above, by_above) = self.band(simd, v, get::<S>(acts, out + 1, v), acts);
        let (low, high, half) = (simd.sub_f32s(base, below), simd.add_f32s(base, above), simd.splat_f32s(0.5));
        let (by_low, by_high) = (simd.neg_f32s(by_below), by_above);
        let crossed = simd.greater_than_f32s(low, high);
        let at_low = simd.less_than_or_equal_f32s(previous, low);
        let at_high = simd.greater_than_or_equal_f32s(previous, high);
        let pick = |both: S::f32s, low: S::f32s, high: S::f32s, inside: S::f32s| {
            simd.select_f32s(crossed, both, simd.select_f32s(at_low, low, simd.select_f32s(at_high, high, inside)))
        };
        Holding {
            hold: pick(simd.mul_f32s(half, simd.add_f32s(low, high)), low, high, previous),
            by_previous: pick(zero, zero, zero, one),
            by_output: [pick(simd.mul_f32s(half, by_low), by_low, zero, zero), pick(simd.mul_f32s(half, by_high), zero, by_high, zero)],
        }
    }

    /// Width of a band and its slope by the output.
    #[inline(always)]
    fn band<S: Simd>(&self, simd: S, v: usize, o: S::f32s, acts: &[f32]) -> (S::f32s, S::f32s) {
        let (p, one) = (self.p, simd.splat_f32s(1.0));
        if p.head == 1 {
            let slope = simd.select_f32s(simd.less_than_f32s(o, simd.splat_f32s(0.0)), simd.splat_f32s(LEAK as f32), one);
            return (simd.mul_f32s(slope, o), slope);
        }
        let (range, bounded) = (simd.splat_f32s(p.range), tanh(simd, o));
        let width = simd.mul_f32s(get::<S>(acts, p.step_rows as usize, v), lanes::exp(simd, simd.mul_f32s(range, bounded)));
        let slope = simd.mul_f32s(range, simd.sub_f32s(one, simd.mul_f32s(bounded, bounded)));
        (width, simd.mul_f32s(width, slope))
    }

    #[inline(always)]
    fn unit_cost<S: Simd>(&self, simd: S, spot: S::f32s) -> S::f32s {
        simd.mul_add_f32s(spot, simd.splat_f32s(self.risk[0]), simd.splat_f32s(self.risk[1]))
    }

    #[inline(always)]
    fn charge<S: Simd>(&self, simd: S, trade: S::f32s, spot: S::f32s) -> S::f32s {
        let paid = simd.mul_add_f32s(simd.abs_f32s(trade), self.unit_cost(simd, spot), simd.splat_f32s(self.risk[2]));
        simd.select_f32s(simd.equal_f32s(trade, simd.splat_f32s(0.0)), simd.splat_f32s(0.0), paid)
    }

    /// Adds a step to pnl, cost and turnover [3,B].
    #[inline(always)]
    fn earn<S: Simd>(&self, simd: S, t: usize, spots: &[f32], before: &[f32], after: &[f32], totals: &mut [f32]) {
        let flat = self.flat(t);
        for v in 0..width::<S>() / S::F32_LANES {
            let at = self.at(simd, t, spots, v, flat);
            let (spot, hold) = (get::<S>(spots, t, v), get::<S>(after, 0, v));
            let trade = simd.sub_f32s(hold, get::<S>(before, 0, v));
            let paid = self.charge(simd, trade, spot);
            let earned = simd.sub_f32s(simd.mul_f32s(get::<S>(spots, t + 1, v), at.then), simd.mul_f32s(spot, at.now));
            let gain = at.within(simd, t, simd.sub_f32s(simd.mul_f32s(hold, earned), simd.mul_f32s(paid, at.now)));
            put::<S>(totals, 0, v, simd.add_f32s(get::<S>(totals, 0, v), gain));
            put::<S>(totals, 1, v, simd.add_f32s(get::<S>(totals, 1, v), paid));
            put::<S>(totals, 2, v, simd.add_f32s(get::<S>(totals, 2, v), simd.abs_f32s(trade)));
        }
    }

    /// The sale at maturity and the claim.
    #[inline(always)]
    fn settle<S: Simd>(&self, simd: S, spots: &[f32], last: &[f32], claims: &[f32], totals: &mut [f32]) {
        let p = self.p;
        let strike = simd.splat_f32s(p.strike);
        for v in 0..width::<S>() / S::F32_LANES {
            let (spot, hold) = (get::<S>(spots, p.steps as usize, v), get::<S>(last, 0, v));
            let mut pnl = get::<S>(totals, 0, v);
            if p.unwind > 0 {
                let paid = self.charge(simd, hold, spot);
                pnl = simd.sub_f32s(pnl, paid);
                put::<S>(totals, 1, v, simd.add_f32s(get::<S>(totals, 1, v), paid));
                put::<S>(totals, 2, v, simd.add_f32s(get::<S>(totals, 2, v), simd.abs_f32s(hold)));
            }
            let claim = match p.claim {
                2 => get::<S>(claims, 0, v),
                0 => simd.max_f32s(simd.sub_f32s(spot, strike), simd.splat_f32s(0.0)),
                _ => simd.max_f32s(simd.sub_f32s(strike, spot), simd.splat_f32s(0.0)),
            };
            put::<S>(totals, 0, v, simd.sub_f32s(pnl, claim));
        }
    }

    /// Wᵀ·δ into the rows of `out`, by the turned weight.
    #[inline(always)]
    fn pull<S: Simd>(&self, simd: S, (product, turned): (&Product, &[f32]), acts: &[f32], rows: [usize; 2], start: Start<'_>, out: &mut [f32]) {
        let b = width::<S>();
        let right = Packed::again(simd, product.d_rows, b, &acts[product.d * b..][..product.d_rows * b]);
        let left = Left::Rows { data: &turned[product.weight + rows[0] * product.d_rows..], stride: product.d_rows };
        multiply(simd, left, &right, rows[1], start, &mut out[..rows[1] * b], b);
    }

    /// Outputs' gradients become those of all layers; the gradient by the previous holding is left in the first row of `pulled`.
    #[inline(always)]
    fn network_backward<S: Simd>(&self, simd: S, [before, after]: [&[f32]; 2], turned: &[f32], acts: &mut [f32], adjoint: &mut [f32], pulled: &mut [f32]) {
        let (p, b, layers, h) = (self.p, width::<S>(), self.p.layers as usize, self.p.width0 as usize);
        let (vectors, activation) = (b / S::F32_LANES, Activation::of_word(p.activation));
        for l in (0..layers).rev() {
            if p.lstm == 0 {
                let (above, n) = (&self.products[l + 1], p.widths()[l]);
                self.pull(simd, (above, turned), acts, [0, n], Start::Zero, pulled);
                let (y, z) = (p.activations(l), p.gradients(l));
                for i in 0..n {
                    for v in 0..vectors {
                        let saved = get::<S>(acts, if activation.keeps_input() { z } else { y } + i, v);
                        let slope = activation.slope_lanes(simd, saved);
                        put::<S>(acts, z + i, v, simd.mul_f32s(get::<S>(pulled, i, v), slope));
                    }
                }
                continue;
            }
            let (cell, gates) = (p.cell(l), p.gradients(l));
            let above = if l + 1 < layers { &self.products[2 * l + 2] } else { &self.products[2 * layers] };
            self.pull(simd, (above, turned), acts, [0, h], Start::Kept, &mut adjoint[(cell - h) * b..]);
            let one = simd.splat_f32s(1.0);
            let rest = |x: S::f32s, y: S::f32s| simd.mul_f32s(x, simd.mul_f32s(y, simd.sub_f32s(one, y)));
            let square = |x: S::f32s, y: S::f32s| simd.mul_f32s(x, simd.sub_f32s(one, simd.mul_f32s(y, y)));
            for j in 0..h {
                for v in 0..vectors {
                    let grad_h = get::<S>(adjoint, cell - h + j, v);
                    let gate = |k: usize| get::<S>(acts, gates + k * h + j, v);
                    let (i, f, g, o) = (gate(0), gate(1), gate(2), gate(3));
                    let squashed = tanh(simd, get::<S>(after, cell + j, v));
                    let grad_c = simd.add_f32s(get::<S>(adjoint, cell + j, v), square(simd.mul_f32s(grad_h, o), squashed));
                    put::<S>(adjoint, cell + j, v, simd.mul_f32s(grad_c, f));
                    put::<S>(acts, gates + j, v, rest(simd.mul_f32s(grad_c, g), i));
                    put::<S>(acts, gates + h + j, v, rest(simd.mul_f32s(grad_c, get::<S>(before, cell + j, v)), f));
                    put::<S>(acts, gates + 2 * h + j, v, square(simd.mul_f32s(grad_c, i), g));
                    put::<S>(acts, gates + 3 * h + j, v, rest(simd.mul_f32s(grad_h, squashed), o));
                }
            }
            self.pull(simd, (&self.products[2 * l + 1], turned), acts, [0, h], Start::Zero, &mut adjoint[(cell - h) * b..]);
        }
        self.pull(simd, (&self.products[0], turned), acts, [3, 1], Start::Zero, pulled);
    }

    /// Adds a step to the gradient of the weights.
    #[inline(always)]
    fn weights<S: Simd>(&self, simd: S, acts: &[f32], packed: &mut [f32], grad: &mut [f32]) {
        let b = width::<S>();
        for product in self.products {
            let from = Right { data: &acts[product.x * b..][..product.x_rows * b], stride: b, along_depth: true };
            let right = Packed::right(simd, from, b, product.x_rows, packed);
            let left = Left::Rows { data: &acts[product.d * b..], stride: b };
            let out = &mut grad[product.weight..][..product.d_rows * product.x_rows];
            multiply(simd, left, &right, product.d_rows, Start::Kept, out, product.x_rows);
            let Some(bias) = product.bias else { continue };
            for j in 0..product.d_rows {
                let sum = (1..b / S::F32_LANES).fold(get::<S>(acts, product.d + j, 0), |sum, v| simd.add_f32s(sum, get::<S>(acts, product.d + j, v)));
                grad[bias + j] += simd.reduce_sum_f32s(sum);
            }
        }
    }

    /// One step backwards: gradients by pnl, cost and turnover are in `seeds` [3,B].
    #[inline(always)]
    fn step_backward<S: Simd>(
        &self,
        simd: S,
        t: usize,
        [spots, seeds, before, after, next]: [&[f32]; 5],
        turned: &[f32],
        acts: &mut [f32],
        [adjoint, pulled]: [&mut [f32]; 2],
    ) {
        let (p, b) = (self.p, width::<S>());
        let (flat, behind) = (self.flat(t), simd.splat_f32s((t + 1) as f32));
        let out = p.gradients(p.layers as usize);
        let mut by_previous = [simd.splat_f32s(0.0); 8];
        for (v, by_previous) in by_previous.iter_mut().enumerate().take(b / S::F32_LANES) {
            let at = self.at(simd, t, spots, v, flat);
            let (by_pnl, by_cost, by_turnover) = (get::<S>(seeds, 0, v), get::<S>(seeds, 1, v), get::<S>(seeds, 2, v));
            let (spot, later) = (get::<S>(spots, t, v), get::<S>(spots, t + 1, v));
            let per_unit = |spot: S::f32s, growth: S::f32s| {
                let value = simd.sub_f32s(simd.mul_f32s(by_pnl, growth), by_cost);
                simd.sub_f32s(simd.mul_f32s(self.unit_cost(simd, spot), value), by_turnover)
            };
            let (previous, held) = (get::<S>(before, 0, v), get::<S>(after, 0, v));
            let mut next_trade = if next.is_empty() { simd.splat_f32s(0.0) } else { simd.sub_f32s(get::<S>(next, 0, v), held) };
            if p.ragged > 0 && p.unwind > 0 {
                next_trade = simd.select_f32s(simd.equal_f32s(behind, at.length), simd.neg_f32s(held), at.within(simd, t + 1, next_trade));
            }
            let earned = simd.mul_f32s(by_pnl, simd.sub_f32s(simd.mul_f32s(later, at.then), simd.mul_f32s(spot, at.now)));
            let earned = at.within(simd, t, earned);
            let entry = simd.mul_f32s(sign(simd, simd.sub_f32s(held, previous)), per_unit(spot, at.now));
            let exit = simd.mul_f32s(sign(simd, next_trade), per_unit(later, at.then));
            let by_hold = simd.add_f32s(get::<S>(adjoint, 0, v), simd.add_f32s(earned, simd.sub_f32s(exit, entry)));
            let decision = self.decide(simd, v, acts);
            for (k, &slope) in decision.by_output.iter().enumerate().take(p.outputs()) {
                put::<S>(acts, out + k, v, simd.mul_f32s(by_hold, slope));
            }
            *by_previous = simd.mul_f32s(by_hold, decision.by_previous);
        }
        self.network_backward(simd, [before, after], turned, acts, adjoint, pulled);
        for (v, &by_previous) in by_previous.iter().enumerate().take(b / S::F32_LANES) {
            put::<S>(adjoint, 0, v, simd.add_f32s(by_previous, get::<S>(pulled, 0, v)));
        }
        if t.is_multiple_of(p.lookback as usize) {
            adjoint[b..].fill(0.0);
        }
    }
}

/// Cuts `sizes` reals off memory.
fn cut<const N: usize>(mut memory: &mut [f32], sizes: [usize; N]) -> [&mut [f32]; N] {
    sizes.map(|n| {
        let (part, rest) = std::mem::take(&mut memory).split_at_mut(n);
        memory = rest;
        part
    })
}

// ---- forward ----------------------------------------------------------------------------------------------------------------

struct Forward<'a> {
    batch: &'a Batch<'a, f32>,
    products: &'a [Product],
    claim: &'a [f32],
    model: usize,
    first: usize,
    pnl: &'a mut [f32],
    costs: &'a mut [f32],
    /// Holdings [paths,T+1], where they are kept.
    holds: &'a mut [f32],
}

fn weights_of<'a>(batch: &Batch<'a, f32>, model: usize) -> &'a [f32] {
    &batch.weights[model * batch.p.weights as usize..][..batch.p.weights as usize]
}

/// Weights with the two matrices of an LSTM layer side by side.
fn join(p: &HedgeRolloutParams, products: &[Product], weights: &[f32], joined: &mut [f32]) {
    joined[..weights.len()].copy_from_slice(weights);
    for pair in products.chunks_exact(2).take(if p.lstm > 0 { p.layers as usize } else { 0 }) {
        let [x, h] = pair else { return };
        let rows = joined[x.weight..].chunks_exact_mut(x.x_rows + h.x_rows).take(x.d_rows);
        for (j, row) in rows.enumerate() {
            let (left, right) = row.split_at_mut(x.x_rows);
            left.copy_from_slice(&weights[x.weight + j * x.x_rows..][..x.x_rows]);
            right.copy_from_slice(&weights[h.weight + j * h.x_rows..][..h.x_rows]);
        }
    }
}

fn tile<'a>(batch: &Batch<'a, f32>, (products, joined): (&'a [Product], &'a [f32]), model: usize, first: usize, count: usize) -> Tile<'a> {
    let weights = weights_of(batch, model);
    Tile { p: batch.p, products, weights, joined, risk: &batch.risk[4 * model..4 * model + 4], spot: batch.spot, extra: batch.extra, first, count }
}

impl WithSimd for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (p, b) = (self.batch.p, width::<S>());
        let (state, rows, steps) = (p.state as usize * b, (p.step_rows as usize + 1) * b, p.steps as usize);
        let sizes = [(steps + 2) * b, state, state, rows, 3 * b, b, p.weights as usize];
        let mut memory = lanes::take_memory(sizes.iter().sum());
        let [spots, mut before, mut after, acts, totals, claims, joined] = cut(memory.reals(), sizes);
        acts.fill(0.0);
        join(p, self.products, weights_of(self.batch, self.model), joined);
        let joined: &[f32] = joined;
        for at in (0..self.pnl.len()).step_by(b) {
            let count = (self.pnl.len() - at).min(b);
            let tile = tile(self.batch, (self.products, joined), self.model, self.first + at, count);
            tile.spots::<S>(spots);
            if p.claim == 2 {
                for (lane, claim) in claims.iter_mut().enumerate() {
                    *claim = self.claim[tile.path(lane)];
                }
            }
            before.fill(0.0);
            totals.fill(0.0);
            totals[..b].fill(p.premium);
            for v in 0..b / S::F32_LANES {
                let grown = tile.at(simd, 0, spots, v, tile.flat(0)).now;
                put::<S>(totals, 0, v, simd.mul_f32s(get::<S>(totals, 0, v), grown));
            }
            for t in 0..steps {
                tile.step(simd, t, spots, before, after, acts);
                tile.earn(simd, t, spots, before, after, totals);
                for (row, &hold) in self.holds.chunks_exact_mut(steps + 1).skip(at).zip(&after[..count]) {
                    row[t + 1] = hold;
                }
                std::mem::swap(&mut before, &mut after);
            }
            tile.settle(simd, spots, before, claims, totals);
            for lane in 0..count {
                self.pnl[at + lane] = totals[lane];
                self.costs[2 * (at + lane)] = totals[b + lane];
                self.costs[2 * (at + lane) + 1] = totals[2 * b + lane];
            }
        }
    }
}

pub(crate) fn forward(mut launch: CpuLaunch<'_, f32>) -> Result<()> {
    let p: HedgeRolloutParams = launch.params()?;
    let batch = Batch { p: &p, weights: launch.real()?, risk: launch.real()?, spot: launch.real()?, extra: launch.real()? };
    let (claim, scratch, pnl, costs) = (launch.real()?, launch.real_mut()?, launch.real_mut()?, launch.real_mut()?);
    let (n, products, arch, prices) = (p.paths as usize, p.products(), Arch::new(), p.steps as usize + 1);
    let mut kept = vec![0f32; if p.rows > 0 { p.models as usize * n * prices } else { 0 }];
    let per_model = if p.rows > 0 { n * prices } else { 0 };
    pnl.par_chunks_exact_mut(n)
        .zip(costs.par_chunks_exact_mut(2 * n))
        .take(p.models as usize)
        .enumerate()
        .zip(parts(&mut kept, per_model, p.models as usize))
        .for_each(|((model, (pnl, costs)), holds)| {
            let each = if p.rows > 0 { CPU_BLOCK * prices } else { 0 };
            let blocks = n.div_ceil(CPU_BLOCK);
            let tasks = pnl.par_chunks_mut(CPU_BLOCK).zip(costs.par_chunks_mut(2 * CPU_BLOCK)).zip(parts(holds, each, blocks)).enumerate();
            tasks.for_each(|(block, ((pnl, costs), holds))| {
                arch.dispatch(Forward { batch: &batch, products: &products, claim, model, first: block * CPU_BLOCK, pnl, costs, holds });
            });
        });
    for (row, holds) in kept.chunks_exact(prices).enumerate() {
        for (slot, &hold) in holds.iter().enumerate() {
            scratch[(row / n * p.rows as usize + slot * p.state as usize) * p.stride as usize + row % n] = hold;
        }
    }
    Ok(())
}

/// `count` parts of `each` values, or as many empty ones.
fn parts(x: &mut [f32], each: usize, count: usize) -> Vec<&mut [f32]> {
    if each == 0 { (0..count).map(|_| &mut [] as &mut [f32]).collect() } else { x.chunks_mut(each).collect() }
}

// ---- backward ---------------------------------------------------------------------------------------------------------------

struct Backward<'a> {
    batch: &'a Batch<'a, f32>,
    products: &'a [Product],
    grad_pnl: &'a [f32],
    grad_costs: &'a [f32],
    model: usize,
    slot: usize,
    grad: &'a mut [f32],
}

/// Memory of a task.
struct Rows<'a> {
    spots: &'a mut [f32],
    /// State at the start of each segment.
    starts: &'a mut [f32],
    /// States of a segment and the one behind it, then the holding after that.
    states: &'a mut [f32],
    acts: &'a mut [f32],
    adjoint: &'a mut [f32],
    seeds: &'a mut [f32],
    pulled: &'a mut [f32],
    packed: &'a mut [f32],
    turned: &'a mut [f32],
    next: &'a mut [f32],
}

impl WithSimd for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (p, b) = (self.batch.p, width::<S>());
        let (state, rows, steps) = (p.state as usize * b, (p.step_rows as usize + 1) * b, p.steps as usize);
        let segment = SEGMENT.min(steps);
        let widest = self.products.iter().map(|q| packed_len::<S>(b, q.x_rows)).max().unwrap_or(0);
        let sizes = [
            (steps + 2) * b,
            steps.div_ceil(segment) * state,
            (segment + 1) * state,
            segment * rows,
            state,
            3 * b,
            64 * b,
            widest.next_multiple_of(lanes::WIDEST),
            p.weights.next_multiple_of(lanes::WIDEST as u32) as usize,
            b,
            p.weights as usize,
        ];
        let mut memory = lanes::take_memory(sizes.iter().sum());
        let [spots, starts, states, acts, adjoint, seeds, pulled, packed, turned, next, joined] = cut(memory.reals(), sizes);
        acts.fill(0.0);
        let mut rows = Rows { spots, starts, states, acts, adjoint, seeds, pulled, packed, turned, next };
        let weights = weights_of(self.batch, self.model);
        join(p, self.products, weights, joined);
        let joined: &[f32] = joined;
        for product in self.products {
            for j in 0..product.d_rows {
                for i in 0..product.x_rows {
                    rows.turned[product.weight + i * product.d_rows + j] = weights[product.weight + j * product.x_rows + i];
                }
            }
        }
        let n = p.paths as usize;
        for first in p.blocks(self.slot).flat_map(|block| (block * CPU_BLOCK..((block + 1) * CPU_BLOCK).min(n)).step_by(b)) {
            let count = (n - first).min(b).min(CPU_BLOCK - first % CPU_BLOCK);
            let tile = tile(self.batch, (self.products, joined), self.model, first, count);
            rows.seeds.fill(0.0);
            for lane in 0..count {
                let at = self.model * n + first + lane;
                rows.seeds[lane] = self.grad_pnl[at];
                rows.seeds[b + lane] = self.grad_costs[2 * at];
                rows.seeds[2 * b + lane] = self.grad_costs[2 * at + 1];
            }
            tile_backward(simd, &tile, &mut rows, segment, self.grad);
        }
    }
}

/// Adds the gradient of one tile.
#[inline(always)]
fn tile_backward<S: Simd>(simd: S, tile: &Tile<'_>, rows: &mut Rows<'_>, segment: usize, grad: &mut [f32]) {
    let (p, b) = (tile.p, width::<S>());
    let (state, each, steps) = (p.state as usize * b, (p.step_rows as usize + 1) * b, p.steps as usize);
    tile.spots::<S>(rows.spots);
    rows.states[..state].fill(0.0);
    for t in 0..steps {
        if t % segment == 0 {
            rows.starts[t / segment * state..][..state].copy_from_slice(&rows.states[..state]);
        }
        // The last segment goes backwards right away: its steps are kept as they come.
        let at = if t >= (steps - 1) / segment * segment { t % segment } else { 0 };
        let (before, after) = rows.states[at * state..].split_at_mut(state);
        tile.step(simd, t, rows.spots, before, &mut after[..state], &mut rows.acts[at * each..][..each]);
        if t < (steps - 1) / segment * segment {
            before.copy_from_slice(&after[..state]);
        }
    }
    rows.adjoint.fill(0.0);
    for part in (0..steps.div_ceil(segment)).rev() {
        let (from, to) = (part * segment, ((part + 1) * segment).min(steps));
        if to < steps {
            rows.states[..state].copy_from_slice(&rows.starts[part * state..][..state]);
            for t in from..to {
                let (before, after) = rows.states[(t - from) * state..].split_at_mut(state);
                tile.step(simd, t, rows.spots, before, &mut after[..state], &mut rows.acts[(t - from) * each..][..each]);
            }
        }
        for t in (from..to).rev() {
            let (before, after) = rows.states[(t - from) * state..].split_at(state);
            let acts = &mut rows.acts[(t - from) * each..][..each];
            // The holding one step on: that of the next state, or of the segment behind, or none.
            let next: &[f32] = if t + 1 == steps && p.unwind == 0 {
                &[]
            } else if t + 1 == steps {
                rows.next.fill(0.0);
                rows.next
            } else if t + 1 < to {
                &after[state..]
            } else {
                rows.next
            };
            tile.step_backward(simd, t, [rows.spots, rows.seeds, before, &after[..state], next], rows.turned, acts, [rows.adjoint, rows.pulled]);
            tile.weights(simd, acts, rows.packed, grad);
        }
        // What the segment before this one trades towards: its first holding.
        rows.next.copy_from_slice(&rows.states[state..][..b]);
    }
}

pub(crate) fn backward(mut launch: CpuLaunch<'_, f32>) -> Result<()> {
    let p: HedgeRolloutParams = launch.params()?;
    let batch = Batch { p: &p, weights: launch.real()?, risk: launch.real()?, spot: launch.real()?, extra: launch.real()? };
    let (grad_pnl, grad_costs, partials) = (launch.real()?, launch.real()?, launch.real_mut()?);
    let (products, arch, slots) = (p.products(), Arch::new(), p.partials as usize);
    partials.par_chunks_exact_mut(p.weights as usize).enumerate().take(p.models as usize * slots).for_each(|(at, grad)| {
        arch.dispatch(Backward { batch: &batch, products: &products, grad_pnl, grad_costs, model: at / slots, slot: at % slots, grad });
    });
    Ok(())
}
