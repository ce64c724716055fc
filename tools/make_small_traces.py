#!/usr/bin/env python3
"""Writes the two small traces that tests/replay reads, in the formats of the public ones.

Made from a seed, so that they contain no one's data and can be made again:
    tools/make_small_traces.py tests/replay/testdata
small_mooncake.jsonl  chats of several turns under four system prompts
small_weka.jsonl      coding-agent sessions, two models, sub-agents, rewritten contexts, long pauses
"""
import json
import pathlib
import random
import sys

PAGE_TOKENS = 512
BLOCK_TOKENS = 64


def mooncake(rng):
    """Yields requests by time; a turn repeats all full pages of the turn before and adds to them."""
    next_id = 0

    def new_ids(n):
        nonlocal next_id
        next_id += n
        return list(range(next_id - n, next_id))

    systems = [new_ids(rng.randint(1, 4)) for _ in range(4)]
    requests = []
    for _ in range(60):
        full = list(rng.choice(systems))
        t = rng.randrange(0, 300_000)
        for _ in range(rng.randint(1, 5)):
            full = full + new_ids(rng.randint(0, 6))
            rest = rng.randrange(0, PAGE_TOKENS)
            ids = full + (new_ids(1) if rest else [])
            requests.append({
                "timestamp": t,
                "input_length": len(full) * PAGE_TOKENS + rest,
                "output_length": rng.randint(1, 400),
                "hash_ids": ids,
            })
            t += rng.randrange(5_000, 60_000)
    requests.sort(key=lambda r: r["timestamp"])
    return requests


class WekaSession:
    """Block ids local to the session: a context is a list of ids, written as ranges."""

    def __init__(self, rng, name):
        self.rng = rng
        self.name = name
        self.next_id = 1

    def grow(self, context, blocks):
        self.next_id += blocks
        return context + list(range(self.next_id - blocks, self.next_id))

    def request(self, t, model, context):
        ranges = []
        for block in context:
            if ranges and ranges[-1][0] + ranges[-1][1] == block:
                ranges[-1][1] += 1
            else:
                ranges.append([block, 1])
        tokens = len(context) * BLOCK_TOKENS + self.rng.randrange(0, BLOCK_TOKENS)
        return {"t": round(t, 3), "in": tokens, "out": self.rng.randint(1, 300), "m": model,
                "h": ranges}

    def turns(self, model, n, first_blocks):
        context = self.grow([], first_blocks)
        t = 0.0
        out = []
        for _ in range(n):
            out.append(self.request(t, model, context))
            if self.rng.random() < 0.15:  # the tail was rewritten
                context = context[: max(1, len(context) - self.rng.randint(1, 40))]
            context = self.grow(context, self.rng.randint(1, 60))
            t += self.rng.choice([5, 12, 30, 90, 600]) * (0.5 + self.rng.random())
        return out

    def make(self):
        requests = self.turns("large-model", self.rng.randint(4, 20), self.rng.randint(60, 300))
        if self.rng.random() < 0.4:
            inner = self.turns("small-model", self.rng.randint(2, 6), self.rng.randint(20, 80))
            requests.insert(1, {"t": requests[0]["t"] + 1.0, "type": "subagent", "requests": inner})
        if self.rng.random() < 0.2:  # left overnight
            for request in requests[len(requests) // 2:]:
                request["t"] = round(request["t"] + 30_000, 3)
        return {"id": self.name, "bs": BLOCK_TOKENS, "scope": "local", "requests": requests}


def write(path, lines):
    with path.open("w", encoding="utf-8") as f:
        for line in lines:
            f.write(json.dumps(line, separators=(",", ":")) + "\n")


def main():
    folder = pathlib.Path(sys.argv[1])
    write(folder / "small_mooncake.jsonl", mooncake(random.Random(1)))
    rng = random.Random(2)
    write(folder / "small_weka.jsonl",
          [WekaSession(rng, f"session_{i:02}").make() for i in range(20)])


if __name__ == "__main__":
    main()
