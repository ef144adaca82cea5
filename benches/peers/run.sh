#!/usr/bin/env bash
# Side by side in one run, interleaved, on equal threads: forback's standard sweeps against hand-fused numba, and vectorbt where it has
# the strategy; hidden Markov models against hmmlearn and dynamax; delta hedging against PyTorch and pfhedge. Outputs are compared before
# anything is timed. Installs the peers into a virtual environment of their own.
#
#   benches/peers/run.sh [BIN] [OPTIONS of peers.py]     BIN: the release binary of forback (default target/release/forback)
#   benches/peers/run.sh target/release/forback --workloads sweep_sma,sweep_rsi --rounds 5 --device cuda
#
#   PYTHON   interpreter for the environment     python3.11, else python3
#   VENV     where the environment is            target/peers-venv
#
# Prints a table, and writes a JSON line per row into benches/results/<date>-peers-<processor>.jsonl (--out FILE for another).
# Exit 1 if outputs differ.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
here=$root/benches/peers
target=${CARGO_TARGET_DIR:-$root/target}

bin=$target/release/forback
if [ $# -ge 1 ] && [[ $1 != -* ]]; then bin=$1 && shift; fi
[ -x "$bin" ] || { echo "$bin is not an executable: build it with cargo build --release" >&2 && exit 2; }

venv=${VENV:-$target/peers-venv}
python=${PYTHON:-$(command -v python3.11 || command -v python3)}
if ! cmp -s "$here/requirements.txt" "$venv/requirements.txt"; then
    echo "installing the peers into $venv" >&2
    "$python" -m venv --clear "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check -r "$here/requirements.txt"
    "$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps -r "$here/requirements-no-deps.txt"
    cp "$here/requirements.txt" "$venv/requirements.txt"
fi
exec "$venv/bin/python" "$here/peers.py" "$bin" "$@"
