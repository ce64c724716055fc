"""The connector with tiny models of random weights, against real programs: logits, not only tokens. Needs
llama-cpp-python and gguf."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest
from engine import ask_in_a_process, control_logits, first_logits, logits_of, open_engine
from fixtures import Q8_0, fleet, folder, models, prompt_of  # noqa: F401  # fixtures
from fleet import Fleet

import pagetide
import pagetide_llama_cpp as pt

CASES = {
    "plain-f16": ("llama", dict()),
    "plain-f16-fa": ("llama", dict(flash_attn=True)),
    "plain-q8_0-fa": ("llama", dict(flash_attn=True, type_k=Q8_0, type_v=Q8_0)),
    "plain-q8_0-k-only": ("llama", dict(type_k=Q8_0)),
    "window-f16": ("gemma3", dict()),
    "window-q8_0-fa": ("gemma3", dict(flash_attn=True, type_k=Q8_0, type_v=Q8_0)),
}


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


def test_rows_that_went_past_the_connector_are_neither_stored_nor_built_upon(
        models: dict[str, pathlib.Path], fleet: Fleet) -> None:
    """What the wrapper's handlers of images do: they decode by themselves and raise n_tokens, which leaves the
    ids of an earlier prompt where the image's rows are."""
    path = models["llama"]
    text = prompt_of(700, 51)
    llama = open_engine(path)
    connector = pt.attach(llama, router=fleet.router.grpc)
    first_logits(llama, text)
    assert connector.flush() and connector.stored_tokens == 512
    llama.reset()
    llama.eval(text[:10])
    llama._batch.set_batch(batch=prompt_of(256, 52), n_past=10, logits_all=False)
    llama._ctx.decode(llama._batch)
    llama.n_tokens += 256
    assert np.array_equal(llama.input_ids[:266], text[:266])
    first_logits(llama, text[:266] + prompt_of(300, 53)[1:])
    assert connector.last is not None and connector.last.limit == "refused"
    assert "256 rows of inputs that are not tokens" in connector.last.reason
    assert connector.flush() and connector.stored_tokens == 512
    # The same for a state that anybody may have saved.
    first_logits(llama, prompt_of(300, 54))
    assert connector.last.limit != "refused"
    assert connector.flush() and connector.stored_tokens == 768
    llama.load_state(llama.save_state())
    first_logits(llama, [int(t) for t in llama.input_ids[:llama.n_tokens]] + prompt_of(300, 55)[1:])
    assert connector.last.limit == "refused"
    assert connector.flush() and connector.stored_tokens == 768
    connector.detach()

    control = open_engine(path)
    fresh = open_engine(path)
    warm = pt.attach(fresh, router=fleet.router.grpc)
    asked = text[:600] + [5]
    got = first_logits(fresh, asked)
    assert warm.last is not None and warm.last.loaded_tokens == 512
    assert np.array_equal(got, control_logits(control, text, asked, 512))
    warm.detach()


def test_a_load_ends_when_its_time_is_up(models: dict[str, pathlib.Path], fleet: Fleet) -> None:
    path = models["llama"]
    written = prompt_of(700, 61)
    llama = open_engine(path)
    connector = pt.attach(llama, router=fleet.router.grpc)
    first_logits(llama, written)
    assert connector.flush()
    connector.detach()
    second = open_engine(path)
    warm = pt.attach(second, router=fleet.router.grpc, options=pt.Options(max_load_seconds=0.0))
    got = first_logits(second, written)
    assert warm.last is not None
    assert (warm.last.loaded_tokens, warm.last.limit) == (256, "shortened")
    assert "256 of 512 tokens were loaded" in warm.last.reason
    assert np.array_equal(got, control_logits(open_engine(path), written, written, 256))
    warm.detach()


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
