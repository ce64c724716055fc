"""Workers that are killed (SIGKILL) in the middle of a load or of a store, that stall, and a PageTide that begins
anew: the engine neither dies nor hangs, and its logits are right. Needs llama-cpp-python and gguf."""

from __future__ import annotations

import pathlib
import random
import tempfile
import threading
import time
from typing import Any, Callable, Iterator

import numpy as np
import pytest
from engine import control_logits, first_logits, open_engine
from fixtures import folder, models, prompt_of  # noqa: F401  # fixtures
from fleet import Fleet

import pagetide_llama_cpp as pt

# Asked again at once, so that every prompt of a test meets PageTide.
EAGER = dict(timeout=1.0, cool_down=0.0)
WRITTEN = prompt_of(700, 41)  # two pages are stored of it
PATIENCE = 120  # seconds in which a loaded machine ends what takes it parts of one


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    with tempfile.TemporaryDirectory(prefix="pt-kill-") as name:
        fleet = Fleet(pathlib.Path(name), pool="64MiB")
        yield fleet
        fleet.close()


class Engine:
    """An engine with PageTide, one without for the right answers, and what both say to a prompt."""

    def __init__(self, path: pathlib.Path, fleet: Fleet, **options: Any) -> None:
        self.llama = open_engine(path)
        self._control = open_engine(path)
        self.connector = pt.attach(self.llama, router=fleet.router.grpc,
                                   options=pt.Options(**{**EAGER, **options}))
        assert self.connector.refused_because == "" and self.connector._context is not None
        self.context = self.connector._context

    def ask(self, prompt: list[int]) -> pt.Report:
        """In an empty context; its logits must be those of the control with as much reused."""
        self.context.clear()
        began = time.monotonic()
        got = first_logits(self.llama, prompt)
        assert time.monotonic() - began < PATIENCE
        report = self.connector.last
        assert report is not None
        expected = control_logits(self._control, WRITTEN, prompt, report.loaded_tokens)
        assert np.array_equal(got, expected), report
        return report

    def ask_until_loaded(self, prompt: list[int]) -> pt.Report:
        """The router may know of a new worker's pages a little later."""
        deadline = time.monotonic() + PATIENCE
        while True:
            report = self.ask(prompt)
            if report.loaded_tokens or time.monotonic() > deadline:
                return report

    def write(self) -> None:
        self.ask(WRITTEN)
        assert self.connector.flush(PATIENCE) and self.connector.stored_tokens == 512

    def close(self) -> None:
        self.connector.detach(0.1)


@pytest.fixture
def open_engines(models: dict[str, pathlib.Path], fleet: Fleet) -> Iterator[Callable[..., Engine]]:
    opened: list[Engine] = []

    def make(architecture: str = "llama", **options: Any) -> Engine:
        opened.append(Engine(models[architecture], fleet, **options))
        return opened[-1]

    yield make
    for engine in opened:
        engine.close()


def before_call(owner: Any, name: str, number: int, action: Callable[[], None]) -> None:
    """action() happens in front of the number-th call of owner.name from now on, once."""
    original, calls = getattr(owner, name), 0

    def wrapped(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            setattr(owner, name, original)
            action()
        return original(*arguments)

    setattr(owner, name, wrapped)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("local", [True, False], ids=["local", "rpc"])
def test_a_worker_killed_in_the_middle_of_a_load(local: bool, architecture: str, fleet: Fleet,
                                                 open_engines: Callable[..., Engine]) -> None:
    open_engines(architecture).write()
    engine = open_engines(architecture, use_local_plane=local)
    # The first part is on its way into the context, the others are still the worker's.
    before_call(engine.context, "load", 1, fleet.workers[0].kill)
    report = engine.ask(WRITTEN)
    if local:
        # Its frames are mapped here and outlive it; they are what they were.
        assert report.loaded_tokens == 512 or report.limit == "failed", report
    else:
        assert (report.loaded_tokens, report.limit) == (0, "failed"), report
        assert "PageTide: UNAVAILABLE" in report.reason or "PageTide: ABORTED" in report.reason
        assert engine.connector.counters["failures"] >= 1
    assert engine.ask(WRITTEN[:600]).loaded_tokens == 0  # nobody serves
    fleet.start_worker("w1")
    assert engine.ask_until_loaded(WRITTEN).loaded_tokens == 512  # from the store


@pytest.mark.parametrize("local", [True, False], ids=["local", "rpc"])
def test_a_worker_killed_in_the_middle_of_a_store(local: bool, fleet: Fleet,
                                                  open_engines: Callable[..., Engine]) -> None:
    engine = open_engines(use_local_plane=local, timeout=5.0)
    worker = fleet.workers[0]
    # It stands still when the first page is on its way to it, so the call is being served when it dies.
    before_call(engine.connector, "_hand_over", 1, worker.pause)
    report = engine.ask(WRITTEN)  # with its generation not waiting for the worker
    assert report.loaded_tokens == 0
    assert engine.connector.stored_tokens == 0 and engine.connector.pending_bytes > 0
    worker.kill()
    assert engine.connector.flush(PATIENCE) and engine.connector.pending_bytes == 0
    assert engine.connector.stored_tokens == 0 and engine.connector.dropped_tokens > 0
    assert engine.connector.counters["failures"] >= 1
    assert engine.ask(WRITTEN).loaded_tokens == 0
    # What was half stored is nobody's: all of it is stored anew, and read by another engine.
    fleet.start_worker("w1")
    deadline = time.monotonic() + PATIENCE
    while engine.connector.stored_tokens == 0 and time.monotonic() < deadline:
        engine.ask(WRITTEN)
        assert engine.connector.flush(PATIENCE)
    assert engine.connector.stored_tokens == 512
    assert open_engines().ask_until_loaded(WRITTEN).loaded_tokens == 512


def test_a_worker_that_stalls_costs_a_bounded_wait(fleet: Fleet,
                                                   open_engines: Callable[..., Engine]) -> None:
    open_engines().write()
    engine = open_engines(cool_down=3600.0)
    fleet.workers[0].pause()
    report = engine.ask(WRITTEN)
    assert (report.loaded_tokens, report.limit) == (0, "failed") and "PageTide" in report.reason
    report = engine.ask(WRITTEN)
    assert report.limit == "refused" and "asked again" in report.reason  # and not waited for twice
    assert engine.connector.counters["failures"] == 1
    fleet.workers[0].resume()
    assert open_engines().ask_until_loaded(WRITTEN).loaded_tokens == 512


def test_a_pagetide_that_restarts_in_the_middle_of_a_prompt(fleet: Fleet, folder: pathlib.Path,
                                                            open_engines: Callable[..., Engine]) -> None:
    """With all it had: the pages come from the store. With nothing: the model is registered anew."""
    open_engines().write()
    engine = open_engines(use_local_plane=False)

    def restart() -> None:
        fleet.workers[0].kill()
        fleet.start_worker("w1")

    before_call(engine.context, "load", 1, restart)
    assert engine.ask(WRITTEN).limit == "failed"
    assert engine.ask_until_loaded(WRITTEN).loaded_tokens == 512

    empty = folder / "empty"
    empty.mkdir()
    other = Fleet(empty, pool="64MiB")
    try:
        # The same engine finds another PageTide at its router's address: it answers, and knows nothing.
        client = engine.connector._client
        engine.connector._client = type(client)(router=other.router.grpc, timeout=10.0)
        assert "MODEL_NOT_FOUND" in engine.ask(WRITTEN).reason
        assert engine.ask(WRITTEN).limit == "never_stored"
        assert engine.connector.flush(PATIENCE) and engine.connector.stored_tokens >= 512
        assert engine.ask_until_loaded(WRITTEN).loaded_tokens == 512
        client.close()
    finally:
        other.close()


def test_workers_killed_at_any_moment(fleet: Fleet, open_engines: Callable[..., Engine]) -> None:
    """Rounds of: prompts are asked, the worker is killed some time after the first began, another one starts."""
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    open_engines().write()
    engines = [open_engines(use_local_plane=local) for local in (True, False)]
    loaded = 0
    for turn in range(6):
        worker, after = fleet.workers[-1], dice.uniform(0.0, 0.3)
        killer = threading.Timer(after, worker.kill)
        killer.start()
        for engine in dice.sample(engines, 2):
            # Less than three pages, so that every round finds the same two.
            report = engine.ask(WRITTEN[:dice.randrange(560, 700)] + prompt_of(40, turn)[1:])
            loaded += report.loaded_tokens > 0
        killer.join()
        fleet.workers.append(fleet.start_worker(f"k{turn}"))
    for engine in engines:
        assert engine.ask_until_loaded(WRITTEN).loaded_tokens == 512
    print(f"{loaded} of 12 prompts found their pages")
