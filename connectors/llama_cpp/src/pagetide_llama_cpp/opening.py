"""Engines whose contexts can give out pages."""

from __future__ import annotations

import contextlib
from typing import Any, Iterator

import llama_cpp
import llama_cpp.llama_cpp as lc


@contextlib.contextmanager
def contexts_with_pages() -> Iterator[None]:
    """Contexts that are made inside can give out pages: a unified cache with a second sequence. The class
    Llama has no parameters for these two. Not for several threads at a time."""
    original = lc.llama_context_default_params

    def with_second_sequence() -> Any:
        params = original()
        params.kv_unified = True
        params.n_seq_max = 2
        params.swa_full = True
        return params

    lc.llama_context_default_params = with_second_sequence
    try:
        yield
    finally:
        lc.llama_context_default_params = original


def open_llama(model_path: str, **arguments: Any) -> llama_cpp.Llama:
    """A Llama whose context can give out pages: contexts_with_pages, and full-size caches for window layers
    unless swa_full says otherwise."""
    with contexts_with_pages():
        return llama_cpp.Llama(model_path, **arguments)
