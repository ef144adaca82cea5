// Embedding. Maths, shapes and source: kernels/gather.rs.
//   embedding           grid ⌈M·N·E / WG⌉              thread = element of y
//   embedding_backward  grid tables·segments·⌈V/WG⌉·⌈E/WG⌉  group = segment, WG table rows, WG columns; thread = column
//   embedding_invalid   grid lists                     group = list of ids

struct GatherParams {
    models: u32,
    rows: u32,
    width: u32,
    vocabulary: u32,
    ids_step: u32,
    ids_period: u32,
    table_step: u32,
    segment: u32,
    segments: u32,
    table_at: u32,
    ids_at: u32,
    y_at: u32,
}

override WG: u32 = 256u;

@group(0) @binding(0) var<uniform> params: GatherParams;
@group(0) @binding(1) var<storage, read> table: array<f32>;
@group(0) @binding(2) var<storage, read> ids: array<u32>;
@group(0) @binding(3) var<storage, read_write> y: array<f32>;

var<workgroup> sh_word: array<u32, WG>;

// ---- forward ----------------------------------------------------------------------------------------------------

@compute @workgroup_size(WG)
fn embedding(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let i = group_index(wid, nwg) * WG + tid;
    let row = i / params.width;
    if row >= params.models * params.rows {
        return;
    }
    let m = row / params.rows;
    let id = ids[params.ids_at + m * params.ids_step + row % params.rows];
    var v = 0.0;
    if id < params.vocabulary {
        v = table[params.table_at + m * params.table_step + id * params.width + i % params.width];
    }
    y[params.y_at + i] = v;
}

// ---- backward ---------------------------------------------------------------------------------------------------

@group(0) @binding(1) var<storage, read> grad_y: array<f32>;
@group(0) @binding(3) var<storage, read_write> sums: array<f32>;

@compute @workgroup_size(WG)
fn embedding_backward(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let row_tiles = (params.vocabulary + WG - 1u) / WG;
    let column_tiles = (params.width + WG - 1u) / WG;
    var group = group_index(wid, nwg);
    let column = (group % column_tiles) * WG + tid;
    group /= column_tiles;
    let first_row = (group % row_tiles) * WG;
    group /= row_tiles;
    let m = group / params.segments;
    let segment = group % params.segments;
    if m >= params.models {
        return;
    }
    let own_rows = min(WG, params.vocabulary - first_row);
    let at = params.y_at + ((m * params.segments + segment) * params.vocabulary + first_row) * params.width + column;
    // zero the rows that are this group's
    if column < params.width {
        for (var r = 0u; r < own_rows; r++) {
            sums[at + r * params.width] = 0.0;
        }
    }
    let end = min((segment + 1u) * params.segment, params.rows);
    for (var n = segment * params.segment; n < end; n += WG) {
        if n + tid < end {
            sh_word[tid] = ids[params.ids_at + m * params.ids_step + (n + tid) % params.ids_period];
        }
        workgroupBarrier();
        if column < params.width {
            let count = min(WG, end - n);
            for (var k = 0u; k < count; k++) {
                let r = sh_word[k] - first_row;
                if r < own_rows {
                    sums[at + r * params.width] += grad_y[params.table_at + (m * params.rows + n + k) * params.width + column];
                }
            }
        }
        workgroupBarrier();
    }
}

// ---- ids beyond the table ---------------------------------------------------------------------------------------

@group(0) @binding(1) var<storage, read> all_ids: array<u32>;
@group(0) @binding(2) var<storage, read_write> invalid: array<u32>;

@compute @workgroup_size(WG)
fn embedding_invalid(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let m = group_index(wid, nwg);
    if m >= params.models {
        return;
    }
    var count = 0u;
    for (var n = tid; n < params.rows; n += WG) {
        count += select(0u, 1u, all_ids[params.ids_at + m * params.ids_step + n] >= params.vocabulary);
    }
    sh_word[tid] = count;
    workgroupBarrier();
    for (var half = WG / 2u; half > 0u; half /= 2u) {
        if tid < half {
            sh_word[tid] += sh_word[tid + half];
        }
        workgroupBarrier();
    }
    if tid == 0u {
        invalid[params.y_at + m] = sh_word[0];
    }
}
