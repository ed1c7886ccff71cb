"""`train_step`: from a model, a loss and an optimizer to one parallel train step; `find_plan` stops at the plan."""

from __future__ import annotations

from collections.abc import Iterator
from os import PathLike
from typing import Any

import flax.linen
import jax
import optax
from rich.console import RenderableType

from galvatron_jax.api.clusters import LIVE, check_live
from galvatron_jax.api.planning import LossFn, Planned, make_plan, make_request
from galvatron_jax.errors import InputError
from galvatron_jax.runtime.data import batch_size
from galvatron_jax.runtime.program import StepProgram
from galvatron_jax.runtime.step import build_step
from galvatron_jax.spec.cluster import ClusterSpec
from galvatron_jax.spec.model import ModelSpec
from galvatron_jax.spec.plan import Plan, Prediction
from galvatron_jax.spec.profile import Profile

ProfileLike = Profile | str | PathLike[str] | None
ClusterLike = ClusterSpec | str | PathLike[str]


class TrainStep:
    """A train step that runs by its plan: ``state, metrics = train_step(state, batch)``.

    The state is a pytree of `jax.Array`s, each with its sharding; a call donates it, so use the one returned.
    Metrics hold the `loss`, a mean over the batch, and what the loss function's aux held.
    """

    def __init__(self, planned: Planned, step: StepProgram, *, default_seed: int | None = None):
        self._planned = planned
        self._step = step
        self._default_seed = default_seed

    def __call__(self, state: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
        """Runs one optimizer step.

        Args:
            state: from `init`, the last call, or a checkpoint.
            batch: a pytree like the example batch, of NumPy or JAX arrays.

        Raises:
            InputError: when the batch has another number of examples than the plan.
        """
        size = batch_size(batch)
        if size != self.plan.global_batch:
            raise InputError(
                f"The batch has {size} examples, the plan is for {self.plan.global_batch}. Give batches of that size "
                "(drop a last, smaller one), or build another train step."
            )
        return self._step(state, batch)

    def init(self, seed: int | None = None) -> Any:
        """The state before the first step: parameters, optimizer and model state, each born where it belongs.

        Args:
            seed: seeds the generators of a decorated or a Linen model anew; None takes them as they were when the
                model was built (0 for Linen). An undecorated NNX model keeps the values it has, whatever the seed.
        """
        return self._step.init(self._default_seed if seed is None else seed)

    def to_tree(self, state: Any) -> Any:
        """The state as a pytree that does not depend on the plan: for checkpoints, export and inspection."""
        return self._step.to_tree(state)

    def from_tree(self, tree: Any) -> Any:
        """The inverse of `to_tree`, under this step's plan."""
        return self._step.from_tree(tree)

    def explain(self) -> str:
        """Which plan, why, what the runners-up cost, and what bounds it, as text."""
        return self._planned.explain()

    def report(self) -> Iterator[RenderableType]:
        """The same as tables for a `rich` console."""
        return self._planned.report()

    @property
    def plan(self) -> Plan:
        """What runs, with its prediction. Save it, and pass it to `train_step` to skip the search."""
        return self._planned.plan

    @property
    def prediction(self) -> Prediction | None:
        """What the cost model expects of the plan."""
        return self.plan.prediction

    @property
    def model_spec(self) -> ModelSpec:
        """The traced model."""
        return self._planned.model

    @property
    def cluster(self) -> ClusterSpec:
        """The devices the plan is for."""
        return self._planned.cluster

    @property
    def profile(self) -> Profile:
        """The times the plan rests on."""
        return self._planned.profile

    @property
    def step(self) -> StepProgram:
        """The runtime's step, for those who want the lowered or compiled program."""
        return self._step

    def __repr__(self) -> str:
        return f"TrainStep({self.plan.model!r}, {self.plan.num_devices} devices, batch {self.plan.global_batch})"


def train_step(
    model: Any,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    example_batch: Any,
    *,
    plan: Plan | str | PathLike[str] | None = None,
    memory_per_device: str | int | None = None,
    num_microbatches: int | None = None,
    cluster: ClusterLike = LIVE,
    profile: ProfileLike = None,
    executor: str | None = None,
    sum_gradients_in: str | None = None,
    cache_dir: str | None = None,
    name: str | None = None,
    progress: bool | None = None,
) -> TrainStep:
    """Finds the best plan that fits and builds the train step: trace, profile (cached), search, build.

    Args:
        model: an instance of a Flax module, NNX or Linen; of an `auto_shard` class where it is large.
        loss_fn: `loss_fn(model, batch)` gives the loss, a mean over the batch, or `(loss, aux)`. For a weighted mean
            put the batch's total weight into ``aux["weight"]``. (A Linen model arrives bound to its variables.)
        optimizer: an optax optimizer.
        example_batch: a pytree of arrays or `jax.ShapeDtypeStruct`s whose leading dim is the global batch.
        plan: a plan, or the path of one, instead of a search.
        memory_per_device: budget such as ``"20GiB"``; by default the decorator's, else all of the device's memory.
        num_microbatches: by default the decorator's, else the search chooses.
        cluster: `live` measures the devices here; or a preset, a document, or a `ClusterSpec` that describes them.
        profile: `measure` (the default for the cluster `live`), `derive` from the cluster's figures (the default
            else), or a `Profile` or its path.
        executor: `local` runs the planner's own device programs, `annotate` (plans of one stage) leaves partitioning to
            XLA, guided by the plan's layouts; by default what the plan says, which is `local` after a search.
        sum_gradients_in: type in which gradients are summed over devices where their own is wider, such as
            ``"bfloat16"`` for parameters in float32: half the bytes, less exact. By default what the plan says, which
            is their own type after a search. Of the executor `local` alone.
        cache_dir: where measurements are kept; by default the user's cache folder.
        name: what to call the model; by default its class.
        progress: whether to draw progress on stderr; by default only on a terminal.

    Raises:
        InputError: when an argument does not fit the others.
        InfeasibleError: when no plan fits the budget.
        PlanMismatchError: when `plan` was made for another model, batch or number of devices.
        TraceError: when the model cannot be traced.
    """
    planned = find_plan(
        model,
        loss_fn,
        optimizer,
        example_batch,
        plan=plan,
        memory_per_device=memory_per_device,
        num_microbatches=num_microbatches,
        cluster=cluster,
        profile=profile,
        executor=executor,
        sum_gradients_in=sum_gradients_in,
        cache_dir=cache_dir,
        name=name,
        progress=progress,
    )
    check_live(planned.cluster)
    step = build_step(planned.traced, planned.plan, optimizer, devices=jax.devices())
    return TrainStep(planned, step, default_seed=0 if isinstance(model, flax.linen.Module) else None)


def find_plan(
    model: Any,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    example_batch: Any,
    *,
    plan: Plan | str | PathLike[str] | None = None,
    memory_per_device: str | int | None = None,
    num_microbatches: int | None = None,
    cluster: ClusterLike = LIVE,
    profile: ProfileLike = None,
    executor: str | None = None,
    sum_gradients_in: str | None = None,
    cache_dir: str | None = None,
    name: str | None = None,
    progress: bool | None = None,
) -> Planned:
    """As `train_step`, but stops at the plan; the cluster need not be here.

    Raises:
        GalvatronError: as `train_step`.
    """
    request = make_request(
        model,
        loss_fn,
        optimizer,
        example_batch,
        memory_per_device=memory_per_device,
        num_microbatches=num_microbatches,
        name=name,
        cache_dir=cache_dir,
        progress=progress,
    )
    return make_plan(
        request, plan=plan, cluster=cluster, profile=profile, executor=executor, sum_gradients_in=sum_gradients_in
    )
