"""Options of calls that have several. Times are in seconds."""

from __future__ import annotations

import dataclasses
from typing import Any, Optional

from pagetide.v1 import sequence_edit_pb2


@dataclasses.dataclass(frozen=True)
class Input:
    """What decides rows besides the tokens in front of them, such as an image: pages from the one that
    holds token `position` on are shared only with prompts that have the same there."""

    position: int  # token index it belongs to; those of a prompt ascend
    digest: bytes  # SHA-256 of it


@dataclasses.dataclass(frozen=True)
class Retention:
    """How long the pages under tokens [begin, end) are worth keeping in the store."""

    begin: int = 0
    end: Optional[int] = None  # None: the committed length
    # 0 to 100, None: 50. The higher, the later the store evicts.
    priority: Optional[int] = None
    # From then on the priority is 0. None: never.
    ttl: Optional[float] = None

    def to_proto(self) -> sequence_edit_pb2.RangeRetention:
        proto = sequence_edit_pb2.RangeRetention(begin=self.begin)
        if self.end is not None:
            proto.end = self.end
        if self.priority is not None:
            proto.priority = self.priority
        set_seconds(proto.ttl, self.ttl)
        return proto


def set_seconds(duration: Any, seconds: Optional[float]) -> None:
    """Sets a google.protobuf.Duration field; None leaves it absent."""
    if seconds is not None:
        duration.SetInParent()
        duration.FromNanoseconds(round(seconds * 1e9))
