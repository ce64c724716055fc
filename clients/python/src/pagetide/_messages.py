"""What the sync and the asyncio client share: requests, checks of answers, the state of a sequence.
Pure: nothing here waits or sends."""

from __future__ import annotations

import dataclasses
import uuid
from typing import Any, Iterable, Iterator, Mapping, Optional, Sequence as Seq, TypeVar, Union

import numpy as np
import numpy.typing as npt

from pagetide.errors import DataLoss, Internal, Unavailable
from pagetide.model import Group, Model, RowKind
from pagetide.options import Input
from pagetide.v1 import prefix_pb2, router_pb2, sequence_pb2, session_pb2, types_pb2

Tokens = Union[Seq[int], npt.NDArray[np.integer[Any]]]
Rows = Union[bytes, bytearray, memoryview, npt.NDArray[Any]]
Bytes = npt.NDArray[np.uint8]
S = TypeVar("S", bound="SequenceBase")

# A message's payload (proto/pagetide/v1/sequence.proto RowPart).
MAX_PART_BYTES = 1 << 20
# grpc's message limit: 4 MiB of payload and room for its fields, as the servers have it.
MAX_MESSAGE_BYTES = (4 << 20) + (256 << 10)
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 2_000),  # which bounds an attempt to connect
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.enable_retries", 0),  # pagetide.retry knows what is safe to repeat
)
CLOSE_TIMEOUT = 2.0
LOCAL_PLANE_TIMEOUT = 2.0
MAX_MOVES = 3


def new_request_id() -> str:
    """128 random bits in hex: a retried call is told from a new one."""
    return uuid.uuid4().hex


def token_list(tokens: Tokens) -> list[int]:
    array = np.asarray(tokens)
    if array.size == 0:
        return []
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"tokens: expected a flat run of integers, got {array.dtype} of shape "
                         f"{array.shape}")
    if int(array.min()) < 0 or int(array.max()) > 0xFFFFFFFF:
        raise ValueError(f"tokens: from {array.min()} to {array.max()}, must be 0 to 2^32 - 1")
    return list(array.tolist())


def as_bytes(rows: Rows) -> Bytes:
    """A flat byte view; copies only what is not contiguous."""
    if isinstance(rows, np.ndarray):
        return np.ascontiguousarray(rows).reshape(-1).view(np.uint8)
    return np.frombuffer(rows, np.uint8)


@dataclasses.dataclass(frozen=True)
class RowsPart:
    """Consecutive rows of one layer, as they arrive."""

    layer: int  # index within the group
    kind: RowKind
    first_token: int
    rows: Bytes  # [num_tokens, row_bytes], read-only


def input_list(inputs: Seq[Input]) -> list[prefix_pb2.InputDigest]:
    return [prefix_pb2.InputDigest(position=one.position, digest=one.digest) for one in inputs]


def prompt_message(model: Model, tokens: Tokens, inputs: Seq[Input]) -> router_pb2.Prompt:
    return router_pb2.Prompt(model=model.digest, tokens=token_list(tokens), inputs=input_list(inputs))


def assign_group_request(models: Seq[Model], tokens: Tokens, inputs: Seq[Input], sticky: str,
                         exclude: Seq[str]) -> router_pb2.AssignGroupRequest:
    return router_pb2.AssignGroupRequest(
        request_id=new_request_id(), rank_models=[model.digest for model in models],
        prompt=router_pb2.Prompt(tokens=token_list(tokens), inputs=input_list(inputs)),
        sticky_shard_group=sticky, exclude_shard_groups=exclude)


def open_request(model: Model, tokens: Tokens, inputs: Seq[Input], allow_full_reuse: bool,
                 no_reuse: bool, plan: Optional[prefix_pb2.PromptPlan],
                 assignment_id: str = "") -> sequence_pb2.OpenSequenceRequest:
    return sequence_pb2.OpenSequenceRequest(
        request_id=new_request_id(), model_digest=model.digest, tokens=token_list(tokens),
        inputs=input_list(inputs), allow_full_reuse=allow_full_reuse, no_reuse=no_reuse,
        assignment_id=assignment_id, plan=plan)


def lookup_request(model: Model, tokens: Tokens, inputs: Seq[Input],
                   allow_full_reuse: bool) -> prefix_pb2.LookupPrefixRequest:
    return prefix_pb2.LookupPrefixRequest(
        model_digest=model.digest, tokens=token_list(tokens), inputs=input_list(inputs),
        allow_full_reuse=allow_full_reuse)


def load_request(name: str, version: Optional[int], model: Optional[Model],
                 length: Optional[int]) -> session_pb2.LoadSessionRequest:
    request = session_pb2.LoadSessionRequest(
        request_id=new_request_id(), name=name, model_digest=model.digest if model else "")
    if version is not None:
        request.version = version
    if length is not None:
        request.length = length
    return request


def serving_workers(workers: Seq[router_pb2.WorkerInfo],
                    worker_id: str) -> list[router_pb2.WorkerInfo]:
    """The named worker, or all that serve, those with most room first. Unavailable when there is none."""
    found = [w for w in workers if w.role == "worker" and w.state == "serving" and
             worker_id in ("", w.worker_id)]
    if not found:
        raise Unavailable(f"no worker {worker_id or 'at all'} is serving", "NO_WORKER")
    return sorted(found, key=lambda w: -(w.free_frames + w.evictable_frames))


def row_parts(group: int, layer: int, kind: RowKind, first_token: int, rows: Bytes,
              row_bytes: int) -> Iterator[sequence_pb2.AppendTokensRequest]:
    if row_bytes == 0 or rows.size % row_bytes != 0:
        raise ValueError(f"write rows: {rows.size} bytes, expected a multiple of {row_bytes}")
    step = max(MAX_PART_BYTES // row_bytes, 1) * row_bytes
    for at in range(0, rows.size, step):
        piece = rows[at:at + step]
        yield sequence_pb2.AppendTokensRequest(rows=sequence_pb2.RowPart(
            group=group, layer=layer, kind=kind.value, first_token=first_token + at // row_bytes,
            num_tokens=piece.size // row_bytes, data=piece.tobytes()))


def split_bytes(data: Rows) -> Iterator[bytes]:
    """The bytes in messages' sizes."""
    whole = as_bytes(data)
    for at in range(0, whole.size, MAX_PART_BYTES):
        yield whole[at:at + MAX_PART_BYTES].tobytes()


def file_parts(data: Union[Rows, Iterable[bytes]]) -> Iterator[bytes]:
    """A file's bytes, whole or in pieces of any size, in messages' sizes."""
    if isinstance(data, (bytes, bytearray, memoryview, np.ndarray)):
        yield from split_bytes(data)
    else:
        for piece in data:
            yield from split_bytes(piece)


def first_of(sequences: Seq[S]) -> S:
    """A call on several sequences goes to the worker of the first."""
    if not sequences:
        raise ValueError("a call on several sequences: none was given")
    return sequences[0]


def split_block(group: Group, num_tokens: int, block: Rows) -> Iterator[tuple[int, RowKind, Bytes]]:
    """The runs of [layer][K: n rows][V: n rows]."""
    data = as_bytes(block)
    if data.size != num_tokens * group.token_bytes:
        raise ValueError(f"write block of {num_tokens} tokens: {data.size} bytes, expected "
                         f"{num_tokens * group.token_bytes}")
    for layer in range(group.num_layers):
        for kind in (RowKind.K, RowKind.V):
            size = num_tokens * group.row_bytes(kind)
            at = group.offset(layer, kind, num_tokens)
            if size:
                yield layer, kind, data[at:at + size]


def check_part(message: sequence_pb2.ReadRowsResponse, group: Group, sequence_id: str) -> RowsPart:
    kind = RowKind(message.kind)
    row_bytes = group.row_bytes(kind)
    if len(message.data) != message.num_tokens * row_bytes:
        raise DataLoss(f"read rows of {sequence_id}: part of {len(message.data)} bytes, expected "
                       f"{message.num_tokens * row_bytes}")
    rows = np.frombuffer(message.data, np.uint8).reshape(message.num_tokens, row_bytes)
    return RowsPart(message.layer, kind, message.first_token, rows)


class Block:
    """Rows [begin, end) of all layers of one group in one buffer:
    [layer][K: n rows][V: n rows], which is a page's layout when the range is a page."""

    def __init__(self, group: Group, begin: int, end: int, out: Optional[Bytes]) -> None:
        self.begin, self.num_tokens = begin, end - begin
        self._group = group
        size = self.num_tokens * group.token_bytes
        if out is not None and (out.dtype != np.uint8 or out.shape != (size,)):
            raise ValueError(f"read block of {self.num_tokens} tokens: out is {out.dtype} of shape "
                             f"{out.shape}, expected uint8 of shape ({size},)")
        self.bytes: Bytes = np.empty(size, np.uint8) if out is None else out
        self._missing = size

    def put(self, part: RowsPart) -> None:
        row_bytes = self._group.row_bytes(part.kind)
        first = part.first_token - self.begin
        if first < 0 or first + len(part.rows) > self.num_tokens:
            raise Internal(f"read block: rows [{part.first_token}, +{len(part.rows)}) are not of "
                           f"[{self.begin}, +{self.num_tokens})")
        at = self._group.offset(part.layer, part.kind, self.num_tokens) + first * row_bytes
        self.bytes[at:at + part.rows.size] = part.rows.reshape(-1)
        self._missing -= part.rows.size

    def check_complete(self, sequence_id: str) -> None:
        if self._missing != 0:
            raise DataLoss(f"read rows of {sequence_id}: {self._missing} of {self.bytes.size} bytes "
                           "did not come")


class SequenceBase:
    """State of an open sequence as of the last answer."""

    def __init__(self, model: Model, state: types_pb2.SequenceState) -> None:
        self.model = model
        self.state = state
        # What the open reused, and why not more.
        self.reuse = types_pb2.PrefixReuse()
        # Pages that were being restored from the store when the open answered.
        self.restoring_pages = 0
        # Of a sequence that a session was loaded into; empty for others.
        self.tokens: list[int] = []
        # Of a sequence that was made from a file: what was found in it.
        self.imported: Optional[session_pb2.ImportSequenceResponse] = None
        # Of a resumed sequence: its owner had never let go of it, and what came after it was parked is lost.
        self.was_taken_over = False
        # Why restores ended with less than the open promised; empty otherwise.
        self.shortened_because = ""
        self._is_closed = False

    @property
    def id(self) -> str:
        return self.state.sequence_id

    @property
    def length(self) -> int:
        """Committed tokens."""
        return self.state.length

    @property
    def worker_id(self) -> str:
        return self.state.worker_id

    def ref(self) -> types_pb2.SequenceRef:
        """Names the sequence in requests: its id and the ownership period that was seen last."""
        return types_pb2.SequenceRef(sequence_id=self.id, epoch=self.state.epoch)

    def _header(self, append_id: str, tokens: Tokens, inputs: Seq[Input],
                pin_prefix: bool) -> sequence_pb2.AppendTokensRequest:
        return sequence_pb2.AppendTokensRequest(header=sequence_pb2.AppendHeader(
            request_id=append_id, sequence=self.ref(), append_id=append_id,
            expected_length=self.length, tokens=token_list(tokens), inputs=input_list(inputs),
            pin_prefix=pin_prefix))

    def _read_request(self, group: int, begin: int, end: int,
                      layers: Seq[int]) -> sequence_pb2.ReadRowsRequest:
        if not 0 <= group < len(self.model.groups):
            raise ValueError(f"group {group}: model {self.model.name} has {len(self.model.groups)}")
        return sequence_pb2.ReadRowsRequest(
            sequence_id=self.id, group=group, begin=begin, end=end, layers=list(layers))

    def _fork_request(self, length: Optional[int]) -> sequence_pb2.ForkSequenceRequest:
        request = sequence_pb2.ForkSequenceRequest(request_id=new_request_id(), source=self.ref())
        if length is not None:
            request.length = length
        return request

    def _lease_request(self, seconds: float,
                       local_client_id: int) -> sequence_pb2.GetBlockTableRequest:
        request = sequence_pb2.GetBlockTableRequest(
            sequence_id=self.id, local_client_id=local_client_id)
        request.lease.FromNanoseconds(int(seconds * 1e9))
        return request

    def _next_lease_request(self, table: sequence_pb2.GetBlockTableResponse,
                            local_client_id: int) -> sequence_pb2.GetBlockTableRequest:
        return sequence_pb2.GetBlockTableRequest(
            sequence_id=self.id, lease_id=table.lease_id, page_token=table.next_page_token,
            local_client_id=local_client_id)

    def _close_request(self) -> sequence_pb2.CloseSequenceRequest:
        return sequence_pb2.CloseSequenceRequest(sequence_id=self.id, epoch=self.state.epoch)

    def _save_request(self, name: str, metadata: Optional[Mapping[str, str]],
                      expected_version: Optional[int], durability: types_pb2.Durability,
                      keep_tokens: Optional[int], compact: bool) -> session_pb2.SaveSessionRequest:
        request = session_pb2.SaveSessionRequest(
            request_id=new_request_id(), sequence=self.ref(), name=name, metadata=metadata or {},
            level=durability, compact=compact)
        if expected_version is not None:
            request.expected_version = expected_version
        if keep_tokens is not None:
            request.keep_tokens = keep_tokens
        return request
