"""Sequences as files with the Python client: out, in, and what is refused. Over real programs."""

from __future__ import annotations

import asyncio
import io
import pathlib
import tempfile
from typing import Iterator

import numpy as np
import pytest
from client_test import PAGE, append_all, block_of, spec, tokens_of
from fleet import Fleet

import pagetide
from pagetide import aio
from pagetide.v1 import model_pb2, session_pb2


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with tempfile.TemporaryDirectory(prefix="pt-py-") as folder:
        fleet = Fleet(pathlib.Path(folder), workers=2, pool="64MiB", model_pool="8MiB",
                      worker_flags=("--import-max-bytes=1MiB",))
        yield fleet
        fleet.close()


@pytest.fixture
def client(fleet: Fleet) -> Iterator[pagetide.Client]:
    with pagetide.Client(router=fleet.router.grpc) as client:
        yield client


def square_spec() -> model_pb2.ModelSpec:
    """K and V rows of one size: what llama.cpp's format can hold of any model."""
    square = spec("py-file")
    square.geometry.groups[0].v_dim = 32
    return square


def exported(client: pagetide.Client, model: pagetide.Model, tokens: np.ndarray, **how: object) -> bytes:
    with client.open(model, tokens, no_reuse=True) as sequence:
        append_all(sequence, tokens)
        with sequence.export(**how) as export:  # type: ignore[arg-type]
            assert export.header.tokens == len(tokens)
            data = export.read()
            assert export.header.total_bytes == len(data)
            return data


def test_a_native_file_comes_back_canonical_on_another_worker(client: pagetide.Client) -> None:
    model = client.register_model(square_spec())
    tokens = tokens_of(5 * PAGE + 3, 1)
    data = exported(client, model, tokens)
    for worker_id in ("w0", "w1"):
        with client.import_sequence(model, data, worker_id=worker_id) as sequence:
            assert (sequence.worker_id, sequence.length) == (worker_id, len(tokens))
            assert sequence.imported is not None and sequence.imported.canonical
            assert sequence.imported.format == session_pb2.STATE_FORMAT_NATIVE
            assert sequence.imported.file_bytes == len(data)
            assert np.array_equal(sequence.read_block(0, 0, len(tokens)),
                                  block_of(model, tokens, 0, len(tokens)))
            with sequence.export() as again:
                out = io.BytesIO()
                assert again.write_to(out) == len(data)


def test_a_file_of_llama_cpp_comes_out_as_it_went_in(client: pagetide.Client) -> None:
    model = client.register_model(square_spec())
    tokens = tokens_of(40, 2)
    llama = session_pb2.STATE_FORMAT_LLAMA_CPP
    data = exported(client, model, tokens, format=llama)
    # In pieces of odd sizes, and of the body alone, which carries no tokens.
    pieces = [data[at:at + 777] for at in range(0, len(data), 777)]
    with client.import_sequence(model, pieces) as sequence:
        assert sequence.imported is not None and sequence.imported.format == llama
        assert (sequence.length, sequence.state.canonical_length) == (40, 0)
        with sequence.export(llama, sequence.imported.layout) as export:
            assert export.read() == data
    layout = session_pb2.FileLayout(llama_form=session_pb2.FileLayout.LLAMA_FORM_BODY)
    body = exported(client, model, tokens, format=llama, layout=layout)
    with client.import_sequence(model, io.BytesIO(body), format=llama, tokens=tokens) as sequence:
        assert np.array_equal(sequence.read_block(0, 0, 40), block_of(model, tokens, 0, 40))


def test_what_cannot_be_is_refused_and_leaves_nothing(client: pagetide.Client) -> None:
    model = client.register_model(square_spec())
    tokens = tokens_of(3 * PAGE, 3)
    data = exported(client, model, tokens)
    for damaged in (data[:-1], data[:100], data[:2000] + bytes([data[2000] ^ 1]) + data[2001:]):
        with pytest.raises(pagetide.DataLoss):
            client.import_sequence(model, damaged)
    with pytest.raises(pagetide.InvalidArgument):
        client.import_sequence(model, b"no file of any kind" * 10)
    with pytest.raises(pagetide.PageTideError):
        client.import_sequence(model, b"")
    other = client.register_model(spec("py-other"))
    with pytest.raises(pagetide.FailedPrecondition) as mismatch:
        client.import_sequence(other, data)
    assert mismatch.value.reason == "MODEL_MISMATCH"
    with client.open(model, tokens, no_reuse=True) as sequence:
        append_all(sequence, tokens)
        with pytest.raises(pagetide.InvalidArgument, match="format"):
            sequence.export(99)  # type: ignore[arg-type]
        sequence.remove_range(3, 5)
        with pytest.raises(pagetide.FailedPrecondition) as moved:
            sequence.export(session_pb2.STATE_FORMAT_MLX)
        assert moved.value.reason == "CANNOT_EXPRESS"
        sequence.close()
        with pytest.raises(pagetide.NotFound):
            sequence.export()


def test_a_file_that_is_too_large_is_refused_before_it_is_sent_whole(client: pagetide.Client) -> None:
    """The worker ends the stream early: the client says why instead of sending on."""
    model = client.register_model(square_spec())
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while sent < 512 << 20:
            sent += 1 << 20
            yield bytes(1 << 20)

    with pytest.raises(pagetide.ResourceExhausted) as refused:
        client.import_sequence(model, endless())
    assert refused.value.reason == "FILE_TOO_LARGE"
    assert sent < 512 << 20


def test_asyncio(fleet: Fleet) -> None:
    async def scene() -> None:
        tokens = tokens_of(60, 5)
        async with aio.Client(router=fleet.router.grpc) as client:
            model = await client.register_model(square_spec())
            async with await client.open(model, tokens, no_reuse=True) as sequence:
                async with await sequence.begin_append(tokens) as append:
                    await append.write_block(0, 60, block_of(model, tokens, 0, 60))
                    await append.commit()
                async with await sequence.export() as export:
                    data = await export.read()
                async with await sequence.export() as dropped:
                    assert dropped.header.tokens == 60  # and nothing of it is read

            async def pieces() -> "aio.AsyncIterator[bytes]":  # type: ignore[name-defined]
                for at in range(0, len(data), 1000):
                    yield data[at:at + 1000]

            for source in (data, pieces(), io.BytesIO(data)):
                async with await client.import_sequence(model, source) as sequence:
                    assert np.array_equal(await sequence.read_block(0, 0, 60),
                                          block_of(model, tokens, 0, 60))
            with pytest.raises(pagetide.DataLoss):
                await client.import_sequence(model, data[:-1])

    asyncio.run(scene())
