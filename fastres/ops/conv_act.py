"""conv_act: a convolution with the bias, the residual addition and the activation that follow it.

    formula    c = conv2d(x, weight)                 stride, padding, dilation, groups as torch.nn.functional.conv2d
               z = [scale *] c [+ bias] [+ residual] scale, bias: one number per output channel
               y = act(z)                            "relu" (NaN passes), "none"; "relu6", "hardswish", "silu"
    gradient   g         = 0 where y <= 0, else dy   act="relu"; g = dy for act="none"
               dx        = conv2d's gradient of x at scale * g
               dweight   = conv2d's gradient of weight at scale * g
               dscale    = sum g * c                 over N, H, W; c is computed again
               dbias     = sum g                     over N, H, W
               dresidual = g

One pass over the output where a backend writes it with its epilogue, instead of three. Saved for backward: x, weight,
scale, and y for its sign. The other activations' gradients need z: where gradients are wanted they run behind
act="none". With a scale, what follows the convolution is computed in float32 (float64 for float64).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from fastres._dispatch import AUTO, REFERENCE, Backend, BackendError, Choices, Operator, check_stock, choose, register
from fastres.ops import _conv_backends, _conv_frozen, _conv_native
from fastres.ops._autograd import any_requires_grad, is_plain_eager, is_transformed, register_autograd
from fastres.ops._conv_backends import ACTS, Conv, Maybe, Pair, conv2d, conv2d_backward, output_size, pair
from fastres.ops._tensors import (
    check_activation,
    empty_elementwise,
    is_channels_last,
    memory_format,
    stats_dtype,
    with_strides,
)

_LIB = torch.library.Library("fastres", "FRAGMENT")
_LIB.define(
    "conv_act(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? scale, SymInt[2] stride, "
    'SymInt[2] padding, SymInt[2] dilation, SymInt groups, str act, str backend="auto") -> Tensor'
)
_LIB.define(
    "_conv_act_native(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int stride_h, int stride_w, "
    "int padding_h, int padding_w, int dilation_h, int dilation_w, str act, int tile) -> Tensor"
)


# ---- the call: checks, shapes, layout --------------------------------------------------------------------------------


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Maybe,
    residual: Maybe,
    scale: Maybe,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    act: str,
) -> tuple[int, int, int, int]:
    """The output's shape, or a typed error that names the argument."""
    check_activation("conv_act", "x", x)
    check_activation("conv_act", "weight", weight)
    for name, t in (("x", x), ("weight", weight)):
        if t.ndim != 4:
            wanted = "[N, C, H, W]" if name == "x" else "[K, C / groups, R, S]"
            raise ValueError(f"conv_act: {name}: got {t.ndim} dimensions {list(t.shape)}, expected 4: {wanted}")
    for name, values, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if any(value < least for value in values):
            raise ValueError(f"conv_act: {name}: got {tuple(values)}, expected two numbers of at least {least}")
    n, c, h, w = x.shape
    k, per_group, r, s = weight.shape
    if groups < 1 or c % groups or k % groups:
        raise ValueError(f"conv_act: groups: got {groups}, expected a divisor of x's {c} and of weight's {k} channels")
    if per_group * groups != c:
        raise ValueError(
            f"conv_act: weight: got shape {list(weight.shape)}, expected [K, {c // groups}, R, S]: x has {c} channels "
            f"in {groups} groups"
        )
    if r < 1 or s < 1:
        raise ValueError(f"conv_act: weight: got shape {list(weight.shape)}, expected a kernel of at least 1x1")
    p, q = output_size((h, w), (r, s), stride, padding, dilation)
    if p < 1 or q < 1:
        raise ValueError(
            f"conv_act: x: got images of {h}x{w}, too small for a {r}x{s} kernel with padding {tuple(padding)} and "
            f"dilation {tuple(dilation)}: the output would be {p}x{q}"
        )
    shape = n, k, p, q
    others: list[tuple[str, Maybe, tuple[int, ...] | None]]
    others = [("weight", weight, None), ("bias", bias, (k,)), ("residual", residual, shape), ("scale", scale, (k,))]
    for name, other, like in others:
        if other is None:
            continue
        check_activation("conv_act", name, other)
        if like is not None and tuple(other.shape) != like:
            what = "the output's shape" if name == "residual" else "weight's output channels"
            raise ValueError(f"conv_act: {name}: got shape {list(other.shape)}, expected {list(like)}, {what}")
        wide = name == "scale" or (name == "bias" and scale is not None)
        if other.dtype != x.dtype and not (wide and other.dtype is stats_dtype(x)):
            also = f" or {stats_dtype(x)}" if wide and stats_dtype(x) is not x.dtype else ""
            raise TypeError(f"conv_act: {name}: got dtype {other.dtype}, expected x's dtype {x.dtype}{also}")
        if other.device != x.device:
            raise ValueError(f"conv_act: {name}: got device {other.device}, expected x's device {x.device}")
    if act not in ACTS:
        raise ValueError(f"conv_act: act: got {act!r}, expected one of {ACTS}")
    return shape


def _output_is_channels_last(x: Tensor, weight: Tensor) -> bool:
    """Eager's rule: an input or a weight in channels_last is enough."""
    return is_channels_last(x) or is_channels_last(weight)


def _kind(
    x: Tensor,
    weight: Tensor,
    bias: Maybe = None,
    residual: Maybe = None,
    scale: Maybe = None,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
    act: str = "relu",
    backend: str = AUTO,
) -> Conv:
    return Conv(
        _output_is_channels_last(x, weight),
        x.numel() == 0 or weight.numel() == 0,
        (x.shape[0], x.shape[2], x.shape[3]),
        tuple(weight.shape),
        pair(stride, "stride"),
        pair(padding, "padding"),
        pair(dilation, "dilation"),
        groups,
        act,
        residual is not None,
        x.dtype is torch.float32 and x.device.type == "cuda" and _conv_backends.tf32_allowed(),
        scale is not None,
    )


# ---- operator: kernel, fake, autograd --------------------------------------------------------------------------------


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Maybe,
    residual: Maybe,
    scale: Maybe,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    act: str,
    backend: str = AUTO,
) -> Tensor:
    where = stride, padding, dilation, groups, act
    _, k, p, q = shape = _check(x, weight, bias, residual, scale, *where)
    call = _kind(x, weight, bias, residual, scale, *where)
    y: Tensor = choose(OPERATOR, backend, x, call).forward(x, weight, bias, residual, scale, call)
    plain = k > 1 and p * q > 1 and (residual is None or residual.stride() == y.stride())
    if plain and y.is_contiguous(memory_format=memory_format(call.channels_last)):
        return y
    return with_strides(y, _empty_output(x, weight, residual, shape, act, "meta").stride())


def _empty_output(
    x: Tensor, weight: Tensor, residual: Maybe, shape: Sequence[int], act: str, device: torch.device | str
) -> Tensor:
    """Uninitialized y, with the strides that eager's conv2d, addition and activation leave."""
    layout = memory_format(_output_is_channels_last(x, weight))
    y = torch.empty(shape, dtype=x.dtype, device=device, memory_format=layout)
    if residual is not None:
        like = torch.empty_strided(shape, residual.stride(), dtype=x.dtype, device=device)
        return empty_elementwise(y, like, "none" if act == "none" else "relu")
    # an activation makes the strides of dimensions of size 1 canonical
    return torch.empty_like(y, memory_format=torch.contiguous_format) if act != "none" and y.is_contiguous() else y


def _fake_forward(*arguments: Any) -> Tensor:
    x, weight, _, residual, _, *_, act, _ = arguments if len(arguments) == 11 else (*arguments, AUTO)
    shape = _check(*arguments[:10])
    return _empty_output(x, weight, residual, shape, act, x.device)


def _per_channel(t: Tensor, like: Tensor) -> Tensor:
    return t.to(like.dtype)[:, None, None]  # [K, 1, 1]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, _, scale, *ctx.where, ctx.act, ctx.backend = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight, scale, output if ctx.act == "relu" else None)


def _own_gradients(
    ctx: Any, dc: Tensor, x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool
) -> tuple[Maybe, Maybe]:
    """The gradients that Winograd's kernels compute, of a convolution that ran by them; they have none of their own."""
    if x.device.type != "cpu" or torch.is_grad_enabled() or not is_plain_eager(dc, x, weight):
        return None, None
    if choose(OPERATOR, ctx.backend, x, _kind(x, weight, None, None, None, *ctx.where)).name != "winograd":
        return None, None
    return _conv_native.gradients(dc, x, weight, ctx.where[1], needs_x, needs_weight, ctx.backend == "winograd")


def _backward(ctx: Any, dy: Tensor) -> tuple[Maybe, ...]:
    x, weight, scale, y = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, needs_residual, needs_scale = ctx.needs_input_grad[:5]
    if y is None:
        g = dy
    elif torch.is_grad_enabled() or is_transformed():  # create_graph=True: linear in dy, one mask serves every order
        g = torch.where(y.detach() <= 0, 0, dy)
    else:
        g = torch.ops.fastres.add_relu_backward.default(dy, y)
    dx = dweight = dbias = dscale = None
    dc, needs = g, [needs_x, needs_weight, needs_bias]
    if scale is not None:
        wide, dims = g.to(stats_dtype(x)), (0, 2, 3)
        dc, needs = (wide * _per_channel(scale, wide)).to(x.dtype), [needs_x, needs_weight, False]
        if needs_scale:
            dscale = (wide * conv2d(x, weight, None, *ctx.where)).sum(dims).to(scale.dtype)
        if needs_bias:
            dbias = wide.sum(dims).to(ctx.bias_dtype)
    if needs[0] or needs[1]:
        dx, dweight = _own_gradients(ctx, dc, x, weight, *needs[:2])
        needs = [needs[0] and dx is None, needs[1] and dweight is None, needs[2]]
    if any(needs):
        rest = conv2d_backward(dc, x, weight, ctx.where, needs)
        dx, dweight = rest[0] if dx is None else dx, rest[1] if dweight is None else dweight
        dbias = rest[2] if scale is None else dbias
    return dx, dweight, dbias, g if needs_residual else None, dscale, *[None] * 6


for _key in ("CPU", "CUDA"):
    _LIB.impl("conv_act", _forward, _key)
torch.library.register_fake("fastres::conv_act", _fake_forward, lib=_LIB)
register_autograd(_LIB, "conv_act", _forward, _setup_context, _backward)


def _flops(x_shape: Any, w_shape: Any, *args: Any, out_shape: Any, **kwargs: Any) -> int:
    """Multiplications and additions of the convolution, 2 N K P Q (C / groups) R S; the epilogue's are not counted."""
    flops: int = 2 * prod(out_shape) * prod(w_shape[1:])
    return flops


def _tell_flop_counters() -> None:
    """Give FlopCounterMode the formula. Its module imports Triton, so only where somebody has loaded it."""
    module: Any = sys.modules.get("torch.utils.flop_counter")
    if module is None:
        return
    if torch.ops.fastres.conv_act not in module.flop_registry:
        module.register_flop_formula(torch.ops.fastres.conv_act)(_flops)
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, module._FlopCounterMode):  # it copied the registry when it was made, perhaps before this
            mode.counter.flop_registry = module.flop_registry | mode.counter.flop_registry


_tell_flop_counters()


# ---- backends: each returns y ----------------------------------------------------------------------------------------


_OP = torch.ops.fastres.conv_act.default


def _example(probe: Tensor) -> tuple[Tensor, Tensor]:
    x = probe.new_empty(1, 32, 4, 4).contiguous(memory_format=torch.channels_last)
    return x, probe.new_empty(32, 32, 3, 3)


# Until measurements say otherwise, cuDNN first: it is the one of the three that is known to be fast at every shape.
_ORDER = {"cpu": ("cpu",), "cuda": ("cudnn", "triton", "cuda")}
OPERATOR = register(Operator("conv_act", _ORDER, kind=_kind, measured=_conv_backends.measured, example=_example))
OPERATOR.add(Backend(REFERENCE, _conv_backends.why_not_reference, _conv_backends.reference))
OPERATOR.add(Backend("cpu", _conv_backends.why_not_conv_cpu, _conv_backends.cpu))
OPERATOR.add(Backend("winograd", _conv_backends.why_not_winograd, _conv_backends.winograd))
OPERATOR.add(Backend("onednn", _conv_backends.why_not_onednn, _conv_backends.onednn))
OPERATOR.add(Backend("cudnn", _conv_backends.why_not_cudnn, _conv_backends.cudnn))
OPERATOR.add(Backend("triton", _conv_backends.why_not_conv_triton, _conv_backends.triton))
OPERATOR.add(Backend("cuda", _conv_backends.why_not_conv_cuda, _conv_backends.cuda))


def winograd_is_faster(x: Tensor, weight: Tensor, padding: Pair, dilation: Pair, groups: int) -> bool:
    """Tell whether conv_act runs this convolution of stride 1 by its backend "winograd". x: [N, C, H, W]."""
    try:
        chosen = choose(OPERATOR, AUTO, x, _kind(x, weight, None, None, None, 1, padding, dilation, groups))
    except BackendError:  # FASTRES_BACKEND names one that refuses
        return False
    return chosen.name == "winograd"


# ---- public function -------------------------------------------------------------------------------------------------


def conv_act(
    x: Tensor,
    weight: Tensor,
    bias: Maybe = None,
    residual: Maybe = None,
    scale: Maybe = None,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
    *,
    act: str = "relu",
    backend: str = AUTO,
) -> Tensor:
    """y = act([scale *] conv2d(x, weight) [+ bias] [+ residual]), in the convolution's own pass where a backend can.

    Gradients flow to x, weight, bias, residual and scale, to any order. Under torch.autocast every tensor is cast to
    the autocast dtype, as conv2d's are; scale, and with it bias, stay as they are.

    Args:
        x: [N, C, H, W], float32, float16, bfloat16 or float64; channels_last is the fast path.
        weight: [K, C / groups, R, S], x's dtype.
        bias: [K], x's dtype, or None. It is added after the scale; with one it may be float32 like it.
        residual: [N, K, P, Q], x's dtype and device, added before the activation.
        scale: [K], x's dtype or float32, or None: a factor per output channel, such as a batch norm's.
        stride, padding, dilation: a number or two, as for conv2d; padding is of zeros.
        groups: divides C and K.
        act: "relu", "none", "relu6", "hardswish" or "silu".
        backend: "auto", "reference", "cpu", "winograd", "onednn" (CPU), "cudnn", "triton" or "cuda" (CUDA). On a CPU
            "auto" takes "winograd" for 3x3 convolutions where it is the faster one; FASTRES_DISABLE=winograd never.

    Returns:
        y: [N, K, P, Q], P = (H + 2 padding - dilation (R - 1) - 1) // stride + 1; channels_last when x or weight is.

    Raises:
        ValueError: ranks, shapes, groups, devices that do not fit each other, an output without pixels, unknown act or
            backend.
        TypeError: not a tensor, dtypes that differ or are not floating.
        BackendError: the named backend refuses; the message says why.

    Source: He et al. 2016, section 3.4 (the layers), equation (1) (the residual).

    Example:
        >>> import torch
        >>> from fastres.functional import conv_act
        >>> conv_act(torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3), stride=2, padding=1).shape
        torch.Size([2, 4, 4, 4])
    """
    for name, t in (("x", x), ("weight", weight)):
        if not isinstance(t, Tensor):
            raise TypeError(f"conv_act: {name}: got {type(t).__name__}, expected a Tensor")
    kind = x.device.type
    if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind) and x.dtype is not torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = bias if bias is None or scale is not None else bias.to(dtype)
        residual = None if residual is None else residual.to(dtype)
    tensors = x, weight, bias, residual, scale
    where = pair(stride, "stride"), pair(padding, "padding"), pair(dilation, "dilation"), groups
    if is_plain_eager(*tensors) and not (torch.is_grad_enabled() and any_requires_grad(*tensors)):
        return _forward(*tensors, *where, act, backend)
    if is_transformed():
        _check(*tensors, *where, act)
        check_stock(OPERATOR, backend)
        return _conv_frozen.stock(*tensors, *where, act)
    if not torch.compiler.is_compiling():
        _tell_flop_counters()
    wants_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if wants_grad and act in ACTS[2:]:
        z: Tensor = _OP(*tensors, *where, "none", backend)
        return _conv_backends.OUT_OF_PLACE[act](z)
    y: Tensor = _OP(*tensors, *where, act, backend)
    return y


def _bind(x: Tensor, *arguments: Any) -> Choices | None:
    """Ways to run the call in a frozen network, once its arguments are known to fit each other."""
    _check(x, *arguments[:9])
    return _conv_frozen.bind(x, *arguments)


OPERATOR.call, OPERATOR.stock, OPERATOR.bind = _forward, _conv_frozen.stock, _bind
OPERATOR.images = lambda *args: (0, 3)
