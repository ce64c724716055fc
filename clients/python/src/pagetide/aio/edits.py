"""Edits of a sequence, what it was, and how long its rows are kept."""

from __future__ import annotations

from typing import Optional, Sequence as Seq

from pagetide import _messages as m
from pagetide.aio.calls import SequenceCalls
from pagetide.options import Retention, set_seconds
from pagetide.v1 import sequence_edit_pb2, session_pb2, types_pb2


class SequenceEdits(SequenceCalls):
    """Every edit happens whole or not at all, moves references and no bytes, and sets `state`. Ranges are
    [p0, p1) over positions: p0 < 0 means 0, p1 < 0 the end. An edit other than a truncation ends canonicity:
    pages that fill behind it are private. Errors: proto/pagetide/v1/sequence_edit.proto."""

    async def remove_range(self, p0: int, p1: int) -> sequence_edit_pb2.RemoveRangeResponse:
        """Drops the rows at positions [p0, p1); their positions stay free."""
        response: sequence_edit_pb2.RemoveRangeResponse = await self._call(
            "edits", "RemoveRange", sequence_edit_pb2.RemoveRangeRequest(
                request_id=m.new_request_id(), sequence=self.ref(), p0=p0, p1=p1))
        self.state = response.state
        return response

    async def copy_range(self, source: SequenceCalls, p0: int, p1: int,
                         allow_overlap: bool = False) -> sequence_edit_pb2.CopyRangeResponse:
        """This sequence gets the rows of another one on its worker at positions [p0, p1), by reference.
        allow_overlap: also at positions that it has already."""
        request = sequence_edit_pb2.CopyRangeRequest(
            request_id=m.new_request_id(), to=self.ref(), p0=p0, p1=p1, allow_overlap=allow_overlap)
        getattr(request, "from").CopyFrom(source.ref())  # a word of Python's
        response: sequence_edit_pb2.CopyRangeResponse = await self._call("edits", "CopyRange", request)
        source.state = getattr(response, "from")
        self.state = response.to
        return response

    async def shift_positions(
            self, p0: int, p1: int, delta: int,
            on_shared: sequence_edit_pb2.OnShared = sequence_edit_pb2.ON_SHARED_UNSPECIFIED,
            allow_overlap: bool = False) -> sequence_edit_pb2.ShiftPositionsResponse:
        """Adds delta to the positions in [p0, p1). Rows that would stand in front of 0 are dropped.
        on_shared: what to do with rows that other open sequences reference (default: copy on write)."""
        response: sequence_edit_pb2.ShiftPositionsResponse = await self._call(
            "edits", "ShiftPositions", sequence_edit_pb2.ShiftPositionsRequest(
                request_id=m.new_request_id(), sequence=self.ref(), p0=p0, p1=p1, delta=delta,
                on_shared=on_shared, allow_overlap=allow_overlap))
        self.state = response.state
        return response

    async def divide_positions(self, p0: int, p1: int, divisor: int,
                               allow_overlap: bool = False) -> sequence_edit_pb2.DividePositionsResponse:
        """Positions in [p0, p1) become position // divisor (Self-Extend)."""
        response: sequence_edit_pb2.DividePositionsResponse = await self._call(
            "edits", "DividePositions", sequence_edit_pb2.DividePositionsRequest(
                request_id=m.new_request_id(), sequence=self.ref(), p0=p0, p1=p1, divisor=divisor,
                allow_overlap=allow_overlap))
        self.state = response.state
        return response

    async def shift_window(self, keep: int, discard: Optional[int] = None,
                           fraction: Optional[float] = None) -> sequence_edit_pb2.ShiftWindowResponse:
        """Context shift: keeps the first `keep` rows, drops the next `discard`, or a fraction (0 to 1) of
        those behind `keep`, and closes the gap."""
        if (discard is None) == (fraction is None):
            raise ValueError(f"shift window: discard {discard} and fraction {fraction}: exactly one must "
                             "be given")
        request = sequence_edit_pb2.ShiftWindowRequest(
            request_id=m.new_request_id(), sequence=self.ref(), keep=keep)
        if discard is not None:
            request.discard = discard
        elif fraction is not None:
            request.fraction = fraction
        response: sequence_edit_pb2.ShiftWindowResponse = await self._call(
            "edits", "ShiftWindow", request)
        self.state = response.state
        return response

    async def rewind(self, length: int) -> sequence_edit_pb2.RewindResponse:
        """Truncates to the first `length` tokens. The sequence stays canonical."""
        response: sequence_edit_pb2.RewindResponse = await self._call(
            "edits", "Rewind", sequence_edit_pb2.RewindRequest(
                request_id=m.new_request_id(), sequence=self.ref(), length=length))
        self.state = response.state
        return response

    async def edit(self,
                   edits: Seq[sequence_edit_pb2.SequenceEdit]) -> sequence_edit_pb2.EditSequenceResponse:
        """1 to 256 edits in order as one transaction; an error names the edit by its index."""
        response: sequence_edit_pb2.EditSequenceResponse = await self._call(
            "edits", "EditSequence", sequence_edit_pb2.EditSequenceRequest(
                request_id=m.new_request_id(), sequence=self.ref(), edits=edits))
        self.state = response.state
        return response

    async def clear(self, zero_data: bool = False) -> sequence_edit_pb2.ClearSequenceResponse:
        """Drops all rows; the sequence stays open. zero_data: pages that nobody else references leave the
        cache too."""
        response: sequence_edit_pb2.ClearSequenceResponse = await self._call(
            "edits", "ClearSequence", sequence_edit_pb2.ClearSequenceRequest(
                request_id=m.new_request_id(), sequence=self.ref(), zero_data=zero_data))
        self.state = response.state
        return response

    async def compact(self, max_rows: int = 0,
                      apply_shifts: bool = False) -> sequence_edit_pb2.CompactSequenceResponse:
        """Moves rows of an edited sequence together; contents stay. Bounded work (max_rows, 0: 4,096):
        call again until moved_rows is 0."""
        response: sequence_edit_pb2.CompactSequenceResponse = await self._call(
            "edits", "Compact", sequence_edit_pb2.CompactSequenceRequest(
                request_id=m.new_request_id(), sequence=self.ref(), max_rows=max_rows,
                apply_shifts=apply_shifts))
        self.state = response.state
        return response

    async def position_extent(self) -> sequence_edit_pb2.GetPositionExtentResponse:
        """The positions that the sequence holds, by layer group."""
        response: sequence_edit_pb2.GetPositionExtentResponse = await self._call(
            "edits", "GetPositionExtent",
            sequence_edit_pb2.GetPositionExtentRequest(sequence_id=self.id))
        return response

    # --- checkpoints: what the sequence was ---

    async def checkpoint(
            self, tier: types_pb2.Tier = types_pb2.TIER_DEVICE,
            scope: session_pb2.CheckpointScope = session_pb2.CHECKPOINT_SCOPE_ALL,
            ttl: Optional[float] = None) -> session_pb2.CheckpointInfo:
        """Remembers the sequence as it is; at most 32, which end with it. tier: DEVICE references its pages,
        HOST copies them, STORE makes them durable (for ttl seconds; default a day). scope: NON_REWINDABLE
        keeps only what a rewind cannot bring back."""
        request = session_pb2.CreateCheckpointRequest(
            request_id=m.new_request_id(), sequence=self.ref(), scope=scope, tier=tier)
        set_seconds(request.ttl, ttl)
        response = await self._call("sessions", "CreateCheckpoint", request)
        info: session_pb2.CheckpointInfo = response.checkpoint
        return info

    async def restore_checkpoint(self, checkpoint_id: int) -> None:
        """Makes the sequence what it was, whatever was rewound, appended or edited since. NotFound
        (CHECKPOINT_NOT_FOUND); FailedPrecondition (CHECKPOINT_VOID, CHECKPOINT_EXPIRED)."""
        response = await self._call(
            "sessions", "RestoreCheckpoint", session_pb2.RestoreCheckpointRequest(
                request_id=m.new_request_id(), sequence=self.ref(), checkpoint_id=checkpoint_id))
        self.state = response.state

    async def list_checkpoints(self) -> list[session_pb2.CheckpointInfo]:
        """Oldest first."""
        request = session_pb2.ListCheckpointsRequest(sequence_id=self.id)
        return list((await self._call("sessions", "ListCheckpoints", request)).checkpoints)

    async def delete_checkpoint(self, checkpoint_id: int) -> None:
        """Idempotent."""
        await self._call("sessions", "DeleteCheckpoint", session_pb2.DeleteCheckpointRequest(
            sequence=self.ref(), checkpoint_id=checkpoint_id))

    # --- retention: how long rows are kept in the store ---

    async def set_retention(
            self, ranges: Seq[Retention]) -> sequence_edit_pb2.SetRangeRetentionResponse:
        """Replaces priority and time to live, in the store, of the pages under 1 to 64 ranges of tokens.
        Pages that the store lacks are put first."""
        response: sequence_edit_pb2.SetRangeRetentionResponse = await self._call(
            "edits", "SetRetention", sequence_edit_pb2.SetRangeRetentionRequest(
                request_id=m.new_request_id(), sequence=self.ref(),
                ranges=[r.to_proto() for r in ranges]))
        return response

    async def pin(self, name: str, begin: int = 0, end: Optional[int] = None,
                  ttl: Optional[float] = None) -> sequence_edit_pb2.PinInfo:
        """Keeps the pages under tokens [begin, end) (None: all committed) in the store until Client.unpin,
        or for ttl seconds. Durable when it returns. Replaces a pin of that name."""
        request = sequence_edit_pb2.PinRangeRequest(
            request_id=m.new_request_id(), sequence=self.ref(), name=name, begin=begin)
        if end is not None:
            request.end = end
        set_seconds(request.ttl, ttl)
        response = await self._call("edits", "PinRange", request)
        info: sequence_edit_pb2.PinInfo = response.pin
        return info
