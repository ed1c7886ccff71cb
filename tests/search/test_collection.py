"""The garbage collector rests during a search, and only then."""

from __future__ import annotations

import gc

import pytest

from galvatron_jax.errors import InputError
from galvatron_jax.search.collection import collection_paused


def test_the_collector_rests_inside_and_runs_afterwards() -> None:
    with collection_paused():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(InputError), collection_paused():
        _fail()
    assert gc.isenabled()


def _fail() -> None:
    raise InputError("")


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with collection_paused(), collection_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()
