// grad_x and the weights' gradients on software adapters, where an invocation is a lane of the processor's vector: a load is a loop over
// the lanes that costs ten multiply-adds, a shader with barriers in its loops keeps every variable in memory, and compile time grows with
// the square of the loads. So: 8 × 8 of a product in registers, loads of four neighbours, no workgroup memory.
// Maths, shapes and source: kernels/recurrent.rs. H a multiple of 4, I at least 4.
//   recurrent_gradients_blocks   grid blocks of grad_x, of grad w_ih, of grad w_hh and the bias   thread = 8 × 8 of a product

struct RecurrentParams {
    models: u32,
    batch: u32,
    rows: u32,
    row0: u32,
    time: u32,
    inputs: u32,
    hidden: u32,
    from_step: u32,
    to_step: u32,
    y_stride: u32,
    y_offset: u32,
    slices: u32,
    slice0: u32,
    slice_count: u32,
    slice_rows: u32,
    time_parts: u32,
    flags: u32,
}

@group(0) @binding(0) var<uniform> params: RecurrentParams;

override WG: u32 = 8u;

const GRU: u32 = 1u;
const GATES: u32 = 2u;
const LENGTHS: u32 = 8u;
const X_SHARED: u32 = 512u;
const GRAD_X: u32 = 4096u;
const GRAD_W: u32 = 32768u;

fn has(bit: u32) -> bool {
    return (params.flags & bit) != 0u;
}

// Reals kept per step, and where h(t−1) begins in them.
fn kept_h() -> u32 {
    return select(0u, 4u * params.hidden, has(GATES));
}

fn width() -> u32 {
    return kept_h() + select(2u, 1u, has(GRU)) * params.hidden;
}

// Rows of w_ih and w_hh.
fn gate_rows() -> u32 {
    return select(4u, 3u, has(GRU)) * params.hidden;
}

// ---- products ---------------------------------------------------------------------------------------------------

@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read> saved: array<f32>;
@group(0) @binding(3) var<storage, read> lengths: array<u32>;
@group(0) @binding(4) var<storage, read> w_ih: array<f32>;
@group(0) @binding(5) var<storage, read> gates: array<f32>;
@group(0) @binding(6) var<storage, read_write> grad_x: array<f32>;
@group(0) @binding(7) var<storage, read_write> sums: array<f32>;

fn x_quad(at: u32) -> vec4<f32> {
    return vec4<f32>(x[at], x[at + 1u], x[at + 2u], x[at + 3u]);
}

fn saved_quad(at: u32) -> vec4<f32> {
    return vec4<f32>(saved[at], saved[at + 1u], saved[at + 2u], saved[at + 3u]);
}

fn w_ih_quad(at: u32) -> vec4<f32> {
    return vec4<f32>(w_ih[at], w_ih[at + 1u], w_ih[at + 2u], w_ih[at + 3u]);
}

fn delta_quad(at: u32) -> vec4<f32> {
    return vec4<f32>(gates[at], gates[at + 1u], gates[at + 2u], gates[at + 3u]);
}

// Eight columns of a product as two quads: where each begins, so that it lies inside `columns` ≥ 4, and from which column on it counts.
fn quads_of(k: u32, columns: u32) -> vec2<u32> {
    return min(vec2<u32>(k, k + 4u), vec2<u32>(columns - 4u));
}

// A quad of columns of eight rows of a product.
struct Eight {
    a: vec4<f32>,
    b: vec4<f32>,
    c: vec4<f32>,
    d: vec4<f32>,
    e: vec4<f32>,
    f: vec4<f32>,
    g: vec4<f32>,
    h: vec4<f32>,
}

fn zero_eight() -> Eight {
    let z = vec4<f32>(0.0);
    return Eight(z, z, z, z, z, z, z, z);
}

// Adds a step to eight rows of a product: the first quad of their columns, or the second.
fn outer(x: Eight, left_lo: vec4<f32>, left_hi: vec4<f32>, right: vec4<f32>) -> Eight {
    return Eight(x.a + left_lo.x * right, x.b + left_lo.y * right, x.c + left_lo.z * right, x.d + left_lo.w * right, x.e + left_hi.x * right, x.f + left_hi.y * right, x.g + left_hi.z * right, x.h + left_hi.w * right);
}

fn row_of(x: Eight, r: u32) -> vec4<f32> {
    switch r {
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

fn grad_x_block(item: u32) {
    let own = params.rows / params.models;
    let steps = own * params.time;
    let columns = params.inputs;
    let across = (columns + 7u) / 8u;
    let down = (steps + 7u) / 8u;
    let model = item / (across * down);
    if model >= params.models {
        return;
    }
    let first = 8u * (item / across % down);
    let k = 8u * (item % across);
    let quad = quads_of(k, columns);
    let row = (model * steps + min(vec4<u32>(first) + vec4<u32>(0u, 1u, 2u, 3u), vec4<u32>(steps - 1u))) * 4u * params.hidden;
    let row_hi = (model * steps + min(vec4<u32>(first) + vec4<u32>(4u, 5u, 6u, 7u), vec4<u32>(steps - 1u))) * 4u * params.hidden;
    let weights = model * gate_rows() * columns;
    var left = zero_eight();
    var right = zero_eight();
    for (var c = 0u; c < gate_rows(); c += 4u) {
        let lo = transpose(mat4x4<f32>(delta_quad(row.x + c), delta_quad(row.y + c), delta_quad(row.z + c), delta_quad(row.w + c)));
        let hi = transpose(mat4x4<f32>(delta_quad(row_hi.x + c), delta_quad(row_hi.y + c), delta_quad(row_hi.z + c), delta_quad(row_hi.w + c)));
        let w = weights + c * columns;
        left = outer(left, lo[0], hi[0], w_ih_quad(w + quad.x));
        right = outer(right, lo[0], hi[0], w_ih_quad(w + quad.y));
        left = outer(left, lo[1], hi[1], w_ih_quad(w + columns + quad.x));
        right = outer(right, lo[1], hi[1], w_ih_quad(w + columns + quad.y));
        left = outer(left, lo[2], hi[2], w_ih_quad(w + 2u * columns + quad.x));
        right = outer(right, lo[2], hi[2], w_ih_quad(w + 2u * columns + quad.y));
        left = outer(left, lo[3], hi[3], w_ih_quad(w + 3u * columns + quad.x));
        right = outer(right, lo[3], hi[3], w_ih_quad(w + 3u * columns + quad.y));
    }
    for (var r = 0u; r < min(8u, steps - first); r++) {
        let at = (model * steps + first + r) * columns;
        let a = row_of(left, r);
        let b = row_of(right, r);
        for (var e = 0u; e < 4u; e++) {
            if quad.x + e >= k {
                grad_x[at + quad.x + e] = a[e];
            }
            if quad.y + e >= k + 4u {
                grad_x[at + quad.y + e] = b[e];
            }
        }
    }
}

// Writes the gradient of the weight of input k (x, h, 1) in column c of the four gates.
fn put_weight(slice: u32, model: u32, c: u32, k: u32, v: f32) {
    let h = params.hidden;
    let n = params.inputs;
    let rows = gate_rows();
    let gru = has(GRU);
    let gate = c / h;
    let each = params.models * rows * (n + h + select(1u, 2u, gru));
    let base = params.models * h * (4u * params.batch + 2u) + slice * each;
    let input_row = model * rows + c;
    let hidden_row = input_row - select(0u, h, gru && gate == 3u);
    let no_input = gru && gate == 3u;
    let no_hidden = gru && gate == 2u;
    if k < n {
        if !no_input {
            sums[base + input_row * n + k] = v;
        }
    } else if k < n + h {
        if !no_hidden {
            sums[base + params.models * rows * n + hidden_row * h + k - n] = v;
        }
    } else {
        let biases = base + params.models * rows * (n + h);
        if !no_input {
            sums[biases + input_row] = v;
        }
        if gru && !no_hidden {
            sums[biases + params.models * rows + hidden_row] = v;
        }
    }
}

// Eight columns of the gates × eight inputs, of x or of h, over the steps of a slice; with those of h's first block the bias.
fn weight_block(item: u32, of_x: bool) {
    let own = params.rows / params.models;
    let t = params.time;
    let rows = 4u * params.hidden;
    let columns = select(params.hidden, params.inputs, of_x);
    let across = (columns + 7u) / 8u;
    let down = rows / 8u;
    let slice = params.slice0 + item / (across * down) % params.slice_count;
    let model = item / (across * down * params.slice_count);
    if model >= params.models {
        return;
    }
    let c = 8u * (item / across % down);
    let k = 8u * (item % across);
    let quad = quads_of(k, columns);
    // steps of the slice, counted over the model's B·T
    var first = slice * params.slice_rows * t;
    var last = first + params.slice_rows * t;
    if params.time_parts > 1u {
        let part = (t + params.time_parts - 1u) / params.time_parts;
        let p = slice % params.time_parts;
        first = slice / params.time_parts * t + min(p * part, t);
        last = slice / params.time_parts * t + min((p + 1u) * part, t);
    }
    last = min(last, params.batch * t);
    var left = zero_eight();
    var right = zero_eight();
    var bias_lo = vec4<f32>(0.0);
    var bias_hi = vec4<f32>(0.0);
    for (var b = first / t; b * t < last; b++) {
        let q = model * own + b - params.row0;
        var end = min(last - b * t, t);
        if has(LENGTHS) {
            end = min(end, lengths[b]);
        }
        let from_row = max(first, b * t) - b * t;
        var delta = (q * t + from_row) * rows + c;
        var input = (q * t + from_row) * width() + kept_h();
        var stride = width();
        if of_x {
            input = (select(q, b, has(X_SHARED)) * t + from_row) * columns;
            stride = columns;
        }
        for (var s = from_row; s < end; s++) {
            let lo = delta_quad(delta);
            let hi = delta_quad(delta + 4u);
            var x0: vec4<f32>;
            var x1: vec4<f32>;
            if of_x {
                x0 = x_quad(input + quad.x);
                x1 = x_quad(input + quad.y);
            } else {
                x0 = saved_quad(input + quad.x);
                x1 = saved_quad(input + quad.y);
                bias_lo += lo;
                bias_hi += hi;
            }
            left = outer(left, lo, hi, x0);
            right = outer(right, lo, hi, x1);
            delta += rows;
            input += stride;
        }
    }
    let offset = select(params.inputs, 0u, of_x);
    for (var r = 0u; r < 8u; r++) {
        let a = row_of(left, r);
        let b = row_of(right, r);
        for (var e = 0u; e < 4u; e++) {
            if quad.x + e >= k {
                put_weight(slice, model, c + r, offset + quad.x + e, a[e]);
            }
            if quad.y + e >= k + 4u {
                put_weight(slice, model, c + r, offset + quad.y + e, b[e]);
            }
        }
        if !of_x && k == 0u {
            put_weight(slice, model, c + r, params.inputs + params.hidden, select(bias_hi, bias_lo, r < 4u)[r % 4u]);
        }
    }
}

@compute @workgroup_size(WG)
fn recurrent_gradients_blocks(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let steps = params.rows / params.models * params.time;
    let group = group_index(wid, nwg);
    let x_blocks = (params.inputs + 7u) / 8u;
    let h_blocks = (params.hidden + 7u) / 8u;
    let slices = params.models * params.slice_count * params.hidden / 2u;
    let x_groups = select(0u, (params.models * ((steps + 7u) / 8u) * x_blocks + WG - 1u) / WG, has(GRAD_X));
    let w_groups = select(0u, (slices * x_blocks + WG - 1u) / WG, has(GRAD_W));
    let h_groups = select(0u, (slices * h_blocks + WG - 1u) / WG, has(GRAD_W));
    if group < x_groups {
        grad_x_block(group * WG + tid);
    } else if group < x_groups + w_groups {
        weight_block((group - x_groups) * WG + tid, true);
    } else if group < x_groups + w_groups + h_groups {
        weight_block((group - x_groups - w_groups) * WG + tid, false);
    }
}
