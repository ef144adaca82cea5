// Convolution over time of many models and its gradients. Maths, shapes and padding: kernels/conv1d.rs.
//   conv1d_forward[_ragged]      grid  M·tiles [O, B·U]          depth (c,k)
//   conv1d_activate              grid  ⌈M·B·O·U / WG⌉            thread = value
//   conv1d_grad_x[_ragged]       grid  (M or 1)·tiles [C, B·T]   depth (o,k), of every model where x is shared
//   conv1d_grad_weight[_ragged]  grid  M·S·tiles [O, C·K]        depth (b,t) of a split
//   workgroup memory: 6.8 KB

struct Conv1dParams {
    models: u32,
    x_models: u32,
    batch: u32,
    inputs: u32,
    outputs: u32,
    taps: u32,
    time: u32,
    out_time: u32,
    left: u32,
    dilation: u32,
    activation: u32,
    flags: u32,
    splits: u32,
    split_batch: u32,
    split_time: u32,
}

@group(0) @binding(0) var<uniform> params: Conv1dParams;

const BIAS: u32 = 1u;
const CONTINUE: u32 = 2u;

// ---- tiles: left [rows, depth] × right [depth, columns] -----------------------------------------------------------------

// Tile of ROW_QUADS·4 × COL_QUADS·4 results; a thread has THREAD_QUADS·4 rows of 4.
override WG: u32 = 128u;
override ROW_QUADS: u32 = 8u;
override COL_QUADS: u32 = 16u;
override THREAD_QUADS: u32 = 1u;
const STEP: u32 = 16u;

// [k, quad]; a quad more per k, so that a column of quads lies in different banks.
var<workgroup> sh_left: array<vec4<f32>, STEP * (ROW_QUADS + 1u)>;
var<workgroup> sh_right: array<vec4<f32>, STEP * (COL_QUADS + 1u)>;

struct Tile {
    r0: vec4<f32>,
    r1: vec4<f32>,
    r2: vec4<f32>,
    r3: vec4<f32>,
}

fn zero_tile() -> Tile {
    let z = vec4<f32>(0.0);
    return Tile(z, z, z, z);
}

// First row and first column of a thread inside its tile.
fn thread_row(tid: u32) -> u32 {
    return tid / COL_QUADS * THREAD_QUADS * 4u;
}

fn thread_col(tid: u32) -> u32 {
    return tid % COL_QUADS * 4u;
}

// A step of depth: what the two shared arrays hold.
fn multiply(tile: Tile, tid: u32) -> Tile {
    var t = tile;
    for (var k = 0u; k < STEP; k++) {
        let b = sh_right[k * (COL_QUADS + 1u) + tid % COL_QUADS];
        let a = sh_left[k * (ROW_QUADS + 1u) + tid / COL_QUADS];
        t.r0 += a.x * b;
        t.r1 += a.y * b;
        t.r2 += a.z * b;
        t.r3 += a.w * b;
    }
    return t;
}

// Where a workgroup's tile lies: model (or model and split), first row, first column.
fn place(group: u32, rows: u32, columns: u32) -> vec3<u32> {
    let across = (columns + 4u * COL_QUADS - 1u) / (4u * COL_QUADS);
    let down = (rows + 4u * ROW_QUADS - 1u) / (4u * ROW_QUADS);
    let at = group % (across * down);
    return vec3<u32>(group / (across * down), at / across * 4u * ROW_QUADS, at % across * 4u * COL_QUADS);
}

// Valid steps of the sequence of each column of a tile, or of each term of a step of depth; entries fill it.
var<workgroup> sh_length: array<u32, 4u * COL_QUADS>;

// Valid steps of y for a sequence of valid length.
fn out_length(length: u32) -> u32 {
    if length == 0u {
        return 0u;
    }
    return u32(max(i32(length + params.out_time) - i32(params.time), 0));
}

// ---- forward ------------------------------------------------------------------------------------------------------------

@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read> weight: array<f32>;
@group(0) @binding(3) var<storage, read> bias: array<f32>;

// weight[m, row, d] of a matrix of rows × depth.
fn weight_at(model: u32, row: u32, d: u32) -> f32 {
    let depth = params.inputs * params.taps;
    if row < params.outputs && d < depth {
        return weight[(model * params.outputs + row) * depth + d];
    }
    return 0.0;
}

// x that tap (c,k) of output (b,t) sees; the sequence's valid length is given.
fn window_at(model: u32, b: u32, t: u32, d: u32, length: u32) -> f32 {
    let s = t + d % params.taps * params.dilation - params.left; // wraps below zero
    if b < params.batch && d < params.inputs * params.taps && s < length {
        return x[((min(model, params.x_models - 1u) * params.batch + b) * params.inputs + d / params.taps) * params.time + s];
    }
    return 0.0;
}

fn column_window(model: u32, column: u32, first: u32, d: u32) -> f32 {
    return window_at(model, column / params.out_time, column % params.out_time, d, sh_length[column - first]);
}

fn forward_tile(at: vec3<u32>, tid: u32) -> Tile {
    var tile = zero_tile();
    for (var d = 0u; d < params.inputs * params.taps; d += STEP) {
        for (var s = tid; s < STEP * ROW_QUADS; s += WG) {
            let k = s % STEP;
            let r = at.y + 4u * (s / STEP);
            sh_left[k * (ROW_QUADS + 1u) + s / STEP] =
                vec4<f32>(weight_at(at.x, r, d + k), weight_at(at.x, r + 1u, d + k), weight_at(at.x, r + 2u, d + k), weight_at(at.x, r + 3u, d + k));
        }
        for (var s = tid; s < STEP * COL_QUADS; s += WG) {
            let k = s / COL_QUADS;
            let c = at.z + 4u * (s % COL_QUADS);
            sh_right[k * (COL_QUADS + 1u) + s % COL_QUADS] = vec4<f32>(column_window(at.x, c, at.z, d + k), column_window(at.x, c + 1u, at.z, d + k),
                column_window(at.x, c + 2u, at.z, d + k), column_window(at.x, c + 3u, at.z, d + k));
        }
        workgroupBarrier();
        tile = multiply(tile, tid);
        workgroupBarrier();
    }
    return tile;
}

// Result of output o at a column: 0 past the sequence's end.
fn finished(model: u32, o: u32, column: u32, first: u32, sum: f32) -> f32 {
    if column % params.out_time >= out_length(sh_length[column - first]) {
        return 0.0;
    }
    var v = sum;
    if (params.flags & BIAS) != 0u {
        v += bias[model * params.outputs + o];
    }
    return activation(params.activation, v);
}

fn y_index(model: u32, o: u32, column: u32) -> u32 {
    return ((model * params.batch + column / params.out_time) * params.outputs + o) * params.out_time + column % params.out_time;
}

@group(0) @binding(4) var<storage, read_write> y: array<f32>;

fn write_y(at: vec3<u32>, o: u32, tid: u32, sums: vec4<f32>) {
    for (var j = 0u; j < 4u; j++) {
        let column = at.z + thread_col(tid) + j;
        if o < params.outputs && column < params.batch * params.out_time {
            y[y_index(at.x, o, column)] = finished(at.x, o, column, at.z, sums[j]);
        }
    }
}

@compute @workgroup_size(WG)
fn conv1d_forward(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let at = place(group_index(wid, nwg), params.outputs, params.batch * params.out_time);
    if at.x >= params.models {
        return;
    }
    if tid < 4u * COL_QUADS {
        sh_length[tid] = params.time;
    }
    workgroupBarrier();
    let tile = forward_tile(at, tid);
    let o = at.y + thread_row(tid);
    write_y(at, o, tid, tile.r0);
    write_y(at, o + 1u, tid, tile.r1);
    write_y(at, o + 2u, tid, tile.r2);
    write_y(at, o + 3u, tid, tile.r3);
}

@group(0) @binding(4) var<storage, read> lengths: array<u32>;
@group(0) @binding(5) var<storage, read_write> y_ragged: array<f32>;

fn write_y_ragged(at: vec3<u32>, o: u32, tid: u32, sums: vec4<f32>) {
    for (var j = 0u; j < 4u; j++) {
        let column = at.z + thread_col(tid) + j;
        if o < params.outputs && column < params.batch * params.out_time {
            y_ragged[y_index(at.x, o, column)] = finished(at.x, o, column, at.z, sums[j]);
        }
    }
}

@compute @workgroup_size(WG)
fn conv1d_forward_ragged(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let at = place(group_index(wid, nwg), params.outputs, params.batch * params.out_time);
    if at.x >= params.models {
        return;
    }
    if tid < 4u * COL_QUADS {
        sh_length[tid] = min(lengths[min((at.z + tid) / params.out_time, params.batch - 1u)], params.time);
    }
    workgroupBarrier();
    let tile = forward_tile(at, tid);
    let o = at.y + thread_row(tid);
    write_y_ragged(at, o, tid, tile.r0);
    write_y_ragged(at, o + 1u, tid, tile.r1);
    write_y_ragged(at, o + 2u, tid, tile.r2);
    write_y_ragged(at, o + 3u, tid, tile.r3);
}

// ---- activation of a kept pre-activation --------------------------------------------------------------------------------------

@group(0) @binding(1) var<storage, read> kept_in: array<f32>;
@group(0) @binding(2) var<storage, read_write> y_out: array<f32>;

@compute @workgroup_size(WG)
fn conv1d_activate(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let at = group_index(wid, nwg) * WG + tid;
    if at < params.models * params.batch * params.outputs * params.out_time {
        y_out[at] = activation(params.activation, kept_in[at]);
    }
}

// ---- gradient with respect to x --------------------------------------------------------------------------------------------

@group(0) @binding(1) var<storage, read> grad_y: array<f32>;
@group(0) @binding(2) var<storage, read> kept: array<f32>;
@group(0) @binding(3) var<storage, read> weight_in: array<f32>;

// weight[m,o,c,k] for a depth of (o,k).
fn turned_at(model: u32, c: u32, d: u32) -> f32 {
    if c < params.inputs && d < params.outputs * params.taps {
        return weight_in[((model * params.outputs + d / params.taps) * params.inputs + c) * params.taps + d % params.taps];
    }
    return 0.0;
}

// g of the output that tap k of step s of x belongs to.
fn pulled_back(model: u32, column: u32, first: u32, d: u32) -> f32 {
    let b = column / params.time;
    let t = column % params.time + params.left - d % params.taps * params.dilation; // wraps below zero
    if b < params.batch && d < params.outputs * params.taps && t < out_length(sh_length[column - first]) {
        let at = ((model * params.batch + b) * params.outputs + d / params.taps) * params.out_time + t;
        if params.activation == 0u {
            return grad_y[at];
        }
        return grad_y[at] * activation_slope(params.activation, kept[at]);
    }
    return 0.0;
}

fn x_index(model: u32, c: u32, column: u32) -> u32 {
    return ((model * params.batch + column / params.time) * params.inputs + c) * params.time + column % params.time;
}

// Adds the model's products to a tile.
fn grad_x_products(start: Tile, model: u32, at: vec3<u32>, tid: u32) -> Tile {
    var tile = start;
    for (var d = 0u; d < params.outputs * params.taps; d += STEP) {
        for (var s = tid; s < STEP * ROW_QUADS; s += WG) {
            let k = s % STEP;
            let r = at.y + 4u * (s / STEP);
            sh_left[k * (ROW_QUADS + 1u) + s / STEP] =
                vec4<f32>(turned_at(model, r, d + k), turned_at(model, r + 1u, d + k), turned_at(model, r + 2u, d + k), turned_at(model, r + 3u, d + k));
        }
        for (var s = tid; s < STEP * COL_QUADS; s += WG) {
            let k = s / COL_QUADS;
            let c = at.z + 4u * (s % COL_QUADS);
            sh_right[k * (COL_QUADS + 1u) + s % COL_QUADS] = vec4<f32>(pulled_back(model, c, at.z, d + k), pulled_back(model, c + 1u, at.z, d + k),
                pulled_back(model, c + 2u, at.z, d + k), pulled_back(model, c + 3u, at.z, d + k));
        }
        workgroupBarrier();
        tile = multiply(tile, tid);
        workgroupBarrier();
    }
    return tile;
}

// Models whose products a tile of model `own` sums: all where x is shared.
fn last_model(own: u32) -> u32 {
    return select(own + 1u, params.models, params.x_models == 1u);
}

@group(0) @binding(4) var<storage, read_write> grad_x: array<f32>;

fn load_grad_x(at: vec3<u32>, c: u32, tid: u32) -> vec4<f32> {
    var v = vec4<f32>(0.0);
    for (var j = 0u; j < 4u; j++) {
        let column = at.z + thread_col(tid) + j;
        if c < params.inputs && column < params.batch * params.time {
            v[j] = grad_x[x_index(at.x, c, column)];
        }
    }
    return v;
}

fn write_grad_x(at: vec3<u32>, c: u32, tid: u32, sums: vec4<f32>) {
    for (var j = 0u; j < 4u; j++) {
        let column = at.z + thread_col(tid) + j;
        if c < params.inputs && column < params.batch * params.time {
            grad_x[x_index(at.x, c, column)] = select(0.0, sums[j], column % params.time < sh_length[thread_col(tid) + j]);
        }
    }
}

@compute @workgroup_size(WG)
fn conv1d_grad_x(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let at = place(group_index(wid, nwg), params.inputs, params.batch * params.time);
    if at.x >= params.x_models {
        return;
    }
    if tid < 4u * COL_QUADS {
        sh_length[tid] = params.time;
    }
    workgroupBarrier();
    let c = at.y + thread_row(tid);
    var tile = zero_tile();
    if (params.flags & CONTINUE) != 0u {
        tile = Tile(load_grad_x(at, c, tid), load_grad_x(at, c + 1u, tid), load_grad_x(at, c + 2u, tid), load_grad_x(at, c + 3u, tid));
    }
    for (var m = at.x; m < last_model(at.x); m++) {
        tile = grad_x_products(tile, m, at, tid);
    }
    write_grad_x(at, c, tid, tile.r0);
    write_grad_x(at, c + 1u, tid, tile.r1);
    write_grad_x(at, c + 2u, tid, tile.r2);
    write_grad_x(at, c + 3u, tid, tile.r3);
}

@group(0) @binding(4) var<storage, read> lengths_in: array<u32>;
@group(0) @binding(5) var<storage, read_write> grad_x_ragged: array<f32>;

fn load_grad_x_ragged(at: vec3<u32>, c: u32, tid: u32) -> vec4<f32> {
    var v = vec4<f32>(0.0);
    for (var j = 0u; j < 4u; j++) {
        let column = at.z + thread_col(tid) + j;
        if c < params.inputs && column < params.batch * params.time {
            v[j] = grad_x_ragged[x_index(at.x, c, column)];
        }
    }
    return v;
}

fn write_grad_x_ragged(at: vec3<u32>, c: u32, tid: u32, sums: vec4<f32>) {
    for (var j = 0u; j < 4u; j++) {
        let column = at.z + thread_col(tid) + j;
        if c < params.inputs && column < params.batch * params.time {
            grad_x_ragged[x_index(at.x, c, column)] = select(0.0, sums[j], column % params.time < sh_length[thread_col(tid) + j]);
        }
    }
}

@compute @workgroup_size(WG)
fn conv1d_grad_x_ragged(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let at = place(group_index(wid, nwg), params.inputs, params.batch * params.time);
    if at.x >= params.x_models {
        return;
    }
    if tid < 4u * COL_QUADS {
        sh_length[tid] = min(lengths_in[min((at.z + tid) / params.time, params.batch - 1u)], params.time);
    }
    workgroupBarrier();
    let c = at.y + thread_row(tid);
    var tile = zero_tile();
    if (params.flags & CONTINUE) != 0u {
        tile = Tile(load_grad_x_ragged(at, c, tid), load_grad_x_ragged(at, c + 1u, tid), load_grad_x_ragged(at, c + 2u, tid), load_grad_x_ragged(at, c + 3u, tid));
    }
    for (var m = at.x; m < last_model(at.x); m++) {
        tile = grad_x_products(tile, m, at, tid);
    }
    write_grad_x_ragged(at, c, tid, tile.r0);
    write_grad_x_ragged(at, c + 1u, tid, tile.r1);
    write_grad_x_ragged(at, c + 2u, tid, tile.r2);
    write_grad_x_ragged(at, c + 3u, tid, tile.r3);
}

// ---- gradient with respect to weight and bias --------------------------------------------------------------------------------

@group(0) @binding(2) var<storage, read> grad_y_in: array<f32>;
@group(0) @binding(3) var<storage, read> kept_of: array<f32>;

// A split: first sequence, one past the last, first step, steps.
fn split_range(split: u32) -> vec4<u32> {
    let pieces = (params.out_time + params.split_time - 1u) / params.split_time;
    let b = split / pieces * params.split_batch;
    let t = split % pieces * params.split_time;
    return vec4<u32>(b, min(b + params.split_batch, params.batch), t, min(params.split_time, params.out_time - t));
}

// g of term `d` of a split.
fn term(model: u32, range: vec4<u32>, o: u32, d: u32, length: u32) -> f32 {
    let b = range.x + d / range.w;
    let t = range.z + d % range.w;
    if b < range.y && o < params.outputs && t < out_length(length) {
        let at = ((model * params.batch + b) * params.outputs + o) * params.out_time + t;
        if params.activation == 0u {
            return grad_y_in[at];
        }
        return grad_y_in[at] * activation_slope(params.activation, kept_of[at]);
    }
    return 0.0;
}

// x beside term `d` of a split, for column (c,k); 0 where the output is not valid, so that nothing past a length is multiplied.
fn term_window(model: u32, range: vec4<u32>, d: u32, column: u32, length: u32) -> f32 {
    let b = range.x + d / range.w;
    let t = range.z + d % range.w;
    if b < range.y && t < out_length(length) {
        return window_at(model, b, t, column, length);
    }
    return 0.0;
}

// A step of depth, whose lengths are in sh_length. All threads call it.
fn grad_weight_step(start: Tile, model: u32, range: vec4<u32>, at: vec3<u32>, d: u32, tid: u32) -> Tile {
    for (var s = tid; s < STEP * ROW_QUADS; s += WG) {
        let k = s % STEP;
        let o = at.y + 4u * (s / STEP);
        let length = sh_length[k];
        sh_left[k * (ROW_QUADS + 1u) + s / STEP] = vec4<f32>(term(model, range, o, d + k, length), term(model, range, o + 1u, d + k, length),
            term(model, range, o + 2u, d + k, length), term(model, range, o + 3u, d + k, length));
    }
    for (var s = tid; s < STEP * COL_QUADS; s += WG) {
        let k = s % STEP;
        let c = at.z + 4u * (s / STEP);
        let length = sh_length[k];
        sh_right[k * (COL_QUADS + 1u) + s / STEP] = vec4<f32>(term_window(model, range, d + k, c, length), term_window(model, range, d + k, c + 1u, length),
            term_window(model, range, d + k, c + 2u, length), term_window(model, range, d + k, c + 3u, length));
    }
    workgroupBarrier();
    return multiply(start, tid);
}

// The tiles of the first columns also sum the bias, a thread per quad of outputs.
fn bias_step(sum: vec4<f32>, column: u32, tid: u32) -> vec4<f32> {
    var total = sum;
    if column == 0u && tid < ROW_QUADS {
        for (var k = 0u; k < STEP; k++) {
            total += sh_left[k * (ROW_QUADS + 1u) + tid];
        }
    }
    return total;
}

@group(0) @binding(4) var<storage, read_write> partials: array<f32>;

fn write_partials(at: vec3<u32>, o: u32, tid: u32, sums: vec4<f32>) {
    let columns = params.inputs * params.taps;
    for (var j = 0u; j < 4u; j++) {
        let column = at.z + thread_col(tid) + j;
        if o < params.outputs && column < columns {
            partials[at.x * params.outputs * (columns + 1u) + o * columns + column] = sums[j];
        }
    }
}

@compute @workgroup_size(WG)
fn conv1d_grad_weight(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let columns = params.inputs * params.taps;
    let at = place(group_index(wid, nwg), params.outputs, columns);
    let model = at.x / params.splits;
    if model >= params.models {
        return;
    }
    let range = split_range(at.x % params.splits);
    var tile = zero_tile();
    var bias_sum = vec4<f32>(0.0);
    for (var d = 0u; d < (range.y - range.x) * range.w; d += STEP) {
        if tid < STEP {
            sh_length[tid] = params.time;
        }
        workgroupBarrier();
        tile = grad_weight_step(tile, model, range, at, d, tid);
        bias_sum = bias_step(bias_sum, at.z, tid);
        workgroupBarrier();
    }
    let o = at.y + thread_row(tid);
    write_partials(at, o, tid, tile.r0);
    write_partials(at, o + 1u, tid, tile.r1);
    write_partials(at, o + 2u, tid, tile.r2);
    write_partials(at, o + 3u, tid, tile.r3);
    if at.z == 0u && tid < ROW_QUADS {
        for (var j = 0u; j < 4u; j++) {
            if at.y + 4u * tid + j < params.outputs {
                partials[(at.x + 1u) * params.outputs * (columns + 1u) - params.outputs + at.y + 4u * tid + j] = bias_sum[j];
            }
        }
    }
}

@group(0) @binding(4) var<storage, read> lengths_of: array<u32>;
@group(0) @binding(5) var<storage, read_write> partials_ragged: array<f32>;

fn write_partials_ragged(at: vec3<u32>, o: u32, tid: u32, sums: vec4<f32>) {
    let columns = params.inputs * params.taps;
    for (var j = 0u; j < 4u; j++) {
        let column = at.z + thread_col(tid) + j;
        if o < params.outputs && column < columns {
            partials_ragged[at.x * params.outputs * (columns + 1u) + o * columns + column] = sums[j];
        }
    }
}

@compute @workgroup_size(WG)
fn conv1d_grad_weight_ragged(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let columns = params.inputs * params.taps;
    let at = place(group_index(wid, nwg), params.outputs, columns);
    let model = at.x / params.splits;
    if model >= params.models {
        return;
    }
    let range = split_range(at.x % params.splits);
    var tile = zero_tile();
    var bias_sum = vec4<f32>(0.0);
    for (var d = 0u; d < (range.y - range.x) * range.w; d += STEP) {
        if tid < STEP {
            sh_length[tid] = min(lengths_of[min(range.x + (d + tid) / range.w, params.batch - 1u)], params.time);
        }
        workgroupBarrier();
        tile = grad_weight_step(tile, model, range, at, d, tid);
        bias_sum = bias_step(bias_sum, at.z, tid);
        workgroupBarrier();
    }
    let o = at.y + thread_row(tid);
    write_partials_ragged(at, o, tid, tile.r0);
    write_partials_ragged(at, o + 1u, tid, tile.r1);
    write_partials_ragged(at, o + 2u, tid, tile.r2);
    write_partials_ragged(at, o + 3u, tid, tile.r3);
    if at.z == 0u && tid < ROW_QUADS {
        for (var j = 0u; j < 4u; j++) {
            if at.y + 4u * tid + j < params.outputs {
                partials_ragged[(at.x + 1u) * params.outputs * (columns + 1u) - params.outputs + at.y + 4u * tid + j] = bias_sum[j];
            }
        }
    }
}
