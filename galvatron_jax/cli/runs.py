"""Folders of finished runs, as `train` leaves them. No JAX."""

from __future__ import annotations

from pathlib import Path

from galvatron_jax.errors import DocumentError
from galvatron_jax.report.accuracy import Recorded
from galvatron_jax.spec.plan import Plan
from galvatron_jax.spec.run import Run

RUN_FILE = "run.json"


def find_runs(path: str | Path) -> list[Recorded]:
    """Finished runs in a folder and below, by name.

    Raises:
        DocumentError: when there is none, or one is faulty.
    """
    root = Path(path)
    files = [root / RUN_FILE] if (root / RUN_FILE).is_file() else sorted(root.rglob(RUN_FILE))
    if not files:
        raise DocumentError(
            f"{path} holds no finished run ({RUN_FILE}). Name the output folder of `galvatron-jax train`, or one above."
        )
    return [Recorded(_name(f.parent, root), Run.load(f), Plan.load(f.parent / "plan.json")) for f in files]


def _name(folder: Path, root: Path) -> str:
    return str(folder.relative_to(root)) if folder != root else root.resolve().name
