#!/usr/bin/env bash
# Every check that needs no GPU: formatting, lints, all tests on every device that this machine can have, documentation.
#
#   scripts/test.sh                       some minutes on two cores
#   FORBACK_REQUIRE=cpu scripts/test.sh   without a Vulkan driver or a C++ compiler
#
# What FORBACK_REQUIRE names (default cpu,wgpu,cuda-host,chromium) must be there, or its tests fail. On Debian and Ubuntu what is
# needed is installed first: a software Vulkan driver (llvmpipe) for wgpu, a C++ compiler for cuda-host, a browser for the report.
set -uo pipefail
cd "$(dirname "$0")/.."

export FORBACK_REQUIRE=${FORBACK_REQUIRE-cpu,wgpu,cuda-host,chromium}
export CARGO_TERM_COLOR=${CARGO_TERM_COLOR:-never}
unset FORBACK_DEVICE FORBACK_CHECKED FORBACK_SCHEDULE FORBACK_BLESS

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# Vulkan drivers complain on stderr where it is not set.
export XDG_RUNTIME_DIR=${XDG_RUNTIME_DIR:-$scratch}

# ---- what the tests need ----------------------------------------------------------------------------------------

has_vulkan() {
    [ -n "${VK_DRIVER_FILES:-}${VK_ICD_FILENAMES:-}" ] && return 0
    ldconfig -p 2>/dev/null | grep -q 'libvulkan\.so\.1' || return 1
    compgen -G '/usr/share/vulkan/icd.d/*.json' >/dev/null || compgen -G '/etc/vulkan/icd.d/*.json' >/dev/null
}

has_browser() {
    local name
    # Ubuntu's package of that name is a stub that asks for a snap: only a browser that starts counts.
    for name in chromium chromium-browser google-chrome; do "$name" --version >/dev/null 2>&1 && return 0; done
    return 1
}

install_missing() {
    local packages=() as_root=()
    if [[ ,$FORBACK_REQUIRE, == *,wgpu,* ]] && ! has_vulkan; then packages+=(libvulkan1 mesa-vulkan-drivers); fi
    if [[ ,$FORBACK_REQUIRE, == *,cuda-host,* ]] && ! command -v "${CXX:-c++}" g++ clang++ >/dev/null; then packages+=(g++); fi
    if [[ ,$FORBACK_REQUIRE, == *,chromium,* ]] && ! has_browser; then packages+=(chromium fonts-liberation); fi
    [ ${#packages[@]} -gt 0 ] || return 0
    if [ "$(id -u)" != 0 ]; then as_root=(sudo -n); fi
    if ! command -v apt-get >/dev/null; then
        echo "missing: ${packages[*]} (Debian's names), and there is no apt-get to install them; the tests that need them will fail"
    elif [ ${#as_root[@]} -gt 0 ] && ! sudo -n true 2>/dev/null; then
        echo "missing: ${packages[*]}; install them with: sudo apt-get install ${packages[*]}"
    else
        echo "installing ${packages[*]}"
        { "${as_root[@]}" apt-get update -qq && "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null; } ||
            echo "apt-get failed; the tests that need them will fail"
    fi
}
if [ "$(uname)" = Linux ]; then install_missing; fi

# ---- steps ------------------------------------------------------------------------------------------------------

steps=()
failed=0
step() {
    local name=$1 start=$SECONDS verdict=ok
    shift
    printf '\n=== %s: %s\n' "$name" "$*"
    "$@" 2>&1 | tee -a "$scratch/log"
    if [ "${PIPESTATUS[0]}" != 0 ]; then verdict=FAILED failed=1; fi
    steps+=("$(printf '%-40s %6d s  %s' "$name" $((SECONDS - start)) "$verdict")")
}

# Every line that an example's header promises must be printed; a line with … names the machine.
examples() {
    local file name out line
    for file in examples/*.rs; do
        name=$(basename "$file" .rs)
        out=$(cargo run -q --all-features --example "$name") || return 1
        printf '%s\n%s\n' "$name" "$out"
        sed -n '/^\/\/! prints/,/^[^/]/s|^//!     ||p' "$file" >"$scratch/promised"
        [ -s "$scratch/promised" ] || { echo "$file: its header promises no output" && return 1; }
        while IFS= read -r line; do
            [[ $line == *…* || $'\n'$out$'\n' == *$'\n'"$line"$'\n'* ]] || { echo "$file: its header promises '$line'" && return 1; }
        done <"$scratch/promised"
    done
}

all=(--workspace --all-features)
step "formatting" cargo fmt --all --check
step "lints" cargo clippy "${all[@]}" --all-targets -- -D warnings
step "library alone" cargo clippy --no-default-features -- -D warnings
step "command line on the CPU alone" cargo clippy --no-default-features --features cli -- -D warnings
step "tests" cargo test "${all[@]}" --no-fail-fast
# tests/conformance.rs and tests/nn.rs open wgpu with and without run-time checks, and cuda-host in several schedules; the others ask the environment.
step "shaders with run-time checks" env FORBACK_CHECKED=1 cargo test --all-features --no-fail-fast --test devices
step "cuda-host, threads in reverse" env FORBACK_SCHEDULE=reverse cargo test --all-features --no-fail-fast --test devices
step "cuda-host, threads at random" env FORBACK_SCHEDULE=7 cargo test --all-features --no-fail-fast --test devices
step "examples" examples
# Names what ran: the binary that the tests ran, with every feature (cargo run would build it anew, without what tests add).
step "devices of this machine" "${CARGO_TARGET_DIR:-target}/debug/forback" devices
step "documentation" env RUSTDOCFLAGS=-Dwarnings cargo doc "${all[@]}" --no-deps

# ---- summary ----------------------------------------------------------------------------------------------------

printf '\n=== summary (required devices: %s)\n' "${FORBACK_REQUIRE:-none}"
printf '%s\n' "${steps[@]}"
grep -a '^test .* FAILED$' "$scratch/log" | sort -u
awk '/^test result: / { passed += $4; failed += $6; ignored += $8 } END { printf "in all runs: %d tests passed, %d failed, %d ignored\n", passed, failed, ignored }' "$scratch/log"
exit $failed
