"""attach(llama): prompts whose prefix any process has computed before are not computed again.

Before a prompt is evaluated, PageTide is asked what it has of it; that is loaded into the context page by
page, and llama.cpp computes the rest. Pages that filled are stored behind the prompt's first token, which
does not wait for that, and from then on as they fill. Whatever fails on the way, generation goes on by computing,
and the reason is in the connector's last report, its counters and the log.
"""

from __future__ import annotations

import collections
import ctypes
import json
import logging
import os
import threading
import time
import weakref
from typing import Any, Callable, Generator, Optional, Sequence

import llama_cpp
import llama_cpp.llama_cpp as lc
import numpy as np

import pagetide
from pagetide.v1 import types_pb2
from pagetide_llama_cpp.context import LlamaContext
from pagetide_llama_cpp.identity import PAGE_TOKENS, Refused, check_context, model_spec, read_loaded_gguf
from pagetide_llama_cpp.known_rows import KnownRows, common_prefix
from pagetide_llama_cpp.numerics import numerics_digest, numerics_of
from pagetide_llama_cpp.options import Options, Report
from pagetide_llama_cpp.page_reader import PageReader
from pagetide_llama_cpp.state import SEQUENCE, StateError
from pagetide_llama_cpp.store_thread import StoreThread
from pagetide_llama_cpp.watch import origin_of

_log = logging.getLogger("pagetide.llama_cpp")
_FEW_TOKENS = 8
FORKED = ("this process was forked after attach(), whose connections and threads are the parent's: attach "
          "behind the fork only, or start processes by spawn")
_LIMITS = {value: name[len("REUSE_LIMIT_"):].lower() for name, value in types_pb2.ReuseLimit.items()}
# For children of this process.
_attached: "weakref.WeakSet[Connector]" = weakref.WeakSet()


def attach(llama: llama_cpp.Llama, router: str, options: Options = Options(),
           model_path: Optional[str] = None) -> "Connector":
    """Wraps generate and eval of `llama`; everything above them (completions, chat, the server) uses
    them. Never raises for what PageTide or the model cannot do: Connector.refused_because says it.

    model_path: the GGUF file that llama was opened from, if not llama.model_path.
    """
    return Connector(llama, router, options, model_path or llama.model_path)


class Connector:
    """One llama.cpp context and PageTide. For the thread that uses the context.

    is_wrapped: generate and eval of the engine call prepare() and keep(); False: the owner does.
    """

    def __init__(self, llama: Any, router: str, options: Options, model_path: str,
                 is_wrapped: bool = True) -> None:
        self._llama = llama
        self._options = options
        self._is_wrapped = is_wrapped
        self.refused_because = ""
        self.last: Optional[Report] = None
        # Sums over prompts since the start: prompts, prompt_tokens, live_tokens, loaded_tokens,
        # computed_tokens, failures, refused; limit_X: prompts whose Report.limit is X; not_stored: prompts of
        # which nothing is stored because too many wait.
        self.counters: collections.Counter[str] = collections.Counter()
        # What moves the last bits of this engine's rows.
        self.numerics: dict[str, Any] = {}
        self._model: Optional[pagetide.Model] = None
        self._spec: Any = None
        self._context: Optional[LlamaContext] = None
        self._client = pagetide.Client(
            router=router, timeout=options.timeout, max_assignments=2,
            use_local_plane=options.use_local_plane, retry=pagetide.RetryPolicy(max_attempts=2))
        self._asleep_until = 0.0
        self._asleep_because = ""
        # The sequence that the context's tokens are stored to, and how much of them was handed over.
        self._sequence: Optional[pagetide.Sequence] = None
        self._handed_over: list[int] = []
        self._prompt_tokens = 0
        # Of generate(): an older one that ends late has no say any more.
        self._generation = 0
        # The context, or what is known of it, is being worked on: what the garbage collector ends meanwhile waits.
        self._is_at_work = False
        # That used the context last. The collector may end a generation on any other, beside this one.
        self._thread = threading.get_ident()
        self._rows = KnownRows(llama)
        self._origin = origin_of(llama.ctx)
        self._num_changes = self._origin.num_changes
        # The thread does not keep the engine alive.
        store_failed = weakref.WeakMethod(self._store_failed)
        self._store = StoreThread(options.max_pending_bytes, options.max_pending_prompts,
                                  lambda reason: (store_failed() or _ignore)(reason))
        self._store_asleep_until = 0.0
        # When the engine goes away, or the interpreter ends, without detach().
        self._end = weakref.finalize(self, _end, self._store, self._client)
        self._process = os.getpid()
        _attached.add(self)
        self._generate: Callable[..., Any] = llama.generate
        self._eval: Callable[..., Any] = llama.eval
        try:
            check_context(llama)
            self._context = LlamaContext(llama)
            self.numerics = numerics_of(llama)
            self._spec = model_spec(llama, read_loaded_gguf(llama, model_path), self._context.layout,
                                    numerics_digest(self.numerics) if options.numerics_in_key else "")
            _log.info("model %s, %s; numerics %s", self._spec.name, self._spec.numerics_id,
                      json.dumps(self.numerics))
        except Exception as error:  # noqa: BLE001  # another wrapper's version, no memory: the engine goes on
            expected = isinstance(error, (Refused, ValueError, OSError, KeyError))
            self.refused_because = f"{error}" if expected else f"{type(error).__name__}: {error}"
            self._context = None
            _log.warning("no reuse for %s: %s", model_path, self.refused_because, exc_info=not expected)
        self._connect()
        llama.eval = self._eval_and_note
        if is_wrapped:
            llama.generate = self._generate_with_reuse

    def _connect(self) -> None:
        """What else the first prompt would wait for: connections to the router and to a worker, the model known to
        both. Waits as long as a prompt would; what fails here counts as it does there."""
        if self._context is None:
            return
        token = max(self._llama.token_bos(), 0)
        try:
            self.known_tokens([token, token])
        except (pagetide.PageTideError, Refused) as error:
            self._failed(f"connect: {error}")

    def detach(self, flush_timeout: float = 10.0) -> None:
        """Stores what is on its way and gives the methods back."""
        if not self._is_in_its_process():
            return
        self._keep_rest()
        self._end.detach()
        _attached.discard(self)
        self._give_methods_back()
        _end(self._store, self._client, flush_timeout)

    def _give_methods_back(self) -> None:
        self._rows.close()
        self._llama.eval = self._eval
        if self._is_wrapped:
            self._llama.generate = self._generate

    def _is_in_its_process(self) -> bool:
        """False behind a fork, with the parent's connections and threads left to the parent."""
        if os.getpid() != self._process:
            self.leave_to_parent()
        return self.refused_because != FORKED

    def leave_to_parent(self) -> None:
        """In a child of the process that attached: the engine goes on without PageTide. Neither waits nor takes a
        lock that the parent may have held when it forked."""
        if self.refused_because == FORKED:
            return
        self._process = os.getpid()
        self._end.detach()
        # Never destroyed here: what destroys a channel waits for threads that are the parent's only.
        for left in (self._client, self._store, self._sequence):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(left))
        self._store.leave_to_parent()
        self._context = self._model = self._sequence = None
        self.refused_because = FORKED
        self._give_methods_back()

    def flush(self, timeout: float = 10.0) -> bool:
        """Waits until all pages that have filled are stored (or have failed). For the thread that uses the context."""
        self._keep_rest()
        return self._store.flush(timeout)

    @property
    def pending_bytes(self) -> int:
        """Rows that were cut out of the context and are not stored yet."""
        return self._store.pending_bytes

    @property
    def stored_tokens(self) -> int:
        return self._store.stored_tokens

    @property
    def dropped_tokens(self) -> int:
        return self._store.dropped_tokens

    def _failed(self, reason: str) -> None:
        self.counters["failures"] += 1
        self._asleep_until = time.monotonic() + self._options.cool_down
        self._asleep_because = reason
        _log.warning("%s; generation goes on without PageTide for %.0f s", reason,
                     self._options.cool_down)

    def _store_failed(self, reason: str) -> None:
        """What cannot be written may still be read."""
        self.counters["failures"] += 1
        self._store_asleep_until = time.monotonic() + self._options.cool_down
        _log.warning("%s; nothing is stored for %.0f s", reason, self._options.cool_down)

    def _generate_with_reuse(self, tokens: Sequence[int], *args: Any,
                             **kwargs: Any) -> Generator[int, Optional[Sequence[int]], None]:
        tokens = list(tokens)
        # The wrapper's own parameter: False continues what the context holds.
        reset = kwargs.get("reset", args[6] if len(args) > 6 else True)
        if reset:
            self.prepare(tokens)
        self._generation += 1
        generation = self._generation
        try:
            yield from self._generate(tokens, *args, **kwargs)
        finally:  # else the next prompt, flush() or detach() does
            if generation == self._generation and threading.get_ident() == self._thread:
                self.keep()

    def _eval_and_note(self, tokens: Sequence[int]) -> None:
        self._thread = threading.get_ident()
        # Here, not behind it: a prompt's first token does not wait for the cutting of its pages.
        self._keep_rest()
        if self._sequence is not None and not self._has_its_threads():
            self._sequence = None  # what is computed now is not of the numerics that pages are named after
        is_outermost, self._is_at_work = not self._is_at_work, True
        try:
            self._rows.evaluate(self._eval, tokens)
        finally:
            self._is_at_work = not is_outermost

    def _check_still_ours(self) -> None:
        """Refused when the engine is not any more what it was when it was attached."""
        context = self._context
        if context is None:
            raise Refused(self.refused_because)
        if self._origin.num_changes != self._num_changes:
            raise Refused(f"{self._origin.last_change} was called since the context was attached: its rows "
                          "are not those of the model any more that it is named after; open it anew")
        if not self._has_its_threads():
            raise Refused(f"the context was attached with {self.numerics['threads']} threads and has "
                          f"{lc.llama_n_threads(self._llama.ctx)}: attach it anew")
        if not context.is_passage_free():
            raise Refused(f"sequence {SEQUENCE} of the context is in use, through which pages go in and out")

    def _has_its_threads(self) -> bool:
        """As many as are part of the key, if they are."""
        threads = self.numerics.get("threads")
        return not self._options.numerics_in_key or threads in (None, lc.llama_n_threads(self._llama.ctx))

    def prepare(self, tokens: list[int]) -> Report:
        """Brings the longest known prefix of a prompt into the context, unless the context holds as much
        already. generate() calls it."""
        self._generation += 1
        self._thread = threading.get_ident()
        self._keep_rest()
        report = Report(len(tokens))
        self.last = report
        if self._sequence is not None:  # what never found room on the store thread
            self._store.drop(max(self._rows.tokens().size // PAGE_TOKENS * PAGE_TOKENS -
                                 len(self._handed_over), 0))
        self._sequence = None
        known = self._rows.tokens()
        report.live_tokens = common_prefix(known, tokens)
        try:
            self._check_still_ours()
            self._forget_foreign_rows(tokens, known.size)
            self._reuse(tokens, report)
        except pagetide.PageTideError as error:
            if error.reason == "MODEL_NOT_FOUND":
                self._model = None  # PageTide began anew: it has to be told again
            report.reason, report.limit = f"PageTide: {error}", "failed"
            self._failed(report.reason)
        except Refused as refused:
            report.reason, report.limit = str(refused), "refused"
            self.counters["refused"] += 1
        except Exception as error:  # noqa: BLE001  # no memory, or our bug; the engine must not end by it
            _log.exception("prepare %d tokens", len(tokens))
            report.reason, report.limit = f"{type(error).__name__}: {error}", "failed"
            self._failed(report.reason)
        held = max(report.live_tokens, report.loaded_tokens)
        self.counters.update(
            prompts=1, prompt_tokens=len(tokens), loaded_tokens=report.loaded_tokens,
            live_tokens=0 if report.loaded_tokens else report.live_tokens,
            computed_tokens=len(tokens) - min(held, len(tokens) - 1) if tokens else 0)
        self.counters[f"limit_{report.limit}"] += 1
        _log.info("prompt of %d tokens: %d live, %d loaded, %d offered: %s", report.prompt_tokens,
                  report.live_tokens, report.loaded_tokens, report.offered_tokens, report.reason)
        return report

    def _forget_foreign_rows(self, tokens: list[int], num_known: int) -> None:
        """The wrapper goes on from the longest prefix that input_ids has; Refused where that takes in rows that
        are not known. A few (the first token is that of every prompt) are not worth it."""
        held = common_prefix(self._llama.input_ids[:self._llama.n_tokens], tokens)
        if held <= num_known or self._context is None:
            return
        if held >= _FEW_TOKENS:
            raise Refused(f"the context holds {held - num_known} rows of inputs that are not tokens, of a state "
                          "that was loaded, or that were changed by others")
        self._context.clear()

    def keep(self) -> None:
        """Hands pages that have filled since prepare() to the store thread. generate() calls it behind the first
        token, and eval() from then on."""
        if not self._is_in_its_process() or self._is_at_work or self._sequence is None or not self._llama.ctx:
            return
        began = time.monotonic()
        self._is_at_work = True
        try:
            self._hand_over()
        except Exception as error:  # noqa: BLE001  # as in prepare()
            self._sequence = None
            _log.exception("hand pages over")
            self._failed(f"hand pages over: {type(error).__name__}: {error}")
        finally:
            self._is_at_work = False
        if self.last is not None:
            self.last.cut_seconds += time.monotonic() - began

    def _keep_rest(self) -> None:
        """Of a prompt whose generate() has not gone on behind its first token."""
        if self._is_wrapped:
            self.keep()
        else:
            self._is_in_its_process()

    def known_tokens(self, tokens: list[int]) -> int:
        """Leading tokens of a prompt that PageTide has; nothing is loaded. PageTideError; Refused."""
        model = self._registered_model()
        return int(self._client.lookup(model, tokens).reused_tokens)

    def _registered_model(self) -> pagetide.Model:
        self._is_in_its_process()
        if self._context is None:
            raise Refused(self.refused_because)
        asleep = self._asleep_until - time.monotonic()
        if asleep > 0:
            raise Refused(f"PageTide failed, and is asked again in {asleep:.1f} s: {self._asleep_because}")
        if self._model is None:
            self._model = self._client.register_model(self._spec)
        return self._model

    def _reuse(self, tokens: list[int], report: Report) -> None:
        if self._llama._logits_all or self._llama.draft_model is not None:  # noqa: SLF001
            raise Refused("logits_all (or a draft model): reused tokens have no logits")
        if len(tokens) < 2 or len(tokens) >= self._llama.n_ctx():
            raise Refused(f"prompt of {len(tokens)} tokens in a context of {self._llama.n_ctx()}")
        if min(tokens) < 0:
            raise Refused("the prompt has inputs that are not tokens")
        began = time.monotonic()
        sequence = self._client.open(self._registered_model(), tokens)
        # Else the store thread closes it in the end, whatever happens here.
        is_ours = not self._store.begin(sequence)
        try:
            self._read(sequence, tokens, report, began)
        finally:
            if is_ours:
                sequence.__exit__(None, None, None)
        if is_ours:
            self.counters["not_stored"] += 1
            _log.warning("prompt of %d tokens: nothing of it is stored, %d prompts wait for that",
                         len(tokens), self._options.max_pending_prompts)
        is_storing = not is_ours and self._options.store and time.monotonic() >= self._store_asleep_until
        self._sequence = sequence if is_storing else None
        self._handed_over = tokens[:sequence.length]
        self._prompt_tokens = len(tokens)

    def _read(self, sequence: pagetide.Sequence, tokens: list[int], report: Report, began: float) -> None:
        """What the sequence has more of than the context."""
        report.worker_id = sequence.worker_id
        report.offered_tokens = sequence.length
        report.reason = sequence.reuse.explanation
        report.limit = _LIMITS[sequence.reuse.limit]
        if sequence.length <= report.live_tokens:
            report.ask_seconds = time.monotonic() - began
            return
        usable = sequence.wait_ready() if sequence.restoring_pages else sequence.length
        if sequence.shortened_because:
            report.reason, report.limit = sequence.shortened_because, "shortened"
        report.ask_seconds = time.monotonic() - began
        if usable > report.live_tokens:
            self._load(sequence, tokens, min(usable, len(tokens) - 1), report)

    def _load(self, sequence: pagetide.Sequence, tokens: list[int], length: int,
              report: Report) -> None:
        """All of [0, length), or what is whole of it when the time is up; when anything fails an empty context
        and the reason."""
        context = self._context
        assert context is not None
        began = time.monotonic()
        context.clear()
        report.live_tokens = 0
        try:
            pages = PageReader(sequence)
            for begin in range(0, length, context.part_tokens):
                if begin and time.monotonic() - began > self._options.max_load_seconds:
                    report.limit = "shortened"
                    report.reason = (f"{begin} of {length} tokens were loaded in "
                                     f"{self._options.max_load_seconds:.1f} s, the rest is computed")
                    length = begin
                    break
                end = min(begin + context.part_tokens, length)
                context.load(pages.stage(context, begin, end), begin, end)
            # Window layers too: the next token attends to rows that llama.cpp would not miss aloud.
            if context.first_position() != 0:
                raise StateError(f"the context begins at position {context.first_position()}")
        except BaseException as error:
            context.clear()
            if not isinstance(error, (StateError, ValueError)):
                raise
            raise pagetide.Internal(f"load {length} tokens: {error}") from error
        context.claim(tokens, length)
        self._rows.set(tokens[:length])
        report.loaded_tokens = length
        report.load_seconds = time.monotonic() - began

    def _hand_over(self) -> None:
        """Copies pages that have filled out of the context, for the store thread."""
        sequence, context = self._sequence, self._context
        if sequence is None or context is None:
            return
        ids = self._rows.tokens()
        until = ids.size if self._options.store_generated else min(ids.size, self._prompt_tokens)
        begin = len(self._handed_over)
        if until // PAGE_TOKENS * PAGE_TOKENS <= begin:
            return
        if not np.array_equal(ids[:begin], self._handed_over):
            self._sequence = None  # the context went another way than the sequence
            return
        try:
            self._check_still_ours()
        except Refused as refused:
            self._sequence = None
            _log.info("nothing more of the prompt is stored: %s", refused)
            return
        while begin // PAGE_TOKENS < until // PAGE_TOKENS:
            # To the next page boundary, in parts that a state holds whole.
            end = min((begin // PAGE_TOKENS + 1) * PAGE_TOKENS, begin + context.part_tokens)
            try:
                blocks = context.cut(begin, end)
            except StateError as error:
                self._sequence = None
                self._failed(f"cut tokens {begin} to {end}: {error}")
                return
            part = [int(t) for t in ids[begin:end]]
            if not self._store.append(sequence, begin, part, blocks):
                return  # too much is on its way: the rows stay in the context, and are cut out later
            self._handed_over.extend(part)
            begin = end


def _end(store: StoreThread, client: pagetide.Client, flush_timeout: float = 5.0) -> None:
    store.flush(flush_timeout)
    store.stop(flush_timeout)
    client.close()


def _after_fork_in_child() -> None:
    for connector in list(_attached):
        connector.leave_to_parent()
    _attached.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def _ignore(reason: str) -> None:
    """Nobody is left to be told."""
