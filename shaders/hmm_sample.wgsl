// Random paths of hidden Markov models. Maths, shapes and the rule of the draws: kernels/hmm_sample.rs.
//   hmm_weights              grid  ⌈entries / WG⌉        thread = table entry
//   hmm_sample               grid  ⌈B / WG⌉              thread = path, steps from_step .. to_step
//   hmm_sample_observations  grid  ⌈B·⌈T/4⌉ / WG⌉        thread = path and four steps, which share their random words
//   hmm_sample_posterior     grid  ⌈B·draws / WG⌉        thread = path, steps to_step .. from_step

struct HmmSampleParams {
    b: u32,
    t: u32,
    k: u32,
    d: u32,
    u: u32,
    draws: u32,
    model_row: u32,
    trans_row: u32,
    trans_step: u32,
    softmax: u32,
    words_row: u32,
    emission: u32,
    symbols: u32,
    from_step: u32,
    to_step: u32,
    first: u32,
    first_high: u32,
    seed: u32,
    seed_high: u32,
}

@group(0) @binding(0) var<uniform> params: HmmSampleParams;

override WG: u32 = 64u;

const ANCESTRAL: u32 = 0x4853u;
const POSTERIOR: u32 = 0x4850u;
const SECOND: u32 = 0x8000u;
const REGRESSION: u32 = 6u;
const IMPOSSIBLE: f32 = -1e30;
const DEAD: f32 = -1e29;
const POISSON_ROUNDS: u32 = 10000u;

// ---- draws --------------------------------------------------------------------------------------------------------------

// 2^31·e^x for x ≤ 0, by integers from the bits of x on.
fn weight(x: f32) -> u32 {
    let raw = bitcast<u32>(x);
    if raw >> 31u == 0u {
        return 0x80000000u;
    }
    let exponent = i32((raw >> 23u) & 0xffu);
    if exponent > 131 {
        return 0u;
    }
    let mantissa = (raw & 0x7fffffu) | 0x800000u;
    let y = select(mantissa >> u32(min(123 - exponent, 31)), mantissa << u32(max(exponent - 123, 0)), exponent >= 123);
    let z = mul32(y, 0xB8AA3B29u).y;
    let g = mul32(z << 6u, 0xB17217F8u).y;
    var r = 0x80000000u;
    for (var n = 11u; n > 0u; n--) {
        r = 0x80000000u - mul32(g, r).y / n;
    }
    return r >> (z >> 26u);
}

// ⌊word·total / 2^32⌋.
fn target_of(word: u32, total: vec2<u32>) -> vec2<u32> {
    return add64(mul32(word, total.y), vec2<u32>(mul32(word, total.x).y, 0u));
}

// The four words of a path at steps 4·(t/4) … for a factor.
fn words_of(path: u32, t: u32, factor: u32, stream: u32) -> vec4<u32> {
    let index = add64(vec2<u32>(params.first, params.first_high), vec2<u32>(path, 0u));
    return philox4x32(vec4<u32>(index.x, index.y, t / 4u, factor | (stream << 16u)), vec2<u32>(params.seed, params.seed_high));
}

@group(0) @binding(1) var<storage, read> log_prob: array<f32>;
@group(0) @binding(2) var<storage, read_write> weights: array<u32>;

@compute @workgroup_size(WG)
fn hmm_weights(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let at = group_index(wid, nwg) * WG + tid;
    if at < params.b {
        weights[at] = weight(log_prob[at]);
    }
}

// ---- ancestral paths ------------------------------------------------------------------------------------------------------

@group(0) @binding(1) var<storage, read> init_weights: array<u32>;
@group(0) @binding(2) var<storage, read> weights_in: array<u32>;
@group(0) @binding(3) var<storage, read> words: array<u32>;
@group(0) @binding(4) var<storage, read> log_trans: array<f32>;
@group(0) @binding(5) var<storage, read> inputs: array<f32>;
@group(0) @binding(6) var<storage, read_write> states: array<u32>;

fn length_of(b: u32) -> u32 {
    if params.words_row == 0u {
        return params.t;
    }
    return min(words[b * params.words_row], params.t);
}

// Logit of the transition whose weights [U] and bias lie at `at`.
fn logit(at: u32, from_input: u32) -> f32 {
    var x = log_trans[at + params.u];
    for (var c = 0u; c < params.u; c++) {
        x += log_trans[at + c] * inputs[from_input + c];
    }
    return x;
}

// Weight of state j: of the first step, of a table's row, or of a softmax row with largest logit `top`.
fn weight_at(first: bool, at: u32, from_input: u32, top: f32, j: u32) -> u32 {
    if first {
        return init_weights[at + j];
    }
    if params.softmax == 0u {
        return weights_in[at + j];
    }
    return weight(logit(at + j * (params.u + 1u), from_input) - top);
}

@compute @workgroup_size(WG)
fn hmm_sample(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let b = group_index(wid, nwg) * WG + tid;
    if b >= params.b {
        return;
    }
    let stop = min(length_of(b), params.to_step);
    var state = 0u;
    if params.from_step > 0u && params.from_step < stop {
        state = states[b * params.t + params.from_step - 1u];
    }
    var draw = vec4<u32>(0u);
    for (var t = params.from_step; t < stop; t++) {
        if t % 4u == 0u || t == params.from_step {
            draw = words_of(b, t, 0u, ANCESTRAL);
        }
        let first = t == 0u;
        let from_input = (b * params.t + t) * params.u;
        var at = b * params.model_row;
        var top = IMPOSSIBLE;
        if !first {
            at = b * params.trans_row + (t - 1u) * params.trans_step + state * params.k * (params.u + 1u);
            if params.softmax != 0u {
                for (var j = 0u; j < params.k; j++) {
                    top = max(top, logit(at + j * (params.u + 1u), from_input));
                }
            }
        }
        var total = vec2<u32>(0u);
        for (var j = 0u; j < params.k; j++) {
            total = add64(total, vec2<u32>(weight_at(first, at, from_input, top, j), 0u));
        }
        let goal = target_of(draw[t % 4u], total);
        var sum = vec2<u32>(0u);
        for (var j = 0u; j < params.k; j++) {
            sum = add64(sum, vec2<u32>(weight_at(first, at, from_input, top, j), 0u));
            if less64(goal, sum) {
                state = j;
                break;
            }
        }
        states[b * params.t + t] = state;
    }
}

// ---- observations ---------------------------------------------------------------------------------------------------------

@group(0) @binding(1) var<storage, read> model: array<f32>;
@group(0) @binding(2) var<storage, read> words_read: array<u32>;
@group(0) @binding(3) var<storage, read> states_read: array<u32>;
@group(0) @binding(4) var<storage, read_write> obs: array<f32>;

fn uniform_log(word: u32) -> f32 {
    return -neg_log_uniform(word >> 8u);
}

// e^x − 1.
fn exp_m1(x: f32) -> f32 {
    if abs(x) > 0.3 {
        return exp(x) - 1.0;
    }
    return x * (1.0 + x * (0.5 + x * (0.16666667 + x * (0.041666668 + x * (0.008333334 + x * (0.0013888889 + x * 0.0001984127))))));
}

// ln x! for x ≥ 0: Stirling's series from 8 on, the recursion below.
fn log_factorial(x: f32) -> f32 {
    var z = x + 1.0;
    var product = 1.0;
    for (; z < 8.0; z += 1.0) {
        product *= z;
    }
    let w = 1.0 / z;
    let series = w * (0.083333336 - w * w * (0.0027777778 - w * w * 0.0007936508));
    return (z - 0.5) * log(z) - z + 0.9189385 + series - log(product);
}

// Inversion outwards from the mode: mode, mode + 1, mode − 1, …
fn poisson(log_rate: f32, u: f32) -> f32 {
    let rate = exp(log_rate);
    let mode = floor(min(rate, 1e9));
    let at_mode = exp(mode * log_rate - rate - log_factorial(mode));
    var left = u - at_mode;
    var up = at_mode;
    var down = at_mode;
    if left < 0.0 {
        return mode;
    }
    for (var i = 1u; i < POISSON_ROUNDS; i++) {
        let n = f32(i);
        up = up * rate / (mode + n);
        left -= up;
        if left < 0.0 {
            return mode + n;
        }
        if n <= mode {
            down = down * (mode - n + 1.0) / rate;
            left -= down;
            if left < 0.0 {
                return mode - n;
            }
        }
        if up <= 0.0 && down <= 0.0 {
            break;
        }
    }
    return mode;
}

// The symbol of a row of log-probabilities.
fn symbol(at: u32, word: u32) -> f32 {
    var total = vec2<u32>(0u);
    for (var s = 0u; s < params.symbols; s++) {
        total = add64(total, vec2<u32>(weight(model[at + s]), 0u));
    }
    let goal = target_of(word, total);
    var sum = vec2<u32>(0u);
    for (var s = 0u; s < params.symbols; s++) {
        sum = add64(sum, vec2<u32>(weight(model[at + s]), 0u));
        if less64(goal, sum) {
            return f32(s);
        }
    }
    return 0.0;
}

// Coordinate i of the state's emission; `from` is the observation's first element, `at` the model's first parameter.
fn observation(at: u32, state: u32, i: u32, from_obs: u32, normal: f32, first: u32, second: u32) -> f32 {
    let k = params.k;
    let d = params.d;
    switch params.emission {
        case 1u: {
            return model[at + state * d + i] + normal / model[at + (k + state) * d + i];
        }
        case 2u: {
            let row = at + k * d + state * (d * (d + 1u) / 2u) + i * (i + 1u) / 2u;
            let mean = at + state * d;
            var known = 0.0;
            for (var j = 0u; j < i; j++) {
                known += model[row + j] * (obs[from_obs + j] - model[mean + j]);
            }
            return model[mean + i] + (normal - known) / model[row + i];
        }
        case 3u: {
            let own = at + state * d + i;
            let inverse_dof = model[own + 3u * k * d];
            let radius = sqrt(exp_m1(-2.0 * uniform_log(first) * inverse_dof) / inverse_dof);
            return model[own] + radius * turn(uniform_of(second)).x / model[own + k * d];
        }
        case 4u: {
            return poisson(model[at + state * d + i], uniform_of(first));
        }
        case 5u: {
            return symbol(at + state * params.symbols, first);
        }
        default: {
            let r = d - 1u;
            var fit = 0.0;
            for (var j = 0u; j < r; j++) {
                fit += obs[from_obs + 1u + j] * model[at + state * r + j];
            }
            return fit + normal / model[at + k * r + state];
        }
    }
}

@compute @workgroup_size(WG)
fn hmm_sample_observations(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let quads = (params.t + 3u) / 4u;
    let at = group_index(wid, nwg) * WG + tid;
    let b = at / quads;
    if b >= params.b {
        return;
    }
    let t = 4u * (at % quads);
    var length = params.t;
    if params.words_row != 0u {
        length = min(words_read[b * params.words_row], params.t);
    }
    let parameters = b * params.model_row + params.k;
    let count = select(params.d, 1u, params.emission == REGRESSION);
    for (var i = 0u; i < count; i++) {
        let first = words_of(b, t, 1u + i, ANCESTRAL);
        let second = words_of(b, t, SECOND | (1u + i), ANCESTRAL);
        for (var c = 0u; c < 4u; c++) {
            if t + c >= length {
                break;
            }
            let pair = c & 2u;
            let radius = sqrt(2.0 * neg_log_uniform(first[pair] >> 8u));
            let z = radius * turn(uniform_of(first[pair + 1u]))[c & 1u];
            let row = b * params.t + t + c;
            obs[row * params.d + i] = observation(parameters, states_read[row], i, row * params.d, z, first[c], second[c]);
        }
    }
}

// ---- posterior paths ------------------------------------------------------------------------------------------------------

@group(0) @binding(1) var<storage, read> filtered: array<f32>;
@group(0) @binding(2) var<storage, read> words_given: array<u32>;
@group(0) @binding(3) var<storage, read> log_trans_given: array<f32>;
@group(0) @binding(4) var<storage, read> inputs_given: array<f32>;
@group(0) @binding(5) var<storage, read_write> states_drawn: array<u32>;

fn logit_given(at: u32, from_input: u32) -> f32 {
    var x = log_trans_given[at + params.u];
    for (var c = 0u; c < params.u; c++) {
        x += log_trans_given[at + c] * inputs_given[from_input + c];
    }
    return x;
}

fn probability(x: f32) -> f32 {
    return select(exp(x), 0.0, x <= DEAD);
}

// p(state j at step t | state i one step before).
fn transition(b: u32, t: u32, i: u32, j: u32) -> f32 {
    let at = b * params.trans_row + (t - 1u) * params.trans_step + i * params.k * (params.u + 1u);
    if params.softmax == 0u {
        return probability(log_trans_given[at + j]);
    }
    let from_input = (b * params.t + t) * params.u;
    var top = IMPOSSIBLE;
    for (var c = 0u; c < params.k; c++) {
        top = max(top, logit_given(at + c * (params.u + 1u), from_input));
    }
    var sum = 0.0;
    for (var c = 0u; c < params.k; c++) {
        sum += probability(logit_given(at + c * (params.u + 1u), from_input) - top);
    }
    return probability(logit_given(at + j * (params.u + 1u), from_input) - top) / sum;
}

// p(state i at t and `next` one step later), up to a factor.
fn joint(b: u32, t: u32, i: u32, next: u32, last: bool) -> f32 {
    let p = filtered[(b * params.t + t) * params.k + i];
    if last {
        return p;
    }
    return p * transition(b, t + 1u, i, next);
}

fn share(x: f32, top: f32) -> u32 {
    return u32(clamp(x / top, 0.0, 1.0) * 2147483648.0);
}

@compute @workgroup_size(WG)
fn hmm_sample_posterior(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let path = group_index(wid, nwg) * WG + tid;
    let b = path / params.draws;
    if b >= params.b {
        return;
    }
    var length = params.t;
    if params.words_row != 0u {
        length = min(words_given[b * params.words_row], params.t);
    }
    var next = 0u;
    if params.to_step < length {
        next = states_drawn[path * params.t + params.to_step];
    }
    for (var t = min(length, params.to_step); t > params.from_step; ) {
        t -= 1u;
        let last = t + 1u == length;
        var top = 0.0;
        for (var i = 0u; i < params.k; i++) {
            top = max(top, joint(b, t, i, next, last));
        }
        var state = 0u;
        if top > 0.0 {
            var total = vec2<u32>(0u);
            for (var i = 0u; i < params.k; i++) {
                total = add64(total, vec2<u32>(share(joint(b, t, i, next, last), top), 0u));
            }
            let goal = target_of(words_of(path, t, 0u, POSTERIOR)[t % 4u], total);
            var sum = vec2<u32>(0u);
            for (var i = 0u; i < params.k; i++) {
                sum = add64(sum, vec2<u32>(share(joint(b, t, i, next, last), top), 0u));
                if less64(goal, sum) {
                    state = i;
                    break;
                }
            }
        }
        states_drawn[path * params.t + t] = state;
        next = state;
    }
}
