"""`Run`: what a training run measured of its plan, beside what was predicted."""

from __future__ import annotations

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from galvatron_jax.spec.document import Document
from galvatron_jax.spec.plan import Prediction


class Run(Document):
    """One run of one plan on one machine; the plan, the profile and the model lie beside it."""

    version: int = 1
    """Version of this format."""
    model: str
    """Name of the model, for people."""
    model_fingerprint: str
    device: str
    """Device kind as JAX names it."""
    num_devices: PositiveInt
    global_batch: PositiveInt
    """Examples of one step."""
    step_s: PositiveFloat
    """Median seconds of a step."""
    step_spread_s: NonNegativeFloat
    """Interquartile range of the steps' seconds."""
    steps: PositiveInt
    """Steps timed; the first, which compiles, is not among them."""
    prediction: Prediction | None = None
    """What the cost model expected; None for a plan that was not priced."""
    peak_memory_bytes: int | None = None
    """Largest that a device of this process reports; None where devices do not say (CPUs)."""
    date: str
    """When the run ended, as ISO 8601."""
    software: dict[str, str] = Field(default_factory=dict)
    """Versions of jax, jaxlib, galvatron_jax and Python."""
