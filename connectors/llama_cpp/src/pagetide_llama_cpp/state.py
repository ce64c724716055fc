"""llama.cpp's sequence state (the memory form of llama_state_seq_get_data) and PageTide's row blocks.

Form: u32 0xaf143cd8, i32 sequence, then one body (plain cache) or two (full layers, window layers):
u32 streams = 1, u32 cells, a cell {i32 position, u32 sequences = 1, i32 sequence}, u32 v_trans, u32 layers,
a layer's K {i32 type, u64 row bytes, rows}, then V the same, or transposed {i32 type, u32 element bytes,
u32 width, [width][cells]}. Which of these an engine writes is learned from one of its own states; a state
that deviates from it in a byte of structure is refused. docs/formats/llama_cpp.md has the format in full.
"""

from __future__ import annotations

import dataclasses
import struct
from typing import Any, Iterator

import numpy as np
import numpy.typing as npt

MAGIC = 0xAF143CD8
SEQUENCE = 1  # pages pass through this sequence of the context; 0 is the one that generates
_CELL = np.dtype([("pos", "<i4"), ("count", "<u4"), ("sequence", "<i4")])
Bytes = npt.NDArray[np.uint8]


class StateError(ValueError):
    """The bytes are not what this codec knows."""


@dataclasses.dataclass(frozen=True)
class Body:
    """The layers of one cache of the context, all alike. One body is one layer group of the model."""

    num_layers: int
    k_type: int  # ggml's number
    k_row_bytes: int
    v_type: int
    v_row_bytes: int
    v_transposed: bool
    v_element_bytes: int  # of transposed V; 0 otherwise

    def block_bytes(self, num_tokens: int) -> int:
        return self.num_layers * num_tokens * (self.k_row_bytes + self.v_row_bytes)


@dataclasses.dataclass(frozen=True)
class _Run:
    """Rows of one layer and kind: where they lie in a state and in a block's row order."""

    body: int
    layer: int
    is_v: bool
    offset: int  # in the state


class StateLayout:
    """The states of one context. Immutable; thread-safe."""

    def __init__(self, bodies: tuple[Body, ...]) -> None:
        self.bodies = bodies

    @staticmethod
    def parse(state: bytes) -> "StateLayout":
        """Learns the layout from a state with at least one cell in each body."""
        reader = _Reader(state)
        if reader.take("I") != MAGIC:
            raise StateError("sequence state: another magic: this llama.cpp writes another format")
        reader.take("i")
        bodies = []
        while not reader.is_done:
            bodies.append(_parse_body(reader))
        if not 1 <= len(bodies) <= 2:
            raise StateError(f"sequence state: {len(bodies)} bodies, expected 1 or 2")
        return StateLayout(tuple(bodies))

    def plan(self, num_tokens: int) -> "StatePlan":
        return StatePlan(self, num_tokens)


class StatePlan:
    """The bytes of a state of num_tokens cells: structure in `template`, and where the rows go."""

    def __init__(self, layout: StateLayout, num_tokens: int) -> None:
        self.num_tokens = n = num_tokens
        self._layout = layout
        self._runs: list[_Run] = []
        self._cells: list[int] = []  # offset of each body's cells
        structure: list[tuple[int, bytes]] = []
        at = 0

        def put(letters: str, *values: int) -> None:
            nonlocal at
            raw = struct.pack("<" + letters, *values)
            structure.append((at, raw))
            at += len(raw)

        put("Ii", MAGIC, SEQUENCE)
        for b, body in enumerate(layout.bodies):
            put("II", 1, n)
            self._cells.append(at)
            at += n * _CELL.itemsize
            put("II", int(body.v_transposed), body.num_layers)
            for layer in range(body.num_layers):
                put("iQ", body.k_type, body.k_row_bytes)
                self._runs.append(_Run(b, layer, False, at))
                at += n * body.k_row_bytes
            for layer in range(body.num_layers):
                if body.v_transposed:
                    put("iII", body.v_type, body.v_element_bytes,
                        body.v_row_bytes // body.v_element_bytes)
                else:
                    put("iQ", body.v_type, body.v_row_bytes)
                self._runs.append(_Run(b, layer, True, at))
                at += n * body.v_row_bytes
        self.num_bytes = at
        self._structure = structure

    def _block_slices(self, source_tokens: int) -> Iterator[tuple[_Run, int, int]]:
        """(run, offset of its rows in a block of source_tokens rows, row bytes)."""
        for run in self._runs:
            body = self._layout.bodies[run.body]
            layer_bytes = source_tokens * (body.k_row_bytes + body.v_row_bytes)
            offset = run.layer * layer_bytes + (source_tokens * body.k_row_bytes if run.is_v else 0)
            yield run, offset, body.v_row_bytes if run.is_v else body.k_row_bytes

    def write(self, blocks: list[Bytes], source_tokens: int, first_position: int,
              out: Bytes) -> None:
        """Fills `out` (num_bytes) with a state of the first num_tokens rows of `blocks`: for each body
        [layer][K: source_tokens rows][V: source_tokens rows]."""
        n = self.num_tokens
        for at, raw in self._structure:
            out[at:at + len(raw)] = np.frombuffer(raw, np.uint8)
        cells = np.empty(n, _CELL)
        cells["pos"] = np.arange(first_position, first_position + n)
        cells["count"] = 1
        cells["sequence"] = SEQUENCE
        for at in self._cells:
            out[at:at + cells.nbytes] = cells.view(np.uint8)
        for run, offset, row_bytes in self._block_slices(source_tokens):
            rows = blocks[run.body][offset:offset + n * row_bytes]
            target = out[run.offset:run.offset + n * row_bytes]
            element = self._transposed_element(run)
            if element:
                _transpose(rows, n, row_bytes // element, element, target)
            else:
                target[:] = rows

    def read(self, state: Bytes, first_position: int) -> list[Bytes]:
        """The rows of a state, for each body [layer][K: n rows][V: n rows]. StateError unless it has
        exactly this structure and the positions first_position … + n."""
        n = self.num_tokens
        if state.size != self.num_bytes:
            raise StateError(f"sequence state of {n} tokens from {first_position}: {state.size} bytes, "
                             f"expected {self.num_bytes}: rows are missing")
        for at, raw in self._structure:
            if state[at:at + len(raw)].tobytes() != raw:
                raise StateError(f"sequence state of {n} tokens from {first_position}: structure "
                                 f"differs at byte {at}")
        order = []
        for at in self._cells:
            cells = state[at:at + n * _CELL.itemsize].view(_CELL)
            by_position = np.argsort(cells["pos"], kind="stable")
            expected = np.arange(first_position, first_position + n)
            if not np.array_equal(cells["pos"][by_position], expected) or (cells["count"] != 1).any():
                raise StateError(f"sequence state: cells are not the positions {first_position} to "
                                 f"{first_position + n - 1}")
            order.append(None if np.array_equal(by_position, np.arange(n)) else by_position)
        blocks: list[Bytes] = [np.empty(b.block_bytes(n), np.uint8) for b in self._layout.bodies]
        for run, offset, row_bytes in self._block_slices(n):
            rows = state[run.offset:run.offset + n * row_bytes]
            target = blocks[run.body][offset:offset + n * row_bytes]
            element = self._transposed_element(run)
            if element:
                _transpose(rows, row_bytes // element, n, element, target)
            else:
                target[:] = rows
            permutation = order[run.body]
            if permutation is not None:
                target[:] = target.reshape(n, row_bytes)[permutation].reshape(-1)
        return blocks

    def _transposed_element(self, run: _Run) -> int:
        body = self._layout.bodies[run.body]
        return body.v_element_bytes if run.is_v and body.v_transposed else 0


def _transpose(source: Bytes, rows: int, columns: int, element: int, target: Bytes) -> None:
    """[rows][columns] elements of `element` bytes to [columns][rows]."""
    kind: Any = f"<u{element}"
    target.view(kind).reshape(columns, rows)[:] = source.view(kind).reshape(rows, columns).T


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def is_done(self) -> bool:
        return self._at == len(self._data)

    def take(self, letter: str) -> int:
        try:
            value: int = struct.unpack_from("<" + letter, self._data, self._at)[0]
        except struct.error as error:
            raise StateError(f"sequence state of {len(self._data)} bytes ends early") from error
        self._at += struct.calcsize("<" + letter)
        return value

    def skip(self, num_bytes: int) -> None:
        if num_bytes > len(self._data) - self._at:
            raise StateError(f"sequence state of {len(self._data)} bytes: {num_bytes} bytes of rows at "
                             f"{self._at}")
        self._at += num_bytes


def _parse_body(reader: _Reader) -> Body:
    streams, cells = reader.take("I"), reader.take("I")
    if streams != 1 or cells == 0:
        raise StateError(f"sequence state: {streams} streams, {cells} cells, expected 1 and some")
    for _ in range(cells):
        reader.take("i")
        if reader.take("I") != 1:
            raise StateError("sequence state: a cell of several sequences, or with more than a position")
        reader.take("i")
    v_transposed, num_layers = reader.take("I"), reader.take("I")
    if v_transposed > 1 or not 1 <= num_layers <= 4096:
        raise StateError(f"sequence state: v_trans {v_transposed}, {num_layers} layers")
    found: list[set[tuple[int, ...]]] = [set(), set()]
    for is_v in (0, 1):
        for _ in range(num_layers):
            kind = reader.take("i")
            if is_v and v_transposed:
                element, width = reader.take("I"), reader.take("I")
                row = element * width
            else:
                element, row = 0, reader.take("Q")
            reader.skip(row * cells)
            found[is_v].add((kind, row, element))
    if len(found[0]) != 1 or len(found[1]) != 1:
        raise StateError("sequence state: layers of one cache with rows of different sizes")
    (k_type, k_row, _), (v_type, v_row, v_element) = found[0].pop(), found[1].pop()
    return Body(num_layers, k_type, k_row, v_type, v_row, bool(v_transposed), v_element)
