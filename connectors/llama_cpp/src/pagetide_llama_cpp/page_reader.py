"""Rows of a sequence on their way into a context: frames in place where the worker is on this host, copies by RPC
otherwise."""

from __future__ import annotations

import time
from typing import Optional

import numpy as np

import pagetide
from pagetide_llama_cpp.context import LlamaContext
from pagetide_llama_cpp.identity import PAGE_TOKENS
from pagetide_llama_cpp.state import Bytes

# A lease cannot be given back: what is left of it when a load ends, frames stay pinned for. So leases are short, and
# another one is taken where a load goes on. Where one ended before its rows were copied, the machine is busy,
# and the next ones are longer.
_FIRST_SECONDS, _MOST_SECONDS = 1.0, 10.0
_ATTEMPTS = 4


class PageReader:
    """For one load."""

    def __init__(self, sequence: pagetide.Sequence) -> None:
        self._sequence = sequence
        self._seconds = _FIRST_SECONDS
        self._lease: Optional[pagetide.PageLease] = sequence.lease_pages(self._seconds)

    def stage(self, context: LlamaContext, begin: int, end: int) -> Bytes:
        """The rows [begin, end) as a state for context.load(). DeadlineExceeded when they were never copied while
        they were certainly ours."""
        for _ in range(_ATTEMPTS):
            lease = self._lease = self._lease_with_time_left()
            blocks, source_tokens = self._read(lease, begin, end)
            state = context.stage(blocks, source_tokens, begin, end)
            # Asked behind the copy: a frame is another page's as soon as the lease is over.
            if lease is None or lease.is_valid():
                return state
            self._seconds = min(3 * self._seconds, _MOST_SECONDS)
        raise pagetide.DeadlineExceeded(f"load tokens {begin} to {end}: the lease ended before they were copied, "
                                        f"{_ATTEMPTS} times")

    def _lease_with_time_left(self) -> Optional[pagetide.PageLease]:
        """None: rows go by RPC."""
        lease = self._lease
        if lease is None or lease.valid_until - time.monotonic() > self._seconds / 2:
            return lease
        return self._sequence.lease_pages(self._seconds)

    def _read(self, lease: Optional[pagetide.PageLease], begin: int, end: int) -> tuple[list[Bytes], int]:
        """A block a layer group with the rows [begin, end), and the rows that each block has room for."""
        groups = range(len(self._sequence.model.groups))
        if lease is not None:
            if begin % PAGE_TOKENS == 0:
                pages = [lease.page(g, begin) for g in groups]
                if all(page is not None for page in pages):
                    return [page for page in pages if page is not None], PAGE_TOKENS
            copies = [np.empty((end - begin) * self._sequence.model.groups[g].token_bytes, np.uint8)
                      for g in groups]
            if all(lease.copy(g, begin, end, copies[g]) for g in groups):
                return copies, end - begin
        return [self._sequence.read_block(g, begin, end, in_place=False) for g in groups], end - begin
