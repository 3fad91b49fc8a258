"""Residual addition and ReLU, on flat arrays.

Formula, per element:

    z = x + residual            in fp32, rounded once to the tensors' dtype
    y = z < 0 ? 0 : z           NaN and -0.0 pass, as in torch.relu

Gradient, with the mask taken from y so that neither x nor residual has to be saved:

    g = y <= 0 ? 0 : dy         NaN y passes dy, as threshold_backward
    dx = dresidual = g          one tensor serves both inputs

Bytes: forward 2 reads and 1 write, backward 2 reads and 1 write, the minimum for an addition in a kernel of its own. It
stops being good where the producer of x can add in its epilogue (conv_act, bn_act with a residual), which saves a write
and a read of x. Below about 100,000 elements the launch costs more than the work.
"""

import torch
import triton
import triton.language as tl

from . import configs
from .element import relu, relu_gradient
from .launch import architecture, device_guard


@triton.jit
def _add_relu_block(x_ptr, residual_ptr, y_ptr, lanes, mask):
    x = tl.load(x_ptr + lanes, mask).to(tl.float32)  # [BLOCK]
    residual = tl.load(residual_ptr + lanes, mask).to(tl.float32)  # [BLOCK]
    tl.store(y_ptr + lanes, relu(x + residual).to(y_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["numel"])
def add_relu_forward_kernel(
    x_ptr,  # [numel]
    residual_ptr,  # [numel]
    y_ptr,  # [numel]
    numel,
    BLOCK: tl.constexpr,
):
    # int64 before the product: block * BLOCK exceeds 2^31 on large tensors. Within the block int32 is enough.
    start = tl.program_id(0).to(tl.int64) * BLOCK
    x_ptr += start
    residual_ptr += start
    y_ptr += start
    lanes = tl.arange(0, BLOCK)
    # A mask that does not end at a multiple of the vector would split every access of every block into single elements,
    # so only the last block has one.
    if start + BLOCK <= numel:
        _add_relu_block(x_ptr, residual_ptr, y_ptr, lanes, None)
    else:
        _add_relu_block(x_ptr, residual_ptr, y_ptr, lanes, lanes < numel - start)


@triton.jit
def _add_relu_backward_block(dy_ptr, y_ptr, dx_ptr, lanes, mask):
    dy = tl.load(dy_ptr + lanes, mask)  # [BLOCK], moved without conversion
    y = tl.load(y_ptr + lanes, mask).to(tl.float32)  # [BLOCK]
    g = relu_gradient(dy.to(tl.float32), y)
    tl.store(dx_ptr + lanes, g.to(dx_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["numel"])
def add_relu_backward_kernel(
    dy_ptr,  # [numel]
    y_ptr,  # [numel]
    dx_ptr,  # [numel]
    numel,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    dy_ptr += start
    y_ptr += start
    dx_ptr += start
    lanes = tl.arange(0, BLOCK)
    if start + BLOCK <= numel:
        _add_relu_backward_block(dy_ptr, y_ptr, dx_ptr, lanes, None)
    else:
        _add_relu_backward_block(dy_ptr, y_ptr, dx_ptr, lanes, lanes < numel - start)


def add_relu_forward(
    x: torch.Tensor,  # any shape, dense
    residual: torch.Tensor,  # like x, in the same memory order; may be x itself
    y: torch.Tensor,  # like x, written
) -> None:
    """y = relu(x + residual): one launch."""
    numel = x.numel()
    config = configs.config("add_relu_forward_kernel", architecture(x), configs.size_class(numel))
    with device_guard(x):
        add_relu_forward_kernel[(triton.cdiv(numel, config.tile),)](
            x, residual, y, numel, BLOCK=config.tile, num_warps=config.num_warps
        )


def add_relu_backward(
    dy: torch.Tensor,  # any shape, dense
    y: torch.Tensor,  # like dy, in the same memory order: the forward's output
    dx: torch.Tensor,  # like dy, written: the gradient of both inputs
) -> None:
    """dx = dy where y > 0 or y is NaN, else 0: one launch."""
    numel = dy.numel()
    config = configs.config("add_relu_backward_kernel", architecture(dy), configs.size_class(numel))
    with device_guard(dy):
        add_relu_backward_kernel[(triton.cdiv(numel, config.tile),)](
            dy, y, dx, numel, BLOCK=config.tile, num_warps=config.num_warps
        )
