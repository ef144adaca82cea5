// Pooling over time. Maths, shapes and source: kernels/pool.rs.
//   pool                   grid ⌈B·H / WG⌉     thread = (sequence, column), over the valid steps
//   pool_backward          grid ⌈B·T·H / WG⌉   thread = element of grad_h
//   pool_weights           grid B              group = sequence; thread takes steps tid, tid + WG, …
//   pool_weights_backward  grid B              the same

struct PoolParams {
    rows: u32,
    steps: u32,
    width: u32,
    kind: u32,
    period: u32,
    first: u32,
    h_at: u32,
    w_at: u32,
    y_at: u32,
}

override WG: u32 = 128u;

@group(0) @binding(0) var<uniform> params: PoolParams;

const POOL_LAST: u32 = 0u;
const POOL_MEAN: u32 = 1u;

var<workgroup> sh_value: array<f32, WG>;

fn pool_valid(length: u32) -> u32 {
    return min(length, params.steps);
}

// Sum over the group, in every thread.
fn pool_sum(tid: u32, v: f32) -> f32 {
    sh_value[tid] = v;
    workgroupBarrier();
    for (var half = WG / 2u; half > 0u; half /= 2u) {
        if tid < half {
            sh_value[tid] += sh_value[tid + half];
        }
        workgroupBarrier();
    }
    let total = sh_value[0];
    workgroupBarrier();
    return total;
}

// Maximum over the group, in every thread.
fn pool_max(tid: u32, v: f32) -> f32 {
    sh_value[tid] = v;
    workgroupBarrier();
    for (var half = WG / 2u; half > 0u; half /= 2u) {
        if tid < half {
            sh_value[tid] = max(sh_value[tid], sh_value[tid + half]);
        }
        workgroupBarrier();
    }
    let most = sh_value[0];
    workgroupBarrier();
    return most;
}

// ---- forward ----------------------------------------------------------------------------------------------------

@group(0) @binding(1) var<storage, read> h: array<f32>;
@group(0) @binding(2) var<storage, read> weights: array<f32>;
@group(0) @binding(3) var<storage, read> lengths: array<u32>;
@group(0) @binding(4) var<storage, read_write> y: array<f32>;

@compute @workgroup_size(WG)
fn pool(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let i = group_index(wid, nwg) * WG + tid;
    let b = i / params.width;
    if b >= params.rows {
        return;
    }
    let n = pool_valid(lengths[(params.first + b) % params.period]);
    let at = params.h_at + b * params.steps * params.width + i % params.width;
    if n == 0u {
        y[params.y_at + i] = 0.0;
        return;
    }
    if params.kind == POOL_LAST {
        y[params.y_at + i] = h[at + (n - 1u) * params.width];
        return;
    }
    var total = 0.0;
    var t = 0u;
    while t < n {
        let end = min(t + 32u, n);
        var block = 0.0;
        while t < end {
            var w = 1.0;
            if params.kind != POOL_MEAN {
                w = weights[params.w_at + b * params.steps + t];
            }
            block += w * h[at + t * params.width];
            t++;
        }
        total += block;
    }
    if params.kind == POOL_MEAN {
        total = total / f32(n);
    }
    y[params.y_at + i] = total;
}

// ---- backward ---------------------------------------------------------------------------------------------------

@group(0) @binding(1) var<storage, read> grad_y: array<f32>;
@group(0) @binding(4) var<storage, read_write> grad_h: array<f32>;

@compute @workgroup_size(WG)
fn pool_backward(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let i = group_index(wid, nwg) * WG + tid;
    let step = i / params.width;
    let b = step / params.steps;
    if b >= params.rows {
        return;
    }
    let t = step % params.steps;
    let n = pool_valid(lengths[(params.first + b) % params.period]);
    var v = 0.0;
    if t < n {
        let g = grad_y[params.y_at + b * params.width + i % params.width];
        if params.kind == POOL_LAST {
            v = select(0.0, g, t + 1u == n);
        } else if params.kind == POOL_MEAN {
            v = g / f32(n);
        } else {
            v = g * weights[params.w_at + step];
        }
    }
    grad_h[params.h_at + i] = v;
}

// ---- weights ----------------------------------------------------------------------------------------------------

@group(0) @binding(1) var<storage, read> scores: array<f32>;
@group(0) @binding(2) var<storage, read> score_lengths: array<u32>;
@group(0) @binding(3) var<storage, read_write> score_weights: array<f32>;

@compute @workgroup_size(WG)
fn pool_weights(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let b = group_index(wid, nwg);
    if b >= params.rows {
        return;
    }
    let n = pool_valid(score_lengths[(params.first + b) % params.period]);
    let source = params.h_at + b * params.steps;
    let to = params.w_at + b * params.steps;
    var most = -1e30;
    for (var t = tid; t < n; t += WG) {
        most = max(most, scores[source + t]);
    }
    most = pool_max(tid, most);
    var sum = 0.0;
    for (var t = tid; t < n; t += WG) {
        let e = exp_f32(scores[source + t] - most);
        score_weights[to + t] = e;
        sum += e;
    }
    sum = pool_sum(tid, sum);
    for (var t = tid; t < params.steps; t += WG) {
        if t < n {
            score_weights[to + t] = score_weights[to + t] / sum;
        } else {
            score_weights[to + t] = 0.0;
        }
    }
}

@group(0) @binding(3) var<storage, read> row_grad_y: array<f32>;
@group(0) @binding(4) var<storage, read> row_lengths: array<u32>;
@group(0) @binding(5) var<storage, read_write> grad_scores: array<f32>;

@compute @workgroup_size(WG)
fn pool_weights_backward(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let b = group_index(wid, nwg);
    if b >= params.rows {
        return;
    }
    let n = pool_valid(row_lengths[(params.first + b) % params.period]);
    let at = params.w_at + b * params.steps;
    // g_t, kept in grad_scores by the thread that reads it again
    var mean = 0.0;
    for (var t = tid; t < n; t += WG) {
        let source = params.h_at + (b * params.steps + t) * params.width;
        var g = 0.0;
        for (var j = 0u; j < params.width; j++) {
            g += h[source + j] * row_grad_y[params.y_at + b * params.width + j];
        }
        grad_scores[at + t] = g;
        mean += weights[at + t] * g;
    }
    mean = pool_sum(tid, mean);
    for (var t = tid; t < params.steps; t += WG) {
        if t < n {
            grad_scores[at + t] = weights[at + t] * (grad_scores[at + t] - mean);
        } else {
            grad_scores[at + t] = 0.0;
        }
    }
}
