#!/usr/bin/env python3
"""KV rows as tensors, without a copy, in both kinds of pool: the worker's own frames, mapped read-only, under a
lease; and an engine's pool, which pages are loaded into and stored from.

    dlpack_pools.py --router HOST:PORT

With NumPy, with PyTorch where it is installed, and with CuPy where it is and there is a GPU: host memory goes
there by one copy. Device memory is not exported by workers yet.
"""

from __future__ import annotations

import argparse
from typing import Any, Callable, Iterator

import numpy as np

import pagetide
from pagetide.v1 import model_pb2

LAYERS, HEADS, DIM, PAGE = 2, 2, 32, 16


def libraries() -> Iterator[tuple[str, Callable[[Any], Any], Callable[[Any], np.ndarray]]]:
    """A name, from_dlpack, and the way back for comparing."""
    yield "numpy", np.from_dlpack, np.asarray
    try:
        import torch
        yield "torch", torch.from_dlpack, lambda tensor: tensor.numpy()
    except ImportError:
        pass
    try:
        import cupy
        if cupy.cuda.is_available():
            yield "cupy", lambda view: cupy.asarray(np.from_dlpack(view)), cupy.asnumpy
    except ImportError:
        pass


def model_spec() -> model_pb2.ModelSpec:
    group = model_pb2.LayerGroup(
        kind=model_pb2.LayerGroup.KIND_FULL, layers=range(LAYERS), kv_heads=HEADS, k_dim=DIM, v_dim=DIM,
        k_type=model_pb2.DATA_TYPE_F16, v_type=model_pb2.DATA_TYPE_F16)
    return model_pb2.ModelSpec(
        name="dlpack-example", weights_digest=b"z" * 32, tokenizer_digest=b"y" * 32,
        geometry=model_pb2.Geometry(page_tokens=PAGE, groups=[group]))


def rows(prompt: np.ndarray, layer: int, kind: pagetide.RowKind) -> np.ndarray:
    """What the "model" computes: [token, head, dim] of f16, from all tokens up to each."""
    history = np.cumsum(prompt.astype(np.int64) * 31 + 7)[:, None]
    mixed = (history * (np.arange(HEADS * DIM) + 3) + layer * 101 + int(kind) * 37) % 2039 - 1019
    return (mixed / 64).astype(np.float16).reshape(len(prompt), HEADS, DIM)


def owned(client: pagetide.Client, model: pagetide.Model, prompt: np.ndarray) -> None:
    """Rows that were appended by RPC are read where they are."""
    group = model.groups[0]
    with client.open(model, prompt, no_reuse=True) as sequence:
        with sequence.begin_append(prompt) as append:
            for layer in range(LAYERS):
                for kind in pagetide.RowKind:
                    append.write_rows(0, layer, kind, 0, rows(prompt, layer, kind))
            append.commit()
        lease = sequence.lease_pages(seconds=20)
        if lease is None:
            raise SystemExit("owned: this worker's frames cannot be mapped here")
        for name, from_dlpack, to_numpy in libraries():
            wrong = pages = 0
            for begin in range(0, len(prompt), PAGE):
                page = lease.page(0, begin)
                assert page is not None
                count = min(PAGE, len(prompt) - begin)
                pages += 1
                for layer in range(LAYERS):
                    for kind in pagetide.RowKind:
                        at = group.offset(layer, kind, PAGE)
                        block = page[at:at + PAGE * group.row_bytes(kind)].view(np.float16)
                        tensor = from_dlpack(pagetide.DlpackView(block.reshape(PAGE, HEADS, DIM)))
                        expected = rows(prompt, layer, kind)[begin:begin + count]
                        wrong += int(np.count_nonzero(to_numpy(tensor[:count]) != expected))
            # Afterwards: behind its end a frame may have become another page's while it was read.
            if not lease.is_valid():
                raise SystemExit("owned: the lease ended, what was read is worth nothing")
            print(f"owned: {name}: {pages} pages in place, {wrong} wrong elements")


def registered(client: pagetide.Client, model: pagetide.Model, prompt: np.ndarray) -> None:
    """Rows that an engine's tensors hold are stored, and loaded into other blocks of them."""
    layout = pagetide.EngineLayout(block_tokens=8, num_blocks=64)
    memory = pagetide.EngineMemory(layout.num_bytes(model))
    blocks = -(-len(prompt) // layout.block_tokens)
    mine, others = list(range(1, 1 + blocks)), list(range(1 + blocks, 1 + 2 * blocks))
    with client.register_engine_pool(model, memory, layout, "dlpack-example") as pool:
        for number, (name, from_dlpack, to_numpy) in enumerate(libraries()):
            prompt = prompt + number  # another one for each: the pages of the first are known
            memory.bytes[:] = 0
            # [block, token, head, dim], writable where the library lets it be (NumPy's from_dlpack does not).
            planes = {(layer, kind): layout.rows(model, memory, 0, layer, kind).view(np.float16)
                      for layer in range(LAYERS) for kind in pagetide.RowKind}
            tensors = {key: from_dlpack(pagetide.DlpackView(plane)) for key, plane in planes.items()}
            tokens = np.arange(len(prompt))
            prefill(name, planes, tensors, prompt, np.asarray(mine)[tokens // 8], tokens % 8)
            stored = finish(pool.store_pages(prompt, mine))
            loaded = finish(pool.load_pages(prompt, others))
            again = {key: from_dlpack(pagetide.DlpackView(plane)) for key, plane in planes.items()}
            wrong = 0
            tokens = tokens[:loaded]
            for (layer, kind), tensor in again.items():
                there = to_numpy(tensor)[np.asarray(others)[tokens // 8], tokens % 8]
                wrong += int(np.count_nonzero(there != rows(prompt, layer, kind)[:loaded]))
            print(f"registered: {name}: {stored} tokens stored, {loaded} loaded, {wrong} wrong elements")
    memory.close()


def prefill(name: str, planes: dict[Any, np.ndarray], tensors: dict[Any, Any], prompt: np.ndarray,
            blocks: np.ndarray, slots: np.ndarray) -> None:
    """Rows of a prompt into an engine's blocks, by the library where its tensors are views that can be written."""
    for (layer, kind), plane in planes.items():
        if name == "torch":
            import torch
            tensors[layer, kind][torch.from_numpy(blocks), torch.from_numpy(slots)] = \
                torch.from_numpy(rows(prompt, layer, kind))
        else:
            plane[blocks, slots] = rows(prompt, layer, kind)


def finish(job: pagetide.EngineJob) -> int:
    """Waits for a job. Whatever goes wrong, it works on no block afterwards."""
    try:
        return job.wait()
    except BaseException:
        job.cancel()
        raise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--router", required=True)
    arguments = parser.parse_args()
    prompt = np.random.default_rng(2).integers(0, 32000, 3 * PAGE + 5)
    with pagetide.Client(router=arguments.router) as client:
        model = client.register_model(model_spec())
        owned(client, model, prompt)
        registered(client, model, np.flip(prompt))


if __name__ == "__main__":
    main()
