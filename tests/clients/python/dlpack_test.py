"""Arrays that are given to other libraries, and the example of both kinds of pool as tensors, against a real fleet."""

from __future__ import annotations

import ctypes
import gc
import pathlib
import re
import subprocess
import sys
import tempfile
import weakref
from typing import Any

import numpy as np
import pytest
from fleet import Fleet

import pagetide

EXAMPLES = pathlib.Path(__file__).resolve().parents[3] / "clients/python/examples"


class Owner(np.ndarray):
    """An array whose end can be seen."""


def owned(array: np.ndarray) -> tuple[Any, "weakref.ref[Any]"]:
    view = array.view(Owner)
    return view, weakref.ref(view)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float16, np.float32])
def test_a_read_only_array_is_seen_without_a_copy(dtype: Any) -> None:
    array = np.arange(24, dtype=dtype).reshape(2, 3, 4)
    read_only = array.view()
    read_only.flags.writeable = False
    seen = np.from_dlpack(pagetide.DlpackView(read_only))
    assert seen.dtype == array.dtype and seen.shape == (2, 3, 4)
    array[1, 2, 3] = 7
    assert seen[1, 2, 3] == 7 and np.array_equal(seen, array)
    assert not seen.flags.writeable
    # Strides, and no elements at all.
    assert np.array_equal(np.from_dlpack(pagetide.DlpackView(array[:, ::2, 1:3])), array[:, ::2, 1:3])
    assert np.from_dlpack(pagetide.DlpackView(array[:0])).shape == (0, 3, 4)


def test_who_took_it_keeps_the_memory_and_nobody_else_does() -> None:
    array, life = owned(np.arange(8))
    seen = np.from_dlpack(pagetide.DlpackView(array))
    del array
    gc.collect()
    assert life() is not None and seen[5] == 5
    del seen
    gc.collect()
    assert life() is None
    # A capsule that nobody takes.
    array, life = owned(np.arange(8))
    capsule = pagetide.DlpackView(array).__dlpack__()
    del array
    gc.collect()
    assert life() is not None
    del capsule
    gc.collect()
    assert life() is None


def test_what_cannot_be_told_is_refused() -> None:
    with pytest.raises(ValueError, match="bool"):
        pagetide.DlpackView(np.zeros(3, bool))
    with pytest.raises(ValueError, match="not integers or floats"):
        pagetide.DlpackView(np.zeros(3, ">f4"))
    packed = np.zeros(3, np.dtype([("a", np.uint8), ("b", np.uint32)]))
    with pytest.raises(ValueError, match="strides"):
        pagetide.DlpackView(packed["b"])
    view = pagetide.DlpackView(np.zeros(3))
    assert view.__dlpack_device__() == (1, 0)
    for arguments in ({"stream": 1}, {"copy": True}, {"dl_device": (2, 0)}):
        with pytest.raises(BufferError):
            view.__dlpack__(**arguments)
    assert ctypes.pythonapi.PyCapsule_New.argtypes is None  # others' prototypes are left alone


def test_frames_that_nobody_may_write_are_a_tensor(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "frames"
    file.write_bytes(bytes(range(64)))
    frames = np.memmap(file, np.uint8, "r")
    seen = np.from_dlpack(pagetide.DlpackView(frames[16:].view(np.uint32)))
    del frames
    assert seen.tobytes() == bytes(range(16, 64))


def test_the_example_reads_frames_and_fills_blocks_as_tensors() -> None:
    with tempfile.TemporaryDirectory(prefix="pt-py-") as folder:
        fleet = Fleet(pathlib.Path(folder))
        try:
            done = subprocess.run(
                [sys.executable, str(EXAMPLES / "dlpack_pools.py"), f"--router={fleet.router.grpc}"],
                capture_output=True, text=True, timeout=300, check=False)
        finally:
            fleet.close()
    assert done.returncode == 0, done.stderr
    libraries = re.findall(r"^owned: (\w+): 4 pages in place, 0 wrong elements$", done.stdout, re.MULTILINE)
    assert "numpy" in libraries, done.stdout
    for library in libraries:
        assert f"registered: {library}: 48 tokens stored, 48 loaded, 0 wrong elements" in done.stdout, done.stdout
