// Walk-forward selection from exact prefix sums. Maths, shapes and source: kernels/walk_forward_select.rs.
//   walk_forward_select   grid  slots·W                  workgroup WG      threads stride over sets, tree of (key, index)
//   walk_forward_scores   grid  ⌈A·W·tiles·TILE / WG⌉    workgroup WG      thread = (asset, window, set)

struct SelectParams {
    a: u32,
    pooled: u32,
    w: u32,
    tiles: u32,
    edges: u32,
    sets: u32,
    first: u32,
    shift: u32,
}

@group(0) @binding(0) var<uniform> params: SelectParams;
@group(0) @binding(1) var<storage, read> prefix: array<u32>;
@group(0) @binding(2) var<storage, read> spans: array<u32>;

override WG: u32 = 128u;
const TILE: u32 = 64u;
const SET_WORDS: u32 = 16u;
const NONE: u32 = 0xffffffffu;

// Exact sum (xy) and sum of squares (zw) between two edges of one asset and set.
fn between(a: u32, index: u32, from_edge: u32, to_edge: u32) -> vec4<u32> {
    let tile = (a * params.tiles + index / TILE) * params.edges;
    let lane = index % TILE;
    let from_at = (tile + from_edge) * 4u * TILE + lane;
    let to_at = (tile + to_edge) * 4u * TILE + lane;
    let sum = sub64(vec2<u32>(prefix[to_at], prefix[to_at + TILE]), vec2<u32>(prefix[from_at], prefix[from_at + TILE]));
    let square = sub64(
        vec2<u32>(prefix[to_at + 2u * TILE], prefix[to_at + 3u * TILE]),
        vec2<u32>(prefix[from_at + 2u * TILE], prefix[from_at + 3u * TILE]),
    );
    return vec4<u32>(sum, square);
}

// ---- selection ----------------------------------------------------------------------------------------------------

@group(0) @binding(3) var<storage, read> sets: array<u32>;
@group(0) @binding(4) var<storage, read_write> best: array<u32>;
@group(0) @binding(5) var<storage, read_write> chosen: array<u32>;

var<workgroup> sh_key: array<u32, WG>;
var<workgroup> sh_set: array<u32, WG>;

@compute @workgroup_size(WG)
fn walk_forward_select(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let group = group_index(wid, nwg);
    if group >= params.a / params.pooled * params.w {
        return;
    }
    let window = group % params.w;
    let from_asset = group / params.w * params.pooled;
    let from_edge = spans[4u * window];
    let to_edge = spans[4u * window + 1u];
    let n = spans[4u * window + 2u] * params.pooled;

    // each thread's best; a later set must be strictly better
    var key = 0u;
    var winner = NONE;
    for (var index = tid; index < params.sets; index += WG) {
        var sum = vec2<u32>(0u, 0u);
        var square = vec2<u32>(0u, 0u);
        for (var a = from_asset; a < from_asset + params.pooled; a++) {
            let part = between(a, index, from_edge, to_edge);
            sum = add64(sum, part.xy);
            square = add64(square, part.zw);
        }
        var mine = 0u;
        if n >= 2u {
            let variance = scaled_variance(n, sum, square, params.shift);
            if !is_zero128(variance) {
                let size = magnitude64(sum);
                mine = ratio_key(mul64(size, size), variance, (sum.y >> 31u) == 1u);
            }
        }
        if winner == NONE || mine > key {
            key = mine;
            winner = index;
        }
    }
    sh_key[tid] = key;
    sh_set[tid] = winner;
    workgroupBarrier();

    // tree: larger key, then lower index
    for (var half = WG / 2u; half > 0u; half /= 2u) {
        if tid < half {
            let other = sh_set[tid + half];
            let better = sh_key[tid + half] > sh_key[tid] || (sh_key[tid + half] == sh_key[tid] && other < sh_set[tid]);
            if other != NONE && (sh_set[tid] == NONE || better) {
                sh_key[tid] = sh_key[tid + half];
                sh_set[tid] = other;
            }
        }
        workgroupBarrier();
    }
    // against earlier chunks
    if tid == 0u && sh_set[0] != NONE && (best[2u * group + 1u] == NONE || sh_key[0] > best[2u * group]) {
        best[2u * group] = sh_key[0];
        best[2u * group + 1u] = params.first + sh_set[0];
        for (var i = 0u; i < SET_WORDS; i++) {
            chosen[group * SET_WORDS + i] = sets[sh_set[0] * SET_WORDS + i];
        }
    }
}

// ---- scores -------------------------------------------------------------------------------------------------------

@group(0) @binding(3) var<storage, read_write> scores: array<f32>;

@compute @workgroup_size(WG)
fn walk_forward_scores(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let at = group_index(wid, nwg) * WG + tid;
    let lanes = params.tiles * TILE;
    if at >= params.a * params.w * lanes {
        return;
    }
    let index = at % lanes;
    let row = at / lanes;
    let window = row % params.w;
    for (var part = 0u; part < 2u; part++) {
        let span = 4u * (2u * window + part);
        let sums = between(row / params.w, index, spans[span], spans[span + 1u]);
        let n = spans[span + 2u];
        let score = sharpe_of(n, sums.xy, scaled_variance(n, sums.xy, sums.zw, params.shift));
        scores[(row * 2u + part) * lanes + index] = score;
    }
}
