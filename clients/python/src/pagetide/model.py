"""Models: identity and page geometry, and the arithmetic of rows."""

from __future__ import annotations

import dataclasses
import enum
from typing import Sequence as Seq

from pagetide.v1 import model_pb2, types_pb2

# Elements encoded together and their bytes (proto/pagetide/v1/model.proto DataType).
_ENCODING: dict[int, tuple[int, int]] = {
    model_pb2.DATA_TYPE_F32: (1, 4),
    model_pb2.DATA_TYPE_F16: (1, 2),
    model_pb2.DATA_TYPE_BF16: (1, 2),
    model_pb2.DATA_TYPE_F8_E4M3: (1, 1),
    model_pb2.DATA_TYPE_F8_E5M2: (1, 1),
    model_pb2.DATA_TYPE_Q8_0: (32, 34),
    model_pb2.DATA_TYPE_Q5_0: (32, 22),
    model_pb2.DATA_TYPE_Q5_1: (32, 24),
    model_pb2.DATA_TYPE_Q4_0: (32, 18),
    model_pb2.DATA_TYPE_Q4_1: (32, 20),
    model_pb2.DATA_TYPE_IQ4_NL: (32, 18),
}


class RowKind(enum.IntEnum):
    K = types_pb2.ROW_KIND_K
    V = types_pb2.ROW_KIND_V


def row_bytes(data_type: int, heads: int, dim: int, scale_plane: bool = False) -> int:
    """Bytes of one token's row in one layer. Each head is encoded on its own."""
    if dim == 0:
        return 0
    if data_type not in _ENCODING:
        raise ValueError(f"row of data type {data_type}: not known")
    elements, size = _ENCODING[data_type]
    if dim % elements != 0:
        raise ValueError(f"row of {dim} elements: not a multiple of {elements}")
    return heads * (dim // elements) * size + (heads * 4 if scale_plane else 0)


@dataclasses.dataclass(frozen=True)
class Group:
    """One layer group: layers that page together."""

    layers: tuple[int, ...]  # by their number in the model
    page_tokens: int
    k_row_bytes: int
    v_row_bytes: int

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in all layers."""
        return self.num_layers * (self.k_row_bytes + self.v_row_bytes)

    @property
    def page_bytes(self) -> int:
        return self.page_tokens * self.token_bytes

    def row_bytes(self, kind: RowKind) -> int:
        return self.k_row_bytes if kind == RowKind.K else self.v_row_bytes

    def offset(self, layer: int, kind: RowKind, num_tokens: int) -> int:
        """Where the rows of `layer` begin in [layer][K: num_tokens rows][V: num_tokens rows], the layout
        of pages (num_tokens = page_tokens) and of staged rows."""
        at = layer * num_tokens * (self.k_row_bytes + self.v_row_bytes)
        return at if kind == RowKind.K else at + num_tokens * self.k_row_bytes


@dataclasses.dataclass(frozen=True)
class Model:
    """A registered model. Immutable."""

    digest: str  # 64 hex digits
    spec: model_pb2.ModelSpec
    groups: tuple[Group, ...]

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def page_tokens(self) -> int:
        return self.spec.geometry.page_tokens or 256

    def staged_bytes(self, num_tokens: int) -> int:
        """Bytes of num_tokens staged tokens: all groups, one after another."""
        return num_tokens * sum(g.token_bytes for g in self.groups)

    def staged_offset(self, num_tokens: int, group: int, layer: int, kind: RowKind) -> int:
        before = num_tokens * sum(g.token_bytes for g in self.groups[:group])
        return before + self.groups[group].offset(layer, kind, num_tokens)

    @staticmethod
    def from_proto(model: model_pb2.Model) -> "Model":
        page_tokens = model.spec.geometry.page_tokens or 256
        groups = tuple(
            _group_from_proto(group, page_tokens) for group in model.spec.geometry.groups)
        for group, page_bytes in zip(groups, model.group_page_bytes):
            if group.token_bytes and group.page_bytes != page_bytes:
                raise ValueError(f"model {model.spec.name}: a page of layers {group.layers} has "
                                 f"{group.page_bytes} bytes here, {page_bytes} at the router")
        return Model(model.model_digest, model.spec, groups)


def _group_from_proto(group: model_pb2.LayerGroup, page_tokens: int) -> Group:
    layers: Seq[int] = tuple(group.layers)
    if group.kind in (model_pb2.LayerGroup.KIND_RECURRENT, model_pb2.LayerGroup.KIND_OPAQUE):
        k = v = 0  # no rows
    elif group.packed_row_bytes:
        k, v = group.packed_row_bytes, 0
    else:
        plane = group.scale == model_pb2.LayerGroup.SCALE_KIND_PER_TOKEN_AND_HEAD
        k = row_bytes(group.k_type, group.kv_heads, group.k_dim, plane)
        v = row_bytes(group.v_type, group.kv_heads, group.v_dim, plane)
    return Group(tuple(layers), page_tokens, k, v)
