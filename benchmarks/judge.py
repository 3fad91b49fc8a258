"""The correctness verdict printed with every time: fastres.verify's, against eager PyTorch.

A peer passes when its error against float64 is at most twice eager's in RMS and four times eager's at the maximum, per
output, gradient and running statistic, above the floor of fastres.verify.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

import fastres
from fastres.verify import Row
from measure import Verdict

Function = Callable[..., Any]


def judge_call(
    reference: Function, candidate: Function, inputs: Any, *, backward: bool, training: bool | None = None
) -> Verdict:
    """Run a module or an operator on the inputs, forward and, on request, backward, and judge its worst tensor.

    `training` puts two modules into training or eval mode; it is None for functions.
    """
    found = fastres.verify(reference, candidate, inputs, training=training, backward=backward)
    worst = found.worst
    message = "" if found.passed or worst is None else f"{worst.name}: {_reason(worst)}"
    return Verdict(found.passed, found.error_ratio, message)


def _reason(row: Row) -> str:
    return f"{row.message}, ratio {row.ratio:.3g}, at most 2"


class _Same(nn.Module):
    """Returns one output under several names, so that a single run of the reference serves every peer."""

    def __init__(self, function: Function, names: Sequence[str]) -> None:
        super().__init__()
        self.function, self.names = function, tuple(names)

    def forward(self, *inputs: Tensor) -> dict[str, Tensor]:
        return dict.fromkeys(self.names, self.function(*inputs))


def judge_outputs(reference: Function, inputs: tuple[Tensor, ...], outputs: Mapping[str, Tensor]) -> dict[str, Verdict]:
    """Judge what several peers have returned for the same inputs; verdicts by name.

    Args:
        reference: the network in eval mode, in float32 or finer; or a function of the inputs.
        inputs: what all the peers were given, in the working dtype. The first decides that dtype.
        outputs: one tensor of each peer, in the working dtype.
    """
    if not outputs:
        return {}
    found = fastres.verify(
        _Same(reference, list(outputs)),
        lambda *_: dict(outputs),
        inputs,
        backward=False,
        training=False,
        dtype=inputs[0].dtype,
        calibrate_bn=False,
    )
    return {
        row.name.removeprefix("output."): Verdict(row.passed, row.ratio, "" if row.passed else _reason(row))
        for row in found.rows
    }
