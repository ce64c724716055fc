"""An engine's own KV pool in memory that a worker on the same host may copy pages into and out of."""

from __future__ import annotations

import dataclasses
import mmap
import os
from typing import Any, Iterator

import numpy as np
import numpy.typing as npt

from pagetide.model import Model, RowKind
from pagetide.v1 import engine_pool_pb2, model_pb2

Bytes = npt.NDArray[np.uint8]

# <fcntl.h>; the fcntl module has them from Python 3.12 on.
_F_ADD_SEALS = 1033
_F_SEAL_SHRINK = 2
_F_SEAL_GROW = 4


class EngineMemory:
    """`num_bytes` of zeros in a memfd, all allocated and sealed against changes of its size: what a worker
    takes. OSError (ENOSPC, ENOMEM) when the memory is not to be had.

    bytes: the memory, writable. Arrays made of it keep it mapped after close(), which closes the
    descriptor only.
    """

    def __init__(self, num_bytes: int) -> None:
        if num_bytes < 1:
            raise ValueError(f"engine memory of {num_bytes} bytes")
        import fcntl  # only where there are memfds, which is Linux

        self.fd = os.memfd_create("pagetide-engine", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            # A hole would be filled by who touches it first, which may be the worker.
            os.posix_fallocate(self.fd, 0, num_bytes)
            fcntl.fcntl(self.fd, _F_ADD_SEALS, _F_SEAL_SHRINK | _F_SEAL_GROW)
            self.bytes: Bytes = np.frombuffer(mmap.mmap(self.fd, num_bytes), np.uint8)
        except OSError:
            os.close(self.fd)
            raise

    @property
    def num_bytes(self) -> int:
        return self.bytes.size

    def close(self) -> None:
        """Closes the descriptor. A worker that it was handed to keeps the memory until its client ends."""
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1


@dataclasses.dataclass(frozen=True)
class EngineLayout:
    """How the rows of a model lie in one EngineMemory, dense from `offset` on.

    num_blocks: with block 0, the null block, which is never written. heads: "NHD" [block, token, head,
    bytes] or "HND" [block, head, token, bytes]. block_major: all layers of a block side by side; else
    layer after layer, each with all its blocks, K before V.
    """

    block_tokens: int
    num_blocks: int
    heads: str = "NHD"
    block_major: bool = False
    offset: int = 0

    def __post_init__(self) -> None:
        if self.heads not in ("NHD", "HND"):
            raise ValueError(f"engine layout: heads is \"{self.heads}\", must be NHD or HND")

    def num_bytes(self, model: Model) -> int:
        """Of the memory that the pool needs, `offset` included."""
        return self.offset + self.num_blocks * sum(size for *_, size in self._planes(model))

    def rows(self, model: Model, memory: EngineMemory, group: int, layer: int, kind: RowKind) -> Bytes:
        """The rows of one layer (an index within its group), indexed [block, token, head, byte] in
        either layout; writable."""
        spec = self._plane(model, group, layer, kind)
        pieces = _pieces(model, group)
        head_bytes = model.groups[group].row_bytes(kind) // pieces
        if memory.num_bytes < self.num_bytes(model):
            raise ValueError(f"engine memory of {memory.num_bytes} bytes, the layout needs "
                             f"{self.num_bytes(model)}")
        return np.lib.stride_tricks.as_strided(
            memory.bytes[spec.offset:], (self.num_blocks, self.block_tokens, pieces, head_bytes),
            (spec.block_stride, spec.token_stride, spec.head_stride, 1))

    def groups(self, model: Model) -> list[engine_pool_pb2.EngineGroup]:
        """As RegisterEnginePool wants them, in memory 0 of the client."""
        layout = (engine_pool_pb2.EngineGroup.LAYOUT_NHD if self.heads == "NHD" else
                  engine_pool_pb2.EngineGroup.LAYOUT_HND)
        groups = []
        for g, (own, spec) in enumerate(zip(model.groups, model.spec.geometry.groups)):
            is_packed = spec.packed_row_bytes > 0
            group = engine_pool_pb2.EngineGroup(
                layout=layout, kv_heads=1 if is_packed else spec.kv_heads,
                k_type=model_pb2.DATA_TYPE_UNSPECIFIED if is_packed else spec.k_type,
                v_type=spec.v_type if own.v_row_bytes else model_pb2.DATA_TYPE_UNSPECIFIED)
            for layer in range(own.num_layers):
                at = group.layers.add()
                at.k.CopyFrom(self._plane(model, g, layer, RowKind.K))
                if own.v_row_bytes:
                    at.v.CopyFrom(self._plane(model, g, layer, RowKind.V))
            groups.append(group)
        return groups

    def _planes(self, model: Model) -> Iterator[tuple[int, int, RowKind, int]]:
        """Group, layer, kind and the bytes of one block, in the order in which they lie."""
        for g, own in enumerate(model.groups):
            for layer in range(own.num_layers):
                for kind in (RowKind.K, RowKind.V):
                    if own.row_bytes(kind):
                        yield g, layer, kind, own.row_bytes(kind) * self.block_tokens

    def _plane(self, model: Model, group: int, layer: int, kind: RowKind) -> Any:
        before = total = 0
        block_bytes = 0
        for *key, size in self._planes(model):
            if key == [group, layer, kind]:
                before, block_bytes = total, size
            total += size
        if block_bytes == 0:
            raise ValueError(f"engine layout: model {model.name} has no {kind.name} rows in layer {layer} "
                             f"of group {group}")
        pieces = _pieces(model, group)
        head_bytes = model.groups[group].row_bytes(kind) // pieces
        is_nhd = self.heads == "NHD"
        return engine_pool_pb2.EnginePlane(
            memory=0, offset=self.offset + before * (1 if self.block_major else self.num_blocks),
            block_stride=total if self.block_major else block_bytes,
            token_stride=head_bytes * (pieces if is_nhd else 1),
            head_stride=head_bytes * (1 if is_nhd else self.block_tokens))


def _pieces(model: Model, group: int) -> int:
    """Into which a row may be laid apart: its heads, or one where it moves as a whole."""
    spec = model.spec.geometry.groups[group]
    if spec.packed_row_bytes or spec.scale == model_pb2.LayerGroup.SCALE_KIND_PER_TOKEN_AND_HEAD:
        return 1
    return int(spec.kv_heads)
