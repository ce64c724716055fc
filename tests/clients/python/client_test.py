"""The Python client, blocking, against a real store, router and worker, over both data planes."""

from __future__ import annotations

import os
import pathlib
import tempfile
import threading
from typing import Iterator

import numpy as np
import pytest
from fleet import Fleet

import pagetide
from pagetide.v1 import model_pb2

LAYERS = 3
PAGE = 16


def spec(name: str = "py-test") -> model_pb2.ModelSpec:
    group = model_pb2.LayerGroup(
        kind=model_pb2.LayerGroup.KIND_FULL, layers=range(LAYERS), kv_heads=2, k_dim=32, v_dim=16,
        k_type=model_pb2.DATA_TYPE_F16, v_type=model_pb2.DATA_TYPE_F16)
    return model_pb2.ModelSpec(
        name=name, weights_digest=b"w" * 32, tokenizer_digest=b"t" * 32, vocabulary_size=1000,
        geometry=model_pb2.Geometry(page_tokens=PAGE, groups=[group]))


def tokens_of(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1000, n)


def block_of(model: pagetide.Model, tokens: np.ndarray, begin: int, end: int) -> np.ndarray:
    """Rows that depend on layer, kind and every token up to theirs, as KV rows do:
    [layer][K rows][V rows]."""
    group = model.groups[0]
    history = np.cumsum(tokens.astype(np.uint64) * 2654435761 + 1)
    out = []
    for layer in range(group.num_layers):
        for kind in (pagetide.RowKind.K, pagetide.RowKind.V):
            column = np.arange(group.row_bytes(kind), dtype=np.uint64)
            mixed = (history[begin:end, None] >> 7) * (column + 3) + layer * 101 + int(kind) * 37
            out.append((mixed & 0xFF).astype(np.uint8).reshape(-1))
    return np.concatenate(out)


def append_all(sequence: pagetide.Sequence, tokens: np.ndarray) -> None:
    begin = sequence.length
    with sequence.begin_append(tokens[begin:]) as append:
        append.write_block(0, len(tokens) - begin,
                           block_of(sequence.model, tokens, begin, len(tokens)))
        append.commit()


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with tempfile.TemporaryDirectory(prefix="pt-py-") as folder:
        fleet = Fleet(pathlib.Path(folder))
        yield fleet
        fleet.close()


@pytest.fixture(params=[True, False], ids=["local", "rpc"])
def client(fleet: Fleet, request: pytest.FixtureRequest) -> Iterator[pagetide.Client]:
    with pagetide.Client(router=fleet.router.grpc, use_local_plane=request.param) as client:
        yield client


def test_a_second_open_reuses_what_the_first_appended(client: pagetide.Client) -> None:
    model = client.register_model(spec())
    tokens = tokens_of(100, 1 + client._use_local_plane)
    with client.open(model, tokens) as first:
        assert first.length == 0
        append_all(first, tokens)
        assert first.length == 100
        with client.open(model, tokens) as second:  # while the first's tail is there
            assert second.wait_ready() == 99  # one token is left for the engine's logits
            assert second.reuse.reused_tokens == 99
            assert np.array_equal(second.read_block(0, 0, 99), block_of(model, tokens, 0, 99))
            # A page that is full lies in its frame as in the block.
            lease = second.lease_pages()
            assert (lease is not None) == client._use_local_plane
            if lease is not None:
                page = lease.page(0, 16)
                assert page is not None and not page.flags.writeable
                assert np.array_equal(page, block_of(model, tokens, 16, 32))
                assert lease.is_valid()
    assert client.lookup(model, tokens).reused_tokens == 96  # full pages stay, tails do not
    assert client.lookup(model, tokens[:64], allow_full_reuse=True).reused_tokens == 64


def test_prompts_with_other_inputs_share_only_what_stands_before_them(client: pagetide.Client) -> None:
    model = client.register_model(spec())
    tokens = tokens_of(100, 50 + client._use_local_plane)
    cat = [pagetide.Input(40, b"c" * 32)]
    with client.open(model, tokens, inputs=cat, no_reuse=True) as first:
        with first.begin_append(tokens, inputs=cat) as append:
            append.write_block(0, len(tokens), block_of(model, tokens, 0, len(tokens)))
            append.commit()
    assert client.lookup(model, tokens, inputs=cat).reused_tokens == 96
    assert client.plan(model, tokens, inputs=cat).plan.reuse.reused_tokens == 96
    for other in ([], [pagetide.Input(40, b"d" * 32)], [pagetide.Input(41, b"c" * 32)]):
        assert client.lookup(model, tokens, inputs=other).reused_tokens == 32, other
        with client.open(model, tokens, inputs=other) as second:
            assert second.length == 32
            answer = second.extend_match(tokens[32:], inputs=cat)
            assert (answer.extended_tokens, second.length) == (64, 96)
    for wrong in ([pagetide.Input(40, b"short")], [*cat, pagetide.Input(39, b"c" * 32)]):
        with pytest.raises(pagetide.InvalidArgument, match="inputs"):
            client.open(model, tokens, inputs=wrong)


def test_a_child_of_the_process_lets_go_of_the_local_plane(fleet: Fleet) -> None:
    """The connection is the parent's life to the worker: a child that outlives it must not hold it open."""
    with pagetide.Client(router=fleet.router.grpc) as client:
        model = client.register_model(spec())
        tokens = tokens_of(40, 77)
        with client.open(model, tokens) as sequence:
            append_all(sequence, tokens)
            plane = sequence.worker.plane(model)
            assert plane is not None and plane.is_alive()
            child = os.fork()
            if child == 0:
                os._exit(0 if plane._socket.fileno() < 0 and not plane.is_alive() else 1)
            assert os.waitpid(child, 0)[1] == 0
            # The parent's is as it was.
            assert sequence.worker.plane(model) is plane
            lease = sequence.lease_pages()
            assert lease is not None and lease.page(0, 16) is not None
            assert np.array_equal(sequence.read_block(0, 0, 40), block_of(model, tokens, 0, 40))


def test_steps_over_shared_memory_and_rpc_give_the_same_rows(client: pagetide.Client) -> None:
    model = client.register_model(spec())
    tokens = tokens_of(40, 7 + client._use_local_plane)
    with client.open(model, tokens, no_reuse=True) as sequence:
        for begin, n in ((0, 1), (1, 20), (21, 19)):
            rows = block_of(model, tokens, begin, begin + n)
            with sequence.begin_step(n) as step:
                assert step.is_local == client._use_local_plane
                assert step.first_position == begin
                group = model.groups[0]
                for layer in range(LAYERS):
                    k = group.offset(layer, pagetide.RowKind.K, n)
                    v = group.offset(layer, pagetide.RowKind.V, n)
                    end = v + n * group.v_row_bytes
                    step.write_rows(0, layer, rows[k:v], rows[v:end])
                step.commit(tokens[begin:begin + n])
        assert sequence.length == 40
        assert np.array_equal(sequence.read_block(0, 5, 38), block_of(model, tokens, 5, 38))
        with sequence.begin_step(4):
            pass  # given back
        assert sequence.length == 40


def test_fork_and_rewind_leave_the_other_sequence_alone(client: pagetide.Client) -> None:
    model = client.register_model(spec())
    tokens = tokens_of(50, 11)
    with client.open(model, tokens, no_reuse=True) as sequence:
        append_all(sequence, tokens)
        with sequence.fork(33) as fork:
            assert fork.length == 33
            branch = np.concatenate([tokens[:33], tokens_of(10, 12)])
            append_all(fork, branch)
            sequence.rewind(20)
            assert sequence.length == 20
            assert np.array_equal(fork.read_block(0, 0, 43), block_of(model, branch, 0, 43))
        with pytest.raises(pagetide.InvalidArgument, match="21"):
            sequence.rewind(21)
        parts = list(sequence.read_rows(0, 3, 9, layers=[2]))
        assert {(p.layer, p.first_token, p.rows.shape[0]) for p in parts} == {(2, 3, 6)}


def test_an_append_that_is_dropped_or_incomplete_changes_nothing(client: pagetide.Client) -> None:
    model = client.register_model(spec())
    tokens = tokens_of(30, 21)
    with client.open(model, tokens, no_reuse=True) as sequence:
        with sequence.begin_append(tokens) as append:
            append.write_rows(0, 0, pagetide.RowKind.K, 0, np.zeros((30, 128), np.uint8))
        with sequence.begin_append(tokens) as append:
            append.write_rows(0, 0, pagetide.RowKind.K, 0, np.zeros((30, 128), np.uint8))
            with pytest.raises(pagetide.PageTideError) as refused:
                append.commit()
            assert isinstance(refused.value, (pagetide.InvalidArgument, pagetide.FailedPrecondition))
        sequence.refresh()
        assert sequence.length == 0
        append_all(sequence, tokens)
        assert np.array_equal(sequence.read_block(0, 0, 30), block_of(model, tokens, 0, 30))


def test_bad_input_names_the_field_and_the_numbers(client: pagetide.Client) -> None:
    model = client.register_model(spec())
    with pytest.raises(pagetide.InvalidArgument, match=r"tokens\[1\].*1000"):
        client.open(model, [1, 1000])
    with pytest.raises(ValueError, match="-1"):
        client.open(model, [1, -1])
    with pytest.raises(ValueError, match="flat"):
        client.open(model, np.zeros((2, 2), np.int32))
    other = spec()
    other.weights_digest = b"x" * 32
    with pytest.raises(pagetide.AlreadyExists, match="py-test"):
        client.register_model(other)
    with pytest.raises(pagetide.NotFound) as missing:
        client.find_model("no-such-model")
    assert missing.value.reason == "MODEL_NOT_FOUND"
    with client.open(model, tokens_of(20, 31), no_reuse=True) as sequence:
        sequence.state.epoch += 1
        with pytest.raises(pagetide.FailedPrecondition) as stale:
            sequence.rewind(0)
        assert stale.value.reason == "STALE_EPOCH"
        sequence.state.epoch -= 1
        with sequence.begin_append([1, 2]) as append:
            with pytest.raises(ValueError, match="multiple of 128"):
                append.write_rows(0, 0, pagetide.RowKind.K, 0, b"x" * 127)
        with pytest.raises(ValueError, match="expected 640"):
            with sequence.begin_step(5) as step:
                step.write_rows(0, 0, b"", b"")
    with pytest.raises(ValueError, match="exactly one"):
        pagetide.Client()


def test_explain_and_workers(client: pagetide.Client) -> None:
    model = client.register_model(spec())
    explained = client.explain(model, tokens_of(20, 41))
    assert explained.candidates[0].worker_id == "w0" and "w0" in explained.explanation
    assert {"w0", "store"} <= {worker.worker_id for worker in client.list_workers()}
    assert client.find_model("py-test") == model


def test_threads_share_a_client(client: pagetide.Client) -> None:
    model = client.register_model(spec())
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for i in range(5):
                tokens = tokens_of(40, 1000 + seed * 10 + i)
                with client.open(model, tokens, no_reuse=True) as sequence:
                    append_all(sequence, tokens)
                    got = sequence.read_block(0, 0, 40)
                    assert np.array_equal(got, block_of(model, tokens, 0, 40))
        except BaseException as error:  # noqa: BLE001  # reported by the main thread
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not errors
