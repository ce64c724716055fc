"""Calls to one worker: repeated where that is safe, and following a sequence that moved."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Any, Awaitable, Callable, Optional, TypeVar

import grpc

from pagetide import _messages as m
from pagetide import _transport_asyncio as transport
from pagetide._attention import Attention, attention_of
from pagetide.engine_memory import EngineMemory
from pagetide.errors import FailedPrecondition, PageTideError, SequenceMoved, from_rpc_error
from pagetide.local_plane import LocalPlane
from pagetide.model import Model
from pagetide.retry import CallOptions, RetryLoop
from pagetide.v1 import (admin_pb2, admin_pb2_grpc, engine_pool_pb2_grpc, prefix_pb2_grpc,
                         sequence_edit_pb2_grpc, sequence_pb2, sequence_pb2_grpc, session_pb2_grpc,
                         shard_group_pb2_grpc, types_pb2)

if TYPE_CHECKING:
    from pagetide.aio.client import Client

_log = logging.getLogger("pagetide")
T = TypeVar("T")
# Between two attempts to share memory with a worker: each may take LOCAL_PLANE_TIMEOUT.
_PLANE_RETRY_SECONDS = 30.0


async def call_with_retry(options: CallOptions, attempt: Callable[[float], Awaitable[T]]) -> T:
    """attempt(time_left) until it returns or the error is not to be retried."""
    loop = RetryLoop(options.retry, options.timeout)
    while True:
        try:
            return await attempt(max(loop.time_left(), 0.001))
        except grpc.RpcError as rpc_error:
            error = from_rpc_error(rpc_error)
            pause = loop.next_pause(error)
            if pause is None:
                raise error from rpc_error
        except PageTideError as error:
            pause = loop.next_pause(error)
            if pause is None:
                raise
        await transport.sleep(pause)


async def unary(options: CallOptions, method: Any, request: Any) -> Any:
    async def attempt(left: float) -> Any:
        return await method(request, timeout=left)
    return await call_with_retry(options, attempt)


async def unary_once(options: CallOptions, method: Any, request: Any) -> Any:
    """For calls of which a repeat may do what the first did not."""
    try:
        return await method(request, timeout=options.timeout)
    except grpc.RpcError as rpc_error:
        raise from_rpc_error(rpc_error) from rpc_error


class WorkerConnection:
    """Channel, stubs and local planes to one worker, shared by the sequences opened there. Thread-safe."""

    def __init__(self, address: str, local_socket: str, staging_bytes: int, step_lease: float,
                 options: CallOptions, credentials: Optional[grpc.ChannelCredentials]) -> None:
        self.address = address
        self.step_lease = step_lease  # seconds
        self.options = options
        self._local_socket = local_socket
        self._staging_bytes = staging_bytes
        self._channel = transport.channel(address, credentials)
        self.sequences: Any = sequence_pb2_grpc.SequenceServiceStub(self._channel)
        self.edits: Any = sequence_edit_pb2_grpc.SequenceEditServiceStub(self._channel)
        self.sessions: Any = session_pb2_grpc.SessionServiceStub(self._channel)
        self.prefixes: Any = prefix_pb2_grpc.PrefixServiceStub(self._channel)
        self.shard_groups: Any = shard_group_pb2_grpc.ShardGroupServiceStub(self._channel)
        self.engine_pools: Any = engine_pool_pb2_grpc.EnginePoolServiceStub(self._channel)
        self.admin: Any = admin_pb2_grpc.AdminServiceStub(self._channel)
        self._lock = threading.Lock()  # never held across a wait
        self._planes: dict[str, LocalPlane] = {}  # by model digest
        self._planes_again_at: dict[str, float] = {}  # by model digest: not asked for before

    def learn_local_socket(self, local_socket: str) -> None:
        """Who made this connection may not have known the socket."""
        if not self._local_socket:
            self._local_socket = local_socket

    async def plane(self, model: Model) -> Optional[LocalPlane]:
        """Shared memory for a model, connected on first use and again after its worker ended; None when the
        worker is not on this host or has no local plane (asked again after a while)."""
        if not self._local_socket:
            return None
        with self._lock:
            known = self._planes.get(model.digest)
            if known is not None and known.is_alive():
                return known
            if known is not None:  # the pool of a worker that is gone stays mapped no longer
                del self._planes[model.digest]
                known.close()
            if time.monotonic() < self._planes_again_at.get(model.digest, 0.0):
                return None
            self._planes_again_at[model.digest] = time.monotonic() + _PLANE_RETRY_SECONDS
        plane: Optional[LocalPlane] = None
        try:
            plane = await transport.run_blocking(
                LocalPlane.connect, self._local_socket, self._staging_bytes, m.LOCAL_PLANE_TIMEOUT,
                model.digest)
        except PageTideError as error:
            _log.info("rows go by RPC: %s", error)
        if plane is None:
            return None
        with self._lock:  # of two first callers one plane stays
            kept = self._planes.setdefault(model.digest, plane)
        if kept is not plane:
            plane.close()
        return kept

    async def hand_over(self, memory: EngineMemory) -> LocalPlane:
        """A connection of its own for an engine's memory. FailedPrecondition without a local socket, or
        with the worker's words."""
        if not self._local_socket:
            raise FailedPrecondition(f"hand memory over to {self.address}: it has no local plane on this host")
        plane: LocalPlane = await transport.run_blocking(
            LocalPlane.connect, self._local_socket, 1, m.LOCAL_PLANE_TIMEOUT, "", [memory])
        return plane

    def drop_plane(self, model: Model) -> None:
        """The worker does not know this client (it restarted, or another worker has a socket of the same
        name on this host): use RPC for a while."""
        with self._lock:
            plane = self._planes.pop(model.digest, None)
            self._planes_again_at[model.digest] = time.monotonic() + _PLANE_RETRY_SECONDS
        if plane is not None:
            plane.close()

    async def stats(self) -> dict[str, float]:
        """Counters of the worker since its start, by metric name."""
        response = await unary(self.options, self.admin.GetStats, admin_pb2.GetStatsRequest())
        return dict(response.values)

    async def close(self) -> None:
        """Ends the channel and the shared memory."""
        with self._lock:
            planes, self._planes = list(self._planes.values()), {}
        for plane in planes:
            plane.close()
        await self._channel.close()


class SequenceCalls(m.SequenceBase):
    """Calls on an open sequence, where it is now. The client outlives its sequences."""

    def __init__(self, client: "Client", worker: WorkerConnection, model: Model,
                 state: types_pb2.SequenceState) -> None:
        super().__init__(model, state)
        self._client = client
        self.worker = worker

    async def _follow(self, call: Callable[[WorkerConnection], Awaitable[T]]) -> T:
        """call(worker), once more on the worker that a SEQUENCE_MOVED names."""
        for _ in range(m.MAX_MOVES):
            try:
                return await call(self.worker)
            except SequenceMoved as moved:
                if not moved.address:
                    raise
                _log.info("sequence %s moved to %s", self.id, moved.address)
                self.worker = self._client.connect_worker(moved.address)
        return await call(self.worker)

    async def _call(self, service: str, method: str, request: Any) -> Any:
        return await self._follow(
            lambda worker: unary(worker.options, getattr(getattr(worker, service), method), request))

    async def _attend(self, request: sequence_pb2.AttendRequest) -> Attention:
        return attention_of(self.model, request, await self._call("sequences", "Attend", request))
