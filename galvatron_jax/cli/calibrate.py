"""`galvatron-jax profile --from-run`: the numbers of earlier runs, scaled to what was measured. No JAX."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from rich.console import Group

from galvatron_jax.cli.output import Output
from galvatron_jax.cli.runs import RUN_FILE
from galvatron_jax.cost.calibration import Factors, calibrated_cluster, calibrated_profile, fit_factors
from galvatron_jax.errors import InputError
from galvatron_jax.report.text import facts
from galvatron_jax.spec.cluster import ClusterSpec
from galvatron_jax.spec.model import ModelSpec
from galvatron_jax.spec.profile import Profile
from galvatron_jax.spec.run import Run


def calibrate(folders: Sequence[str], out: str, output: Output) -> int:
    """Fits the parts of the predictions to the measured steps, and writes the profile and the cluster scaled by them.

    Raises:
        DocumentError: when a folder is none of a finished run.
        InputError: when the runs do not share one profile.
    """
    runs = [Run.load(Path(folder) / RUN_FILE) for folder in folders]
    profiles = [Profile.load(Path(folder) / "profile.json") for folder in folders]
    for folder, profile in zip(folders[1:], profiles[1:], strict=True):
        if profile.content_hash() != profiles[0].content_hash():
            raise InputError(
                f"{folders[0]} and {folder} were predicted from unlike profiles, so their errors say nothing of one "
                "another. Give runs of one profile (set plan.profile to the same file), or one run alone."
            )
    factors = fit_factors(runs)
    first = Path(folders[0])
    documents = {
        "cluster": calibrated_cluster(ClusterSpec.load(first / "cluster.json"), factors),
        "model": ModelSpec.load(first / "model.json"),
        "profile": calibrated_profile(profiles[0], factors),
    }
    for name, document in documents.items():
        document.save(Path(out) / f"{name}.json")
    output.show([_report(factors, len(runs))])
    output.say(f"Written to {out}: cluster.json, model.json, profile.json")
    output.result({"factors": dataclasses.asdict(factors), "runs": len(runs), "output": out})
    return 0


def _report(factors: Factors, runs: int) -> Group:
    rows = [(name, f"{getattr(factors, name):.3f} ×") for name in ("compute", "communication", "update")]
    rows.append(("mean error before", f"{100 * factors.error_before:.1f} %"))
    rows.append(("after", f"{100 * factors.error_after:.1f} %"))
    return facts(f"Measured over predicted seconds, {runs} run{'s' if runs > 1 else ''}", rows)
