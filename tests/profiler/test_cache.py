"""Nothing is measured twice; a broken or foreign file is measured again, with a warning."""

import logging

import pytest

from galvatron_jax.profiler.cache import TimingCache, default_cache_dir, environment
from galvatron_jax.profiler.devices import live_mesh
from galvatron_jax.spec.profile import Timing

KEY = {"what": "layer", "kind": "abc", "batch": 4}
TIMING = Timing(median_s=0.1234567890123, spread_s=0.01, samples=7)


@pytest.fixture
def cache(tmp_path):
    return TimingCache(tmp_path / "deep" / "cache", {"device": "cpu"})


def never():
    raise AssertionError("measured again")


def test_a_second_call_is_served_from_the_cache(cache):
    assert cache.get_or_measure(KEY, lambda: TIMING) == TIMING
    assert cache.get_or_measure(dict(reversed(KEY.items())), never) == TIMING


def test_each_point_is_a_file_of_its_own_and_none_is_left_half_written(cache):
    cache.put(KEY, TIMING)
    cache.put({**KEY, "batch": 8}, TIMING)
    assert sorted(path.suffix for path in cache.directory.iterdir()) == [".json", ".json"]


def test_another_environment_measures_anew(cache):
    cache.put(KEY, TIMING)
    assert TimingCache(cache.directory, {"device": "H100"}).get(KEY) is None


def test_the_environment_names_what_a_timing_depends_on(monkeypatch):
    before = environment(live_mesh())
    assert before["num_devices"] == 8
    assert {"device", "jax", "jaxlib", "galvatron_jax", "xla_flags", "host"} <= set(before)
    monkeypatch.setenv("XLA_FLAGS", "--xla_something=1")
    assert environment(live_mesh()) != before


@pytest.mark.parametrize("text", ["", "{", "[]", '{"key": {}}', '{"key": {"what": "else"}, "timing": {"median_s": 1}}'])
def test_a_broken_entry_is_measured_again_with_a_warning(cache, caplog, text):
    cache.put(KEY, TIMING)
    (path,) = cache.directory.iterdir()
    path.write_text(text)
    with caplog.at_level(logging.WARNING):
        assert cache.get_or_measure(KEY, lambda: TIMING) == TIMING
    assert str(path) in caplog.text
    assert cache.get_or_measure(KEY, never) == TIMING


def test_a_broken_timing_is_measured_again(cache, caplog):
    cache.put(KEY, TIMING)
    (path,) = cache.directory.iterdir()
    path.write_text(path.read_text().replace("median_s", "medium_s"))
    assert cache.get(KEY) is None
    assert "measuring it again" in caplog.text


def test_an_unwritable_cache_warns_and_measures(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    cache = TimingCache(tmp_path / "file")
    assert cache.get_or_measure(KEY, lambda: TIMING) == TIMING
    assert "not cached" in caplog.text


def test_the_default_directory_follows_the_platform(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "galvatron_jax" / "profile"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "galvatron_jax" / "profile"
