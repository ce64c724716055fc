"""PageTide behind llama-cpp-python's cache interface, for programs that call Llama.set_cache.

A compatibility shim: attach() does the same and costs less. Entries of this interface are states of whole
contexts. Reading one costs what attach() costs, because the pages are put into the context and the state is
made only if somebody asks for its bytes. Writing one costs Llama.save_state of the wrapper, once a completion:
a copy of the context's state and of `scores`, which is thrown away here, since the pages are cut out of the
context (connectors/llama_cpp/README.md has figures).
"""

from __future__ import annotations

import logging
from typing import Any, Optional, Sequence

import llama_cpp
import numpy as np
from llama_cpp.llama import LlamaState
from llama_cpp.llama_cache import BaseLlamaCache

import pagetide
from pagetide_llama_cpp.connector import Connector
from pagetide_llama_cpp.identity import Refused
from pagetide_llama_cpp.options import Options

_log = logging.getLogger("pagetide.llama_cpp")


class PageTideCache(BaseLlamaCache):
    """llama.set_cache(PageTideCache(llama, router)). For one Llama and its thread; not together with attach().

    It has no length: an empty one would count as none (the wrapper asks `if self.cache`)."""

    def __init__(self, llama: llama_cpp.Llama, router: str, options: Options = Options(),
                 model_path: Optional[str] = None) -> None:
        # What this process holds of it are pages on their way.
        super().__init__(options.max_pending_bytes)
        self._llama: Any = llama
        self.connector = Connector(llama, router, options, model_path or llama.model_path,
                                   is_wrapped=False)

    @property
    def cache_size(self) -> int:
        """Bytes in this process, not in PageTide."""
        return self.connector.pending_bytes

    def __contains__(self, key: Sequence[int]) -> bool:
        """Whether PageTide has a leading part of `key`."""
        try:
            return self.connector.known_tokens([int(t) for t in key]) > 0
        except (pagetide.PageTideError, Refused) as error:
            _log.info("look up %d tokens: %s", len(key), error)
            return False

    def __getitem__(self, key: Sequence[int]) -> LlamaState:
        """The longest known prefix of `key`, which is in the context when this returns. KeyError, with the
        reason, when that is no more than the context held."""
        tokens = [int(t) for t in key]
        report = self.connector.prepare(tokens)
        if report.loaded_tokens == 0:
            raise KeyError(report.reason)
        return HeldState(self, tokens, report.loaded_tokens)

    def __setitem__(self, key: Sequence[int], value: LlamaState) -> None:
        """Stores the pages that filled since `key` was asked for. The context must hold `key`, as it does
        when a completion ends; `value` is not read."""
        held = self.holds(key, min(self._llama.n_tokens, len(key)))
        if held:
            self.connector.keep()
        else:
            _log.warning("store %d tokens: the context holds others; nothing is stored", len(key))

    def holds(self, tokens: Sequence[int], length: int) -> bool:
        """Whether the context begins with the first `length` of `tokens`."""
        return self._llama.n_tokens >= length and np.array_equal(
            self._llama.input_ids[:length], np.asarray(tokens[:length]))

    def close(self, flush_timeout: float = 10.0) -> None:
        """Stores what is on its way."""
        self.connector.detach(flush_timeout)


class HeldState(LlamaState):
    """A state that is in the context already. Its bytes are made when they are asked for, from the context if
    that still holds it, else from PageTide once more."""

    def __init__(self, cache: PageTideCache, tokens: list[int], length: int) -> None:
        # Not the base's: its attributes are made on demand.
        self._cache = cache
        self._tokens = tokens
        self._saved: Optional[LlamaState] = None
        self.n_tokens = length
        self.seed = cache._llama._seed  # noqa: SLF001
        # As the wrapper has it, of the context's length; ids behind the end would fake a longer match.
        self.input_ids = np.full(cache._llama.n_ctx(), -1, np.intc)  # noqa: SLF001
        self.input_ids[:length] = tokens[:length]

    def _save(self) -> LlamaState:
        if self._saved is None:
            llama = self._cache._llama  # noqa: SLF001
            if llama.n_tokens != self.n_tokens or not self._cache.holds(self._tokens, self.n_tokens):
                report = self._cache.connector.prepare(self._tokens[:self.n_tokens + 1])
                if report.loaded_tokens != self.n_tokens:
                    raise KeyError(report.reason)
            self._saved = llama.save_state()
        return self._saved

    @property
    def scores(self) -> Any:  # type: ignore[override]
        return self._save().scores

    @property
    def llama_state(self) -> bytes:  # type: ignore[override]
        return self._save().llama_state

    @property
    def llama_state_size(self) -> int:  # type: ignore[override]
        return self._save().llama_state_size
