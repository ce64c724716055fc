"""Pages on their way from an engine to PageTide, on a thread of its own: generation never waits for it."""

from __future__ import annotations

import ctypes
import dataclasses
import logging
import threading
import time
from collections import deque
from typing import Callable, Optional, Union

import numpy as np
import numpy.typing as npt

import pagetide

_log = logging.getLogger("pagetide.llama_cpp")
Bytes = npt.NDArray[np.uint8]


@dataclasses.dataclass(frozen=True)
class _Begin:
    sequence: pagetide.Sequence


@dataclasses.dataclass(frozen=True)
class _Append:
    sequence: pagetide.Sequence
    begin: int
    tokens: list[int]
    blocks: list[Bytes]

    @property
    def num_bytes(self) -> int:
        return sum(block.nbytes for block in self.blocks)


class StoreThread:
    """Takes rows of one sequence after another, in order, and appends them. Bounded: when more than
    max_pending_bytes or max_pending_sequences wait, no more are taken.

    A sequence that was handed over by begin() belongs to this thread, which closes it at the next begin()
    or at the end. Thread-safe."""

    def __init__(self, max_pending_bytes: int, max_pending_sequences: int,
                 on_failure: Callable[[str], None]) -> None:
        self._max_pending_bytes = max_pending_bytes
        self._max_pending_sequences = max_pending_sequences
        self._on_failure = on_failure  # called on this thread with the reason
        self._changed = threading.Condition()
        # All below: guarded by _changed.
        self._jobs: deque[Union[_Begin, _Append]] = deque()
        self._pending_bytes = 0
        self._pending_sequences = 0
        self._is_busy = False
        self._is_stopping = False
        self._stop_by = 0.0
        self.stored_tokens = 0
        self.dropped_tokens = 0
        # Owned by the thread.
        self._sequence: Optional[pagetide.Sequence] = None
        self._thread = threading.Thread(target=self._run, name="pagetide-store", daemon=True)
        self._thread.start()

    def begin(self, sequence: pagetide.Sequence) -> bool:
        """The rows that follow are this sequence's; the one before is closed. False when too many wait: it stays
        the caller's to close, and nothing of it is stored."""
        with self._changed:
            if self._is_stopping or self._pending_sequences >= self._max_pending_sequences:
                return False
            self._pending_sequences += 1
            self._jobs.append(_Begin(sequence))
            self._changed.notify_all()
            return True

    def append(self, sequence: pagetide.Sequence, begin: int, tokens: list[int],
               blocks: list[Bytes]) -> bool:
        """Rows of `tokens` from position `begin` on, a block a layer group. False when too much waits: they
        are to come again, and nothing behind them before."""
        job = _Append(sequence, begin, tokens, blocks)
        with self._changed:
            if self._is_stopping or self._pending_bytes + job.num_bytes > self._max_pending_bytes:
                return False
            self._pending_bytes += job.num_bytes
            self._jobs.append(job)
            self._changed.notify_all()
            return True

    def drop(self, num_tokens: int) -> None:
        """Counts tokens that never came again."""
        with self._changed:
            self.dropped_tokens += num_tokens

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
        """Drops what still waits, closes its sequences as far as the time goes, and ends the thread."""
        with self._changed:
            self._is_stopping = True
            self._stop_by = time.monotonic() + timeout
            self._changed.notify_all()
        self._thread.join(timeout)

    def leave_to_parent(self) -> None:
        """In a child that was forked: the thread and what waits are the parent's. Takes no lock: who held it is not
        in this process."""
        # Never let go of: to close what they belong to is the parent's, too.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._jobs))
        self._changed = threading.Condition()
        self._jobs = deque()
        self._pending_bytes = self._pending_sequences = 0
        self._is_busy = False
        self._is_stopping = True
        self._sequence = None

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._is_stopping)
                if self._is_stopping:
                    break
                job = self._jobs.popleft()
                self._is_busy = True
            try:
                if isinstance(job, _Begin):
                    self._close_sequence()
                    self._sequence = job.sequence
                else:
                    self._store(job)
            except Exception:  # noqa: BLE001  # our bug; the engine must not lose its store thread to it
                _log.exception("store")
            with self._changed:
                self._is_busy = False
                self._forget(job)
                self._changed.notify_all()
        self._close_sequence()
        self._drop_waiting()

    def _forget(self, job: Union[_Begin, _Append]) -> None:
        """Of a job that is over. With the lock held."""
        if isinstance(job, _Begin):
            self._pending_sequences -= 1
        else:
            self._pending_bytes -= job.num_bytes

    def _drop_waiting(self) -> None:
        while True:
            with self._changed:
                if not self._jobs:
                    return
                job = self._jobs.popleft()
                self._forget(job)
                if isinstance(job, _Append):
                    self.dropped_tokens += len(job.tokens)
                # One that stays open ends with its worker.
                is_time_left = time.monotonic() < self._stop_by
            if isinstance(job, _Begin) and is_time_left:
                job.sequence.__exit__(None, None, None)

    def _store(self, job: _Append) -> None:
        n = len(job.tokens)
        is_stored = False
        try:
            if self._sequence is job.sequence and job.sequence.length == job.begin:
                _append(job.sequence, job.tokens, job.blocks)
                is_stored = True
            # Else an earlier part of it failed.
        except (pagetide.PageTideError, ValueError) as error:
            self._close_sequence()
            self._on_failure(f"store {n} tokens from {job.begin}: {error}")
        finally:
            with self._changed:
                self.stored_tokens += n if is_stored else 0
                self.dropped_tokens += 0 if is_stored else n

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
                # A sequence that lost pages meanwhile has another end, and these rows stand behind the old one.
                if step.first_position != sequence.length:
                    raise pagetide.Aborted(f"the sequence ends at {step.first_position}, not at {sequence.length}")
                if step.region is not None:
                    for index, block in enumerate(blocks):
                        at = model.staged_offset(n, index, 0, pagetide.RowKind.K)
                        step.region[at:at + block.size] = block
                    step.commit(tokens)
                    return
        except pagetide.ResourceExhausted:
            pass  # a staging buffer smaller than the rows: they go by stream
    with sequence.begin_append(tokens) as append:
        for index, block in enumerate(blocks):
            append.write_block(index, n, block)
        append.commit()
