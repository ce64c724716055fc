"""Client asks a router where a prompt goes and opens it there."""

from __future__ import annotations

import logging
import threading
from types import TracebackType
from typing import Any, AsyncIterator, Mapping, Optional, Sequence as Seq

import grpc

from pagetide import _messages as m
from pagetide import _transport_asyncio as transport
from pagetide.aio.calls import WorkerConnection, unary, unary_once
from pagetide.aio.engine import EnginePool
from pagetide.aio.files import import_file
from pagetide.aio.sequence import Sequence
from pagetide.aio.shard_group import ShardGroup, lookup_shard_group, open_shard_group
from pagetide.aio.steps import BatchStep, begin_batch_step
from pagetide.engine_memory import EngineLayout, EngineMemory
from pagetide.errors import FailedPrecondition, NotFound, PageTideError, Unavailable
from pagetide.model import Model
from pagetide.options import Input
from pagetide.retry import CallOptions, RetryPolicy
from pagetide.v1 import (engine_pool_pb2, model_pb2, prefix_pb2, router_pb2, router_pb2_grpc, sequence_edit_pb2,
                         sequence_pb2, session_pb2, shard_group_pb2, types_pb2)

_log = logging.getLogger("pagetide")


class Client:
    """The way into a fleet: `router`, or one `worker` without a router ("host:port", "unix:/path").

    timeout bounds each call with its retries, and each attempt to open on one worker, in seconds.
    max_assignments: workers tried before open gives up. use_local_plane: False sends rows by RPC though
    the worker is on this host. staging_bytes: shared memory asked of each worker, a model. step_lease:
    for how many seconds (at most 300) a step's slots are held, and its rows may be written.
    """

    def __init__(self, router: str = "", worker: str = "", worker_local_socket: str = "",
                 timeout: float = 30.0, retry: RetryPolicy = RetryPolicy(),
                 max_assignments: int = 3, use_local_plane: bool = True,
                 staging_bytes: int = 16 << 20, step_lease: float = 30.0,
                 credentials: Optional[grpc.ChannelCredentials] = None) -> None:
        if bool(router) == bool(worker):
            raise ValueError(f"client: router \"{router}\" and worker \"{worker}\": exactly one must "
                             "be set")
        if max_assignments < 1:
            raise ValueError(f"client: max_assignments is {max_assignments}, must be at least 1")
        self._options = CallOptions(timeout, retry)
        self._max_assignments = max_assignments
        self._use_local_plane = use_local_plane
        if not 0 < step_lease <= 300:
            raise ValueError(f"client: step_lease is {step_lease}, must be above 0 and at most 300 s")
        self._staging_bytes = staging_bytes
        self._step_lease = step_lease
        self._credentials = credentials
        self._worker_address = worker
        self._worker_local_socket = worker_local_socket
        self._router_channel = transport.channel(router, credentials) if router else None
        self._router: Any = (None if self._router_channel is None else
                             router_pb2_grpc.RouterServiceStub(self._router_channel))
        self._lock = threading.Lock()  # never held across a wait
        # By address. Bounded by the fleet: a dead address costs an idle channel.
        self._workers: dict[str, WorkerConnection] = {}

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, kind: Optional[type[BaseException]], error: Optional[BaseException],
                        trace: Optional[TracebackType]) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends all connections. Sequences opened here are of no use afterwards."""
        with self._lock:
            workers, self._workers = list(self._workers.values()), {}
        for worker in workers:
            await worker.close()
        if self._router_channel is not None:
            await self._router_channel.close()

    # --- the router ---

    async def _ask_router(self, action: str, method: str, request: Any) -> Any:
        if self._router is None:
            raise FailedPrecondition(f"{action}: this client has no router, only a worker")
        return await unary(self._options, getattr(self._router, method), request)

    async def register_model(self, spec: model_pb2.ModelSpec) -> Model:
        """Idempotent. InvalidArgument names the field; AlreadyExists: another model has the name."""
        request = router_pb2.RegisterModelRequest(spec=spec)
        response = await self._ask_router("register model", "RegisterModel", request)
        return Model.from_proto(response.model)

    async def list_models(self) -> list[Model]:
        """All that are registered."""
        request = router_pb2.ListModelsRequest()
        response = await self._ask_router("list models", "ListModels", request)
        return [Model.from_proto(model) for model in response.models]

    async def find_model(self, name_or_digest: str) -> Model:
        """NotFound (MODEL_NOT_FOUND)."""
        models = await self.list_models()
        for model in models:
            if name_or_digest in (model.digest, model.name):
                return model
        raise NotFound(f"find model {name_or_digest}: none of the {len(models)} registered models",
                       "MODEL_NOT_FOUND")

    async def list_workers(self) -> list[router_pb2.WorkerInfo]:
        """Workers and stores that are attached to the router."""
        response = await self._ask_router("list workers", "ListWorkers", router_pb2.ListWorkersRequest())
        return list(response.workers)

    async def assign(self, model: Model, tokens: m.Tokens, sticky_worker_id: str = "",
                     exclude_worker_ids: Seq[str] = (), *,
                     inputs: Seq[Input] = ()) -> router_pb2.AssignSequenceResponse:
        """The worker that can start this prompt soonest. Unavailable (NO_WORKER) when there is none."""
        response: router_pb2.AssignSequenceResponse = await self._ask_router(
            "assign sequence", "AssignSequence", router_pb2.AssignSequenceRequest(
                request_id=m.new_request_id(), prompt=m.prompt_message(model, tokens, inputs),
                sticky_worker_id=sticky_worker_id, exclude_worker_ids=exclude_worker_ids))
        return response

    async def explain(self, model: Model, tokens: m.Tokens, sticky_worker_id: str = "", *,
                      inputs: Seq[Input] = ()) -> router_pb2.ExplainPlacementResponse:
        """assign without effect, with the table of candidates and the reason in words."""
        response: router_pb2.ExplainPlacementResponse = await self._ask_router(
            "explain placement", "ExplainPlacement", router_pb2.ExplainPlacementRequest(
                prompt=m.prompt_message(model, tokens, inputs), sticky_worker_id=sticky_worker_id))
        return response

    async def assign_group(self, models: Seq[Model], tokens: m.Tokens, sticky_shard_group: str = "",
                           exclude_shard_groups: Seq[str] = (), *,
                           inputs: Seq[Input] = ()) -> router_pb2.AssignGroupResponse:
        """The group of workers, one a rank, that can start this prompt soonest. models: of the ranks, in
        order, the same but for their shards. Unavailable (NO_SHARD_GROUP) says what each group lacks."""
        response: router_pb2.AssignGroupResponse = await self._ask_router(
            "assign group", "AssignGroup", m.assign_group_request(
                models, tokens, inputs, sticky_shard_group, exclude_shard_groups))
        return response

    # --- workers ---

    def connect_worker(self, address: str, local_socket: str = "") -> WorkerConnection:
        """The connection to a worker, made or found."""
        with self._lock:
            worker = self._workers.get(address)
            if worker is None:
                worker = WorkerConnection(
                    address, local_socket if self._use_local_plane else "", self._staging_bytes,
                    self._step_lease, self._options, self._credentials)
                self._workers[address] = worker
            elif self._use_local_plane:
                worker.learn_local_socket(local_socket)
            return worker

    async def _place(self, model: Model, tokens: m.Tokens, inputs: Seq[Input]) -> WorkerConnection:
        if self._router is None:
            return self.connect_worker(self._worker_address, self._worker_local_socket)
        assigned = await self.assign(model, tokens, inputs=inputs)
        return self.connect_worker(assigned.address, assigned.local_socket)

    async def _serving_workers(self, worker_id: str) -> list[WorkerConnection]:
        """The named worker, or some of those that serve; at least one."""
        if self._router is None:
            return [self.connect_worker(self._worker_address, self._worker_local_socket)]
        serving = m.serving_workers(await self.list_workers(), worker_id)
        return [self.connect_worker(w.address, w.local_socket) for w in serving[:self._max_assignments]]

    async def _on_any_worker(self, service: str, method: str, request: Any,
                             worker_id: str = "") -> tuple[WorkerConnection, Any]:
        """A call that every worker can answer: on the named one, or on those that serve in turn."""
        workers = await self._serving_workers(worker_id)
        for worker in workers[:-1]:
            try:
                return worker, await unary(
                    self._options, getattr(getattr(worker, service), method), request)
            except Unavailable as error:
                _log.info("%s on %s: %s", method, worker.address, error)
        last = workers[-1]
        return last, await unary(self._options, getattr(getattr(last, service), method), request)

    async def _once_on_any_worker(self, service: str, method: str, request: Any) -> Any:
        worker = (await self._serving_workers(""))[0]
        return await unary_once(self._options, getattr(getattr(worker, service), method), request)

    # --- prompts ---

    async def lookup(self, model: Model, tokens: m.Tokens, allow_full_reuse: bool = False, *,
                     inputs: Seq[Input] = ()) -> types_pb2.PrefixReuse:
        """How much of a prompt the worker it would go to could reuse, and why not more. No effect."""
        worker = await self._place(model, tokens, inputs)
        request = m.lookup_request(model, tokens, inputs, allow_full_reuse)
        response = await unary(self._options, worker.prefixes.LookupPrefix, request)
        reuse: types_pb2.PrefixReuse = response.reuse
        return reuse

    async def plan(self, model: Model, tokens: m.Tokens, sessions: Seq[str] = (),
                   allow_full_reuse: bool = False, min_chunk_tokens: int = 0, *,
                   inputs: Seq[Input] = ()) -> prefix_pb2.PlanPromptResponse:
        """What an open of a prompt would reuse: pages found by their keys, or the best of `sessions` (at
        most 16 names), each with the reason why not more. No effect; open(plan=response.plan) does it.

        min_chunk_tokens: above 0 also runs of at least so many tokens of a session that stand elsewhere in
        the prompt, their K turned to it. Approximate, and never found by other prompts."""
        worker = await self._place(model, tokens, inputs)
        response: prefix_pb2.PlanPromptResponse = await unary(
            self._options, worker.prefixes.PlanPrompt, prefix_pb2.PlanPromptRequest(
                model_digest=model.digest, tokens=m.token_list(tokens), sessions=sessions,
                inputs=m.input_list(inputs), allow_full_reuse=allow_full_reuse, min_chunk_tokens=min_chunk_tokens))
        return response

    async def open(self, model: Model, tokens: m.Tokens, *, allow_full_reuse: bool = False,
                   no_reuse: bool = False, sticky_worker_id: str = "",
                   exclude_worker_ids: Seq[str] = (),
                   plan: Optional[prefix_pb2.PromptPlan] = None,
                   inputs: Seq[Input] = ()) -> Sequence:
        """Opens a prompt on the worker that can start it soonest. Does not wait for restores: the
        sequence's length is what is reused (wait_ready). A worker that does not answer is left out and
        another one asked for.

        allow_full_reuse: reuse even the last token (engines usually need its logits).
        no_reuse: reuse nothing, to measure. sticky_worker_id: stay with this worker if it is alive.
        plan: of plan(), for the same tokens and inputs. inputs: what decides rows besides the tokens; given
        to begin_append again, those of the tokens that it appends.
        """
        if self._router is None:
            worker = self.connect_worker(self._worker_address, self._worker_local_socket)
            return await self._open_on(worker, model, m.open_request(
                model, tokens, inputs, allow_full_reuse, no_reuse, plan))
        excluded = list(exclude_worker_ids)
        last: Optional[PageTideError] = None
        for _ in range(self._max_assignments):
            try:
                assigned = await self.assign(model, tokens, sticky_worker_id, excluded, inputs=inputs)
            except PageTideError:
                if last is None:
                    raise
                raise last from None  # the worker that failed says more than "no worker is left"
            worker = self.connect_worker(assigned.address, assigned.local_socket)
            try:
                return await self._open_on(worker, model, m.open_request(
                    model, tokens, inputs, allow_full_reuse, no_reuse, plan, assigned.assignment_id))
            except Unavailable as error:
                _log.info("open on worker %s: %s", assigned.worker_id, error)
                last = error
                excluded.append(assigned.worker_id)
                if sticky_worker_id == assigned.worker_id:
                    sticky_worker_id = ""
        assert last is not None
        raise last

    # --- prompts over the shards of a model ---

    async def lookup_shard_group(
            self, models: Seq[Model], tokens: m.Tokens, allow_full_reuse: bool = False, *,
            addresses: Seq[str] = (),
            inputs: Seq[Input] = ()) -> shard_group_pb2.LookupShardGroupResponse:
        """How much of a prompt all ranks of the group it would go to could reuse, which rank limits it, and
        what each could by itself. No effect. models, addresses: as in open_shard_group."""
        return await lookup_shard_group(self, models, tokens, allow_full_reuse, inputs, addresses)

    async def open_shard_group(self, models: Seq[Model], tokens: m.Tokens, *,
                               allow_full_reuse: bool = False, no_reuse: bool = False,
                               no_sharing: bool = False, sticky_shard_group: str = "",
                               exclude_shard_groups: Seq[str] = (), addresses: Seq[str] = (),
                               inputs: Seq[Input] = ()) -> ShardGroup:
        """Opens a prompt on the worker of each rank of the group that can start it soonest, or on none. All
        reuse what the one that knows least can. Does not wait for restores (ShardGroup.wait_ready). A group
        of which a worker does not answer is left out and another one asked for.

        models: of the ranks, in order: 2 to 64, the same but for their shards (FailedPrecondition
        SHARD_MISMATCH otherwise). addresses: of the ranks' workers in place of a group that the router
        names. no_sharing: ranks with replicated rows read the store each by itself. sticky_shard_group:
        stay with this group if all of it is alive.
        """
        request = shard_group_pb2.OpenShardGroupRequest(
            tokens=m.token_list(tokens), inputs=m.input_list(inputs),
            allow_full_reuse=allow_full_reuse, no_reuse=no_reuse, no_sharing=no_sharing)
        return await open_shard_group(self, models, request, inputs, addresses, sticky_shard_group,
                                      exclude_shard_groups, self._max_assignments)

    async def _open_on(self, worker: WorkerConnection, model: Model,
                       request: sequence_pb2.OpenSequenceRequest) -> Sequence:
        response = await unary(worker.options, worker.sequences.OpenSequence, request)
        sequence = Sequence(self, worker, model, response.state)
        sequence.reuse = response.reuse
        sequence.restoring_pages = response.restoring_pages
        return sequence

    async def _model_of(self, model: Optional[Model], state: types_pb2.SequenceState) -> Model:
        return await self.find_model(state.model_digest) if model is None else model

    # --- engines with a pool of their own ---

    async def register_engine_pool(self, model: Model, memory: EngineMemory, layout: EngineLayout,
                                   name: str, worker_id: str = "") -> EnginePool:
        """Hands an engine's memory to a worker on this host, to load pages into its blocks and store them
        from there. A pool of that name is taken over: its jobs end first. The memory is the pool's until
        it is closed. FailedPrecondition when the worker is not on this host; InvalidArgument names what
        of the layout does not fit."""
        worker = (await self._serving_workers(worker_id))[0]
        plane = await worker.hand_over(memory)
        try:
            response = await unary(
                self._options, worker.engine_pools.RegisterEnginePool,
                engine_pool_pb2.RegisterEnginePoolRequest(
                    request_id=m.new_request_id(), name=name, model_digest=model.digest,
                    local_client_id=plane.client_id, block_tokens=layout.block_tokens,
                    num_blocks=layout.num_blocks, groups=layout.groups(model)))
        except BaseException:
            plane.close()
            raise
        return EnginePool(worker, plane, model, layout, response.pool)

    # --- what outlives a sequence ---

    async def load_session(self, name: str, *, version: Optional[int] = None,
                           model: Optional[Model] = None, length: Optional[int] = None,
                           worker_id: str = "") -> Sequence:
        """A new sequence with a session's tokens (Sequence.tokens) and rows, on any worker or the named
        one. Does not wait for restores. `model`: the one that the caller is going to run;
        FailedPrecondition (MODEL_MISMATCH) when the session is of another. None: that of the session."""
        worker, response = await self._on_any_worker(
            "sessions", "LoadSession", m.load_request(name, version, model, length), worker_id)
        sequence = Sequence(self, worker, await self._model_of(model, response.state), response.state)
        sequence.tokens = list(response.tokens)
        sequence.restoring_pages = response.restoring_pages
        return sequence

    async def peek_session(self, name: str,
                           with_tokens: bool = False) -> session_pb2.PeekSessionResponse:
        """What a session holds, without loading it. NotFound (SESSION_NOT_FOUND)."""
        request = session_pb2.PeekSessionRequest(name=name, with_tokens=with_tokens)
        response: session_pb2.PeekSessionResponse
        _, response = await self._on_any_worker("sessions", "PeekSession", request)
        return response

    async def list_sessions(self, name_prefix: str = "") -> AsyncIterator[session_pb2.SessionInfo]:
        """The tenant's sessions in order of name, fetched as they are consumed."""
        request = session_pb2.ListSessionsRequest(name_prefix=name_prefix)
        while True:
            _, response = await self._on_any_worker("sessions", "ListSessions", request)
            for info in response.sessions:
                yield info
            request.page_token = response.next_page_token
            if not request.page_token:
                return

    async def delete_session(self, name: str, expected_version: Optional[int] = None) -> None:
        """NotFound when there is none; FailedPrecondition (VERSION_MISMATCH). Without expected_version it
        is sent once: a repeat after a lost answer would delete what was saved under the name meanwhile."""
        request = session_pb2.DeleteSessionRequest(name=name)
        if expected_version is None:
            await self._once_on_any_worker("sessions", "DeleteSession", request)
        else:
            request.expected_version = expected_version
            await self._on_any_worker("sessions", "DeleteSession", request)

    async def resume(self, sequence_id: str, *, model: Optional[Model] = None,
                     worker_id: str = "") -> Sequence:
        """A parked sequence (Sequence.park) under its id, on any worker or the named one; or one of a
        worker that died, as it was parked last. Does not wait for restores. SequenceMoved, with worker_id
        in its metadata: its owner is alive. NotFound (SEQUENCE_NOT_FOUND): it is not parked.
        FailedPrecondition (MODEL_MISMATCH), and it stays parked: its rows are not those of `model`."""
        worker, response = await self._on_any_worker(
            "sequences", "ResumeSequence", sequence_pb2.ResumeSequenceRequest(
                request_id=m.new_request_id(), sequence_id=sequence_id,
                model_digest=model.digest if model else ""), worker_id)
        sequence = Sequence(self, worker, await self._model_of(model, response.state), response.state)
        sequence.restoring_pages = response.restoring_pages
        sequence.was_taken_over = response.was_taken_over
        return sequence

    async def drop_parked(self, sequence_id: str, epoch: int) -> None:
        """Drops what was parked of a sequence. epoch: the one that park() answered; when somebody has
        resumed the sequence since, nothing is dropped."""
        await self._on_any_worker("sequences", "CloseSequence", sequence_pb2.CloseSequenceRequest(
            sequence_id=sequence_id, epoch=epoch))

    async def import_sequence(
            self, model: Model, data: transport.FileData, *,
            format: session_pb2.StateFormat = session_pb2.STATE_FORMAT_UNSPECIFIED,
            tokens: m.Tokens = (),
            basis: session_pb2.ImportSequenceRequest.Header.Basis =
            session_pb2.ImportSequenceRequest.Header.BASIS_UNSPECIFIED,
            worker_id: str = "", timeout: Optional[float] = None) -> Sequence:
        """A new sequence from a file (docs/formats/): all of it, or nothing. `data`: bytes, pieces of
        them, or a binary file. Sequence.imported has what was found in it. Sent once.

        format: unspecified is recognised by its first bytes. tokens: for formats that carry none. basis:
        of quantised llama.cpp rows, which that program stores rotated unless told otherwise. timeout: in
        place of the client's; a worker allows 600 s at most.
        """
        header = session_pb2.ImportSequenceRequest.Header(
            request_id=m.new_request_id(), model_digest=model.digest, format=format,
            tokens=m.token_list(tokens), basis=basis)
        worker = (await self._serving_workers(worker_id))[0]
        response = await import_file(
            worker, header, data, self._options.timeout if timeout is None else timeout)
        sequence = Sequence(self, worker, model, response.state)
        sequence.imported = response
        return sequence

    async def unpin(self, name: str) -> None:
        """Lets the store evict what Sequence.pin kept. NotFound (PIN_NOT_FOUND). Sent once: a repeat
        after a lost answer would end a pin that was made under the name meanwhile."""
        await self._once_on_any_worker(
            "edits", "UnpinRange", sequence_edit_pb2.UnpinRangeRequest(name=name))

    async def list_pins(self, name_prefix: str = "") -> AsyncIterator[sequence_edit_pb2.PinInfo]:
        """The tenant's pins in order of name, fetched as they are consumed."""
        request = sequence_edit_pb2.ListPinsRequest(name_prefix=name_prefix)
        while True:
            _, response = await self._on_any_worker("edits", "ListPins", request)
            for info in response.pins:
                yield info
            request.page_token = response.next_page_token
            if not request.page_token:
                return

    # --- several sequences of one worker and model at once ---

    async def begin_batch_step(self, sequences: Seq[Sequence], num_tokens: int,
                               pin_prefix: bool = False) -> BatchStep:
        """Reserves the slots of the next num_tokens (1 to 1024) tokens of each, all or none: one decode step
        of a batch. ValueError for sequences of different workers or models."""
        return await begin_batch_step(sequences, num_tokens, pin_prefix)

    async def reorder(self, sequences: Seq[Sequence], order: Seq[int],
                      allow_repeats: bool = False) -> None:
        """sequences[i] becomes what sequences[order[i]] was (beam search): references only. allow_repeats:
        an index may stand several times."""
        response = await m.first_of(sequences)._call(  # noqa: SLF001
            "edits", "ReorderSequences", sequence_edit_pb2.ReorderSequencesRequest(
                request_id=m.new_request_id(), sequences=[s.ref() for s in sequences], order=order,
                allow_repeats=allow_repeats))
        for sequence, state in zip(sequences, response.states):
            sequence.state = state

    async def keep_only(self, sequences: Seq[Sequence]) -> sequence_edit_pb2.KeepOnlyResponse:
        """Clears every other open sequence of this tenant and model on their worker. They stay open."""
        response: sequence_edit_pb2.KeepOnlyResponse = await m.first_of(sequences)._call(  # noqa: SLF001
            "edits", "KeepOnly", sequence_edit_pb2.KeepOnlyRequest(
                request_id=m.new_request_id(), sequences=[s.ref() for s in sequences]))
        return response
