// Portfolios with shared capital, and statistics of their bars. Maths, shapes and source: kernels/portfolio.rs.
//   portfolio_simulate   grid  ⌈P·lanes / WG⌉    workgroup WG    WG / lanes books, thread = assets lane, lane + lanes, … of one
//   portfolio_score      grid  ⌈P·C / WG⌉        workgroup WG    thread = (book, cost), sequential over bars
//   signal_score         grid  ⌈P·C·N / WG⌉      workgroup WG    thread = (book, cost, asset), sequential over bars
//   workgroup memory of portfolio_simulate: 2·WG vectors of three

struct PortfolioParams {
    p: u32,
    n: u32,
    bars: u32,
    first: u32,
    every: u32,
    lanes: u32,
    edge: u32,
    composed: u32,
    costs: u32,
    net: u32,
    band: f32,
}

@group(0) @binding(0) var<uniform> params: PortfolioParams;
@group(0) @binding(1) var<storage, read> returns: array<f32>;
@group(0) @binding(2) var<storage, read> positions: array<f32>;

override WG: u32 = 128u;
const STATE: u32 = 16u;
const STATS: u32 = 7u;
const ACTIVITY: u32 = 3u;
const BLOCK: u32 = 64u;
// Returns above it are there.
const THERE: f32 = -1.5;
const ROUND: f32 = 1.0 / 1048576.0;
const ORDERS: f32 = 1048576.0;
const HEAD: u32 = 16u;

// ---- simulation ---------------------------------------------------------------------------------------------------

@group(0) @binding(3) var<storage, read> allocation: array<f32>;
@group(0) @binding(4) var<storage, read_write> weights: array<f32>;
@group(0) @binding(5) var<storage, read_write> carry: array<f32>;
@group(0) @binding(6) var<storage, read_write> activity: array<f32>;

var<workgroup> sh_part: array<vec3<f32>, WG>;
var<workgroup> sh_head: array<vec3<f32>, WG>;

// What a bar asks of every asset of a book.
struct Rule {
    inverse: f32,
    band: f32,
    edge: f32,
    rebalance: bool,
}

// One asset's bar: its weight after the return, then gross return, turnover and orders.
fn asset_step(rule: Rule, weight: f32, wanted: f32, before: f32, after: f32) -> vec4<f32> {
    let drifted = weight * rule.inverse;
    let gap = wanted - drifted;
    let size = abs(gap);
    let near = ROUND * abs(wanted);
    let open = rule.rebalance && before > THERE;
    let trades = open && size > rule.band + (near + ROUND * rule.band);
    let edge = select(-rule.edge, rule.edge, gap > 0.0);
    let moved = select(drifted, wanted - edge, trades);
    let held = select(moved, wanted, open && size <= near);
    let r = select(0.0, after, after > THERE);
    return vec4<f32>(held * (1.0 + r), held * r, select(0.0, size - rule.edge, trades), select(0.0, 1.0, trades));
}

@compute @workgroup_size(WG)
fn portfolio_simulate(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let lanes = params.lanes;
    let slots = WG / lanes;
    let first_book = group_index(wid, nwg) * slots;
    if first_book >= params.p {
        return;
    }
    let lane = tid % lanes;
    let slot = tid - lane;
    let book = first_book + tid / lanes;
    let live = book < params.p;
    let n = params.n;
    let own = book * n;
    let fresh = params.first == 0u;
    // partial sums of HEAD lanes each
    let heads = max(lanes / HEAD, 1u);
    let per_head = min(lanes, HEAD);

    var held = 0.0;
    var growth = 1.0;
    if live && !fresh {
        growth = carry[book];
        if lane < n {
            held = weights[own + lane];
        }
    }
    for (var j = 0u; j < params.bars; j++) {
        let solvent = growth > 0.0;
        let rule = Rule(
            select(0.0, 1.0 / max(growth, 1e-30), solvent),
            params.band,
            select(0.0, params.band, params.edge == 1u),
            solvent && (params.first + j) % params.every == 0u,
        );
        // trade and earn
        var part = vec3<f32>(0.0, 0.0, 0.0);
        if live {
            let row = j * n;
            let mine = (book * params.bars + j) * n;
            for (var i = lane; i < n; i += lanes) {
                var weight = held;
                if i != lane {
                    weight = select(weights[own + i], 0.0, fresh && j == 0u);
                }
                var wanted = positions[mine + i];
                if params.composed == 1u {
                    wanted *= allocation[row + i];
                }
                let next = asset_step(rule, weight, wanted, returns[row + i], returns[row + n + i]);
                part += next.yzw;
                if i == lane {
                    held = next.x;
                } else {
                    weights[own + i] = next.x;
                }
            }
        }
        // sum over the lanes of the book; the second barrier also keeps sh_part until it is read
        sh_part[tid] = part;
        workgroupBarrier();
        if lane < heads {
            var sum = vec3<f32>(0.0, 0.0, 0.0);
            for (var k = 0u; k < per_head; k++) {
                sum += sh_part[slot + lane * per_head + k];
            }
            sh_head[tid] = sum;
        }
        workgroupBarrier();
        var total = vec3<f32>(0.0, 0.0, 0.0);
        for (var k = 0u; k < heads; k++) {
            total += sh_head[slot + k];
        }
        growth = select(0.0, max(1.0 + total.x, 0.0), solvent);
        if live && lane == 0u {
            let at = book * ACTIVITY * params.bars + j;
            activity[at] = max(total.x, -1.0);
            activity[at + params.bars] = total.y;
            activity[at + 2u * params.bars] = total.z;
        }
    }
    if live {
        if lane < n {
            weights[own + lane] = held;
        }
        if lane == 0u {
            carry[book] = growth;
        }
    }
}

// ---- statistics ---------------------------------------------------------------------------------------------------

@group(0) @binding(1) var<storage, read> activity_in: array<f32>;
@group(0) @binding(2) var<storage, read_write> net: array<f32>;
@group(0) @binding(3) var<storage, read> costs: array<f32>;
@group(0) @binding(4) var<storage, read_write> state: array<f32>;
@group(0) @binding(5) var<storage, read_write> stats: array<f32>;

// Running statistics of a series: sums over the block, then over all whole blocks.
struct Run {
    shift: f32,
    sum: f32,
    square: f32,
    growth: f32,
    traded: f32,
    mean: f32,
    m2: f32,
    mantissa: f32,
    exponent: f32,
    turnover: f32,
    level: f32,
    lowest: f32,
    orders_high: f32,
    orders_low: f32,
    ruin: f32,
    weight: f32,
}

fn load_run(at: u32) -> Run {
    if params.first == 0u {
        return Run(0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, -1.0, 0.0);
    }
    return Run(
        state[at],
        state[at + 1u],
        state[at + 2u],
        state[at + 3u],
        state[at + 4u],
        state[at + 5u],
        state[at + 6u],
        state[at + 7u],
        state[at + 8u],
        state[at + 9u],
        state[at + 10u],
        state[at + 11u],
        state[at + 12u],
        state[at + 13u],
        state[at + 14u],
        state[at + 15u],
    );
}

fn store_run(at: u32, run: Run) {
    state[at] = run.shift;
    state[at + 1u] = run.sum;
    state[at + 2u] = run.square;
    state[at + 3u] = run.growth;
    state[at + 4u] = run.traded;
    state[at + 5u] = run.mean;
    state[at + 6u] = run.m2;
    state[at + 7u] = run.mantissa;
    state[at + 8u] = run.exponent;
    state[at + 9u] = run.turnover;
    state[at + 10u] = run.level;
    state[at + 11u] = run.lowest;
    state[at + 12u] = run.orders_high;
    state[at + 13u] = run.orders_low;
    state[at + 14u] = run.ruin;
    state[at + 15u] = run.weight;
}

// What ruin leaves of a bar's net return.
fn net_of(run: Run, raw: f32) -> f32 {
    return select(0.0, max(raw, -1.0), run.ruin < 0.0);
}

// Adds bar j.
fn add_bar(run_in: Run, j: u32, earned: f32, turnover: f32, orders: f32) -> Run {
    var run = run_in;
    let solvent = run.ruin < 0.0;
    run.ruin = select(run.ruin, f32(j), solvent && earned <= -1.0);
    run.shift = select(run.shift, earned, j % BLOCK == 0u);
    let d = earned - run.shift;
    let factor = 1.0 + earned;
    run.sum += d;
    run.square += d * d;
    run.growth *= factor;
    run.level = min(run.level * factor, 1.0);
    run.lowest = min(run.lowest, run.level);
    run.traded += select(0.0, turnover, solvent);
    run.orders_low += select(0.0, orders, solvent);
    let full = run.orders_low >= ORDERS;
    run.orders_low -= select(0.0, ORDERS, full);
    run.orders_high += select(0.0, 1.0, full);
    if j % BLOCK == BLOCK - 1u {
        run = merge_block(run, j + 1u, BLOCK);
    }
    return run;
}

// Merges a block of `count` bars into the whole of `total`.
fn merge_block(run_in: Run, total: u32, count: u32) -> Run {
    var run = run_in;
    let nb = f32(count);
    let n = f32(total);
    let mean = run.shift + run.sum / nb;
    let m2 = max(run.square - run.sum * run.sum / nb, 0.0);
    let delta = mean - run.mean;
    run.mean += delta * (nb / n);
    run.m2 += m2 + delta * delta * ((n - nb) * nb / n);
    run.mantissa *= run.growth;
    let power = i32((bitcast<u32>(run.mantissa) >> 23u) & 0xffu) - 127;
    if run.mantissa > 0.0 {
        run.mantissa = bitcast<f32>((bitcast<u32>(run.mantissa) & 0x7fffffu) | 0x3f800000u);
        run.exponent += f32(power);
    }
    run.turnover += run.traded;
    run.sum = 0.0;
    run.square = 0.0;
    run.growth = 1.0;
    run.traded = 0.0;
    return run;
}

// Statistics of the `total` bars so far.
fn finish_run(at: u32, run_in: Run, total: u32) {
    var run = run_in;
    if total % BLOCK != 0u {
        run = merge_block(run, total, total % BLOCK);
    }
    let n = f32(total);
    let known = total > 1u && run.m2 > (run.m2 + n * run.mean * run.mean) * ROUND;
    stats[at] = select(UNDEFINED, run.mean / sqrt(max(run.m2, 1e-37) / max(n - 1.0, 1.0)), known);
    stats[at + 1u] = ldexp(run.mantissa, i32(clamp(run.exponent, -126.0, 127.0))) - 1.0;
    stats[at + 2u] = 1.0 - run.lowest;
    stats[at + 3u] = run.turnover;
    stats[at + 4u] = run.orders_high;
    stats[at + 5u] = run.orders_low;
    stats[at + 6u] = run.ruin;
}

@compute @workgroup_size(WG)
fn portfolio_score(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let series = group_index(wid, nwg) * WG + tid;
    if series >= params.p * params.costs {
        return;
    }
    let bars = params.bars;
    let book = series / params.costs * ACTIVITY * bars;
    let cost = costs[2u * (series % params.costs)];
    var run = load_run(series * STATE);
    for (var j = 0u; j < bars; j++) {
        let gross = activity_in[book + j];
        let turnover = activity_in[book + bars + j];
        let earned = net_of(run, gross - cost * turnover * (1.0 + gross));
        run = add_bar(run, params.first + j, earned, turnover, activity_in[book + 2u * bars + j]);
        if params.net == 1u {
            net[series * bars + j] = earned;
        }
    }
    store_run(series * STATE, run);
    finish_run(series * STATS, run, params.first + bars);
}

@compute @workgroup_size(WG)
fn signal_score(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let series = group_index(wid, nwg) * WG + tid;
    if series >= params.p * params.costs * params.n {
        return;
    }
    let n = params.n;
    let i = series % n;
    let book = series / n / params.costs;
    let cost = costs[2u * (series / n % params.costs)];
    var run = load_run(series * STATE);
    for (var j = 0u; j < params.bars; j++) {
        let weight = positions[(book * params.bars + j) * n + i];
        let after = returns[(j + 1u) * n + i];
        let traded = abs(weight - run.weight);
        let earned = net_of(run, weight * select(0.0, after, after > THERE) - cost * traded);
        run.weight = weight;
        run = add_bar(run, params.first + j, earned, traded, select(0.0, 1.0, traded > 0.0));
    }
    store_run(series * STATE, run);
    finish_run(series * STATS, run, params.first + params.bars);
}
