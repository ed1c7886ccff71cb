"""From a model to a plan: trace, cluster, profile, search. Everything of `train_step` before the step is built."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from os import PathLike
from typing import Any

import optax
from rich.console import RenderableType

from galvatron_jax.api.budget import memory_budget
from galvatron_jax.api.clusters import LIVE, resolve_cluster
from galvatron_jax.api.decorator import options_of, recipe_of
from galvatron_jax.api.optimizer import optimizer_memory
from galvatron_jax.api.profiling import measure_profile
from galvatron_jax.cost import derive_profile
from galvatron_jax.errors import InputError, PlanMismatchError
from galvatron_jax.report.plans import plan_report
from galvatron_jax.report.searches import search_report
from galvatron_jax.report.text import render
from galvatron_jax.runtime.data import batch_size
from galvatron_jax.search import SearchResult, SearchSpace
from galvatron_jax.search.question import Question
from galvatron_jax.spec.cluster import ClusterSpec
from galvatron_jax.spec.model import ModelSpec
from galvatron_jax.spec.plan import Plan
from galvatron_jax.spec.plan_checks import EXECUTORS, check_gradient_sums, check_plan
from galvatron_jax.spec.profile import Profile
from galvatron_jax.trace.model import Traced, trace

DERIVE, MEASURE = "derive", "measure"

LossFn = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Planned:
    """A plan with everything that it was made from."""

    model: ModelSpec
    """The model, traced at the global batch."""
    traced: Traced
    """The model, traced at the plan's micro-batch: what runs."""
    cluster: ClusterSpec
    profile: Profile
    plan: Plan
    """With its prediction."""
    result: SearchResult | None
    """None where the plan was given."""

    def report(self) -> Iterator[RenderableType]:
        """Which plan, why, what the runners-up cost, and what bounds it, as tables for a `rich` console."""
        if self.result is None:
            yield from plan_report(self.plan, model=self.model)
            yield "The plan was given, not searched for."
        else:
            yield from search_report(self.result, model=self.model)
        yield from (f"Note: {note}" for note in self.model.notes)

    def explain(self) -> str:
        """The same as text."""
        return render(self.report())


@dataclass(frozen=True)
class Request:
    """What to plan for."""

    model: Any
    loss_fn: LossFn
    optimizer: optax.GradientTransformation
    example_batch: Any
    memory_bytes: int | None
    num_microbatches: int | None
    name: str | None = None
    cache_dir: str | None = None
    progress: bool | None = None

    @property
    def global_batch(self) -> int:
        """Examples per step."""
        return batch_size(self.example_batch)

    def trace(self, *, num_microbatches: int = 1) -> Traced:
        """Traces the model at the micro-batch of a plan."""
        recipe = recipe_of(self.model)
        return trace(
            self.model,
            self.loss_fn,
            self.example_batch,
            microbatch=self.global_batch // num_microbatches,
            make=recipe.build if recipe else None,
            name=self.name,
        )


def make_request(
    model: Any,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    example_batch: Any,
    *,
    memory_per_device: str | int | None,
    num_microbatches: int | None,
    **other: Any,
) -> Request:
    """Checks the arguments, and fills in what the decorator was told.

    Raises:
        InputError: when the optimizer or the loss is of no use, the batch's arrays have no common leading dim, or it
            does not divide into the micro-batches.
    """
    if not callable(loss_fn):
        raise InputError(f"loss_fn is a {type(loss_fn).__name__}; give a function loss_fn(model, batch) -> loss.")
    if not hasattr(optimizer, "init") or not hasattr(optimizer, "update"):
        raise InputError(f"optimizer is a {type(optimizer).__name__}; give an optax one, such as optax.adamw(3e-4).")
    options = options_of(model)
    memory_bytes = options.memory_bytes if memory_per_device is None else memory_budget(memory_per_device)
    count = num_microbatches if num_microbatches is not None else options.num_microbatches
    size = batch_size(example_batch)
    if count is not None and (count < 1 or size % count):
        divisors = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
        raise InputError(
            f"A batch of {size} examples does not divide into {count} micro-batches; use one of {divisors}, or another "
            "batch size."
        )
    return Request(model, loss_fn, optimizer, example_batch, memory_bytes, count, **other)


def make_plan(
    request: Request,
    *,
    plan: Plan | str | PathLike[str] | None,
    cluster: ClusterSpec | str | PathLike[str],
    profile: Profile | str | PathLike[str] | None,
    executor: str | None = None,
    sum_gradients_in: str | None = None,
) -> Planned:
    """Traces, profiles and searches plans of one stage; or checks and prices a given one, of any number.

    The executor and the type of sums given are the plan's from then on; None leaves the plan's own. Prices are those of
    `local`.

    Raises:
        InfeasibleError: when no plan fits the budget.
        InputError: when there is no such executor, or it cannot sum gradients in that type.
        PlanMismatchError: when the given plan is for another model, batch or number of devices.
    """
    if executor not in (None, *EXECUTORS):
        raise InputError(f"executor: no executor {executor!r}. Give one of {', '.join(EXECUTORS)}, or None.")
    chosen_here = {"executor": executor, "gradient_sum_dtype": sum_gradients_in}
    chooses = {name: value for name, value in chosen_here.items() if value is not None}
    given = Plan.load(plan) if isinstance(plan, (str, PathLike)) else plan
    given = given if given is None else given.model_copy(update=chooses)
    traced = request.trace()
    if given is None and executor is not None:
        check_gradient_sums(sum_gradients_in, traced.spec, executor=executor)
    count = request.num_microbatches if given is None else given.num_microbatches
    # The profiler measures layers on the whole mesh, as one stage has it.
    space = SearchSpace(
        num_microbatches=None if count is None else (count,),
        pipeline_degrees=(1,),
        gradient_sum_dtype=sum_gradients_in,
    )
    question = make_question(request, traced, cluster=cluster, profile=profile, space=space, given=given)
    if given is None:
        result = question.answer()
        chosen = result.plan.model_copy(update=chooses)
    else:
        result = None
        chosen = given.model_copy(update={"prediction": question.price(given)})
    if chosen.num_microbatches > 1:
        traced = request.trace(num_microbatches=chosen.num_microbatches)
    assert question.profile is not None
    return Planned(question.model, traced, question.cluster, question.profile, chosen, result)


def make_question(
    request: Request,
    traced: Traced,
    *,
    cluster: ClusterSpec | str | PathLike[str],
    profile: Profile | str | PathLike[str] | None,
    space: SearchSpace,
    global_batches: tuple[int, ...] | None = None,
    given: Plan | None = None,
) -> Question:
    """What is to be searched for a traced model: finds the cluster, and measures or derives the profile.

    Args:
        request: what to plan for.
        traced: its model.
        cluster: as `train_step` takes it.
        profile: as `train_step` takes it.
        space: which plans count.
        global_batches: of which the best is taken; None for the request's own.
        given: a plan to check first, before anything is measured.

    Raises:
        InputError: when the profile is another model's, live devices are to be measured that are not, or gradients
            cannot be summed in the type that the space says.
        PlanMismatchError: when the given plan is for another model, batch or number of devices.
    """
    if given is None:
        check_gradient_sums(space.gradient_sum_dtype, traced.spec)
    live = cluster == LIVE
    spec = resolve_cluster(cluster, cache_dir=request.cache_dir, progress=request.progress)
    if given is not None:
        _check_given(given, traced.spec, spec, request.global_batch)
    return Question(
        model=traced.spec,
        cluster=spec,
        global_batches=global_batches or (request.global_batch,),
        optimizer=optimizer_memory(request.optimizer, traced.spec),
        profile=_profile(request, traced, spec, profile, live=live, space=space),
        memory_bytes=request.memory_bytes,
        space=space,
    )


def _profile(
    request: Request,
    traced: Traced,
    cluster: ClusterSpec,
    profile: Profile | str | PathLike[str] | None,
    *,
    live: bool,
    space: SearchSpace,
) -> Profile:
    """The profile asked for; by default measured on live devices and derived for absent ones."""
    if profile == DERIVE or (profile is None and not live):
        return derive_profile(traced.spec, cluster)
    if profile is None or profile == MEASURE:
        if not live:
            raise InputError(f"Only live devices can be measured, and {cluster.name!r} is a description; use 'live'.")
        return measure_profile(
            traced, cluster, request.global_batch, space=space, cache_dir=request.cache_dir, progress=request.progress
        )
    return profile if isinstance(profile, Profile) else Profile.load(profile)


def _check_given(plan: Plan, model: ModelSpec, cluster: ClusterSpec, global_batch: int) -> None:
    if plan.global_batch != global_batch:
        raise PlanMismatchError(
            f"The plan is for {plan.global_batch} examples per step, the example batch has {global_batch}. Give "
            f"batches of {plan.global_batch}, change global_batch in the plan, or search anew."
        )
    check_plan(plan, model, cluster.num_devices)
