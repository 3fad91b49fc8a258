"""freeze's verdict: the referee's, on a calibrated copy where the network never saw data."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastres._copies import deep_copy
from fastres.graph.export import WRITES_TO_INPUT, sharing_copy
from fastres.inference.checks import copies
from fastres.inference.compare import close
from fastres.inference.frozen import FrozenModel
from fastres.inference.report import FreezeReport
from fastres.verify import Verification, calibrate, uncalibrated, verify
from fastres.verify.runs import call, map_tensors, named_tensors


def judge(source: nn.Module, frozen: FrozenModel, inputs: Any, report: FreezeReport) -> Verification | None:
    """The referee's verdict; a network that never saw data is judged on a calibrated copy, frozen the same way."""
    layers = uncalibrated(source)
    if layers:
        calibrated = sharing_copy(source)
        try:
            calibrate(calibrated, inputs)
        except Exception as error:
            report.notes.append(f"{len(layers)} BN have initial statistics and could not be calibrated: {error}")
        else:
            report.notes.append(f"{len(layers)} BN have initial statistics; verified on a copy with the example's")
            source, frozen = calibrated, frozen.like(calibrated)
    judged: nn.Module = source
    candidate: Any = frozen
    dtype = None
    if report.capture == "modules":  # either may write to its input; buffers written to have the same names in both
        judged, candidate = _OnCopies(_OnCopies(source)), _OnCopies(frozen)
    else:  # neither keeps state, so the frozen one need not be copied, nor the source's parameters: a network is large
        candidate, dtype = frozen.__call__, frozen.dtype
        judged = _OnCopies(source) if WRITES_TO_INPUT in report.notes else source
        if not any(p.dtype is torch.float64 for p in source.parameters()):  # its float64 copy is one that is written to
            judged = _Sharing(judged)
    try:
        return verify(judged, candidate, inputs, backward=False, training=False, calibrate_bn=False, dtype=dtype)
    except RuntimeError as error:
        if "the reference in float64 raised" not in str(error):
            raise
        report.notes.append(f"not verified, the model does not run in float64: {str(error).splitlines()[0]}")
    except ValueError as error:
        if "output holds no tensor" not in str(error):
            raise
        report.notes.append("not verified, its output holds no tensor")
        return None
    _beside_eager(judged, frozen, inputs, report)
    return None


def _beside_eager(source: nn.Module, frozen: FrozenModel, inputs: Any, report: FreezeReport) -> None:
    """Compare the answers with eager's, where there is no float64 to compare with, for the report.

    Raises:
        RuntimeError: they are others.
    """
    with torch.no_grad():
        want, got = (named_tensors(call(m, copies(inputs)), "output") for m in (source, frozen))
    worst = 0.0
    for name, w in want.items():
        g = got[name].to(w.dtype) if name in got else None
        if g is None or g.shape != w.shape or not close(g, w):
            raise RuntimeError(f"freeze: {name} of the frozen {report.model} is not the source's")
        if w.is_floating_point() and w.numel():
            worst = max(worst, float((g - w).abs().max() / w.abs().max().clamp_min(torch.finfo(w.dtype).tiny)))
    report.notes.append(f"its answers are eager's to {worst:.1e} of the largest")


class _Sharing(nn.Module):
    """A network whose copies read its parameters' memory; one that is cast has its own."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Sharing:
        own = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in self.module.parameters()}
        return _Sharing(deep_copy(self.module, memo | own)).train(self.training)


class _OnCopies(nn.Module):
    """A network that writes to its input, on copies of it. Two of them name buffers as one of a fallback's does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.fallback = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = map_tensors((args, kwargs), lambda _, t: t.clone(), "")
        return self.fallback(*args, **kwargs)
