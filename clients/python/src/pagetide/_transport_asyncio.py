"""What the client takes from grpc and the clock, for asyncio. pagetide._transport_blocking has the same names
for threads; all else is written once, in pagetide.aio."""

from __future__ import annotations

import asyncio
from typing import Any, AsyncIterable, AsyncIterator, BinaryIO, Callable, Iterable, Optional, TypeVar, Union

import grpc
import grpc.aio

from pagetide import _messages as m
from pagetide.errors import from_rpc_error

T = TypeVar("T")
# A file's bytes: whole, in pieces of any size, or to be read.
FileData = Union[m.Rows, Iterable[bytes], AsyncIterable[bytes], BinaryIO]

sleep = asyncio.sleep


def channel(address: str, credentials: Optional[grpc.ChannelCredentials]) -> Any:
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=m.CHANNEL_OPTIONS)
    return grpc.aio.secure_channel(address, credentials, options=m.CHANNEL_OPTIONS)


async def run_blocking(function: Callable[..., T], *arguments: Any) -> T:
    """function(*arguments), which waits, on a thread of the loop's executor."""
    return await asyncio.get_running_loop().run_in_executor(None, function, *arguments)


async def parts_of(data: FileData) -> AsyncIterator[bytes]:
    """The bytes of a file in messages' sizes. A file object is read on a thread of the loop's executor."""
    if isinstance(data, AsyncIterable):
        async for piece in data:
            for part in m.split_bytes(piece):
                yield part
    elif hasattr(data, "read"):
        while piece := await run_blocking(data.read, m.MAX_PART_BYTES):
            yield piece
    else:
        for part in m.file_parts(data):
            yield part


class RequestStream:
    """A call to which messages are streamed and which answers once."""

    def __init__(self, method: Any, timeout: float) -> None:
        self._call = method(timeout=timeout)

    async def write(self, message: Any) -> bool:
        """Waits while earlier messages are unsent. False when the call has ended: finish() says why."""
        try:
            await self._call.write(message)
        except (grpc.RpcError, asyncio.InvalidStateError):
            return False
        return True

    async def wait_until_served(self) -> None:
        """Returns when the other side answers the first message, or the call has ended."""
        await self._call.initial_metadata()

    async def finish(self) -> Any:
        """The answer, after all messages."""
        try:
            await self._call.done_writing()
        except (grpc.RpcError, asyncio.InvalidStateError):
            pass  # the call has ended; its status says why
        try:
            return await self._call
        except grpc.RpcError as rpc_error:
            raise from_rpc_error(rpc_error) from rpc_error

    def cancel(self) -> None:
        self._call.cancel()
