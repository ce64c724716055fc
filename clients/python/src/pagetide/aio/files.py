"""Sequences as files: PageTide's own and those of other programs (docs/formats/)."""

from __future__ import annotations

from types import TracebackType
from typing import Any, AsyncIterator, BinaryIO, Optional

import grpc

from pagetide import _messages as m
from pagetide import _transport_asyncio as transport
from pagetide.aio.calls import WorkerConnection
from pagetide.errors import Aborted, DataLoss, Internal, Unavailable, from_rpc_error
from pagetide.v1 import session_pb2


class Export:
    """A file on its way out. Leaving its `async with` block ends it. The file is the sequence as it was when
    the export began."""

    def __init__(self, sequence_id: str, stream: Any,
                 header: session_pb2.ExportSequenceResponse.Header) -> None:
        self.header = header  # total_bytes, tokens, format
        self._sequence_id = sequence_id
        self._stream = stream

    async def __aenter__(self) -> "Export":
        return self

    async def __aexit__(self, kind: Optional[type[BaseException]], error: Optional[BaseException],
                        trace: Optional[TracebackType]) -> None:
        self._stream.cancel()

    async def parts(self) -> AsyncIterator[bytes]:
        """The file's bytes, once. DataLoss unless all of header.total_bytes came; Aborted when the worker
        went away: export again."""
        got = 0
        try:
            async for message in self._stream:
                got += len(message.data)
                yield message.data
        except grpc.RpcError as rpc_error:
            error = from_rpc_error(rpc_error)
            if isinstance(error, Unavailable):
                raise Aborted(f"export {self._sequence_id}: {error.message}") from rpc_error
            raise error from rpc_error
        if got != self.header.total_bytes:
            raise DataLoss(f"export {self._sequence_id}: {got} of {self.header.total_bytes} bytes came")

    async def read(self) -> bytes:
        """The whole file."""
        return b"".join([part async for part in self.parts()])

    async def write_to(self, file: BinaryIO) -> int:
        """Writes the whole file; its size."""
        async for part in self.parts():
            await transport.run_blocking(file.write, part)
        return int(self.header.total_bytes)


async def begin_export(worker: WorkerConnection, request: session_pb2.ExportSequenceRequest,
                       time_left: float) -> Export:
    """Returns when the worker has answered what follows."""
    stream = worker.sessions.ExportSequence(request, timeout=time_left)
    async for message in stream:
        if message.HasField("header"):
            return Export(request.sequence_id, stream, message.header)
        break
    stream.cancel()
    raise Internal(f"export {request.sequence_id}: the stream did not begin with a header")


async def import_file(worker: WorkerConnection, header: session_pb2.ImportSequenceRequest.Header,
                      data: transport.FileData, timeout: float) -> session_pb2.ImportSequenceResponse:
    """Sends a file; the answer when the worker has opened a sequence from it."""
    stream = transport.RequestStream(worker.sessions.ImportSequence, timeout)
    try:
        has_room = await stream.write(session_pb2.ImportSequenceRequest(header=header))
        async for part in transport.parts_of(data):
            if not has_room:
                break
            has_room = await stream.write(session_pb2.ImportSequenceRequest(data=part))
        response: session_pb2.ImportSequenceResponse = await stream.finish()
    except BaseException:
        stream.cancel()
        raise
    if not has_room:
        raise Internal(f"import: the worker answered before the file's end, sequence "
                       f"{response.state.sequence_id}")
    return response
