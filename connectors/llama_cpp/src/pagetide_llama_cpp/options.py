"""What a Connector is told, and what it tells."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Options:
    # Bounds each call to PageTide, and the wait for pages that the store has to bring, in seconds.
    timeout: float = 2.0
    # Bounds the loading of one prompt, in seconds: what is whole by then is used, the rest is computed.
    max_load_seconds: float = 10.0
    # After a failure PageTide is left alone for so long, so that one that is down or slow delays one prompt
    # and not every one.
    cool_down: float = 5.0
    # Rows that wait to be stored; more stay in the context until there is room, and are dropped with it.
    max_pending_bytes: int = 256 << 20
    # Prompts whose pages wait to be stored; of more the pages are loaded and none are stored.
    max_pending_prompts: int = 32
    # Read and write rows in memory shared with a worker on this host; False: by RPC always.
    use_local_plane: bool = True
    # False: only read what others stored.
    store: bool = True
    # Store pages that generation filled, too. Their rows were computed one token at a time, so that the
    # last bits can differ from those of a prefill.
    store_generated: bool = True
    # Pages are shared with engines of equal numerics only (Connector.numerics: build of llama.cpp, instructions,
    # devices, batches), so that reuse changes no bit of the logits. False: with all engines of the model and
    # its settings; the last bits of rows are then those of whoever wrote them.
    numerics_in_key: bool = True


@dataclasses.dataclass
class Report:
    """What became of one prompt."""

    prompt_tokens: int
    live_tokens: int = 0     # leading tokens that the context held anyway
    offered_tokens: int = 0  # leading tokens that PageTide had
    loaded_tokens: int = 0   # leading tokens that came from PageTide
    # Why not more was loaded: PageTide's explanation, or what failed here.
    reason: str = ""
    # PageTide's word for it (never_stored, diverged, group, …: ReuseLimit in types.proto); or
    # shortened (by a restore), failed, refused.
    limit: str = ""
    worker_id: str = ""
    ask_seconds: float = 0.0   # assignment, opening, restores
    load_seconds: float = 0.0  # reading pages and handing them to the context
    cut_seconds: float = 0.0   # copying filled pages out of the context, for the store thread
