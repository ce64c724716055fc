#!/usr/bin/env python3
"""Two engines with KV pools of their own on the host of one worker: the first prefills a prompt and stores it, the
second, with another layout, loads it and computes only what is new.

    engine_pool.py --router HOST:PORT

The "model" is a formula, so that every byte of a row can be checked; the loop around it is an engine's: blocks from a
free list, a load, a prefill of the rest, a store.
"""

from __future__ import annotations

import argparse
import contextlib

import numpy as np

import pagetide
from pagetide.v1 import model_pb2

LAYERS = 4


def model_spec() -> model_pb2.ModelSpec:
    group = model_pb2.LayerGroup(
        kind=model_pb2.LayerGroup.KIND_FULL, layers=range(LAYERS), kv_heads=2, k_dim=64, v_dim=64,
        k_type=model_pb2.DATA_TYPE_F16, v_type=model_pb2.DATA_TYPE_F16)
    return model_pb2.ModelSpec(
        name="engine-example", weights_digest=b"x" * 32, tokenizer_digest=b"y" * 32,
        geometry=model_pb2.Geometry(page_tokens=32, groups=[group]))


class Engine:
    """An engine's own side: memory, a free list, and a prefill."""

    def __init__(self, client: pagetide.Client, model: pagetide.Model, name: str,
                 layout: pagetide.EngineLayout) -> None:
        self.model, self.layout, self.name = model, layout, name
        self.memory = pagetide.EngineMemory(layout.num_bytes(model))
        self.pool = client.register_engine_pool(model, self.memory, layout, name)
        self.free = list(range(1, layout.num_blocks))  # block 0 is the null block

    def close(self) -> None:
        self.pool.close()
        self.memory.close()

    def run(self, prompt: np.ndarray) -> None:
        """What an engine does with a prompt."""
        needed = -(-len(prompt) // self.layout.block_tokens)
        blocks, self.free = self.free[:needed], self.free[needed:]

        loaded = self.finish("load", self.pool.load_pages(prompt, blocks)).usable_tokens
        self.prefill(prompt, blocks, loaded)
        print(f"{self.name}: {loaded} of {len(prompt)} tokens loaded, {len(prompt) - loaded} computed, "
              f"{self.wrong_bytes(prompt, blocks)} wrong bytes")

        stored = self.finish("store", self.pool.store_pages(prompt, blocks))
        print(f"{self.name}: {stored.usable_tokens} tokens are known now: {stored.state.moved_pages} pages "
              f"copied, {stored.state.known_pages} were known")
        self.free += blocks

    def finish(self, what: str, job: pagetide.EngineJob) -> pagetide.EngineJob:
        """Waits for a job. Whatever goes wrong meanwhile, the job works on no block any more afterwards:
        one that nobody waits for any more would go on, in blocks that are somebody else's by then."""
        try:
            job.wait()
        except pagetide.PageTideError as error:
            # Late, or a page was lost, or the answer was: what the job states is right.
            print(f"{self.name}: the {what} ended early: {error}")
            job.cancel()
        except BaseException:
            job.cancel()
            raise
        return job

    def rows(self, prompt: np.ndarray, layer: int, kind: pagetide.RowKind) -> np.ndarray:
        """What the model computes: [token, head, byte], from all tokens up to each."""
        row = self.model.groups[0].row_bytes(kind)
        history = np.cumsum(prompt.astype(np.uint64) * 2654435761 + 1)
        column = np.arange(row, dtype=np.uint64) + 3
        mixed = (history[:, None] >> 7) * column + layer * 101 + int(kind) * 37
        return (mixed & 0xFF).astype(np.uint8).reshape(len(prompt), 2, row // 2)

    def _slots(self, blocks: list[int], begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        tokens = np.arange(begin, end)
        return np.asarray(blocks)[tokens // self.layout.block_tokens], tokens % self.layout.block_tokens

    def prefill(self, prompt: np.ndarray, blocks: list[int], begin: int) -> None:
        at = self._slots(blocks, begin, len(prompt))
        for layer in range(LAYERS):
            for kind in pagetide.RowKind:
                view = self.layout.rows(self.model, self.memory, 0, layer, kind)
                view[at] = self.rows(prompt, layer, kind)[begin:]

    def wrong_bytes(self, prompt: np.ndarray, blocks: list[int]) -> int:
        at = self._slots(blocks, 0, len(prompt))
        return sum(
            int(np.count_nonzero(self.layout.rows(self.model, self.memory, 0, layer, kind)[at] !=
                                 self.rows(prompt, layer, kind)))
            for layer in range(LAYERS) for kind in pagetide.RowKind)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--router", required=True)
    arguments = parser.parse_args()
    random = np.random.default_rng(1)
    system = random.integers(0, 32000, 200)
    with pagetide.Client(router=arguments.router) as client, contextlib.ExitStack() as engines:
        model = client.register_model(model_spec())
        first = Engine(client, model, "first", pagetide.EngineLayout(block_tokens=16, num_blocks=64))
        engines.callback(first.close)
        second = Engine(client, model, "second", pagetide.EngineLayout(
            block_tokens=8, num_blocks=128, heads="HND", block_major=True))
        engines.callback(second.close)
        first.run(np.concatenate([system, random.integers(0, 32000, 50)]))
        second.run(np.concatenate([system, random.integers(0, 32000, 70)]))


if __name__ == "__main__":
    main()
