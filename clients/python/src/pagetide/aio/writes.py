"""Writes to a sequence: an append of many tokens, a step of few."""

from __future__ import annotations

import logging
from types import TracebackType
from typing import Optional, Sequence as Seq

import grpc

from pagetide import _messages as m
from pagetide import _transport_asyncio as transport
from pagetide.aio.calls import SequenceCalls
from pagetide.errors import Aborted, FailedPrecondition, from_rpc_error
from pagetide.model import RowKind
from pagetide.v1 import sequence_pb2

_log = logging.getLogger("pagetide")


class PendingAppend:
    """Rows of many tokens on their way. Leaving its `async with` block without commit() cancels it: nothing
    changes. One pending write a sequence. Not retried: after Unavailable look at the sequence and begin
    again."""

    def __init__(self, sequence: SequenceCalls, append_id: str) -> None:
        self.append_id = append_id
        self._sequence = sequence
        self._stream = transport.RequestStream(
            sequence.worker.sequences.AppendTokens, sequence.worker.options.timeout)
        self._is_finished = False

    async def __aenter__(self) -> "PendingAppend":
        return self

    async def __aexit__(self, kind: Optional[type[BaseException]], error: Optional[BaseException],
                        trace: Optional[TracebackType]) -> None:
        self.cancel()

    def _check_open(self) -> None:
        if self._is_finished:
            raise FailedPrecondition(f"append {self.append_id} to {self._sequence.id} is over")

    async def send(self, message: sequence_pb2.AppendTokensRequest) -> None:
        """One message of the call; write_rows and write_block make them."""
        self._check_open()
        if not await self._stream.write(message):
            self._is_finished = True
            await self._stream.finish()
            raise Aborted(f"append {self.append_id}: the worker ended the stream before the rows")

    async def write_rows(self, group: int, layer: int, kind: RowKind, first_token: int,
                         rows: m.Rows) -> None:
        """Rows [first_token, …) of the append, relative to its first token: [n, row_bytes]. Layers in
        any order, tokens in order within a layer and kind."""
        own = self._sequence.model.groups[group]
        for message in m.row_parts(group, layer, kind, first_token, m.as_bytes(rows),
                                   own.row_bytes(kind)):
            await self.send(message)

    async def write_block(self, group: int, num_tokens: int, block: m.Rows) -> None:
        """All rows of all layers of a group: [layer][K: n rows][V: n rows]."""
        own = self._sequence.model.groups[group]
        for layer, kind, rows in m.split_block(own, num_tokens, block):
            await self.write_rows(group, layer, kind, 0, rows)

    async def commit(self) -> sequence_pb2.AppendTokensResponse:
        """All rows of all layers were written."""
        self._check_open()
        self._is_finished = True
        response: sequence_pb2.AppendTokensResponse = await self._stream.finish()
        self._sequence.state = response.state
        return response

    def cancel(self) -> None:
        """Nothing changes. After commit() this does nothing."""
        if not self._is_finished:
            self._is_finished = True
            self._stream.cancel()


class PendingStep(m.StepBase):
    """Reserved slots. Leaving its `async with` block without commit() gives them back."""

    def __init__(self, sequence: SequenceCalls, slot: sequence_pb2.ReserveSlotsResponse.Slot,
                 region: Optional[m.Bytes]) -> None:
        super().__init__(sequence, slot, region)
        self._sequence = sequence

    async def __aenter__(self) -> "PendingStep":
        return self

    async def __aexit__(self, kind: Optional[type[BaseException]], error: Optional[BaseException],
                        trace: Optional[TracebackType]) -> None:
        await self.abort()

    async def commit(self, tokens: m.Tokens, indices: Seq[int] = ()) -> None:
        """Fewer tokens than reserved: the rest is dropped. indices: which reserved slots the tokens take,
        ascending, one for each (speculative decoding); none: the first ones."""
        if not self._is_open:
            raise FailedPrecondition(f"step of {self._sequence.id} is over")
        request = self._sequence._commit_request(  # noqa: SLF001
            self._slot.reservation_id, tokens, self._unsent, self.is_local, indices)
        response = await self._sequence._call("sequences", "CommitStep", request)  # noqa: SLF001
        self._sequence._committed(response)  # noqa: SLF001
        self._is_open = False

    async def abort(self) -> None:
        """Gives the slots back. Best effort: a reservation ends by itself."""
        if not self._is_open:
            return
        self._is_open = False
        request = self._sequence._abort_request(self._slot.reservation_id)  # noqa: SLF001
        try:
            await self._sequence.worker.sequences.AbortReservation(request, timeout=m.CLOSE_TIMEOUT)
        except grpc.RpcError as rpc_error:
            _log.info("abort reservation %d: %s", self._slot.reservation_id,
                      from_rpc_error(rpc_error))
