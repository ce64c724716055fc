"""Sequences over shards with the Python client, blocking and asyncio, over real workers of two engines."""

from __future__ import annotations

import asyncio
import pathlib
import tempfile
from typing import Iterator

import numpy as np
import pytest
from assign_group_test import register_shards, shard_spec
from client_test import append_all, block_of, spec, tokens_of
from fleet import Fleet

import pagetide
from pagetide import aio
from pagetide.v1 import types_pb2

TOKENS = 75  # four pages and a tail


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    with tempfile.TemporaryDirectory(prefix="pt-py-") as folder:
        fleet = Fleet(pathlib.Path(folder), workers=0, model_pool="4MiB")
        fleet.start_shard_group("a")
        yield fleet
        fleet.close()


@pytest.fixture(params=[True, False], ids=["local", "rpc"])
def client(fleet: Fleet, request: pytest.FixtureRequest) -> Iterator[pagetide.Client]:
    with pagetide.Client(router=fleet.router.grpc, use_local_plane=request.param) as client:
        yield client


def append_to_all(group: pagetide.ShardGroup, tokens: np.ndarray) -> None:
    for sequence in group.sequences:
        append_all(sequence, tokens)


def test_ranks_append_and_the_group_is_as_long_as_all_of_them(client: pagetide.Client) -> None:
    models = register_shards(client)
    tokens = tokens_of(TOKENS, 1)
    assert client.lookup_shard_group(models, tokens).reused_tokens == 0
    with client.open_shard_group(models, tokens) as group:
        assert (group.shard_group, group.length, group.reused_tokens) == ("a", 0, 0)
        assert [s.worker_id for s in group.sequences] == ["a-0", "a-1"]
        assert group.id == group.sequences[0].id
        append_all(group.sequences[0], tokens)
        append_all(group.sequences[1], tokens[:40])
        assert group.commit() == 40  # as far as both are
        with pytest.raises(pagetide.FailedPrecondition) as behind:
            group.commit(TOKENS)
        assert behind.value.reason == "SHARD_BEHIND"
        assert (behind.value.metadata["rank"], behind.value.metadata["length"]) == ("1", "40")
        assert group.length == 40
        append_all(group.sequences[1], tokens)
        assert group.commit() == TOKENS
        assert group.commit(TOKENS) == TOKENS  # again
        # A decode step: rows of each rank to its own worker.
        more = np.append(tokens, tokens_of(3, 2))
        for sequence in group.sequences:
            with sequence.begin_step(3) as step:
                rows = block_of(sequence.model, more, TOKENS, TOKENS + 3)
                layout = sequence.model.groups[0]
                for layer in range(layout.num_layers):
                    k = layout.offset(layer, pagetide.RowKind.K, 3)
                    v = layout.offset(layer, pagetide.RowKind.V, 3)
                    step.write_rows(0, layer, rows[k:v], rows[v:v + 3 * layout.v_row_bytes])
                step.commit(more[TOKENS:])
        assert group.commit() == TOKENS + 3
        for sequence in group.sequences:
            assert np.array_equal(sequence.read_block(0, 0, TOKENS + 3),
                                  block_of(sequence.model, more, 0, TOKENS + 3))
        with pytest.raises(pagetide.FailedPrecondition) as longer:
            group.commit(10)
        assert longer.value.reason == "LENGTH_MISMATCH"
        group.rewind(70)
        assert [group.length, *(s.length for s in group.sequences)] == [70, 70, 70]
        with pytest.raises(pagetide.InvalidArgument):
            group.rewind(71)
    with pytest.raises(pagetide.NotFound) as ended:
        group.refresh()
    assert ended.value.reason == "SHARD_GROUP_NOT_FOUND"


def test_what_one_rank_knows_alone_is_reused_by_none(client: pagetide.Client) -> None:
    models = register_shards(client)
    tokens = tokens_of(TOKENS, 3)
    with client.open_shard_group(models, tokens, no_reuse=True) as group:
        append_to_all(group, tokens[:32])
        append_all(group.sequences[0], tokens)
        assert group.commit() == 32
    found = client.lookup_shard_group(models, tokens)
    assert (found.reused_tokens, found.limiting_rank) == (32, 1)
    assert [rank.reused_tokens for rank in found.ranks] == [64, 32]
    with client.open_shard_group(models, tokens) as group:
        assert (group.reused_tokens, group.limiting_rank) == (32, 1)
        assert [rank.reused_tokens for rank in group.reuse] == [64, 32]
        assert group.wait_ready() == 32
        for sequence in group.sequences:
            assert sequence.length == 32
            assert np.array_equal(sequence.read_block(0, 0, 32),
                                  block_of(sequence.model, tokens, 0, 32))
        # What was appended and not committed goes.
        append_to_all(group, tokens)
        group.rewind(32)
        assert [s.length for s in group.sequences] == [32, 32]
    # Shorter than what all know, and with the last token.
    assert client.lookup_shard_group(models, tokens[:32]).reused_tokens < 32
    assert client.lookup_shard_group(models, tokens[:32], allow_full_reuse=True).reused_tokens == 32


def test_a_rank_that_is_shorter_than_it_was_opened_cuts_all(client: pagetide.Client) -> None:
    models = register_shards(client)
    tokens = tokens_of(TOKENS, 9)
    with client.open_shard_group(models, tokens, no_reuse=True) as group:
        append_to_all(group, tokens)
        assert group.commit() == TOKENS
    with client.open_shard_group(models, tokens) as group:
        assert group.length == 64
        # As after a restore that failed: the sequence gets shorter, and only its worker knows.
        rank = group.sequences[1]
        state = types_pb2.SequenceState()
        state.CopyFrom(rank.state)
        pagetide.Sequence(client, rank.worker, rank.model, state).rewind(48)
        assert (group.length, rank.length) == (64, 64)
        assert group.wait_ready() == 48
        assert [group.length, *(s.length for s in group.sequences)] == [48, 48, 48]
        append_to_all(group, tokens)
        assert group.commit() == TOKENS


def test_ranks_that_took_different_tokens_are_not_committed(client: pagetide.Client) -> None:
    models = register_shards(client)
    tokens, others = tokens_of(40, 4), tokens_of(40, 5)
    with client.open_shard_group(models, tokens, no_reuse=True) as group:
        append_to_all(group, tokens[:20])
        assert group.commit() == 20
        append_all(group.sequences[0], tokens)
        append_all(group.sequences[1], np.append(tokens[:20], others[20:]))
        with pytest.raises(pagetide.FailedPrecondition) as diverged:
            group.commit()
        assert diverged.value.reason == "SHARD_DIVERGED"
        assert group.commit(20) == 20
        group.rewind(20)
        append_to_all(group, tokens)
        assert group.commit() == 40


def test_members_are_checked(fleet: Fleet) -> None:
    with pagetide.Client(router=fleet.router.grpc) as client:
        models = register_shards(client)
        tokens = tokens_of(40, 6)
        addresses = [w.address for w in client.list_workers() if w.role == "worker"]
        with pytest.raises(ValueError, match="3 addresses of 2 ranks"):
            client.open_shard_group(models, tokens, addresses=[*addresses, addresses[0]])
        for wrong in (models[:1], []):
            with pytest.raises(pagetide.InvalidArgument):
                client.open_shard_group(wrong, tokens)
        whole = client.register_model(spec("py-whole"))
        with pytest.raises(pagetide.FailedPrecondition) as mismatch:
            client.open_shard_group([models[0], whole], tokens, addresses=addresses)
        assert mismatch.value.reason == "SHARD_MISMATCH"
    # Without a router, the ranks' workers have to be named.
    with pagetide.Client(worker=addresses[0]) as direct:
        with pytest.raises(pagetide.FailedPrecondition, match="no router"):
            direct.open_shard_group(models, tokens)
        with direct.open_shard_group(models, tokens, addresses=addresses) as group:
            assert group.shard_group == ""
            append_to_all(group, tokens)
            assert group.commit() == 40


def test_a_rank_that_dies_takes_its_group_along_and_another_group_takes_over(fleet: Fleet) -> None:
    tokens = tokens_of(TOKENS, 7)
    with pagetide.Client(router=fleet.router.grpc, timeout=10) as client:
        models = register_shards(client)
        group = client.open_shard_group(models, tokens)
        append_to_all(group, tokens)
        assert group.commit() == TOKENS
        fleet.start_shard_group("b")
        fleet.workers_by_id["a-1"].kill()
        group.refresh()
        assert group.state.ranks[0].code == 0 and group.state.ranks[1].code != 0
        assert group.length == TOKENS
        assert group.close() == [1]
        assert group.close() == []
        # Pages were written through: the other engine reads them.
        with client.open_shard_group(models, tokens, sticky_shard_group="a") as moved:
            assert moved.shard_group == "b"
            assert moved.wait_ready() == 64
            for sequence in moved.sequences:
                assert np.array_equal(sequence.read_block(0, 0, 64),
                                      block_of(sequence.model, tokens, 0, 64))
        fleet.workers_by_id["b-0"].kill()
        with pytest.raises(pagetide.Unavailable):
            client.open_shard_group(models, tokens)


def test_asyncio(fleet: Fleet) -> None:
    async def scene() -> None:
        async with aio.Client(router=fleet.router.grpc) as client:
            models = [await client.register_model(shard_spec(rank)) for rank in range(2)]
            tokens = tokens_of(TOKENS, 8)
            async with await client.open_shard_group(models, tokens) as group:
                async def append(sequence: aio.Sequence) -> None:
                    async with await sequence.begin_append(tokens) as append:
                        await append.write_block(0, TOKENS, block_of(sequence.model, tokens, 0, TOKENS))
                        await append.commit()

                await asyncio.gather(*(append(sequence) for sequence in group.sequences))
                assert await group.commit() == TOKENS
                await group.rewind(64)
                await group.refresh()
                assert [group.length, *(s.length for s in group.sequences)] == [64, 64, 64]
            assert (await client.lookup_shard_group(models, tokens)).reused_tokens == 64
            again = await client.open_shard_group(models, tokens)
            assert await again.wait_ready() == 64
            assert await again.close() == []

    asyncio.run(scene())
