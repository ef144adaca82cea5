// Back-tests of many parameter sets, and the replay of chosen ones. Maths, shapes and source: kernels/backtest.rs.
//   backtest_sweep    grid  A·tiles                workgroup TILE = WG      thread = set, sequential over bars
//   backtest_stitch   grid  ⌈A·windows / WG⌉       workgroup WG             thread = (asset, window)

struct BacktestParams {
    a: u32,
    t: u32,
    rows: u32,
    tiles: u32,
    edges: u32,
    mode: u32,
    lag: u32,
    start: u32,
    shift: u32,
    mask: u32,
    cost: f32,
    cost_low: f32,
    per_asset: u32,
    stitched: u32,
}

@group(0) @binding(0) var<uniform> params: BacktestParams;
@group(0) @binding(1) var<storage, read> price: array<f32>;
@group(0) @binding(2) var<storage, read> returns: array<f32>;
@group(0) @binding(3) var<storage, read> keys: array<u32>;
@group(0) @binding(4) var<storage, read> inverse_volatility: array<f32>;
@group(0) @binding(5) var<storage, read> sets: array<u32>;

override WG: u32 = 64u;
const SET_WORDS: u32 = 8u;
const STATS: u32 = 5u;
const BLOCK: u32 = 64u;
const SCALE_BIAS: i32 = 512;
const CROSS: u32 = 0u;
const BAND: u32 = 1u;

struct ParameterSet {
    a: u32,
    b: u32,
    threshold_a: u32,
    threshold_b: u32,
    first: u32,
    short: f32,
    target_size: f32,
    leverage: f32,
}

fn load_set(index: u32) -> ParameterSet {
    let at = index * SET_WORDS;
    return ParameterSet(
        sets[at],
        sets[at + 1u],
        sets[at + 2u],
        sets[at + 3u],
        sets[at + 4u],
        select(0.0, -1.0, sets[at + 5u] == 1u),
        bitcast<f32>(sets[at + 6u]),
        bitcast<f32>(sets[at + 7u]),
    );
}

// The position decided at bar t of asset a, from the one before.
fn decide(s: ParameterSet, a: u32, t: u32, before: f32) -> f32 {
    let legal = t >= s.first;
    let row = (a * params.t + t) * params.rows;
    if params.mode == CROSS {
        let position = select(s.short, 1.0, keys[row + s.a] > keys[row + s.b]);
        return select(0.0, position, legal);
    }
    if params.mode == BAND {
        let enters = legal && (keys[row + s.a] ^ params.mask) > s.threshold_a;
        let stays = keys[row + s.b] <= s.threshold_b;
        return select(0.0, 1.0, select(stays, enters, before == 0.0));
    }
    if !legal {
        return 0.0;
    }
    let now = price[a * params.t + t];
    let then = price[a * params.t + t - s.b];
    let v = inverse_volatility[row + s.a];
    let size = min(s.target_size * v, s.leverage);
    return select(select(0.0, -size, now < then), size, now > then);
}

// ---- sweep --------------------------------------------------------------------------------------------------------

@group(0) @binding(6) var<storage, read> plan: array<u32>;
@group(0) @binding(7) var<storage, read_write> stats: array<f32>;
@group(0) @binding(8) var<storage, read_write> prefix: array<u32>;

@compute @workgroup_size(WG)
fn backtest_sweep(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let group = group_index(wid, nwg);
    if group >= params.a * params.tiles {
        return;
    }
    let a = group / params.tiles;
    let s = load_set((group % params.tiles) * WG + tid);
    let bars = params.t - 1u;
    let scale = i32(plan[params.edges + a]) - SCALE_BIAS;
    let shift = i32(params.shift);

    var position = 0.0;
    var weight = 0.0;
    var level = 1.0;
    var lowest = 1.0;
    var turnover = 0.0;
    var trades = 0.0;
    var mantissa = 1.0;
    var exponent = 0;
    var sums = vec2<u32>(0u, 0u);
    var squares = vec2<u32>(0u, 0u);
    var j = 0u;
    for (var e = 0u; e <= params.edges; e++) {
        var end = bars;
        if e < params.edges {
            end = plan[e];
        }
        while j < end {
            // a block of plain sums
            let stop = min(end, j + BLOCK);
            var sum = 0.0;
            var square = 0.0;
            var growth = 1.0;
            var block_turnover = 0.0;
            for (; j < stop; j++) {
                if j >= params.lag {
                    position = decide(s, a, j - params.lag, position);
                }
                if j >= params.start {
                    let traded = abs(position - weight);
                    let net = position * returns[a * bars + j] - params.cost * traded;
                    weight = position;
                    block_turnover += traded;
                    trades += select(0.0, 1.0, traded > 0.0);
                    sum += net;
                    square += net * net;
                    growth *= 1.0 + net;
                    level = min(level * (1.0 + net), 1.0);
                    lowest = min(lowest, level);
                }
            }
            // into the exact sums
            sums = add64(sums, to_fixed(sum, shift - scale));
            squares = add64(squares, to_fixed(square, shift - 2 * scale));
            turnover += block_turnover;
            mantissa *= growth;
            let power = i32((bitcast<u32>(mantissa) >> 23u) & 0xffu) - 127;
            if mantissa != 0.0 {
                mantissa = bitcast<f32>((bitcast<u32>(mantissa) & 0x807fffffu) | 0x3f800000u);
                exponent += power;
            }
        }
        // prefix before the edge
        if e < params.edges {
            let at = (group * params.edges + e) * 4u * WG + tid;
            prefix[at] = sums.x;
            prefix[at + WG] = sums.y;
            prefix[at + 2u * WG] = squares.x;
            prefix[at + 3u * WG] = squares.y;
        }
    }
    let counted = max(bars, params.start) - params.start;
    let at = group * STATS * WG + tid;
    stats[at] = sharpe_of(counted, sums, scaled_variance(counted, sums, squares, params.shift));
    stats[at + WG] = ldexp(mantissa, clamp(exponent, -126, 127)) - 1.0;
    stats[at + 2u * WG] = 1.0 - lowest;
    stats[at + 3u * WG] = turnover;
    stats[at + 4u * WG] = trades;
}

// ---- stitch -------------------------------------------------------------------------------------------------------

@group(0) @binding(6) var<storage, read> windows: array<u32>;
@group(0) @binding(7) var<storage, read_write> net: array<f32>;
@group(0) @binding(8) var<storage, read_write> activity: array<f32>;

@compute @workgroup_size(WG)
fn backtest_stitch(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let slot = group_index(wid, nwg) * WG + tid;
    if slot >= params.a * params.tiles {
        return;
    }
    let a = slot / params.tiles;
    let window = slot % params.tiles;
    let s = load_set(a * params.per_asset * params.tiles + window);
    let from_bar = windows[3u * window];
    let to_bar = windows[3u * window + 1u];
    let out = a * params.stitched + windows[3u * window + 2u];
    var position = 0.0;
    var weight = 0.0;
    var turnover = 0.0;
    var trades = 0.0;
    for (var j = 0u; j < to_bar; j++) {
        if j >= params.lag {
            position = decide(s, a, j - params.lag, position);
        }
        var earned = 0.0;
        if j >= params.start {
            let traded = abs(position - weight);
            weight = position;
            earned = position * returns[a * (params.t - 1u) + j] - params.cost * traded;
            if j >= from_bar {
                turnover += traded;
                trades += select(0.0, 1.0, traded > 0.0);
            }
        }
        if j >= from_bar {
            net[out + j - from_bar] = earned;
        }
    }
    activity[2u * slot] = turnover;
    activity[2u * slot + 1u] = trades;
}
