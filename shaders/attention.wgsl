// Fused attention. Maths, shapes and source: kernels/attention.rs.
//   attention_forward…      grid  B·NH·⌈Tq / rows⌉   thread = query          tiles of k, v
//   attention_rows          grid  ⌈B·NH·Tq / WG⌉     thread = query          lse, delta and lengths for the backward kernels
//   attention_backward_q…   grid  B·NH·⌈Tq / rows⌉   thread = query          tiles of k, v
//   attention_backward_kv…  grid  B·NH·⌈Tk / rows⌉   thread = key            tiles of q, grad_out
//   attention_grad_bias     grid  ⌈bias / WG⌉        thread = bias element
//   attention_weights       grid  ⌈B·NH·Tq·Tk / WG⌉  thread = weight
// rows = WG; with SPLIT, ⌈D/32⌉ neighbouring threads share a row, 32 numbers each. Workgroup memory: two tiles of 256 vec4.

struct AttentionParams {
    batch: u32,
    first: u32,
    heads: u32,
    queries: u32,
    keys: u32,
    width: u32,
    q_batch: u32,
    q_head: u32,
    q_row: u32,
    q_offset: u32,
    k_batch: u32,
    k_head: u32,
    k_row: u32,
    k_offset: u32,
    v_batch: u32,
    v_head: u32,
    v_row: u32,
    v_offset: u32,
    out_batch: u32,
    out_head: u32,
    out_row: u32,
    out_offset: u32,
    bias_batch: u32,
    bias_head: u32,
    record: u32,
    flags: u32,
    window: u32,
    threshold: u32,
    seed_low: u32,
    seed_high: u32,
    stream: u32,
    scale: f32,
    scale_low: f32,
    keep: f32,
    keep_low: f32,
}

@group(0) @binding(0) var<uniform> params: AttentionParams;
@group(0) @binding(1) var<storage, read> q: array<Stored>;
@group(0) @binding(2) var<storage, read> k: array<Stored>;
@group(0) @binding(3) var<storage, read> v: array<Stored>;
@group(0) @binding(4) var<storage, read> bias: array<Stored>;
@group(0) @binding(5) var<storage, read> kv_len: array<u32>;
@group(0) @binding(6) var<storage, read> step: array<u32>;
@group(0) @binding(7) var<storage, read_write> out: array<Stored>;
@group(0) @binding(8) var<storage, read_write> lse: array<f32>;

override WG: u32 = 64u;
// vec4 of a row that a thread holds.
override VECS: u32 = 8u;
// Whether several threads share a row.
override SPLIT: u32 = 1u;

const CAUSAL: u32 = 1u;
const BIAS: u32 = 2u;
const LENGTHS: u32 = 4u;
const DROPOUT: u32 = 8u;
const GRAD_K: u32 = 16u;
const GRAD_V: u32 = 32u;
const ADD: u32 = 64u;

const NO_KEY: f32 = -1e30;
const EXCLUDED: f32 = -1e29;
const HEADER: u32 = 4u;
const TILE: u32 = 256u;
const PARTS: u32 = 128u;

var<workgroup> sh_a: array<vec4<f32>, TILE>;
var<workgroup> sh_b: array<vec4<f32>, TILE>;
// Parts of the scores of up to 8 steps, for each thread of a split row.
var<workgroup> sh_part_a: array<vec4<f32>, PARTS>;
var<workgroup> sh_part_b: array<vec4<f32>, PARTS>;
// (lse, delta) of a tile of queries.
var<workgroup> sh_rows: array<vec2<f32>, 128>;

// ---- rows in registers ------------------------------------------------------------------------------------------

// Up to 32 numbers of a row; those beyond VECS are never touched.
struct Row {
    a: vec4<f32>,
    b: vec4<f32>,
    c: vec4<f32>,
    d: vec4<f32>,
    e: vec4<f32>,
    f: vec4<f32>,
    g: vec4<f32>,
    h: vec4<f32>,
}

fn dot_a(x: Row, at: u32) -> f32 {
    var sum = x.a * sh_a[at] + x.b * sh_a[at + 1u];
    if VECS > 2u {
        sum += x.c * sh_a[at + 2u] + x.d * sh_a[at + 3u];
    }
    if VECS > 4u {
        sum += (x.e * sh_a[at + 4u] + x.f * sh_a[at + 5u]) + (x.g * sh_a[at + 6u] + x.h * sh_a[at + 7u]);
    }
    return (sum.x + sum.y) + (sum.z + sum.w);
}

fn dot_b(x: Row, at: u32) -> f32 {
    var sum = x.a * sh_b[at] + x.b * sh_b[at + 1u];
    if VECS > 2u {
        sum += x.c * sh_b[at + 2u] + x.d * sh_b[at + 3u];
    }
    if VECS > 4u {
        sum += (x.e * sh_b[at + 4u] + x.f * sh_b[at + 5u]) + (x.g * sh_b[at + 6u] + x.h * sh_b[at + 7u]);
    }
    return (sum.x + sum.y) + (sum.z + sum.w);
}

// sum + factor·row of the tile
fn add_a(sum: Row, factor: f32, at: u32) -> Row {
    var y = sum;
    y.a += factor * sh_a[at];
    y.b += factor * sh_a[at + 1u];
    if VECS > 2u {
        y.c += factor * sh_a[at + 2u];
        y.d += factor * sh_a[at + 3u];
    }
    if VECS > 4u {
        y.e += factor * sh_a[at + 4u];
        y.f += factor * sh_a[at + 5u];
        y.g += factor * sh_a[at + 6u];
        y.h += factor * sh_a[at + 7u];
    }
    return y;
}

fn add_b(sum: Row, factor: f32, at: u32) -> Row {
    var y = sum;
    y.a += factor * sh_b[at];
    y.b += factor * sh_b[at + 1u];
    if VECS > 2u {
        y.c += factor * sh_b[at + 2u];
        y.d += factor * sh_b[at + 3u];
    }
    if VECS > 4u {
        y.e += factor * sh_b[at + 4u];
        y.f += factor * sh_b[at + 5u];
        y.g += factor * sh_b[at + 6u];
        y.h += factor * sh_b[at + 7u];
    }
    return y;
}

fn times(x: Row, factor: f32) -> Row {
    var y = x;
    y.a *= factor;
    y.b *= factor;
    if VECS > 2u {
        y.c *= factor;
        y.d *= factor;
    }
    if VECS > 4u {
        y.e *= factor;
        y.f *= factor;
        y.g *= factor;
        y.h *= factor;
    }
    return y;
}

fn zero_row() -> Row {
    let z = vec4<f32>(0.0);
    return Row(z, z, z, z, z, z, z, z);
}

// vec4 n of a row.
fn nth(x: Row, n: u32) -> vec4<f32> {
    switch n {
        case 0u: { return x.a; }
        case 1u: { return x.b; }
        case 2u: { return x.c; }
        case 3u: { return x.d; }
        case 4u: { return x.e; }
        case 5u: { return x.f; }
        case 6u: { return x.g; }
        default: { return x.h; }
    }
}

// ---- loads --------------------------------------------------------------------------------------------------------

// Numbers d … d+3 of the row at `at`; 0 beyond the width.
fn q_vec(at: u32, d: u32) -> vec4<f32> {
    let w = params.width;
    if d + 4u <= w {
        return vec4<f32>(f32(q[at + d]), f32(q[at + d + 1u]), f32(q[at + d + 2u]), f32(q[at + d + 3u]));
    }
    var x = vec4<f32>(0.0);
    if d < w { x.x = f32(q[at + d]); }
    if d + 1u < w { x.y = f32(q[at + d + 1u]); }
    if d + 2u < w { x.z = f32(q[at + d + 2u]); }
    return x;
}

fn k_vec(at: u32, d: u32) -> vec4<f32> {
    let w = params.width;
    if d + 4u <= w {
        return vec4<f32>(f32(k[at + d]), f32(k[at + d + 1u]), f32(k[at + d + 2u]), f32(k[at + d + 3u]));
    }
    var x = vec4<f32>(0.0);
    if d < w { x.x = f32(k[at + d]); }
    if d + 1u < w { x.y = f32(k[at + d + 1u]); }
    if d + 2u < w { x.z = f32(k[at + d + 2u]); }
    return x;
}

fn v_vec(at: u32, d: u32) -> vec4<f32> {
    let w = params.width;
    if d + 4u <= w {
        return vec4<f32>(f32(v[at + d]), f32(v[at + d + 1u]), f32(v[at + d + 2u]), f32(v[at + d + 3u]));
    }
    var x = vec4<f32>(0.0);
    if d < w { x.x = f32(v[at + d]); }
    if d + 1u < w { x.y = f32(v[at + d + 1u]); }
    if d + 2u < w { x.z = f32(v[at + d + 2u]); }
    return x;
}

fn grad_vec(at: u32, d: u32) -> vec4<f32> {
    let w = params.width;
    if d + 4u <= w {
        return vec4<f32>(f32(grad_out[at + d]), f32(grad_out[at + d + 1u]), f32(grad_out[at + d + 2u]), f32(grad_out[at + d + 3u]));
    }
    var x = vec4<f32>(0.0);
    if d < w { x.x = f32(grad_out[at + d]); }
    if d + 1u < w { x.y = f32(grad_out[at + d + 1u]); }
    if d + 2u < w { x.z = f32(grad_out[at + d + 2u]); }
    return x;
}

fn q_row(at: u32, d: u32) -> Row {
    var x = zero_row();
    x.a = q_vec(at, d);
    x.b = q_vec(at, d + 4u);
    if VECS > 2u {
        x.c = q_vec(at, d + 8u);
        x.d = q_vec(at, d + 12u);
    }
    if VECS > 4u {
        x.e = q_vec(at, d + 16u);
        x.f = q_vec(at, d + 20u);
        x.g = q_vec(at, d + 24u);
        x.h = q_vec(at, d + 28u);
    }
    return x;
}

fn k_row(at: u32, d: u32) -> Row {
    var x = zero_row();
    x.a = k_vec(at, d);
    x.b = k_vec(at, d + 4u);
    if VECS > 2u {
        x.c = k_vec(at, d + 8u);
        x.d = k_vec(at, d + 12u);
    }
    if VECS > 4u {
        x.e = k_vec(at, d + 16u);
        x.f = k_vec(at, d + 20u);
        x.g = k_vec(at, d + 24u);
        x.h = k_vec(at, d + 28u);
    }
    return x;
}

fn v_row(at: u32, d: u32) -> Row {
    var x = zero_row();
    x.a = v_vec(at, d);
    x.b = v_vec(at, d + 4u);
    if VECS > 2u {
        x.c = v_vec(at, d + 8u);
        x.d = v_vec(at, d + 12u);
    }
    if VECS > 4u {
        x.e = v_vec(at, d + 16u);
        x.f = v_vec(at, d + 20u);
        x.g = v_vec(at, d + 24u);
        x.h = v_vec(at, d + 28u);
    }
    return x;
}

fn grad_row(at: u32, d: u32) -> Row {
    var x = zero_row();
    x.a = grad_vec(at, d);
    x.b = grad_vec(at, d + 4u);
    if VECS > 2u {
        x.c = grad_vec(at, d + 8u);
        x.d = grad_vec(at, d + 12u);
    }
    if VECS > 4u {
        x.e = grad_vec(at, d + 16u);
        x.f = grad_vec(at, d + 20u);
        x.g = grad_vec(at, d + 24u);
        x.h = grad_vec(at, d + 28u);
    }
    return x;
}

// ---- who sees whom --------------------------------------------------------------------------------------------------

fn has(bits: u32) -> bool {
    return (params.flags & bits) != 0u;
}

// Keys that query i may see: [x, y).
fn keys_of(i: u32, length: u32) -> vec2<i32> {
    let center = i32(i + params.keys) - i32(params.queries);
    let window = i32(params.window);
    let last = select(center + window, center + 1, has(CAUSAL));
    let end = max(min(last, i32(length)), 0);
    return vec2<i32>(clamp(center - window + 1, 0, end), end);
}

// Queries that may see key j: [x, y).
fn queries_of(j: u32, length: u32) -> vec2<i32> {
    if j >= length {
        return vec2<i32>(0, 0);
    }
    let center = i32(j + params.queries) - i32(params.keys);
    let window = i32(params.window);
    let first = select(center - window + 1, center, has(CAUSAL));
    let end = clamp(center + window, 0, i32(params.queries));
    return vec2<i32>(clamp(first, 0, end), end);
}

// A thread's place: its item and head, its row, its part of the row.
struct Place {
    live: bool,
    item: u32,
    b: u32,
    h: u32,
    // First row of the workgroup, one past its last, and this thread's.
    from_row: u32,
    to_row: u32,
    row: u32,
    // Threads of a row, and which of them this is.
    parts: u32,
    part: u32,
}

fn place_of(group: u32, tid: u32, steps: u32) -> Place {
    let parts = select(1u, (params.width + 31u) / 32u, SPLIT == 1u);
    let rows = WG / parts;
    let tiles = (steps + rows - 1u) / rows;
    let item = group / tiles;
    let first = (group % tiles) * rows;
    let local = tid / parts;
    let live = local < rows && first + local < steps;
    return Place(live, item, item / params.heads, item % params.heads, first, min(first + rows, steps), first + local, parts, tid % parts);
}

// Steps of a tile.
fn tile_steps(parts: u32) -> u32 {
    if SPLIT == 1u {
        return min(TILE / (8u * parts), 8u) & ~3u;
    }
    return TILE / VECS;
}

// e^x where x may be NaN; 0 below −87.
fn exp_of(x: vec4<f32>) -> vec4<f32> {
    let y = select(x, vec4<f32>(-88.0), x < vec4<f32>(-88.0));
    let n = floor(y * 1.44269504 + 0.5);
    let r = (y - n * 0.693359375) + n * 2.12194440e-4;
    let p = ((((r * 0.0001984127 + 0.0013888889) * r + 0.008333333) * r + 0.041666667) * r + 0.16666667) * r + 0.5;
    let scale = bitcast<vec4<f32>>((vec4<i32>(clamp(n, vec4<f32>(-127.0), vec4<f32>(128.0))) + 127) << vec4<u32>(23u));
    return select((1.0 + (r + r * r * p)) * scale, vec4<f32>(0.0), x < vec4<f32>(-87.0));
}

// ---- dropout --------------------------------------------------------------------------------------------------------

fn words_of(draw: u32, item: u32, i: u32, quad: u32) -> vec4<u32> {
    return philox4x32(vec4<u32>(params.first * params.heads + item, i, quad, params.stream), vec2<u32>(params.seed_low, params.seed_high + draw));
}

// Factors of the weights of query i for keys j … j+3, j a multiple of 4.
fn kept_keys(draw: u32, item: u32, i: u32, j: u32) -> vec4<f32> {
    if !has(DROPOUT) {
        return vec4<f32>(1.0);
    }
    let word = words_of(draw, item, i, j / 4u) >> vec4<u32>(8u);
    return select(vec4<f32>(params.keep), vec4<f32>(0.0), word < vec4<u32>(params.threshold));
}

// Factor of the weight of query i for key j.
fn kept(draw: u32, item: u32, i: u32, j: u32) -> f32 {
    if !has(DROPOUT) {
        return 1.0;
    }
    let words = words_of(draw, item, i, j / 4u);
    let word = select(select(words.x, words.y, (j & 3u) == 1u), select(words.z, words.w, (j & 3u) == 3u), (j & 3u) > 1u);
    return select(params.keep, 0.0, (word >> 8u) < params.threshold);
}

// Biases of four pairs, `stride` apart from `at` on, where they are allowed.
fn biases(at: u32, stride: u32, allowed: vec4<bool>) -> vec4<f32> {
    var x = vec4<f32>(0.0);
    if allowed.x { x.x = f32(bias[at]); }
    if allowed.y { x.y = f32(bias[at + stride]); }
    if allowed.z { x.z = f32(bias[at + 2u * stride]); }
    if allowed.w { x.w = f32(bias[at + 3u * stride]); }
    return x;
}

// ---- forward ----------------------------------------------------------------------------------------------------------

// Loads keys `first` … of the tile; 0 from `end` on.
fn load_keys(place: Place, first: u32, end: u32, tid: u32) {
    let vecs = VECS * place.parts;
    let k_at = place.b * params.k_batch + place.h * params.k_head + params.k_offset;
    let v_at = place.b * params.v_batch + place.h * params.v_head + params.v_offset;
    for (var n = tid; n < tile_steps(place.parts) * vecs; n += WG) {
        let j = first + n / vecs;
        let d = 4u * (n % vecs);
        var x = vec4<f32>(0.0);
        var y = vec4<f32>(0.0);
        if j < end {
            x = k_vec(k_at + j * params.k_row, d);
            y = v_vec(v_at + j * params.v_row, d);
        }
        sh_a[n] = x;
        sh_b[n] = y;
    }
}

// Products of a row, or of a part of it, with four steps of tile a.
fn products_a(x: Row, at: u32, stride: u32) -> vec4<f32> {
    return vec4<f32>(dot_a(x, at), dot_a(x, at + stride), dot_a(x, at + 2u * stride), dot_a(x, at + 3u * stride));
}

fn products_b(x: Row, at: u32, stride: u32) -> vec4<f32> {
    return vec4<f32>(dot_b(x, at), dot_b(x, at + stride), dot_b(x, at + 2u * stride), dot_b(x, at + 3u * stride));
}

// Sums of the parts of a row's scores.
fn joined_a(tid: u32, place: Place, quad: u32) -> vec4<f32> {
    var sum = vec4<f32>(0.0);
    for (var part = 0u; part < place.parts; part++) {
        sum += sh_part_a[min(2u * (tid - place.part + part) + quad, PARTS - 1u)];
    }
    return sum;
}

fn joined_b(tid: u32, place: Place, quad: u32) -> vec4<f32> {
    var sum = vec4<f32>(0.0);
    for (var part = 0u; part < place.parts; part++) {
        sum += sh_part_b[min(2u * (tid - place.part + part) + quad, PARTS - 1u)];
    }
    return sum;
}

fn forward(group: u32, tid: u32) {
    let place = place_of(group, tid, params.queries);
    if place.item >= params.batch * params.heads {
        return;
    }
    var length = params.keys;
    if has(LENGTHS) {
        length = min(length, kv_len[place.b]);
    }
    let draw = step[0];
    let i = place.row;
    let vecs = VECS * place.parts;
    let tile = tile_steps(place.parts);
    let mine = VECS * place.part;
    var keys = vec2<i32>(0, 0);
    var x = zero_row();
    if place.live {
        keys = keys_of(i, length);
        x = times(q_row(place.b * params.q_batch + place.h * params.q_head + params.q_offset + i * params.q_row, 4u * mine), params.scale);
    }
    let bias_at = place.b * params.bias_batch + place.h * params.bias_head + i * params.keys;
    let end = u32(keys_of(place.to_row - 1u, length).y);
    var sum = zero_row();
    var total = 0.0;
    var most = NO_KEY;
    for (var first = u32(keys_of(place.from_row, length).x) & ~3u; first < end; first += tile) {
        workgroupBarrier();
        load_keys(place, first, end, tid);
        workgroupBarrier();
        if SPLIT == 1u {
            for (var g = 0u; g < tile; g += 4u) {
                sh_part_a[2u * tid + g / 4u] = products_a(x, g * vecs + mine, vecs);
            }
            workgroupBarrier();
        }
        for (var g = 0u; g < tile && first + g < end; g += 4u) {
            let at = g * vecs + mine;
            var s: vec4<f32>;
            if SPLIT == 1u {
                s = joined_a(tid, place, g / 4u);
            } else {
                s = products_a(x, at, vecs);
            }
            let j = vec4<i32>(i32(first + g)) + vec4<i32>(0, 1, 2, 3);
            var allowed = (j >= vec4<i32>(keys.x)) & (j < vec4<i32>(keys.y));
            if has(BIAS) {
                let added = biases(bias_at + first + g, 1u, allowed);
                allowed = allowed & !(added <= vec4<f32>(EXCLUDED));
                s += added;
            }
            s = select(vec4<f32>(NO_KEY), s, allowed);
            let higher = max(max(s.x, s.y), max(s.z, s.w));
            if higher > most {
                let factor = exp_of(vec4<f32>(most - higher)).x;
                sum = times(sum, factor);
                total *= factor;
                most = higher;
            }
            var p = select(vec4<f32>(0.0), exp_of(s - most), allowed);
            total += (p.x + p.y) + (p.z + p.w);
            if has(DROPOUT) {
                p *= kept_keys(draw, place.item, i, first + g);
            }
            sum = add_b(sum, p.x, at);
            sum = add_b(sum, p.y, at + vecs);
            sum = add_b(sum, p.z, at + 2u * vecs);
            sum = add_b(sum, p.w, at + 3u * vecs);
        }
    }
    if !place.live {
        return;
    }
    let found = total != 0.0;
    sum = times(sum, select(0.0, 1.0 / total, found));
    let out_at = place.b * params.out_batch + place.h * params.out_head + params.out_offset + i * params.out_row;
    for (var n = 0u; n < VECS; n++) {
        let y = nth(sum, n);
        let d = 4u * (mine + n);
        if d < params.width { out[out_at + d] = stored(y.x); }
        if d + 1u < params.width { out[out_at + d + 1u] = stored(y.y); }
        if d + 2u < params.width { out[out_at + d + 2u] = stored(y.z); }
        if d + 3u < params.width { out[out_at + d + 3u] = stored(y.w); }
    }
    if place.part == 0u {
        lse[place.item * params.queries + i] = select(NO_KEY, most + log_f32(total), found);
    }
}

@compute @workgroup_size(WG)
fn attention_forward_8(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    forward(group_index(wid, nwg), tid);
}

@compute @workgroup_size(WG)
fn attention_forward_16(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    forward(group_index(wid, nwg), tid);
}

@compute @workgroup_size(WG)
fn attention_forward_32(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    forward(group_index(wid, nwg), tid);
}

@compute @workgroup_size(WG)
fn attention_forward(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    forward(group_index(wid, nwg), tid);
}

// ---- lse and delta ------------------------------------------------------------------------------------------------------

@group(0) @binding(1) var<storage, read> rows_kv_len: array<u32>;
@group(0) @binding(2) var<storage, read> rows_step: array<u32>;
@group(0) @binding(3) var<storage, read> out_in: array<Stored>;
@group(0) @binding(4) var<storage, read> rows_grad_out: array<Stored>;
@group(0) @binding(5) var<storage, read> lse_in: array<f32>;
@group(0) @binding(6) var<storage, read_write> rows_out: array<f32>;

@compute @workgroup_size(WG)
fn attention_rows(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let n = group_index(wid, nwg) * WG + tid;
    if n >= params.batch * params.heads * params.queries {
        return;
    }
    let i = n % params.queries;
    let h = n / params.queries % params.heads;
    let b = n / params.queries / params.heads;
    let at = b * params.out_batch + h * params.out_head + params.out_offset + i * params.out_row;
    var sum = 0.0;
    for (var d = 0u; d < params.width; d++) {
        sum += f32(out_in[at + d]) * f32(rows_grad_out[at + d]);
    }
    let row = b * params.record + HEADER + 2u * (h * params.queries + i);
    rows_out[row] = lse_in[n];
    rows_out[row + 1u] = sum;
    if h == 0u && i == 0u {
        var length = params.keys;
        if has(LENGTHS) {
            length = min(length, rows_kv_len[b]);
        }
        rows_out[b * params.record] = f32(length);
        rows_out[b * params.record + 1u] = f32(rows_step[0] & 0xffffu);
        rows_out[b * params.record + 2u] = f32(rows_step[0] >> 16u);
        rows_out[b * params.record + 3u] = 0.0;
    }
}

// ---- backward, queries --------------------------------------------------------------------------------------------------

@group(0) @binding(5) var<storage, read> grad_out: array<Stored>;
@group(0) @binding(6) var<storage, read> rows: array<f32>;
@group(0) @binding(7) var<storage, read_write> grad_q: array<Stored>;

fn rows_at(b: u32, h: u32) -> u32 {
    return b * params.record + HEADER + 2u * h * params.queries;
}

// Step of dropout.
fn draw_of(b: u32) -> u32 {
    let at = b * params.record + 1u;
    return u32(rows[at]) | (u32(rows[at + 1u]) << 16u);
}

fn backward_q(group: u32, tid: u32) {
    let place = place_of(group, tid, params.queries);
    if place.item >= params.batch * params.heads {
        return;
    }
    let length = u32(rows[place.b * params.record]);
    let draw = draw_of(place.b);
    let i = place.row;
    let vecs = VECS * place.parts;
    let tile = tile_steps(place.parts);
    let mine = VECS * place.part;
    var keys = vec2<i32>(0, 0);
    var x = zero_row();
    var y = zero_row();
    var own = vec2<f32>(0.0);
    if place.live {
        keys = keys_of(i, length);
        x = times(q_row(place.b * params.q_batch + place.h * params.q_head + params.q_offset + i * params.q_row, 4u * mine), params.scale);
        y = grad_row(place.b * params.out_batch + place.h * params.out_head + params.out_offset + i * params.out_row, 4u * mine);
        let at = rows_at(place.b, place.h) + 2u * i;
        own = vec2<f32>(rows[at], rows[at + 1u]);
    }
    let bias_at = place.b * params.bias_batch + place.h * params.bias_head + i * params.keys;
    let end = u32(keys_of(place.to_row - 1u, length).y);
    var sum = zero_row();
    for (var first = u32(keys_of(place.from_row, length).x) & ~3u; first < end; first += tile) {
        workgroupBarrier();
        load_keys(place, first, end, tid);
        workgroupBarrier();
        if SPLIT == 1u {
            for (var g = 0u; g < tile; g += 4u) {
                sh_part_a[2u * tid + g / 4u] = products_a(x, g * vecs + mine, vecs);
                sh_part_b[2u * tid + g / 4u] = products_b(y, g * vecs + mine, vecs);
            }
            workgroupBarrier();
        }
        for (var g = 0u; g < tile && first + g < end; g += 4u) {
            let at = g * vecs + mine;
            var s: vec4<f32>;
            var dp: vec4<f32>;
            if SPLIT == 1u {
                s = joined_a(tid, place, g / 4u);
                dp = joined_b(tid, place, g / 4u);
            } else {
                s = products_a(x, at, vecs);
                dp = products_b(y, at, vecs);
            }
            let j = vec4<i32>(i32(first + g)) + vec4<i32>(0, 1, 2, 3);
            var allowed = (j >= vec4<i32>(keys.x)) & (j < vec4<i32>(keys.y));
            if has(BIAS) {
                let added = biases(bias_at + first + g, 1u, allowed);
                allowed = allowed & !(added <= vec4<f32>(EXCLUDED));
                s += added;
            }
            if has(DROPOUT) {
                dp *= kept_keys(draw, place.item, i, first + g);
            }
            let ds = select(vec4<f32>(0.0), exp_of(s - own.x) * (dp - own.y), allowed);
            sum = add_a(sum, ds.x, at);
            sum = add_a(sum, ds.y, at + vecs);
            sum = add_a(sum, ds.z, at + 2u * vecs);
            sum = add_a(sum, ds.w, at + 3u * vecs);
        }
    }
    if !place.live {
        return;
    }
    sum = times(sum, params.scale);
    let at = place.b * params.q_batch + place.h * params.q_head + params.q_offset + i * params.q_row;
    for (var n = 0u; n < VECS; n++) {
        let z = nth(sum, n);
        let d = 4u * (mine + n);
        if d < params.width { grad_q[at + d] = stored(z.x); }
        if d + 1u < params.width { grad_q[at + d + 1u] = stored(z.y); }
        if d + 2u < params.width { grad_q[at + d + 2u] = stored(z.z); }
        if d + 3u < params.width { grad_q[at + d + 3u] = stored(z.w); }
    }
}

@compute @workgroup_size(WG)
fn attention_backward_q_8(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    backward_q(group_index(wid, nwg), tid);
}

@compute @workgroup_size(WG)
fn attention_backward_q_16(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    backward_q(group_index(wid, nwg), tid);
}

@compute @workgroup_size(WG)
fn attention_backward_q_32(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    backward_q(group_index(wid, nwg), tid);
}

@compute @workgroup_size(WG)
fn attention_backward_q(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    backward_q(group_index(wid, nwg), tid);
}

// ---- backward, keys and values --------------------------------------------------------------------------------------------

@group(0) @binding(7) var<storage, read_write> grad_k: array<Stored>;
@group(0) @binding(8) var<storage, read_write> grad_v: array<Stored>;
@group(0) @binding(7) var<storage, read_write> grad_kv: array<Stored>;

// Loads queries `first` … of the tile: scale·q, grad_out, (lse, delta); 0 from `end` on.
fn load_queries(place: Place, first: u32, end: u32, tid: u32) {
    let vecs = VECS * place.parts;
    let tile = tile_steps(place.parts);
    let q_at = place.b * params.q_batch + place.h * params.q_head + params.q_offset;
    let out_at = place.b * params.out_batch + place.h * params.out_head + params.out_offset;
    for (var n = tid; n < tile * vecs; n += WG) {
        let i = first + n / vecs;
        let d = 4u * (n % vecs);
        var x = vec4<f32>(0.0);
        var y = vec4<f32>(0.0);
        if i < end {
            x = params.scale * q_vec(q_at + i * params.q_row, d);
            y = grad_vec(out_at + i * params.out_row, d);
        }
        sh_a[n] = x;
        sh_b[n] = y;
    }
    for (var n = tid; n < tile; n += WG) {
        var own = vec2<f32>(0.0);
        if first + n < end {
            let at = rows_at(place.b, place.h) + 2u * (first + n);
            own = vec2<f32>(rows[at], rows[at + 1u]);
        }
        sh_rows[n] = own;
    }
}

struct KeyGradients {
    key: Row,
    value: Row,
}

fn backward_kv(place: Place, tid: u32) -> KeyGradients {
    let length = u32(rows[place.b * params.record]);
    let draw = draw_of(place.b);
    let j = place.row;
    let vecs = VECS * place.parts;
    let tile = tile_steps(place.parts);
    let mine = VECS * place.part;
    var queries = vec2<i32>(0, 0);
    var x = zero_row();
    var y = zero_row();
    if place.live {
        queries = queries_of(j, length);
        if queries.x < queries.y {
            x = k_row(place.b * params.k_batch + place.h * params.k_head + params.k_offset + j * params.k_row, 4u * mine);
            y = v_row(place.b * params.v_batch + place.h * params.v_head + params.v_offset + j * params.v_row, 4u * mine);
        }
    }
    let bias_at = place.b * params.bias_batch + place.h * params.bias_head + j;
    // The last key of the workgroup within the length decides where the queries end.
    var end = 0u;
    if place.from_row < length {
        end = u32(queries_of(min(place.to_row, length) - 1u, length).y);
    }
    var sum = KeyGradients(zero_row(), zero_row());
    for (var first = u32(queries_of(place.from_row, length).x); first < end; first += tile) {
        workgroupBarrier();
        load_queries(place, first, end, tid);
        workgroupBarrier();
        if SPLIT == 1u {
            for (var g = 0u; g < tile; g += 4u) {
                sh_part_a[2u * tid + g / 4u] = products_a(x, g * vecs + mine, vecs);
                sh_part_b[2u * tid + g / 4u] = products_b(y, g * vecs + mine, vecs);
            }
            workgroupBarrier();
        }
        for (var g = 0u; g < tile && first + g < end; g += 4u) {
            let at = g * vecs + mine;
            var s: vec4<f32>;
            var dp: vec4<f32>;
            if SPLIT == 1u {
                s = joined_a(tid, place, g / 4u);
                dp = joined_b(tid, place, g / 4u);
            } else {
                s = products_a(x, at, vecs);
                dp = products_b(y, at, vecs);
            }
            let i = vec4<i32>(i32(first + g)) + vec4<i32>(0, 1, 2, 3);
            var allowed = (i >= vec4<i32>(queries.x)) & (i < vec4<i32>(queries.y));
            if has(BIAS) {
                let added = biases(bias_at + (first + g) * params.keys, params.keys, allowed);
                allowed = allowed & !(added <= vec4<f32>(EXCLUDED));
                s += added;
            }
            let r0 = sh_rows[g];
            let r1 = sh_rows[g + 1u];
            let r2 = sh_rows[g + 2u];
            let r3 = sh_rows[g + 3u];
            var p = select(vec4<f32>(0.0), exp_of(s - vec4<f32>(r0.x, r1.x, r2.x, r3.x)), allowed);
            var factor = vec4<f32>(1.0);
            if has(DROPOUT) {
                let at_i = first + g;
                factor = vec4<f32>(kept(draw, place.item, at_i, j), kept(draw, place.item, at_i + 1u, j), kept(draw, place.item, at_i + 2u, j), kept(draw, place.item, at_i + 3u, j));
            }
            let ds = p * (dp * factor - vec4<f32>(r0.y, r1.y, r2.y, r3.y));
            p *= factor;
            sum.key = add_a(sum.key, ds.x, at);
            sum.key = add_a(sum.key, ds.y, at + vecs);
            sum.key = add_a(sum.key, ds.z, at + 2u * vecs);
            sum.key = add_a(sum.key, ds.w, at + 3u * vecs);
            sum.value = add_b(sum.value, p.x, at);
            sum.value = add_b(sum.value, p.y, at + vecs);
            sum.value = add_b(sum.value, p.z, at + 2u * vecs);
            sum.value = add_b(sum.value, p.w, at + 3u * vecs);
        }
    }
    return sum;
}

fn backward_kv_apart(group: u32, tid: u32) {
    let place = place_of(group, tid, params.keys);
    if place.item >= params.batch * params.heads {
        return;
    }
    let sum = backward_kv(place, tid);
    if !place.live {
        return;
    }
    let k_at = place.b * params.k_batch + place.h * params.k_head + params.k_offset + place.row * params.k_row;
    let v_at = place.b * params.v_batch + place.h * params.v_head + params.v_offset + place.row * params.v_row;
    for (var n = 0u; n < VECS; n++) {
        let x = nth(sum.key, n);
        let y = nth(sum.value, n);
        let first = 4u * (VECS * place.part + n);
        for (var e = 0u; e < 4u; e++) {
            if first + e < params.width {
                grad_k[k_at + first + e] = stored(x[e]);
                grad_v[v_at + first + e] = stored(y[e]);
            }
        }
    }
}

fn backward_kv_packed(group: u32, tid: u32) {
    let place = place_of(group, tid, params.keys);
    if place.item >= params.batch * params.heads {
        return;
    }
    let sum = backward_kv(place, tid);
    if !place.live {
        return;
    }
    let k_at = place.b * params.k_batch + place.h * params.k_head + params.k_offset + place.row * params.k_row;
    let v_at = place.b * params.v_batch + place.h * params.v_head + params.v_offset + place.row * params.v_row;
    for (var n = 0u; n < VECS; n++) {
        let x = nth(sum.key, n);
        let y = nth(sum.value, n);
        let first = 4u * (VECS * place.part + n);
        for (var e = 0u; e < 4u; e++) {
            if first + e < params.width && has(GRAD_K) {
                grad_kv[k_at + first + e] = stored(x[e]);
            }
            if first + e < params.width && has(GRAD_V) {
                grad_kv[v_at + first + e] = stored(y[e]);
            }
        }
    }
}

@compute @workgroup_size(WG)
fn attention_backward_kv_8(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    backward_kv_apart(group_index(wid, nwg), tid);
}

@compute @workgroup_size(WG)
fn attention_backward_kv_16(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    backward_kv_apart(group_index(wid, nwg), tid);
}

@compute @workgroup_size(WG)
fn attention_backward_kv_32(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    backward_kv_apart(group_index(wid, nwg), tid);
}

@compute @workgroup_size(WG)
fn attention_backward_kv(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    backward_kv_apart(group_index(wid, nwg), tid);
}

@compute @workgroup_size(WG)
fn attention_backward_kv_packed_8(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    backward_kv_packed(group_index(wid, nwg), tid);
}

@compute @workgroup_size(WG)
fn attention_backward_kv_packed_16(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    backward_kv_packed(group_index(wid, nwg), tid);
}

@compute @workgroup_size(WG)
fn attention_backward_kv_packed_32(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    backward_kv_packed(group_index(wid, nwg), tid);
}

@compute @workgroup_size(WG)
fn attention_backward_kv_packed(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    backward_kv_packed(group_index(wid, nwg), tid);
}

// ---- the bias' gradient -----------------------------------------------------------------------------------------------------

@group(0) @binding(7) var<storage, read_write> grad_bias: array<Stored>;

@compute @workgroup_size(WG)
fn attention_grad_bias(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let n = group_index(wid, nwg) * WG + tid;
    let items = select(1u, params.batch, params.bias_batch > 0u);
    let heads = select(1u, params.heads, params.bias_head > 0u);
    if n >= items * heads * params.queries * params.keys {
        return;
    }
    let j = n % params.keys;
    let row = n / params.keys;
    let i = row % params.queries;
    var sum = 0.0;
    if has(ADD) {
        sum = f32(grad_bias[n]);
    }
    for (var b = row / params.queries / heads; b < params.batch; b += items) {
        for (var h = row / params.queries % heads; h < params.heads; h += heads) {
            let keys = keys_of(i, u32(rows[b * params.record]));
            let added = f32(bias[b * params.bias_batch + h * params.bias_head + i * params.keys + j]);
            if i32(j) < keys.x || i32(j) >= keys.y || added <= EXCLUDED {
                continue;
            }
            let q_at = b * params.q_batch + h * params.q_head + params.q_offset + i * params.q_row;
            let k_at = b * params.k_batch + h * params.k_head + params.k_offset + j * params.k_row;
            let v_at = b * params.v_batch + h * params.v_head + params.v_offset + j * params.v_row;
            let out_at = b * params.out_batch + h * params.out_head + params.out_offset + i * params.out_row;
            var s = vec4<f32>(0.0);
            var dp = vec4<f32>(0.0);
            for (var d = 0u; d < params.width; d += 4u) {
                s += q_vec(q_at, d) * k_vec(k_at, d);
                dp += grad_vec(out_at, d) * v_vec(v_at, d);
            }
            let at = rows_at(b, h) + 2u * i;
            let p = exp_of(vec4<f32>(((s.x + s.y) + (s.z + s.w)) * params.scale + added - rows[at])).x;
            sum += p * (((dp.x + dp.y) + (dp.z + dp.w)) * kept(draw_of(b), b * params.heads + h, i, j) - rows[at + 1u]);
        }
    }
    grad_bias[n] = stored(sum);
}

// ---- weights --------------------------------------------------------------------------------------------------------------

@group(0) @binding(3) var<storage, read> weights_lse: array<f32>;
@group(0) @binding(6) var<storage, read_write> weights: array<Stored>;

@compute @workgroup_size(WG)
fn attention_weights(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let n = group_index(wid, nwg) * WG + tid;
    if n >= params.batch * params.heads * params.queries * params.keys {
        return;
    }
    let j = n % params.keys;
    let row = n / params.keys;
    let i = row % params.queries;
    let h = row / params.queries % params.heads;
    let b = row / params.queries / params.heads;
    var length = params.keys;
    if has(LENGTHS) {
        length = min(length, kv_len[b]);
    }
    let keys = keys_of(i, length);
    var added = 0.0;
    if has(BIAS) {
        added = f32(bias[b * params.bias_batch + h * params.bias_head + i * params.keys + j]);
    }
    var weight = 0.0;
    if i32(j) >= keys.x && i32(j) < keys.y && !(added <= EXCLUDED) {
        let q_at = b * params.q_batch + h * params.q_head + params.q_offset + i * params.q_row;
        let k_at = b * params.k_batch + h * params.k_head + params.k_offset + j * params.k_row;
        var s = vec4<f32>(0.0);
        for (var d = 0u; d < params.width; d += 4u) {
            s += q_vec(q_at, d) * k_vec(k_at, d);
        }
        weight = exp_of(vec4<f32>(((s.x + s.y) + (s.z + s.w)) * params.scale + added - weights_lse[row])).x;
    }
    weights[n] = stored(weight);
}
