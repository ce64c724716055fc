"""Sequences over the shards of a model: a worker a rank, and one length for all."""

from __future__ import annotations

import dataclasses
import logging
from types import TracebackType
from typing import TYPE_CHECKING, Optional, Sequence as Seq

import grpc

from pagetide import _messages as m
from pagetide.aio.calls import WorkerConnection, unary
from pagetide.aio.sequence import Sequence
from pagetide.errors import PageTideError, Unavailable, from_rpc_error
from pagetide.model import Model
from pagetide.options import Input
from pagetide.v1 import shard_group_pb2, types_pb2

if TYPE_CHECKING:
    from pagetide.aio.client import Client

_log = logging.getLogger("pagetide")


@dataclasses.dataclass(frozen=True)
class GroupPlace:
    """Where the ranks of a group are: their workers, in order of rank."""

    shard_group: str  # name of the group of workers; empty: the caller named their addresses
    workers: tuple[WorkerConnection, ...]

    def members(self, models: Seq[Model]) -> list[shard_group_pb2.ShardMember]:
        """As the worker of rank 0 is told them."""
        return [shard_group_pb2.ShardMember(address=worker.address, model_digest=model.digest)
                for worker, model in zip(self.workers, models)]


class ShardGroup:
    """One open sequence over the shards of a model. Leaving its `async with` block closes it.

    `sequences[rank]` is open on that rank's worker: there its rows are read and appended, as of any
    sequence. What was appended is the group's when commit() has answered: then all ranks have it. For one
    thread or task at a time, with its sequences.
    """

    def __init__(self, client: "Client", place: GroupPlace, models: Seq[Model],
                 opened: shard_group_pb2.OpenShardGroupResponse) -> None:
        self.shard_group = place.shard_group  # of workers, for sticky_shard_group
        self.state = opened.group
        # What the open reused, which rank knew the least, what each knows by itself, and pages that ranks
        # with replicated rows got from rank 0 in place of the store.
        self.reused_tokens: int = opened.reused_tokens
        self.limiting_rank: int = opened.limiting_rank
        self.reuse: list[types_pb2.PrefixReuse] = list(opened.ranks)
        self.shared_pages: int = opened.shared_pages
        self.sequences = tuple(
            Sequence(client, worker, model, rank.state)
            for worker, model, rank in zip(place.workers, models, opened.group.ranks))
        for sequence, reuse in zip(self.sequences, self.reuse):
            sequence.reuse = reuse
        self._worker = place.workers[0]
        self._is_closed = False

    @property
    def id(self) -> str:
        """Of the group, and of rank 0's sequence."""
        return self.state.sequence_id

    @property
    def length(self) -> int:
        """Tokens that all ranks have acknowledged."""
        return self.state.length

    async def __aenter__(self) -> "ShardGroup":
        return self

    async def __aexit__(self, kind: Optional[type[BaseException]], error: Optional[BaseException],
                        trace: Optional[TracebackType]) -> None:
        if self._is_closed:
            return
        try:  # best effort: workers may be gone
            await self._worker.shard_groups.CloseShardGroup(
                self._close_request(), timeout=m.CLOSE_TIMEOUT)
        except grpc.RpcError as rpc_error:
            _log.info("close shard group %s: %s", self.id, from_rpc_error(rpc_error))
        self._note_closed()

    async def wait_ready(self) -> int:
        """Waits until all reused pages of all ranks are resident. The length, shorter than at open if a
        rank's restore failed: then all are cut to what it has."""
        shortest = self.length
        for sequence in self.sequences:
            shortest = min(shortest, await sequence.wait_ready())
        if shortest < self.length:
            await self.rewind(shortest)
        return self.length

    async def commit(self, length: Optional[int] = None) -> int:
        """Makes the group `length` tokens long (None: as long as its shortest sequence), when every rank
        has so many and the same ones. FailedPrecondition, and nothing has changed: SHARD_BEHIND (metadata:
        rank, length), SHARD_DIVERGED (a rank has other tokens than rank 0), SHARD_STALE (metadata: rank;
        its sequence is of another epoch), LENGTH_MISMATCH (the group is longer: rewind)."""
        wanted = min(s.length for s in self.sequences) if length is None else length
        response = await unary(
            self._worker.options, self._worker.shard_groups.CommitShardGroup,
            shard_group_pb2.CommitShardGroupRequest(
                sequence_id=self.id, epoch=self.state.epoch, length=wanted))
        self._learn(response.group)
        return self.length

    async def rewind(self, length: int) -> None:
        """Cuts every rank to `length` tokens, at most the group's; to the group's own: drops what was
        appended since the last commit. Unavailable: some ranks may be longer still, repeat it."""
        response = await unary(
            self._worker.options, self._worker.shard_groups.RewindShardGroup,
            shard_group_pb2.RewindShardGroupRequest(
                sequence_id=self.id, epoch=self.state.epoch, length=length))
        self._learn(response.group)

    async def refresh(self) -> None:
        """Fetches the group and its sequences anew. A rank that does not answer has a code and a message
        in state.ranks, and keeps what was known of it. NotFound (SHARD_GROUP_NOT_FOUND): it has ended."""
        response = await unary(
            self._worker.options, self._worker.shard_groups.GetShardGroup,
            shard_group_pb2.GetShardGroupRequest(sequence_id=self.id))
        self._learn(response.group)

    async def close(self) -> list[int]:
        """Closes the sequences of all ranks; full pages stay in the caches. The ranks that could not be
        reached: what they have open ends when it has been idle. Idempotent."""
        if self._is_closed:
            return []
        response = await unary(self._worker.options, self._worker.shard_groups.CloseShardGroup,
                               self._close_request())
        self._note_closed()
        return list(response.unreachable_ranks)

    def _close_request(self) -> shard_group_pb2.CloseShardGroupRequest:
        return shard_group_pb2.CloseShardGroupRequest(sequence_id=self.id, epoch=self.state.epoch)

    def _note_closed(self) -> None:
        self._is_closed = True
        for sequence in self.sequences:
            sequence._is_closed = True  # noqa: SLF001

    def _learn(self, state: shard_group_pb2.ShardGroup) -> None:
        self.state = state
        for sequence, rank in zip(self.sequences, state.ranks):
            if rank.code == 0:
                sequence.state = rank.state


async def place_group(client: "Client", models: Seq[Model], tokens: m.Tokens, inputs: Seq[Input],
                      addresses: Seq[str], sticky: str = "", exclude: Seq[str] = ()) -> GroupPlace:
    """The workers at `addresses`, or those of the group that the router names."""
    if addresses:
        if len(addresses) != len(models):
            raise ValueError(f"shard group: {len(addresses)} addresses of {len(models)} ranks")
        return GroupPlace("", tuple(client.connect_worker(address) for address in addresses))
    assigned = await client.assign_group(models, tokens, sticky, exclude, inputs=inputs)
    return GroupPlace(assigned.shard_group, tuple(
        client.connect_worker(rank.address, rank.local_socket) for rank in assigned.ranks))


async def lookup_shard_group(client: "Client", models: Seq[Model], tokens: m.Tokens,
                             allow_full_reuse: bool, inputs: Seq[Input],
                             addresses: Seq[str]) -> shard_group_pb2.LookupShardGroupResponse:
    """Client.lookup_shard_group."""
    place = await place_group(client, models, tokens, inputs, addresses)
    worker = place.workers[0]
    response: shard_group_pb2.LookupShardGroupResponse = await unary(
        worker.options, worker.shard_groups.LookupShardGroup,
        shard_group_pb2.LookupShardGroupRequest(
            members=place.members(models), tokens=m.token_list(tokens), inputs=m.input_list(inputs),
            allow_full_reuse=allow_full_reuse))
    return response


async def open_shard_group(client: "Client", models: Seq[Model],
                           request: shard_group_pb2.OpenShardGroupRequest, inputs: Seq[Input],
                           addresses: Seq[str], sticky: str, exclude: Seq[str],
                           max_assignments: int) -> ShardGroup:
    """Client.open_shard_group; `request` is without request_id and members."""
    excluded = list(exclude)
    last: Optional[PageTideError] = None
    for _ in range(1 if addresses else max_assignments):
        try:
            place = await place_group(
                client, models, list(request.tokens), inputs, addresses, sticky, excluded)
        except PageTideError:
            if last is None:
                raise
            raise last from None  # the group that failed says more than "no group is left"
        worker = place.workers[0]
        request.request_id = m.new_request_id()
        del request.members[:]
        request.members.extend(place.members(models))
        try:
            opened = await unary(worker.options, worker.shard_groups.OpenShardGroup, request)
            return ShardGroup(client, place, models, opened)
        except Unavailable as error:
            _log.info("open on shard group %s: %s", place.shard_group, error)
            last = error
            excluded.append(place.shard_group)
            if sticky == place.shard_group:
                sticky = ""
    assert last is not None
    raise last
