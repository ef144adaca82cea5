// Hedges with costs. Maths, shapes and source: kernels/hedge.rs.
//   grid  ⌈paths / (WG·PATHS)⌉      workgroup WG      thread = PATHS paths, at most TILE set-ups
//   hedge_given  stored paths      reads setups, reals, table, spot [P,T+1]      writes results [U,3,P]
//   hedge_delta, hedge_single, hedge_band, hedge_gamma  paths of the generator (shaders/paths_generator.wgsl)
//                reads setups, reals, table, market, market_words      writes results
//   hedge_futures  with futures      also writes history [2·window,P], the last changes of spot and futures

struct HedgeParams {
    paths: u32,
    first: u32,
    columns: u32,
    steps: u32,
    setups: u32,
    greeks: u32,
    market: u32,
    path: u32,
    path_high: u32,
    window: u32,
}

@group(0) @binding(0) var<uniform> params: HedgeParams;
@group(0) @binding(1) var<storage, read> setups: array<u32>;
@group(0) @binding(2) var<storage, read> reals: array<f32>;
@group(0) @binding(3) var<storage, read> table: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> results: array<f32>;
@group(0) @binding(5) var<storage, read> spot: array<f32>;
@group(0) @binding(5) var<storage, read> market: array<f32>;
@group(0) @binding(6) var<storage, read> market_words: array<u32>;
@group(0) @binding(7) var<storage, read_write> history: array<f32>;

override WG: u32 = 64u;
// What the policies of a launch need: 0 at most a delta, 1 bands and moves, 2 a second option, 3 futures.
override LEVEL: u32 = 2u;
// Set-ups of a launch at most, and paths of a thread: 8 and 1, or 1 and 4. Whatever they carry is indexed by numbers that are known to the
// compiler (`each_…` call for one after the other), so that it stays in registers.
override TILE: u32 = 8u;
override PATHS: u32 = 1u;

const MOST = 8;
const MOST_PATHS = 4;
const SETUP_WORDS = 9u;
const SETUP_REALS = 16u;
const GREEK_WORDS = 4u;
const GREEK_ROW = 2u;

const CALL = 0u;
const PUT = 1u;
const DIGITAL = 2u;
const SPOT = 3u;

const NONE = 0u;
const STATIC = 1u;
const BAND = 3u;
const WHALLEY_WILMOTT = 4u;
const MOVE = 5u;
const DELTA_GAMMA = 6u;
const MINIMUM_VARIANCE = 7u;
const MOST_REGIMES = 8u;

const UNWIND = 1u;
const PREMIUM_AT_SPOT = 2u;

// ---- greeks -------------------------------------------------------------------------------------------------------------

struct Greek {
    delta: f32,
    gamma: f32,
}

fn row_of(greek: u32, t: u32) -> u32 {
    return (greek * (params.steps + 1u) + t) * GREEK_ROW;
}

// Delta and gamma of log-spot x and spot s.
fn greeks_of(row: vec4<f32>, kind: u32, x: f32, s: f32) -> Greek {
    let d = row.x * x + row.y;
    let p = normal_cdf_and_bell(d);
    let factor = row.z;
    let slope = row.w;
    let plain = select(p.x, p.x - 1.0, kind == PUT);
    let steep = factor * p.y / s;
    let delta = select(select(factor * plain, steep, kind == DIGITAL), factor, kind == SPOT);
    if LEVEL == 0u {
        return Greek(delta, 0.0);
    }
    let gamma = select(slope * p.y / s, -(steep * (1.0 + slope * d)) / s, kind == DIGITAL);
    return Greek(delta, select(gamma, 0.0, kind == SPOT));
}

// Black-Scholes price.
fn price_of(row: u32, kind: u32, x: f32, s: f32) -> f32 {
    let low = table[row];
    let high = table[row + 1u];
    let d = low.x * x + low.y;
    let deviation = high.y;
    let side = select(1.0, -1.0, kind == PUT);
    let up = normal_cdf_f32(side * d);
    let down = normal_cdf_f32(side * (d - deviation));
    let plain = side * (s * low.z * up - high.w * down);
    return select(select(plain, high.x * up, kind == DIGITAL), s * low.z, kind == SPOT);
}

fn payoff_of(kind: u32, s: f32, strike: f32) -> f32 {
    let plain = max(select(s - strike, strike - s, kind == PUT), 0.0);
    return select(select(plain, select(0.0, 1.0, s > strike), kind == DIGITAL), s, kind == SPOT);
}

// Cube root of x ≥ 0; 0 below 1e-36.
fn cube_root(x: f32) -> f32 {
    return select(exp_f32(log_f32(max(x, 1e-36)) * 0.33333333), 0.0, x < 1e-36);
}

// ---- set-ups of a tile --------------------------------------------------------------------------------------------------

// e^(r·dt) − 1, e^(q·dt) − 1.
var<private> growth: f32;
var<private> dividend: f32;
// Log-spot, spot and the next spot of every path.
var<private> log_spot: array<f32, MOST_PATHS>;
var<private> now: array<f32, MOST_PATHS>;
var<private> next: array<f32, MOST_PATHS>;
// Of set-ups, what does not change, and the next step that decides.
var<private> policy: array<u32, MOST>;
var<private> kind: array<u32, MOST>;
var<private> every: array<u32, MOST>;
var<private> greek: array<u32, MOST>;
var<private> greek_kind: array<u32, MOST>;
var<private> cost: array<f32, MOST>;
var<private> fixed_cost: array<f32, MOST>;
var<private> parameter: array<f32, MOST>;
var<private> sign_of: array<f32, MOST>;
var<private> due: array<u32, MOST>;
// Of set-ups on paths.
var<private> holding: array<f32, MOST>;
var<private> wealth: array<f32, MOST>;
var<private> turnover: array<f32, MOST>;
var<private> fees: array<f32, MOST>;
var<private> last: array<f32, MOST>;
var<private> options: array<f32, MOST>;
var<private> option_turnover: array<f32, MOST>;

// Where set-up u on path k of the thread has its state.
fn slot(u: u32, k: u32) -> u32 {
    return u * PATHS + k;
}

fn start_path(u: u32, k: u32, word: u32, real: u32) {
    let i = slot(u, k);
    holding[i] = 0.0;
    turnover[i] = 0.0;
    fees[i] = 0.0;
    last[i] = 0.0;
    options[i] = 0.0;
    option_turnover[i] = 0.0;
    wealth[i] = reals[real + 4u];
    if (setups[word + 4u] & PREMIUM_AT_SPOT) != 0u {
        wealth[i] = sign_of[u] * price_of(row_of(setups[word + 7u], 0u), kind[u], log_spot[k], now[k]);
    }
}

fn start(u: u32) {
    // Those that are not there do as the first one, unseen.
    let from_setup = select(0u, u, u < params.setups);
    let word = from_setup * SETUP_WORDS;
    let real = (1u + from_setup) * SETUP_REALS;
    policy[u] = setups[word];
    every[u] = setups[word + 1u];
    greek[u] = setups[word + 2u];
    greek_kind[u] = setups[params.setups * SETUP_WORDS + greek[u] * GREEK_WORDS];
    kind[u] = setups[word + 3u];
    cost[u] = reals[real];
    fixed_cost[u] = reals[real + 1u];
    parameter[u] = reals[real + 2u];
    sign_of[u] = reals[real + 5u];
    due[u] = 0u;
    start_path(u, 0u, word, real);
    if PATHS > 1u {
        start_path(u, 1u, word, real);
        start_path(u, 2u, word, real);
        start_path(u, 3u, word, real);
    }
}

fn start_all() {
    growth = reals[1];
    dividend = reals[2];
    start(0u);
    if TILE > 1u {
        start(1u);
        start(2u);
        start(3u);
        start(4u);
        start(5u);
        start(6u);
        start(7u);
    }
}

// Trades of the second option; returns how many are held.
fn trade_options(u: u32, i: u32, t: u32, gamma: f32, x: f32, s: f32) -> Greek {
    let real = (1u + u) * SETUP_REALS;
    let row = row_of(setups[u * SETUP_WORDS + 5u], t);
    let second = greeks_of(table[row], CALL, x, s);
    let flat = 1e-12 / (s * s);
    let wanted = sign_of[u] * gamma * second.gamma / (second.gamma * second.gamma + flat);
    let to = clamp(wanted, -reals[real + 7u], reals[real + 7u]);
    let trade = to - options[i];
    let price = price_of(row, CALL, x, s);
    let notional = abs(trade) * price;
    let paid = reals[real + 6u] * notional + select(fixed_cost[u], 0.0, trade == 0.0);
    wealth[i] -= trade * price + paid;
    fees[i] += paid;
    option_turnover[i] += notional;
    options[i] = to;
    return Greek(to * second.delta, to);
}

// The holding that the policy wants.
fn wanted(u: u32, k: u32, t: u32, row: u32, g: Greek) -> f32 {
    let i = slot(u, k);
    let s = now[k];
    let held = holding[i];
    var target_holding = sign_of[u] * g.delta;
    if LEVEL == 2u {
        if policy[u] == DELTA_GAMMA {
            target_holding -= trade_options(u, i, t, g.gamma, log_spot[k], s).delta;
        }
    }
    var to = target_holding;
    if LEVEL >= 1u {
        let whalley_wilmott = policy[u] == WHALLEY_WILMOTT;
        let width = select(parameter[u], cube_root(parameter[u] * table[row + 1u].x * s * g.gamma * g.gamma), whalley_wilmott);
        let clipped = min(max(held, target_holding - width), target_holding + width);
        to = select(to, clipped, (policy[u] == BAND || whalley_wilmott) && t > 0u);
        to = select(to, held, policy[u] == MOVE && t > 0u && !(abs(s - last[i]) > parameter[u] * last[i]));
    }
    to = select(to, held, policy[u] == STATIC && t > 0u);
    return select(to, 0.0, policy[u] == NONE);
}

// Trades to a holding of what costs `price`.
fn trade(u: u32, i: u32, to: f32, price: f32) {
    let change = to - holding[i];
    let notional = abs(change) * price;
    let paid = select(fixed_cost[u], 0.0, change == 0.0);
    wealth[i] -= cost[u] * notional + paid;
    turnover[i] += notional;
    fees[i] += paid;
    if LEVEL >= 1u {
        last[i] = select(price, last[i], change == 0.0);
    }
    holding[i] = to;
}

fn hedge_path(u: u32, k: u32, t: u32, row: u32, low: vec4<f32>) {
    let i = slot(u, k);
    let decides = t == due[u];
    var to = holding[i];
    if decides {
        to = wanted(u, k, t, row, greeks_of(low, greek_kind[u], log_spot[k], now[k]));
    }
    // A trade of nothing costs a software adapter less than a branch around it.
    if PATHS > 1u || decides {
        trade(u, i, to, now[k]);
    }
    let earned = (next[k] - now[k]) + (next[k] * dividend - now[k] * growth);
    wealth[i] += wealth[i] * growth + holding[i] * earned;
}

fn hedge(u: u32, t: u32) {
    let row = row_of(greek[u], t);
    let low = table[row];
    hedge_path(u, 0u, t, row, low);
    if PATHS > 1u {
        hedge_path(u, 1u, t, row, low);
        hedge_path(u, 2u, t, row, low);
        hedge_path(u, 3u, t, row, low);
    }
    due[u] += select(0u, every[u], t == due[u]);
}

// Step t of all set-ups on all paths, from spot `now` to `next`.
fn each_hedge(t: u32) {
    hedge(0u, t);
    if TILE > 1u {
        hedge(1u, t);
        hedge(2u, t);
        hedge(3u, t);
        hedge(4u, t);
        hedge(5u, t);
        hedge(6u, t);
        hedge(7u, t);
    }
}

// `traded` is the price of what is held.
fn finish(u: u32, k: u32, path: u32, traded: f32) {
    if u >= params.setups || path >= params.paths {
        return;
    }
    let i = slot(u, k);
    let s = now[k];
    let word = u * SETUP_WORDS;
    let real = (1u + u) * SETUP_REALS;
    let unwinds = (setups[word + 4u] & UNWIND) != 0u;
    if LEVEL == 2u {
        if policy[u] == DELTA_GAMMA {
            let worth = price_of(row_of(setups[word + 5u], params.steps), CALL, log_spot[k], s);
            wealth[i] += options[i] * worth;
            if unwinds && options[i] != 0.0 {
                let notional = abs(options[i]) * worth;
                let paid = reals[real + 6u] * notional + fixed_cost[u];
                wealth[i] -= paid;
                fees[i] += paid;
                option_turnover[i] += notional;
            }
        }
    }
    if unwinds && holding[i] != 0.0 {
        let notional = abs(holding[i]) * traded;
        wealth[i] -= cost[u] * notional + fixed_cost[u];
        turnover[i] += notional;
        fees[i] += fixed_cost[u];
    }
    let at = 3u * setups[word + 8u] * params.columns + params.first + path;
    results[at] = wealth[i] - sign_of[u] * payoff_of(kind[u], s, reals[real + 3u]);
    results[at + params.columns] = cost[u] * turnover[i] + fees[i];
    results[at + 2u * params.columns] = turnover[i] + option_turnover[i];
}

// Path k of the thread.
fn each_finish(k: u32, path: u32, traded: f32) {
    finish(0u, k, path, traded);
    if TILE > 1u {
        finish(1u, k, path, traded);
        finish(2u, k, path, traded);
        finish(3u, k, path, traded);
        finish(4u, k, path, traded);
        finish(5u, k, path, traded);
        finish(6u, k, path, traded);
        finish(7u, k, path, traded);
    }
}

@compute @workgroup_size(WG)
fn hedge_given(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let path = group_index(wid, nwg) * WG + tid;
    if path >= params.paths {
        return;
    }
    let at = path * (params.steps + 1u);
    now[0] = spot[at];
    log_spot[0] = log_f32(now[0] / reals[0]);
    start_all();
    for (var t = 0u; t < params.steps; t++) {
        next[0] = spot[at + t + 1u];
        each_hedge(t);
        now[0] = next[0];
        log_spot[0] = log_f32(now[0] / reals[0]);
    }
    each_finish(0u, path, now[0]);
}

// ---- simulated paths ------------------------------------------------------------------------------------------------------

var<private> state: array<PathState, MOST_PATHS>;
var<private> draws: array<PathDraws, MOST_PATHS>;

// Path `row` of the launch, the last one where there is none.
fn path_of(row: u32) -> vec2<u32> {
    return add64(vec2<u32>(params.path, params.path_high), vec2<u32>(min(row, params.paths - 1u), 0u));
}

fn begin(k: u32, m: PathMarket, row: u32) {
    state[k] = path_start(m, path_of(row));
    log_spot[k] = state[k].x;
    now[k] = path_spot(m, state[k]);
}

fn draw(k: u32, m: PathMarket, row: u32, quad: u32) {
    draws[k] = path_draws(m, path_of(row), quad);
}

fn advance(k: u32, m: PathMarket, t: u32) {
    state[k] = path_step(m, state[k], draws[k], t);
    next[k] = path_spot(m, state[k]);
}

fn arrive(k: u32) {
    log_spot[k] = state[k].x;
    now[k] = next[k];
}

// A path a thread.
fn simulate(row: u32) {
    if row >= params.paths {
        return;
    }
    let m = path_market(params.market);
    begin(0u, m, row);
    start_all();
    for (var quad = 0u; 4u * quad < params.steps; quad++) {
        draw(0u, m, row, quad);
        let last_step = min(4u * quad + 4u, params.steps);
        for (var t = 4u * quad; t < last_step; t++) {
            advance(0u, m, t);
            each_hedge(t);
            arrive(0u);
        }
    }
    each_finish(0u, row, now[0]);
}

fn step_four(m: PathMarket, t: u32) {
    if t >= params.steps {
        return;
    }
    advance(0u, m, t);
    advance(1u, m, t);
    advance(2u, m, t);
    advance(3u, m, t);
    each_hedge(t);
    arrive(0u);
    arrive(1u);
    arrive(2u);
    arrive(3u);
}

// Four steps of four paths.
fn walk_four(m: PathMarket, row: u32, quad: u32) {
    draw(0u, m, row, quad);
    draw(1u, m, row + 1u, quad);
    draw(2u, m, row + 2u, quad);
    draw(3u, m, row + 3u, quad);
    step_four(m, 4u * quad);
    step_four(m, 4u * quad + 1u);
    step_four(m, 4u * quad + 2u);
    step_four(m, 4u * quad + 3u);
}

// Four paths a thread. Moments are matched in a loop of their own: a software adapter goes through branches that no lane takes.
fn simulate_four(row: u32) {
    if row >= params.paths {
        return;
    }
    let m = path_market(params.market);
    begin(0u, m, row);
    begin(1u, m, row + 1u);
    begin(2u, m, row + 2u);
    begin(3u, m, row + 3u);
    start_all();
    let quads = (params.steps + 3u) / 4u;
    var plain = m;
    plain.matched = 0u;
    for (var quad = 0u; quad < select(quads, 0u, m.matched != 0u); quad++) {
        walk_four(plain, row, quad);
    }
    for (var quad = 0u; quad < select(0u, quads, m.matched != 0u); quad++) {
        walk_four(m, row, quad);
    }
    each_finish(0u, row, now[0]);
    each_finish(1u, row + 1u, now[1]);
    each_finish(2u, row + 2u, now[2]);
    each_finish(3u, row + 3u, now[3]);
}

@compute @workgroup_size(WG)
fn hedge_delta(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    simulate(group_index(wid, nwg) * WG + tid);
}

@compute @workgroup_size(WG)
fn hedge_single(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    simulate_four((group_index(wid, nwg) * WG + tid) * PATHS);
}

@compute @workgroup_size(WG)
fn hedge_band(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    simulate(group_index(wid, nwg) * WG + tid);
}

@compute @workgroup_size(WG)
fn hedge_gamma(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    simulate(group_index(wid, nwg) * WG + tid);
}

// ---- futures --------------------------------------------------------------------------------------------------------------

// Futures per unit of delta: given by regime, or of least variance over the last `window` changes, 1 while there are fewer.
fn ratio_of(u: u32, t: u32, row: u32, regime: u32) -> f32 {
    if policy[u] != MINIMUM_VARIANCE {
        return reals[(1u + u) * SETUP_REALS + 8u + min(regime, MOST_REGIMES - 1u)];
    }
    let window = setups[u * SETUP_WORDS + 6u];
    if t < window {
        return 1.0;
    }
    var mean = vec2<f32>(0.0);
    for (var i = t - window; i < t; i++) {
        let at = 2u * (i % params.window) * params.paths + row;
        mean += vec2<f32>(history[at], history[at + params.paths]);
    }
    mean /= f32(window);
    var both = 0.0;
    var own = 0.0;
    for (var i = t - window; i < t; i++) {
        let at = 2u * (i % params.window) * params.paths + row;
        let d = vec2<f32>(history[at], history[at + params.paths]) - mean;
        both += d.x * d.y;
        own += d.y * d.y;
    }
    return select(1.0, both / max(own, 1e-36), own > 0.0);
}

fn hedge_future(u: u32, t: u32, row: u32, regime: u32, f: f32) {
    if t == due[u] {
        due[u] += every[u];
        let g = greeks_of(table[row_of(greek[u], t)], kind[u], log_spot[0], now[0]);
        trade(u, u, sign_of[u] * g.delta * ratio_of(u, t, row, regime), f);
    }
}

@compute @workgroup_size(WG)
fn hedge_futures(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let row = group_index(wid, nwg) * WG + tid;
    if row >= params.paths {
        return;
    }
    let m = path_market(params.market);
    begin(0u, m, row);
    var f = path_future(m, state[0]);
    start_all();
    for (var quad = 0u; 4u * quad < params.steps; quad++) {
        draw(0u, m, row, quad);
        let last_step = min(4u * quad + 4u, params.steps);
        for (var t = 4u * quad; t < last_step; t++) {
            let regime = state[0].regime;
            advance(0u, m, t);
            let future = path_future(m, state[0]);
            // The ratio's loop over history makes unrolling worth nothing here.
            for (var u = 0u; u < params.setups; u++) {
                hedge_future(u, t, row, regime, f);
                wealth[u] += wealth[u] * growth + holding[u] * (future - f);
            }
            let at = 2u * (t % params.window) * params.paths + row;
            history[at] = next[0] - now[0];
            history[at + params.paths] = future - f;
            arrive(0u);
            f = future;
        }
    }
    each_finish(0u, row, f);
}
