"""Plans a flat program under random layouts, runs it on eight devices, and gives every device's whole results."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from galvatron_jax.partition.instructions import Apply, Convert, Version
from galvatron_jax.partition.layout import NOWHERE, PENDING, Axis, Frame, Layout
from galvatron_jax.partition.planner import Pass
from galvatron_jax.partition.setting import Setting
from galvatron_jax.partition.static import StaticProgram, prepare
from galvatron_jax.runtime.emit import Evaluator
from galvatron_jax.spec.program import FactorRole
from galvatron_jax.trace.factors import FactorAnalysis
from galvatron_jax.trace.flat import FlatProgram, flatten

from .shards import MESH, all_shards, layouts, logical_axes, mesh


@dataclasses.dataclass(frozen=True)
class Planned:
    """A program planned for given input layouts."""

    flat: FlatProgram
    static: StaticProgram
    axes: tuple[Axis, ...]
    inputs: tuple[Layout, ...]
    instructions: tuple[Convert | Apply, ...]
    outputs: tuple[Version, ...]
    """Repeated on every device."""

    def frame(self, value: int) -> Frame:
        """The value's positions, all whole."""
        factors = self.static.program.factors
        sizes = tuple(factors[f].size for f in self.static.positions[value])
        return Frame(sizes, self.static.ascending[value])

    def run(self, operands: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Every device's results, stacked."""
        everywhere = PartitionSpec(tuple(MESH))
        stacks = [
            self.spread(v, layout, x) for v, layout, x in zip(self.flat.inputs, self.inputs, operands, strict=True)
        ]

        def local(*shards: Any) -> list[Any]:
            evaluator = Evaluator(local=None, flat=self.flat)  # Only whole layers need the plan itself.
            evaluator.env.update({(v, 0): x[0] for v, x in zip(self.flat.inputs, shards, strict=True)})
            evaluator.run(self.instructions)
            results = [evaluator.read(version) for version in self.outputs]
            return [
                jnp.broadcast_to(x, self.flat.avals[value].shape)[None]
                for x, (value, _) in zip(results, self.outputs, strict=True)
            ]

        spread = jax.shard_map(local, mesh=mesh(), in_specs=everywhere, out_specs=everywhere, check_vma=False)
        return [np.asarray(x) for x in jax.jit(spread)(*stacks)]

    def spread(self, value: int, layout: Layout, array: np.ndarray) -> np.ndarray:
        """Every device's part of an input, dim by dim, stacked."""
        frame = self.frame(value)
        parts = all_shards(array.reshape(frame.sizes), self.axes, frame, layout)
        dims = self.static.dim_of[value]
        local = [1] * array.ndim
        for position, size in enumerate(parts.shape[1:]):
            local[dims[position]] *= size
        return parts.reshape(parts.shape[0], *local)


@st.composite
def planned(draw: st.DrawFn, function: Callable[..., Any], operands: Sequence[np.ndarray]) -> Planned:
    """The function's program, planned under random axes, roles, admissible factors and input layouts."""
    flat = flatten(jax.make_jaxpr(function)(*operands))
    program = FactorAnalysis(flat).to_program()
    batch = draw(st.sets(st.integers(0, max(0, len(program.factors) - 1)), max_size=1))
    factors = tuple(
        f.model_copy(update={"role": FactorRole.BATCH}) if i in batch else f for i, f in enumerate(program.factors)
    )
    static = prepare(program.model_copy(update={"factors": factors}))
    axes = draw(logical_axes())
    every = frozenset(range(len(factors)))
    some = st.frozensets(st.sampled_from(sorted(every))) if every else st.just(every)
    allowed = tuple(draw(st.just(every) | some) for _ in axes)
    planner = Pass(Setting(static, [f.size for f in factors], axes, allowed))
    inputs = []
    for value, operand in zip(flat.inputs, operands, strict=True):
        sizes = tuple(factors[f].size for f in static.positions[value])
        summable = np.issubdtype(operand.dtype, np.floating)
        layout = draw(layouts(axes, Frame(sizes, static.ascending[value]), pending=summable))
        planner.hold(value, layout)
        inputs.append(layout)
    planner.run(static.operations)
    whole = (NOWHERE,) * len(axes)
    outputs = tuple(planner.convert(value, whole) for value in flat.outputs)
    assert all(PENDING not in planner.held[v].layouts[n] for v, n in outputs)
    return Planned(flat, static, axes, tuple(inputs), tuple(planner.instructions), outputs)
