// Barrier, Asian and European options along simulated paths: sums of payoffs and of their controls. Maths, shapes and source: kernels/exotic_price.rs.
//   grid  blocks of WG·PER samples      workgroup WG      thread takes samples tid, tid + WG, … of its block
//   reads market, market_words      writes sums [blocks,5]

struct ExoticParams {
    samples: u32,
    t: u32,
    market: u32,
    first: u32,
    first_high: u32,
    per: u32,
    kind: u32,
    strike: f32,
    barrier: f32,
    discount: f32,
}

@group(0) @binding(0) var<uniform> params: ExoticParams;
@group(0) @binding(1) var<storage, read> market: array<f32>;
@group(0) @binding(2) var<storage, read> market_words: array<u32>;
@group(0) @binding(3) var<storage, read_write> sums: array<f32>;

override WG: u32 = 64u;

const CALL: u32 = 1u;
const UP: u32 = 2u;
const KNOCK_IN: u32 = 4u;
const BRIDGE: u32 = 8u;
const BARRIER: u32 = 1u;
const ARITHMETIC: u32 = 2u;
const GEOMETRIC: u32 = 3u;

var<workgroup> sh_sum: array<f32, 320>;

fn payoff(x: f32) -> f32 {
    let over = x - params.strike;
    return params.discount * max(select(-over, over, (params.kind & CALL) != 0u), 0.0);
}

// Chance that a step from x to y, in log-spot, with this variance does not meet the barrier.
fn missed(x: f32, y: f32, level: f32, variance: f32) -> f32 {
    let side = select(-1.0, 1.0, (params.kind & UP) != 0u);
    let before = side * (level - x);
    let after = side * (level - y);
    if before <= 0.0 || after <= 0.0 {
        return 0.0;
    }
    if (params.kind & BRIDGE) == 0u {
        return 1.0;
    }
    return 1.0 - exp_f32(max(-2.0 * before * after / max(variance, 1e-30), -88.0));
}

// Payoff and control of one path.
fn sample(m: PathMarket, path: vec2<u32>) -> vec2<f32> {
    let style = params.kind >> 8u;
    let level = log_ratio(max(params.barrier, 1e-30), m.spot);
    var s = path_start(m, path);
    var alive = missed(s.x, s.x, level, 0.0);
    var sum = 0.0;
    var logs = 0.0;
    for (var quad = 0u; 4u * quad < params.t; quad++) {
        let d = path_draws(m, path, quad);
        let last = min(4u * quad + 4u, params.t);
        for (var t = 4u * quad; t < last; t++) {
            let next = path_step(m, s, d, t);
            if style == BARRIER {
                var variance = m.variance;
                if path_has_variance() {
                    variance = 0.5 * (s.v + next.v) * market[m.row + FIELD_DT];
                }
                alive *= missed(s.x, next.x, level, variance);
            }
            if style == ARITHMETIC {
                sum += path_spot(m, next);
            }
            logs += next.x;
            s = next;
        }
    }
    let end = path_spot(m, s);
    let european = payoff(end);
    let geometric = payoff(m.spot * exp_f32(logs / f32(params.t)));
    switch style {
        case BARRIER: { return vec2<f32>(european * select(alive, 1.0 - alive, (params.kind & KNOCK_IN) != 0u), european); }
        case ARITHMETIC: { return vec2<f32>(payoff(sum / f32(params.t)), geometric); }
        case GEOMETRIC: { return vec2<f32>(geometric, european); }
        default: { return vec2<f32>(european, params.discount * end); }
    }
}

@compute @workgroup_size(WG)
fn exotic_price(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let block = group_index(wid, nwg);
    let m = path_market(params.market);
    let mirrors = select(1u, 2u, m.antithetic != 0u);
    var x = 0.0;
    var xx = 0.0;
    var y = 0.0;
    var yy = 0.0;
    var xy = 0.0;
    for (var i = 0u; i < params.per; i++) {
        let index = (block * params.per + i) * WG + tid;
        if index >= params.samples {
            break;
        }
        var pair = vec2<f32>(0.0);
        for (var mirror = 0u; mirror < mirrors; mirror++) {
            let path = add64(vec2<u32>(params.first, params.first_high), vec2<u32>(index * mirrors + mirror, 0u));
            pair += sample(m, path);
        }
        pair = pair / f32(mirrors);
        x += pair.x;
        xx += pair.x * pair.x;
        y += pair.y;
        yy += pair.y * pair.y;
        xy += pair.x * pair.y;
    }
    sh_sum[tid] = x;
    sh_sum[64u + tid] = xx;
    sh_sum[128u + tid] = y;
    sh_sum[192u + tid] = yy;
    sh_sum[256u + tid] = xy;
    workgroupBarrier();
    for (var half = 32u; half > 0u; half /= 2u) {
        if tid < half {
            for (var c = 0u; c < 5u; c++) {
                sh_sum[64u * c + tid] += sh_sum[64u * c + tid + half];
            }
        }
        workgroupBarrier();
    }
    if tid < 5u && block * params.per * WG < params.samples {
        sums[5u * block + tid] = sh_sum[64u * tid];
    }
}
