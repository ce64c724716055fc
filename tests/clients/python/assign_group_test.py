"""Client.assign_group, blocking and asyncio, over a real router and workers of two engines."""

from __future__ import annotations

import asyncio
import pathlib
import tempfile
import time
from typing import Iterator

import pytest
from client_test import append_all, spec, tokens_of
from fleet import Fleet

import pagetide
from pagetide import aio
from pagetide.v1 import model_pb2


def shard_spec(rank: int, num_ranks: int = 2) -> model_pb2.ModelSpec:
    shard = spec(f"py-shard-{rank}-of-{num_ranks}")
    shard.geometry.shard.CopyFrom(model_pb2.Shard(
        kv_head_begin=2 * rank, kv_head_end=2 * rank + 2, rank=rank, num_ranks=num_ranks))
    return shard


def register_shards(client: pagetide.Client, num_ranks: int = 2) -> list[pagetide.Model]:
    return [client.register_model(shard_spec(rank, num_ranks)) for rank in range(num_ranks)]


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    with tempfile.TemporaryDirectory(prefix="pt-py-") as folder:
        fleet = Fleet(pathlib.Path(folder), workers=0, worker_flags=("--write-through=false",))
        fleet.start_shard_group("a")
        fleet.start_shard_group("b")
        yield fleet
        fleet.close()


def test_the_group_whose_ranks_all_know_the_prefix_is_assigned(fleet: Fleet) -> None:
    with pagetide.Client(router=fleet.router.grpc) as client:
        models = register_shards(client)
        tokens = tokens_of(400, 1)
        workers = {w.worker_id: w for w in client.list_workers() if w.role == "worker"}
        assert {(w.shard_group, w.shard_rank) for w in workers.values()} == {
            ("a", 0), ("a", 1), ("b", 0), ("b", 1)}
        for worker_id, model, known in (("a-0", 0, 400), ("b-0", 0, 384), ("b-1", 1, 384)):
            with pagetide.Client(worker=workers[worker_id].address) as direct:
                with direct.open(models[model], tokens) as sequence:
                    append_all(sequence, tokens[:known])
        deadline = time.monotonic() + 60
        while True:
            assigned = client.assign_group(models, tokens)
            if assigned.shard_group == "b" and assigned.candidates[0].candidate.device_tokens == 384:
                break
            assert time.monotonic() < deadline, assigned
            time.sleep(0.01)
        assert [(r.rank, r.worker_id, r.address, r.model_digest) for r in assigned.ranks] == [
            (rank, f"b-{rank}", workers[f"b-{rank}"].address, models[rank].digest) for rank in (0, 1)]
        assert assigned.candidates[1].shard_group == "a"
        assert assigned.candidates[1].candidate.compute_tokens == 400
        assert assigned.candidates[1].limiting_rank == 1
        assert client.assign_group(models, tokens, sticky_shard_group="a").shard_group == "a"
        assert client.assign_group(models, tokens, exclude_shard_groups=["b"]).shard_group == "a"
        # A shard by itself goes to a worker of its rank.
        assert client.assign(models[1], tokens).worker_id == "b-1"


def test_what_is_wrong_is_typed(fleet: Fleet) -> None:
    with pagetide.Client(router=fleet.router.grpc,
                         retry=pagetide.RetryPolicy(max_attempts=1)) as client:
        models = register_shards(client)
        tokens = tokens_of(40, 2)
        for wrong in ([], models[:1], models[::-1], [models[0], models[0]]):
            with pytest.raises(pagetide.InvalidArgument, match="rank_models"):
                client.assign_group(wrong, tokens)
        with pytest.raises(pagetide.Unavailable) as none:
            client.assign_group(models, tokens, exclude_shard_groups=["a", "b"])
        assert none.value.reason == "NO_SHARD_GROUP" and none.value.retry_delay
        assert "a (excluded by the caller), b (excluded by the caller)" in none.value.message
        with pagetide.Client(worker="127.0.0.1:1") as direct:
            with pytest.raises(pagetide.FailedPrecondition, match="no router"):
                direct.assign_group(models, tokens)


def test_asyncio(fleet: Fleet) -> None:
    async def scene() -> None:
        async with aio.Client(router=fleet.router.grpc) as client:
            models = [await client.register_model(shard_spec(rank)) for rank in range(2)]
            assigned = await client.assign_group(models, tokens_of(40, 3), "b")
            assert assigned.shard_group == "b"
            assert [rank.worker_id for rank in assigned.ranks] == ["b-0", "b-1"]

    asyncio.run(scene())
