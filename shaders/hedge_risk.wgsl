// Risk figures of P&L. Maths, shapes and source: kernels/hedge_risk.rs.
//   hedge_moments     grid  rows · ⌈P / 2048⌉        workgroup WG per block, 8 pairs of neighbours a thread      reads values      writes partial
//   hedge_count       grid  queries · slabs          workgroup WG per slab      workgroup memory: 2048 counts      reads values, queries, edges      writes counts
//   hedge_sum_counts  grid  ⌈queries · 2048 / WG⌉    thread = bin      reads counts      writes sums
//   hedge_tail        grid  queries · ⌈P / 2048⌉     workgroup WG per block      reads values, queries, edges      writes tails

struct HedgeRiskParams {
    rows: u32,
    count: u32,
    period: u32,
    slabs: u32,
    known: u32,
    bins: u32,
    risk_aversion: f32,
}

@group(0) @binding(0) var<uniform> params: HedgeRiskParams;
@group(0) @binding(1) var<storage, read> values: array<f32>;
@group(0) @binding(2) var<storage, read_write> partial: array<f32>;
@group(0) @binding(2) var<storage, read> queries: array<u32>;
@group(0) @binding(3) var<storage, read> edges: array<f32>;
@group(0) @binding(4) var<storage, read_write> counts: array<u32>;
@group(0) @binding(4) var<storage, read_write> tails: array<f32>;
@group(0) @binding(1) var<storage, read> part_counts: array<u32>;
@group(0) @binding(2) var<storage, read_write> sums: array<u32>;

override WG: u32 = 128u;

const LANES = 128u;
const BLOCK = 2048u;
const PAIRS = 8u;
const PARTIAL = 10u;
const BINS = 2048u;
const TAIL = 4u;

var<workgroup> sh_sums: array<vec4<f32>, 128>;
var<workgroup> sh_more: array<vec2<f32>, 128>;
var<workgroup> sh_counts: array<atomic<u32>, 2048>;

// Sums over the workgroup, in every thread.
fn sum_all(tid: u32, x: vec4<f32>) -> vec4<f32> {
    workgroupBarrier();
    sh_sums[tid] = x;
    for (var lanes = LANES / 2u; lanes > 0u; lanes /= 2u) {
        workgroupBarrier();
        if tid < lanes {
            sh_sums[tid] += sh_sums[tid + lanes];
        }
    }
    workgroupBarrier();
    return sh_sums[0];
}

// (least, −largest) over the workgroup.
fn min_all(tid: u32, x: vec2<f32>) -> vec2<f32> {
    workgroupBarrier();
    sh_more[tid] = x;
    for (var lanes = LANES / 2u; lanes > 0u; lanes /= 2u) {
        workgroupBarrier();
        if tid < lanes {
            sh_more[tid] = min(sh_more[tid], sh_more[tid + lanes]);
        }
    }
    workgroupBarrier();
    return sh_more[0];
}

@compute @workgroup_size(WG)
fn hedge_moments(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let group = group_index(wid, nwg);
    let blocks = (params.count + BLOCK - 1u) / BLOCK;
    let row = group / blocks;
    if row >= params.rows {
        return;
    }
    let first = (group % blocks) * BLOCK;
    let size = min(BLOCK, params.count - first);
    let base = row * params.count + first;
    let pivot = values[base];

    // mean and extremes
    var total = 0.0;
    var least = pivot;
    var most = pivot;
    for (var i = 0u; i < 2u * PAIRS; i++) {
        let at = 2u * (tid + (i / 2u) * LANES) + i % 2u;
        if at < size {
            let x = values[base + at];
            total += x - pivot;
            least = min(least, x);
            most = max(most, x);
        }
    }
    let mean = pivot + sum_all(tid, vec4<f32>(total, 0.0, 0.0, 0.0)).x / f32(size);
    let ends = min_all(tid, vec2<f32>(least, -most));
    least = ends.x;

    // central sums and exponential sums; a lone last value has no neighbour
    var central = vec4<f32>(0.0);
    var weights = vec4<f32>(0.0);
    let weighted = row % max(params.period, 1u) == 0u;
    for (var i = 0u; i < PAIRS; i++) {
        let at = 2u * (tid + i * LANES);
        let has_a = select(0.0, 1.0, at < size);
        let has_b = select(0.0, 1.0, at + 1u < size);
        let x = vec2<f32>(values[base + min(at, size - 1u)], values[base + min(at + 1u, size - 1u)]);
        let d = (x - mean) * vec2<f32>(has_a, has_b);
        let q = d * d;
        central += vec4<f32>(q.x + q.y, q.x * d.x + q.y * d.y, q.x * q.x + q.y * q.y, d.x * d.y);
        let w = vec2<f32>(exp_f32(params.risk_aversion * (least - x.x)) * has_a, exp_f32(params.risk_aversion * (least - x.y)) * has_b);
        weights += vec4<f32>(w.x + w.y, w.x * w.x + w.y * w.y, w.x * w.y, 0.0);
    }
    central = sum_all(tid, central);
    weights = sum_all(tid, weights);
    if tid == 0u {
        let out = group * PARTIAL;
        partial[out] = mean;
        partial[out + 1u] = central.x;
        partial[out + 2u] = central.y;
        partial[out + 3u] = central.z;
        partial[out + 4u] = central.w;
        partial[out + 5u] = ends.x;
        partial[out + 6u] = -ends.y;
        if weighted {
            partial[out + 7u] = weights.x;
            partial[out + 8u] = weights.y;
            partial[out + 9u] = weights.z;
        }
    }
}

// Image of a real whose order as a whole number is the real's.
fn image(x: f32) -> u32 {
    let raw = bitcast<u32>(x);
    return select(raw | 0x80000000u, ~raw, raw >> 31u == 1u);
}

@compute @workgroup_size(WG)
fn hedge_count(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let group = group_index(wid, nwg);
    let query = group / params.slabs;
    if query >= params.rows {
        return;
    }
    for (var bin = tid; bin < BINS; bin += LANES) {
        atomicStore(&sh_counts[bin], 0u);
    }
    workgroupBarrier();
    let slab = (params.count + params.slabs - 1u) / params.slabs;
    let first = min((group % params.slabs) * slab, params.count);
    let end = min(first + slab, params.count);
    let base = queries[2u * query] * params.count;
    let prefix = queries[2u * query + 1u];
    let low = edges[select(0u, 2u * query, params.known >= 32u)];
    let scale = edges[select(0u, 2u * query + 1u, params.known >= 32u)];
    let shift = select(select(0u, 10u, params.known == 11u), 21u, params.known == 0u);
    let digits = select(1024u, 2048u, params.known < 22u);
    for (var i = first + tid; i < end; i += LANES) {
        let x = values[base + i];
        let whole = image(x);
        let linear = min(u32(max((x - low) * scale, 0.0)), max(params.bins, 1u) - 1u);
        let bin = select((whole >> shift) & (digits - 1u), linear, params.known >= 32u);
        if params.known >= 32u || params.known == 0u || (whole >> ((32u - params.known) & 31u)) == prefix {
            atomicAdd(&sh_counts[min(bin, BINS - 1u)], 1u);
        }
    }
    workgroupBarrier();
    for (var bin = tid; bin < BINS; bin += LANES) {
        counts[group * BINS + bin] = atomicLoad(&sh_counts[bin]);
    }
}

@compute @workgroup_size(WG)
fn hedge_sum_counts(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let at = group_index(wid, nwg) * WG + tid;
    if at >= params.rows * BINS {
        return;
    }
    let base = (at / BINS) * params.slabs * BINS + at % BINS;
    var sum = 0u;
    for (var part = 0u; part < params.slabs; part++) {
        sum += part_counts[base + part * BINS];
    }
    sums[at] = sum;
}

@compute @workgroup_size(WG)
fn hedge_tail(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let group = group_index(wid, nwg);
    let blocks = (params.count + BLOCK - 1u) / BLOCK;
    let query = group / blocks;
    if query >= params.rows {
        return;
    }
    let first = (group % blocks) * BLOCK;
    let size = min(BLOCK, params.count - first);
    let base = queries[2u * query] * params.count + first;
    let level = edges[2u * query];
    var sum = vec4<f32>(0.0);
    for (var i = 0u; i < PAIRS; i++) {
        let at = 2u * (tid + i * LANES);
        let a = select(0.0, max(level - values[base + min(at, size - 1u)], 0.0), at < size);
        let b = select(0.0, max(level - values[base + min(at + 1u, size - 1u)], 0.0), at + 1u < size);
        sum += vec4<f32>(a + b, a * a + b * b, a * b, select(0.0, 1.0, a > 0.0) + select(0.0, 1.0, b > 0.0));
    }
    sum = sum_all(tid, sum);
    if tid == 0u {
        tails[group * TAIL] = sum.x;
        tails[group * TAIL + 1u] = sum.y;
        tails[group * TAIL + 2u] = sum.z;
        tails[group * TAIL + 3u] = sum.w;
    }
}
