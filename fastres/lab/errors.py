"""The typed errors of the lab. A caller that catches LabError has caught every mistake in the input, and no bug."""

from __future__ import annotations


class LabError(Exception):
    """Something given to the lab cannot be used; the message is one line and names what was got and what was wanted."""


class MissingExtra(LabError, ImportError):
    """An optional dependency is not installed; the message holds the pip command that installs it."""


class CheckpointError(LabError, ValueError):
    """A weights file is missing, corrupt, or holds something other than the tensors that were wanted."""


class OutputError(LabError, OSError):
    """A result cannot be written where it was asked for."""


class DeviceError(LabError, ValueError):
    """The device asked for does not exist on this machine."""


class AccuracyError(LabError, RuntimeError):
    """Training ended below the accuracy it was asked to reach."""


class RefereeError(LabError, RuntimeError):
    """The referee found answers that are wrong; what was measured has been written all the same."""


class RecipeError(LabError, ValueError):
    """A recipe's name or one of its values cannot be used."""


class DataError(LabError, ValueError):
    """A data set is unknown, missing, incomplete or corrupt; the message says what belongs where."""


class RunError(LabError, ValueError):
    """A training run cannot begin or go on as asked."""


class DivergedError(LabError, RuntimeError):
    """The training loss is no longer a number."""
