"""The base of every document: a frozen, versioned pydantic model that a file holds as it is."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """A frozen value inside a document. Unknown keys are refused; field docstrings are the schema's text."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, ser_json_inf_nan="constants", arbitrary_types_allowed=False
    )
