// Gradients of the log-likelihood of hidden Markov models, and through their posteriors. Maths, shapes and source:
// kernels/hmm_gradient.rs.
//   hmm_gradient_chain      grid  ⌈B·T·K / WG⌉             thread = (sequence, step, state)
//   hmm_gradient_emission   grid  ⌈B·C·P / WG⌉             thread = (sequence, block of steps, parameter)
//   hmm_gradient_table      grid  ⌈B·C·K² / WG⌉            thread = (sequence, block of steps, pair of states)
//   hmm_gradient_steps      grid  ⌈(B or 1)·(T−1)·K² / WG⌉ thread = (sequence or all, slot, pair of states)
//   hmm_gradient_softmax    grid  B·C·K                    workgroup = (sequence, block of steps, row)
//   hmm_gradient_reduce     grid  ⌈⌈rows / block⌉·P / WG⌉  thread = (block of rows, column)
//   hmm_tangent             grid  ⌈B / (WG / lanes)⌉       `lanes` threads per sequence, states over them
//   hmm_tangent_posterior   grid  ⌈B·T·K / WG⌉             thread = (sequence, step, state)

struct HmmGradientParams {
    b: u32,
    t: u32,
    k: u32,
    d: u32,
    u: u32,
    p: u32,
    blocks: u32,
    lanes: u32,
    emission: u32,
    symbols: u32,
    flags: u32,
    begin: u32,
    end: u32,
    model_stride: u32,
    trans_stride: u32,
    trans_step: u32,
    start_stride: u32,
    start_offset: u32,
    init_stride: u32,
    direction_stride: u32,
    direction_step: u32,
}

struct HmmReduceParams {
    rows: u32,
    p: u32,
    block: u32,
}

@group(0) @binding(0) var<uniform> params: HmmGradientParams;

override WG: u32 = 64u;
// Steps of one partial sum.
const BLOCK: u32 = 256u;
// Most states of hmm_tangent, and floats of a tile of hmm_gradient_softmax.
const STATES: u32 = 1024u;
const LARGEST: f32 = 1e36;
const IMPOSSIBLE: f32 = -1e29;

// Bits of flags: those of kernels/hmm.rs, then our own.
const SOFTMAX: u32 = 8u;
const LENGTHS: u32 = 16u;
const MASKED: u32 = 32u;
const FORWARD: u32 = 2048u;
const BACKWARD: u32 = 4096u;
const UPSTREAM: u32 = 65536u;
const TANGENT: u32 = 131072u;
const MOVES_INIT: u32 = 262144u;
const MOVES_TRANS: u32 = 524288u;
const MOVES_OBS: u32 = 1048576u;

fn has(flag: u32) -> bool {
    return (params.flags & flag) != 0u;
}

// Words of one sequence: its length, then its mask.
fn words_stride() -> u32 {
    return select(1u, 1u + params.t, has(MASKED));
}

// ---- chain: what the steps of a sequence need of each other --------------------------------------------------------

@group(0) @binding(1) var<storage, read> filtered: array<f32>;
@group(0) @binding(2) var<storage, read> predicted: array<f32>;
@group(0) @binding(3) var<storage, read> posterior: array<f32>;
@group(0) @binding(4) var<storage, read> grad_log_likelihood: array<f32>;
@group(0) @binding(5) var<storage, read> words: array<u32>;
@group(0) @binding(6) var<storage, read_write> grad_log_obs: array<f32>;
@group(0) @binding(7) var<storage, read_write> chain: array<f32>;

@compute @workgroup_size(WG)
fn hmm_gradient_chain(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let at = group_index(wid, nwg) * WG + tid;
    if at >= params.b * params.t * params.k {
        return;
    }
    let row = at / params.k;
    let k = at % params.k;
    let b = row / params.t;
    let t = row % params.t;
    var g = 1.0;
    if has(UPSTREAM) {
        g = grad_log_likelihood[b];
    }
    let share = posterior[at];
    var ratio = share;
    if t > 0u {
        let p = predicted[at];
        ratio = select(0.0, min(share / p, LARGEST), p > 0.0 && share > 0.0);
    }
    var observed = true;
    if has(MASKED) {
        observed = words[b * (1u + params.t) + 1u + t] != 0u;
    }
    chain[2u * row * params.k + k] = filtered[at];
    chain[(2u * row + 1u) * params.k + k] = g * ratio;
    grad_log_obs[at] = select(0.0, share * g, observed);
}

// ---- emissions -----------------------------------------------------------------------------------------------------

@group(0) @binding(1) var<storage, read> start: array<f32>;
@group(0) @binding(2) var<storage, read> grad_log_obs_in: array<f32>;
@group(0) @binding(3) var<storage, read> obs: array<f32>;
@group(0) @binding(4) var<storage, read> model: array<f32>;
@group(0) @binding(5) var<storage, read_write> partials: array<f32>;

const GAUSSIAN_DIAGONAL: u32 = 1u;
const GAUSSIAN_FULL: u32 = 2u;
const STUDENT_T: u32 = 3u;
const POISSON: u32 = 4u;
const CATEGORICAL: u32 = 5u;
const REGRESSION: u32 = 6u;

// A parameter of one state: its block (location, scale, …), its state, and its place within both.
struct Parameter {
    kind: u32,
    k: u32,
    i: u32,
    j: u32,
}

fn parameter_of(at: u32) -> Parameter {
    let kd = params.k * params.d;
    if params.emission == CATEGORICAL {
        return Parameter(0u, at / params.symbols, at % params.symbols, 0u);
    }
    if params.emission == REGRESSION {
        let width = params.d - 1u;
        if at < params.k * width {
            return Parameter(0u, at / width, at % width, 0u);
        }
        return Parameter(1u, at - params.k * width, 0u, 0u);
    }
    if params.emission == GAUSSIAN_FULL && at >= kd {
        let size = params.d * (params.d + 1u) / 2u;
        var row = 0u;
        var rest = (at - kd) % size;
        while rest > row {
            row++;
            rest -= row;
        }
        return Parameter(1u, (at - kd) / size, row, rest);
    }
    return Parameter(at / kd, (at % kd) / params.d, at % params.d, 0u);
}

// ψ(x + ½) − ψ(x) − 1/2x by recurrence and the asymptotic series.
fn digamma_step(x: f32) -> f32 {
    var y = x;
    var sum = 0.0;
    if x < 8.0 {
        for (var n = 0u; n < 8u; n++) {
            sum += 0.5 / (y * (y + 0.5));
            y += 1.0;
        }
        sum -= 4.0 / (x * y);
    }
    let inverse = 1.0 / (y * y);
    return sum + inverse * (0.125 - inverse * (0.015625 - inverse * 0.0078125));
}

// An observation, or its distance from a mean: products stay finite.
fn capped(x: f32) -> f32 {
    return clamp(x, -1e18, 1e18);
}

// A distance in deviations, whose square stays finite.
fn bounded(z: f32) -> f32 {
    return clamp(z, -1e14, 1e14);
}

// Row `row` of the inverse Cholesky factor of state k, times x − mean.
fn whitened(factor: u32, mean: u32, x: u32, row: u32) -> f32 {
    var sum = 0.0;
    for (var c = 0u; c <= row; c++) {
        sum += model[factor + row * (row + 1u) / 2u + c] * capped(obs[x + c] - model[mean + c]);
    }
    return bounded(sum);
}

// Derivative of log b_k(x) with respect to one parameter; x starts at obs[at], the sequence's model at model[m].
fn score(q: Parameter, m: u32, at: u32) -> f32 {
    let kd = params.k * params.d;
    let own = m + params.k + q.k * params.d + q.i;
    if params.emission == GAUSSIAN_DIAGONAL {
        let z = bounded(capped(obs[at + q.i] - model[own]) * model[own + kd]);
        return select(0.5 * (z * z - 1.0), z * model[own + kd], q.kind == 0u);
    }
    if params.emission == GAUSSIAN_FULL {
        let mean = m + params.k + q.k * params.d;
        let factor = m + params.k + kd + q.k * (params.d * (params.d + 1u) / 2u);
        if q.kind == 1u {
            let diagonal = select(0.0, 1.0 / model[factor + q.i * (q.i + 3u) / 2u], q.i == q.j);
            return diagonal - whitened(factor, mean, at, q.i) * capped(obs[at + q.j] - model[mean + q.j]);
        }
        var sum = 0.0;
        for (var row = q.i; row < params.d; row++) {
            sum += model[factor + row * (row + 1u) / 2u + q.i] * whitened(factor, mean, at, row);
        }
        return sum;
    }
    if params.emission == STUDENT_T {
        let scale = model[own + kd];
        let inverse = model[own + 3u * kd];
        let z = bounded(capped(obs[at + q.i] - model[own]) * scale);
        let tail = z * z * inverse;
        let w = 2.0 * model[own + 2u * kd] / (1.0 + tail);
        if q.kind == 0u {
            return w * inverse * z * scale;
        }
        if q.kind == 1u {
            return w * tail - 1.0;
        }
        return 0.5 * (digamma_step(0.5 / inverse) - log(1.0 + tail) + w * tail * inverse);
    }
    if params.emission == POISSON {
        return capped(obs[at + q.i]) - exp(model[own]);
    }
    if params.emission == CATEGORICAL {
        return select(0.0, 1.0, u32(obs[at]) == q.i);
    }
    let width = params.d - 1u;
    var residual = capped(obs[at]);
    for (var r = 0u; r < width; r++) {
        residual -= model[m + params.k + q.k * width + r] * capped(obs[at + 1u + r]);
    }
    let inverse = model[m + params.k + params.k * width + q.k];
    let z = bounded(residual * inverse);
    return select(0.5 * (z * z - 1.0), z * inverse * capped(obs[at + 1u + q.i]), q.kind == 0u);
}

@compute @workgroup_size(WG)
fn hmm_gradient_emission(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let at = group_index(wid, nwg) * WG + tid;
    if at >= params.b * params.blocks * params.p {
        return;
    }
    let p = at % params.p;
    let block = (at / params.p) % params.blocks;
    let b = at / params.p / params.blocks;
    var sum = 0.0;
    if p < params.k {
        if block == 0u {
            sum = start[b * params.start_stride + params.start_offset + p];
        }
    } else {
        let q = parameter_of(p - params.k);
        for (var t = block * BLOCK; t < min((block + 1u) * BLOCK, params.t); t++) {
            let row = b * params.t + t;
            let weight = grad_log_obs_in[row * params.k + q.k];
            if weight != 0.0 {
                sum += weight * score(q, b * params.model_stride, row * params.d);
            }
        }
    }
    partials[at] = sum;
}

// ---- transitions ---------------------------------------------------------------------------------------------------

@group(0) @binding(1) var<storage, read> chain_in: array<f32>;
@group(0) @binding(2) var<storage, read> transitions: array<f32>;
@group(0) @binding(3) var<storage, read> tangent_in: array<f32>;
@group(0) @binding(4) var<storage, read> direction: array<f32>;

fn log_trans(b: u32, t: u32, i: u32, j: u32) -> f32 {
    return transitions[b * params.trans_stride + t * params.trans_step + i * params.k + j];
}

// Posterior of the pair (i, j) at slot t without its transition probability; in a tangent pass times the slope of its logarithm.
fn pair(b: u32, t: u32, i: u32, j: u32) -> f32 {
    let k = params.k;
    let row = b * params.t + t;
    let x = chain_in[2u * row * k + i] * chain_in[(2u * row + 3u) * k + j];
    if !has(TANGENT) {
        return x;
    }
    var slope = tangent_in[3u * row * k + i] + tangent_in[(3u * row + 4u) * k + j];
    if has(MOVES_TRANS) {
        slope += direction[b * params.direction_stride + t * params.direction_step + i * k + j];
    }
    return x * slope;
}

@compute @workgroup_size(WG)
fn hmm_gradient_table(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let at = group_index(wid, nwg) * WG + tid;
    let k = params.k;
    if at >= params.b * params.blocks * k * k {
        return;
    }
    let i = (at / k) % k;
    let j = at % k;
    let block = (at / (k * k)) % params.blocks;
    let b = at / (k * k) / params.blocks;
    let a = exp(log_trans(b, 0u, i, j));
    var sum = 0.0;
    for (var t = block * BLOCK; t < min((block + 1u) * BLOCK, params.t - 1u); t++) {
        sum += a * pair(b, t, i, j);
    }
    partials[at] = sum;
}

@group(0) @binding(5) var<storage, read_write> grad_log_trans: array<f32>;

@compute @workgroup_size(WG)
fn hmm_gradient_steps(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let at = group_index(wid, nwg) * WG + tid;
    let k = params.k;
    let slots = params.t - 1u;
    // `p` sequences have a gradient of their own: all, or one that gathers them.
    if at >= params.p * slots * k * k {
        return;
    }
    let i = (at / k) % k;
    let j = at % k;
    let t = (at / (k * k)) % slots;
    let first = at / (k * k) / slots;
    let last = select(params.b, first + 1u, params.p > 1u);
    var sum = grad_log_trans[at];
    for (var b = first; b < last; b++) {
        sum += exp(log_trans(b, t, i, j)) * pair(b, t, i, j);
    }
    grad_log_trans[at] = sum;
}

// ---- input-driven transitions --------------------------------------------------------------------------------------

@group(0) @binding(5) var<storage, read> inputs: array<f32>;
@group(0) @binding(6) var<storage, read_write> softmax_partials: array<f32>;

var<workgroup> sh_tile: array<f32, STATES>;

// Row i, column j of the transition logits of slot t: the inputs of step t + 1.
fn logit(b: u32, t: u32, i: u32, j: u32) -> f32 {
    let w = b * params.trans_stride + (i * params.k + j) * (params.u + 1u);
    let x = (b * params.t + t + 1u) * params.u;
    var sum = transitions[w + params.u];
    for (var q = 0u; q < params.u; q++) {
        sum += transitions[w + q] * capped(inputs[x + q]);
    }
    return sum;
}

@compute @workgroup_size(WG)
fn hmm_gradient_softmax(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let group = group_index(wid, nwg);
    let k = params.k;
    if group >= params.b * params.blocks * k {
        return;
    }
    let i = group % k;
    let block = (group / k) % params.blocks;
    let b = group / k / params.blocks;
    let end = min((block + 1u) * BLOCK, params.t - 1u);
    let tile = min(STATES / k, WG);
    let width = k * (params.u + 1u);
    for (var first = block * BLOCK; first < max(end, block * BLOCK + 1u); first += tile) {
        // Logits of the tile's rows.
        for (var e = tid; e < tile * k; e += WG) {
            let t = first + e / k;
            if t < end {
                sh_tile[e] = logit(b, t, i, e % k);
            }
        }
        workgroupBarrier();
        // Pair posterior less its expectation, one thread per step.
        if tid < tile {
            let t = first + tid;
            let row = tid * k;
            if t < end {
                var top = sh_tile[row];
                for (var j = 1u; j < k; j++) {
                    top = max(top, sh_tile[row + j]);
                }
                // A row of hard zeros leads nowhere.
                var mass = select(0.0, LARGEST, top <= IMPOSSIBLE);
                for (var j = 0u; j < k; j++) {
                    sh_tile[row + j] = exp(sh_tile[row + j] - top);
                    mass += sh_tile[row + j];
                }
                var total = 0.0;
                for (var j = 0u; j < k; j++) {
                    sh_tile[row + j] /= mass;
                    total += sh_tile[row + j] * pair(b, t, i, j);
                }
                for (var j = 0u; j < k; j++) {
                    sh_tile[row + j] *= pair(b, t, i, j) - total;
                }
            } else {
                for (var j = 0u; j < k; j++) {
                    sh_tile[row + j] = 0.0;
                }
            }
        }
        workgroupBarrier();
        // Outer product with the inputs.
        for (var p = tid; p < width; p += WG) {
            let j = p / (params.u + 1u);
            let q = p % (params.u + 1u);
            var sum = 0.0;
            for (var s = 0u; s < tile; s++) {
                if first + s < end {
                    var x = 1.0;
                    if q < params.u {
                        x = capped(inputs[(b * params.t + first + s + 1u) * params.u + q]);
                    }
                    sum += sh_tile[s * k + j] * x;
                }
            }
            let at = group * width + p;
            if first == block * BLOCK {
                softmax_partials[at] = sum;
            } else {
                softmax_partials[at] += sum;
            }
        }
        workgroupBarrier();
    }
}

// ---- reduction -----------------------------------------------------------------------------------------------------

@group(0) @binding(0) var<uniform> reduce_params: HmmReduceParams;
@group(0) @binding(1) var<storage, read> partials_in: array<f32>;
@group(0) @binding(2) var<storage, read_write> sums: array<f32>;

@compute @workgroup_size(WG)
fn hmm_gradient_reduce(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let at = group_index(wid, nwg) * WG + tid;
    let p = reduce_params.p;
    let first = (at / p) * reduce_params.block;
    if first >= reduce_params.rows {
        return;
    }
    var sum = 0.0;
    for (var row = first; row < min(first + reduce_params.block, reduce_params.rows); row++) {
        sum += partials_in[row * p + at % p];
    }
    sums[at] = sum;
}

// ---- tangent -------------------------------------------------------------------------------------------------------

@group(0) @binding(3) var<storage, read> inputs_in: array<f32>;
@group(0) @binding(4) var<storage, read> words_in: array<u32>;
@group(0) @binding(5) var<storage, read> direction_init: array<f32>;
@group(0) @binding(6) var<storage, read> direction_trans: array<f32>;
@group(0) @binding(7) var<storage, read> direction_obs: array<f32>;
@group(0) @binding(8) var<storage, read_write> tangent: array<f32>;

var<workgroup> sh_now: array<f32, STATES>;
var<workgroup> sh_other: array<f32, STATES>;
var<workgroup> sh_row: array<f32, STATES>;

fn driven(b: u32, t: u32, i: u32, j: u32) -> f32 {
    let w = b * params.trans_stride + (i * params.k + j) * (params.u + 1u);
    let x = (b * params.t + t + 1u) * params.u;
    var sum = transitions[w + params.u];
    for (var q = 0u; q < params.u; q++) {
        sum += transitions[w + q] * capped(inputs_in[x + q]);
    }
    return sum;
}

fn log_normaliser(b: u32, t: u32, i: u32) -> f32 {
    var top = driven(b, t, i, 0u);
    for (var j = 1u; j < params.k; j++) {
        top = max(top, driven(b, t, i, j));
    }
    var mass = 0.0;
    for (var j = 0u; j < params.k; j++) {
        mass += exp(driven(b, t, i, j) - top);
    }
    // A row of hard zeros leads nowhere.
    return select(top + log(mass), -IMPOSSIBLE, top <= IMPOSSIBLE);
}

// Transition probability; `row` is the logarithm of the row's normaliser where logits are given.
fn transition(b: u32, t: u32, i: u32, j: u32, row: f32) -> f32 {
    if has(SOFTMAX) {
        // Large logits are rounded more coarsely than 1.
        return exp(min(driven(b, t, i, j) - row, 0.0));
    }
    return exp(log_trans(b, t, i, j));
}

fn moves_trans(b: u32, t: u32, i: u32, j: u32) -> f32 {
    if has(MOVES_TRANS) {
        return direction_trans[b * params.direction_stride + t * params.direction_step + i * params.k + j];
    }
    return 0.0;
}

fn moves_obs(b: u32, t: u32, j: u32) -> f32 {
    let row = b * params.t + t;
    if !has(MOVES_OBS) {
        return 0.0;
    }
    if has(MASKED) {
        if words_in[b * (1u + params.t) + 1u + t] == 0u {
            return 0.0;
        }
    }
    return direction_obs[row * params.k + j];
}

@compute @workgroup_size(WG)
fn hmm_tangent(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let group = group_index(wid, nwg);
    let per_group = WG / params.lanes;
    if group * per_group >= params.b {
        return;
    }
    let k = params.k;
    let lane = tid % params.lanes;
    let slot = tid / params.lanes;
    let own = slot * k;
    let b = group * per_group + slot;
    var length = 0u;
    if b < params.b {
        length = params.t;
        if has(LENGTHS) {
            length = min(words_in[b * words_stride()], params.t);
        }
    }
    // Slopes of the filtered logarithms, centred at every step; a later launch goes on from the step before.
    if has(FORWARD) {
        if params.begin > 0u && params.begin < length {
            for (var j = lane; j < k; j += params.lanes) {
                sh_other[own + j] = tangent[3u * (b * params.t + params.begin - 1u) * k + j];
            }
        }
        workgroupBarrier();
        for (var t = params.begin; t < params.end; t++) {
            if has(SOFTMAX) {
                if t > 0u && t < length {
                    for (var i = lane; i < k; i += params.lanes) {
                        sh_row[own + i] = log_normaliser(b, t - 1u, i);
                    }
                }
                workgroupBarrier();
            }
            let row = b * params.t + t;
            if t < length {
                for (var j = lane; j < k; j += params.lanes) {
                    var slope = 0.0;
                    if t == 0u {
                        if has(MOVES_INIT) {
                            slope = direction_init[b * params.init_stride + j];
                        }
                    } else {
                        var mass = 0.0;
                        var sum = 0.0;
                        for (var i = 0u; i < k; i++) {
                            let share = chain_in[2u * (row - 1u) * k + i] * transition(b, t - 1u, i, j, sh_row[own + i]);
                            mass += share;
                            sum += share * (sh_other[own + i] + moves_trans(b, t - 1u, i, j));
                        }
                        slope = select(0.0, sum / mass, mass > 0.0);
                    }
                    sh_now[own + j] = slope + moves_obs(b, t, j);
                }
            }
            workgroupBarrier();
            if t < length {
                var centre = 0.0;
                for (var j = 0u; j < k; j++) {
                    centre += chain_in[2u * row * k + j] * sh_now[own + j];
                }
                for (var j = lane; j < k; j += params.lanes) {
                    sh_other[own + j] = sh_now[own + j] - centre;
                    tangent[3u * row * k + j] = sh_now[own + j] - centre;
                }
            }
            workgroupBarrier();
        }
    }
    // Slopes of the smoothed logarithms; sh_other holds what step t + 1 hands back.
    if has(BACKWARD) {
        if params.end < length {
            for (var i = lane; i < k; i += params.lanes) {
                sh_other[own + i] = tangent[(3u * (b * params.t + params.end) + 1u) * k + i];
            }
        }
        workgroupBarrier();
        for (var back = params.begin; back < params.end; back++) {
            let t = params.begin + params.end - 1u - back;
            let row = b * params.t + t;
            if has(SOFTMAX) {
                if t + 1u < length {
                    for (var i = lane; i < k; i += params.lanes) {
                        sh_row[own + i] = log_normaliser(b, t, i);
                    }
                }
                workgroupBarrier();
            }
            if t < length {
                for (var i = lane; i < k; i += params.lanes) {
                    var mass = 1.0;
                    var slope = 0.0;
                    if t + 1u < length {
                        mass = 0.0;
                        var sum = 0.0;
                        for (var j = 0u; j < k; j++) {
                            let share = transition(b, t, i, j, sh_row[own + i]) * chain_in[(2u * row + 3u) * k + j];
                            mass += share;
                            sum += share * (moves_trans(b, t, i, j) + sh_other[own + j]);
                        }
                        slope = select(0.0, sum / mass, mass > 0.0);
                    }
                    let share = chain_in[2u * row * k + i] * mass;
                    sh_now[own + i] = share * (tangent[3u * row * k + i] + slope);
                    tangent[(3u * row + 1u) * k + i] = slope;
                    tangent[(3u * row + 2u) * k + i] = share;
                }
            }
            workgroupBarrier();
            if t < length {
                var centre = 0.0;
                for (var i = 0u; i < k; i++) {
                    centre += sh_now[own + i];
                }
                for (var i = lane; i < k; i += params.lanes) {
                    if t + 1u < length {
                        tangent[(3u * row + 4u) * k + i] = sh_other[own + i] - centre;
                    }
                    let slope = tangent[(3u * row + 1u) * k + i] - centre;
                    tangent[(3u * row + 2u) * k + i] *= tangent[3u * row * k + i] + slope;
                    sh_other[own + i] = moves_obs(b, t, i) + slope;
                    tangent[(3u * row + 1u) * k + i] = sh_other[own + i];
                }
            }
            workgroupBarrier();
        }
    }
}

@group(0) @binding(1) var<storage, read> tangent_last: array<f32>;
@group(0) @binding(2) var<storage, read> words_last: array<u32>;
@group(0) @binding(3) var<storage, read_write> tangent_posterior: array<f32>;
@group(0) @binding(4) var<storage, read_write> grad_log_obs_out: array<f32>;

@compute @workgroup_size(WG)
fn hmm_tangent_posterior(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let at = group_index(wid, nwg) * WG + tid;
    if at >= params.b * params.t * params.k {
        return;
    }
    let row = at / params.k;
    let b = row / params.t;
    let t = row % params.t;
    var length = params.t;
    var observed = true;
    if has(LENGTHS) {
        length = words_last[b * words_stride()];
    }
    if has(MASKED) {
        observed = words_last[b * (1u + params.t) + 1u + t] != 0u;
    }
    let slope = select(0.0, tangent_last[(3u * row + 2u) * params.k + at % params.k], t < length);
    tangent_posterior[at] = slope;
    grad_log_obs_out[at] = select(0.0, slope, observed);
}
