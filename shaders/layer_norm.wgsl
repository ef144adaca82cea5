// Layer normalisation and its gradients. Maths, shapes and source: kernels/layer_norm.rs.
//   layer_norm_forward[_small], layer_norm_grad_x[_small]  grid  ⌈N / (WG/LANES)⌉          LANES threads per row
//   layer_norm_grad_weight[_small]                         grid  splits·⌈D / COLUMNS⌉      thread = (row of the split, column)
//   workgroup memory: 2·WG floats

struct LayerNormParams {
    rows: u32,
    width: u32,
    first_row: u32,
    model_rows: u32,
    flags: u32,
    eps: f32,
    eps_low: f32,
    splits: u32,
    split_rows: u32,
    first_split: u32,
    count: u32,
}

@group(0) @binding(0) var<uniform> params: LayerNormParams;

override WG: u32 = 128u;
override LANES: u32 = 32u;
override COLUMNS: u32 = 128u;
const WEIGHT: u32 = 1u;
const BIAS: u32 = 2u;

var<workgroup> sh_sum: array<vec2<f32>, WG>;

// Sum over the LANES threads of a row. All threads of the workgroup call it.
fn row_sum(tid: u32, x: vec2<f32>) -> vec2<f32> {
    let lane = tid % LANES;
    sh_sum[tid] = x;
    workgroupBarrier();
    for (var half = LANES / 2u; half > 0u; half /= 2u) {
        if lane < half {
            sh_sum[tid] += sh_sum[tid + half];
        }
        workgroupBarrier();
    }
    let sum = sh_sum[tid - lane];
    workgroupBarrier();
    return sum;
}

// ---- forward ------------------------------------------------------------------------------------------------------------

@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read> weight: array<f32>;
@group(0) @binding(3) var<storage, read> bias: array<f32>;
@group(0) @binding(4) var<storage, read_write> y: array<f32>;
@group(0) @binding(5) var<storage, read_write> saved_out: array<f32>;

fn forward(group: u32, tid: u32) {
    let rows_here = WG / LANES;
    if group * rows_here >= params.rows {
        return;
    }
    let row = group * rows_here + tid / LANES;
    let lane = tid % LANES;
    let valid = row < params.rows;
    // a row past the end repeats the last: all threads meet at the barriers
    let from_value = min(row, params.rows - 1u) * params.width;
    let first = x[from_value];
    var sum = 0.0;
    for (var j = lane; j < params.width; j += LANES) {
        sum += x[from_value + j] - first;
    }
    let shift = row_sum(tid, vec2<f32>(sum, 0.0)).x / f32(params.width);
    var squares = 0.0;
    for (var j = lane; j < params.width; j += LANES) {
        let c = (x[from_value + j] - first) - shift;
        squares += c * c;
    }
    let r = 1.0 / sqrt(row_sum(tid, vec2<f32>(squares, 0.0)).x / f32(params.width) + params.eps);
    if !valid {
        return;
    }
    let own = (params.first_row + row) / params.model_rows * params.width;
    for (var j = lane; j < params.width; j += LANES) {
        var h = ((x[from_value + j] - first) - shift) * r;
        if (params.flags & WEIGHT) != 0u {
            h *= weight[own + j];
        }
        if (params.flags & BIAS) != 0u {
            h += bias[own + j];
        }
        y[from_value + j] = h;
    }
    if lane == 0u {
        saved_out[2u * row] = shift;
        saved_out[2u * row + 1u] = r;
    }
}

@compute @workgroup_size(WG)
fn layer_norm_forward(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    forward(group_index(wid, nwg), tid);
}

@compute @workgroup_size(WG)
fn layer_norm_forward_small(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    forward(group_index(wid, nwg), tid);
}

// ---- gradient with respect to x --------------------------------------------------------------------------------------------

@group(0) @binding(2) var<storage, read> saved: array<f32>;
@group(0) @binding(3) var<storage, read> weight_in: array<f32>;
@group(0) @binding(4) var<storage, read> grad_y: array<f32>;
@group(0) @binding(5) var<storage, read_write> grad_x: array<f32>;

// grad_y · weight
fn scaled(at: u32, own: u32) -> f32 {
    if (params.flags & WEIGHT) != 0u {
        return grad_y[at] * weight_in[own];
    }
    return grad_y[at];
}

fn backward(group: u32, tid: u32) {
    let rows_here = WG / LANES;
    if group * rows_here >= params.rows {
        return;
    }
    let row = group * rows_here + tid / LANES;
    let lane = tid % LANES;
    let near = min(row, params.rows - 1u);
    let from_value = near * params.width;
    let own = (params.first_row + near) / params.model_rows * params.width;
    let first = x[from_value];
    let shift = saved[2u * near];
    let r = saved[2u * near + 1u];
    var sums = vec2<f32>(0.0);
    for (var j = lane; j < params.width; j += LANES) {
        let a = scaled(from_value + j, own + j);
        sums += a * vec2<f32>(1.0, ((x[from_value + j] - first) - shift) * r);
    }
    let means = row_sum(tid, sums) / f32(params.width);
    if row >= params.rows {
        return;
    }
    for (var j = lane; j < params.width; j += LANES) {
        let h = ((x[from_value + j] - first) - shift) * r;
        grad_x[from_value + j] = r * (scaled(from_value + j, own + j) - means.x - h * means.y);
    }
}

@compute @workgroup_size(WG)
fn layer_norm_grad_x(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    backward(group_index(wid, nwg), tid);
}

@compute @workgroup_size(WG)
fn layer_norm_grad_x_small(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    backward(group_index(wid, nwg), tid);
}

// ---- gradient with respect to weight and bias --------------------------------------------------------------------------------

@group(0) @binding(3) var<storage, read> grad_y_in: array<f32>;
@group(0) @binding(4) var<storage, read_write> partials: array<f32>;

fn weight_sums(group: u32, tid: u32) {
    let across = (params.width + COLUMNS - 1u) / COLUMNS;
    if group >= params.count * across {
        return;
    }
    let local = group / across;
    let split = params.first_split + local;
    let column = group % across * COLUMNS + tid % COLUMNS;
    let before = split / params.splits * params.model_rows - params.first_row;
    let from_row = split % params.splits * params.split_rows;
    let to_row = min(from_row + params.split_rows, params.model_rows);
    var sums = vec2<f32>(0.0);
    if column < params.width {
        for (var n = from_row + tid / COLUMNS; n < to_row; n += WG / COLUMNS) {
            let row = before + n;
            let g = grad_y_in[row * params.width + column];
            let h = ((x[row * params.width + column] - x[row * params.width]) - saved[2u * row]) * saved[2u * row + 1u];
            sums += g * vec2<f32>(h, 1.0);
        }
    }
    sh_sum[tid] = sums;
    workgroupBarrier();
    for (var half = WG / 2u; half >= COLUMNS; half /= 2u) {
        if tid < half {
            sh_sum[tid] += sh_sum[tid + half];
        }
        workgroupBarrier();
    }
    if tid < COLUMNS && column < params.width {
        partials[2u * local * params.width + column] = sh_sum[tid].x;
        partials[(2u * local + 1u) * params.width + column] = sh_sum[tid].y;
    }
}

@compute @workgroup_size(WG)
fn layer_norm_grad_weight(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    weight_sums(group_index(wid, nwg), tid);
}

@compute @workgroup_size(WG)
fn layer_norm_grad_weight_small(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    weight_sums(group_index(wid, nwg), tid);
}
