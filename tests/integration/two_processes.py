"""One of two processes with four virtual devices each: `python -m tests.integration.two_processes ADDRESS RANK CASE`.

Trains a model of the tests in stages for three steps and prints one JSON object: losses, and norms of the parameters.
"""

from __future__ import annotations

import json
import sys

import jax

STAGES_ACROSS, STAGES_INSIDE = "across", "inside"


def main(address: str, rank: int, case: str) -> None:
    """Runs the case; devices of the mesh's first axis are in different processes, or those of its last."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, num_processes=2, process_id=rank)
    jax.config.update("jax_default_matmul_precision", "highest")

    # These look at the devices.
    from galvatron_jax.runtime.step import build_step
    from galvatron_jax.spec.plan import Schedule
    from tests.runtime.matrix import plain, traced
    from tests.runtime.pipelines import MIXES, plan_in_stages
    from tests.runtime.reference import OPTIMIZERS, batches

    model, count = "gpt2", 4
    mix = MIXES[2]["every-kind"] if case == STAGES_ACROSS else (plain(dp="b", tp="c"), plain(dp="bc", zero=3))
    plan = plan_in_stages(model, (0, 2), mix, degree=2, schedule=Schedule.ONE_F_ONE_B, num_microbatches=count)
    devices = sorted(jax.devices(), key=lambda device: device.id)
    if case == STAGES_INSIDE:
        # Each stage lies over both processes: what its layers exchange crosses between them.
        devices = [devices[half * 4 + place] for place in range(4) for half in range(2)]
    step = build_step(traced(model), plan, OPTIMIZERS["sgd"], devices=devices)
    state, losses = step.init(0), []
    for batch in batches(model, count):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    norms = jax.jit(lambda tree: {path: jax.numpy.linalg.norm(x) for path, x in tree.items()})
    found = {path: float(x) for path, x in norms(step.parameters(state)).items()}
    print(json.dumps({"rank": rank, "losses": losses, "norms": found}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
