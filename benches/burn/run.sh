#!/usr/bin/env bash
# forback against burn on the same adapter: forward and backward of an LSTM and of attention, f32. Builds burn (fusion and autotuning on, as
# for its users), compares its outputs and gradients with the host's in f64, then times both in turns.
#
#   benches/burn/run.sh [BIN] [OPTIONS of ratios.py]     BIN: the release binary of forback (default target/release/forback)
#   benches/burn/run.sh target/release/forback --rounds 5
#
#   CARGO_TARGET_DIR              where burn is built                                     benches/burn/target
#   CUBECL_WGPU_DEFAULT_DEVICE    the adapter that burn takes; Cpu for a software one      what wgpu prefers
#   FORBACK_DEVICE                the adapter that forback takes                           wgpu
#
# Prints a table, and writes a JSON line per row into benches/results/<date>-burn-<processor>.jsonl (--out FILE for another).
# Exit 1 if outputs differ.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
here=$root/benches/burn

bin=$root/target/release/forback
if [ $# -ge 1 ] && [[ $1 != -* ]]; then bin=$1 && shift; fi
[ -x "$bin" ] || { echo "$bin is not an executable: build it with cargo build --release" >&2 && exit 2; }

target=${CARGO_TARGET_DIR:-$here/target}
cargo build --release --locked --manifest-path "$here/Cargo.toml" --target-dir "$target"
exec python3 "$here/ratios.py" "$bin" "$target/release/forback-burn" "$@"
