#!/usr/bin/env python3
"""Makes ggml_blocks.txt: groups of 32 floats with ggml's own encodings, by running ggml's code.

    tests/kernels/data/make_ggml_vectors.py GGML_SRC > tests/kernels/data/ggml_blocks.txt

GGML_SRC is the folder ggml/src of a ggml or llama.cpp source tree. The committed file came from the
source distribution of llama-cpp-python 0.3.36 (ggml 0.25.3):
    pip download --no-deps --no-binary :all: llama-cpp-python==0.3.36
    tar xzf llama_cpp_python-0.3.36.tar.gz
    …/make_ggml_vectors.py llama_cpp_python-0.3.36/vendor/llama.cpp/ggml/src > …/ggml_blocks.txt
Only ggml-quants.c is compiled, for the baseline instruction set, so that neither FMA nor a vector
variant changes a bit of the reference functions.

One line a group: 128 bytes of input (f32, little-endian, hex), then for each type of TYPES the
encoded bytes (hex) and the FNV-1a 64 of the 128 bytes ggml decodes them to, separated by blanks.
ggml leaves the codes of iq4_nl uninitialised where no element reaches 1e-15 (its scale is 0 there);
such groups are written with codes of 0, as PageTide encodes them.
"""

import ctypes
import math
import pathlib
import random
import struct
import subprocess
import sys
import tempfile

TYPES = [("q8_0", 34), ("q5_0", 22), ("q5_1", 24), ("q4_0", 18), ("q4_1", 20), ("iq4_nl", 18)]


def build(source: pathlib.Path, folder: str) -> ctypes.CDLL:
    library = pathlib.Path(folder) / "libquants.so"
    # Symbols of the rest of ggml stay undefined; the functions called here need none.
    subprocess.run(
        ["cc", "-O2", "-std=c11", "-D_GNU_SOURCE", "-ffp-contract=off", "-fPIC", "-shared", "-w",
         "-I", str(source), "-I", str(source.parent / "include"),
         str(source / "ggml-quants.c"), "-lm", "-o", str(library)],
        check=True)
    return ctypes.CDLL(str(library), mode=1)  # RTLD_LAZY


def groups():
    rng = random.Random(20261121)
    yield [float(j - 16) for j in range(32)]
    yield [0.0] * 32
    yield [-0.0] * 32
    yield [1.0] * 32
    yield [-3.5] * 32
    yield [0.0] * 31 + [-2.0]
    yield [5.0] + [0.0] * 31
    yield [(-1.0) ** j for j in range(32)]
    yield [-((-1.0) ** j) for j in range(32)]
    yield [-0.0 if j % 2 else 0.0 for j in range(31)] + [1e-3]
    # Halfway between codes: scale exactly 1 for q8_0, 1 for q4_0, 1 for q5_0, 1 for q4_1.
    yield [127.0] + [j - 15.5 for j in range(31)]
    yield [-127.0] + [j + 0.5 for j in range(31)]
    yield [-8.0] + [(j - 15) / 2 for j in range(31)]
    yield [-16.0] + [j - 15.5 for j in range(31)]
    yield [0.0, 15.0] + [j / 2 for j in range(30)]
    yield [0.0, 31.0] + [j + 0.5 for j in range(30)]
    # iq4_nl's midpoints and their neighbours.
    levels = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]
    middles = [(a + b) / 2 for a, b in zip(levels, levels[1:])]
    yield [-127.0] + middles + [m + 2.0 ** -16 for m in middles] + [1.0]
    yield [-127.0] + middles + [m - 2.0 ** -16 for m in middles] + [1.0]
    # Magnitudes: subnormal scales, just below and above f16's smallest, up to its largest.
    for exponent in list(range(-32, 5)) + [-14, -15, -24, -25]:
        yield [rng.gauss(0, 1) * 10.0 ** exponent for _ in range(32)]
    yield [65504.0 * 127 * (j - 31) / 31 for j in range(32)]
    yield [60000.0 - 100 * j for j in range(32)]
    # What K and V rows look like: normal, with outlier channels, and skewed.
    for _ in range(48):
        scale = math.exp(rng.uniform(-4, 3))
        yield [rng.gauss(0, scale) for _ in range(32)]
    for _ in range(16):
        group = [rng.gauss(0, 1) for _ in range(32)]
        group[rng.randrange(32)] *= 50
        yield group
    for _ in range(16):
        yield [abs(rng.gauss(0, 1)) + 3 for _ in range(32)]
    # Ties for the largest magnitude, of either sign first.
    for _ in range(16):
        group = [rng.uniform(-1, 1) for _ in range(32)]
        a, b = rng.sample(range(32), 2)
        group[a], group[b] = 1.5, -1.5
        yield group
    for _ in range(32):
        yield [rng.randrange(-64, 65) / 8 for _ in range(32)]


def fnv1a(data: bytes) -> int:
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 % 2 ** 64
    return value


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        ggml = build(pathlib.Path(sys.argv[1]), folder)
        print("# Made by make_ggml_vectors.py (see there for the columns) from ggml 0.25.3.")
        for group in groups():
            raw = struct.pack("<32f", *group)
            floats = (ctypes.c_float * 32).from_buffer_copy(raw)
            columns = [raw.hex()]
            for name, size in TYPES:
                encoded = (ctypes.c_uint8 * size)()
                getattr(ggml, f"quantize_row_{name}_ref")(floats, encoded, ctypes.c_int64(32))
                if name == "iq4_nl" and max(abs(x) for x in floats) < ctypes.c_float(1e-15).value:
                    encoded = (ctypes.c_uint8 * size)()
                decoded = (ctypes.c_float * 32)()
                getattr(ggml, f"dequantize_row_{name}")(encoded, decoded, ctypes.c_int64(32))
                columns += [bytes(encoded).hex(), f"{fnv1a(bytes(decoded)):016x}"]
            print(" ".join(columns))


if __name__ == "__main__":
    main()
