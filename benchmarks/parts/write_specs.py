"""Traces small models of the zoo and writes their specs: `write_specs.py FOLDER FAMILY:PRESET …`."""

from __future__ import annotations

import sys
from pathlib import Path

from flax import nnx

from galvatron_jax.models import registry
from galvatron_jax.trace.model import trace

BATCH = 8


def main(folder: Path, names: list[str]) -> None:
    for name in names:
        family_name, preset = name.split(":")
        family = registry.family(family_name)
        config = registry.model_config(family_name, preset)
        model = nnx.eval_shape(lambda family=family, config=config: family.model(config, rngs=nnx.Rngs(0)))
        traced = trace(model, family.loss_fn, family.example_batch(config, BATCH), microbatch=BATCH, name=name)
        traced.spec.save(folder / f"{family_name}.json")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
