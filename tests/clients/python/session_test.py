"""Sessions with the Python client, blocking and asyncio, over real programs and a restart."""

from __future__ import annotations

import asyncio
import pathlib
import tempfile
from typing import Iterator

import numpy as np
import pytest
from client_test import append_all, block_of, spec, tokens_of
from fleet import Fleet

import pagetide
from pagetide import aio


@pytest.fixture
def folder() -> Iterator[pathlib.Path]:
    with tempfile.TemporaryDirectory(prefix="pt-py-") as name:
        yield pathlib.Path(name)


def test_a_session_outlives_every_process_and_loads_on_any_worker(folder: pathlib.Path) -> None:
    tokens = tokens_of(75, 1)  # four pages and a tail
    fleet = Fleet(folder)
    try:
        with pagetide.Client(router=fleet.router.grpc) as client:
            model = client.register_model(spec())
            with client.open(model, tokens) as sequence:
                append_all(sequence, tokens)
                saved = sequence.save("chat-1", {"user": "42"}, expected_version=0)
                assert (saved.version, saved.tokens) == (1, 75)
                again = sequence.save("chat-1")
                assert (again.version, again.pages_written) == (2, 0)
                with pytest.raises(pagetide.FailedPrecondition) as mismatch:
                    sequence.save("chat-1", expected_version=1)
                assert mismatch.value.reason == "VERSION_MISMATCH"
                sequence.save("chat-2", keep_tokens=20)
            with pytest.raises(pagetide.InvalidArgument):
                client.peek_session("No/Name")
        for program in (*fleet.workers, fleet.router, fleet.store):
            program.kill()  # no chance to write anything late
    finally:
        fleet.close()
    fleet = Fleet(folder, workers=2)
    try:
        with pagetide.Client(router=fleet.router.grpc) as client:
            assert [s.name for s in client.list_sessions()] == ["chat-1", "chat-2"]
            assert [s.name for s in client.list_sessions("chat-2")] == ["chat-2"]
            peeked = client.peek_session("chat-2", with_tokens=True)
            assert list(peeked.tokens) == list(tokens[:20])
            for worker_id in ("w0", "w1", ""):
                with client.load_session("chat-1", worker_id=worker_id) as loaded:
                    assert worker_id in ("", loaded.worker_id)
                    assert loaded.tokens == list(tokens) and loaded.wait_ready() == 75
                    assert np.array_equal(loaded.read_block(0, 0, 75),
                                          block_of(loaded.model, tokens, 0, 75))
            with pytest.raises(pagetide.FailedPrecondition):
                client.load_session("chat-1", version=1)
            with pytest.raises(pagetide.Unavailable, match="w7"):
                client.load_session("chat-1", worker_id="w7")
            client.delete_session("chat-1")
            with pytest.raises(pagetide.NotFound) as missing:
                client.load_session("chat-1")
            assert missing.value.reason == "SESSION_NOT_FOUND"
    finally:
        fleet.close()


def test_asyncio(folder: pathlib.Path) -> None:
    fleet = Fleet(folder)
    try:
        tokens = tokens_of(50, 2)
        with pagetide.Client(router=fleet.router.grpc) as client:
            model = client.register_model(spec())
            with client.open(model, tokens) as sequence:
                append_all(sequence, tokens)
                sequence.save("from-sync", keep_tokens=30)

        async def scene() -> None:
            async with aio.Client(router=fleet.router.grpc) as client:
                async with await client.load_session("from-sync") as loaded:
                    assert loaded.tokens == list(tokens[:30])
                    assert await loaded.wait_ready() == 30
                    assert np.array_equal(await loaded.read_block(0, 0, 30),
                                          block_of(loaded.model, tokens, 0, 30))
                    assert (await loaded.save("from-aio")).version == 1
                assert [s.name async for s in client.list_sessions()] == ["from-aio", "from-sync"]
                assert (await client.peek_session("from-aio")).session.tokens == 30
                await client.delete_session("from-aio")
                with pytest.raises(pagetide.NotFound):
                    await client.peek_session("from-aio")

        asyncio.run(scene())
    finally:
        fleet.close()
