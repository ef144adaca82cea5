// Sums of partial results in the order of the splits. Maths and shapes: kernels/split_sum.rs.
//   grid  ⌈M·C / WG⌉      thread = output

struct SplitSumParams {
    models: u32,
    splits: u32,
    width: u32,
    first: u32,
    count: u32,
}

@group(0) @binding(0) var<uniform> params: SplitSumParams;
@group(0) @binding(1) var<storage, read> partials: array<f32>;
@group(0) @binding(2) var<storage, read_write> total: array<Stored>;

override WG: u32 = 128u;

@compute @workgroup_size(WG)
fn split_sum(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let at = group_index(wid, nwg) * WG + tid;
    if at >= params.models * params.count {
        return;
    }
    let first = at / params.count * params.splits * params.width + params.first + at % params.count;
    var sum = 0.0;
    for (var s = 0u; s < params.splits; s++) {
        sum += partials[first + s * params.width];
    }
    total[at] = stored(sum);
}
