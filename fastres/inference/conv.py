"""FrozenConv: a convolution of a frozen network, with the bias, residual and activation that follow it in one call.

On a CPU it runs oneDNN's convolution with the whole epilogue inside, on a weight reordered ("packed") for the shape of
the input: a pack made for another batch size can be slower than none. Packs are kept apart from the module's state:
copies, pickles and state_dict do not see them, and a weight that was written to is packed again.

oneDNN's ReLU turns NaN into 0. A frozen network whose input is finite has none to lose; for one that is not,
FrozenModel runs a twin whose convolutions are `exact`: conv_act, which passes NaN as eager does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastres.inference.gate import is_captured_elsewhere
from fastres.nn.steps import fused_conv_act, is_bare
from fastres.ops._autograd import is_plain_eager
from fastres.ops._conv_backends import ACTIVATIONS, Conv, output_size, why_not_onednn
from fastres.ops._tensors import is_channels_last

torch.fx.wrap("fused_conv_act")

_SHAPES = 4  # input shapes that a layer keeps a pack for
_UNARY: dict[str, tuple[str, list[float]]] = {
    "none": ("none", []),
    "relu": ("relu", []),
    "relu6": ("hardtanh", [0.0, 6.0]),
    "hardswish": ("hardswish", []),
    "silu": ("swish", []),
}
_BINARY: dict[str, str | None] = {"none": None, "relu": "relu"}


def is_traced() -> bool:
    """Whether a compiler or an exporter follows: then a frozen network shows it stock operators alone."""
    followed = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
    return followed and not is_captured_elsewhere()


class Packs:
    """Input shape and strides -> the weight to run with. A deep copy or a pickle of it is empty."""

    def __init__(self) -> None:
        self.weight: tuple[int, int] | None = None  # address and version of what was packed
        self.found: dict[Any, Tensor | None] = {}  # None: this input takes conv_act

    def __deepcopy__(self, memo: dict[int, Any]) -> Packs:
        return Packs()

    def __reduce__(self) -> tuple[type[Packs], tuple[()]]:
        return Packs, ()


class FrozenConv(nn.Conv2d):
    """act(conv(x) + bias [+ residual]). Shapes: x [N, C, H, W], residual [N, K, P, Q] -> y [N, K, P, Q].

    Made of an `nn.Conv2d` by `freeze_conv`; parameters and names stay.
    """

    act: str
    exact: bool
    packs: Packs

    @classmethod
    def of(
        cls, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int, act: str
    ) -> Any:
        """The convolution with this weight [K, C / groups, R, S] and bias [K], which become its parameters.

        Args:
            stride, padding, dilation: two numbers each.
            act: what follows: none, relu, relu6, hardswish or silu.
        """
        k, c, *kernel = weight.shape
        with torch.device("meta"):
            conv = cls(c * groups, k, kernel, stride, padding, dilation, groups, bias is not None)  # type: ignore[arg-type]
        conv.weight = nn.Parameter(weight, requires_grad=False)
        conv.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        conv.act, conv.exact, conv.packs = act, False, Packs()
        return conv.eval()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if is_traced():
            y = self._conv_forward(x, self.weight, self.bias)
            return ACTIVATIONS[self.act](y if residual is None else y + residual)
        return self.run(x, residual, self.act)

    def run(self, x: Tensor, residual: Tensor | None, act: str, overwrite: bool = False) -> Tensor:
        """The call with its epilogue; `overwrite`: the residual is nobody else's, and y may take its memory."""
        if not self.exact and is_plain_eager(x, residual):
            weight = self.weight_for(x)
            if weight is not None:
                y = self.onednn(x, weight, residual, act, overwrite)
                if y is not None:
                    return y
        return fused_conv_act(
            x, self.weight, self.bias, residual, self.stride, self.padding, self.dilation, self.groups, act
        )

    def weight_for(self, x: Tensor) -> Tensor | None:
        """The weight that oneDNN runs with on inputs like x; None where conv_act takes the call."""
        packs, weight = self.packs, self.weight
        now = weight.data_ptr(), -1 if weight.is_inference() else weight._version
        if packs.weight != now:
            self.packs = packs = Packs()
            packs.weight = now
        key = x.shape, x.stride()
        try:
            return packs.found[key]
        except KeyError:
            for oldest in list(packs.found)[: 1 - _SHAPES]:  # a list: other threads write to the table
                packs.found.pop(oldest, None)
            found = packs.found[key] = self._pack(x)
            return found

    def _pack(self, x: Tensor) -> Tensor | None:
        """The weight packed for inputs like x; None where oneDNN refuses, or the layout is not its fast one."""
        if x.ndim != 4 or x.dtype != self.weight.dtype or x.shape[1] != self.in_channels or not is_channels_last(x):
            return None
        if self.out_channels == 1 or not x.is_contiguous(memory_format=torch.channels_last):
            return None
        if why_not_onednn(x, self.call()):
            return None
        packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(
            self.weight.detach(), self.padding, self.stride, self.dilation, self.groups, list(x.shape)
        )
        return packed

    def call(self) -> Conv:
        """What conv_act's refusals follow from, for a channels_last input."""
        stride, padding, dilation = (tuple(v) for v in (self.stride, self.padding, self.dilation))
        shape = tuple(self.weight.shape)
        return Conv(True, False, (0, 0, 0), shape, stride, padding, dilation, self.groups, self.act, False)  # type: ignore[arg-type]

    def plain(self, x: Tensor) -> None:
        """Run inputs like x on the weight as it is: oneDNN reorders it in every call."""
        self.packs.found[x.shape, x.stride()] = self.weight.detach()

    def onednn(self, x: Tensor, weight: Tensor, residual: Tensor | None, act: str, overwrite: bool) -> Tensor | None:
        """The fused call; None for an epilogue that oneDNN does not fuse."""
        where = self.padding, self.stride, self.dilation, self.groups
        if residual is None:
            name, scalars = _UNARY[act]
            y: Tensor = torch.ops.mkldnn._convolution_pointwise.default(x, weight, self.bias, *where, name, scalars, "")
            return y
        p, q = output_size(x.shape[2:], self.kernel_size, self.stride, self.padding, self.dilation)  # type: ignore[arg-type]
        # one pixel: the strides say nothing, and oneDNN fails on them
        if act not in _BINARY or p * q == 1 or residual.shape != (x.shape[0], self.out_channels, p, q):
            return None
        if residual.dtype != x.dtype or not residual.is_contiguous(memory_format=torch.channels_last):
            return None
        epilogue: tuple[Any, ...] = "add", None, _BINARY[act], [], None
        if overwrite:
            y = torch.ops.mkldnn._convolution_pointwise_.binary(residual, x, weight, self.bias, *where, *epilogue)
        else:
            y = torch.ops.mkldnn._convolution_pointwise.binary(x, residual, weight, self.bias, *where, *epilogue)
        return y

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, act={self.act}"  # type: ignore[no-untyped-call]


def freeze_conv(conv: nn.Module) -> bool:
    """Makes a plain, bare Conv2d with zero padding a FrozenConv, by its class; whether it is one."""
    if isinstance(conv, FrozenConv):
        return True
    if type(conv) is not nn.Conv2d or not is_bare(conv) or conv.padding_mode != "zeros":
        return False
    if isinstance(conv.padding, str):
        return False
    conv.__class__ = FrozenConv
    frozen: Any = conv
    frozen.act, frozen.exact, frozen.packs = "none", False, Packs()
    return True


def frozen_convs(model: nn.Module) -> list[FrozenConv]:
    """Every FrozenConv of `model`."""
    return [m for m in model.modules() if isinstance(m, FrozenConv)]
