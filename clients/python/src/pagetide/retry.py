"""Retries by trait: only UNAVAILABLE, with exponential back-off and jitter, within a deadline.

Every mutating request carries a request_id, which makes a repeat safe. The figures are those of the C++
client (rpc/retry.h).
"""

from __future__ import annotations

import dataclasses
import random
import time
from typing import Callable, Optional

from pagetide.errors import PageTideError, Unavailable


@dataclasses.dataclass(frozen=True)
class RetryPolicy:
    """Times in seconds. The first call counts as an attempt."""

    max_attempts: int = 6
    initial_backoff: float = 0.05
    max_backoff: float = 2.0
    multiplier: float = 2.0
    # A pause is a random part of the back-off, from (1 - jitter) to all of it.
    jitter: float = 0.5


@dataclasses.dataclass(frozen=True)
class CallOptions:
    # Bounds a call with all its attempts and pauses, in seconds.
    timeout: float = 30.0
    retry: RetryPolicy = RetryPolicy()


class RetryLoop:
    """The decisions of one logical call, without sleeping. Not thread-safe."""

    def __init__(self, policy: RetryPolicy, timeout: float,
                 now: Callable[[], float] = time.monotonic,
                 uniform: Callable[[float, float], float] = random.uniform) -> None:
        self._policy = policy
        self._now = now
        self._uniform = uniform
        self._deadline = now() + timeout
        self._backoff = policy.initial_backoff
        self.attempts = 0

    def time_left(self) -> float:
        return self._deadline - self._now()

    def next_pause(self, error: PageTideError) -> Optional[float]:
        """Seconds to wait before the next attempt; None to give up and raise `error`: it is not
        retryable, attempts are used up, or the pause would end after the deadline."""
        self.attempts += 1
        if not isinstance(error, Unavailable) or self.attempts >= self._policy.max_attempts:
            return None
        pause = max(self._backoff * self._uniform(1 - self._policy.jitter, 1),
                    error.retry_delay or 0.0)
        self._backoff = min(self._backoff * self._policy.multiplier, self._policy.max_backoff)
        return None if pause >= self.time_left() else pause
