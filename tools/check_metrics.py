#!/usr/bin/env python3
"""Holds docs/metrics.md against the metrics that the code registers.

    tools/check_metrics.py [--root DIR]

Metric names are string literals "pagetide_..." of the folders that register them. Each must be the first cell of
one row of the page, and each such row must name a metric of the code; the alarms may name no other. Prints one line
a finding and exits 1 if there is one, or if no metric is found at all.
"""

import argparse
import pathlib
import re
import sys

FOLDERS = ["base", "core", "kvstore", "rpc", "services", "worker"]
LITERAL = re.compile(r'"(pagetide_[a-z0-9_]+)"')
# Literals of that form that name something else.
NOT_METRICS = {"pagetide_service_lister"}  # a plugin of the gRPC server
ROW = re.compile(r"^\| `(pagetide_[a-z0-9_]+)` \|")
MENTION = re.compile(r"`(pagetide_[a-z0-9_]+)")
PREFIX = re.compile(r"^pagetide_[a-z]+_$")  # "`pagetide_rpc_`", of a heading


def metrics_of_code(root):
    names = set()
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in {".h", ".cc"}:
                names.update(LITERAL.findall(path.read_text(encoding="utf-8")))
    return names - NOT_METRICS


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--root", type=pathlib.Path,
                        default=pathlib.Path(__file__).resolve().parent.parent)
    root = parser.parse_args().root
    code = metrics_of_code(root)
    page = root / "docs" / "metrics.md"
    lines = page.read_text(encoding="utf-8").splitlines() if page.exists() else []
    rows = [row.group(1) for row in map(ROW.match, lines) if row]
    mentions = {name for line in lines for name in MENTION.findall(line) if not PREFIX.match(name)}
    findings = [f"{name}: registered by the code, no row in docs/metrics.md" for name in code - set(rows)]
    findings += [f"{name}: in docs/metrics.md, not registered by the code" for name in mentions - code]
    findings += [f"{name}: several rows in docs/metrics.md" for name in set(rows) if rows.count(name) > 1]
    if not code:
        findings.append(f"{root}: no metric found")
    print("\n".join(sorted(findings)) if findings else f"metrics: {len(code)} documented")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
