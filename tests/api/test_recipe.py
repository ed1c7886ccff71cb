"""Building abstract models."""

from __future__ import annotations

from contextlib import suppress

import jax
import pytest
from flax import nnx

from galvatron_jax import _compat
from galvatron_jax.api import auto_shard


class Asking(nnx.Module):
    """Asks a parameter for what no tracer can tell, as some versions of Flax do of every one."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.w = nnx.Param(jax.random.normal(rngs.params(), (2,)))
        with suppress(jax.errors.TracerBoolConversionError):
            bool(self.w[...].sum() > 0)


def test_building_an_abstract_model_searches_no_trace_for_error_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each search goes through all operations so far, so that time grew with the square of the layers."""
    searches = []
    find = _compat.partial_eval.JaxprStackFrame.find_progenitors

    def counted(*arguments: object) -> object:
        searches.append(1)
        return find(*arguments)

    monkeypatch.setattr(_compat.partial_eval.JaxprStackFrame, "find_progenitors", counted)
    auto_shard(Asking)(rngs=nnx.Rngs(0))
    assert not searches
    nnx.eval_shape(lambda: Asking(rngs=nnx.Rngs(0)))
    assert searches


def test_errors_are_brief_only_for_a_while() -> None:
    def fails(x: jax.Array) -> jax.Array:
        return x if x else -x

    with pytest.raises(jax.errors.TracerBoolConversionError) as brief, _compat.brief_tracer_errors():
        jax.make_jaxpr(fails)(1.0)
    with pytest.raises(jax.errors.TracerBoolConversionError) as whole:
        jax.make_jaxpr(fails)(1.0)
    assert "argument x" not in str(brief.value)
    assert "argument x" in str(whole.value)
