"""Sequence is what is open: read, written, saved, parked."""

from __future__ import annotations

import logging
import time
from types import TracebackType
from typing import Any, AsyncIterator, Mapping, Optional, Sequence as Seq

import grpc
import numpy.typing as npt

from pagetide import _messages as m
from pagetide import _transport_asyncio as transport
from pagetide._attention import Attention, attend_request
from pagetide.aio.appends import PendingAppend
from pagetide.aio.calls import WorkerConnection, call_with_retry
from pagetide.aio.edits import SequenceEdits
from pagetide.aio.files import Export, begin_export
from pagetide.aio.steps import PendingStep, begin_step
from pagetide.errors import (Aborted, Internal, NotFound, PageTideError, SequenceMoved, Unavailable,
                             from_rpc_error)
from pagetide.lease import PageLease
from pagetide.options import Input, set_seconds
from pagetide.retry import RetryLoop
from pagetide.v1 import prefix_pb2, sequence_pb2, session_pb2, types_pb2

_log = logging.getLogger("pagetide")


class Sequence(SequenceEdits):
    """One open sequence. Leaving its `async with` block closes it.

    Unavailable from a method means that the worker stays away: open the tokens again, on whatever worker
    the router finds. A sequence that was moved is followed to its new worker.
    """

    async def __aenter__(self) -> "Sequence":
        return self

    async def __aexit__(self, kind: Optional[type[BaseException]], error: Optional[BaseException],
                        trace: Optional[TracebackType]) -> None:
        if self._is_closed:
            return
        try:  # best effort: the worker may be gone
            await self.worker.sequences.CloseSequence(
                self._close_request(), timeout=m.CLOSE_TIMEOUT)
        except grpc.RpcError as rpc_error:
            _log.info("close sequence %s: %s", self.id, from_rpc_error(rpc_error))
        self._is_closed = True

    async def wait_ready(self) -> int:
        """Waits until all reused pages are resident. The length, shorter than at open if a restore
        failed (then shortened_because says why)."""
        request = sequence_pb2.WatchReadinessRequest(sequence_id=self.id)

        async def watch(worker: WorkerConnection) -> Any:
            async def attempt(left: float) -> Any:
                last = None
                async for last in worker.sequences.WatchReadiness(request, timeout=left):
                    pass
                if last is None or not last.done:
                    raise Internal(f"watch readiness of {self.id}: the stream ended before it was done")
                return last
            return await call_with_retry(worker.options, attempt)

        last = await self._follow(watch)
        self.shortened_because = last.shortened_because
        if last.length != self.state.length:
            await self.refresh()
        return self.length

    async def refresh(self) -> None:
        """Fetches the state anew."""
        request = sequence_pb2.GetSequenceRequest(sequence_id=self.id)
        response = await self._call("sequences", "GetSequence", request)
        self.state = response.state

    async def begin_append(self, tokens: m.Tokens, pin_prefix: bool = False,
                           inputs: Seq[Input] = ()) -> PendingAppend:
        """Prefill: rows of many tokens, layer by layer; all or nothing at commit(). inputs: those at the
        positions of these tokens."""
        append = PendingAppend(self, m.new_request_id())
        await append.send(self._header(append.append_id, tokens, inputs, pin_prefix))
        return append

    async def begin_step(self, num_tokens: int, pin_prefix: bool = False,
                         parents: Seq[int] = ()) -> PendingStep:
        """Reserves the slots of the next num_tokens (1 to 1024) tokens; the rows go through memory
        shared with the worker where it is on this host. parents: a draft tree, for each token the index of
        the one before it, -1: the last committed one; none: one after another."""
        return await begin_step(self, num_tokens, pin_prefix, parents)

    async def attend(self, group: int, layer: int, queries: npt.NDArray[Any], first_position: int,
                     scale: float = 0.0, allow_behind_end: bool = False) -> Attention:
        """Attention over the committed rows of one layer (index within the group), computed by the worker.
        queries: [num_queries, query_heads, k_dim], at consecutive positions from first_position on; one at
        position p sees keys at positions <= p. scale 0: 1 / sqrt(k_dim). allow_behind_end: they may
        lie behind the rows, which are a part of a longer context (merge_attention). FailedPrecondition
        (CANNOT_ATTEND) for packed, opaque and recurrent groups; InvalidArgument when the answer's floats
        would exceed 4 MiB."""
        return await self._attend(attend_request(
            self.model, self.id, self.state.epoch, group, layer, queries, first_position, scale,
            allow_behind_end))

    async def read_rows(self, group: int, begin: int = 0, end: int = 0,
                        layers: Seq[int] = ()) -> AsyncIterator[m.RowsPart]:
        """Verified rows [begin, end) of `layers` (none: all) of a group, as they arrive; end 0: to the
        end. Retried until the first part arrives, never after it (then Aborted: read again)."""
        request = self._read_request(group, begin, end, layers)
        loop = RetryLoop(self.worker.options.retry, self.worker.options.timeout)
        moves = 0
        while True:
            delivered = False
            stream = self.worker.sequences.ReadRows(request, timeout=max(loop.time_left(), 0.001))
            try:
                async for message in stream:
                    part = m.check_part(message, self.model.groups[group], self.id)
                    delivered = True
                    yield part
                return
            except grpc.RpcError as rpc_error:
                error = from_rpc_error(rpc_error)
                if isinstance(error, SequenceMoved) and error.address and moves < m.MAX_MOVES:
                    moves += 1
                    self.worker = self._client.connect_worker(error.address)
                    continue
                if delivered and isinstance(error, Unavailable):
                    raise Aborted(f"read rows: {error.message}") from rpc_error
                pause = loop.next_pause(error)
                if pause is None:
                    raise error from rpc_error
                await transport.sleep(pause)
            finally:
                stream.cancel()

    async def read_block(self, group: int, begin: int, end: int,
                         out: Optional[m.Bytes] = None, in_place: bool = True) -> m.Bytes:
        """Rows [begin, end) of all layers of a group: [layer][K: n rows][V: n rows], a page's layout
        when the range is a page. By shared memory where the worker is on this host, by RPC otherwise.
        `out`: written to instead of a new array. in_place: False always takes the RPC."""
        block = m.Block(self.model.groups[group], begin, end, out)
        if block.num_tokens <= 0:
            raise ValueError(f"read block [{begin}, {end}): empty")
        lease = await self.lease_pages() if in_place else None
        if lease is not None and lease.copy(group, begin, end, block.bytes) and lease.is_valid():
            return block.bytes
        async for part in self.read_rows(group, begin, end):
            block.put(part)
        block.check_complete(self.id)
        return block.bytes

    async def lease_pages(self, seconds: float = 5.0) -> Optional[PageLease]:
        """Makes all pages resident and holds them for so long (at most 30 s), to be read in place. None
        where that cannot be: the worker is on another host, or has not the frames."""
        if self.state.model_digest != self.model.digest:
            return None  # loaded as another model whose rows are the same: they lie in its pool
        plane = await self.worker.plane(self.model)
        if plane is None or not plane.has_pool or not plane.is_alive():
            return None
        valid_until = time.monotonic() + seconds  # from before the worker's clock starts
        try:
            # By its id the worker tells whether the memory that is mapped here is its own.
            table = await self._call("sequences", "GetBlockTable",
                                     self._lease_request(seconds, plane.client_id))
            while table.next_page_token:
                more = await self._call("sequences", "GetBlockTable",
                                        self._next_lease_request(table, plane.client_id))
                table.extents.extend(more.extents)
                table.next_page_token = more.next_page_token
        except PageTideError as error:
            _log.info("lease pages of %s: %s", self.id, error)
            if error.reason == "LOCAL_CLIENT_NOT_FOUND":
                self.worker.drop_plane(self.model)
            return None
        return PageLease(self.model, plane, table, valid_until)

    async def fork(self, length: Optional[int] = None) -> "Sequence":
        """A new sequence on the same worker with the first `length` tokens (None: all)."""
        response = await self._call("sequences", "ForkSequence", self._fork_request(length))
        return Sequence(self._client, self.worker, self.model, response.state)

    async def extend_match(self, tokens: m.Tokens, claim: Optional[float] = None,
                           wait: Optional[float] = None, allow_full_reuse: bool = False,
                           inputs: Seq[Input] = ()) -> prefix_pb2.ExtendMatchResponse:
        """At a boundary of a prefill's chunks: takes over what others have committed since of `tokens`, the
        prompt from here on. claim: seconds for which the first page that nobody has is the caller's to
        compute. wait: seconds to wait for a page that another one has claimed."""
        request = prefix_pb2.ExtendMatchRequest(
            request_id=m.new_request_id(), sequence=self.ref(), expected_length=self.length,
            tokens=m.token_list(tokens), inputs=m.input_list(inputs),
            allow_full_reuse=allow_full_reuse)
        set_seconds(request.claim, claim)
        set_seconds(request.wait, wait)
        response: prefix_pb2.ExtendMatchResponse = await self._call("prefixes", "ExtendMatch", request)
        self.state = response.state
        return response

    async def save(self, name: str, metadata: Optional[Mapping[str, str]] = None,
                   expected_version: Optional[int] = None,
                   durability: types_pb2.Durability = types_pb2.DURABILITY_LOCAL,
                   keep_tokens: Optional[int] = None,
                   compact: bool = False) -> session_pb2.SaveSessionResponse:
        """Saves the committed tokens as a session, which survives every process. expected_version: what
        must be there now, 0 for none; None replaces whatever is there. compact: first move the rows of an
        edited sequence together."""
        response: session_pb2.SaveSessionResponse = await self._call(
            "sessions", "SaveSession",
            self._save_request(name, metadata, expected_version, durability, keep_tokens, compact))
        return response

    async def park(self, keep_open: bool = False,
                   ttl: Optional[float] = None) -> sequence_pb2.ParkSequenceResponse:
        """Makes the sequence durable under its own id, for Client.resume on any worker, and lets go of it;
        keep_open: goes on with it. ttl: seconds that it stays parked; None: until it is closed."""
        request = sequence_pb2.ParkSequenceRequest(
            request_id=m.new_request_id(), sequence=self.ref(), keep_open=keep_open)
        set_seconds(request.ttl, ttl)
        response: sequence_pb2.ParkSequenceResponse = await self._call(
            "sequences", "ParkSequence", request)
        self.state.epoch = response.epoch
        self._is_closed = not response.is_open  # leaving the block must not drop what was parked
        return response

    async def export(self, format: session_pb2.StateFormat = session_pb2.STATE_FORMAT_NATIVE,
                     layout: Optional[session_pb2.FileLayout] = None,
                     timeout: Optional[float] = None) -> Export:
        """The sequence as a file (docs/formats/). layout: of Sequence.imported, for the same file again.
        timeout: in place of the client's; a worker allows 600 s at most. FailedPrecondition
        (CANNOT_EXPRESS): the format cannot hold this model or sequence."""
        request = session_pb2.ExportSequenceRequest(
            sequence_id=self.id, format=format, layout=layout)

        async def begin(worker: WorkerConnection) -> Export:
            async def attempt(left: float) -> Export:
                return await begin_export(worker, request, left if timeout is None else timeout)
            return await call_with_retry(worker.options, attempt)

        return await self._follow(begin)

    async def close(self) -> None:
        """Full pages stay in the worker's cache. Idempotent."""
        if self._is_closed:
            return
        await self._call("sequences", "CloseSequence", self._close_request())
        self._is_closed = True
