"""The training loop: steps, metrics, checkpoints, and a clean stop on Ctrl-C. It draws nothing; observers do."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax

from galvatron_jax.runtime.checkpoint import Checkpoints
from galvatron_jax.runtime.data import BatchSource
from galvatron_jax.runtime.metrics import MetricsSink

_LOG = logging.getLogger(__name__)


class Step(Protocol):
    """What the loop needs of a train step."""

    def init(self, seed: int | None = None) -> Any:
        """The state before the first step."""
        ...

    def __call__(self, state: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
        """One optimizer step; the metrics hold `loss`."""
        ...

    def to_tree(self, state: Any) -> Any:
        """The state as a pytree that does not depend on the plan."""
        ...

    def from_tree(self, tree: Any) -> Any:
        """The inverse of `to_tree`."""
        ...


@dataclass(frozen=True)
class Settings:
    """How long to train, and what to write when."""

    steps: int
    """Optimizer steps in all, those before a resume included."""
    seed: int = 0
    log_every: int = 10
    checkpoint_every: int | None = None
    """None writes only after the last step."""
    tokens_per_step: int | None = None
    """For throughput; None where the batch is not made of tokens."""
    examples_per_step: int | None = None


@dataclass(frozen=True)
class Progress:
    """Where the loop is, after each step."""

    step: int
    """Steps done, counted from 1."""
    steps: int
    loss: float
    """Of the newest step whose loss has arrived."""
    step_s: float | None
    """Median of the latest steps; None until there are some."""
    tokens_per_s: float | None
    examples_per_s: float | None


@dataclass(frozen=True)
class Summary:
    """How a run ended."""

    first_step: int
    """Steps done before this run, by the one it resumes."""
    last_step: int
    steps: int
    """Steps asked for."""
    first_loss: float | None
    """None when no step was left to do."""
    last_loss: float | None
    median_step_s: float | None
    step_spread_s: float | None
    """Interquartile range of the steps' seconds."""
    timed_steps: int
    """Steps behind these two; the first, which compiles, is not among them."""
    first_step_s: float | None
    """The first step's seconds, compilation included."""
    tokens_per_s: float | None
    seconds: float
    interrupted: bool = False
    diverged: bool = False
    """Whether the run stopped because the loss was no finite number."""


@dataclass
class _Meter:
    """Losses and times of the steps done. A step's end is when its loss arrives on the host."""

    losses: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)

    def take(self, loss: Any) -> None:
        self.losses.append(float(loss))
        self.ends.append(time.perf_counter())

    def durations(self, window: int | None = None) -> list[float]:
        """Seconds of the latest steps; the first step, which compiles, does not count."""
        ends = self.ends if window is None else self.ends[-window - 1 :]
        return [after - before for before, after in itertools.pairwise(ends)]

    def median_step_s(self, window: int | None = None) -> float | None:
        durations = self.durations(window)
        return statistics.median(durations) if durations else None

    def step_spread_s(self) -> float | None:
        durations = self.durations()
        if len(durations) < 2:
            return 0.0 if durations else None
        low, _, high = statistics.quantiles(durations, n=4, method="inclusive")
        return high - low


class Trainer:
    """Trains a step on a source of batches.

    Args:
        step: the train step.
        source: batches by step number, so that a resumed run continues where the first one stopped.
        settings: how long, and what to write when.
        checkpoints: where to save and resume; None does neither.
        sinks: where records of metrics go.
        observers: called after every step with its `Progress`.
    """

    def __init__(
        self,
        step: Step,
        source: BatchSource,
        settings: Settings,
        *,
        checkpoints: Checkpoints | None = None,
        sinks: Sequence[MetricsSink] = (),
        observers: Sequence[Callable[[Progress], None]] = (),
    ):
        self._step = step
        self._source = source
        self._settings = settings
        self._checkpoints = checkpoints
        self._sinks = sinks
        self._observers = observers
        self._meter = _Meter()

    def run(self) -> Summary:
        """Trains until the last step, Ctrl-C, or a loss that is no finite number.

        The state is saved at the end in the first two cases. A second Ctrl-C stops at once, without saving.
        """
        state, first_step = self._start()
        self._meter = _Meter()
        done, pending = first_step, None
        with _stop_requested() as stop:
            for index in range(first_step, self._settings.steps):
                state, metrics = self._step(state, self._source.batch(index))
                done = index + 1
                # One step stays in flight, so that the device never waits for the host.
                self._arrived(pending)
                pending = (done, metrics)
                if stop.is_set() or self._due(done):
                    self._arrived(pending)
                    pending = None
                if stop.is_set() or self._diverged:
                    break
                if self._due(done):
                    self._save(done, state)
        self._arrived(pending)
        if not self._diverged and done > first_step:
            self._save(done, state)
        return self._summary(first_step, done)

    def _start(self) -> tuple[Any, int]:
        state = self._step.init(self._settings.seed)
        if self._checkpoints is None or self._checkpoints.latest_step is None:
            return state, 0
        latest = self._checkpoints.latest_step
        _LOG.info("Resuming after step %d from %s.", latest, self._checkpoints.directory)
        return self._step.from_tree(self._checkpoints.restore(self._step.to_tree(state))), latest

    @property
    def _diverged(self) -> bool:
        return bool(self._meter.losses) and not math.isfinite(self._meter.losses[-1])

    def _due(self, done: int) -> bool:
        every = self._settings.checkpoint_every
        return every is not None and done % every == 0 and done < self._settings.steps

    def _save(self, done: int, state: Any) -> None:
        if self._checkpoints is not None:
            self._checkpoints.save(done, self._step.to_tree(state))

    def _arrived(self, pending: tuple[int, dict[str, Any]] | None) -> None:
        if pending is None or self._diverged:
            return
        done, metrics = pending
        self._meter.take(metrics["loss"])
        progress = self._progress(done)
        for observe in self._observers:
            observe(progress)
        if done % self._settings.log_every == 0 or done == self._settings.steps or len(self._meter.losses) == 1:
            record = {"step": done, **_scalars(metrics), **_rates(progress)}
            for sink in self._sinks:
                sink.write(record)

    def _progress(self, done: int) -> Progress:
        step_s = self._meter.median_step_s(window=self._settings.log_every)
        return Progress(
            step=done,
            steps=self._settings.steps,
            loss=self._meter.losses[-1],
            step_s=step_s,
            tokens_per_s=_per_second(self._settings.tokens_per_step, step_s),
            examples_per_s=_per_second(self._settings.examples_per_step, step_s),
        )

    def _summary(self, first_step: int, done: int) -> Summary:
        meter, step_s = self._meter, self._meter.median_step_s()
        return Summary(
            first_step=first_step,
            last_step=done,
            steps=self._settings.steps,
            first_loss=meter.losses[0] if meter.losses else None,
            last_loss=meter.losses[-1] if meter.losses else None,
            median_step_s=step_s,
            step_spread_s=meter.step_spread_s(),
            timed_steps=len(meter.durations()),
            first_step_s=meter.ends[0] - meter.started if meter.ends else None,
            tokens_per_s=_per_second(self._settings.tokens_per_step, step_s),
            seconds=time.perf_counter() - meter.started,
            interrupted=done < self._settings.steps and not self._diverged,
            diverged=self._diverged,
        )


@contextlib.contextmanager
def _stop_requested() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets; the second Ctrl-C raises `KeyboardInterrupt` as ever."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)


def _scalars(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if jax.numpy.ndim(value) == 0}


def _rates(progress: Progress) -> dict[str, float]:
    rates = {
        "step_s": progress.step_s,
        "tokens_per_s": progress.tokens_per_s,
        "examples_per_s": progress.examples_per_s,
    }
    return {name: value for name, value in rates.items() if value is not None}


def _per_second(count: int | None, seconds: float | None) -> float | None:
    return None if count is None or not seconds else count / seconds
