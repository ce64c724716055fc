"""What the connector's tests share: tiny models, programs, prompts."""

from __future__ import annotations

import pathlib
import tempfile
from typing import Iterator

import numpy as np
import pytest
from fleet import Fleet
from tiny_model import VOCABULARY, write_tiny_model

import pagetide
from pagetide.v1 import sequence_pb2

Q8_0 = 8  # ggml's number
WINDOW = 96


def prompt_of(n: int, seed: int) -> list[int]:
    return [1] + [int(t) for t in np.random.default_rng(seed).integers(3, VOCABULARY, n - 1)]


def page_keys(client: pagetide.Client, model: pagetide.Model, prompt: list[int]) -> dict[tuple[int, int], bytes]:
    """(layer group, first token) → key of each full page that PageTide has of a prompt."""
    with client.open(model, prompt) as sequence:
        table = sequence.worker.sequences.GetBlockTable(
            sequence_pb2.GetBlockTableRequest(sequence_id=sequence.id), timeout=10)
        return {(e.group, e.first_row): e.page_key for e in table.extents if e.page_key}


@pytest.fixture(scope="module")
def folder() -> Iterator[pathlib.Path]:
    with tempfile.TemporaryDirectory(prefix="pt-llama-") as name:
        yield pathlib.Path(name)


@pytest.fixture(scope="module")
def models(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    return {
        "llama": write_tiny_model(folder / "llama.gguf", "llama"),
        # A window that is no multiple of a page and shorter than one.
        "gemma3": write_tiny_model(folder / "gemma3.gguf", "gemma3", layers=6, window=WINDOW),
    }


@pytest.fixture(scope="module")
def fleet(folder: pathlib.Path) -> Iterator[Fleet]:
    fleet = Fleet(folder, pool="128MiB", model_pool="8MiB")
    yield fleet
    fleet.close()
