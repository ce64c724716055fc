"""The client for asyncio: Client and Sequence as in pagetide, with coroutines. For one event loop; different
sequences may be used by different tasks, one sequence by one task at a time.

These modules are the source of both clients: pagetide.sync is made from them by clients/python/generate.py,
which drops `async` and `await`. What is different between the two is in pagetide._transport_*.
"""

from pagetide.aio.appends import PendingAppend
from pagetide.aio.calls import WorkerConnection
from pagetide.aio.client import Client
from pagetide.aio.engine import EngineJob, EnginePool
from pagetide.aio.files import Export
from pagetide.aio.sequence import Sequence
from pagetide.aio.shard_group import ShardGroup
from pagetide.aio.steps import BatchStep, PendingStep

__all__ = ["BatchStep", "Client", "EngineJob", "EnginePool", "Export", "PendingAppend", "PendingStep", "Sequence",
           "ShardGroup", "WorkerConnection"]
