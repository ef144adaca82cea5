// Most probable state paths. Maths, shapes and source: kernels/hmm_viterbi.rs.
//   hmm_viterbi        grid  ⌈B / WG⌉           thread = sequence, K ≤ 4: states in one vec4, four steps loaded ahead of the chain
//   hmm_viterbi_lanes  grid  ⌈B·lanes / WG⌉     `lanes` threads per sequence, each with states lane, lane + lanes, …
//   hmm_viterbi_path   grid  ⌈B / WG⌉           thread = sequence, back through the pointers
//   All of them take steps from_step .. to_step.      workgroup memory: 3·STATES floats, 2·PACKED words

struct HmmViterbiParams {
    b: u32,
    t: u32,
    k: u32,
    model_row: u32,
    trans_row: u32,
    trans_step: u32,
    softmax: u32,
    u: u32,
    words_row: u32,
    from_step: u32,
    to_step: u32,
    carry_in: u32,
    carry_out: u32,
    pointers_from: u32,
    pointer_words: u32,
    lanes: u32,
}

@group(0) @binding(0) var<uniform> params: HmmViterbiParams;

override WG: u32 = 64u;
override STATES: u32 = 1024u;

const IMPOSSIBLE: f32 = -1e30;
const DEAD: f32 = -1e29;
const LOWEST: f32 = -3e38;
const NONE: u32 = 0xffffffffu;
const PACKED: u32 = 256u;

@group(0) @binding(1) var<storage, read> model: array<f32>;
@group(0) @binding(2) var<storage, read> obs: array<f32>;
@group(0) @binding(3) var<storage, read> words: array<u32>;
@group(0) @binding(4) var<storage, read> log_trans: array<f32>;
@group(0) @binding(5) var<storage, read> inputs: array<f32>;
@group(0) @binding(6) var<storage, read_write> carry: array<f32>;
@group(0) @binding(7) var<storage, read_write> ends: array<u32>;
@group(0) @binding(8) var<storage, read_write> pointers: array<u32>;

fn length_of(b: u32) -> u32 {
    if params.words_row == 0u {
        return params.t;
    }
    return min(words[b * params.words_row], params.t);
}

fn observed(b: u32, t: u32) -> bool {
    return params.words_row <= 1u || words[b * params.words_row + 1u + t] != 0u;
}

// First element of the transitions into step t ≥ 1.
fn trans_at(b: u32, t: u32) -> u32 {
    return b * params.trans_row + (t - 1u) * params.trans_step;
}

// Logit of one transition: weights [U] and bias at `at`, inputs at `from_input`.
fn logit(at: u32, from_input: u32) -> f32 {
    var x = log_trans[at + params.u];
    for (var c = 0u; c < params.u; c++) {
        x += log_trans[at + c] * inputs[from_input + c];
    }
    return max(x, IMPOSSIBLE);
}

// x, in a way that no optimiser sees through: some would take (a + b) − a for b.
fn exactly(x: f32) -> f32 {
    return bitcast<f32>(bitcast<u32>(x) ^ (params.k >> 31u));
}

// hi + lo ← hi + lo + x.
fn add_to(sum: vec2<f32>, x: f32) -> vec2<f32> {
    let s = exactly(sum.x + x);
    let part = exactly(s - sum.x);
    return vec2<f32>(s, sum.y + ((sum.x - exactly(s - part)) + (x - part)));
}

// ---- a thread per sequence ----------------------------------------------------------------------------------------------

struct Walk {
    d: vec4<f32>,
    sum: vec2<f32>,
    failed: u32,
    last: u32,
    a0: vec4<f32>,
    a1: vec4<f32>,
    a2: vec4<f32>,
    a3: vec4<f32>,
}

fn obs4(b: u32, t: u32, stop: u32) -> vec4<f32> {
    var x = vec4<f32>(0.0);
    if t < stop && observed(b, t) {
        let at = (b * params.t + t) * params.k;
        x.x = obs[at];
        if params.k > 1u { x.y = obs[at + 1u]; }
        if params.k > 2u { x.z = obs[at + 2u]; }
        if params.k > 3u { x.w = obs[at + 3u]; }
    }
    return min(x, vec4<f32>(1e28));
}

fn table_row(b: u32, t: u32, i: u32) -> vec4<f32> {
    var x = vec4<f32>(IMPOSSIBLE);
    if i < params.k {
        let at = trans_at(b, t) + i * params.k;
        x.x = log_trans[at];
        if params.k > 1u { x.y = log_trans[at + 1u]; }
        if params.k > 2u { x.z = log_trans[at + 2u]; }
        if params.k > 3u { x.w = log_trans[at + 3u]; }
    }
    return x;
}

fn softmax_row(b: u32, t: u32, i: u32) -> vec4<f32> {
    var x = vec4<f32>(IMPOSSIBLE);
    if i >= params.k {
        return x;
    }
    let from_input = (b * params.t + t) * params.u;
    for (var j = 0u; j < params.k; j++) {
        x[j] = logit(b * params.trans_row + (i * params.k + j) * (params.u + 1u), from_input);
    }
    let top = max(max(x.x, x.y), max(x.z, x.w));
    let e = exp(x - top);
    return select(x - (top + log(e.x + e.y + e.z + e.w)), vec4<f32>(IMPOSSIBLE), x <= vec4<f32>(DEAD));
}

fn load_rows(w: ptr<function, Walk>, b: u32, t: u32) {
    if params.softmax != 0u {
        (*w).a0 = softmax_row(b, t, 0u);
        (*w).a1 = softmax_row(b, t, 1u);
        (*w).a2 = softmax_row(b, t, 2u);
        (*w).a3 = softmax_row(b, t, 3u);
    } else {
        (*w).a0 = table_row(b, t, 0u);
        (*w).a1 = table_row(b, t, 1u);
        (*w).a2 = table_row(b, t, 2u);
        (*w).a3 = table_row(b, t, 3u);
    }
}

// Takes in the largest entry of d, or fails at step t.
fn settle(w: ptr<function, Walk>, t: u32) -> f32 {
    let d = (*w).d;
    let top = max(max(d.x, d.y), max(d.z, d.w));
    if top <= DEAD {
        (*w).failed = t;
        return 0.0;
    }
    (*w).last = select(select(select(3u, 2u, d.z == top), 1u, d.y == top), 0u, d.x == top);
    (*w).sum = add_to((*w).sum, top);
    return top;
}

// One step; gives the four pointers, two bits each.
fn advance(w: ptr<function, Walk>, b: u32, t: u32, stop: u32, o: vec4<f32>) -> u32 {
    if t >= stop || (*w).failed != NONE {
        return 0u;
    }
    if t == 0u {
        var start = vec4<f32>(IMPOSSIBLE);
        for (var j = 0u; j < params.k; j++) {
            start[j] = max(model[b * params.model_row + j] + o[j], IMPOSSIBLE);
        }
        (*w).d = start;
        return 0u;
    }
    let top = settle(w, t - 1u);
    if (*w).failed != NONE {
        return 0u;
    }
    if params.softmax != 0u || params.trans_step != 0u {
        load_rows(w, b, t);
    }
    let d = (*w).d;
    var best = d.x + (*w).a0;
    var from_state = vec4<u32>(0u);
    var candidate = d.y + (*w).a1;
    from_state = select(from_state, vec4<u32>(1u), candidate > best);
    best = max(best, candidate);
    candidate = d.z + (*w).a2;
    from_state = select(from_state, vec4<u32>(2u), candidate > best);
    best = max(best, candidate);
    candidate = d.w + (*w).a3;
    from_state = select(from_state, vec4<u32>(3u), candidate > best);
    best = max(best, candidate);
    (*w).d = max((best - top) + o, vec4<f32>(IMPOSSIBLE));
    return from_state.x | (from_state.y << 2u) | (from_state.z << 4u) | (from_state.w << 6u);
}

@compute @workgroup_size(WG)
fn hmm_viterbi(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let b = group_index(wid, nwg) * WG + tid;
    if b >= params.b {
        return;
    }
    let stride = params.k + 2u;
    let slot_in = (params.carry_in * params.b + b) * stride;
    let end_in = 2u * (params.carry_in * params.b + b);
    let length = length_of(b);
    let stop = min(params.to_step, length);
    var w = Walk(vec4<f32>(IMPOSSIBLE), vec2<f32>(0.0), NONE, 0u, vec4<f32>(0.0), vec4<f32>(0.0), vec4<f32>(0.0), vec4<f32>(0.0));
    if params.from_step > 0u {
        for (var j = 0u; j < params.k; j++) {
            w.d[j] = carry[slot_in + j];
        }
        w.sum = vec2<f32>(carry[slot_in + params.k], carry[slot_in + params.k + 1u]);
        w.failed = ends[end_in];
        w.last = ends[end_in + 1u];
    }
    if params.softmax == 0u && params.trans_step == 0u {
        load_rows(&w, b, 1u);
    }

    var o0 = obs4(b, params.from_step, stop);
    var o1 = obs4(b, params.from_step + 1u, stop);
    var o2 = obs4(b, params.from_step + 2u, stop);
    var o3 = obs4(b, params.from_step + 3u, stop);
    for (var t = params.from_step; t < stop; t += 4u) {
        let n0 = obs4(b, t + 4u, stop);
        let n1 = obs4(b, t + 5u, stop);
        let n2 = obs4(b, t + 6u, stop);
        let n3 = obs4(b, t + 7u, stop);
        var word = advance(&w, b, t, stop, o0);
        word |= advance(&w, b, t + 1u, stop, o1) << 8u;
        word |= advance(&w, b, t + 2u, stop, o2) << 16u;
        word |= advance(&w, b, t + 3u, stop, o3) << 24u;
        pointers[b * params.pointer_words + (t - params.pointers_from) / 4u] = word;
        o0 = n0;
        o1 = n1;
        o2 = n2;
        o3 = n3;
    }

    if w.failed == NONE && params.to_step >= length && params.from_step < length {
        _ = settle(&w, length - 1u);
    }
    let slot_out = (params.carry_out * params.b + b) * stride;
    let end_out = 2u * (params.carry_out * params.b + b);
    for (var j = 0u; j < params.k; j++) {
        carry[slot_out + j] = w.d[j];
    }
    carry[slot_out + params.k] = w.sum.x;
    carry[slot_out + params.k + 1u] = w.sum.y;
    ends[end_out] = w.failed;
    ends[end_out + 1u] = w.last;
}

// ---- lanes per sequence -------------------------------------------------------------------------------------------------

var<workgroup> sh_delta: array<f32, 2u * STATES>;
var<workgroup> sh_norm: array<f32, STATES>;
var<workgroup> sh_from: array<u32, 512>;

// ln of the sum of exponentials of row i's logits.
fn log_norm(b: u32, t: u32, i: u32) -> f32 {
    let from_input = (b * params.t + t) * params.u;
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

fn log_transition(b: u32, t: u32, slot: u32, i: u32, j: u32) -> f32 {
    if params.softmax == 0u {
        return log_trans[trans_at(b, t) + i * params.k + j];
    }
    let x = logit(b * params.trans_row + (i * params.k + j) * (params.u + 1u), (b * params.t + t) * params.u);
    return select(x - sh_norm[slot + i], IMPOSSIBLE, x <= DEAD);
}

@compute @workgroup_size(WG)
fn hmm_viterbi_lanes(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let lanes = params.lanes;
    let lane = tid % lanes;
    let b = group_index(wid, nwg) * (WG / lanes) + tid / lanes;
    let here = b < params.b && lane < params.k;
    let slot = (tid / lanes) * min(params.k, lanes);
    let stride = params.k + 2u;
    var length = 0u;
    var sum = vec2<f32>(0.0);
    var failed = NONE;
    var last = 0u;
    if here {
        length = length_of(b);
        if params.from_step > 0u {
            let slot_in = (params.carry_in * params.b + b) * stride;
            let end_in = 2u * (params.carry_in * params.b + b);
            for (var j = lane; j < params.k; j += lanes) {
                sh_delta[slot + j] = carry[slot_in + j];
            }
            sum = vec2<f32>(carry[slot_in + params.k], carry[slot_in + params.k + 1u]);
            failed = ends[end_in];
            last = ends[end_in + 1u];
        }
    }
    let stop = min(params.to_step, length);
    workgroupBarrier();

    var parity = 0u;
    for (var t = params.from_step; t < params.to_step; t++) {
        // row normalisers of input-driven transitions
        if params.softmax != 0u {
            if here && t > 0u && t < stop {
                for (var i = lane; i < params.k; i += lanes) {
                    sh_norm[slot + i] = log_norm(b, t, i);
                }
            }
            workgroupBarrier();
        }

        // each lane's states
        var live = here && t < stop && failed == NONE;
        if live {
            let seen = observed(b, t);
            var top = LOWEST;
            var top_state = 0u;
            for (var j = lane; j < params.k; j += lanes) {
                var o = 0.0;
                if seen {
                    o = min(obs[(b * params.t + t) * params.k + j], 1e28);
                }
                var best = LOWEST;
                var from_state = 0u;
                if t == 0u {
                    best = model[b * params.model_row + j];
                    top = 0.0;
                } else {
                    for (var i = 0u; i < params.k; i++) {
                        let d = sh_delta[parity * STATES + slot + i];
                        if j == lane && d > top {
                            top = d;
                            top_state = i;
                        }
                        let candidate = d + log_transition(b, t, slot, i, j);
                        if candidate > best {
                            best = candidate;
                            from_state = i;
                        }
                    }
                }
                if top <= DEAD {
                    failed = t - 1u;
                    live = false;
                    break;
                }
                sh_delta[(1u - parity) * STATES + slot + j] = max((best - top) + o, IMPOSSIBLE);
                if params.k <= PACKED {
                    sh_from[(1u - parity) * PACKED + slot + j] = from_state;
                } else {
                    pointers[b * params.pointer_words + (t - params.pointers_from) * params.k + j] = from_state;
                }
            }
            if live && t > 0u {
                last = top_state;
                sum = add_to(sum, top);
            }
        }
        workgroupBarrier();
        if live {
            parity = 1u - parity;
        }

        // pointers: eight or four to a word
        if live && params.k <= PACKED {
            let per_word = select(4u, 8u, params.k <= 16u);
            let bits = 32u / per_word;
            let count = (params.k + per_word - 1u) / per_word;
            for (var w = lane; w < count; w += lanes) {
                var word = 0u;
                for (var c = 0u; c < per_word; c++) {
                    let j = w * per_word + c;
                    if j < params.k {
                        word |= sh_from[parity * PACKED + slot + j] << (bits * c);
                    }
                }
                pointers[b * params.pointer_words + (t - params.pointers_from) * count + w] = word;
            }
        }
    }

    if !here {
        return;
    }
    if failed == NONE && params.to_step >= length && params.from_step < length {
        var top = LOWEST;
        var top_state = 0u;
        for (var i = 0u; i < params.k; i++) {
            let d = sh_delta[parity * STATES + slot + i];
            if d > top {
                top = d;
                top_state = i;
            }
        }
        if top <= DEAD {
            failed = length - 1u;
        } else {
            last = top_state;
            sum = add_to(sum, top);
        }
    }
    let slot_out = (params.carry_out * params.b + b) * stride;
    for (var j = lane; j < params.k; j += lanes) {
        carry[slot_out + j] = sh_delta[parity * STATES + slot + j];
    }
    if lane == 0u {
        let end_out = 2u * (params.carry_out * params.b + b);
        carry[slot_out + params.k] = sum.x;
        carry[slot_out + params.k + 1u] = sum.y;
        ends[end_out] = failed;
        ends[end_out + 1u] = last;
    }
}

// ---- back through the pointers ------------------------------------------------------------------------------------------

@group(0) @binding(1) var<storage, read> carry_read: array<f32>;
@group(0) @binding(2) var<storage, read> words_read: array<u32>;
@group(0) @binding(3) var<storage, read> ends_read: array<u32>;
@group(0) @binding(4) var<storage, read> pointers_read: array<u32>;
@group(0) @binding(5) var<storage, read_write> state: array<u32>;
@group(0) @binding(6) var<storage, read_write> path: array<u32>;
@group(0) @binding(7) var<storage, read_write> log_prob: array<f32>;
@group(0) @binding(8) var<storage, read_write> failed: array<u32>;

// Pointer of state s at step t where a word depends on the state.
fn pointer_of(b: u32, t: u32, s: u32) -> u32 {
    let at = b * params.pointer_words;
    let step = t - params.pointers_from;
    if params.k <= 16u {
        return (pointers_read[at + step * ((params.k + 7u) / 8u) + s / 8u] >> (4u * (s % 8u))) & 15u;
    }
    if params.k <= PACKED {
        return (pointers_read[at + step * ((params.k + 3u) / 4u) + s / 4u] >> (8u * (s % 4u))) & 255u;
    }
    return pointers_read[at + step * params.k + s];
}

@compute @workgroup_size(WG)
fn hmm_viterbi_path(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let b = group_index(wid, nwg) * WG + tid;
    if b >= params.b {
        return;
    }
    var length = params.t;
    if params.words_row != 0u {
        length = min(words_read[b * params.words_row], params.t);
    }
    let end_in = 2u * (params.carry_in * params.b + b);
    let broken = ends_read[end_in];
    let stop = min(length, broken);
    var s = state[b];
    if (params.from_step < length || params.from_step == 0u) && length <= params.to_step {
        let sums = (params.carry_in * params.b + b) * (params.k + 2u) + params.k;
        failed[b] = broken;
        log_prob[2u * b] = select(IMPOSSIBLE, carry_read[sums], broken == NONE);
        log_prob[2u * b + 1u] = select(0.0, carry_read[sums + 1u], broken == NONE);
    }
    if stop <= params.from_step {
        return;
    }
    if stop <= params.to_step {
        s = ends_read[end_in + 1u];
    }
    var t = min(stop, params.to_step);
    if params.k <= 8u {
        // words do not depend on the state: eight are loaded at once
        let per_word = select(1u, 4u, params.k <= 4u);
        let bits = select(4u, 2u, params.k <= 4u);
        let at = b * params.pointer_words;
        var high = (t - 1u - params.pointers_from) / per_word + 1u;
        while high > 0u && t > params.from_step {
            var loaded: array<u32, 8>;
            for (var i = 0u; i < 8u; i++) {
                if i < high {
                    loaded[i] = pointers_read[at + high - 1u - i];
                }
            }
            for (var i = 0u; i < 8u && i < high; i++) {
                let first = params.pointers_from + (high - 1u - i) * per_word;
                while t > first && t > params.from_step {
                    t -= 1u;
                    path[b * params.t + t] = s;
                    s = (loaded[i] >> (8u * (t - first) + bits * s)) & ((1u << bits) - 1u);
                }
            }
            high -= min(high, 8u);
        }
    } else {
        while t > params.from_step {
            t -= 1u;
            path[b * params.t + t] = s;
            s = pointer_of(b, t, s);
        }
    }
    state[b] = s;
}
