// Prices of calls and puts under Heston's and Bates' models, and Merton's series. Maths, shapes and source: kernels/heston_price.rs.
//   heston_price   grid N               workgroup WG = 32      thread = node of a panel
//   merton_price   grid ceil(N / WG)    workgroup WG = 32      thread = option
//   reads terms [N,5], kind [N], model [M,8] or [M,4], model_of [N], nodes [2,32]      writes price [N]

struct HestonParams {
    rows: u32,
}

@group(0) @binding(0) var<uniform> params: HestonParams;
@group(0) @binding(1) var<storage, read> terms: array<f32>;
@group(0) @binding(2) var<storage, read> kind: array<u32>;
@group(0) @binding(3) var<storage, read> model: array<f32>;
@group(0) @binding(4) var<storage, read> model_of: array<u32>;
@group(0) @binding(5) var<storage, read> nodes: array<f32>;
@group(0) @binding(6) var<storage, read_write> price: array<f32>;

@group(0) @binding(5) var<storage, read_write> series_price: array<f32>;

override WG: u32 = 32u;

const NODES: u32 = 32u;
const PANELS: f32 = 512.0;
const SMALL: f32 = 1e-8;
const TERMS_MOST: u32 = 512u;

var<workgroup> sh_lane: array<f32, 32>;

// ---- complex numbers ------------------------------------------------------------------------------------------------

fn mul_c(a: vec2<f32>, b: vec2<f32>) -> vec2<f32> {
    return vec2<f32>(a.x * b.x - a.y * b.y, a.x * b.y + a.y * b.x);
}

fn div_c(a: vec2<f32>, b: vec2<f32>) -> vec2<f32> {
    return vec2<f32>(a.x * b.x + a.y * b.y, a.y * b.x - a.x * b.y) / dot(b, b);
}

// The root with a real part ≥ 0.
fn sqrt_c(a: vec2<f32>) -> vec2<f32> {
    let m = sqrt(0.5 * (sqrt(dot(a, a)) + abs(a.x)));
    let other = 0.5 * a.y / max(m, 1e-30);
    return select(vec2<f32>(abs(other), select(m, -m, a.y < 0.0)), vec2<f32>(m, other), a.x >= 0.0);
}

fn cis(x: f32) -> vec2<f32> {
    let v = x * 0.15915494;
    return turn(v - floor(v));
}

fn exp_c(a: vec2<f32>) -> vec2<f32> {
    return exp_f32(min(a.x, 80.0)) * cis(a.y);
}

// Angle of y over x, by quotients below √2 − 1.
fn angle(y: f32, x: f32) -> f32 {
    let flat_one = min(abs(x), abs(y));
    let steep = max(max(abs(x), abs(y)), 1e-30);
    let a = flat_one / steep;
    let upper = a > 0.41421356;
    let b = select(a, (a - 1.0) / (a + 1.0), upper);
    let q = b * b;
    let series = b + b * q * (-0.333329491539 + q * (0.199777106478 + q * (-0.138776856032 + q * 0.0805374449538)));
    var r = series + select(0.0, 0.78539816, upper);
    r = select(r, 1.57079633 - r, abs(y) > abs(x));
    r = select(r, 3.14159265 - r, x < 0.0);
    return select(r, -r, y < 0.0);
}

// ln(1 + x), x > −1.
fn log_one_plus(x: f32) -> f32 {
    return select(log_f32(max(1.0 + x, 1e-37)), twice_artanh(x / (2.0 + x)), abs(x) < 0.5);
}

// −ln(1 − sy)/s for s ≥ 0: a series where that is y and little more.
fn log_over(y: vec2<f32>, s: f32) -> vec2<f32> {
    let w = s * y;
    if dot(w, w) < 0.0025 {
        var p = vec2<f32>(0.16666667, 0.0);
        p = vec2<f32>(0.2, 0.0) + mul_c(p, w);
        p = vec2<f32>(0.25, 0.0) + mul_c(p, w);
        p = vec2<f32>(0.33333333, 0.0) + mul_c(p, w);
        p = vec2<f32>(0.5, 0.0) + mul_c(p, w);
        return mul_c(y, vec2<f32>(1.0, 0.0) + mul_c(p, w));
    }
    return vec2<f32>(0.5 * log_one_plus(dot(w, w) - 2.0 * w.x), angle(-w.y, 1.0 - w.x)) / -s;
}

// ---- the models -----------------------------------------------------------------------------------------------------

// E e^((½ + iu)·ln S_T/F) under model row m: exp of what is returned.
fn exponent(u: f32, t: f32, m: u32) -> vec2<f32> {
    let variance = model[m];
    let kappa = model[m + 1u];
    let theta = model[m + 2u];
    let sigma = model[m + 3u];
    let rho = model[m + 4u];
    let p = u * u + 0.25;
    let one = vec2<f32>(1.0, 0.0);
    let beta = vec2<f32>(kappa - 0.5 * rho * sigma, -rho * sigma * u);
    let d = sqrt_c(mul_c(beta, beta) + vec2<f32>(sigma * sigma * p, 0.0));
    let sum = beta + d;
    let psi = div_c(vec2<f32>(p, 0.0), sum);
    let slope = div_c(psi, sum);
    let e = exp_c(-d * t);
    let g = -sigma * sigma * slope;
    let y = div_c(mul_c(slope, one - e), one - g);
    let level = 2.0 * log_over(y, sigma * sigma) - psi * t;
    var x = kappa * theta * level - variance * mul_c(psi, div_c(one - e, one - mul_c(g, e)));
    let intensity = model[m + 5u];
    if intensity > 0.0 {
        let mean = model[m + 6u];
        let half = 0.5 * model[m + 7u] * model[m + 7u];
        let jump = exp_c(vec2<f32>(0.5 * mean + half * (0.25 - u * u), u * (mean + half)));
        x += intensity * t * (jump - one - exp_minus_one(mean + half) * vec2<f32>(0.5, u));
    }
    return x;
}

@compute @workgroup_size(WG)
fn heston_price(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let row = group_index(wid, nwg);
    // The last groups of a folded grid have no option; they follow the barriers of the last one.
    let at = 5u * min(row, params.rows - 1u);
    let m = 8u * model_of[min(row, params.rows - 1u)];
    let s = terms[at];
    let k = terms[at + 1u];
    let t = terms[at + 2u];
    let r = terms[at + 3u];
    let q = terms[at + 4u];
    let moneyness = log_ratio(s, k) + (r - q) * t;
    let decay = -exp_minus_one(-model[m + 1u] * t) / model[m + 1u];
    let mean = model[m + 6u];
    let width = model[m + 7u];
    let w = model[m + 2u] * t + (model[m] - model[m + 2u]) * decay + model[m + 5u] * t * (mean * mean + width * width);
    let narrow = inverseSqrt(max(w, 1e-24));

    // Where the integrand has died away, by probes.
    let probe = 0.5 * narrow * exp_f32(0.30010459 * f32(tid));
    let size = exp_f32(min(exponent(probe, t, m).x, 0.0)) * probe / (probe * probe + 0.25);
    sh_lane[tid] = select(0.5 * narrow, probe, size > SMALL);
    workgroupBarrier();
    var end = 0.0;
    for (var i = 0u; i < NODES; i++) {
        end = max(end, 1.35 * sh_lane[i]);
    }
    workgroupBarrier();
    let reach = abs(moneyness) + select(0.0, 3.0 * abs(mean), model[m + 5u] > 0.0);
    let panels = clamp(ceil(end / min(6.0 * narrow, 36.0 / max(reach, 1e-9))), 1.0, PANELS);
    let span = end / panels;

    // What the model's integrand lacks to that of a normal law with the same variance.
    var sum = 0.0;
    for (var panel = 0u; panel < u32(panels); panel++) {
        let u = (f32(panel) + 0.5 * (nodes[tid] + 1.0)) * span;
        let p = u * u + 0.25;
        let x = exponent(u, t, m);
        let wave = cis(u * moneyness);
        let other = exp_c(vec2<f32>(x.x, x.y + u * moneyness));
        sum += (exp_f32(-0.5 * w * p) * wave.x - other.x) / p;
    }
    sh_lane[tid] = sum * nodes[NODES + tid] * 0.5 * span;
    workgroupBarrier();
    if tid > 0u || row >= params.rows {
        return;
    }
    var total = 0.0;
    for (var i = 0u; i < NODES; i++) {
        total += sh_lane[i];
    }
    let forward = s * exp_f32(-q * t);
    let strike = k * exp_f32(-r * t);
    let call = (kind[row] & 1u) == 1u;
    let least = max(select(-1.0, 1.0, call) * (forward - strike), 0.0);
    if w <= 1e-24 {
        price[row] = least;
        return;
    }
    let flat_price = option_price(forward, strike, moneyness, sqrt(w), call);
    price[row] = clamp(flat_price + sqrt(forward) * sqrt(strike) * 0.31830989 * total, least, select(strike, forward, call));
}

@compute @workgroup_size(WG)
fn merton_price(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let row = group_index(wid, nwg) * WG + tid;
    if row >= params.rows {
        return;
    }
    let at = 5u * row;
    let m = 4u * model_of[row];
    let t = terms[at + 2u];
    let forward = terms[at] * exp_f32(-terms[at + 4u] * t);
    let strike = terms[at + 1u] * exp_f32(-terms[at + 3u] * t);
    let moneyness = log_ratio(terms[at], terms[at + 1u]) + (terms[at + 3u] - terms[at + 4u]) * t;
    let variance = model[m] * model[m] * t;
    let jumps = model[m + 1u] * t;
    let jump_variance = model[m + 3u] * model[m + 3u];
    let jump = model[m + 2u] + 0.5 * jump_variance;
    let drift = -jumps * exp_minus_one(jump);
    let call = (kind[row] & 1u) == 1u;
    let many = jumps * max(1.0, exp_f32(jump));
    let count = min(u32(many + 8.0 * sqrt(many)) + 16u, TERMS_MOST);
    var chance = exp_f32(-jumps);
    var sum = 0.0;
    for (var n = 0u; n < count; n++) {
        let shift = drift + f32(n) * jump;
        sum += chance * option_price(forward * exp_f32(shift), strike, moneyness + shift, sqrt(variance + f32(n) * jump_variance), call);
        chance = chance * jumps / f32(n + 1u);
    }
    series_price[row] = sum;
}
