"""Delta hedging against vectorised PyTorch and pfhedge: short a call at the money for a year of 252 steps, volatility 20 %, delta every step at
1 bp one way; mean, deviation and CVaR 5 % of the profit and loss. Called by peers.py, with what it gives: `verified`.

Outputs: a peer's own paths and what it makes of them are checked path by path by `forback verify` (op hedge_paths). The workload's figures,
over forback's own paths, are compared with the peer's within four standard errors of both.
Timed: PyTorch keeps the holding and the profit and loss of all paths and draws a step at a time, as `ratio.py` does; pfhedge's Hedger stores
every path, and runs fewer. A rate is path-steps a second.
"""

import math

STEPS, SIGMA, COST, SPOT = 252, 0.2, 1e-4, 100.0
SHAPE = [1_000_000, STEPS]
PATHS, PFHEDGE_PATHS = 100_000, 10_000


def normal(x):
    return 0.5 * math.erfc(-x / math.sqrt(2.0))


# Black-Scholes at the money without a rate.
PREMIUM = SPOT * (normal(SIGMA / 2) - normal(-SIGMA / 2))


def torch_paths(paths):
    """Spot [P,T+1]."""
    import torch

    z = torch.randn(paths, STEPS)
    log = torch.cumsum(-0.5 * SIGMA**2 / STEPS + SIGMA / math.sqrt(STEPS) * z, 1)
    return SPOT * torch.cat([torch.ones(paths, 1), torch.exp(log)], 1)


def torch_hedge(paths, spots=None):
    """Profit and loss without the premium, and costs."""
    import torch

    dt = 1.0 / STEPS
    with torch.no_grad():
        spot = torch.full((paths,), SPOT)
        pnl, cost, held = torch.zeros(paths), torch.zeros(paths), torch.zeros(paths)
        for t in range(STEPS):
            tau = (STEPS - t) * dt
            delta = torch.special.ndtr((torch.log(spot / SPOT) + 0.5 * SIGMA**2 * tau) / (SIGMA * math.sqrt(tau)))
            paid = (delta - held).abs() * spot * COST
            pnl -= paid
            held = delta
            after = spot * torch.exp(-0.5 * SIGMA**2 * dt + SIGMA * math.sqrt(dt) * torch.randn(paths)) if spots is None else spots[:, t + 1]
            pnl += held * (after - spot)
            spot = after
            if spots is not None:
                cost += paid
        return pnl - torch.clamp(spot - SPOT, min=0), cost


def figures(pnl):
    import torch

    return pnl.mean(), pnl.std(), -torch.sort(pnl)[0][: len(pnl) // 20].mean()


def pfhedge_hedger():
    from pfhedge.instruments import BrownianStock, EuropeanOption
    from pfhedge.nn import BlackScholes, Hedger

    derivative = EuropeanOption(BrownianStock(sigma=SIGMA, cost=COST, dt=1 / STEPS), maturity=1.0)
    model = BlackScholes(derivative)
    return Hedger(model, model.inputs()), derivative


def near(workload, pnl):
    """The workload's figures against those of a peer's profit and loss without the premium."""
    n, (mean, sd, cvar) = len(pnl), (float(x) for x in figures(pnl))
    got = {"mean": workload["mean"] - PREMIUM, "sd": workload["sd"], "cvar": workload["cvar"] + PREMIUM}
    # The deviation of a deviation and of a tail's mean, generously.
    errors = {"mean": sd / math.sqrt(n), "sd": sd / math.sqrt(n), "cvar": 3.0 * sd / math.sqrt(0.05 * n)}
    want = {"mean": mean, "sd": sd, "cvar": cvar}
    off = {name: abs(got[name] - want[name]) / errors[name] for name in want}
    return {f"{name}_errors_off": round(off[name], 2) for name in off}, max(off.values()) < 4.0


def rows(verified, forback, threads):
    def prepared():
        import torch

        torch.set_num_threads(threads)
        torch.manual_seed(0)

    def compare(folder, simulate):
        prepared()
        spots, pnl, cost = simulate()
        params = {"policy": "delta", "cost_bps": 1e4 * COST, "volatility": SIGMA, "rate": 0.0, "maturity": 1.0, "strike": SPOT}
        outputs = {"pnl": pnl.double().numpy() + PREMIUM} | ({"cost": cost.double().numpy()} if cost is not None else {})
        path_by_path, same = verified(folder, "hedge_paths", params, {"spot": spots.numpy()}, outputs, 2e-3, 1e-4)
        if not same:
            return path_by_path, False
        workload = next(row for row in forback("bench", "hedge_delta", "--runs", "1"))
        compared, good = near(workload, torch_hedge(PATHS)[0])
        return path_by_path | compared, good

    def by_torch():
        spots = torch_paths(512)
        return spots, *torch_hedge(512, spots)

    def by_pfhedge():
        import torch

        hedger, derivative = pfhedge_hedger()
        with torch.no_grad():
            pnl = hedger.compute_pnl(derivative, n_paths=512)
        # It hedges one unit of a stock at 1.
        return SPOT * derivative.underlier.spot, SPOT * pnl, None

    def time_torch():
        prepared()
        return (lambda: figures(torch_hedge(PATHS)[0])), PATHS * STEPS

    def time_pfhedge():
        import torch

        prepared()
        hedger, derivative = pfhedge_hedger()

        def run():
            with torch.no_grad():
                return figures(hedger.compute_pnl(derivative, n_paths=PFHEDGE_PATHS))

        return run, PFHEDGE_PATHS * STEPS

    yield "hedge_delta", "torch", SHAPE, lambda folder: compare(folder, by_torch), time_torch
    yield "hedge_delta", "pfhedge", SHAPE, lambda folder: compare(folder, by_pfhedge), time_pfhedge
