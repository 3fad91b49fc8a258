"""Comparison of a classifier's predictions, on the rows that rounding cannot decide."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .floor import ULPS
from .runs import Function, devices_of, evaluate, private
from .verdict import MAX_RATIO


@dataclass(frozen=True)
class Agreement:
    """Counts of predictions: of ``rows``, ``decided`` have a top-two margin above ``margin``; ``agreed`` of them agree.

    ``agreed_anyway`` counts agreements among the undecided rest. Truthy if every decided row agrees.
    """

    rows: int
    decided: int
    agreed: int
    agreed_anyway: int
    margin: float

    def __bool__(self) -> bool:
        return self.agreed == self.decided

    def __str__(self) -> str:
        undecided = self.rows - self.decided
        return (
            f"{self.agreed} of {self.decided} predictions agree where the top-two margin exceeds {self.margin:.2g}"
            f" ({undecided} of {self.rows} rows are closer than that; {self.agreed_anyway} of them agree)"
        )


def compare_predictions(
    reference: Function, candidate: Function, inputs: Tensor, *, batch_size: int = 256, margin: float | None = None
) -> Agreement:
    """Compare the argmax of ``candidate`` with that of ``reference`` in float64, on the rows that are decided.

    A row is decided if the margin between the reference's two largest logits exceeds the difference two sound
    implementations can have: twice (one logit up, the other down) the largest error that :func:`fastres.verify` accepts
    in a logit, 4x eager's largest error over all rows plus 4 ulp of the largest logit.

    Args:
        reference: a module (run as a float64 copy in eval mode, and in the candidate's dtype as eager) or a function.
        candidate: the module or function to judge; called as it is, without gradients.
        inputs: [N, ...], split into batches of ``batch_size``; both models take one tensor and return logits
            [N, classes].
        margin: use this margin instead of the measured one.

    Raises:
        TypeError, ValueError: inputs is not a tensor of at least one row; logits are not [N, at least 2 classes].

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(4, 3)
        >>> agreement = compare_predictions(net, net, torch.randn(8, 4))
        >>> bool(agreement), agreement.rows
        (True, 8)
    """
    if not isinstance(inputs, Tensor):
        raise TypeError(f"inputs: got {type(inputs).__name__}, expected a tensor")
    if not inputs.ndim or not len(inputs):
        raise ValueError(f"inputs: got shape {list(inputs.shape)}, expected at least one row")
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}, expected at least 1")
    models = [m for m in (reference, candidate) if isinstance(m, nn.Module)]
    exact, eager, ours = [], [], []
    with torch.random.fork_rng(devices_of(inputs, *models)), torch.no_grad():
        theirs = private("reference", reference).eval() if isinstance(reference, nn.Module) else reference
        double = private("reference", theirs).double() if isinstance(theirs, nn.Module) else theirs
        dtype: torch.dtype | None = None
        for batch in inputs.split(batch_size):
            y = candidate(batch)
            if not isinstance(y, Tensor) or y.ndim != 2 or len(y) != len(batch) or y.shape[1] < 2:
                got = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
                raise ValueError(f"candidate: returned {got}, expected logits [{len(batch)}, at least 2 classes]")
            ours.append(y.detach())
            if dtype is None:
                dtype = y.dtype
                theirs = theirs.to(dtype) if isinstance(theirs, nn.Module) else theirs
            eager.append(_logits(theirs, batch, dtype))
            exact.append(_logits(double, batch, torch.float64))
    logits, candidates = torch.cat(exact), torch.cat(ours)  # [N, classes]
    if logits.shape != candidates.shape:
        raise ValueError(f"candidate: returned {list(candidates.shape)}, the reference {list(logits.shape)}")
    if margin is None:
        error = float((torch.cat(eager).double() - logits).abs().amax())
        ulp = torch.finfo(candidates.dtype).eps * float(logits.abs().amax())
        margin = 2 * (MAX_RATIO * error + ULPS * ulp)
    top = logits.topk(2, dim=1)  # [N, 2]
    decided = top.values[:, 0] - top.values[:, 1] > margin  # [N]
    same = top.indices[:, 0] == candidates.argmax(1)  # [N]
    both, neither = int((decided & same).sum()), int((~decided & same).sum())
    return Agreement(len(logits), int(decided.sum()), both, neither, margin)


def _logits(function: Function, batch: Tensor, dtype: torch.dtype) -> Tensor:
    run = evaluate(function, batch, wanted=None, seed=0, cast=dtype)
    return next(iter(run.outputs.values()))
