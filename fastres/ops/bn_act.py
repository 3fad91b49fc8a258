"""bn_act: batch normalization with the residual addition and the ReLU that follow it.

    formula    x_hat = (x - mean) * rstd                    rstd = 1 / sqrt(var + eps), per channel
               z     = weight * x_hat + bias [+ residual]
               y     = max(z, 0)                            act="relu", NaN passes; y = z for act="none"
               mean, var: of the batch (biased) in training, the running statistics in eval mode
    gradient   g        = 0 where y <= 0, else dy           act="relu"; g = dy for act="none"
               dbias    = sum g                             over N, H, W
               dweight  = sum g * x_hat
               dx       = weight * rstd * (g - dbias / n - x_hat * dweight / n)      training, n = N * H * W
               dx       = weight * rstd * g                                          eval
               dresidual = g
    update     running = (1 - momentum) * running + momentum * (mean, var * n / (n - 1))

Statistics and per-channel arithmetic are float32 whatever the activations are (float64 for float64). Saved for
backward: x, mean, var, and y where the sign needs it; no normalized copy (ops/_bn_autograd.py). The statistics are
returned, and the running ones updated after the operator, in the public function: nothing has moved when a call raises.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastres._dispatch import AUTO, REFERENCE, Backend, Operator, check_stock, choose, register
from fastres.ops import _bn_autograd, _bn_backends
from fastres.ops._autograd import is_plain_eager, is_transformed, register_autograd
from fastres.ops._bn_autograd import Call, fast_path, update_running
from fastres.ops._bn_backends import ACTS, NATIVE, Grads, Outputs, by_stock, check, statistics
from fastres.ops._tensors import (
    empty_elementwise,
    is_channels_last,
    memory_format,
    stats_dtype,
    why_not_cpu,
    why_not_cuda,
    why_not_reference,
    why_not_triton,
    with_strides,
)

_LIB = torch.library.Library("fastres", "FRAGMENT")
_LIB.define(
    "bn_act(Tensor x, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, Tensor? residual, "
    'bool training, float eps, str act, str backend="auto") -> (Tensor, Tensor, Tensor)'
)
_LIB.define(
    "bn_act_backward(Tensor dy, Tensor x, Tensor? y, Tensor? weight, Tensor mean, Tensor var, bool training, "
    'float eps, str act, bool[] needs, str backend="auto") -> (Tensor, Tensor, Tensor, Tensor)'
)


# ---- operator: checks, kernel, fake, autograd ------------------------------------------------------------------------


def _empty_output(x: Tensor, residual: Tensor | None, act: str, device: torch.device | str) -> Tensor:
    """Uninitialized y, with the strides that eager's batch_norm, addition and relu leave."""
    if x.numel() == 0 and residual is None and act == "none":
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
    layout = memory_format(x.numel() > 0 and is_channels_last(x))
    y = torch.empty_like(x, memory_format=layout, device=device)
    if x.numel() == 0 or residual is None or residual.stride() == y.stride():
        return y
    return empty_elementwise(y, residual, act)


def _dense(t: Tensor | None, channels_last: bool) -> Tensor | None:
    """`t` with the strides of a new tensor in this order; copied only where its memory has another."""
    if t is None:
        return None
    t = t.contiguous(memory_format=memory_format(channels_last))
    n, c, h, w = t.shape
    return t.as_strided(t.shape, (c * h * w, 1, w * c, c) if channels_last else (c * h * w, h * w, w, 1))


def _per_channel(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if t is None else t.to(dtype).contiguous()


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    training: bool,
    eps: float,
    act: str,
    backend: str = AUTO,
) -> Outputs:
    check(x, weight, bias, running_mean, running_var, residual, training, act)
    chosen, dtype = choose(OPERATOR, backend, x), stats_dtype(x)
    mean, var = (None if training else _per_channel(t, dtype) for t in (running_mean, running_var))
    if x.numel() == 0:
        return _empty_output(x, residual, act, x.device), *statistics(x, mean, var)
    images = [_dense(t, is_channels_last(x)) for t in (x, residual)]
    numbers = [_per_channel(t, dtype) for t in (weight, bias)]
    how = {"training": training, "eps": eps, "act": act}
    y, *used = chosen.forward(images[0], *numbers, images[1], mean, var, **how)
    return with_strides(y, _empty_output(x, residual, act, "meta").stride()), *used


def _fake_forward(x: Tensor, *others: Any) -> Outputs:
    weight, bias, running_mean, running_var, residual, training, _, act = others[:8]
    check(x, weight, bias, running_mean, running_var, residual, training, act)
    return _empty_output(x, residual, act, x.device), *statistics(x, None, None)


def _returned(x: Tensor, grads: Grads) -> tuple[Tensor, ...]:
    """A schema cannot return None: an empty tensor stands for a gradient that is not needed."""
    return tuple(x.new_empty(0) if g is None else g for g in grads)


def _backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    training: bool,
    eps: float,
    act: str,
    needs: Sequence[bool],
    backend: str = AUTO,
) -> tuple[Tensor, ...]:
    chosen = choose(OPERATOR, backend, x)
    if x.numel() == 0:
        return _zero_gradients(x, mean, needs)
    images = [_dense(t, is_channels_last(x)) for t in (dy, x, y)]
    how = {"training": training, "eps": eps, "act": act, "needs": needs}
    return _returned(x, chosen.backward(*images, _per_channel(weight, mean.dtype), mean, var, **how))


def _zero_gradients(x: Tensor, mean: Tensor, needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """dx and dresidual in x's memory order, as eager's."""
    layout = memory_format(is_channels_last(x))
    like = torch.empty_like(x, memory_format=layout), mean, mean, torch.empty_like(x, memory_format=layout)
    return _returned(x, [torch.zeros_like(t) if need else None for t, need in zip(like, needs, strict=True)])


def _fake_backward(dy: Tensor, x: Tensor, y: Any, weight: Any, mean: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return _zero_gradients(x, mean, others[4])


for _key in ("CPU", "CUDA"):
    _LIB.impl("bn_act", _forward, _key)
    _LIB.impl("bn_act_backward", _backward, _key)
torch.library.register_fake("fastres::bn_act", _fake_forward, lib=_LIB)
torch.library.register_fake("fastres::bn_act_backward", _fake_backward, lib=_LIB)
register_autograd(_LIB, "bn_act", _forward, _bn_autograd.setup_context, _bn_autograd.backward)


# ---- backends --------------------------------------------------------------------------------------------------------


_OP = torch.ops.fastres.bn_act.default
# On a GPU the order is not measured yet: C++ first, for its fast path and because nothing is compiled at run time.
OPERATOR = register(Operator("bn_act", order={"cpu": ("cpu",), "cuda": ("cuda", "triton")}))
OPERATOR.add(Backend(REFERENCE, why_not_reference, _bn_backends.reference_forward, _bn_backends.reference_backward))
for _name, _why_not in (("cpu", why_not_cpu), ("cuda", why_not_cuda)):
    kernels = _bn_backends.native_forward, _bn_backends.native_backward
    OPERATOR.add(Backend(_name, _why_not, *kernels, native=True, signs_from_x=_name == "cpu"))
OPERATOR.add(Backend("triton", why_not_triton, _bn_backends.triton_forward, _bn_backends.triton_backward))


# ---- public functions ------------------------------------------------------------------------------------------------


def bn_act(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    act: str = "relu",
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    num_batches_tracked: Tensor | None = None,
    backend: str = AUTO,
    recompute: bool = False,
) -> Tensor:
    """y = act(batch_norm(x) [+ residual]), in one pass over each tensor after the statistics.

    Gradients flow to x, weight, bias and residual (formulas above), to any order. In training, the running statistics
    and the counter are updated in place after the operator; nothing has changed when the call raises.

    Args:
        x: [N, C, H, W], float32, float16, bfloat16 or float64; any strides, channels_last is the fast path.
        running_mean, running_var: [C], updated in training; None in training to track nothing.
        weight, bias: [C], any floating dtype; None stands for 1 and 0.
        residual: [N, C, H, W], x's dtype and device, added before the activation; may be x itself.
        act: "relu" or "none".
        training: normalize by the batch's statistics (biased variance) instead of the running ones.
        momentum: weight of the new statistics in the running ones; None for the cumulative average, which needs
            num_batches_tracked.
        eps: added to the variance.
        num_batches_tracked: int64 scalar, incremented in training.
        backend: "auto", "reference", "cpu", "cuda" or "triton".
        recompute: do not keep y for backward: compute it there again, from x. Ignored where the call is traced,
            compiled or transformed.

    Returns:
        y: [N, C, H, W], x's dtype, with the strides that eager's batch_norm, add and relu give.

    Raises:
        ValueError: wrong rank, shape or device, one value per channel in training, missing running statistics in eval
            mode, eps not above 0, unknown act or backend.
        TypeError: not a tensor, dtypes not floating or different between x and residual.
        BackendError: the named backend refuses; the message says why.

    Source: Ioffe and Szegedy 2015; He et al. 2016, section 3.4 (BN after each convolution, before the activation).

    Example:
        >>> import torch
        >>> from fastres.functional import bn_act
        >>> x = torch.randn(2, 3, 4, 4)
        >>> y = bn_act(x, torch.zeros(3), torch.ones(3), residual=x, training=True)
        >>> y.shape, bool((y >= 0).all())
        (torch.Size([2, 3, 4, 4]), True)
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"bn_act: x: got {type(x).__name__}, expected a Tensor")
    check_eps(eps, training)
    running = running_mean, running_var
    return normalize(
        x, *running, weight, bias, residual, act, training, momentum, eps, num_batches_tracked, backend, recompute
    )


_ZERO_IN_EVAL = torch.__version__ >= "2.15"  # from there on PyTorch's batch_norm takes eps = 0 in eval mode


def check_eps(eps: float, training: bool) -> None:
    """Refuse the eps that PyTorch's batch_norm refuses, in its words."""
    if eps < 0.0 or (eps == 0.0 and (training or not _ZERO_IN_EVAL)):
        raise ValueError(f"bn_act: batch_norm eps must be positive, but got {eps}")


def normalize(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    act: str,
    training: bool,
    momentum: float | None,
    eps: float,
    num_batches_tracked: Tensor | None,
    backend: str,
    recompute: bool = False,
) -> Tensor:
    """`bn_act` with any eps: a frozen norm's may be 0."""
    if momentum is None and training and running_mean is not None and num_batches_tracked is None:
        raise ValueError("bn_act: num_batches_tracked: got None, expected a scalar tensor when momentum is None")
    tensors = weight, bias, running_mean, running_var, residual
    if act in ACTS and (momentum is not None or recompute) and is_plain_eager(x, *tensors):
        chosen = choose(OPERATOR, backend, x)
        if chosen.native or recompute:
            call = Call(running_mean, running_var, num_batches_tracked, training, momentum, eps, act, chosen, recompute)
            fast = fast_path(x, weight, bias, residual, call)
            if fast is not None:
                return fast
    if is_transformed():
        check(x, weight, bias, running_mean, running_var, residual, training, act)
        check_stock(OPERATOR, backend)
        if training and num_batches_tracked is not None:  # as _BatchNorm.forward
            num_batches_tracked.add_(1)
            momentum = 1.0 / float(num_batches_tracked) if momentum is None else momentum
        factor = momentum or 0.0
        return by_stock(x, weight, bias, running_mean, running_var, residual, training, eps, act, factor)
    y, mean, var = _OP(x, weight, bias, running_mean, running_var, residual, training, eps, act, backend)
    if training and x.numel():
        update_running(running_mean, running_var, num_batches_tracked, mean, var, momentum, x)
    out: Tensor = y
    return out


def bn_act_over(
    x: Tensor,  # [N, C, H, W], written over
    running_mean: Tensor | None,  # [C]
    running_var: Tensor | None,  # [C]
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    residual: Tensor | None,  # [N, C, H, W]
    *,
    act: str,
    eps: float,
    backend: str = AUTO,
) -> Tensor | None:
    """`bn_act` in eval mode without gradients, its result in x's memory: for an x that nobody else reads.

    Returns:
        x; or None, and x is as it was, where no kernel can.
    """
    if not choose(OPERATOR, backend, x).native:
        return None
    y: Tensor | None
    y, _, _ = NATIVE(x, weight, bias, residual, running_mean, running_var, None, False, 0.0, eps, act == "relu", True)
    return y


def bn_act_module(
    x: Tensor, bn: nn.BatchNorm2d, residual: Tensor | None = None, act: str = "relu", backend: str = AUTO
) -> Tensor:
    """`bn_act` with a BatchNorm2d's tensors and settings, by exactly the rules of its own forward.

    Args:
        x, residual, act, backend: as for `bn_act`.
        bn: its `training` flag, `momentum`, `eps`, `affine` and `track_running_stats` are followed; its buffers are
            updated in training.

    Returns:
        y: [N, C, H, W].

    Raises:
        TypeError: `bn` is not a BatchNorm2d; and as `bn_act`.

    Example:
        >>> import torch
        >>> from fastres.functional import bn_act_module
        >>> bn = torch.nn.BatchNorm2d(3)
        >>> bn_act_module(torch.randn(2, 3, 4, 4), bn).shape, int(bn.num_batches_tracked)
        (torch.Size([2, 3, 4, 4]), 1)
    """
    if not isinstance(bn, nn.BatchNorm2d):
        raise TypeError(f"bn_act_module: bn: got {type(bn).__name__}, expected a torch.nn.BatchNorm2d")
    arguments = batch_norm_arguments(bn)
    return bn_act(x, residual=residual, act=act, backend=backend, **arguments)


def batch_norm_arguments(bn: nn.BatchNorm2d) -> dict[str, Any]:
    """`bn_act`'s arguments that mean what `bn.forward` would do now (torch.nn.modules.batchnorm._BatchNorm.forward)."""
    check_eps(bn.eps, bn.training)
    parameters, buffers = bn._parameters, bn._buffers  # a Module's own attribute look-up costs ten times as much
    if "weight" in parameters:
        weight, bias = parameters["weight"], parameters["bias"]
        mean, var, count = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
    else:  # a replica of nn.DataParallel holds plain attributes
        weight, bias = bn.weight, bn.bias
        mean, var, count = bn.running_mean, bn.running_var, bn.num_batches_tracked
    training, tracks, momentum = bn.training, bn.track_running_stats, bn.momentum
    use_buffers = not training or tracks
    return {
        "running_mean": mean if use_buffers else None,
        "running_var": var if use_buffers else None,
        "weight": weight,
        "bias": bias,
        "training": training or (mean is None and var is None),
        # as in _BatchNorm.forward: without a counter there is no cumulative average
        "momentum": 0.0 if momentum is None and count is None else momentum,
        "eps": bn.eps,
        "num_batches_tracked": count if training and tracks else None,
    }


def _call(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, var: Tensor | None, *how: Any
) -> Outputs:
    """The operator's call in a frozen network: by the fast path where it has no statistics to return."""
    residual, training, eps, act, *backend = how
    if training or mean is None or var is None:
        return _forward(x, weight, bias, mean, var, *how)
    y = normalize(x, mean, var, weight, bias, residual, act, False, 0.0, eps, None, (*backend, AUTO)[0])
    return y, mean, var


def _stock(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, var: Tensor | None, *how: Any
) -> Outputs:
    """The call by PyTorch's operators; one with the batch's statistics as it is."""
    residual, training, eps, act = how[:4]  # a backend may follow
    if training or mean is None or var is None:
        found: Outputs = _OP(x, weight, bias, mean, var, *how)
        return found
    return by_stock(x, weight, bias, mean, var, residual, False, eps, act), mean, var


OPERATOR.call, OPERATOR.stock = _call, _stock
OPERATOR.images = lambda *args: () if args[6] else (0, 5)  # the batch's statistics mix them
