// Black-Scholes price and greeks of calls, puts and digitals. Maths, shapes and source: kernels/black_scholes.rs.
//   grid  ceil(N / WG)      workgroup WG      thread = option
//   reads terms [N,6], kind [N]      writes price, delta, gamma, vega, theta, rho [N]; backward: grad_terms [N,6]

struct BlackScholesParams {
    rows: u32,
}

@group(0) @binding(0) var<uniform> params: BlackScholesParams;
@group(0) @binding(1) var<storage, read> terms: array<f32>;
@group(0) @binding(2) var<storage, read> kind: array<u32>;
@group(0) @binding(3) var<storage, read_write> price: array<f32>;
@group(0) @binding(4) var<storage, read_write> delta: array<f32>;
@group(0) @binding(5) var<storage, read_write> gamma: array<f32>;
@group(0) @binding(6) var<storage, read_write> vega: array<f32>;
@group(0) @binding(7) var<storage, read_write> theta: array<f32>;
@group(0) @binding(8) var<storage, read_write> rho: array<f32>;

@group(0) @binding(3) var<storage, read> grad_price: array<f32>;
@group(0) @binding(4) var<storage, read_write> grad_terms: array<f32>;

override WG: u32 = 64u;

const TINY: f32 = 1e-12;
const DENSITY: f32 = 0.39894228;

// Price, its derivatives by each of the terms, and the second by spot.
struct Sensitivities {
    price: f32,
    spot: f32,
    strike: f32,
    maturity: f32,
    volatility: f32,
    rate: f32,
    dividend: f32,
    gamma: f32,
}

// What a term is without: no time left, or no volatility.
fn limits(forward: f32, strike: f32, at: u32, kind: u32, growth: f32, discount: f32) -> Sensitivities {
    let t = terms[at + 2u];
    let side = select(-1.0, 1.0, (kind & 1u) == 1u);
    let n = select(select(0.0, 1.0, side * (forward - strike) > 0.0), 0.5, forward == strike);
    if kind > 1u {
        let price = discount * n;
        return Sensitivities(price, 0.0, 0.0, -terms[at + 4u] * price, 0.0, -t * price, 0.0, 0.0);
    }
    let vega = select(0.0, forward * sqrt(t) * DENSITY, forward == strike);
    let by_time = side * n * (terms[at + 4u] * strike - terms[at + 5u] * forward);
    return Sensitivities(max(side * (forward - strike), 0.0), side * growth * n, -side * discount * n, by_time, vega,
        side * t * strike * n, -side * t * forward * n, 0.0);
}

fn sensitivities(row: u32) -> Sensitivities {
    let at = 6u * row;
    let s = terms[at];
    let t = terms[at + 2u];
    let sigma = terms[at + 3u];
    let r = terms[at + 4u];
    let q = terms[at + 5u];
    let growth = exp_f32(-q * t);
    let discount = exp_f32(-r * t);
    let forward = s * growth;
    let strike = terms[at + 1u] * discount;
    let root = sqrt(t);
    let sd = sigma * root;
    if sd <= TINY {
        return limits(forward, strike, at, kind[row], growth, discount);
    }
    let side = select(-1.0, 1.0, (kind[row] & 1u) == 1u);
    let d = (log_ratio(s, terms[at + 1u]) + (r - q) * t) / sd;
    let d1 = d + 0.5 * sd;
    let d2 = d - 0.5 * sd;
    let p2 = normal_cdf_and_bell(side * d2);
    if kind[row] > 1u {
        let price = discount * p2.x;
        let a = side * discount * p2.y * DENSITY;
        let slope = a / sd;
        let by_time = a * ((r - q - 0.5 * sigma * sigma) / sd - d2 / (2.0 * t)) - r * price;
        return Sensitivities(price, slope / s, -slope / terms[at + 1u], by_time, -a * d1 / sigma, slope * t - t * price,
            -slope * t, -slope * d1 / (s * s * sd));
    }
    let p1 = normal_cdf_and_bell(side * d1);
    let n1 = p1.y * DENSITY;
    let price = max(side * (forward * p1.x - strike * p2.x), 0.0);
    let by_time = 0.5 * forward * n1 * sigma / root + side * (r * strike * p2.x - q * forward * p1.x);
    return Sensitivities(price, side * growth * p1.x, -side * discount * p2.x, by_time, forward * n1 * root,
        side * t * strike * p2.x, -side * t * forward * p1.x, growth * n1 / (s * sd));
}

@compute @workgroup_size(WG)
fn black_scholes(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let row = group_index(wid, nwg) * WG + tid;
    if row >= params.rows {
        return;
    }
    let x = sensitivities(row);
    price[row] = x.price;
    delta[row] = x.spot;
    gamma[row] = x.gamma;
    vega[row] = x.volatility;
    theta[row] = -x.maturity;
    rho[row] = x.rate;
}

@compute @workgroup_size(WG)
fn black_scholes_price(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let row = group_index(wid, nwg) * WG + tid;
    if row < params.rows {
        price[row] = sensitivities(row).price;
    }
}

@compute @workgroup_size(WG)
fn black_scholes_backward(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let row = group_index(wid, nwg) * WG + tid;
    if row >= params.rows {
        return;
    }
    let x = sensitivities(row);
    let grad = grad_price[row];
    let at = 6u * row;
    grad_terms[at] = grad * x.spot;
    grad_terms[at + 1u] = grad * x.strike;
    grad_terms[at + 2u] = grad * x.maturity;
    grad_terms[at + 3u] = grad * x.volatility;
    grad_terms[at + 4u] = grad * x.rate;
    grad_terms[at + 5u] = grad * x.dividend;
}
