#!/usr/bin/env bash
# Checks and times a release build on a machine with a GPU; needs no cargo there.
#
#   scripts/gpu.sh BIN [OUT_DIR]       BIN: the release binary of forback
#
#   CONFORMANCE   folder of conformance files        ../shared/conformance
#   PEERS         judge of side-by-side runs         ../shared/peers/ratio.py, run where python3 has its packages
#   DEVICES       devices to check and time          "cuda wgpu"
#   RUNS          timed runs of each workload        5
#
# Writes machine.json, devices.jsonl, verify-<device>.jsonl, bench-<device>.jsonl and peers.txt into OUT_DIR
# (default benches/results/<date>-<gpu>). Nothing stops at a failure; exit 1 if a device is missing, a check failed or a timing failed.
set -uo pipefail

usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" && exit 2; }
[ $# -ge 1 ] && [ $# -le 2 ] || usage
[ -x "$1" ] || { echo "$1 is not an executable: build it with cargo build --release" >&2 && exit 2; }
bin=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
root=$(cd "$(dirname "$0")/.." && pwd)
conformance=${CONFORMANCE:-$root/../shared/conformance}
peers=${PEERS:-$root/../shared/peers/ratio.py}
export XDG_RUNTIME_DIR=${XDG_RUNTIME_DIR:-/tmp}
unset FORBACK_DEVICE FORBACK_CHECKED

# ---- machine ----------------------------------------------------------------------------------------------------

field() { nvidia-smi --query-gpu="$1" --format=csv,noheader 2>/dev/null | head -n 1 | tr -d '"\\'; }
gpu=$(field name)
slug=$(printf '%s' "${gpu:-no-gpu}" | tr 'A-Z ' 'a-z-' | tr -cd 'a-z0-9-')
out=${2:-$root/benches/results/$(date -u +%F)-$slug}
mkdir -p "$out" || exit 2
commit=$(git -C "$root" rev-parse --short HEAD 2>/dev/null || echo unknown)
[ -z "$(git -C "$root" status --porcelain --untracked-files=no 2>/dev/null)" ] || commit=$commit-dirty
printf '{"gpu":"%s","driver":"%s","memory":"%s","clock":"%s","power_limit":"%s","cpu":"%s","threads":%s,"version":"%s","commit":"%s","date":"%s"}\n' \
    "${gpu:-none}" "$(field driver_version)" "$(field memory.total)" "$(field clocks.max.sm)" "$(field power.limit)" \
    "$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo 2>/dev/null | head -n 1)" "$(getconf _NPROCESSORS_ONLN)" \
    "$("$bin" --version)" "$commit" "$(date -u +%FT%TZ)" >"$out/machine.json"
cat "$out/machine.json"

# ---- steps ------------------------------------------------------------------------------------------------------

summary=()
failed=0
note() { summary+=("$(printf '%-30s %s' "$1" "$2")") && echo "$1: $2"; }
fail() { failed=1 && note "$1" "FAILED: $2"; }

"$bin" devices | tee "$out/devices.txt"
"$bin" devices --json >"$out/devices.jsonl" || fail devices "exit $?"

# Folders of conformance files that the build has an op for; the rest of the contract is listed as not there.
folders=()
absent=()
ops=$("$bin" kernels --json | sed -n 's/^{"op":"\([a-z_0-9]*\)".*/\1/p' | sort -u)
for folder in "$conformance"/*/; do
    [ -d "$folder" ] || continue
    if grep -qx "$(basename "$folder")" <<<"$ops"; then folders+=("$folder"); else absent+=("$(basename "$folder")"); fi
done
[ ${#absent[@]} = 0 ] || echo "no op yet for: ${absent[*]}"

for device in ${DEVICES:-cuda wgpu}; do
    if ! grep "\"device\":\"$device\"" "$out/devices.jsonl" | grep -q '"found":true'; then
        fail "$device" "not here: $(grep "^$device " "$out/devices.txt" | cut -d: -f2-)"
        continue
    fi
    if [ ${#folders[@]} = 0 ]; then
        fail "verify $device" "no conformance files at $conformance"
    else
        "$bin" verify "${folders[@]}" --device "$device" --json >"$out/verify-$device.jsonl" 2>"$out/verify-$device.txt"
        code=$?
        line=$(tail -n 1 "$out/verify-$device.txt")
        if [ $code = 0 ]; then note "verify $device" "$line"; else
            fail "verify $device" "exit $code, $line"
            grep '"passed":false' "$out/verify-$device.jsonl"
        fi
    fi
    if "$bin" bench --device "$device" --runs "${RUNS:-5}" --json --profile >"$out/bench-$device.jsonl" 2>"$out/bench-$device.txt"; then
        note "bench $device" "$(wc -l <"$out/bench-$device.jsonl") workloads"
        sed -n 's/.*"workload":"\([^"]*\)".*"median_s":\([^,]*\),.*"unit":"\([^"]*\)","rate":\([^,]*\),.*/  \1: \2 s, \4 \3 a second/p' "$out/bench-$device.jsonl"
    else
        fail "bench $device" "$(tail -n 1 "$out/bench-$device.txt")"
    fi
done

# ---- peers ------------------------------------------------------------------------------------------------------

# Bar 0: the ratio is what counts here. A peer without its package is left out.
: >"$out/peers.txt"
peer() {
    local workload=$1 device=$2 peer=$3 module=$4
    python3 -c "import $module" 2>/dev/null || { note "$workload, $device, $peer" "python3 has no $module" && return; }
    grep "\"device\":\"$device\"" "$out/devices.jsonl" | grep -q '"found":true' || return
    local line
    line=$(python3 "$peers" "$bin" "$workload" "$device" "$peer" 0 2>&1 | tail -n 1)
    echo "$workload $device $peer: $line" >>"$out/peers.txt"
    note "$workload, $device, $peer" "$line"
}
if [ -f "$peers" ] && command -v python3 >/dev/null; then
    for device in cpu ${DEVICES:-cuda wgpu}; do
        peer sweep_sma "$device" numba numba
        peer sweep_sma "$device" vectorbt vectorbt
        for workload in lstm lstm_train attention attention_train; do peer "$workload" "$device" torch torch; done
        peer models_train "$device" torch-loop torch
        peer hedge_delta "$device" torch torch
        peer hedge_delta "$device" pfhedge pfhedge
    done
else
    note peers "no python3 or no $peers"
fi

printf '\n=== summary, %s\n' "$out"
printf '%s\n' "${summary[@]}"
exit $failed
