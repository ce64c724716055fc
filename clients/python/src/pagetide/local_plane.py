"""Memory shared with a worker on the same host (proto/pagetide/v1/local_plane.proto).

The worker hands over, by SCM_RIGHTS, a staging buffer that rows are written to and, for one model, its
pool of frames: host memory, mapped here read-only, or, to who asks for it, a GPU's, which is the caller's
to map. The connection is this client's life to the worker: when it ends, the
worker drops what was reserved in the staging buffer.
"""

from __future__ import annotations

import dataclasses
import fcntl
import mmap
import os
import select
import socket
import struct
import time
import weakref
from typing import Optional, Sequence as Seq

import numpy as np
import numpy.typing as npt

from pagetide.engine_memory import EngineMemory
from pagetide.errors import DeadlineExceeded, FailedPrecondition, Unavailable
from pagetide.v1 import local_plane_pb2

_VERSION = 1
_MAX_WELCOME_BYTES = 64 << 10
_MAX_DESCRIPTORS = 16
_F_GET_SEALS, _F_SEAL_SHRINK = 1034, 2  # linux/fcntl.h; Python names them from 3.12 on
_KINDS = local_plane_pb2.LocalMemory
_DEVICE_KINDS = (_KINDS.KIND_CUDA_VMM, _KINDS.KIND_CUDA_IPC)
Bytes = npt.NDArray[np.uint8]
_open_planes: "weakref.WeakSet[LocalPlane]" = weakref.WeakSet()


@dataclasses.dataclass
class DevicePool:
    """A worker's frames in the memory of a GPU: what the caller's CUDA library maps them by. Only to be read, and
    only under a lease: nothing but its own care keeps this process from writing into them.

    kind: "KIND_CUDA_VMM": `fd` is for cuMemImportFromShareableHandle, `mapped_bytes` is the size to map.
    "KIND_CUDA_IPC": `ipc_handle`, 64 bytes, is for cuIpcOpenMemHandle, and is to be closed before the plane.
    size_bytes: of the pool, at the beginning of the memory. device_uuid: 16 bytes, of the GPU.
    """

    kind: str
    size_bytes: int
    mapped_bytes: int
    device_uuid: bytes
    fd: int = -1
    ipc_handle: bytes = b""

    def __post_init__(self) -> None:
        # One that is dropped must not keep the memory of a worker that has ended.
        self._closing = weakref.finalize(self, os.close, self.fd) if self.fd >= 0 else None

    def close(self) -> None:
        """Closes the descriptor. What was imported by it stays."""
        if self._closing is not None:
            self._closing()
        self.fd = -1


class LocalPlane:
    """A connected local plane. Regions are disjoint, so threads may fill theirs at the same time.

    Arrays taken from it keep the memory mapped after close(); nothing is ever unmapped under them. In a child
    of this process it is closed: the connection is the life of the process that made it.

    why_no_pool: in the worker's words, why has_pool is false; empty if it told none. device_pool: the frames in
    a GPU, if they were asked for.
    """

    def __init__(self, sock: socket.socket, client_id: int, staging: mmap.mmap,
                 pool: Optional[mmap.mmap], why_no_pool: str = "",
                 device_pool: Optional[DevicePool] = None) -> None:
        self._socket = sock
        self.client_id = client_id
        self._staging: Bytes = np.frombuffer(staging, np.uint8)
        self._pool: Optional[Bytes] = None if pool is None else np.frombuffer(pool, np.uint8)
        self.why_no_pool = why_no_pool
        self.device_pool = device_pool
        _open_planes.add(self)

    @staticmethod
    def connect(socket_path: str, staging_bytes: int, timeout: float,
                model_digest: str = "", memories: Seq[EngineMemory] = (),
                takes_device_pool: bool = False) -> "LocalPlane":
        """`model_digest`: the model whose pool is to be mapped; empty for none. `memories`: of an engine,
        for its pools; they stay the worker's to use until this connection ends. `takes_device_pool`: of frames
        in a GPU, hand over what the caller maps them by; else such a worker's frames are not mapped.

        Raises Unavailable when nobody listens there (another host, no local plane), DeadlineExceeded,
        FailedPrecondition with the worker's words when it refuses.
        """
        deadline = time.monotonic() + timeout
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        descriptors: list[int] = []
        try:
            sock.settimeout(timeout)
            sock.connect(socket_path)
            hello = local_plane_pb2.LocalHello(
                version=_VERSION, staging_bytes=staging_bytes, model_digest=model_digest,
                pool_kinds=_DEVICE_KINDS if takes_device_pool else ())
            for memory in memories:
                hello.memories.add(
                    kind=local_plane_pb2.LocalMemory.KIND_MEMFD, size_bytes=memory.num_bytes)
            message = struct.pack("<I", hello.ByteSize()) + hello.SerializeToString()
            # Descriptors travel with the first byte.
            sent = 0
            if memories:
                sent = socket.send_fds(sock, [message], [memory.fd for memory in memories])
            sock.sendall(message[sent:])
            welcome = _receive_welcome(sock, descriptors, deadline, socket_path)
            if welcome.num_memories != len(memories):
                raise Unavailable(f"local plane {socket_path}: took {welcome.num_memories} of "
                                  f"{len(memories)} memories: the worker is of an older version")
            if not descriptors:
                raise Unavailable(f"local plane {socket_path}: welcome without a staging descriptor")
            staging = _map(descriptors[0], welcome.staging_bytes, True, socket_path)
            pool = device_pool = None
            announced = welcome.pools[0] if welcome.pools else local_plane_pb2.LocalWelcome.Pool()
            if announced.has_fd and len(descriptors) > 1:
                pool = _map(descriptors[1], announced.size_bytes, False, socket_path)
            elif takes_device_pool and announced.kind in _DEVICE_KINDS:
                device_pool = _device_pool(announced, descriptors, socket_path)
            plane = LocalPlane(sock, welcome.client_id, staging, pool, announced.why_not, device_pool)
            sock.setblocking(False)
            sock = None  # type: ignore[assignment]  # the plane's now
            return plane
        except socket.timeout as error:
            raise DeadlineExceeded(f"local plane {socket_path}: no welcome in time") from error
        except OSError as error:
            raise Unavailable(f"local plane {socket_path}: {error}") from error
        finally:
            for fd in descriptors:
                os.close(fd)  # a mapping keeps its own
            if sock is not None:
                sock.close()

    @property
    def staging_bytes(self) -> int:
        return self._staging.size

    @property
    def has_pool(self) -> bool:
        return self._pool is not None

    def region(self, offset: int, num_bytes: int) -> Bytes:
        """[num_bytes] of the staging buffer, writable. ValueError outside of it."""
        return _slice("staging", self._staging, offset, num_bytes)

    def frames(self, offset: int, num_bytes: int) -> Bytes:
        """[num_bytes] of the model's pool, read-only. Valid while a lease holds the frames."""
        if self._pool is None:
            raise ValueError("this local plane has no pool")
        return _slice("pool", self._pool, offset, num_bytes)

    def is_alive(self) -> bool:
        """False once the worker has ended or dropped this client. Never waits."""
        if self._socket.fileno() < 0:
            return False
        poller = select.poll()
        poller.register(self._socket, select.POLLIN | select.POLLRDHUP)
        return not poller.poll(0)  # nothing is said after the welcome but the end

    def close(self) -> None:
        if self.device_pool is not None:
            self.device_pool.close()
        self._socket.close()


def _close_in_child() -> None:
    """Of the descriptors that were inherited, which would keep the worker from seeing the parent's end."""
    for plane in list(_open_planes):
        plane.close()
    _open_planes.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


def _receive_welcome(sock: socket.socket, descriptors: list[int], deadline: float,
                     path: str) -> local_plane_pb2.LocalWelcome:
    received = b""
    while True:
        if len(received) >= 4:
            (length,) = struct.unpack_from("<I", received)
            if length > _MAX_WELCOME_BYTES:
                raise Unavailable(f"local plane {path}: welcome of {length} bytes")
            if len(received) >= 4 + length:
                break
        left = deadline - time.monotonic()
        if left <= 0:
            raise socket.timeout
        sock.settimeout(left)
        data, fds, _, _ = socket.recv_fds(sock, 4096, _MAX_DESCRIPTORS)
        descriptors.extend(fds)
        if not data:
            raise Unavailable(f"local plane {path} hung up")
        received += data
    welcome = local_plane_pb2.LocalWelcome()
    welcome.ParseFromString(received[4:4 + length])
    if welcome.error:
        raise FailedPrecondition(f"local plane {path} refused: {welcome.error}")
    return welcome


def _map(fd: int, num_bytes: int, writable: bool, path: str) -> mmap.mmap:
    # Touching a mapping behind the end of its file is a SIGBUS: believe the file, not the message.
    there = os.fstat(fd).st_size
    if num_bytes == 0 or there < num_bytes:
        raise Unavailable(f"local plane {path}: {there} bytes of memory, announced {num_bytes}")
    if not fcntl.fcntl(fd, _F_GET_SEALS) & _F_SEAL_SHRINK:
        raise Unavailable(f"local plane {path}: memory that is not sealed against shrinking")
    return mmap.mmap(fd, num_bytes, access=mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ)


def _device_pool(pool: local_plane_pb2.LocalWelcome.Pool, descriptors: list[int],
                 path: str) -> Optional[DevicePool]:
    is_vmm = pool.kind == _KINDS.KIND_CUDA_VMM
    if not pool.has_device_fd and not pool.ipc_handle:
        return None
    if pool.has_device_fd != is_vmm or (is_vmm and len(descriptors) < 2) or \
            (not is_vmm and len(pool.ipc_handle) != 64) or \
            not 0 < pool.size_bytes <= pool.mapped_bytes:
        raise Unavailable(f"local plane {path}: a pool of {_KINDS.Kind.Name(pool.kind)} without what it is "
                          "mapped by")
    # Descriptors of the welcome are closed once it is read: this one stays.
    fd = os.dup(descriptors[1]) if is_vmm else -1
    return DevicePool(_KINDS.Kind.Name(pool.kind), pool.size_bytes, pool.mapped_bytes, pool.device_uuid, fd,
                      pool.ipc_handle)


def _slice(what: str, memory: Bytes, offset: int, num_bytes: int) -> Bytes:
    if offset < 0 or num_bytes < 0 or offset + num_bytes > memory.size:
        raise ValueError(
            f"{what} region [{offset}, +{num_bytes}) of a buffer of {memory.size} bytes")
    return memory[offset:offset + num_bytes]
