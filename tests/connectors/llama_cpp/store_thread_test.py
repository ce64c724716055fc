"""The connector's store thread: what waits is bounded, and nothing that it drops is lost track of. Real programs; needs
llama-cpp-python and gguf."""

from __future__ import annotations

import pathlib
import tempfile
import threading
from typing import Any, Iterator

import numpy as np
import pytest
from engine import control_logits, first_logits, open_engine
from fixtures import folder, models, prompt_of  # noqa: F401  # fixtures
from fleet import Fleet

import pagetide
import pagetide_llama_cpp as pt
from pagetide.v1 import sequence_pb2
from pagetide_llama_cpp.store_thread import StoreThread


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    with tempfile.TemporaryDirectory(prefix="pt-store-") as name:
        fleet = Fleet(pathlib.Path(name), pool="64MiB")
        yield fleet
        fleet.close()


def open_sequences(fleet: Fleet) -> int:
    with pagetide.Client(router=fleet.router.grpc) as client:
        worker = client.connect_worker(fleet.workers[0].grpc)
        return len(worker.sequences.ListWorkerSequences(
            sequence_pb2.ListWorkerSequencesRequest(), timeout=10).sequences)


class Gate:
    """The store thread stands in front of an append until it is opened."""

    def __init__(self, store: StoreThread, monkeypatch: pytest.MonkeyPatch) -> None:
        self._open, self.reached = threading.Event(), threading.Event()
        original = store._store

        def wait_and_store(job: Any) -> None:
            self.reached.set()
            assert self._open.wait(60)
            original(job)

        monkeypatch.setattr(store, "_store", wait_and_store)

    def open(self) -> None:
        self._open.set()


def test_prompts_beyond_the_bound_are_read_and_not_stored(
        models: dict[str, pathlib.Path], fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    path = models["llama"]
    known, first, second, third = (prompt_of(600, seed) for seed in (301, 302, 303, 304))
    llama = open_engine(path)
    writer = pt.attach(llama, router=fleet.router.grpc)
    first_logits(llama, known)
    assert writer.flush() and writer.stored_tokens == 512
    writer.detach()

    connector = pt.attach(llama, router=fleet.router.grpc, options=pt.Options(max_pending_prompts=2))
    gate = Gate(connector._store, monkeypatch)
    first_logits(llama, first)
    assert gate.reached.wait(60)  # the first one's begin is over: it waits no more
    first_logits(llama, second)
    first_logits(llama, third)
    assert connector.counters["not_stored"] == 0
    before = open_sequences(fleet)
    got = first_logits(llama, known[:560] + [7])
    report = connector.last
    assert report is not None and report.loaded_tokens == 512, report  # reading goes on
    assert connector.counters["not_stored"] == 1 and connector._sequence is None
    assert np.array_equal(got, control_logits(open_engine(path), known, known[:560] + [7], 512))
    assert open_sequences(fleet) == before  # it was closed at once
    gate.open()
    assert connector.flush() and connector.stored_tokens == 3 * 512 and connector.dropped_tokens == 0
    # With room again prompts are stored as ever.
    first_logits(llama, prompt_of(600, 305))
    assert connector.flush() and connector.stored_tokens == 4 * 512
    assert connector.counters["not_stored"] == 1
    connector.detach()


def test_what_waits_at_the_end_is_dropped_counted_and_closed(
        models: dict[str, pathlib.Path], fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    llama = open_engine(models["llama"])
    connector = pt.attach(llama, router=fleet.router.grpc)
    gate = Gate(connector._store, monkeypatch)
    for seed in (311, 312, 313):
        first_logits(llama, prompt_of(600, seed))
    assert gate.reached.wait(60) and open_sequences(fleet) == 3
    store = connector._store
    # It is told to stop while it stands in front of the first append.
    with store._changed:
        store._is_stopping, store._stop_by = True, float("inf")
    gate.open()
    store.stop(60)
    assert not store._thread.is_alive() and not store.begin(None)  # type: ignore[arg-type]
    assert (store.stored_tokens, store.dropped_tokens) == (256, 5 * 256)
    assert store.pending_bytes == 0 and open_sequences(fleet) == 0
    connector.detach()
