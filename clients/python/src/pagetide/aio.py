"""The asyncio client: Client and Sequence as in pagetide.client, with coroutines. For one event loop;
different sequences of it may be used by different tasks, one sequence by one task at a time."""

from __future__ import annotations

import asyncio
import logging
import time
from types import TracebackType
from typing import (Any, AsyncIterator, Awaitable, Callable, Mapping, Optional, Sequence as Seq,
                    TypeVar)

import grpc
import grpc.aio

from pagetide import _messages as m
from pagetide.client import CallOptions
from pagetide.errors import (Aborted, FailedPrecondition, Internal, NotFound, PageTideError,
                             SequenceMoved, Unavailable, from_rpc_error)
from pagetide.lease import PageLease
from pagetide.local_plane import LocalPlane
from pagetide.model import Model, RowKind
from pagetide.retry import RetryLoop, RetryPolicy
from pagetide.v1 import (admin_pb2, admin_pb2_grpc, model_pb2, prefix_pb2_grpc, router_pb2,
                         router_pb2_grpc, sequence_edit_pb2_grpc, sequence_pb2, sequence_pb2_grpc,
                         session_pb2, session_pb2_grpc, types_pb2)

_log = logging.getLogger("pagetide")
T = TypeVar("T")


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
        await asyncio.sleep(pause)


async def _unary(options: CallOptions, method: Any, request: Any) -> Any:
    async def attempt(left: float) -> Any:
        return await method(request, timeout=left)
    return await call_with_retry(options, attempt)


def _channel(address: str, credentials: Optional[grpc.ChannelCredentials]) -> Any:
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=m.CHANNEL_OPTIONS)
    return grpc.aio.secure_channel(address, credentials, options=m.CHANNEL_OPTIONS)


class WorkerConnection:
    """Channel, stubs and local planes to one worker, shared by the sequences opened there."""

    def __init__(self, address: str, local_socket: str, staging_bytes: int, options: CallOptions,
                 credentials: Optional[grpc.ChannelCredentials]) -> None:
        self.address = address
        self.options = options
        self._local_socket = local_socket
        self._staging_bytes = staging_bytes
        self._channel = _channel(address, credentials)
        self.sequences: Any = sequence_pb2_grpc.SequenceServiceStub(self._channel)
        self.edits: Any = sequence_edit_pb2_grpc.SequenceEditServiceStub(self._channel)
        self.sessions: Any = session_pb2_grpc.SessionServiceStub(self._channel)
        self.prefixes: Any = prefix_pb2_grpc.PrefixServiceStub(self._channel)
        self.admin: Any = admin_pb2_grpc.AdminServiceStub(self._channel)
        # By model digest; None: it was asked for and cannot be had.
        self._planes: dict[str, Optional[LocalPlane]] = {}

    async def plane(self, model: Model) -> Optional[LocalPlane]:
        """Shared memory for a model, connected on first use; None when the worker is not on this host
        or has no local plane (asked once; a failure is remembered)."""
        if not self._local_socket:
            return None
        if model.digest in self._planes:
            return self._planes[model.digest]
        plane: Optional[LocalPlane] = None
        try:
            plane = await asyncio.get_running_loop().run_in_executor(
                None, LocalPlane.connect, self._local_socket, self._staging_bytes,
                m.LOCAL_PLANE_TIMEOUT, model.digest)
        except PageTideError as error:
            _log.info("rows go by RPC: %s", error)
        kept = self._planes.setdefault(model.digest, plane)  # of two first callers one plane stays
        if plane is not None and kept is not plane:
            plane.close()
        return kept

    def drop_plane(self, model: Model) -> None:
        """The worker no longer knows this client (it restarted): use RPC from now on."""
        plane, self._planes[model.digest] = self._planes.get(model.digest), None
        if plane is not None:
            plane.close()

    async def stats(self) -> dict[str, float]:
        """Counters of the worker since its start, by metric name."""
        response = await _unary(self.options, self.admin.GetStats, admin_pb2.GetStatsRequest())
        return dict(response.values)

    async def close(self) -> None:
        for plane in self._planes.values():
            if plane is not None:
                plane.close()
        self._planes = {}
        await self._channel.close()


class Client:
    """As pagetide.Client. Create it inside the event loop that uses it."""

    def __init__(self, router: str = "", worker: str = "", worker_local_socket: str = "",
                 timeout: float = 30.0, retry: RetryPolicy = RetryPolicy(),
                 max_assignments: int = 3, use_local_plane: bool = True,
                 staging_bytes: int = 16 << 20,
                 credentials: Optional[grpc.ChannelCredentials] = None) -> None:
        if bool(router) == bool(worker):
            raise ValueError(f"client: router \"{router}\" and worker \"{worker}\": exactly one must "
                             "be set")
        if max_assignments < 1:
            raise ValueError(f"client: max_assignments is {max_assignments}, must be at least 1")
        self._options = CallOptions(timeout, retry)
        self._max_assignments = max_assignments
        self._use_local_plane = use_local_plane
        self._staging_bytes = staging_bytes
        self._credentials = credentials
        self._worker_address = worker
        self._worker_local_socket = worker_local_socket
        self._router_channel = _channel(router, credentials) if router else None
        self._router: Any = (None if self._router_channel is None else
                             router_pb2_grpc.RouterServiceStub(self._router_channel))
        # By address. Bounded by the fleet: a dead address costs an idle channel.
        self._workers: dict[str, WorkerConnection] = {}

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, kind: Optional[type[BaseException]], error: Optional[BaseException],
                        trace: Optional[TracebackType]) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends all connections. Sequences opened here are of no use afterwards."""
        workers, self._workers = list(self._workers.values()), {}
        for worker in workers:
            await worker.close()
        if self._router_channel is not None:
            await self._router_channel.close()

    async def _ask_router(self, action: str, method: str, request: Any) -> Any:
        if self._router is None:
            raise FailedPrecondition(f"{action}: this client has no router, only a worker")
        return await _unary(self._options, getattr(self._router, method), request)

    async def register_model(self, spec: model_pb2.ModelSpec) -> Model:
        """Idempotent. InvalidArgument names the field; AlreadyExists: another model has the name."""
        request = router_pb2.RegisterModelRequest(spec=spec)
        response = await self._ask_router("register model", "RegisterModel", request)
        return Model.from_proto(response.model)

    async def list_models(self) -> list[Model]:
        response = await self._ask_router("list models", "ListModels", router_pb2.ListModelsRequest())
        return [Model.from_proto(model) for model in response.models]

    async def find_model(self, name_or_digest: str) -> Model:
        models = await self.list_models()
        for model in models:
            if name_or_digest in (model.digest, model.name):
                return model
        raise NotFound(f"find model {name_or_digest}: none of the {len(models)} registered models",
                       "MODEL_NOT_FOUND")

    async def list_workers(self) -> list[router_pb2.WorkerInfo]:
        request = router_pb2.ListWorkersRequest()
        return list((await self._ask_router("list workers", "ListWorkers", request)).workers)

    async def assign(self, model: Model, tokens: m.Tokens, sticky_worker_id: str = "",
                     exclude_worker_ids: Seq[str] = ()) -> router_pb2.AssignSequenceResponse:
        """The worker that can start this prompt soonest. Unavailable (NO_WORKER) when there is none."""
        response: router_pb2.AssignSequenceResponse = await self._ask_router(
            "assign sequence", "AssignSequence", router_pb2.AssignSequenceRequest(
                request_id=m.new_request_id(), prompt=m.prompt_message(model, tokens),
                sticky_worker_id=sticky_worker_id, exclude_worker_ids=exclude_worker_ids))
        return response

    async def explain(self, model: Model, tokens: m.Tokens,
                      sticky_worker_id: str = "") -> router_pb2.ExplainPlacementResponse:
        """assign without effect, with the table of candidates and the reason in words."""
        response: router_pb2.ExplainPlacementResponse = await self._ask_router(
            "explain placement", "ExplainPlacement", router_pb2.ExplainPlacementRequest(
                prompt=m.prompt_message(model, tokens), sticky_worker_id=sticky_worker_id))
        return response

    def connect_worker(self, address: str, local_socket: str = "") -> WorkerConnection:
        worker = self._workers.get(address)
        if worker is None:
            worker = WorkerConnection(
                address, local_socket if self._use_local_plane else "", self._staging_bytes,
                self._options, self._credentials)
            self._workers[address] = worker
        return worker

    async def lookup(self, model: Model, tokens: m.Tokens,
                     allow_full_reuse: bool = False) -> types_pb2.PrefixReuse:
        """How much of a prompt the worker it would go to could reuse, and why not more. No effect."""
        if self._router is None:
            worker = self.connect_worker(self._worker_address, self._worker_local_socket)
        else:
            assigned = await self.assign(model, tokens)
            worker = self.connect_worker(assigned.address, assigned.local_socket)
        response = await _unary(self._options, worker.prefixes.LookupPrefix,
                                m.lookup_request(model, tokens, allow_full_reuse))
        reuse: types_pb2.PrefixReuse = response.reuse
        return reuse

    async def open(self, model: Model, tokens: m.Tokens, *, allow_full_reuse: bool = False,
                   no_reuse: bool = False, sticky_worker_id: str = "",
                   exclude_worker_ids: Seq[str] = ()) -> "Sequence":
        """As pagetide.Client.open."""
        if self._router is None:
            worker = self.connect_worker(self._worker_address, self._worker_local_socket)
            return await self._open_on(worker, model, m.open_request(
                model, tokens, allow_full_reuse, no_reuse))
        excluded = list(exclude_worker_ids)
        last: Optional[PageTideError] = None
        for _ in range(self._max_assignments):
            try:
                assigned = await self.assign(model, tokens, sticky_worker_id, excluded)
            except PageTideError:
                if last is None:
                    raise
                raise last from None  # the worker that failed says more than "no worker is left"
            worker = self.connect_worker(assigned.address, assigned.local_socket)
            try:
                return await self._open_on(worker, model, m.open_request(
                    model, tokens, allow_full_reuse, no_reuse, assigned.assignment_id))
            except Unavailable as error:
                _log.info("open on worker %s: %s", assigned.worker_id, error)
                last = error
                excluded.append(assigned.worker_id)
                if sticky_worker_id == assigned.worker_id:
                    sticky_worker_id = ""
        assert last is not None
        raise last

    async def _open_on(self, worker: WorkerConnection, model: Model,
                       request: sequence_pb2.OpenSequenceRequest) -> "Sequence":
        response = await _unary(worker.options, worker.sequences.OpenSequence, request)
        sequence = Sequence(self, worker, model, response.state)
        sequence.reuse = response.reuse
        sequence.restoring_pages = response.restoring_pages
        return sequence

    async def _on_any_worker(self, worker_id: str, method: str, request: Any) -> tuple[WorkerConnection, Any]:
        """A call that every worker can answer: on the named one, or on those that serve in turn."""
        if self._router is None:
            workers = [self.connect_worker(self._worker_address, self._worker_local_socket)]
        else:
            serving = m.serving_workers(await self.list_workers(), worker_id)
            workers = [self.connect_worker(w.address, w.local_socket)
                       for w in serving[:self._max_assignments]]
        for worker in workers[:-1]:
            try:
                return worker, await _unary(self._options, getattr(worker.sessions, method), request)
            except Unavailable as error:
                _log.info("%s on %s: %s", method, worker.address, error)
        last = workers[-1]
        return last, await _unary(self._options, getattr(last.sessions, method), request)

    async def load_session(self, name: str, *, version: Optional[int] = None,
                     model: Optional[Model] = None, length: Optional[int] = None,
                     worker_id: str = "") -> "Sequence":
        """A new sequence with a session's tokens (Sequence.tokens) and rows, on any worker or the named
        one. Does not wait for restores. `model`: the one that the caller is going to run;
        FailedPrecondition (MODEL_MISMATCH) when the session is of another. None: that of the session."""
        worker, response = await self._on_any_worker(
            worker_id, "LoadSession", m.load_request(name, version, model, length))
        if model is None:
            model = await self.find_model(response.state.model_digest)
        sequence = Sequence(self, worker, model, response.state)
        sequence.tokens = list(response.tokens)
        sequence.restoring_pages = response.restoring_pages
        return sequence

    async def peek_session(self, name: str, with_tokens: bool = False) -> session_pb2.PeekSessionResponse:
        """What a session holds, without loading it. NotFound (SESSION_NOT_FOUND)."""
        request = session_pb2.PeekSessionRequest(name=name, with_tokens=with_tokens)
        response: session_pb2.PeekSessionResponse = (await self._on_any_worker(
            "", "PeekSession", request))[1]
        return response

    async def list_sessions(self, name_prefix: str = "") -> AsyncIterator[session_pb2.SessionInfo]:
        """The tenant's sessions in order of name, fetched as they are consumed."""
        request = session_pb2.ListSessionsRequest(name_prefix=name_prefix)
        while True:
            response = (await self._on_any_worker("", "ListSessions", request))[1]
            for info in response.sessions:
                yield info
            request.page_token = response.next_page_token
            if not request.page_token:
                return

    async def delete_session(self, name: str, expected_version: Optional[int] = None) -> None:
        """NotFound when there is none; FailedPrecondition (VERSION_MISMATCH)."""
        await self._on_any_worker("", "DeleteSession", m.delete_request(name, expected_version))


class Sequence(m.SequenceBase):
    """As pagetide.Sequence. Leaving its `async with` block closes it."""

    def __init__(self, client: Client, worker: WorkerConnection, model: Model,
                 state: types_pb2.SequenceState) -> None:
        super().__init__(model, state)
        self._client = client
        self.worker = worker

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
            lambda worker: _unary(worker.options, getattr(getattr(worker, service), method), request))

    async def wait_ready(self) -> int:
        """As pagetide.Sequence.wait_ready."""
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
        self.state.length = last.length
        self.shortened_because = last.shortened_because
        return self.length

    async def refresh(self) -> None:
        """Fetches the state anew."""
        request = sequence_pb2.GetSequenceRequest(sequence_id=self.id)
        self.state = (await self._call("sequences", "GetSequence", request)).state

    async def begin_append(self, tokens: m.Tokens, pin_prefix: bool = False) -> "PendingAppend":
        """As pagetide.Sequence.begin_append."""
        append = PendingAppend(self, m.new_request_id())
        await append._send(self._header(append.append_id, tokens, pin_prefix))  # noqa: SLF001
        return append

    async def begin_step(self, num_tokens: int, pin_prefix: bool = False) -> "PendingStep":
        """As pagetide.Sequence.begin_step."""
        plane = await self.worker.plane(self.model)

        async def reserve() -> Any:
            return await self._call("sequences", "ReserveSlots", self._reserve_request(
                num_tokens, 0 if plane is None else plane.client_id, pin_prefix))

        try:
            response = await reserve()
        except NotFound as error:
            if plane is None or error.reason == "SEQUENCE_NOT_FOUND":
                raise
            self.worker.drop_plane(self.model)
            plane = None
            response = await reserve()
        if len(response.slots) != 1:
            raise Internal(f"reserve slots of {self.id}: {len(response.slots)} slots, expected 1")
        slot = response.slots[0]
        region = None if plane is None else plane.region(slot.staging_offset, slot.staging_bytes)
        return PendingStep(self, slot, region)

    async def read_rows(self, group: int, begin: int = 0, end: int = 0,
                        layers: Seq[int] = ()) -> AsyncIterator[m.RowsPart]:
        """As pagetide.Sequence.read_rows."""
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
                await asyncio.sleep(pause)
            finally:
                stream.cancel()

    async def read_block(self, group: int, begin: int, end: int,
                         out: Optional[m.Bytes] = None, in_place: bool = True) -> m.Bytes:
        """As pagetide.Sequence.read_block."""
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
        """As pagetide.Sequence.lease_pages."""
        plane = await self.worker.plane(self.model)
        if plane is None or not plane.has_pool or not plane.is_alive():
            return None
        valid_until = time.monotonic() + seconds  # from before the worker's clock starts
        try:
            table = await self._call("sequences", "GetBlockTable", self._lease_request(seconds))
            while table.next_page_token:
                more = await self._call("sequences", "GetBlockTable",
                                        self._next_lease_request(table))
                table.extents.extend(more.extents)
                table.next_page_token = more.next_page_token
        except PageTideError as error:
            _log.info("lease pages of %s: %s", self.id, error)
            return None
        return PageLease(self.model, plane, table, valid_until)

    async def fork(self, length: Optional[int] = None) -> "Sequence":
        """A new sequence on the same worker with the first `length` tokens (None: all)."""
        response = await self._call("sequences", "ForkSequence", self._fork_request(length))
        return Sequence(self._client, self.worker, self.model, response.state)

    async def rewind(self, length: int) -> None:
        """Truncates to the first `length` tokens."""
        self.state = (await self._call("edits", "Rewind", self._rewind_request(length))).state

    async def save(self, name: str, metadata: Optional[Mapping[str, str]] = None,
             expected_version: Optional[int] = None,
             durability: types_pb2.Durability = types_pb2.DURABILITY_LOCAL,
             keep_tokens: Optional[int] = None) -> session_pb2.SaveSessionResponse:
        """Saves the committed tokens as a session, which survives every process. expected_version: what
        must be there now, 0 for none; None replaces whatever is there."""
        response: session_pb2.SaveSessionResponse = await self._call(
            "sessions", "SaveSession",
            self._save_request(name, metadata, expected_version, durability, keep_tokens))
        return response

    async def close(self) -> None:
        """Full pages stay in the worker's cache. Idempotent."""
        if self._is_closed:
            return
        await self._call("sequences", "CloseSequence", self._close_request())
        self._is_closed = True


class PendingAppend:
    """As pagetide.PendingAppend. Leaving its `async with` block without commit() cancels it."""

    def __init__(self, sequence: Sequence, append_id: str) -> None:
        self.append_id = append_id
        self._sequence = sequence
        self._call = sequence.worker.sequences.AppendTokens(timeout=sequence.worker.options.timeout)
        self._is_finished = False

    async def __aenter__(self) -> "PendingAppend":
        return self

    async def __aexit__(self, kind: Optional[type[BaseException]], error: Optional[BaseException],
                        trace: Optional[TracebackType]) -> None:
        self.cancel()

    def _check_open(self) -> None:
        if self._is_finished:
            raise FailedPrecondition(f"append {self.append_id} to {self._sequence.id} is over")

    async def _send(self, message: sequence_pb2.AppendTokensRequest) -> None:
        self._check_open()
        try:
            await self._call.write(message)
        except (grpc.RpcError, asyncio.InvalidStateError):
            await self._finish()
            raise Aborted(f"append {self.append_id}: the worker ended the stream before the rows")

    async def _finish(self) -> Any:
        self._is_finished = True
        try:
            return await self._call
        except grpc.RpcError as rpc_error:
            raise from_rpc_error(rpc_error) from rpc_error

    async def write_rows(self, group: int, layer: int, kind: RowKind, first_token: int,
                         rows: m.Rows) -> None:
        """Rows [first_token, …) of the append, relative to its first token: [n, row_bytes]."""
        own = self._sequence.model.groups[group]
        for message in m.row_parts(group, layer, kind, first_token, m.as_bytes(rows),
                                   own.row_bytes(kind)):
            await self._send(message)

    async def write_block(self, group: int, num_tokens: int, block: m.Rows) -> None:
        """All rows of all layers of a group: [layer][K: n rows][V: n rows]."""
        own = self._sequence.model.groups[group]
        for layer, kind, rows in m.split_block(own, num_tokens, block):
            await self.write_rows(group, layer, kind, 0, rows)

    async def commit(self) -> sequence_pb2.AppendTokensResponse:
        """All rows of all layers were written."""
        self._check_open()
        try:
            await self._call.done_writing()
        except (grpc.RpcError, asyncio.InvalidStateError):
            pass  # the call has ended; its status says why
        response: sequence_pb2.AppendTokensResponse = await self._finish()
        self._sequence.state = response.state
        return response

    def cancel(self) -> None:
        if not self._is_finished:
            self._is_finished = True
            self._call.cancel()


class PendingStep(m.StepBase):
    """As pagetide.PendingStep. Leaving its `async with` block without commit() gives the slots back."""

    def __init__(self, sequence: Sequence, slot: sequence_pb2.ReserveSlotsResponse.Slot,
                 region: Optional[m.Bytes]) -> None:
        super().__init__(sequence, slot, region)
        self._sequence = sequence

    async def __aenter__(self) -> "PendingStep":
        return self

    async def __aexit__(self, kind: Optional[type[BaseException]], error: Optional[BaseException],
                        trace: Optional[TracebackType]) -> None:
        await self.abort()

    async def commit(self, tokens: m.Tokens) -> None:
        """Fewer tokens than reserved: the rest is dropped."""
        if not self._is_open:
            raise FailedPrecondition(f"step of {self._sequence.id} is over")
        request = self._sequence._commit_request(  # noqa: SLF001
            self._slot.reservation_id, tokens, self._unsent, self.is_local)
        self._sequence._committed(  # noqa: SLF001
            await self._sequence._call("sequences", "CommitStep", request))  # noqa: SLF001
        self._is_open = False

    async def abort(self) -> None:
        if not self._is_open:
            return
        self._is_open = False
        request = self._sequence._abort_request(self._slot.reservation_id)  # noqa: SLF001
        try:
            await self._sequence.worker.sequences.AbortReservation(request, timeout=m.CLOSE_TIMEOUT)
        except grpc.RpcError as rpc_error:
            _log.info("abort reservation %d: %s", self._slot.reservation_id,
                      from_rpc_error(rpc_error))
