#!/usr/bin/env bash
# Compiles every kernel's CUDA unit with NVRTC 12 and 13 for sm_75, 80, 90 and 100, and asks ptxas for registers, shared memory and
# spills. Fails on a unit that does not compile and on a spill that the head of the kernel's .cu does not explain (`spill: reason`).
# Needs no GPU and no CUDA toolkit: NVRTC and ptxas come from pip, into target/nvrtc (some 300 MB).
#
#   scripts/nvrtc.sh               the units of ${FORBACK:-target/release/forback}
#   UNITS=dir scripts/nvrtc.sh     the units in a directory, one <kernel>.cu each
#   ARCHS="80 13:90" scripts/nvrtc.sh  other architectures, the second with NVRTC 13 alone
#   ARCHS=12:75,13:90 scripts/nvrtc.sh  each unit for one of them, in turns: half the time
#   SKIP='hmm_*' scripts/nvrtc.sh  without these units, which are named
set -euo pipefail
cd "$(dirname "$0")/.."

work=${CARGO_TARGET_DIR:-target}/nvrtc
venv=$work/venv
packages="nvidia-cuda-nvrtc-cu12==12.4.127 nvidia-cuda-nvcc-cu12==12.4.131 nvidia-cuda-nvrtc==13.5.37 nvidia-cuda-nvcc==13.5.37"

mkdir -p "$work"
if [ "$(cat "$work/packages" 2>/dev/null || true)" != "$packages" ]; then
    python3 -m venv --clear "$venv"
    # shellcheck disable=SC2086
    "$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps $packages
    echo "$packages" >"$work/packages"
fi

if [ -z "${UNITS:-}" ]; then
    UNITS=$work/units
    rm -rf "$UNITS"
    mkdir -p "$UNITS"
    "${FORBACK:-${CARGO_TARGET_DIR:-target}/release/forback}" kernels --cuda-units "$UNITS"
fi
for unit in "$UNITS"/${SKIP:-none}.cu; do
    if [ -e "$unit" ]; then
        echo "left out: $(basename "$unit")"
        rm "$unit"
    fi
done
"$venv/bin/python" scripts/nvrtc.py "$UNITS" ${ARCHS:-75 80 90 100}
