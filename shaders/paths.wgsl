// Stores paths. Models, tables and source: kernels/paths.rs; the generator: shaders/paths_generator.wgsl.
//   paths          grid  ⌈P / WG⌉                       thread = path
//                  writes spot, and what `store` names of variance, events, future [P,T+1]
//   paths_assets   grid  ⌈P·N / WG⌉, N in `market`      thread = path and asset, which draws the normals of the assets before it, too
//                  writes spot [P,T+1,N], events [P,T+1]
//   paths_moments  grid  blocks·⌈T/4⌉·factors           workgroup = BLOCK paths, four steps, a factor of `store`
//                  writes sums [blocks,factors,T,2] of z and z²

struct PathsParams {
    paths: u32,
    t: u32,
    market: u32,
    first: u32,
    first_high: u32,
    store: u32,
}

@group(0) @binding(0) var<uniform> params: PathsParams;
@group(0) @binding(1) var<storage, read> market: array<f32>;
@group(0) @binding(2) var<storage, read> market_words: array<u32>;
@group(0) @binding(3) var<storage, read_write> spot: array<f32>;
@group(0) @binding(4) var<storage, read_write> variance: array<f32>;
@group(0) @binding(5) var<storage, read_write> events: array<u32>;
@group(0) @binding(6) var<storage, read_write> future: array<f32>;

override WG: u32 = 64u;

fn write(at: u32, m: PathMarket, s: PathState) {
    spot[at] = path_spot(m, s);
    if (params.store & 1u) != 0u {
        variance[at] = s.v;
    }
    if (params.store & 2u) != 0u {
        events[at] = path_event(s);
    }
    if (params.store & 4u) != 0u {
        future[at] = path_future(m, s);
    }
}

@compute @workgroup_size(WG)
fn paths(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let row = group_index(wid, nwg) * WG + tid;
    if row >= params.paths {
        return;
    }
    let m = path_market(params.market);
    let path = add64(vec2<u32>(params.first, params.first_high), vec2<u32>(row, 0u));
    var s = path_start(m, path);
    var at = row * (params.t + 1u);
    write(at, m, s);
    for (var quad = 0u; 4u * quad < params.t; quad++) {
        let d = path_draws(m, path, quad);
        let last = min(4u * quad + 4u, params.t);
        for (var t = 4u * quad; t < last; t++) {
            s = path_step(m, s, d, t);
            at += 1u;
            write(at, m, s);
        }
    }
}

// ---- several assets -------------------------------------------------------------------------------------------------------

@group(0) @binding(4) var<storage, read_write> events_of: array<u32>;

// The bars of the four steps of a quad, the first after `at`.
fn bars_of(m: PathMarket, path: vec2<u32>, quad: u32, at: u32) -> vec4<u32> {
    let ends = path_words(m, path, quad, FACTOR_RESTART);
    let starts = path_words(m, path, quad, FACTOR_BLOCK);
    var bars = vec4<u32>(0u);
    var last = at;
    for (var i = 0u; i < 4u; i++) {
        last = path_bar(m, last, ends[i], starts[i], 4u * quad + i);
        bars[i] = last;
    }
    return bars;
}

@compute @workgroup_size(WG)
fn paths_assets(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let n = params.market;
    let index = group_index(wid, nwg) * WG + tid;
    let row = index / n;
    if row >= params.paths {
        return;
    }
    let asset = index % n;
    var m = path_market(0u);
    m.spot = market[m.tail + asset];
    let path = add64(vec2<u32>(params.first, params.first_high), vec2<u32>(row, 0u));
    let tail = m.tail + n;
    var s = PathState(0.0, 0.0, 0.0, 0u, 0u);
    if path_kind() == REGIMES {
        s.regime = path_reached(m.table, m.entries - 1u, path_words(m, path, 0u, FACTOR_FIRST_REGIME).x);
    }
    let stored = asset == 0u && (params.store & 2u) != 0u;
    var at = row * (params.t + 1u);
    spot[at * n + asset] = path_spot(m, s);
    if stored {
        events_of[at] = path_event(s);
    }
    for (var quad = 0u; 4u * quad < params.t; quad++) {
        var moves = vec4<f32>(0.0);
        var next = vec4<u32>(0u);
        if path_kind() == REGIMES {
            let w = path_words(m, path, quad, FACTOR_REGIME);
            var own = vec4<u32>(0u);
            for (var i = 0u; i < 4u; i++) {
                own[i] = tail + s.regime * (n + n * (n + 1u) / 2u);
                s.regime = path_reached(m.table + (m.entries - 1u) * (1u + s.regime), m.entries - 1u, w[i]);
                next[i] = s.regime;
                moves[i] = market[own[i] + asset];
            }
            own += n + asset * (asset + 1u) / 2u;
            for (var j = 0u; j <= asset; j++) {
                let z = path_normals(m, path, quad, FACTOR_SPOT + j, j);
                moves += z * vec4<f32>(market[own.x + j], market[own.y + j], market[own.z + j], market[own.w + j]);
            }
        } else {
            next = bars_of(m, path, quad, s.at);
            s.at = next.w;
            for (var i = 0u; i < 4u; i++) {
                moves[i] = market[tail + asset] + market[tail + n * (1u + next[i]) + asset];
            }
        }
        for (var i = 0u; i < min(4u, params.t - 4u * quad); i++) {
            s.x += moves[i];
            at += 1u;
            spot[at * n + asset] = path_spot(m, s);
            if stored {
                events_of[at] = next[i];
            }
        }
    }
}

// ---- moments --------------------------------------------------------------------------------------------------------------

const BLOCK: u32 = 2048u;

@group(0) @binding(3) var<storage, read_write> sums: array<f32>;

var<workgroup> sh_sum: array<vec4<f32>, WG>;
var<workgroup> sh_square: array<vec4<f32>, WG>;

@compute @workgroup_size(WG)
fn paths_moments(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let group = group_index(wid, nwg);
    let quads = (params.t + 3u) / 4u;
    let quad = group % quads;
    let slot = group / quads % params.store;
    let block = group / (quads * params.store);
    var m = path_market(0u);
    m.matched = 0u;
    let factor = select(FACTOR_BASIS, FACTOR_SPOT + slot, slot == 0u || market_words[13] != 0u);
    var sum = vec4<f32>(0.0);
    var square = vec4<f32>(0.0);
    let last = min(params.paths, (block + 1u) * BLOCK);
    for (var row = block * BLOCK + tid; row < last; row += WG) {
        let path = add64(vec2<u32>(params.first, params.first_high), vec2<u32>(row, 0u));
        let z = path_normals(m, path, quad, factor, 0u);
        sum += z;
        square += z * z;
    }
    sh_sum[tid] = sum;
    sh_square[tid] = square;
    workgroupBarrier();
    for (var half = WG / 2u; half > 0u; half /= 2u) {
        if tid < half {
            sh_sum[tid] += sh_sum[tid + half];
            sh_square[tid] += sh_square[tid + half];
        }
        workgroupBarrier();
    }
    if tid < 4u && 4u * quad + tid < params.t && block * BLOCK < params.paths {
        let at = 2u * ((block * params.store + slot) * params.t + 4u * quad + tid);
        sums[at] = sh_sum[0][tid];
        sums[at + 1u] = sh_square[0][tid];
    }
}
