"""The base of every document: a frozen, versioned pydantic model that a file holds as it is."""

from __future__ import annotations

import hashlib
import json
from os import PathLike
from typing import Any, Self

from pydantic import BaseModel, ConfigDict

from galvatron_jax.errors import InputError
from galvatron_jax.spec import files
from galvatron_jax.spec.diff import diff_values
from galvatron_jax.spec.validation import validate


class Record(BaseModel):
    """A frozen value inside a document. Unknown keys are refused; field docstrings are the schema's text."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        ser_json_inf_nan="constants",
        arbitrary_types_allowed=False,
    )


class Document(Record):
    """A record that lives in a file of its own: JSON, or TOML where a person writes it.

    Example:
        >>> from galvatron_jax.spec.presets import cluster_preset
        >>> cluster = cluster_preset("h100x8")
        >>> type(cluster).from_json(cluster.to_json()) == cluster
        True
        >>> cluster.diff(cluster_preset("h100x16"))[:2]
        ["name: 'h100x8' -> 'h100x16'", 'num_nodes: 1 -> 2']
    """

    @classmethod
    def from_json(cls, text: str, *, source: str = "JSON text") -> Self:
        """Reads a document.

        Args:
            text: The JSON text.
            source: What error messages call it, such as its path.

        Raises:
            DocumentError: naming every fault with its path in the document.
        """
        return validate(cls, files.parse_json(text, source=source), source)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """Reads a document from a `.json` or `.toml` file.

        Raises:
            DocumentError: naming every fault, a missing file or wrong syntax.
        """
        return validate(cls, files.read_data(path), str(path))

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """The JSON schema, each field with its description."""
        return cls.model_json_schema()

    def to_json(self) -> str:
        """Writes the document as JSON text for people: indented, short values on one line."""
        return files.format_json(self.model_dump(mode="json"))

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the document to a `.json` or `.toml` file, whole or not at all, and creates its folder.

        Raises:
            DocumentError: for another suffix, or a document that TOML cannot hold (it has no null in lists).
        """
        files.write_data(path, self.model_dump(mode="json"))

    def content_hash(self) -> str:
        """Sixteen hex digits that are equal for equal documents, on every machine."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    def diff(self, other: Self) -> list[str]:
        """What differs in `other`, one line per place: ``stages[0].groups[0].strategy.tp: ['c'] -> ['b', 'c']``.

        Raises:
            InputError: when `other` is another type of document.
        """
        if type(other) is not type(self):
            raise InputError(f"A {type(self).__name__} cannot be compared with a {type(other).__name__}.")
        return diff_values(self.model_dump(mode="json"), other.model_dump(mode="json"))
