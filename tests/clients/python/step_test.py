"""Steps of one sequence and of many, and attention by the worker, against what numpy computes."""

from __future__ import annotations

import asyncio
import hashlib
import pathlib
import tempfile
import time
from typing import Iterator, Sequence

import numpy as np
import pytest
from client_test import (LAYERS, append_all, block_of, client, spec,  # noqa: F401 (client: a fixture)
                         tokens_of)
from fleet import Fleet

import pagetide
from pagetide import aio

HEADS, K_DIM, V_DIM = 2, 32, 16  # of client_test.spec
QUERY_HEADS = 4


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with tempfile.TemporaryDirectory(prefix="pt-py-") as folder:
        fleet = Fleet(pathlib.Path(folder), workers=2, model_pool="8MiB")
        yield fleet
        fleet.close()


class Layers:
    """Random K and V rows of n tokens in every layer."""

    def __init__(self, n: int, seed: int) -> None:
        random = np.random.default_rng(seed)
        self.n = n
        self.k = random.standard_normal((LAYERS, n, HEADS, K_DIM)).astype(np.float16)
        self.v = random.standard_normal((LAYERS, n, HEADS, V_DIM)).astype(np.float16)

    def append_to(self, sequence: pagetide.Sequence, tokens: np.ndarray,
                  inputs: Sequence[pagetide.Input] = ()) -> None:
        with sequence.begin_append(tokens, inputs=inputs) as append:
            self.write(append, range(LAYERS))
            append.commit()

    def write(self, append: pagetide.PendingAppend, layers: range) -> None:
        for layer in layers:
            append.write_rows(0, layer, pagetide.RowKind.K, 0, self.k[layer])
            append.write_rows(0, layer, pagetide.RowKind.V, 0, self.v[layer])

    def expect(self, layer: int, queries: np.ndarray, first: int, got: pagetide.Attention) -> None:
        """got is the causal attention of queries from position `first` on over these rows."""
        k, v = self.k[layer].astype(np.float64), self.v[layer].astype(np.float64)
        assert got.outputs.shape == (*queries.shape[:2], V_DIM)
        assert got.log_sum_exp.shape == queries.shape[:2]
        for i in range(queries.shape[0]):
            for head in range(queries.shape[1]):
                own = head * HEADS // queries.shape[1]
                sees = slice(0, first + i + 1)
                scores = k[sees, own] @ queries[i, head].astype(np.float64) / np.sqrt(K_DIM)
                weights = np.exp(scores - scores.max())
                total = weights.sum()
                np.testing.assert_allclose(got.outputs[i, head], weights @ v[sees, own] / total,
                                           rtol=1e-4, atol=1e-5)
                np.testing.assert_allclose(got.log_sum_exp[i, head], scores.max() + np.log(total),
                                           rtol=1e-5)


def queries_of(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, QUERY_HEADS, K_DIM)).astype(np.float32)


def test_attention_over_committed_rows(client: pagetide.Client) -> None:
    model = client.register_model(spec())
    rows = Layers(50, 1)
    with client.open(model, tokens_of(50, 31), no_reuse=True) as sequence:
        rows.append_to(sequence, tokens_of(50, 31))
        queries = queries_of(3, 2)
        rows.expect(1, queries, 47, sequence.attend(0, 1, queries, 47))
        rows.expect(0, queries, 10, sequence.attend(0, 0, queries.astype(np.float64), 10))
        for group, layer, wrong in ((0, LAYERS, queries), (0, 0, queries[:, :3])):
            with pytest.raises(pagetide.InvalidArgument):  # 3 query heads on 2 KV heads
                sequence.attend(group, layer, wrong, 47)
        for group, wrong in ((1, queries), (0, queries[:, :, :31]), (0, queries[0]), (0, queries[:0])):
            with pytest.raises(ValueError):
                sequence.attend(group, 0, wrong, 47)


def test_parts_on_two_workers_merge_to_one_attention(client: pagetide.Client) -> None:
    model = client.register_model(spec())
    tokens, cut = tokens_of(90, 34), 37
    rows, front, back = Layers(90, 6), Layers(0, 0), Layers(0, 0)
    for part, begin, end in ((front, 0, cut), (back, cut, 90)):
        part.n, part.k, part.v = end - begin, rows.k[:, begin:end], rows.v[:, begin:end]
    behind = [pagetide.Input(0, hashlib.sha256(tokens[:cut].astype("<u4").tobytes()).digest())]
    with client.open(model, tokens[:cut], no_reuse=True, exclude_worker_ids=["w1"]) as here, \
            client.open(model, tokens[cut:], no_reuse=True, exclude_worker_ids=["w0"],
                        inputs=behind) as there:
        front.append_to(here, tokens[:cut])
        back.append_to(there, tokens[cut:], behind)
        for first in (cut, 87):
            queries = queries_of(3, first)
            parts = [here.attend(0, 2, queries, first, allow_behind_end=True),
                     there.attend(0, 2, queries, first - cut)]
            rows.expect(2, queries, first, pagetide.merge_attention(parts))
            rows.expect(2, queries, first, pagetide.merge_attention(parts[::-1]))
        empty = pagetide.Attention(np.zeros_like(parts[0].outputs),
                                   np.full_like(parts[0].log_sum_exp, -np.inf))
        rows.expect(2, queries, 87, pagetide.merge_attention([empty, *parts]))
        alone = pagetide.merge_attention([empty, empty])
        assert not alone.outputs.any() and np.isneginf(alone.log_sum_exp).all()
        with pytest.raises(ValueError, match="no parts"):
            pagetide.merge_attention([])
        with pytest.raises(ValueError, match="part 1 has outputs"):
            pagetide.merge_attention([parts[0], there.attend(0, 2, queries[:2], 5)])
        with pytest.raises(pagetide.InvalidArgument, match="not within the committed positions"):
            here.attend(0, 2, queries, 87)


def test_attention_sees_the_rows_of_its_append_layer_by_layer(client: pagetide.Client) -> None:
    model = client.register_model(spec())
    tokens = tokens_of(40, 32)
    with client.open(model, tokens, no_reuse=True) as sequence:
        rows = Layers(40, 3)
        with sequence.begin_append(tokens, pin_prefix=True) as append:
            for layer in range(LAYERS):
                rows.write(append, range(layer, layer + 1))
                queries = queries_of(5, layer)
                rows.expect(layer, queries, 35, append.attend(0, layer, queries, 35))
            with pytest.raises(pagetide.PageTideError):
                sequence.attend(0, 0, queries, 35)  # nothing is committed
            append.commit()
        rows.expect(2, queries, 35, sequence.attend(0, 2, queries, 35))
        with sequence.begin_append(tokens) as append:
            append.cancel()
            with pytest.raises(pagetide.FailedPrecondition, match="is over"):
                append.attend(0, 0, queries, 35)


def test_attention_under_a_step_sees_its_rows(client: pagetide.Client) -> None:
    model = client.register_model(spec())
    tokens = tokens_of(21, 33)
    with client.open(model, tokens, no_reuse=True) as sequence:
        rows = Layers(21, 4)
        with sequence.begin_step(21, pin_prefix=True) as step:
            for layer in range(LAYERS):
                step.write_rows(0, layer, rows.k[layer], rows.v[layer])
                queries = queries_of(2, layer)
                rows.expect(layer, queries, 19, step.attend(0, layer, queries, 19))
                rows.expect(layer, queries, 4, step.attend(0, layer, queries, 4))
            step.commit(tokens)
        assert (sequence.length, sequence.state.end_position) == (21, 21)
        got = np.concatenate([part.rows for part in sequence.read_rows(0, 0, 0, layers=[2])
                              if part.kind == pagetide.RowKind.K])
        assert np.array_equal(got.reshape(-1), rows.k[2].reshape(-1).view(np.uint8))
        with pytest.raises(pagetide.FailedPrecondition, match="is over"):
            step.attend(0, 0, queries, 4)
        with pytest.raises(pagetide.FailedPrecondition, match="is over"):
            step.commit(tokens)


@pytest.mark.parametrize("local", [True, False], ids=["local", "rpc"])
def test_a_step_writes_nothing_when_its_slots_are_not_held_any_more(fleet: Fleet, local: bool) -> None:
    with pagetide.Client(router=fleet.router.grpc, use_local_plane=local, step_lease=0.3) as client:
        model = client.register_model(spec())
        tokens = tokens_of(2, 35)
        block = block_of(model, tokens, 0, 2)
        with client.open(model, tokens, no_reuse=True) as sequence:
            with sequence.begin_step(2) as step:
                write_part(step, block, model, 2)
                end = time.monotonic() + 30  # the lease passes in real time
                with pytest.raises(pagetide.FailedPrecondition, match="its lease has ended"):
                    while time.monotonic() < end:
                        write_part(step, block, model, 2)
                if local:
                    with pytest.raises(pagetide.FailedPrecondition, match="its lease has ended"):
                        assert step.region is None
                else:
                    assert step.region is None
            with sequence.begin_step(2) as step:
                write_part(step, block, model, 2)
                step.commit(tokens)
                with pytest.raises(pagetide.FailedPrecondition, match="is over"):
                    write_part(step, block, model, 2)
            assert sequence.length == 2
    for lease in (0, 301):
        with pytest.raises(ValueError, match="step_lease"):
            pagetide.Client(router=fleet.router.grpc, step_lease=lease)


def write_part(part: object, block: np.ndarray, model: pagetide.Model, n: int) -> None:
    group = model.groups[0]
    for layer in range(LAYERS):
        k = group.offset(layer, pagetide.RowKind.K, n)
        v = group.offset(layer, pagetide.RowKind.V, n)
        part.write_rows(0, layer, block[k:v], block[v:v + n * group.v_row_bytes])  # type: ignore


def test_a_batch_commits_each_sequence_by_itself(client: pagetide.Client) -> None:
    model = client.register_model(spec())
    prompts = [tokens_of(20 + i, 40 + i) for i in range(5)]
    sequences = [client.open(model, p, no_reuse=True, exclude_worker_ids=["w1"]) for p in prompts]
    for round_ in range(3):
        with client.begin_batch_step(sequences, 4) as step:
            assert len(step) == 5
            assert step.is_local == client._use_local_plane
            for i, prompt in enumerate(prompts):
                begin = 4 * round_
                assert step[i].first_position == begin
                write_part(step[i], block_of(model, prompt, begin, begin + 4), model, 4)
            assert step.commit([p[4 * round_:4 * round_ + 4] for p in prompts]) == [None] * 5
            with pytest.raises(pagetide.FailedPrecondition, match="is over"):
                step.commit([p[:4] for p in prompts])
    for sequence, prompt in zip(sequences, prompts):
        assert (sequence.length, sequence.state.end_position) == (12, 12)
        assert np.array_equal(sequence.read_block(0, 0, 12), block_of(model, prompt, 0, 12))

    # One of them lacks rows, one takes fewer tokens than reserved, one is written over meanwhile.
    with client.begin_batch_step(sequences, 2, pin_prefix=True) as step:
        for i, prompt in enumerate(prompts):
            if i != 1:
                write_part(step[i], block_of(model, prompt, 12, 14), model, 2)
        queries = queries_of(2, 7)
        assert step.attend(0, 0, 0, queries, 12).outputs.shape == (2, QUERY_HEADS, V_DIM)
        results = step.commit([p[12:13] if i == 2 else p[12:14] for i, p in enumerate(prompts)])
    assert [sequence.length for sequence in sequences[2:]] == [13, 14, 14]
    if client._use_local_plane:  # staged memory is the caller's: what it did not write is what lay there
        assert results == [None] * 5
    else:
        assert [type(result) for result in results] == [
            type(None), pagetide.FailedPrecondition, *[type(None)] * 3]
        assert results[1] is not None and results[1].reason == "ROWS_MISSING"
        assert sequences[1].length == 12
        sequences[1].refresh()
        assert sequences[1].length == 12
    assert np.array_equal(sequences[2].read_block(0, 0, 13), block_of(model, prompts[2], 0, 13))
    with client.begin_batch_step(sequences, 1):
        pass  # all are given back, the one that was not committed before, too
    for sequence in sequences:
        sequence.close()


def test_a_batch_that_cannot_begin_reserves_nothing(client: pagetide.Client) -> None:
    model = client.register_model(spec())
    other_spec = spec("py-other")
    other_spec.weights_digest = b"o" * 32
    other = client.register_model(other_spec)
    tokens = tokens_of(8, 60)
    with client.open(model, tokens, no_reuse=True, exclude_worker_ids=["w1"]) as here, \
            client.open(model, tokens, no_reuse=True, exclude_worker_ids=["w0"]) as there, \
            client.open(other, tokens, no_reuse=True, exclude_worker_ids=["w1"]) as foreign:
        for sequences in ([], [here, there], [here, foreign]):
            with pytest.raises(ValueError):
                client.begin_batch_step(sequences, 1)
        with pytest.raises(pagetide.InvalidArgument):
            client.begin_batch_step([here], 1025)
        with here.fork() as gone:
            gone.close()
            with pytest.raises(pagetide.NotFound):
                client.begin_batch_step([here, gone], 1)
        with client.begin_batch_step([here], 1) as step:  # no slot was left reserved
            with pytest.raises(ValueError, match="tokens of 2 sequences, expected 1"):
                step.commit([[1], [2]])
            with pytest.raises(ValueError, match="0 K and 0 V bytes"):
                step[0].write_rows(0, 0, b"")


def test_rows_of_a_batch_that_exceed_a_message_go_in_several(fleet: Fleet) -> None:
    with pagetide.Client(router=fleet.router.grpc, use_local_plane=False) as client:
        model = client.register_model(spec())
        n = 1024
        prompts = [tokens_of(n, 80 + i) for i in range(12)]
        rows = n * model.groups[0].token_bytes
        assert len(prompts) * rows > (4 << 20) > 3 * rows
        sequences = [client.open(model, p, no_reuse=True, exclude_worker_ids=["w0"]) for p in prompts]
        with client.begin_batch_step(sequences, n) as step:
            for i, prompt in enumerate(prompts):
                write_part(step[i], block_of(model, prompt, 0, n), model, n)
            assert step.commit(prompts) == [None] * len(prompts)
        for sequence, prompt in zip(sequences, prompts):
            assert np.array_equal(sequence.read_block(0, 0, n), block_of(model, prompt, 0, n))
            sequence.close()


@pytest.mark.parametrize("local", [True, False], ids=["local", "rpc"])
def test_asyncio(fleet: Fleet, local: bool) -> None:
    async def scene() -> None:
        async with aio.Client(router=fleet.router.grpc, use_local_plane=local) as client:
            model = await client.register_model(spec())
            tokens = tokens_of(8, 70)
            rows = Layers(8, 5)
            async with await client.open(model, tokens, no_reuse=True) as sequence:
                async with await sequence.begin_append(tokens, pin_prefix=True) as append:
                    for layer in range(LAYERS):
                        for kind, own in ((pagetide.RowKind.K, rows.k), (pagetide.RowKind.V, rows.v)):
                            await append.write_rows(0, layer, kind, 0, own[layer])
                    queries = queries_of(2, 6)
                    rows.expect(1, queries, 6, await append.attend(0, 1, queries, 6))
                    await append.commit()
                rows.expect(1, queries, 6, await sequence.attend(0, 1, queries, 6))
                async with await sequence.fork() as fork:
                    async with await client.begin_batch_step([sequence, fork], 1, pin_prefix=True) as step:
                        for i in range(2):
                            for layer in range(LAYERS):
                                step[i].write_rows(0, layer, rows.k[layer, :1], rows.v[layer, :1])
                        assert (await step.attend(1, 0, 0, queries[:1], 8)).outputs.shape == (
                            1, QUERY_HEADS, V_DIM)
                        assert await step.commit([[1], [2]]) == [None, None]
                    assert (sequence.length, fork.length) == (9, 9)
    asyncio.run(scene())


def test_memory_of_another_worker_is_neither_read_nor_written(fleet: Fleet) -> None:
    """As on a host whose worker has a socket of the same name as the assigned one, which is elsewhere."""
    with pagetide.Client(router=fleet.router.grpc) as client:
        model = client.register_model(spec())
        mine, others = tokens_of(48, 90), tokens_of(48, 91)
        with client.open(model, others, no_reuse=True, exclude_worker_ids=["w0"]) as there, \
                client.open(model, mine, no_reuse=True, exclude_worker_ids=["w1"]) as here:
            append_all(there, others)
            here.worker._local_socket = str(fleet.folder / "w1.sock")
            with here.begin_step(16) as step:
                write_part(step, block_of(model, mine, 0, 16), model, 16)
                assert not step.is_local
                step.commit(mine[:16])
            append_all(here, mine)
            here.worker._planes_again_at.clear()
            assert here.lease_pages() is None
            here.worker._planes_again_at.clear()
            assert np.array_equal(here.read_block(0, 0, 48), block_of(model, mine, 0, 48))
            assert there.lease_pages() is not None
