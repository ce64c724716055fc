"""What is done to contexts and models of llama.cpp past the class Llama, by whoever calls llama_cpp's functions.

Those are objects of ctypes, shared by all that imported them, and ctypes calls the errcheck of such an object behind
each call. From here on every call that changes rows of a context, or how they are computed, is noted. Calls from
C are not seen; those that there are (mtmd, for images) only add rows, of which the wrapper's n_tokens tells.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import weakref
from typing import Any, Callable, Optional

import llama_cpp.llama_cpp as lc

_log = logging.getLogger("pagetide.llama_cpp")
_ROTATION_VARIABLE = "LLAMA_ATTN_ROT_DISABLE"
_GENERATING = 0  # the sequence that the class Llama generates with


@dataclasses.dataclass
class Origin:
    """What was seen of a context since it was made."""

    # Of the environment when it was made; llama.cpp reads it then only.
    rotation: str
    # Calls that changed how rows are computed from then on: adapters, control vectors, causality.
    num_changes: int = 0
    last_change: str = ""


@dataclasses.dataclass(frozen=True)
class FileState:
    """A file as it was at a time: another one under its name, or another content, differs."""

    path: str
    device: int
    inode: int
    num_bytes: int
    changed_at: int

    @staticmethod
    def of(path: str) -> "FileState":
        """OSError when there is none."""
        real = os.path.realpath(path)
        stat = os.stat(real)
        return FileState(real, stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)


class Watch:
    """Calls cut(position) when rows of the generating sequence from `position` on were changed, added or
    dropped. For the thread that uses the context."""

    def __init__(self, ctx: int, memory: Optional[int], cut: Callable[[int], None]) -> None:
        self._addresses = [address for address in (ctx, memory) if address]
        self._cut = weakref.WeakMethod(cut)  # does not keep the engine alive
        for address in self._addresses:
            _watches.setdefault(address, weakref.WeakSet()).add(self)

    def close(self) -> None:
        for address in self._addresses:
            _watches.get(address, weakref.WeakSet()).discard(self)
            if not _watches.get(address, ()):
                _watches.pop(address, None)

    def tell(self, position: int) -> None:
        cut = self._cut()
        if cut is not None:
            cut(max(position, 0))


# By address of the context and of its memory. Bounded by the contexts that are attached.
_watches: dict[int, "weakref.WeakSet[Watch]"] = {}
# By address of the context and of the model. Bounded by those that are open.
_origins: dict[int, Origin] = {}
_files: dict[int, FileState] = {}


def origin_of(ctx: int) -> Origin:
    """One that was made before this module was imported counts as made now."""
    return _origins.setdefault(ctx, Origin(os.environ.get(_ROTATION_VARIABLE, "")))


def file_of(model: int) -> Optional[FileState]:
    """The file as it was when the model had been loaded from it; None when that was not seen."""
    return _files.get(model)


def _address(pointer: Any) -> int:
    value = getattr(pointer, "value", pointer)
    return int(value or 0)


# --- which rows a call leaves as they were: its arguments → the first position that it may change; None: all stay ---

def _is_generating(sequence: Any) -> bool:
    return int(getattr(sequence, "value", sequence)) in (_GENERATING, -1)  # -1: every sequence


def _whole(*arguments: Any) -> Optional[int]:
    return 0


def _removed(memory: Any, sequence: Any, begin: Any, end: Any) -> Optional[int]:
    return int(begin) if _is_generating(sequence) else None


def _copied(memory: Any, source: Any, target: Any, begin: Any, end: Any) -> Optional[int]:
    return int(begin) if _is_generating(target) and not _is_generating(source) else None


def _kept_only(memory: Any, sequence: Any) -> Optional[int]:
    return None if int(getattr(sequence, "value", sequence)) == _GENERATING else 0


def _moved(memory: Any, sequence: Any, begin: Any, end: Any, by: Any) -> Optional[int]:
    return int(begin) if _is_generating(sequence) else None


def _loaded_into(number: int) -> Callable[..., Optional[int]]:
    """By the number of the argument that is the sequence."""
    return lambda *arguments: 0 if _is_generating(arguments[number]) else None


def _decoded(context: Any, batch: Any) -> Optional[int]:
    """The first position of the generating sequence in a batch: llama.cpp takes none whose positions descend."""
    if not batch.pos or not batch.seq_id or not batch.n_seq_id:
        return 0  # llama.cpp chooses them
    for i in range(batch.n_tokens):
        if any(batch.seq_id[i][j] == _GENERATING for j in range(batch.n_seq_id[i])):
            return int(batch.pos[i])
    return None


_CHANGES_OF_ROWS: dict[str, Callable[..., Optional[int]]] = {
    "llama_memory_clear": _whole,
    "llama_memory_seq_rm": _removed,
    "llama_memory_seq_cp": _copied,
    "llama_memory_seq_keep": _kept_only,
    "llama_memory_seq_add": _moved,
    "llama_memory_seq_div": _moved,
    "llama_state_set_data": _whole,
    "llama_set_state_data": _whole,
    "llama_state_load_file": _whole,
    "llama_load_session_file": _whole,
    "llama_state_seq_set_data": _loaded_into(3),
    "llama_state_seq_set_data_ext": _loaded_into(3),
    "llama_state_seq_load_file": _loaded_into(2),
    "llama_decode": _decoded,
}
_CHANGES_OF_COMPUTING = (
    "llama_set_adapters_lora", "llama_set_adapter_cvec", "llama_set_causal_attn", "llama_set_warmup")


def _note_rows(positions: Callable[..., Optional[int]], arguments: tuple[Any, ...]) -> None:
    watches = _watches.get(_address(arguments[0]))
    if not watches:
        return
    position = positions(*arguments)
    if position is not None:
        for watch in list(watches):
            watch.tell(position)


def _note_change(name: str, arguments: tuple[Any, ...]) -> None:
    address = _address(arguments[0])
    origin = origin_of(address)
    origin.num_changes += 1
    origin.last_change = name
    for watch in list(_watches.get(address, ())):
        watch.tell(0)


def _note_context(result: Any) -> None:
    if result:
        _origins[_address(result)] = Origin(os.environ.get(_ROTATION_VARIABLE, ""))


def _note_model(result: Any, arguments: tuple[Any, ...]) -> None:
    if result:
        _files.pop(_address(result), None)
        path = arguments[0]
        _files[_address(result)] = FileState.of(os.fsdecode(getattr(path, "value", path)))


def _after(name: str, note: Callable[[Any, tuple[Any, ...]], object]) -> None:
    """note(result, arguments) behind each call of a function that this llama.cpp has."""
    function = getattr(lc._lib, name, None)  # noqa: SLF001
    if function is None:
        return
    before = getattr(function, "errcheck", None)

    def check(result: Any, called: Any, arguments: tuple[Any, ...]) -> Any:
        try:
            note(result, arguments)
        except Exception:  # noqa: BLE001  # our bug; the caller knows nothing of us
            _log.exception("%s", name)
        return result if before is None else before(result, called, arguments)

    function.errcheck = check


def _install() -> None:
    for name, positions in _CHANGES_OF_ROWS.items():
        _after(name, lambda result, arguments, positions=positions: _note_rows(  # type: ignore[misc]
            positions, arguments))
    for name in _CHANGES_OF_COMPUTING:
        _after(name, lambda result, arguments, name=name: _note_change(name, arguments))  # type: ignore[misc]
    for name in ("llama_init_from_model", "llama_new_context_with_model"):
        _after(name, lambda result, arguments: _note_context(result))
    for name in ("llama_model_load_from_file", "llama_load_model_from_file"):
        _after(name, _note_model)
    _after("llama_free", lambda result, arguments: _origins.pop(_address(arguments[0]), None))
    for name in ("llama_model_free", "llama_free_model"):
        _after(name, lambda result, arguments: _files.pop(_address(arguments[0]), None))


_install()
