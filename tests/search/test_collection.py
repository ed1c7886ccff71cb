"""The garbage collector rests during a search, and only then."""

from __future__ import annotations

import gc

import pytest

from galvatron_jax.search.collection import collection_paused


def test_the_collector_rests_inside_and_runs_afterwards() -> None:
    with pytest.raises(KeyError), collection_paused():
        assert not gc.isenabled()
        raise KeyError
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with collection_paused(), collection_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()
