"""The math of one element, shared by every kernel; csrc/element.h has the same functions in C++."""

import triton
import triton.language as tl


@triton.jit
def relu(z):
    """max(z, 0) as torch.relu: NaN and -0.0 pass. A select, because in compiled code a plain max drops NaN and max.NaN
    turns -0.0 into +0.0; the second instruction is free in a kernel that waits for memory."""
    return tl.where(z < 0, 0.0, z)


@triton.jit
def relu_gradient(dy, y):
    """g = dy where y > 0 or y is NaN, else 0 (threshold_backward)."""
    return tl.where(y <= 0, 0.0, dy)


@triton.jit
def reciprocal_std(var, eps):
    """rstd = 1 / sqrt(var + eps), each operation correctly rounded: rsqrt.approx is off by 2 ulp and flushes
    subnormals, and this runs only once per channel and tile."""
    return tl.div_rn(1.0, tl.sqrt_rn(var + eps))


@triton.jit
def relu6(z):
    """min(max(z, 0), 6) by selects: NaN passes."""
    return tl.where(z > 6, 6.0, relu(z))


@triton.jit
def hardswish(z):
    """z * relu6(z + 3) / 6: NaN at -inf, as in torch."""
    return z * relu6(z + 3) * (1.0 / 6)


@triton.jit
def silu(z):
    """z * sigmoid(z): NaN at -inf, as in torch."""
    return z / (1 + tl.exp(-z))


@triton.jit
def activate(z, ACT: tl.constexpr):
    """act(z) in fp32, by the name of the activation."""
    if ACT == "relu":
        z = relu(z)
    elif ACT == "relu6":
        z = relu6(z)
    elif ACT == "hardswish":
        z = hardswish(z)
    elif ACT == "silu":
        z = silu(z)
    else:
        tl.static_assert(ACT == "none")
    return z
