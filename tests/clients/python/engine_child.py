"""An engine as a process of its own, to be killed: registers a pool, begins a load or a store, says so, and waits.

    engine_child.py WORKER SOCKET NAME load|store MODEL TOKENS

MODEL: the registered model, hex of model_pb2.Model. TOKENS: comma-separated.
"""

from __future__ import annotations

import signal
import sys

import pagetide
from pagetide.v1 import model_pb2


def main() -> None:
    worker, local_socket, name, what, model_hex, token_list = sys.argv[1:]
    model = pagetide.Model.from_proto(model_pb2.Model.FromString(bytes.fromhex(model_hex)))
    tokens = [int(t) for t in token_list.split(",")]
    layout = pagetide.EngineLayout(block_tokens=8, num_blocks=len(tokens) // 8 + 2)
    memory = pagetide.EngineMemory(layout.num_bytes(model))
    client = pagetide.Client(worker=worker, worker_local_socket=local_socket)
    pool = client.register_engine_pool(model, memory, layout, name)
    blocks = list(range(1, -(-len(tokens) // 8) + 1))
    job = (pool.load_pages if what == "load" else pool.store_pages)(tokens, blocks, time_limit=600)
    print(f"begun {job.id}", flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
