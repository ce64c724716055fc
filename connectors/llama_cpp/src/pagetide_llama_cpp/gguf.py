"""What a GGUF file says about its model, and digests of it: the identity never comes from a file name.

Format: GGUF version 3 (little-endian): magic, version, tensor count, pair count, pairs {key, type, value},
tensor descriptions, padding, tensor data. Source: ggml's docs/gguf.md.
"""

from __future__ import annotations

import dataclasses
import hashlib
import mmap
import os
import struct
from typing import Any, Union

_MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
# GGUF value types of fixed size, by struct's letters.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
# Longer arrays (vocabularies) are hashed, not kept.
_MAX_KEPT_ELEMENTS = 4096


@dataclasses.dataclass(frozen=True)
class Tensor:
    name: str
    shape: tuple[int, ...]
    ggml_type: int
    offset: int  # in the file


@dataclasses.dataclass(frozen=True)
class GgufFile:
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]
    # SHA-256 of all pairs but the tokenizer's, the tensor descriptions and the tensor data.
    weights_digest: bytes
    # SHA-256 of the tokenizer's pairs.
    tokenizer_digest: bytes

    # Values of the small f32 tensors that describe the model rather than being its weights.
    small_tensors: dict[str, tuple[float, ...]]

    def floats(self, tensor: str) -> tuple[float, ...]:
        return self.small_tensors.get(tensor, ())

    @property
    def architecture(self) -> str:
        return str(self.metadata["general.architecture"])

    def of_architecture(self, key: str, default: Any = None) -> Any:
        """The value of "<architecture>.<key>"."""
        return self.metadata.get(f"{self.architecture}.{key}", default)


def read_gguf(path: str) -> GgufFile:
    """ValueError when the file is not a whole GGUF model of version 2 or 3."""
    if os.path.getsize(path) == 0:  # which cannot be mapped
        raise ValueError(f"read {path}: empty")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return _Reader(data, path).read()
        except struct.error as error:
            raise ValueError(f"read {path}: ends early: {error}") from error


class _Reader:
    def __init__(self, data: mmap.mmap, path: str) -> None:
        self._data = data
        self._path = path
        self._at = 0

    def _take(self, letters: str) -> Any:
        values = struct.unpack_from("<" + letters, self._data, self._at)
        self._at += struct.calcsize("<" + letters)
        return values[0]

    def _string(self) -> str:
        size = self._take("Q")
        raw = self._data[self._at:self._at + size]
        if len(raw) != size:
            raise struct.error(f"string of {size} bytes at {self._at}")
        self._at += size
        return raw.decode("utf-8", errors="replace")

    def _skip_string(self) -> None:
        size = self._take("Q")
        self._at += size

    def _value(self, kind: int) -> Union[int, float, bool, str, list[Any], None]:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            element, count = self._take("I"), self._take("Q")
            if element == _STRING and count > _MAX_KEPT_ELEMENTS:
                for _ in range(count):
                    self._skip_string()
                return None
            if element in _SCALARS and count > _MAX_KEPT_ELEMENTS:
                self._at += count * struct.calcsize("<" + _SCALARS[element])
                return None
            return [self._value(element) for _ in range(count)]
        if kind not in _SCALARS:
            raise ValueError(f"read {self._path}: value type {kind} at byte {self._at}")
        value: Union[int, float, bool] = self._take(_SCALARS[kind])
        return value

    def read(self) -> GgufFile:
        if self._data[:4] != _MAGIC:
            raise ValueError(f"read {self._path}: not a GGUF file")
        self._at = 4
        version, num_tensors, num_pairs = self._take("I"), self._take("Q"), self._take("Q")
        if version not in (2, 3):
            raise ValueError(f"read {self._path}: GGUF version {version}, expected 2 or 3")
        weights, tokenizer = hashlib.sha256(), hashlib.sha256()
        metadata: dict[str, Any] = {}
        for _ in range(num_pairs):
            begin = self._at
            key = self._string()
            value = self._value(self._take("I"))
            if value is not None:
                metadata[key] = value
            digest = tokenizer if key.startswith("tokenizer.") else weights
            digest.update(self._data[begin:self._at])
        if metadata.get("split.count", 0) > 1:
            raise ValueError(f"read {self._path}: one of {metadata['split.count']} parts of a model")
        described = self._at
        raw_tensors = []
        for _ in range(num_tensors):
            name = self._string()
            shape = tuple(self._take("Q") for _ in range(self._take("I")))
            raw_tensors.append((name, shape, self._take("I"), self._take("Q")))
        weights.update(self._data[described:self._at])
        alignment = metadata.get("general.alignment", 32)
        base = (self._at + alignment - 1) // alignment * alignment
        tensors = {name: Tensor(name, shape, kind, base + offset)
                   for name, shape, kind, offset in raw_tensors}
        small = {
            t.name: struct.unpack_from(f"<{t.shape[0]}f", self._data, t.offset)
            for t in tensors.values() if t.name == "rope_freqs.weight" and t.ggml_type == 0
        }
        step = 16 << 20
        for at in range(base, len(self._data), step):
            weights.update(self._data[at:at + step])
        return GgufFile(metadata, tensors, weights.digest(), tokenizer.digest(), small)
