// Dense layers of many models and their gradients. Maths, shapes and splits: kernels/linear.rs.
//   linear_forward[_kept][_small]  grid  M·tiles of [N,O]      tile of rows × outputs, depth I
//   linear_grad_x[_small]          grid  (M or 1)·tiles [N,I]  tile of rows × inputs, depth O (of every model where x is shared)
//   linear_grad_weight[_small]     grid  M·S·tiles [O,I]       tile of outputs × inputs, depth the rows of a split
//   workgroup memory: 8.5 KB large, 3.6 KB small

struct LinearParams {
    models: u32,
    x_models: u32,
    rows: u32,
    inputs: u32,
    outputs: u32,
    activation: u32,
    flags: u32,
    splits: u32,
    split_rows: u32,
}

@group(0) @binding(0) var<uniform> params: LinearParams;

const BIAS: u32 = 1u;
const CONTINUE: u32 = 2u;
const GRAD_WEIGHT: u32 = 4u;
const GRAD_BIAS: u32 = 8u;
const PARTIAL: u32 = 16u;

// ---- tiles: left [rows, depth] × right [depth, columns] -----------------------------------------------------------------

// Tile of ROW_QUADS·4 × COL_QUADS·4 results; a thread has THREAD_QUADS·4 rows of 4.
override WG: u32 = 128u;
override ROW_QUADS: u32 = 16u;
override COL_QUADS: u32 = 16u;
override THREAD_QUADS: u32 = 2u;
const STEP: u32 = 16u;

// [k, quad]; a quad more per k, so that a column of quads lies in different banks.
var<workgroup> sh_left: array<vec4<f32>, STEP * (ROW_QUADS + 1u)>;
var<workgroup> sh_right: array<vec4<f32>, STEP * (COL_QUADS + 1u)>;

struct Tile {
    r0: vec4<f32>,
    r1: vec4<f32>,
    r2: vec4<f32>,
    r3: vec4<f32>,
    r4: vec4<f32>,
    r5: vec4<f32>,
    r6: vec4<f32>,
    r7: vec4<f32>,
}

fn zero_tile() -> Tile {
    let z = vec4<f32>(0.0);
    return Tile(z, z, z, z, z, z, z, z);
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
    let row = tid / COL_QUADS * THREAD_QUADS;
    let col = tid % COL_QUADS;
    for (var k = 0u; k < STEP; k++) {
        let b = sh_right[k * (COL_QUADS + 1u) + col];
        let a = sh_left[k * (ROW_QUADS + 1u) + row];
        t.r0 += a.x * b;
        t.r1 += a.y * b;
        t.r2 += a.z * b;
        t.r3 += a.w * b;
        if THREAD_QUADS == 2u {
            let c = sh_left[k * (ROW_QUADS + 1u) + row + 1u];
            t.r4 += c.x * b;
            t.r5 += c.y * b;
            t.r6 += c.z * b;
            t.r7 += c.w * b;
        }
    }
    return t;
}

// ---- forward ------------------------------------------------------------------------------------------------------------

@group(0) @binding(1) var<storage, read> x: array<Stored>;
@group(0) @binding(2) var<storage, read> weight: array<Stored>;
@group(0) @binding(3) var<storage, read> bias: array<Stored>;
@group(0) @binding(4) var<storage, read_write> y: array<Stored>;
@group(0) @binding(5) var<storage, read_write> kept_out: array<Stored>;

// Where a workgroup's tile lies: model, first row, first column.
fn place(group: u32, rows: u32, columns: u32) -> vec3<u32> {
    let across = (columns + 4u * COL_QUADS - 1u) / (4u * COL_QUADS);
    let down = (rows + 4u * ROW_QUADS - 1u) / (4u * ROW_QUADS);
    let at = group % (across * down);
    return vec3<u32>(group / (across * down), at / across * 4u * ROW_QUADS, at % across * 4u * COL_QUADS);
}

fn x_at(model: u32, row: u32, i: u32) -> f32 {
    if row < params.rows && i < params.inputs {
        return f32(x[(min(model, params.x_models - 1u) * params.rows + row) * params.inputs + i]);
    }
    return 0.0;
}

fn weight_at(model: u32, o: u32, i: u32) -> f32 {
    if o < params.outputs && i < params.inputs {
        return f32(weight[(model * params.outputs + o) * params.inputs + i]);
    }
    return 0.0;
}

fn forward_tile(at: vec3<u32>, tid: u32) -> Tile {
    var tile = zero_tile();
    for (var d = 0u; d < params.inputs; d += STEP) {
        for (var s = tid; s < STEP * ROW_QUADS; s += WG) {
            let k = s % STEP;
            let r = at.y + 4u * (s / STEP);
            sh_left[k * (ROW_QUADS + 1u) + s / STEP] =
                vec4<f32>(x_at(at.x, r, d + k), x_at(at.x, r + 1u, d + k), x_at(at.x, r + 2u, d + k), x_at(at.x, r + 3u, d + k));
        }
        for (var s = tid; s < STEP * COL_QUADS; s += WG) {
            let k = s % STEP;
            let c = at.z + 4u * (s / STEP);
            sh_right[k * (COL_QUADS + 1u) + s / STEP] =
                vec4<f32>(weight_at(at.x, c, d + k), weight_at(at.x, c + 1u, d + k), weight_at(at.x, c + 2u, d + k), weight_at(at.x, c + 3u, d + k));
        }
        workgroupBarrier();
        tile = multiply(tile, tid);
        workgroupBarrier();
    }
    return tile;
}

fn with_bias(model: u32, o: u32, sum: f32) -> f32 {
    if (params.flags & BIAS) != 0u {
        return sum + f32(bias[model * params.outputs + o]);
    }
    return sum;
}

fn write_y(model: u32, row: u32, col: u32, sums: vec4<f32>) {
    for (var j = 0u; j < 4u; j++) {
        if row < params.rows && col + j < params.outputs {
            y[(model * params.rows + row) * params.outputs + col + j] = stored(activation(params.activation, with_bias(model, col + j, sums[j])));
        }
    }
}

fn write_kept(model: u32, row: u32, col: u32, sums: vec4<f32>) {
    for (var j = 0u; j < 4u; j++) {
        if row < params.rows && col + j < params.outputs {
            kept_out[(model * params.rows + row) * params.outputs + col + j] = stored(with_bias(model, col + j, sums[j]));
        }
    }
}

fn write_tile_y(model: u32, row: u32, col: u32, t: Tile) {
    write_y(model, row, col, t.r0);
    write_y(model, row + 1u, col, t.r1);
    write_y(model, row + 2u, col, t.r2);
    write_y(model, row + 3u, col, t.r3);
    if THREAD_QUADS == 2u {
        write_y(model, row + 4u, col, t.r4);
        write_y(model, row + 5u, col, t.r5);
        write_y(model, row + 6u, col, t.r6);
        write_y(model, row + 7u, col, t.r7);
    }
}

fn write_tile_kept(model: u32, row: u32, col: u32, t: Tile) {
    write_kept(model, row, col, t.r0);
    write_kept(model, row + 1u, col, t.r1);
    write_kept(model, row + 2u, col, t.r2);
    write_kept(model, row + 3u, col, t.r3);
    if THREAD_QUADS == 2u {
        write_kept(model, row + 4u, col, t.r4);
        write_kept(model, row + 5u, col, t.r5);
        write_kept(model, row + 6u, col, t.r6);
        write_kept(model, row + 7u, col, t.r7);
    }
}

fn forward(group: u32, tid: u32) {
    let at = place(group, params.rows, params.outputs);
    if at.x >= params.models {
        return;
    }
    write_tile_y(at.x, at.y + thread_row(tid), at.z + thread_col(tid), forward_tile(at, tid));
}

fn forward_kept(group: u32, tid: u32) {
    let at = place(group, params.rows, params.outputs);
    if at.x >= params.models {
        return;
    }
    let tile = forward_tile(at, tid);
    write_tile_y(at.x, at.y + thread_row(tid), at.z + thread_col(tid), tile);
    write_tile_kept(at.x, at.y + thread_row(tid), at.z + thread_col(tid), tile);
}

@compute @workgroup_size(WG)
fn linear_forward(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    forward(group_index(wid, nwg), tid);
}

@compute @workgroup_size(WG)
fn linear_forward_small(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    forward(group_index(wid, nwg), tid);
}

@compute @workgroup_size(WG)
fn linear_forward_kept(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    forward_kept(group_index(wid, nwg), tid);
}

@compute @workgroup_size(WG)
fn linear_forward_kept_small(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    forward_kept(group_index(wid, nwg), tid);
}

// ---- gradient with respect to x --------------------------------------------------------------------------------------------

@group(0) @binding(1) var<storage, read> grad_y: array<Stored>;
@group(0) @binding(2) var<storage, read> kept: array<Stored>;
@group(0) @binding(3) var<storage, read> weight_in: array<Stored>;
@group(0) @binding(4) var<storage, read_write> grad_x: array<Stored>;

fn pulled_back(model: u32, row: u32, o: u32) -> f32 {
    if row < params.rows && o < params.outputs {
        let at = (model * params.rows + row) * params.outputs + o;
        if params.activation == 0u {
            return f32(grad_y[at]);
        }
        return f32(grad_y[at]) * activation_slope(params.activation, f32(kept[at]));
    }
    return 0.0;
}

fn weight_in_at(model: u32, o: u32, i: u32) -> f32 {
    if o < params.outputs && i < params.inputs {
        return f32(weight_in[(model * params.outputs + o) * params.inputs + i]);
    }
    return 0.0;
}

fn load_grad_x(model: u32, row: u32, col: u32) -> vec4<f32> {
    var v = vec4<f32>(0.0);
    for (var j = 0u; j < 4u; j++) {
        if row < params.rows && col + j < params.inputs {
            v[j] = f32(grad_x[(model * params.rows + row) * params.inputs + col + j]);
        }
    }
    return v;
}

fn write_grad_x(model: u32, row: u32, col: u32, sums: vec4<f32>) {
    for (var j = 0u; j < 4u; j++) {
        if row < params.rows && col + j < params.inputs {
            grad_x[(model * params.rows + row) * params.inputs + col + j] = stored(sums[j]);
        }
    }
}

fn write_tile_grad_x(model: u32, row: u32, col: u32, t: Tile) {
    write_grad_x(model, row, col, t.r0);
    write_grad_x(model, row + 1u, col, t.r1);
    write_grad_x(model, row + 2u, col, t.r2);
    write_grad_x(model, row + 3u, col, t.r3);
    if THREAD_QUADS == 2u {
        write_grad_x(model, row + 4u, col, t.r4);
        write_grad_x(model, row + 5u, col, t.r5);
        write_grad_x(model, row + 6u, col, t.r6);
        write_grad_x(model, row + 7u, col, t.r7);
    }
}

fn grad_x_tile(group: u32, tid: u32) {
    let at = place(group, params.rows, params.inputs);
    if at.x >= params.x_models {
        return;
    }
    let row = at.y + thread_row(tid);
    let col = at.z + thread_col(tid);
    var tile = zero_tile();
    if (params.flags & CONTINUE) != 0u {
        tile = Tile(load_grad_x(at.x, row, col), load_grad_x(at.x, row + 1u, col), load_grad_x(at.x, row + 2u, col), load_grad_x(at.x, row + 3u, col), tile.r4, tile.r5, tile.r6, tile.r7);
        if THREAD_QUADS == 2u {
            tile.r4 = load_grad_x(at.x, row + 4u, col);
            tile.r5 = load_grad_x(at.x, row + 5u, col);
            tile.r6 = load_grad_x(at.x, row + 6u, col);
            tile.r7 = load_grad_x(at.x, row + 7u, col);
        }
    }
    // every model where x is shared, else its own
    let last = select(at.x + 1u, params.models, params.x_models == 1u);
    for (var m = at.x; m < last; m++) {
        for (var d = 0u; d < params.outputs; d += STEP) {
            for (var s = tid; s < STEP * ROW_QUADS; s += WG) {
                let k = s % STEP;
                let r = at.y + 4u * (s / STEP);
                sh_left[k * (ROW_QUADS + 1u) + s / STEP] =
                    vec4<f32>(pulled_back(m, r, d + k), pulled_back(m, r + 1u, d + k), pulled_back(m, r + 2u, d + k), pulled_back(m, r + 3u, d + k));
            }
            for (var s = tid; s < STEP * COL_QUADS; s += WG) {
                let k = s / COL_QUADS;
                let c = at.z + 4u * (s % COL_QUADS);
                sh_right[k * (COL_QUADS + 1u) + s % COL_QUADS] =
                    vec4<f32>(weight_in_at(m, d + k, c), weight_in_at(m, d + k, c + 1u), weight_in_at(m, d + k, c + 2u), weight_in_at(m, d + k, c + 3u));
            }
            workgroupBarrier();
            tile = multiply(tile, tid);
            workgroupBarrier();
        }
    }
    write_tile_grad_x(at.x, row, col, tile);
}

@compute @workgroup_size(WG)
fn linear_grad_x(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    grad_x_tile(group_index(wid, nwg), tid);
}

@compute @workgroup_size(WG)
fn linear_grad_x_small(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    grad_x_tile(group_index(wid, nwg), tid);
}

// ---- gradient with respect to weight and bias --------------------------------------------------------------------------------

@group(0) @binding(2) var<storage, read> grad_y_in: array<Stored>;
@group(0) @binding(3) var<storage, read> kept_in: array<Stored>;
@group(0) @binding(4) var<storage, read_write> grad_weight: array<f32>;
@group(0) @binding(5) var<storage, read_write> grad_bias: array<f32>;

fn pulled_back_in(model: u32, row: u32, last: u32, o: u32) -> f32 {
    if row < last && o < params.outputs {
        let at = (model * params.rows + row) * params.outputs + o;
        if params.activation == 0u {
            return f32(grad_y_in[at]);
        }
        return f32(grad_y_in[at]) * activation_slope(params.activation, f32(kept_in[at]));
    }
    return 0.0;
}

// First value of a model's and split's grad_weight.
fn weight_start(item: u32) -> u32 {
    return item * params.outputs * (params.inputs + select(0u, 1u, (params.flags & PARTIAL) != 0u));
}

fn write_grad_weight(item: u32, row: u32, col: u32, sums: vec4<f32>) {
    for (var j = 0u; j < 4u; j++) {
        if row < params.outputs && col + j < params.inputs {
            grad_weight[weight_start(item) + row * params.inputs + col + j] = sums[j];
        }
    }
}

fn write_tile_grad_weight(item: u32, row: u32, col: u32, t: Tile) {
    write_grad_weight(item, row, col, t.r0);
    write_grad_weight(item, row + 1u, col, t.r1);
    write_grad_weight(item, row + 2u, col, t.r2);
    write_grad_weight(item, row + 3u, col, t.r3);
    if THREAD_QUADS == 2u {
        write_grad_weight(item, row + 4u, col, t.r4);
        write_grad_weight(item, row + 5u, col, t.r5);
        write_grad_weight(item, row + 6u, col, t.r6);
        write_grad_weight(item, row + 7u, col, t.r7);
    }
}

fn grad_weight_tile(group: u32, tid: u32) {
    let at = place(group, params.outputs, params.inputs);
    let model = at.x / params.splits;
    if model >= params.models {
        return;
    }
    let first = at.x % params.splits * params.split_rows;
    let last = min(first + params.split_rows, params.rows);
    var tile = zero_tile();
    // the tiles of the first inputs also sum the bias, a thread per quad of outputs
    let sums_bias = at.z == 0u && (params.flags & GRAD_BIAS) != 0u && tid < ROW_QUADS;
    var bias_sum = vec4<f32>(0.0);
    for (var n = first; n < last; n += STEP) {
        for (var s = tid; s < STEP * ROW_QUADS; s += WG) {
            let k = s / ROW_QUADS;
            let o = at.y + 4u * (s % ROW_QUADS);
            sh_left[k * (ROW_QUADS + 1u) + s % ROW_QUADS] = vec4<f32>(pulled_back_in(model, n + k, last, o), pulled_back_in(model, n + k, last, o + 1u),
                pulled_back_in(model, n + k, last, o + 2u), pulled_back_in(model, n + k, last, o + 3u));
        }
        for (var s = tid; s < STEP * COL_QUADS; s += WG) {
            let k = s / COL_QUADS;
            let i = at.z + 4u * (s % COL_QUADS);
            var v = vec4<f32>(0.0);
            if n + k < last {
                v = vec4<f32>(x_at(model, n + k, i), x_at(model, n + k, i + 1u), x_at(model, n + k, i + 2u), x_at(model, n + k, i + 3u));
            }
            sh_right[k * (COL_QUADS + 1u) + s % COL_QUADS] = v;
        }
        workgroupBarrier();
        tile = multiply(tile, tid);
        if sums_bias {
            for (var k = 0u; k < STEP; k++) {
                bias_sum += sh_left[k * (ROW_QUADS + 1u) + tid];
            }
        }
        workgroupBarrier();
    }
    if (params.flags & GRAD_WEIGHT) != 0u {
        write_tile_grad_weight(at.x, at.y + thread_row(tid), at.z + thread_col(tid), tile);
    }
    if sums_bias {
        for (var j = 0u; j < 4u; j++) {
            let o = at.y + 4u * tid + j;
            if o < params.outputs {
                if (params.flags & PARTIAL) != 0u {
                    grad_weight[weight_start(at.x) + params.outputs * params.inputs + o] = bias_sum[j];
                } else {
                    grad_bias[at.x * params.outputs + o] = bias_sum[j];
                }
            }
        }
    }
}

@compute @workgroup_size(WG)
fn linear_grad_weight(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    grad_weight_tile(group_index(wid, nwg), tid);
}

@compute @workgroup_size(WG)
fn linear_grad_weight_small(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    grad_weight_tile(group_index(wid, nwg), tid);
}
