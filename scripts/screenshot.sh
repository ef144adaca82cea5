#!/usr/bin/env bash
# Draws docs/report.png, the README's picture of report.html, from a real run.
#
#   scripts/screenshot.sh PRICES [ARGUMENT...]     further arguments go to forback sweep, such as --symbols SPY,TLT --select both
#   COMMAND=hedge PICTURE=hedge QUERY='theme=light#frontier' scripts/screenshot.sh --paths 1e6       docs/hedge.png, of forback hedge
#
#   COMMAND    command whose page it is     sweep
#   PICTURE    name in docs, without .png   report
#   FORBACK    release build of forback     target/release/forback
#   CHROMIUM   browser                      chromium
#   HEIGHT     pixels of the page to show   1500
#   QUERY      state of the page            theme=light
set -euo pipefail
cd "$(dirname "$0")/.."

usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" && exit 2; }
[ $# -ge 1 ] || usage
bin=${FORBACK:-target/release/forback}
[ -x "$bin" ] || { echo "$bin is not an executable: build it with cargo build --release" >&2 && exit 2; }
browser=${CHROMIUM:-chromium}
export XDG_RUNTIME_DIR=${XDG_RUNTIME_DIR:-/tmp}

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"$bin" "${COMMAND:-sweep}" "$@" --out "$scratch/out"
"$browser" --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update \
    --disable-sync --hide-scrollbars --user-data-dir="$scratch/profile" --window-size="1100,${HEIGHT:-1500}" --virtual-time-budget=10000 \
    --screenshot="$scratch/report.png" "file://$scratch/out/report.html?${QUERY:-theme=light}" 2>"$scratch/log"
[ -s "$scratch/report.png" ] || { cat "$scratch/log" >&2 && exit 1; }
bytes=$(wc -c <"$scratch/report.png")
[ "$bytes" -lt 400000 ] || { echo "the picture has $bytes bytes, 400000 is the limit: lower HEIGHT" >&2 && exit 1; }
mkdir -p docs
mv "$scratch/report.png" "docs/${PICTURE:-report}.png"
echo "docs/${PICTURE:-report}.png: $bytes bytes of $bin ${COMMAND:-sweep} $*"
