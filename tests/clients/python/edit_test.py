"""Edits, checkpoints and retention with the Python client, over real programs."""

from __future__ import annotations

import asyncio
import pathlib
import tempfile
from typing import Iterator

import numpy as np
import pytest
from client_test import PAGE, append_all, block_of, spec, tokens_of
from fleet import Fleet

import pagetide
from pagetide import aio
from pagetide.v1 import model_pb2, sequence_edit_pb2, session_pb2, types_pb2


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with tempfile.TemporaryDirectory(prefix="pt-py-") as folder:
        fleet = Fleet(pathlib.Path(folder))
        yield fleet
        fleet.close()


@pytest.fixture
def client(fleet: Fleet) -> Iterator[pagetide.Client]:
    with pagetide.Client(router=fleet.router.grpc) as client:
        yield client


@pytest.fixture
def model(client: pagetide.Client) -> pagetide.Model:
    with_rope = spec()
    # Rows that a shift may move.
    with_rope.name = "py-edit"
    with_rope.geometry.groups[0].rope.style = model_pb2.Rope.STYLE_NEOX
    with_rope.geometry.groups[0].rope.n_rot = 32
    with_rope.geometry.groups[0].rope.base = 10000
    with_rope.geometry.groups[0].rope.scale = 1
    with_rope.geometry.groups[0].rope.position_components = 1
    return client.register_model(with_rope)


def rows(model: pagetide.Model, block: np.ndarray, kind: pagetide.RowKind) -> np.ndarray:
    """[layer][token][bytes] of one kind out of [layer][K rows][V rows]."""
    group = model.groups[0]
    n = block.size // group.token_bytes
    layers = block.reshape(group.num_layers, -1)
    k_bytes = n * group.k_row_bytes
    part = layers[:, :k_bytes] if kind == pagetide.RowKind.K else layers[:, k_bytes:]
    return part.reshape(group.num_layers, n, -1)


def filled(client: pagetide.Client, model: pagetide.Model, tokens: np.ndarray) -> pagetide.Sequence:
    sequence = client.open(model, tokens, no_reuse=True)
    append_all(sequence, tokens)
    return sequence


def test_ranges_are_removed_copied_and_moved(client: pagetide.Client, model: pagetide.Model) -> None:
    tokens = tokens_of(60, 1)
    whole = block_of(model, tokens, 0, 60)
    v = rows(model, whole, pagetide.RowKind.V)  # not rotated, so it shows where each row went
    with filled(client, model, tokens) as sequence, client.open(model, [1], no_reuse=True) as other:
        removed = sequence.remove_range(20, 30)
        assert (removed.removed_rows, sequence.length) == (10, 50)
        assert (sequence.state.end_position, sequence.state.canonical_length) == (60, 20)
        got = rows(model, sequence.read_block(0, 0, 50), pagetide.RowKind.V)
        assert np.array_equal(got, np.delete(v, np.s_[20:30], axis=1))
        extent = sequence.position_extent().groups[0]
        assert (extent.min, extent.max, extent.rows, extent.contiguous) == (0, 59, 50, False)

        moved = sequence.shift_positions(30, -1, -10)
        assert (moved.moved_rows, sequence.state.end_position) == (30, 50)
        extent = sequence.position_extent().groups[0]
        assert (extent.max, extent.contiguous) == (49, True)
        assert sequence.divide_positions(40, 50, 1).moved_rows == 0

        copied = other.copy_range(sequence, 5, 15)
        assert (copied.copied_rows, other.length, other.state.end_position) == (10, 10, 15)
        assert np.array_equal(rows(model, other.read_block(0, 0, 10), pagetide.RowKind.V), v[:, 5:15])
        with pytest.raises(pagetide.FailedPrecondition) as occupied:
            other.copy_range(sequence, 10, 12)
        assert occupied.value.reason == "POSITION_OCCUPIED"

        while sequence.compact().moved_rows:
            pass
        got = rows(model, sequence.read_block(0, 0, 50), pagetide.RowKind.V)
        assert np.array_equal(got, np.delete(v, np.s_[20:30], axis=1))
        assert sequence.clear().removed_rows == 50
        assert sequence.length == 0


def test_a_transaction_of_edits_happens_whole_or_not_at_all(
        client: pagetide.Client, model: pagetide.Model) -> None:
    tokens = tokens_of(60, 2)
    edit = sequence_edit_pb2.SequenceEdit
    with filled(client, model, tokens) as sequence:
        before = sequence.read_block(0, 0, 60)
        with pytest.raises(pagetide.InvalidArgument, match=r"edits\[1\]"):
            sequence.edit([edit(remove_range=edit.RemoveRange(p0=0, p1=10)),
                           edit(rewind=edit.Rewind(length=51))])
        sequence.refresh()
        assert sequence.length == 60
        assert np.array_equal(sequence.read_block(0, 0, 60), before)
        done = sequence.edit([edit(remove_range=edit.RemoveRange(p0=10, p1=20)),
                              edit(rewind=edit.Rewind(length=40))])
        assert (done.removed_rows, sequence.length) == (20, 40)
        shifted = sequence.shift_window(4, discard=6)
        assert (shifted.removed_rows, sequence.length) == (6, 34)
        sequence.shift_window(4, fraction=0.5)
        assert sequence.length == 19
        with pytest.raises(ValueError, match="exactly one"):
            sequence.shift_window(4)
        with pytest.raises(pagetide.InvalidArgument, match=r"\[9, 3\)"):
            sequence.remove_range(9, 3)


def test_beams_are_reordered_and_the_rest_cleared(client: pagetide.Client,
                                                  model: pagetide.Model) -> None:
    beams = [filled(client, model, tokens_of(20 + i, 10 + i)) for i in range(3)]
    before = [beam.read_block(0, 0, beam.length) for beam in beams]
    client.reorder(beams, [2, 0, 0], allow_repeats=True)
    assert [beam.length for beam in beams] == [22, 20, 20]
    for beam, was in zip(beams, (before[2], before[0], before[0])):
        assert np.array_equal(beam.read_block(0, 0, beam.length), was)
    with pytest.raises(pagetide.InvalidArgument):
        client.reorder(beams, [0, 0, 1])
    with pytest.raises(ValueError, match="none was given"):
        client.reorder([], [])
    assert client.keep_only(beams[:1]).cleared_sequences == 2
    beams[1].refresh()
    assert (beams[0].length, beams[1].length) == (22, 0)
    for beam in beams:
        beam.close()


@pytest.mark.parametrize("tier", [types_pb2.TIER_DEVICE, types_pb2.TIER_HOST, types_pb2.TIER_STORE])
def test_a_checkpoint_brings_back_what_was_edited_away(
        client: pagetide.Client, model: pagetide.Model, tier: types_pb2.Tier) -> None:
    tokens = tokens_of(50, 20 + tier)
    with filled(client, model, tokens) as sequence:
        before = sequence.read_block(0, 0, 50)
        ttl = 60.0 if tier == types_pb2.TIER_STORE else None
        checkpoint = sequence.checkpoint(tier, ttl=ttl)
        assert (checkpoint.length, checkpoint.tier) == (50, tier)
        assert (checkpoint.copied_bytes > 0) == (tier == types_pb2.TIER_HOST) or \
            tier == types_pb2.TIER_STORE
        sequence.remove_range(3, 9)
        sequence.rewind(10)
        sequence.restore_checkpoint(checkpoint.checkpoint_id)
        assert (sequence.length, sequence.state.canonical_length) == (50, 50)
        assert np.array_equal(sequence.read_block(0, 0, 50), before)
        assert [c.checkpoint_id for c in sequence.list_checkpoints()] == [checkpoint.checkpoint_id]
        sequence.delete_checkpoint(checkpoint.checkpoint_id)
        sequence.delete_checkpoint(checkpoint.checkpoint_id)
        with pytest.raises(pagetide.NotFound) as missing:
            sequence.restore_checkpoint(checkpoint.checkpoint_id)
        assert missing.value.reason == "CHECKPOINT_NOT_FOUND"


def test_a_checkpoint_of_what_cannot_be_rewound_is_void_after_a_cut(
        client: pagetide.Client, model: pagetide.Model) -> None:
    tokens = tokens_of(50, 31)
    with filled(client, model, tokens) as sequence:
        checkpoint = sequence.checkpoint(scope=session_pb2.CHECKPOINT_SCOPE_NON_REWINDABLE)
        sequence.rewind(10)
        with pytest.raises(pagetide.FailedPrecondition) as void:
            sequence.restore_checkpoint(checkpoint.checkpoint_id)
        assert void.value.reason == "CHECKPOINT_VOID"
        assert sequence.list_checkpoints()[0].is_void
        with pytest.raises(pagetide.InvalidArgument, match="ttl"):
            sequence.checkpoint(ttl=5.0)  # of STORE only


def test_rows_are_kept_by_retention_and_pins(client: pagetide.Client, model: pagetide.Model) -> None:
    tokens = tokens_of(3 * PAGE + 5, 41)
    with filled(client, model, tokens) as sequence:
        kept = sequence.set_retention([pagetide.Retention(0, PAGE, priority=90, ttl=3600),
                                       pagetide.Retention(PAGE)])
        assert kept.pages == 4
        with pytest.raises(pagetide.InvalidArgument, match="priority"):
            sequence.set_retention([pagetide.Retention(priority=101)])
        with pytest.raises(pagetide.InvalidArgument, match="ttl"):
            sequence.set_retention([pagetide.Retention(ttl=0.0)])
        pin = sequence.pin("system-prompt", 0, 2 * PAGE, ttl=3600)
        assert (pin.begin, pin.end, pin.pages) == (0, 2 * PAGE, 2)
        assert pin.HasField("expires_at")
        with pytest.raises(pagetide.InvalidArgument, match="name has 7"):
            sequence.pin("No/Name")
    assert [p.name for p in client.list_pins()] == ["system-prompt"]
    assert [p.name for p in client.list_pins("other")] == []
    client.unpin("system-prompt")
    with pytest.raises(pagetide.NotFound) as missing:
        client.unpin("system-prompt")
    assert missing.value.reason == "PIN_NOT_FOUND"


def test_a_prefill_takes_over_what_another_committed(client: pagetide.Client,
                                                     model: pagetide.Model) -> None:
    tokens = tokens_of(4 * PAGE, 51)
    with client.open(model, tokens) as late, client.open(model, tokens) as early:
        assert (late.length, early.length) == (0, 0)
        claimed = late.extend_match(tokens, claim=30.0)
        assert (claimed.extended_tokens, late.length) == (0, 0)
        append_all(early, tokens[:2 * PAGE])
        extended = late.extend_match(tokens)
        assert (extended.extended_tokens, late.length) == (2 * PAGE, 2 * PAGE)
        assert np.array_equal(late.read_block(0, 0, 2 * PAGE), block_of(model, tokens, 0, 2 * PAGE))


def test_a_plan_takes_chunks_of_a_session_if_asked(client: pagetide.Client, model: pagetide.Model) -> None:
    tokens = tokens_of(100, 71)
    v = rows(model, block_of(model, tokens, 0, 100), pagetide.RowKind.V)
    with filled(client, model, tokens) as sequence:
        sequence.save("with-a-middle")
    prompt = np.concatenate([np.delete(tokens, np.s_[30:55]), tokens_of(4, 72)])
    assert not client.plan(model, prompt, ["with-a-middle"]).plan.chunks
    plan = client.plan(model, prompt, ["with-a-middle"], min_chunk_tokens=8).plan
    assert plan.approximate and plan.compute_tokens == 4
    assert [(c.session_begin, c.prompt_begin, c.count) for c in plan.chunks] == [(55, 30, 45)]
    with client.open(model, prompt, plan=plan) as opened:
        assert (opened.length, opened.state.canonical_length) == (75, 30)
        opened.wait_ready()
        got = rows(model, opened.read_block(0, 0, 75), pagetide.RowKind.V)
        assert np.array_equal(got, np.delete(v, np.s_[30:55], axis=1))
    assert not client.plan(model, prompt, ["with-a-middle"], min_chunk_tokens=80).plan.chunks


def test_asyncio_has_the_same_calls(fleet: Fleet, model: pagetide.Model) -> None:
    async def scene() -> None:
        tokens = tokens_of(40, 61)
        async with aio.Client(router=fleet.router.grpc) as client:
            async with await client.open(model, tokens, no_reuse=True) as sequence:
                async with await sequence.begin_append(tokens) as append:
                    await append.write_block(0, 40, block_of(model, tokens, 0, 40))
                    await append.commit()
                checkpoint = await sequence.checkpoint()
                assert (await sequence.remove_range(0, 4)).removed_rows == 4
                await sequence.restore_checkpoint(checkpoint.checkpoint_id)
                assert sequence.length == 40
                assert (await sequence.set_retention([pagetide.Retention(priority=1)])).pages == 3
                await sequence.pin("from-aio")
                assert [p.name async for p in client.list_pins("from")] == ["from-aio"]
                await client.unpin("from-aio")
                plan = await client.plan(model, tokens)
                assert plan.plan.reuse.reused_tokens == 39 and plan.plan.compute_tokens == 1
                async with await client.open(model, tokens, plan=plan.plan) as planned:
                    assert planned.length == 39

    asyncio.run(scene())
