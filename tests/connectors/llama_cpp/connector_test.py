"""The connector with tiny models of random weights, against real programs: logits, not only tokens, and what
it does when PageTide is not there, slow or wrong. Needs llama-cpp-python and gguf."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any, Iterator

import numpy as np
import pytest
from engine import SETTINGS, control_logits, first_logits, logits_of, open_engine
from fleet import Fleet
from tiny_model import VOCABULARY, write_tiny_model

import pagetide
import pagetide_llama_cpp as pt

Q8_0 = 8  # ggml's number
CASES = {
    "plain-f16": ("llama", dict()),
    "plain-f16-fa": ("llama", dict(flash_attn=True)),
    "plain-q8_0-fa": ("llama", dict(flash_attn=True, type_k=Q8_0, type_v=Q8_0)),
    "plain-q8_0-k-only": ("llama", dict(type_k=Q8_0)),
    "window-f16": ("gemma3", dict()),
    "window-q8_0-fa": ("gemma3", dict(flash_attn=True, type_k=Q8_0, type_v=Q8_0)),
}


def prompt_of(n: int, seed: int) -> list[int]:
    return [1] + [int(t) for t in np.random.default_rng(seed).integers(3, VOCABULARY, n - 1)]


@pytest.fixture(scope="module")
def folder() -> Iterator[pathlib.Path]:
    with tempfile.TemporaryDirectory(prefix="pt-llama-") as name:
        yield pathlib.Path(name)


@pytest.fixture(scope="module")
def models(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    return {
        "llama": write_tiny_model(folder / "llama.gguf", "llama"),
        # A window that is no multiple of a page and shorter than one.
        "gemma3": write_tiny_model(folder / "gemma3.gguf", "gemma3", layers=6, window=96),
    }


@pytest.fixture(scope="module")
def fleet(folder: pathlib.Path) -> Iterator[Fleet]:
    fleet = Fleet(folder, pool="128MiB", model_pool="8MiB")
    yield fleet
    fleet.close()


@pytest.mark.parametrize("case", CASES)
def test_logits_cold_and_warm_are_those_of_the_control(
        case: str, models: dict[str, pathlib.Path], fleet: Fleet) -> None:
    architecture, arguments = CASES[case]
    path = models[architecture]
    written = prompt_of(700, 1)
    asked = written[:600] + prompt_of(60, 2)[1:]
    control = open_engine(path, **arguments)
    again = [control_logits(control, None, written, 0) for _ in range(2)]
    assert np.array_equal(again[0], again[1])  # else nothing below says anything

    first = open_engine(path, **arguments)
    cold = pt.attach(first, router=fleet.router.grpc)
    assert cold.refused_because == ""
    assert np.array_equal(first_logits(first, written), again[0])
    assert cold.last is not None and cold.last.loaded_tokens == 0
    assert cold.flush()
    assert cold.stored_tokens == 512 and cold.dropped_tokens == 0

    second = open_engine(path, **arguments)
    warm = pt.attach(second, router=fleet.router.grpc)
    got = first_logits(second, asked)
    assert warm.last is not None
    assert warm.last.loaded_tokens == 512, warm.last.reason
    assert np.array_equal(got, control_logits(control, written, asked, 512))
    # What the context holds anyway is not loaded again, and not less of it is used.
    longer = asked + prompt_of(9, 3)[1:]
    first_logits(second, longer)
    assert (warm.last.live_tokens, warm.last.loaded_tokens) == (len(asked), 0)
    assert warm.counters["loaded_tokens"] == 512 and warm.counters["failures"] == 0
    # Back to the other prompt: its pages replace what the context holds.
    got = first_logits(second, written[:513] + [7, 8])
    assert warm.last.loaded_tokens == 0 and warm.last.live_tokens == 513
    for connector in (cold, warm):
        connector.detach()


def test_a_wrong_page_changes_the_logits(models: dict[str, pathlib.Path], fleet: Fleet) -> None:
    """That the comparison of the test above can fail: one row of one page is another's."""
    path = models["llama"]
    asked = prompt_of(300, 11)
    llama = open_engine(path)
    connector = pt.attach(llama, router=fleet.router.grpc)
    llama.eval(asked)
    context = connector._context
    assert context is not None
    blocks = context.cut(0, 256)
    wrong = blocks[0].copy()
    wrong[256 * 100:256 * 101] = wrong[256 * 200:256 * 201]  # K rows of layer 0, 256 bytes each
    with pagetide.Client(router=fleet.router.grpc) as client:
        model = client.register_model(connector._spec)
        with client.open(model, asked) as sequence, sequence.begin_append(asked[:256]) as append:
            append.write_block(0, 256, wrong)
            append.commit()
    context.clear()
    got = first_logits(llama, asked)
    assert connector.last is not None and connector.last.loaded_tokens == 256
    expected = control_logits(open_engine(path), asked, asked, 256)
    assert not np.array_equal(got, expected)
    assert np.abs(got - expected).max() > 1e-3
    connector.detach()


def ask_in_a_process(order: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(pathlib.Path(__file__).with_name("engine.py"))], input=json.dumps(order),
        capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def test_another_process_and_a_restart_of_everything(
        models: dict[str, pathlib.Path], folder: pathlib.Path) -> None:
    home = folder / "restart"
    home.mkdir()
    written = prompt_of(700, 21)
    asked = written[:650] + [5, 6, 7]
    out = str(folder / "logits.npy")
    order = dict(model=str(models["gemma3"]), arguments={}, prompt=written, out=out)
    expected = control_logits(open_engine(models["gemma3"]), written, asked, 512)
    fleet = Fleet(home, pool="64MiB")
    try:
        report = ask_in_a_process({**order, "router": fleet.router.grpc})
        assert (report["loaded"], report["stored"], report["refused"]) == (0, 512, "")
        report = ask_in_a_process({**order, "router": fleet.router.grpc, "prompt": asked})
        assert report["loaded"] == 512
        assert np.array_equal(np.load(out), expected)
        for program in (*fleet.workers, fleet.router, fleet.store):
            assert program.terminate() == 0
    finally:
        fleet.close()
    fleet = Fleet(home, pool="64MiB")
    try:
        report = ask_in_a_process({**order, "router": fleet.router.grpc, "prompt": asked})
        assert report["loaded"] == 512, report["reason"]
        assert np.array_equal(np.load(out), expected)
    finally:
        fleet.close()


def test_without_pagetide_generation_goes_on_and_says_why(models: dict[str, pathlib.Path],
                                                          folder: pathlib.Path) -> None:
    asked = prompt_of(300, 31)
    expected = control_logits(open_engine(models["llama"]), None, asked, 0)
    llama = open_engine(models["llama"])
    connector = pt.attach(llama, router=f"unix:{folder}/nobody")
    assert np.array_equal(first_logits(llama, asked), expected)
    assert connector.last is not None and "UNAVAILABLE" in connector.last.reason
    assert connector.counters["failures"] == 1
    # The next prompt does not wait for it again.
    began = time.monotonic()
    connector.prepare(prompt_of(300, 32))
    assert time.monotonic() - began < 0.5
    assert "asked again" in connector.last.reason
    connector.detach()


def test_a_worker_that_dies_or_stalls_costs_a_recompute(models: dict[str, pathlib.Path],
                                                        folder: pathlib.Path) -> None:
    home = folder / "dying"
    home.mkdir()
    fleet = Fleet(home, pool="64MiB")
    options = pt.Options(timeout=0.5, cool_down=0)
    try:
        written = prompt_of(700, 41)
        expected = control_logits(open_engine(models["llama"]), None, written, 0)
        first = open_engine(models["llama"])
        cold = pt.attach(first, router=fleet.router.grpc, options=options)
        first_logits(first, written)
        assert cold.flush()
        second = open_engine(models["llama"])
        warm = pt.attach(second, router=fleet.router.grpc, options=options)
        # It dies between the answer and the pages: mid-load.
        load = warm._load

        def kill_then_load(*arguments: Any) -> None:
            fleet.workers[0].kill()
            load(*arguments)

        warm._load = kill_then_load  # type: ignore[method-assign]
        assert np.array_equal(first_logits(second, written), expected)
        assert warm.last is not None
        assert warm.last.loaded_tokens == 0 and "PageTide" in warm.last.reason
        # And mid-store: this engine still holds its sequence.
        assert np.isfinite(first_logits(first, written + prompt_of(300, 42)[1:])).all()
        cold.flush()
        warm._load = load  # type: ignore[method-assign]
        fleet.workers = [fleet.start_worker("w1")]
        # The store has the pages of the dead one: another worker serves them.
        second.reset()
        deadline = time.monotonic() + 20
        while warm.last.loaded_tokens == 0 and time.monotonic() < deadline:
            second.reset()
            got = first_logits(second, written)
        assert warm.last.loaded_tokens == 512, warm.last.reason
        assert np.array_equal(got, control_logits(open_engine(models["llama"]), written, written, 512))
        # A worker that stalls: the wait is bounded.
        second.reset()
        fleet.workers[0].pause()
        began = time.monotonic()
        assert np.array_equal(first_logits(second, written), expected)
        assert time.monotonic() - began < 15
        assert warm.last.loaded_tokens == 0 and "PageTide" in warm.last.reason
        fleet.workers[0].resume()
        cold.detach()
        warm.detach()
    finally:
        fleet.close()


def test_contexts_that_cannot_reuse_are_refused_with_the_reason(models: dict[str, pathlib.Path],
                                                                fleet: Fleet) -> None:
    import llama_cpp
    asked = prompt_of(40, 51)
    for llama, reason in (
        (open_engine(models["gemma3"], swa_full=False), "swa_full = False"),
        (open_engine(models["llama"], logits_all=True), "logits_all"),
        (llama_cpp.Llama(str(models["llama"]), **SETTINGS), "n_seq_max = 1"),
    ):
        connector = pt.attach(llama, router=fleet.router.grpc)
        assert reason in connector.refused_because
        assert np.isfinite(first_logits(llama, asked)).all()
        assert connector.last is not None and reason in connector.last.reason
        assert connector.counters["refused"] == 1 and connector.counters["loaded_tokens"] == 0
        connector.detach()


def test_only_equal_identities_share_pages(models: dict[str, pathlib.Path], folder: pathlib.Path,
                                           fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    def digest_of(path: pathlib.Path, **arguments: Any) -> str:
        connector = pt.attach(open_engine(path, **arguments), router=fleet.router.grpc)
        assert connector.refused_because == ""
        with pagetide.Client(router=fleet.router.grpc) as client:
            digest = client.register_model(connector._spec).digest
        connector.detach()
        return digest

    base = digest_of(models["llama"])
    renamed = folder / "another-name.gguf"
    renamed.write_bytes(models["llama"].read_bytes())
    assert digest_of(renamed) == base
    assert digest_of(models["llama"], n_ctx=1024) == base
    others = {
        "weights": digest_of(write_tiny_model(folder / "w.gguf", seed=2)),
        "rope in the file": digest_of(write_tiny_model(folder / "r.gguf", freq_base=5000.0)),
        "flash attention": digest_of(models["llama"], flash_attn=True),
        "rope in the context": digest_of(models["llama"], rope_freq_base=20000.0),
        "rope scale": digest_of(models["llama"], rope_freq_scale=0.5),
        "K type": digest_of(models["llama"], type_k=Q8_0),
        "override": digest_of(models["llama"], kv_overrides={"llama.attention.layer_norm_rms_epsilon": 1e-4}),
    }
    monkeypatch.setenv("LLAMA_ATTN_ROT_DISABLE", "1")
    others["basis"] = digest_of(models["llama"], type_k=Q8_0)
    assert len({base, *others.values()}) == 1 + len(others), others


def test_completions_chat_and_short_prompts_work_as_ever(models: dict[str, pathlib.Path],
                                                         fleet: Fleet) -> None:
    llama = open_engine(models["llama"])
    connector = pt.attach(llama, router=fleet.router.grpc)
    plain = open_engine(models["llama"])
    for text in ("a", "hello " * 60, "hello " * 61):
        answers = [engine.create_completion(text, max_tokens=8, temperature=0.0)["choices"][0]["text"]
                   for engine in (llama, plain)]
        assert answers[0] == answers[1]
    # Nothing of the prompt is computed twice: pages of 256 tokens were stored on the way.
    assert connector.flush() and connector.stored_tokens >= 256
    # generate(reset=False) continues what the context holds, and asks nothing.
    prompts = connector.counters["prompts"]
    next(llama.generate([5, 6], temp=0.0, reset=False))
    assert connector.counters["prompts"] == prompts
    assert np.isfinite(logits_of(llama)).all()
    connector.detach()
    assert llama.generate.__func__ is type(llama).generate
