"""What moves the last bits of rows is part of the key: engines that differ in it share nothing, unless both are told
to. Needs llama-cpp-python and gguf."""

from __future__ import annotations

import os
import pathlib
import shutil
import time
from typing import Any

import llama_cpp.llama_cpp as lc
import numpy as np
import pytest
from engine import ask_in_a_process, control_logits, first_logits, open_engine
from fixtures import fleet, folder, models, page_keys, prompt_of  # noqa: F401  # fixtures
from fleet import Fleet

import pagetide
import pagetide_llama_cpp as pt

# Keys of Connector.numerics in which an engine differs that is opened with these arguments.
OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "threads": (dict(flash_attn=True), dict(flash_attn=True, n_threads=1), "threads"),
    "micro-batch": (dict(), dict(n_ubatch=256), "batch"),
    "batch": (dict(), dict(n_batch=256, n_ubatch=256), "batch"),
}


def written_by(path: pathlib.Path, fleet: Fleet, prompt: list[int], options: pt.Options,
               **arguments: Any) -> pt.Connector:
    """Detached, with all full pages of the prompt stored."""
    llama = open_engine(path, **arguments)
    connector = pt.attach(llama, router=fleet.router.grpc, options=options)
    assert connector.refused_because == ""
    first_logits(llama, prompt)
    assert connector.flush() and connector.stored_tokens == len(prompt) // 256 * 256
    connector.detach()
    return connector


@pytest.mark.parametrize("in_key", [True, False], ids=["in the key", "shared"])
@pytest.mark.parametrize("what", OTHERS)
def test_engines_of_other_numerics_share_only_if_told_to(what: str, in_key: bool, fleet: Fleet,
                                                         models: dict[str, pathlib.Path]) -> None:
    first, second, differs = OTHERS[what]
    options = pt.Options(numerics_in_key=in_key)
    prompt = prompt_of(600, 201 + 2 * list(OTHERS).index(what) + in_key)
    writer = written_by(models["llama"], fleet, prompt, options, **first)
    llama = open_engine(models["llama"], **second)
    expected = control_logits(open_engine(models["llama"], **second), None, prompt, 0)
    reader = pt.attach(llama, router=fleet.router.grpc, options=options)
    assert {key for key in writer.numerics if writer.numerics[key] != reader.numerics[key]} == {differs}
    got = first_logits(llama, prompt)
    assert reader.last is not None
    if in_key:
        assert (reader.last.loaded_tokens, reader.last.limit) == (0, "never_stored")
        assert np.array_equal(got, expected)
    else:
        assert reader.last.loaded_tokens == 512, reader.last.reason
        assert np.abs(got - expected).max() < 0.1  # rows of another's last bits
    reader.detach()


def test_who_shares_by_choice_does_not_meet_who_does_not(fleet: Fleet, models: dict[str, pathlib.Path]) -> None:
    """Else rows of unknown last bits would be found under a key that promises equal ones."""
    prompt = prompt_of(600, 221)
    written_by(models["llama"], fleet, prompt, pt.Options(numerics_in_key=False))
    llama = open_engine(models["llama"])
    reader = pt.attach(llama, router=fleet.router.grpc)
    first_logits(llama, prompt)
    assert reader.last is not None and reader.last.loaded_tokens == 0
    reader.detach()


def named_records(segments: pathlib.Path) -> dict[bytes, str]:
    """Page key → numerics id of the records in a store's folder (docs/store_format.md)."""
    found = {}
    for path in segments.glob("*.seg"):
        data = path.read_bytes()
        for at in range(0, len(data), 64):
            if data[at:at + 4] == b"PTPG":
                n = int.from_bytes(data[at + 172:at + 174], "little")
                found[data[at + 32:at + 64]] = data[at + 192:at + 192 + n].decode()
    return found


def test_the_page_record_names_its_writer(fleet: Fleet, folder: pathlib.Path,
                                          models: dict[str, pathlib.Path]) -> None:
    prompt = prompt_of(600, 231)
    writer = written_by(models["llama"], fleet, prompt, pt.Options())
    assert writer._model is not None
    with pagetide.Client(router=fleet.router.grpc) as client:
        keys = page_keys(client, writer._model, prompt)
    named: dict[bytes, str] = {}
    deadline = time.monotonic() + 30
    while not set(keys.values()) <= set(named) and time.monotonic() < deadline:  # written behind the answers
        named = named_records(folder / "store" / "segments")
    ours = writer._spec.numerics_id
    assert [named.get(key) for key in keys.values()] == [ours] * 2
    settings, numerics = ours.removeprefix("llama.cpp-").split("-")
    assert len(settings) == len(numerics) == 32
    assert writer.numerics["features"] == lc.llama_print_system_info().decode()
    assert any(name.startswith("libllama") for name, _ in writer.numerics["libraries"])
    assert any(name.startswith("libggml") for name, _ in writer.numerics["libraries"])


def test_another_build_of_llama_cpp_is_another_writer(fleet: Fleet, folder: pathlib.Path,
                                                      models: dict[str, pathlib.Path]) -> None:
    """A process that loads llama.cpp from another folder: the same libraries, then one of them with a byte more."""
    prompt = prompt_of(600, 241)
    order = dict(model=str(models["llama"]), router=fleet.router.grpc, arguments={}, prompt=prompt,
                 out=str(folder / "build.npy"))
    assert ask_in_a_process(order)["stored"] == 512
    copied = folder / "lib"
    shutil.copytree(pathlib.Path(str(lc._lib._name)).parent, copied)
    environment = {**os.environ, "LLAMA_CPP_LIB_PATH": str(copied)}
    report = ask_in_a_process(order, environment)
    assert report["loaded"] == 512, report
    for library in copied.glob("libggml-base*"):  # a wheel has no links but a copy a name
        if not library.is_symlink():
            with open(library, "ab") as file:
                file.write(b"\0")
    report = ask_in_a_process(order, environment)
    assert (report["loaded"], report["stored"], report["refused"]) == (0, 512, "")
