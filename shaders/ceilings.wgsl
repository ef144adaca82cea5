// The arithmetic ceiling: multiply-adds in registers. What and why: kernels/ceilings.rs.
//   grid  n      workgroup WG      every thread keeps CHAINS chains      writes out [n·WG]

struct CeilingParams {
    n: u32,
    rounds: u32,
    a: f32,
    b: f32,
}

@group(0) @binding(0) var<uniform> params: CeilingParams;
@group(0) @binding(1) var<storage, read_write> out: array<f32>;

override WG: u32 = 64u;
override CHAINS: u32 = 16u;

@compute @workgroup_size(WG)
fn ceiling_multiply_add(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let group = group_index(wid, nwg);
    if group >= params.n {
        return;
    }
    let first = f32(tid);
    let step = vec4<f32>(0.0, 1.0, 2.0, 3.0);
    var x0 = step + first;
    var x1 = x0 + 4.0;
    var x2 = x0 + 8.0;
    var x3 = x0 + f32(CHAINS - 4u);
    for (var round = 0u; round < params.rounds; round++) {
        x0 = x0 * params.a + params.b;
        x1 = x1 * params.a + params.b;
        x2 = x2 * params.a + params.b;
        x3 = x3 * params.a + params.b;
    }
    let all = x0 + x1 + x2 + x3;
    out[group * WG + tid] = all.x + all.y + all.z + all.w;
}
