"""What must not be reused is not: another model, other settings, a context that is too short, logits of reused
tokens, a state that llama.cpp does not take. Generation goes on, and the reason is there. Needs llama-cpp-python
and gguf."""

from __future__ import annotations

import logging
import pathlib
from typing import Any, Callable

import numpy as np
import pytest
from engine import SETTINGS, control_logits, first_logits, logits_of, open_engine
from fixtures import Q8_0, fleet, folder, models, prompt_of  # noqa: F401  # fixtures
from fleet import Fleet
from tiny_model import write_tiny_adapter, write_tiny_model

import pagetide
import pagetide_llama_cpp as pt

BASE = dict(type_k=Q8_0)  # quantised rows, which are rotated unless told otherwise
# What makes another identity: arguments of the engine, or of the model's file.
OTHERS: dict[str, dict[str, Any]] = {
    "weights": dict(file=dict(seed=2)),
    "quantisation of the weights": dict(file=dict(weights=np.float32)),
    "tokenizer": dict(file=dict(word="term")),
    "rope in the file": dict(file=dict(freq_base=5000.0)),
    "rope in the context": dict(rope_freq_base=20000.0),
    "rope scale": dict(rope_freq_scale=0.5),
    "flash attention": dict(flash_attn=True),
    "K type": dict(type_k=1),
    "V type": dict(type_v=Q8_0, flash_attn=True),
    "basis": dict(environment=dict(LLAMA_ATTN_ROT_DISABLE="1")),
    "adapter": dict(adapter=1),
    "another adapter": dict(adapter=2),
    "the adapter's scale": dict(adapter=1, lora_scale=0.5),
    "override": dict(kv_overrides={"llama.attention.layer_norm_rms_epsilon": 1e-4}),
}


@pytest.fixture(scope="module")
def stored(models: dict[str, pathlib.Path], fleet: Fleet) -> tuple[list[int], str]:
    """A prompt that PageTide has two pages of, and the digest of its model."""
    prompt = prompt_of(600, 61)
    llama = open_engine(models["llama"], **BASE)
    connector = pt.attach(llama, router=fleet.router.grpc)
    first_logits(llama, prompt)
    assert connector.flush() and connector.stored_tokens == 512
    assert connector._model is not None
    digest = connector._model.digest
    connector.detach()
    return prompt, digest


def open_other(models: dict[str, pathlib.Path], folder: pathlib.Path, patch: pytest.MonkeyPatch,
               file: dict[str, Any] = {}, environment: dict[str, str] = {}, adapter: int = 0,
               **arguments: Any) -> Any:
    for name, value in environment.items():
        patch.setenv(name, value)
    path = models["llama"]
    if file:
        path = write_tiny_model(folder / f"{'-'.join(file)}.gguf", **file)
    if adapter:
        arguments["lora_path"] = str(write_tiny_adapter(folder / f"adapter-{adapter}.gguf", seed=adapter))
    return open_engine(path, **{**BASE, **arguments})


@pytest.mark.parametrize("what", OTHERS)
def test_another_identity_finds_nothing(what: str, models: dict[str, pathlib.Path], folder: pathlib.Path,
                                        fleet: Fleet, stored: tuple[list[int], str],
                                        monkeypatch: pytest.MonkeyPatch,
                                        caplog: pytest.LogCaptureFixture) -> None:
    prompt, digest = stored
    caplog.set_level(logging.INFO, "pagetide.llama_cpp")
    llama = open_other(models, folder, monkeypatch, **OTHERS[what])
    expected = control_logits(llama, None, prompt, 0)
    connector = pt.attach(llama, router=fleet.router.grpc)
    assert connector.refused_because == ""
    assert np.array_equal(first_logits(llama, prompt), expected)
    assert connector.last is not None and connector._model is not None
    assert (connector.last.offered_tokens, connector.last.loaded_tokens) == (0, 0)
    assert connector.last.limit == "never_stored"
    assert connector.last.reason and connector.last.reason in caplog.text
    assert connector.counters["limit_never_stored"] == 1
    assert connector._model.digest != digest
    connector.detach()


def test_what_does_not_change_rows_shares_them(models: dict[str, pathlib.Path], folder: pathlib.Path,
                                               fleet: Fleet, stored: tuple[list[int], str]) -> None:
    """Else the test above would pass with identities that are never equal."""
    prompt, digest = stored
    renamed = folder / "another-name.gguf"
    renamed.write_bytes(models["llama"].read_bytes())
    for path, arguments in ((renamed, {}), (models["llama"], dict(n_ctx=1024)),
                            (models["llama"], dict(n_threads=1))):
        llama = open_engine(path, **{**BASE, **arguments})
        connector = pt.attach(llama, router=fleet.router.grpc)
        first_logits(llama, prompt)
        assert connector.last is not None and connector._model is not None
        assert connector.last.loaded_tokens == 512 and connector._model.digest == digest
        connector.detach()


def test_a_context_shorter_than_the_prefix_takes_what_it_needs(
        models: dict[str, pathlib.Path], fleet: Fleet, stored: tuple[list[int], str]) -> None:
    prompt, _ = stored
    llama = open_engine(models["llama"], **BASE, n_ctx=512)
    connector = pt.attach(llama, router=fleet.router.grpc)
    got = first_logits(llama, prompt[:500])
    assert connector.last is not None
    assert connector.last.loaded_tokens == 499, connector.last.reason
    control = open_engine(models["llama"], **BASE)
    assert np.array_equal(got, control_logits(control, prompt, prompt[:500], 499))
    # A prompt that does not fit is the wrapper's to refuse; nothing was asked for it.
    with pytest.raises(ValueError, match="exceed context window"):
        llama.create_completion(prompt)
    report = connector.prepare(prompt)
    assert report.limit == "refused" and "600 tokens in a context of 512" in report.reason
    connector.detach()


def test_ids_behind_the_end_are_not_taken_for_a_match(
        models: dict[str, pathlib.Path], fleet: Fleet, stored: tuple[list[int], str]) -> None:
    prompt, _ = stored
    other = prompt_of(700, 62)
    llama = open_engine(models["llama"], **BASE)
    connector = pt.attach(llama, router=fleet.router.grpc)
    first_logits(llama, other)
    got = first_logits(llama, prompt[:520])
    assert connector.last is not None and connector.last.loaded_tokens == 512
    # Ids of `other` would have stood behind the 520, as the wrapper leaves them.
    assert (llama.input_ids[520:] == -1).all()
    control = open_engine(models["llama"], **BASE)
    assert np.array_equal(got, control_logits(control, prompt, prompt[:520], 512))
    mixed = prompt[:520] + other[520:]
    got = first_logits(llama, mixed)
    assert (connector.last.live_tokens, connector.last.loaded_tokens) == (520, 0)
    control_logits(control, prompt, prompt[:520], 512)
    control.eval(mixed[520:])
    assert np.array_equal(got, logits_of(control))
    connector.detach()


def test_echo_with_logprobs_is_computed_whole(models: dict[str, pathlib.Path], fleet: Fleet,
                                              stored: tuple[list[int], str]) -> None:
    """Reused tokens have no logits, so such an engine reuses nothing and says so."""
    text = "hello " * 60
    plain = open_engine(models["llama"], **BASE, logits_all=True)
    expected = plain.create_completion(text, max_tokens=4, temperature=0.0, echo=True, logprobs=1)
    llama = open_engine(models["llama"], **BASE, logits_all=True)
    connector = pt.attach(llama, router=fleet.router.grpc)
    for _ in range(2):
        got = llama.create_completion(text, max_tokens=4, temperature=0.0, echo=True, logprobs=1)
        assert got["choices"] == expected["choices"]
        assert connector.last is not None
        assert connector.last.limit == "refused" and "logits_all" in connector.last.reason
        assert connector.last.loaded_tokens == 0
        llama.reset()
    assert connector.counters["refused"] == 2
    # Asked of an engine without, the wrapper refuses as ever.
    other = open_engine(models["llama"], **BASE)
    attached = pt.attach(other, router=fleet.router.grpc)
    with pytest.raises(ValueError, match="logprobs"):
        other.create_completion(text, max_tokens=4, echo=True, logprobs=1)
    for c in (connector, attached):
        c.detach()


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


def cut_short(state: np.ndarray) -> np.ndarray:
    return state[:-1000]


def of_more_layers(state: np.ndarray) -> np.ndarray:
    # u32 magic, i32 sequence, u32 streams, u32 cells, 12 bytes a cell, u32 v_trans, u32 layers.
    cells = int(state[12:16].view("<u4")[0])
    state[20 + 12 * cells:24 + 12 * cells].view("<u4")[0] += 1
    return state


def of_other_positions(state: np.ndarray) -> np.ndarray:
    cells = int(state[12:16].view("<u4")[0])
    state[16:16 + 12 * cells].view("<i4")[::3] += 1
    return state


@pytest.mark.parametrize("damage", [cut_short, of_more_layers, of_other_positions])
def test_a_state_that_llama_cpp_does_not_take_whole_is_not_gone_on_from(
        damage: Callable[[np.ndarray], np.ndarray], models: dict[str, pathlib.Path], fleet: Fleet,
        stored: tuple[list[int], str]) -> None:
    """The bytes that llama.cpp says it took, and where the context ends then, are looked at each time."""
    prompt, _ = stored
    llama = open_engine(models["llama"], **BASE)
    expected = control_logits(llama, None, prompt, 0)
    connector = pt.attach(llama, router=fleet.router.grpc)
    context = connector._context
    assert context is not None
    stage, parts = context.stage, 0

    def damaged(*arguments: Any) -> np.ndarray:
        nonlocal parts
        parts += 1
        state = stage(*arguments)
        return damage(state) if parts == 2 else state  # the first page is in the context by then

    context.stage = damaged  # type: ignore[assignment,method-assign]
    assert np.array_equal(first_logits(llama, prompt), expected)
    assert parts == 2 and connector.last is not None
    assert connector.last.loaded_tokens == 0 and connector.last.limit == "failed"
    assert "load" in connector.last.reason
    assert connector.counters["failures"] == 1
    connector.detach()


@pytest.mark.parametrize("where", ["stage", "cut"])
def test_a_machine_without_memory_goes_on_without_pagetide(
        where: str, models: dict[str, pathlib.Path], fleet: Fleet, stored: tuple[list[int], str]) -> None:
    prompt, _ = stored
    llama = open_engine(models["llama"], **BASE)
    connector = pt.attach(llama, router=fleet.router.grpc)
    context = connector._context
    assert context is not None

    def no_memory(*arguments: Any) -> Any:
        raise MemoryError("as numpy says it")

    setattr(context, where, no_memory)
    asked = prompt if where == "stage" else prompt_of(600, 72)
    expected = control_logits(open_engine(models["llama"], **BASE), None, asked, 0)
    assert np.array_equal(first_logits(llama, asked), expected)
    assert connector.counters["failures"] == 1 and connector.counters["loaded_tokens"] == 0
    assert connector.flush() and connector.stored_tokens == 0
    connector.detach()


def test_a_model_that_is_no_file_of_ours_is_refused(models: dict[str, pathlib.Path], folder: pathlib.Path,
                                                    fleet: Fleet) -> None:
    cut = folder / "cut.gguf"
    cut.write_bytes(models["llama"].read_bytes()[:1000])
    nothing = folder / "nothing.gguf"
    nothing.write_bytes(b"")
    llama = open_engine(models["llama"])
    for path in (cut, nothing, folder / "missing.gguf"):
        connector = pt.attach(llama, router=fleet.router.grpc, model_path=str(path))
        assert path.name in connector.refused_because
        assert np.isfinite(first_logits(llama, prompt_of(40, 71))).all()
        connector.detach()


def test_without_pagetide_generation_goes_on_and_says_why(models: dict[str, pathlib.Path],
                                                          folder: pathlib.Path) -> None:
    asked = prompt_of(300, 31)
    llama = open_engine(models["llama"])
    expected = control_logits(llama, None, asked, 0)
    connector = pt.attach(llama, router=f"unix:{folder}/nobody")
    assert np.array_equal(first_logits(llama, asked), expected)
    assert connector.last is not None and "UNAVAILABLE" in connector.last.reason
    # Attaching found out.
    assert connector.counters["failures"] == 1 == connector.counters["limit_refused"]
    # The next prompt does not wait for it again.
    connector.prepare(prompt_of(300, 32))
    assert "asked again" in connector.last.reason
    assert connector.counters["failures"] == 1
    connector.detach()


def test_lookups_of_the_model_agree(fleet: Fleet, stored: tuple[list[int], str]) -> None:
    """The reason is in the answers of PageTide, too, for whoever asks it instead of the engine."""
    prompt, digest = stored
    with pagetide.Client(router=fleet.router.grpc) as client:
        model = client.find_model(digest)
        plan = client.plan(model, prompt_of(600, 99)).plan
        assert plan.reuse.reused_tokens <= 1 and plan.reuse.explanation
        with client.open(model, prompt) as sequence:
            assert sequence.length == 512 and sequence.reuse.explanation
