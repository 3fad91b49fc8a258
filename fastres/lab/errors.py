"""The typed errors of the lab. A caller that catches LabError has caught every mistake in the input, and no bug."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Sequence
from typing import Any

from fastres._log import first_line as first_line


class LabError(Exception):
    """An input that the lab cannot use; the message is one line that says what it got and what it expected."""


class MissingExtra(LabError, ImportError):
    """An optional dependency is not installed; the message holds the pip command that installs it."""


class CheckpointError(LabError, ValueError):
    """A weights file is missing, corrupt, or holds something other than the tensors that were expected."""


class OutputError(LabError, OSError):
    """A result cannot be written where it was asked for."""


class DeviceError(LabError, ValueError):
    """The device asked for does not exist on this machine."""


class AccuracyError(LabError, RuntimeError):
    """Training ended below the accuracy it was asked to reach."""


class RefereeError(LabError, RuntimeError):
    """The referee found wrong answers; the measurements have been written all the same."""


class RecipeError(LabError, ValueError):
    """A recipe's name or one of its values cannot be used."""


class DataError(LabError, ValueError):
    """A data set is unknown, missing, incomplete or corrupt; the message says what belongs where."""


class RunError(LabError, ValueError):
    """A training run cannot start or resume as asked."""


class DivergedError(LabError, RuntimeError):
    """The training loss is no longer a number."""


def did_you_mean(name: str, names: Sequence[str]) -> str:
    """A question that names the nearest of `names`, to end a message about an unknown one; empty if none is near."""
    near = difflib.get_close_matches(name, names, 3)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def require(module: str, what: str, extra: str) -> Any:
    """Import an optional module; MissingExtra says that `what` needs it and how to install it."""
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
        package = {"sklearn": "scikit-learn", "PIL": "Pillow"}.get(root := module.partition(".")[0], root)
        raise MissingExtra(f'{what} needs {package} ({first_line(error)}): pip install "fastres[{extra}]"') from error
