"""Errors a user can meet. Each says what failed, with which values, and the way out."""

from __future__ import annotations


class GalvatronError(ValueError):
    """Base of every error that galvatron_jax raises at a user."""


class DocumentError(GalvatronError):
    """A document or configuration is wrong; the message lists every fault with its path."""


class InputError(GalvatronError):
    """An argument, batch, model or device set does not fit what was asked of it."""


class TraceError(GalvatronError):
    """The model could not be traced or cut into layers."""


class InfeasibleError(GalvatronError):
    """No plan fits the memory budget; the message names the nearest one and what would fit."""


class PlanMismatchError(GalvatronError):
    """A plan was made for another model, batch or set of devices; the message says what differs."""


class DeadlockError(GalvatronError):
    """A compiled step would wait for ever."""
