#!/usr/bin/env python3
"""Time to first token with a real model, cold and warm, against what llama.cpp can do by itself.

    tests/connectors/llama_cpp/run.sh ttft [--tokens 256,512,…] [--repeat N] [--flash-attn] [--threads N] [--json FILE]

One run, one machine, the same prompts: a prefix of so many tokens and 16 more. Warm figures are medians.
  cold            a fresh context computes the whole prompt, without PageTide and with it, in turn
  ask             what PageTide adds in front of the first token of a cold prompt, by the connector's own clock
  cut             cutting its pages out to store them, behind the first token
  warm            PageTide: ask, load pages, compute the rest; from frames on this host
  live            the context holds the prefix already and computes the rest: nothing can be faster
  sequence state  llama_state_seq_set_data of the prefix from this process's memory, then the rest
  state file      llama_state_seq_load_file from disk, then the rest
  LlamaRAMCache   the wrapper's own cache (it copies all logits; beating it proves little)
  PageTideCache   PageTide behind the wrapper's cache interface: "get" as the wrapper does it, then the rest; "set"
                  is what a completion pays at its end: save_state of the wrapper and the entry
PageTide's own cost is warm minus sequence state, which is set_data and the rest from memory.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
from typing import Any, Callable

import llama_cpp
import llama_cpp.llama_cpp as lc
from engine import open_engine
from fleet import Fleet
from real_model import LICENSES, TEXTS

import pagetide_llama_cpp as pt

MODEL = pathlib.Path(os.environ.get("PAGETIDE_LLAMA_MODEL", ""))
SUFFIX_TOKENS = 16


def timed(work: Callable[[], Any]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


class Bench:
    def __init__(self, arguments: dict[str, Any], n_ctx: int, repeat: int, folder: pathlib.Path) -> None:
        self.repeat = repeat
        self.folder = folder
        self.llama = open_engine(MODEL, n_ctx=n_ctx, **arguments)
        self.memory = lc.llama_get_memory(self.llama.ctx)
        text = "".join((LICENSES / name).read_text(errors="replace") for name in TEXTS)
        self.text = self.llama.tokenize(text.encode(), add_bos=True)

    def clear(self) -> None:
        lc.llama_memory_clear(self.memory, False)
        self.llama.reset()
        self.llama.input_ids[:] = -1

    def first_token(self, prompt: list[int]) -> None:
        # Kept: what follows when it ends is not the first token's time.
        self.generation = self.llama.generate(prompt, temp=0.0)
        next(self.generation)

    def time_of(self, work: Callable[[], Any]) -> float:
        seconds = timed(work)
        self.generation.close()
        return seconds

    def median(self, prepare: Callable[[], None], work: Callable[[], Any]) -> float:
        seconds = []
        for _ in range(self.repeat):
            prepare()
            seconds.append(self.time_of(work))
        return statistics.median(seconds)

    def cold(self, prompt: list[int], router: str, result: dict[str, float]) -> pt.Connector:
        """Medians of prompts that nobody has, the last of them `prompt`. The engine is attached afterwards."""
        without, with_it, asks, cuts = [], [], [], []
        for number in range(self.repeat):
            is_last = number == self.repeat - 1
            other = prompt if is_last else [prompt[0], 1000 + len(prompt) + number, *prompt[2:]]
            self.clear()
            without.append(self.time_of(lambda: self.first_token(other)))
            self.clear()
            connector = pt.attach(self.llama, router=router)
            assert not connector.refused_because, connector.refused_because
            with_it.append(self.time_of(lambda: self.first_token(other)))
            report = connector.last
            assert report is not None and report.loaded_tokens == 0, report
            asks.append(report.ask_seconds)
            cuts.append(report.cut_seconds)
            assert connector.flush(60)
            if not is_last:
                connector.detach()
        result.update({"cold": statistics.median(without), "cold with PageTide": statistics.median(with_it),
                       "its ask": statistics.median(asks), "its cut": statistics.median(cuts)})
        return connector

    def run(self, tokens: int, router: str) -> dict[str, float]:
        llama = self.llama
        # A prefix of its own for each length, so that no length is warmed by another.
        prefix = [self.text[0]] + self.text[1 + tokens:2 * tokens]
        prompts = [prefix + self.text[at:at + SUFFIX_TOKENS] for at in (100, 200)]
        result: dict[str, float] = {"tokens": tokens}

        self.clear()
        self.first_token(prompts[0])

        # What the context holds now serves the baselines: its first `tokens` are the prefix.
        def cut() -> None:
            lc.llama_memory_seq_rm(self.memory, 0, tokens, -1)
            llama.n_tokens = tokens
            llama._requires_eval = True

        result["live"] = self.median(cut, lambda: self.first_token(prompts[1]))
        cut()
        size = lc.llama_state_seq_get_size(llama.ctx, 0)
        state = (ctypes.c_uint8 * size)()
        assert lc.llama_state_seq_get_data(llama.ctx, state, size, 0) == size
        path = str(self.folder / f"{tokens}.state").encode()
        ids = (lc.llama_token * tokens)(*prefix)
        assert lc.llama_state_seq_save_file(llama.ctx, path, 0, ids, tokens) > 0

        def claim() -> None:
            llama.n_tokens = tokens
            llama.input_ids[:tokens] = prefix
            llama._requires_eval = True

        def by_state() -> None:
            assert lc.llama_state_seq_set_data(llama.ctx, state, size, 0) == size
            claim()
            self.first_token(prompts[1])

        def by_file() -> None:
            count = ctypes.c_size_t()
            out = (lc.llama_token * tokens)()
            assert lc.llama_state_seq_load_file(llama.ctx, path, 0, out, tokens, ctypes.byref(count)) > 0
            claim()
            self.first_token(prompts[1])

        result["sequence state"] = self.median(self.clear, by_state)
        result["state file"] = self.median(self.clear, by_file)

        self.clear()
        self.first_token(prefix + prompts[0][tokens:])  # as the cold one: what the wrapper would save
        cache = llama_cpp.LlamaRAMCache(capacity_bytes=8 << 30)
        cut()
        cache[prefix] = llama.save_state()

        def by_cache() -> None:
            llama.load_state(cache[prompts[1]])
            self.first_token(prompts[1])

        result["LlamaRAMCache"] = self.median(self.clear, by_cache)
        del cache

        connector = self.cold(prompts[0], router, result)
        loads = []

        def warm() -> None:
            self.first_token(prompts[1])
            assert connector.last is not None and connector.last.loaded_tokens == tokens, connector.last
            loads.append((connector.last.ask_seconds, connector.last.load_seconds))

        result["warm"] = self.median(self.clear, warm)
        result["ask"] = statistics.median(a for a, _ in loads)
        result["load"] = statistics.median(b for _, b in loads)
        result["own cost"] = result["warm"] - result["sequence state"]
        connector.detach()

        shim = pt.PageTideCache(llama, router)

        def by_shim() -> None:
            entry = shim[prompts[1]]
            assert entry.n_tokens == tokens, shim.connector.last
            self.first_token(prompts[1])

        result["PageTideCache"] = self.median(self.clear, by_shim)

        def save() -> None:
            shim[prompts[1]] = llama.save_state()

        result["its set"] = self.median(lambda: None, save)
        shim.close()
        return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", default="256,512,1024,2048,4096")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--flash-attn", action="store_true")
    parser.add_argument("--threads", type=int, default=2, help="of the engine (default 2)")
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    lengths = [int(n) for n in options.tokens.split(",")]
    with tempfile.TemporaryDirectory(prefix="pt-ttft-") as name:
        folder = pathlib.Path(name)
        fleet = Fleet(folder, pool="1GiB")
        results = []
        try:
            bench = Bench({"flash_attn": options.flash_attn, "n_threads": options.threads,
                           "n_threads_batch": options.threads}, max(lengths) + 256, options.repeat, folder)
            columns = ["cold", "cold with PageTide", "its ask", "its cut", "warm", "live", "sequence state",
                       "state file", "LlamaRAMCache", "own cost", "ask", "load", "PageTideCache", "its set"]
            print("seconds     " + "  ".join(f"{c:>{max(len(c), 8)}}" for c in columns), flush=True)
            for tokens in lengths:
                result = bench.run(tokens, fleet.router.grpc)
                results.append(result)
                print(f"{tokens:6} + 16 " + "  ".join(
                    f"{result[c]:{max(len(c), 8)}.4f}" for c in columns), flush=True)
        finally:
            fleet.close()
    if options.json:
        options.json.write_text(json.dumps({"suffix": SUFFIX_TOKENS, "results": results}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
