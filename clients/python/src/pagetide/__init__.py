"""PageTide's client: reuse the KV state of any prompt prefix that a fleet has seen.

    with pagetide.Client(router="127.0.0.1:7070") as client:
        model = client.register_model(spec)          # pagetide.v1.model_pb2.ModelSpec
        with client.open(model, prompt) as sequence:
            sequence.wait_ready()                    # prompt[:sequence.length] need not be computed
            rows = sequence.read_block(0, 0, sequence.length)
            with sequence.begin_append(prompt[sequence.length:]) as append:
                append.write_rows(0, layer, pagetide.RowKind.K, 0, k_rows)
                append.commit()

pagetide.aio has the same for asyncio (pagetide.sync is made from it). Messages and stubs of every service are
in pagetide.v1.
"""

from pagetide._attention import Attention, merge_attention
from pagetide._messages import RowsPart
from pagetide.dlpack import DlpackView
from pagetide.engine_memory import EngineLayout, EngineMemory
from pagetide.errors import (Aborted, AlreadyExists, Cancelled, DataLoss, DeadlineExceeded,
                             FailedPrecondition, Internal, InvalidArgument, NotFound, PageTideError,
                             PermissionDenied, ResourceExhausted, SequenceMoved, Unauthenticated,
                             Unavailable, Unimplemented)
from pagetide.lease import PageLease
from pagetide.local_plane import DevicePool, LocalPlane
from pagetide.model import Group, Model, RowKind, row_bytes
from pagetide.options import Input, Retention
from pagetide.retry import CallOptions, RetryPolicy
from pagetide.sync.appends import PendingAppend
from pagetide.sync.calls import WorkerConnection
from pagetide.sync.client import Client
from pagetide.sync.engine import EngineJob, EnginePool
from pagetide.sync.files import Export
from pagetide.sync.sequence import Sequence
from pagetide.sync.shard_group import ShardGroup
from pagetide.sync.steps import BatchStep, PendingStep

__all__ = [
    "Aborted", "AlreadyExists", "Attention", "BatchStep", "CallOptions", "Cancelled", "Client",
    "DataLoss", "DeadlineExceeded", "DevicePool", "DlpackView", "EngineJob", "EngineLayout", "EngineMemory",
    "EnginePool", "Export", "FailedPrecondition", "Group", "Input", "Internal", "InvalidArgument",
    "LocalPlane", "Model",
    "NotFound", "PageLease", "PageTideError", "PendingAppend", "PendingStep", "PermissionDenied",
    "ResourceExhausted", "Retention", "RetryPolicy", "RowKind", "RowsPart", "Sequence",
    "SequenceMoved", "ShardGroup", "Unauthenticated", "Unavailable", "Unimplemented", "WorkerConnection",
    "merge_attention", "row_bytes"
]
