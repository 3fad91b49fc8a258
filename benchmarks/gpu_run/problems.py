"""The problems to tune on: launches of the Triton kernels at ResNet-50's shapes, and the configurations to try.

A problem is a call of one launch function. The table entries that it uses are found by recording its lookups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from fastres.kernels import add_relu, bn_act, configs, conv_act

from peers import DTYPES, LAYOUTS
from shapes import CONVS, Conv

Entry = tuple[str, int, str]  # kernel, architecture, shape class
Outputs = tuple[torch.Tensor, ...]
Made = tuple[Callable[[], object], Outputs]  # a launch, and what it writes
EPS = 1e-5


@dataclass(frozen=True)
class Problem:
    what: str  # a key of MAKERS
    shape: tuple[int, ...]  # of x
    layout: str
    dtype: str
    conv: Conv | None = None

    def make(self, device: torch.device) -> Callable[[], Outputs]:
        """A call that launches into outputs allocated once, and returns them."""
        torch.manual_seed(0)
        launch, outputs = MAKERS[self.what](self, device)

        def call() -> Outputs:
            launch()
            return outputs

        return call

    def tensor(self, device: torch.device, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        x = torch.randn(shape or self.shape, device=device).to(DTYPES[self.dtype])
        return x.contiguous(memory_format=LAYOUTS[self.layout])

    def to_dict(self) -> dict[str, Any]:
        conv = {} if self.conv is None else {"conv": self.conv.id}
        return {"what": self.what, "shape": list(self.shape), "layout": self.layout, "dtype": self.dtype} | conv


def _add_relu_forward(problem: Problem, device: torch.device) -> Made:
    x, residual = (problem.tensor(device) for _ in range(2))
    y = torch.empty_like(x)
    return partial(add_relu.add_relu_forward, x, residual, y), (y,)


def _add_relu_backward(problem: Problem, device: torch.device) -> Made:
    dy, y = problem.tensor(device), problem.tensor(device).relu_()
    dx = torch.empty_like(dy)
    return partial(add_relu.add_relu_backward, dy, y, dx), (dx,)


def _bn_forward(problem: Problem, device: torch.device, training: bool) -> Made:
    x, residual = problem.tensor(device), problem.tensor(device)
    weight, bias, mean = (torch.randn(x.shape[1], device=device) for _ in range(3))
    y, var = torch.empty_like(x), torch.rand(x.shape[1], device=device) + 0.5
    how = {"channels_last": problem.layout == "channels_last", "training": training, "eps": EPS, "act": "relu"}
    return partial(bn_act.bn_act_forward, x, weight, bias, residual, y, mean, var, **how), (y, mean, var)


def _bn_backward(problem: Problem, device: torch.device) -> Made:
    dy, x, y = problem.tensor(device), problem.tensor(device), problem.tensor(device).relu_()
    weight = torch.randn(x.shape[1], device=device)
    var, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)
    dx, dresidual, dweight, dbias = torch.empty_like(x), torch.empty_like(x), mean.clone(), mean.clone()
    how = {"channels_last": problem.layout == "channels_last", "training": True, "eps": EPS, "act": "relu"}
    launch = partial(bn_act.bn_act_backward, dy, x, y, weight, mean, var, dx, dweight, dbias, dresidual, **how)
    return launch, (dx, dweight, dbias, dresidual)


def _conv(problem: Problem, device: torch.device) -> Made:
    c = problem.conv
    assert c is not None
    x = problem.tensor(device)
    weight = problem.tensor(device, (c.outputs, c.inputs, c.kernel, c.kernel)).mul_((c.inputs * c.kernel**2) ** -0.5)
    y = problem.tensor(device, (problem.shape[0], c.outputs, c.out, c.out))
    bias, residual = torch.randn(c.outputs, device=device), y.clone() if c.residual else None
    how = {"stride": (c.stride,) * 2, "padding": (c.padding,) * 2, "dilation": (1, 1), "groups": 1}
    return partial(conv_act.conv_act_forward, x, weight, bias, residual, y, **how, act=c.act, tf32=True), (y,)


MAKERS: dict[str, Callable[[Problem, torch.device], Made]] = {
    "add_relu forward": _add_relu_forward,
    "add_relu backward": _add_relu_backward,
    "bn_act training forward": partial(_bn_forward, training=True),
    "bn_act eval forward": partial(_bn_forward, training=False),
    "bn_act training backward": _bn_backward,
    "conv_act": _conv,
}
_BN = ("bn_act training forward", "bn_act training backward", "bn_act eval forward")
_FLAT = ("add_relu forward", "add_relu backward")


def problems(batch: int) -> list[Problem]:
    """All problems, the most important first; an entry is tuned on the first few that use it."""
    last, first = "channels_last", "nchw"
    found = []
    for shape, layout, dtype in (
        ((batch, 256, 56, 56), last, "fp16"),
        ((batch, 1024, 14, 14), last, "fp16"),
        ((batch, 256, 56, 56), last, "fp32"),
        ((batch, 256, 56, 56), first, "fp16"),
        ((batch, 512, 28, 28), first, "fp32"),
        ((batch, 2048, 7, 7), first, "fp16"),  # lines of 49: "odd"
        ((2, 256, 28, 28), last, "fp16"),
        ((2, 256, 28, 28), first, "fp16"),
        ((batch, 18, 56, 56), last, "fp16"),
    ):
        found += [Problem(what, shape, layout, dtype) for what in _BN]
        if layout == last:
            found += [Problem(what, shape, layout, dtype) for what in _FLAT]
    convs = [c for c in CONVS if c.resnet50]
    for dtype, n in (("fp16", batch), ("fp32", batch), ("fp16", 1), ("fp32", 1)):
        found += [Problem("conv_act", (n, c.inputs, c.size, c.size), last, dtype, c) for c in convs]
    return found


def tiny_problems() -> list[Problem]:
    """One problem of each kind, for Triton's interpreter."""
    found = [Problem(what, (2, 16, 3, 3), "channels_last", "fp32") for what in (*_FLAT, *_BN)]
    return [*found, Problem("conv_act", (1, 16, 4, 4), "channels_last", "fp32", Conv(16, 16, 1, 1, 4, "inner", 0, 1))]


# ---- entries ---------------------------------------------------------------------------------------------------------


def known_architecture(device: torch.device) -> int:
    """The device's architecture; in the interpreter the oldest one of the table."""
    if device.type != "cuda":
        return configs.ARCHITECTURES[0]
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def entries_of(problem: Problem, arch: int) -> list[tuple[str, str]]:
    """The (kernel, shape class) of every entry that a problem uses, found on meta tensors without a launch."""
    with nothing_launched(arch), looked_up() as found:
        problem.make(torch.device("meta"))()
    return found


def rank(kernel: str, shape_class: str) -> int:
    """The priority of an entry: large channels_last tensors and 16-bit products first, merges of partial sums last."""
    if "merge" in kernel:
        return 3
    return 0 if shape_class in ("rows", "large", "deep", "wide", "narrow") else 1 if "_" not in shape_class else 2


@contextmanager
def nothing_launched(arch: int) -> Iterator[None]:
    """Make launch functions do everything but launch, as on that architecture."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(type(add_relu.add_relu_forward_kernel), "run", lambda *_, **__: None))
        for module in (add_relu, bn_act, conv_act):
            stack.enter_context(patch.object(module, "architecture", lambda x: arch))
        yield


@contextmanager
def looked_up() -> Iterator[list[tuple[str, str]]]:
    """Collect the (kernel, shape class) of every entry that launches in the block look up."""
    with patch.object(configs, "config", wraps=configs.config) as config:
        found: list[tuple[str, str]] = []
        yield found
    found += [(kernel, shape_class) for kernel, _, shape_class in (call.args for call in config.call_args_list)]


def configured(entry: Entry, config: Any) -> Any:
    """Give the entry this configuration in a block."""
    kernel, arch, shape_class = entry
    return patch.dict(configs.TABLE[kernel, arch], {shape_class: config})


def candidates(shipped: Any) -> list[Any]:
    """Configurations to try: the shipped one with one or two sizes halved or doubled."""
    found = _gemm_neighbors(shipped) if isinstance(shipped, configs.GemmConfig) else _neighbors(shipped)
    return [c for c in dict.fromkeys(found) if c != shipped]


def _scaled(shipped: Any, **factors: float) -> Any:
    return replace(shipped, **{name: int(getattr(shipped, name) * factor) for name, factor in factors.items()})


def _neighbors(shipped: Any) -> Iterator[Any]:
    """Neighbors with 2 to 32 elements per thread."""
    for tile, warps in ((2, 2), (1, 2), (0.5, 1), (2, 1), (1, 0.5), (0.5, 0.5)):
        entry = _scaled(shipped, tile=tile, num_warps=warps)
        if entry.num_warps >= 1 and 2 <= entry.tile / (32 * entry.num_warps) <= 32:
            yield entry
    for name in ("line", "programs"):
        if getattr(shipped, name):
            yield from (_scaled(shipped, **{name: factor}) for factor in (2, 0.5))


def _gemm_neighbors(shipped: Any) -> Iterator[Any]:
    """Neighbors with at most 128 sums per thread and at least one 16 x 16 product per warp."""
    for m, n, warps in ((1, 2, 2), (2, 1, 2), (1, 0.5, 0.5), (0.5, 1, 0.5), (0.5, 2, 1), (2, 0.5, 1), (1, 1, 2)):
        entry = _scaled(shipped, block_m=m, block_n=n, num_warps=warps)
        sums = entry.block_m * entry.block_n / (32 * max(entry.num_warps, 1))
        if min(entry.block_m, entry.block_n) >= 16 and entry.num_warps in (4, 8) and 4 <= sums <= 128:
            yield entry
    for stages in (shipped.num_stages - 1, shipped.num_stages + 1):
        yield replace(shipped, num_stages=stages)
    yield replace(shipped, block_k=max(shipped.block_k // 2, 16), num_stages=shipped.num_stages + 1)
    yield _scaled(shipped, group_m=2)


def differs(ours: Outputs, theirs: Outputs, most: float | None = None) -> str | None:
    """Describe a difference larger than the order of sums can explain, or than `most` of the largest value."""
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        allowed = most or (1e-4 if b.dtype == torch.float32 else 4 * torch.finfo(b.dtype).eps)
        error = float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30))
        if not error <= allowed or not math.isfinite(error):
            return f"output {i} differs by {error:.1e} of its largest value, {allowed:.1e} allowed"
    return None
