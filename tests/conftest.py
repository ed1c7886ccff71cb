"""What every test runs on: eight virtual CPU devices and strict dtype promotion.

`GALVATRON_TEST_GPU=1` leaves the real devices alone, for the tests marked `gpu`.
"""

import contextlib
import gc
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

NUM_DEVICES = 8
MEMORY_MAPS, MOST_MEMORY_MAPS = Path("/proc/self/maps"), 20_000
"""Linux gives a process 65530; a compiled pipeline takes some thousand, and keeps them until Python collects cycles."""
TESTS = itertools.count(1)
ON_GPU = bool(os.environ.get("GALVATRON_TEST_GPU"))

# Before JAX is imported. Without XLA's optimisations programs compile in a fraction of the time.
if not ON_GPU:
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = " ".join(
        (
            os.environ.get("XLA_FLAGS", ""),
            f"--xla_force_host_platform_device_count={NUM_DEVICES}",
            "--xla_backend_optimization_level=0",
            # Eight devices share the cores: on a busy machine a collective may wait long for its last member.
            "--xla_cpu_collective_call_terminate_timeout_seconds=300",
        )
    ).strip()

import jax  # noqa: E402


def pytest_sessionstart() -> None:
    """Fails the session, rather than skipping tests, when the virtual devices are not there."""
    if not ON_GPU and jax.device_count() != NUM_DEVICES:
        raise pytest.UsageError(
            f"The tests need {NUM_DEVICES} virtual CPU devices but JAX has {jax.device_count()}: something imported "
            "JAX before tests/conftest.py set XLA_FLAGS. Look for a pytest plugin that does; `-p no:NAME` disables it."
        )


@pytest.fixture(autouse=True)
def dtype_promotion(request: pytest.FixtureRequest) -> Iterator[None]:
    """Forbids implicit dtype promotion, except in tests marked `standard_promotion`."""
    standard = request.node.get_closest_marker("standard_promotion") is not None
    with contextlib.nullcontext() if standard else jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(autouse=True)
def compiled_programs() -> Iterator[None]:
    """Lets go of compiled programs before there are too many for one process."""
    yield
    if next(TESTS) % 4 == 0 and MEMORY_MAPS.exists() and MEMORY_MAPS.read_bytes().count(b"\n") > MOST_MEMORY_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def devices() -> list[jax.Device]:
    """The eight virtual devices."""
    return jax.devices()[:NUM_DEVICES]
