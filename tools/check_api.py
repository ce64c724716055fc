#!/usr/bin/env python3
"""Checks that every rpc of proto/pagetide/v1 says what it does and whether it may be retried.

    tools/check_api.py [--root DIR]

The comment right above an rpc must be there and must name its retry ("May be retried", "Retry: ..."). Prints
one line a finding (file:line: rpc, what is missing) and exits 1 if there is one, or if there is no rpc at all.
"""

import argparse
import pathlib
import re
import sys

RPC = re.compile(r"^\s*rpc\s+(\w+)\s*\(")
RETRY = re.compile(r"\bretry\b|\bretried\b", re.IGNORECASE)


def check(path):
    """Yields (line number, rpc, finding or None) for each rpc of a file."""
    comment = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        text = line.strip()
        if text.startswith("//"):
            comment.append(text[2:].strip())
            continue
        rpc = RPC.match(line)
        if rpc:
            words = " ".join(comment)
            finding = None
            if not words:
                finding = "has no comment"
            elif not RETRY.search(words):
                finding = "does not say whether it may be retried"
            yield number, rpc.group(1), finding
        comment = []


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--root", type=pathlib.Path,
                        default=pathlib.Path(__file__).resolve().parent.parent)
    root = parser.parse_args().root
    num_rpcs = num_findings = 0
    for path in sorted((root / "proto" / "pagetide" / "v1").glob("*.proto")):
        for number, rpc, finding in check(path):
            num_rpcs += 1
            if finding:
                num_findings += 1
                print(f"{path.relative_to(root)}:{number}: rpc {rpc} {finding}")
    if num_rpcs == 0:
        print(f"{root}: no rpc found")
    return 1 if num_findings or num_rpcs == 0 else 0


if __name__ == "__main__":
    sys.exit(main())
