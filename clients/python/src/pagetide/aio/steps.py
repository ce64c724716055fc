"""Steps: the next few tokens of one sequence, or of many of one worker and model."""

from __future__ import annotations

import logging
import time
from types import TracebackType
from typing import Any, Optional, Sequence as Seq

import grpc
import numpy.typing as npt

from pagetide import _messages as m
from pagetide._attention import Attention
from pagetide._step import ReservedSlot, StepBase, check_one_result, reserve_item
from pagetide.aio.calls import SequenceCalls
from pagetide.errors import (DeadlineExceeded, Internal, NotFound, PageTideError, Unavailable,
                             from_rpc_error)
from pagetide.options import set_seconds
from pagetide.v1 import sequence_pb2

_log = logging.getLogger("pagetide")
# Rows of one CommitStep: leaves room for the other fields of 4096 items.
_MAX_COMMIT_BYTES = 3 << 20


class PendingStep(StepBase):
    """Reserved slots. Leaving its `async with` block without commit() gives them back."""

    def __init__(self, sequence: SequenceCalls, reserved: ReservedSlot, is_tree: bool) -> None:
        super().__init__(sequence, reserved, is_tree)
        self._sequence = sequence

    async def __aenter__(self) -> "PendingStep":
        return self

    async def __aexit__(self, kind: Optional[type[BaseException]], error: Optional[BaseException],
                        trace: Optional[TracebackType]) -> None:
        await self.abort()

    async def attend(self, group: int, layer: int, queries: npt.NDArray[Any], first_position: int,
                     scale: float = 0.0) -> Attention:
        """As Sequence.attend, over the committed rows and those written here. In a draft tree
        first_position + i names reserved token i, which sees its ancestors and itself. FailedPrecondition
        (PREFIX_NOT_PINNED) without begin_step's pin_prefix."""
        request = self._attend_request(group, layer, queries, first_position, scale)
        attention = await self._sequence._attend(request)  # noqa: SLF001
        self._attended(request)
        return attention

    async def commit(self, tokens: m.Tokens, indices: Seq[int] = ()) -> None:
        """Fewer tokens than reserved: the rest is dropped. indices: which reserved slots the tokens take,
        ascending, one for each (speculative decoding); none: the first ones."""
        item = self._commit_item(tokens, indices)
        self._sent()
        response = await self._sequence._call(  # noqa: SLF001
            "sequences", "CommitStep", sequence_pb2.CommitStepRequest(
                request_id=m.new_request_id(), items=[item]))
        error = self._committed(check_one_result(self._sequence, response))
        if error is not None:
            raise error

    async def abort(self) -> None:
        """Gives the slots back. Best effort: a reservation ends by itself."""
        await _give_back([(self._sequence, self)])


class BatchStep:
    """Slots of many sequences, reserved together, all or none; committed together, each sequence by itself.
    Leaving its `async with` block gives back what was not committed."""

    def __init__(self, sequences: Seq[SequenceCalls], steps: Seq[StepBase]) -> None:
        self._sequences = list(sequences)
        self._steps = list(steps)

    async def __aenter__(self) -> "BatchStep":
        return self

    async def __aexit__(self, kind: Optional[type[BaseException]], error: Optional[BaseException],
                        trace: Optional[TracebackType]) -> None:
        await self.abort()

    def __len__(self) -> int:
        return len(self._steps)

    def __getitem__(self, i: int) -> StepBase:
        """Sequence i's part: first_position, region, write_rows."""
        return self._steps[i]

    @property
    def is_local(self) -> bool:
        return self._steps[0].is_local

    async def attend(self, i: int, group: int, layer: int, queries: npt.NDArray[Any], first_position: int,
                     scale: float = 0.0) -> Attention:
        """As Sequence.attend, over the committed rows of sequence i and those written here."""
        step = self._steps[i]
        request = step._attend_request(group, layer, queries, first_position, scale)  # noqa: SLF001
        attention = await self._sequences[i]._attend(request)  # noqa: SLF001
        step._attended(request)  # noqa: SLF001
        return attention

    async def commit(self, tokens: Seq[m.Tokens]) -> list[Optional[PageTideError]]:
        """tokens[i]: those of sequence i, at most as many as reserved; fewer: the rest is dropped. For each
        sequence None when it was committed, else why not; such a one is as it was before the step. Rows
        that do not fit one message go in several calls. An error that is raised says that a call got no
        answer: Sequence.refresh tells what became of its sequences."""
        if len(tokens) != len(self._steps):
            raise ValueError(f"commit step: tokens of {len(tokens)} sequences, expected {len(self._steps)}")
        items = [step._commit_item(own) for step, own in zip(self._steps, tokens)]  # noqa: SLF001
        errors: list[Optional[PageTideError]] = []
        while len(errors) < len(items):
            begin = end = len(errors)
            size = 0
            while end < len(items):
                size += sum(len(part.data) for part in items[end].rows)
                if size > _MAX_COMMIT_BYTES and end > begin:
                    break
                end += 1
            for step in self._steps[begin:end]:
                step._sent()  # noqa: SLF001
            response = await self._sequences[0]._call(  # noqa: SLF001
                "sequences", "CommitStep", sequence_pb2.CommitStepRequest(
                    request_id=m.new_request_id(), items=items[begin:end]))
            if len(response.results) != end - begin:
                raise Internal(f"commit step: {len(response.results)} results, expected {end - begin}")
            errors += [step._committed(result)  # noqa: SLF001
                       for step, result in zip(self._steps[begin:end], response.results)]
        return errors

    async def abort(self) -> None:
        """Gives back what was not committed. Best effort: a reservation ends by itself."""
        await _give_back(list(zip(self._sequences, self._steps)))


async def _give_back(steps: Seq[tuple[SequenceCalls, StepBase]]) -> None:
    for sequence, step in steps:
        request = step._end()  # noqa: SLF001
        if request is None:
            continue
        try:
            await sequence.worker.sequences.AbortReservation(request, timeout=m.CLOSE_TIMEOUT)
        except grpc.RpcError as rpc_error:
            error = from_rpc_error(rpc_error)
            _log.info("abort reservation %d: %s", request.reservation_id, error)
            if isinstance(error, (DeadlineExceeded, Unavailable)):
                return  # the others would wait as long in vain


async def _reserve(sequences: Seq[SequenceCalls],
                   items: Seq[sequence_pb2.ReserveSlotsRequest.Item],
                   pin_prefix: bool) -> list[ReservedSlot]:
    """A slot and its region of shared memory for each item; no regions where the rows go by RPC."""
    first = sequences[0]
    lease = first.worker.step_lease
    lease_ends = 0.0
    plane = await first.worker.plane(first.model)
    staged = sum(first.model.staged_bytes(item.num_tokens) for item in items)
    if plane is not None and staged > plane.staging_bytes:
        plane = None

    async def reserve() -> Any:
        nonlocal lease_ends
        lease_ends = time.monotonic() + lease
        request = sequence_pb2.ReserveSlotsRequest(
            request_id=m.new_request_id(), items=items, pin_prefix=pin_prefix,
            local_client_id=0 if plane is None else plane.client_id)
        set_seconds(request.lease, lease)
        return await first._call("sequences", "ReserveSlots", request)  # noqa: SLF001

    try:
        response = await reserve()
    except NotFound as error:
        if plane is None or error.reason == "SEQUENCE_NOT_FOUND":
            raise
        # The worker forgot the staging buffer, which does not hinder the step.
        first.worker.drop_plane(first.model)
        plane = None
        response = await reserve()
    if len(response.slots) != len(items):
        raise Internal(f"reserve slots: {len(response.slots)} slots, expected {len(items)}")
    return [ReservedSlot(
        slot, None if plane is None else plane.region(slot.staging_offset, slot.staging_bytes), lease_ends)
        for slot in response.slots]


async def begin_step(sequence: SequenceCalls, num_tokens: int, pin_prefix: bool,
                     parents: Seq[int]) -> PendingStep:
    slots = await _reserve([sequence], [reserve_item(sequence, num_tokens, parents)], pin_prefix)
    return PendingStep(sequence, slots[0], is_tree=len(parents) > 0)


async def begin_batch_step(sequences: Seq[SequenceCalls], num_tokens: int,
                           pin_prefix: bool) -> BatchStep:
    first = m.first_of(sequences)
    for sequence in sequences:
        if sequence.worker is not first.worker or sequence.model.digest != first.model.digest:
            raise ValueError(
                f"begin step: {sequence.id} is of model {sequence.model.name} on {sequence.worker.address}, "
                f"{first.id} of {first.model.name} on {first.worker.address}")
    slots = await _reserve(sequences, [reserve_item(s, num_tokens) for s in sequences], pin_prefix)
    return BatchStep(sequences, [StepBase(sequence, slot) for sequence, slot in zip(sequences, slots)])
