"""The launches of the Triton kernels, recorded: the launchers run on meta tensors of real shapes.

`recorded(arch)` records as for that architecture; `launch_everything` and CONVS are the calls of all kernels.
"""

import os
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: nothing is compiled in this process", allow_module_level=True)

from fastres.kernels import add_relu, bn_act, configs, conv_act  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
DTYPES = tuple(TYPES)


@dataclass(frozen=True)
class Launch:
    """A recorded launch: what Triton's JIT would compile, for aligned tensors."""

    kernel: JITFunction
    arch: int
    shape_class: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    num_warps: int
    num_stages: int

    @property
    def entry(self):
        return self.kernel.__name__, self.arch, self.shape_class

    @property
    def constant(self):
        return dict(self.constants)

    def activations(self, names=None):
        """The [R, L] tensors among the arguments, or those of them that are in `names`."""
        per_channel = ("weight_ptr", "bias_ptr", "mean_ptr", "var_ptr", "scratch_ptr", "coefficients_ptr")
        return [n for n, t in self.signature if t[0] == "*" and n not in per_channel and (names is None or n in names)]

    @property
    def element_type(self):
        return next(t for n, t in self.signature if n in (self.activations() or [n]) and t[0] == "*")

    def __str__(self):
        absent = [n.removesuffix("_ptr") for n, v in self.constants if v is None]
        blocks = [str(v) for v in self.constant.values() if type(v) in (int, str)]
        without = "-without-" + "-".join(absent) if absent else ""
        name, kind = self.kernel.__name__.removesuffix("_kernel"), self.element_type.removeprefix("*")
        return f"{name}-sm{self.arch}-{self.shape_class}-{kind}-{'x'.join(blocks)}{without}"


@contextmanager
def recorded(arch):
    """Launches on meta tensors inside are appended to the list, as for that architecture."""
    launches, looked_up, real_config = [], {}, configs.config

    def config(kernel, at, shape_class):
        looked_up[kernel] = shape_class
        return real_config(kernel, at, shape_class)

    def run(self, *args, grid, warmup, num_warps, num_stages=3, **constants):
        assert not warmup and len(grid) == 1 and 0 < grid[0] < 2**31
        bound = dict(zip(self.arg_names, args, strict=False)) | constants
        assert list(bound) == self.arg_names
        signature, fixed = [], []
        for parameter in self.params:
            name, value = parameter.name, bound[parameter.name]
            if parameter.is_constexpr or value is None:
                signature.append((name, "constexpr"))
                fixed.append((name, value))
            elif isinstance(value, torch.Tensor):
                signature.append((name, TYPES[value.dtype]))
            elif isinstance(value, float):
                signature.append((name, "fp32"))
            else:
                assert parameter.do_not_specialize, f"{self.__name__} is compiled again for some values of {name}"
                signature.append((name, "i32" if value < 2**31 else "i64"))
        name = self.__name__
        launches.append(Launch(self, arch, looked_up[name], tuple(signature), tuple(fixed), num_warps, num_stages))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", run)
        patch.setattr(configs, "config", config)
        for module in (add_relu, bn_act, conv_act):
            patch.setattr(module, "architecture", lambda x: arch)
        yield launches


# (shape, channels_last): stages of ResNets at batch 256, small and odd ones, more than 2^31 elements
SHAPES = [
    ((256, 256, 56, 56), True),
    ((256, 256, 56, 56), False),
    ((256, 512, 7, 7), False),
    ((256, 1024, 14, 14), False),
    ((64, 3, 224, 224), True),
    ((1, 64, 14, 14), True),
    ((2, 64, 16, 16), False),
    ((1, 64, 7, 7), True),
    ((4096, 256, 56, 56), True),
]


def launch_everything(shape, channels_last, dtype):
    x = torch.empty(shape, dtype=dtype, device="meta")
    v = torch.empty(shape[1], dtype=torch.float32, device="meta")
    if channels_last:  # flat: the layout changes nothing
        add_relu.add_relu_forward(x, x, x)
        add_relu.add_relu_backward(x, x, x)
    layout = {"channels_last": channels_last, "eps": 1e-5}
    for relu in (True, False):
        act, y, w, r = ("relu", x, v, x) if relu else ("none", None, None, None)
        for training in (True, False):
            how = layout | {"training": training, "act": act}
            bn_act.bn_act_forward(x, w, w, r, x, v, v, **how)
            bn_act.bn_act_backward(x, x, y, w, v, v, x, v, v, r, **how)
        how = layout | {"training": True, "act": act}
        bn_act.bn_act_backward(x, x, y, w, v, v, None, v, v, None, **how)  # a frozen input
        bn_act.bn_act_backward(x, x, y, w, v, v, None, None, v, x, **how)  # sum g alone
    bn_act.bn_act_backward(x, x, x, v, v, v, x, None, None, None, **layout, training=True, act="relu")
    bn_act.bn_act_backward(x, x, x, v, v, v, x, None, None, x, **layout, training=False, act="relu")  # frozen weights
    bn_act.bn_act_backward(x, x, x, v, v, v, None, None, None, x, **layout, training=True, act="relu")


NHWC, NCHW = torch.channels_last, torch.contiguous_format


@dataclass(frozen=True)
class Conv:
    """A convolution of square images, kernels and strides, and its epilogue."""

    n: int
    c: int
    size: int
    k: int
    kernel: int = 1
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    x_format: torch.memory_format = NHWC
    weight_format: torch.memory_format = NHWC
    y_format: torch.memory_format = NHWC
    act: str = "relu"
    bias: bool = True
    residual: bool = False

    def launch(self, dtype, tf32):
        def meta(format, *shape):
            return torch.empty(shape, dtype=dtype, device="meta", memory_format=format)

        x = meta(self.x_format, self.n, self.c, self.size, self.size)
        weight = meta(self.weight_format, self.k, self.c // self.groups, self.kernel, self.kernel)
        bias = torch.empty(self.k, device="meta") if self.bias else None
        stride, dilation, padding = ((v, v) for v in (self.stride, self.dilation, self.dilation * (self.kernel // 2)))
        assert not conv_act.why_not(x, weight, stride, padding, dilation, self.groups)
        y = meta(self.y_format, self.n, self.k, *2 * [(self.size - 1) // self.stride + 1])
        how = {"stride": stride, "padding": padding, "dilation": dilation, "groups": self.groups}
        conv_act.conv_act_forward(
            x, weight, bias, y if self.residual else None, y, **how, act=self.act, tf32=tf32 and dtype == torch.float32
        )


# ResNets at batch 256 and 1 and what else a convolution can be; first in its shape class: what the default run compiles
CONVS = [
    Conv(256, 64, 56, 256, residual=True),  # wide
    Conv(256, 64, 56, 64, kernel=3, residual=True),  # narrow
    Conv(1, 512, 7, 512, kernel=3, residual=True),  # few
    Conv(256, 3, 224, 64, kernel=7, stride=2),  # odd: the stem
    Conv(256, 256, 14, 256, kernel=3),  # deep
    Conv(256, 128, 28, 128, kernel=3),
    Conv(256, 256, 56, 512, stride=2, act="none", bias=False),
    Conv(256, 256, 56, 64),
    Conv(1, 256, 56, 64),
    Conv(256, 64, 56, 64, kernel=3),
    Conv(256, 16, 32, 16, kernel=3),
    Conv(64, 1024, 14, 1024, kernel=3, dilation=2, groups=32),
    Conv(8, 17, 56, 33, kernel=3, stride=2, residual=True, act="relu6"),
    Conv(64, 12, 56, 96, act="hardswish"),
    Conv(64, 20, 56, 100, kernel=3, residual=True),
    Conv(64, 24, 56, 1000, residual=True),
    Conv(256, 256, 56, 64, x_format=NCHW, y_format=NCHW, act="silu"),
    Conv(256, 64, 56, 128, kernel=3, x_format=NCHW, weight_format=NCHW, y_format=NCHW, residual=True),
    Conv(256, 3, 224, 64, kernel=7, stride=2, x_format=NCHW, weight_format=NCHW),
    Conv(256, 128, 28, 128, kernel=3, y_format=NCHW, residual=True),
    Conv(16384, 128, 56, 128, kernel=3, residual=True, act="hardswish"),  # more than 2^31 elements
]
