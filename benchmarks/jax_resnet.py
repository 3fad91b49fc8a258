"""torchvision's ResNets in jax.numpy: NHWC, batch normalization folded in float64, one jitted function."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def build(net: Any, images: Tensor) -> Callable[[], Any]:
    """A call that returns the logits in float32 [N, classes], computed in the images' dtype on JAX's own device."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the GPU's memory is shared with torch
    import jax
    import jax.numpy as jnp

    dtype = {torch.float32: jnp.float32, torch.bfloat16: jnp.bfloat16, torch.float16: jnp.float16}[images.dtype]

    def array(t: Tensor) -> Any:
        return jnp.asarray(t.detach().cpu().float().numpy(), dtype)

    def folded(conv: Any, bn: Any) -> tuple[Any, Any]:
        scale = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()  # [O]
        weight = conv.weight.double() * scale[:, None, None, None]  # [O, I, K, K]
        bias = bn.bias.double() - bn.running_mean.double() * scale  # [O]
        return array(weight.permute(2, 3, 1, 0)), array(bias)  # [K, K, I, O]

    def conv(x: Any, weights: tuple[Any, Any], stride: int) -> Any:
        weight, bias = weights
        pad = weight.shape[0] // 2
        layout = ("NHWC", "HWIO", "NHWC")
        window = ((pad, pad), (pad, pad))
        return jax.lax.conv_general_dilated(x, weight, (stride, stride), window, dimension_numbers=layout) + bias

    blocks, strides = [], []
    for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
        for block in stage:
            numbers = [i for i in (1, 2, 3) if hasattr(block, f"conv{i}")]
            convs = [(getattr(block, f"conv{i}"), getattr(block, f"bn{i}")) for i in numbers]
            projection = folded(*block.downsample) if block.downsample is not None else None
            blocks.append(([folded(*pair) for pair in convs], projection))
            strides.append([c.stride[0] for c, _ in convs])
    fc = net.fc
    weights = (folded(net.conv1, net.bn1), blocks, (array(fc.weight.t()), array(fc.bias)))

    @jax.jit
    def forward(weights: Any, x: Any) -> Any:
        stem, blocks, (fc, bias) = weights
        x = jax.nn.relu(conv(x, stem, 2))  # [N, 112, 112, 64]
        window, pad = (1, 3, 3, 1), ((0, 0), (1, 1), (1, 1), (0, 0))
        x = jax.lax.reduce_window(x, jnp.array(-jnp.inf, dtype), jax.lax.max, window, (1, 2, 2, 1), pad)
        for (convs, projection), steps in zip(blocks, strides, strict=True):
            residual = x if projection is None else conv(x, projection, max(steps))
            for i, (pair, stride) in enumerate(zip(convs, steps, strict=True)):
                x = conv(x, pair, stride)
                x = jax.nn.relu(x if i < len(convs) - 1 else x + residual)  # [N, P, P, O]
        return (x.mean((1, 2)) @ fc + bias).astype(jnp.float32)  # [N, classes]

    x = array(images.permute(0, 2, 3, 1))  # [N, 224, 224, 3]
    return lambda: forward(weights, x).block_until_ready()
