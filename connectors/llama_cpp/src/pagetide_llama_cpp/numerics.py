"""What moves the last bits of rows besides the model and the context's settings: which llama.cpp computes them, with
which of the machine's instructions, on which devices, in which batches.

Engines that are equal in it compute equal rows for equal prompts. By default it is part of the key
(Options.numerics_in_key).
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
from typing import Any

import llama_cpp
import llama_cpp.llama_cpp as lc

# The mapped file of a line of /proc/self/maps.
_LIBRARY = re.compile(r"^\S+ \S+ \S+ \S+ \S+ +(/.*/lib(?:llama|ggml)[^/\n]*)$", re.MULTILINE)
_DELETED = " (deleted)"
_CPU_DEVICE = 0  # ggml_backend_dev_type
# By device, inode, size and time of change. Bounded by the libraries of this process.
_digests: dict[tuple[int, int, int, int], str] = {}


def numerics_of(llama: Any) -> dict[str, Any]:
    """For people and for numerics_digest. ValueError when a library cannot be told."""
    model, context = llama.model_params, llama.context_params
    devices = _devices()
    values: dict[str, Any] = {
        "llama-cpp-python": llama_cpp.__version__,
        "llama.cpp": lc.llama_version().decode() if hasattr(lc, "llama_version") else "",
        "libraries": _libraries(),
        # Instruction sets and build switches of each backend.
        "features": lc.llama_print_system_info().decode(errors="replace"),
        "repacked": bool(model.use_extra_bufts),
        # Prompts are computed in so many tokens at a time.
        "batch": [int(llama.n_batch), int(lc.llama_n_ubatch(llama.ctx))],
        "devices": devices,
    }
    if devices:  # else there is nothing to offload to, whatever was asked for
        values["offload"] = [
            int(model.n_gpu_layers), int(model.split_mode), int(model.main_gpu),
            [float(share) for share in llama.tensor_split or ()], bool(context.offload_kqv),
            bool(context.op_offload)]
    if threads_matter(llama):
        values["threads"] = int(lc.llama_n_threads(llama.ctx))
    return values


def threads_matter(llama: Any) -> bool:
    """Flash attention over f32 and f16 rows splits the keys of a single query among the threads, and sums up their
    parts (ggml-cpu/ops.cpp, use_split_kv_path). Else a thread computes whole sums."""
    params = llama.context_params
    is_on = int(params.flash_attn_type) != lc.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return is_on and params.type_k == params.type_v and params.type_k in (0, 1)


def numerics_digest(numerics: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(numerics, sort_keys=True).encode()).hexdigest()[:32]


def _libraries() -> list[list[str]]:
    """Name and digest of each shared object of llama.cpp that this process has loaded. A build of the same version
    with other switches, or another compiler, rounds in other ways."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            paths = set(_LIBRARY.findall(maps.read()))
    except OSError:  # not Linux
        paths = set()
    paths = paths or {str(lc._lib._name)}  # noqa: SLF001
    for path in paths:
        if path.endswith(_DELETED):
            raise ValueError(f"{path[:-len(_DELETED)]} was replaced since it was loaded")
    return sorted([os.path.basename(path), _digest(path)] for path in paths)


def _digest(path: str) -> str:
    stat = os.stat(path)
    key = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
    if key not in _digests:
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            for part in iter(lambda: file.read(1 << 20), b""):
                digest.update(part)
        _digests[key] = digest.hexdigest()[:32]
    return _digests[key]


def _devices() -> list[list[str]]:
    """Name and description of what computes besides the CPU."""
    def function(name: str, result: Any, *arguments: Any) -> Any:
        return ctypes.CFUNCTYPE(result, *arguments)((name, lc._lib))  # noqa: SLF001

    count = function("ggml_backend_dev_count", ctypes.c_size_t)
    get = function("ggml_backend_dev_get", ctypes.c_void_p, ctypes.c_size_t)
    kind = function("ggml_backend_dev_type", ctypes.c_int, ctypes.c_void_p)
    texts = [function(f"ggml_backend_dev_{what}", ctypes.c_char_p, ctypes.c_void_p)
             for what in ("name", "description")]
    devices = [get(i) for i in range(count())]
    return [[(text(device) or b"").decode(errors="replace") for text in texts]
            for device in devices if kind(device) != _CPU_DEVICE]
