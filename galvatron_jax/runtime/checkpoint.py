"""Checkpoints on orbax: every device writes its own shards, and reads them back in whatever layout is asked for."""

from __future__ import annotations

import difflib
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import orbax.checkpoint as ocp

from galvatron_jax.errors import InputError

_LISTED_DIFFERENCES = 8


class Checkpoints:
    """The checkpoints of one run, in one folder, by step.

    Writing happens in the background; leaving the ``with`` block waits for it.

    Args:
        directory: the folder; created when the first checkpoint is written.
        keep: how many of the newest stay.

    Example:
        >>> import jax.numpy as jnp, tempfile
        >>> tree = {"weight": jnp.arange(4.0)}
        >>> with Checkpoints(tempfile.mkdtemp()) as checkpoints:
        ...     checkpoints.save(10, tree)
        ...     checkpoints.wait()
        ...     checkpoints.latest_step, checkpoints.restore(tree)["weight"].tolist()
        (10, [0.0, 1.0, 2.0, 3.0])
    """

    def __init__(self, directory: str | PathLike[str], *, keep: int = 2):
        self.directory = Path(directory).absolute()
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep),
            item_handlers=ocp.StandardCheckpointHandler(),
        )

    @property
    def latest_step(self) -> int | None:
        """Optimizer steps done in the newest checkpoint; None when there is none."""
        return self._manager.latest_step()

    def save(self, step: int, tree: Any) -> None:
        """Writes a pytree of arrays as the state after `step` steps; returns once the arrays may be reused."""
        self._manager.save(step, args=ocp.args.StandardSave(_named(tree)))

    def restore(self, template: Any, *, step: int | None = None) -> Any:
        """Reads a checkpoint.

        Args:
            template: a pytree like the saved one, of arrays or `jax.ShapeDtypeStruct`; each array comes back with
                the template's sharding, whatever it was saved with.
            step: which; the newest by default.

        Raises:
            InputError: when there is no such checkpoint, or it holds other arrays (what differs).
        """
        step = self.latest_step if step is None else step
        if step is None or step not in self._manager.all_steps():
            found = sorted(self._manager.all_steps())
            raise InputError(f"No checkpoint of step {step} in {self.directory}; there are {found or 'none'}.")
        wanted = _named(jax.tree.map(ocp.utils.to_shape_dtype_struct, template))
        self._check(step, wanted)
        restored = self._manager.restore(step, args=ocp.args.StandardRestore(wanted))
        return jax.tree.unflatten(jax.tree.structure(template), [restored[name] for name in wanted])

    def delete_all(self) -> None:
        """Removes every checkpoint of the folder."""
        for step in self._manager.all_steps():
            self._manager.delete(step)

    def wait(self) -> None:
        """Blocks until everything is on disk."""
        self._manager.wait_until_finished()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None):
        self._manager.wait_until_finished()
        self._manager.close()

    def _check(self, step: int, wanted: dict[str, jax.ShapeDtypeStruct]) -> None:
        saved = {name: (tuple(m.shape), str(m.dtype)) for name, m in _saved_arrays(self._manager, step).items()}
        now = {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in wanted.items()}
        faults = [f"{name}: saved, but not part of this run's state" for name in saved.keys() - now.keys()]
        for name, (shape, dtype) in now.items():
            if name not in saved:
                near = difflib.get_close_matches(name, saved, n=1)
                faults.append(f"{name}: not saved{f' (saved: {near[0]})' if near else ''}")
            elif saved[name] != (shape, dtype) and "key<" not in dtype:  # keys are saved as the words they consist of
                faults.append(f"{name}: saved as {saved[name][1]}{saved[name][0]}, now {dtype}{shape}")
        if faults:
            more = [f"and {len(faults) - _LISTED_DIFFERENCES} more"] if len(faults) > _LISTED_DIFFERENCES else []
            raise InputError(
                "\n  ".join(
                    [
                        f"The checkpoint of step {step} in {self.directory} is of another model or optimizer:",
                        *sorted(faults)[:_LISTED_DIFFERENCES],
                        *more,
                        "Choose another output folder, or start anew with --fresh.",
                    ]
                )
            )


def _named(tree: Any) -> dict[str, Any]:
    """A flat dict by path: the one shape of pytree that needs no Python class to be read back."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/") or "value": leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _saved_arrays(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    metadata = manager.item_metadata(step)
    return dict(getattr(metadata, "tree", metadata))
