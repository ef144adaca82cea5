// Sums, means and maxima over axes. Maths, shapes and source: kernels/reduce.rs.
//   reduce               grid ⌈kept / (WG/lanes)⌉·parts   `lanes` threads share an output
//   reduce_max           grid ⌈kept / (WG/lanes)⌉         the same
//   reduce_max_backward  grid ⌈count / WG⌉                thread = element of grad_x

struct ReduceParams {
    kept: u32,
    reduced: u32,
    parts: u32,
    part: u32,
    lanes: u32,
    along: u32,
    divisor: u32,
    factor: f32,
    x_at: u32,
    y_at: u32,
    kn0: u32, ks0: u32, kn1: u32, ks1: u32, ks2: u32,
    rn0: u32, rs0: u32, rn1: u32, rs1: u32, rs2: u32,
}

struct ReduceSpreadParams {
    count: u32,
    k_at: u32,
    r_at: u32,
    x_at: u32,
    n0: u32, k0: u32, r0: u32,
    n1: u32, k1: u32, r1: u32,
    n2: u32, k2: u32, r2: u32,
    n3: u32, k3: u32, r3: u32,
    n4: u32, k4: u32, r4: u32,
    n5: u32, k5: u32, r5: u32,
}

override WG: u32 = 256u;

@group(0) @binding(0) var<uniform> params: ReduceParams;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;
@group(0) @binding(3) var<storage, read_write> index: array<u32>;

var<workgroup> sh_value: array<f32, WG>;
var<workgroup> sh_key: array<u32, WG>;
var<workgroup> sh_index: array<u32, WG>;

// ---- helpers ----------------------------------------------------------------------------------------------------

// Place of a thread: its output within the group, its lane, and how far its partner's memory is per lane.
fn reduce_place(tid: u32) -> vec3<u32> {
    let outputs = WG / params.lanes;
    return select(vec3<u32>(tid % outputs, tid / outputs, outputs), vec3<u32>(tid / params.lanes, tid % params.lanes, 1u), params.along == 1u);
}

// First element of output k.
fn reduce_kept_at(k: u32) -> u32 {
    let rest = k / params.kn0;
    let next = rest / params.kn1;
    return params.x_at + (k - rest * params.kn0) * params.ks0 + (rest - next * params.kn1) * params.ks1 + next * params.ks2;
}

// Where reduced index r lies from there.
fn reduce_reduced_at(r: u32) -> u32 {
    if r < params.rn0 {
        return r * params.rs0;
    }
    let rest = r / params.rn0;
    let next = rest / params.rn1;
    return (r - rest * params.rn0) * params.rs0 + (rest - next * params.rn1) * params.rs1 + next * params.rs2;
}

// ---- sums -------------------------------------------------------------------------------------------------------

@compute @workgroup_size(WG)
fn reduce(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let outputs = WG / params.lanes;
    let tiles = (params.kept + outputs - 1u) / outputs;
    let group = group_index(wid, nwg);
    if group >= tiles * params.parts {
        return;
    }
    let part = group / tiles;
    let place = reduce_place(tid);
    let k = (group % tiles) * outputs + place.x;
    // sum of this lane, 32 at a time
    var total = 0.0;
    if k < params.kept {
        let at = reduce_kept_at(k);
        let end = min((part + 1u) * params.part, params.reduced);
        var r = part * params.part + place.y;
        while r < end {
            let block_end = min(r + 32u * params.lanes, end);
            var block = 0.0;
            while r < block_end {
                block += x[at + reduce_reduced_at(r)];
                r += params.lanes;
            }
            total += block;
        }
    }
    // tree over the lanes
    sh_value[tid] = total;
    workgroupBarrier();
    for (var half = params.lanes / 2u; half > 0u; half /= 2u) {
        if place.y < half {
            sh_value[tid] += sh_value[tid + half * place.z];
        }
        workgroupBarrier();
    }
    if place.y == 0u && k < params.kept {
        y[params.y_at + part * params.kept + k] = sh_value[tid] * params.factor / f32(params.divisor);
    }
}

// ---- maxima -----------------------------------------------------------------------------------------------------

// A key that orders numbers as they are: NaN above all, -0 and 0 the same.
fn reduce_key(v: f32) -> u32 {
    let bits = bitcast<u32>(v);
    if (bits & 0x7fffffffu) > 0x7f800000u {
        return 0xffffffffu;
    }
    if (bits & 0x7fffffffu) == 0u {
        return 0x80000000u;
    }
    return select(bits | 0x80000000u, ~bits, (bits >> 31u) == 1u);
}

@compute @workgroup_size(WG)
fn reduce_max(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let outputs = WG / params.lanes;
    let group = group_index(wid, nwg);
    if group >= (params.kept + outputs - 1u) / outputs {
        return;
    }
    let place = reduce_place(tid);
    let k = group * outputs + place.x;
    // the lane's best; no number has key 0
    var best = 0u;
    var best_at = 0xffffffffu;
    if k < params.kept {
        let at = reduce_kept_at(k);
        for (var r = place.y; r < params.reduced; r += params.lanes) {
            let key = reduce_key(x[at + reduce_reduced_at(r)]);
            if key > best {
                best = key;
                best_at = r;
            }
        }
    }
    sh_key[tid] = best;
    sh_index[tid] = best_at;
    workgroupBarrier();
    for (var half = params.lanes / 2u; half > 0u; half /= 2u) {
        if place.y < half {
            let other = tid + half * place.z;
            if sh_key[other] > sh_key[tid] || (sh_key[other] == sh_key[tid] && sh_index[other] < sh_index[tid]) {
                sh_key[tid] = sh_key[other];
                sh_index[tid] = sh_index[other];
            }
        }
        workgroupBarrier();
    }
    if place.y == 0u && k < params.kept {
        y[params.y_at + k] = x[reduce_kept_at(k) + reduce_reduced_at(sh_index[tid])];
        index[params.y_at + k] = sh_index[tid];
    }
}

// ---- backward ---------------------------------------------------------------------------------------------------

@group(0) @binding(0) var<uniform> spread: ReduceSpreadParams;
@group(0) @binding(1) var<storage, read> grad_y: array<f32>;
@group(0) @binding(2) var<storage, read> spread_index: array<u32>;
@group(0) @binding(3) var<storage, read_write> grad_x: array<f32>;

@compute @workgroup_size(WG)
fn reduce_max_backward(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let i = group_index(wid, nwg) * WG + tid;
    if i >= spread.count {
        return;
    }
    var rest = i / spread.n0;
    var at = vec2<u32>(spread.k_at, spread.r_at) + (i - rest * spread.n0) * vec2<u32>(spread.k0, spread.r0);
    var next = rest / spread.n1;
    at += (rest - next * spread.n1) * vec2<u32>(spread.k1, spread.r1);
    rest = next;
    next = rest / spread.n2;
    at += (rest - next * spread.n2) * vec2<u32>(spread.k2, spread.r2);
    rest = next;
    next = rest / spread.n3;
    at += (rest - next * spread.n3) * vec2<u32>(spread.k3, spread.r3);
    rest = next;
    next = rest / spread.n4;
    at += (rest - next * spread.n4) * vec2<u32>(spread.k4, spread.r4);
    rest = next;
    next = rest / spread.n5;
    at += (rest - next * spread.n5) * vec2<u32>(spread.k5, spread.r5);
    grad_x[spread.x_at + i] = select(0.0, grad_y[at.x], spread_index[at.x] == at.y);
}
