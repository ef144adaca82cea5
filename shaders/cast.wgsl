// Reals between storages, sums in 16 bits, and copies that start or end inside a word. Maths and shapes: kernels/cast.rs.
//   cast_to, cast_from, cast_add, cast_copy   grid ⌈count / WG⌉   thread = element

struct CastParams {
    count: u32,
    from_at: u32,
    to_at: u32,
    scale: f32,
}

@group(0) @binding(0) var<uniform> params: CastParams;

override WG: u32 = 128u;

// ---- f32 to the storage --------------------------------------------------------------------------------------------------

@group(0) @binding(1) var<storage, read> real_from: array<f32>;
@group(0) @binding(2) var<storage, read_write> stored_to: array<Stored>;

@compute @workgroup_size(WG)
fn cast_to(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let at = group_index(wid, nwg) * WG + tid;
    if at < params.count {
        stored_to[at] = stored(real_from[at] * params.scale);
    }
}

// ---- the storage to f32 --------------------------------------------------------------------------------------------------

@group(0) @binding(1) var<storage, read> stored_from: array<Stored>;
@group(0) @binding(2) var<storage, read_write> real_to: array<f32>;

@compute @workgroup_size(WG)
fn cast_from(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let at = group_index(wid, nwg) * WG + tid;
    if at < params.count {
        real_to[at] = f32(stored_from[at]) * params.scale;
    }
}

// ---- sums and copies -----------------------------------------------------------------------------------------------------

@group(0) @binding(2) var<storage, read> other_from: array<Stored>;
@group(0) @binding(3) var<storage, read_write> sum_to: array<Stored>;

@compute @workgroup_size(WG)
fn cast_add(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let at = group_index(wid, nwg) * WG + tid;
    if at < params.count {
        sum_to[at] = stored(f32(stored_from[at]) + f32(other_from[at]));
    }
}

@compute @workgroup_size(WG)
fn cast_copy(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let at = group_index(wid, nwg) * WG + tid;
    if at < params.count {
        stored_to[params.to_at + at] = stored_from[params.from_at + at];
    }
}
