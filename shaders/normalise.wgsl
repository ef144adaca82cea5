// Rows of unit length. Maths, shapes and source: kernels/normalise.rs.
//   normalise, normalise_backward   grid ⌈R / (WG/lanes)⌉   `lanes` neighbouring threads share a row

struct NormaliseParams {
    rows: u32,
    width: u32,
    lanes: u32,
    eps: f32,
    x_at: u32,
    g_at: u32,
    y_at: u32,
}

override WG: u32 = 256u;

@group(0) @binding(0) var<uniform> params: NormaliseParams;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;

var<workgroup> sh_value: array<f32, WG>;

// Sum over the threads of a row, in each of them.
fn row_sum(tid: u32, lane: u32, v: f32) -> f32 {
    sh_value[tid] = v;
    workgroupBarrier();
    for (var half = params.lanes / 2u; half > 0u; half /= 2u) {
        if lane < half {
            sh_value[tid] += sh_value[tid + half];
        }
        workgroupBarrier();
    }
    let total = sh_value[tid - lane];
    workgroupBarrier();
    return total;
}

// Maximum over the threads of a row, in each of them.
fn row_max(tid: u32, lane: u32, v: f32) -> f32 {
    sh_value[tid] = v;
    workgroupBarrier();
    for (var half = params.lanes / 2u; half > 0u; half /= 2u) {
        if lane < half {
            sh_value[tid] = max(sh_value[tid], sh_value[tid + half]);
        }
        workgroupBarrier();
    }
    let most = sh_value[tid - lane];
    workgroupBarrier();
    return most;
}

// Norm of the row that starts at `at`; a thread without a row has width 0.
fn row_norm(tid: u32, lane: u32, at: u32, width: u32) -> f32 {
    var most = 0.0;
    for (var j = lane; j < width; j += params.lanes) {
        most = max(most, abs(x[at + j]));
    }
    most = row_max(tid, lane, most);
    let scale = select(1.0, most, most > 0.0);
    var total = 0.0;
    var j = lane;
    while j < width {
        let end = min(j + 32u * params.lanes, width);
        var block = 0.0;
        while j < end {
            let u = x[at + j] / scale;
            block += u * u;
            j += params.lanes;
        }
        total += block;
    }
    return scale * sqrt(row_sum(tid, lane, total));
}

@compute @workgroup_size(WG)
fn normalise(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let rows = WG / params.lanes;
    let group = group_index(wid, nwg);
    if group >= (params.rows + rows - 1u) / rows {
        return;
    }
    let row = group * rows + tid / params.lanes;
    let lane = tid % params.lanes;
    let width = select(0u, params.width, row < params.rows);
    let at = row * params.width;
    let norm = row_norm(tid, lane, params.x_at + at, width);
    let divisor = select(norm, params.eps, norm < params.eps);
    for (var j = lane; j < width; j += params.lanes) {
        y[params.y_at + at + j] = x[params.x_at + at + j] / divisor;
    }
}

@group(0) @binding(2) var<storage, read> grad_y: array<f32>;
@group(0) @binding(3) var<storage, read_write> grad_x: array<f32>;

@compute @workgroup_size(WG)
fn normalise_backward(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let rows = WG / params.lanes;
    let group = group_index(wid, nwg);
    if group >= (params.rows + rows - 1u) / rows {
        return;
    }
    let row = group * rows + tid / params.lanes;
    let lane = tid % params.lanes;
    let width = select(0u, params.width, row < params.rows);
    let at = row * params.width;
    let norm = row_norm(tid, lane, params.x_at + at, width);
    let small = norm <= params.eps;
    let divisor = select(norm, params.eps, small);
    var dot = 0.0;
    var j = lane;
    while j < width {
        let end = min(j + 32u * params.lanes, width);
        var block = 0.0;
        while j < end {
            block += (x[params.x_at + at + j] / divisor) * grad_y[params.g_at + at + j];
            j += params.lanes;
        }
        dot += block;
    }
    dot = select(row_sum(tid, lane, dot), 0.0, small);
    for (j = lane; j < width; j += params.lanes) {
        let u = x[params.x_at + at + j] / divisor;
        grad_x[params.y_at + at + j] = (grad_y[params.g_at + at + j] - u * dot) / divisor;
    }
}
