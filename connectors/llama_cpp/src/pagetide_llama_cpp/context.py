"""Row blocks in and out of a llama.cpp context, page by page: sequence copy and sequence state.

Cutting a page out copies its cells to a second sequence, saves that, and lets it go; putting one in loads it
into the second sequence and hands its cells to the first. Only so are pages bit-exact, and window layers
whole: the state of a longer sequence leaves out window rows that its last token no longer sees. For one
thread: the one that runs the context.
"""

from __future__ import annotations

import ctypes
from typing import Any, Optional

import llama_cpp.llama_cpp as lc
import numpy as np

from pagetide_llama_cpp.identity import PAGE_TOKENS, Refused
from pagetide_llama_cpp.state import SEQUENCE, Bytes, StateError, StateLayout, StatePlan

_PROBE_TOKENS = 4


class LlamaContext:
    def __init__(self, llama: Any) -> None:
        """Learns the context's state format by a few tokens of its own, and that what goes out comes back.
        Refused when it does not. The context is empty afterwards."""
        self._llama = llama
        self._ctx = llama.ctx
        self._memory = lc.llama_get_memory(self._ctx)
        window = int(lc.llama_model_n_swa(llama.model))
        # A state keeps window rows of its last `window` tokens only: pages pass in parts no longer.
        self.part_tokens = min(PAGE_TOKENS, window) if window else PAGE_TOKENS
        self._plans: dict[int, StatePlan] = {}
        self._buffer: Bytes = np.empty(0, np.uint8)
        self.layout = StateLayout(())
        self._probe()

    def _plan(self, num_tokens: int) -> StatePlan:
        plan = self._plans.get(num_tokens)
        if plan is None:
            plan = self._plans[num_tokens] = self.layout.plan(num_tokens)
        return plan

    def _probe(self) -> None:
        self.clear()
        token = max(self._llama.token_bos(), 0)
        self._llama.eval([token] * _PROBE_TOKENS)
        try:
            state = self._save(0, _PROBE_TOKENS).copy()
            self.layout = StateLayout.parse(state.tobytes())
            blocks = self.cut(0, _PROBE_TOKENS)
            self.clear()
            self.put(blocks, _PROBE_TOKENS, 0, _PROBE_TOKENS)
            if not np.array_equal(self._save(0, _PROBE_TOKENS), state):
                raise Refused("a state that was put into the context came out changed")
        except StateError as error:
            raise Refused(str(error)) from error
        finally:
            self.clear()

    def clear(self) -> None:
        """Empties the context."""
        lc.llama_memory_clear(self._memory, False)
        self._llama.reset()
        self._llama.input_ids[:] = -1

    def claim(self, tokens: Any, num_tokens: int) -> None:
        """Tells the wrapper that the context holds the first num_tokens of `tokens`."""
        self._llama.n_tokens = num_tokens
        self._llama.input_ids[:num_tokens] = tokens[:num_tokens]
        # Ids behind the end would fake a longer match later.
        self._llama.input_ids[num_tokens:] = -1
        self._llama._requires_eval = True  # noqa: SLF001  # there are no logits of these tokens

    def _save(self, begin: int, end: int) -> Bytes:
        """The state of positions [begin, end); a view that the next call overwrites."""
        lc.llama_memory_seq_rm(self._memory, SEQUENCE, -1, -1)
        lc.llama_memory_seq_cp(self._memory, 0, SEQUENCE, begin, end)
        try:
            size = lc.llama_state_seq_get_size(self._ctx, SEQUENCE)
            if self._buffer.size < size:
                self._buffer = np.empty(size, np.uint8)
            got = lc.llama_state_seq_get_data(self._ctx, _pointer(self._buffer), size, SEQUENCE)
            if got != size:
                raise StateError(f"save positions {begin} to {end}: {got} of {size} bytes")
            return self._buffer[:size]
        finally:
            lc.llama_memory_seq_rm(self._memory, SEQUENCE, -1, -1)

    def cut(self, begin: int, end: int) -> list[Bytes]:
        """Copies of the rows [begin, end) of the context: for each layer group [layer][K rows][V rows].
        StateError when the context has not all of them. end - begin is at most part_tokens."""
        return self._plan(end - begin).read(self._save(begin, end), begin)

    def put(self, blocks: list[Bytes], source_tokens: int, begin: int, end: int) -> None:
        """Adds positions [begin, end) with the first rows of `blocks`, each [layer][K: source_tokens
        rows][V: source_tokens rows], behind what the context holds. StateError when the context did not
        take it; then the context must be cleared."""
        self.load(self.stage(blocks, source_tokens, begin, end), begin, end)

    def load(self, state: Bytes, begin: int, end: int) -> None:
        """put, of a state that stage() made."""
        plan = self._plan(end - begin)
        took = lc.llama_state_seq_set_data(self._ctx, _pointer(state), state.size, SEQUENCE)
        if took != plan.num_bytes:
            raise StateError(f"load positions {begin} to {end}: the context took {took} of "
                             f"{plan.num_bytes} bytes")
        lc.llama_memory_seq_cp(self._memory, SEQUENCE, 0, -1, -1)
        lc.llama_memory_seq_rm(self._memory, SEQUENCE, -1, -1)
        last = lc.llama_memory_seq_pos_max(self._memory, 0)
        if last != end - 1:
            raise StateError(f"load positions {begin} to {end}: the context ends at {last}")

    def stage(self, blocks: list[Bytes], source_tokens: int, begin: int, end: int) -> Bytes:
        """The state of put(), made but not loaded: `blocks` may be memory that others own and take back,
        which the caller can look at before load(). A view that the next call overwrites."""
        plan = self._plan(end - begin)
        if self._buffer.size < plan.num_bytes:
            self._buffer = np.empty(plan.num_bytes, np.uint8)
        state = self._buffer[:plan.num_bytes]
        plan.write(blocks, source_tokens, begin, state)
        return state

    def is_passage_free(self) -> bool:
        """Whether the sequence that pages pass through is nobody else's."""
        return int(lc.llama_memory_seq_pos_max(self._memory, SEQUENCE)) < 0

    def first_position(self) -> int:
        """The lowest position that the context holds in all its caches; -1 when it is empty."""
        return int(lc.llama_memory_seq_pos_min(self._memory, 0))

    def logits(self, index: int = -1) -> Optional[Any]:
        """Logits of the last evaluated token: a copy, float32."""
        pointer = lc.llama_get_logits_ith(self._ctx, index)
        if not pointer:
            return None
        return np.ctypeslib.as_array(pointer, shape=(self._llama.n_vocab(),)).copy()


def _pointer(array: Bytes) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
