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
const MOMENTUM: u32 = 2u;

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

// The positions decided at a bar, without branches: `row` is the bar's first key, `at` the bar of its asset, `legal` whether the set has
// had its warm-up.

fn cross(s: ParameterSet, row: u32, legal: bool) -> f32 {
    return select(0.0, select(s.short, 1.0, keys[row + s.a] > keys[row + s.b]), legal);
}

fn band(s: ParameterSet, row: u32, legal: bool, before: f32) -> f32 {
    let enters = legal && (keys[row + s.a] ^ params.mask) > s.threshold_a;
    let stays = keys[row + s.b] <= s.threshold_b;
    return select(0.0, 1.0, select(stays, enters, before == 0.0));
}

fn momentum(s: ParameterSet, row: u32, at: u32, t: u32, legal: bool) -> f32 {
    let now = price[at];
    let then = price[at - min(t, s.b)];
    let size = select(0.0, min(s.target_size * inverse_volatility[row + s.a], s.leverage), legal);
    return select(select(0.0, -size, now < then), size, now > then);
}

// The position that is held over bar j of asset a, from the one before.
fn decide(mode: u32, s: ParameterSet, a: u32, j: u32, before: f32) -> f32 {
    let t = max(j, params.lag) - params.lag;
    let legal = j >= params.lag && t >= s.first;
    let at = a * params.t + t;
    let row = at * params.rows;
    switch mode {
        case CROSS: { return cross(s, row, legal); }
        case BAND: { return band(s, row, legal, before); }
        default: { return momentum(s, row, at, t, legal); }
    }
}

// ---- sweep --------------------------------------------------------------------------------------------------------

@group(0) @binding(6) var<storage, read> plan: array<u32>;
@group(0) @binding(7) var<storage, read_write> stats: array<f32>;
@group(0) @binding(8) var<storage, read_write> prefix: array<u32>;

// One simulation: what lasts, then the plain sums of a block.
struct Run {
    position: f32,
    weight: f32,
    level: f32,
    lowest: f32,
    trades: f32,
    sum: f32,
    square: f32,
    growth: f32,
    turnover: f32,
}

// Bars from_bar to to_bar: decide, pay, earn. Nothing is held before bar `start`.
fn simulate(mode: u32, s: ParameterSet, a: u32, from_bar: u32, to_bar: u32, run_in: Run) -> Run {
    var run = run_in;
    let earned = a * (params.t - 1u);
    for (var j = from_bar; j < to_bar; j++) {
        run.position = decide(mode, s, a, j, run.position);
        let held = select(0.0, run.position, j >= params.start);
        let traded = abs(held - run.weight);
        let net = held * returns[earned + j] - params.cost * traded;
        run.weight = held;
        run.turnover += traded;
        run.trades += select(0.0, 1.0, traded > 0.0);
        run.sum += net;
        run.square += net * net;
        let factor = 1.0 + net;
        run.growth *= factor;
        run.level = min(run.level * factor, 1.0);
        run.lowest = min(run.lowest, run.level);
    }
    return run;
}

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

    var run = Run(0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0);
    var turnover = 0.0;
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
            // a block of plain sums; the machine is chosen once per block
            let stop = min(end, j + BLOCK);
            switch params.mode {
                case CROSS: { run = simulate(CROSS, s, a, j, stop, run); }
                case BAND: { run = simulate(BAND, s, a, j, stop, run); }
                default: { run = simulate(MOMENTUM, s, a, j, stop, run); }
            }
            j = stop;
            // into the exact sums
            sums = add64(sums, to_fixed(run.sum, shift - scale));
            squares = add64(squares, to_fixed(run.square, shift - 2 * scale));
            turnover += run.turnover;
            mantissa *= run.growth;
            run.sum = 0.0;
            run.square = 0.0;
            run.growth = 1.0;
            run.turnover = 0.0;
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
    stats[at + 2u * WG] = 1.0 - run.lowest;
    stats[at + 3u * WG] = turnover;
    stats[at + 4u * WG] = run.trades;
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
        position = decide(params.mode, s, a, j, position);
        let held = select(0.0, position, j >= params.start);
        let traded = abs(held - weight);
        weight = held;
        if j >= from_bar {
            turnover += traded;
            trades += select(0.0, 1.0, traded > 0.0);
            net[out + j - from_bar] = held * returns[a * (params.t - 1u) + j] - params.cost * traded;
            net[params.a * params.stitched + out + j - from_bar] = held;
        }
    }
    activity[2u * slot] = turnover;
    activity[2u * slot + 1u] = trades;
}
