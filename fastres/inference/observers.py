"""Observers: the range of numbers that 8 bits stand for, from a histogram of what a tensor held on calibration images.

    minmax       the least and the largest
    percentile   all but 1 in 10,000 of the numbers; those beyond saturate
    mse          the range with the least mean square error, of the whole one shrunk by up to 99 %

Ranges hold 0, which padding and ReLU need exactly: without negative numbers the zero point is 0.

Source: Krishnamoorthi 2018, section 3 (minmax); Choukroun et al. 2019 (mse).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastres.graph.recipe import Range

OBSERVERS = ("minmax", "percentile", "mse")
BINS = 2048
_CUT = 1e-4  # the share of numbers that "percentile" leaves out
_LEAST = 1e-30  # a tensor without a larger number is 0


def find_range(histogram: Tensor, low: float, high: float, observer: str) -> Range:
    """The scale and zero point of a tensor.

    Args:
        histogram: [BINS], the counts of equal parts of low..high.
        low, high: the least and the largest number.
        observer: one of OBSERVERS.
    """
    if observer == "percentile":
        low, high = _percentile(histogram, low, high)
    elif observer == "mse":
        low, high = _least_error(histogram, low, high)
    return to_range(low, high)


def to_range(low: float, high: float) -> Range:
    """The range whose ends these numbers are, 0 within."""
    low, high = min(low, 0.0), max(high, 0.0)
    if high - low < _LEAST:
        return Range(1.0, 0)
    scale = (high - low) / 255
    return Range(scale, min(255, round(-low / scale)))


def _centers(histogram: Tensor, low: float, high: float) -> Tensor:
    width = (high - low) / len(histogram)
    return low + width * (torch.arange(len(histogram), dtype=torch.float64) + 0.5)  # [BINS]


def _percentile(histogram: Tensor, low: float, high: float) -> tuple[float, float]:
    share = histogram.double().cumsum(0) / histogram.sum().clamp_min(1)  # [BINS]
    width = (high - low) / len(histogram)
    first = int((share > _CUT).double().argmax()) if low < 0 else 0
    last = int((share >= 1 - _CUT).double().argmax())
    return low + width * first, low + width * (last + 1)


def _least_error(histogram: Tensor, low: float, high: float) -> tuple[float, float]:
    if not high > low or not math.isfinite(high - low):
        return low, high
    counts, centers = histogram.double(), _centers(histogram, low, high)
    best, found = math.inf, (low, high)
    for share in range(100, 0, -1):
        ends = low * share / 100, high * share / 100
        scale, zero_point = to_range(*ends)
        q = (torch.round(centers / scale) + zero_point).clamp_(0, 255)
        error = float((counts * ((q - zero_point) * scale - centers).square()).sum())
        if error < best:
            best, found = error, ends
    return found
