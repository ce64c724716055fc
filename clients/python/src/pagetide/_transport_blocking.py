"""What the client takes from grpc and the clock, for threads. See pagetide._transport_asyncio."""

from __future__ import annotations

import queue
import threading
import time
from typing import Any, BinaryIO, Callable, Iterable, Iterator, Optional, TypeVar, Union

import grpc

from pagetide import _messages as m
from pagetide.errors import Cancelled, DeadlineExceeded, from_rpc_error

T = TypeVar("T")
# A file's bytes: whole, in pieces of any size, or to be read.
FileData = Union[m.Rows, Iterable[bytes], BinaryIO]

sleep = time.sleep


def channel(address: str, credentials: Optional[grpc.ChannelCredentials]) -> grpc.Channel:
    if credentials is None:
        return grpc.insecure_channel(address, options=m.CHANNEL_OPTIONS)
    return grpc.secure_channel(address, credentials, options=m.CHANNEL_OPTIONS)


def run_blocking(function: Callable[..., T], *arguments: Any) -> T:
    return function(*arguments)


def parts_of(data: FileData) -> Iterator[bytes]:
    """The bytes of a file in messages' sizes."""
    if hasattr(data, "read"):
        while piece := data.read(m.MAX_PART_BYTES):
            yield piece
    else:
        yield from m.file_parts(data)


class RequestStream:
    """A call to which messages are streamed and which answers once."""

    _END = None

    def __init__(self, method: Any, timeout: float) -> None:
        self._deadline = time.monotonic() + timeout
        # At most two messages are unsent; then the caller waits.
        self._unsent: queue.Queue[Any] = queue.Queue(maxsize=2)
        self._is_over = threading.Event()  # the call has ended: nobody reads any more
        self._call = method.future(self._messages(), timeout=timeout)
        self._call.add_done_callback(lambda _: self._is_over.set())

    def _messages(self) -> Iterator[Any]:
        """Runs on a thread of grpc's."""
        while not self._is_over.is_set():
            try:
                message = self._unsent.get(timeout=0.5)
            except queue.Empty:
                continue
            if message is self._END:
                return
            yield message

    def write(self, message: Any) -> bool:
        """Waits while earlier messages are unsent. False when the call has ended: finish() says why."""
        while not self._is_over.is_set():
            if time.monotonic() > self._deadline:
                raise DeadlineExceeded("send: the worker took nothing more in time")
            try:
                self._unsent.put(message, timeout=0.05)
                return True
            except queue.Full:
                continue
        return False

    def wait_until_served(self) -> None:
        """Returns when the other side answers the first message, or the call has ended."""
        self._call.initial_metadata()

    def finish(self) -> Any:
        """The answer, after all messages."""
        self.write(self._END)
        try:
            return self._call.result()
        except grpc.RpcError as rpc_error:
            raise from_rpc_error(rpc_error) from rpc_error
        except grpc.FutureCancelledError as cancelled:
            raise Cancelled("the call was cancelled") from cancelled

    def cancel(self) -> None:
        self._call.cancel()
        self._is_over.set()
