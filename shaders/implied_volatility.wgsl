// Implied volatility of calls and puts. Maths, shapes and source: kernels/implied_volatility.rs.
//   grid  ceil(N / WG)      workgroup WG      thread = quote
//   reads quotes [N,6], kind [N]      writes volatility, status [N]

struct ImpliedVolatilityParams {
    rows: u32,
}

@group(0) @binding(0) var<uniform> params: ImpliedVolatilityParams;
@group(0) @binding(1) var<storage, read> quotes: array<f32>;
@group(0) @binding(2) var<storage, read> kind: array<u32>;
@group(0) @binding(3) var<storage, read_write> volatility: array<f32>;
@group(0) @binding(4) var<storage, read_write> status: array<u32>;

override WG: u32 = 64u;

const OK: u32 = 0u;
const BELOW_INTRINSIC: u32 = 1u;
const ABOVE_BOUND: u32 = 2u;
const EXPIRED: u32 = 3u;
const NOT_FINITE: u32 = 4u;
const AT_INTRINSIC: u32 = 5u;

const ROUNDS: u32 = 8u;
const DENSITY: f32 = 0.39894228;
const ROOT_HALF: f32 = 0.70710678;
const EPSILON: f32 = 1.1920929e-7;
const SMALLEST: f32 = 1.17549435e-38;

fn is_finite(x: f32) -> bool {
    return (bitcast<u32>(x) & 0x7f800000u) != 0x7f800000u;
}

// (Y(t − h) − Y(−t − h)) / √(2π) with Y = Φ/φ: the time value over its bell. By a series in t where the difference cancels; else h ≥ t.
fn time_value(h: f32, t: f32) -> f32 {
    if t < 0.25 {
        let y = 1.2533141 * erfcx_f32(h * ROOT_HALF);
        let y1 = 1.0 - h * y;
        let y2 = y - h * y1;
        let y3 = 2.0 * y1 - h * y2;
        let y4 = 3.0 * y2 - h * y3;
        let y5 = 4.0 * y3 - h * y4;
        let q = t * t;
        return 2.0 * DENSITY * t * (y1 + q * (0.16666667 * y3 + q * 0.008333334 * y5));
    }
    return 0.5 * (erfcx_f32((h - t) * ROOT_HALF) - erfcx_f32((h + t) * ROOT_HALF));
}

// What is missing to the upper bound, over the bell; h ≤ t.
fn room(h: f32, t: f32) -> f32 {
    return 0.5 * (erfcx_f32((t - h) * ROOT_HALF) + erfcx_f32((t + h) * ROOT_HALF));
}

// σ√T of an out-of-the-money option: x = |ln F/X|, its price and the room above it over √(FX).
fn total_volatility(x: f32, beta: f32, missing: f32, log_beta: f32) -> f32 {
    let centre = sqrt(2.0 * x);
    let bound = exp_f32(-0.5 * x);
    let at_centre = 0.5 * bound * (1.0 - erfcx_f32(centre * ROOT_HALF));
    var s = max(centre, 1e-5);
    if beta < at_centre {
        // ln price is all but linear in 1/s².
        for (var round = 0u; round < ROUNDS; round++) {
            let h = x / s;
            let t = 0.5 * s;
            let d = max(time_value(h, t), SMALLEST);
            let g = log_f32(d) - 0.5 * (h * h + t * t) - log_beta;
            s = inverseSqrt(max(1.0 / (s * s) + g * d / (0.5 * DENSITY * s * s * s), 1e-12));
        }
        return s;
    }
    if beta <= missing {
        // The price is all but linear in s.
        for (var round = 0u; round < ROUNDS; round++) {
            let h = x / s;
            let t = 0.5 * s;
            let e = exp_f32(-0.5 * (h * h + t * t));
            let price = select(bound - e * room(h, t), e * time_value(h, t), t < 0.25);
            s = clamp(s - (price - beta) / (e * DENSITY), 1e-9, 100.0);
        }
        return s;
    }
    // ln of the room is all but linear in s².
    s = max(centre, 1.0);
    let target_log = log_f32(missing);
    for (var round = 0u; round < ROUNDS; round++) {
        let h = x / s;
        let t = 0.5 * s;
        let q = room(h, t);
        let g = log_f32(q) - 0.5 * (h * h + t * t) - target_log;
        s = sqrt(max(s * s + g * q * s / (0.5 * DENSITY), 1e-12));
    }
    return s;
}

@compute @workgroup_size(WG)
fn implied_volatility(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let row = group_index(wid, nwg) * WG + tid;
    if row >= params.rows {
        return;
    }
    let at = 6u * row;
    let s = quotes[at];
    let k = quotes[at + 1u];
    let t = quotes[at + 2u];
    let price = quotes[at + 3u];
    let r = quotes[at + 4u];
    let q = quotes[at + 5u];
    volatility[row] = 0.0;
    let finite = is_finite(s) && is_finite(k) && is_finite(t) && is_finite(price) && is_finite(r) && is_finite(q);
    if !finite || s < SMALLEST || k < SMALLEST {
        status[row] = NOT_FINITE;
        return;
    }
    if t <= 0.0 {
        status[row] = EXPIRED;
        return;
    }
    let growth = exp_minus_one(-q * t);
    let discount = exp_minus_one(-r * t);
    let forward = s + s * growth;
    let strike = k + k * discount;
    let call = (kind[row] & 1u) == 1u;
    let over = select(-1.0, 1.0, call) * ((s - k) + (s * growth - k * discount));
    let value = price - max(over, 0.0);
    let missing = select(strike, forward, call) - price;
    let slack = EPSILON * max(s, k);
    if price < 0.0 || value < -slack {
        status[row] = BELOW_INTRINSIC;
        return;
    }
    if missing < EPSILON * price {
        status[row] = ABOVE_BOUND;
        return;
    }
    if value < SMALLEST || (over > 0.0 && value <= slack) {
        status[row] = AT_INTRINSIC;
        return;
    }
    let scale = sqrt(forward) * sqrt(strike);
    let x = abs(log_ratio(s, k) + (r - q) * t);
    volatility[row] = total_volatility(x, value / scale, missing / scale, log_f32(value) - log_f32(scale)) / sqrt(t);
    status[row] = OK;
}
