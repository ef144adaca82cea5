#!/usr/bin/env bash
# Fuzzes everything that reads a user's bytes (fuzz/targets): prices as CSV and Parquet, grids, walk-forward schemes,
# config files. Needs a C++ compiler, which builds libFuzzer, and the stable Rust compiler: coverage comes from LLVM's own pass.
#
#   scripts/fuzz.sh                    every target, from its seeds, for FUZZ_SECONDS
#   scripts/fuzz.sh csv grid           some of them
#   scripts/fuzz.sh csv FILE           one input again
#
#   FUZZ_SECONDS   of each target      20
#
# A finding is left in target/fuzz/findings; what covers new code in target/fuzz/corpus, where the next run goes on. Exit 1 on a finding.
set -uo pipefail
cd "$(dirname "$0")/.."

work=$(realpath -m "${CARGO_TARGET_DIR:-target}")/fuzz
host=$(rustc -vV | sed -n 's/^host: //p')
all=$(sed -n 's|^path = "targets/\(.*\)\.rs"|\1|p' fuzz/Cargo.toml)

# With a target named, cargo keeps these flags from build scripts and procedural macros.
coverage="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters"
coverage+=" -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares"
RUSTFLAGS=$coverage cargo build --quiet --manifest-path fuzz/Cargo.toml --release --locked --target "$host" --target-dir "$work" || exit 1
binaries=$work/$host/release

# In memory where there is such a folder.
FUZZ_SCRATCH=$(mktemp -d -p "$([ -d /dev/shm ] && echo /dev/shm || echo "${TMPDIR:-/tmp}")")
export FUZZ_SCRATCH
trap 'rm -rf "$FUZZ_SCRATCH"' EXIT

if [ $# = 2 ] && [ -f "$2" ]; then
    "$binaries/$1" "$2"
    exit
fi

one() {
    local target=$1 log=$work/$1.log
    local corpus=$work/corpus/$target
    mkdir -p "$corpus" "$work/findings"
    "$binaries/$target" "$corpus" "fuzz/seeds/$target" -dict=fuzz/words.dict -max_total_time="${FUZZ_SECONDS:-20}" -max_len=4096 -timeout=60 \
        -rss_limit_mb=2048 -artifact_prefix="$work/findings/$target-" -print_final_stats=1 >"$log" 2>&1
    local code=$? runs cover
    runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
    cover=$(grep -o 'cov: [0-9]*' "$log" | tail -n 1)
    if [ $code = 0 ] && [ "${runs:-0}" -gt 0 ]; then
        printf '%-14s %9d runs, %s: nothing found\n' "$target" "$runs" "$cover"
    else
        printf '%-14s FINDING, exit %d\n' "$target" $code
        grep -v '^#' "$log" | tail -n 40
        return 1
    fi
}

failed=0
running=0
for target in ${*:-$all}; do
    one "$target" &
    running=$((running + 1))
    if [ $running -ge "$(getconf _NPROCESSORS_ONLN)" ]; then
        wait -n || failed=1
        running=$((running - 1))
    fi
done
while [ $running -gt 0 ]; do
    wait -n || failed=1
    running=$((running - 1))
done
exit $failed
