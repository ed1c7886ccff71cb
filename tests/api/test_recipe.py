"""Building abstract models."""

from __future__ import annotations

import jax
import pytest
from flax import nnx

from galvatron_jax import _compat
from galvatron_jax.api import auto_shard
from galvatron_jax.models import llama, registry


def test_building_an_abstract_model_searches_no_trace_for_error_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each search goes through all operations so far, so that time grew with the square of the layers."""
    searches = []
    find = _compat.partial_eval.JaxprStackFrame.find_progenitors

    def counted(*arguments: object) -> object:
        searches.append(1)
        return find(*arguments)

    monkeypatch.setattr(_compat.partial_eval.JaxprStackFrame, "find_progenitors", counted)
    config = registry.model_config("llama", "tiny")
    auto_shard(llama.Llama)(config, rngs=nnx.Rngs(0))
    assert not searches
    nnx.eval_shape(lambda: llama.Llama(config, rngs=nnx.Rngs(0)))
    if not searches:
        pytest.skip("this Flax asks no tracer for its sharding: it does not need `brief_tracer_errors`")


def test_errors_are_brief_only_for_a_while() -> None:
    def fails(x: jax.Array) -> jax.Array:
        return x if x else -x

    with pytest.raises(jax.errors.TracerBoolConversionError) as brief, _compat.brief_tracer_errors():
        jax.make_jaxpr(fails)(1.0)
    with pytest.raises(jax.errors.TracerBoolConversionError) as whole:
        jax.make_jaxpr(fails)(1.0)
    assert "argument x" not in str(brief.value)
    assert "argument x" in str(whole.value)
