// LSTM and GRU over whole sequences on software adapters, where an invocation is a lane of the processor's vector: a load is a loop over
// the lanes that costs ten multiply-adds (four reals in one such loop cost two of four reals alone), and a shader with barriers keeps its
// variables in memory. So there are none, and loads are whole vectors: a thread owns whole sequences, its states in memory. Maths, shapes
// and source: kernels/recurrent.rs; H, y_stride and y_offset multiples of 4, H up to 128, I at least 4.
//   lstm_forward_blocks, gru_forward_blocks    grid ⌈M·⌈B/4⌉ / WG⌉   thread = four sequences: 4 units × 4 gates of them at a time
//   lstm_backward_blocks, gru_backward_blocks  as forward            thread = four sequences: 8 units of them at a time
//   recurrent_gradients_blocks                 grid tiles of grad_x, of grad w_ih, of grad w_hh and the bias; thread = 8 × 8 of a product

struct RecurrentParams {
    models: u32,
    batch: u32,
    rows: u32,
    row0: u32,
    time: u32,
    inputs: u32,
    hidden: u32,
    from_step: u32,
    to_step: u32,
    y_stride: u32,
    y_offset: u32,
    slices: u32,
    slice0: u32,
    slice_count: u32,
    slice_rows: u32,
    time_parts: u32,
    flags: u32,
}

@group(0) @binding(0) var<uniform> params: RecurrentParams;

override WG: u32 = 8u;

const GRU: u32 = 1u;
const GATES: u32 = 2u;
const STATES: u32 = 4u;
const LENGTHS: u32 = 8u;
const RESETS: u32 = 16u;
const REVERSE: u32 = 32u;
const H0: u32 = 64u;
const C0: u32 = 128u;
const LEARNED: u32 = 256u;
const X_SHARED: u32 = 512u;
const BIAS: u32 = 1024u;
const GRAD_Y: u32 = 2048u;
const GRAD_X: u32 = 4096u;
const GRAD_HN: u32 = 8192u;
const GRAD_CN: u32 = 16384u;
const GRAD_W: u32 = 32768u;

fn has(bit: u32) -> bool {
    return (params.flags & bit) != 0u;
}

// y, or x where x is NaN: clamps and maxima drop it.
fn keep_nan(y: vec4<f32>, x: vec4<f32>) -> vec4<f32> {
    return select(y, x, (bitcast<vec4<u32>>(x) & vec4<u32>(0x7fffffffu)) > vec4<u32>(0x7f800000u));
}

fn sigmoid4(x: vec4<f32>) -> vec4<f32> {
    return keep_nan(1.0 / (1.0 + exp_vec4(-clamp(x, vec4<f32>(-80.0), vec4<f32>(80.0)))), x);
}

// A series below 0.25, where 1 − 2 / (e^2x + 1) cancels.
fn tanh4(x: vec4<f32>) -> vec4<f32> {
    let e = exp_vec4(2.0 * clamp(x, vec4<f32>(-20.0), vec4<f32>(20.0)));
    let s = x * x;
    let near = x * (1.0 + s * (-0.33333333 + s * (0.13333333 + s * (-0.053968254 + s * 0.021869488))));
    return keep_nan(select((e - 1.0) / (e + 1.0), near, abs(x) < vec4<f32>(0.25)), x);
}

// Reals kept per step, and where h(t−1) begins in them.
fn kept_h() -> u32 {
    return select(0u, 4u * params.hidden, has(GATES));
}

fn width() -> u32 {
    return kept_h() + select(2u, 1u, has(GRU)) * params.hidden;
}

// Rows of w_ih and w_hh.
fn gate_rows() -> u32 {
    return select(4u, 3u, has(GRU)) * params.hidden;
}

// ---- which sequences --------------------------------------------------------------------------------------------

// A sequence of a thread: model, sequence of the launch and of the model, valid steps, whether it is there.
struct Sequence {
    model: u32,
    q: u32,
    b: u32,
    length: u32,
    there: bool,
}

// Sequence `which` (0 to 3) of a thread.
fn sequence_of(thread: u32, which: u32) -> Sequence {
    let own = params.rows / params.models;
    let fours = (own + 3u) / 4u;
    let live = thread < params.models * fours;
    let model = select(0u, thread / fours, live);
    let at = select(0u, 4u * (thread % fours) + which, live);
    let inside = min(at, own - 1u);
    var length = params.time;
    if has(LENGTHS) {
        length = min(length, lengths[params.row0 + inside]);
    }
    return Sequence(model, model * own + inside, params.row0 + inside, length, live && at < own);
}

@group(0) @binding(3) var<storage, read> lengths: array<u32>;
@group(0) @binding(4) var<storage, read> resets: array<u32>;

// The time index of processing step s.
fn step_of(s: u32, length: u32) -> u32 {
    return select(min(s, params.time - 1u), length - 1u - min(s, length - 1u), has(REVERSE) && s < length);
}

// Whether the state goes back to its start before processing step s.
fn resets_at(s: u32, sq: Sequence) -> bool {
    if has(RESETS) {
        return s < sq.length && resets[sq.b * params.time + step_of(s, sq.length)] != 0u;
    }
    return false;
}

// ---- forward ----------------------------------------------------------------------------------------------------

@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read> packed: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read_write> state: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read_write> y: array<vec4<f32>>;
@group(0) @binding(7) var<storage, read_write> saved: array<vec4<f32>>;

fn x_quad(at: u32) -> vec4<f32> {
    return vec4<f32>(x[at], x[at + 1u], x[at + 2u], x[at + 3u]);
}

fn state_quad(at: u32) -> vec4<f32> {
    return state[at / 4u];
}

fn packed_quad(at: u32) -> vec4<f32> {
    return packed[at / 4u];
}

fn put_state(at: u32, v: vec4<f32>) {
    state[at / 4u] = v;
}

fn put_y(at: u32, v: vec4<f32>) {
    y[at / 4u] = v;
}

fn y_quad(at: u32) -> vec4<f32> {
    return y[at / 4u];
}

fn put_saved(at: u32, v: vec4<f32>) {
    saved[at / 4u] = v;
}

// h (which = 0) or c (1) that a sequence starts from, four units from j on.
fn start_of(which: u32, model: u32, b: u32, j: u32) -> vec4<f32> {
    let h = params.hidden;
    let row = select(model * params.batch + b, model, has(LEARNED));
    var start = vec4<f32>(0.0);
    if has(select(C0, H0, which == 0u)) {
        start = state_quad((which * params.models * params.batch + row) * h + j);
    }
    return start;
}

// Pre-activations of four sequences: a column per gate, four units down.
struct Sums {
    a: mat4x4<f32>,
    b: mat4x4<f32>,
    c: mat4x4<f32>,
    d: mat4x4<f32>,
}

// Adds an input of the four whose weights lie at `at`.
fn add_input(sums: Sums, at: u32, v: vec4<f32>) -> Sums {
    let w = transpose(mat4x4<f32>(packed_quad(at), packed_quad(at + 4u), packed_quad(at + 8u), packed_quad(at + 12u)));
    return Sums(sums.a + w * v.x, sums.b + w * v.y, sums.c + w * v.z, sums.d + w * v.w);
}

// Adds four inputs, a column each.
fn add_inputs(sums: Sums, at: u32, v: mat4x4<f32>) -> Sums {
    let next = 4u * params.hidden;
    return add_input(add_input(add_input(add_input(sums, at, v[0]), at + next, v[1]), at + 2u * next, v[2]), at + 3u * next, v[3]);
}

// The cell of four units of one sequence, whose h lies at `at` and c `all` behind; `slot` is its step. Writes y, c and what backward keeps.
fn cell(gru: bool, a: mat4x4<f32>, at: u32, all: u32, slot: u32, j: u32, there: bool, valid: bool) {
    let h = params.hidden;
    let last = state_quad(at);
    var g: mat4x4<f32>;
    var next: vec4<f32>;
    var c_last = vec4<f32>(0.0);
    var c_next = c_last;
    g[0] = sigmoid4(a[0]);
    g[1] = sigmoid4(a[1]);
    if gru {
        g[2] = tanh4(a[2] + g[0] * a[3]);
        g[3] = a[3];
        next = (1.0 - g[1]) * g[2] + g[1] * last;
    } else {
        c_last = state_quad(at + all);
        g[2] = tanh4(a[2]);
        g[3] = sigmoid4(a[3]);
        c_next = g[1] * c_last + g[0] * g[2];
        next = g[3] * tanh4(c_next);
    }
    if there {
        put_y(slot * params.y_stride + params.y_offset + j, select(vec4<f32>(0.0), next, valid));
    }
    if there && valid {
        if !gru {
            put_state(at + all, c_next);
        }
        if has(GATES) {
            let kept = slot * width() + j;
            put_saved(kept, g[0]);
            put_saved(kept + h, g[1]);
            put_saved(kept + 2u * h, g[2]);
            put_saved(kept + 3u * h, g[3]);
        }
        if has(STATES) {
            let kept = slot * width() + kept_h() + j;
            put_saved(kept, last);
            if !gru {
                put_saved(kept + h, c_last);
            }
        }
    }
}

// Offset of a sequence's moving state.
fn moving(sq: Sequence) -> u32 {
    return (2u * params.models * params.batch + sq.model * params.batch + sq.b) * params.hidden;
}

// Puts a sequence's state back to its start.
fn restart(sq: Sequence, at: u32, all: u32) {
    for (var j = 0u; j < params.hidden; j += 4u) {
        put_state(at + j, start_of(0u, sq.model, sq.b, j));
        put_state(at + all + j, start_of(1u, sq.model, sq.b, j));
    }
}

fn forward(gru: bool, thread: u32) {
    let h = params.hidden;
    let n = params.inputs;
    let all = params.models * params.batch * h;
    let one = sequence_of(thread, 0u);
    let two = sequence_of(thread, 1u);
    let three = sequence_of(thread, 2u);
    let four = sequence_of(thread, 3u);
    let at = vec4<u32>(moving(one), moving(two), moving(three), moving(four));
    for (var s = 0u; s < min(4u, params.rows); s++) {
        let sq = sequence_of(thread, s);
        if sq.there && params.from_step == 0u {
            restart(sq, moving(sq), all);
        }
    }
    for (var step = params.from_step; step < params.to_step; step++) {
        let time = vec4<u32>(step_of(step, one.length), step_of(step, two.length), step_of(step, three.length), step_of(step, four.length));
        let slot = vec4<u32>(one.q, two.q, three.q, four.q) * params.time + time;
        let x_at = select(slot, vec4<u32>(one.b, two.b, three.b, four.b) * params.time + time, vec4<bool>(has(X_SHARED))) * n;
        for (var s = 0u; s < min(4u, params.rows); s++) {
            let sq = sequence_of(thread, s);
            if sq.there && step > 0u && resets_at(step, sq) {
                restart(sq, moving(sq), all);
            }
        }
        // gates and c, four units at a time; h stays as it is, y takes the new one
        for (var j = 0u; j < h; j += 4u) {
            let w = (one.model * (n + h + 1u) * h + j) * 4u;
            var sums = add_input(Sums(), w + (n + h) * h * 4u, vec4<f32>(1.0));
            var k = 0u;
            for (; k + 4u <= n; k += 4u) {
                sums = add_inputs(sums, w + k * h * 4u, transpose(mat4x4<f32>(x_quad(x_at.x + k), x_quad(x_at.y + k), x_quad(x_at.z + k), x_quad(x_at.w + k))));
            }
            for (; k < n; k++) {
                sums = add_input(sums, w + k * h * 4u, vec4<f32>(x[x_at.x + k], x[x_at.y + k], x[x_at.z + k], x[x_at.w + k]));
            }
            for (k = 0u; k < h; k += 4u) {
                let v = transpose(mat4x4<f32>(state_quad(at.x + k), state_quad(at.y + k), state_quad(at.z + k), state_quad(at.w + k)));
                sums = add_inputs(sums, w + (n + k) * h * 4u, v);
            }
            cell(gru, sums.a, at.x + j, all, slot.x, j, one.there, step < one.length);
            cell(gru, sums.b, at.y + j, all, slot.y, j, two.there, step < two.length);
            cell(gru, sums.c, at.z + j, all, slot.z, j, three.there, step < three.length);
            cell(gru, sums.d, at.w + j, all, slot.w, j, four.there, step < four.length);
        }
        for (var j = 0u; j < h; j += 4u) {
            if one.there && step < one.length {
                put_state(at.x + j, y_quad(slot.x * params.y_stride + params.y_offset + j));
            }
            if two.there && step < two.length {
                put_state(at.y + j, y_quad(slot.y * params.y_stride + params.y_offset + j));
            }
            if three.there && step < three.length {
                put_state(at.z + j, y_quad(slot.z * params.y_stride + params.y_offset + j));
            }
            if four.there && step < four.length {
                put_state(at.w + j, y_quad(slot.w * params.y_stride + params.y_offset + j));
            }
        }
    }
}

@compute @workgroup_size(WG)
fn lstm_forward_blocks(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    forward(false, group_index(wid, nwg) * WG + tid);
}

@compute @workgroup_size(WG)
fn gru_forward_blocks(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    forward(true, group_index(wid, nwg) * WG + tid);
}

// ---- backward ---------------------------------------------------------------------------------------------------

@group(0) @binding(1) var<storage, read> saved_first: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> w_hh: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read> grad_y: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read_write> gates_moving: array<vec4<f32>>;
@group(0) @binding(7) var<storage, read_write> moving_sums: array<vec4<f32>>;

fn saved_quad(at: u32) -> vec4<f32> {
    return saved_first[at / 4u];
}

fn w_hh_quad(at: u32) -> vec4<f32> {
    return w_hh[at / 4u];
}

// Four rows of w_hh from `at` on, a column each.
fn w_hh_rows(at: u32) -> mat4x4<f32> {
    let h = params.hidden;
    return mat4x4<f32>(w_hh_quad(at), w_hh_quad(at + h), w_hh_quad(at + 2u * h), w_hh_quad(at + 3u * h));
}

fn grad_y_quad(at: u32) -> vec4<f32> {
    return grad_y[at / 4u];
}

fn gates_quad(at: u32) -> vec4<f32> {
    return gates_moving[at / 4u];
}

fn sums_quad(at: u32) -> vec4<f32> {
    return moving_sums[at / 4u];
}

fn put_gates(at: u32, v: vec4<f32>) {
    gates_moving[at / 4u] = v;
}

fn put_sums(at: u32, v: vec4<f32>) {
    moving_sums[at / 4u] = v;
}

// Gates of four units as forward had them: kept, or from their pre-activations.
fn gates_again(gru: bool, kept: u32, own: u32) -> mat4x4<f32> {
    let h = params.hidden;
    if has(GATES) {
        return mat4x4<f32>(saved_quad(kept), saved_quad(kept + h), saved_quad(kept + 2u * h), saved_quad(kept + 3u * h));
    }
    var a = mat4x4<f32>(gates_quad(own), gates_quad(own + h), gates_quad(own + 2u * h), gates_quad(own + 3u * h));
    a[0] = sigmoid4(a[0]);
    a[1] = sigmoid4(a[1]);
    if gru {
        a[2] = tanh4(a[2] + a[0] * a[3]);
    } else {
        a[2] = tanh4(a[2]);
        a[3] = sigmoid4(a[3]);
    }
    return a;
}

// Sums of a sequence: gradients of h and c on their way, then of the start, each `all` behind the one before.
fn sums_at(sq: Sequence) -> u32 {
    return (sq.model * params.batch + sq.b) * params.hidden;
}

fn back_begin(at: u32, all: u32, there: bool) {
    let z = vec4<f32>(0.0);
    for (var j = 0u; there && j < params.hidden; j += 4u) {
        if !has(GRAD_HN) {
            put_sums(at + j, z);
        }
        if !has(GRAD_CN) {
            put_sums(all + at + j, z);
        }
        put_sums(2u * all + at + j, z);
        put_sums(3u * all + at + j, z);
    }
}

// δ of four units of one sequence at a step; what goes to h and c of the step before besides.
fn delta_of(gru: bool, at: u32, all: u32, slot: u32, j: u32, there: bool, valid: bool) {
    let h = params.hidden;
    let kept = slot * width() + j;
    let own = slot * 4u * h + j;
    let g = gates_again(gru, kept, own);
    var d = sums_quad(at + j);
    if has(GRAD_Y) {
        d += grad_y_quad(slot * params.y_stride + params.y_offset + j);
    }
    let z = vec4<f32>(0.0);
    var delta: mat4x4<f32>;
    var through = z;
    var grad_c = z;
    if gru {
        let last = saved_quad(kept + kept_h());
        let dn = d * (1.0 - g[1]) * (1.0 - g[2] * g[2]);
        delta[0] = dn * g[3] * g[0] * (1.0 - g[0]);
        delta[1] = d * (last - g[2]) * g[1] * (1.0 - g[1]);
        delta[2] = dn;
        delta[3] = dn * g[0];
        through = d * g[1];
    } else {
        let last = saved_quad(kept + kept_h() + h);
        let t = tanh4(g[1] * last + g[0] * g[2]);
        let e = sums_quad(all + at + j) + d * g[3] * (1.0 - t * t);
        delta[0] = e * g[2] * g[0] * (1.0 - g[0]);
        delta[1] = e * last * g[1] * (1.0 - g[1]);
        delta[2] = e * g[0] * (1.0 - g[2] * g[2]);
        delta[3] = d * t * g[3] * (1.0 - g[3]);
        grad_c = e * g[1];
    }
    if there {
        put_gates(own, select(z, delta[0], valid));
        put_gates(own + h, select(z, delta[1], valid));
        put_gates(own + 2u * h, select(z, delta[2], valid));
        put_gates(own + 3u * h, select(z, delta[3], valid));
        if valid {
            put_sums(at + j, through);
            put_sums(all + at + j, grad_c);
        }
    }
}

// Adds to h's gradient what comes through w_hh, and moves it to the start's where the step began anew.
fn back_step(at: u32, all: u32, sum: vec4<f32>, there: bool, reset: bool) {
    let h = sums_quad(at) + sum;
    if there {
        put_sums(at, select(h, vec4<f32>(0.0), reset));
        if reset {
            put_sums(2u * all + at, sums_quad(2u * all + at) + h);
            put_sums(3u * all + at, sums_quad(3u * all + at) + sums_quad(all + at));
            put_sums(all + at, vec4<f32>(0.0));
        }
    }
}

fn back_end(at: u32, all: u32, there: bool) {
    for (var j = 0u; there && j < params.hidden; j += 4u) {
        put_sums(2u * all + at + j, sums_quad(2u * all + at + j) + sums_quad(at + j));
        put_sums(3u * all + at + j, sums_quad(3u * all + at + j) + sums_quad(all + at + j));
    }
}

// Two quads of units of four sequences.
struct Columns {
    a0: vec4<f32>,
    b0: vec4<f32>,
    c0: vec4<f32>,
    d0: vec4<f32>,
    a1: vec4<f32>,
    b1: vec4<f32>,
    c1: vec4<f32>,
    d1: vec4<f32>,
}

fn backward(gru: bool, thread: u32) {
    let h = params.hidden;
    let all = params.models * params.batch * h;
    let one = sequence_of(thread, 0u);
    let two = sequence_of(thread, 1u);
    let three = sequence_of(thread, 2u);
    let four = sequence_of(thread, 3u);
    let at = vec4<u32>(sums_at(one), sums_at(two), sums_at(three), sums_at(four));
    for (var s = 0u; s < min(4u, params.rows); s++) {
        let sq = sequence_of(thread, s);
        back_begin(sums_at(sq), all, sq.there && params.to_step == params.time);
    }
    for (var step = params.to_step; step > params.from_step; step--) {
        let time = vec4<u32>(step_of(step - 1u, one.length), step_of(step - 1u, two.length), step_of(step - 1u, three.length), step_of(step - 1u, four.length));
        let slot = vec4<u32>(one.q, two.q, three.q, four.q) * params.time + time;
        let valid = vec4<bool>(one.there && step - 1u < one.length, two.there && step - 1u < two.length, three.there && step - 1u < three.length, four.there && step - 1u < four.length);
        for (var j = 0u; j < h; j += 4u) {
            delta_of(gru, at.x, all, slot.x, j, one.there, valid.x);
            delta_of(gru, at.y, all, slot.y, j, two.there, valid.y);
            delta_of(gru, at.z, all, slot.z, j, three.there, valid.z);
            delta_of(gru, at.w, all, slot.w, j, four.there, valid.w);
        }
        let reset = vec4<bool>(resets_at(step - 1u, one), resets_at(step - 1u, two), resets_at(step - 1u, three), resets_at(step - 1u, four));
        let own = slot * 4u * h;
        for (var k = 0u; k < h; k += 8u) {
            let quad = quads_of(k, h);
            var sum: Columns;
            // rows of w_hh; a GRU's third has the fourth's δ
            for (var c = 0u; c < gate_rows(); c += 4u) {
                let from_gate = c + select(0u, h, gru && c >= 2u * h);
                let w = (one.model * gate_rows() + c) * h;
                let w0 = w_hh_rows(w + quad.x);
                let w1 = w_hh_rows(w + quad.y);
                let a = gates_quad(own.x + from_gate);
                sum.a0 += w0 * a;
                sum.a1 += w1 * a;
                let b = gates_quad(own.y + from_gate);
                sum.b0 += w0 * b;
                sum.b1 += w1 * b;
                let c = gates_quad(own.z + from_gate);
                sum.c0 += w0 * c;
                sum.c1 += w1 * c;
                let d = gates_quad(own.w + from_gate);
                sum.d0 += w0 * d;
                sum.d1 += w1 * d;
            }
            back_step(at.x + k, all, sum.a0, valid.x, reset.x);
            back_step(at.y + k, all, sum.b0, valid.y, reset.y);
            back_step(at.z + k, all, sum.c0, valid.z, reset.z);
            back_step(at.w + k, all, sum.d0, valid.w, reset.w);
            back_step(at.x + k + 4u, all, sum.a1, valid.x && k + 4u < h, reset.x);
            back_step(at.y + k + 4u, all, sum.b1, valid.y && k + 4u < h, reset.y);
            back_step(at.z + k + 4u, all, sum.c1, valid.z && k + 4u < h, reset.z);
            back_step(at.w + k + 4u, all, sum.d1, valid.w && k + 4u < h, reset.w);
        }
    }
    for (var s = 0u; s < min(4u, params.rows); s++) {
        let sq = sequence_of(thread, s);
        back_end(sums_at(sq), all, sq.there && params.from_step == 0u);
    }
}

@compute @workgroup_size(WG)
fn lstm_backward_blocks(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    backward(false, group_index(wid, nwg) * WG + tid);
}

@compute @workgroup_size(WG)
fn gru_backward_blocks(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    backward(true, group_index(wid, nwg) * WG + tid);
}

// ---- products ---------------------------------------------------------------------------------------------------

@group(0) @binding(2) var<storage, read> saved_in: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read> w_ih_fourth: array<f32>;
@group(0) @binding(5) var<storage, read> gates_in: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read_write> grad_x: array<f32>;
@group(0) @binding(7) var<storage, read_write> sums: array<f32>;

fn saved_in_quad(at: u32) -> vec4<f32> {
    return saved_in[at / 4u];
}

fn w_ih_quad(at: u32) -> vec4<f32> {
    return vec4<f32>(w_ih_fourth[at], w_ih_fourth[at + 1u], w_ih_fourth[at + 2u], w_ih_fourth[at + 3u]);
}

fn delta_quad(at: u32) -> vec4<f32> {
    return gates_in[at / 4u];
}

// Eight columns of a product as two quads: where each begins, so that it lies inside `columns` ≥ 4, and from which column on it counts.
fn quads_of(k: u32, columns: u32) -> vec2<u32> {
    return min(vec2<u32>(k, k + 4u), vec2<u32>(columns - 4u));
}

// A quad of columns of eight rows of a product.
struct Eight {
    a: vec4<f32>,
    b: vec4<f32>,
    c: vec4<f32>,
    d: vec4<f32>,
    e: vec4<f32>,
    f: vec4<f32>,
    g: vec4<f32>,
    h: vec4<f32>,
}

fn zero_eight() -> Eight {
    let z = vec4<f32>(0.0);
    return Eight(z, z, z, z, z, z, z, z);
}

// Adds a step to eight rows of a product: the first quad of their columns, or the second.
fn outer(x: Eight, left_lo: vec4<f32>, left_hi: vec4<f32>, right: vec4<f32>) -> Eight {
    return Eight(x.a + left_lo.x * right, x.b + left_lo.y * right, x.c + left_lo.z * right, x.d + left_lo.w * right, x.e + left_hi.x * right, x.f + left_hi.y * right, x.g + left_hi.z * right, x.h + left_hi.w * right);
}

fn row_of(x: Eight, r: u32) -> vec4<f32> {
    switch r {
        case 0u: { return x.a; }
        case 1u: { return x.b; }
        case 2u: { return x.c; }
        case 3u: { return x.d; }
        case 4u: { return x.e; }
        case 5u: { return x.f; }
        case 6u: { return x.g; }
        default: { return x.h; }
    }
}

fn grad_x_block(item: u32) {
    let own = params.rows / params.models;
    let steps = own * params.time;
    let columns = params.inputs;
    let across = (columns + 7u) / 8u;
    let down = (steps + 7u) / 8u;
    let model = item / (across * down);
    if model >= params.models {
        return;
    }
    let first = 8u * (item / across % down);
    let k = 8u * (item % across);
    let quad = quads_of(k, columns);
    let row = (model * steps + min(vec4<u32>(first) + vec4<u32>(0u, 1u, 2u, 3u), vec4<u32>(steps - 1u))) * 4u * params.hidden;
    let row_hi = (model * steps + min(vec4<u32>(first) + vec4<u32>(4u, 5u, 6u, 7u), vec4<u32>(steps - 1u))) * 4u * params.hidden;
    let weights = model * gate_rows() * columns;
    var left = zero_eight();
    var right = zero_eight();
    for (var c = 0u; c < gate_rows(); c += 4u) {
        let lo = transpose(mat4x4<f32>(delta_quad(row.x + c), delta_quad(row.y + c), delta_quad(row.z + c), delta_quad(row.w + c)));
        let hi = transpose(mat4x4<f32>(delta_quad(row_hi.x + c), delta_quad(row_hi.y + c), delta_quad(row_hi.z + c), delta_quad(row_hi.w + c)));
        let w = weights + c * columns;
        left = outer(left, lo[0], hi[0], w_ih_quad(w + quad.x));
        right = outer(right, lo[0], hi[0], w_ih_quad(w + quad.y));
        left = outer(left, lo[1], hi[1], w_ih_quad(w + columns + quad.x));
        right = outer(right, lo[1], hi[1], w_ih_quad(w + columns + quad.y));
        left = outer(left, lo[2], hi[2], w_ih_quad(w + 2u * columns + quad.x));
        right = outer(right, lo[2], hi[2], w_ih_quad(w + 2u * columns + quad.y));
        left = outer(left, lo[3], hi[3], w_ih_quad(w + 3u * columns + quad.x));
        right = outer(right, lo[3], hi[3], w_ih_quad(w + 3u * columns + quad.y));
    }
    for (var r = 0u; r < min(8u, steps - first); r++) {
        let at = (model * steps + first + r) * columns;
        let a = row_of(left, r);
        let b = row_of(right, r);
        for (var e = 0u; e < 4u; e++) {
            if quad.x + e >= k {
                grad_x[at + quad.x + e] = a[e];
            }
            if quad.y + e >= k + 4u {
                grad_x[at + quad.y + e] = b[e];
            }
        }
    }
}

// Writes the gradient of the weight of input k (x, h, 1) in column c of the four gates.
fn put_weight(slice: u32, model: u32, c: u32, k: u32, v: f32) {
    let h = params.hidden;
    let n = params.inputs;
    let rows = gate_rows();
    let gru = has(GRU);
    let gate = c / h;
    let each = params.models * rows * (n + h + select(1u, 2u, gru));
    let base = params.models * h * (4u * params.batch + 2u) + slice * each;
    let input_row = model * rows + c;
    let hidden_row = input_row - select(0u, h, gru && gate == 3u);
    let no_input = gru && gate == 3u;
    let no_hidden = gru && gate == 2u;
    if k < n {
        if !no_input {
            sums[base + input_row * n + k] = v;
        }
    } else if k < n + h {
        if !no_hidden {
            sums[base + params.models * rows * n + hidden_row * h + k - n] = v;
        }
    } else {
        let biases = base + params.models * rows * (n + h);
        if !no_input {
            sums[biases + input_row] = v;
        }
        if gru && !no_hidden {
            sums[biases + params.models * rows + hidden_row] = v;
        }
    }
}

// Eight columns of the gates × eight inputs, of x or of h, over the steps of a slice; with those of h's first block the bias.
fn weight_block(item: u32, of_x: bool) {
    let own = params.rows / params.models;
    let t = params.time;
    let rows = 4u * params.hidden;
    let columns = select(params.hidden, params.inputs, of_x);
    let across = (columns + 7u) / 8u;
    let down = rows / 8u;
    let slice = params.slice0 + item / (across * down) % params.slice_count;
    let model = item / (across * down * params.slice_count);
    if model >= params.models {
        return;
    }
    let c = 8u * (item / across % down);
    let k = 8u * (item % across);
    let quad = quads_of(k, columns);
    // steps of the slice, counted over the model's B·T
    var first = slice * params.slice_rows * t;
    var last = first + params.slice_rows * t;
    if params.time_parts > 1u {
        let part = (t + params.time_parts - 1u) / params.time_parts;
        let p = slice % params.time_parts;
        first = slice / params.time_parts * t + min(p * part, t);
        last = slice / params.time_parts * t + min((p + 1u) * part, t);
    }
    last = min(last, params.batch * t);
    var left = zero_eight();
    var right = zero_eight();
    var bias_lo = vec4<f32>(0.0);
    var bias_hi = vec4<f32>(0.0);
    for (var b = first / t; b * t < last; b++) {
        let q = model * own + b - params.row0;
        var end = min(last - b * t, t);
        if has(LENGTHS) {
            end = min(end, lengths[b]);
        }
        let from_row = max(first, b * t) - b * t;
        var delta = (q * t + from_row) * rows + c;
        var input = (q * t + from_row) * width() + kept_h();
        var stride = width();
        if of_x {
            input = (select(q, b, has(X_SHARED)) * t + from_row) * columns;
            stride = columns;
        }
        for (var s = from_row; s < end; s++) {
            let lo = delta_quad(delta);
            let hi = delta_quad(delta + 4u);
            var x0: vec4<f32>;
            var x1: vec4<f32>;
            if of_x {
                x0 = x_quad(input + quad.x);
                x1 = x_quad(input + quad.y);
            } else {
                x0 = saved_in_quad(input + quad.x);
                x1 = saved_in_quad(input + quad.y);
                bias_lo += lo;
                bias_hi += hi;
            }
            left = outer(left, lo, hi, x0);
            right = outer(right, lo, hi, x1);
            delta += rows;
            input += stride;
        }
    }
    let offset = select(params.inputs, 0u, of_x);
    for (var r = 0u; r < 8u; r++) {
        let a = row_of(left, r);
        let b = row_of(right, r);
        for (var e = 0u; e < 4u; e++) {
            if quad.x + e >= k {
                put_weight(slice, model, c + r, offset + quad.x + e, a[e]);
            }
            if quad.y + e >= k + 4u {
                put_weight(slice, model, c + r, offset + quad.y + e, b[e]);
            }
        }
        if !of_x && k == 0u {
            put_weight(slice, model, c + r, params.inputs + params.hidden, select(bias_hi, bias_lo, r < 4u)[r % 4u]);
        }
    }
}

@compute @workgroup_size(WG)
fn recurrent_gradients_blocks(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let steps = params.rows / params.models * params.time;
    let group = group_index(wid, nwg);
    let x_blocks = (params.inputs + 7u) / 8u;
    let h_blocks = (params.hidden + 7u) / 8u;
    let slices = params.models * params.slice_count * params.hidden / 2u;
    let x_groups = select(0u, (params.models * ((steps + 7u) / 8u) * x_blocks + WG - 1u) / WG, has(GRAD_X));
    let w_groups = select(0u, (slices * x_blocks + WG - 1u) / WG, has(GRAD_W));
    let h_groups = select(0u, (slices * h_blocks + WG - 1u) / WG, has(GRAD_W));
    if group < x_groups {
        grad_x_block(group * WG + tid);
    } else if group < x_groups + w_groups {
        weight_block((group - x_groups) * WG + tid, true);
    } else if group < x_groups + w_groups + h_groups {
        weight_block((group - x_groups - w_groups) * WG + tid, false);
    }
}
