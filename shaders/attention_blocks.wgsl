// Fused attention on software adapters, without bias and dropout, for heads 8, 16 or 32 wide: an invocation is a lane of the processor's
// vector there, a load a loop over the lanes, and a shader with barriers in its loops keeps every variable in memory. So a thread owns two
// rows and reads the other side's rows itself, one at a time. Maths, shapes and source: kernels/attention.rs.
//   attention_forward_blocks_…            grid ⌈B·NH·⌈Tq/2⌉ / WG⌉   thread = two queries
//   attention_backward_q_blocks_…         as forward
//   attention_backward_kv[_packed]_blocks_…   grid ⌈B·NH·⌈Tk/2⌉ / WG⌉   thread = two keys

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
@group(0) @binding(1) var<storage, read> q: array<f32>;
@group(0) @binding(2) var<storage, read> k: array<f32>;
@group(0) @binding(3) var<storage, read> v: array<f32>;

override WG: u32 = 8u;
// vec4 of a row.
override VECS: u32 = 4u;

const CAUSAL: u32 = 1u;
const LENGTHS: u32 = 4u;
const GRAD_K: u32 = 16u;
const GRAD_V: u32 = 32u;

const NO_KEY: f32 = -1e30;
const HEADER: u32 = 4u;

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

fn zero_row() -> Row {
    let z = vec4<f32>(0.0);
    return Row(z, z, z, z, z, z, z, z);
}

fn dot_rows(x: Row, y: Row) -> f32 {
    var sum = x.a * y.a + x.b * y.b;
    if VECS > 2u {
        sum += x.c * y.c + x.d * y.d;
    }
    if VECS > 4u {
        sum += (x.e * y.e + x.f * y.f) + (x.g * y.g + x.h * y.h);
    }
    return (sum.x + sum.y) + (sum.z + sum.w);
}

// factor·x + other·y
fn blend_rows(x: Row, factor: f32, y: Row, other: f32) -> Row {
    var z = zero_row();
    z.a = factor * x.a + other * y.a;
    z.b = factor * x.b + other * y.b;
    if VECS > 2u {
        z.c = factor * x.c + other * y.c;
        z.d = factor * x.d + other * y.d;
    }
    if VECS > 4u {
        z.e = factor * x.e + other * y.e;
        z.f = factor * x.f + other * y.f;
        z.g = factor * x.g + other * y.g;
        z.h = factor * x.h + other * y.h;
    }
    return z;
}

// x + other·y
fn add_rows(x: Row, y: Row, other: f32) -> Row {
    var z = zero_row();
    z.a = x.a + other * y.a;
    z.b = x.b + other * y.b;
    if VECS > 2u {
        z.c = x.c + other * y.c;
        z.d = x.d + other * y.d;
    }
    if VECS > 4u {
        z.e = x.e + other * y.e;
        z.f = x.f + other * y.f;
        z.g = x.g + other * y.g;
        z.h = x.h + other * y.h;
    }
    return z;
}

fn times(x: Row, factor: f32) -> Row {
    var y = zero_row();
    y.a = factor * x.a;
    y.b = factor * x.b;
    if VECS > 2u {
        y.c = factor * x.c;
        y.d = factor * x.d;
    }
    if VECS > 4u {
        y.e = factor * x.e;
        y.f = factor * x.f;
        y.g = factor * x.g;
        y.h = factor * x.h;
    }
    return y;
}

fn q_row(at: u32) -> Row {
    var x = zero_row();
    x.a = vec4<f32>(q[at + 0u], q[at + 1u], q[at + 2u], q[at + 3u]);
    x.b = vec4<f32>(q[at + 4u], q[at + 5u], q[at + 6u], q[at + 7u]);
    if VECS > 2u {
        x.c = vec4<f32>(q[at + 8u], q[at + 9u], q[at + 10u], q[at + 11u]);
        x.d = vec4<f32>(q[at + 12u], q[at + 13u], q[at + 14u], q[at + 15u]);
    }
    if VECS > 4u {
        x.e = vec4<f32>(q[at + 16u], q[at + 17u], q[at + 18u], q[at + 19u]);
        x.f = vec4<f32>(q[at + 20u], q[at + 21u], q[at + 22u], q[at + 23u]);
        x.g = vec4<f32>(q[at + 24u], q[at + 25u], q[at + 26u], q[at + 27u]);
        x.h = vec4<f32>(q[at + 28u], q[at + 29u], q[at + 30u], q[at + 31u]);
    }
    return x;
}

fn k_row(at: u32) -> Row {
    var x = zero_row();
    x.a = vec4<f32>(k[at + 0u], k[at + 1u], k[at + 2u], k[at + 3u]);
    x.b = vec4<f32>(k[at + 4u], k[at + 5u], k[at + 6u], k[at + 7u]);
    if VECS > 2u {
        x.c = vec4<f32>(k[at + 8u], k[at + 9u], k[at + 10u], k[at + 11u]);
        x.d = vec4<f32>(k[at + 12u], k[at + 13u], k[at + 14u], k[at + 15u]);
    }
    if VECS > 4u {
        x.e = vec4<f32>(k[at + 16u], k[at + 17u], k[at + 18u], k[at + 19u]);
        x.f = vec4<f32>(k[at + 20u], k[at + 21u], k[at + 22u], k[at + 23u]);
        x.g = vec4<f32>(k[at + 24u], k[at + 25u], k[at + 26u], k[at + 27u]);
        x.h = vec4<f32>(k[at + 28u], k[at + 29u], k[at + 30u], k[at + 31u]);
    }
    return x;
}

fn v_row(at: u32) -> Row {
    var x = zero_row();
    x.a = vec4<f32>(v[at + 0u], v[at + 1u], v[at + 2u], v[at + 3u]);
    x.b = vec4<f32>(v[at + 4u], v[at + 5u], v[at + 6u], v[at + 7u]);
    if VECS > 2u {
        x.c = vec4<f32>(v[at + 8u], v[at + 9u], v[at + 10u], v[at + 11u]);
        x.d = vec4<f32>(v[at + 12u], v[at + 13u], v[at + 14u], v[at + 15u]);
    }
    if VECS > 4u {
        x.e = vec4<f32>(v[at + 16u], v[at + 17u], v[at + 18u], v[at + 19u]);
        x.f = vec4<f32>(v[at + 20u], v[at + 21u], v[at + 22u], v[at + 23u]);
        x.g = vec4<f32>(v[at + 24u], v[at + 25u], v[at + 26u], v[at + 27u]);
        x.h = vec4<f32>(v[at + 28u], v[at + 29u], v[at + 30u], v[at + 31u]);
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

// e^x where x may be NaN; 0 below −87.
fn exp_of(x: vec4<f32>) -> vec4<f32> {
    let y = select(x, vec4<f32>(-88.0), x < vec4<f32>(-88.0));
    let n = floor(y * 1.44269504 + 0.5);
    let r = (y - n * 0.693359375) + n * 2.12194440e-4;
    let p = ((((r * 0.0001984127 + 0.0013888889) * r + 0.008333333) * r + 0.041666667) * r + 0.16666667) * r + 0.5;
    let scale = bitcast<vec4<f32>>((vec4<i32>(clamp(n, vec4<f32>(-127.0), vec4<f32>(128.0))) + 127) << vec4<u32>(23u));
    return select((1.0 + (r + r * r * p)) * scale, vec4<f32>(0.0), x < vec4<f32>(-87.0));
}

// Two neighbouring rows of a head; the second may be the first again where there is none.
struct Place {
    live: bool,
    item: u32,
    b: u32,
    h: u32,
    one: u32,
    two: u32,
}

fn place_of(thread: u32, steps: u32) -> Place {
    let pairs = (steps + 1u) / 2u;
    let live = thread < params.batch * params.heads * pairs;
    let item = select(0u, thread / pairs, live);
    let one = select(0u, 2u * (thread % pairs), live);
    return Place(live, item, item / params.heads, item % params.heads, one, min(one + 1u, steps - 1u));
}

fn q_at(place: Place, i: u32) -> u32 {
    return place.b * params.q_batch + place.h * params.q_head + params.q_offset + i * params.q_row;
}

fn k_at(place: Place, j: u32) -> u32 {
    return place.b * params.k_batch + place.h * params.k_head + params.k_offset + j * params.k_row;
}

fn v_at(place: Place, j: u32) -> u32 {
    return place.b * params.v_batch + place.h * params.v_head + params.v_offset + j * params.v_row;
}

fn out_at(place: Place, i: u32) -> u32 {
    return place.b * params.out_batch + place.h * params.out_head + params.out_offset + i * params.out_row;
}

fn inside(j: u32, range: vec2<i32>) -> bool {
    return i32(j) >= range.x && i32(j) < range.y;
}

// ---- forward ----------------------------------------------------------------------------------------------------------

@group(0) @binding(4) var<storage, read> kv_len: array<u32>;
@group(0) @binding(5) var<storage, read_write> out: array<f32>;
@group(0) @binding(6) var<storage, read_write> lse: array<f32>;

fn put_out(at: u32, x: Row) {
    out[at + 0u] = x.a.x;
    out[at + 1u] = x.a.y;
    out[at + 2u] = x.a.z;
    out[at + 3u] = x.a.w;
    out[at + 4u] = x.b.x;
    out[at + 5u] = x.b.y;
    out[at + 6u] = x.b.z;
    out[at + 7u] = x.b.w;
    if VECS > 2u {
        out[at + 8u] = x.c.x;
        out[at + 9u] = x.c.y;
        out[at + 10u] = x.c.z;
        out[at + 11u] = x.c.w;
        out[at + 12u] = x.d.x;
        out[at + 13u] = x.d.y;
        out[at + 14u] = x.d.z;
        out[at + 15u] = x.d.w;
    }
    if VECS > 4u {
        out[at + 16u] = x.e.x;
        out[at + 17u] = x.e.y;
        out[at + 18u] = x.e.z;
        out[at + 19u] = x.e.w;
        out[at + 20u] = x.f.x;
        out[at + 21u] = x.f.y;
        out[at + 22u] = x.f.z;
        out[at + 23u] = x.f.w;
        out[at + 24u] = x.g.x;
        out[at + 25u] = x.g.y;
        out[at + 26u] = x.g.z;
        out[at + 27u] = x.g.w;
        out[at + 28u] = x.h.x;
        out[at + 29u] = x.h.y;
        out[at + 30u] = x.h.z;
        out[at + 31u] = x.h.w;
    }
}

fn finish(place: Place, i: u32, sum: Row, total: f32, most: f32) {
    let found = total != 0.0;
    put_out(out_at(place, i), times(sum, select(0.0, 1.0 / total, found)));
    lse[place.item * params.queries + i] = select(NO_KEY, most + log_f32(total), found);
}

fn forward(thread: u32) {
    let place = place_of(thread, params.queries);
    if !place.live {
        return;
    }
    var length = params.keys;
    if has(LENGTHS) {
        length = min(length, kv_len[place.b]);
    }
    let keys_one = keys_of(place.one, length);
    let keys_two = keys_of(place.two, length);
    let one = times(q_row(q_at(place, place.one)), params.scale);
    let two = times(q_row(q_at(place, place.two)), params.scale);
    var sum_one = zero_row();
    var sum_two = zero_row();
    var total = vec2<f32>(0.0);
    var most = vec2<f32>(NO_KEY);
    let end = u32(max(keys_one.y, keys_two.y));
    for (var j = u32(min(keys_one.x, keys_two.x)); j < end; j++) {
        let key = k_row(k_at(place, j));
        let value = v_row(v_at(place, j));
        let allowed = vec2<bool>(inside(j, keys_one), inside(j, keys_two));
        let s = select(vec2<f32>(NO_KEY), vec2<f32>(dot_rows(one, key), dot_rows(two, key)), allowed);
        let higher = max(most, s);
        let e = exp_of(vec4<f32>(s - higher, most - higher));
        let p = select(vec2<f32>(0.0), e.xy, allowed);
        most = higher;
        total = total * e.zw + p;
        sum_one = blend_rows(sum_one, e.z, value, p.x);
        sum_two = blend_rows(sum_two, e.w, value, p.y);
    }
    finish(place, place.one, sum_one, total.x, most.x);
    if place.two != place.one {
        finish(place, place.two, sum_two, total.y, most.y);
    }
}

@compute @workgroup_size(WG)
fn attention_forward_blocks_8(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    forward(group_index(wid, nwg) * WG + tid);
}

@compute @workgroup_size(WG)
fn attention_forward_blocks_16(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    forward(group_index(wid, nwg) * WG + tid);
}

@compute @workgroup_size(WG)
fn attention_forward_blocks_32(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    forward(group_index(wid, nwg) * WG + tid);
}

// ---- backward, queries --------------------------------------------------------------------------------------------------

@group(0) @binding(4) var<storage, read> grad_out: array<f32>;
@group(0) @binding(5) var<storage, read> rows: array<f32>;
@group(0) @binding(6) var<storage, read_write> grad_q: array<f32>;

fn grad_row(at: u32) -> Row {
    var x = zero_row();
    x.a = vec4<f32>(grad_out[at + 0u], grad_out[at + 1u], grad_out[at + 2u], grad_out[at + 3u]);
    x.b = vec4<f32>(grad_out[at + 4u], grad_out[at + 5u], grad_out[at + 6u], grad_out[at + 7u]);
    if VECS > 2u {
        x.c = vec4<f32>(grad_out[at + 8u], grad_out[at + 9u], grad_out[at + 10u], grad_out[at + 11u]);
        x.d = vec4<f32>(grad_out[at + 12u], grad_out[at + 13u], grad_out[at + 14u], grad_out[at + 15u]);
    }
    if VECS > 4u {
        x.e = vec4<f32>(grad_out[at + 16u], grad_out[at + 17u], grad_out[at + 18u], grad_out[at + 19u]);
        x.f = vec4<f32>(grad_out[at + 20u], grad_out[at + 21u], grad_out[at + 22u], grad_out[at + 23u]);
        x.g = vec4<f32>(grad_out[at + 24u], grad_out[at + 25u], grad_out[at + 26u], grad_out[at + 27u]);
        x.h = vec4<f32>(grad_out[at + 28u], grad_out[at + 29u], grad_out[at + 30u], grad_out[at + 31u]);
    }
    return x;
}

fn put_grad_q(at: u32, x: Row) {
    grad_q[at + 0u] = x.a.x;
    grad_q[at + 1u] = x.a.y;
    grad_q[at + 2u] = x.a.z;
    grad_q[at + 3u] = x.a.w;
    grad_q[at + 4u] = x.b.x;
    grad_q[at + 5u] = x.b.y;
    grad_q[at + 6u] = x.b.z;
    grad_q[at + 7u] = x.b.w;
    if VECS > 2u {
        grad_q[at + 8u] = x.c.x;
        grad_q[at + 9u] = x.c.y;
        grad_q[at + 10u] = x.c.z;
        grad_q[at + 11u] = x.c.w;
        grad_q[at + 12u] = x.d.x;
        grad_q[at + 13u] = x.d.y;
        grad_q[at + 14u] = x.d.z;
        grad_q[at + 15u] = x.d.w;
    }
    if VECS > 4u {
        grad_q[at + 16u] = x.e.x;
        grad_q[at + 17u] = x.e.y;
        grad_q[at + 18u] = x.e.z;
        grad_q[at + 19u] = x.e.w;
        grad_q[at + 20u] = x.f.x;
        grad_q[at + 21u] = x.f.y;
        grad_q[at + 22u] = x.f.z;
        grad_q[at + 23u] = x.f.w;
        grad_q[at + 24u] = x.g.x;
        grad_q[at + 25u] = x.g.y;
        grad_q[at + 26u] = x.g.z;
        grad_q[at + 27u] = x.g.w;
        grad_q[at + 28u] = x.h.x;
        grad_q[at + 29u] = x.h.y;
        grad_q[at + 30u] = x.h.z;
        grad_q[at + 31u] = x.h.w;
    }
}

// (lse, delta) of a query.
fn pair_of(place: Place, i: u32) -> vec2<f32> {
    let at = place.b * params.record + HEADER + 2u * (place.h * params.queries + i);
    return vec2<f32>(rows[at], rows[at + 1u]);
}

fn backward_q(thread: u32) {
    let place = place_of(thread, params.queries);
    if !place.live {
        return;
    }
    let length = u32(rows[place.b * params.record]);
    let keys_one = keys_of(place.one, length);
    let keys_two = keys_of(place.two, length);
    let one = times(q_row(q_at(place, place.one)), params.scale);
    let two = times(q_row(q_at(place, place.two)), params.scale);
    let grad_one = grad_row(out_at(place, place.one));
    let grad_two = grad_row(out_at(place, place.two));
    let own_one = pair_of(place, place.one);
    let own_two = pair_of(place, place.two);
    var sum_one = zero_row();
    var sum_two = zero_row();
    let end = u32(max(keys_one.y, keys_two.y));
    for (var j = u32(min(keys_one.x, keys_two.x)); j < end; j++) {
        let key = k_row(k_at(place, j));
        let value = v_row(v_at(place, j));
        let allowed = vec2<bool>(inside(j, keys_one), inside(j, keys_two));
        let p = exp_of(vec4<f32>(dot_rows(one, key) - own_one.x, dot_rows(two, key) - own_two.x, 0.0, 0.0));
        let dp = vec2<f32>(dot_rows(grad_one, value) - own_one.y, dot_rows(grad_two, value) - own_two.y);
        let ds = select(vec2<f32>(0.0), p.xy * dp, allowed);
        sum_one = add_rows(sum_one, key, ds.x);
        sum_two = add_rows(sum_two, key, ds.y);
    }
    put_grad_q(q_at(place, place.one), times(sum_one, params.scale));
    if place.two != place.one {
        put_grad_q(q_at(place, place.two), times(sum_two, params.scale));
    }
}

@compute @workgroup_size(WG)
fn attention_backward_q_blocks_8(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    backward_q(group_index(wid, nwg) * WG + tid);
}

@compute @workgroup_size(WG)
fn attention_backward_q_blocks_16(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    backward_q(group_index(wid, nwg) * WG + tid);
}

@compute @workgroup_size(WG)
fn attention_backward_q_blocks_32(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    backward_q(group_index(wid, nwg) * WG + tid);
}

// ---- backward, keys and values --------------------------------------------------------------------------------------------

@group(0) @binding(6) var<storage, read_write> grad_k: array<f32>;
@group(0) @binding(7) var<storage, read_write> grad_v: array<f32>;
@group(0) @binding(6) var<storage, read_write> grad_kv: array<f32>;

fn put_grad_k(at: u32, x: Row) {
    grad_k[at + 0u] = x.a.x;
    grad_k[at + 1u] = x.a.y;
    grad_k[at + 2u] = x.a.z;
    grad_k[at + 3u] = x.a.w;
    grad_k[at + 4u] = x.b.x;
    grad_k[at + 5u] = x.b.y;
    grad_k[at + 6u] = x.b.z;
    grad_k[at + 7u] = x.b.w;
    if VECS > 2u {
        grad_k[at + 8u] = x.c.x;
        grad_k[at + 9u] = x.c.y;
        grad_k[at + 10u] = x.c.z;
        grad_k[at + 11u] = x.c.w;
        grad_k[at + 12u] = x.d.x;
        grad_k[at + 13u] = x.d.y;
        grad_k[at + 14u] = x.d.z;
        grad_k[at + 15u] = x.d.w;
    }
    if VECS > 4u {
        grad_k[at + 16u] = x.e.x;
        grad_k[at + 17u] = x.e.y;
        grad_k[at + 18u] = x.e.z;
        grad_k[at + 19u] = x.e.w;
        grad_k[at + 20u] = x.f.x;
        grad_k[at + 21u] = x.f.y;
        grad_k[at + 22u] = x.f.z;
        grad_k[at + 23u] = x.f.w;
        grad_k[at + 24u] = x.g.x;
        grad_k[at + 25u] = x.g.y;
        grad_k[at + 26u] = x.g.z;
        grad_k[at + 27u] = x.g.w;
        grad_k[at + 28u] = x.h.x;
        grad_k[at + 29u] = x.h.y;
        grad_k[at + 30u] = x.h.z;
        grad_k[at + 31u] = x.h.w;
    }
}

fn put_grad_v(at: u32, x: Row) {
    grad_v[at + 0u] = x.a.x;
    grad_v[at + 1u] = x.a.y;
    grad_v[at + 2u] = x.a.z;
    grad_v[at + 3u] = x.a.w;
    grad_v[at + 4u] = x.b.x;
    grad_v[at + 5u] = x.b.y;
    grad_v[at + 6u] = x.b.z;
    grad_v[at + 7u] = x.b.w;
    if VECS > 2u {
        grad_v[at + 8u] = x.c.x;
        grad_v[at + 9u] = x.c.y;
        grad_v[at + 10u] = x.c.z;
        grad_v[at + 11u] = x.c.w;
        grad_v[at + 12u] = x.d.x;
        grad_v[at + 13u] = x.d.y;
        grad_v[at + 14u] = x.d.z;
        grad_v[at + 15u] = x.d.w;
    }
    if VECS > 4u {
        grad_v[at + 16u] = x.e.x;
        grad_v[at + 17u] = x.e.y;
        grad_v[at + 18u] = x.e.z;
        grad_v[at + 19u] = x.e.w;
        grad_v[at + 20u] = x.f.x;
        grad_v[at + 21u] = x.f.y;
        grad_v[at + 22u] = x.f.z;
        grad_v[at + 23u] = x.f.w;
        grad_v[at + 24u] = x.g.x;
        grad_v[at + 25u] = x.g.y;
        grad_v[at + 26u] = x.g.z;
        grad_v[at + 27u] = x.g.w;
        grad_v[at + 28u] = x.h.x;
        grad_v[at + 29u] = x.h.y;
        grad_v[at + 30u] = x.h.z;
        grad_v[at + 31u] = x.h.w;
    }
}

fn put_grad_kv(at: u32, x: Row) {
    grad_kv[at + 0u] = x.a.x;
    grad_kv[at + 1u] = x.a.y;
    grad_kv[at + 2u] = x.a.z;
    grad_kv[at + 3u] = x.a.w;
    grad_kv[at + 4u] = x.b.x;
    grad_kv[at + 5u] = x.b.y;
    grad_kv[at + 6u] = x.b.z;
    grad_kv[at + 7u] = x.b.w;
    if VECS > 2u {
        grad_kv[at + 8u] = x.c.x;
        grad_kv[at + 9u] = x.c.y;
        grad_kv[at + 10u] = x.c.z;
        grad_kv[at + 11u] = x.c.w;
        grad_kv[at + 12u] = x.d.x;
        grad_kv[at + 13u] = x.d.y;
        grad_kv[at + 14u] = x.d.z;
        grad_kv[at + 15u] = x.d.w;
    }
    if VECS > 4u {
        grad_kv[at + 16u] = x.e.x;
        grad_kv[at + 17u] = x.e.y;
        grad_kv[at + 18u] = x.e.z;
        grad_kv[at + 19u] = x.e.w;
        grad_kv[at + 20u] = x.f.x;
        grad_kv[at + 21u] = x.f.y;
        grad_kv[at + 22u] = x.f.z;
        grad_kv[at + 23u] = x.f.w;
        grad_kv[at + 24u] = x.g.x;
        grad_kv[at + 25u] = x.g.y;
        grad_kv[at + 26u] = x.g.z;
        grad_kv[at + 27u] = x.g.w;
        grad_kv[at + 28u] = x.h.x;
        grad_kv[at + 29u] = x.h.y;
        grad_kv[at + 30u] = x.h.z;
        grad_kv[at + 31u] = x.h.w;
    }
}

struct KeyGradients {
    key_one: Row,
    key_two: Row,
    value_one: Row,
    value_two: Row,
}

fn backward_kv(place: Place) -> KeyGradients {
    let length = u32(rows[place.b * params.record]);
    let queries_one = queries_of(place.one, length);
    let queries_two = queries_of(place.two, length);
    var sums = KeyGradients(zero_row(), zero_row(), zero_row(), zero_row());
    // Padding is never read.
    let one = min(place.one, max(length, 1u) - 1u);
    let two = min(place.two, max(length, 1u) - 1u);
    let key_one = k_row(k_at(place, one));
    let key_two = k_row(k_at(place, two));
    let value_one = v_row(v_at(place, one));
    let value_two = v_row(v_at(place, two));
    let end = u32(max(queries_one.y, queries_two.y));
    var first = queries_one.x;
    if queries_two.x < queries_two.y {
        first = min(first, queries_two.x);
    }
    for (var i = u32(first); i < end; i++) {
        let query = times(q_row(q_at(place, i)), params.scale);
        let grad = grad_row(out_at(place, i));
        let own = pair_of(place, i);
        let allowed = vec2<bool>(inside(i, queries_one), inside(i, queries_two));
        let e = exp_of(vec4<f32>(dot_rows(key_one, query) - own.x, dot_rows(key_two, query) - own.x, 0.0, 0.0));
        let p = select(vec2<f32>(0.0), e.xy, allowed);
        let dp = vec2<f32>(dot_rows(value_one, grad), dot_rows(value_two, grad));
        let ds = select(vec2<f32>(0.0), e.xy * (dp - own.y), allowed);
        sums.key_one = add_rows(sums.key_one, query, ds.x);
        sums.key_two = add_rows(sums.key_two, query, ds.y);
        sums.value_one = add_rows(sums.value_one, grad, p.x);
        sums.value_two = add_rows(sums.value_two, grad, p.y);
    }
    return sums;
}

fn backward_kv_apart(thread: u32) {
    let place = place_of(thread, params.keys);
    if !place.live {
        return;
    }
    let sums = backward_kv(place);
    put_grad_k(k_at(place, place.one), sums.key_one);
    put_grad_v(v_at(place, place.one), sums.value_one);
    if place.two != place.one {
        put_grad_k(k_at(place, place.two), sums.key_two);
        put_grad_v(v_at(place, place.two), sums.value_two);
    }
}

fn backward_kv_packed(thread: u32) {
    let place = place_of(thread, params.keys);
    if !place.live {
        return;
    }
    let sums = backward_kv(place);
    if has(GRAD_K) {
        put_grad_kv(k_at(place, place.one), sums.key_one);
        if place.two != place.one {
            put_grad_kv(k_at(place, place.two), sums.key_two);
        }
    }
    if has(GRAD_V) {
        put_grad_kv(v_at(place, place.one), sums.value_one);
        if place.two != place.one {
            put_grad_kv(v_at(place, place.two), sums.value_two);
        }
    }
}

@compute @workgroup_size(WG)
fn attention_backward_kv_blocks_8(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    backward_kv_apart(group_index(wid, nwg) * WG + tid);
}

@compute @workgroup_size(WG)
fn attention_backward_kv_blocks_16(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    backward_kv_apart(group_index(wid, nwg) * WG + tid);
}

@compute @workgroup_size(WG)
fn attention_backward_kv_blocks_32(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    backward_kv_apart(group_index(wid, nwg) * WG + tid);
}

@compute @workgroup_size(WG)
fn attention_backward_kv_packed_blocks_8(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    backward_kv_packed(group_index(wid, nwg) * WG + tid);
}

@compute @workgroup_size(WG)
fn attention_backward_kv_packed_blocks_16(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    backward_kv_packed(group_index(wid, nwg) * WG + tid);
}

@compute @workgroup_size(WG)
fn attention_backward_kv_packed_blocks_32(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    backward_kv_packed(group_index(wid, nwg) * WG + tid);
}
