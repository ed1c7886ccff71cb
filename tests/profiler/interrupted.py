"""Profiles three slow layers, writing the name of each to a file as it begins: `python -m ... CACHE BEGUN`."""

from __future__ import annotations

import sys
from pathlib import Path

from galvatron_jax.profiler import live_mesh, profile
from tests.profiler.test_measure import MODEL, QUICK, Chain, request

BATCHES = (8, 16, 32, 64)


def main(cache: str, begun: str) -> None:
    import jax

    def build(batch: int) -> Chain:
        with Path(begun).open("a") as file:
            file.write(f"{batch}\n")
        return Chain(batch, length=4)

    programs = [(request(batch), lambda batch=batch: build(batch)) for batch in BATCHES]
    profile(
        MODEL,
        programs,
        message_bytes=(1024,),
        cache_dir=cache,
        progress=False,
        sampling=QUICK,
        mesh=live_mesh(jax.devices()[:2]),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
