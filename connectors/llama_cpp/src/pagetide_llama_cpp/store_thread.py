"""Pages on their way from an engine to PageTide, on a thread of its own: generation never waits for it."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from typing import Callable, Optional

import numpy as np
import numpy.typing as npt

import pagetide

_log = logging.getLogger("pagetide.llama_cpp")
Bytes = npt.NDArray[np.uint8]


class StoreThread:
    """Takes rows of one sequence after another, in order, and appends them. Bounded: when more than
    max_pending_bytes wait, no more are taken.

    A sequence that was handed over by begin() belongs to this thread, which closes it at the next begin()
    or at the end. Thread-safe."""

    def __init__(self, max_pending_bytes: int, on_failure: Callable[[str], None]) -> None:
        self._max_pending_bytes = max_pending_bytes
        self._on_failure = on_failure  # called on this thread with the reason
        self._changed = threading.Condition()
        # All below: guarded by _changed.
        self._jobs: deque[Callable[[], None]] = deque()
        self._pending_bytes = 0
        self._is_busy = False
        self._is_stopping = False
        self.stored_tokens = 0
        self.dropped_tokens = 0
        # Owned by the thread.
        self._sequence: Optional[pagetide.Sequence] = None
        self._thread = threading.Thread(target=self._run, name="pagetide-store", daemon=True)
        self._thread.start()

    def begin(self, sequence: pagetide.Sequence) -> None:
        """The rows that follow are this sequence's; the one before is closed."""
        def job() -> None:
            self._close_sequence()
            self._sequence = sequence
        self._submit(job, 0)

    def append(self, sequence: pagetide.Sequence, begin: int, tokens: list[int],
               blocks: list[Bytes]) -> bool:
        """Rows of `tokens` from position `begin` on, a block a layer group. False when too much waits: they
        are to come again, and nothing behind them before."""
        size = sum(block.nbytes for block in blocks)

        def job() -> None:
            if self._sequence is not sequence or sequence.length != begin:
                return  # an earlier part of it failed
            try:
                _append(sequence, tokens, blocks)
                with self._changed:
                    self.stored_tokens += len(tokens)
            except (pagetide.PageTideError, ValueError) as error:
                with self._changed:
                    self.dropped_tokens += len(tokens)
                self._close_sequence()
                self._on_failure(f"store {len(tokens)} tokens from {begin}: {error}")

        return self._submit(job, size)

    def drop(self, num_tokens: int) -> None:
        """Counts tokens that never came again."""
        with self._changed:
            self.dropped_tokens += num_tokens

    def _submit(self, job: Callable[[], None], size: int) -> bool:
        with self._changed:
            if self._is_stopping:
                return False
            if size and self._pending_bytes + size > self._max_pending_bytes:
                return False

            def run() -> None:
                try:
                    job()
                finally:
                    with self._changed:
                        self._pending_bytes -= size
            self._pending_bytes += size
            self._jobs.append(run)
            self._changed.notify_all()
            return True

    @property
    def pending_bytes(self) -> int:
        with self._changed:
            return self._pending_bytes

    def flush(self, timeout: float) -> bool:
        """Waits until all that was handed over has been stored or has failed."""
        deadline = time.monotonic() + timeout
        with self._changed:
            return self._changed.wait_for(lambda: not self._jobs and not self._is_busy,
                                          max(deadline - time.monotonic(), 0))

    def stop(self, timeout: float) -> None:
        """Drops what still waits, closes the sequence and ends the thread."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        self._thread.join(timeout)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._is_stopping)
                if self._is_stopping:
                    break
                job = self._jobs.popleft()
                self._is_busy = True
            try:
                job()
            except Exception:  # noqa: BLE001  # our bug; the engine must not lose its store thread to it
                _log.exception("store")
            with self._changed:
                self._is_busy = False
                self._changed.notify_all()
        self._close_sequence()

    def _close_sequence(self) -> None:
        sequence, self._sequence = self._sequence, None
        if sequence is not None:
            sequence.__exit__(None, None, None)


def _append(sequence: pagetide.Sequence, tokens: list[int], blocks: list[Bytes]) -> None:
    n = len(tokens)
    model = sequence.model
    for group, block in zip(model.groups, blocks):
        if block.size != n * group.token_bytes:
            raise ValueError(f"{block.size} bytes for {n} tokens of {group.token_bytes} bytes")
    if n <= 1024:
        try:
            with sequence.begin_step(n) as step:
                if step.region is not None:
                    for group, block in enumerate(blocks):
                        at = model.staged_offset(n, group, 0, pagetide.RowKind.K)
                        step.region[at:at + block.size] = block
                    step.commit(tokens)
                    return
        except pagetide.ResourceExhausted:
            pass  # a staging buffer smaller than the rows: they go by stream
    with sequence.begin_append(tokens) as append:
        for group, block in enumerate(blocks):
            append.write_block(group, n, block)
        append.commit()
