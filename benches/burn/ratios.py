"""forback against burn: burn's process stays, compared and tuned, and both are timed in turns. Called by run.sh.

  ratios.py BIN BURN [--rounds N] [--runs N] [--out FILE]     BIN, BURN: the binaries
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORKLOADS = ["lstm_train", "attention_train"]

parser = argparse.ArgumentParser()
parser.add_argument("bin")
parser.add_argument("burn")
parser.add_argument("--rounds", type=int, default=3)
parser.add_argument("--runs", type=int, default=5, help="timed steps a round, of which the median counts")
parser.add_argument("--out")
args = parser.parse_args()


def forback(peer):
    """The bench's line of burn's workload and shape; shapes after it are not run."""
    device = os.environ.get("FORBACK_DEVICE", "wgpu")
    command = [args.bin, "bench", peer["workload"], "--device", device, "--runs", str(args.runs), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as bench:
        line = next((line for line in map(json.loads, bench.stdout) if line["shape"] == peer["shape"]), None)
        bench.terminate()
    return line or sys.exit(f"{args.bin} gave no time of {peer['workload']} {peer['shape']}")


def machine():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown"


def commit():
    return subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], stdout=subprocess.PIPE, text=True).stdout.strip()


def main():
    burn = subprocess.Popen([args.burn, "--follow", "--runs", str(args.runs)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def theirs():
        try:
            burn.stdin.write("\n")
            burn.stdin.flush()
        except BrokenPipeError:
            pass
        lines = [burn.stdout.readline() for _ in WORKLOADS]
        if not all(lines):
            sys.exit("burn gave no times")
        return [json.loads(line) for line in lines]

    # Burn's first answer comes when its values are compared and its kernels tuned: nothing of that runs beside forback.
    rounds = []
    for _ in range(args.rounds):
        peers = theirs()
        rounds.append([(forback(peer), peer) for peer in peers])
    burn.stdin.close()
    burn.wait()

    now = datetime.datetime.now(datetime.timezone.utc)
    head = {"machine": machine(), "date": now.strftime("%FT%TZ"), "commit": commit(), "load": os.getloadavg()[0], "rounds": args.rounds}
    print(f"{head['machine']}, {rounds[0][0][0]['adapter']}, commit {head['commit']}; flops a second, medians of {args.rounds} rounds")
    print(f"{'workload':<20} {'peer':<9} {'forback':>10} {'peer':>10} {'ratio':>9}")
    lines = []
    for k, workload in enumerate(WORKLOADS):
        ours, peers = zip(*(pairs[k] for pairs in rounds))
        ratio = statistics.median(o["rate"] / p["peer_rate"] for o, p in zip(ours, peers))
        rate, peer_rate = (statistics.median(rates) for rates in ([o["rate"] for o in ours], [p["peer_rate"] for p in peers]))
        print(f"{workload:<20} {'burn':<9} {rate:>10.3g} {peer_rate:>10.3g} {ratio:>8.1f}x")
        line = {"workload": workload, "peer": "burn", "ratio": ratio, "forback_rate": rate, "peer_rate": peer_rate, "unit": "flops/s"}
        line |= {"device": ours[0]["device"], "threads": ours[0]["threads"], "adapter": ours[0]["adapter"], "peer_adapter": peers[0]["adapter"], "shape": ours[0]["shape"]}
        line |= {"forback_rates": [o["rate"] for o in ours], "peer_rates": [p["peer_rate"] for p in peers]}
        line |= {"compared": peers[0]["compared"]} | head | {"versions": peers[0]["versions"]}
        lines.append(json.dumps(line))
    slug = "".join(c if c.isalnum() else "-" for c in head["machine"].lower()).strip("-")
    path = Path(args.out) if args.out else ROOT / "benches/results" / f"{head['date'][:10]}-burn-{slug}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    print(f"written: {path}", file=sys.stderr)


main()
