// Sharpe ratio of every series in every window, and its gradient. Maths, shapes and source: kernels/walk_forward_sharpe.rs.
//   segment_moments               grid  N·G             one workgroup per (series, segment)
//   walk_forward_sharpe           grid  ⌈N·W / WG⌉      thread = (series, window)
//   walk_forward_sharpe_backward  grid  ⌈N·T / WG⌉      thread = (series, bar)

struct WalkForwardParams {
    n: u32,
    t: u32,
    w: u32,
    g: u32,
    periods: f32,
    periods_low: f32,
}

@group(0) @binding(0) var<uniform> params: WalkForwardParams;

override WG: u32 = 64u;
const OUTSIDE: u32 = 0xffffffffu;

var<workgroup> sh_sum: array<f32, WG>;

fn reduce(tid: u32) -> f32 {
    workgroupBarrier();
    for (var half = WG / 2u; half > 0u; half /= 2u) {
        if tid < half {
            sh_sum[tid] += sh_sum[tid + half];
        }
        workgroupBarrier();
    }
    let total = sh_sum[0];
    workgroupBarrier();
    return total;
}

// ---- segments ---------------------------------------------------------------------------------------------------

@group(0) @binding(1) var<storage, read> returns: array<f32>;
@group(0) @binding(2) var<storage, read> edges: array<u32>;
@group(0) @binding(3) var<storage, read_write> segments: array<f32>;

@compute @workgroup_size(WG)
fn segment_moments(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let group = group_index(wid, nwg);
    if group >= params.n * params.g {
        return;
    }
    let row = group / params.g;
    let g = group % params.g;
    let from_bar = row * params.t + edges[g];
    let to_bar = row * params.t + edges[g + 1u];
    let first = returns[from_bar];
    var sum = 0.0;
    for (var j = from_bar + tid; j < to_bar; j += WG) {
        sum += returns[j] - first;
    }
    sh_sum[tid] = sum;
    let offset = reduce(tid) / f32(to_bar - from_bar);
    var squares = 0.0;
    for (var j = from_bar + tid; j < to_bar; j += WG) {
        let d = (returns[j] - first) - offset;
        squares += d * d;
    }
    sh_sum[tid] = squares;
    let m2 = reduce(tid);
    if tid == 0u {
        segments[2u * group] = first + offset;
        segments[2u * group + 1u] = m2;
    }
}

// ---- windows ----------------------------------------------------------------------------------------------------

@group(0) @binding(1) var<storage, read> segments_in: array<f32>;
@group(0) @binding(3) var<storage, read> spans: array<u32>;
@group(0) @binding(4) var<storage, read_write> sharpe: array<f32>;
@group(0) @binding(5) var<storage, read_write> moments: array<f32>;

@compute @workgroup_size(WG)
fn walk_forward_sharpe(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let at = group_index(wid, nwg) * WG + tid;
    if at >= params.n * params.w {
        return;
    }
    let row = at / params.w;
    let window = at % params.w;
    var count = 0.0;
    var mean = 0.0;
    var m2 = 0.0;
    for (var g = spans[2u * window]; g < spans[2u * window + 1u]; g++) {
        let more = f32(edges[g + 1u] - edges[g]);
        let total = count + more;
        let delta = segments_in[2u * (row * params.g + g)] - mean;
        mean += delta * (more / total);
        m2 += segments_in[2u * (row * params.g + g) + 1u] + delta * delta * (count * more / total);
        count = total;
    }
    let valid = count > 1.0 && m2 > 0.0;
    let deviation = select(0.0, sqrt(m2 / max(count - 1.0, 1.0)), valid);
    sharpe[at] = select(UNDEFINED, mean / deviation * sqrt(params.periods), valid);
    moments[2u * at] = mean;
    moments[2u * at + 1u] = deviation;
}

// ---- backward ---------------------------------------------------------------------------------------------------

@group(0) @binding(2) var<storage, read> moments_in: array<f32>;
@group(0) @binding(3) var<storage, read> grad_sharpe: array<f32>;
@group(0) @binding(4) var<storage, read> edges_in: array<u32>;
@group(0) @binding(5) var<storage, read> spans_in: array<u32>;
@group(0) @binding(6) var<storage, read> segment_of: array<u32>;
@group(0) @binding(7) var<storage, read> covers: array<u32>;
@group(0) @binding(8) var<storage, read_write> grad_returns: array<f32>;

@compute @workgroup_size(WG)
fn walk_forward_sharpe_backward(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let at = group_index(wid, nwg) * WG + tid;
    if at >= params.n * params.t {
        return;
    }
    let row = at / params.t;
    let g = segment_of[at % params.t];
    var sum = 0.0;
    if g != OUTSIDE {
        for (var c = covers[g]; c < covers[g + 1u]; c++) {
            let window = covers[c];
            let i = row * params.w + window;
            let mean = moments_in[2u * i];
            let deviation = moments_in[2u * i + 1u];
            if deviation > 0.0 {
                let count = f32(edges_in[spans_in[2u * window + 1u]] - edges_in[spans_in[2u * window]]);
                let slope = mean / ((count - 1.0) * deviation * deviation);
                sum += grad_sharpe[i] * sqrt(params.periods) / deviation * (1.0 / count - slope * (returns[at] - mean));
            }
        }
    }
    grad_returns[at] = sum;
}
