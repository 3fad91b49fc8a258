"""The correctness verdict that stands beside every time: is a peer as accurate as eager PyTorch?

Operators are judged on the timed tensors themselves, against the same formula in float64, tensor by tensor:

    RMS  e(peer) <= 2 * RMS  e(eager) + RMS  floor      floor: 4 ulp of the formula evaluated on absolute values
    max |e(peer)| <= 4 * max |e(eager)| + max floor

A gradient is judged with the mask of the output it came from: where z is within rounding of 0, both masks are right.
Blocks and networks go through fastres.verify, which holds the same tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastres
from measure import Verdict

ULPS, RMS_RATIO, MAX_RATIO = 4, 2.0, 4.0


class BatchNormExact:
    """bn_act in float64, and the sizes of its terms.

    Args:
        x, residual: [N, C, H, W], any floating dtype; residual may be None.
        statistics: running mean and variance, [C]; read in eval mode.
        affine: weight and bias, [C].
    """

    def __init__(
        self,
        x: Tensor,
        residual: Tensor | None,
        statistics: tuple[Tensor, Tensor],
        affine: tuple[Tensor, Tensor],
        training: bool,
        act: str,
        eps: float = 1e-5,
    ) -> None:
        self.act, self.training = act, training
        self.inputs = [t.detach().double().requires_grad_() for t in (x, *affine, residual) if t is not None]
        x, weight, bias = self.inputs[:3]
        if training:
            var, mean = torch.var_mean(x.detach(), (0, 2, 3), correction=0)  # [C]
        else:
            mean, var = (t.double() for t in statistics)
        self.scale = torch.rsqrt(var + eps)[:, None, None]  # [C, 1, 1]
        self.x_hat = (x.detach() - mean[:, None, None]) * self.scale  # [N, C, H, W]
        running_mean, running_var = (None, None) if training else (mean, var)
        self.z = F.batch_norm(x, running_mean, running_var, weight, bias, training, 0.0, eps)
        size = (self.x_hat * weight.detach()[:, None, None]).abs() + bias.detach().abs()[:, None, None]
        if residual is not None:
            self.z = self.z + self.inputs[3]
            size += self.inputs[3].detach().abs()
        z = self.z.detach()
        self.outputs = [(z.relu() if act == "relu" else z, size)]

    def gradients(self, y: Tensor, dy: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(exact, size) of dx, dweight, dbias [, dresidual], with the mask of this y."""
        g = dy.double()
        if self.act == "relu":
            g = g.masked_fill(y <= 0, 0)
        grads = torch.autograd.grad(self.z, self.inputs, g, retain_graph=True)
        dims, n = (0, 2, 3), g.numel() // g.shape[1]
        size = g.abs()
        dbias, x_hat = size.sum(dims), self.x_hat.abs()  # [C]
        dweight = (size * x_hat).sum(dims)  # [C]
        dx = size + (dbias[:, None, None] + x_hat * dweight[:, None, None]) / n if self.training else size
        dx = dx * (self.inputs[1].detach().abs()[:, None, None] * self.scale)
        sizes = [dx, dweight, dbias, size]
        return list(zip(grads, sizes, strict=False))


class ConvActExact:
    """conv_act in float64, and what rounding its terms moves it by.

    A sum of thousands of products cancels: the sum of their absolute values would be a floor that hides any error. The
    size is that of independent roundings of every x, weight, bias and residual instead, as in fastres.verify:
    sqrt((2 * conv(x^2, w^2) + b^2 + r^2) / 3), and at least the result itself.

    Args:
        x: [N, C, H, W], weight: [O, C, K, K], bias: [O], residual: [N, O, P, Q] or None.
    """

    def __init__(
        self, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, stride: int, padding: int, act: str
    ) -> None:
        x, weight, bias = (t.detach().double() for t in (x, weight, bias))
        z = F.conv2d(x, weight, bias, stride, padding)  # [N, O, P, Q]
        size = 2 * F.conv2d(x.square(), weight.square(), None, stride, padding) + bias.square()[:, None, None]
        if residual is not None:
            z += residual.double()
            size += residual.double().square()
        size = torch.maximum((size / 3).sqrt_(), z.abs())
        self.outputs = [(z.relu() if act == "relu" else z, size)]

    def gradients(self, y: Tensor, dy: Tensor) -> list[tuple[Tensor, Tensor]]:
        raise NotImplementedError("conv_act is measured in inference alone")


class AddReluExact:
    """add_relu in float64, and the sizes of its terms."""

    def __init__(self, x: Tensor, residual: Tensor) -> None:
        z = x.detach().double() + residual.detach().double()
        self.outputs = [(z.relu(), x.detach().double().abs() + residual.detach().double().abs())]

    def gradients(self, y: Tensor, dy: Tensor) -> list[tuple[Tensor, Tensor]]:
        g = dy.double().masked_fill(y <= 0, 0)
        return [(g, g.abs()), (g, g.abs())]


def judge_operator(
    exact: BatchNormExact | AddReluExact | ConvActExact,
    results: Mapping[str, Sequence[Tensor]],
    dy: Tensor | None,
    names: Sequence[str],
) -> dict[str, Verdict]:
    """Verdicts of every peer but eager. A result is (y, *gradients); no gradients where dy is None."""
    masks: list[tuple[Tensor, list[tuple[Tensor, Tensor]]]] = []  # a mask, and the exact gradients with it

    def expected(y: Tensor) -> list[tuple[Tensor, Tensor]]:
        if dy is None:
            return exact.outputs
        mask = y <= 0
        known = next((grads for seen, grads in masks if torch.equal(seen, mask)), None)
        if known is None:
            known = exact.gradients(y, dy)
            masks.append((mask, known))
        return exact.outputs + known

    with torch.no_grad():
        eager = results["eager"]
        with torch.enable_grad():
            theirs = expected(eager[0])
        verdicts = {}
        for peer, ours in results.items():
            if peer == "eager":
                continue
            with torch.enable_grad():
                mine = expected(ours[0])
            ratios = [_ratio(*row) for row in zip(ours, eager, mine, theirs, strict=True)]
            worst = max(range(len(ratios)), key=ratios.__getitem__)
            passed = ratios[worst] <= RMS_RATIO
            message = "" if passed else f"{names[worst]}: error ratio {ratios[worst]:.3g}, at most 2"
            verdicts[peer] = Verdict(passed, ratios[worst], message)
    return verdicts


def _ratio(ours: Tensor, eager: Tensor, mine: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> float:
    """Both criteria in one number, at most 2 passes; inf for another shape, another dtype or a value not finite."""
    if ours.shape != eager.shape or ours.dtype != eager.dtype:
        return math.inf
    error, eager_error = (ours.double() - mine[0]).abs(), (eager.double() - theirs[0]).abs()
    if not bool(error.isfinite().all()):
        return math.inf
    floor = ULPS * torch.finfo(ours.dtype).eps * mine[1]
    rms = _over(_rms(error), RMS_RATIO * _rms(eager_error) + _rms(floor))
    worst = _over(float(error.amax()), MAX_RATIO * float(eager_error.amax()) + float(floor.amax()))
    return RMS_RATIO * max(rms, worst)


def _rms(t: Tensor) -> float:
    return float(t.square().mean().sqrt())


def _over(error: float, allowed: float) -> float:
    if error == 0:
        return 0.0
    return error / allowed if allowed else math.inf


def judge_module(reference: nn.Module, candidate: nn.Module, inputs: Any, training: bool, backward: bool) -> Verdict:
    """fastres.verify's verdict on a block or a network."""
    found = fastres.verify(reference, candidate, inputs, training=training, backward=backward)
    worst = found.worst
    message = (
        "" if found.passed or worst is None else f"{worst.name}: {worst.message}, ratio {worst.ratio:.3g}, at most 2"
    )
    return Verdict(found.passed, found.error_ratio, message)


class _Same(nn.Module):
    """The module's output once for each name, so that one reference run serves every peer."""

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.module, self.names = module, tuple(names)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.module(x)
        return {name: y for name in self.names}


def judge_outputs(reference: nn.Module, x: Tensor, outputs: Mapping[str, Tensor]) -> dict[str, Verdict]:
    """fastres.verify's verdicts on what several engines answered to the same images, by name.

    Args:
        reference: the network, in eval mode and in float32 or finer.
        x: the images that all of them saw, in the working dtype. [N, 3, H, W]
        outputs: logits in the working dtype. [N, classes]
    """
    if not outputs:
        return {}
    module = _Same(reference, list(outputs))
    found = fastres.verify(
        module, lambda _: dict(outputs), x, backward=False, training=False, dtype=x.dtype, calibrate_bn=False
    )
    verdicts = {}
    for row in found.rows:
        message = "" if row.passed else f"{row.message}, ratio {row.ratio:.3g}, at most 2"
        verdicts[row.name.removeprefix("output.")] = Verdict(row.passed, row.ratio, message)
    return verdicts
