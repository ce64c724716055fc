"""What the first token of a prompt does not wait for: connecting, and cutting out the pages that are stored."""

from __future__ import annotations

import gc
import pathlib
import threading
from typing import Any, Callable, Generator

import llama_cpp.llama_cpp as lc
import numpy as np
import pytest
from engine import control_logits, first_logits, open_engine
from fixtures import fleet, folder, models, prompt_of  # noqa: F401  # fixtures
from fleet import Fleet

import pagetide
import pagetide_llama_cpp as pt


def begin(llama: Any, prompt: list[int]) -> Generator[int, Any, None]:
    """Stands behind the first token."""
    generation = llama.generate(prompt, temp=0.0)
    next(generation)
    return generation


def watch_cuts(connector: pt.Connector, during: Callable[[], None] = lambda: None) -> list[tuple[int, int]]:
    """Which rows are cut out of the context from now on."""
    context = connector._context
    assert context is not None, connector.refused_because
    cut, seen = context.cut, []

    def watched(start: int, end: int) -> Any:
        seen.append((start, end))
        during()
        return cut(start, end)

    context.cut = watched  # type: ignore[method-assign]
    return seen


def check_stored(fleet: Fleet, path: pathlib.Path, prompt: list[int], tokens: int) -> None:
    """Another engine loads so many tokens of the prompt, and they are the right ones."""
    fresh = open_engine(path)
    warm = pt.attach(fresh, router=fleet.router.grpc)
    asked = prompt + [5, 6]
    got = first_logits(fresh, asked)
    assert warm.last is not None and warm.last.loaded_tokens == tokens, warm.last
    assert np.array_equal(got, control_logits(open_engine(path), prompt, asked, tokens))
    warm.detach()


def test_attaching_connects_and_registers_the_model(models: dict[str, pathlib.Path], fleet: Fleet) -> None:
    llama = open_engine(models["llama"], n_ctx=1280)  # a model of its own: n_ctx is part of no key, batches are
    connector = pt.attach(llama, router=fleet.router.grpc)
    with pagetide.Client(router=fleet.router.grpc) as client:
        assert connector._spec.name in {model.name for model in client.list_models()}
    assert len(connector._client._workers) == 1 and connector.counters["failures"] == 0
    connector.detach()


def test_pages_are_cut_out_behind_the_first_token(models: dict[str, pathlib.Path], fleet: Fleet) -> None:
    prompt = prompt_of(700, 901)
    llama = open_engine(models["llama"])
    connector = pt.attach(llama, router=fleet.router.grpc)
    cuts = watch_cuts(connector)
    generation = begin(llama, prompt)
    assert cuts == []
    next(generation)
    assert cuts == [(0, 256), (256, 512)]
    assert connector._store.flush(10) and connector.stored_tokens == 512
    # From then on as they fill.
    for _ in range(80):
        next(generation)
    assert connector._store.flush(10) and connector.stored_tokens == 768
    generation.close()
    connector.detach()
    check_stored(fleet, models["llama"], prompt, len(prompt))


ENDS = ["close", "flush", "detach", "next prompt", "left alone"]


@pytest.mark.parametrize("end", ENDS)
def test_a_prompt_of_one_token_is_stored_however_it_ends(
        end: str, models: dict[str, pathlib.Path], fleet: Fleet) -> None:
    prompt = prompt_of(600, 910 + ENDS.index(end))
    llama = open_engine(models["gemma3"])
    connector = pt.attach(llama, router=fleet.router.grpc)
    generation = begin(llama, prompt)
    if end == "close":
        generation.close()
        assert connector._store.flush(10)
    elif end == "flush":
        assert connector.flush()
    elif end == "detach":
        connector.detach()
    elif end == "next prompt":
        other = begin(llama, prompt_of(300, 920))
        assert connector._store.flush(10)
        other.close()
    else:
        del generation
        assert connector._store.flush(10)
    assert connector.stored_tokens >= 512 and connector.dropped_tokens == 0
    connector.detach()
    check_stored(fleet, models["gemma3"], prompt, 512)


def test_a_generation_that_ends_late_leaves_the_next_one_alone(
        models: dict[str, pathlib.Path], fleet: Fleet) -> None:
    """Also one that the garbage collector ends in the middle of the work on the context."""
    llama = open_engine(models["llama"])
    connector = pt.attach(llama, router=fleet.router.grpc)
    first, second = prompt_of(600, 941), prompt_of(600, 942)
    # The end of a generation keeps what is left.
    cuts = watch_cuts(connector, connector.keep)
    late: list[Any] = [begin(llama, first)]
    late.append(late)
    generation = begin(llama, second)
    assert connector._store.flush(10) and connector.stored_tokens == 512
    del late
    gc.collect()
    assert cuts == [(0, 256), (256, 512)]
    next(generation)
    assert cuts == 2 * [(0, 256), (256, 512)]
    generation.close()
    assert connector.flush() and connector.stored_tokens == 1024
    connector.detach()
    check_stored(fleet, models["llama"], first, 512)
    check_stored(fleet, models["llama"], second, 512)


def test_a_generation_that_another_thread_ends_leaves_the_context_alone(
        models: dict[str, pathlib.Path], fleet: Fleet) -> None:
    """The garbage collector runs on any thread; what it ended is stored by the next prompt."""
    prompt = prompt_of(600, 960)
    llama = open_engine(models["llama"])
    connector = pt.attach(llama, router=fleet.router.grpc)
    cuts = watch_cuts(connector)
    generation = begin(llama, prompt)
    other = threading.Thread(target=generation.close)
    other.start()
    other.join(10)
    assert cuts == [] and not other.is_alive()
    begin(llama, prompt_of(300, 961)).close()
    assert cuts[:2] == [(0, 256), (256, 512)]
    connector.detach()
    check_stored(fleet, models["llama"], prompt, 512)


def test_rows_of_other_threads_are_not_stored_though_the_number_is_set_back(
        models: dict[str, pathlib.Path], fleet: Fleet) -> None:
    prompt = prompt_of(600, 970)
    llama = open_engine(models["llama"], flash_attn=True)  # then threads are part of the key
    connector = pt.attach(llama, router=fleet.router.grpc)
    assert connector.numerics["threads"] == 2
    begin(llama, prompt_of(300, 971)).close()
    generation = llama.generate(prompt, temp=0.0)
    prepare = connector.prepare

    def prepare_and_set(tokens: list[int]) -> Any:
        report = prepare(tokens)
        lc.llama_set_n_threads(llama.ctx, 1, 1)
        return report

    connector.prepare = prepare_and_set  # type: ignore[method-assign]
    next(generation)
    lc.llama_set_n_threads(llama.ctx, 2, 2)
    generation.close()
    assert connector.flush() and connector.stored_tokens == 256  # the other prompt's
    connector.detach()


def test_an_engine_that_is_closed_first_ends_quietly(models: dict[str, pathlib.Path], fleet: Fleet) -> None:
    llama = open_engine(models["llama"])
    connector = pt.attach(llama, router=fleet.router.grpc)
    generation = begin(llama, prompt_of(600, 950))
    llama.close()
    generation.close()
    connector.detach()
    assert connector.stored_tokens == 0 and connector.counters["failures"] == 0
