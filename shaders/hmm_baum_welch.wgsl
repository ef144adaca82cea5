// Baum-Welch of hidden Markov models. Maths, shapes and source: kernels/hmm_baum_welch.rs.
//   hmm_expectation        grid  ⌈jobs / WG⌉             thread = (model, sequence), K ≤ 4, all state in registers
//   hmm_expectation_lanes  grid  ⌈jobs / (WG / lanes)⌉   8 to 64 threads = (model, sequence), a state each
//   hmm_sums               grid  ⌈jobs·sums / WG⌉        thread = one sum over time of one (model, sequence)
//   hmm_reduce             grid  ⌈M·statistics / WG⌉     thread = (model, sum)
//   hmm_maximisation       grid  ⌈M·K / WG⌉              thread = (model, state)
// states: γ over α [T,K,jobs] where K ≤ 4; else γ, α and γ/predicted, each [jobs,T,K].

struct BaumWelchParams {
    jobs: u32,
    models: u32,
    restarts: u32,
    per_model: u32,
    t: u32,
    k: u32,
    d: u32,
    emission: u32,
    symbols: u32,
    masked: u32,
    begin: u32,
    end: u32,
    phase: u32,
    iteration: u32,
    action: u32,
    tolerance: f32,
    rounding: f32,
    init_prior: f32,
    transition_prior: f32,
    sticky: f32,
    mean_weight: f32,
}

@group(0) @binding(0) var<uniform> params: BaumWelchParams;

override WG: u32 = 64u;
const SLOTS: u32 = 1024u;
const BLOCK: u32 = 64u;
const LOG_ZERO: f32 = -1e30;
const IMPOSSIBLE: f32 = -1e29;
const LEAST: f32 = -1e28;
const TINY: f32 = 1e-37;
const HALF_LOG_TAU: f32 = 0.9189385;
const EMPTY_STATE: f32 = 1e-3;
const EMPTY_ROW: f32 = 1e-6;
const LEAST_RATE: f32 = 1e-6;
const COLLINEAR: f32 = 1e-6;

// ---- widths -----------------------------------------------------------------------------------------------------

// Sums of one state, its weight included.
fn each_state() -> u32 {
    let d = params.d;
    switch params.emission {
        case 0u: { return 1u; }
        case 1u: { return 1u + 2u * d; }
        case 2u: { return 1u + d + d * (d + 1u) / 2u; }
        case 3u: { return 1u + 4u * d; }
        case 4u: { return 1u + d; }
        case 5u: { return 1u + params.symbols; }
        default: { return 2u + (d - 1u) + (d - 1u) * d / 2u; }
    }
}

fn statistics_width() -> u32 {
    return params.k + params.k * params.k + params.k * each_state() + 3u;
}

fn parameters_width() -> u32 {
    let k = params.k;
    let d = params.d;
    let head = k + k * k;
    switch params.emission {
        case 0u: { return head; }
        case 1u: { return head + 2u * k * d; }
        case 2u: { return head + k * d + k * (d * (d + 1u) / 2u); }
        case 3u: { return head + 4u * k * d; }
        case 5u: { return head + k * params.symbols; }
        default: { return head + k * d; }
    }
}

fn model_width() -> u32 {
    let k = params.k;
    let d = params.d;
    switch params.emission {
        case 0u: { return k; }
        case 1u: { return k + 2u * k * d + k; }
        case 2u: { return k + k * d + k * (d * (d + 1u) / 2u) + k; }
        case 3u: { return k + 4u * k * d + k; }
        case 4u: { return k + k * d + k; }
        case 5u: { return k + k * params.symbols; }
        default: { return k + k * (d - 1u) + 2u * k; }
    }
}

fn observed_width() -> u32 {
    return select(params.d, params.k, params.emission == 0u);
}

// ---- functions --------------------------------------------------------------------------------------------------

// ln x! of a count: a table below 8, Stirling's series from there.
fn log_factorial(x: f32) -> f32 {
    if x < 7.5 {
        var table = array<f32, 8>(0.0, 0.0, 0.6931472, 1.7917595, 3.1780539, 4.787492, 6.5792512, 8.525161);
        return table[u32(max(x, 0.0) + 0.5)];
    }
    let z = x + 1.0;
    let w = 1.0 / z;
    return (z - 0.5) * log_f32(z) - z + HALF_LOG_TAU + w * (0.083333336 - w * w * (0.0027777778 - w * w * 0.0007936508));
}

fn log_probability(x: f32) -> f32 {
    if x >= TINY {
        return log_f32(x);
    }
    return LOG_ZERO;
}

// The sum of two (x, y) with z added.
fn compensated(sum: vec2<f32>, z: f32) -> vec2<f32> {
    let next = sum.x + z;
    let error = select((z - next) + sum.x, (sum.x - next) + z, abs(sum.x) >= abs(z));
    return vec2<f32>(next, sum.y + error);
}

// ---- expectation ------------------------------------------------------------------------------------------------

@group(0) @binding(1) var<storage, read> obs: array<f32>;
@group(0) @binding(2) var<storage, read> words: array<u32>;
@group(0) @binding(3) var<storage, read> parameters: array<f32>;
@group(0) @binding(4) var<storage, read> model: array<f32>;
@group(0) @binding(5) var<storage, read> status: array<u32>;
@group(0) @binding(6) var<storage, read_write> states: array<f32>;
@group(0) @binding(7) var<storage, read_write> statistics: array<f32>;

fn sequence_of(job: u32) -> u32 {
    return job / params.per_model / params.restarts * params.per_model + job % params.per_model;
}

fn words_each() -> u32 {
    return select(1u, 1u + params.t, params.masked != 0u);
}

fn is_observed(n: u32, t: u32) -> bool {
    return params.masked == 0u || words[n * words_each() + 1u + t] != 0u;
}

// Log-density of state s; `at` is where the packed emission begins, `x` where the observation does.
fn log_density(at: u32, x: u32, s: u32) -> f32 {
    let k = params.k;
    let d = params.d;
    var value = 0.0;
    switch params.emission {
        case 0u: { return max(obs[x + s], LOG_ZERO); }
        case 1u: {
            var squares = 0.0;
            for (var i = 0u; i < d; i++) {
                let z = clamp((obs[x + i] - model[at + s * d + i]) * model[at + (k + s) * d + i], -1e14, 1e14);
                squares += z * z;
            }
            value = model[at + 2u * k * d + s] - 0.5 * squares;
        }
        case 2u: {
            let triangle = d * (d + 1u) / 2u;
            var squares = 0.0;
            for (var i = 0u; i < d; i++) {
                let row = at + k * d + s * triangle + i * (i + 1u) / 2u;
                var z = 0.0;
                for (var j = 0u; j <= i; j++) {
                    z += model[row + j] * (obs[x + j] - model[at + s * d + j]);
                }
                z = clamp(z, -1e14, 1e14);
                squares += z * z;
            }
            value = model[at + k * (d + triangle) + s] - 0.5 * squares;
        }
        case 3u: {
            value = model[at + 4u * k * d + s];
            for (var i = 0u; i < d; i++) {
                let z = clamp((obs[x + i] - model[at + s * d + i]) * model[at + (k + s) * d + i], -1e14, 1e14);
                value -= model[at + (2u * k + s) * d + i] * log_1p(z * z * model[at + (3u * k + s) * d + i]);
            }
        }
        case 4u: {
            value = model[at + k * d + s];
            for (var i = 0u; i < d; i++) {
                value += obs[x + i] * model[at + s * d + i] - log_factorial(obs[x + i]);
            }
        }
        case 5u: {
            let symbol = min(u32(max(obs[x], 0.0)), params.symbols - 1u);
            return model[at + s * params.symbols + symbol];
        }
        default: {
            let r = d - 1u;
            var fit = 0.0;
            for (var i = 0u; i < r; i++) {
                fit += obs[x + 1u + i] * model[at + s * r + i];
            }
            let z = clamp((obs[x] - fit) * model[at + k * r + s], -1e14, 1e14);
            value = model[at + k * r + k + s] - 0.5 * z * z;
        }
    }
    return max(value, LEAST);
}

// Where state s of step t of a job lies where K ≤ 4.
fn at_small(job: u32, t: u32, s: u32) -> u32 {
    return (t * params.k + s) * params.jobs + job;
}

fn load4(job: u32, t: u32) -> vec4<f32> {
    let k = params.k;
    var x = vec4<f32>(states[at_small(job, t, 0u)], 0.0, 0.0, 0.0);
    if k > 1u { x.y = states[at_small(job, t, 1u)]; }
    if k > 2u { x.z = states[at_small(job, t, 2u)]; }
    if k > 3u { x.w = states[at_small(job, t, 3u)]; }
    return x;
}

fn store4(job: u32, t: u32, x: vec4<f32>) {
    let k = params.k;
    states[at_small(job, t, 0u)] = x.x;
    if k > 1u { states[at_small(job, t, 1u)] = x.y; }
    if k > 2u { states[at_small(job, t, 2u)] = x.z; }
    if k > 3u { states[at_small(job, t, 3u)] = x.w; }
}

// Up to four of the parameters; zero beyond K.
fn row4(at: u32) -> vec4<f32> {
    let k = params.k;
    var x = vec4<f32>(parameters[at], 0.0, 0.0, 0.0);
    if k > 1u { x.y = parameters[at + 1u]; }
    if k > 2u { x.z = parameters[at + 2u]; }
    if k > 3u { x.w = parameters[at + 3u]; }
    return x;
}

fn density4(at: u32, x: u32) -> vec4<f32> {
    let k = params.k;
    var y = vec4<f32>(log_density(at, x, 0u), 0.0, 0.0, 0.0);
    if k > 1u { y.y = log_density(at, x, 1u); }
    if k > 2u { y.z = log_density(at, x, 2u); }
    if k > 3u { y.w = log_density(at, x, 3u); }
    return y;
}

fn add_row4(at: u32, x: vec4<f32>) {
    let k = params.k;
    statistics[at] += x.x;
    if k > 1u { statistics[at + 1u] += x.y; }
    if k > 2u { statistics[at + 2u] += x.z; }
    if k > 3u { statistics[at + 3u] += x.w; }
}

fn sum4(x: vec4<f32>) -> f32 {
    return (x.x + x.y) + (x.z + x.w);
}

@compute @workgroup_size(WG)
fn hmm_expectation(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let job = group_index(wid, nwg) * WG + tid;
    if job >= params.jobs {
        return;
    }
    let m = job / params.per_model;
    if status[params.iteration * params.models + m] != 0u {
        return;
    }
    let k = params.k;
    let n = sequence_of(job);
    let length = min(words[n * words_each()], params.t);
    let top = min(params.end, length);
    let natural = m * parameters_width();
    let rows = natural + k;
    let a0 = row4(rows);
    var a1 = vec4<f32>(0.0);
    var a2 = vec4<f32>(0.0);
    var a3 = vec4<f32>(0.0);
    if k > 1u { a1 = row4(rows + k); }
    if k > 2u { a2 = row4(rows + 2u * k); }
    if k > 3u { a3 = row4(rows + 3u * k); }
    let sums = job * statistics_width();
    let summary = sums + statistics_width() - 3u;

    // forward: α, scaled by the sum one step before
    if (params.phase & 1u) != 0u {
        var alpha = row4(natural);
        var total = 1.0;
        var sum = vec2<f32>(0.0, 0.0);
        var failed = -1.0;
        if params.begin > 0u {
            sum = vec2<f32>(statistics[summary], statistics[summary + 1u]);
            failed = statistics[summary + 2u];
            if top > params.begin {
                alpha = load4(job, params.begin - 1u);
                total = sum4(alpha);
            }
        }
        let width = observed_width();
        let packed = m * model_width() + k;
        for (var t = params.begin; t < top; t++) {
            if failed >= 0.0 {
                break;
            }
            var predicted = alpha;
            if t > 0u {
                predicted = (alpha.x * a0 + alpha.y * a1 + alpha.z * a2 + alpha.w * a3) * (1.0 / total);
            }
            var log_b = vec4<f32>(0.0);
            if is_observed(n, t) {
                log_b = density4(packed, (n * params.t + t) * width);
            }
            let bits = bitcast<vec4<u32>>(predicted);
            let possible = predicted >= vec4<f32>(TINY);
            let mantissa = bitcast<vec4<f32>>((bits & vec4<u32>(0x7fffffu)) | vec4<u32>(0x3f800000u));
            let exponent = vec4<f32>(vec4<i32>(bits >> vec4<u32>(23u)) - 127);
            let level = select(vec4<f32>(LOG_ZERO), log_b + exponent * 0.6931472, possible);
            let shift = max(max(level.x, level.y), max(level.z, level.w));
            if shift <= IMPOSSIBLE {
                failed = f32(t);
                break;
            }
            alpha = select(vec4<f32>(0.0), mantissa * exp_vec4(level - shift), possible);
            total = sum4(alpha);
            store4(job, t, alpha);
            sum = compensated(compensated(sum, shift), log_f32(total));
        }
        statistics[summary] = select(sum.x, LOG_ZERO, failed >= 0.0);
        statistics[summary + 1u] = select(sum.y, 0.0, failed >= 0.0);
        statistics[summary + 2u] = failed;
    }

    // backward: γ over α, pairs in registers
    if (params.phase & 2u) != 0u && statistics[summary + 2u] < 0.0 {
        if params.end >= params.t {
            for (var e = 0u; e < k + k * k; e++) {
                statistics[sums + e] = 0.0;
            }
        }
        if top > params.begin {
            var t = top;
            if top == length {
                t = length - 1u;
                let last = load4(job, t);
                store4(job, t, last / sum4(last));
            }
            var gamma = load4(job, t);
            var p0 = vec4<f32>(0.0);
            var p1 = vec4<f32>(0.0);
            var p2 = vec4<f32>(0.0);
            var p3 = vec4<f32>(0.0);
            while t > params.begin {
                let stop = max(params.begin, t - min(t, BLOCK));
                var b0 = vec4<f32>(0.0);
                var b1 = vec4<f32>(0.0);
                var b2 = vec4<f32>(0.0);
                var b3 = vec4<f32>(0.0);
                while t > stop {
                    let alpha = load4(job, t - 1u);
                    let predicted = alpha.x * a0 + alpha.y * a1 + alpha.z * a2 + alpha.w * a3;
                    let possible = predicted >= vec4<f32>(TINY);
                    let ratio = select(vec4<f32>(0.0), gamma / max(predicted, vec4<f32>(TINY)), possible);
                    b0 += alpha.x * ratio;
                    b1 += alpha.y * ratio;
                    b2 += alpha.z * ratio;
                    b3 += alpha.w * ratio;
                    gamma = alpha * vec4<f32>(dot(a0, ratio), dot(a1, ratio), dot(a2, ratio), dot(a3, ratio));
                    gamma = gamma * (1.0 / max(sum4(gamma), TINY));
                    store4(job, t - 1u, gamma);
                    t -= 1u;
                }
                p0 += b0;
                p1 += b1;
                p2 += b2;
                p3 += b3;
            }
            add_row4(sums + k, p0 * a0);
            if k > 1u { add_row4(sums + 2u * k, p1 * a1); }
            if k > 2u { add_row4(sums + 3u * k, p2 * a2); }
            if k > 3u { add_row4(sums + 4u * k, p3 * a3); }
            if params.begin == 0u {
                add_row4(sums, gamma);
            }
        }
    }
}

// ---- expectation, a thread per state ------------------------------------------------------------------------------

var<workgroup> sh_alpha: array<f32, SLOTS>;
var<workgroup> sh_level: array<f32, SLOTS>;
var<workgroup> sh_other: array<f32, SLOTS>;

fn lanes_of(k: u32) -> u32 {
    var lanes = 8u;
    while lanes < k && lanes < WG {
        lanes *= 2u;
    }
    return lanes;
}

@compute @workgroup_size(WG)
fn hmm_expectation_lanes(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let k = params.k;
    let lanes = lanes_of(k);
    let lane = tid % lanes;
    let base = tid / lanes * k;
    let job = group_index(wid, nwg) * (WG / lanes) + tid / lanes;
    let here = min(job, params.jobs - 1u);
    let m = here / params.per_model;
    let n = sequence_of(here);
    let length = min(words[n * words_each()], params.t);
    let top = min(params.end, length);
    let natural = m * parameters_width();
    let rows = natural + k;
    let sums = here * statistics_width();
    let summary = sums + statistics_width() - 3u;
    let section = params.jobs * params.t * k;
    let own = here * params.t * k;
    var alive = job < params.jobs && status[params.iteration * params.models + m] == 0u;
    var failed = -1.0;

    if (params.phase & 1u) != 0u {
        var sum = vec2<f32>(0.0, 0.0);
        if params.begin > 0u {
            sum = vec2<f32>(statistics[summary], statistics[summary + 1u]);
            failed = statistics[summary + 2u];
            if top > params.begin {
                for (var j = lane; j < k; j += lanes) {
                    sh_alpha[base + j] = states[section + own + (params.begin - 1u) * k + j];
                }
            }
        }
        workgroupBarrier();
        let width = observed_width();
        let packed = m * model_width() + k;
        for (var t = params.begin; t < params.end; t++) {
            let run = alive && t < length && failed < 0.0;
            // predicted, its exponent moved to the level
            if run {
                var total = 0.0;
                if t > 0u {
                    for (var i = 0u; i < k; i++) {
                        total += sh_alpha[base + i];
                    }
                    if t > params.begin {
                        sum = compensated(sum, log_f32(total));
                    }
                }
                for (var j = lane; j < k; j += lanes) {
                    var predicted = 0.0;
                    if t == 0u {
                        predicted = parameters[natural + j];
                    } else {
                        for (var i = 0u; i < k; i++) {
                            predicted += sh_alpha[base + i] * parameters[rows + i * k + j];
                        }
                        predicted = predicted / total;
                    }
                    var log_b = 0.0;
                    if is_observed(n, t) {
                        log_b = log_density(packed, (n * params.t + t) * width, j);
                    }
                    let bits = bitcast<u32>(predicted);
                    let possible = predicted >= TINY;
                    sh_level[base + j] = select(LOG_ZERO, log_b + f32(i32(bits >> 23u) - 127) * 0.6931472, possible);
                    sh_other[base + j] = select(0.0, bitcast<f32>((bits & 0x7fffffu) | 0x3f800000u), possible);
                }
            }
            workgroupBarrier();
            if run {
                var shift = LOG_ZERO;
                for (var i = 0u; i < k; i++) {
                    shift = max(shift, sh_level[base + i]);
                }
                if shift <= IMPOSSIBLE {
                    failed = f32(t);
                } else {
                    sum = compensated(sum, shift);
                    for (var j = lane; j < k; j += lanes) {
                        let alpha = sh_other[base + j] * exp_f32(sh_level[base + j] - shift);
                        sh_alpha[base + j] = alpha;
                        states[section + own + t * k + j] = alpha;
                    }
                }
            }
            workgroupBarrier();
        }
        if alive && lane == 0u {
            if top > params.begin && failed < 0.0 {
                var total = 0.0;
                for (var i = 0u; i < k; i++) {
                    total += sh_alpha[base + i];
                }
                sum = compensated(sum, log_f32(total));
            }
            statistics[summary] = select(sum.x, LOG_ZERO, failed >= 0.0);
            statistics[summary + 1u] = select(sum.y, 0.0, failed >= 0.0);
            statistics[summary + 2u] = failed;
        }
        storageBarrier();
        workgroupBarrier();
    }

    if (params.phase & 2u) != 0u {
        alive = alive && statistics[summary + 2u] < 0.0;
        let first = select(top, length - min(length, 1u), top == length);
        if alive && params.end >= params.t {
            for (var j = lane; j < k; j += lanes) {
                statistics[sums + j] = 0.0;
            }
        }
        if alive && top > params.begin {
            // The last step's γ is its α; a later launch has left γ of the step behind this one's.
            let from_section = select(0u, section, top == length);
            for (var j = lane; j < k; j += lanes) {
                sh_other[base + j] = states[from_section + own + first * k + j];
            }
        }
        workgroupBarrier();
        for (var t = params.end; t > params.begin; t--) {
            let run = alive && top > params.begin && t <= first;
            if run {
                for (var j = lane; j < k; j += lanes) {
                    sh_alpha[base + j] = states[section + own + (t - 1u) * k + j];
                }
            }
            workgroupBarrier();
            if run {
                var total = 0.0;
                for (var i = 0u; i < k; i++) {
                    total += sh_other[base + i];
                }
                for (var j = lane; j < k; j += lanes) {
                    var predicted = 0.0;
                    for (var i = 0u; i < k; i++) {
                        predicted += sh_alpha[base + i] * parameters[rows + i * k + j];
                    }
                    let gamma = sh_other[base + j] / max(total, TINY);
                    let ratio = select(0.0, gamma / max(predicted, TINY), predicted >= TINY);
                    sh_level[base + j] = ratio;
                    states[own + t * k + j] = gamma;
                    states[2u * section + own + t * k + j] = ratio;
                }
            }
            workgroupBarrier();
            if run {
                for (var i = lane; i < k; i += lanes) {
                    var inner = 0.0;
                    for (var j = 0u; j < k; j++) {
                        inner += parameters[rows + i * k + j] * sh_level[base + j];
                    }
                    sh_other[base + i] = sh_alpha[base + i] * inner;
                }
            }
        }
        workgroupBarrier();
        if alive && top > params.begin {
            var total = 0.0;
            for (var i = 0u; i < k; i++) {
                total += sh_other[base + i];
            }
            for (var j = lane; j < k; j += lanes) {
                let gamma = sh_other[base + j] / max(total, TINY);
                states[own + params.begin * k + j] = gamma;
                if params.begin == 0u {
                    statistics[sums + j] = gamma;
                }
            }
        }
    }
}

// ---- sums over time -----------------------------------------------------------------------------------------------

@group(0) @binding(4) var<storage, read> status_in: array<u32>;
@group(0) @binding(5) var<storage, read> states_in: array<f32>;
@group(0) @binding(6) var<storage, read_write> sums_statistics: array<f32>;

fn at_state(job: u32, t: u32, s: u32) -> u32 {
    if params.k <= 4u {
        return at_small(job, t, s);
    }
    return (job * params.t + t) * params.k + s;
}

// f(x) of sum q of state s; `at` is where the natural emission begins.
fn moment(at: u32, x: u32, s: u32, q: u32) -> f32 {
    let k = params.k;
    let d = params.d;
    if q == 0u {
        return 1.0;
    }
    let e = q - 1u;
    switch params.emission {
        case 1u: {
            let dev = obs[x + e % d] - parameters[at + s * d + e % d];
            return select(dev * dev, dev, e < d);
        }
        case 2u: {
            if e < d {
                return obs[x + e] - parameters[at + s * d + e];
            }
            // row of the triangle: the largest i with i(i+1)/2 ≤ e − d
            let f = e - d;
            var i = u32((sqrt(8.0 * f32(f) + 1.0) - 1.0) * 0.5);
            i -= select(0u, 1u, i * (i + 1u) / 2u > f);
            i += select(0u, 1u, (i + 1u) * (i + 2u) / 2u <= f);
            let j = f - i * (i + 1u) / 2u;
            return (obs[x + i] - parameters[at + s * d + i]) * (obs[x + j] - parameters[at + s * d + j]);
        }
        case 3u: {
            let i = e % d;
            let dev = obs[x + i] - parameters[at + s * d + i];
            let scale = parameters[at + (k + s) * d + i];
            let freedom = parameters[at + (2u * k + s) * d + i];
            let square = (dev / scale) * (dev / scale);
            let weight = (freedom + 1.0) / (freedom + square);
            switch e / d {
                case 0u: { return weight; }
                case 1u: { return weight * dev; }
                case 2u: { return weight * dev * dev; }
                default: { return log_1p(square / freedom); }
            }
        }
        case 4u: { return obs[x + e]; }
        case 5u: { return select(0.0, 1.0, min(u32(max(obs[x], 0.0)), params.symbols - 1u) == e); }
        default: {
            let r = d - 1u;
            let products = r * (r + 1u) / 2u;
            if e < products {
                var i = u32((sqrt(8.0 * f32(e) + 1.0) - 1.0) * 0.5);
                i -= select(0u, 1u, i * (i + 1u) / 2u > e);
                i += select(0u, 1u, (i + 1u) * (i + 2u) / 2u <= e);
                return obs[x + 1u + i] * obs[x + 1u + e - i * (i + 1u) / 2u];
            }
            var error = obs[x];
            for (var i = 0u; i < r; i++) {
                error -= obs[x + 1u + i] * parameters[at + s * r + i];
            }
            if e < products + r {
                return obs[x + 1u + e - products] * error;
            }
            return error * error;
        }
    }
}

@compute @workgroup_size(WG)
fn hmm_sums(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let k = params.k;
    let small = k <= 4u;
    let each = each_state();
    let first = select(k, k + k * k, small);
    let loose = k + k * k + k * each - first;
    let at = group_index(wid, nwg) * WG + tid;
    if at >= params.jobs * loose {
        return;
    }
    // Neighbouring threads read neighbouring states.
    let job = select(at / loose, at % params.jobs, small);
    let e = first + select(at % loose, at / params.jobs, small);
    let m = job / params.per_model;
    let out = job * statistics_width();
    if status_in[params.iteration * params.models + m] != 0u || sums_statistics[out + statistics_width() - 1u] >= 0.0 {
        return;
    }
    let n = sequence_of(job);
    let top = min(params.end, min(words[n * words_each()], params.t));
    let natural = m * parameters_width();
    let width = observed_width();
    let section = params.jobs * params.t * k;
    let is_pair = e < k + k * k;
    let i = (e - k) / k;
    let j = (e - k) % k;
    let s = (e - min(e, k + k * k)) / each;
    let q = (e - min(e, k + k * k)) % each;
    var sum = 0.0;
    var t = select(params.begin, max(params.begin, 1u), is_pair);
    while t < top {
        let stop = min(top, t + BLOCK);
        var block = 0.0;
        while t < stop {
            if is_pair {
                block += states_in[section + at_state(job, t - 1u, i)] * states_in[2u * section + at_state(job, t, j)];
            } else if is_observed(n, t) {
                block += states_in[at_state(job, t, s)] * moment(natural + k + k * k, (n * params.t + t) * width, s, q);
            }
            t += 1u;
        }
        sum += block;
    }
    if is_pair {
        sum *= parameters[natural + e];
    }
    sums_statistics[out + e] = select(sums_statistics[out + e], 0.0, params.begin == 0u) + sum;
}

// ---- reduce -------------------------------------------------------------------------------------------------------

@group(0) @binding(1) var<storage, read> statistics_in: array<f32>;
@group(0) @binding(2) var<storage, read_write> totals: array<f32>;

@compute @workgroup_size(WG)
fn hmm_reduce(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let width = statistics_width();
    let at = group_index(wid, nwg) * WG + tid;
    if at >= params.models * width {
        return;
    }
    let m = at / width;
    let e = at % width;
    // The log-likelihood stays a sum of two.
    let is_high = e == width - 3u;
    if e == width - 2u {
        return;
    }
    var sum = vec2<f32>(0.0, 0.0);
    for (var s = 0u; s < params.per_model; s++) {
        let row = (m * params.per_model + s) * width;
        sum = compensated(sum, statistics_in[row + e]);
        if is_high {
            sum.y += statistics_in[row + width - 2u];
        }
    }
    if is_high {
        totals[at] = sum.x;
        totals[at + 1u] = sum.y;
    } else {
        totals[at] = sum.x + sum.y;
    }
}

// ---- maximisation -------------------------------------------------------------------------------------------------

@group(0) @binding(1) var<storage, read> guards: array<f32>;
@group(0) @binding(3) var<storage, read_write> next_parameters: array<f32>;
@group(0) @binding(4) var<storage, read_write> next_model: array<f32>;
@group(0) @binding(5) var<storage, read_write> log_trans: array<f32>;
@group(0) @binding(6) var<storage, read_write> next_status: array<u32>;
@group(0) @binding(7) var<storage, read_write> path: array<f32>;

// How the model stands after this expectation: 0 goes on, 1 converged, 2 fell, 3 impossible.
fn judge(m: u32, likelihood: vec2<f32>) -> u32 {
    let before = next_status[params.iteration * params.models + m];
    if before != 0u {
        return before;
    }
    if likelihood.x <= IMPOSSIBLE {
        return 3u;
    }
    if params.iteration == 0u || params.tolerance < 0.0 {
        return 0u;
    }
    let past = 2u * ((params.iteration - 1u) * params.models + m);
    let gain = (likelihood.x - path[past]) + (likelihood.y - path[past + 1u]);
    let noise = params.rounding * abs(likelihood.x);
    let free = params.init_prior == 0.0 && params.transition_prior == 0.0 && params.sticky == 0.0 && params.mean_weight == 0.0;
    if free && gain < -8.0 * noise - 1e-9 {
        return 2u;
    }
    return select(0u, 1u, gain < max(noise, params.tolerance));
}

// A row of probabilities from its expected counts; what was a hard zero stays one.
fn maximise_row(old: u32, counts: u32, prior: f32, stay: u32) {
    let k = params.k;
    var plain = 0.0;
    var total = 0.0;
    for (var j = 0u; j < k; j++) {
        plain += totals[counts + j];
        let with_prior = totals[counts + j] + prior + select(0.0, params.sticky, j == stay);
        total += select(0.0, with_prior, next_parameters[old + j] > 0.0);
    }
    if plain < EMPTY_ROW || total <= 0.0 {
        return;
    }
    for (var j = 0u; j < k; j++) {
        let with_prior = totals[counts + j] + prior + select(0.0, params.sticky, j == stay);
        next_parameters[old + j] = select(0.0, with_prior / total, next_parameters[old + j] > 0.0);
    }
}

// How far a mean moves, towards the prior mean where there is one.
fn step_of(weight: f32, sum: f32, mean: f32, first: f32) -> f32 {
    return (sum + params.mean_weight * (first - mean)) / (weight + params.mean_weight);
}

fn triangle_at(i: u32, j: u32) -> u32 {
    return i * (i + 1u) / 2u + j;
}

// Solves A·x = b for the lower-packed A at `a` and b behind it, in place; collinear columns get 0. Returns bᵀ·x.
fn solve(a: u32, b: u32, n: u32) -> f32 {
    var explained = 0.0;
    for (var j = 0u; j < n; j++) {
        let diagonal = totals[a + triangle_at(j, j)];
        var pivot = diagonal;
        for (var c = 0u; c < j; c++) {
            let x = totals[a + triangle_at(j, c)];
            pivot -= x * x;
        }
        var inverse = 0.0;
        if pivot > COLLINEAR * diagonal {
            inverse = 1.0 / sqrt(pivot);
        }
        for (var i = j + 1u; i < n; i++) {
            var sum = totals[a + triangle_at(i, j)];
            for (var c = 0u; c < j; c++) {
                sum -= totals[a + triangle_at(i, c)] * totals[a + triangle_at(j, c)];
            }
            totals[a + triangle_at(i, j)] = inverse * sum;
        }
        totals[a + triangle_at(j, j)] = inverse;
        var right = totals[b + j];
        for (var c = 0u; c < j; c++) {
            right -= totals[a + triangle_at(j, c)] * totals[b + c];
        }
        right *= inverse;
        totals[b + j] = right;
        explained += right * right;
    }
    for (var back = 0u; back < n; back++) {
        let j = n - 1u - back;
        var right = totals[b + j];
        for (var i = j + 1u; i < n; i++) {
            right -= totals[a + triangle_at(i, j)] * totals[b + i];
        }
        totals[b + j] = right * totals[a + triangle_at(j, j)];
    }
    return explained;
}

// The emission of state s from its sums at `sums`, the natural one at `at`, guards at `guard`.
fn maximise_state(s: u32, sums: u32, at: u32, guard: u32) {
    let k = params.k;
    let d = params.d;
    let weight = totals[sums];
    let prior = params.mean_weight;
    let f = sums + 1u;
    switch params.emission {
        case 0u: { }
        case 1u: {
            for (var i = 0u; i < d; i++) {
                let mean = next_parameters[at + s * d + i];
                let first = guards[guard + d + i];
                let sum = totals[f + i];
                let step = step_of(weight, sum, mean, first);
                let off = mean + step - first;
                let squares = totals[f + d + i] - 2.0 * sum * step + step * step * weight + prior * off * off;
                next_parameters[at + s * d + i] = mean + step;
                next_parameters[at + (k + s) * d + i] = max(squares / weight, guards[guard + i]);
            }
        }
        case 2u: {
            let covariance = at + k * d + s * (d * (d + 1u) / 2u);
            for (var i = 0u; i < d; i++) {
                let mean_i = next_parameters[at + s * d + i];
                let first_i = guards[guard + d + i];
                let step_i = step_of(weight, totals[f + i], mean_i, first_i);
                for (var j = 0u; j <= i; j++) {
                    let mean_j = next_parameters[at + s * d + j];
                    let first_j = guards[guard + d + j];
                    let step_j = step_of(weight, totals[f + j], mean_j, first_j);
                    let off = (mean_i + step_i - first_i) * (mean_j + step_j - first_j);
                    let e = triangle_at(i, j);
                    let products = totals[f + d + e] - totals[f + i] * step_j - totals[f + j] * step_i + step_i * step_j * weight + prior * off;
                    next_parameters[covariance + e] = products / weight;
                }
            }
            for (var i = 0u; i < d; i++) {
                let mean = next_parameters[at + s * d + i];
                next_parameters[at + s * d + i] = mean + step_of(weight, totals[f + i], mean, guards[guard + d + i]);
            }
        }
        case 3u: {
            for (var i = 0u; i < d; i++) {
                let location = next_parameters[at + s * d + i];
                let first = guards[guard + d + i];
                let u = totals[f + i];
                let sum = totals[f + d + i];
                let step = step_of(u, sum, location, first);
                let off = location + step - first;
                let squares = totals[f + 2u * d + i] - 2.0 * sum * step + step * step * u + prior * off * off;
                next_parameters[at + s * d + i] = location + step;
                next_parameters[at + (k + s) * d + i] = sqrt(max(squares / weight, guards[guard + i]));
            }
        }
        case 4u: {
            for (var i = 0u; i < d; i++) {
                next_parameters[at + s * d + i] = max(totals[f + i] / weight, LEAST_RATE);
            }
        }
        case 5u: {
            for (var i = 0u; i < params.symbols; i++) {
                next_parameters[at + s * params.symbols + i] = totals[f + i] / weight;
            }
        }
        default: {
            let r = d - 1u;
            let right = f + r * (r + 1u) / 2u;
            let explained = solve(f, right, r);
            for (var i = 0u; i < r; i++) {
                next_parameters[at + s * r + i] += totals[right + i];
            }
            next_parameters[at + k * r + s] = max((totals[right + r] - explained) / weight, guards[guard]);
        }
    }
}

// Inverse of the lower Cholesky factor of the covariance at `c` into the model at `f`; pivots below the floor are raised. Returns the
// sum of the logarithms of its diagonal.
fn inverse_factor(c: u32, f: u32, guard: u32) -> f32 {
    let d = params.d;
    for (var i = 0u; i < d; i++) {
        for (var j = 0u; j < i; j++) {
            var sum = next_parameters[c + triangle_at(i, j)];
            for (var l = 0u; l < j; l++) {
                sum -= next_model[f + triangle_at(i, l)] * next_model[f + triangle_at(j, l)];
            }
            next_model[f + triangle_at(i, j)] = sum / next_model[f + triangle_at(j, j)];
        }
        var pivot = next_parameters[c + triangle_at(i, i)];
        for (var l = 0u; l < i; l++) {
            let x = next_model[f + triangle_at(i, l)];
            pivot -= x * x;
        }
        if pivot < guards[guard + i] {
            next_parameters[c + triangle_at(i, i)] += guards[guard + i] - pivot;
        }
        next_model[f + triangle_at(i, i)] = sqrt(max(pivot, guards[guard + i]));
    }
    var logs = 0.0;
    for (var i = 0u; i < d; i++) {
        let inverse = 1.0 / next_model[f + triangle_at(i, i)];
        for (var j = 0u; j < i; j++) {
            var sum = 0.0;
            for (var l = j; l < i; l++) {
                sum += next_model[f + triangle_at(i, l)] * next_model[f + triangle_at(l, j)];
            }
            next_model[f + triangle_at(i, j)] = -sum * inverse;
        }
        next_model[f + triangle_at(i, i)] = inverse;
        logs += log_f32(inverse);
    }
    return logs;
}

// Packs the emission of state s: natural at `at`, packed at `to`.
fn pack_state(s: u32, at: u32, to: u32, guard: u32) {
    let k = params.k;
    let d = params.d;
    switch params.emission {
        case 0u: { }
        case 1u: {
            var logs = 0.0;
            for (var i = 0u; i < d; i++) {
                let inverse = 1.0 / sqrt(max(next_parameters[at + (k + s) * d + i], guards[guard + i]));
                next_model[to + s * d + i] = next_parameters[at + s * d + i];
                next_model[to + (k + s) * d + i] = inverse;
                logs += log_f32(inverse);
            }
            next_model[to + 2u * k * d + s] = logs - f32(d) * HALF_LOG_TAU;
        }
        case 2u: {
            let triangle = d * (d + 1u) / 2u;
            let logs = inverse_factor(at + k * d + s * triangle, to + k * d + s * triangle, guard);
            for (var i = 0u; i < d; i++) {
                next_model[to + s * d + i] = next_parameters[at + s * d + i];
            }
            next_model[to + k * (d + triangle) + s] = logs - f32(d) * HALF_LOG_TAU;
        }
        case 3u: {
            var constant = 0.0;
            for (var i = 0u; i < d; i++) {
                let scale = next_parameters[at + (k + s) * d + i];
                let freedom = next_parameters[at + (2u * k + s) * d + i];
                next_model[to + s * d + i] = next_parameters[at + s * d + i];
                next_model[to + (k + s) * d + i] = 1.0 / scale;
                next_model[to + (2u * k + s) * d + i] = 0.5 * (freedom + 1.0);
                next_model[to + (3u * k + s) * d + i] = 1.0 / freedom;
                constant += next_parameters[at + (3u * k + s) * d + i] - log_f32(scale);
            }
            next_model[to + 4u * k * d + s] = constant;
        }
        case 4u: {
            var total = 0.0;
            for (var i = 0u; i < d; i++) {
                next_model[to + s * d + i] = log_f32(next_parameters[at + s * d + i]);
                total += next_parameters[at + s * d + i];
            }
            next_model[to + k * d + s] = -total;
        }
        case 5u: {
            for (var i = 0u; i < params.symbols; i++) {
                next_model[to + s * params.symbols + i] = log_probability(next_parameters[at + s * params.symbols + i]);
            }
        }
        default: {
            let r = d - 1u;
            let inverse = 1.0 / sqrt(max(next_parameters[at + k * r + s], guards[guard]));
            for (var i = 0u; i < r; i++) {
                next_model[to + s * r + i] = next_parameters[at + s * r + i];
            }
            next_model[to + k * r + s] = inverse;
            next_model[to + k * r + k + s] = log_f32(inverse) - HALF_LOG_TAU;
        }
    }
}

// Divides a row of a start by its sum.
fn normalise_row(at: u32) {
    var total = 0.0;
    for (var j = 0u; j < params.k; j++) {
        total += next_parameters[at + j];
    }
    for (var j = 0u; j < params.k; j++) {
        next_parameters[at + j] /= total;
    }
}

@compute @workgroup_size(WG)
fn hmm_maximisation(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let k = params.k;
    let at = group_index(wid, nwg) * WG + tid;
    if at >= params.models * k {
        return;
    }
    let m = at / k;
    let s = at % k;
    let each = each_state();
    let sums = m * statistics_width();
    let natural = m * parameters_width();
    let packed = m * model_width();
    let guard = m / params.restarts * 2u * max(params.d, 1u);

    if params.action != 0u {
        let summary = sums + statistics_width() - 3u;
        var likelihood = vec2<f32>(totals[summary], totals[summary + 1u]);
        let verdict = judge(m, likelihood);
        if s == 0u {
            let line = 2u * (params.iteration * params.models + m);
            if params.iteration > 0u && next_status[params.iteration * params.models + m] != 0u {
                let past = line - 2u * params.models;
                likelihood = vec2<f32>(path[past], path[past + 1u]);
            }
            path[line] = likelihood.x;
            path[line + 1u] = likelihood.y;
            next_status[(params.iteration + 1u) * params.models + m] = verdict;
        }
        if verdict != 0u || params.action == 2u {
            return;
        }
        // init by the first thread of the model, transitions each its row
        if s == 0u {
            maximise_row(natural, sums, params.init_prior, k);
        }
        maximise_row(natural + k + s * k, sums + k + s * k, params.transition_prior, s);
        let own = sums + k + k * k + s * each;
        if totals[own] >= EMPTY_STATE {
            maximise_state(s, own, natural + k + k * k, guard);
        }
    } else {
        if s == 0u {
            normalise_row(natural);
        }
        normalise_row(natural + k + s * k);
    }

    // pack
    if s == 0u {
        for (var j = 0u; j < k; j++) {
            next_model[packed + j] = log_probability(next_parameters[natural + j]);
        }
    }
    for (var j = 0u; j < k; j++) {
        log_trans[m * k * k + s * k + j] = log_probability(next_parameters[natural + k + s * k + j]);
    }
    pack_state(s, natural + k + k * k, packed + k, guard);
}
