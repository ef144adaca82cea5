//! The same steps on the host in f64, one loop after the other: what burn's outputs and gradients are compared with.
//! The gradient of the output is ones everywhere.

/// Outputs and gradients by name.
pub type Values = Vec<(&'static str, Vec<f64>)>;

/// Normals [n] times `scale`, the same for the same seed: SplitMix64 and Box-Muller.
pub fn normals(n: usize, seed: u64, scale: f64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0xD134_2543_DE82_EF95);
    let mut uniform = || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (((z ^ (z >> 31)) >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    };
    (0..n).map(|_| (scale * (-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos()) as f32).collect()
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// sum += a · w, `w` a row.
fn axpy(sum: &mut [f64], a: f64, w: &[f64]) {
    for (s, w) in sum.iter_mut().zip(w) {
        *s += a * w;
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn f64s(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

/// x [B,T,I], w_ih [4H,I], w_hh [4H,H], bias [4H], gates in the order i, f, g, o: y [B,T,H] and the gradients of the weights.
pub fn lstm([b, t, i, h]: [usize; 4], x: &[f32], w_ih: &[f32], w_hh: &[f32], bias: &[f32]) -> Values {
    let (x, w_ih, w_hh, bias) = (f64s(x), f64s(w_ih), f64s(w_hh), f64s(bias));
    let mut y = vec![0.0; b * t * h];
    let (mut g_ih, mut g_hh, mut g_bias) = (vec![0.0; 4 * h * i], vec![0.0; 4 * h * h], vec![0.0; 4 * h]);
    let zero = vec![0.0; h];
    for sequence in 0..b {
        let mut gates = vec![0.0; t * 4 * h];
        let mut cells = vec![0.0; (t + 1) * h];
        let input = |s: usize| &x[(sequence * t + s) * i..][..i];
        for s in 0..t {
            let before = if s == 0 { zero.clone() } else { y[(sequence * t + s - 1) * h..][..h].to_vec() };
            let of = |row: usize| bias[row] + dot(&w_ih[row * i..][..i], input(s)) + dot(&w_hh[row * h..][..h], &before);
            for k in 0..h {
                let (a, f, g, o) = (sigmoid(of(k)), sigmoid(of(h + k)), of(2 * h + k).tanh(), sigmoid(of(3 * h + k)));
                for (gate, value) in [a, f, g, o].into_iter().enumerate() {
                    gates[(s * 4 + gate) * h + k] = value;
                }
                let cell = f * cells[s * h + k] + a * g;
                cells[(s + 1) * h + k] = cell;
                y[(sequence * t + s) * h + k] = o * cell.tanh();
            }
        }
        let (mut d_y, mut d_c) = (vec![0.0; h], vec![0.0; h]);
        for s in (0..t).rev() {
            let mut d = vec![0.0; 4 * h];
            for k in 0..h {
                let [a, f, g, o] = [0, 1, 2, 3].map(|gate| gates[(s * 4 + gate) * h + k]);
                let (before, tanh) = (cells[s * h + k], cells[(s + 1) * h + k].tanh());
                let grad = 1.0 + d_y[k];
                let cell = d_c[k] + grad * o * (1.0 - tanh * tanh);
                d[k] = cell * g * a * (1.0 - a);
                d[h + k] = cell * before * f * (1.0 - f);
                d[2 * h + k] = cell * a * (1.0 - g * g);
                d[3 * h + k] = grad * tanh * o * (1.0 - o);
                d_c[k] = cell * f;
            }
            d_y.fill(0.0);
            let before = if s == 0 { &zero[..] } else { &y[(sequence * t + s - 1) * h..][..h] };
            for (row, &d) in d.iter().enumerate() {
                g_bias[row] += d;
                axpy(&mut g_ih[row * i..][..i], d, input(s));
                axpy(&mut g_hh[row * h..][..h], d, before);
                axpy(&mut d_y, d, &w_hh[row * h..][..h]);
            }
        }
    }
    vec![("y", y), ("grad_w_ih", g_ih), ("grad_w_hh", g_hh), ("grad_bias", g_bias)]
}

/// q, k, v [B,NH,T,D]: softmax(q·kᵀ/√D)·v and the gradients of all three.
pub fn attention([b, heads, t, d]: [usize; 4], q: &[f32], k: &[f32], v: &[f32]) -> Values {
    let (q, k, v) = (f64s(q), f64s(k), f64s(v));
    let scale = 1.0 / (d as f64).sqrt();
    let (mut out, mut g_q, mut g_k, mut g_v) = (vec![0.0; q.len()], vec![0.0; q.len()], vec![0.0; q.len()], vec![0.0; q.len()]);
    let ones = vec![1.0; d];
    for head in 0..b * heads {
        let at = |step: usize| (head * t + step) * d..(head * t + step + 1) * d;
        for s in 0..t {
            let scores: Vec<f64> = (0..t).map(|j| scale * dot(&q[at(s)], &k[at(j)])).collect();
            let top = scores.iter().copied().fold(f64::MIN, f64::max);
            let weights: Vec<f64> = scores.iter().map(|x| (x - top).exp()).collect();
            let sum: f64 = weights.iter().sum();
            for (j, w) in weights.iter().enumerate() {
                axpy(&mut out[at(s)], w / sum, &v[at(j)]);
            }
            let mean: f64 = out[at(s)].iter().sum();
            for (j, w) in weights.iter().enumerate() {
                let p = w / sum;
                axpy(&mut g_v[at(j)], p, &ones);
                let grad = scale * p * (dot(&ones, &v[at(j)]) - mean);
                axpy(&mut g_q[at(s)], grad, &k[at(j)]);
                axpy(&mut g_k[at(j)], grad, &q[at(s)]);
            }
        }
    }
    vec![("out", out), ("grad_q", g_q), ("grad_k", g_k), ("grad_v", g_v)]
}
