"""Attention that a worker computes: requests, and what comes back. Pure."""

from __future__ import annotations

import dataclasses
from typing import Any, Sequence

import numpy as np
import numpy.typing as npt

from pagetide.errors import Internal
from pagetide.model import Model
from pagetide.v1 import sequence_pb2

Floats = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Attention:
    """Of consecutive queries in one layer. merge_attention makes one of parts over disjoint rows."""

    outputs: Floats      # [num_queries, query_heads, v_dim]
    log_sum_exp: Floats  # [num_queries, query_heads], of the scaled scores


def merge_attention(parts: Sequence[Attention]) -> Attention:
    """The attention over all rows, of parts for the same queries over rows that have none in common, such
    as those that several workers hold. Equal in value to one call over all rows, not in every bit. A part
    without rows (log_sum_exp of minus infinity) counts for nothing."""
    if not parts:
        raise ValueError("merge_attention: no parts")
    shape = parts[0].outputs.shape
    for i, part in enumerate(parts):
        if part.outputs.shape != shape or part.log_sum_exp.shape != shape[:-1]:
            raise ValueError(f"merge_attention: part {i} has outputs {part.outputs.shape} and "
                             f"log_sum_exp {part.log_sum_exp.shape}, expected {shape} and {shape[:-1]}")
    lse = np.stack([part.log_sum_exp for part in parts]).astype(np.float64)
    total = np.logaddexp.reduce(lse, axis=0)
    weights = np.exp(lse - np.where(np.isneginf(total), 0.0, total))  # [num_parts, num_queries, query_heads]
    outputs = sum(weight[..., np.newaxis] * part.outputs for weight, part in zip(weights, parts))
    return Attention(np.asarray(outputs, np.float32), total.astype(np.float32))


def attend_request(model: Model, sequence_id: str, epoch: int, group: int, layer: int,
                   queries: npt.NDArray[Any], first_position: int, scale: float,
                   allow_behind_end: bool = False) -> sequence_pb2.AttendRequest:
    if not 0 <= group < len(model.groups):
        raise ValueError(f"group {group}: model {model.name} has {len(model.groups)}")
    k_dim = model.spec.geometry.groups[group].k_dim
    if queries.ndim != 3 or queries.size == 0 or queries.shape[2] != k_dim:
        raise ValueError(f"attend: queries of shape {queries.shape}, expected [num_queries, "
                         f"query_heads, {k_dim}]")
    return sequence_pb2.AttendRequest(
        sequence_id=sequence_id, epoch=epoch, group=group, layer=layer,
        num_queries=queries.shape[0], query_heads=queries.shape[1], first_position=first_position,
        scale=scale, allow_behind_end=allow_behind_end, queries=np.ascontiguousarray(queries, "<f4").tobytes())


def attention_of(model: Model, request: sequence_pb2.AttendRequest,
                 response: sequence_pb2.AttendResponse) -> Attention:
    heads = (request.num_queries, request.query_heads)
    v_dim = model.spec.geometry.groups[request.group].v_dim
    return Attention(_floats("outputs", response.outputs, (*heads, v_dim)),
                     _floats("log_sum_exp", response.log_sum_exp, heads))


def _floats(name: str, data: bytes, shape: tuple[int, ...]) -> Floats:
    floats = np.frombuffer(data, "<f4")
    if floats.size != int(np.prod(shape)):
        raise Internal(f"attend: {name} has {floats.size} numbers, expected {shape}")
    return floats.reshape(shape).astype(np.float32, copy=False)
