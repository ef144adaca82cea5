// Steps ahead of a hidden Markov chain. Maths, shapes and source: kernels/hmm_forecast.rs.
//   hmm_forecast         grid  ⌈B·lanes / WG⌉   `lanes` threads per sequence, each with states lane, lane + lanes, …
//   hmm_sojourn          grid  ⌈B·K / WG⌉       thread = sequence and state
//   hmm_sojourn_average  grid  ⌈B / WG⌉         thread = sequence
//   workgroup memory: 3·STATES floats

struct HmmForecastParams {
    b: u32,
    h: u32,
    k: u32,
    u: u32,
    trans_row: u32,
    trans_step: u32,
    softmax: u32,
    from_step: u32,
    to_step: u32,
    lanes: u32,
    cap: f32,
    log_left: f32,
}

@group(0) @binding(0) var<uniform> params: HmmForecastParams;

override WG: u32 = 64u;
override STATES: u32 = 1024u;

const IMPOSSIBLE: f32 = -1e30;
const DEAD: f32 = -1e29;

fn probability_of(x: f32) -> f32 {
    return select(exp(x), 0.0, x <= DEAD);
}

// ---- distribution ahead ---------------------------------------------------------------------------------------------------

@group(0) @binding(1) var<storage, read> probability: array<f32>;
@group(0) @binding(2) var<storage, read> log_trans: array<f32>;
@group(0) @binding(3) var<storage, read> inputs: array<f32>;
@group(0) @binding(4) var<storage, read_write> forecast: array<f32>;

var<workgroup> sh_now: array<f32, 2u * STATES>;
var<workgroup> sh_norm: array<f32, STATES>;

fn logit(at: u32, from_input: u32) -> f32 {
    var x = log_trans[at + params.u];
    for (var c = 0u; c < params.u; c++) {
        x += log_trans[at + c] * inputs[from_input + c];
    }
    return max(x, IMPOSSIBLE);
}

// ln of the sum of exponentials of row i's logits.
fn log_norm(b: u32, s: u32, i: u32) -> f32 {
    let from_input = (b * params.h + s) * params.u;
    let at = b * params.trans_row + i * params.k * (params.u + 1u);
    var top = IMPOSSIBLE;
    for (var j = 0u; j < params.k; j++) {
        top = max(top, logit(at + j * (params.u + 1u), from_input));
    }
    var sum = 0.0;
    for (var j = 0u; j < params.k; j++) {
        sum += exp(logit(at + j * (params.u + 1u), from_input) - top);
    }
    return top + log(sum);
}

fn transition(b: u32, s: u32, slot: u32, i: u32, j: u32) -> f32 {
    if params.softmax == 0u {
        return probability_of(log_trans[b * params.trans_row + s * params.trans_step + i * params.k + j]);
    }
    let x = logit(b * params.trans_row + (i * params.k + j) * (params.u + 1u), (b * params.h + s) * params.u);
    return select(exp(x - sh_norm[slot + i]), 0.0, x <= DEAD);
}

@compute @workgroup_size(WG)
fn hmm_forecast(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let lanes = params.lanes;
    let lane = tid % lanes;
    let b = group_index(wid, nwg) * (WG / lanes) + tid / lanes;
    let here = b < params.b && lane < params.k;
    let slot = (tid / lanes) * min(params.k, lanes);
    if here {
        for (var j = lane; j < params.k; j += lanes) {
            if params.from_step == 0u {
                sh_now[slot + j] = probability[b * params.k + j];
            } else {
                sh_now[slot + j] = forecast[(b * params.h + params.from_step - 1u) * params.k + j];
            }
        }
    }
    workgroupBarrier();
    var parity = 0u;
    for (var s = params.from_step; s < params.to_step; s++) {
        if params.softmax != 0u {
            if here {
                for (var i = lane; i < params.k; i += lanes) {
                    sh_norm[slot + i] = log_norm(b, s, i);
                }
            }
            workgroupBarrier();
        }
        if here {
            for (var j = lane; j < params.k; j += lanes) {
                var sum = 0.0;
                var next = 0.0;
                for (var i = 0u; i < params.k; i++) {
                    let p = sh_now[parity * STATES + slot + i];
                    sum += p;
                    next += p * transition(b, s, slot, i, j);
                }
                next = select(0.0, next / sum, sum > 0.0);
                sh_now[(1u - parity) * STATES + slot + j] = next;
                forecast[(b * params.h + s) * params.k + j] = next;
            }
        }
        workgroupBarrier();
        parity = 1u - parity;
    }
}

// ---- durations ------------------------------------------------------------------------------------------------------------

@group(0) @binding(1) var<storage, read> log_trans_given: array<f32>;
@group(0) @binding(2) var<storage, read> inputs_given: array<f32>;
@group(0) @binding(3) var<storage, read_write> survival: array<f32>;
@group(0) @binding(4) var<storage, read_write> sojourn: array<f32>;
@group(0) @binding(5) var<storage, read_write> capped: array<u32>;

fn logit_given(at: u32, from_input: u32) -> f32 {
    var x = log_trans_given[at + params.u];
    for (var c = 0u; c < params.u; c++) {
        x += log_trans_given[at + c] * inputs_given[from_input + c];
    }
    return max(x, IMPOSSIBLE);
}

// log-probability to stay in state i over slot s.
fn log_stay_of(b: u32, s: u32, i: u32) -> f32 {
    let at = b * params.trans_row + s * params.trans_step + i * params.k * (params.u + 1u);
    if params.softmax == 0u {
        return min(log_trans_given[at + i], 0.0);
    }
    let from_input = (b * params.h + s) * params.u;
    var top = IMPOSSIBLE;
    for (var j = 0u; j < params.k; j++) {
        top = max(top, logit_given(at + j * (params.u + 1u), from_input));
    }
    var sum = 0.0;
    for (var j = 0u; j < params.k; j++) {
        sum += exp(logit_given(at + j * (params.u + 1u), from_input) - top);
    }
    let own = logit_given(at + i * (params.u + 1u), from_input);
    return select(min(own - (top + log(sum)), 0.0), IMPOSSIBLE, own <= DEAD);
}

// 1 − e^x for x ≤ 0.
fn complement(x: f32) -> f32 {
    if x < -0.3 {
        return 1.0 - exp(x);
    }
    return -x * (1.0 + x * (0.5 + x * (0.16666667 + x * (0.041666668 + x * (0.008333334 + x * (0.0013888889 + x * 0.0001984127))))));
}

@compute @workgroup_size(WG)
fn hmm_sojourn(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let at = group_index(wid, nwg) * WG + tid;
    let b = at / params.k;
    let i = at % params.k;
    if b >= params.b {
        return;
    }
    let moves = params.softmax != 0u || params.trans_step != 0u;
    var log_stay = log_stay_of(b, 0u, i);
    var log_survival = 0.0;
    var alive = 1.0;
    var first = 0.0;
    var second = 0.0;
    var quantile = -1.0;
    for (var s = 0u; s < params.h; s++) {
        if s > 0u && moves {
            log_stay = log_stay_of(b, s, i);
        }
        first += alive;
        second += f32(2u * s + 1u) * alive;
        let after = log_survival + log_stay;
        if quantile < 0.0 && after <= params.log_left {
            quantile = f32(s) + (params.log_left - log_survival) / log_stay;
        }
        log_survival = after;
        alive = probability_of(after);
        survival[(b * params.h + s) * params.k + i] = alive;
    }

    // beyond the last slot
    let leave = complement(max(log_stay, -80.0));
    let absorbing = leave <= 0.0 && alive > 0.0;
    let steps = f32(params.h);
    if !absorbing && alive > 0.0 {
        first += alive / leave;
        second += alive * ((2.0 * steps + 1.0) + 2.0 * (1.0 - leave) / leave) / leave;
    }
    if quantile < 0.0 {
        quantile = params.cap;
        if !absorbing {
            quantile = steps + (params.log_left - log_survival) / log_stay;
        }
    }
    sojourn[3u * at] = select(min(first, params.cap), params.cap, absorbing);
    sojourn[3u * at + 1u] = select(max(second - first * first, 0.0), UNDEFINED, absorbing);
    sojourn[3u * at + 2u] = min(quantile, params.cap);
    capped[at] = select(0u, 1u, absorbing || first > params.cap || quantile > params.cap);
}

// ---- average --------------------------------------------------------------------------------------------------------------

@group(0) @binding(2) var<storage, read> sojourn_given: array<f32>;
@group(0) @binding(3) var<storage, read_write> expected: array<f32>;

@compute @workgroup_size(WG)
fn hmm_sojourn_average(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let b = group_index(wid, nwg) * WG + tid;
    if b >= params.b {
        return;
    }
    var sum = 0.0;
    for (var i = 0u; i < params.k; i++) {
        sum += probability[b * params.k + i] * sojourn_given[3u * (b * params.k + i)];
    }
    expected[b] = sum;
}
