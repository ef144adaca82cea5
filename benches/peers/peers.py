"""Compares, then times: forback's standard workloads against what users would pick instead. Called by run.sh.

Sweeps: timed is a peer's whole call with its tables of indicators made beforehand (forback's rate includes making them); a rate is set-bars
a second: sets x assets x returns / seconds. Peers run the workload's first sets (--sets), which are the same formula and the same work each.
Hidden Markov models: a rate is sequence-steps a second (x iterations of a fit). hmmlearn gets its scaling implementation, the faster one,
and fewer sequences (it runs one after the other, on one thread); dynamax gets jit and vmap over the whole batch.
Neural layers, and many small models: nets.py. Delta hedging: hedges.py.
"""

import argparse
import csv
import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

parser = argparse.ArgumentParser(prog="benches/peers/run.sh", description=__doc__)
parser.add_argument("bin")
parser.add_argument("--device", default="cpu", help="forback's device; peers run on the CPU (default cpu)")
parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of forback and of numba (default all)")
parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds, at least 3 (default 3)")
parser.add_argument("--sets", type=int, default=200_000, help="sets that numba runs (default 200000)")
parser.add_argument("--workloads", default="", help="comma-separated (default all)")
parser.add_argument("--out", help="JSON lines file (default benches/results/<date>-peers-<processor>.jsonl)")
args = parser.parse_args()
args.rounds = max(args.rounds, 3)
# Read when numba is imported.
os.environ["NUMBA_NUM_THREADS"] = str(args.threads)
# JAX takes the cores that the process may use.
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
warnings.filterwarnings("ignore")

import numpy as np
import pyarrow.parquet

import fused
import hedges
import nets

ROOT = Path(__file__).resolve().parents[2]
BARS, FEE, YEAR = 2520, 1e-3, math.sqrt(252.0)
TRAIN, TEST, STEP, ASSETS = 756, 63, 21, 8
I64 = np.int64

# ---- forback ----------------------------------------------------------------------------------------------------


def forback(*words):
    """JSON lines of a command."""
    done = subprocess.run([args.bin, *words, "--device", args.device, "--json"], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"forback {' '.join(words)}: {done.stderr.strip()}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def prices(path, close):
    """Writes close [T, A] as a wide CSV of business days."""
    day, days = datetime.date(2010, 1, 4), []
    while len(days) < len(close):
        if day.weekday() < 5:
            days.append(day.isoformat())
        day += datetime.timedelta(1)
    with open(path, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["date"] + [f"A{a:03}" for a in range(close.shape[1])])
        table.writerows([day, *map(str, row)] for day, row in zip(days, close))


def swept(folder, strategy, grid, close, *words):
    """The report of a sweep, and its sets as columns [S, A]."""
    file, out = Path(folder) / "prices.csv", Path(folder) / "out"
    prices(file, close)
    words = ["--strategy", strategy, "--grid", grid, "--cost-bps", "10", "--execution", "same_close", "--periods-per-year", "252", *words]
    report = forback("sweep", str(file), *words, "--out", str(out))[0]
    table = pyarrow.parquet.read_table(out / "results.parquet")
    order = np.argsort(table["set"].to_numpy(), kind="stable")
    columns = {name: table[name].to_numpy(zero_copy_only=False)[order].reshape(-1, close.shape[1]) for name in table.column_names if name != "symbol"}
    return report, columns


# ---- workloads --------------------------------------------------------------------------------------------------


def cycle(n, *axes):
    """Set i of a grid whose first parameter varies fastest, for i < n; the grid repeats."""
    i, columns = np.arange(n), []
    for axis in axes:
        columns.append(np.asarray(axis)[i % len(axis)])
        i = i // len(axis)
    return columns


def row_of(*columns):
    """Distinct values of all columns, and each column as rows among them."""
    distinct = np.unique(np.concatenate(columns))
    return distinct, *(np.searchsorted(distinct, c) for c in columns)


def returns(close):
    return close[1:] / close[:-1] - 1.0


def sma(n, close):
    fast, slow = cycle(n, np.arange(2, 102), np.arange(102, 502))
    periods, a, b = row_of(fast, slow)
    table = fused.averages(close, periods)
    return lambda start, out: fused.cross(table, a, b, slow - 1, returns(close), start, FEE, out)


def ema(n, close):
    fast, slow = cycle(n, np.arange(2, 102), np.arange(102, 502))
    spans, a, b = row_of(fast, slow)
    table = fused.exponential(close, spans)
    return lambda start, out: fused.cross(table, a, b, slow - 1, returns(close), start, FEE, out)


def rsi(n, close):
    period, low, high = cycle(n, np.arange(2, 31), np.arange(5.0, 46, 2), np.arange(55.0, 96, 2))
    periods, rows = row_of(period)
    table = fused.strength(close, periods)
    return lambda start, out: fused.band(table, rows, low, high, period, returns(close), start, FEE, out)


def bollinger(n, close):
    period, width = cycle(n, np.arange(5, 201), np.float32(0.5 + 0.05 * np.arange(61)).astype(float))
    periods, rows = row_of(period)
    table, mean = fused.distances(close, periods), np.zeros(n)
    return lambda start, out: fused.band(table, rows, -width, mean, period - 1, returns(close), start, FEE, out)


def macd(n, close):
    fast, slow, signal = cycle(n, np.arange(4, 31), np.arange(31, 80, 2), np.arange(3, 21))
    spans, a, b = row_of(fast, slow)
    table = fused.exponential(close, spans)
    return lambda start, out: fused.macd(table, a, b, 2.0 / (signal + 1.0), slow + signal - 2, returns(close), start, FEE, out)


def donchian(n, close):
    entry, leave = cycle(n, np.arange(10, 251, 2), np.arange(2, 101))
    table = fused.runs(close)
    return lambda start, out: fused.donchian(table, entry, leave, returns(close), start, FEE, out)


def momentum(n, close):
    f32 = lambda *x: np.float32(x).astype(float)
    back, window, target, most = cycle(n, np.arange(10, 261, 2), np.arange(10, 121, 10), f32(0.1, 0.15, 0.2), f32(1, 2, 3))
    windows, rows = row_of(window)
    table, first = fused.inverse_volatility(close, windows), np.maximum(back, window)
    return lambda start, out: fused.momentum(close, table, rows, back, target, most, first, returns(close), start, FEE, out)


# workload: strategy, grid, sets of the grid, numba's side. The grids are those of src/cli/bench.rs.
SWEEPS = {
    "sweep_sma": ("sma_cross", "fast=2:101,slow=102:501", 100 * 400, sma),
    "sweep_ema": ("ema_cross", "fast=2:101,slow=102:501", 100 * 400, ema),
    "sweep_rsi": ("rsi_reversion", "period=2:30,low=5:45:2,high=55:95:2", 29 * 21 * 21, rsi),
    "sweep_bollinger": ("bollinger_reversion", "period=5:200,width=0.5:3.5:0.05", 196 * 61, bollinger),
    "sweep_macd": ("macd", "fast=4:30,slow=31:79:2,signal=3:20", 27 * 25 * 18, macd),
    "sweep_donchian": ("donchian_breakout", "entry=10:250:2,exit=2:100", 121 * 99, donchian),
    "sweep_momentum": ("ts_momentum", "lookback=10:260:2,vol_window=10:120:10,target_vol=0.1|0.15|0.2,max_leverage=1|2|3", 126 * 12 * 9, momentum),
}
WALK_GRID = "fast=2:101,slow=102:201"


def market(assets):
    """Closes [T, A] of geometric Brownian motion, as f32 has them."""
    steps = np.random.default_rng(1).normal(3e-4, 1e-2, (BARS, assets))
    return np.float32(100 * np.exp(np.cumsum(steps, axis=0)))


# ---- comparisons ------------------------------------------------------------------------------------------------


def differences(got, columns):
    """Worst differences of statistics [S, 3] where turnover agrees, and the share of sets where it does not."""
    want = np.column_stack([columns[name].ravel() for name in ("sharpe", "max_drawdown", "turnover")]).astype(float)
    got = np.array(got)
    got[:, 0] = np.where(got[:, 0] < -1e29, np.nan, got[:, 0] * YEAR)
    same = np.abs(got[:, 2] - want[:, 2]) <= 1e-4 * np.maximum(want[:, 2], 1.0)
    if (np.isnan(got[same, 0]) != np.isnan(want[same, 0])).any():
        return {"sharpe": math.inf, "max_drawdown": math.inf, "other_turnover": float(1 - same.mean())}
    worst = np.nanmax(np.abs(got[same] - want[same]), axis=0)
    return {"sharpe": float(worst[0]), "max_drawdown": float(worst[1]), "other_turnover": float(1 - same.mean())}


def agree(compared, tolerance=1e-4, others=1e-3):
    return max(compared["sharpe"], compared["max_drawdown"]) <= tolerance and compared["other_turnover"] <= others


def compare_sweep(folder, workload):
    strategy, grid, sets, side = SWEEPS[workload]
    close = market(1)
    report, columns = swept(folder, strategy, grid, close, "--walk-forward", "none")
    out = np.zeros((sets, 3))
    side(sets, close[:, 0].astype(float))(report["start"], out)
    compared = differences(out, columns)
    return compared, agree(compared)


class Walk:
    """sweep_walk_forward in numba: the first 10,000 pairs on some assets."""

    def __init__(self, assets, start):
        self.close, self.start = np.ascontiguousarray(market(assets).T.astype(float)), start
        fast, slow = cycle(10_000, np.arange(2, 102), np.arange(102, 502))
        self.periods, self.a, self.b = row_of(fast, slow)
        self.first = slow - 1
        count = (BARS - 1 - start - TRAIN - TEST) // STEP + 1
        train = start + STEP * np.arange(count)
        tests = train + TRAIN
        self.edges = np.unique(np.concatenate([train, tests, [BARS - 1]]))
        self.train = np.searchsorted(self.edges, np.column_stack([train, tests]))
        ends = np.append(tests[1:], tests[-1] + TEST)
        offsets = np.concatenate([[0], np.cumsum(ends - tests)])
        self.parts = np.column_stack([tests, ends, offsets[:-1]])
        self.out = np.zeros((assets, 10_000, 3))
        self.best = np.zeros((assets, count), I64)
        self.stitched = np.zeros((assets, offsets[-1]))

    def __call__(self):
        job = (self.close, self.periods, self.a, self.b, self.first, self.start, self.edges, self.train, self.parts, FEE)
        fused.walk_forward(*job, self.out, self.best, self.stitched)

    def score(self, asset, window, pair):
        """Sharpe ratio of a pair in a train window, plainly."""
        close, begin = self.close[asset], max(self.first[pair], self.start)
        fast, slow = fused.averages(close, self.periods[[self.a[pair], self.b[pair]]])
        weight = np.where(np.arange(BARS) >= begin, fast > slow, False).astype(float)
        net = weight[:-1] * returns(close) - FEE * np.abs(np.diff(weight, prepend=0.0))[:-1]
        low, high = self.edges[self.train[window]]
        return net[low:high].mean() / net[low:high].std(ddof=1) * YEAR


def compare_walk(folder, _):
    scheme = f"train={TRAIN},test={TEST},step={STEP}"
    report, columns = swept(folder, "sma_cross", WALK_GRID, market(ASSETS), "--walk-forward", scheme)
    walk = Walk(ASSETS, report["start"])
    walk()
    compared = differences(walk.out.transpose(1, 0, 2).reshape(-1, 3), columns)
    chosen = report["costs"][0]["per_asset"]
    same = np.array(chosen["best"]).reshape(walk.best.shape) == walk.best
    stitched = walk.stitched.mean(1) / walk.stitched.std(1, ddof=1) * YEAR
    theirs = np.array([asset["sharpe"] for asset in chosen["assets"]])
    # Pairs that held the same positions in a window tie; rounding may take another of them, never a worse one.
    other = np.argwhere(~same)
    lost = [walk.score(a, w, walk.best[a, w]) - walk.score(a, w, np.reshape(chosen["best"], same.shape)[a, w]) for a, w in other]
    compared["ties"] = float(1 - same.mean())
    compared["train_sharpe_of_other_choices"] = float(np.abs(lost).max(initial=0.0))
    compared["out_of_sample_sharpe"] = float(np.abs(stitched - theirs)[same.all(1)].max(initial=0.0))
    good = agree(compared) and compared["train_sharpe_of_other_choices"] <= 1e-6 and compared["out_of_sample_sharpe"] <= 1e-4 and same.mean() > 0.9
    return compared, good


def vectorbt_run():
    import pandas as pd
    import vectorbt as vbt

    vbt.settings.returns["year_freq"] = "252 days"
    series = pd.Series(market(1)[:, 0].astype(float))
    fast, slow = cycle(1000, np.arange(2, 102), np.arange(102, 502))

    def run(start=0):
        above = vbt.MA.run(series, fast).ma_above(vbt.MA.run(series, slow))
        above.iloc[:start] = False
        folio = vbt.Portfolio.from_signals(series, above, ~above, fees=FEE, freq="1D")
        return folio, folio.sharpe_ratio(), folio.max_drawdown()

    return run


def compare_vectorbt(folder, _):
    """It compounds its fees and counts the bars before the first one, so Sharpe ratios agree to some thousandths; orders agree."""
    report, columns = swept(folder, "sma_cross", "fast=2:101,slow=102:111", market(1), "--walk-forward", "none")
    folio, _, drawdown = vectorbt_run()(report["start"])
    daily = folio.returns().to_numpy()[report["start"] :]
    sharpe = daily.mean(0) / daily.std(0, ddof=1) * YEAR
    orders = folio.orders.count().to_numpy()
    # The decision of the last close is an order there and earns nothing here.
    compared = {
        "sharpe": float(np.nanmax(np.abs(sharpe - columns["sharpe"][:, 0]))),
        "max_drawdown": float(np.abs(-drawdown.to_numpy() - columns["max_drawdown"][:, 0]).max()),
        "other_turnover": float((np.abs(orders - columns["trades"][:, 0]) > 1).mean()),
    }
    return compared, agree(compared, 0.02)


# ---- hidden Markov models ---------------------------------------------------------------------------------------


def chain(k):
    """Initial probabilities, transitions and means of a standard workload."""
    return np.full(k, 1 / k), np.full((k, k), 0.02) + np.eye(k) * (1 - 0.02 * k), np.arange(k) * 1.0


def series(n):
    """Observations [n, 1000], as f32 has them."""
    return np.float32(np.random.default_rng(2).normal(1.0, 1.0, (n, 1000))).astype(float)


def densities(x, k):
    """log_obs [n, T, k] of unit normals around 0, 1, ..."""
    return np.float32(-0.5 * (x[..., None] - np.arange(k)) ** 2 - 0.5 * math.log(2 * math.pi))


def learner(k, **options):
    from hmmlearn.hmm import GaussianHMM

    h = GaussianHMM(k, "diag", init_params="", implementation="scaling", covars_prior=0.0, **options)
    h.startprob_, h.transmat_, means = chain(k)
    h.means_, h.covars_ = means[:, None], np.ones((k, 1))
    return h


def smoother(log_obs):
    """dynamax's smoothed probabilities and log-likelihoods of a batch, compiled."""
    import jax
    import jax.numpy as jnp
    from dynamax.hidden_markov_model import hmm_smoother

    init, transitions, _ = (jnp.asarray(x, jnp.float32) for x in chain(log_obs.shape[-1]))
    inputs = jnp.asarray(log_obs)

    def one(log_obs):
        posterior = hmm_smoother(init, transitions, log_obs)
        return posterior.smoothed_probs, posterior.marginal_loglik

    both = jax.jit(jax.vmap(one))
    return lambda: [x.block_until_ready() for x in both(inputs)]


def verified(folder, kernel, params, inputs, outputs, atol, rtol):
    """What `forback verify` says of a peer's outputs as a case: the worst error as a share of the tolerance."""
    header = {"__metadata__": {"kernel": kernel, "params": json.dumps(params), "atol": str(atol), "rtol": str(rtol), "reference_tol": "1", "source": "peer"}}
    body = b""
    for name, array, kind in [(f"in/{n}", x, "f4") for n, x in inputs.items()] + [(f"out/{n}", x, "f8") for n, x in outputs.items()]:
        data = np.ascontiguousarray(array, dtype="<" + kind)
        header[name] = {"dtype": {"f4": "F32", "f8": "F64"}[kind], "shape": list(data.shape), "data_offsets": [len(body), len(body) + data.nbytes]}
        body += data.tobytes()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = Path(folder) / "peer.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    done = subprocess.run([args.bin, "verify", str(path), "--device", args.device, "--json"], capture_output=True, text=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    if not rows:
        sys.exit(f"forback verify: {done.stderr.strip()}")
    compared = {"share_of_tolerance": rows[0]["share"], "worst": rows[0]["worst"], "atol": atol, "rtol": rtol}
    return compared | ({"failure": rows[0]["failure"]} if rows[0]["failure"] else {}), rows[0]["passed"]


def compare_posterior(folder, peer):
    k, n = 4, 32
    x = series(n)
    log_obs = densities(x, k)
    init, transitions, _ = chain(k)
    inputs = {"log_init": np.log(init)[None], "log_trans": np.log(transitions)[None, None], "log_obs": log_obs}
    if peer == "dynamax":
        posterior, likelihood = (np.asarray(out, float) for out in smoother(log_obs)())
        # f32 too, normalised in its own way: its own rounding is all that is left.
        tolerance = (2e-5, 2e-5)
    else:
        h = learner(k, params="")
        pairs = [h.score_samples(row[:, None]) for row in x]
        likelihood, posterior = np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs])
        tolerance = (5e-6, 1e-6)
    return verified(folder, "hmm_forward_backward", {}, inputs, {"posterior": posterior, "log_likelihood": likelihood}, *tolerance)


def compare_posterior_hmmlearn(folder, _):
    return compare_posterior(folder, "hmmlearn")


def compare_posterior_dynamax(folder, _):
    return compare_posterior(folder, "dynamax")


def compare_fit(folder, _):
    """Three series, a model each: 20 iterations; the worst of them."""
    k, worst, good = 3, None, True
    init, transitions, means = chain(k)
    for x in series(3):
        h = learner(k, params="stmc", n_iter=20, tol=-np.inf)
        h.fit(x[:, None])
        inputs = {"obs": x[None, :, None], "init": init, "trans": transitions, "means": means[:, None], "covars": np.ones((k, 1))}
        outputs = {"init": h.startprob_, "trans": h.transmat_, "means": h.means_, "covars": h.covars_.reshape(k, 1)}
        outputs["log_likelihood"] = np.array(h.monitor_.history)
        params = {"states": k, "iterations": 20, "covariance": "diag"}
        compared, passed = verified(folder, "hmm_baum_welch", params, inputs, outputs, 3e-4, 3e-3)
        if worst is None or not passed or compared["share_of_tolerance"] > worst["share_of_tolerance"]:
            worst = compared
        good &= passed
    return worst, good


def hmmlearn_posterior(_):
    n = 128
    h, x = learner(4, params=""), series(n).reshape(-1, 1)
    return (lambda: h.score_samples(x, [1000] * n)), n * 1000, n


def dynamax_posterior(_):
    n = 4096
    return smoother(densities(series(n), 4)), n * 1000, n


def hmmlearn_fit(_):
    n, x = 16, series(16)

    def fit():
        for row in x:
            learner(3, params="stmc", n_iter=20, tol=-np.inf).fit(row[:, None])

    return fit, n * 1000 * 20, n


# ---- timing -----------------------------------------------------------------------------------------------------


def seconds(f, runs=3):
    """Median of some runs after a first one."""
    f()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def numba_sweep(workload):
    side = SWEEPS[workload][3](args.sets, market(1)[:, 0].astype(float))
    out = np.zeros((args.sets, 3))
    return (lambda: side(0, out)), args.sets * (BARS - 1), args.sets


def numba_walk(_):
    assets = max(20, args.threads)
    return Walk(assets, 0), 10_000 * assets * (BARS - 1), 10_000


def vectorbt_timed(_):
    return vectorbt_run(), 1000 * (BARS - 1), 1000


# workload, peer, comparison, what is timed, and the shape where a workload has several.
ROWS = [(name, "numba", compare_sweep, numba_sweep) for name in SWEEPS]
ROWS += [("sweep_walk_forward", "numba", compare_walk, numba_walk), ("sweep_sma", "vectorbt", compare_vectorbt, vectorbt_timed)]
ROWS += [
    ("hmm_posterior", "hmmlearn", compare_posterior_hmmlearn, hmmlearn_posterior),
    ("hmm_posterior", "dynamax", compare_posterior_dynamax, dynamax_posterior),
    ("hmm_fit", "hmmlearn", compare_fit, hmmlearn_fit),
]
ROWS = [(*row, None) for row in ROWS]


def net(workload, peer, shape, compare, prepare):
    return workload, peer, lambda folder, _: compare(folder), lambda _: (*prepare(), None), shape


ROWS += [net(*row) for row in nets.rows(verified, args.threads)]
ROWS += [net(*row) for row in hedges.rows(verified, forback, args.threads)]


def machine():
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0] if names else cpu
    return cpu


def commit():
    git = lambda *words: subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True).stdout.strip()
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")


def versions():
    from importlib.metadata import version

    ours = subprocess.run([args.bin, "--version"], capture_output=True, text=True).stdout.strip()
    return {"forback": ours, "python": platform.python_version()} | {name: version(name) for name in ("numba", "numpy", "pandas", "vectorbt", "hmmlearn", "dynamax", "jax", "torch", "pfhedge")}


def main():
    wanted = [name for name in args.workloads.split(",") if name]
    unknown = [name for name in wanted if name not in [row[0] for row in ROWS]]
    if unknown:
        sys.exit(f"unknown workload {unknown[0]}; known: {', '.join(dict.fromkeys(row[0] for row in ROWS))}")
    rows = [row for row in ROWS if not wanted or row[0] in wanted]

    print("comparing outputs", file=sys.stderr)
    compared, failed = {}, []
    for workload, peer, compare, _, _ in rows:
        if (workload, peer) in compared:
            continue
        with tempfile.TemporaryDirectory() as folder:
            compared[workload, peer], good = compare(folder, workload)
        print(f"  {workload:<20} {peer:<9} {'equal' if good else 'DIFFERENT':<10} {compared[workload, peer]}", file=sys.stderr)
        if not good:
            failed.append(f"{workload}, {peer}")
    if failed:
        sys.exit(f"outputs differ, nothing was timed: {'; '.join(failed)}")

    head = {"machine": machine(), "threads": args.threads, "date": datetime.datetime.now(datetime.timezone.utc).strftime("%FT%TZ")}
    head |= {"commit": commit(), "versions": versions(), "rounds": args.rounds}
    slug = "".join(c if c.isalnum() else "-" for c in head["machine"].lower()).strip("-")
    path = Path(args.out) if args.out else ROOT / "benches/results" / f"{head['date'][:10]}-peers-{slug}.jsonl"
    lines = []
    print(f"{head['machine']}, {args.threads} threads, {head['date'][:10]}, commit {head['commit']}; set-bars, sequence-steps, flops, model-steps or path-steps a second, medians of {args.rounds} rounds")
    print(f"{'workload':<20} {'peer':<9} {'forback':>10} {'peer':>10} {'ratio':>9}")
    for workload, peer, _, prepare, shape in rows:
        run, work, sets = prepare(workload)
        ours, theirs = [], []
        for _ in range(args.rounds):
            lines_of = forback("bench", workload, "--threads", str(args.threads), "--runs", "3")
            ours.append(next(line for line in lines_of if shape in (None, line["shape"])))
            grid = SWEEPS[workload][1] if workload in SWEEPS else WALK_GRID if workload == "sweep_walk_forward" else None
            if ours[-1].get("grid", grid) != grid:
                sys.exit(f"{workload}: forback bench runs {ours[-1]['grid']}, the peers {grid}; make them equal")
            theirs.append(work / seconds(run))
        ratio = statistics.median(o["rate"] / t for o, t in zip(ours, theirs))
        rate, peer_rate = statistics.median(o["rate"] for o in ours), statistics.median(theirs)
        print(f"{workload:<20} {peer:<9} {rate:>10.3g} {peer_rate:>10.3g} {ratio:>8.1f}x", flush=True)
        line = {"workload": workload, "peer": peer, "ratio": ratio, "forback_rate": rate, "peer_rate": peer_rate}
        line |= {"unit": f"{ours[0]['unit']}/s" if shape else "sequence-steps/s" if workload.startswith("hmm") else "set-bars/s"}
        line |= {"device": ours[0]["device"], "adapter": ours[0]["adapter"], "shape": ours[0]["shape"]}
        line |= {} if shape else {"peer_sequences" if workload.startswith("hmm") else "peer_sets": sets}
        line |= {"forback_rates": [o["rate"] for o in ours], "peer_rates": theirs, "compared": compared[workload, peer]} | head
        lines.append(json.dumps(line))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    print(f"written: {path}", file=sys.stderr)


main()
