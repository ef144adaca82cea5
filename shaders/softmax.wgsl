// Softmax of rows, its logarithm, masks, and the gradient. Maths and shapes: kernels/softmax.rs.
//   all entries  grid  ⌈N / (WG/LANES)⌉   LANES threads per row      workgroup memory: WG floats

struct SoftmaxParams {
    rows: u32,
    width: u32,
    log: u32,
    words: u32,
}

@group(0) @binding(0) var<uniform> params: SoftmaxParams;

override WG: u32 = 128u;
override LANES: u32 = 32u;
const LOG_ZERO: f32 = -1e30;
const MASKED: f32 = -1e29;

var<workgroup> sh_lane: array<f32, WG>;

// Sum over the LANES threads of a row. All threads of the workgroup call it, and row_max.
fn row_sum(tid: u32, x: f32) -> f32 {
    let lane = tid % LANES;
    sh_lane[tid] = x;
    workgroupBarrier();
    for (var half = LANES / 2u; half > 0u; half /= 2u) {
        if lane < half {
            sh_lane[tid] += sh_lane[tid + half];
        }
        workgroupBarrier();
    }
    let sum = sh_lane[tid - lane];
    workgroupBarrier();
    return sum;
}

fn row_max(tid: u32, x: f32) -> f32 {
    let lane = tid % LANES;
    sh_lane[tid] = x;
    workgroupBarrier();
    for (var half = LANES / 2u; half > 0u; half /= 2u) {
        if lane < half {
            sh_lane[tid] = max(sh_lane[tid], sh_lane[tid + half]);
        }
        workgroupBarrier();
    }
    let most = sh_lane[tid - lane];
    workgroupBarrier();
    return most;
}

fn result(x: f32, most: f32, inverse: f32, log_sum: f32) -> f32 {
    if params.log == 1u {
        return select((x - most) - log_sum, LOG_ZERO, x <= MASKED);
    }
    return select(exp_f32(x - most) * inverse, 0.0, x <= MASKED);
}

// Row of a thread, clamped to the last: all threads meet at the barriers.
fn row_of(group: u32, tid: u32) -> u32 {
    return min(group * (WG / LANES) + tid / LANES, params.rows - 1u);
}

fn is_own(group: u32, tid: u32) -> bool {
    return group * (WG / LANES) + tid / LANES < params.rows;
}

// ---- forward ------------------------------------------------------------------------------------------------------------

@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;

fn forward(group: u32, tid: u32) {
    if group * (WG / LANES) >= params.rows {
        return;
    }
    let lane = tid % LANES;
    let at = row_of(group, tid) * params.width;
    var most = LOG_ZERO;
    for (var j = lane; j < params.width; j += LANES) {
        most = max(most, x[at + j]);
    }
    most = row_max(tid, most);
    var sum = 0.0;
    for (var j = lane; j < params.width; j += LANES) {
        sum += select(exp_f32(x[at + j] - most), 0.0, x[at + j] <= MASKED);
    }
    sum = row_sum(tid, sum);
    if !is_own(group, tid) {
        return;
    }
    let inverse = 1.0 / max(sum, 1e-30);
    let log_sum = log_f32(max(sum, 1e-30));
    for (var j = lane; j < params.width; j += LANES) {
        y[at + j] = result(x[at + j], most, inverse, log_sum);
    }
}

@compute @workgroup_size(WG)
fn softmax_forward(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    forward(group_index(wid, nwg), tid);
}

@compute @workgroup_size(WG)
fn softmax_forward_small(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    forward(group_index(wid, nwg), tid);
}

// ---- forward under a mask ---------------------------------------------------------------------------------------------------

@group(0) @binding(2) var<storage, read> mask: array<u32>;
@group(0) @binding(3) var<storage, read_write> y_out: array<f32>;

fn allowed_x(row: u32, j: u32) -> f32 {
    if params.words == 1u {
        if mask[row * params.width + j] == 0u {
            return LOG_ZERO;
        }
    } else if j >= mask[row] {
        return LOG_ZERO;
    }
    return x[row * params.width + j];
}

fn masked(group: u32, tid: u32) {
    if group * (WG / LANES) >= params.rows {
        return;
    }
    let lane = tid % LANES;
    let row = row_of(group, tid);
    var most = LOG_ZERO;
    for (var j = lane; j < params.width; j += LANES) {
        most = max(most, allowed_x(row, j));
    }
    most = row_max(tid, most);
    var sum = 0.0;
    for (var j = lane; j < params.width; j += LANES) {
        let v = allowed_x(row, j);
        sum += select(exp_f32(v - most), 0.0, v <= MASKED);
    }
    sum = row_sum(tid, sum);
    if !is_own(group, tid) {
        return;
    }
    let inverse = 1.0 / max(sum, 1e-30);
    let log_sum = log_f32(max(sum, 1e-30));
    for (var j = lane; j < params.width; j += LANES) {
        y_out[row * params.width + j] = result(allowed_x(row, j), most, inverse, log_sum);
    }
}

@compute @workgroup_size(WG)
fn softmax_masked(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    masked(group_index(wid, nwg), tid);
}

@compute @workgroup_size(WG)
fn softmax_masked_small(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    masked(group_index(wid, nwg), tid);
}

// ---- backward ---------------------------------------------------------------------------------------------------------------

@group(0) @binding(1) var<storage, read> y_in: array<f32>;
@group(0) @binding(2) var<storage, read> grad_y: array<f32>;
@group(0) @binding(3) var<storage, read_write> grad_x: array<f32>;

fn backward(group: u32, tid: u32) {
    if group * (WG / LANES) >= params.rows {
        return;
    }
    let lane = tid % LANES;
    let at = row_of(group, tid) * params.width;
    var sum = 0.0;
    for (var j = lane; j < params.width; j += LANES) {
        let v = y_in[at + j];
        if params.log == 1u {
            sum += select(grad_y[at + j], 0.0, v <= MASKED);
        } else {
            sum += v * grad_y[at + j];
        }
    }
    sum = row_sum(tid, sum);
    if !is_own(group, tid) {
        return;
    }
    for (var j = lane; j < params.width; j += LANES) {
        let v = y_in[at + j];
        if params.log == 1u {
            grad_x[at + j] = select(grad_y[at + j] - exp_f32(v) * sum, 0.0, v <= MASKED);
        } else {
            grad_x[at + j] = v * (grad_y[at + j] - sum);
        }
    }
}

@compute @workgroup_size(WG)
fn softmax_backward(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    backward(group_index(wid, nwg), tid);
}

@compute @workgroup_size(WG)
fn softmax_backward_small(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    backward(group_index(wid, nwg), tid);
}
