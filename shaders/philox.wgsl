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

// 2·atanh(s) for |s| ≤ 1/3.
fn two_atanh(s: f32) -> f32 {
    let q = s * s;
    let tail = q * (0.33333334 + q * (0.2 + q * (0.14285715 + q * (0.11111111 + q * (0.09090909 + q * (0.07692308 + q * 0.06666667))))));
    return 2.0 * (s + s * tail);
}

// -ln of the uniform (k + ½)·2⁻²⁴; through 1 - u, which is exact, where u ≥ ½.
fn neg_log_uniform(k: u32) -> f32 {
    if k >= 0x800000u {
        let t = (f32(0xffffffu - k) + 0.5) * 5.9604645e-8;
        return two_atanh(t / (2.0 - t));
    }
    let v = bitcast<u32>(f32(k) + 0.5);
    var e = i32(v >> 23u) - 127;
    var m = bitcast<f32>((v & 0x7fffffu) | 0x3f800000u);
    if m > 1.4142135 {
        m = m * 0.5;
        e += 1;
    }
    return f32(24 - e) * 0.6931472 - two_atanh((m - 1.0) / (m + 1.0));
}

// (cos, sin) of 2πv by quarter turns and series.
fn turn(v: f32) -> vec2<f32> {
    let quarter = floor(4.0 * v + 0.5);
    let x = (v - 0.25 * quarter) * 6.2831855;
    let q = x * x;
    let s = x * (1.0 + q * (-0.16666667 + q * (0.008333334 + q * (-0.0001984127 + q * 2.7557319e-6))));
    let c = 1.0 + q * (-0.5 + q * (0.041666668 + q * (-0.0013888889 + q * (2.4801587e-5 + q * -2.755732e-7))));
    switch u32(quarter) & 3u {
        case 0u: { return vec2<f32>(c, s); }
        case 1u: { return vec2<f32>(-s, c); }
        case 2u: { return vec2<f32>(-c, -s); }
        default: { return vec2<f32>(s, -c); }
    }
}

fn uniform_of(word: u32) -> f32 {
    return (f32(word >> 8u) + 0.5) * 5.9604645e-8;
}

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
