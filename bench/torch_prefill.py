#!/usr/bin/env python3
"""Prefill attention of kernels/paged_attention.cu against torch's scaled_dot_product_attention, in one run.

    bench/torch_prefill.py --device-bench build-cuda/bin/device_bench [--device cuda] [--repeats 9]

Runs device_bench, takes the shapes of its "prefill attention" lines, and times torch on each: causal, grouped heads,
K and V contiguous and of the same type (what torch asks for; ours lie in pages). Prints device_bench's lines as they
come, and a line a shape with torch's median time and "share", torch's time over ours: above 1 ours is faster. Needs
PyTorch 2.5 or later, which no setup installs. Without --device-bench torch alone, for the shape of --rows, --queries.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any, Iterator

import torch

TYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}


def torch_seconds(shape: dict[str, Any], device: torch.device, repeats: int) -> float:
    """Median of one call, from launch to the end of its work."""
    query_heads, kv_heads = (int(n) for n in shape["heads"].split(":"))
    sequences, rows, queries, dim = (int(shape[k]) for k in ("sequences", "rows", "queries", "head_dim"))
    kind = TYPES[shape["type"]]
    generator = torch.Generator(device).manual_seed(7)
    q, k, v = (torch.randn(sequences, heads, length, dim, device=device, dtype=torch.float32, generator=generator).to(kind)
               for heads, length in ((query_heads, queries), (kv_heads, rows), (kv_heads, rows)))
    mask = None
    if queries != rows:  # is_causal aligns the first query with the first row; ours are the last rows
        mask = torch.ones(queries, rows, dtype=torch.bool, device=device).tril(rows - queries)

    def run() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=query_heads != kv_heads)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    run()
    return statistics.median(run() for _ in range(repeats))


def lines_of(program: str, repeats: int) -> Iterator[dict[str, Any]]:
    with subprocess.Popen([program, "--repeats", str(repeats)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            yield json.loads(line)
    if process.returncode != 0:
        sys.exit(f"torch_prefill: {program} ended with {process.returncode}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device-bench", help="the program, for our side")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--queries", type=int, default=4096)
    parser.add_argument("--type", choices=sorted(TYPES), default="f16")
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("torch_prefill: torch finds no usable GPU")
    device = torch.device(options.device)
    if options.device_bench:
        shapes = [line for line in lines_of(options.device_bench, options.repeats)
                  if line["figure"] == "prefill attention"]
        if not shapes:
            sys.exit("torch_prefill: device_bench has no line of prefill attention")
    else:
        shapes = [{"type": options.type, "sequences": 1, "rows": options.rows, "queries": options.queries,
                   "heads": "32:8", "head_dim": 128}]
    for shape in shapes:
        seconds = torch_seconds(shape, device, options.repeats)
        result = {"figure": "prefill attention, torch", "torch": torch.__version__, "type": shape["type"],
                  "rows": shape["rows"], "queries": shape["queries"], "milliseconds": round(seconds * 1e3, 4)}
        if "milliseconds" in shape:
            result["share"] = round(seconds * 1e3 / shape["milliseconds"], 3)
        print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
