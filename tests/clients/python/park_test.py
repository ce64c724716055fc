"""Parked sequences with the Python client: resumed on another worker, after a restart of everything, taken over
from a worker that died. Over real programs."""

from __future__ import annotations

import asyncio
import pathlib
import tempfile
import time
from typing import Iterator

import numpy as np
import pytest
from client_test import append_all, block_of, spec, tokens_of
from fleet import Fleet

import pagetide
from pagetide import aio

# A worker's lease of the store: a dead one's place and sequences can be had so much later. The second is for the
# test in which a worker that is alive must not be late with its renewal.
SHORT_LEASE = ("--store-lease-ms=1000",)
SAFE_LEASE = ("--store-lease-ms=3000",)


@pytest.fixture
def folder() -> Iterator[pathlib.Path]:
    with tempfile.TemporaryDirectory(prefix="pt-py-") as name:
        yield pathlib.Path(name)


def check_rows(sequence: pagetide.Sequence, tokens: np.ndarray) -> None:
    assert sequence.wait_ready() == len(tokens)
    assert np.array_equal(sequence.read_block(0, 0, len(tokens)),
                          block_of(sequence.model, tokens, 0, len(tokens)))


def test_a_parked_sequence_is_resumed_under_its_id_anywhere(folder: pathlib.Path) -> None:
    tokens = tokens_of(70, 1)
    fleet = Fleet(folder, workers=2, worker_flags=SHORT_LEASE)
    try:
        with pagetide.Client(router=fleet.router.grpc) as client:
            model = client.register_model(spec())
            with client.open(model, tokens[:60], sticky_worker_id="w0") as sequence:
                append_all(sequence, tokens[:60])
                parked = sequence.park(ttl=3600)
                assert (parked.is_open, parked.tokens) == (False, 60)
                sequence.close()  # it is: leaving the block must not drop what was parked
            other = spec("another")
            other.weights_digest = b"o" * 32
            with pytest.raises(pagetide.FailedPrecondition) as wrong:
                client.resume(sequence.id, model=client.register_model(other), worker_id="w1")
            assert wrong.value.reason == "MODEL_MISMATCH"
            with client.resume(sequence.id, model=model, worker_id="w1") as resumed:
                assert (resumed.id, resumed.worker_id) == (sequence.id, "w1")
                assert resumed.state.epoch > parked.epoch - 1 and not resumed.was_taken_over
                check_rows(resumed, tokens[:60])
                append_all(resumed, tokens)
                again = resumed.park(keep_open=True)
                assert again.is_open and again.version > parked.version
                resumed.rewind(65)  # it goes on
                last = resumed.park()
                sequence_id = resumed.id
            client.drop_parked(sequence_id, last.epoch - 1)  # of an owner before: drops nothing
        for program in (*fleet.workers, fleet.router, fleet.store):
            program.kill()
    finally:
        fleet.close()
    fleet = Fleet(folder, worker_flags=SHORT_LEASE)
    try:
        with pagetide.Client(router=fleet.router.grpc) as client:
            with client.resume(sequence_id) as resumed:
                check_rows(resumed, tokens[:65])
                epoch = resumed.park().epoch
            client.drop_parked(sequence_id, epoch)
            with pytest.raises(pagetide.NotFound) as dropped:
                client.resume(sequence_id)
            assert dropped.value.reason == "SEQUENCE_NOT_FOUND"
            with pytest.raises(pagetide.InvalidArgument):
                client.resume("no id")
    finally:
        fleet.close()


def test_a_sequence_of_a_dead_worker_is_taken_over_as_it_was_parked(folder: pathlib.Path) -> None:
    tokens = tokens_of(60, 2)
    fleet = Fleet(folder, workers=2, worker_flags=SAFE_LEASE)
    try:
        with pagetide.Client(router=fleet.router.grpc) as client:
            model = client.register_model(spec())
            sequence = client.open(model, tokens[:40], sticky_worker_id="w0")
            append_all(sequence, tokens[:40])
            sequence.park(keep_open=True)
            append_all(sequence, tokens)
            with pytest.raises(pagetide.SequenceMoved) as alive:
                client.resume(sequence.id, worker_id="w1")
            assert alive.value.metadata["worker_id"] == "w0"
            fleet.workers[0].kill()

            async def take_over() -> None:
                async with aio.Client(router=fleet.router.grpc) as other:
                    deadline = time.monotonic() + 60
                    while True:
                        try:
                            resumed = await other.resume(sequence.id, worker_id="w1", model=model)
                            break
                        except pagetide.SequenceMoved:  # its lease has not ended yet
                            assert time.monotonic() < deadline
                            await asyncio.sleep(0.1)
                    async with resumed:
                        assert resumed.was_taken_over and await resumed.wait_ready() == 40
                        assert np.array_equal(await resumed.read_block(0, 0, 40),
                                              block_of(model, tokens, 0, 40))

            asyncio.run(take_over())
    finally:
        fleet.close()
