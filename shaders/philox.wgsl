// Philox4x32-10: bits, uniforms and normals. Maths, shapes and source: kernels/philox.rs.
//   grid  ceil(N / WG)      workgroup WG      thread = row
//   reads counter [N,4], key [N,2]      writes bits, uniform, normal [N,4]

struct PhiloxParams {
    n: u32,
}

@group(0) @binding(0) var<uniform> params: PhiloxParams;
@group(0) @binding(1) var<storage, read> counter: array<u32>;
@group(0) @binding(2) var<storage, read> key: array<u32>;
@group(0) @binding(3) var<storage, read_write> bits: array<u32>;
@group(0) @binding(4) var<storage, read_write> uniforms: array<f32>;
@group(0) @binding(5) var<storage, read_write> normal: array<f32>;

override WG: u32 = 64u;

@compute @workgroup_size(WG)
fn philox(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let row = group_index(wid, nwg) * WG + tid;
    if row >= params.n {
        return;
    }
    let at = 4u * row;
    let word = philox4x32(vec4<u32>(counter[at], counter[at + 1u], counter[at + 2u], counter[at + 3u]), vec2<u32>(key[2u * row], key[2u * row + 1u]));
    for (var pair = 0u; pair < 4u; pair += 2u) {
        let u = uniform_of(word[pair]);
        let v = uniform_of(word[pair + 1u]);
        let z = sqrt(2.0 * neg_log_uniform(word[pair] >> 8u)) * turn(v);
        bits[at + pair] = word[pair];
        bits[at + pair + 1u] = word[pair + 1u];
        uniforms[at + pair] = u;
        uniforms[at + pair + 1u] = v;
        normal[at + pair] = z.x;
        normal[at + pair + 1u] = z.y;
    }
}
