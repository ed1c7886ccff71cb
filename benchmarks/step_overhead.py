"""The generated train step against the same step written by hand with `jax.jit` and `NamedSharding`, plan by plan.

A GPT-2 on eight devices; both steps start from the same parameters and must give the same losses. They are timed in
turns in one process; the ratio is the median over the pairs.
"""

from __future__ import annotations

from typing import Any

from harness import Claim, Outcome, Pairs, run, time_pairs, virtual_cpus

DEVICES = virtual_cpus(8)

import jax  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from flax import nnx  # noqa: E402
from parts import handwritten_gpt as by_hand  # noqa: E402

from galvatron_jax.models import registry  # noqa: E402
from galvatron_jax.runtime.step import build_step  # noqa: E402
from galvatron_jax.spec.plan import LayerGroup, MeshAxis, Plan, Stage  # noqa: E402
from galvatron_jax.spec.strategy import LayerStrategy  # noqa: E402
from galvatron_jax.trace.model import Traced, trace  # noqa: E402

LIMIT = 1.03
BATCH = 16
SIZES = {
    "num_layers": 6, "width": 256, "num_heads": 8, "mlp_width": 1024, "vocab_size": 1024, "seq_length": 128,
    "tie_embeddings": False,
}  # fmt: skip
SECONDS, FULL_SECONDS = 40.0, 200.0
"""Of timing per plan at most; a quiet machine needs a quarter."""
PLANS = {
    "dp8": (LayerStrategy(dp=("a", "b", "c")), by_hand.data_parallel),
    "dp2-tp4": (LayerStrategy(dp=("a",), tp=("b", "c")), by_hand.tensor_parallel),
    "zero3-dp8": (LayerStrategy(dp=("a", "b", "c"), zero=3), by_hand.zero3),
}
OPTIMIZER = optax.adamw(1e-3)


def measure(full: bool) -> Outcome:
    config = registry.model_config("gpt2", "small", **SIZES)
    traced = trace_model(config)
    tokens = registry.family("gpt2").random_batch(config, BATCH)["tokens"]
    results, claims = [], []
    for name in PLANS:
        pairs, losses = compare(name, config, traced, tokens, seconds=FULL_SECONDS if full else SECONDS)
        ratio, clock = pairs.settled
        results.append({"plan": name, **pairs.summary("generated", "handwritten"), "losses": losses})
        print(f"{name}: {results[-1]}")
        claims.append(Claim(f"{name}: generated step / step by hand", ratio, LIMIT, f"({clock} time)"))
    return Outcome(results, claims)


def trace_model(config: Any) -> Traced:
    """The zoo's model, abstract; parameters come from a fixed seed."""
    gpt2 = registry.family("gpt2")

    def make(seed: Any) -> nnx.Module:
        return gpt2.model(config, rngs=nnx.Rngs(jax.random.key(0 if seed is None else seed)))

    model = nnx.eval_shape(lambda: make(0))
    return trace(model, gpt2.loss_fn, gpt2.example_batch(config, BATCH), microbatch=BATCH, make=make, name="gpt2")


def plan_of(traced: Traced, strategy: LayerStrategy) -> Plan:
    """One strategy for all layers, over three axes of two devices."""
    whole = LayerGroup(start=0, stop=len(traced.spec.layers), strategy=strategy)
    return Plan(
        model="gpt2",
        mesh=tuple(MeshAxis(name=name, size=2) for name in "abc"),
        global_batch=BATCH,
        stages=(Stage(groups=(whole,)),),
        batch_axes=strategy.dp,
    )


class Generated:
    """The step that `build_step` makes."""

    def __init__(self, traced: Traced, strategy: LayerStrategy, tokens: np.ndarray) -> None:
        self.step = build_step(traced, plan_of(traced, strategy), OPTIMIZER, devices=jax.devices()[:8])
        self.state = self.step.init(0)
        self.batch = self.step.place({"tokens": tokens})

    def parameters(self) -> dict[str, np.ndarray]:
        return jax.tree.map(np.asarray, self.step.parameters(self.state))

    def __call__(self) -> float:
        self.state, metrics = self.step.jitted(self.state, self.batch)
        jax.block_until_ready(self.state)
        return float(metrics["loss"])


class Handwritten:
    """The same by hand, from the same parameters."""

    def __init__(self, layout: by_hand.Layout, params: Any, tokens: np.ndarray) -> None:
        self.step, self.state = by_hand.make_step(layout, OPTIMIZER, params)
        self.tokens = jax.device_put(tokens, jax.NamedSharding(layout.mesh, by_hand.P("data")))

    def __call__(self) -> float:
        self.state, loss = self.step(self.state, self.tokens)
        jax.block_until_ready(self.state)
        return float(loss)


def compare(name: str, config: Any, traced: Traced, tokens: np.ndarray, *, seconds: float) -> tuple[Pairs, list[float]]:
    """Times of both, and the generated step's losses over three steps, which the other's must equal."""
    strategy, layout = PLANS[name]
    generated = Generated(traced, strategy, tokens)
    handwritten = Handwritten(layout(jax.devices()[:8]), by_hand.stack(config, generated.parameters()), tokens)
    losses = [generated() for _ in range(3)]
    np.testing.assert_allclose(losses, [handwritten() for _ in range(3)], rtol=1e-4)
    return time_pairs(generated, handwritten, seconds=seconds), losses


if __name__ == "__main__":
    run(measure, devices=DEVICES)
