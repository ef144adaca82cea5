"""Training of an LSTM hedger, one epoch: forback against pfhedge (PyTorch, a Python loop over the steps), on the same paths and weights.

    cargo bench --bench hedge_train -- DIR     # writes spot.bin, weights.bin, shape.txt; prints forback's loss and seconds an epoch
    python benches/peers/hedge_train.py DIR    # the same loss from pfhedge's hedger, then its seconds an epoch

The policy is BS delta + tanh(head(LSTM([log-moneyness, sqrt(tau), delta, previous hedge]))), its loss the entropic risk of the P&L after proportional
costs. An epoch is one forward and backward sweep over all paths and an Adam step; the simulation is left out for both. Needs pfhedge and torch.
"""

import math
import sys
import time

import numpy as np
import torch
from pfhedge.instruments import BrownianStock, EuropeanOption
from pfhedge.nn import EntropicRiskMeasure, Hedger

torch.set_num_threads(2)
root = sys.argv[1]
paths, steps, hidden, layers, maturity, volatility, cost = open(f"{root}/shape.txt").read().split()
paths, steps, hidden, layers = int(paths), int(steps), int(hidden), int(layers)
maturity, volatility, cost = float(maturity), float(volatility), float(cost)
spot = torch.from_numpy(np.fromfile(f"{root}/spot.bin", np.float32).reshape(paths, steps + 1))
flat = torch.from_numpy(np.fromfile(f"{root}/weights.bin", np.float32))


class Policy(torch.nn.Module):
    """One step at a time, as pfhedge calls it; the state goes back to zero at the first step."""

    def __init__(self):
        super().__init__()
        self.cells = torch.nn.ModuleList(torch.nn.LSTMCell(4 if l == 0 else hidden, hidden) for l in range(layers))
        self.head = torch.nn.Linear(hidden, 1)
        at = 0
        with torch.no_grad():
            for cell in self.cells:
                for tensor in (cell.weight_ih, cell.weight_hh, cell.bias_ih):
                    tensor.copy_(flat[at : at + tensor.numel()].view_as(tensor))
                    at += tensor.numel()
                cell.bias_hh.zero_()
                cell.bias_hh.requires_grad_(False)
            for tensor in (self.head.weight, self.head.bias):
                tensor.copy_(flat[at : at + tensor.numel()].view_as(tensor))
                at += tensor.numel()
        assert at == flat.numel()
        self.state = None

    def forward(self, x):  # [N, 1, 3]: log-moneyness, time to maturity, previous hedge
        x = x[:, 0, :]
        left = x[:, 1:2]
        if left[0, 0] > maturity * (1 - 0.5 / steps):
            self.state = [None] * layers
        root = left.sqrt()
        spread = volatility * root
        delta = torch.special.ndtr(x[:, 0:1] / spread + 0.5 * spread)
        y = torch.cat([x[:, 0:1], root, delta, x[:, 2:3]], 1)
        for l, cell in enumerate(self.cells):
            self.state[l] = cell(y, self.state[l])
            y = self.state[l][0]
        return (delta + torch.tanh(self.head(y)))[:, None, :]


stock = BrownianStock(sigma=volatility, cost=cost, dt=maturity / steps)
option = EuropeanOption(stock, strike=1.0, maturity=maturity)
stock.register_buffer("spot", spot)
model = Policy()
risk = EntropicRiskMeasure(a=1.0)
hedger = Hedger(model, ["log_moneyness", "time_to_maturity", "prev_hedge"], criterion=risk)
optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)


def epoch():
    optimiser.zero_grad()
    loss = risk(hedger.compute_pl(option))
    loss.backward()
    optimiser.step()
    return float(loss.detach())


print(f"pfhedge loss {epoch():.6f}")
seconds = []
for _ in range(3):
    start = time.perf_counter()
    epoch()
    seconds.append(time.perf_counter() - start)
print(f"pfhedge {min(seconds):.3f} s an epoch, {paths} paths x {steps} steps, {layers} x {hidden} units")
