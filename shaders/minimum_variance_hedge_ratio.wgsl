// Minimum-variance hedge ratios. Maths, shapes and source: kernels/minimum_variance_hedge_ratio.rs.
//   hedge_covariances  grid B·(K+1)·E            workgroup WG      group = one entry of one covariance, threads over time
//   hedge_mixture      grid ceil(B·E / WG)       workgroup WG      thread = one entry of the mixture's covariance
//   hedge_solve        grid ceil(B·(K+1) / WG)   workgroup WG      thread = one system; the last of a series is the mixture
//   reads spot [B,T,n], futures [B,T,m], probs [B,T,K], lengths [B]
//   writes moments: K regimes, all steps; mixture; then per_regime, ratio, effectiveness, flags

struct HedgeRatioParams {
    batch: u32,
    steps: u32,
    regimes: u32,
    spots: u32,
    futures_count: u32,
    spot_stride: u32,
    futures_stride: u32,
    probs_stride: u32,
    average: u32,
    ridge: f32,
}

@group(0) @binding(0) var<uniform> params: HedgeRatioParams;
@group(0) @binding(1) var<storage, read> spot: array<f32>;
@group(0) @binding(2) var<storage, read> futures: array<f32>;
@group(0) @binding(3) var<storage, read> probs: array<f32>;
@group(0) @binding(4) var<storage, read> lengths: array<u32>;
@group(0) @binding(5) var<storage, read_write> moments: array<f32>;

@group(0) @binding(1) var<storage, read> moments_in: array<f32>;
@group(0) @binding(2) var<storage, read> probs_in: array<f32>;
@group(0) @binding(3) var<storage, read> lengths_in: array<u32>;
@group(0) @binding(4) var<storage, read_write> mixture: array<f32>;

@group(0) @binding(4) var<storage, read> mixture_in: array<f32>;
@group(0) @binding(5) var<storage, read_write> per_regime: array<f32>;
@group(0) @binding(6) var<storage, read_write> ratio: array<f32>;
@group(0) @binding(7) var<storage, read_write> effectiveness: array<f32>;
@group(0) @binding(8) var<storage, read_write> flags: array<u32>;

override WG: u32 = 64u;

const MOST: u32 = 8u;
const NO_WEIGHT: f32 = 1e-6;
const FLAT: f32 = 1e-12;
const DEPENDENT: f32 = 1e-6;
const FLAT_FUTURES: u32 = 1u;
const POOLED: u32 = 2u;
const COLLINEAR: u32 = 4u;

var<workgroup> sh_sum: array<vec3<f32>, 64>;

fn block_sum(tid: u32, x: vec3<f32>) -> vec3<f32> {
    sh_sum[tid] = x;
    workgroupBarrier();
    for (var half = WG / 2u; half > 0u; half /= 2u) {
        if tid < half {
            sh_sum[tid] += sh_sum[tid + half];
        }
        workgroupBarrier();
    }
    let sum = sh_sum[0];
    workgroupBarrier();
    return sum;
}

// Entries of a covariance: futures by futures, futures by spots, variances of the spots.
fn entries() -> u32 {
    return params.futures_count * (params.futures_count + params.spots) + params.spots;
}

// Reals of a regime: its covariance, the means of futures and spots, its weight.
fn record() -> u32 {
    return entries() + params.futures_count + params.spots + 1u;
}

// Value at (b, t) of column c: the futures, then the spots.
fn value(b: u32, t: u32, c: u32) -> f32 {
    if c < params.futures_count {
        return futures[b * params.futures_stride + t * params.futures_count + c];
    }
    return spot[b * params.spot_stride + t * params.spots + c - params.futures_count];
}

// Columns of entry e.
fn columns(e: u32) -> vec2<u32> {
    let m = params.futures_count;
    if e < m * m {
        return vec2<u32>(e / m, e % m);
    }
    let cross = e - m * m;
    if cross < m * params.spots {
        return vec2<u32>(cross / params.spots, m + cross % params.spots);
    }
    let own = m + cross - m * params.spots;
    return vec2<u32>(own, own);
}

@compute @workgroup_size(WG)
fn hedge_covariances(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let count = entries();
    let kinds = params.regimes + 1u;
    let whole = params.batch * kinds * count;
    let index = min(group_index(wid, nwg), whole - 1u);
    let is_real = group_index(wid, nwg) < whole;
    let e = index % count;
    let k = (index / count) % kinds;
    let b = index / (count * kinds);
    let pair = columns(e);
    let steps = min(lengths[b], params.steps);
    let pooled = k == params.regimes;
    var sum = vec3<f32>(0.0);
    for (var t = tid; t < steps; t += WG) {
        var p = 1.0;
        if !pooled {
            p = probs[b * params.probs_stride + t * params.regimes + k];
        }
        sum += p * vec3<f32>(1.0, value(b, t, pair.x), value(b, t, pair.y));
    }
    let total = block_sum(tid, sum);
    let weight = total.x;
    let mean = total.yz / max(weight, 1e-30);
    var square = 0.0;
    for (var t = tid; t < steps; t += WG) {
        var p = 1.0;
        if !pooled {
            p = probs[b * params.probs_stride + t * params.regimes + k];
        }
        square += p * (value(b, t, pair.x) - mean.x) * (value(b, t, pair.y) - mean.y);
    }
    let spread = block_sum(tid, vec3<f32>(square, 0.0, 0.0)).x;
    if tid > 0u || !is_real {
        return;
    }
    let at = (b * kinds + k) * record();
    moments[at + e] = spread / max(weight, 1e-30);
    if pair.x == pair.y {
        moments[at + count + pair.x] = mean.x;
    }
    if e == 0u {
        moments[at + record() - 1u] = weight;
    }
}

// Where the moments of regime k of series b lie: its own, or those of all times where it has no weight.
fn record_of(b: u32, k: u32) -> u32 {
    let kinds = params.regimes + 1u;
    let own = (b * kinds + k) * record();
    return select(own, (b * kinds + params.regimes) * record(), moments_in[own + record() - 1u] <= NO_WEIGHT);
}

fn probability(b: u32, k: u32) -> f32 {
    let last = max(min(lengths_in[b], params.steps), 1u) - 1u;
    return probs_in[b * params.probs_stride + last * params.regimes + k];
}

var<private> left: array<f32, 64>;
var<private> right: array<f32, 8>;

// Cholesky of `left` in place; the flags of what it had to leave out.
fn factor(m: u32) -> u32 {
    var found = 0u;
    var trace = 0.0;
    for (var i = 0u; i < m; i++) {
        trace += left[i * MOST + i];
    }
    for (var i = 0u; i < m; i++) {
        let own = left[i * MOST + i];
        var pivot = own + select(0.0, params.ridge * trace, m > 1u);
        for (var j = 0u; j < i; j++) {
            pivot -= left[i * MOST + j] * left[i * MOST + j];
        }
        let none = own <= 1e-30;
        let bad = none || pivot <= DEPENDENT * own;
        found |= select(0u, select(COLLINEAR, FLAT_FUTURES, none), bad);
        let inverse = select(1.0 / sqrt(max(pivot, 1e-37)), 0.0, bad);
        left[i * MOST + i] = inverse;
        for (var r = i + 1u; r < m; r++) {
            var x = left[r * MOST + i];
            for (var j = 0u; j < i; j++) {
                x -= left[r * MOST + j] * left[i * MOST + j];
            }
            left[r * MOST + i] = x * inverse;
        }
    }
    return found;
}

// The ratios, in `right`, of the right side that is there.
fn back_substitute(m: u32) {
    for (var i = 0u; i < m; i++) {
        var x = right[i];
        for (var j = 0u; j < i; j++) {
            x -= left[i * MOST + j] * right[j];
        }
        right[i] = x * left[i * MOST + i];
    }
    for (var down = 0u; down < m; down++) {
        let i = m - 1u - down;
        var x = right[i];
        for (var j = i + 1u; j < m; j++) {
            x -= left[j * MOST + i] * right[j];
        }
        right[i] = x * left[i * MOST + i];
    }
}

// 1 over the sum of the last step's probabilities.
fn normaliser(b: u32) -> f32 {
    var weight = 0.0;
    for (var k = 0u; k < params.regimes; k++) {
        weight += probability(b, k);
    }
    return 1.0 / max(weight, 1e-30);
}

@compute @workgroup_size(WG)
fn hedge_mixture(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let index = group_index(wid, nwg) * WG + tid;
    let count = entries();
    if index >= params.batch * count {
        return;
    }
    let b = index / count;
    let e = index % count;
    let pair = columns(e);
    let norm = normaliser(b);
    var mean = vec2<f32>(0.0);
    for (var k = 0u; k < params.regimes; k++) {
        let at = record_of(b, k) + count;
        mean += probability(b, k) * norm * vec2<f32>(moments_in[at + pair.x], moments_in[at + pair.y]);
    }
    var sum = 0.0;
    for (var k = 0u; k < params.regimes; k++) {
        let at = record_of(b, k);
        let away = vec2<f32>(moments_in[at + count + pair.x], moments_in[at + count + pair.y]) - mean;
        sum += probability(b, k) * norm * (moments_in[at + e] + away.x * away.y);
    }
    let to = b * record();
    mixture[to + e] = sum;
    if pair.x == pair.y {
        mixture[to + count + pair.x] = mean.x;
    }
    if e == 0u {
        mixture[to + record() - 1u] = 1.0;
    }
}

@compute @workgroup_size(WG)
fn hedge_solve(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let index = group_index(wid, nwg) * WG + tid;
    let kinds = params.regimes + 1u;
    if index >= params.batch * kinds {
        return;
    }
    let b = index / kinds;
    let k = index % kinds;
    let m = params.futures_count;
    let n = params.spots;
    let whole = k == params.regimes;
    let averaged = whole && params.average == 1u;
    // A regime, the mixture, or all regimes to average.
    let first = select(k, 0u, averaged);
    let last = select(k + 1u, params.regimes, averaged);
    let norm = normaliser(b);
    let to = select((b * params.regimes + k) * m * n, b * m * n, whole);
    var found = 0u;
    for (var r = first; r < last; r++) {
        let from_mixture = whole && !averaged;
        let at = select(record_of(b, min(r, params.regimes - 1u)), b * record(), from_mixture);
        for (var i = 0u; i < m; i++) {
            let mean = select_moment(from_mixture, at + entries() + i);
            for (var j = 0u; j < m; j++) {
                let x = select_moment(from_mixture, at + i * m + j);
                // A variance that is rounding of its mean is none.
                left[i * MOST + j] = select(x, 0.0, i == j && x <= FLAT * mean * mean);
            }
        }
        found |= factor(m);
        if !whole {
            found |= select(0u, POOLED, at != (b * kinds + k) * record());
        }
        let share = select(1.0, probability(b, min(r, params.regimes - 1u)) * norm, averaged);
        for (var s = 0u; s < n; s++) {
            for (var i = 0u; i < m; i++) {
                right[i] = select_moment(from_mixture, at + m * m + i * n + s);
            }
            back_substitute(m);
            for (var i = 0u; i < m; i++) {
                let cell = to + i * n + s;
                if !whole {
                    per_regime[cell] = right[i];
                } else if r == first {
                    ratio[cell] = share * right[i];
                } else {
                    ratio[cell] += share * right[i];
                }
            }
        }
    }
    flags[index] = found;
    if !whole {
        return;
    }
    let mixed = b * record();
    for (var s = 0u; s < n; s++) {
        let before = mixture_in[mixed + m * (m + n) + s];
        var gain = 0.0;
        for (var i = 0u; i < m; i++) {
            var other = 2.0 * mixture_in[mixed + m * m + i * n + s];
            for (var j = 0u; j < m; j++) {
                other -= mixture_in[mixed + i * m + j] * ratio[to + j * n + s];
            }
            gain += ratio[to + i * n + s] * other;
        }
        effectiveness[b * n + s] = select(gain / max(before, 1e-37), 0.0, before <= 1e-30);
    }
}

fn select_moment(from_mixture: bool, at: u32) -> f32 {
    if from_mixture {
        return mixture_in[at];
    }
    return moments_in[at];
}
