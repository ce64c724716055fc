"""What others do to an attached context past the wrapper: rows are dropped, moved, loaded or computed in another way. No
row that is not what its tokens make is ever stored or built upon. Needs llama-cpp-python and gguf."""

from __future__ import annotations

import ctypes
import os
import pathlib
import random
import shutil
from typing import Any, Callable

import llama_cpp
import llama_cpp.llama_cpp as lc
import numpy as np
import pytest
from engine import control_logits, first_logits, open_engine
from fixtures import Q8_0, fleet, folder, models, prompt_of  # noqa: F401  # fixtures
from fleet import Fleet
from llama_cpp.llama_cpp import llama_memory_seq_rm as imported_before_attach
from tiny_model import VOCABULARY, WIDTH, write_tiny_model

import pagetide
import pagetide_llama_cpp as pt

LAYERS = 4  # of the tiny model
CLOSE = 0.02  # rows of one token in two honest computations are closer than this


def memory_of(llama: Any) -> int:
    memory: int = lc.llama_get_memory(llama.ctx)
    return memory


def decode_by_hand(llama: Any, tokens: list[int], begin: int, sequence: int = 0) -> None:
    llama._batch.set_batch(batch=tokens, n_past=begin, logits_all=False)
    for i in range(len(tokens)):
        llama._batch.batch.seq_id[i][0] = sequence
    llama._ctx.decode(llama._batch)


class Judge:
    """Compares the rows that PageTide has of a prompt with those that the prompt makes."""

    def __init__(self, path: pathlib.Path, fleet: Fleet) -> None:
        self._llama = open_engine(path)
        self._own = pt.attach(self._llama, router=fleet.router.grpc, options=pt.Options(store=False))
        assert self._own._context is not None
        self._context = self._own._context
        self._client = pagetide.Client(router=fleet.router.grpc)

    def check(self, model: pagetide.Model, prompt: list[int]) -> int:
        """Tokens that PageTide has of the prompt, all right. AssertionError names the page that is wrong."""
        with self._client.open(model, prompt, allow_full_reuse=True) as sequence:
            sequence.wait_ready()
            pages = sequence.length // 256
            if pages == 0:
                return 0
            self._context.clear()
            self._llama.eval(prompt[:pages * 256])
            for page in range(pages):
                begin, end = 256 * page, 256 * page + 256
                stored = sequence.read_block(0, begin, end).view(np.float16).astype(np.float32)
                right = self._context.cut(begin, end)[0].view(np.float16).astype(np.float32)
                assert np.abs(stored - right).max() < CLOSE, f"page {page} of {len(prompt)} tokens"
            return pages * 256

    def close(self) -> None:
        self._client.close()
        self._own.detach()


@pytest.fixture(scope="module")
def judge(models: dict[str, pathlib.Path], fleet: Fleet) -> Any:
    judge = Judge(models["llama"], fleet)
    yield judge
    judge.close()


# --- rows that are changed: each is done to a context that holds 512 tokens, both pages stored ---

def clear(llama: Any) -> None:
    """As the wrapper's own handlers do, but without its reset()."""
    llama._ctx.kv_cache_clear()


def drop_some(llama: Any) -> None:
    assert lc.llama_memory_seq_rm(memory_of(llama), 0, 100, 200)


def drop_some_by_an_old_name(llama: Any) -> None:
    assert imported_before_attach(memory_of(llama), 0, 100, 200)


def shift(llama: Any) -> None:
    """A context shift. The prompt is one word again and again, so that the wrapper's ids say the same as before."""
    llama._ctx.kv_cache_seq_rm(0, 100, 200)
    llama._ctx.kv_cache_seq_shift(0, 200, -1, -100)
    llama.n_tokens -= 100


def copy_over(llama: Any) -> None:
    """Other tokens are computed in sequence 1 and become the last rows of sequence 0."""
    decode_by_hand(llama, prompt_of(512, 699), 0, sequence=1)
    llama_cpp.llama_memory_seq_rm(memory_of(llama), 0, 256, -1)
    llama_cpp.llama_memory_seq_cp(memory_of(llama), 1, 0, 256, 512)
    llama_cpp.llama_memory_seq_rm(memory_of(llama), 1, -1, -1)


def load_another_sequence(llama: Any) -> None:
    decode_by_hand(llama, prompt_of(512, 698), 0, sequence=1)
    size = lc.llama_state_seq_get_size(llama.ctx, 1)
    state = (ctypes.c_uint8 * size)()
    assert lc.llama_state_seq_get_data(llama.ctx, state, size, 1) == size
    lc.llama_memory_seq_rm(memory_of(llama), 1, -1, -1)
    assert lc.llama_state_seq_set_data(llama.ctx, state, size, 0) == size


def decode_others(llama: Any) -> None:
    """The wrapper's ids and number of tokens stay what they were."""
    lc.llama_memory_seq_rm(memory_of(llama), 0, 200, -1)
    decode_by_hand(llama, prompt_of(312, 697), 200)


def edit_ids(llama: Any) -> None:
    """The ids say other tokens than made the rows."""
    llama.input_ids[300:512] = prompt_of(212, 696)


CHANGES: list[Callable[[Any], None]] = [
    clear, drop_some, drop_some_by_an_old_name, shift, copy_over, load_another_sequence, decode_others, edit_ids]


@pytest.mark.parametrize("change", CHANGES)
def test_rows_behind_changed_ones_are_not_stored(change: Callable[[Any], None], fleet: Fleet, judge: Judge,
                                                 models: dict[str, pathlib.Path]) -> None:
    number = CHANGES.index(change)
    word = 7 + number
    before = [1] + [word] * 511 if change is shift else prompt_of(512, 601 + number)
    llama = open_engine(models["llama"])
    connector = pt.attach(llama, router=fleet.router.grpc)
    first_logits(llama, before)
    assert connector.flush() and connector.stored_tokens == 512
    change(llama)
    held = [int(t) for t in llama.input_ids[:llama.n_tokens]]
    asked = held + ([word] * 400 if change is shift else prompt_of(401, 651)[1:])
    first_logits(llama, asked)
    assert connector.last is not None and connector.last.limit == "refused", connector.last
    assert "changed by others" in connector.last.reason
    assert connector.flush()
    assert connector._model is not None
    assert judge.check(connector._model, asked) <= 512
    assert connector.stored_tokens == 512
    # A prompt that begins in front of the changed rows is served and stored as ever.
    after = prompt_of(600, 661 + number)
    got = first_logits(llama, after)
    assert np.array_equal(got, control_logits(open_engine(models["llama"]), None, after, 0))
    assert connector.flush() and connector.stored_tokens == 1024
    assert judge.check(connector._model, after) == 512
    connector.detach()


def test_rows_of_another_sequence_stay_and_pages_do_not_pass_through_them(
        models: dict[str, pathlib.Path], fleet: Fleet) -> None:
    prompt = prompt_of(600, 671)
    llama = open_engine(models["llama"])
    connector = pt.attach(llama, router=fleet.router.grpc)
    decode_by_hand(llama, prompt_of(50, 672), 0, sequence=1)
    got = first_logits(llama, prompt)
    assert connector.last is not None and connector.last.limit == "refused"
    assert "sequence 1 of the context is in use" in connector.last.reason
    assert lc.llama_memory_seq_pos_max(memory_of(llama), 1) == 49
    # Its cells change the order in which last bits are summed up.
    assert np.abs(got - control_logits(open_engine(models["llama"]), None, prompt, 0)).max() < 0.01
    assert connector.flush() and connector.stored_tokens == 0
    # In the middle of a prompt.
    lc.llama_memory_seq_rm(memory_of(llama), 1, -1, -1)
    first_logits(llama, prompt[:300])
    assert connector.flush() and connector.stored_tokens == 256
    decode_by_hand(llama, prompt_of(50, 672), 0, sequence=1)
    llama.eval(prompt[300:])
    assert connector.flush() and connector.stored_tokens == 256
    assert lc.llama_memory_seq_pos_max(memory_of(llama), 1) == 49
    connector.detach()


# --- rows that are computed in another way ---

def set_control_vector(llama: Any) -> None:
    data = np.random.default_rng(3).standard_normal(WIDTH * (LAYERS - 1)).astype(np.float32)
    assert lc.llama_set_adapter_cvec(
        llama.ctx, data.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), data.size, WIDTH, 1, LAYERS - 1) == 0


def set_adapters(llama: Any) -> None:
    assert lc.llama_set_adapters_lora(llama.ctx, None, 0, None) == 0


def see_what_comes(llama: Any) -> None:
    lc.llama_set_causal_attn(llama.ctx, False)


@pytest.mark.parametrize("change", [set_control_vector, set_adapters, see_what_comes])
def test_a_context_that_computes_in_another_way_is_left_alone(
        change: Callable[[Any], None], models: dict[str, pathlib.Path], fleet: Fleet, judge: Judge) -> None:
    prompt = prompt_of(600, 681 + len(change.__name__))
    llama = open_engine(models["llama"])
    connector = pt.attach(llama, router=fleet.router.grpc)
    first_logits(llama, prompt[:300])
    assert connector.flush() and connector.stored_tokens == 256
    change(llama)
    # In the middle of what is stored, anew from its start, and as a prompt of its own.
    llama.eval(prompt[300:])
    llama.reset()
    llama.eval(prompt)
    assert connector.flush() and connector.stored_tokens == 256
    llama.reset()
    first_logits(llama, prompt)
    assert connector.last is not None and connector.last.limit == "refused"
    assert "was called since the context was attached" in connector.last.reason
    assert (connector.last.loaded_tokens, connector.stored_tokens) == (0, 256)
    assert connector._model is not None and judge.check(connector._model, prompt) == 256
    connector.detach()
    again = pt.attach(llama, router=fleet.router.grpc)
    assert "cannot be named" in again.refused_because
    again.detach()


def test_reuse_ends_when_logits_of_all_tokens_are_asked_for(models: dict[str, pathlib.Path], fleet: Fleet) -> None:
    prompt = prompt_of(600, 691)
    llama = open_engine(models["llama"])
    connector = pt.attach(llama, router=fleet.router.grpc)
    first_logits(llama, prompt)
    assert connector.flush() and connector.stored_tokens == 512
    llama._logits_all = True
    assert connector.prepare(prompt_of(300, 692)).limit == "refused"
    llama._logits_all = False
    llama.draft_model = lambda ids: np.empty(0, np.intc)
    assert "draft model" in connector.prepare(prompt_of(300, 692)).reason
    llama.draft_model = None
    assert connector.prepare(prompt_of(300, 692)).limit == "never_stored"
    connector.detach()


def test_a_context_whose_threads_were_changed_is_left_alone(models: dict[str, pathlib.Path], fleet: Fleet) -> None:
    for arguments, is_refused in ((dict(flash_attn=True), True), (dict(), False)):
        llama = open_engine(models["llama"], **arguments)
        connector = pt.attach(llama, router=fleet.router.grpc)
        llama._ctx.set_n_threads(1, 1)
        report = connector.prepare(prompt_of(300, 693))
        assert (report.limit == "refused") == is_refused, report
        assert ("attached with 2 threads and has 1" in report.reason) == is_refused
        connector.detach()


# --- an identity that is not that of the context ---

@pytest.mark.parametrize("how", ["another file of the name", "another content", "a link that leads elsewhere"])
def test_a_file_that_changed_behind_the_loaded_model_is_refused(how: str, models: dict[str, pathlib.Path],
                                                                folder: pathlib.Path, fleet: Fleet) -> None:
    """Rows of the old weights would be stored under the name of the new ones."""
    path, other = folder / "changing.gguf", folder / "other-weights.gguf"
    path.unlink(missing_ok=True)
    write_tiny_model(other, seed=5)
    if how == "a link that leads elsewhere":
        path.symlink_to(models["llama"])
    else:
        shutil.copy(models["llama"], path)
    llama = open_engine(path, use_mmap=False)
    if how == "another file of the name":
        os.replace(other, path)
    elif how == "another content":
        path.write_bytes(other.read_bytes())
    else:
        path.unlink()
        path.symlink_to(other)
    connector = pt.attach(llama, router=fleet.router.grpc)
    assert "has changed since the model was loaded" in connector.refused_because
    first_logits(llama, prompt_of(600, 701))
    assert connector.flush() and connector.stored_tokens == 0
    connector.detach()


def test_the_basis_is_that_of_the_time_when_the_context_was_made(models: dict[str, pathlib.Path], fleet: Fleet,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    digests = []
    for at_open, at_attach in (("1", "1"), ("1", "0"), ("0", "0")):
        monkeypatch.setenv("LLAMA_ATTN_ROT_DISABLE", at_open)
        llama = open_engine(models["llama"], type_k=Q8_0)
        monkeypatch.setenv("LLAMA_ATTN_ROT_DISABLE", at_attach)
        connector = pt.attach(llama, router=fleet.router.grpc)
        connector.prepare([1, 2, 3])
        assert connector._model is not None
        digests.append(connector._model.digest)
        connector.detach()
    assert digests[0] == digests[1] != digests[2]


def test_rows_do_not_go_behind_another_end_than_they_were_cut_for(models: dict[str, pathlib.Path], fleet: Fleet,
                                                                  judge: Judge) -> None:
    """A sequence whose restore failed is shorter on the worker than this side has seen."""
    prompt = prompt_of(800, 711)
    llama = open_engine(models["llama"])
    connector = pt.attach(llama, router=fleet.router.grpc)
    first_logits(llama, prompt[:520])
    assert connector.flush() and connector.stored_tokens == 512
    sequence = connector._sequence
    assert sequence is not None and connector._model is not None
    # By another holder of the sequence, as the worker itself does it.
    with pagetide.Client(router=fleet.router.grpc) as client:
        twin = pagetide.Sequence(client, client.connect_worker(fleet.workers[0].grpc), connector._model,
                                 type(sequence.state).FromString(sequence.state.SerializeToString()))
        twin.rewind(256)
    llama.eval(prompt[520:])
    assert connector.flush()
    assert (connector.stored_tokens, connector.dropped_tokens) == (512, 256)
    assert connector.counters["failures"] == 1
    assert judge.check(connector._model, prompt) == 512
    assert judge.check(connector._model, prompt[:256] + prompt[512:768]) == 256
    connector.detach()


# --- all of it, at random ---

def test_random_calls_never_leave_a_wrong_page(models: dict[str, pathlib.Path], fleet: Fleet, judge: Judge) -> None:
    """Prompts of few stems, so that they share pages, between calls of all kinds."""
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    stems = [[1] + [dice.choice((3, 4)) if stem % 2 else dice.randrange(3, VOCABULARY) for _ in range(1199)]
             for stem in range(4)]
    llama = open_engine(models["llama"])
    connector = pt.attach(llama, router=fleet.router.grpc)
    assert connector.refused_because == ""
    memory = memory_of(llama)

    def anywhere() -> int:
        return dice.randrange(max(llama.n_tokens, 1))

    def shift_by_hand() -> None:
        begin, n = anywhere(), llama.n_tokens
        by = dice.randrange(1, n - begin) if n - begin > 1 else 0
        if by and lc.llama_memory_seq_pos_max(memory, 0) == n - 1:
            lc.llama_memory_seq_rm(memory, 0, begin, begin + by)
            lc.llama_memory_seq_add(memory, 0, begin + by, -1, -by)
            if dice.random() < 0.5:
                llama.input_ids[begin:n - by] = llama.input_ids[begin + by:n].copy()
            llama.n_tokens = n - by

    def decode_some() -> None:
        begin = anywhere()
        lc.llama_memory_seq_rm(memory, 0, begin, -1)
        decode_by_hand(llama, [dice.randrange(3, VOCABULARY) for _ in range(dice.randrange(1, 300))], begin)

    def evaluate() -> None:
        stem, n = dice.choice(stems), llama.n_tokens
        llama.eval(stem[n:min(n + dice.randrange(1, 600), len(stem))] or [5])

    def cut_short() -> None:
        llama.n_tokens = anywhere()

    def load_state() -> None:
        llama.load_state(dice.choice(states) if dice.random() < 0.5 else llama.save_state())

    states = [llama.save_state()]
    calls: list[Callable[[], Any]] = [
        llama.reset, llama._ctx.kv_cache_clear, shift_by_hand, decode_some, evaluate, cut_short, load_state,
        lambda: lc.llama_memory_seq_rm(memory, 0, anywhere(), anywhere()),
        lambda: states.append(llama.save_state()) if len(states) < 4 else None]
    checked = 0
    for turn in range(60):
        for _ in range(dice.randrange(3)):
            call = dice.choice(calls)
            print(f"turn {turn}: {llama.n_tokens} tokens, {getattr(call, '__name__', call)}")
            try:
                call()
            except (RuntimeError, ValueError) as error:  # positions with a gap, a context that is full
                print(f"turn {turn}: {error}")
        held = [int(t) for t in llama.input_ids[:llama.n_tokens]]
        if dice.random() < 0.6 and 256 <= len(held) < 1300 and 0 <= min(held) and max(held) < VOCABULARY:
            # On from what the wrapper believes in, often from a page's end.
            kept = dice.choice((len(held), len(held) // 256 * 256))
            prompt = held[:kept] + [dice.randrange(3, VOCABULARY) for _ in range(dice.choice((256, 300, 600)))]
        else:
            prompt = dice.choice(stems)[:dice.choice((512, 513, dice.randrange(300, 1200)))]
        try:
            first_logits(llama, prompt)
        except (RuntimeError, ValueError) as error:
            print(f"turn {turn}: {error}")
            llama._ctx.kv_cache_clear()
            llama.reset()
        assert connector.flush(60)
        assert connector._model is not None
        checked += judge.check(connector._model, prompt)
    assert checked >= 256 and connector.stored_tokens >= 256
    print(f"{checked} tokens checked, {connector.stored_tokens} stored, {dict(connector.counters)}")
    connector.detach()
