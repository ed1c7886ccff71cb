"""Finished runs: shown beside their predictions, and fed back into profiles."""

from __future__ import annotations

import json

import pytest

from galvatron_jax.cli.main import main
from galvatron_jax.cost.derive import derive_profile
from galvatron_jax.spec.cluster import ClusterSpec
from galvatron_jax.spec.presets import cluster_preset
from galvatron_jax.spec.profile import Profile
from galvatron_jax.spec.strategy import LayerStrategy
from tests.cost.test_calibration import run as measured_run
from tests.spec import samples


def leave_run(folder, step_s, *, compute=1.0, communication=0.5, profile=None):
    """What `train` leaves of a finished run."""
    cluster, model = cluster_preset("h100x8"), samples.model_spec(2)
    documents = {
        "run": measured_run(step_s, compute=compute, communication=communication, update=0.0),
        "plan": samples.plan((0, 2, LayerStrategy(dp=("a", "b", "c")))),
        "cluster": cluster,
        "model": model,
        "profile": profile or derive_profile(model, cluster),
    }
    for name, document in documents.items():
        document.save(folder / f"{name}.json")


def run(capfd, *arguments):
    code = main([str(argument) for argument in arguments])
    return code, *capfd.readouterr()


def test_runs_are_compared_with_their_predictions(capfd, tmp_path):
    pytest.importorskip("matplotlib")
    leave_run(tmp_path / "one", 1.5)
    leave_run(tmp_path / "two", 3.3, compute=2.5)
    leave_run(tmp_path / "three", 4.5, compute=3.5)
    code, out, _ = run(capfd, "show", tmp_path, "--accuracy", "--plot", tmp_path / "a.png")
    assert code == 0
    assert "Step time of 3 runs: mean error 6.7 %, worst 11.1 %, rank correlation 1.000" in out
    assert (tmp_path / "a.png").stat().st_size > 1000
    code, out, _ = run(capfd, "show", tmp_path / "one", "--accuracy", "--json")
    document = json.loads(out)
    assert document["accuracy"] == {"runs": 1, "mean_error": 0, "worst_error": 0, "rank_correlation": None}
    code, out, _ = run(capfd, "show", tmp_path / "two")
    assert "3.30 s" in out
    assert "1.10 × that" in out


def test_a_profile_is_calibrated_by_runs(capfd, tmp_path):
    leave_run(tmp_path / "one", 3.0)
    code, out, _ = run(capfd, "profile", "--from-run", tmp_path / "one", "--out", tmp_path / "new", "--json")
    assert code == 0
    assert json.loads(out)["factors"]["compute"] == pytest.approx(2)
    before = Profile.load(tmp_path / "one" / "profile.json").collectives[0].timing.median_s
    assert Profile.load(tmp_path / "new" / "profile.json").collectives[0].timing.median_s == pytest.approx(2 * before)
    flops = cluster_preset("h100x8").device.peak_flops_per_s["bfloat16"]
    calibrated = ClusterSpec.load(tmp_path / "new" / "cluster.json").device
    assert calibrated.peak_flops_per_s["bfloat16"] == pytest.approx(flops / 2)


def test_what_cannot_be_compared_is_refused(capfd, tmp_path):
    leave_run(tmp_path / "one", 1.5)
    other = derive_profile(samples.model_spec(2), cluster_preset("a100x8"))
    leave_run(tmp_path / "two", 1.5, profile=other)
    cases = {
        "holds no finished run (run.json)": ["show", tmp_path / "new", "--accuracy"],
        "--plot draws what --accuracy compares": ["show", tmp_path / "one", "--plot", "a.png"],
        "pictures are written to": ["show", tmp_path / "one", "--accuracy", "--plot", "a.txt"],
        "unlike profiles": ["profile", "--from-run", tmp_path / "one", "--from-run", tmp_path / "two", "--out", "x"],
        "Name what to profile": ["profile", "--out", "x"],
    }
    for message, arguments in cases.items():
        code, _, err = run(capfd, *arguments)
        assert code == 2
        assert message in err
