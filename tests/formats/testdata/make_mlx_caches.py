#!/usr/bin/env python3
"""Makes prompt caches with the real mlx-lm, on Linux without a GPU.

    pip install 'mlx[cpu]' && pip install --no-deps mlx-lm==0.32.2     # or 0.28.4: the older layout
    make_mlx_caches.py OUTPUT_DIR

For each case it writes PREFIX_<case>.safetensors with save_prompt_cache, and PREFIX_<case>.rows: for each
layer the rows that keys_and_values or update_and_fetch would show next, as [rows][heads][dim] of K, then
of V. mlx-lm's package imports its generator; only its cache module is loaded here.
"""

import importlib.metadata
import importlib.util
import pathlib
import sys
import types

import mlx.core as mx
import numpy

root = pathlib.Path(importlib.util.find_spec("mlx_lm").submodule_search_locations[0])
for name, path in (("mlx_lm", root), ("mlx_lm.models", root / "models")):
    package = types.ModuleType(name)
    package.__path__ = [str(path)]
    sys.modules[name] = package
from mlx_lm.models import cache as mlx_cache

HEADS, DIM = 2, 8


def rows(n, dtype=mx.float16, dim=DIM):
    shape = (1, HEADS, n, dim)
    return mx.random.normal(shape).astype(dtype), mx.random.normal(shape).astype(dtype)


def token_major(array, n):
    """[1, heads, rows, dim] → bytes of [n][heads][dim]; bf16 by way of its bits."""
    array = array[0, :, :n, :].swapaxes(0, 1)
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
    return numpy.array(array).tobytes()


def main():
    output = pathlib.Path(sys.argv[1])
    version = importlib.metadata.version("mlx-lm")
    prefix = "mlx_v" + "_".join(version.split(".")[:2])
    mx.random.seed(3)
    for c in (mlx_cache.KVCache, mlx_cache.QuantizedKVCache, mlx_cache.ChunkedKVCache):
        c.step = 16  # rows that a cache grows by: 256 would make files of zeros

    def rotating(max_size, keep, steps):
        cache = mlx_cache.RotatingKVCache(max_size, keep)
        for n in steps:
            cache.update_and_fetch(*rows(n))
        return cache

    def filled(cache, steps, dtype=mx.float16, dim=DIM):
        for n in steps:
            cache.update_and_fetch(*rows(n, dtype, dim))
        return cache

    cases = {
        "plain": [filled(mlx_cache.KVCache(), [5, 1, 1]), filled(mlx_cache.KVCache(), [6, 1])],
        "plain_bf16": [filled(mlx_cache.KVCache(), [5], mx.bfloat16)],
        # Not full; turned by single tokens; longer than its size after a prompt.
        "rotating": [rotating(8, 2, [5, 1]), rotating(8, 2, [5] + [1] * 9), rotating(8, 2, [6, 9])],
        "quantized": [filled(mlx_cache.QuantizedKVCache(32, 4), [3, 1], dim=64)],
        "chunked": [filled(mlx_cache.ChunkedKVCache(8), [5])],
        "mixed": [rotating(8, 0, [5]), filled(mlx_cache.KVCache(), [5])],
    }
    if version >= "0.32":
        trimmed = filled(mlx_cache.ChunkedKVCache(8), [10, 2])
        trimmed.maybe_trim_front()
        cases["chunked_trimmed"] = [trimmed]
    # Rings without rows that stay: turned by single tokens, and longer than its size after a prompt.
    cases["ring"] = [rotating(8, 0, [5] + [1] * 9), rotating(8, 0, [6] + [1] * 8)]
    cases["ring_prompt"] = [rotating(8, 0, [6, 8])]
    cases["ring_keep"] = [rotating(8, 2, [5] + [1] * 9), rotating(8, 2, [6] + [1] * 8)]
    for name, caches in cases.items():
        path = output / f"{prefix}_{name}.safetensors"
        mlx_cache.save_prompt_cache(str(path), caches, {"model": "tiny", "note": name})
        loaded, metadata = mlx_cache.load_prompt_cache(str(path), return_metadata=True)
        assert metadata == {"model": "tiny", "note": name}
        shown = b""
        for cache, again in zip(caches, loaded):
            assert cache.offset == again.offset
            for array in ("keys", "values"):
                whole = getattr(again, array)
                if isinstance(cache, mlx_cache.QuantizedKVCache):
                    whole = mx.dequantize(*whole, group_size=cache.group_size, bits=cache.bits)
                n = min(cache.offset - getattr(cache, "start_position", 0), whole.shape[2])
                shown += token_major(whole, n)
        (output / f"{prefix}_{name}.rows").write_bytes(shown)
        print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
