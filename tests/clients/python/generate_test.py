"""The blocking client is the asyncio client without its coroutines: nothing is in one and not in the other."""

from __future__ import annotations

import inspect

import pytest

import pagetide
from pagetide import aio

TWINS = [(getattr(aio, name), getattr(pagetide, name)) for name in aio.__all__]


def public(cls: type) -> dict[str, object]:
    return {name: value for name, value in inspect.getmembers(cls) if not name.startswith("_")}


@pytest.mark.parametrize("twins", TWINS, ids=aio.__all__)
def test_twins_have_the_same_methods_and_parameters(twins: tuple[type, type]) -> None:
    of_tasks, of_threads = (public(cls) for cls in twins)
    assert of_tasks.keys() == of_threads.keys() and of_tasks
    for name, method in of_tasks.items():
        if inspect.isfunction(method):
            assert (list(inspect.signature(method).parameters) ==
                    list(inspect.signature(of_threads[name]).parameters)), name  # type: ignore[arg-type]
            assert not inspect.iscoroutinefunction(of_threads[name]), name
            assert not inspect.isasyncgenfunction(of_threads[name]), name


@pytest.mark.parametrize("cls", [cls for pair in TWINS for cls in pair])
def test_every_public_method_says_what_it_does(cls: type) -> None:
    assert cls.__doc__
    assert [name for name, method in public(cls).items()
            if inspect.isfunction(method) and not method.__doc__] == []
