"""Costs of many options at once are the costs of each."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from galvatron_jax.cost.layer_costs import layer_costs, phase_costs
from galvatron_jax.cost.memory import OptimizerMemory
from galvatron_jax.cost.model import Batching, CostModel
from galvatron_jax.cost.planner import default_planner
from galvatron_jax.search.space import SearchSpace, meshes_for
from galvatron_jax.spec.presets import cluster_preset
from tests.runtime.matrix import traced

GLOBAL_BATCH = 32


@pytest.mark.parametrize("family", ["gpt2", "t5", "moe"])
@pytest.mark.parametrize("planned_at_once", [True, False])
def test_costs_of_all_options_are_those_of_each(family: str, planned_at_once: bool) -> None:
    model, cluster = traced(family).spec, cluster_preset("a100x8")
    mesh = meshes_for(cluster)[0]
    microbatches = (8, 16, 32)
    together, alone = (
        CostModel.build(
            model,
            cluster=cluster,
            mesh=mesh,
            profile=None,
            optimizer=OptimizerMemory(("float32", "float32"), 4),
            planner=default_planner(),
            microbatches=sizes,
        )
        for sizes in (microbatches if planned_at_once else (), ())
    )
    batching = Batching(GLOBAL_BATCH, 2, tuple(axis.name for axis in mesh))
    for wiring in {layer.kind: layer for layer in alone.wiring.layers}.values():
        kind = model.kinds[wiring.kind]
        strategies = SearchSpace().strategies(kind, mesh=mesh, microbatch=batching.microbatch, pruned=Counter())
        phases = phase_costs(together, wiring.kind, strategies, microbatch=batching.microbatch)
        found = layer_costs(together, wiring, phases, batching)
        every = [alone.layer_cost(wiring, strategy, batching) for strategy in strategies]
        for name in ("static_bytes", "residual_bytes", "workspace_bytes"):
            assert getattr(found, name).tolist() == [getattr(each.memory, name) for each in every], name
        np.testing.assert_allclose(found.forward_s, [each.forward.seconds for each in every], rtol=1e-14)
        np.testing.assert_allclose(found.backward_s, [each.backward.seconds for each in every], rtol=1e-14)
        np.testing.assert_allclose(found.once_s, [each.once_s for each in every], rtol=1e-14)
        assert phases.estimated.tolist() == [each.estimated for each in every]
