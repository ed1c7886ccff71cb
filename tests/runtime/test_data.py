"""Batches: determinism, and errors that say what to give instead."""

import jax
import numpy as np
import pytest

from galvatron_jax.errors import InputError
from galvatron_jax.runtime.data import (
    RandomBatches,
    TokenWindows,
    batch_size,
    check_vocabulary,
    standard_library_bytes,
    text_bytes,
)

EXAMPLE = {"tokens": jax.ShapeDtypeStruct((4, 9), np.int32)}


def windows(seed=0):
    return TokenWindows(np.arange(200), example_batch=EXAMPLE, seed=seed)


def test_a_batch_is_a_function_of_seed_and_step_alone():
    first = windows()
    before = [first.batch(step)["tokens"] for step in range(3)]
    assert np.array_equal(windows().batch(2)["tokens"], before[2])
    assert not np.array_equal(before[0], before[1])
    assert not np.array_equal(windows(seed=1).batch(0)["tokens"], before[0])


def test_windows_are_consecutive_tokens_of_the_example_shape_and_dtype():
    tokens = windows().batch(0)["tokens"]
    assert tokens.shape == (4, 9)
    assert tokens.dtype == np.int32
    assert (np.diff(tokens, axis=1) == 1).all()


def test_the_last_window_can_be_drawn():
    exact = TokenWindows(np.arange(10), example_batch=EXAMPLE)
    starts = {int(row[0]) for step in range(20) for row in exact.batch(step)["tokens"]}
    assert starts == {0, 1}


def test_text_shorter_than_a_window_is_refused():
    with pytest.raises(InputError, match="9 tokens, but one window needs 9"):
        TokenWindows(np.arange(9), example_batch=EXAMPLE)


def test_a_batch_that_is_no_array_of_tokens_is_refused():
    images = {"images": jax.ShapeDtypeStruct((4, 8, 8, 3), np.float32)}
    with pytest.raises(InputError, match=r"Int\[batch, window\].*float32\(4, 8, 8, 3\)"):
        TokenWindows(np.arange(100), example_batch=images)


def test_the_standard_library_is_long_text_without_tests():
    data = standard_library_bytes()
    assert data.dtype == np.uint8
    assert len(data) > 3_000_000
    assert np.array_equal(data, standard_library_bytes())


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / ".hidden").write_text("no")
    assert text_bytes(tmp_path).tobytes() == b"onetwo"
    assert text_bytes(tmp_path / "b.txt").tobytes() == b"two"


def test_a_missing_path_names_the_near_one(tmp_path):
    (tmp_path / "corpus.txt").write_text("text")
    with pytest.raises(InputError, match=r"No such data: .*corpsu\.txt\. Did you mean .*corpus\.txt\?"):
        text_bytes(tmp_path / "corpsu.txt")
    with pytest.raises(InputError, match="does not exist either"):
        text_bytes(tmp_path / "nowhere" / "corpus.txt")


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no text"):
        text_bytes(tmp_path)


def test_bytes_need_a_vocabulary_of_256():
    check_vocabulary(256, model="gpt2")
    check_vocabulary(None, model="own")
    with pytest.raises(InputError, match="vocab_size = 256"):
        check_vocabulary(128, model="gpt2:tiny")


def test_random_batches_are_functions_of_the_step():
    source = RandomBatches(lambda seed: seed, seed=3)
    assert source.batch(5) == source.batch(5)
    assert source.batch(5) != source.batch(6)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({}, "no arrays"),
        ({"a": np.zeros((4, 2)), "b": np.zeros((3, 2))}, r"common leading dim.*a: \(4, 2\), b: \(3, 2\)"),
        ({"a": np.zeros(())}, "common leading dim"),
        ({"a": np.zeros((0, 2))}, "no examples"),
    ],
)
def test_batches_without_one_number_of_examples_are_refused(batch, message):
    with pytest.raises(InputError, match=message):
        batch_size(batch)


def test_batch_size_is_the_common_leading_dim():
    assert batch_size({"a": np.zeros((4, 2)), "b": [jax.ShapeDtypeStruct((4,), np.int32)]}) == 4
