"""The seven strategies in numba, as fast as we can write them: prange over sets, a set's state in registers, tables shared by all sets,
nothing allocated in a loop.

Bar j earns r[j] = p[j+1]/p[j] - 1. Its position is decided at bar j; net = position*r - fee*|position - position before|, none is held
before bar `start`. A row of `out` is Sharpe ratio per bar (UNDEFINED without variance), max drawdown, turnover.
"""

import math

import numpy as np
from numba import njit, prange

UNDEFINED = -1e30

# ---- tables, once for all sets ----------------------------------------------------------------------------------


def averages(close, periods):
    """Simple moving averages [len(periods), T]; 0 before the first."""
    sums = np.concatenate([[0.0], np.cumsum(close)])
    table = np.zeros((len(periods), len(close)))
    for row, n in zip(table, periods):
        row[n - 1 :] = (sums[n:] - sums[:-n]) / n
    return table


@njit(fastmath=True)
def exponential(close, spans):
    """Exponential moving averages [len(spans), T], seeded with the first close."""
    table = np.empty((len(spans), len(close)))
    for i in range(len(spans)):
        alpha = 2.0 / (spans[i] + 1.0)
        level = close[0]
        for t in range(len(close)):
            level += alpha * (close[t] - level)
            table[i, t] = level
    return table


@njit
def strength(close, periods):
    """Wilder's RSI [len(periods), T], from bar `period` on; 50 where nothing moved."""
    table = np.full((len(periods), len(close)), 50.0)
    for i in range(len(periods)):
        n = periods[i]
        gain = loss = 0.0
        for t in range(1, len(close)):
            step = close[t] - close[t - 1]
            up, down = max(step, 0.0), max(-step, 0.0)
            if t <= n:
                gain += up / n
                loss += down / n
            else:
                gain += (up - gain) / n
                loss += (down - loss) / n
            if gain + loss > 0.0:
                table[i, t] = 100.0 * gain / (gain + loss)
    return table


def distances(close, periods):
    """(close - mean) / population deviation [len(periods), T]; 0 where the deviation is."""
    table = np.zeros((len(periods), len(close)))
    for row, n in zip(table, periods):
        window = np.lib.stride_tricks.sliding_window_view(close, n)
        gap, deviation = close[n - 1 :] - window.mean(1), window.std(1)
        np.divide(gap, deviation, out=row[n - 1 :], where=deviation > 0)
    return table


@njit
def runs(close):
    """How many closes in a row before each bar lie below it, and above it [2, T]."""
    table = np.zeros((2, len(close)), np.int32)
    for t in range(len(close)):
        while table[0, t] < t and close[t - 1 - table[0, t]] < close[t]:
            table[0, t] += 1
        while table[1, t] < t and close[t - 1 - table[1, t]] > close[t]:
            table[1, t] += 1
    return table


def inverse_volatility(close, windows):
    """1 / (sqrt(252) * deviation of the last n log returns, n-1 divisor) [len(windows), T]."""
    logs = np.diff(np.log(close))
    table = np.zeros((len(windows), len(close)))
    for row, n in zip(table, windows):
        deviation = np.lib.stride_tricks.sliding_window_view(logs, n).std(1, ddof=1)
        row[n:] = 1.0 / (math.sqrt(252.0) * np.maximum(deviation, 1e-300))
    return table


# ---- sweeps -----------------------------------------------------------------------------------------------------


@njit(fastmath=True, inline="always")
def sharpe(n, total, square):
    mean = total / n
    variance = (square - n * mean * mean) / (n - 1)
    return mean / math.sqrt(variance) if variance > 1e-20 else UNDEFINED


@njit(parallel=True, fastmath=True)
def cross(table, a, b, first, returns, start, fee, out):
    """sma_cross, ema_cross: long while row a is above row b, from bar `first` on."""
    bars = len(returns)
    for i in prange(len(a)):
        fast, slow = table[a[i]], table[b[i]]
        held = total = square = turnover = 0.0
        level = lowest = 1.0
        for t in range(max(first[i], start), bars):
            weight = 1.0 if fast[t] > slow[t] else 0.0
            traded = abs(weight - held)
            net = weight * returns[t] - fee * traded
            held = weight
            turnover += traded
            total += net
            square += net * net
            level = min(level * (1.0 + net), 1.0)
            lowest = min(lowest, level)
        out[i, 0] = sharpe(bars - start, total, square)
        out[i, 1] = 1.0 - lowest
        out[i, 2] = turnover


@njit(parallel=True, fastmath=True)
def macd(table, a, b, alpha, first, returns, start, fee, out):
    """macd: long while the line EMA_a - EMA_b is above its own EMA, which is a register."""
    bars = len(returns)
    for i in prange(len(a)):
        fast, slow, blend = table[a[i]], table[b[i]], alpha[i]
        signal = fast[0] - slow[0]
        held = total = square = turnover = 0.0
        level = lowest = 1.0
        begin = max(first[i], start)
        for t in range(begin):
            signal += blend * (fast[t] - slow[t] - signal)
        for t in range(begin, bars):
            line = fast[t] - slow[t]
            signal += blend * (line - signal)
            weight = 1.0 if line > signal else 0.0
            traded = abs(weight - held)
            net = weight * returns[t] - fee * traded
            held = weight
            turnover += traded
            total += net
            square += net * net
            level = min(level * (1.0 + net), 1.0)
            lowest = min(lowest, level)
        out[i, 0] = sharpe(bars - start, total, square)
        out[i, 1] = 1.0 - lowest
        out[i, 2] = turnover


@njit(parallel=True, fastmath=True)
def band(table, rows, enter, leave, first, returns, start, fee, out):
    """rsi_reversion, bollinger_reversion: buy below `enter`, sell above `leave`."""
    bars = len(returns)
    for i in prange(len(rows)):
        value, low, high = table[rows[i]], enter[i], leave[i]
        weight = held = total = square = turnover = 0.0
        level = lowest = 1.0
        # What was decided before `start` counts when it is traded.
        for t in range(first[i], start):
            weight = (0.0 if value[t] > high else 1.0) if weight > 0.0 else (1.0 if value[t] < low else 0.0)
        for t in range(max(first[i], start), bars):
            weight = (0.0 if value[t] > high else 1.0) if weight > 0.0 else (1.0 if value[t] < low else 0.0)
            traded = abs(weight - held)
            net = weight * returns[t] - fee * traded
            held = weight
            turnover += traded
            total += net
            square += net * net
            level = min(level * (1.0 + net), 1.0)
            lowest = min(lowest, level)
        out[i, 0] = sharpe(bars - start, total, square)
        out[i, 1] = 1.0 - lowest
        out[i, 2] = turnover


@njit(parallel=True, fastmath=True)
def donchian(table, entry, leave, returns, start, fee, out):
    """donchian_breakout: buy above the last `entry` closes, sell below the last `leave`; the table has the lengths of runs."""
    bars = len(returns)
    rising, falling = table[0], table[1]
    for i in prange(len(entry)):
        up, down = entry[i], leave[i]
        weight = held = total = square = turnover = 0.0
        level = lowest = 1.0
        for t in range(start):
            weight = (0.0 if falling[t] >= down else 1.0) if weight > 0.0 else (1.0 if rising[t] >= up else 0.0)
        for t in range(start, bars):
            weight = (0.0 if falling[t] >= down else 1.0) if weight > 0.0 else (1.0 if rising[t] >= up else 0.0)
            traded = abs(weight - held)
            net = weight * returns[t] - fee * traded
            held = weight
            turnover += traded
            total += net
            square += net * net
            level = min(level * (1.0 + net), 1.0)
            lowest = min(lowest, level)
        out[i, 0] = sharpe(bars - start, total, square)
        out[i, 1] = 1.0 - lowest
        out[i, 2] = turnover


@njit(parallel=True, fastmath=True)
def momentum(close, table, rows, lookback, target, leverage, first, returns, start, fee, out):
    """ts_momentum: the sign of the past return, sized to a target volatility."""
    bars = len(returns)
    for i in prange(len(rows)):
        inverse, back, aim, most = table[rows[i]], lookback[i], target[i], leverage[i]
        held = total = square = turnover = 0.0
        level = lowest = 1.0
        for t in range(max(first[i], start), bars):
            size = min(aim * inverse[t], most)
            now, then = close[t], close[t - back]
            weight = size if now > then else (-size if now < then else 0.0)
            traded = abs(weight - held)
            net = weight * returns[t] - fee * traded
            held = weight
            turnover += traded
            total += net
            square += net * net
            level = min(level * (1.0 + net), 1.0)
            lowest = min(lowest, level)
        out[i, 0] = sharpe(bars - start, total, square)
        out[i, 1] = 1.0 - lowest
        out[i, 2] = turnover


# ---- walk-forward -----------------------------------------------------------------------------------------------


@njit(parallel=True, fastmath=True)
def walk_forward(close, periods, a, b, first, start, edges, train, parts, fee, out, best, stitched):
    """sma_cross on close [A, T], a set chosen per asset and window, and its replay.

    Prefix sums at `edges` give every window's Sharpe ratio; train [W, 2] are indices into `edges`, parts [W, 3] are first bar, last bar
    and offset in stitched [A, K]. Ties: the first set. Parallel over assets; an asset's table is made once for all its sets.
    """
    bars = close.shape[1] - 1
    for asset in prange(close.shape[0]):
        price = close[asset]
        returns = np.empty(bars)
        for t in range(bars):
            returns[t] = price[t + 1] / price[t] - 1.0
        table = np.empty((len(periods), bars + 1))
        for row in range(len(periods)):
            n, running = periods[row], 0.0
            for t in range(bars + 1):
                running += price[t] - (price[t - n] if t >= n else 0.0)
                table[row, t] = running / n
        sums, squares = np.empty(len(edges)), np.empty(len(edges))
        scores = np.full(len(train), UNDEFINED)
        for i in range(len(a)):
            fast, slow, begin = table[a[i]], table[b[i]], max(first[i], start)
            held = total = square = turnover = 0.0
            level = lowest = 1.0
            for edge in range(len(edges)):
                end = edges[edge]
                for t in range(begin, end):
                    weight = 1.0 if fast[t] > slow[t] else 0.0
                    traded = abs(weight - held)
                    net = weight * returns[t] - fee * traded
                    held = weight
                    turnover += traded
                    total += net
                    square += net * net
                    level = min(level * (1.0 + net), 1.0)
                    lowest = min(lowest, level)
                begin = max(begin, end)
                sums[edge] = total
                squares[edge] = square
            out[asset, i, 0] = sharpe(bars - start, total, square)
            out[asset, i, 1] = 1.0 - lowest
            out[asset, i, 2] = turnover
            for w in range(len(train)):
                low, high = train[w, 0], train[w, 1]
                score = sharpe(edges[high] - edges[low], sums[high] - sums[low], squares[high] - squares[low])
                if score > scores[w]:
                    scores[w] = score
                    best[asset, w] = i
        for w in range(len(train)):
            i = best[asset, w]
            fast, slow, begin = table[a[i]], table[b[i]], max(first[i], start)
            at = parts[w, 2] - parts[w, 0]
            for t in range(parts[w, 0], parts[w, 1]):
                weight = 1.0 if t >= begin and fast[t] > slow[t] else 0.0
                held = 1.0 if t > begin and fast[t - 1] > slow[t - 1] else 0.0
                stitched[asset, at + t] = weight * returns[t] - fee * abs(weight - held)
