"""An append of many tokens to a sequence."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Optional

import numpy.typing as npt

from pagetide import _messages as m
from pagetide import _transport_asyncio as transport
from pagetide._attention import Attention, attend_request
from pagetide.aio.calls import SequenceCalls
from pagetide.errors import Aborted, FailedPrecondition, PageTideError
from pagetide.model import RowKind
from pagetide.v1 import sequence_pb2


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
        self._is_known = False  # the worker has the append's header

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

    async def attend(self, group: int, layer: int, queries: npt.NDArray[Any], first_position: int,
                     scale: float = 0.0) -> Attention:
        """As Sequence.attend, over the committed rows and those written here; waits until those of this
        layer have arrived. FailedPrecondition (PREFIX_NOT_PINNED) without begin_append's pin_prefix."""
        self._check_open()
        sequence = self._sequence
        if not self._is_known:
            # This call travels on another stream, and would overtake the header.
            await self._stream.wait_until_served()
            self._is_known = True
        request = attend_request(sequence.model, sequence.id, sequence.state.epoch, group, layer, queries,
                                 first_position, scale)
        request.append_id = self.append_id
        try:
            return await sequence._attend(request)  # noqa: SLF001
        except PageTideError as error:
            if error.reason != "APPEND_NOT_FOUND":
                raise
            # The worker has ended the append; the stream's status says why.
            self._is_finished = True
            await self._stream.finish()
            raise

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
