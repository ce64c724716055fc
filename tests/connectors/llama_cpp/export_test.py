"""Sequence states of a llama.cpp that runs here, through `pagetide import` and `pagetide export` against real
programs: they come out bit for bit, and llama.cpp goes on from what came out with the same logits. Needs
llama-cpp-python and gguf."""

from __future__ import annotations

import ctypes
import hashlib
import json
import pathlib
import subprocess
import sys
import tempfile
from typing import Any, Iterator

import numpy as np
import pytest
from fleet import BIN, Fleet

import pagetide
from pagetide.v1 import model_pb2

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "formats" / "testdata"))
import llama_cpp.llama_cpp as ll  # noqa: E402
import make_llama_cpp_states as states  # noqa: E402

F32, F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL, BF16 = 0, 1, 2, 3, 6, 7, 8, 20, 30
TYPES = {
    F32: model_pb2.DATA_TYPE_F32, F16: model_pb2.DATA_TYPE_F16, BF16: model_pb2.DATA_TYPE_BF16,
    Q4_0: model_pb2.DATA_TYPE_Q4_0, Q4_1: model_pb2.DATA_TYPE_Q4_1, Q5_0: model_pb2.DATA_TYPE_Q5_0,
    Q5_1: model_pb2.DATA_TYPE_Q5_1, Q8_0: model_pb2.DATA_TYPE_Q8_0,
    IQ4_NL: model_pb2.DATA_TYPE_IQ4_NL}
# Architecture, flash attention (off: V is transposed), types of K and V, one stream for all sequences.
CASES: dict[str, tuple[str, bool, int, int, bool]] = {
    "plain": ("llama", True, F16, F16, True),
    "transposed": ("llama", False, F16, F16, True),
    "transposed-f32": ("llama", False, F32, F32, True),
    "streams": ("llama", True, BF16, F16, False),
    "q8_0": ("llama", True, Q8_0, Q8_0, True),
    "q4_0": ("llama", True, Q4_0, Q4_0, True),
    "q4_1": ("llama", True, Q4_1, Q4_1, True),
    "q5_0": ("llama", True, Q5_0, Q5_0, True),
    "q5_1": ("llama", True, Q5_1, Q5_1, True),
    "iq4_nl": ("llama", True, IQ4_NL, IQ4_NL, True),
    "q8_0-k-only": ("llama", False, Q8_0, F16, True),
    "window": ("gemma3", True, F16, F16, True),
    "window-transposed": ("gemma3", False, F16, F16, True),
    "window-q8_0": ("gemma3", True, Q8_0, Q8_0, True),
}
LAYERS = {"llama": 2, "gemma3": 6}
SEQUENCE = 1
# Beyond the window's cells, so that they go round.
TOKENS = [(7 * i + 3) % states.VOCABULARY for i in range(150)]


@pytest.fixture(scope="module", autouse=True)
def plain_basis() -> Iterator[None]:
    """Rows as they are computed: the format does not say whether they are rotated."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAMA_ATTN_ROT_DISABLE", "1")
        yield


@pytest.fixture(scope="module")
def folder() -> Iterator[pathlib.Path]:
    with tempfile.TemporaryDirectory(prefix="pt-export-") as name:
        yield pathlib.Path(name)


@pytest.fixture(scope="module")
def fleet(folder: pathlib.Path) -> Iterator[Fleet]:
    fleet = Fleet(folder, pool="64MiB", model_pool="4MiB")
    yield fleet
    fleet.close()


@pytest.fixture(scope="module")
def models(folder: pathlib.Path) -> dict[str, Any]:
    ll.llama_backend_init()
    loaded = {}
    for arch, layers in LAYERS.items():
        path = str(folder / f"{arch}.gguf")
        states.write_model(path, arch, layers)
        params = ll.llama_model_default_params()
        params.n_gpu_layers = 0
        loaded[arch] = ll.llama_model_load_from_file(path.encode(), params)
        assert loaded[arch]
    return loaded


def spec_of(case: str) -> model_pb2.ModelSpec:
    arch, _, type_k, type_v, _ = CASES[case]
    spec = model_pb2.ModelSpec(
        name=f"export-{case}", weights_digest=hashlib.sha256(arch.encode()).digest(),
        tokenizer_digest=hashlib.sha256(b"none").digest())
    spec.geometry.page_tokens = 16
    window = list(range(5)) if arch == "gemma3" else []
    for layers in (window, [i for i in range(LAYERS[arch]) if i not in window]):
        if not layers:
            continue
        group = spec.geometry.groups.add(
            kind=model_pb2.LayerGroup.KIND_FULL, layers=layers, k_type=TYPES[type_k],
            v_type=TYPES[type_v], kv_heads=states.KV_HEADS, k_dim=states.HEAD_DIM,
            v_dim=states.HEAD_DIM)
        if layers is window:
            group.kind = model_pb2.LayerGroup.KIND_WINDOW
            group.window_type = model_pb2.LayerGroup.WINDOW_TYPE_STANDARD
            group.window_tokens = 8
    return spec


def run(*arguments: str) -> str:
    done = subprocess.run([str(BIN / "pagetide"), *arguments], capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def save(context: Any, path: pathlib.Path) -> bytes:
    array = (ctypes.c_int32 * len(TOKENS))(*TOKENS)
    written = ll.llama_state_seq_save_file(
        context, str(path).encode(), SEQUENCE, array, len(TOKENS))
    assert written == path.stat().st_size > 0
    return path.read_bytes()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", ["file", "memory"])
def test_a_state_comes_out_as_it_went_in(folder: pathlib.Path, fleet: Fleet, models: dict[str, Any],
                                         case: str, form: str) -> None:
    arch, flash, type_k, type_v, unified = CASES[case]

    def new_context() -> Any:
        return states.new_context(models[arch], flash, type_k, type_v, unified)

    context = new_context()
    # A prompt, then token by token, as a chat grows.
    states.decode(context, TOKENS[:60], 0, SEQUENCE)
    for at in range(60, len(TOKENS)):
        states.decode(context, [TOKENS[at]], at, SEQUENCE)
    path = folder / f"{case}.{form}"
    if form == "file":
        state = save(context, path)
    else:
        size = ll.llama_state_seq_get_size(context, SEQUENCE)
        memory = (ctypes.c_uint8 * size)()
        assert ll.llama_state_seq_get_data(context, memory, size, SEQUENCE) == size
        state = bytes(memory)
        path.write_bytes(state)
    expected = states.decode(context, [5], len(TOKENS), SEQUENCE)
    ll.llama_free(context)

    with pagetide.Client(router=fleet.router.grpc) as client:
        digest = client.register_model(spec_of(case)).digest
    worker, layout, out = fleet.workers[0].grpc, folder / "layout.json", folder / "out"
    arguments = ["import", str(path), "--model", digest, "--worker", worker, "--basis", "plain",
                 "--layout-out", str(layout), "--json"]
    if form == "memory":
        arguments += ["--tokens", ",".join(map(str, TOKENS))]
    imported = json.loads(run(*arguments))
    assert int(imported["state"]["length"]) == len(TOKENS)
    run("export", imported["state"]["sequence_id"], str(out), "--worker", worker,
        "--format", "llama.cpp", "--layout", str(layout))
    assert out.read_bytes() == state

    # What comes out without the layout is a state of the same rows, its cells in order.
    plain = json.loads(layout.read_text())
    plain.pop("llamaCells", None)
    layout.write_text(json.dumps(plain))
    run("export", imported["state"]["sequence_id"], str(out), "--worker", worker,
        "--format", "llama.cpp", "--layout", str(layout))
    other = new_context()
    if form == "file":
        array = (ctypes.c_int32 * len(TOKENS))()
        count = ctypes.c_size_t()
        taken = ll.llama_state_seq_load_file(
            other, str(out).encode(), SEQUENCE, array, len(TOKENS), ctypes.byref(count))
        assert list(array) == TOKENS
    else:
        again = out.read_bytes()
        taken = ll.llama_state_seq_set_data(
            other, (ctypes.c_uint8 * len(again)).from_buffer_copy(again), len(again), SEQUENCE)
    assert taken == out.stat().st_size
    logits = states.decode(other, [5], len(TOKENS), SEQUENCE)
    ll.llama_free(other)
    # The order of cells changes last bits of llama.cpp's own sums.
    difference = float(np.abs(logits - expected).max())
    print(f"{case} {form}: {len(state)} bytes, logits differ by {difference}")
    assert difference < 1e-2
