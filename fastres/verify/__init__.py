"""The fp64 referee: judges a candidate against eager PyTorch, tensor by tensor, forward and backward.

A tensor (output, gradient or running statistic) passes if, with e(.) the error against the reference in float64,

    RMS  e(candidate) <= 2 * RMS  e(eager) + RMS  floor
    max |e(candidate)| <= 4 * max |e(eager)| + max floor

``referee.py`` plans the runs (``verify``), ``runs.py`` executes them, ``floor.py`` measures the floor, ``verdict.py``
compares and reports, ``calibrate.py`` gives randomly initialized networks usable BN statistics.
"""

from .calibrate import calibrate, uncalibrated
from .predictions import Agreement, compare_predictions
from .referee import verify
from .verdict import Row, Verification

__all__ = ["Agreement", "Row", "Verification", "calibrate", "compare_predictions", "uncalibrated", "verify"]
