"""Frames of a sequence held in place for a time, read through memory shared with the worker."""

from __future__ import annotations

import time
from typing import Optional

import numpy as np
import numpy.typing as npt

from pagetide.local_plane import LocalPlane
from pagetide.model import Model, RowKind
from pagetide.v1 import sequence_pb2

Bytes = npt.NDArray[np.uint8]


class PageLease:
    """All pages of a sequence, resident and pinned until `valid_until` (time.monotonic()).

    After that a frame may be given to another page while it is read: whoever has copied or used bytes
    asks is_valid() *afterwards*, and throws them away when it says no.
    """

    def __init__(self, model: Model, plane: LocalPlane, table: sequence_pb2.GetBlockTableResponse,
                 valid_until: float) -> None:
        self._model = model
        self._plane = plane
        self.valid_until = valid_until
        self._extents: dict[int, list[sequence_pb2.GetBlockTableResponse.Extent]] = {}
        for extent in table.extents:
            self._extents.setdefault(extent.group, []).append(extent)

    def is_valid(self) -> bool:
        return time.monotonic() < self.valid_until

    def page(self, group: int, begin: int) -> Optional[Bytes]:
        """The frame, read-only and without a copy, of the page whose first token is at `begin`:
        [layer][K: page_tokens rows][V: page_tokens rows]. Rows behind the sequence's end are noise. None
        when no single frame holds it that way: after an edit rows may lie in several pages, or K be still
        to be rotated."""
        own = self._model.groups[group]
        extents = self._extents.get(group, [])
        for extent in extents:
            is_whole = extent.count == own.page_tokens or extent is extents[-1]
            if extent.first_row == begin and extent.first_slot == 0 and is_whole and \
                    extent.pending_shift == 0 and extent.HasField("pool_offset"):
                return self._plane.frames(extent.pool_offset, own.page_bytes)
        return None

    def copy(self, group: int, begin: int, end: int, out: Bytes) -> bool:
        """Rows [begin, end) into `out`: [layer][K: n rows][V: n rows]. False when some are not there, or
        are still to be rotated, which only the worker does."""
        own = self._model.groups[group]
        at = begin
        for extent in self._extents.get(group, ()):
            first, stop = extent.first_row, extent.first_row + extent.count
            if stop <= at or first >= end:
                continue
            if first > at or extent.pending_shift != 0 or not extent.HasField("pool_offset"):
                return False
            count = min(stop, end) - at
            slot = extent.first_slot + at - first
            frame = self._plane.frames(extent.pool_offset, own.page_bytes)
            for layer in range(own.num_layers):
                for kind in (RowKind.K, RowKind.V):
                    size = own.row_bytes(kind)
                    source = own.offset(layer, kind, own.page_tokens) + slot * size
                    target = own.offset(layer, kind, end - begin) + (at - begin) * size
                    out[target:target + count * size] = frame[source:source + count * size]
            at += count
        return at == end
