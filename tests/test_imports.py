"""Deciding needs no JAX, and the public surface is what it says."""

import subprocess
import sys

import pytest

import galvatron_jax

HEAVY = ("jax", "jaxlib", "flax", "optax", "orbax")


@pytest.mark.parametrize("package", ["", ".errors", ".units", ".spec", ".partition", ".cost", ".search"])
def test_importing_the_deciding_packages_leaves_jax_out(package):
    code = f"import sys, galvatron_jax{package}; print(*sorted({set(HEAVY)} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("name", galvatron_jax.__all__)
def test_every_public_name_resolves_and_is_listed(name):
    assert getattr(galvatron_jax, name) is not None
    assert name in dir(galvatron_jax)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'auto_shrad'"):
        _ = galvatron_jax.auto_shrad
