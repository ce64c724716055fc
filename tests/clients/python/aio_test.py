"""The asyncio client against a real store, router and worker, over both data planes."""

from __future__ import annotations

import asyncio
import pathlib
import tempfile
from typing import Iterator

import numpy as np
import pytest
from client_test import LAYERS, block_of, spec, tokens_of
from fleet import Fleet

import pagetide
from pagetide import aio


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with tempfile.TemporaryDirectory(prefix="pt-py-") as folder:
        fleet = Fleet(pathlib.Path(folder))
        yield fleet
        fleet.close()


async def append_all(sequence: aio.Sequence, tokens: np.ndarray) -> None:
    begin = sequence.length
    async with await sequence.begin_append(tokens[begin:]) as append:
        await append.write_block(0, len(tokens) - begin,
                                 block_of(sequence.model, tokens, begin, len(tokens)))
        await append.commit()


@pytest.mark.parametrize("local", [True, False], ids=["local", "rpc"])
def test_open_append_step_fork_read(fleet: Fleet, local: bool) -> None:
    async def scene() -> None:
        async with aio.Client(router=fleet.router.grpc, use_local_plane=local) as client:
            model = await client.register_model(spec())
            tokens = tokens_of(60, 100 + local)
            async with await client.open(model, tokens) as sequence:
                await append_all(sequence, tokens[:40])
                async with await sequence.begin_step(20) as step:
                    assert step.is_local == local
                    rows = block_of(model, tokens, 40, 60)
                    group = model.groups[0]
                    for layer in range(LAYERS):
                        k = group.offset(layer, pagetide.RowKind.K, 20)
                        v = group.offset(layer, pagetide.RowKind.V, 20)
                        step.write_rows(0, layer, rows[k:v], rows[v:v + 20 * group.v_row_bytes])
                    await step.commit(tokens[40:])
                assert sequence.length == 60
                async with await client.open(model, tokens) as second:
                    assert await second.wait_ready() == 59
                    got = await second.read_block(0, 0, 59)
                    assert np.array_equal(got, block_of(model, tokens, 0, 59))
                async with await sequence.fork(30) as fork:
                    await sequence.rewind(10)
                    assert (fork.length, sequence.length) == (30, 10)
                    parts = [p async for p in fork.read_rows(0, 3, 9, layers=[1])]
                    assert {(p.layer, p.first_token, len(p.rows)) for p in parts} == {(1, 3, 6)}
                with pytest.raises(pagetide.InvalidArgument, match="11"):
                    await sequence.rewind(11)
            assert (await client.lookup(model, tokens)).reused_tokens == 48
            assert (await client.explain(model, tokens)).candidates[0].worker_id == "w0"

    asyncio.run(scene())


def test_many_sequences_at_once(fleet: Fleet) -> None:
    async def scene() -> None:
        async with aio.Client(router=fleet.router.grpc) as client:
            model = await client.register_model(spec())

            async def one(seed: int) -> None:
                tokens = tokens_of(40, seed)
                async with await client.open(model, tokens, no_reuse=True) as sequence:
                    await append_all(sequence, tokens)
                    got = await sequence.read_block(0, 0, 40)
                    assert np.array_equal(got, block_of(model, tokens, 0, 40))

            await asyncio.gather(*(one(2000 + i) for i in range(16)))

    asyncio.run(scene())


def test_an_incomplete_append_changes_nothing(fleet: Fleet) -> None:
    async def scene() -> None:
        async with aio.Client(router=fleet.router.grpc) as client:
            model = await client.register_model(spec())
            tokens = tokens_of(30, 31)
            async with await client.open(model, tokens, no_reuse=True) as sequence:
                async with await sequence.begin_append(tokens):
                    pass  # cancelled
                async with await sequence.begin_append(tokens) as append:
                    await append.write_rows(0, 0, pagetide.RowKind.K, 0, bytes(30 * 128))
                    with pytest.raises(pagetide.PageTideError):
                        await append.commit()
                await sequence.refresh()
                assert sequence.length == 0

    asyncio.run(scene())
