"""What the trace finds of a model is a document."""

from __future__ import annotations

import pytest

from galvatron_jax.spec.model import ModelSpec
from tests.models import MODELS
from tests.runtime.matrix import traced


@pytest.mark.parametrize("name", MODELS)
def test_every_model_goes_to_a_file_and_back(name: str) -> None:
    spec = traced(name).spec
    assert ModelSpec.from_json(spec.to_json()) == spec
