#!/usr/bin/env python3
"""Checks that docs/conformance.md names tests that are there and carry the label `conformance`.

    tools/check_conformance.py [--root DIR]

Names are the last cell of a table row whose header ends in "tests". Prints one line a wrong name and exits 1
if there is one, or if there are none at all.
"""

import argparse
import pathlib
import re
import sys

TARGET = re.compile(r"pagetide_test\(([^)]*)\)", re.DOTALL)
TEST = re.compile(r"^TEST(?:_F|_P)?\(\s*\w+,\s*(\w+)\)", re.MULTILINE)
KEYWORDS = {"SRCS", "LIBS", "LABELS", "TIMEOUT", "ALONE"}


def labelled_tests(root):
    """Name → whether one of the targets that hold it has the label."""
    found = {}
    for lists in (root / "tests").rglob("CMakeLists.txt"):
        for arguments in TARGET.findall(lists.read_text(encoding="utf-8")):
            sections, section = {"": []}, ""
            for word in arguments.split():
                if word in KEYWORDS:
                    section = word
                    sections.setdefault(section, [])
                else:
                    sections[section].append(word)
            has_label = "conformance" in sections.get("LABELS", [])
            for source in sections.get("SRCS", []):
                path = lists.parent / source
                if not path.exists():
                    continue
                for name in TEST.findall(path.read_text(encoding="utf-8")):
                    found[name] = found.get(name, False) or has_label
    return found


def named_tests(page):
    """(line number, name) of every test that the page names."""
    is_table = False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            is_table = False
        elif cells[-1] == "tests":
            is_table = True
        elif is_table and not set(cells[-1]) <= {"-", ":"}:
            for name in cells[-1].split(","):
                yield number, name.strip()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=pathlib.Path,
                        default=pathlib.Path(__file__).resolve().parent.parent)
    root = parser.parse_args().root
    tests = labelled_tests(root)
    page = root / "docs" / "conformance.md"
    named = list(named_tests(page)) if page.exists() else []
    wrong = 0
    for number, name in named:
        if tests.get(name, False):
            continue
        wrong += 1
        why = "does not carry the label conformance" if name in tests else "is not there"
        print(f"docs/conformance.md:{number}: test {name} {why}")
    if not named:
        print("docs/conformance.md names no test")
    return 1 if wrong or not named else 0


if __name__ == "__main__":
    sys.exit(main())
