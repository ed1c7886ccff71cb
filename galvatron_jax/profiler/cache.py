"""Measured timings on disk, one small file a point, so that nothing is measured twice and interruption costs little."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import jax
import jaxlib
import numpy as np
from jax.sharding import Mesh

from galvatron_jax.profiler.devices import usable_cores
from galvatron_jax.profiler.processes import agree
from galvatron_jax.spec.profile import Timing

_LOG = logging.getLogger(__name__)

Key = Mapping[str, str | int | float]


def default_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/galvatron_jax/profile``, or the same under ``~/.cache``."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "galvatron_jax" / "profile"


def software_versions() -> dict[str, str]:
    """Versions that a measurement depends on."""
    try:
        own = metadata.version("galvatron_jax")
    except metadata.PackageNotFoundError:
        own = "uninstalled"
    return {
        "galvatron_jax": own,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "python": platform.python_version(),
    }


def environment(mesh: Mesh) -> dict[str, str | int]:
    """What a timing depends on besides the work: devices, how many share what, software and compiler flags."""
    device = mesh.devices.flat[0]
    versions = software_versions()
    return {
        "device": device.device_kind,
        "num_devices": mesh.size,
        "num_processes": jax.process_count(),
        "host": f"{platform.machine()}, {usable_cores()} cores" if device.platform == "cpu" else "",
        "xla_flags": " ".join(sorted(os.environ.get("XLA_FLAGS", "").split())),
        **{name: versions[name] for name in ("galvatron_jax", "jax", "jaxlib")},
    }


@dataclass(frozen=True)
class TimingCache:
    """Timings by key. Each lies in a file of its own, written whole or not at all.

    A file that cannot be read, or that holds another key, is measured again and replaced.
    """

    directory: Path
    environment: Mapping[str, str | int] = field(default_factory=dict)
    """Part of every key."""

    def get_or_measure(self, key: Key, measure: Callable[[], Timing]) -> Timing:
        """The timing of `key`, measured and stored if it is not there.

        In a job of several processes the cache of process 0 counts, and all processes return its timing.
        """
        cached = _agree(self.get(key) if jax.process_index() == 0 else None)
        if cached is not None:
            return cached
        timing = measure()
        if jax.process_index() == 0:
            self.put(key, timing)
        return timing

    def get(self, key: Key) -> Timing | None:
        """The stored timing, or None."""
        path = self._path(key)
        try:
            entry = json.loads(path.read_text())
            if entry["key"] != self._full(key):
                raise ValueError("it belongs to another key")
            return Timing.model_validate(entry["timing"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            _LOG.warning("Cached timing %s cannot be used (%s); measuring it again.", path, error)
            return None

    def put(self, key: Key, timing: Timing) -> None:
        """Stores a timing; a cache that cannot be written to is reported once per point and does not stop the work."""
        path = self._path(key)
        text = json.dumps({"key": self._full(key), "timing": timing.model_dump(mode="json")}, indent=1)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
                file.write(text)
            os.replace(file.name, path)
        except OSError as error:
            _LOG.warning("Timing not cached in %s: %s.", path.parent, error)

    def _full(self, key: Key) -> dict[str, str | int | float]:
        return {**self.environment, **key}

    def _path(self, key: Key) -> Path:
        canonical = json.dumps(self._full(key), sort_keys=True)
        return self.directory / f"{hashlib.sha256(canonical.encode()).hexdigest()[:32]}.json"


def _agree(timing: Timing | None) -> Timing | None:
    """What process 0 holds, on every process."""
    figures = (-1.0, 0.0, 0.0, np.nan)
    if timing is not None:
        least = np.nan if timing.least_s is None else timing.least_s
        figures = (timing.median_s, timing.spread_s, timing.samples, least)
    median, spread, samples, least = agree(np.array(figures)).tolist()
    if median < 0:
        return None
    return Timing(median_s=median, spread_s=spread, samples=int(samples), least_s=None if np.isnan(least) else least)
