"""PageTideCache behind the wrapper's cache interface. Needs llama-cpp-python and gguf."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import pytest
from engine import control_logits, first_logits, logits_of, open_engine
from fixtures import fleet, folder, models, prompt_of  # noqa: F401  # fixtures
from fleet import Fleet

import pagetide_llama_cpp as pt

TEXT = "a system prompt of some length, " * 20  # most bytes are tokens of their own


def complete(llama: Any, text: str) -> str:
    answer: str = llama.create_completion(text, max_tokens=6, temperature=0.0)["choices"][0]["text"]
    return answer


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_completion_of_one_engine_is_found_by_another(architecture: str, fleet: Fleet,
                                                        models: dict[str, pathlib.Path]) -> None:
    expected = [complete(open_engine(models[architecture]), TEXT + end) for end in ("one", "two")]
    first = open_engine(models[architecture])
    cache = pt.PageTideCache(first, fleet.router.grpc)
    assert cache  # though it is empty: the wrapper asks `if self.cache`
    tokens = first.tokenize((TEXT + "one").encode())
    assert tokens not in cache
    with pytest.raises(KeyError, match="0 of"):
        cache[tokens]
    first.set_cache(cache)
    assert complete(first, TEXT + "one") == expected[0]
    assert cache.connector.flush() and cache.cache_size == 0
    assert cache.connector.stored_tokens == len(tokens) // 256 * 256 >= 512
    assert tokens in cache
    second = open_engine(models[architecture])
    other = pt.PageTideCache(second, fleet.router.grpc)
    second.set_cache(other)
    assert complete(second, TEXT + "two") == expected[1]
    assert other.connector.last is not None and other.connector.last.loaded_tokens >= 512
    # generate and eval are the wrapper's own.
    assert second.generate.__func__ is type(second).generate
    for each in (cache, other):
        each.close()


def test_an_entry_is_a_state_that_load_state_takes(models: dict[str, pathlib.Path], fleet: Fleet) -> None:
    """The wrapper does not load what is in the context already; others may."""
    written = prompt_of(600, 91)
    writer = open_engine(models["llama"])
    cold = pt.attach(writer, router=fleet.router.grpc)
    first_logits(writer, written)
    assert cold.flush()
    cold.detach()
    llama = open_engine(models["llama"])
    cache = pt.PageTideCache(llama, fleet.router.grpc)
    entry = cache[written]
    assert entry.n_tokens == 512 and list(entry.input_ids[:512]) == written[:512]
    assert (entry.input_ids[512:] == -1).all()  # or a longer match would be seen than there is
    # The context goes another way; the entry is still what it was.
    llama.eval(prompt_of(50, 92))
    llama.reset()
    first_logits(llama, prompt_of(80, 93))
    llama.load_state(entry)
    assert llama.n_tokens == 512
    llama.eval(written[512:])
    control = open_engine(models["llama"])
    got, expected = logits_of(llama), control_logits(control, written, written, 512)
    # The wrapper's own states change the order of cells, and with it last bits of sums.
    assert np.abs(got - expected).max() < 1e-3
    cache.close()


def test_nothing_is_stored_under_a_key_that_the_context_does_not_hold(
        models: dict[str, pathlib.Path], fleet: Fleet) -> None:
    llama = open_engine(models["llama"])
    cache = pt.PageTideCache(llama, fleet.router.grpc)
    asked, other = prompt_of(600, 94), prompt_of(600, 95)
    with pytest.raises(KeyError):
        cache[asked]
    llama.eval(asked)
    cache[other] = llama.save_state()
    assert cache.connector.flush() and cache.connector.stored_tokens == 0
    cache[asked] = llama.save_state()
    assert cache.connector.flush() and cache.connector.stored_tokens == 512
    cache.close()


def test_without_pagetide_completions_go_on(models: dict[str, pathlib.Path],
                                            folder: pathlib.Path) -> None:
    llama = open_engine(models["llama"])
    expected = complete(llama, TEXT)
    llama.reset()
    cache = pt.PageTideCache(llama, f"unix:{folder}/nobody")
    llama.set_cache(cache)
    assert complete(llama, TEXT) == expected
    assert [1, 2, 3] not in cache
    assert cache.connector.counters["failures"] == 1
    cache.close()
