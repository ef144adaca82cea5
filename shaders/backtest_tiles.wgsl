// Back-tests of sets without stops, a tile of 512 or 256 per workgroup and a span of bars. Maths, shapes and source: kernels/backtest_tiles.rs.
//   keys_by_row             grid  A·⌈T/32⌉·⌈rows/32⌉   workgroup 256   a 32 × 32 block through workgroup memory
//   backtest_band_states    grid  A·spans·tiles        workgroup WG    decide: thread = bar; follow: thread = word
//   backtest_cross, _band   grid  A·spans·tiles        workgroup WG    decide: thread = bar; earn: thread = 8 sets
//   backtest_sized          grid  A·spans·tiles        workgroup WG    decide: thread = bar; earn: thread = 4 sets
//   backtest_join           grid  A·⌈sets/WG⌉          workgroup WG    thread = set, sequential over spans

struct TilesParams {
    a: u32,
    t: u32,
    rows: u32,
    tiles: u32,
    edges: u32,
    spans: u32,
    lag: u32,
    start: u32,
    shift: u32,
    mask: u32,
    cost: f32,
    cost_low: f32,
    set_tiles: u32,
    row_stride: u32,
    bar_stride: u32,
    words: u32,
    mode: u32,
    volatility_rows: u32,
    details: u32,
}

@group(0) @binding(0) var<uniform> params: TilesParams;

override WG: u32 = 64u;
const BARS: u32 = 64u;
const WORDS: u32 = 16u;
const HEAD: u32 = 8u;
const PARTS: u32 = 12u;
const STATS: u32 = 5u;
const SET_TILE: u32 = 64u;
const BLOCK: u32 = 128u;
const SCALE_BIAS: i32 = 512;
const SIZED_WORDS: u32 = 8u;
const DETAILS: u32 = 4u;
const CROSS: u32 = 0u;
const BAND: u32 = 1u;
const MOMENTUM: u32 = 2u;
const NONE: u32 = 0xffffffffu;

// ---- keys, bar after bar of each row ----------------------------------------------------------------------------

@group(0) @binding(1) var<storage, read> keys: array<u32>;
@group(0) @binding(2) var<storage, read_write> by_row: array<u32>;

var<workgroup> sh_block: array<u32, 1056>;

@compute @workgroup_size(WG)
fn keys_by_row(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let group = group_index(wid, nwg);
    let across = (params.rows + 31u) / 32u;
    let down = (params.t + 31u) / 32u;
    if group >= params.a * down * across {
        return;
    }
    let row = group % across * 32u;
    let bar = group / across % down * 32u;
    let asset = group / (across * down) * params.t * params.rows;
    for (var i = tid / 32u; i < 32u; i += WG / 32u) {
        if bar + i < params.t && row + tid % 32u < params.rows {
            sh_block[i * 33u + tid % 32u] = keys[asset + (bar + i) * params.rows + row + tid % 32u];
        }
    }
    workgroupBarrier();
    for (var i = tid / 32u; i < 32u; i += WG / 32u) {
        if row + i < params.rows && bar + tid % 32u < params.t {
            by_row[asset + (row + i) * params.t + bar + tid % 32u] = sh_block[tid % 32u * 33u + i];
        }
    }
}

// ---- decide -----------------------------------------------------------------------------------------------------

@group(0) @binding(2) var<storage, read> lattice: array<u32>;
@group(0) @binding(3) var<storage, read> plan: array<u32>;

var<workgroup> sh_enter: array<u32, 1024>;
var<workgroup> sh_leave: array<u32, 1024>;
var<workgroup> sh_return: array<f32, 64>;

fn key_at(asset: u32, row: u32, t: u32) -> u32 {
    return keys[asset + row * params.row_stride + t * params.bar_stride];
}

// Which of four keys are above one, as bits.
fn above(k: vec4<u32>, x: u32) -> u32 {
    let bits = select(vec4<u32>(0u, 0u, 0u, 0u), vec4<u32>(1u, 2u, 4u, 8u), k > vec4<u32>(x, x, x, x));
    return (bits.x | bits.y) | (bits.z | bits.w);
}

fn four_keys(asset: u32, row: u32, last: u32, t: u32, flip: u32) -> vec4<u32> {
    return vec4<u32>(key_at(asset, min(row, last), t), key_at(asset, min(row + 1u, last), t), key_at(asset, min(row + 2u, last), t), key_at(asset, min(row + 3u, last), t))
        ^ vec4<u32>(flip, flip, flip, flip);
}

// Bits of the sets that are past their first legal bar: the same for all words of a run.
fn legal_bits(word: u32, t: u32) -> u32 {
    let latest = lattice[word * HEAD + 5u];
    let slots = params.words * HEAD + word * 64u;
    let n = select(0u, 32u, t >= lattice[word * HEAD + 7u] && t < latest);
    var legal = select(0u, 0xffffffffu, t >= latest);
    for (var k = 0u; k < n; k += 4u) {
        let first = vec4<u32>(lattice[slots + 2u * k + 1u], lattice[slots + 2u * k + 3u], lattice[slots + 2u * k + 5u], lattice[slots + 2u * k + 7u]);
        let bits = select(vec4<u32>(0u, 0u, 0u, 0u), vec4<u32>(1u, 2u, 4u, 8u), vec4<u32>(t, t, t, t) >= first);
        legal |= ((bits.x | bits.y) | (bits.z | bits.w)) << k;
    }
    return legal;
}

// Words from `first` on at bar t where they cross; where they do not, they leave.
fn decide_cross(first: u32, asset: u32, bar: u32, t: u32, words: u32, both: bool) {
    var i = 0u;
    while i < words {
        // keys of a list of neighbouring rows, shared by the words that follow
        let head = (first + i) * HEAD;
        let flip = select(0u, 0xffffffffu, lattice[head] == 1u);
        let row = lattice[head + 1u];
        let last = lattice[head + 6u];
        let end = i + lattice[head + 4u];
        let legal = legal_bits(first + i, t);
        let k0 = four_keys(asset, row, last, t, flip);
        let k1 = four_keys(asset, row + 4u, last, t, flip);
        let k2 = four_keys(asset, row + 8u, last, t, flip);
        let k3 = four_keys(asset, row + 12u, last, t, flip);
        let k4 = four_keys(asset, row + 16u, last, t, flip);
        let k5 = four_keys(asset, row + 20u, last, t, flip);
        let k6 = four_keys(asset, row + 24u, last, t, flip);
        let k7 = four_keys(asset, row + 28u, last, t, flip);
        for (; i < end; i++) {
            let x = key_at(asset, lattice[(first + i) * HEAD + 2u], t) ^ flip;
            let low = above(k0, x) | above(k1, x) << 4u | above(k2, x) << 8u | above(k3, x) << 12u;
            let high = above(k4, x) << 16u | above(k5, x) << 20u | above(k6, x) << 24u | above(k7, x) << 28u;
            sh_enter[bar * WORDS + i] = (low | high) & legal;
            if both {
                sh_leave[bar * WORDS + i] = ~(low | high) & legal;
            }
        }
    }
}

// Which of 32 ascending thresholds are below a key, as bits.
fn below(list: u32, key: u32) -> u32 {
    var n = 0u;
    for (var step = 16u; step > 0u; step /= 2u) {
        n += select(0u, step, lattice[list + n + step - 1u] < key);
    }
    n += select(0u, 1u, lattice[list + n] < key);
    return select(0xffffffffu, (1u << (n & 31u)) - 1u, n < 32u);
}

// Words from `first` on at bar t where they enter and leave by thresholds.
fn decide_band(first: u32, asset: u32, bar: u32, t: u32, words: u32) {
    var i = 0u;
    while i < words {
        // bits of a list of thresholds, shared by the words that follow
        let head = (first + i) * HEAD;
        let list_is_b = lattice[head] == 1u;
        let of_list = below(lattice[head + 1u], key_at(asset, lattice[head + 6u], t) ^ select(params.mask, 0u, list_is_b));
        let end = i + lattice[head + 4u];
        let legal = legal_bits(first + i, t);
        for (; i < end; i++) {
            let word = (first + i) * HEAD;
            let x = key_at(asset, lattice[word + 2u], t) ^ select(0u, params.mask, list_is_b);
            let of_shared = select(0u, 0xffffffffu, x > lattice[word + 3u]);
            sh_enter[bar * WORDS + i] = select(of_list, of_shared, list_is_b) & legal;
            sh_leave[bar * WORDS + i] = select(of_shared, of_list, list_is_b) & legal;
        }
    }
}

// Bars base to end of a tile of long-or-flat sets, a bar a thread.
fn decide(tile: u32, asset: u32, base: u32, end: u32, tid: u32, crossing: bool) {
    let j = base + tid;
    let t = max(j, params.lag) - params.lag;
    let words = select(0u, WORDS, j >= params.lag && j < end);
    if crossing {
        decide_cross(tile * WORDS, asset, tid, t, words, false);
    } else {
        decide_band(tile * WORDS, asset, tid, t, words);
    }
}

// Asset, span and tile of a workgroup.
fn place_of(group: u32) -> vec3<u32> {
    return vec3<u32>(group / (params.spans * params.tiles), group / params.tiles % params.spans, group % params.tiles);
}

fn cut(span: u32) -> u32 {
    return plan[params.edges + params.a + span];
}

// ---- states of the band machine over a span, from both starts ---------------------------------------------------

@group(0) @binding(4) var<storage, read_write> states: array<u32>;

@compute @workgroup_size(WG)
fn backtest_band_states(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let group = group_index(wid, nwg);
    if group >= params.a * params.spans * params.tiles {
        return;
    }
    let place = place_of(group);
    let asset = place.x * params.t * params.rows;
    let to_bar = cut(place.y + 1u);
    var from_out = 0u;
    var from_in = 0xffffffffu;
    for (var base = cut(place.y); base < to_bar; base += BARS) {
        workgroupBarrier();
        decide(place.z, asset, base, min(base + BARS, to_bar), tid, false);
        workgroupBarrier();
        let n = select(0u, min(to_bar - base, BARS), tid < WORDS);
        for (var k = max(params.lag, base) - base; k < n; k++) {
            let enter = sh_enter[k * WORDS + tid];
            let leave = sh_leave[k * WORDS + tid];
            from_out = (enter & ~from_out) | (from_out & ~leave);
            from_in = (enter & ~from_in) | (from_in & ~leave);
        }
    }
    if tid < WORDS {
        states[(group * WORDS + tid) * 2u] = from_out;
        states[(group * WORDS + tid) * 2u + 1u] = from_in;
    }
}

// ---- earn ---------------------------------------------------------------------------------------------------------

@group(0) @binding(4) var<storage, read> returns: array<f32>;
@group(0) @binding(5) var<storage, read_write> parts: array<u32>;
@group(0) @binding(6) var<storage, read_write> prefix: array<u32>;
@group(0) @binding(7) var<storage, read> states_in: array<u32>;

// Four sets: plain sums of a block, then what lasts over the span.
struct Four {
    sum: vec4<f32>,
    square: vec4<f32>,
    growth: vec4<f32>,
    level: vec4<f32>,
    lowest: vec4<f32>,
    path: vec4<f32>,
    least: vec4<f32>,
    trades: vec4<u32>,
    sum_low: vec4<u32>,
    sum_high: vec4<u32>,
    square_low: vec4<u32>,
    square_high: vec4<u32>,
    mantissa: vec4<f32>,
    exponent: vec4<i32>,
}

fn four() -> Four {
    let zero = vec4<f32>(0.0, 0.0, 0.0, 0.0);
    let one = vec4<f32>(1.0, 1.0, 1.0, 1.0);
    let none = vec4<u32>(0u, 0u, 0u, 0u);
    return Four(zero, zero, one, one, one, one, one, none, none, none, none, none, one, vec4<i32>(0, 0, 0, 0));
}

// One bar's net returns. The span's path from its start and the least of it are kept only where spans are joined.
fn add(x_in: Four, net: vec4<f32>, traded: vec4<bool>, joined: bool) -> Four {
    var x = x_in;
    x.trades += select(vec4<u32>(0u, 0u, 0u, 0u), vec4<u32>(1u, 1u, 1u, 1u), traded);
    x.sum += net;
    x.square = fma(net, net, x.square);
    x.growth = fma(x.growth, net, x.growth);
    x.level = min(fma(x.level, net, x.level), vec4<f32>(1.0, 1.0, 1.0, 1.0));
    x.lowest = min(x.lowest, x.level);
    if joined {
        x.path = fma(x.path, net, x.path);
        x.least = min(x.least, x.path);
    }
    return x;
}

// One bar of sets that hold 1 or nothing.
fn earn(x: Four, r: f32, held: u32, changed: u32, joined: bool) -> Four {
    let bits = vec4<u32>(1u, 2u, 4u, 8u);
    let none = vec4<u32>(0u, 0u, 0u, 0u);
    let zero = vec4<f32>(0.0, 0.0, 0.0, 0.0);
    let on = (vec4<u32>(held, held, held, held) & bits) != none;
    let trade = (vec4<u32>(changed, changed, changed, changed) & bits) != none;
    let net = select(zero, vec4<f32>(r, r, r, r), on) - select(zero, vec4<f32>(params.cost, params.cost, params.cost, params.cost), trade);
    return add(x, net, trade, joined);
}

struct Wide {
    low: vec4<u32>,
    high: vec4<u32>,
}

// `to_fixed` of common.wgsl for four at once; the shift is at most 40.
fn to_fixed_four(x: vec4<f32>, shift: i32) -> Wide {
    let raw = bitcast<vec4<u32>>(x);
    let none = vec4<u32>(0u, 0u, 0u, 0u);
    let biased = (raw >> vec4<u32>(23u, 23u, 23u, 23u)) & vec4<u32>(0xffu, 0xffu, 0xffu, 0xffu);
    let hidden = select(none, vec4<u32>(0x800000u, 0x800000u, 0x800000u, 0x800000u), biased > none);
    let mantissa = (raw & vec4<u32>(0x7fffffu, 0x7fffffu, 0x7fffffu, 0x7fffffu)) | hidden;
    let s = max(vec4<i32>(biased), vec4<i32>(1, 1, 1, 1)) + vec4<i32>(shift - 150, shift - 150, shift - 150, shift - 150);
    let up = vec4<u32>(clamp(s, vec4<i32>(0, 0, 0, 0), vec4<i32>(40, 40, 40, 40)));
    let down = vec4<u32>(clamp(-s, vec4<i32>(0, 0, 0, 0), vec4<i32>(31, 31, 31, 31)));
    let far = up >= vec4<u32>(32u, 32u, 32u, 32u);
    let by = up & vec4<u32>(31u, 31u, 31u, 31u);
    let shifted = mantissa << by;
    let over = select(mantissa >> ((vec4<u32>(32u, 32u, 32u, 32u) - up) & vec4<u32>(31u, 31u, 31u, 31u)), none, up == none);
    var low = select(shifted, none, far);
    var high = select(over, shifted, far);
    let small = s < vec4<i32>(0, 0, 0, 0);
    low = select(low, mantissa >> down, small);
    high = select(high, none, small);
    let negative = (raw >> vec4<u32>(31u, 31u, 31u, 31u)) == vec4<u32>(1u, 1u, 1u, 1u);
    let minus = ~low + vec4<u32>(1u, 1u, 1u, 1u);
    let borrow = select(none, vec4<u32>(1u, 1u, 1u, 1u), minus == none);
    return Wide(select(low, minus, negative), select(high, ~high + borrow, negative));
}

// Moves a block's plain sums into the exact ones.
fn flush(x_in: Four, shift: i32, scale: i32) -> Four {
    var x = x_in;
    let none = vec4<u32>(0u, 0u, 0u, 0u);
    let one = vec4<u32>(1u, 1u, 1u, 1u);
    let sum = to_fixed_four(x.sum, shift - scale);
    x.sum_low += sum.low;
    x.sum_high += sum.high + select(none, one, x.sum_low < sum.low);
    let square = to_fixed_four(x.square, shift - 2 * scale);
    x.square_low += square.low;
    x.square_high += square.high + select(none, one, x.square_low < square.low);
    let product = x.mantissa * x.growth;
    let raw = bitcast<vec4<u32>>(product);
    let power = vec4<i32>((raw >> vec4<u32>(23u, 23u, 23u, 23u)) & vec4<u32>(0xffu, 0xffu, 0xffu, 0xffu)) - vec4<i32>(127, 127, 127, 127);
    let zero = vec4<f32>(0.0, 0.0, 0.0, 0.0);
    let there = product != zero;
    let unit = (raw & vec4<u32>(0x807fffffu, 0x807fffffu, 0x807fffffu, 0x807fffffu)) | vec4<u32>(0x3f800000u, 0x3f800000u, 0x3f800000u, 0x3f800000u);
    x.mantissa = select(product, bitcast<vec4<f32>>(unit), there);
    x.exponent += select(vec4<i32>(0, 0, 0, 0), power, there);
    x.sum = zero;
    x.square = zero;
    x.growth = vec4<f32>(1.0, 1.0, 1.0, 1.0);
    return x;
}

fn put_prefix(a: u32, index: u32, edge: u32, sum_low: u32, sum_high: u32, square_low: u32, square_high: u32) {
    if index == NONE {
        return;
    }
    let at = ((a * params.set_tiles + index / SET_TILE) * params.edges + edge) * 4u * SET_TILE + index % SET_TILE;
    prefix[at] = sum_low;
    prefix[at + SET_TILE] = sum_high;
    prefix[at + 2u * SET_TILE] = square_low;
    prefix[at + 3u * SET_TILE] = square_high;
}

fn put_prefixes(a: u32, slot: u32, edge: u32, x: Four) {
    put_prefix(a, lattice[slot], edge, x.sum_low.x, x.sum_high.x, x.square_low.x, x.square_high.x);
    put_prefix(a, lattice[slot + 2u], edge, x.sum_low.y, x.sum_high.y, x.square_low.y, x.square_high.y);
    put_prefix(a, lattice[slot + 4u], edge, x.sum_low.z, x.sum_high.z, x.square_low.z, x.square_high.z);
    put_prefix(a, lattice[slot + 6u], edge, x.sum_low.w, x.sum_high.w, x.square_low.w, x.square_high.w);
}

fn put_parts(a: u32, span: u32, slot: u32, x: Four, turnover: vec4<f32>) {
    let sets = params.set_tiles * SET_TILE;
    for (var k = 0u; k < 4u; k++) {
        let index = lattice[slot + 2u * k];
        if index != NONE {
            let at = (a * params.spans + span) * PARTS * sets + index;
            parts[at] = x.sum_low[k];
            parts[at + sets] = x.sum_high[k];
            parts[at + 2u * sets] = x.square_low[k];
            parts[at + 3u * sets] = x.square_high[k];
            parts[at + 4u * sets] = x.trades[k];
            parts[at + 5u * sets] = bitcast<u32>(x.mantissa[k]);
            parts[at + 6u * sets] = bitcast<u32>(x.exponent[k]);
            parts[at + 7u * sets] = bitcast<u32>(x.level[k]);
            parts[at + 8u * sets] = bitcast<u32>(x.lowest[k]);
            parts[at + 9u * sets] = bitcast<u32>(x.path[k]);
            parts[at + 10u * sets] = bitcast<u32>(x.least[k]);
            parts[at + 11u * sets] = bitcast<u32>(turnover[k]);
        }
    }
}

// First edge after bar j, counted among the edges.
fn edge_after(j: u32) -> u32 {
    var low = 0u;
    var high = params.edges;
    while low < high {
        let middle = (low + high) / 2u;
        if plan[middle] <= j {
            low = middle + 1u;
        } else {
            high = middle;
        }
    }
    return low;
}

// A whole span; `crossing` is known where it is called.
fn simulate(group: u32, tid: u32, crossing: bool) {
    let place = place_of(group);
    let a = place.x;
    let tile = place.z;
    let asset = a * params.t * params.rows;
    let earned = a * (params.t - 1u);
    let scale = i32(plan[params.edges + a]) - SCALE_BIAS;
    let shift = i32(params.shift);
    let from_bar = cut(place.y);
    let to_bar = cut(place.y + 1u);
    let joined = params.spans > 1u;
    let word = tid / 4u;
    let turn = tid % 4u * 8u;
    let slot = params.words * HEAD + (tile * WORDS * 32u + tid * 8u) * 2u;

    // inside: where the machine is; held: what of it counts
    var inside = 0u;
    if crossing {
        // its state before the span is that of the bar before
        decide(tile, asset, from_bar - min(from_bar, 1u), from_bar, tid, true);
        workgroupBarrier();
        inside = select(0u, sh_enter[word], from_bar > params.lag);
    } else {
        for (var span = 0u; span < place.y; span++) {
            let at = (((a * params.spans + span) * params.tiles + tile) * WORDS + word) * 2u;
            inside = (states_in[at] & ~inside) | (states_in[at + 1u] & inside);
        }
    }
    inside >>= turn;
    var held = select(0u, inside, from_bar > params.start);

    var x = four();
    var y = four();
    var edge = select(edge_after(from_bar), 0u, from_bar == 0u);
    var begun = from_bar;
    // an edge at bar 0 has nothing before it
    let at_zero = edge < params.edges && plan[min(edge, max(params.edges, 1u) - 1u)] == from_bar;
    if at_zero {
        put_prefixes(a, slot, edge, x);
        put_prefixes(a, slot + 8u, edge, y);
        edge++;
    }
    for (var base = from_bar; base < to_bar; base += BARS) {
        workgroupBarrier();
        decide(tile, asset, base, min(base + BARS, to_bar), tid, crossing);
        if base + tid < to_bar {
            sh_return[tid] = returns[earned + base + tid];
        }
        workgroupBarrier();
        let end = min(base + BARS, to_bar);
        var j = base;
        while j < end {
            var next = min(begun + BLOCK, to_bar);
            if edge < params.edges {
                next = min(next, plan[edge]);
            }
            let stop = min(end, next);
            for (; j < stop; j++) {
                let at = (j - base) * WORDS + word;
                if j >= params.lag {
                    let enter = sh_enter[at] >> turn;
                    if crossing {
                        inside = enter;
                    } else {
                        inside = (enter & ~inside) | (inside & ~(sh_leave[at] >> turn));
                    }
                }
                let now = select(0u, inside, j >= params.start);
                let changed = now ^ held;
                held = now;
                let r = sh_return[j - base];
                x = earn(x, r, held, changed, joined);
                y = earn(y, r, held >> 4u, changed >> 4u, joined);
            }
            if j == next {
                x = flush(x, shift, scale);
                y = flush(y, shift, scale);
                begun = j;
                if edge < params.edges && plan[min(edge, max(params.edges, 1u) - 1u)] == j {
                    put_prefixes(a, slot, edge, x);
                    put_prefixes(a, slot + 8u, edge, y);
                    edge++;
                }
            }
        }
    }
    put_parts(a, place.y, slot, x, vec4<f32>(x.trades));
    put_parts(a, place.y, slot + 8u, y, vec4<f32>(y.trades));
}

@compute @workgroup_size(WG)
fn backtest_cross(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let group = group_index(wid, nwg);
    if group < params.a * params.spans * params.tiles {
        simulate(group, tid, true);
    }
}

@compute @workgroup_size(WG)
fn backtest_band(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let group = group_index(wid, nwg);
    if group < params.a * params.spans * params.tiles {
        simulate(group, tid, false);
    }
}

// ---- sizes and sides ----------------------------------------------------------------------------------------------

@group(0) @binding(7) var<storage, read> close: array<f32>;
@group(0) @binding(8) var<storage, read> inverse_volatility: array<f32>;

// Words from `first` on at bar t where they follow the sign of a past return.
fn decide_momentum(first: u32, a: u32, bar: u32, t: u32, words: u32) {
    let now = close[a * params.t + t];
    for (var i = 0u; i < words; i++) {
        let then = close[a * params.t + t - min(t, lattice[(first + i) * HEAD + 2u])];
        let legal = legal_bits(first + i, t);
        sh_enter[bar * WORDS + i] = select(0u, legal, now > then);
        sh_leave[bar * WORDS + i] = select(0u, legal, now < then);
    }
}

// Bars base to end of a tile of any sets without stops, a bar a thread.
fn decide_sized(tile: u32, a: u32, base: u32, end: u32, tid: u32) {
    let j = base + tid;
    let t = max(j, params.lag) - params.lag;
    let words = select(0u, SIZED_WORDS, j >= params.lag && j < end);
    let asset = a * params.t * params.rows;
    switch params.mode {
        case CROSS: { decide_cross(tile * SIZED_WORDS, asset, tid, t, words, true); }
        case BAND: { decide_band(tile * SIZED_WORDS, asset, tid, t, words); }
        default: { decide_momentum(tile * SIZED_WORDS, a, tid, t, words); }
    }
}

// What four sets make of a direction: weights up and down, size = min(target·inverse volatility, leverage).
struct Sizes {
    up: vec4<f32>,
    down: vec4<f32>,
    goal: vec4<f32>,
    leverage: vec4<f32>,
    row: vec4<u32>,
}

fn sizes_of(slot: u32) -> Sizes {
    var x: Sizes;
    for (var k = 0u; k < 4u; k++) {
        let at = params.details + (slot + k) * DETAILS;
        let side = lattice[at] & 3u;
        x.up[k] = select(1.0, 0.0, side == 2u);
        x.down[k] = select(-1.0, 0.0, side == 0u);
        x.goal[k] = bitcast<f32>(lattice[at + 1u]);
        x.leverage[k] = bitcast<f32>(lattice[at + 2u]);
        x.row[k] = lattice[at + 3u];
    }
    return x;
}

fn size_of(row: u32, at: u32) -> f32 {
    return select(0.0, inverse_volatility[at + min(row, max(params.volatility_rows, 1u) - 1u)], row != NONE);
}

// Weights of four sets that are up or down at bar t.
fn weights(s: Sizes, a: u32, t: u32, inside: u32, below_bits: u32) -> vec4<f32> {
    let bits = vec4<u32>(1u, 2u, 4u, 8u);
    let none = vec4<u32>(0u, 0u, 0u, 0u);
    let zero = vec4<f32>(0.0, 0.0, 0.0, 0.0);
    let up = (vec4<u32>(inside, inside, inside, inside) & bits) != none;
    let down = (vec4<u32>(below_bits, below_bits, below_bits, below_bits) & bits) != none;
    let at = (a * params.t + t) * params.volatility_rows;
    let calm = vec4<f32>(size_of(s.row.x, at), size_of(s.row.y, at), size_of(s.row.z, at), size_of(s.row.w, at));
    let sized = min(s.goal * calm, s.leverage);
    let size = select(sized, vec4<f32>(1.0, 1.0, 1.0, 1.0), s.row == vec4<u32>(NONE, NONE, NONE, NONE));
    return select(select(zero, s.down, down), s.up, up) * size;
}

// Where the machine is after a bar: up, and down.
fn follow(at: u32, turn: u32, before: vec2<u32>) -> vec2<u32> {
    let enter = sh_enter[at] >> turn;
    let leave = sh_leave[at] >> turn;
    if params.mode != BAND {
        return vec2<u32>(enter, leave);
    }
    let inside = (enter & ~before.x) | (before.x & ~leave);
    return vec2<u32>(inside, ~inside & (before.y | leave));
}

@compute @workgroup_size(WG)
fn backtest_sized(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let group = group_index(wid, nwg);
    if group >= params.a * params.spans * params.tiles {
        return;
    }
    let place = place_of(group);
    let a = place.x;
    let earned = a * (params.t - 1u);
    let scale = i32(plan[params.edges + a]) - SCALE_BIAS;
    let shift = i32(params.shift);
    let from_bar = cut(place.y);
    let to_bar = cut(place.y + 1u);
    let word = tid / 8u;
    let turn = tid % 8u * 4u;
    let own = place.z * SIZED_WORDS * 32u + tid * 4u;
    let slot = params.words * HEAD + own * 2u;
    let s = sizes_of(own);

    // the weight before the span is that of the bar before
    let zero = vec4<f32>(0.0, 0.0, 0.0, 0.0);
    var machine = vec2<u32>(0u, 0u);
    var weight = zero;
    let goes_on = from_bar > max(params.lag, params.start);
    decide_sized(place.z, a, from_bar - min(from_bar, 1u), from_bar, tid);
    workgroupBarrier();
    if goes_on {
        machine = follow(word, turn, machine);
        weight = weights(s, a, from_bar - 1u - params.lag, machine.x, machine.y);
    }

    var x = four();
    var turnover = zero;
    var traded_so_far = zero;
    var edge = select(edge_after(from_bar), 0u, from_bar == 0u);
    var begun = from_bar;
    if edge < params.edges && plan[min(edge, max(params.edges, 1u) - 1u)] == from_bar {
        put_prefixes(a, slot, edge, x);
        edge++;
    }
    for (var base = from_bar; base < to_bar; base += BARS) {
        workgroupBarrier();
        decide_sized(place.z, a, base, min(base + BARS, to_bar), tid);
        if base + tid < to_bar {
            sh_return[tid] = returns[earned + base + tid];
        }
        workgroupBarrier();
        let end = min(base + BARS, to_bar);
        var j = base;
        while j < end {
            var next = min(begun + BLOCK, to_bar);
            if edge < params.edges {
                next = min(next, plan[edge]);
            }
            let stop = min(end, next);
            for (; j < stop; j++) {
                var wanted = zero;
                if j >= params.lag {
                    machine = follow((j - base) * WORDS + word, turn, machine);
                    if j >= params.start {
                        wanted = weights(s, a, j - params.lag, machine.x, machine.y);
                    }
                }
                let traded = abs(wanted - weight);
                let r = sh_return[j - base];
                let net = fma(wanted, vec4<f32>(r, r, r, r), -(params.cost * traded));
                weight = wanted;
                turnover += traded;
                x = add(x, net, traded > zero, params.spans > 1u);
            }
            if j == next {
                x = flush(x, shift, scale);
                traded_so_far += turnover;
                turnover = zero;
                begun = j;
                if edge < params.edges && plan[min(edge, max(params.edges, 1u) - 1u)] == j {
                    put_prefixes(a, slot, edge, x);
                    edge++;
                }
            }
        }
    }
    put_parts(a, place.y, slot, x, traded_so_far);
}

// ---- join ---------------------------------------------------------------------------------------------------------

@group(0) @binding(1) var<storage, read> parts_in: array<u32>;
@group(0) @binding(2) var<storage, read> plan_in: array<u32>;
@group(0) @binding(3) var<storage, read_write> stats: array<f32>;
@group(0) @binding(4) var<storage, read_write> prefix_out: array<u32>;

// Adds what came before the span to its part of a prefix.
fn lift(at: u32, base: vec2<u32>) {
    let x = add64(vec2<u32>(prefix_out[at], prefix_out[at + SET_TILE]), base);
    prefix_out[at] = x.x;
    prefix_out[at + SET_TILE] = x.y;
}

@compute @workgroup_size(WG)
fn backtest_join(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let group = group_index(wid, nwg);
    if group >= params.a * params.set_tiles {
        return;
    }
    let a = group / params.set_tiles;
    let sets = params.set_tiles * SET_TILE;
    let index = group % params.set_tiles * SET_TILE + tid;
    var sums = vec2<u32>(0u, 0u);
    var squares = vec2<u32>(0u, 0u);
    var trades = 0u;
    var turnover = 0.0;
    var mantissa = 1.0;
    var exponent = 0;
    var level = 1.0;
    var lowest = 1.0;
    var edge = 0u;
    for (var span = 0u; span < params.spans; span++) {
        let to_bar = plan_in[params.edges + params.a + span + 1u];
        while edge < params.edges && plan_in[min(edge, max(params.edges, 1u) - 1u)] <= to_bar {
            let at = (group * params.edges + edge) * 4u * SET_TILE + tid;
            if span > 0u {
                lift(at, sums);
                lift(at + 2u * SET_TILE, squares);
            }
            edge++;
        }
        let at = (a * params.spans + span) * PARTS * sets + index;
        sums = add64(sums, vec2<u32>(parts_in[at], parts_in[at + sets]));
        squares = add64(squares, vec2<u32>(parts_in[at + 2u * sets], parts_in[at + 3u * sets]));
        trades += parts_in[at + 4u * sets];
        turnover += bitcast<f32>(parts_in[at + 11u * sets]);
        let product = mantissa * bitcast<f32>(parts_in[at + 5u * sets]);
        let power = i32((bitcast<u32>(product) >> 23u) & 0xffu) - 127;
        exponent += bitcast<i32>(parts_in[at + 6u * sets]) + select(0, power, product != 0.0);
        mantissa = select(product, bitcast<f32>((bitcast<u32>(product) & 0x807fffffu) | 0x3f800000u), product != 0.0);
        lowest = min(lowest, min(bitcast<f32>(parts_in[at + 8u * sets]), level * bitcast<f32>(parts_in[at + 10u * sets])));
        level = min(bitcast<f32>(parts_in[at + 7u * sets]), level * bitcast<f32>(parts_in[at + 9u * sets]));
    }
    let bars = params.t - 1u;
    let counted = max(bars, params.start) - params.start;
    let at = group * STATS * SET_TILE + tid;
    stats[at] = sharpe_of(counted, sums, scaled_variance(counted, sums, squares, params.shift));
    stats[at + SET_TILE] = ldexp(mantissa, clamp(exponent, -126, 127)) - 1.0;
    stats[at + 2u * SET_TILE] = 1.0 - lowest;
    stats[at + 3u * SET_TILE] = turnover;
    stats[at + 4u * SET_TILE] = f32(trades);
}
