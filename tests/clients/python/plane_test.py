"""What a client makes of a worker's pool by its kind: what it does not understand it does not map. Welcomes are
written here, as workers with and without a GPU, and of before the kinds, send them."""

from __future__ import annotations

import gc
import os
import socket
import struct
import threading
from typing import Any, Iterator

import pytest

import pagetide
from pagetide.local_plane import LocalPlane
from pagetide.v1 import local_plane_pb2

VMM = local_plane_pb2.LocalMemory.KIND_CUDA_VMM
IPC = local_plane_pb2.LocalMemory.KIND_CUDA_IPC
MEMFD = local_plane_pb2.LocalMemory.KIND_MEMFD
UUID = bytes(range(16))


class Worker:
    """Answers one hello with a staging buffer, the pool given, and descriptors behind the staging's."""

    def __init__(self, path: str, pool: dict[str, Any], fds: list[int]) -> None:
        self.path = path
        self.hello = local_plane_pb2.LocalHello()
        self._welcome = local_plane_pb2.LocalWelcome(client_id=7, staging_bytes=4096)
        self._welcome.pools.add(**pool)
        self._fds = fds
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen(1)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        client, _ = self._listener.accept()
        (length,) = struct.unpack("<I", client.recv(4, socket.MSG_WAITALL))
        self.hello.ParseFromString(client.recv(length, socket.MSG_WAITALL))
        body = self._welcome.SerializeToString()
        socket.send_fds(client, [struct.pack("<I", len(body)) + body], self._fds)
        client.recv(1)  # until the client leaves
        client.close()

    def close(self) -> None:
        self._thread.join(60)
        self._listener.close()


@pytest.fixture(name="memory")
def a_memory() -> Iterator[pagetide.EngineMemory]:
    memory = pagetide.EngineMemory(8192)
    memory.bytes[:] = 9
    yield memory
    memory.close()


def connect(tmp_path: Any, pool: dict[str, Any], fds: list[int], takes: bool) -> tuple[LocalPlane, Worker]:
    worker = Worker(str(tmp_path / f"{os.urandom(4).hex()}.sock"), pool, fds)
    try:
        return LocalPlane.connect(worker.path, 4096, 60, "digest", takes_device_pool=takes), worker
    finally:
        threading.Thread(target=worker.close).start()


@pytest.mark.parametrize("kind", [0, MEMFD])
@pytest.mark.parametrize("takes", [False, True])
def test_host_memory_is_mapped_read_only_by_whatever_worker(tmp_path: Any, memory: Any, kind: int,
                                                            takes: bool) -> None:
    pool = {"size_bytes": 8192, "has_fd": True, "kind": kind}
    plane, worker = connect(tmp_path, pool, [memory.fd, memory.fd], takes)
    assert plane.has_pool and plane.device_pool is None
    assert list(plane.frames(8000, 3)) == [9, 9, 9]
    assert not plane.frames(0, 1).flags.writeable
    assert list(worker.hello.pool_kinds) == ([VMM, IPC] if takes else [])
    plane.close()


def test_a_gpus_memory_that_was_not_asked_for_is_not_mapped(tmp_path: Any, memory: Any) -> None:
    pool = {"size_bytes": 8192, "kind": VMM, "why_not": "the frames lie in a GPU"}
    plane, _ = connect(tmp_path, pool, [memory.fd], False)
    assert not plane.has_pool and plane.device_pool is None
    assert plane.why_no_pool == "the frames lie in a GPU"
    with pytest.raises(ValueError, match="no pool"):
        plane.frames(0, 1)
    plane.close()


def test_a_descriptor_of_a_gpu_is_given_to_the_caller_and_not_mapped(tmp_path: Any, memory: Any) -> None:
    pool = {"size_bytes": 5000, "kind": VMM, "has_device_fd": True, "mapped_bytes": 8192, "device_uuid": UUID}
    plane, _ = connect(tmp_path, pool, [memory.fd, memory.fd], True)
    assert not plane.has_pool
    taken = plane.device_pool
    assert taken is not None and taken.kind == "KIND_CUDA_VMM"
    assert (taken.size_bytes, taken.mapped_bytes, taken.device_uuid) == (5000, 8192, UUID)
    assert os.path.sameopenfile(taken.fd, memory.fd)
    fd = taken.fd
    plane.close()
    with pytest.raises(OSError):
        os.fstat(fd)
    plane.close()  # once more


def test_a_pool_of_a_gpu_that_is_dropped_lets_go_of_its_memory(tmp_path: Any, memory: Any) -> None:
    pool = {"size_bytes": 5000, "kind": VMM, "has_device_fd": True, "mapped_bytes": 8192, "device_uuid": UUID}
    plane, _ = connect(tmp_path, pool, [memory.fd, memory.fd], True)
    assert plane.device_pool is not None
    fd = plane.device_pool.fd
    os.fstat(fd)
    plane.device_pool = None
    gc.collect()
    with pytest.raises(OSError):
        os.fstat(fd)
    plane.close()


def test_a_handle_of_a_gpu_is_given_to_the_caller(tmp_path: Any, memory: Any) -> None:
    pool = {"size_bytes": 5000, "kind": IPC, "ipc_handle": bytes(64), "mapped_bytes": 8192, "device_uuid": UUID}
    plane, _ = connect(tmp_path, pool, [memory.fd], True)
    assert plane.device_pool is not None
    assert (plane.device_pool.kind, plane.device_pool.fd) == ("KIND_CUDA_IPC", -1)
    assert plane.device_pool.ipc_handle == bytes(64)
    plane.close()


@pytest.mark.parametrize("pool,with_fd", [
    ({"kind": VMM, "has_device_fd": True, "size_bytes": 5000, "mapped_bytes": 8192}, False),
    ({"kind": VMM, "has_device_fd": True, "size_bytes": 5000, "mapped_bytes": 4096}, True),
    ({"kind": VMM, "has_device_fd": True, "size_bytes": 0, "mapped_bytes": 4096}, True),
    ({"kind": IPC, "has_device_fd": True, "size_bytes": 5000, "mapped_bytes": 8192}, True),
    ({"kind": IPC, "ipc_handle": bytes(63), "size_bytes": 5000, "mapped_bytes": 8192}, False),
])
def test_a_welcome_that_cannot_be_is_refused(tmp_path: Any, memory: Any, pool: dict[str, Any],
                                             with_fd: bool) -> None:
    open_before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(pagetide.Unavailable, match="without what it is"):
        connect(tmp_path, pool, [memory.fd] * (2 if with_fd else 1), True)
    deadline = 200
    while len(os.listdir("/proc/self/fd")) > open_before and deadline > 0:
        deadline -= 1
        threading.Event().wait(0.05)  # the other side of the connection is this process too
    assert len(os.listdir("/proc/self/fd")) <= open_before


def test_a_gpu_whose_frames_are_not_exported_says_why(tmp_path: Any, memory: Any) -> None:
    plane, _ = connect(tmp_path, {"size_bytes": 5000, "why_not": "not told to"}, [memory.fd], True)
    assert not plane.has_pool and plane.device_pool is None and plane.why_no_pool == "not told to"
    plane.close()
