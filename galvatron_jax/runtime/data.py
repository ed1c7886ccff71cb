"""Batches for training: windows of text as bytes, or random ones. A batch is a function of seed and step alone."""

from __future__ import annotations

import difflib
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from galvatron_jax.errors import InputError
from galvatron_jax.units import format_bytes

BYTE_VOCABULARY = 256

_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})


class BatchSource(Protocol):
    """Batches by step number, so that a resumed run sees exactly what an uninterrupted one would."""

    @property
    def description(self) -> str:
        """What the data is, for people."""
        ...

    def batch(self, step: int) -> Any:
        """The batch of a step, counted from 0: a pytree of arrays with a common leading dim."""
        ...


@dataclass(frozen=True)
class TokenWindows:
    """Windows drawn uniformly from a long row of tokens.

    Example:
        >>> windows = TokenWindows(np.arange(100), example_batch={"tokens": np.zeros((2, 5), np.int32)})
        >>> windows.batch(0)["tokens"].shape
        (2, 5)
    """

    tokens: np.ndarray = field(repr=False)
    """`Int[length]`."""
    example_batch: Any
    """Pytree with one leaf, `Int[batch, window]`; what `batch` returns looks like it."""
    seed: int = 0
    description: str = "tokens"

    def __post_init__(self) -> None:
        window = self._leaf.shape[1]
        if len(self.tokens) <= window:
            raise InputError(
                f"{self.description} has {len(self.tokens)} tokens, but one window needs {window}. "
                "Give more text, or a shorter sequence."
            )

    @property
    def _leaf(self) -> Any:
        leaves = jax.tree.leaves(self.example_batch)
        if len(leaves) != 1 or len(leaves[0].shape) != 2 or not np.issubdtype(leaves[0].dtype, np.integer):
            shapes = ", ".join(f"{leaf.dtype}{tuple(leaf.shape)}" for leaf in leaves)
            raise InputError(
                f"Text feeds models whose batch is one array of tokens, Int[batch, window]; this model's batch is "
                f"{shapes}. Use random data, or call the train step with batches of your own."
            )
        return leaves[0]

    def batch(self, step: int) -> Any:
        """The windows of a step, counted from 0."""
        batch_size, window = self._leaf.shape
        generator = np.random.default_rng((self.seed, step))
        starts = generator.integers(len(self.tokens) - window + 1, size=batch_size)
        rows = self.tokens[starts[:, None] + np.arange(window)].astype(self._leaf.dtype)
        return jax.tree.map(lambda _: rows, self.example_batch)


@dataclass(frozen=True)
class RandomBatches:
    """Random batches from a function of a seed, such as a zoo family's `random_batch`; for benchmarks."""

    make: Callable[[int], Any]
    """Seed to batch."""
    seed: int = 0
    description: str = "random batches"

    def batch(self, step: int) -> Any:
        """The batch of a step, counted from 0."""
        return self.make(int(np.random.default_rng((self.seed, step)).integers(2**31)))


def standard_library_bytes() -> np.ndarray:
    """The Python standard library's own sources as bytes: real text that every machine has.

    Returns:
        `UInt8[length]`, some ten million bytes; the same for the same Python release.

    Raises:
        InputError: when this Python was installed without its sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = [path for path in root.rglob("*.py") if not _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts)]
    if not files:
        raise InputError(f"This Python has no sources in {root}; set data.path to a text file or folder of your own.")
    return _concatenated(files, root=root)


def text_bytes(path: str | PathLike[str]) -> np.ndarray:
    """A text file, or all files of a folder in the order of their names, as bytes.

    Raises:
        InputError: when the path does not exist (with the near name), or holds nothing.
    """
    path = Path(path)
    if path.is_file():
        data = _concatenated([path], root=path.parent)
    elif path.is_dir():
        files = [entry for entry in path.rglob("*") if entry.is_file() and not entry.name.startswith(".")]
        data = _concatenated(files, root=path) if files else np.zeros(0, np.uint8)
    else:
        raise InputError(_missing(path))
    if not len(data):
        raise InputError(f"{path} holds no text. Give a text file, or a folder with some.")
    return data


def describe_bytes(name: str, data: np.ndarray) -> str:
    """A description with the size, such as ``the Python standard library (10.21 MiB)``."""
    return f"{name} ({format_bytes(len(data))})"


def check_vocabulary(vocabulary: int | None, *, model: str) -> None:
    """Refuses a model whose vocabulary cannot hold bytes.

    Raises:
        InputError: when the vocabulary is smaller than 256.
    """
    if vocabulary is not None and vocabulary < BYTE_VOCABULARY:
        raise InputError(
            f"Text is read as bytes, which need a vocabulary of {BYTE_VOCABULARY}; {model} has {vocabulary}. "
            f"Set vocab_size = {BYTE_VOCABULARY} in [model.overrides]."
        )


def batch_size(batch: Any) -> int:
    """Examples in a batch: the leading dim that its leaves share.

    Raises:
        InputError: when the batch is empty, a leaf is a scalar, or leading dims differ.
    """
    leaves: Mapping[str, Any] = {
        jax.tree_util.keystr(path, simple=True, separator="/") or "batch": leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(batch)
    }
    if not leaves:
        raise InputError("The batch has no arrays.")
    shapes = {name: np.shape(leaf) for name, leaf in leaves.items()}
    listed = ", ".join(f"{name}: {shape}" for name, shape in shapes.items())
    if any(not shape for shape in shapes.values()) or len({shape[0] for shape in shapes.values()}) > 1:
        raise InputError(f"All arrays of a batch need one common leading dim, the examples; these have {listed}.")
    size = next(iter(shapes.values()))[0]
    if size < 1:
        raise InputError(f"The batch has no examples: {listed}.")
    return size


def _concatenated(files: list[Path], *, root: Path) -> np.ndarray:
    ordered = sorted(files, key=lambda path: path.relative_to(root).as_posix())
    return np.concatenate([np.fromfile(path, dtype=np.uint8) for path in ordered])


def _missing(path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        return f"No such data: {path}; its folder {parent} does not exist either."
    near = difflib.get_close_matches(path.name, [entry.name for entry in parent.iterdir()], n=1)
    hint = f" Did you mean {parent / near[0]}?" if near else ""
    return f"No such data: {path}.{hint}"
