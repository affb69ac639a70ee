"""What goes wrong, named so that a caller can catch it and a person can act on it."""

from __future__ import annotations


class GalvatronError(ValueError):
    """Base of every error that a user can cause and a user can mend."""


class CaptureError(GalvatronError):
    """The model cannot be captured; the message names the line of the model's code."""


class ShapeError(GalvatronError):
    """A batch, a world size or a degree that does not divide."""


class NotationError(GalvatronError):
    """A plan written in the compact text notation does not parse."""


class PlanError(GalvatronError):
    """A plan is malformed, or belongs to another model or world size."""


class ProfileError(GalvatronError):
    """A cluster profile is malformed or lacks a measurement that is needed."""


class InfeasibleError(GalvatronError):
    """No plan fits the memory limit; the message says the smallest limit that one would fit."""


class CheckpointError(GalvatronError):
    """A checkpoint cannot be written, or is damaged, incomplete, or another model's."""


class UnsupportedError(GalvatronError):
    """The request is legal, but this version does not execute it yet."""


class PeerError(RuntimeError):
    """Another rank failed; the message repeats that rank's error."""


class NonFiniteLossError(ArithmeticError):
    """The loss is infinite or not a number; parameters and optimizer state are untouched."""
