"""Engines with KV pools of their own, against a real store, router and worker: two layouts, bad input, and engines
and workers that die in the middle."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import importlib.util
import os
import pathlib
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any, Callable, Iterator

import numpy as np
import pytest
from client_test import LAYERS, PAGE, block_of, spec, tokens_of
from fleet import Fleet

import pagetide
from pagetide import aio
from pagetide.v1 import engine_pool_pb2, local_plane_pb2, model_pb2, sequence_pb2

HERE = pathlib.Path(__file__).resolve().parent
EXAMPLES = HERE.parents[2] / "clients/python/examples"
# Of the model of client_test: 16 tokens x 3 layers x 2 heads x (32 + 16) elements of f16.
PAGE_BYTES = 9216
FRAMES = 16
LAYOUTS = [
    pagetide.EngineLayout(block_tokens=8, num_blocks=64, heads="NHD"),
    pagetide.EngineLayout(block_tokens=24, num_blocks=16, heads="HND", block_major=True, offset=64),
]


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with tempfile.TemporaryDirectory(prefix="pt-py-") as folder:
        fleet = Fleet(pathlib.Path(folder), workers=1, pool="64MiB",
                      model_pool=str(FRAMES * PAGE_BYTES))
        yield fleet
        fleet.close()


@pytest.fixture
def model(fleet: Fleet) -> pagetide.Model:
    with pagetide.Client(router=fleet.router.grpc) as client:
        return client.register_model(spec("py-engine"))


def connect(fleet: Fleet) -> pagetide.Client:
    return pagetide.Client(worker=fleet.workers[-1].grpc, timeout=120,
                           worker_local_socket=str(fleet.folder / "w0.sock"))


@pytest.fixture
def client(fleet: Fleet) -> Iterator[pagetide.Client]:
    with connect(fleet) as client:
        yield client


class Engine:
    """A pool and what it should hold."""

    def __init__(self, client: pagetide.Client, model: pagetide.Model, name: str,
                 layout: pagetide.EngineLayout = LAYOUTS[0]) -> None:
        self.model, self.layout, self.name = model, layout, name
        self.memory = pagetide.EngineMemory(layout.num_bytes(model))
        self.memory.bytes[:] = 0xA5
        self.expected = self.memory.bytes.copy()
        self.free = list(range(layout.num_blocks - 1, 0, -1))
        self.pool = client.register_engine_pool(model, self.memory, layout, name)

    def blocks_for(self, num_tokens: int) -> list[int]:
        return [self.free.pop() for _ in range(-(-num_tokens // self.layout.block_tokens))]

    def expect(self, tokens: np.ndarray, blocks: list[int], begin: int, end: int) -> None:
        """The rows of tokens [begin, end) are in their blocks."""
        shadow = pagetide.EngineMemory(self.memory.num_bytes)
        shadow.bytes[:] = self.expected
        at = np.arange(begin, end)
        where = (np.asarray(blocks)[at // self.layout.block_tokens], at % self.layout.block_tokens)
        rows, group = block_of(self.model, tokens, begin, end), self.model.groups[0]
        for layer in range(LAYERS):
            for kind in pagetide.RowKind:
                size = (end - begin) * group.row_bytes(kind)
                first = group.offset(layer, kind, end - begin)
                view = self.layout.rows(self.model, shadow, 0, layer, kind)
                view[where] = rows[first:first + size].reshape(end - begin, 2, -1)
        self.expected = shadow.bytes.copy()
        shadow.close()

    def compute(self, tokens: np.ndarray, blocks: list[int]) -> None:
        self.expect(tokens, blocks, 0, len(tokens))
        self.memory.bytes[:] = self.expected

    def is_as_expected(self) -> bool:
        return bool(np.array_equal(self.memory.bytes, self.expected))

    def close(self) -> None:
        self.pool.close()
        self.memory.close()


def eventually(condition: Callable[[], bool]) -> bool:
    """Only a failing test ever waits so long."""
    deadline = time.monotonic() + 90
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def stat(client: pagetide.Client, name: str) -> float:
    values = client.connect_worker(client._worker_address).stats()
    return sum(v for key, v in values.items() if key == name or key.startswith(name + "{"))


class AllFrames:
    """Every frame of the model's pool is promised to a reservation while this lasts: what needs one waits."""

    def __init__(self, client: pagetide.Client, model: pagetide.Model,
                 num_tokens: int = FRAMES * PAGE) -> None:
        self._client = client
        self._sequence = client.open(model, [], no_reuse=True)
        request = sequence_pb2.ReserveSlotsRequest(items=[sequence_pb2.ReserveSlotsRequest.Item(
            sequence=self._sequence.ref(), num_tokens=num_tokens)])
        request.lease.seconds = 300
        self._sequence.worker.sequences.ReserveSlots(request, timeout=60)

    def __enter__(self) -> "AllFrames":
        return self

    def __exit__(self, *_: Any) -> None:
        self._sequence.close()


def code_of(error: pytest.ExceptionInfo[Any]) -> str:
    return str(error.value.reason)


def test_what_one_engine_stores_another_of_another_layout_loads(
        client: pagetide.Client, model: pagetide.Model) -> None:
    tokens = tokens_of(10 * PAGE + 5, 1)
    first, second = (Engine(client, model, f"scene-{i}", LAYOUTS[i]) for i in range(2))
    blocks = first.blocks_for(len(tokens))
    first.compute(tokens, blocks)
    job = first.pool.store_pages(tokens, blocks)
    assert job.wait() == 10 * PAGE
    assert (job.state.moved_pages, job.state.known_pages) == (10, 0)
    assert job.state.moved_bytes == 10 * PAGE_BYTES

    wanted = second.blocks_for(len(tokens))
    loaded = second.pool.load_pages(tokens, wanted)
    assert loaded.wait() == 10 * PAGE
    assert loaded.state.reuse.reused_tokens == 10 * PAGE and loaded.state.reuse.explanation
    second.expect(tokens, wanted, 0, 10 * PAGE)
    assert second.is_as_expected() and first.is_as_expected()

    # What is known is not copied again; a prompt's last token is left to compute.
    again = first.pool.store_pages(tokens, blocks)
    assert again.wait() == 10 * PAGE
    assert (again.state.moved_pages, again.state.known_pages) == (0, 10)
    part = second.pool.load_pages(tokens[:3 * PAGE], second.blocks_for(3 * PAGE))
    assert part.wait() == 3 * PAGE - 1

    # An ordinary client finds the pages, and an engine the rows of an open sequence. It reads by RPC: a lease
    # of frames would outlive this test.
    with pagetide.Client(worker=client._worker_address, timeout=120) as plain, \
            plain.open(model, tokens) as sequence:
        assert sequence.wait_ready() == 10 * PAGE
        assert np.array_equal(sequence.read_block(0, 0, 10 * PAGE), block_of(model, tokens, 0, 10 * PAGE))
        rows = first.blocks_for(10 * PAGE)
        assert first.pool.load_sequence(sequence, rows).wait() == 10 * PAGE
        first.expect(tokens, rows, 0, 10 * PAGE)
        assert first.is_as_expected()
    for engine in (first, second):
        engine.close()
    assert eventually(lambda: stat(client, "pagetide_engine_pools") == 0)
    assert stat(client, "pagetide_engine_stored_pages_total") >= 10
    assert stat(client, "pagetide_engine_loaded_bytes_total") >= 20 * PAGE_BYTES


def test_bad_registrations_are_refused(client: pagetide.Client, model: pagetide.Model) -> None:
    layout = LAYOUTS[0]
    memory = pagetide.EngineMemory(layout.num_bytes(model))
    worker = client.connect_worker(client._worker_address, client._worker_local_socket)
    plane = worker.hand_over(memory)

    def refused(error: type[pagetide.PageTideError], match: str,
                spoil: Callable[[engine_pool_pb2.RegisterEnginePoolRequest], Any]) -> None:
        request = engine_pool_pb2.RegisterEnginePoolRequest(
            name="bad", model_digest=model.digest, local_client_id=plane.client_id,
            block_tokens=layout.block_tokens, num_blocks=layout.num_blocks, groups=layout.groups(model))
        spoil(request)
        with pytest.raises(error, match=match):
            pagetide.sync.calls.unary(worker.options, worker.engine_pools.RegisterEnginePool, request)

    bad = pagetide.InvalidArgument
    refused(bad, "name", lambda r: setattr(r, "name", "Bad Name"))
    refused(bad, "block_tokens is 0", lambda r: setattr(r, "block_tokens", 0))
    refused(bad, "num_blocks is 1", lambda r: setattr(r, "num_blocks", 1))
    refused(bad, "leaves memory 0", lambda r: setattr(r, "num_blocks", layout.num_blocks + 1))
    refused(bad, "leaves memory 0", lambda r: setattr(r, "num_blocks", 0xFFFFFFFF))
    refused(bad, "leaves memory 0", lambda r: setattr(r.groups[0].layers[0].k, "offset", 2**64 - 1))
    refused(bad, "leaves memory 0", lambda r: setattr(r.groups[0].layers[2].v, "block_stride", 2**63))
    refused(bad, r"layers\[1\].k.memory is 1", lambda r: setattr(r.groups[0].layers[1].k, "memory", 1))
    refused(bad, "head_stride is 1", lambda r: setattr(r.groups[0].layers[0].k, "head_stride", 1))
    refused(bad, "layout is 0", lambda r: setattr(r.groups[0], "layout", 0))
    refused(bad, "the model's are", lambda r: setattr(r.groups[0], "k_type", model_pb2.DATA_TYPE_F32))
    refused(bad, "data type", lambda r: setattr(r.groups[0], "k_type", 77))
    refused(bad, "kv_heads is 3", lambda r: setattr(r.groups[0], "kv_heads", 3))
    refused(bad, "groups has 0", lambda r: r.ClearField("groups"))
    refused(bad, "k is absent", lambda r: r.groups[0].layers[0].ClearField("k"))
    refused(bad, "v is absent", lambda r: r.groups[0].layers[0].ClearField("v"))
    refused(pagetide.NotFound, "not connected", lambda r: setattr(r, "local_client_id", 1))
    refused(pagetide.NotFound, "", lambda r: setattr(r, "model_digest", "ab" * 32))
    assert stat(client, "pagetide_engine_pools") == 0
    plane.close()
    memory.close()


def test_bad_slot_maps_are_refused_and_nothing_is_written(
        client: pagetide.Client, model: pagetide.Model) -> None:
    engine = Engine(client, model, "maps")
    tokens = tokens_of(2 * PAGE, 2)
    for call in (engine.pool.load_pages, engine.pool.store_pages):
        for blocks, match in (([1, 2, 0, 3], r"blocks\[2\] is 0"), ([1, 2, 3, 64], "is 64, must be 1 to 63"),
                              ([1, 2, 2, 3], "block 2 twice"), ([1, 2, 3], "need 4"),
                              ([1, 2, 3, 4, 5], "need 4"), ([], "need 4")):
            with pytest.raises(pagetide.InvalidArgument, match=match):
                call(tokens, blocks)
        with pytest.raises(pagetide.InvalidArgument, match="first_token is 33"):
            call(tokens, [1], first_token=33)
        with pytest.raises(pagetide.InvalidArgument, match="slot_maps has 2"):
            call(tokens, [engine_pool_pb2.SlotMap(blocks=[1, 2, 3, 4])] * 2)
        with pytest.raises(pagetide.InvalidArgument, match="tokens is empty"):
            call([], [])
        with pytest.raises(pagetide.InvalidArgument, match="time_limit"):
            call(tokens, [1, 2, 3, 4], time_limit=601)
        failed = call([5000] * PAGE, [1, 2])  # not in the vocabulary: the job says so
        with pytest.raises(pagetide.InvalidArgument, match="token"):
            failed.wait()
    with pytest.raises(pagetide.NotFound) as gone:
        pagetide.EngineJob(engine.pool.worker, engine_pool_pb2.EngineJob(job_id="none")).refresh()
    assert code_of(gone) == "ENGINE_JOB_NOT_FOUND"
    assert engine.is_as_expected()
    assert client.lookup(model, tokens, allow_full_reuse=True).reused_tokens == 0
    engine.close()
    with pytest.raises(pagetide.NotFound) as closed:
        engine.pool.load_pages(tokens, [1, 2, 3, 4])
    assert code_of(closed) == "ENGINE_POOL_NOT_FOUND"


def hello(path: str, message: local_plane_pb2.LocalHello, fds: list[int]) -> str:
    """The refusal of a hello; empty when it was taken."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(60)
        sock.connect(path)
        message.version = 1
        socket.send_fds(sock, [struct.pack("<I", message.ByteSize()) + message.SerializeToString()], fds)
        answer = sock.recv(4096)
        return local_plane_pb2.LocalWelcome.FromString(answer[4:]).error if answer else "hung up"


def test_memory_that_could_shrink_or_is_not_ours_to_take_is_refused(
        fleet: Fleet, client: pagetide.Client) -> None:
    path = str(fleet.folder / "w0.sock")
    memory = pagetide.EngineMemory(8192)
    memfd = local_plane_pb2.LocalMemory.KIND_MEMFD

    def with_memory(fds: list[int], size: int = 8192, kind: int = memfd, count: int = 1) -> str:
        message = local_plane_pb2.LocalHello()
        for _ in range(count):
            message.memories.add(kind=kind, size_bytes=size)
        return hello(path, message, fds)

    assert with_memory([memory.fd]) == ""
    unsealed = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, 8192)
    assert "F_SEAL_SHRINK" in with_memory([unsealed])
    assert "must be 1 to the 8192" in with_memory([memory.fd], size=8193)
    assert "may hand over" in with_memory([memory.fd], size=2**63)
    with open("/dev/zero", "r+b", buffering=0) as device, tempfile.TemporaryFile() as file:
        assert "memfd" in with_memory([device.fileno()])
        file.truncate(8192)
        assert "memory" in with_memory([file.fileno()])
    assert "0 descriptors came" in with_memory([])
    assert "2 descriptors came" in with_memory([memory.fd, memory.fd])
    assert "at most 32" in with_memory([memory.fd], count=33)
    assert with_memory([memory.fd] * 33, count=33) == "hung up"
    for kind in (local_plane_pb2.LocalMemory.KIND_CUDA_VMM, local_plane_pb2.LocalMemory.KIND_CUDA_IPC):
        assert "this worker's device is cpu" in with_memory([memory.fd], kind=kind)
    assert "KIND_MEMFD only" in with_memory([memory.fd], kind=0)
    os.close(unsealed)
    memory.close()
    assert stat(client, "pagetide_engine_pools") == 0  # and the worker is there to say so


def test_memory_with_holes_is_refused_with_numbers_and_ours_has_none(
        client: pagetide.Client, model: pagetide.Model) -> None:
    layout = LAYOUTS[0]
    size = layout.num_bytes(model)
    memory = pagetide.EngineMemory(size)
    assert os.fstat(memory.fd).st_blocks * 512 >= size
    # A hole that is made afterwards: its pages are no longer there.
    fallocate = ctypes.CDLL(None, use_errno=True).fallocate
    fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    assert fallocate(memory.fd, 1 | 2, 8192, 4096) == 0  # KEEP_SIZE, PUNCH_HOLE
    with pytest.raises(pagetide.InvalidArgument, match=rf"hole at or behind byte \d+: \d+ of its {size} bytes"):
        client.register_engine_pool(model, memory, layout, "holes")
    os.posix_fallocate(memory.fd, 0, size)
    client.register_engine_pool(model, memory, layout, "holes").close()
    memory.close()


def test_a_registration_of_the_same_name_stops_the_jobs_of_the_one_before(
        client: pagetide.Client, model: pagetide.Model) -> None:
    tokens = tokens_of(4 * PAGE, 3)
    before = Engine(client, model, "again")
    blocks = before.blocks_for(len(tokens))
    before.compute(tokens, blocks)
    before.pool.store_pages(tokens, blocks).wait()
    wanted = before.blocks_for(len(tokens))
    with AllFrames(client, model):
        blocked = before.pool.load_pages(tokens, wanted, time_limit=600)
        assert eventually(lambda: stat(client, "pagetide_engine_jobs") == 1)
        after = Engine(client, model, "again", LAYOUTS[1])
        with pytest.raises(pagetide.Cancelled, match="registered again"):
            blocked.wait()
    assert after.pool.ref.generation > before.pool.ref.generation
    with pytest.raises(pagetide.FailedPrecondition) as stale:
        before.pool.load_pages(tokens, wanted)
    assert code_of(stale) == "STALE_GENERATION"
    assert before.is_as_expected()
    # Of the new one all is well, and closing the old one does not end it.
    with pytest.raises(pagetide.FailedPrecondition):
        before.close()
    again = after.blocks_for(len(tokens))
    assert after.pool.load_pages(tokens, again, allow_full_reuse=True).wait() == len(tokens)
    after.expect(tokens, again, 0, len(tokens))
    assert after.is_as_expected()
    after.close()


def test_jobs_are_cancelled_and_blocks_have_one_writer(
        client: pagetide.Client, model: pagetide.Model) -> None:
    tokens = tokens_of(4 * PAGE, 4)
    engine = Engine(client, model, "busy")
    blocks = engine.blocks_for(len(tokens))
    engine.compute(tokens, blocks)
    with AllFrames(client, model):
        store = engine.pool.store_pages(tokens, blocks, time_limit=600)
        with pytest.raises(pagetide.FailedPrecondition, match="read by a store") as busy:
            engine.pool.load_pages(tokens, blocks)
        assert code_of(busy) == "BLOCK_BUSY"
        # The sequence that it works on is nobody else's to see: there is the one that holds the frames.
        assert eventually(lambda: stat(client, "pagetide_worker_open_sequences") == 2)
        listed = engine.pool.worker.sequences.ListWorkerSequences(
            sequence_pb2.ListWorkerSequencesRequest(page_size=100), timeout=60)
        assert len(listed.sequences) == 1
        store.cancel()
        assert store.state.state == engine_pool_pb2.EngineJob.STATE_CANCELLED
        store.cancel()
        with pytest.raises(pagetide.Cancelled):
            store.wait()
    assert client.lookup(model, tokens, allow_full_reuse=True).reused_tokens == 0
    assert engine.pool.store_pages(tokens, blocks).wait() == len(tokens)
    engine.close()


def test_an_engine_killed_in_the_middle_of_a_load_leaves_nothing_behind(
        fleet: Fleet, client: pagetide.Client, model: pagetide.Model) -> None:
    tokens = tokens_of(6 * PAGE, 5)
    engine = Engine(client, model, "survivor")
    blocks = engine.blocks_for(len(tokens))
    engine.compute(tokens, blocks)
    assert engine.pool.store_pages(tokens, blocks).wait() == len(tokens)
    proto = model_pb2.Model(model_digest=model.digest, spec=model.spec)
    with AllFrames(client, model):
        child = subprocess.Popen(
            [sys.executable, str(HERE / "engine_child.py"), fleet.workers[-1].grpc,
             str(fleet.folder / "w0.sock"), "victim", "load", proto.SerializeToString().hex(),
             ",".join(str(t) for t in tokens)], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        begun = child.stdout.readline().split()
        assert begun[0] == "begun", begun
        assert stat(client, "pagetide_engine_pools") == 2
        assert stat(client, "pagetide_engine_jobs") == 1
        child.kill()
        child.wait()
        assert eventually(lambda: stat(client, "pagetide_engine_pools") == 1)
        assert eventually(lambda: stat(client, "pagetide_engine_jobs") == 0)
        job = pagetide.EngineJob(engine.pool.worker, engine_pool_pb2.EngineJob(job_id=begun[1]))
        with pytest.raises(pagetide.Cancelled, match="engine left"):
            job.wait()
    wanted = engine.blocks_for(len(tokens))
    assert engine.pool.load_pages(tokens, wanted, allow_full_reuse=True).wait() == len(tokens)
    engine.expect(tokens, wanted, 0, len(tokens))
    assert engine.is_as_expected()
    engine.close()


def test_a_worker_that_drains_ends_the_jobs_and_tells_who_waits_for_them(
        fleet: Fleet, model: pagetide.Model) -> None:
    tokens = tokens_of(4 * PAGE, 8)
    with connect(fleet) as client:
        engine = Engine(client, model, "drained")
        blocks = engine.blocks_for(len(tokens))
        engine.compute(tokens, blocks)
        assert engine.pool.store_pages(tokens, blocks).wait() == len(tokens)
        holds_all = AllFrames(client, model)
        wanted = engine.blocks_for(len(tokens))
        blocked = engine.pool.load_pages(tokens, wanted, time_limit=600)
        assert eventually(lambda: stat(client, "pagetide_engine_jobs") == 1)
        # It would wait for minutes, and so would who watches it.
        ended: list[pagetide.PageTideError] = []

        def wait() -> None:
            with pytest.raises(pagetide.Cancelled) as error:
                blocked.wait()
            ended.append(error.value)

        waiter = threading.Thread(target=wait)
        waiter.start()
        running = engine_pool_pb2.EngineJob.STATE_RUNNING
        assert eventually(lambda: blocked.state.state == running)  # as the watch tells it
        begun = time.monotonic()
        assert fleet.workers[-1].terminate() == 0
        waiter.join()
        assert time.monotonic() - begun < 25  # a drain waits 30 s for calls that do not end
        assert ended[0].reason == "DRAINING" and blocked.usable_tokens == 0
        assert engine.is_as_expected()
        with contextlib.suppress(pagetide.PageTideError):
            holds_all.__exit__()
    fleet.workers.append(fleet.start_worker("w0"))


def test_a_worker_killed_in_the_middle_of_a_store_leaves_whole_pages_only(
        fleet: Fleet, model: pagetide.Model) -> None:
    tokens = tokens_of(12 * PAGE, 6)
    with connect(fleet) as client:
        engine = Engine(client, model, "stored")
        blocks = engine.blocks_for(len(tokens))
        engine.compute(tokens, blocks)
        job = engine.pool.store_pages(tokens, blocks)
        # At the first page that is there, or at any time behind it.
        def has_begun() -> bool:
            job.refresh()
            return job.usable_tokens > 0

        assert eventually(has_begun)
        fleet.workers[-1].kill()
        assert eventually(lambda: not engine.pool.is_alive())
        assert engine.is_as_expected()
    fleet.workers.append(fleet.start_worker("w0"))
    with connect(fleet) as client:
        for layout in LAYOUTS:
            reborn = Engine(client, model, "stored", layout)
            wanted = reborn.blocks_for(len(tokens))
            usable = reborn.pool.load_pages(tokens, wanted, allow_full_reuse=True).wait()
            assert usable % PAGE == 0
            if usable > 0:
                reborn.expect(tokens, wanted, 0, usable)
            assert reborn.is_as_expected()
            # All of it again: what was there is known, the rest is copied.
            reborn.compute(tokens, wanted)
            again = reborn.pool.store_pages(tokens, wanted)
            assert again.wait() == len(tokens)
            assert again.state.known_pages == usable // PAGE
            assert again.state.moved_pages == 12 - usable // PAGE
            reborn.close()


def test_asyncio(fleet: Fleet, model: pagetide.Model) -> None:
    async def scene() -> None:
        tokens = tokens_of(3 * PAGE, 7)
        layout = LAYOUTS[0]
        memory = pagetide.EngineMemory(layout.num_bytes(model))
        async with aio.Client(worker=fleet.workers[-1].grpc,
                              worker_local_socket=str(fleet.folder / "w0.sock")) as client:
            async with await client.register_engine_pool(model, memory, layout, "tasks") as pool:
                stored = await pool.store_pages(tokens, [1, 2, 3, 4, 5, 6])
                assert await stored.wait() == 3 * PAGE
                loaded = await pool.load_pages(tokens, [7, 8, 9, 10, 11, 12], allow_full_reuse=True)
                assert await loaded.wait() == 3 * PAGE
                await loaded.cancel()  # too late, and fine
                assert loaded.state.state == engine_pool_pb2.EngineJob.STATE_DONE
        memory.close()

    asyncio.run(scene())


def example() -> Any:
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("engine_pool", EXAMPLES / "engine_pool.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_cancels_its_job_when_waiting_for_it_fails(
        fleet: Fleet, client: pagetide.Client, capsys: pytest.CaptureFixture[str]) -> None:
    module = example()
    prompt = np.arange(200)
    with pagetide.Client(router=fleet.router.grpc) as routed:
        model = routed.register_model(module.model_spec())
    first = module.Engine(client, model, "ok", pagetide.EngineLayout(block_tokens=16, num_blocks=64))
    first.run(prompt)
    first.close()
    frames = FRAMES * PAGE_BYTES // model.groups[0].page_bytes
    with AllFrames(client, model, frames * model.page_tokens), \
            pagetide.Client(worker=fleet.workers[-1].grpc, timeout=2,
                            worker_local_socket=str(fleet.folder / "w0.sock")) as hasty:
        engine = module.Engine(hasty, model, "hasty", pagetide.EngineLayout(block_tokens=16, num_blocks=64))
        jobs = []
        submit = engine.pool.load_pages

        def load_pages(*arguments: Any) -> pagetide.EngineJob:
            jobs.append(submit(*arguments))
            return jobs[-1]

        engine.pool.load_pages = load_pages
        prefill = engine.prefill

        def prefill_when_the_load_is_over(*arguments: Any) -> None:
            jobs[0].refresh()
            assert jobs[0].state.state == engine_pool_pb2.EngineJob.STATE_CANCELLED
            prefill(*arguments)

        engine.prefill = prefill_when_the_load_is_over
        engine.run(prompt)
        assert "hasty: the load ended early" in capsys.readouterr().out
        assert stat(client, "pagetide_engine_jobs") == 0
        # Anything else that goes wrong passes on, and stops the job as well.
        job = submit(prompt, engine.free[:13])
        job.wait = lambda: 1 // 0
        with pytest.raises(ZeroDivisionError):
            engine.finish("load", job)
        assert job.state.state == engine_pool_pb2.EngineJob.STATE_CANCELLED
        engine.close()


def test_the_example_loads_what_the_first_engine_stored(fleet: Fleet) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "engine_pool.py"),
         f"--router={fleet.router.grpc}"], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "first: 0 of 250 tokens loaded, 250 computed, 0 wrong bytes" in done.stdout
    assert "first: 224 tokens are known now: 7 pages copied" in done.stdout
    assert "second: 200 of 270 tokens loaded, 70 computed, 0 wrong bytes" in done.stdout, done.stdout
