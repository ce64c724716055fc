"""A process that forks behind attach(): the child's engine goes on without PageTide and ends as any other process does,
the parent's with it. Needs llama-cpp-python and gguf."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import traceback
from typing import Any

import numpy as np
import pytest
from engine import control_logits, first_logits, open_engine
from fixtures import fleet, folder, models, prompt_of  # noqa: F401  # fixtures
from fleet import Fleet

import pagetide
import pagetide_llama_cpp as pt

# One thread: those of llama.cpp's OpenMP do not come along.
ALONE: dict[str, Any] = dict(n_threads=1, n_threads_batch=1)
CHILD_SECONDS = 90


@pytest.mark.parametrize("hooks", [True, False], ids=["os.fork", "a fork without hooks"])
def test_the_child_goes_on_without_pagetide_and_the_parent_with_it(
        hooks: bool, models: dict[str, pathlib.Path], folder: pathlib.Path, fleet: Fleet) -> None:
    order = dict(model=str(models["llama"]), router=fleet.router.grpc, written=prompt_of(700, 501 + hooks), hooks=hooks)
    done = subprocess.run([sys.executable, __file__], input=json.dumps(order), capture_output=True, text=True,
                          timeout=2 * CHILD_SECONDS, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["child"] == 0, done.stderr[-3000:]
    assert report["stored"] == 512 and report["loaded"] == 512, report


def in_the_child(llama: Any, connector: pt.Connector, planes: list[Any], asked: list[int],
                 expected: np.ndarray, hooks: bool) -> None:
    assert ("forked after attach()" in connector.refused_because) == hooks
    assert np.array_equal(first_logits(llama, asked), expected)
    report = connector.prepare(asked)
    assert report.limit == "refused" and "forked after attach()" in report.reason, report
    assert "forked after attach()" in connector.refused_because
    assert llama.generate.__func__ is type(llama).generate and llama.eval.__func__ is type(llama).eval
    assert connector.flush(0.0) and connector.pending_bytes == 0
    assert all(plane._socket.fileno() < 0 for plane in planes)
    connector.detach()


def main() -> None:
    order = json.load(sys.stdin)
    written = order["written"]
    asked = written[:600] + [5, 6, 7]
    path = pathlib.Path(order["model"])
    expected = control_logits(open_engine(path, **ALONE), written, asked, 600)
    llama = open_engine(path, **ALONE)
    connector = pt.attach(llama, router=order["router"])
    first_logits(llama, written)
    assert connector.flush() and connector.stored_tokens == 512
    planes = list(pagetide.local_plane._open_planes)
    assert planes
    # Somebody has the store thread's lock when the process forks; in the child nobody gives it back.
    held, forked = threading.Event(), threading.Event()

    def hold() -> None:
        with connector._store._changed:
            held.set()
            forked.wait(CHILD_SECONDS)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    if not order["hooks"]:
        # What a library does that forks by itself: the connector sees it by the process id.
        pt.connector._attached.clear()
        pagetide.local_plane._open_planes.clear()
        planes = []
    child = os.fork()
    if child == 0:
        signal.alarm(CHILD_SECONDS)
        try:
            in_the_child(llama, connector, planes, asked, expected, order["hooks"])
        except BaseException:
            traceback.print_exc()
            sys.exit(1)
        sys.exit(0)  # through all that the interpreter does at its end
    _, status = os.waitpid(child, 0)
    forked.set()
    holder.join()
    # The parent is as it was: connection, threads and shared memory.
    assert connector.refused_because == ""
    connector._context.clear()  # type: ignore[union-attr]
    assert np.array_equal(first_logits(llama, written[:513] + [7]),
                          control_logits(open_engine(path, **ALONE), written, written[:513] + [7], 512))
    assert connector.last is not None
    stored = connector.stored_tokens
    connector.detach()
    print(json.dumps({"child": status, "stored": stored, "loaded": connector.last.loaded_tokens}))


if __name__ == "__main__":
    main()
