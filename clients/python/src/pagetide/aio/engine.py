"""Pools of engines on the worker's host: pages into their blocks and out of them (docs/engines.md)."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Optional, Sequence as Seq, Union

from pagetide import _messages as m
from pagetide.aio.calls import WorkerConnection, call_with_retry, unary
from pagetide.aio.sequence import Sequence
from pagetide.engine_memory import EngineLayout
from pagetide.errors import Internal, make_error
from pagetide.local_plane import LocalPlane
from pagetide.model import Model
from pagetide.v1 import engine_pool_pb2

Blocks = Union[Seq[int], Seq[engine_pool_pb2.SlotMap]]


class EngineJob:
    """A load or a store. `state` is what was told last; whatever became of the job, its numbers hold."""

    def __init__(self, worker: WorkerConnection, state: engine_pool_pb2.EngineJob) -> None:
        self._worker = worker
        self.state = state

    @property
    def id(self) -> str:
        return self.state.job_id

    @property
    def usable_tokens(self) -> int:
        """Leading tokens that are loaded, or known to PageTide."""
        return self.state.usable_tokens

    @property
    def has_ended(self) -> bool:
        return self.state.state >= engine_pool_pb2.EngineJob.STATE_DONE

    async def refresh(self) -> None:
        """Fetches the state anew. NotFound (ENGINE_JOB_NOT_FOUND) long after its end."""
        response = await unary(self._worker.options, self._worker.engine_pools.GetJob,
                               engine_pool_pb2.GetJobRequest(job_id=self.id))
        self.state = response.job

    async def wait(self) -> int:
        """Waits for the end: usable_tokens. Raises what the job failed of, or Cancelled; what it did
        before is in `state`."""
        if not self.has_ended:
            request = engine_pool_pb2.WatchJobRequest(job_id=self.id)

            async def attempt(left: float) -> Any:
                last = None
                async for last in self._worker.engine_pools.WatchJob(request, timeout=left):
                    self.state = last.job
                if last is None or not self.has_ended:
                    raise Internal(f"watch job {self.id}: the stream ended before the job")

            await call_with_retry(self._worker.options, attempt)
        if self.state.state != engine_pool_pb2.EngineJob.STATE_DONE:
            raise make_error(self.state.code, self.state.message, self.state.reason)
        return self.usable_tokens

    async def cancel(self) -> None:
        """Ends it early, and returns when it touches no block any more."""
        response = await unary(self._worker.options, self._worker.engine_pools.CancelJob,
                               engine_pool_pb2.CancelJobRequest(job_id=self.id, wait=True))
        self.state = response.job


class EnginePool:
    """A registered pool of this process. It ends with close(), or with the process. The memory must not be
    used for other things before."""

    def __init__(self, worker: WorkerConnection, plane: LocalPlane, model: Model, layout: EngineLayout,
                 ref: engine_pool_pb2.EnginePoolRef) -> None:
        self.worker = worker
        self.model = model
        self.layout = layout
        self.ref = ref
        self._plane = plane

    async def __aenter__(self) -> "EnginePool":
        return self

    async def __aexit__(self, kind: Optional[type[BaseException]], error: Optional[BaseException],
                        trace: Optional[TracebackType]) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the pool. When it returns no job touches the memory any more."""
        try:
            await unary(self.worker.options, self.worker.engine_pools.UnregisterEnginePool,
                        engine_pool_pb2.UnregisterEnginePoolRequest(pool=self.ref))
        finally:
            self._plane.close()

    def is_alive(self) -> bool:
        """False once the worker has ended or dropped this client. Never waits."""
        return self._plane.is_alive()

    async def load_pages(self, tokens: m.Tokens, blocks: Blocks, *, first_token: int = 0,
                         allow_full_reuse: bool = False, time_limit: float = 0.0) -> EngineJob:
        """Begins to copy what is known of a prompt into `blocks`, which hold the tokens from first_token
        on: one for each block_tokens of them, in the order of the prompt. Or one SlotMap a layer group.

        allow_full_reuse: even the last token (engines usually need its logits). time_limit: seconds, 0
        is the worker's default; a load that is late keeps what it has.
        """
        request = engine_pool_pb2.LoadPagesRequest(
            request_id=m.new_request_id(), pool=self.ref, tokens=m.token_list(tokens),
            slot_maps=_slot_maps(blocks, first_token), allow_full_reuse=allow_full_reuse)
        return await self._begin("LoadPages", request, time_limit)

    async def load_sequence(self, sequence: Sequence, blocks: Blocks, *, first_row: int = 0,
                            time_limit: float = 0.0) -> EngineJob:
        """The same of the rows of a sequence that is open on the pool's worker: all of them."""
        request = engine_pool_pb2.LoadPagesRequest(
            request_id=m.new_request_id(), pool=self.ref, sequence_id=sequence.id,
            num_rows=sequence.length, slot_maps=_slot_maps(blocks, first_row))
        return await self._begin("LoadPages", request, time_limit)

    async def store_pages(self, tokens: m.Tokens, blocks: Blocks, *, first_token: int = 0,
                          time_limit: float = 0.0) -> EngineJob:
        """Begins to copy the full pages of `tokens` that are not known yet out of `blocks`, as in
        load_pages. Tokens in front of first_token must be known. Do not write to the blocks before
        the job has ended."""
        request = engine_pool_pb2.StorePagesRequest(
            request_id=m.new_request_id(), pool=self.ref, tokens=m.token_list(tokens),
            slot_maps=_slot_maps(blocks, first_token))
        return await self._begin("StorePages", request, time_limit)

    async def _begin(self, method: str, request: Any, time_limit: float) -> EngineJob:
        if time_limit > 0:
            request.time_limit.FromNanoseconds(int(time_limit * 1e9))
        response = await unary(self.worker.options, getattr(self.worker.engine_pools, method), request)
        return EngineJob(self.worker, response.job)


def _slot_maps(blocks: Blocks, first_token: int) -> list[engine_pool_pb2.SlotMap]:
    maps = [b for b in blocks if isinstance(b, engine_pool_pb2.SlotMap)]
    if maps:
        return maps
    numbers = [int(b) for b in blocks if not isinstance(b, engine_pool_pb2.SlotMap)]
    return [engine_pool_pb2.SlotMap(first_token=first_token, blocks=numbers)]
