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


def test_what_is_left_counts_as_old_unless_others_have_put_objects_aside() -> None:
    gc.collect()
    kept = []
    with collection_paused():
        kept.append([])
    assert not gc.get_freeze_count()
    assert any(found is kept[0] for found in gc.get_objects(generation=2))
    gc.freeze()
    try:
        aside = gc.get_freeze_count()
        with collection_paused():
            kept.append([])
        assert gc.get_freeze_count() >= aside > 0
    finally:
        gc.unfreeze()


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
