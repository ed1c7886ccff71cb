"""Models that the tests run, by name: the zoo's families at a tiny size, and models written as users write them."""

from __future__ import annotations

from . import zoo
from .case import ModelCase as ModelCase

MODELS: dict[str, ModelCase] = {case.name: case for case in zoo.CASES}
