"""What the steps of the sync and the asyncio client share: their requests, and rows that wait to be sent. Pure."""

from __future__ import annotations

import dataclasses
import time
from typing import Any, Optional, Sequence as Seq

import numpy.typing as npt

from pagetide import _messages as m
from pagetide._attention import attend_request
from pagetide.errors import FailedPrecondition, Internal, PageTideError, make_error
from pagetide.model import RowKind
from pagetide.v1 import sequence_pb2


def reserve_item(sequence: m.SequenceBase, num_tokens: int,
                 parents: Seq[int] = ()) -> sequence_pb2.ReserveSlotsRequest.Item:
    return sequence_pb2.ReserveSlotsRequest.Item(
        sequence=sequence.ref(), num_tokens=num_tokens, parents=parents)


@dataclasses.dataclass(frozen=True)
class ReservedSlot:
    slot: sequence_pb2.ReserveSlotsResponse.Slot
    region: Optional[m.Bytes]  # of shared memory; None: rows go by RPC
    lease_ends: float          # time.monotonic(), counted from before the slots were asked for


class StepBase:
    """One sequence's part of a step: its rows, in the shared region or kept until they are sent."""

    def __init__(self, sequence: m.SequenceBase, reserved: ReservedSlot, is_tree: bool = False) -> None:
        slot, region = reserved.slot, reserved.region
        self._slot = slot
        self._lease_ends = reserved.lease_ends
        self._may_be_committed = False  # a commit was sent and has no answer
        self._is_tree = is_tree
        self._end_position = slot.first_position  # behind what is committed
        self._base = sequence
        self._region = region
        self._unsent: list[sequence_pb2.RowPart] = []
        self._is_open = True
        expected = sequence.model.staged_bytes(slot.num_tokens)
        if region is not None and region.size != expected:
            raise Internal(f"reserve slots of {sequence.id}: staging of {region.size} bytes, "
                           f"expected {expected}")

    @property
    def first_position(self) -> int:
        return self._slot.first_position

    @property
    def num_tokens(self) -> int:
        return self._slot.num_tokens

    @property
    def is_local(self) -> bool:
        return self._region is not None

    @property
    def region(self) -> Optional[m.Bytes]:
        """The rows in shared memory, [group][layer][K: num_tokens rows][V: num_tokens rows]; None when
        the worker is on another host. Writing here is write_rows without a copy. Not to be written after a
        commit, nor once the client's step_lease is over: it may be another step's by then."""
        if self._region is not None:
            self._check_held()
        return self._region

    def write_rows(self, group: int, layer: int, k_rows: m.Rows, v_rows: m.Rows = b"") -> None:
        """The rows of all reserved tokens in one layer: [num_tokens, row_bytes] each. FailedPrecondition
        when the slots are not held any more: the client's step_lease is over, or a commit took them or may
        have."""
        self._check_held()
        model, n = self._base.model, self.num_tokens
        own = model.groups[group]
        k, v = m.as_bytes(k_rows), m.as_bytes(v_rows)
        if k.size != n * own.k_row_bytes or v.size != n * own.v_row_bytes:
            raise ValueError(f"write rows of {n} tokens: {k.size} K and {v.size} V bytes, expected "
                             f"{n * own.k_row_bytes} and {n * own.v_row_bytes}")
        for kind, rows in ((RowKind.K, k), (RowKind.V, v)):
            if rows.size == 0:
                continue
            if self._region is not None:
                at = model.staged_offset(n, group, layer, kind)
                self._region[at:at + rows.size] = rows
            else:
                self._unsent.append(sequence_pb2.RowPart(
                    group=group, layer=layer, kind=kind.value, first_token=0, num_tokens=n,
                    data=rows.tobytes()))

    def _check_open(self) -> None:
        if not self._is_open:
            raise FailedPrecondition(f"step of {self._base.id} is over")

    def _check_held(self) -> None:
        self._check_open()
        if self._may_be_committed:
            raise FailedPrecondition(f"step of {self._base.id}: a commit of it got no answer")
        if time.monotonic() >= self._lease_ends:
            raise FailedPrecondition(f"step of {self._base.id}: its lease has ended")

    def _attend_request(self, group: int, layer: int, queries: npt.NDArray[Any], first_position: int,
                        scale: float) -> sequence_pb2.AttendRequest:
        """With the rows of this layer that the worker does not have."""
        self._check_open()
        base = self._base
        request = attend_request(base.model, base.id, base.state.epoch, group, layer, queries,
                                 first_position, scale)
        request.reservation_id = self._slot.reservation_id
        request.rows_in_staging = self.is_local
        for part in self._unsent:
            if (part.group, part.layer) == (group, layer):
                if part.kind == RowKind.K.value:
                    request.k_rows = part.data
                else:
                    request.v_rows = part.data
        return request

    def _attended(self, request: sequence_pb2.AttendRequest) -> None:
        """The worker has the rows that came with the request."""
        self._unsent = [part for part in self._unsent
                        if (part.group, part.layer) != (request.group, request.layer)]

    def _commit_item(self, tokens: m.Tokens,
                     indices: Seq[int] = ()) -> sequence_pb2.CommitStepRequest.Item:
        self._check_open()
        taken = m.token_list(tokens)
        # Rows keep the positions that were reserved for them; a path of a tree has one a token.
        by_index = bool(indices) and not self._is_tree
        self._end_position = self._slot.first_position + (indices[-1] + 1 if by_index else len(taken))
        return sequence_pb2.CommitStepRequest.Item(
            sequence=self._base.ref(), reservation_id=self._slot.reservation_id,
            tokens=taken, rows=self._unsent, rows_in_staging=self.is_local,
            indices=indices)

    def _sent(self) -> None:
        """Its commit goes out now."""
        self._may_be_committed = True

    def _committed(self, result: sequence_pb2.CommitStepResponse.Result) -> Optional[PageTideError]:
        """Takes over the sequence's new state, or says why there is none."""
        self._may_be_committed = False
        if result.code != 0:
            return make_error(result.code, result.message, result.reason)
        self._is_open = False
        state = self._base.state
        state.revision = result.revision
        state.length = result.length
        state.end_position = self._end_position
        return None

    def _end(self) -> Optional[sequence_pb2.AbortReservationRequest]:
        """What gives the slots back; None when the step is over."""
        if not self._is_open:
            return None
        self._is_open = False
        return sequence_pb2.AbortReservationRequest(
            sequence_id=self._base.id, epoch=self._base.state.epoch,
            reservation_id=self._slot.reservation_id)


def check_one_result(sequence: m.SequenceBase, response: sequence_pb2.CommitStepResponse
                     ) -> sequence_pb2.CommitStepResponse.Result:
    if len(response.results) != 1:
        raise Internal(f"commit step of {sequence.id}: {len(response.results)} results, expected 1")
    result: sequence_pb2.CommitStepResponse.Result = response.results[0]
    return result
