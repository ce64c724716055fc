"""The connector's codec of sequence states, against states that llama.cpp wrote (tests/formats/testdata) and
against what it must refuse. Needs neither llama.cpp nor PageTide."""

from __future__ import annotations

import pathlib
import struct
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[3]
# The module alone: the package would import llama-cpp-python.
sys.path.insert(0, str(ROOT / "connectors" / "llama_cpp" / "src" / "pagetide_llama_cpp"))
from state import MAGIC, SEQUENCE, StateError, StateLayout  # noqa: E402

STATES = ROOT / "tests" / "formats" / "testdata"
WHOLE = ["full_plain", "full_q8_0", "full_transposed", "iswa", "iswa_transposed"]


def state_of(name: str) -> bytearray:
    """A state as the engine gives it for its sequence 1."""
    state = bytearray((STATES / f"llama_cpp_v2_{name}.mem").read_bytes())
    layout = StateLayout.parse(bytes(state))
    struct.pack_into("<i", state, 4, SEQUENCE)
    at = 8
    for body in layout.bodies:
        (cells,) = struct.unpack_from("<I", state, at + 4)
        for cell in range(cells):
            struct.pack_into("<i", state, at + 8 + 12 * cell + 8, SEQUENCE)
        at += 8 + 12 * cells + 8 + body.block_bytes(cells)
        at += body.num_layers * (12 + (12 if body.v_transposed else 12))
    assert at == len(state)
    return state


def shape_of(state: bytearray) -> tuple[int, int]:
    """Cells of the first body and the first of their positions."""
    cells, position = struct.unpack_from("<Ii", state, 12)
    return cells, position


@pytest.mark.parametrize("name", WHOLE)
def test_rows_go_out_and_come_back_byte_for_byte(name: str) -> None:
    state = state_of(name)
    cells, first = shape_of(state)
    layout = StateLayout.parse(bytes(state))
    assert len(layout.bodies) == (2 if "iswa" in name else 1)
    plan = layout.plan(cells)
    if plan.num_bytes != len(state):
        # The window body has fewer cells: whole states of window models are what pages exist to avoid.
        assert "iswa" in name
        with pytest.raises(StateError, match="rows are missing"):
            plan.read(np.frombuffer(bytes(state), np.uint8), first)
        return
    blocks = plan.read(np.frombuffer(bytes(state), np.uint8), first)
    assert [b.size for b in blocks] == [b.block_bytes(cells) for b in layout.bodies]
    out = np.zeros(plan.num_bytes, np.uint8)
    plan.write(blocks, cells, first, out)
    assert out.tobytes() == bytes(state)
    # A part of the rows, out of blocks with room for more, at other positions.
    part = layout.plan(cells - 1)
    out = np.zeros(part.num_bytes, np.uint8)
    part.write(blocks, cells, 1000, out)
    again = part.read(out, 1000)
    for body, whole, less in zip(layout.bodies, blocks, again):
        for is_v, row in ((False, body.k_row_bytes), (True, body.v_row_bytes)):
            for layer in range(body.num_layers):
                def rows(block: np.ndarray, n: int) -> np.ndarray:
                    at = layer * n * (body.k_row_bytes + body.v_row_bytes)
                    at += n * body.k_row_bytes if is_v else 0
                    return block[at:at + (cells - 1) * row]
                assert np.array_equal(rows(whole, cells), rows(less, cells - 1))


def test_cells_in_another_order_are_put_in_order() -> None:
    state = state_of("full_plain")
    cells, first = shape_of(state)
    layout = StateLayout.parse(bytes(state))
    plan = layout.plan(cells)
    expected = plan.read(np.frombuffer(bytes(state), np.uint8), first)[0]
    at = 16
    swapped = bytearray(state)
    swapped[at:at + 4], swapped[at + 12:at + 16] = state[at + 12:at + 16], state[at:at + 4]
    got = plan.read(np.frombuffer(bytes(swapped), np.uint8), first)[0]
    row = layout.bodies[0].k_row_bytes
    assert np.array_equal(got[:row], expected[row:2 * row])
    assert np.array_equal(got[row:2 * row], expected[:row])
    assert np.array_equal(got[2 * row:cells * row], expected[2 * row:cells * row])


def test_what_deviates_is_refused() -> None:
    state = state_of("full_plain")
    cells, first = shape_of(state)
    layout = StateLayout.parse(bytes(state))
    plan = layout.plan(cells)
    as_array = np.frombuffer(bytes(state), np.uint8)
    with pytest.raises(StateError, match="positions"):
        plan.read(as_array, first + 1)
    with pytest.raises(StateError, match="rows are missing"):
        plan.read(as_array[:-1], first)
    with pytest.raises(StateError, match="rows are missing"):
        layout.plan(cells + 1).read(as_array, first)
    rows_at = 8 + 8 + 12 * cells + 8
    for at in (0, 4, 8, 12, rows_at - 8, rows_at - 4, rows_at, rows_at + 4):
        broken = bytearray(state)
        broken[at] ^= 0x11
        with pytest.raises(StateError):
            plan.read(np.frombuffer(bytes(broken), np.uint8), first)
    broken = bytearray(state)
    broken[16 + 4] = 2  # a cell of two sequences
    with pytest.raises(StateError):
        plan.read(np.frombuffer(bytes(broken), np.uint8), first)


def test_every_cut_and_foreign_states_are_refused() -> None:
    state = bytes(state_of("iswa"))
    for size in range(len(state)):
        try:
            layout = StateLayout.parse(state[:size])
        except StateError:
            continue
        assert len(layout.bodies) == 1  # the cut between the two bodies
    with pytest.raises(StateError, match="magic"):
        StateLayout.parse(struct.pack("<I", MAGIC ^ 1) + state[4:])
    with pytest.raises(StateError, match="streams"):
        StateLayout.parse((STATES / "llama_cpp_v2_full_streams.mem").read_bytes())
