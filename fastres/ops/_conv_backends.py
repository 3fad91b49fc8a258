"""The backends of conv_act, and what they know of a call: each is its refusals, and a function that returns y."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastres.ops import _conv_native, _conv_tiles
from fastres.ops._bn_backends import NATIVE
from fastres.ops._conv_tiles import Problem
from fastres.ops._tensors import KERNEL_DTYPES, memory_format, stats_dtype, why_not_cpu, why_not_cuda, why_not_triton

Pair = Sequence[int]
Maybe = Tensor | None

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,
    "none": lambda z: z,
    "relu6": lambda z: F.hardtanh_(z, 0.0, 6.0),
    "hardswish": lambda z: F.hardswish(z, inplace=True),
    "silu": lambda z: F.silu(z, inplace=True),
}  # in place, on a tensor of our own
OUT_OF_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "none": lambda z: z,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "silu": F.silu,
}
ACTS = tuple(ACTIVATIONS)


# ---- the call --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Conv:
    """A convolution without its tensors: what a backend's refusals follow from, apart from x's dtype and device."""

    channels_last: bool  # of the output, as eager's
    empty: bool
    size: tuple[int, int, int]  # x's N, H, W
    weight: tuple[int, ...]  # [K, C / groups, R, S]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    act: str
    residual: bool
    tf32: bool = False  # whether products of float32 tensors on a GPU may be TF32
    scale: bool = False

    @property
    def geometry(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]:
        """The last arguments of conv2d."""
        return self.stride, self.padding, self.dilation, self.groups

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """y's: N, K, P, Q."""
        n, *size = self.size
        return n, self.weight[0], *output_size(size, self.weight[2:], self.stride, self.padding, self.dilation)


def output_size(size: Pair, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> tuple[int, int]:
    """(P, Q) of a convolution over (H, W); not positive where the kernel does not fit."""
    p, q = (
        (n + 2 * pad - d * (k - 1) - 1) // s + 1
        for n, k, s, pad, d in zip(size, kernel, stride, padding, dilation, strict=True)
    )
    return p, q


def sound(
    size: Pair, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair
) -> tuple[tuple[int, int], tuple[int, int], bool]:
    """(stride, dilation, whether the first column alone is wanted): the same convolution as oneDNN computes it right.

    Where the output is one column wide and the stride along it is not 1, oneDNN's answer can be another one: in
    bfloat16 and channels_last, also of the gradients; packed with one channel also in float32. A dilation along a side
    on which the kernel is 1 can end the process. (torch 2.11, oneDNN 3.10, on a CPU with AVX-512;
    tests/ops/test_conv_act_faults.py.)
    """
    sides = zip(kernel, dilation, strict=True)
    h, w = (1 if n == 1 else d for n, d in sides)
    column = kernel[1] > 1 and stride[1] > 1 and output_size(size, kernel, stride, padding, (h, w))[1] == 1
    return (stride[0], 1 if column else stride[1]), (h, w), column


def is_wide(x: Tensor, weight: Tensor, stride: Pair, dilation: Pair) -> bool:
    """Tell whether oneDNN's answer can be another one because a row of the kernel is read as one run.

    In bfloat16 with AMX: fewer than 16 channels a group, a row of them and the kernel's width a multiple of 32 numbers,
    8 channels and a width of 8 for one. A kernel wider by a column of zeros is right.
    """
    row = weight.shape[1] * weight.shape[3]
    few = x.dtype is torch.bfloat16 and weight.shape[1] < 16 and row > 32
    return few and row % 32 == 0 and stride[1] == dilation[1] == 1


def conv2d(x: Tensor, weight: Tensor, bias: Maybe, stride: Pair, padding: Pair, dilation: Pair, groups: int) -> Tensor:
    """`F.conv2d`, but for what oneDNN gets wrong: see `sound` and `is_wide`."""
    column = False
    if x.device.type == "cpu" and type(x.shape[3]) is int:
        if stride[1] != 1 or dilation[0] != 1 or dilation[1] != 1:
            stride, dilation, column = sound(x.shape[2:], weight.shape[2:], stride, padding, dilation)
        if is_wide(x, weight, stride, dilation):
            x, weight = F.pad(x, [0, 1]), F.pad(weight, [0, 1])
    y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    if not column:
        return y
    return y[..., :1].clone(memory_format=memory_format(y.is_contiguous(memory_format=torch.channels_last)))


def conv2d_backward(
    dy: Tensor, x: Tensor, weight: Tensor, where: tuple[Pair, Pair, Pair, int], needs: list[bool]
) -> tuple[Maybe, Maybe, Maybe]:
    """The gradients of x, of the weight and of a bias, those that are needed; `where` ends conv2d's arguments."""
    stride, padding, dilation, groups = where
    if x.device.type == "cpu" and type(x.shape[3]) is int:
        stride, dilation, column = sound(x.shape[2:], weight.shape[2:], stride, padding, dilation)
        if column:
            columns = output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)[1]
            dy = F.pad(dy, [0, columns - 1])  # the other columns of stride 1 take no part
    return torch.ops.aten.convolution_backward.default(  # type: ignore[no-any-return]
        dy, x, weight, [weight.shape[0]], stride, padding, dilation, False, [0, 0], groups, needs
    )


def pair(value: int | Pair, name: str = "value") -> tuple[int, int]:
    """A number or two as two."""
    if isinstance(value, int | torch.SymInt):
        return value, value
    pair = tuple(value)
    if len(pair) != 2 or isinstance(value, str):
        raise ValueError(f"conv_act: {name}: got {value!r}, expected a number or two")
    return pair


# ---- backends --------------------------------------------------------------------------------------------------------


def why_not_reference(x: Tensor, call: Conv) -> list[str]:
    return []


def reference(x: Tensor, weight: Tensor, bias: Maybe, residual: Maybe, scale: Maybe, call: Conv) -> Tensor:
    z = conv2d(x, weight, None if call.scale else bias, *call.geometry)
    return epilogue(z, bias, residual, scale, call.act)


def epilogue(c: Tensor, bias: Maybe, residual: Maybe, scale: Maybe, act: str) -> Tensor:
    """act(scale * c + bias [+ residual]) or act(c [+ residual]) in stock PyTorch; may write over c, [N, K, P, Q]."""
    z = c
    if scale is not None:
        z = c.to(stats_dtype(c)).mul_(scale[:, None, None])
        if bias is not None:
            z = z.add_(bias[:, None, None])
    if residual is not None:
        z = z.add_(residual)
    return ACTIVATIONS[act](z).to(c.dtype)


def why_not_conv_cpu(x: Tensor, call: Conv) -> list[str]:
    return why_not_cpu(x) or (["an empty tensor runs through the reference"] if call.empty else [])


def cpu(x: Tensor, weight: Tensor, bias: Maybe, residual: Maybe, scale: Maybe, call: Conv) -> Tensor:
    """PyTorch's convolution, then the rest in place in one pass, while the output is in cache where it fits.

    oneDNN's own epilogue (below) on a weight that is not packed took 1.0 to 4 times as long, at the ResNet shapes and
    in both layouts. Frozen networks, which pack, use it.
    """
    z = conv2d(x, weight, None if call.scale else bias, *call.geometry)
    if residual is None and scale is None:
        return ACTIVATIONS[call.act](z)
    shift, relu = bias if call.scale else None, call.act == "relu"
    y: Maybe
    y, _, _ = NATIVE(z, scale, shift, residual, None, None, None, False, 0.0, 0.0, relu, True)
    if y is None:  # strides that the kernel does not know
        return epilogue(z, bias, residual, scale, call.act)
    return y if relu else ACTIVATIONS[call.act](y)


def why_not_winograd(x: Tensor, call: Conv) -> list[str]:
    reasons = _conv_native.why_not(x, call.weight, call.geometry, call.act)
    if call.empty and not reasons:
        reasons.append("an empty tensor runs through the reference")
    return reasons if call.channels_last else [*reasons, "NCHW: the kernel reads channels_last"]


def winograd(x: Tensor, weight: Tensor, bias: Maybe, residual: Maybe, scale: Maybe, call: Conv) -> Tensor:
    """F(2x2, 3x3) with its epilogue; direct where an output is not finite, which a tile would spread."""
    given = x.contiguous(memory_format=torch.channels_last)
    added = None if residual is None else residual.contiguous(memory_format=torch.channels_last)
    shift, factor = (None if t is None else t.contiguous() for t in (bias, scale))
    y: Maybe = _conv_native.once(given, weight, shift, added, factor, *call.padding, call.act, False)
    return cpu(x, weight, bias, residual, scale, call) if y is None else y


def why_not_onednn(x: Tensor, call: Conv) -> list[str]:
    """Refusals of oneDNN's convolution with a fused sum, PyTorch's `mkldnn::_convolution_pointwise`."""
    if x.device.type != "cpu":
        return [f"x is on {x.device}, oneDNN runs on cpu"]
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return ["this build of torch has no oneDNN, or torch.backends.mkldnn.enabled is False"]
    reasons = ["its epilogue has no scale per channel"] if call.scale else []
    if x.dtype is torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        reasons.append("float16 needs a CPU with avx512_fp16 or AMX")
    elif x.dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        reasons.append("bfloat16 needs a CPU with AVX-512")
    elif x.dtype not in KERNEL_DTYPES:
        reasons.append(f"dtype {x.dtype} runs through the reference")
    if x.dtype is not torch.float32 and not call.channels_last:
        reasons.append("16-bit types in NCHW fail inside oneDNN; channels_last works")
    if call.empty:
        reasons.append("an empty tensor runs through the reference")
    return reasons


def onednn(x: Tensor, weight: Tensor, bias: Maybe, residual: Maybe, scale: Maybe, call: Conv) -> Tensor:
    # oneDNN's own ReLU turns NaN into 0: the activation runs in place behind it, on an output that is still in cache.
    layout = memory_format(call.channels_last)
    x, weight = x.contiguous(memory_format=layout), weight.contiguous(memory_format=layout)
    stride, dilation, column = sound(call.size[1:], call.weight[2:], call.stride, call.padding, call.dilation)
    if column:
        return reference(x, weight, bias, residual, scale, call)
    where = list(call.padding), list(stride), list(dilation), call.groups
    _, k, p, q = call.shape
    if residual is not None and k > 1 and p * q > 1:
        residual = residual.contiguous(memory_format=layout)
        z = torch.ops.mkldnn._convolution_pointwise.binary(
            x, residual, weight, bias, *where, "add", None, None, [], None
        )
    else:
        z = torch.ops.mkldnn._convolution_pointwise.default(x, weight, bias, *where, "none", [], "")
        if residual is not None:  # one channel or one pixel: the strides say nothing, and oneDNN fails on them
            z = z.add_(residual)
    return ACTIVATIONS[call.act](z)


def why_not_cudnn(x: Tensor, call: Conv) -> list[str]:
    if x.device.type != "cuda":
        return [f"x is on {x.device}, cuDNN runs on cuda"]
    if not (torch.backends.cudnn.is_available() and torch.backends.cudnn.enabled):
        return ["cuDNN is missing, or torch.backends.cudnn.enabled is False"]
    reasons = ["its epilogue has no scale per channel"] if call.scale else []
    if x.dtype not in KERNEL_DTYPES:
        reasons.append(f"dtype {x.dtype} runs through the reference")
    if call.act != "relu":
        reasons.append(f"cuDNN fuses ReLU alone, act is {call.act!r}")
    if call.empty:
        reasons.append("an empty tensor runs through the reference")
    return reasons


def cudnn(x: Tensor, weight: Tensor, bias: Maybe, residual: Maybe, scale: Maybe, call: Conv) -> Tensor:
    if residual is None:
        y: Tensor = torch.ops.aten.cudnn_convolution_relu.default(x, weight, bias, *call.geometry)
    else:
        residual = residual.contiguous(memory_format=memory_format(call.channels_last))
        y = torch.ops.aten.cudnn_convolution_add_relu.default(x, weight, residual, None, bias, *call.geometry)
    return y


def why_not_conv_cuda(x: Tensor, call: Conv) -> list[str]:
    if why_not_cuda(x):
        return why_not_cuda(x)
    reasons = ["the kernels' epilogue has no scale per channel"] if call.scale else []
    if call.empty:
        reasons.append("an empty tensor runs through the reference")
    if not call.channels_last:
        reasons.append("NCHW: the kernels read channels_last")
    if call.groups > 1:
        reasons.append(f"{call.groups} groups: the kernels have 1")
    if call.act not in _conv_tiles.ACTS:
        reasons.append(f"act is {call.act!r}: the kernels have {', '.join(_conv_tiles.ACTS)}")
    if x.dtype is torch.float32 and not call.tf32:
        reasons.append("float32 products are TF32, which torch.backends.cudnn forbids")
    return reasons or _conv_tiles.why_not(problem_of(x, call))


def problem_of(x: Tensor, call: Conv) -> Problem:
    """The convolution as the kernels of fastres._C_cuda and the table of measurements know it."""
    (n, h, w), (k, c, r, s), (_, _, p, q) = call.size, call.weight, call.shape
    capability = torch.cuda.get_device_capability(x.device)
    shape = n, h, w, c, k, r, s, p, q, *call.stride, *call.padding, *call.dilation
    return Problem(capability, x.dtype, shape, call.residual)


def measured(x: Tensor, call: Conv) -> tuple[str, ...]:
    """The backends in the order measured for this convolution, on a CPU as the cost model has it; nothing without."""
    if x.device.type == "cpu":
        n, k, p, q = call.shape
        shape = n, call.weight[1], k, p, q
        return ("winograd", "cpu") if not why_not_winograd(x, call) and _conv_native.pays(*shape, x.dtype) else ()
    if x.device.type != "cuda" or x.dtype not in KERNEL_DTYPES or call.groups > 1 or not call.channels_last:
        return ()
    if x.dtype is torch.float32 and not call.tf32:  # measured with TF32
        return ()
    return _conv_tiles.measured_order(problem_of(x, call))


def cuda(x: Tensor, weight: Tensor, bias: Maybe, residual: Maybe, scale: Maybe, call: Conv) -> Tensor:
    problem = problem_of(x, call)
    tile = _conv_tiles.choose(problem, torch.cuda.get_device_properties(x.device).multi_processor_count)
    tensors = [None if t is None else _readable(t) for t in (x, weight, bias, residual)]
    where = *call.stride, *call.padding, *call.dilation
    y: Tensor = torch.ops.fastres._conv_act_native.default(*tensors, *where, call.act, tile.index)
    return y


def _readable(t: Tensor) -> Tensor:
    """Dense, in channels_last where it is an image or a weight, at an address that 16 bytes can be read from."""
    t = t.contiguous(memory_format=torch.channels_last if t.ndim == 4 else torch.contiguous_format)
    return t if t.data_ptr() % 16 == 0 else t.clone(memory_format=torch.preserve_format)


def tf32_allowed() -> bool:
    """Say whether cuDNN's switch allows TF32 in convolutions: it rules all kernels that are one.

    Not by `torch.backends.cudnn.allow_tf32`, which raises once the newer `fp32_precision` was set for convolutions.
    """
    return bool(torch.backends.cudnn.conv.fp32_precision == "tf32")  # type: ignore[attr-defined]


def why_not_conv_triton(x: Tensor, call: Conv) -> list[str]:
    reasons = why_not_triton(x)
    if call.empty:
        reasons.append("an empty tensor runs through the reference")
    if reasons:
        return reasons
    from fastres.kernels.conv_act import why_not

    dense = torch.empty(x.shape, dtype=x.dtype, device="meta", memory_format=memory_format(call.channels_last))
    weight = torch.empty(call.weight, dtype=x.dtype, device="meta")
    return list(why_not(dense, weight, call.stride, call.padding, call.dilation, call.groups))


def triton(x: Tensor, weight: Tensor, bias: Maybe, residual: Maybe, scale: Maybe, call: Conv) -> Tensor:
    from fastres.kernels.conv_act import conv_act_forward

    layout = memory_format(call.channels_last)
    y = torch.empty(call.shape, dtype=x.dtype, device=x.device, memory_format=layout)
    conv_act_forward(
        x.contiguous(memory_format=layout),
        weight,
        bias,
        None if residual is None else residual.contiguous(memory_format=layout),
        y,
        stride=call.stride,
        padding=call.padding,
        dilation=call.dilation,
        groups=call.groups,
        scale=scale,
        act=call.act,
        tf32=tf32_allowed(),
    )
    return y
