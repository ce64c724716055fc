"""NumPy arrays for other libraries, read-only ones included: the frames of a worker's pool, mapped here, as a
tensor of PyTorch or JAX, without a copy.

NumPy itself gives no read-only array away, because DLPack before its version 1.0 has no word for "read-only".
Frames are read-only by their mapping: who writes into a tensor of them gets SIGSEGV and changes nothing.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

_CPU = 1
_CODES = {"i": 0, "u": 1, "f": 2}  # DLDataTypeCode
_NAME = b"dltensor"  # of a capsule that nobody has taken


class _Device(ctypes.Structure):
    _fields_ = [("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32)]


class _DataType(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class _Tensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("device", _Device), ("ndim", ctypes.c_int32),
                ("dtype", _DataType), ("shape", ctypes.POINTER(ctypes.c_int64)),
                ("strides", ctypes.POINTER(ctypes.c_int64)), ("byte_offset", ctypes.c_uint64)]


class _Managed(ctypes.Structure):
    """DLManagedTensor of <dlpack/dlpack.h>."""


_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Managed))
_Managed._fields_ = [("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _Deleter)]
_Destructor = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

# Prototypes of our own: those of ctypes.pythonapi are everybody's.
_new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi))
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_IsValid", ctypes.pythonapi))
_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi))
_hold = ctypes.PYFUNCTYPE(None, ctypes.py_object)(("Py_IncRef", ctypes.pythonapi))
_let_go = ctypes.PYFUNCTYPE(None, ctypes.py_object)(("Py_DecRef", ctypes.pythonapi))


class _Holder:
    """What a tensor that was given away stands on; held by a reference that its deleter gives back."""

    def __init__(self, array: npt.NDArray[Any]) -> None:
        self.array = array
        self.shape = (ctypes.c_int64 * array.ndim)(*array.shape)
        self.strides = (ctypes.c_int64 * array.ndim)(*(s // array.itemsize for s in array.strides))
        self.managed = _Managed(
            _Tensor(array.ctypes.data, _Device(_CPU, 0), array.ndim,
                    _DataType(_CODES[array.dtype.kind], array.itemsize * 8, 1), self.shape,
                    self.strides, 0),
            id(self), _delete)


@_Deleter
def _delete(managed: Any) -> None:
    _let_go(ctypes.cast(managed.contents.context, ctypes.py_object).value)


@_Destructor
def _drop(capsule: int) -> None:
    # Of a capsule that was taken the deleter is the taker's to call; it has another name then.
    if _is_valid(capsule, _NAME):
        _delete(ctypes.cast(_pointer(capsule, _NAME), ctypes.POINTER(_Managed)))


class DlpackView:
    """An array for from_dlpack of NumPy, PyTorch, JAX: theirs is a view of the same memory, and keeps it."""

    def __init__(self, array: npt.NDArray[Any]) -> None:
        """ValueError for elements that are no integers or floats, and strides that are no multiples of them."""
        if array.dtype.kind not in _CODES or not array.dtype.isnative:
            raise ValueError(f"DLPack view of {array.dtype}: not integers or floats of this machine")
        if any(s % array.itemsize for s in array.strides):
            raise ValueError(f"DLPack view of strides {array.strides}: not multiples of {array.itemsize}")
        self.array = array

    def __dlpack_device__(self) -> tuple[int, int]:
        return _CPU, 0

    def __dlpack__(self, *, stream: Any = None, max_version: Any = None, dl_device: Any = None,
                   copy: Any = None) -> Any:
        """A capsule. Later versions of DLPack know arguments: a copy or another device is refused."""
        if stream is not None or copy or dl_device not in (None, (_CPU, 0)):
            raise BufferError("DLPack view of host memory: no streams, copies or other devices")
        holder = _Holder(self.array)
        _hold(holder)
        return _new(ctypes.addressof(holder.managed), _NAME, ctypes.cast(_drop, ctypes.c_void_p))
