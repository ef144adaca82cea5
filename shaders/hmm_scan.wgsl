// Forward-backward by an associative scan over time. Maths, shapes and source: kernels/hmm_scan.rs.
//   hmm_scan_chunks    grid  ⌈B·C·K / WG⌉   thread = sequence, chunk and row of its matrix: `chunk` steps
//   hmm_scan_merge     grid  ⌈B·G·K / WG⌉   thread = sequence, group and row: RADIX children
//   hmm_scan_down      grid  ⌈B·G·2 / WG⌉   thread = sequence, group and direction: RADIX children
//   hmm_scan_forward   grid  ⌈B·C / WG⌉     thread = sequence and chunk: `chunk` steps
//   hmm_scan_sum       grid  ⌈B / WG⌉       thread = sequence: C records
//   hmm_scan_backward  grid  ⌈B·C / WG⌉     thread = sequence and chunk: `chunk` steps
//   a vector of up to STATES states is a thread's own

struct HmmScanParams {
    b: u32,
    t: u32,
    k: u32,
    model_row: u32,
    trans_row: u32,
    trans_step: u32,
    words_row: u32,
    chunk: u32,
    chunks: u32,
    children: u32,
    groups: u32,
    child_at: u32,
    group_at: u32,
    element_at: u32,
    filtered: u32,
    predicted: u32,
    posterior: u32,
    park: u32,
    root: u32,
    record: u32,
}

@group(0) @binding(0) var<uniform> params: HmmScanParams;

override WG: u32 = 64u;
override STATES: u32 = 16u;
override RADIX: u32 = 32u;

const LOG_ZERO: f32 = -1e30;
const IMPOSSIBLE: f32 = -1e29;
const NONE: u32 = 0xffffffffu;
const DEAD: i32 = -0x1000000;
const RETRY: f32 = 8.6736174e-19;
const LN2_HIGH: f32 = 0.693359375;
const LN2_LOW: f32 = -2.12194440e-4;
const LOG2_E: f32 = 1.44269504;

@group(0) @binding(1) var<storage, read> model: array<f32>;
@group(0) @binding(2) var<storage, read> obs: array<f32>;
@group(0) @binding(3) var<storage, read> words: array<u32>;
@group(0) @binding(4) var<storage, read> log_trans: array<f32>;

// 16 = STATES: arrays of a function take no override.
var<private> v: array<f32, 16>;
var<private> pred: array<f32, 16>;
var<private> trans: array<f32, 256>;

// 2^n, at most 2^127; 0 below the normal numbers.
fn pow2(n: i32) -> f32 {
    return select(0.0, bitcast<f32>(u32(clamp(n, -126, 127) + 127) << 23u), n >= -126);
}

// e with 2^e ≤ x < 2^(e+1), for normal x > 0.
fn exponent_of(x: f32) -> i32 {
    return i32(bitcast<u32>(x) >> 23u) - 127;
}

fn length_of(b: u32) -> u32 {
    if params.words_row == 0u {
        return params.t;
    }
    return min(words[b * params.words_row], params.t);
}

fn log_b(b: u32, t: u32, j: u32) -> f32 {
    if params.words_row > 1u && words[b * params.words_row + 1u + t] == 0u {
        return 0.0;
    }
    return min(obs[(b * params.t + t) * params.k + j], 1e28);
}

// Largest log-probability of a step.
fn shift_of(b: u32, t: u32) -> f32 {
    var shift = LOG_ZERO;
    for (var j = 0u; j < params.k; j++) {
        shift = max(shift, log_b(b, t, j));
    }
    return shift;
}

// Probabilities of the transitions into step t ≥ 1.
fn load_trans(b: u32, t: u32) {
    let at = b * params.trans_row + (t - 1u) * params.trans_step;
    for (var i = 0u; i < params.k * params.k; i++) {
        let x = log_trans[at + i];
        trans[i] = select(exp_f32(x), 0.0, x <= IMPOSSIBLE);
    }
}

// pred = v·trans.
fn predict() {
    for (var j = 0u; j < params.k; j++) {
        pred[j] = 0.0;
    }
    for (var i = 0u; i < params.k; i++) {
        for (var j = 0u; j < params.k; j++) {
            pred[j] += v[i] * trans[i * params.k + j];
        }
    }
}

fn start(b: u32) {
    for (var j = 0u; j < params.k; j++) {
        let x = model[b * params.model_row + j];
        pred[j] = select(exp_f32(x), 0.0, x <= IMPOSSIBLE);
    }
}

// v = pred·b / (2^e·exp(shift)) with a sum in [1, 2); gives e, or DEAD where no state is possible.
fn observe(b: u32, t: u32, shift: f32) -> i32 {
    var sum = 0.0;
    for (var j = 0u; j < params.k; j++) {
        let x = log_b(b, t, j);
        v[j] = pred[j] * select(exp_f32(x - shift), 0.0, x <= IMPOSSIBLE);
        sum += v[j];
    }
    var n = 0;
    if sum < RETRY {
        var top = LOG_ZERO;
        for (var j = 0u; j < params.k; j++) {
            let x = log_b(b, t, j);
            v[j] = LOG_ZERO;
            if pred[j] > 0.0 && x > IMPOSSIBLE {
                v[j] = (x - shift) + log_f32(pred[j]);
            }
            top = max(top, v[j]);
        }
        if top <= IMPOSSIBLE {
            for (var j = 0u; j < params.k; j++) {
                v[j] = 0.0;
            }
            return DEAD;
        }
        let whole = floor(max(top, -1e6) * LOG2_E);
        n = i32(whole);
        sum = 0.0;
        for (var j = 0u; j < params.k; j++) {
            var x = (v[j] - whole * LN2_HIGH) - whole * LN2_LOW;
            if top < -1e6 {
                x = v[j] - top;
            }
            v[j] = exp_f32(x);
            sum += v[j];
        }
    }
    let e = exponent_of(sum);
    for (var j = 0u; j < params.k; j++) {
        v[j] *= pow2(-e);
    }
    return n + e;
}

// ---- up: the matrix of every chunk, row by row ----------------------------------------------------------------------------

@group(0) @binding(5) var<storage, read_write> elements: array<f32>;

@compute @workgroup_size(WG)
fn hmm_scan_chunks(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let at = group_index(wid, nwg) * WG + tid;
    let k = params.k;
    let row = at % k;
    let c = (at / k) % params.chunks;
    let b = at / (k * params.chunks);
    if b >= params.b {
        return;
    }
    for (var j = 0u; j < k; j++) {
        v[j] = select(0.0, 1.0, j == row);
    }
    if params.trans_step == 0u {
        load_trans(b, 1u);
    }
    var e = 0;
    let stop = min(length_of(b), (c + 1u) * params.chunk);
    for (var t = c * params.chunk; t < stop && e != DEAD; t++) {
        if t == 0u {
            start(b);
        } else {
            if params.trans_step != 0u {
                load_trans(b, t);
            }
            predict();
        }
        let more = observe(b, t, shift_of(b, t));
        e = select(e + more, DEAD, more == DEAD);
    }
    for (var j = 0u; j < k; j++) {
        elements[at * (k + 1u) + j] = v[j];
    }
    elements[at * (k + 1u) + k] = f32(max(e, DEAD));
}

// ---- up: matrices of groups -----------------------------------------------------------------------------------------------

@group(0) @binding(1) var<storage, read_write> elements_all: array<f32>;

// v ← v·element; gives the exponent taken out, relative to the largest of the element's rows.
fn times_element(first: u32) -> i32 {
    let k = params.k;
    var top = DEAD;
    var largest = DEAD;
    for (var i = 0u; i < k; i++) {
        let e = i32(elements_all[first + i * (k + 1u) + k]);
        largest = max(largest, e);
        if v[i] > 0.0 {
            top = max(top, e);
        }
    }
    for (var j = 0u; j < k; j++) {
        pred[j] = 0.0;
    }
    for (var i = 0u; i < k; i++) {
        let at = first + i * (k + 1u);
        let x = v[i] * pow2(i32(elements_all[at + k]) - top);
        for (var j = 0u; j < k && v[i] > 0.0; j++) {
            pred[j] += x * elements_all[at + j];
        }
    }
    var sum = 0.0;
    for (var j = 0u; j < k; j++) {
        sum += pred[j];
    }
    if sum <= 1e-37 {
        for (var j = 0u; j < k; j++) {
            v[j] = 0.0;
        }
        return DEAD;
    }
    let e = exponent_of(sum);
    for (var j = 0u; j < k; j++) {
        v[j] = pred[j] * pow2(-e);
    }
    return e + top - largest;
}

@compute @workgroup_size(WG)
fn hmm_scan_merge(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let at = group_index(wid, nwg) * WG + tid;
    let k = params.k;
    let row = at % k;
    let g = (at / k) % params.groups;
    let b = at / (k * params.groups);
    if b >= params.b {
        return;
    }
    for (var j = 0u; j < k; j++) {
        v[j] = select(0.0, 1.0, j == row);
    }
    var e = 0;
    let last = min((g + 1u) * RADIX, params.children);
    for (var c = g * RADIX; c < last && e != DEAD; c++) {
        let more = times_element(params.child_at + (b * params.children + c) * k * (k + 1u));
        e = select(e + more, DEAD, more == DEAD);
    }
    let out = params.group_at + at * (k + 1u);
    for (var j = 0u; j < k; j++) {
        elements_all[out + j] = v[j];
    }
    elements_all[out + k] = f32(max(e, DEAD));
}

// ---- down: forward vector at the start of every child, backward vector at its end ------------------------------------------

@group(0) @binding(2) var<storage, read_write> vectors: array<f32>;

// v ← element·v.
fn element_times(first: u32) {
    let k = params.k;
    var top = DEAD;
    for (var i = 0u; i < k; i++) {
        let at = first + i * (k + 1u);
        pred[i] = 0.0;
        for (var j = 0u; j < k; j++) {
            pred[i] += elements_all[at + j] * v[j];
        }
        if pred[i] > 0.0 {
            top = max(top, i32(elements_all[at + k]));
        }
    }
    var most = 0.0;
    for (var i = 0u; i < k; i++) {
        v[i] = pred[i] * pow2(i32(elements_all[first + i * (k + 1u) + k]) - top);
        most = max(most, v[i]);
    }
    if most > 1e-37 {
        let e = exponent_of(most);
        for (var i = 0u; i < k; i++) {
            v[i] *= pow2(-e);
        }
    }
}

@compute @workgroup_size(WG)
fn hmm_scan_down(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let at = group_index(wid, nwg) * WG + tid;
    let k = params.k;
    let back = at % 2u;
    let g = (at / 2u) % params.groups;
    let b = at / (2u * params.groups);
    if b >= params.b {
        return;
    }
    // At the root: the first element's rows are all init·b(0), so that any one of them is the start; nothing comes after the end.
    for (var j = 0u; j < k; j++) {
        if params.root != 0u {
            v[j] = select(0.0, 1.0, back == 1u || j == 0u);
        } else {
            v[j] = vectors[params.group_at + ((b * params.groups + g) * 2u + back) * k + j];
        }
    }
    let first = g * RADIX;
    let last = min(first + RADIX, params.children);
    for (var n = 0u; n < last - first; n++) {
        let c = select(first + n, last - 1u - n, back == 1u);
        let out = params.child_at + ((b * params.children + c) * 2u + back) * k;
        for (var j = 0u; j < k; j++) {
            vectors[out + j] = v[j];
        }
        let element = params.element_at + (b * params.children + c) * k * (k + 1u);
        if back == 1u {
            element_times(element);
        } else {
            _ = times_element(element);
        }
    }
}

// ---- add back: forward ----------------------------------------------------------------------------------------------------

@group(0) @binding(5) var<storage, read> vectors_in: array<f32>;
@group(0) @binding(6) var<storage, read_write> states: array<f32>;
@group(0) @binding(7) var<storage, read_write> records: array<f32>;

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

fn total_of_v() -> f32 {
    var sum = 0.0;
    for (var j = 0u; j < params.k; j++) {
        sum += v[j];
    }
    return sum;
}

fn scale_v(x: f32) {
    for (var j = 0u; j < params.k; j++) {
        v[j] *= x;
    }
}

@compute @workgroup_size(WG)
fn hmm_scan_forward(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let at = group_index(wid, nwg) * WG + tid;
    let k = params.k;
    let c = at % params.chunks;
    let b = at / params.chunks;
    if b >= params.b {
        return;
    }
    for (var j = 0u; j < k; j++) {
        v[j] = vectors_in[2u * at * k + j];
    }
    var sum = total_of_v();
    var alive = sum > 0.0;
    scale_v(select(0.0, 1.0 / sum, alive));
    sum = 1.0;
    var failed = -1.0;
    var total = vec2<f32>(0.0);
    let stop = min(length_of(b), (c + 1u) * params.chunk);
    if !alive && c * params.chunk < stop {
        failed = f32(c * params.chunk);
    }
    if params.trans_step == 0u {
        load_trans(b, 1u);
    }
    let section = params.b * params.t * k;
    for (var t = c * params.chunk; t < stop && alive; t++) {
        if t == 0u {
            start(b);
        } else {
            if params.trans_step != 0u {
                load_trans(b, t);
            }
            predict();
        }
        let row = (b * params.t + t) * k;
        if params.predicted != NONE {
            for (var j = 0u; j < k; j++) {
                states[params.predicted * section + row + j] = pred[j] / sum;
            }
        }
        let shift = shift_of(b, t);
        let e = observe(b, t, shift);
        if e == DEAD {
            failed = f32(t);
            alive = false;
        } else {
            sum = total_of_v();
            total = add_to(total, shift);
            total = add_to(total, f32(e) * LN2_HIGH);
            total = add_to(total, f32(e) * LN2_LOW);
            if params.filtered != NONE || params.posterior != NONE {
                for (var j = 0u; j < k; j++) {
                    states[params.park * section + row + j] = v[j] / sum;
                }
            }
        }
    }
    total = add_to(total, log_f32(sum));
    records[4u * at] = total.x;
    records[4u * at + 1u] = total.y;
    records[4u * at + 2u] = failed;
    records[4u * at + 3u] = 0.0;
}

// ---- likelihood of every sequence -----------------------------------------------------------------------------------------

@group(0) @binding(1) var<storage, read> records_in: array<f32>;
@group(0) @binding(2) var<storage, read_write> summary: array<f32>;

@compute @workgroup_size(WG)
fn hmm_scan_sum(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let b = group_index(wid, nwg) * WG + tid;
    if b >= params.b {
        return;
    }
    var total = vec2<f32>(0.0);
    var failed = -1.0;
    for (var c = 0u; c < params.chunks; c++) {
        let at = 4u * (b * params.chunks + c);
        total = add_to(total, records_in[at]);
        total = add_to(total, records_in[at + 1u]);
        if failed < 0.0 {
            failed = records_in[at + 2u];
        }
    }
    let high = exactly(total.x + total.y);
    summary[b * params.record] = select(high, LOG_ZERO, failed >= 0.0);
    summary[b * params.record + 1u] = select((total.x - high) + total.y, 0.0, failed >= 0.0);
    summary[b * params.record + 2u] = failed;
    summary[b * params.record + 3u] = 0.0;
}

// ---- add back: backward ---------------------------------------------------------------------------------------------------

@group(0) @binding(1) var<storage, read> words_in: array<u32>;
@group(0) @binding(2) var<storage, read> log_trans_in: array<f32>;
@group(0) @binding(3) var<storage, read> vectors_read: array<f32>;
@group(0) @binding(4) var<storage, read> summary_in: array<f32>;
@group(0) @binding(5) var<storage, read_write> states_out: array<f32>;

fn load_trans_in(b: u32, t: u32) {
    let at = b * params.trans_row + (t - 1u) * params.trans_step;
    for (var i = 0u; i < params.k * params.k; i++) {
        let x = log_trans_in[at + i];
        trans[i] = select(exp_f32(x), 0.0, x <= IMPOSSIBLE);
    }
}

var<private> gamma: array<f32, 16>;

@compute @workgroup_size(WG)
fn hmm_scan_backward(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let at = group_index(wid, nwg) * WG + tid;
    let k = params.k;
    let c = at % params.chunks;
    let b = at / params.chunks;
    if b >= params.b {
        return;
    }
    var length = params.t;
    if params.words_row != 0u {
        length = min(words_in[b * params.words_row], params.t);
    }
    let stop = min(length, (c + 1u) * params.chunk);
    let possible = summary_in[b * params.record + 2u] < 0.0;
    let section = params.b * params.t * k;
    if params.trans_step == 0u {
        load_trans_in(b, 1u);
    }
    for (var t = stop; t > c * params.chunk; ) {
        t -= 1u;
        let row = (b * params.t + t) * k;
        for (var j = 0u; j < k; j++) {
            v[j] = select(0.0, states_out[params.park * section + row + j], possible);
        }
        if t + 1u == stop {
            for (var j = 0u; j < k; j++) {
                v[j] *= vectors_read[(2u * at + 1u) * k + j];
            }
        } else {
            if params.trans_step != 0u {
                load_trans_in(b, t + 1u);
            }
            predict();
            for (var j = 0u; j < k; j++) {
                pred[j] = select(0.0, gamma[j] / pred[j], pred[j] > 0.0);
            }
            for (var i = 0u; i < k; i++) {
                var sum = 0.0;
                for (var j = 0u; j < k; j++) {
                    sum += trans[i * k + j] * pred[j];
                }
                v[i] *= sum;
            }
        }
        let sum = total_of_v();
        for (var j = 0u; j < k; j++) {
            gamma[j] = select(0.0, v[j] / sum, sum > 0.0);
            states_out[params.posterior * section + row + j] = gamma[j];
        }
    }
}
