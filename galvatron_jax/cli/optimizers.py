"""Optimizers of optax by name, with their schedule, for configurations and the command line."""

from __future__ import annotations

import optax

from galvatron_jax.cli.config import OptimizerConfig
from galvatron_jax.errors import InputError


def make_optimizer(config: OptimizerConfig, *, steps: int) -> optax.GradientTransformation:
    """Builds the optimizer of a run.

    Args:
        config: which, and its settings.
        steps: of the whole run; the cosine ends there.

    Raises:
        InputError: when the warm-up is longer than the run.
    """
    if config.warmup_steps >= steps and config.warmup_steps:
        raise InputError(
            f"train.optimizer.warmup_steps is {config.warmup_steps}, but the run has {steps} steps; warm up for fewer."
        )
    rate = _schedule(config, steps)
    makers = {
        "adamw": lambda: optax.adamw(rate, weight_decay=config.weight_decay),
        "adam": lambda: optax.adam(rate),
        "sgd": lambda: optax.sgd(rate, momentum=config.momentum or None),
        "lion": lambda: optax.lion(rate, weight_decay=config.weight_decay),
        "adafactor": lambda: optax.adafactor(rate),
    }
    optimizer = makers[config.name]()
    return (
        optimizer if config.clip_norm is None else optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
    )


def _schedule(config: OptimizerConfig, steps: int) -> optax.ScalarOrSchedule:
    peak, final = config.learning_rate, config.final_learning_rate
    if final is None and not config.warmup_steps:
        return peak
    warmup = optax.linear_schedule(0.0, peak, config.warmup_steps)
    rest = steps - config.warmup_steps
    after = optax.constant_schedule(peak) if final is None else optax.cosine_decay_schedule(peak, rest, final / peak)
    return optax.join_schedules([warmup, after], [config.warmup_steps]) if config.warmup_steps else after
