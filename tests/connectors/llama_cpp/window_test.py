"""Sliding windows: reuse is exact wherever the prompts part, and is refused, with the reason, where a row is not
there that the next token may attend to. Needs llama-cpp-python and gguf."""

from __future__ import annotations

import pathlib
from typing import Any

import grpc
import numpy as np
import pytest
from engine import control_logits, first_logits, open_engine
from fixtures import WINDOW, fleet, folder, models, page_keys, prompt_of  # noqa: F401  # fixtures
from fleet import Fleet

import pagetide
import pagetide_llama_cpp as pt
from pagetide.v1 import page_store_pb2, page_store_pb2_grpc

WINDOW_GROUP = 1  # by the context's bodies: full layers, window layers


def write(path: pathlib.Path, fleet: Fleet, prompt: list[int]) -> pagetide.Model:
    llama = open_engine(path)
    connector = pt.attach(llama, router=fleet.router.grpc)
    assert connector.refused_because == ""
    first_logits(llama, prompt)
    assert connector.flush() and connector.stored_tokens == len(prompt) // 256 * 256
    connector.detach()
    assert connector._model is not None
    return connector._model


# Behind, in and in front of the last window of the 768 tokens that are stored; in the middle of a page.
@pytest.mark.parametrize("kept", [768, 768 - WINDOW // 2, 768 - WINDOW - 1, 512, 300, 256, 40])
@pytest.mark.parametrize("flash_attn", [False, True])
def test_reuse_is_exact_wherever_the_prompts_part(kept: int, flash_attn: bool,
                                                  models: dict[str, pathlib.Path],
                                                  folder: pathlib.Path, fleet: Fleet) -> None:
    written = prompt_of(800, 81)
    arguments: dict[str, Any] = dict(flash_attn=flash_attn)
    writer = open_engine(models["gemma3"], **arguments)
    cold = pt.attach(writer, router=fleet.router.grpc)
    first_logits(writer, written)
    assert cold.flush()
    cold.detach()
    asked = written[:kept] + prompt_of(30, 82)[1:]
    llama = open_engine(models["gemma3"], **arguments)
    connector = pt.attach(llama, router=fleet.router.grpc)
    got = first_logits(llama, asked)
    assert connector.last is not None and connector._context is not None
    # A token behind the cut may by chance be the same in both.
    common = next(i for i, (a, b) in enumerate(zip(written, asked)) if a != b)
    assert connector.last.loaded_tokens == min(common, 768), connector.last.reason
    assert connector._context.first_position() == 0  # of the window layers: llama.cpp asks these
    control = open_engine(models["gemma3"], **arguments)
    assert np.array_equal(got, control_logits(control, written, asked, connector.last.loaded_tokens))
    connector.detach()


def test_a_context_that_drops_window_rows_is_refused(models: dict[str, pathlib.Path],
                                                     fleet: Fleet) -> None:
    written = prompt_of(800, 83)
    write(models["gemma3"], fleet, written)
    llama = open_engine(models["gemma3"], swa_full=False)
    expected = control_logits(llama, None, written, 0)
    connector = pt.attach(llama, router=fleet.router.grpc)
    assert f"sliding window of {WINDOW} tokens with swa_full = False" in connector.refused_because
    assert np.array_equal(first_logits(llama, written), expected)
    assert connector.last is not None
    assert (connector.last.loaded_tokens, connector.last.limit) == (0, "refused")
    assert "rows that the next token attends to are dropped" in connector.last.reason
    connector.detach()


@pytest.mark.parametrize("lost,usable", [(0, 0), (256, 256), (512, 512)])
def test_reuse_ends_where_window_rows_are_missing(lost: int, usable: int, models: dict[str, pathlib.Path],
                                                  folder: pathlib.Path) -> None:
    """A page of the window layers is gone, those of the full layers are all there."""
    home = folder / f"lost-{lost}"
    home.mkdir()
    written = prompt_of(800, 84)
    asked = written[:790] + prompt_of(20, 85)[1:]
    fleet = Fleet(home, pool="64MiB")
    try:
        model = write(models["gemma3"], fleet, written)
        with pagetide.Client(router=fleet.router.grpc) as client:
            keys = page_keys(client, model, written)
        assert len(keys) == 6
        assert fleet.workers[0].terminate() == 0  # its frames are gone, the store has all pages
        with grpc.insecure_channel(fleet.store.grpc) as channel:
            store = page_store_pb2_grpc.PageStoreServiceStub(channel)
            deleted = store.DeletePages(page_store_pb2.DeletePagesRequest(
                page_keys=[keys[WINDOW_GROUP, lost]]), timeout=10)
            assert (deleted.deleted, deleted.protected_pages) == (1, 0)
        fleet.start_worker("w1")
        llama = open_engine(models["gemma3"])
        control = open_engine(models["gemma3"])
        connector = pt.attach(llama, router=fleet.router.grpc)
        got = first_logits(llama, asked)
        report = connector.last
        assert report is not None and report.loaded_tokens == usable, report
        assert report.limit in ("group", "never_stored"), report
        assert f"{usable} of {len(asked)} tokens reused: " in report.reason
        assert np.array_equal(got, control_logits(control, written, asked, usable))
        connector.detach()
    finally:
        fleet.close()
