"""The training loop, on a step that needs no model."""

import math
import os
import signal

import jax.numpy as jnp
import numpy as np
import pytest

from galvatron_jax.runtime.checkpoint import Checkpoints
from galvatron_jax.runtime.data import RandomBatches
from galvatron_jax.runtime.metrics import JsonLines, read_metrics
from galvatron_jax.runtime.trainer import Settings, Trainer

SOURCE = RandomBatches(lambda seed: {"x": np.float32(seed % 97)})


class CountingStep:
    """The state sums the batches; the loss is that sum, or `bad` at one step."""

    def __init__(self, *, bad_at=None):
        self.bad_at = bad_at
        self.calls = 0

    def init(self, seed=None):
        return {"sum": jnp.zeros(()) + (seed or 0), "steps": jnp.zeros((), jnp.int32)}

    def __call__(self, state, batch):
        self.calls += 1
        state = {"sum": state["sum"] + batch["x"], "steps": state["steps"] + 1}
        loss = jnp.float32(jnp.nan) if self.calls == self.bad_at else state["sum"]
        return state, {"loss": loss, "vector": jnp.zeros(3)}

    def to_tree(self, state):
        return dict(state)

    def from_tree(self, tree):
        return dict(tree)


class Recorder:
    def __init__(self):
        self.records = []

    def write(self, record):
        self.records.append(record)


def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path):
    whole = Trainer(CountingStep(), SOURCE, Settings(steps=9)).run()
    with Checkpoints(tmp_path) as checkpoints:
        first = Trainer(CountingStep(), SOURCE, Settings(steps=4), checkpoints=checkpoints).run()
        checkpoints.wait()
        second = Trainer(CountingStep(), SOURCE, Settings(steps=9), checkpoints=checkpoints).run()
    assert (first.first_step, first.last_step, second.first_step, second.last_step) == (0, 4, 4, 9)
    assert second.last_loss == whole.last_loss


def test_checkpoints_are_written_every_so_often_and_at_the_end(tmp_path):
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        Trainer(CountingStep(), SOURCE, Settings(steps=5, checkpoint_every=2), checkpoints=checkpoints).run()
    assert sorted(int(entry.name) for entry in tmp_path.iterdir()) == [2, 4, 5]


def test_metrics_hold_the_first_and_every_nth_and_the_last_step():
    sink, seen = Recorder(), []
    settings = Settings(steps=11, log_every=4, tokens_per_step=100)
    Trainer(CountingStep(), SOURCE, settings, sinks=[sink], observers=[seen.append]).run()
    assert [record["step"] for record in sink.records] == [1, 4, 8, 11]
    assert [progress.step for progress in seen] == list(range(1, 12))
    assert "vector" not in sink.records[0]
    assert sink.records[-1]["tokens_per_s"] == pytest.approx(100 / sink.records[-1]["step_s"])


def test_the_loop_stops_where_the_loss_is_no_number_and_saves_nothing_bad(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        settings = Settings(steps=50, checkpoint_every=2)
        summary = Trainer(CountingStep(bad_at=4), SOURCE, settings, checkpoints=checkpoints).run()
        checkpoints.wait()
        assert summary.diverged
        assert not summary.interrupted
        assert math.isnan(summary.last_loss)
        assert summary.last_step <= 5
        assert checkpoints.latest_step == 2


def test_ctrl_c_finishes_the_step_and_saves(tmp_path):
    before = signal.getsignal(signal.SIGINT)  # Ignored where the tests run in the background of a script.

    def press(progress):
        if progress.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with Checkpoints(tmp_path) as checkpoints:
        trainer = Trainer(CountingStep(), SOURCE, Settings(steps=100), checkpoints=checkpoints, observers=[press])
        summary = trainer.run()
        checkpoints.wait()
        assert summary.interrupted
        assert checkpoints.latest_step == summary.last_step < 10
    assert signal.getsignal(signal.SIGINT) is before


def test_a_finished_run_has_nothing_to_do(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        Trainer(CountingStep(), SOURCE, Settings(steps=3), checkpoints=checkpoints).run()
        checkpoints.wait()
        again = Trainer(CountingStep(), SOURCE, Settings(steps=3), checkpoints=checkpoints).run()
    assert (again.first_step, again.last_step, again.first_loss, again.interrupted) == (3, 3, None, False)


def test_metrics_after_the_resumed_step_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with JsonLines(path) as sink:
        for step in (1, 2, 3):
            sink.write({"step": step})
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # a crash in the middle of a line
    with JsonLines(path, resume_step=2) as sink:
        sink.write({"step": 3, "loss": 1.0})
    assert list(read_metrics(path)) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 1.0}]
    with JsonLines(path):
        pass
    assert list(read_metrics(path)) == []
