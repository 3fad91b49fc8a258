"""conv_act's kernel in Triton's interpreter. Run by test_triton_interpreter.py, in a process of its own.

Values are small integers wherever an index could be wrong: every product and every sum is exact, in any order.
"""

import itertools
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import triton.language as tl
from fastres.kernels import configs, conv_act
from fastres.kernels.conv_act import conv_act_forward, why_not
from fastres.kernels.conv_act_forward import conv_act_forward_kernel
from triton.runtime.interpreter import GridExecutor, TensorHandle, interpreter_builder

from guarded import Arena, assert_close64, small_gemm_tiles

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # NumPy, of NaN
INF, NAN = float("inf"), float("nan")
DTYPES = (torch.float32, torch.float16)
CHANNELS = (1, 3, 8, 17, 33, 64, 65)
KRSC, RSCK = True, (2, 3, 1, 0)  # of weights: channels_last, and one that is neither of PyTorch's two
ACTS = {"relu": torch.relu, "none": lambda z: z, "relu6": F.relu6, "hardswish": F.hardswish, "silu": F.silu}


def integers(*shape, dtype=torch.float32):
    return torch.randint(-2, 3, shape).to(dtype)


def out_size(x, weight, stride, padding, dilation):
    return [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    ]


def run(
    x, weight, bias, residual, scale=None, *, x_last=True, weight_order=KRSC, y_last=True, act="relu", offset=0, **how
):
    """conv_act_forward between guard bands -> y."""
    how = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1, "tf32": False} | how
    geometry = {name: how[name] for name in ("stride", "padding", "dilation")}
    arena = Arena()
    placed = arena.input(x, x_last, offset)
    weight_placed = arena.input(weight, weight_order, offset)
    assert why_not(placed, weight_placed, *geometry.values(), how["groups"]) == []
    args = [placed, weight_placed, arena.input(bias, offset=offset)]
    args.append(placed if residual is x else arena.input(residual, y_last, offset))
    y = arena.output((x.shape[0], weight.shape[0], *out_size(x, weight, **geometry)), x.dtype, y_last, offset)
    conv_act_forward(*args, y, act=act, scale=arena.input(scale, offset=offset), **how)
    arena.check()
    return y


def convolution64(x, weight, bias, residual, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1):
    """-> conv2d(x, weight) + bias + residual in fp64, before the activation."""
    bias = None if bias is None else bias.double()
    z = F.conv2d(x.double(), weight.double(), bias, stride, padding, dilation, groups)
    return z if residual is None else z + residual.double()


def check(
    n, c, size, k, kernel, *, dtype=torch.float32, bias=True, residual=True, scale=False, act="relu", groups=1, **how
):
    """Small integers give the exact result."""
    x, weight = integers(n, c, *size, dtype=dtype), integers(k, c // groups, *kernel, dtype=dtype)
    geometry = {name: how.get(name, (d, d)) for name, d in (("stride", 1), ("padding", 0), ("dilation", 1))}
    shape = (n, k, *out_size(x, weight, **geometry))
    bias, residual = integers(k) if bias else None, integers(*shape, dtype=dtype) if residual else None
    scale = integers(k) if scale else None
    exact = weight if scale is None else weight.double() * scale[:, None, None, None].double()
    z = convolution64(x, exact, bias, residual, **geometry, groups=groups)
    assert z.abs().amax() <= 2048  # what fp16 holds
    y = run(x, weight, bias, residual, scale, act=act, groups=groups, **how)
    assert torch.equal(y.double(), ACTS[act](z)), (n, c, size, k, kernel, groups, act, how)


def geometries(count):
    """`count` convolutions in which every value of every parameter takes its turn, its neighbors shuffled."""
    draw = random.Random(0)

    def turns(*values):
        return draw.sample([v for v, _ in zip(itertools.cycle(values), range(count), strict=False)], count)

    axes = {"stride": (1, 2, 3), "padding": (0, 1, 2, 3), "dilation": (1, 2)}
    choices = {f"{name}_{axis}": each for name, each in axes.items() for axis in "hw"}
    choices |= dict.fromkeys("ck", CHANNELS) | dict.fromkeys("rs", range(1, 8))
    choices |= {"n": (1, 2, 3), "p": (1, 2, 3, 4), "q": (1, 2, 3, 5), "offset": (0, 0, 1), "dtype": DTYPES}
    choices |= {"weight_order": (KRSC, False, RSCK), "act": ("relu", "none", "relu6")}
    choices |= dict.fromkeys(("x_last", "y_last", "bias", "residual", "scale", "tf32"), (True, False))
    parameters = {name: turns(*each) for name, each in choices.items()}
    for values in zip(*parameters.values(), strict=True):
        yield dict(zip(parameters, values, strict=True))


def some(cases, default):
    """Parameters: the first `default` of the cases always, the others with `full`."""
    return [pytest.param(case, marks=[pytest.mark.full] * (i >= default)) for i, case in enumerate(cases)]


@pytest.mark.parametrize("case", some(geometries(42), 14), ids=lambda g: f"{g['c']}to{g['k']}-{g['r']}x{g['s']}")
def test_row9_any_geometry_layout_and_number_of_channels(monkeypatch, case):
    small_gemm_tiles(monkeypatch, block_m=16, block_n=32, block_k=32)

    def pop(name):
        return case.pop(f"{name}_h"), case.pop(f"{name}_w")

    geometry = {name: pop(name) for name in ("stride", "padding", "dilation")}
    kernel = (case.pop("r"), case.pop("s"))
    size = [
        max((out - 1) * stride + dilation * (taps - 1) + 1 - 2 * padding, 1)
        for out, taps, stride, padding, dilation in zip(
            (case.pop("p"), case.pop("q")), kernel, *geometry.values(), strict=True
        )
    ]
    check(case.pop("n"), case.pop("c"), size, case.pop("k"), kernel, **geometry, **case)


@pytest.mark.parametrize("size, kernel, padding", [((1, 1), 1, 0), ((1, 1), 3, 1), ((1, 1), 7, 3), ((1, 9), 3, 2)])
def test_images_smaller_than_their_kernel(monkeypatch, size, kernel, padding):
    small_gemm_tiles(monkeypatch)
    for c, dtype in ((3, torch.float32), (17, torch.float16)):
        check(2, c, size, 10, (kernel, kernel), padding=(padding, padding), dtype=dtype, x_last=c == 3)


# kernel, stride, padding of the convolutions of residual networks
RESNET = [(1, 1, 0), (1, 2, 0), (3, 1, 1), (3, 2, 1)]


LAYOUTS = [(True, True), (True, False), (False, True), (False, False)]  # of x and of y
EVERY = [(conv, layout) for i, conv in enumerate(RESNET) for layout in LAYOUTS[i % 2 :: 2] + LAYOUTS[1 - i % 2 :: 2]]


@pytest.mark.parametrize(
    "conv, layouts", [pytest.param(*case, marks=[pytest.mark.full] * (i % 4 > 1)) for i, case in enumerate(EVERY)]
)
def test_three_programs_and_a_tail_on_every_axis(monkeypatch, conv, layouts):
    (kernel, stride, padding), (x_last, y_last) = conv, layouts
    # 3 tiles of 16 pixels, in bands of 2, and 3 of 16 channels; the depth in 3 of 16: all with tails
    small_gemm_tiles(monkeypatch)
    how = {"stride": (stride, stride), "padding": (padding, padding), "x_last": x_last, "y_last": y_last}
    size = [(out - 1) * stride + kernel - 2 * padding for out in (3, 4)]
    check(3, 40, size, 40, (kernel, kernel), dtype=DTYPES[x_last == y_last], **how)


@pytest.mark.parametrize("weight_order", (KRSC, False, RSCK))
@pytest.mark.parametrize("groups, c, k", [(2, 40, 40), (3, 48, 72), (4, 64, 64)])
def test_groups(monkeypatch, groups, c, k, weight_order):
    small_gemm_tiles(monkeypatch)
    x_last = (groups % 2 == 0) == (weight_order is not False)
    how = {"padding": (1, 1), "x_last": x_last, "y_last": not x_last, "dtype": DTYPES[x_last]}
    check(2, c, (3, 4), k, (3, 3), groups=groups, weight_order=weight_order, **how)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ACTS)
def test_activations_are_rounded_once(monkeypatch, act, dtype):
    small_gemm_tiles(monkeypatch)
    x, weight, residual = (torch.randn(*shape).to(dtype) for shape in ((2, 20, 5, 4), (24, 20, 1, 1), (2, 24, 5, 4)))
    bias = 3 * torch.randn(24)
    z = convolution64(x, weight, bias, residual)
    terms = convolution64(x.abs(), weight.abs(), bias.abs(), residual.abs())
    # hardswish and silu are steeper than 1 nowhere but by a tenth; their last operations have errors of their own
    assert_close64(run(x, weight, bias, residual, act=act), ACTS[act](z), 1.2 * terms + 1, act)


SHIPPED = {  # shape class -> a convolution of it once FEW and MANY are small, as tests can afford
    "few": ((2, 64, (5, 4), 72, (3, 3)), {}),
    "odd": ((1, 3, (9, 9), 64, (7, 7)), {"stride": (2, 2), "padding": (3, 3)}),
    "narrow": ((2, 32, (9, 9), 64, (3, 3)), {"padding": (1, 1)}),
    "wide": ((1, 32, (12, 12), 136, (3, 3)), {"padding": (1, 1)}),
    "deep": ((1, 72, (12, 12), 256, (1, 1)), {"residual": False}),
}


@pytest.mark.parametrize("shape_class", SHIPPED)
@pytest.mark.parametrize("precision", ("", "_tf32", "_ieee"))
def test_shipped_tiles(monkeypatch, shape_class, precision):
    looked_up, config = [], configs.config
    monkeypatch.setattr(configs, "config", lambda *key: looked_up.append(key[2]) or config(*key))
    if shape_class != "few":
        monkeypatch.setattr(configs, "FEW", 1)
        monkeypatch.setattr(configs, "MANY", 1 if shape_class == "deep" else 1 << 30)
    shape, how = SHIPPED[shape_class]
    check(*shape, dtype=torch.float32 if precision else torch.float16, tf32=precision == "_tf32", **how)
    assert looked_up == [shape_class + precision]


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_row10_nan_and_inf_through_the_epilogue_at_every_lane(monkeypatch, dtype, act):
    small_gemm_tiles(monkeypatch, block_m=32)
    special = torch.tensor([NAN, INF, -INF, 0.0, 2.0, -3.0, 60000.0, -60000.0, 6.0]).to(dtype)
    x, weight = torch.zeros(2, 17, 4, 5, dtype=dtype), torch.ones(20, 17, 1, 1, dtype=dtype)
    for y_last in (True, False):
        for shift in (0, 4):  # one puts every value on every one of 16 lanes
            residual = special.roll(shift).repeat(89)[:800].view(2, 20, 4, 5)
            want = ACTS[act](residual.float()).to(dtype)
            y = run(x, weight, None, residual, act=act, y_last=y_last)
            torch.testing.assert_close(y, want, equal_nan=True)
            bias = special.float().roll(shift).repeat(3)[:20]
            want = ACTS[act](bias).to(dtype).view(1, 20, 1, 1).expand(2, 20, 4, 5)
            torch.testing.assert_close(run(x, weight, bias, None, act=act, y_last=y_last), want, equal_nan=True)


@pytest.mark.parametrize("c, x_last", [(3, True), (3, False), (33, True), (33, False)])
def test_row10_nan_in_a_pixel_reaches_its_windows_and_no_others(monkeypatch, c, x_last):
    small_gemm_tiles(monkeypatch, block_k=32)
    for special in (NAN, INF):
        x, weight = integers(2, c, 6, 5), integers(20, c, 3, 3).abs() + 1
        x[0, c // 2, 2, 4] = x[1, c - 1, 0, 0] = special
        how = {"stride": (1, 2), "padding": (1, 1)}
        want = torch.relu(convolution64(x, weight, None, None, **how))
        assert 0 < want.isfinite().sum() < want.numel()
        y = run(x, weight, None, None, x_last=x_last, **how)
        torch.testing.assert_close(y.double(), want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("x_last", (True, False))
def test_row24_residual_is_x(monkeypatch, x_last):
    small_gemm_tiles(monkeypatch)
    x, weight, bias = integers(2, 33, 4, 3), integers(33, 33, 1, 1), integers(33)
    want = torch.relu(convolution64(x, weight, bias, x))
    assert torch.equal(run(x, weight, bias, x, x_last=x_last, y_last=x_last).double(), want)


def test_row3_empty_outputs_launch_nothing(monkeypatch):
    monkeypatch.setattr(conv_act, "conv_act_forward_kernel", None)
    assert run(integers(0, 16, 4, 4), integers(16, 16, 3, 3), None, None).shape == (0, 16, 2, 2)


# Row 1: tensors above 2^31 elements, of which one program reads and writes a few. The rest stays untouched pages.

NCHW, NHWC = torch.contiguous_format, torch.channels_last
BIG = [  # x, its format, K, kernel, stride, y's format
    ((2, 16, 8200, 8192), NHWC, 17, 1, 64, NHWC),
    ((2, 16, 8200, 8192), NHWC, 17, 3, 64, NHWC),
    ((2, 16, 8200, 8192), NCHW, 17, 1, 64, NCHW),
    ((1, 33, 8200, 8192), NCHW, 17, 3, 64, NHWC),  # more than 2^31 elements in an image
    ((1, 33, 8200, 8192), NHWC, 17, 3, 64, NHWC),
    ((1, 1, 2**16, 2**15 - 1), NHWC, 2, 1, 1, NCHW),  # nearly 2^31 pixels in one
    ((1, 2, 2**15 + 8, 2**15), NHWC, 1, 2, 2048, NHWC),
    ((2**25 + 3, 1, 8, 8), NHWC, 1, 1, 1, NHWC),  # more than 2^31 pixels
    ((2**25 + 3, 1, 8, 8), NHWC, 1, 2, 1, NHWC),
    ((2**22 + 3, 1, 1, 1), NHWC, 513, 1, 1, NHWC),  # y alone
    ((5, 1, 2**10, 2**10), NCHW, 513, 1, 1, NCHW),
    ((5, 3, 2**10, 2**10), NHWC, 513, 1, 1, NHWC),
]


@pytest.fixture
def one_program(monkeypatch):
    """Launches of conv_act run the program whose number is set, out of a grid too large to be run."""
    small_gemm_tiles(monkeypatch, block_k=32, group_m=8)

    class OneProgram:
        number = programs = 0

        def __getitem__(self, grid):
            (self.programs,) = grid
            number = self.number % self.programs
            handle = TensorHandle(np.array([number], dtype=np.int32), tl.int32)
            monkeypatch.setattr(interpreter_builder, "create_get_program_id", lambda axis: handle)
            return conv_act_forward_kernel[(1,)]

    program = OneProgram()
    monkeypatch.setattr(conv_act, "conv_act_forward_kernel", program)
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *args: None)  # copies every page onto itself
    return program


@pytest.mark.parametrize("number", (0, -1), ids=("first", "last"))
@pytest.mark.parametrize("shape, x_format, k, kernel, stride, y_format", BIG, ids=str)
def test_row1_offsets_beyond_int32(one_program, number, shape, x_format, k, kernel, stride, y_format):
    (n, c, height, width), dtype = shape, torch.float16
    p, q = (height - kernel) // stride + 1, (width - kernel) // stride + 1
    x = torch.empty(shape, dtype=dtype, memory_format=x_format)
    y = torch.empty((n, k, p, q), dtype=dtype, memory_format=y_format)
    assert max(x.numel(), y.numel()) > 2**31 - 2**17
    weight = integers(k, c, kernel, kernel, dtype=dtype)
    # the pixels and the channels of the program's tile, and what its taps read
    tiles = -(-n * p * q // 16), -(-k // 16)
    last = number == -1
    rows = range((tiles[0] - 1) * 16, n * p * q) if last else range(16)
    columns = slice((tiles[1] - 1) * 16, k) if last else slice(0, min(16, k))
    pixels = [(m // (p * q), m // q % p, m % q) for m in rows]
    for i, a, b in pixels:
        window = x[i, :, a * stride : a * stride + kernel, b * stride : b * stride + kernel]
        window.copy_(integers(*window.shape))
        y[i, columns, a, b] = NAN
    one_program.number = number
    how = {"stride": (stride, stride), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
    assert why_not(x, weight, *how.values()) == []
    conv_act_forward(x, weight, None, None, y, **how, act="none", tf32=False)
    assert one_program.programs == tiles[0] * tiles[1]
    for i, a, b in pixels:
        window = x[i, :, a * stride : a * stride + kernel, b * stride : b * stride + kernel].double()
        assert torch.equal(y[i, columns, a, b].double(), (weight[columns].double() * window).sum((1, 2, 3)))


def test_row1_weights_beyond_int32(one_program):
    storage = torch.empty(16 * 2**27 + 2**13, dtype=torch.float16)
    for strides in ((2**27, 1, 2**12, 2**10), (1, 2**27, 2**12, 2**10), (8, 1, 16 * 2**26, 2**10)):
        weight = storage.as_strided((17, 17 if strides[1] > 1 else 16, 2, 2), strides)
        if strides[0] == 8:
            weight = storage.as_strided((17, 3, 2, 2), strides)
        weight.copy_(integers(*weight.shape))
        x = integers(1, weight.shape[1], 3, 3, dtype=torch.float16).contiguous(memory_format=NHWC)
        y = torch.full((1, 17, 2, 2), NAN, dtype=torch.float16).contiguous(memory_format=NHWC)
        for one_program.number in range(2):
            conv_act_forward(
                x, weight, None, None, y,
                stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1, act="none", tf32=False,
            )  # fmt: skip
        assert torch.equal(y.double(), convolution64(x, weight, None, None))
