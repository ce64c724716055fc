"""The blocking client: Client asks a router where a prompt goes and opens it there; Sequence is what is
open. Client, and different sequences, may be used from different threads; one sequence from one at a time."""

from __future__ import annotations

import dataclasses
import logging
import queue
import threading
import time
from types import TracebackType
from typing import Any, Callable, Iterator, Mapping, Optional, Sequence as Seq, TypeVar

import grpc

from pagetide import _messages as m
from pagetide.errors import (Aborted, Cancelled, DeadlineExceeded, FailedPrecondition, Internal,
                             NotFound, PageTideError, SequenceMoved, Unavailable, from_rpc_error)
from pagetide.lease import PageLease
from pagetide.local_plane import LocalPlane
from pagetide.model import Model, RowKind
from pagetide.retry import RetryLoop, RetryPolicy
from pagetide.v1 import (admin_pb2, admin_pb2_grpc, model_pb2, prefix_pb2_grpc, router_pb2,
                         router_pb2_grpc, sequence_edit_pb2_grpc, sequence_pb2, sequence_pb2_grpc,
                         session_pb2, session_pb2_grpc, types_pb2)

_log = logging.getLogger("pagetide")
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class CallOptions:
    # Bounds a call with all its attempts and pauses, in seconds.
    timeout: float = 30.0
    retry: RetryPolicy = RetryPolicy()


def call_with_retry(options: CallOptions, attempt: Callable[[float], T]) -> T:
    """attempt(time_left) until it returns or the error is not to be retried."""
    loop = RetryLoop(options.retry, options.timeout)
    while True:
        try:
            return attempt(max(loop.time_left(), 0.001))
        except grpc.RpcError as rpc_error:
            error = from_rpc_error(rpc_error)
            pause = loop.next_pause(error)
            if pause is None:
                raise error from rpc_error
        except PageTideError as error:
            pause = loop.next_pause(error)
            if pause is None:
                raise
        time.sleep(pause)


def _unary(options: CallOptions, method: Any, request: Any) -> Any:
    return call_with_retry(options, lambda left: method(request, timeout=left))


def _channel(address: str, credentials: Optional[grpc.ChannelCredentials]) -> grpc.Channel:
    if credentials is None:
        return grpc.insecure_channel(address, options=m.CHANNEL_OPTIONS)
    return grpc.secure_channel(address, credentials, options=m.CHANNEL_OPTIONS)


class WorkerConnection:
    """Channel, stubs and local planes to one worker, shared by the sequences opened there. Thread-safe."""

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
        self._lock = threading.Lock()
        # By model digest; None: it was asked for and cannot be had.
        self._planes: dict[str, Optional[LocalPlane]] = {}

    def plane(self, model: Model) -> Optional[LocalPlane]:
        """Shared memory for a model, connected on first use; None when the worker is not on this host
        or has no local plane (asked once; a failure is remembered)."""
        if not self._local_socket:
            return None
        with self._lock:
            if model.digest in self._planes:
                return self._planes[model.digest]
        plane: Optional[LocalPlane] = None
        try:
            plane = LocalPlane.connect(self._local_socket, self._staging_bytes,
                                       m.LOCAL_PLANE_TIMEOUT, model.digest)
        except PageTideError as error:
            _log.info("rows go by RPC: %s", error)
        with self._lock:  # of two first callers one plane stays
            kept = self._planes.setdefault(model.digest, plane)
        if plane is not None and kept is not plane:
            plane.close()
        return kept

    def drop_plane(self, model: Model) -> None:
        """The worker no longer knows this client (it restarted): use RPC from now on."""
        with self._lock:
            plane, self._planes[model.digest] = self._planes.get(model.digest), None
        if plane is not None:
            plane.close()

    def stats(self) -> dict[str, float]:
        """Counters of the worker since its start, by metric name."""
        return dict(_unary(self.options, self.admin.GetStats, admin_pb2.GetStatsRequest()).values)

    def close(self) -> None:
        with self._lock:
            planes, self._planes = list(self._planes.values()), {}
        for plane in planes:
            if plane is not None:
                plane.close()
        self._channel.close()


class Client:
    """The way into a fleet: `router`, or one `worker` without a router ("host:port", "unix:/path").

    timeout bounds each call with its retries, and each attempt to open on one worker, in seconds.
    max_assignments: workers tried before open gives up. use_local_plane: False sends rows by RPC though
    the worker is on this host. staging_bytes: shared memory asked of each worker, a model.
    """

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
        self._lock = threading.Lock()
        # By address. Bounded by the fleet: a dead address costs an idle channel.
        self._workers: dict[str, WorkerConnection] = {}

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, kind: Optional[type[BaseException]], error: Optional[BaseException],
                 trace: Optional[TracebackType]) -> None:
        self.close()

    def close(self) -> None:
        """Ends all connections. Sequences opened here are of no use afterwards."""
        with self._lock:
            workers, self._workers = list(self._workers.values()), {}
        for worker in workers:
            worker.close()
        if self._router_channel is not None:
            self._router_channel.close()

    def _ask_router(self, action: str, method: str, request: Any) -> Any:
        if self._router is None:
            raise FailedPrecondition(f"{action}: this client has no router, only a worker")
        return _unary(self._options, getattr(self._router, method), request)

    def register_model(self, spec: model_pb2.ModelSpec) -> Model:
        """Idempotent. InvalidArgument names the field; AlreadyExists: another model has the name."""
        request = router_pb2.RegisterModelRequest(spec=spec)
        return Model.from_proto(self._ask_router("register model", "RegisterModel", request).model)

    def list_models(self) -> list[Model]:
        response = self._ask_router("list models", "ListModels", router_pb2.ListModelsRequest())
        return [Model.from_proto(model) for model in response.models]

    def find_model(self, name_or_digest: str) -> Model:
        models = self.list_models()
        for model in models:
            if name_or_digest in (model.digest, model.name):
                return model
        raise NotFound(f"find model {name_or_digest}: none of the {len(models)} registered models",
                       "MODEL_NOT_FOUND")

    def list_workers(self) -> list[router_pb2.WorkerInfo]:
        request = router_pb2.ListWorkersRequest()
        return list(self._ask_router("list workers", "ListWorkers", request).workers)

    def assign(self, model: Model, tokens: m.Tokens, sticky_worker_id: str = "",
               exclude_worker_ids: Seq[str] = ()) -> router_pb2.AssignSequenceResponse:
        """The worker that can start this prompt soonest. Unavailable (NO_WORKER) when there is none."""
        response: router_pb2.AssignSequenceResponse = self._ask_router(
            "assign sequence", "AssignSequence", router_pb2.AssignSequenceRequest(
                request_id=m.new_request_id(), prompt=m.prompt_message(model, tokens),
                sticky_worker_id=sticky_worker_id, exclude_worker_ids=exclude_worker_ids))
        return response

    def explain(self, model: Model, tokens: m.Tokens,
                sticky_worker_id: str = "") -> router_pb2.ExplainPlacementResponse:
        """assign without effect, with the table of candidates and the reason in words."""
        response: router_pb2.ExplainPlacementResponse = self._ask_router(
            "explain placement", "ExplainPlacement", router_pb2.ExplainPlacementRequest(
                prompt=m.prompt_message(model, tokens), sticky_worker_id=sticky_worker_id))
        return response

    def connect_worker(self, address: str, local_socket: str = "") -> WorkerConnection:
        with self._lock:
            worker = self._workers.get(address)
            if worker is None:
                worker = WorkerConnection(
                    address, local_socket if self._use_local_plane else "", self._staging_bytes,
                    self._options, self._credentials)
                self._workers[address] = worker
            return worker

    def _place(self, model: Model, tokens: m.Tokens) -> WorkerConnection:
        if self._router is None:
            return self.connect_worker(self._worker_address, self._worker_local_socket)
        assigned = self.assign(model, tokens)
        return self.connect_worker(assigned.address, assigned.local_socket)

    def lookup(self, model: Model, tokens: m.Tokens,
               allow_full_reuse: bool = False) -> types_pb2.PrefixReuse:
        """How much of a prompt the worker it would go to could reuse, and why not more. No effect."""
        worker = self._place(model, tokens)
        request = m.lookup_request(model, tokens, allow_full_reuse)
        reuse: types_pb2.PrefixReuse = _unary(
            self._options, worker.prefixes.LookupPrefix, request).reuse
        return reuse

    def open(self, model: Model, tokens: m.Tokens, *, allow_full_reuse: bool = False,
             no_reuse: bool = False, sticky_worker_id: str = "",
             exclude_worker_ids: Seq[str] = ()) -> "Sequence":
        """Opens a prompt on the worker that can start it soonest. Does not wait for restores: the
        sequence's length is what is reused (wait_ready). A worker that does not answer is left out and
        another one asked for.

        allow_full_reuse: reuse even the last token (engines usually need its logits).
        no_reuse: reuse nothing, to measure. sticky_worker_id: stay with this worker if it is alive.
        """
        if self._router is None:
            worker = self.connect_worker(self._worker_address, self._worker_local_socket)
            return self._open_on(worker, model, m.open_request(
                model, tokens, allow_full_reuse, no_reuse))
        excluded = list(exclude_worker_ids)
        last: Optional[PageTideError] = None
        for _ in range(self._max_assignments):
            try:
                assigned = self.assign(model, tokens, sticky_worker_id, excluded)
            except PageTideError:
                if last is None:
                    raise
                raise last from None  # the worker that failed says more than "no worker is left"
            worker = self.connect_worker(assigned.address, assigned.local_socket)
            try:
                return self._open_on(worker, model, m.open_request(
                    model, tokens, allow_full_reuse, no_reuse, assigned.assignment_id))
            except Unavailable as error:
                _log.info("open on worker %s: %s", assigned.worker_id, error)
                last = error
                excluded.append(assigned.worker_id)
                if sticky_worker_id == assigned.worker_id:
                    sticky_worker_id = ""
        assert last is not None
        raise last

    def _open_on(self, worker: WorkerConnection, model: Model,
                 request: sequence_pb2.OpenSequenceRequest) -> "Sequence":
        response = _unary(worker.options, worker.sequences.OpenSequence, request)
        sequence = Sequence(self, worker, model, response.state)
        sequence.reuse = response.reuse
        sequence.restoring_pages = response.restoring_pages
        return sequence

    def _on_any_worker(self, worker_id: str, method: str, request: Any) -> tuple[WorkerConnection, Any]:
        """A call that every worker can answer: on the named one, or on those that serve in turn."""
        if self._router is None:
            workers = [self.connect_worker(self._worker_address, self._worker_local_socket)]
        else:
            serving = m.serving_workers(self.list_workers(), worker_id)
            workers = [self.connect_worker(w.address, w.local_socket)
                       for w in serving[:self._max_assignments]]
        for worker in workers[:-1]:
            try:
                return worker, _unary(self._options, getattr(worker.sessions, method), request)
            except Unavailable as error:
                _log.info("%s on %s: %s", method, worker.address, error)
        last = workers[-1]
        return last, _unary(self._options, getattr(last.sessions, method), request)

    def load_session(self, name: str, *, version: Optional[int] = None,
                     model: Optional[Model] = None, length: Optional[int] = None,
                     worker_id: str = "") -> "Sequence":
        """A new sequence with a session's tokens (Sequence.tokens) and rows, on any worker or the named
        one. Does not wait for restores. `model`: the one that the caller is going to run;
        FailedPrecondition (MODEL_MISMATCH) when the session is of another. None: that of the session."""
        worker, response = self._on_any_worker(
            worker_id, "LoadSession", m.load_request(name, version, model, length))
        if model is None:
            model = self.find_model(response.state.model_digest)
        sequence = Sequence(self, worker, model, response.state)
        sequence.tokens = list(response.tokens)
        sequence.restoring_pages = response.restoring_pages
        return sequence

    def peek_session(self, name: str, with_tokens: bool = False) -> session_pb2.PeekSessionResponse:
        """What a session holds, without loading it. NotFound (SESSION_NOT_FOUND)."""
        request = session_pb2.PeekSessionRequest(name=name, with_tokens=with_tokens)
        response: session_pb2.PeekSessionResponse = (self._on_any_worker(
            "", "PeekSession", request))[1]
        return response

    def list_sessions(self, name_prefix: str = "") -> Iterator[session_pb2.SessionInfo]:
        """The tenant's sessions in order of name, fetched as they are consumed."""
        request = session_pb2.ListSessionsRequest(name_prefix=name_prefix)
        while True:
            response = (self._on_any_worker("", "ListSessions", request))[1]
            for info in response.sessions:
                yield info
            request.page_token = response.next_page_token
            if not request.page_token:
                return

    def delete_session(self, name: str, expected_version: Optional[int] = None) -> None:
        """NotFound when there is none; FailedPrecondition (VERSION_MISMATCH)."""
        self._on_any_worker("", "DeleteSession", m.delete_request(name, expected_version))


class Sequence(m.SequenceBase):
    """One open sequence. Leaving its `with` block closes it.

    Unavailable from a method means that the worker stays away: open the tokens again, on whatever worker
    the router finds. A sequence that was moved is followed to its new worker.
    """

    def __init__(self, client: Client, worker: WorkerConnection, model: Model,
                 state: types_pb2.SequenceState) -> None:
        super().__init__(model, state)
        self._client = client
        self.worker = worker

    def __enter__(self) -> "Sequence":
        return self

    def __exit__(self, kind: Optional[type[BaseException]], error: Optional[BaseException],
                 trace: Optional[TracebackType]) -> None:
        if self._is_closed:
            return
        try:  # best effort: the worker may be gone
            self.worker.sequences.CloseSequence(self._close_request(), timeout=m.CLOSE_TIMEOUT)
        except grpc.RpcError as rpc_error:
            _log.info("close sequence %s: %s", self.id, from_rpc_error(rpc_error))
        self._is_closed = True

    def _follow(self, call: Callable[[WorkerConnection], T]) -> T:
        """call(worker), once more on the worker that a SEQUENCE_MOVED names."""
        for _ in range(m.MAX_MOVES):
            try:
                return call(self.worker)
            except SequenceMoved as moved:
                if not moved.address:
                    raise
                _log.info("sequence %s moved to %s", self.id, moved.address)
                self.worker = self._client.connect_worker(moved.address)
        return call(self.worker)

    def _call(self, service: str, method: str, request: Any) -> Any:
        return self._follow(
            lambda worker: _unary(worker.options, getattr(getattr(worker, service), method), request))

    def wait_ready(self) -> int:
        """Waits until all reused pages are resident. The length, shorter than at open if a restore
        failed (then shortened_because says why)."""
        request = sequence_pb2.WatchReadinessRequest(sequence_id=self.id)

        def watch(worker: WorkerConnection) -> Any:
            def attempt(left: float) -> Any:
                last = None
                for last in worker.sequences.WatchReadiness(request, timeout=left):
                    pass
                if last is None or not last.done:
                    raise Internal(f"watch readiness of {self.id}: the stream ended before it was done")
                return last
            return call_with_retry(worker.options, attempt)

        last = self._follow(watch)
        self.state.length = last.length
        self.shortened_because = last.shortened_because
        return self.length

    def refresh(self) -> None:
        """Fetches the state anew."""
        request = sequence_pb2.GetSequenceRequest(sequence_id=self.id)
        self.state = self._call("sequences", "GetSequence", request).state

    def begin_append(self, tokens: m.Tokens, pin_prefix: bool = False) -> "PendingAppend":
        """Prefill: rows of many tokens, layer by layer; all or nothing at commit()."""
        append_id = m.new_request_id()
        header = self._header(append_id, tokens, pin_prefix)
        return PendingAppend(self, append_id, header)

    def begin_step(self, num_tokens: int, pin_prefix: bool = False) -> "PendingStep":
        """Reserves the slots of the next num_tokens (1 to 1024) tokens; the rows go through memory
        shared with the worker where it is on this host."""
        plane = self.worker.plane(self.model)

        def reserve() -> Any:
            return self._call("sequences", "ReserveSlots", self._reserve_request(
                num_tokens, 0 if plane is None else plane.client_id, pin_prefix))

        try:
            response = reserve()
        except NotFound as error:
            if plane is None or error.reason == "SEQUENCE_NOT_FOUND":
                raise
            self.worker.drop_plane(self.model)
            plane = None
            response = reserve()
        if len(response.slots) != 1:
            raise Internal(f"reserve slots of {self.id}: {len(response.slots)} slots, expected 1")
        slot = response.slots[0]
        region = None if plane is None else plane.region(slot.staging_offset, slot.staging_bytes)
        return PendingStep(self, slot, region)

    def read_rows(self, group: int, begin: int = 0, end: int = 0,
                  layers: Seq[int] = ()) -> Iterator[m.RowsPart]:
        """Verified rows [begin, end) of `layers` (none: all) of a group, as they arrive; end 0: to the
        end. Retried until the first part arrives, never after it (then Aborted: read again)."""
        request = self._read_request(group, begin, end, layers)
        loop = RetryLoop(self.worker.options.retry, self.worker.options.timeout)
        moves = 0
        while True:
            delivered = False
            stream = self.worker.sequences.ReadRows(request, timeout=max(loop.time_left(), 0.001))
            try:
                for message in stream:
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
                time.sleep(pause)
            finally:
                stream.cancel()

    def read_block(self, group: int, begin: int, end: int,
                   out: Optional[m.Bytes] = None, in_place: bool = True) -> m.Bytes:
        """Rows [begin, end) of all layers of a group: [layer][K: n rows][V: n rows], a page's layout
        when the range is a page. By shared memory where the worker is on this host, by RPC otherwise.
        `out`: written to instead of a new array. in_place: False always takes the RPC."""
        block = m.Block(self.model.groups[group], begin, end, out)
        if block.num_tokens <= 0:
            raise ValueError(f"read block [{begin}, {end}): empty")
        lease = self.lease_pages() if in_place else None
        if lease is not None and lease.copy(group, begin, end, block.bytes) and lease.is_valid():
            return block.bytes
        for part in self.read_rows(group, begin, end):
            block.put(part)
        block.check_complete(self.id)
        return block.bytes

    def lease_pages(self, seconds: float = 5.0) -> Optional[PageLease]:
        """Makes all pages resident and holds them for so long (at most 30 s), to be read in place. None
        where that cannot be: the worker is on another host, or has not the frames."""
        plane = self.worker.plane(self.model)
        if plane is None or not plane.has_pool or not plane.is_alive():
            return None
        valid_until = time.monotonic() + seconds  # from before the worker's clock starts
        try:
            table = self._call("sequences", "GetBlockTable", self._lease_request(seconds))
            while table.next_page_token:
                more = self._call("sequences", "GetBlockTable", self._next_lease_request(table))
                table.extents.extend(more.extents)
                table.next_page_token = more.next_page_token
        except PageTideError as error:
            _log.info("lease pages of %s: %s", self.id, error)
            return None
        return PageLease(self.model, plane, table, valid_until)

    def fork(self, length: Optional[int] = None) -> "Sequence":
        """A new sequence on the same worker with the first `length` tokens (None: all)."""
        response = self._call("sequences", "ForkSequence", self._fork_request(length))
        return Sequence(self._client, self.worker, self.model, response.state)

    def rewind(self, length: int) -> None:
        """Truncates to the first `length` tokens."""
        self.state = self._call("edits", "Rewind", self._rewind_request(length)).state

    def save(self, name: str, metadata: Optional[Mapping[str, str]] = None,
             expected_version: Optional[int] = None,
             durability: types_pb2.Durability = types_pb2.DURABILITY_LOCAL,
             keep_tokens: Optional[int] = None) -> session_pb2.SaveSessionResponse:
        """Saves the committed tokens as a session, which survives every process. expected_version: what
        must be there now, 0 for none; None replaces whatever is there."""
        response: session_pb2.SaveSessionResponse = self._call(
            "sessions", "SaveSession",
            self._save_request(name, metadata, expected_version, durability, keep_tokens))
        return response

    def close(self) -> None:
        """Full pages stay in the worker's cache. Idempotent."""
        if self._is_closed:
            return
        self._call("sequences", "CloseSequence", self._close_request())
        self._is_closed = True


class _Outbox:
    """Messages on their way into a stream: the caller waits while two of them are unsent."""

    _END = None

    def __init__(self) -> None:
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=2)
        self.is_over = threading.Event()  # the call has ended: nobody reads any more

    def put(self, message: Any, deadline: float) -> bool:
        """False when the call has ended."""
        while not self.is_over.is_set():
            if time.monotonic() > deadline:
                raise DeadlineExceeded("append: the worker took no rows in time")
            try:
                self._queue.put(message, timeout=0.05)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator[Any]:
        while not self.is_over.is_set():
            try:
                message = self._queue.get(timeout=0.5)
            except queue.Empty:
                continue
            if message is self._END:
                return
            yield message


class PendingAppend:
    """Rows of many tokens on their way. Leaving its `with` block without commit() cancels it: nothing
    changes. One pending write a sequence. Not retried: after Unavailable look at the sequence and begin
    again."""

    def __init__(self, sequence: Sequence, append_id: str,
                 header: sequence_pb2.AppendTokensRequest) -> None:
        self.append_id = append_id
        self._sequence = sequence
        timeout = sequence.worker.options.timeout
        self._deadline = time.monotonic() + timeout
        self._outbox = _Outbox()
        self._call = sequence.worker.sequences.AppendTokens.future(
            iter(self._outbox), timeout=timeout)
        self._call.add_done_callback(lambda _: self._outbox.is_over.set())
        self._is_finished = False
        self._send(header)

    def __enter__(self) -> "PendingAppend":
        return self

    def __exit__(self, kind: Optional[type[BaseException]], error: Optional[BaseException],
                 trace: Optional[TracebackType]) -> None:
        self.cancel()

    def _send(self, message: sequence_pb2.AppendTokensRequest) -> None:
        if self._is_finished:
            raise FailedPrecondition(f"append {self.append_id} to {self._sequence.id} is over")
        if not self._outbox.put(message, self._deadline):
            self._finish()
            raise Aborted(f"append {self.append_id}: the worker ended the stream before the rows")

    def _finish(self) -> Any:
        self._is_finished = True
        try:
            return self._call.result()
        except grpc.RpcError as rpc_error:
            raise from_rpc_error(rpc_error) from rpc_error
        except grpc.FutureCancelledError as cancelled:
            raise Cancelled(f"append {self.append_id}: cancelled") from cancelled

    def write_rows(self, group: int, layer: int, kind: RowKind, first_token: int,
                   rows: m.Rows) -> None:
        """Rows [first_token, …) of the append, relative to its first token: [n, row_bytes]. Layers in
        any order, tokens in order within a layer and kind."""
        own = self._sequence.model.groups[group]
        for message in m.row_parts(group, layer, kind, first_token, m.as_bytes(rows),
                                   own.row_bytes(kind)):
            self._send(message)

    def write_block(self, group: int, num_tokens: int, block: m.Rows) -> None:
        """All rows of all layers of a group: [layer][K: n rows][V: n rows]."""
        own = self._sequence.model.groups[group]
        for layer, kind, rows in m.split_block(own, num_tokens, block):
            self.write_rows(group, layer, kind, 0, rows)

    def commit(self) -> sequence_pb2.AppendTokensResponse:
        """All rows of all layers were written."""
        self._send(None)  # type: ignore[arg-type]  # the outbox's end
        response: sequence_pb2.AppendTokensResponse = self._finish()
        self._sequence.state = response.state
        return response

    def cancel(self) -> None:
        if not self._is_finished:
            self._is_finished = True
            self._call.cancel()
            self._outbox.is_over.set()


class PendingStep(m.StepBase):
    """Reserved slots. Leaving its `with` block without commit() gives them back."""

    def __init__(self, sequence: Sequence, slot: sequence_pb2.ReserveSlotsResponse.Slot,
                 region: Optional[m.Bytes]) -> None:
        super().__init__(sequence, slot, region)
        self._sequence = sequence

    def __enter__(self) -> "PendingStep":
        return self

    def __exit__(self, kind: Optional[type[BaseException]], error: Optional[BaseException],
                 trace: Optional[TracebackType]) -> None:
        self.abort()

    def commit(self, tokens: m.Tokens) -> None:
        """Fewer tokens than reserved: the rest is dropped."""
        if not self._is_open:
            raise FailedPrecondition(f"step of {self._sequence.id} is over")
        request = self._sequence._commit_request(  # noqa: SLF001
            self._slot.reservation_id, tokens, self._unsent, self.is_local)
        self._sequence._committed(  # noqa: SLF001
            self._sequence._call("sequences", "CommitStep", request))  # noqa: SLF001
        self._is_open = False

    def abort(self) -> None:
        if not self._is_open:
            return
        self._is_open = False
        request = self._sequence._abort_request(self._slot.reservation_id)  # noqa: SLF001
        try:
            self._sequence.worker.sequences.AbortReservation(request, timeout=m.CLOSE_TIMEOUT)
        except grpc.RpcError as rpc_error:
            _log.info("abort reservation %d: %s", self._slot.reservation_id,
                      from_rpc_error(rpc_error))
