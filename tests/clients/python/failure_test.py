"""What the Python client does when programs die, stall or move a sequence away."""

from __future__ import annotations

import asyncio
import pathlib
import tempfile
import time
from concurrent import futures
from typing import Any, Iterator

import grpc
import numpy as np
import pytest
from client_test import append_all, block_of, spec, tokens_of
from fleet import Fleet

import pagetide
from pagetide import aio, rpc_status_pb2
from pagetide.retry import RetryLoop
from pagetide.v1 import sequence_pb2, types_pb2

QUICK = pagetide.RetryPolicy(max_attempts=3, initial_backoff=0.01)


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    with tempfile.TemporaryDirectory(prefix="pt-py-") as folder:
        fleet = Fleet(pathlib.Path(folder), workers=2)
        yield fleet
        fleet.close()


def test_a_dead_worker_is_unavailable_and_open_finds_the_other(fleet: Fleet) -> None:
    with pagetide.Client(router=fleet.router.grpc, retry=QUICK, timeout=10) as client:
        model = client.register_model(spec())
        tokens = tokens_of(64, 1)
        first = client.open(model, tokens)
        append_all(first, tokens)
        owner = int(first.worker_id[1:])
        fleet.workers[owner].kill()
        with pytest.raises(pagetide.Unavailable):
            first.refresh()
        with pytest.raises(pagetide.PageTideError) as lost:
            with first.begin_append([1]) as append:
                append.write_rows(0, 0, pagetide.RowKind.K, 0, bytes(128))
                append.commit()
        assert isinstance(lost.value, (pagetide.Unavailable, pagetide.Aborted))
        assert first.lease_pages() is None  # the dead worker's frames are not read
        with client.open(model, tokens) as second:
            assert second.worker_id == f"w{1 - owner}"
            reused = second.wait_ready()
            assert reused % 16 in (0, 15) and reused <= 63
            if reused:  # what was written through before the kill came back, and is right
                assert np.array_equal(second.read_block(0, 0, reused),
                                      block_of(model, tokens, 0, reused))


def test_a_stalled_worker_ends_calls_at_their_deadline(fleet: Fleet) -> None:
    with pagetide.Client(router=fleet.router.grpc) as healthy, pagetide.Client(
            router=fleet.router.grpc, retry=QUICK, timeout=0.5) as client:
        model = healthy.register_model(spec())
        opened = healthy.open(model, tokens_of(20, 2))
        sequence = pagetide.Sequence(client, client.connect_worker(opened.worker.address), model,
                                     opened.state)
        worker = fleet.workers[int(sequence.worker_id[1:])]
        worker.pause()
        began = time.monotonic()
        with pytest.raises((pagetide.DeadlineExceeded, pagetide.Unavailable)):
            sequence.refresh()
        assert time.monotonic() - began < 60, "it waited for the worker, not for its deadline"
        worker.resume()
        with healthy.open(model, tokens_of(20, 3)) as again:
            assert again.length == 0


class MovingWorker:
    """Answers GetSequence with SEQUENCE_MOVED: what a worker says after it handed a sequence over. The
    only fake here: it stands for the old owner; the new owner is real."""

    def __init__(self, points_at: str = "") -> None:
        self.calls = 0
        self.points_at = points_at

        def moved(request: Any, context: grpc.ServicerContext) -> Any:
            self.calls += 1
            info = rpc_status_pb2.ErrorInfo(
                reason="SEQUENCE_MOVED", domain="pagetide", metadata={"address": self.points_at})
            status = rpc_status_pb2.Status(code=9, message="moved")
            detail = status.details.add(type_url="type.googleapis.com/google.rpc.ErrorInfo")
            detail.value = info.SerializeToString()
            context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "moved")

        handler = grpc.method_handlers_generic_handler("pagetide.v1.SequenceService", {
            "GetSequence": grpc.unary_unary_rpc_method_handler(
                moved, sequence_pb2.GetSequenceRequest.FromString,
                sequence_pb2.GetSequenceResponse.SerializeToString)
        })
        self._server = grpc.server(futures.ThreadPoolExecutor(2))
        self._server.add_generic_rpc_handlers((handler,))
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def stop(self) -> None:
        self._server.stop(0).wait()


def test_a_moved_sequence_is_followed(fleet: Fleet) -> None:
    with pagetide.Client(router=fleet.router.grpc) as client:
        model = client.register_model(spec())
        sequence = client.open(model, tokens_of(20, 4))
        append_all(sequence, tokens_of(20, 4))
        owner = sequence.worker.address
        moving = MovingWorker(owner)
        sequence.worker = client.connect_worker(moving.address)
        sequence.state.length = 0
        sequence.refresh()
        assert (sequence.length, sequence.worker.address, moving.calls) == (20, owner, 1)

        async def scene() -> None:
            async with aio.Client(worker=moving.address) as other:
                state = types_pb2.SequenceState(sequence_id=sequence.id)
                same = aio.Sequence(other, other.connect_worker(moving.address), model, state)
                await same.refresh()
                assert (same.length, same.worker.address) == (20, owner)

        asyncio.run(scene())
        assert moving.calls == 2
        # Two that send each other in circles end with the error, not in a loop.
        other_moving = MovingWorker(points_at=moving.address)
        moving.points_at = other_moving.address
        moving.calls = 0
        sequence.worker = client.connect_worker(moving.address)
        with pytest.raises(pagetide.SequenceMoved):
            sequence.refresh()
        assert moving.calls + other_moving.calls == 4
        moving.stop()
        other_moving.stop()


def test_retries_only_unavailable_within_the_deadline() -> None:
    now = [0.0]

    def loop(timeout: float = 100.0) -> RetryLoop:
        return RetryLoop(pagetide.RetryPolicy(jitter=0), timeout, lambda: now[0], lambda a, b: b)

    unavailable = pagetide.Unavailable("gone")
    retry = loop()
    pauses = [retry.next_pause(unavailable) for _ in range(6)]
    assert pauses == [0.05, 0.1, 0.2, 0.4, 0.8, None]
    assert loop().next_pause(pagetide.Aborted("raced")) is None
    assert loop().next_pause(pagetide.ResourceExhausted("full", retry_delay=1)) is None
    assert loop().next_pause(pagetide.Unavailable("wait", retry_delay=3)) == 3
    assert loop(timeout=0.04).next_pause(unavailable) is None


def test_unreachable_router_says_so(tmp_path: pathlib.Path) -> None:
    with pagetide.Client(router=f"unix:{tmp_path}/nobody", retry=QUICK, timeout=2) as client:
        with pytest.raises(pagetide.Unavailable):
            client.list_models()
