"""Bars of the scenes' times to first token, as an SVG file: no plotting package is needed for twenty rectangles."""

from __future__ import annotations

import pathlib
from typing import Any
from xml.sax.saxutils import escape

COLOURS = ["#8c8c8c", "#c6dbef", "#9ecae1", "#6baed6", "#3182bd", "#08519c"]
BAR, GAP, LEFT, WIDTH, HEAD = 18, 4, 150, 520, 46


def write_plot(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """One bar a row: mean seconds to the first token of its prompts."""
    means = [row["seconds"] / row["prompts"] for row in rows]
    longest = max(means)
    out, y, scene, colour = [], HEAD, None, 0
    for row, mean in zip(rows, means):
        if row["scene"] != scene:
            scene, colour = row["scene"], 0
            y += 22
            out.append(f'<text x="8" y="{y - 6}" font-weight="bold">{escape(row["scene"])}</text>')
        width = max(mean / longest * WIDTH, 1)
        label = f"{mean:.2f} s" + (f" ({row['faster']:.1f} times faster)" if row["faster"] >= 1.05 else "")
        out.append(f'<text x="{LEFT - 6}" y="{y + BAR - 5}" text-anchor="end">{escape(row["condition"])}</text>')
        out.append(f'<rect x="{LEFT}" y="{y}" width="{width:.1f}" height="{BAR}" '
                   f'fill="{COLOURS[colour % len(COLOURS)]}"/>')
        out.append(f'<text x="{LEFT + width + 6:.1f}" y="{y + BAR - 5}">{escape(label)}</text>')
        y += BAR + GAP
        colour += 1
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 200}" height="{y + 12}" '
        'font-family="sans-serif" font-size="12">\n<rect width="100%" height="100%" fill="white"/>\n'
        '<text x="8" y="22" font-size="15">Mean time to first token, llama.cpp without and with PageTide</text>\n' +
        "\n".join(out) + "\n</svg>\n")
