"""CPU convolutions of our own: csrc/cpu/conv_winograd.cpp, conv_winograd_weight.cpp, conv_1x1.cpp and conv_direct.cpp.

"winograd2" and "winograd4" run 3x3 convolutions of stride 1 by F(2x2, 3x3), with 2.25 times fewer products than a
direct one and at least as exact, and F(4x4, 3x3), with 4 times fewer and 1.2 to 1.4 times the error; docs/winograd.md
says why. "product" runs a 1x1 convolution of any stride as a product of matrices, "direct" one of any kernel size,
stride and dilation by direct products, and a max-pool in the same pass (stem.py). In bf16 direct products are those of
AMX or AVX512-BF16 where the CPU has them: two at a time, summed in fp32, subnormal numbers taken for zeros. Frozen
networks call them on weights that were made ready once. The backend "winograd" of conv_act is F(2x2, 3x3) on the weight
as it is, with the gradient of x by the same kernel and that of the weight by F(3x3, 2x2).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastres._extension import build_info
from fastres.ops._tensors import why_not_cpu

PRODUCT, DIRECT = "product", "direct"
TILES = {"winograd2": 2, "winograd4": 4}  # way -> the side of a tile of outputs
ACTS = ("none", "relu", "relu6", "hardswish")  # that the kernels have in their epilogue
_FEWEST = 16  # channels: with fewer, the transforms take longer than the products that they save

_LIB = torch.library.Library("fastres", "FRAGMENT")
_LIB.define("_conv_winograd_pack_native(Tensor weight, int tile) -> Tensor")
_LIB.define("_conv_direct_pack_native(Tensor weight) -> Tensor")
for _name in ("winograd", "1x1"):  # h, w: the padding, or the stride
    _arguments = "Tensor x, Tensor u, Tensor? bias, Tensor? residual, Tensor? scale, int outputs, int h, int w, str act"
    _LIB.define(f"_conv_{_name}_native({_arguments}) -> Tensor")
    _LIB.define(f"_conv_{_name}_into_native({_arguments}, Tensor(a!) y) -> Tensor(a!)")  # y: the residual, perhaps
_arguments = "Tensor x, Tensor u, Tensor? bias, Tensor? residual, Tensor? scale, int outputs"
# where: kernel, stride, padding and dilation; pool: kernel, stride and padding, or nothing
_LIB.define(f"_conv_direct_native({_arguments}, int[] where, int[] pool, str act) -> Tensor")
_LIB.define(f"_conv_direct_into_native({_arguments}, int[] where, int[] pool, str act, Tensor(a!) y) -> Tensor(a!)")
_LIB.define(
    "_conv_winograd_once_native(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? scale, int h, int w, "
    "str act, bool turned) -> Tensor?"
)
_LIB.define("_conv_winograd_weight_native(Tensor x, Tensor dy, int h, int w, bool channels_last) -> Tensor?")

_ops: Any = torch.ops.fastres
once = _ops._conv_winograd_once_native.default
weight_gradient = _ops._conv_winograd_weight_native.default
pack, forward, into = (getattr(_ops, f"_conv_winograd_{name}native").default for name in ("pack_", "", "into_"))
forward_1x1, into_1x1 = _ops._conv_1x1_native.default, _ops._conv_1x1_into_native.default
pack_direct, direct, direct_into = (
    getattr(_ops, f"_conv_direct_{name}native").default for name in ("pack_", "", "into_")
)


def why_not(x: Tensor, weight: tuple[int, ...], where: tuple[Any, ...], act: str) -> list[str]:
    """Refusals of Winograd for x, [N, C, H, W], a weight's shape, (stride, padding, dilation, groups) and act."""
    reasons = _why_not(x, act, where)
    stride, padding, dilation, _ = where
    if tuple(weight[2:]) != (3, 3):
        reasons.append(f"the kernel is {weight[2]}x{weight[3]}, Winograd's is 3x3")
    if tuple(stride) != (1, 1) or tuple(dilation) != (1, 1):
        reasons.append(f"stride {tuple(stride)} and dilation {tuple(dilation)}, Winograd's are 1")
    if max(padding) > 2:
        reasons.append(f"padding {tuple(padding)}, Winograd's is at most 2")
    if min(weight[:2]) < _FEWEST:
        reasons.append(f"{weight[1]} to {weight[0]} channels: below {_FEWEST} the transforms cost more than they save")
    return reasons


def why_not_1x1(x: Tensor, weight: tuple[int, ...], where: tuple[Any, ...], act: str) -> list[str]:
    """Refusals of the product likewise."""
    reasons = _why_not(x, act, where)
    if tuple(weight[2:]) != (1, 1) or max(where[1]):
        reasons.append(f"the kernel is {weight[2]}x{weight[3]} with padding {tuple(where[1])}, expected 1x1 without")
    if x.dtype is not torch.float32 and _has_16_bit_products(x.dtype):
        reasons.append(f"this CPU multiplies {x.dtype} faster than float32")
    return reasons


def why_not_direct(x: Tensor, where: tuple[Any, ...], act: str) -> list[str]:
    """Refusals of direct products, for a kernel of any size, likewise."""
    reasons = _why_not(x, act, where)
    if has_pairs(x.dtype):
        if where[2][1] > 1 and x.shape[1] < _FEWEST:
            reasons.append(f"dilation {where[2][1]} with {x.shape[1]} channels, expected 1 below {_FEWEST}")
    elif x.dtype is not torch.float32 and _has_16_bit_products(x.dtype):
        reasons.append(f"this CPU multiplies {x.dtype} faster than float32")
    return reasons


def has_pairs(dtype: torch.dtype) -> bool:
    """Tell whether direct products multiply pairs of numbers of this dtype, by AMX or AVX512-BF16."""
    return dtype is torch.bfloat16 and bool(build_info().get("has_pairs"))


def _why_not(x: Tensor, act: str, where: tuple[Any, ...]) -> list[str]:
    reasons = why_not_cpu(x)
    if where[3] != 1:
        reasons.append(f"{where[3]} groups, the kernels have 1")
    if act not in ACTS:
        reasons.append(f"act is {act!r}: the kernels have {', '.join(ACTS)}")
    if x.numel() == 0:
        reasons.append("an empty tensor runs through the reference")
    return reasons


def _has_16_bit_products(dtype: torch.dtype) -> bool:
    known = torch.ops.mkldnn
    return bool(known._is_mkldnn_bf16_supported() if dtype is torch.bfloat16 else known._is_mkldnn_fp16_supported())


def bytes_held(weight: Tensor) -> dict[str, int]:
    """The bytes of a weight, [K, C, R, S], made ready for each way: float32, panels of up to 32 output channels.

    Or pairs of bf16, up to a multiple of 16 of these.
    """
    outputs = -(-weight.shape[0] // 32) * 32
    numbers = outputs * weight.shape[1]
    direct = 4 * numbers * weight.shape[2] * weight.shape[3]
    if has_pairs(weight.dtype):
        dense = weight.shape[1] < _FEWEST and weight.shape[3] > 1
        pairs = -(-weight.shape[1] // 2) * (weight.shape[3] if dense else 1)
        direct = 64 * -(-pairs // 16) * outputs * weight.shape[2] * (1 if dense else weight.shape[3])
    return {PRODUCT: direct, DIRECT: direct} | {way: 4 * (m + 2) ** 2 * numbers for way, m in TILES.items()}


def faster(n: int, c: int, k: int, p: int, q: int, dtype: torch.dtype) -> tuple[str, ...]:
    """The ways that are faster than oneDNN's, the fastest first, as far as the sizes tell; `tune` measures.

    Args:
        n, c, k: images, channels in and out.
        p, q: height and width of the output.
    """
    direct = _direct(n, c, k, p, q, dtype)
    costs = {way: _cost(m, n, c, k, p, q) for way, m in TILES.items()}
    return tuple(way for way in sorted(costs, key=lambda way: costs[way]) if costs[way] < _MARGIN * direct)


def pays(n: int, c: int, k: int, p: int, q: int, dtype: torch.dtype) -> bool:
    """Tell whether F(2x2) is faster than oneDNN's convolution also where the weight is transformed in the call."""
    return _CALL + _cost(2, n, c, k, p, q) + 16 * c * k < _MARGIN * _direct(n, c, k, p, q, dtype)


def _weight_pays(n: int, c: int, k: int, p: int, q: int, dtype: torch.dtype) -> bool:
    """Tell so of the gradient of the weight: V and E go through the last-level cache, oneDNN's is 0.8 of the peak."""
    tiles = n * -(-p // 2) * -(-q // 2)
    cost = 16 * tiles * (c * k / 32 + 0.85 * (c + k)) + 50 * c * k
    return cost < _MARGIN * 1.25 * _direct(n, c, k, p, q, dtype)


_MARGIN = 0.85
_CALL = 2e5  # cycles: 25 us on two cores, what a call through conv_act costs more than the stock one


def _direct(n: int, c: int, k: int, p: int, q: int, dtype: torch.dtype) -> float:
    """Cycles of two multiply-adds of 16 lanes that a direct 3x3 convolution takes."""
    cycles = 9.0 * c * k * n * p * q / 32
    return cycles / 2 if dtype is not torch.float32 and _has_16_bit_products(dtype) else cycles


def _cost(m: int, n: int, c: int, k: int, p: int, q: int) -> float:
    """Such cycles of F(m x m, 3x3).

    Products, four for each vector of V and M that is made, stored and read again, three for each channel that fills no
    vector, the transformed weight read once.
    """
    taps, tiles = (m + 2) ** 2, n * -(-p // m) * -(-q // m)
    products = taps * tiles * c * k / 32
    transforms = taps * tiles * ((c + k) / 4 + 3 * (c % 16 + k % 16))
    weights = taps * c * k / 4  # from the last-level cache or memory
    return products + transforms + weights


def gradients(
    dy: Tensor, x: Tensor, weight: Tensor, padding: Any, needs_x: bool, needs_weight: bool, forced: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and of the weight of a convolution that `why_not` takes; None where oneDNN's is faster.

    Args:
        dy: [N, K, P, Q].
        x: [N, C, H, W].
        weight: [K, C, 3, 3].
        forced: take ours wherever its answer is finite.
    """
    (n, k, p, q), (_, c, h, w), (along_h, along_w) = dy.shape, x.shape, padding
    dy, x = (t.contiguous(memory_format=torch.channels_last) for t in (dy, x))
    dx = dweight = None
    if needs_x and (forced or pays(n, k, c, h, w, x.dtype)):
        dx = once(dy, weight, None, None, None, 2 - along_h, 2 - along_w, "none", True)
    if needs_weight and (forced or _weight_pays(n, c, k, p, q, x.dtype)):
        dweight = weight_gradient(x, dy, along_h, along_w, weight.is_contiguous(memory_format=torch.channels_last))
    return dx, dweight
