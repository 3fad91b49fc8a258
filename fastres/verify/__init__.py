"""The fp64 referee: is a candidate as accurate as eager PyTorch, tensor by tensor, forward and backward?

For every output, gradient and running statistic, with e(.) the error against the reference evaluated in float64:

    RMS  e(candidate) <= 2 * RMS  e(eager) + RMS  floor
    max |e(candidate)| <= 4 * max |e(eager)| + max floor

``referee.py`` decides what is run (``verify``), ``runs.py`` runs it, ``floor.py`` finds the floor, ``calibrate.py``
gives randomly initialised networks statistics they can be judged with, ``verdict.py`` compares and reports.
"""

from .calibrate import calibrate, uncalibrated
from .predictions import Agreement, compare_predictions
from .referee import verify
from .verdict import Row, Verification

__all__ = ["Agreement", "Row", "Verification", "calibrate", "compare_predictions", "uncalibrated", "verify"]
