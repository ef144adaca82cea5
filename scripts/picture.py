"""Runs forback and draws its terminal output as docs/COMMAND.svg (docs/sweep.svg), a picture of the README.

usage: scripts/picture.py [BINARY] [ARGUMENT...]     default: target/release/forback sweep
"""

import os
import subprocess
import sys
import tempfile
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Pixels; a monospaced character is 0.6 of the font size wide.
FONT, LINE, MARGIN = 13, 19, 16
# Readable on white and on black: the text is one grey, the frame another.
TEXT, PROMPT, FRAME = "#7d8590", "#2f81f7", "#8b949e"


def main():
    binary = sys.argv[1] if len(sys.argv) > 1 else str(ROOT / "target/release/forback")
    arguments = sys.argv[2:] or ["sweep"]
    environment = {"XDG_RUNTIME_DIR": tempfile.gettempdir(), **os.environ}
    run = subprocess.run([binary, *arguments], capture_output=True, text=True, env=environment, check=True)
    lines = [f"$ forback {' '.join(arguments)}", *run.stdout.rstrip("\n").split("\n")]
    width = round(max(map(len, lines)) * FONT * 0.6 + 2 * MARGIN)
    height = len(lines) * LINE + 2 * MARGIN
    rows = []
    for i, line in enumerate(lines):
        colour = PROMPT if i == 0 else TEXT
        # textLength keeps the columns aligned whatever the font.
        length = f' textLength="{len(line) * FONT * 0.6:.1f}"' if line.strip() else ""
        rows.append(f'<text x="{MARGIN}" y="{MARGIN + (i + 0.75) * LINE:.1f}" fill="{colour}"{length} xml:space="preserve">{escape(line)}</text>')
    svg = f"""<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" aria-label="terminal output of forback {' '.join(arguments)}">
<rect x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8" fill="none" stroke="{FRAME}" stroke-opacity="0.5"/>
<g style="white-space: pre" font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace" font-size="{FONT}">
{chr(10).join(rows)}
</g>
</svg>
"""
    (ROOT / "docs").mkdir(exist_ok=True)
    picture = f"docs/{arguments[0]}.svg"
    (ROOT / picture).write_text(svg, encoding="utf-8")
    print(f"{picture}: {len(lines)} lines of {binary} {' '.join(arguments)}")


if __name__ == "__main__":
    main()
