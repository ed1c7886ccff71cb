"""Arrays in flat arrays: whole, row by row, in slots, and one in the place of another."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from galvatron_jax.cost.sizes import LINE, lines_of
from galvatron_jax.runtime import packing
from galvatron_jax.runtime.packing import Packing, Rows, in_batches, row_parts

DTYPES = ("float32", "bfloat16", "int32", "bool")
ROWS, ROW = 3, (2, 65)
"""Of a stack whose rows do not end with a line."""


def stacked(name: str) -> bool:
    return name.startswith("stack")


def random(shape: tuple[int, ...], dtype: Any, seed: int = 0) -> jax.Array:
    bits = np.random.default_rng(seed).integers(0, 2 if dtype == "bool" else 100, shape)
    return jnp.asarray(bits).astype(dtype)


@st.composite
def cases(draw: st.DrawFn) -> list[dict[str, jax.Array]]:
    shapes = st.lists(st.integers(0, 70), max_size=3).map(tuple)
    stacks = st.tuples(st.integers(1, 4), st.integers(1, 200))
    found = []
    for _ in range(draw(st.integers(1, 3))):
        arrays = {}
        for number in range(draw(st.integers(0, 4))):
            name = draw(st.sampled_from(("stack", "array"))) + str(number)
            arrays[name] = random(draw(stacks if stacked(name) else shapes), draw(st.sampled_from(DTYPES)), number)
        found.append(arrays)
    return found


@settings(deadline=None, max_examples=50, derandomize=True, database=None)
@given(cases())
@example([{}, {"array0": jnp.zeros((0,))}])
def test_what_is_packed_is_read_again_whole_and_row_by_row(arrays: list[dict[str, jax.Array]]) -> None:
    found = Packing.of(arrays, stacked=stacked)
    for case, mine in enumerate(arrays):
        flats = found.pack(case, mine)
        assert {name: x.shape for name, x in flats.items()} == {n: (size, LINE) for n, size in found.sizes.items()}
        assert all(np.array_equal(found.read(case, name, flats), x) for name, x in mine.items())
        written = found.write(case, found.zeros(), mine)
        assert all(np.array_equal(written[name], flats[name]) for name in flats)
        for name, x in mine.items():
            if stacked(name):
                rows = found.rows(case, name, flats)
                assert rows.length == len(x)
                assert all(np.array_equal(rows[jnp.int32(row)], x[row]) for row in range(len(x)))


def test_rows_are_added_to_and_nothing_else_changes() -> None:
    arrays = {"before": random((5,), "float32"), "stack": random((ROWS, *ROW), "float32"), "behind": jnp.ones(7)}
    found = Packing.of([arrays], stacked=stacked)
    flats = found.pack(0, arrays)
    more = random(ROW, "float32", 1)
    added = jax.jit(lambda flats, row: found.add(0, flats, "stack", more, row=row))(flats, 1)
    wanted = arrays | {"stack": arrays["stack"].at[1].add(more)}
    assert all(np.array_equal(found.read(0, name, added), x) for name, x in wanted.items())
    twice = found.add(0, added, "before", arrays["before"])
    assert np.array_equal(found.read(0, "before", twice), 2 * arrays["before"])


def test_rows_in_another_shape_have_the_same_elements() -> None:
    x = random((ROWS, *ROW), "float32")
    found = Packing.of([{"stack": x}], stacked=stacked)
    rows = found.rows(0, "stack", found.pack(0, {"stack": x}))
    assert isinstance(rows, Rows)
    assert np.array_equal(rows.reshaped((65, 2))[2], x[2].reshape(65, 2))


def test_some_rows_are_written_without_the_others() -> None:
    x = random((ROWS, *ROW), "float32")
    found = Packing.of([{"stack": x}], stacked=stacked)
    flats = found.write(0, found.zeros(), {"stack": x[1:]}, rows=(1, 3))
    assert np.array_equal(found.read(0, "stack", flats), x.at[0].set(0))
    assert np.array_equal(found.places[0]["stack"].part((1, 2)).read(flats), x[1:2])


def test_there_may_be_more_elements_than_32_bits_count() -> None:
    shapes = {
        "before": jax.ShapeDtypeStruct((2**32,), "bfloat16"),
        "stack": jax.ShapeDtypeStruct((3, 2**31), "bfloat16"),
    }
    found = Packing.of([shapes], stacked=stacked)
    flats = {"bfloat16": jax.ShapeDtypeStruct((found.sizes["bfloat16"], LINE), "bfloat16")}
    assert found.places[0]["stack"].part((2, 3)).first * LINE == 2**33

    def change(flats: Any, x: jax.Array, row: jax.Array) -> Any:
        read = found.rows(0, "stack", flats)[row]
        return found.write(0, found.add(0, flats, "stack", read, row=row), {"stack": x}, rows=(2, 3))

    changed = jax.eval_shape(change, flats, jax.ShapeDtypeStruct((1, 2**31), "bfloat16"), jnp.int32(2))
    assert changed["bfloat16"].shape == flats["bfloat16"].shape


def test_random_keys_are_kept_as_words() -> None:
    keys = jax.random.split(jax.random.key(3), 4)
    found = Packing.of([{"keys": keys}])
    again = found.read(0, "keys", found.pack(0, {"keys": keys}))
    assert again.dtype == keys.dtype
    assert np.array_equal(jax.random.key_data(again), jax.random.key_data(keys))


def test_slots_do_not_touch_one_another() -> None:
    arrays = [{"x": random((3, 5), "float32", seed), "n": random((2,), "int32", seed)} for seed in range(3)]
    found = Packing.of(arrays[:1])
    strides = found.lengths(0)
    pool = {name: jnp.zeros((3 * lines, LINE), name) for name, lines in strides.items()}
    for slot, mine in enumerate(arrays):
        pool = found.write_slot(0, pool, mine, slot=jnp.int32(slot), strides=strides)
    for slot, mine in enumerate(arrays):
        again = found.read_slot(0, pool, slot=slot, strides=strides)
        assert all(np.array_equal(again[name], x) for name, x in mine.items())


def test_what_is_laid_over_replaces_arrays_that_are_no_smaller_and_lies_behind_all_else() -> None:
    sums = Packing.of([{"a": jnp.zeros((4, 64)), "b": jnp.zeros(3 * LINE)}, {"a": jnp.zeros((2, 64))}])
    others = {"a": jnp.zeros((4, 32)), "b": jnp.zeros(4 * LINE), "new": jnp.zeros(1), "typed": jnp.zeros(1, "int32")}
    found = Packing.of([others, {}]).laid_over(sums, lambda case, name: name if name in sums.places[case] else None)
    first, end = sums.places[0], lines_of(4 * 64) + 3
    assert found.places[0]["a"].first == first["a"].first
    assert found.places[0]["b"].first == end
    assert found.places[0]["new"].first == end + 4
    assert found.places[0]["typed"].first == 0
    assert found.sizes == {"float32": end + 5, "int32": 1}


def test_rows_of_what_is_laid_over_never_reach_rows_that_are_still_to_be_read() -> None:
    shape, rows = (ROWS, 4, 100), range(ROWS)
    sums = Packing.of([{"stack": jnp.zeros(shape)}], stacked=stacked)
    parts = Packing.of([{"stack": jnp.zeros((ROWS, 100))}], stacked=stacked).laid_over(sums, lambda _, name: name)
    x = random(shape, "float32")
    flats = sums.pack(0, {"stack": x})
    for row in rows:
        one = (row, row + 1)
        read = sums.places[0]["stack"].part(one).read(flats)
        assert np.array_equal(read[0], x[row])
        flats = parts.write(0, flats, {"stack": read[:, 0]}, rows=one)
    assert np.array_equal(parts.read(0, "stack", flats), x[:, 0])


def test_a_view_reads_what_it_is_asked_for_and_does_not_know_its_names() -> None:
    found = Packing.of([{"a": jnp.ones(2), "b": jnp.zeros(3)}])
    view = found.view(0, found.pack(0, {"a": jnp.ones(2), "b": jnp.zeros(3)}))
    assert np.array_equal(view["a"], [1, 1])
    with pytest.raises(TypeError, match="names are not known"):
        len(view)
    with pytest.raises(TypeError, match="names are not known"):
        list(view)


def test_batches_are_filled_in_order_and_large_stacks_are_taken_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_BATCH_BYTES", 100)
    monkeypatch.setattr(packing, "_PART_BYTES", 64)
    sizes = {"a": (10,), "b": (10,), "c": (6,), "stack": (5, 6), "d": (40,)}
    arrays = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in sizes.items()}
    found = [(batch.names, batch.rows) for batch in in_batches(arrays, stacked)]
    stacks = [(("stack",), rows) for rows in ((0, 2), (2, 4), (4, 5))]
    assert found == [(("a", "b"), None), (("c",), None), *stacks, (("d",), None)]
    assert row_parts(jax.ShapeDtypeStruct((2, 8), "float32")) == [None]
    assert row_parts(jax.ShapeDtypeStruct((2, 100), "float32")) == [(0, 1), (1, 2)]
