// LSTM and GRU over whole sequences. Maths, shapes and source: kernels/recurrent.rs.
//   recurrent_pack                  grid ⌈M·(I+H+1)·H / WG⌉   thread = (model, input, unit), its four gates
//   lstm_forward, gru_forward       grid ⌈M·⌈B/4⌉ / ⌊WG/H⌋⌉   workgroup = ⌊WG/H⌋ (model, 4 sequences); thread = unit, four sequences
//   recurrent_gates                 grid M·⌈B·T/32⌉·⌈4H/32⌉    workgroup = 32 × 32 tile of a product, thread = 4 × 2 of it
//   lstm_backward, gru_backward     as forward
//   recurrent_gradients             grid tiles of grad_x, then of the weights' gradients of each slice
//   recurrent_reduce                grid ⌈M·(weights + 2H) / WG⌉ thread = value
//   workgroup memory 16 KiB: h, or δ, of four sequences; two tiles of a product

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

override WG: u32 = 128u;

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

// Units of one thread: 1,024 / WG.
const UNITS: u32 = 8u;
// Gates of four sequences that fit workgroup memory.
const SHARED: u32 = 1024u;

var<workgroup> sh_rows: array<vec4<f32>, SHARED>;

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

// ---- packing ----------------------------------------------------------------------------------------------------

@group(0) @binding(1) var<storage, read> w_ih_first: array<Stored>;
@group(0) @binding(2) var<storage, read> w_hh_second: array<Stored>;
@group(0) @binding(3) var<storage, read> b_ih_third: array<Stored>;
@group(0) @binding(4) var<storage, read> b_hh_fourth: array<Stored>;
@group(0) @binding(5) var<storage, read_write> packed_out: array<f32>;

@compute @workgroup_size(WG)
fn recurrent_pack(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let at = group_index(wid, nwg) * WG + tid;
    let h = params.hidden;
    let n = params.inputs;
    let inner = n + h + 1u;
    if at >= params.models * inner * h {
        return;
    }
    let j = at % h;
    let k = at / h % inner;
    let row = at / (h * inner) * gate_rows() + j;
    var w = vec4<f32>(0.0);
    if k < n {
        w = vec4<f32>(f32(w_ih_first[row * n + k]), f32(w_ih_first[(row + h) * n + k]), f32(w_ih_first[(row + 2u * h) * n + k]), 0.0);
        if !has(GRU) {
            w.w = f32(w_ih_first[(row + 3u * h) * n + k]);
        }
    } else if k < n + h {
        let c = k - n;
        w = vec4<f32>(f32(w_hh_second[row * h + c]), f32(w_hh_second[(row + h) * h + c]), f32(w_hh_second[(row + 2u * h) * h + c]), 0.0);
        if has(GRU) {
            w = w.xywz;
        } else {
            w.w = f32(w_hh_second[(row + 3u * h) * h + c]);
        }
    } else if has(BIAS) {
        w = vec4<f32>(f32(b_ih_third[row]), f32(b_ih_third[row + h]), f32(b_ih_third[row + 2u * h]), 0.0);
        if has(GRU) {
            w = vec4<f32>(w.x + f32(b_hh_fourth[row]), w.y + f32(b_hh_fourth[row + h]), w.z, f32(b_hh_fourth[row + 2u * h]));
        } else {
            w.w = f32(b_ih_third[row + 3u * h]);
        }
    }
    packed_out[4u * at] = w.x;
    packed_out[4u * at + 1u] = w.y;
    packed_out[4u * at + 2u] = w.z;
    packed_out[4u * at + 3u] = w.w;
}

// ---- which sequences --------------------------------------------------------------------------------------------

// The four sequences of a thread: model, sequence of the launch and of the model, length; which of them are there.
struct Tile {
    slot: u32,
    lane: u32,
    width: u32,
    live: bool,
    model: u32,
    q: vec4<u32>,
    b: vec4<u32>,
    there: vec4<bool>,
}

fn tile_of(group: u32, tid: u32) -> Tile {
    let own = params.rows / params.models;
    let tiles = (own + 3u) / 4u;
    let per = max(WG / params.hidden, 1u);
    var tile: Tile;
    tile.width = min(params.hidden, WG);
    tile.slot = tid / tile.width;
    tile.lane = tid % tile.width;
    let item = group * per + tile.slot;
    tile.live = tile.slot < per && item < params.models * tiles;
    tile.model = select(0u, item / tiles, tile.live);
    let first = select(0u, 4u * (item % tiles), tile.live);
    let b = vec4<u32>(first, first + 1u, first + 2u, first + 3u);
    tile.there = b < vec4<u32>(own);
    let inside = min(b, vec4<u32>(own - 1u));
    tile.q = tile.model * own + inside;
    tile.b = params.row0 + inside;
    return tile;
}

// The time index of processing step s.
fn steps_of(s: u32, length: vec4<u32>) -> vec4<u32> {
    let forwards = vec4<u32>(min(s, params.time - 1u));
    return select(forwards, length - 1u - min(vec4<u32>(s), length - 1u), vec4<bool>(has(REVERSE)) & (vec4<u32>(s) < length));
}

@group(0) @binding(3) var<storage, read> lengths: array<u32>;
@group(0) @binding(4) var<storage, read> resets: array<u32>;

fn lengths_of(b: vec4<u32>) -> vec4<u32> {
    var length = vec4<u32>(params.time);
    if has(LENGTHS) {
        length = min(length, vec4<u32>(lengths[b.x], lengths[b.y], lengths[b.z], lengths[b.w]));
    }
    return length;
}

// Where the state goes back to its start before processing step s.
fn resets_at(s: u32, b: vec4<u32>, length: vec4<u32>) -> vec4<bool> {
    var reset = vec4<bool>(false);
    if has(RESETS) {
        let at = b * params.time + steps_of(s, length);
        let words = vec4<u32>(resets[at.x], resets[at.y], resets[at.z], resets[at.w]);
        reset = (words != vec4<u32>(0u)) & (vec4<u32>(s) < length);
    }
    return reset;
}

// ---- forward ----------------------------------------------------------------------------------------------------

@group(0) @binding(1) var<storage, read> x: array<Stored>;
@group(0) @binding(2) var<storage, read> packed: array<f32>;
@group(0) @binding(5) var<storage, read_write> state: array<f32>;
@group(0) @binding(6) var<storage, read_write> y: array<Stored>;
@group(0) @binding(7) var<storage, read_write> saved: array<f32>;

// h (which = 0) or c (1) that the sequences start from.
fn start_of(which: u32, tile: Tile, j: u32) -> vec4<f32> {
    var start = vec4<f32>(0.0);
    if has(select(C0, H0, which == 0u)) {
        let h = params.hidden;
        let base = which * params.models * params.batch * h + j;
        if has(LEARNED) {
            start = vec4<f32>(state[base + tile.model * h]);
        } else {
            let at = base + (tile.model * params.batch + tile.b) * h;
            start = vec4<f32>(state[at.x], state[at.y], state[at.z], state[at.w]);
        }
    }
    return start;
}

fn add_input(a: mat4x4<f32>, at: u32, v: vec4<f32>) -> mat4x4<f32> {
    return mat4x4<f32>(a[0] + packed[at] * v, a[1] + packed[at + 1u] * v, a[2] + packed[at + 2u] * v, a[3] + packed[at + 3u] * v);
}

fn forward(gru: bool, group: u32, tid: u32) {
    let h = params.hidden;
    let n = params.inputs;
    let tile = tile_of(group, tid);
    let units = (h + WG - 1u) / WG;
    let length = lengths_of(tile.b);
    let row = (tile.model * params.batch + tile.b) * h;
    let moving = 2u * params.models * params.batch * h;
    let x_row = select(tile.q, tile.b, has(X_SHARED)) * params.time;
    let weights = tile.model * (n + h + 1u) * h * 4u;
    let rows = tile.slot * h;
    var state_h: array<vec4<f32>, UNITS>;
    var state_c: array<vec4<f32>, UNITS>;

    // states at the start of the launch
    for (var u = 0u; u < units; u++) {
        let j = tile.lane + u * WG;
        if tile.live && j < h {
            var h_now = start_of(0u, tile, j);
            var c_now = start_of(1u, tile, j);
            if params.from_step > 0u {
                let at = moving + row + j;
                let c_at = at + params.models * params.batch * h;
                let reset = resets_at(params.from_step, tile.b, length);
                h_now = select(vec4<f32>(state[at.x], state[at.y], state[at.z], state[at.w]), h_now, reset);
                c_now = select(vec4<f32>(state[c_at.x], state[c_at.y], state[c_at.z], state[c_at.w]), c_now, reset);
            }
            state_h[u] = h_now;
            state_c[u] = c_now;
            sh_rows[rows + j] = h_now;
        }
    }
    for (var s = params.from_step; s < params.to_step; s++) {
        let step = steps_of(s, length);
        let valid = vec4<u32>(s) < length;
        let x_at = (x_row + step) * n;
        let slot = tile.q * params.time + step;
        workgroupBarrier();  // h of this step is written
        for (var u = 0u; u < units; u++) {
            let j = tile.lane + u * WG;
            if tile.live && j < h {
                let w = weights + 4u * j;
                var a = add_input(mat4x4<f32>(), w + (n + h) * h * 4u, vec4<f32>(1.0));
                var k = 0u;
                for (; k + 4u <= n; k += 4u) {
                    for (var e = 0u; e < 4u; e++) {
                        let v = vec4<f32>(f32(x[x_at.x + k + e]), f32(x[x_at.y + k + e]), f32(x[x_at.z + k + e]), f32(x[x_at.w + k + e]));
                        a = add_input(a, w + (k + e) * h * 4u, v);
                    }
                }
                for (; k < n; k++) {
                    a = add_input(a, w + k * h * 4u, vec4<f32>(f32(x[x_at.x + k]), f32(x[x_at.y + k]), f32(x[x_at.z + k]), f32(x[x_at.w + k])));
                }
                let w_h = w + n * h * 4u;
                k = 0u;
                for (; k + 4u <= h; k += 4u) {
                    a = add_input(a, w_h + k * h * 4u, sh_rows[rows + k]);
                    a = add_input(a, w_h + (k + 1u) * h * 4u, sh_rows[rows + k + 1u]);
                    a = add_input(a, w_h + (k + 2u) * h * 4u, sh_rows[rows + k + 2u]);
                    a = add_input(a, w_h + (k + 3u) * h * 4u, sh_rows[rows + k + 3u]);
                }
                for (; k < h; k++) {
                    a = add_input(a, w_h + k * h * 4u, sh_rows[rows + k]);
                }
                let h_last = sh_rows[rows + j];
                let c_last = state_c[u];
                var h_next: vec4<f32>;
                var c_next = c_last;
                if gru {
                    a[0] = sigmoid4(a[0]);
                    a[1] = sigmoid4(a[1]);
                    a[2] = tanh4(a[2] + a[0] * a[3]);
                    h_next = (1.0 - a[1]) * a[2] + a[1] * h_last;
                } else {
                    a[0] = sigmoid4(a[0]);
                    a[1] = sigmoid4(a[1]);
                    a[2] = tanh4(a[2]);
                    a[3] = sigmoid4(a[3]);
                    c_next = a[1] * c_last + a[0] * a[2];
                    h_next = a[3] * tanh4(c_next);
                }
                for (var r = 0u; r < 4u; r++) {
                    if tile.there[r] {
                        y[slot[r] * params.y_stride + params.y_offset + j] = stored(select(0.0, h_next[r], valid[r]));
                        if has(STATES) && valid[r] {
                            let at = slot[r] * width() + j;
                            if has(GATES) {
                                saved[at] = a[0][r];
                                saved[at + h] = a[1][r];
                                saved[at + 2u * h] = a[2][r];
                                saved[at + 3u * h] = a[3][r];
                            }
                            saved[at + kept_h()] = h_last[r];
                            if !gru {
                                saved[at + kept_h() + h] = c_last[r];
                            }
                        }
                    }
                }
                state_h[u] = select(h_last, h_next, valid);
                state_c[u] = select(c_last, c_next, valid);
            }
        }
        workgroupBarrier();  // h of this step is read
        var reset = vec4<bool>(false);
        if s + 1u < params.to_step {
            reset = resets_at(s + 1u, tile.b, length);
        }
        for (var u = 0u; u < units; u++) {
            let j = tile.lane + u * WG;
            if tile.live && j < h {
                if any(reset) {
                    state_h[u] = select(state_h[u], start_of(0u, tile, j), reset);
                    state_c[u] = select(state_c[u], start_of(1u, tile, j), reset);
                }
                sh_rows[rows + j] = state_h[u];
            }
        }
    }
    for (var u = 0u; u < units; u++) {
        let j = tile.lane + u * WG;
        if tile.live && j < h {
            for (var r = 0u; r < 4u; r++) {
                if tile.there[r] {
                    let at = moving + row[r] + j;
                    state[at] = state_h[u][r];
                    state[at + params.models * params.batch * h] = state_c[u][r];
                }
            }
        }
    }
}

@compute @workgroup_size(WG)
fn lstm_forward(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    forward(false, group_index(wid, nwg), tid);
}

@compute @workgroup_size(WG)
fn gru_forward(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    forward(true, group_index(wid, nwg), tid);
}

// ---- backward ---------------------------------------------------------------------------------------------------

@group(0) @binding(1) var<storage, read> saved_first: array<f32>;
@group(0) @binding(2) var<storage, read> w_hh: array<Stored>;
@group(0) @binding(5) var<storage, read> grad_y: array<Stored>;
@group(0) @binding(6) var<storage, read_write> gates_moving: array<f32>;
@group(0) @binding(7) var<storage, read_write> sums: array<f32>;

fn load_saved(at: vec4<u32>) -> vec4<f32> {
    return vec4<f32>(saved_first[at.x], saved_first[at.y], saved_first[at.z], saved_first[at.w]);
}

fn load_gates(at: vec4<u32>) -> vec4<f32> {
    return vec4<f32>(gates_moving[at.x], gates_moving[at.y], gates_moving[at.z], gates_moving[at.w]);
}

fn load_sums(at: vec4<u32>) -> vec4<f32> {
    return vec4<f32>(sums[at.x], sums[at.y], sums[at.z], sums[at.w]);
}

fn store_sums(tile: Tile, at: vec4<u32>, v: vec4<f32>) {
    for (var r = 0u; r < 4u; r++) {
        if tile.there[r] {
            sums[at[r]] = v[r];
        }
    }
}

// Gates of unit j as forward had them: kept, or from their pre-activations.
fn gates_again(gru: bool, kept: vec4<u32>, own: vec4<u32>) -> mat4x4<f32> {
    let h = params.hidden;
    if has(GATES) {
        return mat4x4<f32>(load_saved(kept), load_saved(kept + h), load_saved(kept + 2u * h), load_saved(kept + 3u * h));
    }
    var a = mat4x4<f32>(load_gates(own), load_gates(own + h), load_gates(own + 2u * h), load_gates(own + 3u * h));
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

fn backward(gru: bool, group: u32, tid: u32) {
    let h = params.hidden;
    let tile = tile_of(group, tid);
    let units = (h + WG - 1u) / WG;
    let length = lengths_of(tile.b);
    let row = (tile.model * params.batch + tile.b) * h;
    let all = params.models * params.batch * h;
    let weights = tile.model * gate_rows() * h;
    // δ of the gates that w_hh has rows for, in its order: in workgroup memory, or read again from `gates`
    let count = select(4u, 3u, gru);
    let fits = max(WG / h, 1u) * count * h <= SHARED;
    let deltas = tile.slot * count * h;
    var grad_h: array<vec4<f32>, UNITS>;
    var grad_c: array<vec4<f32>, UNITS>;
    var start_h: array<vec4<f32>, UNITS>;
    var start_c: array<vec4<f32>, UNITS>;

    for (var u = 0u; u < units; u++) {
        let j = tile.lane + u * WG;
        if tile.live && j < h {
            let first = params.to_step == params.time;
            grad_h[u] = vec4<f32>(0.0);
            grad_c[u] = vec4<f32>(0.0);
            start_h[u] = vec4<f32>(0.0);
            start_c[u] = vec4<f32>(0.0);
            if !first || has(GRAD_HN) {
                grad_h[u] = load_sums(row + j);
            }
            if !first || has(GRAD_CN) {
                grad_c[u] = load_sums(all + row + j);
            }
            if !first {
                start_h[u] = load_sums(2u * all + row + j);
                start_c[u] = load_sums(3u * all + row + j);
            }
        }
    }
    for (var s = params.to_step; s > params.from_step; s--) {
        let step = steps_of(s - 1u, length);
        let valid = vec4<u32>(s - 1u) < length;
        let slot = tile.q * params.time + step;
        let reset = resets_at(s - 1u, tile.b, length);
        for (var u = 0u; u < units; u++) {
            let j = tile.lane + u * WG;
            if tile.live && j < h {
                let kept = slot * width() + j;
                let own = slot * 4u * h + j;
                let g = gates_again(gru, kept, own);
                var d = grad_h[u];
                if has(GRAD_Y) {
                    let at = slot * params.y_stride + params.y_offset + j;
                    d += vec4<f32>(f32(grad_y[at.x]), f32(grad_y[at.y]), f32(grad_y[at.z]), f32(grad_y[at.w]));
                }
                var delta: mat4x4<f32>;
                var through = vec4<f32>(0.0);
                if gru {
                    let last = load_saved(kept + kept_h());
                    let dn = d * (1.0 - g[1]) * (1.0 - g[2] * g[2]);
                    delta[0] = dn * g[3] * g[0] * (1.0 - g[0]);
                    delta[1] = d * (last - g[2]) * g[1] * (1.0 - g[1]);
                    delta[2] = dn;
                    delta[3] = dn * g[0];
                    through = d * g[1];
                } else {
                    let last = load_saved(kept + kept_h() + h);
                    let t = tanh4(g[1] * last + g[0] * g[2]);
                    let e = grad_c[u] + d * g[3] * (1.0 - t * t);
                    delta[0] = e * g[2] * g[0] * (1.0 - g[0]);
                    delta[1] = e * last * g[1] * (1.0 - g[1]);
                    delta[2] = e * g[0] * (1.0 - g[2] * g[2]);
                    delta[3] = d * t * g[3] * (1.0 - g[3]);
                    grad_c[u] = select(grad_c[u], e * g[1], valid);
                }
                for (var i = 0u; i < 4u; i++) {
                    delta[i] = select(vec4<f32>(0.0), delta[i], valid);
                    for (var r = 0u; r < 4u; r++) {
                        if tile.there[r] {
                            gates_moving[own[r] + i * h] = delta[i][r];
                        }
                    }
                }
                if fits {
                    sh_rows[deltas + j] = delta[0];
                    sh_rows[deltas + h + j] = delta[1];
                    if gru {
                        sh_rows[deltas + 2u * h + j] = delta[3];
                    } else {
                        sh_rows[deltas + 2u * h + j] = delta[2];
                        sh_rows[deltas + 3u * h + j] = delta[3];
                    }
                }
                grad_h[u] = select(grad_h[u], through, valid);
            }
        }
        workgroupBarrier();  // δ of this step is written
        storageBarrier();
        for (var u = 0u; u < units; u++) {
            let k = tile.lane + u * WG;
            if tile.live && k < h {
                var sum = vec4<f32>(0.0);
                let last_gate = count * h;
                if fits {
                    var c = 0u;
                    for (; c + 8u <= last_gate; c += 8u) {
                        let w = weights + c * h + k;
                        let at = deltas + c;
                        sum += f32(w_hh[w]) * sh_rows[at] + f32(w_hh[w + h]) * sh_rows[at + 1u];
                        sum += f32(w_hh[w + 2u * h]) * sh_rows[at + 2u] + f32(w_hh[w + 3u * h]) * sh_rows[at + 3u];
                        sum += f32(w_hh[w + 4u * h]) * sh_rows[at + 4u] + f32(w_hh[w + 5u * h]) * sh_rows[at + 5u];
                        sum += f32(w_hh[w + 6u * h]) * sh_rows[at + 6u] + f32(w_hh[w + 7u * h]) * sh_rows[at + 7u];
                    }
                    for (; c < last_gate; c++) {
                        sum += f32(w_hh[weights + c * h + k]) * sh_rows[deltas + c];
                    }
                } else {
                    let own = slot * 4u * h;
                    let last_at = select(3u, 2u, gru) * h;
                    let shift = select(0u, h, gru);
                    for (var c = 0u; c < h; c++) {
                        sum += f32(w_hh[weights + c * h + k]) * load_gates(own + c) + f32(w_hh[weights + (c + h) * h + k]) * load_gates(own + h + c);
                        if !gru {
                            sum += f32(w_hh[weights + (c + 2u * h) * h + k]) * load_gates(own + 2u * h + c);
                        }
                        sum += f32(w_hh[weights + (c + last_at) * h + k]) * load_gates(own + last_at + shift + c);
                    }
                }
                grad_h[u] = select(grad_h[u], grad_h[u] + sum, valid);
                start_h[u] += select(vec4<f32>(0.0), grad_h[u], reset);
                start_c[u] += select(vec4<f32>(0.0), grad_c[u], reset);
                grad_h[u] = select(grad_h[u], vec4<f32>(0.0), reset);
                grad_c[u] = select(grad_c[u], vec4<f32>(0.0), reset);
            }
        }
        workgroupBarrier();  // δ of this step is read
    }
    for (var u = 0u; u < units; u++) {
        let j = tile.lane + u * WG;
        if tile.live && j < h {
            if params.from_step == 0u {
                start_h[u] += grad_h[u];
                start_c[u] += grad_c[u];
            }
            store_sums(tile, row + j, grad_h[u]);
            store_sums(tile, all + row + j, grad_c[u]);
            store_sums(tile, 2u * all + row + j, start_h[u]);
            store_sums(tile, 3u * all + row + j, start_c[u]);
        }
    }
}

@compute @workgroup_size(WG)
fn lstm_backward(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    backward(false, group_index(wid, nwg), tid);
}

@compute @workgroup_size(WG)
fn gru_backward(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    backward(true, group_index(wid, nwg), tid);
}

// ---- products ---------------------------------------------------------------------------------------------------

// Tiles of the two factors: 16 inner values of 32 rows, and of 32 columns.
// Thread (tid / 8, tid % 8) owns rows 2·(tid / 8) and the next, columns 4·(tid % 8) .. + 4.

@group(0) @binding(2) var<storage, read> saved_in: array<f32>;
@group(0) @binding(3) var<storage, read> w_ih: array<Stored>;
@group(0) @binding(4) var<storage, read> w_hh_in: array<Stored>;
@group(0) @binding(5) var<storage, read> b_ih: array<Stored>;
@group(0) @binding(6) var<storage, read> b_hh: array<Stored>;
@group(0) @binding(7) var<storage, read_write> gates: array<f32>;

struct Sums {
    a: vec4<f32>,
    b: vec4<f32>,
}

// Scalars: two threads may not write two components of one vector.
var<workgroup> sh_tile: array<f32, 1024>;

fn put_tile(base: u32, inner: u32, at: u32, v: f32) {
    sh_tile[base + inner * 32u + at] = v;
}

// Adds the products of the two tiles.
fn add_tiles(sums_in: Sums, tid: u32) -> Sums {
    var out = sums_in;
    let r = 2u * (tid / 8u);
    let c = 512u + 4u * (tid % 8u);
    for (var k = 0u; k < 512u; k += 128u) {
        for (var e = k; e < k + 128u; e += 32u) {
            let right = vec4<f32>(sh_tile[e + c], sh_tile[e + c + 1u], sh_tile[e + c + 2u], sh_tile[e + c + 3u]);
            out.a += sh_tile[e + r] * right;
            out.b += sh_tile[e + r + 1u] * right;
        }
    }
    return out;
}

// Input k (x, h(t−1), 1) of sequence q (b of the model) at a step.
fn input_at(q: u32, b: u32, step: u32, k: u32) -> f32 {
    if k < params.inputs {
        return f32(x[(select(q, b, has(X_SHARED)) * params.time + step) * params.inputs + k]);
    }
    if k < params.inputs + params.hidden {
        return saved_in[(q * params.time + step) * width() + kept_h() + k - params.inputs];
    }
    return 1.0;
}

// Weight of input k in column c of the four gates.
fn weight_at(model: u32, c: u32, k: u32) -> f32 {
    let h = params.hidden;
    let gate = c / h;
    let gru = has(GRU);
    let input_row = model * gate_rows() + c;
    let hidden_row = input_row - select(0u, h, gru && gate == 3u);
    let no_input = gru && gate == 3u;
    let no_hidden = gru && gate == 2u;
    if k < params.inputs {
        if no_input {
            return 0.0;
        }
        return f32(w_ih[input_row * params.inputs + k]);
    }
    if k < params.inputs + h {
        if no_hidden {
            return 0.0;
        }
        return f32(w_hh_in[hidden_row * h + k - params.inputs]);
    }
    var bias = 0.0;
    if has(BIAS) {
        if !no_input {
            bias = f32(b_ih[input_row]);
        }
        if gru && !no_hidden {
            bias += f32(b_hh[hidden_row]);
        }
    }
    return bias;
}

@compute @workgroup_size(WG)
fn recurrent_gates(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let own = params.rows / params.models;
    let steps = own * params.time;
    let columns = 4u * params.hidden;
    let inner = params.inputs + params.hidden + 1u;
    let step_tiles = (steps + 31u) / 32u;
    let column_tiles = (columns + 31u) / 32u;
    let group = group_index(wid, nwg);
    let model = group / (step_tiles * column_tiles);
    let n0 = 32u * (group / column_tiles % step_tiles);
    let c0 = 32u * (group % column_tiles);
    let there = model < params.models;
    var out: Sums;
    for (var k0 = 0u; k0 < inner; k0 += 16u) {
        workgroupBarrier();
        for (var i = tid; i < 512u; i += WG) {
            let k = k0 + i % 16u;
            let n = n0 + i / 16u;
            let c = c0 + i / 16u;
            var left = 0.0;
            var right = 0.0;
            if there && k < inner && n < steps {
                left = input_at(model * own + n / params.time, params.row0 + n / params.time, n % params.time, k);
            }
            if there && k < inner && c < columns {
                right = weight_at(model, c, k);
            }
            put_tile(0u, i % 16u, i / 16u, left);
            put_tile(512u, i % 16u, i / 16u, right);
        }
        workgroupBarrier();
        out = add_tiles(out, tid);
    }
    for (var e = 0u; e < 8u; e++) {
        let n = n0 + 2u * (tid / 8u) + e / 4u;
        let c = c0 + 4u * (tid % 8u) + e % 4u;
        if there && n < steps && c < columns {
            gates[(model * steps + n) * columns + c] = select(out.b, out.a, e < 4u)[e % 4u];
        }
    }
}

@group(0) @binding(4) var<storage, read> w_ih_fourth: array<Stored>;
@group(0) @binding(5) var<storage, read> gates_in: array<f32>;
@group(0) @binding(6) var<storage, read_write> grad_x: array<Stored>;

fn grad_x_tile(group: u32, tid: u32) {
    let own = params.rows / params.models;
    let steps = own * params.time;
    let columns = params.inputs;
    let inner = gate_rows();
    let step_tiles = (steps + 31u) / 32u;
    let column_tiles = (columns + 31u) / 32u;
    let model = group / (step_tiles * column_tiles);
    let n0 = 32u * (group / column_tiles % step_tiles);
    let c0 = 32u * (group % column_tiles);
    var out: Sums;
    for (var k0 = 0u; k0 < inner; k0 += 16u) {
        workgroupBarrier();
        for (var i = tid; i < 512u; i += WG) {
            let n = n0 + i / 16u;
            let c = c0 + i % 32u;
            var left = 0.0;
            var right = 0.0;
            if k0 + i % 16u < inner && n < steps {
                left = gates_in[(model * steps + n) * 4u * params.hidden + k0 + i % 16u];
            }
            if k0 + i / 32u < inner && c < columns {
                right = f32(w_ih_fourth[(model * inner + k0 + i / 32u) * columns + c]);
            }
            put_tile(0u, i % 16u, i / 16u, left);
            put_tile(512u, i / 32u, i % 32u, right);
        }
        workgroupBarrier();
        out = add_tiles(out, tid);
    }
    for (var e = 0u; e < 8u; e++) {
        let n = n0 + 2u * (tid / 8u) + e / 4u;
        let c = c0 + 4u * (tid % 8u) + e % 4u;
        if n < steps && c < columns {
            grad_x[(model * steps + n) * columns + c] = stored(select(out.b, out.a, e < 4u)[e % 4u]);
        }
    }
}

// Writes the gradient of the weight of input k in column c of the four gates.
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

fn weight_tile(group: u32, tid: u32) {
    let own = params.rows / params.models;
    let t = params.time;
    let rows = 4u * params.hidden;
    let columns = params.inputs + params.hidden + 1u;
    let row_tiles = (rows + 31u) / 32u;
    let column_tiles = (columns + 31u) / 32u;
    let slice = params.slice0 + group / (row_tiles * column_tiles) % params.slice_count;
    let model = group / (row_tiles * column_tiles * params.slice_count);
    let r0 = 32u * (group / column_tiles % row_tiles);
    let c0 = 32u * (group % column_tiles);
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
    var out: Sums;
    for (var n0 = first; n0 < last; n0 += 16u) {
        workgroupBarrier();
        for (var i = tid; i < 512u; i += WG) {
            let n = n0 + i / 32u;
            let c = r0 + i % 32u;
            let k = c0 + i % 32u;
            var left = 0.0;
            var right = 0.0;
            if n < last {
                let b = n / t;
                let step = n % t;
                let q = model * own + b - params.row0;
                var valid = true;
                if has(LENGTHS) {
                    valid = step < lengths[b];
                }
                if valid && c < rows {
                    left = gates_in[(q * t + step) * rows + c];
                }
                if valid && k < columns {
                    right = input_at(q, b, step, k);
                }
            }
            put_tile(0u, i / 32u, i % 32u, left);
            put_tile(512u, i / 32u, i % 32u, right);
        }
        workgroupBarrier();
        out = add_tiles(out, tid);
    }
    for (var e = 0u; e < 8u; e++) {
        let c = r0 + 2u * (tid / 8u) + e / 4u;
        let k = c0 + 4u * (tid % 8u) + e % 4u;
        if c < rows && k < columns {
            put_weight(slice, model, c, k, select(out.b, out.a, e < 4u)[e % 4u]);
        }
    }
}

@compute @workgroup_size(WG)
fn recurrent_gradients(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let steps = params.rows / params.models * params.time;
    let inner = params.inputs + params.hidden + 1u;
    let group = group_index(wid, nwg);
    let x_tiles = select(0u, params.models * ((steps + 31u) / 32u) * ((params.inputs + 31u) / 32u), has(GRAD_X));
    let w_tiles = select(0u, params.models * params.slice_count * ((4u * params.hidden + 31u) / 32u) * ((inner + 31u) / 32u), has(GRAD_W));
    if group < x_tiles {
        grad_x_tile(group, tid);
    } else if group < x_tiles + w_tiles {
        weight_tile(group - x_tiles, tid);
    }
}

// ---- sums -------------------------------------------------------------------------------------------------------

@group(0) @binding(1) var<storage, read_write> sums_all: array<f32>;

@compute @workgroup_size(WG)
fn recurrent_reduce(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let at = group_index(wid, nwg) * WG + tid;
    let h = params.hidden;
    let all = params.models * params.batch * h;
    let starts = 2u * params.models * h;
    let each = params.models * gate_rows() * (params.inputs + h + select(1u, 2u, has(GRU)));
    if at < starts {
        if has(LEARNED) {
            let model = at / h % params.models;
            let from_value = (2u + at / (params.models * h)) * all + model * params.batch * h + at % h;
            var sum = 0.0;
            for (var b = 0u; b < params.batch; b++) {
                sum += sums_all[from_value + b * h];
            }
            sums_all[4u * all + at] = sum;
        }
        return;
    }
    if at < starts + each && has(GRAD_W) {
        let to_value = 4u * all + at;
        var sum = sums_all[to_value];
        for (var slice = 1u; slice < params.slices; slice++) {
            sum += sums_all[to_value + slice * each];
        }
        sums_all[to_value] = sum;
    }
}
