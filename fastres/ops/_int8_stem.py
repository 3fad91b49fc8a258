"""quantize_conv_int8: the first convolution of a network in int8, with the quantizing of its input, in frozen networks.

    formula    y = conv_int8(quantize(x, x_scale, x_zero), weight, ...)

The input of a ResNet has three channels, which fill no product of 8 bits, and a zero point, which costs oneDNN a third
more. A convolution of stride 2 is one of stride 1 over blocks of 2x2 pixels:

    b[n, (dy, dx, c), i, j] = q[n, c, 2 i + dy - padding, 2 j + dx - padding]      c padded to 4: 16 channels
    w'[k, (dy, dx, c), i, j] = w[k, c, 2 i + dy, 2 j + dx]                         0 beyond the kernel

One pass over the images writes b with its padding, so that the zero point goes into the bias: a 7x7 becomes a 4x4
without padding or zero point, at half the time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastres._dispatch import OPERATORS, REFERENCE, Argument, Backend, Choices, Operator, Prepared, register
from fastres.ops import _int8_conv as conv
from fastres.ops import _int8_quantize as quantizing
from fastres.ops._conv_backends import output_size
from fastres.ops._tensors import why_not_reference

_LIB = torch.library.Library("fastres", "FRAGMENT")
_LIB.define(
    "quantize_conv_int8(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, float x_scale, int x_zero, "
    "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups, str act, float? y_scale, int? y_zero) "
    "-> Tensor"
)
# uint8 [N, 16, rows, columns] in channels_last; None, having done nothing, for a layout that it does not know
_LIB.define(
    "_quantize_blocks_native(Tensor x, float scale, int zero_point, int[] padding, int rows, int columns) -> Tensor?"
)
_blocks_native = torch.ops.fastres._quantize_blocks_native.default
BLOCKS, APART = "blocks", "apart"


def _around(quantize: Any, convolve: Any) -> Any:
    """The operator by these two."""

    def run(
        x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, x_scale: float, x_zero: int, *rest: Any
    ) -> Any:
        q = quantize(x, x_scale, x_zero)
        return convolve(q, weight, scale, bias, None, x_scale, x_zero, 1.0, 0, *rest)

    return run


_ops: Any = torch.ops.fastres
_forward = _around(_ops.quantize.default, _ops.conv_int8.default)
for _key in ("CPU", "CUDA"):
    _LIB.impl("quantize_conv_int8", _forward, _key)
torch.library.register_fake("fastres::quantize_conv_int8", _forward, lib=_LIB)


def _why_not_blocks(x: Tensor, weight: Tensor, where: tuple[Any, ...]) -> bool:
    stride, padding, dilation, groups = where
    plain = tuple(stride) == (2, 2) and tuple(dilation) == (1, 1) and groups == 1 and weight.shape[1] <= 4
    small = max(weight.shape[2:]) <= 16 and max(padding) <= 16
    return not (plain and small and x.dtype is torch.float32 and not quantizing.why_not_native(x))


def in_blocks(weight: Tensor) -> Tensor:
    """w' of a weight [K, C, R, S], C at most 4: [K, 16, ceil(R / 2), ceil(S / 2)]."""
    k, c, r, s = weight.shape
    whole = weight.new_zeros((k, 4, r + r % 2, s + s % 2))
    whole[:, :c, :r, :s] = weight
    parts = whole.view(k, 4, (r + 1) // 2, 2, (s + 1) // 2, 2)  # [K, c, i, dy, j, dx]
    return parts.permute(0, 3, 5, 1, 2, 4).reshape(k, 16, (r + 1) // 2, (s + 1) // 2)


def _bind(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, *rest: Any) -> Choices | None:
    x_scale, x_zero, *where_and = rest
    where, last = tuple(where_and[:4]), where_and[4:]
    q = x.new_zeros(x.shape, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    own = x_scale, x_zero, 1.0, 0, *where, *last
    bind_quantize, bind_conv = OPERATORS["quantize"].bind, OPERATORS["conv_int8"].bind
    assert bind_quantize is not None and bind_conv is not None
    found = [bind_quantize(x, x_scale, x_zero), bind_conv(q, weight, scale, bias, None, *own)]

    def apart() -> Prepared:
        before, after = (next(iter(choices.ways.values()))() for choices in found if choices is not None)

        def run(x: Tensor) -> Tensor:
            given = before.function(x, *before.args[1:])
            return after.function(given, *after.args[1:])  # type: ignore[no-any-return]

        return Prepared(run, (Argument(0),))

    ways = {} if None in found else {APART: apart}
    if not _why_not_blocks(x, weight, where):
        kernel = in_blocks(weight.detach())
        size = output_size(x.shape[2:], weight.shape[2:], *where[:3])
        rows, columns = (n + k - 1 for n, k in zip(size, kernel.shape[2:], strict=True))
        blocks = x.new_zeros((x.shape[0], 16, rows, columns), dtype=torch.uint8)
        blocks = blocks.contiguous(memory_format=torch.channels_last)
        its = x_scale, x_zero, 1.0, 0, [1, 1], [0, 0], [1, 1], 1, *last
        if not conv.why_not(blocks, kernel, None, its):

            def in_one_pass() -> Prepared:
                after = conv.prepared(blocks, kernel, scale, bias, None, its)

                def run(x: Tensor) -> Tensor:
                    given = _blocks_native(x, x_scale, x_zero, list(where[1]), rows, columns)
                    if given is None:
                        return _forward(x, weight, scale, bias, *rest)  # type: ignore[no-any-return]
                    return after.function(given, *after.args[1:])  # type: ignore[no-any-return]

                return Prepared(run, (Argument(0),))

            ways = {BLOCKS: in_one_pass, **ways}
    layout = "nhwc" if x.is_contiguous(memory_format=torch.channels_last) else "nchw"
    if not ways:
        return None
    return Choices(f"quantize_conv_int8 {conv.described(x, weight, own)} {layout}", ways)


OPERATOR = register(Operator("quantize_conv_int8", order={}))
OPERATOR.add(Backend(REFERENCE, why_not_reference, _forward))
OPERATOR.call, OPERATOR.bind = _forward, _bind
OPERATOR.stock = _around(quantizing.stock_quantize, conv.stock)
OPERATOR.images = lambda *args: (0,)
