"""Tests that compile for real."""

from __future__ import annotations

import pytest

from galvatron_jax.verify.targets import INSTALL, plugin_installed

needs_compiler = pytest.mark.skipif(
    not plugin_installed(), reason=f"XLA's GPU compiler is not installed: {INSTALL} (`make test-verify` does)"
)
"""For tests that compile for GPUs."""
