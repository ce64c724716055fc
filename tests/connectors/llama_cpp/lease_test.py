"""Frames that a load reads in place are pinned while it reads, and not for long behind it. Needs llama-cpp-python and
gguf."""

from __future__ import annotations

import pathlib
import time
from typing import Any

import numpy as np
import pytest
from engine import control_logits, first_logits, open_engine
from fixtures import fleet, folder, models, prompt_of  # noqa: F401  # fixtures
from fleet import Fleet

import pagetide
import pagetide_llama_cpp as pt
from pagetide.v1 import sequence_pb2
from pagetide_llama_cpp import page_reader


def write(path: pathlib.Path, fleet: Fleet, prompt: list[int]) -> pagetide.Model:
    llama = open_engine(path)
    connector = pt.attach(llama, router=fleet.router.grpc)
    first_logits(llama, prompt)
    assert connector.flush() and connector.stored_tokens == 512
    connector.detach()
    assert connector._model is not None
    return connector._model


def pins(sequence: pagetide.Sequence) -> int:
    table = sequence.worker.sequences.GetBlockTable(
        sequence_pb2.GetBlockTableRequest(sequence_id=sequence.id), timeout=10)
    return sum(extent.pins for extent in table.extents)


def test_pages_are_let_go_of_soon_after_a_load(models: dict[str, pathlib.Path], fleet: Fleet) -> None:
    prompt = prompt_of(600, 401)
    model = write(models["llama"], fleet, prompt)
    llama = open_engine(models["llama"])
    connector = pt.attach(llama, router=fleet.router.grpc)
    with pagetide.Client(router=fleet.router.grpc) as client, client.open(model, prompt) as watched:
        assert pins(watched) == 0
        first_logits(llama, prompt)
        loaded_at = time.monotonic()
        assert connector.last is not None and connector.last.loaded_tokens == 512
        while pins(watched) > 0:
            assert time.monotonic() - loaded_at < 8.0
            time.sleep(0.05)
    connector.detach()


def test_a_lease_that_ends_before_its_rows_are_copied_is_taken_again(
        models: dict[str, pathlib.Path], fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = prompt_of(600, 411)
    write(models["llama"], fleet, prompt)
    llama = open_engine(models["llama"])
    connector = pt.attach(llama, router=fleet.router.grpc)
    context = connector._context
    assert context is not None
    stage, parts, stale = context.stage, 0, []

    def slow(*arguments: Any) -> Any:
        nonlocal parts
        parts += 1
        if parts == 1:
            time.sleep(page_reader._FIRST_SECONDS + 0.1)
            # As if the frame were another page's by then.
            state = stage(*arguments)
            state[-1000:] ^= 0xFF
            stale.append(state.copy())
            return state
        return stage(*arguments)

    monkeypatch.setattr(context, "stage", slow)
    got = first_logits(llama, prompt)
    assert connector.last is not None and connector.last.loaded_tokens == 512, connector.last
    assert parts == 3 and len(stale) == 1  # the first page twice
    assert np.array_equal(got, control_logits(open_engine(models["llama"]), prompt, prompt, 512))
    connector.detach()


def test_rows_that_are_never_surely_ours_are_computed(models: dict[str, pathlib.Path], fleet: Fleet,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = prompt_of(600, 421)
    write(models["llama"], fleet, prompt)
    llama = open_engine(models["llama"])
    connector = pt.attach(llama, router=fleet.router.grpc)
    expected = control_logits(open_engine(models["llama"]), None, prompt, 0)
    monkeypatch.setattr(pagetide.PageLease, "is_valid", lambda self: False)
    assert np.array_equal(first_logits(llama, prompt), expected)
    assert connector.last is not None
    assert (connector.last.loaded_tokens, connector.last.limit) == (0, "failed")
    assert "the lease ended before they were copied" in connector.last.reason
    connector.detach()
