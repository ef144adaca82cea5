"""Neural layers against PyTorch and JAX: forback's standard shapes of LSTM and attention, forward and training, and a whole training step of
1,024 small LSTM models with different weights. Called by peers.py, with what it gives: `args`, `verified`.

LSTM, attention: torch.nn.LSTM and scaled_dot_product_attention, f32. A peer's outputs and gradients are checked by `forback verify` at a
smaller shape; timed is the step at the standard one. Training is forward and backward to the weights (LSTM) or to q, k, v (attention) of a
given gradient of the output. Rates count the same flops for both: LSTM 2·B·T·4H·(I+H), attention 4·B·NH·T²·D; training 3 and 3.5 times.
models_train: squared error of a linear head at the last step, backward, AdamW. torch runs 64 of the models, one nn.LSTM after the other, as
its vmap does not take nn.LSTM; JAX runs all, jit and vmap over lax.scan. Both are compared: one model's forward, by `forback verify`, and
the models' gradients with each other.
"""

import numpy as np

LSTM_SHAPES = [(64, 63, 30, 64), (512, 63, 30, 32), (64, 252, 30, 128)]
ATTENTION_SHAPES = [(64, 4, 63, 16), (16, 8, 512, 32), (4, 4, 2048, 16)]
# M, B, T, I, H
MODELS = (1024, 8, 32, 8, 16)
TORCH_MODELS = 64


def normals(*shape, scale=1.0, seed=0):
    return np.float32(np.random.default_rng([seed, *shape]).normal(0.0, scale, shape))


# ---- LSTM -------------------------------------------------------------------------------------------------------


def torch_lstm(shape, threads, train):
    """A step of nn.LSTM; its arrays, and what to run."""
    import torch

    torch.set_num_threads(threads)
    b, t, i, h = shape
    layer = torch.nn.LSTM(i, h, batch_first=True)
    with torch.no_grad():
        for k, p in enumerate(layer.parameters()):
            p.copy_(torch.from_numpy(normals(*p.shape, scale=h**-0.5, seed=k)))
        layer.bias_hh_l0.zero_()
    x, grad = torch.from_numpy(normals(b, t, i, seed=7)), torch.from_numpy(normals(b, t, h, seed=8))

    def forward():
        with torch.no_grad():
            return layer(x)[0]

    def step():
        layer.zero_grad(set_to_none=True)
        y = layer(x)[0]
        y.backward(grad)
        return y

    return layer, x, grad, step if train else forward


def compare_lstm(verified, folder, train):
    b, t, i, h = 5, 19, 6, 12
    layer, x, grad, step = torch_lstm((b, t, i, h), 1, True)
    y = step().detach().numpy()
    w = [layer.weight_ih_l0, layer.weight_hh_l0, layer.bias_ih_l0]
    inputs = {"x": x.numpy()[None], "w_ih": w[0].detach().numpy()[None], "w_hh": w[1].detach().numpy()[None], "bias": w[2].detach().numpy()[None]}
    outputs = {"y": y[None]}
    if train:
        inputs["grad_y"] = grad.numpy()[None]
        outputs |= {f"grad_{name}": p.grad.numpy()[None] for name, p in zip(["w_ih", "w_hh", "bias"], w)}
    return verified(folder, "lstm", {}, inputs, outputs, 1e-4, 1e-4)


# ---- attention --------------------------------------------------------------------------------------------------


def torch_attention(shape, threads, train):
    import torch

    torch.set_num_threads(threads)
    attend = torch.nn.functional.scaled_dot_product_attention
    q, k, v = (torch.from_numpy(normals(*shape, seed=s)).requires_grad_(train) for s in range(3))
    grad = torch.from_numpy(normals(*shape, seed=3))

    def forward():
        with torch.no_grad():
            return attend(q, k, v)

    def step():
        q.grad = k.grad = v.grad = None
        out = attend(q, k, v)
        out.backward(grad)
        return out

    return q, k, v, grad, step if train else forward


def compare_attention(verified, folder, train):
    q, k, v, grad, step = torch_attention((3, 2, 37, 16), 1, True)
    out = step().detach().numpy()
    inputs = {name: x.detach().numpy() for name, x in [("q", q), ("k", k), ("v", v)]}
    outputs = {"out": out}
    if train:
        inputs["grad_out"] = grad.numpy()
        outputs |= {"grad_q": q.grad.numpy(), "grad_k": k.grad.numpy(), "grad_v": v.grad.numpy()}
    return verified(folder, "attention", {}, inputs, outputs, 1e-4, 1e-4)


# ---- many models ------------------------------------------------------------------------------------------------


def many_weights(m):
    _, _, _, i, h = MODELS
    draw = lambda k, *shape: normals(m, *shape, scale=h**-0.5, seed=20 + k)
    return {"w_ih": draw(0, 4 * h, i), "w_hh": draw(1, 4 * h, h), "bias": draw(2, 4 * h), "head": draw(3, h), "offset": draw(4)}


def many_data():
    _, b, t, i, _ = MODELS
    return normals(b, t, i, seed=30), normals(b, seed=31)


def jax_models(m):
    """One training step of m models, jit and vmap over lax.scan; gradients of the first too."""
    import jax
    import jax.numpy as jnp

    _, b, _, _, h = MODELS
    x, target = (jnp.asarray(a) for a in many_data())

    def states(w):
        inputs = jnp.einsum("bti,gi->tbg", x, w["w_ih"]) + w["bias"]

        def cell(state, a):
            last, c = state
            i, f, g, o = jnp.split(a + last @ w["w_hh"].T, 4, axis=-1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            y = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (y, c), y

        zero = jnp.zeros((b, h), jnp.float32)
        return jax.lax.scan(cell, (zero, zero), inputs)[1]

    def loss(w):
        return jnp.mean((states(w)[-1] @ w["head"] + w["offset"] - target) ** 2)

    def adamw(w, grad, m1, m2, count):
        m1, m2 = 0.9 * m1 + 0.1 * grad, 0.999 * m2 + 0.001 * grad * grad
        step = (m1 / (1 - 0.9**count)) / (jnp.sqrt(m2 / (1 - 0.999**count)) + 1e-8)
        return w - 1e-3 * (step + 0.01 * w), m1, m2

    def train(w, m1, m2, count):
        value, grad = jax.value_and_grad(loss)(w)
        moved = jax.tree.map(lambda *leaves: adamw(*leaves, count), w, grad, m1, m2)
        pick = lambda k: {name: moved[name][k] for name in w}
        return pick(0), pick(1), pick(2), value

    weights = {name: jnp.asarray(w) for name, w in many_weights(m).items()}
    zeros = {name: jnp.zeros_like(w) for name, w in weights.items()}
    step = jax.jit(jax.vmap(train, in_axes=(0, 0, 0, None)))
    state = [weights, zeros, zeros, 1.0]

    def run():
        w, m1, m2, value = step(*state)
        value.block_until_ready()
        state[:] = [w, m1, m2, state[3] + 1.0]
        return value

    grads = jax.jit(jax.vmap(jax.grad(loss)))
    return run, lambda: {name: np.asarray(g) for name, g in grads(weights).items()}, lambda k: np.asarray(states({n: w[k] for n, w in weights.items()}))


def torch_models(count, threads):
    """The same step of a loop over models; gradients of all."""
    import torch

    torch.set_num_threads(threads)
    _, _, _, i, h = MODELS
    x, target = (torch.from_numpy(a) for a in many_data())
    weights, models = many_weights(count), []
    for k in range(count):
        lstm, head = torch.nn.LSTM(i, h, batch_first=True), torch.nn.Linear(h, 1)
        with torch.no_grad():
            for p, name in [(lstm.weight_ih_l0, "w_ih"), (lstm.weight_hh_l0, "w_hh"), (lstm.bias_ih_l0, "bias"), (head.weight[0], "head"), (head.bias[0], "offset")]:
                p.copy_(torch.tensor(weights[name][k]))
            lstm.bias_hh_l0.zero_()
        models.append((lstm, head, torch.optim.AdamW([*lstm.parameters(), *head.parameters()], lr=1e-3)))

    def run(move=True):
        for lstm, head, optimiser in models:
            optimiser.zero_grad()
            torch.nn.functional.mse_loss(head(lstm(x)[0][:, -1])[:, 0], target).backward()
            if move:
                optimiser.step()

    def grads():
        run(move=False)
        of = {"w_ih": lambda l, o: l.weight_ih_l0.grad, "w_hh": lambda l, o: l.weight_hh_l0.grad, "bias": lambda l, o: l.bias_ih_l0.grad}
        of |= {"head": lambda l, o: o.weight.grad[0], "offset": lambda l, o: o.bias.grad[0]}
        return {name: np.array([f(l, o).numpy() for l, o, _ in models]) for name, f in of.items()}

    return run, grads


def compare_models(verified, folder):
    """Model 0's states in forback against JAX; then the gradients of eight models, JAX against torch."""
    _, jax_grads, states = jax_models(8)
    weights, (x, _) = many_weights(8), many_data()
    inputs = {"x": x[None]} | {name: weights[name][:1] for name in ["w_ih", "w_hh", "bias"]}
    compared, good = verified(folder, "lstm", {}, inputs, {"y": states(0).transpose(1, 0, 2)[None]}, 1e-5, 1e-5)
    _, torch_grads = torch_models(8, 1)
    ours, theirs = jax_grads(), torch_grads()
    worst = max(float(np.abs(ours[name] - theirs[name]).max() / np.abs(theirs[name]).max()) for name in ours)
    return compared | {"jax_against_torch": worst}, good and worst < 1e-4


# ---- rows -------------------------------------------------------------------------------------------------------


def rows(verified, threads):
    """workload, peer, shape, comparison, preparation: what peers.py runs, times and writes."""
    out = []
    for train in (False, True):
        tail, factor = ("_train", 3.0) if train else ("", 1.0)
        for b, t, i, h in LSTM_SHAPES:
            work = factor * 2 * b * t * 4 * h * (i + h)
            prepare = lambda shape=(b, t, i, h), train=train, work=work: (torch_lstm(shape, threads, train)[-1], work)
            out.append(("lstm" + tail, "torch", [b, t, i, h], lambda folder, train=train: compare_lstm(verified, folder, train), prepare))
        factor = 3.5 if train else 1.0
        for b, n, t, d in ATTENTION_SHAPES:
            work = factor * 4 * b * n * t * t * d
            prepare = lambda shape=(b, n, t, d), train=train, work=work: (torch_attention(shape, threads, train)[-1], work)
            out.append(("attention" + tail, "torch", [b, n, t, d], lambda folder, train=train: compare_attention(verified, folder, train), prepare))
    models = lambda folder: compare_models(verified, folder)
    out.append(("models_train", "torch", list(MODELS), models, lambda: (torch_models(TORCH_MODELS, threads)[0], TORCH_MODELS)))
    out.append(("models_train", "jax", list(MODELS), models, lambda: (jax_models(MODELS[0])[0], MODELS[0])))
    return out
