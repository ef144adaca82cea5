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
    volatility_rows: u32,
    general: u32,
    piece: u32,
    pieces: u32,
}

@group(0) @binding(0) var<uniform> params: BacktestParams;
@group(0) @binding(1) var<storage, read> price: array<f32>;
@group(0) @binding(2) var<storage, read> returns: array<f32>;
@group(0) @binding(3) var<storage, read> keys: array<u32>;
@group(0) @binding(4) var<storage, read> inverse_volatility: array<f32>;
@group(0) @binding(5) var<storage, read> sets: array<u32>;

override WG: u32 = 64u;
const SET_WORDS: u32 = 16u;
const STATS: u32 = 5u;
const BLOCK: u32 = 128u;
const SCALE_BIAS: i32 = 512;
const CROSS: u32 = 0u;
const BAND: u32 = 1u;
const MOMENTUM: u32 = 2u;
const OFF: u32 = 0xffffffffu;

struct ParameterSet {
    a: u32,
    b: u32,
    threshold_a: u32,
    threshold_b: u32,
    first: u32,
    up: f32,
    down: f32,
    target_size: f32,
    leverage: f32,
    volatility_row: u32,
    stop_loss: f32,
    take_profit: f32,
    trailing_stop: f32,
    max_holding: u32,
}

fn load_set(index: u32) -> ParameterSet {
    let at = index * SET_WORDS;
    let side = sets[at + 5u];
    return ParameterSet(
        sets[at],
        sets[at + 1u],
        sets[at + 2u],
        sets[at + 3u],
        sets[at + 4u],
        select(1.0, 0.0, side == 2u),
        select(-1.0, 0.0, side == 0u),
        bitcast<f32>(sets[at + 6u]),
        bitcast<f32>(sets[at + 7u]),
        sets[at + 8u],
        bitcast<f32>(sets[at + 9u]),
        bitcast<f32>(sets[at + 10u]),
        bitcast<f32>(sets[at + 11u]),
        sets[at + 12u],
    );
}

// A position: the machine's direction, the one held after stops, the one that was stopped, the fill of the entry, the best close since,
// bars held, and the weight.
struct Position {
    signal: f32,
    held: f32,
    blocked: f32,
    entry: f32,
    best: f32,
    age: u32,
    weight: f32,
}

fn flat() -> Position {
    return Position(0.0, 0.0, 0.0, 0.0, 0.0, 0u, 0.0);
}

// The machine's direction at bar t, from the one before: no branches, and nothing is read before bar 0.
fn direction(mode: u32, s: ParameterSet, a: u32, t: u32, legal: bool, before: f32) -> f32 {
    let at = a * params.t + t;
    let row = at * params.rows;
    var next = 0.0;
    switch mode {
        case CROSS: { next = select(s.down, s.up, keys[row + s.a] > keys[row + s.b]); }
        case BAND: {
            let enters = (keys[row + s.a] ^ params.mask) > s.threshold_a;
            let leaves = keys[row + s.b] > s.threshold_b;
            next = select(select(before, s.down, leaves), s.up, enters && before <= 0.0);
        }
        default: {
            let now = price[at];
            let then = price[at - min(t, s.b)];
            next = select(select(0.0, s.down, now < then), s.up, now > then);
        }
    }
    return select(0.0, next, legal);
}

// The price level at a signed distance from another, for a position of this side.
fn side_level(held: f32, from_price: f32, distance: f32) -> f32 {
    return held * (from_price * (1.0 + held * distance));
}

// The direction after stops.
fn stopped(s: ParameterSet, close: f32, fill: f32, before: Position) -> Position {
    var x = before;
    x.age += 1u;
    x.best = select(min(x.best, close), max(x.best, close), x.held > 0.0);
    let side = x.held * close;
    let stop = side <= side_level(x.held, x.entry, -s.stop_loss) || side >= side_level(x.held, x.entry, s.take_profit)
        || side <= side_level(x.held, x.best, -s.trailing_stop) || x.age >= s.max_holding;
    x.blocked = select(x.blocked, x.held, stop && x.held != 0.0);
    x.blocked = select(x.blocked, 0.0, x.signal != x.blocked);
    let wanted = select(0.0, x.signal, x.blocked == 0.0);
    let enters = wanted != x.held && wanted != 0.0;
    x.entry = select(x.entry, fill, enters);
    x.best = select(x.best, fill, enters);
    x.age = select(x.age, 0u, enters);
    x.held = wanted;
    return x;
}

fn size_at(s: ParameterSet, a: u32, t: u32) -> f32 {
    if s.volatility_row == OFF {
        return 1.0;
    }
    return min(s.target_size * inverse_volatility[(a * params.t + t) * params.volatility_rows + s.volatility_row], s.leverage);
}

// The position that is held over bar j of asset a, from the one before.
fn decide(mode: u32, s: ParameterSet, a: u32, j: u32, before: Position) -> Position {
    var x = before;
    let t = max(j, params.lag) - params.lag;
    x.signal = direction(mode, s, a, t, j >= params.lag && t >= s.first, x.signal);
    if j >= params.start {
        x = stopped(s, price[a * params.t + t], price[(params.a + a) * params.t + j], x);
        x.weight = x.held * size_at(s, a, t);
    }
    return x;
}

// ---- sweep --------------------------------------------------------------------------------------------------------

@group(0) @binding(6) var<storage, read> plan: array<u32>;
@group(0) @binding(7) var<storage, read_write> stats: array<f32>;
@group(0) @binding(8) var<storage, read_write> prefix: array<u32>;

// One simulation: what lasts, then the plain sums of a block.
struct Run {
    position: Position,
    level: f32,
    lowest: f32,
    trades: f32,
    sum: f32,
    square: f32,
    growth: f32,
    turnover: f32,
}

fn earn(run_in: Run, net: f32, traded: f32) -> Run {
    var run = run_in;
    run.turnover += traded;
    run.sum += net;
    run.square = fma(net, net, run.square);
    run.growth = fma(run.growth, net, run.growth);
    run.level = min(fma(run.level, net, run.level), 1.0);
    run.lowest = min(run.lowest, run.level);
    return run;
}

// Bars from_bar to to_bar of a set that is long or flat, without sizes and stops. Nothing is held before bar `start`.
fn simulate_plain(mode: u32, s: ParameterSet, a: u32, from_bar: u32, to_bar: u32, run_in: Run) -> Run {
    var run = run_in;
    let earned = a * (params.t - 1u);
    for (var j = from_bar; j < to_bar; j++) {
        let t = max(j, params.lag) - params.lag;
        run.position.signal = direction(mode, s, a, t, j >= params.lag && t >= s.first, run.position.signal);
        let held = select(0.0, run.position.signal, j >= params.start);
        let changed = held != run.position.weight;
        run.position.weight = held;
        let net = select(0.0, returns[earned + j], held > 0.0) - select(0.0, params.cost, changed);
        run = earn(run, net, select(0.0, 1.0, changed));
    }
    run.trades += run.turnover;
    return run;
}

// Bars from_bar to to_bar of any set.
fn simulate(mode: u32, s: ParameterSet, a: u32, from_bar: u32, to_bar: u32, run_in: Run) -> Run {
    var run = run_in;
    let earned = a * (params.t - 1u);
    for (var j = from_bar; j < to_bar; j++) {
        let before = run.position.weight;
        run.position = decide(mode, s, a, j, run.position);
        let traded = abs(run.position.weight - before);
        run.trades += select(0.0, 1.0, traded > 0.0);
        run = earn(run, fma(run.position.weight, returns[earned + j], -(params.cost * traded)), traded);
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

    var run = Run(flat(), 1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0);
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
            switch 2u * params.mode + params.general {
                case 0u: { run = simulate_plain(CROSS, s, a, j, stop, run); }
                case 1u: { run = simulate(CROSS, s, a, j, stop, run); }
                case 2u: { run = simulate_plain(BAND, s, a, j, stop, run); }
                case 3u: { run = simulate(BAND, s, a, j, stop, run); }
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
    if slot >= params.a * params.tiles * params.pieces {
        return;
    }
    let a = slot / (params.tiles * params.pieces);
    let window = slot / params.pieces % params.tiles;
    let s = load_set(a * params.per_asset * params.tiles + window);
    let window_end = windows[3u * window + 1u];
    let skipped = min(slot % params.pieces * params.piece, window_end - windows[3u * window]);
    let from_bar = windows[3u * window] + skipped;
    let to_bar = select(window_end, min(window_end, from_bar + params.piece), params.piece > 0u);
    let out = a * params.stitched + windows[3u * window + 2u] + skipped;
    var position = flat();
    var turnover = 0.0;
    var trades = 0.0;
    for (var j = select(0u, max(from_bar, 1u) - 1u, params.piece > 0u); j < to_bar; j++) {
        let before = position.weight;
        position = decide(params.mode, s, a, j, position);
        let traded = abs(position.weight - before);
        if j >= from_bar {
            turnover += traded;
            trades += select(0.0, 1.0, traded > 0.0);
            net[out + j - from_bar] = fma(position.weight, returns[a * (params.t - 1u) + j], -(params.cost * traded));
            net[params.a * params.stitched + out + j - from_bar] = position.weight;
        }
    }
    activity[2u * slot] = turnover;
    activity[2u * slot + 1u] = trades;
}
