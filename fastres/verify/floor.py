"""The error floor of a tensor: how far the exact result moves when the data move by 4 ulp.

A result is as good as exact if it is the exact result for data that differ by rounding. So the floor is measured: the
float64 reference runs twice more, with floating inputs, parameters and buffers multiplied by ``1 + 4 eps * U(-1, 1)``;
the differences from the unperturbed run give the floor's RMS and maximum. To first order

    floor_i = 4 eps * sqrt(sum_j (df_i / dx_j * x_j)^2 / 3)

that is, the sizes of the formula's terms, added as independent roundings add up. It holds for one operator and for a
whole network, forward and backward, and costs two float64 runs (one for a forward alone). Whatever is summed into
statistics and parameter gradients (BN, sums, means, biases) is also moved by ``4 eps |x|`` in one direction, so that
the floor of such a sum is 4 ulp of the sum of absolute values, no matter what cancels in it. 4 ulp of the result itself
are always allowed, and tensors of few elements get a floor wider by ``1 + 3 / sqrt(samples)``, because two samples of
one number say little.

A ReLU whose input is within rounding of 0 may pass its gradient or not: both are right, and a whole gradient apart. If
there are at most three such gates, each is switched by itself in one more run, and a result is judged against whichever
setting of them it took; the perturbed runs hold every gate as the reference has it. If there are more, as in half
precision, they are part of the floor: one of the two perturbed runs opens the nearest gates of every ReLU, and the
other closes them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ULPS = 4.0
FEW = 3
WIDTH = 2.0  # of the band around 0 in which gates count, in units of the perturbation
_NEAREST = 4

_aten = torch.ops.aten
_RELUS = (_aten.relu.default, _aten.relu_.default)
_CLAMPS = (_aten.clamp_min.default, _aten.clamp_min_.default)

# Operators that sum their n-th argument over all but a few elements, and the position of their training flag.
_SUMS = {
    f"{namespace}::{name}": n
    for namespace, names, n in (
        ("aten", "sum sum.dim_IntList mean mean.dim var.correction var_mean.correction convolution_backward", 0),
        ("aten", "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit.no_stats cudnn_batch_norm", 0),
        ("aten", "_batch_norm_with_update native_batch_norm_backward batch_norm_backward", 0),
        ("aten", "cudnn_batch_norm_backward", 1),
        ("fastres", "bn_act bn_act_backward", 0),
    )
    for name in names.split()
}
_EVAL_MODE = {"aten::native_batch_norm": 5, "aten::cudnn_batch_norm": 5, "fastres::bn_act": 6}  # nothing is summed then

Index = tuple[Tensor, ...]


class Gate(NamedTuple):
    """One element of one ReLU call whose input is within rounding of 0."""

    call: int
    where: Index


class Relus(TorchDispatchMode):
    """Intercepts every ReLU, ours included, and may change its result; moves what is summed by ``shift * |x|``.

    Autograd takes a ReLU's mask from its result, so a tiny positive number there opens a gate and a 0 closes it.
    """

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shift = shift
        self.calls = -1

    def result(self, z: Tensor, y: Tensor) -> None:
        """Hook for subclasses: gets a copy of each ReLU's input ``z``, and its result ``y``, which it may change."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.shift:
            args = self._shifted(func.name(), args)
        statistics: list[Tensor] = []
        if func in _RELUS or (func in _CLAMPS and args[1] == 0):
            z = args[0].clone()
            y = func(*args, **kwargs)
        elif func is torch.ops.fastres.add_relu.default:
            z = args[0] + args[1]
            y = z.relu()
        elif func is torch.ops.fastres.bn_act.default and args[8] == "relu":
            z, *statistics = func(*args[:8], "none", *args[9:], **kwargs)
            y = z.relu()
        else:
            return func(*args, **kwargs)
        self.calls += 1
        if z.numel():
            self.result(z, y)
        return (y, *statistics) if statistics else y

    def _shifted(self, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        n = _SUMS.get(name)
        if n is None or (name in _EVAL_MODE and not args[_EVAL_MODE[name]]) or not args[n].is_floating_point():
            return args
        return (*args[:n], args[n] + self.shift * args[n].abs(), *args[n + 1 :])


class FindGates(Relus):
    """Finds the gates within ``width`` of 0, relative to the RMS of the ReLU's input; changes nothing.

    ``found`` holds the nearest four of each call, ``count`` their number, ``masks`` every gate of every call.
    """

    def __init__(self, width: float, shift: float = 0.0) -> None:
        super().__init__(shift)
        self.width = width
        self.count = 0
        self.found: list[Gate] = []
        self.masks: dict[int, Tensor] = {}

    def result(self, z: Tensor, y: Tensor) -> None:
        where, _ = self.near(z)
        self.found += [Gate(self.calls, tuple(i[n : n + 1] for i in where)) for n in range(len(where[0]))]
        self.masks[self.calls] = y > 0

    def near(self, z: Tensor) -> tuple[Index, Tensor]:
        """The indices of this call's nearest gates, and their distances."""
        size = z.abs().flatten()
        size = torch.where(size == 0, torch.inf, size)  # an exact 0 is a value, not a rounding error
        width = self.width * float(z.square().mean().sqrt()) * (self.calls + 1) ** 0.5  # errors grow with depth
        self.count += int((size < width).sum())
        near, index = size.topk(min(_NEAREST, size.numel()), largest=False)
        return torch.unravel_index(index[near < width], z.shape), near[near < width]


class NearestGates(FindGates):
    """Opens or closes all the gates that FindGates would find."""

    def __init__(self, width: float, opens: bool, shift: float) -> None:
        super().__init__(width, shift)
        self.opens = opens

    def result(self, z: Tensor, y: Tensor) -> None:
        where, size = self.near(z)
        y[where] = size if self.opens else torch.zeros_like(size)


class HoldGates(Relus):
    """Holds every gate as it was found, and flips ``switched``."""

    def __init__(self, found: FindGates, switched: Gate | None = None, shift: float = 0.0) -> None:
        super().__init__(shift)
        self.masks = dict(found.masks)
        if switched is not None:
            mask = self.masks[switched.call].clone()
            mask[switched.where] = ~mask[switched.where]
            self.masks[switched.call] = mask

    def result(self, z: Tensor, y: Tensor) -> None:
        y.copy_(torch.where(self.masks[self.calls], z.clamp_min(torch.finfo(z.dtype).tiny), 0))


def settings(exact: Tensor, switched: list[Tensor]) -> list[Tensor]:
    """The exact result under every setting of the gates; ``switched`` has one gate each flipped."""
    results = [exact]
    for one in switched:
        results += [result + (one - exact) for result in results]
    return results


def floors(exact: Tensor, perturbed: list[Tensor], eps: float, ulps: float) -> tuple[float, float]:
    """(RMS, maximum) of the floor of one tensor. ``exact`` and ``perturbed`` are float64 and of one shape."""
    if not exact.numel() or not ulps:
        return 0.0, 0.0
    own = exact.abs() * (ulps * eps)
    rms, worst = float(own.square().mean().sqrt()), float(own.amax())
    if perturbed:
        moved = torch.stack([(p - exact).abs() for p in perturbed])
        widen = 1 + 3 / moved.numel() ** 0.5
        rms = max(rms, float(moved.square().mean().sqrt()) * widen)
        worst = max(worst, float(moved.amax()) * widen)
    return rms, worst
